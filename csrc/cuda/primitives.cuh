// The machine instructions that the kernels use: the only place with inline PTX.
//
// With GHOSTED_FAST_EMULATION the same names come from tests/cuda_emulation/emulation.h, and a C++
// compiler compiles the kernels for the host.
#pragma once

#include <cstdint>

#include "../arguments.h"

#ifdef GHOSTED_FAST_EMULATION
#include "emulation.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define GHOSTED_FAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define GHOSTED_FAST_DYNAMIC_SHARED(type, name)                           \
  extern __shared__ __align__(128) unsigned char dynamic_shared_##name[]; \
  type* name = reinterpret_cast<type*>(dynamic_shared_##name)

namespace ghosted_fast {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes to shared memory in the background; zeros if not `wanted`, and then `from` is
// not read.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool wanted) {
  const int bytes = wanted ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(from), "r"(bytes)
               : "memory");
}

// Closes the group of copies that this thread has begun since the last one.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `kPending` of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Loads four 8x8 matrices of 16-bit elements, transposed: lane l gives the address of row l % 8 of
// matrix l / 8 and gets the elements (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4) of each.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// sums[16][8] += left[16][16] * right[16][8] on the tensor cores, with fp32 sums.
template <Dtype kType>
__device__ __forceinline__ void multiply_add_16x8x16(float (&sums)[4], const uint32_t (&left)[4],
                                                     uint32_t right_low, uint32_t right_high) {
  static_assert(kType == Dtype::kBFloat16 || kType == Dtype::kFloat16, "16-bit elements");
  if constexpr (kType == Dtype::kBFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_low), "r"(right_high));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_low), "r"(right_high));
  }
}

// 16 bytes of global memory, read or written in one piece.
__device__ __forceinline__ uint4 load_16_bytes(const void* from) {
  return *reinterpret_cast<const uint4*>(from);
}
__device__ __forceinline__ void store_16_bytes(void* to, uint4 value) {
  *reinterpret_cast<uint4*>(to) = value;
}
// Two neighbouring fp64 sums, in one piece.
__device__ __forceinline__ double2 load_sums(const double* from) {
  return *reinterpret_cast<const double2*>(from);
}
__device__ __forceinline__ void store_sums(double* to, double2 value) {
  *reinterpret_cast<double2*>(to) = value;
}

// To nearest; NaN becomes 0x7fffffff, as in all of the hardware's arithmetic.
__device__ __forceinline__ float round_to_float(double value) { return __double2float_rn(value); }

__device__ __forceinline__ float half_to_float(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

}  // namespace ghosted_fast
#endif
