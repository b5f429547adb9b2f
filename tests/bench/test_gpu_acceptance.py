"""The GPU acceptance run as far as it goes without a GPU: arguments, resuming, files, criteria."""

import json
import os
import subprocess
import sys

import pytest
import torch
from places import ROOT

from maestro_kernels.benchmark import rows
from maestro_kernels.benchmark.providers import default_providers
from maestro_kernels.benchmark.summary import outcomes
from maestro_kernels.measure.cases import Case, Layer

SCRIPT = ROOT / "bench" / "gpu_acceptance.sh"
sys.path.insert(0, str(ROOT))

from bench import gpu_suite  # noqa: E402


def script(*arguments, **environment):
    env = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(
        [str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, env=env, timeout=120
    )


def dry(tmp_path, *arguments, **environment):
    environment = {"MK_DRY_RUN": "1", "MK_STATE": str(tmp_path / "state"), **environment}
    return script(tmp_path / "out", *arguments, **environment)


def test_help_and_wrong_arguments():
    done = script("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: bench/gpu_acceptance.sh OUT_DIR")
    for arguments, message in (
        ((), "expected OUT_DIR"),
        (("a", "b"), "one OUT_DIR"),
        (("a", "--nonsense"), "unknown option --nonsense"),
        (("a", "--budget", "soon"), "--budget: expected seconds, got soon"),
        (("a", "--only", "tests,lunch"), "got lunch"),
    ):
        done = script(*arguments)
        assert done.returncode == 2
        assert message in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_refuses_and_writes_nothing(tmp_path):
    done = script(tmp_path / "out", MK_STATE=str(tmp_path / "state"))
    assert done.returncode == 2
    assert "expected an NVIDIA GPU" in done.stderr
    assert not any(tmp_path.iterdir())
    assert gpu_suite.main(["decode", "--out", str(tmp_path / "rows.jsonl")]) == 2


def test_finished_stages_are_not_run_again_and_failed_ones_are(tmp_path):
    done = dry(tmp_path, "--only", "micro,tune", MK_DRY_STAGE='echo ran; [[ "$name" == micro ]]')
    assert done.returncode == 1
    assert "FAILED  tune" in done.stdout
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "passed  micro" in summary
    assert "FAILED  tune  status 1: ran" in summary
    assert "to do   decode" in summary
    assert "===== tune\nran" in (tmp_path / "out" / "log.txt").read_text()
    done = dry(tmp_path, "--only", "micro,tune")
    assert done.returncode == 0
    assert "done    micro" in done.stdout
    assert "run     tune" in done.stdout
    done = dry(tmp_path, "--only", "micro", "--fresh")
    assert "run     micro" in done.stdout


def test_a_stage_out_of_time_is_left_for_another_call(tmp_path):
    # A subshell, as a stage is: exit alone would end the script.
    done = dry(tmp_path, "--only", "decode", MK_DRY_STAGE="(exit 3)")
    assert done.returncode == 3
    assert "later   decode" in done.stdout
    done = dry(tmp_path, "--budget", "10")
    assert done.returncode == 3
    assert done.stdout.count("later") == 12
    done = dry(tmp_path)
    assert done.returncode == 0
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_another_commit_starts_anew(tmp_path):
    assert dry(tmp_path, "--only", "micro").returncode == 0
    (tmp_path / "state" / "commit").write_text("other\n")
    assert "run     micro" in dry(tmp_path, "--only", "micro").stdout


@pytest.mark.parametrize("part", gpu_suite.PARTS)
def test_parts_are_made_of_different_cases_and_quick_ones_of_few(part):
    full, quick = ([*gpu_suite.PARTS[part](q)] for q in (False, True))
    assert len({case.id for case in full}) == len(full)
    assert 0 < len(quick) <= min(12, len(full))
    assert {case.dtype for case in full} == {"bfloat16"}


@pytest.fixture
def tiny(monkeypatch):
    def cases(quick):
        for N in (16, 24, 32):
            yield Case("tiny", 2, (Layer(N, 16, 8, 8),), "float32")

    monkeypatch.setitem(gpu_suite.PARTS, "decode", cases)

    def chosen(case):
        return [p for p in default_providers(case) if p.name in ("ours", "two matmuls")]

    monkeypatch.setattr(gpu_suite, "default_providers", chosen)
    return cases


def test_a_suite_that_was_cut_off_goes_on(tmp_path, tiny, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"

    def go(limit):
        return gpu_suite.measure("decode", out, quick=True, limit=limit, device="cpu", seconds=0.01)

    assert go(-1.0) == 3
    assert not out.exists()
    assert go(60.0) == 0
    first = out.read_text()
    assert {row.N for row in rows.load(out)} == {(16,), (24,), (32,)}
    # Cut off in the middle of the last case, and of a line.
    lines = first.splitlines()
    kept = [line for line in lines if json.loads(line)["N"] != 32]
    out.write_text("\n".join(kept) + "\n" + lines[-1][:40])
    capsys.readouterr()
    assert go(60.0) == 0
    assert "N32" in capsys.readouterr().out
    found = rows.load(out)
    assert len(found) == len(lines)
    assert len({row.run for row in found}) == 1
    assert out.read_text().startswith("\n".join(kept))
    assert gpu_suite.main(["report", "--out", str(out), "--page", str(tmp_path / "r.html")]) == 0
    assert "auto, worst case" in capsys.readouterr().out
    assert "<!doctype html>" in (tmp_path / "r.html").read_text()


def test_criteria_take_device_times_with_cold_weights(tmp_path, tiny):
    out = tmp_path / "rows.jsonl"
    gpu_suite.measure("decode", out, quick=True, limit=60, device="cpu", seconds=0.01)
    as_graph = [rows.replace(row, launch="graph") for row in rows.load(out)]
    scaled = [
        rows.replace(r, p20_us=t, p50_us=t, p80_us=t)
        for r in as_graph
        for t in [10.0 if r.provider == "ours" else 19.0 if r.cache == "cold" else 5.0]
    ]
    lines = gpu_suite.check(outcomes(scaled))
    assert "at least 1.6     1.90  met" in lines[0]
    assert "no rows" in lines[1]
    assert "at least 0.98    1.90  met" in lines[-1]
    slow = [rows.replace(r, p20_us=20.0, p50_us=20.0, p80_us=20.0) if r.N == (24,)
            and r.provider == "ours" else r for r in scaled]  # fmt: skip
    assert gpu_suite.check(outcomes(slow))[-1].endswith("0.95  MISSED")
