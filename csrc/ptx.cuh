// The machine instructions that the kernels use, one thin function each. Everything else in csrc/ is plain CUDA C++,
// so the same kernels also run on a CPU: tests/emulator/ provides another version of this header, and its include
// guard of the same name puts that version in the place of this one.
//
// Sections named in the comments are those of the PTX ISA (release 9.0).
#ifndef FI_PREFETCH_PTX_CUH
#define FI_PREFETCH_PTX_CUH

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fi_prefetch::ptx {

#define FI_PREFETCH_DEVICE __device__ __forceinline__

/// The dynamic shared memory of the block. Aligned so that an address bit below the alignment is an offset bit (the
/// swizzled tiles are walked with exclusive ors).
FI_PREFETCH_DEVICE uint8_t* dynamic_shared_memory() {
  extern __shared__ __align__(1024) uint8_t fi_prefetch_shared_memory[];
  return fi_prefetch_shared_memory;
}

/// The 32-bit address of a pointer into shared memory.
FI_PREFETCH_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// The same number, of which the compiler knows nothing before this point of the program.
FI_PREFETCH_DEVICE int32_t opaque(int32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

/// The same pointer, of which the compiler then knows nothing: it stays one addend of an address instead of being taken
/// apart into what is uniform and what is not.
template <typename T>
FI_PREFETCH_DEVICE const T* opaque(const T* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

/// a * b, by one instruction: mul.wide, section 9.7.1.3. Written as a product of 64-bit numbers it becomes one of those
/// where one of them was made in another basic block: the compiler then adds up upper halves that are zero.
FI_PREFETCH_DEVICE uint64_t wide_product(uint32_t a, uint32_t b) {
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}

/// The low and the high half of a register. The machine reads either in place; a shift would be an instruction.
FI_PREFETCH_DEVICE ushort2 halves(uint32_t x) {
  ushort2 pair;
  asm("mov.b32 {%0, %1}, %2;" : "=h"(pair.x), "=h"(pair.y) : "r"(x));
  return pair;
}

// ---- asynchronous copies: cp.async, section 9.7.9.25.3 ------------------------------------------------------------

/// Copies 16 bytes to shared memory under an L2 eviction policy made by one of the functions below; bypasses L1.
FI_PREFETCH_DEVICE void copy_async_16(uint32_t destination, const void* source, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
               "l"(policy)
               : "memory");
}

/// Closes the group of this thread's copies since the last commit.
FI_PREFETCH_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most `PENDING` of this thread's newest groups are unfinished.
template <int PENDING>
FI_PREFETCH_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- copies of tensors' boxes: cp.async.bulk.tensor (9.7.9.27.1.2) and its prefetch (9.7.9.27.1.3) ------------------
// prefetch.tensormap (9.7.9.15), mbarrier (9.7.13.15). Nothing before sm_90, where no such kernel is launched.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasTensorCopies = false;
#else
constexpr bool kHasTensorCopies = true;
#endif

/// Where a box begins in a tensor of five dimensions, the one that is contiguous in memory first.
struct TensorPlace {
  int32_t at[5];
};

/// Brings a tensor's description near the unit that copies.
FI_PREFETCH_DEVICE void prefetch_tensor_map(const CUtensorMap* map) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

/// Makes a barrier of 8 bytes in shared memory, whose phases end with one arrival and all bytes that were announced.
FI_PREFETCH_DEVICE void barrier_init(uint32_t barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
#endif
}

/// The barriers that this thread made are ones for copies too.
FI_PREFETCH_DEVICE void fence_barrier_init() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

/// What this thread did in shared memory comes before copies of tensors that are started after it.
FI_PREFETCH_DEVICE void fence_tensor_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/// By one lane, of the whole converged warp: arrives at the barrier, and announces `bytes`.
FI_PREFETCH_DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\n"
      "@one mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n}" ::"r"(barrier),
      "r"(bytes)
      : "memory");
#endif
}

