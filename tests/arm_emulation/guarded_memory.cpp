// Arrays that end at a page that nobody may read or write: what AddressSanitizer, which does not
// run on an emulated processor, would find beyond their end. They begin where they must for that.
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <map>
#include <new>

namespace {

struct Mapping {
  void* start = nullptr;
  size_t bytes = 0;
};

std::map<void*, Mapping>& mappings() {
  static std::map<void*, Mapping> all;
  return all;
}

void* map_array(size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t before = (bytes + page - 1) / page * page, all = before + page;
  void* start = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) throw std::bad_alloc();
  char* const guard = static_cast<char*>(start) + before;
  if (mprotect(guard, page, PROT_NONE) != 0) throw std::bad_alloc();
  mappings()[guard - bytes] = {start, all};
  return guard - bytes;
}

void unmap_array(void* array) {
  if (array == nullptr) return;
  const Mapping mapping = mappings().at(array);
  mappings().erase(array);
  munmap(mapping.start, mapping.bytes);
}

}  // namespace

void* operator new[](size_t bytes) { return map_array(bytes); }
void* operator new[](size_t bytes, std::align_val_t) { return map_array(bytes); }
void operator delete[](void* array) noexcept { unmap_array(array); }
void operator delete[](void* array, size_t) noexcept { unmap_array(array); }
void operator delete[](void* array, std::align_val_t) noexcept { unmap_array(array); }
