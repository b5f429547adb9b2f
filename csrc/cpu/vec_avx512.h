// Sixteen floats in a zmm register. Internal linkage: see product.h.
#pragma once

// GCC 12 calls its own _mm512_undefined_ps() uninitialized (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include <cstdint>

#include "../layer.h"

namespace mk::cpu {
namespace {

struct Vec {
  static constexpr int lanes = 16;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set(float a) { return {_mm512_set1_ps(a)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  // The units of packed bfloat16 pairs and float16, as floats of the even and the odd k.
  static Vec even_bf16(const char* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))}; }
  static Vec odd_bf16(const char* p) {
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(-65536)))};
  }
  float sum() const { return _mm512_reduce_add_ps(v); }
};

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The second operand where one is NaN.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a 2^n for an integer n in [-250, 250]
inline Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}

inline __mmask16 first(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }

// Round to nearest even; NaN stays NaN.
inline __m256i round_bf16(__m512 v) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}

// The first n lanes from memory, zero in the others; n >= 16 reads all.
template <DType D>
Vec load_as(const char* p, int64_t n) {
  if constexpr (D == DType::f32) {
    return {_mm512_maskz_loadu_ps(first(n), p)};
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(first(n), p);
    if constexpr (D == DType::f16) return {_mm512_cvtph_ps(half)};
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
}

// The first n lanes, rounded to the dtype, to memory. Whole vectors go without a mask: AMD's Zen 4 splits masked stores
// of 16-bit lanes into many steps.
template <DType D>
void store_as(char* p, Vec a, int64_t n) {
  if constexpr (D == DType::f32) {
    if (n >= 16) return _mm512_storeu_ps(p, a.v);
    _mm512_mask_storeu_ps(p, first(n), a.v);
  } else {
    __m256i half;
    if constexpr (D == DType::f16) {
      half = _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      half = round_bf16(a.v);
    }
    if (n >= 16) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
    _mm256_mask_storeu_epi16(p, first(n), half);
  }
}

}  // namespace
}  // namespace mk::cpu
