// A kernel that lets its dependents start at once and writes only later: what the kernel before attention may do under
// programmatic dependent launch.
#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <cstdint>

namespace {

using tvm::ffi::TensorView;

// Block b copies row b of `rows` to `destination` + offsets[b], `delay` nanoseconds after its dependents may start.
__global__ void write_late_kernel(uint8_t* destination, const int64_t* offsets, const uint8_t* rows, int64_t row_bytes,
                                  uint64_t delay) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  uint64_t start, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  do {
    __nanosleep(200);
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - start < delay);
  for (int64_t i = threadIdx.x; i < row_bytes; i += blockDim.x) {
    destination[offsets[blockIdx.x] + i] = rows[blockIdx.x * row_bytes + i];
  }
}

void write_late(TensorView destination, TensorView offsets, TensorView rows, int64_t delay) {
  const DLDevice device = destination.device();
  auto stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  write_late_kernel<<<static_cast<unsigned>(rows.size(0)), 128, 0, stream>>>(
      static_cast<uint8_t*>(destination.data_ptr()), static_cast<const int64_t*>(offsets.data_ptr()),
      static_cast<const uint8_t*>(rows.data_ptr()), rows.size(1), static_cast<uint64_t>(delay));
  cudaError_t status = cudaGetLastError();
  TVM_FFI_ICHECK(status == cudaSuccess) << cudaGetErrorString(status);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(write_late, write_late);
