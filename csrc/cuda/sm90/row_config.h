// Row kernel for sm_90a: tile sizes, shared memory, what it can serve and which tiles it takes. Plain C++17 without a
// CUDA header: device code, the launcher and host tests read the same functions.
//
//   y = act(x v[:r]^T u[:, :r]^T + bias)      x (M, K), v (R, K), u (N, R), y (M, N), bf16 or fp16
#pragma once

#include <cstdint>
#include <string>

#include "../launch.h"

#ifdef __CUDACC__
#define MK_HD __host__ __device__ __forceinline__
#else
#define MK_HD inline
#endif

namespace mk::cuda::sm90 {

constexpr int kSwizzleBytes = 128;         // a row of a tile in shared memory: 64 elements of 2 bytes
constexpr int kChunk = kSwizzleBytes / 2;  // columns of such a tile, also BLOCK_K of the shrink
constexpr int kBlockN = 64;                // columns of a tile of y, rows of a tile of u
constexpr int kGroupRows = 64;             // rows of one wgmma, hence of one consumer warpgroup
constexpr int kMaxWidth = 256;             // float32 accumulator of H: 128 registers per thread
constexpr int kMaxStages = 8;
constexpr int kSharedPerBlock = 227 * 1024;  // cc 9.0; 228 KiB per SM, 1 KiB of it reserved per block

MK_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sizes that follow from the columns of H kept in registers (the rank, rounded up) and the consumer warpgroups.
struct Tile {
  int width, groups, block_m, stages, blocks_per_sm;
  int x_bytes, v_bytes, u_bytes, slot_bytes;  // a ring slot holds (x, v) tiles in the shrink, a u tile in the expand
  int out_offset, out_bytes;                  // staging of y, out_bytes per consumer warpgroup
  int barrier_offset, smem_bytes;
};

MK_HD constexpr Tile make_tile(int width, int groups) {
  Tile t{};
  t.width = width;
  t.groups = groups;
  t.block_m = kGroupRows * groups;
  // One warpgroup alone cannot hide its epilogue; a second block on the SM can, where both fit.
  t.blocks_per_sm = groups == 1 && width <= 128 ? 2 : 1;
  t.x_bytes = t.block_m * kSwizzleBytes;
  t.v_bytes = width * kSwizzleBytes;
  t.u_bytes = kBlockN * width * 2;
  t.slot_bytes = t.x_bytes + t.v_bytes;  // more than u_bytes
  t.out_bytes = kGroupRows * kBlockN * 2;
  const int barrier_bytes = 2 * kMaxStages * 8;
  const int budget = t.blocks_per_sm == 2 ? (228 * 1024) / 2 - 1024 : kSharedPerBlock;
  const int fit = (budget - groups * t.out_bytes - barrier_bytes) / t.slot_bytes;
  t.stages = fit < kMaxStages ? fit : kMaxStages;
  t.out_offset = t.stages * t.slot_bytes;
  t.barrier_offset = t.out_offset + groups * t.out_bytes;
  t.smem_bytes = t.barrier_offset + barrier_bytes;
  return t;
}

struct Config {
  int32_t width;     // 64, 128, 192, 256
  int32_t groups;    // consumer warpgroups: 1 or 2, so 64 or 128 rows per block
  int32_t cluster;   // blocks that share the tiles of u and v: 1, 2 or 4
  int32_t clusters;  // grid = clusters * cluster; each walks over items
  // Row groups that are one item each; every one behind them is `parts` items, which make the same H and a part of the
  // columns of y each, so that a last round of few row groups does not leave most of the device idle.
  int32_t whole;
  int32_t parts;
};

MK_HD constexpr int64_t row_groups(int64_t M, const Config& c) {
  return ceil_div(M, int64_t{kGroupRows} * c.groups * c.cluster);
}
MK_HD constexpr int64_t items(int64_t M, const Config& c) { return c.whole + (row_groups(M, c) - c.whole) * c.parts; }

// The rank that sizes are made for.
inline int64_t bound(const Layer& layer) { return layer.rank_ptr ? layer.R : layer.rank; }

// GPCs of 16 or 18 SMs: clusters of four leave two SMs of the latter idle. A second block on an SM takes turns.
inline int64_t at_once(const Config& c, const Device& device) {
  const int64_t sms = c.cluster == 4 ? device.sm_count / 16 * 16 : device.sm_count;
  return sms / c.cluster > 0 ? sms / c.cluster : 1;
}

// Nanoseconds by a model, nothing measured: rounds of items, each as long as the slowest of tensor cores (800 TFLOP/s),
// feed from L2 (7 TB/s) and HBM (3 TB/s) makes it, plus an eighth of the other two, which hide behind it only in part.
// 132 SMs share these rates.
inline double predicted_ns(const Layer& layer, const Config& c, const Device& device) {
  constexpr double kFmaPerSm = 800e3 / 2 / 132, kFeedPerSm = 7e3 / 132, kHbm = 3e3;  // FMA and bytes per ns
  const int64_t side_by_side = at_once(c, device), shared = row_groups(layer.M, c) - c.whole;
  const double rows = kGroupRows * c.groups;
  // Of each block, for one column of x or y.
  const double tensor = rows * c.width / kFmaPerSm,
               feed = 2 * (rows + static_cast<double>(c.width) / c.cluster) / kFeedPerSm;
  const auto rounds = [&](int64_t groups, int64_t parts) {
    const int64_t wanted = groups * parts;
    const auto blocks = static_cast<double>((wanted < side_by_side ? wanted : side_by_side) * c.cluster);
    const auto columns = [&](int64_t count, double different_rows) {
      const double hbm = 2 * (different_rows + c.width) / kHbm;
      const double inner = tensor > feed ? tensor : feed, most = inner > hbm ? inner : hbm;
      return static_cast<double>(ceil_div(wanted, side_by_side) * count) * (most + (tensor + feed + hbm - most) / 8);
    };
    // Those that share a row group read the same x, and write different columns of y.
    return columns(layer.K, rows * blocks / static_cast<double>(parts)) +
           columns(ceil_div(layer.N, parts), rows * blocks);
  };
  return (c.whole ? rounds(c.whole, 1) : 0.0) + (shared ? rounds(shared, c.parts) : 0.0);
}

// The configuration with its walk: every row group whole, or those of the last round in parts.
inline void set_walk(Config& c, const Layer& layer, const Device& device, bool in_parts) {
  const int64_t wanted = row_groups(layer.M, c), side_by_side = at_once(c, device);
  const int64_t rest = wanted % side_by_side, tiles = ceil_div(layer.N, kBlockN);
  int64_t parts = in_parts && rest ? side_by_side / rest : 1;
  if (parts > tiles) parts = tiles;
  c.whole = static_cast<int32_t>(parts > 1 ? wanted - rest : wanted);
  c.parts = static_cast<int32_t>(parts);
  const int64_t resident = int64_t{device.sm_count} * make_tile(c.width, c.groups).blocks_per_sm / c.cluster;
  const int64_t all = items(layer.M, c);
  c.clusters = static_cast<int32_t>(all < resident ? all : (resident > 0 ? resident : 1));
}

// Tiles for a layer that unsupported() has passed: those with the least predicted time, the first of equals.
inline Config choose(const Layer& layer, const Device& device) {
  constexpr int32_t kCandidates[][2] = {{2, 2}, {2, 4}, {1, 2}, {1, 4}};  // groups, cluster
  Config best{};
  double least = 0;
  for (const auto& candidate : kCandidates) {
    for (const bool in_parts : {false, true}) {
      Config c{};
      c.width = static_cast<int32_t>(ceil_div(bound(layer), kChunk) * kChunk);
      c.groups = candidate[0];
      c.cluster = candidate[1];
      while (c.cluster > ceil_div(layer.M, kGroupRows * c.groups)) c.cluster /= 2;
      set_walk(c, layer, device, in_parts);
      const double time = predicted_ns(layer, c, device);
      if (best.width == 0 || time < least) {
        best = c;
        least = time;
      }
    }
  }
  return best;
}

// A row-major matrix that TMA moves in boxes of 64 columns (128 bytes, swizzled) and box_rows rows. What lies outside
// reads as zero and is not written, so u and v end at the rank and no tile needs a mask on M, N, K or r.
struct Matrix {
  const void* data;
  int64_t rows, columns, stride;  // stride in elements
  int32_t box_rows;
};
struct Matrices {
  Matrix x, v, u, y;
};
// Each block of a cluster fetches its share of the rows of a tile of v or u, for all of them.
inline Matrices make_matrices(const Layer& a, const Config& c) {
  const Tile t = make_tile(c.width, c.groups);
  Matrices m{};
  m.x = {a.x, a.M, a.K, a.stride_xm, t.block_m};
  m.v = {a.v, bound(a), a.K, a.stride_vr, t.width / c.cluster};
  m.u = {a.u, a.N, bound(a), a.stride_un, kBlockN / c.cluster};
  m.y = {a.y, a.M, a.N, a.stride_ym, kGroupRows};
  return m;
}

// Null where launch() takes the configuration for the layer, else a literal that says why not.
inline const char* invalid(const Config& c, const Layer& layer) {
  if (c.width < kChunk || c.width > kMaxWidth || c.width % kChunk) return "config: width must be 64, 128, 192 or 256";
  if (c.width < bound(layer)) return "config: width is less than the rank";
  if (c.groups != 1 && c.groups != 2) return "config: groups must be 1 or 2";
  if (c.cluster != 1 && c.cluster != 2 && c.cluster != 4) return "config: cluster must be 1, 2 or 4";
  if (c.whole < 0 || c.whole > row_groups(layer.M, c)) return "config: whole must be 0 .. row groups";
  if (c.parts < 1 || c.parts > ceil_div(layer.N, kBlockN)) return "config: parts must be 1 .. tiles of y in a row";
  if (c.clusters < 1 || c.clusters > items(layer.M, c)) return "config: clusters must be 1 .. items";
  return nullptr;
}

// "64-row blocks, clusters of 4, ..." for explain.
inline std::string describe(const Config& c) {
  const Tile t = make_tile(c.width, c.groups);
  return "H " + std::to_string(c.width) + " wide in registers, " + std::to_string(c.clusters) + " clusters of " +
         std::to_string(c.cluster) + " blocks of " + std::to_string(t.block_m) + " rows, tiles of " +
         std::to_string(kBlockN) + " columns, " +
         (c.parts > 1 ? "row groups from " + std::to_string(c.whole) + " on in " + std::to_string(c.parts) + " parts, "
                      : std::string()) +
         std::to_string(t.stages) + " stages, " + std::to_string(t.smem_bytes) + " bytes shared";
}

// Null where the kernel can serve the layer, else a literal that says why not. Reads no device memory; a null pointer
// counts as aligned.
inline const char* unsupported(const Layer& a, DType dtype, const Device& device) {
  constexpr int64_t kLimit = int64_t{1} << 30;  // TMA coordinates are int32 and run past the end by a tile
  if (device.cc != 90) return "needs compute capability 9.0";
  if (device.shared_per_block < kSharedPerBlock) return "needs 227 KiB of shared memory per block";
  if (dtype != DType::bf16 && dtype != DType::f16) return "needs bfloat16 or float16";
  if (bound(a) < 1) return "needs a rank of at least 1";
  if (bound(a) > kMaxWidth) return "H stays in registers, so the rank must be at most 256";
  if (a.M < kGroupRows) return "needs at least 64 rows";
  if (a.N < 1 || a.K < 1) return "needs N >= 1 and K >= 1";
  if (a.M > kLimit || a.N > kLimit || a.K > kLimit) return "M, N and K must be at most 2^30";
  const struct {
    const void* data;
    int64_t stride, columns;
    const char *unaligned, *unfit;
  } matrices[] = {
      {a.x, a.stride_xm, a.K, "rows of x must start on 16 bytes (K % 8 == 0)",
       "rows of x overlap or lie too far apart"},
      {a.v, a.stride_vr, a.K, "rows of v must start on 16 bytes (K % 8 == 0)",
       "rows of v overlap or lie too far apart"},
      {a.u, a.stride_un, bound(a), "rows of u must start on 16 bytes (R % 8 == 0)",
       "rows of u overlap or lie too far apart"},
      {a.y, a.stride_ym, a.N, "rows of y must start on 16 bytes (N % 8 == 0)",
       "rows of y overlap or lie too far apart"},
  };
  for (const auto& m : matrices) {
    if (m.stride % 8 || reinterpret_cast<uintptr_t>(m.data) % 16) return m.unaligned;
    if (m.stride < m.columns || m.stride >= (int64_t{1} << 39)) return m.unfit;  // 40 bits of bytes in a descriptor
  }
  return nullptr;
}

}  // namespace mk::cuda::sm90
