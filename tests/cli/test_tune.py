"""`maestro-kernels tune`: what is measured, by which name, files, limits and runs cut off."""

import json

import pytest
import torch
from table_support import COLD, TRAIN, WARM, plan

from maestro_kernels import dispatch, hardware, tables
from maestro_kernels.backends import matmul, native
from maestro_kernels.cli import main
from maestro_kernels.measure.providers import Unavailable, make_case_inputs
from maestro_kernels.search import strategies, tuning
from maestro_kernels.tables import Mode

needs_library = pytest.mark.skipif(native.load_error() is not None, reason=str(native.load_error()))


def test_a_plan_holds_ranks_that_pay_and_calls_that_end():
    cases = tuning.plan("cpu").cases
    assert cases
    for case in cases:
        for s in case.layers:
            assert s.rank * (s.N + s.K) < s.N * s.K
        assert case.cost("two matmuls").flops <= 4e9
    assert {len(case.layers) for case in cases} == {1, 2, 3}
    gpu = tuning.plan("cuda", torch.bfloat16).cases
    assert {case.layers[0].R % 8 for case in gpu} == {0, 7}
    assert len(tuning.plan("cuda", quick=True).cases) < len(gpu)


def test_tune_writes_a_table_and_goes_on_after_a_stop(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MAESTRO_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MAESTRO_KERNELS_TABLE", str(tmp_path / "table.json"))
    monkeypatch.setattr(tuning, "ring_bytes", lambda device: 1 << 16)
    real, measured, allowed = tuning.measure, [], 2

    def counted(case, *args, **kwargs):
        if len(measured) == allowed:
            raise KeyboardInterrupt
        measured.append(case)
        return real(case, *args, **kwargs)

    monkeypatch.setattr(tuning, "measure", counted)
    words = ["tune", "--device", "cpu", "--shape", "96,80", "--group", "96+96,80", "--rows", "2"]
    words += ["--seconds", "0.001"]
    try:
        assert main(words) == 130
        assert not (tmp_path / "table.json").exists()
        allowed = 3
        assert main([*words, "--limit", "1e-9"]) == 3
        assert len(tables.load(tmp_path / "table.json").rows) == len(measured) == 2
        assert "2 calls are left" in capsys.readouterr().out
        allowed = 100
        assert main(words) == 0
        assert len(measured) == len(set(measured)) == 4
        assert "what auto runs now" in capsys.readouterr().out
        table = tables.load(tmp_path / "table.json", hardware.current_device("cpu"))
        assert [(r.layers, r.N, r.rank) for r in table.rows] == [
            (1, 96, 16), (1, 96, 32), (2, 192, 16), (2, 192, 32)]  # fmt: skip
        assert table.command.startswith("maestro-kernels tune --device cpu --shape 96,80")
        assert all(set(row.us) == {COLD, WARM, TRAIN} for row in table.rows)
        if native.load_error() is None:
            assert all(
                "native: fused" in row.strategies(Mode(training))
                for row in table.rows
                for training in (False, True)
            )
            assert "packed: fused" in table.rows[0].us[COLD]
            assert "packed: fused" not in table.rows[0].us[TRAIN]
        assert "table table.json" in plan(M=2, N=96, K=80, rank=16, R=16).reason
        # Another shape joins the table of the same versions; --fresh measures again.
        quiet = ["--device", "cpu", "--rows", "2", "--seconds", "0.001", "--json"]
        assert main(["tune", "--shape", "64,80", *quiet]) == 0
        both = json.loads(capsys.readouterr().out)
        assert {row["N"] for row in both["rows"]} == {96, 192, 64}
        before = len(measured)
        assert main(["tune", "--shape", "64,80", *quiet]) == 0
        assert len(measured) == before
        assert main(["tune", "--shape", "64,80", "--fresh", *quiet]) == 0
        assert len(measured) > before
    finally:
        monkeypatch.undo()
        dispatch.forget()


@needs_library
def test_a_candidate_runs_the_strategy_it_is_named_after(monkeypatch):
    ran = []

    def forward(call, *, strategy, **kwargs):
        ran.append(strategy)
        return matmul.forward(call, strategy=strategy, **kwargs)

    monkeypatch.setattr(native, "forward", forward)
    monkeypatch.setattr(native, "takes", lambda strategy, problems: True)
    monkeypatch.setitem(strategies.STRATEGIES["cpu"], "native", ("fused", "other"))
    (case,) = tuning.plan(shapes=[(48, 40)], rows=[2]).cases
    found = {p.name: p for p in strategies.for_table(case)}
    inputs = make_case_inputs(case, "cpu")
    for name in ("native: fused", "native: other"):
        (bound,) = found[name].bound(case, [inputs])
        bound()
    assert ran == ["fused", "other"]
    with pytest.raises(Unavailable, match="triton has no row on cpu"):
        found["triton: row"].bound(case, [inputs])


def test_wrong_arguments_of_tune_are_one_line(capsys):
    for words, message in (
        (["--shape", "8"], "--shape: expected N,K with sizes >= 2, got '8'"),
        (["--shape", "8+8,8"], "--shape: expected N,K"),
        (["--group", "8,8"], "--group: expected N+N,K"),
        (["--rows", "0"], "--rows: expected integers >= 1 like"),
        (["--threads", "0"], "--threads: expected an integer from 1 to"),
    ):
        assert main(["tune", *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
