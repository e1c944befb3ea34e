// The compile-time shape of a kernel, and what follows from it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "params.cuh"

namespace fi_prefetch {

/// Q, Kv, O: element types in memory. ROW_TILES: query rows of a kv head (group_size * q_len) in units of 8, the N of
/// the tensor cores' product. WINDOW and SOFT_CAP leave their arithmetic out where a model has neither.
template <typename Q_, typename Kv_, typename O_, int HEAD_DIM_, int ROW_TILES_, int STAGES_, bool WINDOW_,
          bool SOFT_CAP_>
struct DecodeTraits {
  using Q = Q_;
  using Kv = Kv_;
  using O = O_;
  static constexpr int kHeadDim = HEAD_DIM_;
  static constexpr int kRowTiles = ROW_TILES_;
  static constexpr int kStages = STAGES_;
  static constexpr bool kWindow = WINDOW_;
  static constexpr bool kSoftCap = SOFT_CAP_;

  static constexpr bool kFp8 = sizeof(Kv) == 1;
  /// P V runs in half for fp8 (every e4m3 and e5m2 number is one exactly, and P keeps three more bits than in bf16);
  /// Q K^T in the query's type, which may need bf16's range.
  using PV = typename std::conditional<kFp8, __half, Q>::type;

  static constexpr int kRowBytes = kHeadDim * sizeof(Kv);     // of one token of one kv head
  static constexpr int kTileBytes = kTileTokens * kRowBytes;  // of K or of V
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kRowChunks = kRowBytes / 16;
  static constexpr int kMaxRows = 8 * kRowTiles;

  /// A row of a partial: HEAD_DIM sums, then m (base-2 exponent units) and l. The padding puts the rows of a
  /// tensor-core fragment into different shared-memory banks and keeps rows 16-byte aligned.
  static constexpr int kPartialStride = kHeadDim + 4;

  static_assert(kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256, "head_dim");
  static_assert(kStages >= 2, "a ring needs a stage to read and a stage to fill");
};

}  // namespace fi_prefetch
