// Runs CUDA kernels on the CPU, thread by thread, to find on any machine what would otherwise need a GPU to show up.
//
// A CUDA thread is a fiber. A warp-wide operation suspends each lane that reaches it; the last lane to arrive computes
// it for all. A seeded scheduler decides which lane, warp and block runs next, so one seed is one reproducible
// interleaving and many seeds are many. What hardware leaves undefined is made to fail here: shared memory starts as
// NaN, an asynchronous copy lands as late as its wait allows (or, by the seed, earlier), lanes that disagree on a
// collective are an error and not a hang. Memory is sequentially consistent: a missing fence cannot be seen.
//
// One translation unit per library, one launch at a time.
#pragma once

#include <cuda_runtime.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#if !defined(__x86_64__) || defined(FI_PREFETCH_EMULATOR_UCONTEXT)
#define EMULATOR_UCONTEXT 1
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

// ---- fibers -------------------------------------------------------------------------------------------------------

struct Fiber {
#ifdef EMULATOR_UCONTEXT
  ucontext_t context;
#endif
  void* stack_pointer = nullptr;
  uint8_t* stack = nullptr;  // its lowest byte
  size_t stack_bytes = 0;
  void* mapped = nullptr;  // the stack's own mapping, guard page first; none for the host's fiber
  size_t mapped_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  ~Fiber() {
    if (mapped) munmap(mapped, mapped_bytes);
  }
};

#ifndef EMULATOR_UCONTEXT
extern "C" void emulator_switch(void** save, void* load);
// The jump through a register, unlike `ret`, lets the branch predictor learn the target.
asm(R"(
.pushsection .text
.local emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  popq %rcx
  jmp *%rcx
.size emulator_switch, .-emulator_switch
.popsection
)");
#endif

inline void switch_fiber(Fiber& from, Fiber& to, bool from_is_done = false) {
  (void)from_is_done;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(from_is_done ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef EMULATOR_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  emulator_switch(&from.stack_pointer, to.stack_pointer);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

/// Makes `fiber` start `entry` when it is next switched to. `index` staggers the stacks: at equal offsets in their
/// pages the frames of all lanes would compete for the same few sets of the L1 cache.
inline void start_fiber(Fiber& fiber, void (*entry)(), int index) {
#ifdef __SANITIZE_ADDRESS__
  constexpr size_t kStackBytes = 256 << 10;
#else
  constexpr size_t kStackBytes = 96 << 10;
#endif
  constexpr size_t kGuardBytes = 4096;
  if (!fiber.mapped) {
    void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    fiber.mapped = memory;
    fiber.mapped_bytes = kStackBytes + kGuardBytes;
    if (mprotect(memory, kGuardBytes, PROT_NONE)) throw std::bad_alloc();
    fiber.stack = static_cast<uint8_t*>(memory) + kGuardBytes;
    fiber.stack_bytes = kStackBytes;
  }
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes);  // frames of a launch that was given up
#endif
#ifdef EMULATOR_UCONTEXT
  (void)index;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.stack_bytes - 64 - 320 * (index % 32));
  *--top = nullptr;  // where `entry` would return to; keeps its frame at 16 n + 8
  *--top = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top - 6;
#endif
}

// ---- the machine --------------------------------------------------------------------------------------------------

/// Where in the kernel's source an operation was called, as std::source_location of C++20.
struct Site {
  const char* file;
  int line;
  static constexpr Site current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator!=(const Site& other) const { return line != other.line || strcmp(file, other.file); }
};

/// What a thread that is not ready waits for; `operation` is a name, compared by its characters.
struct Wait {
  const char* operation;
  uint32_t mask;
  Site site;
};

struct Copy {
  uint8_t* destination;
  const void* source;
  uint32_t bytes;
  int64_t group;
  bool done;
  Site site;
};

/// What a CUtensorMap holds here: see tensor.h.
struct TensorMap {
  static constexpr uint32_t kMagic = 0x7E4504A9;
  uint32_t magic;
  uint32_t swizzle;  // 16-byte chunks that are permuted: 4 or 8
  const uint8_t* base;
  uint64_t sizes[5];
  uint64_t strides[5];  // bytes
  uint32_t box[5];
};

