// Few rows: phase 1 cuts H into 16 ranks by splits of K, phase 2 cuts y into slices of block_n columns, about one for
// each SM. A block asks for its slice of u before anything else; it travels to shared memory while H is computed.
// Where the launch overlaps the kernel in front of it, all factors are asked for, into L2, while that one still runs.
//
// x and v are read 16 bytes at a time straight into the operands, the warps of a block taking turns along K.
#pragma once

#include "ops.cuh"
#include "schedule.cuh"

namespace mk::cuda {

constexpr int kDecodeWarps = kDecodeThreads / 32;

// Elements k .. of a row, zeros beyond `columns` and unless `valid`.
template <class T, bool kWide>
MK_DEVICE Pack load_row(const T* row, int k, int columns, bool valid) {
  constexpr int kVector = kVectorBytes / sizeof(T);
  Pack pack = {{0, 0, 0, 0}};
  if (!valid || k >= columns) return pack;
  if constexpr (kWide) {
    pack = load_streamed(row + k);  // columns are a multiple of the vector: all of it or nothing
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (k + i >= columns) continue;
      if constexpr (sizeof(T) == 4) {
        pack.word[i] = float_bits(row[k + i]);
      } else {
        pack.word[i / 2] |= static_cast<uint32_t>(row[k + i].bits) << (16 * (i % 2));
      }
    }
  }
  return pack;
}

template <class Op, int kTilesM>
struct ShrinkSums {
  float of[kTilesM][kDecodeBlockR / 8][Op::kSums];
};

// This warp's share of columns [k_begin, k_end) of x and v. Rows of v from r on count as zeros: that is the rank mask.
template <class Op, int kTilesM, bool kWide>
MK_DEVICE void decode_shrink_sum(ShrinkSums<Op, kTilesM>& sums, const Layer& layer, int rank, int rank0, int k_begin,
                                 int k_end) {
  using T = typename Op::Element;
  constexpr int kStep = kStepBytes / sizeof(T), kTilesR = kDecodeBlockR / 8;
  // Weights of so many steps are asked for together, which is what keeps memory busy; rows of x, which come from L2,
  // one step at a time where there are several tiles of them to multiply.
  constexpr int kBatch = Op::kBatch;
  constexpr int kRowBatch = kTilesM == 1 ? kBatch : 1;
  const int group = lane_index() / 4, t = lane_index() % 4, M = static_cast<int>(layer.M);
  const T* const x = static_cast<const T*>(layer.x);
  const T* const v = static_cast<const T*>(layer.v) + (rank0 + group) * layer.stride_vr;
  for (int k0 = k_begin + warp_index() * kStep; k0 < k_end; k0 += kBatch * kDecodeWarps * kStep) {
    const auto column = [&](int b) {
      return k0 + b * kDecodeWarps * kStep + t * (kVectorBytes / static_cast<int>(sizeof(T)));
    };
    Pack weights[kBatch][kTilesR];
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
#pragma unroll
      for (int j = 0; j < kTilesR; ++j)
        weights[b][j] = load_row<T, kWide>(v + 8 * j * layer.stride_vr, column(b), k_end, rank0 + 8 * j + group < rank);
#pragma unroll
    for (int b0 = 0; b0 < kBatch; b0 += kRowBatch) {
      if (b0 > 0 && k0 + b0 * kDecodeWarps * kStep >= k_end) break;
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        if (Op::kRowPacks == 16 && 16 * i >= M) continue;  // those of the tensor core cost nothing
        Pack rows[kRowBatch][Op::kRowPacks];
#pragma unroll
        for (int b = 0; b < kRowBatch; ++b)
#pragma unroll
          for (int q = 0; q < Op::kRowPacks; ++q) {
            const int m = 16 * i + Op::row_of(q);
            rows[b][q] = load_row<T, kWide>(x + m * layer.stride_xm, column(b0 + b), k_end, m < M);
          }
#pragma unroll
        for (int b = 0; b < kRowBatch; ++b)
#pragma unroll
          for (int j = 0; j < kTilesR; ++j) Op::add(sums.of[i][j], rows[b], weights[b0 + b][j]);
      }
    }
  }
}

