#!/usr/bin/env python3
"""Decode throughput of SGLang with our attention backend and with its own, in one run on one GPU.

    python integration/sglang/bench_serving.py                            the default cases
    python integration/sglang/bench_serving.py --cases paper --minutes 9  more of them, stopping in time

Every (model, KV dtype, backend) is an engine in a process of its own; what it measured is written at once, and a second
run measures only what the result file lacks (`--again` measures all anew). Where an engine fails, the others go on, and
the rows say under `missing` why they lack its numbers. Timing, for each batch:

- tokens a second: a batch of new prompts, prefill and all, to its last token;
- ms a step: the same prompts again, now in SGLang's radix cache, with a short and with a long answer. Both pay the same
  for what is not decoding, so their difference is decode steps alone; the least of several repeats counts. Answers of
  1,024 tokens and more are timed once, and the short one with an empty cache, as they are: prefill hardly counts;
- attention: what the attention kernels add to a step, from a profile of a few more, after the timing.

What is worth most comes first, so that a run that is cut off (`--minutes`, `--engine-seconds`) still compares.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import engines  # noqa: E402
import models  # noqa: E402

from fi_prefetch.bench.shapes import spread_lens  # noqa: E402

RESULTS = HERE.parents[1] / "benchmarks" / "results"
SHORT = 8
# Answers of so many tokens are timed once.
LONG = 1024
# Tokens of the answers that a profile is made of.
PROFILED = 12
# For an engine's process to end when it has said all.
ENDING_SECONDS = 30
DEFAULT_BACKENDS = ("fa3", "flashinfer", "fi_prefetch")
# Of the GPU's memory, what weights and KV may take together; the rest is SGLang's activations and graphs.
MEMORY_SHARE = 0.85


class Case(NamedTuple):
    """One batch to serve.

    Attributes:
        model: a name of models.SHAPES.
        lengths: [prompt tokens, how many requests] pairs.
        output: tokens to answer.
        kv_dtype: "auto" or "fp8_e4m3".
        tp: GPUs.
    """

    model: str
    lengths: tuple[tuple[int, int], ...]
    output: int
    kv_dtype: str
    tp: int = 1

    @property
    def batch(self) -> int:
        return sum(count for _, count in self.lengths)

    @property
    def tokens(self) -> int:
        return sum((length + self.output) * count for length, count in self.lengths)

    def key(self) -> dict[str, Any]:
        """The row's own fields."""
        uniform = len(self.lengths) == 1
        return {
            "model": self.model,
            "tp": self.tp,
            "batch": self.batch,
            "context": self.lengths[0][0] if uniform else [list(pair) for pair in self.lengths],
            "output": self.output,
            "kv_dtype": self.kv_dtype,
        }


def uniform(
    name: str, batches: Sequence[int], contexts: Sequence[int], output: int, dtypes: Sequence[str], tp: int = 1
) -> list[Case]:
    return [
        Case(name, ((context, batch),), output, dtype, tp)
        for dtype in dtypes
        for context in contexts
        for batch in batches
    ]


BOTH = ("auto", "fp8_e4m3")
CASES: dict[str, list[Case]] = {
    "default": [
        *uniform("llama-3-8b", (1, 16, 64, 128), (2048, 512, 8192), 136, BOTH),
        *uniform("llama-2-7b", (1, 16, 64), (1024, 2048), 136, BOTH),
    ],
    "skewed": [Case("llama-3-8b", ((65536, 1), (4096, 31)), 136, dtype) for dtype in BOTH],
    # Requests of all lengths, as a server has them.
    "mixed": [
        Case("llama-3-8b", spread_lens(*spread), 136, dtype)
        for dtype in BOTH
        for spread in ((64, 128, 8192), (128, 64, 2048))
    ],
    "shapes": [
        *uniform("qwen2.5-7b", (1, 16, 64), (2048,), 136, BOTH),
        *uniform("llama-3-70b-tp8-slice", (1, 16, 64), (2048, 8192), 136, BOTH),
    ],
    # Speed-up over batch and output length, 2,048 output tokens.
    "paper": [
        *uniform("llama-2-7b", (8, 16, 32, 64), (128,), 2048, ("auto",)),
        *uniform("llama-2-7b", (32,), (128,), 512, ("auto",)),
        *uniform("llama-2-7b", (32,), (128,), 1024, ("auto",)),
        *uniform("llama-2-7b", (32,), (128,), 4096, ("auto",)),
        *uniform("llama-3-8b", (8, 16, 32, 64), (128,), 2048, ("auto",)),
    ],
    "two-gpus": uniform("llama-3-8b", (64,), (128,), 4096, ("auto",), tp=2),
}