/// A copy of a tensor's box on its way.
struct TensorCopy {
  TensorMap map;
  uint32_t destination;  // address in shared memory
  uint32_t bytes;
  uint32_t barrier;  // where its bytes arrive
  int32_t at[5];
  bool landed;
};

struct Warp;
struct Block;

struct Lane {
  Fiber fiber;
  Warp* warp = nullptr;
  int number = 0;  // 0 to 31
  uint3 index{};   // threadIdx
  Wait wait{};
  void* operands = nullptr;
  std::vector<Copy> copies;           // oldest first; a copy leaves when a wait covers it ...
  std::vector<uint8_t*> unpublished;  // ... then only this lane sees it until a barrier; flags in Block::hidden
  int64_t groups_committed = 0;
  bool waited_for_dependencies = false, launched_dependents = false;

  uint32_t bit() const { return 1u << number; }
};

/// Sets of lanes are masks.
struct Warp {
  Block* block = nullptr;
  Lane* lanes = nullptr;
  uint32_t alive = 0, ready = 0, todo = 0;  // todo: those of `ready` that are still to run in this round
  uint32_t in_collective = 0, at_barrier = 0, at_dependencies = 0;
  uint32_t priority = 0;
};

struct Block {
  static constexpr size_t kGuardBytes = 1024;  // on either side of the shared memory
  static constexpr uint8_t kGuard = 0xA5;
  static constexpr size_t kAlignment = 1024;  // what csrc/ptx.cuh declares of the dynamic shared memory
  uint3 index{};                              // blockIdx
  bool running = false;
  std::unique_ptr<Lane[]> lanes;
  std::vector<Warp> warps;
  std::vector<uint8_t> storage;
  std::vector<TensorCopy> tensor_copies;
  std::vector<uint8_t> hidden;  // per 16 bytes of shared memory, 1: a copy wrote it that other lanes may not see yet
  uint8_t* shared = nullptr;
  int exited = 0, arrived = 0, votes = 0;
  Wait barrier{};
  int last_arrived = 0, last_votes = 0;
};

struct Launch {
  dim3 grid = 1;
  dim3 block = 32;
  size_t shared_bytes = 0;
  uint64_t seed = 0;
  int resident_blocks = 4;
  /// Runs once, when the grids that this one depends on are taken to end: it may change memory as they would. Threads
  /// in wait_for_dependencies are held until then, and atomics and __st* on global memory are errors before. The
  /// scheduler picks a moment at which some thread waits, at the latest when nothing else can run.
  std::function<void()> dependencies_end = {};
  int64_t round_limit = 20'000'000;
};

struct Range {
  const uint8_t* begin;
  const uint8_t* end;
};

/// One prefetch, as tests see it through emulator_prefetches().
struct Prefetch {
  uint64_t address;
  uint32_t bytes;
  int32_t block;                // linear index
  int32_t thread;               // linear index
  int32_t evict_last;           // 0 or 1
  int32_t before_dependencies;  // 0 or 1: this thread had not yet returned from wait_for_dependencies
};

// clang-format off: it never agrees with itself about such a list
#define EMULATOR_STATISTICS(X) \
  X(prefetches) X(prefetched_bytes) X(copies) X(copied_bytes) X(copies_evict_first) X(tensor_copies) \
  X(copies_after_launch) X(waits_for_dependencies) \
  X(launches_of_dependents) X(threads) X(threads_that_waited) X(threads_that_launched) X(matrix_loads) \
  X(matrix_load_conflicts) X(multiply_adds) X(shuffles) X(barriers) X(atomics) X(fences) X(rounds)
// clang-format on

/// Counts over one launch. matrix_load_conflicts: extra shared-memory cycles of ldmatrix because of bank conflicts.
/// copies_after_launch: copies, of tensors too, that a thread started after it had let dependents start.
struct Statistics {
#define EMULATOR_FIELD(name) int64_t name = 0;
  EMULATOR_STATISTICS(EMULATOR_FIELD)
#undef EMULATOR_FIELD
};

