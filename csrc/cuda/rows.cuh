// Any number of rows: phase 1 cuts H into tiles by splits of K, phase 2 cuts y into tiles. A tile of y waits for its
// own row block of H only, and fetches the first steps of u before it does.
#pragma once

#include "schedule.cuh"
#include "tile.cuh"

namespace mk::cuda {

// sums = the same place in `count` slots, in their order.
template <int kVector>
MK_DEVICE void add_parts(float (&sums)[kVector], const float* part, int slot, int count) {
#pragma unroll
  for (int e = 0; e < kVector; ++e) sums[e] = 0.f;
#pragma unroll 4
  for (int s = 0; s < count; ++s) {
#pragma unroll
    for (int q = 0; q < kVector; q += 4) {
      const Pack pack = load_exchanged(reinterpret_cast<const Pack*>(part + s * slot + q));
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[q + e] += bits_float(pack.word[e]);
    }
  }
}

// Rounds a tile of H, the sum of `splits` parts in their order, so that it does not depend on who came last: to the
// scratch memory, where columns from r to the end of the tile are zeros, and to the caller's H.
template <class Op, bool kLarge>
MK_DEVICE void store_h(const Layer& layer, typename Op::Element* target, const float* parts, int pitch, int splits,
                       int rows, int m0, int rank0, int rank) {
  using T = typename Op::Element;
  constexpr RowsShape kShape = RowsTile<kLarge>::kShape;
  constexpr int kVector = kVectorBytes / sizeof(T), kPerRow = kShape.block_n / kVector;
  const int64_t stride = h_columns(layer.rank, kShape.block_n);
  for (int i = thread_index(); i < rows * kPerRow; i += RowsTile<kLarge>::kThreads) {
    const int row = i / kPerRow, column = i % kPerRow * kVector;
    const float* const part = parts + row * pitch + column;
    float sums[kVector];
    if (splits > 1) {
      add_parts(sums, part, kShape.slot_floats(), splits);
    } else {
#pragma unroll
      for (int e = 0; e < kVector; ++e) sums[e] = part[e];
    }
    alignas(16) T rounded[kVector];
#pragma unroll
    for (int e = 0; e < kVector; ++e)  // beyond r an infinite x has made 0 * inf
      from_float(rounded[e], rank0 + column + e < rank ? sums[e] : 0.f);
    store16(target + row * stride + column, load_shared(rounded));
    if (!layer.h) continue;
    T* const h = static_cast<T*>(layer.h) + (m0 + row) * layer.stride_hm + rank0 + column;
#pragma unroll
    for (int e = 0; e < kVector; ++e)
      if (rank0 + column + e < rank) h[e] = rounded[e];
  }
}

// Where a tile of phase 1 lies. Looked up again after the products: to keep it meanwhile would cost registers that the
// sums need.
struct ShrinkPlace {
  int layer, rank, splits, split, block, m0, rank0;
};
template <bool kLarge>
MK_DEVICE ShrinkPlace place_shrink(const Schedule* s, int index) {
  constexpr RowsShape kShape = RowsTile<kLarge>::kShape;
  const Tile tile = find_tile(s->shrink_end, index);
  const int rank = s->rank[tile.layer], splits = s->splits[tile.layer], unsplit = tile.index / splits;
  const int tiles_r = div_up(rank, kShape.block_n), block = unsplit / tiles_r;
  return {
      tile.layer, rank, splits, tile.index % splits, block, block * kShape.block_m, unsplit % tiles_r * kShape.block_n};
}

template <class Op, bool kLarge>
MK_DEVICE RowsTile<kLarge> rows_shrink_sum(const Params& p, const Schedule* s, unsigned char* work, int index) {
  using T = typename Op::Element;
  const ShrinkPlace at = place_shrink<kLarge>(s, index);
  const Layer& layer = p.layers[at.layer];
  const int bytes = static_cast<int>(layer.K * sizeof(T)), steps = div_up(bytes, kRowsStepBytes);
  const int first = static_cast<int>(static_cast<int64_t>(steps) * at.split / at.splits);
  const int last = static_cast<int>(static_cast<int64_t>(steps) * (at.split + 1) / at.splits);
  const int offset = first * kRowsStepBytes;
  const int64_t stride_x = layer.stride_xm * static_cast<int64_t>(sizeof(T));
  const int64_t stride_v = layer.stride_vr * static_cast<int64_t>(sizeof(T));
  const Operand x{static_cast<const unsigned char*>(layer.x) + at.m0 * stride_x + offset, stride_x,
                  static_cast<int>(layer.M) - at.m0};
  // Rows of v from r on count as zeros: that is the rank mask.
  const Operand v{static_cast<const unsigned char*>(layer.v) + at.rank0 * stride_v + offset, stride_v,
                  at.rank - at.rank0};
  RowsTile<kLarge> sums = {};
  sums.template run<Op>(work, x, v, last - first, bytes - offset, [] {});
  return sums;
}

// Tile of H; stored by the last of its splits.
template <class Op, bool kLarge>
MK_DEVICE void rows_shrink(const Params& p, Schedule* s, unsigned char* work, int index) {
  using T = typename Op::Element;
  constexpr RowsShape kShape = RowsTile<kLarge>::kShape;
  auto* const staged = reinterpret_cast<float*>(work);
  rows_shrink_sum<Op, kLarge>(p, s, work, index).spread(staged);

  const ShrinkPlace at = place_shrink<kLarge>(s, index);
  const Layer& layer = p.layers[at.layer];
  const int left = static_cast<int>(layer.M) - at.m0, rows = left < kShape.block_m ? left : kShape.block_m;
  const float* parts = staged;
  int pitch = kShape.tile_pitch();
  if (at.splits > 1) {
    const int first = index - at.split;
    float* const slots = p.slots + static_cast<int64_t>(first) * kShape.slot_floats();
    for (int i = thread_index() * 4; i < rows * kShape.block_n; i += kShape.threads() * 4)
      store16(slots + at.split * kShape.slot_floats() + i,
              load_shared(staged + i / kShape.block_n * pitch + i % kShape.block_n));
    if (!arrive(s, p.counters + kFirstArrival + first, at.splits)) return;
    parts = slots;
    pitch = kShape.block_n;
  }
  T* const h = reinterpret_cast<T*>(p.h[at.layer]) + at.m0 * h_columns(layer.rank, kShape.block_n) + at.rank0;
  store_h<Op, kLarge>(layer, h, parts, pitch, at.splits, rows, at.m0, at.rank0, at.rank);
  publish(p.counters + s->ready[at.layer] + at.block);
}

// act(sums + bias) of a staged tile to y, `wide` where whole pieces can be written.
template <class T, class Tiles>
MK_DEVICE void store_y(const Layer& layer, const float* staged, int m0, int n0, bool wide) {
  constexpr RowsShape kShape = Tiles::kShape;
  constexpr int kVector = kVectorBytes / sizeof(T), kPerRow = kShape.block_n / kVector;
  const int M = static_cast<int>(layer.M), N = static_cast<int>(layer.N);
  const T* const bias = static_cast<const T*>(layer.bias);
  for (int i = thread_index(); i < kShape.block_m * kPerRow; i += Tiles::kThreads) {
    const int row = i / kPerRow, column = i % kPerRow * kVector, m = m0 + row, n = n0 + column;
    if (m >= M || n >= N) continue;
    float z[kVector];
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      z[e] = staged[row * kShape.tile_pitch() + column + e];
      if (bias && n + e < N) z[e] += to_float(bias[n + e]);
    }
    activate(z, layer.activation);
    alignas(16) T out[kVector];
#pragma unroll
    for (int e = 0; e < kVector; ++e) from_float(out[e], z[e]);
    T* const y = static_cast<T*>(layer.y) + m * layer.stride_ym + n;
    if (wide) {
      store16(y, load_shared(out));
    } else {
#pragma unroll
      for (int e = 0; e < kVector; ++e)
        if (n + e < N) y[e] = out[e];
    }
  }
}

