"""Profiles: what is measured next, what is read off curves, files, and runs that are cut off."""

import json
import math
import re
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from places import ROOT
from profile_support import RANKS, dense_ms, low_rank_ms, make_profile, point
from torch import nn

import maestro_kernels as mk
from maestro_kernels import dispatch, search
from maestro_kernels.backends import native
from maestro_kernels.measure import accuracy
from maestro_kernels.measure.records import Journal
from maestro_kernels.search import curves, layer_profile
from maestro_kernels.search.curves import Knot
from maestro_kernels.search.latencies import point_from
from maestro_kernels.search.layer_profile import Sweep
from maestro_kernels.search.targets import shapes_of

N, K = 512, 512


def curve(**ms):
    return {int(r[1:]): Knot(v) for r, v in ms.items()}


# --- curves ----------------------------------------------------------------------------------


def test_coarse_ranks_reach_beyond_break_even_on_the_grid():
    for n, k in ((512, 512), (4096, 1024), (384, 1536), (100, 40)):
        ranks = curves.coarse_ranks(n, k)
        assert ranks == sorted(set(ranks))
        assert all(r % 8 == 0 for r in ranks)
        assert ranks[0] <= 16
        assert n * k / (n + k) <= ranks[-1] <= min(n, k)
    assert curves.coarse_ranks(6, 5) == [2, 4] or curves.coarse_ranks(6, 5)[-1] <= 5


def test_refinement_goes_where_the_curve_bends():
    straight = {r: Knot(1.0 + r) for r in (16, 64, 128, 256)}
    assert curves.refine(straight) == []
    bent = {16: Knot(1.0), 64: Knot(1.1), 128: Knot(1.2), 256: Knot(5.0)}
    assert 192 in curves.refine(bent)
    # A crossing with the dense layer counts like a bend, noise does not.
    assert any(64 < r < 128 for r in curves.refine(straight, dense=100.0))
    noisy = {r: Knot(k.ms, noise=10.0) for r, k in bent.items()}
    assert curves.refine(noisy) == []


def test_steps_preferred_ranks_and_break_even():
    steep = curve(r48=1.0, r64=1.1, r72=2.0, r128=2.2)
    (step,) = curves.steps(steep)
    assert (step.rank, step.next) == (64, 72)
    assert curves.steps({r: Knot(float(r)) for r in (8, 16, 24, 32)}) == []
    assert curves.preferred(curve(r16=1.0, r32=2.0, r48=1.5, r64=3.0)) == [16, 48, 64]
    assert curves.break_even(curve(r16=1.0, r32=3.0), 2.0) == 24
    assert curves.break_even(curve(r16=1.0, r32=3.0), 0.5) is None
    assert curves.break_even(curve(r16=1.0, r32=3.0), 9.0) == math.inf
    # One disturbed rank is no crossing while a larger one is faster; a real one is.
    bump = {16: Knot(1.0), 32: Knot(3.0, noise=2.5), 48: Knot(1.5), 64: Knot(2.5)}
    assert curves.break_even(bump, 2.0) == 56
    assert curves.break_even({**bump, 32: Knot(3.0, noise=0.5)}, 2.0) == 24
    assert curves.break_even({16: Knot(2.2, noise=1.0), 32: Knot(1.0)}, 2.0) == math.inf
    assert curves.break_even({16: Knot(2.2, noise=0.1), 32: Knot(1.0)}, 2.0) is None


def test_a_rank_off_the_grid_is_a_probe_and_no_part_of_the_curve():
    points = [point(N, K, 1, r, "ours", ms) for r, ms in ((56, 1.0), (63, 3.0), (64, 2.0))]
    assert list(curves.curve_of(points)) == [56, 64]
    assert curves.odd_penalty(points) == pytest.approx(3.0 / 1.875)
    assert curves.odd_penalty(points[:1]) == 1.0


def test_held_out_ranks_measure_the_interpolation():
    assert max(curves.left_out({r: Knot(1.0 + r) for r in (8, 16, 64, 128)})) < 1e-12
    (error,) = curves.left_out(curve(r10=1.0, r20=1.0, r30=2.0))
    assert error == pytest.approx(0.5)


# --- the fitted model ------------------------------------------------------------------------


