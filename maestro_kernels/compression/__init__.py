"""`maestro-kernels compress`: a saved transformers model in, a smaller one out, judged.

`architectures` knows what lies in a folder, `calibration` and `media` make batches, `evaluation`
compares with the dense model, `choosing` finds ranks, `decomposition` makes and cuts factors,
`work` keeps what is finished, `job` is the run.
"""

from maestro_kernels.compression.evaluation import Evaluation
from maestro_kernels.compression.job import Compression, Options, Plan, check, compress

__all__ = ["Compression", "Evaluation", "Options", "Plan", "check", "compress"]
