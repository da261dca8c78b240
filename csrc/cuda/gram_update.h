// gram_update on CUDA tensors, without torch: plain structs in, a CUDA error code out. Nothing is
// allocated here; the caller passes two workspaces on the device.
//
// The order of the calls:
//   gram_update_cuda_set_device    the device of the tensors, for the others
//   gram_update_cuda_serves        can these arguments be served?
//   gram_update_cuda_load          loads all kernels, once per device; not under graph capture
//   gram_update_cuda_begin         checks the tokens and finds their scales, into `tokens`
//   gram_update_cuda_read_status   copies the findings back; the one synchronisation
//   gram_update_cuda_run           adds to the sums, with `operands` as scratch
//
// Under graph capture nothing can be copied back: pass no status. gram_update_cuda_run then assumes
// scales that are not exact, activations of ordinary size and few tokens that own the sums, and NaN
// or infinity goes on into the sums, where the solve refuses it; so does a weight that is none. It
// runs other kernels than a call before the capture did, which some drivers refuse to load then:
// hence gram_update_cuda_load.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../arguments.h"

namespace ghosted_fast {

constexpr int32_t kExponentBias = 4096;
constexpr int kSizeBuckets = 256;

// What the tokens that count are like; found on the device. Exponents e are those of frexp,
// value < 2^e, plus kExponentBias; 0 where all values are 0.
struct GramTokenStatus {
  unsigned long long bad_weight, bad_x, bad_y;  // the first such token; all ones for none
  int32_t x_exponent;                           // of the largest |x|
  int32_t gram_exponent;                        // of the largest |x| times the scale for G
  int32_t cross_exponent;                       // of the largest |target| times the scale for C
  int32_t gram_is_inexact, cross_is_inexact;    // not all scales are powers of two
  // Tokens by the size of their largest product, in G and in C: bucket b has those with products
  // below 4^(b - kSizeBuckets / 2), the first and last those beyond too.
  int32_t gram_sizes[kSizeBuckets], cross_sizes[kSizeBuckets];
};
constexpr unsigned long long kNoToken = ~0ull;

}  // namespace ghosted_fast

extern "C" {
// The runtime that is linked into the extension is not torch's, and need not know what torch's has
// made the current device of this thread.
int gram_update_cuda_set_device(int device);
// Whether rows start at multiples of 16 bytes, widths are multiples of 8, and the current device is
// sm_80 or later.
bool gram_update_cuda_serves(const ghosted_fast::GramArgs* args);
// Whether the stream is being captured into a graph.
bool gram_update_cuda_is_capturing(void* stream);
int gram_update_cuda_load();
size_t gram_update_cuda_token_bytes(const ghosted_fast::GramArgs* args);
int gram_update_cuda_begin(const ghosted_fast::GramArgs* args, void* tokens, void* stream);
int gram_update_cuda_read_status(const void* tokens, ghosted_fast::GramTokenStatus* status,
                                 void* stream);
int gram_update_cuda_read_float(const float* from, float* to, void* stream);
size_t gram_update_cuda_operand_bytes(const ghosted_fast::GramArgs* args,
                                      const ghosted_fast::GramTokenStatus* status);
int gram_update_cuda_run(const ghosted_fast::GramArgs* args,
                         const ghosted_fast::GramTokenStatus* status, const void* tokens,
                         void* operands, void* stream);
const char* gram_update_cuda_error(int code);
}
