"""The schedule's arithmetic: complete, even, and the same on the host as in the kernel."""

from collections import Counter

import emulated_decode as emulated
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fi_prefetch.schedule import Partition, Schedule, active_blocks, request_tiles, tiles_of_a_block


@given(tiles=st.integers(1, 2**32 - 1), workers=st.integers(1, 8192))
def test_pieces_cover_the_line_evenly(tiles, workers):
    partition = Partition(tiles, workers)
    assert partition.begin(0) == 0 and partition.begin(workers) == tiles
    # Shares are rounded up by less than 2^-32 of the line; the last worker has what they leave.
    slack = 1 + tiles * workers // 2**32
    for j in {0, 1, workers // 3, workers // 2, workers - 1} & set(range(workers)):
        assert abs(partition.begin(j + 1) - partition.begin(j) - tiles / workers) <= slack


@given(tiles=st.integers(1, 10**6), workers=st.integers(1, 1056))
def test_pieces_differ_by_one_tile(tiles, workers):
    partition = Partition(tiles, workers)
    for j in {0, 1, workers // 3, workers // 2, workers - 2} & set(range(workers - 1)):
        assert tiles // workers <= partition.begin(j + 1) - partition.begin(j) <= -(-tiles // workers)


@given(
    tiles=st.integers(1, 2**31),
    blocks=st.integers(1, 1024),
    warps=st.integers(1, 8),
    min_tiles=st.integers(1, 64),
    equal=st.integers(0, 2**31),
)
def test_every_working_block_has_a_tile(tiles, blocks, warps, min_tiles, equal):
    working = active_blocks(tiles, tiles_of_a_block(tiles, blocks, warps, min_tiles, min(equal, tiles)))
    assert working <= blocks
    partition = Partition(tiles, working * warps)
    for block in {0, working // 2, working - 1}:
        assert partition.begin((block + 1) * warps) > partition.begin(block * warps)


def test_a_block_has_whole_requests_where_that_costs_two_tiles_a_warp_at_most():
    assert Schedule([512] * 64, 1, blocks=132, warps=8).blocks_of(0) == 1
    assert Schedule([528] * 60 + [300] * 4, 1, blocks=132, warps=8).blocks_of(4) > 1, "they differ"
    assert Schedule([1024] * 32, 1, blocks=132, warps=8).blocks_of(0) > 1, "eight tiles a warp, not two"


@pytest.mark.parametrize(
    "length, q_len, window_left, tiles",
    [(0, 1, -1, 0), (1, 1, -1, 1), (16, 1, -1, 1), (17, 1, -1, 2), (100, 1, 15, 2), (112, 1, 15, 1), (112, 2, 15, 2)],
)
def test_request_tiles(length, q_len, window_left, tiles):
    assert request_tiles(length, q_len, window_left) == tiles


@given(
    lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=20),
    heads=st.integers(1, 4),
    blocks=st.integers(1, 30),
    warps=st.integers(1, 8),
)
def test_segments_hold_every_tile_once_in_order(lengths, heads, blocks, warps):
    schedule = Schedule(lengths, heads, blocks, warps)
    seen = [(s.request, s.head, t) for s in schedule.segments for t in range(s.first_tile, s.end_tile)]
    expected = [(r, h, t) for r, n in enumerate(schedule.tiles) for h in range(heads) for t in range(n)]
    assert seen == sorted(expected, key=lambda place: place[1] % schedule.abreast)
    per_warp: dict[tuple[int, int], int] = {}
    for s in schedule.segments:
        per_warp[s.block, s.warp] = per_warp.get((s.block, s.warp), 0) + s.end_tile - s.first_tile
    assert max(per_warp.values(), default=0) == schedule.longest_piece


def cuts_as(schedule, problem):
    """Whether the kernel cuts as the schedule says: the window op asks for the first tile of every warp's piece."""
    asked = {int(a["address"]) for a in emulated.prefetch_kv(problem, tiles=1)}
    page_size = problem.k.shape[1]
    expected = set()
    first_of_piece = {}
    for s in schedule.segments:
        first_of_piece.setdefault((s.block, s.warp), s)
    for s in first_of_piece.values():
        length = schedule.lengths[s.request]
        first_token = 0
        if schedule.window_left >= 0:
            first_token = max(length - 1 - schedule.window_left, 0) // 16 * 16
        begin = first_token + s.first_tile * 16
        for token in range(begin, min(begin + 16, length)):
            page = int(problem.indices[problem.indptr[s.request] + token // page_size])
            for cache in (problem.k, problem.v):
                row = cache[page, token % page_size, s.head]
                expected |= {row.data_ptr() + at for at in range(0, row.nbytes, 128)}
    return asked == expected


@given(
    lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=12),
    heads=st.integers(1, 3),
    blocks=st.integers(4, 40),
    warps=st.integers(1, 8),
)
def test_whole_pieces_are_of_one_request_and_head(lengths, heads, blocks, warps):
    schedule = Schedule(lengths, heads, blocks, warps)
    assume(schedule.split_tiles > 1)
    assert schedule.working_blocks <= blocks
    assert schedule.longest_piece <= schedule.split_tiles
    warps_with_work = [(s.block, s.warp) for s in schedule.segments]
    assert len(set(warps_with_work)) == len(warps_with_work), "one segment a warp"
    anywhere = -(-sum(schedule.tiles) * heads // (blocks * warps))
    assert schedule.longest_piece <= max(anywhere, schedule.min_tiles) + 4 + anywhere // 16, "hardly longer"


@given(
    lengths=st.lists(st.one_of(st.integers(0, 60), st.integers(1, 4000)), min_size=2, max_size=60),
    heads=st.integers(1, 4),
    blocks=st.integers(1, 6),
    warps=st.integers(1, 8),
    tile_bytes=st.sampled_from([2048, 4096, 8192, 16384]),
)
def test_a_warp_of_many_requests_has_fewer_tiles(lengths, heads, blocks, warps, tile_bytes):
    schedule = Schedule(lengths, heads, blocks, warps, tile_bytes=tile_bytes)
    gap, workers = schedule.partition.gap, schedule.partition.workers
    assume(gap > 0)
    assert gap == max(8192 // tile_bytes, 1)
    places = Counter({(worker // warps, worker % warps): 0 for worker in range(workers)})
    for s in schedule.segments:
        places[s.block, s.warp] += s.end_tile - s.first_tile + (gap if s.first_tile == 0 else 0)
    least, most = schedule.partition.tiles // workers, -(-schedule.partition.tiles // workers)
    assert all(least - gap <= n <= most + gap for n in places.values()), "but for a gap that two of them have parts of"


def test_a_line_has_gaps_where_many_requests_differ():
    def gap(lengths, heads=8, tile_bytes=8192):
        return Schedule(lengths, heads, blocks=132, warps=8, tile_bytes=tile_bytes).partition.gap

    mixed = [64 + 37 * i for i in range(200)]
    assert gap(mixed) == 1
    assert gap(mixed, tile_bytes=4096) == 2, "a tile takes half as long"
    assert gap([*mixed, 0, 0]) == 1, "an empty request has none"
    assert gap([2048] * 200) == 0, "equal requests"
    assert gap([4096] * 32 + [128] * 32) == 0, "most end with pieces of 64 tiles"
    assert gap(mixed[:60], heads=1) == 0, "whole pieces"
    assert gap([10, 20] * 300, heads=2) == 0, "two tiles a warp"


def test_pieces_are_whole_where_requests_differ_and_are_few():
    def split_tiles(lengths, heads=1):
        return Schedule(lengths, heads, blocks=132, warps=8).split_tiles

    assert split_tiles([65536] + [4096] * 31) == 12, "11.7 tiles a warp"
    assert split_tiles([16384] + [64] * 15) == 2, "542 pieces, which 68 blocks would cut into 544"
    assert split_tiles([4096] * 32 + [128] * 32) == 1, "1,056 pieces of eight tiles, however they are cut"
    assert split_tiles([2100] * 64) == 1, "equal requests"
    assert split_tiles([4096, 2048] * 600) == 1, "more requests than warps"
    assert split_tiles([4096, 2048] * 100, 8) == 1, "more requests and heads than warps"
    assert split_tiles([100, 200, 300]) == 1, "one tile a warp"


@pytest.mark.parametrize("page_size", [8, 16])
@pytest.mark.parametrize("window_left", [-1, 40])
@pytest.mark.parametrize(
    "lengths",
    [
        [500], [40, 0, 333, 16, 1], [64] * 12, [80] * 5, [400] * 22, [300, 1, 200] * 16, [400, 1, 300] * 16,
        [700, 90, 0, 210], [1200, 30, 330, 16], [2000, 900, 2000, 2000], [3000, 1400, 3000, 3000],
        [90, 0, 20, 333, 160] * 9,
    ],
)  # fmt: skip
def test_the_kernel_cuts_where_the_host_does(lengths, window_left, page_size):
    heads, blocks, warps = 4, 5, 4
    problem = emulated.make_problem(
        lengths, heads_q=8, heads_kv=heads, page_size=page_size, blocks=blocks, warps=warps, window_left=window_left,
        abreast_log2=2,
    )  # fmt: skip
    schedule = Schedule(lengths, heads, blocks, warps, problem.min_tiles, window_left=window_left, page_size=page_size)
    # Equal or long enough; and half of a request and head, or two.
    abreast = lengths in ([400] * 22, [400, 1, 300] * 16) or (lengths[0] == 3000 and page_size == 16)
    assert (schedule.abreast == 4) == (abreast and window_left < 0)
    assert cuts_as(schedule, problem)


@pytest.mark.parametrize(
    "lengths, blocks, warps, split_tiles",
    [
        ([900, 0, 30, 415], 12, 4, 4),
        ([900, 0, 30, 415], 9, 4, 6),
        ([900] + [40] * 40, 40, 6, 2),
        ([16, 250, 0, 33] * 9, 16, 8, 4),
        ([16, 250, 0, 33] * 9, 10, 8, 1),
    ],
)
def test_the_kernel_cuts_whole_pieces_where_the_host_does(lengths, blocks, warps, split_tiles):
    problem = emulated.make_problem(
        lengths, heads_q=4, heads_kv=2, page_size=16, blocks=blocks, warps=warps, min_tiles=0
    )
    schedule = Schedule(lengths, 2, blocks, warps)
    assert schedule.split_tiles == split_tiles
    assert cuts_as(schedule, problem)


def test_fewer_blocks_work_where_many_would_meet():
    def working(lengths, heads):
        return Schedule(lengths, heads, blocks=132, warps=8).working_blocks

    assert working([2048], 8) == 64, "8 meet about a head, not 16"
    assert working([8192], 4) == 64, "16, not 32"
    assert working([2048], 4) == 64, "no more than half of the blocks as it is"
    assert working([1024] * 8, 4) == 64, "2, not 4"
    assert working([512] * 4, 8) == 32, "none"
    assert working([512] * 3 + [480], 8) == 63, "2 or 3, not 4 or 5"
    assert working([16] * 1000, 1) == 125, "none as it is"
    assert working([4096], 1) == 32, "one tile a warp"
    assert working([16384], 1) == 64, "two tiles a warp"
    assert working([16384] + [64] * 15, 1) == 68, "little more than half of the blocks"
    assert working([8192], 8) == 128, "four tiles a warp already"
    for length, blocks in ((600, 5), (470, 8)):
        schedule = Schedule([length], 1, blocks=10, warps=4)
        assert schedule.working_blocks == blocks
        problem = emulated.make_problem([length], heads_q=2, heads_kv=1, page_size=16, blocks=10, warps=4, min_tiles=0)
        assert cuts_as(schedule, problem)


def test_all_blocks_work_on_two_small_tiles_a_warp():
    def working(lengths, heads, tile_bytes):
        return Schedule(lengths, heads, blocks=132, warps=8, tile_bytes=tile_bytes).working_blocks

    assert [working([1024] * 8, 4, tile_bytes) for tile_bytes in (16384, 8192, 4096, 2048)] == [64, 64, 128, 128]
    assert [working([32768], 1, tile_bytes) for tile_bytes in (8192, 4096)] == [64, 128], "two tiles, not four"
    assert working([65536], 1, 4096) == 128, "four tiles a warp already"
    assert working([2048], 8, 4096) == 64, "there is one for each warp: 8 meet about a head, not 16"
    for options, tile_bytes, blocks in (
        ({"kv_dtype": torch.float8_e4m3fn}, 4096, 10),
        ({"head_dim": 64}, 4096, 10),
        ({}, 8192, 5),
        ({"head_dim": 256, "kv_dtype": torch.float8_e4m3fn}, 8192, 5),
    ):
        schedule = Schedule([1200], 1, blocks=10, warps=4, tile_bytes=tile_bytes)
        assert schedule.working_blocks == blocks
        problem = emulated.make_problem(
            [1200], heads_q=2, heads_kv=1, page_size=16, blocks=10, warps=4, min_tiles=0, **options
        )
        assert cuts_as(schedule, problem)
