#include "decode.cuh"
#include "instances.h"

namespace mk::cuda {

const void* decode_instance(int op, bool large) {
  void (*const kernels[4][2])(Params) = {{decode_kernel<Bf16, 1>, decode_kernel<Bf16, 4>},
                                         {decode_kernel<F16, 1>, decode_kernel<F16, 4>},
                                         {decode_kernel<Tf32, 1>, decode_kernel<Tf32, 4>},
                                         {decode_kernel<Ieee, 1>, decode_kernel<Ieee, 4>}};
  return reinterpret_cast<const void*>(kernels[op][large]);
}

}  // namespace mk::cuda
