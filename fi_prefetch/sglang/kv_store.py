"""A decode step's K and V into an e4m3 cache, in one launch.

SGLang converts K, then V, then stores both. In a step these kernels are all launch, three a layer.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]

# Triton has the conversion from here on.
_CAPABILITY = (8, 9)


def serves(pool: Any, device: torch.device) -> bool:
    """Whether one of SGLang's pools has rows of e4m3 that `store` can write."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    # Not a pool derived from it: those have other rows, or other places for them, as a quantized one has.
    if type(pool) is not MHATokenToKVPool or pool.is_quantized_kv_cache:
        return False
    if pool.dtype != torch.float8_e4m3fn or pool.kv_cache_layout != "nhd":
        return False
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= _CAPABILITY


def takes(k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `store` can read a step's K and V: rows of one size, each of them dense."""
    return (
        k.dtype == v.dtype
        and k.dtype in (torch.bfloat16, torch.float16)
        and k.shape == v.shape
        and k[:1].is_contiguous()
        and v[:1].is_contiguous()
    )


def store(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:  # fmt: skip
    """Converts and stores each token's K and V. What is beyond e4m3's range becomes its end, where SGLang's conversion
    makes it no number.

    Args:
        k, v: [tokens, kv heads, head_dim], for which `takes` holds.
        k_cache, v_cache: [slots, kv heads, head_dim] of a pool that `serves`.
        slots: of each token, where it goes.
    """
    tokens = k.shape[0]
    if not tokens:
        return
    row = k[0].numel()
    _store[(tokens, 2)](
        k, v, k_cache, v_cache, slots, k.stride(0), v.stride(0), k_cache.stride(0), v_cache.stride(0), row,
        BLOCK=triton.next_power_of_2(row),
    )  # fmt: skip


@triton.jit
def _store(
    k,
    v,
    k_cache,
    v_cache,
    slots,
    k_stride,
    v_stride,
    k_cache_stride,
    v_cache_stride,
    row,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if tl.program_id(1) == 0:
        _store_row(k + token * k_stride, k_cache + slot * k_cache_stride, row, BLOCK)
    else:
        _store_row(v + token * v_stride, v_cache + slot * v_cache_stride, row, BLOCK)


@triton.jit
def _store_row(source, target, row, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    numbers = tl.load(source + at, mask=at < row)
    tl.store(target + at, numbers.to(target.dtype.element_ty), mask=at < row)
