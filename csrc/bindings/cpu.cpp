// The ops' schemas and their CPU side.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "packed.h"

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

void run_cpu(const Layer* layers, const void* const* packed, int64_t n, DType dtype) {
  const char* refused = cpu::forward(layers, packed, n, dtype, pool());
  MK_REFUSE_UNLESS(!refused, refused);
}

// linear and linear_h: (x, u, v, bias?, rank, rank_tensor?, activation) -> y, or (y, H); linear_more also takes
// (residual?, scale, norm?, norm_eps).
template <bool save_h, bool adds = false>
void linear_cpu(StableIValue* stack, uint64_t, uint64_t) {
  const Argument x(stack[0]), u(stack[1]), v(stack[2]), bias(stack[3], true), rank_tensor(stack[5], true);
  const Argument residual(adds ? stack[7] : 0, true), norm(adds ? stack[9] : 0, true);
  const auto rank = static_cast<int64_t>(stack[4]), activation = static_cast<int64_t>(stack[6]);
  const View x_view = x.view();
  Layer layer =
      describe(x_view, u.view(), v.view(), bias.view(), rank, rank_pointer(rank_tensor.view(), x_view, 1), activation);
  if (adds) {
    take_residual(residual.view(), x_view, torch::stable::detail::to<double>(stack[8]), layer);
    take_norm(norm.view(), x_view, torch::stable::detail::to<double>(stack[10]), layer);
  }
  Argument y(reinterpret_cast<StableIValue>(make_y(x_view, layer)));
  Argument h(save_h ? reinterpret_cast<StableIValue>(make_h(x_view, layer)) : 0);
  const void* const unpacked = nullptr;
  run_cpu(&layer, &unpacked, 1, dtype_of(x_view));
  stack[0] = y.release();
  if (save_h) stack[1] = h.release();
}

// (rows, columns) of a tensor's memory from its first element on.
Argument matrix(const View& view, int64_t rows, int64_t columns, int64_t row, int64_t column) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row, column};
  int64_t offset = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(view.handle, &offset));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(view.handle, 2, sizes, strides, offset, &made));
  return Argument(reinterpret_cast<StableIValue>(made));
}

// library_products: (x, u, v, bias?, rank) -> y by two products of torch's library. For views of the first `rank`
// components, which cost as much to make in Python as a small product.
void library_products_cpu(StableIValue* stack, uint64_t, uint64_t) {
  const Argument x(stack[0]), u(stack[1]), v(stack[2]), bias(stack[3], true);
  const View x_view = x.view(), u_view = u.view(), v_view = v.view();
  Layer layer = describe(x_view, u_view, v_view, bias.view(), static_cast<int64_t>(stack[4]), nullptr, 0);
  Argument y(reinterpret_cast<StableIValue>(make_y(x_view, layer))),
      h(reinterpret_cast<StableIValue>(make_h(x_view, layer)));
  const Argument rows = matrix(x_view, layer.M, layer.K, layer.stride_xm, 1);
  const Argument out = matrix(y.view(), layer.M, layer.N, layer.stride_ym, 1);
  const Argument v_t = matrix(v_view, layer.K, layer.rank, 1, layer.stride_vr);
  const Argument u_t = matrix(u_view, layer.rank, layer.N, 1, layer.stride_un);
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(h.handle(), rows.handle(), v_t.handle()));
  if (layer.bias) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.handle(), bias.handle(), h.handle(), u_t.handle(), 1, 1));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.handle(), h.handle(), u_t.handle()));
  }
  stack[0] = y.release();
}

// rms_norm: (h, weight, eps, scale) -> g (..., n): scale weight[:n] h / sqrt(mean(h^2) + eps) for h (..., n).
void rms_norm_cpu(StableIValue* stack, uint64_t, uint64_t) {
  const Argument h(stack[0]), weight(stack[1]);
  const View view = h.view(), weight_view = weight.view();
  const DType dtype = dtype_of(view);
  const Rows rows(view, "h");
  MK_REFUSE_UNLESS(weight_view.dims == 1 && weight_view.sizes[0] >= rows.columns && weight_view.steps(0, 1) &&
                       weight_view.like(view),
                   "norm: expected at least as many elements as h has columns, of stride 1, dtype of h");
  Argument g(reinterpret_cast<StableIValue>(empty(view, view.sizes, view.dims)));
  cpu::normalise({rows.n, rows.columns, view.data, rows.stride}, g.view().data, weight_view.data,
                 static_cast<float>(torch::stable::detail::to<double>(stack[2])),
                 static_cast<float>(torch::stable::detail::to<double>(stack[3])), dtype, pool());
  stack[0] = g.release();
}

