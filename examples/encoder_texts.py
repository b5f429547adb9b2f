"""What the encoder is judged by: English sentences that ship with Python, fidelity, latency.

For the examples beside it, and for the main job of bench/.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maestro_kernels.benchmark.encoder import Encoder
from maestro_kernels.measure.heap import keeping_memory
from maestro_kernels.measure.timing import Stats, interleave

__all__ = ["Fidelity", "by_length", "fidelity", "latencies", "sentences", "split"]


def sentences() -> list[str]:
    """English sentences of Python's own documentation topics, in a fixed order, without code."""
    topics = importlib.import_module("pydoc_data.topics").topics
    found: dict[str, None] = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            found.update(dict.fromkeys(_prose(paragraph)))
    return list(found)


def _prose(paragraph: str) -> list[str]:
    """The sentences of a paragraph; none of a listing, a grammar or a heading."""
    lines = paragraph.strip("\n").split("\n")
    if any(re.match(r"\s{5,}|\s*(>>>|\.\.\.|\*\*\*|===|---|[+|])", line) for line in lines):
        return []
    if re.search(r"::=|\s=\s|[{}<>|\\]", paragraph):
        return []
    text = re.sub(r'[*`"“”]+', "", " ".join(line.strip() for line in lines))
    text = re.sub(r"\s+", " ", text).strip()
    kept = []
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text):
        words = sentence.split()
        letters = sum(c.isalpha() or c.isspace() for c in sentence)
        whole = 6 <= len(words) <= 48 and sentence[0].isupper() and sentence[-1] in ".!?"
        if whole and letters / len(sentence) > 0.9:
            kept.append(sentence)
    return kept


def split(texts: Sequence[str], calibration: int, held_out: int) -> tuple[list[str], list[str]]:
    """Disjoint samples by the hash of each text, so that neither depends on the other's size.

    Raises:
        ValueError: there are not enough texts.
    """
    ordered = sorted(texts, key=lambda t: hashlib.sha256(t.encode()).hexdigest())
    if calibration + held_out > len(ordered):
        raise ValueError(
            f"split: texts: expected at least {calibration + held_out}, got {len(ordered)}"
        )
    return ordered[:calibration], ordered[len(ordered) - held_out :]


def by_length(encoder: Encoder, texts: Sequence[str]) -> list[str]:
    """Texts ordered by their tokens: batches then hold hardly any padding."""
    return sorted(texts, key=lambda text: (int(encoder.tokens([text])["input_ids"].numel()), text))


@dataclass(frozen=True)
class Fidelity:
    """How close embeddings stay to the original's.

    Attributes:
        cosine: mean cosine of each embedding to the original's.
        worst: the lowest of them.
        spearman: rank correlation of all pairwise similarities with the original's.
    """

    cosine: float
    worst: float
    spearman: float


def fidelity(embeddings: Tensor, original: Tensor) -> Fidelity:
    """Compare unit vectors (n, D) with the original's for the same texts."""
    from scipy.stats import spearmanr

    cosines = (embeddings.double() * original.double()).sum(-1)
    above = torch.triu_indices(len(original), len(original), offset=1).unbind()
    ours, theirs = ((e.double() @ e.double().T)[above] for e in (embeddings, original))
    correlation = float(spearmanr(ours.numpy(), theirs.numpy()).statistic)
    return Fidelity(float(cosines.mean()), float(cosines.min()), correlation)


@torch.no_grad()
def latencies(
    models: Mapping[str, nn.Module], batch: dict[str, Tensor], seconds: float
) -> dict[str, Stats]:
    """Interleaved wall time of each model on one token batch."""
    calls = {name: (lambda m=model: m(**batch)) for name, model in models.items()}
    with keeping_memory():
        return interleave(calls, seconds=seconds, min_rounds=5)  # type: ignore[arg-type]
