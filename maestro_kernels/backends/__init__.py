"""Families of kernels, each a module with the functions of `Backend`; dispatch.py chooses.

Inputs have been validated, every x is (M, K), every rank an int or all of them one int32 tensor,
and neither M, N, K nor an int rank is zero unless the plan says `degenerate` (matmul serves then).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from maestro_kernels.call import Call, Grads, InputGrads, Needs
    from maestro_kernels.problem import LoDProblem

# Families that serve some calls faster than torch's matmuls: a new one is a module and a name here.
KERNELS = ("triton", "native")
# What `backend=` may name; the first two serve every call.
FAMILIES = ("reference", "matmul", *KERNELS)


class Backend(Protocol):
    """What every family defines."""

    def unsupported(self, problem: LoDProblem) -> str | None:
        """Why this backend cannot serve the problem, or None."""

    def forward(
        self, call: Call, *, save_h: bool, strategy: str
    ) -> tuple[list[Tensor], Sequence[Tensor | None]]:
        """(ys, hs): y (M, N); H (M, r), or (M, R) zero beyond r for tensor ranks; or Nones.

        Where a norm follows it, H is what it was before: x @ v[:r].T, not scaled.
        """

    def input_grads(
        self,
        call: Call,
        dys: Sequence[Tensor],
        hs: Sequence[Tensor | None],
        ys: Sequence[Tensor | None],
        *,
        needs: Needs,
        strategy: str,
    ) -> InputGrads:
        """(dxs, dnorms, dzs, hs, dhs), None where `needs` does not ask; a shared x gets one sum.

        `hs` and `ys` hold what the forward kept, None where it is to be computed again. The last
        three are for `weight_grads`, of this family or another: hs is what u was multiplied with,
        so normalised where there is a norm. A norm has its gradient whatever `needs` says.
        """

    def weight_grads(
        self,
        call: Call,
        dzs: Sequence[Tensor],
        hs: Sequence[Tensor | None],
        dhs: Sequence[Tensor | None],
        *,
        needs: Needs,
        strategy: str,
    ) -> tuple[Grads, Grads, Grads]:
        """(dus, dvs, dbiases), None where `needs` does not ask."""


class Kernels(Backend, Protocol):
    """What a family of KERNELS defines beside."""

    # Device type -> names of its strategies there.
    STRATEGIES: dict[str, tuple[str, ...]]

    def unsupported_group(self, problems: Sequence[LoDProblem]) -> str | None:
        """Why no one launch serves the layers, each of them servable, or None."""

    def choose_strategy(self, problems: Sequence[LoDProblem]) -> tuple[str, str]:
        """(strategy, reason) for layers that it serves."""

    def takes(self, strategy: str, problems: Sequence[LoDProblem]) -> bool:
        """Whether a strategy can run them."""

    def quick(self, strategy: str) -> Callable[..., Tensor | None]:
        """(x, u, v, bias, int rank, activation) -> y of one layer on a GPU, without gradients.

        Asked for calls that a plan of their shapes, devices and dtype of x serves. It returns None,
        or raises a RuntimeError, where the rest of the call is not what was validated before.
        """

    # A family whose kernels are compiled when they first run says COMPILES = True.
