"""From a user's file or folder to batches of texts; also batches of nothing, to time.

A batch is a dict of tensors that a model is called with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maestro_kernels.compression import media
from maestro_kernels.compression.architectures import Architecture
from maestro_kernels.compression.data import KEPT, Batch, Data, in_dtype, split, spread
from maestro_kernels.measure.wording import first_line
from maestro_kernels.nn.moments import calibrating

_FN = "compress"

# Tokens of a sequence: of a language model, of other texts, and of a batch that is timed.
_LONG, _SHORT, _TIMED = 512, 128, 128
# Inputs of one call.
_SIZES = {"text": 32, "language": 4}
# Most inputs that are used, where the user does not say.
SAMPLES = {"text": 4096, "language": 128, "images": 1024, "sound": 64}
# Tokens that a speech model is made to write.
_WRITTEN = 32
# Characters of a token, rather too many: of a long file no more is read.
_CHARACTERS = 8


def read(
    architecture: Architecture,
    model: nn.Module,
    path: Path,
    held_out: Path | None,
    samples: int | None,
    steps: int = 0,
) -> Data:
    """Batches of a text file, a folder of images or a folder of sound.

    Args:
        architecture: which of these it takes.
        model: of this architecture.
        path: to calibrate with.
        held_out: to judge with; None keeps a fifth of `path` for it: of a language model the end
            of the text, else every fifth input.
        samples: most inputs; None for the default of the architecture.
        steps: of a distillation, which takes what it needs of a longer text.

    Raises:
        ValueError: nothing fit to read is there, or too little of it.
        NotImplementedError: the architecture takes none of these, or a package is missing.
    """
    kind = "language" if architecture.task == "language" else architecture.takes
    if not architecture.task:
        raise NotImplementedError(
            f"{_FN}: --data: expected none for a {architecture.name}, which is no encoder, "
            f"language, sequence, vision or speech model that is known here, got {str(path)!r}"
        )
    most = samples or SAMPLES[kind]
    if kind == "language":
        data = _language(architecture, model, path, held_out, most, steps)
    else:
        make = {"text": _texts, "images": media.images, "sound": media.sound}[kind]
        data = make(architecture, model, path, held_out, most)
    _try(architecture, model, data.batches[0])
    if architecture.task == "speech":
        train, judge = (_with_words(model, part) for part in (data.batches, data.held_out))
        return replace(data, batches=train, held_out=judge, training=train)
    return data


def example(architecture: Architecture, model: nn.Module) -> Batch:
    """One input of zeros and ones that the model can be timed on.

    A text of 128 tokens, an image or a second of sound (Whisper: its window).

    Raises:
        NotImplementedError: it is not known what the model takes.
    """
    config: Any = model.config
    kind = architecture.takes
    name = str(architecture.kind.main_input_name)
    batch: Batch
    if kind == "text":
        length = min(_TIMED, _positions(config))
        words = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        ids = (torch.arange(length) % words)[None]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(config, "is_encoder_decoder", False):
            batch["decoder_input_ids"] = ids
    elif kind == "images":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, tuple | list) else (size, size)
        batch = {name: torch.zeros(1, getattr(config, "num_channels", 3), height, width)}
    elif name == "input_values":
        batch = {name: torch.zeros(1, 16000)}
    elif hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        batch = {name: torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions)}
        batch["decoder_input_ids"] = torch.zeros(1, _WRITTEN, dtype=torch.int64)
    else:
        raise NotImplementedError(
            f"{_FN}: MODEL: expected an encoder, language, sequence, vision or speech model to "
            f"time, got a {architecture.name}"
        )
    batch = in_dtype(model, batch)
    _try(architecture, model, batch)
    return batch


# --- texts -----------------------------------------------------------------------------------


def lines(path: Path, option: str) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        ValueError: the file is no UTF-8, or there is none.
    """
    if not path.is_file():
        raise ValueError(f"{_FN}: {option}: expected a text file, got {str(path)!r}")
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(
            f"{_FN}: {option}: expected UTF-8 text in {str(path)!r}, got other bytes"
        ) from None
    found = [line for line in found if line]
    if not found:
        raise ValueError(f"{_FN}: {option}: expected sentences in {str(path)!r}, got none")
    return found


