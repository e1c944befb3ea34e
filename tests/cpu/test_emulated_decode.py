"""The decode kernel's own source, run lane by lane on the CPU, against attention written from its definition."""

import math
import os
import subprocess
import sys

import emulated_decode as emulated
import pytest
import torch
from emulated_decode import make_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_prefetch.prefetch import stretch_tiles
from fi_prefetch.schedule import Partition, Schedule, reads_abreast

BF16, F16, E4M3, E5M2 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2


def assert_right(problem):
    o, lse, lib = emulated.run(problem)
    expected, expected_lse = emulated.reference(problem)
    # One rounding of the result, and one of every probability: 2^-8 of the largest for bf16, 2^-11 for half. With fp8
    # KV the probabilities are half, the result is what the query is.
    epsilon = 2.0**-8 if (problem.o_dtype or problem.q.dtype) is BF16 or problem.q.dtype is BF16 else 2.0**-11
    scale = expected.abs().amax(dim=2, keepdim=True).clamp_min(1e-3)
    assert not o.isnan().any(), "an output was not written, or memory behind a request's end was read"
    assert ((o.double() - expected).abs() / scale).max() < 2 * epsilon
    empty = expected_lse.isinf()
    assert (lse[empty] == -math.inf).all()
    # A sum of probabilities that are rounded to 8 bits, or to 11 in half.
    in_half = problem.k.element_size() == 1 or problem.q.dtype is F16
    limit = 1e-3 + emulated.LOG2E * (2.0**-11 if in_half else 2.0**-8)
    assert (lse[~empty].double() - expected_lse[~empty]).abs().max() < limit if (~empty).any() else True
    return o, lse, lib


@pytest.mark.parametrize("kv_dtype", [BF16, E4M3], ids=["bf16", "e4m3"])
def test_rounded_weights_cancel_where_tokens_are_alike(kv_dtype):
    """The mean of equal values is the value, whatever the weights: they are summed as they were rounded."""
    problem = make_problem([3, 40, 133], heads_q=8, heads_kv=2, kv_dtype=kv_dtype, o_dtype=F16)
    value = torch.randn(1, 1, 2, 128, generator=torch.Generator().manual_seed(1)).to(kv_dtype)
    problem.v.copy_(value.expand(problem.v.shape))
    o, _, _ = emulated.run(problem)
    expected = value[0, 0].float().repeat_interleave(4, dim=0)
    assert ((o.float() - expected).abs() <= 2.0**-11 * expected.abs() + 2.0**-24).all()


LENGTHS = [0, 1, 15, 16, 17, 33, 100, 257, 0]


@pytest.mark.parametrize("page_size", [1, 2, 3, 5, 8, 16, 32, 64])
@pytest.mark.parametrize("hnd", [False, True], ids=["NHD", "HND"])
def test_page_sizes_and_layouts(page_size, hnd):
    assert_right(
        make_problem(LENGTHS, heads_q=8, heads_kv=2, page_size=page_size, hnd=hnd, one_tensor=page_size % 2 == 0)
    )


@pytest.mark.parametrize("page_size", [16, 32, 64, 48])
@pytest.mark.parametrize("hnd", [False, True], ids=["NHD", "HND"])
@pytest.mark.parametrize("lengths", [LENGTHS, [77, 0] * 20, [9] * 140], ids=["few", "more", "many"])
def test_both_ways_to_copy_give_the_same_bits(lengths, hnd, page_size):
    """Also in the tail of a last page, which holds NaN: what a whole tile brings of it must not count."""
    options = dict(
        heads_q=8, heads_kv=2, page_size=page_size, hnd=hnd, one_tensor=page_size == 32, levers=(0, 2, 0, 0, 1)
    )
    runs = {}
    for tensor_copies in (False, True):
        problem = make_problem(lengths, **options, tensor_copies=tensor_copies)
        runs[tensor_copies] = emulated.run(problem)[:2]
        counts = emulated.emulator.statistics(emulated.library(problem))
        assert (counts["copies"] > 0, counts["tensor_copies"] > 0) == (not tensor_copies, tensor_copies)
    assert torch.equal(runs[False][0], runs[True][0]) and torch.equal(runs[False][1], runs[True][1])
    assert_right(make_problem(lengths, **options))


