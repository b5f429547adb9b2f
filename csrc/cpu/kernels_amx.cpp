// AMX: tiles of 16 x 16 sums, 32 k at a time. The units of a panel of pairs are the rows of B tiles as they lie;
// float16 is packed in pairs here, too.
#include "kernel.h"
#include "vec_avx512.h"

#include "product.h"  // needs a Vec

namespace mk::cpu {
namespace {

template <DType D>
struct TileFormat {
  static constexpr DType dtype = D;
  static constexpr DType a_dtype = D;
};

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileK = 32;                            // k of one tile operation
constexpr int64_t kTileUnits = kTileK / 2;                // units of a panel it takes
constexpr int64_t kBTileBytes = kTileUnits * kUnitBytes;  // of both halves of a panel
constexpr int64_t kLines = kBTileBytes / kLine;           // of a panel that one operation reads
constexpr int64_t kPassTiles = 16;                        // A and B of a pass stay in the first-level cache
constexpr int64_t kAhead = 4;                             // operations
constexpr int64_t kTailStride = kTileK * 2;               // a row of the last, copied k
constexpr int64_t kStripTiles = 8;                        // rows that pay for reading a strip again

// Tiles 0-3 are sums (row tile, half panel), 4-5 A, 6-7 B. A and the sums have `rows` rows. The intrinsics do not tell
// GCC 12 that they read memory: fence() keeps earlier stores before them.
class TileShape {
 public:
  explicit TileShape(int64_t rows) {
    struct alignas(64) Configuration {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    };
    Configuration shape;
    for (int i = 0; i < 8; ++i) {
      shape.row_bytes[i] = 64;
      shape.rows[i] = static_cast<uint8_t>(i < 6 ? rows : kTileUnits);
    }
    fence();
    _tile_loadconfig(&shape);
  }
  TileShape(const TileShape&) = delete;
  TileShape& operator=(const TileShape&) = delete;
  ~TileShape() { _tile_release(); }

  static void fence() { __asm__ volatile("" ::: "memory"); }
};

// One or two row tiles times the two halves of a panel. The k beyond what A holds in place come from `tail`.
struct TileProduct {
  const char *a[2], *tail[2];
  int64_t stride_a, in_place;  // tile operations on A in place
  int64_t operations;          // with the tail
  const char* panel;
  const char* ahead = nullptr;  // weights to fetch,
  int64_t ahead_lines = 0;      // so many cache lines with each operation
  float* sum[2];
  int64_t stride_sum;  // bytes
  bool add;
};

// sums += A B for one tile of each: tdpbf16ps or tdpfp16ps, VEX.128.{F3 or F2}.0F38.W0 5C. GCC 12 and its assembler do
// not all know the second by name.
template <DType D, int sums, int a, int b>
void multiply_tiles() {
  constexpr int prefix = D == DType::f16 ? 3 : 2;
  __asm__ volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" ::"i"((~b & 15) << 3 | prefix), "i"(0xc0 | sums << 3 | a));
}

template <DType D, bool two>
void multiply_add(const char* a0, const char* a1, int64_t stride_a, const char* panel) {
  _tile_loadd(6, panel, kUnitBytes);
  _tile_loadd(4, a0, stride_a);
  _tile_loadd(7, panel + kUnitBytes / 2, kUnitBytes);
  multiply_tiles<D, 0, 4, 6>();
  if constexpr (two) _tile_loadd(5, a1, stride_a);
  multiply_tiles<D, 1, 4, 7>();
  if constexpr (two) {
    multiply_tiles<D, 2, 5, 6>();
    multiply_tiles<D, 3, 5, 7>();
  }
}

template <DType D, bool two>
void tiles(const TileProduct& t) {
  TileShape::fence();
  if (t.add) {
    _tile_loadd(0, t.sum[0], t.stride_sum);
    _tile_loadd(1, t.sum[0] + 16, t.stride_sum);
    if constexpr (two) {
      _tile_loadd(2, t.sum[1], t.stride_sum);
      _tile_loadd(3, t.sum[1] + 16, t.stride_sum);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (two) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  const char* ahead = t.ahead;
  const auto fetch = [&]() __attribute__((always_inline)) {
    if (t.ahead_lines == kLines) {
#pragma GCC unroll 32
      for (int64_t line = 0; line < kLines; ++line) _mm_prefetch(ahead + line * kLine, _MM_HINT_T0);
      ahead += kBTileBytes;
    } else {
      for (int64_t line = 0; line < t.ahead_lines; ++line, ahead += kLine) _mm_prefetch(ahead, _MM_HINT_T1);
    }
  };
  int64_t i = 0;
  for (; i < t.in_place; ++i) {
    fetch();
    multiply_add<D, two>(t.a[0] + i * kTailStride, t.a[1] + i * kTailStride, t.stride_a, t.panel + i * kBTileBytes);
  }
  for (; i < t.operations; ++i) {
    fetch();
    multiply_add<D, two>(t.tail[0], t.tail[1], kTailStride, t.panel + i * kBTileBytes);
  }
  _tile_stored(0, t.sum[0], t.stride_sum);
  _tile_stored(1, t.sum[0] + 16, t.stride_sum);
  if constexpr (two) {
    _tile_stored(2, t.sum[1], t.stride_sum);
    _tile_stored(3, t.sum[1] + 16, t.stride_sum);
  }
}

// Whole panels: sums of 32 columns plus bias and residual to y. `bias` is 32 floats.
template <DType D, bool with_residual>
void write_whole(const Product& p, const float* sum, int64_t stride_sum, int64_t row, int64_t rows, int64_t column,
                 const float* bias) {
  const Vec low_bias = Vec::load(bias), high_bias = Vec::load(bias + 16);
  for (int64_t i = 0; i < rows; ++i) {
    Vec low = Vec::load(sum + i * stride_sum) + low_bias, high = Vec::load(sum + i * stride_sum + 16) + high_bias;
    if constexpr (with_residual) {
      const char* const residual = p.residual + (row + i) * p.stride_residual + column * 2;
      low = low + load_as<D>(residual, Vec::lanes);
      high = high + load_as<D>(residual + 32, Vec::lanes);
    }
    low = apply(p.activation, low);
    high = apply(p.activation, high);
    char* const y = p.out + (row + i) * p.stride_out + column * 2;
    if constexpr (D == DType::bf16) {
      _mm512_storeu_si512(y, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v)));
    } else {
      store_as<D>(y, low, Vec::lanes);
      store_as<D>(y + 32, high, Vec::lanes);
    }
  }
}

template <DType D>
void write_part(const Product& p, float* sum, int64_t stride_sum, int64_t row, int64_t rows, int64_t column, int64_t n,
                const float* bias) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < kPanel; j += Vec::lanes) {
      float* s = sum + i * stride_sum + j;
      (Vec::load(s) + Vec::load(bias + j)).store(s);
    }
  }
  write_output<D>(p, sum, stride_sum, row, rows, column, n);
}