def fits(case: Case, memory_bytes: int) -> bool:
    """Whether weights and KV of a case go into its GPUs."""
    shape = models.SHAPES[case.model]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    rows = (shape["num_attention_heads"] * 2 + shape["num_key_value_heads"] * 2) * shape["head_dim"]
    weights = shape["num_hidden_layers"] * hidden * (rows + 3 * inner) + 2 * shape["vocab_size"] * hidden
    kv_token = shape["num_hidden_layers"] * 2 * shape["num_key_value_heads"] * shape["head_dim"]
    kv_size = 1 if case.kv_dtype.startswith("fp8") else 2
    return (2 * weights + kv_token * kv_size * case.tokens) / case.tp < MEMORY_SHARE * memory_bytes


# ---- in the process of one engine ------------------------------------------------------------------------------------


def generate(engine: Any, prompts: list[list[int]], tokens: int) -> float:
    """Seconds for a batch's answers of `tokens` tokens each."""
    sampling = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
    began = time.perf_counter()
    outputs = engine.generate(input_ids=prompts, sampling_params=sampling)
    seconds = time.perf_counter() - began
    short = [len(output["output_ids"]) for output in outputs if len(output["output_ids"]) != tokens]
    if short:
        raise RuntimeError(f"{len(short)} of {len(outputs)} answers do not have {tokens} tokens: {short[:5]}")
    return seconds


def flush(engine: Any) -> None:
    """Empties the radix cache; SGLang refuses while it is still winding up the requests before."""
    for _ in range(50):
        if engine.flush_cache().success:
            return
        time.sleep(0.1)
    raise RuntimeError("SGLang did not empty its cache within 5 s, so the next measurement would not be a cold one")


