"""Timing, memory and the cost of a call: by which kernels are chosen, and benchmarks measure."""
