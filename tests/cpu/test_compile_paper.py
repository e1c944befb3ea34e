"""The paper's kernel compiled by nvcc, and its machine code: registers, spills, and where its prefetches stand."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest
import tvm_ffi
from machine_code import kernels

from fi_prefetch import jit
from fi_prefetch.bench import flashinfer_run_ahead

KERNEL = re.compile(
    r"xformers_decode_kernelINS0_6TraitsI(?P<dtype>13__nv_bfloat16|6__half)Li(?P<dim>\d+).*PrefetchE(?P<prefetch>\d)"
)
KINDS = {(dtype, dim) for dtype in ("13__nv_bfloat16", "6__half") for dim in (64, 128)}
OFF, BULK, LINES = 0, 1, 2
REGISTERS_OF_SM, THREADS = 65536, 128
RESIDENT = {64: 8, 128: 7}  # thread blocks an SM, by head_dim


def cuobjdump() -> Path:
    """NVIDIA's disassembler, out of its pip package."""
    try:
        package = importlib.import_module("nvidia.cu13")
    except ModuleNotFoundError as error:
        raise FileNotFoundError("cuobjdump is not there: pip install 'nvidia-cuda-cuobjdump>=13'") from error
    return next(tool for folder in package.__path__ if (tool := Path(folder) / "bin" / "cuobjdump").is_file())


@pytest.fixture(scope="module", params=["80", "90a", "100a", "120a"])
def machine_code(request, tmp_path_factory) -> tuple[str, dict, dict]:
    """The architecture; and of each kernel (dtype, head_dim, prefetch), its resource usage and its instructions."""
    cubin = tmp_path_factory.mktemp("paper") / f"sm_{request.param}.cubin"
    includes = [f"-I{jit.csrc_dir()}", f"-I{tvm_ffi.libinfo.find_include_path()}"]
    flags = ["-std=c++17", "-O3", "-Werror=all-warnings", *includes]
    target = f"-gencode=arch=compute_{request.param},code=sm_{request.param}"
    command = [jit.nvcc_path(), *flags, target, "-cubin", "-o", cubin, jit.csrc_dir() / "xformers_decode.cu"]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    usage, code = {}, {}
    kernel = None
    for line in dump(cubin, "-res-usage").splitlines():
        if "Function" in line:
            kernel = name_of(line)
        elif kernel and "REG:" in line:
            usage[kernel] = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
    for line in dump(cubin, "-sass").splitlines():
        if "Function" in line:
            kernel = name_of(line)
        elif kernel and (instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", line)):
            code.setdefault(kernel, []).append(instruction[1])
    return request.param, usage, code


def dump(cubin: Path, what: str) -> str:
    return subprocess.run([cuobjdump(), what, cubin], capture_output=True, text=True, check=True).stdout


def name_of(line: str) -> tuple[str, int, int] | None:
    found = KERNEL.search(line)
    return (found["dtype"], int(found["dim"]), int(found["prefetch"])) if found else None


def test_every_kernel_is_there_without_spills(machine_code):
    _, usage, code = machine_code
    assert usage.keys() == code.keys() == {(*kind, prefetch) for kind in KINDS for prefetch in (OFF, BULK, LINES)}
    for kernel, used in usage.items():
        assert used["STACK"] == used["LOCAL"] == 0, (kernel, used)
        assert not [i for i in code[kernel] if i.startswith(("STL", "LDL"))], kernel


def test_a_prefetch_does_not_change_how_many_thread_blocks_fit(machine_code):
    """Else a comparison of on and off would be one of bytes in flight too."""
    _, usage, _ = machine_code
    for kind in KINDS:
        registers = [-(-usage[(*kind, prefetch)]["REG"] // 8) * 8 for prefetch in (OFF, BULK, LINES)]
        assert {REGISTERS_OF_SM // (THREADS * number) for number in registers} == {RESIDENT[kind[1]]}, (kind, registers)


def test_all_loads_and_the_prefetch_come_before_the_arithmetic(machine_code):
    """Behind the arithmetic, which waits for the loads, a prefetch would come too late to be worth anything."""
    architecture, _, code = machine_code
    for (dtype, dim, prefetch), instructions in code.items():
        order = "".join(filter(None, map(mark, instructions)))
        asked = {OFF: "", BULK: "l" if architecture == "80" else "b", LINES: "l"}[prefetch]
        # K's loop, then V's; nothing else in the kernel loads 16 bytes or prefetches.
        before = ["".join(sorted(part)) for part in re.split("F+", order)]
        assert before == 2 * ["L" * (dim // 16) + asked] + [""], (dtype, dim, prefetch, order)


def mark(instruction: str) -> str | None:
    """A letter for what the order is about: loads of KV, bulk and line prefetches, multiplications."""
    if instruction.startswith("LDG") and ".128" in instruction:
        return "L"
    if instruction.startswith("UBLKPF"):
        return "b"
    if instruction.startswith("CCTL") and ".PF2" in instruction:
        return "l"
    return "F" if instruction.startswith("FFMA") else None


# ---- FlashInfer's kernel with run-ahead ----------------------------------------------------------------------------


@pytest.mark.slow
def test_flashinfers_kernel_takes_the_prefetch_and_the_shared_memory() -> None:
    """The variant fits FlashInfer's templates, nothing of it is optimised away, and it costs no spill."""
    pad = flashinfer_run_ahead.PADS[-1]
    with jit.target_architectures(["9.0a"]):
        spec = flashinfer_run_ahead.jit_spec(pad)
        spec.extra_ldflags = jit.ldflags()  # here is no driver to link with
        spec.build(verbose=False, need_lock=True)
    found = [
        kernel
        for (_, name), kernel in kernels(spec.get_library_path()).items()
        if "BatchDecodeWithPagedKVCacheKernel" in name
    ]
    assert len(found) >= 5, "one a group size"
    for kernel in found:
        assert kernel.count("CCTL", "PF2") > 0 and kernel.count("LDL") == 0
        assert kernel.usage["SHARED"] >= pad
