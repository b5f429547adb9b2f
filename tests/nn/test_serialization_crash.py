"""Saves that are killed, that fail and that happen at once: what is there is one of them."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from file_faults import Faults
from places import SUPPORT
from saving_process import Checkpoint, Folder, leftovers

import maestro_kernels as mk

PLACES = {"folder": Folder, "checkpoint": Checkpoint}
exhaustive = pytest.mark.exhaustive


def run(mode, kind, folder, amount):
    paths = [str(Path(mk.__file__).parents[1]), str(SUPPORT)]
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "saving_process.py"), mode, kind, str(folder), str(amount)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("kind", "amount"),
    [
        ("folder", 300),
        ("checkpoint", 60),
        pytest.param("folder", 5000, marks=exhaustive),
        pytest.param("checkpoint", 5000, marks=exhaustive),
    ],
)
def test_a_killed_save_leaves_the_old_or_the_new_one(kind, amount, tmp_path):
    outcome = run("kill", kind, tmp_path, amount)
    # Both sides of the one step that counts were hit, and what was left has been collected.
    assert all(outcome[name] for name in ("old", "new", "left"))
    assert outcome["old"] + outcome["new"] + outcome["whole"] == amount
    assert outcome["last"]
    assert outcome["leftovers"] == []


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [("folder", 10), ("checkpoint", 3), pytest.param("folder", 120, marks=exhaustive)],
)
def test_two_writers_and_two_readers_lose_nothing(kind, seconds, tmp_path):
    outcome = run("race", kind, tmp_path, seconds)
    assert all(writer["saves"] > 1 for writer in outcome["writers"])
    assert all(reader["different"] > 1 for reader in outcome["readers"])
    assert outcome["last"]
    assert outcome["leftovers"] == []
    if kind == "folder":
        assert copy_is_true(tmp_path)


def copy_is_true(folder):
    """Whether the JSON for people tells of the tensors beside it."""
    from maestro_kernels.nn.saved_file import read_header

    structure, digest = read_header(folder / "model.safetensors")
    copy = json.loads((folder / "maestro.json").read_text())
    return copy == {**json.loads(structure), "sha256": digest}


def failing_at(number, code):
    def before(i, name, first):
        if i == number:
            raise OSError(code, os.strerror(code))

    return Faults(before)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("existing", [True, False], ids=["again", "first"])
def test_any_call_may_fail(kind, existing, code, tmp_path):
    with Faults() as faults:
        place = PLACES[kind](tmp_path / "0" / "deep")
        place.save(1)
        if existing:
            faults.events.clear()
            place.save(1)
    calls = [name for name, _ in faults.events]
    commit = calls.index("replace")
    for number, name in enumerate(calls):
        place = PLACES[kind](tmp_path / f"{number + 1}" / "deep")
        if existing:
            place.save(1)
        raised = None
        with failing_at(number, code):
            try:
                place.save(2)
            except OSError as error:
                raised = error
        if raised is not None:
            assert raised.errno == code
            assert ".partial" not in str(raised), "the user knows of no such file"
            assert kind != "folder" or str(raised.strerror).startswith("save_pretrained: ")
        if existing or number > commit or raised is None:
            found = place.load()
            assert found == (1 if number <= commit and raised else 2)
            assert name == "unlink" or leftovers(place) == []
        else:
            # Nothing was there, nothing is.
            assert not place.path.parent.exists() or name == "mkdir"
        place.save(3)
        assert place.load() == 3
        assert leftovers(place) == []


@pytest.mark.parametrize("kind", PLACES)
def test_content_is_on_disk_before_its_name_and_the_name_before_the_end(kind, tmp_path):
    place = PLACES[kind](tmp_path / "new" / "deep")
    with Faults() as faults:
        opened = {}
        faults.after = lambda i, name, first: None
        real = faults.watched

        def watched(name, call):
            def note(*args, **kwargs):
                result = call(*args, **kwargs)
                if name == "open":
                    folder = stat.S_ISDIR(os.fstat(result).st_mode)
                    opened[result] = ("folder " if folder else "file ") + str(args[0])
                return result

            return real(name, note)

        faults.watched = watched
        steps = []
        faults.before = lambda i, name, first: steps.append((name, opened.get(first, str(first))))
        place.save(1)
    commits = [i for i, (name, _) in enumerate(steps) if name == "replace"]
    assert len(commits) == len(place.files)
    for i in commits:
        partial = steps[i][1]
        mine = [name for name, about in steps[:i] if about == f"file {partial}"]
        assert "write" in mine
        assert mine[-1] == "fsync"
        assert ("fsync", f"folder {place.path}") in steps[i:]
        assert not any(about == f"file {partial}" for name, about in steps[i:] if name == "write")
    # Of a new folder the name has to be on disk too, and before anything counts on it.
    for made in (place.path, place.path.parent):
        at = steps.index(("mkdir", str(made)))
        assert ("fsync", f"folder {made.parent}") in steps[at : commits[0]]
