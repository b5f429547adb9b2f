"""Backends: each one a module with the functions below; dispatch.py decides which one runs.

Inputs have been validated, x is (M, K) and neither M, N, K nor an int rank is zero unless the plan
says `degenerate` (then matmul serves). `rank` is an int or a 0-d int32 tensor on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from maestro_kernels.problem import LoDProblem


class Backend(Protocol):
    """What a backend module must define; a grouped form is optional (see loop.py)."""

    def unsupported(self, problem: LoDProblem) -> str | None:
        """Why this backend cannot serve the problem, or None."""

    def forward(
        self,
        x: Tensor,
        u: Tensor,
        v: Tensor,
        bias: Tensor | None,
        rank: int | Tensor,
        activation: str | None,
        *,
        save_h: bool,
        strategy: str,
    ) -> tuple[Tensor, Tensor | None]:
        """(y, H): y (M, N); H (M, r), or (M, R) zero beyond r for a tensor rank, or None."""

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        u: Tensor,
        v: Tensor,
        bias: Tensor | None,
        h: Tensor | None,
        y: Tensor | None,
        rank: int | Tensor,
        activation: str | None,
        *,
        needs: tuple[bool, bool, bool, bool],
        strategy: str,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """(dx, du, dv, dbias); None where `needs` does not ask."""
