"""The checks of the GPU run on the stub device: right kernels pass, and every check can fail."""

import itertools

import pytest
import torch

from bench.gpu import checks, suite, worker
from bench.gpu.device import Skip, Stub
from bench.gpu.force import Runner
from bench.gpu.plan import STAGES
from bench.gpu.worker import run_item
from maestro_kernels.backends import native
from maestro_kernels.testing import make_inputs

KEY = [case.id for case in suite.key()]
CASES = {case.id for case in suite.cases()}
needs_library = pytest.mark.skipif(native.load_error() is not None, reason="no compiled library")
# Of the cases one layer and one group: the interpreter takes a second for each.
SHOWN = {KEY[0], KEY[6]}


def items(device, family):
    found = checks.items(device, None, family)
    return [item for item in found if item.name not in CASES or item.name in SHOWN]


def names(family):
    return [item.name for item in items(Stub(), family)]


def run(family, name):
    device = Stub()
    (item,) = (item for item in items(device, family) if item.name == name)
    return run_item(device, item, f"checks/{family}")


@pytest.mark.parametrize("name", names("triton-two_phase"))
@pytest.mark.parametrize("family", ["triton-two_phase", "triton-row"])
def test_triton_kernels_pass_in_the_interpreter(family, name):
    record = run(family, name)
    assert record["outcome"] in ("passed", "skipped"), record
    if record["outcome"] == "skipped":
        assert "row" in family or "12 GiB" in record["note"], record


@needs_library
@pytest.mark.parametrize("name", names("auto"))
@pytest.mark.parametrize("family", ["native-decode", "auto"])
def test_the_library_and_auto_pass(family, name):
    if name in names(family):
        assert run(family, name)["outcome"] in ("passed", "skipped")


@needs_library
@pytest.mark.parametrize("name", names("native-decode"))
def test_every_check_notices_one_wrong_element(name, monkeypatch):
    monkeypatch.setenv("MK_GPU_PLANT", '{"*": "wrong"}')
    record = run("native-decode", name)
    if "12 GiB" in record["note"]:
        pytest.skip(record["note"])
    assert record["outcome"] == "failed", record
    assert "AssertionError" in record["note"]


@needs_library
def test_a_check_that_raises_fails_and_a_broken_context_is_lost(monkeypatch):
    name = KEY[0]
    monkeypatch.setenv("MK_GPU_PLANT", '{"checks/auto/*": "raise"}')
    record = run("auto", name)
    assert (record["outcome"], record["note"][:12]) == ("failed", "RuntimeError")
    monkeypatch.setenv("MK_GPU_PLANT", '{"checks/auto/*": "sticky"}')
    record = run("auto", name)
    assert record["outcome"] == "lost"
    assert "then every call fails: CUDA error" in record["note"]


def test_a_strategy_that_does_not_take_a_call_says_so():
    device = Stub()
    group = next(i for i in checks.items(device, None, "triton-row") if i.name.startswith("groups"))
    with pytest.raises(Skip, match="triton does not take this call by row"):
        group.run()


def test_shards_together_are_the_family_and_a_kernel_that_was_compiled_is_a_sign_of_life():
    device, stage = Stub(), STAGES["checks"]
    whole = [item.name for item in worker.items_of(device, stage, "triton-row")]
    parts = [[i.name for i in worker.items_of(device, stage, f"triton-row.{k}")] for k in range(3)]
    assert sorted(itertools.chain(*parts)) == sorted(whole)
    assert [part[0] for part in parts] == whole[:3]
    pytest.importorskip("triton")
    from triton import knobs

    said, hook = [], knobs.runtime.kernel_load_end_hook
    before = list(hook.calls)
    worker._tell_of_kernels(lambda **line: said.append(line))
    try:
        hook(None, None, "two_phase_kernel", {}, "hash")
    finally:
        hook.calls[:] = before
    assert said == [{"alive": "two_phase_kernel"}]


def test_outputs_land_where_nan_was(monkeypatch):
    filled, full = [], torch.full
    monkeypatch.setattr(torch, "full", lambda *a, **o: filled.append(a) or full(*a, **o))
    x, u, v, b = make_inputs(3, 5, 8, 4)
    (y,) = Runner(Stub(), "auto")(x, [u], [v], [b], [4])
    assert y.isfinite().all()
    ((shape, value),) = filled
    assert shape == (3, 5)
    assert value != value
