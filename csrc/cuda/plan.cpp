// Which kernel runs, with which tiles, grid, shared memory and scratch memory. Pure functions.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "config.h"
#include "sm90/row_config.h"

namespace mk::cuda {
namespace {

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }
int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
bool is_wide(int64_t elements, DType dtype) { return elements * element_bytes(dtype) % kVectorBytes == 0; }
bool is_wide(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0; }

// The rank that sizes are made for.
int64_t bound(const Layer& layer) { return layer.rank_ptr ? layer.R : layer.rank; }

bool wide_factors(const Layer& l, DType dtype) {
  return is_wide(l.x) && is_wide(l.v) && is_wide(l.K, dtype) && (l.M <= 1 || is_wide(l.stride_xm, dtype)) &&
         (l.R <= 1 || is_wide(l.stride_vr, dtype));
}
bool wide_u(const Layer& l, DType dtype) {
  return is_wide(l.R, dtype) && is_wide(l.u) && (l.N <= 1 || is_wide(l.stride_un, dtype));
}
bool wide_output(const Layer& l, DType dtype) {
  return is_wide(l.y) && is_wide(l.N, dtype) && (l.M <= 1 || is_wide(l.stride_ym, dtype));
}

// A split reads K / s columns of its rows of x and v; the last to arrive reads s slots. Their sum is least where
// s^2 = K * (block_m + block_r) * element / (block_m * block_r * 4).
int64_t max_splits(const Plan& p, const Layer& l, DType dtype) {
  const bool decode = p.strategy == Strategy::decode;
  const int64_t rows = decode ? std::min<int64_t>(l.M, p.block_m) : p.block_m;
  const auto read = static_cast<double>(l.K * (rows + p.block_r) * element_bytes(dtype));
  const auto best = static_cast<int64_t>(std::sqrt(read / static_cast<double>(rows * p.block_r * 4)));
  // A split below this spends its time on starting its loads: one step for each warp, or two tiles of 128 bytes.
  const int64_t least_bytes = decode ? kDecodeThreads / 32 * kStepBytes : 2 * kRowsStepBytes;
  return std::clamp<int64_t>(std::min(best, l.K * element_bytes(dtype) / least_bytes), 1, 32);
}

// Tiles of phase 1 without a split of K, tiles of phase 2, row blocks.
struct Tiles {
  int64_t shrink = 0, expand = 0, rows = 0;
};
Tiles count_tiles(const Plan& p, const Layer* layers, int64_t n) {
  Tiles tiles;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t rows = div_up(layers[i].M, p.block_m);
    tiles.rows += rows;
    tiles.shrink += rows * div_up(bound(layers[i]), p.block_r);
    tiles.expand += rows * div_up(layers[i].N, p.block_n);
  }
  return tiles;
}

int64_t slots_bytes(const Plan& p, const Tiles& tiles) {
  const int64_t slots = std::max<int64_t>(p.split_target, p.sum_by_all ? tiles.shrink : 0);
  return round_up(slots * p.block_m * p.block_r * 4, 256);
}
int64_t h_bytes(const Plan& p, const Layer& l, DType dtype) {
  return round_up(l.M * h_columns(bound(l), p.block_r) * element_bytes(dtype), 256);
}
int64_t scratch_bytes(const Plan& p, const Layer* layers, int64_t n, DType dtype) {
  int64_t bytes = slots_bytes(p, count_tiles(p, layers, n));
  for (int64_t i = 0; i < n; ++i) bytes += h_bytes(p, layers[i], dtype);
  return bytes;
}
int64_t max_rank(const Layer* layers, int64_t n) {
  int64_t rank = 0;
  for (int64_t i = 0; i < n; ++i) rank = std::max(rank, bound(layers[i]));
  return rank;
}
int64_t max_rows(const Layer* layers, int64_t n) {
  int64_t rows = 0;
  for (int64_t i = 0; i < n; ++i) rows = std::max(rows, layers[i].M);
  return rows;
}

