"""The scripts of integration/sglang that a GPU machine runs: what of them needs no GPU."""

from __future__ import annotations

import functools
import json
import math
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "integration" / "sglang"))

import bench_serving  # noqa: E402
import correctness  # noqa: E402
import engines  # noqa: E402
import models  # noqa: E402

CASE = bench_serving.Case("llama-3-8b", ((2048, 16),), 136, "auto")
SKEWED = bench_serving.Case("llama-3-8b", ((65536, 1), (4096, 31)), 136, "auto")


def answer(tokens: list[int], gaps: list[float], logprob: float = -0.5) -> dict[str, Any]:
    top = [[[logprob, token], [logprob - gap, 0]] for token, gap in zip(tokens, gaps, strict=True)]
    return {"tokens": tokens, "top": top}


def compared(ours: dict[str, Any], theirs: dict[str, Any], noise: float = 0.08) -> correctness.Pair:
    return correctness.compare(("fi_prefetch", "fa3"), {"fi_prefetch": [ours], "fa3": [theirs]}, noise)


def ends(pid: str) -> bool:
    """Whether a process is gone, or a zombie, within ten seconds: on a busy machine a killed one takes a while."""
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        try:
            if Path("/proc", pid, "stat").read_text().split()[2] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_equal_answers() -> None:
    found = compared(answer([5, 6, 7], [1.0, 1.0, 1.0]), answer([5, 6, 7], [1.0, 1.0, 1.0], -0.51))
    assert (found.gaps, found.beyond) == ({}, [])
    assert found.differences == {0: [pytest.approx(0.01)] * 3}


def test_answers_that_part_differ_by_half_the_lesser_gap() -> None:
    found = compared(answer([5, 6, 7], [1.0, 0.14, 1.0]), answer([5, 9, 2], [1.0, 0.2, 1.0]))
    assert found.gaps == {0: pytest.approx(0.14)}
    # The third tokens follow other tokens.
    assert found.differences == {0: [0.0, pytest.approx(0.07)]}
    assert found.beyond == []
    assert compared(answer([5, 6, 7], [1.0, 0.18, 1.0]), answer([5, 9, 2], [1.0, 0.2, 1.0])).beyond


TOKENS = 50
# Differences between backends, as bfloat16's, and with rare ones of several units, as an 8-bit cache's.
NOISES = {"auto": ((0.02, 0.0, 0.0),), "fp8_e4m3": ((0.02, 0.001, 0.8), (0.02, 0.004, 1.5))}


def answers_of(seed: int, noise: tuple[float, float, float], requests: int = 600) -> dict[str, Any]:
    """Answers of a backend to a model that prefers a token to a second one; another seed is another backend.

    Args:
        noise: standard deviation of the log-probabilities, the share of tokens where it is another one, and that one.
    """
    width, rare, wide = noise
    own = random.Random(seed)
    answers = []
    for number in range(requests):
        path, one = 0, {"tokens": [], "top": [], "cached": 8, "retracted": 1}
        for position in range(TOKENS):
            model = random.Random(f"{number} {position} {path}")
            first, second = -0.2 - model.expovariate(1.0), model.expovariate(0.3)
            spread = wide if own.random() < rare else width
            top = [[first + own.gauss(0, spread), 10 + path], [first - second + own.gauss(0, spread), 11 + path]]
            top.sort(reverse=True)
            if top[0][1] != 10 + path:
                path = 2 * (position + 1)
            one["tokens"].append(top[0][1])
            one["top"].append(top)
        answers.append(one)
    return {"asked": [TOKENS] * requests, "answers": answers}


@functools.cache
def synthetic(kv_dtype: str, which: int) -> str:
    """Kept as text, so that each test may spoil its own."""
    noise = NOISES[kv_dtype][which]
    return json.dumps([answers_of(seed, noise) for seed in (1, 2, 3)])


class Synthetic:
    """What three engines answered under `load`."""

    def __init__(self, kv_dtype: str, which: int = 0) -> None:
        self.kv_dtype = kv_dtype
        self.backends = ["flashinfer", "fa3"]
        self.ours, self.flashinfer, self.fa3 = json.loads(synthetic(kv_dtype, which))

    def found(self) -> dict[str, Any]:
        given = {"fi_prefetch": self.ours, "flashinfer": self.flashinfer, "fa3": self.fa3}
        found = {
            (self.kv_dtype, name): correctness.Answered({"load": given[name]})
            for name in ("fi_prefetch", *self.backends)
        }
        return correctness.compare_backends("load", self.kv_dtype, found, self.backends)

    def faults(self) -> list[str]:
        return [fault for one in self.found().values() for fault in one["faults"]]


