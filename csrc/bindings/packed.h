// Packed factors of one layer, or of several that read one x, as one uint8 tensor: a header, then each layer's panels.
//
// A small layer whose weights are not in the cache spends more time on the way to them than on them, so a call on
// packed factors looks at x, at these bytes and at the biases, and at nothing else.
#pragma once

#include <cstdint>

#include "../cpu/cpu.h"
#include "tensors.h"

namespace mk::bindings {

struct PackedLayer {
  int64_t N, R, rank, activation;
  int64_t offset;  // of the panels, in bytes from the start of the header
};

struct PackedHeader {
  uint64_t magic;
  uint64_t check;  // over everything up to the panels but these two
  int64_t bytes;   // of it all
  int64_t dtype, K, n;
};  // n PackedLayers follow

constexpr uint64_t kPackedMagic = 0x31304b4341504b4d;  // "MKPACK01"
constexpr int64_t kPackedAlignment = 64;

inline int64_t header_bytes(int64_t n) {
  const auto bytes = static_cast<int64_t>(sizeof(PackedHeader)) + n * static_cast<int64_t>(sizeof(PackedLayer));
  return (bytes + kPackedAlignment - 1) / kPackedAlignment * kPackedAlignment;
}

inline uint64_t packed_check(const PackedHeader& header) {
  const auto* word = reinterpret_cast<const uint64_t*>(&header.bytes);
  const auto* end = reinterpret_cast<const uint64_t*>(reinterpret_cast<const PackedLayer*>(&header + 1) + header.n);
  uint64_t check = 0;
  for (; word != end; ++word) {
    check = (check ^ *word) * 0x9e3779b97f4a7c15;
    check ^= check >> 32;
  }
  return check;
}

inline int64_t panels_bytes(int64_t N, int64_t K, int64_t R, DType dtype) {
  const auto bytes = static_cast<int64_t>(cpu::packed_bytes(N, K, R, dtype));
  return (bytes + kPackedAlignment - 1) / kPackedAlignment * kPackedAlignment;
}

// Bytes for layers that write_packed() will take.
inline int64_t packed_size(const std::vector<Layer>& layers, DType dtype) {
  int64_t bytes = header_bytes(static_cast<int64_t>(layers.size()));
  for (const Layer& l : layers) bytes += panels_bytes(l.N, l.K, l.R, dtype);
  return bytes;
}

// `memory` lies at a multiple of kPackedAlignment.
inline void write_packed(const std::vector<Layer>& layers, DType dtype, void* memory, const cpu::Pool& pool) {
  auto& header = *static_cast<PackedHeader*>(memory);
  header.magic = kPackedMagic;
  header.bytes = packed_size(layers, dtype);
  header.dtype = static_cast<int64_t>(dtype);
  header.K = layers[0].K;
  header.n = static_cast<int64_t>(layers.size());
  auto* packed = reinterpret_cast<PackedLayer*>(&header + 1);
  int64_t offset = header_bytes(header.n);
  for (const Layer& l : layers) {
    *packed++ = {l.N, l.R, l.rank, static_cast<int64_t>(l.activation), offset};
    cpu::pack(l, dtype, static_cast<char*>(memory) + offset, pool);
    offset += panels_bytes(l.N, l.K, l.R, dtype);
  }
  header.check = packed_check(header);
}

// What write_packed() wrote, read by a call on x. Bytes from elsewhere are refused: no size in them is believed before
// it was found to lie within the tensor.
class Packed {
 public:
  Packed(const View& tensor, const View& x) : header_(static_cast<const PackedHeader*>(tensor.data)) {
    static const int32_t byte = aoti_torch_dtype_uint8();
    const auto size = tensor.dims == 1 ? tensor.sizes[0] : 0;
    MK_REFUSE_UNLESS(tensor.dtype == byte && tensor.device == x.device && size >= header_bytes(1) &&
                         tensor.steps(0, 1) && reinterpret_cast<uintptr_t>(tensor.data) % kPackedAlignment == 0 &&
                         header_->magic == kPackedMagic && header_->bytes == size && header_->n > 0 &&
                         header_->n <= size / static_cast<int64_t>(sizeof(PackedLayer)) &&
                         header_bytes(header_->n) <= size && header_->check == packed_check(*header_),
                     "packed: expected what pack() returned");
    MK_REFUSE_UNLESS(header_->dtype == static_cast<int64_t>(dtype_of(x)), "packed: expected the dtype of x");
    for (int64_t i = 0; i < n(); ++i) MK_REFUSE_UNLESS(fits(layer(i)), "packed: layer ", i, " is damaged");
  }

  int64_t n() const { return header_->n; }
  DType dtype() const { return static_cast<DType>(header_->dtype); }
  const void* panels(int64_t i) const { return reinterpret_cast<const char*>(header_) + layer(i).offset; }

  // Layer i without its outputs.
  Layer describe(int64_t i, const View& x, const View& bias) const {
    const PackedLayer& packed = layer(i);
    Layer result{};
    take_x(x, result);
    MK_REFUSE_UNLESS(result.K == header_->K && result.M, "x: expected rows of ", header_->K, ", got ", result.M, " of ",
                     result.K);
    result.N = packed.N;
    result.R = packed.R;
    result.rank = packed.rank;
    // Never read where there are panels, but offsets are added to them.
    result.u = result.v = panels(i);
    take_bias(bias, x, result);
    result.activation = activation_of(packed.activation);
    return result;
  }

 private:
  const PackedLayer& layer(int64_t i) const { return reinterpret_cast<const PackedLayer*>(header_ + 1)[i]; }

  bool fits(const PackedLayer& l) const {
    const int64_t bytes = header_->bytes, K = header_->K;
    // Each element takes a byte at least: beyond that the sum below could overflow.
    return l.N > 0 && l.R > 0 && K > 0 && l.N <= bytes / l.R && K <= bytes / l.R && l.rank >= 0 && l.rank <= l.R &&
           l.offset >= header_bytes(n()) && l.offset % kPackedAlignment == 0 &&
           panels_bytes(l.N, K, l.R, dtype()) <= bytes - l.offset;
  }

  const PackedHeader* header_;
};

}  // namespace mk::bindings
