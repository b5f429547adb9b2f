// What the bindings hand to a kernel: plain structs, no torch header.
//
//   y = act(H u[:, :r]^T + bias + residual)      x (M, K), v (R, K), u (N, R), y and residual (M, N)
//
// H = scale x v[:r]^T, or scale norm[:r] h / sqrt(mean(h^2) + norm_eps) of each row h of x v[:r]^T where there is a
// norm.
#pragma once

#include <cstdint>

namespace mk {

enum class DType : int32_t { f32, bf16, f16 };

enum class Activation : int32_t { none, relu, gelu, gelu_tanh, silu };

// One layer of a call. Strides are in elements; the last dimension of every matrix has stride 1.
struct Layer {
  int64_t M, N, K, R;
  int64_t rank;             // 0..R; R where rank_ptr is given
  const int32_t* rank_ptr;  // rank in the memory of the device, clamped to 0..R by the kernel; or null
  const void* x;
  int64_t stride_xm;
  const void* u;
  int64_t stride_un;
  const void* v;
  int64_t stride_vr;
  const void* bias;  // (N,) or null
  void* y;
  int64_t stride_ym;
  void* h;  // H before a norm (M, rank) in the layer's dtype, zero beyond rank; null where nobody wants it
  int64_t stride_hm;
  Activation activation;
  const void* residual = nullptr;  // (M, N) or null; never y itself. CPU kernels only, as is all that follows
  int64_t stride_resm = 0;
  float scale = 1;
  const void* norm = nullptr;  // (R,) or null
  float norm_eps = 0;
};

}  // namespace mk
