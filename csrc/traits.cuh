// The compile-time shape of a kernel, and what follows from it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <type_traits>

#include "params.cuh"

namespace fi_prefetch {

/// How positions enter the scores, as FlashInfer's PosEncodingMode. kRope: queries and keys lie unrotated in memory and
/// are turned by their positions, element i with element i + HEAD_DIM / 2. kAlibi: a bias that falls with the distance.
enum class Position : int { kNone = 0, kRope = 1, kAlibi = 2 };

/// Of a kv head. Their sums fill the registers: 32 rows of 128 dimensions already spill (192 bytes).
constexpr int kMostQueryRows = 16;

/// Q, Kv, O: element types in memory. ROW_TILES: query rows of a kv head (group_size * q_len) in units of 8, the N of
/// the tensor cores' product. WINDOW, SOFT_CAP and POSITION leave their arithmetic out where a model has none.
template <typename Q_, typename Kv_, typename O_, int HEAD_DIM_, int ROW_TILES_, int STAGES_, bool WINDOW_,
          bool SOFT_CAP_, Position POSITION_ = Position::kNone, bool FEW_REQUESTS_ = false, bool TENSOR_COPIES_ = false,
          bool PLANNED_ = false>
struct DecodeTraits {
  using Q = Q_;
  using Kv = Kv_;
  using O = O_;
  static constexpr int kHeadDim = HEAD_DIM_;
  static constexpr int kRowTiles = ROW_TILES_;
  static constexpr int kStages = STAGES_;
  static constexpr bool kWindow = WINDOW_;
  static constexpr bool kSoftCap = SOFT_CAP_;
  static constexpr bool kRope = POSITION_ == Position::kRope;
  static constexpr bool kAlibi = POSITION_ == Position::kAlibi;

  /// A batch of at most 32 requests, one a lane. Without the code for more a short call waits less for its
  /// instructions, which come from HBM where other kernels' weights passed through L2 in between.
  static constexpr bool kFewRequests = FEW_REQUESTS_;

  /// Whether plan() worked out what warps do (planned.cuh), for a batch of any size: the code that works it out is not
  /// in the way of such a call either.
  static constexpr bool kPlanned = PLANNED_;

  /// Whether tiles are copied whole (TensorCopies) and not row by row (RowCopies): where a tile's tokens are of one
  /// page.
  static constexpr bool kTensorCopies = TENSOR_COPIES_;

  static constexpr bool kFp8 = sizeof(Kv) == 1;
  /// The types of the products. fp8 becomes half, which holds every e4m3 and e5m2 number and keeps three more bits of P
  /// than bf16; queries that come in bf16, whose range is wider, are scaled to it row by row. With kRope the first
  /// product is one of tf32 numbers, see WarpAttention::multiply_rotated_k.
  using QK = typename std::conditional<kFp8, __half, Q>::type;
  using PV = QK;
  static constexpr bool kScaledQuery = kRope || (kFp8 && !std::is_same<Q, __half>::value);

  static constexpr int kRowBytes = kHeadDim * sizeof(Kv);     // of one token of one kv head
  static constexpr int kTileBytes = kTileTokens * kRowBytes;  // of K or of V
  static constexpr int kStageBytes = 2 * kTileBytes;
  /// Whether a warp takes two tiles of a run together, where its ring holds as many more, which keep HBM busy: a tile
  /// of few bytes costs more time in dependent instructions than on its way. Turned keys leave no registers for it.
  static constexpr bool kTakesTwo = kStages >= 4 && !kRope;
  /// Tokens of a stretch of tiles whose page numbers a lane looks up: see KvPipeline. Two where there are registers for
  /// it, so that the ring is filled without a second trip to L2.
  static constexpr int kPagesPerLane = kRowTiles == 1 && !kRope ? 2 : 1;
  static constexpr int kRowChunks = kRowBytes / 16;
  static constexpr int kColumnBytes = std::min(kRowBytes, 128);  // see TileLayout

  /// A row of a partial: HEAD_DIM sums, then m (base-2 exponent units) and l. The padding puts the rows of a
  /// tensor-core fragment into different shared-memory banks and keeps rows 16-byte aligned.
  static constexpr int kPartialStride = kHeadDim + 4;

  /// A warp's, which also takes a partial of as many rows as there are, once its tiles are done with.
  static constexpr int kRingBytes =
      std::max<int>(kStages * kStageBytes, kMostQueryRows * kPartialStride * sizeof(float));

  static_assert(kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256, "head_dim");
  static_assert(!kAlibi || !kSoftCap, "FlashInfer scales ALiBi's logits twice under a soft cap: its kernel's to do");
  static_assert(kStages >= 2, "a ring needs a stage to read and a stage to fill");
};

}  // namespace fi_prefetch
