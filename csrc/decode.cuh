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

  static constexpr uint32_t kRingBytes = T::kStages * T::kStageBytes;

  static __host__ __device__ uint32_t bytes(uint32_t warps, uint32_t rows) {
    return warps * (kRingBytes + T::kStages * sizeof(Run) + rows * T::kPartialStride * sizeof(float) +
                    2 * sizeof(Share) + sizeof(uint32_t)) +
           sizeof(uint32_t);
  }
  FI_PREFETCH_DEVICE SharedMemory(uint8_t* base, uint32_t warps, uint32_t rows) {
    rings = base;
    runs = reinterpret_cast<Run*>(rings + warps * kRingBytes);
    left_partials = reinterpret_cast<float*>(runs + warps * T::kStages);
    left_shares = reinterpret_cast<Share*>(left_partials + warps * rows * T::kPartialStride);
    right_shares = left_shares + warps;
    begins = reinterpret_cast<uint32_t*>(right_shares + warps);
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

/// This warp's piece, by a page table that was read. Collective over the warp.
template <typename T>
FI_PREFETCH_DEVICE Piece find_piece(const DecodeParams& p, RequestScan<T::kWindow>& scan) {
  Piece piece;
  piece.some_request_is_empty = scan.some_request_is_empty();
  piece.partition = cut(p, scan, gridDim.x, warps_per_block());
  const uint32_t worker = blockIdx.x * warps_per_block() + warp_index();
  piece.begin = piece.partition.begin(worker);
  piece.count = piece.partition.begin(worker + 1) - piece.begin;
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
  Share share{run.request, run.head, end, begin >= piece.begin || piece.begin == piece.partition.begin(first_worker)};
  if (share.leads) {
    const uint32_t last_worker = goes_on ? piece.partition.owner(end - 1) : first_worker + warp;
    const uint32_t last_block = goes_on ? last_worker / warps : blockIdx.x;
    share.last_warp = last_block == blockIdx.x ? last_worker - first_worker : warps - 1;
    share.first_block = begin >= piece.begin ? blockIdx.x : piece.partition.owner(begin) / warps;
    share.blocks = last_block - share.first_block + 1;
  }
  if (lane_index() == 0) (goes_on ? shared.right_shares : shared.left_shares)[warp] = share;
}

/// Merges what the block's warps left, then meets the other blocks. The warps take the rows of all shares in turns.
/// Collective over the block, after a barrier.
template <typename T>
FI_PREFETCH_DEVICE void merge_shares(const DecodeParams& p, const SharedMemory<T>& shared) {
  const uint32_t warps = warps_per_block();
  const uint32_t rows = p.group_size * p.q_len;
  const float* base = reinterpret_cast<const float*>(shared.rings);
  const auto share_at = [&](uint32_t index) -> const Share& {
    const Share* side = index % 2 == 0 ? shared.left_shares : shared.right_shares;
    return side[index / 2];
  };
  uint32_t turn = warp_index();  // rows until this warp's next one
  const bool leads = lane_index() < 2 * warps && share_at(lane_index()).leads;
#pragma unroll 1
  for (uint32_t left = __ballot_sync(kFullWarp, leads); left != 0; left &= left - 1) {
    const uint32_t index = __ffs(left) - 1;
    const uint32_t first_warp = index / 2;
    const Share share = share_at(index);
#pragma unroll 1
    for (; turn < rows; turn += warps) {
      const uint32_t n = turn;
      const MergedRow<T> merged = merge_row<T, false>(base, share.last_warp - first_warp + 1, [&](uint32_t i) {
        const uint32_t warp = first_warp + i;
        const bool ends_here = share.end <= shared.begins[warp + 1];
        const float* partial = ends_here ? shared.left_partial(warp, rows) : shared.right_partial(warp);
        const uint32_t offset = partial - base + n * T::kPartialStride;
        return shared.begins[warp] == shared.begins[warp + 1] ? kNoPartial : offset;
      });
      if (share.blocks == 1) {
        write_row<T>(p, share.request, share.head, n, merged);
      } else {
        merge_blocks<T>(p, share, n, merged);
      }
    }
    turn -= rows;
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
  if (!before_wait) ptx::wait_for_dependencies();

  // Before the kernels that this one depends on have finished: hints, and what the caller promised is final. What is
  // done is decided by the page table as it is afterwards.
  Piece piece;
  bool guess = before_wait;
#pragma unroll 1
  while (true) {
    RequestScan<T::kWindow> scan(p, shared.rings);
    piece = find_piece<T>(p, scan);
    if (guess) {
      const uint32_t tiles = min(piece.count, static_cast<uint32_t>(p.levers.prologue));
      if (tiles > 0) prefetch_head_of_piece<T>(p, piece.at, tiles, /*evict_last=*/false);
    }
    if (guess && !early_load) ptx::wait_for_dependencies();
    const bool verify = guess && p.levers.ready == kNothing;
    guess = false;
    const bool again = verify && scan.changed(p);
    if (scan.in_shared_memory()) __syncthreads();
    if (!again) break;
  }
  if (lane_index() == 0) {
    shared.left_shares[warp].leads = 0;
    shared.right_shares[warp].leads = 0;
    shared.begins[warp] = piece.begin;
    if (warp + 1 == warps) shared.begins[warps] = piece.begin + piece.count;
  }
  WarpAttention<T> attention(p);
  const TileCursor<T::kWindow> first(piece.at);
  KvPipeline<T> pipeline(p, shared.rings + warp * SharedMemory<T>::kRingBytes, shared.runs + warp * T::kStages, first,
                         piece.count);
  if (!early_load) {
    ptx::launch_dependents();
    // Before the copies, behind 128 KB of which it would wait otherwise.
    if (piece.count > 0) attention.load_query(first.request_index, first.head);
    if (piece.some_request_is_empty) write_empty_requests<T>(p);
  }
  Run run{};
  uint32_t run_end = 0;  // in tiles of the piece
  uint32_t stage = 0;
  const int count = static_cast<int>(piece.count);
  int i = 1 - T::kStages;  // below 0: the ring is being filled
  bool early = early_load;
#pragma unroll 1
  while (true) {
    if (early_load && !early) {
      ptx::wait_for_dependencies();
      ptx::launch_dependents();
      if (piece.some_request_is_empty) write_empty_requests<T>(p);
    }
#pragma unroll 1
    for (; early ? i < 0 && pipeline.upcoming_is_older_than(p.q_len) : i < count; ++i) {
      if (i >= 0) {
        if (i == static_cast<int>(run_end)) {
          __syncwarp();  // the run: lane 0 wrote it
          run = pipeline.run(stage);
          run_end += min(run.tiles - run.tile, piece.count - run_end);
          if (i > 0 || early_load) attention.load_query(run.request, run.head);
          attention.start();
        }
        pipeline.wait();
      }
      pipeline.issue();
      if (i < 0) continue;
      attention.add_tile(pipeline.k_tile(stage), pipeline.v_tile(stage), run.token, run.length);
      run.token += kTileTokens;
      ++run.tile;
      if (i + 1 == static_cast<int>(run_end)) {
        const uint32_t begin = piece.begin + run_end - run.tile;
        put_away<T>(p, piece, run, begin, begin + run.tiles, attention, shared);
      }
      stage = pipeline.next(stage);
    }
    if (!early) break;
    early = false;
  }

  if (blockIdx.x * warps >= piece.partition.workers) return;  // a block without work, all of its warps
  __syncthreads();
  merge_shares<T>(p, shared);
}

}  // namespace fi_prefetch
