// One warp's attention over the tiles of one request and kv head, kept in registers: S^T = K Q^T with the tile's 16
// tokens as the rows and the query rows as the columns, softmax over the rows seen so far, O^T += V^T P^T. With tokens
// as rows a group of four query heads wastes half of a product, not three quarters.
//
// Fragments: lane l is (p, j) = (l / 4, l % 4). It holds query rows (columns of S^T and O^T) 2j and 2j + 1 of every
// eight; in S^T tokens p and p + 8; in O^T dimensions dim_a and dim_b of every sixteen.
#pragma once

#include "convert.cuh"
#include "pipeline.cuh"

namespace fi_prefetch {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kTwoPi = 6.283185307179586f;

/// Turns a pair of numbers by `phase`, counted in 2^-32 of a full turn. Whole turns are gone by themselves, so that a
/// far position's angle is as exact as a near one's.
FI_PREFETCH_DEVICE void rotate(float& x, float& y, uint32_t phase) {
  // The phase's upper bits as the mantissa of a number around 1.5: cheaper than a conversion, which shares a unit with
  // sine and cosine.
  const float turns = __int_as_float(0x3fc00000 + (static_cast<int32_t>(phase) >> 9)) - 1.5f;
  const float sine = ptx::sin_fast(turns * kTwoPi), cosine = ptx::cos_fast(turns * kTwoPi);
  const float rotated = x * cosine - y * sine;
  y = y * cosine + x * sine;
  x = rotated;
}

/// ALiBi's slope of a head: a geometric series, odd powers of the half step beyond a power of two.
FI_PREFETCH_DEVICE float alibi_slope(uint32_t head, uint32_t heads) {
  const uint32_t power = 1u << (31 - __clz(heads));
  const float exponent = head < power ? 8.0f * (head + 1) : 4.0f * (2 * (head - power) + 1);
  return ptx::exp2_fast(-exponent / power);
}

/// Query row n of a kv head is query token n / group_size, query head n % group_size of the group.
struct QueryRow {
  uint32_t token;
  uint32_t head;
  bool valid;

  FI_PREFETCH_DEVICE QueryRow(const DecodeParams& p, uint32_t n)
      : token(n * p.group_inverse >> 16),
        head(n - token * p.group_size),
        valid(token < static_cast<uint32_t>(p.q_len)) {}
};

/// Row of `o` and `lse` for a query row.
FI_PREFETCH_DEVICE int64_t output_row(const DecodeParams& p, uint32_t request, uint32_t kv_head, QueryRow row) {
  return (static_cast<int64_t>(request) * p.q_len + row.token) * p.num_qo_heads + kv_head * p.group_size + row.head;
}

/// What remains to be done to a row whose sums are complete.
struct RowResult {
  float scale;  // multiplies the row's output sums
  float lse;    // base 2, the sink's weight included (as FlashInfer's); -inf where there was nothing to attend to

  /// `sum` is the sum of the weights exp2(scale_log2 * score - max); max is -inf where there was no token.
  FI_PREFETCH_DEVICE RowResult(const DecodeParams& p, uint32_t kv_head, QueryRow row, float max, float sum) {
    float weight = 1.0f;  // of the row's sums, once a sink is the greatest logit
    if (p.sinks != nullptr && row.valid) {
      // A sink is a logit without a value: it takes weight and gives nothing.
      const float sink = p.sinks[kv_head * p.group_size + row.head] * kLog2e;
      const float greatest = fmaxf(max, sink);
      if (greatest != -INFINITY) {
        weight = ptx::exp2_fast(max - greatest);
        sum = sum * weight + ptx::exp2_fast(sink - greatest);
        max = greatest;
      }
    }
    scale = sum == 0.0f ? 0.0f : p.v_scale * weight / sum;
    lse = max + ptx::log2_fast(sum);
  }
};

template <typename T>
class WarpAttention {
 public:
  FI_PREFETCH_DEVICE explicit WarpAttention(const DecodeParams& p) : p_(p) {
    const uint32_t lane = lane_index();
    // Lane l gives ldmatrix the row of token l % 16, chunk l / 16 of a pair. Exclusive-oring the pair's index into the
    // chunk bits then moves along the row (TileLayout::offset with an even chunk added).
    matrix_offset_ = TileLayout<T>::offset(lane % kTileTokens, lane / kTileTokens);
    if constexpr (T::kRope) set_turns();
  }