struct ExpandPlace {
  int layer, rank, block, m0, n0;
};
template <bool kLarge>
MK_DEVICE ExpandPlace place_expand(const Params& p, const Schedule* s, int index) {
  constexpr RowsShape kShape = RowsTile<kLarge>::kShape;
  const Tile tile = find_tile(s->expand_end, index);
  const int tiles_n = div_up(static_cast<int>(p.layers[tile.layer].N), kShape.block_n), block = tile.index / tiles_n;
  return {tile.layer, s->rank[tile.layer], block, block * kShape.block_m, tile.index % tiles_n * kShape.block_n};
}

template <class Op, bool kLarge>
MK_DEVICE RowsTile<kLarge> rows_expand_sum(const Params& p, const Schedule* s, unsigned char* work, int index) {
  using T = typename Op::Element;
  constexpr RowsShape kShape = RowsTile<kLarge>::kShape;
  const ExpandPlace at = place_expand<kLarge>(p, s, index);
  const Layer& layer = p.layers[at.layer];
  // H and u are read up to rank r - 1: what u holds beyond it may be NaN.
  const int bytes = at.rank * static_cast<int>(sizeof(T));
  const int64_t stride_h = h_columns(layer.rank, kShape.block_n) * static_cast<int64_t>(sizeof(T));
  const int64_t stride_u = layer.stride_un * static_cast<int64_t>(sizeof(T));
  const Operand h{p.h[at.layer] + at.m0 * stride_h, stride_h, static_cast<int>(layer.M) - at.m0};
  const Operand u{static_cast<const unsigned char*>(layer.u) + at.n0 * stride_u, stride_u,
                  static_cast<int>(layer.N) - at.n0};
  const uint32_t* const ready = p.counters + s->ready[at.layer] + at.block;
  RowsTile<kLarge> sums = {};
  sums.template run<Op>(work, h, u, div_up(bytes, kRowsStepBytes), bytes,
                        [&] { wait_for_h(ready, div_up(at.rank, kShape.block_n)); });
  return sums;
}

