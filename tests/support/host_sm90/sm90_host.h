// Host twins of csrc/cuda/sm90/ptx.cuh and wgmma.cuh on the machine of simulator.h: the same names, with the meaning
// that the PTX manual gives to the instructions behind them.
#pragma once

#include "simulator.h"

#define MK_INLINE inline

namespace mk::cuda::sm90::ptx {

using sim::Fault;
using sim::machine;
using sim::require;
using TensorMap = sim::TensorMap;

inline int32_t thread_index() { return machine.self().thread; }
inline void trap() { throw sim::Failure("trap"); }
inline void sync_warp() {}
inline int32_t from_lane_0(int32_t value) { return value; }

// --- memory ---
inline uint32_t shared_base() { return sim::kSharedBase; }
inline uint8_t* shared(sim::Block& block, uint32_t address, uint32_t bytes) {
  require(address >= sim::kSharedBase && address + bytes <= block.shared.size(), "outside shared memory");
  return block.shared.data() + address;
}
template <class T>
uint32_t load_read_only(const T* p) {
  require(reinterpret_cast<uintptr_t>(p) % sizeof(T) == 0, "misaligned load");
  return *p;
}
template <class T>
void store(T* to, T value) {
  require(reinterpret_cast<uintptr_t>(to) % sizeof(T) == 0, "misaligned store");
  *to = value;
}
inline void load_words(uint32_t from, uint32_t (&w)[4]) {
  require(from % 16 == 0, "misaligned 16-byte load");
  std::memcpy(w, shared(machine.block(), from, 16), 16);
}
inline void mark_written(sim::Warp& warp, uint32_t address, uint32_t lanes) {
  machine.block().writers[address / 16] |= lanes;
  warp.unfenced.push_back(address / 16);
}
inline void store_words(uint32_t to, const uint32_t (&w)[4]) {
  require(to % 16 == 0, "misaligned 16-byte store");
  std::memcpy(shared(machine.block(), to, 16), w, 16);
  mark_written(machine.block().warps[thread_index() / 32], to, 1u << thread_index() % 32);
}

// Where TMA and wgmma find byte `address` of a tile with the 128-byte swizzle: address bits 4..6 are xored with 7..9
// (CUDA driver API, CU_TENSOR_MAP_SWIZZLE_128B; PTX ISA, "Swizzling modes").
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// --- cluster ---
inline uint32_t cluster_id() { return static_cast<uint32_t>(machine.block().cluster->id); }
inline uint32_t clusters() { return static_cast<uint32_t>(machine.num_clusters()); }
inline uint32_t cluster_rank() { return static_cast<uint32_t>(machine.block().cluster_rank); }
inline void cluster_sync() {
  const int ordinal = machine.self().cluster_syncs++;
  if (machine.fault == (ordinal ? Fault::no_last_cluster_sync : Fault::no_first_cluster_sync)) return;
  sim::Cluster& cluster = *machine.block().cluster;
  machine.meet(cluster.sync, static_cast<int>(cluster.blocks.size() * machine.block().warps.size() * 32));
}

// --- mbarrier ---
inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  require(barrier % 8 == 0, "misaligned barrier");
  shared(machine.block(), barrier, 8);
  const int expected = static_cast<int>(arrivals) - (machine.fault == Fault::early_empty && arrivals > 1);
  require(machine.block().barriers.count(barrier) == 0, "a barrier is initialised twice");
  sim::Barrier& b = machine.block().barriers[barrier];
  b.arrivals = b.pending = expected;
}
inline void fence_barrier_init() {}
inline void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
  const int expected = static_cast<int>(bytes) - (machine.fault == Fault::short_expect ? 128 : 0);
  machine.update(machine.barrier(machine.block(), barrier), 1, expected);
}
inline void mbarrier_arrive_at(uint32_t barrier, uint32_t rank) {
  if (machine.fault == Fault::lost_arrival && rank != cluster_rank()) return;
  sim::Cluster& cluster = *machine.block().cluster;
  require(rank < cluster.blocks.size(), "arrival outside the cluster");
  machine.update(machine.barrier(*cluster.blocks[rank], barrier), 1, 0);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  machine.yield();
  sim::Barrier& b = machine.barrier(machine.block(), barrier);
  if (machine.fault == Fault::parity && parity == 1) return;
  while (b.phase % 2 == parity) machine.wait_in(b.waiters);
}

