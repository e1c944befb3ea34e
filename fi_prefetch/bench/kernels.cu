// What a measurement needs beside the kernels it measures: a plain read of memory (the read ceiling), a read of the
// rows that a decode call reads and nothing else, a stretch of time in which HBM is idle (the stand-in
// for an all-reduce), and the kernel that comes before attention in a layer.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <cstdint>

#include "ptx.cuh"

namespace {

using tvm::ffi::TensorView;

constexpr int kReadThreads = 512;

cudaStream_t current_stream(const TensorView& tensor) {
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(tensor.device().device_type, tensor.device().device_id));
}

void check_launch(const char* kernel) {
  cudaError_t status = cudaGetLastError();
  TVM_FFI_ICHECK(status == cudaSuccess) << kernel << ": " << cudaGetErrorString(status);
}

__device__ __forceinline__ uint4 load_streaming(const uint4* address) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

// Every thread issues LOADS independent 16-byte loads a round and folds what they bring, so that none can be left out.
template <int LOADS>
__global__ void __launch_bounds__(kReadThreads) read_kernel(const uint4* data, int64_t count, uint32_t* sink) {
  uint32_t folded = 0;
  const int64_t stride = int64_t{LOADS} * kReadThreads;
  for (int64_t base = blockIdx.x * stride; base + stride <= count; base += gridDim.x * stride) {
    uint4 values[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) values[i] = load_streaming(data + base + i * kReadThreads + threadIdx.x);
#pragma unroll
    for (int i = 0; i < LOADS; ++i) folded ^= values[i].x ^ values[i].y ^ values[i].z ^ values[i].w;
  }
  if (folded == 0x9e3779b9u) *sink = folded;  // one chance in 2^32 a thread; the compiler cannot know
}

// Reads `buffer` once with `blocks` blocks and `loads` (4, 8 or 16) loads a thread and round.
void read(TensorView buffer, TensorView sink, int64_t blocks, int64_t loads) {
  const auto* data = static_cast<const uint4*>(buffer.data_ptr());
  const int64_t count = buffer.numel() * (buffer.dtype().bits / 8) / sizeof(uint4);
  auto* out = static_cast<uint32_t*>(sink.data_ptr());
  cudaStream_t stream = current_stream(buffer);
  const auto grid = static_cast<unsigned>(blocks);
  switch (loads) {
    case 4:
      read_kernel<4><<<grid, kReadThreads, 0, stream>>>(data, count, out);
      break;
    case 8:
      read_kernel<8><<<grid, kReadThreads, 0, stream>>>(data, count, out);
      break;
    case 16:
      read_kernel<16><<<grid, kReadThreads, 0, stream>>>(data, count, out);
      break;
    default:
      TVM_FFI_THROW(ValueError) << "loads must be 4, 8 or 16, got " << loads;
  }
  check_launch("read");
}

constexpr int kRowThreads = 256;
constexpr uint32_t kTileRows = 16;
constexpr int kRingBytes = 24 * 1024;  // a warp's

struct Rows {
  const uint8_t* k;
  const uint8_t* v;
  int64_t page_stride, token_stride, head_stride;  // bytes
  const int32_t* indices;
  uint32_t tiles;  // of 16 tokens of one head, all heads
  uint32_t page_size;
  uint32_t heads;
};

// Copies the rows of K and V that a decode call reads into shared memory, and does nothing with them: what is left of
// the call without its arithmetic, its schedule and its merge. Neighbouring tiles are the heads of the same tokens, the
// order in which HBM reads fastest. Page numbers are loaded before the dependency wait, as if they were final.
template <int ROW_BYTES>
__global__ void __launch_bounds__(kRowThreads, 1) read_rows_kernel(const __grid_constant__ Rows rows) {
  namespace ptx = fi_prefetch::ptx;
  constexpr uint32_t kChunks = ROW_BYTES / 16, kRowsPerCopy = 32 / kChunks;
  constexpr uint32_t kStageBytes = 2 * kTileRows * ROW_BYTES, kStages = kRingBytes / kStageBytes;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t ring = ptx::shared_address(ptx::dynamic_shared_memory()) + warp * kRingBytes;
  const uint64_t workers = gridDim.x * (kRowThreads / 32), worker = blockIdx.x * (kRowThreads / 32) + warp;
  const uint32_t begin = rows.tiles * worker / workers, end = rows.tiles * (worker + 1) / workers;
  const uint64_t policy = ptx::policy_evict_normal();
  const auto load_row = [&](uint32_t sixteen) -> int64_t {
    const uint32_t token = sixteen * kTileRows + lane % kTileRows;
    if (sixteen * rows.heads >= rows.tiles) return 0;
    return rows.indices[token / rows.page_size] * rows.page_stride + token % rows.page_size * rows.token_stride;
  };
  uint32_t sixteen = begin / rows.heads, head = begin % rows.heads;
  int64_t row = load_row(sixteen), next_row = load_row(sixteen + 1);
  ptx::wait_for_dependencies();
  ptx::launch_dependents();
  for (uint32_t i = 0; i < end - begin; ++i) {
    const uint32_t stage = ring + i % kStages * kStageBytes;
#pragma unroll
    for (uint32_t copy = 0; copy < kTileRows / kRowsPerCopy; ++copy) {
      const int64_t offset =
          __shfl_sync(~0u, row, copy * kRowsPerCopy + lane / kChunks) + head * rows.head_stride + lane % kChunks * 16;
      const uint32_t destination = stage + (copy * 32 + lane) * 16;
      ptx::copy_async_16(destination, rows.k + offset, policy);
      ptx::copy_async_16(destination + kTileRows * ROW_BYTES, rows.v + offset, policy);
    }
    ptx::copy_async_commit();
    if (++head == rows.heads) {
      head = 0;
      row = next_row;
      next_row = load_row(++sixteen + 1);
    }
    ptx::copy_async_wait<kStages - 1>();
  }
  ptx::copy_async_wait<0>();
}

