"""A group served layer by layer, for backends that have no grouped kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from maestro_kernels.backends import Backend

Grads = list[Tensor | None]


def grouped_forward(
    backend: Backend,
    xs: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    ranks: Sequence[int] | Tensor,
    activations: Sequence[str | None],
    *,
    save_h: bool,
    strategy: str,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The layers of a group one after the other."""
    pairs = [
        backend.forward(
            xs[0 if len(xs) == 1 else i],
            us[i],
            vs[i],
            biases[i],
            ranks[i],
            activations[i],
            save_h=save_h,
            strategy=strategy,
        )
        for i in range(len(us))
    ]
    return [y for y, _ in pairs], [h for _, h in pairs]


def grouped_backward(
    backend: Backend,
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    hs: Sequence[Tensor | None],
    ys: Sequence[Tensor | None],
    ranks: Sequence[int] | Tensor,
    activations: Sequence[str | None],
    *,
    needs: tuple[bool, bool, bool, bool],
    strategy: str,
) -> tuple[Grads, Grads, Grads, Grads]:
    """Gradients of the layers one after the other; a shared x gets the sum."""
    dxs: list[Tensor | None] = [None] * len(xs)
    parameter_grads = []
    for i in range(len(us)):
        i_x = 0 if len(xs) == 1 else i
        dx, *rest = backend.backward(
            dys[i],
            xs[i_x],
            us[i],
            vs[i],
            biases[i],
            hs[i],
            ys[i],
            ranks[i],
            activations[i],
            needs=(*needs[:3], needs[3] and biases[i] is not None),
            strategy=strategy,
        )
        parameter_grads.append(rest)
        previous = dxs[i_x]
        dxs[i_x] = dx if previous is None or dx is None else previous + dx
    dus, dvs, dbiases = (list(column) for column in zip(*parameter_grads, strict=True))
    return dxs, dus, dvs, dbiases
