"""A decode step's K and V into the cache, in one launch that lets attention begin beside it.

Before it waits for the kernel before it, it lets the kernel after it start: our decode kernel is launched, makes its
schedule and brings in what the step does not write, while the step's queries and K are still being turned and stored.
It waits for this kernel where it needs what was written, and this one ends only after the kernel before. SGLang's own
store lets it start later: 0.5.16's when it is done, 0.5.23's when the kernel before is. With an e4m3 cache SGLang
converts K, then V, then stores both: three launches a layer.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]

_FLOATS = (torch.bfloat16, torch.float16)
# Triton has the conversion to e4m3, and GPUs programmatic dependent launch, from here on.
_CONVERTS = (8, 9)
_LAUNCHES_DEPENDENTS = (9, 0)


def serves(pool: Any, device: torch.device) -> bool:
    """Whether one of SGLang's pools has rows that `store` can write, better than SGLang does."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    # Not a pool derived from it: those have other rows, or other places for them, as a quantized one has.
    if type(pool) is not MHATokenToKVPool or pool.is_quantized_kv_cache or pool.kv_cache_layout != "nhd":
        return False
    if pool.dtype in _FLOATS:
        return launches_dependents(device)
    return pool.dtype == torch.float8_e4m3fn and (
        device.type == "cpu" or torch.cuda.get_device_capability(device) >= _CONVERTS
    )


def launches_dependents(device: torch.device) -> bool:
    """Whether a GPU has programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _LAUNCHES_DEPENDENTS


def takes(k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, cache: torch.dtype) -> bool:
    """Whether `store` can read a step's K and V: rows of one size, each of them dense and with a slot, of the cache's
    type or to be converted to e4m3.

    A half of a batch under two-batch overlap may have more rows than slots; SGLang refuses those.
    """
    return (
        k.dtype == v.dtype
        and k.dtype in _FLOATS
        and cache in (k.dtype, torch.float8_e4m3fn)
        and k.shape == v.shape
        and k[:1].is_contiguous()
        and v[:1].is_contiguous()
        and slots.shape[0] == k.shape[0]
        and slots.is_contiguous()
    )


def store(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor,
    dependent: bool,
) -> None:  # fmt: skip
    """Stores each token's K and V, converted where the cache is e4m3.

    What is beyond e4m3's range becomes its end, where SGLang's conversion makes it no number.

    Args:
        k, v: [tokens, kv heads, head_dim], which `takes` takes for this cache.
        k_cache, v_cache: [slots, kv heads, head_dim] of a pool that `serves`.
        slots: of each token, where it goes. Nowhere at slot 0, which is nobody's and stands for the rows that fill up a
            graph's batch, and outside of the cache.
        dependent: by programmatic dependent launch, which the GPU has.
    """
    tokens = k.shape[0]
    if not tokens:
        return
    row = k[0].numel()
    _store[(tokens, 2)](
        k, v, k_cache, v_cache, slots, k.stride(0), v.stride(0), k_cache.stride(0), v_cache.stride(0), row,
        k_cache.shape[0],
        BLOCK=triton.next_power_of_2(row), DEPENDENT=dependent, **({"launch_pdl": True} if dependent else {}),
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
    places,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        # In this order: the kernel after this one may then start beside the one before, too.
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if (slot > 0) & (slot < places):
        if tl.program_id(1) == 0:
            _store_row(k + token * k_stride, k_cache + slot * k_cache_stride, row, BLOCK)
        else:
            _store_row(v + token * v_stride, v_cache + slot * v_cache_stride, row, BLOCK)


@triton.jit
def _store_row(source, target, row, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    numbers = tl.load(source + at, mask=at < row)
    tl.store(target + at, numbers.to(target.dtype.element_ty), mask=at < row)
