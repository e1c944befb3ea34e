// The entry points of the paper's kernel, for measurements: `run`, `residency` and `mark_sms`. One compilation has
// every element type, head_dim and way to prefetch. What the block table and the lengths say is the caller's to get
// right: lengths are cut off where shared memory ends, block numbers are used as they are.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "exports.cuh"
#include "xformers_decode.cuh"

namespace fi_prefetch::paper {
namespace {

using tvm::ffi::TensorView;

using Kernel = void (*)(Params);

constexpr double kLog2e = 1.4426950408889634;
constexpr int64_t kMaxSequences = 65535;  // a grid's y
constexpr int64_t kMaxHeads = 1 << 16;    // so that a cache block's bytes fit 31 bits
constexpr int64_t kMaxDistance = 1 << 20;

#define PAPER_CHECK(condition, error) \
  if (!(condition)) TVM_FFI_THROW(error)

void check_cuda(cudaError_t status, const char* what) {
  PAPER_CHECK(status == cudaSuccess, RuntimeError) << what << ": " << cudaGetErrorString(status);
}

int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

cudaStream_t current_stream(DLDevice device) {
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
}

std::string shape_of(const TensorView& x) {
  std::string text = "[";
  for (int i = 0; i < x.ndim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + "]";
}

std::string name_of(DLDataType dtype) { return tvm::ffi::DLDataTypeToString(dtype); }

bool same(DLDataType a, DLDataType b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }

std::string name_of(DLDevice device) {
  const std::string kind = device.device_type == kDLCUDA ? "cuda" : device.device_type == kDLCPU ? "cpu" : "device";
  return kind + ":" + std::to_string(device.device_id);
}

DLDevice check_gpu(const TensorView& x, const char* name) {
  PAPER_CHECK(x.device().device_type == kDLCUDA, ValueError)
      << name << ": expected a CUDA tensor, got one on " << name_of(x.device());
  return x.device();
}

/// Contiguous, on this device, of this dtype and shape (-1: any size).
void check_tensor(const TensorView& x, const char* name, DLDataType dtype, std::initializer_list<int64_t> shape,
                  DLDevice device) {
  PAPER_CHECK(x.device().device_type == kDLCUDA && x.device().device_id == device.device_id, ValueError)
      << name << ": expected a tensor on " << name_of(device) << ", got one on " << name_of(x.device());
  PAPER_CHECK(same(x.dtype(), dtype), TypeError)
      << name << ": expected dtype " << name_of(dtype) << ", got " << name_of(x.dtype());
  bool fits = x.ndim() == static_cast<int>(shape.size());
  std::string expected;
  int i = 0;
  for (int64_t size : shape) {
    fits = fits && (size < 0 || x.size(i) == size);
    expected += (i++ ? ", " : "") + (size < 0 ? "any" : std::to_string(size));
  }
  PAPER_CHECK(fits && x.IsContiguous(), ValueError)
      << name << ": expected a contiguous tensor of shape [" << expected << "], got " << shape_of(x);
  PAPER_CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, ValueError) << name << ": not 16-byte aligned";
}

template <typename T, int HEAD_DIM>
Kernel with_prefetch(int64_t prefetch) {
  constexpr Kernel kKernels[] = {xformers_decode_kernel<Traits<T, HEAD_DIM, Prefetch::kNone>>,
                                 xformers_decode_kernel<Traits<T, HEAD_DIM, Prefetch::kBulk>>,
                                 xformers_decode_kernel<Traits<T, HEAD_DIM, Prefetch::kLines>>};
  return kKernels[prefetch];
}

template <typename T>
Kernel with_head_dim(int64_t head_dim, int64_t prefetch) {
  return head_dim == 64 ? with_prefetch<T, 64>(prefetch) : with_prefetch<T, 128>(prefetch);
}

struct Launch {
  Kernel kernel;
  uint32_t shared_bytes;
};

/// The kernel for these queries, with at most `most_resident` thread blocks an SM (0: as many as fit): a smaller number
/// is reached by asking for more shared memory than is used.
Launch prepare(const TensorView& q, int64_t max_context_len, int64_t prefetch, int64_t most_resident) {
  const int device = q.device().device_id;
  PAPER_CHECK(q.ndim() == 3, ValueError) << "q: expected [num_seqs, num_heads, head_dim], got " << shape_of(q);
  const bool is_half = same(q.dtype(), {kDLFloat, 16, 1});
  PAPER_CHECK(is_half || same(q.dtype(), {kDLBfloat, 16, 1}), TypeError)
      << "q: expected dtype float16 or bfloat16, got " << name_of(q.dtype());
  const int64_t head_dim = q.size(2);
  PAPER_CHECK(head_dim == 64 || head_dim == 128, ValueError) << "q: expected a head_dim of 64 or 128, got " << head_dim;
  PAPER_CHECK(prefetch >= 0 && prefetch <= 2, ValueError)
      << "prefetch: expected 0 (none), 1 (bulk) or 2 (lines), got " << prefetch;
  PAPER_CHECK(static_cast<Prefetch>(prefetch) != Prefetch::kBulk ||
                  device_attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9,
              ValueError)
      << "prefetch: 1 (bulk) needs compute capability 9.0 or later";
  const Kernel kernel =
      is_half ? with_head_dim<__half>(head_dim, prefetch) : with_head_dim<__nv_bfloat16>(head_dim, prefetch);

  const auto shared_bytes = head_dim == 64 ? SharedMemory<64>::bytes : SharedMemory<128>::bytes;
  const int64_t limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int64_t most_tokens = (limit - shared_bytes(0)) / sizeof(float) / kBlockTokens * kBlockTokens;
  PAPER_CHECK(max_context_len >= 0 && max_context_len <= most_tokens, ValueError)
      << "max_context_len: expected 0 to " << most_tokens << " tokens, whose logits this GPU's " << limit
      << " bytes of shared memory a thread block hold, got " << max_context_len;
  int64_t bytes = shared_bytes(max_context_len);
  PAPER_CHECK(most_resident >= 0, ValueError) << "most_resident: expected 0 or more, got " << most_resident;
  if (most_resident > 0) {
    const int64_t of_sm = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    const int64_t reserved = device_attribute(cudaDevAttrReservedSharedMemoryPerBlock, device);
    bytes = std::max(bytes, std::min(limit, (of_sm / most_resident - reserved) / 128 * 128));
  }
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
             "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
  return {kernel, static_cast<uint32_t>(bytes)};
}

/// Thread blocks of `run` with these arguments that an SM holds at a time, by registers, threads and shared memory.
int64_t residency(TensorView q, int64_t max_context_len, int64_t prefetch, int64_t most_resident) {
  tvm::ffi::CUDADeviceGuard guard(check_gpu(q, "q").device_id);
  const Launch l = prepare(q, max_context_len, prefetch, most_resident);
  int blocks = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, l.kernel, kThreads, l.shared_bytes),
             "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks;
}

/// Decodes. The tensors are those of `Params`, all contiguous, 16-bit floats of q's type but for the int32 block table
/// and lengths. `max_context_len`: no length may be above it. `prefetch`: 0 none, 1 bulk, 2 lines; `distance`: how many
/// iterations ahead, at least 1. `most_resident`: see `prepare`.
void run(TensorView q, TensorView k_cache, TensorView v_cache, TensorView block_table, TensorView context_lens,
         TensorView o, int64_t max_context_len, double sm_scale, int64_t prefetch, int64_t distance,
         int64_t most_resident) {
  const DLDevice device = check_gpu(q, "q");
  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  const Launch l = prepare(q, max_context_len, prefetch, most_resident);
  const int64_t num_seqs = q.size(0), num_heads = q.size(1), head_dim = q.size(2);
  PAPER_CHECK(k_cache.ndim() == 5 && k_cache.size(1) > 0, ValueError)
      << "k_cache: expected [blocks, num_kv_heads, head_dim / 8, 16, 8], got " << shape_of(k_cache);
  const int64_t cache_blocks = k_cache.size(0), num_kv_heads = k_cache.size(1);
  check_tensor(q, "q", q.dtype(), {-1, -1, -1}, device);
  check_tensor(k_cache, "k_cache", q.dtype(), {-1, -1, head_dim / 8, kBlockTokens, 8}, device);
  check_tensor(v_cache, "v_cache", q.dtype(), {cache_blocks, num_kv_heads, head_dim, kBlockTokens}, device);
  check_tensor(block_table, "block_table", {kDLInt, 32, 1}, {num_seqs, -1}, device);
  check_tensor(context_lens, "context_lens", {kDLInt, 32, 1}, {num_seqs}, device);
  check_tensor(o, "out", q.dtype(), {num_seqs, num_heads, head_dim}, device);
  PAPER_CHECK(num_heads > 0 && num_heads % num_kv_heads == 0 && num_heads <= kMaxHeads, ValueError)
      << "q: expected a positive multiple of k_cache's " << num_kv_heads << " heads, at most " << kMaxHeads << ", got "
      << num_heads;
  PAPER_CHECK(num_seqs <= kMaxSequences, ValueError)
      << "q: expected at most " << kMaxSequences << " sequences, got " << num_seqs;
  const int64_t max_blocks = block_table.size(1);
  PAPER_CHECK(max_context_len <= max_blocks * kBlockTokens, ValueError)
      << "max_context_len: expected at most the " << max_blocks << " KV blocks of " << kBlockTokens
      << " tokens that block_table has room for, got " << max_context_len;
  PAPER_CHECK(distance >= 1 && distance <= kMaxDistance, ValueError)
      << "distance: expected 1 to " << kMaxDistance << " iterations, got " << distance;
  PAPER_CHECK(std::isfinite(sm_scale), ValueError) << "sm_scale: expected a finite number, got " << sm_scale;
  if (num_seqs == 0) return;

  const Params p{q.data_ptr(),
                 k_cache.data_ptr(),
                 v_cache.data_ptr(),
                 static_cast<const int32_t*>(block_table.data_ptr()),
                 static_cast<const int32_t*>(context_lens.data_ptr()),
                 o.data_ptr(),
                 static_cast<int32_t>(max_blocks),
                 static_cast<int32_t>(max_context_len),
                 static_cast<int32_t>(num_kv_heads),
                 static_cast<int32_t>(num_heads / num_kv_heads),
                 static_cast<int32_t>(distance),
                 static_cast<float>(sm_scale * kLog2e)};
  l.kernel<<<dim3(num_heads, num_seqs), kThreads, l.shared_bytes, current_stream(device)>>>(p);
  check_cuda(cudaGetLastError(), "xformers_decode_kernel");
}

__global__ void mark_sms_kernel(int32_t* marks, int32_t count) {
  uint32_t sm;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  if (threadIdx.x == 0 && sm < count) marks[sm] = 1;
}

/// Sets `marks[i]` (int32) to 1 for every SM i that the current stream's kernels run on.
void mark_sms(TensorView marks) {
  const DLDevice device = check_gpu(marks, "marks");
  check_tensor(marks, "marks", {kDLInt, 32, 1}, {-1}, device);
  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  const int64_t blocks = 64 * std::max<int64_t>(marks.numel(), 1);  // more than fit at a time: no SM is left out
  mark_sms_kernel<<<blocks, 1024, 0, current_stream(device)>>>(static_cast<int32_t*>(marks.data_ptr()), marks.numel());
  check_cuda(cudaGetLastError(), "mark_sms_kernel");
}

}  // namespace
}  // namespace fi_prefetch::paper

FI_PREFETCH_EXPORT(run, fi_prefetch::paper::run);
FI_PREFETCH_EXPORT(residency, fi_prefetch::paper::residency);
FI_PREFETCH_EXPORT(mark_sms, fi_prefetch::paper::mark_sms);
