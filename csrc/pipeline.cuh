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
  FI_PREFETCH_DEVICE KvPipeline(const DecodeParams& p, uint8_t* ring, Run* runs)
      : p_(p),
        runs_(runs),
        ring_(ptx::shared_address(ring)),
        k_(ptx::opaque(p.k.data + lane_index() % T::kRowChunks * 16)),
        v_(ptx::opaque(p.v.data + lane_index() % T::kRowChunks * 16)),
        policy_(p.levers.stream ? ptx::policy_evict_first() : ptx::policy_evict_normal()) {}

  /// Begins a piece of `count` tiles (perhaps none) from `first` on: loads its first page numbers and works out where
  /// the rows lie.
  FI_PREFETCH_DEVICE void start(const TileCursor<T::kWindow>& first, uint32_t count) {
    ahead_ = first;
    count_ = count;
    issued_ = stage_to_fill_ = far_tile_ = 0;
    pair_is_done_ = false;
    if (count_ == 0) return;
    first_page_at_ = load_pages();
    first_page_ = first_page_again_ = page_;
    take_next_pair();
  }

  /// Starts loading this lane's first page number again. Every other one is loaded by issue().
  FI_PREFETCH_DEVICE void read_first_page_again() {
    if (count_ > 0) first_page_again_ = ptx::load_and_keep(p_.table.indices + first_page_at_);
  }
  FI_PREFETCH_DEVICE bool first_page_changed() const { return ptx::opaque(first_page_again_) != first_page_; }

  /// Waits until no copy is on its way, so that start() may be called again.
  FI_PREFETCH_DEVICE void drain() {
    ptx::copy_async_wait<0>();
    __syncwarp();
  }

  /// The next tile to issue.
  FI_PREFETCH_DEVICE const TileCursor<T::kWindow>& upcoming() const { return pair_is_done_ ? ahead_ : at_; }

  /// Whether it holds none of its request's `newest` newest tokens.
  FI_PREFETCH_DEVICE bool upcoming_is_older_than(int32_t newest) const {
    return issued_ < count_ && upcoming().token() + kTileTokens <= upcoming().request.length - newest;
  }

  /// Starts the copies of the next tile, if there is one, into the ring's next stage. Always closes a group, so that
  /// "all but the newest kStages - 1 groups" means the same tile for every count.
  FI_PREFETCH_DEVICE void issue() {
    if (issued_ < count_) {
      const bool new_pair = pair_is_done_ || issued_ == 0;
      if (pair_is_done_) take_next_pair();
      copy_tile();
      if (new_pair) load_pages_ahead();
      if (p_.levers.run_ahead > 0) run_ahead();
      ++issued_;
      ++at_.tile;
      pair_is_done_ = at_.tile % 2 == 0 || at_.tile == at_.request.tiles;
    }
    ptx::copy_async_commit();
    stage_to_fill_ = next(stage_to_fill_);
  }

  /// The run whose first tile is in a stage, or on its way there. The caller passed a warp barrier since its issue().
  FI_PREFETCH_DEVICE const Run& run(uint32_t stage) const { return runs_[stage]; }

  /// Waits for the oldest TILES tiles, where at most as many stages are free, and makes them visible to the whole warp.
  /// Also tells the warp's lanes that all of them are done with the stages before, which issue() fills next.
  template <int TILES>
  FI_PREFETCH_DEVICE void wait() {
    ptx::copy_async_wait<T::kStages - 2 * TILES>();
    __syncwarp();
  }

  /// Where the tile in a stage lies: its rows of K, then of V.
  FI_PREFETCH_DEVICE uint32_t tile(uint32_t stage) const { return ring_ + stage * T::kStageBytes; }
  FI_PREFETCH_DEVICE static uint32_t next(uint32_t stage) { return stage + 1 == T::kStages ? 0 : stage + 1; }

 private:
  /// Starts the load of the page numbers of the pair of tiles (an even one and the next) that `ahead_` is in: one token
  /// a lane. They are used two tiles later: with 128 KB on their way to every SM a load takes as long as a tile or two.
  /// Returns where in `indices` this lane's stands.
  FI_PREFETCH_DEVICE int32_t load_pages() {
    const TokenPlace place(
        p_.table, ahead_.request,
        ahead_.request.first_token + static_cast<int32_t>(ahead_.tile / 2 * (2 * kTileTokens) + lane_index()));
    slot_ = place.slot;
    page_ = place.page;
    return place.at;
  }

  /// Works out where the rows of the pair lie whose page numbers were loaded.
  FI_PREFETCH_DEVICE void take_next_pair() {
    at_ = ahead_;
    const uint32_t page = clamped_page(p_.table, page_);
    k_offset_ = page * p_.k.page_stride + slot_ * p_.k.token_stride + at_.head * p_.k.head_stride;
    v_offset_ = page * p_.v.page_stride + slot_ * p_.v.token_stride + at_.head * p_.v.head_stride;
  }

  /// After a pair's first copies, which must not wait for it: the next pair.
  FI_PREFETCH_DEVICE void load_pages_ahead() {
    ahead_.advance(p_, 2 - at_.tile % 2);
    load_pages();
  }

  /// A row's chunks are copied by kRowChunks neighbouring lanes, so a warp's instruction copies whole rows. Rows beyond
  /// the request's length are copies of its last token's.
  FI_PREFETCH_DEVICE void copy_tile() {
    constexpr int kRowsPerCopy = 32 / T::kRowChunks;
    constexpr int kCopies = kTileTokens / kRowsPerCopy;
    const uint32_t lane = lane_index();
    const uint32_t first_row = lane / T::kRowChunks;
    const uint32_t chunk = lane % T::kRowChunks;
    // first_row < kRowsPerCopy, so TileLayout::offset(copy * kRowsPerCopy + first_row, chunk) is this with constants
    // added and exclusive-ored: one instruction a copy.
    const uint32_t lane_offset = TileLayout<T>::offset(first_row, chunk);
    const uint32_t first_lane = at_.tile % 2 * kTileTokens + first_row;
    const uint32_t stage = tile(stage_to_fill_);
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) {
      const uint32_t destination = stage + copy * kRowsPerCopy * T::kRowBytes +
                                   (lane_offset ^ (T::kRowChunks >= 8 ? (copy * kRowsPerCopy % 8) << 4 : 0));
      const uint32_t k_offset = __shfl_sync(kFullWarp, k_offset_, first_lane + copy * kRowsPerCopy);
      ptx::copy_async_16(destination, TileRows::address(k_, p_.unit_bytes, k_offset), policy_);
      const uint32_t v_offset = __shfl_sync(kFullWarp, v_offset_, first_lane + copy * kRowsPerCopy);
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
  TileCursor<T::kWindow> at_;     // the next tile to issue, unless its pair is done
  TileCursor<T::kWindow> ahead_;  // in the pair after it
  int32_t page_ = 0;              // of this lane's token of that pair, as the page table says
  int32_t first_page_ = 0;        // the same of the piece's first pair
  int32_t first_page_at_ = 0;     // where it says so, and what it says now
  int32_t first_page_again_ = 0;
  uint32_t slot_ = 0;
  uint32_t k_offset_ = 0;  // where this lane's token of at_'s pair lies, in units
  uint32_t v_offset_ = 0;
  bool pair_is_done_ = false;
  Run* runs_;
  uint32_t ring_;
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
