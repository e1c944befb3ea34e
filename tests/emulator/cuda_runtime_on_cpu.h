// The calls into CUDA's runtime that csrc/decode.cu makes, so that the whole module (its checks and launches, exported
// through tvm-ffi) loads and runs on a CPU, on CPU tensors.
#pragma once

#include <dlpack/dlpack.h>
#include <tvm/ffi/error.h>

#include "cuda_on_cpu.h"

// The module asks for tensors on a CUDA device. Here these are the CPU's.
#define kDLCUDA kDLCPU

namespace emulator {

/// What the emulated GPU is like. The seed changes with every launch, so repeated calls interleave differently.
struct Device {
  int multiprocessors = 5;
  int shared_bytes_per_block = 227 * 1024;
  uint64_t seed = 0;
  int launches = 0;
  int dependent_launches = 0;  // of them, under programmatic dependent launch
} inline device;

}  // namespace emulator

EMULATOR_EXPORT void emulator_set_device(int64_t multiprocessors, int64_t shared_bytes_per_block) {
  emulator::device = {int(multiprocessors), int(shared_bytes_per_block)};
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
  if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) {
    return *value = emulator::device.shared_bytes_per_block, cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
}

namespace emulator {

template <typename Kernel>
cudaError_t set_attribute(Kernel*, cudaFuncAttribute attribute, int value) {
  const bool fits = value <= device.shared_bytes_per_block;
  return attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && fits ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                          const Arguments&... arguments) {
  const auto& [grid, block, shared_bytes, stream, attributes, attribute_count] = *config;
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