struct Machine {
  Launch launch;
  std::function<void()> kernel;
  std::vector<std::unique_ptr<Block>> blocks;  // the resident ones
  Fiber host;
  uint64_t random_state = 0;
  int rotation = 0;         // where the order of lanes starts in this round
  int early_copy_odds = 0;  // a copy lands early once in so many times; 0: never
  bool dependencies_ended = false;
  std::string error;
  Statistics statistics;
  std::vector<Prefetch> prefetches;
  std::vector<Range> ranges;  // registered global memory; none: addresses are not checked
};

inline Machine machine;
inline Lane* current = nullptr;

inline uint32_t random_below(uint32_t bound) {  // splitmix64
  uint64_t z = machine.random_state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return static_cast<uint32_t>(((z ^ (z >> 31)) >> 32) * bound >> 32);
}

inline int linear(const uint3& index, const dim3& extent) {
  return static_cast<int>((index.z * extent.y + index.y) * extent.x + index.x);
}

/// The error message, about the current thread.
inline std::string error_at(Site site, const char* text) {
  char message[1024];
  const uint3 &b = current->warp->block->index, &t = current->index;
  snprintf(message, sizeof(message), "block (%u, %u, %u) thread (%u, %u, %u) at %s:%d: %s", b.x, b.y, b.z, t.x, t.y,
           t.z, site.file, site.line, text);
  return message;
}

/// Ends the launch with a message; called on a thread of the kernel.
[[noreturn]] __attribute__((format(printf, 2, 3))) inline void fail(Site site, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  machine.error = error_at(site, text);
  switch_fiber(current->fiber, machine.host);
  abort();  // never resumed
}

/// While it lives, a plain access to memory that is not there ends the launch and not the process, as does a thread
/// that runs for twice kStuckSeconds of processor time without reaching an operation at which another could run.
/// Under AddressSanitizer it does nothing: that reports more.
class FaultTrap {
 public:
  static inline sigjmp_buf resume;  // where the scheduler goes on
  static inline void* address;
  static constexpr int kStuckSeconds = 2;

  FaultTrap() {
#ifndef __SANITIZE_ADDRESS__
    static uint8_t stack[64 << 10];  // the thread's own may be what overflowed
    stack_t alternate{};
    alternate.ss_sp = stack;
    alternate.ss_size = sizeof(stack);
    sigaltstack(&alternate, &old_stack_);
    struct sigaction action{};
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    action.sa_sigaction = [](int number, siginfo_t* info, void*) {
      const int64_t rounds = machine.statistics.rounds;
      if (number == SIGVTALRM && std::exchange(rounds_seen_, rounds) != rounds) return;
      address = info->si_addr;
      siglongjmp(resume, number);
    };
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &old_actions_[i]);
    rounds_seen_ = -1;
    const itimerval ticks{{kStuckSeconds, 0}, {kStuckSeconds, 0}};
    setitimer(ITIMER_VIRTUAL, &ticks, &old_timer_);
#endif
  }
  ~FaultTrap() {
#ifndef __SANITIZE_ADDRESS__
    setitimer(ITIMER_VIRTUAL, &old_timer_, nullptr);
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &old_actions_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
#endif
  }

 private:
  static constexpr int kSignals[4] = {SIGSEGV, SIGBUS, SIGFPE, SIGVTALRM};
  static inline volatile int64_t rounds_seen_;
  struct sigaction old_actions_[4];
  itimerval old_timer_;
  stack_t old_stack_;
};

// ---- scheduling ---------------------------------------------------------------------------------------------------

inline Lane* take_lane(Warp& warp) {
  const int r = machine.rotation & 31;
  const bool backwards = machine.rotation & 32;
  const uint32_t rotated = warp.todo >> r | static_cast<uint32_t>(static_cast<uint64_t>(warp.todo) << (32 - r));
  const int lane = ((backwards ? 31 - __builtin_clz(rotated) : __builtin_ctz(rotated)) + r) & 31;
  warp.todo &= ~(1u << lane);
  return &warp.lanes[lane];
}

