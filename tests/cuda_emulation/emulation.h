// CUDA for the host compiler: what csrc/cuda needs, with the names of csrc/cuda/primitives.cuh.
//
// Pessimistic wherever the hardware leaves a choice: memory is NaN, or as the test wants it, until
// it is written; a background copy ruins its target when it begins and lands only when it is waited
// for; no kernel is loaded under graph capture. NaN is that of the hardware. The tensor cores
// truncate after every eight products, as those of sm_80 were measured to do, or as those of later
// devices may: after sixteen, of which each is cut to few bits below the largest.
#pragma once

#include <cmath>
#include <cstddef>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define threadIdx (emulation::current->thread)
#define blockIdx (emulation::block_index)
#define GHOSTED_FAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)              \
  ((void)(stream), emulation::launch(reinterpret_cast<const void*>(kernel), grid, block, \
                                     shared_bytes, [=] { (kernel)(__VA_ARGS__); }))
#define GHOSTED_FAST_DYNAMIC_SHARED(type, name) \
  type* name = reinterpret_cast<type*>(emulation::shared)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// The runtime.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorStreamCaptureUnsupported = emulation::kCaptureUnsupported
};
struct cudaFuncAttributes {};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
using cudaStream_t = void*;

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  constexpr int kLargest = 163 << 10;  // of sm_80
  if (bytes > kLargest) return cudaErrorInvalidValue;
  emulation::shared_limit = static_cast<size_t>(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* function) {
  return static_cast<cudaError_t>(emulation::load_kernel(function));
}
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  emulation::current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulation::compute_capability_major;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return static_cast<cudaError_t>(emulation::last_error); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid value"
                                        : "operation not permitted when stream is capturing";
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return emulation::capturing ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulation::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// The language.
inline void __syncthreads() { emulation::barrier(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  struct Lane {
    T value, result;
  } own{value, value};
  emulation::warp_instruction("shfl.xor", &own, [distance](void** lanes) {
    for (int lane = 0; lane < emulation::kWarpSize; ++lane) {
      static_cast<Lane*>(lanes[lane])->result = static_cast<Lane*>(lanes[lane ^ distance])->value;
    }
  });
  return own.result;
}

template <class T>
T atomicMin(T* address, T value) {
  ++emulation::counters.atomics;
  const T before = *address;
  *address = std::min(before, value);
  return before;
}
template <class T>
T atomicAdd(T* address, T value) {
  ++emulation::counters.atomics;
  const T before = *address;
  *address = before + value;
  return before;
}
template <class T>
T atomicMax(T* address, T value) {
  ++emulation::counters.atomics;
  const T before = *address;
  *address = std::max(before, value);
  return before;
}

namespace ghosted_fast {

inline void check_alignment(const void* address, const char* problem) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) emulation::die(problem);
}

inline void copy_async_16(void* to, const void* from, bool wanted) {
  check_alignment(to, "cp.async to an address that is no multiple of 16");
  check_alignment(from, "cp.async from an address that is no multiple of 16");
  std::memset(to, 0xff, 16);
  emulation::current->copies.push_back({to, from, wanted});
  ++emulation::current->open_copies;
}

inline void copy_async_commit() {
  emulation::current->groups.push_back(emulation::current->open_copies);
  emulation::current->open_copies = 0;
}

template <int kPending>
void copy_async_wait() {
  emulation::Fiber& fiber = *emulation::current;
  const int landing = static_cast<int>(fiber.groups.size()) - kPending;
  for (int group = 0; group < landing; ++group) {
    const auto end = fiber.copies.begin() + fiber.groups.front();
    for (auto copy = fiber.copies.begin(); copy != end; ++copy) {
      if (copy->wanted) {
        std::memcpy(copy->to, copy->from, 16);
        emulation::counters.bytes_read += 16;
      } else {
        std::memset(copy->to, 0, 16);
      }
    }
    fiber.copies.erase(fiber.copies.begin(), end);
    fiber.groups.erase(fiber.groups.begin());
  }
}

inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  check_alignment(row, "ldmatrix from an address that is no multiple of 16");
  struct Lane {
    uint32_t* to;
    const uint16_t* row;
  } own{to, static_cast<const uint16_t*>(row)};
  emulation::warp_instruction("ldmatrix", &own, [](void** lanes) {
    const auto lane_of = [&](int lane) { return static_cast<Lane*>(lanes[lane]); };
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned groups_of_banks = 0;
      for (int i = 0; i < 8; ++i) {
        const auto address = reinterpret_cast<uintptr_t>(lane_of(matrix * 8 + i)->row);
        groups_of_banks |= 1u << (address / 16 % 8);
      }
      ++emulation::counters.matrix_rows;
      emulation::counters.conflicting_rows += groups_of_banks != 0xff;
      for (int lane = 0; lane < emulation::kWarpSize; ++lane) {
        const uint16_t* first = lane_of(matrix * 8 + lane % 4 * 2)->row;
        const uint16_t* second = lane_of(matrix * 8 + lane % 4 * 2 + 1)->row;
        lane_of(lane)->to[matrix] = first[lane / 4] | static_cast<uint32_t>(second[lane / 4]) << 16;
      }
    }
  });
}

