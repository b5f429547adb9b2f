"""What `maestro-kernels train` reads: a TOML or JSON file, checked whole before anything runs.

Every key has a default here and nowhere else; a key or a value that does not fit is an error that
names it.
"""

from __future__ import annotations

import difflib
import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

__all__ = ["ConvertSection", "MaestroSection", "TrainConfig", "TrainSection", "load_config"]

_FN = "load_config"


@dataclass(frozen=True)
class ConvertSection:
    """`[convert]`: which layers are factorised, always from full rank; see `convert`.

    Attributes:
        init: "svd" or "random".
        include: patterns of layer names; empty means every layer.
        exclude: patterns of layer names that stay dense.
    """

    init: str = "svd"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainSection:
    """`[train]`: the ordinary part of training.

    Attributes:
        epochs: passes over the data.
        batch_size: samples per step; the last batch of an epoch may be smaller.
        optimizer: "sgd", "adam" or "adamw".
        lr: learning rate at the start.
        momentum: of "sgd".
        weight_decay: of the optimizer.
        schedule: "steps" (a tenth at 50 % and 75 % of the epochs), "cosine" or "constant".
        seed: of the weights, the order of the data and the sampler.
        checkpoint_steps: a checkpoint every so many steps besides the one after every epoch; 0 for
            none.
        log_steps: a row of metrics every so many steps.
    """

    epochs: int = 60
    batch_size: int = 64
    optimizer: str = "sgd"
    lr: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "steps"
    seed: int = 0
    checkpoint_steps: int = 0
    log_steps: int = 10


@dataclass(frozen=True)
class MaestroSection:
    """`[maestro]`: rank sampling, penalty and shrinking; see `training.Maestro`.

    Attributes:
        sampler: "single", "independent", "fixed" or "full".
        fraction: of the rank that "fixed" runs at.
        penalty: "hierarchical", "group" or "funnel".
        lam: weight of the penalty.
        threshold: components whose importance is below it are dropped.
        shrink_every: epochs between shrinking; 0 for never.
        multiple_of: ranks stored are rounded up to this multiple; fast kernels want 8.
        freeze_period: epochs after which the frozen factor changes; 0 trains both.
        recalibrate_batches: training batches that BatchNorm statistics are averaged over after
            every epoch, at full rank; 0 keeps what training gathered.
    """

    sampler: str = "single"
    fraction: float = 0.5
    penalty: str = "hierarchical"
    lam: float = 1e-3
    threshold: float = 1e-5
    shrink_every: int = 1
    multiple_of: int = 1
    freeze_period: int = 0
    recalibrate_batches: int = 50


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        task: a built-in task ("digits") or "module:function" that returns a `training.Task`.
        options: keyword arguments of the task's function.
        convert: see ConvertSection.
        train: see TrainSection.
        maestro: see MaestroSection.
    """

    task: str
    options: Mapping[str, Any] = field(default_factory=dict)
    convert: ConvertSection = field(default_factory=ConvertSection)
    train: TrainSection = field(default_factory=TrainSection)
    maestro: MaestroSection = field(default_factory=MaestroSection)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a JSON file would hold them."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> TrainConfig:
        """The configuration that a parsed file describes.

        Raises:
            TypeError: a value of the wrong type.
            ValueError: an unknown key, a missing task, or a value out of range.
        """
        if not isinstance(table, Mapping):
            raise TypeError(f"{_FN}: file: expected a table of keys, got {type(table).__name__}")
        _check_keys(table, [f.name for f in fields(cls)], "")
        task = table.get("task")
        if not isinstance(task, str) or not task:
            raise ValueError(
                f"{_FN}: task: expected the name of a built-in task or 'module:function', "
                f"got {task!r}"
            )
        options = table.get("options", {})
        if not isinstance(options, Mapping):
            raise TypeError(f"{_FN}: options: expected a table, got {type(options).__name__}")
        config = cls(
            task,
            dict(options),
            _section(ConvertSection, table, "convert"),
            _section(TrainSection, table, "train"),
            _section(MaestroSection, table, "maestro"),
        )
        _check_values(config)
        return config


def load_config(path: str | Path) -> TrainConfig:
    """Read a configuration from a `.toml` or `.json` file.

    Raises:
        FileNotFoundError: no such file.
        TypeError: a value of the wrong type.
        ValueError: the file is neither, does not parse, or a key or value does not fit.
        NotImplementedError: TOML on a Python without a TOML reader (before 3.11, no `tomli`).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{_FN}: path: expected a configuration file, got no file '{path}'")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            return TrainConfig.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{_FN}: {path.name}: expected JSON, got {error}") from None
    if path.suffix == ".toml":
        toml = _toml_reader()
        try:
            table = toml.loads(text)
        except toml.TOMLDecodeError as error:
            raise ValueError(f"{_FN}: {path.name}: expected TOML, got {error}") from None
        return TrainConfig.from_dict(table)
    raise ValueError(f"{_FN}: path: expected a .toml or .json file, got {path.name!r}")


