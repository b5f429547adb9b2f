"""Measuring at first use: what is measured, when, what it decides, and what it leaves alone."""

import threading
from dataclasses import replace

import pytest
import torch
from first_use_support import NATIVE, Times, measuring, times  # noqa: F401 - fixtures
from torch.utils.checkpoint import checkpoint

import maestro_kernels as mk
from maestro_kernels import choices, dispatch, hardware, plans
from maestro_kernels.backends import matmul, native
from maestro_kernels.call import Call
from maestro_kernels.measure import timing
from maestro_kernels.ops import eager, first_use
from maestro_kernels.tables import BASELINE, Mode
from maestro_kernels.testing import make_inputs

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason=str(native.load_error()))
# Large enough that no fixed rule takes the native library.
X, U, V, B = make_inputs(8, 192, 160, 32)


@pytest.fixture
def ran(monkeypatch):
    """The backends that run calls, in order, while nothing is being measured."""
    found = []
    for module in (matmul, native):
        name = module.__name__.rpartition(".")[2]

        def forward(call, *, save_h, strategy, real=module.forward, name=name):
            if not first_use._measuring.locked():
                found.append(name)
            return real(call, save_h=save_h, strategy=strategy)

        monkeypatch.setattr(module, "forward", forward)
    return found


def counted(monkeypatch):
    """The races that are run from now on."""
    real, found = timing.race, []
    monkeypatch.setattr(
        timing, "race", lambda calls, **k: found.append(list(calls)) or real(calls, **k)
    )
    return found


# --- what it decides ---------------------------------------------------------------------------


@pytest.mark.parametrize(("two", "ours", "backend"), [(100, 50, "native"), (50, 100, "matmul")])
def test_auto_runs_what_was_fastest_when_the_kind_of_call_was_met(times, two, ours, backend):  # noqa: F811
    clock = times(two=two, native=ours)
    y = mk.lod_linear(X, U, V, B, rank=12)
    assert set(clock.timed) == {BASELINE, NATIVE}
    assert torch.equal(y, mk.lod_linear(X, U, V, B, rank=12, backend=backend))
    plan = mk.explain(X, U, V, B, rank=12).plan
    assert plan.backend == backend
    assert not plan.rivals
    assert "measured here at first use" in plan.reason
    assert ("2.00 times as fast" in plan.reason) == (backend == "native")


def test_two_matmuls_stay_where_the_gain_is_small(times):  # noqa: F811
    times(two=100, native=99)
    mk.lod_linear(X, U, V)
    assert mk.explain(X, U, V).plan.backend == "matmul"


def test_close_calls_are_not_kept(times, measuring):  # noqa: F811
    def kept():
        return [line for f in measuring.rglob("*.jsonl") for line in f.read_text().splitlines()[1:]]

    times(two=100, native=99)
    mk.lod_linear(X, U, V)
    assert not kept()
    times(two=100, native=50)
    mk.lod_linear(X[:4], U, V)
    assert len(kept()) == 1


def test_explain_measures_nothing_and_says_what_the_first_call_will(times):  # noqa: F811
    clock = times()
    text = str(mk.explain(X, U, V, B))
    assert "measures  native: fused against two matmuls at the first such call" in text
    assert not clock.timed


def test_real_clocks_measure_once_and_choose_one_of_the_candidates(measuring, monkeypatch):  # noqa: F811
    races = counted(monkeypatch)
    x, u, v, bias = make_inputs(16, 64, 72, 24)
    expected = mk.lod_linear(x, u, v, bias, backend="reference")
    for _ in range(3):
        torch.testing.assert_close(mk.lod_linear(x, u, v, bias), expected, rtol=1e-4, atol=1e-4)
    assert races == [[BASELINE, NATIVE]]
    assert "measured here" in mk.explain(x, u, v, bias).plan.reason


def test_groups_are_measured_as_groups(times):  # noqa: F811
    clock = times(native=10)
    ys = mk.lod_linear_grouped(X, [U, U[:7]], [V, V], ranks=[16, 3])
    assert clock.timed
    forced = mk.lod_linear_grouped(X, [U, U[:7]], [V, V], ranks=[16, 3], backend="native")
    assert all(map(torch.equal, ys, forced))


