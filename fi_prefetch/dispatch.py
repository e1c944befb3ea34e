"""Which kernel runs a decode, and why: pure functions of what was asked for and of the GPU's facts."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .device import GpuFacts
from .jit import HEAD_DIMS, SUPPORTED_MAJORS, Variant

MAX_QUERY_ROWS = 16  # of one kv head: group size times query tokens a request
WHOLE_REQUEST = 1 << 32  # tokens: more than any request has
_FLOATS = (torch.float16, torch.bfloat16)
_FLOAT8S = (torch.float8_e4m3fn, torch.float8_e5m2)


class DecodeSpec(NamedTuple):
    """All that `plan()` learns which decides the kernel; no tensor, and nothing that changes from step to step.

    Attributes:
        dtype_q, dtype_kv, dtype_o, dtype_index: of the query, the cache, the output and the page table.
        batch_size, num_qo_heads, num_kv_heads, head_dim, page_size, q_len_per_req: as in `plan()`.
        pos_encoding_mode, window_left, logits_soft_cap: as in `plan()`.
        backend: what the constructor was asked for.
        custom_variant: whether `jit_args` brought a kernel of the user's own.
        fixed_split_size, disable_split_kv, window_right, is_causal: as in `plan()`.
        use_cuda_graph: whether the wrapper's page-table buffers are fixed.
        use_token_head_sf: as in `plan()`.
    """

    dtype_q: torch.dtype
    dtype_kv: torch.dtype
    dtype_o: torch.dtype
    batch_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    q_len_per_req: int = 1
    pos_encoding_mode: str = "NONE"
    window_left: int = -1
    logits_soft_cap: float = 0.0
    dtype_index: torch.dtype = torch.int32
    backend: str = "auto"
    custom_variant: bool = False
    fixed_split_size: int | None = None
    disable_split_kv: bool = False
    window_right: int = 0
    is_causal: bool | None = None
    use_cuda_graph: bool = False
    use_token_head_sf: bool = False

    @property
    def group_size(self) -> int:
        return self.num_qo_heads // self.num_kv_heads

    @property
    def query_rows(self) -> int:
        """Of a kv head."""
        return self.group_size * self.q_len_per_req

    def variant(self) -> Variant:
        """The compiled module that serves this."""
        return Variant(
            self.dtype_q,
            self.dtype_kv,
            self.dtype_o,
            self.head_dim,
            self.window_left >= 0,
            self.logits_soft_cap > 0,
            self.pos_encoding_mode,
            self.split_tokens is not None,
        )

    @property
    def split_tokens(self) -> int | None:
        """At which distance each request is cut, whatever the batch; None: where the batch suits the kernel best.

        FlashInfer counts `fixed_split_size` in pages, says -1 for none, and lets `disable_split_kv` win.
        """
        if self.disable_split_kv:
            return WHOLE_REQUEST
        if self.fixed_split_size is None or self.fixed_split_size <= 0:
            return None
        return self.fixed_split_size * self.page_size


@dataclass(frozen=True)
class KernelChoice:
    """Which kernel runs, and why.

    Attributes:
        kernel: "fi_prefetch", "flashinfer", "reference" (no GPU), or "none" before the first plan.
        reason: in words.
    """

    kernel: str
    reason: str


def choose(spec: DecodeSpec, facts: GpuFacts | None) -> KernelChoice:
    """The kernel for a plan on a GPU with these facts (None: not a CUDA device)."""
    if facts is None:
        unserved = _reference_obstacle(spec)
        if unserved is not None:
            return KernelChoice("none", unserved)
        return KernelChoice("reference", "the tensors are not on a CUDA device")
    obstacle = _obstacle(spec, facts)
    if obstacle is not None:
        return KernelChoice("flashinfer", obstacle)
    return KernelChoice("fi_prefetch", f"{spec.variant().name} serves this plan")


def _obstacle(spec: DecodeSpec, facts: GpuFacts) -> str | None:
    if spec.custom_variant:
        return "jit_args asks for a custom attention variant"
    if spec.backend not in ("auto", "fi_prefetch"):
        return f"backend={spec.backend!r} was asked for"
    if spec.use_token_head_sf:
        return "use_token_head_sf asks for a scale of each token and head"
    major, minor = facts.capability
    if major not in SUPPORTED_MAJORS:
        return f"compute capability {major}.{minor} is not one of {', '.join(f'{m}.x' for m in SUPPORTED_MAJORS)}"
    if spec.dtype_q not in _FLOATS:
        return f"queries are {spec.dtype_q}, not float16 or bfloat16"
    if spec.dtype_kv != spec.dtype_q and spec.dtype_kv not in _FLOAT8S:
        return f"the KV cache is {spec.dtype_kv}, neither the queries' {spec.dtype_q} nor a float8"
    if spec.dtype_o not in _FLOATS:
        return f"the output is {spec.dtype_o}, not float16 or bfloat16"
    if spec.dtype_index != torch.int32:
        return f"the page table is {spec.dtype_index}, not int32"
    if spec.head_dim not in HEAD_DIMS:
        return f"head_dim {spec.head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"
    if spec.query_rows > MAX_QUERY_ROWS:
        return (
            f"{spec.group_size} query heads a kv head times {spec.q_len_per_req} query tokens a request are "
            f"{spec.query_rows} rows, more than {MAX_QUERY_ROWS}"
        )
    if spec.pos_encoding_mode == "ALIBI" and spec.logits_soft_cap > 0:
        # FlashInfer's kernel multiplies the logits with sm_scale twice here; whoever asks for it gets that.
        return f"pos_encoding_mode='ALIBI' with logits_soft_cap={spec.logits_soft_cap}"
    return _unusual_mask(spec)


def _reference_obstacle(spec: DecodeSpec) -> str | None:
    if spec.custom_variant:
        return "jit_args asks for a custom attention variant, which needs a CUDA device"
    if spec.use_token_head_sf:
        return "use_token_head_sf asks for a scale of each token and head, which needs a CUDA device"
    if spec.dtype_kv == torch.uint8:
        return "an NVFP4 KV cache needs a CUDA device"
    if spec.window_right != 0:
        return f"window_right={spec.window_right} needs a CUDA device and backend='cute-dsl'"
    if spec.is_causal is not None and spec.is_causal != (spec.q_len_per_req > 1):
        return f"is_causal={spec.is_causal} with q_len_per_req={spec.q_len_per_req} is not supported"
    return None


def _unusual_mask(spec: DecodeSpec) -> str | None:
    if spec.window_right != 0:
        return f"window_right={spec.window_right}"
    if spec.is_causal is not None and spec.is_causal != (spec.q_len_per_req > 1):
        return f"is_causal={spec.is_causal} with q_len_per_req={spec.q_len_per_req}"
    return None


def check_workspace(choice: KernelChoice, partial_bytes: int, workspace_bytes: int) -> KernelChoice:
    """The choice once the kernel's plan has said how much of the float workspace it needs."""
    if partial_bytes <= workspace_bytes:
        return choice
    return KernelChoice(
        "flashinfer",
        f"the float workspace holds {workspace_bytes} bytes, the partial results need {partial_bytes}",
    )


