// Who does what. Tiles of phase 1 (of H) are claimed from a counter by running blocks and never wait; a tile of phase 2
// (of y) is begun by a block that found none of phase 1 left. So a block waits only for tiles that running blocks hold:
// any number of resident blocks will do, and launches on two streams cannot block each other. Which block does a tile
// never changes what is computed.
#pragma once

#include "device.h"

namespace mk::cuda {

// In shared memory; the same in every block.
struct Schedule {
  int rank[kMaxLayers];
  int splits[kMaxLayers];      // of K
  int shrink_end[kMaxLayers];  // first tile of phase 1 that no longer belongs to the layer
  int expand_end[kMaxLayers];  // likewise, phase 2, counted from num_shrink
  int ready[kMaxLayers];       // counter of the layer's first row block
  int num_shrink, num_expand, num_tiles, num_ready;
  int ticket[2];  // in turns, so that one barrier for each tile is enough
  int is_last;
};
static_assert(sizeof(Schedule) <= kScheduleBytes, "plan.cpp reserves kScheduleBytes");

MK_DEVICE int inclusive_sum(int value) {
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const int below = static_cast<int>(shuffle_up(static_cast<uint32_t>(value), delta));
    if (lane_index() >= delta) value += below;
  }
  return value;
}
MK_DEVICE int last_lane(int value) { return static_cast<int>(shuffle(static_cast<uint32_t>(value), 31)); }

// By warp 0, a lane for each layer; a block barrier must follow, if only that of claim_tiles().
MK_DEVICE void make_schedule(Schedule* s, const Params& p, int block_m, int block_r, int block_n) {
  if (warp_index() != 0) return;
  const int i = lane_index();
  int rank = 0, rows = 0, tiles = 0, columns = 0;
  if (i < p.num_layers) {
    const Layer& layer = p.layers[i];
    const int R = static_cast<int>(layer.rank);
    const int wanted = layer.rank_ptr ? *layer.rank_ptr : R;
    rank = wanted < 0 ? 0 : wanted > R ? R : wanted;  // nobody has checked what is on the device
    rows = div_up(static_cast<int>(layer.M), block_m);
    tiles = rows * div_up(rank, block_r);
    columns = rows * div_up(static_cast<int>(layer.N), block_n);
  }
  const int unsplit = last_lane(inclusive_sum(tiles));
  const int target = unsplit > 0 && unsplit < p.split_target ? p.split_target / unsplit : 1;
  const int splits = i < p.num_layers && target > p.max_splits[i] ? p.max_splits[i] : target;
  const int shrink_end = inclusive_sum(tiles * splits), expand_end = inclusive_sum(columns),
            ready = inclusive_sum(rows);
  if (i < p.num_layers) {
    s->rank[i] = rank;
    s->splits[i] = splits;
    s->shrink_end[i] = shrink_end;
    s->expand_end[i] = expand_end;
    s->ready[i] = kFirstArrival + p.split_target + ready - rows;
  }
  if (i == 31) {
    s->num_shrink = shrink_end;
    s->num_expand = expand_end;
    s->num_tiles = shrink_end + expand_end;
    s->num_ready = ready;
  }
}

MK_DEVICE uint32_t first_ticket(const Params& p) {
  return thread_index() == 0 ? atomic_add(p.counters + kTicketCounter, 1) : 0;
}

// A layer and the number of a tile within it.
struct Tile {
  int layer, index;
};
MK_DEVICE Tile find_tile(const int* ends, int index) {
  int layer = 0;
  while (index >= ends[layer]) ++layer;
  return {layer, layer > 0 ? index - ends[layer - 1] : index};
}

// Tells the block that a tile's stores by all of its threads are done, then others.
MK_DEVICE void publish(uint32_t* counter) {
  block_barrier();
  if (thread_index() == 0) add_release(counter, 1);
}

// True in all threads of the block that arrives last of `count`, whose arrival leaves the counter at zero. What the
// others stored before they arrived can then be read.
MK_DEVICE bool arrive(Schedule* s, uint32_t* counter, int count) {
  block_barrier();
  if (thread_index() == 0) {
    s->is_last = static_cast<int>(atomic_add_acq_rel(counter, 1)) == count - 1;
    if (s->is_last) *counter = 0;
  }
  block_barrier();
  return s->is_last;
}

// Until `count` tiles of H have been published.
MK_DEVICE void wait_for_h(const uint32_t* counter, int count) {
  if (thread_index() == 0 && count > 0) wait_until(counter, static_cast<uint32_t>(count));
  block_barrier();
}

// Calls work(index) for the tiles below `end` that this block claims. `next` is thread 0's first ticket; the following
// ones are drawn while a tile is worked on. A block that waits in phase 2 may so hold another tile of phase 2, but
// never one of phase 1, and tiles of phase 1 do not wait. `end` is in shared memory: registers are scarce.
template <class Work>
MK_DEVICE void claim_tiles(Schedule* s, uint32_t* ticket, uint32_t next, const int& end, Work&& work) {
  for (int turn = 0;; turn ^= 1) {
    if (thread_index() == 0) s->ticket[turn] = static_cast<int>(next);
    block_barrier();  // also: the shared memory of the tile before is free
    const int index = s->ticket[turn];
    if (index >= end) return;
    if (thread_index() == 0) next = atomic_add(ticket, 1);
    work(index);
  }
}

// The last block to leave clears the counters for the next launch. Only thread 0 has read or added to them so far.
MK_DEVICE void leave(Schedule* s, const Params& p) {
  if (thread_index() == 0)
    s->is_last = static_cast<int>(atomic_add_acq_rel(p.counters + kExitCounter, 1)) == block_count() - 1;
  block_barrier();
  if (!s->is_last) return;
  if (thread_index() == 0) p.counters[kTicketCounter] = p.counters[kExitCounter] = 0;
  uint32_t* const ready = p.counters + kFirstArrival + p.split_target;
  for (int i = thread_index(); i < s->num_ready; i += thread_count()) ready[i] = 0;
}

}  // namespace mk::cuda