def _toml_reader() -> Any:
    for name in ("tomllib", "tomli"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise NotImplementedError(
        f"{_FN}: path: expected a .json file on a Python without tomllib (it comes with 3.11; "
        "`pip install tomli` adds it), got .toml"
    )


def _check_keys(table: Mapping[str, Any], known: list[str], where: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" (did you mean {where}{near[0]}?)" if near else ""
            raise ValueError(
                f"{_FN}: {where}{key}: expected one of {', '.join(known)}, got an unknown key{hint}"
            )


def _section(cls: Any, table: Mapping[str, Any], name: str) -> Any:
    values = table.get(name, {})
    if not isinstance(values, Mapping):
        raise TypeError(f"{_FN}: {name}: expected a table, got {type(values).__name__}")
    _check_keys(values, [f.name for f in fields(cls)], f"{name}.")
    hints = get_type_hints(cls)
    return cls(**{k: _typed(f"{name}.{k}", hints[k], v) for k, v in values.items()})


def _typed(where: str, hint: Any, value: Any) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str):
        if isinstance(value, hint) and not isinstance(value, bool):
            return value
        raise TypeError(
            f"{_FN}: {where}: expected {hint.__name__}, got {type(value).__name__} {value!r}"
        )
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise TypeError(f"{_FN}: {where}: expected a list of strings, got {value!r}")


_CHOICES = {
    "convert.init": ("svd", "random"),
    "train.optimizer": ("sgd", "adam", "adamw"),
    "train.schedule": ("steps", "cosine", "constant"),
    "maestro.sampler": ("single", "independent", "fixed", "full"),
    "maestro.penalty": ("hierarchical", "group", "funnel"),
}
# Key -> (lowest value, whether it may be reached, highest value).
_RANGES = {
    "train.epochs": (1, True, math.inf),
    "train.batch_size": (1, True, math.inf),
    "train.lr": (0, False, math.inf),
    "train.momentum": (0, True, 1),
    "train.weight_decay": (0, True, math.inf),
    "train.seed": (0, True, 2**63 - 1),
    "train.checkpoint_steps": (0, True, math.inf),
    "train.log_steps": (1, True, math.inf),
    "maestro.fraction": (0, False, 1),
    "maestro.lam": (0, True, math.inf),
    "maestro.threshold": (0, True, math.inf),
    "maestro.shrink_every": (0, True, math.inf),
    "maestro.multiple_of": (1, True, math.inf),
    "maestro.freeze_period": (0, True, math.inf),
    "maestro.recalibrate_batches": (0, True, math.inf),
}


def _check_values(config: TrainConfig) -> None:
    def value(where: str) -> Any:
        section, name = where.split(".")
        return getattr(getattr(config, section), name)

    for where, choices in _CHOICES.items():
        if value(where) not in choices:
            raise ValueError(
                f"{_FN}: {where}: expected one of {', '.join(choices)}, got {value(where)!r}"
            )
    for where, (low, reached, high) in _RANGES.items():
        got = value(where)
        # Written so that NaN fails.
        fits = (low <= got if reached else low < got) and got <= high and math.isfinite(got)
        if not fits:
            below = "" if high == math.inf else f" and at most {high}"
            relation = "at least" if reached else "above"
            raise ValueError(f"{_FN}: {where}: expected {relation} {low}{below}, got {got}")
