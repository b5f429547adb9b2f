// What producer and consumers do, in order, written once over an `Ops` type: the kernel's (row_kernel.cuh) issues the
// instructions, the test's (test/) executes a model of them under every kind of schedule.
//
// One ring of slots serves both products and all row groups of a block: while consumers are in the last shrink steps
// the first tiles of u arrive, and while they expand the x and v tiles of the next row group do.
#pragma once

#include "row_config.h"

namespace mk::cuda::sm90 {

// The part of the problem that a block walks over.
struct Walk {
  int32_t k_tiles, n_tiles;
  int32_t row_groups;     // of block_m * cluster rows
  int32_t first, stride;  // this cluster's row groups: first, first + stride, ...
  int32_t cluster, block_rank;
};

MK_HD constexpr int32_t row_of(const Walk& w, const Tile& t, int32_t group) {
  return (group * w.cluster + w.block_rank) * t.block_m;
}

// Position in the ring. Barriers complete one phase per round: a consumer waits for the parity of its round, the
// producer for the opposite one, which a fresh barrier counts as complete.
template <int STAGES>
struct Ring {
  int32_t slot = 0;
  uint32_t parity = 0;
  MK_HD void next() {
    if (++slot == STAGES) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Arrivals that complete a phase. A slot is filled by all blocks of the cluster, so the warps of all of them must have
// let go of theirs before one block may write.
MK_HD constexpr uint32_t full_arrivals() { return 1; }
MK_HD constexpr uint32_t empty_arrivals(const Tile& t, int32_t cluster) {
  return static_cast<uint32_t>(cluster * t.groups * 4);
}

// Bytes that land in a slot of one block, from whichever block's request. TMA counts whole boxes, also past the edge.
MK_HD constexpr uint32_t shrink_bytes(const Tile& t) { return static_cast<uint32_t>(t.x_bytes + t.v_bytes); }
MK_HD constexpr uint32_t expand_bytes(const Tile& t) { return static_cast<uint32_t>(t.u_bytes); }

template <class Ops>
MK_HD void produce(const Walk& walk, Ops& ops) {
  constexpr Tile tile = make_tile(Ops::WIDTH, Ops::GROUPS);
  Ring<tile.stages> ring;
  for (int32_t group = walk.first; group < walk.row_groups; group += walk.stride) {
    const int32_t row = row_of(walk, tile, group);
    for (int32_t i_k = 0; i_k < walk.k_tiles; ++i_k, ring.next()) {
      ops.wait_empty(ring.slot, ring.parity ^ 1);
      ops.expect(ring.slot, shrink_bytes(tile));
      ops.load_x(ring.slot, i_k * kChunk, row);
      ops.load_v(ring.slot, i_k * kChunk);
    }
    for (int32_t i_n = 0; i_n < walk.n_tiles; ++i_n, ring.next()) {
      ops.wait_empty(ring.slot, ring.parity ^ 1);
      ops.expect(ring.slot, expand_bytes(tile));
      ops.load_u(ring.slot, i_n * tile.block_n);
    }
  }
}

// Fill the warpgroup's staging tile with `write` and send it. The waits are for the one thread that sends: it knows
// when its last store has read the tile, and the barriers pass that on.
template <class Ops, class Write, class Send>
MK_HD void store_tile(Ops& ops, const Write& write, const Send& send) {
  ops.wait_stores();
  ops.sync_group();
  write();
  ops.fence_async();
  ops.sync_group();
  send();
}

template <class Ops>
MK_HD void consume(const Walk& walk, Ops& ops) {
  constexpr Tile tile = make_tile(Ops::WIDTH, Ops::GROUPS);
  Ring<tile.stages> ring;
  for (int32_t group = walk.first; group < walk.row_groups; group += walk.stride) {
    const int32_t row = row_of(walk, tile, group) + ops.group() * kGroupRows;
    int32_t reading = ring.slot;
    ops.clear_h();
    for (int32_t i_k = 0; i_k < walk.k_tiles; ++i_k, ring.next()) {
      ops.wait_full(ring.slot, ring.parity);
      ops.shrink(ring.slot);
      ops.template wait_products<1>();
      if (i_k > 0) ops.release(reading);
      reading = ring.slot;
    }
    ops.template wait_products<0>();
    ops.release(reading);
    ops.round_h();
    if (ops.stores_h()) {
      for (int32_t i_r = 0; i_r < tile.width; i_r += kChunk) {
        store_tile(ops, [&] { ops.write_h(i_r); }, [&] { ops.send_h(row, i_r); });
      }
    }
    for (int32_t i_n = 0; i_n < walk.n_tiles; ++i_n, ring.next()) {
      ops.fetch_bias(i_n * tile.block_n);
      ops.wait_full(ring.slot, ring.parity);
      ops.expand(ring.slot);
      ops.template wait_products<0>();
      ops.release(ring.slot);
      store_tile(ops, [&] { ops.write_y(); }, [&] { ops.send_y(row, i_n * tile.block_n); });
    }
  }
  ops.wait_stores();
}

}  // namespace mk::cuda::sm90
