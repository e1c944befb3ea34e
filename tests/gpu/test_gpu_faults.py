"""What goes wrong around a call ends in a clear error, and leaves nothing behind for the next call."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import (
    DEVICE,
    DTYPES,
    Case,
    Guarded,
    Inputs,
    assert_close,
    assert_counters_are_zero,
    build,
    flashinfer_answer,
    new_wrapper,
    plan,
    plan_options,
    run,
    same_bits,
    truth,
)
from test_gpu_graphs import graph_wrapper

import fi_prefetch

CASE = Case(lens=(700, 33, 2100, 1), page=1)  # several blocks share a request: partials and counters are in use


def healthy(wrapper, inputs: Inputs, expected: torch.Tensor) -> None:
    """The next call gives the right bits, twice, and leaves the counters zero."""
    for _ in range(2):
        out, _ = run(wrapper, inputs)
        assert same_bits(out, expected)
        assert_counters_are_zero(wrapper)


def planned(case: Case = CASE) -> tuple[object, Inputs, torch.Tensor]:
    inputs = build(case)
    wrapper = new_wrapper(case)
    plan(wrapper, inputs)
    return wrapper, inputs, run(wrapper, inputs)[0]


def test_an_exception_between_plan_and_run() -> None:
    wrapper, inputs, expected = planned()
    plan(wrapper, inputs)
    with pytest.raises(ValueError, match="q: expected"):
        wrapper.run(inputs.q[:1], inputs.cache)
    with pytest.raises(ValueError, match="out: expected"):
        wrapper.run(inputs.q, inputs.cache, out=torch.empty_like(inputs.q)[:, :, :64])
    healthy(wrapper, inputs, expected)
    with pytest.raises(ValueError, match="num_qo_heads"):
        wrapper.plan(inputs.indptr, inputs.indices, inputs.last_page_len, 7, 2, CASE.dim, CASE.page)
    healthy(wrapper, inputs, expected)  # the plan before the one that failed


def test_a_workspace_that_two_wrappers_use_in_turn() -> None:
    cases = (CASE, Case(lens=(5000, 3), kv="e4m3", page=16, heads=(32, 4)))
    workspace = Guarded((24 << 20,), torch.uint8)
    lives = []
    for case in cases:
        _, inputs, expected = planned(case)
        wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace.tensor)
        plan(wrapper, inputs)
        lives.append((wrapper, inputs, expected))
    outs = []
    for number in range(50):
        wrapper, inputs, expected = lives[number % 2]
        outs.append((wrapper.run(inputs.q, inputs.cache), expected))
    assert all(same_bits(out, expected) for out, expected in outs)
    workspace.check("the workspace")
    for wrapper, _, _ in lives:
        assert_counters_are_zero(wrapper)


class Interrupted(Exception):
    pass


def test_a_capture_that_is_not_finished() -> None:
    inputs = build(CASE)
    wrapper = graph_wrapper(CASE, len(inputs.indices))
    plan(wrapper, inputs)
    expected, _ = run(wrapper, inputs)
    out = torch.full_like(inputs.q, torch.nan)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(Interrupted), torch.cuda.graph(graph):
        wrapper.run(inputs.q, inputs.cache, out=out)
        raise Interrupted
    del graph
    torch.cuda.synchronize()
    assert bool(out.isnan().all()), "what was captured and thrown away has run"
    healthy(wrapper, inputs, expected)

    graph = torch.cuda.CUDAGraph()  # and the next capture is a whole one
    with torch.cuda.graph(graph):
        wrapper.run(inputs.q, inputs.cache, out=out)
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(out, expected)
    assert_counters_are_zero(wrapper)


def test_a_first_plan_and_run_that_are_captured() -> None:
    """What a graph zeroes before it counts in it is its own: that graph may never run, or not before the next."""
    _, inputs, expected = planned()  # the kernel is loaded, by another wrapper
    wrapper = graph_wrapper(CASE, len(inputs.indices))
    fi_prefetch.prefetch_kv(planned()[0], inputs.cache)
    torch.cuda.synchronize()
    outs = [torch.full_like(inputs.q, torch.nan) for _ in range(3)]

    def plan_and_run(out: torch.Tensor) -> None:
        plan(wrapper, inputs)
        fi_prefetch.prefetch_kv(wrapper, inputs.cache)
        wrapper.run(inputs.q, inputs.cache, out=out)
        wrapper.run(inputs.q, inputs.cache, out=out)

    with pytest.raises(Interrupted), torch.cuda.graph(torch.cuda.CUDAGraph()):
        plan_and_run(outs[0])
        raise Interrupted
    graphs = []
    for out in outs[1:]:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            plan_and_run(out)
    for number in (1, 0, 1):  # the one that was captured last comes first
        outs[1 + number].fill_(torch.nan)
        graphs[number].replay()
        torch.cuda.synchronize()
        assert same_bits(outs[1 + number], expected)
    assert bool(outs[0].isnan().all()), "what was captured and thrown away has run"
    assert int(wrapper._running) == 0
    healthy(wrapper, inputs, expected)


def test_out_of_memory_while_planning_leaves_the_plan_before_whole() -> None:
    wrapper, inputs, expected = planned()
    # A page table on the host that is longer than the memory that is left: its copy to the GPU fails half-way through.
    indices = torch.zeros(64 << 20, dtype=torch.int32)
    indices[:3] = torch.tensor([0, 1, 2])
    indptr, last = torch.tensor([0, 1, 2, 3, 3], dtype=torch.int32), torch.tensor([1, 1, 1, 0], dtype=torch.int32)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / torch.cuda.mem_get_info()[1] + 1e-4)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            wrapper.plan(indptr, indices, last, *CASE.heads, CASE.dim, CASE.page, **plan_options(CASE, DTYPES[CASE.kv]))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    healthy(wrapper, inputs, expected)
    plan(wrapper, inputs)
    healthy(wrapper, inputs, expected)


DYING = """
import torch
from harness import Case, assert_counters_are_zero, build, plan, run, same_bits
from test_gpu_graphs import graph_wrapper