@pytest.mark.parametrize("long", [False, True])
def test_registered_ops_are_measured_too_and_then_planned_once(times, monkeypatch, long):  # noqa: F811
    """As torch.compile calls them: their plan must not be made anew for every call."""
    from maestro_kernels.ops import registered

    clock, planned = times(native=10), []
    if long:
        monkeypatch.setattr(first_use, "_LONG_FLOP", 0)
    real = dispatch.plan_afresh
    monkeypatch.setattr(dispatch, "plan_afresh", lambda *a: planned.append(a) or real(*a))
    call = Call("lod_linear", (X,), (U,), (V,), (B,), (12,), (None,))
    for train in (False, True):
        for _ in range(10):
            registered.run(call, None, train)
        count = len(planned)
        registered.run(call, None, train)
        assert len(planned) == count
    assert bool(clock.timed) != long
    assert "measured here" in mk.explain(X, U, V, B, rank=12).plan.reason


# --- kinds of call -----------------------------------------------------------------------------


def test_each_mode_is_measured_by_itself(times, ran):  # noqa: F811
    times(native=10)
    mk.lod_linear(X, U, V, B)
    u = U.clone().requires_grad_()
    times(native=1000)
    mk.lod_linear(X, u, V, B).sum().backward()
    assert u.grad is not None
    assert ran == ["native", "matmul"]
    with torch.no_grad():
        assert mk.explain(X, u, V, B).plan.backend == "native"


def test_what_is_timed_in_training_is_forward_and_backward(times, monkeypatch):  # noqa: F811
    times()
    backwards = []
    real = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **k: backwards.append(len(a[1])) or real(*a, **k)
    )
    mk.lod_linear(X, U.clone().requires_grad_(), V, B.clone().requires_grad_())
    assert set(backwards) == {2}


def test_training_with_a_new_rank_each_step_settles(measuring, monkeypatch):  # noqa: F811
    races = counted(monkeypatch)
    monkeypatch.setattr(timing, "CpuClock", Times(native=10))
    layer = mk.LoDLinear.from_factors(torch.randn(192, 64), torch.randn(64, 160))
    for step in range(3 * 64):
        layer.rank = 1 + step % 64
        layer(X).sum().backward()
    # 1, 2, 3, 4, 6, 8, 12, ..., 64
    assert len(races) == 12
    before = len(races)
    for M in (5, 6, 7, 8):
        layer.rank = 33
        layer(torch.randn(M, 160)).sum().backward()
    assert len(races) == before


def test_sizes_types_and_layout_are_other_kinds(times):  # noqa: F811
    def kind(*args, **kwargs):
        return mk.explain(*args, **kwargs).plan.bucket

    same = kind(X, U, V, rank=11)
    assert kind(X[:5], U, V, rank=12) == same
    others = [
        kind(X[:4], U, V, rank=12),
        kind(X, U, V, rank=13),
        kind(X, U[:88], V, rank=12),
        kind(X[:, :72], U, V[:, :72], rank=12),
        kind(X, U, V, B, rank=12),
        kind(X, U, V, rank=12, activation="gelu"),
        kind(X.bfloat16(), U.bfloat16(), V.bfloat16(), rank=12),
        kind(X, U.clone().requires_grad_(), V, rank=12),
        kind(X, U, V, rank=torch.tensor(12, dtype=torch.int32)),
        kind(X.T.contiguous().T, U, V, rank=12),
        kind(X, [U, U], [V, V], rank=[12, 12]),
        kind([X, X], [U, U], [V, V], rank=[12, 12]),
    ]
    assert len({same, *others}) == 1 + len(others)


def test_rows_of_a_gpu_that_do_not_start_on_16_bytes_are_another_kind():
    problem = mk.explain(X, U, V).plan.problems[0]
    there = replace(problem, device=torch.device("cuda"))
    names = {
        choices.bucket([replace(there, **change)], Mode(), shared_x=True)
        for change in ({}, {"rank": 15}, {"aligned": False}, {"R": 17})
    }
    assert len(names) == 3  # both odd ones in one bucket but for the rank


# --- when nothing may be measured ----------------------------------------------------------------


@pytest.mark.parametrize("tuning", ["off", "table"])
def test_the_switch(times, monkeypatch, tuning):  # noqa: F811
    clock = times(native=10)
    mk.set_tuning(tuning)
    mk.lod_linear(X, U, V)
    mk.set_tuning("first-use")
    assert not clock.timed
    mk.lod_linear(X, U, V)
    assert clock.timed
    mk.set_tuning(tuning)
    # "table" still knows no more than tables: what was measured in passing is none.
    assert mk.explain(X, U, V).plan.backend == "matmul"
    monkeypatch.setenv("MAESTRO_KERNELS_TUNE", "sometimes")
    mk.set_tuning(None)
    with pytest.raises(ValueError, match="MAESTRO_KERNELS_TUNE: expected one of off, table"):
        mk.lod_linear(X, U, V)


