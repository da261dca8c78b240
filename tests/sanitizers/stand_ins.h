// Simple stand-ins for csrc/cpu/parallel.cpp, for one file of a test program: tasks run in order on
// one thread, and scratch memory is NaN at first and never reused.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "parallel.h"

namespace ghosted_fast {

inline int64_t pretended_threads = 2;
inline void (*after_task)() = nullptr;

int64_t num_threads() { return pretended_threads; }

void run_tasks(int64_t count, int64_t max_threads, void (*task)(void*, int64_t, int64_t),
               void* context) {
  for (int64_t i = 0; i < count; ++i) {
    task(context, i, i % (max_threads > 0 ? max_threads : 1));
    if (after_task != nullptr) after_task();
  }
}

Scratch::Scratch(size_t bytes) {
  block_ = next_ = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64));
  std::memset(block_, 0xff, bytes);  // NaN, whatever it is read as
}

Scratch::~Scratch() { std::free(block_); }

}  // namespace ghosted_fast
