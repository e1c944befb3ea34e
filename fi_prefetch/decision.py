"""Who serves a plan: what dispatch chose, with our kernel's module loaded and its own plan made."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch

from . import device, dispatch, jit
from .dispatch import DecodeSpec, KernelChoice

_TILE_TOKENS = 16
# Our module's plan does not read the page table, which may not be on the host.
_NO_INDPTR = torch.empty(0, dtype=torch.int32)


@dataclass(frozen=True)
class Decision:
    """Who serves a plan.

    Attributes:
        spec: what was planned; None before the first plan.
        choice: the kernel and the reason.
        module: our compiled module; None where another serves.
        plan_info: what its plan returned, and its run wants back.
        blocks, warps: the launch; `stages`: tiles in a warp's pipeline; `tile_bytes`: K and V of a tile.
        partial_bytes: needed of the float workspace; `counter_bytes`: of the counters.
    """

    spec: DecodeSpec
    choice: KernelChoice
    module: Any = None
    plan_info: Any = None
    blocks: int = 0
    warps: int = 0
    stages: int = 0
    tile_bytes: int = 0
    partial_bytes: int = 0
    counter_bytes: int = 0


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
    spec: DecodeSpec, float_workspace: torch.Tensor, int_workspace: torch.Tensor, pinned_workspace: torch.Tensor
) -> Decision:
    """Who serves a spec with these workspaces, on their device."""
    choice, module = kernel_for(spec, float_workspace.device)
    if module is None:
        return Decision(spec, choice)
    try:
        with on_device(float_workspace.device):
            plan_info = module.plan(float_workspace, int_workspace, pinned_workspace, _NO_INDPTR, *_shape(spec))
    except (RuntimeError, ValueError) as error:
        return Decision(spec, KernelChoice("flashinfer", f"our kernel's plan failed: {error}"))
    blocks, warps, shared_bytes, partial_bytes, counter_bytes = (int(number) for number in list(plan_info)[:5])
    choice = dispatch.check_workspace(choice, partial_bytes, float_workspace.numel() * float_workspace.element_size())
    if choice.kernel != "fi_prefetch":
        return Decision(spec, choice)
    tile_bytes = 2 * _TILE_TOKENS * spec.head_dim * spec.dtype_kv.itemsize
    stages = shared_bytes // max(1, warps * tile_bytes)
    return Decision(spec, choice, module, plan_info, blocks, warps, stages, tile_bytes, partial_bytes, counter_bytes)


def workspace_size(spec: DecodeSpec, module: Any, float_workspace: torch.Tensor) -> tuple[int, int]:
    """Bytes of float and int workspace that our module needs; `float_workspace` only says on which device."""
    with on_device(float_workspace.device):
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