@pytest.mark.parametrize("lengths", [LENGTHS, [400, 0, 3] * 12, [9] * 140, [2000]], ids=["few", "more", "many", "one"])
@pytest.mark.parametrize("ready", [1, 3])
@pytest.mark.parametrize("options", [
    {"page_size": 1}, {"page_size": 3, "head_dim": 64}, {"page_size": 16, "tensor_copies": True},
    {"page_size": 32, "hnd": True, "tensor_copies": True}, {"page_size": 1, "heads_q": 32},
    {"page_size": 1, "window_left": 70}, {"page_size": 16, "kv_dtype": torch.float8_e4m3fn},
    {"page_size": 1, "abreast_log2": 1}, {"page_size": 1, "levers": (0, 2, 1, 3, 1)},
], ids=["tokens", "small heads", "tiles", "HND", "many rows", "window", "fp8", "abreast", "early load"])  # fmt: skip
def test_what_was_planned_gives_the_same_bits(lengths, ready, options):
    """Each warp does what it would have worked out by itself, from page numbers that were looked up before."""
    options = {"heads_q": 8, "heads_kv": 2, "levers": (0, 1, 0, ready, 1)} | options
    alone, planned = (emulated.run(make_problem(lengths, plans=plans, **options))[:2] for plans in (False, True))
    assert torch.equal(alone[0], planned[0]) and torch.equal(alone[1], planned[1])


@pytest.mark.parametrize("lengths", [LENGTHS, [400, 0, 3] * 12, [2000]], ids=["few", "more", "one"])
def test_lengths_that_change_after_the_plan_change_nothing(lengths):
    """It was promised that they do not. All blocks still agree on who merges what, and leave the counters at zero."""
    options = {"heads_q": 8, "heads_kv": 2, "page_size": 1, "levers": (0, 1, 0, 3, 1)}
    alone = emulated.run(make_problem(lengths, **options))[:2]
    problem = make_problem(lengths, plans=True, **options)

    def forget_the_lengths():
        problem.indptr.zero_()
        problem.last_page_len.zero_()

    problem.after_plan = forget_the_lengths
    planned = emulated.run(problem)[:2]
    assert torch.equal(alone[0], planned[0]) and torch.equal(alone[1], planned[1])


@pytest.mark.parametrize("page_size", [1, 16], ids=["rows", "tiles"])
@pytest.mark.parametrize("plans, kv_dtype", [(False, None), (True, None), (True, torch.float8_e4m3fn)])
def test_dependents_of_a_planned_call_start_when_all_its_copies_have(plans, kv_dtype, page_size):
    """Else what they prefetch is in the way of these. Of fp8 tiles it makes no difference, and they may start at once;
    so they may where the next call has a schedule to make first."""
    problem = make_problem(
        [700, 40, 90], heads_q=8, heads_kv=2, page_size=page_size, kv_dtype=kv_dtype, levers=(0, 1, 0, 3, 1),
        plans=plans,
    )  # fmt: skip
    counts = emulated.emulator.statistics(emulated.run(problem)[2])
    copies = counts["copies"] + counts["tensor_copies"]
    assert copies > 0 and counts["threads_that_launched"] > 0
    assert counts["copies_after_launch"] == (0 if plans and kv_dtype is None else copies)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("heads_q", [4, 16])
def test_tensor_copies_of_every_width_of_a_row(head_dim, heads_q):
    problem = make_problem(
        [300, 20, 1], heads_q=heads_q, heads_kv=1, head_dim=head_dim, page_size=16, stages=2, warps=2
    )
    assert problem.copies_tensors
    assert_right(problem)


def test_tensor_copies_bring_the_last_page_of_the_cache_and_no_other():
    """A page number beyond the cache stands for its last page, whichever way tiles are copied."""
    answers = []
    for tensor_copies in (False, True):
        problem = make_problem([64, 40], heads_q=4, heads_kv=2, page_size=16, tensor_copies=tensor_copies)
        problem.indices[1], problem.indices[2] = -5, 1 << 30
        problem.k.nan_to_num_(0.5), problem.v.nan_to_num_(0.5)
        answers.append(emulated.run(problem)[0])
    assert torch.equal(answers[0], answers[1])


@pytest.mark.parametrize("group", range(1, 17))
def test_group_sizes(group):
    assert_right(make_problem([5, 131, 48], heads_q=2 * group, heads_kv=2, warps=3, blocks=4))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kv_dtype", [None, E4M3, E5M2], ids=["kv=q", "e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_dtypes_and_head_dims(dtype, kv_dtype, head_dim):
    assert_right(
        make_problem(
            [300, 20, 1], heads_q=8, heads_kv=2, dtype=dtype, kv_dtype=kv_dtype, head_dim=head_dim, page_size=4
        )
    )