void size_grid(Plan& p, const Layer* layers, int64_t n, DType dtype, int64_t resident) {
  int64_t split_tiles = 0;
  for (int64_t i = 0; i < n; ++i)
    split_tiles +=
        div_up(layers[i].M, p.block_m) * div_up(bound(layers[i]), p.block_r) * max_splits(p, layers[i], dtype);
  p.split_target = static_cast<int32_t>(resident);
  p.blocks = static_cast<int32_t>(std::min(resident, std::max(split_tiles, count_tiles(p, layers, n).expand)));
  p.scratch_bytes = scratch_bytes(p, layers, n, dtype);
  p.counter_bytes = 4 * (kFirstArrival + resident + count_tiles(p, layers, n).rows);
}

// What no kernel takes, as a literal, or null. Tiles and bytes of a row are counted in 32 bits.
const char* refuse_any(const Layer* layers, int64_t n, const Device& device) {
  if (device.cc < 80) return "compute capability below 8.0";
  if (n < 1 || n > kMaxLayers) return "not 1 to 16 layers";
  for (int64_t i = 0; i < n; ++i) {
    const Layer& l = layers[i];
    if (l.M < 1 || l.N < 1 || l.K < 1) return "an empty layer";
    if (l.R < 0 || bound(l) < 0 || bound(l) > l.R) return "a rank outside 0..R";
    constexpr int64_t kMost = int64_t{1} << 28, kMostRank = int64_t{1} << 16;
    if (l.M > kMost || l.N > kMost || l.K > kMost || l.R > kMostRank) return "M, N or K above 2^28, or R above 2^16";
  }
  return nullptr;
}

const char* refuse_u(const Layer* layers, int64_t n, DType dtype) {
  for (int64_t i = 0; i < n; ++i)
    if (bound(layers[i]) > 0 && !wide_u(layers[i], dtype))
      return "u is not in whole 16-byte pieces (R, its row stride and its address must be multiples of 16 bytes)";
  return nullptr;
}

// Slices of y about one for each SM, or, where their part of u would not fit, the fewest rounds that do.
int64_t decode_columns(const Plan& p, const Layer* layers, int64_t n, int64_t most, int64_t sm_count) {
  int64_t sum_n = 0;
  for (int64_t i = 0; i < n; ++i) sum_n += layers[i].N;
  const int64_t rounds = div_up(div_up(sum_n, sm_count), most);
  int64_t columns = std::min(round_up(div_up(sum_n, sm_count * rounds), 8), most);
  for (Plan trial = p; columns < most; columns += 8) {  // each layer's last slice may be short
    trial.block_n = static_cast<int32_t>(columns);
    if (count_tiles(trial, layers, n).expand <= sm_count * rounds) break;
  }
  return columns;
}

const char* plan_decode(Plan& p, const Layer* layers, int64_t n, DType dtype, const Device& device) {
  if (const char* reason = refuse_u(layers, n, dtype)) return reason;
  if (max_rows(layers, n) > kDecodeMaxRows) return "M > 64";
  p.strategy = Strategy::decode;
  p.threads = kDecodeThreads;
  p.block_m = max_rows(layers, n) <= 16 ? 16 : kDecodeMaxRows;
  p.block_r = kDecodeBlockR;
  const auto rank = static_cast<int>(max_rank(layers, n)), element = static_cast<int>(element_bytes(dtype));
  const int64_t fixed = DecodeShared(p.block_m, 0, rank, element).total();
  const int64_t each = DecodeShared(p.block_m, 8, rank, element).total() - fixed;
  const int64_t most = (device.shared_per_block - fixed) / each * 8;
  if (device.shared_per_block < fixed || most < 8) return "H and 8 rows of u do not fit in shared memory";
  p.block_n = static_cast<int32_t>(decode_columns(p, layers, n, most, device.sm_count));
  p.shared_bytes = DecodeShared(p.block_m, p.block_n, rank, element).total();

  // Where few numbers are summed, everybody does it: that saves a counter and a trip of H through L2.
  constexpr int64_t kSummedByAll = 32 * 1024;
  int64_t summed = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t tiles = std::max<int64_t>(div_up(bound(layers[i]), p.block_r), 1);
    const int64_t splits = std::clamp<int64_t>(device.sm_count / tiles, 1, max_splits(p, layers[i], dtype));
    summed = std::max(summed, splits * layers[i].M * bound(layers[i]) * 4);
  }
  p.sum_by_all = summed <= kSummedByAll;
  p.overlap = device.cc >= 90;
  size_grid(p, layers, n, dtype, device.sm_count);
  return nullptr;
}

