"""The calls that the acceptance run measures, most wanted first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from maestro_kernels.benchmark.cases import MODELS
from maestro_kernels.measure.cases import Case
from maestro_kernels.measure.cost import Mode

__all__ = ["SQUARE", "cases", "first_use", "key", "regime", "training"]

SQUARE = "Llama-2-7B o"
# 637 and 1592 leave 20 and 50 % of the weights of a 14336 x 4096 layer.
_OTHERS = {
    "Llama-3-8B up": (64, 256, 637, 1592, 127, 1024),
    "Llama-3-8B down": (64, 256, 637, 1592),
}
_GROUPS = ("Llama-3-8B q/k/v", "Llama-3-8B gate/up", "Llama-2-7B q/k/v", "Llama-2-7B gate/up")
_RANKS = (64, 256, 128, 512, 32, 1024, 127, 200, 16)
_LARGE = ("Llama-2-7B o", "Llama-3-8B up")


def _each(
    Ms: tuple[int, ...], ranks: tuple[int, ...], *names: str, mode: Mode = "forward"
) -> Iterator[Case]:
    for M, rank, name in itertools.product(Ms, ranks, names):
        yield MODELS[name].case(M, rank, dtype="bfloat16", mode=mode)


def cases() -> list[Case]:
    """Decode, 4096 x 4096 and groups first; then the same of other shapes; large M last."""
    found = [
        *_each((1, 16, 64), _RANKS[:4], SQUARE),
        *_each((1, 16), (64, 256), *_GROUPS[:2]),
        *_each((256, 1024, 4096), _RANKS[:2], SQUARE),
        *_each((4096,), (64, 256), *_GROUPS[:2]),
        *_each((8192, 16384), (64, 256), SQUARE),
        *_each((1, 16, 64), _RANKS[4:], SQUARE),
        *[c for name, ranks in _OTHERS.items() for c in _each((1, 16, 64), ranks, name)],
        *_each((1, 16, 4096), (64, 256), *_GROUPS[2:]),
        *_each((128, 256, 1024, 4096), _RANKS, SQUARE),
        *[c for name, ranks in _OTHERS.items() for c in _each((256, 1024, 4096), ranks, name)],
        *_each((8192, 16384, 32768), (64, 128, 256, 512), *_LARGE),
        *_each((8192,), (64, 256), *_GROUPS[:2]),
    ]
    return list({case.id: case for case in found}.values())


def key() -> list[Case]:
    """A dozen that stand for the rest where a case takes long."""
    return [
        *_each((1, 16, 64), (64, 256), SQUARE),
        *_each((1,), (256,), *_GROUPS[:2]),
        *_each((256, 1024, 4096), (64, 256), SQUARE),
        *_each((8192,), (128,), SQUARE),
        *_each((4096,), (256,), *_GROUPS[:2]),
    ]


def first_use() -> list[Case]:
    """What `auto` is held to without any table; one of a group, one of each regime."""
    return [c for c in key() if c.layers[0].rank != 64]


def training() -> list[Case]:
    """Forward and backward with every gradient."""
    return [*_each((4096, 1024, 8192), (256, 128), SQUARE, mode="training")]


def regime(M: int) -> str:
    """Where a call belongs, in the words of the summary."""
    return "M <= 64" if M <= 64 else "64 < M <= 4096" if M <= 4096 else "M > 4096"
