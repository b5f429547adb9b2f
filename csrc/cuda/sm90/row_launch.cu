// The CUDA calls of the row kernel's host side, each one checked.
#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdio>

#include "row.h"
#include "row_instances.cuh"

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
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
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

// A row-major (rows, columns) matrix read or written in boxes of (box_rows, 64); what lies outside reads as zero and
// is not written.
CUresult encode(CUtensorMap* map, DType dtype, const void* data, int64_t rows, int64_t columns, int64_t stride,
                int box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {kChunk, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  return encode_tiled()(map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                        2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// Null, or the name of the tensor whose map failed.
const char* encode_all(RowMaps* maps, const Layer& a, DType dtype, const Config& c, CUresult* result) {
  const Tile t = make_tile(c.width, c.groups);
  const struct {
    const char* name;
    CUtensorMap* map;
    const void* data;
    int64_t rows, columns, stride;
    int box_rows;
  } all[] = {{"x", &maps->x, a.x, a.M, a.K, a.stride_xm, t.block_m},
             {"v", &maps->v, a.v, bound(a), a.K, a.stride_vr, t.width / c.cluster},
             {"u", &maps->u, a.u, a.N, bound(a), a.stride_un, t.block_n / c.cluster},
             {"y", &maps->y, a.y, a.M, a.N, a.stride_ym, kGroupRows},
             {"h", &maps->h, a.h ? a.h : a.y, a.M, a.h ? bound(a) : a.N, a.h ? a.stride_hm : a.stride_ym, kGroupRows}};
  for (const auto& m : all) {
    *result = encode(m.map, dtype, m.data, m.rows, m.columns, m.stride, m.box_rows);
    if (*result != CUDA_SUCCESS) return m.name;
  }
  return nullptr;
}

// Raises the limit of dynamic shared memory, once per (device, instance): the call costs as much as a launch.
cudaError_t allow_shared(const void* kernel, int device, int instance, int bytes) {
  constexpr int kDevices = 64, kInstances = 16;
  static std::atomic<bool> allowed[kDevices][kInstances];
  std::atomic<bool>* const known = device < kDevices ? &allowed[device][instance] : nullptr;
  if (known && known->load(std::memory_order_relaxed)) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && known) known->store(true, std::memory_order_relaxed);
  return error;
}

}  // namespace

std::string launch(const Layer& layer, DType dtype, const Config& config, void* stream) {
  const auto fail = [&](const std::string& what) { return subject(layer, dtype, config) + what; };
  if (const char* why = invalid(config, layer)) return fail(why);
  if (!encode_tiled()) return fail("cuTensorMapEncodeTiled: not found in the driver (CUDA 12.0 or later is needed)");

  RowMaps maps;
  CUresult result = CUDA_SUCCESS;
  if (const char* name = encode_all(&maps, layer, dtype, config, &result))
    return fail("cuTensorMapEncodeTiled of " + std::string(name) + ": CUresult " + std::to_string(result));

  const RowKernel kernel =
      dtype == DType::bf16 ? row_kernel_bf16(config.width, config.groups) : row_kernel_f16(config.width, config.groups);
  const Tile tile = make_tile(config.width, config.groups);
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return fail(failure("cudaGetDevice", error));
  const int instance = ((dtype == DType::bf16) * 4 + config.width / kChunk - 1) * 2 + config.groups - 1;
  error = allow_shared(reinterpret_cast<const void*>(kernel), device, instance, tile.smem_bytes);
  if (error != cudaSuccess) return fail(failure("cudaFuncSetAttribute", error));

  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(config.cluster), 1, 1};
  cudaLaunchConfig_t grid{};
  grid.gridDim = dim3(static_cast<unsigned>(config.clusters * config.cluster));
  grid.blockDim = dim3(static_cast<unsigned>(128 * (config.groups + 1)));
  grid.dynamicSmemBytes = static_cast<size_t>(tile.smem_bytes);
  grid.stream = static_cast<cudaStream_t>(stream);
  grid.attrs = &cluster;
  grid.numAttrs = 1;
  const RowParams params{static_cast<int32_t>(layer.M),
                         static_cast<int32_t>(layer.N),
                         static_cast<int32_t>(layer.K),
                         static_cast<int32_t>(bound(layer)),
                         layer.rank_ptr,
                         layer.bias,
                         layer.h != nullptr,
                         layer.activation};
  error = cudaLaunchKernelEx(&grid, kernel, maps, params, config.cluster);
  return error == cudaSuccess ? std::string() : fail(failure("cudaLaunchKernelEx", error));
}

}  // namespace mk::cuda::sm90