const char* plan_rows(Plan& p, const Layer* layers, int64_t n, DType dtype, Precision precision, const Device& device) {
  if (const char* reason = refuse_u(layers, n, dtype)) return reason;
  if (dtype == DType::f32 && precision == Precision::ieee) return "IEEE float32 has no tensor cores";
  for (int64_t i = 0; i < n; ++i)
    if (!wide_factors(layers[i], dtype))
      return "x or v is not in whole 16-byte pieces (K, row strides and addresses must be multiples of 16 bytes)";
  p.strategy = Strategy::rows;
  for (const RowsShape& shape : {kLargeRows, kSmallRows}) {
    p.block_m = shape.block_m;
    p.block_r = p.block_n = shape.block_n;
    p.threads = shape.threads();
    p.shared_bytes = shape.shared_bytes();
    if (p.shared_bytes > device.shared_per_block) continue;
    // The large tile reads half as much per product, which pays only where every SM gets one.
    const Tiles tiles = count_tiles(p, layers, n);
    const bool large = shape.block_m == kLargeRows.block_m;
    if (large && tiles.expand < device.sm_count) continue;
    const int64_t fit = std::max<int64_t>(device.shared_per_sm / (p.shared_bytes + 1024), 1);  // 1 KiB is CUDA's own
    const int64_t resident = device.sm_count * std::min<int64_t>(fit, shape.blocks_per_sm);
    if (4 * (kFirstArrival + tiles.rows + resident) > kCounterBytes)
      return "M has more row blocks than there are counters";
    if (tiles.shrink + tiles.expand > int64_t{1} << 30) return "more than 2^30 tiles";
    size_grid(p, layers, n, dtype, resident);
    return nullptr;
  }
  return "too little shared memory";
}

const char* plan_row(Plan& p, const Layer* layers, int64_t n, DType dtype, const Device& device) {
  if (n != 1) return "takes one layer";
  if (!device.has_row) return "the library was built without sm_90a";
  if (const char* reason = sm90::unsupported(layers[0], dtype, device)) return reason;
  const sm90::Config config = sm90::choose(layers[0], device);
  const sm90::Tile tile = sm90::make_tile(config.width, config.groups);
  p.strategy = Strategy::row;
  p.block_m = tile.block_m;
  p.block_r = config.width;
  p.block_n = sm90::kBlockN;
  p.cluster = config.cluster;
  p.blocks = config.clusters * config.cluster;
  p.whole = config.whole;
  p.parts = config.parts;
  p.threads = 128 * (config.groups + 1);  // one producer warpgroup
  p.shared_bytes = tile.smem_bytes;
  return nullptr;
}

