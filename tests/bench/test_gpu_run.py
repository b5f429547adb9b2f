"""The GPU run against the stub: what a kernel can do to its process costs one item, no more."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile

import pytest
from places import ROOT

from bench.gpu import prepare, runner, suite
from bench.gpu.plan import BUDGET, CALLS, KERNELS, OVERHEAD, STAGES, TOTAL
from bench.gpu.state import LOST, State, lines, restored, save

DECODE = suite.cases()[0]
CHECKED = [case.id for case in suite.key()]
# Seconds of the plan in one real second.
SCALE = 2
# Where nothing hangs a slow clock gives a busy machine the time that it needs.
SLOWLY = "0.2"


def call(number, folder, *arguments, out="out", work="work", **environment):
    """(status, seconds of the plan) of a call as the GPU machine would run it."""
    command = [sys.executable, "-m", "bench.gpu", str(number), "--out", str(folder / out)]
    command += ["--work", str(folder / work), "--carried", str(folder / "carried"), *arguments]
    env = {
        **os.environ,
        "MK_GPU_STUB": "1",
        "MK_GPU_CLOCK": str(SCALE),
        "MAESTRO_KERNELS_COMMIT": "1111",
        **environment,
    }
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=400, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    seconds = float((folder / out / "summary.txt").read_text().split(" s, ")[0].split()[-1])
    return done.returncode, seconds


def outcomes(folder, work="work"):
    found = list(lines(folder / work / "records.jsonl"))
    return {f"{r['stage']}/{r['family']}/{r['item']}": r["outcome"] for r in found if r["item"]}


PLANTS = {
    "micro/cublas/two cuBLAS M 64 r 64": "hang",
    f"checks/native-decode/{CHECKED[0]}": "segv",
    f"checks/native-rows/{CHECKED[5]}": "crash",
    f"checks/native-decode/{CHECKED[3]}": "sticky",
    f"checks/auto/{CHECKED[1]}": "wrong",
    f"checks/auto/{CHECKED[2]}": "raise",
    f"table/native-decode/{DECODE.id}": "slow",
}
FAMILIES = "device ncu cublas native-decode native-rows auto"
LOSSES = {name for name, what in PLANTS.items() if what not in ("wrong", "raise")}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """One call with everything planted that a GPU can do; 6 items of each of some families."""
    folder = tmp_path_factory.mktemp("gpu")
    status, seconds = call(
        1,
        folder,
        *("--only", "environment,micro,checks,table"),
        MK_GPU_MOST="6",
        MK_GPU_FAMILIES=FAMILIES,
        MK_GPU_PLANT=json.dumps(PLANTS),
        MK_GPU_SLOW="600",
    )
    return folder, status, seconds


def test_each_fault_costs_its_own_item(first):
    folder, _, _ = first
    found = outcomes(folder)
    lost = {name for name, outcome in found.items() if outcome == LOST}
    assert lost == LOSSES
    failed = {name for name, outcome in found.items() if outcome == "failed"}
    assert failed == {f"checks/auto/{CHECKED[1]}", f"checks/auto/{CHECKED[2]}"}
    # Everything else of the same families was run, in the same call.
    for family in ("native-decode", "native-rows", "auto"):
        assert len([n for n in found if n.startswith(f"checks/{family}/")]) == 6
    assert len([n for n in found if n.startswith("table/native-decode/")]) == 6
    assert found["micro/cublas/two cuBLAS M 1024 r 64"] == "passed"


def test_what_happened_is_said(first):
    folder, status, _ = first
    text = (folder / "out" / "summary.txt").read_text()
    assert status == 3  # other stages are left
    for words in (
        "commit 1111",
        "two cuBLAS M 64 r 64: no end after",
        "ended with signal SIGSEGV",
        "ended with exit status 3",
        "then every call fails: CUDA error: an illegal memory access",
        "Triton Error [CUDA]: out of resource",
        "ncu is not installed",
        "rows/auto",
    ):
        assert words in text, (words, text)


def test_it_stays_within_its_budget_and_leaves_at_most_eight_files(first):
    folder, _, seconds = first
    assert seconds <= BUDGET
    files = sorted(p.name for p in (folder / "out").iterdir())
    assert len(files) <= 8
    assert {"summary.txt", "state.tar.gz", "table.json"} <= set(files)
    assert all(p.stat().st_size < 16 << 20 for p in (folder / "out").iterdir())


def test_a_bare_machine_goes_on_where_the_first_stopped(first, tmp_path):
    folder, _, _ = first
    (tmp_path / "carried").mkdir()
    shutil.copy(folder / "out" / "state.tar.gz", tmp_path / "carried")
    before = outcomes(folder)
    # Nothing is planted any more, and yet what was lost is not tried again.
    stages = "environment,checks,rows,training,first-use,launches"
    few = {"MK_GPU_MOST": "2", "MK_GPU_FAMILIES": FAMILIES, "MK_GPU_CLOCK": SLOWLY}
    call(2, tmp_path, "--only", stages, **few)
    after = outcomes(tmp_path)
    assert {name: after[name] for name in before if not name.startswith("environment")} == {
        name: outcome for name, outcome in before.items() if not name.startswith("environment")
    }
    new = {name.split("/")[0] for name in after.keys() - before.keys()}
    assert new == {"rows", "training", "first-use", "launches"}
    assert {after[name] for name in after.keys() - before.keys()} == {"passed"}
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"rows.jsonl", "report.html", "table.json", "profile.txt"} <= names
    assert len(names) <= 8
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert {row["versions"]["commit"] for row in rows} == {"1111"}
    assert {row["cache"] for row in rows} == {"cold"}
    text = (tmp_path / "out" / "summary.txt").read_text()
    assert "auto by table, eager, worst" in text
    assert "auto by first use, eager, worst" in text


def test_out_of_time_is_no_fault(tmp_path):
    # The clock runs so fast that no machine is done with the family's items in time.
    few = {"MK_GPU_FAMILIES": "triton-two_phase.0", "MK_GPU_CLOCK": "8"}
    status, _ = call(1, tmp_path, "--budget", "70", "--only", "checks", **few)
    assert status == 3
    found = outcomes(tmp_path)
    assert LOST not in found.values()
    assert "at the next call" in (tmp_path / "out" / "summary.txt").read_text()
    few["MK_GPU_CLOCK"] = SLOWLY
    call(1, tmp_path, "--budget", "70", "--only", "checks", **few)
    assert len(outcomes(tmp_path)) > len(found)


def test_tools_that_work_are_used(tmp_path):
    """A profiler and a sanitizer that run what they are told, as the real ones do."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, words in (
        ("ncu", "sm__cycles_active.avg cycle 1234"),
        ("compute-sanitizer", "========= ERROR SUMMARY: 0 errors"),
    ):
        program = bin / name
        program.write_text(
            f"#!/bin/sh\nwhile [ \"$1\" != '{sys.executable}' ]; do shift; done\n"
            f"\"$@\" || exit 9\necho '{words}'\n"
        )
        program.chmod(0o755)
    path = f"{bin}:{os.environ['PATH']}"
    stages = "environment,ncu,sanitizer"
    families = "device ncu compute-sanitizer native-decode"
    few = {"MK_GPU_MOST": "1", "MK_GPU_FAMILIES": families, "MK_GPU_CLOCK": SLOWLY}
    call(3, tmp_path, "--only", stages, PATH=path, **few)
    found = outcomes(tmp_path)
    assert found["environment/ncu/works"] == "passed"
    assert {found[n] for n in found if n.startswith("ncu/native")} == {"passed"}
    assert {found[n] for n in found if n.startswith("sanitizer/native")} == {"passed"}
    assert "===== native-decode" in (tmp_path / "out" / "profile.txt").read_text()


