// Who does what. All tiles of the batch form one line, ordered by request, then kv head, then token. The line is cut
// into one piece a warp, equal to within one tile, so skewed batches balance; the cut is made here, on the device, from
// the page table as it is when the kernel runs. Nothing was planned on the host that could be stale.
// fi_prefetch/schedule.py is the same arithmetic in Python.
#pragma once

#include "params.cuh"
#include "ptx.cuh"

namespace fi_prefetch {

constexpr uint32_t kFullWarp = 0xffffffffu;

FI_PREFETCH_DEVICE uint32_t lane_index() { return threadIdx.x % 32; }
FI_PREFETCH_DEVICE uint32_t warp_index() { return threadIdx.x / 32; }
FI_PREFETCH_DEVICE uint32_t warps_per_block() { return blockDim.x / 32; }

FI_PREFETCH_DEVICE uint32_t warp_inclusive_sum(uint32_t x) {
  for (uint32_t distance = 1; distance < 32; distance *= 2) {
    const uint32_t below = __shfl_up_sync(kFullWarp, x, distance);
    if (lane_index() >= distance) x += below;
  }
  return x;
}

/// What a request's page table row says. The same for every kv head.
struct __align__(16) Request {
  int32_t page_begin;   // position of its first page number in `indices`
  int32_t length;       // tokens in its KV cache
  int32_t first_token;  // first token of tile 0: 0, or the tile that holds the sliding window's first token
  uint32_t tiles;       // 0: nothing to attend to
};

/// Reads request `r`. Loads bypass L1: before the dependency wait they may see the previous kernel's half-written
/// table, and a line left in L1 would be served again after the wait. Every value is clamped so that no content of the
/// page table can lead to an access outside `indices`.
template <bool WINDOW>
FI_PREFETCH_DEVICE Request load_request(const DecodeParams& p, uint32_t r) {
  const PageTable& table = p.table;
  const int32_t begin = __ldcg(table.indptr + r);
  const int32_t end = __ldcg(table.indptr + r + 1);
  const int32_t last = __ldcg(table.last_page_len + r);
  Request request;
  request.page_begin = min(max(begin, 0), table.num_indices);
  const int32_t pages =
      min(min(max(end, request.page_begin), table.num_indices) - request.page_begin, table.max_pages_per_request);
  request.length = pages > 0 ? (pages - 1) * table.page_size + min(max(last, 0), table.page_size) : 0;
  request.first_token = 0;
  if (WINDOW) {
    // The oldest token that the request's first query token sees, down to its tile's first.
    request.first_token = max(request.length - p.q_len - p.window_left, 0) / kTileTokens * kTileTokens;
  }
  request.tiles = static_cast<uint32_t>(request.length - request.first_token + kTileTokens - 1) / kTileTokens;
  return request;
}

/// A position on the line of tiles: tile `offset % tiles` of kv head `offset / tiles` of a request.
struct Location {
  Request request{};
  uint32_t request_index = 0;
  uint32_t offset = 0;
};

/// The requests and the running sums of their tiles, in shared memory. A warp then finds any position with two loads a
/// lane and no division, and need not read the page table again.
struct RequestScan {
  Request* requests;  // [groups * 32]
  uint32_t* prefix;   // [groups * 32]: tiles of the request and of those before it in its group of 32
  uint32_t groups;

  static __host__ __device__ constexpr uint32_t shared_bytes(uint32_t batch_size) {
    return (batch_size + 31) / 32 * 32 * (sizeof(Request) + sizeof(uint32_t));
  }

  /// Whether some request has no tiles. Collective over the block; ends with a barrier.
  template <bool WINDOW>
  FI_PREFETCH_DEVICE bool build(const DecodeParams& p, uint8_t* shared) {
    const uint32_t batch_size = p.table.batch_size;
    groups = (batch_size + 31) / 32;
    requests = reinterpret_cast<Request*>(shared);
    prefix = reinterpret_cast<uint32_t*>(requests + groups * 32);
    bool empty = false;
    for (uint32_t group = warp_index(); group < groups; group += warps_per_block()) {
      const uint32_t r = group * 32 + lane_index();
      Request request{};
      if (r < batch_size) request = load_request<WINDOW>(p, r);
      requests[r] = request;
      prefix[r] = warp_inclusive_sum(request.tiles);
      empty |= r < batch_size && request.tiles == 0;
    }
    return __syncthreads_or(empty);
  }

  /// Tiles of one kv head over all requests. Collective over the warp.
  FI_PREFETCH_DEVICE uint32_t total() const {
    uint32_t sum = 0;
    for (uint32_t group = lane_index(); group < groups; group += 32) sum += prefix[group * 32 + 31];
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kFullWarp, sum, distance);
    return sum;
  }

