"""The gate in front of every timing: what it refuses, and what it must not."""

import dataclasses

import pytest
import torch
from benchmark_support import CASE, provider, two, without_bias

from maestro_kernels.measure.accuracy import Reference, References, checked, gate
from maestro_kernels.measure.cases import Case, Layer
from maestro_kernels.measure.providers import make_case_inputs


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_lucky_baseline_does_not_refuse_what_rounds_well(mode):
    # All of y rests on one sum of many terms, which a baseline may happen to round well.
    layers = (Layer(40, 4096, 8, 1), Layer(24, 4096, 6, 1))
    case = Case("test", 1, layers, bias=True, mode=mode)
    inputs = make_case_inputs(case, "cpu")
    with torch.set_grad_enabled(mode == "training"):
        found = References(case, inputs)["ours"]
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


def test_checked_serves_other_timers():
    inputs = make_case_inputs(CASE, "cpu")
    with torch.no_grad():
        call, problem = checked(CASE, provider("two matmuls", two), inputs)
        assert problem is None
        torch.testing.assert_close(call()[0], two(inputs)[0])
        _, problem = checked(CASE, provider("wrong", without_bias), inputs)
    assert "expected <=" in problem
