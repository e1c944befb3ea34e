"""What of the measurements is arithmetic: shapes, timing sizes, result files, summaries, predictions, parsers."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import math
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fi_prefetch
from fi_prefetch import device, gpu_check, tune
from fi_prefetch.bench import (
    demo,
    estimate,
    explain,
    flashinfer_run_ahead,
    grid,
    layer,
    paper,
    profile,
    report,
    runner,
    tables,
    tuning,
    worker,
)
from fi_prefetch.bench.baselines import Unsupported, plan_arguments
from fi_prefetch.bench.inputs import DecodeInputs, KvPool, pool_bytes, relative_error
from fi_prefetch.bench.prefetch import POLICIES
from fi_prefetch.bench.shapes import (
    MODELS,
    Model,
    Shape,
    basic_grid,
    full_grid,
    lens_label,
    mixed_grid,
    model_grid,
    parse_lens,
    parse_tokens,
    small_grid,
    spread_lens,
)
from fi_prefetch.bench.timing import Timing, calls_per_replay, copies_needed, summarise
from fi_prefetch.prefetch import PROLOGUE_TILES, LaunchFacts, PrefetchPolicy, resolve
from fi_prefetch.schedule import Schedule
from fi_prefetch.tune import CANDIDATES, Grid, Rule

MiB = 1 << 20
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


# ---- shapes and grids ----------------------------------------------------------------------------------------------


def test_a_shape_counts_the_bytes_that_a_call_reads() -> None:
    shape = Shape(32, 8, 16, ((2048, 1), (100, 3)))
    assert shape.batch == 4
    assert shape.lengths == [2048, 100, 100, 100]
    assert shape.kv_bytes == 2 * 8 * 128 * 2 * 2348
    assert shape.pages == 128 + 3 * 7
    assert shape.allocated_bytes == 2 * 8 * 128 * 2 * 16 * shape.pages
    assert Shape(32, 8, 16, ((2048, 1),), kv_dtype="float8_e4m3fn").kv_bytes == 2 * 8 * 128 * 2048


def test_a_shape_survives_its_row() -> None:
    for shape in (*small_grid(), Shape(8, 2, 3, parse_lens("1x5+2x3"), 64, "float16", "float8_e5m2")):
        assert Shape.from_row(json.loads(json.dumps(shape.to_row()))) == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads_q": 30}, "heads_q"),
        ({"heads_kv": 0}, "heads_kv"),
        ({"page_size": 0}, "page_size"),
        ({"kv_lens": ()}, "kv_lens"),
        ({"kv_lens": ((5, 0),)}, "kv_lens"),
        ({"kv_dtype": "int8"}, "kv_dtype"),
        ({"q_dtype": "half"}, "q_dtype"),
    ],
)
def test_an_impossible_shape_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shape(**{"heads_q": 32, "heads_kv": 8, "page_size": 1, "kv_lens": ((16, 1),), **change})


@pytest.mark.parametrize(
    ("text", "lens"),
    [
        ("8x1K", ((1024, 8),)),
        ("1x64K+31x4K", ((65536, 1), (4096, 31))),
        ("32x128+32x4K", ((4096, 32), (128, 32))),
        ("1x500", ((500, 1),)),
    ],
)
def test_lengths_are_parsed_longest_first(text: str, lens: tuple) -> None:
    assert parse_lens(text) == lens
    assert parse_lens(lens_label(lens)) == lens


@given(requests=st.integers(3, 300), shortest=st.integers(1, 500), factor=st.integers(2, 50))
def test_lengths_that_are_spread(requests: int, shortest: int, factor: int) -> None:
    longest = shortest * factor
    lens = spread_lens(requests, shortest, longest)
    lengths = sorted(length for length, count in lens for _ in range(count))
    assert len(lengths) == requests and (lengths[0], lengths[-1]) == (shortest, longest)
    assert lengths[requests // 2] <= 2 * math.sqrt(shortest * longest) * factor ** (1 / requests), "most are short"
    text = f"{requests}x{shortest}..{longest}"
    assert parse_lens(text) == lens and parse_lens(lens_label(lens)) == lens


def test_neighbours_among_spread_lengths_are_of_all_lengths() -> None:
    lengths = [length for length, _ in spread_lens(256, 64, 2048)]
    for i in range(0, 256, 8):
        assert min(lengths[i : i + 8]) < 200 and max(lengths[i : i + 8]) > 700
    assert lens_label(spread_lens(256, 64, 2048)) == "256x64..2K"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8",
        "2x64..2K",
        "8x0..2K",
        "8x2K..64",
        "8x2K..2K",
        "8x64...2K",
        "8x64..2K+1x4K",
        "x1K",
        "0x1K",
        "8x",
        "8xK",
        "8x1M",
        "8x1K+",
        "8x-1",
    ],
)
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_lens(text)


def test_tokens_are_parsed() -> None:
    assert [parse_tokens(text) for text in ("0", "512", "2k", "128K")] == [0, 512, 2048, 131072]


def test_the_basic_grid() -> None:
    grid = basic_grid()
    assert len(set(grid)) == len(grid) == 4 * 2 * 10 + 2 * 2 * 5
    assert {shape.page_size for shape in grid} == {1, 16}
    assert {(shape.heads_q, shape.heads_kv) for shape in grid if not shape.skewed} == {
        (32, 8),
        (32, 32),
        (28, 4),
        (8, 1),
    }
    assert {(shape.heads_q, shape.heads_kv) for shape in grid if shape.skewed} == {(32, 8), (8, 1)}
    assert min(shape.kv_bytes for shape in grid) == MiB
    assert max(shape.kv_bytes for shape in grid) == 8 << 30


def test_the_full_grid_holds_the_basic_one_and_fp8() -> None:
    grid = set(full_grid())
    assert set(basic_grid()) <= grid
    assert {shape.page_size for shape in grid} == {1, 16, 64}
    assert {shape.kv_dtype for shape in grid} == {"bfloat16", "float8_e4m3fn"}
    assert {shape.heads_q // shape.heads_kv for shape in grid} == {1, 4, 7, 8}


def test_the_mixed_grid() -> None:
    grid = mixed_grid()
    assert len(set(grid)) == len(grid) == 2 * 4 * 2 * 3
    assert {shape.size_class for shape in grid} == {"mixed"}
    assert max(shape.batch for shape in grid) == 512


def test_models_slice_over_ranks() -> None:
    rank = MODELS["llama-3-70b"].slice(8)
    assert (rank.heads_q, rank.heads_kv, rank.intermediate, rank.hidden) == (8, 1, 3584, 8192)
    assert MODELS["llama-3-70b"].slice(16).heads_kv == 1, "kv heads are repeated beyond their number"
    with pytest.raises(ValueError, match="tensor_parallel"):
        MODELS["llama-3-8b"].slice(3)
    shapes = list(model_grid(rank, (1, 8), (1024,)))
    assert [shape.kv_lens for shape in shapes] == [((1024, 1),), ((1024, 8),)]
    for model in MODELS.values():
        assert model.heads_q % model.heads_kv == 0


def test_size_classes() -> None:
    assert Shape(8, 1, 1, parse_lens("64x2K")).size_class == "up to 64 MB"
    assert Shape(32, 8, 1, parse_lens("64x2K")).size_class == "64 to 512 MB"
    assert Shape(32, 8, 1, parse_lens("128x4K")).size_class == "above 1 GB"
    assert Shape(32, 8, 1, parse_lens("1x64K+31x4K")).size_class == "skewed"


# ---- timing --------------------------------------------------------------------------------------------------------


def test_caches_rotated_over_are_several_times_l2() -> None:
    assert copies_needed(MiB, 60 * MiB, 1 << 40) == 240
    assert copies_needed(100 * MiB, 60 * MiB, 1 << 40) == 3
    assert copies_needed(8 << 30, 60 * MiB, 1 << 40) == 2, "never one alone: its end could still be in L2"
    assert copies_needed(MiB, 60 * MiB, 100 * MiB) == 100, "or as many as fit"
    with pytest.raises(ValueError, match="two caches"):
        copies_needed(60 * MiB, 60 * MiB, 100 * MiB)


@pytest.mark.parametrize(("estimate_us", "copies"), [(5.0, 240), (2000.0, 2), (0.1, 1), (10.0, 3)])
def test_a_replay_is_whole_rounds_and_lasts(estimate_us: float, copies: int) -> None:
    calls = calls_per_replay(estimate_us, copies)
    assert calls % copies == 0 and calls >= copies
    assert calls * estimate_us >= 1000.0 or calls >= 1000


def test_a_timing_is_the_median_and_the_deciles_apart() -> None:
    timing = summarise([10.0, 11.0, 9.0, 10.0, 10.0, 100.0, 10.0, 10.0, 10.0, 10.0, 10.0])
    assert timing.us == 10.0
    assert timing.spread == pytest.approx(0.1)
    assert summarise([3.0]).spread == 0.0


# ---- inputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
def test_inputs_are_the_shape_that_they_are_of(kv_dtype: str, shuffled: bool) -> None:
    shape = Shape(8, 2, 16, parse_lens("1x100+3x33"), 64, kv_dtype=kv_dtype)
    pool = KvPool(3 * shape.allocated_bytes, getattr(torch, kv_dtype), torch.device("cpu"))
    inputs = DecodeInputs(shape, pool, l2_bytes=0, shuffled=shuffled, copies=3)
    k, v = inputs.cache(2)
    assert k.shape == v.shape == (shape.pages, 16, 2, 64)
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    spans = {inputs.cache(i)[j].data_ptr() for i in range(3) for j in range(2)}
    assert len(spans) == 6
    assert sorted(inputs.indices.tolist()) == list(range(shape.pages))
    assert (inputs.indices.tolist() == list(range(shape.pages))) == (not shuffled)
    pages = inputs.indptr[1:] - inputs.indptr[:-1]
    assert ((pages - 1) * 16 + inputs.last_page_len).tolist() == shape.lengths == inputs.seq_lens.tolist()
    for request, count in enumerate(pages.tolist()):
        begin = int(inputs.indptr[request])
        assert inputs.block_table[request, :count].tolist() == inputs.indices[begin : begin + count].tolist()
    assert float(k.float().std()) == pytest.approx(1.0, abs=0.1)


def test_the_error_of_an_output_is_measured_against_plain_attention() -> None:
    shape = Shape(8, 2, 5, parse_lens("2x40+20x7"), 64)
    pool = KvPool(shape.allocated_bytes, torch.bfloat16, torch.device("cpu"))
    inputs = DecodeInputs(shape, pool, l2_bytes=0, copies=1)
    right = demo.attention(inputs)
    assert inputs.error(right) < 1e-5
    assert inputs.error(right * 1.01) == pytest.approx(0.01, rel=0.01)
    assert inputs.error(right * math.nan) == math.inf


def test_relative_errors() -> None:
    assert relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])) == pytest.approx(1 / math.sqrt(2))
    assert relative_error(torch.tensor([0.5]), torch.zeros(1)) == 0.5
    assert relative_error(torch.tensor([math.nan]), torch.ones(1)) == math.inf


def test_a_pool_holds_what_its_shapes_rotate_over() -> None:
    shapes = [Shape(8, 1, 1, parse_lens("1x2K")), Shape(32, 8, 1, parse_lens("64x2K"))]
    assert pool_bytes(shapes, 60 * MiB, 1 << 40) == 2 * 512 * MiB
    assert pool_bytes(shapes, 60 * MiB, 1 << 40, fewest_copies=4) == 4 * 512 * MiB
    assert pool_bytes(shapes, 60 * MiB, 600 * MiB) == 240 * MiB, "a shape that does not fit is left out"
    assert pool_bytes([], 60 * MiB, 1 << 40) == 0


# ---- result files --------------------------------------------------------------------------------------------------

HEADER = {
    "gpu": "NVIDIA H200",
    "driver": "1",
    "torch": "2",
    "flashinfer": "0",
    "commit": "c",
    "read_ceiling_gbs": 4500.0,
}
WORKER = """
import json, os, sys, time
job = json.loads(sys.stdin.readline())
events = os.fdopen(int(os.environ["FI_PREFETCH_BENCH_EVENTS"]), "w")
def emit(**event):
    print(json.dumps(event), file=events, flush=True)
