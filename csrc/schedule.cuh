// Who does what. All tiles of the batch form one line, ordered by request, then kv head, then token. The line is cut
// into one piece a warp, equal to within one tile, so skewed batches balance; or, where requests differ and there are
// few of them, so that every piece is of one request and head. Where many differ, a warp goes from one to the next, and
// the line has a gap before each, for the time that this takes. The cut is made here, on the device, from the page
// table as it is when the kernel runs. Nothing was planned on the host that could be stale. fi_prefetch/schedule.py is
// the same arithmetic in Python.
#pragma once

#include "params.cuh"
#include "ptx.cuh"

namespace fi_prefetch {

constexpr uint32_t kFullWarp = 0xffffffffu;
/// Requests that every warp keeps in its registers, one a lane.
constexpr int32_t kMostFewRequests = 32;
/// K and V of a tile: of 16-bit numbers in 128 dimensions, or of more.
constexpr uint32_t kLargeTileBytes = 8 << 10;

/// See gap_of_line().
__host__ __device__ constexpr uint32_t longest_gap(uint32_t tile_bytes) {
  return tile_bytes < kLargeTileBytes ? kLargeTileBytes / tile_bytes : 1;
}

FI_PREFETCH_DEVICE uint32_t lane_index() { return threadIdx.x % 32; }
/// A value that is the same in every lane, said so that the compiler knows it. It must know it of every branch that
/// code which is collective over the warp hangs on, loops' ends included: else it adds a path for lanes that went
/// another way to each shuffle from there on (a quarter of the decode kernel's instructions). A store by one lane alone
/// inside of a loop is such a branch as well, so all lanes store what is the same.
template <typename Value>
FI_PREFETCH_DEVICE Value uniform(Value value) {
  return __shfl_sync(kFullWarp, value, 0);
}
FI_PREFETCH_DEVICE uint32_t warp_index() { return uniform(threadIdx.x / 32); }
FI_PREFETCH_DEVICE uint32_t warps_per_block() { return blockDim.x / 32; }
/// The warp's in the grid.
FI_PREFETCH_DEVICE uint32_t warp_number() { return blockIdx.x * warps_per_block() + warp_index(); }

FI_PREFETCH_DEVICE uint32_t warp_inclusive_sum(uint32_t x) {
  for (uint32_t distance = 1; distance < 32; distance *= 2) {
    const uint32_t below = __shfl_up_sync(kFullWarp, x, distance);
    if (lane_index() >= distance) x += below;
  }
  return x;
}

/// floor(n / d) of numbers whose quotient is small (below 2^20): a float guess, which is off by one at most, then
/// exact.
FI_PREFETCH_DEVICE uint32_t small_quotient(uint32_t n, uint32_t d) {
  uint32_t quotient = static_cast<uint32_t>(__fdividef(static_cast<float>(n), static_cast<float>(d)));
  const int32_t remainder = static_cast<int32_t>(n - quotient * d);
  if (remainder < 0) --quotient;
  if (remainder >= static_cast<int32_t>(d)) ++quotient;
  return quotient;
}

/// What a request's page table row says. The same for every kv head.
struct __align__(16) Request {
  int32_t page_begin;   // position of its first page number in `indices`
  int32_t length;       // tokens in its KV cache
  int32_t first_token;  // first token of tile 0: 0, or the tile that holds the sliding window's first token
  uint32_t tiles;       // 0: nothing to attend to

  /// Lane `source`'s request. Collective over the warp.
  FI_PREFETCH_DEVICE Request of_lane(int source) const {
    return {__shfl_sync(kFullWarp, page_begin, source), __shfl_sync(kFullWarp, length, source),
            __shfl_sync(kFullWarp, first_token, source), __shfl_sync(kFullWarp, tiles, source)};
  }
};

/// A row of the page table as it is in memory.
struct TableRow {
  int32_t begin;
  int32_t end;
  int32_t last_page_len;

