import dataclasses

import pytest
import torch
import torch.nn.functional as F

from maestro_kernels import hardware
from maestro_kernels.backends import native
from maestro_kernels.benchmark.cases import (
    CPU_FLOP_LIMIT,
    MODELS,
    SUITES,
    Case,
    Layer,
    parse_shape,
    suite,
)
from maestro_kernels.benchmark.providers import (
    Provider,
    Unavailable,
    default_providers,
    make_case_inputs,
    two_forward,
)
from maestro_kernels.benchmark.run import (
    Options,
    Reference,
    _References,
    _time,
    checked,
    gate,
    run,
    run_case,
)
from maestro_kernels.measure.timing import CpuClock

DEVICE = hardware.Device(
    "cpu", "test", "none", 1, bandwidth=1e10, peak_flops=(("float32", 1e11), ("bfloat16", 1e11))
)
CASE = Case("test", 5, (Layer(24, 16, 8, 7),), bias=True)
GROUP = Case("test", 3, (Layer(24, 16, 8, 7), Layer(8, 16, 4, 4)), bias=True)
FAST = Options(seconds=0.01, ring_bytes=1 << 16, compiled=False)


def rows_of(case, providers, options=FAST):
    return run_case(case, providers, DEVICE, "2026-01-01T00:00:00+00:00", options)


def two(i):
    return two_forward(i.x, i.us, i.vs, i.biases, i.ranks)


def provider(name, forward, family="two matmuls", trains=True):
    def bind(case, ring):
        return [lambda i=i: forward(i) for i in ring]

    return Provider(name, family, bind, trains)


def without_bias(i):
    return two_forward(i.x, i.us, i.vs, [None] * len(i.us), i.ranks)


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


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_lucky_baseline_does_not_refuse_what_rounds_well(mode):
    # All of y rests on one sum of many terms, which a baseline may happen to round well.
    layers = (Layer(40, 4096, 8, 1), Layer(24, 4096, 6, 1))
    case = Case("test", 1, layers, bias=True, mode=mode)
    inputs = make_case_inputs(case, "cpu")
    with torch.set_grad_enabled(mode == "training"):
        found = _References(case, inputs)["ours"]
        (bound,) = provider("two matmuls", two).bound(case, [inputs])
        rounding = found.rounding()
        assert [e.shape for e in rounding] == [e.shape for e in found.exact]

        class Fair(type(bound)):
            """As far off as rounding alone may be."""

            def __call__(self):
                pairs = zip(found.exact, rounding, strict=True)
                return [(ref + e).float() for ref, e in pairs]

        fair = Fair(bound.forward, bound.leaves, bound.dys)
        lucky = Reference([e.float() for e in found.exact], found.exact)
        assert "error: expected <=" in gate(fair, lucky)
        lucky = dataclasses.replace(lucky, rounding=found.rounding)
        assert gate(fair, lucky) is None
        assert gate(bound, lucky) is None
        one = dataclasses.replace(inputs, biases=tuple(b + 1e-3 for b in inputs.biases))
        (wrong,) = provider("wrong", two).bound(case, [one])
        assert "y[0]: max error" in gate(wrong, lucky)


def test_refusals_and_errors_are_rows_and_do_not_stop_the_others():
    def unavailable(case, ring):
        raise Unavailable("needs another machine")

    def broken(i):
        raise RuntimeError("compiler: no such flag\nwith details")

    rows = rows_of(
        CASE,
        [
            Provider("elsewhere", "ours", unavailable),
            provider("broken", broken),
            provider("two matmuls", two),
        ],
    )
    found = {row.provider: (row.gate, row.reason) for row in rows}
    assert found["elsewhere"] == ("unavailable", "needs another machine")
    assert found["broken"] == ("error", "RuntimeError: compiler: no such flag")
    assert found["two matmuls"][0] == "passed"


class PickyClock(CpuClock):
    """Stands in for graph capture, which some calls do not survive."""

    def prepare(self, name, call):
        if name == "two matmuls":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_launch_modes_are_rows_and_what_cannot_be_captured_says_so(monkeypatch):
    clocks = {"eager": CpuClock, "graph": PickyClock}
    monkeypatch.setattr(Options, "launches", property(lambda self: tuple(clocks)))
    monkeypatch.setattr(Options, "clock", lambda self, launch, cache: clocks[launch]())
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
    assert by_name["ours"].config == small
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


def test_checked_serves_other_timers():
    inputs = make_case_inputs(CASE, "cpu")
    with torch.no_grad():
        call, problem = checked(CASE, provider("two matmuls", two), inputs)
        assert problem is None
        torch.testing.assert_close(call()[0], two(inputs)[0])
        _, problem = checked(CASE, provider("wrong", without_bias), inputs)
    assert "expected <=" in problem