def test_the_fit_recovers_its_own_formula_and_no_coefficient_is_negative():
    sizes = [(256, 256), (512, 128), (128, 1024), (64, 64), (1024, 1024)]
    low = [(n, k, r, 0.01 + 1e-6 * r * k + 3e-6 * r * n) for n, k in sizes for r in (8, 32, 64)]
    fit = curves.fit(low)
    assert fit.ms(300, 700, 40) == pytest.approx(0.01 + 1e-6 * 40 * 700 + 3e-6 * 40 * 300, rel=1e-6)
    assert max(curves.left_out_shapes(low)) < 1e-6
    dense = [(n, k, 0, 0.02 + 2e-7 * n * k) for n, k in sizes]
    assert curves.fit(dense).ms(300, 700, 0) == pytest.approx(0.02 + 2e-7 * 210000, rel=1e-6)
    noisy = [(n, k, r, ms * (1 + 0.3 * (-1) ** i)) for i, (n, k, r, ms) in enumerate(low)]
    found = curves.fit(noisy)
    assert min(found.coefficients) >= 0
    # Least squares over c >= 0: no neighbour is better.
    rows = np.array([[1, r * k, r * n, k, n] for n, k, r, _ in noisy]) / [[s[3]] for s in noisy]
    loss = lambda c: float(((rows @ c - 1) ** 2).sum())  # noqa: E731
    best = np.array(found.coefficients)
    for i in range(5):
        for sign in (-1, 1):
            moved = best.copy()
            moved[i] = max(moved[i] * (1 + 0.01 * sign), 0)
            assert loss(moved) >= loss(best) - 1e-12
    assert curves.left_out_shapes(low[:6]) == []


# --- what a profile answers ------------------------------------------------------------------


def test_latency_is_measured_interpolated_or_fitted_and_says_which():
    prof = make_profile()
    at = prof.estimate(N=N, K=K, rank=64, M=64)
    assert (at.ms, at.source) == (low_rank_ms(N, K, 64, 64), "measured")
    between = prof.estimate(N=N, K=K, rank=48, M=64)
    assert between.source == "interpolated"
    assert between.ms == pytest.approx(low_rank_ms(N, K, 48, 64))
    rows = prof.estimate(N=N, K=K, rank=64, M=8)
    low, high = low_rank_ms(N, K, 64, 1), low_rank_ms(N, K, 64, 64)
    assert rows.source == "interpolated"
    assert rows.ms == pytest.approx((low * high) ** 0.5)  # 8 is half-way from 1 to 64
    assert prof.latency(N=N, K=K, rank=64, M=128) == pytest.approx(2 * high)
    # A rank off the grid costs what a probe beside the grid showed.
    probe = point(N, K, 1, 63, "ours", 1.5 * low_rank_ms(N, K, 63, 1))
    odd = replace(prof, points=(*prof.points, probe))
    assert odd.odd_penalty(N=N, K=K, M=1) == pytest.approx(1.5)
    plain = prof.latency(N=N, K=K, rank=40, M=1)
    assert odd.latency(N=N, K=K, rank=40, M=1) == plain
    below, above = (prof.latency(N=N, K=K, rank=r, M=1) for r in (40, 42))
    assert odd.latency(N=N, K=K, rank=42, M=1) == pytest.approx(1.5 * above)
    assert below < above
    assert prof.estimate(N=256, K=512, rank=64, M=1).source == "fitted"
    assert prof.latency(N=N, K=K, rank="dense", M=1) == dense_ms(N, K, 1)
    assert prof.latency(N=N, K=K, rank=None, M=1, cache="warm") == dense_ms(N, K, 1) / 2
    assert prof.latency(N=N, K=K, rank=0, M=1) == low_rank_ms(N, K, 16, 1)
    with pytest.raises(ValueError, match="latency: rank: expected"):
        prof.latency(N=N, K=K, rank=-1)
    with pytest.raises(ValueError, match="latency: strategy, cache, launch: expected one of"):
        prof.latency(N=N, K=K, rank=8, launch="graph")


def test_steps_break_even_and_preferred_ranks_of_a_profile():
    prof = make_profile()
    assert [s.rank for s in prof.steps(N=N, K=K, M=1)] == [64]
    limit = prof.break_even(N=1024, K=N, M=64)
    dense = dense_ms(1024, N, 64)
    assert limit == math.inf
    assert all(prof.latency(N=1024, K=N, rank=r, M=64) < dense for r in RANKS)
    assert 64 < prof.break_even(N=N, K=K, M=1) < 72
    chosen = prof.preferred(N=N, K=K, M=1)
    assert chosen
    assert all(prof.latency(N=N, K=K, rank=r, M=1) < dense_ms(N, K, 1) for r in chosen)
    assert prof.errors["interpolation"].count > 0
    assert "fit" not in prof.errors  # two sizes make no model
    held_out = make_profile(((64, 64), (128, 256), (512, 512))).errors["fit"]
    assert held_out.count == 3 * 2 * (1 + len(RANKS))
    assert held_out.median <= held_out.p90