std::vector<Tensor> grouped_cpu(const std::vector<Tensor>& xs, const std::vector<Tensor>& us,
                                const std::vector<Tensor>& vs, const std::vector<Tensor>& biases,
                                const std::vector<int64_t>& has_bias, const std::vector<int64_t>& ranks,
                                const std::optional<Tensor>& rank_tensor, const std::vector<int64_t>& activations,
                                bool save_h, const std::vector<std::optional<Tensor>>& residuals,
                                const std::vector<double>& scales, const std::vector<std::optional<Tensor>>& norms,
                                double norm_eps) {
  Group group = make_group(xs, us, vs, biases, has_bias, ranks, rank_tensor, activations, save_h, residuals, scales,
                           norms, norm_eps);
  const std::vector<const void*> unpacked(us.size(), nullptr);
  run_cpu(group.layers.data(), unpacked.data(), static_cast<int64_t>(unpacked.size()), dtype_of(View(xs[0])));
  return group.outputs;
}

// packed_linear: (packed, x, bias?) -> y; packed_residual also takes (residual?, scale).
template <bool adds>
void packed_linear_cpu(StableIValue* stack, uint64_t, uint64_t) {
  const Argument packed(stack[0]), x(stack[1]), bias(stack[2], true), residual(adds ? stack[3] : 0, true);
  const View x_view = x.view();
  const Packed layers(packed.view(), x_view);
  MK_REFUSE_UNLESS(layers.n() == 1, "packed: expected the bytes of one layer, got those of ", layers.n());
  Layer layer = layers.describe(0, x_view, bias.view());
  if (adds) take_residual(residual.view(), x_view, torch::stable::detail::to<double>(stack[4]), layer);
  Argument y(reinterpret_cast<StableIValue>(make_y(x_view, layer)));
  const void* const panels = layers.panels(0);
  run_cpu(&layer, &panels, 1, layers.dtype());
  stack[0] = y.release();
}

// packed_grouped: (packed, x, biases) -> ys.
void packed_grouped_cpu(StableIValue* stack, uint64_t, uint64_t) {
  const Argument packed(stack[0]), x(stack[1]);
  const std::vector<Argument> biases = optional_arguments(stack[2]);
  const View x_view = x.view();
  const Packed layers(packed.view(), x_view);
  const auto n = static_cast<size_t>(layers.n());
  MK_REFUSE_UNLESS(biases.size() == n, "biases: expected one or None for each of ", n, " layers");
  std::vector<Layer> described(n);
  std::vector<const void*> panels(n);
  std::vector<Argument> ys;
  ys.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    described[i] = layers.describe(i, x_view, biases[i].view());
    panels[i] = layers.panels(i);
    ys.emplace_back(reinterpret_cast<StableIValue>(make_y(x_view, described[i])));
  }
  run_cpu(described.data(), panels.data(), layers.n(), layers.dtype());
  stack[0] = result_list(ys);
}

Tensor pack_cpu(const std::vector<Tensor>& us, const std::vector<Tensor>& vs, const std::vector<int64_t>& ranks,
                const std::vector<int64_t>& activations) {
  const size_t n = us.size();
  MK_REFUSE_UNLESS(n > 0 && vs.size() == n && ranks.size() == n && activations.size() == n,
                   "pack: expected one entry per layer");
  std::vector<Layer> layers;
  for (size_t i = 0; i < n; ++i) {
    const View u(us[i]), v(vs[i]);
    MK_REFUSE_UNLESS(v.dims == 2 && v.sizes[0] > 0, "pack: v: expected (R, K) with R > 0");
    MK_REFUSE_UNLESS(v.like(View(vs[0])), "pack: vs: expected one dtype and device");
    // v stands in for an input: the checks of a call hold for packing too.
    layers.push_back(describe(v, u, v, View(), ranks[i], nullptr, activations[i]));
    MK_REFUSE_UNLESS(layers[i].K == layers[0].K, "pack: vs: expected layers of one K");
    // Of a unit or tile that r ends in, kernels read the rest as well: it is to be zero, whatever u holds there.
    layers[i].R = std::max<int64_t>(layers[i].rank, 1);
  }
  const DType dtype = dtype_of(View(vs[0]));
  Tensor packed = torch::stable::empty({packed_size(layers, dtype)}, ScalarType::Byte);
  write_packed(layers, dtype, packed.mutable_data_ptr(), pool());
  return packed;
}

}  // namespace
}  // namespace mk::bindings

