"""Which rank for which layer: budgets, sensitivity, allocation, measurement.

sens = search.sensitivity(model, batches)
ranks = search.allocate(model, search.Params(0.5), sensitivity=sens)
"""

from maestro_kernels.search.budget import Budget, Latency, MACs, Memory, Params, Speedup

__all__ = [
    "Budget",
    "Latency",
    "MACs",
    "Memory",
    "Params",
    "Speedup",
]
