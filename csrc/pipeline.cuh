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
  /// `rings` and `runs`: of all warps of the block.
  FI_PREFETCH_DEVICE KvPipeline(const DecodeParams& p, uint8_t* rings, Run* runs)
      : p_(p),
        runs_(runs + warp_index() * T::kStages),
        ring_(ptx::shared_address(rings) + warp_index() * T::kRingBytes),
        first_destination_(ptx::shared_address(rings) + threadIdx.x / 32 * T::kRingBytes +
                           TileLayout<T>::offset(lane_index() / T::kRowChunks, lane_index() % T::kRowChunks)),
        k_(ptx::opaque(p.k.data + lane_index() % T::kRowChunks * 16)),
        v_(ptx::opaque(p.v.data + lane_index() % T::kRowChunks * 16)),
        policy_(p.levers.stream ? ptx::policy_evict_first() : ptx::policy_evict_normal()) {}

  /// Begins a piece of `count` tiles (perhaps none) from `first` on: loads the page numbers of its first stretch and
  /// works out where the rows lie. Before the first issue() the caller loads the next stretch's.
  FI_PREFETCH_DEVICE void start(const TileCursor<T::kWindow>& first, uint32_t count, const Request& of_this_lane) {
    of_this_lane_ = of_this_lane;
    ahead_ = first;
    count_ = count;
    issued_ = stage_to_fill_ = far_tile_ = 0;
    destination_ = first_destination_;
    stretch_is_done_ = false;
    if (count_ == 0) return;
    load_pages();
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      first_page_at_[i] = page_at_[i];
      first_page_[i] = first_page_again_[i] = page_[i];
    }
    take_next_stretch();
    look_ahead();
  }

  /// Brings the first `tiles` tiles into L2.
  FI_PREFETCH_DEVICE void prefetch_head(uint32_t tiles) const {
    if (count_ == 0) return;
    const uint32_t first = at_.tile % kStretch, in_stretch = min(kStretch - first, at_.request.tiles - at_.tile);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const uint32_t tile = (i * 32 + lane_index()) / kTileTokens;
      if (tile < first || tile >= first + min(tiles, in_stretch)) continue;
#pragma unroll
      for (int byte = 0; byte < T::kRowBytes; byte += 128) {
        ptx::prefetch_l2(TileRows::address(p_.k.data, p_.unit_bytes, k_offset_[i]) + byte);
        ptx::prefetch_l2(TileRows::address(p_.v.data, p_.unit_bytes, v_offset_[i]) + byte);
      }
    }
  }

  /// Starts the load of the second stretch's page numbers, once they are final.
  FI_PREFETCH_DEVICE void load_second_pages() {
    if (goes_on()) load_pages();
  }

  /// Starts loading the first stretch's page numbers again. No other one's are loaded before they are final.
  FI_PREFETCH_DEVICE void read_first_pages_again() {
    if (count_ == 0) return;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      first_page_again_[i] = ptx::load_and_keep(p_.table.indices + first_page_at_[i]);
    }
  }
  FI_PREFETCH_DEVICE bool first_pages_changed() const {
    bool changed = false;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) changed |= ptx::opaque(first_page_again_[i]) != first_page_[i];
    return changed;
  }

  /// Waits until no copy is on its way, so that start() may be called again.
  FI_PREFETCH_DEVICE void drain() {
    ptx::copy_async_wait<0>();
    __syncwarp();
  }

  /// The next tile to issue.
  FI_PREFETCH_DEVICE const TileCursor<T::kWindow>& upcoming() const { return stretch_is_done_ ? ahead_ : at_; }

  /// Whether it holds none of its request's `newest` newest tokens.
  FI_PREFETCH_DEVICE bool upcoming_is_older_than(int32_t newest) const {
    return issued_ < count_ && upcoming().token() + kTileTokens <= upcoming().request.length - newest;
  }

  /// Tiles whose copies were started.
  FI_PREFETCH_DEVICE uint32_t issued() const { return issued_; }

  /// Starts the copies of the next tile, if there is one, into the ring's next stage. RUNS_AHEAD: this call may bring a
  /// later tile into L2. The first tile's leaves it out: code in the way of a short call costs it time even where it
  /// does not run.
  template <bool RUNS_AHEAD = false>
  FI_PREFETCH_DEVICE void issue() {
    if (issued_ >= count_) return;
    const bool new_stretch = stretch_is_done_;
    if (new_stretch) take_next_stretch();
    copy_tile();
    if (new_stretch) {  // after the copies, which must not wait for it
      look_ahead();
      if (goes_on()) load_pages();
    }
    if (RUNS_AHEAD && p_.levers.run_ahead > 0) run_ahead();
    ++issued_;
    ++at_.tile;
    stretch_is_done_ = at_.tile % kStretch == 0 || at_.tile == at_.request.tiles;
    ptx::copy_async_commit();
    stage_to_fill_ = next(stage_to_fill_);
    destination_ = stage_to_fill_ == 0 ? first_destination_ : destination_ + T::kStageBytes;
  }

  /// The run whose first tile is in a stage, or on its way there. The caller passed a warp barrier since its issue().
  FI_PREFETCH_DEVICE const Run& run(uint32_t stage) const { return runs_[stage]; }

  /// Waits for the copies of tile `tile` of the piece and of the TILES - 1 after it, and makes them visible to the
  /// whole warp. Also tells the warp's lanes that all of them are done with the tiles before.
  template <int TILES>
  FI_PREFETCH_DEVICE void wait(uint32_t tile) {
    wait_for_all_but<T::kStages - TILES>(issued_ - tile - TILES);
    __syncwarp();
  }

  /// Where the tile in a stage lies: its rows of K, then of V.
  FI_PREFETCH_DEVICE uint32_t tile(uint32_t stage) const { return ring_ + stage * T::kStageBytes; }
  FI_PREFETCH_DEVICE static uint32_t next(uint32_t stage) { return stage + 1 == T::kStages ? 0 : stage + 1; }

 private:
  /// Tiles of a request and head whose page numbers are loaded together, from a multiple of kStretch on: kTokens tokens
  /// a lane.
  static constexpr int kTokens = T::kPagesPerLane;
  static constexpr uint32_t kStretch = kTokens * 32 / kTileTokens;

  /// Whether the piece goes on after the stretch whose first tile is issued next or was just copied.
  FI_PREFETCH_DEVICE bool goes_on() const {
    return issued_ + min(kStretch - at_.tile % kStretch, at_.request.tiles - at_.tile) < count_;
  }

  /// Moves `ahead_` from that stretch to the next one.
  FI_PREFETCH_DEVICE void look_ahead() {
    if (!goes_on()) return;
    const uint32_t tiles = kStretch - at_.tile % kStretch;
    if constexpr (T::kFewRequests) {
      ahead_.advance(p_, tiles, of_this_lane_);
    } else {
      ahead_.advance(p_, tiles);
    }
  }

  /// Starts the load of the page numbers of the stretch that `ahead_` is in. They are used several tiles later: with
  /// 128 KB on their way to every SM a load takes as long as a tile or two.
  FI_PREFETCH_DEVICE void load_pages() {
    const int32_t first = ahead_.request.first_token +
                          static_cast<int32_t>(ahead_.tile / kStretch * kStretch * kTileTokens + lane_index());
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const TokenPlace place(p_.table, ahead_.request, first + i * 32);
      page_at_[i] = place.at;
      page_[i] = place.page;
      slot_[i] = place.slot;
    }
  }

  /// Works out where the rows of the stretch lie whose page numbers were loaded.
  FI_PREFETCH_DEVICE void take_next_stretch() {
    at_ = ahead_;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const uint32_t page = clamped_page(p_.table, page_[i]);
      k_offset_[i] = page * p_.k.page_stride + slot_[i] * p_.k.token_stride + at_.head * p_.k.head_stride;
      v_offset_[i] = page * p_.v.page_stride + slot_[i] * p_.v.token_stride + at_.head * p_.v.head_stride;
    }
  }

  /// Waits until no more than the `newest` tiles are on their way, of which there may be more than MOST.
  template <int MOST>
  FI_PREFETCH_DEVICE static void wait_for_all_but(int32_t newest) {
    if constexpr (MOST > 0) {
      if (newest < MOST) return wait_for_all_but<MOST - 1>(newest);
    }
    ptx::copy_async_wait<MOST>();
  }

  /// A row's chunks are copied by kRowChunks neighbouring lanes, so a warp's instruction copies whole rows. Rows beyond
  /// the request's length are copies of its last token's.
  FI_PREFETCH_DEVICE void copy_tile() {
    constexpr int kRowsPerCopy = 32 / T::kRowChunks;
    constexpr int kCopies = kTileTokens / kRowsPerCopy;
    const uint32_t lane = lane_index();
    const uint32_t first_lane = at_.tile % 2 * kTileTokens + lane / T::kRowChunks;
    const bool upper = kTokens == 2 && at_.tile / 2 % 2 == 1;
    const uint32_t k_offsets = upper ? k_offset_[kTokens - 1] : k_offset_[0];
    const uint32_t v_offsets = upper ? v_offset_[kTokens - 1] : v_offset_[0];
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) {
      // TileLayout::offset() of row copy * kRowsPerCopy + lane / kRowChunks, by constants from the first copy's: a
      // stage begins where the chunk's bits are 0.
      const uint32_t destination = (destination_ ^ (T::kRowChunks >= 8 ? (copy * kRowsPerCopy % 8) << 4 : 0)) +
                                   copy * kRowsPerCopy * T::kRowBytes;
      const uint32_t k_offset = __shfl_sync(kFullWarp, k_offsets, first_lane + copy * kRowsPerCopy);
      ptx::copy_async_16(destination, TileRows::address(k_, p_.unit_bytes, k_offset), policy_);
      const uint32_t v_offset = __shfl_sync(kFullWarp, v_offsets, first_lane + copy * kRowsPerCopy);
      ptx::copy_async_16(destination + T::kTileBytes, TileRows::address(v_, p_.unit_bytes, v_offset), policy_);
    }
    if ((issued_ == 0 || at_.tile == 0) && lane == 0) {
      runs_[stage_to_fill_] = {at_.request_index, at_.head,          at_.token(), at_.request.length,
                               at_.tile,          at_.request.tiles, {0, 0}};
    }
  }

  /// The paper's lever: bring the tile `run_ahead` tiles on into L2, if this warp will read it and it is of the same
  /// request and head (the cursor knows no other's pages). Its page numbers were loaded a tile before.
  FI_PREFETCH_DEVICE void run_ahead() {
    const uint32_t distance = p_.levers.run_ahead;
    const TileRows rows(p_, at_.head);
    if (far_tile_ == at_.tile + distance && issued_ + distance < count_) {
      rows.template prefetch<T>(p_, at_, far_, distance, /*evict_last=*/false);
    }
    const bool same_run = at_.tile + 1 + distance < at_.request.tiles;
    far_tile_ = same_run ? at_.tile + 1 + distance : 0;
    if (same_run) far_ = rows.find(p_, at_, distance + 1);
  }

  const DecodeParams& p_;
  Request of_this_lane_{};        // where the batch is of few
  TileCursor<T::kWindow> at_;     // the next tile to issue, unless its stretch is done
  TileCursor<T::kWindow> ahead_;  // in the stretch after it
  int32_t page_[kTokens]{};       // of this lane's tokens of that stretch, as the page table says
  int32_t page_at_[kTokens]{};    // where it says so
  uint32_t slot_[kTokens]{};
  int32_t first_page_[kTokens]{};  // the same of the piece's first stretch, and what the page table says now
  int32_t first_page_at_[kTokens]{};
  int32_t first_page_again_[kTokens]{};
  uint32_t k_offset_[kTokens]{};  // where this lane's tokens of at_'s stretch lie, in units
  uint32_t v_offset_[kTokens]{};
  bool stretch_is_done_ = false;
  Run* runs_;
  uint32_t ring_;
  /// Where this lane's first chunk of a tile goes, in the ring's first stage and in the one to fill. Not derived from
  /// ring_, which ptxas knows to be the same in all lanes: ptxas 13.0 then gives a copy both a uniform register for it
  /// and an L2 policy, an encoding that the GPU refuses as an illegal instruction.
  uint32_t first_destination_;
  uint32_t destination_ = 0;
  uint32_t count_ = 0;
  const uint8_t* k_;  // of the chunk that this lane copies of every row
  const uint8_t* v_;
  uint64_t policy_;
  uint32_t issued_ = 0;
  uint32_t stage_to_fill_ = 0;
  RowPlace far_{};
  uint32_t far_tile_ = 0;  // 0: none
};

}  // namespace fi_prefetch
