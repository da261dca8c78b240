// Threads and scratch memory for the kernels. No templates of the standard library here: the kernel
// files are compiled for several instruction sets, and the linker keeps one copy of such code.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ghosted_fast {

// Threads that torch would use (torch.set_num_threads).
int64_t num_threads();

// Calls task(context, index, slot) once for each index in [0, count), on at most max_threads of
// torch's threads. Two calls that run at the same time have different slots in [0, max_threads).
// Which thread takes which index is not fixed: tasks must not depend on it.
void run_tasks(int64_t count, int64_t max_threads, void (*task)(void*, int64_t, int64_t),
               void* context);

// Asks the system to back [address, address + num_bytes) by huge pages; it may decline.
void advise_huge_pages(uintptr_t address, size_t num_bytes);

// Memory aligned to 64 bytes, not initialised, valid until the object dies. The thread keeps the
// block for the next call of an operator, unless it is large.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Cuts off the next piece, aligned to 64 bytes.
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += bytes_for<T>(count);
    return piece;
  }

  // The bytes that take<T>(count) uses.
  template <class T>
  static constexpr size_t bytes_for(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  }

 private:
  char* block_;
  char* next_;
};

}  // namespace ghosted_fast
