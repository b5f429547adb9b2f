// Any machine.
#include "kernel.h"
#include "vec_portable.h"

#include "product.h"  // needs a Vec

namespace mk::cpu {

const Kernel& kernel_portable(DType dtype) {
  static constexpr Kernel f32 = make_kernel<Format<DType::f32>, 2, 4>("portable", 3);
  static constexpr Kernel bf16 = make_kernel<Format<DType::bf16>, 2, 4>("portable", 2.5);
  static constexpr Kernel f16 = make_kernel<Format<DType::f16>, 2, 4>("portable", 1);
  return dtype == DType::f32 ? f32 : dtype == DType::bf16 ? bf16 : f16;
}

}  // namespace mk::cpu
