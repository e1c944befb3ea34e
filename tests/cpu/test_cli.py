"""The command line: what it says without a GPU, what it refuses, what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fi_prefetch import __version__, cli, evidence, gpu_check, jit, tune
from fi_prefetch.bench import environment, kernels, runner, tuning
from fi_prefetch.bench.shapes import GRIDS, MODELS, Shape, parse_lens
from fi_prefetch.device import describe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are of the behaviour without a GPU, wherever they run."""
    monkeypatch.setattr(cli, "has_gpu", lambda: False)
    monkeypatch.setattr(cli.console, "width", 200)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, list(arguments), catch_exceptions=False)


def succeed(*arguments: str) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def fail(*arguments: str) -> str:
    result = invoke(*arguments)
    assert result.exit_code not in (0, None), result.output
    return result.output


def test_help_names_every_command() -> None:
    text = succeed("--help")
    for command in ("bench", "build", "check", "compare", "demo", "explain", "info", "profile", "report", "tune"):
        assert command in text
        assert "Usage" in succeed(command, "--help")


def test_the_version() -> None:
    assert __version__ in succeed("--version")


def test_info_names_versions_and_choices() -> None:
    report = json.loads(succeed("info", "--json"))
    assert report["gpu"] is None
    assert report["versions"]["fi_prefetch"] == __version__
    assert report["versions"]["flashinfer"] == environment.installed_version("flashinfer-python")
    assert {choice["kernel"] for choice in report["choices"]} == {"fi_prefetch"}
    text = succeed("info")
    assert "reference" in text and "NVIDIA H200" in text


def test_the_demo_without_a_gpu_agrees_with_pytorch() -> None:
    text = succeed("demo", "--no-compile")
    errors = [float(line.split("│")[2]) for line in text.splitlines() if line.startswith("│")]
    assert len(errors) == 4
    assert max(errors) < 5e-3


def test_the_demo_says_when_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fi_prefetch.bench.demo.has_nvcc", lambda: False)
    assert "No nvcc" in succeed("demo")


@pytest.mark.parametrize(
    "command", [("check",), ("check", "--only", "memcheck"), ("bench",), ("bench", "layer"), ("tune",)]
)
def test_what_needs_a_gpu_says_so(command: tuple[str, ...]) -> None:
    assert "needs a CUDA GPU" in fail(*command)


@pytest.mark.parametrize("architecture", ["sm_90a", "9", "9.0b", "90a"])
def test_build_wants_architectures_as_the_compiler_does(architecture: str) -> None:
    assert "9.0a" in fail("build", "--arch", architecture)


def test_build_needs_something_to_compile_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no variant has 'hd96' in its name\n" in fail("build", "--only", "hd96", "--fixed-split")
    with jit.target_architectures([]):
        assert "--arch" in fail("build", "--aot", "kernels")


def test_build_compiles_the_batch_invariant_kernels_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    class Spec:
        def __init__(self, variant: jit.Variant, _: object) -> None:
            self.name = variant.name

        def build(self, **_: bool) -> None:
            built.append(self.name)

    monkeypatch.setattr(jit, "jit_spec", Spec)

    def names(*arguments: str) -> list[str]:
        built.clear()
        succeed("build", "--arch", "9.0a", *arguments)
        return sorted(built)

    usual, invariant = (sorted(v.name for v in jit.all_variants(fixed_split=fixed)) for fixed in (False, True))
    assert names() == usual
    assert names("--fixed-split") == sorted(usual + invariant)
    assert names("--fixed-split", "--only", "fixed_split") == invariant
    one = "fi_prefetch_batch_decode_q_bf16_kv_bf16_o_bf16_hd128_swa0_cap0"
    for flag in ((), ("--fixed-split",)):
        assert names("--only", one, *flag) == [one], "a whole name is that variant's"
        assert names("--only", f"{one}_fixed_split", *flag) == [f"{one}_fixed_split"]
    assert "with --fixed-split some have" in fail("build", "--only", "cap0_fixed_split")


def test_build_leaves_out_what_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Spec:
        name = "a_variant"

        def build(self, **_: bool) -> None:
            raise RuntimeError("nvcc said no")

    monkeypatch.setattr(jit, "jit_spec", lambda *_: Spec())
    monkeypatch.setattr(kernels, "jit_spec", lambda _: Spec())
    text = fail("build", "--arch", "9.0a", "--only", "hd128_swa0_cap0", "--aot", str(tmp_path / "kernels"))
    assert "nvcc said no" in text and "could not be compiled" in text
    assert not (tmp_path / "kernels").exists()