def _language(
    architecture: Architecture,
    model: nn.Module,
    path: Path,
    held_out: Path | None,
    most: int,
    steps: int,
) -> Data:
    """Sequences of one length, cut from the whole text."""
    text = "\n".join(lines(path, "--data"))
    if held_out is None:
        end = len(text) - len(text) // KEPT
        text, other, option = text[:end], text[end:], "--data"
    else:
        other, option = "\n".join(lines(held_out, "--held-out")), "--held-out"
    tokenizer = architecture.processor()
    length = min(_LONG, _positions(model.config))
    each = length * _CHARACTERS
    parts = ("--data", text), (option, other)
    ids = [_ids(tokenizer, part[: most * each]) for _, part in parts]
    # Of a short text several short sequences say more than a single one.
    length = min(length, max(min(len(i) for i in ids) // 2, 8))
    found = []
    for (option, _), one in zip(parts, ids, strict=True):
        rows = one[: len(one) // length * length].reshape(-1, length)
        if not len(rows):
            raise ValueError(
                f"{_FN}: {option}: expected at least 20 tokens to calibrate with and 8 to judge "
                f"with, got {len(one)}"
            )
        found.append(list(rows))
    sequences, judged = (spread(rows, most) for rows in found)
    training, wanted = sequences, steps * _SIZES["language"]
    if wanted > most:
        one = _ids(tokenizer, text[: wanted * each])
        training = spread(list(one[: len(one) // length * length].reshape(-1, length)), wanted)
    batches, held_out_batches = _stacked(sequences), _stacked(judged)
    inputs = len(sequences), len(judged)
    return Data(batches, held_out_batches, "sequence", *inputs, _stacked(training))


def _ids(tokenizer: Any, text: str) -> Tensor:
    # A text that is longer than the model is cut below.
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    found: Tensor = ids
    return found


def _texts(
    architecture: Architecture, model: nn.Module, path: Path, held_out: Path | None, most: int
) -> Data:
    """One input a line, padded."""
    texts = lines(path, "--data")
    others = None if held_out is None else lines(held_out, "--held-out")
    tokenizer = architecture.processor()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    length = min(_SHORT, _positions(model.config))
    train, judge = split(texts, others, most)
    make = _pairs if architecture.task == "seq2seq" else _singles
    size = _SIZES["text"]
    batches, judged = (
        [
            make(model, tokenizer, part[start : start + size], length)
            for start in range(0, len(part), size)
        ]
        for part in (train, judge)
    )
    return Data(batches, judged, "text", len(train), len(judge), batches)


def _singles(model: nn.Module, tokenizer: Any, texts: Sequence[str], length: int) -> Batch:
    batch = _padded(tokenizer, texts, length)
    if getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = batch["input_ids"]
    return batch


def _pairs(model: nn.Module, tokenizer: Any, texts: Sequence[str], length: int) -> Batch:
    """Source and target: what a tab divides, else the halves of a line."""
    sources, targets = zip(*(_halves(text) for text in texts), strict=True)
    batch = _padded(tokenizer, sources, length)
    target = _padded(tokenizer, targets, length)
    kept = target["attention_mask"].bool()
    batch["labels"] = target["input_ids"].masked_fill(~kept, -100)
    return batch


def _halves(text: str) -> tuple[str, str]:
    source, tab, target = text.partition("\t")
    if tab:
        return source, target
    words = text.split()
    half = max(len(words) // 2, 1)
    return " ".join(words[:half]), " ".join(words[half:]) or text


def _padded(tokenizer: Any, texts: Sequence[str], length: int) -> Batch:
    batch = tokenizer(
        list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
    )
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def _stacked(rows: Sequence[Tensor]) -> list[Batch]:
    size = _SIZES["language"]
    parts = [list(rows[at : at + size]) for at in range(0, len(rows), size)]
    return [{"input_ids": torch.stack(part)} for part in parts]


def _positions(config: Any) -> int:
    """Tokens that a model has positions for."""
    names = ("max_position_embeddings", "n_positions", "n_ctx")
    found = [getattr(config, name, None) for name in names]
    known = [int(n) for n in found if isinstance(n, int) and n > 0]
    # RoBERTa counts from 2.
    return max(min(known) - 2, 1) if known else _LONG


def _with_words(model: Any, batches: list[Batch]) -> list[Batch]:
    """What the dense model writes for each recording, for its decoder to read again."""
    found = []
    with calibrating(model):
        for batch in batches:
            written = model.generate(**batch, max_new_tokens=_WRITTEN, do_sample=False)
            found.append({**batch, "decoder_input_ids": written})
    return found


def _try(architecture: Architecture, model: nn.Module, batch: Batch) -> None:
    """Run a batch, to know before long work that it can be run."""
    if architecture.task == "speech" and "decoder_input_ids" not in batch:
        return
    try:
        with calibrating(model):
            model(**batch)
    except Exception as error:  # whatever somebody's forward raises
        raise NotImplementedError(
            f"{_FN}: MODEL: expected a model that runs on {architecture.takes} alone, got a "
            f"{architecture.name}: {first_line(error, type(error).__name__)}"
        ) from error
