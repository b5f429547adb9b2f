// Matrix products for one vector type. A file kernels_<set>.cpp includes a vec_*.h, which defines Vec, load_as and
// store_as, then this file, and hands out make_kernel<...>.
//
// Everything here has internal linkage and calls no inline function of the standard library: were a template compiled
// with -mavx512f merged with that of another file, the linker could give its code to a machine without AVX-512.
#pragma once

#include <cstring>

#include "activation.h"
#include "kernel.h"

namespace mk::cpu {
namespace {

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

// How a dtype's units multiply. `parts`: vectors of k per unit, each with its own element of A, which is four bytes.
template <DType D>
struct Format {  // float32 arithmetic, values converted when they are loaded
  static constexpr DType dtype = D;
  static constexpr DType a_dtype = DType::f32;
  static constexpr int parts = D == DType::f32 ? 1 : 2;

  static Vec weights(const char* unit, int part, int64_t column) {
    if constexpr (D == DType::f32) return Vec::load(reinterpret_cast<const float*>(unit) + column);
    if constexpr (D == DType::f16) return load_as<D>(unit + 64 * part + 2 * column, Vec::lanes);
    return part == 0 ? Vec::even_bf16(unit + 4 * column) : Vec::odd_bf16(unit + 4 * column);
  }
  static Vec element(const char* a) {
    float value;
    std::memcpy(&value, a, sizeof value);
    return Vec::set(value);
  }
  static Vec multiply_add(Vec a, Vec w, Vec sum) { return fma(a, w, sum); }
};

constexpr int64_t kLine = 64;  // bytes of a cache line
constexpr int64_t kStep = 4;   // units that stand unrolled in the inner loop

// A register tile: `rows` rows of A times `columns` vectors of a panel.
struct Tile {
  const char* a;
  int64_t stride_a;
  const char* w;  // first unit, at the first column
  int64_t units;
  int64_t chain;
  const char* ahead;    // what to fetch,
  int64_t ahead_lines;  // so many cache lines with each step of kStep units
  const float* start;   // sums so far, or the bias with stride 0, or null
  int64_t stride_start;
  float* sum;  // float32 result, or null:
  int64_t stride_sum;
  char* y;  // result in the dtype, n columns
  int64_t stride_y;
  const char* residual;  // what is added to y, or null
  int64_t stride_residual;
  int64_t n;
};

// Sums of `chain` units are added to the total: error grows with the length of a chain of additions, and the library
// matmul with which we are compared does not add a whole K in one. For few columns it takes dot products, whose vector
// lanes make short chains; there speed is no question, as most of a panel is empty.
constexpr int64_t kLongChain = 128;
constexpr int64_t chain_units(int64_t n) { return n < 16 ? 8 : kLongChain; }

// a + b, and what the rounding of that took away (Knuth's TwoSum) onto `lost`.
inline Vec add(Vec a, Vec b, Vec& lost) {
  const Vec sum = a + b, b_part = sum - a;
  lost = lost + ((a - (sum - b_part)) + (b - b_part));
  return sum;
}

// Rows of A behind few pointers: scaled indices reach three rows from each, and units that stand unrolled need no
// addition either. Every scalar instruction of the inner loop may take a port from an FMA.
template <int rows>
struct Rows {
  static constexpr int groups = (rows + 2) / 3;
  const char* first[groups];
  int64_t stride;

  Rows(const char* a, int64_t stride_a) : stride(stride_a) {
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) {
      first[g] = a + 3 * g * stride;
      asm("" : "+r"(first[g]));  // otherwise GCC adds the stride row by row, in the loop
    }
  }
  const char* at(int row, int64_t bytes) const { return first[row / 3] + row % 3 * stride + bytes; }
  void advance(int64_t bytes) {
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) first[g] += bytes;
  }
};