def test_a_build_that_ends_early_starts_nothing_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built: list[str] = []
    go_on = threading.Event()

    class Spec:
        def __init__(self, variant: jit.Variant, _: object) -> None:
            self.name = variant.name

        def build(self, **_: bool) -> None:
            built.append(self.name)
            assert len(built) == 1 or go_on.wait(0.2) is False

        def get_library_path(self) -> Path:
            return tmp_path / "none.so"

    monkeypatch.setattr(jit, "jit_spec", Spec)
    monkeypatch.setattr(kernels, "jit_spec", lambda _: Spec(jit.all_variants()[0], None))
    (tmp_path / "file").touch()
    text = fail("build", "--arch", "9.0a", "-j", "1", "--aot", str(tmp_path / "file" / "kernels"))
    assert text.splitlines()[-1].startswith("Error: ") and "Not a directory" in text
    assert len(built) < 5, "of more than fifty"


def test_a_profile_needs_a_shape_and_a_profiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert "Nsight Compute" in fail("profile", "--heads", "32/8", "--lens", "8x1K")
    assert "name shapes" in fail("profile")


FAKE_NCU = """#!{python}
import json, sys
request, answer = sys.argv[-2:]
calls = json.load(open(request))["calls"]
made = [(0, name) for name, *_ in calls if name != "fa3"]
json.dump({{"made": made, "missing": [(0, "fa3", "Unsupported: not here")]}}, open(answer, "w"))
print('"ID","Kernel Name","gpu__time_duration.sum"')
print('"","","ns"')
for number, (_, name) in enumerate(made[:{seen}]):
    print('"0","spin_kernel","1"')
    print(f'"1","{{name}}","{{1000 * (number + 1)}}"')
"""


def test_a_profile_is_a_result_file_of_every_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ncu, output = tmp_path / "ncu", tmp_path / "new" / "profile.json"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(cli, "has_gpu", lambda: True)
    header = {"gpu": "NVIDIA H200", "driver": "1", "torch": "2", "flashinfer": "3", "commit": None}
    monkeypatch.setattr(environment, "header", lambda: header)
    kernels = [argument for name in cli.PROFILED_KERNELS for argument in ("--kernel", name)]
    command = ("profile", "--heads", "32/8", "--lens", "8x1K", "--page", "16", *kernels, "--output", str(output))

    def profiler(seen: int) -> None:
        ncu.write_text(FAKE_NCU.format(python=sys.executable, seen=seen))
        ncu.chmod(0o755)

    profiler(seen=3)
    assert "ncu saw 3 of 4 calls" in fail(*command)
    assert not output.exists()
    profiler(seen=4)
    text = succeed(*command)
    assert "fa3: not measured on 1 of 1 rows: Unsupported: not here" in text
    content = json.loads(output.read_text())
    assert content["complete"] and content["gpu"] == "NVIDIA H200"
    durations = {name: found["duration"] for name, found in content["rows"][0]["counters"].items()}
    assert durations == {"fi_prefetch off": 1.0, "fi_prefetch auto": 2.0, "paper off": 3.0, "paper on": 4.0}
    assert "paper on" in succeed("report", str(output))
    assert "4 same" in succeed("compare", str(output), str(output))


def test_a_prediction_is_marked_as_one() -> None:
    text = succeed("bench", "--estimate", "h20", "--model", "llama-3-8b", "--batch", "1,4", "--context", "2K")
    assert "PREDICTION for H20" in text and "nothing was measured" in text
    assert "32/8 page 1 1x2K" in text and "32/8 page 1 4x2K" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--heads", "32/8"), "--lens"),
        (("--heads", "32", "--lens", "1x2K"), "32/8"),
        (("--heads", "30/8", "--lens", "1x2K"), "multiple"),
        (("--heads", "32/8", "--lens", "2K"), "8x1K"),
        (("--heads", "32/8", "--model", "llama-3-8b"), "exclude"),
        (("--model", "llama-3-9b"), "llama-3-8b"),
        (("--model", "llama-3-8b", "--tp", "3"), "tensor_parallel"),
        (("--model", "llama-3-8b", "--context", "2M"), "2M"),
        (("--model", "llama-3-8b", "--batch", "0"), "requests >= 1"),
        (("--heads", "32/8", "--lens", "8x1K", "--head-dim", "-5"), "--head-dim"),
        (("--heads", "32/8", "--lens", "8x0"), "no KV to read"),
        (("--lens", "8x1K"), "--lens: it needs --heads"),
        (("--batch", "8"), "--batch: it needs --model"),
        (("--heads", "32/8", "--lens", "8x1K", "--batch", "8"), "--batch: it needs --model"),
        (("--page", "16"), "--page: it needs --model or --heads"),
        (("--grid", "small", "--model", "llama-3-8b"), "--grid: --model excludes it"),
        (("--output", "a.json"), "--output: --estimate measures nothing"),
    ],
)
def test_shapes_that_are_none_are_refused(arguments: tuple[str, ...], message: str) -> None:
    assert message in fail("bench", "--estimate", "h200", *arguments)


