// Tensors in, plain structs out, through the LibTorch stable ABI. Only csrc/bindings includes torch headers.
//
// Arguments have been validated in Python (problem.py) or are about to be: a call that does not fit is refused with a
// RuntimeError, upon which the caller runs the validator, whose error is the one that people read.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "../layer.h"

namespace mk::bindings {

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
    int64_t offset = 0, available = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor, &offset));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor, &available));
    const int64_t needed = needed_bytes(offset);
    MK_REFUSE_UNLESS(needed <= available, "expected a storage of at least ", needed, " bytes, got ", available);
  }
  explicit View(const Tensor& tensor) : View(tensor.get()) {}

  explicit operator bool() const { return handle != nullptr; }
  bool like(const View& other) const { return dtype == other.dtype && device == other.device; }
  // Whether dimension i is laid out with the given stride; a size of 1 or 0 has no stride to speak of.
  bool steps(int64_t i, int64_t stride) const { return strides[i] == stride || sizes[i] <= 1; }

 private:
  // Of the storage up to the last element, none for an empty tensor. FSDP frees a storage and keeps the tensor; for
  // dtypes that the library does not know, a byte is less than an element.
  int64_t needed_bytes(int64_t offset) const {
    int64_t last = offset;
    for (int64_t i = 0; i < dims; ++i) {
      if (sizes[i] == 0) return 0;
      last += (sizes[i] - 1) * strides[i];
    }
    static const int32_t f32 = aoti_torch_dtype_float32(), i32 = aoti_torch_dtype_int32(),
                         bf16 = aoti_torch_dtype_bfloat16(), f16 = aoti_torch_dtype_float16();
    return (last + 1) * (dtype == f32 || dtype == i32 ? 4 : dtype == bf16 || dtype == f16 ? 2 : 1);
  }
};

inline DType dtype_of(const View& x) {
  static const int32_t f32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(),
                       f16 = aoti_torch_dtype_float16();
  MK_REFUSE_UNLESS(x.dtype == f32 || x.dtype == bf16 || x.dtype == f16, "x: expected float32, bfloat16 or float16");
  return x.dtype == f32 ? DType::f32 : x.dtype == bf16 ? DType::bf16 : DType::f16;
}

