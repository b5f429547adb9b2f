// What the host hands to a row kernel, and how it finds one. No device code: a host compiler reads this.
#pragma once

#ifdef MK_HOST_DEVICE
#include "sm90_host.h"
#else
#include <cuda.h>
#endif

#include <cstdint>

#include "../../layer.h"

namespace mk::cuda::sm90 {

#ifdef MK_HOST_DEVICE
using TensorMap = ptx::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

struct RowMaps {
  TensorMap x, v, u, y;
};

struct RowParams {
  int32_t M, N, K;
  int32_t rank;             // R where rank_ptr is given
  const int32_t* rank_ptr;  // clamped to 0..rank; or null
  const void* bias;         // (N,) or null
  void* h;                  // (M, rank), zero from the active rank on; or null
  int64_t stride_hm;
  Activation activation;
  int32_t items, whole, parts;  // of the walk, see Config
};

using RowKernel = void (*)(RowMaps, RowParams, int32_t);

// The instance for H of `width` columns and so many groups of 64 rows, or null.
RowKernel row_kernel_bf16(int width, int groups);
RowKernel row_kernel_f16(int width, int groups);

}  // namespace mk::cuda::sm90
