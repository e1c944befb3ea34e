// The calls into CUDA's runtime that csrc/decode.cu makes, so that the whole module (its checks and launches, exported
// through tvm-ffi) loads and runs on a CPU, on CPU tensors.
#pragma once

#include <dlpack/dlpack.h>
#include <tvm/ffi/error.h>

#include <chrono>
#include <map>
#include <mutex>
#include <thread>

#include "cuda_on_cpu.h"

// The module asks for tensors on a CUDA device. Here these are the CPU's.
#define kDLCUDA kDLCPU

namespace emulator {

/// What the emulated GPU is like. The seed changes with every launch, so repeated calls interleave differently.
struct Device {
  int multiprocessors = 5;
  int shared_bytes_per_block = 227 * 1024;
  int compute_capability = 9;  // the major number
  uint64_t seed = 0;
  int launches = 0;
  int dependent_launches = 0;  // of them, under programmatic dependent launch
} inline device;

/// Each kernel's dynamic shared memory, as it was set last; what CUDA allows unasked where it was not.
inline std::map<const void*, int> shared_limits;
constexpr int kUnaskedSharedBytes = 48 * 1024;
inline int attribute_milliseconds = 0;  // that setting it takes
inline std::mutex one_call;             // of the runtime at a time, from any thread

}  // namespace emulator

EMULATOR_EXPORT void emulator_set_device(int64_t multiprocessors, int64_t shared_bytes_per_block) {
  emulator::device = {int(multiprocessors), int(shared_bytes_per_block)};
}
EMULATOR_EXPORT void emulator_set_compute_capability(int64_t major) {
  emulator::device.compute_capability = int(major);
}
EMULATOR_EXPORT void emulator_set_attribute_milliseconds(int64_t milliseconds) {
  emulator::attribute_milliseconds = int(milliseconds);
}
EMULATOR_EXPORT int64_t emulator_launches() { return emulator::device.launches; }
EMULATOR_EXPORT int64_t emulator_dependent_launches() { return emulator::device.dependent_launches; }

extern "C" {
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulated runtime"; }
inline const char* cudaGetErrorName(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrMultiProcessorCount) return *value = emulator::device.multiprocessors, cudaSuccess;
  if (attribute == cudaDevAttrComputeCapabilityMajor) return *value = emulator::device.compute_capability, cudaSuccess;
  if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) {
    return *value = emulator::device.shared_bytes_per_block, cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
}

namespace emulator {

template <typename Kernel>
cudaError_t set_attribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > device.shared_bytes_per_block) {
    return cudaErrorInvalidValue;
  }
  {
    const std::lock_guard<std::mutex> lock(one_call);
    shared_limits[reinterpret_cast<const void*>(kernel)] = value;
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(attribute_milliseconds));
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                          const Arguments&... arguments) {
  const auto& [grid, block, shared_bytes, stream, attributes, attribute_count] = *config;
  const std::lock_guard<std::mutex> lock(one_call);
  const auto limit = shared_limits.find(reinterpret_cast<const void*>(kernel));
  if (int(shared_bytes) > (limit == shared_limits.end() ? kUnaskedSharedBytes : limit->second)) {
    return cudaErrorInvalidValue;
  }
  device.launches += 1;
  device.dependent_launches += attribute_count > 0;
  const char* error =
      launch({.grid = grid, .block = block, .shared_bytes = shared_bytes, .seed = device.seed++, .resident_blocks = 3},
             kernel, arguments...);
  if (error != nullptr) TVM_FFI_THROW(RuntimeError) << error;
  return cudaSuccess;
}

}  // namespace emulator

#define cudaFuncSetAttribute emulator::set_attribute
#define cudaLaunchKernelEx emulator::launch_kernel