// --- TMA ---
inline uint64_t evict_first() { return 0; }
inline uint64_t evict_last() { return 0; }
inline void prefetch_map(const TensorMap*) {}

inline bool overlap(uint32_t a, uint32_t a_bytes, uint32_t b, uint32_t b_bytes) {
  return a < b + b_bytes && b < a + a_bytes;
}
inline uint32_t descriptor_address(uint64_t descriptor) { return static_cast<uint32_t>(descriptor & 0x3FFF) << 4; }

// From issue on nobody may read what the box replaces.
inline void check_target(sim::Block& block, uint32_t to, uint32_t bytes) {
  require(block.alive > 0, "TMA writes to a block that has left");
  require(to % 1024 == 0, "a swizzled box must start on 1024 bytes");
  std::memset(shared(block, to, bytes), 0xFF, bytes);
  for (uint32_t piece = to / 16; piece < (to + bytes) / 16; ++piece)
    require(block.writers[piece] == 0, "TMA overwrites what a thread wrote without a proxy fence");
  for (const sim::Warp& warp : block.warps)
    for (const sim::Product& p : warp.products) {
      const uint32_t span = static_cast<uint32_t>(p.n) * 128, a = descriptor_address(p.a), b = descriptor_address(p.b);
      require(!overlap(to, bytes, b, span - 96) && (p.a_in_registers || !overlap(to, bytes, a, 64 * 128 - 96)),
              "TMA overwrites a slot that wgmma still reads");
    }
}

inline void load_box_multicast(const TensorMap* map, uint32_t barrier, uint32_t to, int32_t column, int32_t row,
                               uint16_t mask, uint64_t) {
  require(column % 64 == 0 && column >= 0 && row >= 0, "box off the grid");
  ++(*map->fetches)[{row, column}];
  const uint32_t bytes = static_cast<uint32_t>(map->box_rows) * 128;
  sim::Cluster& cluster = *machine.block().cluster;
  if (machine.fault == Fault::own_multicast) mask = static_cast<uint16_t>(1u << cluster_rank());
  require(mask >> cluster.blocks.size() == 0, "multicast outside the cluster");
  for (sim::Block* target : cluster.blocks) {
    if (!(mask >> target->cluster_rank & 1)) continue;
    check_target(*target, to, bytes);
    machine.post([=] {
      for (int r = 0; r < map->box_rows; ++r)
        for (int c = 0; c < 64; ++c) {
          const int64_t i = row + int64_t{r}, j = column + int64_t{c};
          const uint16_t value = i < map->rows && j < map->columns ? map->data[i * map->stride + j] : uint16_t{0};
          std::memcpy(&target->shared[swizzled(to + static_cast<uint32_t>(r * 128 + c * 2))], &value, 2);
        }
      machine.update(machine.barrier(*target, barrier), 0, -static_cast<int>(bytes));
    });
  }
}
inline void load_box(const TensorMap* map, uint32_t barrier, uint32_t to, int32_t column, int32_t row,
                     uint64_t policy) {
  load_box_multicast(map, barrier, to, column, row, static_cast<uint16_t>(1u << cluster_rank()), policy);
}
inline void store_box(const TensorMap* map, uint32_t from, int32_t column, int32_t row, uint64_t) {
  require(from % 1024 == 0, "a swizzled box must start on 1024 bytes");
  sim::Fiber* const fiber = &machine.self();
  ++fiber->open_stores;
  ++fiber->stores;
  machine.post([=] {
    sim::Block& block = *fiber->block;
    for (int r = 0; r < map->box_rows && row + r < map->rows; ++r)
      for (int c = 0; c < 64 && column + c < map->columns; ++c) {
        const uint32_t address = swizzled(from + static_cast<uint32_t>(r * 128 + c * 2));
        require(block.writers[address / 16] == 0, "TMA stores what a thread wrote without a proxy fence");
        const int64_t at = (row + int64_t{r}) * map->stride + column + c;
        std::memcpy(const_cast<uint16_t*>(map->data) + at, shared(block, address, 2), 2);
        ++(*map->writes)[static_cast<size_t>(at)];
      }
    if (--fiber->stores == 0) machine.wake(fiber->store_waiters);
  });
}
inline void commit_stores() { machine.self().open_stores = 0; }
inline void wait_stores_read() {
  sim::Fiber& fiber = machine.self();
  require(fiber.open_stores == 0, "wait for stores that are not committed");
  if (machine.fault == Fault::no_store_wait) return;
  while (fiber.stores > 0) machine.wait_in(fiber.store_waiters);
}
inline void fence_async() {
  if (machine.fault == Fault::no_proxy_fence) return;
  sim::Block& block = machine.block();
  auto& unfenced = block.warps[thread_index() / 32].unfenced;
  const uint32_t lane = 1u << thread_index() % 32;
  const auto fenced = [&](uint32_t piece) { return (block.writers[piece] &= ~lane) == 0; };
  unfenced.erase(std::remove_if(unfenced.begin(), unfenced.end(), fenced), unfenced.end());
}

