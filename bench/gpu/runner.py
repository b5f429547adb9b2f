"""Runs the families of a stage, each in a process of its own, and survives whatever they do.

A worker writes a line before and after each item. When it dies, or an item has no end within its
limit, the item that was begun goes on the skip list and another worker does the rest: a hang, a
crash or a context that is broken for good costs one item and the start of a process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu.plan import Stage
from bench.gpu.state import LOST, State, lines

__all__ = ["Clock", "Outcome", "Process", "run"]

# Seconds until a worker has imported torch and answers, and how often it may fail to.
_START, _STARTS = 90, 2
# Items that may be lost in a family and call: a kernel that hangs on all of them would take the
# rest of the stage, and three say as much.
_LOSSES = 3
_POLL = 0.02
# Status of a worker that gives itself up because every later call in it would fail.
BROKEN = 70


@dataclass(frozen=True)
class Clock:
    """Seconds of the plan; `scale` of them pass in one real second, so that tests need not wait."""

    scale: float = 1.0

    def now(self) -> float:
        """Seconds of the plan since some moment."""
        return time.monotonic() * self.scale


@dataclass
class Outcome:
    """What became of a stage: texts for people."""

    complete: bool = True
    notes: list[str] = field(default_factory=list)


class Process:
    """One worker and what it has said so far.

    Args:
        stage: what it runs.
        family: of the stage.
        state: where it reads what is done; its lines are added there.
        deadline: it begins no item after this moment.
        clock: of the deadline.
        env: its environment.
    """

    def __init__(
        self,
        stage: Stage,
        family: str,
        state: State,
        deadline: float,
        clock: Clock,
        env: dict[str, str],
    ) -> None:
        self.stage, self.family, self._state, self._clock = stage, family, state, clock
        name = f"{stage.name}.{family}"
        self._journal = state.folder / "journal" / f"{name}.jsonl"
        self._journal.unlink(missing_ok=True)
        self._read = 0
        self.item = ""
        self.complete = self.answered = False
        self.since = clock.now()
        command = [
            *(sys.executable, "-m", "bench.gpu.worker", stage.name, family),
            *("--state", str(state.folder), "--commit", state.commit),
            *("--journal", str(self._journal)),
            *("--seconds", f"{max(deadline - clock.now(), 0) / clock.scale:.3f}"),
        ]
        with (state.folder / "logs" / name).open("ab") as log:
            # A session of its own, so that what it started ends with it.
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def ended(self) -> int | None:
        """Take over what it wrote; its exit status once it is gone."""
        status = self._process.poll()
        self._take()
        if status is not None:
            self._kill_group()  # a compiler's helpers outlive who started them
        return status

    def _take(self) -> None:
        found = list(lines(self._journal))
        for line in found[self._read :]:
            self.answered, self.since = True, self._clock.now()
            if "begin" in line:
                self.item = line["begin"]
            elif "end" in line:
                self.item = ""
                record = {k: line.get(k) for k in ("outcome", "seconds", "note", "result")}
                self._add(line["end"], **record)
            elif line.get("complete"):
                self.complete = True
        self._read = len(found)

    def lose(self, why: str) -> None:
        """The item that was begun goes on the skip list."""
        seconds = round(self._clock.now() - self.since, 2)
        self._add(self.item, outcome=LOST, seconds=seconds, note=why, result=None)
        self.item = ""

    def finish(self) -> None:
        """Nothing is left of the family."""
        self._add("", outcome="complete", seconds=0.0, note="", result=None)

    def _add(self, item: str, **fields: object) -> None:
        self._state.add({"stage": self.stage.name, "family": self.family, "item": item, **fields})

    def kill(self) -> None:
        """End it and whatever it started, and take over its last lines."""
        self._kill_group()
        with contextlib.suppress(subprocess.TimeoutExpired):
            # A process that waits for a driver may take its time, and this run does not have it.
            self._process.wait(timeout=5)
        self._take()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    @property
    def last_words(self) -> str:
        """The last line of its log."""
        text = (self._state.folder / "logs" / f"{self.stage.name}.{self.family}").read_bytes()
        said = [line for line in text.decode(errors="replace").splitlines() if line.strip()]
        return said[-1].strip()[:200] if said else "it said nothing"


@dataclass
class _Family:
    """A family on its way through a stage."""

    name: str
    process: Process | None = None
    losses: int = 0
    starts: int = 0


def run(
    stage: Stage,
    state: State,
    deadline: float,
    clock: Clock,
    environment: Callable[[Stage], dict[str, str]],
    hard: float | None = None,
) -> Outcome:
    """Run what is left of a stage; returns when nothing is, or soon after the deadline.

    Args:
        stage: what to run.
        state: what is known; gets the records.
        deadline: no item begins after it.
        clock: of the deadline.
        environment: of the processes.
        hard: no process lives after it; by default items may end that began before the deadline.
    """
    outcome = Outcome()
    hard = deadline + stage.limit if hard is None else min(hard, deadline + stage.limit)
    waiting = [_Family(f) for f in stage.families if not state.complete(stage.name, f)]
    running: list[_Family] = []
    try:
        while waiting or running:
            while waiting and (stage.together or not running) and clock.now() < deadline:
                family = waiting.pop(0)
                # Families that take turns share what is left evenly.
                share = 1 if stage.together else 1 + len(waiting)
                until = clock.now() + (deadline - clock.now()) / share
                family.process = Process(
                    stage, family.name, state, until, clock, environment(stage)
                )
                running.append(family)
            if not running:
                break
            time.sleep(_POLL)
            for family in list(running):
                if not _look(family, stage, clock, hard, outcome):
                    continue
                running.remove(family)
                if family.process is None:
                    waiting.insert(0, family)
    finally:
        for family in running:
            if family.process is not None:
                family.process.kill()
    for family in waiting:
        outcome.complete = False
        outcome.notes.append(f"{family.name}: left for another call")
    return outcome


def _look(family: _Family, stage: Stage, clock: Clock, hard: float, outcome: Outcome) -> bool:
    """See to a family's process; True when it is over. `process` is then None if it goes on."""
    process = family.process
    assert process is not None
    status = process.ended()
    late = clock.now() - process.since
    if status is None and clock.now() >= hard:
        process.kill()
        outcome.complete = False
        outcome.notes.append(f"{family.name}: cut off{_at(process)}, goes on at the next call")
        return True
    if status is None:
        # Importing takes real time, whatever the clock.
        limit = stage.limit if process.answered else _START * clock.scale
        if late <= limit:
            return False
        process.kill()
        why = f"no end after {late:.0f} s"
    elif status == 0:
        if process.complete:
            process.finish()
        else:
            outcome.complete = False
            outcome.notes.append(f"{family.name}: out of time, goes on at the next call")
        return True
    elif status == BROKEN:
        why = ""  # the worker wrote down itself what it lost
    else:
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        why = f"the process ended with {how}"
    if process.item:
        process.lose(why)
    elif status != BROKEN:
        family.starts += 1
        words = process.last_words
        if not process.answered and family.starts >= _STARTS:
            outcome.complete = False
            outcome.notes.append(f"{family.name}: does not start: {why}: {words}")
            return True
    family.losses += 1
    if family.losses >= _LOSSES:
        outcome.complete = False
        outcome.notes.append(f"{family.name}: given up in this call after {_LOSSES} lost processes")
        return True
    family.process = None
    return True


def _at(process: Process) -> str:
    return f" in {process.item}" if process.item else ""


def interpreter_environment(work: Path) -> dict[str, str]:
    """What every worker finds in its environment."""
    return {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "MAESTRO_KERNELS_CACHE": str(work / "cache"),
        "TRITON_CACHE_DIR": str(work / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
    }
