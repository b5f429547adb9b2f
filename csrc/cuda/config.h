// Sizes that the kernels and plan() must agree on, and the kernels' argument. Plain C++.
#pragma once

#include <cstdint>

#include "launch.h"

#ifdef __CUDACC__
#define MK_BOTH __host__ __device__ __forceinline__
#else
#define MK_BOTH inline
#endif

namespace mk::cuda {

constexpr int kVectorBytes = 16;  // of one load, store or asynchronous copy

// Counters: the next ticket, blocks that have left, from kFirstArrival on arrivals at the split tiles, one for each
// slot, then one ready counter for each (layer, row block).
constexpr int kTicketCounter = 0;
constexpr int kExitCounter = 32;  // a 128-byte line away
constexpr int kFirstArrival = 64;

constexpr int kScheduleBytes = 512;  // of shared memory, in front; schedule.cuh

// Warps of a decode block take turns along K in steps of kStepBytes, and their sums meet in shared memory.
constexpr int kStepBytes = 64;
constexpr int kDecodeThreads = 256;
constexpr int kDecodeBlockR = 16;
constexpr int kDecodeMaxRows = 64;

// Pitch of H and u in the shared memory of decode: an odd multiple of 64 bytes, so that eight lanes which read 16 bytes
// each from two neighbouring rows meet every bank once.
MK_BOTH int decode_pitch(int64_t rank, int element) {
  return ((static_cast<int>(rank) * element + kStepBytes - 1) / kStepBytes | 1) * kStepBytes;
}

// Shared memory of decode behind the schedule, for ranks to max_rank.
struct DecodeShared {
  int h_bytes, u_bytes, bias_bytes;
  MK_BOTH DecodeShared(int block_m, int block_n, int max_rank, int element) {
    const int pitch = decode_pitch(max_rank, element);
    const int sums = kDecodeThreads / 32 * block_m * kDecodeBlockR * 4;
    h_bytes = sums > block_m * pitch ? sums : block_m * pitch;
    u_bytes = block_n * pitch;
    bias_bytes = block_n * 4;
  }
  MK_BOTH int total() const { return kScheduleBytes + h_bytes + u_bytes + bias_bytes; }
};

// Tiles of the rows kernel, in both phases: block_m rows of x or H by block_n rows of v or u, kRowsStepBytes of K or r
// at a time, `stages` of them in flight. Operands are swizzled (tile.cuh), so a row has no padding.
constexpr int kRowsStepBytes = 128;
struct RowsShape {
  int block_m, block_n, warps_m, warps_n, stages, blocks_per_sm;
  MK_BOTH constexpr int threads() const { return 32 * warps_m * warps_n; }
  MK_BOTH constexpr int stage_bytes() const { return (block_m + block_n) * kRowsStepBytes; }
  MK_BOTH constexpr int tile_pitch() const { return block_n + 4; }  // floats; finished tiles pass through shared memory
  MK_BOTH constexpr int tile_bytes() const { return block_m * tile_pitch() * 4; }
  MK_BOTH constexpr int slot_floats() const { return block_m * block_n; }
  MK_BOTH constexpr int work_bytes() const {
    return stages * stage_bytes() > tile_bytes() ? stages * stage_bytes() : tile_bytes();
  }
  MK_BOTH constexpr int shared_bytes() const { return kScheduleBytes + work_bytes(); }
};
constexpr RowsShape kSmallRows{64, 64, 2, 2, 3, 4}, kLargeRows{128, 128, 2, 4, 3, 2};

// Columns of H in the scratch memory: whole rank blocks, so that a tile is stored without a mask on the rank.
MK_BOTH int64_t h_columns(int64_t rank, int block_r) { return (rank + block_r - 1) / block_r * block_r; }

struct Params {
  Layer layers[kMaxLayers];
  unsigned char* h[kMaxLayers];    // H (M, h_columns) of each layer in the scratch memory
  int32_t max_splits[kMaxLayers];  // of K
  uint32_t wide_x;                 // bit i: x and v of layer i can be read 16 bytes at a time
  uint32_t wide_y;                 // bit i: y of layer i can be written 16 bytes at a time
  uint32_t* counters;
  float* slots;  // block_m * block_r floats for each tile of phase 1 that shares its tile of H with others
  int32_t num_layers;
  int32_t split_target;
  // Of decode only:
  int32_t block_n;   // a constant in the other kernel
  int32_t max_rank;  // that shared memory is made for
  int32_t sum_by_all;
  int32_t overlap;  // may begin before the kernel in front has ended
};

// plan.cpp: the argument of the kernel of a plan that mismatch() has passed for these layers.
Params make_params(const Plan& plan, const Layer* layers, int64_t n, DType dtype, void* counters, void* scratch);

// plan.cpp: what about the layers does not fit the plan, as a literal, or null.
const char* mismatch(const Plan& plan, const Layer* layers, int64_t n, DType dtype, int64_t scratch_bytes);

}  // namespace mk::cuda
