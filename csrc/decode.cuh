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
  uint8_t* rings;        // [warps][kStages][kStageBytes]; before that the RequestScan, after that right shares
  Run* runs;             // [warps][kStages]
  float* left_partials;  // [warps][rows][kPartialStride]
  Share* left_shares;    // [warps]: of what a warp shares with warps before it, and ends
  Share* right_shares;   // [warps]: of what goes on in the warps after it; the partial lies in the warp's ring
  uint32_t* begins;      // [warps + 1]: where the warps' pieces begin, and the block's ends
  uint32_t* flag;

  static constexpr uint32_t kRingBytes = T::kStages * T::kStageBytes;

  static __host__ __device__ uint32_t bytes(uint32_t warps, uint32_t rows) {
    return warps * (kRingBytes + T::kStages * sizeof(Run) + rows * T::kPartialStride * sizeof(float) +
                    2 * sizeof(Share) + sizeof(uint32_t)) +
           2 * sizeof(uint32_t);
  }
  FI_PREFETCH_DEVICE SharedMemory(uint8_t* base, uint32_t warps, uint32_t rows) {
    rings = base;
    runs = reinterpret_cast<Run*>(rings + warps * kRingBytes);
    left_partials = reinterpret_cast<float*>(runs + warps * T::kStages);
    left_shares = reinterpret_cast<Share*>(left_partials + warps * rows * T::kPartialStride);
    right_shares = left_shares + warps;
    begins = reinterpret_cast<uint32_t*>(right_shares + warps);
    flag = begins + warps + 1;
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
  Partition partition{0, 1};
  uint32_t begin = 0;
  uint32_t count = 0;
  Location at;  // of `begin`, if count > 0
  bool some_request_is_empty = false;
};