// Nanoseconds of rows for one layer by the model of docs/dev/predictions.md, nothing measured: both phases wait for
// what an SM is fed from L2 (7 TB/s over 132 SMs) or for its tensor cores (mma.sync: 0.62 of 800 TFLOP/s on Hopper).
double predicted_rows_ns(const Plan& p, const Layer& l, DType dtype, const Device& device) {
  constexpr double kFeedPerSm = 7e3 / 132, kFlopPerSm = 0.62 * 800e3 / 132, kHbm = 3e3;
  constexpr double kLatency = 720, kHandover = 1200;
  const Tiles tiles = count_tiles(p, &l, 1);
  const auto element = static_cast<double>(element_bytes(dtype)), rank = static_cast<double>(bound(l));
  const int64_t unsplit = std::max<int64_t>(tiles.shrink, 1);
  const int64_t splits = std::clamp<int64_t>(p.split_target / unsplit, 1, max_splits(p, l, dtype));
  const double m = p.block_m, r = p.block_r, n = p.block_n;
  const auto M = static_cast<double>(l.M), N = static_cast<double>(l.N), K = static_cast<double>(l.K);
  const double depth = K / static_cast<double>(splits), slots = splits > 1 ? 8 : element;
  const auto phase = [&](int64_t count, double bytes, double flop, double moved) {
    const auto rounds = static_cast<double>(div_up(count, device.sm_count));
    const double feed = rounds * bytes / kFeedPerSm, tensor = rounds * flop / kFlopPerSm, hbm = moved / kHbm;
    // As in sm90::predicted_ns: the other two hide behind the slowest only in part.
    const double most = std::max({feed, tensor, hbm});
    return most + (feed + tensor + hbm - most) / 8;
  };
  return 2 * kLatency + (splits > 1 ? 2 : 1) * kHandover +
         phase(tiles.shrink * splits, (m + r) * depth * element + m * r * slots, 2 * m * r * depth,
               (M + rank) * K * element) +
         phase(tiles.expand, (m + n) * rank * element + m * n * element, 2 * m * n * rank, (M + rank) * N * element);
}

// The row kernel waits once for memory, and between its products for u from L2.
bool row_is_faster(const Plan& row, const Plan& rows, const Layer& layer, DType dtype, const Device& device) {
  const sm90::Config c{row.block_r, row.block_m / sm90::kGroupRows, row.cluster, row.blocks / row.cluster, row.whole,
                       row.parts};
  constexpr double kLatency = 720 + 300;
  return sm90::predicted_ns(layer, c, device) + kLatency < predicted_rows_ns(rows, layer, dtype, device);
}

}  // namespace

Plan plan(const Layer* layers, int64_t n, DType dtype, Precision precision, const Device& device, Strategy only) {
  Plan decode, rows, row, none;
  const char* const any = refuse_any(layers, n, device);
  none.decode_refused = any ? any : plan_decode(decode, layers, n, dtype, device);
  none.rows_refused = any ? any : plan_rows(rows, layers, n, dtype, precision, device);
  none.row_refused = any ? any : plan_row(row, layers, n, dtype, device);
  const bool row_first = !none.row_refused && !none.rows_refused && row_is_faster(row, rows, layers[0], dtype, device);
  struct Candidate {
    Strategy strategy;
    const Plan* plan;
    const char* Plan::* refused;
    const char* later;  // what the ones behind it are told
  };
  const Candidate first = {Strategy::decode, &decode, &Plan::decode_refused, "comes after decode"};
  const Candidate middle = {Strategy::rows, &rows, &Plan::rows_refused,
                            "comes after rows, which is predicted to take less time"};
  const Candidate last = {Strategy::row, &row, &Plan::row_refused,
                          "comes after row, which is predicted to take less time"};
  const Candidate* chosen = nullptr;
  Plan result = none;
  for (const Candidate& c : {first, row_first ? last : middle, row_first ? middle : last}) {
    if (none.*c.refused) continue;
    if (only != Strategy::none && only != c.strategy) {
      none.*c.refused = "another strategy was asked for";
    } else if (chosen) {
      none.*c.refused = chosen->later;
    } else {
      result = *c.plan;
      chosen = c.strategy == Strategy::decode ? &first : c.strategy == Strategy::rows ? &middle : &last;
    }
  }
  result.decode_refused = none.decode_refused;
  result.rows_refused = none.rows_refused;
  result.row_refused = none.row_refused;
  return result;
}