template <class F, int rows, int columns>
void tile(const Tile& t) {
  // Few accumulators do not hide the latency of an FMA: sum in several sets.
  constexpr int sets = rows * columns <= 2 ? 4 : rows * columns <= 6 ? 2 : 1;
  constexpr int a_bytes = F::parts * 4;
  const bool careful = columns == 1 && t.chain < kLongChain;
  Vec lost[rows][columns] = {};
  alignas(64) float total[rows * columns * Vec::lanes];
  const float* before = t.start;  // sums of the chains before this one
  int64_t stride_before = t.stride_start;
  Rows<rows> a(t.a, t.stride_a);
  const char *w = t.w, *ahead = t.ahead;
  for (int64_t left = t.units;;) {
    const int64_t units = least(left, t.chain);
    Vec sum[sets][rows][columns] = {};
    const auto step = [&](int64_t u, Vec(&set)[rows][columns]) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int part = 0; part < F::parts; ++part) {
        Vec weight[columns];
#pragma GCC unroll 4
        for (int j = 0; j < columns; ++j) weight[j] = F::weights(w + u * kUnitBytes, part, j * Vec::lanes);
#pragma GCC unroll 16
        for (int i = 0; i < rows; ++i) {
          const Vec element = F::element(a.at(i, u * a_bytes + part * 4));
#pragma GCC unroll 4
          for (int j = 0; j < columns; ++j) set[i][j] = F::multiply_add(element, weight[j], set[i][j]);
        }
      }
    };
    const auto advance = [&](int64_t count) __attribute__((always_inline)) {
      a.advance(count * a_bytes);
      w += count * kUnitBytes;
    };
    int64_t u = units;
    for (; u >= kStep; u -= kStep) {
      for (int64_t line = 0; line < t.ahead_lines; ++line, ahead += kLine) __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 4
      for (int s = 0; s < kStep; ++s) step(s, sum[s % sets]);
      advance(kStep);
    }
    for (; u > 0; --u) {
      step(0, sum[0]);
      advance(1);
    }
    left -= units;
    const auto each = [&](auto&& visit) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < columns; ++j) visit(i, j, sum[0][i][j]);
      }
    };
    if constexpr (sets > 1) {
      each([&](int i, int j, Vec& chain) __attribute__((always_inline)) {
        for (int s = 1; s < sets; ++s) chain = chain + sum[s][i][j];
      });
    }
    if (before && careful) {
      each([&](int i, int j, Vec& chain) __attribute__((always_inline)) {
        chain = add(Vec::load(before + i * stride_before + j * Vec::lanes), chain, lost[i][j]);
      });
    } else if (before) {
      each([&](int i, int j, Vec& chain) __attribute__((always_inline)) {
        chain = Vec::load(before + i * stride_before + j * Vec::lanes) + chain;
      });
    }
    if (left > 0) {
      each([&](int i, int j, Vec& chain)
               __attribute__((always_inline)) { chain.store(total + (i * columns + j) * Vec::lanes); });
      before = total;
      stride_before = columns * Vec::lanes;
      continue;
    }
    if (careful) {
      // Where a sum is infinite, inf - inf has made what was lost NaN.
      const Vec infinity = Vec::set(__builtin_inff());
      each([&](int i, int j, Vec& chain) __attribute__((always_inline)) {
        chain = select_less(abs(lost[i][j]), infinity, chain + lost[i][j], chain);
      });
    }
    if (!t.sum && t.residual) {
      each([&](int i, int j, Vec& chain) __attribute__((always_inline)) {
        const int64_t column = j * Vec::lanes, present = most(0, least(Vec::lanes, t.n - column));
        chain =
            chain + load_as<F::dtype>(t.residual + i * t.stride_residual + column * element_bytes(F::dtype), present);
      });
    }
    if (t.sum) {
      each([&](int i, int j, Vec& chain)
               __attribute__((always_inline)) { chain.store(t.sum + i * t.stride_sum + j * Vec::lanes); });
    } else if (t.n >= columns * Vec::lanes) {
      each([&](int i, int j, Vec& chain) __attribute__((always_inline)) {
        store_as<F::dtype>(t.y + i * t.stride_y + j * Vec::lanes * element_bytes(F::dtype), chain, Vec::lanes);
      });
    } else {
      each([&](int i, int j, Vec& chain) __attribute__((always_inline)) {
        store_as<F::dtype>(t.y + i * t.stride_y + j * Vec::lanes * element_bytes(F::dtype), chain,
                           most(0, t.n - j * Vec::lanes));
      });
    }
    return;
  }
}