  FI_PREFETCH_DEVICE bool operator!=(const TableRow& other) const {
    return begin != other.begin || end != other.end || last_page_len != other.last_page_len;
  }
};

/// Starts the loads of row `r`; an empty one where `r` is beyond the batch.
template <typename Load>
FI_PREFETCH_DEVICE TableRow load_row(const PageTable& table, uint32_t r, const Load& load) {
  if (r >= static_cast<uint32_t>(table.batch_size)) return {0, 0, 0};
  return {load(table.indptr + r), load(table.indptr + r + 1), load(table.last_page_len + r)};
}
/// Past L1: before the dependency wait the loads may see the previous kernel's half-written table, and a line left in
/// L1 would be served again after the wait.
FI_PREFETCH_DEVICE TableRow load_row(const PageTable& table, uint32_t r) {
  return load_row(table, r, [](const int32_t* from) { return ptx::load_and_keep(from); });
}

/// The request of a row. Every value is clamped so that no content of the page table can lead to an access outside
/// `indices`: positions page_begin + t / page_size are below num_indices for every token t below length.
template <bool WINDOW>
FI_PREFETCH_DEVICE Request request_of(const DecodeParams& p, const TableRow& row) {
  const PageTable& table = p.table;
  Request request;
  request.page_begin = min(max(row.begin, 0), table.num_indices);
  const int32_t pages =
      min(min(max(row.end, request.page_begin), table.num_indices) - request.page_begin, table.max_pages_per_request);
  request.length = pages > 0 ? (pages - 1) * table.page_size + min(max(row.last_page_len, 0), table.page_size) : 0;
  request.first_token = 0;
  if (WINDOW) {
    // The oldest token that the request's first query token sees, down to its tile's first.
    request.first_token = max(request.length - p.q_len - p.window_left, 0) / kTileTokens * kTileTokens;
  }
  request.tiles = static_cast<uint32_t>(request.length - request.first_token + kTileTokens - 1) / kTileTokens;
  return request;
}

/// The request of row `r`; an empty one where `r` is beyond the batch.
template <bool WINDOW>
FI_PREFETCH_DEVICE Request load_request(const DecodeParams& p, uint32_t r) {
  return request_of<WINDOW>(p, load_row(p.table, r));
}
/// What plan() noted of it, so that all that a planned call does fits together. Without a branch: the load behind it
/// would begin later than others that the same wait is for.
FI_PREFETCH_DEVICE Request load_planned_request(const DecodeParams& p, uint32_t r) {
  const bool exists = r < static_cast<uint32_t>(p.table.batch_size);
  const int4 noted = __ldcg(reinterpret_cast<const int4*>(p.planned_requests + (exists ? r : 0)));
  return {noted.x, noted.y, noted.z, exists ? static_cast<uint32_t>(noted.w) : 0};
}

/// Splits of at most `most_tiles` tiles that `tiles` tiles are cut into. A line of work is one of splits of every
/// request and head; of tiles where a split is one.
FI_PREFETCH_DEVICE uint32_t split_count(uint32_t tiles, uint32_t most_tiles) {
  return (tiles + most_tiles - 1) / most_tiles;
}
/// The same where they are few (see small_quotient).
FI_PREFETCH_DEVICE uint32_t small_split_count(uint32_t tiles, uint32_t most_tiles) {
  return small_quotient(tiles + most_tiles - 1, most_tiles);
}

/// A position on the line: split `offset % splits` of kv head `offset / splits` of a request. Where the line has gaps,
/// these are among the splits, before a head's first one.
struct Location {
  Request request{};
  uint32_t request_index = 0;
  uint32_t splits = 0;
  uint32_t offset = 0;
};

/// The requests, and the running sums of their splits. FEW_REQUESTS: at most kMostFewRequests, and no warp waits for
/// another. Else they lie in shared memory, 32 a group.
template <bool WINDOW, bool FEW_REQUESTS>
class RequestScan {
 public:
  static constexpr bool kInSharedMemory = !FEW_REQUESTS;

  static __host__ __device__ constexpr uint32_t shared_bytes(uint32_t batch_size) {
    return FEW_REQUESTS ? 0 : (batch_size + 31) / 32 * 32 * (sizeof(Request) + sizeof(uint32_t));
  }

  RequestScan() = default;
  /// As read().
  FI_PREFETCH_DEVICE RequestScan(const DecodeParams& p, uint8_t* shared, uint32_t most_tiles = 1) {
    read(p, shared, most_tiles);
  }

