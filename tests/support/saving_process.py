"""Processes that save and load one small model, killed or all at once; see test_save_crash.py.

Run as a script: MODE FOLDER AMOUNT. Children are forked from one import; prints one line of JSON.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from file_faults import Faults
from torch import nn

import maestro_kernels as mk
from maestro_kernels import training

FILES = frozenset({"model.safetensors", "maestro.json"})


def dense():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def numbered(number):
    """A model of which every value and the rank tell its number."""
    model = nn.Sequential(mk.LoDLinear(8, 8, 4), nn.Linear(8, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(number)
    model[0].rank = number % 5
    return model


def number_of(model):
    """The number of a model; raises for a mixture of two."""
    (number,) = {int(value) for p in model.parameters() for value in p.detach().flatten()}
    if model[0].rank != number % 5:
        raise AssertionError(f"rank {model[0].rank} of a model {number}")
    return number


class Folder:
    """Where `save_pretrained` writes."""

    files = FILES

    def __init__(self, path):
        self.path = path

    def save(self, number):
        mk.save_pretrained(numbered(number), self.path)

    def load(self):
        return number_of(mk.load_pretrained(self.path, dense()))


class Checkpoint:
    """Where `save_checkpoint` writes."""

    files = frozenset({"checkpoint.pt"})

    def __init__(self, path):
        self.path = path

    def save(self, number):
        model = numbered(number)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        training.save_checkpoint(model, self.path / "checkpoint.pt", optimizer, number=number)

    def load(self):
        model = numbered(0)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        path = self.path / "checkpoint.pt"
        extra = training.load_checkpoint(model, path, optimizer, random_state=False)
        if extra["number"] != number_of(model):
            raise AssertionError(f"{extra} beside a model {number_of(model)}")
        return extra["number"]


def leftovers(place):
    return sorted(set(os.listdir(place.path)) - place.files)


def in_child(work):
    """The id of a forked child that does `work` and exits with 0."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def kill(place, amount):
    """Kill `amount` saves: half at a counted call, before or after it, half at a random time."""
    chance = random.Random(0)
    place.save(1)
    with Faults() as faults:
        began = time.monotonic()
        place.save(1)
        duration = time.monotonic() - began
    calls, last = len(faults.events), 1
    outcome = {"calls": calls, "old": 0, "new": 0, "whole": 0, "left": 0}

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    for number in range(2, amount + 2):
        counted, at = number % 2 == 0, number // 4 % calls
        moment = "before" if number // 2 % 2 else "after"
        only = {moment: lambda i, *_, at=at: die() if i == at else None}

        def work(number=number, only=only, counted=counted):
            with Faults(**(only if counted else {})):
                place.save(number)

        child = in_child(work)
        if not counted:
            time.sleep(chance.uniform(0, 2 * duration))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        found = place.load()
        if found not in ((number,) if status == 0 else (last, number)):
            raise AssertionError(f"save {number} ended with {status}; {found} after {last}")
        if status not in (0, signal.SIGKILL):
            raise AssertionError(f"save {number} ended with {status}")
        outcome["whole" if status == 0 else "old" if found == last else "new"] += 1
        foreign = [n for n in leftovers(place) if not n.startswith(".maestro-")]
        if foreign or len(leftovers(place)) > len(place.files):
            raise AssertionError(f"save {number} left {leftovers(place)}")
        outcome["left"] += len(leftovers(place))
        last = found
    place.save(amount + 2)
    return outcome | {"last": place.load() == amount + 2, "leftovers": leftovers(place)}


def race(place, seconds):
    """Two writers and two readers for some seconds; what each has done, and what is there then."""
    place.save(0)
    end = time.monotonic() + seconds
    reports = []

    def writer(first, report):
        number = first
        while time.monotonic() < end:
            number += 2
            place.save(number)
        os.write(report, json.dumps({"last": number, "saves": (number - first) // 2}).encode())

    def reader(report):
        seen = []
        while time.monotonic() < end:
            seen.append(place.load())
        for parity in (0, 1):
            mine = [number for number in seen if number % 2 == parity]
            if mine != sorted(mine):
                raise AssertionError("a reader saw a save of before after a later one")
        os.write(report, json.dumps({"loads": len(seen), "different": len(set(seen))}).encode())

    for work in (lambda r: writer(0, r), lambda r: writer(1, r), reader, reader):
        out, into = os.pipe()
        child = in_child(lambda work=work, into=into: work(into))
        os.close(into)
        reports.append((child, out))
    done = []
    for child, out in reports:
        _, status = os.waitpid(child, 0)
        if status:
            raise AssertionError(f"a process ended with {status}")
        done.append(json.loads(os.read(out, 1000)))
    found = place.load()
    return {
        "writers": done[:2],
        "readers": done[2:],
        "last": found in [w["last"] for w in done[:2]],
        "leftovers": leftovers(place),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, kind, path, amount = sys.argv[1:]
    chosen = {"folder": Folder, "checkpoint": Checkpoint}[kind](Path(path))
    print(json.dumps({"kill": kill, "race": race}[mode](chosen, int(amount))))
