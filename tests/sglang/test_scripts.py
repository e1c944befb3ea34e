"""The scripts of integration/sglang that a GPU machine runs: what of them needs no GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

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


def compared(ours: dict[str, Any], theirs: dict[str, Any], wanted: int = 3) -> dict[str, Any]:
    return correctness.compare({"asked": [wanted], "answers": [ours]}, {"answers": [theirs]}, noise=0.08)


def test_equal_answers_have_no_fault() -> None:
    found = compared(answer([5, 6, 7], [1.0, 1.0, 1.0]), answer([5, 6, 7], [1.0, 1.0, 1.0], -0.51))
    assert found["faults"] == []
    assert (found["equal_to_the_end"], found["tokens_compared"]) == (1, 3)
    assert found["largest_logprob_difference"] == pytest.approx(0.01)


def test_answers_may_part_at_a_tie() -> None:
    found = compared(answer([5, 6, 7], [1.0, 0.15, 1.0]), answer([5, 9, 2], [1.0, 0.2, 1.0]))
    assert found["faults"] == []
    assert found["gaps_where_answers_part"] == [pytest.approx(0.15)]
    assert (found["equal_to_the_end"], found["tokens_compared"]) == (0, 1)


def test_answers_that_part_elsewhere_are_a_fault() -> None:
    found = compared(answer([5, 6, 7], [1.0, 0.5, 1.0]), answer([5, 9, 2], [1.0, 0.6, 1.0]))
    assert "another token, with a gap of 0.5" in found["faults"][0]


def test_other_logprobs_are_a_fault() -> None:
    found = compared(answer([5, 6, 7], [1.0] * 3), answer([5, 6, 7], [1.0] * 3, -0.7))
    assert "log-probabilities differ by 0.2" in found["faults"][0]


def test_lost_tokens_are_a_fault() -> None:
    found = compared(answer([5, 6], [1.0] * 2), answer([5, 6, 7], [1.0] * 3))
    assert found["faults"] == ["request 0: 2 and 3 tokens of 3"]


def test_attention_of_a_step_is_what_one_graph_launched() -> None:
    def kernel(name: str, launch: int, duration: float) -> dict[str, Any]:
        return {"cat": "kernel", "name": name, "dur": duration, "args": {"correlation": launch}}

    ours = "void fi_prefetch::decode_kernel<Traits>(DecodeParams)"
    steps = [kernel(name, launch, 2.0) for launch in (70, 90) for name in (ours, "gemm", ours)]
    prefill = [kernel(ours, launch, 50.0) for launch in (1, 2)]
    host = [{"cat": "cuda_runtime", "name": "decode_kernel", "dur": 9.0, "args": {"correlation": 70}}]
    pattern = engines.ATTENTION_KERNELS["fi_prefetch"]
    assert bench_serving.step_durations(prefill + host + steps, pattern, layers=2) == [4.0, 4.0]


def test_noise_against_other_arithmetic_is_what_sglangs_own_backends_have() -> None:
    def given(logprob: float, retracted: int = 1) -> dict[str, Any]:
        one = answer([5, 6, 7], [1.0] * 3, logprob) | {"cached": 8, "retracted": retracted}
        return {"load": {"asked": [3], "answers": [one]}}

    answered = {
        ("auto", "fi_prefetch"): given(-0.5),
        ("auto", "flashinfer"): given(-0.55),
        ("auto", "fa3"): given(-0.8),
    }
    found = correctness.compare_backends("load", "auto", answered, ("flashinfer", "fa3"))
    assert found["auto: fi_prefetch against fa3"]["noise"] == pytest.approx(0.25)
    assert found["auto: fi_prefetch against flashinfer"]["noise"] == correctness.NOISE["auto"]
    # 0.3 of ours is more than the 0.25 between theirs.
    assert [name for name, one in found.items() if one["faults"]] == ["auto: fi_prefetch against fa3"]
    answered["auto", "fi_prefetch"] = given(-0.5, retracted=0)
    happened = correctness.compare_backends("load", "auto", answered, ("flashinfer",))["auto: happened"]
    assert happened["faults"] == ["retractions: none, so this run did not test them"]
    del answered["auto", "fi_prefetch"]
    (fault,) = correctness.compare_backends("load", "auto", answered, ("flashinfer",))["auto"]["faults"]
    assert "fi_prefetch did not answer" in fault


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
    state = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_comparison_ends_engines_that_hang_or_fail_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "engine.py"
    script.write_text(
        "import json, pathlib, subprocess, sys, time\n"
        "asked = json.loads(sys.argv[2])\n"
        "if asked['backend'] == 'fa3': sys.exit('no such kernel')\n"
        "if asked['backend'] == 'flashinfer':\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'pid').write_text(str(subprocess.Popen(['sleep', '600']).pid))\n"
        "    time.sleep(600)\n"
        "for path in asked['out'].values(): pathlib.Path(path).write_text(json.dumps({'answers': []}))\n"
    )
    monkeypatch.setattr(correctness, "__file__", str(script))
    asked = SimpleNamespace(engine_arguments={}, at_once=True, engine_seconds=15.0)
    backends = ("fi_prefetch", "flashinfer", "fa3")
    answered = correctness.run_engines(tmp_path, ["text"], backends, ["auto"], asked, tmp_path)
    assert answered == {("auto", "fi_prefetch"): {"text": {"answers": []}}}
    said = capsys.readouterr().err
    assert "flashinfer with KV auto did not answer, it did not end within 15 s" in said
    assert "fa3 with KV auto did not answer, it ended with 1:\nno such kernel" in said
    state = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


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
    assert not bench_serving.ResultFile(path, {}, again=True).has(CASE, "fa3")


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
