// AVX512_BF16: vdpbf16ps multiplies a pair along k with the pairs of sixteen columns.
#include "kernel.h"
#include "vec_avx512.h"

#include "product.h"  // needs a Vec

namespace mk::cpu {
namespace {

struct PairFormat {
  static constexpr DType dtype = DType::bf16;
  static constexpr DType a_dtype = DType::bf16;
  static constexpr int parts = 1;

  static Vec weights(const char* unit, int, int64_t column) { return {_mm512_loadu_ps(unit + 4 * column)}; }
  static Vec element(const char* a) {
    float pair;
    std::memcpy(&pair, a, sizeof pair);
    return Vec::set(pair);
  }
  static Vec multiply_add(Vec a, Vec w, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(w.v))};
  }
};

}  // namespace

const Kernel& kernel_avx512_bf16(DType dtype) {
  static constexpr Kernel bf16 = make_kernel<PairFormat, 2, 12>("avx512_bf16", 30);
  return dtype == DType::bf16 ? bf16 : kernel_avx512(dtype);
}

}  // namespace mk::cpu
