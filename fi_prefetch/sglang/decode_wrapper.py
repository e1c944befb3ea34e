"""The decode wrapper as SGLang's FlashInfer backend drives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..decode import BatchDecodeWithPagedKVCacheWrapper

# Kernels that make their own schedule from the page table when they run.
SELF_SCHEDULING = ("fi_prefetch", "reference")


class ServedDecodeWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """Our wrapper, planned once for each CUDA graph.

    SGLang calls `begin_forward` before every replay, and after the capture puts FlashInfer's `fast_decode_plan` in its
    place, which wants the page table on the host. Our kernel reads the page table in the buffers of the graph, which
    SGLang has just filled on the device, so there is nothing left to do.
    """

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
        if not in_place:
            self.plan(indptr, indices, *args, **kwargs)
