"""PivotedLinear: the [I; U] form of a factorised layer, for inference at one rank.

r rows of the output factor are turned into the identity, so r outputs are the hidden values
themselves: (N + K - r) r weights, fewer than the matrix and than the factors at every rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestro_kernels.backends.reference import ACTIVATIONS
from maestro_kernels.nn.factorize import merge
from maestro_kernels.nn.linear import LoDLinear, copied, dense_linear, trainable
from maestro_kernels.nn.weight import MergedWeight
from maestro_kernels.problem import check_choices

# Largest entry of U that is left alone. At 1 the search for pivots might not end; every swap above
# it multiplies the volume of the pivot rows by more than this, and the volume is bounded.
_BOUND = 1.05


class PivotedLinear(nn.Module):
    """y[order] = act([h, h @ u.T] + bias[order]) with h = x @ v.T, for one fixed rank r.

    It computes what a factorised layer of rank r computes. r outputs are copies of h, so it costs
    (N + K - r) r weights and multiply-adds per row of x, against r (N + K) of two factors and N K
    of a matrix: less than both for 0 < r < min(N, K). A rank is fixed: its prefixes are no
    approximations, so a smaller layer has to be made from the factors again.

    Attributes:
        u: (N - r, r), no entry above 1.05 in magnitude when made.
        v: (r, K).
        bias: (N,) or None.
        order: (N,) int32 buffer; output n is entry order[n] of [h, h @ u.T].
        activation: None, "relu", "gelu" (erf), "gelu_tanh" or "silu", applied after the bias.

    Source:
        FlexRank (arXiv 2602.02680), with pivot rows chosen by swaps as in Goreinov et al., "How to
        find a good submatrix", 2010: without pivots the solution loses all digits of bfloat16.
    """

    kind = "pivoted_linear"
    parts = frozenset({"u", "v", "bias", "order"})
    u: nn.Parameter
    v: nn.Parameter
    bias: nn.Parameter | None
    order: Tensor

    def __init__(
        self,
        u: Tensor,
        v: Tensor,
        order: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> None:
        """Take the tensors themselves; nothing is copied, `order` is not read."""
        super().__init__()
        fn = "PivotedLinear"
        check_choices(fn, activation, None)
        if v.dim() != 2:
            raise ValueError(f"{fn}: v: expected a matrix (r, K), got shape {tuple(v.shape)}")
        r = v.shape[0]
        if u.dim() != 2 or u.shape[1] != r:
            raise ValueError(
                f"{fn}: u: expected shape (N - {r}, {r}) to match v {tuple(v.shape)}, "
                f"got {tuple(u.shape)}"
            )
        N = u.shape[0] + r
        for name, value in (("order", order), ("bias", bias)):
            if value is not None and tuple(value.shape) != (N,):
                raise ValueError(f"{fn}: {name}: expected shape ({N},), got {tuple(value.shape)}")
        if order.dtype is not torch.int32:
            raise TypeError(f"{fn}: order: expected torch.int32, got {order.dtype}")
        self.in_features, self.out_features = v.shape[1], N
        self.activation = activation
        self.u, self.v = trainable(u, u), trainable(v, v)
        self.register_parameter("bias", None if bias is None else trainable(bias, bias))
        self.register_buffer("order", order)

    @classmethod
    def from_lod(cls, layer: LoDLinear) -> PivotedLinear:
        """The same function as `layer` at its active rank; shares nothing with it.

        Pivots are chosen and the system is solved in float64, then rounded once.

        Raises:
            TypeError: layer is no LoDLinear.
            ValueError: the factors are not finite.
        """
        fn = "PivotedLinear.from_lod"
        if not isinstance(layer, LoDLinear):
            raise TypeError(f"{fn}: layer: expected a LoDLinear, got {type(layer).__name__}")
        r = layer.rank
        u, v, order = pivoted_factors(layer.u[:, :r], layer.v[:r], fn=fn)
        bias = None if layer.bias is None else copied(layer.bias)
        made = cls(trainable(u, layer.u), trainable(v, layer.v), order, bias, layer.activation)
        return made.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Y (..., N) for x (..., K)."""
        h = F.linear(x, self.v)
        z = torch.cat((h, F.linear(h, self.u)), -1).index_select(-1, self.order)
        if self.bias is not None:
            # Autocast runs the products in half precision and would promote the sum.
            z = z + self.bias.to(z.dtype)
        y: Tensor = ACTIVATIONS[self.activation](z)
        return y

    @property
    def rank(self) -> int:
        """R, fixed."""
        return self.v.shape[0]

    @property
    def max_rank(self) -> int:
        """R: nothing beyond the rank is stored."""
        return self.v.shape[0]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:
        """The merged matrix (N, K), computed when its values are used; see LoDLayer.weight."""
        u, v, order = self.u, self.v, self.order

        def merged() -> Tensor:
            return torch.cat((v, u @ v)).index_select(0, order)

        if torch.compiler.is_compiling():
            return merged()
        requires_grad = torch.is_grad_enabled() and (u.requires_grad or v.requires_grad)
        return MergedWeight.of(merged, self.matrix_shape, v, requires_grad)

    def to_linear(self) -> nn.Linear:
        """An nn.Linear with the same function, rounded once.

        Raises:
            ValueError: the layer has an activation, which an nn.Linear has not.
        """
        dense = torch.cat((self.v.detach(), merge(self.u, self.v))).index_select(0, self.order)
        return dense_linear(self, trainable(dense, self.v))

    to_dense = to_linear

    def extra_repr(self) -> str:  # noqa: D102
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
            + (f", activation={self.activation}" if self.activation else "")
        )


