"""One of each: timing, memory, cost of a call, noise, records, pages and plots.

Kernels are chosen, and benchmarks measured, by what is here; it knows no layer and no kernel.
"""
