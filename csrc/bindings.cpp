// The only file that includes torch headers: tensors in, plain structs out, through the LibTorch stable ABI.
//
// Arguments have been validated in Python (problem.py) or are about to be: a call that does not fit is refused with a
// RuntimeError, upon which the caller runs the validator, whose error is the one that people read.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/cpu.h"
#include "layer.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define MK_REFUSE_UNLESS(condition, ...) STD_TORCH_CHECK(condition, "maestro_native: ", __VA_ARGS__)

// What is asked of a tensor, read once: every accessor is a call into libtorch, and a small layer takes 2 us in all.
struct View {
  AtenTensorHandle handle = nullptr;
  void* data = nullptr;
  int64_t dims = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  int32_t dtype = -1, device = -1;

  View() = default;
  explicit View(AtenTensorHandle tensor) : handle(tensor) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &data));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &dims));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &device));
  }
  explicit View(const Tensor& tensor) : View(tensor.get()) {}

  explicit operator bool() const { return handle != nullptr; }
  bool like(const View& other) const { return dtype == other.dtype && device == other.device; }
  // Whether dimension i is laid out with the given stride; a size of 1 or 0 has no stride to speak of.
  bool steps(int64_t i, int64_t stride) const { return strides[i] == stride || sizes[i] <= 1; }
};

mk::DType dtype_of(const View& x) {
  static const int32_t f32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(),
                       f16 = aoti_torch_dtype_float16();
  MK_REFUSE_UNLESS(x.dtype == f32 || x.dtype == bf16 || x.dtype == f16, "x: expected float32, bfloat16 or float16");
  return x.dtype == f32 ? mk::DType::f32 : x.dtype == bf16 ? mk::DType::bf16 : mk::DType::f16;
}

// An uninitialised row-major tensor, dtype and device of `like`. The shim allocates directly; new_empty would go
// through the dispatcher again.
AtenTensorHandle empty(const View& like, const int64_t* sizes, int64_t dims) {
  std::array<int64_t, 16> strides;
  int64_t step = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = step;
    step *= sizes[i] > 1 ? sizes[i] : 1;
  }
  int32_t device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.handle, &device_index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides.data(), like.dtype, like.device, device_index, &handle));
  return handle;
}

// The layer without its outputs.
mk::Layer describe(const View& x, const View& u, const View& v, const View& bias, int64_t rank, const int32_t* rank_ptr,
                   int64_t activation) {
  MK_REFUSE_UNLESS(x.dims >= 1 && x.steps(x.dims - 1, 1), "x: expected rows of stride 1");
  MK_REFUSE_UNLESS(u.dims == 2 && u.steps(1, 1) && u.like(x), "u: expected (N, R), rows of stride 1, dtype of x");
  MK_REFUSE_UNLESS(v.dims == 2 && v.steps(1, 1) && v.like(x), "v: expected (R, K), rows of stride 1, dtype of x");
  mk::Layer layer{};
  layer.N = u.sizes[0];
  layer.R = u.sizes[1];
  layer.K = x.sizes[x.dims - 1];
  MK_REFUSE_UNLESS(v.sizes[0] == layer.R && v.sizes[1] == layer.K, "u, v: expected (N, R) and (R, K) to fit x");
  layer.M = 1;
  layer.stride_xm = layer.K;
  for (int64_t i = x.dims - 2; i >= 0; --i) {
    if (x.sizes[i] == 1) continue;
    if (layer.M == 1) layer.stride_xm = x.strides[i];
    MK_REFUSE_UNLESS(x.strides[i] == layer.M * layer.stride_xm, "x: leading dimensions do not flatten to rows");
    layer.M *= x.sizes[i];
  }
  MK_REFUSE_UNLESS(layer.M && layer.N && layer.K, "x, u: expected at least one row, input and output");
  layer.rank = rank < 0 || rank_ptr ? layer.R : rank;
  MK_REFUSE_UNLESS(layer.rank <= layer.R, "rank: expected 0..", layer.R, ", got ", rank);
  layer.rank_ptr = rank_ptr;
  layer.x = x.data;
  layer.u = u.data;
  layer.stride_un = u.strides[0];
  layer.v = v.data;
  layer.stride_vr = v.strides[0];
  if (bias) {
    MK_REFUSE_UNLESS(bias.dims == 1 && bias.sizes[0] == layer.N && bias.steps(0, 1) && bias.like(x),
                     "bias: expected (N,) of stride 1, dtype of x");
    layer.bias = bias.data;
  }
  MK_REFUSE_UNLESS(activation >= 0 && activation <= static_cast<int64_t>(mk::Activation::silu), "activation: got ",
                   activation);
  layer.activation = static_cast<mk::Activation>(activation);
  return layer;
}

