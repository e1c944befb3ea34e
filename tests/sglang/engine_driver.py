"""Runs in a release's environment: starts SGLang engines one after another and writes down what they answered.

    engine_driver.py IN.json OUT.json

IN is {"models": folder, "engines": {name: {"model": name, "arguments": {...}, "environment": {...},
"batches": [{"prompts": [[token, ...], ...], "new_tokens": n}, ...]}}}. OUT is {name: [[{"tokens": [...],
"top": [[[logprob, token], ...], ...], "cached": n}, ...], ...]}, an entry a batch and in it one a prompt.
"""

from __future__ import annotations

import json
import os
import pkgutil
import sys
from pathlib import Path
from typing import Any

COMMON = {
    "device": "cpu",
    "skip_tokenizer_init": True,
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "mem_fraction_static": 0.1,
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "log_level": "info",
    # SGLang would make bfloat16 of float32 weights.
    "dtype": "float32",
    "random_seed": 1,
}


def import_few_models(names: set[str]) -> None:
    """Spares every scheduler the import of some two hundred model files."""
    import sglang

    folder = Path(sglang.__file__).parent / "srt" / "models"
    every = [module.name for module in pkgutil.iter_modules([str(folder)]) if not module.ispkg]
    os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(set(every) - names - {"registry"})


def answers(engine: Any, prompts: list[list[int]], new_tokens: int) -> list[dict[str, Any]]:
    sampling = {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True}
    outputs = engine.generate(
        input_ids=prompts, sampling_params=sampling, return_logprob=True, top_logprobs_num=2, logprob_start_len=-1
    )
    return [
        {
            "tokens": output["output_ids"],
            "top": [[pair[:2] for pair in top] for top in output["meta_info"]["output_top_logprobs"]],
            "cached": output["meta_info"]["cached_tokens"],
        }
        for output in outputs
    ]


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
    models = {engine["model"] for engine in asked["engines"].values()}
    import_few_models(models)
    import sglang
    import tiny_models

    for model in models:
        tiny_models.write(model, Path(asked["models"]) / model)
    written: dict[str, Any] = {}
    for name, wanted in asked["engines"].items():
        print(f"=== engine {name}", file=sys.stderr, flush=True)
        os.environ |= wanted["environment"]
        engine = sglang.Engine(model_path=str(Path(asked["models"]) / wanted["model"]), **COMMON | wanted["arguments"])
        written[name] = [answers(engine, batch["prompts"], batch["new_tokens"]) for batch in wanted["batches"]]
        engine.shutdown()
        for variable in wanted["environment"]:
            del os.environ[variable]
        Path(sys.argv[2]).write_text(json.dumps(written))


if __name__ == "__main__":
    main()
