"""Models of a few layers with random weights that make attention matter: under a megabyte, the same each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

# Three query heads a kv head: no power of two, as in SmolLM2.
COMMON = {
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 320,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": COMMON
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    # Layers 0 and 2 see a window, layer 1 sees all. The soft cap is so high that it changes nothing: SGLang's
    # torch_native, to which answers are compared, knows none.
    "gemma2": COMMON
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 64,
        "sliding_window": 33,
        "attn_logit_softcapping": 1e6,
        "final_logit_softcapping": 1e6,
        "tie_word_embeddings": True,
    },
}
_NORMS = {
    "llama": ("input_layernorm", "post_attention_layernorm"),
    "gemma2": (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    ),
}  # fmt: skip


def write(name: str, folder: Path) -> None:
    """Writes config.json and model.safetensors of the model called `name`."""
    from safetensors.torch import save_file

    config = CONFIGS[name]
    generator = torch.Generator().manual_seed(7)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (gain * columns**-0.5)

    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_size, kv_size = (config[heads] * head_dim for heads in ("num_attention_heads", "num_key_value_heads"))
    # Gemma's norms multiply by one plus the weight.
    norm = torch.zeros(hidden) if name == "gemma2" else torch.ones(hidden)
    # An embedding that also makes the logits must not outshout the layers, or every token only repeats itself.
    gain = 1.0 if config["tie_word_embeddings"] else 3.0
    weights = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], hidden, gain),
        "model.norm.weight": norm.clone(),
    }
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden, 3.0)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        weights |= {f"{layer}.{norm_name}.weight": norm.clone() for norm_name in _NORMS[name]}
        weights |= {
            # Logits of a few units: attention looks at some tokens more than at others.
            f"{layer}.self_attn.q_proj.weight": matrix(q_size, hidden, 1.5),
            f"{layer}.self_attn.k_proj.weight": matrix(kv_size, hidden, 1.5),
            f"{layer}.self_attn.v_proj.weight": matrix(kv_size, hidden, 1.5),
            f"{layer}.self_attn.o_proj.weight": matrix(hidden, q_size, 1.5),
            f"{layer}.mlp.gate_proj.weight": matrix(inner, hidden),
            f"{layer}.mlp.up_proj.weight": matrix(inner, hidden),
            f"{layer}.mlp.down_proj.weight": matrix(hidden, inner),
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
