// The decode kernel: attention of one or a few query tokens per request over a paged KV cache, in one launch.
//
//   every block   finds its piece of the line of all tiles                                    schedule.cuh
//   every warp    prefetches the head of its part, waits for the kernels before this one      prefetch.cuh
//                 streams its tiles through its own ring of shared memory                     pipeline.cuh
//                 and keeps softmax and output in registers                                   attention.cuh
//   the block     merges what its warps share; the last block merges what blocks share        merge.cuh
#pragma once

#include "merge.cuh"

namespace fi_prefetch {

/// The block's dynamic shared memory. The host asks for `bytes`, the kernel uses the pointers.
template <typename T>
struct SharedMemory {
  uint8_t* rings;         // [warps][kStages][kStageBytes]; before that the RequestScan, after that right shares
  TileHeader* headers;    // [warps][kStages]
  float* left_partials;   // [warps][rows][kPartialStride]
  Share* left_shares;     // [warps]: of what a warp shares with warps before it, and ends
  Share* right_shares;    // [warps]: of what goes on in the warps after it; the partial lies in the warp's ring
  uint32_t* flag;

  static constexpr uint32_t kRingBytes = T::kStages * T::kStageBytes;

  static __host__ __device__ uint32_t left_partial_bytes(uint32_t rows) {
    return rows * T::kPartialStride * sizeof(float);
  }
  static __host__ __device__ uint32_t bytes(uint32_t warps, uint32_t rows) {
    return warps * (kRingBytes + T::kStages * sizeof(TileHeader) + left_partial_bytes(rows) + 2 * sizeof(Share)) + 16;
  }
  FI_PREFETCH_DEVICE SharedMemory(uint8_t* base, uint32_t warps, uint32_t rows) {
    rings = base;
    headers = reinterpret_cast<TileHeader*>(rings + warps * kRingBytes);
    left_partials = reinterpret_cast<float*>(headers + warps * T::kStages);
    left_shares = reinterpret_cast<Share*>(left_partials + warps * rows * T::kPartialStride);
    right_shares = left_shares + warps;
    flag = reinterpret_cast<uint32_t*>(right_shares + warps);
  }
  FI_PREFETCH_DEVICE float* left_partial(uint32_t warp, uint32_t rows) const {
    return left_partials + warp * rows * T::kPartialStride;
  }
  FI_PREFETCH_DEVICE float* right_partial(uint32_t warp) const {
    return reinterpret_cast<float*>(rings + warp * kRingBytes);
  }
};

/// A warp's piece of the line of tiles.
struct Piece {
  Partition partition;
  uint32_t begin;
  uint32_t count;
  Location at;  // of `begin`, if count > 0
};

/// Reads the page table and finds this warp's piece. Collective over the block; `scan_memory` is free again after a
/// barrier.
template <typename T>
FI_PREFETCH_DEVICE Piece find_piece(const DecodeParams& p, uint8_t* scan_memory) {
  RequestScan scan;
  scan.build<T::kWindow>(p, scan_memory);
  Piece piece{cut(p, scan, gridDim.x, warps_per_block()), 0, 0, {0, 0}};
  const uint32_t worker = blockIdx.x * warps_per_block() + warp_index();
  if (worker < piece.partition.workers) {
    piece.begin = piece.partition.begin(worker);
    piece.count = piece.partition.begin(worker + 1) - piece.begin;
  }
  if (piece.count > 0) piece.at = scan.locate(piece.begin, p.num_kv_heads);
  return piece;
}

/// Requests without tiles: output 0, lse -inf. Spread over all blocks, those without other work included.
template <typename T>
FI_PREFETCH_DEVICE void write_empty_requests(const DecodeParams& p) {
  const uint32_t batch_size = p.table.batch_size;
  const uint32_t stride = gridDim.x * blockDim.x;
  for (uint32_t first = blockIdx.x + gridDim.x * warp_index() * 32; first < batch_size; first += stride) {
    const uint32_t r = first + gridDim.x * lane_index();
    const bool is_empty = r < batch_size && load_request<T::kWindow>(p, r).tiles == 0;
    for (uint32_t empty = __ballot_sync(kFullWarp, is_empty); empty != 0; empty &= empty - 1) {
      const uint32_t request = first + gridDim.x * (__ffs(empty) - 1);
      const MergedRow<T> nothing = {{}, -INFINITY, 0.0f};
      for (uint32_t head = 0; head < static_cast<uint32_t>(p.num_kv_heads); ++head) {
        for (uint32_t n = 0; n < static_cast<uint32_t>(p.group_size * p.q_len); ++n) {
          write_row<T>(p, request, head, n, nothing);
        }
      }
    }
  }
}

/// Notes what this warp leaves of a request and head, for the block's merge.
FI_PREFETCH_DEVICE void note_share(Share* shares, const Partition& partition, uint32_t piece_begin,
                                   const TileHeader& header, uint32_t begin, uint32_t end) {
  const uint32_t warps = warps_per_block();
  const uint32_t first_worker = blockIdx.x * warps;
  // A warp leads if the request and head begin in its piece, or the block's tiles do (earlier warps may have none).
  const bool leads = begin >= piece_begin || piece_begin == partition.begin(first_worker);
  const uint32_t last_warp = leads ? min(partition.owner(end - 1) - first_worker, warps - 1) : 0;
  if (lane_index() == 0) shares[warp_index()] = {header.request, header.head, begin, end, leads, last_warp, {0, 0}};
}

/// Streams the warp's tiles. Leaves what it shares with other warps in shared memory, writes the rest.
template <typename T>
FI_PREFETCH_DEVICE void process_piece(const DecodeParams& p, const Piece& piece, KvPipeline<T>& pipeline,
                                      const SharedMemory<T>& shared) {
  WarpAttention<T> attention(p);
  const uint32_t rows = p.group_size * p.q_len;
  uint32_t stage = 0;
  for (uint32_t i = 0; i < piece.count; ++i, stage = pipeline.next(stage)) {
    pipeline.wait();
    const TileHeader header = pipeline.header(stage);
    pipeline.issue();
    if (header.first) attention.start(header.request, header.head);
    attention.add_tile(pipeline.k_tile(stage), pipeline.v_tile(stage), header.token, header.length);
    if (!header.last) continue;

    attention.finish();
    const uint32_t begin = piece.begin + i - header.tile;  // of the request and head, on the line
    const uint32_t end = begin + header.tiles;
    const bool shared_before = begin < piece.begin;
    const bool shared_after = end > piece.begin + piece.count;
    if (shared_after) {
      __syncwarp();  // every lane is done with the ring, which holds no other tile: this was the piece's last
      attention.write_partial(shared.right_partial(warp_index()));
      note_share(shared.right_shares, piece.partition, piece.begin, header, begin, end);
    } else if (shared_before) {
      attention.write_partial(shared.left_partial(warp_index(), rows));
      note_share(shared.left_shares, piece.partition, piece.begin, header, begin, end);
    } else {
      attention.write_output(header.request, header.head);
    }
  }
}

/// Merges what the block's warps left, then meets the other blocks. Collective over the block, after a barrier.
template <typename T>
FI_PREFETCH_DEVICE void merge_shares(const DecodeParams& p, const Partition& partition, const SharedMemory<T>& shared) {
  const uint32_t warps = warps_per_block();
  const uint32_t first_worker = blockIdx.x * warps;
  const uint32_t rows = p.group_size * p.q_len;
  const uint32_t block_begin = partition.begin(first_worker);
  const uint32_t block_end = partition.begin(first_worker + warps);
  const Share* shared_before = nullptr;  // with the blocks before this one: at most one request and head, as is ...
  const Share* shared_after = nullptr;   // ... what begins in this block and goes on in the next
  uint32_t turn = 0;
  for (uint32_t index = 0; index < 2 * warps; ++index) {
    const uint32_t first_warp = index / 2;
    const Share& share = (index % 2 == 0 ? shared.left_shares : shared.right_shares)[first_warp];
    if (!share.leads) continue;
    const bool in_block = share.begin >= block_begin && share.end <= block_end;
    if (!in_block) (share.begin < block_begin ? shared_before : shared_after) = &share;
    for (uint32_t n = 0; n < rows; ++n) {
      if (turn++ % warps != warp_index()) continue;
      const MergedRow<T> merged =
          merge_row<T, false>(share.last_warp - first_warp + 1, [&](uint32_t i) -> const float* {
            const uint32_t warp = first_warp + i;
            const uint32_t warp_begin = partition.begin(first_worker + warp);
            const uint32_t warp_end = partition.begin(first_worker + warp + 1);
            if (warp_begin == warp_end) return nullptr;
            const float* partial = share.end <= warp_end ? shared.left_partial(warp, rows) : shared.right_partial(warp);
            return partial + n * T::kPartialStride;
          });
      if (in_block) {
        write_row<T>(p, share.request, share.head, n, merged);
      } else {
        write_partial_row<T>(BlockMerge<T>(p, partition, share).own_row(n), merged);
      }
    }
  }
  if (shared_before != nullptr) BlockMerge<T>(p, partition, *shared_before).run(shared.flag);
  if (shared_after != nullptr) BlockMerge<T>(p, partition, *shared_after).run(shared.flag);
}

/// Grid: any number of blocks up to 1,024; block: a whole number of warps, at most 8; dynamic shared memory:
/// SharedMemory<T>::bytes. Every block but those without work ends in merge_shares.
template <typename T>
__global__ void __launch_bounds__(256, 1) decode_kernel(const __grid_constant__ DecodeParams p) {
  const uint32_t rows = p.group_size * p.q_len;
  const SharedMemory<T> shared(ptx::dynamic_shared_memory(), warps_per_block(), rows);
  const bool early_load = p.levers.early_load && p.levers.ready == kAllButLastToken;
  const bool before_wait = early_load || p.levers.prologue > 0;

  // Before the kernels that this one depends on have finished: hints, and what the caller promised to be final.
  Piece piece{Partition(0, 1), 0, 0, {0, 0}};
  if (before_wait) {
    piece = find_piece<T>(p, shared.rings);
    const uint32_t tiles = min(piece.count, static_cast<uint32_t>(p.levers.prologue));
    if (tiles > 0) prefetch_head_of_piece<T>(p, piece.at, tiles, /*evict_last=*/false);
    __syncthreads();
  }
  if (!early_load) {
    ptx::wait_for_dependencies();
    if (!before_wait || p.levers.ready == kNothing) {
      piece = find_piece<T>(p, shared.rings);
      __syncthreads();
    }
  }
  if (lane_index() == 0) {
    shared.left_shares[warp_index()].leads = 0;
    shared.right_shares[warp_index()].leads = 0;
  }
  if (piece.count > 0) {
    KvPipeline<T> pipeline(p, shared.rings + warp_index() * SharedMemory<T>::kRingBytes,
                           shared.headers + warp_index() * T::kStages, piece.at, piece.count);
    int started = 0;
    if (early_load) {
      for (; started < T::kStages - 1 && pipeline.next_is_older_than(p.q_len); ++started) pipeline.issue();
      ptx::wait_for_dependencies();
    }
    for (; started < T::kStages - 1; ++started) pipeline.issue();
    ptx::launch_dependents();
    write_empty_requests<T>(p);
    process_piece<T>(p, piece, pipeline, shared);
  } else {
    if (early_load) ptx::wait_for_dependencies();
    ptx::launch_dependents();
    write_empty_requests<T>(p);
  }
  if (blockIdx.x * warps_per_block() >= piece.partition.workers) return;  // a block without work, all of its warps
  __syncthreads();
  merge_shares<T>(p, piece.partition, shared);
}

}  // namespace fi_prefetch
