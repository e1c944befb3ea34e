"""What FlashInfer's own code finds as the wrapper's `_cached_module` while our kernel serves its plan."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decode import BatchDecodeWithPagedKVCacheWrapper


class PlannedModule:
    """Takes FlashInfer's fast planning to the wrapper, and the rest to FlashInfer's module.

    `flashinfer.decode.fast_decode_plan` calls `plan` with the arguments of FlashInfer's CUDA-core module (15) or of its
    tensor-core modules (16; 19 in 0.6, 20 in 0.7.2, 21 in 0.7.4).

    Attributes:
        flashinfers: FlashInfer's module for the same plan, there after a run that our kernel could not serve.
    """

    def __init__(self, wrapper: BatchDecodeWithPagedKVCacheWrapper) -> None:
        self._wrapper = weakref.ref(wrapper)
        self.flashinfers: Any = None

    def plan(self, *args: Any) -> Any:
        """Plans the wrapper anew; returns what FlashInfer's code is to keep as the plan."""
        wrapper = self._wrapper()
        if wrapper is None:
            raise RuntimeError("plan: the wrapper that this module belongs to is gone")
        if len(args) == 15:
            indptr_host, batch_size, num_qo_heads, num_kv_heads, page_size = args[3:8]
            window_left, logits_soft_cap, head_dim = args[9:12]
            # There is no place for fixed splits: those of the plan stay. 0.7 asks before where to plan, and a call that
            # names splits of its own does not come here (`_auto_prefers_cudnn`).
            changes = {"logits_soft_cap": logits_soft_cap}
        elif len(args) in (16, 19, 20, 21):
            indptr_host = args[4]
            batch_size, num_qo_heads, num_kv_heads, page_size = args[7:11]
            head_dim, window_left = args[12], args[15]
            fixed_split_size, disable_split_kv = args[16:18] if len(args) > 16 else (-1, False)
            changes = {
                "fixed_split_size": None if fixed_split_size == -1 else fixed_split_size,
                "disable_split_kv": disable_split_kv,
            }
        else:
            raise TypeError(f"plan: expected FlashInfer's 15, 16 or 19 to 21 arguments, got {len(args)}")
        return wrapper._plan_again(
            indptr_host,
            batch_size=batch_size,
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            window_left=window_left,
            **changes,
        )

    def __getattr__(self, name: str) -> Any:
        if self.__dict__.get("flashinfers") is None:
            raise AttributeError(f"our kernel serves this plan, and has no {name!r} of FlashInfer's modules")
        return getattr(self.flashinfers, name)
