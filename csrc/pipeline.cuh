// A warp's own ring of shared-memory stages: copies of the next tiles run while it computes on the oldest one. Warps
// never wait for each other here.
#pragma once

#include "prefetch.cuh"
#include "schedule.cuh"
#include "traits.cuh"

namespace fi_prefetch {

/// A warp's run of neighbouring tiles of one request and kv head, as far as the consumer must know it. Written beside
/// the run's first tile when that tile's copies are issued.
struct __align__(16) Run {
  uint32_t request;
  uint32_t head;
  int32_t token;   // the run's first
  int32_t length;  // of the request
  uint32_t tile;   // the run's first, within the request and head
  uint32_t tiles;  // of the request and head
  uint32_t padding[2];
};

/// In a stage, row t of K (then of V) holds token t. Its 16-byte chunks are permuted by an exclusive or with a function
/// of t, so that the eight rows of a matrix that ldmatrix reads at once lie in different banks.
template <typename T>
struct TileLayout {
  static_assert(T::kRowChunks >= 4, "a row has at least 64 bytes");
  FI_PREFETCH_DEVICE static constexpr uint32_t swizzle(uint32_t row) {
    // Rows of 64 bytes: two share the 128 bytes of all banks, so the chunk changes with every second row.
    return T::kRowChunks >= 8 ? row % 8 : row / 2 % 4;
  }
  FI_PREFETCH_DEVICE static constexpr uint32_t offset(uint32_t row, uint32_t chunk) {
    return row * T::kRowBytes + ((chunk ^ swizzle(row)) << 4);
  }
};

template <typename T>
class KvPipeline {
 public:
  /// Shared memory of one warp, in bytes.
  static constexpr uint32_t kSharedBytes = T::kStages * (T::kStageBytes + sizeof(Run));

  /// The warp's piece is `count` tiles (perhaps none), from the one at `at` on.
  FI_PREFETCH_DEVICE KvPipeline(const DecodeParams& p, uint8_t* ring, Run* runs, const Location& at, uint32_t count)
      : p_(p),
        cursor_(at),
        rows_(p, cursor_.head),
        runs_(runs),
        ring_(ptx::shared_address(ring)),
        count_(count),
        policy_(p.levers.stream ? ptx::policy_evict_first() : ptx::policy_evict_normal()) {
    if (count_ > 0) load_pages();
  }

  /// Whether the next tile to issue holds none of its request's `newest` newest tokens.
  FI_PREFETCH_DEVICE bool next_is_older_than(int32_t newest) const {
    return issued_ < count_ && cursor_.token() + kTileTokens <= cursor_.request.length - newest;
  }

  /// Starts the copies of the next tile, if there is one, into the ring's next stage. Always closes a group, so that
  /// "all but the newest kStages - 1 groups" means the same tile for every count.
  FI_PREFETCH_DEVICE void issue() {
    if (issued_ < count_) {
      copy_tile();
      if (p_.levers.run_ahead > 0) run_ahead();
      if (++issued_ < count_) {
        cursor_.advance(p_);
        rows_.set_head(cursor_.head);
        load_pages();
      }
    }
    ptx::copy_async_commit();
    stage_to_fill_ = next(stage_to_fill_);
  }

  /// The run whose first tile is in a stage, or on its way there. The caller passed a warp barrier since its issue().
  FI_PREFETCH_DEVICE const Run& run(uint32_t stage) const { return runs_[stage]; }

  /// Waits for the oldest tile and makes it visible to the whole warp. Also tells the warp's lanes that all of them are
  /// done with the stage before it, which issue() fills next.
  FI_PREFETCH_DEVICE void wait() {
    ptx::copy_async_wait<T::kStages - 2>();
    __syncwarp();
  }

  FI_PREFETCH_DEVICE uint32_t k_tile(uint32_t stage) const { return ring_ + stage * T::kStageBytes; }
  FI_PREFETCH_DEVICE uint32_t v_tile(uint32_t stage) const { return k_tile(stage) + T::kTileBytes; }
  FI_PREFETCH_DEVICE static uint32_t next(uint32_t stage) { return stage + 1 == T::kStages ? 0 : stage + 1; }

 private:
  /// A row's chunks are copied by kRowChunks neighbouring lanes, so a warp's instruction copies whole rows.
  FI_PREFETCH_DEVICE void copy_tile() {
    constexpr int kRowsPerCopy = 32 / T::kRowChunks;
    constexpr int kCopies = kTileTokens / kRowsPerCopy;
    const uint32_t lane = lane_index();
    const uint32_t first_row = lane / T::kRowChunks;
    const uint32_t chunk = lane % T::kRowChunks;
    // first_row < kRowsPerCopy, so TileLayout::offset(copy * kRowsPerCopy + first_row, chunk) is this with constants
    // added and exclusive-ored: one instruction a copy.
    const uint32_t lane_offset = TileLayout<T>::offset(first_row, chunk);

    const uint32_t row_offset = rows_.offset(p_, place_);
    const uint32_t stage = k_tile(stage_to_fill_);
    const uint8_t* k = p_.k.data + chunk * 16;
    const uint8_t* v = p_.v.data + chunk * 16;
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) {
      const uint32_t row = copy * kRowsPerCopy + first_row;
      const uint32_t destination = stage + copy * kRowsPerCopy * T::kRowBytes +
                                   (lane_offset ^ (T::kRowChunks >= 8 ? (copy * kRowsPerCopy % 8) << 4 : 0));
      const uint32_t k_offset = __shfl_sync(kFullWarp, row_offset, row);
      ptx::copy_async_16(destination, TileRows::address(k, p_.unit_bytes, k_offset), policy_);
      const uint32_t v_offset = __shfl_sync(kFullWarp, row_offset, kTileTokens + row);
      ptx::copy_async_16(destination + T::kTileBytes, TileRows::address(v, p_.unit_bytes, v_offset), policy_);
    }
    if ((issued_ == 0 || cursor_.tile == 0) && lane == 0) {
      runs_[stage_to_fill_] = {cursor_.request_index, cursor_.head,          cursor_.token(), cursor_.request.length,
                               cursor_.tile,          cursor_.request.tiles, {0, 0}};
    }
  }

  /// The paper's lever: bring the tile `run_ahead` tiles on into L2, if this warp will read it and it is of the same
  /// request and head (the cursor knows no other's pages).
  FI_PREFETCH_DEVICE void run_ahead() {
    const uint32_t distance = p_.levers.run_ahead;
    if (issued_ + distance < count_ && cursor_.tile + distance < cursor_.request.tiles) {
      rows_.template prefetch<T>(p_, cursor_, ahead_, distance, /*evict_last=*/false);
    }
  }

  /// The page numbers that the next issue() needs, a step ahead: nobody waits for them.
  FI_PREFETCH_DEVICE void load_pages() {
    place_ = rows_.find(p_, cursor_);
    if (p_.levers.run_ahead > 0) ahead_ = rows_.find(p_, cursor_, p_.levers.run_ahead);
  }

  const DecodeParams& p_;
  TileCursor<T::kWindow> cursor_;
  TileRows rows_;
  Run* runs_;
  uint32_t ring_;
  uint32_t count_;
  uint64_t policy_;
  uint32_t issued_ = 0;
  uint32_t stage_to_fill_ = 0;
  RowPlace place_{};
  RowPlace ahead_{};
};

}  // namespace fi_prefetch
