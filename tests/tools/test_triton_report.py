"""Every shipped configuration, compiled ahead of time without a GPU; one test for each."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from triton_support import WHY_NOT, needs_triton, run_compiled

pytestmark = needs_triton
NAMES: list[str] = []
PUBLISHING = {"two_phase_kernel", "wgrad_kernel"}
if WHY_NOT is None:
    from tools import triton_report

    NAMES = triton_report.names()
    GOOD = triton_report.Row(
        kernel="k", arch="sm_90", dtype="bf16", label="c", warps=4, stages=3, registers=128,
        spill_bytes=0, shared_bytes=232448, wgmma_reg=4, wgmma_smem=4, mma_sync=0, cp_async=0,
        tma_load=0, tma_store=0, releases=1, unguarded=(), early=(), prefetches=0, warnings=(),
        dot_rows=64,
        h_in_registers=True, resident=1,
    )  # fmt: skip


def compiled(only, timeout):
    """The report of one child process: kernels here are interpreted, there they compile."""
    printed = run_compiled("-m", "tools.triton_report", "--json", "--only", only, timeout=timeout)
    rows = [
        triton_report.Row(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
        for row in printed["rows"]
    ]
    return {row.name: row for row in rows}, printed["table"]


@pytest.fixture(scope="module")
def report():
    return compiled("sm_(80|90)", 1200)


@pytest.fixture(scope="module")
def report_of_sm_100():
    return compiled("sm_100", 3600)


@pytest.mark.parametrize("name", [name for name in NAMES if " sm_100 " not in name])
def test_configuration_may_ship(report, name):
    row = report[0][name]
    assert row.faults == ()
    assert row.registers > 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in NAMES if " sm_100 " in name])
def test_configuration_may_ship_on_sm_100(report_of_sm_100, name):
    test_configuration_may_ship(report_of_sm_100, name)


def test_every_architecture_dtype_and_kernel_is_there(report):
    rows, _ = report
    assert sorted(rows) == sorted(name for name in NAMES if " sm_100 " not in name)
    assert len(set(NAMES)) == len(NAMES)
    seen = {tuple(name.split()[1:3]) for name in NAMES}
    assert seen == {(a, d) for a in ("sm_80", "sm_90", "sm_100") for d in ("bf16", "fp16", "fp32")}


def test_the_table_for_people_has_every_row(report):
    rows, table = report
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.split("\n")]
    shown = {" ".join(line[:4]): line for line in lines[2:]}
    assert sorted(shown) == sorted(rows)
    for name, row in rows.items():
        assert shown[name][6:9] == [
            str(row.registers),
            str(row.spill_bytes),
            f"{row.shared_bytes / 1024:.0f}",
        ]


def test_the_table_predicts_what_has_a_record(report):
    """Bytes in flight, the best of the suite's cases, and its time beside roofline and calls."""
    rows, table = report
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.split("\n")]
    header = lines[0]
    begin, end = header.index("per SM"), header.index("ptxas")
    assert header[begin + 1 : end] == [
        "warps/SM", "in flight KiB/SM (memory wants 16)", "suite", "best case", "predicted us",
        "roofline us", "calls us", "ratio",
    ]  # fmt: skip
    shown = {" ".join(line[:4]): line[begin:end] for line in lines[2:]}
    found = {name: cells for name, cells in shown.items() if cells[3] != "-"}
    assert {rows[name].arch for name in found} == {"sm_90"}
    kernels = {rows[name].kernel for name in found}
    assert kernels == {"row_kernel", "two_phase_kernel", "expand_kernel", "wgrad_kernel"}
    for name, (fits, warps, *_, roofline, calls, ratio) in found.items():
        assert warps == f"{int(fits) * rows[name].warps}/64"
        predicted = float(shown[name][5])
        assert float(roofline) <= predicted
        assert predicted / float(calls) == pytest.approx(float(ratio), rel=0.03, abs=0.01)


def test_kernels_that_publish_between_programs_do_release(report):
    """The barrier check would say nothing of kernels in which it finds no release."""
    rows, _ = report
    for row in rows.values():
        assert (row.releases > 0) == (row.kernel in PUBLISHING), row.name


def test_launches_for_few_rows_ask_for_their_factors_before_they_wait(report):
    """Without prefetches and a wait the check of what comes before it would say nothing."""
    rows = [r for r in report[0].values() if "decode" in r.label]
    assert {r.arch for r in rows} == {"sm_80", "sm_90"}
    for row in rows:
        assert row.prefetches == 2 * (3 if re.search("grouped|dx_sum", row.label) else 1)


def test_the_expand_kernel_goes_through_tma_and_warpgroup_products(report):
    """And is launched while the library's product in front of it still runs."""
    rows = [r for r in report[0].values() if r.kernel == "expand_kernel"]
    assert {r.arch for r in rows} == {"sm_90"}
    for row in rows:
        assert row.tma_load >= 2
        assert row.tma_store >= 1
        assert row.wgmma_smem > 0
        assert row.mma_sync == row.cp_async == 0
        assert not row.warnings, "wgmma is serialised"


def test_row_kernel_keeps_h_in_registers(report):
    rows = [r for r in report[0].values() if r.h_in_registers]
    assert {r.kernel for r in rows} == {"row_kernel"}
    wide = [r for r in rows if r.wants_wgmma]
    assert wide
    assert all(r.wgmma_reg > 0 for r in wide)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"spill_bytes": 4}, "spills 4 B"),
        ({"shared_bytes": 232449}, "shared memory over 232448 B"),
        ({"arch": "sm_80"}, "shared memory over 166912 B"),
        ({"wgmma_reg": 0}, "H not in registers"),
        ({"wgmma_reg": 0, "h_in_registers": False}, None),
        ({"wgmma_reg": 0, "wgmma_smem": 0, "h_in_registers": False}, "no wgmma"),
        ({"wgmma_reg": 0, "wgmma_smem": 0, "dot_rows": 32}, None),
        ({"wgmma_reg": 0, "wgmma_smem": 0, "dtype": "fp32"}, None),
        ({"registers": 256, "warps": 8, "shared_bytes": 0, "resident": 1}, None),
        (
            {"registers": 136, "shared_bytes": 0, "resident": 4},
            "3 programs fit where the plan counts on 4",
        ),
        (
            {"shared_bytes": 120 << 10, "resident": 2},
            "1 programs fit where the plan counts on 2",
        ),
        ({"early": ("line 9: ld",)}, "before the wait for the kernel in front: line 9: ld"),
        ({"unguarded": ("line 7: atom",)}, "release without a barrier: line 7: atom"),
    ],
)
def test_what_is_a_fault(change, fault):
    row = replace(GOOD, **change)
    assert row.faults == (() if fault is None else (fault,))
    assert (fault or "ok") in triton_report.table([row])


def test_command_line_refuses_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton_report.interpreter, "active", lambda: True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        triton_report.main([])


def test_only_must_match_something(monkeypatch):
    monkeypatch.setattr(triton_report.interpreter, "active", lambda: False)
    with pytest.raises(ValueError, match="got 'no such kernel'"):
        triton_report.report(only="no such kernel")