  /// Starts the loads of the query rows of a request and head, as wide as they go: eight warps that load 4 bytes a lane
  /// keep an SM's load unit busy for 1,000 cycles (H100). Through L1, and so only after the dependency wait: where
  /// every warp of every SM asks L2 for the same few lines they are served in turn.
  FI_PREFETCH_DEVICE void load_query(uint32_t request, uint32_t head) {
    const uint32_t j = lane_index() % 4;
#pragma unroll
    for (int n = 0; n < T::kRowTiles; ++n) {
      const QueryRow row(p_, n * 8 + lane_index() / 4);
      const uint32_t token = row.valid ? row.token : 0, head_in_group = row.valid ? row.head : 0;
      const typename T::Q* q = static_cast<const typename T::Q*>(p_.q) +
                               (static_cast<int64_t>(request) * p_.q_len + token) * p_.q_stride_n +
                               (head * p_.group_size + head_in_group) * p_.q_stride_h;
      // Where K's ldmatrix leaves the 16 dimensions of a product: for fp8 four neighbours in a lane, else the j-th two
      // of every eight; then four lanes each load every fourth eight and start() deals them out.
#pragma unroll
      for (int i = 0; i < kProducts / 2; ++i) {
        if constexpr (T::kFp8) {
          const uint2* fours = reinterpret_cast<const uint2*>(q) + i * 8 + j;
          const uint2 a = __ldca(fours), b = __ldca(fours + 4);
          loaded_query_[n][i] = make_uint4(a.x, a.y, b.x, b.y);
        } else {
          loaded_query_[n][i] = __ldca(reinterpret_cast<const uint4*>(q) + i * 4 + j);
        }
      }
    }
    if constexpr (T::kAlibi) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const QueryRow row(p_, c / 2 * 8 + 2 * j + c % 2);
        slope_log2_[c] = kLog2e * alibi_slope(head * p_.group_size + row.head, p_.num_qo_heads);
      }
    }
  }

  /// Starts the request and head whose query rows were loaded: forgets the last one's sums.
  FI_PREFETCH_DEVICE void start() {
    // Registers other than the loads', so that the products of the loop wait for no load: in those that the loads
    // write, every tile's first product waited for the page number on its way too (one scoreboard: half of a call's
    // stalls, H100).
#pragma unroll
    for (int n = 0; n < T::kRowTiles; ++n) {
      const uint32_t mask = QueryRow(p_, n * 8 + lane_index() / 4).valid ? 0xffffffffu : 0;
#pragma unroll
      for (int i = 0; i < kProducts / 2; ++i) {
        uint32_t x[4] = {loaded_query_[n][i].x, loaded_query_[n][i].y, loaded_query_[n][i].z, loaded_query_[n][i].w};
        if constexpr (!T::kFp8) transpose_in_four_lanes(x);
#pragma unroll
        for (int k = 0; k < 4; ++k) query_[n][2 * i + k / 2][k % 2] = x[k] & mask;
      }
    }
    if constexpr (T::kRope) {
      rotate_query();
    } else if constexpr (T::kScaledQuery) {
      scale_query_to_half();
    }
    forget();
  }

  /// Back to no tokens at all.
  FI_PREFETCH_DEVICE void forget() {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      max_[c] = -INFINITY;
      sum_[c] = 0.0f;
    }
