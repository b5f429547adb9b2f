// The CUDA calls of the host, each one checked.
#include <cuda_runtime.h>

#include <atomic>
#include <cstdio>

#include "instances.h"
#ifdef MK_CUDA_SM90
#include "sm90/row.h"
#endif

namespace mk::cuda {
namespace {

std::string failure(const char* call, cudaError_t error) {
  return std::string(call) + ": " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")";
}

const char* name_of(const Plan& plan) {
  return plan.strategy == Strategy::decode ? "decode_kernel"
         : plan.strategy == Strategy::rows ? "rows_kernel"
                                           : "row_kernel";
}

// "decode_kernel bfloat16 (3 layers, first M=4 N=4096 K=4096 R=256; 132 blocks, 30000 bytes shared): "
std::string subject(const Plan& plan, const Layer* layers, int64_t n, DType dtype) {
  char text[256];
  std::snprintf(text, sizeof text,
                "%s %s (%lld layers, first M=%lld N=%lld K=%lld R=%lld; %d blocks, %lld bytes shared): ", name_of(plan),
                dtype == DType::f32    ? "float32"
                : dtype == DType::bf16 ? "bfloat16"
                                       : "float16",
                static_cast<long long>(n), static_cast<long long>(layers[0].M), static_cast<long long>(layers[0].N),
                static_cast<long long>(layers[0].K), static_cast<long long>(layers[0].R), plan.blocks,
                static_cast<long long>(plan.shared_bytes));
  return text;
}

// Raises the limit of dynamic shared memory, once for each (device, instance): the call costs as much as a launch.
cudaError_t allow_shared(const void* instance, int slot, int64_t bytes) {
  constexpr int kDevices = 64;
  static std::atomic<int64_t> allowed[kDevices][kInstances];
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  std::atomic<int64_t>* const known = device < kDevices ? &allowed[device][slot] : nullptr;
  if (known && known->load(std::memory_order_relaxed) >= bytes) return cudaSuccess;
  int most = 0;
  cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (!error) error = cudaFuncSetAttribute(instance, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (!error && known) known->store(most, std::memory_order_relaxed);
  return error;
}

// Whether a launch may overlap the kernel in front of it: code for compute capability 9.0 or newer waits for that one
// by itself (PTX of 8.0 does not, wherever it runs), and drivers from CUDA 12.3 on capture such launches in a graph.
bool can_overlap(const void* instance, int slot) {
  constexpr int kDevices = 64;
  enum : int8_t { kUnknown, kNo, kYes };
  static std::atomic<int8_t> asked[kDevices][kInstances];
  int device = 0;
  if (cudaGetDevice(&device)) return false;
  std::atomic<int8_t>* const known = device < kDevices ? &asked[device][slot] : nullptr;
  const int8_t before = known ? known->load(std::memory_order_relaxed) : int8_t{kUnknown};
  if (before != kUnknown) return before == kYes;
  cudaFuncAttributes compiled{};
  int driver = 0;
  const bool told = !cudaFuncGetAttributes(&compiled, instance) && !cudaDriverGetVersion(&driver);
  if (!told) static_cast<void>(cudaGetLastError());
  const bool can = told && compiled.ptxVersion >= 90 && driver >= 12030;
  if (known) known->store(can ? kYes : kNo, std::memory_order_relaxed);
  return can;
}

}  // namespace

std::string query_device(int32_t index, Device* device) {
  int major = 0, minor = 0;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } wanted[] = {{cudaDevAttrComputeCapabilityMajor, &major},
                {cudaDevAttrComputeCapabilityMinor, &minor},
                {cudaDevAttrMultiProcessorCount, &device->sm_count},
                {cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared_per_block},
                {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &device->shared_per_sm}};
  for (const auto& w : wanted)
    if (const cudaError_t error = cudaDeviceGetAttribute(w.value, w.attribute, index)) {
      static_cast<void>(cudaGetLastError());
      return "query_device(" + std::to_string(index) + "): " + failure("cudaDeviceGetAttribute", error);
    }
  device->cc = 10 * major + minor;
#ifdef MK_CUDA_SM90
  device->has_row = true;
#else
  device->has_row = false;
#endif
  return {};
}

std::string launch(const Plan& plan, const Layer* layers, int64_t n, DType dtype, Precision precision, void* counters,
                   void* scratch, int64_t scratch_bytes, void* stream) {
  if (plan.strategy == Strategy::none || n < 1) return "launch: expected a plan and its layers, got " + describe(plan);
  if (const char* reason = mismatch(plan, layers, n, dtype, scratch_bytes))
    return subject(plan, layers, n, dtype) + reason;
  if (plan.strategy == Strategy::row) {
#ifdef MK_CUDA_SM90
    const sm90::Config config{plan.block_r, plan.block_m / sm90::kGroupRows,
                              plan.cluster, plan.blocks / plan.cluster,
                              plan.whole,   plan.parts};
    return sm90::launch(layers[0], dtype, config, stream);
#else
    return subject(plan, layers, n, dtype) + "the library was built without sm_90a";
#endif
  }
  if (!counters || reinterpret_cast<uintptr_t>(counters) % 16 || reinterpret_cast<uintptr_t>(scratch) % 256)
    return subject(plan, layers, n, dtype) +
           "expected counters on a multiple of 16 and scratch on a multiple of 256 bytes";
  const Instance instance = find_instance(plan, dtype, precision);
  if (!instance.kernel) return subject(plan, layers, n, dtype) + "no kernel for this precision";
  if (const cudaError_t error = allow_shared(instance.kernel, instance.slot, plan.shared_bytes)) {
    static_cast<void>(cudaGetLastError());
    return subject(plan, layers, n, dtype) + failure("cudaFuncSetAttribute", error);
  }
  Params params = make_params(plan, layers, n, dtype, counters, scratch);
  if (params.overlap && !can_overlap(instance.kernel, instance.slot)) params.overlap = 0;
  void* arguments[] = {&params};
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = params.overlap ? 1 : 0;
  if (const cudaError_t error = cudaLaunchKernelExC(&config, instance.kernel, arguments)) {
    static_cast<void>(cudaGetLastError());  // or the next call of somebody else would report it
    return subject(plan, layers, n, dtype) + failure("cudaLaunchKernelExC", error);
  }
  return {};
}

}  // namespace mk::cuda
