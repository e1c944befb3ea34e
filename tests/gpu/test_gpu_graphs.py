"""CUDA graphs replayed over changed page tables with no new plan, streams side by side, one wrapper planned anew."""

from __future__ import annotations

import functools
import itertools
import random
from typing import Any

import flashinfer.decode
import pytest
import torch
from harness import (
    DEVICE,
    DTYPES,
    WORKSPACE_BYTES,
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
    poison_unused,
    run,
    same_bits,
)

import fi_prefetch

REPLAYS = 6


def graph_wrapper(case: Case, num_indices: int, **options: Any) -> Any:
    """A wrapper over page-table buffers that hold `num_indices` pages."""
    batch = len(case.lens)
    return new_wrapper(
        case,
        use_cuda_graph=True,
        paged_kv_indptr_buffer=torch.zeros(batch + 1, dtype=torch.int32, device=DEVICE),
        paged_kv_indices_buffer=torch.zeros(num_indices, dtype=torch.int32, device=DEVICE),
        paged_kv_last_page_len_buffer=torch.zeros(batch, dtype=torch.int32, device=DEVICE),
        **options,
    )


def load_page_table(wrapper: Any, inputs: Inputs) -> None:
    """What a server does between replays: writes the new page table into the wrapper's buffers, and plans nothing."""
    wrapper._paged_kv_indptr_buf.copy_(inputs.indptr)
    wrapper._paged_kv_indices_buf[: len(inputs.indices)].copy_(inputs.indices)
    wrapper._paged_kv_last_page_len_buf.copy_(inputs.last_page_len)


@pytest.mark.parametrize("kv", ["bf16", "e4m3"])
@pytest.mark.parametrize("page", [1, 3, 16])
@pytest.mark.parametrize("batch", [1, 4, 33])
@pytest.mark.parametrize("first_lens", ["short", "long", "empty"])
def test_a_graph_replays_changed_lengths_with_no_new_plan(kv: str, page: int, batch: int, first_lens: str) -> None:
    rng = random.Random(batch)
    longest = 3000
    first = {"short": (1,), "long": (longest,), "empty": (0,)}[first_lens] * batch
    largest = Case(lens=(longest,) * batch, kv=kv, page=page)
    pool = build(largest)  # one cache for every replay: a captured graph knows its address
    wrapper = graph_wrapper(largest, len(pool.indices))
    out = torch.empty_like(pool.q)
    lse = torch.empty(pool.q.shape[:2], dtype=torch.float32, device=DEVICE)

    plan(wrapper, table_of(pool, first))
    wrapper.run(pool.q, pool.cache, out=out, lse=lse, return_lse=True)  # loads the kernel before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wrapper.run(pool.q, pool.cache, out=out, lse=lse, return_lse=True)
    assert wrapper.kernel_choice.kernel == "fi_prefetch", wrapper.kernel_choice.reason

    for _ in range(REPLAYS):
        lens = tuple(rng.choice((0, 1, 15, 16, 17, 400, rng.randrange(longest), longest)) for _ in range(batch))
        now = table_of(pool, lens)
        load_page_table(wrapper, now)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_close(now, out, lse, flashinfer_answer(now) if any(lens) else None)
        assert_counters_are_zero(wrapper)


