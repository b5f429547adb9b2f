// The primitives of csrc/cuda/device.h on the CPU, as the weakest machine that the rules allow: shared memory starts as
// NaN, a copy lands at its wait, shuffles and products order nothing, misaligned access aborts.
#pragma once

#include <cmath>

#include "fibers.h"

#define MK_DEVICE inline
#define MK_KERNEL(max_threads, blocks_per_sm) inline void
#define MK_PARAM const

namespace mk::cuda {

using host::relaxed, host::self;

inline int thread_index() { return self().thread; }
inline int thread_count() { return self().block->grid.threads; }
inline int block_index() { return self().block->index; }
inline int block_count() { return self().block->grid.blocks; }
inline bool fault(host::Fault fault) { return host::injection.fault == fault; }

inline void block_barrier() {
  if (self().block->start == 0 && self().barriers_passed++ == host::injection.ordinal &&
      fault(host::Fault::kBlockBarrier))
    return;
  self().block->barrier.wait<host::Edges::kMemory>(static_cast<unsigned>(thread_count()));
}

constexpr int kSharedGap = 32;  // between shared arrays, for the address sanitizer
inline void guard([[maybe_unused]] unsigned char* gap) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(gap, kSharedGap);
#endif
}
inline unsigned char* shared_memory() { return self().block->shared; }

template <int kWords>
auto& exchange(const uint32_t (&words)[kWords]) {
  const auto lane = static_cast<size_t>(thread_index() % 32);
  host::Warp& warp = self().block->warps[static_cast<size_t>(thread_index() / 32)];
  auto& slots = warp.slots[self().exchanges++ % 2];
  for (size_t i = 0; i < kWords; ++i) slots[lane][i].store(words[i], relaxed);
  warp.exchange_barrier.wait<host::Edges::kNone>(32);
  return slots;
}
inline uint32_t shuffle(uint32_t value, int lane) { return exchange({value})[lane][0].load(relaxed); }
inline uint32_t shuffle_up(uint32_t value, int delta) {
  const int lane = thread_index() % 32;
  return exchange({value})[lane >= delta ? lane - delta : lane][0].load(relaxed);
}

inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }
inline float to_float(f16 value) {
  _Float16 half;
  memcpy(&half, &value, 2);
  return static_cast<float>(half);
}
inline void from_float(float& target, float value) { target = value; }
inline void from_float(bf16& target, float value) {
  const uint32_t bits = float_bits(value);
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;  // as cvt.rn.bf16.f32
  target.bits = nan ? uint16_t{0x7FFF} : static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}
inline void from_float(f16& target, float value) {
  const auto half = static_cast<_Float16>(value);
  memcpy(&target, &half, 2);
}
inline uint32_t to_tf32(uint32_t bits) {  // to nearest, ties away from zero
  return (bits & 0x7F800000u) == 0x7F800000u ? bits : (bits + 0x1000u) & ~0x1FFFu;
}

// A device faults here; x86 would not.
inline void require_aligned16(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) host::fail(host::kMisaligned, "misaligned 16-byte access");
}
inline Pack load_shared(const void* source) {
  require_aligned16(source);
  Pack pack;
  memcpy(&pack, source, 16);
  return pack;
}
inline Pack load_streamed(const void* source) { return load_shared(source); }
inline Pack load_exchanged(const Pack* source) { return load_shared(source); }
inline float load_exchanged(const float* source) { return *source; }
inline void store16(void* target, const Pack& pack) {
  require_aligned16(target);
  memcpy(target, &pack, 16);
}

// The old contents go at issue, so that reuse without a barrier is a race here too.
inline void async_copy(void* target, const void* source, int bytes) {
  require_aligned16(target);
  require_aligned16(source);
  host::AsyncCopy copy{target, {}};
  memcpy(copy.data, source, static_cast<size_t>(bytes));
  memset(target, 0xFF, 16);
  self().open_copies.push_back(copy);
}
inline void async_commit() {
  self().copy_groups.push_back(std::move(self().open_copies));
  self().open_copies.clear();
}
template <int kInFlight>
void async_wait() {
  auto& groups = self().copy_groups;
  while (groups.size() > kInFlight && !fault(host::Fault::kAsyncWait)) {
    for (const host::AsyncCopy& copy : groups.front()) memcpy(copy.target, copy.data, 16);
    groups.erase(groups.begin());
  }
}

