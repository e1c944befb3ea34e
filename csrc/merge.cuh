// Putting together what several warps, then several blocks, computed of one request and kv head. Always in the order of
// the splits, so the result does not depend on who finished first.
//
// Warps meet in shared memory at the block's end. Blocks meet in global memory: each leaves a partial and counts
// itself; the one that finds the others there merges. Nobody waits for anybody, so no order of execution can hang.
#pragma once

#include "attention.cuh"

namespace fi_prefetch {

/// What a warp leaves in shared memory of a request and head that other warps have tiles of as well.
struct __align__(16) Share {
  uint32_t request;
  uint32_t head;
  uint32_t begin;  // the request and head's tiles on the line: [begin, end)
  uint32_t end;
  uint32_t leads;      // 1: no earlier warp of this block has a share of it
  uint32_t last_warp;  // the last one in this block that has (if `leads`)
  uint32_t padding[2];
};

/// A query row's sums over several splits; lane l has the dimensions from l * kVector.
template <typename T>
struct MergedRow {
  static constexpr int kVector = T::kHeadDim / 32;
  float output[kVector];
  float max;
  float sum;
};

template <int N, bool GLOBAL>
FI_PREFETCH_DEVICE void load_vector(const float* source, float (&x)[N]) {
  if constexpr (N == 2) {
    const float2 v =
        GLOBAL ? __ldcg(reinterpret_cast<const float2*>(source)) : *reinterpret_cast<const float2*>(source);
    x[0] = v.x, x[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4* address = reinterpret_cast<const float4*>(source + i);
      const float4 v = GLOBAL ? __ldcg(address) : *address;
      x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
    }
  }
}

/// Partials that are merged in one go: a lane looks after each.
constexpr uint32_t kMostPartials = 32;

/// Merges `count` (at most kMostPartials) rows of partials; row_of(i) is the i-th one's address, or null where it has
/// nothing. GLOBAL: other blocks wrote them, so L1 must not serve them. Collective over the warp.
template <typename T, bool GLOBAL, typename RowOf>
FI_PREFETCH_DEVICE MergedRow<T> merge_row(uint32_t count, RowOf row_of) {
  constexpr int kVector = MergedRow<T>::kVector;
  constexpr int kBatch = 32 / kVector;  // rows whose loads are in flight together: 32 registers
  const uint32_t lane = lane_index();
  float max = -INFINITY, sum = 0.0f;
  const float* own = lane < count ? row_of(lane) : nullptr;
  if (own != nullptr) {
    float x[2];
    load_vector<2, GLOBAL>(own + T::kHeadDim, x);
    max = x[0], sum = x[1];
  }
  MergedRow<T> merged;
  merged.max = max;
  for (int distance = 16; distance > 0; distance /= 2) {
    merged.max = fmaxf(merged.max, __shfl_xor_sync(kFullWarp, merged.max, distance));
  }
  const float weight = max == -INFINITY ? 0.0f : ptx::exp2_fast(max - merged.max);
  merged.sum = weight * sum;
  for (int distance = 16; distance > 0; distance /= 2) {
    merged.sum += __shfl_xor_sync(kFullWarp, merged.sum, distance);
  }
#pragma unroll
  for (int d = 0; d < kVector; ++d) merged.output[d] = 0.0f;
  for (uint32_t first = 0; first < count; first += kBatch) {
    float x[kBatch][kVector];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int d = 0; d < kVector; ++d) x[i][d] = 0.0f;
      const uintptr_t row = __shfl_sync(kFullWarp, reinterpret_cast<uintptr_t>(own), (first + i) % 32);
      if (row != 0) load_vector<kVector, GLOBAL>(reinterpret_cast<const float*>(row) + lane * kVector, x[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float w = __shfl_sync(kFullWarp, weight, (first + i) % 32);
#pragma unroll
      for (int d = 0; d < kVector; ++d) merged.output[d] += w * x[i][d];
    }
  }
  return merged;
}

/// Writes a finished row of `o` and `lse`. Collective over the warp.
template <typename T>
FI_PREFETCH_DEVICE void write_row(const DecodeParams& p, uint32_t request, uint32_t head, uint32_t n,
                                  const MergedRow<T>& merged) {
  using O = typename T::O;
  constexpr int kVector = MergedRow<T>::kVector;
  const QueryRow row(p, n);
  const RowResult result(p, head, row, merged.max, merged.sum);
  const int64_t index = output_row(p, request, head, row);
  uint32_t* destination =
      reinterpret_cast<uint32_t*>(static_cast<O*>(p.o) + index * T::kHeadDim + lane_index() * kVector);
#pragma unroll
  for (int d = 0; d < kVector; d += 2) {
    destination[d / 2] = pack<O>(merged.output[d] * result.scale, merged.output[d + 1] * result.scale);
  }
  if (p.lse != nullptr && lane_index() == 0) p.lse[index] = result.lse;
}

/// Leaves a row for other blocks (or for this one, a level on). Collective over the warp.
template <typename T>
FI_PREFETCH_DEVICE void write_partial_row(float* row, const MergedRow<T>& merged) {
  constexpr int kVector = MergedRow<T>::kVector;
#pragma unroll
  for (int d = 0; d < kVector; d += 2) {
    __stcg(reinterpret_cast<float2*>(row + lane_index() * kVector + d),
           make_float2(merged.output[d], merged.output[d + 1]));
  }
  if (lane_index() == 0) __stcg(reinterpret_cast<float2*>(row + T::kHeadDim), make_float2(merged.max, merged.sum));
}

/// Counts this block in; whether it is the last of `expected`, which then sees all that the others wrote before, and
/// which sets the counter back to zero for the next call. Collective over the block; `flag` is in shared memory.
FI_PREFETCH_DEVICE bool arrive(int32_t* counter, uint32_t expected, uint32_t* flag) {
  __syncthreads();  // the block's partials before the count, which releases them all
  if (threadIdx.x == 0) {
    const bool last = ptx::add_acquire_release(counter, 1) + 1 == static_cast<int32_t>(expected);
    if (last) *counter = 0;
    *flag = last;
  }
  __syncthreads();
  return *flag;  // the next arrive() passes its barrier before it writes the flag again
}

/// A block has two places in global memory: for what it shares with blocks before it, and for what begins in it and
/// goes on after it.
template <typename T>
FI_PREFETCH_DEVICE float* block_partial(const DecodeParams& p, uint32_t slot, uint32_t n) {
  const uint32_t rows = p.group_size * p.q_len;
  return p.partials + static_cast<size_t>(slot * rows + n) * T::kPartialStride;
}

/// The meeting of the blocks that share a request and head: counts this block in, and merges if it is the last. Beyond
/// kMostPartials blocks it has two levels of about the square root of their number: a second meeting costs 1 to 2 us,
/// and one block alone reads partials at the 100 GB/s or so that an SM gets from L2. Collective over the block; `flag`
/// is in shared memory.
template <typename T>
FI_PREFETCH_DEVICE void merge_blocks(const DecodeParams& p, const Partition& partition, const Share& share,
                                     uint32_t* flag) {
  const uint32_t rows = p.group_size * p.q_len;
  const uint32_t first_block = partition.owner(share.begin) / warps_per_block();
  const uint32_t blocks = partition.owner(share.end - 1) / warps_per_block() - first_block + 1;
  uint32_t fan_in = blocks;
  if (blocks > kMostPartials) {
    for (fan_in = 6; fan_in * fan_in < blocks;) ++fan_in;
  }
  const auto slot = [&](uint32_t block) { return 2 * block + (block == first_block); };

  // First level: every block of a chunk of fan_in neighbours. Second: the first block's place of every chunk.
  const uint32_t chunk = (blockIdx.x - first_block) / fan_in;
  uint32_t first = first_block + chunk * fan_in, step = 1, count = min(fan_in, blocks - chunk * fan_in);
  int32_t* counter = p.counters + slot(first);
#pragma unroll 1
  while (arrive(counter, count, flag)) {
    const bool done = step * count == blocks || step == fan_in;
    for (uint32_t n = warp_index(); n < rows; n += warps_per_block()) {
      const MergedRow<T> merged = merge_row<T, true>(
          count, [&](uint32_t i) -> const float* { return block_partial<T>(p, slot(first + i * step), n); });
      if (done) {
        write_row<T>(p, share.request, share.head, n, merged);
      } else {
        write_partial_row<T>(block_partial<T>(p, slot(first), n), merged);
      }
    }
    if (done) return;
    first = first_block, step = fan_in, count = (blocks + fan_in - 1) / fan_in;
    counter = p.counters + 2 * gridDim.x + first_block;
  }
}

}  // namespace fi_prefetch
