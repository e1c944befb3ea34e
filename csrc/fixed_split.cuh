// The batch-invariant kernel: the same request gives the same bits, whatever else is in the batch. The decode kernel
// cuts the line of all tiles into equal pieces, so where a request is cut, and in which order its parts are added,
// hangs on the others. Here every request is cut at fixed distances from its own first tile.
//
//   a block       takes split after split; its warps share a split's tiles evenly
//   the block     merges its warps' parts, in their order
//   the last one  of a request and kv head's splits to be done merges them, in their order
//
// Only the fewest blocks and the longest split decide when this ends, so it is slower than the decode kernel where a
// batch has few splits.
#pragma once

#include "decode.cuh"

namespace fi_prefetch {

struct FixedSplitParams {
  uint32_t tiles;     // of a split
  uint32_t capacity;  // splits that p.partials and p.counters have room for
};

/// As many tiles as no request has: its whole length is one split.
constexpr uint32_t kWholeRequest = 1u << 28;

/// Another row's sums added to a row's.
template <typename T>
FI_PREFETCH_DEVICE void add_row(MergedRow<T>& row, const MergedRow<T>& next) {
  const float max = fmaxf(row.max, next.max);
  const float weight = row.max == -INFINITY ? 0.0f : ptx::exp2_fast(row.max - max);
  const float next_weight = next.max == -INFINITY ? 0.0f : ptx::exp2_fast(next.max - max);
#pragma unroll
  for (int d = 0; d < MergedRow<T>::kVector; ++d) {
    row.output[d] = row.output[d] * weight + next.output[d] * next_weight;
  }
  row.sum = row.sum * weight + next.sum * next_weight;
  row.max = max;
}

/// The split's tiles that this warp takes: [begin, begin + count) of the request and head's.
struct WarpTiles {
  uint32_t begin;
  uint32_t count;
  uint32_t warps;  // of the block that take some