// An uninitialised row-major tensor, dtype and device of `like`. The shim allocates directly; new_empty would go
// through the dispatcher again.
inline AtenTensorHandle empty(const View& like, const int64_t* sizes, int64_t dims) {
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

// (..., columns) as rows.
struct Rows {
  int64_t n = 1, columns, stride;

  Rows(const View& matrix, const char* name) {
    const int64_t last = matrix.dims - 1;
    MK_REFUSE_UNLESS(last >= 0 && matrix.steps(last, 1), name, ": expected rows of stride 1");
    columns = stride = matrix.sizes[last];
    for (int64_t i = last - 1; i >= 0; --i) {
      if (matrix.sizes[i] == 1) continue;
      if (n == 1) stride = matrix.strides[i];
      MK_REFUSE_UNLESS(matrix.strides[i] == n * stride, name, ": leading dimensions do not flatten to rows");
      n *= matrix.sizes[i];
    }
  }
};

// K of x, its rows and where they lie.
inline void take_x(const View& x, Layer& layer) {
  const Rows rows(x, "x");
  layer.M = rows.n;
  layer.K = rows.columns;
  layer.stride_xm = rows.stride;
  layer.x = x.data;
}

// The end of a layer whose N is known; `bias` may be empty.
inline void take_bias(const View& bias, const View& x, Layer& layer) {
  if (!bias) return;
  MK_REFUSE_UNLESS(bias.dims == 1 && bias.sizes[0] == layer.N && bias.steps(0, 1) && bias.like(x),
                   "bias: expected (N,) of stride 1, dtype of x");
  layer.bias = bias.data;
}

// What is added to a layer whose M and N are known; `residual` may be empty.
inline void take_residual(const View& residual, const View& x, double scale, Layer& layer) {
  MK_REFUSE_UNLESS(std::isfinite(scale), "scale: expected a finite number, got ", scale);
  layer.scale = static_cast<float>(scale);
  if (!residual) return;
  const Rows rows(residual, "residual");
  MK_REFUSE_UNLESS(residual.dims == x.dims && std::equal(x.sizes, x.sizes + x.dims - 1, residual.sizes) &&
                       rows.columns == layer.N && residual.like(x),
                   "residual: expected (..., N), dtype of x");
  layer.residual = residual.data;
  layer.stride_resm = rows.stride;
}

// The norm of a layer whose R is known; `norm` may be empty.
inline void take_norm(const View& norm, const View& x, double eps, Layer& layer) {
  if (!norm) return;
  MK_REFUSE_UNLESS(norm.dims == 1 && norm.sizes[0] == layer.R && norm.steps(0, 1) && norm.like(x),
                   "norm: expected (R,) of stride 1, dtype of x");
  MK_REFUSE_UNLESS(std::isfinite(eps) && eps > 0, "norm_eps: expected a finite number > 0, got ", eps);
  layer.norm = norm.data;
  layer.norm_eps = static_cast<float>(eps);
}

inline Activation activation_of(int64_t code) {
  MK_REFUSE_UNLESS(code >= 0 && code <= static_cast<int64_t>(Activation::silu), "activation: got ", code);
  return static_cast<Activation>(code);
}

// The layer without its outputs.
inline Layer describe(const View& x, const View& u, const View& v, const View& bias, int64_t rank,
                      const int32_t* rank_ptr, int64_t activation) {
  Layer layer{};
  take_x(x, layer);
  MK_REFUSE_UNLESS(u.dims == 2 && u.steps(1, 1) && u.like(x), "u: expected (N, R), rows of stride 1, dtype of x");
  MK_REFUSE_UNLESS(v.dims == 2 && v.steps(1, 1) && v.like(x), "v: expected (R, K), rows of stride 1, dtype of x");
  layer.N = u.sizes[0];
  layer.R = u.sizes[1];
  MK_REFUSE_UNLESS(v.sizes[0] == layer.R && v.sizes[1] == layer.K, "u, v: expected (N, R) and (R, K) to fit x");
  MK_REFUSE_UNLESS(layer.M && layer.N && layer.K, "x, u: expected at least one row, input and output");
  layer.rank = rank < 0 || rank_ptr ? layer.R : rank;
  MK_REFUSE_UNLESS(layer.rank <= layer.R, "rank: expected 0..", layer.R, ", got ", rank);
  layer.rank_ptr = rank_ptr;
  layer.u = u.data;
  layer.stride_un = u.strides[0];
  layer.v = v.data;
  layer.stride_vr = v.strides[0];
  take_bias(bias, x, layer);
  layer.activation = activation_of(activation);
  return layer;
}

inline AtenTensorHandle make_y(const View& x, Layer& layer) {
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
inline AtenTensorHandle make_h(const View& x, Layer& layer) {
  const int64_t shape[] = {layer.M, layer.rank};
  AtenTensorHandle h = empty(x, shape, 2);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(h, &layer.h));
  layer.stride_hm = layer.rank;
  return h;
}

inline const int32_t* rank_pointer(const View& rank, const View& x, int64_t n) {
  if (!rank) return nullptr;
  const bool fits = rank.dims == 0 ? n == 1 : rank.dims == 1 && rank.sizes[0] == n && rank.steps(0, 1);
  MK_REFUSE_UNLESS(fits && rank.dtype == aoti_torch_dtype_int32() && rank.device == x.device,
                   "rank: expected int32, one entry per layer, on the device of x");
  return static_cast<const int32_t*>(rank.data);
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
  Argument(Argument&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Argument(const Argument&) = delete;
  Argument& operator=(const Argument&) = delete;
  ~Argument() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  View view() const { return handle_ ? View(handle_) : View(); }
  AtenTensorHandle handle() const { return handle_; }
  StableIValue release() { return reinterpret_cast<StableIValue>(std::exchange(handle_, nullptr)); }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// The tensors of an argument Tensor?[]; the list itself is freed here.
inline std::vector<Argument> optional_arguments(StableIValue value) {
  const auto list = reinterpret_cast<StableListHandle>(value);
  std::vector<Argument> arguments;
  size_t n = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list, &n));
  arguments.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    StableIValue item = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
    arguments.emplace_back(item, true);
  }
  TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  return arguments;
}

// The value of a result Tensor[].
inline StableIValue result_list(std::vector<Argument>& tensors) {
  StableListHandle list = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(tensors.size(), &list));
  for (Argument& tensor : tensors) TORCH_ERROR_CODE_CHECK(torch_list_push_back(list, tensor.release()));
  return reinterpret_cast<StableIValue>(list);
}

// Layers of a group with their outputs: ys, then hs where they are wanted.
struct Group {
  std::vector<Layer> layers;
  std::vector<Tensor> outputs;
};

// `biases` holds those that exist, in the order of `has_bias`. `residuals`, `scales` and `norms` may be empty.
inline Group make_group(const std::vector<Tensor>& xs, const std::vector<Tensor>& us, const std::vector<Tensor>& vs,
                        const std::vector<Tensor>& biases, const std::vector<int64_t>& has_bias,
                        const std::vector<int64_t>& ranks, const std::optional<Tensor>& rank_tensor,
                        const std::vector<int64_t>& activations, bool save_h,
                        const std::vector<std::optional<Tensor>>& residuals = {},
                        const std::vector<double>& scales = {}, const std::vector<std::optional<Tensor>>& norms = {},
                        double norm_eps = 0) {
  const size_t n = us.size();
  MK_REFUSE_UNLESS((residuals.empty() || residuals.size() == n) && (scales.empty() || scales.size() == n) &&
                       (norms.empty() || norms.size() == n),
                   "grouped: residuals, scales, norms: expected one entry per layer, or none");
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
    const bool adds = !residuals.empty() && residuals[i].has_value();
    take_residual(adds ? View(*residuals[i]) : View(), views[i], scales.empty() ? 1 : scales[i], group.layers.back());
    const bool normed = !norms.empty() && norms[i].has_value();
    take_norm(normed ? View(*norms[i]) : View(), views[i], norm_eps, group.layers.back());
    group.outputs.emplace_back(make_y(views[i], group.layers.back()));
  }
  for (size_t i = 0; save_h && i < n; ++i) group.outputs.emplace_back(make_h(views[i], group.layers[i]));
  return group;
}

}  // namespace mk::bindings
