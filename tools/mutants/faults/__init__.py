"""The planted faults: where each one is, the test that must catch it, and what a user would see.

`old` stands exactly once in its file. Short and meaningful text survives rewriting best.
"""

from tools.mutants.faults import calls, kernels, models, work

FAULTS = (*calls.FAULTS, *kernels.FAULTS, *models.FAULTS, *work.FAULTS)
