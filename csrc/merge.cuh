// Putting together what several warps, then several blocks, computed of one request and kv head. Always in the order of
// the splits, so the result does not depend on who finished first.
//
// Warps meet in shared memory at the block's end. Blocks meet in global memory, row by row: each leaves a partial and
// counts itself; the one that finds the others there merges. Where shares are of few pieces one warp of each block
// meets others for all rows at once, and warps that read kv heads abreast each do so by themselves. Nobody waits for
// another, so no order of execution can hang.
#pragma once

#include "attention.cuh"

namespace fi_prefetch {

/// A request and head that several warps have tiles of, as far as a block is concerned.
struct __align__(16) Share {
  uint32_t request;
  uint32_t head;
  uint16_t first;  // the blocks that have, or the workers of the partition where heads are read abreast
  uint16_t count;
  uint8_t warps;    // of this block that have tiles of it: a bit each
  uint8_t goes_on;  // those of them after which it goes on in another warp
  bool leads;       // the warp that keeps this is the first of `warps`, and the block merges it row by row
  bool alone;       // this warp merges what the block has, all rows at once and in its registers; then nobody leads
};

/// A query row's sums over several splits; lane l has the dimensions from l * kVector.
template <typename T>
struct MergedRow {
  static constexpr int kVector = T::kHeadDim / 32;
  float output[kVector];
  float max;
  float sum;
};

template <int N>
FI_PREFETCH_DEVICE void load_vector(const float* source, float (&x)[N]) {
  if constexpr (N == 2) {
    const float2 v = ptx::load_past_l1<float2>(source);
    x[0] = v.x, x[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 v = ptx::load_past_l1<float4>(source + i);
      x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
    }
  }
}

/// Partials that are merged in one go: a lane looks after each.
constexpr uint32_t kMostPartials = 32;
constexpr uint32_t kNoPartial = 0xffffffffu;

/// Which of `count` partials (at most kMostPartials) a lane looks after: several lanes the same one where there are
/// few, so that a reduction over that many lanes reaches all.
FI_PREFETCH_DEVICE uint32_t lanes_of_partials(uint32_t count) { return count <= 8 ? 8 : 32; }

/// The greatest number of a warp's lanes, by one instruction on integers in the same order as the numbers.
FI_PREFETCH_DEVICE float max_over_lanes(float x) {
  const auto ordered = [](int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); };
  return __int_as_float(ordered(__reduce_max_sync(kFullWarp, ordered(__float_as_int(x)))));
}

