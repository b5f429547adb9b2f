// The CUDA side of the ops. Everything that needs a device goes through cuda/launch.h; plans are made without one.
#include "../cuda/launch.h"

#include <mutex>
#include <string>

#include "tensors.h"

#ifdef MK_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
// In libtorch_cuda only: weak, so that the library loads beside a torch without CUDA, where nothing calls it.
#pragma weak aoti_torch_get_current_cuda_stream

namespace mk::bindings {
namespace {

const cuda::Device& device_of(int32_t index) {
  static std::mutex mutex;
  static std::array<std::optional<cuda::Device>, 64> known;
  MK_REFUSE_UNLESS(index >= 0 && index < static_cast<int32_t>(known.size()), "device ", index, " is out of range");
  const std::lock_guard<std::mutex> lock(mutex);
  auto& slot = known[static_cast<size_t>(index)];
  if (!slot) {
    cuda::Device device{};
    const std::string failed = cuda::query_device(index, &device);
    MK_REFUSE_UNLESS(failed.empty(), failed);
    slot = device;
  }
  return *slot;
}

// Where `scratch` is too small for the plan, memory of the caching allocator that lives until the kernel is enqueued:
// the allocator gives it to nobody but later work of the same stream.
std::vector<Tensor> grouped_cuda(const std::vector<Tensor>& xs, const std::vector<Tensor>& us,
                                 const std::vector<Tensor>& vs, const std::vector<Tensor>& biases,
                                 const std::vector<int64_t>& has_bias, const std::vector<int64_t>& ranks,
                                 const std::optional<Tensor>& rank_tensor, const std::vector<int64_t>& activations,
                                 bool save_h, int64_t strategy, bool tf32, const Tensor& counters,
                                 const std::optional<Tensor>& scratch) {
  Group group = make_group(xs, us, vs, biases, has_bias, ranks, rank_tensor, activations, save_h);
  const auto n = static_cast<int64_t>(group.layers.size());
  const View x(xs[0]);
  const DType dtype = dtype_of(x);
  const int32_t index = xs[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const auto precision = tf32 ? cuda::Precision::tf32 : cuda::Precision::ieee;
  const cuda::Plan plan =
      cuda::plan(group.layers.data(), n, dtype, precision, device_of(index), static_cast<cuda::Strategy>(strategy));
  MK_REFUSE_UNLESS(plan.strategy != cuda::Strategy::none, "no CUDA kernel takes the call: ", cuda::describe(plan));
  const View zeros(counters);
  MK_REFUSE_UNLESS(zeros.device == x.device && zeros.dims == 1 && zeros.dtype == aoti_torch_dtype_int32() &&
                       zeros.sizes[0] * 4 >= plan.counter_bytes,
                   "counters: expected ", plan.counter_bytes, " bytes of int32 on the device of x");
  std::optional<Tensor> own;
  View room = scratch ? View(*scratch) : View();
  if (plan.scratch_bytes && (!room || room.sizes[0] < plan.scratch_bytes)) {
    own = torch::stable::new_empty(xs[0], {plan.scratch_bytes}, ScalarType::Byte);
    room = View(*own);
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  const std::string failed = cuda::launch(plan, group.layers.data(), n, dtype, precision, zeros.data, room.data,
                                          room ? room.sizes[0] : 0, stream);
  MK_REFUSE_UNLESS(failed.empty(), failed);
  return group.outputs;
}

}  // namespace
}  // namespace mk::bindings

STABLE_TORCH_LIBRARY_IMPL(maestro_native, CUDA, m) { m.impl("cuda_grouped", TORCH_BOX(&mk::bindings::grouped_cuda)); }
#endif

#define MK_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

const char* keep(std::string text) {
  static thread_local std::string kept;
  kept = std::move(text);
  return kept.c_str();
}

}  // namespace

// Whether the library has CUDA kernels.
MK_EXPORT int32_t mk_cuda_built() {
#ifdef MK_CUDA
  return 1;
#else
  return 0;
#endif
}

// facts: compute capability (10 * major + minor), SMs, shared memory per block and per SM, whether the row kernel is
// built. Returns "" or what failed; valid until the thread's next call.
MK_EXPORT const char* mk_cuda_device(int32_t index, int64_t* facts) {
#ifdef MK_CUDA
  mk::cuda::Device device{};
  std::string failed = mk::cuda::query_device(index, &device);
  const int64_t values[] = {device.cc, device.sm_count, device.shared_per_block, device.shared_per_sm, device.has_row};
  std::copy(std::begin(values), std::end(values), facts);
  return keep(std::move(failed));
#else
  static_cast<void>(index), static_cast<void>(facts);
  return "this build of the library has no CUDA kernels";
#endif
}

// layers: per layer M, N, K, R, rank, rank on the device?, strides of x, u and v, 16-byte aligned?
// Returns what describe() says; strategy gets its number, 0 where no kernel takes the call.
MK_EXPORT const char* mk_cuda_plan(const int64_t* layers, int64_t n, int32_t dtype, int32_t tf32, const int64_t* facts,
                                   int32_t only, int32_t* strategy) {
  static const int32_t some_rank = 0;
  std::vector<mk::Layer> described;
  for (int64_t i = 0; i < n; ++i, layers += 10) {
    mk::Layer layer{};
    layer.M = layers[0], layer.N = layers[1], layer.K = layers[2], layer.R = layers[3], layer.rank = layers[4];
    layer.rank_ptr = layers[5] ? &some_rank : nullptr;
    layer.stride_xm = layers[6], layer.stride_un = layers[7], layer.stride_vr = layers[8];
    // Never read: null stands for an aligned pointer.
    if (!layers[9]) layer.x = layer.u = layer.v = reinterpret_cast<const void*>(uintptr_t{2});
    layer.stride_ym = layer.N;
    described.push_back(layer);
  }
  const mk::cuda::Device device{static_cast<int32_t>(facts[0]), static_cast<int32_t>(facts[1]),
                                static_cast<int32_t>(facts[2]), static_cast<int32_t>(facts[3]), facts[4] != 0};
  const mk::cuda::Plan plan = mk::cuda::plan(described.data(), n, static_cast<mk::DType>(dtype),
                                             tf32 ? mk::cuda::Precision::tf32 : mk::cuda::Precision::ieee, device,
                                             static_cast<mk::cuda::Strategy>(only));
  *strategy = static_cast<int32_t>(plan.strategy);
  return keep(mk::cuda::describe(plan));
}
