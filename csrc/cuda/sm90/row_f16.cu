#include "row_instances.cuh"

namespace mk::cuda::sm90 {
RowKernel row_kernel_f16(int width, int groups) { return find_row_kernel<false>(width, groups); }
}  // namespace mk::cuda::sm90
