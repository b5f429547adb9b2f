#include "instances.h"
#include "rows.cuh"

namespace mk::cuda {

const void* rows_instance(int op, bool large) {
  void (*const kernels[3][2])(Params) = {{rows_kernel<Bf16, false>, rows_kernel<Bf16, true>},
                                         {rows_kernel<F16, false>, rows_kernel<F16, true>},
                                         {rows_kernel<Tf32, false>, rows_kernel<Tf32, true>}};
  return op < 3 ? reinterpret_cast<const void*>(kernels[op][large]) : nullptr;
}

}  // namespace mk::cuda
