#include "row_instances.cuh"

namespace mk::cuda::sm90 {
RowKernel row_kernel_bf16(int width, int groups) { return find_row_kernel<true>(width, groups); }
}  // namespace mk::cuda::sm90