def table_of(pool: Inputs, lens: tuple[int, ...]) -> Inputs:
    """`pool`'s tensors with a page table for other lengths, over pages in another order."""
    case = Case(**{**pool.case.__dict__, "lens": lens})
    counts = [-(-length // case.page) for length in lens]
    pages = torch.randperm(pool.k.shape[0], device=DEVICE)[: sum(counts)].to(torch.int32)
    indptr = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=DEVICE)
    last = [length - (count - 1) * case.page if count else 0 for length, count in zip(lens, counts, strict=True)]
    return Inputs(
        case=case,
        q=pool.q,
        k=pool.k,
        v=pool.v,
        cache=pool.cache,
        lens=list(lens),
        indptr=indptr,
        indices=pages,
        last_page_len=torch.tensor(last, dtype=torch.int32, device=DEVICE),
        sinks=pool.sinks,
        unused=pool.unused,
    )


@pytest.mark.parametrize("policy", ["off", "auto", "paper", "run_ahead=4,prologue=4"])
@pytest.mark.parametrize("calls", [2, 8])
def test_calls_back_to_back_in_one_graph_do_not_disturb_each_other(policy: str, calls: int) -> None:
    """Under dependent launch a call starts while the one before it still merges in the same workspace."""
    case = Case(lens=(700, 33, 2100, 1), page=1)
    inputs = [build(Case(**{**case.__dict__, "seed": seed})) for seed in range(calls)]
    wrapper = graph_wrapper(case, len(inputs[0].indices), prefetch=policy)
    plan(wrapper, inputs[0])
    alone = []
    for own in inputs:
        load_page_table(wrapper, own)
        alone.append(wrapper.run(own.q, own.cache).clone())
    load_page_table(wrapper, inputs[0])
    outs = [torch.full_like(own.q, torch.nan) for own in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for own, out in zip(inputs, outs, strict=True):
            load_page_table(wrapper, own)
            wrapper.run(own.q, own.cache, out=out)
            wrapper.run(own.q, own.cache, out=out)
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    for out, expected in zip(outs, alone, strict=True):
        assert same_bits(out, expected)
    assert_counters_are_zero(wrapper)


@pytest.mark.parametrize("kv", ["bf16", "e4m3"])
@pytest.mark.parametrize("streams", [2, 4])
def test_wrappers_on_their_own_streams(kv: str, streams: int) -> None:
    cases = [Case(lens=(500 + 100 * i, 64, 1500), kv=kv, page=1 + 15 * (i % 2), seed=i) for i in range(streams)]
    all_inputs = [build(case) for case in cases]
    wrappers, workspaces = [], []
    for own in all_inputs:
        workspaces.append(Guarded((WORKSPACE_BYTES,), torch.uint8))
        wrappers.append(fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspaces[-1].tensor, own.case.layout))
        plan(wrappers[-1], own)
    alone = [wrapper.run(own.q, own.cache).clone() for wrapper, own in zip(wrappers, all_inputs, strict=True)]
    outs = [[torch.full_like(own.q, torch.nan) for _ in range(30)] for own in all_inputs]
    torch.cuda.synchronize()  # the other streams do not wait for this one
    lanes = [torch.cuda.Stream() for _ in range(streams)]
    for i in range(30):
        for lane, wrapper, own, own_outs in zip(lanes, wrappers, all_inputs, outs, strict=True):
            with torch.cuda.stream(lane):
                wrapper.run(own.q, own.cache, out=own_outs[i])
    torch.cuda.synchronize()
    for wrapper, workspace, expected, own_outs in zip(wrappers, workspaces, alone, outs, strict=True):
        assert all(same_bits(out, expected) for out in own_outs)
        workspace.check("the workspace")
        assert_counters_are_zero(wrapper)


SEQUENCES = {
    "batch grows and shrinks": [Case(lens=(100,) * n) for n in (1, 64, 3, 300, 1)],
    "lengths grow and shrink": [Case(lens=(n, n)) for n in (1, 20000, 16, 5000, 0)],
    "heads change": [Case(heads=heads) for heads in ((8, 2), (8, 8), (32, 8), (8, 1), (8, 2))],
    "dtypes change": [
        Case(q=q, kv=kv) for q, kv in (("bf16", "bf16"), ("bf16", "e4m3"), ("f16", "f16"), ("bf16", "bf16"))
    ],
    "head dims change": [Case(dim=dim) for dim in (64, 256, 128, 64)],
    "page sizes change": [Case(page=page) for page in (1, 64, 3, 16, 1)],
    "windows come and go": [Case(window=window) for window in (-1, 20, 0, -1)],
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_one_wrapper_planned_again_and_again(name: str) -> None:
    cases = SEQUENCES[name]
    wrapper = new_wrapper(cases[0])
    for case in cases:
        inputs = build(case)
        theirs = flashinfer_answer(inputs) if any(case.lens) else None
        poison_unused(inputs)
        plan(wrapper, inputs)
        out, lse = run(wrapper, inputs)
        assert_close(inputs, out, lse, theirs)


@pytest.mark.parametrize("kv", ["bf16", "e4m3"])
@pytest.mark.parametrize("use_tensor_cores", [False, True])
@pytest.mark.parametrize("as_begin_forward", [False, True])
def test_fast_decode_plan(kv: str, use_tensor_cores: bool, as_begin_forward: bool) -> None:
    """FlashInfer's own fast_decode_plan, called and bound as SGLang does, on a graph wrapper."""
    largest = Case(lens=(2000,) * 5, kv=kv, page=1)
    pool = build(largest)
    wrapper = graph_wrapper(largest, len(pool.indices), use_tensor_cores=use_tensor_cores)
    plan(wrapper, pool)
    fast_plan = functools.partial(flashinfer.decode.fast_decode_plan, wrapper)
    if as_begin_forward:
        wrapper.begin_forward = fast_plan
        fast_plan = wrapper.begin_forward
    out = torch.empty_like(pool.q)
    lse = torch.empty(pool.q.shape[:2], dtype=torch.float32, device=DEVICE)
    for lens in ((1, 2, 3, 4, 5), (1999, 0, 700, 16, 1), (64, 64, 64, 64, 64)):
        now = table_of(pool, lens)
        load_page_table(wrapper, now)
        options = plan_options(largest, DTYPES[kv])
        fast_plan(
            wrapper._paged_kv_indptr_buf,
            wrapper._paged_kv_indices_buf,
            wrapper._paged_kv_last_page_len_buf,
            *largest.heads,
            largest.dim,
            largest.page,
            q_data_type=options["q_data_type"],
            kv_data_type=options["kv_data_type"],
            global_override_indptr_cpu=now.indptr.cpu(),
        )
        wrapper.run(pool.q, pool.cache, out=out, lse=lse, return_lse=True)
        assert wrapper.kernel_choice.kernel == "fi_prefetch", wrapper.kernel_choice.reason
        assert_close(now, out, lse, flashinfer_answer(now))
