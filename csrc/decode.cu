// The entry points: FlashInfer's `plan`, `workspace_size` and `run` of a batch-decode module, and `prefetch_kv`.
//
// One compilation serves one choice of element types, head_dim, sliding window, soft cap, position encoding, and of the
// decode kernel or the batch-invariant one; fi_prefetch/jit.py sets the FI_PREFETCH_* macros. Everything is checked
// here that memory safety hangs on, whatever the Python side did before.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <string>

#include "decode.cuh"
#include "exports.cuh"
#include "fixed_split.cuh"
#include "prefetch_kv.cuh"
#include "tensor_maps.cuh"

namespace fi_prefetch {
namespace {

using tvm::ffi::Array;
using tvm::ffi::Optional;
using tvm::ffi::TensorView;

constexpr bool kWindow = FI_PREFETCH_SLIDING_WINDOW;
constexpr bool kSoftCap = FI_PREFETCH_SOFT_CAP;
constexpr Position kPosition = Position{FI_PREFETCH_POSITION};
constexpr bool kFixedSplit = FI_PREFETCH_FIXED_SPLIT;

/// 16 KB of ring a warp, of which eight warps keep what an SM's share of HBM needs in flight several times over (34
/// GB/s at 1 us on an H200), or of large tiles two. With 24 KB on their way to each of eight warps the SM takes no more
/// copies, and a warp that waits to start one cannot compute: 3 % of 34 MB in pieces of four tiles and 8 % of 69 MB in
/// pieces that go over from one request to another, where tiles have 8 KB; 1 to 4 % of up to 64 MB where they have 4
/// (H200).
constexpr int stage_count() {
  constexpr int kStageBytes = 2 * kTileTokens * FI_PREFETCH_HEAD_DIM * sizeof(FI_PREFETCH_DTYPE_KV);
  return std::max(2, std::min(16 * 1024 / kStageBytes, 8));
}

template <int ROW_TILES, bool FEW_REQUESTS = false, bool TENSOR_COPIES = false, bool PLANNED = false>
using Traits =
    DecodeTraits<FI_PREFETCH_DTYPE_Q, FI_PREFETCH_DTYPE_KV, FI_PREFETCH_DTYPE_O, FI_PREFETCH_HEAD_DIM, ROW_TILES,
                 stage_count(), kWindow, kSoftCap, kPosition, FEW_REQUESTS, TENSOR_COPIES, PLANNED>;
using AnyTraits = Traits<1>;

constexpr int kMaxWarps = 8;
constexpr int kMaxBlocks = 1024;  // two levels of a merge take 32 * 32
constexpr int kMostMinTiles = 1 << 16;

#define FI_PREFETCH_CHECK(condition, error) \
  if (!(condition)) TVM_FFI_THROW(error)

void check_cuda(cudaError_t status, const char* what) {
  FI_PREFETCH_CHECK(status == cudaSuccess, RuntimeError) << what << ": " << cudaGetErrorString(status);
}

int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

template <typename T>
constexpr DLDataType dl_dtype() {
  if constexpr (std::is_same<T, __half>::value) return {kDLFloat, 16, 1};
  if constexpr (std::is_same<T, __nv_bfloat16>::value) return {kDLBfloat, 16, 1};
  if constexpr (std::is_same<T, __nv_fp8_e4m3>::value) return {kDLFloat8_e4m3fn, 8, 1};
  if constexpr (std::is_same<T, __nv_fp8_e5m2>::value) return {kDLFloat8_e5m2, 8, 1};
  if constexpr (std::is_same<T, float>::value) return {kDLFloat, 32, 1};
  if constexpr (std::is_same<T, int32_t>::value) return {kDLInt, 32, 1};
}

std::string name_of(DLDevice device) {
  const std::string kind = device.device_type == kDLCUDA ? "cuda" : device.device_type == kDLCPU ? "cpu" : "device";
  return kind + ":" + std::to_string(device.device_id);
}

std::string name_of(DLDataType dtype) { return tvm::ffi::DLDataTypeToString(dtype); }

template <typename T>
void check_tensor(const TensorView& x, const char* name, int rank, DLDevice device) {
  const DLDataType dtype = dl_dtype<T>();
  FI_PREFETCH_CHECK(x.ndim() == rank, ValueError) << name << ": expected " << rank << " dimensions, got " << x.ndim();
  FI_PREFETCH_CHECK(x.dtype().code == dtype.code && x.dtype().bits == dtype.bits && x.dtype().lanes == 1, TypeError)
      << name << ": expected dtype " << name_of(dtype) << ", got " << name_of(x.dtype());
  FI_PREFETCH_CHECK(x.device().device_type == device.device_type && x.device().device_id == device.device_id,
                    ValueError)
      << name << ": expected device " << name_of(device) << ", got " << name_of(x.device());
}

template <typename T>
void check_vector(const TensorView& x, const char* name, int64_t length, DLDevice device) {
  check_tensor<T>(x, name, 1, device);
  FI_PREFETCH_CHECK(x.size(0) >= length && (x.size(0) <= 1 || x.stride(0) == 1), ValueError)
      << name << ": expected at least " << length << " contiguous elements, got " << x.size(0) << " with stride "
      << x.stride(0);
}

cudaStream_t current_stream(DLDevice device) {
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
}

/// What plan() decided. Grid and block are limits of speed, not of correctness: a tuner may change them, but for those
/// of fixed splits, whose bits hang on the warps.
struct Plan {
  int64_t blocks;
  int64_t warps;
  int64_t tiles;         // fewest a warp (0: the kernel chooses); with fixed splits a split's
  int64_t abreast_log2;  // log2 of the kv heads that neighbouring warps may read abreast
};

uint32_t shared_bytes(int64_t warps, int64_t rows) { return SharedMemory<AnyTraits>::bytes(warps, rows); }

/// See DecodeParams. Where requests differ a block shares one with the blocks before it and one with those after it.
/// Row by row their merges take turns if there are more rows than warps, of 2.2 us each, and a warp that adds up all
/// rows takes no longer than one: mixed lengths with 7 or 8 rows are 1 to 19 % faster, with fp8 KV up to 23 %, with 16
/// rows 9 to 31 %. With more than 24 pieces eight rows lose up to 5 % where requests end with blocks (H200).
int64_t few_pieces(int64_t rows, int64_t warps) {
  if (2 * rows <= warps) return 0;
  return rows <= 8 ? 24 : 64;
}

/// The bytes of partials and of counters that blocks or warps need to meet, for `rows` query rows a kv head.
struct Meeting {
  int64_t partial_bytes;
  int64_t counter_bytes;
};

Meeting meeting_of_rows(int64_t slots, int64_t counters, int64_t rows) {
  return {slots * rows * AnyTraits::kPartialStride * static_cast<int64_t>(sizeof(float)),
          counters * rows * static_cast<int64_t>(sizeof(int32_t))};
}

/// Of the decode kernel: of its blocks, or of its warps where they read kv heads abreast.
Meeting meeting_of(const Plan& plan, int64_t rows) {
  Meeting meeting = meeting_of_rows(2 * plan.blocks, 3 * plan.blocks, rows);
  const int64_t saved = rows <= 8 ? WarpAttention<Traits<1>>::kSavedBytes : WarpAttention<Traits<2>>::kSavedBytes;
  if (few_pieces(rows, plan.warps) > 0) meeting.partial_bytes += 2 * plan.blocks * saved;
  if (plan.abreast_log2 > 0) {
    const int64_t warps = plan.blocks * plan.warps;
    meeting.partial_bytes = std::max(meeting.partial_bytes, 2 * warps * saved);
    meeting.counter_bytes = std::max<int64_t>(meeting.counter_bytes, warps * sizeof(int32_t));
  }
  return meeting;
}

/// The splits that a page table can have at most: of whole ones no more than its pages hold, and a shorter one a
/// request and head. Nothing meets where every request is one split.
int64_t most_splits(int64_t split_tiles, int64_t num_indices, int64_t page_size, int64_t batch_size,
                    int64_t num_kv_heads) {
  if (split_tiles == kWholeRequest) return 0;
  return (num_indices * page_size / (split_tiles * kTileTokens) + batch_size) * num_kv_heads;
}

int64_t row_count(int64_t num_qo_heads, int64_t num_kv_heads) {
  FI_PREFETCH_CHECK(num_kv_heads > 0 && num_qo_heads > 0 && num_qo_heads % num_kv_heads == 0, ValueError)
      << "num_qo_heads: expected a positive multiple of num_kv_heads = " << num_kv_heads << ", got " << num_qo_heads;
  const int64_t rows = num_qo_heads / num_kv_heads;
  FI_PREFETCH_CHECK(rows <= kMostQueryRows, ValueError)
      << "num_qo_heads: expected at most " << kMostQueryRows << " query rows per kv head, got " << rows;
  return rows;
}

/// log2 of as many kv heads as `warps` warps, all of a grid's, can share out evenly.
int64_t most_abreast_log2(int64_t warps, int64_t num_kv_heads) {
  int64_t log2 = 0;
  while (log2 < 5 && warps % (2 << log2) == 0 && num_kv_heads % (2 << log2) == 0) ++log2;
  return log2;
}

/// One block an SM, with as many warps as its shared memory holds, of 8, 4, 2 and 1: five or six cut requests at odd
/// places (of head_dim 256 four are faster, by up to 20 % with 8 query rows and 35 % with 16; H200).
Plan make_plan(int64_t rows, int64_t num_kv_heads, int device) {
  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  int64_t warps = kMaxWarps;
  while (warps > 1 && shared_bytes(warps, rows) > static_cast<uint32_t>(limit)) warps /= 2;
  FI_PREFETCH_CHECK(shared_bytes(warps, rows) <= static_cast<uint32_t>(limit), RuntimeError)
      << "this GPU's " << limit << " bytes of shared memory a block do not hold one warp's "
      << shared_bytes(warps, rows);
  const int sms = device_attribute(cudaDevAttrMultiProcessorCount, device);
  const int blocks = std::min(sms, kMaxBlocks);
  return {blocks, warps, 0, kFixedSplit ? 0 : most_abreast_log2(blocks * warps, num_kv_heads)};
}

/// The bytes that schedule() fills: a record a warp, then the requests.
int64_t planned_bytes(const Plan& plan, int64_t batch_size) {
  if (kFixedSplit) return 0;
  return plan.blocks * plan.warps * sizeof(PlannedWork) + batch_size * sizeof(Request);
}

/// What the Python side keeps of a plan and hands back to run().
constexpr int kPlanNumbers = 10;
Array<int64_t> plan_info(const Plan& plan, const Meeting& meeting, int64_t rows, int64_t batch_size) {
  return {plan.blocks,
          plan.warps,
          static_cast<int64_t>(shared_bytes(plan.warps, rows)),
          meeting.partial_bytes,
          meeting.counter_bytes,
          rows,
          plan.tiles,
          AnyTraits::kStages,
          plan.abreast_log2,
          planned_bytes(plan, batch_size)};
}

int64_t bytes_of(const TensorView& x) { return x.numel() * ((x.dtype().bits * x.dtype().lanes + 7) / 8); }

void check_plan_info(const Array<int64_t>& info) {
  FI_PREFETCH_CHECK(info.size() == kPlanNumbers, ValueError)
      << "plan_info: expected the " << kPlanNumbers << " numbers that plan() returned, got " << info.size();
}

void check_batch_size(int64_t batch_size, int64_t warps) {
  FI_PREFETCH_CHECK(
      batch_size <= 1 << 20 && ScanOf<AnyTraits>::shared_bytes(batch_size) <= warps * AnyTraits::kRingBytes, ValueError)
      << "batch_size: " << batch_size << " requests are more than the shared memory of a block of " << warps
      << " warps holds";
}

void check_head_dim(int64_t head_dim_qk, int64_t head_dim_vo) {
  FI_PREFETCH_CHECK(head_dim_qk == FI_PREFETCH_HEAD_DIM && head_dim_vo == FI_PREFETCH_HEAD_DIM, ValueError)
      << "head_dim: this module was compiled for " << FI_PREFETCH_HEAD_DIM << ", got " << head_dim_qk << " and "
      << head_dim_vo;
}

/// FlashInfer's plan. Touches no tensor's contents and copies nothing: the schedule is made on the device, in run().
/// `num_qo_heads` counts query rows: query heads times query tokens per request.
/// Returns [blocks, warps a block, shared-memory bytes, float workspace bytes, counter bytes, query rows per kv head,
/// fewest tiles a warp (0: the kernel chooses), tiles a warp's ring holds, log2 of the kv heads that neighbouring warps
/// may read abreast: 0 where the float workspace is too small for warps to meet, bytes that schedule() fills]. With
/// fixed splits every request is one of them, unless fix_splits() follows.
Array<int64_t> plan(TensorView float_workspace, TensorView, TensorView, TensorView, int64_t batch_size,
                    int64_t num_qo_heads, int64_t num_kv_heads, int64_t, bool, int64_t window_left,
                    double logits_soft_cap, int64_t head_dim_qk, int64_t head_dim_vo, TensorView, TensorView) {
  check_head_dim(head_dim_qk, head_dim_vo);
  FI_PREFETCH_CHECK((window_left >= 0) == kWindow && (logits_soft_cap > 0) == kSoftCap, ValueError)
      << "window_left, logits_soft_cap: this module was compiled " << (kWindow ? "with" : "without")
      << " a sliding window and " << (kSoftCap ? "with" : "without") << " a soft cap, got " << window_left << " and "
      << logits_soft_cap;
  const int64_t rows = row_count(num_qo_heads, num_kv_heads);
  Plan made = make_plan(rows, num_kv_heads, float_workspace.device().device_id);
  check_batch_size(batch_size, made.warps);
  if constexpr (kFixedSplit) {
    made.tiles = kWholeRequest;
    return plan_info(made, {0, 0}, rows, batch_size);
  }
  if (meeting_of(made, rows).partial_bytes > bytes_of(float_workspace)) made.abreast_log2 = 0;
  return plan_info(made, meeting_of(made, rows), rows, batch_size);
}

/// The plan with splits of `split_tokens` tokens, rounded up to whole tiles, and with room for all that a page table of
/// `num_indices` pages can have.
Array<int64_t> fix_splits(Array<int64_t> info, int64_t split_tokens, int64_t num_indices, int64_t page_size,
                          int64_t batch_size, int64_t num_kv_heads) {
  check_plan_info(info);
  FI_PREFETCH_CHECK(kFixedSplit, ValueError) << "fix_splits: this module was compiled without fixed splits";
  FI_PREFETCH_CHECK(split_tokens >= 1, ValueError) << "split_tokens: expected 1 or more, got " << split_tokens;
  FI_PREFETCH_CHECK(num_indices >= 0 && page_size >= 1 && batch_size >= 0 && num_kv_heads >= 1, ValueError)
      << "fix_splits: expected counts, got " << num_indices << " pages of " << page_size << " tokens, " << batch_size
      << " requests and " << num_kv_heads << " heads";
  const int64_t tiles = std::min<int64_t>((split_tokens - 1) / kTileTokens + 1, kWholeRequest);
  FI_PREFETCH_CHECK((static_cast<double>(num_indices) * page_size / tiles + batch_size) * num_kv_heads < 1e12,
                    ValueError)
      << "fix_splits: " << num_indices << " pages of " << page_size << " tokens, " << batch_size << " requests and "
      << num_kv_heads << " heads are too many splits";
  const int64_t splits = most_splits(tiles, num_indices, page_size, batch_size, num_kv_heads);
  return plan_info({info[0], info[1], tiles, 0}, meeting_of_rows(splits, splits, info[5]), info[5], batch_size);
}

/// The plan with another grid: what a tuner found, or tries. At most as many warps a block as plan() said; heads
/// abreast where that needs no more workspace than it does.
Array<int64_t> adjust_plan(Array<int64_t> info, int64_t batch_size, int64_t blocks, int64_t warps,
                           int64_t min_tiles_per_warp) {
  check_plan_info(info);
  FI_PREFETCH_CHECK(!kFixedSplit, ValueError) << "adjust_plan: with fixed splits the grid is part of the result";
  FI_PREFETCH_CHECK(blocks >= 1 && blocks <= kMaxBlocks, ValueError)
      << "blocks: expected 1 to " << kMaxBlocks << ", got " << blocks;
  FI_PREFETCH_CHECK(warps >= 1 && warps <= info[1], ValueError)
      << "warps: expected 1 to " << info[1] << ", got " << warps;
  FI_PREFETCH_CHECK(min_tiles_per_warp >= 0 && min_tiles_per_warp <= kMostMinTiles, ValueError)
      << "min_tiles_per_warp: expected 0 (the kernel chooses) to " << kMostMinTiles << ", got " << min_tiles_per_warp;
  check_batch_size(batch_size, warps);
  Plan adjusted{blocks, warps, min_tiles_per_warp, info[8]};
  while (blocks * warps % (int64_t{1} << adjusted.abreast_log2) != 0) --adjusted.abreast_log2;
  if (meeting_of(adjusted, info[5]).partial_bytes > info[3]) adjusted.abreast_log2 = 0;
  return plan_info(adjusted, meeting_of(adjusted, info[5]), info[5], batch_size);
}

/// FlashInfer's workspace_size: [float workspace bytes, int workspace bytes]; what fixed splits need, fix_splits()
/// says.
Array<int64_t> workspace_size(TensorView device_buffer, TensorView, int64_t, int64_t num_qo_heads, int64_t num_kv_heads,
                              int64_t, bool, int64_t, double, int64_t head_dim_qk, int64_t head_dim_vo, TensorView,
                              TensorView) {
  check_head_dim(head_dim_qk, head_dim_vo);
  const int64_t rows = row_count(num_qo_heads, num_kv_heads);
  if constexpr (kFixedSplit) return {0, 0};
  const Meeting meeting = meeting_of(make_plan(rows, num_kv_heads, device_buffer.device().device_id), rows);
  return {meeting.partial_bytes, meeting.counter_bytes};
}

Plan read_plan(const Array<int64_t>& info, int64_t rows, int64_t num_kv_heads, int device) {
  check_plan_info(info);
  const Plan made{info[0], info[1], info[6], info[8]};
  const int64_t limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  FI_PREFETCH_CHECK(
      made.blocks >= 1 && made.blocks <= kMaxBlocks && made.warps >= 1 && made.warps <= kMaxWarps &&
          made.tiles >= kFixedSplit && made.tiles <= (kFixedSplit ? kWholeRequest : kMostMinTiles) &&
          shared_bytes(made.warps, rows) <= limit && made.abreast_log2 >= 0 &&
          made.abreast_log2 <= (kFixedSplit ? 0 : most_abreast_log2(made.blocks * made.warps, num_kv_heads)),
      ValueError)
      << "plan_info: " << made.blocks << " blocks of " << made.warps << " warps (" << shared_bytes(made.warps, rows)
      << " bytes of shared memory), " << made.tiles << " tiles a " << (kFixedSplit ? "split" : "warp at least")
      << ", 2^" << made.abreast_log2 << " of " << num_kv_heads
      << " kv heads abreast, is beyond what this kernel or this GPU takes";
  return made;
}

struct CacheShape {
  int64_t pages, page_size, heads;
  int64_t strides[3];  // bytes: page, token, head; 0 for a dimension of size 1, whose stride says nothing
};

CacheShape cache_shape(const TensorView& cache, const char* name, bool hnd) {
  CacheShape shape;
  const int token = hnd ? 2 : 1, head = hnd ? 1 : 2;
  shape.pages = cache.size(0), shape.page_size = cache.size(token), shape.heads = cache.size(head);
  FI_PREFETCH_CHECK(cache.size(3) == FI_PREFETCH_HEAD_DIM && cache.stride(3) == 1, ValueError)
      << name << ": expected a contiguous last dimension of " << FI_PREFETCH_HEAD_DIM << ", got " << cache.size(3)
      << " with stride " << cache.stride(3);
  FI_PREFETCH_CHECK(reinterpret_cast<uintptr_t>(cache.data_ptr()) % 16 == 0, ValueError)
      << name << ": expected a 16-byte aligned address";
  const int dimensions[3] = {0, token, head};
  for (int i = 0; i < 3; ++i) {
    const int d = dimensions[i];
    shape.strides[i] = cache.size(d) == 1 ? 0 : cache.stride(d) * static_cast<int64_t>(sizeof(FI_PREFETCH_DTYPE_KV));
    FI_PREFETCH_CHECK(shape.strides[i] % 16 == 0 && shape.strides[i] >= 0, ValueError)
        << name << ": expected strides that are multiples of 16 bytes, got " << shape.strides[i]
        << " bytes in dimension " << d;
  }
  return shape;
}

/// Fills in the page table, all but the pages that the cache has, and what follows from it.
void set_table(DecodeParams& p, const TensorView& indptr, const TensorView& indices, const TensorView& last_page_len,
               int64_t page_size, int64_t num_kv_heads, DLDevice device) {
  check_tensor<int32_t>(last_page_len, "paged_kv_last_page_len", 1, device);
  const int64_t batch_size = last_page_len.size(0);
  check_vector<int32_t>(last_page_len, "paged_kv_last_page_len", batch_size, device);
  check_vector<int32_t>(indptr, "paged_kv_indptr", batch_size + 1, device);
  check_vector<int32_t>(indices, "paged_kv_indices", 0, device);
  const int64_t num_indices = indices.size(0);
  // Positions on the line of tiles are 32-bit numbers; the page table can name no more tiles, and gaps, than this.
  const double of_a_request = 1.0 + longest_gap(AnyTraits::kStageBytes);
  const double tiles =
      (static_cast<double>(num_indices) * page_size / kTileTokens + of_a_request * batch_size) * num_kv_heads;
  FI_PREFETCH_CHECK(tiles < 4294967296.0 && num_indices <= std::numeric_limits<int32_t>::max(), ValueError)
      << "paged_kv_indices: " << num_indices << " pages of " << page_size << " tokens and " << num_kv_heads
      << " heads are more than 2^32 tiles";
  p.num_kv_heads = num_kv_heads;
  PageTable& t = p.table;
  t.indptr = static_cast<const int32_t*>(indptr.data_ptr());
  t.indices = static_cast<const int32_t*>(indices.data_ptr());
  t.last_page_len = static_cast<const int32_t*>(last_page_len.data_ptr());
  t.batch_size = batch_size;
  t.num_indices = num_indices;
  t.page_size = page_size;
  t.page_shift = 0;
  while (int64_t{1} << t.page_shift < page_size) ++t.page_shift;
  t.page_inverse = static_cast<uint32_t>(((uint64_t{1} << (31 + t.page_shift)) + page_size - 1) / page_size);
  // A tile's rows beyond a length are computed with (and not read), so a tile more must fit as well.
  t.max_pages_per_request = (std::numeric_limits<int32_t>::max() - 64 * kTileTokens) / page_size;
}

/// Fills in the cache, the page table and what follows from them.
void set_cache(DecodeParams& p, const TensorView& k, const TensorView& v, const TensorView& indptr,
               const TensorView& indices, const TensorView& last_page_len, int64_t kv_layout_code) {
  FI_PREFETCH_CHECK(kv_layout_code == 0 || kv_layout_code == 1, ValueError)
      << "kv_layout_code: expected 0 (NHD) or 1 (HND), got " << kv_layout_code;
  const DLDevice device = k.device();
  FI_PREFETCH_CHECK(device.device_type == kDLCUDA, ValueError)
      << "paged_k_cache: expected a CUDA tensor, got " << name_of(device);
  check_tensor<FI_PREFETCH_DTYPE_KV>(k, "paged_k_cache", 4, device);
  check_tensor<FI_PREFETCH_DTYPE_KV>(v, "paged_v_cache", 4, device);
  const CacheShape ks = cache_shape(k, "paged_k_cache", kv_layout_code == 1);
  const CacheShape vs = cache_shape(v, "paged_v_cache", kv_layout_code == 1);
  FI_PREFETCH_CHECK(ks.pages == vs.pages && ks.page_size == vs.page_size && ks.heads == vs.heads, ValueError)
      << "paged_v_cache: expected paged_k_cache's shape";
  FI_PREFETCH_CHECK(ks.pages > 0 && ks.page_size > 0 && ks.heads > 0 &&
                        std::max(ks.pages, ks.page_size) <= std::numeric_limits<int32_t>::max(),
                    ValueError)
      << "paged_k_cache: expected between 1 and 2^31 - 1 pages, tokens a page and heads";

  set_table(p, indptr, indices, last_page_len, ks.page_size, ks.heads, device);
  p.table.num_pages = ks.pages;

  int64_t all_bits = 0;
  for (int i = 0; i < 3; ++i) all_bits |= ks.strides[i] | vs.strides[i];
  int unit_shift = 4;
  while (unit_shift < 20 && (all_bits >> unit_shift) % 2 == 0) ++unit_shift;
  p.unit_bytes = 1u << unit_shift;
  for (const CacheShape* s : {&ks, &vs}) {
    const double last = static_cast<double>(s->pages - 1) * s->strides[0] +
                        static_cast<double>(s->page_size - 1) * s->strides[1] +
                        static_cast<double>(s->heads - 1) * s->strides[2];
    FI_PREFETCH_CHECK(last < 4294967296.0 * p.unit_bytes, ValueError)
        << "paged_kv_cache: rows as far as " << last << " bytes apart are beyond what strides that are multiples of "
        << p.unit_bytes << " bytes let this kernel address";
  }
  const auto tensor = [&](const TensorView& x, const CacheShape& s) {
    return KvTensor{static_cast<const uint8_t*>(x.data_ptr()), static_cast<uint32_t>(s.strides[0] >> unit_shift),
                    static_cast<uint32_t>(s.strides[1] >> unit_shift),
                    static_cast<uint32_t>(s.strides[2] >> unit_shift)};
  };
  p.k = tensor(k, ks);
  p.v = tensor(v, vs);
  p.contiguous_tokens =
      ks.page_size % kTileTokens == 0 && ks.strides[1] == AnyTraits::kRowBytes && vs.strides[1] == AnyTraits::kRowBytes;
}

/// Fills in what is worked out by beside the page table: what was planned, and of the query the tokens that it sees.
Plan set_work(DecodeParams& p, const Array<int64_t>& info, int64_t rows, int64_t window_left, int64_t q_len,
              DLDevice device) {
  FI_PREFETCH_CHECK(q_len >= 1 && q_len <= kMostQueryRows, ValueError)
      << "q_len_per_req: expected 1 to " << kMostQueryRows << ", got " << q_len;
  FI_PREFETCH_CHECK((window_left >= 0) == kWindow, ValueError)
      << "window_left: this module was compiled " << (kWindow ? "with" : "without") << " a sliding window, got "
      << window_left;
  const Plan made = read_plan(info, rows, p.num_kv_heads, device.device_id);
  check_batch_size(p.table.batch_size, made.warps);
  p.q_len = q_len;
  p.window_left = std::min<int64_t>(window_left, std::numeric_limits<int32_t>::max() / 2);
  p.min_tiles_per_warp = made.tiles;
  p.abreast_log2 = made.abreast_log2;
  p.few_pieces = few_pieces(rows, made.warps);
  return made;
}

int32_t* running_counter(const Optional<TensorView>& running, DLDevice device) {
  if (!running.has_value()) return nullptr;
  check_vector<int32_t>(running.value(), "running", 1, device);
  return static_cast<int32_t*>(running.value().data_ptr());
}

struct Launch {
  int64_t blocks;
  int64_t warps;
  uint32_t shared;
  bool enable_pdl;
  cudaStream_t stream;
};

template <auto KERNEL, typename... Params>
void launch(const Launch& l, int device, const Params&... params) {
  // One memory of it a kernel and device. Only ever raised, by one thread at a time: else a smaller launch of another
  // thread could have the last word with CUDA, and a larger one here.
  constexpr int kDevices = 64;
  static std::atomic<uint32_t> shared_limit[kDevices];
  static std::mutex raising;
  FI_PREFETCH_CHECK(device >= 0 && device < kDevices, RuntimeError)
      << "device: expected one of the first " << kDevices << ", got " << device;
  if (shared_limit[device].load(std::memory_order_acquire) < l.shared) {
    const std::lock_guard<std::mutex> lock(raising);
    if (shared_limit[device].load(std::memory_order_relaxed) < l.shared) {
      check_cuda(cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared),
                 "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
      shared_limit[device].store(l.shared, std::memory_order_release);
    }
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t config{dim3(l.blocks), dim3(32 * l.warps), l.shared, l.stream, &attribute, l.enable_pdl};
  check_cuda(cudaLaunchKernelEx(&config, KERNEL, params...), "cudaLaunchKernelEx");
}

/// Whether there is a decode kernel that copies whole tiles, for pages of whole tiles.
[[maybe_unused]] constexpr bool has_tensor_copies(int row_tiles) {
  return !kFixedSplit && row_tiles == 1 && kPosition == Position::kNone && FI_PREFETCH_HEAD_DIM <= 128;
}

/// Whether that one is the faster, where a page table may name `bytes` of KV. Tiles of 8 KB: it saves up to 5 % of
/// calls of 4 to 16 MB, and costs 1.3 % at most; but what plan() worked out leaves the accelerator no time to look at
/// its maps, and calls of 1 to 32 MB take 2 to 9 % longer with it then, larger ones 1 to 2 % less. Smaller tiles: it
/// takes 1 to 8 % longer up to 32 MB in any case, and 1 to 5 % less from 64 MB on (up to 14 % in 64 dimensions; H200).
[[maybe_unused]] constexpr bool copies_tensors(double bytes, bool planned) {
  return bytes >= 64 << 20 || (AnyTraits::kStageBytes >= kLargeTileBytes && !planned);
}

/// The decode kernel for planned work, for few requests, or for more.
template <int ROW_TILES, bool TENSOR_COPIES, typename Params>
void launch_decode(const Launch& l, int device, const Params& p) {
  if (p.planned != nullptr) {
    launch<decode_kernel<Traits<ROW_TILES, /*FEW_REQUESTS=*/false, TENSOR_COPIES, /*PLANNED=*/true>>>(l, device, p);
  } else if (p.table.batch_size <= kMostFewRequests) {
    launch<decode_kernel<Traits<ROW_TILES, /*FEW_REQUESTS=*/true, TENSOR_COPIES>>>(l, device, p);
  } else {
    launch<decode_kernel<Traits<ROW_TILES, /*FEW_REQUESTS=*/false, TENSOR_COPIES>>>(l, device, p);
  }
}

/// The kernel of this module for up to 8 query rows a kv head (ROW_TILES: 1) or more.
template <int ROW_TILES>
void launch_attention(const Launch& l, int device, const DecodeParams& p, const Plan& plan, int64_t splits) {
  if constexpr (kFixedSplit) {
    const FixedSplitParams fixed{static_cast<uint32_t>(plan.tiles), static_cast<uint32_t>(splits)};
    launch<fixed_split_kernel<Traits<ROW_TILES>>>(l, device, p, fixed);
  } else {
    if constexpr (has_tensor_copies(ROW_TILES)) {
      const double most_bytes =
          static_cast<double>(p.table.num_indices) * p.table.page_size * p.num_kv_heads * 2 * AnyTraits::kRowBytes;
      if (p.table.page_size % kTileTokens == 0 && copies_tensors(most_bytes, p.planned != nullptr) &&
          device_attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9) {
        TensorDecodeParams with_maps{p, {}};
        if (describe<AnyTraits>(with_maps.maps, p)) {
          return launch_decode<ROW_TILES, /*TENSOR_COPIES=*/true>(l, device, with_maps);
        }
      }
    }
    launch_decode<ROW_TILES, /*TENSOR_COPIES=*/false>(l, device, p);
  }
}

/// Where schedule() leaves what it works out for a plan: a record a warp, then the requests.
struct PlannedMemory {
  PlannedWork* records;
  Request* requests;

  PlannedMemory(const TensorView& planned, const Plan& plan, int64_t batch_size, DLDevice device) {
    check_vector<int32_t>(planned, "planned", planned_bytes(plan, batch_size) / sizeof(int32_t), device);
    FI_PREFETCH_CHECK(reinterpret_cast<uintptr_t>(planned.data_ptr()) % 16 == 0, ValueError)
        << "planned: expected a 16-byte aligned address";
    records = static_cast<PlannedWork*>(planned.data_ptr());
    requests = reinterpret_cast<Request*>(records + plan.blocks * plan.warps);
  }
};

/// FlashInfer's run up to enable_pdl; then what this kernel takes besides. `counters`: int32, zero before the first
/// run, one buffer per stream of calls; every run leaves it zero. `prefetch`: the fields of PrefetchLevers. `running`:
/// int32, zero between calls, what prefetch_kv() gets as well. `planned`: what schedule() left for this plan, and a
/// page table that has stayed as it was then.
void run(TensorView float_workspace, TensorView counters, Array<int64_t> info, TensorView q, TensorView k, TensorView v,
         TensorView indptr, TensorView indices, TensorView last_page_len, TensorView o, Optional<TensorView> maybe_lse,
         int64_t kv_layout_code, int64_t window_left, bool enable_pdl, Optional<TensorView> maybe_sinks,
         double logits_soft_cap, double sm_scale, double v_scale, double rope_scale, double rope_theta, int64_t q_len,
         Array<int64_t> prefetch, Optional<TensorView> maybe_running, Optional<TensorView> maybe_planned) {
  DecodeParams p{};
  set_cache(p, k, v, indptr, indices, last_page_len, kv_layout_code);
  const DLDevice device = k.device();
  const int64_t batch_size = p.table.batch_size;

  check_tensor<FI_PREFETCH_DTYPE_Q>(q, "q", 3, device);
  const int64_t num_qo_heads = q.size(1);
  FI_PREFETCH_CHECK(q_len >= 1 && q_len <= kMostQueryRows && q.size(0) == batch_size * q_len &&
                        q.size(2) == FI_PREFETCH_HEAD_DIM && (q.stride(2) == 1),
                    ValueError)
      << "q: expected shape [" << batch_size << " * " << q_len << ", num_qo_heads, " << FI_PREFETCH_HEAD_DIM
      << "] with a contiguous last dimension, got [" << q.size(0) << ", " << q.size(1) << ", " << q.size(2)
      << "] with stride " << q.stride(2);
  FI_PREFETCH_CHECK(reinterpret_cast<uintptr_t>(q.data_ptr()) % 16 == 0 && (q.size(0) <= 1 || q.stride(0) % 8 == 0) &&
                        (num_qo_heads <= 1 || q.stride(1) % 8 == 0),
                    ValueError)
      << "q: expected an address and strides that are multiples of 16 bytes";
  const int64_t rows = row_count(num_qo_heads * q_len, p.num_kv_heads);
  FI_PREFETCH_CHECK(num_qo_heads % p.num_kv_heads == 0, ValueError)
      << "q: expected a multiple of " << p.num_kv_heads << " heads, got " << num_qo_heads;
  p.q = q.data_ptr();
  p.q_stride_n = q.stride(0);
  p.q_stride_h = q.stride(1);
  p.num_qo_heads = num_qo_heads;
  p.group_size = num_qo_heads / p.num_kv_heads;
  p.group_inverse = 65536 / p.group_size + 1;

  check_tensor<FI_PREFETCH_DTYPE_O>(o, "out", 3, device);
  FI_PREFETCH_CHECK(o.size(0) == q.size(0) && o.size(1) == q.size(1) && o.size(2) == q.size(2) && o.IsContiguous() &&
                        reinterpret_cast<uintptr_t>(o.data_ptr()) % 16 == 0,
                    ValueError)
      << "out: expected a contiguous, 16-byte aligned tensor of q's shape";
  p.o = o.data_ptr();
  if (maybe_lse.has_value()) {
    const TensorView& lse = maybe_lse.value();
    check_tensor<float>(lse, "lse", 2, device);
    FI_PREFETCH_CHECK(lse.size(0) == q.size(0) && lse.size(1) == q.size(1) && lse.IsContiguous(), ValueError)
        << "lse: expected a contiguous tensor of shape [" << q.size(0) << ", " << q.size(1) << "]";
    p.lse = static_cast<float*>(lse.data_ptr());
  }
  if (maybe_sinks.has_value()) {
    check_vector<float>(maybe_sinks.value(), "sinks", num_qo_heads, device);
    p.sinks = static_cast<const float*>(maybe_sinks.value().data_ptr());
  }

  FI_PREFETCH_CHECK((logits_soft_cap > 0) == kSoftCap, ValueError)
      << "logits_soft_cap: this module was compiled " << (kSoftCap ? "with" : "without") << " a soft cap, got "
      << logits_soft_cap;
  if constexpr (kSoftCap) {
    p.scale_log2 = kLog2e * logits_soft_cap;
    p.inverse_cap = sm_scale / logits_soft_cap;
  } else {
    p.scale_log2 = kLog2e * sm_scale;
  }
  p.v_scale = v_scale;
  if constexpr (kPosition == Position::kRope) {
    // The kernel takes a token's turn as a number with 20 bits before the point, which this is far from.
    FI_PREFETCH_CHECK(rope_scale >= 1e-3 && rope_scale <= 1e6 && rope_theta >= 1 && rope_theta <= 1e12, ValueError)
        << "rope_scale, rope_theta: expected 0.001 to 1e6 and 1 to 1e12, got " << rope_scale << " and " << rope_theta;
    constexpr double kPi = 3.141592653589793;
    p.rope_turns = 1 / (2 * kPi * rope_scale);
    p.rope_ratio = std::pow(rope_theta, -2.0 / FI_PREFETCH_HEAD_DIM);
  }

  FI_PREFETCH_CHECK(prefetch.size() == 5, ValueError)
      << "prefetch: expected [run_ahead, prologue, early_load, ready, stream], got " << prefetch.size() << " numbers";
  const auto lever = [&](int i, int64_t most) {
    return static_cast<int32_t>(std::min(std::max<int64_t>(prefetch[i], 0), most));
  };
  p.dependent_launch = enable_pdl;
  p.levers = {lever(0, 1 << 16), lever(1, 1 << 16), lever(2, 1), lever(3, 2), lever(4, 1)};
  if (p.levers.ready < kAllButLastToken || !enable_pdl) p.levers.early_load = 0;

  const Plan made = set_work(p, info, rows, window_left, q_len, device);
  if (batch_size == 0) return;
  const int64_t splits =
      kFixedSplit ? most_splits(made.tiles, p.table.num_indices, p.table.page_size, batch_size, p.num_kv_heads) : 0;
  const Meeting meeting = kFixedSplit ? meeting_of_rows(splits, splits, rows) : meeting_of(made, rows);
  const auto same_device = [&](const TensorView& x) {
    return x.device().device_type == device.device_type && x.device().device_id == device.device_id;
  };
  FI_PREFETCH_CHECK(same_device(float_workspace) && float_workspace.IsContiguous() &&
                        bytes_of(float_workspace) >= meeting.partial_bytes &&
                        reinterpret_cast<uintptr_t>(float_workspace.data_ptr()) % 16 == 0,
                    ValueError)
      << "float_workspace_buffer: expected at least " << meeting.partial_bytes
      << " contiguous bytes, 16-byte aligned, on " << name_of(device) << ", got " << bytes_of(float_workspace) << " on "
      << name_of(float_workspace.device());
  check_vector<int32_t>(counters, "counters", meeting.counter_bytes / sizeof(int32_t), device);
  // partial_offset() counts floats in 32 bits.
  FI_PREFETCH_CHECK(meeting.partial_bytes / sizeof(float) < 1ull << 32, ValueError)
      << "fixed_split_size: " << splits << " splits of " << rows << " rows are more than 16 GiB of partials";
  p.partials = static_cast<float*>(float_workspace.data_ptr());
  p.counters = static_cast<int32_t*>(counters.data_ptr());
  p.running = running_counter(maybe_running, device);
  if (maybe_planned.has_value() && !kFixedSplit) {
    const PlannedMemory planned(maybe_planned.value(), made, batch_size, device);
    p.planned = planned.records, p.planned_requests = planned.requests;
  }

  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  const Launch l{made.blocks, made.warps, shared_bytes(made.warps, rows), enable_pdl, current_stream(device)};
  if (rows <= 8) {
    launch_attention<1>(l, device.device_id, p, made, splits);
  } else {
    launch_attention<2>(l, device.device_id, p, made, splits);
  }
}

/// Brings up to `budget_bytes` of what a run() with this plan reads first into L2, with `num_blocks` blocks; stops when
/// a run() with the same `running` begins.
void prefetch_kv(Array<int64_t> info, TensorView k, TensorView v, TensorView indptr, TensorView indices,
                 TensorView last_page_len, int64_t kv_layout_code, int64_t window_left, int64_t q_len,
                 int64_t budget_bytes, int64_t num_blocks, bool evict_last, Optional<TensorView> maybe_running) {
  FI_PREFETCH_CHECK(!kFixedSplit, ValueError) << "prefetch_kv: not with fixed splits";
  DecodeParams p{};
  set_cache(p, k, v, indptr, indices, last_page_len, kv_layout_code);
  const DLDevice device = k.device();
  const Plan made = set_work(p, info, 1, window_left, q_len, device);
  FI_PREFETCH_CHECK(num_blocks >= 1 && num_blocks <= kMaxBlocks, ValueError)
      << "num_blocks: expected 1 to " << kMaxBlocks << ", got " << num_blocks;
  p.running = running_counter(maybe_running, device);
  const int64_t tiles = budget_bytes / (made.blocks * made.warps * AnyTraits::kStageBytes);
  if (tiles <= 0 || p.table.batch_size == 0) return;
  const uint32_t shared = ScanOf<AnyTraits>::shared_bytes(p.table.batch_size);
  const PrefetchKvParams window{static_cast<uint32_t>(made.blocks), static_cast<uint32_t>(made.warps),
                                static_cast<uint32_t>(std::min<int64_t>(tiles, 1 << 24)), evict_last};
  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  if constexpr (!kFixedSplit) {
    launch<prefetch_kv_kernel<AnyTraits>>({num_blocks, kMaxWarps, shared, false, current_stream(device)},
                                          device.device_id, p, window);
  }
}

/// Works out on the current stream what each warp of run() does with this plan and page table, and leaves it in
/// `planned`: int32, 512 bytes for each of the plan's warps and 16 for each request. The first run() after it must not
/// be a programmatic dependent of it.
void schedule(Array<int64_t> info, TensorView planned, TensorView indptr, TensorView indices, TensorView last_page_len,
              int64_t page_size, int64_t num_kv_heads, int64_t window_left, int64_t q_len) {
  FI_PREFETCH_CHECK(!kFixedSplit, ValueError) << "schedule: not with fixed splits";
  FI_PREFETCH_CHECK(page_size >= 1 && page_size <= std::numeric_limits<int32_t>::max() && num_kv_heads >= 1, ValueError)
      << "page_size, num_kv_heads: expected 1 or more, got " << page_size << " and " << num_kv_heads;
  const DLDevice device = planned.device();
  FI_PREFETCH_CHECK(device.device_type == kDLCUDA, ValueError)
      << "planned: expected a CUDA tensor, got " << name_of(device);
  DecodeParams p{};
  set_table(p, indptr, indices, last_page_len, page_size, num_kv_heads, device);
  check_plan_info(info);
  const int64_t rows = info[5];
  FI_PREFETCH_CHECK(rows >= 1 && rows <= kMostQueryRows, ValueError)
      << "plan_info: expected 1 to " << kMostQueryRows << " query rows a kv head, got " << rows;
  const Plan made = set_work(p, info, rows, window_left, q_len, device);
  const int64_t batch_size = p.table.batch_size;
  if (batch_size == 0) return;
  const int pages_a_lane = rows <= 8 ? Traits<1>::kPagesPerLane : Traits<2>::kPagesPerLane;
  const PlannedMemory memory(planned, made, batch_size, device);
  const ScheduleParams schedule{memory.records, memory.requests, static_cast<uint32_t>(made.blocks),
                                static_cast<uint32_t>(made.warps),
                                static_cast<uint32_t>(pages_a_lane * 32 / kTileTokens)};
  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  if constexpr (!kFixedSplit) {
    const uint32_t shared = ScanOf<AnyTraits>::shared_bytes(batch_size);
    launch<schedule_kernel<AnyTraits>>({made.blocks, made.warps, shared, false, current_stream(device)},
                                       device.device_id, p, schedule);
  }
}

}  // namespace
}  // namespace fi_prefetch

FI_PREFETCH_EXPORT(plan, fi_prefetch::plan);
FI_PREFETCH_EXPORT(adjust_plan, fi_prefetch::adjust_plan);
FI_PREFETCH_EXPORT(fix_splits, fi_prefetch::fix_splits);
FI_PREFETCH_EXPORT(workspace_size, fi_prefetch::workspace_size);
FI_PREFETCH_EXPORT(run, fi_prefetch::run);
FI_PREFETCH_EXPORT(prefetch_kv, fi_prefetch::prefetch_kv);
FI_PREFETCH_EXPORT(schedule, fi_prefetch::schedule);
