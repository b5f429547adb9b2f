"""Tables of made-up times around one cell of M and rank, and the plan of a call in it."""

import torch

import maestro_kernels as mk
from maestro_kernels import hardware, tables
from maestro_kernels.tables import BASELINE, Row, Table

COLD, WARM, TRAIN = "forward cold eager", "forward warm eager", "training cold eager"


def times(us, spread=0.01):
    return (us * (1 - spread), us, us * (1 + spread))


def make_row(M=16, rank=32, N=256, K=256, two=100.0, ours=50.0, train=50.0, warm=None, **packed):
    us = {
        COLD: {BASELINE: times(two), "native: fused": times(ours)},
        WARM: {BASELINE: times(two), "native: fused": times(warm or ours)},
        TRAIN: {BASELINE: times(two), "native: fused": times(train)},
    }
    for name, value in packed.items():
        for mode in (COLD, WARM):
            us[mode]["packed: " + name.replace("_", " ")] = times(value)
    return Row("float32", 1, M, N, K, rank, True, us)


def make_table(*rows, **changes):
    device = {**tables.identity(hardware.current_device("cpu")), **changes}
    return Table(device, hardware.versions(), rows or cell(), "2026-01-01T00:00:00+00:00", "test")


def cell(**changes):
    """The corners around M 16..64 and rank 32..64."""
    return tuple(make_row(M, r, **changes) for M in (16, 64) for r in (32, 64))


def plan(M=32, rank=48, N=256, K=256, R=64, **kwargs):
    x, u, v = torch.zeros(M, K), torch.zeros(N, R), torch.zeros(R, K)
    return mk.explain(x, u, v, rank=rank, **kwargs).plan
