// Which SMs the kernels of a stream run on.
#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <cstdint>

namespace {

using tvm::ffi::TensorView;

// Every block marks its SM and stays a while, so that the others go elsewhere.
__global__ void mark_sms_kernel(int32_t* marks, int64_t count) {
  uint32_t sm;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  if (sm < count) marks[sm] = 1;
  for (int i = 0; i < 100; ++i) __nanosleep(1000);
}

void mark_sms(TensorView marks, int64_t blocks) {
  const DLDevice device = marks.device();
  auto stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  mark_sms_kernel<<<static_cast<unsigned>(blocks), 1024, 0, stream>>>(static_cast<int32_t*>(marks.data_ptr()),
                                                                      marks.size(0));
  cudaError_t status = cudaGetLastError();
  TVM_FFI_ICHECK(status == cudaSuccess) << cudaGetErrorString(status);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(mark_sms, mark_sms);
