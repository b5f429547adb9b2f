"""The forms of the sentence encoder that the main job compares: dense, int8, factorised.

A form is what somebody could deploy, in one dtype: torch's own first, then ours.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.encoder_texts import by_length
from maestro_kernels.backends import onednn
from maestro_kernels.benchmark.encoder import Encoder, pooled
from maestro_kernels.nn import LoDLinear, convert, group, prepack, set_ranks, truncate
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.search import Allocation, Params, allocate, sensitivity

__all__ = [
    "EmbeddingLoss",
    "PlainPair",
    "Search",
    "at_ranks",
    "bfloat16_slowdown",
    "deployed",
    "full_rank",
    "in_dtype",
    "int8",
    "plain_pairs",
    "quietly",
    "search_ranks",
    "uniform_ranks",
]

# bfloat16 that takes longer than this many times float32 is emulated: not worth hours of timing.
TOO_SLOW = 3.0
Ranks = Mapping[str, int | str]


def full_rank(encoder: Encoder, texts: Sequence[str], init: str) -> nn.Module:
    """Every linear layer in factors of full rank, each prefix of which is the best at its rank.

    Args:
        encoder: the original.
        texts: calibrate init "data".
        init: "svd" or "data".
    """
    data = list(encoder.batches(texts)) if init == "data" else None
    return convert(encoder.model, init=init, batches=data, allow_larger=True, inplace=False)


def uniform_ranks(full: nn.Module, budget: float) -> dict[str, int]:
    """floor(budget N K / (N + K)) of every layer, at least 1, as `convert(rank=budget)` keeps."""
    return {
        name: min(max(int(budget * m.break_even_rank), 1), m.max_rank)
        for name, m in full.named_modules()
        if isinstance(m, LoDLayer)
    }


def at_ranks(encoder: Encoder, full: nn.Module, ranks: Ranks) -> nn.Module:
    """The model at these ranks; "dense" layers keep the original's weights."""
    small = copy.deepcopy(full)
    original = dict(encoder.model.named_modules())
    for name, rank in ranks.items():
        if rank == "dense":
            parent, _, child = name.rpartition(".")
            setattr(small.get_submodule(parent), child, copy.deepcopy(original[name]))
    set_ranks(small, {name: rank for name, rank in ranks.items() if rank != "dense"})
    return truncate(small).eval()


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another dtype."""
    return copy.deepcopy(model).to(dtype)


def deployed(model: nn.Module) -> nn.Module:
    """As a user would run it on a CPU: grouped and prepacked. A copy."""
    return prepack(group(copy.deepcopy(model)))


def int8(model: nn.Module) -> tuple[nn.Module | None, str]:
    """Dynamic int8 by torch of every nn.Linear, or None; and the engine, or why there is none."""
    engines = [e for e in torch.backends.quantized.supported_engines if e != "none"]
    engine = torch.backends.quantized.engine
    if engine == "none" or not engines:
        return None, "this torch has no engine for quantized linears"
    quantize = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if quantize is None:
        return None, "this torch has no quantize_dynamic"
    with quietly():
        try:
            made = quantize(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
            # Engines that are listed may still refuse this CPU's instructions.
            ids = torch.ones(1, 4, dtype=torch.long)
            with torch.no_grad():
                made(input_ids=ids, attention_mask=ids)
        except (RuntimeError, NotImplementedError) as error:
            return None, f"engine {engine} refuses: {str(error).splitlines()[0]}"
    return made, engine


@contextmanager
def quietly() -> Iterator[None]:
    """Without the notes that torch.ao is to move to another package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def bfloat16_slowdown(encoder: Encoder, texts: Sequence[str]) -> float:
    """Time of a pass in bfloat16 over that in float32: far above 1 where it is emulated."""
    batch = encoder.tokens(list(texts)[:8])
    spent = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = in_dtype(encoder.model, dtype)
        for _ in range(2):
            start = time.perf_counter()
            model(**batch)
            spent[dtype] = time.perf_counter() - start
    return spent[torch.bfloat16] / spent[torch.float32]