SYNTHETIC = [(kv_dtype, which) for kv_dtype, noises in NOISES.items() for which in range(len(noises))]
with_every_noise = pytest.mark.parametrize(("kv_dtype", "which"), SYNTHETIC)


@with_every_noise
def test_backends_with_the_same_noise_have_no_fault(kv_dtype: str, which: int) -> None:
    found = Synthetic(kv_dtype, which).found()
    assert [fault for one in found.values() for fault in one["faults"]] == []
    one = found[f"{kv_dtype}: fi_prefetch against flashinfer"]
    assert one["judged_by"] == "flashinfer against fa3"
    assert one["requests"] == 600 and one["equal_to_the_end"] > 300
    assert 0.015 < one["quantiles"]["0.5"] < one["mean_logprob_difference"] < one["quantiles"]["0.99"] < 0.15
    assert one["quantiles"]["0.999"] <= one["largest_logprob_difference"]
    assert one["share_beyond_noise"] == pytest.approx(one["tokens_beyond_noise"] / one["tokens_compared"])
    assert one["share_beyond_noise"] < 0.01
    # Nobody's errors: the third has each of the two against it as often.
    sides = one["third_opinion"]["fa3"]
    assert abs(sides["fi_prefetch"] - sides["flashinfer"]) <= 3 * sum(sides.values()) ** 0.5
    assert len(one["beyond_noise"]) == min(one["tokens_beyond_noise"], correctness.RECORDED_POSITIONS)


@with_every_noise
def test_a_kernel_that_is_wrong_at_some_tokens_is_a_fault(kv_dtype: str, which: int) -> None:
    given = Synthetic(kv_dtype, which)
    spoiled = random.Random(7)
    for one in given.ours["answers"]:
        for top in one["top"]:
            if spoiled.random() < 0.005:
                # Both of the two best, so that the answer goes on as it is.
                change = spoiled.choice((-1.0, 1.0))
                top[:] = [[logprob + change, token] for logprob, token in top]
    for backends in (["flashinfer", "fa3"], ["fa3", "flashinfer"], ["fa3"]):
        given.backends = backends
        assert given.faults()
    given.backends = ["flashinfer", "fa3"]
    sides = given.found()[f"{kv_dtype}: fi_prefetch against flashinfer"]["third_opinion"]["fa3"]
    assert sides["flashinfer"] > 1.5 * sides["fi_prefetch"]


def test_a_kernel_with_more_noise_than_theirs_is_a_fault() -> None:
    given = Synthetic("auto")
    given.ours = answers_of(4, (0.05, 0.0, 0.0))
    assert any(fault.startswith("mean difference") for fault in given.faults())


def test_rare_errors_of_one_of_sglangs_own_are_not_ours() -> None:
    given = Synthetic("fp8_e4m3")
    spoiled = random.Random(7)
    for one in given.flashinfer["answers"]:
        for top in one["top"]:
            if spoiled.random() < 0.002:
                top[:] = [[logprob - 3.0, token] for logprob, token in top]
    found = given.found()
    assert [name for name, one in found.items() if one["faults"]] == []
    sides = found["fp8_e4m3: fi_prefetch against flashinfer"]["third_opinion"]["fa3"]
    assert sides["fi_prefetch"] > 2 * sides["flashinfer"]
    first = found["fp8_e4m3: fi_prefetch against flashinfer"]["beyond_noise"][0]
    assert first["sides_with"] == {"fa3": "fi_prefetch"}
    ours, theirs = first["logprobs"]["fi_prefetch"], first["logprobs"]["flashinfer"]
    assert abs(ours - theirs) == pytest.approx(first["difference"])


@with_every_noise
@pytest.mark.parametrize("backends", [["flashinfer", "fa3"], ["fa3"]])
def test_answers_that_are_not_whole_are_a_fault(kv_dtype: str, which: int, backends: list[str]) -> None:
    given = Synthetic(kv_dtype, which)
    given.backends = backends
    last = given.ours["answers"].pop()
    for name in ("tokens", "top"):
        given.ours["answers"][3][name] = last[name][:-1]
        given.ours["answers"][5][name] = last[name] + last[name][:1]
    given.ours["answers"][7]["top"][9][0][0] = float("nan")
    wrong = {f"{kv_dtype}: fi_prefetch"}
    found = given.found()
    assert found[f"{kv_dtype}: fi_prefetch"]["faults"] == [
        "fi_prefetch: request 3: 49 tokens of 50",
        "fi_prefetch: request 5: 51 tokens of 50",
        "fi_prefetch: request 7: log-probabilities that are no numbers",
        "fi_prefetch: request 599: no answer",
    ]
    assert found[f"{kv_dtype}: fi_prefetch against fa3"]["requests"] == 596
    if backends == ["fa3"] and which == 1:
        return  # quantiles with such a tail are over the fixed limits
    assert {name for name, one in found.items() if one["faults"]} == wrong


