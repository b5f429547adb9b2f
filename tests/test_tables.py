"""Measured tables: files, which one is in use, what it makes auto and prepack choose, tune."""

import json
import os
from dataclasses import replace

import pytest
import torch
from table_support import COLD, cell, make_row, make_table, plan, times

import maestro_kernels as mk
from maestro_kernels import dispatch, hardware, tables, tuned
from maestro_kernels.backends import native
from maestro_kernels.problem import LoDProblem
from maestro_kernels.tables import BASELINE, Mode, Table

needs_library = pytest.mark.skipif(native.load_error() is not None, reason=str(native.load_error()))


@pytest.fixture
def use(tmp_path, monkeypatch):
    """Put a table where auto looks."""

    def put(table):
        path = tmp_path / "table.json"
        tables.save(table, path)
        monkeypatch.setenv("MAESTRO_KERNELS_TABLE", str(path))
        dispatch.forget()
        return path

    yield put
    monkeypatch.undo()
    dispatch.forget()


# --- rows ------------------------------------------------------------------------------------


def test_a_strategy_wins_a_mode_that_is_faster_somewhere_in_it_and_slower_nowhere():
    ours, training = "native: fused", Mode(training=True)
    assert make_row().wins(ours)
    assert make_row().speedup(ours) == pytest.approx(2.0)
    assert not make_row(warm=110.0).wins(ours)
    assert make_row(ours=99.0, warm=50.0).wins(ours)
    assert not make_row(ours=96.0).wins(ours)  # 4 % is noise between runs
    noisy = make_row(ours=80.0)
    us = {m: {n: times(t[1], 0.3) for n, t in by.items()} for m, by in noisy.us.items()}
    assert not replace(noisy, us=us).wins(ours)
    # Intervals that overlap decide nothing, however far apart the medians are.
    pair = {BASELINE: (90.0, 100.0, 101.0), "native: fused": (78.0, 80.0, 99.0)}
    assert not replace(make_row(), us={COLD: pair}).wins(ours)
    assert replace(make_row(), us={COLD: {**pair, "native: fused": (78.0, 80.0, 89.0)}}).wins(ours)
    # One mode says nothing of another.
    assert make_row(train=110.0).wins(ours)
    assert not make_row(train=110.0).wins(ours, training)
    assert make_row(ours=110.0).wins(ours, training)
    assert not make_row().wins(ours, Mode(captured=True))
    us = {**make_row().us, "forward cold graph": {BASELINE: times(8.0), ours: times(5.0)}}
    assert replace(make_row(ours=400.0), us=us).wins(ours, Mode(captured=True))
    # What could not run with cold weights is no choice for warm ones.
    us = {**make_row().us, COLD: {BASELINE: times(100.0)}}
    assert not replace(make_row(), us=us).wins(ours)


@needs_library
def test_each_mode_of_a_call_is_chosen_for_by_itself(use):
    use(make_table(*cell(train=110.0)))
    x, u, v = torch.zeros(32, 256), torch.zeros(256, 64), torch.zeros(64, 256)
    assert mk.explain(x, u, v, rank=48).plan.backend == "native"
    assert mk.explain(x, u.requires_grad_(), v, rank=48).plan.backend == "matmul"
    with torch.no_grad():
        assert mk.explain(x, u, v, rank=48).plan.backend == "native"
    rows = [
        replace(row, us={m: t for m, t in row.us.items() if "training" not in m}) for row in cell()
    ]
    use(make_table(*rows))
    assert "no times of this mode (training eager)" in mk.explain(x, u, v, rank=48).plan.reason


def test_the_fastest_form_of_prepack():
    assert make_row().fastest_form is None
    assert make_row(fused=20.0, merged_dense=30.0).fastest_form == "fused"
    assert make_row(fused=120.0, two_oneDNN_linears=110.0).fastest_form == "unpacked"


# --- files -----------------------------------------------------------------------------------


def test_a_table_survives_its_file_one_row_a_line(tmp_path):
    table = make_table(*cell(fused=20.0))
    path = tmp_path / "deep" / "table.json"
    tables.save(table, path)
    assert tables.load(path) == table
    assert sum('"dtype"' in line for line in path.read_text().splitlines()) == len(table.rows)
    assert os.listdir(path.parent) == ["table.json"]