def test_output_of_another_type_and_no_lse():
    problem = make_problem([70, 9], heads_q=4, heads_kv=2, o_dtype=F16, with_lse=False)
    o, lse, _ = emulated.run(problem)
    assert lse.isnan().all(), "nobody asked for lse"
    assert (o.double() - emulated.reference(problem)[0]).abs().max() < 0.02


@pytest.mark.parametrize("window_left", [0, 1, 15, 16, 50, 1000])
@pytest.mark.parametrize("q_len", [1, 3])
def test_sliding_window(window_left, q_len):
    assert_right(
        make_problem([300, 20, 7, 101], heads_q=4, heads_kv=2, window_left=window_left, q_len=q_len, page_size=16)
    )


@pytest.mark.parametrize("q_len", [2, 3, 4, 8])
def test_several_query_tokens_are_causal_from_the_end(q_len):
    assert_right(make_problem([300, 20, 8, 101, 16], heads_q=4, heads_kv=2, q_len=q_len))


def test_scores_are_scaled_capped_and_sunk():
    sinks = torch.tensor([-1.0, 0.5, 3.0, 20.0])
    assert_right(make_problem([300, 20, 7, 0], heads_q=4, heads_kv=2, sinks=sinks, v_scale=0.37, sm_scale=0.2))
    assert_right(make_problem([300, 20, 7, 0], heads_q=4, heads_kv=2, soft_cap=2.0, sm_scale=0.3))
    assert_right(make_problem([300, 20, 7, 0], heads_q=4, heads_kv=2, sm_scale=-0.3))


@pytest.mark.parametrize(
    "dtype, kv_dtype, head_dim",
    [(BF16, None, 64), (BF16, None, 128), (BF16, None, 256), (F16, None, 128), (BF16, E4M3, 64), (F16, E5M2, 128),
     (BF16, E5M2, 256)],
)  # fmt: skip
@pytest.mark.parametrize("q_len", [1, 3])
def test_rotary_positions(dtype, kv_dtype, head_dim, q_len):
    assert_right(
        make_problem(
            [300, 20, q_len, 77], heads_q=8, heads_kv=2, dtype=dtype,
            kv_dtype=kv_dtype, head_dim=head_dim, page_size=4, q_len=q_len, position="ROPE_LLAMA", warps=3,
        )
    )  # fmt: skip


@pytest.mark.parametrize("scale, theta", [(1.0, 5e5), (8.0, 1e4), (0.001, 1e4), (1.0, 1.0), (1e6, 1e12)])
def test_rotary_frequencies(scale, theta):
    assert_right(
        make_problem([300, 20, 7], heads_q=4, heads_kv=2, position="ROPE_LLAMA", rope_scale=scale, rope_theta=theta)
    )


def test_rotated_keys_keep_what_bf16_would_round_away():
    """LSE is of weights in half here: its error is the scores'. Keys rounded to bf16 make it 2^-9 of a score or so."""
    problem = make_problem([200, 57, 90], heads_q=8, heads_kv=2, kv_dtype=E4M3, position="ROPE_LLAMA")
    _, lse, _ = emulated.run(problem)
    assert (lse.double() - emulated.reference(problem)[1]).abs().max() < 8e-4


def test_positions_of_long_requests():
    """32K tokens, on few pages over and over: the oldest has as much weight as any."""
    problem = make_problem([32768], heads_q=1, heads_kv=1, head_dim=64, page_size=1024, position="ROPE_LLAMA", warps=8)
    problem.indices = problem.indices[:2].repeat(16)
    _, lse, _ = emulated.run(problem)
    assert (lse.double() - emulated.reference(problem)[1]).abs().max() < 1e-4


@pytest.mark.parametrize("position", ["ROPE_LLAMA", "ALIBI"])
@pytest.mark.parametrize("window_left", [0, 15, 50])
def test_positions_with_a_window_and_sinks(position, window_left):
    sinks = torch.tensor([-1.0, 0.5, 3.0, 20.0])
    assert_right(
        make_problem(
            [300, 20, 7, 101], heads_q=4, heads_kv=2, window_left=window_left, q_len=3, sinks=sinks, position=position
        )
    )


def test_rotary_positions_under_a_soft_cap():
    assert_right(make_problem([300, 20, 7, 0], heads_q=4, heads_kv=2, soft_cap=2.0, position="ROPE_LLAMA"))


