// From what shared memory holds to what the tensor cores multiply.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstring>

#include "ptx.cuh"

namespace fi_prefetch {

template <typename Pair>
FI_PREFETCH_DEVICE uint32_t register_of(Pair pair) {
  static_assert(sizeof(Pair) == sizeof(uint32_t), "two 16-bit numbers");
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

/// Two floats as one register of two 16-bit numbers, `low` in the low half.
template <typename T>
FI_PREFETCH_DEVICE uint32_t pack(float low, float high);

template <>
FI_PREFETCH_DEVICE uint32_t pack<__nv_bfloat16>(float low, float high) {
  return register_of(__floats2bfloat162_rn(low, high));
}

template <>
FI_PREFETCH_DEVICE uint32_t pack<__half>(float low, float high) {
  return register_of(__floats2half2_rn(low, high));
}

/// The other way.
template <typename T>
FI_PREFETCH_DEVICE float2 unpack(uint32_t pair);

template <>
FI_PREFETCH_DEVICE float2 unpack<__nv_bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
}

template <>
FI_PREFETCH_DEVICE float2 unpack<__half>(uint32_t pair) {
  __half2 halves;
  memcpy(&halves, &pair, sizeof halves);
  return __half22float2(halves);
}

template <typename Fp8>
struct Fp8Format;
template <>
struct Fp8Format<__nv_fp8_e4m3> {
  static constexpr __nv_fp8_interpretation_t value = __NV_E4M3;
};
template <>
struct Fp8Format<__nv_fp8_e5m2> {
  static constexpr __nv_fp8_interpretation_t value = __NV_E5M2;
};

/// Two fp8 numbers as two halves: exact, NaN and infinity included.
template <typename Fp8>
FI_PREFETCH_DEVICE uint32_t widen(uint16_t pair) {
  const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(pair, Fp8Format<Fp8>::value);
  return register_of(__half2(raw));
}

/// Four fp8 numbers as two registers of halves.
template <typename Fp8>
FI_PREFETCH_DEVICE void widen(uint32_t four, uint32_t& low, uint32_t& high) {
  const ushort2 pairs = ptx::halves(four);
  low = widen<Fp8>(pairs.x), high = widen<Fp8>(pairs.y);
}

}  // namespace fi_prefetch
