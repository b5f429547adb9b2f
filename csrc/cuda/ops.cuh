// Arithmetic: products of a warp in each dtype, and the activations.
#pragma once

#include "device.h"

namespace mk::cuda {

// A product op adds A (16 rows) · B^T (8 columns) over 64 bytes of K to sums that are spread over a warp: four lanes
// share a column of B, lane t of them holds bytes 16 t .. 16 t + 15 of it, and the same bytes of rows row_of(0 ..
// kRowPacks - 1) of A. each(sums, f) calls f(row, column, sum) for every element, in one lane of the warp.

// The tensor core wants other bytes in each lane, but a sum may be taken in any order if A and B agree: 16-byte loads
// feed it without a detour through shared memory.
template <class T, void (*kMma)(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2])>
struct TensorCore {
  using Element = T;
  static constexpr int kRowPacks = 2, kSums = 4;
  static constexpr int kBatch = 4;  // steps of K whose loads decode keeps in flight
  static MK_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { kMma(c, a, b); }
  static MK_DEVICE int row_of(int pack) { return lane_index() / 4 + 8 * pack; }
  static MK_DEVICE void add(float (&c)[kSums], const Pack (&a)[kRowPacks], const Pack& b) {
    mma(c, {a[0].word[0], a[1].word[0], a[0].word[1], a[1].word[1]}, {b.word[0], b.word[1]});
    mma(c, {a[0].word[2], a[1].word[2], a[0].word[3], a[1].word[3]}, {b.word[2], b.word[3]});
  }
  template <class F>
  static MK_DEVICE void each(const float (&c)[kSums], F&& f) {
#pragma unroll
    for (int e = 0; e < kSums; ++e) f(row_of(e / 2), lane_index() % 4 * 2 + e % 2, c[e]);
  }
};

MK_DEVICE void mma_rounded_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_tf32(c, {to_tf32(a[0]), to_tf32(a[1]), to_tf32(a[2]), to_tf32(a[3])}, {to_tf32(b[0]), to_tf32(b[1])});
}

struct Bf16 : TensorCore<bf16, mma_bf16> {};  // names of their own, for reports
struct F16 : TensorCore<f16, mma_f16> {};
struct Tf32 : TensorCore<float, mma_rounded_tf32> {};

// IEEE float32: plain multiply-adds, each lane over its own bytes of K, added up over the four lanes in the end.
struct Ieee {
  using Element = float;
  static constexpr int kRowPacks = 16, kSums = 16;
  static constexpr int kBatch = 1;  // 16 rows of 16 bytes are enough in flight
  static MK_DEVICE int row_of(int pack) { return pack; }
  static MK_DEVICE void add(float (&c)[kSums], const Pack (&a)[kRowPacks], const Pack& b) {
#pragma unroll
    for (int row = 0; row < kSums; ++row)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[row] = fma(bits_float(a[row].word[i]), bits_float(b.word[i]), c[row]);
  }
  template <class F>
  static MK_DEVICE void each(const float (&c)[kSums], F&& f) {
#pragma unroll
    for (int row = 0; row < kSums; ++row) {
      float sum = c[row];
      sum += bits_float(shuffle(float_bits(sum), lane_index() ^ 1));
      sum += bits_float(shuffle(float_bits(sum), lane_index() ^ 2));
      if (row % 4 == lane_index() % 4) f(row, lane_index() / 4, sum);
    }
  }
};

MK_DEVICE float sigmoid(float z) { return 1.f / (1.f + expf(-z)); }

template <int kCount, class F>
MK_DEVICE void apply(float (&z)[kCount], F&& f) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) z[i] = f(z[i]);
}
template <int kCount>
MK_DEVICE void activate(float (&z)[kCount], Activation activation) {
  switch (activation) {
    case Activation::relu:
      return apply(z, [](float a) { return a < 0.f ? 0.f : a; });  // NaN stays
    case Activation::gelu:
      return apply(z, [](float a) { return 0.5f * a * (1.f + erff(a * 0.70710678f)); });
    case Activation::gelu_tanh:
      return apply(z, [](float a) { return a * sigmoid(1.5957691f * (a + 0.044715f * a * a * a)); });
    case Activation::silu:
      return apply(z, [](float a) { return a * sigmoid(a); });
    case Activation::none:
      return;
  }
}

}  // namespace mk::cuda