class EmbeddingLoss:
    """loss(model, batch) = mean over the sentences of 1 - cosine to the original's embedding.

    Args:
        encoder: its model is the original.
        batches: those that the loss will be asked of, known by identity.
    """

    def __init__(self, encoder: Encoder, batches: Sequence[dict[str, Tensor]]) -> None:
        self._batches = list(batches)
        with torch.no_grad():
            self._wanted = {id(b): self._embed(encoder.model, b) for b in self._batches}

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> float:
        """The loss of one batch."""
        return 1.0 - float((self._embed(model, batch) * self._wanted[id(batch)]).sum(-1).mean())

    @staticmethod
    def _embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return pooled(model(**batch)[0].float(), batch["attention_mask"])


@dataclass(frozen=True)
class Search:
    """Ranks found per budget, and what that took.

    Attributes:
        allocations: by budget.
        seconds: for all budgets together.
        sentences: that losses were measured on.
        dtype: of the passes.
        passes: over these sentences.
    """

    allocations: dict[float, Allocation]
    seconds: float
    sentences: int
    dtype: str
    passes: int

    def __str__(self) -> str:
        count = len(self.allocations)
        return (
            f"Searched ranks took {self.seconds:.0f} s for {count} budget{'s' * (count > 1)}: "
            f"{self.passes} passes over {self.sentences} sentences in {self.dtype}."
        )


def search_ranks(
    encoder: Encoder,
    fit: Sequence[str],
    measure: Sequence[str],
    budgets: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
    points: int = 2,
    passes: int | None = None,
    progress: Any = None,
) -> Search:
    """Ranks by the measured loss of embeddings, for budgets in weights.

    Forward passes are what it costs, so they are made few and cheap: a few ranks per layer, few
    sentences without padding, in the fastest dtype. `allocate` corrects what that misses, by
    measuring the loss of the model as a whole.

    Args:
        encoder: the original.
        fit: texts whose inputs make the factors.
        measure: texts to measure losses on.
        budgets: fractions of the linear layers' weights.
        dtype: of the passes.
        points: ranks per layer at which the sensitivity measures.
        passes: of the refinement per budget; None is `allocate`'s own.
        progress: called with (text, done, total).
    """
    start = time.perf_counter()
    measured = list(encoder.batches(by_length(encoder, measure)))
    fitted = list(encoder.batches(by_length(encoder, fit)))
    loss = EmbeddingLoss(encoder, measured)
    model = in_dtype(encoder.model, dtype)
    told = progress or (lambda text, done, total: None)
    count = 0

    def counted(model: nn.Module, batch: dict[str, Tensor]) -> float:
        nonlocal count
        count += batch is measured[0]
        return loss(model, batch)

    sens = sensitivity(
        model, [*measured, *fitted], counted, method="loss", points=points,
        held_out=len(measured), progress=told,
    )  # fmt: skip
    found = {
        budget: allocate(
            model, Params(budget), sens, batches=measured, loss_fn=counted, passes=passes,
            progress=told,
        )
        for budget in budgets
    }  # fmt: skip
    spent = time.perf_counter() - start
    return Search(found, spent, len(measure), str(dtype).removeprefix("torch."), count)


def search_dtype(slowdown: float) -> torch.dtype:
    """bfloat16 where the CPU has it and it is faster than float32."""
    native = onednn.unsupported(torch.bfloat16) is None
    return torch.bfloat16 if native and slowdown < 1 else torch.float32


class PlainPair(nn.Module):
    """The baseline a user would write: two F.linear calls on factors cut to their rank."""

    def __init__(self, u: Tensor, v: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(u), nn.Parameter(v)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Y (..., N) for x (..., K)."""
        return F.linear(F.linear(x, self.v), self.u, self.bias)


def plain_pairs(model: nn.Module) -> nn.Module:
    """A copy of a converted model whose factorised linear layers are PlainPair modules."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoDLinear):
                r = child.rank
                bias = None if child.bias is None else child.bias.detach().clone()
                u = child.u[:, :r].detach().contiguous()
                setattr(parent, name, PlainPair(u, child.v[:r].detach().clone(), bias))
    return twin