def pivoted_factors(
    u: Tensor, v: Tensor, *, fn: str = "pivoted_factors"
) -> tuple[Tensor, Tensor, Tensor]:
    """(u', v', order) with [v; u' @ v'][order] = u @ v up to rounding and |u'| <= 1.05.

    The pivot rows are those of an orthonormal basis of u's columns, so the scale, the condition and
    even the rank of u do not matter: LU with partial pivoting starts, swaps of a pivot row with
    the row of the largest entry follow until the bound holds.

    Args:
        u: (N, r), r <= N, floating point.
        v: (r, K).
        fn: the public function that errors name.

    Returns:
        u' (N - r, r) and v' (r, K) in the dtype of u, order (N,) int32.

    Raises:
        ValueError: r > N, or values that are not finite.
    """
    N, r = u.shape
    if r > N:
        raise ValueError(f"{fn}: u: expected at most {N} columns for {N} rows, got {r}")
    for name, value in (("u", u), ("v", v)):
        if not bool(value.isfinite().all()):
            raise ValueError(f"{fn}: {name}: expected finite values, got NaN or infinity")
    wide = u.detach().double()
    basis = torch.linalg.qr(wide).Q
    pivots = _pivot_rows(basis)
    others = torch.ones(N, dtype=torch.bool, device=u.device)
    others[pivots] = False
    rest = others.nonzero()[:, 0]
    hat = torch.linalg.solve(basis[pivots], basis[rest], left=False)
    order = torch.empty(N, dtype=torch.int32, device=u.device)
    order[torch.cat((pivots, rest))] = torch.arange(N, dtype=torch.int32, device=u.device)
    tilde = wide[pivots] @ v.detach().double()
    return hat.to(u.dtype), tilde.to(u.dtype), order


def _pivot_rows(basis: Tensor) -> Tensor:
    """Rows G of an orthonormal (N, r) with |basis @ G^-1| <= 1.05, as indices in order."""
    N, r = basis.shape
    if r in (0, N):
        return torch.arange(r, device=basis.device)
    factors, swaps = torch.linalg.lu_factor(basis)
    permutation = torch.lu_unpack(factors, swaps, unpack_data=False)[0].argmax(0)
    rows = permutation[:r].clone()
    hat = torch.linalg.solve(basis[rows], basis, left=False)
    while True:
        flat = int(hat.abs().argmax())
        i, j = divmod(flat, r)
        pivot = hat[i, j].clone()
        if not abs(float(pivot)) > _BOUND:
            return rows.sort().values
        # Row i takes the place of the j-th pivot: a rank-one change of basis @ G^-1.
        change = hat[i].clone()
        change[j] -= 1
        hat.addr_(hat[:, j].clone(), change, alpha=-1 / float(pivot))
        rows[j] = i


def error_ratio(layer: LoDLinear, pivoted: PivotedLinear, x: Tensor) -> float:
    """Error of the pivoted form over that of two matmuls on the factors, both against float64.

    The larger one of the ratios of RMS and of maximum error; one rounding of the largest output (of
    the RMS output) is added to the denominator, so that exact results compare as equal. Layers in
    float64, for which nothing is exact, are compared as rounded to float32.

    Args:
        layer: the factors, at their active rank.
        pivoted: made from it.
        x: (..., K), inputs the layer meets, in its dtype.
    """
    r = layer.rank
    narrow = torch.float32 if x.dtype is torch.float64 else x.dtype
    with torch.no_grad():
        x = x.to(narrow)
        factors = layer.v[:r], layer.u[:, :r]
        exact = x.double() @ factors[0].double().mT @ factors[1].double().mT
        two = F.linear(F.linear(x, factors[0].to(narrow)), factors[1].to(narrow))
        h = F.linear(x, pivoted.v.to(narrow))
        y = torch.cat((h, F.linear(h, pivoted.u.to(narrow))), -1)
        ours = y.index_select(-1, pivoted.order)
    eps = torch.finfo(narrow).eps
    ratios = []
    for order, floor in ((float("inf"), eps), (2.0, eps / 2)):
        norms = [torch.linalg.vector_norm(t, order) for t in (ours - exact, two - exact, exact)]
        bound = float(norms[1] + floor * norms[2])
        ratios.append(float(norms[0]) / bound if bound else float(norms[0] > 0))
    return max(ratios)
