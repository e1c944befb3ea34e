// The part of CUDA C++ that the kernels use and that the CUDA headers leave undeclared for a host compiler.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cmath>
#include <type_traits>

#include "emulator.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
// An empty __shared__ would quietly give every thread a variable of its own.
#undef __shared__
#define __shared__ _Pragma("GCC error \"the emulator has dynamic shared memory only\"")

#define threadIdx (::emulator::current->index)
#define blockIdx (::emulator::current->warp->block->index)
#define blockDim (::emulator::machine.launch.block)
#define gridDim (::emulator::machine.launch.grid)
#define warpSize 32

// ---- block and warp -----------------------------------------------------------------------------------------------

using emulator::Site;

inline void __syncthreads(Site site = Site::current()) { emulator::barrier("__syncthreads", 0, site); }
inline int __syncthreads_or(int predicate, Site site = Site::current()) {
  return emulator::barrier("__syncthreads_or", predicate, site).last_votes != 0;
}
inline int __syncthreads_and(int predicate, Site site = Site::current()) {
  emulator::Block& block = emulator::barrier("__syncthreads_and", predicate, site);
  return block.last_votes == block.last_arrived;
}
inline int __syncthreads_count(int predicate, Site site = Site::current()) {
  return emulator::barrier("__syncthreads_count", predicate, site).last_votes;
}

inline void __syncwarp(uint32_t mask = ~0u, Site site = Site::current()) {
  emulator::collective("__syncwarp", mask, nullptr, site, [=](emulator::Warp& warp) {
    for (uint32_t left = mask; left; left &= left - 1) emulator::publish_copies(warp.lanes[__builtin_ctz(left)]);
  });
}

namespace emulator {

template <typename T>
struct ShuffleOperands {
  T in, out;
  int source;
};

/// `source` is the lane to read from; each lane has worked out its own.
template <typename T>
inline T shuffle(const char* operation, uint32_t mask, T value, int source, Site site) {
  ShuffleOperands<T> mine{value, value, source};
  collective(operation, mask, &mine, site, [&](Warp& warp) {
    machine.statistics.shuffles += 1;
    for (uint32_t left = mask; left; left &= left - 1) {
      auto& to = *static_cast<ShuffleOperands<T>*>(warp.lanes[__builtin_ctz(left)].operands);
      if (!(mask >> to.source & 1)) fail(site, "%s: reads lane %d, outside mask %#x", operation, to.source, mask);
      to.out = static_cast<ShuffleOperands<T>*>(warp.lanes[to.source].operands)->in;
    }
  });
  return mine.out;
}

/// Combines one value of each lane with `combine`, from the lowest lane up.
template <typename T, typename Combine>
inline T reduce(const char* operation, uint32_t mask, T value, Site site, Combine&& combine) {
  collective(operation, mask, &value, site, [&](Warp& warp) {
    T all = *static_cast<T*>(warp.lanes[__builtin_ctz(mask)].operands);
    for (uint32_t left = mask & (mask - 1); left; left &= left - 1) {
      all = combine(all, *static_cast<T*>(warp.lanes[__builtin_ctz(left)].operands));
    }
    for (uint32_t left = mask; left; left &= left - 1) *static_cast<T*>(warp.lanes[__builtin_ctz(left)].operands) = all;
  });
  return value;
}

inline int lane() { return current->number; }

}  // namespace emulator

template <typename T>
inline T __shfl_sync(uint32_t mask, T value, int source, int width = 32, Site site = Site::current()) {
  return emulator::shuffle("__shfl_sync", mask, value, (emulator::lane() & -width) | (source & (width - 1)), site);
}
template <typename T>
inline T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32, Site site = Site::current()) {
  const int lane = emulator::lane(), source = lane ^ lane_mask;
  return emulator::shuffle("__shfl_xor_sync", mask, value, source > (lane | (width - 1)) ? lane : source, site);
}
template <typename T>
inline T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, Site site = Site::current()) {
  const int lane = emulator::lane(), source = lane - static_cast<int>(delta);
  return emulator::shuffle("__shfl_up_sync", mask, value, source < (lane & -width) ? lane : source, site);
}
template <typename T>
inline T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, Site site = Site::current()) {
  const int lane = emulator::lane(), source = lane + static_cast<int>(delta);
  return emulator::shuffle("__shfl_down_sync", mask, value, source > (lane | (width - 1)) ? lane : source, site);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, Site site = Site::current()) {
  return emulator::reduce<uint32_t>("__ballot_sync", mask, predicate ? emulator::current->bit() : 0u, site,
                                    [](uint32_t a, uint32_t b) { return a | b; });
}
inline int __any_sync(uint32_t mask, int predicate, Site site = Site::current()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, Site site = Site::current()) {
  return __ballot_sync(mask, predicate, site) == mask;
}
template <typename T>
inline T __reduce_add_sync(uint32_t mask, T value, Site site = Site::current()) {
  return emulator::reduce("__reduce_add_sync", mask, value, site, [](T a, T b) { return a + b; });
}
template <typename T>
inline T __reduce_max_sync(uint32_t mask, T value, Site site = Site::current()) {
  return emulator::reduce("__reduce_max_sync", mask, value, site, [](T a, T b) { return a > b ? a : b; });
}