@pytest.mark.parametrize("grid", ["basic", "full"])
def test_a_grid_in_another_kv_dtype(grid: str) -> None:
    """Each of its shapes once: the full grid has them in bf16 and in fp8."""
    text = succeed("bench", "--estimate", "h200", "--grid", grid, "--kv-dtype", "float8_e4m3fn")
    rows = [line for line in text.splitlines() if line.startswith("│")]
    shapes = {replace(shape, q_dtype="bfloat16", kv_dtype="float8_e4m3fn") for shape in GRIDS[grid]()}
    assert len(rows) == len(shapes)


def test_what_our_kernel_does_not_serve_is_not_predicted_for_it() -> None:
    text = succeed("bench", "--estimate", "h200", "--heads", "64/1", "--lens", "8x1K")
    [line] = [line for line in text.splitlines() if line.startswith("│")]
    assert line.split("│")[-2].strip() == "-"
    assert "64/1 page 1 8x1K goes to flashinfer" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "fast"), "prefetch policy"),
        (("--stall-seconds", "-1"), "--stall-seconds"),
        (("--budget-seconds", "0"), "--budget-seconds"),
        (("layer", "--heads", "32/8"), "--heads: layer does not take it"),
        (("prefetch", "--policy", "off"), "--policy: prefetch does not take it"),
        (("plan_time", "--baseline", "fa3"), "--baseline: plan_time does not take it"),
        (("layer", "--baseline", "flashinfer_xqa"), "layer measures flashinfer_fa2 and fa3"),
    ],
)
def test_what_would_be_measured_otherwise_than_asked_is_refused(arguments: tuple[str, ...], message: str) -> None:
    assert message in fail("bench", *arguments)


def test_a_profile_wants_a_policy() -> None:
    assert "prefetch policy" in fail("profile", "--heads", "32/8", "--lens", "8x1K", "--policy", "fast")


def test_a_bad_setting_of_the_environment_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("FI_PREFETCH_POLICY", "fast")
        assert "prefetch policy" in fail("info")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tune.tuned_file("h200")
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    tune.rules_for.cache_clear()
    for command in (("info",), ("explain", "llama-3-8b")):
        assert "not a file of tuned grids" in fail(*command)


def test_info_names_the_levers_that_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_PREFETCH_POLICY", "run_ahead=2,prologue=0,streaming_hint=0")
    assert [choice["levers_on"] for choice in json.loads(succeed("info", "--json"))["choices"]][2] == ["run-ahead 2"]
    monkeypatch.setenv("FI_PREFETCH_POLICY", "auto")
    assert "prologue 1, streaming hint" in succeed("info")


