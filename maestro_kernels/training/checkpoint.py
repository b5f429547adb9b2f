"""Checkpoints of a training run: written atomically, read without unpickling code.

A file is whole or it is the previous one, whatever happens meanwhile; it holds everything a run
needs to go on bit for bit, random states included.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maestro_kernels.arguments import model_first
from maestro_kernels.files import check_file, check_path, replacing
from maestro_kernels.training.loop import Maestro, NonFiniteLoss, first_non_finite
from maestro_kernels.training.resize import load_shrunken

_FORMAT, _VERSION = "maestro_kernels.training", 1


@model_first
def save_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    optimizer: torch.optim.Optimizer,
    maestro: Maestro | None = None,
    **extra: Any,
) -> Path:
    """Write a run's state: model, optimizer, sampler, random states and what else is given.

    Args:
        model: factorised or not.
        path: file to write; the one that is there stays until the new one is whole and on disk,
            and of several writers the last one wins.
        optimizer: over its parameters.
        maestro: see Maestro.
        extra: tensors and plain values (numbers, strings, lists, dicts), given back by
            `load_checkpoint`: the epoch, a scheduler's state_dict, ...

    Raises:
        TypeError: path is no path.
        ValueError: path is a folder, a FIFO or a device.
        NonFiniteLoss: a parameter or buffer is not finite; the earlier checkpoint stays.
        OSError: the file cannot be written; the earlier checkpoint stays.
    """
    place = check_file("save_checkpoint", "path", path)
    where = first_non_finite(model)
    if where is not None:
        raise NonFiniteLoss(
            f"save_checkpoint: model: expected finite values, got a non-finite {where}; "
            f"{str(place)!r} was not written"
        )
    state = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "maestro": None if maestro is None else maestro.state_dict(),
        "random": _random_state(),
        "extra": extra,
    }
    with replacing(place) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # After a failed write torch still ends its archive, and only complains of that.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
    return place


@model_first
def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    optimizer: torch.optim.Optimizer,
    maestro: Maestro | None = None,
    *,
    random_state: bool = True,
) -> dict[str, Any]:
    """Put a run back to where `save_checkpoint` left it; layers take the ranks of the checkpoint.

    Args:
        model: of the same architecture and converted alike, at any rank.
        path: a file written by `save_checkpoint`.
        optimizer: over its parameters; follows the resized ones.
        maestro: around the same model and optimizer.
        random_state: also restore the global random states of torch, Python and NumPy.

    Returns:
        What was given as `extra`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, a damaged one, or a checkpoint of another architecture.
            Nothing is changed then.
    """
    fn = "load_checkpoint"
    state = _read(fn, check_path(fn, "path", path))
    if maestro is not None:
        if state["maestro"] is None:
            raise ValueError(
                f"{fn}: maestro: expected a checkpoint with its state, got one without"
            )
        maestro._check_state(fn, state["maestro"])
    _check_groups(fn, optimizer, state["optimizer"])
    load_shrunken(model, state["model"], optimizer)
    optimizer.load_state_dict(state["optimizer"])
    if maestro is not None:
        maestro.load_state_dict(state["maestro"])
    if random_state:
        restore_random_state(state["random"])
    extra: dict[str, Any] = state["extra"]
    return extra


def _read(fn: str, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{fn}: path: expected a checkpoint, got no file {str(path)!r}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{fn}: path: expected a whole checkpoint, got {path.name!r}: {text}"
        ) from error
    except Exception as error:
        # torch.load names its refusals UnpicklingError, which is no ValueError.
        if type(error).__name__ != "UnpicklingError":
            raise
        raise ValueError(
            f"{fn}: path: expected a checkpoint of maestro_kernels.training, "
            f"got {path.name!r}, another kind of file"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(
            f"{fn}: path: expected a checkpoint of maestro_kernels.training, "
            f"got {path.name!r}, another kind of file"
        )
    if state.get("version") != _VERSION:
        raise ValueError(
            f"{fn}: path: expected format version {_VERSION}, got {state.get('version')!r}"
        )
    kinds = {"model": dict, "optimizer": dict, "random": dict, "extra": dict}
    for key, kind in kinds.items():
        if not isinstance(state.get(key), kind):
            raise ValueError(
                f"{fn}: path: expected a whole checkpoint, got {path.name!r} with "
                f"{type(state.get(key)).__name__} as its {key!r}"
            )
    return state


def _check_groups(fn: str, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    mine = [len(group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in state["param_groups"]]
    if mine != theirs:
        raise ValueError(
            f"{fn}: optimizer: expected groups of {theirs} parameters as saved, got {mine}"
        )


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = [str(name), torch.from_numpy(keys.astype("int64")), *map(float, rest)]
    return state


def seed_random_state(seed: int) -> None:
    """Seed the global generators that a checkpoint keeps."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set the global random states that a checkpoint keeps, of libraries that are in use."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state:
        import numpy

        name, keys, pos, has_gauss, cached = state["numpy"]
        numpy.random.set_state(
            (name, keys.numpy().astype("uint32"), int(pos), int(has_gauss), cached)
        )
