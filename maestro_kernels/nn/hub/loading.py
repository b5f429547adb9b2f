"""A saved model without a dense model in hand: its architecture is in config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from maestro_kernels.nn.hub.record import METHOD, method_of
from maestro_kernels.nn.hub.registration import check_version, is_pretrained
from maestro_kernels.nn.hub.seals import CONFIG, read_json


def is_hub_save(folder: Path) -> bool:
    """Whether a folder holds a transformers model saved by us or by transformers with us."""
    return method_of(read_json(folder / CONFIG)) == METHOD


def load(fn: str, folder: Path, like: nn.Module | None = None) -> nn.Module:
    """The model of such a folder, in eval mode.

    Args:
        fn: the function, for errors.
        folder: for which `is_hub_save` holds.
        like: a model whose class to make; None for the one that was saved.

    Raises:
        ValueError: the files are damaged, of several saves or of an unknown architecture, or some
            tensor has no place or no value.
    """
    kind: Any = type(like) if is_pretrained(like) else architecture(fn, folder)
    try:
        model, found = kind.from_pretrained(folder, output_loading_info=True)
    except (ValueError, NotImplementedError) as error:
        text = str(error)
        if not text.startswith("from_pretrained: "):
            raise
        raise type(error)(fn + text.removeprefix("from_pretrained")) from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[what]:
            raise ValueError(
                f"{fn}: directory: expected the tensors of a {kind.__name__} in {str(folder)!r}, "
                f"got {what.replace('_', ' ')} {sorted(map(str, found[what]))[:4]}"
            )
    return model


def empty(fn: str, folder: Path) -> nn.Module:
    """A model of the architecture in a folder's config.json, on the meta device, in eval mode.

    Raises:
        ValueError: there is no config.json, or none of a known architecture.
    """
    kind = architecture(fn, folder)
    config = kind.config_class.from_pretrained(folder)
    with torch.device("meta"):
        model: nn.Module = kind(config)
    return model.eval()


def architecture(fn: str, folder: Path) -> Any:
    """The class of transformers that a folder's config.json names.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        NotImplementedError: it is too old.
        ValueError: there is no config.json, or none of a known architecture.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(
            f"{fn}: dense_model: expected a model to load into, as {str(folder)!r} has no {CONFIG} "
            "that says how to build one, got None"
        )
    config = read_json(path)
    names = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ValueError(
            f"{fn}: {CONFIG}: expected the name of an architecture in {str(path)!r}, got {names!r}"
            "; build the dense model and pass it as dense_model"
        )
    try:
        import transformers
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{fn}: dense_model: expected a model to load into where transformers is not "
            f"installed, got None for a {names[0]}"
        ) from None
    check_version(fn)
    kind = getattr(transformers, names[0], None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise ValueError(
            f"{fn}: {CONFIG}: expected an architecture of transformers {transformers.__version__}, "
            f"got {names[0]!r}; build the dense model and pass it as dense_model"
        )
    return kind