// --- warpgroups ---
template <int>
void give_registers() {}
template <int>
void take_registers() {}
template <int BARRIER, int THREADS>
void sync_threads() {
  if (machine.fault == Fault::no_named_barrier) return;
  machine.meet(machine.block().named[BARRIER], THREADS);
}

// Lane 8 m + i has the address of row i of matrix m; register m of lane l are two elements of row l / 4 of matrix m.
inline void stmatrix(uint32_t address, const uint32_t (&f)[4]) {
  require(address % 16 == 0, "misaligned stmatrix");
  sim::Warp& warp = machine.block().warps[thread_index() / 32];
  const int lane = thread_index() % 32;
  warp.addresses[lane] = address;
  std::copy(f, f + 4, warp.values[lane]);
  if (warp.rendezvous.arrived == 31) {
    for (uint32_t row = 0; row < 32; ++row) {
      uint8_t* const to = shared(machine.block(), warp.addresses[row], 16);
      for (uint32_t i = 0; i < 4; ++i) std::memcpy(to + 4 * i, &warp.values[row % 8 * 4 + i][row / 8], 4);
      mark_written(warp, warp.addresses[row], 0xFu << row % 8 * 4);
    }
  }
  machine.meet(warp.rendezvous, 32);
}

// --- numbers ---
inline float exp(float x) { return std::exp(x); }
inline float divide(float a, float b) { return a / b; }

template <bool BF16>
float unpack(uint32_t bits) {
  if constexpr (BF16) {
    const uint32_t wide = bits << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  } else {
    const auto narrow = static_cast<uint16_t>(bits);
    _Float16 value;
    std::memcpy(&value, &narrow, 2);
    return static_cast<float>(value);
  }
}
template <bool BF16>
uint16_t round16(float value) {
  uint16_t bits;
  if constexpr (BF16) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    bits = std::isnan(value) ? uint16_t{0x7FFF} : static_cast<uint16_t>((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);
  } else {
    const auto narrow = static_cast<_Float16>(value);
    std::memcpy(&bits, &narrow, 2);
  }
  return bits;
}
template <bool BF16>
uint32_t pack(float low, float high) {
  return round16<BF16>(low) | static_cast<uint32_t>(round16<BF16>(high)) << 16;
}

}  // namespace mk::cuda::sm90::ptx

namespace mk::cuda::sm90 {

inline void wgmma_arm() { sim::machine.self().armed = true; }

// `rows` rows of 16 elements of a K-major operand with the 128-byte swizzle, as its descriptor says.
template <bool BF16>
void read_operand(sim::Block& block, uint64_t descriptor, int first, int rows, float* out) {
  using ptx::require;
  require(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0, "descriptor: expected the 128-byte swizzle, offset 0");
  const auto group_stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
  for (int r = first; r < first + rows; ++r)
    for (int k = 0; k < 16; ++k) {
      const uint32_t linear = ptx::descriptor_address(descriptor) + static_cast<uint32_t>(r / 8) * group_stride +
                              static_cast<uint32_t>(r % 8 * 128 + k * 2);
      const uint32_t address = ptx::swizzled(linear);
      require(block.writers[address / 16] == 0, "wgmma reads what a thread wrote without a proxy fence");
      uint16_t bits;
      std::memcpy(&bits, ptx::shared(block, address, 2), 2);
      *out++ = ptx::unpack<BF16>(bits);
    }
}

// The register fragments of the PTX manual for m64nNk16: matrix A and accumulator D. `quarter`: the warp's rows of 64.
template <bool BF16>
void execute(sim::Block& block, int quarter, const sim::Product& p) {
  static float a[16 * 16], b[256 * 16];
  if (p.a_in_registers) {
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 8; ++e) {
        const int row = lane / 4 + e / 2 % 2 * 8, k = lane % 4 * 2 + e % 2 + e / 4 * 8;
        a[row * 16 + k] = ptx::unpack<BF16>(p.a_registers[lane][e / 2] >> 16 * (e % 2) & 0xFFFF);
      }
  } else {
    read_operand<BF16>(block, p.a, quarter * 16, 16, a);
  }
  read_operand<BF16>(block, p.b, 0, p.n, b);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < p.n / 2; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row * 16 + k] * b[column * 16 + k];
      p.d[lane][i] = p.fresh ? sum : p.d[lane][i] + sum;
    }
  }
}