template <class F, int columns, int max_rows>
struct Tiles {
  using Function = void (*)(const Tile&);
  Function of_rows[max_rows + 1] = {};

  template <int rows = 1>
  constexpr void fill() {
    of_rows[rows] = tile<F, rows, columns>;
    if constexpr (rows < max_rows) fill<rows + 1>();
  }
  constexpr Tiles() { fill(); }
};

// Rows [row, row + rows) of sums of columns [column, column + n) to y: residual, activation and rounding. Columns
// beyond n are not touched.
template <DType D>
void write_output(const Product& p, const float* sum, int64_t stride_sum, int64_t row, int64_t rows, int64_t column,
                  int64_t n) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < n; j += Vec::lanes) {
      const int64_t offset = (column + j) * element_bytes(D);
      Vec z = Vec::load(sum + i * stride_sum + j);
      if (p.residual) z = z + load_as<D>(p.residual + (row + i) * p.stride_residual + offset, n - j);
      store_as<D>(p.out + (row + i) * p.stride_out + offset, apply(p.activation, z), n - j);
    }
  }
}

// Rows [0, rows) of one panel's sums to H, scaled and rounded to the dtype: for the next product, zero from column n to
// the end of the panel, and for the caller where wanted.
template <class F>
void write_hidden(const Product& p, const float* sum, int64_t stride_sum, int64_t row, int64_t rows, int64_t column) {
  constexpr DType D = F::dtype;
  const int64_t n = least(kPanel, p.n - column);
  const Vec scale = Vec::set(p.scale);
  for (int64_t i = 0; i < rows; ++i) {
    char half[kPanel * 4] = {};
    for (int64_t j = 0; j < n; j += Vec::lanes) {
      store_as<D>(half + j * element_bytes(D), Vec::load(sum + i * stride_sum + j) * scale, n - j);
    }
    char* hidden = p.hidden + (row + i) * p.stride_hidden + column * element_bytes(F::a_dtype);
    for (int64_t j = 0; j < kPanel; j += Vec::lanes) {
      const Vec rounded = load_as<D>(half + j * element_bytes(D), Vec::lanes);
      store_as<F::a_dtype>(hidden + j * element_bytes(F::a_dtype), rounded, Vec::lanes);
    }
    if (p.out) {
      std::memcpy(p.out + (row + i) * p.stride_out + column * element_bytes(D), half,
                  static_cast<size_t>(n * element_bytes(D)));
    }
  }
}

// Copy rows of A, k elements each from element `first`, to the format of tiles; zero to the end of the last unit.
template <class F>
void copy_rows(const char* a, int64_t stride_a, int64_t rows, int64_t k, char* target, int64_t stride_target) {
  constexpr DType D = F::dtype;
  const int64_t padded = round_up(k, unit_length(D));
  for (int64_t i = 0; i < rows; ++i) {
    const char* source = a + i * stride_a;
    char* row = target + i * stride_target;
    if constexpr (F::a_dtype == D) {
      std::memcpy(row, source, static_cast<size_t>(k * element_bytes(D)));
      std::memset(row + k * element_bytes(D), 0, static_cast<size_t>((padded - k) * element_bytes(D)));
    } else {
      for (int64_t j = 0; j < padded; j += Vec::lanes) {
        const Vec x = load_as<D>(source + j * element_bytes(D), k - j < 0 ? 0 : k - j);
        store_as<F::a_dtype>(row + j * element_bytes(F::a_dtype), x, padded - j);
      }
    }
  }
}

