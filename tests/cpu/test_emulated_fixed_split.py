"""The batch-invariant kernel's own source, run lane by lane on the CPU: against attention written from its definition,
and a request's bits in one batch against its bits in another."""

import importlib
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import emulated_decode as emulated
import pytest
import torch
from emulated_decode import WHOLE_REQUEST, Problem, make_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from test_emulated_decode import ANY_BATCH, LENGTHS, assert_right

ROOT = Path(__file__).resolve().parents[2]
BF16, F16, E4M3, E5M2 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2
SPLITS = {"a tile": 1, "two tiles": 2, "five tiles": 5, "whole": WHOLE_REQUEST}
over_splits = pytest.mark.parametrize("split_tiles", SPLITS.values(), ids=SPLITS)


# ---- right ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 3, 5, 16, 64])
@pytest.mark.parametrize("hnd", [False, True], ids=["NHD", "HND"])
def test_page_sizes_and_layouts(page_size, hnd):
    options = dict(heads_q=8, heads_kv=2, page_size=page_size, hnd=hnd, one_tensor=page_size % 2 == 0)
    assert_right(make_problem(LENGTHS, split_tiles=2, **options))


@over_splits
@pytest.mark.parametrize("blocks, warps", [(1, 3), (5, 8), (17, 1)])
def test_every_cut_into_splits_and_warps(split_tiles, blocks, warps):
    """Warps without a tile of a split, blocks without a split, a last split of one tile."""
    for lengths in ([2, 7, 31, 61, 127, 251, 509], [16] * 9, [1], [0, 0], [400, 3, 0, 90]):
        assert_right(make_problem(lengths, heads_q=4, heads_kv=2, split_tiles=split_tiles, warps=warps, blocks=blocks))


@pytest.mark.parametrize("group", range(1, 17))
def test_group_sizes(group):
    assert_right(make_problem([5, 131, 48], heads_q=2 * group, heads_kv=2, warps=3, blocks=4, split_tiles=2))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kv_dtype", [None, E4M3, E5M2], ids=["kv=q", "e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_dtypes_and_head_dims(dtype, kv_dtype, head_dim):
    options = dict(heads_q=8, heads_kv=2, dtype=dtype, kv_dtype=kv_dtype, head_dim=head_dim, page_size=4)
    assert_right(make_problem([300, 20, 1], split_tiles=4, **options))


@pytest.mark.parametrize("length", [16 * 32, 16 * 32 + 1, 16 * 64, 16 * 97 + 5])
def test_more_splits_than_are_merged_in_one_go(length):
    """32, 33, 64 and 98 of them, by all warps of whichever block is done last."""
    assert_right(make_problem([length, 40], heads_q=32, heads_kv=2, split_tiles=1, warps=2, blocks=7))


def test_the_sanitizers_watch_every_way_to_merge(monkeypatch):
    """One split, several, and more than are merged in one go: tests/gpu/sanitize.py says that its cases have them."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "gpu")
    sanitize = importlib.import_module("sanitize")
    at_once = int(re.search(r"kMostPartials = (\d+);", (ROOT / "csrc" / "merge.cuh").read_text())[1])
    counts = {
        math.ceil(math.ceil(length / 16) / math.ceil(case.split * case.page / 16))
        for case, _ in sanitize.cases()
        for length in case.lens
        if case.split > 0
    }
    assert 1 in counts and any(1 < count <= at_once for count in counts) and any(count > at_once for count in counts)


@over_splits
def test_a_page_table_that_shared_memory_holds(split_tiles):
    lengths = [20, 0, 45] * 13 + [0, 300]
    assert_right(make_problem(lengths, heads_q=4, heads_kv=2, split_tiles=split_tiles))


def test_output_of_another_type_and_no_lse():
    problem = make_problem([70, 9], heads_q=4, heads_kv=2, o_dtype=F16, with_lse=False, split_tiles=2)
    o, lse, _ = emulated.run(problem)
    assert lse.isnan().all(), "nobody asked for lse"
    assert (o.double() - emulated.reference(problem)[0]).abs().max() < 0.02


@pytest.mark.parametrize("window_left", [0, 15, 16, 50, 1000])
@pytest.mark.parametrize("q_len", [1, 3])
def test_sliding_window(window_left, q_len):
    options = dict(heads_q=4, heads_kv=2, window_left=window_left, q_len=q_len, page_size=16)
    assert_right(make_problem([300, 20, 7, 101], split_tiles=2, **options))


@pytest.mark.parametrize("q_len", [2, 3, 8])
def test_several_query_tokens_are_causal_from_the_end(q_len):
    """Splits of one tile: the last ones hold nothing that a request's first query token sees."""
    assert_right(make_problem([300, 20, 8, 101, 16], heads_q=4, heads_kv=2, q_len=q_len, split_tiles=1))