AtenTensorHandle make_y(const View& x, mk::Layer& layer) {
  std::array<int64_t, 16> shape;
  MK_REFUSE_UNLESS(x.dims >= 1 && x.dims <= static_cast<int64_t>(shape.size()), "x: expected 1..16 dimensions, got ",
                   x.dims);
  std::copy_n(x.sizes, x.dims, shape.begin());
  shape[x.dims - 1] = layer.N;
  AtenTensorHandle y = empty(x, shape.data(), x.dims);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(y, &layer.y));
  layer.stride_ym = layer.N;
  return y;
}

// H (M, rank), or (M, R) where only the device knows the rank.
AtenTensorHandle make_h(const View& x, mk::Layer& layer) {
  const int64_t shape[] = {layer.M, layer.rank};
  AtenTensorHandle h = empty(x, shape, 2);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(h, &layer.h));
  layer.stride_hm = layer.rank;
  return h;
}

const int32_t* rank_pointer(const View& rank, const View& x, int64_t n) {
  if (!rank) return nullptr;
  const bool fits = rank.dims == 0 ? n == 1 : rank.dims == 1 && rank.sizes[0] == n && rank.steps(0, 1);
  MK_REFUSE_UNLESS(fits && rank.dtype == aoti_torch_dtype_int32() && rank.device == x.device,
                   "rank: expected int32, one entry per layer, on the device of x");
  return static_cast<const int32_t*>(rank.data);
}

mk::cpu::Pool pool() {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return {static_cast<int64_t>(threads), [](int64_t n, void (*body)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context, i);
            });
          }};
}

const void* packed_pointer(const View& packed, const mk::Layer& layer, mk::DType dtype) {
  if (!packed) return nullptr;
  const auto needed = static_cast<int64_t>(mk::cpu::packed_bytes(layer.N, layer.K, layer.R, dtype));
  MK_REFUSE_UNLESS(
      needed > 0 && packed.dims == 1 && packed.sizes[0] == needed && reinterpret_cast<uintptr_t>(packed.data) % 64 == 0,
      "packed: expected the ", needed, " bytes that pack() wrote for these factors");
  return packed.data;
}

void run_cpu(const mk::Layer* layers, const void* const* packed, int64_t n, mk::DType dtype) {
  const char* refused = mk::cpu::forward(layers, packed, n, dtype, pool());
  MK_REFUSE_UNLESS(!refused, refused);
}

