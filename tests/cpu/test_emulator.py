"""The emulator in tests/emulator/ against independent arithmetic, and against faults that it must find."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from emulator import build as emu

# Every kernel has one signature, so that one C++ macro and one Python function serve them all.
SOURCE = r"""
#include "ptx.cuh"
namespace ptx = fi_prefetch::ptx;
template <typename T> T* shared() { return reinterpret_cast<T*>(ptx::dynamic_shared_memory()); }

#define KERNEL(name)                                                                                             \
  __global__ void __launch_bounds__(256) name(const uint32_t* in, uint32_t* out, int variant);                   \
  EMULATOR_EXPORT const char* run_##name(const uint32_t* in, uint32_t* out, int64_t variant, int64_t blocks,     \
                                         int64_t threads, int64_t bytes, int64_t seed, void (*end)()) {          \
    emulator::Launch launch{.grid = dim3(blocks), .block = dim3(threads), .shared_bytes = size_t(bytes),         \
                            .seed = uint64_t(seed), .round_limit = 10000};                                       \
    if (end) launch.dependencies_end = end;                                                                      \
    return emulator::launch(launch, name, in, out, int(variant));                                                \
  }                                                                                                              \
  void name(const uint32_t* in, uint32_t* out, int variant)

KERNEL(shuffle) {  // variant: width; in: [4][32] source lane, delta, delta, lane mask
  const int t = threadIdx.x;
  const int64_t wide = (int64_t(t) << 40) + 7;
  const float real = t + 0.5f;
  out[t] = __shfl_sync(~0u, t, in[t], variant);
  out[32 + t] = __shfl_up_sync(~0u, wide, in[32], variant) >> 40;
  out[64 + t] = __shfl_down_sync(~0u, real, in[64], variant);
  out[96 + t] = __shfl_xor_sync(~0u, __float2bfloat16(real), in[96], variant);
}

KERNEL(vote) {  // in: [32]
  const int t = threadIdx.x;
  const uint32_t half = t < 16 ? 0xFFFF : 0xFFFF0000;
  const uint32_t results[] = {__ballot_sync(~0u, in[t] & 1), uint32_t(__any_sync(half, in[t] > 90)),
                              uint32_t(__all_sync(half, in[t] > 5)), __reduce_add_sync(half, in[t]),
                              uint32_t(__reduce_max_sync(~0u, int(in[t]) - 50))};
  for (int i = 0; i < 5; ++i) out[i * 32 + t] = results[i];
}

KERNEL(block_vote) {  // some threads exit first
  const int t = threadIdx.x;
  if (t >= 40) return;
  out[t] = __syncthreads_count(in[t] & 1);
  out[t] += 100 * __syncthreads_or(t == 39);
  out[t] += 1000 * __syncthreads_and(t < 39) + 10000 * __syncthreads_and(t < 40);
}

KERNEL(load_matrix) {  // in: [32 rows] as stored, then [32] row index for each lane
  const int t = threadIdx.x;
  for (int i = t; i < 128; i += 32) shared<uint32_t>()[i] = in[i];
  __syncwarp();
  uint32_t r[4];
  const uint32_t address = ptx::shared_address(shared<uint8_t>()) + 16 * in[128 + t];
  if (variant) ptx::load_matrix_x4_transposed(r, address);
  else ptx::load_matrix_x4(r, address);
  for (int i = 0; i < 4; ++i) out[i * 32 + t] = r[i];
}

KERNEL(load_copied_matrix) {  // variant 1: no wait, 2: no __syncwarp after it, 3: a shuffle instead
  const int t = threadIdx.x;
  uint32_t r[4];
  const uint32_t address = ptx::shared_address(shared<uint8_t>()) + 16 * t;
  ptx::copy_async_16(address, in + 4 * (t / 2), ptx::policy_evict_normal());
  ptx::copy_async_commit();
  if (variant != 1) ptx::copy_async_wait<0>();
  if (variant == 3) __shfl_sync(~0u, t, 0);
  if (variant < 2) __syncwarp();
  ptx::load_matrix_x4(r, address);
  ptx::copy_async_wait<0>();
  for (int i = 0; i < 4; ++i) out[i * 32 + t] = r[i];
}

KERNEL(transpose) { out[threadIdx.x] = ptx::transpose_matrix(in[threadIdx.x]); }