// Write W's rows [0, n), `k` elements each, as units of a panel; `units` >= what k needs are written.
template <DType D>
void pack_units(const char* w, int64_t stride_w, int64_t n, int64_t k, int64_t units, char* panel) {
  constexpr int64_t per_unit = D == DType::f32 ? 1 : 2, bytes = D == DType::f32 ? 4 : 2;
  const int64_t whole = k / per_unit;  // units
  if (n < kPanel || whole < units) std::memset(panel, 0, static_cast<size_t>(units * kUnitBytes));
  for (int64_t i = 0; i < whole; ++i) {
    char* const unit = panel + i * kUnitBytes;
    for (int64_t j = 0; j < n; ++j) {
      const char* source = w + j * stride_w + i * 4;
      if constexpr (D == DType::f16) {
        std::memcpy(unit + j * 2, source, 2);
        std::memcpy(unit + (kPanel + j) * 2, source + 2, 2);
      } else {
        std::memcpy(unit + j * 4, source, 4);
      }
    }
  }
  if (k == whole * per_unit) return;
  for (int64_t j = 0; j < n; ++j) {  // the even k of the last unit
    std::memcpy(panel + whole * kUnitBytes + j * (D == DType::f16 ? 2 : 4), w + j * stride_w + (k - 1) * bytes, bytes);
  }
}

template <DType D>
void pack_panel(const char* w, int64_t stride_w, int64_t n, int64_t k, char* panel) {
  pack_units<D>(w, stride_w, n, k, panel_bytes(k, D) / kUnitBytes, panel);
}

// Units of one pass: panel and rows of A of a pass stay in the first-level cache.
constexpr int64_t kPassUnits = 256;
constexpr int64_t kAheadBytes = 8192;
constexpr int64_t kBlockColumns = 16 * kPanel;  // columns that take all passes in turn: their sums stay near
constexpr int64_t kStripBytes = 128 << 10;      // panels that stay in a core's own cache while all rows pass by

template <class F>
constexpr int64_t pass_stride() {  // bytes of a copied row of A; odd in cache lines, so that rows fall into many sets
  return kPassUnits * F::parts * 4 + 64;
}

template <class F>
int64_t scratch_bytes(int64_t rows, int64_t n) {
  const int64_t copied = rows * pass_stride<F>(), panel = kPassUnits * kUnitBytes;
  return copied + panel + rows * least(kBlockColumns, round_up(n, kPanel)) * 4 + 64;
}

// One product, whatever the target: k in passes, in each the panels, in each the tiles. Where one pass does, y is
// written by one tile of rows after the other from a strip of panels: in long pieces of its rows, not in single lines
// of many pages.
template <class F, int columns, int max_rows>
class Multiplication {
 public:
  Multiplication(const Product& product, char* scratch)
      : p(product),
        copied(scratch),
        own_panel(scratch + p.rows * pass_stride<F>()),
        total_units(ceil_div(p.k, unit_length(D))),
        tile_rows(ceil_div(p.rows, ceil_div(p.rows, max_rows))),
        // A prepared A may be read beyond k: it is zero there. Copying A without a conversion gains nothing.
        in_place(p.prepared || (F::a_dtype == D && p.k % unit_length(D) == 0)) {
    const bool read_once = in_place && p.panels && (total_units <= kPassUnits || p.rows <= max_rows);
    pass = read_once ? most(1, total_units) : kPassUnits;
    rows_first = read_once && p.rows > 2 * tile_rows && p.target == Target::output;
    strip = most(1, kStripBytes / (pass * kUnitBytes)) * kPanel;
    float* const sums = reinterpret_cast<float*>(own_panel + kPassUnits * kUnitBytes);
    result = p.target == Target::partial ? p.partial : sums;
    stride_result = p.target == Target::partial ? p.stride_partial
                    : one_pass()                ? kPanel
                                                : least(kBlockColumns, round_up(p.n, kPanel));
  }

  void run() {
    if (rows_first) return multiply_strips();
    for (block = 0; block < p.n; block += kBlockColumns) multiply_block(least(p.n, block + kBlockColumns));
  }

 private:
  void multiply_strips() {
    units = total_units;
    a = p.a;
    stride_a = p.stride_a;
    for (block = 0; block < p.n; block += strip) {
      for (int64_t row = 0; row < p.rows; row += tile_rows) {
        for (int64_t column = block; column < least(p.n, block + strip); column += kPanel) {
          multiply_panel(column, row, row + tile_rows);
        }
      }
    }
  }

