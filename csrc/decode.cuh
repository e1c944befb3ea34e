// The decode kernel: attention of one or a few query tokens per request over a paged KV cache, in one launch.
//
//   every block   finds its piece of the line of all tiles, or what plan() noted of it        schedule.cuh, planned.cuh
//   every warp    prefetches the head of its part, waits for the kernels before this one      prefetch.cuh
//                 streams its tiles through its own ring of shared memory                     pipeline.cuh
//                 and keeps softmax and output in registers                                   attention.cuh
//   the block     merges what its warps share; the last block merges what blocks share        merge.cuh
// (where long pieces let warps read neighbouring kv heads abreast, each of them meets others by itself)
#pragma once

#include "merge.cuh"

namespace fi_prefetch {

/// The block's dynamic shared memory. The host asks for `bytes`, the kernel uses the pointers.
template <typename T>
struct SharedMemory {
  uint8_t* rings;        // [warps][kRingBytes]: stages, after that a right share's partial
  Run* runs;             // [warps][kStages]
  float* left_partials;  // [warps][rows][kPartialStride]; before that the RequestScan (a large batch's: where the rings
                         // are)
  Share* left_shares;    // [warps]: see keep_share
  Share* right_shares;   // [warps]

  static __host__ __device__ uint32_t bytes(uint32_t warps, uint32_t rows) {
    return warps *
           (T::kRingBytes + T::kStages * sizeof(Run) + rows * T::kPartialStride * sizeof(float) + 2 * sizeof(Share));
  }
  FI_PREFETCH_DEVICE SharedMemory(uint8_t* base, uint32_t warps, uint32_t rows) {
    rings = base;
    runs = reinterpret_cast<Run*>(rings + warps * T::kRingBytes);
    left_partials = reinterpret_cast<float*>(runs + warps * T::kStages);
    left_shares = reinterpret_cast<Share*>(left_partials + warps * rows * T::kPartialStride);
    right_shares = left_shares + warps;
  }
  FI_PREFETCH_DEVICE uint32_t left_partial_bytes() const {
    return reinterpret_cast<uint8_t*>(left_shares) - reinterpret_cast<uint8_t*>(left_partials);
  }
  FI_PREFETCH_DEVICE float* left_partial(uint32_t warp, uint32_t rows) const {
    return left_partials + warp * rows * T::kPartialStride;
  }
  FI_PREFETCH_DEVICE float* right_partial(uint32_t warp) const {
    return reinterpret_cast<float*>(rings + warp * T::kRingBytes);
  }
};

/// The share that this block (or this warp, where heads are read abreast) has of a run's request and head, which is at
/// [begin, end) on the line. Collective over the warp.
FI_PREFETCH_DEVICE Share share_of(const Partition& partition, uint32_t request, uint32_t head, uint32_t begin,
                                  uint32_t end) {
  const bool abreast = partition.abreast_log2 > 0;
  // Who meets others: the block, that is all of its workers; or the one worker that this warp is of.
  const uint32_t workers = abreast ? 1 : warps_per_block();
  const uint32_t own = abreast ? warp_number() >> partition.abreast_log2 : blockIdx.x;
  const uint32_t first_worker = own * workers, lane = lane_index();
  const uint32_t warp_begin = partition.begin(first_worker + lane), warp_end = partition.begin(first_worker + lane + 1);
  const bool has_some = lane < workers && max(begin, warp_begin) < min(end, warp_end);
  Share share{};
  share.request = request;
  share.head = head;
  share.warps = __ballot_sync(kFullWarp, has_some);
  share.goes_on = __ballot_sync(kFullWarp, has_some && warp_end < end);
  share.first = partition.last_at_or_before(begin, own, workers);
  share.count = partition.last_before(end, own, workers) - share.first + 1;
  const bool is_first = !abreast && (share.warps & ((1u << warp_index()) - 1)) == 0;
  // A block may have several shares, and the rows of them all would take turns in its merge, of 0.8 us, or 2.2 where
  // blocks meet (H200). The first of up to eight warps would be at it as long as a turn.
  share.alone = is_first && (partition.few || (share.count == 1 && __popc(share.warps) <= 4));
  share.leads = is_first && !share.alone;
  return share;
}

/// Whether all warps of a block have the same piece, each of another head.
FI_PREFETCH_DEVICE bool keeps_step(const Partition& partition) {
  const uint32_t abreast = 1u << partition.abreast_log2, warps = warps_per_block();
  return abreast > 1 && warps <= abreast && __popc(warps) == 1;
}

/// Keeps for the merge that this warp shares a run's request and head with others: on the left the one that warps
/// before it have tiles of as well, if it ends in this warp's piece; on the right the one that goes on in the warps
/// after it. `begin` and `end`: where the request and head's tiles are on the line. Collective over the warp.
template <typename T>
FI_PREFETCH_DEVICE void keep_share(const Work<T::kWindow>& work, uint32_t request, uint32_t head, uint32_t begin,
                                   uint32_t end, const SharedMemory<T>& shared) {
  const uint32_t warp = warp_index();
  const Piece<T::kWindow>& piece = work.piece;
  const bool goes_on = end > piece.end;
  if (begin >= piece.begin && !goes_on) return;
  const bool of_splits = piece.splits > 0;
  const uint32_t first = of_splits ? warp_number() - piece.split : begin;
  const Share share = share_of(work.partition, request, head, first, of_splits ? first + piece.splits : end);
  (goes_on ? shared.right_shares : shared.left_shares)[warp] = share;
}

/// Brings all of the parameters into the SM's constant cache while there is time: what is first read after the last
/// tile costs a miss a line there.
FI_PREFETCH_DEVICE void touch(const DecodeParams& p) {
  const int32_t* words = reinterpret_cast<const int32_t*>(&p);
#pragma unroll
  for (uint32_t i = 0; i < sizeof(DecodeParams) / 4; i += 16) ptx::opaque(words[i]);
}

/// Brings the counters into L2, a line a block: an atomic addition waits for a line that HBM has, and between two
/// layers the weights push it out.
FI_PREFETCH_DEVICE void prefetch_counters(const DecodeParams& p) {
  constexpr uint32_t kPerLine = 128 / sizeof(int32_t);
  const uint32_t counters = 3 * gridDim.x * p.group_size * p.q_len;
  for (uint32_t i = blockIdx.x * kPerLine; threadIdx.x == 0 && i < counters; i += gridDim.x * kPerLine) {
    ptx::prefetch_l2_evict_last(p.counters + i);
  }
}

/// Says that this block reads KV (1), or does no more (-1).
FI_PREFETCH_DEVICE void count_running(const DecodeParams& p, int32_t change) {
  if (p.running != nullptr && threadIdx.x == 0) ptx::add_relaxed(p.running, change);
}

/// The request of row `r`: what plan() noted of it, or what the page table says now.
template <typename T>
FI_PREFETCH_DEVICE Request request_at(const DecodeParams& p, uint32_t r) {
  if constexpr (T::kPlanned) return load_planned_request(p, r);
  return load_request<T::kWindow>(p, r);
}

/// Requests without tiles: output 0, lse -inf. Spread over all blocks, those without other work included.
template <typename T>
FI_PREFETCH_DEVICE void write_empty_requests(const DecodeParams& p) {
  const uint32_t batch_size = p.table.batch_size;
  const uint32_t stride = gridDim.x * blockDim.x;
  for (uint32_t first = blockIdx.x + gridDim.x * warp_index() * 32; first < batch_size; first += stride) {
    const uint32_t r = first + gridDim.x * lane_index();
    const bool is_empty = r < batch_size && request_at<T>(p, r).tiles == 0;
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
/// output if no other warp has a tile of it, else to shared memory for the block's merge, or to where it meets others
/// by itself. What merge_own_share() goes on with stays where it is. `begin` and `end`: where the request and head's
/// tiles are on the line.
template <typename T>
FI_PREFETCH_DEVICE void put_away(const DecodeParams& p, const Work<T::kWindow>& work, const Run& run, uint32_t begin,
                                 uint32_t end, WarpAttention<T>& attention, const SharedMemory<T>& shared) {
  const Piece<T::kWindow>& piece = work.piece;
  const bool goes_on = end > piece.end;
  const bool has_all = begin >= piece.begin && !goes_on;
  const bool abreast = work.partition.abreast_log2 > 0;
  const uint32_t warp = warp_index();
  const Share& share = (goes_on ? shared.right_shares : shared.left_shares)[warp];
  const bool meets_now = abreast || (share.alone && !goes_on);  // or blocks before this one have the rest
  if (!has_all && !meets_now) {
    if (share.alone) return;
    // What goes on is the piece's last: its ring holds no other tile, and after the barrier no lane reads this one.
    __syncwarp();
    attention.write_partial(goes_on ? shared.right_partial(warp) : shared.left_partial(warp, p.group_size * p.q_len));
    return;
  }
  if (has_all || meet_others<T>(p, share, work.partition.abreast_log2, attention)) {
    attention.write_output(run.request, run.head);
  }
}

/// Merges what this warp has begun, and others of its block have gone on with, meets the other blocks that have tiles
/// of it, and writes it out. Collective over the warp, after the block's barrier.
template <typename T>
FI_PREFETCH_DEVICE void merge_own_share(const DecodeParams& p, const SharedMemory<T>& shared,
                                        WarpAttention<T>& attention) {
  const uint32_t warp = warp_index();
  const Share share = shared.right_shares[warp];
  if (!share.alone) return;
#pragma unroll 1
  for (uint32_t others = share.warps & ~(1u << warp); others != 0; others &= others - 1) {
    const uint32_t other = __ffs(others) - 1;
    const bool goes_on = share.goes_on >> other & 1;
    attention.add_partial(goes_on ? shared.right_partial(other) : shared.left_partial(other, p.group_size * p.q_len));
  }
  if (share.count > 1 && !meet_others<T>(p, share, 0, attention)) return;
  attention.write_output(share.request, share.head);
}

/// Merges what else the block's warps left, then meets the other blocks. The warps take the rows of all shares in
/// turns. Collective over the block, after a barrier.
template <typename T>
FI_PREFETCH_DEVICE void merge_shares(const DecodeParams& p, const SharedMemory<T>& shared) {
  const uint32_t warps = warps_per_block();
  const uint32_t rows = p.group_size * p.q_len;
  const float* base = reinterpret_cast<const float*>(shared.rings);
  // A lane looks after one warp's partials.
  const uint32_t of_warp = lane_index() & (lanes_of_partials(warps) - 1);
  const uint32_t left = shared.left_partial(of_warp, rows) - base, right = shared.right_partial(of_warp) - base;
  const auto share_at = [&](uint32_t index) -> const Share& {
    const Share* side = index % 2 == 0 ? shared.left_shares : shared.right_shares;
    return side[index / 2];
  };
  uint32_t turn = warp_index();  // rows until this warp's next one
  const bool leads = lane_index() < 2 * warps && share_at(lane_index()).leads;
#pragma unroll 1
  for (uint32_t leaders = __ballot_sync(kFullWarp, leads); leaders != 0; leaders &= leaders - 1) {
    const Share share = share_at(__ffs(leaders) - 1);
#pragma unroll 1
    for (; turn < rows; turn += warps) {
      const uint32_t n = turn;
      const uint32_t place = (share.goes_on >> of_warp & 1 ? right : left) + n * T::kPartialStride;
      merge_share<T>(p, share, n, base, share.warps >> of_warp & 1 ? place : kNoPartial);
    }
    turn -= rows;
  }
}

/// Grid: any number of blocks up to 1,024; block: a whole number of warps, at most 8; dynamic shared memory:
/// SharedMemory<T>::bytes.
///
/// The code is short on purpose, and what is long in it stands once, but for the first tile's copies and its share:
/// between two layers of a model the weights push it out of L2, and every 1,000 instructions take about 1 us to come
/// back (H200), those that a call skips included. To see it, measure in layers and not call after call.
template <typename T>
__global__ void __launch_bounds__(256, 1) decode_kernel(const __grid_constant__ ParamsOf<T> p) {
  if constexpr (T::kTensorCopies && !ptx::kHasTensorCopies) return;
  const uint32_t warp = warp_index(), warps = warps_per_block();
  uint32_t word = 0;
  Request of_this_lane{};
  if constexpr (T::kPlanned) {  // first of all, since everything waits for them: up to 3 % of 1 to 4 MB (H200)
    word = ptx::load_and_keep(reinterpret_cast<const int32_t*>(p.planned[warp_number()].words) + lane_index());
    of_this_lane = load_planned_request(p, lane_index());
  }
  const SharedMemory<T> shared(ptx::dynamic_shared_memory(), warps, p.group_size * p.q_len);
  KvPipeline<T> pipeline(p, shared.rings, shared.runs);
  if constexpr (T::kPlanned) pipeline.load_planned_pages(p.planned[warp_number()]);
  WarpAttention<T> attention(p);
  Work<T::kWindow> work;
  const Piece<T::kWindow>& piece = work.piece;
  // What is read before the kernels that this one depends on have finished is final if the caller promised so, else a
  // guess: no more than hints and copies into the ring follow from it until it was compared with what is there after
  // the wait.
  const bool is_final = T::kPlanned || p.levers.ready != kNothing;
  const bool early_load = p.levers.early_load > 0;
  // The next call, if it is one like this, has little to do before its wait where it is planned, and finds room at once
  // where this one leaves blocks without work. What it prefetches would be in the way of what this one reads: so it
  // starts when all of that is on its way (16-bit KV, 16 MB: 7 to 10 %, H200).
  // Where a ring holds four tiles or more there is no such difference.
  constexpr bool dependents_later = T::kPlanned && !T::kTakesTwo;
  bool finished = true;  // the kernels before this one
  bool keep_late = false;
  bool before_wait = p.dependent_launch && (is_final || ScanOf<T>::can_compare(p));
  prefetch_counters(p);
  if (!before_wait) ptx::wait_for_dependencies();
  touch(p);

#pragma unroll 1
  while (true) {
    const bool scan_in_rings =
        !T::kPlanned && ScanOf<T>::shared_bytes(p.table.batch_size) > shared.left_partial_bytes();
    ScanOf<T> scan;
    if constexpr (T::kPlanned) {
      work = work_of_words<T::kWindow>(word);
      pipeline.start(piece.first, piece.count, of_this_lane);
    } else {
      scan.read(p, scan_in_rings ? shared.rings : reinterpret_cast<uint8_t*>(shared.left_partials));
      work = Work<T::kWindow>(p, cut(p, scan, gridDim.x, warps, T::kStageBytes), scan, warp_number());
      pipeline.start(piece.first, piece.count, scan.of_this_lane());
    }
    const bool verify = before_wait && !is_final;
    if (before_wait && !early_load) pipeline.prefetch_head(p.levers.prologue);

    shared.left_shares[warp] = shared.right_shares[warp] = {};
    __syncwarp();  // before any lane writes a share there
    // The first run's share is noted in the time before the wait, if there is any. Blocks of a full grid find their
    // shared memory taken by the kernel before if it is one of these: they start when its blocks end, and have no time
    // to spare until their first tiles are on their way.
    keep_late = work.partition.warps() == gridDim.x * warps;
    if (!keep_late && piece.count > 0) {
      const uint32_t begin = piece.begin - piece.first.tile;
      keep_share<T>(work, piece.first.request_index, piece.first.head, begin, begin + piece.first.request.tiles,
                    shared);
    }

    if (scan_in_rings) {
      if constexpr (T::kTensorCopies) ptx::fence_tensor_copies();  // the scan before the copies
      __syncthreads();
    }
    finished = !early_load || piece.count == 0;
    if (finished) {
      if (before_wait) ptx::wait_for_dependencies();
      if (!dependents_later) ptx::launch_dependents();
      // These loads before the copies, behind 128 KB of which they would wait otherwise.
      if (verify) {
        scan.read_again(p);
        pipeline.read_first_pages_again();
      }
      if (piece.count > 0) attention.load_query(piece.first.request_index, piece.first.head);
    }
    pipeline.load_second_pages();
    // Once outside of the loop, at whose head the compiler waits for all of the loads above.
    if (finished) pipeline.issue();
    before_wait = false;
    if (!verify && !T::kPlanned && scan.kInSharedMemory) __syncthreads();  // it lies where the left partials are
    if (!verify || !scan.changed(pipeline.first_pages_changed())) break;
    pipeline.drain();
    if (scan.kInSharedMemory) __syncthreads();
  }
  count_running(p, 1);

  Run run{};
  uint32_t run_end = 0;  // in tiles of the piece
  uint32_t begin = 0;    // where the run's request and head begins on the line
  uint32_t stage = 0;
  uint32_t step = 1;
  // Warps that read heads abreast drift apart, and rows that lie side by side are then asked for at different times. A
  // block whose warps all have the same piece keeps them in step (2 to 4 % of 1 GB of fp8, up to 1 % of bf16, H200);
  // not where they copy row by row, which leaves no time to wait for each other (1 to 3 % slower).
  const bool in_step = T::kTensorCopies && keeps_step(work.partition);
#pragma unroll 1
  for (uint32_t i = 0; i < piece.count; i += step) {
    if (in_step && i / (T::kTakesTwo ? 2 : 1) % 4 == 0) __syncthreads();
    __syncwarp();  // all lanes are done with the tiles before, whose stages are free
#pragma unroll 1
    while (true) {
      const bool filled = pipeline.issued() >= min(piece.count, i + T::kStages);
      if (!finished && (filled || !pipeline.upcoming_is_older_than(p.q_len))) {
        ptx::wait_for_dependencies();
        ptx::launch_dependents();
        attention.load_query(piece.first.request_index, piece.first.head);
        finished = true;
      }
      if (filled) break;
      pipeline.template issue</*RUNS_AHEAD=*/true>();
    }
    // Once more does no harm, where they were let start before.
    if (!T::kTakesTwo && pipeline.issued() >= piece.count) ptx::launch_dependents();
    if (i == run_end) {
      __syncwarp();  // the run: lane 0 wrote it
      const uint32_t before = run.tiles;
      run = pipeline.run(stage);
      if (i > 0) attention.load_query(run.request, run.head);
      begin = i == 0 ? piece.begin - run.tile : begin + before + work.partition.gap;
      run_end += min(run.tiles - run.tile, piece.count - run_end);
      if (i > 0 || keep_late) keep_share<T>(work, run.request, run.head, begin, begin + run.tiles, shared);
      attention.start();
    }
    if constexpr (KvPipeline<T>::kLoadsPagesLater) pipeline.load_due_pages();
    if constexpr (T::kTakesTwo) step = i + 2 <= run_end ? 2 : 1;
    pipeline.wait(i, step, run.length - run.token);
    const uint32_t tile = pipeline.tile(stage);
    if (T::kTakesTwo && step == 2) {
      stage = pipeline.next(stage);
      attention.template add_tiles<2>({tile, pipeline.tile(stage)}, run.token, run.length);
    } else {
      attention.template add_tiles<1>({tile}, run.token, run.length);
    }
    stage = pipeline.next(stage);
    run.token += step * kTileTokens;
    if (i + step == run_end) put_away<T>(p, work, run, begin, begin + run.tiles, attention, shared);
  }

  count_running(p, -1);
  // Warps that read abreast met others by themselves; a block without work has none.
  if (work.partition.abreast_log2 == 0 && blockIdx.x * warps < work.partition.workers) {
    __syncthreads();
    merge_own_share<T>(p, shared, attention);
    merge_shares<T>(p, shared);
  }
  if (work.some_request_is_empty) write_empty_requests<T>(p);
}

}  // namespace fi_prefetch