def test_info_counts_variants_of_these_sources_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from flashinfer.jit import env

    current = f"fi_prefetch_batch_decode_x_{jit.sources_hash()}_sm90a"
    for name in (current, "fi_prefetch_batch_decode_x_01234567", "fi_prefetch_bench_01234567"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.so").touch()
    monkeypatch.setattr(env, "FLASHINFER_JIT_DIR", tmp_path)
    assert json.loads(succeed("info", "--json"))["compiled"] == [current]


def test_explain_says_why_in_numbers() -> None:
    text = succeed("explain", "llama-3-70b", "--tp", "8", "--context", "1x64K+31x4K", "--gpu", "h100")
    assert "8/1 page 1 1x64K+31x4K on NVIDIA H100" in text
    assert "kernel: fi_prefetch" in text
    for lever in ("prologue", "run-ahead", "early load", "streaming hint"):
        assert lever in text
    assert "L2 budget" in text and "65536 tokens" in text


@pytest.mark.parametrize("model", MODELS)
def test_every_model_can_be_explained(model: str) -> None:
    assert "kernel: fi_prefetch" in succeed("explain", model, "--batch", "4", "--context", "1K")


def test_explain_refuses_what_it_cannot_read() -> None:
    assert "expected" in fail("explain", "llama-3-8b", "--context", "2M")
    assert "prefetch policy" in fail("explain", "llama-3-8b", "--policy", "fast")
    assert "--batch" in fail("explain", "llama-3-8b", "--context", "8x1K", "--batch", "4")


# ---- result files --------------------------------------------------------------------------------------------------


def result_file(path: Path, times: dict[str, float | None]) -> Path:
    rows = [
        {
            **Shape(32, 8, 1, parse_lens(lens)).to_row(),
            "floor_us": 1.0,
            "fi_prefetch_us": time,
            "baselines_us": {"flashinfer_fa2": 20.0, "fa3": None},
            "error": 2e-3,
            "error_flashinfer": 2e-3,
            "spread": {"fi_prefetch": 0.01},
        }
        for lens, time in times.items()
    ]
    path.write_text(json.dumps({"gpu": "NVIDIA H200", "read_ceiling_gbs": 4500.0, "rows": rows}))
    return path


def test_compare_tells_faster_from_slower(tmp_path: Path) -> None:
    before = result_file(tmp_path / "a.json", {"1x2K": 10.0, "8x1K": 10.0, "64x2K": 10.0})
    after = result_file(tmp_path / "b.json", {"1x2K": 5.0, "8x1K": 10.1, "64x2K": 12.0})
    text = succeed("compare", str(before), str(after))
    assert "1 faster, 1 same, 1 slower" in text
    nothing = result_file(tmp_path / "c.json", {"256x512": 10.0})
    assert "different GPUs" not in text
    assert "in common" in fail("compare", str(before), str(nothing))


def test_compare_says_when_the_gpus_differ(tmp_path: Path) -> None:
    before = result_file(tmp_path / "a.json", {"1x2K": 10.0})
    after = result_file(tmp_path / "b.json", {"1x2K": 5.0})
    after.write_text(after.read_text().replace("NVIDIA H200", "NVIDIA H100 [x]"))
    text = "".join(succeed("compare", str(before), str(after)).split())  # lines end where the paths' lengths let them
    assert f"different GPUs: {before} is of NVIDIA H200, {after} of NVIDIA H100 [x]".replace(" ", "") in text
    assert "1faster" in text


def test_report_prints_tables_and_draws(tmp_path: Path) -> None:
    path = result_file(tmp_path / "a.json", {"1x2K": 10.0, "8x1K": 25.0, "64x2K": None})
    text = succeed("report", str(path), "--plots", str(tmp_path / "plots"))
    assert "2.00x" in text and "geometric mean" in text
    assert "slower than flashinfer_fa2: 32/8 page 1 8x1K (0.80)" in text
    assert list((tmp_path / "plots").glob("*.png"))


def test_a_table_in_a_pipe_is_whole(tmp_path: Path) -> None:
    """A terminal's eighty columns would cut a grid's to two letters each."""
    path = result_file(tmp_path / "a.json", {"1x64K+31x4K": 10.0})
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-c", "from fi_prefetch.cli import main; main()", "report", str(path)]
    text = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "flashinfer_fa2" in text and "1x64K+31x4K" in text and "…" not in text


def test_report_and_compare_read_every_kind_of_file_and_no_other(tmp_path: Path) -> None:
    levers = tmp_path / "prefetch.json"
    shape = Shape(32, 8, 1, parse_lens("1x2K")).to_row()
    times = {"off": 10.5, "auto": 10.4, "prologue": 10.3, "early_load": 7.8, "paper": 11.0, "run_ahead": 12.0}
    rows = [{**shape, "us": times, "spread": {}, "levers": {}}]
    levers.write_text(json.dumps({"gpu": "NVIDIA H200", "rows": rows}))
    text = succeed("report", str(levers))
    assert "Each lever alone" in text and "7.8" in text and "NVIDIA H200" in text
    assert "6 same" in succeed("compare", str(levers), str(levers))
    assert "draws grid or map" in fail("report", str(levers), "--plots", str(tmp_path))
    grid = result_file(tmp_path / "grid.json", {"1x2K": 10.0})
    assert "a grid with a prefetch" in fail("compare", str(grid), str(levers))
    pair = {
        "requests": 50, "equal_to_the_end": 38, "tokens_compared": 2769, "mean_logprob_difference": 0.00723,
        "quantiles": {"0.5": 0.0015, "0.999": 0.1177}, "tokens_beyond_noise": 1, "faults": ["one"],
    }  # fmt: skip
    answers = tmp_path / "answers.json"
    checks = {"text": {"fp8_e4m3: fi_prefetch against fa3": pair, "fp8_e4m3: happened": {"faults": []}}}
    answers.write_text(json.dumps({"gpu": "NVIDIA H200", "checks": checks}))
    text = succeed("report", str(answers))
    for cell in ("fp8", "fi_prefetch, fa3", "2769", "0.0072", "0.1177"):
        assert cell in text
    assert "has no times to compare" in fail("compare", str(answers), str(answers))
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert "not a result file" in fail("report", str(other))
    assert "not a result file" in fail("compare", str(other), str(grid))


@pytest.mark.parametrize(
    "text", ["", "nope", "[1]", '{"rows": [1]}', '{"rows": [{"baselines_us": {}}]}', '{"rows": [{"us": 1.0}]}', "\x80"]
)
def test_a_file_that_is_no_result_is_told_in_a_line_with_its_name(tmp_path: Path, text: str) -> None:
    grid, other = result_file(tmp_path / "grid.json", {"1x2K": 10.0}), tmp_path / "other.json"
    other.write_bytes(text.encode("latin-1"))
    for command in (("report", str(other)), ("compare", str(grid), str(other))):
        text = fail(*command)
        assert text.startswith("Error: ") and "other.json: not a" in text and text.count("\n") == 1


def test_a_file_without_its_gpu_is_told_in_a_line(tmp_path: Path) -> None:
    path = result_file(tmp_path / "a.json", {"1x2K": 10.0})
    path.write_text(json.dumps({"rows": json.loads(path.read_text())["rows"]}))
    assert "not a whole result file: KeyError('gpu')" in fail("report", str(path))


def test_plots_that_cannot_be_written_are_told_in_a_line(tmp_path: Path) -> None:
    path = result_file(tmp_path / "a.json", {"1x2K": 10.0})
    assert "no plots: " in succeed("report", str(path), "--plots", str(path / "plots"))


def test_sglangs_steps_are_compared(tmp_path: Path) -> None:
    path = ROOT / "benchmarks" / "results" / "h100" / "sglang.json"
    assert "14 same" in succeed("compare", str(path), str(path))


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, run: object) -> None:
    """A GPU as far as the command line sees, on which `run` measures."""
    monkeypatch.setattr(cli, "has_gpu", lambda: True)
    monkeypatch.setattr(environment, "require_gpu", lambda: describe("NVIDIA H200", (9, 0), 132, 50 << 20))
    monkeypatch.setattr(runner, "run", run)