int64_t scratch_bytes_amx(int64_t rows, int64_t n) {
  return rows * kTailStride + kPassTiles * kBTileBytes +
         round_up(rows, kTileRows) * least(kBlockColumns, round_up(n, kPanel)) * 4;
}

// The k of A that do not fill a tile, followed by zeros.
void copy_tail(const Product& p, int64_t first, char* tail) {
  for (int64_t i = 0; i < p.rows; ++i) {
    const __m512i row =
        _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << (p.k - first)) - 1), p.a + i * p.stride_a + first * 2);
    _mm512_storeu_si512(tail + i * kTailStride, row);
  }
}

template <DType D>
void finish(const Product& p, float* sum, int64_t stride_sum, int64_t row, int64_t rows, int64_t column) {
  if (p.target == Target::hidden) return write_hidden<TileFormat<D>>(p, sum, stride_sum, row, rows, column);
  if (p.target == Target::partial) {
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(p.partial + (row + i) * p.stride_partial + column, sum + i * stride_sum, kPanel * sizeof(float));
    }
    return;
  }
  const int64_t n = least(kPanel, p.n - column);
  alignas(64) float bias[kPanel] = {};
  if (p.bias) {
    for (int64_t j = 0; j < n; j += Vec::lanes) load_as<D>(p.bias + (column + j) * 2, n - j).store(bias + j);
  }
  if (n < kPanel) return write_part<D>(p, sum, stride_sum, row, rows, column, n, bias);
  p.residual ? write_whole<D, true>(p, sum, stride_sum, row, rows, column, bias)
             : write_whole<D, false>(p, sum, stride_sum, row, rows, column, bias);
}

// k in passes, in each the panels, in each pairs of row tiles. Where one pass does, a strip of panels is short enough
// to be read by one pair of row tiles after the other: then a row of y is written in long pieces, not in single lines
// of many pages. All tiles have one height, so that they need one configuration: the last one may overlap the one
// before it and compute some rows twice.
template <DType D>
class TileMultiplication {
 public:
  TileMultiplication(const Product& product, char* scratch)
      : p(product),
        tail(scratch),
        own_panel(tail + p.rows * kTailStride),
        sums(reinterpret_cast<float*>(own_panel + kPassTiles * kBTileBytes)),
        row_tiles(ceil_div(p.rows, kTileRows)),
        height(ceil_div(p.rows, row_tiles)),
        operations(ceil_div(p.k, kTileK)),
        in_place(p.prepared ? operations : p.k / kTileK),
        // One pass where a panel is read once only.
        passes(row_tiles <= 2 && p.panels ? 1 : most(1, ceil_div(operations, kPassTiles))),
        pass(most(1, ceil_div(operations, passes))),
        rows_first(passes == 1 && p.panels && row_tiles >= kStripTiles && p.target == Target::output),
        strip(rows_first ? most(1, kStripBytes / most(1, operations * kBTileBytes)) * kPanel : kBlockColumns),
        stride_sum(passes == 1 ? kPanel : least(kBlockColumns, round_up(p.n, kPanel))) {
    if (in_place < operations) copy_tail(p, in_place * kTileK, tail);
  }

