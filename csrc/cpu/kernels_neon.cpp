// AArch64: 12 accumulators of 8 floats, which are 24 of the 32 registers.
#include "kernel.h"
#include "vec_neon.h"

#include "product.h"  // needs a Vec

namespace mk::cpu {

const Kernel& kernel_neon(DType dtype) {
  static constexpr Kernel f32 = make_kernel<Format<DType::f32>, 2, 6>("neon", 7);
  static constexpr Kernel bf16 = make_kernel<Format<DType::bf16>, 2, 6>("neon", 6);
  static constexpr Kernel f16 = make_kernel<Format<DType::f16>, 2, 6>("neon", 6);
  return dtype == DType::f32 ? f32 : dtype == DType::bf16 ? bf16 : f16;
}

}  // namespace mk::cpu
