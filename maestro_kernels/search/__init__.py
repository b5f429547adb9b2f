"""Which rank for which layer: budgets, sensitivity, allocation, measurement.

`profile` says how fast each rank is here, `sensitivity` what it costs in accuracy, `allocate`
chooses ranks for a budget.
"""

from maestro_kernels.search.allocation import Allocation, Verification
from maestro_kernels.search.allocator import allocate
from maestro_kernels.search.budget import Budget, Latency, MACs, Memory, Params, Speedup
from maestro_kernels.search.latencies import Profile
from maestro_kernels.search.layer_profile import profile
from maestro_kernels.search.model_profile import ModelProfile, profile_model
from maestro_kernels.search.sensitivities import LayerSensitivity, Sensitivity, sensitivity
from maestro_kernels.search.whole_model import output_error

__all__ = [
    "Allocation",
    "Budget",
    "Latency",
    "LayerSensitivity",
    "MACs",
    "Memory",
    "ModelProfile",
    "Params",
    "Profile",
    "Sensitivity",
    "Speedup",
    "Verification",
    "allocate",
    "output_error",
    "profile",
    "profile_model",
    "sensitivity",
]
