"""Factorised layers and what turns models into them and back. No kernel is known here."""

from maestro_kernels.nn.active_ranks import lod_layers, ranks, set_ranks, truncate
from maestro_kernels.nn.adapters import merge_adapters
from maestro_kernels.nn.attention import LoDMultiheadAttention
from maestro_kernels.nn.candidates import Candidate, classify
from maestro_kernels.nn.conv import LoDConv, LoDConv1d, LoDConv2d
from maestro_kernels.nn.conversion import ConversionReport, conversion_report, convert, to_dense
from maestro_kernels.nn.experts import LoDExperts
from maestro_kernels.nn.freshness import refresh
from maestro_kernels.nn.grouping import group, groups, ungroup
from maestro_kernels.nn.importing.factors import import_factors
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.nn.linear import LoDLinear
from maestro_kernels.nn.lowering import AtenLinear, lower
from maestro_kernels.nn.model_summary import LayerSummary, ModelSummary, summary
from maestro_kernels.nn.packing import prepack, unpack
from maestro_kernels.nn.pivoted import PivotedLinear
from maestro_kernels.nn.serialization import load_pretrained, save_pretrained

__all__ = [
    "AtenLinear",
    "Candidate",
    "ConversionReport",
    "LayerSummary",
    "LoDConv",
    "LoDConv1d",
    "LoDConv2d",
    "LoDExperts",
    "LoDLayer",
    "LoDLinear",
    "LoDMultiheadAttention",
    "ModelSummary",
    "PivotedLinear",
    "classify",
    "conversion_report",
    "convert",
    "group",
    "groups",
    "import_factors",
    "load_pretrained",
    "lod_layers",
    "lower",
    "merge_adapters",
    "prepack",
    "ranks",
    "refresh",
    "save_pretrained",
    "set_ranks",
    "summary",
    "to_dense",
    "truncate",
    "ungroup",
    "unpack",
]
