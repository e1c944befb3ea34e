// csrc/ptx.cuh for the emulator: the same functions, each as the PTX ISA defines it. The guard is that header's, so
// that a kernel's own #include "ptx.cuh" finds it already defined.
#ifndef FI_PREFETCH_PTX_CUH
#define FI_PREFETCH_PTX_CUH

#include "cuda_on_cpu.h"
#include "tensor.h"

#define FI_PREFETCH_DEVICE inline

namespace fi_prefetch::ptx {

using emulator::current;
using emulator::machine;
using emulator::Warp;

FI_PREFETCH_DEVICE uint8_t* dynamic_shared_memory() { return current->warp->block->shared; }

FI_PREFETCH_DEVICE uint32_t shared_address(const void* pointer, Site site = Site::current()) {
  const ptrdiff_t offset = static_cast<const uint8_t*>(pointer) - current->warp->block->shared;
  if (offset < 0 || offset > static_cast<ptrdiff_t>(machine.launch.shared_bytes)) {
    emulator::fail(site, "shared_address: %p is not in the block's shared memory", pointer);
  }
  return emulator::kSharedBase + static_cast<uint32_t>(offset);
}

template <typename T>
FI_PREFETCH_DEVICE const T* opaque(const T* pointer) {
  return pointer;
}
FI_PREFETCH_DEVICE int32_t opaque(int32_t x) { return x; }
FI_PREFETCH_DEVICE uint64_t wide_product(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }

FI_PREFETCH_DEVICE ushort2 halves(uint32_t x) { return {static_cast<uint16_t>(x), static_cast<uint16_t>(x >> 16)}; }

template <typename Vector>
FI_PREFETCH_DEVICE Vector load_past_l1(const float* source) {
  return *reinterpret_cast<const Vector*>(source);
}

// ---- asynchronous copies ------------------------------------------------------------------------------------------

constexpr uint64_t kEvictFirst = 0x12F0000000000000, kEvictNormal = 0x14F0000000000000;
FI_PREFETCH_DEVICE uint64_t policy_evict_first() { return kEvictFirst; }
FI_PREFETCH_DEVICE uint64_t policy_evict_normal() { return kEvictNormal; }

FI_PREFETCH_DEVICE void copy_async_16(uint32_t destination, const void* source, uint64_t policy,
                                      Site site = Site::current()) {
  if (policy != kEvictFirst && policy != kEvictNormal) emulator::fail(site, "copy_async_16: not an L2 policy");
  machine.statistics.copies_evict_first += policy == kEvictFirst;
  emulator::copy_async(destination, source, site);
}

FI_PREFETCH_DEVICE void copy_async_commit() { current->groups_committed += 1; }

template <int PENDING>
FI_PREFETCH_DEVICE void copy_async_wait() {
  emulator::wait_for_copies(PENDING);
}

// ---- copies of tensors' boxes -------------------------------------------------------------------------------------

constexpr bool kHasTensorCopies = true;

struct TensorPlace {
  int32_t at[5];
};

FI_PREFETCH_DEVICE void prefetch_tensor_map(const CUtensorMap* map, Site site = Site::current()) {
  emulator::tensor_map("prefetch_tensor_map", map, site);
}

FI_PREFETCH_DEVICE void barrier_init(uint32_t barrier, Site site = Site::current()) {
  *reinterpret_cast<emulator::TensorBarrier*>(emulator::shared_pointer("barrier_init", barrier, 8, site)) = {
      0, 0, 0, emulator::TensorBarrier::kMagic};
}
FI_PREFETCH_DEVICE void fence_barrier_init() {}
FI_PREFETCH_DEVICE void fence_tensor_copies() {}

/// Runs `action` once for the whole warp, whose lanes must agree about `operands`.
template <typename Operands, typename Action>
FI_PREFETCH_DEVICE void by_one_lane(const char* operation, Operands operands, Site site, const Action& action) {
  emulator::collective(operation, ~0u, &operands, site, [&](Warp& warp) {
    for (int l = 0; l < 32; ++l) {
      const Operands& other = *static_cast<Operands*>(warp.lanes[l].operands);
      if (memcmp(&other, &operands, sizeof(Operands))) {
        emulator::fail(site, "%s: lane %d has other operands than lane %d", operation, l, current->number);
      }
    }
    action();
  });
}

FI_PREFETCH_DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes, Site site = Site::current()) {
  struct Operands {
    uint32_t barrier, bytes;
  };
  by_one_lane("barrier_expect", Operands{barrier, bytes}, site, [&] {
    emulator::TensorBarrier& found = emulator::tensor_barrier("barrier_expect", barrier, site);
    if (found.arrived) emulator::fail(site, "barrier_expect: the phase has had its arrival");
    found.pending += static_cast<int32_t>(bytes);
    found.arrived = 1;
    end_phase_when_complete(found);
  });
}

