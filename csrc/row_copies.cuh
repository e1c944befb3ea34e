// Copies of tiles row by row, each lane 16 bytes at a time: pages may have any size, and a tile's tokens lie anywhere.
#pragma once

#include "planned.cuh"

namespace fi_prefetch {

/// Where a tile lies in a stage of a warp's ring: K, then V, token t of each in row t. Rows longer than 128 bytes are
/// cut into columns of 128, which lie one after the other. The 16-byte chunks of a column's row are permuted by an
/// exclusive or with a function of t, so that the eight rows of a matrix that ldmatrix reads at once lie in different
/// banks. It is what the tensor memory accelerator's swizzles of 128 and of 64 bytes make.
template <typename T>
struct TileLayout {
  static constexpr uint32_t kColumnChunks = T::kColumnBytes / 16;
  static constexpr uint32_t kColumnStride = kTileTokens * T::kColumnBytes;
  static_assert(kColumnChunks == 4 || kColumnChunks == 8, "a row has 64 bytes or a multiple of 128");

  FI_PREFETCH_DEVICE static constexpr uint32_t swizzle(uint32_t row) {
    // Rows of 64 bytes: two share the 128 bytes of all banks, so the chunk changes with every second row.
    return kColumnChunks == 8 ? row % 8 : row / 2 % 4;
  }
  FI_PREFETCH_DEVICE static constexpr uint32_t offset(uint32_t row, uint32_t chunk) {
    return chunk / kColumnChunks * kColumnStride + row * T::kColumnBytes +
           ((chunk % kColumnChunks ^ swizzle(row)) << 4);
  }
  /// The address `pair` pairs of chunks on, from one in a row's first pair.
  FI_PREFETCH_DEVICE static constexpr uint32_t pair_address(uint32_t address, uint32_t pair) {
    constexpr uint32_t kPairs = kColumnChunks / 2;
    return (address ^ (pair % kPairs << 5)) + pair / kPairs * kColumnStride;
  }
};

/// A warp's run of neighbouring tiles of one request and kv head, as far as the consumer must know it. Written beside
/// the run's first tile when that tile's copies are issued.
struct __align__(16) Run {
  uint32_t request;
  uint32_t head;
  int32_t token;   // the run's first
  int32_t length;  // of the request
  uint32_t tile;   // the run's first, within the request and head
  uint32_t tiles;  // of the request and head
  /// Of the stage, not of the run: where the bytes of the tile in it arrive, see TensorCopies.
  uint64_t barrier;
};

template <typename T>
class RowCopies {
 public:
  /// Tiles of a request and head whose page numbers are loaded together, from a multiple of kStretch on: kTokens tokens
  /// a lane.
  static constexpr int kTokens = T::kPagesPerLane;
  static constexpr uint32_t kStretch = kTokens * 32 / kTileTokens;

  /// `rings`: of all warps of the block.
  FI_PREFETCH_DEVICE RowCopies(const DecodeParams& p, const uint8_t* rings, const Run*)
      : p_(p),
        first_destination_(ptx::shared_address(rings) + threadIdx.x / 32 * T::kRingBytes +
                           TileLayout<T>::offset(lane_index() / T::kRowChunks, lane_index() % T::kRowChunks)),
        k_(ptx::opaque(p.k.data + lane_index() % T::kRowChunks * 16)),
        v_(ptx::opaque(p.v.data + lane_index() % T::kRowChunks * 16)),
        policy_(p.levers.stream ? ptx::policy_evict_first() : ptx::policy_evict_normal()) {}

  /// Back to the ring's first stage. No copy is on its way.
  FI_PREFETCH_DEVICE void restart() { destination_ = first_destination_; }

