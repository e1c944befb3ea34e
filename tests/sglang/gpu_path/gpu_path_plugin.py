"""An SGLang plugin for tests: the GPU backend's own code, on the CPU.

The attention backend `fi_prefetch_gpu_path` is `FiPrefetchAttnBackend` with three things put in the place of a GPU:
what asks for CUDA or pinned memory gets the CPU's, SGLang's Triton kernels run in Triton's interpreter
(TRITON_INTERPRET=1), and the wrapper runs the reference. Prefill, for which there is no such substitute, is SGLang's
torch_native, in the place of FlashAttention-3, as if this were a Hopper GPU. Everything else is the real thing:
SGLang's FlashInfer backend, its page-table kernels and our overrides.

CUDA graphs are played out as far as metadata goes. A decode step of at most `GRAPH_BATCH` requests is padded to a
batch size that was "captured" once, is prepared with `init_forward_metadata_out_graph`, and then runs with the wrapper
of that batch size, which nobody may plan again. Larger steps take the way without graphs.
"""

from __future__ import annotations

import importlib
import logging
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

NAME = "fi_prefetch_gpu_path"
GRAPH_BATCH = 4
GRAPH_SIZES = (2, 4)

logger = logging.getLogger("fi_prefetch")


class CpuForCuda(TorchFunctionMode):
    """Within the block, memory that is asked for on a GPU, or pinned, is ordinary memory."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)


def register() -> None:
    from sglang.srt import server_args
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    server_args.add_attention_backend_choices([NAME])
    register_attention_backend(NAME)(create)


def import_flashinfer_backend() -> None:
    """SGLang's FlashInfer backend with FlashInfer's names in it, which it leaves out where there is no GPU."""
    import sglang.srt.utils

    module = "sglang.srt.layers.attention.flashinfer_backend"
    sys.modules.pop(module, None)
    available = sglang.srt.utils.is_flashinfer_available
    sglang.srt.utils.is_flashinfer_available = lambda: True
    try:
        importlib.import_module(module)
    finally:
        sglang.srt.utils.is_flashinfer_available = available


def create(runner: Any) -> Any:
    import_flashinfer_backend()
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.layers.attention.flashinfer_backend import DecodeMetadata
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from fi_prefetch.sglang import named_backends, prefill
    from fi_prefetch.sglang.cuda_backend import FiPrefetchAttnBackend
    from fi_prefetch.sglang.decode_wrapper import ServedDecodeWrapper

    named_backends.do_without_triton()
    named_backends.default = lambda runner: "fa3"
    prefill.NAME = NAME
    register_attention_backend("fa3")(TorchNativeAttnBackend)

    class GpuPathBackend(FiPrefetchAttnBackend):
        def __init__(self) -> None:
            self._native = TorchNativeAttnBackend(runner)
            with CpuForCuda():
                super().__init__(runner)
                self.init_cuda_graph_state(max_bs=GRAPH_BATCH, max_num_tokens=GRAPH_BATCH)
                for bs in GRAPH_SIZES:
                    capture = SimpleNamespace(
                        batch_size=bs,
                        forward_mode=ForwardMode.DECODE,
                        positions=torch.zeros(bs, dtype=torch.int64),
                        req_pool_indices=torch.zeros(bs, dtype=torch.int64),
                        seq_lens=torch.ones(bs, dtype=torch.int64),
                        seq_lens_cpu=torch.ones(bs, dtype=torch.int64),
                        seq_lens_sum=bs,
                        encoder_lens=None,
                        spec_info=None,
                        out_cache_loc=torch.zeros(bs, dtype=torch.int64),
                        kv_loc_plan=None,
                    )
                    if hasattr(runner, "kv_index_translator"):
                        runner.kv_index_translator.bind_runner_slots(capture)
                    self.init_forward_metadata_out_graph(capture, in_capture=True)
            self._plans_at_capture = dict(PLANS)
            logger.info("gpu_path: graphs captured for batch sizes %s", GRAPH_SIZES)

        def init_forward_metadata(self, forward_batch: Any) -> None:
            self._native.init_forward_metadata(forward_batch)
            self._rows = None
            with CpuForCuda():
                if forward_batch.batch_size > GRAPH_BATCH:
                    super().init_forward_metadata(forward_batch)
                    logger.info("gpu_path: decode of %d without a graph", forward_batch.batch_size)
                    return
                self._replay(forward_batch)

        def _replay(self, forward_batch: Any) -> None:
            raw = forward_batch.batch_size
            bs = next(size for size in GRAPH_SIZES if size >= raw)

            def padded(values: torch.Tensor, fill: int) -> torch.Tensor:
                return torch.cat([values, torch.full((bs - raw,), fill, dtype=values.dtype)])

            view = SimpleNamespace(
                batch_size=bs,
                forward_mode=forward_batch.forward_mode,
                req_pool_indices=padded(forward_batch.req_pool_indices, 0),
                seq_lens=padded(forward_batch.seq_lens, 1),
                seq_lens_cpu=padded(forward_batch.seq_lens_cpu, 1),
                seq_lens_sum=forward_batch.seq_lens_sum + bs - raw,
                encoder_lens=None,
                spec_info=None,
                out_cache_loc=forward_batch.out_cache_loc,
                kv_loc_plan=getattr(forward_batch, "kv_loc_plan", None),
            )
            self.init_forward_metadata_out_graph(view)
            if PLANS != self._plans_at_capture:
                raise AssertionError(f"planned for a replay: {PLANS}, after the captures {self._plans_at_capture}")
            self.forward_metadata = DecodeMetadata(
                self.decode_cuda_graph_metadata[bs], swa_out_cache_loc=self._native.swa_out_cache_loc
            )
            self._rows = bs
            logger.info("gpu_path: decode of %d by the graph of %d", raw, bs)

        def forward_decode(
            self, q: torch.Tensor, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
        ) -> torch.Tensor:
            rows = q.shape[0]
            if self._rows is not None:
                q = torch.cat([q, q.new_zeros(self._rows - rows, *q.shape[1:])])
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)[:rows]

    plan = ServedDecodeWrapper.plan

    def counted_plan(wrapper: Any, *args: Any, **kwargs: Any) -> None:
        if wrapper.is_cuda_graph_enabled:
            PLANS[wrapper._fixed_batch_size] = PLANS.get(wrapper._fixed_batch_size, 0) + 1
        plan(wrapper, *args, **kwargs)

    ServedDecodeWrapper.plan = counted_plan
    return prefill.beside(runner, GpuPathBackend())


# Plans of CUDA-graph wrappers so far, by batch size.
PLANS: dict[int, int] = {}