def test_run_measures_the_device_and_reports_progress():
    seen = []
    rows = list(run([CASE], FAST, on_case=seen.append))
    assert seen == [CASE]
    assert len({row.run for row in rows}) == 1
    assert rows[0].device["source"] == "measured"
    assert rows[0].device["bandwidth"] > 1e8
    assert rows[0].threads == torch.get_num_threads()
    assert rows[0].versions["torch"] == torch.__version__


@pytest.mark.parametrize("name", SUITES)
def test_suites_have_no_duplicates_and_fit_a_cpu(name):
    cases = suite(name)
    assert len({case.id for case in cases}) == len({(c.id, c.bias) for c in cases})
    assert len(cases) == len(set(cases))
    assert all(case.cost("dense").flops <= CPU_FLOP_LIMIT for case in cases)
    assert {case.op for case in cases} == {"lod_linear", "lod_linear_grouped"}
    assert {case.mode for case in cases} == {"forward", "training"}


def test_full_suite_covers_the_contract_on_a_gpu():
    cases = suite("full", device_type="cuda")
    assert {1, 32768} <= {case.M for case in cases}
    ranks = {layer.rank for case in cases for layer in case.layers}
    assert {16, 127, 200, 1024, 1488} <= ranks
    models = {case.source.split()[0] for case in cases}
    assert {
        *("Llama-2-7B", "Llama-3-8B", "Qwen2.5-7B", "GPT-2"),
        *("ViT-B", "ViT-L", "MiniLM-L6", "ResNet-50"),
    } <= models


def test_suite_options():
    cases = suite("quick", dtypes=["bfloat16"], modes=["forward"])
    assert {(case.dtype, case.mode) for case in cases} == {("bfloat16", "forward")}
    with pytest.raises(ValueError, match=r"suite: name: expected one of .*, got 'huge'"):
        suite("huge")


def test_ids_come_from_the_values():
    assert CASE.id == "M5-N24-K16-R8-r7-float32-forward-bias"
    assert GROUP.id == "2x-M3-N24+8-K16-R8+4-r7+4-float32-forward-bias"
    case = MODELS["Llama-3-8B q/k/v"].case(1, 128, dtype="bfloat16")
    assert [(s.N, s.K, s.R) for s in case.layers] == [
        (4096, 4096, 128),
        (1024, 4096, 128),
        (1024, 4096, 128),
    ]


def test_shapes_are_parsed_and_refused():
    assert parse_shape("16,64,32,8").layers == (Layer(64, 32, 8, 8),)
    assert parse_shape("16, 64,32,8,0", dtype="bfloat16").layers == (Layer(64, 32, 8, 0),)
    for text in ("1,2,3", "1,2,3,4,5,6", "1,2,3,x", "1,2,3,-4"):
        with pytest.raises(ValueError, match=r"parse_shape: text: expected M,N,K,R\[,rank\], got"):
            parse_shape(text)
    with pytest.raises(ValueError, match=r"Layer: N, K, R, rank: expected .* got"):
        parse_shape("1,2,3,4,5")
    with pytest.raises(ValueError, match="Case: M, layers: expected M >= 1"):
        parse_shape("0,2,3,4")


def test_on_a_gpu_what_is_cold_is_flushed_and_what_is_warm_is_not(monkeypatch):
    monkeypatch.setattr(hardware, "current_device", lambda device: hardware.H100)
    options = Options("cuda")
    assert options.launches == ("eager", "graph")
    sizes = {
        (launch, cache): options.clock(launch, cache)._flush._size
        for launch in options.launches
        for cache in ("cold", "warm")
    }
    twice = 2 * hardware.H100.l2_bytes
    assert sizes == {(a, b): twice * (b == "cold") for a, b in sizes}
    assert isinstance(Options("cpu").clock("eager", "cold"), CpuClock)


def test_a_flushed_sample_has_no_more_calls_than_copies_of_the_weights():
    class Flushing:
        def prepare(self, name, call):
            pass

        def time(self, name, call, calls):
            return 1e-6 * calls

    ring = [make_case_inputs(CASE, "cpu", seed=s) for s in range(2)]
    bounds = {"two": provider("two", two).bound(CASE, ring)}
    for cold, clock, few in ((True, Flushing(), True), (False, Flushing(), False),
                             (True, CpuClock(), False)):  # fmt: skip
        stats, _ = _time(bounds, cold, clock, 0.0)
        assert (stats["two"].calls <= 2) == few
