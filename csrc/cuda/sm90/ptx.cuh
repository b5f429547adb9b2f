// The PTX instructions of the row kernel that CUDA C++ has no function for, one wrapper each.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace mk::cuda::sm90::ptx {

#define MK_INLINE __device__ __forceinline__

using TensorMap = CUtensorMap;

MK_INLINE int32_t thread_index() { return threadIdx.x; }
MK_INLINE void trap() { __trap(); }
MK_INLINE void sync_warp() { __syncwarp(); }
MK_INLINE int32_t from_lane_0(int32_t value) { return __shfl_sync(~0u, value, 0); }

// --- memory ---
MK_INLINE uint32_t shared_base() {
  extern __shared__ __align__(1024) unsigned char shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
template <class T>
MK_INLINE uint32_t load_read_only(const T* p) {
  return __ldg(p);
}
template <class T>
MK_INLINE void store(T* to, T value) {
  *to = value;
}
MK_INLINE void load_words(uint32_t from, uint32_t (&w)[4]) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "r"(from)
               : "memory");
}
MK_INLINE void store_words(uint32_t to, const uint32_t (&w)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
               : "memory");
}

// --- cluster ---
MK_INLINE uint32_t cluster_id() {
  uint32_t id;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(id));
  return id;
}
MK_INLINE uint32_t clusters() {
  uint32_t n;
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(n));
  return n;
}
MK_INLINE uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
MK_INLINE void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}

// --- mbarrier ---
MK_INLINE void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Barriers just initialised become visible to the cluster and to TMA.
MK_INLINE void fence_barrier_init() {
  asm volatile(
      "fence.mbarrier_init.release.cluster;\n"
      "fence.proxy.async;" ::
          : "memory");
}
MK_INLINE void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrive at the barrier that lies at the same offset in block `rank` of the cluster.
MK_INLINE void mbarrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// Wait for the completion of the phase with this parity; arrivals may come from anywhere in the cluster.
MK_INLINE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// --- TMA ---
MK_INLINE uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
MK_INLINE uint64_t evict_last() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
MK_INLINE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
MK_INLINE void load_box(const TensorMap* map, uint32_t barrier, uint32_t to, int32_t column, int32_t row,
                        uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "l"(policy)
      : "memory");
}
// The same box into every block of `mask`, at the same offset, completing the barrier of that offset there.
MK_INLINE void load_box_multicast(const TensorMap* map, uint32_t barrier, uint32_t to, int32_t column, int32_t row,
                                  uint16_t mask, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
      "[%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(mask), "l"(policy)
      : "memory");
}
MK_INLINE void store_box(const TensorMap* map, uint32_t from, int32_t column, int32_t row, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3}], [%1], %4;" ::"l"(map),
      "r"(from), "r"(column), "r"(row), "l"(policy)
      : "memory");
}
MK_INLINE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All stores of this thread have read their shared memory.
MK_INLINE void wait_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
MK_INLINE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- warpgroups ---
template <int REGISTERS>
MK_INLINE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
MK_INLINE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int BARRIER, int THREADS>
MK_INLINE void sync_threads() {
  asm volatile("bar.sync %0, %1;" ::"n"(BARRIER), "n"(THREADS) : "memory");
}

MK_INLINE void stmatrix(uint32_t address, const uint32_t (&f)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(f[0]), "r"(f[1]),
               "r"(f[2]), "r"(f[3])
               : "memory");
}

// --- numbers ---
MK_INLINE float exp(float x) { return __expf(x); }
MK_INLINE float divide(float a, float b) { return __fdividef(a, b); }
template <bool BF16>
MK_INLINE uint32_t pack(float low, float high) {
  uint32_t both;
  if constexpr (BF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
  return both;
}
template <bool BF16>
MK_INLINE float unpack(uint32_t bits) {
  if constexpr (BF16) {
    return __uint_as_float(bits << 16);
  } else {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
    return value;
  }
}

}  // namespace mk::cuda::sm90::ptx
