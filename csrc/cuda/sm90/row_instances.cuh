// The compiled row kernels, one file per dtype so that they build side by side.
#pragma once

#include "row_kernel.cuh"

namespace mk::cuda::sm90 {

template <bool BF16, int WIDTH, int GROUPS>
__global__ void __launch_bounds__(128 * (GROUPS + 1), make_tile(WIDTH, GROUPS).blocks_per_sm)
    row_kernel(const __grid_constant__ RowMaps maps, const __grid_constant__ RowParams params, int32_t cluster) {
  run_row_kernel<BF16, WIDTH, GROUPS>(maps, params, cluster);
}

template <bool BF16>
RowKernel find_row_kernel(int width, int groups) {
  switch (width * 10 + groups) {
    case 641:
      return row_kernel<BF16, 64, 1>;
    case 642:
      return row_kernel<BF16, 64, 2>;
    case 1281:
      return row_kernel<BF16, 128, 1>;
    case 1282:
      return row_kernel<BF16, 128, 2>;
    case 1921:
      return row_kernel<BF16, 192, 1>;
    case 1922:
      return row_kernel<BF16, 192, 2>;
    case 2561:
      return row_kernel<BF16, 256, 1>;
    case 2562:
      return row_kernel<BF16, 256, 2>;
  }
  return nullptr;
}

}  // namespace mk::cuda::sm90
