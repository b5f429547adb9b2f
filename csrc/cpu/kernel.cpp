#include "kernel.h"

namespace mk::cpu {
namespace {

// Sets the compiler did not know are not in this build.
const Kernel& select(DType dtype) {
  [[maybe_unused]] const Isa isa = best_isa();
#if defined(MK_HAVE_AMX)
  if (isa >= Isa::amx) return kernel_amx(dtype);
#endif
#if defined(MK_HAVE_AVX512_BF16)
  if (isa >= Isa::avx512_bf16) return kernel_avx512_bf16(dtype);
#endif
#if defined(MK_HAVE_AVX512)
  if (isa >= Isa::avx512) return kernel_avx512(dtype);
#endif
#if defined(MK_HAVE_AVX2)
  if (isa >= Isa::avx2) return kernel_avx2(dtype);
#endif
#if defined(MK_HAVE_NEON)
  if (isa >= Isa::neon) return kernel_neon(dtype);
#endif
  return kernel_portable(dtype);
}

}  // namespace

const Kernel& kernel_for(DType dtype) {
  static const Kernel* const kernels[] = {&select(DType::f32), &select(DType::bf16), &select(DType::f16)};
  return *kernels[static_cast<int>(dtype)];
}

}  // namespace mk::cpu