// Where a tile of phase 1 lies, and its part of K.
struct DecodeTile {
  int layer, rank, rank0, splits, split, k_begin, k_end;
};
template <class T>
MK_DEVICE DecodeTile place_tile(const Params& p, const Schedule* s, int index) {
  constexpr int kStep = kStepBytes / sizeof(T);
  const Tile tile = find_tile(s->shrink_end, index);
  const int K = static_cast<int>(p.layers[tile.layer].K), steps = div_up(K, kStep);
  const int splits = s->splits[tile.layer], split = tile.index % splits;
  const int k_begin = static_cast<int>(static_cast<int64_t>(steps) * split / splits) * kStep;
  const int k_end = static_cast<int>(static_cast<int64_t>(steps) * (split + 1) / splits) * kStep;
  return {tile.layer, s->rank[tile.layer],  tile.index / splits * kDecodeBlockR, splits, split,
          k_begin,    k_end < K ? k_end : K};
}

// Tile of H by all warps: the sums meet in `partial` (warps, kTilesM * 16, 16), those of the splits in slots.
template <class Op, int kTilesM>
MK_DEVICE void decode_shrink(const Params& p, Schedule* s, float* partial, int index) {
  using T = typename Op::Element;
  constexpr int kSlot = 16 * kTilesM * kDecodeBlockR;
  const DecodeTile at = place_tile<T>(p, s, index);
  const Layer& layer = p.layers[at.layer];
  ShrinkSums<Op, kTilesM> sums = {};
  if (p.wide_x >> at.layer & 1) {
    decode_shrink_sum<Op, kTilesM, true>(sums, layer, at.rank, at.rank0, at.k_begin, at.k_end);
  } else {
    decode_shrink_sum<Op, kTilesM, false>(sums, layer, at.rank, at.rank0, at.k_begin, at.k_end);
  }
  float* const mine = partial + warp_index() * kSlot;
#pragma unroll
  for (int i = 0; i < kTilesM; ++i)
#pragma unroll
    for (int j = 0; j < kDecodeBlockR / 8; ++j)
      Op::each(sums.of[i][j],
               [&](int row, int column, float sum) { mine[(16 * i + row) * kDecodeBlockR + 8 * j + column] = sum; });
  block_barrier();

  const int64_t stride_h = h_columns(layer.rank, kDecodeBlockR);
  T* const h = reinterpret_cast<T*>(p.h[at.layer]) + at.rank0;
  // Beyond r an infinite x has made 0 * inf.
  const auto store_h = [&](int e, float sum) {
    const int j = e % kDecodeBlockR;
    from_float(h[e / kDecodeBlockR * stride_h + j], at.rank0 + j < at.rank ? sum : 0.f);
  };
  const bool to_slot = at.splits > 1 || p.sum_by_all;
  const int used = static_cast<int>(layer.M) * kDecodeBlockR;
  float* const slot = p.slots + static_cast<int64_t>(index) * kSlot;
  for (int e = thread_index(); e < used; e += kDecodeThreads) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) sum += partial[w * kSlot + e];
    if (to_slot) {
      slot[e] = sum;
    } else {
      store_h(e, sum);
    }
  }
  if (at.splits > 1 && !p.sum_by_all) {
    if (!arrive(s, p.counters + kFirstArrival + index - at.split, at.splits)) return;
    // In the order of the splits, so that the result does not depend on who came last.
    const float* const first = slot - at.split * kSlot;
    for (int e = thread_index(); e < used; e += kDecodeThreads) {
      float sum = 0.f;
#pragma unroll 4
      for (int i = 0; i < at.splits; ++i) sum += load_exchanged(first + i * kSlot + e);
      store_h(e, sum);
    }
  }
  publish(p.counters + s->ready[at.layer]);
}

// Adds up the splits of H (M, r) in shared memory, zeros from r to the next multiple of a step.
template <class T>
MK_DEVICE void sum_h(const Params& p, const Schedule* s, int layer, int block_m, unsigned char* h, int pitch) {
  constexpr int kStep = kStepBytes / sizeof(T);
  const int slot = block_m * kDecodeBlockR, splits = s->splits[layer], rank = s->rank[layer];
  const int begin = layer > 0 ? s->shrink_end[layer - 1] : 0, columns = div_up(rank, kStep) * kStep;
  for (int e = thread_index(); e < static_cast<int>(p.layers[layer].M) * columns; e += kDecodeThreads) {
    const int m = e / columns, j = e % columns;
    const float* const source = p.slots + static_cast<int64_t>(begin + j / kDecodeBlockR * splits) * slot +
                                m * kDecodeBlockR + j % kDecodeBlockR;
    float sum = 0.f;
    if (j < rank) {
#pragma unroll 4
      for (int i = 0; i < splits; ++i) sum += load_exchanged(source + i * slot);
    }
    from_float(reinterpret_cast<T*>(h + m * pitch)[j], sum);
  }
}