/// Reads the page table and finds this warp's piece. Collective over the block; `scan_memory` is free again afterwards.
template <typename T>
FI_PREFETCH_DEVICE Piece find_piece(const DecodeParams& p, uint8_t* scan_memory) {
  Piece piece;
  RequestScan<T::kWindow> scan(p, scan_memory);
  piece.some_request_is_empty = scan.some_request_is_empty();
  piece.partition = cut(p, scan.total(), gridDim.x, warps_per_block());
  const uint32_t worker = blockIdx.x * warps_per_block() + warp_index();
  piece.begin = piece.partition.begin(worker);
  piece.count = piece.partition.begin(worker + 1) - piece.begin;
  if (piece.count > 0) piece.at = scan.locate(piece.begin, p.num_kv_heads);
  if (scan.in_shared_memory()) __syncthreads();
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

/// Puts away what the warp computed of a request and head, when its last tile in the warp's piece is done: to the
/// output if no other warp has a tile of it, else to shared memory for the block's merge. `begin` and `end`: where the
/// request and head's tiles are on the line.
template <typename T>
FI_PREFETCH_DEVICE void put_away(const DecodeParams& p, const Piece& piece, const Run& run, uint32_t begin,
                                 uint32_t end, WarpAttention<T>& attention, const SharedMemory<T>& shared) {
  const bool goes_on = end > piece.begin + piece.count;
  attention.finish();
  if (begin >= piece.begin && !goes_on) {
    attention.write_output(run.request, run.head);
    return;
  }
  // What goes on is the piece's last: its ring holds no other tile, and after the barrier no lane reads this one.
  __syncwarp();
  const uint32_t warp = warp_index(), warps = warps_per_block();
  attention.write_partial(goes_on ? shared.right_partial(warp) : shared.left_partial(warp, p.group_size * p.q_len));
  // A warp leads if the request and head begin in its piece, or the block's tiles do (earlier warps may have none).
  const uint32_t first_worker = blockIdx.x * warps;
  const bool leads = begin >= piece.begin || piece.begin == piece.partition.begin(first_worker);
  const uint32_t last_warp = leads ? min(piece.partition.owner(end - 1) - first_worker, warps - 1) : 0;
  if (lane_index() == 0) {
    (goes_on ? shared.right_shares : shared.left_shares)[warp] = {run.request, run.head,  begin, end,
                                                                  leads,       last_warp, {0, 0}};
  }
}

/// Merges what the block's warps left, then meets the other blocks. Collective over the block, after a barrier.
template <typename T>
FI_PREFETCH_DEVICE void merge_shares(const DecodeParams& p, const Partition& partition, const SharedMemory<T>& shared) {
  const uint32_t warps = warps_per_block();
  const uint32_t rows = p.group_size * p.q_len;
  const uint32_t block_begin = shared.begins[0], block_end = shared.begins[warps];
  const auto share_at = [&](uint32_t index) -> const Share& {
    const Share* side = index % 2 == 0 ? shared.left_shares : shared.right_shares;
    return side[index / 2];
  };
  const Share* with_other_blocks[2] = {nullptr, nullptr};  // with the blocks before this one, with those after it
  uint32_t turn = warp_index();  // rows until this warp's next one; the warps take the rows of all shares in turns
  const bool leads = lane_index() < 2 * warps && share_at(lane_index()).leads;
#pragma unroll 1
  for (uint32_t left = __ballot_sync(kFullWarp, leads); left != 0; left &= left - 1) {
    const uint32_t index = __ffs(left) - 1;
    const uint32_t first_warp = index / 2;
    const Share& share = share_at(index);
    const bool begins_here = share.begin >= block_begin;
    const bool in_block = begins_here && share.end <= block_end;
    if (!in_block) (begins_here ? with_other_blocks[1] : with_other_blocks[0]) = &share;
#pragma unroll 1
    for (; turn < rows; turn += warps) {
      const uint32_t n = turn;
      const MergedRow<T> merged =
          merge_row<T, false>(share.last_warp - first_warp + 1, [&](uint32_t i) -> const float* {
            const uint32_t warp = first_warp + i;
            if (shared.begins[warp] == shared.begins[warp + 1]) return nullptr;
            const bool ends_here = share.end <= shared.begins[warp + 1];
            return (ends_here ? shared.left_partial(warp, rows) : shared.right_partial(warp)) + n * T::kPartialStride;
          });
      if (in_block) {
        write_row<T>(p, share.request, share.head, n, merged);
      } else {
        write_partial_row<T>(block_partial<T>(p, 2 * blockIdx.x + begins_here, n), merged);
      }
    }
    turn -= rows;
  }
#pragma unroll 1
  for (int after = 0; after < 2; ++after) {
    const Share* share = after ? with_other_blocks[1] : with_other_blocks[0];
    if (share != nullptr) merge_blocks<T>(p, partition, *share, shared.flag);
  }
}

/// Grid: any number of blocks up to 1,024; block: a whole number of warps, at most 8; dynamic shared memory:
/// SharedMemory<T>::bytes.
///
/// Each piece of code that is long stands here once (hence the loops that run twice): a call on little KV is done in
/// less time than it takes to fetch 100 KB of instructions.
template <typename T>
__global__ void __launch_bounds__(256, 1) decode_kernel(const __grid_constant__ DecodeParams p) {
  const uint32_t warp = warp_index(), warps = warps_per_block();
  const SharedMemory<T> shared(ptx::dynamic_shared_memory(), warps, p.group_size * p.q_len);
  const bool early_load = p.levers.early_load && p.levers.ready == kAllButLastToken;
  const bool before_wait = early_load || p.levers.prologue > 0;

  // Pass 0, before the kernels that this one depends on have finished: hints, and what the caller promised is final.
  // Pass 1, after: what is done is decided by the page table as it is now.
  Piece piece;
#pragma unroll 1
  for (int pass = before_wait ? 0 : 1; pass < 2; ++pass) {
    if (pass == 1) {
      if (!early_load) ptx::wait_for_dependencies();
      if (before_wait && p.levers.ready != kNothing) break;
    }
    piece = find_piece<T>(p, shared.rings);
    if (pass == 0) {
      const uint32_t tiles = min(piece.count, static_cast<uint32_t>(p.levers.prologue));
      if (tiles > 0) prefetch_head_of_piece<T>(p, piece.at, tiles, /*evict_last=*/false);
    }
  }

  KvPipeline<T> pipeline(p, shared.rings + warp * SharedMemory<T>::kRingBytes, shared.runs + warp * T::kStages,
                         piece.at, piece.count);
  int issued = 0;
  if (early_load) {
#pragma unroll 1
    for (; issued < T::kStages - 1 && pipeline.next_is_older_than(p.q_len); ++issued) pipeline.issue();
    ptx::wait_for_dependencies();
  }
  ptx::launch_dependents();
  if (piece.some_request_is_empty) write_empty_requests<T>(p);
  if (lane_index() == 0) {
    shared.left_shares[warp].leads = 0;
    shared.right_shares[warp].leads = 0;
    shared.begins[warp] = piece.begin;
    if (warp + 1 == warps) shared.begins[warps] = piece.begin + piece.count;
  }

  WarpAttention<T> attention(p);
  Run run{};
  uint32_t run_end = 0;  // in tiles of the piece
  uint32_t stage = 0;
  const int count = static_cast<int>(piece.count);
#pragma unroll 1
  for (int i = issued - (T::kStages - 1); i < count; ++i) {  // below 0: the ring is being filled
    if (i >= 0) {
      if (i == static_cast<int>(run_end)) {
        __syncwarp();  // the run: lane 0 wrote it
        run = pipeline.run(stage);
        run_end += min(run.tiles - run.tile, piece.count - run_end);
        attention.start(run.request, run.head);  // its loads fly while the tile's still do
      }
      pipeline.wait();
    }
    pipeline.issue();
    if (i < 0) continue;
    attention.add_tile(pipeline.k_tile(stage), pipeline.v_tile(stage), run.token, run.length);
    run.token += kTileTokens;
    ++run.tile;
    if (i + 1 == static_cast<int>(run_end)) {
      const uint32_t begin = piece.begin + run_end - run.tile;  // modulo 2^32
      put_away<T>(p, piece, run, begin, begin + run.tiles, attention, shared);
    }
    stage = pipeline.next(stage);
  }

  if (blockIdx.x * warps >= piece.partition.workers) return;  // a block without work, all of its warps
  __syncthreads();
  merge_shares<T>(p, piece.partition, shared);
}

}  // namespace fi_prefetch
