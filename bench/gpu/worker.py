"""The process that runs the items of one family: `python -m bench.gpu.worker STAGE FAMILY ...`.

Before and after each item it writes a line to its journal, which the parent reads.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.gpu import device as devices
from bench.gpu.items import Item
from bench.gpu.plan import SHARDS, STAGES, Stage
from bench.gpu.runner import BROKEN
from bench.gpu.state import LOST, State

__all__ = ["left", "main", "run_item"]

# One line of a traceback or message in a record.
_NOTE = 300


def items_of(device: devices.Device, stage: Stage, family: str) -> Iterable[Item]:
    """The items of a family, most wanted first; of FAMILY.1 every so manieth of them."""
    module = importlib.import_module(f"bench.gpu.{stage.module}")
    name, _, shard = family.partition(".")
    found: Iterable[Item] = module.items(device, stage, name)
    return list(found)[int(shard) :: SHARDS] if shard else found


def left(items: Iterable[Item], state: State, stage: str, family: str) -> list[Item]:
    """What has no outcome yet; what was lost at another commit comes last."""
    done, suspects = set(state.done(stage, family)), set(state.suspects(stage, family))
    rest = [item for item in items if item.name not in done]
    return [i for i in rest if i.name not in suspects] + [i for i in rest if i.name in suspects]


def run_item(device: devices.Device, item: Item, where: str) -> dict[str, Any]:
    """The record of one item. A broken context makes it LOST."""
    started = time.perf_counter()
    outcome, note, result = "passed", "", None
    try:
        device.begin(f"{where}/{item.name}")
        result = item.run()
        device.check()
        if result and result.get("wrong"):
            outcome, note = "failed", result["wrong"]
    except devices.Skip as reason:
        outcome, note = "skipped", str(reason)
    except Exception as error:  # one item must not cost the others, whatever it raises
        traceback.print_exc()
        outcome, note = "failed", f"{type(error).__name__}: {_first_line(error)}"
    try:
        device.check()
    except RuntimeError as error:
        outcome, note = LOST, f"{note or 'passed'}, then every call fails: {_first_line(error)}"
    seconds = round(time.perf_counter() - started, 3)
    return {"outcome": outcome, "seconds": seconds, "note": note[:_NOTE], "result": result}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def _tell_of_kernels(say: Callable[..., None]) -> None:
    """A line for each kernel that Triton has compiled and loaded, which takes it seconds."""
    try:
        from triton import knobs
    except ImportError:
        return

    def loaded(module: object, function: object, name: str, *_: object) -> None:
        say(alive=name)

    knobs.runtime.kernel_load_end_hook.add(loaded)


def main(argv: list[str] | None = None) -> int:
    """Run what is left until it is done or time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("family")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--small", action="store_true", help="only items fit for a sanitizer")
    args = parser.parse_args(argv)
    end = time.monotonic() + args.seconds
    state = State(args.state, args.commit, os.environ.get("MK_GPU_ACCEPT", "").split())
    stage = STAGES[args.stage]
    with args.journal.open("a", encoding="utf-8") as journal:

        def say(**line: object) -> None:
            journal.write(json.dumps(line) + "\n")
            journal.flush()

        device = devices.here()
        found = items_of(device, stage, args.family)
        items = device.some(i for i in found if i.small or not args.small)
        rest = items if args.small else left(items, state, stage.name, args.family)
        say(left=len(rest), of=len(items))
        # What is imported stays; graphs are captured after a collection each.
        gc.freeze()
        _tell_of_kernels(say)
        wrong = 0
        for item in rest:
            if time.monotonic() > end:
                return 0
            say(begin=item.name)
            record = run_item(device, item, f"{stage.name}/{args.family}")
            device.tidy()
            say(end=item.name, **record)
            wrong += record["outcome"] in ("failed", LOST)
            print(f"{record['outcome']:<8} {item.name}  {record['note']}", flush=True)
            if record["outcome"] == LOST:
                return BROKEN
        say(complete=True)
    return int(bool(wrong)) if args.small else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # A broken context can make interpreter shutdown hang or crash.
    os._exit(status)
