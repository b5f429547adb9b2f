import dataclasses

import pytest
import torch
import torch.nn.functional as F
from benchmark_support import CASE, GROUP, provider, two, without_bias

from maestro_kernels import hardware
from maestro_kernels.backends import native
from maestro_kernels.benchmark.providers import default_providers
from maestro_kernels.benchmark.run import Options, _time, run, run_case
from maestro_kernels.measure import accuracy, timing
from maestro_kernels.measure.providers import (
    Provider,
    Unavailable,
    make_case_inputs,
    two_forward,
)
from maestro_kernels.measure.timing import CpuClock

DEVICE = hardware.Device(
    "cpu", "test", "none", 1, bandwidth=1e10, peak_flops=(("float32", 1e11), ("bfloat16", 1e11))
)
FAST = Options(seconds=0.01, ring_bytes=1 << 16, compiled=False)


def rows_of(case, providers, options=FAST):
    return run_case(case, providers, DEVICE, "2026-01-01T00:00:00+00:00", options)


def rank_off_by_one(i):
    return two_forward(i.x, i.us, i.vs, i.biases, [i.ranks[0] - 1])


def one_wrong_element(i):
    (y,) = two(i)
    y = y.clone()
    y[-1, -1] += 1e-3
    return [y]


def one_nan(i):
    (y,) = two(i)
    y = y.clone()
    y[0, 0] = float("nan")
    return [y]


@pytest.mark.parametrize("wrong", [without_bias, rank_off_by_one, one_wrong_element, one_nan])
def test_a_wrong_provider_gets_a_failed_row_without_a_time(wrong):
    rows = rows_of(CASE, [provider("two matmuls", two), provider("wrong", wrong, family="ours")])
    gates = {row.provider: row.gate for row in rows}
    assert gates == {"two matmuls": "passed", "wrong": "failed"}
    failed = [row for row in rows if row.provider == "wrong"]
    assert len(failed) == 2
    for row in failed:
        assert row.times is None
        assert row.speedup is None
        assert "error: expected <=" in row.reason


def test_a_wrong_copy_in_the_ring_is_refused_in_the_cold_row_only():
    def bind(case, ring):
        right = [lambda i=i: two(i) for i in ring[:-1]]
        return [*right, lambda: one_nan(ring[-1])] if right else [lambda: two(ring[-1])]

    rows = rows_of(CASE, [Provider("stale pack", "ours", bind)])
    assert {row.cache: row.gate for row in rows} == {"warm": "passed", "cold": "failed"}


def test_a_wrong_gradient_is_refused():
    def detached_rank(i):
        # Right output, but component 0 of v gets no gradient.
        v = torch.cat([i.vs[0][:1].detach(), i.vs[0][1:]])
        return [F.linear(F.linear(i.x, v[:7]), i.us[0][:, :7], i.biases[0])]

    case = dataclasses.replace(CASE, mode="training")
    rows = rows_of(case, [provider("two matmuls", two), provider("wrong", detached_rank)])
    assert {row.provider: row.gate for row in rows} == {"two matmuls": "passed", "wrong": "failed"}
    assert all(
        "gradient of the (8, 16) parameter: " in row.reason
        for row in rows
        if row.provider == "wrong"
    )


def test_refusals_and_errors_are_rows_and_do_not_stop_the_others():
    def unavailable(case, ring):
        raise Unavailable("needs another machine")

    def broken(i):
        raise RuntimeError("compiler: no such flag\nwith details")

    def nameless(i):
        raise KeyError("getpwuid(): uid not found: 0")

    rows = rows_of(
        CASE,
        [
            Provider("elsewhere", "ours", unavailable),
            provider("broken", broken),
            provider("nameless", nameless),
            provider("two matmuls", two),
        ],
    )
    found = {row.provider: (row.gate, row.reason) for row in rows}
    assert found["elsewhere"] == ("unavailable", "needs another machine")
    assert found["broken"] == ("error", "RuntimeError: compiler: no such flag")
    assert found["nameless"] == ("error", "KeyError: 'getpwuid(): uid not found: 0'")
    assert found["two matmuls"][0] == "passed"


class PickyClock(CpuClock):
    """Stands in for graph capture, which some calls do not survive."""

    def prepare(self, name, call):
        if name == "two matmuls":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_launch_modes_are_rows_and_what_cannot_be_captured_says_so(monkeypatch):
    clocks = {"eager": CpuClock, "graph": PickyClock}
    made = {name: clock() for name, clock in clocks.items()}
    monkeypatch.setattr("maestro_kernels.benchmark.run.launch_modes", lambda *a: made)
    rows = rows_of(CASE, [provider("two matmuls", two), provider("other", two)])
    found = {(r.provider, r.launch): (r.gate, r.reason) for r in rows if r.cache == "warm"}
    assert [key for key, (gate, _) in found.items() if gate == "passed"] == [
        ("two matmuls", "eager"),
        ("other", "eager"),
        ("other", "graph"),
    ]
    reason = "cannot be captured: operation not permitted when stream is capturing"
    assert found["two matmuls", "graph"] == ("unavailable", reason)


