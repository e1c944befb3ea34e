// Copies of whole tiles by the tensor memory accelerator (TMA), where the page size is a multiple of a tile's tokens:
// one lane asks for a tile's K and for its V, and nobody works out where their rows lie. Where a piece has few tiles,
// their copies are on their way sooner than those of a warp that asks row by row.
#pragma once

#include "row_copies.cuh"

namespace fi_prefetch {

/// The KV cache as the tensor memory accelerator sees it: [page, head, column of a row, token of the page, byte of the
/// column]. Its boxes are tiles as TileLayout has them.
struct TensorMaps {
  CUtensorMap k;
  CUtensorMap v;
};

/// What a kernel takes that copies whole tiles.
struct TensorDecodeParams : DecodeParams {
  TensorMaps maps;
};

template <typename T>
using ParamsOf = typename std::conditional<T::kTensorCopies, TensorDecodeParams, DecodeParams>::type;

template <typename T>
class TensorCopies {
 public:
  /// Tiles of a request and head whose page numbers are loaded together, one a lane, from a multiple of kStretch on.
  static constexpr uint32_t kStretch = 32;

  /// `rings`, `runs`: of all warps of the block.
  FI_PREFETCH_DEVICE TensorCopies(const TensorDecodeParams& p, const uint8_t* rings, const Run* runs)
      : p_(p),
        ring_(ptx::shared_address(rings) + warp_index() * T::kRingBytes),
        barriers_(ptx::shared_address(&runs->barrier) + warp_index() * T::kStages * sizeof(Run)),
        policy_(p.levers.stream ? ptx::policy_evict_first() : ptx::policy_evict_normal()) {
    if (threadIdx.x == 0) {
      ptx::prefetch_tensor_map(&p.maps.k);
      ptx::prefetch_tensor_map(&p.maps.v);
    }
    if (lane_index() < T::kStages) ptx::barrier_init(barriers_ + lane_index() * sizeof(Run));
    ptx::fence_barrier_init();
    __syncwarp();
  }

  /// Back to the ring's first stage. No copy is on its way.
  FI_PREFETCH_DEVICE void restart() { oldest_ = 0; }

  /// Starts the load of the page numbers of the stretch that `at` is in.
  FI_PREFETCH_DEVICE void load_pages(const TileCursor<T::kWindow>& at) {
    const TokenPlace place(p_.table, at.request, token_of_stretch(at));
    page_at_ = place.at;
    page_ = place.page;
    slot_ = place.slot;
  }

  /// Starts the load of those that plan() looked up, of the stretch that a piece begins in.
  FI_PREFETCH_DEVICE void load_planned_pages(const PlannedWork& record) {
    page_ = ptx::load_and_keep(record.tile_pages + lane_index());
  }
  /// Says which stretch that is: the one that `at` is in.
  FI_PREFETCH_DEVICE void place_planned_pages(const TileCursor<T::kWindow>& at) {
    slot_ = PageSlot(p_.table, at.request, token_of_stretch(at)).slot;
  }

  /// Goes over to the stretch whose page numbers were loaded.
  FI_PREFETCH_DEVICE void take_pages(const TileCursor<T::kWindow>&) {
    current_page_ = static_cast<int32_t>(clamped_page(p_.table, page_));
    current_slot_ = slot_;
  }

  /// Remembers the page numbers that were loaded, which may be a guess.
  FI_PREFETCH_DEVICE void keep_pages() {
    kept_page_at_ = page_at_;
    kept_page_ = kept_page_again_ = page_;
  }
  /// Starts loading these again.
  FI_PREFETCH_DEVICE void read_kept_pages_again() {
    kept_page_again_ = ptx::load_and_keep(p_.table.indices + kept_page_at_);
  }
  FI_PREFETCH_DEVICE bool kept_pages_changed() const { return ptx::opaque(kept_page_again_) != kept_page_; }

  /// Brings `tiles` tiles of the stretch, from the cursor's on, into L2.
  FI_PREFETCH_DEVICE void prefetch(const TileCursor<T::kWindow>& at, uint32_t tiles) const {
#pragma unroll 1
    for (uint32_t tile = at.tile; tile < at.tile + tiles; ++tile) {
      const ptx::TensorPlace place = place_of(tile, at.head);
      ptx::prefetch_tensor(&p_.maps.k, place);
      ptx::prefetch_tensor(&p_.maps.v, place);
    }
  }