def test_deterministic_runs_measure_nothing_and_use_nothing_that_was_measured(times, ran):  # noqa: F811
    clock = times(native=10)
    torch.use_deterministic_algorithms(True)
    try:
        mk.lod_linear(X, U, V)
        assert not clock.timed
        torch.use_deterministic_algorithms(False)
        mk.lod_linear(X, U, V)
        mk.lod_linear(X, U, V)
        torch.use_deterministic_algorithms(True)
        mk.lod_linear(X, U, V)
    finally:
        torch.use_deterministic_algorithms(False)
    # The second and later calls of a kind go by quick plans, which `ran` does not see natively.
    assert ran[0] == "matmul"
    assert mk.explain(X, U, V).plan.backend == "native"


def test_while_another_thread_measures_the_prediction_serves(times, ran):  # noqa: F811
    clock = times(native=10)
    with first_use._measuring:
        mk.lod_linear(X, U, V)
    assert not clock.timed
    mk.lod_linear(X, U, V)
    assert clock.timed
    assert mk.explain(X, U, V).plan.backend == "native"


def test_many_threads_meet_a_kind_of_call_at_once(measuring, monkeypatch):  # noqa: F811
    races = counted(monkeypatch)
    expected = mk.lod_linear(X, U, V, B, backend="reference")
    barrier, wrong = threading.Barrier(8), []

    def work():
        barrier.wait()
        for _ in range(20):
            y = mk.lod_linear(X, U, V, B)
            if not torch.allclose(y, expected, rtol=1e-4, atol=1e-4):
                wrong.append(y)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(races) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_runs_what_its_forward_ran(measuring, ran, monkeypatch, reentrant):  # noqa: F811
    """Without gradients and with them another strategy is fastest: the forward's must be kept."""

    class Swap(Times):
        def time(self, name, call, calls):
            fast = "matmul" if torch.is_grad_enabled() else "native"
            super().time(name, call, calls)
            return (10.0 if name.startswith(fast) else 100.0) * 1e-6 * calls

    monkeypatch.setattr(timing, "CpuClock", Swap())
    u, v = U.clone().requires_grad_(), V.clone().requires_grad_()
    x = X.clone().requires_grad_()
    for _ in range(2):
        y = checkpoint(lambda x: mk.lod_linear(x, u, v, B).relu(), x, use_reentrant=reentrant)
        y.sum().backward()
    assert set(ran) == {"native" if reentrant else "matmul"}
    assert len(ran) >= 2


def test_hooks_around_a_call_do_not_see_what_is_saved_while_measuring(times):  # noqa: F811
    times(native=10)
    packed = []
    u = U.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = mk.lod_linear(X, u, V, B)
    first = len(packed)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        mk.lod_linear(X, u, V, B)
    assert len(packed) == 2 * first
    y.sum().backward()


def test_no_gradient_of_the_program_is_touched(times):  # noqa: F811
    times(native=10)
    u = U.clone().requires_grad_()
    u.register_hook(lambda grad: pytest.fail("measuring reached a hook"))
    mk.lod_linear(X, u, V)
    assert u.grad is None


# --- candidates that fail ------------------------------------------------------------------------


def test_a_candidate_that_raises_is_left_out(times, monkeypatch):  # noqa: F811
    times(native=10)
    real = first_use._candidate

    def fails():
        raise MemoryError

    monkeypatch.setattr(
        first_use, "_candidate", lambda p, *a: fails if p.backend == "native" else real(p, *a)
    )
    y = mk.lod_linear(X, U, V)
    assert torch.equal(y, mk.lod_linear(X, U, V, backend="matmul"))
    assert mk.explain(X, U, V).plan.backend == "matmul"


def test_a_wrong_call_gets_its_own_error_and_nothing_is_remembered(measuring):  # noqa: F811
    freed = V.clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="storage of at least"):
        mk.lod_linear(X, U, freed)
    with pytest.raises(ValueError, match="lod_linear: v: expected shape"):
        mk.lod_linear(X, U, V[:, :7])


# --- long calls ----------------------------------------------------------------------------------


def test_long_calls_take_turns_and_their_own_times_decide(times, ran, monkeypatch):  # noqa: F811
    clock = times()
    monkeypatch.setattr(first_use, "_LONG_FLOP", 0)
    now, cost = [0.0], {"matmul": 5.0, "native": 1.0}
    monkeypatch.setattr(
        first_use.time, "perf_counter", lambda: now[0] + sum(cost[name] for name in ran)
    )
    for _ in range(8):
        mk.lod_linear(X, U, V)
    assert sorted(ran) == ["matmul"] * 4 + ["native"] * 4
    assert not clock.timed
    found = mk.explain(X, U, V).plan
    assert (found.backend, found.rivals) == ("native", ())
    assert "5.00 times as fast" in found.reason