def step_durations(events: list[dict[str, Any]], pattern: Any, layers: int) -> list[float]:
    """Microseconds that the kernels which `pattern` finds added to each decode step of a profile.

    A step is one CUDA graph, all of whose kernels carry the number of its launch; a kernel of the prefill has a number
    of its own. Under programmatic dependent launch a kernel begins while the one before it still runs, and waits for
    it: that time is not its own.
    """
    launches: dict[Any, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "kernel":
            launches.setdefault(event["args"].get("correlation"), []).append(event)
    steps = []
    for kernels in launches.values():
        added, until = [], -math.inf
        for event in sorted(kernels, key=lambda event: event["ts"]):
            end = event["ts"] + event["dur"]
            if pattern.search(event["name"]):
                added.append(max(0.0, end - max(event["ts"], until)))
            until = max(until, end)
        if len(added) >= layers:
            steps.append(sum(added))
    return steps


def attention_ms(engine: Any, backend: str, prompts: list[list[int]], layers: int) -> float | None:
    """Milliseconds of attention kernels in a decode step; None where the profile has none that we know."""
    with tempfile.TemporaryDirectory() as folder:
        engine.start_profile(output_dir=folder, activities=["GPU"], with_stack=False, record_shapes=False)
        generate(engine, prompts, PROFILED)
        engine.stop_profile()
        traces = sorted(Path(folder).rglob("*.trace.json.gz"))
        events = json.loads(gzip.decompress(traces[0].read_bytes()))["traceEvents"] if traces else []
    steps = step_durations(events, engines.ATTENTION_KERNELS[backend], layers)
    if not steps:
        names = sorted({event["name"][:90] for event in events if event.get("cat") == "kernel"})
        print(f"no attention of {backend} in a profile of {len(events)} events: {names}", file=sys.stderr)
        return None
    return statistics.median(steps) / 1000


def prompts_of(case: Case) -> list[list[int]]:
    lengths = [length for length, count in case.lengths for _ in range(count)]
    seed = hash((case.lengths, case.output)) & 0xFFFF
    return engines.random_prompts(lengths, models.SHAPES[case.model]["vocab_size"], seed)


def time_case(engine: Any, case: Case, repeats: int) -> dict[str, Any]:
    """Tokens a second and milliseconds a step of one case on one engine."""
    prompts = prompts_of(case)
    if case.output >= LONG:
        flush(engine)
        short = generate(engine, prompts, SHORT)
        flush(engine)
        long = cold = generate(engine, prompts, case.output)
    else:
        flush(engine)
        cold = generate(engine, prompts, case.output)
        short = min(generate(engine, prompts, SHORT) for _ in range(repeats))
        long = min(generate(engine, prompts, case.output) for _ in range(repeats))
    return {
        "tokens_per_s": case.batch * case.output / cold,
        "ms_per_step": (long - short) / (case.output - SHORT) * 1000,
    }


def warm_up(engine: Any, vocabulary: int, longest: int) -> None:
    """Has every kernel of a prefill, of a prefill after a cached prefix and of a decode compiled and loaded."""
    prompts = engines.random_prompts([min(2048, longest)] * 2, vocabulary, seed=3)
    for _ in range(2):
        generate(engine, prompts, SHORT)


def serve(asked: dict[str, Any]) -> None:
    """Measures the cases that it is asked for; lines of JSON on standard output."""
    cases = [Case(*case[:1], tuple(tuple(pair) for pair in case[1]), *case[2:]) for case in asked["cases"]]
    shape = models.SHAPES[cases[0].model]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        longest = max(length + case.output for case in cases for length, _ in case.lengths)
        engine = engines.start(
            engines.arguments(
                asked["backend"],
                models.write_shape(cases[0].model, Path(folder)),
                graph_batches=[case.batch for case in cases],
                context_length=longest + 16,
                kv_dtype=cases[0].kv_dtype,
                tp=cases[0].tp,
                max_running_requests=max(case.batch for case in cases),
                **asked["arguments"],
            ),
            engines.ENVIRONMENTS.get(asked["backend"]),
        )
        print(f"started in {time.perf_counter() - began:.1f} s", flush=True)
        warm_up(engine, shape["vocab_size"], longest - max(case.output for case in cases))
        room = engine.get_server_info()["max_total_num_tokens"]
        print(f"warm after {time.perf_counter() - began:.1f} s, room for {room} tokens of KV", flush=True)
        for number, case in enumerate(cases):
            if case.tokens > room:
                reason = f"needs {case.tokens} tokens of KV, there is room for {room}"
                print("MEASURED", json.dumps([number, {"missing": reason}]), flush=True)
                continue
            print("MEASURED", json.dumps([number, time_case(engine, case, asked["repeats"])]), flush=True)
            if asked["profile"]:
                found = attention_ms(engine, asked["backend"], prompts_of(case), shape["num_hidden_layers"])
                print("MEASURED", json.dumps([number, {"attention_ms": found}]), flush=True)
        engine.shutdown()


# ---- the run as a whole ----------------------------------------------------------------------------------------------


class ResultFile:
    """benchmarks/results/<gpu>/sglang.json: a row for each case, in it a number for each backend or why it has none.

    A row is of one commit and SGLang and says so, as a file may hold rows of several: one of others than the run's
    makes way when its case is measured.
    """

    OF_A_RUN = ("commit", "sglang")

    def __init__(self, path: Path, header: dict[str, Any], again: bool) -> None:
        self.path = path
        found = json.loads(path.read_text()) if path.exists() else {}
        rows = [{name: found.get(name) for name in self.OF_A_RUN} | row for row in found.get("rows", [])]
        self.content: dict[str, Any] = header | {"rows": rows}
        self._again = again
        self._measured: set[tuple[Case, str]] = set()

    @staticmethod
    def _is_of(row: dict[str, Any], key: dict[str, Any]) -> bool:
        return all(row[name] == value for name, value in key.items())

    def _key(self, case: Case) -> dict[str, Any]:
        """What a row of this run says of a case."""
        return {name: self.content.get(name) for name in self.OF_A_RUN} | case.key()

    def _row(self, case: Case) -> dict[str, Any] | None:
        key = self._key(case)
        return next((row for row in self.content["rows"] if self._is_of(row, key)), None)

    def has(self, case: Case, backend: str) -> bool:
        if self._again and (case, backend) not in self._measured:
            return False
        row = self._row(case)
        return row is not None and backend in row["ms_per_step"]

    def add(self, case: Case, backend: str, measured: dict[str, Any]) -> None:
        self._measured.add((case, backend))
        row = self._row(case)
        if row is None:
            row = self._key(case) | {"tokens_per_s": {}, "ms_per_step": {}, "attention_ms": {}, "attention_share": None}
            others = [other for other in self.content["rows"] if not self._is_of(other, case.key())]
            self.content["rows"] = [*others, row]
        missing = row.pop("missing", {})
        missing.pop(backend, None)
        for name, value in measured.items():
            (missing if name == "missing" else row[name])[backend] = value
        if missing:
            row["missing"] = missing
        # The share that attention has of a step as SGLang serves by default: what there is to gain.
        for baseline in ("fa3", "flashinfer"):
            if row["attention_ms"].get(baseline):
                row["attention_share"] = row["attention_ms"][baseline] / row["ms_per_step"][baseline]
                break
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for row in self.content["rows"] if row["ms_per_step"] or "missing" in row]
        self.path.write_text(json.dumps(self.content | {"rows": rows}, indent=1) + "\n")


def work(results: ResultFile, cases: Sequence[Case], backends: Sequence[str]) -> Iterator[tuple[str, list[Case]]]:
    """What is missing, an engine at a time. Backends take turns, so that an interrupted run still compares."""
    groups: dict[tuple[str, str, int], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.model, case.kv_dtype, case.tp), []).append(case)
    for group in groups.values():
        for backend in backends:
            missing = [case for case in group if not results.has(case, backend)]
            if missing:
                yield backend, missing


