"""The decode wrapper as SGLang's FlashInfer backend drives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import checks, torch_op
from ..decode import BatchDecodeWithPagedKVCacheWrapper

# Kernels that make their own schedule from the page table when they run.
SELF_SCHEDULING = ("fi_prefetch", "reference")


class ServedDecodeWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """Our wrapper, planned once for each CUDA graph.

    SGLang plans without a logit cap and names it in each layer's call. Where the layers share one it is planned for, so
    that a plan is of the kernel that runs, and what `ready="plan"` works out for it is used.

    SGLang calls `begin_forward` before every replay, and after the capture puts FlashInfer's `fast_decode_plan` in its
    place, which wants the page table on the host. Our kernel reads the page table in the buffers of the graph, which
    SGLang has just filled on the device, so nothing is left to do but, where the promise is "plan", to work out who
    reads what.
    """

    def __init__(self, *arguments: Any, logits_soft_cap: float = 0.0, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._layers_soft_cap = logits_soft_cap

    def plan(self, *arguments: Any, **options: Any) -> None:
        super().plan(*arguments, **{"logits_soft_cap": self._layers_soft_cap} | options)

    @property
    def begin_forward(self) -> Callable[..., None]:
        if self.is_cuda_graph_enabled and self.kernel_choice.kernel in SELF_SCHEDULING:
            return self._keep_plan
        return self.plan

    @begin_forward.setter
    def begin_forward(self, planner: Callable[..., None]) -> None:
        """Leaves SGLang's choice of planner aside: every planner but the two above costs host time for nothing."""

    def _keep_plan(self, indptr: torch.Tensor, indices: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """`plan` for a page table that is in the wrapper's own buffers already, else the real one."""
        in_place = (
            indptr.data_ptr() == self._paged_kv_indptr_buf.data_ptr()
            and indices.data_ptr() == self._paged_kv_indices_buf.data_ptr()
        )
        if in_place:
            self._schedule()
        else:
            self.plan(indptr, indices, *args, **kwargs)

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        *,
        sm_scale: float | None = None,
        logits_soft_cap: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
    ) -> torch.Tensor:
        """FlashInfer's `forward` as far as SGLang calls it: a layer's scale and cap with each call.

        FlashInfer's own leaves them in attributes for `run` to read. Under torch.compile such a write takes effect
        when the compiled code is done, while `run` reads when that code runs: every layer would get the scale and cap
        of the call before. So there they travel as arguments of one custom op.
        """
        if not torch.compiler.is_compiling():
            return self._forward(q, paged_kv_cache, None, sm_scale, logits_soft_cap, k_scale, v_scale)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        k, v = checks.paged_kv_cache(paged_kv_cache, self._kv_layout)
        _served_decode(self._number, q, k, v, out, sm_scale, logits_soft_cap, k_scale, v_scale)
        return out

    def _forward(
        self, q: torch.Tensor, paged_kv_cache: Any, out: torch.Tensor | None, sm_scale: float | None,
        logits_soft_cap: float | None, k_scale: float | None, v_scale: float | None,
    ) -> torch.Tensor:  # fmt: skip
        self._pos_encoding_mode, self._window_left, self._rope_scale, self._rope_theta = "NONE", -1, None, None
        self._logits_soft_cap = logits_soft_cap or 0.0
        self._sm_scale = sm_scale
        rows = self._decision.spec.batch_size
        if q.shape[0] > rows:
            # A half of a batch under two-batch overlap: its tokens are padded to a multiple of the tensor-parallel
            # ranks, its requests are not. Nobody uses the rows beyond, but they go through the layers that follow.
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
            out[rows:].zero_()
            self.run(q[:rows], paged_kv_cache, k_scale=k_scale, v_scale=v_scale, out=out[:rows])
            return out
        return self.run(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale, out=out)


@torch.library.custom_op(
    "fi_prefetch::served_decode",
    mutates_args=("out",),
    schema="(SymInt wrapper, Tensor q, Tensor k_cache, Tensor v_cache, Tensor(a!) out, float? sm_scale, "
    "float? logits_soft_cap, float? k_scale, float? v_scale) -> ()",
)
def _served_decode(
    wrapper: int,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    sm_scale: float | None,
    logits_soft_cap: float | None,
    k_scale: float | None,
    v_scale: float | None,
) -> None:
    """`ServedDecodeWrapper.forward` of a registered wrapper, into `out`."""
    served = torch_op._wrappers[wrapper]
    served._forward(q, (k_cache, v_cache), out, sm_scale, logits_soft_cap, k_scale, v_scale)


@_served_decode.register_fake
def _(*_arguments: Any) -> None:
    """Shapes are known without it: the op only fills `out`."""