  void run() {
    const TileShape shape(height);
    for (block = 0; block < p.n; block += strip) {
      const int64_t end = least(p.n, block + strip);
      for (int64_t tile = 0; rows_first && tile < row_tiles; tile += 2) {
        for (int64_t column = block; column < end; column += kPanel) multiply_panel(column, tile, tile + 2);
      }
      for (int64_t i = 0; !rows_first && i < passes; ++i) {
        first = i * pass;
        for (int64_t column = block; column < end; column += kPanel) multiply_panel(column, 0, row_tiles);
      }
    }
  }

 private:
  // Row tiles [begin, end) of one panel.
  void multiply_panel(int64_t column, int64_t begin, int64_t end) {
    TileProduct t;
    t.stride_a = p.stride_a;
    t.stride_sum = stride_sum * 4;
    t.operations = most(0, least(pass, operations - first));
    t.in_place = least(t.operations, in_place - first);
    t.add = first > 0;
    t.panel = weights(column, t.operations);
    fetch_ahead(t, column, begin);
    const bool last = first + pass >= operations;
    for (int64_t i = begin; i < least(end, row_tiles); i += 2) {
      const int64_t rows[] = {least(i * height, p.rows - height), least((i + 1) * height, p.rows - height)};
      for (int j = 0; j < 2; ++j) {
        t.a[j] = p.a + rows[j] * p.stride_a + first * kTailStride;
        t.tail[j] = tail + rows[j] * kTailStride;
        t.sum[j] = sums + (i + j) * height * stride_sum + (passes == 1 ? 0 : column - block);
      }
      const bool two = i + 1 < row_tiles;
      two ? tiles<D, true>(t) : tiles<D, false>(t);
      t.ahead += t.operations * t.ahead_lines * kLine;
      if (!last) continue;
      for (int j = 0; j < 1 + two; ++j) finish<D>(p, t.sum[j], stride_sum, rows[j], height, column);
    }
  }

  // What is read next, spread over all tiles of a panel: all at once would occupy the buffers that A comes through.
  // What nobody could fetch before is fetched by those who read first: a first strip, or a panel that is read only
  // once.
  void fetch_ahead(TileProduct& t, int64_t column, int64_t tile) const {
    if (!(p.far && p.panels)) return;
    const int64_t pairs = ceil_div(row_tiles, 2);
    t.ahead_lines = ceil_div(kLines, pairs);
    if (pairs == 1) {
      t.ahead = t.panel + kAhead * kBTileBytes;
    } else if (!rows_first) {
      t.ahead = column + kPanel < p.n ? t.panel + p.stride_panel : p.panels + (first + t.operations) * kBTileBytes;
    } else if (block == 0 && tile == 0) {
      t.ahead = t.panel + p.stride_panel;
      t.ahead_lines = kLines;
    } else if (column + strip < p.n) {
      t.ahead = t.panel + strip / kPanel * p.stride_panel + tile / 2 * t.operations * t.ahead_lines * kLine;
    } else {
      t.ahead_lines = 0;
    }
  }

  const char* weights(int64_t column, int64_t tile_operations) {
    if (p.panels) return p.panels + column / kPanel * p.stride_panel + first * kBTileBytes;
    const char* w = p.w + column * p.stride_w + first * kTailStride;
    pack_units<DType::bf16>(w, p.stride_w, least(kPanel, p.n - column), least(pass * kTileK, p.k - first * kTileK),
                            tile_operations * kTileUnits, own_panel);
    return own_panel;
  }

  const Product& p;
  char *const tail, *const own_panel;
  float* const sums;
  const int64_t row_tiles, height;
  const int64_t operations, in_place;  // tile operations along k; those on A as it lies
  const int64_t passes, pass;          // number, tile operations of one
  const bool rows_first;               // one pass: all panels of a strip before the next rows
  const int64_t strip;                 // columns that are worked on together
  const int64_t stride_sum;
  int64_t block = 0;  // first column of this strip
  int64_t first = 0;  // tile operation of this pass
};

template <DType D>
void product_amx(const Product& p, char* scratch) {
  if (takes_dot_products(p)) return dot_products<TileFormat<D>>(p);
  TileMultiplication<D>(p, scratch).run();
}

template <DType D>
constexpr Kernel make_tile_kernel(const char* isa) {
  // Whatever the dtype, 16 bits are packed in pairs. Half as much reading of weights for the same arithmetic is worth
  // more here than elsewhere: blocks of 256 rows.
  return {isa,
          element_bytes(D),
          kTileRows / 2,
          256,
          220,
          scratch_bytes_amx,
          product_amx<D>,
          reduce<TileFormat<D>>,
          normalise<D, D>,
          normalise<D, D>,
          pack_panel<DType::bf16>};
}

}  // namespace

const Kernel& kernel_amx(DType dtype) {
  static constexpr Kernel bf16 = make_tile_kernel<DType::bf16>("amx_bf16");
  static constexpr Kernel f16 = make_tile_kernel<DType::f16>("amx_fp16");
  if (dtype == DType::f16 && best_isa() >= Isa::amx_fp16) return f16;
  return dtype == DType::bf16 ? bf16 : kernel_avx512_bf16(dtype);
}

}  // namespace mk::cpu