  /// Reads the page table, for a line of splits of at most `most_tiles` tiles. Collective over the block. `shared`:
  /// shared_bytes of memory, in use until the last locate().
  FI_PREFETCH_DEVICE void read(const DecodeParams& p, uint8_t* shared, uint32_t most_tiles = 1) {
    const uint32_t batch_size = p.table.batch_size;
    const uint32_t lane = lane_index();
    if constexpr (FEW_REQUESTS) {
      row_ = load_row(p.table, lane);
      request_ = request_of<WINDOW>(p, row_);
      sum_ = warp_inclusive_sum(split_count(request_.tiles, most_tiles));
      total_ = __shfl_sync(kFullWarp, sum_, 31);
      longest_ = __reduce_max_sync(kFullWarp, request_.tiles);
      some_empty_ = __any_sync(kFullWarp, lane < batch_size && request_.tiles == 0);
      return;
    }
    groups_ = (batch_size + 31) / 32;
    requests_ = reinterpret_cast<Request*>(shared);
    sums_ = reinterpret_cast<uint32_t*>(requests_ + groups_ * 32);
    bool empty = false;
    for (uint32_t group = warp_index(); group < groups_; group += warps_per_block()) {
      const uint32_t r = group * 32 + lane;
      row_ = load_row(p.table, r);
      const Request request = request_of<WINDOW>(p, row_);
      requests_[r] = request;
      sums_[r] = warp_inclusive_sum(split_count(request.tiles, most_tiles));
      empty |= r < batch_size && request.tiles == 0;
    }
    some_empty_ = uniform(__syncthreads_or(empty));
    uint32_t sum = 0, longest = 0;
    for (uint32_t group = lane; group < groups_; group += 32) sum += sums_[group * 32 + 31];
    for (uint32_t group = 0; group < groups_; ++group) longest = max(longest, requests_[group * 32 + lane].tiles);
    total_ = __reduce_add_sync(kFullWarp, sum);
    longest_ = __reduce_max_sync(kFullWarp, longest);
  }

  /// Whether changed() can tell: it compares what is still in registers, for the shared memory is soon in use.
  static FI_PREFETCH_DEVICE bool can_compare(const DecodeParams& p) {
    return FEW_REQUESTS || static_cast<uint32_t>(p.table.batch_size) <= blockDim.x;
  }

  /// Starts loading the page table again, for changed(). After the dependency wait, so that L1, which the first reading
  /// went past, may serve all warps of an SM: see WarpAttention::load_query.
  FI_PREFETCH_DEVICE void read_again(const DecodeParams& p) {
    row_again_ =
        load_row(p.table, FEW_REQUESTS ? lane_index() : threadIdx.x, [](const int32_t* from) { return __ldca(from); });
  }

  /// Whether the page table said something else when it was read again, or `or_else` holds somewhere. Collective over
  /// the block where the batch is in shared memory, else over the warp alone.
  FI_PREFETCH_DEVICE bool changed(bool or_else) const {
    // Opaque: else the comparison stands, and waits, right after the loads.
    const TableRow now = {ptx::opaque(row_again_.begin), ptx::opaque(row_again_.end),
                          ptx::opaque(row_again_.last_page_len)};
    const bool differs = or_else || now != row_;
    return FEW_REQUESTS ? __any_sync(kFullWarp, differs) : uniform(__syncthreads_or(differs));
  }

  /// Where they are few.
  FI_PREFETCH_DEVICE const Request& of_this_lane() const { return request_; }
  FI_PREFETCH_DEVICE bool some_request_is_empty() const { return some_empty_; }
  /// Splits of one kv head over all requests.
  FI_PREFETCH_DEVICE uint32_t total() const { return total_; }
  /// Tiles of one kv head of the longest request.
  FI_PREFETCH_DEVICE uint32_t longest() const { return longest_; }

