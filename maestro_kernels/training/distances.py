"""How far a student's answers are from a teacher's: hidden states, embeddings, distributions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestro_kernels.nn.moments import run_batch

# distance(student, teacher, batch), a scalar with the student's graph.
Distance = Callable[[nn.Module, nn.Module, Any], Tensor]

_FN = "distil"


def hidden_distance(student: nn.Module, teacher: nn.Module, batch: Any) -> Tensor:
    """mean_b |s_b - t_b|^2 / |t_b|^2 + 1 - cos(mean of s_B, mean of t_B), over the kept tokens.

    s_b, t_b are the hidden states (..., L, D) after block b, B is the last block. An encoder with
    a decoder gives the states of both, and the mean of both distances.

    Raises:
        ValueError: a model does not return hidden states, or theirs have other shapes.
    """
    ours = _states("student", student, batch)
    with torch.no_grad():
        theirs = _states("teacher", teacher, batch)
    if [[s.shape for s in part] for part in ours] != [[t.shape for t in part] for part in theirs]:
        raise ValueError(
            f"{_FN}: teacher: expected hidden states of the student's shapes "
            f"{_shapes(ours)}, got {_shapes(theirs)}"
        )
    parts = [
        _states_distance(s, t, _mask(batch, s[-1], mask))
        for s, t, mask in zip(ours, theirs, _masks(len(ours)), strict=True)
    ]
    return torch.stack(parts).mean()


def _states_distance(ours: list[Tensor], theirs: list[Tensor], mask: Tensor | None) -> Tensor:
    errors = []
    for s, t in zip(ours, theirs, strict=True):
        s, t = s.float(), t.to(s.device).float()
        kept = 1.0 if mask is None else mask[..., None].to(s)
        energy = (t.square() * kept).sum()
        # Padding alone has no energy, and no error either.
        tiny = torch.finfo(energy.dtype).tiny
        errors.append(((s - t).square() * kept).sum() / energy.clamp(min=tiny))
    cosine = F.cosine_similarity(_mean(s, mask), _mean(t, mask), dim=-1).mean()
    return torch.stack(errors).mean() + 1 - cosine


def _mean(states: Tensor, mask: Tensor | None) -> Tensor:
    """One vector per sample: the mean over tokens (B, L, D), or over the plane (B, C, H, W)."""
    if states.dim() == 4:
        return states.mean((2, 3))
    if mask is None:
        return states.flatten(1, -2).mean(1)
    weight = mask[..., None].to(states)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


def logits_distance(student: nn.Module, teacher: nn.Module, batch: Any) -> Tensor:
    """Mean over the kept positions of KL(softmax(teacher) || softmax(student)), in nats.

    Positions are kept by labels other than -100 where an encoder has a decoder, else by the
    attention mask; models without either count all rows.

    Raises:
        ValueError: a model returns no logits, of one class only, or of other shapes.
    """
    ours = _logits("student", student, batch).float()
    with torch.no_grad():
        theirs = _logits("teacher", teacher, batch).to(ours.device).float()
    if ours.shape != theirs.shape:
        raise ValueError(
            f"{_FN}: teacher: expected logits of the student's shape {tuple(ours.shape)}, "
            f"got {tuple(theirs.shape)}"
        )
    # One-dimensional distributions are equal whatever the models say.
    if ours.dim() < 2 or ours.shape[-1] < 2:
        raise ValueError(
            f"{_FN}: loss: expected logits (..., classes) of at least two classes for 'logits', "
            f"got shape {tuple(ours.shape)}; give a function"
        )
    ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    each = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    config = getattr(student, "config", None)
    decodes = bool(getattr(config, "is_encoder_decoder", False))
    mask = _mask(batch, each, "decoder" if decodes else "encoder")
    if mask is None:
        return each.mean()
    return (each * mask.to(each)).sum() / mask.sum().clamp(min=1)


DISTANCES: dict[str, Distance] = {"hidden": hidden_distance, "logits": logits_distance}


def _run(model: nn.Module, batch: Any, **options: Any) -> Any:
    if not options:
        return run_batch(model, batch, fn=_FN)
    if isinstance(batch, Mapping):
        return model(**{**batch, **options})
    return model(*((batch,) if isinstance(batch, Tensor) else batch), **options)


def _states(role: str, model: nn.Module, batch: Any) -> list[list[Tensor]]:
    """States after every block, without the embeddings that come first; of encoder and decoder."""
    found: list[list[Tensor]] = []
    # Only transformers' models have a config, and only those know the option.
    if hasattr(model, "config"):
        output = _run(model, batch, output_hidden_states=True)
        own = getattr(output, "hidden_states", None)
        pair = [getattr(output, f"{part}_hidden_states", None) for part in ("encoder", "decoder")]
        found = [list(states[1:]) for states in ([own] if own else pair) if states]
    if not found or not all(found):
        raise ValueError(
            f"{_FN}: loss: expected a {role} that returns hidden states for 'hidden', as "
            f"transformers models do, got {type(model).__name__}; choose 'logits' or give a "
            "function"
        )
    return found


def _logits(role: str, model: nn.Module, batch: Any) -> Tensor:
    output = _run(model, batch)
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Tensor):
        found = output
    if not isinstance(found, Tensor):
        raise ValueError(
            f"{_FN}: loss: expected a {role} that returns logits or a tensor for 'logits', "
            f"got {type(output).__name__} from {type(model).__name__}; choose 'hidden' or give a "
            "function"
        )
    return found


def _masks(parts: int) -> list[str]:
    return ["encoder", "decoder"] if parts == 2 else ["encoder"]


def _mask(batch: Any, values: Tensor, part: str) -> Tensor | None:
    """(B, L) of the positions that count, or None for all.

    Speech models have a mask over samples of sound, not over states: it fits nothing here.
    """
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask" if part == "encoder" else "decoder_attention_mask")
    labels = batch.get("labels")
    if mask is None and part == "decoder" and isinstance(labels, Tensor):
        mask = labels != -100
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape != values.shape[:2]:
        return None
    return mask.to(values.device)


def _shapes(parts: list[list[Tensor]]) -> str:
    return ", ".join(f"{len(part)} of {tuple(part[-1].shape)}" for part in parts)
