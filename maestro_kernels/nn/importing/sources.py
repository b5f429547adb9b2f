"""The tensors of a checkpoint that somebody else wrote, and what its config.json says."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maestro_kernels.files import check_path
from maestro_kernels.nn import saved_file

CONFIG = "config.json"
# In the order in which transformers and PEFT look for them.
_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)


@dataclass(frozen=True)
class Source:
    """Tensors by name, with what is known of where they come from.

    Attributes:
        tensors: values; one storage may be under several names.
        config: of the folder, or of the model; empty where there is none.
        folder: that was read, or None.
        model: that the tensors belong to, or None.
    """

    tensors: dict[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    model: nn.Module | None = None


def read(fn: str, source: Any, config_name: str = CONFIG) -> Source:
    """What a model, a state dict, a folder or a file holds.

    Args:
        fn: the public function, for errors.
        source: one of these.
        config_name: of the JSON file beside the tensors.

    Raises:
        TypeError: something else.
        ValueError: no such folder or file, no tensors in it, a damaged or a pickled one, or a
            tensor without values.
    """
    if isinstance(source, nn.Module):
        config: Any = getattr(source, "config", None)
        known = config.to_dict() if hasattr(config, "to_dict") else {}
        found = Source(dict(source.state_dict()), known, model=source)
    elif isinstance(source, Mapping):
        found = Source(dict(source))
    else:
        path = check_path(fn, "source", source)
        folder = path if path.is_dir() else path.parent
        found = Source(_of_path(fn, path), read_config(folder / config_name), folder)
    for name, value in found.tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{fn}: source: expected tensors by name, got {type(value).__name__} at {name!r}"
            )
        if value.is_meta:
            raise ValueError(f"{fn}: source: expected values, got {name!r} on the meta device")
    return found


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _of_path(fn: str, path: Path) -> dict[str, Tensor]:
    if not path.is_dir():
        return _of_file(fn, path)
    for name in _NAMES:
        file = path / name
        if not file.is_file():
            continue
        if not name.endswith(".index.json"):
            return _of_file(fn, file)
        shards = read_config(file).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{fn}: source: expected a weight_map in {str(file)!r}, got none")
        tensors = {}
        for shard in sorted(set(shards.values())):
            tensors.update(_of_file(fn, path / shard))
        missing = sorted(set(shards) - set(tensors))
        if missing:
            raise ValueError(
                f"{fn}: source: expected the tensors of {str(file)!r}, got none for {missing[0]!r}"
            )
        return tensors
    raise ValueError(
        f"{fn}: source: expected a folder with {_NAMES[0]} or {_NAMES[2]}, got {str(path)!r} "
        + ("without them" if path.is_dir() else "that is none")
    )


def _of_file(fn: str, path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{fn}: source: expected a file or folder, got nothing at {str(path)!r}")
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            try:
                return saved_file.tensors_of(file, path)
            except ValueError as error:
                raise ValueError(
                    f"{fn}: source: expected a whole safetensors file, got {str(path)!r}, a "
                    f"damaged one ({error})"
                ) from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # SVD-LLM and Basis Sharing pickle whole models: their classes are code of theirs.
        raise ValueError(
            f"{fn}: source: expected a file of tensors, got {str(path)!r}, which pickles other "
            "objects; load it where their classes are and pass the model, or its state_dict()"
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"{fn}: source: expected a whole file of tensors, got {str(path)!r} ({error})"
        ) from None
    if not isinstance(found, Mapping):
        raise ValueError(
            f"{fn}: source: expected a file of tensors by name, got {type(found).__name__} in "
            f"{str(path)!r}"
        )
    return dict(found)
