"""Factorised layers and what turns models into them and back. No kernel is known here."""

from maestro_kernels.nn.candidates import Candidate, classify
from maestro_kernels.nn.conv import LoDConv2d
from maestro_kernels.nn.convert import ConversionReport, conversion_report, convert, to_dense
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.nn.linear import LoDLinear

__all__ = [
    "Candidate",
    "ConversionReport",
    "LoDConv2d",
    "LoDLayer",
    "LoDLinear",
    "classify",
    "conversion_report",
    "convert",
    "to_dense",
]