def test_an_invalid_table_is_not_written_and_leaves_the_old_one(tmp_path):
    path = tmp_path / "table.json"
    tables.save(make_table(), path)
    before = path.read_text()
    bad = replace(make_row(), us={COLD: {"native: fused": times(1.0)}})
    with pytest.raises(ValueError, match=r"row 0: us: forward cold eager: expected times of"):
        tables.save(make_table(bad), path)
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(schema=7), "schema: expected 1, got 7"),
        (lambda t: t.pop("rows"), "expected the fields"),
        (lambda t: t.update(device=3), "device: expected a dict, got 3"),
        (lambda t: t["rows"][0].update(M=0), r"row 0: M: expected int \(>= 1\), got 0"),
        (lambda t: t["rows"][1].update(M=True), "row 1: M: expected int"),
        (lambda t: t["rows"][0].update(us={}), "row 0: us: expected times of a forward mode"),
        (lambda t: t["rows"][0]["us"][COLD].update({"x: y": [3, 2, 1]}), "p20, median, p80"),
        (lambda t: t["rows"][0].pop("rank"), "row 0: expected the fields"),
    ],
)
def test_damage_is_named(tmp_path, change, message):
    path = tmp_path / "table.json"
    record = json.loads(make_table().to_json())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"load: table.json: .*{message}"):
        tables.load(path)


def test_rows_speak_for_their_cell_and_a_little_beyond():
    table = make_table()
    kind = ("float32", 1, True)
    assert {(r.M, r.rank) for r in table.around(kind, 32, 256, 256, 48)} == {
        (16, 32), (16, 64), (64, 32), (64, 64)}  # fmt: skip
    assert [(r.M, r.rank) for r in table.around(kind, 16, 256, 256, 32)] == [(16, 32)]
    assert [(r.M, r.rank) for r in table.around(kind, 8, 256, 256, 128)] == [(16, 64)]
    assert table.around(kind, 7, 256, 256, 32) == []
    assert table.around(kind, 16, 256, 256, 129) == []
    assert table.around(kind, 16, 512, 256, 32)[0].N == 256
    assert table.around(kind, 16, 2048, 256, 32) == []
    assert table.around(("bfloat16", 1, True), 16, 256, 256, 32) == []
    assert table.around(("float32", 3, True), 16, 256, 256, 32) == []


# --- choosing --------------------------------------------------------------------------------


@needs_library
def test_auto_follows_the_table_and_explain_names_table_and_row(use):
    use(make_table())
    found = plan()
    assert (found.backend, found.strategy) == ("native", "fused")
    assert "table table.json, row" in found.reason
    assert "256→" in found.reason
    assert "2.00 times as fast as two matmuls" in found.reason
    assert "made with other versions" not in found.reason
    x, u, v = torch.randn(32, 256), torch.randn(256, 64), torch.randn(64, 256)
    assert torch.equal(mk.lod_linear(x, u, v), mk.lod_linear(x, u, v, backend="native"))


@needs_library
def test_one_corner_that_does_not_win_keeps_two_matmuls(use):
    rows = list(cell())
    rows[3] = make_row(64, 64, ours=110.0)
    use(make_table(*rows))
    assert plan().backend == "matmul"
    assert "nothing beats two matmuls in every row around" in plan().reason
    assert plan(M=16, rank=32).backend == "native"


def test_out_of_reach_there_is_no_row_and_two_matmuls_run(use):
    use(make_table())
    far = plan(M=4096)
    assert far.backend == "matmul"
    assert "has no row near this call" in far.reason
    assert plan(rank=0).strategy == "degenerate"


def test_a_backend_that_cannot_serve_is_not_chosen(use, monkeypatch):
    use(make_table())
    monkeypatch.setattr(native, "unsupported", lambda problem: "not today")
    found = plan()
    assert found.backend == "matmul"
    assert found.others["native"] == "not today"


def test_a_table_of_another_device_is_refused(use):
    path = use(make_table(name="another CPU"))
    found = plan()
    assert found.backend == "matmul"
    assert "refused: table.json: device: expected" in found.reason
    assert "another CPU" in found.reason
    with pytest.raises(ValueError, match=r"device: expected .* got another CPU"):
        tables.load(path, hardware.current_device("cpu"))
    use(make_table(l3_bytes=1))
    assert "refused" in plan().reason


@needs_library
def test_a_table_made_with_other_versions_is_used_and_says_so(use):
    table = make_table()
    use(replace(table, versions={**table.versions, "torch": "1.0"}))
    found = plan()
    assert found.backend == "native"
    assert f"made with other versions: torch 1.0, here {torch.__version__}" in found.reason


@needs_library
def test_the_users_table_goes_before_the_shipped_one(tmp_path, monkeypatch):
    device = hardware.current_device("cpu")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MAESTRO_KERNELS_TABLE")
    monkeypatch.setattr(tuned.resources, "files", lambda name: tmp_path / "package")
    shipped = tmp_path / "package" / "configs" / tables.file_name(device)
    try:
        tables.save(make_table(*cell(ours=50.0)), shipped)
        dispatch.forget()
        assert plan().backend == "native"
        tables.save(make_table(*cell(ours=200.0)), tables.user_path(device))
        dispatch.forget()
        assert plan().backend == "matmul"
        # A damaged one is named, and the shipped one serves.
        tables.user_path(device).write_text("{")
        dispatch.forget()
        assert plan().backend == "native"
        assert "refused: " in plan().reason
        monkeypatch.setenv("MAESTRO_KERNELS_TABLE", "off")
        dispatch.forget()
        assert "no measured table" in plan().reason
    finally:
        monkeypatch.undo()
        dispatch.forget()


