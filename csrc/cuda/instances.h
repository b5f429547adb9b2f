// The compiled kernels, one for each strategy, arithmetic and tile height.
#pragma once

#include "config.h"

namespace mk::cuda {

constexpr int kInstances = 16;

// bf16, f16, tf32, ieee
inline int op_of(DType dtype, Precision precision) {
  if (dtype == DType::bf16) return 0;
  if (dtype == DType::f16) return 1;
  return precision == Precision::tf32 ? 2 : 3;
}

const void* decode_instance(int op, bool large);  // decode.cu
const void* rows_instance(int op, bool large);    // rows.cu; null for ieee

struct Instance {
  const void* kernel;
  int slot;  // 0..kInstances - 1
};
inline Instance find_instance(const Plan& plan, DType dtype, Precision precision) {
  const bool decode = plan.strategy == Strategy::decode;
  const bool large = plan.block_m > (decode ? 16 : kSmallRows.block_m);
  const int op = op_of(dtype, precision);
  return {decode ? decode_instance(op, large) : rows_instance(op, large), (decode ? 0 : 8) + 2 * op + large};
}

}  // namespace mk::cuda