inline void prefetch([[maybe_unused]] const void* source) {
#if defined(__SANITIZE_ADDRESS__)
  if (__asan_address_is_poisoned(source)) host::fail(host::kWrongResult, "prefetch outside of the factors");
#endif
}
inline void wait_for_kernel_in_front() {
  if (!fault(host::Fault::kWaitForKernelInFront)) host::wait_for_kernel_in_front();
}
inline void let_next_kernel_begin() {}

inline uint32_t add_to_counter(uint32_t* target, uint32_t value, int order) {
  host::scheduler.counter_writes.fetch_add(1, relaxed);
  if (fault(host::Fault::kRelease)) order = __ATOMIC_RELAXED;
  return order == __ATOMIC_ACQ_REL   ? __atomic_fetch_add(target, value, __ATOMIC_ACQ_REL)
         : order == __ATOMIC_RELEASE ? __atomic_fetch_add(target, value, __ATOMIC_RELEASE)
                                     : __atomic_fetch_add(target, value, __ATOMIC_RELAXED);
}
inline uint32_t atomic_add(uint32_t* target, uint32_t value) { return add_to_counter(target, value, __ATOMIC_RELAXED); }
inline uint32_t atomic_add_acq_rel(uint32_t* target, uint32_t value) {
  return add_to_counter(target, value, __ATOMIC_ACQ_REL);
}
inline void add_release(uint32_t* target, uint32_t value) { add_to_counter(target, value, __ATOMIC_RELEASE); }
inline void wait_until(const uint32_t* counter, uint32_t value) {
  if (fault(host::Fault::kWaitForH)) return;
  const host::Word& writes = host::scheduler.counter_writes;
  for (unsigned now = writes.load(relaxed); __atomic_load_n(counter, __ATOMIC_ACQUIRE) != value;
       now = writes.load(relaxed))
    host::wait_for_change(writes, now);
}

inline void load_matrices(uint32_t (&words)[4], const void* row) {
  require_aligned16(row);
  const auto address = reinterpret_cast<uint64_t>(row);
  const auto& slots = exchange({static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32)});
  const int lane = thread_index() % 32;
  for (int i = 0; i < 4; ++i) {
    const auto& from = slots[8 * i + lane / 4];
    const uint64_t start = from[0].load(relaxed) | static_cast<uint64_t>(from[1].load(relaxed)) << 32;
    memcpy(&words[i], reinterpret_cast<const unsigned char*>(start) + lane % 4 * 4, 4);
  }
}

// Fragments as in the PTX manual, lane = 4 * group + t, where a word holds `kPerWord` elements: a holds A(group, t),
// A(group + 8, t), A(group, t + 4), A(group + 8, t + 4) in words, b holds B(t, group), B(t + 4, group), and c holds
// C(group, 2t), C(group, 2t + 1), C(group + 8, 2t), C(group + 8, 2t + 1).
template <int kPerWord, class Value>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Value&& value) {
  const auto& slots = exchange({a[0], a[1], a[2], a[3], b[0], b[1]});
  const int group = thread_index() % 32 / 4, t = thread_index() % 4;
  double rows[2][8 * kPerWord], columns[2][8 * kPerWord];
  for (int k = 0; k < 8 * kPerWord; ++k) {
    const int word = k / kPerWord, owner = word % 4, high = word / 4;
    for (int i = 0; i < 2; ++i) {
      rows[i][k] = static_cast<double>(value(slots[4 * group + owner][2 * high + i].load(relaxed), k % kPerWord));
      columns[i][k] = static_cast<double>(value(slots[4 * (2 * t + i) + owner][4 + high].load(relaxed), k % kPerWord));
    }
  }
  for (int i = 0; i < 4; ++i) {
    double sum = static_cast<double>(c[i]);  // rounded once; a tensor core rounds, or truncates, on the way
    for (int k = 0; k < 8 * kPerWord; ++k) sum += rows[i / 2][k] * columns[i % 2][k];
    c[i] = static_cast<float>(sum);
  }
}
inline uint16_t half_of(uint32_t word, int high) { return static_cast<uint16_t>(high ? word >> 16 : word & 0xFFFFu); }
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<2>(c, a, b, [](uint32_t word, int high) { return to_float(bf16{half_of(word, high)}); });
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<2>(c, a, b, [](uint32_t word, int high) { return to_float(f16{half_of(word, high)}); });
}
// The hardware reads 19 bits of a tf32 operand.
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<1>(c, a, b, [](uint32_t word, int) { return bits_float(word & ~0x1FFFu); });
}

}  // namespace mk::cuda
