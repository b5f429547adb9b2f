// Eight floats in a ymm register. Internal linkage: see product.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../layer.h"

namespace mk::cpu {
namespace {

struct Vec {
  static constexpr int lanes = 8;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set(float a) { return {_mm256_set1_ps(a)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  static __m256i bits(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  // The units of packed bfloat16 pairs and float16, as floats of the even and the odd k.
  static Vec even_bf16(const char* p) { return {_mm256_castsi256_ps(_mm256_slli_epi32(bits(p), 16))}; }
  static Vec odd_bf16(const char* p) {
    return {_mm256_castsi256_ps(_mm256_and_si256(bits(p), _mm256_set1_epi32(-65536)))};
  }
  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
};

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// The second operand where one is NaN.
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a 2^n for an integer n in [-250, 250], in two steps: 2^n itself may be out of range where a 2^n is not.
inline Vec scale_by_power(Vec a, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
  const auto power = [](__m256i exponent) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
  };
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, power(half)), power(_mm256_sub_epi32(whole, half)))};
}
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}

// Round to nearest even; NaN stays NaN.
inline __m128i round_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

inline __m256i first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// The first n lanes from memory, zero in the others; n >= 8 reads all.
template <DType D>
Vec load_as(const char* p, int64_t n) {
  if constexpr (D == DType::f32) {
    const float* source = reinterpret_cast<const float*>(p);
    return n >= Vec::lanes ? Vec::load(source) : Vec{_mm256_maskload_ps(source, first(n))};
  } else {
    __m128i half;
    if (n >= Vec::lanes) {
      half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    } else {
      uint16_t part[Vec::lanes] = {};
      std::memcpy(part, p, static_cast<size_t>(n) * 2);
      half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(part));
    }
    if constexpr (D == DType::f16) return {_mm256_cvtph_ps(half)};
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
}

// The first n lanes, rounded to the dtype, to memory.
template <DType D>
void store_as(char* p, Vec a, int64_t n) {
  if constexpr (D == DType::f32) {
    float* target = reinterpret_cast<float*>(p);
    if (n >= Vec::lanes) return a.store(target);
    _mm256_maskstore_ps(target, first(n), a.v);
  } else {
    __m128i half;
    if constexpr (D == DType::f16) {
      half = _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      half = round_bf16(a.v);
    }
    if (n >= Vec::lanes) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
    std::memcpy(p, &half, static_cast<size_t>(n) * 2);
  }
}

}  // namespace
}  // namespace mk::cpu
