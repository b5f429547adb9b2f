"""Training LoD layers: rank sampling, penalties, shrinking, freezing.

Importing this imports torch and nothing heavier; integrations import their framework when used.
Source: Horvath et al., Maestro, ICML 2024 (arXiv 2308.14929).
"""

from maestro_kernels.training.batchnorm import recalibrate_batchnorm
from maestro_kernels.training.extract import (
    Extraction,
    ExtractionPath,
    extract,
    extraction_report,
)
from maestro_kernels.training.freezing import SequentialFreezing, below_cliff, quantize_ranks
from maestro_kernels.training.penalties import (
    funnel,
    funnel_start,
    group_lasso,
    hierarchical_group_lasso,
)
from maestro_kernels.training.resize import load_shrunken
from maestro_kernels.training.rewrap import rewrap
from maestro_kernels.training.samplers import (
    FixedSampler,
    FullSampler,
    IndependentSampler,
    RankSampler,
    SinglePairSampler,
)
from maestro_kernels.training.shrink import shrink

__all__ = [
    "Extraction",
    "ExtractionPath",
    "FixedSampler",
    "FullSampler",
    "IndependentSampler",
    "RankSampler",
    "SequentialFreezing",
    "SinglePairSampler",
    "below_cliff",
    "extract",
    "extraction_report",
    "funnel",
    "funnel_start",
    "group_lasso",
    "hierarchical_group_lasso",
    "load_shrunken",
    "quantize_ranks",
    "recalibrate_batchnorm",
    "rewrap",
    "shrink",
]