def test_scores_are_scaled_capped_and_sunk():
    sinks = torch.tensor([-1.0, 0.5, 3.0, 20.0])
    options = dict(lengths=[300, 20, 7, 0], heads_q=4, heads_kv=2, split_tiles=3)
    assert_right(make_problem(sinks=sinks, v_scale=0.37, sm_scale=0.2, **options))
    assert_right(make_problem(soft_cap=2.0, sm_scale=0.3, **options))
    assert_right(make_problem(sm_scale=-0.3, **options))


@pytest.mark.parametrize("position", ["ROPE_LLAMA", "ALIBI"])
@pytest.mark.parametrize("window_left", [-1, 50])
def test_positions(position, window_left):
    options = dict(heads_q=8, heads_kv=2, page_size=4, q_len=3, position=position, window_left=window_left, warps=3)
    assert_right(make_problem([300, 20, 7, 101], split_tiles=4, **options))


def test_huge_scores_do_not_overflow():
    problem = make_problem([200, 40], heads_q=4, heads_kv=2, split_tiles=2)
    problem.q *= 300
    assert_right(problem)


# ---- the same bits -------------------------------------------------------------------------------------------------


def batch_of(pool: Problem, requests, **changes) -> Problem:
    """The pool's requests of these numbers, in this order, each as often as it is named."""
    pages = [pool.indices[pool.indptr[r] : pool.indptr[r + 1]] for r in requests]
    rows = [torch.arange(r * pool.q_len, (r + 1) * pool.q_len) for r in requests]
    return replace(
        pool,
        q=pool.q[torch.cat(rows)],
        indptr=torch.tensor([0, *map(len, pages)]).cumsum(0).int(),
        indices=torch.cat(pages),
        last_page_len=pool.last_page_len[list(requests)],
        **changes,
    )


def elsewhere(problem: Problem, seed: int) -> Problem:
    """The same contents on other pages, and these in plain order in memory."""
    order = torch.randperm(problem.k.shape[0], generator=torch.Generator().manual_seed(seed))
    k, v = (bits_of(x)[order].view(x.dtype) for x in (problem.k, problem.v))
    return replace(problem, k=k, v=v, indices=torch.argsort(order).int()[problem.indices.long()])


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """As integers: PyTorch does not index every type of float8."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def answers(problem: Problem) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The bits of the output and of the LSE, a request each."""
    o, lse, _ = emulated.run(problem)
    rows = [slice(r * problem.q_len, (r + 1) * problem.q_len) for r in range(len(problem.last_page_len))]
    return [(bits_of(o[own]), bits_of(lse[own])) for own in rows]


