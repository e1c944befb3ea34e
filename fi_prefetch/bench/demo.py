"""The demonstration without a GPU: the same calls on the reference, and what the compiler makes of the kernels."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tvm_ffi

import fi_prefetch
from fi_prefetch.jit import Variant, csrc_dir, nvcc_path

from .inputs import DecodeInputs, KvPool, relative_error
from .shapes import Shape, parse_lens

CPU_SHAPES = (
    Shape(8, 2, 1, parse_lens("1x200")),
    Shape(8, 8, 16, parse_lens("4x100")),
    Shape(16, 2, 5, parse_lens("1x300+3x20"), head_dim=64),
    Shape(8, 1, 16, parse_lens("4x100"), kv_dtype="float8_e4m3fn"),
)
ARCHITECTURE = "sm_90a"
VARIANTS = tuple(
    Variant(torch.bfloat16, dtype_kv, torch.bfloat16, 128, False, False)
    for dtype_kv in (torch.bfloat16, torch.float8_e4m3fn)
)


@dataclass(frozen=True)
class CpuResult:
    """One shape decoded on the CPU: relative error against PyTorch's attention, and milliseconds."""

    shape: Shape
    error: float
    milliseconds: float


def decode_on_cpu(shape: Shape) -> CpuResult:
    """Plans and runs the wrapper on CPU tensors, and compares with PyTorch's attention a request at a time."""
    pool = KvPool(2 * shape.allocated_bytes, getattr(torch, shape.kv_dtype), torch.device("cpu"))
    inputs = DecodeInputs(shape, pool, l2_bytes=0, copies=1)
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(torch.empty(0, dtype=torch.uint8), "NHD")
    wrapper.plan(
        inputs.indptr,
        inputs.indices,
        inputs.last_page_len,
        shape.heads_q,
        shape.heads_kv,
        shape.head_dim,
        shape.page_size,
        q_data_type=inputs.q_dtype,
        kv_data_type=inputs.kv_dtype,
    )
    start = time.perf_counter()
    out = wrapper.run(inputs.q, inputs.cache(0))
    elapsed = time.perf_counter() - start
    assert isinstance(out, torch.Tensor)
    return CpuResult(shape, relative_error(out, attention(inputs)), elapsed * 1e3)


def attention(inputs: DecodeInputs) -> torch.Tensor:
    """PyTorch's attention in float32 over each request's tokens, looked up one by one: [batch, heads_q, head_dim]."""
    shape, (k, v) = inputs.shape, inputs.cache(0)
    outputs = []
    for request, length in enumerate(shape.lengths):
        tokens = torch.arange(length)
        pages = inputs.block_table[request, tokens // shape.page_size].long()
        keys, values = (
            cache[pages, tokens % shape.page_size].float().transpose(0, 1).repeat_interleave(shape.group, dim=0)
            for cache in (k, v)
        )
        query = inputs.q[request].float()[:, None]
        outputs.append(F.scaled_dot_product_attention(query, keys, values)[:, 0])
    return torch.stack(outputs)


@dataclass(frozen=True)
class KernelResources:
    """What ptxas reports about one kernel."""

    kernel: str
    registers: int
    spill_bytes: int


def compile_variant(variant: Variant) -> list[KernelResources]:
    """Compiles a variant's device code for ARCHITECTURE; raises KernelUnavailableError where there is no nvcc.

    Raises RuntimeError with the compiler's words where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(nvcc_path()),
            "-std=c++17",
            "-O3",
            f"-arch={ARCHITECTURE}",
            "--cubin",
            "-Xptxas=-v",
            f"-I{csrc_dir()}",
            *(
                f"-I{path}"
                for path in {tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()}
            ),
            *variant.macros(),
            str(csrc_dir() / "decode.cu"),
            "-o",
            os.path.join(folder, "decode.cubin"),
        ]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise RuntimeError(f"nvcc failed on {variant.name}: {answer.stderr.strip()[-2000:]}")
    return parse_resources(answer.stderr)


def parse_resources(ptxas: str) -> list[KernelResources]:
    """Registers and spills of every kernel in ptxas's report."""
    found = []
    for part in ptxas.split("Compiling entry function '")[1:]:
        registers = re.search(r"Used (\d+) registers", part)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if registers and spills:
            found.append(
                KernelResources(kernel_name(part.split("'")[0]), int(registers[1]), sum(map(int, spills.groups())))
            )
    return found


def kernel_name(mangled: str) -> str:
    """The kernel in a mangled name; a decode kernel with the most query rows (a kv head) and requests it is for."""
    kernel = re.search(r"\d+([a-z_]+_kernel)", mangled)
    name = kernel[1] if kernel else mangled
    size = re.search(r"Li(?:64|128|256)ELi(\d)E.*PositionE\dELb([01])E", mangled)
    if size is None or name != "decode_kernel":
        return name
    return f"{name}, {8 * int(size[1])} rows, {'32' if size[2] == '1' else 'more'} requests"


def has_nvcc() -> bool:
    """Whether there is a CUDA compiler."""
    try:
        return Path(nvcc_path()).is_file()
    except RuntimeError:
        return False