/// Whether the barrier's phase of that parity has ended; may wait some time for it. What arrived is visible then.
FI_PREFETCH_DEVICE bool barrier_passed(uint32_t barrier, uint32_t parity) {
  uint32_t passed = 1;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(passed)
               : "r"(barrier), "r"(parity)
               : "memory");
#endif
  return passed;
}

/// By one lane, of the whole converged warp: starts the copy of a box to shared memory under an L2 eviction policy; its
/// bytes arrive at the barrier. What is outside of the tensor comes as zeros.
FI_PREFETCH_DEVICE void copy_tensor(uint32_t destination, const CUtensorMap* map, const TensorPlace& place,
                                    uint32_t barrier, uint64_t policy) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// The block's own shared memory, by either name. With the second ptxas 13.0 takes sm_120's lanes for ones that may have
// gone different ways; the first one CUDA 12.4 does not know yet.
#if __CUDA_ARCH__ >= 1000
#define FI_PREFETCH_OWN_SHARED "shared::cta"
#else
#define FI_PREFETCH_OWN_SHARED "shared::cluster"
#endif
  asm volatile(
      "{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\n"
      "@one cp.async.bulk.tensor.5d." FI_PREFETCH_OWN_SHARED
      ".global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;\n}" ::"r"(destination),
      "l"(map), "r"(place.at[0]), "r"(place.at[1]), "r"(place.at[2]), "r"(place.at[3]), "r"(place.at[4]), "r"(barrier),
      "l"(policy)
      : "memory");
#endif
}

/// By one lane, of the whole converged warp: brings a box into L2.
FI_PREFETCH_DEVICE void prefetch_tensor(const CUtensorMap* map, const TensorPlace& place) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\n"
      "@one cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %3, %4, %5}];\n}" ::"l"(map),
      "r"(place.at[0]), "r"(place.at[1]), "r"(place.at[2]), "r"(place.at[3]), "r"(place.at[4])
      : "memory");
#endif
}

/// Writes 16 bytes of zeros to shared memory.
FI_PREFETCH_DEVICE void store_zeros_16(uint32_t address) {
  asm volatile("st.shared.v4.u32 [%0], {0, 0, 0, 0};" ::"r"(address) : "memory");
}

// ---- loads: ld, section 9.7.9.8 -------------------------------------------------------------------------------------

/// From shared memory, or from global memory without looking into L1, which keeps what other SMs have overwritten.
template <typename Vector>
FI_PREFETCH_DEVICE Vector load_past_l1(const float* source);

template <>
FI_PREFETCH_DEVICE float2 load_past_l1<float2>(const float* source) {
  float2 x;
  asm volatile("ld.cg.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(source) : "memory");
  return x;
}

template <>
FI_PREFETCH_DEVICE float4 load_past_l1<float4>(const float* source) {
  float4 x;
  asm volatile("ld.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(source)
               : "memory");
  return x;
}

/// A word of the page table, past L1, which may keep what the kernel before was still writing. The line is to leave L2
/// after others: all layers of a step read the same table, and 100 MB of weights pass between two of them.
FI_PREFETCH_DEVICE int32_t load_and_keep(const int32_t* source) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  int32_t x;
  asm volatile("ld.global.cg.L2::cache_hint.s32 %0, [%1], %2;" : "=r"(x) : "l"(source), "l"(policy) : "memory");
  return x;
}

// ---- L2: prefetch (9.7.9.15), cp.async.bulk.prefetch (9.7.9.25.4), createpolicy (9.7.9.18) ------------------------

/// Brings the line that holds `address` into L2. A hint: it never faults on a mapped address and returns nothing.
FI_PREFETCH_DEVICE void prefetch_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

/// The same, and asks that the line leaves L2 after the others.
FI_PREFETCH_DEVICE void prefetch_l2_evict_last(const void* address) {
  asm volatile("prefetch.global.L2::evict_last [%0];" ::"l"(address));
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
/// Brings `bytes` (a multiple of 16) from a 16-byte aligned address into L2.
FI_PREFETCH_DEVICE void bulk_prefetch_l2(const void* address, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes));
}
#endif

