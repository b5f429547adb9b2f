// Row kernel for sm_90a as the bindings and plans see it: large M, rank up to 256, one layer. No CUDA header.
//
//   y = act(x v[:r]^T u[:, :r]^T + bias), H in registers between the two products
#pragma once

#include <string>

#include "row_config.h"

namespace mk::cuda::sm90 {

// In the order of use, before launch(), pure functions of row_config.h:
//   const char* unsupported(layer, dtype, device)   null, or why the kernel cannot serve the layer
//   Config choose(layer, device)                    tiles and grid
//   std::string describe(config)                    for explain
//   double predicted_ns(layer, config, device)      by a model

// Enqueues one kernel on `stream` (a cudaStream_t) of the current device; unsupported() must have returned null for
// the layer. Returns an empty string, or what failed, with the kernel's name and the shape. No workspace; nothing is
// allocated, cleared or waited for, so a launch can be captured in a CUDA graph (which keeps the layer's pointers).
std::string launch(const Layer& layer, DType dtype, const Config& config, void* stream);

}  // namespace mk::cuda::sm90
