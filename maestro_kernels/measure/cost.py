"""The one place that counts FLOP and bytes, for every form of a layer and of a group of layers.

Each operand of a step is moved once. `explain`, every benchmark row and the planner use this
count, so that a share of the roofline means the same thing everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from maestro_kernels.hardware import Device

if TYPE_CHECKING:
    from maestro_kernels.problem import LoDProblem

Form = Literal["dense", "two matmuls", "fused"]
Mode = Literal["forward", "backward", "training"]


@dataclass(frozen=True)
class Size:
    """One layer at its active rank: x (M, K), u (N, rank), v (rank, K), y and residual (M, N)."""

    M: int
    N: int
    K: int
    rank: int
    bias: bool = False
    residual: bool = False

    @classmethod
    def of(cls, problem: LoDProblem) -> Size:
        """The size of a described call; a rank only the device knows counts as R."""
        p = problem
        return cls(p.M, p.N, p.K, p.max_active_rank, p.has_bias, p.has_residual)


@dataclass(frozen=True)
class Step:
    """One library call or one kernel: FLOP done, elements moved to and from memory."""

    flops: int
    elements: int


@dataclass(frozen=True)
class Cost:
    """Steps that run one after the other, with `itemsize` bytes per element."""

    steps: tuple[Step, ...]
    itemsize: int

    @property
    def flops(self) -> int:
        """Multiplications and additions, two FLOP for one multiply-add."""
        return sum(step.flops for step in self.steps)

    @property
    def bytes(self) -> int:
        """Bytes moved to and from memory."""
        return self.itemsize * sum(step.elements for step in self.steps)

    def seconds(
        self, device: Device, dtype: torch.dtype | str, *, warm: bool = False
    ) -> float | None:
        """Ideal time: the sum over steps of max(FLOP / peak, bytes / bandwidth).

        Args:
            device: its peak and bandwidth; None is returned where it does not know them.
            dtype: which peak counts.
            warm: operands come from the cache, where the device knows that bandwidth.
        """
        peak = device.peak(dtype)
        bandwidth = device.cache_bandwidth if warm and device.cache_bandwidth else device.bandwidth
        if peak is None or bandwidth is None:
            return None
        return sum(
            max(step.flops / peak, self.itemsize * step.elements / bandwidth) for step in self.steps
        )


def break_even_rank(N: int, K: int) -> float:
    """Rank above which two factors cost more than the dense weight: NK / (N + K)."""
    return N * K / (N + K) if N + K else 0.0


def forward_flop(M: int, N: int, K: int, rank: int) -> int:
    """FLOP of the two products of a low-rank layer, 2 M r (K + N)."""
    return 2 * M * rank * (K + N)


def backward_flop(
    M: int, N: int, K: int, rank: int, *, dx: bool = True, du: bool = True, dv: bool = True
) -> int:
    """FLOP of the products that give these gradients; dx and dv share dH = dy @ u[:, :r].

    2 M r (N [dH] + K [dx] + N [du] + K [dv])
    """
    return 2 * M * rank * (N * ((dx or dv) + du) + K * (dx + dv))


def count(
    form: Form,
    layers: Sequence[Size],
    itemsize: int,
    mode: Mode = "forward",
    *,
    shared_x: bool = True,
) -> Cost:
    """FLOP and bytes of one call, for one layer or a group.

    forward, per layer: dense 2MKN; low rank 2Mr(K + N). "two matmuls" writes H and reads it back;
    "fused" is one step that never does, and in a group reads a shared x once. Bias and residual
    are counted, the activation is not.

    backward, with every gradient asked for. dense: dx, dW and a pass over dy for dbias.
    "two matmuls": dH, dx, du, dv and that pass, and for a shared x one more pass per extra layer
    that adds its dx. "fused": one launch for dx that also writes dH, one for du, dv and dbias; the
    forward of "training" then writes H.

    Args:
        form: "dense", "two matmuls" or "fused".
        layers: one size per layer of the group.
        itemsize: bytes per element.
        mode: "forward", "backward", or "training" (both).
        shared_x: the layers read one x.

    Raises:
        ValueError: an unknown form or mode.
    """
    if form not in ("dense", "two matmuls", "fused"):
        raise ValueError(f"count: form: expected dense, two matmuls or fused, got {form!r}")
    if mode not in ("forward", "backward", "training"):
        raise ValueError(f"count: mode: expected forward, backward or training, got {mode!r}")
    steps: list[Step] = []
    if mode != "backward":
        steps += _FORWARD[form](layers, shared_x, mode == "training")
    if mode != "forward":
        steps += _BACKWARD[form](layers, shared_x)
    return Cost(tuple(steps), itemsize)


def _matmul(m: int, n: int, k: int, extra: int = 0) -> Step:
    """(m, k) @ (k, n): both operands read, the result written."""
    return Step(2 * m * n * k, m * k + k * n + m * n + extra)


def _bias(s: Size) -> int:
    return s.N if s.bias else 0


def _added(s: Size) -> int:
    return _bias(s) + (s.M * s.N if s.residual else 0)


def _x_elements(layers: Sequence[Size], shared_x: bool) -> int:
    read = [s.M * s.K for s in layers if s.rank]
    return max(read, default=0) if shared_x else sum(read)


def _dense_forward(layers: Sequence[Size], shared_x: bool, save_h: bool) -> list[Step]:
    return [_matmul(s.M, s.N, s.K, _added(s)) for s in layers]


def _two_forward(layers: Sequence[Size], shared_x: bool, save_h: bool) -> list[Step]:
    pairs = ((_matmul(s.M, s.rank, s.K), _matmul(s.M, s.N, s.rank, _added(s))) for s in layers)
    return [step for pair in pairs for step in pair]


def _fused_forward(layers: Sequence[Size], shared_x: bool, save_h: bool) -> list[Step]:
    elements = _x_elements(layers, shared_x)
    for s in layers:
        elements += s.rank * (s.K + s.N) + s.M * s.N + _added(s) + (s.M * s.rank if save_h else 0)
    return [Step(sum(forward_flop(s.M, s.N, s.K, s.rank) for s in layers), elements)]


def _bias_gradient(s: Size) -> list[Step]:
    return [Step(s.M * s.N, s.M * s.N + s.N)] if s.bias else []


def _dx_sums(layers: Sequence[Size], shared_x: bool) -> list[Step]:
    """Autograd adds the dx of each further layer to the first: two reads and a write."""
    extra = layers[1:] if shared_x else ()
    return [Step(s.M * s.K, 3 * s.M * s.K) for s in extra]


def _dense_backward(layers: Sequence[Size], shared_x: bool) -> list[Step]:
    steps: list[Step] = []
    for s in layers:
        steps += [_matmul(s.M, s.K, s.N), _matmul(s.N, s.K, s.M), *_bias_gradient(s)]
    return steps + _dx_sums(layers, shared_x)


def _two_backward(layers: Sequence[Size], shared_x: bool) -> list[Step]:
    steps: list[Step] = []
    for s in layers:
        steps += [_matmul(s.M, s.rank, s.N), _matmul(s.M, s.K, s.rank)]
        steps += [_matmul(s.N, s.rank, s.M), _matmul(s.rank, s.K, s.M), *_bias_gradient(s)]
    return steps + _dx_sums(layers, shared_x)


def _fused_backward(layers: Sequence[Size], shared_x: bool) -> list[Step]:
    x = _x_elements(layers, shared_x)
    # dx of a shared input is one output, whatever the number of layers.
    per_launch = sum(s.M * s.N + s.rank * (s.K + s.N) for s in layers)
    hidden = sum(s.M * s.rank for s in layers)
    # Half of the products make dH and dx, the other half du and dv.
    flops = sum(backward_flop(s.M, s.N, s.K, s.rank) for s in layers) // 2
    sums = sum(s.M * s.N for s in layers if s.bias)
    bias = sum(_bias(s) for s in layers)
    return [
        Step(flops, per_launch + hidden + x),
        Step(flops + sums, per_launch + 2 * hidden + x + bias),
    ]


_FORWARD = {"dense": _dense_forward, "two matmuls": _two_forward, "fused": _fused_forward}
_BACKWARD = {"dense": _dense_backward, "two matmuls": _two_backward, "fused": _fused_backward}