@pytest.mark.parametrize("reentrant", [False, True])
def test_in_a_checkpoint_long_calls_take_no_turns(times, ran, monkeypatch, reentrant):  # noqa: F811
    times(native=10)
    monkeypatch.setattr(first_use, "_LONG_FLOP", 0)
    x, u = X.clone().requires_grad_(), U.clone().requires_grad_()
    for _ in range(12):
        checkpoint(lambda x: mk.lod_linear(x, u, V), x, use_reentrant=reentrant).sum().backward()
    assert set(ran) == {"matmul"}


def test_a_race_that_would_take_too_long_is_left_to_turns(times, ran, monkeypatch):  # noqa: F811
    times()
    monkeypatch.setattr(first_use, "_SECONDS", 0.0)
    for _ in range(8):
        mk.lod_linear(X, U, V)
    assert sorted(ran) == ["matmul"] * 4 + ["native"] * 4
    assert not mk.explain(X, U, V).plan.rivals
    assert not first_use._turns


# --- compiled kernels ----------------------------------------------------------------------------


def test_two_matmuls_serve_while_kernels_are_compiled(times, ran, monkeypatch):  # noqa: F811
    clock = times(native=10)
    monkeypatch.setattr(native, "COMPILES", True, raising=False)
    go, compiled = threading.Event(), []
    real = first_use._candidate

    def candidate(plan, call, save_h):
        if threading.current_thread().name != "maestro_kernels compile":
            return real(plan, call, save_h)
        return lambda: go.wait(10) and compiled.append(plan.backend)

    monkeypatch.setattr(first_use, "_candidate", candidate)
    for _ in range(3):
        mk.lod_linear(X, U, V)
    assert ran == ["matmul"] * 3
    assert not clock.timed
    go.set()
    for thread in first_use._compiling.values():
        thread.join()
    mk.lod_linear(X, U, V)
    assert compiled == ["native"]
    assert mk.explain(X, U, V).plan.backend == "native"


def test_a_process_compiles_for_so_many_kinds_and_then_predicts_once(times, monkeypatch):  # noqa: F811
    clock, planned = times(native=10), []
    monkeypatch.setattr(native, "COMPILES", True, raising=False)
    monkeypatch.setattr(first_use, "_MAX_COMPILED", 0)
    real = dispatch.plan_afresh
    monkeypatch.setattr(dispatch, "plan_afresh", lambda *a: planned.append(a) or real(*a))
    for _ in range(3):
        mk.lod_linear(X, U, V)
    assert not clock.timed
    assert not first_use._compiling
    assert len(planned) == 1


def test_a_race_that_tells_nothing_is_not_run_again(times, monkeypatch):  # noqa: F811
    times()
    races = []
    monkeypatch.setattr(
        timing, "race", lambda calls, **k: races.append(calls) or timing.Race({}, decided=False)
    )
    for _ in range(3):
        mk.lod_linear(X, U, V)
    assert len(races) == 1


# --- a recorded H100 -----------------------------------------------------------------------------


@pytest.fixture
def h100(times, monkeypatch):  # noqa: F811
    """Calls on CPU tensors that everything takes for calls on an H100."""
    monkeypatch.setattr(dispatch, "is_here", lambda device: True)
    monkeypatch.setattr(hardware, "current_device", lambda device="cpu": hardware.H100)
    for module, names in ((native, ("decode", "row")), (matmul, ())):
        monkeypatch.setattr(module, "STRATEGIES", {"cuda": names}, raising=False)
    monkeypatch.setattr(native, "unsupported", lambda problem: None)
    monkeypatch.setattr(native, "unsupported_group", lambda group: None)
    monkeypatch.setattr(native, "choose_strategy", lambda group: ("decode", "few rows"))
    monkeypatch.setattr(native, "takes", lambda strategy, group: True)
    triton = plans.backend_module("triton")
    monkeypatch.setattr(triton, "unsupported", lambda problem: "not in this test")
    real = dispatch.describe_call
    monkeypatch.setattr(
        dispatch,
        "describe_call",
        lambda call: tuple(replace(p, device=torch.device("cuda:0")) for p in real(call)),
    )
    monkeypatch.setattr(first_use, "_candidate", lambda plan, call, save_h: lambda: None)
    eager_clock, graph_clock = Times(two=20), Times(two=20)
    eager_clock.us |= {"native: decode": 30.0, "native: row": 40.0}
    graph_clock.us |= {"native: decode": 8.0, "native: row": 10.0}
    monkeypatch.setattr(
        first_use,
        "_clocks",
        lambda plan: [
            (plan.mode, eager_clock),
            (plan.mode._replace(captured=True), graph_clock),
        ],
    )
    return eager_clock, graph_clock