#pragma unroll
    for (int d = 0; d < kProducts; ++d) clear(output_[d]);
  }

  /// Takes in N neighbouring tiles, the first of which begins at `token`; tiles[t] is where the t-th's rows of K lie in
  /// shared memory, before its rows of V.
  template <int N>
  FI_PREFETCH_DEVICE void add_tiles(const uint32_t (&tiles)[N], int32_t token, int32_t length) {
    float scores[N][T::kRowTiles][4];
    uint32_t probabilities[N][T::kRowTiles][2];
    if constexpr (T::kRope) {
#pragma unroll
      for (int t = 0; t < N; ++t) {
        multiply_rotated_k(tiles[t], token + t * kTileTokens - (length - p_.q_len), scores[t]);
      }
    } else {
      multiply_k(tiles, scores);
    }
    scale_and_mask(scores, token, length);
    update_softmax(scores, probabilities);
#pragma unroll
    for (int t = 0; t < N; ++t) multiply_v(tiles[t] + T::kTileBytes, probabilities[t]);
  }

  /// Writes the result of a request and head that this warp had to itself.
  FI_PREFETCH_DEVICE void write_output(uint32_t request, uint32_t head) {
    using O = typename T::O;
    const uint32_t p_row = lane_index() / 4, j = lane_index() % 4;
#pragma unroll
    for (int n = 0; n < T::kRowTiles; ++n) {
      float scale[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const QueryRow row(p_, n * 8 + 2 * j + e);
        const RowResult result(p_, head, row, max_[n * 2 + e], sum_[n * 2 + e]);
        scale[e] = result.scale;
        if (p_.lse != nullptr && row.valid && p_row == 0) p_.lse[output_row(p_, request, head, row)] = result.lse;
      }
      // A fragment has dimensions as rows; transposed, a lane has neighbouring dimensions of query row p.
      const QueryRow row(p_, n * 8 + p_row);
      O* o = static_cast<O*>(p_.o) + output_row(p_, request, head, row) * T::kHeadDim + (T::kFp8 ? 4 : 2) * j;
#pragma unroll
      for (int d = 0; d < kProducts; ++d) {
        const float (&x)[4] = output_[d][n];
        const uint32_t a = ptx::transpose_matrix(pack<O>(x[0] * scale[0], x[1] * scale[1]));
        const uint32_t b = ptx::transpose_matrix(pack<O>(x[2] * scale[0], x[3] * scale[1]));
        if (!row.valid) continue;
        if constexpr (T::kFp8) {  // a: dimensions 4j, 4j + 2; b: 4j + 1, 4j + 3
          uint2* destination = reinterpret_cast<uint2*>(o + d * 16);
          *destination = make_uint2(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632));
        } else {  // a: dimensions 2j, 2j + 1; b: those 8 on
          *reinterpret_cast<uint32_t*>(o + d * 16) = a;
          *reinterpret_cast<uint32_t*>(o + d * 16 + 8) = b;
        }
      }
    }
  }

  /// Writes the sums as a partial: row n at partial + n * kPartialStride.
  FI_PREFETCH_DEVICE void write_partial(float* partial) const {
    const uint32_t p_row = lane_index() / 4, j = lane_index() % 4;
#pragma unroll
    for (int n = 0; n < T::kRowTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t row_index = n * 8 + 2 * j + e;
        if (row_index >= static_cast<uint32_t>(p_.group_size * p_.q_len)) continue;
        float* row = partial + row_index * T::kPartialStride;
        float* dimensions = row + (T::kFp8 ? 2 : 1) * p_row;
#pragma unroll
        for (int d = 0; d < kProducts; ++d) {
          dimensions[d * 16] = output_[d][n][e];
          dimensions[d * 16 + (T::kFp8 ? 1 : 8)] = output_[d][n][2 + e];
        }
        if (p_row == 0) {
          row[T::kHeadDim] = max_[n * 2 + e];
          row[T::kHeadDim + 1] = sum_[n * 2 + e];
        }
      }
    }
  }

  /// Adds what write_partial() left of other tokens of the same request and head.
  FI_PREFETCH_DEVICE void add_partial(const float* partial) {
    const uint32_t p_row = lane_index() / 4, j = lane_index() % 4;
    const uint32_t last_row = p_.group_size * p_.q_len - 1;
#pragma unroll
    for (int n = 0; n < T::kRowTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        // A row beyond the last takes in the last one's, so that no load hangs on a condition; it is never written.
        const float* row = partial + min(n * 8 + 2 * j + e, last_row) * T::kPartialStride;
        const float* dimensions = row + (T::kFp8 ? 2 : 1) * p_row;
        const Weights weights = take_in(2 * n + e, row[T::kHeadDim], row[T::kHeadDim + 1]);
#pragma unroll
        for (int d = 0; d < kProducts; ++d) {
          float &a = output_[d][n][e], &b = output_[d][n][2 + e];
          a = a * weights.own + dimensions[d * 16] * weights.other;
          b = b * weights.own + dimensions[d * 16 + (T::kFp8 ? 1 : 8)] * weights.other;
        }
      }
    }
  }

  /// What save() writes: the fragments as they are, 32 lanes side by side.
  static constexpr uint32_t kSavedVectors = 32 * T::kRowTiles * (T::kHeadDim / 16 + 1);
  static constexpr uint32_t kSavedBytes = kSavedVectors * sizeof(float4);

  /// Writes finished sums for add_saved() of any warp.
  FI_PREFETCH_DEVICE void save(float4* to) const {
    to += lane_index();
#pragma unroll
    for (int n = 0; n < T::kRowTiles; ++n) {
      __stcg(to + 32 * n, make_float4(max_[2 * n], max_[2 * n + 1], sum_[2 * n], sum_[2 * n + 1]));
#pragma unroll
      for (int d = 0; d < kProducts; ++d) {
        const float (&x)[4] = output_[d][n];
        __stcg(to + 32 * (T::kRowTiles * (d + 1) + n), make_float4(x[0], x[1], x[2], x[3]));
      }
    }
  }

  /// Adds sums of other tokens of the same request and head.
  FI_PREFETCH_DEVICE void add_saved(const float4* from) {
    const auto load = [&](int i) {
      return ptx::load_past_l1<float4>(reinterpret_cast<const float*>(from + lane_index() + 32 * i));
    };
#pragma unroll
    for (int n = 0; n < T::kRowTiles; ++n) {
      float4 x[kProducts];
      const float4 head = load(n);
#pragma unroll
      for (int d = 0; d < kProducts; ++d) x[d] = load(T::kRowTiles * (d + 1) + n);
      const Weights even = take_in(2 * n, head.x, head.z), odd = take_in(2 * n + 1, head.y, head.w);
#pragma unroll
      for (int d = 0; d < kProducts; ++d) {
        float (&o)[4] = output_[d][n];
        o[0] = o[0] * even.own + x[d].x * even.other, o[1] = o[1] * odd.own + x[d].y * odd.other;
        o[2] = o[2] * even.own + x[d].z * even.other, o[3] = o[3] * odd.own + x[d].w * odd.other;
      }
    }
  }

 private:
  static constexpr int kProducts = T::kHeadDim / 16;  // 16 dimensions each: steps of Q K^T, row blocks of O^T
  static constexpr int kColumns = 2 * T::kRowTiles;   // query rows that a lane has in its fragments

  /// By which the output sums of a column, and of other tokens that are taken in, are multiplied.
  struct Weights {
    float own;
    float other;
  };

  /// Takes in the greatest score and the sum of weights that other tokens have in column c.
  FI_PREFETCH_DEVICE Weights take_in(int c, float max, float sum) {
    const float greatest = fmaxf(max_[c], max);
    const float reference = greatest == -INFINITY ? 0.0f : greatest;
    const Weights weights = {ptx::exp2_fast(max_[c] - reference), ptx::exp2_fast(max - reference)};
    sum_[c] = sum_[c] * weights.own + sum * weights.other;
    max_[c] = greatest;
    return weights;
  }

  FI_PREFETCH_DEVICE static void clear(float (&sums)[T::kRowTiles][4]) {
#pragma unroll
    for (int n = 0; n < T::kRowTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
  }

  /// Word k of lane 4i + j becomes word j of lane 4i + k.
  FI_PREFETCH_DEVICE static void transpose_in_four_lanes(uint32_t (&x)[4]) {
#pragma unroll
    for (uint32_t distance = 1; distance < 4; distance *= 2) {
      const bool upper = lane_index() & distance;
#pragma unroll
      for (uint32_t k = 0; k < 4; ++k) {
        if (k & distance) continue;
        const uint32_t other = __shfl_xor_sync(kFullWarp, upper ? x[k] : x[k + distance], distance);
        (upper ? x[k] : x[k + distance]) = other;
      }
    }
  }

  /// How far a token turns each of the lane's pairs of dimensions. The host's numbers are doubles: a million tokens on,
  /// an error in the last place of a float would be several per cent of a turn.
  FI_PREFETCH_DEVICE void set_turns() {
    constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: a sum with it has its integer part in the low bits
    const uint32_t j = lane_index() % 4;
    const double r1 = p_.rope_ratio, r2 = r1 * r1, r4 = r2 * r2, r8 = r4 * r4;
    const double to_lane = T::kFp8 ? r4 : r2, to_second = T::kFp8 ? r2 : r8;
    double turns = p_.rope_turns * (j % 2 == 1 ? to_lane : 1.0) * (j / 2 == 1 ? to_lane * to_lane : 1.0);
#pragma unroll
    for (int k = 0; k < kProducts / 2; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const double first = i == 0 ? turns : turns * to_second;
        turns_[k][i][0] = __double2loint(first * 4294967296.0 + kMagic);
        turns_[k][i][1] = __double2loint(first * r1 * 4294967296.0 + kMagic);
      }
      turns *= r8 * r8;
    }
  }

  /// Scores of a query row that was multiplied with a power of two are scaled back: by 2^(exponent - 127).
  FI_PREFETCH_DEVICE void set_score_scale(int n, uint32_t exponent) {
    const float inverse = __uint_as_float(exponent << 23) * (T::kSoftCap ? p_.inverse_cap : p_.scale_log2);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      score_scale_[n * 2 + e] = __shfl_sync(kFullWarp, inverse, (lane_index() % 4 * 2 + e) * 4);
    }
  }

  /// Queries turned by their positions, as halves scaled as in scale_query_to_half(); they round as tf32 numbers would.
  /// Only distances count, so positions are taken from the request's first query token on: that one stays what it is.
  FI_PREFETCH_DEVICE void rotate_query() {
    using Q = typename T::Q;
    constexpr uint32_t kTop = 13;  // a turn may make a number sqrt(2) times greater
#pragma unroll
    for (int n = 0; n < T::kRowTiles; ++n) {
      float greatest = 0.0f;
#pragma unroll
      for (int k = 0; k < kProducts; ++k)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 x = unpack<Q>(query_[n][k][i]);
          greatest = fmaxf(greatest, fmaxf(fabsf(x.x), fabsf(x.y)));
        }
      greatest = fmaxf(greatest, __shfl_xor_sync(kFullWarp, greatest, 1));
      greatest = fmaxf(greatest, __shfl_xor_sync(kFullWarp, greatest, 2));
      const uint32_t exponent = max(__float_as_uint(greatest) >> 23, kTop + 1);  // biased by 127
      const float factor = __uint_as_float((254 + kTop - exponent) << 23);
      const uint32_t position = QueryRow(p_, n * 8 + lane_index() / 4).token;
#pragma unroll
      for (int k = 0; k < kProducts / 2; ++k)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t &low = query_[n][k][i], &high = query_[n][k + kProducts / 2][i];
          float2 x = unpack<Q>(low), y = unpack<Q>(high);
          rotate(x.x, y.x, position * turns_[k][i][0]);
          rotate(x.y, y.y, position * turns_[k][i][1]);
          low = pack<__half>(x.x * factor, x.y * factor);
          high = pack<__half>(y.x * factor, y.y * factor);
        }
      set_score_scale(n, exponent - kTop);
    }
  }

  /// Queries in bf16 as halves, without loss: each row times the power of two that takes its greatest element to
  /// [2^14, 2^15). What is 2^-28 times smaller loses bits, 2^-39 of the greatest at most. Scores are scaled back by
  /// score_scale_.
  FI_PREFETCH_DEVICE void scale_query_to_half() {
    constexpr uint32_t kTop = 14;
#pragma unroll
    for (int n = 0; n < T::kRowTiles; ++n) {
      uint32_t greatest = 0;  // magnitude's bits; the four lanes of a row have its elements
#pragma unroll
      for (int k = 0; k < kProducts; ++k)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          greatest = max(greatest, max(query_[n][k][i] & 0x7fff, query_[n][k][i] >> 16 & 0x7fff));
        }
      greatest = max(greatest, __shfl_xor_sync(kFullWarp, greatest, 1));
      greatest = max(greatest, __shfl_xor_sync(kFullWarp, greatest, 2));
      const uint32_t exponent = max(greatest >> 7, kTop + 1);  // biased by 127
      const float factor = __uint_as_float((254 + kTop - exponent) << 23);
#pragma unroll
      for (int k = 0; k < kProducts; ++k)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t pair = query_[n][k][i];
          query_[n][k][i] =
              pack<__half>(__uint_as_float(pair << 16) * factor, __uint_as_float(pair & 0xffff0000) * factor);
        }
      set_score_scale(n, exponent - kTop);
    }
  }

  /// What a raw score of column c is multiplied with: to base-2 exponent units, or to the soft cap's argument.
  FI_PREFETCH_DEVICE float score_scale(int c) const {
    if constexpr (T::kScaledQuery) return score_scale_[c];
    return T::kSoftCap ? p_.inverse_cap : p_.scale_log2;
  }

  template <int N>
  FI_PREFETCH_DEVICE void multiply_k(const uint32_t (&tiles)[N], float (&scores)[N][T::kRowTiles][4]) const {
    // Two sums of a tile side by side: a product waits for the one before it with the same sums.
    float sums[N][2][T::kRowTiles][4];
#pragma unroll
    for (int t = 0; t < N; ++t) clear(sums[t][0]), clear(sums[t][1]);
#pragma unroll
    for (int pair = 0; pair < T::kRowChunks / 2; ++pair) {
#pragma unroll
      for (int t = 0; t < N; ++t) {
        uint32_t r[4];  // tokens 0-7 and 8-15 of the pair's first chunk, then of its second
        ptx::load_matrix_x4(r, TileLayout<T>::pair_address(tiles[t] + matrix_offset_, pair));
        if constexpr (T::kFp8) {
#pragma unroll
          for (int chunk = 0; chunk < 2; ++chunk) {
            const uint32_t x = r[2 * chunk], y = r[2 * chunk + 1];
            uint32_t a[4];
            widen<typename T::Kv>(x, a[0], a[2]);
            widen<typename T::Kv>(y, a[1], a[3]);
#pragma unroll
            for (int n = 0; n < T::kRowTiles; ++n) {
              const uint32_t (&q)[2] = query_[n][2 * pair + chunk];
              ptx::multiply_add<typename T::QK>(sums[t][chunk][n], a, q[0], q[1]);
            }
          }
        } else {
#pragma unroll
          for (int n = 0; n < T::kRowTiles; ++n) {
            ptx::multiply_add<typename T::QK>(sums[t][pair % 2][n], r, query_[n][pair][0], query_[n][pair][1]);
          }
        }
      }
    }
#pragma unroll
    for (int t = 0; t < N; ++t)
#pragma unroll
      for (int n = 0; n < T::kRowTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[t][n][i] = sums[t][0][n][i] + sums[t][1][n][i];
  }

  /// The same with the keys turned by their positions, of which the tile's first token has `position`: negative, as
  /// rotate_query() counts them, but for the newest tokens. A pair of dimensions is in two products' fragments, at the
  /// same place of a lane. Rounded to bf16 again the keys would lose what FlashInfer's CUDA-core kernel keeps, so they
  /// go on as tf32 numbers: eight times as fine as bf16, as wide as float. A fragment of theirs has half as many
  /// columns and may have them in any order, so two neighbours in a lane are columns j and j + 4.
  FI_PREFETCH_DEVICE void multiply_rotated_k(uint32_t k_tile, int32_t position,
                                             float (&scores)[T::kRowTiles][4]) const {
    constexpr int kParts = T::kFp8 ? 2 : 1;  // products' worth of dimensions in a pair of chunks
    float low_sum[T::kRowTiles][4], high_sum[T::kRowTiles][4];
    clear(low_sum), clear(high_sum);
    const uint32_t row_address = k_tile + matrix_offset_;
    const uint32_t own_position = position + lane_index() / 4;
#pragma unroll
    for (int pair = 0; pair < T::kRowChunks / 4; ++pair) {
      uint32_t low[4], high[4];
      ptx::load_matrix_x4(low, TileLayout<T>::pair_address(row_address, pair));
      ptx::load_matrix_x4(high, TileLayout<T>::pair_address(row_address, pair + T::kRowChunks / 4));
#pragma unroll
      for (int half = 0; half < 2 * kParts; ++half) {
        const int k = pair * kParts + half / 2, i = half % 2;
        uint32_t a[4], b[4];
#pragma unroll
        for (int t = 0; t < 2; ++t) {  // tokens p and p + 8
          float2 x = unpack_k(low, half, t), y = unpack_k(high, half, t);
          rotate(x.x, y.x, (own_position + 8 * t) * turns_[k][i][0]);
          rotate(x.y, y.y, (own_position + 8 * t) * turns_[k][i][1]);
          a[t] = ptx::round_to_tf32(x.x), a[2 + t] = ptx::round_to_tf32(x.y);
          b[t] = ptx::round_to_tf32(y.x), b[2 + t] = ptx::round_to_tf32(y.y);
        }
#pragma unroll
        for (int n = 0; n < T::kRowTiles; ++n) {
          const float2 x = unpack<__half>(query_[n][k][i]), y = unpack<__half>(query_[n][k + kProducts / 2][i]);
          ptx::multiply_add_tf32(low_sum[n], a, __float_as_uint(x.x), __float_as_uint(x.y));
          ptx::multiply_add_tf32(high_sum[n], b, __float_as_uint(y.x), __float_as_uint(y.y));
        }
      }
    }
#pragma unroll
    for (int n = 0; n < T::kRowTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = low_sum[n][i] + high_sum[n][i];
  }

  /// Two neighbouring dimensions of K from a pair of chunks, of token p + 8 t: the lane's `half`-th two of that token.
  FI_PREFETCH_DEVICE static float2 unpack_k(const uint32_t (&r)[4], int half, int t) {
    if constexpr (T::kFp8) {
      return unpack<__half>(widen<typename T::Kv>(static_cast<uint16_t>(r[half / 2 * 2 + t] >> 16 * (half % 2))));
    } else {
      return unpack<typename T::Kv>(r[2 * half + t]);
    }
  }

  /// Scores in base-2 exponent units; -inf where a query row must not look.
  template <int N>
  FI_PREFETCH_DEVICE void scale_and_mask(float (&scores)[N][T::kRowTiles][4], int32_t token, int32_t length) const {
    const int32_t first = token + lane_index() / 4;
#pragma unroll
    for (int t = 0; t < N; ++t)
#pragma unroll
      for (int n = 0; n < T::kRowTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = scores[t][n][i];
          score *= score_scale(n * 2 + i % 2);
          if (T::kSoftCap) score = p_.scale_log2 * tanhf(score);
          if constexpr (T::kAlibi) {
            // FlashInfer's distance: from the query's number in its request, not from its position. LSE shows it.
            const int32_t distance =
                first + t * kTileTokens + i / 2 * 8 - QueryRow(p_, n * 8 + lane_index() % 4 * 2 + i % 2).token;
            score += slope_log2_[n * 2 + i % 2] * distance;
          }
        }
    // Inside a request every row sees every token.
    const bool at_end = token + N * kTileTokens > length - (p_.q_len - 1);
    const bool at_window = T::kWindow && token < length - 1 - p_.window_left;
    if (!at_end && !at_window) return;
#pragma unroll
    for (int n = 0; n < T::kRowTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const QueryRow row(p_, n * 8 + lane_index() % 4 * 2 + e);
        const int32_t position = length - p_.q_len + static_cast<int32_t>(row.token);  // the query's own
#pragma unroll
        for (int t = 0; t < N; ++t)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int32_t at = first + t * kTileTokens + half * 8;
            const bool visible = row.valid && at <= position && (!T::kWindow || at >= position - p_.window_left);
            if (!visible) scores[t][n][2 * half + e] = -INFINITY;
          }
      }
  }

  /// Weights are relative to exp2(max_), the greatest score so far, so that the greatest weight is 1 and loses nothing
  /// when it is rounded (a maximum that lags behind costs 10 % of the error). Only a new one takes a reduction over
  /// lanes and a correction of the sums: few tiles after the first have one.
  template <int N>
  FI_PREFETCH_DEVICE void update_softmax(float (&scores)[N][T::kRowTiles][4],
                                         uint32_t (&probabilities)[N][T::kRowTiles][2]) {
    bool exceeds = false;
#pragma unroll
    for (int t = 0; t < N; ++t)
#pragma unroll
      for (int n = 0; n < T::kRowTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) exceeds |= scores[t][n][i] > max_[n * 2 + i % 2];
    if (__any_sync(kFullWarp, exceeds)) raise_max(scores);
#pragma unroll
    for (int t = 0; t < N; ++t)
#pragma unroll
      for (int n = 0; n < T::kRowTiles; ++n) {
        float (&x)[4] = scores[t][n];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = n * 2 + e;
          // Until a row has seen a token its maximum is -inf, and -inf - -inf must not become NaN.
          const float reference = max_[c] == -INFINITY ? 0.0f : max_[c];
          x[e] = ptx::exp2_fast(x[e] - reference);
          x[2 + e] = ptx::exp2_fast(x[2 + e] - reference);
        }
        // S^T has tokens as rows, the second product wants them as columns: transpose each eight of them.
        const uint32_t a = ptx::transpose_matrix(pack<typename T::PV>(x[0], x[1]));
        const uint32_t b = ptx::transpose_matrix(pack<typename T::PV>(x[2], x[3]));
        // The sum is of the weights as they multiply V, rounded, so that where many tokens are alike their rounding
        // cancels. By a product with rows of ones, of which one is wanted; it leaves every lane the whole sum.
        constexpr uint32_t kOnes = std::is_same<typename T::PV, __half>::value ? 0x3c003c00 : 0x3f803f80;
        float sums[4] = {sum_[2 * n], sum_[2 * n + 1], 0.0f, 0.0f};
        ptx::multiply_add<typename T::PV>(sums, {kOnes, 0, kOnes, 0}, a, b);
        sum_[2 * n] = sums[0], sum_[2 * n + 1] = sums[1];
        probabilities[t][n][0] = a, probabilities[t][n][1] = b;
      }
  }

  /// Takes the maxima up to the greatest scores so far, and the sums with them.
  template <int N>
  FI_PREFETCH_DEVICE void raise_max(const float (&scores)[N][T::kRowTiles][4]) {
    float correction[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      float greatest = -INFINITY;
#pragma unroll
      for (int t = 0; t < N; ++t) {
        greatest = fmaxf(greatest, fmaxf(scores[t][c / 2][c % 2], scores[t][c / 2][2 + c % 2]));
      }
      const float new_max = fmaxf(max_[c], max_over_tokens(greatest));
      correction[c] = ptx::exp2_fast(max_[c] - (new_max == -INFINITY ? 0.0f : new_max));
      sum_[c] *= correction[c];
      max_[c] = new_max;
    }
#pragma unroll
    for (int d = 0; d < kProducts; ++d)
#pragma unroll
      for (int n = 0; n < T::kRowTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) output_[d][n][i] *= correction[n * 2 + i % 2];
  }

  FI_PREFETCH_DEVICE void multiply_v(uint32_t v_tile, const uint32_t (&probabilities)[T::kRowTiles][2]) {
    const uint32_t row_address = v_tile + matrix_offset_;
#pragma unroll
    for (int pair = 0; pair < T::kRowChunks / 2; ++pair) {
      uint32_t r[4];
      ptx::load_matrix_x4_transposed(r, TileLayout<T>::pair_address(row_address, pair));
      if constexpr (T::kFp8) {
#pragma unroll
        for (int chunk = 0; chunk < 2; ++chunk) {
          // A register has dimensions 2p, 2p + 1 of token 2j, then of 2j + 1; the product wants the tokens together.
          const uint32_t x = __byte_perm(r[2 * chunk], 0, 0x3120), y = __byte_perm(r[2 * chunk + 1], 0, 0x3120);
          uint32_t a[4];
          widen<typename T::Kv>(x, a[0], a[1]);
          widen<typename T::Kv>(y, a[2], a[3]);
          multiply_v_block(2 * pair + chunk, a, probabilities);
        }
      } else {
        const uint32_t a[4] = {r[0], r[2], r[1], r[3]};
        multiply_v_block(pair, a, probabilities);
      }
    }
  }

  FI_PREFETCH_DEVICE void multiply_v_block(int d, const uint32_t (&a)[4],
                                           const uint32_t (&probabilities)[T::kRowTiles][2]) {
#pragma unroll
    for (int n = 0; n < T::kRowTiles; ++n) {
      ptx::multiply_add<typename T::PV>(output_[d][n], a, probabilities[n][0], probabilities[n][1]);
    }
  }

  /// Over the eight lanes that share query rows: lane bits 2 to 4.
  FI_PREFETCH_DEVICE static float max_over_tokens(float x) {
#pragma unroll
    for (int bit = 4; bit < 32; bit *= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, bit));
    return x;
  }

  const DecodeParams& p_;
  uint32_t matrix_offset_;
  uint4 loaded_query_[T::kRowTiles][kProducts / 2];
  uint32_t query_[T::kRowTiles][kProducts][2];
  float score_scale_[T::kScaledQuery ? kColumns : 1];
  uint32_t turns_[T::kRope ? kProducts / 2 : 1][2][2];  // a token's, in 2^-32: of the lane's dimensions as in query_
  float slope_log2_[T::kAlibi ? kColumns : 1];          // ALiBi's, in base-2 exponent units
  float max_[kColumns];                                 // greatest score so far, in base-2 exponent units
  float sum_[kColumns];                                 // of the weights
  float output_[kProducts][T::kRowTiles][4];
};

}  // namespace fi_prefetch
