"""SGLang's FlashInfer backend with our decode wrappers. Prefill, verify and draft steps stay FlashInfer's.

What it takes from SGLang beyond the public `AttentionBackend`, all in `flashinfer_backend.py` of the tested releases:
`decode_wrappers`, `_create_decode_wrappers` and `cuda_graph_kv_indices` (where wrappers are made and which buffers they
get), `indices_updater_decode` with `call_begin_forward` (which fills the page table and plans), `_get_wrapper_idx`
(which of two wrappers a layer uses), and `decode_uses_dequant_workspace`, `enable_deterministic`,
`decode_split_tile_size`, `decode_kv_access`, `req_to_token_pool`.

It leaves out of a decode step what our kernel does not need: the plan on the host, the copy of each layer's queries
out of the rows that they share with K and V, and all but one of the launches that fill the page table, or convert and
store a layer's K and V in an e4m3 cache. And what stores a layer's K and V lets our kernel begin beside it.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend, FlashInferIndicesUpdaterDecode
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.runner_utils.capture_mode import get_is_capture_mode
from sglang.srt.utils.async_probe import maybe_detect_oob

from . import kv_store, named_backends, page_table, promises, settings
from . import layers as model_layers
from .decode_wrapper import SELF_SCHEDULING, ServedDecodeWrapper
from .plugin import NAME
from .window import AllReduceWindow

logger = logging.getLogger("fi_prefetch")

# self and the wrapper come first; SGLang passes the others by position or by name.
_PARAMETERS = list(inspect.signature(FlashInferIndicesUpdaterDecode.call_begin_forward).parameters)[2:]
_NEEDED = (
    "req_pool_indices", "paged_kernel_lens", "paged_kernel_lens_sum", "kv_indptr", "kv_start_idx", "spec_info",
    "seq_lens_cpu", "use_sliding_window_kv_pool",
)  # fmt: skip
if not set(_NEEDED) <= set(_PARAMETERS) or not hasattr(FlashInferAttnBackend, "_create_decode_wrappers"):
    raise RuntimeError(
        "--attention-backend fi_prefetch: this SGLang release's FlashInfer backend is not one that fi_prefetch knows "
        "(tested: 0.5.16 and 0.5.23); start with --attention-backend flashinfer"
    )


class FiPrefetchAttnBackend(FlashInferAttnBackend):
    """Decodes with our kernel where it serves the whole model, with FlashInfer's where not, as the start-up log says.

    Which it is, is decided once, from the model's layers and a decode of one token in each, so that nothing is left to
    be found out while serving.
    """

    decode_wrappers: list[Any]

    def __init__(self, runner: Any) -> None:
        super().__init__(runner, init_new_workspace=runner.init_new_workspace)
        self._check_kv_access(*named_backends.chosen(runner))
        self._layers = model_layers.attention_layers(runner.model)
        self._promise = promises.keeps(runner.server_args)
        self._requests_share_slots = named_backends.requests_share_slots(runner)
        self._graph_wrappers: dict[int, list[ServedDecodeWrapper]] = {}
        self._graph_plans: set[str] = set()
        self._window: AllReduceWindow | None = None

        flashinfers = self.decode_wrappers
        reason = self._obstacle()
        if reason is None:
            self.decode_wrappers = [self._wrapper() for _ in range(self.num_wrappers)]
            reason = self._try_each_layer()
        self._serves = reason is None
        if not self._serves:
            self.decode_wrappers = flashinfers
            logger.warning("fi_prefetch: FlashInfer's kernels decode this model: %s", reason)
            return
        self.indices_updater_decode = updater = _DecodePageTable(runner, self)
        device = self.workspace_buffer.device
        # Where reads are translated, so are the places to write to.
        self._stores = not updater.reads_are_translated() and kv_store.serves(self.token_to_kv_pool, device)
        self._launches_dependents = kv_store.launches_dependents(device)
        if settings.window() == "all_reduce":
            self._window = AllReduceWindow.open(self, self._layers, runner.server_args)
        self._log_start()

    def _check_kv_access(self, prefill: str, decode: str) -> None:
        """The check of the KV cache's format that SGLang makes for its FlashInfer backend under that name alone."""
        if prefill == NAME:
            self._check_kv_attention_access("prefill", self.prefill_kv_access)
        if decode == NAME:
            self._check_kv_attention_access("decode", self.decode_kv_access)

    def _obstacle(self) -> str | None:
        """Why our kernel cannot decode this model, from what SGLang says about it; None where it may."""
        if self.decode_uses_dequant_workspace:
            return "the KV cache is unpacked into a workspace before each layer's attention"
        if not self._layers:
            return "no attention layers were found in the model"
        updater = self.indices_updater_decode
        return model_layers.differing_layer(self._layers, updater.num_qo_heads, updater.num_kv_heads, updater.head_dim)

    def _wrapper(self, **graph_buffers: Any) -> ServedDecodeWrapper:
        return ServedDecodeWrapper(
            self.workspace_buffer,
            "NHD",
            use_tensor_cores=self.decode_use_tensor_cores,
            ready=self._promise.ready,
            logits_soft_cap=model_layers.common_logit_cap(self._layers),
            **graph_buffers,
        )

    def _try_each_layer(self) -> str | None:
        """Decodes one token in each layer, with the layer's own cache and scales, into nowhere.

        Compiles and loads the kernels, and finds what only a call can tell: strides, alignment, a missing compiler.

        Returns why our kernel does not serve, or None.
        """
        updater = self.indices_updater_decode
        device = self.workspace_buffer.device
        page_table = [torch.tensor(values, dtype=torch.int32, device=device) for values in ([0, 1], [0], [1])]
        shape = (updater.num_qo_heads, updater.num_kv_heads, updater.head_dim)
        for layer in self._layers:
            try:
                cache = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
            except (AssertionError, LookupError) as error:
                return f"layer {layer.layer_id}: SGLang's pool has no KV for it: {error!r}"
            wrapper = self.decode_wrappers[self._get_wrapper_idx(layer)]
            q = torch.zeros(1, layer.tp_q_head_num, layer.head_dim, dtype=updater.q_data_type, device=device)
            try:
                wrapper.plan(
                    *page_table,
                    *shape,
                    1,
                    data_type=updater.data_type,
                    q_data_type=updater.q_data_type,
                    fixed_split_size=self.decode_split_tile_size,
                )
                wrapper.forward(
                    q,
                    cache,
                    sm_scale=layer.scaling,
                    logits_soft_cap=layer.logit_cap,
                    k_scale=layer.k_scale_float,
                    v_scale=layer.v_scale_float,
                )
            except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                return f"layer {layer.layer_id}: {error}"
            if wrapper.kernel_choice.kernel not in SELF_SCHEDULING:
                return f"layer {layer.layer_id}: {wrapper.kernel_choice.reason}"
        return None

    def _log_start(self) -> None:
        wrapper = self.decode_wrappers[0]
        plan = wrapper.prefetch_plan
        logger.info(
            "fi_prefetch: kernel %s: %s; prefetch of a one-token batch: %s; ready=%s: %s; all-reduce window %s",
            wrapper.kernel_choice.kernel,
            wrapper.kernel_choice.reason,
            "none" if plan is None else plan.reason,
            self._promise.ready,
            self._promise.reason,
            "on" if self._window is not None else "off",
        )

    def init_cuda_graph_state(
        self, max_bs: int, max_num_tokens: int, kv_indices_buf: torch.Tensor | None = None
    ) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens, kv_indices_buf)
        self._graph_wrappers.clear()

    def _create_decode_wrappers(self, bs: int, num_tokens: int) -> list[Any]:
        if not self._serves:
            return super()._create_decode_wrappers(bs, num_tokens)
        # SGLang captures a batch size once for each LoRA variant. A graph keeps the addresses of the wrapper that it
        # was captured with, so the second capture must not replace it.
        if bs not in self._graph_wrappers:
            self._graph_wrappers[bs] = [
                self._wrapper(
                    use_cuda_graph=True,
                    paged_kv_indptr_buffer=self.kv_indptr[i][: num_tokens + 1],
                    paged_kv_indices_buffer=self.cuda_graph_kv_indices[i][: self._most_slots(i, num_tokens)],
                    paged_kv_last_page_len_buffer=self.kv_last_page_len[:num_tokens],
                )
                for i in range(self.num_wrappers)
            ]
        return self._graph_wrappers[bs]

    def _most_slots(self, index: int, num_tokens: int) -> int:
        """Slots that a graph's table may list: splits of a fixed size need room for as many."""
        most = num_tokens * self.req_to_token_pool.req_to_token.shape[1]
        if not self.enable_deterministic or self._requests_share_slots:
            return most
        # Only those requests share one that fill the batch up.
        pools = [
            self.token_to_kv_pool.get_kv_buffer(layer.layer_id)[0].shape[0]
            for layer in self._layers
            if self._get_wrapper_idx(layer) == index
        ]
        return min(most, max(pools, default=most) + num_tokens)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
        if in_capture and self._serves and forward_batch.forward_mode.is_decode_or_idle():
            self._check_graph(forward_batch.batch_size)
            self._log_graph(forward_batch.batch_size)

    def _check_graph(self, bs: int) -> None:
        """Refuses at start-up a graph that would give requests other bits than those of other sizes, and whose splits
        FlashInfer's planner could not place for every length."""
        for wrapper in self._graph_wrappers[bs]:
            if self.enable_deterministic and wrapper.kernel_choice.kernel not in SELF_SCHEDULING:
                raise RuntimeError(
                    f"--attention-backend fi_prefetch: deterministic inference in a CUDA graph of {bs} requests is not "
                    f"served: {wrapper.kernel_choice.reason}; lower --cuda-graph-max-bs or --context-length, raise "
                    "SGLANG_FLASHINFER_DECODE_SPLIT_TILE_SIZE, or start with --disable-cuda-graph"
                )

    def _log_graph(self, bs: int) -> None:
        """One line for each prefetch plan that differs from those of the graphs before."""
        for wrapper in self._graph_wrappers[bs]:
            plan = wrapper.prefetch_plan
            if plan is not None and (levers := str(plan.codes())) not in self._graph_plans:
                self._graph_plans.add(levers)
                logger.info("fi_prefetch: prefetch from batch size %d: %s", bs, plan.reason)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: Any,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        given: Any = q
        if self._serves:
            given = _Queries(q)
            slots = forward_batch.out_cache_loc
            if save_kv_cache and self._stores and self._is_plain_store(layer, k, v, slots):
                k_cache, v_cache = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
                # SGLang's own store begins with it: a check that a variable of SGLang's turns on.
                maybe_detect_oob(slots, 0, k_cache.shape[0], "fi_prefetch's store of K and V")
                dependent = self._launches_dependents and not torch.compiler.is_compiling()
                kv_store.store(k, v, k_cache, v_cache, slots, dependent)
                save_kv_cache = False
        output = super().forward_decode(given, k, v, layer, forward_batch, save_kv_cache)
        if self._window is not None:
            self._window.after_attention(layer)
        return output

    def _is_plain_store(
        self, layer: RadixAttention, k: torch.Tensor | None, v: torch.Tensor | None, slots: torch.Tensor
    ) -> bool:
        """Whether a layer stores this step's own K and V, and as they are: SGLang divides by a scale first."""
        scaled = layer.k_scale is not None or layer.v_scale is not None
        if k is None or v is None or scaled or layer.is_cross_attention:
            return False
        cache = self.token_to_kv_pool.dtype
        # Without a conversion only the dependent launch gains, in a graph; elsewhere Triton's launch costs host time.
        if cache == k.dtype and (torch.compiler.is_compiling() or not get_is_capture_mode()):
            return False
        return kv_store.takes(k, v, slots, cache)