// An argument of a boxed op, owned until the op returns. TORCH_BOX would do the same through shared pointers and
// optionals, at 0.4 us for the eight arguments of one layer.
class Argument {
 public:
  explicit Argument(StableIValue value, bool optional = false) {
    if (optional && value == 0) return;
    if (optional) {
      auto* boxed = reinterpret_cast<StableIValue*>(value);
      value = *boxed;
      delete boxed;
    }
    handle_ = reinterpret_cast<AtenTensorHandle>(value);
  }
  Argument(const Argument&) = delete;
  Argument& operator=(const Argument&) = delete;
  ~Argument() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  View view() const { return handle_ ? View(handle_) : View(); }
  StableIValue release() { return reinterpret_cast<StableIValue>(std::exchange(handle_, nullptr)); }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// linear and linear_h: (x, u, v, bias?, rank, rank_tensor?, activation, packed?) -> y, or (y, H).
template <bool save_h>
void linear_cpu(StableIValue* stack, uint64_t, uint64_t) {
  const Argument x(stack[0]), u(stack[1]), v(stack[2]), bias(stack[3], true), rank_tensor(stack[5], true),
      packed(stack[7], true);
  const auto rank = static_cast<int64_t>(stack[4]), activation = static_cast<int64_t>(stack[6]);
  const View x_view = x.view();
  mk::Layer layer =
      describe(x_view, u.view(), v.view(), bias.view(), rank, rank_pointer(rank_tensor.view(), x_view, 1), activation);
  const mk::DType dtype = dtype_of(x_view);
  const void* panels = packed_pointer(packed.view(), layer, dtype);
  Argument y(reinterpret_cast<StableIValue>(make_y(x_view, layer)));
  Argument h(save_h ? reinterpret_cast<StableIValue>(make_h(x_view, layer)) : 0);
  run_cpu(&layer, &panels, 1, dtype);
  stack[0] = y.release();
  if (save_h) stack[1] = h.release();
}

// Layers of a group with their outputs: ys, then hs where they are wanted.
struct Group {
  std::vector<mk::Layer> layers;
  std::vector<Tensor> outputs;
};

// `biases` holds those that exist, in the order of `has_bias`.
Group make_group(const std::vector<Tensor>& xs, const std::vector<Tensor>& us, const std::vector<Tensor>& vs,
                 const std::vector<Tensor>& biases, const std::vector<int64_t>& has_bias,
                 const std::vector<int64_t>& ranks, const std::optional<Tensor>& rank_tensor,
                 const std::vector<int64_t>& activations, bool save_h) {
  const size_t n = us.size();
  MK_REFUSE_UNLESS(n > 0 && vs.size() == n && has_bias.size() == n && ranks.size() == n && activations.size() == n &&
                       (xs.size() == 1 || xs.size() == n),
                   "grouped: expected one entry per layer");
  const View first(xs[0]);
  const int32_t* rank_ptr = rank_pointer(rank_tensor ? View(*rank_tensor) : View(), first, static_cast<int64_t>(n));
  Group group;
  group.layers.reserve(n);
  group.outputs.reserve(save_h ? 2 * n : n);
  std::vector<View> views;
  size_t i_bias = 0;
  for (size_t i = 0; i < n; ++i) {
    views.emplace_back(xs.size() == 1 ? first : View(xs[i]));
    MK_REFUSE_UNLESS(views[i].like(first), "grouped: x: expected one dtype and device");
    MK_REFUSE_UNLESS(!has_bias[i] || i_bias < biases.size(), "grouped: biases: expected those of has_bias");
    const View bias = has_bias[i] ? View(biases[i_bias++]) : View();
    group.layers.push_back(describe(views[i], View(us[i]), View(vs[i]), bias, ranks[i],
                                    rank_ptr ? rank_ptr + i : nullptr, activations[i]));
    group.outputs.emplace_back(make_y(views[i], group.layers.back()));
  }
  for (size_t i = 0; save_h && i < n; ++i) group.outputs.emplace_back(make_h(views[i], group.layers[i]));
  return group;
}

std::vector<Tensor> grouped_cpu(const std::vector<Tensor>& xs, const std::vector<Tensor>& us,
                                const std::vector<Tensor>& vs, const std::vector<Tensor>& biases,
                                const std::vector<int64_t>& has_bias, const std::vector<int64_t>& ranks,
                                const std::optional<Tensor>& rank_tensor, const std::vector<int64_t>& activations,
                                const std::vector<Tensor>& packed, bool save_h) {
  Group group = make_group(xs, us, vs, biases, has_bias, ranks, rank_tensor, activations, save_h);
  const mk::DType dtype = dtype_of(View(xs[0]));
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
  const mk::Layer layer = describe(v_view, u_view, v_view, View(), -1, nullptr, 0);
  const mk::DType dtype = dtype_of(u_view);
  const auto bytes = static_cast<int64_t>(mk::cpu::packed_bytes(layer.N, K, layer.R, dtype));
  MK_REFUSE_UNLESS(bytes > 0, "pack: this machine has no packed form for the dtype");
  Tensor packed = torch::stable::empty({bytes}, ScalarType::Byte);
  mk::cpu::pack(layer, dtype, packed.mutable_data_ptr(), pool());
  return packed;
}

}  // namespace

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
}

STABLE_TORCH_LIBRARY_IMPL(maestro_native, CPU, m) {
  m.impl("linear", &linear_cpu<false>);
  m.impl("linear_h", &linear_cpu<true>);
  m.impl("grouped", TORCH_BOX(&grouped_cpu));
  m.impl("pack", TORCH_BOX(&pack_cpu));
}

// Facts that Python asks through ctypes, no tensor involved.
extern "C" __attribute__((visibility("default"))) const char* mk_cpu_isa(int32_t dtype) {
  return mk::cpu::isa(static_cast<mk::DType>(dtype));
}