inputs = build(Case(lens=(700, 33, 2100, 1), page=1))
wrapper = graph_wrapper(inputs.case, len(inputs.indices))
plan(wrapper, inputs)
expected, _ = run(wrapper, inputs)
graph = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(graph):
        wrapper.run(inputs.q, inputs.cache)
        torch.cuda.current_stream().synchronize()  # which no capture allows
    print("capture: no error", flush=True)
except RuntimeError as error:
    print("capture:", type(error).__name__, flush=True)
print("after it:", same_bits(run(wrapper, inputs)[0], expected), flush=True)
assert_counters_are_zero(wrapper)

with torch.cuda.stream(torch.cuda.Stream()):
    torch._assert_async(torch.zeros(1, device="cuda"))
for name, action in (
    ("synchronize", torch.cuda.synchronize),
    ("run", lambda: wrapper.run(inputs.q, inputs.cache)),
    ("plan and run", lambda: (plan(wrapper, inputs), wrapper.run(inputs.q, inputs.cache))),
):
    try:
        action()
        print(f"{name}: no error", flush=True)
    except RuntimeError as error:
        print(f"{name}: {' '.join(str(error).split())}", flush=True)
print("the end", flush=True)
"""


def test_what_a_process_does_not_survive() -> None:
    """A capture that CUDA gives up, after which all is well; then a kernel of another stream that dies, after which
    every call of ours says so, and the process ends by itself."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, "-c", DYING],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    said = dict(line.split(": ", 1) for line in ended.stdout.splitlines() if ": " in line)
    told = ended.stdout + ended.stderr[-2000:]
    assert "Error" in said["capture"] and said["after it"] == "True", told
    for name in ("synchronize", "run", "plan and run"):
        assert "device-side assert" in said[name], told
    assert ended.stdout.rstrip().endswith("the end"), told