/// Merges `count` rows of partials, in shared or in global memory. `place`: where the (lane %
/// lanes_of_partials(count))-th is, in floats from `base`, or kNoPartial; there is one at least. Collective over the
/// warp.
template <typename T>
FI_PREFETCH_DEVICE MergedRow<T> merge_row(const float* base, uint32_t count, uint32_t place) {
  constexpr int kVector = MergedRow<T>::kVector;
  constexpr int kPart = 32 / kVector;  // rows in 32 registers
  constexpr int kParts = static_cast<int>(kMostPartials) / kPart < 4 ? static_cast<int>(kMostPartials) / kPart : 4;
  // Rows on their way together. A second trip to L2 costs 0.4 us where 32 meet (4 MB of 8/1 heads, 8.8 us; H100).
  constexpr int kBatch = kParts * kPart;
  const uint32_t lane = lane_index();
  const uint32_t width = lanes_of_partials(count);
  // No load hangs on whether there is a partial: the compiler would wait for each before the next one. What is not
  // there is another's, with a weight of 0.
  const uint32_t some = __shfl_sync(kFullWarp, place, __ffs(__ballot_sync(kFullWarp, place != kNoPartial)) - 1);
  const uint32_t from = place == kNoPartial ? some : place;
  const float* columns = ptx::opaque(base + lane * kVector);
  float max_and_sum[2];
  load_vector<2>(base + from + T::kHeadDim, max_and_sum);
  MergedRow<T> merged;
#pragma unroll
  for (int d = 0; d < kVector; ++d) merged.output[d] = 0.0f;
  float weight = 0.0f;
#pragma unroll 1
  for (uint32_t first = 0; first < count; first += kBatch) {
    float x[kBatch][kVector];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (first + part * kPart >= count) break;
#pragma unroll
      for (int i = part * kPart; i < (part + 1) * kPart; ++i) {
        load_vector<kVector>(columns + __shfl_sync(kFullWarp, from, (first + i) % 32), x[i]);
      }
    }
    if (first == 0) {  // while the rows are on their way
      const float max = place == kNoPartial ? -INFINITY : max_and_sum[0];
      merged.max = max_over_lanes(max);
      weight = max == -INFINITY ? 0.0f : ptx::exp2_fast(max - merged.max);
      // Over all lanes, of which 32 / width have the same partial: a power of two, so nothing is rounded.
      merged.sum = weight * max_and_sum[1] * (width == 32 ? 1.0f : 0.25f);
#pragma unroll
      for (uint32_t distance = 16; distance > 0; distance /= 2) {
        merged.sum += __shfl_xor_sync(kFullWarp, merged.sum, distance);
      }
      if (lane >= count) weight = 0.0f;
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (first + part * kPart >= count) break;
#pragma unroll
      for (int i = part * kPart; i < (part + 1) * kPart; ++i) {
        const float w = __shfl_sync(kFullWarp, weight, (first + i) % 32);
#pragma unroll
        for (int d = 0; d < kVector; ++d) merged.output[d] += w * x[i][d];
      }
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

/// Counts one row of this block's partial in; whether it is the last of `expected`, which then sees what the others
/// wrote before they counted, and which sets the counter back to zero for the next call. Collective over the warp.
FI_PREFETCH_DEVICE bool arrive(int32_t* counter, uint32_t expected) {
  __syncwarp();  // the other lanes' part of the row before lane 0's count, which releases it
  int32_t before = 0;
  if (lane_index() == 0) before = ptx::add_acquire_release(counter, 1);
  const bool last = __shfl_sync(kFullWarp, before, 0) + 1 == static_cast<int32_t>(expected);
  if (last && lane_index() == 0) *counter = 0;
  __syncwarp();  // what lane 0 acquired, for every lane
  return last;
}

/// Where row n of a slot of p.partials is, in floats: below 2^32, as there are at most 2 * 1024 slots of 16 rows. A
/// block has two slots: for what it shares with blocks before it, and for what begins in it and goes on after it.
template <typename T>
FI_PREFETCH_DEVICE uint32_t partial_offset(uint32_t slot, uint32_t rows, uint32_t n) {
  return (slot * rows + n) * T::kPartialStride;
}

/// Merges one query row of a share: what this block's warps left at `place` in shared memory (see merge_row); then,
/// where several blocks have tiles of it, what they leave in global memory, by the last of them to come. Beyond
/// kMostPartials blocks these meet in two levels of about the square root of their number. Rows meet apart from each
/// other, a warp each, so no warp waits for its block. All levels run the same code, which the first one has brought
/// into the instruction cache. Collective over the warp.
template <typename T>
FI_PREFETCH_DEVICE void merge_share(const DecodeParams& p, const Share& share, uint32_t n, const float* base,
                                    uint32_t place) {
  const uint32_t rows = p.group_size * p.q_len;
  const uint32_t first_block = share.first, blocks = share.count;
  uint32_t fan_in = blocks;
  if (blocks > kMostPartials) {
    for (fan_in = 6; fan_in * fan_in < blocks;) ++fan_in;
  }
  uint32_t levels = blocks == 1 ? 0 : fan_in == blocks ? 1 : 2;  // still to come
  const auto slot = [&](uint32_t block) { return 2 * block + (block == first_block); };

  // First level of blocks: every one of a chunk of fan_in neighbours. Second: the first block's slot of every chunk.
  const uint32_t chunk = levels == 2 ? (blockIdx.x - first_block) / fan_in : 0;
  uint32_t own = slot(blockIdx.x);
  uint32_t first = first_block + chunk * fan_in, step = 1, count = min(fan_in, blocks - chunk * fan_in);
  int32_t* counter = p.counters + slot(first) * rows + n;
  uint32_t partials = warps_per_block();
#pragma unroll 1
  while (true) {
    const MergedRow<T> merged = merge_row<T>(base, partials, place);
    if (levels == 0) {
      write_row<T>(p, share.request, share.head, n, merged);
      return;
    }
    write_partial_row<T>(p.partials + partial_offset<T>(own, rows, n), merged);
    if (!arrive(counter, count)) return;
    --levels;
    base = p.partials;
    partials = count;
    const uint32_t i = lane_index() & (lanes_of_partials(count) - 1);
    place = i < count ? partial_offset<T>(slot(first + i * step), rows, n) : kNoPartial;
    own = slot(first);
    first = first_block, step = fan_in, count = (blocks + fan_in - 1) / fan_in;
    counter = p.counters + (2 * gridDim.x + first_block) * rows + n;
  }
}

/// Meets the others that have tiles of a request and head: warps that read heads abreast, or blocks, for each of which
/// one warp comes. Leaves what this one has in global memory. The last to come adds it all up, in the order of the
/// pieces, and is told so by true. Each has two places there: for what it shares with others before it, and for what
/// begins with it and goes on after it. Those of blocks are behind the rows', and they count themselves where a first
/// row would. Collective over the warp.
template <typename T>
FI_PREFETCH_DEVICE bool meet_others(const DecodeParams& p, const Share& share, uint32_t abreast_log2,
                                    WarpAttention<T>& attention) {
  const bool abreast = abreast_log2 > 0;
  const uint32_t own = abreast ? warp_number() : blockIdx.x, step = 1u << abreast_log2, rows = p.group_size * p.q_len;
  const uint32_t first = share.first * step + own % step, count = share.count;
  const uint32_t before = abreast ? 0 : partial_offset<T>(2 * gridDim.x, rows, 0);
  const auto place = [&](uint32_t i) {
    return reinterpret_cast<float4*>(p.partials + before) + (2 * i + (i == first)) * WarpAttention<T>::kSavedVectors;
  };
  attention.save(place(own));
  if (!arrive(p.counters + (abreast ? first : (2 * first + 1) * rows), count)) return false;
  attention.forget();
#pragma unroll 1
  for (uint32_t i = 0; i < count; ++i) attention.add_saved(place(first + i * step));
  return true;
}

}  // namespace fi_prefetch
