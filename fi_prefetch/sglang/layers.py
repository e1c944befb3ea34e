"""A model's attention layers, as far as a backend that plans once for all of them cares."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention


class LayerShape(NamedTuple):
    """What one plan is for.

    Attributes:
        num_qo_heads, num_kv_heads: of this rank.
        head_dim, v_head_dim: of K, of V.
        window_left: positions seen to the left of a token's own; -1: all.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    window_left: int

    @classmethod
    def of(cls, layer: RadixAttention) -> LayerShape:
        return cls(
            layer.tp_q_head_num, layer.tp_k_head_num, layer.qk_head_dim, layer.v_head_dim, layer.sliding_window_size
        )


def attention_layers(model: torch.nn.Module) -> list[RadixAttention]:
    """The attention layers of this rank that decode, in the order of their numbers.

    Those of an encoder (Whisper's) have numbers, and maybe shapes, of their own, and never come to a decode step.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, RadixAttention) and module.attn_type != AttentionType.ENCODER_ONLY
    ]
    return sorted(layers, key=lambda layer: layer.layer_id)


def differing_layer(layers: list[RadixAttention], num_qo_heads: int, num_kv_heads: int, head_dim: int) -> str | None:
    """Why one plan cannot serve all layers: the first that has other heads or another head_dim; None if none has."""
    planned = (num_qo_heads, num_kv_heads, head_dim, head_dim)
    for layer in layers:
        shape = LayerShape.of(layer)
        if shape[:4] != planned:
            return (
                f"layer {layer.layer_id} has {shape.num_qo_heads} query heads, {shape.num_kv_heads} kv heads and head "
                f"dimensions {shape.head_dim} and {shape.v_head_dim}, the model as a whole {num_qo_heads}, "
                f"{num_kv_heads} and {head_dim}"
            )
    return None


def common_logit_cap(layers: list[RadixAttention]) -> float:
    """The logit cap that all layers have; 0, none, where they differ."""
    caps = {layer.logit_cap or 0.0 for layer in layers}
    return caps.pop() if len(caps) == 1 else 0.0


def unserved_feature(runner: Any) -> tuple[str, str] | None:
    """What the attention of a model or server has that FlashInfer's backend in SGLang leaves out, or fails on late.

    SGLang refuses most of it at start-up by the backend's name, but not for each flag that names a backend.

    Returns it, and which backend serves it; None where there is nothing.
    """
    layers = attention_layers(runner.model)
    if runner.model_config.has_attention_sinks:
        return "attention sinks", "fa3 or triton"
    if runner.model_config.attention_chunk_size is not None and any(layer.use_irope for layer in layers):
        return "layers that attend within chunks", "fa3"
    if any((layer.xai_temperature_len or -1) > 0 for layer in layers):
        return "attention temperatures that depend on the position", "triton"
    if runner.server_args.dcp_size > 1:
        return "decode context parallelism (--dcp-size)", "triton"
    return None