/// Leaves the current thread; returns when the scheduler resumes it. A thread that is ready lets others run before.
inline void suspend(bool is_done = false) {
  Lane& me = *current;
  if (me.warp->todo) {
    current = take_lane(*me.warp);
    switch_fiber(me.fiber, current->fiber, is_done);
  } else {
    switch_fiber(me.fiber, machine.host, is_done);
  }
}

/// Lets other lanes see what this one's finished copies wrote.
inline void publish_copies(Lane& lane) {
  for (uint8_t* hidden : lane.unpublished) *hidden = 0;
  lane.unpublished.clear();
}

/// Fails if `me` and `other` each wait for the other, and not in the same collective.
inline void check_same_collective(const Lane& me, const Lane& other) {
  const Wait &mine = me.wait, &its = other.wait;
  if (!(mine.mask & other.bit() && its.mask & me.bit())) return;
  if (mine.mask == its.mask && !strcmp(mine.operation, its.operation) && !(mine.site != its.site)) return;
  fail(mine.site, "divergence: this lane is in %s with mask %#x, lane %d in %s with mask %#x at %s:%d", mine.operation,
       mine.mask, other.number, its.operation, its.mask, its.site.file, its.site.line);
}

/// Gathers the lanes of `mask`; the last to arrive runs `compute(warp)`, which finds what each lane passed in
/// lanes[i].operands: an object on that lane's own stack, good for results too.
template <typename Compute>
inline void collective(const char* operation, uint32_t mask, void* operands, Site site, Compute&& compute) {
  Lane& me = *current;
  Warp& warp = *me.warp;
  if (!(mask & me.bit())) fail(site, "%s: lane %d is not in its own mask %#x", operation, me.number, mask);
  if (const uint32_t gone = mask & ~warp.alive) {
    fail(site, "divergence: %s: mask %#x has lanes that have exited, or never were: %#x", operation, mask, gone);
  }
  me.wait = {operation, mask, site};
  me.operands = operands;
  // One other lane is enough for an early message; the rest are checked when all seem to have arrived.
  if (const uint32_t others = warp.in_collective & mask) check_same_collective(me, warp.lanes[__builtin_ctz(others)]);
  warp.in_collective |= me.bit();
  bool complete = (warp.in_collective & mask) == mask;
  for (uint32_t left = complete ? mask : 0; left; left &= left - 1) {
    const Lane& other = warp.lanes[__builtin_ctz(left)];
    check_same_collective(me, other);
    complete &= other.wait.mask == mask;  // else it waits for a smaller set, without this lane, and will come later
  }
  if (complete) {
    compute(warp);
    warp.in_collective &= ~mask;
    warp.ready |= mask;
  } else {
    warp.ready &= ~me.bit();
    suspend();
  }
}

inline void release_barrier_when_complete(Block& block) {
  const int threads = static_cast<int>(machine.launch.block.x * machine.launch.block.y * machine.launch.block.z);
  if (block.arrived == 0 || block.arrived + block.exited < threads) return;  // an exited thread counts as arrived
  block.last_arrived = block.arrived;
  block.last_votes = block.votes;
  block.arrived = block.votes = 0;
  for (Warp& warp : block.warps) {
    for (uint32_t left = warp.at_barrier; left; left &= left - 1) publish_copies(warp.lanes[__builtin_ctz(left)]);
    warp.ready |= warp.at_barrier;
    warp.at_barrier = 0;
    warp.priority = random_below(1 << 30);  // else the one that came last would mostly come last again
  }
}

/// The block-wide barrier; returns when all have arrived, with their number and votes in last_arrived, last_votes.
inline Block& barrier(const char* operation, int predicate, Site site) {
  Lane& me = *current;
  Block& block = *me.warp->block;
  if (block.arrived && (strcmp(block.barrier.operation, operation) || block.barrier.site != site)) {
    fail(site, "divergence: this thread is in %s, others in %s at %s:%d", operation, block.barrier.operation,
         block.barrier.site.file, block.barrier.site.line);
  }
  machine.statistics.barriers += block.arrived == 0;
  block.barrier = me.wait = {operation, 0, site};
  block.arrived += 1;
  block.votes += predicate != 0;
  me.warp->ready &= ~me.bit();
  me.warp->at_barrier |= me.bit();
  release_barrier_when_complete(block);
  suspend();
  return block;
}

