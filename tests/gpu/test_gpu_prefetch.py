"""A hint must never change a result: every lever against none, bit for bit, also when the kernel before writes late."""

from __future__ import annotations

import itertools

import late_writes
import pytest
import torch
from harness import (
    DEVICE,
    Case,
    Inputs,
    assert_close,
    assert_counters_are_zero,
    build,
    flashinfer_answer,
    guarded_workspace,
    new_wrapper,
    plan,
    poison_unused,
    run,
    same_bits,
)

import fi_prefetch

POLICIES = (
    "auto",
    "paper",
    "run_ahead=2,prologue=0",
    "run_ahead=8,prologue=0,early_load=1",
    "run_ahead=0,prologue=1,early_load=1",
    "run_ahead=0,prologue=8",
    "run_ahead=3,prologue=3,streaming_hint=1,early_load=1",
    "run_ahead=0,prologue=0,streaming_hint=1",
    "run_ahead=64,prologue=64,l2_budget=1.0",
)
PROMISES = ("nothing", "page_table", "all_but_last_token", "plan")

SHAPES = [
    Case(lens=(2048,)),
    Case(lens=(100, 37, 64), page=1),
    Case(lens=(9000, 5, 5, 5, 0, 17), page=1),
    Case(lens=(300,) * 70, page=3),
    Case(lens=(64,) * 40, heads=(8, 8), layout="HND"),
    Case(lens=(5000, 1), heads=(32, 8), kv="e4m3"),
    Case(lens=(777, 333), dim=64, q="f16", kv="f16", page=64),
    Case(lens=(777, 333), dim=256, page=1),
    Case(lens=(1500, 20), window=200, page=1),
    Case(lens=(600, 31), cap=30.0),
    Case(lens=(600, 31), sinks=True, q_len=2),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("ready", PROMISES)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_the_bits_of_off(case: Case, ready: str, policy: str) -> None:
    inputs = build(case)
    poison_unused(inputs)
    answers = []
    for options in ({"prefetch": "off"}, {"prefetch": policy, "ready": ready}):
        wrapper = new_wrapper(case, **options)
        plan(wrapper, inputs)
        answers.append(run(wrapper, inputs, enable_pdl=True))
        answers.append(run(wrapper, inputs, enable_pdl=False))
    for out, lse in answers[1:]:
        assert same_bits(out, answers[0][0])
        assert same_bits(lse, answers[0][1])


LATE_SHAPES = [
    Case(lens=(100, 37, 64, 17), page=1, storage="one"),
    Case(lens=(2048, 1), page=16, storage="one"),
    Case(lens=(16, 32, 48) * 20, page=3, storage="one"),
    Case(lens=(3000, 5), kv="e4m3", page=1, storage="one"),
    Case(lens=(500, 700), layout="HND", page=64, storage="one"),
    Case(lens=(1000, 1001), dim=256, page=16, storage="one"),
]


def last_token_rows(inputs: Inputs) -> torch.Tensor:
    """Where in the cache's bytes the rows of every request's last token start, K and V: int64 [rows]."""
    case = inputs.case
    page_dim, head_dim = (2, 1) if case.layout == "HND" else (1, 2)
    starts = []
    for end, length in zip(inputs.indptr[1:].tolist(), inputs.lens, strict=True):
        page, slot = int(inputs.indices[end - 1]), (length - 1) % case.page
        for view in (inputs.k, inputs.v):
            token = view.storage_offset() + page * view.stride(0) + slot * view.stride(page_dim)
            starts += [(token + head * view.stride(head_dim)) * view.element_size() for head in range(case.heads[1])]
    return torch.tensor(starts, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("case", LATE_SHAPES, ids=str)
@pytest.mark.parametrize("ready", PROMISES)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_kernel_before_writes_the_last_token(case: Case, ready: str, policy: str) -> None:
    """It lets ours start at once and writes each request's newest K and V 30 us later."""
    inputs = build(case)
    memory = late_writes.flat_bytes(inputs.cache)
    starts = last_token_rows(inputs)
    every_byte = starts[:, None] + torch.arange(case.dim * inputs.k.element_size(), device=DEVICE)
    rows = memory[every_byte]
    expected, expected_lse = off_and_alone(inputs)
    wrapper = new_wrapper(case, prefetch=policy, ready=ready)
    plan(wrapper, inputs)
    out, lse = torch.empty_like(expected), torch.empty_like(expected_lse)
    for _ in range(3):
        memory[every_byte] = 0xFF  # what lies there before the step may be anything
        torch.cuda.synchronize()
        late_writes.write_rows(memory, starts, rows)
        wrapper.run(inputs.q, inputs.cache, out=out, lse=lse, return_lse=True, enable_pdl=True)
        torch.cuda.synchronize()
        assert same_bits(out, expected) and same_bits(lse, expected_lse)
    assert_counters_are_zero(wrapper)


def off_and_alone(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The answer of a run without any lever, with nothing before it."""
    wrapper = new_wrapper(inputs.case, prefetch="off")
    plan(wrapper, inputs)
    return run(wrapper, inputs, enable_pdl=False)


GARBAGE = {
    "zeros": (0, 0, 0),
    "negative": (-1, -7, -2),
    "huge": (2**31 - 1, 2**31 - 1, 2**31 - 1),
    "ascending": (None, 10**6, 3),
}


def fill_with_garbage(inputs: Inputs, kind: str) -> None:
    """Overwrites the page table with numbers that lead nowhere."""
    for table, value in zip((inputs.indptr, inputs.indices, inputs.last_page_len), GARBAGE[kind], strict=True):
        if value is None:
            table.copy_(torch.arange(len(table), dtype=torch.int32, device=DEVICE) * 1000)
        else:
            table.fill_(value)


def in_one_buffer(inputs: Inputs) -> torch.Tensor:
    """Moves the page table into one buffer, so that one kernel can write all of it: int32 [its entries]."""
    tables = (inputs.indptr, inputs.indices, inputs.last_page_len)
    buffer = torch.cat(tables)
    inputs.indptr, inputs.indices, inputs.last_page_len = buffer.split([len(table) for table in tables])
    return buffer


@pytest.mark.parametrize("case", LATE_SHAPES, ids=str)
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("policy", ["auto", "paper", "run_ahead=8,prologue=8", "run_ahead=0,prologue=64,l2_budget=1.0"])
def test_the_kernel_before_rewrites_the_page_table(case: Case, garbage: str, policy: str) -> None:
    """Until then the table leads nowhere: a prefetch over it does no harm, and the work is decided after it."""
    inputs = build(case)
    buffer = in_one_buffer(inputs)
    right = buffer.clone()
    expected, expected_lse = off_and_alone(inputs)
    wrapper = new_wrapper(case, prefetch=policy)
    plan(wrapper, inputs)
    assert wrapper._paged_kv_indptr_buf.data_ptr() == buffer.data_ptr(), "plan() copied the page table"
    out, lse = torch.empty_like(expected), torch.empty_like(expected_lse)
    for _ in range(3):
        fill_with_garbage(inputs, garbage)
        torch.cuda.synchronize()
        late_writes.write_all(buffer, right)
        wrapper.run(inputs.q, inputs.cache, out=out, lse=lse, return_lse=True, enable_pdl=True)
        torch.cuda.synchronize()
        assert same_bits(out, expected) and same_bits(lse, expected_lse)
    guarded_workspace().check("the workspace")
    assert_counters_are_zero(wrapper)


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("budget", [0, 1, 1 << 20, 0.5, 1.0], ids=str)
def test_a_window_prefetch_changes_nothing(case: Case, budget: int | float) -> None:
    """prefetch_kv on a side stream, before and beside the attention it is for."""
    inputs = build(case)
    theirs = flashinfer_answer(inputs)
    poison_unused(inputs)
    wrapper = new_wrapper(case)
    plan(wrapper, inputs)
    out, lse = run(wrapper, inputs)
    side = torch.cuda.Stream()
    for _ in range(3):
        assert fi_prefetch.prefetch_kv(wrapper, inputs.cache, budget=budget, stream=side) == (budget > 0)
        again, lse_again = run(wrapper, inputs)
        assert same_bits(out, again) and same_bits(lse, lse_again)
    torch.cuda.synchronize()
    assert_close(inputs, out, lse, theirs)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("page", [1, 16])
def test_a_window_prefetch_over_a_broken_page_table_does_no_harm(garbage: str, page: int) -> None:
    inputs = build(Case(lens=(1000, 30, 500), page=page))
    buffer = in_one_buffer(inputs)
    right = buffer.clone()
    wrapper = new_wrapper(inputs.case)
    plan(wrapper, inputs)
    out, _ = run(wrapper, inputs)
    fill_with_garbage(inputs, garbage)
    assert fi_prefetch.prefetch_kv(wrapper, inputs.cache)
    torch.cuda.synchronize()
    buffer.copy_(right)
    again, _ = run(wrapper, inputs)
    assert same_bits(out, again)


@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_window_prefetch_is_captured_in_a_graph(side_by_side: bool) -> None:
    inputs = build(Case(lens=(4000, 500), page=1))
    wrapper = new_wrapper(inputs.case)
    plan(wrapper, inputs)
    expected, _ = run(wrapper, inputs)
    fi_prefetch.prefetch_kv(wrapper, inputs.cache)
    out, side = torch.empty_like(expected), torch.cuda.Stream()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fi_prefetch.prefetch_kv(wrapper, inputs.cache, stream=side if side_by_side else None)
        wrapper.run(inputs.q, inputs.cache, out=out)
        if side_by_side:
            torch.cuda.current_stream().wait_stream(side)  # every stream must be joined before a capture ends
    for _ in range(5):
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(out, expected)


@pytest.mark.parametrize(("policy", "ready"), list(itertools.product(("off", "auto"), ("nothing", "page_table"))))
def test_the_plan_says_what_is_on(policy: str, ready: str) -> None:
    inputs = build(Case(lens=(2048,), heads=(32, 8), page=1))
    wrapper = new_wrapper(inputs.case, prefetch=policy, ready=ready)
    plan(wrapper, inputs)
    run(wrapper, inputs, enable_pdl=True)
    levers = wrapper.prefetch_plan
    assert levers.demand_bytes <= levers.budget_bytes
    assert (levers.prologue > 0) == (policy == "auto")
    assert not levers.early_load
