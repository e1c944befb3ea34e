"""A model's attention layers, as far as a backend that plans once for all of them cares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sglang.srt.layers.radix_attention import RadixAttention


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
    """The attention layers of this rank, in the order of their numbers."""
    layers = [module for module in model.modules() if isinstance(module, RadixAttention)]
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