  /// Starts the load of the page numbers of the stretch that `at` is in. They are used several tiles later: with 128 KB
  /// on their way to every SM a load takes as long as a tile or two.
  FI_PREFETCH_DEVICE void load_pages(const TileCursor<T::kWindow>& at) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const TokenPlace place(p_.table, at.request, token_of_stretch(at, i));
      page_at_[i] = place.at;
      page_[i] = place.page;
      slot_[i] = place.slot;
    }
  }

  /// Starts the load of those that plan() looked up, of the stretch that a piece begins in.
  FI_PREFETCH_DEVICE void load_planned_pages(const PlannedWork& record) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) page_[i] = ptx::load_and_keep(record.token_pages + i * 32 + lane_index());
  }
  /// Says which stretch that is: the one that `at` is in.
  FI_PREFETCH_DEVICE void place_planned_pages(const TileCursor<T::kWindow>& at) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) slot_[i] = PageSlot(p_.table, at.request, token_of_stretch(at, i)).slot;
  }

  /// Goes over to the stretch whose page numbers were loaded, the one that `at` is in.
  FI_PREFETCH_DEVICE void take_pages(const TileCursor<T::kWindow>& at) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const uint32_t page = clamped_page(p_.table, page_[i]);
      k_offset_[i] = page * p_.k.page_stride + slot_[i] * p_.k.token_stride + at.head * p_.k.head_stride;
      v_offset_[i] = page * p_.v.page_stride + slot_[i] * p_.v.token_stride + at.head * p_.v.head_stride;
    }
  }

  /// Remembers the page numbers that were loaded, which may be a guess.
  FI_PREFETCH_DEVICE void keep_pages() {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      kept_page_at_[i] = page_at_[i];
      kept_page_[i] = kept_page_again_[i] = page_[i];
    }
  }
  /// Starts loading these again.
  FI_PREFETCH_DEVICE void read_kept_pages_again() {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      kept_page_again_[i] = ptx::load_and_keep(p_.table.indices + kept_page_at_[i]);
    }
  }
  FI_PREFETCH_DEVICE bool kept_pages_changed() const {
    bool changed = false;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) changed |= ptx::opaque(kept_page_again_[i]) != kept_page_[i];
    return changed;
  }

  /// Brings `tiles` tiles of the stretch, from the cursor's on, into L2.
  FI_PREFETCH_DEVICE void prefetch(const TileCursor<T::kWindow>& at, uint32_t tiles) const {
    const uint32_t first = at.tile % kStretch;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const uint32_t tile = (i * 32 + lane_index()) / kTileTokens;
      if (tile < first || tile >= first + tiles) continue;
#pragma unroll
      for (int byte = 0; byte < T::kRowBytes; byte += 128) {
        ptx::prefetch_l2(TileRows::address(p_.k.data, p_.unit_bytes, k_offset_[i]) + byte);
        ptx::prefetch_l2(TileRows::address(p_.v.data, p_.unit_bytes, v_offset_[i]) + byte);
      }
    }
  }

  /// Starts the copies of the cursor's tile into the next stage of the ring; `stage` is the one after that. A row's
  /// chunks are copied by kRowChunks neighbouring lanes, so a warp's instruction copies whole rows. Rows beyond the
  /// request's length are copies of its last token's.
  FI_PREFETCH_DEVICE void copy(const TileCursor<T::kWindow>& at, uint32_t stage) {
    constexpr int kRowsPerCopy = 32 / T::kRowChunks;
    constexpr int kCopies = kTileTokens / kRowsPerCopy;
    const uint32_t lane = lane_index();
    const uint32_t first_lane = at.tile % 2 * kTileTokens + lane / T::kRowChunks;
    const bool upper = kTokens == 2 && at.tile / 2 % 2 == 1;
    const uint32_t k_offsets = upper ? k_offset_[kTokens - 1] : k_offset_[0];
    const uint32_t v_offsets = upper ? v_offset_[kTokens - 1] : v_offset_[0];
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) {
      // TileLayout::offset() of row copy * kRowsPerCopy + lane / kRowChunks, by constants from the first copy's: a
      // stage begins where the chunk's bits are 0.
      const uint32_t destination =
          (destination_ ^ (TileLayout<T>::kColumnChunks == 8 ? (copy * kRowsPerCopy % 8) << 4 : 0)) +
          copy * kRowsPerCopy * T::kColumnBytes;
      const uint32_t k_offset = __shfl_sync(kFullWarp, k_offsets, first_lane + copy * kRowsPerCopy);
      ptx::copy_async_16(destination, TileRows::address(k_, p_.unit_bytes, k_offset), policy_);
      const uint32_t v_offset = __shfl_sync(kFullWarp, v_offsets, first_lane + copy * kRowsPerCopy);
      ptx::copy_async_16(destination + T::kTileBytes, TileRows::address(v_, p_.unit_bytes, v_offset), policy_);
    }
    ptx::copy_async_commit();
    destination_ = stage == 0 ? first_destination_ : destination_ + T::kStageBytes;
  }

  /// Waits for the oldest `tiles` of `issued`.
  FI_PREFETCH_DEVICE void wait(uint32_t issued, uint32_t tiles, int32_t) {
    wait_for_all_but<T::kStages - 1>(issued - tiles);
    __syncwarp();
  }

  /// Waits until no copy is on its way.
  FI_PREFETCH_DEVICE void drain() {
    ptx::copy_async_wait<0>();
    __syncwarp();
  }

 private:
  /// Of the stretch that `at` is in, this lane's `i`-th token.
  FI_PREFETCH_DEVICE static int32_t token_of_stretch(const TileCursor<T::kWindow>& at, int i) {
    return at.request.first_token +
           static_cast<int32_t>(at.tile / kStretch * kStretch * kTileTokens + lane_index() + i * 32);
  }

  /// Waits until no more than the `newest` tiles are on their way, MOST at most.
  template <uint32_t MOST>
  FI_PREFETCH_DEVICE static void wait_for_all_but(uint32_t newest) {
    if constexpr (MOST > 0) {
      if (newest < MOST) return wait_for_all_but<MOST - 1>(newest);
    }
    ptx::copy_async_wait<MOST>();
  }

  const DecodeParams& p_;
  int32_t page_[kTokens]{};     // of this lane's tokens of the stretch that was loaded, as the page table says
  int32_t page_at_[kTokens]{};  // where it says so
  uint32_t slot_[kTokens]{};
  int32_t kept_page_[kTokens]{};  // the same of the piece's first stretch, and what the page table says now
  int32_t kept_page_at_[kTokens]{};
  int32_t kept_page_again_[kTokens]{};
  uint32_t k_offset_[kTokens]{};  // where this lane's tokens of the stretch lie that tiles are copied of, in units
  uint32_t v_offset_[kTokens]{};
  /// Where this lane's first chunk of a tile goes, in the ring's first stage and in the one to fill. Not derived from
  /// what ptxas knows to be the same in all lanes: ptxas 13.0 then gives a copy both a uniform register for it and an
  /// L2 policy, an encoding that the GPU refuses as an illegal instruction.
  uint32_t first_destination_;
  uint32_t destination_ = 0;
  const uint8_t* k_;  // of the chunk that this lane copies of every row
  const uint8_t* v_;
  uint64_t policy_;
};

}  // namespace fi_prefetch
