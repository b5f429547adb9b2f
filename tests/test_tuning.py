"""set_tuning, tune and use_choices: measuring ahead of time, and for other processes."""

import json
import subprocess
import sys

import pytest
import torch
from first_use_support import measuring, times  # noqa: F401 - fixtures

import maestro_kernels as mk
from maestro_kernels import dispatch
from maestro_kernels.backends import native

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason=str(native.load_error()))


def model():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(160, 192), torch.nn.Tanh(), torch.nn.Linear(192, 96)]
    return mk.convert(torch.nn.Sequential(*layers), 32, allow_larger=True).eval()


def test_tune_measures_every_kind_of_call_of_a_model(times):  # noqa: F811
    clock = times(native=10)
    made, x = model(), torch.randn(8, 160)
    found = mk.tune(made, x)
    assert sorted(found) == ["cpu"]
    kinds = [record["bucket"] for record in found["cpu"]]
    assert len(kinds) == len(set(kinds)) == 2
    assert all(kind.startswith("forward eager float32 M≤8") for kind in kinds)
    clock.timed.clear()
    with torch.no_grad():
        made(x)
    assert not clock.timed
    assert mk.tune(made, x) == found  # known, and so nothing to wait for
    assert not clock.timed
    assert [r["bucket"].split()[0] for r in mk.tune(made.train(), x)["cpu"]] == ["training"] * 2
    assert all(p.grad is None for p in made.parameters())


def test_what_tune_measured_serves_deterministic_runs(times):  # noqa: F811
    times(native=10)
    made, x = model(), torch.randn(8, 160)
    u, v = made[0].u.detach(), made[0].v.detach()
    b = made[0].bias.detach()
    torch.use_deterministic_algorithms(True)
    try:
        assert mk.explain(x, u, v, b).plan.backend == "matmul"
        torch.use_deterministic_algorithms(False)
        mk.tune(made, x)
        torch.use_deterministic_algorithms(True)
        assert mk.explain(x, u, v, b).plan.backend == "native"
    finally:
        torch.use_deterministic_algorithms(False)


def test_long_calls_are_measured_too(times, monkeypatch):  # noqa: F811
    from maestro_kernels.ops import first_use

    clock = times(native=10)
    monkeypatch.setattr(first_use, "_LONG_FLOP", 0)
    mk.tune(model(), torch.randn(8, 160))
    assert clock.timed


def test_another_process_takes_what_one_measured(times, tmp_path):  # noqa: F811
    times(native=10)
    found = mk.tune(model(), torch.randn(8, 160))
    script = """
import json, sys, torch, maestro_kernels as mk
mk.set_tuning("table")
mk.use_choices(json.load(sys.stdin))
x, u, v, b = torch.randn(8, 160), torch.randn(192, 32), torch.randn(32, 160), torch.randn(192)
torch.set_num_threads(int(sys.argv[1]))
print(mk.explain(x, u, v, b).plan.backend, mk.explain(x[:4], u, v, b).plan.backend)
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(torch.get_num_threads())],
        input=json.dumps(found), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.split() == ["native", "matmul"]


def test_the_mode_is_as_it_was_after_tune(measuring):  # noqa: F811
    mk.set_tuning("off")
    mk.tune(model(), torch.randn(8, 160))
    assert dispatch.choices.tuning() == "off"
    mk.set_tuning(None)
    assert dispatch.choices.tuning() == "first-use"


def test_wrong_arguments_are_named(measuring):  # noqa: F811
    with pytest.raises(ValueError, match="set_tuning: mode: expected one of off, table, first-use"):
        mk.set_tuning("on")
    with pytest.raises(TypeError, match="tune: model"):
        mk.tune(3, torch.randn(8, 160))
    with pytest.raises(TypeError, match="use_choices: found: expected a dict, got list"):
        mk.use_choices([])
    with pytest.raises(ValueError, match="use_choices: found: expected device types"):
        mk.use_choices({"tpu": []})
    good = mk.tune(model(), torch.randn(8, 160))["cpu"]
    with pytest.raises(ValueError, match=r"use_choices: found\['cpu'\]\[1\]: expected the fields"):
        mk.use_choices({"cpu": [good[0], {}]})
