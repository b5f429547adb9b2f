"""Batches of folders of images and of sound."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maestro_kernels.compression.architectures import Architecture
from maestro_kernels.compression.data import Data, in_dtype, split
from maestro_kernels.measure.wording import first_line

_FN = "compress"
# Images of one call; recordings, of different lengths, come one by one.
_IMAGES = 32
_SECONDS = 10
_PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def images(
    architecture: Architecture, model: nn.Module, path: Path, held_out: Path | None, most: int
) -> Data:
    """Batches of the images in a folder and below it; see `calibration.read`."""
    try:
        import PIL.Image
    except ImportError:
        raise NotImplementedError(
            f"{_FN}: --data: expected the package pillow to read images, got none; "
            "pip install pillow"
        ) from None
    files = _files(path, "--data", _PICTURES, "images")
    others = None if held_out is None else _files(held_out, "--held-out", _PICTURES, "images")
    processor = architecture.processor()
    channels = getattr(model.config, "num_channels", 3)
    train, judge = split(files, others, most)

    def open_(file: Path) -> Any:
        try:
            with PIL.Image.open(file) as image:
                return image.convert("L" if channels == 1 else "RGB")
        except OSError as error:
            raise ValueError(
                f"{_FN}: --data: expected images, got {str(file)!r}: {first_line(error)}"
            ) from None

    size = _IMAGES
    batches, judged = (
        [
            in_dtype(
                model,
                dict(processor([open_(f) for f in part[at : at + size]], return_tensors="pt")),
            )
            for at in range(0, len(part), size)
        ]
        for part in (train, judge)
    )
    return Data(batches, judged, "image", len(train), len(judge), batches, _labels(model, judge))


def _labels(model: nn.Module, files: Sequence[Path]) -> Tensor | None:
    """The class of each file, where the folder around it has the name or number of one."""
    known = getattr(model.config, "label2id", None) or {}
    found = [known.get(file.parent.name) for file in files]
    if any(label is None for label in found):
        return None
    return torch.tensor([int(label) for label in found if label is not None])


def sound(
    architecture: Architecture, model: nn.Module, path: Path, held_out: Path | None, most: int
) -> Data:
    """Batches of the .wav files in a folder and below it; see `calibration.read`."""
    files = _files(path, "--data", (".wav",), "sound (.wav)")
    others = None if held_out is None else _files(held_out, "--held-out", (".wav",), "sound (.wav)")
    extractor = architecture.processor()
    train, judge = split(files, others, most)
    batches, judged = (
        [
            in_dtype(
                model,
                {
                    key: value
                    for key, value in extractor(
                        _wave(file, int(extractor.sampling_rate)),
                        sampling_rate=extractor.sampling_rate,
                        return_tensors="pt",
                    ).items()
                    # One recording needs no mask.
                    if key == architecture.kind.main_input_name
                },
            )
            for file in part
        ]
        for part in (train, judge)
    )
    return Data(batches, judged, "recording", len(train), len(judge), batches)


def _wave(file: Path, rate: int) -> np.ndarray[Any, Any]:
    """At most ten seconds of a file of 16 bits, in -1..1, channels averaged."""
    try:
        with wave.open(str(file), "rb") as opened:
            width, found, channels = (
                opened.getsampwidth(),
                opened.getframerate(),
                opened.getnchannels(),
            )
            content = opened.readframes(_SECONDS * found)
    except (wave.Error, EOFError) as error:
        raise ValueError(
            f"{_FN}: --data: expected .wav files, got {str(file)!r}: {first_line(error)}"
        ) from None
    if width != 2 or found != rate:
        raise ValueError(
            f"{_FN}: --data: expected sound of 16 bits and {rate} Hz, got {str(file)!r} with "
            f"{8 * width} bits and {found} Hz"
        )
    values = np.frombuffer(content, "<i2").reshape(-1, channels).mean(1) / 32768
    return values.astype(np.float32)


def _files(path: Path, option: str, endings: Sequence[str], what: str) -> list[Path]:
    if not path.is_dir():
        raise ValueError(f"{_FN}: {option}: expected a folder of {what}, got {str(path)!r}")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in endings and p.is_file())
    if not found:
        raise ValueError(f"{_FN}: {option}: expected {what} in {str(path)!r}, got none")
    return found