  void multiply_block(int64_t end) {
    first = 0;
    do {
      units = least(pass, total_units - first);
      a = p.a + (p.prepared ? first * F::parts * 4 : k0() * element_bytes(D));
      stride_a = p.stride_a;
      if (!in_place) {
        copy_rows<F>(a, stride_a, p.rows, pass_k(), copied, pass_stride<F>());
        a = copied;
        stride_a = pass_stride<F>();
      }
      for (int64_t column = block; column < end; column += kPanel) multiply_panel(column, 0, p.rows);
      first += units;
    } while (first < total_units);
  }

  static constexpr DType D = F::dtype;
  static constexpr Tiles<F, columns, max_rows> wide{};
  static constexpr Tiles<F, 1, max_rows> narrow{};  // for what is left of a panel: half the work at a rank of 16

  bool one_pass() const { return pass >= total_units; }
  bool last_pass() const { return first + units >= total_units; }
  int64_t k0() const { return first * unit_length(D); }
  int64_t pass_k() const { return least(units * unit_length(D), p.k - k0()); }
  // Sums of a panel. Where one pass does, the next panel needs no other place.
  float* sums_of(int64_t row, int64_t column) const {
    if (p.target == Target::partial) return result + row * stride_result + column;
    return result + row * stride_result + (one_pass() ? 0 : column - block);
  }

  const char* weights(int64_t column, int64_t n) {
    if (p.panels) return p.panels + column / kPanel * p.stride_panel + first * kUnitBytes;
    const char* w = p.w + column * p.stride_w + k0() * element_bytes(D);
    pack_units<D>(w, p.stride_w, n, pass_k(), units, own_panel);
    return own_panel;
  }

  // What is read after the units of a panel in this pass; one tile that takes them all fetches ahead of itself.
  const char* next(const char* w, int64_t column) const {
    if (rows_first) return column + strip < p.n ? w + strip / kPanel * p.stride_panel : nullptr;
    if (one_pass()) return w + (p.rows <= tile_rows ? kAheadBytes : p.stride_panel);
    return column + kPanel < p.n ? w + p.stride_panel : p.panels + (first + units) * kUnitBytes;
  }

  void load_bias(int64_t column, int64_t n, float (&bias)[kPanel]) const {
    for (int64_t j = 0; j < n; j += Vec::lanes) {
      load_as<D>(p.bias + (column + j) * element_bytes(D), n - j).store(bias + j);
    }
  }

  // Rows [begin, end) of one panel.
  void multiply_panel(int64_t column, int64_t begin, int64_t end) {
    const int64_t n = least(kPanel, p.n - column);
    const char* w = weights(column, n);
    const char* ahead = p.far && p.panels ? next(w, column) : nullptr;
    float bias[kPanel] = {};
    const bool with_bias = first == 0 && p.target == Target::output && p.bias;
    if (with_bias) load_bias(column, n, bias);
    Tile t{};
    t.stride_a = stride_a;
    t.units = units;
    t.chain = chain_units(p.n);
    t.stride_start = first ? stride_result : 0;
    t.stride_sum = stride_result;
    t.stride_y = p.stride_out;
    t.stride_residual = p.stride_residual;
    const bool careful = t.chain < kLongChain, direct = p.target == Target::output && p.activation == Activation::none;
    // Every tile fetches its part: all at once would occupy the buffers that rows of A come through.
    const int64_t lines = ahead ? units * kUnitBytes / kLine : 0, steps = units / kStep;
    const int64_t tiles = ceil_div(p.rows, tile_rows) * ceil_div(n, (careful ? 1 : columns) * Vec::lanes);
    const int64_t lines_per_step = ceil_div(lines, tiles * most(1, steps));
    int64_t fetched = begin / tile_rows * lines_per_step * steps;
    for (int64_t row = begin; row < least(end, p.rows); row += tile_rows) {
      const int64_t rows = least(tile_rows, p.rows - row);
      t.a = a + row * stride_a;
      for (int64_t c = 0, width; c < n; c += width) {
        const bool both = columns > 1 && n - c > Vec::lanes && !careful;
        width = (both ? columns : 1) * Vec::lanes;
        t.w = w + c * (D == DType::f16 ? 2 : 4);
        t.ahead = ahead + fetched * kLine;
        t.ahead_lines = fetched < lines ? lines_per_step : 0;
        fetched += t.ahead_lines * steps;
        t.sum = sums_of(row, column) + c;
        t.start = first ? t.sum : with_bias ? bias + c : nullptr;
        if (direct && last_pass()) t.sum = nullptr;
        t.y = p.out + row * p.stride_out + (column + c) * element_bytes(D);
        if (p.residual) t.residual = p.residual + row * p.stride_residual + (column + c) * element_bytes(D);
        t.n = n - c;
        (both ? wide.of_rows : narrow.of_rows)[rows](t);
      }
      if (last_pass() && !direct) finish(row, rows, column, n);
    }
  }

