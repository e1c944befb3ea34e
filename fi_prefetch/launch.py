"""One decode, checked and ready to run: by our kernel, or by the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import reference
from .decision import Decision, on_device

KV_LAYOUT_CODES = {"NHD": 0, "HND": 1}


@dataclass(slots=True)
class Call:
    """The tensors and numbers of one run.

    Attributes:
        q: [rows, num_qo_heads, head_dim]; k, v: 4-D paged caches in `kv_layout`.
        indptr, indices, last_page_len: the page table.
        out: as q, in the output dtype; lse: float32 [rows, num_qo_heads] or None. Both are written.
        sm_scale: multiplies Q K^T, the scales of q and k among it; v_scale: multiplies the output.
        sinks: [num_qo_heads] or None.
        rope_scale, rope_theta: read where the plan has rotary positions.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor | None
    kv_layout: str
    sm_scale: float
    v_scale: float
    sinks: torch.Tensor | None
    rope_scale: float
    rope_theta: float


def run_kernel(
    decision: Decision, call: Call, workspace: torch.Tensor, counters: torch.Tensor, pdl: bool, prefetch: list[int],
    running: torch.Tensor | None, planned: torch.Tensor | None,
) -> None:  # fmt: skip
    """Our kernel, on the current stream.

    Args:
        workspace: for partial results; counters: int32, zero, and zero again afterwards.
        pdl: launch as a programmatic dependent of the kernel before.
        prefetch: `PrefetchPlan.codes()`.
        running: int32, counts blocks while they read, for a window's prefetch to give way; None: nobody asks.
        planned: what `schedule` left for the decision and a page table that has not changed since; None: the kernel
            makes its own schedule.
    """
    spec = decision.spec
    with on_device(workspace.device):
        decision.module.run(
            workspace,
            counters,
            decision.plan_info,
            call.q,
            call.k,
            call.v,
            call.indptr,
            call.indices,
            call.last_page_len,
            call.out,
            call.lse,
            KV_LAYOUT_CODES[call.kv_layout],
            spec.window_left,
            pdl,
            None if call.sinks is None else call.sinks.to(torch.float32).contiguous(),
            spec.logits_soft_cap,
            call.sm_scale,
            call.v_scale,
            call.rope_scale,
            call.rope_theta,
            spec.q_len_per_req,
            prefetch,
            running,
            planned,
        )


def schedule(
    decision: Decision, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, planned: torch.Tensor
) -> None:
    """Works out on the current stream what each warp of the decision's launches does with a page table.

    Args:
        planned: int32, of at least the decision's planned_bytes, where it is left.
    """
    spec = decision.spec
    with on_device(planned.device):
        decision.module.schedule(
            decision.plan_info,
            planned,
            indptr,
            indices,
            last_page_len,
            spec.page_size,
            spec.num_kv_heads,
            spec.window_left,
            spec.q_len_per_req,
        )


def run_reference(decision: Decision, call: Call) -> None:
    """The reference."""
    spec = decision.spec
    out, lse = reference.batch_decode(
        call.q,
        call.k,
        call.v,
        call.indptr,
        call.indices,
        call.last_page_len,
        kv_layout=call.kv_layout,
        sm_scale=call.sm_scale,
        v_scale=call.v_scale,
        window_left=spec.window_left,
        logits_soft_cap=spec.logits_soft_cap,
        q_len_per_req=spec.q_len_per_req,
        sinks=call.sinks,
        pos_encoding_mode=spec.pos_encoding_mode,
        rope_scale=call.rope_scale,
        rope_theta=call.rope_theta,
        out_dtype=call.out.dtype,
    )
    call.out.copy_(out)
    if call.lse is not None:
        call.lse.copy_(lse)


def host_number(value: Any) -> float | None:
    """A scale as a number, 1 where it is left out; None where it is no number, or one that only the GPU knows."""
    if value is None:
        return 1.0
    if not isinstance(value, torch.Tensor):
        return float(value)
    return float(value) if value.device.type == "cpu" and value.numel() == 1 else None