header = job["options"]["header"]
emit(event="header", header={**header, "read_ceiling_gbs": job["read_ceiling_gbs"] or header["read_ceiling_gbs"]})
answer = json.loads(sys.stdin.readline())
done, ceiling = answer["done"], answer["read_ceiling_gbs"]
skip = {(row, name): reason for row, name, reason in job["skip"]}
for number, spec in enumerate(job["specs"]):
    if number in done:
        continue
    emit(event="row_started", row=number)
    us, missing = {}, {}
    for name, action in job["options"]["kernels"].items():
        if (number, name) in skip:
            us[name], missing[name] = None, skip[number, name]
            continue
        emit(event="kernel_started", row=number, name=name)
        if action == "crash" and spec["x"] == 1:
            os.abort()
        if action == "hang" and spec["x"] == 1:
            time.sleep(60)
        if action == "device error" and spec["x"] == 1:
            emit(event="kernel_failed", row=number, name=name, reason="an illegal memory access")
            os._exit(3)
        us[name] = 1.5
    if job["options"].get("crash between kernels") and spec["x"] == 1:
        os.abort()
    if job["options"].get("slow"):
        time.sleep(0.5)
    content = {**spec, "us": us, "missing": missing, "process": os.getpid(), "ceiling": ceiling}
    emit(event="row", row=number, content=content)
    if job["options"].get("cut short"):
        os.write(events.fileno(), b'{"event": "ro')
        os.abort()
emit(event="finished")
"""


def job_of(tmp_path: Path, rows: int = 3, **options: Any) -> runner.Job:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    options = {"header": HEADER, "kernels": {"a": "run", "b": "run"}, **options}
    specs = [{"x": number} for number in range(rows)]
    return runner.Job("grid", specs, options, stall_seconds=20.0, worker=(sys.executable, str(script)))


def test_a_result_file_has_the_header_and_every_row(tmp_path: Path) -> None:
    output = tmp_path / "results" / "grid.json"
    content = runner.run(job_of(tmp_path), output)
    assert content == json.loads(output.read_text())
    assert {name: content[name] for name in HEADER} == HEADER
    assert content["complete"] and not content["failed"]
    assert [row["x"] for row in content["rows"]] == [0, 1, 2]
    assert len({row["process"] for row in content["rows"]}) == 1


@pytest.mark.parametrize(
    ("action", "reason"), [("crash", "exit code -6"), ("hang", "no answer"), ("device error", "illegal memory access")]
)
def test_a_kernel_that_ends_the_process_is_left_out_of_its_row_alone(tmp_path: Path, action: str, reason: str) -> None:
    job = job_of(tmp_path, kernels={"a": "run", "b": action, "c": "run"})
    job.stall_seconds = 6.0 if action == "hang" else 20.0
    events: list[dict[str, Any]] = []
    content = runner.run(job, tmp_path / "grid.json", progress=events.append)
    assert content["complete"] and not content["failed"]
    assert [row["us"] for row in content["rows"]] == [
        {"a": 1.5, "b": 1.5, "c": 1.5},
        {"a": 1.5, "b": None, "c": 1.5},
        {"a": 1.5, "b": 1.5, "c": 1.5},
    ]
    assert reason in content["rows"][1]["missing"]["b"]
    assert [(e["row"], e["name"]) for e in events if e["event"] == "worker_lost"] == [(1, "b")]


def test_a_row_that_ends_the_process_again_and_again_fails_with_its_reason(tmp_path: Path) -> None:
    job = job_of(tmp_path, **{"crash between kernels": True})
    content = runner.run(job, tmp_path / "grid.json")
    assert [row["x"] for row in content["rows"]] == [0, 2]
    assert [row["x"] for row in content["failed"]] == [1]
    assert "exit code" in content["failed"][0]["reason"]


def test_a_run_that_is_out_of_time_keeps_its_rows_and_can_be_resumed(tmp_path: Path) -> None:
    output = tmp_path / "grid.json"
    job = job_of(tmp_path, rows=40, slow=True)
    job.budget_seconds = 8.0
    content = runner.run(job, output)
    assert not content["complete"]
    assert 0 < len(content["rows"]) < 40
    job.budget_seconds = None
    resumed = runner.run(job, output, resume=True)
    assert resumed["complete"] and [row["x"] for row in resumed["rows"]] == list(range(40))
    assert resumed["rows"][: len(content["rows"])] == content["rows"]
    again = runner.run(job_of(tmp_path, rows=2), output, resume=False)
    assert again["rows"][0]["process"] != content["rows"][0]["process"]


def edited(path: Path, **fields: Any) -> None:
    """Changes what a result file says of itself."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("other", ["gpu", "driver", "torch", "flashinfer", "commit", "options"])
