// What one instruction set offers the scheduler: matrix products on factors in panels or in rows.
//
// A panel holds 32 rows of a weight matrix W (n, k), transposed: units of 128 bytes, one after the other along k. A
// unit is 32 floats of one k (float32), 32 pairs of two k (bfloat16), or 32 values of an even and 32 of an odd k
// (float16). The columns beyond n and k are zero. A prefix of the rows is a prefix of the panels, a prefix of k a
// prefix of each panel; the unit or tile in which that ends is read whole, against zeros.
#pragma once

#include <cstdint>

#include "../layer.h"
#include "isa.h"

namespace mk::cpu {

constexpr int64_t kPanel = 32;       // columns of a panel
constexpr int64_t kUnitBytes = 128;  // bytes of a unit
constexpr int64_t kUnitPad = 16;     // a panel is a multiple of this many units long (one AMX tile)

// Static, so that a copy compiled for AVX-512 never serves a file compiled without it (product.h says more).
static constexpr inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

static constexpr inline int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
static constexpr inline int64_t unit_length(DType dtype) { return dtype == DType::f32 ? 1 : 2; }
static constexpr inline int64_t panel_bytes(int64_t k, DType dtype) {
  return round_up(ceil_div(k, unit_length(dtype)), kUnitPad) * kUnitBytes;
}

// Where the sums of a product go.
enum class Target {
  partial,  // float32 sums, to be added to those of other k
  hidden,   // H: scaled, rounded to the dtype, as the A of the next product and, if wanted, for the caller
  output,   // y: bias, residual, activation, rounded to the dtype
};

// C (rows, n) = A (rows, k) W^T for a range of W's rows, given as panels or as they are.
struct Product {
  int64_t rows, n, k;
  const char* a;         // elements of the dtype, or A's own format where `prepared`
  int64_t stride_a;      // bytes
  bool far;              // W does not come from this core's own cache: fetch it ahead of use
  bool prepared;         // A is an H that a product with target hidden wrote
  const char* panels;    // first panel of the range, at its first k; null: W is in rows
  int64_t stride_panel;  // bytes
  const char* w;         // first row of the range, at its first k
  int64_t stride_w;      // bytes
  Target target;
  float* partial;           // target partial: (rows, n rounded up to 32)
  int64_t stride_partial;   // floats
  float scale;              // target hidden
  char* hidden;             // target hidden: zeros up to a multiple of 32 columns beyond n
  int64_t stride_hidden;    // bytes
  char* out;                // target output: y. Target hidden: the caller's H or null
  int64_t stride_out;       // bytes
  const char* bias;         // target output: first of the range, or null
  const char* residual;     // target output: what is added to the range, or null
  int64_t stride_residual;  // bytes
  Activation activation;
};

// Rows h that become scale weight h / sqrt(mean(h^2) + eps).
struct Normalisation {
  int64_t rows, n;
  const char* from;
  int64_t stride_from;  // bytes
  char* to;             // may be `from`
  int64_t stride_to;
  const char* weight;  // (n,) elements of the dtype
  float eps, scale;
};

// A group of kernels for one dtype.
struct Kernel {
  const char* isa;
  int64_t a_bytes;         // bytes of one element of a prepared A
  int64_t least_rows;      // fewer rows take as long as this many
  int64_t far_block_rows;  // rows of a block at most where weights are read from beyond a core's own cache
  double macs_per_cycle;   // multiply-adds of one core, roughly
  // Bytes of scratch that product() wants for at most `rows` rows and `n` columns.
  int64_t (*scratch_bytes)(int64_t rows, int64_t n);
  void (*product)(const Product& product, char* scratch);
  // Sum `parts` partial results, `stride_part` floats apart, and finish them as target hidden.
  void (*reduce)(const Product& product, int64_t parts, int64_t stride_part);
  // Rows of a prepared A, which a product with target hidden wrote, and rows of the dtype; rounded to the dtype.
  void (*normalise_prepared)(const Normalisation& normalisation);
  void (*normalise)(const Normalisation& normalisation);
  // Write W's rows [0, n), n <= 32, k long, as one panel.
  void (*pack)(const char* w, int64_t stride_w, int64_t n, int64_t k, char* panel);
};

// Kernels of this machine for a dtype.
const Kernel& kernel_for(DType dtype);

const Kernel& kernel_portable(DType dtype);
const Kernel& kernel_neon(DType dtype);
const Kernel& kernel_avx2(DType dtype);
const Kernel& kernel_avx512(DType dtype);
const Kernel& kernel_avx512_bf16(DType dtype);
const Kernel& kernel_amx(DType dtype);

}  // namespace mk::cpu