@with_every_noise
def test_a_request_that_goes_wrong_at_some_token_is_a_fault(kv_dtype: str, which: int) -> None:
    whole = next(
        i for i, one in enumerate(Synthetic(kv_dtype, which).ours["answers"]) if one["tokens"] == [10] * TOKENS
    )

    given = Synthetic(kv_dtype, which)
    for top in given.ours["answers"][whole]["top"][20:]:
        top[:] = [[logprob - 1.0, token] for logprob, token in top]
    faults = given.faults()
    assert any(f"request {whole} has 30 tokens" in fault and "the first of them token 20" in fault for fault in faults)
    given.backends = ["fa3"]
    assert any(f"request {whole} has 30 tokens" in fault for fault in given.faults())

    given = Synthetic(kv_dtype, which)
    for one in (given.flashinfer, given.fa3):
        for top in one["answers"][whole]["top"]:
            top[1][0] = top[0][0] - 15.0
    tokens, tops = given.ours["answers"][whole]["tokens"], given.ours["answers"][whole]["top"]
    tokens[20:], tops[20:] = [3] * 30, [[[-0.1, 3], [-16.0, 4]] for _ in range(30)]
    faults = given.faults()
    assert any(f"request {whole}, token 20: another token, with a gap of 15.0" in fault for fault in faults)


def pair_of(beyond: Sequence[int], difference: float = 0.2, requests: int = 50) -> correctness.Pair:
    """Requests of 50 tokens, the first of which have so many tokens each beyond 0.15."""
    counts = [*beyond, *[0] * (requests - len(beyond))]
    differences = {i: [difference] * count + [0.01] * (TOKENS - count) for i, count in enumerate(counts)}
    return correctness.Pair(("fi_prefetch", "fa3"), 0.15, differences, {})


@pytest.mark.parametrize(
    ("ours", "theirs", "fault"),
    [
        ([1], [], False),
        ([1] * 4, [1], False),
        ([1] * 9, [], False),
        ([1] * 10, [], True),
        ([1] * 20, [1, 1], True),
        ([1] * 20, [1] * 12, False),
        # As many tokens as above, in few requests.
        ([10, 10], [1, 1], False),
        ([10], [], False),
        ([2] * 20, [1] * 3, True),
    ],
)
def test_tokens_beyond_the_noise_are_compared_as_counts(ours: list[int], theirs: list[int], fault: bool) -> None:
    faults = correctness.faults_by_noise(pair_of(ours), [pair_of(theirs)])
    found = f"{sum(ours)} of 2500 tokens beyond 0.15, of fi_prefetch against fa3 {sum(theirs)} of 2500"
    assert [one[: len(found)] for one in faults] == [found] * fault
    # One of several that is as noisy as ours is enough.
    assert correctness.faults_by_noise(pair_of(ours), [pair_of(theirs), pair_of(ours)]) == []


def test_the_chance_of_a_count_is_binomial_and_of_as_many_tokens() -> None:
    chance = correctness.chance_of_as_many
    assert chance(pair_of([1]), pair_of([])) == pytest.approx(0.6)
    assert chance(pair_of([1, 1]), pair_of([1])) == pytest.approx(0.6**3 + 3 * 0.6**2 * 0.4)
    # Twenty times the tokens: what theirs have is known well.
    assert chance(pair_of([1]), pair_of([], requests=1000)) == pytest.approx(1.5 / 21.5)
    assert chance(pair_of([1] * 4), pair_of([], requests=1000)) < correctness.CHANCE
    # Of no tokens nothing is known, and none beyond is none too many; counts that are no floats' factorials are fine.
    assert chance(pair_of([1]), pair_of([], requests=0)) == chance(pair_of([]), pair_of([])) == 1.0
    assert chance(pair_of([1] * 9000, requests=9000), pair_of([1] * 1000, requests=9000)) < 1e-9
    assert chance(pair_of([1] * 9000, requests=9000), pair_of([1] * 9000, requests=9000)) == pytest.approx(1.0)


def test_counts_with_equal_shares_are_a_fault_in_less_than_one_of_a_thousand() -> None:
    """Whatever the number of both, each token being ours as likely as theirs."""
    for total in range(1, 60):
        chances = [
            correctness.chance_of_as_many(pair_of([1] * ours, requests=60), pair_of([1] * (total - ours), requests=60))
            for ours in range(total + 1)
        ]
        faults = sum(math.comb(total, ours) for ours, chance in enumerate(chances) if chance < correctness.CHANCE)
        assert faults / 2**total < 1e-3


