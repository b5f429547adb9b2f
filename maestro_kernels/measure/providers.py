"""Ways to compute a case: a provider turns one set of inputs into a call that can be timed.

Who is compared with whom is said elsewhere: benchmark/providers.py, search/strategies.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from maestro_kernels.backends import onednn
from maestro_kernels.measure.cases import Case
from maestro_kernels.testing import make_inputs

Family = Literal["dense", "two matmuls", "ours"]
Forward = Callable[[], Sequence[Tensor]]


class Unavailable(RuntimeError):
    """A provider cannot run a case; the message is the reason that goes into its row."""


@dataclass(frozen=True)
class Inputs:
    """One set of arguments of a case: x (M, K), per layer u (N, R), v (R, K), W (N, K), bias, dy.

    `dense` is u[:, :r] @ v[:r] rounded to the dtype: the layer that the factors replace.
    """

    x: Tensor
    us: tuple[Tensor, ...]
    vs: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    dys: tuple[Tensor, ...]
    ranks: tuple[int, ...]
    dense: tuple[Tensor, ...] = ()

    def copy(self) -> Inputs:
        """The same values at other addresses; strides and requires_grad are kept."""

        def copies(tensors: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(None if t is None else _clone(t) for t in tensors)

        return replace(
            self,
            x=_clone(self.x),
            us=copies(self.us),
            vs=copies(self.vs),
            biases=copies(self.biases),
            dys=copies(self.dys),
            dense=copies(self.dense),
        )

    def bytes(self, family: Family) -> int:
        """Bytes that one call of a family reads."""
        weights = self.dense if family == "dense" else (*self.us, *self.vs)
        return sum(t.numel() * t.element_size() for t in (self.x, *weights))


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def make_case_inputs(case: Case, device: torch.device | str) -> Inputs:
    """Fresh random arguments of a case; in training mode they want gradients."""
    dtype, wants = case.torch_dtype, case.mode == "training"
    made = [
        make_inputs(case.M, s.N, s.K, s.R, dtype=dtype, device=device, bias=case.bias, seed=i)
        for i, s in enumerate(case.layers)
    ]
    dense = [
        (u[:, : s.rank].float() @ v[: s.rank].float()).to(dtype)
        for (_, u, v, _), s in zip(made, case.layers, strict=True)
    ]
    dys = [
        make_inputs(case.M, 1, s.N, 1, dtype=dtype, device=device, seed=101 + i)[0]
        for i, s in enumerate(case.layers)
    ]

    def leaf(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.detach().requires_grad_(wants)

    return Inputs(
        x=leaf(made[0][0]),
        us=tuple(leaf(u) for _, u, _, _ in made),
        vs=tuple(leaf(v) for _, _, v, _ in made),
        biases=tuple(leaf(b) for _, _, _, b in made),
        dys=tuple(dys) if wants else (),
        ranks=tuple(s.rank for s in case.layers),
        dense=tuple(leaf(w) for w in dense),
    )


@dataclass(frozen=True)
class Bound:
    """A provider on one set of inputs: calling it gives outputs, then gradients in training."""

    forward: Forward
    leaves: tuple[Tensor, ...] = ()
    dys: tuple[Tensor, ...] = ()

    def __call__(self) -> tuple[Tensor, ...]:
        """Outputs of the layers; in training followed by gradients of x and of every weight.

        The caller sets the gradient mode: entering it here would be timed with a small layer.
        """
        ys = self.forward()
        return (*ys, *torch.autograd.grad(ys, self.leaves, self.dys)) if self.dys else tuple(ys)


# Binds a list of inputs at once, because what is compiled is compiled once for all of them.
Bind = Callable[[Case, Sequence[Inputs]], list[Forward]]


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        name: how rows and plots call it.
        family: "dense" is another function with other bytes; "two matmuls" is what ours must beat.
        bind: inputs -> one forward per set of inputs; may raise Unavailable.
        trains: whether gradients flow through it.
        config: the plan text for a case, for rows; empty where there is nothing to choose.
    """

    name: str
    family: Family
    bind: Bind = field(repr=False)
    trains: bool = True
    config: Callable[[Case, Inputs], str] = field(default=lambda case, inputs: "", repr=False)

    def bound(self, case: Case, ring: Sequence[Inputs]) -> list[Bound]:
        """One call per set of inputs.

        Raises:
            Unavailable: with the reason.
        """
        if case.mode == "training" and not self.trains:
            raise Unavailable("packed weights have no gradient")
        forwards = self.bind(case, ring)
        if case.mode == "forward":
            return [Bound(forward) for forward in forwards]
        pairs = zip(forwards, ring, strict=True)
        return [Bound(forward, self.leaves(i), i.dys) for forward, i in pairs]

    def leaves(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """What gradients are taken of, x first."""
        weights = inputs.dense if self.family == "dense" else (*inputs.us, *inputs.vs)
        return (inputs.x, *weights, *(b for b in inputs.biases if b is not None))


def dense_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """Compute y = x @ W.T + bias, one F.linear per layer."""
    return [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]


def two_forward(
    x: Tensor,
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    ranks: Sequence[int],
) -> list[Tensor]:
    """Compute y = x @ v[:r].T @ u[:, :r].T + bias, two F.linear per layer on prefix views."""
    layers = zip(us, vs, biases, ranks, strict=True)
    return [F.linear(F.linear(x, v[:r]), u[:, :r], b) for u, v, b, r in layers]


def _bind_dense(case: Case, ring: Sequence[Inputs]) -> list[Forward]:
    return [partial(dense_forward, i.x, i.dense, i.biases) for i in ring]


def _bind_two(case: Case, ring: Sequence[Inputs]) -> list[Forward]:
    return [partial(two_forward, i.x, i.us, i.vs, i.biases, i.ranks) for i in ring]


def packed_weight(weight: Tensor, M: int) -> Tensor:
    """Reorder a weight once into the layout oneDNN prefers for M rows."""
    if weight.device.type != "cpu":
        raise Unavailable("oneDNN serves CPU tensors")
    reason = onednn.unsupported(weight.dtype)
    if reason is not None:
        raise Unavailable(reason)
    return onednn.reorder(weight, M)


def _bind_dense_onednn(case: Case, ring: Sequence[Inputs]) -> list[Forward]:
    def forward(x: Tensor, packed: Sequence[Tensor], biases: Sequence[Any]) -> list[Tensor]:
        return [onednn.linear(x, w, b) for w, b in zip(packed, biases, strict=True)]

    packs = [[packed_weight(w, case.M) for w in i.dense] for i in ring]
    return [partial(forward, i.x, p, i.biases) for i, p in zip(ring, packs, strict=True)]


DENSE = Provider("dense", "dense", _bind_dense)
TWO = Provider("two matmuls", "two matmuls", _bind_two)
DENSE_ONEDNN = Provider("dense, oneDNN packed", "dense", _bind_dense_onednn, trains=False)
