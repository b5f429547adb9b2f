"""Whether a provider is right on what is timed, and the copies that a cold call walks through.

A result is held to plain torch in the same dtype and to float64; see testing.accuracy_error.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maestro_kernels import hardware
from maestro_kernels.measure.cases import Case
from maestro_kernels.measure.providers import (
    Bound,
    Family,
    Inputs,
    Provider,
    Unavailable,
    dense_forward,
    two_forward,
)
from maestro_kernels.testing import accuracy_error, rounding_errors

# Walking through this many times the private caches leaves nothing in them.
_CACHES = 4
_LEAST_BYTES, _MOST_BYTES = 32 << 20, 512 << 20
# A ring has at most this many sets of weights: a tiny layer would otherwise need thousands.
_MAX_RING = 512
# Overwriting this many times the L2 leaves nothing in it.
_FLUSH = 2


class Rings:
    """Copies of a case's inputs, per family, because dense weights are larger than factors."""

    def __init__(self, inputs: Inputs, ring_bytes: int) -> None:
        self._inputs, self._bytes = inputs, ring_bytes
        self._rings: dict[bool, list[Inputs]] = {}

    def __getitem__(self, family: Family) -> list[Inputs]:
        dense = family == "dense"
        if dense not in self._rings:
            own = replace(self._inputs, us=(), vs=()) if dense else replace(self._inputs, dense=())
            copies = math.ceil(self._bytes / own.bytes(family)) if self._bytes else 1
            copies = min(max(copies, 2), _MAX_RING) if self._bytes else 1
            self._rings[dense] = [own, *(own.copy() for _ in range(copies - 1))]
        return self._rings[dense]


@dataclass(frozen=True)
class Reference:
    """What results are held to, in the order in which a Bound gives them.

    Attributes:
        torch_out: from plain torch in the same dtype.
        exact: in float64.
        rounding: gives the errors that rounding may leave in each; None where torch's are the only
            measure.
    """

    torch_out: Sequence[Tensor]
    exact: Sequence[Tensor]
    rounding: Callable[[], Sequence[Tensor]] | None = None


class References:
    """The reference of each family."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._case, self._inputs = case, inputs
        self._results: dict[bool, Reference] = {}

    def __getitem__(self, family: Family) -> Reference:
        dense = family == "dense"
        if dense not in self._results:
            self._results[dense] = Reference(
                _compute(self._inputs, self._case.torch_dtype, dense),
                _compute(self._inputs, torch.float64, dense),
                None if dense else functools.cache(lambda: _rounding(self._inputs)),
            )
        return self._results[dense]


def _rounding(inputs: Inputs) -> tuple[Tensor, ...]:
    """`rounding_errors` of the factorised layers, in the order of Bound."""
    layers = [
        rounding_errors(inputs.x, u, v, rank=r, bias=b, dy=dy)
        for u, v, b, r, dy in zip(
            inputs.us,
            inputs.vs,
            inputs.biases,
            inputs.ranks,
            inputs.dys or [None] * len(inputs.us),
            strict=True,
        )
    ]
    ys = tuple(layer["y"] for layer in layers)
    if not inputs.dys:
        return ys
    # dx adds up what the layers give, and the errors of different layers are independent.
    dx = torch.stack([layer["dx"] for layer in layers]).square().sum(0).sqrt()
    weights = [layer[name] for name in ("du", "dv") for layer in layers]
    biases = [e["dbias"] for e, b in zip(layers, inputs.biases, strict=True) if b is not None]
    return (*ys, dx, *weights, *biases)


def _compute(inputs: Inputs, dtype: torch.dtype, dense: bool) -> tuple[Tensor, ...]:
    """The formula in plain torch, and its gradients in training, in the order of Bound."""

    def cast(t: Tensor) -> Tensor:
        return t.detach().to(dtype).requires_grad_(t.requires_grad)

    x = cast(inputs.x)
    biases = [None if b is None else cast(b) for b in inputs.biases]
    weights = [cast(w) for w in (inputs.dense if dense else (*inputs.us, *inputs.vs))]
    n = len(inputs.ranks)
    if dense:
        ys = dense_forward(x, weights, biases)
    else:
        ys = two_forward(x, weights[:n], weights[n:], biases, inputs.ranks)
    leaves = (x, *weights, *(b for b in biases if b is not None))
    return Bound(lambda: ys, leaves, tuple(dy.to(dtype) for dy in inputs.dys))()


def gate(bound: Bound, reference: Reference) -> str | None:
    """Why a provider's results are refused, or None when all meet the derived tolerance.

    Args:
        bound: the provider on one set of inputs.
        reference: the same results from elsewhere.
    """
    results, exact, rounding = bound(), reference.exact, reference.rounding
    if len(results) != len(exact):
        return f"expected {len(exact)} results, got {len(results)}"
    for k, (out, same, ref) in enumerate(zip(results, reference.torch_out, exact, strict=True)):
        problem = accuracy_error(out, same, ref, rounding and (lambda k=k: rounding()[k]))
        if problem is not None:
            return f"{_result_name(k, len(exact), bound)}: {problem}"
    return None


def _result_name(k: int, total: int, bound: Bound) -> str:
    """Name result k of a call: outputs first, then gradients in the order of its leaves."""
    outputs = total - len(bound.leaves) if bound.dys else total
    if k < outputs:
        return "y" if outputs == 1 else f"y[{k}]"
    leaf = bound.leaves[k - outputs]
    return "dx" if k == outputs else f"gradient of the {tuple(leaf.shape)} parameter"


def checked(case: Case, provider: Provider, inputs: Inputs) -> tuple[Bound, str | None]:
    """One provider bound to one set of inputs, and what its gate says; for other timers.

    Raises:
        Unavailable: the provider cannot run the case.
    """
    (bound,) = provider.bound(case, [inputs])
    return bound, gate(bound, References(case, inputs)[provider.family])


def walk(ring: list[Bound]) -> Callable[[], object]:
    """A call that uses the next set of inputs each time."""
    calls: list[Callable[[], object]] = [b if b.dys else b.forward for b in ring]
    if len(calls) == 1:
        return calls[0]
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def ring_bytes(device: torch.device) -> int:
    """What a cold measurement walks through: several times the private caches."""
    private = hardware.current_device(device).l2_bytes or 0
    return min(max(_CACHES * private, _LEAST_BYTES), _MOST_BYTES)


def flush_bytes(device: torch.device) -> int:
    """What a GPU overwrites to leave nothing in its second-level cache; nothing on a CPU.

    A CPU has only the ring, which is larger than its caches.
    """
    if device.type != "cuda":
        return 0
    return _FLUSH * (hardware.current_device(device).l2_bytes or 0)


def passing(
    case: Case,
    providers: Sequence[Provider],
    inputs: Inputs,
    yardstick: Sequence[str] = (),
    refused: dict[str, str] | None = None,
) -> list[Provider]:
    """The providers that run and pass the accuracy gate, or are what it measures by.

    Args:
        case: what they compute.
        providers: the candidates.
        inputs: of the case.
        yardstick: names that need no gate.
        refused: gets name -> why of those that failed, but for those that do not take the case.
    """
    refused = {} if refused is None else refused
    found = []
    for provider in providers:
        if provider.name not in yardstick:
            try:
                _, problem = checked(case, provider, inputs)
            except Unavailable:
                continue
            except RuntimeError as error:
                refused[provider.name] = f"{type(error).__name__}: {error}"
                continue
            if problem is not None:
                refused[provider.name] = problem
                continue
        found.append(provider)
    return found
