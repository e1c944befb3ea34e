"""Several GPUs in one process: a wrapper, its memory and its launches are its own GPU's, whichever is the current one.

Two GPUs take turns, mostly with the other one current; every answer is held against the reference and FlashInfer's.
Needs two GPUs, of any kind, so it is a part of `fi-prefetch check` by itself; of one kernel module for bf16 and one for
fp8 caches, head_dim 128, and of FlashInfer's fa2 module for each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import flashinfer
import flashinfer.decode
import harness
import pytest
import torch
from harness import (
    DTYPES,
    Case,
    Guarded,
    Inputs,
    assert_close,
    assert_counters_are_zero,
    build,
    plan_options,
    poison_unused,
    same_bits,
)

import fi_prefetch

FIRST, SECOND = GPUS = (torch.device("cuda", 0), torch.device("cuda", 1))
OTHER = {FIRST: SECOND, SECOND: FIRST}
WORKSPACE_BYTES = 32 << 20

# Several blocks share a request: partials and counters are in use.
BF16 = Case(lens=(700, 33, 2100, 1), heads=(32, 8), page=1)
FP8 = Case(lens=(1500, 64, 0, 900), heads=(8, 1), kv="e4m3", page=16)
CASES = (BF16, FP8)
over_cases = pytest.mark.parametrize("case", CASES, ids=str)
over_gpus = pytest.mark.parametrize("device", GPUS, ids=str)


@pytest.fixture(autouse=True)
def two_gpus() -> Iterator[None]:
    """There are two, and the first one is current, before a test and after it."""
    count = torch.cuda.device_count()
    assert count >= 2, f"these tests need two GPUs, PyTorch sees {count}"
    torch.cuda.set_device(FIRST)
    yield
    assert torch.cuda.current_device() == FIRST.index, "the current GPU is another one"


def synchronize() -> None:
    for device in GPUS:
        torch.cuda.synchronize(device)


def at(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within the block this GPU is the current one."""
    return torch.cuda.device(device)


