// The kernel of "Accelerating LLM Inference Throughput via Asynchronous KV Cache Prefetching" (Dong et al.), made from
// its description: paged attention as XFormers and vLLM have it, which loads KV into registers, with and without the
// paper's prefetch of the next KV block into L2. Measurements compare against it; nothing else runs it.
//
//   One thread block has one query head of one sequence. Its four warps take the sequence's KV blocks in turn.
//
//   scores     warp w, KV blocks w, w + 4, w + 8, ..: loads the K block, asks for its next K block to be brought into
//              L2, multiplies by q while that is on its way, and leaves the logits in shared memory   (the paper's
//              Figure 2 is one iteration of this)
//   softmax    all threads over all logits
//   values     warp w, the same KV blocks: the same with V; the four warps' sums are added in the end
//
// A KV block is 16 tokens of one kv head and lies in one piece: K as [HEAD_DIM / 8][16 tokens][8], V as
// [HEAD_DIM][16 tokens]. So a warp loads either as a plain array, 16 bytes a lane and load, all loads at once.
#pragma once

#include "convert.cuh"

namespace fi_prefetch::paper {

constexpr int kBlockTokens = 16;
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr uint32_t kFullWarp = 0xFFFFFFFF;

/// How a warp asks for its next KV block: not at all; all of it in one instruction (sm_90 and later); or in lines of
/// 128 bytes, one a lane.
enum class Prefetch { kNone, kBulk, kLines };

struct Params {
  const void* q;                // [num_seqs, num_heads, HEAD_DIM]
  const void* k;                // [cache blocks, num_kv_heads, HEAD_DIM / 8, 16, 8]
  const void* v;                // [cache blocks, num_kv_heads, HEAD_DIM, 16]
  const int32_t* block_table;   // [num_seqs, max_blocks]: which cache block each KV block is; not checked
  const int32_t* context_lens;  // [num_seqs]: tokens
  void* o;                      // [num_seqs, num_heads, HEAD_DIM]
  int32_t max_blocks;
  int32_t max_context_len;  // what shared memory holds the logits of; longer sequences are cut off
  int32_t num_kv_heads;
  int32_t group_size;  // query heads per kv head
  int32_t distance;    // of the prefetch, in iterations of the warp; the paper's is 1
  float scale_log2;    // softmax scale * log2(e)
};

template <typename T_, int HEAD_DIM, Prefetch PREFETCH>
struct Traits {
  using T = T_;  // __nv_bfloat16 or __half, for q, K, V and the output
  static constexpr int kHeadDim = HEAD_DIM;
  static constexpr Prefetch kPrefetch = PREFETCH;
  static constexpr int kBlockBytes = kBlockTokens * HEAD_DIM * sizeof(T);  // of K or of V
  static constexpr int kLoads = kBlockBytes / (32 * sizeof(uint4));        // a lane and KV block
  /// Thread blocks an SM that the registers leave room for: the same with a prefetch and without, or the difference
  /// between the two would be one of residency too. More of them, and not all of a block's loads could be under way.
  static constexpr int kResident = HEAD_DIM == 64 ? 8 : 7;
};

/// The thread block's dynamic shared memory.
template <int HEAD_DIM>
struct SharedMemory {
  float* q;        // [HEAD_DIM], times scale_log2
  float* maxima;   // [kWarps], of the logits
  float* sums;     // [kWarps], of the weights
  float* outputs;  // [kWarps][HEAD_DIM], sums over the warp's KV blocks
  float* logits;   // [tokens, rounded up to whole KV blocks]; in the softmax they become weights

  static constexpr uint32_t kFixedFloats = HEAD_DIM + 2 * kWarps + kWarps * HEAD_DIM;

  static __host__ __device__ uint32_t bytes(uint32_t tokens) {
    return (kFixedFloats + (tokens + kBlockTokens - 1) / kBlockTokens * kBlockTokens) * sizeof(float);
  }
  FI_PREFETCH_DEVICE explicit SharedMemory(uint8_t* base) {
    q = reinterpret_cast<float*>(base);
    maxima = q + HEAD_DIM;
    sums = maxima + kWarps;
    outputs = sums + kWarps;
    logits = outputs + kWarps * HEAD_DIM;
  }
};

// ---- numbers ------------------------------------------------------------------------------------------------------

template <typename T>
FI_PREFETCH_DEVICE float2 to_floats(uint32_t pair);

template <>
FI_PREFETCH_DEVICE float2 to_floats<__nv_bfloat16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000)};
}