  /// Where `position` (below heads * total()) lies. Collective over the warp, the same position in every lane.
  FI_PREFETCH_DEVICE Location locate(uint32_t position, uint32_t heads) const {
    const uint32_t lane = lane_index();
    uint32_t before = 0;  // tiles a head of the requests before `group`
    uint32_t group = 0;
    for (uint32_t first = 0; first < groups; first += 32) {
      const uint32_t tiles = first + lane < groups ? prefix[(first + lane) * 32 + 31] : 0;
      const uint32_t sum = warp_inclusive_sum(tiles);
      const uint32_t beyond = __ballot_sync(kFullWarp, heads * (before + sum) > position);
      if (beyond != 0) {
        const int hit = __ffs(beyond) - 1;
        group = first + hit;
        before += __shfl_sync(kFullWarp, sum - tiles, hit);
        break;
      }
      before += __shfl_sync(kFullWarp, sum, 31);
    }
    const uint32_t sum = prefix[group * 32 + lane];
    const uint32_t beyond = __ballot_sync(kFullWarp, heads * (before + sum) > position);
    const int hit = beyond != 0 ? __ffs(beyond) - 1 : 31;
    const uint32_t sum_before = __shfl_up_sync(kFullWarp, sum, 1);
    const uint32_t start = before + __shfl_sync(kFullWarp, lane == 0 ? 0 : sum_before, hit);
    const uint32_t r = group * 32 + hit;
    return {requests[r], r, position - heads * start};
  }
};

/// The cut of `tiles` tiles over `workers` warps: worker j takes [begin(j), begin(j + 1)), sizes differ by at most one,
/// and the longer pieces are spread evenly (the first ones alone would make whole blocks late).
struct Partition {
  uint32_t tiles;
  uint32_t workers;  // at most 65,535, so that begin's product fits 32 bits
  uint32_t quotient;
  uint32_t remainder;

  FI_PREFETCH_DEVICE Partition(uint32_t tiles_, uint32_t workers_)
      : tiles(tiles_), workers(workers_), quotient(tiles_ / workers_), remainder(tiles_ % workers_) {}

  FI_PREFETCH_DEVICE uint32_t begin(uint32_t j) const { return j * quotient + j * remainder / workers; }

  /// The worker whose piece holds `tile`. A float guess, then exact: it is off by a few at most.
  FI_PREFETCH_DEVICE uint32_t owner(uint32_t tile) const {
    const float guess = static_cast<float>(tile) * (static_cast<float>(workers) / static_cast<float>(tiles));
    uint32_t j = min(static_cast<uint32_t>(guess), workers - 1);
    while (begin(j) > tile) --j;
    while (begin(j + 1) <= tile) ++j;
    return j;
  }
};

/// Blocks that get work: few tiles are done sooner by few blocks, whose partials merge faster. Every one of them gets a
/// tile at least.
FI_PREFETCH_DEVICE uint32_t active_blocks(uint32_t tiles, uint32_t blocks, uint32_t warps,
                                          uint32_t min_tiles_per_warp) {
  const uint32_t tiles_per_block = warps * min_tiles_per_warp;
  return max(min((tiles + tiles_per_block - 1) / tiles_per_block, blocks), 1u);
}

/// The cut for a grid of `blocks` blocks of `warps` warps. Collective over the warp, after RequestScan::build.
FI_PREFETCH_DEVICE Partition cut(const DecodeParams& p, const RequestScan& scan, uint32_t blocks, uint32_t warps) {
  const uint32_t tiles = scan.total() * p.num_kv_heads;
  return Partition(tiles, active_blocks(tiles, blocks, warps, p.min_tiles_per_warp) * warps);
}

/// Walks the line of tiles. The same values in every lane of the warp.
template <bool WINDOW>
struct TileCursor {
  Request request;
  uint32_t request_index;
  uint32_t head;
  uint32_t tile;

  FI_PREFETCH_DEVICE explicit TileCursor(const Location& at) : request(at.request), request_index(at.request_index) {
    const uint32_t tiles = max(request.tiles, 1u);  // a warp without a piece has no location
    head = at.offset / tiles;
    tile = at.offset - head * tiles;
  }

  FI_PREFETCH_DEVICE int32_t token() const { return request.first_token + static_cast<int32_t>(tile * kTileTokens); }

  /// To the next tile. The caller knows that there is one.
  FI_PREFETCH_DEVICE void advance(const DecodeParams& p) {
    if (++tile < request.tiles) return;
    tile = 0;
    if (++head < static_cast<uint32_t>(p.num_kv_heads)) return;
    head = 0;
    next_request(p);
  }

 private:
  /// To the next request that has tiles: 32 candidates a step, one a lane.
  FI_PREFETCH_DEVICE void next_request(const DecodeParams& p) {
    const uint32_t batch_size = p.table.batch_size;
    for (uint32_t first = request_index + 1; first < batch_size; first += 32) {
      const uint32_t r = first + lane_index();
      Request candidate = load_request<WINDOW>(p, min(r, batch_size - 1));
      if (r >= batch_size) candidate.tiles = 0;
      const uint32_t with_tiles = __ballot_sync(kFullWarp, candidate.tiles > 0);
      if (with_tiles == 0) continue;
      const int hit = __ffs(with_tiles) - 1;
      request_index = first + hit;
      request.page_begin = __shfl_sync(kFullWarp, candidate.page_begin, hit);
      request.length = __shfl_sync(kFullWarp, candidate.length, hit);
      request.first_token = __shfl_sync(kFullWarp, candidate.first_token, hit);
      request.tiles = __shfl_sync(kFullWarp, candidate.tiles, hit);
      return;
    }
  }
};

}  // namespace fi_prefetch