def table_of(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return inputs.indptr, inputs.indices, inputs.last_page_len


class Life:
    """A case on one GPU, with a wrapper that is made, planned and run while the other GPU is current."""

    def __init__(self, case: Case, device: torch.device, graph: bool = False, **options: Any) -> None:
        self.device, self.inputs = device, build(case, device)
        with at(device):
            self.theirs = harness.flashinfer_answer(self.inputs)
        poison_unused(self.inputs)
        self.workspace = Guarded((WORKSPACE_BYTES,), torch.uint8, device)
        if graph:
            sizes = {"indptr": len(case.lens) + 1, "indices": len(self.inputs.indices), "last_page_len": len(case.lens)}
            options["use_cuda_graph"] = True
            for name, size in sizes.items():
                options[f"paged_kv_{name}_buffer"] = torch.zeros(size, dtype=torch.int32, device=device)
        with at(OTHER[device]):
            self.wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(self.workspace.tensor, case.layout, **options)
        self.plan()

    def plan(self, table: tuple[torch.Tensor, ...] | None = None) -> None:
        case = self.inputs.case
        with at(OTHER[self.device]):
            self.wrapper.plan(
                *(table or table_of(self.inputs)),
                *case.heads,
                case.dim,
                case.page,
                **plan_options(case, DTYPES[case.kv]),
            )

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """NaN, for a call to fill."""
        out = torch.full_like(self.inputs.q, torch.nan)
        return out, torch.full(out.shape[:2], torch.nan, dtype=torch.float32, device=self.device)

    def launch(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        with at(OTHER[self.device]):
            self.wrapper.run(self.inputs.q, self.inputs.cache, out=out, lse=lse, return_lse=True)
        assert self.wrapper.kernel_choice.kernel == "fi_prefetch", self.wrapper.kernel_choice.reason

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        results = self.outputs()
        self.launch(*results)
        return results

    def check(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """An answer against the reference and FlashInfer's, and that nothing was left behind."""
        torch.cuda.synchronize(self.device)
        assert_close(self.inputs, out, lse, self.theirs)
        self.workspace.check("the workspace")
        assert_counters_are_zero(self.wrapper)
        assert {counters.device for counters in self.wrapper._counters} == {self.device}


def captured(life: Life, out: torch.Tensor, lse: torch.Tensor) -> Callable[[], None]:
    """Captures a run on the wrapper's GPU, the other one being current inside; returns the replay, made likewise."""
    graph = torch.cuda.CUDAGraph()
    # A stream of its own: PyTorch has one for captures, of the GPU that captured first.
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(life.device)):
        life.launch(out, lse)

    def replay() -> None:
        with at(OTHER[life.device]):
            graph.replay()

    return replay


def other_lengths(life: Life, lens: tuple[int, ...]) -> Inputs:
    """The life's tensors with a page table for other, no greater lengths, over pages that hold numbers."""
    case = dataclasses.replace(life.inputs.case, lens=lens)
    counts = [-(-length // case.page) for length in lens]
    full = [int(n) for n in (life.inputs.indptr[1:] - life.inputs.indptr[:-1]).tolist()]
    assert all(count <= room for count, room in zip(counts, full, strict=True))
    starts = life.inputs.indptr.tolist()
    indices = [life.inputs.indices[start : start + count] for start, count in zip(starts, counts, strict=False)]
    last = [length - (count - 1) * case.page if count else 0 for length, count in zip(lens, counts, strict=True)]
    return dataclasses.replace(
        life.inputs,
        case=case,
        lens=list(lens),
        indptr=torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=life.device),
        indices=torch.cat(indices),
        last_page_len=torch.tensor(last, dtype=torch.int32, device=life.device),
    )


def flashinfers(life: Life, now: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashInfer's answer for `now`; at the life's own lengths that from before there was NaN beyond them."""
    if now.case == life.inputs.case:
        return life.theirs
    with at(life.device):
        return harness.flashinfer_answer(now)


# ---- one after the other -------------------------------------------------------------------------------------------


@over_cases
def test_wrappers_take_turns(case: Case) -> None:
    """Planned and run on one GPU, then on the other, and once more without a synchronisation in between."""
    lives = [Life(case, device) for device in GPUS]
    answers = [[life.run() for life in lives] for _ in range(3)]
    for results in answers:
        for life, result in zip(lives, results, strict=True):
            life.check(*result)
            assert same_bits(result[0], answers[0][GPUS.index(life.device)][0])
    for life in lives:
        facts = torch.cuda.get_device_properties(life.device)
        assert life.wrapper.prefetch_plan.facts.sm_count == facts.multi_processor_count
        assert life.wrapper.prefetch_plan.facts.l2_bytes == facts.L2_cache_size


@over_gpus
@over_cases
def test_nothing_is_allocated_on_the_other_gpu(case: Case, device: torch.device) -> None:
    life = Life(case, device)  # all modules are loaded, on this GPU too
    synchronize()
    before = torch.cuda.memory_allocated(OTHER[device])
    with at(OTHER[device]):
        wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(life.workspace.tensor, case.layout)
        life.wrapper = wrapper
        life.plan()
        out, lse = wrapper.run(life.inputs.q, life.inputs.cache, return_lse=True)
        assert fi_prefetch.prefetch_kv(wrapper, life.inputs.cache)
    assert torch.cuda.memory_allocated(OTHER[device]) == before
    assert out.device == lse.device == wrapper._running.device == device
    life.check(out, lse)


@over_gpus
@over_cases
def test_a_run_goes_to_the_current_stream_of_its_gpu(case: Case, device: torch.device) -> None:
    """The queries arrive late in a stream: what is launched anywhere else finds NaN."""
    life = Life(case, device)
    right = life.inputs.q.clone()
    out, lse = life.outputs()
    side = torch.cuda.Stream(device)
    life.inputs.q.fill_(torch.nan)
    synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        life.inputs.q.copy_(right)
        life.launch(out, lse)
    life.check(out, lse)


@over_gpus
def test_a_page_table_from_anywhere(device: torch.device) -> None:
    """FlashInfer copies a page table from wherever it lies to the wrapper's GPU; so does ours."""
    life = Life(BF16, device)
    for where in (OTHER[device], torch.device("cpu")):
        life.plan(tuple(part.to(where) for part in table_of(life.inputs)))
        assert life.wrapper._paged_kv_indices_buf.device == device
        life.check(*life.run())


# ---- graphs --------------------------------------------------------------------------------------------------------


@over_cases
def test_graphs_of_both_gpus_beside_eager_runs(case: Case) -> None:
    """Replayed over changed page tables with no new plan, while the other GPU runs without a graph."""
    lives = [Life(case, device, graph=True) for device in GPUS]
    eager = [Life(case, device) for device in GPUS]
    results = [life.outputs() for life in lives]
    replays = []
    for life, result in zip(lives, results, strict=True):
        life.check(*life.run())  # loads the kernel before the capture
        counters = list(map(id, life.wrapper._counters))
        replays.append(captured(life, *result))
        assert list(map(id, life.wrapper._counters)) == counters, "the run was not seen to be captured"

    halves = tuple(length // 2 for length in case.lens)
    for lens in (case.lens, halves, tuple(min(length, 1) for length in case.lens), case.lens):
        tables = [other_lengths(life, lens) for life in lives]
        theirs = [flashinfers(life, now) for life, now in zip(lives, tables, strict=True)]
        for life, now, result in zip(lives, tables, results, strict=True):
            life.wrapper._paged_kv_indptr_buf.copy_(now.indptr)
            life.wrapper._paged_kv_indices_buf[: len(now.indices)].copy_(now.indices)
            life.wrapper._paged_kv_last_page_len_buf.copy_(now.last_page_len)
            for tensor in result:
                tensor.fill_(torch.nan)
        beside = []
        for number in (0, 1):
            replays[number]()
            beside.append((1 - number, eager[1 - number].run()))
        synchronize()
        for now, result, answer in zip(tables, results, theirs, strict=True):
            assert_close(now, *result, answer)
        for number, result in beside:
            eager[number].check(*result)
        for life in lives:
            life.workspace.check("the workspace")
            assert_counters_are_zero(life.wrapper)


@over_gpus
def test_a_plan_of_flashinfers_fast_planner(device: torch.device) -> None:
    life = Life(BF16, device, graph=True, use_tensor_cores=True)
    life.check(*life.run())
    case = BF16
    now = other_lengths(life, (300, 33, 1024, 1))
    theirs = flashinfers(life, now)
    buffers = (
        life.wrapper._paged_kv_indptr_buf, life.wrapper._paged_kv_indices_buf, life.wrapper._paged_kv_last_page_len_buf
    )  # fmt: skip
    for buffer, part in zip(buffers, table_of(now), strict=True):
        buffer[: len(part)].copy_(part)
    with at(OTHER[device]):
        flashinfer.decode.fast_decode_plan(
            life.wrapper,
            *buffers,
            *case.heads,
            case.dim,
            case.page,
            q_data_type=DTYPES[case.q],
            kv_data_type=DTYPES[case.kv],
            global_override_indptr_cpu=now.indptr.cpu(),
        )
    result = life.run()
    torch.cuda.synchronize(device)
    assert_close(now, *result, theirs)


# ---- side by side --------------------------------------------------------------------------------------------------


@over_gpus
def test_a_plan_does_not_wait_for_the_other_gpu(device: torch.device) -> None:
    """Nor does anything else: a GPU that is busy for long is still busy when the other one has answered."""
    busy, free = Life(BF16, OTHER[device]), Life(BF16, device)
    free.check(*free.run())
    busy.check(*busy.run())
    out, lse = busy.outputs()
    results = [free.outputs() for _ in range(10)]
    synchronize()
    done = torch.cuda.Event()
    with at(busy.device):
        torch.cuda._sleep(2_000_000_000)
        busy.launch(out, lse)
        done.record()
    for result in results:
        free.plan()
        free.launch(*result)
    torch.cuda.synchronize(device)
    assert not done.query(), "the other GPU was waited for"
    for result in results:
        free.check(*result)
    busy.check(out, lse)


@over_cases
def test_a_thread_for_each_gpu(case: Case) -> None:
    """Each plans, runs and replays on its own GPU as fast as it can; for the second's thread the first is current."""
    lives = [Life(case, device, graph=True) for device in GPUS]
    halves = tuple(length // 2 for length in case.lens)
    work = []
    for life in lives:
        whole = life.run()
        life.check(*whole)
        half = other_lengths(life, halves)
        result = life.outputs()
        replay = captured(life, *result)
        theirs = flashinfers(life, half)
        life.plan(table_of(half))
        expected = life.run()
        torch.cuda.synchronize(life.device)
        assert_close(half, *expected, theirs)
        work.append((life, replay, result, [(table_of(life.inputs), whole), (table_of(half), expected)]))
    problems: list[str] = []
    ready = threading.Barrier(len(GPUS))

    def drive(life: Life, replay: Callable[[], None], result: tuple[torch.Tensor, ...], turns: list[Any]) -> None:
        try:
            case = life.inputs.case
            options = plan_options(case, DTYPES[case.kv])
            ready.wait(timeout=60)
            assert torch.cuda.current_device() == FIRST.index
            for number in range(200):
                table, expected = turns[number % 2]
                life.wrapper.plan(*table, *case.heads, case.dim, case.page, **options)
                out, lse = life.wrapper.run(life.inputs.q, life.inputs.cache, return_lse=True)
                replay()
                same = [same_bits(got, want) for got, want in zip((out, lse), expected, strict=True)]
                same += [same_bits(got, want) for got, want in zip(result, expected, strict=True)]
                if not all(same):
                    problems.append(f"{life.device}, call {number}: other bits: {same}")
        except BaseException as error:  # or the thread would end without a word
            problems.append(f"{life.device}: {error!r}")

    threads = [threading.Thread(target=drive, args=arguments) for arguments in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads), "a thread is stuck"
    assert not problems, problems[:5]
    for life in lives:
        life.workspace.check("the workspace")
        assert_counters_are_zero(life.wrapper)


# ---- prefetch_kv ---------------------------------------------------------------------------------------------------


@over_gpus
@over_cases
def test_a_window_prefetch_of_each_gpu(case: Case, device: torch.device) -> None:
    life = Life(case, device)
    expected = life.run()
    side = torch.cuda.Stream(device)
    for stream in (None, side):
        with at(OTHER[device]):
            assert fi_prefetch.prefetch_kv(life.wrapper, life.inputs.cache, stream=stream)
        out, lse = life.run()
        torch.cuda.synchronize(device)
        assert same_bits(out, expected[0]) and same_bits(lse, expected[1])
        assert int(life.wrapper._running) == 0, "blocks are counted that have ended"
    life.check(*expected)


# ---- what goes to FlashInfer ---------------------------------------------------------------------------------------

FALLBACKS: dict[str, tuple[Case, dict[str, Any], int]] = {
    "32 query heads a kv head": (dataclasses.replace(BF16, heads=(32, 1)), {"use_tensor_cores": True}, 64 << 20),
    "a backend by name": (BF16, {"use_tensor_cores": True, "backend": "fa2"}, 64 << 20),
    "a workspace too small for ours": (Case(), {"use_tensor_cores": True}, 1 << 16),
}


@over_gpus
@pytest.mark.parametrize("name", FALLBACKS)
def test_what_flashinfer_serves(name: str, device: torch.device) -> None:
    """Through our wrapper, with the other GPU current, the bits of FlashInfer's own wrapper with its GPU current."""
    case, constructor, size = FALLBACKS[name]
    inputs = build(case, device)
    options = plan_options(case, DTYPES[case.kv])
    answers = []
    for make, current in (
        (flashinfer.BatchDecodeWithPagedKVCacheWrapper, device),
        (fi_prefetch.BatchDecodeWithPagedKVCacheWrapper, OTHER[device]),
    ):
        with at(current):
            wrapper = make(torch.zeros(size, dtype=torch.uint8, device=device), case.layout, **constructor)
            wrapper.plan(*table_of(inputs), *case.heads, case.dim, case.page, **options)
            answers.append(wrapper.run(inputs.q, inputs.cache, return_lse=True))
    assert wrapper.kernel_choice.kernel == "flashinfer" and wrapper.kernel_choice.reason
    synchronize()
    assert all(same_bits(ours, theirs) for theirs, ours in zip(*answers, strict=True))
    expected, expected_lse = harness.truth(inputs)
    assert harness.relative_error(answers[1][0], expected) < 5e-3
    torch.testing.assert_close(answers[1][1], expected_lse, rtol=0.0, atol=2e-3)


# ---- tensors of the wrong GPU --------------------------------------------------------------------------------------


def wrong_for_run(life: Life, other: torch.device) -> dict[str, tuple[dict[str, Any], str]]:
    """What a run refuses: the changed arguments, and how the error begins."""
    q, (k, v) = life.inputs.q, life.inputs.cache
    out, lse = life.outputs()
    return {
        "q": ({"q": q.to(other)}, "q: "),
        "cache": ({"paged_kv_cache": (k.to(other), v.to(other))}, r"paged_kv_cache \(k_cache"),
        "k": ({"paged_kv_cache": (k.to(other), v)}, r"paged_kv_cache \(k_cache"),
        "v": ({"paged_kv_cache": (k, v.to(other))}, r"paged_kv_cache \(v_cache"),
        "out": ({"out": out.to(other)}, "out: "),
        "lse": ({"lse": lse.to(other), "return_lse": True}, "lse: "),
        "sinks": ({"sinks": torch.zeros(q.shape[1], device=other)}, "sinks: "),
        "v_scale": ({"v_scale": torch.ones(1, device=other)}, "v_scale: "),
    }


@over_gpus
@over_cases
def test_tensors_of_the_wrong_gpu_are_refused_by_name(case: Case, device: torch.device) -> None:
    life, other = Life(case, device, graph=True), OTHER[device]
    expected = life.run()
    life.check(*expected)
    for name, (changes, begins) in wrong_for_run(life, other).items():
        arguments = {"q": life.inputs.q, "paged_kv_cache": life.inputs.cache} | changes
        for current in GPUS:
            with pytest.raises(ValueError, match=rf"^{begins}.*{device}.*got.*{other}"), at(current):
                life.wrapper.run(**arguments)
                pytest.fail(f"{name} was taken")

    wrapper, elsewhere = life.wrapper, torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=other)
    with pytest.raises(ValueError, match=rf"^float_workspace_buffer: expected device {device}, got {other}"):
        wrapper.reset_workspace_buffer(elsewhere, torch.zeros(8 << 20, dtype=torch.uint8, device=device))
    with pytest.raises(ValueError, match=rf"^int_workspace_buffer: expected device {device}, got {other}"):
        wrapper.reset_workspace_buffer(life.workspace.tensor, elsewhere)
    with pytest.raises(ValueError, match=rf"^stream: expected one of {device}, got one of {other}"):
        fi_prefetch.prefetch_kv(wrapper, life.inputs.cache, stream=torch.cuda.Stream(other))
    with pytest.raises(ValueError, match=rf"^paged_kv_cache \(k_cache.*{device}, got {other}"):
        fi_prefetch.prefetch_kv(wrapper, tuple(part.to(other) for part in life.inputs.cache))
    buffers = {
        "paged_kv_indptr_buffer": wrapper._paged_kv_indptr_buf,
        "paged_kv_indices_buffer": wrapper._paged_kv_indices_buf,
        "paged_kv_last_page_len_buffer": wrapper._paged_kv_last_page_len_buf,
    }
    for name, buffer in buffers.items():
        with pytest.raises(ValueError, match=rf"^{name}: expected device {device}, got {other}"):
            fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(
                life.workspace.tensor, use_cuda_graph=True, **buffers | {name: buffer.to(other)}
            )

    again = life.run()
    life.check(*again)
    assert all(same_bits(got, want) for got, want in zip(again, expected, strict=True))


# ---- under other names ---------------------------------------------------------------------------------------------


def test_patched_flashinfer_on_both_gpus() -> None:
    lives = [Life(BF16, device) for device in GPUS]
    with fi_prefetch.patch_flashinfer():
        for life in lives:
            with at(OTHER[life.device]):
                life.wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(life.workspace.tensor, BF16.layout)
            assert isinstance(life.wrapper, fi_prefetch.BatchDecodeWithPagedKVCacheWrapper)
            life.plan()
    answers = [life.run() for life in lives]
    for life, answer in zip(lives, answers, strict=True):
        life.check(*answer)


@over_gpus
def test_a_compiled_model_of_each_gpu(device: torch.device) -> None:
    life = Life(BF16, device)
    expected, lse = life.run()
    wrapper = life.wrapper
    step = torch.compile(lambda q, cache: wrapper.run(q, cache), backend="eager", fullgraph=True)
    with at(OTHER[device]):
        out = step(life.inputs.q, life.inputs.cache)
    assert out.device == device and same_bits(out, expected)
    life.check(out, lse)
