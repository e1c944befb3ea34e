"""The backend on SGLang's CPU engine: SGLang's PyTorch attention for prefill, our wrapper's reference for decode."""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from ..decode import BatchDecodeWithPagedKVCacheWrapper
from .layers import LayerShape, attention_layers

logger = logging.getLogger("fi_prefetch")


class CpuAttnBackend(TorchNativeAttnBackend):
    """Decodes through the same wrapper as on a GPU, which runs the reference on CPU tensors."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self._dtype_q, self._dtype_kv = runner.dtype, runner.kv_cache_dtype
        shapes = dict.fromkeys(LayerShape.of(layer) for layer in attention_layers(runner.model))
        for shape in shapes:
            if shape.head_dim != shape.v_head_dim:
                raise ValueError(
                    f"--attention-backend fi_prefetch: this model's keys have {shape.head_dim} elements and its values "
                    f"{shape.v_head_dim}, which the reference does not serve; start with --attention-backend "
                    "torch_native"
                )
        if runner.model_config.is_encoder_decoder:
            raise ValueError(
                "--attention-backend fi_prefetch: on the CPU the reference does not serve encoder-decoder models; "
                "start with --attention-backend torch_native"
            )
        # The reference needs no workspace, only something to learn the device from.
        workspace = torch.empty(1, dtype=torch.uint8)
        self._wrappers = {shape: BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD") for shape in shapes}
        logger.info("fi_prefetch: kernel reference: SGLang runs on the CPU; prefill is torch_native's")

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        if not forward_batch.forward_mode.is_decode_or_idle() or not forward_batch.batch_size:
            return
        lengths = forward_batch.seq_lens
        indptr = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        indptr[1:] = lengths.cumsum(0)
        rows = self.req_to_token_pool.req_to_token[forward_batch.req_pool_indices]
        slots = rows[torch.arange(rows.shape[1]) < lengths[:, None]].to(torch.int32)
        last_page_len = torch.ones(len(lengths), dtype=torch.int32)
        for shape, wrapper in self._wrappers.items():
            in_window_pool = self.use_sliding_window_kv_pool and shape.window_left >= 0
            wrapper.plan(
                indptr,
                self.token_to_kv_pool.translate_loc_from_full_to_swa(slots).to(torch.int32)
                if in_window_pool
                else slots,
                last_page_len,
                shape.num_qo_heads,
                shape.num_kv_heads,
                shape.head_dim,
                1,
                window_left=shape.window_left,
                q_data_type=self._dtype_q,
                kv_data_type=self._dtype_kv,
            )

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: Any,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        if save_kv_cache and k is not None and v is not None:
            slots = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, slots, k, v)
        shape = LayerShape.of(layer)
        output = self._wrappers[shape].forward(
            q.reshape(-1, shape.num_qo_heads, shape.head_dim),
            self.token_to_kv_pool.get_kv_buffer(layer.layer_id),
            sm_scale=layer.scaling,
            logits_soft_cap=layer.logit_cap,
            window_left=shape.window_left,
        )
        return output.reshape(-1, shape.num_qo_heads * shape.head_dim)