/// Lands none or some of what is to arrive there, by the seed, before it looks.
FI_PREFETCH_DEVICE bool barrier_passed(uint32_t barrier, uint32_t parity, Site site = Site::current()) {
  emulator::TensorBarrier& found = emulator::tensor_barrier("barrier_passed", barrier, site);
  for (emulator::TensorCopy& copy : current->warp->block->tensor_copies) {
    if (copy.barrier != barrier || copy.landed || emulator::random_below(32)) continue;
    emulator::land(copy, site);
    found.pending -= static_cast<int32_t>(copy.bytes);
    end_phase_when_complete(found);
  }
  if (found.parity == parity) return false;
  emulator::publish_tensor_copies(barrier);
  return true;
}

FI_PREFETCH_DEVICE void copy_tensor(uint32_t destination, const CUtensorMap* map, const TensorPlace& place,
                                    uint32_t barrier, uint64_t policy, Site site = Site::current()) {
  struct Operands {
    uint64_t policy;
    TensorPlace place;
    uint32_t destination, barrier, zero = 0;
  };
  by_one_lane("copy_tensor", Operands{policy, place, destination, barrier}, site, [&] {
    if (policy != kEvictFirst && policy != kEvictNormal) emulator::fail(site, "copy_tensor: not an L2 policy");
    emulator::tensor_barrier("copy_tensor", barrier, site);
    const emulator::TensorMap& tensor = emulator::tensor_map("copy_tensor", map, site);
    const uint32_t bytes = tensor.box[0] * tensor.box[1] * tensor.box[2] * tensor.box[3] * tensor.box[4];
    uint8_t* to = emulator::shared_pointer("copy_tensor", destination, 128, site);
    emulator::shared_pointer("copy_tensor", destination + bytes - 128, 128, site);  // its end lies there, too
    emulator::for_each_chunk(tensor, place.at, destination, [&](uint32_t, const uint8_t* source) {
      if (source != nullptr) emulator::check_global("copy_tensor", source, 16, 16, site);
    });
    memset(to, 0xFF, bytes);
    memset(&emulator::hidden_flag(to), 1, bytes / 16);
    machine.statistics.tensor_copies += 1;
    machine.statistics.copies_after_launch += current->launched_dependents;
    machine.statistics.copied_bytes += bytes;
    emulator::TensorCopy copy{tensor, destination, bytes, barrier, {}, false};
    memcpy(copy.at, place.at, sizeof(copy.at));
    current->warp->block->tensor_copies.push_back(copy);
  });
}

FI_PREFETCH_DEVICE void prefetch_tensor(const CUtensorMap* map, const TensorPlace& place, Site site = Site::current()) {
  by_one_lane("prefetch_tensor", place, site, [&] {
    const emulator::TensorMap& tensor = emulator::tensor_map("prefetch_tensor", map, site);
    emulator::for_each_chunk(tensor, place.at, 0, [&](uint32_t offset, const uint8_t* source) {
      if (source == nullptr || reinterpret_cast<uintptr_t>(source) % 128) return;
      emulator::check_global("prefetch_tensor", source, 16, 16, site);
      emulator::record_prefetch(source, 128, false);
    });
  });
}

FI_PREFETCH_DEVICE void store_zeros_16(uint32_t address, Site site = Site::current()) {
  uint8_t* p = emulator::shared_pointer("store_zeros_16", address, 16, site);
  if (emulator::hidden_flag(p)) emulator::fail(site, "store_zeros_16: a copy is on its way there");
  memset(p, 0, 16);
}

// ---- L2 -----------------------------------------------------------------------------------------------------------

FI_PREFETCH_DEVICE void prefetch_l2(const void* address, Site site = Site::current()) {
  emulator::check_global("prefetch_l2", address, 1, 1, site);
  emulator::record_prefetch(address, 128, false);
}

FI_PREFETCH_DEVICE void prefetch_l2_evict_last(const void* address, Site site = Site::current()) {
  emulator::check_global("prefetch_l2_evict_last", address, 1, 1, site);
  emulator::record_prefetch(address, 128, true);
}

FI_PREFETCH_DEVICE int32_t load_and_keep(const int32_t* source) { return __ldcg(source); }

