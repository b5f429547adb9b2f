"""The one place that chooses, and what explain says about the choice."""

import dataclasses

import pytest
import torch

import maestro_kernels as mk
from maestro_kernels import dispatch
from maestro_kernels.call import Call
from maestro_kernels.problem import LoDProblem, describe
from maestro_kernels.testing import make_inputs

X, U, V, B = make_inputs(64, 96, 128, 32)


def test_auto_without_a_table_is_two_matmuls_on_every_device():
    for device in ("cpu", "cuda:0"):
        problem = LoDProblem(
            64, 96, 128, 32, 32, torch.bfloat16, torch.device(device), x_stride=(128, 1)
        )
        plan = dispatch.select(problem)
        assert (plan.backend, plan.strategy) == ("matmul", "two matmuls")
    assert "no measured table" in plan.reason


def test_forcing_names_the_backend_and_why_the_others_did_not_run():
    plan = mk.explain(X, U, V, B, backend="reference").plan
    assert plan.backend == "reference"
    assert plan.reason == "forced"
    assert set(plan.others) == {"triton", "native"}


def test_explain_counts_bytes_and_flop():
    r = 24
    explanation = mk.explain(X, U, V, rank=r)
    M, N, K = 64, 96, 128
    assert explanation.flop == 2 * M * r * (K + N)
    assert explanation.bytes == 4 * (M * K + r * K + 2 * M * r + N * r + M * N)


def test_explain_prints_choice_reason_and_cost():
    text = str(mk.explain(X, U, V, B, rank=24, activation="gelu"))
    for part in ("lod_linear", "v[:24]", "+ bias", "gelu", "runs on   matmul", "because", "MB"):
        assert part in text
    assert "MFLOP" in text
    assert "at best" in text


def test_explain_of_tensors_without_a_device_says_that_it_is_not_here():
    x, u, v, _ = (t.to("meta") for t in make_inputs(4, 32, 64, 8))
    explanation = mk.explain(x, u, v)
    assert "at best   not known: no meta device is here" in str(explanation)
    assert explanation.seconds is None
    assert explanation.roofline_share is None
    assert explanation.flop > 0


def test_a_plan_belongs_to_a_number_of_threads(monkeypatch):
    x, u, v, bias = make_inputs(4, 33, 65, 9)
    planned, select, threads = [], dispatch.select, [3]
    monkeypatch.setattr(dispatch, "select", lambda *a, **k: planned.append(a) or select(*a, **k))
    monkeypatch.setattr(dispatch, "_threads", lambda: threads[0])
    for count in (3, 3, 5, 3, 5):
        threads[0] = count
        mk.lod_linear(x, u, v, bias)
        mk.lod_linear_grouped(x, [u, u], [v, v], [bias, None])
    assert len(planned) == 4


def test_explain_of_a_group_names_every_layer():
    text = str(mk.explain(X, [U, U[:7]], [V, V], rank=[32, 8]))
    assert "(64, 96)" in text
    assert "(64, 7)" in text


def test_explain_raises_the_errors_of_the_call(no_library):
    with pytest.raises(ValueError, match="lod_linear: rank"):
        mk.explain(X, U, V, rank=33)
    with pytest.raises(NotImplementedError, match="native"):
        mk.explain(X, U, V, backend="native")


@pytest.mark.parametrize(
    ("args", "kwargs"), [((X[:0], U, V), {}), ((X, U, V), {"rank": 0}), ((X, U[:0], V), {})]
)
def test_empty_problems_need_no_kernel(args, kwargs):
    assert mk.explain(*args, **kwargs).plan.strategy == "degenerate"


def test_describe_reports_layout():
    problem = describe(X[:, 1:97], U, V[:, :96], None, None, None)
    assert problem.x_stride == (128, 1)
    assert not problem.aligned
    assert describe(X, U, V, None, None, None).aligned
    assert dataclasses.replace(problem, rank=None).max_active_rank == 32


def test_plans_are_remembered_per_call_and_bounded(monkeypatch):
    monkeypatch.setattr(dispatch, "_MAX_PLANS", 3)
    dispatch._plans.clear()
    for rank in range(8):
        mk.lod_linear(X, U, V, rank=rank)
        assert len(dispatch._plans) <= 3
    call = Call("lod_linear", (X,), (U,), (V,), (None,), (7,), (None,))
    first = dispatch.plan(call, None)
    assert dispatch.plan(call, None) is first