# --- without processes ---------------------------------------------------------------------------


def record(stage, family, item, outcome="passed", **fields):
    return {"stage": stage, "family": family, "item": item, "outcome": outcome, "note": "",
            "seconds": 1.0, "result": None, **fields}  # fmt: skip


def test_three_calls_fit_into_the_time_of_a_machine():
    assert len(CALLS) == 3
    assert 3 * (BUDGET + OVERHEAD) <= TOTAL
    assert BUDGET + 30 <= 600
    for stages in CALLS.values():
        assert sum(stages.values()) <= BUDGET
    assert {name for stages in CALLS.values() for name in stages} == set(STAGES)


def test_commands_are_short_and_name_the_commit():
    for number in CALLS:
        text = prepare.command(number, prepare.commit())
        assert len(text) < 2000
        assert "MAESTRO_KERNELS_COMMIT=" in text
        assert '--out "$OUT"' in text


def test_prepare_builds_for_one_architecture_and_take_keeps_the_archives(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\nmkdir -p "$5/maestro_kernels"\n'
        'echo "$MK_NATIVE $MK_CMAKE_ARGS" >"$5/maestro_kernels/_native.so"\n'
    )
    python.chmod(0o755)
    parser = argparse.ArgumentParser()
    prepare.register(parser.add_subparsers())
    args = parser.parse_args(["prepare", "--python", str(python)])
    assert args.run(args) == 0
    carried = tmp_path / prepare.CARRIED
    assert (carried / "_native.so").read_text() == "1 -DMK_CUDA_GENCODE=90a\n"
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "carry: out/gpu"
    assert [line.split()[4] for line in said[2:]] == ["1", "2", "3"]
    back = tmp_path / "back"
    back.mkdir()
    (back / "state.tar.gz").write_text("state")
    args = parser.parse_args(["take", str(back)])
    assert args.run(args) == 0
    assert (carried / "state.tar.gz").read_text() == "state"


