"""What earlier calls found: one line per item, an archive to carry it to the next machine.

A machine starts bare. What a call leaves in its output folder is therefore all that the next one
needs: records, logs and the kernels that Triton compiled.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["ARCHIVE", "KERNELS", "LOST", "Record", "State", "restored", "save"]

ARCHIVE, KERNELS = "state.tar.gz", "kernels.tar.xz"
# An item that ended its process, or did not end: the skip list is made of these.
LOST = "lost"
# Fields: stage, family, item, commit, outcome, seconds, note, result. Outcomes: "passed", "failed"
# (a wrong result or an error), "skipped" (it does not apply), LOST, and "complete" for a family
# of which nothing is left.
Record = dict[str, Any]
# A file that comes back is at most this large.
_MOST = 15 << 20
_LOG = 100_000
# What Triton needs of its cache to launch a kernel again.
_LAUNCH = {".cubin", ".json", ".so"}


class State:
    """The records of one folder; one process writes them.

    Args:
        folder: made where it is not there.
        commit: of the code that runs now.
        accept: other commits whose records count as well.
    """

    def __init__(self, folder: Path, commit: str, accept: Iterable[str] = ()) -> None:
        self.folder, self.commit = folder, commit
        self._commits = {commit, *filter(None, accept)}
        for name in ("journal", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.path = folder / "records.jsonl"
        self.records = list(lines(self.path))

    def add(self, record: Record) -> None:
        """Keep a record, on disk too."""
        record = {"commit": self.commit, "at": round(time.time()), **record}
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def forget(self, stage: str) -> None:
        """Drop a stage: it is to be asked again."""
        self.records = [r for r in self.records if r["stage"] != stage]
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(r) + "\n" for r in self.records), encoding="utf-8")
        part.replace(self.path)

    def of(self, stage: str, family: str | None = None) -> list[Record]:
        """The last record of each item, of commits that count."""
        found = {
            (r["family"], r["item"]): r
            for r in self.records
            if r["stage"] == stage and r["commit"] in self._commits
            if family is None or r["family"] == family
        }
        return list(found.values())

    def complete(self, stage: str, family: str) -> bool:
        """Whether nothing is left of a family."""
        return any(r["outcome"] == "complete" for r in self.of(stage, family))

    def done(self, stage: str, family: str) -> list[str]:
        """Items that are not run again: those that have an outcome, lost ones too."""
        return [r["item"] for r in self.of(stage, family) if r["outcome"] != "complete"]

    def suspects(self, stage: str, family: str) -> list[str]:
        """Items that were lost at another commit: they are tried again, last."""
        return [
            r["item"]
            for r in self.records
            if (r["stage"], r["family"], r["outcome"]) == (stage, family, LOST)
            and r["commit"] not in self._commits
        ]

    def started(self) -> str:
        """UTC time of the first record of the commits that count; rows of one run share it."""
        first = min((r["at"] for r in self.records if r["commit"] in self._commits), default=None)
        return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(first))

    def tool(self, name: str) -> str | None:
        """Why a tool of the environment stage cannot be used here, or None."""
        for record in self.of("environment", name):
            if record["outcome"] != "complete":
                return None if record["outcome"] == "passed" else record["note"] or "not found"
        return "nobody has looked for it"


def lines(path: Path) -> Iterator[Record]:
    """The whole lines of a file of records; none where there is no file."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # cut off when a process was killed
            continue
        if isinstance(record, dict):
            yield record


def restored(work: Path, archives: Path) -> str:
    """Unpack what an earlier call left, unless `work` knows as much already; says what was done."""
    have = work / "records.jsonl"
    archive = archives / ARCHIVE
    if not archive.exists():
        return "goes on" if have.exists() else "starts anew"
    with tarfile.open(archive) as tar:
        size = tar.getmember("records.jsonl").size
    if have.exists() and have.stat().st_size >= size:
        return "goes on: this machine is still warm"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for name in (ARCHIVE, KERNELS):
        if (archives / name).exists():
            with tarfile.open(archives / name) as tar:
                tar.extractall(work, filter="data")
    return f"goes on from {ARCHIVE}"


def save(work: Path, out: Path, *, kernels: bool) -> None:
    """Write the archives into the output folder, each complete or not at all.

    Args:
        work: the folder of the state.
        out: where they go.
        kernels: also what Triton compiled, which takes some seconds.
    """
    names = ["records.jsonl", *(p.relative_to(work).as_posix() for p in work.glob("*.txt"))]
    for log in sorted((work / "logs").glob("*")):
        if log.stat().st_size > _LOG:
            log.write_bytes(b"...\n" + log.read_bytes()[-_LOG:])
        names.append(f"logs/{log.name}")
    _pack(work, names, out / ARCHIVE, "w:gz")
    if kernels:
        cache = work / "triton"
        files = sorted(
            (p for p in cache.rglob("*") if p.suffix in _LAUNCH), key=lambda p: -p.stat().st_mtime
        )
        _pack(work, [p.relative_to(work).as_posix() for p in files], out / KERNELS, "w:xz")


def _pack(work: Path, names: list[str], target: Path, mode: str) -> None:
    names = [name for name in names if (work / name).exists()]
    if not names:
        return
    part = work / f".{target.name}"
    options: dict[str, Any] = {"preset": 1} if mode == "w:xz" else {"compresslevel": 6}
    while names:
        with tarfile.open(part, mode, **options) as tar:  # type: ignore[call-overload]
            for name in names:
                tar.add(work / name, name)
        if part.stat().st_size <= _MOST:
            # Not every file system lets a rename cross it.
            staged = target.with_name(f".{target.name}")
            shutil.copyfile(part, staged)
            os.replace(staged, target)
            break
        names = names[: len(names) // 2]
    part.unlink(missing_ok=True)
