// Row kernel for sm_90a. A block owns 64 or 128 rows of x and y: one producer warpgroup fills a ring of shared-memory
// slots by TMA, one or two consumer warpgroups of 64 rows each run
//
//   H = x v[:r]^T          wgmma, both operands from shared memory, H (64, width) in registers
//   y = act(H u^T + bias)  wgmma with H, rounded to 16 bits, as register operand; tiles of y leave by TMA
//
// The blocks of a cluster have different rows and the same u and v: each fetches a part of every tile for all of them.
// row_program.h has the order of events, row_layout.h the index arithmetic. Instructions are behind ptx.cuh and
// wgmma.cuh; with the twins of tests/support/host_sm90 this file runs on the CPU, thread by thread.
#pragma once

#ifdef MK_HOST_DEVICE
#include "sm90_host.h"
#else
#include "ptx.cuh"
#include "wgmma.cuh"
#endif
#include "row_arguments.h"
#include "row_layout.h"
#include "row_program.h"

namespace mk::cuda::sm90 {

// A block starts with as many registers per thread as its launch bounds leave it. Where that is too few for a
// consumer, the producer hands over most of its own; a single block of 256 threads per SM has enough.
template <int WIDTH, int GROUPS>
struct Registers {
  static constexpr bool MOVE = GROUPS == 2 || make_tile(WIDTH, GROUPS).blocks_per_sm == 2;
  static constexpr int PRODUCER = 40, CONSUMER = GROUPS == 2 ? 232 : 216;
};

// Addresses and barriers of the ring, the same in every block of the cluster.
struct Slots {
  uint32_t base, slot_bytes, barriers;
  MK_INLINE uint32_t data(int slot) const { return base + slot * slot_bytes; }
  MK_INLINE uint32_t full(int slot) const { return barriers + slot * 8; }
  MK_INLINE uint32_t empty(int slot) const { return barriers + (kMaxStages + slot) * 8; }
};

template <int WIDTH_, int GROUPS_>
struct ProducerOps {
  static constexpr int WIDTH = WIDTH_, GROUPS = GROUPS_;
  const RowMaps& maps;
  Slots slots;
  int32_t cluster, block_rank;
  uint64_t once, often;  // cache policies of x and of the factors

  MK_INLINE void wait_empty(int slot, uint32_t parity) { ptx::mbarrier_wait(slots.empty(slot), parity); }
  MK_INLINE void expect(int slot, uint32_t bytes) { ptx::mbarrier_expect(slots.full(slot), bytes); }
  MK_INLINE void load_x(int slot, int32_t column, int32_t row) {
    ptx::load_box(&maps.x, slots.full(slot), slots.data(slot), column, row, once);
  }
  MK_INLINE void load_v(int slot, int32_t column) {
    constexpr Tile tile = make_tile(WIDTH, GROUPS);
    const int32_t rows = tile.width / cluster, first = block_rank * rows;
    load_shared(&maps.v, slot, slots.data(slot) + tile.x_bytes + first * kSwizzleBytes, column, first);
  }
  MK_INLINE void load_u(int slot, int32_t row) {
    const int32_t rows = kBlockN / cluster, first = block_rank * rows;
#pragma unroll
    for (int k16 = 0; k16 < WIDTH / 16; k16 += kChunk / 16) {
      const uint32_t to = slots.data(slot) + u_tile_offset(k16) + first * kSwizzleBytes;
      load_shared(&maps.u, slot, to, k16 * 16, row + first);
    }
  }