def test_another_commit_asks_again_and_tries_lost_items_last(tmp_path):
    old = State(tmp_path, "old")
    old.add(record("checks", "auto", "a", LOST))
    old.add(record("checks", "auto", "b"))
    old.add(record("checks", "auto", "", "complete"))
    assert old.complete("checks", "auto")
    assert old.done("checks", "auto") == ["a", "b"]
    new = State(tmp_path, "new")
    assert not new.complete("checks", "auto")
    assert new.done("checks", "auto") == []
    from bench.gpu.items import Item
    from bench.gpu.worker import left

    items = [Item(name, dict) for name in "abc"]
    assert [i.name for i in left(items, new, "checks", "auto")] == ["b", "c", "a"]
    both = State(tmp_path, "new", ["old"])
    assert [i.name for i in left(items, both, "checks", "auto")] == ["c"]
    assert both.complete("checks", "auto")


def test_an_archive_holds_what_the_next_machine_needs(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    out.mkdir()
    state = State(work, "c")
    state.add(record("micro", "chip", "x", result={"value": 1}))
    (work / "logs" / "micro.chip").write_text("said\n")
    kernel = work / "triton" / "key"
    kernel.mkdir(parents=True)
    for name in ("k.cubin", "k.json", "k.ptx", "launcher.so"):
        (kernel / name).write_bytes(b"0" * 100)
    save(work, out, kernels=True)
    assert {p.name for p in out.iterdir()} == {"state.tar.gz", "kernels.tar.xz"}
    with tarfile.open(out / "kernels.tar.xz") as tar:
        assert "triton/key/k.cubin" in tar.getnames()
        assert "triton/key/k.ptx" not in tar.getnames()
    bare = tmp_path / "bare"
    assert restored(bare, out) == "goes on from state.tar.gz"
    assert State(bare, "c").of("micro", "chip")[0]["result"] == {"value": 1}
    assert (bare / "triton" / "key" / "launcher.so").exists()
    # A machine that is still warm knows more than what it gave.
    state.add(record("micro", "chip", "y"))
    assert "warm" in restored(work, out)
    assert len(State(work, "c").of("micro", "chip")) == 2
    assert restored(tmp_path / "new", tmp_path / "nothing") == "starts anew"


def test_too_large_an_archive_keeps_the_newest(tmp_path, monkeypatch):
    from bench.gpu import state as module

    monkeypatch.setattr(module, "_MOST", 20_000)
    work, out = tmp_path / "work", tmp_path / "out"
    out.mkdir()
    State(work, "c").add(record("micro", "chip", "x"))
    cache = work / "triton"
    cache.mkdir()
    for age in range(8):
        path = cache / f"{age}.cubin"
        path.write_bytes(os.urandom(4000))
        os.utime(path, (1000 - age, 1000 - age))
    save(work, out, kernels=True)
    assert (out / "kernels.tar.xz").stat().st_size <= 20_000
    with tarfile.open(out / "kernels.tar.xz") as tar:
        assert tar.getnames()[0] == "triton/0.cubin"
        assert 0 < len(tar.getnames()) < 8


def test_a_line_that_was_cut_off_is_no_record(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"a": 1}\n{"b": 2')
    assert list(lines(path)) == [{"a": 1}]


def test_a_family_that_does_not_start_is_told_and_left(tmp_path):
    """A worker that dies at import: a library that crashes its process when it is loaded."""
    state = State(tmp_path, "c")
    clock = runner.Clock(20)
    outcome = runner.run(
        STAGES["micro"],
        state,
        clock.now() + 100,
        clock,
        lambda stage: {**os.environ, "PYTHONPATH": "", "PYTHONHOME": str(tmp_path)},
    )
    assert not outcome.complete
    assert "chip: does not start: the process ended with exit status 1" in outcome.notes[0]
    assert state.of("micro") == []


def test_kernels_are_the_strategies_of_the_backends():
    from maestro_kernels.backends import native, triton

    found = {f"triton-{s}" for s in triton.STRATEGIES["cuda"]}
    found |= {f"native-{s}" for s in native.STRATEGIES["cuda"]}
    assert found == set(KERNELS)
