"""Measuring at first use, with times that a test makes up."""

import pytest

from maestro_kernels import choices, dispatch
from maestro_kernels.measure import timing
from maestro_kernels.ops import first_use
from maestro_kernels.tables import BASELINE

NATIVE = "native: fused"


@pytest.fixture
def measuring(tmp_path, monkeypatch):
    """First use as it is by default, in a cache of its own; the folder."""
    monkeypatch.setenv("MAESTRO_KERNELS_TUNE", "first-use")
    monkeypatch.setenv("MAESTRO_KERNELS_CACHE", str(tmp_path / "cache"))
    # A busy machine must not make a test's call a long one.
    monkeypatch.setattr(first_use, "_SECONDS", 1e9)
    monkeypatch.setattr(first_use, "_turns", {})
    monkeypatch.setattr(first_use, "_compiling", {})
    dispatch.forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    choices.set_tuning(None)
    dispatch.forget()


class Times:
    """A clock that calls what it times once and says what it is told.

    Attributes:
        us: candidate -> microseconds; 100 for any other.
        timed: the candidates, in the order of their samples.
    """

    def __init__(self, **us):
        self.us = {BASELINE: us.pop("two", 100.0), NATIVE: us.pop("native", 100.0), **us}
        self.timed = []

    def __call__(self):
        return self

    def prepare(self, name, call):
        pass

    def time(self, name, call, calls):
        self.timed.append(name)
        call()
        return self.us.get(name, 100.0) * 1e-6 * calls


@pytest.fixture
def times(measuring, monkeypatch):
    """Put made-up times in place of the CPU's clock."""

    def put(**us):
        clock = Times(**us)
        monkeypatch.setattr(timing, "CpuClock", clock)
        return clock

    return put