def same(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def requests_that_differ(pool: Problem, batches: int = 4) -> int:
    """Over random batches of the pool's requests, on other grids and pages: how many are not what they are alone."""
    numbers = range(len(pool.last_page_len))
    alone = [answers(batch_of(pool, [r]))[0] for r in numbers]
    wrong = 0
    for seed in range(batches):
        rng = random.Random(seed)
        chosen = rng.choices(numbers, k=(2, 5, 33, 12)[seed])
        grid = {"blocks": rng.choice((1, 2, 5, 20)), "seed": rng.randrange(1000), "resident": rng.randint(1, 20)}
        found = answers(elsewhere(batch_of(pool, chosen, **grid), seed))
        wrong += sum(not same(answer, alone[r]) for r, answer in zip(chosen, found, strict=True))
    return wrong


POOL = [700, 0, 1, 16, 257, 90, 33, 5]
INVARIANT = {
    "a tile": {"split_tiles": 1},
    "three tiles": {"split_tiles": 3},
    "whole requests": {"split_tiles": WHOLE_REQUEST},
    "one warp": {"split_tiles": 3, "warps": 1},
    "eight warps": {"split_tiles": 7, "warps": 8},
    "HND": {"split_tiles": 3, "hnd": True},
    "12 rows of 256": {"split_tiles": 2, "head_dim": 256, "heads_q": 24, "warps": 3},
    "half, 64": {"split_tiles": 2, "dtype": F16, "head_dim": 64},
    "e4m3": {"split_tiles": 3, "kv_dtype": E4M3},
    "e5m2, whole requests": {"split_tiles": WHOLE_REQUEST, "dtype": F16, "kv_dtype": E5M2},
    "window": {"split_tiles": 2, "window_left": 50, "q_len": 3, "heads_q": 4},
    "soft cap": {"split_tiles": 3, "soft_cap": 2.0, "heads_q": 4},
    "sinks": {"split_tiles": 3, "sinks": torch.linspace(-1, 3, 8)},
    "rotary": {"split_tiles": 3, "position": "ROPE_LLAMA"},
    "ALiBi": {"split_tiles": 3, "position": "ALIBI"},
}


def pool_of(**options) -> Problem:
    lengths = [max(length, options.get("q_len", 1)) if length else 0 for length in POOL]
    return make_problem(lengths, **{"heads_q": 8, "heads_kv": 2, "page_size": 4} | options)


@pytest.mark.parametrize("options", INVARIANT.values(), ids=INVARIANT)
def test_a_request_gives_the_same_bits_in_every_batch(options):
    assert requests_that_differ(pool_of(**options)) == 0


def test_the_comparison_notices_cuts_that_follow_the_batch():
    """The decode kernel's do."""
    assert requests_that_differ(pool_of()) > 0


def test_neither_the_order_of_execution_nor_the_number_of_blocks_changes_a_bit():
    problem = make_problem([900, 3, 120] * 2, heads_q=8, heads_kv=2, split_tiles=2)
    first = None
    for seed in range(12):
        problem.seed, problem.resident, problem.blocks = seed, 1 + seed % 20, (1, 3, 20, 64)[seed % 4]
        found = answers(problem)
        first = first or found
        assert all(map(same, found, first))


@pytest.mark.parametrize("levers", [(2, 0, 0, 0, 0), (2, 3, 1, 2, 1)], ids=["run-ahead", "all"])
def test_no_lever_changes_a_bit(levers):
    """Nothing is brought into L2, neither before the wait nor after it; the hint has its effect."""
    options = dict(lengths=LENGTHS, heads_q=8, heads_kv=2, page_size=16, split_tiles=4, warps=1)
    off = answers(make_problem(**options))
    problem = make_problem(**options, levers=levers)
    assert all(map(same, answers(problem), off))
    assert len(emulated.emulator.prefetches(emulated.library(problem))) == 0


@pytest.mark.parametrize("lengths", [[130, 5, 0, 77], [37, 0] * 20], ids=["registers", "shared"])
def test_the_table_may_change_until_the_dependencies_end(lengths):
    options = dict(heads_q=8, heads_kv=2, page_size=4, blocks=6, seed=1, split_tiles=2)
    expected = answers(make_problem(lengths, **options))
    problem = make_problem(lengths, **options)
    table = (problem.indptr, problem.indices, problem.last_page_len)
    final = [x.clone() for x in table]
    generator = torch.Generator().manual_seed(2)
    for x in table:
        x.copy_(torch.randint(-(2**31), 2**31 - 1, x.shape, dtype=torch.int64, generator=generator).int())

    def finish():
        for x, was in zip(table, final, strict=True):
            x.copy_(was)

    problem.dependencies_end = finish
    assert all(map(same, answers(problem), expected))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@over_splits
def test_bad_numbers_stay_in_the_request_that_owns_them(bad, split_tiles):
    problem = make_problem([64, 64, 64], heads_q=4, heads_kv=2, page_size=16, blocks=2, split_tiles=split_tiles)
    clean, _, _ = emulated.run(problem)
    for x in (problem.k, problem.v):
        x[problem.indices[problem.indptr[1]]] = bad
    o, _, _ = emulated.run(problem)
    assert torch.equal(o[0], clean[0]) and torch.equal(o[2], clean[2])
    assert o[1].isnan().any()


# ---- page tables that are wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize("split_tiles", [1, 3])
@pytest.mark.parametrize("times", [2, 3, 24])
def test_a_table_that_lists_its_pages_many_times_over_writes_nothing_outside(times, split_tiles):
    """Such a table has more splits than there is room for: those requests that fit are right, the others are left out
    whole. run() looks at the areas around every buffer, and at the counters."""
    problem = make_problem([333], heads_q=8, heads_kv=2, page_size=4, split_tiles=split_tiles)
    alone = answers(problem)[0]
    pages = len(problem.indices)
    over = replace(
        problem,
        q=problem.q.repeat(2 * times - 1, 1, 1),
        indptr=torch.tensor([0, pages] * times, dtype=torch.int32),
        last_page_len=problem.last_page_len.repeat(2 * times - 1),
    )
    found = answers(over)
    whole = [same(answer, alone) for answer in found[::2]]
    assert whole[0], "there is room for the first"
    assert times < 24 or not all(whole), "there is none for the last"
    for (o, lse), right in zip(found[::2], whole, strict=True):
        for kv_head in range(2):
            own = slice(4 * kv_head, 4 * kv_head + 4)
            left_out = bool(lse[:, own].view(torch.float32).isnan().all() and o[:, own].view(BF16).isnan().all())
            assert right or left_out or torch.equal(o[:, own], alone[0][:, own])


def test_no_content_of_the_page_table_reads_outside_the_cache():
    """Garbage in, garbage out; but every access stays inside (the emulator checks each), every counter is zero again,
    and the kernel ends."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(6):
        options = dict(heads_q=8, heads_kv=2, page_size=4, seed=seed, split_tiles=1 + seed % 3)
        problem = make_problem([130, 5, 0, 77] * (1 + 9 * (seed % 2)), **options)
        for x in (problem.indptr, problem.indices, problem.last_page_len):
            x.copy_(torch.randint(-(2**31), 2**31 - 1, x.shape, dtype=torch.int64, generator=generator).int())
        emulated.run(problem)


@settings(max_examples=25)
@given(**ANY_BATCH, split_tiles=st.sampled_from([1, 2, 3, 10, WHOLE_REQUEST]))
def test_any_batch(lengths, page_size, heads_kv, group, blocks, warps, split_tiles, seed):
    problem = make_problem(
        lengths, heads_q=heads_kv * group, heads_kv=heads_kv, page_size=page_size, blocks=blocks, warps=warps,
        seed=seed, split_tiles=split_tiles, levers=(seed % 3, 0, 0, 0, seed % 2),
    )  # fmt: skip
    assert_right(problem)
    chosen = seed % len(lengths)
    assert same(answers(problem)[chosen], answers(batch_of(problem, [chosen]))[0])
