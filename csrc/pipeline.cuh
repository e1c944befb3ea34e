// A warp's own ring of shared-memory stages: copies of the next tiles run while it computes on the oldest one. Warps
// never wait for each other here.
#pragma once

#include "tensor_copies.cuh"

namespace fi_prefetch {

template <typename T>
class KvPipeline {
 public:
  /// `rings` and `runs`: of all warps of the block.
  FI_PREFETCH_DEVICE KvPipeline(const ParamsOf<T>& p, uint8_t* rings, Run* runs)
      : p_(p),
        copies_(p, rings, runs),
        runs_(runs + warp_index() * T::kStages),
        ring_(ptx::shared_address(rings) + warp_index() * T::kRingBytes) {}

  /// Starts the load of what plan() noted for start().
  FI_PREFETCH_DEVICE void load_planned_pages(const PlannedWork& record) { copies_.load_planned_pages(record); }

  /// Begins a piece of `count` tiles (perhaps none) from `first` on: loads the page numbers of its first stretch, where
  /// they are not planned, and works out where they lie. Before the first issue() the caller loads the next stretch's.
  /// `of_this_lane`: the request whose number is the lane's, where requests are few or work is planned.
  FI_PREFETCH_DEVICE void start(const TileCursor<T::kWindow>& first, uint32_t count, const Request& of_this_lane) {
    of_this_lane_ = of_this_lane;
    ahead_ = first;
    count_ = count;
    issued_ = stage_to_fill_ = far_tile_ = 0;
    stretch_is_done_ = pages_are_due_ = false;
    copies_.restart();
    if (count_ == 0) return;
    if constexpr (T::kPlanned) {
      copies_.place_planned_pages(ahead_);
    } else {
      copies_.load_pages(ahead_);
      copies_.keep_pages();
    }
    take_next_stretch();
    look_ahead();
  }

  /// Brings the first `tiles` tiles into L2.
  FI_PREFETCH_DEVICE void prefetch_head(uint32_t tiles) const {
    if (count_ > 0) copies_.prefetch(at_, min(tiles, left_of_stretch()));
  }

  /// Starts the load of the second stretch's page numbers, once they are final.
  FI_PREFETCH_DEVICE void load_second_pages() {
    if (goes_on()) copies_.load_pages(ahead_);
  }

  /// Starts loading the first stretch's page numbers again. No other one's are loaded before they are final.
  FI_PREFETCH_DEVICE void read_first_pages_again() {
    if (count_ > 0) copies_.read_kept_pages_again();
  }
  FI_PREFETCH_DEVICE bool first_pages_changed() const { return copies_.kept_pages_changed(); }

  /// Waits until no copy is on its way, so that start() may be called again.
  FI_PREFETCH_DEVICE void drain() { copies_.drain(); }

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
    if (new_stretch) {
      if constexpr (kLoadsPagesLater) load_due_pages();
      take_next_stretch();
    }
    const uint32_t stage = stage_to_fill_;
    stage_to_fill_ = next(stage);
    copies_.copy(at_, stage_to_fill_);
    if ((issued_ == 0 || at_.tile == 0) && lane_index() == 0) {
      Run& run = runs_[stage];
      run.request = at_.request_index, run.head = at_.head, run.token = at_.token();
      run.length = at_.request.length, run.tile = at_.tile, run.tiles = at_.request.tiles;
    }
    if (new_stretch) {  // after the copies, which must not wait for it
      look_ahead();
      pages_are_due_ = goes_on();
      if constexpr (!kLoadsPagesLater) load_due_pages();
    }
    if (RUNS_AHEAD && p_.levers.run_ahead > 0) run_ahead();
    ++issued_;
    ++at_.tile;
    stretch_is_done_ = at_.tile % kStretch == 0 || at_.tile == at_.request.tiles;
  }

  /// Whether an issue() leaves it to load_due_pages() to load the next stretch's page numbers. Where a warp takes two
  /// tiles it issues two in a loop, at whose head the compiler waits for all loads: what the first one's began the
  /// second one's copies would wait for (2 to 7 % of batches of 10 to 70 MB of fp8 KV, H200). A tensor copy needs such
  /// a number every 32 tiles, and where one tile is issued it only makes the code longer.
  static constexpr bool kLoadsPagesLater = T::kTakesTwo && !T::kTensorCopies;
  FI_PREFETCH_DEVICE void load_due_pages() {
    if (pages_are_due_) copies_.load_pages(ahead_);
    pages_are_due_ = false;
  }

  /// The run whose first tile is in a stage, or on its way there. The caller passed a warp barrier since its issue().
  FI_PREFETCH_DEVICE const Run& run(uint32_t stage) const { return runs_[stage]; }

  /// Waits for the copies of tile `tile` of the piece and of the others of `tiles` (two at most, where the warp takes
  /// two) from there on, and makes them visible to the whole warp. Also tells the warp's lanes that all of them are
  /// done with the tiles before. `rows`: tokens that the request has from the first tile's first on.
  FI_PREFETCH_DEVICE void wait(uint32_t tile, uint32_t tiles, int32_t rows) {
    copies_.wait(issued_ - tile, tiles, rows);
  }

  /// Where the tile in a stage lies: its rows of K, then of V.
  FI_PREFETCH_DEVICE uint32_t tile(uint32_t stage) const { return ring_ + stage * T::kStageBytes; }
  FI_PREFETCH_DEVICE static uint32_t next(uint32_t stage) { return stage + 1 == T::kStages ? 0 : stage + 1; }

 private:
  using Copies = typename std::conditional<T::kTensorCopies, TensorCopies<T>, RowCopies<T>>::type;
  static constexpr uint32_t kStretch = Copies::kStretch;

  /// Tiles of the stretch from the next one to issue or just copied on.
  FI_PREFETCH_DEVICE uint32_t left_of_stretch() const {
    return min(kStretch - at_.tile % kStretch, at_.request.tiles - at_.tile);
  }

  /// Whether the piece goes on after the stretch whose first tile is issued next or was just copied.
  FI_PREFETCH_DEVICE bool goes_on() const { return issued_ + left_of_stretch() < count_; }

  /// Moves `ahead_` from that stretch to the next one.
  FI_PREFETCH_DEVICE void look_ahead() {
    if (!goes_on()) return;
    const uint32_t tiles = kStretch - at_.tile % kStretch;
    if constexpr (T::kPlanned) {
      ahead_.advance_planned(p_, tiles, of_this_lane_);
    } else if constexpr (T::kFewRequests) {
      ahead_.advance(p_, tiles, of_this_lane_);
    } else {
      ahead_.advance(p_, tiles);
    }
  }

  /// Goes over to the stretch whose page numbers were loaded.
  FI_PREFETCH_DEVICE void take_next_stretch() {
    at_ = ahead_;
    copies_.take_pages(at_);
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
  Copies copies_;
  Request of_this_lane_{};        // see start()
  TileCursor<T::kWindow> at_;     // the next tile to issue, unless its stretch is done
  TileCursor<T::kWindow> ahead_;  // in the stretch after it
  bool stretch_is_done_ = false;
  bool pages_are_due_ = false;  // those of `ahead_`
  Run* runs_;
  uint32_t ring_;
  uint32_t count_ = 0;
  uint32_t issued_ = 0;
  uint32_t stage_to_fill_ = 0;
  RowPlace far_{};
  uint32_t far_tile_ = 0;  // 0: none
};

}  // namespace fi_prefetch
