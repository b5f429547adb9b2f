// AVX-512 (F, BW, DQ, VL): 24 accumulators of 16 floats.
#include "kernel.h"
#include "vec_avx512.h"

#include "product.h"  // needs a Vec

namespace mk::cpu {

const Kernel& kernel_avx512(DType dtype) {
  static constexpr Kernel f32 = make_kernel<Format<DType::f32>, 2, 12>("avx512", 28);
  static constexpr Kernel bf16 = make_kernel<Format<DType::bf16>, 2, 12>("avx512", 24);
  static constexpr Kernel f16 = make_kernel<Format<DType::f16>, 2, 12>("avx512", 24);
  return dtype == DType::f32 ? f32 : dtype == DType::bf16 ? bf16 : f16;
}

}  // namespace mk::cpu