FI_PREFETCH_DEVICE uint64_t policy_evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

FI_PREFETCH_DEVICE uint64_t policy_evict_normal() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// ---- programmatic dependent launch: griddepcontrol, section 9.7.13.13 (nothing before sm_90) ----------------------

/// Returns when the grids that this one depends on have finished and their writes are visible.
FI_PREFETCH_DEVICE void wait_for_dependencies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets the grids that depend on this one start (they still wait for its end before they read what it writes).
FI_PREFETCH_DEVICE void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- matrices: ldmatrix (9.7.14.5.15), movmatrix (9.7.14.5.17), mma.m16n8k16 (9.7.14.5.8) -------------------------
// In an 8x8 matrix of 16-bit elements lane l holds row l/4, columns 2*(l%4) and 2*(l%4)+1, the first in the low half.

/// Four 8x8 matrices; lane l gives the address of row l%8 of matrix l/8 (16 bytes, 16-byte aligned).
FI_PREFETCH_DEVICE void load_matrix_x4(uint32_t (&r)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
}

/// The same with every matrix transposed.
FI_PREFETCH_DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
}

/// The transpose of one 8x8 matrix that the warp holds in registers.
FI_PREFETCH_DEVICE uint32_t transpose_matrix(uint32_t r) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(r));
  return transposed;
}

/// d += a b with a 16x16 (row), b 16x8 (column), float accumulators. T is __nv_bfloat16 or __half.
/// a: rows l/4 and l/4+8 (a0, a1), the same at k+8 (a2, a3); k = 2*(l%4), +1. b: column l/4, the same k (b0), k+8 (b1).
/// d: rows l/4 (d0, d1) and l/4+8 (d2, d3), columns 2*(l%4), +1.
template <typename T>
FI_PREFETCH_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
FI_PREFETCH_DEVICE void multiply_add<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
FI_PREFETCH_DEVICE void multiply_add<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// A float as tf32: the nearest number with ten bits after the point (cvt.rna, section 9.7.9.21).
FI_PREFETCH_DEVICE uint32_t round_to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

/// d += a b with a 16x8 (row), b 8x8 (column) of tf32 numbers, float accumulators (mma.m16n8k8).
/// a: rows l/4 and l/4+8 of column l%4 (a0, a1) and of column l%4+4 (a2, a3). b: rows l%4 and l%4+4 of column l/4.
/// d: as above.
FI_PREFETCH_DEVICE void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- order: atom with semantics and scope, section 9.7.13.7 --------------------------------------------------------

/// Adds to a counter in global memory and returns what it was before. Releases what this thread, and through a block
/// barrier before it the whole block, has written; acquires what those released who added before.
FI_PREFETCH_DEVICE int32_t add_acquire_release(int32_t* counter, int32_t value) {
  int32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}

/// Adds to a counter that orders nothing (red.relaxed, section 9.7.13.8).
FI_PREFETCH_DEVICE void add_relaxed(int32_t* counter, int32_t value) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

/// What such a counter is now.
FI_PREFETCH_DEVICE int32_t load_relaxed(const int32_t* counter) {
  int32_t x;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(counter) : "memory");
  return x;
}

// ---- arithmetic ---------------------------------------------------------------------------------------------------

/// 2^x to about 2 ulp, denormals flushed; 0 for -inf (ex2.approx.ftz, section 9.7.3.21).
FI_PREFETCH_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// log2(x), absolute error 2^-22 in [0.5, 2], relative 2^-22 elsewhere (lg2.approx, section 9.7.3.20).
FI_PREFETCH_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Sine and cosine of an angle in [-pi, pi], absolute error 2^-20.5 (sin.approx, cos.approx, sections 9.7.3.18, 19).
FI_PREFETCH_DEVICE float sin_fast(float x) {
  float y;
  asm("sin.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FI_PREFETCH_DEVICE float cos_fast(float x) {
  float y;
  asm("cos.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fi_prefetch::ptx

#endif