FI_PREFETCH_DEVICE void bulk_prefetch_l2(const void* address, uint32_t bytes, Site site = Site::current()) {
  if (bytes % 16) emulator::fail(site, "bulk_prefetch_l2: %u bytes are not a multiple of 16", bytes);
  emulator::check_global("bulk_prefetch_l2", address, bytes, 16, site);
  emulator::record_prefetch(address, bytes, false);
}

// ---- programmatic dependent launch --------------------------------------------------------------------------------

FI_PREFETCH_DEVICE void wait_for_dependencies(Site site = Site::current()) {
  machine.statistics.waits_for_dependencies += 1;
  if (!machine.dependencies_ended) {
    Warp& warp = *current->warp;
    current->wait = {"wait_for_dependencies", 0, site};
    warp.ready &= ~current->bit();
    warp.at_dependencies |= current->bit();
    emulator::suspend();
  }
  current->waited_for_dependencies = true;
}

FI_PREFETCH_DEVICE void launch_dependents() {
  machine.statistics.launches_of_dependents += 1;
  current->launched_dependents = true;
}

// ---- matrices -----------------------------------------------------------------------------------------------------

struct MatrixLoad {
  uint32_t address;
  uint32_t* r;
};

FI_PREFETCH_DEVICE void load_matrix(const char* operation, bool transposed, uint32_t (&r)[4], uint32_t row_address,
                                    Site site) {
  MatrixLoad mine{row_address, r};
  emulator::collective(operation, ~0u, &mine, site, [&](Warp& warp) {
    machine.statistics.matrix_loads += 1;
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t elements[8][8];
      int rows_of_bank[8] = {}, cycles = 1;  // a row of 16 bytes fills one of eight groups of four banks
      for (int row = 0; row < 8; ++row) {
        const uint32_t address = static_cast<MatrixLoad*>(warp.lanes[matrix * 8 + row].operands)->address;
        const uint8_t* p = emulator::shared_pointer(operation, address, 16, site);
        if (emulator::hidden_flag(p)) {
          emulator::fail(site, "%s: reads a copy without its wait, or without a barrier after it", operation);
        }
        memcpy(elements[row], p, 16);
        bool again = false;  // the same address twice is one access
        for (int r = 0; r < row; ++r) {
          again |= static_cast<MatrixLoad*>(warp.lanes[matrix * 8 + r].operands)->address == address;
        }
        if (!again) cycles = std::max(cycles, ++rows_of_bank[address / 16 % 8]);
      }
      machine.statistics.matrix_load_conflicts += cycles - 1;
      for (int l = 0; l < 32; ++l) {
        const int i = l / 4, j = l % 4 * 2;
        const uint32_t low = transposed ? elements[j][i] : elements[i][j];
        const uint32_t high = transposed ? elements[j + 1][i] : elements[i][j + 1];
        static_cast<MatrixLoad*>(warp.lanes[l].operands)->r[matrix] = high << 16 | low;
      }
    }
  });
}

FI_PREFETCH_DEVICE void load_matrix_x4(uint32_t (&r)[4], uint32_t row_address, Site site = Site::current()) {
  load_matrix("load_matrix_x4", false, r, row_address, site);
}

FI_PREFETCH_DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t row_address, Site site = Site::current()) {
  load_matrix("load_matrix_x4_transposed", true, r, row_address, site);
}

FI_PREFETCH_DEVICE uint32_t transpose_matrix(uint32_t r, Site site = Site::current()) {
  emulator::collective("transpose_matrix", ~0u, &r, site, [](Warp& warp) {
    uint16_t elements[8][8];
    for (int l = 0; l < 32; ++l) memcpy(&elements[l / 4][l % 4 * 2], warp.lanes[l].operands, 4);
    for (int l = 0; l < 32; ++l) {
      const int i = l / 4, j = l % 4 * 2;
      *static_cast<uint32_t*>(warp.lanes[l].operands) =
          static_cast<uint32_t>(elements[j + 1][i]) << 16 | elements[j][i];
    }
  });
  return r;
}

template <typename T>
inline float element_as_float(uint32_t bits) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return emulator::bits_as<float>(bits << 16);
  // The exponent of half re-biased by a multiplication, which is right for denormals too; then infinity and NaN.
  float value = emulator::bits_as<float>((bits & 0x7FFF) << 13) * 0x1p112f;
  if ((bits & 0x7C00) == 0x7C00) value = emulator::bits_as<float>(0x7F800000 | (bits & 0x3FF) << 13);
  return bits & 0x8000 ? -value : value;
}