def test_tables_are_found_per_device_and_read_once(use, monkeypatch):
    path = use(make_table())
    assert tuned.fingerprint(hardware.current_device("cpu"))
    other = replace(hardware.current_device("cpu"), name="x")
    assert tuned.fingerprint(other) == ""
    path.write_text("{")
    before = tuned.fingerprint(hardware.current_device("cpu"))
    assert before
    dispatch.forget()
    assert tuned.fingerprint(hardware.current_device("cpu")) == ""


def test_a_gpu_that_is_not_here_has_no_table():
    there = LoDProblem(1, 8, 8, 8, 8, torch.float32, torch.device("cuda"), x_stride=(8, 1))
    if not torch.cuda.is_available():
        assert "it is not here" in tuned.choose([there], ["matmul"])


def test_strategy_of_a_recorded_gpu_table(use, monkeypatch):
    row = make_row()
    us = {m: {("triton: row" if "native" in n else n): t for n, t in by.items()}
          for m, by in row.us.items()}  # fmt: skip
    table = Table(tables.identity(hardware.H100), hardware.versions(), (replace(row, us=us),))
    use(table)
    call = LoDProblem(16, 256, 256, 32, 32, torch.float32, torch.device("cuda"))
    choice = tuned.choose([call], ["matmul", "triton"], hardware.H100)
    assert (choice.backend, choice.strategy) == ("triton", "row")
    odd = replace(call, R=33, aligned=False)
    assert "no row near" in tuned.choose([odd], ["matmul", "triton"], hardware.H100)


@needs_library
def test_a_strategy_that_does_not_take_the_call_is_not_run(use):
    rows = [replace(r, us={m: {n.replace("fused", "woven"): t for n, t in by.items()}
                           for m, by in r.us.items()}) for r in cell()]  # fmt: skip
    use(make_table(*rows))
    assert plan().backend == "matmul"
    assert plan().reason.endswith("; but woven does not take this call")


def test_which_strategies_take_a_call():
    from maestro_kernels.backends import triton

    call = LoDProblem(16, 256, 256, 512, 256, torch.float32, torch.device("cuda"))
    assert triton.takes("row", [call])
    assert triton.takes("two_phase", [call, call])
    assert not triton.takes("row", [call, call])
    assert not triton.takes("row", [replace(call, rank=257)])
    assert not triton.takes("row", [replace(call, rank=None)])
    assert not triton.takes("nonsense", [call])
    # The refusal above is the kernel's own limit.
    assert (
        max(config.BLOCK_R for configs in triton.row_config.SHIPPED.values() for config in configs)
        == triton.row_config.MAX_WIDTH
    )


def test_float32_at_another_precision_is_another_kind_of_row(use):
    use(make_table())
    before = torch.get_float32_matmul_precision()
    try:
        assert tables.dtype_key(torch.float32) == "float32"
        torch.set_float32_matmul_precision("high")
        assert tables.dtype_key(torch.float32) == "float32 rounded"
        assert tables.dtype_key(torch.bfloat16) == "bfloat16"
    finally:
        torch.set_float32_matmul_precision(before)


def test_prepack_takes_a_form_where_the_table_is_sure(use):
    use(make_table(*cell(fused=20.0, merged_dense=40.0)))
    assert tuned.choose_form(256, 256, 48, 32, torch.float32) == "fused"
    assert tuned.choose_form(256, 256, 48, 32, torch.bfloat16) is None
    assert tuned.choose_form(264, 256, 48, 32, torch.float32) is None  # another size: measure
    assert tuned.choose_form(256, 256, 48, 4096, torch.float32) is None
    rows = list(cell(fused=20.0))
    rows[0] = make_row(16, 32, fused=400.0)
    use(make_table(*rows))
    assert tuned.choose_form(256, 256, 48, 32, torch.float32) is None  # corners disagree
    assert tuned.choose_form(256, 256, 64, 64, torch.float32) == "fused"


def test_small_calls_need_no_table_and_large_factors_are_not_small():
    if native.load_error() is None:
        assert plan(M=1, N=64, K=64, rank=16, R=16).backend == "native"
        assert plan(M=2, N=1024, K=1024, rank=16, R=16).backend == "matmul"
        assert plan(M=512, N=64, K=64, rank=16, R=16).backend == "matmul"
    assert dispatch.select(LoDProblem(64, 512, 512, 64, 64, torch.float32, torch.device("cpu"))
                           ).backend == "matmul"  # fmt: skip