 private:
  MK_INLINE void load_shared(const ptx::TensorMap* map, int slot, uint32_t to, int32_t column, int32_t row) {
    if (cluster == 1) {
      ptx::load_box(map, slots.full(slot), to, column, row, often);
    } else {
      const uint16_t everyone = static_cast<uint16_t>((1u << cluster) - 1);
      ptx::load_box_multicast(map, slots.full(slot), to, column, row, everyone, often);
    }
  }
};

template <Activation A>
MK_INLINE float activate(float z) {
  if constexpr (A == Activation::relu) return z < 0.0f ? 0.0f : z;  // keeps a NaN
  if constexpr (A == Activation::gelu) return 0.5f * z * (1.0f + erff(z * 0.70710678118654752f));
  if constexpr (A == Activation::gelu_tanh) {
    // 0.5 z (1 + tanh(s)) = z / (1 + exp(-2 s)), s = sqrt(2 / pi) (z + 0.044715 z^3)
    const float s = 0.79788456080286536f * z * (1.0f + 0.044715f * z * z);
    return ptx::divide(z, 1.0f + ptx::exp(-2.0f * s));
  }
  if constexpr (A == Activation::silu) return ptx::divide(z, 1.0f + ptx::exp(-z));
  return z;
}

MK_INLINE int32_t active_rank(const RowParams& p) {
  if (!p.rank_ptr) return p.rank;
  const int32_t rank = *p.rank_ptr;
  return rank < 0 ? 0 : rank < p.rank ? rank : p.rank;
}

template <bool BF16, int WIDTH_, int GROUPS_>
struct ConsumerOps {
  static constexpr int WIDTH = WIDTH_, GROUPS = GROUPS_;
  const RowMaps& maps;
  const RowParams& params;
  const Slots slots;
  const uint32_t stage;  // this warpgroup's staging tile
  const int32_t cluster, warpgroup, thread, rank;
  const uint64_t once;
  float h_sum[WIDTH / 2];       // accumulators: row and column as in row_layout.h
  uint32_t h[WIDTH / 4];        // H as A operand, 4 registers per 16 columns
  float y_sum[2][kBlockN / 2];  // one tile is stored while the products of the next run
  uint32_t bias[kBlockN / 8];

  MK_INLINE ConsumerOps(const RowMaps& maps_, const RowParams& params_, const Slots& slots_, int32_t cluster_,
                        int32_t warpgroup_)
      : maps(maps_),
        params(params_),
        slots(slots_),
        stage(slots_.base + out_offset(warpgroup_)),
        cluster(cluster_),
        warpgroup(warpgroup_),
        thread(ptx::thread_index() % 128),
        rank(active_rank(params_)),
        once(ptx::evict_first()) {}
  static MK_INLINE uint32_t out_offset(int32_t warpgroup_) {
    constexpr Tile tile = make_tile(WIDTH, GROUPS);
    return tile.out_offset + warpgroup_ * tile.out_bytes;
  }

  MK_INLINE int32_t group() const { return warpgroup; }
  MK_INLINE void wait_full(int slot, uint32_t parity) { ptx::mbarrier_wait(slots.full(slot), parity); }
  // One arrival per warp in each block, when the warp is done with the slot.
  MK_INLINE void release(int slot) {
    const int32_t lane = thread % 32;
    if (lane < cluster) ptx::mbarrier_arrive_at(slots.empty(slot), lane);
  }