def test_the_demo_fails_with_our_kernel_and_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = json.loads(result_file(tmp_path / "a.json", {"1x2K": 10.0, "8x1K": None}).read_text())
    content["rows"][1]["missing"] = {"fi_prefetch": "WrongAnswer: relative error [0.5]"}
    on_a_gpu(monkeypatch, lambda *_: {**content, "failed": [], "complete": True})
    text = fail("demo")
    assert "fi_prefetch: not measured on 1 of 2 rows: WrongAnswer: relative error [0.5]" in text
    assert "no right answer of our kernel on 1 of" in text


@pytest.mark.parametrize("error", [runner.JobError("ended before its first row"), PermissionError(13, "not yours")])
def test_a_measurement_that_cannot_run_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def run(*_: object) -> None:
        raise error

    on_a_gpu(monkeypatch, run)
    assert str(error) in fail("bench", "--heads", "32/8", "--lens", "8x1K")


def test_a_reason_keeps_its_brackets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(job: runner.Job, output: Path, resume: bool, progress: Callable[[dict[str, object]], None]) -> object:
        progress({"event": "row_failed", "row": 0, "reason": "ValueError: q: expected [batch, heads], not [/x]"})
        return {"rows": [], "failed": [{}], "complete": True}

    on_a_gpu(monkeypatch, run)
    monkeypatch.chdir(tmp_path)
    assert "expected [batch, heads], not [/x]" in fail("bench", "--heads", "32/8", "--lens", "8x1K")


def test_a_measurement_of_nothing_has_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    contents = [
        json.loads(result_file(tmp_path / "a.json", times).read_text()) | {"failed": failed, "complete": True}
        for times, failed in (({}, [{}]), ({"8x1K": None}, []), ({"8x1K": None, "1x2K": 10.0}, [{}]))
    ]
    on_a_gpu(monkeypatch, lambda *_: contents.pop(0))
    command = ("bench", "--heads", "32/8", "--lens", "8x1K", "--no-plots")
    assert "0 rows, 1 failed" in (text := fail(*command)) and "measured on no row" in text
    assert "1 rows, 0 failed" in (text := fail(*command)) and "measured on no row" in text
    assert "2 rows, 1 failed" in succeed(*command)


