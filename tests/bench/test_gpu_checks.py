"""The checks of the GPU run on the stub device: right kernels pass, and every check can fail."""

import pytest

from bench.gpu import checks, suite
from bench.gpu.device import Skip, Stub
from bench.gpu.worker import run_item
from maestro_kernels.backends import native

CASES = {case.id for case in suite.cases()}
needs_library = pytest.mark.skipif(native.load_error() is not None, reason="no compiled library")
# Of the cases one layer and one group: the interpreter takes a second for each.
SHOWN = {suite.key()[0].id, suite.key()[6].id}


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
    name = names("auto")[0]
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
