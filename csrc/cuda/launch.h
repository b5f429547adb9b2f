// What the bindings call: plan() says which kernel would run and why, launch() runs it. No CUDA header is needed here,
// and plan.cpp compiles without CUDA, so that plans are made and tested on any machine.
//
//   y = act(x v[:r]^T u[:, :r]^T + bias) for one layer or a group, in one launch
#pragma once

#include <cstdint>
#include <string>

#include "../layer.h"

namespace mk::cuda {

// What a plan depends on; filled in by query_device(), or by hand in a test.
struct Device {
  int32_t cc;                // compute capability, 10 * major + minor
  int32_t sm_count;
  int32_t shared_per_block;  // bytes a block may opt in to
  int32_t shared_per_sm;     // bytes
};

// How float32 factors are multiplied; other dtypes ignore it.
enum class Precision : int32_t { tf32, ieee };

enum class Strategy : int32_t {
  none,    // Plan::reason says why neither kernel takes the call
  decode,  // M <= 64: H whole in shared memory, each block's slice of u fetched while it waits for H
  rows,    // any M: tiles of 64 or 128 rows, a ready counter for each row block
};

struct Plan {
  Strategy strategy = Strategy::none;
  int32_t block_m = 0, block_r = 0, block_n = 0;  // tiles of H (block_m, block_r) and of y (block_m, block_n)
  int32_t blocks = 0, threads = 0;
  int32_t split_target = 0;  // K is split while phase 1 has no more tiles than this
  bool sum_by_all = false;   // decode: every block sums the splits of H itself, instead of the last to arrive for all
  int64_t shared_bytes = 0;
  int64_t workspace_bytes = 0;
  std::string reason;  // why this strategy, and what each one before it in the list refused; never empty
};

constexpr int64_t kMaxLayers = 16;

// Pure function of its arguments; pointers are looked at for alignment only, null counts as aligned. The first of
// decode and rows that takes the call, or `only` that one; `rank` of a layer with rank_ptr counts as R.
Plan plan(const Layer* layers, int64_t n, DType dtype, Precision precision, const Device& device,
          Strategy only = Strategy::none);

// Both return an empty string, or what failed, with the kernel's name and the shape.
std::string query_device(int32_t index, Device* device);

// Enqueues one kernel on `stream` (a cudaStream_t) of the current device. The layers are those of plan(), but x, y, h,
// bias, rank and pointers may differ as long as the plan's alignment holds.
//
// workspace: plan.workspace_bytes at least, 256-byte aligned, zeroed once when allocated and never again: a launch
// leaves its counters at zero, and what else is in it is of no interest to the next. One for each (device, stream), and
// one for each captured graph that may be replayed beside others: launches that share it must follow one another.
// Nothing is allocated, cleared or waited for, so a launch can be captured in a CUDA graph.
std::string launch(const Plan& plan, const Layer* layers, int64_t n, DType dtype, Precision precision, void* workspace,
                   int64_t workspace_bytes, void* stream);

}  // namespace mk::cuda
