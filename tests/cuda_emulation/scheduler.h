// Runs a CUDA grid on the host: one block at a time, one fiber per thread, in warps whose order is
// shuffled at every step. A fiber gives way at barriers and at instructions of a whole warp; it is
// an error, and ends the program, if a block can go no further.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if !defined(__x86_64__)
#error "the fibers are written for x86-64"
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 64 << 10;

enum class State : uint8_t { kReady, kAtWarp, kAtBarrier, kDone };

// A copy from global to shared memory that is under way.
struct PendingCopy {
  void* to;
  const void* from;
  bool wanted;
};

struct Fiber {
  void* stack_pointer = nullptr;
  State state = State::kReady;
  dim3 thread;
  int lane = 0, warp = 0;
  std::vector<PendingCopy> copies;
  std::vector<int> groups;  // number of copies in each group that is closed, the oldest first
  int open_copies = 0;
};

struct Warp {
  int arrived = 0, live = 0;
  const char* instruction = nullptr;
  void* arguments[kWarpSize] = {};
};

// What a launch did.
struct Counters {
  long long multiply_adds = 0;     // of the tensor cores
  long long bytes_read = 0;        // from global memory, 16 at a time
  long long bytes_written = 0;     // to global memory, 16 at a time
  long long matrix_rows = 0;       // groups of eight rows that ldmatrix read
  long long conflicting_rows = 0;  // those that hit a bank twice
  long long blocks = 0;
  long long atomics = 0;
  long long largest_shared_bytes = 0;
  long long first_block = 0, last_block = 0;  // multiply-adds in the last launch that had any
};

inline Fiber* current = nullptr;
inline void* scheduler_stack_pointer = nullptr;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline std::vector<char> stacks;
inline dim3 grid_size, block_size, block_index;
inline const std::function<void()>* kernel = nullptr;
inline unsigned char* shared = nullptr;
inline size_t shared_limit = 48 << 10;
inline int last_error = 0;
inline int live_threads = 0, at_barrier = 0;
inline uint64_t shuffle_state = 1;
// What is in memory that nobody has written: NaN, or with 0x3f finite numbers of ordinary size.
inline int garbage = 0xff;
inline bool capturing = false;
inline std::vector<const void*> loaded_kernels;
inline int compute_capability_major = 8;
// The current device as this runtime has it, which torch's knows nothing of.
inline int current_device = 0, device_of_tensors = 0;
// Of the tensor cores: products that are added at once, and the bits below the largest that each
// term keeps; 0 for all of them.
inline int adder_terms = 8, adder_bits = 0;
inline Counters counters;

// Saves the registers that a call preserves and the stack pointer, and continues on another stack.
extern "C" void emulation_switch(void** save, void* to);
asm(R"(.text
.weak emulation_switch
.type emulation_switch,@function
emulation_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulation_switch,.-emulation_switch
)");

[[noreturn]] inline void die(const char* problem) {
  std::fprintf(stderr, "emulation: %s (block %u, thread %u)\n", problem, block_index.x,
               current == nullptr ? 0 : current->thread.x);
  std::abort();
}

inline void give_way() { emulation_switch(&current->stack_pointer, scheduler_stack_pointer); }

inline void run_fiber() {
  (*kernel)();
  if (current->open_copies != 0) die("a thread ended with copies that it never committed");
  current->state = State::kDone;
  --live_threads;
  --warps[current->warp].live;
  give_way();
  die("a thread that had ended went on");
}

// One instruction of a whole warp: every lane hands in its argument, and the last to arrive runs
// `execute` for all.
template <class Execute>
void warp_instruction(const char* name, void* argument, Execute execute) {
  Warp& warp = warps[current->warp];
  warp.arguments[current->lane] = argument;
  if (warp.arrived == 0) warp.instruction = name;
  if (std::strcmp(warp.instruction, name) != 0) die("the lanes of a warp diverged");
  if (++warp.arrived < warp.live) {
    current->state = State::kAtWarp;
    give_way();
    return;
  }
  if (warp.live != kWarpSize) die("an instruction of a whole warp after some lanes ended");
  execute(warp.arguments);
  warp.arrived = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    fibers[current->warp * kWarpSize + lane].state = State::kReady;
  }
}

inline void barrier() {
  current->state = State::kAtBarrier;
  ++at_barrier;
  give_way();
}