// Rows of `bytes`, whole 16-byte pieces, from global to shared memory; zeros from `valid_bytes` on and beyond
// `valid_rows`.
MK_DEVICE void fetch_rows(unsigned char* target, int pitch, const unsigned char* source, int64_t stride_bytes, int rows,
                          int valid_rows, int bytes, int valid_bytes) {
  const int pieces = bytes / kVectorBytes;
  for (int i = thread_index(); i < rows * pieces; i += kDecodeThreads) {
    const int row = i / pieces, column = i % pieces * kVectorBytes;
    const int valid = row < valid_rows ? piece_bytes(valid_bytes - column) : 0;
    async_copy(target + row * pitch + column, valid ? source + row * stride_bytes + column : source, valid);
  }
}

// The caller's H (M, layer.rank), zeros beyond r, whose rows may lie anywhere.
template <class T>
MK_DEVICE void store_h_output(const Layer& layer, int rank, const unsigned char* h, int pitch) {
  const int columns = static_cast<int>(layer.rank);
  for (int e = thread_index(); e < static_cast<int>(layer.M) * columns; e += kDecodeThreads) {
    const int m = e / columns, j = e % columns;
    T value;
    from_float(value, 0.f);
    if (j < rank) value = reinterpret_cast<const T*>(h + m * pitch)[j];
    static_cast<T*>(layer.h)[m * layer.stride_hm + j] = value;
  }
}

// Slice of y: all rows, block_n columns; and how H and u lie in shared memory for it.
struct Slice {
  int layer, index, rank, n_begin, columns, pitch, bytes, valid_bytes;
};
template <class T>
MK_DEVICE Slice place_slice(const Params& p, const Schedule* s, int index) {
  const Tile tile = find_tile(s->expand_end, index);
  const int rank = s->rank[tile.layer], n_begin = tile.index * p.block_n;
  const int left = static_cast<int>(p.layers[tile.layer].N) - n_begin;
  // H and u are read up to rank r - 1: what u holds beyond it may be NaN.
  const int valid_bytes = rank * static_cast<int>(sizeof(T));
  return {tile.layer,
          tile.index,
          rank,
          n_begin,
          left < p.block_n ? left : p.block_n,
          decode_pitch(rank, sizeof(T)),
          div_up(valid_bytes, kStepBytes) * kStepBytes,
          valid_bytes};
}

template <class T>
MK_DEVICE void fetch_u(const Params& p, const Schedule* s, unsigned char* u, int index) {
  const Slice at = place_slice<T>(p, s, index);
  const Layer& layer = p.layers[at.layer];
  const int64_t stride = layer.stride_un * static_cast<int64_t>(sizeof(T));
  fetch_rows(u, at.pitch, static_cast<const unsigned char*>(layer.u) + at.n_begin * stride, stride,
             div_up(at.columns, 8) * 8, at.columns, at.bytes, at.valid_bytes);
  async_commit();
}

// H whole and the slice of the bias in shared memory, once all of phase 1 is done for the layer.
template <class T>
MK_DEVICE void gather_h(const Params& p, const Schedule* s, const Slice& at, int block_m, unsigned char* h,
                        float* bias) {
  const Layer& layer = p.layers[at.layer];
  const int M = static_cast<int>(layer.M);
  for (int i = thread_index(); i < at.columns; i += kDecodeThreads)
    bias[i] = layer.bias ? to_float(static_cast<const T*>(layer.bias)[at.n_begin + i]) : 0.f;
  const int tiles = div_up(at.rank, kDecodeBlockR);
  wait_for_h(p.counters + s->ready[at.layer], p.sum_by_all ? tiles * s->splits[at.layer] : tiles);
  if (p.sum_by_all) {
    sum_h<T>(p, s, at.layer, block_m, h, at.pitch);
  } else {
    fetch_rows(h, at.pitch, p.h[at.layer], h_columns(layer.rank, kDecodeBlockR) * static_cast<int64_t>(sizeof(T)), M, M,
               at.bytes, at.valid_bytes);
    async_commit();
  }
  async_wait<0>();  // also u
  block_barrier();
}