KERNEL(multiply) {  // in: [10][32] a0..a3, b0, b1, d0..d3
  const int t = threadIdx.x;
  const uint32_t a[4] = {in[t], in[32 + t], in[64 + t], in[96 + t]};
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(in[(6 + i) * 32 + t]);
  if (variant) ptx::multiply_add<__half>(d, a, in[128 + t], in[160 + t]);
  else ptx::multiply_add<__nv_bfloat16>(d, a, in[128 + t], in[160 + t]);
  for (int i = 0; i < 4; ++i) out[i * 32 + t] = __float_as_uint(d[i]);
}

// Two groups of one 16-byte copy each; what the thread sees after
// waiting for the first, then for both. variant 1: without the second wait. 2: without the first. 3: with a store to
// what the second is about to write.
KERNEL(copy) {
  const int t = threadIdx.x;
  const uint32_t address = ptx::shared_address(shared<uint8_t>() + t * 32);
  ptx::copy_async_16(address, in + t * 8, ptx::policy_evict_normal());
  ptx::copy_async_commit();
  ptx::copy_async_16(address + 16, in + t * 8 + 4, ptx::policy_evict_first());
  ptx::copy_async_commit();
  if (variant == 3) shared<uint32_t>()[t * 8 + 4] = 1;
  if (variant != 2) ptx::copy_async_wait<1>();
  for (int i = 0; i < 4; ++i) out[t * 8 + i] = shared<uint32_t>()[t * 8 + i];
  if (variant != 1) ptx::copy_async_wait<0>();
  for (int i = 4; i < 8; ++i) out[t * 8 + i] = shared<uint32_t>()[t * 8 + i];
}

