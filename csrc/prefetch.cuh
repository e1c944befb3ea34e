// Where a tile's rows lie, and the hints that bring them into L2 before anybody waits for them.
#pragma once

#include "schedule.cuh"
#include "traits.cuh"

namespace fi_prefetch {

template <typename T>
using ScanOf = RequestScan<T::kWindow, T::kFewRequests>;

/// Which of a request's pages holds a token, and where in it. A token beyond the request's length stands for its last
/// one.
struct PageSlot {
  int32_t page;
  uint32_t slot;

  FI_PREFETCH_DEVICE PageSlot(const PageTable& table, const Request& request, int32_t token) {
    token = min(token, request.length - 1);
    page = static_cast<int32_t>(ptx::wide_product(token, table.page_inverse) >> (31 + table.page_shift));
    slot = token - page * table.page_size;
  }
};

/// Where a token of a request lies, but for the number of its page, whose load may still be on its way.
struct TokenPlace {
  int32_t at;    // where in `indices` the page number stands
  int32_t page;  // as the page table says
  uint32_t slot;

  /// Starts the load. Bypasses L1 (see load_row; request_of bounds the position).
  FI_PREFETCH_DEVICE TokenPlace(const PageTable& table, const Request& request, int32_t token) {
    const PageSlot place(table, request, token);
    at = request.page_begin + place.page;
    page = ptx::load_and_keep(table.indices + at);
    slot = place.slot;
  }
};

/// No page number leads outside the cache: negative ones are large unsigned ones. Applied where the number is used, not
/// where it is loaded, so that nobody waits for the load before.
FI_PREFETCH_DEVICE uint32_t clamped_page(const PageTable& table, int32_t page) {
  return min(static_cast<uint32_t>(page), static_cast<uint32_t>(table.num_pages - 1));
}

/// Where this lane's row of a tile lies, but for the page number, whose load may still be on its way.
struct RowPlace {
  int32_t page;   // as the page table says
  uint32_t rest;  // of slot and head, in units
};

/// Lane t < 16 stands for the K row of the tile's token t, lane 16 + t for its V row. So a warp asks for a tile with
/// an instruction a line of a row.
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

  /// Starts the load of the page number of this lane's token, `distance` tiles after the cursor's.
  template <typename Cursor>
  FI_PREFETCH_DEVICE RowPlace find(const DecodeParams& p, const Cursor& at, uint32_t distance = 0) const {
    const int32_t token = at.token() + static_cast<int32_t>(distance * kTileTokens + lane_index() % kTileTokens);
    const TokenPlace place(p.table, at.request, token);
    return {place.page, place.slot * token_stride_ + head_offset_};
  }

  /// In units from the tensor's base.
  FI_PREFETCH_DEVICE uint32_t offset(const DecodeParams& p, const RowPlace& place) const {
    return clamped_page(p.table, place.page) * page_stride_ + place.rest;
  }

  /// A product of 32-bit numbers, added to a 64-bit one: one instruction.
  FI_PREFETCH_DEVICE static const uint8_t* address(const uint8_t* base, uint32_t unit_bytes, uint32_t offset) {
    return base + ptx::wide_product(offset, unit_bytes);
  }

  /// Asks for this lane's row, `distance` tiles after the cursor's. Rows beyond the request's length are left out.
  template <typename T, typename Cursor>
  FI_PREFETCH_DEVICE void prefetch(const DecodeParams& p, const Cursor& at, const RowPlace& place, uint32_t distance,
                                   bool evict_last) const {
    const int32_t token = at.token() + static_cast<int32_t>(distance * kTileTokens);
    const int32_t rows = min(at.request.length - token, kTileTokens);
    const int32_t row = lane_index() % kTileTokens;
    const uint8_t* address_of_row = address(is_k() ? p.k.data : p.v.data, p.unit_bytes, offset(p, place));
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

  uint32_t page_stride_;
  uint32_t token_stride_;
  uint32_t head_stride_;
  uint32_t head_offset_;
};

/// Brings the first `tiles` tiles of a warp's piece into L2, or fewer once `give_way()` says so. What it reads of the
/// page table may be stale: it decides nothing but which lines are asked for.
template <typename T, typename GiveWay>
FI_PREFETCH_DEVICE void prefetch_head_of_piece(const DecodeParams& p, TileCursor<T::kWindow> cursor, uint32_t tiles,
                                               bool evict_last, const GiveWay& give_way) {
  TileRows rows(p, cursor.head);
  for (uint32_t i = 0; i < tiles && !give_way(); ++i) {
    rows.prefetch<T>(p, cursor, rows.find(p, cursor), 0, evict_last);
    if (i + 1 == tiles) break;
    cursor.advance(p);
    rows.set_head(cursor.head);
  }
}

}  // namespace fi_prefetch
