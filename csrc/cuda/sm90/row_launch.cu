// The CUDA calls of the row kernel's host side, each one checked.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdio>

#include "row.h"
#include "row_arguments.h"
#include "row_layout.h"

namespace mk::cuda::sm90 {
namespace {

// The driver's function, found through the runtime so that the library does not need libcuda to load.
using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

EncodeTiled encode_tiled() {
  static const EncodeTiled found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
    constexpr const char* name = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &status);
#else  // asks for the function as of the runtime's own version, 12.0 to 12.4
    const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &status);
#endif
    const bool usable = error == cudaSuccess && status == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<EncodeTiled>(function) : nullptr;
  }();
  return found;
}

// "row_kernel sm_90a bfloat16 (M=8192 N=4096 K=4096 rank=256; H 256 wide, 32 x 2 blocks of 128 rows): "
std::string subject(const Layer& a, DType dtype, const Config& c) {
  char text[256];
  std::snprintf(text, sizeof text,
                "row_kernel sm_90a %s (M=%lld N=%lld K=%lld rank=%lld; H %d wide, %d x %d blocks of %d rows): ",
                dtype == DType::bf16 ? "bfloat16" : "float16", static_cast<long long>(a.M), static_cast<long long>(a.N),
                static_cast<long long>(a.K), static_cast<long long>(a.rank), c.width, c.clusters, c.cluster,
                kGroupRows * c.groups);
  return text;
}

std::string failure(const char* call, cudaError_t error) {
  return std::string(call) + ": " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")";
}

CUresult encode(CUtensorMap* map, DType dtype, const Matrix& m) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(m.columns), static_cast<cuuint64_t>(m.rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(m.stride) * 2};
  const cuuint32_t box[2] = {kChunk, static_cast<cuuint32_t>(m.box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  return encode_tiled()(map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                        2, const_cast<void*>(m.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// Empty, or what failed.
std::string encode_all(RowMaps* maps, const Matrices& m, DType dtype) {
  const struct {
    const char* name;
    CUtensorMap* map;
    const Matrix& matrix;
  } all[] = {{"x", &maps->x, m.x}, {"v", &maps->v, m.v}, {"u", &maps->u, m.u}, {"y", &maps->y, m.y}};
  for (const auto& one : all) {
    if (const CUresult result = encode(one.map, dtype, one.matrix))
      return "cuTensorMapEncodeTiled of " + std::string(one.name) + ": CUresult " + std::to_string(result);
  }
  return {};
}

// The C interface of the runtime throughout: its templates exist for nvcc only, and this file is also read by a host
// compiler (tests/support/old_cuda.py).
struct Instance {
  const void* kernel;
  int index;  // 0 .. kInstances - 1, one for each kernel and cluster size
};
constexpr int kInstances = 2 * 4 * 2 * 3;

Instance find(DType dtype, const Config& c) {
  const bool bf16 = dtype == DType::bf16;
  const int log2_cluster = c.cluster == 4 ? 2 : c.cluster - 1;
  const RowKernel kernel = bf16 ? row_kernel_bf16(c.width, c.groups) : row_kernel_f16(c.width, c.groups);
  return {reinterpret_cast<const void*>(kernel),
          ((bf16 * 4 + c.width / kChunk - 1) * 2 + c.groups - 1) * 3 + log2_cluster};
}

// Prepares a kernel on the current device, once: allows its shared memory and asks how many clusters run at a time.
// More than those would wait for a whole walk of another, since each has its row groups from the start.
std::string prepare(const Instance& instance, const cudaLaunchConfig_t& grid, int* clusters) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices][kInstances];
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return failure("cudaGetDevice", error);
  std::atomic<int>* const slot = device < kDevices ? &known[device][instance.index] : nullptr;
  if (slot && (*clusters = slot->load(std::memory_order_relaxed)) > 0) return {};
  if (const cudaError_t error = cudaFuncSetAttribute(instance.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(grid.dynamicSmemBytes)))
    return failure("cudaFuncSetAttribute", error);
  if (const cudaError_t error = cudaOccupancyMaxActiveClusters(clusters, instance.kernel, &grid))
    return failure("cudaOccupancyMaxActiveClusters", error);
  if (*clusters < 1) return "cudaOccupancyMaxActiveClusters: no cluster fits the device";
  if (slot) slot->store(*clusters, std::memory_order_relaxed);
  return {};
}

}  // namespace

std::string launch(const Layer& layer, DType dtype, const Config& config, void* stream) {
  const auto fail = [&](const std::string& what) {
    static_cast<void>(cudaGetLastError());  // or the next call of somebody else would report it
    return subject(layer, dtype, config) + what;
  };
  if (const char* why = invalid(config, layer)) return fail(why);
  if (!encode_tiled()) return fail("cuTensorMapEncodeTiled: not found in the driver (CUDA 12.0 or later is needed)");
  RowMaps maps;
  if (const std::string error = encode_all(&maps, make_matrices(layer, config), dtype); !error.empty())
    return fail(error);

  const Instance instance = find(dtype, config);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(config.cluster), 1, 1};
  cudaLaunchConfig_t grid{};
  grid.gridDim = dim3(static_cast<unsigned>(config.clusters * config.cluster));
  grid.blockDim = dim3(static_cast<unsigned>(128 * (config.groups + 1)));
  grid.dynamicSmemBytes = static_cast<size_t>(make_tile(config.width, config.groups).smem_bytes);
  grid.stream = static_cast<cudaStream_t>(stream);
  grid.attrs = &cluster;
  grid.numAttrs = 1;
  int resident = 0;
  if (const std::string error = prepare(instance, grid, &resident); !error.empty()) return fail(error);
  grid.gridDim.x = static_cast<unsigned>(std::min(config.clusters, resident) * config.cluster);

  RowParams params{static_cast<int32_t>(layer.M),
                   static_cast<int32_t>(layer.N),
                   static_cast<int32_t>(layer.K),
                   static_cast<int32_t>(bound(layer)),
                   layer.rank_ptr,
                   layer.bias,
                   layer.h,
                   layer.stride_hm,
                   layer.activation,
                   static_cast<int32_t>(items(layer.M, config)),
                   config.whole,
                   config.parts};
  int32_t cluster_size = config.cluster;
  void* arguments[] = {&maps, &params, &cluster_size};
  if (const cudaError_t error = cudaLaunchKernelExC(&grid, instance.kernel, arguments))
    return fail(failure("cudaLaunchKernelExC", error));
  return {};
}

}  // namespace mk::cuda::sm90
