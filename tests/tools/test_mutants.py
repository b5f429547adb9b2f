"""The list of planted faults fits the code and the tests; `make mutants` runs it."""

import subprocess
import sys
from collections import Counter

import pytest

from tools.mutants.__main__ import ROOT, main, mutated, verdict
from tools.mutants.fault import Fault
from tools.mutants.faults import FAULTS


def test_fifty_faults_have_names_of_their_own():
    assert len(FAULTS) >= 50
    assert [name for name, count in Counter(f.name for f in FAULTS).items() if count > 1] == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_planted_in_exactly_one_place(fault):
    text = mutated(fault, ROOT)
    assert text != (ROOT / fault.file).read_text(encoding="utf-8")
    if fault.file.endswith(".py"):
        compile(text, fault.file, "exec")


def test_every_test_that_must_catch_one_exists():
    tests = sorted({fault.test for fault in FAULTS})
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *tests], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = done.stdout.splitlines()
    assert [t for t in tests if not any(f == t or f.startswith(f"{t}[") for f in found)] == []


def test_what_does_not_apply_is_named(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    fault = Fault("twice", "a.py", "x = 1", "x = 2", "t.py::t", "harm")
    with pytest.raises(ValueError, match=r"twice: old: expected exactly once in a.py, got 2 times"):
        mutated(fault, tmp_path)
    (tmp_path / "a.py").write_text("y = 1\n")
    with pytest.raises(ValueError, match=r"in a.py, got 0 times: 'x = 1'"):
        mutated(fault, tmp_path)
    (tmp_path / "a.py").unlink()
    with pytest.raises(ValueError, match=r"twice: file: expected a.py, got no such file"):
        mutated(fault, tmp_path)


@pytest.mark.parametrize(
    ("status", "output", "caught", "how"),
    [
        (0, "3 passed in 1 s", False, "SURVIVED"),
        (0, "1 skipped in 1 s", False, "NOT RUN"),
        (1, "FAILED t.py::t - assert 1 == 2\n1 failed", True, "assert 1 == 2"),
        (1, "ERROR t.py::t - ValueError: x\n1 error", True, "ValueError: x"),
        (1, "ERROR t.py::t - ImportError: no\n1 error", False, "BROKEN: pytest ended with 1: Imp"),
        (4, "ERROR: not found: t.py::t\n", False, "BROKEN: pytest ended with 4"),
        (-1, "", False, "BROKEN: no end"),
    ],
)
def test_a_fault_is_caught_by_a_failure_and_not_by_a_broken_run(status, output, caught, how):
    found = verdict(status, output)
    assert found[0] is caught
    assert found[1].startswith(how)


def test_names_are_checked_and_listed(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--only", "nothing-of-that-name"])
    assert left.value.code == 2
    assert "got nothing-of-that-name" in capsys.readouterr().err
    assert main(["--list", "--only", FAULTS[0].name]) == 0
    out = capsys.readouterr().out
    assert FAULTS[0].harm in out
    assert FAULTS[0].test in out


def test_a_fault_is_planted_in_a_copy_and_tried(capsys):
    name = "fraction-above-one"
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    before = (ROOT / fault.file).read_bytes()
    assert main(["--only", name]) == 0
    assert "caught" in capsys.readouterr().out
    assert (ROOT / fault.file).read_bytes() == before
