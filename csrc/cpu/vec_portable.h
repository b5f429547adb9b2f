// Four floats in whatever the target calls a register (vector extension of GCC and Clang). Internal linkage: see
// product.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../layer.h"

namespace mk::cpu {
namespace {

using Float4 = float __attribute__((vector_size(16)));
using Int4 = int32_t __attribute__((vector_size(16)));

// Between vectors of one size a cast keeps the bits.
inline Float4 as_float(Int4 bits) { return (Float4)bits; }
inline Int4 as_int(Float4 value) { return (Int4)value; }
inline Float4 choose(Int4 yes, Float4 a, Float4 b) { return as_float((yes & as_int(a)) | (~yes & as_int(b))); }

struct Vec {
  static constexpr int lanes = 4;
  Float4 v;

  static Vec zero() { return set(0.0f); }
  static Vec set(float a) { return {Float4{a, a, a, a}}; }
  static Vec load(const float* p) {
    Vec a;
    std::memcpy(&a.v, p, sizeof a.v);
    return a;
  }
  void store(float* p) const { std::memcpy(p, &v, sizeof v); }
  static Int4 bits(const char* p) {
    Int4 a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  // The units of packed bfloat16 pairs, as floats of the even and the odd k.
  static Vec even_bf16(const char* p) { return {as_float(bits(p) << 16)}; }
  static Vec odd_bf16(const char* p) { return {as_float(bits(p) & -65536)}; }
  float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
};

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
// The second operand where one is NaN.
inline Vec max(Vec a, Vec b) { return {choose(a.v > b.v, a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {choose(a.v < b.v, a.v, b.v)}; }
inline Vec abs(Vec a) { return {as_float(as_int(a.v) & 0x7fffffff)}; }
inline Vec round(Vec a) {  // adding 1.5 2^23 leaves no room for a fraction; |a| < 2^22
  const Float4 shift = Vec::set(12582912.0f).v;
  return {(a.v + shift) - shift};
}
// a 2^n for an integer n in [-250, 250], in two steps: 2^n itself may be out of range where a 2^n is not.
inline Vec scale_by_power(Vec a, Vec n) {
  const Int4 whole = __builtin_convertvector(n.v, Int4), half = whole >> 1;
  return {a.v * as_float((half + 127) << 23) * as_float((whole - half + 127) << 23)};
}
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) { return {choose(a.v < b.v, yes.v, no.v)}; }

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline uint16_t to_bf16(float value) {
  if (value != value) return 0x7fc0;
  const uint32_t bits = bits_of(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // A float16 read as a float of the same fields is 2^112 too small, subnormals included.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

inline uint16_t to_f16(float value) {
  const uint32_t sign = bits_of(value) >> 16 & 0x8000, magnitude = bits_of(value) & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 rounds to infinity
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 rounds at 2^-24, its last bit
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1)) - (112u << 23)) >> 13);
}

// The first n lanes from memory, zero in the others; n >= 4 reads all.
template <DType D>
Vec load_as(const char* p, int64_t n) {
  float lane[Vec::lanes] = {};
  for (int64_t i = 0; i < (n < Vec::lanes ? n : Vec::lanes); ++i) {
    if constexpr (D == DType::f32) {
      std::memcpy(&lane[i], p + 4 * i, 4);
    } else {
      uint16_t half;
      std::memcpy(&half, p + 2 * i, 2);
      lane[i] = D == DType::f16 ? from_f16(half) : float_of(static_cast<uint32_t>(half) << 16);
    }
  }
  return Vec::load(lane);
}

// The first n lanes, rounded to the dtype, to memory.
template <DType D>
void store_as(char* p, Vec a, int64_t n) {
  for (int64_t i = 0; i < (n < Vec::lanes ? n : Vec::lanes); ++i) {
    const float value = a.v[i];
    if constexpr (D == DType::f32) {
      std::memcpy(p + 4 * i, &value, 4);
    } else {
      const uint16_t half = D == DType::f16 ? to_f16(value) : to_bf16(value);
      std::memcpy(p + 2 * i, &half, 2);
    }
  }
}

}  // namespace
}  // namespace mk::cpu
