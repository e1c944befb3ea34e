"""SGLang engines on a GPU, started alike for measurements and comparisons."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# What each name in a result file was started with. fi_prefetch decodes; the prefill beside it is SGLang's default, or
# FlashInfer's under the longer name.
BACKENDS: dict[str, dict[str, str]] = {
    "fi_prefetch": {"attention_backend": "fi_prefetch"},
    "fi_prefetch+window": {"attention_backend": "fi_prefetch"},
    "flashinfer+fi_prefetch": {"prefill_attention_backend": "flashinfer", "decode_attention_backend": "fi_prefetch"},
    "fa3": {"attention_backend": "fa3"},
    "flashinfer": {"attention_backend": "flashinfer"},
    "triton": {"attention_backend": "triton"},
}
# Variables that an engine of a name needs besides.
ENVIRONMENTS: dict[str, dict[str, str]] = {"fi_prefetch+window": {"FI_PREFETCH_SGLANG_WINDOW": "all_reduce"}}
# Names of the kernels that a decode step's attention consists of, for reading profiles.
ATTENTION_KERNELS: dict[str, re.Pattern[str]] = {
    "fi_prefetch": re.compile(r"\bdecode_kernel\b"),
    "fi_prefetch+window": re.compile(r"\bdecode_kernel\b"),
    "flashinfer+fi_prefetch": re.compile(r"\bdecode_kernel\b"),
    "fa3": re.compile(r"FlashAttnFwd|FlashAttnFwdCombine|prepare_varlen_num_blocks"),
    "flashinfer": re.compile(r"BatchDecodeWithPagedKVCache|BatchPrefillWithPagedKVCache|VariableLengthMergeStates"),
    "triton": re.compile(r"_fwd_(grouped_)?kernel_stage[12]"),
}
# The files of SGLang's models that the shapes of models.py are of.
MODEL_FILES = ("llama", "qwen2", "registry", "utils")
# NVLink multicast is not to be had in every container; it must be off before NCCL starts.
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def arguments(
    backend: str,
    model: Path,
    *,
    graph_batches: Sequence[int],
    context_length: int,
    kv_dtype: str = "auto",
    tp: int = 1,
    dummy: bool = True,
    **more: Any,
) -> dict[str, Any]:
    """`sglang.Engine`'s arguments for one of BACKENDS.

    Args:
        model: a folder; only its config.json is read where `dummy`.
        graph_batches: batch sizes to capture CUDA graphs for.
        context_length: tokens a request may have, prompt and answer.
        kv_dtype: "auto" (as the model) or SGLang's other names, such as "fp8_e4m3".
        more: anything else, over what is chosen here.
    """
    chosen = {
        "model_path": str(model),
        "skip_tokenizer_init": True,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "disable_prefill_cuda_graph": True,
        "cuda_graph_bs_decode": sorted(set(graph_batches)),
        "context_length": context_length,
        "kv_cache_dtype": kv_dtype,
        "tp_size": tp,
        "random_seed": 1,
        "log_level": "info",
    } | BACKENDS[backend]
    if dummy:
        chosen["load_format"] = "dummy"
    if tp > 1:
        chosen["enforce_disable_flashinfer_allreduce_fusion"] = True
    return chosen | more


def start(chosen: dict[str, Any], environment: Mapping[str, str] | None = None) -> Any:
    """A running engine. Call it under `if __name__ == "__main__":`, for SGLang spawns processes.

    Args:
        environment: one of ENVIRONMENTS, where the backend has one.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1"} | dict(environment or {})
    os.environ.setdefault("SGLANG_DISABLED_MODEL_ARCHS", ",".join(unused_model_files()))
    if chosen.get("tp_size", 1) > 1:
        os.environ |= NO_MULTICAST
    import sglang

    return sglang.Engine(**chosen)


def unused_model_files() -> list[str]:
    """Names of SGLang's model files that no model here needs; every scheduler imports some two hundred otherwise."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("SGLang is not installed; pip install sglang")
    files = Path(spec.submodule_search_locations[0], "srt", "models").glob("*.py")
    return sorted({file.stem for file in files} - set(MODEL_FILES))


def random_prompts(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens that share no prefix worth caching."""
    generator = random.Random(seed)
    return [[generator.randrange(10, vocabulary) for _ in range(length)] for length in lengths]


@contextlib.contextmanager
def session(command: Sequence[str], **arguments: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process in a session of its own, ended with the block, and with all it spawned: they hold the GPU's memory."""
    process = subprocess.Popen(command, start_new_session=True, **arguments)
    try:
        yield process
    finally:
        end_session(process)
        process.wait()


def end_session(process: subprocess.Popen[Any]) -> None:
    """Ends a process that leads a session, with all that it has spawned."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def last_error(lines: Sequence[str]) -> str:
    """The line of a log that says best why a process ended: CUDA's word, then an exception's, then the last one."""
    said = [line.strip() for line in lines if line.strip()]
    for pattern in (r"\bCUDA error: .*", r"^(?:[\w.]+\.)?\w*(?:Error|Exception)\b(?:: .*|$)"):
        for line in reversed(said):
            if match := re.search(pattern, line):
                return match[0]
    return said[-1][-300:] if said else "it said nothing"
