// AVX2, FMA and F16C: 12 accumulators of 8 floats.
#include "kernel.h"
#include "vec_avx2.h"

#include "product.h"  // needs a Vec

namespace mk::cpu {

const Kernel& kernel_avx2(DType dtype) {
  static constexpr Kernel f32 = make_kernel<Format<DType::f32>, 2, 6>("avx2", 14);
  static constexpr Kernel bf16 = make_kernel<Format<DType::bf16>, 2, 6>("avx2", 12);
  static constexpr Kernel f16 = make_kernel<Format<DType::f16>, 2, 6>("avx2", 12);
  return dtype == DType::f32 ? f32 : dtype == DType::bf16 ? bf16 : f16;
}

}  // namespace mk::cpu
