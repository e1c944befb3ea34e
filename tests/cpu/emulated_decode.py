"""The decode kernel of csrc/decode.cuh, run on the CPU by tests/emulator: real source, real launch parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from emulator import build as emulator

from fi_prefetch.schedule import TILE_TOKENS, ring_tiles

LOG2E = math.log2(math.e)
WHOLE_REQUEST = 1 << 28  # tiles of a split: no request has more
CUDA_TYPES = {
    torch.bfloat16: "__nv_bfloat16",
    torch.float16: "__half",
    torch.float8_e4m3fn: "__nv_fp8_e4m3",
    torch.float8_e5m2: "__nv_fp8_e5m2",
}
SOURCE = r"""
#include "decode.cuh"
#include "fixed_split.cuh"
#include "prefetch_kv.cuh"
#include "tensor_maps.cuh"
using namespace fi_prefetch;
template <bool FEW_REQUESTS, bool TENSOR_COPIES = false, bool PLANNED = false>
using Traits = DecodeTraits<TEST_Q, TEST_KV, TEST_O, TEST_HEAD_DIM, TEST_ROW_TILES, TEST_STAGES, TEST_WINDOW,
                            TEST_SOFT_CAP, Position{TEST_POSITION}, FEW_REQUESTS, TENSOR_COPIES, PLANNED>;
using T = Traits<false>;

template <bool TENSOR_COPIES, typename Params>
static const char* launch_decode(const emulator::Launch& launch, const Params& p) {
  if (p.planned != nullptr) return emulator::launch(launch, decode_kernel<Traits<false, TENSOR_COPIES, true>>, p);
  if (p.table.batch_size <= 32) return emulator::launch(launch, decode_kernel<Traits<true, TENSOR_COPIES>>, p);
  return emulator::launch(launch, decode_kernel<Traits<false, TENSOR_COPIES>>, p);
}

static KvTensor tensor(const uint8_t* data, const int64_t* strides) {
  return {data, uint32_t(strides[0]), uint32_t(strides[1]), uint32_t(strides[2])};
}

static DecodeParams params(const void* q, void* o, float* lse, const float* sinks, const uint8_t* k, const uint8_t* v,
                           const int32_t* indptr, const int32_t* indices, const int32_t* last_page_len, float* partials,
                           int32_t* counters, const int64_t* n, const double* x) {
  DecodeParams p{};
  p.q = q; p.q_stride_n = n[0]; p.q_stride_h = n[1];
  p.o = o; p.lse = lse; p.sinks = sinks;
  p.k = tensor(k, n + 2); p.v = tensor(v, n + 5);
  p.unit_bytes = n[8]; p.contiguous_tokens = n[9];
  int32_t page_shift = 0;
  while (int64_t{1} << page_shift < n[13]) ++page_shift;
  p.table = {indptr, indices, last_page_len, int32_t(n[10]), int32_t(n[11]), int32_t(n[12]), int32_t(n[13]),
             uint32_t(((uint64_t{1} << (31 + page_shift)) + n[13] - 1) / n[13]), page_shift,
             int32_t(0x7fffffff / n[13])};
  p.num_qo_heads = n[15]; p.num_kv_heads = n[16]; p.group_size = n[15] / n[16];
  p.group_inverse = 65536 / p.group_size + 1;
  p.q_len = n[17];
  p.window_left = n[18]; p.min_tiles_per_warp = n[19]; p.dependent_launch = n[25]; p.abreast_log2 = n[26];
  p.few_pieces = n[28];
  p.scale_log2 = x[0]; p.inverse_cap = x[1]; p.v_scale = x[2]; p.rope_turns = x[3]; p.rope_ratio = x[4];
  p.partials = partials; p.counters = counters;
  p.levers = {int32_t(n[20]), int32_t(n[21]), int32_t(n[22]), int32_t(n[23]), int32_t(n[24])};
  return p;
}

