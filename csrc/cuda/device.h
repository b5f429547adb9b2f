// The primitives that the kernels are written in. Here for CUDA; tests/support/host_cuda/device_host.h has their twins,
// with which the same kernels run on the CPU under sanitizers. MK_HOST_DEVICE chooses.
#pragma once

#include <cmath>
#include <cstdint>

#include "config.h"

namespace mk::cuda {

struct alignas(16) Pack {  // 16 bytes of a row, the lower index in the lower bits
  uint32_t word[4];
};
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace mk::cuda

#ifdef MK_HOST_DEVICE
#include "device_host.h"
#else

#include <cuda_fp16.h>

#define MK_DEVICE __device__ __forceinline__
#define MK_KERNEL(max_threads, blocks_per_sm) __global__ void __launch_bounds__(max_threads, blocks_per_sm)
#define MK_PARAM const __grid_constant__

namespace mk::cuda {

MK_DEVICE int thread_index() { return threadIdx.x; }
MK_DEVICE int thread_count() { return blockDim.x; }
MK_DEVICE int block_index() { return blockIdx.x; }
MK_DEVICE int block_count() { return gridDim.x; }

MK_DEVICE void block_barrier() { __syncthreads(); }

constexpr int kSharedGap = 0;  // bytes between shared arrays, for the address sanitizer
MK_DEVICE void guard(unsigned char*) {}
MK_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char shared[];
  return shared;
}

MK_DEVICE uint32_t shuffle(uint32_t value, int lane) { return __shfl_sync(~0u, value, lane); }
MK_DEVICE uint32_t shuffle_up(uint32_t value, int delta) { return __shfl_up_sync(~0u, value, delta); }
MK_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
MK_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
MK_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }

MK_DEVICE float to_float(float value) { return value; }
MK_DEVICE float to_float(bf16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }
MK_DEVICE float to_float(f16 value) { return __half2float(__ushort_as_half(value.bits)); }
MK_DEVICE void from_float(float& target, float value) { target = value; }
MK_DEVICE void from_float(bf16& target, float value) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(target.bits) : "f"(value));
}
MK_DEVICE void from_float(f16& target, float value) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(target.bits) : "f"(value)); }
MK_DEVICE uint32_t to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(bits_float(bits)));
  return rounded;
}

// Weights and inputs that no block writes. Streamed ones stay out of L1, which they would only sweep. Not ".nc": that
// may read what a line held while the kernel in front of an overlapping launch still wrote it.
MK_DEVICE Pack load_streamed(const void* source) {
  Pack p;
  asm("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(p.word[0]), "=r"(p.word[1]), "=r"(p.word[2]), "=r"(p.word[3])
      : "l"(__cvta_generic_to_global(source)));
  return p;
}
MK_DEVICE Pack load_shared(const void* source) { return *static_cast<const Pack*>(source); }
// What other blocks of this grid wrote: through L2, since L1 is not coherent.
MK_DEVICE float load_exchanged(const float* source) { return __ldcg(source); }
MK_DEVICE Pack load_exchanged(const Pack* source) {
  const uint4 value = __ldcg(reinterpret_cast<const uint4*>(source));
  return {{value.x, value.y, value.z, value.w}};
}
MK_DEVICE void store16(void* target, const Pack& pack) { *static_cast<Pack*>(target) = pack; }

// 16 bytes from global to shared memory, through L2, of which the first `bytes` are read and the others are zeros.
MK_DEVICE void async_copy(void* target, const void* source, int bytes) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(target))),
      "l"(__cvta_generic_to_global(source)), "r"(bytes)
      : "memory");
}
MK_DEVICE void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kInFlight>
MK_DEVICE void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
}

// Into L2, some time; nobody waits for it, and what it finds there may still be written.
MK_DEVICE void prefetch(const void* source) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(source)));
}
// A launch with Params::overlap may begin before the kernel in front of it on the stream has ended. Until all threads
// of a block have passed this, they may look at no memory that any kernel writes.
MK_DEVICE void wait_for_kernel_in_front() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next launch begin, once all blocks have come here; it sees what this one writes after its own wait.
MK_DEVICE void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

MK_DEVICE uint32_t atomic_add(uint32_t* target, uint32_t value) {
  uint32_t old;
  asm volatile("atom.add.relaxed.gpu.u32 %0, [%1], %2;" : "=r"(old) : "l"(target), "r"(value) : "memory");
  return old;
}
MK_DEVICE uint32_t atomic_add_acq_rel(uint32_t* target, uint32_t value) {
  uint32_t old;
  asm volatile("atom.add.acq_rel.gpu.u32 %0, [%1], %2;" : "=r"(old) : "l"(target), "r"(value) : "memory");
  return old;
}
MK_DEVICE void add_release(uint32_t* target, uint32_t value) {
  asm volatile("red.add.release.gpu.u32 [%0], %1;" ::"l"(target), "r"(value) : "memory");
}
// The only way to wait for another block: another loop would never end on the host.
MK_DEVICE void wait_until(const uint32_t* counter, uint32_t value) {
  uint32_t seen;
  do {
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen != value);
}

// Four 8x8 matrices of 16-bit elements, or 8x4 of 32-bit ones: lane 8 i + j gives the address of row j of matrix i,
// and gets word lane % 4 of row lane / 4 of each.
MK_DEVICE void load_matrices(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}

// c (16x8) += a (16 x 32 bytes) b (32 bytes x 8), by a whole warp, fragments as in the PTX manual.
#define MK_MMA(name, shape, types)                                                     \
  MK_DEVICE void name(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm("mma.sync.aligned." shape ".row.col.f32." types                                \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "                          \
        "{%0, %1, %2, %3};"                                                            \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                               \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));           \
  }
MK_MMA(mma_bf16, "m16n8k16", "bf16.bf16")
MK_MMA(mma_f16, "m16n8k16", "f16.f16")
MK_MMA(mma_tf32, "m16n8k8", "tf32.tf32")
#undef MK_MMA

}  // namespace mk::cuda

#endif

namespace mk::cuda {

MK_DEVICE int lane_index() { return thread_index() % 32; }
MK_DEVICE int warp_index() { return thread_index() / 32; }
MK_BOTH int div_up(int a, int b) { return (a + b - 1) / b; }

// How many of the 16 bytes of a piece lie before the end of a row, when `left` bytes are left to it.
MK_DEVICE int piece_bytes(int left) { return left < 0 ? 0 : left < kVectorBytes ? left : kVectorBytes; }

// Takes `bytes` of shared memory.
template <class T>
MK_DEVICE T* carve(unsigned char*& cursor, int bytes) {
  T* const start = reinterpret_cast<T*>(cursor);
  cursor += bytes + kSharedGap;
  guard(cursor - kSharedGap);
  return start;
}

}  // namespace mk::cuda
