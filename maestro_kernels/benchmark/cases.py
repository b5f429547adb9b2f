"""Which calls are worth timing: layers of real models, at the sizes people run them.

A case is sizes and types only; its id is derived from them, so a label cannot contradict a shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from maestro_kernels.measure.cost import Cost, Form, Mode, Size, count

__all__ = ["MODELS", "SUITES", "Case", "Layer", "ModelLayer", "joined", "parse_shape", "suite"]


@dataclass(frozen=True)
class Layer:
    """One low-rank layer: u (N, R), v (R, K), of which `rank` components are active."""

    N: int
    K: int
    R: int
    rank: int

    def __post_init__(self) -> None:
        if min(self.N, self.K, self.R) < 1 or not 0 <= self.rank <= self.R:
            raise ValueError(
                f"Layer: N, K, R, rank: expected N, K, R >= 1 and 0 <= rank <= R, "
                f"got {(self.N, self.K, self.R, self.rank)}"
            )


@dataclass(frozen=True)
class Case:
    """One call to time: M rows through one layer, or through a group that reads one x.

    Attributes:
        source: model and layer the shape comes from, e.g. "Llama-3-8B gate/up".
        M: rows of x.
        layers: one entry for lod_linear, several for lod_linear_grouped; all have the same K.
        dtype: dtype name, e.g. "bfloat16".
        mode: "forward", or "training" for forward and backward with every gradient.
        bias: whether the layers add one.
    """

    source: str
    M: int
    layers: tuple[Layer, ...]
    dtype: str = "float32"
    mode: Mode = "forward"
    bias: bool = False

    def __post_init__(self) -> None:
        if self.M < 1 or not self.layers or len({layer.K for layer in self.layers}) != 1:
            raise ValueError(
                f"Case: M, layers: expected M >= 1 and layers of one K, got {self.M}, {self.layers}"
            )

    @property
    def op(self) -> str:
        """Public function that serves it."""
        return "lod_linear" if len(self.layers) == 1 else "lod_linear_grouped"

    @property
    def K(self) -> int:
        """in_features of every layer."""
        return self.layers[0].K

    @property
    def id(self) -> str:
        """Every value that tells this case from another, readable and without spaces."""
        N, R, rank = (
            joined([getattr(layer, name) for layer in self.layers]) for name in ("N", "R", "rank")
        )
        group = f"{len(self.layers)}x-" if len(self.layers) > 1 else ""
        tail = "-bias" if self.bias else ""
        return f"{group}M{self.M}-N{N}-K{self.K}-R{R}-r{rank}-{self.dtype}-{self.mode}{tail}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"Case: dtype: expected a torch dtype name, got {self.dtype!r}")
        return dtype

    @property
    def sizes(self) -> list[Size]:
        """One roofline size per layer."""
        return [Size(self.M, s.N, s.K, s.rank, self.bias) for s in self.layers]

    def cost(self, form: Form) -> Cost:
        """FLOP and bytes of the case in a form."""
        return count(form, self.sizes, self.torch_dtype.itemsize, self.mode)


@dataclass(frozen=True)
class ModelLayer:
    """A projection of a published model: outputs that read one input of width K."""

    model: str
    name: str
    Ns: tuple[int, ...]
    K: int
    bias: bool = False

    def case(
        self,
        M: int,
        rank: int | Sequence[int],
        *,
        R: int | None = None,
        dtype: str = "float32",
        mode: Mode = "forward",
    ) -> Case:
        """The layer at M rows and active rank(s); R defaults to the rank."""
        ranks = (rank,) * len(self.Ns) if isinstance(rank, int) else tuple(rank)
        layers = tuple(Layer(N, self.K, R or r, r) for N, r in zip(self.Ns, ranks, strict=True))
        return Case(f"{self.model} {self.name}", M, layers, dtype, mode, self.bias)


# Shapes from the models' published configurations (hidden size, intermediate size, key/value
# heads). ResNet's 1x1 convolutions are linear layers over N*H*W rows.
MODELS = {
    f"{layer.model} {layer.name}": layer
    for layer in (
        ModelLayer("MiniLM-L6", "attention", (384,), 384, bias=True),
        ModelLayer("MiniLM-L6", "q/k/v", (384, 384, 384), 384, bias=True),
        ModelLayer("MiniLM-L6", "up", (1536,), 384, bias=True),
        ModelLayer("MiniLM-L6", "down", (384,), 1536, bias=True),
        ModelLayer("ViT-B", "q/k/v", (768, 768, 768), 768, bias=True),
        ModelLayer("ViT-B", "up", (3072,), 768, bias=True),
        ModelLayer("ViT-L", "up", (4096,), 1024, bias=True),
        ModelLayer("ViT-L", "down", (1024,), 4096, bias=True),
        ModelLayer("GPT-2", "qkv", (2304,), 768, bias=True),
        ModelLayer("GPT-2", "up", (3072,), 768, bias=True),
        ModelLayer("Llama-2-7B", "o", (4096,), 4096),
        ModelLayer("Llama-2-7B", "q/k/v", (4096, 4096, 4096), 4096),
        ModelLayer("Llama-2-7B", "gate/up", (11008, 11008), 4096),
        ModelLayer("Llama-2-7B", "down", (4096,), 11008),
        ModelLayer("Llama-3-8B", "q/k/v", (4096, 1024, 1024), 4096),
        ModelLayer("Llama-3-8B", "up", (14336,), 4096),
        ModelLayer("Llama-3-8B", "gate/up", (14336, 14336), 4096),
        ModelLayer("Llama-3-8B", "down", (4096,), 14336),
        ModelLayer("Qwen2.5-7B", "q/k/v", (3584, 512, 512), 3584, bias=True),
        ModelLayer("Qwen2.5-7B", "down", (3584,), 18944),
        ModelLayer("ResNet-50", "layer3 1x1", (1024,), 256),
        ModelLayer("ResNet-50", "layer4 1x1", (512,), 2048),
    )
}

# Rows per call: decoding one token, a small batch of requests, a sentence, a prompt.
_M_ALL = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
# Library matmuls can fall off a cliff at ranks off the tile grid: odd ones stand beside even ones.
_RANKS_ALL = (16, 32, 64, 127, 128, 200, 256, 512, 1024, 1488)


def quick() -> Iterator[Case]:
    """A dozen calls that show each regime: one token, small and large batches, groups, training."""
    mini, o = MODELS["MiniLM-L6 up"], MODELS["Llama-2-7B o"]
    for M in (1, 16, 256, 2048):
        yield mini.case(M, 96, R=192)
    yield MODELS["MiniLM-L6 q/k/v"].case(1, (64, 64, 128))
    yield MODELS["MiniLM-L6 q/k/v"].case(256, (64, 64, 128))
    for M in (1, 16, 128):
        yield o.case(M, 256)
    yield o.case(16, 127, R=256)
    yield MODELS["Llama-3-8B q/k/v"].case(1, 128, dtype="bfloat16")
    yield o.case(16, 256, dtype="bfloat16")
    yield mini.case(256, 96, R=192, mode="training")


def model() -> Iterator[Case]:
    """Every layer of MODELS at four batch sizes and three ranks, one of them odd."""
    for layer, M, fraction in itertools.product(MODELS.values(), (1, 16, 128, 1024), (16, 8, 4)):
        widest = max(layer.Ns)
        rank = min(widest, layer.K) // fraction
        yield layer.case(M, rank - 1 if fraction == 8 else rank, R=rank)
    for layer in MODELS.values():
        yield layer.case(1024, min(*layer.Ns, layer.K) // 4, mode="training")


def full() -> Iterator[Case]:
    """The model suite, and every M and rank of design.md §5 on square, wide and grouped layers."""
    yield from model()
    for name in ("Llama-2-7B o", "Llama-3-8B up", "Llama-3-8B q/k/v", "Llama-3-8B gate/up"):
        for M, rank in itertools.product(_M_ALL, _RANKS_ALL):
            yield MODELS[name].case(M, rank)
            if M >= 256:
                yield MODELS[name].case(M, rank, mode="training")


SUITES = {"quick": quick, "model": model, "full": full}

# A case of which even the dense layer does more than this is no CPU workload: it would take
# minutes for one sample.
CPU_FLOP_LIMIT = 2e11


def suite(
    name: str,
    *,
    dtypes: Sequence[str] | None = None,
    modes: Sequence[Mode] | None = None,
    device_type: str = "cpu",
) -> list[Case]:
    """The cases of a suite, without duplicates.

    Args:
        name: "quick", "model" or "full".
        dtypes: run every case in these dtypes instead of its own.
        modes: keep only these modes.
        device_type: "cpu" leaves out cases above CPU_FLOP_LIMIT dense FLOP.

    Raises:
        ValueError: an unknown suite.
    """
    if name not in SUITES:
        raise ValueError(f"suite: name: expected one of {tuple(SUITES)}, got {name!r}")
    cases: dict[Case, None] = {}
    for case in SUITES[name]():
        if modes is not None and case.mode not in modes:
            continue
        if device_type == "cpu" and case.cost("dense").flops > CPU_FLOP_LIMIT:
            continue
        for dtype in dtypes or (case.dtype,):
            cases[replace(case, dtype=dtype)] = None
    return list(cases)


def parse_shape(text: str, *, dtype: str = "float32", mode: Mode = "forward") -> Case:
    """Read "M,N,K,R" or "M,N,K,R,rank" into a case.

    Raises:
        ValueError: not four or five positive integers, or a rank beyond R.
    """
    parts = text.split(",")
    if len(parts) not in (4, 5) or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"parse_shape: text: expected M,N,K,R[,rank], got {text!r}")
    M, N, K, R, *rank = (int(part) for part in parts)
    return Case("command line", M, (Layer(N, K, R, rank[0] if rank else R),), dtype, mode)


def joined(values: Iterable[int]) -> str:
    """Join values with "+", or give one when all are the same."""
    values = list(values)
    return "+".join(map(str, values if len(set(values)) > 1 else values[:1]))