  void finish(int64_t row, int64_t rows, int64_t column, int64_t n) const {
    const float* sum = sums_of(row, column);
    if (p.target == Target::hidden) write_hidden<F>(p, sum, stride_result, row, rows, column);
    if (p.target == Target::output) {
      write_output<D>(p, sum, stride_result, row, rows, column, n);
    }
  }

  const Product& p;
  char *const copied, *const own_panel;
  const int64_t total_units, tile_rows;
  const bool in_place;
  int64_t pass;  // units
  bool rows_first;
  int64_t strip;  // columns
  float* result;
  int64_t stride_result;
  int64_t block = 0;             // first column of this block or strip
  int64_t first = 0, units = 0;  // of this pass
  const char* a = nullptr;
  int64_t stride_a = 0;
};

// Few rows of A on W as it lies: every row of W is read once, along k. Packing it would cost more than the product.
constexpr int64_t kDotRows = 4, kDotColumns = 4;

// Sums of one panel, `rows` of A times at most 32 rows of W, to sum (rows, 32).
template <class F, DType a_dtype, int rows>
void dot_panel(const Product& p, int64_t column, int64_t n, float* sum) {
  constexpr DType D = F::dtype;
  constexpr int64_t lanes = Vec::lanes;
  for (int64_t j = 0; j < n; j += kDotColumns) {
    // The last columns of an odd number are computed again.
    const int64_t first = n < kDotColumns ? 0 : least(j, n - kDotColumns);
    const char* w[kDotColumns];
    for (int c = 0; c < kDotColumns; ++c) w[c] = p.w + (column + least(first + c, n - 1)) * p.stride_w;
    Vec total[rows][kDotColumns] = {};
    for (int64_t begin = 0; begin < p.k; begin += kLongChain * lanes) {
      const int64_t end = least(p.k, begin + kLongChain * lanes);
      Vec chain[rows][kDotColumns] = {};
      const auto step = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
        Vec a[rows];
#pragma GCC unroll 4
        for (int i = 0; i < rows; ++i)
          a[i] = load_as<a_dtype>(p.a + i * p.stride_a + k * element_bytes(a_dtype), count);
#pragma GCC unroll 4
        for (int c = 0; c < kDotColumns; ++c) {
          const Vec weight = load_as<D>(w[c] + k * element_bytes(D), count);
#pragma GCC unroll 4
          for (int i = 0; i < rows; ++i) chain[i][c] = fma(a[i], weight, chain[i][c]);
        }
      };
      int64_t k = begin;
      for (; k + lanes <= end; k += lanes) step(k, lanes);
      if (k < end) step(k, end - k);
      for (int i = 0; i < rows; ++i) {
        for (int c = 0; c < kDotColumns; ++c) total[i][c] = total[i][c] + chain[i][c];
      }
    }
    for (int i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < least(kDotColumns, n); ++c) sum[i * kPanel + first + c] = total[i][c].sum();
    }
  }
}

template <class F, int rows>
void dot_panel_of(const Product& p, int64_t column, int64_t n, float* sum) {
  p.prepared ? dot_panel<F, F::a_dtype, rows>(p, column, n, sum) : dot_panel<F, F::dtype, rows>(p, column, n, sum);
}

// Vectors of four make long chains of additions, and the portable kernels are not about speed.
inline bool takes_dot_products(const Product& p) { return !p.panels && p.rows <= kDotRows && Vec::lanes >= 8; }

