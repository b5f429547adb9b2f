"""What `maestro-kernels train` reads: a TOML or JSON file, checked whole before anything runs.

Every key has its default here and nowhere else; docs/guide/train-command.md says what each means.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

try:
    import pydantic
    from pydantic import Field

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
except ModuleNotFoundError as error:
    raise NotImplementedError(
        f"train: expected the package {error.name}, got none; pip install 'maestro-kernels[train]'"
    ) from None


class _Table(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False
    )


class ConvertTable(_Table):
    """`[convert]`: which layers are factorised, always from full rank; see `convert`."""

    init: Literal["svd", "random"] = "svd"
    include: list[str] = []
    exclude: list[str] = []


class TrainTable(_Table):
    """`[train]`: the ordinary part of training."""

    epochs: pydantic.PositiveInt = 60
    batch_size: pydantic.PositiveInt = 64
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: pydantic.PositiveFloat = 0.03
    momentum: float = Field(default=0.9, ge=0, le=1)
    weight_decay: pydantic.NonNegativeFloat = 0.0
    schedule: Literal["steps", "cosine", "constant"] = "steps"
    seed: int = Field(default=0, ge=0, lt=2**63)
    checkpoint_steps: pydantic.NonNegativeInt = 0
    log_steps: pydantic.PositiveInt = 10


class MaestroTable(_Table):
    """`[maestro]`: rank sampling, penalty and shrinking; see `training.Maestro`."""

    sampler: Literal["single", "independent", "fixed", "full"] = "single"
    fraction: float = Field(default=0.5, gt=0, le=1)
    penalty: Literal["hierarchical", "group", "funnel"] = "hierarchical"
    lam: pydantic.NonNegativeFloat = 1e-3
    threshold: pydantic.NonNegativeFloat = 1e-5
    shrink_every: pydantic.NonNegativeInt = 1
    multiple_of: pydantic.PositiveInt = 1
    freeze_period: pydantic.NonNegativeInt = 0
    recalibrate_batches: pydantic.NonNegativeInt = 50


class TrainConfig(_Table):
    """One training run; `task` is "module:function", which returns a `training.Task`."""

    task: str
    options: dict[str, Any] = {}
    convert: ConvertTable = ConvertTable()
    train: TrainTable = TrainTable()
    maestro: MaestroTable = MaestroTable()


def load_config(path: Path) -> TrainConfig:
    """Read a `.toml` or `.json` file; a ValueError names every key that does not fit."""
    readers = {".toml": tomllib.loads, ".json": json.loads}
    if path.suffix not in readers:
        raise ValueError(f"load_config: path: expected a .toml or .json file, got {path.name!r}")
    try:
        return TrainConfig.model_validate(readers[path.suffix](path.read_text(encoding="utf-8")))
    except pydantic.ValidationError as error:
        raise ValueError(f"load_config: {'; '.join(map(_line, error.errors()))}") from None
    except ValueError as error:
        kind = path.suffix[1:].upper()
        raise ValueError(f"load_config: {path.name}: expected {kind}, got {error}") from None


def _line(error: Mapping[str, Any]) -> str:
    *tables, key = map(str, error["loc"] or ("file",))
    where = "".join(f"{name}." for name in tables)
    if error["type"] == "missing":
        return f"{where}{key}: expected a value, got none"
    if error["type"] != "extra_forbidden":
        expected = error["msg"].removeprefix("Input should be ")
        return f"{where}{key}: expected {expected}, got {error['input']!r}"
    known: Any = TrainConfig
    for name in tables:
        known = known.model_fields[name].annotation
    line = f"{where}{key}: expected one of {', '.join(known.model_fields)}, got an unknown key"
    near = difflib.get_close_matches(key, known.model_fields, n=1)
    return f"{line} (did you mean {where}{near[0]}?)" if near else line