def test_rows_that_were_measured_otherwise_are_not_kept(tmp_path: Path, other: str) -> None:
    output = tmp_path / "grid.json"
    first = runner.run(job_of(tmp_path), output)
    edited(output, **{other: "another"})
    second = runner.run(job_of(tmp_path), output, resume=True)
    assert second[other] == first[other]
    assert first["rows"][0]["process"] != second["rows"][0]["process"]


def test_rows_that_are_added_have_floors_of_the_files_ceiling(tmp_path: Path) -> None:
    output = tmp_path / "grid.json"
    first = runner.run(job_of(tmp_path), output)
    edited(output, read_ceiling_gbs=4400.0, rows=first["rows"][:1])
    second = runner.run(job_of(tmp_path), output, resume=True)
    assert second["read_ceiling_gbs"] == 4400.0 and second["rows"][0] == first["rows"][0]
    assert [row["ceiling"] for row in second["rows"][1:]] == [4400.0, 4400.0]


def test_rows_that_are_not_of_the_job_are_not_lost(tmp_path: Path) -> None:
    output = tmp_path / "grid.json"
    runner.run(job_of(tmp_path), output)
    before = output.read_text()
    with pytest.raises(runner.JobError, match="grid.json: 2 of its 3 rows are not of those to measure"):
        runner.run(job_of(tmp_path, rows=1), output, resume=True)
    assert output.read_text() == before
    more = runner.run(job_of(tmp_path, rows=4), output, resume=True)
    assert [row["x"] for row in more["rows"]] == [0, 1, 2, 3]
    assert more["rows"][:3] == json.loads(before)["rows"]


def test_time_that_is_up_before_anything_is_known_leaves_the_file_alone(tmp_path: Path) -> None:
    output = tmp_path / "grid.json"
    runner.run(job_of(tmp_path), output)
    before = output.read_text()
    job = job_of(tmp_path)
    job.worker, job.budget_seconds = (sys.executable, "-c", "import time; time.sleep(60)"), 0.5
    content = runner.run(job, output, resume=True)
    assert not content["complete"] and output.read_text() == before


@pytest.mark.parametrize("text", ["", "[]", "{", '{"rows": 1}', "\x00"])
def test_what_is_no_result_file_cannot_be_gone_on_with(tmp_path: Path, text: str) -> None:
    output = tmp_path / "grid.json"
    output.write_text(text)
    with pytest.raises(runner.JobError, match="grid.json: not a result file"):
        runner.run(job_of(tmp_path), output, resume=True)
    assert output.read_text() == text


def test_a_worker_does_not_outlive_a_run_that_is_interrupted(tmp_path: Path) -> None:
    job = job_of(tmp_path, kernels={"a": "hang"})
    events: list[dict[str, Any]] = []

    def progress(event: dict[str, Any]) -> None:
        events.append(event)
        if event.get("row") == 1:
            raise OSError("no space left on device")

    start = time.monotonic()
    with pytest.raises(OSError, match="no space"):
        runner.run(job, tmp_path / "grid.json", progress=progress)
    assert time.monotonic() - start < 30.0, "the worker sleeps for longer"


REAL_WORKER = """
import sys, types
import torch
from fi_prefetch.bench import environment, worker

torch.cuda.synchronize = lambda: None
environment.require_gpu = lambda: types.SimpleNamespace(name="a GPU", sm_count=1)
environment.driver_version = lambda: "580"
worker.read_ceiling_gbs = lambda sm_count: float(sys.argv[1])
measuring = sys.modules["measuring"] = types.ModuleType("measuring")
measuring.measure = lambda spec, context: {**spec, "floor_us": context.floor_us(2_000_000)}
worker.KINDS["grid"] = "measuring"
worker.main()
"""


def test_runner_and_worker_agree_on_rows_and_ceiling(tmp_path: Path) -> None:
    """The real worker, on a GPU that is made up: an earlier run's ceiling holds for the rows that are added to it."""
    path = tmp_path / "grid.json"

    def measured(rows: int, ceiling: str, resume: bool) -> dict[str, Any]:
        job = job_of(tmp_path, rows=rows)
        job.worker = (sys.executable, "-c", REAL_WORKER, ceiling)
        return runner.run(job, path, resume)

    first = measured(1, "2000", resume=False)
    assert first["complete"] and first["sources"] and first["gpu"] == "a GPU"
    assert first["rows"] == [{"x": 0, "floor_us": 1.0}]
    second = measured(3, "4000", resume=True)
    assert second["read_ceiling_gbs"] == 2000.0
    assert [row["floor_us"] for row in second["rows"]] == [1.0, 1.0, 1.0]
    assert [row["floor_us"] for row in measured(3, "4000", resume=False)["rows"]] == [0.5, 0.5, 0.5]


def test_an_event_that_was_cut_short_is_the_end_of_its_worker(tmp_path: Path) -> None:
    job = job_of(tmp_path, **{"cut short": True})
    start = time.monotonic()
    content = runner.run(job, tmp_path / "grid.json")
    assert [row["x"] for row in content["rows"]] == [0, 1, 2]
    assert time.monotonic() - start < job.stall_seconds


def test_a_reason_says_nothing_of_the_machine() -> None:
    error = RuntimeError("Error in function 'operator()' at /home/me/.cache/flashinfer/0.7.4/90a/x.cu:63: wrong\nmore")
    expected = "RuntimeError: Error in function 'operator()' at <cache>/flashinfer/0.7.4/90a/x.cu:63: wrong"
    assert worker.reason_of(error) == expected


