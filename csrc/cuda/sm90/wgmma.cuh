// wgmma m64nNk16, float32 accumulators, both operands 16-bit and K-major. B is in shared memory, A there (product_ss)
// or in registers (product_rs). Written out per N because the operand list of an asm statement is a literal.
#pragma once

#include <cstdint>

namespace mk::cuda::sm90 {

// A wgmma in flight owns its registers. `arm` orders earlier writes to them before it; after `wait` the compiler must
// not use a value it read before, so each accumulator is passed through an empty asm (`settle`).
__device__ __forceinline__ void wgmma_arm() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
template <int COUNT>
__device__ __forceinline__ void wgmma_settle(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <bool BF16, int N>
struct Wgmma;

// clang-format off
#define MK_D_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MK_D_64 \
  MK_D_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MK_D_96 \
  MK_D_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MK_D_128 \
  MK_D_96 ", " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// Operand lists: M is "+f" (add to d) or "=f" (d is written only, so that its old value occupies no registers).
#define MK_ACC_4(M, i) M(d[i]), M(d[i + 1]), M(d[i + 2]), M(d[i + 3])
#define MK_ACC_16(M, i) MK_ACC_4(M, i), MK_ACC_4(M, i + 4), MK_ACC_4(M, i + 8), MK_ACC_4(M, i + 12)
#define MK_ACC_32(M) MK_ACC_16(M, 0), MK_ACC_16(M, 16)
#define MK_ACC_64(M) MK_ACC_32(M), MK_ACC_16(M, 32), MK_ACC_16(M, 48)
#define MK_ACC_96(M) MK_ACC_64(M), MK_ACC_16(M, 64), MK_ACC_16(M, 80)
#define MK_ACC_128(M) MK_ACC_96(M), MK_ACC_16(M, 96), MK_ACC_16(M, 112)

// P0 .. P4: numbers of the operands after the accumulators.
#define MK_WGMMA_SS(TYPE, N, COUNT, P0, P1)                                                                    \
  static __device__ __forceinline__ void ss(float (&d)[COUNT], uint64_t a, uint64_t b) {                       \
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                                    \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" MK_D_##COUNT "}, "       \
                 "%" #P0 ", %" #P1 ", p, 1, 1, 0, 0;\n}"                                                       \
                 : MK_ACC_##COUNT("+f") : "l"(a), "l"(b));                                                     \
  }
#define MK_WGMMA_RS(NAME, M, SET, TYPE, N, COUNT, P0, P1, P2, P3, P4)                                          \
  static __device__ __forceinline__ void NAME(float (&d)[COUNT], const uint32_t* a, uint64_t b) {              \
    asm volatile("{\n.reg .pred p;\n" SET "\n"                                                                 \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" MK_D_##COUNT "}, "       \
                 "{%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", p, 1, 1, 0;\n}"                          \
                 : MK_ACC_##COUNT(M)                                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                        \
  }
#define MK_WGMMA_BOTH_RS(TYPE, N, COUNT, ...)                                                                  \
  MK_WGMMA_RS(rs, "+f", "setp.eq.u32 p, 0, 0;", TYPE, N, COUNT, __VA_ARGS__)                                   \
  MK_WGMMA_RS(rs_fresh, "=f", "setp.ne.u32 p, 0, 0;", TYPE, N, COUNT, __VA_ARGS__)
#define MK_WGMMA_TYPE(IS_BF16, TYPE)                                                                           \
  template <> struct Wgmma<IS_BF16, 64> {                                                                      \
    MK_WGMMA_SS(TYPE, 64, 32, 32, 33) MK_WGMMA_BOTH_RS(TYPE, 64, 32, 32, 33, 34, 35, 36) };                    \
  template <> struct Wgmma<IS_BF16, 128> {                                                                     \
    MK_WGMMA_SS(TYPE, 128, 64, 64, 65) };                                                                      \
  template <> struct Wgmma<IS_BF16, 192> { MK_WGMMA_SS(TYPE, 192, 96, 96, 97) };                               \
  template <> struct Wgmma<IS_BF16, 256> { MK_WGMMA_SS(TYPE, 256, 128, 128, 129) };

MK_WGMMA_TYPE(true, "bf16")
MK_WGMMA_TYPE(false, "f16")
// clang-format on

#undef MK_D_32
#undef MK_D_64
#undef MK_D_96
#undef MK_D_128
#undef MK_ACC_4
#undef MK_ACC_16
#undef MK_ACC_32
#undef MK_ACC_64
#undef MK_ACC_96
#undef MK_ACC_128
#undef MK_WGMMA_SS
#undef MK_WGMMA_RS
#undef MK_WGMMA_BOTH_RS
#undef MK_WGMMA_TYPE

}  // namespace mk::cuda::sm90
