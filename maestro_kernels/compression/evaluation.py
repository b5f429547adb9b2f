"""Whether a smaller model still does what the dense one does, on inputs that nothing was fitted to.

| task | what is compared | quality |
|---|---|---|
| language, seq2seq | perplexity | the dense model's over the smaller one's |
| embedding | unit vectors | mean cosine, or the share that is nearest to its own, if less |
| labels, speech | the most probable class or token | the share that agrees |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestro_kernels.benchmark.encoder import pooled
from maestro_kernels.compression.data import Batch
from maestro_kernels.measure.wording import count
from maestro_kernels.nn.moments import calibrating

# Quality below which a model is not what its user wants, where they do not say.
REQUIRED = {"perplexity": 0.5, "cosine": 0.8, "agreement": 0.8}
_MEASURES = {
    "language": "perplexity",
    "seq2seq": "perplexity",
    "embedding": "cosine",
    "labels": "agreement",
    "speech": "agreement",
}
# Vectors of one text that differ by rounding count as equal.
_TIE = 1e-6


@dataclass(frozen=True)
class Evaluation:
    """A smaller model beside the dense one.

    Attributes:
        measure: "perplexity", "cosine" or "agreement" (of the most probable answer).
        before: of the dense model.
        after: of the smaller one.
        quality: 1 as the dense model, 0 useless; see above.
        required: the least quality that is accepted.
        inputs: judged on.
        noun: what one is.
        more: other figures, by name.
    """

    measure: str
    before: float
    after: float
    quality: float
    required: float
    inputs: int
    noun: str
    more: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether the quality is what is required."""
        return self.quality >= self.required

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, no infinity among them."""
        values = asdict(self) | {"passed": self.passed}
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }

    def __str__(self) -> str:
        on = f"on {count(self.inputs, self.noun)} that nothing was fitted to"
        if self.measure == "perplexity":
            text = f"Perplexity {on}: {self.before:.4g} before, {self.after:.4g} after"
            if math.isfinite(self.after):
                text += f", {self.after / self.before:.3g} times as high"
            limit = f"at most {1 / self.required:.3g} times" if self.required else "any"
        elif self.measure == "cosine":
            text = (
                f"Embeddings {on}: mean cosine {self.after:.4f} to the dense model's; "
                f"{self.more['nearest_own']:.1%} are nearest to their own"
            )
            limit = f"{self.required:.3g} and {self.required:.1%}"
        else:
            text = f"Answers {on}: {self.after:.1%} are the dense model's"
            if "accuracy" in self.more:
                text += (
                    f"; {self.more['dense_accuracy']:.1%} were right before, "
                    f"{self.more['accuracy']:.1%} are after"
                )
            limit = f"{self.required:.1%}"
        if self.passed:
            return f"{text}. It passes ({limit} required)."
        return f"{text}. It FAILS: {limit} required."


def answers(task: str, model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """What a model says to batches: all that is kept of it to be compared with another's.

    Args:
        task: of its architecture.
        model: run in eval mode.
        batches: held out.
    """
    one = {"perplexity": _loss, "cosine": _vectors, "agreement": _top}[_MEASURES[task]]
    with calibrating(model):
        found = [one(model, batch) for batch in batches]
    return {key: torch.cat([part[key] for part in found]) for key in found[0]}


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean negative log likelihood of the next tokens, where a model has it."""
    labels = batch.get("labels", batch["input_ids"])
    output: Any = model(**{**batch, "labels": labels})
    found: Tensor = output.loss
    return found


def compare(
    task: str,
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    *,
    inputs: int,
    noun: str,
    labels: Tensor | None = None,
    required: float | None = None,
) -> Evaluation:
    """Compare `answers` of the dense model with those of a smaller one.

    Args:
        task: of the architecture.
        before: of the dense model.
        after: of the other, to the same batches.
        inputs: in these batches.
        noun: what one is.
        labels: the right answer to each, where known.
        required: least quality; None for the default of the measure.
    """
    measure = _MEASURES[task]
    more: dict[str, float] = {}
    if measure == "perplexity":
        one, other = _perplexity(before), _perplexity(after)
        quality = one / other if math.isfinite(other) else 0.0
    elif measure == "cosine":
        one, (other, own) = 1.0, _nearness(before["vectors"], after["vectors"])
        more["nearest_own"] = own
        quality = min(other, own)
    else:
        one, other = 1.0, float((before["top"] == after["top"]).double().mean())
        quality = other
        if labels is not None and len(labels) == len(after["top"]):
            more["dense_accuracy"] = float((before["top"] == labels).double().mean())
            more["accuracy"] = float((after["top"] == labels).double().mean())
    least = REQUIRED[measure] if required is None else required
    # A model that answers NaN is as far from the dense one as can be.
    quality = quality if math.isfinite(quality) else 0.0
    return Evaluation(measure, one, other, quality, least, inputs, noun, more)


def _perplexity(found: dict[str, Tensor]) -> float:
    mean = float((found["loss"] * found["tokens"]).sum() / found["tokens"].sum())
    return math.exp(mean) if mean < 700 else math.inf


def _nearness(dense: Tensor, vectors: Tensor) -> tuple[float, float]:
    """Mean cosine, and the share of vectors that no other dense vector is nearer to."""
    similar = vectors.double() @ dense.double().T
    own = similar.diagonal()
    nearest = own >= similar.max(dim=1).values - _TIE
    return float(own.mean()), float(nearest.double().mean())


def _loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    labels = batch.get("labels")
    ids = batch["input_ids"]
    tokens = ids[:, 1:].numel() if labels is None else int((labels != -100).sum())
    value = loss(model, batch).double().reshape(1)
    return {"loss": value, "tokens": torch.tensor([float(tokens)], dtype=torch.float64)}


def _vectors(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    output: Any = model(**batch)
    hidden = output[0].float()
    mask = batch.get("attention_mask")
    if mask is not None and hidden.dim() == 3 and mask.shape == hidden.shape[:2]:
        return {"vectors": pooled(hidden, mask)}
    # Feature maps (B, C, H, W) are averaged over places, states (B, L, D) over tokens.
    mean = hidden.mean((2, 3)) if hidden.dim() == 4 else hidden.mean(1)
    return {"vectors": F.normalize(mean, dim=-1)}


def _top(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    output: Any = model(**batch)
    top = output.logits.argmax(-1).masked_fill(output.logits.isnan().any(-1), -1)
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == top.shape:
        top = top[mask.bool()]
    return {"top": top.flatten()}
