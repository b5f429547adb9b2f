"""`auto` after first use against two matmuls and the native library, on factors as they are.

    MAESTRO_KERNELS_CACHE=$(mktemp -d) python -m bench.first_use [--rounds 15] [--threads 2]

The three shapes of an encoder of width 384; all four take turns in one process. A ratio is a time
over that of two `F.linear`, and over the better of two `F.linear` and the native library: medians,
then the geometric mean over shapes.
"""

import argparse
import math
import statistics
import time

import torch
import torch.nn.functional as F

import maestro_kernels as mk
from maestro_kernels.testing import make_inputs

SHAPES = ((384, 96, 384), (384, 96, 1536), (1536, 96, 384))  # K, R, N
ROWS = {
    "float32": (1, 2, 4, 8, 16, 64, 256),
    "bfloat16": (1, 2, 4, 8, 64, 256),
    "float16": (1, 8, 64, 256),
}


def times(calls, rounds):
    """Seconds per call: medians over rounds in which all take turns."""
    repeats = {}
    for name, call in calls.items():
        call()
        begin = time.perf_counter()
        call()
        repeats[name] = max(1, round(1e-3 / (time.perf_counter() - begin)))
    found = {name: [] for name in calls}
    for k in range(rounds):
        for name in sorted(calls, reverse=bool(k % 2)):
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                calls[name]()
            found[name].append((time.perf_counter() - begin) / repeats[name])
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def calls(M, K, R, N, dtype, training):
    x, u, v, b = make_inputs(M, N, K, R, dtype=dtype, requires_grad=training)
    dy = torch.ones(M, N, dtype=dtype)
    leaves = (x, u, v, b)

    def both(forward):
        return lambda: torch.autograd.grad(forward(), leaves, dy)

    forwards = {
        "two": lambda: F.linear(F.linear(x, v), u, b),
        "auto": lambda: mk.lod_linear(x, u, v, b),
        "native": lambda: mk.lod_linear(x, u, v, b, backend="native"),
    }
    return {name: both(call) if training else call for name, call in forwards.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("times as fast as two F.linear: auto / native; auto over the better of both")
    for training in (False, True):
        for name, rows in ROWS.items():
            for M in rows:
                found = []
                for K, R, N in SHAPES:
                    with torch.set_grad_enabled(training):
                        found.append(
                            times(calls(M, K, R, N, getattr(torch, name), training), args.rounds)
                        )
                mean = lambda values: math.exp(statistics.fmean(map(math.log, values)))  # noqa: E731
                auto = mean([t["two"] / t["auto"] for t in found])
                native = mean([t["two"] / t["native"] for t in found])
                best = mean([t["auto"] / min(t["two"], t["native"]) for t in found])
                kind = "training" if training else "forward"
                print(f"{kind} {name} M {M:4}: {auto:.2f} / {native:.2f}; {best:.3f}", flush=True)


if __name__ == "__main__":
    main()