  FI_PREFETCH_DEVICE WarpTiles(uint32_t split_begin, uint32_t split_tiles) {
    const uint32_t share = (split_tiles + warps_per_block() - 1) / warps_per_block();
    const uint32_t before = min(warp_index() * share, split_tiles);
    begin = split_begin + before;
    count = min(share, split_tiles - before);
    warps = (split_tiles + share - 1) / share;
  }
};

/// Streams a warp's tiles, and leaves their sums in shared memory. Collective over the warp.
template <typename T>
FI_PREFETCH_DEVICE void attend_to(const DecodeParams& p, TileCursor<T::kWindow> at, uint32_t count,
                                  KvPipeline<T>& pipeline, WarpAttention<T>& attention, float* partial) {
  pipeline.start(at, count, Request{});
  pipeline.load_second_pages();
  if (count == 0) return;
  attention.load_query(at.request_index, at.head);
#pragma unroll 1
  for (int i = 0; i < T::kStages; ++i) pipeline.issue();
  pipeline.load_due_pages();
  attention.start();
  uint32_t stage = 0;
  int32_t token = at.token();
#pragma unroll 1
  for (uint32_t i = 0; i < count; ++i) {
    pipeline.wait(i, 1, at.request.length - token);
    attention.template add_tiles<1>({pipeline.tile(stage)}, token, at.request.length);
    token += kTileTokens;
    stage = pipeline.next(stage);
    __syncwarp();  // all lanes are done with the tile, whose stage is free
    pipeline.issue();
    pipeline.load_due_pages();
  }
  pipeline.drain();
  attention.write_partial(partial);
}

/// Row n of a split that this block is done with: merges what the warps left in shared memory and, if all other splits
/// of the request and head are done, what those left in global memory. `number`: the split's on the line; it is the
/// `split`-th of `splits`. Collective over the warp.
template <typename T>
FI_PREFETCH_DEVICE void merge_split(const DecodeParams& p, const SharedMemory<T>& shared, uint32_t warps_with_tiles,
                                    const TileCursor<T::kWindow>& at, uint32_t number, uint32_t split, uint32_t splits,
                                    uint32_t n) {
  const uint32_t rows = p.group_size * p.q_len, warps = warps_per_block();
  const uint32_t first = number - split;
  uint32_t of_lane = lane_index() & (lanes_of_partials(warps) - 1);
  const float* base = shared.left_partials;
  uint32_t count = warps;
  uint32_t place = kNoPartial;
  if (of_lane < warps_with_tiles) {
    place = static_cast<uint32_t>(shared.left_partial(of_lane, rows) - base) + n * T::kPartialStride;
  }
  MergedRow<T> merged = {{}, -INFINITY, 0.0f};
  uint32_t merged_splits = 0;  // of those in global memory; the first pass is over the warps
#pragma unroll 1
  for (bool over_warps = true;; over_warps = false) {
    add_row<T>(merged, merge_row<T>(base, count, place));
    if (over_warps) {
      if (splits == 1) break;
      write_partial_row<T>(p.partials + partial_offset<T>(number, rows, n), merged);
      if (!arrive(p.counters + first * rows + n, splits)) return;
      merged = {{}, -INFINITY, 0.0f};
      base = p.partials;
    } else {
      merged_splits += count;
      if (merged_splits == splits) break;
    }
    count = min(splits - merged_splits, kMostPartials);
    of_lane = lane_index() & (lanes_of_partials(count) - 1);
    place = of_lane < count ? partial_offset<T>(first + merged_splits + of_lane, rows, n) : kNoPartial;
  }
  write_row<T>(p, at.request_index, at.head, n, merged);
}

/// Grid: any number of blocks; block and dynamic shared memory as the decode kernel's. The number of warps is part of
/// how a split is cut, so a caller who wants the same bits keeps it.
template <typename T>
__global__ void __launch_bounds__(256, 1)
    fixed_split_kernel(const __grid_constant__ DecodeParams p, const __grid_constant__ FixedSplitParams fixed) {
  const uint32_t warp = warp_index(), warps = warps_per_block();
  const uint32_t rows = p.group_size * p.q_len;
  const SharedMemory<T> shared(ptx::dynamic_shared_memory(), warps, rows);
  KvPipeline<T> pipeline(p, shared.rings, shared.runs);
  WarpAttention<T> attention(p);
  ptx::wait_for_dependencies();
  ptx::launch_dependents();
#pragma unroll 1
  for (uint64_t position = blockIdx.x;; position += gridDim.x) {
    // Anew for every split: where a large batch's scan lies, tiles lie soon.
    ScanOf<T> scan(p, shared.rings, fixed.tiles);
    if (position == blockIdx.x && scan.some_request_is_empty()) write_empty_requests<T>(p);
    if (position >= scan.total() * p.num_kv_heads) return;
    const uint32_t number = position;
    const Location location = scan.locate(number, p.num_kv_heads);
    __syncthreads();  // all warps are done with the scan

    TileCursor<T::kWindow> at;
    at.request = location.request;
    at.request_index = location.request_index;
    at.head_step = 1;
    const uint32_t splits = max(location.splits, 1u);
    at.head = min(location.offset / splits, p.num_kv_heads - 1u);
    const uint32_t split = min(location.offset - at.head * splits, splits - 1);
    // Only a broken page table, one that lists its pages many times over, has more splits than there is room for. All
    // splits of a request and head are left out or none, so no counter is left half way.
    if (splits > 1 && (split > number || number - split + splits > fixed.capacity)) continue;
    const uint32_t split_begin = split * fixed.tiles;
    const uint32_t split_tiles = min(fixed.tiles, at.request.tiles - split_begin);
    const WarpTiles own(split_begin, split_tiles);
    at.tile = own.begin;
    attend_to<T>(p, at, own.count, pipeline, attention, shared.left_partial(warp, rows));
    __syncthreads();
    for (uint32_t n = warp; n < rows; n += warps) {
      merge_split<T>(p, shared, own.warps, at, number, split, splits, n);
    }
    __syncthreads();
  }
}

}  // namespace fi_prefetch
