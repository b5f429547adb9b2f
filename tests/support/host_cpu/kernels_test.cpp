// The CPU kernels without torch: calls of many shapes against the formula in double, in a program that needs no
// library, so that it runs on a machine that is only emulated (tests/test_cpu_host.py).
//
//   kernels_test [threads]      the instruction set is that of MK_CPU_ISA
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/isa.h"
#if defined(__aarch64__)
#include "cpu/vec_neon.h"
#else
#include "cpu/vec_portable.h"
#endif

namespace {

using mk::Activation;
using mk::DType;
using mk::cpu::load_as;
using mk::cpu::store_as;
using mk::cpu::Vec;

int failures = 0, checks = 0;

void report(const std::string& what) {
  if (++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
double epsilon(DType dtype) { return dtype == DType::f32 ? 0x1p-23 : dtype == DType::bf16 ? 0x1p-7 : 0x1p-10; }
const char* name_of(DType dtype) {
  return dtype == DType::f32 ? "float32" : dtype == DType::bf16 ? "bfloat16" : "float16";
}

// --- the dtypes, by scalar arithmetic that shares nothing with the vectors under test

double decode(uint16_t half, DType dtype) {
  const int mantissa_bits = dtype == DType::bf16 ? 7 : 10, exponent_bits = 15 - mantissa_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1, exponent = half >> mantissa_bits & ((1 << exponent_bits) - 1);
  const int mantissa = half & ((1 << mantissa_bits) - 1);
  double value;
  if (exponent == (1 << exponent_bits) - 1) {
    value = mantissa ? std::nan("") : INFINITY;
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, 1 - bias - mantissa_bits);
  } else {
    value = std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  }
  return half & 0x8000 ? -value : value;
}

// To nearest, ties to even: the neighbours of a value are neighbours as integers.
uint16_t encode(float value, DType dtype) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0, infinity = dtype == DType::bf16 ? 0x7f80 : 0x7c00;
  if (std::isnan(value)) return static_cast<uint16_t>(infinity | 1 << (dtype == DType::bf16 ? 6 : 9));
  const double magnitude = std::fabs(static_cast<double>(value));
  int low = 0, high = infinity;  // decode(low) <= magnitude
  while (high - low > 1)
    (decode(static_cast<uint16_t>((low + high) / 2), dtype) <= magnitude ? low : high) = (low + high) / 2;
  if (magnitude == INFINITY) return static_cast<uint16_t>(sign | infinity);
  const double below = decode(static_cast<uint16_t>(low), dtype);
  // Infinity stands where the next value would.
  const double above = high == infinity ? below + (below - decode(static_cast<uint16_t>(low - 1), dtype))
                                        : decode(static_cast<uint16_t>(high), dtype);
  const double down = magnitude - below, up = above - magnitude;
  return static_cast<uint16_t>(sign | (down < up || (down == up && low % 2 == 0) ? low : high));
}

double element(const void* data, int64_t i, DType dtype) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  return decode(static_cast<const uint16_t*>(data)[i], dtype);
}

float rounded(double value, DType dtype) {
  if (dtype == DType::f32) return static_cast<float>(value);
  return static_cast<float>(decode(encode(static_cast<float>(value), dtype), dtype));
}

// --- conversions: every 16-bit value, and the floats around every tie

