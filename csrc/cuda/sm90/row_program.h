// What producer and consumers do, in order, written once over an `Ops` type: the kernel's (row_kernel.cuh) issues the
// instructions, which tests/support/host_sm90 executes under many schedules.
//
// One ring of slots serves both products and all row groups of a block: while consumers are in the last shrink steps
// the first tiles of u arrive, and while they expand the x and v tiles of the next row group do.
#pragma once

#include "row_config.h"

namespace mk::cuda::sm90 {

// The part of the problem that a block walks over.
struct Walk {
  int32_t k_tiles, n_tiles;
  int32_t items;          // row groups of block_m * cluster rows, or parts of them
  int32_t whole, parts;   // the first `whole` items are row groups, `parts` of the others are one
  int32_t first, stride;  // this cluster's items: first, first + stride, ...
  int32_t cluster, block_rank;
};

// A row group and the tiles of y that an item makes of it, at least one. The first part stores H.
struct Item {
  int32_t group, n_begin, n_end;
};
MK_HD constexpr Item item_of(const Walk& w, int32_t i) {
  if (i < w.whole) return {i, 0, w.n_tiles};
  const int32_t part = (i - w.whole) % w.parts;
  return {w.whole + (i - w.whole) / w.parts, static_cast<int32_t>(int64_t{w.n_tiles} * part / w.parts),
          static_cast<int32_t>(int64_t{w.n_tiles} * (part + 1) / w.parts)};
}

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

template <class Ops>
using RingOf = Ring<make_tile(Ops::WIDTH, Ops::GROUPS).stages>;

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
  RingOf<Ops> ring;
  for (int32_t i = walk.first; i < walk.items; i += walk.stride) {
    const Item item = item_of(walk, i);
    const int32_t row = row_of(walk, tile, item.group);
    for (int32_t i_k = 0; i_k < walk.k_tiles; ++i_k, ring.next()) {
      ops.wait_empty(ring.slot, ring.parity ^ 1);
      ops.expect(ring.slot, shrink_bytes(tile));
      ops.load_x(ring.slot, i_k * kChunk, row);
      ops.load_v(ring.slot, i_k * kChunk);
    }
    for (int32_t i_n = item.n_begin; i_n < item.n_end; ++i_n, ring.next()) {
      ops.wait_empty(ring.slot, ring.parity ^ 1);
      ops.expect(ring.slot, expand_bytes(tile));
      ops.load_u(ring.slot, i_n * kBlockN);
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
MK_HD void shrink_tiles(const Walk& walk, Ops& ops, RingOf<Ops>& ring) {
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
}

template <int SET, class Ops>
MK_HD void begin_tile(Ops& ops, const RingOf<Ops>& ring) {
  ops.wait_full(ring.slot, ring.parity);
  if (ops.masks_u()) {
    ops.mask_u(ring.slot);
    ops.fence_async();
    ops.sync_consumers();
  }
  ops.template expand<SET>(ring.slot);
}

// Starts the products of the next tile and, while they run, sends tile i_n from the other set of registers.
template <int SET, class Ops>
MK_HD void next_tile(Ops& ops, RingOf<Ops>& ring, int32_t row, int32_t i_n) {
  const int32_t reading = ring.slot;
  ring.next();
  ops.fetch_bias(i_n * kBlockN);
  begin_tile<1 - SET>(ops, ring);
  ops.template wait_products<1>();
  ops.release(reading);
  store_tile(ops, [&] { ops.template write_y<SET>(); }, [&] { ops.send_y(row, i_n * kBlockN); });
}

// The loop leaves with no products in flight: where paths meet, the compiler would serialize those that are.
template <class Ops>
MK_HD void expand_tiles(const Item& item, Ops& ops, RingOf<Ops>& ring, int32_t row) {
  const int32_t last = item.n_end - 1;
  begin_tile<0>(ops, ring);
  for (int32_t i_n = item.n_begin;; i_n += 2) {
    if (i_n == last) {
      ops.template wait_products<0>();
      break;
    }
    next_tile<0>(ops, ring, row, i_n);
    if (i_n + 1 == last) {
      ops.template wait_products<0>();
      ops.move_sums();
      break;
    }
    next_tile<1>(ops, ring, row, i_n + 1);
  }
  ops.release(ring.slot);
  ring.next();
  ops.fetch_bias(last * kBlockN);
  store_tile(ops, [&] { ops.template write_y<0>(); }, [&] { ops.send_y(row, last * kBlockN); });
}

template <class Ops>
MK_HD void consume(const Walk& walk, Ops& ops) {
  constexpr Tile tile = make_tile(Ops::WIDTH, Ops::GROUPS);
  RingOf<Ops> ring;
  for (int32_t i = walk.first; i < walk.items; i += walk.stride) {
    const Item item = item_of(walk, i);
    const int32_t row = row_of(walk, tile, item.group) + ops.group() * kGroupRows;
    shrink_tiles(walk, ops, ring);
    ops.round_h();
    if (item.n_begin == 0) ops.store_h(row);
    expand_tiles(item, ops, ring, row);
  }
  ops.wait_stores();
}

}  // namespace mk::cuda::sm90
