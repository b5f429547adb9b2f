// The CPU kernels as the bindings see them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../layer.h"

namespace mk::cpu {

// The caller's thread pool. run() calls body(context, i) for i in 0..n-1: at once, or one after the
// other where the caller is already inside a parallel region, so no body may wait for a later one.
struct Pool {
  int64_t threads;
  void (*run)(int64_t n, void (*body)(void*, int64_t), void* context);
};

// Instruction set the kernels of a dtype use on this machine: "portable", "avx2", "avx512",
// "avx512_bf16", "amx_bf16", "neon", ...; the environment variable MK_CPU_ISA caps it (tests use that).
const char* isa(DType dtype);

// What is wrong with MK_CPU_ISA, naming what it may be, or null. Until that is mended no call is served.
const char* isa_error();

// The instruction sets that MK_CPU_ISA can name here, best last.
const char* available_isas();

// Bytes of packed factors (R, K) and (N, R), 0 where this build cannot pack them.
size_t packed_bytes(int64_t N, int64_t K, int64_t R, DType dtype);

// Write u and v of one layer into `packed` (64-byte aligned) in the order the kernels read them. Zeros follow its R, so
// that rank R is exact; lower ones need u to be finite up to the next multiple of 32.
void pack(const Layer& layer, DType dtype, void* packed, const Pool& pool);

// A matrix (M, N), rows of stride 1, `stride` elements apart.
struct Rows {
  int64_t M, N;
  const void* data;
  int64_t stride;
};

// out (M, N) = scale weight h / sqrt(mean(h^2) + eps) of every row h.
void normalise(const Rows& h, void* out, const void* weight, float eps, float scale, DType dtype, const Pool& pool);

// Run n layers in one parallel region. packed[i] is null (factors as they are) or what pack() wrote.
// Returns null, or a literal that says why the call cannot be served; then nothing was written.
const char* forward(const Layer* layers, const void* const* packed, int64_t n, DType dtype, const Pool& pool);

}  // namespace mk::cpu
