"""Runs in a release's environment: starts SGLang engines one after another and writes down what they answered.

    engine_driver.py IN.json OUT.json

IN is {"models": folder, "engines": {name: {"model": name, "arguments": {...}, "environment": {...},
"batches": [{"prompts": [[token, ...], ...], "new_tokens": n}, ...]}}}. OUT is {name: [[{"tokens": [...],
"top": [[[logprob, token], ...], ...], "cached": n, "retracted": n}, ...], ...]}: an entry a batch, in it one a prompt.
"""

from __future__ import annotations

import json
import os
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
            "retracted": output["meta_info"]["num_retractions"],
        }
        for output in outputs
    ]


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    import sglang
    import tiny_models

    for model in {engine["model"] for engine in asked["engines"].values()}:
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
