#include "cut.h"

namespace mk::cpu {
namespace {

// Rough figures of a server core of today; they only have to tell apart cuts that differ by much.
// Weights that stay in a core's own cache from call to call. Between two calls of a layer a model reads its others, so
// that is little; but many rows hide the reading anyway, and then the cut that is best for near weights is better.
constexpr double kCacheBytes = 1 << 20, kCacheBytesFewRows = 1 << 16;
constexpr int64_t kFewRows = 16;
constexpr double kNear = 30, kFar = 9;  // bytes per cycle a core reads from there, and from beyond
constexpr double kExposed = 0.6;        // of the time to read from beyond: the rest hides behind arithmetic,
constexpr double kHidingRows = 32;      // more of it where each weight serves more rows
constexpr double kHandover = 12000;     // cycles until all threads see H
constexpr double kHandoverBytes = 4;    // bytes of H per cycle that come from other cores
constexpr double kRegion = 9000, kRegionThread = 300;
constexpr int64_t kBlockRows = 192;               // H and the sums of a block stay in the core's cache
constexpr int64_t kPartStep = 32;                 // parts of K begin at whole units
constexpr int64_t kPieces = 4, kPiecePanels = 8;  // of an expand: at most so many, of so many panels at least
constexpr double kPieceCycles = 50000;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

bool is_far(int64_t rows, double weights, DType dtype) {
  return weights * static_cast<double>(element_bytes(dtype)) > (rows <= kFewRows ? kCacheBytesFewRows : kCacheBytes);
}

// One thread, `rows` of all rows, each of `columns` values, this many weights.
double product_cycles(int64_t all_rows, int64_t rows, int64_t columns, double weights, const Kernel& kernel,
                      DType dtype) {
  const auto bytes = static_cast<double>(element_bytes(dtype));
  const double multiply = weights * static_cast<double>(most(rows, kernel.least_rows)) / kernel.macs_per_cycle;
  const double x = kExposed * static_cast<double>(rows * columns) * bytes / kFar;
  if (is_far(all_rows, weights, dtype)) {
    const double hiding = static_cast<double>(rows) / kHidingRows;
    return x + multiply + kExposed * weights * bytes / kFar / (hiding < 1 ? 1 : hiding);
  }
  const double read = weights * bytes / kNear;
  return x + (multiply < read ? read : multiply);
}

// Every thread has rows of its own: no thread waits, and each reads all weights.
Cut by_rows(const Size& s, int64_t threads, const Kernel& kernel, DType dtype) {
  Cut c{};
  const double weights = static_cast<double>((s.N + s.K) * s.rank);
  c.far = is_far(s.M, weights, dtype);
  const int64_t most_rows = c.far ? kernel.far_block_rows : kBlockRows;
  const int64_t blocks = most(1, round_up(ceil_div(s.M, most_rows), threads));
  c.block_rows = most(1, ceil_div(s.M, blocks));
  c.blocks = ceil_div(s.M, c.block_rows);
  c.shrink_panels = most(1, ceil_div(s.rank, kPanel));
  c.part_k = s.K;
  c.cycles = product_cycles(s.M, ceil_div(s.M, threads), s.K, weights, kernel, dtype);
  // In long calls, threads that are done take over pieces of one that was held up.
  const int64_t u_panels = ceil_div(s.N, kPanel);
  const int64_t pieces = threads > 1 ? least(kPieces, static_cast<int64_t>(c.cycles / kPieceCycles)) : 1;
  c.expand_panels = ceil_div(u_panels, most(1, least(pieces, u_panels / kPiecePanels)));
  c.expand_groups = ceil_div(u_panels, c.expand_panels);
  c.shrink_groups = c.parts = 1;
  return c;
}

// Every thread has panels of its own for all rows: weights are read once, and all wait for H.
Cut by_panels(const Size& s, int64_t threads, const Kernel& kernel, DType dtype) {
  Cut c{};
  c.blocks = 1;
  c.block_rows = s.M;
  const int64_t v_panels = ceil_div(s.rank, kPanel), u_panels = ceil_div(s.N, kPanel);
  // Two groups for each thread, so that one that comes late can be helped; one where each reads many rows of x.
  const int64_t groups = s.M > 32 ? threads : 2 * threads;
  c.shrink_panels = most(1, v_panels / groups);
  c.shrink_groups = ceil_div(v_panels, c.shrink_panels);
  c.expand_panels = most(1, u_panels / groups);
  c.expand_groups = ceil_div(u_panels, c.expand_panels);
  c.parts = 1;
  // Few panels do not divide among the threads: then K does.
  while (v_panels > 0 && c.shrink_groups * c.parts % threads && c.shrink_groups * c.parts < 4 * threads &&
         s.K >= (c.parts + 1) * 64) {
    ++c.parts;
  }
  c.part_k = round_up(ceil_div(s.K, c.parts), kPartStep);
  c.parts = ceil_div(s.K, c.part_k);
  const double weights = static_cast<double>((s.N + s.K) * s.rank) / static_cast<double>(threads);
  const double handed_over = static_cast<double>(s.M * s.rank * kernel.a_bytes);
  c.far = is_far(s.M, weights, dtype);
  c.cycles = product_cycles(s.M, s.M, s.K, weights, kernel, dtype) + kHandover + handed_over / kHandoverBytes;
  return c;
}

}  // namespace

Cut cut(const Size& size, int64_t threads, const Kernel& kernel, DType dtype) {
  const Cut rows = by_rows(size, threads, kernel, dtype);
  if (threads == 1) return rows;
  const Cut panels = by_panels(size, threads, kernel, dtype);
  return panels.cycles < rows.cycles ? panels : rows;
}

double region_cycles(int64_t threads) {
  return threads == 1 ? 0 : kRegion + kRegionThread * static_cast<double>(threads);
}

}  // namespace mk::cpu
