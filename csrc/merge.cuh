// Putting together what several warps, then several blocks, computed of one request and kv head. Always in the order of
// the splits, so the result does not depend on who finished first.
//
// Warps meet in shared memory at the block's end. Blocks meet in global memory: each leaves a partial and counts itself;
// the one that finds the others there merges. Nobody waits for anybody, so no order of execution can hang.
#pragma once

#include "attention.cuh"

namespace fi_prefetch {

/// What a warp leaves in shared memory of a request and head that other warps have tiles of as well.
struct __align__(16) Share {
  uint32_t request;
  uint32_t head;
  uint32_t begin;      // the request and head's tiles on the line: [begin, end)
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
    const float2 v = GLOBAL ? __ldcg(reinterpret_cast<const float2*>(source)) : *reinterpret_cast<const float2*>(source);
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

/// Merges `count` (at most 32) rows of partials; row_of(i) is the i-th one's address, or null where it has nothing.
/// GLOBAL: other blocks wrote them, so L1 must not serve them. Collective over the warp.
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
  float denominator = merged.sum;
  if (p.sinks != nullptr) {
    denominator += WarpAttention<T>::sink_weight(p.sinks[head * p.group_size + row.head], merged.max);
  }
  const float scale = merged.sum == 0.0f ? 0.0f : p.v_scale / denominator;
  const int64_t index = output_row(p, request, head, row);
  uint32_t* destination =
      reinterpret_cast<uint32_t*>(static_cast<O*>(p.o) + index * T::kHeadDim + lane_index() * kVector);
#pragma unroll
  for (int d = 0; d < kVector; d += 2) {
    destination[d / 2] = pack<O>(merged.output[d] * scale, merged.output[d + 1] * scale);
  }
  if (p.lse != nullptr && lane_index() == 0) {
    p.lse[index] = WarpAttention<T>::log_sum_exp(merged.max, merged.sum);
  }
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
  __threadfence();   // this thread's partials before the count ...
  __syncthreads();   // ... and every other thread's
  if (threadIdx.x == 0) {
    const bool last = atomicAdd(counter, 1) + 1 == static_cast<int32_t>(expected);
    if (last) *counter = 0;
    *flag = last;
    __threadfence();
  }
  __syncthreads();
  const bool last = *flag;
  __syncthreads();  // before the flag's next use
  return last;
}

/// The meeting of the blocks that share a request and head. Beyond 16 blocks it has two levels of about the square root
/// of their number: one block alone would read all partials at the 100 GB/s that an SM gets from L2.
template <typename T>
class BlockMerge {
 public:
  FI_PREFETCH_DEVICE BlockMerge(const DecodeParams& p, const Partition& partition, const Share& share)
      : p_(p), share_(share), first_block_(partition.owner(share.begin) / warps_per_block()) {
    blocks_ = partition.owner(share.end - 1) / warps_per_block() - first_block_ + 1;
    fan_in_ = blocks_;
    if (blocks_ > 16) {
      fan_in_ = 5;
      while (fan_in_ * fan_in_ < blocks_) ++fan_in_;
    }
  }

  /// Where this block's row n goes.
  FI_PREFETCH_DEVICE float* own_row(uint32_t n) const { return row(blockIdx.x, n); }

  /// Counts this block in and merges if it is the last one. Collective over the block.
  FI_PREFETCH_DEVICE void run(uint32_t* flag) const {
    const uint32_t rows = p_.group_size * p_.q_len;
    const uint32_t chunk = (blockIdx.x - first_block_) / fan_in_;
    const uint32_t chunk_first = first_block_ + chunk * fan_in_;
    const uint32_t chunks = (blocks_ + fan_in_ - 1) / fan_in_;
    const uint32_t in_chunk = min(fan_in_, blocks_ - chunk * fan_in_);
    if (!arrive(p_.counters + slot(chunk_first), in_chunk, flag)) return;
    for (uint32_t n = warp_index(); n < rows; n += warps_per_block()) {
      const MergedRow<T> merged =
          merge_row<T, true>(in_chunk, [&](uint32_t i) -> const float* { return row(chunk_first + i, n); });
      if (chunks == 1) {
        write_row<T>(p_, share_.request, share_.head, n, merged);
      } else {
        write_partial_row<T>(row(chunk_first, n), merged);
      }
    }
    if (chunks == 1) return;
    if (!arrive(p_.counters + 2 * gridDim.x + first_block_, chunks, flag)) return;
    for (uint32_t n = warp_index(); n < rows; n += warps_per_block()) {
      const MergedRow<T> merged = merge_row<T, true>(
          chunks, [&](uint32_t i) -> const float* { return row(first_block_ + i * fan_in_, n); });
      write_row<T>(p_, share_.request, share_.head, n, merged);
    }
  }

 private:
  /// A block has two places: for what it shares with blocks before it, and for what begins in it and goes on after it.
  FI_PREFETCH_DEVICE uint32_t slot(uint32_t block) const { return 2 * block + (block == first_block_); }
  FI_PREFETCH_DEVICE float* row(uint32_t block, uint32_t n) const {
    const uint32_t rows = p_.group_size * p_.q_len;
    return p_.partials + static_cast<size_t>(slot(block) * rows + n) * T::kPartialStride;
  }

  const DecodeParams& p_;
  const Share& share_;
  uint32_t first_block_;
  uint32_t blocks_;
  uint32_t fan_in_;
};

}  // namespace fi_prefetch
