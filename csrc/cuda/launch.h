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
  int32_t cc;  // compute capability, 10 * major + minor
  int32_t sm_count;
  int32_t shared_per_block;  // bytes a block may opt in to
  int32_t shared_per_sm;     // bytes
  bool has_row = true;       // the library was built with the row kernel (sm_90a)
};

// How float32 factors are multiplied; other dtypes ignore it.
enum class Precision : int32_t { tf32, ieee };

enum class Strategy : int32_t {
  none,    // describe() says why no kernel takes the call
  decode,  // M <= 64: H whole in shared memory, each block's slice of u on its way while H is computed
  rows,    // any M: tiles of 64 or 128 rows, a ready counter for each row block
  row,     // sm_90a, one layer: H in registers, TMA and wgmma; sm90/row.h
};

struct Plan {
  Strategy strategy = Strategy::none;
  int32_t block_m = 0, block_r = 0, block_n = 0;  // tiles of H (block_m, block_r) and of y (block_m, block_n)
  int32_t blocks = 0, threads = 0;
  int32_t cluster = 1;  // row: blocks that share the tiles of u and v
  int32_t whole = 0;    // row: row groups that one cluster makes alone; of the others it makes one of `parts`
  int32_t parts = 1;
  int32_t split_target = 0;  // decode, rows: K is split while phase 1 has no more tiles than this
  bool sum_by_all = false;   // decode: every block sums the splits of H itself, instead of the last to arrive for all
  bool overlap = false;      // decode: may begin before the kernel in front has ended (PDL)
  int64_t shared_bytes = 0;
  int64_t scratch_bytes = 0;
  int64_t counter_bytes = 0;  // kCounterBytes at most
  // Why not, as a literal; null for the strategy that was chosen.
  const char* decode_refused = nullptr;
  const char* rows_refused = nullptr;
  const char* row_refused = nullptr;
};

constexpr int64_t kMaxLayers = 16;
constexpr int64_t kCounterBytes = 64 * 1024;

// Pure function of its arguments; pointers are looked at for alignment only, null counts as aligned. The first of
// decode, rows and row that takes the call (row before rows where it is predicted to take less time), or `only` that
// one. `rank` of a layer with rank_ptr counts as R.
Plan plan(const Layer* layers, int64_t n, DType dtype, Precision precision, const Device& device,
          Strategy only = Strategy::none);

// "decode: 132 blocks of 256 threads, ...; not rows: comes after decode; not row: needs at least 64 rows".
std::string describe(const Plan& plan);

// Both return an empty string, or what failed, with the kernel's name and the shape.
std::string query_device(int32_t index, Device* device);

// Enqueues one kernel on `stream` (a cudaStream_t) of the current device, for the layers that `plan` was made for;
// pointers, bias, activation and h may differ, and a rank may be lower. What no longer fits the plan is refused.
//
// counters: plan.counter_bytes, 16-byte aligned, zeroed once when allocated and never again: a launch leaves them at
// zero. scratch: plan.scratch_bytes at least, 256-byte aligned, contents of no interest before or after. One of each
// for every (device, stream), and for every captured graph that may be replayed beside others: launches that share them
// must follow one another. The row kernel uses neither; null will do where scratch_bytes is 0. Nothing is allocated,
// cleared or waited for, so a launch can be captured in a CUDA graph.
std::string launch(const Plan& plan, const Layer* layers, int64_t n, DType dtype, Precision precision, void* counters,
                   void* scratch, int64_t scratch_bytes, void* stream);

}  // namespace mk::cuda