template <>
FI_PREFETCH_DEVICE float2 to_floats<__half>(uint32_t pair) {
  __half2 halves;
  memcpy(&halves, &pair, sizeof pair);
  return __half22float2(halves);
}

template <typename T>
FI_PREFETCH_DEVICE void to_floats(const uint4& piece, float (&x)[8]) {
  const uint32_t pairs[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = to_floats<T>(pairs[i]);
    x[2 * i] = two.x;
    x[2 * i + 1] = two.y;
  }
}

/// The first `count` of a piece's eight numbers; the others become 0, whatever they were.
FI_PREFETCH_DEVICE uint4 first_numbers(const uint4& piece, int count) {
  const auto keep = [count](uint32_t pair, int first) {
    return count >= first + 2 ? pair : count == first + 1 ? pair & 0xFFFF : 0;
  };
  return {keep(piece.x, 0), keep(piece.y, 2), keep(piece.z, 4), keep(piece.w, 6)};
}

/// Eight floats from shared memory, two loads.
FI_PREFETCH_DEVICE void read_floats(const float* from, float (&x)[8]) {
  const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

/// Combines one float of each lane over the warp; lane 0 leaves the result at `results[warp]`.
template <typename Combine>
FI_PREFETCH_DEVICE void combine_over_warp(float x, float* results, Combine&& combine) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = combine(x, __shfl_xor_sync(kFullWarp, x, mask));
  if (threadIdx.x % 32 == 0) results[threadIdx.x / 32] = x;
}

// ---- KV blocks ----------------------------------------------------------------------------------------------------

/// Asks for a KV block of one head to be brought into L2. Nobody waits for it.
template <typename Traits>
FI_PREFETCH_DEVICE void prefetch_block(const uint8_t* block) {
  const int lane = threadIdx.x % 32;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if constexpr (Traits::kPrefetch == Prefetch::kBulk) {
    if (lane == 0) ptx::bulk_prefetch_l2(block, Traits::kBlockBytes);
    return;
  }
#endif
  static_assert(Traits::kBlockBytes <= 32 * 128, "a line a lane");
  if (lane < Traits::kBlockBytes / 128) ptx::prefetch_l2(block + 128 * lane);
}

/// The KV blocks of one sequence and kv head, in one of the caches.
template <typename Traits>
struct KvBlocks {
  const uint8_t* cache;  // of this kv head
  int32_t stride;        // bytes from one cache block to the next
  const int32_t* table;  // of this sequence
  int count;
  int ahead;  // KV blocks from the one that is loaded to the one that is prefetched

  FI_PREFETCH_DEVICE KvBlocks(const Params& p, const void* whole_cache, int count) : count(count) {
    const int kv_head = blockIdx.x / p.group_size;
    cache = static_cast<const uint8_t*>(whole_cache) + kv_head * Traits::kBlockBytes;
    stride = p.num_kv_heads * Traits::kBlockBytes;
    table = p.block_table + static_cast<int64_t>(blockIdx.y) * p.max_blocks;
    ahead = p.distance * kWarps;
  }

  FI_PREFETCH_DEVICE const uint8_t* address(int index) const {
    return cache + static_cast<int64_t>(__ldg(table + index)) * stride;
  }

  /// Loads KV block `index`: this lane has its 16-byte pieces lane, lane + 32, lane + 64, ... Then asks for the one
  /// that this warp comes to `distance` iterations later, if the sequence has it.
  FI_PREFETCH_DEVICE void load(int index, uint4 (&pieces)[Traits::kLoads]) const {
    const uint4* memory = reinterpret_cast<const uint4*>(address(index)) + threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < Traits::kLoads; ++i) pieces[i] = __ldg(memory + 32 * i);
    if constexpr (Traits::kPrefetch != Prefetch::kNone) {
      if (index + ahead < count) prefetch_block<Traits>(address(index + ahead));
      __syncwarp();  // or the compiler puts the prefetch behind the arithmetic, which waits for the loads
    }
  }
};

// ---- the kernel ---------------------------------------------------------------------------------------------------

