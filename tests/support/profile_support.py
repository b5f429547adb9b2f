"""Profiles made of formulas, so that every answer can be worked out by hand."""

from maestro_kernels.search.latencies import Point, Profile
from maestro_kernels.search.targets import Shape

DEVICE = {
    "kind": "cpu",
    "name": "Test CPU",
    "arch": "x86_64 test",
    "num_cores": 2,
    "l2_bytes": 1 << 20,
    "l3_bytes": 1 << 25,
}
VERSIONS = {"maestro_kernels": "0", "torch": "2", "triton": None, "cuda": None}
RANKS = (16, 32, 64, 72, 96, 128)


def low_rank_ms(N, K, r, M):
    """A fixed cost, work, and a step above rank 64."""
    return 0.01 + 1e-7 * r * (N + K) * (1 + M / 64) + (0.05 if r > 64 else 0.0)


def dense_ms(N, K, M):
    return 0.01 + 1e-7 * N * K * (1 + M / 64)


def point(N, K, M, rank, strategy, ms, cache="cold", spread=0.01, bias=False):
    low, high = ms * (1 - spread), ms * (1 + spread)
    return Point(N, K, M, bias, rank, strategy, cache, "eager", low, ms, high)


def make_profile(shapes=((512, 512), (1024, 512)), Ms=(1, 64), names=(), factors=None):
    """Strategy -> factor on the formula; ours, two matmuls and packed forms by default."""
    factors = factors or {"ours": 1.0, "two matmuls": 1.1, "native: fused": 2.0,
                          "packed: fused": 0.8, "packed: two oneDNN linears": 0.9}  # fmt: skip
    points = []
    for N, K in shapes:
        for M in Ms:
            for cache, scale in (("cold", 1.0), ("warm", 0.5)):
                dense = scale * dense_ms(N, K, M)
                points.append(point(N, K, M, 0, "dense", dense, cache))
                points.append(point(N, K, M, 0, "dense, packed", 0.95 * dense, cache))
                for strategy, factor in factors.items():
                    for r in RANKS:
                        ms = scale * factor * low_rank_ms(N, K, r, M)
                        points.append(point(N, K, M, r, strategy, ms, cache))
    found = [Shape(N, K, names=tuple(names)) for N, K in shapes]
    return Profile(DEVICE, VERSIONS, "float32", tuple(points), tuple(found))