class _Queries:
    """Queries that SGLang's `forward_decode` makes contiguous before it passes them on, and need not.

    A model's layer has them in rows of its query, key and value projection. The kernel reads them there: a copy would
    cost each layer a launch, between the kernel that writes K and V and ours, which could not begin beside it then.
    """

    def __init__(self, q: torch.Tensor) -> None:
        self._q = q

    def contiguous(self) -> torch.Tensor:
        # Of one row, only what is inside of it counts.
        return self._q if self._q[:1].is_contiguous() else self._q.contiguous()


class _DecodePageTable(FlashInferIndicesUpdaterDecode):
    """Fills a decode step's page table on the device, without what SGLang computes on the host for FlashInfer."""

    def call_begin_forward(self, wrapper: Any, *args: Any, **kwargs: Any) -> None:
        given = {"use_sliding_window_kv_pool": False} | dict(zip(_PARAMETERS, args, strict=False)) | kwargs
        if self.attn_backend.enable_deterministic:
            # SGLang asks for none inside CUDA graphs, where FlashInfer's planner could not place splits. Our kernel
            # cuts on the device, so a step in a graph gives the same bits as one outside.
            given |= {"fixed_split_size": self.attn_backend.decode_split_tile_size, "disable_split_kv": False}
        if not self._table_is_req_to_token(given):
            # With lengths on the host SGLang sums them up there, for FlashInfer's planner; our kernel has none.
            super().call_begin_forward(wrapper, **given | {"seq_lens_cpu": None})
            return
        req_to_token = self.attn_backend.req_to_token_pool.req_to_token
        lengths, tokens = given["paged_kernel_lens"], given["paged_kernel_lens_sum"]
        requests = lengths.shape[0]
        indptr = given["kv_indptr"][: requests + 1]
        indices = (
            wrapper._paged_kv_indices_buf
            if wrapper.is_cuda_graph_enabled
            else torch.empty(tokens, dtype=torch.int32, device=req_to_token.device)
        )
        page_table.fill(req_to_token, given["req_pool_indices"], lengths, given["kv_start_idx"], indptr, indices)
        if given["use_sliding_window_kv_pool"]:
            slots = indices[:tokens]
            slots.copy_(self._swa_kv_pool.translate_loc_from_full_to_swa(slots))
        wrapper.begin_forward(
            indptr,
            indices,
            self.kv_last_page_len[:requests],
            self.num_qo_heads,
            self.num_kv_heads,
            self.head_dim,
            1,
            data_type=self.data_type,
            q_data_type=self.q_data_type,
            non_blocking=True,
            fixed_split_size=given.get("fixed_split_size"),
            disable_split_kv=given.get("disable_split_kv") or False,
        )

    def _table_is_req_to_token(self, given: dict[str, Any]) -> bool:
        """Whether a step's slots are those that `req_to_token` has, or can be made of them without asking the GPU."""
        if getattr(given["spec_info"], "kv_indptr", None) is not None or self.reads_are_translated():
            return False
        # Where the window's layers have a pool of their own, slots are translated: as many as the lengths say, which
        # are known here only where they are on the host.
        return not given["use_sliding_window_kv_pool"] or given["seq_lens_cpu"] is not None

    def reads_are_translated(self) -> bool:
        """SGLang 0.5.23 may fill the table with the window pool's slots right away."""
        translator = getattr(self.attn_backend, "kv_index_translator", None)
        return translator is not None and translator.reads_are_translated