template <class F>
void dot_products(const Product& p) {
  constexpr DType D = F::dtype;
  for (int64_t column = 0; column < p.n; column += kPanel) {
    const int64_t n = least(kPanel, p.n - column);
    float sum[kDotRows * kPanel] = {};
    if (p.rows == 1) dot_panel_of<F, 1>(p, column, n, sum);
    if (p.rows == 2) dot_panel_of<F, 2>(p, column, n, sum);
    if (p.rows == 3) dot_panel_of<F, 3>(p, column, n, sum);
    if (p.rows == 4) dot_panel_of<F, 4>(p, column, n, sum);
    if (p.target == Target::hidden) write_hidden<F>(p, sum, kPanel, 0, p.rows, column);
    for (int64_t i = 0; p.target == Target::partial && i < p.rows; ++i) {
      std::memcpy(p.partial + i * p.stride_partial + column, sum + i * kPanel, kPanel * sizeof(float));
    }
    if (p.target != Target::output) continue;
    for (int64_t j = 0; p.bias && j < n; j += Vec::lanes) {
      const Vec bias = load_as<D>(p.bias + (column + j) * element_bytes(D), n - j);
      for (int64_t i = 0; i < p.rows; ++i) (Vec::load(sum + i * kPanel + j) + bias).store(sum + i * kPanel + j);
    }
    write_output<D>(p, sum, kPanel, 0, p.rows, column, n);
  }
}

template <class F, int columns, int max_rows>
void product(const Product& p, char* scratch) {
  if (takes_dot_products(p)) return dot_products<F>(p);
  Multiplication<F, columns, max_rows>(p, scratch).run();
}

// Sums of products over parts of k, always added in the same order.
template <class F>
void reduce(const Product& p, int64_t parts, int64_t stride_part) {
  for (int64_t column = 0; column < p.n; column += kPanel) {
    for (int64_t i = 0; i < p.rows; ++i) {
      float sum[kPanel];
      for (int64_t j = 0; j < kPanel; j += Vec::lanes) {
        const float* first_part = p.partial + i * p.stride_partial + column + j;
        Vec total = Vec::load(first_part);
        for (int64_t s = 1; s < parts; ++s) total = total + Vec::load(first_part + s * stride_part);
        total.store(sum + j);
      }
      write_hidden<F>(p, sum, kPanel, i, 1, column);
    }
  }
}

// Rows of elements `stored` with values of the dtype D. Always the same sum, whoever computes it: a row is added up
// from its first column to its last.
template <DType D, DType stored>
void normalise(const Normalisation& p) {
  constexpr int64_t bytes = element_bytes(stored);
  for (int64_t i = 0; i < p.rows; ++i) {
    const char* const from = p.from + i * p.stride_from;
    char* const to = p.to + i * p.stride_to;
    Vec squares = Vec::zero();
    for (int64_t j = 0; j < p.n; j += Vec::lanes) {
      const Vec h = load_as<stored>(from + j * bytes, p.n - j);
      squares = fma(h, h, squares);
    }
    const Vec factor = Vec::set(p.scale / __builtin_sqrtf(squares.sum() / static_cast<float>(p.n) + p.eps));
    for (int64_t j = 0; j < p.n; j += Vec::lanes) {
      const int64_t n = p.n - j;
      const Vec weight = load_as<D>(p.weight + j * element_bytes(D), n);
      const Vec g = load_as<stored>(from + j * bytes, n) * factor * weight;
      char rounded[Vec::lanes * 4] = {};
      store_as<D>(rounded, g, Vec::lanes);
      store_as<stored>(to + j * bytes, load_as<D>(rounded, Vec::lanes), n);
    }
  }
}

template <class F, int columns, int max_rows>
constexpr Kernel make_kernel(const char* isa, double macs_per_cycle) {
  return {isa,
          element_bytes(F::a_dtype),
          2,
          192,
          macs_per_cycle,
          scratch_bytes<F>,
          product<F, columns, max_rows>,
          reduce<F>,
          normalise<F::dtype, F::a_dtype>,
          normalise<F::dtype, F::dtype>,
          pack_panel<F::dtype>};
}

}  // namespace
}  // namespace mk::cpu
