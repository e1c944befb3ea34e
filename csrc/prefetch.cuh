// Where a tile's rows lie, and the hints that bring them into L2 before anybody waits for them.
#pragma once

#include "schedule.cuh"
#include "traits.cuh"

namespace fi_prefetch {

/// Lane t < 16 stands for the K row of the tile's token t, lane 16 + t for its V row. One number a lane says where its
/// row is; a copy gets it by shuffle.
class TileRows {
 public:
  FI_PREFETCH_DEVICE TileRows(const DecodeParams& p, uint32_t head) {
    const KvTensor& tensor = is_k() ? p.k : p.v;
    page_stride_ = tensor.page_stride;
    token_stride_ = tensor.token_stride;
    head_stride_ = tensor.head_stride;
    set_head(head);
  }

  FI_PREFETCH_DEVICE void set_head(uint32_t head) { head_offset_ = head * head_stride_; }

  /// The page number of this lane's token, `distance` tiles after the cursor's. Bypasses L1 (see load_request) and is
  /// clamped: no page number can lead outside the cache.
  template <typename Cursor>
  FI_PREFETCH_DEVICE int32_t load_page(const DecodeParams& p, const Cursor& at, uint32_t distance = 0) const {
    const int32_t page_in_request = page_of(p, clamped_token(at, distance));
    const int32_t position = min(at.request.page_begin + page_in_request, p.table.num_indices - 1);
    return min(max(__ldcg(p.table.indices + position), 0), p.table.num_pages - 1);
  }

  /// Where this lane's row starts, in units from the tensor's base. `page` is what load_page gave.
  template <typename Cursor>
  FI_PREFETCH_DEVICE uint32_t offset(const DecodeParams& p, const Cursor& at, int32_t page,
                                     uint32_t distance = 0) const {
    const int32_t token = clamped_token(at, distance);
    const uint32_t slot = token - page_of(p, token) * p.table.page_size;
    return static_cast<uint32_t>(page) * page_stride_ + slot * token_stride_ + head_offset_;
  }

  /// A product of 32-bit numbers, added to a 64-bit one: one instruction.
  FI_PREFETCH_DEVICE static const uint8_t* address(const uint8_t* base, uint32_t unit_bytes, uint32_t offset) {
    return base + static_cast<uint64_t>(offset) * unit_bytes;
  }

  /// Asks for this lane's row, `distance` tiles after the cursor's. Rows beyond the request's length are left out.
  template <typename T, typename Cursor>
  FI_PREFETCH_DEVICE void prefetch(const DecodeParams& p, const Cursor& at, int32_t page, uint32_t distance,
                                   bool evict_last) const {
    const int32_t token = at.token() + static_cast<int32_t>(distance * kTileTokens);
    const int32_t rows = min(at.request.length - token, kTileTokens);
    const int32_t row = lane_index() % kTileTokens;
    const uint8_t* address_of_row = address(is_k() ? p.k.data : p.v.data, p.unit_bytes, offset(p, at, page, distance));
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    // One request for the whole run of rows. Issue costs 24 ns a lane whatever its size (H100), so only lanes 0 and 16
    // ask, and only where a run is long; line prefetches of 32 lanes together take 18 ns.
    if (p.contiguous_tokens && !evict_last) {
      if (row == 0 && rows > 0) ptx::bulk_prefetch_l2(address_of_row, rows * T::kRowBytes);
      return;
    }
#endif
    if (row >= rows) return;
#pragma unroll
    for (int byte = 0; byte < T::kRowBytes; byte += 128) {
      if (evict_last) {
        ptx::prefetch_l2_evict_last(address_of_row + byte);
      } else {
        ptx::prefetch_l2(address_of_row + byte);
      }
    }
  }

 private:
  FI_PREFETCH_DEVICE static bool is_k() { return lane_index() < kTileTokens; }

  /// This lane's token, or the request's last one where the tile reaches beyond it.
  template <typename Cursor>
  FI_PREFETCH_DEVICE static int32_t clamped_token(const Cursor& at, uint32_t distance) {
    const int32_t token = at.token() + static_cast<int32_t>(distance * kTileTokens + lane_index() % kTileTokens);
    return max(min(token, at.request.length - 1), 0);
  }

  FI_PREFETCH_DEVICE static int32_t page_of(const DecodeParams& p, int32_t token) {
    return p.table.page_shift >= 0 ? token >> p.table.page_shift : token / p.table.page_size;
  }

  uint32_t page_stride_;
  uint32_t token_stride_;
  uint32_t head_stride_;
  uint32_t head_offset_;
};

/// Brings the first `tiles` tiles of a warp's piece into L2. What it reads of the page table may be stale: it decides
/// nothing but which lines are asked for.
template <typename T>
FI_PREFETCH_DEVICE void prefetch_head_of_piece(const DecodeParams& p, const Location& at, uint32_t tiles,
                                               bool evict_last) {
  TileCursor<T::kWindow> cursor(at);
  TileRows rows(p, cursor.head);
  for (uint32_t i = 0; i < tiles; ++i) {
    rows.prefetch<T>(p, cursor, rows.load_page(p, cursor), 0, evict_last);
    if (i + 1 == tiles) break;
    cursor.advance(p);
    rows.set_head(cursor.head);
  }
}

}  // namespace fi_prefetch