@pytest.mark.parametrize("kv_dtype", [None, E4M3], ids=["kv=q", "e4m3"])
@pytest.mark.parametrize("group", [1, 3, 8, 16])
def test_alibi(group, kv_dtype):
    """Heads that are a power of two and heads that are not."""
    assert_right(
        make_problem([5, 131, 0, 48], heads_q=2 * group, heads_kv=2, kv_dtype=kv_dtype, page_size=4, position="ALIBI")
    )


@pytest.mark.parametrize("q_len", [2, 8])
def test_alibi_of_several_query_tokens(q_len):
    assert_right(make_problem([300, 20, 8, 101], heads_q=4, heads_kv=2, q_len=q_len, position="ALIBI"))


@pytest.mark.parametrize("position", ["ROPE_LLAMA", "ALIBI"])
def test_huge_scores_of_positions_do_not_overflow(position):
    problem = make_problem([200, 40], heads_q=4, heads_kv=2, position=position, q_len=2)
    problem.k *= 1e30
    problem.q *= 1e-30
    assert_right(problem)


def test_huge_scores_do_not_overflow():
    problem = make_problem([200, 40], heads_q=4, heads_kv=2)
    problem.q *= 300
    assert_right(problem)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_stay_in_the_request_that_owns_them(bad):
    problem = make_problem([64, 64, 64], heads_q=4, heads_kv=2, page_size=16, blocks=2)
    clean, _, _ = emulated.run(problem)
    problem.k[problem.indices[problem.indptr[1]]] = bad
    problem.v[problem.indices[problem.indptr[1]]] = bad
    o, _, _ = emulated.run(problem)
    assert torch.equal(o[0], clean[0]) and torch.equal(o[2], clean[2])
    assert o[1].isnan().any()


@pytest.mark.parametrize("warps", [1, 2, 3, 8])
@pytest.mark.parametrize("blocks", [1, 2, 17, 40])
def test_every_cut_into_blocks_and_warps(blocks, warps):
    """More warps than tiles: some have nothing."""
    for lengths in ([700], [16] * 9, [1], [0, 0], [400, 3, 0, 90]):
        assert_right(make_problem(lengths, heads_q=4, heads_kv=2, blocks=blocks, warps=warps))


@pytest.mark.parametrize("blocks", [31, 32, 33, 36, 37, 48, 70])
@pytest.mark.parametrize("before", [0, 5])
def test_many_blocks_on_one_request(blocks, before):
    """Beyond 32 the merge has two levels, of about the square root of their number: full chunks and a shorter last one,
    from the first block on or after some that have another request."""
    lengths = [16 * before] * (before > 0) + [16 * (blocks - before)]
    problem = make_problem(lengths, heads_q=2, heads_kv=1, blocks=blocks, warps=1, resident=3)
    for problem.seed in range(3):
        assert_right(problem)


def test_the_order_of_execution_does_not_change_a_bit():
    problem = make_problem([900, 3, 120], heads_q=8, heads_kv=2, blocks=20, warps=4)
    first = None
    for seed in range(12):
        problem.seed, problem.resident = seed, 1 + seed % 20
        o, lse, _ = emulated.run(problem)
        if first is None:
            first = o, lse
        assert torch.equal(o, first[0]) and torch.equal(lse, first[1])


# Where pieces are cut anywhere, where each is of one request and head, and where one of many tiles meets one of few.
MIXED_BATCHES = {
    "many": [30, 0, 500, 17, 64, 3, 300, 5] * 4,
    "whole pieces": [700, 100, 60, 300],
    "one long": [2000, 30, 0, 40, 50] * 2,
}


def of_few_pieces(problem):
    """What one warp of each block left for all rows of the shares of few pieces."""
    _, o, lse, counters, buffers = emulated.launch(problem)
    assert not counters.any()
    rows = 2 * problem.blocks * problem.rows * (problem.q.shape[2] + 4)
    return buffers[2][64:-64][rows:], buffers[2][64:-64][:rows]