  /// What total() is with other splits, of which no request has many (see small_quotient). Collective over the warp.
  FI_PREFETCH_DEVICE uint32_t total_of(uint32_t most_tiles) const {
    uint32_t sum = 0;
    if constexpr (FEW_REQUESTS) {
      sum = small_split_count(request_.tiles, most_tiles);
    } else {
      for (uint32_t group = 0; group < groups_; ++group) {
        sum += small_split_count(requests_[group * 32 + lane_index()].tiles, most_tiles);
      }
    }
    return __reduce_add_sync(kFullWarp, sum);
  }
  /// Tiles of one kv head of the requests that so many tiles divide. Collective over the warp.
  FI_PREFETCH_DEVICE uint32_t tiles_in_multiples_of(uint32_t tiles) const {
    const auto counted = [&](const Request& request) {
      return small_quotient(request.tiles, tiles) * tiles == request.tiles ? request.tiles : 0;
    };
    uint32_t sum = 0;
    if constexpr (FEW_REQUESTS) {
      sum = counted(request_);
    } else {
#pragma unroll 1
      for (uint32_t group = 0; group < groups_; ++group) sum += counted(requests_[group * 32 + lane_index()]);
    }
    return __reduce_add_sync(kFullWarp, sum);
  }
  /// Requests that have tiles, of the first so many. Collective over the warp.
  FI_PREFETCH_DEVICE uint32_t with_tiles(uint32_t requests) const {
    uint32_t count = 0;
    if constexpr (FEW_REQUESTS) {
      count = lane_index() < requests && request_.tiles > 0;
    } else {
#pragma unroll 1
      for (uint32_t r = lane_index(); r < requests; r += 32) count += requests_[r].tiles > 0;
    }
    return __reduce_add_sync(kFullWarp, count);
  }
  /// From now on the line is one of these, with a gap before every head of a request. Collective over the block.
  FI_PREFETCH_DEVICE void cut_again(uint32_t most_tiles, uint32_t gap) {
    const auto places = [&](const Request& request) {
      return request.tiles > 0 ? gap + small_split_count(request.tiles, most_tiles) : 0;
    };
    if constexpr (FEW_REQUESTS) {
      sum_ = warp_inclusive_sum(places(request_));
    } else {
      __syncthreads();  // the old sums were read
      for (uint32_t group = warp_index(); group < groups_; group += warps_per_block()) {
        const uint32_t r = group * 32 + lane_index();
        sums_[r] = warp_inclusive_sum(places(requests_[r]));
      }
      __syncthreads();
    }
  }

  /// Where `position` (below the splits of all heads) lies. Collective over the warp, the same position in every lane.
  FI_PREFETCH_DEVICE Location locate(uint32_t position, uint32_t heads) {
    const uint32_t lane = lane_index();
    uint32_t before = 0;  // splits a head of the requests before the group
    uint32_t group = 0;
    if constexpr (kInSharedMemory) {
      for (uint32_t first = 0; first < groups_; first += 32) {
        const uint32_t splits = first + lane < groups_ ? sums_[(first + lane) * 32 + 31] : 0;
        const uint32_t sum = warp_inclusive_sum(splits);
        const uint32_t beyond = __ballot_sync(kFullWarp, heads * (before + sum) > position);
        if (beyond != 0) {
          const int hit = __ffs(beyond) - 1;
          group = first + hit;
          before += __shfl_sync(kFullWarp, sum - splits, hit);
          break;
        }
        before += __shfl_sync(kFullWarp, sum, 31);
      }
      request_ = requests_[group * 32 + lane];
      sum_ = sums_[group * 32 + lane];
    }
    const uint32_t beyond = __ballot_sync(kFullWarp, heads * (before + sum_) > position);
    const int hit = beyond != 0 ? __ffs(beyond) - 1 : 31;
    const uint32_t end = __shfl_sync(kFullWarp, sum_, hit), below = __shfl_sync(kFullWarp, sum_, max(hit - 1, 0));
    const uint32_t start = hit > 0 ? below : 0;
    return {request_.of_lane(hit), group * 32 + hit, end - start, position - heads * (before + start)};
  }

 private:
  uint32_t groups_ = 0;  // in shared memory
  Request* requests_ = nullptr;
  uint32_t* sums_ = nullptr;  // splits of a request and of those before it in its group
  TableRow row_{};            // what this lane read last, and what it says now
  TableRow row_again_{};
  Request request_{};  // this lane's of the group at hand, and its sum
  uint32_t sum_ = 0;
  uint32_t total_ = 0;
  uint32_t longest_ = 0;
  bool some_empty_ = false;
};

/// The cut of a line of `tiles` tiles over `workers` warps: worker j takes [begin(j), begin(j + 1)). Sizes differ by at
/// most one (beyond 2^32 / workers tiles by a few), and the longer pieces are spread evenly (the first ones alone would
/// make whole blocks late). Or that of a line of as many splits as workers, one each: see cut().
struct Partition {
  uint32_t tiles;         // or splits; and gaps
  uint32_t workers;       // at most 65,535, so that j * share fits 32 bits
  uint32_t share;         // a worker's, in 2^-32 of the line, rounded up
  uint32_t abreast_log2;  // a worker is this many neighbouring warps (log2)
  uint32_t split_tiles;   // at most so many in a split; 1: the line is one of tiles
  uint32_t gap;           // empty places before the first tile of every request and head
  uint32_t few;           // 1: requests differ, and none has more pieces a head than p.few_pieces