// The front of the queue happens at some moment after all lanes have issued it.
template <bool BF16>
void schedule(sim::Block* block, size_t i_warp) {
  sim::machine.post([=] {
    sim::Warp& warp = block->warps[i_warp];
    execute<BF16>(*block, static_cast<int>(i_warp % 4), warp.products.front());
    warp.products.pop_front();
    ++warp.executed;
    sim::machine.wake(warp.waiters);
    if (!warp.products.empty() && warp.products.front().issued == 32) schedule<BF16>(block, i_warp);
  });
}

template <bool BF16>
void issue(int n, float* d, bool fresh, uint64_t a, const uint32_t* a_registers, uint64_t b) {
  sim::Fiber& f = sim::machine.self();
  sim::require(f.armed, "wgmma without a fence before it");
  const int lane = f.thread % 32;
  const auto i_warp = static_cast<size_t>(f.thread / 32);
  sim::Warp& warp = f.block->warps[i_warp];
  const size_t at = f.issued++ - warp.executed;
  if (warp.products.size() <= at) {
    warp.products.emplace_back();
    sim::Product& p = warp.products.back();
    p.a_in_registers = a_registers != nullptr;
    p.fresh = fresh;
    p.n = n;
    p.a = a;
    p.b = b;
  }
  sim::Product& p = warp.products[at];
  sim::require(p.n == n && p.a == a && p.b == b, "lanes of a warp issue different wgmma");
  const auto [sum, first] = f.sums.try_emplace(d);
  if (first) {
    sum->second.values.assign(d, d + n / 2);
    std::fill(d, d + n / 2, NAN);
  }
  sum->second.last = f.issued;
  p.d[lane] = sum->second.values.data();
  p.a_registers[lane] = a_registers;
  if (++p.issued == 32 && at == 0) schedule<BF16>(f.block, i_warp);
}

inline void wgmma_commit() {
  sim::Fiber& f = sim::machine.self();
  f.groups.push_back(f.issued);
  f.armed = false;
}
template <int PENDING>
void wgmma_wait() {
  constexpr size_t kept = PENDING;
  sim::Fiber& f = sim::machine.self();
  const size_t pending = kept + (sim::machine.fault == sim::Fault::early_wgmma_wait);
  if (f.groups.size() <= pending) return;
  const uint64_t target = f.groups[f.groups.size() - 1 - pending];
  f.groups.erase(f.groups.begin(), f.groups.end() - static_cast<std::ptrdiff_t>(pending));
  sim::Warp& warp = f.block->warps[static_cast<size_t>(f.thread / 32)];
  while (warp.executed < target) sim::machine.wait_in(warp.waiters);
  for (auto sum = f.sums.begin(); sum != f.sums.end();) {
    if (sum->second.last <= target) {
      std::copy(sum->second.values.begin(), sum->second.values.end(), sum->first);
      sum = f.sums.erase(sum);
    } else {
      ++sum;
    }
  }
}
template <int COUNT>
void wgmma_settle(float (&)[COUNT]) {}

template <bool BF16, int N>
struct Wgmma {
  static void ss(float (&d)[N / 2], uint64_t a, uint64_t b) { issue<BF16>(N, d, false, a, nullptr, b); }
  static void rs(float (&d)[N / 2], const uint32_t* a, uint64_t b) { issue<BF16>(N, d, false, 0, a, b); }
  static void rs_fresh(float (&d)[N / 2], const uint32_t* a, uint64_t b) { issue<BF16>(N, d, true, 0, a, b); }
};

}  // namespace mk::cuda::sm90
