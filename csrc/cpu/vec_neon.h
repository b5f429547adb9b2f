// Eight floats in two q registers: the lanes of AVX2, so that chains of additions are as short. Only what every
// AArch64 has: bfloat16 goes through integers, float16 through the conversions of ARMv8.0. Internal linkage: see
// product.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "../layer.h"

namespace mk::cpu {
namespace {

struct Vec {
  static constexpr int lanes = 8;
  float32x4_t low, high;

  static Vec zero() { return set(0.0f); }
  static Vec set(float a) {
    const float32x4_t all = vdupq_n_f32(a);
    return {all, all};
  }
  static Vec load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  void store(float* p) const {
    vst1q_f32(p, low);
    vst1q_f32(p + 4, high);
  }
  static uint32x4_t bits(const char* p) { return vreinterpretq_u32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(p))); }
  static float32x4_t even(uint32x4_t pairs) { return vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16)); }
  static float32x4_t odd(uint32x4_t pairs) { return vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000))); }
  // The units of packed bfloat16 pairs, as floats of the even and the odd k.
  static Vec even_bf16(const char* p) { return {even(bits(p)), even(bits(p + 16))}; }
  static Vec odd_bf16(const char* p) { return {odd(bits(p)), odd(bits(p + 16))}; }
  float sum() const { return vaddvq_f32(vaddq_f32(low, high)); }
};

inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
// The second operand where one is NaN, which FMAX and FMIN do not give.
inline Vec max(Vec a, Vec b) {
  return {vbslq_f32(vcgtq_f32(a.low, b.low), a.low, b.low), vbslq_f32(vcgtq_f32(a.high, b.high), a.high, b.high)};
}
inline Vec min(Vec a, Vec b) {
  return {vbslq_f32(vcltq_f32(a.low, b.low), a.low, b.low), vbslq_f32(vcltq_f32(a.high, b.high), a.high, b.high)};
}
inline Vec abs(Vec a) { return {vabsq_f32(a.low), vabsq_f32(a.high)}; }
inline Vec round(Vec a) { return {vrndnq_f32(a.low), vrndnq_f32(a.high)}; }
// 2^n for an integer n in [-126, 127]
inline float32x4_t power_of_two(float32x4_t n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}
// a 2^n for an integer n in [-250, 250], in two steps: 2^n itself may be out of range where a 2^n is not.
inline float32x4_t scale_by_power(float32x4_t a, float32x4_t n) {
  const float32x4_t half = vrndnq_f32(vmulq_n_f32(n, 0.5f));
  return vmulq_f32(vmulq_f32(a, power_of_two(half)), power_of_two(vsubq_f32(n, half)));
}
inline Vec scale_by_power(Vec a, Vec n) { return {scale_by_power(a.low, n.low), scale_by_power(a.high, n.high)}; }
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  return {vbslq_f32(vcltq_f32(a.low, b.low), yes.low, no.low), vbslq_f32(vcltq_f32(a.high, b.high), yes.high, no.high)};
}

// Round to nearest even; NaN stays NaN.
inline uint16x4_t round_bf16(float32x4_t a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), rounded, vdupq_n_u32(0x7fc00000)), 16);
}

template <DType D>
Vec widen(uint16x8_t half) {
  if constexpr (D == DType::f16) {
    const float16x8_t value = vreinterpretq_f16_u16(half);
    return {vcvt_f32_f16(vget_low_f16(value)), vcvt_f32_f16(vget_high_f16(value))};
  }
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(half), 16)),
          vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(half), 16))};
}

template <DType D>
uint16x8_t narrow(Vec a) {
  if constexpr (D == DType::f16) {
    return vreinterpretq_u16_f16(vcombine_f16(vcvt_f16_f32(a.low), vcvt_f16_f32(a.high)));
  }
  return vcombine_u16(round_bf16(a.low), round_bf16(a.high));
}

// The first n lanes from memory, zero in the others; n >= 8 reads all.
template <DType D>
Vec load_as(const char* p, int64_t n) {
  if constexpr (D == DType::f32) {
    const float* source = reinterpret_cast<const float*>(p);
    if (n >= Vec::lanes) return Vec::load(source);
    float part[Vec::lanes] = {};
    std::memcpy(part, source, static_cast<size_t>(n) * 4);
    return Vec::load(part);
  } else {
    if (n >= Vec::lanes) return widen<D>(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
    uint16_t part[Vec::lanes] = {};
    std::memcpy(part, p, static_cast<size_t>(n) * 2);
    return widen<D>(vld1q_u16(part));
  }
}

// The first n lanes, rounded to the dtype, to memory.
template <DType D>
void store_as(char* p, Vec a, int64_t n) {
  if constexpr (D == DType::f32) {
    if (n >= Vec::lanes) return a.store(reinterpret_cast<float*>(p));
    float part[Vec::lanes];
    a.store(part);
    std::memcpy(p, part, static_cast<size_t>(n) * 4);
  } else {
    const uint16x8_t half = narrow<D>(a);
    if (n >= Vec::lanes) return vst1q_u16(reinterpret_cast<uint16_t*>(p), half);
    std::memcpy(p, &half, static_cast<size_t>(n) * 2);
  }
}

}  // namespace
}  // namespace mk::cpu
