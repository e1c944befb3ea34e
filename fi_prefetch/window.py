"""The window op: bring the KV that the next decode reads first into L2 while HBM is idle."""

from __future__ import annotations

import contextlib

import torch

from . import device, dispatch
from .decision import Decision, on_device
from .decode import BatchDecodeWithPagedKVCacheWrapper
from .launch import KV_LAYOUT_CODES
from .prefetch import budget_bytes


def prefetch_kv(
    wrapper: BatchDecodeWithPagedKVCacheWrapper,
    paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    budget: int | float | None = None,
    stream: torch.cuda.Stream | None = None,
) -> bool:
    """Prefetches into L2 the head of each block's range, under the schedule that `wrapper.run` will use.

    Fire and forget: it returns at once, and nobody need wait for it. It gives way when the next `wrapper.run` begins,
    so a window that was shorter than expected costs little. Only a CUDA-graph capture needs `stream` to be
    joined before it ends, as any stream.

    Args:
        wrapper: a planned wrapper.
        paged_kv_cache: what `wrapper.run` will get.
        budget: bytes (int) or fraction of L2 (float) to fill; None: the wrapper's policy's `l2_budget`.
        stream: of the wrapper's GPU: where to run, after what the current stream holds now; None: the current stream.

    Returns whether a prefetch was launched: False on the CPU, where our kernel does not serve the plan, and with
    `fixed_split_size` or `disable_split_kv`.

    Raises RuntimeError before the first plan; ValueError or TypeError for a bad argument, by name.
    """
    if not isinstance(wrapper, BatchDecodeWithPagedKVCacheWrapper):
        raise TypeError(
            f"wrapper: expected fi_prefetch's BatchDecodeWithPagedKVCacheWrapper, got {type(wrapper).__name__}"
        )
    decision = wrapper._decision
    if decision.choice.kernel == "none":
        raise RuntimeError(f"prefetch_kv: expected plan() before prefetch_kv(): {decision.choice.reason}")
    if stream is not None and stream.device != wrapper.device:
        raise ValueError(f"stream: expected one of {wrapper.device}, got one of {stream.device}")
    k, v = wrapper._check_cache(decision.spec, paged_kv_cache)
    facts = device.facts(wrapper.device)
    limit = budget_bytes(wrapper._policy.l2_budget if budget is None else budget, facts.l2_bytes if facts else 0)
    if decision.module is None or decision.spec.split_tokens is not None or not decision.spec.batch_size or not limit:
        return False
    if dispatch.cache_obstacle(k, v) is not None:
        return False
    wrapper._running = wrapper._running_blocks
    _launch(wrapper, decision, k, v, limit, stream)
    return True


def _launch(
    wrapper: BatchDecodeWithPagedKVCacheWrapper, decision: Decision, k: torch.Tensor, v: torch.Tensor, limit: int,
    stream: torch.cuda.Stream | None,
) -> None:  # fmt: skip
    with on_device(wrapper.device):
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(wrapper.device))
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            decision.module.prefetch_kv(
                decision.plan_info,
                k,
                v,
                wrapper._paged_kv_indptr_buf,
                wrapper._paged_kv_indices_buf,
                wrapper._paged_kv_last_page_len_buf,
                KV_LAYOUT_CODES[wrapper._kv_layout],
                decision.spec.window_left,
                decision.spec.q_len_per_req,
                limit,
                decision.blocks,  # one for each of the decode call's, which then finds lines where it asked for them
                True,  # evict_last: what was brought in stays until attention reads it
                wrapper._running,
            )