def test_prepacked_is_the_fastest_of_what_prepack_chooses_from():
    prof = make_profile()
    assert "prepacked" in prof.strategies
    packed = prof.latency(N=N, K=K, rank=64, M=1, strategy="prepacked")
    assert packed == 0.8 * low_rank_ms(N, K, 64, 1)
    # From half the break-even rank on the merged matrix takes part, and caps the time.
    slow = make_profile(factors={"ours": 9.0, "packed: fused": 8.0})
    merged = 0.95 * dense_ms(N, K, 64)
    assert slow.latency(N=N, K=K, rank=128, M=64, strategy="prepacked") == merged
    below = slow.latency(N=N, K=K, rank=96, M=64, strategy="prepacked")
    assert below == 8.0 * low_rank_ms(N, K, 96, 64)
    chosen = prof.using("prepacked")
    assert chosen.latency(N=N, K=K, rank=64, M=1) == packed
    assert chosen.main == "prepacked"
    with pytest.raises(ValueError, match="using: strategy: expected one of"):
        prof.using("nonsense")


def test_a_profile_survives_its_file_and_damage_is_named(tmp_path):
    prof = make_profile(names=("a", "b"))
    path = tmp_path / "profile.json"
    prof.save(path)
    assert search.Profile.load(path) == prof
    record = json.loads(path.read_text())
    for change, message in (
        ({"schema": 99}, "schema: expected 1, got 99"),
        ({"points": []}, "points: expected at least one"),
        ({"points": [{"N": 1}]}, "expected points and shapes"),
        ({"extra": 1}, "expected the fields"),
    ):
        path.write_text(json.dumps({**record, **change}))
        with pytest.raises(ValueError, match=message):
            search.Profile.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="expected a JSON profile"):
        search.Profile.load(path)


# --- targets ---------------------------------------------------------------------------------


def test_targets_are_sizes_layers_and_models():
    assert [(s.N, s.K) for s in shapes_of([(8, 4), (16, 16)])] == [(16, 16), (8, 4)]
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8, bias=False), nn.Linear(8, 16))
    first, second = shapes_of(model)
    assert (first.N, first.K, first.bias, first.names) == (16, 8, True, ("0", "2"))
    assert (second.bias, second.names) == (False, ("1",))
    lod = mk.LoDLinear(16, 8, max_rank=4)
    assert shapes_of(lod)[0].N == 8
    for bad, error in (
        ("8,8", TypeError),
        ([(8,)], TypeError),
        ((1, 8), ValueError),
        ([], ValueError),
        (nn.ReLU(), ValueError),
        ([(8, True)], TypeError),
    ):
        with pytest.raises(error, match="profile: target: expected"):
            shapes_of(bad)  # fmt: skip


def test_pointwise_convolutions_are_sizes():
    model = nn.Sequential(nn.Conv2d(8, 24, 1), nn.Conv2d(24, 16, 3), nn.Flatten(), nn.Linear(16, 4))
    assert [(s.N, s.K, s.names) for s in shapes_of(model)] == [(24, 8, ("0",)), (4, 16, ("3",))]
    assert [(s.N, s.K) for s in shapes_of(mk.LoDConv2d(8, 24, 1, max_rank=4))] == [(24, 8)]
    # A stride skips positions, groups are several products, padding adds positions.
    for other in ({"stride": 2}, {"groups": 2}, {"padding": 1}):
        with pytest.raises(NotImplementedError, match="1 × 1, whose time depends on the image"):
            shapes_of(nn.Conv2d(8, 24, 1, **other))


def test_other_convolutions_are_measured_in_their_model():
    conv = mk.LoDConv2d(8, 24, 3, max_rank=6)
    with pytest.raises(NotImplementedError, match="profile_model"):
        search.profile(conv)
    found = search.profile_model(conv, torch.randn(2, 8, 9, 9), seconds=0.01)
    assert found.model({"": 4}) > 0