template <DType D>
void check_conversions() {
  for (int h = 0; h < 0x10000; ++h) {
    uint16_t half[Vec::lanes];
    std::fill_n(half, Vec::lanes, static_cast<uint16_t>(h));
    const double exact = decode(half[0], D);
    float wide[Vec::lanes];
    load_as<D>(reinterpret_cast<const char*>(half), Vec::lanes).store(wide);
    ++checks;
    if (!(static_cast<double>(wide[Vec::lanes - 1]) == exact ||
          (std::isnan(exact) && std::isnan(wide[Vec::lanes - 1])))) {
      report("load of " + std::to_string(h) + " as " + name_of(D));
    }
    if (std::isnan(exact)) continue;
    const float at = static_cast<float>(exact);
    float tie = at;
    if (std::isfinite(at) && (h & 0x7fff) + 1 < (D == DType::bf16 ? 0x7f80 : 0x7c00)) {
      tie = static_cast<float>((exact + decode(static_cast<uint16_t>(h + 1), D)) / 2);
    }
    const float around[] = {at, tie, std::nextafter(tie, INFINITY), std::nextafter(tie, -INFINITY)};
    for (const float value : around) {
      uint16_t got[Vec::lanes];
      store_as<D>(reinterpret_cast<char*>(got), Vec::set(value), Vec::lanes);
      ++checks;
      if (got[0] != encode(value, D) || got[Vec::lanes - 1] != got[0]) {
        report("store of " + std::to_string(value) + " as " + name_of(D));
      }
    }
  }
  uint16_t got[Vec::lanes];
  store_as<D>(reinterpret_cast<char*>(got), Vec::set(std::nanf("")), Vec::lanes);
  if (!std::isnan(decode(got[0], D))) report(std::string("a NaN becomes a number in ") + name_of(D));
}

// --- calls

double apply(Activation activation, double z) {
  switch (activation) {
    case Activation::none:
      return z;
    case Activation::relu:
      return z > 0 ? z : 0;
    case Activation::gelu:
      return 0.5 * z * (1 + std::erf(z * std::sqrt(0.5)));
    case Activation::gelu_tanh:
      return 0.5 * z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
    case Activation::silu:
      return z / (1 + std::exp(-z));
  }
  return z;
}

// Memory that ends where the tensor ends, between bytes that nobody may write.
class Buffer {
 public:
  static constexpr int64_t kGuard = 256;
  explicit Buffer(int64_t bytes = 0) : size_(bytes), data_(static_cast<size_t>(bytes + 2 * kGuard + 64), '\xff') {}
  char* data() { return data_.data() + kGuard + (64 - reinterpret_cast<uintptr_t>(data_.data() + kGuard) % 64) % 64; }
  bool intact() {
    char* const begin = data();
    for (const char* p = data_.data(); p < data_.data() + data_.size(); ++p) {
      if ((p < begin || p >= begin + size_) && *p != '\xff') return false;
    }
    return true;
  }

 private:
  int64_t size_;
  std::string data_;
};

struct Size {
  int64_t M, N, K, R, rank;
};

void draw(char* target, int64_t n, double scale, DType dtype, std::mt19937& engine) {
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < n; ++i) {
    const float value = normal(engine) * static_cast<float>(scale);
    if (dtype == DType::f32) {
      std::memcpy(target + 4 * i, &value, 4);
    } else {
      const uint16_t half = encode(value, dtype);
      std::memcpy(target + 2 * i, &half, 2);
    }
  }
}

void run_in_threads(int64_t n, void (*body)(void*, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < n; ++i) threads.emplace_back(body, context, i);
  body(context, 0);
  for (std::thread& thread : threads) thread.join();
}

// As maestro_kernels/testing.py judges: at most twice the error of two plain matmuls in the dtype, plus its rounding.
// `pair` sums eight chains, as a library does.
struct Error {
  double most = 0, squares = 0;
  void add(double difference) {
    most = std::isnan(difference) || std::fabs(difference) > most ? std::fabs(difference) : most;
    squares += difference * difference;
  }
};

template <class A, class B>
double plain_sum(int64_t n, A a, B b) {
  float chain[8] = {};
  for (int64_t i = 0; i < n; ++i) chain[i % 8] += static_cast<float>(a(i)) * static_cast<float>(b(i));
  float total = 0;
  for (float c : chain) total += c;
  return total;
}