CALL = Call("lod_linear", (X,), (U,), (V,), (None,), (12,), (None,))


def test_an_eager_call_is_measured_for_captured_ones_too(h100, monkeypatch):
    plan = dispatch.plan(CALL, None)
    assert plan.rivals == ("native: decode", "native: row")
    settled, done = first_use.settle(plan, CALL, True)
    assert done is None
    assert (settled.backend, settled.rivals) == ("matmul", ())  # launches cost more than they save
    monkeypatch.setattr(dispatch, "is_capturing", lambda x: True)
    dispatch.replan()
    captured = dispatch.plan(CALL, None)
    assert (captured.backend, captured.strategy) == ("native", "decode")
    assert "forward graph" in captured.reason
    assert "2.50 times as fast" in captured.reason


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("half", [0, 1])
def test_each_half_of_a_backward_is_chosen_for_by_itself(times, monkeypatch, half, activation):  # noqa: F811
    """Triton is faster at one half: library matmuls do the other and the forward."""
    triton, ours = plans.backend_module("triton"), "triton: two_phase"
    monkeypatch.setattr(triton, "STRATEGIES", {"cpu": ("two_phase",)})
    monkeypatch.setattr(triton, "COMPILES", False)
    monkeypatch.setattr(native, "unsupported", lambda problem: "not in this test")
    clock, real, raced = times(), timing.race, []
    together = BASELINE + dispatch.WITH_HALVES
    clock.us[together] = 50.0

    def race(candidates, **kwargs):
        clock.us[ours] = 10.0 if len(raced) == half else 1000.0
        raced.append(set(candidates))
        return real(candidates, **kwargs)

    monkeypatch.setattr(timing, "race", race)
    leaves = [t.clone().requires_grad_() for t in (X, U, V, B)]
    y = mk.lod_linear(*leaves, rank=12, activation=activation)
    names = {BASELINE, ours}
    assert raced == [names, names, names | {name + dispatch.WITH_HALVES for name in names}]
    plan = mk.explain(*leaves, rank=12, activation=activation).plan
    assert (plan.backend, plan.strategy) == ("matmul", "two matmuls")
    assert plan.halves == ((BASELINE, ours) if half else (ours, BASELINE))
    assert f"dx by {plan.halves[0]}; weight gradients by {plan.halves[1]}" in str(plan)
    used = []
    for module, name in ((triton, "triton"), (matmul, "matmul")):
        for part in ("input_grads", "weight_grads"):
            real_part = getattr(module, part)
            monkeypatch.setattr(
                module,
                part,
                lambda *a, part=part, name=name, run=real_part, **k: (
                    used.append(f"{name} {part}") or run(*a, **k)
                ),
            )
    dy = torch.randn(8, 192)
    found = torch.autograd.grad(y, leaves, dy)
    assert used == (
        ["matmul input_grads", "triton weight_grads"]
        if half
        else ["triton input_grads", "matmul weight_grads"]
    )
    y = mk.lod_linear(*leaves, rank=12, activation=activation, backend="reference")
    for grad, right in zip(found, torch.autograd.grad(y, leaves, dy), strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-4)


def test_nothing_is_measured_under_capture_and_explain_says_so(h100, monkeypatch):
    monkeypatch.setattr(dispatch, "is_capturing", lambda x: True)
    plan = dispatch.plan(CALL, None)
    assert first_use.settle(plan, CALL, True) == (plan, None)
    assert not any(clock.timed for clock in h100)
    assert "no measured table" in plan.reason
    assert "measures  native: decode, native: row" in str(plan)


def test_nothing_is_measured_while_a_graphs_pool_is_filled(h100, monkeypatch):
    """As torch.compile's CUDA graphs do when they warm up, which is no capture."""
    plan = dispatch.plan(CALL, None)
    monkeypatch.setattr(first_use, "fills_a_pool", lambda device: True)
    assert first_use.settle(plan, CALL, True) == (plan, None)
    assert not any(clock.timed for clock in h100)
    monkeypatch.setattr(first_use, "fills_a_pool", lambda device: False)
    assert not first_use.settle(plan, CALL, True)[0].rivals


def test_frames_tell_a_checkpoint():
    seen = []

    def inside(x):
        seen.append(eager.in_checkpoint())
        return x * 2

    x = X.clone().requires_grad_()
    for reentrant in (False, True):
        checkpoint(inside, x, use_reentrant=reentrant)
    inside(x)
    assert seen == [True, True, False]