// Two tokens' rows of a tensor [3 pages][2 heads][2 columns][4 tokens][128 bytes], whose token stride is 512 bytes and
// whose columns lie side by side, to shared memory: head 1, tokens 2 and 3. in: page. variant 1: no wait. 2: ends
// before its bytes have come. 3: no barrier. 4: bytes that never come. 5: a lane names another page. 6: a store to
// where the copy goes. 7: twice the same phase. Then the next phase, of the next page.
KERNEL(tensor_copy) {
  const int t = threadIdx.x;
  alignas(64) CUtensorMap map;
  const cuuint64_t sizes[5] = {128, 4, 2, 2, 3}, strides[4] = {512, 128, 256, 2048};
  const cuuint32_t box[5] = {128, 2, 2, 1, 1}, steps[5] = {1, 1, 1, 1, 1};
  const auto encode = [&](uint32_t rank) {
    return emulator::encode_tiled(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, rank, const_cast<uint32_t*>(in + 4), sizes,
                                  strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                  CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  if (encode(3) == CUDA_SUCCESS || encode(5) != CUDA_SUCCESS) return;
  const uint32_t tile = ptx::shared_address(shared<uint8_t>()), barrier = tile + 1024;
  if (t == 0 && variant != 3) ptx::barrier_init(barrier);
  __syncwarp();
  for (uint32_t phase = 0; phase < 2; ++phase) {
    const int32_t page = int32_t(in[0]) + phase + (variant == 5 && t == 7);
    ptx::barrier_expect(barrier, variant == 4 ? 528 : 512);
    if (variant == 7) ptx::barrier_expect(barrier, 0);
    ptx::copy_tensor(tile, &map, {0, 2, 0, 1, page}, barrier, ptx::policy_evict_first());
    if (variant == 2) return;
    if (variant == 6) shared<uint32_t>()[t] = 1;
    while (variant != 1 && !__all_sync(~0u, ptx::barrier_passed(barrier, phase))) {
    }
    uint32_t r[4];
    __syncwarp();
    ptx::load_matrix_x4(r, tile + 16 * t);
    for (int i = 0; i < 4; ++i) out[(phase * 4 + i) * 32 + t] = r[i];
    __syncwarp();
  }
}

KERNEL(reverse) {  // variant 0: right, 1: no barrier, 2: a barrier that only half of the block reaches
  const int t = threadIdx.x;
  shared<uint32_t>()[t] = in[t];
  if (variant == 0 || (variant == 2 && t < 32)) __syncthreads();
  if (variant == 2 && t >= 32) __syncthreads();
  out[t] = shared<uint32_t>()[blockDim.x - 1 - t];
}

KERNEL(warp_reverse) {  // the same within one warp
  shared<uint32_t>()[threadIdx.x] = in[threadIdx.x];
  if (variant == 0) __syncwarp();
  out[threadIdx.x] = shared<uint32_t>()[31 - threadIdx.x];
}

__attribute__((noinline)) uint32_t overflow_the_stack(uint32_t n) {
  volatile uint32_t frame[64] = {n};
  return n ? overflow_the_stack(n + 1) + frame[0] : 0;
}

KERNEL(fault) {
  const int t = threadIdx.x;
  uint32_t r[4];
  const uint32_t base = ptx::shared_address(shared<uint8_t>());
  switch (variant) {
    case 0: if (t < 5) __shfl_sync(~0u, t, 0); else __ballot_sync(~0u, 1); break;
    case 1: if (t == 5) return; __shfl_sync(~0u, t, 0); break;
    case 2: if (t < 5) __syncthreads(); else __syncwarp(); break;
    case 3: if (t < 16) __shfl_sync(0xFFFF, t, 20); break;
    case 4: if (t < 16) __shfl_sync(0xFFFF0000, t, 20); break;
    case 5: ptx::load_matrix_x4(r, base + 8); break;
    case 6: ptx::load_matrix_x4(r, base + 1024 - 16 + 16 * (t == 31)); break;
    case 7: ptx::copy_async_16(base + t * 16, reinterpret_cast<const uint8_t*>(in) + 4, ptx::policy_evict_normal());
      break;
    case 8: ptx::copy_async_16(base + 16 * t, in + 1024, ptx::policy_evict_normal()); break;
    case 9: ptx::shared_address(in); break;
    case 10: shared<uint8_t>()[1024 + t] = 0; break;
    case 11: ptx::prefetch_l2(in + 1024); break;
    case 12: ptx::bulk_prefetch_l2(in, 4112); break;
    case 13: ptx::bulk_prefetch_l2(in + 1, 64); break;
    case 14: ptx::copy_async_16(base + 16 * t, in, 5); break;
    case 15: __ldg(in - 1); break;
    case 16: __ldcg(reinterpret_cast<const uint4*>(in + 1)); break;
    case 17: while (true) __threadfence(); break;
    case 18: if (t < 16) { for (int i = 0; i < 2; ++i) __syncwarp(); } else { __syncwarp(); } break;
    case 19: out[0] = *reinterpret_cast<volatile uint32_t*>(8); break;
    case 20: __syncwarp(); out[0] = overflow_the_stack(1); break;
  }
  ptx::copy_async_commit();
  ptx::copy_async_wait<0>();
}

KERNEL(endless) { for (uint32_t i = 0; in[0] == 0; ++i) *const_cast<volatile uint32_t*>(out) = i; }

// Each block writes a partial; the last to arrive adds them in order and resets the counter. out: [1] counter, [2] the
// result of each warp, then partials. variant 1: arrives before it has written; 2: before its second warp surely has.
KERNEL(last_block) {
  const int t = threadIdx.x;
  uint32_t* partials = out + 3;
  const auto write = [&] { __stcg(&partials[blockIdx.x * blockDim.x + t], in[blockIdx.x] * (t + 1)); };
  if (variant != 1) write();
  __threadfence();
  if (variant != 2) __syncthreads();
  if (t == 0) shared<uint32_t>()[0] = atomicAdd(&out[0], 1) == gridDim.x - 1;
  __syncthreads();
  if (variant == 1) write();
  if (!shared<uint32_t>()[0]) return;
  __threadfence();
  uint32_t sum = 0;
  for (uint32_t b = 0; b < gridDim.x; ++b) sum = sum * 3 + __ldcg(&partials[b * blockDim.x + t]);
  sum = __reduce_add_sync(~0u, sum);
  if (t % 32 == 0) out[1 + t / 32] = sum;
  if (t == 0) out[0] = 0;
}

KERNEL(dependencies) {  // out: [blocks][2][threads] what is read before and after; 1: writes before, 2: through L1
  const uint32_t i = blockIdx.x * 2 * blockDim.x + threadIdx.x;
  const uint32_t early = __ldcg(in);
  ptx::prefetch_l2_evict_last(in);
  if (variant == 1) __stcg(&out[i], 0u);
  if (variant == 2) out[i] = __ldca(in);
  ptx::wait_for_dependencies();
  out[i] = early;
  out[i + blockDim.x] = __ldca(in);
  if (threadIdx.x == 0) ptx::launch_dependents();
}

KERNEL(prefetch) {
  if (threadIdx.x % 2) ptx::prefetch_l2(in + threadIdx.x);
  else ptx::bulk_prefetch_l2(in + threadIdx.x * 4, 64);
}

KERNEL(arithmetic) {
  int n = 0;
  const auto put = [&](uint32_t bits) { out[n++] = bits; };
  const auto put_float = [&](float x) { out[n++] = __float_as_uint(x); };
  put(__byte_perm(0x33221100, 0x778855C4, 0x7C41)), put(__popc(0xF0F1)), put(__ffs(8)), put(__clz(1));
  put(__umulhi(1u << 31, 6)), put(min(3, 2u)), put(max(-1, 2));
  put_float(ptx::exp2_fast(-INFINITY)), put_float(ptx::exp2_fast(-127.0f)), put_float(ptx::exp2_fast(3.0f));
  put_float(ptx::log2_fast(8.0f)), put_float(min(NAN, 2.0f)), put_float(__fdividef(1.0f, 4.0f));
  const __nv_bfloat162 b = __floats2bfloat162_rn(1.5f, -2.0f), bb = __hmul2(b, b), bf = __hfma2(b, b, b);
  put_float(__low2float(bb)), put_float(__high2float(bf));
  const __half2 h = __floats2half2_rn(1.5f, -2.0f), hh = __hmul2(h, h), hf = __hfma2(h, h, h);
  put_float(__high2float(hh)), put_float(__low2float(hf));
  const __half2 e4m3(__nv_cvt_fp8x2_to_halfraw2(0x38C2, __NV_E4M3));
  const __half2 e5m2(__nv_cvt_fp8x2_to_halfraw2(0x3CC2, __NV_E5M2));
  put_float(__low2float(e4m3)), put_float(__high2float(e4m3));
  put_float(__low2float(e5m2)), put_float(__high2float(e5m2));
}

KERNEL(atomics) {  // in: [1] what the counters start from
  out[0] = in[0];
  atomicAdd(&out[0], 5), atomicMax(&out[0], 90u);
  out[1] = atomicExch(&out[0], 7), out[2] = atomicCAS(&out[0], 7u, 9u), out[3] = atomicCAS(&out[0], 7u, 1u);
  out[4] = atomicInc(&out[0], 9u), out[5] = atomicInc(&out[0], 9u), out[6] = out[0];
  float sum = 1.0f;
  atomicAdd(reinterpret_cast<float*>(out + 7), sum);
}
"""

SEEDS = range(40)
INDEX = np.arange(32)


@pytest.fixture(scope="module", params=["fast", "portable"])
def library(request):
    """The kernels above, with either way of switching between threads."""
    portable = request.param == "portable"
    return emu.build("test_emulator", SOURCE, {"FI_PREFETCH_EMULATOR_UCONTEXT": 1} if portable else {})


def run(library, kernel, given, size, variant=0, blocks=1, threads=32, shared=1024, seed=0, dependencies_end=None):
    """Runs a kernel on uint32 words; returns the `size` words that it wrote over zeros."""
    given = np.ascontiguousarray(given, dtype=np.uint32)
    out = np.zeros(size, dtype=np.uint32)
    emu.register(library, given, out)
    emu.call(library, f"run_{kernel}", given, out, variant, blocks, threads, shared, seed, dependencies_end)
    return out


def run_or_message(*arguments, **options):
    try:
        return run(*arguments, **options), ""
    except emu.EmulationError as error:
        return None, str(error)


def shuffle_source(kind, lane, b, width):
    """The lane that `shfl.sync` reads: the pseudo code of the PTX ISA, after CUDA's mapping of width to operand c."""
    mask, value = 32 - width, 0 if kind == "up" else 31
    max_lane, min_lane = (lane & mask) | (value & ~mask), lane & mask
    if kind == "up":
        j = lane - b
        inside = j >= max_lane
    else:
        j = {"down": lane + b, "xor": lane ^ b, "index": min_lane | (b & ~mask)}[kind]
        inside = j <= max_lane
    return j if inside else lane


@pytest.mark.parametrize("width", [2, 8, 16, 32])
@pytest.mark.parametrize("operand", [0, 1, 5, 31])
def test_shuffles(library, width, operand):
    index = (INDEX * 7 + operand) % 64  # beyond 31 wraps
    out = run(library, "shuffle", [index, [operand] * 32, [operand] * 32, [operand] * 32], 128, width, seed=operand)
    kinds = ["index", "up", "down", "xor"]
    operands = [index & 31, *[[operand] * 32] * 3]
    expected = [[shuffle_source(k, i, o[i], width) for i in INDEX] for k, o in zip(kinds, operands, strict=True)]
    np.testing.assert_array_equal(out.reshape(4, 32), expected)


def test_votes_and_reductions(library):
    x = np.random.default_rng(0).integers(0, 100, 32)
    x[20] = 3
    out = run(library, "vote", x, 160).reshape(5, 32)
    halves = x.reshape(2, 16)
    assert set(out[0]) == {sum((int(v) & 1) << i for i, v in enumerate(x))}
    np.testing.assert_array_equal(out[1], np.repeat((halves > 90).any(1), 16))
    np.testing.assert_array_equal(out[2], np.repeat((halves > 5).all(1), 16))
    np.testing.assert_array_equal(out[3], np.repeat(halves.sum(1), 16))
    assert set(out[4].view(np.int32)) == {x.max() - 50}


def test_block_votes_count_exited_threads_as_arrived(library):
    x = np.random.default_rng(1).integers(0, 100, 64)
    for seed in SEEDS:
        out = run(library, "block_vote", x, 64, threads=64, seed=seed)
        np.testing.assert_array_equal(out, np.where(np.arange(64) < 40, 10100 + (x[:40] & 1).sum(), 0))


@pytest.mark.parametrize("transposed", [0, 1])
def test_load_matrix(library, transposed):
    rng = np.random.default_rng(2)
    rows = rng.integers(0, 1 << 16, (32, 8), dtype=np.uint16)
    order = rng.permutation(32)
    out = run(library, "load_matrix", np.concatenate([rows.view(np.uint32).ravel(), order]), 128, transposed)
    matrices = rows[order].reshape(4, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    # Lane l holds row l / 4, elements 2 (l % 4) and the next: the matrix in row-major order, two elements a lane.
    np.testing.assert_array_equal(out.view(np.uint16).reshape(4, 8, 8), matrices)


@pytest.mark.parametrize(
    "rows, conflicts",
    [
        (INDEX, 0),  # 8 rows of 16 bytes in a row: all 32 banks once
        (INDEX * 0, 0),  # one address is read once for all
        (INDEX % 4 + INDEX % 8 // 4 * 8, 4),  # rows 8 apart share their banks: two in each of the 4 matrices
        (INDEX % 4 * 8, 12),  # four in each
    ],
)
def test_load_matrix_counts_bank_conflicts(library, rows, conflicts):
    run(library, "load_matrix", np.concatenate([np.zeros(128), rows]), 128)
    assert emu.statistics(library)["matrix_load_conflicts"] == conflicts


def test_transpose_matrix(library):
    matrix = np.random.default_rng(3).integers(0, 1 << 16, (8, 8), dtype=np.uint16)
    out = run(library, "transpose", matrix.view(np.uint32).ravel(), 32)
    np.testing.assert_array_equal(out.view(np.uint16).reshape(8, 8), matrix.T)


def fragment_places(registers, kind):
    """(row, column) of element i of lane l in a fragment of mma.m16n8k16, as the PTX ISA states them: [32, i, 2]."""
    places = np.empty((32, registers, 2), dtype=int)
    for lane in INDEX:
        group, thread = lane >> 2, lane % 4
        for i in range(registers):
            if kind == "a":
                row = group if i < 2 or 4 <= i < 6 else group + 8
                places[lane, i] = row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)
            elif kind == "b":
                places[lane, i] = thread * 2 + (i & 1) + (8 if i >= 2 else 0), group
            else:
                places[lane, i] = group if i < 2 else group + 8, thread * 2 + (i & 1)
    return places


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("special", [False, True])
def test_multiply_add(library, dtype, special):
    rng = np.random.default_rng(4)

    def operand(shape):
        x = rng.standard_normal(shape).astype(np.float32)
        if special:
            x.flat[:4] = [1e-6, -3e-7, np.inf, 0]  # the first two are denormals of half
        if dtype == "float16":
            return x.astype(np.float16).astype(np.float32), x.astype(np.float16).view(np.uint16)
        bits = (x.view(np.uint32) >> 16).astype(np.uint16)
        return (bits.astype(np.uint32) << 16).view(np.float32), bits

    def fragments(matrix, places):  # [registers, 32] of 32-bit words
        picked = matrix[places[..., 0], places[..., 1]]
        return np.ascontiguousarray(picked).view(np.uint32).T

    (a, a_bits), (b, b_bits) = operand((16, 16)), operand((16, 8))
    d = rng.standard_normal((16, 8)).astype(np.float32)
    places = {"a": fragment_places(8, "a"), "b": fragment_places(4, "b"), "d": fragment_places(4, "d")}
    given = np.concatenate([fragments(a_bits, places["a"]), fragments(b_bits, places["b"]), fragments(d, places["d"])])
    out = run(library, "multiply", given, 128, int(dtype == "float16")).view(np.float32).reshape(4, 32)
    result = np.empty((16, 8), dtype=np.float32)
    result[places["d"][..., 0], places["d"][..., 1]] = out.T
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(result, a.astype(float) @ b.astype(float) + d, rtol=1e-5, atol=1e-5)


def test_copy_fills_16_bytes(library):
    x = np.arange(256) + 1
    expected = x.reshape(32, 8)
    for seed in SEEDS:
        out = run(library, "copy", x, 256, seed=seed)
        np.testing.assert_array_equal(out.reshape(32, 8), expected)
    counts = emu.statistics(library)
    assert (counts["copies"], counts["copied_bytes"], counts["copies_evict_first"]) == (64, 32 * 32, 32)


def test_copy_without_its_wait_is_an_error(library):
    for seed in SEEDS:
        _, message = run_or_message(library, "copy", np.arange(256), 256, variant=1, seed=seed)
        assert "never waited for" in message


def test_copy_read_before_its_wait_is_nan(library):
    x = np.arange(256) + 1
    read = np.array([run(library, "copy", x, 256, variant=2, seed=s).reshape(32, 8)[:, :4] for s in SEEDS])
    landed = read == x.reshape(32, 8)[:, :4]
    assert np.all(landed | (read == 0xFFFFFFFF))
    assert landed.any() and not landed.all()  # hardware may be early too


def test_copies_of_other_lanes_need_a_wait_and_a_warp_barrier(library):
    x = np.arange(1024, dtype=np.uint32)
    for seed in SEEDS:
        run(library, "load_copied_matrix", x, 128, seed=seed)
        for variant in 1, 2, 3:
            with pytest.raises(emu.EmulationError, match="load_matrix_x4: reads a copy without its wait"):
                run(library, "load_copied_matrix", x, 128, variant, seed=seed)


def test_store_under_a_copy_in_flight_is_an_error(library):
    messages = [run_or_message(library, "copy", np.arange(256), 256, variant=3, seed=seed)[1] for seed in SEEDS]
    assert sum("written while it was in flight" in message for message in messages) > len(SEEDS) // 2


def tensor_words():
    """`in` of the kernel: page, padding, then every word its own number; and its rows as the copy should find them."""
    words = np.arange(4 + 3 * 512, dtype=np.uint32)
    rows = {}
    for page in range(3):
        for column in range(2):
            for token in (2, 3):
                # Strides in words: page 512, token 128, head 64, column 32.
                rows[page, column, token - 2] = words[4 + page * 512 + token * 128 + 64 + column * 32 :][:32]
    return words, rows


@pytest.mark.parametrize("page", [0, 1, 2, -1])
def test_tensor_copies(library, page):
    """Rows of a column one after the other, 16-byte chunks swizzled by the row; zeros outside of the tensor."""
    words, rows = tensor_words()
    words[0] = page % 2**32
    for seed in SEEDS:
        out = run(library, "tensor_copy", words, 256, shared=1040, seed=seed)
        for phase in range(2):
            # ldmatrix gives word l of matrix i, row l / 4: 32 rows of 16 bytes, in the order of shared memory.
            got = out[phase * 128 : phase * 128 + 128].reshape(4, 32).reshape(32, 4)
            for column in range(2):
                for token in range(2):
                    row = column * 2 + token
                    expected = rows.get((page + phase, column, token), np.zeros(32, dtype=np.uint32)).reshape(8, 4)
                    found = got[row * 8 : row * 8 + 8]
                    np.testing.assert_array_equal(found, expected[np.arange(8) ^ row])
    counts = emu.statistics(library)
    assert (counts["tensor_copies"], counts["copied_bytes"]) == (2, 1024)


@pytest.mark.parametrize(
    "variant, message",
    [
        (1, "load_matrix_x4: reads a copy without its wait"),
        (2, "a block ends while the copy of a tensor's box is on its way"),
        (3, "there is no barrier at"),
        (4, "does not end"),
        (5, "copy_tensor: lane .* has other operands"),
        (6, "written while it was in flight"),
        (7, "the phase has had its arrival"),
    ],
)
def test_faults_of_tensor_copies_are_found(library, variant, message):
    words, _ = tensor_words()
    words[0] = 0
    for seed in SEEDS:
        with pytest.raises(emu.EmulationError, match=message):
            run(library, "tensor_copy", words, 256, variant, shared=1040, seed=seed)


@pytest.mark.parametrize("kernel, threads", [("reverse", 128), ("warp_reverse", 32)])
def test_missing_barrier_is_seen(library, kernel, threads):
    x = np.arange(threads) + 1
    for seed in SEEDS:
        np.testing.assert_array_equal(run(library, kernel, x, threads, threads=threads, seed=seed), x[::-1])
    wrong = [np.any(run(library, kernel, x, threads, 1, threads=threads, seed=s) != x[::-1]) for s in SEEDS]
    assert sum(wrong) > len(SEEDS) // 2


def test_barriers_at_different_places_are_an_error(library):
    _, message = run_or_message(library, "reverse", np.arange(64), 64, variant=2, threads=64)
    assert "divergence: this thread is in __syncthreads, others in __syncthreads" in message


NOT_REGISTERED, MISALIGNED = "in no registered range", "is not a multiple of 16"
FAULTS = [
    "divergence: this lane is in .*, lane .* at test_emulator:",
    "divergence: .*exit",
    "deadlock: .*\n  block .0, 0, 0. warp 0: lanes 0x1f are in __syncthreads .*\n .* 0xffffffe0 are in __syncwarp",
    "reads lane 20, outside mask 0xffff",
    "lane .* is not in its own mask",
    MISALIGNED,
    "16 bytes at offset 1024 of 1024 bytes of shared memory",
    MISALIGNED,
    NOT_REGISTERED,
    "is not in the block's shared memory",
    "a byte 1 beyond the end of its shared memory was written",
    "prefetch_l2: .* " + NOT_REGISTERED,
    "bulk_prefetch_l2: 4112 bytes .* " + NOT_REGISTERED,
    "bulk_prefetch_l2: .* " + MISALIGNED,
    "not an L2 policy",
    "__ldg: .* " + NOT_REGISTERED,
    "__ldcg: .* " + MISALIGNED,
    "does not end",
    "divergence: .*exit",
    "at the start:0: Segmentation fault at 0x8, some time after",
    "at test_emulator:.*: Segmentation fault",
]


@pytest.mark.parametrize("variant", range(len(FAULTS)))
def test_faults_are_found(library, variant):
    memory = np.zeros(1028, dtype=np.uint32)
    given = memory[-(memory.ctypes.data // 4) % 4 :][:1024]  # aligned to 16 bytes
    emu.register(library, given)
    for seed in range(10):
        with pytest.raises(emu.EmulationError) as error:
            emu.call(library, "run_fault", given, given, variant, 1, 32, 1024, seed, None)
        assert re.search(FAULTS[variant], str(error.value))
    run(library, "transpose", INDEX, 32)  # a launch that was given up leaves nothing behind


@pytest.mark.slow
def test_a_thread_without_end_is_found(library):
    with pytest.raises(emu.EmulationError, match="the thread does not end"):
        run(library, "endless", [0], 1, threads=1)


def test_no_stack_outlives_its_launch(library):
    """Each is two mappings, and all libraries of a process share the 65,530 that Linux allows it."""

    def mappings():
        return len(Path("/proc/self/maps").read_text().splitlines())

    run_or_message(library, "transpose", INDEX, 32)
    before = mappings()
    run(library, "block_vote", np.arange(256), 256, blocks=4, threads=256)
    _, message = run_or_message(library, "reverse", np.arange(256), 256, variant=2, blocks=4, threads=256)
    assert "divergence" in message
    assert mappings() < before + 2 * 32, "fewer than a warp's"


@pytest.mark.parametrize("blocks, threads, shared", [(0, 32, 0), (1, 0, 0), (1, 1056, 0), (1, 32, 227 * 1024 + 1)])
def test_invalid_launches(library, blocks, threads, shared):
    with pytest.raises(emu.EmulationError, match="not a valid launch"):
        run(library, "transpose", INDEX, 32, blocks=blocks, threads=threads, shared=shared)


def test_merge_by_the_last_block(library):
    x = np.arange(11) + 1
    total = int((x * 3 ** np.arange(11)[::-1]).sum())
    expected = [0, total * sum(range(1, 33)), total * sum(range(33, 65))]

    def merge(variant, seed):
        return run(library, "last_block", x, 3 + 11 * 64, variant, blocks=11, threads=64, seed=seed)[:3].tolist()

    for seed in SEEDS:
        assert merge(0, seed) == expected
    for variant in 1, 2:
        assert any(merge(variant, seed) != expected for seed in SEEDS)


def test_memory_changes_when_dependencies_end(library):
    x = np.array([1], dtype=np.uint32)
    saw_old = saw_new = 0
    for seed in SEEDS:
        x[0] = 1
        options = {"blocks": 6, "threads": 64, "seed": seed, "dependencies_end": lambda: x.fill(2)}
        out = run(library, "dependencies", x, 6 * 128, **options)
        before, after = out.reshape(6, 2, 64).transpose(1, 0, 2)
        assert set(before.ravel()) <= {1, 2} and np.all(after == 2)
        saw_old += np.any(before == 1)
        saw_new += np.any(before == 2)
    assert saw_old == len(SEEDS) and saw_new  # 4 blocks are resident: the others may start after the end
    counts = emu.statistics(library)
    assert counts["threads"] == counts["threads_that_waited"] == counts["waits_for_dependencies"] == 6 * 64
    assert counts["threads_that_launched"] == counts["launches_of_dependents"] == 6
    with pytest.raises(emu.EmulationError, match="__stcg: writes global memory before the dependencies have ended"):
        run(library, "dependencies", x, 6 * 128, 1, blocks=6, threads=64, dependencies_end=lambda: None)
    with pytest.raises(emu.EmulationError, match="__ldca: reads through L1 before the dependencies have ended"):
        run(library, "dependencies", x, 6 * 128, 2, blocks=6, threads=64, dependencies_end=lambda: None)


def test_prefetches_are_recorded(library):
    x = np.zeros(4 * 64 + 16, dtype=np.uint32)
    run(library, "prefetch", x, 1, blocks=2, threads=64, seed=3)
    recorded = emu.prefetches(library)
    counts = emu.statistics(library)
    assert len(recorded) == counts["prefetches"] == 128
    assert recorded["bytes"].sum() == counts["prefetched_bytes"] == 64 * 128 + 64 * 64
    assert {(p["block"], p["thread"]) for p in recorded} == {(b, t) for b in range(2) for t in range(64)}
    t = recorded["thread"].astype(np.uint64)
    np.testing.assert_array_equal(recorded["address"] - x.ctypes.data, np.where(t % 2 == 1, 4 * t, 16 * t))
    assert not recorded["evict_last"].any() and recorded["before_dependencies"].all()
    run(library, "transpose", INDEX, 32)
    assert len(emu.prefetches(library)) == 0


def test_arithmetic(library):
    words = run(library, "arithmetic", INDEX, 21, threads=1)
    assert words[:7].tolist() == [0x77FFC411, 9, 4, 31, 3, 2, 2]
    floats = [0, 0, 8, 3, 2, 0.25, 2.25, 2, 4, 3.75, -2.5, 1, -3, 1]
    assert words[7:].view(np.float32).tolist() == floats


def test_atomics(library):
    out = run(library, "atomics", [80], 8, threads=1)
    assert out[:7].tolist() == [1, 90, 7, 9, 9, 0, 1]
    assert out[7:].view(np.float32) == 1.0


def test_a_seed_is_one_interleaving(library):
    def order(seed):
        run(library, "prefetch", np.zeros(1024), 1, blocks=8, threads=64, seed=seed)
        recorded = emu.prefetches(library)
        return tuple(zip(recorded["block"].tolist(), recorded["thread"].tolist(), strict=True))

    orders = [order(seed) for seed in SEEDS]
    assert orders == [order(seed) for seed in SEEDS]
    assert len(set(orders)) == len(SEEDS)


def test_compiler_output_reaches_the_caller():
    with pytest.raises(RuntimeError, match="(?s)could not compile broken.*does_not_exist"):
        emu.build("broken", "int f() { return does_not_exist; }")
    with pytest.raises(RuntimeError, match="dynamic shared memory only"):
        emu.build("static_shared", "__global__ void f() { __shared__ int x; x = 0; }")
    with pytest.raises(RuntimeError, match="sanitizer_environment"):
        emu.build("sanitized", "", sanitize=True)


SANITIZED = r"""
import sys
import numpy as np
from emulator import build as emu

lib = emu.build("sanitized", '''
#include "ptx.cuh"
__global__ void copy(const uint32_t* in, uint32_t* out, int from) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(fi_prefetch::ptx::dynamic_shared_memory());
  shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = from < 64 ? shared[from] : in[from];
}
EMULATOR_EXPORT const char* run(const uint32_t* in, uint32_t* out, int64_t from) {
  return emulator::launch({.grid = 4, .block = 32, .shared_bytes = 128}, copy, in, out, int(from));
}
''')
given, out = np.arange(80, dtype=np.uint32), np.zeros(32, dtype=np.uint32)
emu.call(lib, "run", given, out, int(sys.argv[1]))
assert set(out) == {int(sys.argv[1])}
print("clean")
"""


@pytest.mark.slow
@pytest.mark.parametrize("index, found", [(31, None), (32, "use-after-poison"), (80, "heap-buffer-overflow")])
def test_sanitizer_sees_plain_accesses(index, found):
    environment = emu.sanitizer_environment()
    environment["PYTHONPATH"] = str(Path(emu.__file__).parent.parent)
    result = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(index)], env=environment, capture_output=True, text=True, check=False
    )
    if found:
        assert result.returncode != 0 and found in result.stderr
    else:
        assert (result.returncode, result.stdout) == (0, "clean\n"), result.stderr