EMULATOR_EXPORT const char* decode(const void* q, void* o, float* lse, const float* sinks, const uint8_t* k,
                                   const uint8_t* v, const int32_t* indptr, const int32_t* indices,
                                   const int32_t* last_page_len, float* partials, int32_t* counters, const int64_t* n,
                                   const double* x, int64_t blocks, int64_t warps, int64_t seed, int64_t resident,
                                   void (*dependencies_end)(), const void* planned) {
  DecodeParams p = params(q, o, lse, sinks, k, v, indptr, indices, last_page_len, partials, counters, n, x);
  p.planned = static_cast<const PlannedWork*>(planned);
  if (planned) p.planned_requests = reinterpret_cast<const Request*>(p.planned + blocks * warps);
  uint32_t bytes = SharedMemory<T>::bytes(warps, p.group_size * p.q_len);
  const emulator::Launch launch{.grid = dim3(blocks), .block = dim3(32 * warps), .shared_bytes = bytes,
                                .seed = uint64_t(seed), .resident_blocks = int(resident),
                                .dependencies_end = dependencies_end};
  if (n[27] == 0) return launch_decode<false>(launch, p);
  TensorDecodeParams with_maps{p, {}};
  if (!describe<T>(with_maps.maps, p)) return "the cache cannot be described for tensor copies";
  return launch_decode<true>(launch, with_maps);
}

EMULATOR_EXPORT const char* schedule(const void* q, void* o, float* lse, const float* sinks, const uint8_t* k,
                                     const uint8_t* v, const int32_t* indptr, const int32_t* indices,
                                     const int32_t* last_page_len, float* partials, int32_t* counters, const int64_t* n,
                                     const double* x, int64_t blocks, int64_t warps, int64_t seed, int64_t own_blocks,
                                     void* planned) {
  DecodeParams p = params(q, o, lse, sinks, k, v, indptr, indices, last_page_len, partials, counters, n, x);
  auto* records = static_cast<PlannedWork*>(planned);
  return emulator::launch({.grid = dim3(own_blocks), .block = dim3(32 * warps),
                           .shared_bytes = RequestScan<T::kWindow, false>::shared_bytes(p.table.batch_size),
                           .seed = uint64_t(seed), .resident_blocks = 2},
                          schedule_kernel<T>, p,
                          ScheduleParams{records, reinterpret_cast<Request*>(records + blocks * warps),
                                         uint32_t(blocks), uint32_t(warps),
                                         T::kPagesPerLane * 32 / kTileTokens});
}

EMULATOR_EXPORT const char* fixed_split(const void* q, void* o, float* lse, const float* sinks, const uint8_t* k,
                                        const uint8_t* v, const int32_t* indptr, const int32_t* indices,
                                        const int32_t* last_page_len, float* partials, int32_t* counters,
                                        const int64_t* n, const double* x, int64_t blocks, int64_t warps, int64_t seed,
                                        int64_t resident, int64_t tiles, int64_t capacity, void (*dependencies_end)()) {
  const DecodeParams p = params(q, o, lse, sinks, k, v, indptr, indices, last_page_len, partials, counters, n, x);
  uint32_t bytes = SharedMemory<T>::bytes(warps, p.group_size * p.q_len);
  return emulator::launch({.grid = dim3(blocks), .block = dim3(32 * warps), .shared_bytes = bytes,
                           .seed = uint64_t(seed), .resident_blocks = int(resident),
                           .dependencies_end = dependencies_end},
                          fixed_split_kernel<T>, p, FixedSplitParams{uint32_t(tiles), uint32_t(capacity)});
}