  FI_PREFETCH_DEVICE Partition(uint32_t tiles_, uint32_t workers_, uint32_t abreast_log2_ = 0,
                               uint32_t split_tiles_ = 1, uint32_t gap_ = 0, uint32_t few_ = 0)
      : tiles(tiles_),
        workers(workers_),
        share(0xffffffffu / workers_ + 1),
        abreast_log2(abreast_log2_),
        split_tiles(split_tiles_),
        gap(gap_),
        few(few_) {}

  FI_PREFETCH_DEVICE uint32_t warps() const { return workers << abreast_log2; }

  FI_PREFETCH_DEVICE uint32_t begin(uint32_t j) const { return j >= workers ? tiles : __umulhi(tiles, j * share); }

  /// Of every `stride`-th worker, in units of the stride: the last one up to `from` that begins at `tile` or before.
  /// 32 candidates a step, one a lane: nearly always one step, and no division. Collective over the warp.
  FI_PREFETCH_DEVICE uint32_t last_at_or_before(uint32_t tile, uint32_t from, uint32_t stride) const {
    const uint32_t lane = lane_index();
#pragma unroll 1
    for (;; from -= 32) {
      const uint32_t hits = __ballot_sync(kFullWarp, lane <= from && begin((from - lane) * stride) <= tile);
      if (hits != 0) return from - (__ffs(hits) - 1);
    }
  }
  /// The last one from `from` on that begins before `tile`; `from` does. A `tile` beyond the line, as a page table has
  /// it that changes against a promise, stands for the line's end: no worker begins after that.
  FI_PREFETCH_DEVICE uint32_t last_before(uint32_t tile, uint32_t from, uint32_t stride) const {
    const uint32_t lane = lane_index();
    tile = min(tile, tiles);
#pragma unroll 1
    for (;; from += 32) {
      const uint32_t misses = __ballot_sync(kFullWarp, begin((from + lane + 1) * stride) >= tile);
      if (misses != 0) return from + __ffs(misses) - 1;
    }
  }
};

FI_PREFETCH_DEVICE uint32_t floor_log2(uint32_t x) { return 31 - __clz(x); }

/// Tiles that a warp is given at least, where the host leaves it to the kernel: about the square root of 1/128 of the
/// longest request's (1 of 4K tokens, 2 of 8K and 16K, 4 of 32K; H200). More blocks read faster, but each is a partial
/// more to merge. So twice as many where nearly all blocks would work on one or two tiles a warp, and several of them
/// would meet about the longest request and head: 2 to 13 % of 8 to 16 MB (H200), as fewer meet, and the next kernel's
/// blocks find room beside them. Where `tile_bytes` is less than 8 KB (fp8 of 128 dimensions) two tiles a warp are
/// enough as soon as all blocks can work: 1 to 6 % of 8 MB (H200).
FI_PREFETCH_DEVICE uint32_t default_min_tiles(uint32_t tiles, uint32_t blocks, uint32_t warps, uint32_t longest_request,
                                              uint32_t tile_bytes) {
  const uint32_t workers = blocks * warps;
  const uint32_t least = 1u << floor_log2(max(longest_request / 128, 1u)) / 2;
  if (tile_bytes < kLargeTileBytes && tiles > workers) return min(least, 2u);
  const uint32_t piece = max(least, tiles > workers ? 2u : 1u);
  const bool nearly_all_work = tiles <= workers * piece && 4 * tiles > 3 * workers * piece;
  return piece <= 2 && nearly_all_work && longest_request > warps * piece ? 2 * piece : least;
}

/// A block's tiles, of which its warps have at least `min_tiles` each, and otherwise as few as do, a little rounded up.
/// Pieces of 8 and not of 7 or 8 tiles take as long, and cut fewer requests in two; from 512 tiles on the blocks that
/// this leaves without work cost more (up to 1.2 % of 8 GB, H200). Where all requests have `equal` tiles (0: they
/// differ) and two more a warp let every block have one whole, they get them: two tiles take half as long as a meeting
/// of blocks (H100).
FI_PREFETCH_DEVICE uint32_t tiles_of_a_block(uint32_t tiles, uint32_t blocks, uint32_t warps, uint32_t min_tiles,
                                             uint32_t equal) {
  const uint32_t workers = blocks * warps;
  uint32_t piece = min_tiles;
  if (tiles > workers * min_tiles) {
    piece = (tiles - 1) / workers + 1;
    const uint32_t unit = piece < 512 ? (1u << floor_log2(piece)) / 16 : 1;  // up to 1/16 longer
    if (unit > 1) piece = (piece + unit - 1) & ~(unit - 1);
  }
  const uint32_t of_a_block = piece * warps;
  return equal > of_a_block && equal <= of_a_block + 2 * warps ? equal : of_a_block;
}

/// Pieces that are of one request and head each.
struct WholePieces {
  uint32_t most_tiles = 1;  // of a piece; 1: work is not cut like this
  uint32_t total = 0;       // pieces of one kv head
};

/// How work is cut into whole pieces, if they need not be much longer for that than those that are cut anywhere and
/// have up to `piece` tiles. To go over to another request or head costs a warp 1.3 us (H200), and in the end all
/// others wait for it. Collective over the warp.
template <typename Scan>
FI_PREFETCH_DEVICE WholePieces whole_pieces(const DecodeParams& p, const Scan& scan, uint32_t blocks, uint32_t warps,
                                            uint32_t piece) {
  const uint32_t heads = p.num_kv_heads, workers = blocks * warps;
  if (piece == 1 || static_cast<uint64_t>(p.table.batch_size) * heads > workers) return {};
  const uint32_t longest = piece + min(max(piece / 8, 1u), 4u);
#pragma unroll 1
  for (; piece <= longest; ++piece) {
    const uint32_t total = scan.total_of(piece), pieces = heads * total;
    if (pieces > workers) continue;
    // No request ends within a piece of the other kind either, of which there are as many.
    if (total * piece == scan.total() && small_quotient(pieces, warps) * warps == pieces) return {};
    return {piece, total};
  }
  return {};
}

/// Places of the gap before every request and head of a line that `workers` workers share, which has `tiles` tiles in
/// all and up to `piece` for each. To go over to another request or head costs a warp about the time of a tile of 8 KB
/// (1.3 us, H200), and one with many short requests would end last by far: with 512 requests of 16 to 300 tokens and
/// fp8 KV at half of the speed. None where pieces are as short as two of them, and where requests end with pieces by
/// themselves, three quarters of them by their tiles: they would not any more. Collective over the warp.
template <typename Scan>
FI_PREFETCH_DEVICE uint32_t gap_of_line(const Scan& scan, uint32_t tiles, uint32_t workers, uint32_t piece,
                                        uint32_t tile_bytes) {
  const uint32_t gap = longest_gap(tile_bytes);
  if (tiles <= static_cast<uint64_t>(2 * gap) * workers) return 0;
  return scan.tiles_in_multiples_of(piece) / 3 >= scan.total() / 4 ? 0 : gap;
}

/// Whether neighbouring warps read neighbouring kv heads abreast, the same tokens of each at about the same time: rows
/// that lie side by side in HBM. Each then meets others by itself, and so must have little to meet about: a piece is
/// long, and holds two of the longest request and head. Of `whole_tiles`, which the tensor memory accelerator copies,
/// half of one is enough: a block keeps its warps in step then (see the decode kernel), which gains more. Where
/// requests differ, pieces begin and end within them, and must be longer to pay: with 46 to 70 tiles heads abreast take
/// 1 to 3 % more time, with 250 and more up to 3 % less (H200).
FI_PREFETCH_DEVICE bool reads_abreast(uint32_t tiles, uint32_t warps, uint32_t longest_request, bool whole_tiles,
                                      bool equal) {
  const uint32_t long_piece = equal ? 32 : 128;
  const uint32_t of_longest = whole_tiles ? longest_request / 2 : 2 * longest_request;
  return tiles >= static_cast<uint64_t>(max(long_piece, of_longest)) * warps;
}

/// The cut for a grid of `blocks` blocks of `warps` warps, of the line that is the scan's from then on. Pieces are
/// whole where requests differ and they can be (equal ones mostly end with a piece anyhow). Where kv heads are read
/// abreast, a worker is 2^abreast_log2 neighbouring warps, and the line that of a head in as many: warp w has the heads
/// that leave w. Every block that works gets a tile at least. `tile_bytes`: K and V of a tile. Collective over the
/// block.
template <typename Scan>
FI_PREFETCH_DEVICE Partition cut(const DecodeParams& p, Scan& scan, uint32_t blocks, uint32_t warps,
                                 uint32_t tile_bytes) {
  const uint32_t tiles = scan.total() * p.num_kv_heads;
  const uint32_t min_tiles = p.min_tiles_per_warp > 0
                                 ? p.min_tiles_per_warp
                                 : default_min_tiles(tiles, blocks, warps, scan.longest(), tile_bytes);
  const uint32_t equal = scan.longest() * p.table.batch_size == scan.total() ? scan.longest() : 0;
  const uint32_t log2 =
      reads_abreast(tiles, blocks * warps, scan.longest(), p.table.page_size % kTileTokens == 0, equal > 0)
          ? p.abreast_log2
          : 0;
  // Blocks that work, or workers where these are parts of one or more blocks.
  const uint32_t most = log2 > 0 ? blocks * warps >> log2 : blocks, workers = log2 > 0 ? 1 : warps;
  const uint32_t line = tiles >> log2;
  const uint32_t of_a_block = tiles_of_a_block(line, most, workers, min_tiles, equal);
  const uint32_t piece = small_quotient(of_a_block, workers);
  const uint32_t full = small_quotient(line, of_a_block);
  const uint32_t working = max(full + (full * of_a_block != line), 1u);
  if (equal > 0) return Partition(line, working * workers, log2);
  const WholePieces whole = log2 == 0 ? whole_pieces(p, scan, blocks, warps, piece) : WholePieces{};
  const bool is_whole = whole.most_tiles > 1;
  const uint32_t gap = is_whole ? 0 : gap_of_line(scan, line, working * workers, piece, tile_bytes);
  if (is_whole || gap > 0) scan.cut_again(whole.most_tiles, gap);
  const uint32_t pieces = whole.total * p.num_kv_heads;
  const bool few = log2 == 0 && scan.longest() <= p.few_pieces * (is_whole ? whole.most_tiles : piece);
  if (is_whole) return Partition(pieces, pieces, 0, whole.most_tiles, 0, few);
  const uint32_t gaps = gap > 0 ? gap * scan.with_tiles(p.table.batch_size) * (p.num_kv_heads >> log2) : 0;
  return Partition(line + gaps, working * workers, log2, 1, gap, few);
}

/// Walks the line of tiles. The same values in every lane of the warp.
template <bool WINDOW>
struct TileCursor {
  Request request;
  uint32_t request_index;
  uint32_t head;
  uint32_t tile;
  uint32_t head_step;  // a power of two

