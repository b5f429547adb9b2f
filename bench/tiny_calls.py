"""What a call costs that computes next to nothing, over two `F.linear` (six for three layers).

    OMP_NUM_THREADS=1 python -m bench.tiny_calls [--rounds 41]

Both sides take turns in one process; medians of the ratios. Run it by turns in two checkouts to
compare them.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

import maestro_kernels as mk
from maestro_kernels.testing import make_inputs


def ratio(ours, other, rounds, calls):
    for f in (ours, other) * 2:
        f()
    found = []
    for _ in range(rounds):
        spent = []
        for f in (ours, other):
            start = time.perf_counter()
            for _ in range(calls):
                f()
            spent.append(time.perf_counter() - start)
        found.append(spent[0] / spent[1])
    return statistics.median(found)


def pairs():
    """(name, ours, other, calls a round)"""
    for M, K, R, N in ((4, 8, 4, 8), (4, 64, 8, 64), (1, 384, 64, 384), (16, 384, 64, 384)):
        a = make_inputs(M, N, K, R)
        two = lambda a=a: F.linear(F.linear(a[0], a[2]), a[1], a[3])  # noqa: E731
        yield f"eager {M}, {K}-{R}-{N}", lambda a=a: mk.lod_linear(*a), two, 400
    for M, K, R, N in ((4, 64, 8, 64), (16, 384, 64, 384)):
        x, u, v, b = make_inputs(M, N, K, R)
        r = R // 2
        two = lambda x=x, u=u, v=v, b=b, r=r: F.linear(F.linear(x, v[:r]), u[:, :r], b)  # noqa: E731
        ours = lambda x=x, u=u, v=v, b=b, r=r: mk.lod_linear(x, u, v, b, rank=r)  # noqa: E731
        yield f"eager {M}, {K}-{R}-{N} at rank {r}", ours, two, 400
        forced = lambda x=x, u=u, v=v, b=b, r=r: mk.lod_linear(  # noqa: E731
            x, u, v, b, rank=r, backend="matmul"
        )
        yield 'and backend="matmul"', forced, two, 400
    x, u, v, b = make_inputs(4, 64, 64, 8)

    def six():
        for _ in range(3):
            F.linear(F.linear(x, v), u, b)

    def two():
        return F.linear(F.linear(x, v), u, b)

    yield 'backend="matmul"', lambda: mk.lod_linear(x, u, v, b, backend="matmul"), two, 400
    three = [u] * 3, [v] * 3, [b] * 3
    yield "group of three", lambda: mk.lod_linear_grouped(x, *three), six, 400
    layer = mk.LoDLinear(64, 64, 8).eval()
    yield "module", lambda: layer(x), two, 400
    packed = mk.prepack(mk.LoDLinear(64, 64, 8).eval(), form="fused")
    yield "module, prepacked", lambda: packed(x), two, 400


def training_pairs():
    x, u, v, b = make_inputs(4, 64, 64, 8, requires_grad=True)
    dy = torch.randn(4, 64)

    def two():
        return F.linear(F.linear(x, v), u, b)

    def ours():
        return mk.lod_linear(x, u, v, b)

    def group():
        return mk.lod_linear_grouped(x, [u] * 3, [v] * 3, [b] * 3)

    backward = torch.autograd.backward
    yield "gradients, forward", ours, two, 200
    yield "and backward", lambda: backward(ours(), dy), lambda: backward(two(), dy), 100
    six = lambda: backward([two() for _ in range(3)], [dy] * 3)  # noqa: E731
    yield "group of three, and backward", lambda: backward(group(), [dy] * 3), six, 60


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=41)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with torch.no_grad():
        for name, ours, other, calls in pairs():
            print(f"{name:32} {ratio(ours, other, rounds, calls):.2f}")
    for name, ours, other, calls in training_pairs():
        print(f"{name:32} {ratio(ours, other, rounds, calls):.2f}")


if __name__ == "__main__":
    main()