void check_call(const Size& s, DType dtype, Activation activation, bool packed, bool with_bias, bool with_h,
                bool with_residual, const mk::cpu::Pool& pool) {
  std::mt19937 engine(static_cast<unsigned>(s.M * 31 + s.N * 17 + s.K * 7 + s.rank));
  const int64_t bytes = bytes_of(dtype);
  // Rows of x, u and v lie apart: strides are not sizes.
  const int64_t pad = s.K % 2 ? 3 : 0, stride_x = s.K + pad, stride_u = s.R + pad, stride_v = s.K + pad;
  Buffer x(((s.M - 1) * stride_x + s.K) * bytes), u(((s.N - 1) * stride_u + s.R) * bytes);
  Buffer v(((s.R - 1) * stride_v + s.K) * bytes), bias(s.N * bytes), y(s.M * s.N * bytes), h(s.M * s.rank * bytes);
  draw(x.data(), (s.M - 1) * stride_x + s.K, 1, dtype, engine);
  draw(u.data(), (s.N - 1) * stride_u + s.R, std::pow(s.R, -0.5), dtype, engine);
  draw(v.data(), (s.R - 1) * stride_v + s.K, std::pow(s.K, -0.5), dtype, engine);
  draw(bias.data(), s.N, 1, dtype, engine);
  const int64_t stride_residual = s.N + pad;
  const float scale = with_residual ? -0.5F : 1;
  Buffer residual(with_residual ? ((s.M - 1) * stride_residual + s.N) * bytes : 0);
  if (with_residual) draw(residual.data(), (s.M - 1) * stride_residual + s.N, 1, dtype, engine);

  mk::Layer layer{};
  layer.M = s.M, layer.N = s.N, layer.K = s.K, layer.R = s.R, layer.rank = s.rank;
  layer.x = x.data(), layer.stride_xm = stride_x;
  layer.u = u.data(), layer.stride_un = stride_u;
  layer.v = v.data(), layer.stride_vr = stride_v;
  layer.bias = with_bias ? bias.data() : nullptr;
  layer.y = y.data(), layer.stride_ym = s.N;
  layer.h = with_h ? h.data() : nullptr, layer.stride_hm = s.rank;
  layer.activation = activation;
  layer.residual = with_residual ? residual.data() : nullptr, layer.stride_resm = stride_residual;
  layer.scale = scale;
  Buffer panels(packed ? static_cast<int64_t>(mk::cpu::packed_bytes(s.N, s.K, s.R, dtype)) : 0);
  if (packed) mk::cpu::pack(layer, dtype, panels.data(), pool);
  const void* const given = packed ? panels.data() : nullptr;
  const char* const refused = mk::cpu::forward(&layer, &given, 1, dtype, pool);

  const std::string call = std::string(mk::cpu::isa(dtype)) + " " + name_of(dtype) + " M=" + std::to_string(s.M) +
                           " N=" + std::to_string(s.N) + " K=" + std::to_string(s.K) + " R=" + std::to_string(s.R) +
                           " rank=" + std::to_string(s.rank) + (packed ? " packed" : "") + (with_bias ? " bias" : "") +
                           (with_h ? " H" : "") + (with_residual ? " residual" : "") + " activation " +
                           std::to_string(static_cast<int>(activation));
  ++checks;
  if (refused) return report(call + ": " + refused);
  for (Buffer* buffer : {&x, &u, &v, &bias, &y, &h, &panels, &residual}) {
    if (!buffer->intact()) return report(call + ": wrote outside of its outputs");
  }

  Error got, pair;
  double most = 0, squares = 0, products = 0;
  for (int64_t m = 0; m < s.M; ++m) {
    std::vector<double> exact_h(static_cast<size_t>(s.rank)), pair_h(exact_h), sizes_h(exact_h);
    for (int64_t r = 0; r < s.rank; ++r) {
      const auto a = [&](int64_t k) { return element(x.data(), m * stride_x + k, dtype); };
      const auto b = [&](int64_t k) { return element(v.data(), r * stride_v + k, dtype); };
      const auto i = static_cast<size_t>(r);
      for (int64_t k = 0; k < s.K; ++k) exact_h[i] += a(k) * b(k), sizes_h[i] += std::fabs(a(k) * b(k));
      exact_h[i] *= scale;
      pair_h[i] = static_cast<double>(rounded(scale * plain_sum(s.K, a, b), dtype));
      if (with_h) {
        const double error = std::fabs(element(h.data(), m * s.rank + r, dtype) - exact_h[i]);
        const double bound = 8 * 0x1p-23 * sizes_h[i] + epsilon(dtype) * std::fabs(exact_h[i]);
        if (!(error <= bound)) report(call + ": H at " + std::to_string(m) + ", " + std::to_string(r));
      }
    }
    for (int64_t n = 0; n < s.N; ++n) {
      double b = with_bias ? element(bias.data(), n, dtype) : 0;
      if (with_residual) b += element(residual.data(), m * stride_residual + n, dtype);
      const auto weight = [&](int64_t r) { return element(u.data(), n * stride_u + r, dtype); };
      double exact = b, size = std::fabs(b);
      for (int64_t r = 0; r < s.rank; ++r) {
        exact += weight(r) * exact_h[static_cast<size_t>(r)];
        size += std::fabs(weight(r)) * sizes_h[static_cast<size_t>(r)];
      }
      const double z = plain_sum(s.rank, weight, [&](int64_t r) { return pair_h[static_cast<size_t>(r)]; }) + b;
      const double ref = apply(activation, exact), by_pair = static_cast<double>(rounded(apply(activation, z), dtype));
      got.add(element(y.data(), m * s.N + n, dtype) - ref);
      pair.add(by_pair - ref);
      most = std::max(most, std::fabs(ref));
      squares += ref * ref;
      products = std::max(products, size);
    }
  }
  // The pair may be exact by luck where there are few values: a float32 rounding of the absolute products is allowed.
  const auto count = static_cast<double>(s.M * s.N);
  const double luck = 0x1p-23 * products;
  const double rms = std::sqrt(got.squares / count), eps = epsilon(dtype);
  const double rms_bound = 2 * std::sqrt(pair.squares / count) + eps / 2 * std::sqrt(squares / count) + luck;
  const double bound = 2 * pair.most + eps * most + luck;
  if (!(got.most <= bound) || !(rms <= rms_bound)) {
    char text[160];
    std::snprintf(text, sizeof text, ": max %.3e of %.3e, RMS %.3e of %.3e", got.most, bound, rms, rms_bound);
    report(call + text);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (const char* wrong = mk::cpu::isa_error()) return std::printf("%s\n", wrong), 2;
  const mk::cpu::Pool pool{argc > 1 ? std::atoi(argv[1]) : 1, run_in_threads};
  check_conversions<DType::bf16>();
  check_conversions<DType::f16>();
  // Off every tile: one of each, few rows (dot products), a column more or less than a panel, several passes over K.
  const Size sizes[] = {{1, 1, 1, 1, 1},       {1, 33, 65, 17, 16},   {2, 100, 40, 8, 8},     {3, 31, 129, 33, 32},
                        {4, 20, 1100, 18, 17}, {5, 64, 64, 32, 31},   {13, 97, 130, 31, 31},  {37, 56, 72, 24, 11},
                        {65, 34, 33, 40, 39},  {7, 1100, 36, 66, 65}, {6, 40, 300, 290, 288}, {9, 12, 20, 5, 0}};
  int call = 0;
  for (const Size& size : sizes) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (const bool packed : {false, true}) {
        const auto activation = static_cast<Activation>(call++ % 5);
        const bool with_h = !packed && size.rank > 0 && call % 3 == 0;
        for (const bool with_residual : {false, true}) {
          check_call(size, dtype, activation, packed, call % 2 == 0, with_h, with_residual, pool);
        }
      }
    }
  }
  std::printf("%s %s %s: %d checks, %d failures\n", mk::cpu::isa(DType::f32), mk::cpu::isa(DType::bf16),
              mk::cpu::isa(DType::f16), checks, failures);
  return failures ? 1 : 0;
}