  TileCursor() = default;
  /// At a tile (or split, of which the cursor's tile is the number then) of the line of warp number `warp`.
  FI_PREFETCH_DEVICE TileCursor(const Location& at, uint32_t abreast_log2, uint32_t warp)
      : request(at.request), request_index(at.request_index), head_step(1u << abreast_log2) {
    const uint32_t splits = max(at.splits, 1u);  // a broken page table may have none
    const uint32_t step = small_quotient(at.offset, splits);
    head = step * head_step + warp % head_step;
    tile = at.offset - step * splits;
  }

  FI_PREFETCH_DEVICE int32_t token() const { return request.first_token + static_cast<int32_t>(tile * kTileTokens); }

  /// `tiles` on, but at most to the first tile of its next kv head or request. The caller knows that there is one.
  FI_PREFETCH_DEVICE void advance(const DecodeParams& p, uint32_t tiles = 1) {
    if (leaves_request(p, tiles)) next_request(p, [&](uint32_t r) { return load_request<WINDOW>(p, r); });
  }
  /// The same where requests are few, and this lane has one.
  FI_PREFETCH_DEVICE void advance(const DecodeParams& p, uint32_t tiles, const Request& of_this_lane) {
    if (leaves_request(p, tiles)) next_of_lanes(of_this_lane);  // if a table still being written has one
  }
  /// The same where work was planned, for as many requests as there are; of the first ones this lane has one.
  FI_PREFETCH_DEVICE void advance_planned(const DecodeParams& p, uint32_t tiles, const Request& of_this_lane) {
    if (!leaves_request(p, tiles) || next_of_lanes(of_this_lane)) return;
    next_request(p, [&](uint32_t r) { return load_planned_request(p, r); });
  }

