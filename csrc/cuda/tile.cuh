// One tile of A · B^T by a block: A (block_m, length) and B (block_n, length) in global memory, row-major, through a
// ring of asynchronous copies in shared memory. K is counted in bytes: nothing here depends on the dtype but the mma
// itself.
#pragma once

#include "ops.cuh"

namespace mk::cuda {

// Rows of an operand, 16-byte aligned; reads past valid_rows give zeros.
struct Operand {
  const unsigned char* base;
  int64_t stride_bytes;
  int valid_rows;
};

// A row of a stage is kRowsStepBytes = 8 pieces of 16 bytes. Piece c of row i lies at c ^ i % 8, so that neither the
// copies nor ldmatrix, which takes one piece from each of eight rows, meet a bank twice.
MK_DEVICE int swizzled(int row, int piece) { return row * kRowsStepBytes + (piece ^ row % 8) * kVectorBytes; }

template <bool kLarge>
struct RowsTile {
  static constexpr RowsShape kShape = kLarge ? kLargeRows : kSmallRows;
  static constexpr int kThreads = kShape.threads(), kStages = kShape.stages;
  static constexpr int kWarpM = kShape.block_m / kShape.warps_m / 16, kWarpN = kShape.block_n / kShape.warps_n / 8;
  static constexpr int kPieces = kRowsStepBytes / kVectorBytes;

  float sums[kWarpM][kWarpN][4];

  static MK_DEVICE int warp_row() { return warp_index() / kShape.warps_n * kWarpM * 16; }
  static MK_DEVICE int warp_column() { return warp_index() % kShape.warps_n * kWarpN * 8; }

  // One thread's pieces of an operand with kRows rows: the same piece of every kRowsAtOnce-th row.
  template <int kRows>
  struct Fetcher {
    static constexpr int kRowsAtOnce = kThreads / kPieces;
    static_assert(kRowsAtOnce % 8 == 0, "the swizzle repeats every eight rows");
    static_assert(kRows % kRowsAtOnce == 0, "every thread copies the same number of pieces");
    const unsigned char* source;
    int64_t stride_bytes;
    int rows_left;

    MK_DEVICE explicit Fetcher(const Operand& from) {
      const int row = thread_index() / kPieces, column = thread_index() % kPieces * kVectorBytes;
      source = from.base + row * from.stride_bytes + column;
      stride_bytes = from.stride_bytes;
      rows_left = from.valid_rows - row;
    }
    // The next step of K to `target`, zeros from byte `left` of this thread's pieces on; to be called for one step
    // after the other.
    MK_DEVICE void fetch(unsigned char* target, int left) {
      const int bytes = piece_bytes(left);
      target += swizzled(thread_index() / kPieces, thread_index() % kPieces);
      const unsigned char* piece = source;
#pragma unroll
      for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
        async_copy(target + i * kRowsAtOnce * kRowsStepBytes, piece, i * kRowsAtOnce < rows_left ? bytes : 0);
        piece += kRowsAtOnce * stride_bytes;
      }
      source += kRowsStepBytes;
    }
  };

  template <class Op>
  MK_DEVICE void multiply(const unsigned char* a, const unsigned char* b) {
    const int lane = lane_index();
    a += (warp_row() + lane % 16) * kRowsStepBytes;
    b += (warp_column() + lane / 16 * 8 + lane % 8) * kRowsStepBytes;
#pragma unroll
    for (int k = 0; k < kPieces / 2; ++k) {
      uint32_t weights[kWarpN / 2][4];
      const int piece_a = swizzled(0, (2 * k + lane / 16) ^ lane % 8);
      const int piece_b = swizzled(0, (2 * k + lane / 8 % 2) ^ lane % 8);
#pragma unroll
      for (int j = 0; j < kWarpN / 2; ++j) load_matrices(weights[j], b + j * 16 * kRowsStepBytes + piece_b);
#pragma unroll
      for (int i = 0; i < kWarpM; ++i) {
        uint32_t rows[4];
        load_matrices(rows, a + i * 16 * kRowsStepBytes + piece_a);
#pragma unroll
        for (int j = 0; j < kWarpN; ++j)
          Op::mma(sums[i][j], rows, {weights[j / 2][j % 2 * 2], weights[j / 2][j % 2 * 2 + 1]});
      }
    }
  }

  // Adds A · B^T over `steps` steps, of which columns from `bytes` on count as zeros. B is fetched before `wait_for_a`
  // is called, A after it; all of `ring` is free when this is called and when it returns.
  template <class Op, class Wait>
  MK_DEVICE void run(unsigned char* ring, const Operand& a, const Operand& b, int steps, int bytes, Wait&& wait_for_a) {
    constexpr int kOffsetB = kShape.block_m * kRowsStepBytes, kStage = kShape.stage_bytes(), kRing = kStages * kStage;
    bytes -= thread_index() % kPieces * kVectorBytes;  // from this thread's pieces of a step
    Fetcher<kShape.block_n> from_b(b);
#pragma unroll 1
    for (int s = 0; s < kStages - 1 && s < steps; ++s)
      from_b.fetch(ring + s * kStage + kOffsetB, bytes - s * kRowsStepBytes);
    wait_for_a();
    Fetcher<kShape.block_m> from_a(a);
#pragma unroll 1
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < steps) from_a.fetch(ring + s * kStage, bytes - s * kRowsStepBytes);
      async_commit();  // also where there is nothing: the count of groups is what a step waits for
    }
    int now = 0, ahead = (kStages - 1) * kStage;
#pragma unroll 1
    for (; steps > 0; --steps) {
      async_wait<kStages - 2>();
      block_barrier();  // this step has landed for all threads, and all have left the step before, whose stage is next
      bytes -= kRowsStepBytes;
      if (steps >= kStages) {
        const int left = bytes - (kStages - 2) * kRowsStepBytes;
        from_b.fetch(ring + ahead + kOffsetB, left);
        from_a.fetch(ring + ahead, left);
      }
      async_commit();
      multiply<Op>(ring + now, ring + now + kOffsetB);
      now = now == kRing - kStage ? 0 : now + kStage;
      ahead = ahead == kRing - kStage ? 0 : ahead + kStage;
    }
    async_wait<0>();
    block_barrier();
  }

  // Into shared memory, row-major, so that rows leave the block in whole pieces.
  MK_DEVICE void spread(float* tile) const {
    const int group = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int i = 0; i < kWarpM; ++i)
#pragma unroll
      for (int j = 0; j < kWarpN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          tile[(warp_row() + 16 * i + group + e / 2 * 8) * kShape.tile_pitch() + warp_column() + 8 * j + 2 * t +
               e % 2] = sums[i][j][e];
    block_barrier();
  }
};

}  // namespace mk::cuda