@pytest.mark.parametrize("lengths", MIXED_BATCHES.values(), ids=MIXED_BATCHES)
@pytest.mark.parametrize("group", [5, 8, 16])
@pytest.mark.parametrize(
    "options", [{}, {"kv_dtype": E4M3}, {"q_len": 2, "window_left": 400}, {"min_tiles": 2, "blocks": 17}]
)
def test_shares_of_few_pieces(lengths, group, options):
    """One warp of each block meets others for all rows; the bits are those of any other order and of a planned call."""
    heads_q = 2 * (group // options.get("q_len", 1))
    options = {"heads_q": heads_q, "heads_kv": 2, "blocks": 6, "min_tiles": 0, "few_pieces": 100, **options}
    problem = make_problem(lengths, **options)
    assert_right(problem)
    few, by_rows = of_few_pieces(problem)
    assert not few.isnan().all() and by_rows.isnan().all(), "this would not test it"
    runs = [emulated.run(problem)[:2]]
    for seed in range(3):
        problem.seed, problem.resident, problem.plans = seed, 1 + seed, seed > 0
        runs.append(emulated.run(problem)[:2])
    assert all(torch.equal(o, runs[0][0]) and torch.equal(lse, runs[0][1]) for o, lse in runs)


@pytest.mark.parametrize("few_pieces", [0, 3, 1000])
def test_equal_requests_and_many_pieces_meet_row_by_row(few_pieces):
    for lengths in ([500] * 7, [3000, 10, 20]):
        problem = make_problem(lengths, heads_q=8, heads_kv=1, min_tiles=0, few_pieces=few_pieces)
        assert_right(problem)
        few, by_rows = of_few_pieces(problem)
        meets_for_all_rows = len(set(lengths)) > 1 and few_pieces == 1000
        assert few.isnan().all() != meets_for_all_rows
        assert by_rows.isnan().all() == meets_for_all_rows


# Warps, kv heads abreast (log2) and kv heads, on two blocks: long pieces, two workers or more that meet.
ABREAST = [(8, 3, 8), (4, 2, 4), (4, 2, 16), (6, 1, 2), (3, 0, 8)]
LONG_BATCHES = {
    "equal": [500] * 13,
    "unequal": [500, 480, 0, 1, 310, 500] * 7,
    "many": [40] * 70,
    "whole requests": [512] * 16,
}


def abreast_problem(lengths, warps, log2, heads_kv, group=2, surely=True, **options):
    options = {"blocks": 2, "min_tiles": 0, "page_size": 16, **options}
    if surely:
        most = options.get("window_left", 1 << 20) + 32
        tiles = [-(-min(length, most) // 16) for length in lengths]
        work = sum(tiles) * heads_kv, options["blocks"] * warps, max(tiles)
        equal = max(tiles) * len(tiles) == sum(tiles)
        assert reads_abreast(*work, options["page_size"], equal), "this would not test it"
    heads_q = heads_kv * group
    return make_problem(lengths, heads_q=heads_q, heads_kv=heads_kv, warps=warps, abreast_log2=log2, **options)


@pytest.mark.parametrize(("warps", "log2", "heads_kv"), ABREAST)
@pytest.mark.parametrize("lengths", LONG_BATCHES.values(), ids=LONG_BATCHES)
def test_heads_abreast(lengths, warps, log2, heads_kv):
    assert_right(abreast_problem(lengths, warps, log2, heads_kv))


@pytest.mark.parametrize(
    ("warps", "log2", "options", "tiles_a_barrier"),
    [
        (4, 2, {}, 4),
        (4, 2, {"kv_dtype": E4M3}, 8),
        (2, 2, {}, 4),
        (4, 1, {}, 0),  # two pieces in a block
        (6, 1, {}, 0),
        (4, 2, {"tensor_copies": False}, 0),
    ],
)
def test_warps_abreast_keep_step_where_tiles_are_copied_whole(warps, log2, options, tiles_a_barrier):
    """All warps of a block read the same tokens then, at most so many tiles apart."""
    lengths, blocks = [500] * 13, 4
    problem = abreast_problem(lengths, warps, log2, 4, blocks=blocks, **options)
    barriers = emulated.emulator.statistics(emulated.run(problem)[2])["barriers"]
    if tiles_a_barrier == 0:
        assert barriers == 0
        return
    cut = Partition(4 * 32 * len(lengths) >> log2, blocks * warps >> log2)
    pieces = [cut.begin(j + 1) - cut.begin(j) for j in range(cut.workers)]
    a_piece = (1 << log2) // warps  # blocks
    assert barriers >= a_piece * sum(piece // tiles_a_barrier for piece in pieces)
    assert barriers <= a_piece * sum(-(-piece // tiles_a_barrier) + len(lengths) for piece in pieces)


@pytest.mark.parametrize("group", [1, 4, 9, 16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_heads_abreast_of_every_shape(group, head_dim):
    # Shared memory holds two warps of 256 dimensions and 16 rows.
    warps, log2 = (2, 1) if head_dim == 256 else (4, 2)
    assert_right(abreast_problem([500] * 5, warps, log2, 4, group=group, head_dim=head_dim))


@pytest.mark.parametrize(("log2", "times"), [(0, 4), (2, 25)], ids=["one head", "heads abreast"])
@pytest.mark.parametrize(("kv_dtype", "gap"), [(BF16, 1), (E4M3, 2)], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_gaps_between_requests(log2, times, kv_dtype, gap, page_size):
    lengths = [30, 0, 500, 17, 64, 3, 300, 5] * times
    options = {"heads_q": 8, "heads_kv": 4, "blocks": 3, "warps": 4, "min_tiles": 0, "abreast_log2": log2}
    options |= {"page_size": page_size, "kv_dtype": kv_dtype}
    schedule = Schedule(lengths, 4, 3, 4, tile_bytes=8192 // gap, page_size=page_size)
    assert (schedule.partition.gap, schedule.abreast) == (gap, 1 << log2), "this would not test it"
    assert_right(make_problem(lengths, **options))
    unplanned, planned = (emulated.run(make_problem(lengths, plans=plans, **options)) for plans in (False, True))
    assert torch.equal(unplanned[0], planned[0]) and torch.equal(unplanned[1], planned[1])


def test_heads_abreast_with_window_sinks_and_fp8():
    problem = abreast_problem([900, 0, 700, 1200, 800], 4, 2, 8, window_left=600, q_len=3, kv_dtype=E4M3)
    problem.sinks = torch.randn(16)
    assert_right(problem)


def test_the_order_of_execution_does_not_change_a_bit_abreast():
    problem = abreast_problem([500, 480, 310, 500] * 4, 4, 2, 4, blocks=3)
    runs = []
    for seed in range(8):
        problem.seed, problem.resident = seed, 1 + seed % 3
        runs.append(emulated.run(problem)[:2])
    assert all(torch.equal(o, runs[0][0]) and torch.equal(lse, runs[0][1]) for o, lse in runs)


def test_the_table_may_change_until_the_dependencies_end_abreast():
    lengths = [500, 480, 310, 500] * 3
    expected, _, _ = emulated.run(abreast_problem(lengths, 4, 2, 4))
    problem = abreast_problem(lengths, 4, 2, 4, levers=(0, 2, 0, 0, 0))
    final = problem.indices.clone(), problem.last_page_len.clone()
    problem.indices.fill_(-7)
    problem.last_page_len.fill_(1)

    def finish():
        problem.indices.copy_(final[0])
        problem.last_page_len.copy_(final[1])

    problem.dependencies_end = finish
    assert torch.equal(emulated.run(problem)[0], expected)


LEVERS = {
    "run_ahead": (2, 0, 0, 0, 0),
    "prologue": (0, 3, 0, 0, 0),
    "prologue, table final": (0, 3, 0, 1, 0),
    "early load": (0, 0, 1, 2, 0),
    "early load, and a prologue left out": (0, 1, 1, 2, 0),
    "all": (3, 2, 1, 2, 1),
}


@pytest.mark.parametrize("levers", LEVERS.values(), ids=LEVERS)
@pytest.mark.parametrize("hnd", [False, True], ids=["NHD", "HND"])
def test_no_lever_changes_a_bit(levers, hnd):
    options = dict(lengths=LENGTHS, heads_q=8, heads_kv=2, page_size=16, hnd=hnd)
    off, off_lse, _ = emulated.run(make_problem(**options))
    o, lse, lib = emulated.run(make_problem(**options, levers=levers))
    assert torch.equal(o, off) and torch.equal(lse, off_lse)
    if levers[0] or levers[1]:
        assert emulated.emulator.statistics(lib)["prefetches"] > 0


@pytest.mark.parametrize("position", ["NONE", "ROPE_LLAMA"])
@pytest.mark.parametrize("rows", [8, 9])
def test_the_prologue_reaches_as_far_as_the_plan_says(rows, position):
    asked = {}
    for tiles in (0, 1, 2, 3, 4, 100):
        levers = (0, tiles, 0, 0, 0)
        problem = make_problem([300], heads_q=rows, position=position, levers=levers, blocks=1, warps=1)
        asked[tiles] = emulated.emulator.statistics(emulated.run(problem)[2])["prefetches"]
    lines_of_a_tile = 2 * 16 * 2  # K and V, rows, lines of a row
    reach = stretch_tiles(rows, position == "ROPE_LLAMA")
    assert {tiles: (n - asked[0]) / lines_of_a_tile for tiles, n in asked.items()} == {
        tiles: min(tiles, reach) for tiles in asked
    }


@pytest.mark.parametrize("levers", [(0, 0, 0, 0, 0), (0, 2, 0, 0, 0), (2, 3, 0, 0, 1)])
@pytest.mark.parametrize("lengths", [[130, 5, 0, 77], [37, 0] * 20, [9] * 140], ids=["registers", "shared", "too many"])
@pytest.mark.parametrize("what", ["everything", "page numbers", "lengths"])
def test_the_table_may_change_until_the_dependencies_end(levers, lengths, what):
    """The kernel before this one rewrites the page table and the lengths after this one has read them: those of a batch
    that lies in registers, of one in shared memory, and of one with more requests than the block has threads."""
    options = dict(heads_q=8, heads_kv=2, page_size=4, blocks=6, seed=1)
    expected, expected_lse, _ = emulated.run(make_problem(lengths, **options))
    problem = make_problem(lengths, levers=levers, **options)
    table = {"indptr": problem.indptr, "indices": problem.indices, "last_page_len": problem.last_page_len}
    final = {name: x.clone() for name, x in table.items()}
    generator = torch.Generator().manual_seed(2)

    def spoil(x, low, high):
        x.copy_(torch.randint(low, high, x.shape, dtype=torch.int64, generator=generator).int())

    if what != "lengths":
        spoil(problem.indices, -(2**31), 2**31 - 1)
    if what == "everything":
        spoil(problem.indptr, -3, len(problem.indices) + 9)
        spoil(problem.last_page_len, -7, 400)
    if what == "lengths":  # the same pages
        problem.last_page_len.copy_((problem.last_page_len > 1).int())

    def finish():
        for name, x in table.items():
            x.copy_(final[name])

    problem.dependencies_end = finish
    o, lse, _ = emulated.run(problem)
    assert torch.equal(o, expected) and torch.equal(lse, expected_lse)


def test_the_newest_token_may_be_written_until_the_dependencies_end():
    problem = make_problem([130, 5, 16, 77, 1], heads_q=8, heads_kv=2, page_size=4, levers=(0, 2, 1 << 16, 2, 0))
    expected, _, _ = emulated.run(make_problem([130, 5, 16, 77, 1], heads_q=8, heads_kv=2, page_size=4))
    places = []
    for r, length in enumerate([130, 5, 16, 77, 1]):
        page = int(problem.indices[problem.indptr[r] + (length - 1) // 4])
        places.append(
            (
                page,
                (length - 1) % 4,
                problem.k[page, (length - 1) % 4].clone(),
                problem.v[page, (length - 1) % 4].clone(),
            )
        )
        problem.k[page, (length - 1) % 4] = math.nan
        problem.v[page, (length - 1) % 4] = math.nan

    def finish():
        for page, slot, k, v in places:
            problem.k[page, slot] = k
            problem.v[page, slot] = v

    problem.dependencies_end = finish
    assert torch.equal(emulated.run(problem)[0], expected)


@pytest.mark.parametrize("few_pieces", [0, 100])
def test_no_content_of_the_page_table_reads_outside_the_cache(few_pieces):
    """Garbage in, garbage out; but every access stays inside (the emulator checks each) and the kernel ends."""
    generator = torch.Generator().manual_seed(0)
    options = dict(heads_q=8, heads_kv=2, page_size=4, levers=(1, 2, 0, 0, 0), few_pieces=few_pieces)
    for seed in range(8):
        problem = make_problem([130, 5, 0, 77], seed=seed, **options)
        for x in (problem.indptr, problem.indices, problem.last_page_len):
            x.copy_(torch.randint(-(2**31), 2**31 - 1, x.shape, dtype=torch.int64, generator=generator).int())
        problem.seed = seed
        emulated.launch(problem)


@pytest.mark.parametrize("last, few_pieces", [(40, 0), (90, 100)])
@pytest.mark.parametrize("early_load, ready", [(0, 1), (0, 2), (1, 2)])
def test_a_broken_promise_ends_inside_the_cache_all_the_same(early_load, ready, last, few_pieces):
    """The last request grows against a promise, while the kernel for many requests has cut the line without that."""
    options = dict(heads_q=8, heads_kv=2, page_size=16, min_tiles=0, few_pieces=few_pieces)
    for seed in range(4):
        problem = make_problem([40] * 39 + [last], levers=(1, 2, early_load, ready, 0), seed=seed, **options)
        problem.seed = seed

        def grow(problem=problem):
            problem.indptr[1:-1] = 0
            problem.last_page_len.fill_(16)

        problem.dependencies_end = grow
        emulated.launch(problem)


def test_matrices_are_read_without_bank_conflicts():
    for options in ({"head_dim": 64, "kv_dtype": E4M3}, {"head_dim": 64}, {"kv_dtype": E4M3}, {}, {"head_dim": 256}):
        _, _, lib = emulated.run(make_problem([100], **options))
        assert emulated.emulator.statistics(lib)["matrix_load_conflicts"] == 0


@pytest.mark.parametrize("hnd", [False, True], ids=["NHD", "HND"])
def test_window_op_asks_for_the_head_of_every_piece(hnd):
    problem = make_problem([64, 48], heads_q=4, heads_kv=2, page_size=16, hnd=hnd, blocks=2, warps=2)
    tile_rows = 16 * 2  # K and V
    asked = emulated.prefetch_kv(problem, tiles=1)
    assert len(asked) == 2 * 2 * tile_rows * 2  # blocks, warps, two lines a row
    assert all(a["evict_last"] for a in asked)
    everything = emulated.prefetch_kv(problem, tiles=100)
    rows = (64 + 48) * 2 * 2  # tokens, heads, K and V
    assert len(everything) == rows * 2
    assert len({int(a["address"]) for a in everything}) == rows * 2, "each line once"


def test_plain_loads_and_stores_stay_inside_their_buffers():
    """Under AddressSanitizer and UndefinedBehaviorSanitizer, which need a process of their own."""
    program = """
import emulated_decode as emulated
for options in (
    {}, {"abreast_log2": 1, "blocks": 2}, {"window_left": 20, "q_len": 2},
    {"levers": (2, 2, 1 << 16, 2, 1), "page_size": 16, "hnd": True}, {"split_tiles": 2},
):
    for lengths in ([0, 1, 33, 200], [700], [300] * 9):
        problem = emulated.make_problem(lengths, heads_q=6, heads_kv=2, warps=2, **{"blocks": 20, **options})
        o, _, _ = emulated.run(problem)
        assert (o.double() - emulated.reference(problem)[0]).abs().max() < 0.05
print("clean")
"""
    path = os.pathsep.join(sys.path)
    environment = emulated.emulator.sanitizer_environment() | {"PYTHONPATH": path}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0 and result.stdout.strip() == "clean", result.stderr[-4000:]


# What both kernels are tried on.
ANY_BATCH = dict(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=40),
    page_size=st.sampled_from([1, 3, 16]),
    heads_kv=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 4, 7]),
    blocks=st.integers(1, 24),
    warps=st.integers(1, 8),
    seed=st.integers(0, 2**20),
)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 700), min_size=8, max_size=40),
    page_size=st.sampled_from([1, 3, 16]),
    group=st.sampled_from([1, 4]),
    grid=st.sampled_from([(2, 4, 2, 4), (4, 2, 2, 4), (3, 4, 1, 2), (2, 8, 3, 8)]),
    seed=st.integers(0, 2**20),
)
def test_any_batch_abreast(lengths, page_size, group, grid, seed):
    blocks, warps, log2, heads_kv = grid
    assert_right(
        abreast_problem(lengths, warps, log2, heads_kv, group=group, surely=False, blocks=blocks,
                        page_size=page_size, seed=seed, levers=(seed % 3, seed % 4, 0, 0, seed % 2))
    )  # fmt: skip


@settings(max_examples=60)
@given(**ANY_BATCH, min_tiles=st.integers(0, 3), few_pieces=st.sampled_from([0, 2, 24]))
def test_any_batch(lengths, page_size, heads_kv, group, blocks, warps, min_tiles, few_pieces, seed):
    assert_right(
        make_problem(lengths, heads_q=heads_kv * group, heads_kv=heads_kv, page_size=page_size, blocks=blocks,
                     warps=warps, min_tiles=min_tiles, few_pieces=few_pieces, seed=seed,
                     levers=(seed % 3, seed % 4, 0, 0, seed % 2))
    )  # fmt: skip
