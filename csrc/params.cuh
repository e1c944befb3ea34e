// What a decode call is: the tensors, the page table, the scales. Filled by decode.cu on the host and passed by value.
#pragma once

#include <cstdint>

namespace fi_prefetch {

/// Tokens of one kv head that a warp loads and multiplies in one go (the M of the tensor cores' 16x8x16 product).
constexpr int kTileTokens = 16;

/// Where the KV cache of a layer lies. Strides and offsets are counted in units of `unit_bytes` (at least 16), so that
/// one 32-bit number reaches at least 64 GiB; the host refuses larger caches.
struct KvTensor {
  const uint8_t* data;
  uint32_t page_stride;
  uint32_t token_stride;
  uint32_t head_stride;
};

/// FlashInfer's page table: request r owns pages indices[indptr[r]] .. indices[indptr[r + 1] - 1], and last_page_len[r]
/// tokens are valid in the last of them.
struct PageTable {
  const int32_t* indptr;
  const int32_t* indices;
  const int32_t* last_page_len;
  int32_t batch_size;
  int32_t num_indices;  // length of `indices`: positions are clamped to it
  int32_t num_pages;    // pages in the cache: page numbers are clamped to it
  int32_t page_size;    // tokens
  /// token * page_inverse >> 31 + page_shift is token / page_size for every token: 2^(31 + page_shift) / page_size,
  /// rounded up, with page_shift the log2 of page_size, rounded up
  uint32_t page_inverse;
  int32_t page_shift;
  int32_t max_pages_per_request;  // so that a length in tokens fits 31 bits
};

/// The prefetch levers, resolved for this plan (fi_prefetch/prefetch.py decides; units: tiles a warp).
struct PrefetchLevers {
  int32_t run_ahead;   // tiles beyond the pipeline; 0 is off
  int32_t prologue;    // tiles brought into L2 before the dependency wait; 0 is off
  int32_t early_load;  // 1: start the pipeline before the dependency wait, which the caller's promise allows
  int32_t ready;       // what the caller promises is final before the wait: see Ready
  int32_t stream;      // 1: KV leaves L2 first once it was read (evict_first)
};

/// ready="plan" is the last one to the kernel, which sees by `planned` what follows from it.
enum Ready : int32_t { kNothing = 0, kPageTable = 1, kAllButLastToken = 2 };

struct PlannedWork;
struct Request;

/// What a kernel needs first lies first: a block's first reads of its parameters miss the constant cache, a line at a
/// time.
struct DecodeParams {
  PageTable table;
  int32_t num_kv_heads;
  uint32_t min_tiles_per_warp;  // fewer blocks work when there is less than this to do; 0: the kernel chooses
  uint32_t few_pieces;          // where no request and head has more, a warp of each block meets others for all rows
  uint32_t abreast_log2;        // log2 of the kv heads that neighbouring warps may read abreast
  const PlannedWork* planned;   // [gridDim.x * warps]: what plan() worked out of this table; null: the kernel does
  const Request* planned_requests;  // [batch_size], with `planned`
  int32_t dependent_launch;         // 1: kernels before this one may still run when it starts
  int32_t q_len;                    // query tokens per request, the newest of it (bottom-right causal)
  int32_t window_left;              // tokens before the query's own that it sees; only read with a sliding window
  PrefetchLevers levers;
  KvTensor k;
  KvTensor v;
  uint32_t unit_bytes;        // a power of two
  int32_t contiguous_tokens;  // 1: the 16 rows of a tile lie one after the other in memory (HND, pages of 16 and more)
  const void* q;              // [batch * q_len, num_qo_heads, HEAD_DIM], strides in elements
  int64_t q_stride_n;
  int64_t q_stride_h;
  int32_t num_qo_heads;
  int32_t group_size;  // num_qo_heads / num_kv_heads
  /// 65536 / group_size + 1: n * group_inverse >> 16 is n / group_size for the few rows there are
  int32_t group_inverse;
  float scale_log2;   // sm_scale * log2(e), or log2(e) * logits_soft_cap with a soft cap
  float inverse_cap;  // sm_scale / logits_soft_cap with a soft cap
  float v_scale;
  void* o;             // [batch * q_len, num_qo_heads, HEAD_DIM], contiguous
  float* lse;          // [batch * q_len, num_qo_heads], base 2, or null
  const float* sinks;  // [num_qo_heads] or null
  /// [2 * gridDim.x, rows, HEAD_DIM + 4], and with few_pieces [2 * gridDim.x, WarpAttention::kSavedVectors] behind it;
  /// or of warps: [2 * warps, WarpAttention::kSavedVectors]
  float* partials;
  int32_t* counters;  // [3 * gridDim.x, rows], or one a warp; zero between calls
  int32_t* running;   // counts the blocks that read KV now, for a window's prefetch to give way; null: nobody asks
  // Only read with rotary positions:
  double rope_turns;  // by which the first pair of dimensions is turned from token to token: 1 / (2 pi rope_scale)
  double rope_ratio;  // of a pair of dimensions' turns to those of the pair before it: rope_theta^(-2 / HEAD_DIM)
};

}  // namespace fi_prefetch
