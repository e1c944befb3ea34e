"""The paper's kernel: its own source, run lane by lane on the CPU, against attention written from its definition."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from emulated_decode import CUDA_TYPES, guarded, numpy_view, storage
from emulator import build as emulator
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_prefetch.bench import paper
from fi_prefetch.bench.baselines import Unsupported
from fi_prefetch.bench.inputs import DecodeInputs, KvPool
from fi_prefetch.bench.shapes import Shape
from fi_prefetch.bench.timing import Timing
from fi_prefetch.device import describe

BF16, F16 = torch.bfloat16, torch.float16
BLOCK, WARPS = 16, 4  # tokens of a KV block, warps of a thread block
OFF, BULK, LINES = 0, 1, 2
UNUSED = 2**31 - 1  # no such block: whoever reads the cache there is caught
SOURCE = r"""
#include "xformers_decode.cuh"
using namespace fi_prefetch::paper;

EMULATOR_EXPORT const char* decode(const void* q, const void* k, const void* v, const int32_t* table,
                                   const int32_t* lengths, void* o, int64_t sequences, int64_t heads, int64_t kv_heads,
                                   int64_t max_blocks, int64_t max_context_len, double scale, int64_t prefetch,
                                   int64_t distance, int64_t seed) {
  const Params p{q, k, v, table, lengths, o, int32_t(max_blocks), int32_t(max_context_len), int32_t(kv_heads),
                 int32_t(heads / kv_heads), int32_t(distance), float(scale * 1.4426950408889634)};
  const emulator::Launch launch{.grid = dim3(heads, sequences), .block = kThreads,
                                .shared_bytes = SharedMemory<TEST_HEAD_DIM>::bytes(max_context_len),
                                .seed = uint64_t(seed), .resident_blocks = 3};
  constexpr void (*kKernels[])(Params) = {xformers_decode_kernel<Traits<TEST_T, TEST_HEAD_DIM, Prefetch::kNone>>,
                                          xformers_decode_kernel<Traits<TEST_T, TEST_HEAD_DIM, Prefetch::kBulk>>,
                                          xformers_decode_kernel<Traits<TEST_T, TEST_HEAD_DIM, Prefetch::kLines>>};
  return emulator::launch(launch, kKernels[prefetch], p);
}
"""


@dataclass
class Problem:
    """q [sequences, heads, dim]; keys and values, a sequence each, [length, kv heads, dim]; the same in the caches."""

    q: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    k_cache: torch.Tensor  # [blocks, kv heads, dim / 8, 16, 8]
    v_cache: torch.Tensor  # [blocks, kv heads, dim, 16]
    table: torch.Tensor
    lengths: torch.Tensor
    max_context_len: int


def make_problem(lengths, heads=4, kv_heads=4, head_dim=64, dtype=BF16, q_scale=1.0, seed=0) -> Problem:
    """Blocks shuffled. What belongs to no token is NaN in the caches, and no block number in the table."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    counts = [-(-length // BLOCK) for length in lengths]
    numbers = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    k_cache = torch.full((len(numbers), kv_heads, head_dim // 8, BLOCK, 8), math.nan, dtype=dtype)
    v_cache = torch.full((len(numbers), kv_heads, head_dim, BLOCK), math.nan, dtype=dtype)
    table = torch.full((len(lengths), max(counts) + 2), UNUSED, dtype=torch.int32)
    keys, values = [], []
    for sequence, length in enumerate(lengths):
        keys.append(random(length, kv_heads, head_dim))
        values.append(random(length, kv_heads, head_dim))
        for i in range(counts[sequence]):
            table[sequence, i] = block = numbers.pop()
            for slot, token in enumerate(range(i * BLOCK, min(i * BLOCK + BLOCK, length))):
                k_cache[block, :, :, slot] = keys[-1][token].unflatten(-1, (head_dim // 8, 8))
                v_cache[block, :, :, slot] = values[-1][token]
    q = (random(len(lengths), heads, head_dim).float() * q_scale).to(dtype)
    return Problem(q, keys, values, k_cache, v_cache, table, torch.tensor(lengths, dtype=torch.int32), max(lengths))


def launch(q, k_cache, v_cache, table, lengths, out, longest, sm_scale, prefetch, distance, most_resident, seed=0):
    """The module's `run`, on the emulator. Returns the library."""
    defines = {"TEST_T": CUDA_TYPES[q.dtype], "TEST_HEAD_DIM": q.shape[2]}
    library = emulator.build("paper", SOURCE, defines)
    inputs = [storage(x)[: x.nbytes] for x in (q, k_cache, v_cache, table, lengths)]
    emulator.register(library, *inputs)
    emulator.call(library, "decode", *inputs, numpy_view(out), len(lengths), q.shape[1], k_cache.shape[1],
                  table.shape[1], longest, sm_scale, prefetch, distance, seed)  # fmt: skip
    return library


def run(problem: Problem, prefetch=OFF, distance=1, seed=0):
    """The output, and the prefetches that were issued."""
    p = problem
    o, buffer = guarded(tuple(p.q.shape), p.q.dtype)
    library = launch(p.q, p.k_cache, p.v_cache, p.table, p.lengths, o, p.max_context_len, p.q.shape[2] ** -0.5,
                     prefetch, distance, 0, seed)  # fmt: skip
    assert buffer[:64].isnan().all() and buffer[-64:].isnan().all(), "memory beside the output was written"
    return o, emulator.prefetches(library)


def reference(problem: Problem) -> torch.Tensor:
    """Attention in float64, a sequence and a head at a time."""
    p = problem
    group = p.q.shape[1] // p.k_cache.shape[1]
    o = torch.zeros(p.q.shape, dtype=torch.float64)
    for sequence, (keys, values) in enumerate(zip(p.keys, p.values, strict=True)):
        for head in range(p.q.shape[1]) if len(keys) else ():
            logits = keys[:, head // group].double() @ p.q[sequence, head].double() * p.q.shape[2] ** -0.5
            o[sequence, head] = logits.softmax(0) @ values[:, head // group].double()
    return o


def assert_right(problem: Problem, o: torch.Tensor) -> None:
    """The arithmetic is in float32: only the output's own rounding shows."""
    expected = reference(problem)
    rounding = {BF16: 2.0**-8, F16: 2.0**-11}[problem.q.dtype]
    assert not o.isnan().any()
    assert ((o.double() - expected).abs() <= rounding * expected.abs() + 1e-5).all()


def expected_prefetches(problem: Problem, prefetch: int, distance: int) -> Counter:
    """(address, bytes, thread block, thread) of every prefetch, from what the kernel is meant to do.

    Warp w works on KV blocks w, w + 4, .., first of K and then of V, and with each asks for the one that it comes to
    `distance` iterations later.
    """
    p = problem
    heads, kv_heads = p.q.shape[1], p.k_cache.shape[1]
    expected: Counter = Counter()
    for cache in (p.k_cache, p.v_cache):
        block_bytes = cache[0, 0].numel() * cache.element_size()
        lines = [(0, block_bytes)] if prefetch == BULK else [(at, 128) for at in range(0, block_bytes, 128)]
        for sequence, length in enumerate(p.lengths.tolist()):
            count = -(-length // BLOCK)
            for head in range(heads):
                for block in range(count - WARPS * distance):
                    number = int(p.table[sequence, block + WARPS * distance])
                    start = cache.data_ptr() + (number * kv_heads + head // (heads // kv_heads)) * block_bytes
                    for lane, (at, size) in enumerate(lines):
                        expected[start + at, size, sequence * heads + head, block % WARPS * 32 + lane] += 1
    return expected


def recorded(prefetches: np.ndarray) -> Counter:
    assert not prefetches["evict_last"].any()
    return Counter(zip(*(prefetches[name].tolist() for name in ("address", "bytes", "block", "thread")), strict=True))


LENGTHS = [0, 1, 15, 16, 17, 64, 65, 100, 257, 0]


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2), (5, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_attention(dtype, head_dim, heads, kv_heads):
    problem = make_problem(LENGTHS, heads, kv_heads, head_dim, dtype)
    o, prefetches = run(problem)
    assert_right(problem, o)
    assert len(prefetches) == 0


@pytest.mark.parametrize("distance", [1, 2, 5, 1000])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("prefetch", [BULK, LINES], ids=["bulk", "lines"])
def test_prefetch_is_of_the_next_block_and_changes_nothing(prefetch, head_dim, distance):
    problem = make_problem([*LENGTHS, 530], 4, 2, head_dim)
    o, prefetches = run(problem, prefetch, distance, seed=distance)
    assert torch.equal(numpy_bits(o), numpy_bits(run(problem)[0]))
    assert recorded(prefetches) == expected_prefetches(problem, prefetch, distance)
    assert (len(prefetches) == 0) == (distance == 1000)


def numpy_bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int16)


@pytest.mark.parametrize("prefetch", [OFF, BULK, LINES])
def test_a_warp_asks_for_one_block_an_iteration_in_the_order_of_its_work(prefetch):
    blocks = 13
    problem = make_problem([blocks * BLOCK], 1, 1)
    _, prefetches = run(problem, prefetch)
    per_block = {OFF: 0, BULK: 1, LINES: 64 * BLOCK * 2 // 128}[prefetch]
    for warp in range(WARPS):
        mine = prefetches[prefetches["thread"] // 32 == warp]
        order = [problem.table[0].tolist().index(number) for number in block_numbers(problem, mine)]
        wanted = [block for block in range(warp + WARPS, blocks, WARPS) for _ in range(per_block)]
        assert order == wanted + wanted  # K, then V


def block_numbers(problem: Problem, prefetches: np.ndarray) -> list[int]:
    """The cache blocks that prefetches of a problem with one kv head ask for, K's and V's alike."""
    numbers = []
    for address in prefetches["address"].tolist():
        cache = next(c for c in (problem.v_cache, problem.k_cache) if 0 <= address - c.data_ptr() < c.nbytes)
        numbers.append((address - cache.data_ptr()) // (cache.nbytes // len(cache)))
    return numbers


def test_sequences_may_share_blocks():
    problem = make_problem([80, 80], 2, 2)
    problem.table[1] = problem.table[0]
    problem.keys[1], problem.values[1] = problem.keys[0], problem.values[0]
    problem.q[1] = problem.q[0]
    o, _ = run(problem, BULK)
    assert_right(problem, o)
    assert torch.equal(o[0], o[1])


def test_large_logits():
    problem = make_problem([70, 200], 2, 1, 128, F16, q_scale=300.0)
    assert_right(problem, run(problem)[0])


def test_a_length_above_the_limit_is_cut_off():
    """Shared memory holds max_context_len logits; nothing beyond is written, or read."""
    problem = make_problem([100, 40], 2, 2)
    problem.max_context_len = 56
    o, prefetches = run(problem, BULK)
    for x in (problem.keys, problem.values):
        x[0] = x[0][:56]
    assert_right(problem, o)
    problem.lengths[0] = 56
    assert recorded(prefetches) == expected_prefetches(problem, BULK, 1)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (3, 3), (4, 1), (6, 3)]),
    prefetch=st.sampled_from([BULK, LINES]),
    distance=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_any_shape(lengths, heads, prefetch, distance, seed):
    problem = make_problem(lengths, *heads, seed=seed)
    o, prefetches = run(problem, prefetch, distance, seed)
    assert_right(problem, o)
    assert recorded(prefetches) == expected_prefetches(problem, prefetch, distance)
    assert torch.equal(numpy_bits(o), numpy_bits(run(problem, OFF, 1, seed + 1)[0]))


# ---- what the measurement makes of it ------------------------------------------------------------------------------


class FakeModule:
    """The compiled module, its `run` on the emulator; keeps (prefetch, distance, most_resident) of the runs."""

    def __init__(self) -> None:
        self.runs: list[tuple[int, int, int]] = []

    def run(self, *arguments) -> None:
        launch(*arguments)
        self.runs.append(arguments[-3:])

    def residency(self, q, max_context_len, prefetch, most_resident) -> int:
        return min(most_resident or 7, 7)


class FakeContext:
    """As worker.Context, on the CPU."""

    facts = describe("NVIDIA H200", (9, 0), 132, 60)

    def pool(self, kv_dtype):
        return KvPool(1 << 20, getattr(torch, kv_dtype), torch.device("cpu"))

    def floor_us(self, kv_bytes):
        return kv_bytes / 1e3

    def attempt(self, name, action):
        try:
            return action(), None
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"


@pytest.fixture
def module(monkeypatch) -> FakeModule:
    fake = FakeModule()
    monkeypatch.setattr(paper, "module", lambda: fake)
    monkeypatch.setattr(paper, "time_on", lambda stream, call, copies: Timing(float(len(fake.runs)), 0.0))
    monkeypatch.setattr(paper, "whole_stream", lambda: None)
    monkeypatch.setattr(paper, "count_sms", lambda stream, sm_count: sm_count)
    monkeypatch.setattr(paper, "BESIDE", ())
    return fake


SHAPE = Shape(4, 2, BLOCK, ((70, 1), (33, 2)), head_dim=64)


def test_prepared_call(module):
    inputs = DecodeInputs(SHAPE, FakeContext().pool("bfloat16"), 60, copies=2)
    inputs.out.fill_(math.nan)
    paper.prepare(inputs, "lines", 2, 3)(0)
    requests, expected = paper.truth(inputs)
    assert requests == [0, 1, 2]
    assert (inputs.out[requests].float() - expected).abs().max() < 0.01
    assert module.runs == [(LINES, 2, 3)]
    paper.prepare(inputs)(1)
    assert (inputs.out[requests].float() - expected).abs().max() > 0.1, "cache 1 is another cache"
    with pytest.raises(ValueError, match="prefetch: expected one of off, bulk, lines, got 'all'"):
        paper.prepare(inputs, "all")(0)


def test_truth_is_attention_over_the_papers_layouts():
    inputs = DecodeInputs(SHAPE, FakeContext().pool("bfloat16"), 60)
    k_cache, v_cache = paper.caches(inputs, 0)
    _, outputs = paper.truth(inputs)
    for request, length in enumerate(SHAPE.lengths):
        for head in range(SHAPE.heads_q):
            places = [(int(inputs.block_table[request, t // BLOCK]), t % BLOCK) for t in range(length)]
            keys = torch.stack([k_cache[block, head // 2, :, slot].flatten() for block, slot in places]).double()
            values = torch.stack([v_cache[block, head // 2, :, slot] for block, slot in places]).double()
            weights = (keys @ inputs.q[request, head].double() / 8).softmax(0)
            assert torch.allclose(outputs[request, head].double(), weights @ values, atol=1e-5)


@pytest.mark.parametrize(
    "shape, reason",
    [(Shape(4, 2, 1, ((70, 1),)), "pages of 16"), (Shape(4, 2, 16, ((70, 1),), kv_dtype="float8_e4m3fn"), "one dtype")],
)
def test_shapes_that_the_kernel_does_not_serve(shape, reason):
    with pytest.raises(Unsupported, match=reason):
        paper.prepare(DecodeInputs(shape, FakeContext().pool(shape.kv_dtype), 60))


def test_a_row(module):
    variants = paper.RESIDENCY_VARIANTS
    spec = {"part": "residency", **SHAPE.to_row(), "sms": None, "most_resident": 2}
    row = paper.measure(spec, FakeContext())
    assert {name: row[name] for name in spec} == spec
    assert row["us"].keys() == variants.keys() and row["missing"] == {}
    assert row["us"]["off"] < row["us"]["bulk_1"] < row["us"]["off_again"]
    assert module.runs == [(paper.PREFETCHES[name], distance, 2) for name, distance in variants.values()]
    # Twelve thread blocks for 132 SMs: one each, whose four warps have 16 tokens of 128 bytes in flight.
    assert (row["sms_used"], row["resident"], row["bytes_in_flight"]) == (132, 1, 4 * 16 * 128)


def test_a_wrong_answer_has_no_time(module, monkeypatch):
    monkeypatch.setattr(module, "run", lambda *arguments: None)
    row = paper.measure({"part": "table", **SHAPE.to_row(), "sms": None, "most_resident": 0}, FakeContext())
    assert set(row["us"].values()) == {None}
    assert all("WrongAnswer" in reason for reason in row["missing"].values())


@pytest.mark.parametrize("why", ["no green contexts", "ran on all 132"])
def test_a_slice_that_is_none_has_no_times(module, monkeypatch, why):
    def slice_stream(sms):
        if why == "no green contexts":
            raise Unsupported(why)

    monkeypatch.setattr(paper, "slice_stream", slice_stream)
    row = paper.measure({"part": "table", **SHAPE.to_row(), "sms": 80, "most_resident": 0}, FakeContext())
    assert row["us"] == dict.fromkeys(paper.VARIANTS["table"]) and row["sms_used"] is None
    assert all(why in reason for reason in row["missing"].values())
    assert paper.table_rows({"rows": [row]})[0][:6] == ["4/2", "1x70+2x33", "-", "-", "-", "-"]


def test_rows_and_their_bytes_in_flight():
    specs = paper.specs()
    assert len({str(spec) for spec in specs}) == len(specs)
    parts = Counter((spec["part"], spec["sms"]) for spec in specs)
    for sms in (None, 80):
        assert parts["table", sms] == 2 * 4 * 5 and parts["flashinfer", sms] == 3 * 2 * 2
        assert parts["ours", sms] == 3 * 2 * len(paper.OUR_GRIDS)
        # As many blocks as fit, and each smaller number that an SM is given on that shape.
        assert 3 * 2 <= parts["residency", sms] <= 3 * 2 * (len(paper.RESIDENCIES) + 1)
    shape = Shape(32, 32, 16, ((4096, 64),))
    assert paper.bytes_in_flight(shape, 132, 7) == (7, 7 * 4 * 4096)
    assert paper.bytes_in_flight(Shape(8, 1, 16, ((2048, 16),)), 80, 7) == (2, 2 * 4 * 4096)


def test_the_table():
    row = {
        **{"part": "table", "sms_used": 132, "floor_us": 10.0},
        **Shape(32, 8, 16, ((4096, 64),)).to_row(),
        "us": {"off": 40.0, "bulk_1": 20.0, "fi_prefetch": 11.0, "flashinfer_fa2": None, "fa3": 12.04},
    }
    cells = ["32/8", "64x4K", "132", "40.0", "20.0", "2.00x", "25%", "50%", "11.0", "-", "12.0"]
    assert paper.table_rows({"rows": [row, {**row, "part": "residency"}]}) == [cells]
    assert len(paper.TABLE_COLUMNS) == len(cells)