def test_a_request_whose_every_token_is_off_is_a_fault() -> None:
    (fault,) = correctness.faults_by_noise(pair_of([TOKENS], 0.3, requests=600), [pair_of([1], requests=600)])
    assert fault.startswith("request 0 has 50 tokens beyond 0.15, the first of them token 0")


def test_a_shift_of_the_mean_is_a_fault_with_no_token_beyond_the_noise() -> None:
    given = Synthetic("auto")
    for one in given.ours["answers"]:
        for top in one["top"]:
            top[:] = [[logprob - 0.04, token] for logprob, token in top]
    assert {fault.split(" 0")[0] for fault in given.faults()} == {"mean difference"}


def test_a_single_token_is_a_fault_where_it_is_far_beyond_all_of_theirs() -> None:
    given = Synthetic("auto")
    first = given.ours["answers"][11]["top"][0][0]
    first[0] -= 0.25
    assert given.faults() == []
    first[0] -= 0.55
    faults = given.faults()
    assert len(faults) == 2 and all("request 11, token 0: log-probabilities differ by 0." in fault for fault in faults)
    given.fa3["answers"][30]["top"][0][0][0] -= 0.6
    assert given.faults() == []


def test_what_parts_is_recorded_with_its_tokens() -> None:
    answers = {
        "fi_prefetch": [answer([5, 6, 7], [1.0, 3.0, 1.0])],
        "flashinfer": [answer([5, 9, 2], [1.0, 2.0, 1.0])],
        "fa3": [answer([5, 9, 3], [1.0, 2.5, 1.0])],
        "triton": [answer([4, 6, 7], [1.0, 2.5, 1.0])],
    }
    found = correctness.record(correctness.compare(("fi_prefetch", "flashinfer"), answers, 0.15), answers)
    assert found["beyond_noise"] == [
        {
            "request": 0,
            "token": 1,
            "difference": 1.0,
            "tokens": {"fi_prefetch": 6, "flashinfer": 9, "fa3": 9},
            "logprobs": {"fi_prefetch": -0.5, "flashinfer": -0.5, "fa3": -0.5},
            "sides_with": {"fa3": "flashinfer"},
        }
    ]
    assert found["gaps_where_answers_part"]["1.0"] == 2.0
    assert found["third_opinion"]["triton"] == {"fi_prefetch": 0, "flashinfer": 0}


def test_retractions_in_the_run_of_one_kv_dtype_are_enough() -> None:
    def answered(retracted: int, cached: int = 8) -> correctness.Answered:
        one = answer([5, 6, 7], [1.0] * 3) | {"cached": cached, "retracted": retracted}
        return correctness.Answered({"load": {"asked": [3], "answers": [one]}})

    found = {("auto", "fi_prefetch"): answered(0), ("fp8_e4m3", "fi_prefetch"): answered(1)}
    assert correctness.happened("load", "auto", found)["faults"] == []
    found["fp8_e4m3", "fi_prefetch"] = answered(0, cached=0)
    assert correctness.happened("load", "auto", found)["faults"] == ["retractions: none, so this run did not test them"]
    assert len(correctness.happened("load", "fp8_e4m3", found)["faults"]) == 2


def test_noise_is_not_known_from_a_backend_with_our_decode() -> None:
    given = Synthetic("auto")
    found = {
        ("auto", name): correctness.Answered({"load": one})
        for name, one in (("fi_prefetch", given.ours), ("flashinfer+fi_prefetch", given.flashinfer), ("fa3", given.fa3))
    }
    judged = correctness.compare_backends("load", "auto", found, ["flashinfer+fi_prefetch", "fa3"])
    assert {name for name in judged if "against" in name} == {
        "auto: fi_prefetch against fa3",
        "auto: flashinfer+fi_prefetch against fa3",
    }
    assert all("quantiles" in one["judged_by"] for name, one in judged.items() if "against" in name)


# What SGLang 0.5.16 logs when a kernel fails.
DYING = """text took 0.8 s
Scheduler hit an exception: Traceback (most recent call last):
torch.AcceleratorError: CUDA error: an illegal memory access was encountered
Search for `cudaErrorIllegalAddress' in https://docs.nvidia.com/cuda/ for more information.
terminate called after throwing an instance of 'c10::AcceleratorError'
  what():  CUDA error: an illegal memory access was encountered
Fatal Python error: Aborted

kill_process_tree called: parent_pid=1583, include_parent=True, pid=1583
"""


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (DYING, "CUDA error: an illegal memory access was encountered"),
        ("Traceback\n  x = y\ntorch.OutOfMemoryError: CUDA out of memory. Tried\nkilled\n", None),
        ("no such kernel\n\n", "no such kernel"),
        ("", "it said nothing"),
    ],
)
def test_the_reason_of_a_death_is_the_line_that_names_it(log: str, said: str | None) -> None:
    assert engines.last_error(log.splitlines()) == (said or "torch.OutOfMemoryError: CUDA out of memory. Tried")


