// Where elements lie: swizzled tiles in shared memory, wgmma operands and accumulators (PTX ISA, "Asynchronous
// Warpgroup Level Matrix Shared Memory Layout" and "Register Fragments"). Host tests check every function here.
#pragma once

#include "row_config.h"

namespace mk::cuda::sm90 {

// Byte offset of 16-byte piece `piece` (0..7) of row `row` in a tile with 128-byte rows and TMA's 128-byte swizzle.
// The tile starts on 1024 bytes.
MK_HD constexpr uint32_t piece_offset(uint32_t row, uint32_t piece) {
  return row * kSwizzleBytes + ((piece ^ (row % 8)) * 16);
}

// wgmma descriptor of a K-major tile with that swizzle: 8-row groups lie 1024 bytes apart; the leading offset is not
// used with a swizzle. `address` is a shared-memory address below 2^18.
MK_HD constexpr uint64_t matrix_descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | uint64_t{1} << 16 |
         static_cast<uint64_t>(8 * kSwizzleBytes >> 4) << 32 | uint64_t{1} << 62;
}

// The hardware swizzles address bits, so the next 16 elements along K are 32 bytes further in the descriptor.
constexpr uint64_t kDescriptorStepK = 32 >> 4;

// Offset of the 64-column tile that has the 16 columns `k16` of a u tile (kBlockN, width).
MK_HD constexpr uint32_t u_tile_offset(int k16) { return static_cast<uint32_t>(k16 / 4 * kBlockN * kSwizzleBytes); }

// Accumulator element i of a thread of a warpgroup: d[i] of m64nNk16.
MK_HD constexpr int accumulator_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + (i / 2 % 2) * 8; }
MK_HD constexpr int accumulator_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// Register `reg` (two 16-bit elements) of the A fragments of H takes accumulator elements a_source(reg) and the next:
// a thread holds the same rows in both layouts, so H never leaves it.
MK_HD constexpr int a_source(int reg) { return reg * 2; }

// Row and 16-byte piece that `lane` addresses for stmatrix.x4 of fragment registers 4 * j .. 4 * j + 3 (16 columns).
MK_HD constexpr uint32_t stmatrix_row(uint32_t lane) { return lane % 16; }
MK_HD constexpr uint32_t stmatrix_piece(uint32_t lane, uint32_t j) { return 2 * j + lane / 16; }

// Of a word with columns c and c + 1, the bits of those below rank, given rank - c.
MK_HD constexpr uint32_t keep_below(int32_t left) { return left >= 2 ? 0xFFFFFFFFu : left == 1 ? 0xFFFFu : 0u; }

}  // namespace mk::cuda::sm90
