"""Who serves a plan: what dispatch chose, with our kernel's module loaded and its own plan made."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch

from . import device, dispatch, jit, tune
from .dispatch import DecodeSpec, KernelChoice

_TILE_TOKENS = 16
_MOST_BLOCKS = 1024  # that the kernel's merge takes
# Our module's plan does not read the page table, which may not be on the host.
_NO_INDPTR = torch.empty(0, dtype=torch.int32)
_NO_WORKSPACES = (torch.empty(0, dtype=torch.uint8),) * 2


@dataclass(frozen=True)
class Decision:
    """Who serves a plan.

    Attributes:
        spec: what was planned; None before the first plan.
        choice: the kernel and the reason.
        kv_bytes: upper bound of the KV that a call reads; None where nobody knows, as in a CUDA graph.
        module: our compiled module; None where another serves.
        plan_info: what its plan returned, on the grid in use; its run wants it back.
        blocks, warps: the launch; `stages`: tiles in a warp's pipeline; `tile_bytes`: K and V of a tile.
        partial_bytes: needed of the float workspace; `counter_bytes`: of the counters; `planned_bytes`: for what the
            module's schedule works out.
    """

    spec: DecodeSpec
    choice: KernelChoice
    kv_bytes: int | None = None
    module: Any = None
    plan_info: Any = None
    blocks: int = 0
    warps: int = 0
    stages: int = 0
    tile_bytes: int = 0
    partial_bytes: int = 0
    counter_bytes: int = 0
    planned_bytes: int = 0


def kernel_for(spec: DecodeSpec, where: torch.device) -> tuple[KernelChoice, Any]:
    """The choice for a spec on a device and, where it is our kernel, its module, compiled when needed."""
    choice = dispatch.choose(spec, device.facts(where))
    if choice.kernel != "fi_prefetch":
        return choice, None
    try:
        return choice, jit.load(spec.variant())
    except jit.KernelUnavailableError as error:
        return KernelChoice("flashinfer", str(error)), None


def decide(
    spec: DecodeSpec, kv_bytes: int | None, most_pages: int, float_workspace: torch.Tensor, int_workspace: torch.Tensor,
    pinned_workspace: torch.Tensor,
) -> Decision:  # fmt: skip
    """Who serves a spec with these workspaces, on their device.

    Args:
        kv_bytes: upper bound of the KV that a call reads; None where nobody knows, as in a CUDA graph.
        most_pages: that a page table of this plan may list.
    """
    choice, module = kernel_for(spec, float_workspace.device)
    if module is None:
        return Decision(spec, choice, kv_bytes)
    workspaces = (float_workspace, int_workspace, pinned_workspace)
    try:
        with on_device(float_workspace.device):
            plan_info = module.plan(*workspaces, _NO_INDPTR, *_shape(spec))
            if spec.split_tokens is not None:
                plan_info = module.fix_splits(
                    plan_info, spec.split_tokens, most_pages, spec.page_size, spec.batch_size, spec.num_kv_heads
                )
    except (RuntimeError, ValueError) as error:
        return Decision(spec, KernelChoice("flashinfer", f"our kernel's plan failed: {error}"), kv_bytes)
    size = float_workspace.numel() * float_workspace.element_size()
    choice = dispatch.check_workspace(choice, int(plan_info[3]), size)
    if choice.kernel != "fi_prefetch":
        return Decision(spec, choice, kv_bytes)
    if spec.split_tokens is None:  # else the grid is part of the result
        tuned = _on_tuned_grid(module, plan_info, spec, kv_bytes, device.facts(float_workspace.device))
        if int(tuned[3]) <= size:
            plan_info = tuned
    numbers = (int(number) for number in list(plan_info))
    blocks, warps, _, partial_bytes, counter_bytes, _, _, stages, _, planned_bytes = numbers
    tile_bytes = 2 * _TILE_TOKENS * spec.head_dim * spec.dtype_kv.itemsize
    counter_bytes = max(counter_bytes, 4)  # a launch takes a buffer of them even where nothing meets
    return Decision(
        spec, choice, kv_bytes, module, plan_info, blocks, warps, stages, tile_bytes, partial_bytes, counter_bytes,
        planned_bytes,
    )  # fmt: skip


def _on_tuned_grid(module: Any, plan_info: Any, spec: DecodeSpec, kv_bytes: int | None, facts: device.GpuFacts) -> Any:
    """The plan with the grid that suits a call of this size on this GPU; the plan itself where the kernel refuses."""
    grid = tune.grid_for(tune.rules_for(facts.key), kv_bytes)
    blocks = min(facts.sm_count * grid.blocks_per_sm, _MOST_BLOCKS)
    warps = min(grid.warps, int(plan_info[1]))
    try:
        return module.adjust_plan(plan_info, spec.batch_size, blocks, warps, grid.min_tiles_per_warp)
    except ValueError:  # a batch too large for so few warps
        return plan_info


def workspace_size(spec: DecodeSpec, most_pages: int, module: Any, float_workspace: torch.Tensor) -> tuple[int, int]:
    """Bytes of float and int workspace that our module needs; `float_workspace` only says on which device."""
    with on_device(float_workspace.device):
        if spec.split_tokens is not None:
            plan_info = module.plan(float_workspace, *_NO_WORKSPACES, _NO_INDPTR, *_shape(spec))
            shape = (spec.page_size, spec.batch_size, spec.num_kv_heads)
            _, _, _, float_bytes, int_bytes, *_ = module.fix_splits(plan_info, spec.split_tokens, most_pages, *shape)
        else:
            float_bytes, int_bytes = module.workspace_size(float_workspace, _NO_INDPTR, *_shape(spec))
    return int(float_bytes), int(int_bytes)


def on_device(where: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within the block a CUDA device is the current one; nothing to do where it is already, or for the CPU."""
    if where.type != "cuda" or torch.cuda.current_device() == where.index:
        return contextlib.nullcontext()
    return torch.cuda.device(where)


def _shape(spec: DecodeSpec) -> tuple[Any, ...]:
    """The arguments that our module's plan and workspace_size share: FlashInfer's, from the batch size on.

    They have no place for several query tokens a request; to the kernel's plan they are more query heads of a kv head.
    """
    return (
        spec.batch_size,
        spec.num_qo_heads * spec.q_len_per_req,
        spec.num_kv_heads,
        spec.page_size,
        spec.use_cuda_graph,
        spec.window_left,
        spec.logits_soft_cap,
        spec.head_dim,
        spec.head_dim,
        _empty(spec.dtype_q),
        _empty(spec.dtype_kv),
    )


@functools.cache
def _empty(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(0, dtype=dtype)