inline uint64_t random_number() {
  shuffle_state = shuffle_state * 6364136223846793005ull + 1442695040888963407ull;
  return shuffle_state >> 33;
}

inline void start_block() {
  const size_t threads = static_cast<size_t>(block_size.x) * block_size.y * block_size.z;
  if (threads % kWarpSize != 0) die("a block that is no multiple of a warp");
  fibers.assign(threads, Fiber{});
  warps.assign(threads / kWarpSize, Warp{});
  stacks.resize(threads * kStackBytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stacks.data(), stacks.size());  // left by the block before
#endif
  live_threads = static_cast<int>(threads);
  at_barrier = 0;
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.thread = dim3(static_cast<unsigned>(i), 0, 0);
    fiber.lane = static_cast<int>(i) % kWarpSize;
    fiber.warp = static_cast<int>(i) / kWarpSize;
    ++warps[fiber.warp].live;
    const uintptr_t top = reinterpret_cast<uintptr_t>(stacks.data() + (i + 1) * kStackBytes);
    void** slot = reinterpret_cast<void**>((top & ~uintptr_t{15}) - 16);
    *--slot = nullptr;  // where run_fiber would return to
    *--slot = reinterpret_cast<void*>(&run_fiber);
    for (int saved = 0; saved < 6; ++saved) *--slot = nullptr;
    fiber.stack_pointer = slot;
  }
}

// Runs the lanes of a warp until each waits.
inline bool run_warp(int warp) {
  bool ran = false;
  for (bool again = true; again;) {
    again = false;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      Fiber& fiber = fibers[warp * kWarpSize + lane];
      if (fiber.state != State::kReady) continue;
      current = &fiber;
      ran = again = true;
      emulation_switch(&scheduler_stack_pointer, fiber.stack_pointer);
    }
  }
  return ran;
}

inline void run_block() {
  start_block();
  std::vector<int> order(warps.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  while (live_threads > 0) {
    for (size_t i = order.size() - 1; i > 0; --i) {
      std::swap(order[i], order[random_number() % (i + 1)]);
    }
    bool progress = false;
    for (const int warp : order) progress |= run_warp(warp);
    if (live_threads > 0 && at_barrier == live_threads) {
      at_barrier = 0;
      for (Fiber& fiber : fibers) {
        if (fiber.state == State::kAtBarrier) fiber.state = State::kReady;
      }
      progress = true;
    }
    if (live_threads > 0 && !progress) die("deadlock: some threads never reach a barrier");
  }
}

constexpr int kInvalidValue = 1, kCaptureUnsupported = 900;

// The machine code of a kernel is loaded when it is first asked for; not while a graph is captured,
// as some drivers have it.
inline int load_kernel(const void* function) {
  const auto end = loaded_kernels.end();
  if (std::find(loaded_kernels.begin(), end, function) != end) return 0;
  if (capturing) return kCaptureUnsupported;
  loaded_kernels.push_back(function);
  return 0;
}

inline void launch(const void* function, dim3 grid, dim3 block, size_t shared_bytes,
                   const std::function<void()>& body) {
  if (current_device != device_of_tensors) die("a launch on another device than the tensors'");
  last_error = load_kernel(function);
  if (last_error != 0) return;
  if (shared_bytes > shared_limit || block.x > 1024 || grid.x == 0) {
    last_error = kInvalidValue;
    return;
  }
  counters.largest_shared_bytes =
      std::max(counters.largest_shared_bytes, static_cast<long long>(shared_bytes));
  grid_size = grid;
  block_size = block;
  kernel = &body;
  block_index = dim3(0, 0, 0);
  for (; block_index.x < grid.x; ++block_index.x) {
    ++counters.blocks;
    // Exactly as large as asked for, so that the address sanitizer sees its end.
    void* allocated = nullptr;
    if (posix_memalign(&allocated, 128, std::max<size_t>(shared_bytes, 1)) != 0) die("no memory");
    shared = static_cast<unsigned char*>(allocated);
    std::memset(shared, garbage, shared_bytes);
    const long long before = counters.multiply_adds;
    run_block();
    const long long done = counters.multiply_adds - before;
    if (done > 0) counters.last_block = done;
    if (done > 0 && block_index.x == 0) counters.first_block = done;
    std::free(shared);
    shared = nullptr;
  }
  current = nullptr;
}

}  // namespace emulation