// Tile of y.
template <class Op, bool kLarge>
MK_DEVICE void rows_expand(const Params& p, Schedule* s, unsigned char* work, int index) {
  using T = typename Op::Element;
  constexpr RowsShape kShape = RowsTile<kLarge>::kShape;
  auto* const staged = reinterpret_cast<float*>(work);
  rows_expand_sum<Op, kLarge>(p, s, work, index).spread(staged);

  const ExpandPlace at = place_expand<kLarge>(p, s, index);
  const Layer& layer = p.layers[at.layer];
  store_y<T, RowsTile<kLarge>>(layer, staged, at.m0, at.n0, p.wide_y >> at.layer & 1);
  if (!layer.h || at.n0 > 0) return;
  // Phase 1 has no tiles for what the rank on the device leaves out.
  const int left = static_cast<int>(layer.M) - at.m0, rows = left < kShape.block_m ? left : kShape.block_m;
  const int columns = static_cast<int>(layer.rank) - at.rank;
  for (int i = thread_index(); i < rows * columns; i += kShape.threads())
    from_float(static_cast<T*>(layer.h)[(at.m0 + i / columns) * layer.stride_hm + at.rank + i % columns], 0.f);
}

template <class Op, bool kLarge>
MK_KERNEL(RowsTile<kLarge>::kThreads, RowsTile<kLarge>::kShape.blocks_per_sm)
rows_kernel(MK_PARAM Params p) {
  constexpr RowsShape kShape = RowsTile<kLarge>::kShape;
  unsigned char* cursor = shared_memory();
  auto* const s = carve<Schedule>(cursor, kScheduleBytes);
  auto* const work = carve<unsigned char>(cursor, kShape.work_bytes());
  const uint32_t ticket = first_ticket(p);
  make_schedule(s, p, kShape.block_m, kShape.block_n, kShape.block_n);
  claim_tiles(s, p.counters + kTicketCounter, ticket, s->num_tiles, [&](int index) {
    if (index < s->num_shrink) {
      rows_shrink<Op, kLarge>(p, s, work, index);
    } else {
      rows_expand<Op, kLarge>(p, s, work, index - s->num_shrink);
    }
  });
  leave(s, p);
}

}  // namespace mk::cuda
