"""Every family of kernels defines what dispatch asks of it, and none is forgotten in the list."""

import importlib
import inspect
import pkgutil

import pytest

from maestro_kernels import backends, problem


def names(protocol):
    found = {n for n in dir(protocol) if not n.startswith("_")}
    return found | set(getattr(protocol, "__annotations__", {}))


def parameters(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("family", backends.FAMILIES)
def test_a_family_defines_the_protocol(family):
    module = importlib.import_module(f"maestro_kernels.backends.{family}")
    protocol = backends.Kernels if family in backends.KERNELS else backends.Backend
    for name in names(protocol):
        assert hasattr(module, name), f"{family} has no {name}"
        expected = getattr(protocol, name, None)
        if inspect.isfunction(expected):
            own = parameters(getattr(module, name))
            assert own[: len(parameters(expected)) - 1] == parameters(expected)[1:]


def test_every_module_that_runs_calls_is_in_the_list():
    for info in pkgutil.iter_modules(backends.__path__):
        module = importlib.import_module(f"maestro_kernels.backends.{info.name}")
        runs = hasattr(module, "forward") and hasattr(module, "unsupported")
        assert runs == (info.name in backends.FAMILIES), info.name
    assert set(backends.FAMILIES) < set(problem.BACKENDS)