def rope_obstacle(rope_scale: float, rope_theta: float) -> str | None:
    """Why our kernel cannot take these rotary frequencies; None where it can. The limits are decode.cu's."""
    if 1e-3 <= rope_scale <= 1e6 and 1 <= rope_theta <= 1e12:
        return None
    return f"rope_scale={rope_scale} and rope_theta={rope_theta} are not within 0.001 to 1e6 and 1 to 1e12"


def query_is_aligned(q: torch.Tensor) -> bool:
    """Whether every row of q [rows, num_qo_heads, head_dim] starts on a multiple of 16 bytes."""
    steps = [stride * q.element_size() for size, stride in zip(q.shape[:-1], q.stride(), strict=False) if size > 1]
    return q.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in steps)


def cache_obstacle(k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why our kernel cannot read this cache where it lies; None where it can.

    Args:
        k, v: 4-D paged caches of one shape, last stride 1.

    Raises ValueError for a cache that FlashInfer's kernels cannot read either: they, too, load 16 bytes at a time, and
    end in a sticky error on other addresses.
    """
    if (k.data_ptr() | v.data_ptr()) % 16:
        off = f"k_cache {k.data_ptr() % 16} and v_cache {v.data_ptr() % 16} bytes off"
        raise ValueError(f"paged_kv_cache: expected a start on a multiple of 16 bytes, got {off}")
    return _stride_obstacle(k.shape, k.stride(), v.stride(), k.element_size())


@functools.lru_cache(maxsize=4096)
def _stride_obstacle(
    shape: torch.Size, k_stride: tuple[int, ...], v_stride: tuple[int, ...], itemsize: int
) -> str | None:
    if not shape[0]:
        return "the cache has no pages"
    # The stride of a dimension of size 1 says nothing.
    wide = [dimension for dimension in range(3) if shape[dimension] > 1]
    steps = {
        name: {dimension: strides[dimension] * itemsize for dimension in wide}
        for name, strides in (("k_cache", k_stride), ("v_cache", v_stride))
    }
    for name, of_name in steps.items():
        if any(step % 16 for step in of_name.values()):
            got = tuple(of_name.values())
            raise ValueError(f"paged_kv_cache ({name}): expected strides of multiples of 16 bytes, got {got}")
    # Offsets are 32-bit numbers of the largest power of two that divides every stride.
    common = math.gcd(*(step for of_name in steps.values() for step in of_name.values())) or 16
    unit = common & -common
    for name, of_name in steps.items():
        extent = sum((shape[dimension] - 1) * step for dimension, step in of_name.items())
        if extent >= unit << 32:
            return f"{name} spans {extent >> 30} GiB in units of {unit} bytes, more than 32-bit offsets reach"
    return None