/// The body of every fiber.
inline void run_thread() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  machine.kernel();
  Lane& me = *current;
  Warp& warp = *me.warp;
  if (!me.copies.empty()) fail(me.copies[0].site, "the thread ends with an asynchronous copy that it never waited for");
  for (int i = 0; i < 32; ++i) {
    const Wait& wait = warp.lanes[i].wait;
    if (warp.in_collective >> i & 1 && wait.mask & me.bit()) {
      fail(wait.site, "divergence: the thread exits while lane %d waits for it in %s", i, wait.operation);
    }
  }
  machine.statistics.threads += 1;
  machine.statistics.threads_that_waited += me.waited_for_dependencies;
  machine.statistics.threads_that_launched += me.launched_dependents;
  warp.alive &= ~me.bit();
  warp.ready &= ~me.bit();
  warp.block->exited += 1;
  release_barrier_when_complete(*warp.block);
  suspend(true);
}

inline void start_block(Block& block, uint3 index) {
  const dim3& extent = machine.launch.block;
  const int threads = static_cast<int>(extent.x * extent.y * extent.z);
  block.index = index;
  block.running = true;
  block.exited = block.arrived = block.votes = 0;
  const size_t bytes = machine.launch.shared_bytes;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(block.storage.data(), block.storage.size());
#endif
  block.storage.assign(bytes + 2 * Block::kGuardBytes + 2 * Block::kAlignment, Block::kGuard);
  const uintptr_t first = reinterpret_cast<uintptr_t>(block.storage.data()) + Block::kGuardBytes;
  block.shared = reinterpret_cast<uint8_t*>((first / (2 * Block::kAlignment) * 2 + 1) * Block::kAlignment);
  if (block.shared < block.storage.data() + Block::kGuardBytes) block.shared += 2 * Block::kAlignment;
  block.hidden.assign(bytes / 16, 0);
  block.tensor_copies.clear();
  memset(block.shared, 0xFF, bytes);  // NaN in every floating-point format, -1 in every integer
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(block.shared - Block::kGuardBytes, Block::kGuardBytes);
  __asan_poison_memory_region(block.shared + bytes, Block::kGuardBytes);
#endif
  for (size_t w = 0; w < block.warps.size(); ++w) {
    const int lanes = std::min(32, threads - static_cast<int>(w) * 32);
    Warp& warp = block.warps[w] = Warp();
    warp.block = &block;
    warp.lanes = &block.lanes[w * 32];
    warp.priority = random_below(1 << 30);
    warp.alive = warp.ready = lanes == 32 ? ~0u : (1u << lanes) - 1;
    for (int l = 0; l < lanes; ++l) {
      Lane& lane = warp.lanes[l];
      const uint32_t t = static_cast<uint32_t>(w) * 32 + l;
      lane.warp = &warp;
      lane.number = l;
      lane.index = {t % extent.x, t / extent.x % extent.y, t / extent.x / extent.y};
      lane.copies.clear();
      lane.unpublished.clear();
      lane.wait = {"the start", 0, {"the start", 0}};
      lane.groups_committed = 0;
      lane.waited_for_dependencies = lane.launched_dependents = false;
      start_fiber(lane.fiber, run_thread, static_cast<int>(t));
    }
  }
}

inline void end_block(Block& block) {
  block.running = false;
  if (!block.tensor_copies.empty()) machine.error = "a block ends while the copy of a tensor's box is on its way";
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(block.storage.data(), block.storage.size());
#endif
  const uint8_t* end = block.shared + machine.launch.shared_bytes;
  for (size_t i = 0; i < Block::kGuardBytes; ++i) {
    const bool before = block.shared[-1 - static_cast<ptrdiff_t>(i)] != Block::kGuard;
    if (!before && end[i] == Block::kGuard) continue;
    char text[256];
    snprintf(text, sizeof(text), "block (%u, %u, %u): a byte %zu %s its shared memory was written", block.index.x,
             block.index.y, block.index.z, i + 1, before ? "before" : "beyond the end of");
    machine.error = text;
    return;
  }
}