  // Zeroed rather than overwritten by the first product: the old value would stay alive through the expand.
  MK_INLINE void clear_h() {
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) h_sum[i] = 0.0f;
  }
  MK_INLINE void shrink(int slot) {
    constexpr Tile tile = make_tile(WIDTH, GROUPS);
    const uint64_t x = matrix_descriptor(slots.data(slot) + warpgroup * kGroupRows * kSwizzleBytes);
    const uint64_t v = matrix_descriptor(slots.data(slot) + tile.x_bytes);
    wgmma_arm();
#pragma unroll
    for (int k16 = 0; k16 < kChunk / 16; ++k16) {
      const uint64_t step = k16 * kDescriptorStepK;
      Wgmma<BF16, WIDTH>::ss(h_sum, x + step, v + step);
    }
    wgmma_commit();
  }
  template <int PENDING>
  MK_INLINE void wait_products() {
    wgmma_wait<PENDING>();
  }
  // Columns from the rank on become exactly zero, also where x is infinite or v, for a rank on the device, is not zero.
  MK_INLINE void round_h() {
    wgmma_settle(h_sum);
#pragma unroll
    for (int reg = 0; reg < WIDTH / 4; ++reg) {
      const int i = a_source(reg), column = accumulator_column(thread, i);
      h[reg] = ptx::pack<BF16>(column < rank ? h_sum[i] : 0.0f, column + 1 < rank ? h_sum[i + 1] : 0.0f);
    }
  }
  // From the registers: few bytes beside x and y, and rows of any alignment.
  MK_INLINE void store_h(int32_t first) {
    if (!params.h) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t column = accumulator_column(thread, a_source(half));
      const int64_t row = first + accumulator_row(thread, a_source(half));
      uint16_t* const to = static_cast<uint16_t*>(params.h) + row * params.stride_hm + column;
      const bool in_pairs = reinterpret_cast<uintptr_t>(to) % 4 == 0;
      const int32_t left = row < params.M ? params.rank - column : 0;
#pragma unroll
      for (int reg = half; reg < WIDTH / 4; reg += 2) {
        const int32_t at = reg / 2 * 8;  // columns further
        if (in_pairs && left >= at + 2) {
          ptx::store(reinterpret_cast<uint32_t*>(to + at), h[reg]);
        } else if (left > at) {
          ptx::store(to + at, static_cast<uint16_t>(h[reg]));
          if (left >= at + 2) ptx::store(to + at + 1, static_cast<uint16_t>(h[reg] >> 16));
        }
      }
    }
  }
  // TMA zero-fills u from R on. Where the rank is on the device, what lies between it and R is cleared here: H is zero
  // there, but zero times NaN is not.
  MK_INLINE bool masks_u() const { return rank < params.rank; }
  MK_INLINE void mask_u(int slot) {
    const int32_t at = warpgroup * 128 + thread;
    for (int32_t piece = rank / 8 + at / kBlockN; piece < WIDTH / 8; piece += GROUPS * 128 / kBlockN) {
      const uint32_t to = slots.data(slot) + u_tile_offset(piece / 2) + piece_offset(at % kBlockN, piece % 8);
      uint32_t words[4] = {0, 0, 0, 0};
      if (piece * 8 < rank) {
        ptx::load_words(to, words);
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] &= keep_below(rank - piece * 8 - 2 * i);
      }
      ptx::store_words(to, words);
    }
  }
  template <int SET>
  MK_INLINE void expand(int slot) {
    const uint32_t u = slots.data(slot);
    wgmma_arm();
#pragma unroll
    for (int k16 = 0; k16 < WIDTH / 16; ++k16) {
      const uint64_t b = matrix_descriptor(u + u_tile_offset(k16)) + k16 % 4 * kDescriptorStepK;
      if (k16 == 0)
        Wgmma<BF16, kBlockN>::rs_fresh(y_sum[SET], h, b);
      else
        Wgmma<BF16, kBlockN>::rs(y_sum[SET], h + 4 * k16, b);
    }
    wgmma_commit();
  }

  // A thread's columns come in pairs; loaded early, so that the latency passes while the products run.
  MK_INLINE void fetch_bias(int32_t first) {
    if (!params.bias) return;
    const uint16_t* const from = static_cast<const uint16_t*>(params.bias);
    const bool in_pairs = reinterpret_cast<uintptr_t>(from) % 4 == 0;
#pragma unroll
    for (int j = 0; j < kBlockN / 8; ++j) {
      const int32_t n = first + accumulator_column(thread, 4 * j);
      if (in_pairs && n + 1 < params.N) {
        bias[j] = ptx::load_read_only(reinterpret_cast<const uint32_t*>(from + n));
      } else {
        bias[j] = n < params.N ? ptx::load_read_only(from + n) : 0;
        if (n + 1 < params.N) bias[j] |= ptx::load_read_only(from + n + 1) << 16;
      }
    }
  }
  MK_INLINE void move_sums() {
    wgmma_settle(y_sum[1]);
#pragma unroll
    for (int i = 0; i < kBlockN / 2; ++i) y_sum[0][i] = y_sum[1][i];
  }

  MK_INLINE void wait_stores() {
    if (thread == 0) ptx::wait_stores_read();
  }
  // Constant numbers: a number in a register claims all 16 barriers.
  MK_INLINE void sync_group() {
    if (GROUPS == 1 || warpgroup == 0)
      ptx::sync_threads<1, 128>();
    else
      ptx::sync_threads<2, 128>();
  }
  MK_INLINE void sync_consumers() { ptx::sync_threads<3, GROUPS * 128>(); }
  MK_INLINE void fence_async() { ptx::fence_async(); }
  template <int SET>
  MK_INLINE void write_y() {
    float (&z)[kBlockN / 2] = y_sum[SET];
    wgmma_settle(z);
    if (params.bias) {
#pragma unroll
      for (int i = 0; i < kBlockN / 2; ++i) z[i] += ptx::unpack<BF16>(i % 2 ? bias[i / 4] >> 16 : bias[i / 4] & 0xFFFF);
    }
    switch (params.activation) {
      case Activation::none:
        return put_y<Activation::none>(z);
      case Activation::relu:
        return put_y<Activation::relu>(z);
      case Activation::gelu:
        return put_y<Activation::gelu>(z);
      case Activation::gelu_tanh:
        return put_y<Activation::gelu_tanh>(z);
      case Activation::silu:
        return put_y<Activation::silu>(z);
    }
  }
  MK_INLINE void send_y(int32_t row, int32_t column) {
    if (thread != 0) return;
    if (row < params.M) ptx::store_box(&maps.y, stage, column, row, once);
    ptx::commit_stores();
  }

 private:
  template <Activation A>
  MK_INLINE void put_y(const float (&z)[kBlockN / 2]) {
#pragma unroll
    for (int j = 0; j < kBlockN / 16; ++j) {
      uint32_t f[4];
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) {
        const int i = 8 * j + 2 * reg;
        f[reg] = ptx::pack<BF16>(activate<A>(z[i]), activate<A>(z[i + 1]));
      }
      put(j, f);
    }
  }
  // 16 columns of the warpgroup's rows into the staging tile.
  MK_INLINE void put(int j, const uint32_t (&f)[4]) {
    const uint32_t lane = thread % 32, row = thread / 32 * 16 + stmatrix_row(lane);
    ptx::stmatrix(stage + piece_offset(row, stmatrix_piece(lane, j)), f);
  }
};

