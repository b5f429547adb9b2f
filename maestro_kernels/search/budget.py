"""What a model may cost: the budgets that `allocate` and `training.extract` take.

Every budget has a `unit` that it counts in, a `limit` on the cost in that unit, and the `value`
that a cost is in its own measure.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class _Fraction:
    """At most `fraction` of what the dense layers cost."""

    fraction: float

    def __post_init__(self) -> None:
        name = type(self).__name__
        fraction = _number(name, "fraction", self.fraction)
        if not 0 < fraction <= 1:
            raise ValueError(f"{name}: fraction: expected 0 < fraction <= 1, got {self.fraction}")
        object.__setattr__(self, "fraction", fraction)

    def limit(self, dense: float) -> float:
        """What is allowed where the dense layers cost `dense`."""
        return self.fraction * dense

    def value(self, cost: float, dense: float) -> float:
        """The fraction that `cost` is of `dense`."""
        return cost / dense


@dataclass(frozen=True)
class Params(_Fraction):
    """At most `fraction` of the dense weights of the layers considered.

    A factorised layer holds r (N + K) weights per group, a dense one N K. Biases, norms and
    embeddings are not counted; reports give the whole model's parameters beside.

    Raises:
        TypeError: fraction is no number.
        ValueError: not 0 < fraction <= 1.
    """

    unit: ClassVar[str] = "weights"


@dataclass(frozen=True)
class MACs(_Fraction):
    """At most `fraction` of the dense multiply-adds of the layers considered.

    A layer costs r (N + K) per row of x and group, N K where dense; rows count where they are known
    (a convolution has one per output position).

    Raises:
        TypeError: fraction is no number.
        ValueError: not 0 < fraction <= 1.
    """

    unit: ClassVar[str] = "MACs"


@dataclass(frozen=True)
class _Amount:
    """A positive finite number, in the unit itself where a class does not say otherwise."""

    def __post_init__(self) -> None:
        (name,) = vars(self)
        object.__setattr__(self, name, _positive(type(self).__name__, name, vars(self)[name]))

    def limit(self, dense: float) -> float:
        """What is allowed, whatever the dense model costs."""
        amount: float
        (amount,) = vars(self).values()
        return amount

    def value(self, cost: float, dense: float) -> float:
        """The cost, whatever the dense model costs."""
        return cost


@dataclass(frozen=True)
class Latency(_Amount):
    """At most `ms` milliseconds for a batch.

    Raises:
        TypeError: ms is no number.
        ValueError: ms is not positive and finite.
    """

    unit: ClassVar[str] = "ms"
    ms: float


@dataclass(frozen=True)
class Speedup(_Amount):
    """At least `x` times as fast as dense: at most dense / x milliseconds for a batch.

    Raises:
        TypeError: x is no number.
        ValueError: x is not positive and finite.
    """

    unit: ClassVar[str] = "ms"
    x: float

    def limit(self, dense: float) -> float:
        """Milliseconds allowed where the dense model takes `dense`."""
        return dense / self.x

    def value(self, cost: float, dense: float) -> float:
        """How many times as fast as `dense` `cost` is."""
        return dense / cost


@dataclass(frozen=True)
class Memory(_Amount):
    """At most `bytes` bytes of parameters and buffers in the whole model.

    Raises:
        TypeError: bytes is no number.
        ValueError: bytes is not positive and finite.
    """

    unit: ClassVar[str] = "bytes"
    bytes: float


Budget = Params | MACs | Latency | Speedup | Memory


def check_budget(fn: str, budget: Any) -> Budget:
    """`budget` itself; TypeError naming fn where it is none."""
    if not isinstance(budget, Budget):
        raise TypeError(
            f"{fn}: budget: expected Params, MACs, Latency, Speedup or Memory, "
            f"got {type(budget).__name__}"
        )
    return budget


def _positive(fn: str, name: str, value: Any) -> float:
    number = _number(fn, name, value)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{fn}: {name}: expected a finite number > 0, got {value}")
    return number


def _number(fn: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{fn}: {name}: expected a number, got {type(value).__name__}")
    return float(value)