class EndedProcess(subprocess.Popen):
    """A process that has ended before anything is written to it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.wait()


@pytest.mark.parametrize("process", [subprocess.Popen, EndedProcess], ids=["at any time", "before the job is written"])
def test_a_worker_that_cannot_start_says_where_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: type[subprocess.Popen]
) -> None:
    monkeypatch.setattr(runner.subprocess, "Popen", process)
    job = job_of(tmp_path)
    job.worker = (sys.executable, "-c", "raise SystemExit('no GPU')")
    with pytest.raises(RuntimeError, match="before its first row: .*: no GPU; see "):
        runner.run(job, tmp_path / "grid.json")
    assert "no GPU" in (tmp_path / "grid.log").read_text()


# ---- a layer -------------------------------------------------------------------------------------------------------


def rope_and_write(qkv, cos_sin, positions, slots, k, v, heads_q, heads_kv, trigger_early):
    """The kernel of the same name without the rotation: the newest keys and values go where the page table says."""
    k.flatten(0, 1)[slots.long()] = qkv[:, heads_q : heads_q + heads_kv]
    v.flatten(0, 1)[slots.long()] = qkv[:, heads_q + heads_kv :]


def test_a_layers_attention_is_checked_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model("tiny", 256, 512, 1, 4, 2, 64)
    shape = model.shape(parse_lens("2x40+1x7"))
    monkeypatch.setitem(MODELS, "tiny", model)
    monkeypatch.setattr(layer.kernels, "module", lambda: SimpleNamespace(rope_and_write=rope_and_write))
    monkeypatch.setattr(layer, "capture", lambda step: step)
    monkeypatch.setattr(layer, "time_graph", lambda step, calls, replays: step() or Timing(20.0, 0.0))

    def prepare(inputs: DecodeInputs, factor: float = 1.0) -> Any:
        wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(torch.zeros(64, dtype=torch.uint8))
        arguments, options = plan_arguments(inputs)
        wrapper.plan(*arguments, **options)
        return lambda i: wrapper.run(inputs.q, inputs.cache(i), out=inputs.out, v_scale=factor)

    monkeypatch.setattr(layer, "prepare_ours", lambda inputs, policy, ready, enable_pdl: (None, prepare(inputs)))
    monkeypatch.setitem(layer.BASELINES, "fa3", lambda inputs: prepare(inputs, 1.2))
    monkeypatch.setitem(layer.BASELINES, "flashinfer_fa2", lambda inputs: lambda i: None)

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        try:
            return action(), None
        except worker.WrongAnswer as error:
            return None, str(error)

    pool = KvPool(layer.LAYERS * shape.allocated_bytes, torch.bfloat16, torch.device("cpu"))
    context: Any = SimpleNamespace(
        pool=lambda kv_dtype: pool,
        facts=SimpleNamespace(l2_bytes=0),
        options={"baselines": ["fa3", "flashinfer_fa2"]},
        attempt=attempt,
    )
    row = layer.measure({"model": "tiny", "tensor_parallel": 1, **shape.to_row()}, context)
    assert set(row["errors"]) == set(layer.VARIANTS) and all(0 < error < 0.01 for error in row["errors"].values())
    assert all(row["us"][name] == 20.0 for name in layer.VARIANTS)
    assert row["missing"] == {"fa3": "relative error 0.2", "flashinfer_fa2": "relative error inf"}
    assert row["us"]["fa3"] is row["us"]["flashinfer_fa2"] is row["attention_us"]["fa3"] is None


def test_a_layers_variants_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that gets slower by 1 us a turn slows all alike, and a graph that lies badly is one of several."""
    graphs, clock = itertools.count(100), itertools.count()
    number = layer.Steps.GRAPHS
    monkeypatch.setattr(layer, "capture", lambda step: next(graphs))
    monkeypatch.setattr(layer, "time_graph", lambda graph, *_: Timing(graph + next(clock) // (2 * number), 0.0))
    first, second = layer.Steps(lambda: None), layer.Steps(lambda: None)
    for _ in range(layer.Steps.TURNS):
        for each in (first, second):
            each.take_turn()
    assert first.timing() == Timing(101 + (number - 1) / 2, pytest.approx((layer.Steps.TURNS - 1) / 101))
    assert second.timing().us - first.timing().us == number, "only their graphs differ"


def test_what_a_layers_graphs_read_lives_as_long_as_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "capture", lambda step: None)
    step = functools.partial(print)  # stands for a call of a wrapper, whose buffers the graphs read
    held = weakref.ref(step)
    steps = layer.Steps(step)
    del step
    gc.collect()
    assert held() is not None
    del steps
    gc.collect()
    assert held() is None


# ---- summaries -----------------------------------------------------------------------------------------------------


def row_of(shape: Shape, ours: float | None, spread: float = 0.0, **baselines: float | None) -> dict[str, Any]:
    return {
        **shape.to_row(),
        "floor_us": shape.kv_bytes / 4500 / 1e3,
        "fi_prefetch_us": ours,
        "baselines_us": baselines,
        "error": 2e-3,
        "error_flashinfer": None,
        "spread": {"fi_prefetch": spread},
    }


SMALL = Shape(8, 1, 1, parse_lens("1x2K"))
LARGE = Shape(32, 8, 16, parse_lens("128x4K"))
SKEWED_FP8 = Shape(32, 8, 1, parse_lens("1x64K+31x4K"), kv_dtype="float8_e4m3fn")


def test_speedups_are_over_the_fastest_that_was_measured() -> None:
    rows = [
        row_of(SMALL, 5.0, flashinfer_fa2=10.0, flashinfer_xqa=None, fa3=8.0),
        row_of(LARGE, 500.0, flashinfer_fa2=510.0, fa3=490.0),
        row_of(SKEWED_FP8, None, flashinfer_fa2=700.0),
        row_of(SMALL, 5.0, flashinfer_fa2=None),
    ]
    assert [(s.baseline, s.factor) for s in report.speedups(rows)] == [("fa3", 1.6), ("fa3", 0.98)]
    assert [(s.baseline, s.factor) for s in report.speedups(rows, only_flashinfer=True)] == [
        ("flashinfer_fa2", 2.0),
        ("flashinfer_fa2", 1.02),
    ]


def test_summaries_give_geometric_means_and_minima_by_class() -> None:
    rows = [
        row_of(SMALL, 5.0, flashinfer_fa2=10.0),
        row_of(Shape(8, 1, 16, SMALL.kv_lens), 5.0, flashinfer_fa2=2.5),
        row_of(LARGE, 500.0, flashinfer_fa2=500.0),
        row_of(SKEWED_FP8, 100.0, flashinfer_fa2=800.0),
    ]
    found = {summary.name: summary for summary in report.summaries(report.speedups(rows))}
    small = found["bfloat16, up to 64 MB"]
    assert (small.rows, small.geometric_mean, small.minimum) == (2, pytest.approx(1.0), 0.5)
    assert small.slowest == "8/1 page 16 1x2K"
    assert found["float8_e4m3fn, skewed"].geometric_mean == pytest.approx(8.0)
    assert found["all"].rows == 4
    assert found["all"].geometric_mean == pytest.approx((2.0 * 0.5 * 1.0 * 8.0) ** 0.25)
    assert report.summaries([]) == []


def test_a_geometric_mean_needs_positive_factors() -> None:
    assert report.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    for factors in ([], [1.0, 0.0]):
        with pytest.raises(ValueError, match="positive"):
            report.geometric_mean(factors)


def test_losses_are_beyond_noise_and_worst_first() -> None:
    rows = [row_of(SMALL, 10.0, fa3=9.9), row_of(LARGE, 10.0, fa3=9.0), row_of(SKEWED_FP8, 10.0, fa3=5.0)]
    assert [loss.factor for loss in report.losses(report.speedups(rows))] == [0.5, 0.9]


def test_two_runs_are_compared_within_their_noise() -> None:
    before = {"rows": [row_of(SMALL, 10.0, 0.01), row_of(LARGE, 10.0, 0.2), row_of(SKEWED_FP8, None)]}
    after = {"rows": [row_of(LARGE, 9.0), row_of(SMALL, 8.0), row_of(SKEWED_FP8, 1.0)]}
    changes = report.compare(before, after)
    assert [(c.label, c.verdict, c.band) for c in changes] == [
        (SMALL.label, "faster", 0.02),
        (LARGE.label, "same", 0.2),
    ]
    assert changes[0].factor == pytest.approx(1.25)
    assert report.compare(after, before)[1].verdict == "slower"


def test_runs_of_other_kinds_are_compared_too() -> None:
    lever = {**SMALL.to_row(), "us": {"off": 10.0, "auto": 8.0, "paper": None}, "spread": {"off": 0.3}, "levers": {}}
    faster = {**lever, "us": {"off": 8.0, "auto": 4.0, "paper": 1.0}}
    changes = report.compare({"rows": [lever]}, {"rows": [faster]})
    assert [(c.label, c.verdict) for c in changes] == [
        (f"{SMALL.label}: off", "same"),
        (f"{SMALL.label}: auto", "faster"),
    ]
    part = {**SMALL.to_row(), "model": "llama-3-8b", "tensor_parallel": 1, "attention_us": {"auto": 10.0}}
    part |= {"us": {"auto": 200.0}, "spread": {"auto": 0.01}}
    [change] = report.compare({"rows": [part]}, {"rows": [part]})
    assert change.band == pytest.approx(0.2), "the repeats are of the whole layer"
    windows = [{**SMALL.to_row(), "window_us": us, "off_us": 5.0 + us, "on_us": None, "warm_us": 4.0} for us in (0, 4)]
    changes = report.compare({"rows": windows}, {"rows": windows[::-1]})
    assert [c.before_us for c in changes] == [5.0, 4.0, 9.0, 4.0] and {c.factor for c in changes} == {1.0}
    again = {**windows[0], "off_again_us": 5.5}
    assert [c.band for c in report.compare({"rows": [again]}, {"rows": windows})] == pytest.approx([0.1, 0.1])


def test_only_our_own_times_are_compared() -> None:
    others = {"flashinfer_fa2": 9.0, "fa3": 8.0}
    plan = {**SMALL.to_row(), "us": {"fi_prefetch": 10.0, **others}}
    part = {**SMALL.to_row(), "model": "m", "attention_us": {"auto": 10.0, **others}, "us": {"auto": 50.0, **others}}
    steps = {"model": "m", "tp": 1, "batch": 8, "context": 2048, "output": 136, "kv_dtype": "auto"}
    steps["ms_per_step"] = {"fi_prefetch": 6.5, **others}
    alone = {**steps, "ms_per_step": others}
    assert report.times_of(plan) == {f"{SMALL.label}: fi_prefetch": (10.0, 0.0)}
    assert list(report.times_of(part)) == [f"m {SMALL.label}: auto"]
    assert report.times_of(steps) == {"m TP-1 8x2K KV auto": (6500.0, 0.0)}, "in microseconds, as every other kind"
    assert report.times_of(alone) == {}


def test_tuned_grids_are_a_kind_of_their_own() -> None:
    rows = [{**spec, "us": 5.0, "spread": 0.03} for spec in tuning.specs()[:3]]
    assert tables.kind_of({"rows": rows}) == "tuning"
    [table] = tables.tables({"rows": rows})
    assert [line[3:] for line in table.rows] == [("8", "1", tiles, "5.0") for tiles in ("0", "1", "4")]
    changes = report.compare({"rows": rows}, {"rows": rows})
    assert len(changes) == 3 and {change.band for change in changes} == {0.03}


def test_bytes_are_written_with_three_digits_or_four() -> None:
    counts = (2048, 32 * MiB, 1000 * MiB, 1023 * MiB + MiB // 2, 1024 * MiB, 2000 << 30)
    labels = ["2 KB", "32 MB", "1000 MB", "1024 MB", "1 GB", "2000 GB"]
    assert [report.bytes_label(count) for count in counts] == labels


def test_every_committed_result_gives_its_tables() -> None:
    for path in sorted(RESULTS.glob("*/*.json")):
        result = json.loads(path.read_text())
        kind = "grid" if path.stem == "mixed" else path.stem.removesuffix("_all_heads").removesuffix("_fp8")
        assert tables.kind_of(result) == kind
        found = tables.tables(result)
        assert found
        for table in found:
            assert {len(row) for row in table.rows} == {len(table.columns)}
    with pytest.raises(ValueError, match="not a result file"):
        tables.kind_of({"rows": [{"x": 1}]})


def test_classes_and_losses_are_in_words_what_the_rows_say() -> None:
    rows = [
        row_of(SMALL, 5.0, flashinfer_fa2=10.0, fa3=4.0),
        row_of(LARGE, 500.0, flashinfer_fa2=505.0, fa3=None),
        row_of(SKEWED_FP8, 100.0, flashinfer_fa2=200.0),
    ]
    result = {**HEADER, "rows": rows}
    assert tables.classes(result, fp8=False).rows == [
        ("up to 64 MB", "1", "2.00", "2.00", "0.80", "0.80"),
        ("above 1 GB", "1", "1.01", "1.01", "1.01", "1.01"),
    ]
    assert tables.classes(result, fp8=True).rows == [("skewed", "1", "2.00", "2.00")]
    alone = tables.classes({"rows": [row_of(SMALL, 5.0, fa3=4.0)]}, fp8=False)
    assert alone.rows == [("up to 64 MB", "1", "-", "-", "0.80", "0.80")], "not under FlashInfer's name"
    assert tables.losses(result).rows == [("8/1", "1", "1 x 2K", "1 MB", "fa3", "5.0", "4.0", "0.80")]
    assert tables.losses(result).markdown().startswith("| heads | page | batch | KV |")


SERVED: dict[str, Any] = {
    "model": "llama-3-8b", "tp": 1, "batch": 16, "context": 2048, "output": 136, "kv_dtype": "auto",
    "tokens_per_s": {}, "attention_ms": {}, "attention_share": None,
}  # fmt: skip


def test_sglangs_steps_give_a_table_and_a_plot(tmp_path: Path) -> None:
    both = SERVED | {"attention_share": 0.214, "ms_per_step": {"fi_prefetch": 8.0, "fa3": 10.0, "flashinfer": 9.0}}
    # Ours in other company is none of the others.
    both["ms_per_step"]["fi_prefetch+window"] = 7.5
    both["attention_ms"] = {"fi_prefetch": 1.5, "fa3": 2.0, "flashinfer": 2.75}
    both["tokens_per_s"] = {"fi_prefetch": 1050.0, "fa3": 900.0, "flashinfer": 1000.0, "fi_prefetch+window": 1100.0}
    alone = SERVED | {"tp": 2, "context": [[65536, 1], [4096, 31]], "kv_dtype": "fp8_e4m3"}
    alone["ms_per_step"] = {"fi_prefetch": 7.126}
    result = {**HEADER, "rows": [both, alone]}
    assert tables.kind_of(result) == "sglang"
    [table] = tables.tables(result)
    assert list(table.columns[3:7]) == ["fi_prefetch", "fa3", "flashinfer", "fi_prefetch+window"]
    assert [list(line) for line in table.rows] == [
        ["llama-3-8b", "bf16", "16 x 2K", "8.00", "10.00", "9.00", "7.50", "1.125", "1.050", "21%", "80%"],
        ["llama-3-8b TP-2", "fp8", "1 x 64K + 31 x 4K", "7.13", "-", "-", "-", "-", "-", "-", "-"],
    ]
    [picture] = report.plot(result, tmp_path)
    assert report.digest(result).encode() in picture.read_bytes()
    with pytest.raises(ValueError, match="no other backend"):
        report.plot({**result, "rows": [alone]}, tmp_path)


def test_what_arrived_of_a_gain_too_small_to_measure_is_not_said() -> None:
    row = SERVED | {"ms_per_step": {"fi_prefetch": 8.0, "fa3": 8.1}}
    assert tables.arrived(row) is None, "attention was not profiled"
    row["attention_ms"] = {"fi_prefetch": 1.5, "fa3": 1.55}
    assert tables.arrived(row) is None, "less than steps vary by"
    row["attention_ms"]["fa3"] = 1.7
    assert tables.arrived(row) == pytest.approx(0.5)


def test_sglangs_long_answers_give_a_table_and_plots(tmp_path: Path) -> None:
    def row(batch: int, output: int, ours: float, **more: Any) -> dict[str, Any]:
        tokens = {"fi_prefetch": ours, "fa3": 900.0, "flashinfer": 1000.0}
        steps = dict.fromkeys(tokens, 10.0)
        return (
            SERVED
            | {"batch": batch, "context": 128, "output": output, "tokens_per_s": tokens, "ms_per_step": steps}
            | more
        )

    result = {**HEADER, "rows": [row(8, 2048, 1100.0), row(32, 2048, 1200.0), row(32, 4096, 1300.0, tp=2)]}
    [table] = tables.tables(result)
    assert [list(line) for line in table.rows] == [
        ["llama-3-8b", "bf16", "8 x 128", "2048", "1100", "900", "1000", "1.100"],
        ["llama-3-8b", "bf16", "32 x 128", "2048", "1200", "900", "1000", "1.200"],
        ["llama-3-8b TP-2", "bf16", "32 x 128", "4096", "1300", "900", "1000", "1.300"],
    ]
    names = {picture.stem for picture in report.plot(result, tmp_path)}
    assert names == {"tokens_a_second", "speedup_over_batch_and_answer"}
    # Of one batch and one length there is nothing to draw a line through.
    assert [picture.stem for picture in report.plot({**result, "rows": result["rows"][-1:]}, tmp_path)] == [
        "tokens_a_second"
    ]
    # Neither overwrites the other where they are compared with another run's.
    labels = {report.row_label(row) for row in (*result["rows"], row(32, 1024, 1.0))}
    assert len(labels) == 4


def test_levers_say_of_which_page_size_they_are() -> None:
    shapes = [Shape(32, 8, page, parse_lens("8x1K")) for page in (1, 16)]
    table = tables.levers({"rows": [{**shape.to_row(), "us": {"off": 9.0}, "levers": {}} for shape in shapes]})
    assert [line[:3] for line in table.rows] == [("32/8", page, "8 x 1K") for page in ("1", "16")]


def test_a_table_has_a_cell_for_everything() -> None:
    rows = [row_of(SMALL, 5.0, fa3=8.0, flashinfer_xqa=None), row_of(SKEWED_FP8, None, fa3=8.0)]
    cells = report.table_rows(rows, ["fa3", "flashinfer_xqa"])
    assert cells[0] == ["8/1", "1", "1x2K", "1 MB", "0.2", "8.0", "-", "5.0", "1.60x", "2.0e-03", "-"]
    assert cells[1][2:] == ["1x64K+31x4K fp8", "376 MB", "87.6", "8.0", "-", "-", "-", "2.0e-03", "-"]


def test_plots_are_drawn(tmp_path: Path) -> None:
    rows = [row_of(shape, shape.kv_bytes / 4e6 + 5, flashinfer_fa2=shape.kv_bytes / 4e6 + 10) for shape in basic_grid()]
    written = report.plot({**HEADER, "rows": rows}, tmp_path / "plots")
    assert len(written) == 1 + 8
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
        assert report.digest({**HEADER, "rows": rows}).encode() in path.read_bytes(), "whose numbers it shows"


def map_row(part: str, sms: int, flight: int | None, gain: float | None, lens: str = "16x2K") -> dict[str, Any]:
    """A row of a map on which the paper's prefetch gains so much."""
    on = paper.PAPERS[part]
    knobs = {"warps_per_block": 1, "blocks_per_sm": 1} if part == "ours" else {"most_resident": 0}
    return {
        **paper._spec(part, Shape(32, 8, 16, parse_lens(lens)), sms, **knobs),
        "sms_used": None if flight is None else sms,
        "resident": None if flight is None else 4,
        "bytes_in_flight": flight,
        "floor_us": 10.0,
        "us": {"off": None if gain is None else 20.0, on: gain and 20.0 / gain},
        "spread": {},
        "missing": {} if gain else {on: "a reason"},
    }


def test_a_map_is_drawn_and_gives_its_tables(tmp_path: Path) -> None:
    rows = [
        map_row("table", 132, 65536, 1.25),
        map_row("table", 80, 131072, 1.25),
        map_row("table", 80, None, None),
        map_row("residency", 132, 16384, 1.5),
        map_row("residency", 80, None, None),
        map_row("ours", 132, 24576, 0.8),
        map_row("flashinfer", 132, 32768, 1.1),
    ]
    result = {**HEADER, "rows": rows}
    assert tables.kind_of(result) == "map"
    papers, ours, theirs, table = tables.tables(result)
    assert [row[3:6] for row in table.rows] == [["20.0", "16.0", "1.25x"]] * 2 + [["-", "-", "-"]]
    assert [list(row) for row in papers.rows] == [
        ["32/8", "16x2K", "132", "4 blocks", "16", "20.0", "50%", "1.50x", "-", "-", "-"]
    ]
    assert [list(row) for row in ours.rows] == [
        ["32/8", "16x2K", "132", "1 x 1 warp", "24", "20.0", "50%", "0.80x", "-", "-"]
    ]
    assert [row[3:5] for row in theirs.rows] == [["4 blocks", "32"]]
    for found in (papers, ours, theirs, table):
        assert {len(row) for row in found.rows} == {len(found.columns)}
    [picture] = report.plot(result, tmp_path)
    assert report.digest(result).encode() in picture.read_bytes()


def test_a_map_is_read_from_its_numbers() -> None:
    rows = [
        map_row("residency", 132, 16384, 1.30),
        map_row("residency", 132, 32768, 1.10),
        map_row("residency", 132, 65536, 1.01),
        map_row("residency", 132, 131072, 0.85),
        map_row("residency", 80, None, None),
        map_row("ours", 132, 24576, 1.05),
        map_row("ours", 132, 98304, 0.91),
    ]
    first, ours, most, every = paper.reading({**HEADER, "rows": rows})
    where = "32/8 heads, 16x2K, 4 blocks and {} KiB in flight an SM"
    assert first == (
        f"the paper's kernel on 132 SMs: of 4 points it gains more than 2% on 2 (up to 1.30x: {where.format(16)}; none "
        f"of them with more than 32 KiB) and costs more than 2% on 1 (down to 0.85x: {where.format(128)})"
    )
    assert ours.startswith("ours on 132 SMs: of 2 points it gains more than 2% on 1 (up to 1.05x: ")
    nowhere = "the 2.15x that the paper reports is nowhere reached: the most is 1.30x, on 132 SMs at "
    assert most == nowhere + where.format(16)
    assert every == "ours over all distances: 0.91x to 1.05x, and `auto` adds no run-ahead"
    rows[0]["us"]["bulk_1"] = 9.0
    assert "the paper reports is reached: the most is 2.22x" in paper.reading({**HEADER, "rows": rows})[2]


def test_a_maps_rows_have_the_same_columns_and_what_tells_most_comes_first() -> None:
    specs = paper.specs()
    assert {tuple(spec) for spec in specs} == {tuple(specs[0])}
    assert len({runner.spec_key(spec) for spec in specs}) == len(specs)
    parts = [spec["part"] for spec in specs]
    assert parts == sorted(parts, key=["residency", "ours", "flashinfer", "table"].index)
    small = Shape(8, 1, 16, parse_lens("16x2K")).kv_bytes
    held_back = [spec["most_resident"] for spec in specs if (spec["part"], spec["kv_bytes"]) == ("residency", small)]
    # 16 requests of 8 heads are not even a block for each of 132 SMs, and up to two for each of 80.
    assert held_back == [0, 1, 0]


class MapContext:
    """What measuring a row of the map asks of a worker, on the CPU."""

    facts = explain.named_gpu("h200")
    floor_us = staticmethod(lambda kv_bytes: 1.0)

    def pool(self, kv_dtype: str) -> KvPool:
        return KvPool(1 << 24, getattr(torch, kv_dtype), torch.device("cpu"))

    def attempt(self, name: str, action: Callable[[], Any]) -> tuple[Any, str | None]:
        try:
            return action(), None
        except Unsupported as error:
            return None, str(error)


@pytest.mark.parametrize("part", paper.VARIANTS)
@pytest.mark.parametrize("sms", [None, 80])
def test_a_row_of_every_part_of_the_map(part: str, sms: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that take 10 us, and 10 more for each step that they prefetch ahead."""
    shape = Shape(32, 8, 16, parse_lens("2x64"))
    knobs = {
        "residency": {"most_resident": 3},
        "table": {"most_resident": 0},
        "ours": {"warps_per_block": 2, "blocks_per_sm": 1},
        "flashinfer": {"pad": 0},
    }[part]
    asked: list[int] = []

    def ours(inputs: DecodeInputs, policy: PrefetchPolicy) -> tuple[Any, Callable[[int], None]]:
        here = device.facts(torch.device("cuda"))
        grid = tune.grid_for(tune.rules_for(here.key), None)
        launch = LaunchFacts(
            here.sm_count * grid.blocks_per_sm, grid.warps, 3, 8192, None, here.l2_bytes, here.sm_count
        )
        plan = resolve(policy, launch, pdl=True)
        return SimpleNamespace(prefetch_plan=plan), lambda i: asked.append(plan.run_ahead)

    def theirs(inputs: DecodeInputs, pad: int, iterations: int) -> tuple[int, Callable[[int], None]]:
        return 400, lambda i: asked.append(iterations)

    def papers(inputs: DecodeInputs, prefetch: str, distance: int, most: int) -> Callable[[int], None]:
        assert most == knobs["most_resident"]
        return lambda i: asked.append(0 if prefetch == "off" else distance)

    monkeypatch.setattr(tuning, "prepare_ours", ours)
    monkeypatch.setattr(paper, "prepare", papers)
    monkeypatch.setattr(flashinfer_run_ahead, "prepare", theirs)
    monkeypatch.setattr(flashinfer_run_ahead, "fitting", lambda *_: 4)
    monkeypatch.setattr(paper, "module", lambda: SimpleNamespace(residency=lambda *_: 3))
    monkeypatch.setattr(paper, "_place", lambda sms, sm_count: (None, sms or sm_count))
    monkeypatch.setattr(paper, "_beside", lambda name, inputs: Timing(7.0, 0.0))
    for module in (paper, grid):
        monkeypatch.setattr(module, "check_error", lambda error: error)
    monkeypatch.setattr(paper, "time_on", lambda stream, call, copies: Timing(10.0 * (1 + asked[-1]), 0.1))
    row = paper.measure(paper._spec(part, shape, sms, **knobs), MapContext())
    distances = [0 if name.startswith("off") else int(name.rpartition("_")[2]) for name in paper.VARIANTS[part]]
    measured = [row["us"][name] for name in paper.VARIANTS[part]]
    assert measured == [10.0 * (1 + distance) for distance in distances] and not row["missing"]
    beside = set(row["us"]) - set(paper.VARIANTS[part])
    assert beside == (set(paper.BESIDE) if (part, sms) == ("table", None) else set())
    blocks = {"residency": 1, "table": 1, "ours": 1, "flashinfer": 4}[part]  # 64 blocks are one an SM at most
    ring = {"ours": 2 * 3 * 8192, "flashinfer": 4 * 8192}.get(part, 4 * 16 * 256)
    assert (row["sms_used"], row["resident"], row["bytes_in_flight"]) == (sms or 132, blocks, ring)
    assert paper.gain(row) == pytest.approx(0.5)
    slowed = {**row, "us": {**row["us"], "off": 99.0}}  # once, by something else
    assert paper.gain(slowed) == pytest.approx(0.5)


def test_flashinfers_kernel_has_two_stages_of_a_blocks_rows_in_flight() -> None:
    """Of 128 threads sixteen share a row of 256 bytes; with one query head a kv head each brings four rows' chunks."""
    grouped, single = Shape(32, 8, 16, parse_lens("16x2K")), Shape(32, 32, 16, parse_lens("16x2K"))
    assert flashinfer_run_ahead.bytes_in_flight(grouped, 4) == 4 * 2 * (128 // 16) * 2 * 256
    assert flashinfer_run_ahead.bytes_in_flight(single, 4) == 4 * 2 * (128 // 16 * 4) * 2 * 256


def test_flashinfers_kernel_on_the_map_is_asked_for_rows_beyond_its_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class Wrapper:
        _plan_info = [33]

        def plan(self, *_: Any, **__: Any) -> None:
            pass

        def run(self, q: Any, cache: Any, *arguments: Any, out: Any) -> None:
            calls.append(arguments)

    monkeypatch.setattr(flashinfer_run_ahead, "wrapper", lambda pad: Wrapper())
    shape = Shape(32, 8, 16, parse_lens("2x64"))
    pool = KvPool(2 * shape.allocated_bytes, torch.bfloat16, torch.device("cpu"))
    inputs = DecodeInputs(shape, pool, 0, copies=1)
    for iterations in (0, 1, 4):
        blocks, call = flashinfer_run_ahead.prepare(inputs, 0, iterations)
        assert blocks == 33 * 8
        call(0)
    assert calls == [(128**-0.5, distance) for distance in (0, (2 + 1) * 8, (2 + 4) * 8)]
    other = Shape(32, 8, 16, parse_lens("2x64"), kv_dtype="float8_e4m3fn")
    pool = KvPool(2 * other.allocated_bytes, torch.float8_e4m3fn, torch.device("cpu"))
    with pytest.raises(Unsupported):
        flashinfer_run_ahead.prepare(DecodeInputs(other, pool, 0, copies=1), 0, 1)


def test_ours_on_the_map_runs_the_rows_grid_on_the_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = explain.named_gpu("h200")
    shape = Shape(32, 8, 16, parse_lens("64x4K"))
    inputs = SimpleNamespace(out=torch.zeros(1), error=lambda out: 0.0, copies=2)

    def prepare(inputs: Any, policy: PrefetchPolicy) -> tuple[Any, Callable[[int], None]]:
        """The wrapper's own way from facts and rules to a plan, with eight warps as the most that fit."""
        here = device.facts(torch.device("cuda"))
        grid = tune.grid_for(tune.rules_for(here.key), shape.kv_bytes)
        launch = LaunchFacts(
            here.sm_count * grid.blocks_per_sm, grid.warps, 3, 8192, shape.kv_bytes, here.l2_bytes, here.sm_count
        )
        return SimpleNamespace(prefetch_plan=resolve(policy, launch, pdl=True)), lambda i: None

    monkeypatch.setattr(tuning, "prepare_ours", prepare)
    monkeypatch.setattr(paper, "time_on", lambda stream, call, copies: Timing(5.0, 0.0))
    row: dict[str, Any] = {"warps_per_block": 2, "blocks_per_sm": 1, "sms_used": 80}
    assert paper._time_ours(row, inputs, None, facts, 4).us == 5.0
    assert (row["resident"], row["bytes_in_flight"]) == (1, 2 * 3 * 8192)
    small = {**row, "warps_per_block": 8}
    with pytest.raises(Unsupported, match="run-ahead became 0"):
        shape = Shape(8, 1, 16, parse_lens("16x512"))
        paper._time_ours(small, inputs, None, facts, 4)


# ---- predictions and explanations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "fp8"), [("grid", False), ("grid_all_heads", True)])
def test_the_prediction_is_near_what_was_measured(name: str, fp8: bool) -> None:
    """Over the uniform batches of the committed files; where new ones are further off, fit the constants anew."""
    rows = json.loads((RESULTS / "h100" / f"{name}.json").read_text())["rows"]
    ratios: dict[str, list[float]] = {"ours": [], "theirs": []}
    for row in rows:
        shape, best = Shape.from_row(row), report.best_baseline(row, only_flashinfer=True)
        if shape.skewed or (shape.kv_dtype != shape.q_dtype) != fp8 or row["fi_prefetch_us"] is None or best is None:
            continue
        found = estimate.estimate(shape, "h100")
        ratios["ours"].append(found.fi_prefetch_us / row["fi_prefetch_us"])
        ratios["theirs"].append(found.flashinfer_us / best[1])
    for values in ratios.values():
        assert len(values) >= 20
        assert report.geometric_mean(values) == pytest.approx(1.0, abs=0.08)
        assert 0.6 < min(values) and max(values) < 1.4


def test_a_prediction_says_when_its_ceiling_is_nominal() -> None:
    assert estimate.estimate(SMALL, "h20").nominal
    assert not estimate.estimate(SMALL, "h100").nominal
    with pytest.raises(ValueError, match="b200"):
        estimate.estimate(SMALL, "b200")


def test_an_explanation_gives_kernel_launch_and_levers() -> None:
    facts = explain.named_gpu("h200")
    found = explain.explain(Shape(32, 8, 1, parse_lens("1x2K")), facts, PrefetchPolicy.named("auto"), "nothing")
    assert found.assumed and found.choice.kernel == "fi_prefetch"
    assert found.levers is not None and found.levers.demand_bytes <= found.levers.budget_bytes
    none = explain.explain(Shape(64, 1, 1, parse_lens("1x2K")), facts, PrefetchPolicy.named("auto"), "nothing")
    assert none.choice.kernel == "flashinfer" and none.levers is None


def test_an_explanation_on_a_gpu_has_the_tuned_grids_least_work(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = explain.named_gpu("h200")
    shape = Shape(8, 1, 1, parse_lens("1x2K"))
    rules = (Rule(None, Grid(8, 1, 16)),)
    monkeypatch.setattr(explain, "rules_for", lambda gpu_key: rules)
    expected = explain.explain(shape, facts, PrefetchPolicy.named("auto"), "nothing")

    class Wrapper:
        kernel_choice, prefetch_plan = expected.choice, expected.levers

        def __init__(self, *_: object, **__: object) -> None: ...

        def plan(self, *_: object, **__: object) -> None: ...

    monkeypatch.setattr(explain.fi_prefetch, "BatchDecodeWithPagedKVCacheWrapper", Wrapper)
    monkeypatch.setattr(explain, "require_gpu", lambda: facts)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **options: zeros(*size, **options))
    found = explain.explain_here(shape, PrefetchPolicy.named("auto"), "nothing")
    assert not found.assumed
    assert found.schedule == expected.schedule and found.schedule.min_tiles_per_warp == 16


def test_the_picture_shows_how_blocks_share_requests() -> None:
    lines = explain.picture(Schedule([1024, 16, 0, 256], num_kv_heads=1, blocks=4, warps=2))
    marks = [line.split("blocks ")[1] for line in lines]
    assert [len(mark) for mark in marks] == [explain.WIDTH, explain.WIDTH // 4, 1, 0]
    assert marks[0][0] == "0" and set("".join(marks)) <= set("0123")
    assert marks[0] == "".join(sorted(marks[0])), "a request's blocks follow each other"
    assert [line.split()[1] for line in lines] == ["0", "3", "1", "2"]


def test_every_policy_of_the_prefetch_rows_has_its_levers_alone() -> None:
    off = PrefetchPolicy.named("off")
    assert POLICIES["off"] == POLICIES["off_again"] == (off, "nothing")
    for name in ("run_ahead", "prologue", "early_load", "streaming_hint"):
        policy, _ = POLICIES[name]
        differing = [field for field in vars(off) if getattr(policy, field) != getattr(off, field)]
        assert differing == [name]
    assert POLICIES["prologue"][0].prologue == PROLOGUE_TILES == 1


# ---- parsers -------------------------------------------------------------------------------------------------------


NCU = (
    "==PROF== Connected to process 1\n"
    '"ID","Process ID","Kernel Name","gpu__time_duration.sum","l1tex__t_sector_hit_rate.pct",'
    '"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",'
    '"smsp__average_warp_latency_per_inst_issued.ratio","dram__bytes_read.sum","lts__t_sector_hit_rate.pct"\n'
    '"","","","ns","%","inst","inst","byte","%"\n'
    '"0","1","at::cuda::spin_kernel(long)","2,000","0","0","0","0","0"\n'
    '"1","1","void fi_prefetch::decode_kernel<x, 1>(y)","12,345","0.5","6","8","33554432","n/a"\n'
    '"2","1","at::cuda::spin_kernel(long)","2,000","0","0","0","0","0"\n'
    '"3","1","flash_fwd","30,000","10","1","2","1000000","20"\n'
    '"4","1","flash_combine","10,000","50","2","2","500000","60"\n'
)


def test_counters_are_read_from_the_profilers_csv() -> None:
    ours, fa3 = map(profile.of_call, profile.parse(NCU))
    assert ours["duration"] == pytest.approx(12.345)
    assert ours["long-scoreboard stalls"] == pytest.approx(75.0)
    assert ours["DRAM bytes read"] == pytest.approx(33.554432)
    assert ours["L2 hit rate"] is None and ours["compute throughput"] is None
    # Of two kernels: what adds up, and means weighed by 30 and 10 us.
    assert fa3["duration"] == pytest.approx(40.0) and fa3["DRAM bytes read"] == pytest.approx(1.5)
    assert fa3["L1 hit rate"] == pytest.approx(20.0) and fa3["L2 hit rate"] == pytest.approx(30.0)
    assert fa3["long-scoreboard stalls"] == pytest.approx(62.5)


@pytest.mark.parametrize(
    "output", ["", "==ERROR== no permission", '"ID","a"\n"","b"\n', '"ID","Kernel Name"\n"",""\n"0","spin_kernel"\n']
)
def test_a_profile_without_a_kernel_is_an_error(output: str) -> None:
    with pytest.raises(profile.ProfileError):
        profile.parse(output)


def test_the_profiler_is_asked_for_every_column() -> None:
    line = profile.command("ncu", Path("request"), Path("answer"))
    metrics = line[line.index("--metrics") + 1].split(",")
    assert {column.metric for column in profile.COLUMNS} <= set(metrics)
    assert line[line.index("--clock-control") + 1] == "none"
    assert line[line.index("--cache-control") + 1] == "all"


def test_every_kernel_is_profiled_without_prefetch_and_with() -> None:
    assert profile.calls_of(("fi_prefetch", "paper", "fa3"), ("auto", "paper")) == [
        ("fi_prefetch off", "fi_prefetch", "off"),
        ("fi_prefetch auto", "fi_prefetch", "auto"),
        ("fi_prefetch paper", "fi_prefetch", "paper"),
        ("paper off", "paper", "off"),
        ("paper on", "paper", "on"),
        ("fa3", "fa3", "off"),
    ]


def test_compiler_reports_are_read() -> None:
    output = (
        "ptxas info    : Compiling entry function '_ZN11fi_prefetch18prefetch_kv_kernelINS_12DecodeTraitsI13__nv_"
        "bfloat16S2_S2_Li128ELi1ELi3ELb0ELb0ELNS_8PositionE0ELb0EEEEEvNS_12DecodeParamsENS_16PrefetchKvParamsE' for "
        "'sm_90a'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 37 registers, used 1 barriers\n"
        "ptxas info    : Compiling entry function '_ZN11fi_prefetch13decode_kernelINS_12DecodeTraitsI13__nv_bfloat16"
        "S2_S2_Li128ELi2ELi3ELb0ELb0ELNS_8PositionE0ELb0EEEEEvNS_12DecodeParamsE' for 'sm_90a'\n"
        "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 220 registers, used 1 barriers\n"
        "ptxas info    : Compiling entry function '_ZN11fi_prefetch13decode_kernelINS_12DecodeTraitsI13__nv_bfloat16"
        "S2_S2_Li128ELi1ELi3ELb0ELb0ELNS_8PositionE1ELb1EEEEEvNS_12DecodeParamsE' for 'sm_90a'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 180 registers, used 1 barriers\n"
    )
    assert demo.parse_resources(output) == [
        demo.KernelResources("prefetch_kv_kernel", 37, 0),
        demo.KernelResources("decode_kernel, 16 rows, more requests", 220, 20),
        demo.KernelResources("decode_kernel, 8 rows, 32 requests", 180, 0),
    ]


def test_junit_reports_are_counted() -> None:
    report_xml = (
        '<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="100">'
        '<testcase name="a"/></testsuite></testsuites>'
    )
    assert gpu_check.parse_junit(report_xml) == gpu_check.Counts(94, 3, 3)
    with pytest.raises(gpu_check.CheckError, match="no testsuite"):
        gpu_check.parse_junit("<testsuites/>")


@pytest.mark.parametrize(
    ("output", "counts"),
    [
        ("random: seed 5\nrandom: 20010 passed, 0 failed, seed 5\n", gpu_check.Counts(20010, 0, 0, seed=5)),
        ("random: 31 passed, 1 failed, seed 0\n", gpu_check.Counts(31, 1, 0, seed=0)),
        ("soak: 9.1 s\nsoak: 1000000 passed, 0 failed\n", gpu_check.Counts(1_000_000, 0, 0)),
    ],
)
def test_scripts_are_counted(output: str, counts: gpu_check.Counts) -> None:
    assert gpu_check.parse_script(output) == counts
    with pytest.raises(gpu_check.CheckError, match="last line is missing"):
        gpu_check.parse_script(output.replace(" passed, ", " and "))


@pytest.mark.parametrize("script", ["RANDOM_SCRIPT", "SOAK_SCRIPT"])
def test_scripts_take_what_they_are_given(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a script is called with, said by one that stands in for it."""
    (tmp_path / "script.py").write_text("import sys\nprint(sys.argv[1:])\nprint('soak: 3 passed, 0 failed')")
    monkeypatch.setattr(gpu_check, script, "script.py")
    said: list[str] = []
    if script == "SOAK_SCRIPT":
        gpu_check.run_soak(tmp_path, said.append, 3)
        assert said[0] == "['--calls', '3']"
    else:
        gpu_check.run_random(tmp_path, said.append, 3)
        gpu_check.run_random(tmp_path, said.append, 3, 0)
        assert said[0] == "['--cases', '3']" and said[2] == "['--cases', '3', '--seed', '0']"


def test_counts_are_not_believed_where_the_process_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "SOAK_SCRIPT", "script.py")
    script = tmp_path / "script.py"
    script.write_text("print('soak: 3 passed, 0 failed'); raise SystemExit(7)")
    with pytest.raises(gpu_check.CheckError, match="all 3 cases passed, and the process ended with status 7"):
        gpu_check.run_soak(tmp_path, [].append, 3)
    script.write_text("print('soak: 3 passed, 1 failed'); raise SystemExit(1)")
    assert gpu_check.run_soak(tmp_path, [].append, 3) == gpu_check.Counts(3, 1, 0)


@pytest.mark.parametrize(
    ("tool", "summary", "failed"),
    [
        ("memcheck", "========= ERROR SUMMARY: 0 errors", 0),
        ("memcheck", "========= ERROR SUMMARY: 4 errors", 5),
        ("synccheck", "========= ERROR SUMMARY: 1 error", 2),
        ("racecheck", "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0),
        ("racecheck", "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", 3),
    ],
)
def test_sanitizer_summaries_are_counted(tool: str, summary: str, failed: int) -> None:
    script_failed = min(failed, 1)
    output = f"FAILED x\nsanitize: 60 passed, {script_failed} failed\n{summary}\n"
    assert gpu_check.parse_sanitizer(tool, output) == gpu_check.Counts(60, failed, 0)


@pytest.mark.parametrize(
    "output",
    [
        "sanitize: 60 passed, 0 failed\n",
        "========= ERROR SUMMARY: 0 errors\n",
        "========= Target application terminated before first instrumented API call\n",
    ],
)
def test_a_sanitizer_that_did_not_get_to_its_end_is_an_error(output: str) -> None:
    with pytest.raises(gpu_check.CheckError, match="missing"):
        gpu_check.parse_sanitizer("memcheck", output)


# ---- tuning --------------------------------------------------------------------------------------------------------


def test_tuning_measures_every_candidate_on_shapes_of_the_size_they_stand_for() -> None:
    specs = tuning.specs()
    assert {(spec["kv_bytes"], tuning.grid_of(spec)) for spec in specs} == {
        (mebibytes * MiB, grid) for mebibytes in tuning.SIZES for grid in CANDIDATES
    }
    assert all(Shape.from_row(spec).kv_bytes == spec["kv_bytes"] for spec in specs)


def test_tuned_rules_follow_the_rows_and_leave_out_grids_not_measured_everywhere() -> None:
    small, large, broken = CANDIDATES[0], CANDIDATES[-1], CANDIDATES[1]
    rows = []
    for spec in tuning.specs():
        grid = tuning.grid_of(spec)
        best = small if spec["kv_bytes"] <= 64 * MiB else large
        if grid == broken and spec["heads_kv"] == 8:
            continue
        rows.append({**spec, "us": 1.0 if grid == broken else 5.0 if grid == best else 9.0})
    found = tuning.rules(rows)
    assert [(rule.kv_bytes, rule.grid) for rule in found] == [(64 * MiB, small), (None, large)]
    with pytest.raises(ValueError):
        tuning.rules([])