STABLE_TORCH_LIBRARY(maestro_native, m) {
  m.def("linear(Tensor x, Tensor u, Tensor v, Tensor? bias, int rank, Tensor? rank_tensor, int activation) -> Tensor");
  m.def(
      "linear_h(Tensor x, Tensor u, Tensor v, Tensor? bias, int rank, Tensor? rank_tensor, int activation) "
      "-> (Tensor, Tensor)");
  m.def(
      "linear_more(Tensor x, Tensor u, Tensor v, Tensor? bias, int rank, Tensor? rank_tensor, int activation, "
      "Tensor? residual, float scale, Tensor? norm, float norm_eps) -> Tensor");
  m.def("rms_norm(Tensor h, Tensor weight, float eps, float scale) -> Tensor");
  m.def("library_products(Tensor x, Tensor u, Tensor v, Tensor? bias, int rank) -> Tensor");
  m.def(
      "grouped(Tensor[] xs, Tensor[] us, Tensor[] vs, Tensor[] biases, int[] has_bias, int[] ranks, "
      "Tensor? rank_tensor, int[] activations, bool save_h, Tensor?[] residuals, float[] scales, "
      "Tensor?[] norms, float norm_eps) -> Tensor[]");
  m.def("pack(Tensor[] us, Tensor[] vs, int[] ranks, int[] activations) -> Tensor");
  m.def("packed_linear(Tensor packed, Tensor x, Tensor? bias) -> Tensor");
  m.def("packed_residual(Tensor packed, Tensor x, Tensor? bias, Tensor? residual, float scale) -> Tensor");
  m.def("packed_grouped(Tensor packed, Tensor x, Tensor?[] biases) -> Tensor[]");
  m.def(
      "cuda_grouped(Tensor[] xs, Tensor[] us, Tensor[] vs, Tensor[] biases, int[] has_bias, int[] ranks, "
      "Tensor? rank_tensor, int[] activations, bool save_h, int strategy, bool tf32, Tensor counters, "
      "Tensor? scratch) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(maestro_native, CPU, m) {
  m.impl("linear", &mk::bindings::linear_cpu<false>);
  m.impl("linear_h", &mk::bindings::linear_cpu<true>);
  m.impl("linear_more", &mk::bindings::linear_cpu<false, true>);
  m.impl("rms_norm", &mk::bindings::rms_norm_cpu);
  m.impl("library_products", &mk::bindings::library_products_cpu);
  m.impl("grouped", TORCH_BOX(&mk::bindings::grouped_cpu));
  m.impl("pack", TORCH_BOX(&mk::bindings::pack_cpu));
  m.impl("packed_linear", &mk::bindings::packed_linear_cpu<false>);
  m.impl("packed_residual", &mk::bindings::packed_linear_cpu<true>);
  m.impl("packed_grouped", &mk::bindings::packed_grouped_cpu);
}

// Facts that Python asks through ctypes, no tensor involved.

// Goes up with every change of a schema or of a function here: an installation that links to a working tree may meet a
// library that was built before.
extern "C" __attribute__((visibility("default"))) int32_t mk_interface() { return 6; }

extern "C" __attribute__((visibility("default"))) const char* mk_cpu_isa(int32_t dtype) {
  return mk::cpu::isa(static_cast<mk::DType>(dtype));
}

// What is wrong with MK_CPU_ISA, or null.
extern "C" __attribute__((visibility("default"))) const char* mk_cpu_isa_error() { return mk::cpu::isa_error(); }

extern "C" __attribute__((visibility("default"))) const char* mk_cpu_isas() { return mk::cpu::available_isas(); }
