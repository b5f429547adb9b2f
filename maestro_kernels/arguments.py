"""What every public function does with its arguments: checks that name them, and old names."""

from __future__ import annotations

import functools
import operator
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

Function = TypeVar("Function", bound=Callable[..., Any])


def check_int(fn: str, name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int in low..high; raises TypeError or ValueError that names fn and name."""
    span = f"an int >= {low}" if high is None else f"an int, {low} <= {name} <= {high}"
    if isinstance(value, bool | Tensor):
        raise TypeError(f"{fn}: {name}: expected {span}, got {type(value).__name__}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{fn}: {name}: expected {span}, got {type(value).__name__}") from None
    if number < low or (high is not None and number > high):
        raise ValueError(f"{fn}: {name}: expected {span}, got {number}")
    return number


def check_model(fn: str, model: Any) -> None:
    """Raise TypeError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{fn}: model: expected an nn.Module, got {type(model).__name__}")


def renamed(**names: str) -> Callable[[Function], Function]:
    """Decorate a function that takes arguments by their old names, too, for one release.

    Args:
        names: old name -> name.
    """

    def decorate(function: Function) -> Function:
        fn = function.__name__

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old, name in names.items():
                if old in kwargs:
                    if name in kwargs:
                        raise TypeError(f"{fn}: {old}: expected {name} alone, its new name")
                    warnings.warn(
                        f"{fn}: {old} is called {name} now", DeprecationWarning, stacklevel=2
                    )
                    kwargs[name] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def model_first(function: Function) -> Function:
    """Decorate f(model, path, ...) that took the path first: it still does, for one release."""
    fn = function.__name__

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if len(args) > 1 and isinstance(args[0], str | os.PathLike):
            warnings.warn(
                f"{fn}: the model comes before the path now", DeprecationWarning, stacklevel=2
            )
            args = (args[1], args[0], *args[2:])
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]