 private:
  FI_PREFETCH_DEVICE bool leaves_request(const DecodeParams& p, uint32_t tiles) {
    tile += tiles;
    if (tile < request.tiles) return false;
    tile = 0;
    head += head_step;
    if (head < static_cast<uint32_t>(p.num_kv_heads)) return false;
    head &= head_step - 1;
    return true;
  }

  /// To the next of the lanes' requests that has tiles; false where there is none.
  FI_PREFETCH_DEVICE bool next_of_lanes(const Request& of_this_lane) {
    const bool follows = lane_index() > request_index && of_this_lane.tiles > 0;
    const int hit = __ffs(__ballot_sync(kFullWarp, follows)) - 1;
    if (hit < 0) return false;
    request_index = hit;
    request = of_this_lane.of_lane(hit);
    return true;
  }

  /// To the next request that has tiles: 32 candidates a step, one a lane.
  template <typename Load>
  FI_PREFETCH_DEVICE void next_request(const DecodeParams& p, const Load& load) {
    const uint32_t batch_size = p.table.batch_size;
    for (uint32_t first = request_index + 1; first < batch_size; first += 32) {
      const Request candidate = load(first + lane_index());
      const uint32_t with_tiles = __ballot_sync(kFullWarp, candidate.tiles > 0);
      if (with_tiles == 0) continue;
      const int hit = __ffs(with_tiles) - 1;
      request_index = first + hit;
      request = candidate.of_lane(hit);
      return;
    }
  }
};

/// A warp's piece of the line.
template <bool WINDOW>
struct Piece {
  uint32_t begin = 0;  // its first tile's place on the line; where that is one of splits, in its request and head
  uint32_t end = 0;
  uint32_t count = 0;        // tiles: with gaps fewer than places
  TileCursor<WINDOW> first;  // if count > 0
  uint32_t split = 0;        // where the line is one of splits: it is the split-th of `splits`
  uint32_t splits = 0;       // 0: the line is one of tiles