def keep(folder: Path, dying: Sequence[str], end: str = "ended with -9") -> None:
    """A folder of --keep, whose `dying` engines had answered text alone."""
    for name, one in zip(("fi_prefetch", "flashinfer", "fa3"), json.loads(synthetic("auto", 0)), strict=True):
        out, log = correctness.files_of(folder, ["text", "load"], name, "auto")
        for check, path in out.items():
            if check == "text" or name not in dying:
                path.write_text(json.dumps(one))
        how = (DYING, end) if name in dying else ("", "ended with 0")
        log.write_text(f"{how[0]}\n{correctness.END}{how[1]}\n")


def judged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["correctness.py", "--judge", str(folder)])
    status = correctness.main()
    return status, json.loads((folder / "sglang_correctness.json").read_text())["checks"]


def test_kept_answers_are_judged_again_whoever_of_sglangs_own_died(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keep(tmp_path, ["flashinfer"])
    status, checks = judged(tmp_path, monkeypatch)
    assert status == 0
    assert "not_ours" not in json.dumps(checks["text"])
    assert checks["text"]["auto: fi_prefetch against flashinfer"]["judged_by"] == "flashinfer against fa3"
    assert checks["load"]["auto: flashinfer"]["not_ours"] == [
        "flashinfer: ended with -9 in load: CUDA error: an illegal memory access was encountered"
    ]
    assert "auto: fi_prefetch against flashinfer" not in checks["load"]
    assert "quantiles" in checks["load"]["auto: fi_prefetch against fa3"]["judged_by"]


def test_answers_judged_again_stay_those_of_their_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keep(tmp_path, [])
    path = tmp_path / correctness.RESULT_FILE
    checks = {"text": {"auto: fi_prefetch against fa3": {"faults": ["old"]}}, "http": {"server": {"faults": []}}}
    path.write_text(json.dumps({"gpu": "a GPU", "commit": "c0ffee", "checks": checks}))
    status, found = judged(tmp_path, monkeypatch)
    assert status == 0 and set(found) == {"text", "load", "http"}
    written = json.loads(path.read_text())
    assert (written["gpu"], written["commit"]) == ("a GPU", "c0ffee")


def test_it_is_a_fault_where_ours_or_all_of_theirs_died(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keep(tmp_path, ["fi_prefetch"])
    status, checks = judged(tmp_path, monkeypatch)
    (fault,) = checks["load"]["auto: fi_prefetch"]["faults"]
    assert status == 1 and "fi_prefetch: ended with -9 in load: CUDA error" in fault
    assert "auto: flashinfer against fa3" in checks["load"]
    assert "auto: fi_prefetch" not in checks["text"]

    for path in tmp_path.iterdir():
        path.unlink()
    keep(tmp_path, ["flashinfer", "fa3"])
    status, checks = judged(tmp_path, monkeypatch)
    assert status == 1 and checks["load"]["auto: references"]["faults"] == ["none of flashinfer, fa3 answered"]
    assert [name for name, one in checks["text"].items() if one["faults"]] == []


def test_an_engine_that_fails_after_its_answers_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keep(tmp_path, [])
    log = correctness.files_of(tmp_path, [], "fi_prefetch", "auto")[1]
    log.write_text(f"ValueError: too late\n{correctness.END}ended with 1\n")
    status, checks = judged(tmp_path, monkeypatch)
    assert status == 1
    reason = "fi_prefetch: ended with 1 after it had answered: ValueError: too late"
    assert checks["load"]["auto: fi_prefetch"]["faults"] == [reason]
    assert "auto: fi_prefetch against fa3" in checks["load"]


def test_a_report_drops_what_an_earlier_run_said_of_the_same_kv_dtype(tmp_path: Path) -> None:
    path = tmp_path / "h200" / "sglang_correctness.json"
    before = {"auto": {"faults": ["old"]}, "auto: a against b": {"faults": []}, "fp8_e4m3: a against b": {"faults": []}}
    content = {"checks": {"load": before}}
    assert correctness.report(iter([("load", {"auto: c against d": {"faults": []}})]), path, content) == 0
    written = json.loads(path.read_text())["checks"]["load"]
    assert set(written) == {"auto: c against d", "fp8_e4m3: a against b"}


def kernel(name: str, launch: int, begin: float, duration: float) -> dict[str, Any]:
    return {"cat": "kernel", "name": name, "ts": begin, "dur": duration, "args": {"correlation": launch}}


OUR_KERNEL = "void fi_prefetch::decode_kernel<Traits>(DecodeParams)"


def test_attention_of_a_step_is_what_one_graph_launched() -> None:
    steps = [
        kernel(name, launch, launch + begin, 2.0)
        for launch in (70, 90)
        for begin, name in ((0.0, OUR_KERNEL), (2.0, "gemm"), (4.5, OUR_KERNEL))
    ]
    prefill = [kernel(OUR_KERNEL, launch, 0.0, 50.0) for launch in (1, 2)]
    host = [kernel("decode_kernel", 70, 70.0, 9.0) | {"cat": "cuda_runtime"}]
    pattern = engines.ATTENTION_KERNELS["fi_prefetch"]
    assert bench_serving.step_durations(prefill + host + steps, pattern, layers=2) == [4.0, 4.0]


def test_a_kernel_that_waits_for_the_one_before_does_not_count_the_wait() -> None:
    step = [kernel("store", 7, 10.0, 4.0), kernel(OUR_KERNEL, 7, 11.0, 9.0), kernel("gemm", 7, 18.0, 8.0)]
    assert bench_serving.step_durations(step, engines.ATTENTION_KERNELS["fi_prefetch"], layers=1) == [6.0]


class Clockwork:
    """An engine that takes as long as it is told for a prompt's token, if it is not cached, and for an answer's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, prefill: float, step: float) -> None:
        self.prefill, self.step, self.now = prefill, step, 0.0
        self.cached = False
        self.asked: list[int] = []
        monkeypatch.setattr(bench_serving.time, "perf_counter", lambda: self.now)

    def flush_cache(self) -> Any:
        self.cached = False
        return SimpleNamespace(success=True)

    def generate(self, input_ids: list[list[int]], sampling_params: dict[str, Any]) -> list[dict[str, Any]]:
        tokens = sampling_params["max_new_tokens"]
        self.asked.append(tokens)
        self.now += (0 if self.cached else self.prefill * sum(map(len, input_ids))) + self.step * tokens
        self.cached = True
        return [{"output_ids": [0] * tokens} for _ in input_ids]


@pytest.mark.parametrize(("output", "answers"), [(136, [136, 8, 8, 136, 136]), (4096, [8, 4096])])
def test_a_step_is_without_prefill_and_throughput_with_it(
    monkeypatch: pytest.MonkeyPatch, output: int, answers: list[int]
) -> None:
    engine = Clockwork(monkeypatch, prefill=1e-4, step=5e-3)
    case = bench_serving.Case("llama-3-8b", ((128, 4),), output, "auto")
    found = bench_serving.time_case(engine, case, repeats=2)
    assert found["ms_per_step"] == pytest.approx(5.0)
    assert found["tokens_per_s"] == pytest.approx(4 * output / (1e-4 * 4 * 128 + 5e-3 * output))
    assert engine.asked == answers


def test_the_windows_engine_is_told_to_prefetch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sglang", SimpleNamespace(Engine=lambda **chosen: dict(os.environ)))
    monkeypatch.setattr(engines, "unused_model_files", lambda: [])
    monkeypatch.setattr(os, "environ", {})
    for backend in engines.BACKENDS:
        chosen = engines.arguments(backend, Path("model"), graph_batches=[1], context_length=64)
        seen = engines.start(chosen, engines.ENVIRONMENTS.get(backend))
        assert (seen.get("FI_PREFETCH_SGLANG_WINDOW") == "all_reduce") == (backend == "fi_prefetch+window")
        os.environ.clear()


def test_an_engine_that_hangs_is_ended_with_all_it_spawned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hanging = tmp_path / "hanging.py"
    hanging.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "print('MEASURED [0, {\"ms_per_step\": 7.5}]', flush=True)\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(bench_serving, "__file__", str(hanging))
    measured = list(bench_serving.run_engine("fa3", [CASE], {}, seconds=15.0))  # enough to start on a busy machine
    assert measured == [(CASE, {"ms_per_step": 7.5})]
    assert ends((tmp_path / "pid").read_text())


def test_comparison_ends_engines_that_hang_or_fail_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "engine.py"
    script.write_text(
        "import json, pathlib, subprocess, sys, time\n"
        "asked = json.loads(sys.argv[2])\n"
        "for check, path in asked['out'].items():\n"
        "    if check == 'load' and asked['backend'] == 'fa3': sys.exit('no such kernel')\n"
        "    if check == 'load' and asked['backend'] == 'flashinfer':\n"
        f"        pathlib.Path({str(tmp_path)!r}, 'pid').write_text(str(subprocess.Popen(['sleep', '600']).pid))\n"
        "        time.sleep(600)\n"
        "    pathlib.Path(path).write_text(json.dumps({'answers': []}))\n"
    )
    # What a run before has left is no answer of this one.
    (tmp_path / "load-auto-fa3.json").write_text("{}")
    monkeypatch.setattr(correctness, "__file__", str(script))
    asked = SimpleNamespace(engine_arguments={}, at_once=True, engine_seconds=15.0, tp=1)
    backends, checks = ("fi_prefetch", "flashinfer", "fa3"), ["text", "load"]
    found = correctness.run_engines(tmp_path, checks, backends, ["auto"], asked, tmp_path)
    answered = {"answers": []}
    hung, failed = "did not end within 15 s in load: it said nothing", "ended with 1 in load: no such kernel"
    assert found == {
        ("auto", "fi_prefetch"): correctness.Answered({"text": answered, "load": answered}),
        ("auto", "flashinfer"): correctness.Answered({"text": answered}, "load", hung),
        ("auto", "fa3"): correctness.Answered({"text": answered}, "load", failed),
    }
    said = capsys.readouterr().err
    assert f"flashinfer with KV auto {hung}" in said
    assert f"fa3 with KV auto {failed}; its log:\nno such kernel" in said
    assert ends((tmp_path / "pid").read_text())
    # Who judges again is told the same.
    assert correctness.read_engine(tmp_path, checks, "fa3", "auto") == found["auto", "fa3"]


def test_measurements_of_an_engine_that_dies_are_kept_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dying = tmp_path / "dying.py"
    dying.write_text(
        "import json, os, sys\n"
        "asked = json.loads(sys.argv[2])\n"
        "print('MEASURED', json.dumps([0, {'ms_per_step': 7.5}]), flush=True)\n"
        "if asked['backend'] == 'fa3': sys.exit(print('MEASURED', json.dumps([1, {'missing': 'no room'}])))\n"
        "os.write(1, b'MEASURED [1, {')\n"
        "print('CUDA error: an illegal memory access', file=sys.stderr, flush=True)\n"
        "os.abort()\n"
    )
    monkeypatch.setattr(bench_serving, "__file__", str(dying))
    path = tmp_path / "sglang.json"
    results = bench_serving.ResultFile(path, {}, again=False)
    for backend, missing in bench_serving.work(results, [CASE, SKEWED], ["flashinfer", "fa3"]):
        for case, measured in bench_serving.run_engine(backend, missing, {"profile": backend != "fa3"}, 60.0):
            results.add(case, backend, measured)
    first, second = json.loads(path.read_text())["rows"]
    reason = "the engine ended with -6: CUDA error: an illegal memory access"
    assert first["ms_per_step"] == {"flashinfer": 7.5, "fa3": 7.5}
    assert first["missing"] == {"flashinfer": f"attention_ms: {reason}"}
    assert second["ms_per_step"] == {}
    assert second["missing"] == {"flashinfer": f"ms_per_step, attention_ms: {reason}", "fa3": "no room"}
    # Measured after all.
    again = bench_serving.ResultFile(path, {}, again=False)
    again.add(SKEWED, "flashinfer", {"ms_per_step": 8.0})
    assert json.loads(path.read_text())["rows"][1]["missing"] == {"fa3": "no room"}


@pytest.mark.parametrize(("case", "batch", "context"), [(CASE, 16, 2048), (SKEWED, 32, [[65536, 1], [4096, 31]])])
def test_row_names_its_case(case: bench_serving.Case, batch: int, context: Any) -> None:
    assert case.key() == {
        "model": "llama-3-8b", "tp": 1, "batch": batch, "context": context, "output": 136, "kv_dtype": "auto"
    }  # fmt: skip


def test_result_file_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "h100" / "sglang.json"
    first = bench_serving.ResultFile(path, {"gpu": "H100"}, again=False)
    first.add(CASE, "fa3", {"tokens_per_s": 2000.0, "ms_per_step": 8.0, "attention_ms": 2.0})
    second = bench_serving.ResultFile(path, {"gpu": "H100"}, again=False)
    assert second.has(CASE, "fa3") and not second.has(CASE, "fi_prefetch")
    left = list(bench_serving.work(second, [CASE, SKEWED], ["fa3", "fi_prefetch"]))
    assert left == [("fa3", [SKEWED]), ("fi_prefetch", [CASE, SKEWED])]
    second.add(CASE, "fi_prefetch", {"tokens_per_s": 2100.0, "ms_per_step": 7.6, "attention_ms": 1.6})
    (row,) = json.loads(path.read_text())["rows"]
    assert row["ms_per_step"] == {"fa3": 8.0, "fi_prefetch": 7.6}
    assert row["attention_share"] == 0.25
    again = bench_serving.ResultFile(path, {"gpu": "H100"}, again=True)
    assert not again.has(CASE, "fa3")
    again.add(CASE, "fa3", {"tokens_per_s": 2000.0, "ms_per_step": 8.1})
    assert again.has(CASE, "fa3") and not again.has(CASE, "fi_prefetch")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["ms_per_step"] == {"fa3": 8.1, "fi_prefetch": 7.6}, "what is not measured again stays"


@pytest.mark.parametrize("changed", ["commit", "sglang"])
def test_a_row_is_of_one_commit_and_one_sglang(tmp_path: Path, changed: str) -> None:
    path = tmp_path / "sglang.json"
    header = {"gpu": "H100", "commit": "old", "sglang": "old"}
    old = bench_serving.ResultFile(path, header, again=False)
    for case in (CASE, SKEWED):
        for backend in ("fa3", "fi_prefetch"):
            old.add(case, backend, {"ms_per_step": 8.0})
    new = bench_serving.ResultFile(path, header | {changed: "new"}, again=False)
    assert not new.has(CASE, "fa3"), "a time of others is no baseline"
    new.add(CASE, "fi_prefetch", {"ms_per_step": 7.0})
    written = json.loads(path.read_text())
    assert written[changed] == "new"
    found = {row["batch"]: (row[changed], row["ms_per_step"]) for row in written["rows"]}
    assert found == {32: ("old", {"fa3": 8.0, "fi_prefetch": 8.0}), 16: ("new", {"fi_prefetch": 7.0})}


def test_cases_that_are_too_large_are_left_out() -> None:
    # 8 billion parameters of 2 bytes, and 8192 tokens of 128 KiB for each of 128 requests.
    large = bench_serving.Case("llama-3-8b", ((8192, 128),), 136, "auto")
    assert not bench_serving.fits(large, 80 << 30)
    assert not bench_serving.fits(large._replace(kv_dtype="fp8_e4m3"), 80 << 30)
    assert bench_serving.fits(large._replace(kv_dtype="fp8_e4m3"), 140 << 30)
    assert bench_serving.fits(CASE, 80 << 30)


@pytest.mark.parametrize("name", engines.BACKENDS)
def test_engine_arguments_name_the_backend(name: str) -> None:
    chosen = engines.arguments(name, Path("model"), graph_batches=[16, 1, 16], context_length=64)
    assert {key: value for key, value in chosen.items() if key.endswith("attention_backend")} == engines.BACKENDS[name]
    assert chosen["cuda_graph_bs_decode"] == [1, 16]


def test_shapes_are_of_the_models_they_are_named_for(tmp_path: Path) -> None:
    for name, (heads, kv_heads) in {
        "llama-3-8b": (32, 8), "llama-2-7b": (32, 32), "qwen2.5-7b": (28, 4), "llama-3-70b-tp8-slice": (8, 1)
    }.items():  # fmt: skip
        config = json.loads((models.write_shape(name, tmp_path) / "config.json").read_text())
        assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (
            heads,
            kv_heads,
            128,
        )


def attention_of(tensors: dict[str, Any], config: dict[str, Any], x: Any) -> Any:
    """What a layer's attention gives for a sequence of hidden states."""
    heads, kv_heads, dim = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    q, k, v = (
        (x @ tensors[f"model.layers.0.self_attn.{name}_proj.weight"].T).view(len(x), -1, dim).transpose(0, 1)
        for name in "qkv"
    )
    assert (q.shape[0], k.shape[0]) == (heads, kv_heads)
    k, v = (kv.repeat_interleave(heads // kv_heads, dim=0) for kv in (k, v))
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attended.transpose(0, 1).reshape(len(x), -1) @ tensors["model.layers.0.self_attn.o_proj.weight"].T


@pytest.mark.parametrize(("gpus", "expected"), [(1, (9, 3)), (2, (12, 4)), (3, (9, 3)), (8, (24, 8))])
def test_heads_of_zeros_change_no_answer(gpus: int, expected: tuple[int, int]) -> None:
    config = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 4}
    shapes = {"q_proj": (36, 10), "k_proj": (12, 10), "v_proj": (12, 10), "o_proj": (10, 36)}
    tensors = {f"model.layers.0.self_attn.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    tensors["model.norm.weight"] = torch.randn(10)
    x = torch.randn(7, 10)
    before = attention_of(tensors, config, x)
    models.add_heads(tensors, config, gpus)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == expected
    torch.testing.assert_close(attention_of(tensors, config, x), before)
    assert tensors["model.norm.weight"].shape == (10,)
