"""Predictions for the suite's cases, and what the report of the compilers takes from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from triton_support import needs_triton

from maestro_kernels.backends.triton import row_config, two_phase_config, wgrad_config
from maestro_kernels.benchmark.cases import MODELS, suite
from tools import forecast, predicted

pytestmark = needs_triton


@pytest.fixture(scope="module")
def full():
    return list(predicted.rows())


def test_every_case_of_the_suite_is_there(full):
    cases = suite("full", dtypes=("bfloat16",), device_type="cuda")
    assert [row.case for row in full] == cases
    for row in full:
        parts = ["forward", "dx", "weights"] if row.case.mode == "training" else ["forward"]
        assert [launch.part for launch in row.launches] == parts
        assert 0 < row.roofline < row.predicted


def test_roofline_is_that_of_the_case(full):
    for row in full:
        ideal = row.case.cost("fused").seconds(row.device, row.case.dtype)
        assert row.roofline == pytest.approx(ideal)


def test_strategies_of_the_planner():
    decode, middle, many = (
        predicted.predicted_row(MODELS["Llama-2-7B o"].case(M, 64, dtype="bfloat16"))
        for M in (1, 256, 8192)
    )
    assert (decode.strategy, middle.strategy, many.strategy) == ("two_phase", "expand", "row")
    assert middle.ratio > predicted.predicted_row(middle.case, activation="gelu").ratio
    assert [launch.kernel for launch in decode.launches] == ["two_phase_kernel"]
    assert decode.verdict == "ok"


def test_odd_ranks_take_the_tiles_for_narrow_loads():
    case = MODELS["Llama-2-7B o"].case(256, 127, dtype="bfloat16", mode="training")
    forward, dx, weights = predicted.predicted_row(case).launches
    assert forward.config in two_phase_config.UNALIGNED["16-bit"]
    assert dx.config in two_phase_config.UNALIGNED["16-bit"]
    assert weights.config == wgrad_config.UNALIGNED


def test_what_cannot_win_is_marked(full):
    row = next(r for r in full if r.verdict == "ok" and r.case.mode == "training")
    slow, fast = ([replace(x, calls=calls) for x in row.launches] for calls in (1e-9, 1.0))
    assert replace(row, launches=tuple(slow)).verdict == "cannot win"
    mixed = (slow[0], replace(fast[1], calls=row.launches[1].predicted.seconds * 1.01), slow[2])
    assert replace(row, launches=mixed).verdict == "only dx"


def test_the_command_says_how_many_cases_lose(capsys, full):
    assert predicted.main(["--losing"]) == 0
    *lines, last = capsys.readouterr().out.strip().split("\n")
    losing = [row for row in full if row.verdict != "ok"]
    assert len(lines) == 2 + len(losing)
    assert last.startswith(f"{len(full)} cases: {len(losing)} predicted not to win")


class TestForecast:
    CONFIG = two_phase_config.CANDIDATES["sm_90", "16-bit"][0]

    def of(self, form=" single", fitting=2, **changes):
        given = {"kernel": "two_phase_kernel", "arch": "sm_90", "dtype": "bf16"} | changes
        config = given.pop("config", self.CONFIG)
        return forecast.forecast(config=config, form=form, fitting=fitting, **given)

    def test_counts_the_cases_that_the_planner_gives_to_a_configuration(self, full):
        served = [
            row.launches[0]
            for row in full
            if row.launches[0].config == self.CONFIG and len(row.case.layers) == 1
        ]
        found = self.of()
        assert found.taken == len(served) > 0
        assert found.losing == sum(x.predicted.seconds >= x.calls for x in served)
        assert found.seconds / found.calls == min(x.predicted.seconds / x.calls for x in served)
        assert len(found.in_flight) == 2

    def test_fewer_programs_than_planned_take_longer(self, full, monkeypatch):
        wide = next(
            row.launches[0]
            for row in full
            if (row.case.source, row.case.M) == ("Llama-3-8B up", 16)
            and row.launches[0].kernel == "two_phase_kernel"
        )
        monkeypatch.setattr(forecast, "_launches", lambda *_: (wide,))
        one, two = (self.of(config=wide.config, fitting=n) for n in (1, 2))
        assert two.seconds == wide.predicted.seconds
        assert one.seconds > two.seconds

    def test_what_no_case_takes_is_judged_by_what_it_could_serve(self):
        config = row_config.RowConfig(64, 64, 64, 16, 4, 3)
        found = self.of(" forward", kernel="row_kernel", config=config)
        assert found.taken == 0
        assert found.case
        assert found.seconds > found.roofline

    def test_weight_gradients(self):
        config = wgrad_config.SHIPPED["sm_90"][1]
        assert self.of(" single", kernel="wgrad_kernel", config=config).taken > 0

    def test_groups_are_compared_with_groups(self):
        assert self.of(" grouped").calls > 2 * self.of().calls

    def test_float32(self):
        tf32 = two_phase_config.CANDIDATES["sm_90", "tf32"][0]
        assert self.of(" single tf32", dtype="fp32", config=tf32).taken > 0

    @pytest.mark.parametrize("changes", [{"arch": "sm_80"}, {"fitting": 0}])
    def test_nothing_is_said_without_a_record(self, changes):
        assert self.of(**changes) is None
