"""The record of one call: what a user passed, on its way from the public functions to a kernel.

A layer is a group of one, so one record serves both public functions and every backend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

Ranks = Sequence[int | None] | Tensor
Grads = list[Tensor | None]
# (dxs, dnorms, dzs, hs, dhs), see `backends.Backend.input_grads`.
InputGrads = tuple[Grads, Grads, Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor | None]]
# Whether x, u, v and bias want gradients.
Needs = tuple[bool, bool, bool, bool]


class Call(NamedTuple):
    """y_i = act_i(H_i @ u_i[:, :r_i].T + bias_i + residual_i) of n layers.

    H_i = scale_i · x_i @ v_i[:r_i].T, or scale_i · RMSNorm(x_i @ v_i[:r_i].T) where it has a norm.

    Attributes:
        fn: the public function, for errors.
        xs: one x (..., K) that all layers read, or one for each.
        us: (N_i, R_i).
        vs: (R_i, K_i).
        biases: (N_i,) or None for each.
        ranks: r_i or None (R_i) for each, or one int32 tensor on the device of x: (n,), or 0-d for
            the rank of one layer.
        activations: a name or None for each.
        residuals: (..., N_i) or None for each; () where none has one.
        scales: a number for each; () where all are 1.
        norms: weight (R_i,) of the norm or None for each; () where none has one.
        norm_eps: what is added to the mean of squares.
    """

    fn: str
    xs: Sequence[Tensor]
    us: Sequence[Tensor]
    vs: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    ranks: Ranks
    activations: Sequence[str | None]
    residuals: Sequence[Tensor | None] = ()
    scales: Sequence[float] = ()
    norms: Sequence[Tensor | None] = ()
    norm_eps: float = 0.0

    @property
    def n(self) -> int:
        """Layers."""
        return len(self.us)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Everything that may want a gradient, in the order of the attributes."""
        return (*self.xs, *self.us, *self.vs, *self.biases, *self.residuals, *self.norms)

    def with_tensors(self, tensors: Sequence[Any]) -> Call:
        """The same call of others, in the order of `tensors`; there may be more behind them."""
        x, n = len(self.xs), len(self.us)
        us, vs, biases = (tensors[a : a + n] for a in (x, x + n, x + 2 * n))
        end = x + 3 * n + len(self.residuals)
        residuals, norms = tensors[x + 3 * n : end], tensors[end : end + len(self.norms)]
        found = self._replace(xs=tensors[:x], us=us, vs=vs, biases=biases, residuals=residuals)
        return found._replace(norms=norms) if norms else found

    def x(self, i: int) -> Tensor:
        """What layer i reads."""
        return self.xs[0 if len(self.xs) == 1 else i]

    def layer(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Any, str | None]:
        """(x, u, v, bias, rank, activation) of layer i."""
        _, xs, us, vs, biases, ranks, activations, *_ = self
        x = xs[0 if len(xs) == 1 else i]
        one_rank = isinstance(ranks, Tensor) and ranks.dim() == 0
        return x, us[i], vs[i], biases[i], ranks if one_rank else ranks[i], activations[i]

    @property
    def is_plain(self) -> bool:
        """Nothing is added to the outputs, nothing scaled and no H normalised."""
        return not (self.residuals or self.scales or self.norms)

    def residual(self, i: int) -> Tensor | None:
        """What is added to the output of layer i."""
        return self.residuals[i] if self.residuals else None

    def scale(self, i: int) -> float:
        """What H of layer i is multiplied by."""
        return self.scales[i] if self.scales else 1.0

    def norm(self, i: int) -> Tensor | None:
        """Weight of the norm between the factors of layer i."""
        return self.norms[i] if self.norms else None

    def for_backend(self) -> Call:
        """The call as backends take it: matrices, and each rank an int, or all one tensor."""
        _, xs, _, vs, _, ranks, _, residuals, *_ = self
        are_ints = not isinstance(ranks, Tensor) and None not in ranks
        if are_ints and len(xs) == 1 and xs[0].dim() == 2:
            return self
        if residuals:
            residuals = [t if t is None else as_rows(t) for t in residuals]
        for x in xs:
            if x.dim() != 2:
                xs = [as_rows(x) for x in xs]
                break
        if not are_ints and not isinstance(ranks, Tensor):
            ranks = [v.shape[0] if r is None else r for r, v in zip(ranks, vs, strict=True)]
        if xs is self.xs and ranks is self.ranks and not residuals:
            return self
        return self._replace(xs=xs, ranks=ranks, residuals=residuals)

    def shaped(self, ys: list[Tensor]) -> list[Tensor]:
        """Outputs (M, N_i) of `for_backend` with the leading dimensions of x."""
        xs = self.xs
        if len(xs) == 1 and xs[0].dim() == 2:
            return ys
        return [
            y if self.x(i).dim() == 2 else y.view(*self.x(i).shape[:-1], self.us[i].shape[0])
            for i, y in enumerate(ys)
        ]


def as_rows(x: Tensor) -> Tensor:
    """(..., K) as (M, K)."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
