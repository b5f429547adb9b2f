"""Training LoD layers: rank sampling, penalties, shrinking, freezing.

Importing this imports torch and nothing heavier; integrations import their framework when used.
Source: Horvath et al., Maestro, ICML 2024 (arXiv 2308.14929).
"""

from maestro_kernels.training.batchnorm import recalibrate_batchnorm
from maestro_kernels.training.checkpoint import load_checkpoint, save_checkpoint
from maestro_kernels.training.distillation import Distillation, distil
from maestro_kernels.training.extraction import Extraction, extraction_report
from maestro_kernels.training.extractor import ExtractionPath, extract
from maestro_kernels.training.freezing import SequentialFreezing, below_cliff, quantize_ranks
from maestro_kernels.training.loop import Maestro, NonFiniteLoss, check_loss
from maestro_kernels.training.penalties import (
    funnel,
    funnel_start,
    group_lasso,
    hierarchical_group_lasso,
)
from maestro_kernels.training.resize import load_shrunken, resize_on_load
from maestro_kernels.training.rewrapping import rewrap
from maestro_kernels.training.runner import Task
from maestro_kernels.training.samplers import (
    FixedSampler,
    FullSampler,
    IndependentSampler,
    RankSampler,
    SinglePairSampler,
)
from maestro_kernels.training.shrinking import shrink

__all__ = [
    "Distillation",
    "Extraction",
    "ExtractionPath",
    "FixedSampler",
    "FullSampler",
    "IndependentSampler",
    "Maestro",
    "NonFiniteLoss",
    "RankSampler",
    "SequentialFreezing",
    "SinglePairSampler",
    "Task",
    "below_cliff",
    "check_loss",
    "distil",
    "extract",
    "extraction_report",
    "funnel",
    "funnel_start",
    "group_lasso",
    "hierarchical_group_lasso",
    "load_checkpoint",
    "load_shrunken",
    "quantize_ranks",
    "recalibrate_batchnorm",
    "resize_on_load",
    "rewrap",
    "save_checkpoint",
    "shrink",
]
