// The tensor memory accelerator: descriptions of tensors, copies of their boxes, and the barriers that their bytes
// arrive at (PTX ISA, sections 5.5, 9.7.9.27 and 9.7.13.15).
#pragma once

#include <cuda.h>

#include "emulator.h"

namespace emulator {

static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "a description fits");

/// cuTensorMapEncodeTiled, of what the kernels use: bytes, five dimensions, a swizzle as wide as the box. Refuses what
/// the driver refuses.
inline CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                             const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                             const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                             CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const uint32_t span = swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128 : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64 : 0;
  bool good = reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(base) % 16 == 0;
  good &= type == CU_TENSOR_MAP_DATA_TYPE_UINT8 && rank == 5 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE;
  good &= span > 0 && box[0] == span && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  for (int d = 0; d < 5; ++d) {
    good &= sizes[d] > 0 && sizes[d] <= 1ull << 32 && box[d] > 0 && box[d] <= 256 && steps[d] == 1;
    good &= d == 0 || (strides[d - 1] % 16 == 0 && strides[d - 1] < 1ull << 40);
  }
  if (!good) return CUDA_ERROR_INVALID_VALUE;
  TensorMap made{TensorMap::kMagic, span / 16, static_cast<const uint8_t*>(base), {}, {1}, {}};
  for (int d = 0; d < 5; ++d) {
    made.sizes[d] = sizes[d], made.box[d] = box[d];
    if (d > 0) made.strides[d] = strides[d - 1];
  }
  memcpy(map, &made, sizeof(made));
  return CUDA_SUCCESS;
}

/// A barrier in shared memory, one arrival a phase.
struct TensorBarrier {
  static constexpr uint16_t kMagic = 0xBA44;
  int32_t pending;  // bytes that are announced and have not arrived
  uint8_t parity;   // of the phase at hand
  uint8_t arrived;
  uint16_t magic;
};
static_assert(sizeof(TensorBarrier) == 8, "as large as the machine's");

inline TensorBarrier& tensor_barrier(const char* operation, uint32_t address, Site site) {
  TensorBarrier& barrier = *reinterpret_cast<TensorBarrier*>(shared_pointer(operation, address, 8, site));
  if (barrier.magic != TensorBarrier::kMagic) fail(site, "%s: there is no barrier at %#x", operation, address);
  return barrier;
}

inline void end_phase_when_complete(TensorBarrier& barrier) {
  if (!barrier.arrived || barrier.pending != 0) return;
  barrier.parity ^= 1;
  barrier.arrived = 0;
}

inline const TensorMap& tensor_map(const char* operation, const CUtensorMap* map, Site site) {
  const TensorMap& found = *reinterpret_cast<const TensorMap*>(map);
  if (reinterpret_cast<uintptr_t>(map) % 64 || found.magic != TensorMap::kMagic) {
    fail(site, "%s: %p is no description of a tensor", operation, static_cast<const void*>(map));
  }
  return found;
}

/// Calls use(destination, source) for every 16 bytes of a box: the offset in shared memory from where it begins, and
/// the address in global memory, null outside of the tensor. `first` is where the box begins in shared memory: the
/// swizzle hangs on the address.
template <typename Use>
inline void for_each_chunk(const TensorMap& map, const int32_t (&at)[5], uint32_t first, const Use& use) {
  uint32_t offset = 0;
  for (uint32_t e = 0; e < map.box[4]; ++e)
    for (uint32_t d = 0; d < map.box[3]; ++d)
      for (uint32_t c = 0; c < map.box[2]; ++c)
        for (uint32_t b = 0; b < map.box[1]; ++b)
          for (uint32_t a = 0; a < map.box[0]; a += 16, offset += 16) {
            const int64_t place[5] = {int64_t{at[0]} + a, int64_t{at[1]} + b, int64_t{at[2]} + c, int64_t{at[3]} + d,
                                      int64_t{at[4]} + e};
            const uint8_t* source = map.base;
            bool inside = true;
            for (int i = 0; i < 5; ++i) {
              inside &= place[i] >= 0 && place[i] < static_cast<int64_t>(map.sizes[i]);
              source += place[i] * static_cast<int64_t>(map.strides[i]);
            }
            const uint32_t address = first + offset;
            const uint32_t swizzled = address ^ ((address >> 7 & (map.swizzle - 1)) << 4);
            use(swizzled - first, inside ? source : nullptr);
          }
}

/// Lands one of the copies that arrive at a barrier.
inline void land(TensorCopy& copy, Site site) {
  Block& block = *current->warp->block;
  for_each_chunk(copy.map, copy.at, copy.destination, [&](uint32_t offset, const uint8_t* source) {
    uint8_t* to = block.shared + (copy.destination - kSharedBase) + offset;
    for (int i = 0; i < 16; ++i) {
      if (to[i] != 0xFF) fail(site, "the destination of a copy was written while it was in flight");
    }
    if (source != nullptr) {
      memcpy(to, source, 16);
    } else {
      memset(to, 0, 16);
    }
  });
  copy.landed = true;
}

/// Lets everybody see what arrived at a barrier, and forgets those copies.
inline void publish_tensor_copies(uint32_t barrier) {
  Block& block = *current->warp->block;
  std::vector<TensorCopy>& copies = block.tensor_copies;
  const auto done = [&](const TensorCopy& copy) { return copy.barrier == barrier && copy.landed; };
  for (const TensorCopy& copy : copies) {
    if (done(copy)) memset(&block.hidden[(copy.destination - kSharedBase) / 16], 0, copy.bytes / 16);
  }
  copies.erase(std::remove_if(copies.begin(), copies.end(), done), copies.end());
}

enum class Driver { kWithoutTensors, kGood, kRefusing };
inline Driver driver = Driver::kGood;
inline CUresult refuse(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                       const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return CUDA_ERROR_INVALID_VALUE;
}
}  // namespace emulator

/// 0: a driver that has no cuTensorMapEncodeTiled; 1: one that has; 2: one that refuses all.
EMULATOR_EXPORT inline void emulator_set_driver(int64_t driver) { emulator::driver = emulator::Driver(driver); }

// The runtime's way to the driver's function.
extern "C" {
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned int,
                                                    unsigned long long, cudaDriverEntryPointQueryResult* result) {
  const bool known =
      strcmp(symbol, "cuTensorMapEncodeTiled") == 0 && emulator::driver != emulator::Driver::kWithoutTensors;
  const auto encode = emulator::driver == emulator::Driver::kRefusing ? &emulator::refuse : &emulator::encode_tiled;
  *function = known ? reinterpret_cast<void*>(encode) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
inline cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long flags,
                                           cudaDriverEntryPointQueryResult* result) {
  return cudaGetDriverEntryPointByVersion(symbol, function, 0, flags, result);
}
}
