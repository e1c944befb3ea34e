"""Runs in a release's environment: starts SGLang engines one after another and writes down what they answered.

    engine_driver.py IN.json OUT.json

IN is {"models": folder, "engines": {name: {"model": name, "arguments": {...},
"batches": [{"prompts": [[token, ...], ...], "new_tokens": n}, ...]}}}. OUT is {name: [[{"tokens": [...],
"top": [[[logprob, token], ...], ...], "cached": n, "retracted": n}, ...], ...]}: an entry a batch, in it one a prompt.
"""

from __future__ import annotations

import json
import multiprocessing
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
    # Engines that have answered stay until the last one has: see fork_from_one_that_has_imported().
    "sleep_on_idle": True,
}


def fork_from_one_that_has_imported() -> None:
    """An engine's two processes import SGLang for 12 s and serve for one. SGLang spawns them, as on a GPU they must be;
    here they are forked by a process that has imported it and done nothing else, which is one of those that shutting an
    engine down kills. test_http.py's are spawned."""
    set_start_method = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda method, force=False: set_start_method("forkserver", force=force)
    multiprocessing.set_forkserver_preload(["sglang.srt.managers.scheduler", "sglang.srt.managers.detokenizer_manager"])


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

    fork_from_one_that_has_imported()
    for model in {engine["model"] for engine in asked["engines"].values()}:
        tiny_models.write(model, Path(asked["models"]) / model)
    written: dict[str, Any] = {}
    engines = []
    for name, wanted in asked["engines"].items():
        print(f"=== engine {name}", file=sys.stderr, flush=True)
        engine = sglang.Engine(model_path=str(Path(asked["models"]) / wanted["model"]), **COMMON | wanted["arguments"])
        engines.append(engine)
        written[name] = [answers(engine, batch["prompts"], batch["new_tokens"]) for batch in wanted["batches"]]
    Path(sys.argv[2]).write_text(json.dumps(written))
    for engine in engines:
        engine.shutdown()


if __name__ == "__main__":
    main()
