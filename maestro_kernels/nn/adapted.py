"""A layer with a low-rank adapter beside it, as factors of their own."""

from __future__ import annotations

from torch import Tensor, nn

from maestro_kernels.nn.linear import LoDLinear


class Adapted(nn.Module):
    """y = base(x) + scale · x vᵀ uᵀ, the second product and both additions in one call.

    Attributes:
        base: the layer as it was.
        factors: LoDLinear with u = B (N, R) and v = A (R, K), without a bias.
        scale: as PEFT has it, alpha / R mostly.
    """

    def __init__(self, base: nn.Module, factors: LoDLinear, scale: float) -> None:
        super().__init__()
        self.base, self.factors, self.scale = base, factors, scale

    def forward(self, x: Tensor) -> Tensor:
        """Y (..., N) for x (..., K)."""
        return self.factors(x, residual=self.base(x), scale=self.scale)

    @property
    def weight(self) -> Tensor:
        """That of the layer as it was: models ask it for its dtype and device."""
        return self.base.weight  # type: ignore[return-value]

    def extra_repr(self) -> str:  # noqa: D102
        return f"scale={self.scale}"
