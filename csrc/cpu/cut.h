// How a layer is cut into tasks, and what that should cost.
#pragma once

#include "kernel.h"

namespace mk::cpu {

// A layer as the schedule sees it.
struct Size {
  int64_t M, N, K, rank;
};

// A shrink task: one block of rows, one group of panels of v, one part of K. An expand task: one block of rows, one
// group of panels of u.
struct Cut {
  int64_t blocks, block_rows;
  int64_t shrink_groups, shrink_panels;  // groups, panels of one
  int64_t parts, part_k;                 // of K
  int64_t expand_groups, expand_panels;
  bool far;  // a thread's weights do not stay in its own cache
  double cycles;
};

// The cheapest cut for a number of threads.
Cut cut(const Size& size, int64_t threads, const Kernel& kernel, DType dtype);

// What a parallel region costs before anything is computed.
double region_cycles(int64_t threads);

}  // namespace mk::cpu
