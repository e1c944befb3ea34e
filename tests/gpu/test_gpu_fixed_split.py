"""The batch-invariant kernel: right, and the same bits whatever else is in the batch.

Of the variants in random_plans.FIXED_SPLIT_COMPILED.
"""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
from harness import (
    DEVICE,
    WHOLE,
    Case,
    Inputs,
    assert_close,
    build,
    check,
    flashinfer_answer,
    new_wrapper,
    plan,
    poison_unused,
    run,
    same_bits,
)

import fi_prefetch

# In pages: after few tokens, after many, and not at all.
SPLITS = (WHOLE, 1, 3, 40)
LENS = (129, 0, 1, 40, 333, 2100)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "case",
    [
        Case(lens=LENS, page=16),
        Case(lens=LENS, page=16, layout="HND", kv="e4m3"),
        Case(lens=LENS, page=5, heads=(28, 4)),
        Case(lens=LENS, page=16, heads=(16, 1), storage="strided"),
        Case(lens=(129, 2, 40, 333, 2100), page=16, q_len=2, sinks=True),
        Case(lens=LENS, page=64, dim=64, order="shared"),
        Case(lens=(20, 70) * 60, page=1, heads=(8, 1)),
        Case(lens=(131072, 5), page=16, heads=(8, 1)),
    ],
    ids=str,
)
def test_fixed_splits(case: Case, split: int) -> None:
    check(dataclasses.replace(case, split=split))


def without_window(inputs: Inputs) -> Inputs:
    """A batch that has the same answers without a window: the tokens in it. For pages of one token, of which FlashInfer
    reads what its modules with a window are not compiled for here."""
    case = inputs.case
    assert case.page == case.q_len == 1
    pages = [inputs.indices[begin:end][-case.window - 1 :] for begin, end in itertools.pairwise(inputs.indptr.tolist())]
    lens = tuple(map(len, pages))
    return dataclasses.replace(
        inputs,
        case=dataclasses.replace(case, lens=lens, window=-1),
        lens=list(lens),
        indptr=torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32, device=DEVICE),
        indices=torch.cat(pages),
    )


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("window", [0, 100])
def test_fixed_splits_under_a_window(window: int, split: int) -> None:
    """They are cut from the window's first tile on."""
    inputs = build(Case(lens=LENS, page=1, q="f16", kv="f16", window=window, split=split))
    theirs = flashinfer_answer(without_window(inputs))
    poison_unused(inputs)
    wrapper = new_wrapper(inputs.case)
    plan(wrapper, inputs)
    assert_close(inputs, *run(wrapper, inputs), theirs)


def alone(inputs: Inputs, request: int) -> Inputs:
    """One request of a batch, by itself."""
    case = inputs.case
    begin, end = (int(inputs.indptr[request + i]) for i in (0, 1))
    return dataclasses.replace(
        inputs,
        case=dataclasses.replace(case, lens=case.lens[request : request + 1]),
        q=inputs.q[request * case.q_len : (request + 1) * case.q_len].contiguous(),
        lens=inputs.lens[request : request + 1],
        indptr=torch.tensor([0, end - begin], dtype=torch.int32, device=DEVICE),
        indices=inputs.indices[begin:end].clone(),
        last_page_len=inputs.last_page_len[request : request + 1].clone(),
    )


@pytest.mark.parametrize("split", (WHOLE, 2, 17, 128))
@pytest.mark.parametrize("batch", (2, 33, 64))
@pytest.mark.parametrize(
    "case",
    [
        Case(page=16),
        Case(page=16, kv="e4m3", heads=(32, 8)),
        Case(page=1, heads=(8, 1)),
        Case(page=16, dim=64),
        Case(page=16, q="f16", kv="f16", window=1000, heads=(24, 2)),
    ],
    ids=str,
)
def test_a_request_has_the_same_bits_alone_and_in_any_batch(case: Case, batch: int, split: int) -> None:
    rng = random.Random(batch * 1000 + split)
    lens = tuple(rng.choice((1, 17, 100, 400, 1500, 6000)) + rng.randrange(16) for _ in range(batch))
    inputs = build(dataclasses.replace(case, lens=lens, split=split))
    wrapper = new_wrapper(inputs.case)
    plan(wrapper, inputs)
    out, lse = run(wrapper, inputs)
    for request in rng.sample(range(batch), min(batch, 5)):
        own = alone(inputs, request)
        plan(wrapper, own)
        own_out, own_lse = run(wrapper, own)
        rows = slice(request * case.q_len, (request + 1) * case.q_len)
        assert same_bits(own_out, out[rows]) and same_bits(own_lse, lse[rows]), f"request {request}"


@pytest.mark.parametrize("split", (WHOLE, 3))
@pytest.mark.parametrize("case", [Case(), Case(kv="e4m3", heads=(24, 2)), Case(dim=64)], ids=str)
def test_a_graph_gives_the_bits_of_a_plain_run_at_other_lengths(case: Case, split: int) -> None:
    case = dataclasses.replace(case, lens=(900, 1, 300, 64), split=split)
    inputs = build(case)
    table = [inputs.indptr.clone(), inputs.indices.clone(), inputs.last_page_len.clone()]
    graph_wrapper = new_wrapper(
        case,
        use_cuda_graph=True,
        paged_kv_indptr_buffer=table[0],
        paged_kv_indices_buffer=table[1],
        paged_kv_last_page_len_buffer=table[2],
    )
    plan(graph_wrapper, inputs)
    out = torch.empty_like(inputs.q)
    graph_wrapper.run(inputs.q, inputs.cache, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph_wrapper.run(inputs.q, inputs.cache, out=out)
    pages_before = inputs.indptr[1:] - inputs.indptr[:-1]
    for cut in (0, 5, 11):
        # The first request ends `cut` pages sooner, and what follows moves up.
        pages = pages_before.clone()
        pages[0] -= cut
        indptr = torch.zeros_like(inputs.indptr)
        indptr[1:] = pages.cumsum(0)
        shorter = dataclasses.replace(inputs, indptr=indptr)
        graph_wrapper._paged_kv_indptr_buf.copy_(indptr)
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        wrapper = new_wrapper(case)
        plan(wrapper, shorter)
        expected, _ = run(wrapper, shorter)
        assert same_bits(out, expected), f"{cut} pages less"


def test_a_page_table_that_lists_its_pages_many_times_over_harms_nobody() -> None:
    """More splits than there is room for: nothing is written outside, and the next call is right."""
    inputs = build(Case(lens=(1000,) * 8, page=16, split=1))
    wrapper = new_wrapper(inputs.case)
    plan(wrapper, inputs)
    expected, _ = run(wrapper, inputs)
    good = inputs.indptr.clone()
    inputs.indptr[1::2] = good[-1]
    inputs.indptr[2::2] = 0
    run(wrapper, inputs)
    inputs.indptr.copy_(good)
    out, _ = run(wrapper, inputs)
    assert same_bits(out, expected)


def test_a_window_prefetch_is_left_out() -> None:
    inputs = build(Case(split=2))
    wrapper = new_wrapper(inputs.case)
    plan(wrapper, inputs)
    assert not fi_prefetch.prefetch_kv(wrapper, inputs.cache)