  Piece() = default;
  /// The piece of warp number `warp`. Collective over the warp.
  template <typename Scan>
  FI_PREFETCH_DEVICE Piece(const DecodeParams& p, const Partition& partition, Scan& scan, uint32_t warp) {
    const uint32_t worker = warp >> partition.abreast_log2;
    begin = partition.begin(worker), end = partition.begin(worker + 1);
    count = end - begin;
    if (count == 0) return;
    const uint32_t gap = partition.gap, log2 = partition.abreast_log2, heads = p.num_kv_heads >> log2;
    const auto gaps_before = [&](uint32_t place) {  // places of gaps that are before one of the cursor's head
      return gap * (heads * scan.with_tiles(first.request_index) + (first.head >> log2)) + min(place, gap);
    };
    uint32_t splits_here = 0;
    // Where there are gaps the last place first, and the same code again, which is long, for the first one.
#pragma unroll 1
    for (uint32_t place = gap > 0 ? end - 1 : begin;; place = begin) {
      const Location at = scan.locate(place, heads);
      first = TileCursor<WINDOW>(at, log2, warp);
      splits_here = at.splits;
      if (place == begin) break;
      count -= gaps_before(first.tile + 1);
    }
    if (gap > 0) {  // a piece is longer than a gap, and so has a tile
      count += gaps_before(first.tile);
      const uint32_t passed = min(first.tile, gap);
      begin += gap - passed;
      first.tile -= passed;
      return;
    }
    if (partition.split_tiles == 1) return;
    const uint32_t tiles = first.request.tiles;
    split = first.tile, splits = max(splits_here, 1u);
    // Equal but for one tile; the first ones are the longer.
    const uint32_t least = small_quotient(tiles, splits), longer = tiles - least * splits;
    begin = first.tile = split * least + min(split, longer);
    count = least + (split < longer);
    end = begin + count;
  }
};

}  // namespace fi_prefetch
