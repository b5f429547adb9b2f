"""Fused low-rank linear layers for PyTorch.

    act(x @ v[:r].T @ u[:, :r].T + bias)

in one call, for one layer or a group with different ranks. Importing this starts no GPU, reads no
file beyond Python's own and compiles nothing. `mk.search` and `mk.training` are imported when they
are first asked for.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from maestro_kernels import nn
from maestro_kernels.functional import explain, lod_linear, lod_linear_grouped
from maestro_kernels.nn import (
    LoDConv1d,
    LoDConv2d,
    LoDLinear,
    adapters,
    convert,
    foreign,
    group,
    import_factors,
    load_pretrained,
    prepack,
    ranks,
    refresh,
    save_pretrained,
    set_ranks,
    summary,
    to_dense,
    truncate,
    ungroup,
    unpack,
)
from maestro_kernels.nn.hub import registration
from maestro_kernels.tuning import set_tuning, tune, use_choices
from maestro_kernels.version import __version__ as __version__

if TYPE_CHECKING:
    from maestro_kernels import search, training

__all__ = [
    "LoDConv1d",
    "LoDConv2d",
    "LoDLinear",
    "convert",
    "explain",
    "group",
    "import_factors",
    "load_pretrained",
    "lod_linear",
    "lod_linear_grouped",
    "nn",
    "prepack",
    "ranks",
    "refresh",
    "save_pretrained",
    "search",
    "set_ranks",
    "set_tuning",
    "summary",
    "to_dense",
    "training",
    "truncate",
    "tune",
    "ungroup",
    "unpack",
    "use_choices",
]

registration.install()
adapters.install()
foreign.install()


def __getattr__(name: str) -> ModuleType:
    if name in ("search", "training"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
