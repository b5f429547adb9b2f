"""Which rank for which layer: budgets, sensitivity, allocation, measurement.

`sensitivity` says what each rank costs in accuracy, `allocate` chooses ranks for a budget.
"""

from maestro_kernels.search.budget import Budget, Latency, MACs, Memory, Params, Speedup
from maestro_kernels.search.sensitivity import LayerSensitivity, Sensitivity, sensitivity
from maestro_kernels.search.whole_model import output_error

__all__ = [
    "Budget",
    "Latency",
    "LayerSensitivity",
    "MACs",
    "Memory",
    "Params",
    "Sensitivity",
    "Speedup",
    "output_error",
    "sensitivity",
]
