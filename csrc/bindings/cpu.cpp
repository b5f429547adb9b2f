// The ops' schemas and their CPU side.
#include "../cpu/cpu.h"

#include "tensors.h"

namespace mk::bindings {
namespace {

cpu::Pool pool() {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return {static_cast<int64_t>(threads), [](int64_t n, void (*body)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context, i);
            });
          }};
}

const void* packed_pointer(const View& packed, const Layer& layer, DType dtype) {
  if (!packed) return nullptr;
  const auto needed = static_cast<int64_t>(cpu::packed_bytes(layer.N, layer.K, layer.R, dtype));
  MK_REFUSE_UNLESS(
      needed > 0 && packed.dims == 1 && packed.sizes[0] == needed && reinterpret_cast<uintptr_t>(packed.data) % 64 == 0,
      "packed: expected the ", needed, " bytes that pack() wrote for these factors");
  return packed.data;
}

void run_cpu(const Layer* layers, const void* const* packed, int64_t n, DType dtype) {
  const char* refused = cpu::forward(layers, packed, n, dtype, pool());
  MK_REFUSE_UNLESS(!refused, refused);
}

// linear and linear_h: (x, u, v, bias?, rank, rank_tensor?, activation, packed?) -> y, or (y, H).
template <bool save_h>
void linear_cpu(StableIValue* stack, uint64_t, uint64_t) {
  const Argument x(stack[0]), u(stack[1]), v(stack[2]), bias(stack[3], true), rank_tensor(stack[5], true),
      packed(stack[7], true);
  const auto rank = static_cast<int64_t>(stack[4]), activation = static_cast<int64_t>(stack[6]);
  const View x_view = x.view();
  Layer layer =
      describe(x_view, u.view(), v.view(), bias.view(), rank, rank_pointer(rank_tensor.view(), x_view, 1), activation);
  const DType dtype = dtype_of(x_view);
  const void* panels = packed_pointer(packed.view(), layer, dtype);
  Argument y(reinterpret_cast<StableIValue>(make_y(x_view, layer)));
  Argument h(save_h ? reinterpret_cast<StableIValue>(make_h(x_view, layer)) : 0);
  run_cpu(&layer, &panels, 1, dtype);
  stack[0] = y.release();
  if (save_h) stack[1] = h.release();
}

std::vector<Tensor> grouped_cpu(const std::vector<Tensor>& xs, const std::vector<Tensor>& us,
                                const std::vector<Tensor>& vs, const std::vector<Tensor>& biases,
                                const std::vector<int64_t>& has_bias, const std::vector<int64_t>& ranks,
                                const std::optional<Tensor>& rank_tensor, const std::vector<int64_t>& activations,
                                const std::vector<Tensor>& packed, bool save_h) {
  Group group = make_group(xs, us, vs, biases, has_bias, ranks, rank_tensor, activations, save_h);
  const DType dtype = dtype_of(View(xs[0]));
  std::vector<const void*> panels(us.size(), nullptr);
  MK_REFUSE_UNLESS(packed.empty() || packed.size() == us.size(), "grouped: packed: expected none or one per layer");
  for (size_t i = 0; i < packed.size(); ++i) panels[i] = packed_pointer(View(packed[i]), group.layers[i], dtype);
  run_cpu(group.layers.data(), panels.data(), static_cast<int64_t>(panels.size()), dtype);
  return group.outputs;
}

Tensor pack_cpu(const Tensor& u, const Tensor& v) {
  const View u_view(u), v_view(v);
  // v stands in for an input of one row: the checks of a call hold for packing too.
  const int64_t K = v_view.dims == 2 ? v_view.sizes[1] : 0;
  MK_REFUSE_UNLESS(v_view.dims == 2 && v_view.sizes[0] > 0, "pack: v: expected (R, K) with R > 0");
  const Layer layer = describe(v_view, u_view, v_view, View(), -1, nullptr, 0);
  const DType dtype = dtype_of(u_view);
  const auto bytes = static_cast<int64_t>(cpu::packed_bytes(layer.N, K, layer.R, dtype));
  MK_REFUSE_UNLESS(bytes > 0, "pack: this machine has no packed form for the dtype");
  Tensor packed = torch::stable::empty({bytes}, ScalarType::Byte);
  cpu::pack(layer, dtype, packed.mutable_data_ptr(), pool());
  return packed;
}

}  // namespace
}  // namespace mk::bindings

STABLE_TORCH_LIBRARY(maestro_native, m) {
  m.def(
      "linear(Tensor x, Tensor u, Tensor v, Tensor? bias, int rank, Tensor? rank_tensor, int activation, "
      "Tensor? packed) -> Tensor");
  m.def(
      "linear_h(Tensor x, Tensor u, Tensor v, Tensor? bias, int rank, Tensor? rank_tensor, int activation, "
      "Tensor? packed) -> (Tensor, Tensor)");
  m.def(
      "grouped(Tensor[] xs, Tensor[] us, Tensor[] vs, Tensor[] biases, int[] has_bias, int[] ranks, "
      "Tensor? rank_tensor, int[] activations, Tensor[] packed, bool save_h) -> Tensor[]");
  m.def("pack(Tensor u, Tensor v) -> Tensor");
  m.def(
      "cuda_grouped(Tensor[] xs, Tensor[] us, Tensor[] vs, Tensor[] biases, int[] has_bias, int[] ranks, "
      "Tensor? rank_tensor, int[] activations, bool save_h, int strategy, bool tf32, Tensor counters, "
      "Tensor? scratch) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(maestro_native, CPU, m) {
  m.impl("linear", &mk::bindings::linear_cpu<false>);
  m.impl("linear_h", &mk::bindings::linear_cpu<true>);
  m.impl("grouped", TORCH_BOX(&mk::bindings::grouped_cpu));
  m.impl("pack", TORCH_BOX(&mk::bindings::pack_cpu));
}

// Facts that Python asks through ctypes, no tensor involved.
extern "C" __attribute__((visibility("default"))) const char* mk_cpu_isa(int32_t dtype) {
  return mk::cpu::isa(static_cast<mk::DType>(dtype));
}
