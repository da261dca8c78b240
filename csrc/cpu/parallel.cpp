#include "parallel.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace ghosted_fast {
namespace {

// A block this large is given back at once: repeated page faults cost less than holding it.
constexpr size_t kKeptBytes = size_t{192} << 20;
constexpr size_t kHugePage = size_t{2} << 20;

struct Block {
  char* data = nullptr;
  size_t bytes = 0;
  bool in_use = false;
  ~Block() { std::free(data); }
};

// Two: an operator may hold a small block for its tokens or rows and a large one for its panels.
thread_local Block kept_blocks[2];

char* allocate(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* data = std::aligned_alloc(alignment, std::max(rounded, alignment));
  if (data == nullptr) throw std::bad_alloc();
  if (alignment == kHugePage) advise_huge_pages(reinterpret_cast<uintptr_t>(data), rounded);
  return static_cast<char*>(data);
}

}  // namespace

void advise_huge_pages([[maybe_unused]] uintptr_t address, [[maybe_unused]] size_t num_bytes) {
#ifdef MADV_HUGEPAGE
  madvise(reinterpret_cast<void*>(address), num_bytes, MADV_HUGEPAGE);
#endif
}

int64_t num_threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

void run_tasks(int64_t count, int64_t max_threads, void (*task)(void*, int64_t, int64_t),
               void* context) {
  const int64_t threads = std::min(max_threads, count);
  if (threads <= 1) {
    for (int64_t index = 0; index < count; ++index) task(context, index, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      for (int64_t index = next++; index < count; index = next++) task(context, index, slot);
    }
  });
}

Scratch::Scratch(size_t bytes) {
  for (Block& kept : kept_blocks) {
    if (kept.in_use || bytes > kKeptBytes) continue;
    if (kept.bytes < bytes) {
      std::free(std::exchange(kept.data, nullptr));
      kept.bytes = 0;
      kept.data = allocate(bytes);
      kept.bytes = bytes;
    }
    kept.in_use = true;
    block_ = next_ = kept.data;
    return;
  }
  block_ = next_ = allocate(bytes);
}

Scratch::~Scratch() {
  for (Block& kept : kept_blocks) {
    if (block_ == kept.data) {
      kept.in_use = false;
      return;
    }
  }
  std::free(block_);
}

}  // namespace ghosted_fast