template <int ROW_BYTES>
void launch_read_rows(const Rows& rows, int blocks, cudaStream_t stream) {
  const int shared = kRowThreads / 32 * kRingBytes;
  cudaFuncSetAttribute(read_rows_kernel<ROW_BYTES>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t config{dim3(blocks), dim3(kRowThreads), static_cast<size_t>(shared), stream, &attribute, 1};
  cudaLaunchKernelEx(&config, read_rows_kernel<ROW_BYTES>, rows);
  check_launch("read_rows");
}

// Reads all whole tiles of the pages that `indices` lists from `k` and `v` [pages, page_size, heads, 64 or 128], whose
// strides are equal, with `blocks` blocks.
void read_rows(TensorView k, TensorView v, TensorView indices, int64_t blocks) {
  const int64_t bytes = k.dtype().bits / 8;
  const Rows rows{static_cast<const uint8_t*>(k.data_ptr()),
                  static_cast<const uint8_t*>(v.data_ptr()),
                  k.stride(0) * bytes,
                  k.stride(1) * bytes,
                  k.stride(2) * bytes,
                  static_cast<const int32_t*>(indices.data_ptr()),
                  static_cast<uint32_t>(indices.size(0) * k.size(1) / kTileRows * k.size(2)),
                  static_cast<uint32_t>(k.size(1)),
                  static_cast<uint32_t>(k.size(2))};
  const cudaStream_t stream = current_stream(k);
  switch (k.size(3) * bytes) {
    case 64:
      return launch_read_rows<64>(rows, static_cast<int>(blocks), stream);
    case 128:
      return launch_read_rows<128>(rows, static_cast<int>(blocks), stream);
    case 256:
      return launch_read_rows<256>(rows, static_cast<int>(blocks), stream);
    default:
      TVM_FFI_THROW(ValueError) << "rows must have 64, 128 or 256 bytes, got " << k.size(3) * bytes;
  }
}

__global__ void idle_kernel(uint64_t nanoseconds) {
  uint64_t start, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  do {
    __nanosleep(100);
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - start < nanoseconds);
}

// Occupies the stream of `any`'s device for about `nanoseconds` with one thread: HBM has nothing to do meanwhile.
void idle(TensorView any, int64_t nanoseconds) {
  idle_kernel<<<1, 1, 0, current_stream(any)>>>(static_cast<uint64_t>(nanoseconds));
  check_launch("idle");
}

// One block a (request, head): rotates q and k in place (half-split pairs) and writes k and v to the request's slot.
__global__ void rope_and_write_kernel(__nv_bfloat16* qkv, const float* cos_sin, const int32_t* positions,
                                      const int32_t* slots, __nv_bfloat16* k_cache, __nv_bfloat16* v_cache, int heads_q,
                                      int heads_kv, int head_dim, bool trigger_early) {
#if __CUDA_ARCH__ >= 900
  if (trigger_early) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  const int request = blockIdx.y, head = blockIdx.x, lane = threadIdx.x, half = head_dim / 2;
  __nv_bfloat16* row = qkv + (int64_t{request} * (heads_q + 2 * heads_kv) + head) * head_dim;
  const int64_t slot = (int64_t{slots[request]} * heads_kv + (head - heads_q) % heads_kv) * head_dim;
  if (head >= heads_q + heads_kv) {
    v_cache[slot + lane] = row[lane];
    v_cache[slot + lane + half] = row[lane + half];
    return;
  }
  const float* angle = cos_sin + int64_t{positions[request]} * head_dim;
  const float low = __bfloat162float(row[lane]), high = __bfloat162float(row[lane + half]);
  const float cosine = angle[lane], sine = angle[lane + half];
  row[lane] = __float2bfloat16(low * cosine - high * sine);
  row[lane + half] = __float2bfloat16(high * cosine + low * sine);
  if (head < heads_q) return;
  k_cache[slot + lane] = row[lane];
  k_cache[slot + lane + half] = row[lane + half];
}

// `qkv` [batch, heads_q + 2 * heads_kv, head_dim] and the caches [.., heads_kv, head_dim] are bfloat16; `cos_sin`
// [positions, head_dim] is float32, cosines first; `positions` and `slots` [batch] are int32. With `trigger_early` a
// kernel behind it that was launched as its dependent may start at once.
void rope_and_write(TensorView qkv, TensorView cos_sin, TensorView positions, TensorView slots, TensorView k_cache,
                    TensorView v_cache, int64_t heads_q, int64_t heads_kv, bool trigger_early) {
  const auto batch = static_cast<unsigned>(qkv.size(0));
  const auto head_dim = static_cast<int>(qkv.size(2));
  const dim3 grid(static_cast<unsigned>(heads_q + 2 * heads_kv), batch);
  rope_and_write_kernel<<<grid, head_dim / 2, 0, current_stream(qkv)>>>(
      static_cast<__nv_bfloat16*>(qkv.data_ptr()), static_cast<const float*>(cos_sin.data_ptr()),
      static_cast<const int32_t*>(positions.data_ptr()), static_cast<const int32_t*>(slots.data_ptr()),
      static_cast<__nv_bfloat16*>(k_cache.data_ptr()), static_cast<__nv_bfloat16*>(v_cache.data_ptr()),
      static_cast<int>(heads_q), static_cast<int>(heads_kv), head_dim, trigger_early);
  check_launch("rope_and_write");
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(read, read);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(read_rows, read_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(idle, idle);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_and_write, rope_and_write);