def test_only_the_grid_is_predicted() -> None:
    assert "has to be measured" in fail("bench", "layer", "--estimate", "h200")


def test_tune_goes_on_where_it_stopped_and_leaves_rules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cli, "has_gpu", lambda: True)
    monkeypatch.setattr(environment, "require_gpu", lambda: describe("NVIDIA H200", (9, 0), 132, 50 << 20))
    specs = tuning.specs()
    answers = [
        {"complete": False, "rows": []},
        {"complete": True, "rows": [{**spec, "us": 1.0 + spec["warps"]} for spec in specs]},
    ]
    resumed = []

    def run(job: runner.Job, output: Path, resume: bool, progress: object) -> dict[str, object]:
        assert (job.specs, output.parent) == (specs, tmp_path / "fi_prefetch" / "tuned")
        resumed.append(resume)
        return answers.pop(0)

    monkeypatch.setattr(runner, "run", run)
    assert "--resume" in fail("tune")
    assert not tune.tuned_file("h200").exists()
    assert "any" in succeed("tune", "--resume")
    assert resumed == [False, True]
    [rule] = tune.read_rules(tune.tuned_file("h200"))
    assert rule.grid.warps == 2, "the fastest of what was measured"


# ---- evidence ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with everything that a record's hash covers."""
    for name in ("csrc/decode.cu", *evidence.LAUNCH_FILES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(cli, "checkout", lambda: tmp_path)
    return tmp_path


def machine(
    monkeypatch: pytest.MonkeyPatch, name: str = "NVIDIA H200", gpus: int = 1, torch_version: str = "2.11.0"
) -> None:
    """The check's machine from here on, on which all passes."""
    monkeypatch.setattr(cli, "has_gpu", lambda: True)
    monkeypatch.setattr(environment, "require_gpu", lambda: describe(name, (9, 0), 132, 1))
    monkeypatch.setattr(environment, "gpus", lambda: {name: gpus})
    monkeypatch.setattr(environment, "driver_version", lambda: "580")
    monkeypatch.setattr(environment, "versions", lambda: {"torch": torch_version})
    monkeypatch.setattr(gpu_check, "run_suite", lambda *_: evidence.Counts(2500, 0, 0))
    monkeypatch.setattr(gpu_check, "run_several_gpus", lambda *_: evidence.Counts(37, 0, 0))
    monkeypatch.setattr(gpu_check, "run_random", lambda root, echo, cases, seed: evidence.Counts(cases, 0, 0, 3))
    monkeypatch.setattr(gpu_check, "run_soak", lambda root, echo, calls: evidence.Counts(calls, 0, 0))
    monkeypatch.setattr(gpu_check, "run_sanitizer", lambda *_: evidence.Counts(80, 0, 0))


def recorded(tree: Path) -> tuple[evidence.Evidence, evidence.Verdict]:
    record = evidence.load(tree / evidence.EVIDENCE_FILE)
    return record, evidence.judge(record, evidence.tree_hash(tree))


def test_what_needs_several_gpus_may_run_on_another_machine(monkeypatch: pytest.MonkeyPatch, tree: Path) -> None:
    machine(monkeypatch)
    assert "several_gpus needs two GPUs, and PyTorch sees one: left out" in succeed("check", "--record")
    alone, verdict = recorded(tree)
    assert alone.several_gpus is None and verdict.state == evidence.PASSED
    assert "needs two GPUs" in fail("check", "--record", "--only", "several_gpus")
    assert recorded(tree)[0] == alone

    machine(monkeypatch, "NVIDIA H100 80GB HBM3", gpus=2, torch_version="2.12.0")
    succeed("check", "--record", "--only", "several_gpus")
    both, verdict = recorded(tree)
    assert verdict.state == evidence.PASSED
    assert replace(both, several_gpus=None) == alone, "the rest of the record is as it was, of its own machine"
    assert both.several_gpus == evidence.SeveralGpus(
        {"NVIDIA H100 80GB HBM3": 2}, both.several_gpus.commit, "580", {"torch": "2.12.0"}, evidence.Counts(37, 0, 0)
    )

    machine(monkeypatch)  # and the first machine keeps what the second one recorded
    for parts in ((), ("--only", "suite")):
        succeed("check", "--record", *parts)
        assert recorded(tree)[0].several_gpus == both.several_gpus
    (tree / "csrc" / "decode.cu").write_text("changed")
    succeed("check", "--record")
    assert recorded(tree)[0].several_gpus is None, "of other sources"


def test_several_gpus_are_a_part_like_any_other_where_there_are_two(
    monkeypatch: pytest.MonkeyPatch, tree: Path
) -> None:
    machine(monkeypatch, gpus=2)
    succeed("check", "--record")
    record, verdict = recorded(tree)
    assert record.several_gpus.gpus == {"NVIDIA H200": 2} and verdict.state == evidence.PASSED
    monkeypatch.setattr(gpu_check, "run_several_gpus", lambda *_: evidence.Counts(36, 1, 0))
    assert "not everything passed" in fail("check", "--record", "--only", "several_gpus")
    assert recorded(tree)[1].state == evidence.FAILED

    def broken(*_: object) -> evidence.Counts:
        raise gpu_check.CheckError("pytest wrote no report")

    monkeypatch.setattr(gpu_check, "run_several_gpus", broken)
    assert "no report" in fail("check", "--record", "--only", "several_gpus")
    assert recorded(tree)[0].several_gpus is None, "what could not run again is not vouched for by what ran before"


def test_several_gpus_alone_are_no_record_of_the_rest(monkeypatch: pytest.MonkeyPatch, tree: Path) -> None:
    machine(monkeypatch, gpus=2)
    succeed("check", "--record", "--only", "several_gpus")
    record, verdict = recorded(tree)
    assert record.gpu is None and not record.suites and record.several_gpus.counts.passed == 37
    assert verdict.state == evidence.FAILED and "tests/gpu has not run" in verdict.reason
    succeed("check", "--declare-not-run")
    assert recorded(tree)[0].several_gpus == record.several_gpus, "what ran is kept when the rest is declared"


def test_each_part_runs_its_own_tests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The suite leaves out what needs several GPUs, and that part runs nothing else."""
    commands = []

    def stream(command: list[str], root: Path, echo: object) -> tuple[str, int]:
        commands.append(command)
        report = next(part for part in command if part.startswith("--junitxml=")).partition("=")[2]
        Path(report).write_text('<testsuites><testsuite tests="3" failures="0" errors="0" skipped="0"/></testsuites>')
        return "", 0

    monkeypatch.setattr(gpu_check, "_stream", stream)
    for run in (gpu_check.run_suite, gpu_check.run_several_gpus):
        assert run(tmp_path, print, ["-x"]) == evidence.Counts(3, 0, 0)
    suite, several = commands
    assert evidence.GPU_SUITE in suite and f"--ignore={evidence.SEVERAL_GPUS}" in suite and suite[-1] == "-x"
    assert evidence.SEVERAL_GPUS in several and evidence.GPU_SUITE not in several and several[-1] == "-x"
    assert (ROOT / evidence.SEVERAL_GPUS).is_file()


@pytest.mark.parametrize("release", ["--filter", "--kernel-regex --num-cuda-barriers"])
def test_a_sanitizer_gets_the_options_that_it_has(
    release: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '{release}'\n")
    tool.chmod(0o755)
    commands = {}
    last_lines = {"racecheck": "RACECHECK SUMMARY: 0 hazards", "synccheck": "ERROR SUMMARY: 0 errors"}

    def stream(command: list[str], *_: object) -> tuple[str, int]:
        commands[command[2]] = command[3:-2]
        return f"sanitize: 5 passed, 0 failed\n========= {last_lines[command[2]]}\n", 0

    monkeypatch.setattr(gpu_check, "_stream", stream)
    monkeypatch.setattr(gpu_check, "sanitizer_path", lambda: str(tool))
    for name in last_lines:
        assert gpu_check.run_sanitizer(tmp_path, name, print) == evidence.Counts(5, 0, 0)
    our_kernels = [release.split()[0], f"kns={gpu_check.KERNEL_SUBSTRING}"]
    assert commands["racecheck"] == our_kernels
    assert commands["synccheck"] == our_kernels + (["--num-cuda-barriers", "65536"] if "num-cuda" in release else [])


def test_what_has_not_run_is_declared(tree: Path) -> None:
    succeed("check", "--declare-not-run")
    record = evidence.load(tree / evidence.EVIDENCE_FILE)
    assert evidence.judge(record, evidence.tree_hash(tree)).state == evidence.NOT_RUN


def test_what_ran_is_kept_when_the_rest_is_declared(monkeypatch: pytest.MonkeyPatch, tree: Path) -> None:
    machine(monkeypatch)
    succeed("check", "--record", "--only", "suite", "--only", "memcheck")
    ran, _ = recorded(tree)
    assert "without suite random cases, suite soak calls" in succeed("check", "--declare-not-run")
    declared, verdict = recorded(tree)
    assert verdict.state == evidence.NOT_RUN
    assert (declared.suites, declared.sanitizers) == (ran.suites, ran.sanitizers)
    tools = (f"--only={tool}" for tool in evidence.SANITIZER_TOOLS[1:])
    succeed("check", "--record", "--only=random", "--only=soak", *tools)
    assert recorded(tree)[1].state == evidence.PASSED, "a later call adds what was missing"

    monkeypatch.setattr(gpu_check, "run_suite", lambda *_: evidence.Counts(2499, 1, 0))
    fail("check", "--record", "--only", "suite")
    assert "1 failed" in fail("check", "--declare-not-run")
    assert recorded(tree)[1].state == evidence.FAILED


def test_a_record_is_made_part_by_part(monkeypatch: pytest.MonkeyPatch, tree: Path) -> None:
    """The suite and the tools may run in different calls: the record is whole when the last one has passed."""
    path = tree / evidence.EVIDENCE_FILE
    machine(monkeypatch)
    monkeypatch.setattr(gpu_check, "run_random", lambda root, echo, cases, seed: evidence.Counts(cases, 0, 0, seed))

    def state() -> tuple[str, str]:
        verdict = evidence.judge(evidence.load(path), evidence.tree_hash(tree))
        return verdict.state, verdict.reason

    succeed("check", "--record", "--only", "suite")
    assert state()[0] == evidence.FAILED and "random cases has not run" in state()[1]
    succeed("check", "--record", "--only", "random", "--random-cases", "19990", "--seed", "7", "--only", "soak")
    assert state()[0] == evidence.FAILED and "memcheck has not run" in state()[1]
    succeed("check", "--record", *(f"--only={tool}" for tool in evidence.SANITIZER_TOOLS))
    assert state()[0] == evidence.FAILED and "19990 passed, at least 20000" in state()[1]
    succeed("check", "--record", "--only", "random", "--seed", "7")
    assert evidence.load(path).suites[evidence.RANDOM_CASES] == evidence.Counts(20_000, 0, 0, seed=7)
    assert state() == (evidence.PASSED, "2500 cases passed on NVIDIA H200")
    assert "NVIDIA H200 has run this tree" in fail("check", "--declare-not-run")
    assert state()[0] == evidence.PASSED

    def broken(*_: object) -> evidence.Counts:
        raise gpu_check.CheckError("racecheck: the tool's summary is missing")

    monkeypatch.setattr(gpu_check, "run_sanitizer", broken)
    assert "summary is missing" in fail("check", "--record", "--only", "racecheck")
    assert state()[0] == evidence.FAILED, "what could not run again is not vouched for by what ran before"

    (tree / "csrc" / "decode.cu").write_text("changed")
    fail("check", "--record", "--only", "memcheck")
    assert state()[0] == evidence.FAILED and "tests/gpu has not run" in state()[1]


def test_a_record_is_of_one_set_of_versions(monkeypatch: pytest.MonkeyPatch, tree: Path) -> None:
    path = tree / evidence.EVIDENCE_FILE
    machine(monkeypatch)
    succeed("check", "--record", "--only", "suite")
    monkeypatch.setattr(environment, "versions", lambda: {"torch": "another"})
    succeed("check", "--record", "--only", "memcheck")
    assert not evidence.load(path).suites, "the suite ran with other versions than the record names"
    path.write_text("{")
    assert "not an evidence record" in fail("check", "--record", "--only", "memcheck")


def test_the_checkout_is_found() -> None:
    assert cli.checkout() == ROOT


# ---- where it was measured -----------------------------------------------------------------------------------------


def test_the_commit_is_stated_or_read(monkeypatch: pytest.MonkeyPatch) -> None:
    environment.commit.cache_clear()
    monkeypatch.setenv("FI_PREFETCH_COMMIT", "abc")
    assert environment.commit() == "abc"
    environment.commit.cache_clear()
    monkeypatch.delenv("FI_PREFETCH_COMMIT")
    monkeypatch.setattr(environment, "REPOSITORY", Path("/nonexistent"))
    assert environment.commit() is None
    environment.commit.cache_clear()


def test_versions_name_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.installed_version("no-such-distribution") is None
    assert environment.versions()["torch"]


def test_the_names_of_baselines_are_those_that_are_measured() -> None:
    from fi_prefetch.bench.baselines import BASELINES
    from fi_prefetch.bench.worker import KINDS

    assert cli.BASELINE_NAMES == tuple(BASELINES)
    assert (*cli.BENCH_KINDS, "tuning") == tuple(KINDS)
    assert set(cli.LAYER_BASELINES) <= set(BASELINES)