def test_cold_rows_walk_through_the_ring_and_warm_rows_do_not():
    seen = {"warm": set(), "cold": set()}
    for cache in seen:

        def spy(i, cache=cache):
            seen[cache].add(i.vs[0].data_ptr())
            return two(i)

        options = dataclasses.replace(FAST, caches=(cache,), ring_bytes=1 << 14)
        (row,) = rows_of(CASE, [provider("two matmuls", spy)], options)
        assert row.cache == cache
        size = 4 * (5 * 16 + 24 * 8 + 8 * 16)
        copies = -(-(1 << 14) // size)
        assert row.ring_bytes == (copies * size if cache == "cold" else 0)
        assert len(seen[cache]) == (copies if cache == "cold" else 1)


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("case", [CASE, GROUP], ids=["single", "group"])
def test_every_default_provider_reports(case, mode):
    case = dataclasses.replace(case, mode=mode)
    rows = rows_of(case, default_providers(case))
    by_name = {row.provider: row for row in rows if row.cache == "warm"}
    timed = {"dense", "two matmuls", "ours"}
    small = "native: fused" if native.load_error() is None else "matmul: two matmuls"
    if mode == "forward":
        timed |= {"ours, prepacked"} | ({"ours, prepacked fused"} if "native" in small else set())
    if mode == "forward" and torch.backends.mkldnn.is_available():
        timed |= {"dense, oneDNN packed", "two matmuls, oneDNN packed"}
    if case is not CASE and len(case.layers) > 1:
        timed |= {"ours, ungrouped"}
    assert {name for name, row in by_name.items() if row.gate == "passed"} >= timed
    assert not [row for row in rows if row.gate in ("failed", "error")]
    for row in rows:
        assert (row.times is None) == bool(row.reason)
    # What trains alone has torch's own gradient, which costs a small call less than ours.
    by_torch = mode == "training" and len(case.layers) == 1
    assert by_name["ours"].config == ("matmul: two matmuls" if by_torch else small)
    if mode == "forward":
        assert by_name["ours, prepacked"].config.startswith("prepacked: ")
    else:
        assert by_name["ours, prepacked"].reason == "packed weights have no gradient"
    assert by_name["ours"].baseline.startswith("two matmuls")
    assert by_name["ours, triton"].reason == (
        "triton kernels need a CUDA device; the interpreter is not timed"
    )
    ours = by_name["ours"]
    form = case.cost("fused")
    assert ours.tflops * 1e12 * ours.p50_us * 1e-6 == pytest.approx(form.flops)
    assert ours.gbs * 1e9 * ours.p50_us * 1e-6 == pytest.approx(form.bytes)
    ideal = form.seconds(DEVICE, "float32")
    assert ours.roofline == pytest.approx(ideal / (ours.p50_us * 1e-6))


@pytest.mark.slow
def test_compiled_baselines_pass_their_gate():
    chosen = [p for p in default_providers(CASE) if p.name.endswith("compiled")]
    assert len(chosen) == 2
    rows = rows_of(CASE, chosen, dataclasses.replace(FAST, compiled=True, caches=("cold",)))
    assert [row.gate for row in rows] == ["passed", "passed"]


def test_run_measures_the_device_and_reports_progress():
    seen = []
    rows = list(run([CASE], FAST, on_case=seen.append))
    assert seen == [CASE]
    assert len({row.run for row in rows}) == 1
    assert rows[0].device["source"] == "measured"
    assert rows[0].device["bandwidth"] > 1e8
    assert rows[0].threads == torch.get_num_threads()
    assert rows[0].versions["torch"] == torch.__version__


def test_on_a_gpu_what_is_cold_is_flushed_and_what_is_warm_is_not(monkeypatch):
    monkeypatch.setattr(hardware, "current_device", lambda device: hardware.H100)
    assert accuracy.flush_bytes(torch.device("cuda")) == 2 * hardware.H100.l2_bytes
    assert accuracy.flush_bytes(torch.device("cpu")) == 0
    asked = []
    monkeypatch.setattr(
        "maestro_kernels.benchmark.run.flush_bytes", lambda device: asked.append(device) or 7
    )
    monkeypatch.setattr(
        "maestro_kernels.benchmark.run.launch_modes",
        lambda device, flush: asked.append(flush) or {"eager": CpuClock()},
    )
    rows_of(CASE, [provider("two matmuls", two)])
    assert sorted(a for a in asked if isinstance(a, int)) == [0, 7]
    found = timing.launch_modes("cuda", 5)
    assert list(found) == ["eager", "graph"]
    assert all(clock._flush._size == 5 for clock in found.values())
    assert isinstance(timing.launch_modes("cpu", 5)["eager"], CpuClock)


def test_a_flushed_sample_has_no_more_calls_than_copies_of_the_weights():
    class Flushing:
        def prepare(self, name, call):
            pass

        def time(self, name, call, calls):
            return 1e-6 * calls

    inputs = make_case_inputs(CASE, "cpu")
    ring = [inputs, inputs.copy()]
    bounds = {"two": provider("two matmuls", two).bound(CASE, ring)}
    for cold, clock, few in ((True, Flushing(), True), (False, Flushing(), False),
                             (True, CpuClock(), False)):  # fmt: skip
        stats, _ = _time(bounds, cold, clock, 0.0)
        assert (stats["two"].calls <= 2) == few