# ---- numbers that are too large, or none ---------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["bf16", "e4m3", "e5m2"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("page", [1, 16])
def test_bad_numbers_stay_in_the_request_that_owns_them(kv: str, bad: float, page: int) -> None:
    """Also where warps and blocks merge what they share, and where a block has parts of several requests."""
    value = torch.tensor(math.nan if kv == "e4m3" else bad).to(DTYPES[kv])  # e4m3 has no infinity
    lens = (300, 70, 5000, 3, 120, 33)
    inputs = build(Case(lens=lens, kv=kv, page=page, q="bf16"))
    wrapper = new_wrapper(inputs.case)
    plan(wrapper, inputs)
    expected, expected_lse = run(wrapper, inputs)
    for owner in (1, 2, 4):
        begin = int(inputs.indptr[owner])
        slots = [(int(inputs.indices[begin + token // page]), token % page) for token in (0, lens[owner] - 1)]
        for view in (inputs.k, inputs.v):
            raw = view.view(torch.uint8 if view.element_size() == 1 else torch.int16)
            kept = [raw[slot].clone() for slot in slots]
            for slot in slots:
                raw[slot] = value.view(raw.dtype).to(DEVICE)
            out, lse = run(wrapper, inputs)
            others = [request for request in range(len(lens)) if request != owner]
            assert same_bits(out[others], expected[others])
            assert same_bits(lse[others], expected_lse[others])
            assert not bool(torch.isfinite(out[owner].float()).all()), "the owner does not show it"
            for slot, before in zip(slots, kept, strict=True):
                raw[slot] = before
    out, _ = run(wrapper, inputs)
    assert same_bits(out, expected), "what was in a call is still there in the next"


@pytest.mark.parametrize("kv", ["bf16", "e4m3"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_logits_of_ten_thousand(kv: str, sign: float) -> None:
    """Logits of +-1e4, a few apart: what is left is the softmax of their differences."""
    inputs = build(Case(lens=(700, 33, 5000), kv=kv, page=16, sm_scale=1.0))
    # k = 64 in all dimensions but the last, q = sign * 1e4 / (64 * 127): the last alone tells tokens apart.
    inputs.k.copy_(torch.full_like(inputs.k, 64.0, dtype=torch.float32).to(inputs.k.dtype))
    steps = torch.randint(0, 4, inputs.k.shape[:-1], device=DEVICE, dtype=torch.float32)
    last = inputs.k.view(torch.uint8 if inputs.k.element_size() == 1 else torch.int16)
    last[..., -1] = steps.to(inputs.k.dtype).view(last.dtype)
    inputs.q.fill_(sign * 1.234375)  # exactly a bf16: 1.234375 * 64 * 127 = 10,033
    inputs.q[..., -1] = 1.0
    wrapper = new_wrapper(inputs.case)
    plan(wrapper, inputs)
    out, lse = run(wrapper, inputs)
    expected, expected_lse = truth(inputs)
    assert float(lse.abs().min()) > 1e4
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=0.0)
    # float32 knows a number of ten thousand to 1/1024: weights are that far off.
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=1e-2)


# ---- large caches --------------------------------------------------------------------------------------------------

GIB = 1 << 30


def free_bytes() -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_cache_of_most_of_the_memory(layout: str) -> None:
    """Pages at the far end of the largest cache that fits: offsets beyond 2^31 and 2^32 elements and 2^35 bytes."""
    page, heads, dim = 16, 8, 128
    page_bytes = 2 * page * heads * dim * 2
    pages = (free_bytes() - 12 * GIB) // page_bytes  # the rest for whoever else works on this GPU
    if pages * page_bytes < 10 * GIB:
        pytest.skip(f"{free_bytes() / GIB:.1f} GiB are free, 22 are needed to pass 2^32 elements")
    shape = (pages, 2, page, heads, dim) if layout == "NHD" else (pages, 2, heads, page, dim)
    cache = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    try:
        elements = cache.numel()
        # In each page that is held, and around the marks where numbers of 31, 32 and 33 bits end.
        marks = [m // (page_bytes // 2) for m in (1 << 31, 1 << 32, 1 << 33, 1 << 34) if m < elements]
        wanted = sorted({p + d for p in [1, *marks, pages - 2] for d in (-1, 0, 1) if 0 <= p + d < pages})
        small = torch.randn(len(wanted), *shape[1:], device=DEVICE).to(torch.bfloat16)
        where = torch.tensor(wanted, device=DEVICE)
        for number, page_contents in zip(wanted, small, strict=True):
            cache[number].copy_(page_contents)
        indptr = torch.tensor([0, len(wanted) // 2, len(wanted)], dtype=torch.int32, device=DEVICE)
        last = torch.tensor([16, 5], dtype=torch.int32, device=DEVICE)
        q = torch.randn(2, 32, dim, device=DEVICE).to(torch.bfloat16)
        answers = []
        for stored, numbers in ((small, torch.arange(len(wanted), device=DEVICE)), (cache, where)):
            workspace = torch.empty(32 << 20, dtype=torch.uint8, device=DEVICE)
            wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace, layout)
            wrapper.plan(indptr, numbers.int(), last, 32, heads, dim, page, q_data_type=torch.bfloat16)
            answers.append(wrapper.run(q, stored))
            assert wrapper.kernel_choice.kernel == "fi_prefetch", wrapper.kernel_choice.reason
        # The same pages in a small cache, which the rest of the suite vouches for.
        assert same_bits(*answers)
    finally:
        del cache
        torch.cuda.empty_cache()


@pytest.mark.parametrize(("kv", "page"), [("bf16", 1), ("e4m3", 16)])
def test_a_million_tokens(kv: str, page: int) -> None:
    inputs = build(Case(lens=(1 << 20, 17), heads=(8, 1), kv=kv, page=page, order="sequential"))
    wrapper = new_wrapper(inputs.case)
    plan(wrapper, inputs)
    out, lse = run(wrapper, inputs)
    assert_close(inputs, out, lse, flashinfer_answer(inputs))


# ---- several GPUs, compiled models ---------------------------------------------------------------------------------


def test_the_wrappers_gpu_need_not_be_the_current_one() -> None:
    """On every GPU there is, with another one current where there is more than one."""
    inputs = build(CASE)
    wrapper = new_wrapper(CASE)
    plan(wrapper, inputs)
    expected, _ = run(wrapper, inputs)
    count = torch.cuda.device_count()
    for index in range(count):
        device = torch.device("cuda", index)
        moved = {name: getattr(inputs, name).to(device) for name in ("q", "indptr", "indices", "last_page_len")}
        cache = tuple(part.to(device) for part in inputs.cache)
        with torch.cuda.device((index + 1) % count):
            own = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(
                torch.empty(32 << 20, dtype=torch.uint8, device=device)
            )
            table = (moved["indptr"], moved["indices"], moved["last_page_len"])
            own.plan(*table, *CASE.heads, CASE.dim, CASE.page, **plan_options(CASE, DTYPES[CASE.kv]))
            out = own.run(moved["q"], cache)
            assert torch.cuda.current_device() == (index + 1) % count
        assert out.device == device
        assert same_bits(out.to(DEVICE), expected)


def test_a_compiled_model_is_traced_once() -> None:
    wrapper, inputs, expected = planned()
    traces = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]):
        traces.append(graph)
        return graph.forward

    step = torch.compile(lambda q, cache: 2 * wrapper.run(q, cache), backend=backend, fullgraph=True)
    for _ in range(3):
        assert same_bits(step(inputs.q, inputs.cache), 2 * expected)
        plan(wrapper, inputs)
    assert len(traces) == 1