def test_a_pointwise_convolution_has_a_latency(monkeypatch):
    monkeypatch.setattr(layer_profile, "ring_bytes", lambda device: 1 << 16)
    found = search.profile(
        mk.LoDConv2d(16, 24, 1, max_rank=8), ranks=[4], rows=[9], resume=False, seconds=1e-3
    )
    assert found.latency(N=24, K=16, rank=4, M=9) > 0


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="profile: ranks: expected a sequence"):
        search.profile((8, 8), ranks=4)
    with pytest.raises(ValueError, match="profile: rows: expected integers >= 1, got 0"):
        search.profile((8, 8), rows=(0,))
    with pytest.raises(TypeError, match=r"profile: dtype: expected a torch\.dtype"):
        search.profile((8, 8), dtype="float32")


# --- measuring -------------------------------------------------------------------------------


def test_a_sweep_times_every_strategy_at_every_rank(monkeypatch):
    monkeypatch.setattr(layer_profile, "ring_bytes", lambda device: 1 << 16)
    sweep = Sweep(24, 16, 2, True, torch.float32, torch.device("cpu"), seconds=1e-3)
    points = sweep.measure([4, 8])
    found = {(p.rank, p.strategy, p.cache) for p in points}
    expected = {(0, "dense"), *((r, s) for r in (4, 8) for s in ("two matmuls", "ours"))}
    if native.load_error() is None:
        expected |= {(r, s) for r in (4, 8) for s in ("native: fused", "packed: fused")}
    assert {(*e, cache) for e in expected for cache in ("warm", "cold")} <= found
    assert all(p.bias and p.launch == "eager" and 0 < p.p20 <= p.p50 <= p.p80 for p in points)
    assert not any(p.rank == 0 and p.strategy == "ours" for p in points)


def test_a_strategy_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(layer_profile, "ring_bytes", lambda device: 1 << 16)
    sweep = Sweep(24, 16, 2, False, torch.float32, torch.device("cpu"), seconds=1e-3)
    real = accuracy.checked

    def wrong(case, provider, inputs):
        bound, problem = real(case, provider, inputs)
        return bound, "max error" if provider.name == "ours" else problem

    monkeypatch.setattr(accuracy, "checked", wrong)
    assert "ours" not in {p.strategy for p in sweep.measure([4])}