// The whole kernel, for every thread of a grid of blocks of 128 * (GROUPS + 1) threads.
template <bool BF16, int WIDTH, int GROUPS>
MK_INLINE void run_row_kernel(const RowMaps& maps, const RowParams& params, int32_t cluster) {
  using Split = Registers<WIDTH, GROUPS>;
  constexpr Tile tile = make_tile(WIDTH, GROUPS);
  const uint32_t base = ptx::shared_base();
  const Slots slots{base, static_cast<uint32_t>(tile.slot_bytes), base + tile.barrier_offset};
  // The same for all threads of a warp, which only a shuffle tells the compiler.
  const int32_t warpgroup = ptx::from_lane_0(ptx::thread_index() / 128);
  const int32_t block_rank = ptx::cluster_rank();
  const Walk walk{static_cast<int32_t>(ceil_div(params.K, kChunk)),
                  static_cast<int32_t>(ceil_div(params.N, kBlockN)),
                  params.items,
                  params.whole,
                  params.parts,
                  static_cast<int32_t>(ptx::cluster_id()),
                  static_cast<int32_t>(ptx::clusters()),
                  cluster,
                  block_rank};

  if (ptx::thread_index() == 0) {
    if (base % 1024) ptx::trap();  // swizzled tiles start on 1024 bytes
    for (int slot = 0; slot < tile.stages; ++slot) {
      ptx::mbarrier_init(slots.full(slot), full_arrivals());
      ptx::mbarrier_init(slots.empty(slot), empty_arrivals(tile, cluster));
    }
    ptx::fence_barrier_init();
  }
  ptx::sync_warp();
  ptx::cluster_sync();  // no block may signal a barrier that its owner has not initialised

  if (warpgroup == 0) {
    if constexpr (Split::MOVE) ptx::give_registers<Split::PRODUCER>();
    if (ptx::thread_index() == 0) {
      ptx::prefetch_map(&maps.x);
      ptx::prefetch_map(&maps.v);
      ptx::prefetch_map(&maps.u);
      ProducerOps<WIDTH, GROUPS> ops{maps, slots, cluster, block_rank, ptx::evict_first(), ptx::evict_last()};
      produce(walk, ops);
    }
    ptx::sync_warp();
  } else {
    if constexpr (Split::MOVE) ptx::take_registers<Split::CONSUMER>();
    ConsumerOps<BF16, WIDTH, GROUPS> ops(maps, params, slots, cluster, warpgroup - 1);
    consume(walk, ops);
  }
  ptx::cluster_sync();  // a block's shared memory must outlive what others send to it
}

}  // namespace mk::cuda::sm90
