"""Which calls are worth timing: layers of real models, at the sizes people run them.

What a case is, measure/cases.py says.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from maestro_kernels.measure.cases import Case, Layer
from maestro_kernels.measure.cost import Mode


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
