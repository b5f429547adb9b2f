"""One call to time or to plan for: sizes and types, its id derived from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from maestro_kernels.measure.cost import Cost, Form, Mode, Size, count


@dataclass(frozen=True)
class Layer:
    """One low-rank layer: u (N, R), v (R, K), of which `rank` components are active."""

    N: int
    K: int
    R: int
    rank: int

    def __post_init__(self) -> None:
        if min(self.N, self.K, self.R) < 1 or not 0 <= self.rank <= self.R:
            raise ValueError(
                f"Layer: N, K, R, rank: expected N, K, R >= 1 and 0 <= rank <= R, "
                f"got {(self.N, self.K, self.R, self.rank)}"
            )


@dataclass(frozen=True)
class Case:
    """One call to time: M rows through one layer, or through a group that reads one x.

    Attributes:
        source: model and layer the shape comes from, e.g. "Llama-3-8B gate/up".
        M: rows of x.
        layers: one entry for lod_linear, several for lod_linear_grouped; all have the same K.
        dtype: dtype name, e.g. "bfloat16".
        mode: "forward", or "training" for forward and backward with every gradient.
        bias: whether the layers add one.
    """

    source: str
    M: int
    layers: tuple[Layer, ...]
    dtype: str = "float32"
    mode: Mode = "forward"
    bias: bool = False

    def __post_init__(self) -> None:
        if self.M < 1 or not self.layers or len({layer.K for layer in self.layers}) != 1:
            raise ValueError(
                f"Case: M, layers: expected M >= 1 and layers of one K, got {self.M}, {self.layers}"
            )

    @property
    def op(self) -> str:
        """Public function that serves it."""
        return "lod_linear" if len(self.layers) == 1 else "lod_linear_grouped"

    @property
    def K(self) -> int:
        """in_features of every layer."""
        return self.layers[0].K

    @property
    def id(self) -> str:
        """Every value that tells this case from another, readable and without spaces."""
        N, R, rank = (
            joined([getattr(layer, name) for layer in self.layers]) for name in ("N", "R", "rank")
        )
        group = f"{len(self.layers)}x-" if len(self.layers) > 1 else ""
        tail = "-bias" if self.bias else ""
        return f"{group}M{self.M}-N{N}-K{self.K}-R{R}-r{rank}-{self.dtype}-{self.mode}{tail}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"Case: dtype: expected a torch dtype name, got {self.dtype!r}")
        return dtype

    @property
    def sizes(self) -> list[Size]:
        """One roofline size per layer."""
        return [Size(self.M, s.N, s.K, s.rank, self.bias) for s in self.layers]

    def cost(self, form: Form) -> Cost:
        """FLOP and bytes of the case in a form."""
        return count(form, self.sizes, self.torch_dtype.itemsize, self.mode)


def joined(values: Iterable[int]) -> str:
    """Join values with "+", or give one when all are the same."""
    values = list(values)
    return "+".join(map(str, values if len(set(values)) > 1 else values[:1]))