  /// Starts the copies of the cursor's tile into the next stage of the ring; `stage` is the one after that.
  FI_PREFETCH_DEVICE void copy(const TileCursor<T::kWindow>& at, uint32_t stage) {
    const uint32_t filled = (stage == 0 ? T::kStages : stage) - 1;
    const uint32_t barrier = barriers_ + filled * sizeof(Run), tile = ring_ + filled * T::kStageBytes;
    const ptx::TensorPlace place = place_of(at.tile, at.head);
    ptx::barrier_expect(barrier, T::kStageBytes);
    ptx::copy_tensor(tile, &p_.maps.k, place, barrier, policy_);
    ptx::copy_tensor(tile + T::kTileBytes, &p_.maps.v, place, barrier, policy_);
    ++on_their_way_;
  }

  /// Waits for the oldest `tiles` that are on their way. `rows`: tokens that the request has from the first one's first
  /// on.
  FI_PREFETCH_DEVICE void wait(uint32_t, uint32_t tiles, int32_t rows) {
    wait_for_oldest(rows);
    if (T::kTakesTwo && tiles == 2) wait_for_oldest(rows - kTileTokens);
  }

  /// Waits until no copy is on its way.
  FI_PREFETCH_DEVICE void drain() {
#pragma unroll 1
    while (on_their_way_ > 0) wait_for_oldest(kTileTokens);
  }

 private:
  /// There is anything in the rows of V after the request's, and a product with 0 is not 0 for all of it.
  FI_PREFETCH_DEVICE void wait_for_oldest(int32_t rows) {
    const uint32_t barrier = barriers_ + oldest_ * sizeof(Run), parity = parities_ >> oldest_ & 1;
    while (!__all_sync(kFullWarp, ptx::barrier_passed(barrier, parity))) {
    }
    __syncwarp();  // a vote orders no memory
    if (rows < kTileTokens) clear_values(oldest_, rows);
    parities_ ^= 1u << oldest_;
    oldest_ = oldest_ + 1 == T::kStages ? 0 : oldest_ + 1;
    --on_their_way_;
  }

  /// Of the stretch that `at` is in, the first token of this lane's tile.
  FI_PREFETCH_DEVICE static int32_t token_of_stretch(const TileCursor<T::kWindow>& at) {
    return at.request.first_token + static_cast<int32_t>((at.tile / kStretch * kStretch + lane_index()) * kTileTokens);
  }

  FI_PREFETCH_DEVICE ptx::TensorPlace place_of(uint32_t tile, uint32_t head) const {
    const int32_t page = __shfl_sync(kFullWarp, current_page_, tile % kStretch);
    const int32_t slot = __shfl_sync(kFullWarp, current_slot_, tile % kStretch);
    return {0, slot, 0, static_cast<int32_t>(head), page};
  }

  /// Zeros in a stage's rows of V from `row` on. All lanes write everywhere, the last chunk several times: a store that
  /// hangs on the lane is a branch that some lanes take (see uniform()).
  FI_PREFETCH_DEVICE void clear_values(uint32_t stage, uint32_t row) {
    const uint32_t v_tile = ring_ + stage * T::kStageBytes + T::kTileBytes;
#pragma unroll 1
    for (uint32_t byte = row * T::kColumnBytes; byte < TileLayout<T>::kColumnStride; byte += 32 * 16) {
#pragma unroll
      for (uint32_t column = 0; column < T::kRowBytes / T::kColumnBytes; ++column) {
        ptx::store_zeros_16(v_tile + column * TileLayout<T>::kColumnStride +
                            min(byte + lane_index() * 16, TileLayout<T>::kColumnStride - 16));
      }
    }
    ptx::fence_tensor_copies();  // before a copy into the same stage
    __syncwarp();
  }

  const TensorDecodeParams& p_;
  uint32_t ring_;
  uint32_t barriers_;  // one a stage, which a tile's bytes arrive at
  uint64_t policy_;
  int32_t page_ = 0;     // of this lane's tile of the stretch that was loaded, as the page table says
  int32_t page_at_ = 0;  // where it says so
  int32_t slot_ = 0;
  int32_t current_page_ = 0;  // the same of the stretch that tiles are copied of
  int32_t current_slot_ = 0;
  int32_t kept_page_ = 0;  // and of the piece's first one, and what the page table says now
  int32_t kept_page_at_ = 0;
  int32_t kept_page_again_ = 0;
  uint32_t oldest_ = 0;    // stage of the oldest tile on its way
  uint32_t parities_ = 0;  // a bit a stage: which of the barrier's phases its next tile ends
  uint32_t on_their_way_ = 0;
};

}  // namespace fi_prefetch