std::string describe(const Plan& p) {
  static constexpr const char* kNames[] = {"none", "decode", "rows", "row"};
  std::string text = kNames[static_cast<int>(p.strategy)];
  if (p.strategy != Strategy::none) {
    char sizes[192];
    std::snprintf(sizes, sizeof sizes, ": %d blocks of %d threads, tiles of H %dx%d and of y %dx%d, %.1f KiB shared",
                  p.blocks, p.threads, p.block_m, p.block_r, p.block_m, p.block_n,
                  static_cast<double>(p.shared_bytes) / 1024);
    text += sizes;
    if (p.sum_by_all) text += ", every block sums H";
    if (p.overlap) text += ", begins before the kernel in front has ended";
    if (p.cluster > 1) text += ", clusters of " + std::to_string(p.cluster);
    if (p.parts > 1)
      text += ", row groups from " + std::to_string(p.whole) + " on in " + std::to_string(p.parts) + " parts";
  }
  if (p.decode_refused) text += std::string("; not decode: ") + p.decode_refused;
  if (p.rows_refused) text += std::string("; not rows: ") + p.rows_refused;
  if (p.row_refused) text += std::string("; not row: ") + p.row_refused;
  return text;
}

const char* mismatch(const Plan& p, const Layer* layers, int64_t n, DType dtype, int64_t given_scratch_bytes) {
  if (refuse_any(layers, n, {80, 1, 0, 0})) return "layers: expected those of the plan";
  if (p.strategy == Strategy::row) return n == 1 ? nullptr : "layers: expected one";
  if (const char* reason = refuse_u(layers, n, dtype)) return reason;
  if (given_scratch_bytes < scratch_bytes(p, layers, n, dtype)) return "scratch: too small for the layers";
  if (p.strategy == Strategy::decode) {
    const auto rank = static_cast<int>(max_rank(layers, n)), element = static_cast<int>(element_bytes(dtype));
    const bool fits = DecodeShared(p.block_m, p.block_n, rank, element).total() <= p.shared_bytes;
    const bool counted = 4 * (kFirstArrival + n + p.split_target) <= p.counter_bytes;
    return fits && counted && max_rows(layers, n) <= p.block_m
               ? nullptr
               : "layers: expected number, M and rank to be at most those of the plan";
  }
  for (int64_t i = 0; i < n; ++i)
    if (!wide_factors(layers[i], dtype)) return "x or v is not in whole 16-byte pieces, as it was for the plan";
  const Tiles tiles = count_tiles(p, layers, n);
  const bool fits = 4 * (kFirstArrival + tiles.rows + p.split_target) <= p.counter_bytes &&
                    tiles.shrink + tiles.expand <= int64_t{1} << 30;
  return fits ? nullptr : "layers: expected sizes to be at most those of the plan";
}

Params make_params(const Plan& p, const Layer* layers, int64_t n, DType dtype, void* counters, void* scratch) {
  Params params{};
  params.counters = static_cast<uint32_t*>(counters);
  params.slots = static_cast<float*>(scratch);
  auto* cursor = static_cast<unsigned char*>(scratch) + slots_bytes(p, count_tiles(p, layers, n));
  for (int64_t i = 0; i < n; ++i) {
    params.layers[i] = layers[i];
    params.layers[i].rank = bound(layers[i]);
    params.h[i] = cursor;
    cursor += h_bytes(p, layers[i], dtype);
    params.max_splits[i] = static_cast<int32_t>(max_splits(p, layers[i], dtype));
    params.wide_x |= uint32_t{wide_factors(layers[i], dtype)} << i;
    params.wide_y |= uint32_t{wide_output(layers[i], dtype)} << i;
  }
  params.num_layers = static_cast<int32_t>(n);
  params.split_target = p.split_target;
  params.block_n = p.block_n;
  params.max_rank = static_cast<int32_t>(max_rank(layers, n));
  params.sum_by_all = p.sum_by_all;
  params.overlap = p.overlap;
  return params;
}

}  // namespace mk::cuda