inline float round_to_float(double value) {
  constexpr uint32_t kNaN = 0x7fffffffu;
  float result = static_cast<float>(value);
  if (std::isnan(value)) std::memcpy(&result, &kNaN, sizeof result);
  return result;
}

inline float half_to_float(uint32_t bits) {
  const uint16_t narrow = static_cast<uint16_t>(bits);
  _Float16 value;
  std::memcpy(&value, &narrow, sizeof value);
  return static_cast<float>(value);
}

template <Dtype kType>
double element(uint32_t bits) {
  if (kType == Dtype::kFloat16) return half_to_float(bits);
  const uint32_t wide = bits << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Rounds towards zero.
inline float truncate_to_float(double value) {
  const float rounded = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  bits -= std::fabs(static_cast<double>(rounded)) > std::fabs(value) ? 1 : 0;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Leaves of a number what reaches `kept` bits below the leading bit of 2^exponent.
inline double cut(double value, int exponent, int kept) {
  return std::ldexp(std::trunc(std::ldexp(value, kept - exponent)), exponent - kept);
}

// The sum of some terms, each of which is cut as adders do that align all to the largest.
inline double add_cut(const double* terms, int count) {
  double largest = 0.0, total = 0.0;
  for (int i = 0; i < count; ++i) {
    if (!std::isfinite(terms[i])) return terms[i] - terms[i];
    largest = std::max(largest, std::fabs(terms[i]));
  }
  if (largest == 0.0) return 0.0;
  const int exponent = std::ilogb(largest);
  for (int i = 0; i < count; ++i) total += cut(terms[i], exponent, emulation::adder_bits);
  return total;
}

template <Dtype kType>
void multiply_add_16x8x16(float (&sums)[4], const uint32_t (&left)[4], uint32_t right_low,
                          uint32_t right_high) {
  struct Lane {
    float* sums;
    const uint32_t* left;
    uint32_t right[2];
  } own{sums, left, {right_low, right_high}};
  emulation::warp_instruction("mma", &own, [](void** lanes) {
    emulation::counters.multiply_adds += 16 * 8 * 16;
    double a[16][16], b[16][8];  // [k][row], [k][column]
    float d[16][8];
    for (int lane = 0; lane < emulation::kWarpSize; ++lane) {
      const Lane& from = *static_cast<Lane*>(lanes[lane]);
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int e = 0; e < 2; ++e) {
        for (int half = 0; half < 2; ++half) {
          const int shift = 16 * e;
          a[pair + e][group + 8 * half] = element<kType>(from.left[half] >> shift & 0xffff);
          a[pair + 8 + e][group + 8 * half] = element<kType>(from.left[half + 2] >> shift & 0xffff);
          b[pair + 8 * half + e][group] = element<kType>(from.right[half] >> shift & 0xffff);
          d[group + 8 * half][pair + e] = from.sums[half * 2 + e];
        }
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int step = 0; step < 16; step += emulation::adder_terms) {
        const int end = step + emulation::adder_terms;
        double total[8];
        for (int column = 0; column < 8; ++column) total[column] = d[row][column];
        if (emulation::adder_bits == 0) {
          for (int k = step; k < end; ++k) {
            for (int column = 0; column < 8; ++column) total[column] += a[k][row] * b[k][column];
          }
        } else {
          for (int column = 0; column < 8; ++column) {
            double terms[17] = {total[column]};
            for (int k = step; k < end; ++k) terms[1 + k - step] = a[k][row] * b[k][column];
            total[column] = add_cut(terms, 1 + emulation::adder_terms);
          }
        }
        for (int column = 0; column < 8; ++column)
          d[row][column] = truncate_to_float(total[column]);
      }
    }
    for (int lane = 0; lane < emulation::kWarpSize; ++lane) {
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) {
        static_cast<Lane*>(lanes[lane])->sums[i] = d[group + 8 * (i / 2)][pair + i % 2];
      }
    }
  });
}

inline uint4 load_16_bytes(const void* from) {
  check_alignment(from, "a load of 16 bytes from an address that is no multiple of 16");
  emulation::counters.bytes_read += 16;
  uint4 value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline void store_16_bytes(void* to, uint4 value) {
  check_alignment(to, "a store of 16 bytes to an address that is no multiple of 16");
  emulation::counters.bytes_written += 16;
  std::memcpy(to, &value, sizeof value);
}
inline double2 load_sums(const double* from) {
  check_alignment(from, "a load of two sums from an address that is no multiple of 16");
  emulation::counters.bytes_read += 16;
  return *reinterpret_cast<const double2*>(from);
}
inline void store_sums(double* to, double2 value) {
  check_alignment(to, "a store of two sums to an address that is no multiple of 16");
  emulation::counters.bytes_written += 16;
  *reinterpret_cast<double2*>(to) = value;
}

}  // namespace ghosted_fast
