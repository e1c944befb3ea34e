// What every warp does, worked out once for many calls. A model's layers all decode by the same page table: where the
// caller promises that it stays as it was when plan() was called, plan() leaves each warp's piece and its first page
// numbers in memory, and a call begins with one trip to memory instead of two and the arithmetic between them. What
// it does hangs on what was noted alone, but for later page numbers: a broken promise gives the answer for lengths that
// are no more, and all blocks still agree on who merges what.
#pragma once

#include "prefetch.cuh"

namespace fi_prefetch {

/// What a warp does, by a page table that was read.
template <bool WINDOW>
struct Work {
  Partition partition{0, 1};
  Piece<WINDOW> piece;
  uint32_t some_request_is_empty = 0;

  Work() = default;
  /// Collective over the warp. `warp`: its number.
  template <typename Scan>
  FI_PREFETCH_DEVICE Work(const DecodeParams& p, const Partition& partition_, Scan& scan, uint32_t warp)
      : partition(partition_), piece(p, partition_, scan, warp), some_request_is_empty(scan.some_request_is_empty()) {}

  /// Calls visit(word) for each of its numbers, of 32 bits.
  template <typename Visit>
  FI_PREFETCH_DEVICE void for_each_word(const Visit& visit) {
    TileCursor<WINDOW>& first = piece.first;
    Request& request = first.request;
    visit(partition.tiles), visit(partition.workers), visit(partition.share), visit(partition.abreast_log2);
    visit(partition.split_tiles), visit(partition.gap), visit(partition.few), visit(some_request_is_empty);
    visit(piece.begin), visit(piece.end), visit(piece.count), visit(piece.split), visit(piece.splits);
    visit(first.request_index), visit(first.head), visit(first.tile), visit(first.head_step);
    visit(request.page_begin), visit(request.length), visit(request.first_token), visit(request.tiles);
  }
};

/// A warp's record in p.planned.
struct PlannedWork {
  uint32_t words[32];  // of its Work
  /// Page numbers of the stretch that its piece begins in: of 64 tokens, or of the first 32 where a lane looks up one
  /// (see RowCopies); and of 32 tiles (see TensorCopies).
  int32_t token_pages[64];
  int32_t tile_pages[32];
};

struct ScheduleParams {
  PlannedWork* records;  // [blocks * warps of the decode call]
  Request* requests;     // [batch_size]
  uint32_t blocks;
  uint32_t warps;
  uint32_t stretch;  // tiles whose page numbers RowCopies looks up together
};

/// Takes a Work from the words that the lanes loaded of a record. Collective over the warp.
template <bool WINDOW>
FI_PREFETCH_DEVICE Work<WINDOW> work_of_words(uint32_t word) {
  Work<WINDOW> work;
  int i = 0;
  work.for_each_word([&](auto& to) { to = __shfl_sync(kFullWarp, word, i++); });
  return work;
}

/// Works out what each warp of a decode call does. Any number of blocks of whole warps; dynamic shared memory:
/// ScanOf<T>::shared_bytes. The decode call after it must not be its programmatic dependent: that would read its record
/// before it waits.
template <typename T>
__global__ void __launch_bounds__(256, 1)
    schedule_kernel(const __grid_constant__ DecodeParams p, const __grid_constant__ ScheduleParams schedule) {
  ScanOf<T> scan(p, ptx::dynamic_shared_memory());
  const Partition partition = cut(p, scan, schedule.blocks, schedule.warps, T::kStageBytes);
  const uint32_t batch_size = p.table.batch_size;
  for (uint32_t r = blockIdx.x * blockDim.x + threadIdx.x; r < batch_size; r += gridDim.x * blockDim.x) {
    schedule.requests[r] = load_request<T::kWindow>(p, r);
  }
  const uint32_t lane = lane_index(), stride = gridDim.x * warps_per_block();
  for (uint32_t warp = warp_number(); warp < schedule.blocks * schedule.warps; warp += stride) {
    Work<T::kWindow> work(p, partition, scan, warp);
    PlannedWork& record = schedule.records[warp];
    uint32_t own = 0, i = 0;
    work.for_each_word([&](const auto& from) { own = lane == i++ ? static_cast<uint32_t>(from) : own; });
    record.words[lane] = own;
    if (work.piece.count == 0) continue;
    const TileCursor<T::kWindow>& first = work.piece.first;
    const auto page_at = [&](uint32_t tile, uint32_t token) {
      return TokenPlace(p.table, first.request, first.request.first_token + (tile * kTileTokens + token)).page;
    };
    const uint32_t token_stretch = first.tile / schedule.stretch * schedule.stretch;
    record.token_pages[lane] = page_at(token_stretch, lane);
    record.token_pages[lane + 32] = page_at(token_stretch, lane + 32);
    record.tile_pages[lane] = page_at(first.tile / 32 * 32 + lane, 0);
  }
}

}  // namespace fi_prefetch
