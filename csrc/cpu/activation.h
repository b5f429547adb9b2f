// The activations on a Vec. Internal linkage: see product.h.
#pragma once

#include "../layer.h"

namespace mk::cpu {
namespace {

template <int n>
Vec polynomial(Vec x, const float (&c)[n]) {  // highest power first
  Vec p = Vec::set(c[0]);
  for (int i = 1; i < n; ++i) p = fma(p, x, Vec::set(c[i]));
  return p;
}

// e^x to 1 ulp (Cephes expf): infinity from 88.8 on, 0 below -104 by way of the denormals, NaN for NaN.
inline Vec exp(Vec x) {
  static constexpr float c[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  x = min(Vec::set(89.0f), max(Vec::set(-104.0f), x));
  const Vec n = round(x * Vec::set(1.44269504088896341f));
  const Vec r = fma(n, Vec::set(2.12194440e-4f), fma(n, Vec::set(-0.693359375f), x));
  return scale_by_power(fma(polynomial(r, c), r * r, r + Vec::set(1.0f)), n);
}

// z / (1 + e^-s). A quotient and no product with the sigmoid: where e^-s overflows, a finite z gives a zero and an
// infinite one NaN, as in torch.
inline Vec times_sigmoid(Vec z, Vec s) { return z / (Vec::set(1.0f) + exp(Vec::zero() - s)); }

// x Phi(x) = x (1 + erf(x / sqrt 2)) / 2. Near zero erf is a polynomial (Cephes erff); beyond one it comes from erfc,
// whose Chebyshev fit has a relative error of 1.2e-7 everywhere (Numerical Recipes 6.2), so that the left tail is
// right.
inline Vec gelu(Vec x) {
  static constexpr float near[] = {7.853861353153693e-5f,  -8.010193625184903e-4f, 5.188327685732524e-3f,
                                   -2.685381193529856e-2f, 1.128358514861418e-1f,  -3.761262582423300e-1f,
                                   1.128379165726710e+0f};
  static constexpr float far[] = {0.17087277f,  -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                                  -0.18628806f, 0.09678418f,  0.37409196f, 1.00002368f,  -1.26551223f};
  const Vec one = Vec::set(1.0f), half_x = Vec::set(0.5f) * x, w = x * Vec::set(0.70710678118654752f);
  const Vec erf_near = w * polynomial(w * w, near);
  const Vec z = abs(w), t = one / fma(Vec::set(0.5f), z, one);
  const Vec erfc_z = t * exp(polynomial(t, far) - z * z);
  const Vec one_plus_erf_far = select_less(x, Vec::zero(), erfc_z, Vec::set(2.0f) - erfc_z);
  return half_x * select_less(z, one, one + erf_near, one_plus_erf_far);
}

// x sigmoid(2 c) = x (1 + tanh c) / 2 without cancellation, c = sqrt(2 / pi) (x + 0.044715 x^3).
inline Vec gelu_tanh(Vec x) {
  return times_sigmoid(x, x * fma(x * x, Vec::set(2 * 0.7978845608f * 0.044715f), Vec::set(2 * 0.7978845608f)));
}

inline Vec apply(Activation activation, Vec x) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return max(Vec::zero(), x);
    case Activation::gelu:
      return gelu(x);
    case Activation::gelu_tanh:
      return gelu_tanh(x);
    case Activation::silu:
      return times_sigmoid(x, x);
  }
  return x;
}

}  // namespace
}  // namespace mk::cpu