struct MultiplyAdd {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <typename T>
FI_PREFETCH_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                     Site site = Site::current()) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  MultiplyAdd mine{d, a, {b0, b1}};
  emulator::collective("multiply_add", ~0u, &mine, site, [](Warp& warp) {
    machine.statistics.multiply_adds += 1;
    float left[16][16], right[16][8], sum[16][8];
    for (int l = 0; l < 32; ++l) {
      const MultiplyAdd& lane = *static_cast<MultiplyAdd*>(warp.lanes[l].operands);
      const int i = l / 4, j = l % 4 * 2;
      for (int half = 0; half < 2; ++half) {  // of the register: low, high
        for (int r = 0; r < 4; ++r) {
          left[i + r % 2 * 8][j + half + r / 2 * 8] = element_as_float<T>(lane.a[r] >> 16 * half & 0xFFFF);
          if (half == 0) sum[i + r / 2 * 8][j + r % 2] = lane.d[r];
        }
        for (int r = 0; r < 2; ++r) right[j + half + r * 8][i] = element_as_float<T>(lane.b[r] >> 16 * half & 0xFFFF);
      }
    }
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 8; ++n) sum[m][n] += left[m][k] * right[k][n];
      }
    }
    for (int l = 0; l < 32; ++l) {
      const MultiplyAdd& lane = *static_cast<MultiplyAdd*>(warp.lanes[l].operands);
      for (int r = 0; r < 4; ++r) lane.d[r] = sum[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2];
    }
  });
}

FI_PREFETCH_DEVICE uint32_t round_to_tf32(float x) {
  const uint32_t bits = emulator::bits_as<uint32_t>(x);
  if ((bits & 0x7F800000) == 0x7F800000) return bits & 0x7FFFFF ? 0x7FFFE000 : bits;
  return (bits + 0x1000) & 0xFFFFE000;
}

FI_PREFETCH_DEVICE void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                          Site site = Site::current()) {
  for (const uint32_t x : {a[0], a[1], a[2], a[3], b0, b1}) {
    if (x & 0x1FFF) emulator::fail(site, "multiply_add_tf32: %08x is not a tf32 number", x);
  }
  MultiplyAdd mine{d, a, {b0, b1}};
  emulator::collective("multiply_add_tf32", ~0u, &mine, site, [](Warp& warp) {
    machine.statistics.multiply_adds += 1;
    float left[16][8], right[8][8], sum[16][8];
    for (int l = 0; l < 32; ++l) {
      const MultiplyAdd& lane = *static_cast<MultiplyAdd*>(warp.lanes[l].operands);
      const int i = l / 4, j = l % 4;
      for (int r = 0; r < 4; ++r) {
        left[i + r % 2 * 8][j + r / 2 * 4] = emulator::bits_as<float>(lane.a[r]);
        sum[i + r / 2 * 8][2 * j + r % 2] = lane.d[r];
      }
      for (int r = 0; r < 2; ++r) right[j + r * 4][i] = emulator::bits_as<float>(lane.b[r]);
    }
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 8; ++k) {
        for (int n = 0; n < 8; ++n) sum[m][n] += left[m][k] * right[k][n];
      }
    }
    for (int l = 0; l < 32; ++l) {
      const MultiplyAdd& lane = *static_cast<MultiplyAdd*>(warp.lanes[l].operands);
      for (int r = 0; r < 4; ++r) lane.d[r] = sum[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2];
    }
  });
}

// ---- order ----------------------------------------------------------------------------------------------------------

FI_PREFETCH_DEVICE int32_t add_acquire_release(int32_t* counter, int32_t value, Site site = Site::current()) {
  machine.statistics.fences += 1;
  return emulator::atomic("add_acquire_release", counter, site, [=](int32_t old) { return old + value; });
}

FI_PREFETCH_DEVICE void add_relaxed(int32_t* counter, int32_t value, Site site = Site::current()) {
  emulator::atomic("add_relaxed", counter, site, [=](int32_t old) { return old + value; });
}
FI_PREFETCH_DEVICE int32_t load_relaxed(const int32_t* counter) { return __ldcg(counter); }

// ---- arithmetic ---------------------------------------------------------------------------------------------------

FI_PREFETCH_DEVICE float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;  // a NaN stays one
}

FI_PREFETCH_DEVICE float log2_fast(float x) { return log2f(x); }

inline void check_angle(float x, Site site) {
  if (std::fabs(x) > 3.1415930f) emulator::fail(site, "sin_fast or cos_fast of %g: not in [-pi, pi]", x);
}
FI_PREFETCH_DEVICE float sin_fast(float x, Site site = Site::current()) {
  check_angle(x, site);
  return sinf(x);
}
FI_PREFETCH_DEVICE float cos_fast(float x, Site site = Site::current()) {
  check_angle(x, site);
  return cosf(x);
}

}  // namespace fi_prefetch::ptx

#endif
