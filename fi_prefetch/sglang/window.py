"""Prefetching the next layer's KV while an all-reduce leaves HBM idle. It costs time on two H200s: off by default.

Under tensor parallelism a layer ends with an all-reduce of a few hundred kilobytes: some microseconds in which the GPU
waits for its peers. The KV that the next layer's attention reads first is known by then, all but this step's token, so
it can be on its way into L2: FI_PREFETCH_SGLANG_WINDOW=all_reduce.

SGLang's layers give no hook between MLP and all-reduce, so this wraps `all_reduce` of the tensor-parallel group and
counts: after a layer's attention, the first all-reduce belongs to its output projection, the second to its MLP. Models
that fuse the all-reduce with the norm after it do not come here, and get no window.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention

from ..window import prefetch_kv

if TYPE_CHECKING:
    from .cuda_backend import FiPrefetchAttnBackend

# Of the all-reduces after a layer's attention, the one after its MLP. In the one before, the MLP's weights are still to
# come, tens of megabytes through the same L2.
_AFTER_MLP = 2
# Modes in which all-reduces cannot be counted: those of two batches, or of two streams, come in turns; compiled code
# counts when it is traced.
_UNCOUNTED = ("enable_two_batch_overlap", "enable_pdmux", "enable_torch_compile")

logger = logging.getLogger("fi_prefetch")


class AllReduceWindow:
    """Starts a prefetch beside each layer's last all-reduce in a decode step."""

    def __init__(self, backend: FiPrefetchAttnBackend, layers: list[RadixAttention], stream: Any) -> None:
        self._backend = backend
        self._following = dict(zip((layer.layer_id for layer in layers), layers[1:], strict=False))
        self._stream = stream
        self._next: RadixAttention | None = None
        self._reduces = 0
        self._unjoined = False

    @classmethod
    def open(
        cls, backend: FiPrefetchAttnBackend, layers: list[RadixAttention], server_args: Any
    ) -> AllReduceWindow | None:
        """The window of this rank's tensor-parallel group; None where it has one member and reduces nothing, or where
        the server's mode leaves nothing to go by."""
        from sglang.srt.distributed import get_tp_group

        for mode in _UNCOUNTED:
            if getattr(server_args, mode):
                logger.warning("fi_prefetch: the all-reduce window stays closed with --%s", mode.replace("_", "-"))
                return None
        group = get_tp_group()
        if group.world_size == 1:
            return None
        window = cls(backend, layers, torch.cuda.Stream(backend.workspace_buffer.device))
        reduce = group.all_reduce

        def all_reduce(input_: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            window.before_all_reduce()
            return reduce(input_, *args, **kwargs)

        group.all_reduce = all_reduce
        return window

    def after_attention(self, layer: RadixAttention) -> None:
        """A layer's decode attention has been launched."""
        self._next = self._following.get(layer.layer_id)
        self._reduces = 0

    def before_all_reduce(self) -> None:
        """An all-reduce is about to be launched on the current stream."""
        if self._unjoined:
            # A captured stream must be joined before the capture ends. Attention has started by now, so waiting for
            # its prefetch costs nothing.
            torch.cuda.current_stream().wait_stream(self._stream)
            self._unjoined = False
        if self._next is None:
            return
        self._reduces += 1
        if self._reduces == _AFTER_MLP:
            layer, self._next = self._next, None
            backend = self._backend
            wrapper = backend.forward_metadata.decode_wrappers[backend._get_wrapper_idx(layer)]
            cache = backend.token_to_kv_pool.get_kv_buffer(layer.layer_id)
            self._unjoined = prefetch_kv(wrapper, cache, stream=self._stream)