inline std::string describe_deadlock() {
  std::string text = "deadlock: no thread can run;";
  for (const auto& block : machine.blocks) {
    for (const Warp& warp : block->warps) {
      if (!block->running || text.size() > 1500) continue;
      for (uint32_t left = warp.alive; left;) {  // lanes that wait at the same place, together
        const Wait& wait = warp.lanes[__builtin_ctz(left)].wait;
        uint32_t same = 0;
        for (int l = 0; l < 32; ++l) {
          const Wait& other = warp.lanes[l].wait;
          if (left >> l & 1 && !(other.site != wait.site) && other.mask == wait.mask) same |= 1u << l;
        }
        char line[512];
        snprintf(line, sizeof(line), "\n  block (%u, %u, %u) warp %d: lanes %#x are in %s (mask %#x) at %s:%d",
                 block->index.x, block->index.y, block->index.z, static_cast<int>(&warp - block->warps.data()), same,
                 wait.operation, wait.mask, wait.site.file, wait.site.line);
        text += line;
        left &= ~same;
      }
    }
  }
  return text;
}

/// Runs the grid that machine.launch and machine.kernel describe; machine.error says how it went.
inline void run_grid() {
  const Launch& launch = machine.launch;
  const int threads = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  const uint32_t total_blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  if (total_blocks == 0 || threads == 0 || threads > 1024 || launch.shared_bytes > 227 << 10) {
    machine.error = "not a valid launch: " + std::to_string(total_blocks) + " blocks of " + std::to_string(threads) +
                    " threads with " + std::to_string(launch.shared_bytes) + " bytes of shared memory";
    return;
  }
  std::vector<uint32_t> order(total_blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (launch.seed % 2) {  // hardware usually starts blocks in order, and promises nothing
    for (uint32_t i = total_blocks; i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  }
  uint32_t started = 0;
  const size_t resident = std::min<size_t>(std::max(launch.resident_blocks, 1), total_blocks);
  const size_t warps = (threads + 31) / 32;
  for (size_t i = 0; i < resident; ++i) {
    Block& block = *machine.blocks.emplace_back(std::make_unique<Block>());
    block.warps.resize(warps);
    block.lanes = std::make_unique<Lane[]>(warps * 32);
  }
  // By the seed, warps advance in step or far apart: runs of rounds of one warp are short or long, and the next warp is
  // any, or the one with the highest priority, which rarely changes, so that others starve.
  const int longest_run = 1 << random_below(9);
  const bool by_priority = random_below(2);
  const uint32_t priority_change_odds = 1 << (4 + random_below(9));
  const FaultTrap trap;
  if (const int number = sigsetjmp(FaultTrap::resume, 1)) {
    char text[256];
    if (number == SIGVTALRM)
      strcpy(text, "the thread does not end, some time after this place");
    else
      snprintf(text, sizeof(text), "%s at %p, some time after this place", strsignal(number), FaultTrap::address);
    machine.error = error_at(current->wait.site, text);
  }
  while (machine.error.empty()) {
    for (size_t b = 0; b < resident; ++b) {
      if (machine.blocks[b]->running || started == total_blocks) continue;
      const uint32_t i = order[started++];
      start_block(*machine.blocks[b],
                  {i % launch.grid.x, i / launch.grid.x % launch.grid.y, i / launch.grid.x / launch.grid.y});
    }
    Warp* warp = nullptr;
    bool any_running = false, any_at_dependencies = false;
    const uint32_t candidates = static_cast<uint32_t>(resident * warps), first = random_below(candidates);
    for (uint32_t i = 0; i < candidates && (by_priority || !warp); ++i) {
      const uint32_t c = (first + i) % candidates;
      if (!machine.blocks[c / warps]->running) continue;
      Warp& candidate = machine.blocks[c / warps]->warps[c % warps];
      any_running = true;
      any_at_dependencies |= candidate.at_dependencies != 0;
      if (candidate.ready && (!warp || candidate.priority > warp->priority)) warp = &candidate;
    }
    if (!machine.dependencies_ended && (any_at_dependencies && (!warp || random_below(64) == 0))) {
      machine.dependencies_ended = true;
      if (launch.dependencies_end) launch.dependencies_end();
      for (auto& block : machine.blocks) {
        for (Warp& w : block->warps) {
          w.ready |= w.at_dependencies;
          w.at_dependencies = 0;
        }
      }
      continue;
    }
    if (!warp) {
      if (any_running) machine.error = describe_deadlock();
      return;
    }
    if (random_below(priority_change_odds) == 0) warp->priority = random_below(1 << 30);
    const int rounds = 1 + random_below(longest_run);
    for (int i = 0; i < rounds && warp->ready && machine.error.empty(); ++i) {
      warp->todo = warp->ready;
      machine.rotation = random_below(64);
      current = take_lane(*warp);
      switch_fiber(machine.host, current->fiber);
      if (++machine.statistics.rounds > launch.round_limit) machine.error = "the kernel does not end (round_limit)";
    }
    if (machine.error.empty() && warp->block->exited == threads) end_block(*warp->block);
  }
}

/// Runs `kernel` with `arguments`. Returns nullptr, or what went wrong (valid until the next launch).
template <typename... Parameters, typename... Arguments>
const char* launch(const Launch& launch, void (*kernel)(Parameters...), Arguments&&... arguments) {
  machine.launch = launch;
  std::tuple<std::decay_t<Parameters>...> parameters(std::forward<Arguments>(arguments)...);
  machine.kernel = [kernel, &parameters] { std::apply(kernel, parameters); };
  machine.random_state = launch.seed * 0x2545F4914F6CDD1Du + 1;
  constexpr int kEarlyCopyOdds[] = {0, 0, 16, 2, 1};
  machine.early_copy_odds = kEarlyCopyOdds[random_below(5)];
  machine.dependencies_ended = false;
  machine.error.clear();
  machine.statistics = Statistics();
  machine.prefetches.clear();
#ifdef __SANITIZE_ADDRESS__
  pthread_attr_t attributes;
  void* stack;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &machine.host.stack_bytes);
  pthread_attr_destroy(&attributes);
  machine.host.stack = static_cast<uint8_t*>(stack);
#endif
  try {
    run_grid();
  } catch (const std::bad_alloc&) {
    machine.error = "no memory for the threads' stacks";
  }
  // Not kept for the next launch: two mappings a stack, and a process has 65,530 for all the libraries that it loads.
  machine.blocks.clear();
  return machine.error.empty() ? nullptr : machine.error.c_str();
}

// ---- memory -------------------------------------------------------------------------------------------------------

/// The first byte of shared memory has this address: not 0, and aligned no better than csrc/ptx.cuh declares.
constexpr uint32_t kSharedBase = 1024 + Block::kAlignment;

inline uint8_t* shared_pointer(const char* operation, uint32_t address, uint32_t bytes, Site site) {
  const int64_t offset = static_cast<int64_t>(address) - kSharedBase;
  if (offset < 0 || offset + bytes > static_cast<int64_t>(machine.launch.shared_bytes)) {
    fail(site, "%s: %u bytes at offset %lld of %zu bytes of shared memory", operation, bytes,
         static_cast<long long>(offset), machine.launch.shared_bytes);
  }
  if (address % bytes) fail(site, "%s: shared address %#x is not a multiple of %u", operation, address, bytes);
  return current->warp->block->shared + offset;
}

/// Fails unless [address, address + bytes) is aligned and inside one registered range.
inline void check_global(const char* operation, const void* address, uint64_t bytes, uint64_t alignment, Site site) {
  static size_t hint = 0;
  const uint8_t* p = static_cast<const uint8_t*>(address);
  if (reinterpret_cast<uintptr_t>(p) % alignment) {
    fail(site, "%s: address %p is not a multiple of %llu", operation, address, (unsigned long long)alignment);
  }
  const std::vector<Range>& ranges = machine.ranges;
  for (size_t i = 0; i < ranges.size(); ++i) {
    if (hint >= ranges.size()) hint = 0;
    if (p >= ranges[hint].begin && p + bytes <= ranges[hint].end) return;
    ++hint;
  }
  if (!ranges.empty()) {
    fail(site, "%s: %llu bytes at %p are in no registered range", operation, (unsigned long long)bytes, address);
  }
}

/// For writes of global memory that the previous grids may still be using.
inline void check_dependencies_ended(const char* operation, Site site) {
  if (machine.launch.dependencies_end && !machine.dependencies_ended) {
    fail(site, "%s: writes global memory before the dependencies have ended", operation);
  }
}

/// For reads through L1 of global memory that the previous grids may still be writing: L1 would keep what was there.
inline void check_waited(const char* operation, Site site) {
  if (machine.launch.dependencies_end && !current->waited_for_dependencies) {
    fail(site, "%s: reads through L1 before the dependencies have ended", operation);
  }
}

inline uint8_t& hidden_flag(const uint8_t* shared) {
  Block& block = *current->warp->block;
  return block.hidden[(shared - block.shared) / 16];
}

inline void land(Copy& copy) {
  copy.done = true;
  for (int i = 0; i < 16; ++i) {
    if (copy.destination[i] != 0xFF) fail(copy.site, "the destination of a copy was written while it was in flight");
  }
  memcpy(copy.destination, copy.source, copy.bytes);
  memset(copy.destination + copy.bytes, 0, 16 - copy.bytes);
}

/// cp.async. The destination reads as NaN until the copy lands.
inline void copy_async(uint32_t destination, const void* source, Site site) {
  constexpr uint32_t bytes = 16;
  uint8_t* p = shared_pointer("copy_async", destination, 16, site);
  check_global("copy_async", source, bytes, 16, site);
  memset(p, 0xFF, 16);
  hidden_flag(p) = 1;
  Lane& me = *current;
  machine.statistics.copies += 1;
  machine.statistics.copies_after_launch += me.launched_dependents;
  machine.statistics.copied_bytes += bytes;
  me.copies.push_back({p, source, bytes, me.groups_committed, false, site});
  if (machine.early_copy_odds && random_below(machine.early_copy_odds) == 0) {
    Copy& copy = me.copies[random_below(static_cast<uint32_t>(me.copies.size()))];
    if (!copy.done) land(copy);
  }
}

inline void wait_for_copies(int pending_groups) {
  std::vector<Copy>& copies = current->copies;
  size_t due = 0;
  while (due < copies.size() && copies[due].group < current->groups_committed - pending_groups) ++due;
  for (size_t i = 0; i < due; ++i) {
    if (!copies[i].done) land(copies[i]);
    current->unpublished.push_back(&hidden_flag(copies[i].destination));
  }
  copies.erase(copies.begin(), copies.begin() + due);
}

inline void record_prefetch(const void* address, uint32_t bytes, bool evict_last) {
  machine.statistics.prefetches += 1;
  machine.statistics.prefetched_bytes += bytes;
  machine.prefetches.push_back(
      {reinterpret_cast<uint64_t>(address), bytes, linear(current->warp->block->index, machine.launch.grid),
       linear(current->index, machine.launch.block), evict_last, !current->waited_for_dependencies});
}

}  // namespace emulator

// ---- what Python calls in every library ---------------------------------------------------------------------------

#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default"), used))

/// Declares global memory. Once there is any, every checked access must lie in declared memory.
EMULATOR_EXPORT inline void emulator_add_range(const void* address, int64_t bytes) {
  const uint8_t* p = static_cast<const uint8_t*>(address);
  emulator::machine.ranges.push_back({p, p + bytes});
}
EMULATOR_EXPORT inline void emulator_clear_ranges() { emulator::machine.ranges.clear(); }
EMULATOR_EXPORT inline const int64_t* emulator_statistics() {
  return reinterpret_cast<const int64_t*>(&emulator::machine.statistics);
}
EMULATOR_EXPORT inline const char* emulator_statistics_names() {
#define EMULATOR_NAME(name) #name " "
  return EMULATOR_STATISTICS(EMULATOR_NAME);
#undef EMULATOR_NAME
}
EMULATOR_EXPORT inline const emulator::Prefetch* emulator_prefetches(int64_t* count) {
  *count = static_cast<int64_t>(emulator::machine.prefetches.size());
  return emulator::machine.prefetches.data();
}
