// The KV cache described for the tensor memory accelerator, on the host.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "tensor_copies.cuh"

namespace fi_prefetch {

/// The driver's function, found at run time, since nothing else needs to be linked with the driver; null where it has
/// none.
inline decltype(&cuTensorMapEncodeTiled) find_encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
  if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

/// Describes K or V. False where that cannot be: its pages hold no whole tiles, or there is no such function or unit.
template <typename T>
bool describe(CUtensorMap& map, const DecodeParams& p, const KvTensor& x) {
  static const auto encode = find_encode_tiled();
  if (encode == nullptr || p.table.page_size % kTileTokens != 0) return false;
  constexpr uint32_t kColumns = T::kRowBytes / T::kColumnBytes;
  const uint64_t page_size = p.table.page_size, heads = p.num_kv_heads, pages = p.table.num_pages;
  // A dimension of size 1 has any stride.
  const auto stride = [&](uint32_t units) { return units == 0 ? T::kColumnBytes : uint64_t{units} * p.unit_bytes; };
  const cuuint64_t sizes[5] = {T::kColumnBytes, page_size, kColumns, heads, pages};
  const cuuint64_t strides[4] = {stride(x.token_stride), T::kColumnBytes, stride(x.head_stride), stride(x.page_stride)};
  const cuuint32_t box[5] = {T::kColumnBytes, kTileTokens, kColumns, 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  // Promotion to 256 bytes is slower by 6 to 9 % from 16 MB on (H200).
  const CUtensorMapSwizzle swizzle = T::kColumnBytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  return encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 5, const_cast<uint8_t*>(x.data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

/// Describes the whole cache, or says that it cannot be described.
template <typename T>
bool describe(TensorMaps& maps, const DecodeParams& p) {
  return describe<T>(maps.k, p, p.k) && describe<T>(maps.v, p, p.v);
}

}  // namespace fi_prefetch
