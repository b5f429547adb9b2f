"""Launches that were made before: Triton is asked once per layout, not once per call, what fits.

`kernel[grid](...)` specialises every argument anew and looks its variant up; that is most of what a
small call costs the host. A Launcher keeps the compiled variant and calls it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import triton
from torch import Tensor

from maestro_kernels.backends.workspace import current_stream

_knobs = triton.knobs.runtime


class Launcher:
    """A kernel with its grid and constants, for tensors of one layout (see `layouts`).

    Args:
        kernel: a function of @triton.jit.
        num_programs: of the grid.
        constants: its constexpr arguments.
        **options: of the compiler.
    """

    def __init__(
        self, kernel: Any, num_programs: int, constants: dict[str, Any], **options: Any
    ) -> None:
        self._kernel, self._grid = kernel, (num_programs, 1, 1)
        self._constants, self._options = constants, options
        # Of the variant that the first launch found: what it is called with before and after the
        # arguments. Kept with the variant itself, which unloads its code when it goes.
        self._variant: Any = None
        self._run: Any = None
        self._ends: tuple[tuple[Any, ...], tuple[Any, ...]] = (), ()

    def __call__(self, x: Tensor, *arguments: Any) -> None:
        """Launch on the current stream of the current device, which is that of x."""
        try:  # a profiler has hooks on launches: then Triton makes them, and tells it
            watched = _knobs.launch_enter_hook.calls or _knobs.launch_exit_hook.calls
        except AttributeError:  # not a chain of hooks
            watched = True
        if self._run is None or watched:
            self._by_triton(arguments)
        else:
            head, tail = self._ends
            self._run(*self._grid, current_stream(x.device.index), *head, *arguments, *tail)

    def _by_triton(self, arguments: Sequence[Any]) -> None:
        kernel = self._kernel
        found = kernel[self._grid](*arguments, **self._constants, **self._options)
        if self._run is None and found is not None and _runs_as_expected(type(found)):
            # A launch that nobody watches needs no words for who watches.
            head = found.function, found.packed_metadata, None, None, None
            names = kernel.arg_names[len(arguments) :]
            self._ends = head, tuple(self._constants[name] for name in names)
            self._variant, self._run = found, found.run  # last: other threads look at it


@functools.cache
def _runs_as_expected(variant: type) -> bool:
    """Whether this Triton calls a compiled variant with what, and in the order that, Launcher does.

    Found out from Triton itself, which is asked to launch a stand-in.
    """
    seen: list[Any] = []
    stand_in = SimpleNamespace(
        _init_handles=lambda: None,
        launch_metadata=lambda *_: "metadata",
        run=lambda *arguments: seen.extend(arguments),
        function="function",
        packed_metadata="packed",
    )
    try:
        variant.__getitem__(stand_in, (2, 3, 4))("argument", stream=5)  # type: ignore[attr-defined]
    except Exception:  # another Triton
        return False
    hooks = [_knobs.launch_enter_hook, _knobs.launch_exit_hook]
    return seen == [2, 3, 4, 5, "function", "packed", "metadata", *hooks, "argument"]


def layouts(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """All that Triton and the planners look at in tensors: a launch is repeated for the same.

    Raises:
        RuntimeError: the storage of a tensor was freed; the caller's validator says which.
    """
    return tuple(
        [
            t if t is None else (t.shape, t.stride(), t.dtype, (t.data_ptr() or _none(t)) % 16)
            for t in tensors
        ]
    )


def _none(tensor: Tensor) -> int:
    """The address of a tensor that has none."""
    if tensor.numel() and not tensor.is_meta:
        raise RuntimeError("a launch of Triton: expected tensors with a storage, got a freed one")
    return 0


# As many as dispatch.py has plans.
_MAX_KEPT = 4096


def keep(launches: dict[Any, Any], key: Any, launch: Any) -> Any:
    """Remember a launch."""
    if len(launches) >= _MAX_KEPT:
        launches.clear()
    launches[key] = launch
    return launch