/// Grid: (num_heads, num_seqs); block: kThreads; dynamic shared memory: SharedMemory::bytes(max_context_len) or more.
template <typename Traits>
__global__ void __launch_bounds__(kThreads, Traits::kResident)
    xformers_decode_kernel(const __grid_constant__ Params p) {
  using T = typename Traits::T;
  constexpr int kHeadDim = Traits::kHeadDim;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const SharedMemory<kHeadDim> shared(ptx::dynamic_shared_memory());
  const int tokens = max(min(__ldg(p.context_lens + blockIdx.y), p.max_context_len), 0);
  const int blocks = (tokens + kBlockTokens - 1) / kBlockTokens;
  const int64_t row = (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * kHeadDim;  // of q and of o

  if (thread < kHeadDim / 2) {
    const uint32_t* q = reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.q) + row);
    const float2 two = to_floats<T>(__ldg(q + thread));
    shared.q[2 * thread] = two.x * p.scale_log2;
    shared.q[2 * thread + 1] = two.y * p.scale_log2;
  }
  __syncthreads();

  // Scores. Two lanes to a token: lanes t and t + 16 have token t, the first every even group of eight of its numbers,
  // the second every odd one.
  uint4 pieces[Traits::kLoads];
  float largest = -INFINITY;
  const KvBlocks<Traits> keys(p, p.k, blocks);
#pragma unroll 1
  for (int block = warp; block < blocks; block += kWarps) {
    keys.load(block, pieces);
    float sums[4] = {};  // four, so that an addition need not wait for the one before it
#pragma unroll
    for (int i = 0; i < Traits::kLoads; ++i) {
      float k[8], q[8];
      to_floats<T>(pieces[i], k);
      read_floats(shared.q + (2 * i + lane / 16) * 8, q);
#pragma unroll
      for (int e = 0; e < 8; ++e) sums[e % 4] = fmaf(k[e], q[e], sums[e % 4]);
    }
    float logit = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    logit += __shfl_xor_sync(kFullWarp, logit, 16);
    const int token = block * kBlockTokens + lane % 16;
    if (token >= tokens) logit = -INFINITY;
    if (lane < 16) shared.logits[token] = logit;
    largest = max(largest, logit);
  }

  // Softmax, but for the division by the weights' sum, which the output gets.
  combine_over_warp(largest, shared.maxima, [](float a, float b) { return max(a, b); });
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) largest = max(largest, shared.maxima[w]);
  float sum = 0.0f;
#pragma unroll 1
  for (int token = thread; token < blocks * kBlockTokens; token += kThreads) {
    const float weight = ptx::exp2_fast(shared.logits[token] - largest);
    shared.logits[token] = weight;
    sum += weight;
  }
  combine_over_warp(sum, shared.sums, [](float a, float b) { return a + b; });
  __syncthreads();

  // Values. Two lanes to a row of V: lanes 2r and 2r + 1 have row r, r + 16, r + 32, .., eight tokens each.
  float outputs[Traits::kLoads] = {};
  const KvBlocks<Traits> values(p, p.v, blocks);
#pragma unroll 1
  for (int block = warp; block < blocks; block += kWarps) {
    values.load(block, pieces);
    const int first = block * kBlockTokens + lane % 2 * 8;
    float weights[8];
    read_floats(shared.logits + first, weights);
    if (tokens - first < 8) {  // there may be anything behind the last token, NaN too, which no weight of 0 takes away
#pragma unroll
      for (int i = 0; i < Traits::kLoads; ++i) pieces[i] = first_numbers(pieces[i], tokens - first);
    }
#pragma unroll
    for (int i = 0; i < Traits::kLoads; ++i) {
      float v[8];
      to_floats<T>(pieces[i], v);
#pragma unroll
      for (int e = 0; e < 8; ++e) outputs[i] = fmaf(v[e], weights[e], outputs[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < Traits::kLoads; ++i) {
    outputs[i] += __shfl_xor_sync(kFullWarp, outputs[i], 1);
    if (lane % 2 == 0) shared.outputs[warp * kHeadDim + 16 * i + lane / 2] = outputs[i];
  }
  __syncthreads();
  if (thread < kHeadDim / 2) {
    float2 two = {0.0f, 0.0f};
    float all = 0.0f;  // stays 0 without a token
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      two.x += shared.outputs[w * kHeadDim + 2 * thread];
      two.y += shared.outputs[w * kHeadDim + 2 * thread + 1];
      all += shared.sums[w];
    }
    const float inverse = all > 0.0f ? 1.0f / all : 0.0f;
    reinterpret_cast<uint32_t*>(static_cast<T*>(p.o) + row)[thread] = pack<T>(two.x * inverse, two.y * inverse);
  }
}

}  // namespace fi_prefetch::paper