template <class Op, int kTilesM>
MK_DEVICE void decode_expand(const Params& p, const Schedule* s, unsigned char* h, const unsigned char* u, float* bias,
                             int index) {
  using T = typename Op::Element;
  const Slice at = place_slice<T>(p, s, index);
  gather_h<T>(p, s, at, 16 * kTilesM, h, bias);
  const Layer& layer = p.layers[at.layer];
  const int group = lane_index() / 4, t = lane_index() % 4, M = static_cast<int>(layer.M);
  const int tiles_m = div_up(M, 16), pairs = tiles_m * div_up(at.columns, 8);
  for (int pair = warp_index(); pair < pairs; pair += kDecodeWarps) {
    const int m0 = pair % tiles_m * 16, n0 = pair / tiles_m * 8;
    float sums[Op::kSums] = {};
#pragma unroll 2
    for (int j = t * kVectorBytes; j < at.bytes; j += kStepBytes) {
      Pack rows[Op::kRowPacks];
#pragma unroll
      for (int q = 0; q < Op::kRowPacks; ++q) rows[q] = load_shared(h + (m0 + Op::row_of(q)) * at.pitch + j);
      Op::add(sums, rows, load_shared(u + (n0 + group) * at.pitch + j));
    }
    Op::each(sums, [&](int row, int column, float sum) {
      const int m = m0 + row, n = n0 + column;
      if (m >= M || n >= at.columns) return;
      float z[1] = {sum + bias[n]};
      activate(z, layer.activation);
      from_float(static_cast<T*>(layer.y)[m * layer.stride_ym + at.n_begin + n], z[0]);
    });
  }
  if (layer.h && at.index == 0) store_h_output<T>(layer, at.rank, h, at.pitch);
}

// Asks L2 for this block's share of `rows` of `bytes`; a hint.
MK_DEVICE void prefetch_share(const void* matrix, int64_t rows, int64_t bytes, int64_t stride_bytes) {
  constexpr int kLine = 128;
  const int64_t lines = (bytes + kLine - 1) / kLine, all = rows * lines, blocks = block_count();
  const int64_t end = all * (block_index() + 1) / blocks;
  for (int64_t i = all * block_index() / blocks + thread_index(); i < end; i += kDecodeThreads)
    prefetch(static_cast<const unsigned char*>(matrix) + i / lines * stride_bytes + i % lines * kLine);
}

// Factors travel while the kernel in front still runs. They are not read yet: it may be the one that writes them.
template <class T>
MK_DEVICE void prefetch_factors(const Params& p) {
  constexpr int64_t kElement = sizeof(T);
  for (int i = 0; i < p.num_layers; ++i) {
    const Layer& layer = p.layers[i];
    if (layer.rank_ptr) continue;  // nor may the rank be
    prefetch_share(layer.v, layer.rank, layer.K * kElement, layer.stride_vr * kElement);
    prefetch_share(layer.u, layer.rank ? layer.N : 0, layer.rank * kElement, layer.stride_un * kElement);
  }
}

template <class Op, int kTilesM>
MK_KERNEL(kDecodeThreads, 1)
decode_kernel(MK_PARAM Params p) {
  using T = typename Op::Element;
  constexpr int kBlockM = 16 * kTilesM;
  const DecodeShared layout(kBlockM, p.block_n, p.max_rank, sizeof(T));
  unsigned char* cursor = shared_memory();
  auto* const s = carve<Schedule>(cursor, kScheduleBytes);
  auto* const h = carve<unsigned char>(cursor, layout.h_bytes);  // or the sums of phase 1, which has no use for H
  auto* const u = carve<unsigned char>(cursor, layout.u_bytes);
  auto* const bias = carve<float>(cursor, layout.bias_bytes);

  if (p.overlap) prefetch_factors<T>(p);
  wait_for_kernel_in_front();
  const uint32_t ticket = first_ticket(p);
  make_schedule(s, p, kBlockM, kDecodeBlockR, p.block_n);
  block_barrier();
  const int first = block_index();
  if (first < s->num_expand) fetch_u<T>(p, s, u, first);
  claim_tiles(s, p.counters + kTicketCounter, ticket, s->num_shrink,
              [&](int index) { decode_shrink<Op, kTilesM>(p, s, reinterpret_cast<float*>(h), index); });
  let_next_kernel_begin();
  for (int index = first; index < s->num_expand; index += block_count()) {
    if (index != first) {
      block_barrier();  // u, H and the bias of the slice before are free
      fetch_u<T>(p, s, u, index);
    }
    decode_expand<Op, kTilesM>(p, s, h, u, bias, index);
  }
  leave(s, p);
}

}  // namespace mk::cuda