class FakeSweep(Sweep):
    """Times from the formula; counts measurements, and fails where it is told to."""

    log: ClassVar = []
    stop_after = math.inf
    slow = 1.0

    def measure(self, ranks, providers=None):
        if len(self.log) >= FakeSweep.stop_after:
            raise KeyboardInterrupt
        self.log.append((self.N, self.K, self.M, tuple(ranks)))
        slow = FakeSweep.slow if len(self.log) == 2 else 1.0
        ms = [(0, "dense", dense_ms(self.N, self.K, self.M))]
        ms += [(r, "ours", low_rank_ms(self.N, self.K, r, self.M)) for r in ranks]
        return [
            point(self.N, self.K, self.M, r, s, slow * t, cache, bias=self.bias)
            for r, s, t in ms
            for cache in ("warm", "cold")
        ]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setattr(layer_profile, "Sweep", FakeSweep)
    monkeypatch.setenv("MAESTRO_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(FakeSweep, "log", [])
    monkeypatch.setattr(FakeSweep, "stop_after", math.inf)
    monkeypatch.setattr(FakeSweep, "slow", 1.0)
    return FakeSweep


def test_coarse_to_fine_finds_the_step_with_few_measurements(fake):
    prof = search.profile((N, K), rows=(64,))
    ranks = list(prof.curve(N=N, K=K, M=64))
    assert len(ranks) <= 18
    # The step is enclosed within two steps of the grid, and with it where dense is as fast.
    below, above = max(r for r in ranks if r <= 64), min(r for r in ranks if r > 64)
    assert above - below <= 16
    assert below <= prof.break_even(N=N, K=K, M=64) <= above
    assert len(fake.log) <= 5


def test_a_second_call_measures_nothing_and_an_interrupted_one_goes_on(fake):
    seen = []
    search.profile((N, K), rows=(1,), progress=lambda *a: seen.append(a))
    assert seen[0][1:] == (0, 1)
    assert seen[-1] == ("done", 1, 1)
    first = len(fake.log)
    again = search.profile((N, K), rows=(1,))
    assert len(fake.log) == first
    fake.stop_after = first + 1
    with pytest.raises(KeyboardInterrupt):
        search.profile((N, K), rows=(1, 64))
    fake.stop_after = math.inf
    whole = search.profile((N, K), rows=(1, 64))
    measured = [r for *_, M, ranks in fake.log if M == 64 for r in ranks]
    assert len(measured) == len(set(measured))
    assert {p for p in whole.points if p.M == 1} == set(again.points)


@pytest.mark.parametrize("what", ["threads", "dtype", "version", "device", "table"])
def test_points_of_another_device_dtype_or_version_are_not_used(fake, monkeypatch, what):
    from maestro_kernels import hardware, tuned

    search.profile((N, K), ranks=(16,), rows=(1,))
    before, dtype = len(fake.log), torch.float32
    if what == "threads":
        threads = torch.get_num_threads()
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    elif what == "dtype":
        dtype = torch.bfloat16
    elif what == "version":
        real = hardware.libraries()
        monkeypatch.setattr(hardware, "libraries", lambda: {**real, "torch": "9.9"})
    elif what == "table":
        monkeypatch.setattr(tuned, "fingerprint", lambda device: "another")
    else:
        record = replace(hardware.current_device("cpu"), name="another CPU")
        monkeypatch.setattr(hardware, "current_device", lambda device: record)
    search.profile((N, K), ranks=(16,), rows=(1,), dtype=dtype)
    assert len(fake.log) == before + 1
    monkeypatch.undo()


def test_a_disturbed_round_is_measured_again(fake):
    fake.slow = 5.0
    prof = search.profile((N, K), rows=(1,))
    assert fake.log[1][3] == fake.log[2][3]
    for rank, knot in prof.curve(N=N, K=K, M=1).items():
        assert knot.ms == pytest.approx(low_rank_ms(N, K, rank, 1), rel=1e-6)


def test_cache_off_leaves_no_file(fake, tmp_path):
    search.profile((N, K), ranks=(16,), rows=(1,), resume=False)
    assert not (tmp_path / "cache").exists()


def test_a_torn_journal_loses_its_last_line_and_a_foreign_one_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("MAESTRO_KERNELS_CACHE", str(tmp_path))
    points = [point(N, K, 1, r, "ours", 1.0) for r in (8, 16)]
    journal = Journal("x", {"a": 1}, point_from)
    journal.add(points)
    journal.finish("part")
    text = journal.path.read_text()
    journal.path.write_text(text[:-9])
    torn = Journal("x", {"a": 1}, point_from)
    assert torn.items == points
    assert torn.done == set()
    torn.finish("part")
    assert Journal("x", {"a": 1}, point_from).done == {"part"}
    assert Journal("x", {"a": 2}, point_from).items == []
    journal.path.write_text(text.replace('{"a": 1}', '{"a": 3}'))
    assert Journal("x", {"a": 1}, point_from).items == []
    journal.path.write_text(text.replace('"ours"', "7"))
    assert Journal("x", {"a": 1}, point_from).items == []


def test_profile_of_a_small_model_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("MAESTRO_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(layer_profile, "ring_bytes", lambda device: 1 << 16)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
    prof = search.profile(model, ranks=(8, 16), rows=(4,), seconds=1e-3)
    assert {s.names for s in prof.shapes} == {("0",), ("2",)}
    assert prof.latency(N=48, K=32, rank=8, M=4) > 0
    assert "break-even" in str(prof)


def test_allocation_stays_below_the_step_of_a_profile():
    model = nn.Sequential(nn.Linear(N, K), nn.ReLU(), nn.Linear(N, K))
    prof = make_profile(((N, K),), Ms=(1,))
    ranks = search.allocate(model, search.Params(0.4), profile=prof, batch=torch.randn(1, K))
    # Above rank 64 a layer is slower than dense: weights alone would allow rank 100.
    assert all(isinstance(r, int) and r <= 64 for r in ranks.values())


def test_the_snippets_of_the_docs_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAESTRO_KERNELS_CACHE", str(tmp_path / "cache"))
    text = (ROOT / "docs" / "guide" / "profile.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/guide/profile.md", "exec"), names)
    mk.set_tuning(None)
    dispatch.forget()
    assert (tmp_path / "profile.json").exists()
    small = f"{dispatch._SMALL_FLOP:,} FLOP on factors of up to {dispatch._SMALL_FACTORS:,} values"
    assert small in " ".join(text.split())
