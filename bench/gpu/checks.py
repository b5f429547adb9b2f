"""What only a GPU can show: each strategy against float64, under capture, on streams, repeated.

Inputs are drawn and results are judged on the device. tests/test_gpu.py runs the same checks under
pytest, tests/bench/test_gpu_checks.py on a CPU through the stub.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import maestro_kernels as mk
from bench.gpu import suite
from bench.gpu.device import Device, Skip
from bench.gpu.force import Runner
from bench.gpu.items import Item
from bench.gpu.plan import Stage
from maestro_kernels.backends.reference import lod_linear_ref
from maestro_kernels.measure.cases import Case
from maestro_kernels.measure.providers import make_case_inputs
from maestro_kernels.testing import assert_accurate, make_inputs, poison, rounding_errors

__all__ = ["items"]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
_REPEATS = 1000
# M, N, K, R, rank, activation: each width of H that a row of y rests on, odd ranks, rows and tiles
# that do not divide.
_MANY_ROWS = (
    (8192, 4096, 4096, 256, 256, None),
    (8192, 4096, 4096, 256, 201, "gelu"),
    (5000, 1000, 776, 192, 127, "silu"),
    (40000, 2048, 1024, 128, 128, "relu"),
    (4999, 520, 4096, 64, 33, "gelu_tanh"),
    (4097, 64, 64, 64, 1, None),
)
# M, N, K, R: sizes off every grid, and every M around which a kernel changes; the first few of them
# under the sanitizer too.
_SANITIZED = 8
_SMALL = (
    *((1, 64, 96, 16), (17, 136, 72, 24), (33, 65, 127, 31), (64, 1000, 776, 48)),
    *((3, 1, 8, 8), (5, 131, 777, 16), (65, 77, 64, 40), (200, 520, 1032, 136)),
    *((M, 1000, 776, 48) for M in (1, 2, 16, 17, 33)),
    *((64, 33, 1, 24), (1, 9, 4097, 40), (1000, 1000, 256, 64)),
)


def items(device: Device, stage: Stage | None, family: str) -> Iterator[Item]:
    """The checks of a family."""
    checks = Checks(device, family)
    yield from checks.items()


class Checks:
    """The checks of one strategy, or of `auto`.

    Args:
        device: where.
        family: as Runner takes it.
    """

    def __init__(self, device: Device, family: str) -> None:
        self._device, self._run = device, Runner(device, family)
        self._is_auto = family == "auto"

    def items(self) -> Iterator[Item]:
        """Decode, 4096 x 4096 and groups first, what takes long last."""
        first, rest = _accuracy_cases()
        for case in first:
            yield Item(case.id, partial(self.case, case))
        yield Item("groups of different n and r", self.groups, small=True)
        shapes = [s for s in _SMALL if not self._device.is_stub or s[0] * s[1] * s[2] <= 1 << 17]
        for k, dtype in itertools.product(range(len(shapes)), (BF16, F16, F32)):
            name = "M {} N {} K {} R {}".format(*shapes[k])
            check = partial(self.small, k, *shapes[k], dtype)
            yield Item(f"{name} {str(dtype).removeprefix('torch.')}", check, small=k < _SANITIZED)
        for case in rest:
            yield Item(case.id, partial(self.case, case))
        yield Item("beyond the rank", self.beyond_the_rank, small=True)
        yield Item("rank on the device", self.rank_on_the_device, small=True)
        for dtype in (BF16, F16):
            name = str(dtype).removeprefix("torch.")
            yield Item(f"many rows {name}", partial(self.many_rows, dtype))
        for M in (1, 16, 256, 8192):
            yield Item(f"captured, M {M}", partial(self.captured, M))
            yield Item(f"two streams, M {M}", partial(self.two_streams, M))
        for M in (8, 130):
            yield Item(f"gradients, M {M}", partial(self.gradients, M), small=M == 8)
        yield Item("gradients of a group", self.gradients_of_a_group)
        yield Item("residual and scale", self.residual, small=True)
        yield Item("norm between the factors", self.norm, small=True)
        for M in (1, 64, 200, 2048):
            yield Item(f"{_REPEATS} repeats, M {M}", partial(self.repeats, M))
        for precision in ("highest", "high"):
            yield Item(f"float32, {precision}", partial(self.float32, precision))
        if self._is_auto:
            yield Item("compiled", partial(self.compiled, "default"))
            yield Item("compiled, reduce-overhead", partial(self.compiled, "reduce-overhead"))
        yield Item("offsets beyond 2^31", self.offsets)

    # --- one layer ---------------------------------------------------------------------------

    def case(self, case: Case) -> None:
        """A call of the suite, at the rank of the case."""
        case = self._device.case(case)
        inputs = make_case_inputs(case, self._device.name)
        ys = self._run(inputs.x, inputs.us, inputs.vs, inputs.biases, inputs.ranks)
        layers = zip(ys, inputs.us, inputs.vs, inputs.biases, inputs.ranks, strict=True)
        for y, u, v, b, r in layers:
            self._gate(y, inputs.x, u, v, b, r)

    def small(self, k: int, M: int, N: int, K: int, R: int, dtype: torch.dtype) -> dict[str, int]:
        """One size at ranks 0, 1, odd, R - 1, R; the activation is that of its turn."""
        x, u, v, b = self._layer(M, N, K, R, dtype, bias=k % 4 != 2)
        activation = (None, "silu", "gelu", "relu")[k % 4]
        ran, reason = 0, ""
        for rank in {0, 1, R // 2 | 1, R - 1, R}:
            try:
                (y,) = self._run(x, [u], [v], [b], [rank], [activation])
            except Skip as why:
                reason = str(why)
                continue
            self._gate(y, x, u, v, b, rank, activation)
            ran += 1
        return _told(ran, reason)

    def many_rows(self, dtype: torch.dtype) -> dict[str, int]:
        """As many rows as fill a chip, NaN beyond the rank, which is an int or a tensor."""
        ran, reason = 0, ""
        for M, N, K, R, rank, activation in _MANY_ROWS:
            x, u, v, b = self._layer(*self._device.sizes(M, N, K, R), dtype)
            rank = max(1, rank * u.shape[1] // R)
            poison(u[:, rank:])
            poison(v[rank:])
            for given in ([rank], torch.tensor(rank, dtype=torch.int32, device=x.device)):
                try:
                    (y,) = self._run(x, [u], [v], [b], given, [activation])
                except Skip as why:
                    reason = str(why)
                    continue
                self._gate(y, x, u, v, b, rank, activation)
                (again,) = self._run(x, [u], [v], [b], given, [activation])
                assert torch.equal(self._device.output(again), y), "another call gives other bits"
                ran += 1
        return _told(ran, reason)

    def beyond_the_rank(self) -> dict[str, int]:
        """Not even a NaN beyond the rank changes a bit of y."""
        ran, reason = 0, ""
        for M in (5, 130, 9000):
            x, u, v, b = self._layer(*self._device.sizes(M, 256, 512, 64), BF16)
            rank = max(1, u.shape[1] * 19 // 64)
            try:
                (expected,) = self._run(x, [u], [v], [b], [rank])
            except Skip as why:
                reason = str(why)
                continue
            ran += 1
            poison(u[:, rank:])
            poison(v[rank:])
            (y,) = self._run(x, [u], [v], [b], [rank])
            assert torch.equal(self._device.output(y), expected), f"M {M}"
        return _told(ran, reason)

    def rank_on_the_device(self) -> dict[str, int]:
        """A rank in a tensor is clamped to 0..R, and the host never reads it."""
        ran, reason = 0, ""
        for M in (5, 130, 9000):
            x, u, v, b = self._layer(*self._device.sizes(M, 264, 512, 64), BF16)
            R = u.shape[1]
            for value in (-5, 0, 1, R // 2 | 1, R, 1000):
                rank = torch.tensor(value, dtype=torch.int32, device=self._device.name)
                try:
                    (y,) = self._run(x, [u], [v], [b], rank)
                except Skip as why:
                    reason = str(why)
                    break
                self._gate(y, x, u, v, b, min(max(value, 0), R))
                ran += 1
        return _told(ran, reason)

    def captured(self, M: int) -> None:
        """A captured graph follows the tensor that holds its rank."""
        x, u, v, b = self._layer(*self._device.sizes(M, 1024, 1024, 128), BF16)
        R = u.shape[1]
        rank = torch.tensor(R, dtype=torch.int32, device=self._device.name)
        call = self._run.bound(x, [u], [v], [b], rank)
        replay, (y,) = self._device.graph(call)
        for r in (R, 1, R // 2, 0, R - 1, R // 4 | 1):
            rank.fill_(r)
            poison(y)
            replay()
            self._gate(y, x, u, v, b, r)

    def two_streams(self, M: int) -> None:
        """Launches on two streams neither block nor disturb each other."""
        sizes = self._device.sizes(M, 2048, 2048, 256)
        layers = [self._layer(*sizes, BF16, seed=s) for s in range(2)]
        calls = [self._run.bound(x, [u], [v], [b], [u.shape[1]]) for x, u, v, b in layers]
        alone = [call()[0].clone() for call in calls]
        several = [partial(lambda call: [call()[0] for _ in range(4)], call) for call in calls]
        for _ in range(self._times(20)):
            for expected, ys in zip(alone, self._device.on_streams(several), strict=True):
                assert all(torch.equal(self._device.output(y), expected) for y in ys)

    def repeats(self, M: int) -> None:
        """Repeated calls give the same bits, in whatever order blocks arrive."""
        x, u, v, b = self._layer(*self._device.sizes(M, 512, 2048, 64), BF16)
        call = self._run.bound(x, [u], [v], [b], [u.shape[1]])
        first = call()[0].clone()
        differing = torch.zeros((), dtype=torch.int64, device=self._device.name)
        for _ in range(self._times(_REPEATS)):
            differing += (self._device.output(call()[0]) != first).sum()
        assert int(differing) == 0, f"{int(differing)} elements differ"

    def gradients(self, M: int) -> None:
        """Every gradient at a rank below R, with zeros beyond it."""
        for activation in (None, "gelu"):
            x, u, v, b = self._layer(*self._device.sizes(M, 256, 512, 64), BF16, requires_grad=True)
            r = u.shape[1] * 5 // 8
            (y,) = self._run(x, [u], [v], [b], [r], [activation])
            self._gate_gradients([y], x, [u], [v], [b], [r], [activation])

    def residual(self) -> None:
        """A matrix added, its rows further apart than those of y, and H scaled; all gradients."""
        self._beside(has_norm=False)

    def norm(self) -> None:
        """H normalised between the products, beside a residual and a scale; all gradients."""
        self._beside(has_norm=True)

    def _beside(self, *, has_norm: bool) -> None:
        for M, activation in ((3, None), (130, None), (130, "gelu")):
            sizes = self._device.sizes(M, 256, 512, 64)
            x, u, v, b = self._layer(*sizes, BF16, requires_grad=True)
            wide = torch.randn(x.shape[0], u.shape[0] + 8, dtype=BF16, device=x.device)
            residual = wide[:, : u.shape[0]].requires_grad_()
            added: dict[str, Any] = {"residual": residual, "scale": -0.5}
            leaves = [x, u, v, b, residual]
            if has_norm:
                leaves.append(torch.rand(u.shape[1], dtype=BF16, device=x.device).requires_grad_())
                added |= {"norm": leaves[-1], "norm_eps": 1e-3}
            r = u.shape[1] - 3
            (y,) = self._run(x, [u], [v], [b], [r], [activation], **added)
            dy = torch.randn_like(y)

            def found(y: Tensor, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
                return [y, *torch.autograd.grad(y, leaves, dy)]

            def plain(ts: list[Tensor], activation: str | None = activation, r: int = r) -> Tensor:
                options: dict[str, Any] = {"rank": r, "activation": activation, "scale": -0.5}
                if has_norm:
                    options |= {"norm": ts[5], "norm_eps": 1e-3}
                return lod_linear_ref(*ts[:4], residual=ts[4], **options)

            doubles = [t.detach().double().requires_grad_() for t in leaves]
            all_three = (
                found(y, leaves, dy),
                found(plain(leaves), leaves, dy),
                found(plain(doubles), doubles, dy.double()),
            )
            names = ("y", "dx", "du", "dv", "dbias", "dresidual", "dnorm")
            for name, got, other, exact in zip(names, *all_three, strict=False):
                assert_accurate(f"{name}, M {M}", self._device.output(got), other, exact)

    def float32(self, precision: str) -> dict[str, int]:
        """IEEE float32, and TF32 where that is allowed."""
        ran, reason = 0, ""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            for M in (1, 64, 300):
                x, u, v, b = self._layer(*self._device.sizes(M, 1000, 776, 48), F32)
                try:
                    (y,) = self._run(x, [u], [v], [b], [u.shape[1] - 1])
                except Skip as why:
                    reason = str(why)
                    continue
                self._gate(y, x, u, v, b, u.shape[1] - 1)
                ran += 1
        finally:
            torch.set_float32_matmul_precision(before)
        return _told(ran, reason)

    def offsets(self) -> None:
        """Elements of y that lie more than 2^31 elements apart."""
        M, N, K, R = 530_000, 4096, 64, 16
        if self._device.free_bytes() < 12 << 30:
            raise Skip("needs 12 GiB of free memory")
        x, u, v, b = self._layer(M, N, K, R, BF16)
        (y,) = self._run(x, [u], [v], [b], [R])
        assert y.numel() > 1 << 31
        for rows in (slice(0, 64), slice(M // 2, M // 2 + 64), slice(M - 64, M)):
            self._gate(y[rows], x[rows], u, v, b, R)

    def compiled(self, mode: str) -> None:
        """torch.compile, also where it captures and replays graphs of its own."""
        if self._device.is_stub:
            raise Skip("the stub has nothing that torch.compile could capture")
        x, u, v, b = self._layer(32, 512, 512, 64, BF16)
        call = torch.compile(
            lambda x: mk.lod_linear(x, u, v, b, rank=40), fullgraph=True, mode=mode
        )
        for _ in range(4):
            self._gate(call(x).clone(), x, u, v, b, 40)

    # --- groups ------------------------------------------------------------------------------

    def groups(self) -> None:
        """Layers of different N and R in one launch, ranks 0 and R among them, int and tensor."""
        for M in (4, 130):
            x, us, vs, bs = self._group(M)
            ranks = (us[0].shape[1], 0, us[2].shape[1] * 3 // 5)
            activations = ["silu", None, "gelu"]
            on_device = torch.tensor(ranks, dtype=torch.int32, device=self._device.name)
            for given in (ranks, on_device):
                ys = self._run(x, us, vs, bs, given, activations)
                for y, u, v, b, r, a in zip(ys, us, vs, bs, ranks, activations, strict=True):
                    self._gate(y, x, u, v, b, r, a)

    def gradients_of_a_group(self) -> None:
        """The same for gradients; that of the shared x is one sum."""
        x, us, vs, bs = self._group(128, requires_grad=True)
        ranks = [max(1, u.shape[1] * k // 4) for u, k in zip(us, (4, 2, 3), strict=True)]
        ys = self._run(x, us, vs, bs, ranks)
        self._gate_gradients(ys, x, us, vs, bs, ranks, [None] * 3)

    # --- inputs and judgement ----------------------------------------------------------------

    def _times(self, n: int) -> int:
        return 2 if self._device.is_stub else n

    def _layer(
        self, M: int, N: int, K: int, R: int, dtype: torch.dtype, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        return make_inputs(M, N, K, R, dtype=dtype, device=self._device.name, **options)

    def _group(self, M: int, **options: Any) -> tuple[Tensor, list[Tensor], list[Tensor], Any]:
        sizes = ((512, 64), (136, 24), (1000, 128))
        if self._device.is_stub:
            M, sizes = 1 + M.bit_length(), ((24, 16), (13, 8), (40, 24))
        layers = [
            self._layer(M, N, 48 if self._device.is_stub else 384, R, BF16, seed=i, **options)
            for i, (N, R) in enumerate(sizes)
        ]
        us, vs, bs = ([layer[i] for layer in layers] for i in (1, 2, 3))
        return layers[0][0], us, vs, bs

    def _gate(
        self,
        y: Tensor,
        x: Tensor,
        u: Tensor,
        v: Tensor,
        b: Tensor | None,
        r: int,
        activation: str | None = None,
    ) -> None:
        bias64 = None if b is None else b.double()
        u, v = u[:, :r], v[:r]  # what lies beyond may be anything
        same = lod_linear_ref(x, u, v, b, activation=activation)
        exact = lod_linear_ref(x.double(), u.double(), v.double(), bias64, activation=activation)
        # Asked for only where the library's own error is not measure enough.
        rounding = partial(self._rounding, x, u, v, b, activation)
        assert_accurate(f"y, rank {r}", self._device.output(y), same, exact, rounding)

    @staticmethod
    def _rounding(
        x: Tensor, u: Tensor, v: Tensor, b: Tensor | None, activation: str | None
    ) -> Tensor:
        return rounding_errors(x, u, v, activation=activation, bias=b)["y"]

    def _gate_gradients(
        self,
        ys: Sequence[Tensor],
        x: Tensor,
        us: Sequence[Tensor],
        vs: Sequence[Tensor],
        bs: Sequence[Tensor],
        ranks: Sequence[int],
        activations: Sequence[str | None],
    ) -> None:
        leaves = [x, *us, *vs, *bs]
        dys = [torch.randn_like(y) for y in ys]
        got = torch.autograd.grad(ys, leaves, dys)
        n = len(us)

        def plain(tensors: Sequence[Tensor]) -> list[Tensor]:
            x, us, vs, bs = tensors[0], tensors[1:][:n], tensors[1 + n :][:n], tensors[1 + 2 * n :]
            layers = zip(us, vs, bs, ranks, activations, strict=True)
            return [lod_linear_ref(x, u, v, b, rank=r, activation=a) for u, v, b, r, a in layers]

        others = torch.autograd.grad(plain(leaves), leaves, dys)
        wide = [t.detach().double().requires_grad_() for t in leaves]
        exact = torch.autograd.grad(plain(wide), wide, [dy.double() for dy in dys])
        names = ["dx", *(f"d{what}[{i}]" for what in "uvb" for i in range(n))]
        for name, g, o, e in zip(names, got, others, exact, strict=True):
            assert_accurate(name, self._device.output(g), o, e)
        for u, v, r in zip(got[1 : 1 + n], got[1 + n : 1 + 2 * n], ranks, strict=True):
            assert not u[:, r:].any(), "du beyond the rank"
            assert not v[r:].any(), "dv beyond the rank"


def _accuracy_cases() -> tuple[list[Case], list[Case]]:
    """Key cases of the suite, and every fourth of the rest: each may take a compilation."""
    first = {case.id: case for case in suite.key()}
    return list(first.values()), [c for c in suite.cases()[::4] if c.id not in first]


def _told(ran: int, reason: str) -> dict[str, int]:
    """The result of a check of several calls, of which a strategy may take some."""
    if not ran:
        raise Skip(reason)
    return {"ran": ran}