def run_engine(
    backend: str, cases: list[Case], asked: dict[str, Any], seconds: float
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Measures cases in a process of their own, until they are done or the time is over; then says what is missing."""
    question = json.dumps({"backend": backend, "cases": cases} | asked)
    log = tempfile.NamedTemporaryFile("w+", prefix=f"{backend}-", suffix=".log", delete=False)
    command = [sys.executable, __file__, "--serve", question]
    out_of_time = threading.Event()
    wanted = ("ms_per_step", "attention_ms") if asked.get("profile") else ("ms_per_step",)
    lacking = {(number, name) for number in range(len(cases)) for name in wanted}
    with engines.session(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:

        def end() -> None:
            out_of_time.set()
            engines.end_session(process)

        timer = threading.Timer(seconds, end)
        timer.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                # A line without an end is of an engine that died over it.
                if line.startswith("MEASURED ") and line.endswith("\n"):
                    number, measured = json.loads(line.removeprefix("MEASURED "))
                    gone = wanted if "missing" in measured else measured
                    lacking -= {(number, name) for name in gone}
                    yield cases[number], measured
                elif line.startswith(("started", "warm", "{")):
                    print(f"  {line.rstrip()}", flush=True)
            # It has closed its output: let it end with a status of its own, if it does.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ENDING_SECONDS)
        finally:
            timer.cancel()
    if out_of_time.is_set():
        how = f"did not end within {seconds:.0f} s"
        print(f"  {backend} {how}; its log: {log.name}", file=sys.stderr, flush=True)
    else:
        said = Path(log.name).read_text(errors="replace")
        how = f"ended with {process.returncode}: {engines.last_error(said.splitlines())}"
        if process.returncode:
            print(f"  {backend} {how}; the end of {log.name}:\n{said[-3000:]}", file=sys.stderr, flush=True)
    for number, case in enumerate(cases):
        names = [name for name in wanted if (number, name) in lacking]
        if names:
            yield case, {"missing": f"{', '.join(names)}: the engine {how}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["default", "skewed", "mixed"])
    parser.add_argument("--backends", nargs="+", choices=engines.BACKENDS, default=list(DEFAULT_BACKENDS))
    parser.add_argument("--models", nargs="+", choices=models.SHAPES, help="only these")
    parser.add_argument("--kv-dtypes", nargs="+", choices=BOTH, help="only these")
    parser.add_argument("--batches", nargs="+", type=int, help="only these")
    parser.add_argument("--contexts", nargs="+", type=int, help="of the cases with one context, only these")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-profile", action="store_true", help="leave out the time of the attention kernels")
    parser.add_argument("--minutes", type=float, default=1e6, help="end after this long")
    parser.add_argument("--engine-seconds", type=float, default=1e6, help="of these, the most for one engine")
    parser.add_argument("--engine-arguments", type=json.loads, default={}, help="JSON; more for sglang.Engine")
    parser.add_argument("--again", action="store_true", help="measure also what the result file has")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(json.loads(asked.serve))
        return

    import torch

    from fi_prefetch.bench import environment

    gpu = environment.require_gpu()
    header = environment.header() | {"sglang": environment.installed_version("sglang")}
    results = ResultFile(asked.results / gpu.key / "sglang.json", header, asked.again)
    cases = [
        case
        for name in asked.cases
        for case in CASES[name]
        if (not asked.models or case.model in asked.models)
        and (not asked.kv_dtypes or case.kv_dtype in asked.kv_dtypes)
        and (not asked.batches or case.batch in asked.batches)
        and (not asked.contexts or len(case.lengths) > 1 or case.lengths[0][0] in asked.contexts)
    ]
    memory = torch.cuda.get_device_properties(0).total_memory
    for case in [case for case in cases if not fits(case, memory)]:
        print(f"does not fit: {case.key()}")
        cases.remove(case)
    deadline = time.monotonic() + asked.minutes * 60
    how = {"repeats": asked.repeats, "profile": not asked.no_profile, "arguments": asked.engine_arguments}
    for backend, missing in work(results, cases, asked.backends):
        left = min(deadline - time.monotonic(), asked.engine_seconds)
        if left <= 0:
            print("out of time; run it again for the rest")
            break
        print(f"{missing[0].model}, KV {missing[0].kv_dtype}, {backend}: {len(missing)} cases", flush=True)
        for case, measured in run_engine(backend, missing, how, left):
            results.add(case, backend, measured)
            said = ", ".join(
                f"{name} {value if isinstance(value, str) else format(value, '.3f')}"
                for name, value in measured.items()
                if value is not None
            )
            print(f"  {case.batch} x {case.key()['context']}: {said}", flush=True)
    print(results.path)


if __name__ == "__main__":
    main()
