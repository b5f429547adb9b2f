"""Command line: `python -m bench.gpu {prepare, 1, 2, 3, take}`; docs/dev/gpu-run.md says how."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bench.gpu import prepare, runner, state, summary
from bench.gpu.plan import BUDGET, CALLS, STAGES, Stage

__all__ = ["Call", "main"]

# Seconds that writing the files may take; the last of them are kept for it.
_WRITING = 40
# A stage with less time than this would not get past the start of its processes.
_LEAST = 10


class Call:
    """One of the three calls.

    Args:
        stages: in order, with the seconds that each may take.
        state: what is known.
        out: folder for the files.
        budget: seconds of the plan until everything is written.
        clock: of the budget.
        carried: folder of what was brought along.
        alone: whether stages of other calls are left alone even where there is time for them.
    """

    def __init__(
        self,
        stages: Mapping[str, float],
        known: state.State,
        out: Path,
        budget: float,
        clock: runner.Clock,
        carried: Path,
        alone: bool,
    ) -> None:
        self._alone = alone
        self._table_is_old = True
        self._stages, self._state, self._out = stages, known, out
        self._clock, self._carried = clock, carried
        self._begin = clock.now()
        self._end = self._begin + budget - _WRITING
        self._notes: dict[str, list[str]] = {}

    def run(self) -> int:
        """Everything that there is time for; 0, or 3 when something is left."""
        self._state.forget("environment")
        if not self._state.of("run"):
            # Rows carry its time, so that those of later calls belong to the same run.
            self._state.add({"stage": "run", "family": "", "item": "begun", "outcome": "passed"})
        # What an earlier call did not finish is taken up once this call's own stages are through.
        others = [] if self._alone else [name for name in STAGES if name not in self._stages]
        for name in (*self._stages, *others):
            self._stage(_of_test(STAGES[name]), self._stages.get(name, math.inf))
        self._write(last=True)
        rest = summary.left(self._state)
        return 3 if any("(" not in name for name in rest) else 0

    def _stage(self, stage: Stage, seconds: float) -> None:
        notes = self._notes.setdefault(stage.name, [])
        if all(self._state.complete(stage.name, f) for f in stage.families):
            return
        why = self._state.tool(stage.needs) if stage.needs else None
        if why is not None:
            notes.append(f"not possible here: {why}")
            return
        if self._clock.now() >= self._end - _LEAST:
            return
        if stage.env.get("MAESTRO_KERNELS_TABLE") == "measured" and self._table_is_old:
            self._report()
            self._table_is_old = False
        now = self._clock.now()
        if now >= self._end:
            return
        deadline = min(self._end, now + seconds)
        print(f"{now - self._begin:5.0f} s  {stage.name}, {deadline - now:.0f} s", flush=True)
        self._table_is_old |= stage.name == "table"
        outcome = runner.run(
            stage, self._state, deadline, self._clock, self._environment, hard=self._end
        )
        notes += outcome.notes
        self._write(last=False)

    def _environment(self, stage: Stage) -> dict[str, str]:
        work = self._state.folder
        stub = os.environ.get("MK_GPU_STUB") == "1"
        found = {
            **runner.interpreter_environment(work),
            "TRITON_INTERPRET": "1" if stub else "0",
            "MAESTRO_KERNELS_COMMIT": self._state.commit,
            "MK_GPU_STATE": str(work),
            "MK_GPU_CARRIED": str(self._carried),
            "MK_GPU_STARTED": self._state.started(),
            **stage.env,
        }
        table = work / "table.json"
        if found.get("MAESTRO_KERNELS_TABLE") == "measured":
            found["MAESTRO_KERNELS_TABLE"] = str(table) if table.exists() else "off"
        elif found.get("MAESTRO_KERNELS_TABLE") == "unset":
            del found["MAESTRO_KERNELS_TABLE"]
            # A folder of its own, in which nothing was tuned.
            found["MAESTRO_KERNELS_CACHE"] = str(work / "first-use")
        return found

    def _report(self) -> None:
        """Make the table and the pages, in a process: what it imports must not reach this one."""
        command = [
            *(sys.executable, "-m", "bench.gpu.report", "--state", str(self._state.folder)),
            *("--out", str(self._out), "--commit", self._state.commit),
        ]
        with (self._state.folder / "logs" / "report").open("ab") as log:
            try:
                subprocess.run(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment(STAGES["environment"]),
                    timeout=_WRITING,
                    check=True,
                )
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                self._notes.setdefault("environment", []).append(f"no report: {error}")

    def _write(self, *, last: bool) -> None:
        if last:
            self._report()
        spent = self._clock.now() - self._begin
        when = time.strftime("%F %T UTC", time.gmtime())
        header = [f"{', '.join(self._stages)}: {spent:.0f} s, {when}"]
        text = summary.text(self._state, header, self._notes)
        (self._out / "summary.txt").write_text(text, encoding="utf-8")
        state.save(self._state.folder, self._out, kernels=last)
        if last:
            print(f"\n{text}", end="", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in map(str, CALLS):
        one = commands.add_parser(name, help=f"run {', '.join(CALLS[int(name)])}")
        one.add_argument("--out", type=Path, required=True, help="folder for at most eight files")
        one.add_argument("--carried", type=Path, default=prepare.CARRIED, help="what was brought")
        one.add_argument("--work", type=Path, default=_work(), help="folder of this machine")
        one.add_argument("--budget", type=float, default=BUDGET, help="seconds, writing included")
        one.add_argument("--only", default="", help="these stages alone, comma-separated")
        one.add_argument("--accept", default="", help="commits whose records count too")
    prepare.register(commands)
    args = parser.parse_args(argv)
    if args.command not in map(str, CALLS):
        return int(args.run(args))
    stages: dict[str, float] = {**CALLS[int(args.command)]}
    if args.only:
        stages = dict.fromkeys(args.only.split(","), math.inf)
    unknown = [name for name in stages if name not in STAGES]
    if unknown:
        parser.error(f"--only: expected of {', '.join(STAGES)}, got {', '.join(unknown)}")
    commit = os.environ.get("MAESTRO_KERNELS_COMMIT") or prepare.commit()
    args.out.mkdir(parents=True, exist_ok=True)
    scale = float(os.environ.get("MK_GPU_CLOCK", "1"))
    clock = runner.Clock(scale)
    print(state.restored(args.work, args.carried), flush=True)
    if args.accept:
        os.environ["MK_GPU_ACCEPT"] = args.accept.replace(",", " ")
    known = state.State(args.work, commit, args.accept.split(","))
    return Call(
        stages, known, args.out, args.budget, clock, args.carried, alone=bool(args.only)
    ).run()


def _of_test(stage: Stage) -> Stage:
    """A stage with the families that MK_GPU_FAMILIES names: a test has no time for all of them."""
    chosen = os.environ.get("MK_GPU_FAMILIES", "").split()
    return replace(stage, families=tuple(f for f in stage.families if not chosen or f in chosen))


def _work() -> Path:
    # The same on every machine: Triton's cache holds absolute paths.
    return Path(tempfile.gettempdir()) / "maestro-kernels-gpu"


if __name__ == "__main__":
    sys.exit(main())
