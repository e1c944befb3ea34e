// The window lever: a kernel of its own that brings the head of every warp's piece of a coming decode call into L2,
// while the step does something that leaves HBM idle. Nobody waits for it, and it gives way when the call begins: from
// then on the call reads for itself, and every line asked for here as well would be read twice.
#pragma once

#include "prefetch.cuh"

namespace fi_prefetch {

struct PrefetchKvParams {
  uint32_t blocks;          // of the decode call whose pieces these are
  uint32_t warps;           // a block of it
  uint32_t tiles_per_warp;  // what the L2 budget leaves each of its warps
  int32_t evict_last;       // 1: ask that the lines stay until they are read
};

/// Any number of blocks of whole warps; dynamic shared memory: ScanOf<T>::shared_bytes. With as many blocks as the
/// decode call's, of as many warps, a block asks for what the block of the same number will read, on the same SM where
/// the GPU is free: lines that another SM asked for are read at 4.1 TB/s, those that the same did at 6.8 (H100).
template <typename T>
__global__ void __launch_bounds__(256, 1)
    prefetch_kv_kernel(const __grid_constant__ DecodeParams p, const __grid_constant__ PrefetchKvParams window) {
  ptx::wait_for_dependencies();
  ptx::launch_dependents();
  ScanOf<T> scan(p, ptx::dynamic_shared_memory());
  const Partition partition = cut(p, scan, window.blocks, window.warps, T::kStageBytes);
  const auto give_way = [&] { return p.running != nullptr && ptx::load_relaxed(p.running) > 0; };
  const uint32_t stride = gridDim.x * warps_per_block();
  for (uint32_t warp = blockIdx.x * warps_per_block() + warp_index(); warp < partition.warps(); warp += stride) {
    const Piece<T::kWindow> piece(p, partition, scan, warp);
    const uint32_t count = min(piece.count, window.tiles_per_warp);
    if (count > 0) prefetch_head_of_piece<T>(p, piece.first, count, window.evict_last, give_way);
  }
}

}  // namespace fi_prefetch