// ---- global memory ------------------------------------------------------------------------------------------------

#define EMULATOR_LOAD(name, first)                                      \
  template <typename T>                                                 \
  inline T name(const T* address, Site site = Site::current()) {        \
    emulator::check_global(#name, address, sizeof(T), sizeof(T), site); \
    first;                                                              \
    return *address;                                                    \
  }
EMULATOR_LOAD(__ldg, )
EMULATOR_LOAD(__ldcs, )
EMULATOR_LOAD(__ldca, emulator::check_waited("__ldca", site))
// Through L2, so this may be meant to see what another block writes, even in a loop that waits for it.
EMULATOR_LOAD(__ldcg, emulator::suspend())
#undef EMULATOR_LOAD

#define EMULATOR_STORE(name)                                                               \
  template <typename T>                                                                    \
  inline void name(T* address, std::common_type_t<T> value, Site site = Site::current()) { \
    emulator::check_global(#name, address, sizeof(T), sizeof(T), site);                    \
    emulator::check_dependencies_ended(#name, site);                                       \
    *address = value;                                                                      \
  }
EMULATOR_STORE(__stcg)
EMULATOR_STORE(__stcs)
#undef EMULATOR_STORE

inline void emulator_fence() {
  emulator::machine.statistics.fences += 1;
  emulator::suspend();
}
inline void __threadfence() { emulator_fence(); }
inline void __threadfence_block() { emulator_fence(); }

namespace emulator {
/// Others may run before and after the update, so that what a kernel leaves for after its atomic is seen undone.
template <typename T, typename Update>
inline T atomic(const char* operation, T* address, Site site, Update&& update) {
  const uint8_t *p = reinterpret_cast<const uint8_t*>(address), *shared = current->warp->block->shared;
  if (p < shared || p + sizeof(T) > shared + machine.launch.shared_bytes) {
    check_global(operation, address, sizeof(T), sizeof(T), site);
    check_dependencies_ended(operation, site);
  }
  machine.statistics.atomics += 1;
  suspend();
  const T old = *address;
  *address = update(old);
  suspend();
  return old;
}
}  // namespace emulator

#define EMULATOR_ATOMIC(name, updated)                                                  \
  template <typename T>                                                                 \
  inline T name(T* address, std::common_type_t<T> value, Site site = Site::current()) { \
    return emulator::atomic(#name, address, site, [=](T old) -> T { return updated; }); \
  }
EMULATOR_ATOMIC(atomicAdd, old + value)
EMULATOR_ATOMIC(atomicExch, value)
EMULATOR_ATOMIC(atomicMax, (old > value ? old : value))
EMULATOR_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef EMULATOR_ATOMIC
template <typename T>
inline T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value,
                   Site site = Site::current()) {
  return emulator::atomic("atomicCAS", address, site, [=](T old) { return old == expected ? value : old; });
}

// ---- arithmetic ---------------------------------------------------------------------------------------------------

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 15;
    uint32_t byte = bytes >> 8 * (nibble & 7) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;  // its sign, in every bit
    result |= byte << 8 * i;
  }
  return result;
}

namespace emulator {
template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
}  // namespace emulator
inline float __int_as_float(int x) { return emulator::bits_as<float>(x); }
inline float __uint_as_float(uint32_t x) { return emulator::bits_as<float>(x); }
inline int __float_as_int(float x) { return emulator::bits_as<int>(x); }
inline uint32_t __float_as_uint(float x) { return emulator::bits_as<uint32_t>(x); }

inline int __double2loint(double x) { return static_cast<int>(emulator::bits_as<uint64_t>(x)); }

inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
#define __expf(x) expf(x)  // macros: glibc declares functions of these names, which it does not export
#define __logf(x) logf(x)

// CUDA's min and max take mixed types, and for floats are fmin and fmax, which prefer a number to a NaN.
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(static_cast<T>(a), static_cast<T>(b));
  else
    return static_cast<T>(b) < static_cast<T>(a) ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(static_cast<T>(a), static_cast<T>(b));
  else
    return static_cast<T>(a) < static_cast<T>(b) ? b : a;
}

// The headers have no host version of these. Templates, so that a header that has one is preferred.
template <typename T>
inline T __hfma(T a, T b, T c) {
  return T(fmaf(static_cast<float>(a), static_cast<float>(b), static_cast<float>(c)));
}
template <typename T>
inline T __hfma2(T a, T b, T c) {
  return T(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y));
}