EMULATOR_EXPORT const char* prefetch_kv(const void* q, void* o, float* lse, const float* sinks, const uint8_t* k,
                                        const uint8_t* v, const int32_t* indptr, const int32_t* indices,
                                        const int32_t* last_page_len, float* partials, int32_t* counters,
                                        const int64_t* n, const double* x, int64_t blocks, int64_t warps, int64_t seed,
                                        int64_t tiles, int64_t evict_last, int64_t own_blocks) {
  const DecodeParams p = params(q, o, lse, sinks, k, v, indptr, indices, last_page_len, partials, counters, n, x);
  return emulator::launch({.grid = dim3(own_blocks), .block = dim3(256),
                           .shared_bytes = RequestScan<T::kWindow, false>::shared_bytes(p.table.batch_size),
                           .seed = uint64_t(seed), .resident_blocks = 2},
                          prefetch_kv_kernel<T>, p, PrefetchKvParams{uint32_t(blocks), uint32_t(warps), uint32_t(tiles),
                                                                     int32_t(evict_last)});
}
"""


def stage_count(head_dim: int, kv_dtype: torch.dtype) -> int:
    """What csrc/decode.cu compiles."""
    return ring_tiles(2 * TILE_TOKENS * head_dim * kv_dtype.itemsize)


@dataclass
class Problem:
    """One decode call on CPU tensors. k and v: [pages, page_size, heads, head_dim] views with any strides."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor
    q_len: int = 1
    window_left: int = -1
    soft_cap: float = 0.0
    sm_scale: float | None = None
    v_scale: float = 1.0
    sinks: torch.Tensor | None = None
    position: str = "NONE"
    rope_scale: float = 1.0
    rope_theta: float = 1e4
    o_dtype: torch.dtype | None = None
    levers: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)  # run_ahead, prologue, early_load, ready, stream
    dependent_launch: bool = True
    blocks: int = 5
    warps: int = 4
    min_tiles: int = 1
    abreast_log2: int = 0
    few_pieces: int = 0
    plans: bool = False  # what warps do is worked out by a kernel of its own before; and what happens then
    after_plan: Callable[[], None] | None = None
    seed: int = 0
    resident: int = 3
    stages: int | None = None
    tensor_copies: bool | None = None  # None: wherever the kernel is compiled with them
    dependencies_end: object = None
    with_lse: bool = True
    split_tiles: int | None = None  # the batch-invariant kernel's; None: the decode kernel

    @property
    def most_splits(self) -> int:
        """As csrc/decode.cu counts them."""
        if self.split_tiles == WHOLE_REQUEST:
            return 0
        tokens = len(self.indices) * self.k.shape[1]
        return (tokens // (16 * self.split_tiles) + len(self.last_page_len)) * self.k.shape[2]

    @property
    def copies_tensors(self) -> bool:
        """Where tiles can be copied whole."""
        return self.k.shape[1] % 16 == 0 if self.tensor_copies is None else self.tensor_copies

    @property
    def rows(self) -> int:
        return self.q.shape[1] // self.k.shape[2] * self.q_len


def library(problem: Problem):
    head_dim = problem.q.shape[2]
    return emulator.build(
        "decode",
        SOURCE,
        {
            "TEST_Q": CUDA_TYPES[problem.q.dtype],
            "TEST_KV": CUDA_TYPES[problem.k.dtype],
            "TEST_O": CUDA_TYPES[problem.o_dtype or problem.q.dtype],
            "TEST_HEAD_DIM": head_dim,
            "TEST_ROW_TILES": -(-problem.rows // 8),
            "TEST_STAGES": problem.stages or stage_count(head_dim, problem.k.dtype),
            "TEST_WINDOW": int(problem.window_left >= 0),
            "TEST_SOFT_CAP": int(problem.soft_cap > 0),
            "TEST_POSITION": ("NONE", "ROPE_LLAMA", "ALIBI").index(problem.position),
        },
    )


def numpy_view(x: torch.Tensor) -> np.ndarray:
    """The tensor's memory as bytes-compatible integers, strides kept (numpy has no bfloat16)."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: x.dtype}[x.element_size()]).numpy()


def storage(x: torch.Tensor) -> np.ndarray:
    """All the memory under a view, as bytes from the view's first element on."""
    raw = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
    return raw.numpy()[x.storage_offset() * x.element_size() :]


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor full of NaN between two guard areas, and the whole buffer."""
    count, guard = math.prod(shape), 64
    buffer = torch.full((count + 2 * guard,), float("nan"), dtype=dtype)
    return buffer[guard : guard + count].view(shape), buffer


def arguments(problem: Problem):
    p = problem
    o, o_buffer = guarded(tuple(p.q.shape), p.o_dtype or p.q.dtype)
    lse, lse_buffer = guarded(tuple(p.q.shape[:2]), torch.float32)
    stride = p.q.shape[2] + 4
    slots, meetings = (2 * p.blocks, 3 * p.blocks) if p.split_tiles is None else (p.most_splits, p.most_splits)
    warps = p.blocks * p.warps if p.abreast_log2 else 0
    saved = 128 * -(-p.rows // 8) * (p.q.shape[2] // 16 + 1)
    of_blocks = slots * p.rows * stride + (2 * p.blocks * saved if p.few_pieces else 0)
    partials, partials_buffer = guarded((max(of_blocks, 2 * warps * saved),), torch.float32)
    counters = torch.zeros(max(meetings * p.rows, warps, 1), dtype=torch.int32)
    itemsize = p.k.element_size()
    byte_strides = [s * itemsize for t in (p.k, p.v) for s in (t.stride(0), t.stride(1), t.stride(2))]
    unit_shift = min((s & -s).bit_length() - 1 for s in byte_strides if s > 0)
    page_size = p.k.shape[1]
    n = np.array(
        [p.q.stride(0), p.q.stride(1), *(s >> unit_shift for s in byte_strides), 1 << unit_shift,
         int(page_size % 16 == 0 and p.k.stride(1) == p.k.shape[3] and p.v.stride(1) == p.v.shape[3]),
         len(p.last_page_len), len(p.indices), p.k.shape[0], page_size,
         page_size.bit_length() - 1 if page_size & (page_size - 1) == 0 else -1,
         p.q.shape[1], p.k.shape[2], p.q_len, p.window_left, p.min_tiles, *p.levers,
         int(p.dependent_launch), p.abreast_log2, int(p.copies_tensors), p.few_pieces],
        dtype=np.int64,
    )  # fmt: skip
    sm_scale = p.sm_scale if p.sm_scale is not None else p.q.shape[2] ** -0.5
    scale, inverse_cap = (LOG2E * p.soft_cap, sm_scale / p.soft_cap) if p.soft_cap > 0 else (LOG2E * sm_scale, 0.0)
    rope = [1 / (2 * math.pi * p.rope_scale), p.rope_theta ** (-2 / p.q.shape[2])]
    x = np.array([scale, inverse_cap, p.v_scale, *rope], dtype=np.float64)
    sinks = None if p.sinks is None else p.sinks.numpy()
    table = [p.indptr.numpy(), p.indices.numpy(), p.last_page_len.numpy()]
    memory = [storage(p.q), o_buffer.view(torch.uint8).numpy(), lse_buffer.numpy(), storage(p.k), storage(p.v)]
    memory += [*table, partials_buffer.numpy(), counters.numpy()]
    if sinks is not None:
        memory.append(sinks)
    call = [storage(p.q), numpy_view(o), lse.numpy() if p.with_lse else None, sinks, storage(p.k), storage(p.v)]
    call += [*table, partials.numpy(), counters.numpy(), n, x]
    return call, memory, o, lse, counters, (o_buffer, lse_buffer, partials_buffer)


def launch(problem: Problem):
    """(library, o, lse, counters, buffers), whatever the answer is. Raises where the kernel breaks a rule."""
    lib = library(problem)
    call, memory, *written = arguments(problem)
    emulator.register(lib, *memory)
    grid = (problem.blocks, problem.warps, problem.seed, problem.resident)
    if problem.split_tiles is None:
        entries = problem.blocks * problem.warps * 128 + len(problem.last_page_len) * 4
        planned = np.zeros(entries, dtype=np.int32) if problem.plans else None
        if planned is not None:
            emulator.register(lib, *memory, planned)
            emulator.call(lib, "schedule", *call, *grid[:3], 1 + problem.seed % problem.blocks, planned)
            if problem.after_plan is not None:
                problem.after_plan()
        emulator.call(lib, "decode", *call, *grid, problem.dependencies_end, planned)
    else:
        splits = (problem.split_tiles, problem.most_splits)
        emulator.call(lib, "fixed_split", *call, *grid, *splits, problem.dependencies_end)
    return lib, *written


def run(problem: Problem):
    """(o, lse, library). Raises where the kernel breaks a rule, leaves a counter set or writes beyond its tensors."""
    lib, o, lse, counters, buffers = launch(problem)
    assert not counters.any(), f"counters left at {counters.tolist()}"
    for buffer in buffers:
        assert buffer[:64].isnan().all() and buffer[-64:].isnan().all(), "a guard area was written"
    return o, lse, lib


def prefetch_kv(problem: Problem, tiles: int, evict_last: bool = True, own_blocks: int = 2):
    """Runs the window op; returns the list of its prefetches."""
    lib = library(problem)
    call, memory, *_ = arguments(problem)
    emulator.register(lib, *memory)
    emulator.call(lib, "prefetch_kv", *call, problem.blocks, problem.warps, problem.seed, tiles, int(evict_last),
                  own_blocks)  # fmt: skip
    return emulator.prefetches(lib)


def rotated(x: torch.Tensor, positions: torch.Tensor, problem: Problem) -> torch.Tensor:
    """[token, head, dimension] as complex numbers, i and i + half of a row, each times e^(i angle)."""
    half = x.shape[2] // 2
    frequencies = problem.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half) / problem.rope_scale
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * positions[:, None, None] * frequencies)
    return torch.cat([turned.real, turned.imag], dim=2)


def alibi_slopes(heads: int) -> torch.Tensor:
    """As published: of the greatest power of two of heads, then every other one of twice as many."""
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    slopes += [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power, 2)][: heads - power]
    return torch.tensor(slopes, dtype=torch.float64)


def reference(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float64, request by request, written from the definition."""
    p = problem
    batch, heads, head_dim = len(p.last_page_len), p.q.shape[1], p.q.shape[2]
    group = heads // p.k.shape[2]
    sm_scale = p.sm_scale if p.sm_scale is not None else head_dim**-0.5
    o = torch.zeros(p.q.shape, dtype=torch.float64)
    lse = torch.full(p.q.shape[:2], -math.inf, dtype=torch.float64)
    for r in range(batch):
        pages = p.indices[p.indptr[r] : p.indptr[r + 1]].long()
        if len(pages) == 0:
            if p.sinks is not None:
                lse[r * p.q_len : (r + 1) * p.q_len] = p.sinks * LOG2E
            continue
        length = (len(pages) - 1) * p.k.shape[1] + int(p.last_page_len[r])
        k = p.k[pages].double().flatten(0, 1)[:length].repeat_interleave(group, dim=1)
        v = p.v[pages].double().flatten(0, 1)[:length].repeat_interleave(group, dim=1)
        if p.position == "ROPE_LLAMA":
            k = rotated(k, torch.arange(length), p)
        for i in range(p.q_len):
            row = r * p.q_len + i
            position = length - p.q_len + i
            t = torch.arange(length)
            query = p.q[row].double()
            if p.position == "ROPE_LLAMA":
                query = rotated(query[None], torch.tensor([position]), p)[0]
            scores = torch.einsum("hd,thd->ht", query, k) * sm_scale
            if p.position == "ALIBI":  # FlashInfer's distance is from the number of the query token
                scores += alibi_slopes(heads)[:, None] * (t - i)
            if p.soft_cap > 0:
                scores = p.soft_cap * torch.tanh(scores / p.soft_cap)
            visible = t <= position
            if p.window_left >= 0:
                visible &= t >= position - p.window_left
            if not visible.any():
                continue
            scores[:, ~visible] = -math.inf
            if p.sinks is not None:
                scores = torch.cat([scores, p.sinks.double()[:, None]], dim=1)
            lse[row] = torch.logsumexp(scores, dim=1) * LOG2E
            weights = torch.softmax(scores, dim=1)[:, :length]
            o[row] = torch.einsum("ht,thd->hd", weights, v) * p.v_scale
    return o, lse


def make_problem(
    lengths, heads_q=4, heads_kv=1, head_dim=128, page_size=1, dtype=torch.bfloat16, kv_dtype=None, hnd=False,
    one_tensor=False, seed=0, **options,
) -> Problem:  # fmt: skip
    """Random data; pages shuffled; the unused tail of every last page is NaN, which must never matter."""
    generator = torch.Generator().manual_seed(seed)
    q_len = options.get("q_len", 1)
    kv_dtype = kv_dtype or dtype
    pages = [-(-length // page_size) for length in lengths]
    total = sum(pages) + 2
    shape = (total, heads_kv, page_size, head_dim) if hnd else (total, page_size, heads_kv, head_dim)
    if one_tensor:
        kv = torch.randn((total, 2, *shape[1:]), generator=generator).to(kv_dtype)
        k, v = kv[:, 0], kv[:, 1]
    else:
        k = torch.randn(shape, generator=generator).to(kv_dtype)
        v = torch.randn(shape, generator=generator).to(kv_dtype)
    if hnd:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    order = torch.randperm(total, generator=generator).int()
    indptr = torch.tensor([0, *np.cumsum(pages)], dtype=torch.int32)
    last = torch.tensor([(n - 1) % page_size + 1 if n else 0 for n in lengths], dtype=torch.int32)
    used = torch.zeros(total, page_size, dtype=torch.bool)
    for r, length in enumerate(lengths):
        for i, page in enumerate(order[indptr[r] : indptr[r + 1]].tolist()):
            used[page, : min(page_size, length - i * page_size)] = True
    for x in (k, v):
        x.copy_(torch.where(used[:, :, None, None], x.float(), float("nan")).to(kv_dtype))
    q = torch.randn(len(lengths) * q_len, heads_q, head_dim, generator=generator).to(dtype)
    return Problem(q, k, v, indptr, order[: indptr[-1]].clone(), last, **options)
