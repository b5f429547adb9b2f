"""What the tests of the two-phase kernel share: guarded allocations, layers, expected values."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from triton_support import DEVICE

from maestro_kernels.backends.reference import lod_linear_ref
from maestro_kernels.testing import assert_accurate, make_inputs, poison

GUARD = 64
GARBAGE = 1e4  # what the factors hold beyond the rank: finite, and visible wherever it leaks


class Allocations(list):
    """Buffers handed out during a test, each between bands that nothing may write to."""

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: object) -> Tensor:
        count = torch.Size(shape).numel()
        buffer = poison(_EMPTY(count + 2 * GUARD, dtype=dtype, device=device))
        for band in (buffer[:GUARD], buffer[-GUARD:]):
            band.fill_(7)
        self.append(buffer)
        return buffer[GUARD : GUARD + count].view(shape)

    def check(self) -> None:
        for buffer in self:
            assert (buffer[:GUARD] == 7).all()
            assert (buffer[-GUARD:] == 7).all()


_EMPTY, _NEW_EMPTY = torch.empty, torch.Tensor.new_empty  # torch itself calls them too


@pytest.fixture(autouse=True)
def allocations(monkeypatch):
    """Whatever a launcher allocates starts as NaN; writes out of bounds fail the test."""
    taken = Allocations()

    def new_empty(self, *shape, **options):
        if options or not all(isinstance(size, int) for size in shape):
            return _NEW_EMPTY(self, *shape, **options)
        return taken.take(shape, self.dtype, self.device)

    def empty(*shape, **options):
        if set(options) != {"dtype", "device"} or not all(isinstance(size, int) for size in shape):
            return _EMPTY(*shape, **options)
        return taken.take(shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty", empty)
    yield taken
    taken.check()


@dataclass
class Layer:
    """One layer, its active rank and what it should compute."""

    x: Tensor
    u: Tensor
    v: Tensor
    bias: Tensor | None
    rank: int
    activation: str | None = None

    @classmethod
    def make(cls, M, N, K, R, rank, dtype, *, bias=True, activation=None, seed=0, x=None):
        drawn, u, v, b = make_inputs(M, N, K, R, dtype=dtype, bias=bias, seed=seed, device=DEVICE)
        u[:, rank:] = GARBAGE
        v[rank:] = GARBAGE
        return cls(drawn if x is None else x, u, v, b, rank, activation)

    def check(self, y: Tensor, h: Tensor | None, *, tensor_rank: bool = False) -> None:
        """Hold y and H against float64."""
        wide = [None if t is None else t.double() for t in (self.x, self.u, self.v, self.bias)]
        options = {"rank": self.rank, "activation": self.activation}
        two = lod_linear_ref(self.x, self.u, self.v, self.bias, **options)
        assert_accurate("y", y, two, lod_linear_ref(*wide, **options))
        assert y.dtype == self.x.dtype
        if h is not None:
            v = self.v[: self.rank]
            self.check_h(h, self.x @ v.T, wide[0] @ v.double().T, tensor_rank)

    def check_dx(self, dx: Tensor, dh: Tensor, *, tensor_rank: bool = False) -> None:
        """Hold dx and dH against float64; `x` plays dy here, so it is (M, N)."""
        u, v = self.u[:, : self.rank], self.v[: self.rank]
        exact = self.x.double() @ u.double()
        assert_accurate("dx", dx, (self.x @ u) @ v, exact @ v.double())
        assert dx.dtype == self.x.dtype
        self.check_h(dh, self.x @ u, exact, tensor_rank)

    def check_h(self, h: Tensor, torch_h: Tensor, exact: Tensor, tensor_rank: bool) -> None:
        """H is (M, r), or (M, R) and zero beyond r for a tensor rank; rows start on 16 bytes."""
        width = self.v.shape[0] if tensor_rank else self.rank
        assert h.shape == (self.x.shape[0], width)
        assert h.stride(0) % 8 == 0
        assert_accurate("h", h[:, : self.rank], torch_h, exact)
        assert (h[:, self.rank :] == 0).all()


def rank_tensor(*ranks: int) -> Tensor:
    """Ranks as an int32 tensor (n,)."""
    return torch.tensor(ranks, dtype=torch.int32, device=DEVICE)
