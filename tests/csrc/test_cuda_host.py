"""The CUDA kernels decode and rows on the CPU, under sanitizers: device.h has a host twin.

What this cannot show is listed in docs/dev/cuda.md.
"""

from dataclasses import replace

import pytest
import torch
from cuda_host import COMPILER, Call, Layer, compile_runner, run

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DECODE, ROWS = 1, 2
SANITIZERS = ("address,undefined", "thread")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")


@pytest.fixture(scope="module")
def runners(tmp_path_factory):
    """The host build of the kernels, one for each sanitizer."""
    folder = tmp_path_factory.mktemp("host_cuda")
    builds = [compile_runner(folder, sanitizer) for sanitizer in SANITIZERS]
    assert [build.wait() for build in builds] == [0, 0]
    return {sanitizer: folder / sanitizer for sanitizer in SANITIZERS}


def one(*sizes, call=None, **layer):
    return Call((Layer(*sizes, **layer),), **(call or {}))


ARITHMETIC = (
    {"dtype": BF16},
    {"dtype": F16},
    {"dtype": F32},
    {"dtype": F32, "ieee": True},
)
QKV = (
    Layer(5, 70, 96, 32, 19, activation="silu", save_h=True),
    Layer(5, 33, 96, 16, 0, bias=False),
    Layer(5, 24, 96, 48, 48, activation="gelu"),
)
DEVICE_GROUP = tuple(replace(layer, device_rank=layer.rank, save_h=True) for layer in QKV)


def decode_calls():
    """(M, N, K, R, rank), every arithmetic."""
    yield from (one(3, 21, 48, 24, rank) for rank in range(25))
    yield from (
        one(3, 21, 48, 24, 24, device_rank=rank, save_h=True) for rank in (-99, 0, 5, 24, 99)
    )
    for call in ARITHMETIC:
        yield one(1, 37, 200, 40, 33, call=call, activation="relu")
        yield one(16, 50, 136, 24, 17, call=call, activation="gelu_tanh", save_h=True)
        yield one(33, 19, 72, 16, 16, call=call, activation="silu")
        yield one(9, 20, 45, 16, 13, call=call, pad=3, pad_u=8)
        yield Call(QKV, **call)
    yield from (one(M, 24, 64, 16, 11) for M in (2, 7, 8, 15, 17, 48, 64))
    yield from (one(4, 16, K, 16, 9) for K in (1, 7, 8, 31, 33, 256, 777))
    yield from (one(4, N, 40, 16, 16) for N in (1, 7, 8, 9, 33, 131))
    yield one(7, 30, 56, 32, 13, pad=8)
    yield one(6, 24, 64, 16, 9, bias=False, activation="gelu")
    yield one(64, 40, 512, 80, 75, call={"sum_by_all": 0}, save_h=True)
    # More steps of K for a warp than it asks for together, and a last batch that is not full.
    for arithmetic in ARITHMETIC:
        yield one(40, 24, 1320, 16, 13, call={"sm_count": 1} | arithmetic)
    yield one(2, 400, 64, 256, 250, call={"shared_per_block": 48 * 1024})  # rounds of slices
    yield one(2, 40, 1024, 16, 16, call={"sm_count": 1})  # one block
    for sum_by_all in (0, 1):
        yield one(5, 40, 1024, 32, 21, call={"sum_by_all": sum_by_all, "sm_count": 4})
        yield Call(DEVICE_GROUP, sum_by_all=sum_by_all)
    for call in (*ARITHMETIC, {"sum_by_all": 0}):
        yield one(3, 20, 48, 24, 1, infinite=True, call=call)
    yield Call(DEVICE_GROUP)
    yield Call(QKV, streams=2)


def rows_calls():
    small, large = {"only": ROWS, "sm_count": 8}, {"only": ROWS, "sm_count": 1}
    for call in (small, large):
        for arithmetic in ARITHMETIC[:3]:
            yield one(70, 77, 72, 40, 33, call=call | arithmetic, activation="gelu", save_h=True)
        yield one(150, 136, 200, 136, 130, call=call, activation="silu")
    yield from (one(5, 9, 24, 16, rank, call=small) for rank in (0, 1, 8, 9, 16))
    yield from (
        one(66, 72, 24, 16, 16, device_rank=rank, save_h=True, call=small)
        for rank in (-999, 0, 5, 16, 17)
    )
    yield one(65, 64, 640, 64, 64, call=small, save_h=True)  # split K
    yield one(64, 65, 64, 64, 64, call=small, pad=8, pad_u=8)
    yield one(130, 40, 64, 32, 20, call=small, pad=24, bias=False)
    yield one(3, 1, 8, 8, 7, call=small)
    yield one(3, 20, 48, 24, 1, infinite=True, call=small)
    group = (
        Layer(70, 40, 64, 32, 19, activation="silu", save_h=True),
        Layer(130, 90, 48, 16, 0),
        Layer(1, 64, 128, 128, 128, activation="gelu_tanh"),
    )
    yield Call(group, **small)
    yield Call(tuple(replace(layer, device_rank=9) for layer in group), **small)
    yield Call(group, streams=2, **small)


UNALIGNED = [
    one(3, 21, 48, 24, 24, call={"only": DECODE, "shift": 8}),
    one(3, 21, 48, 24, 0, call={"only": DECODE, "shift": 1}),  # u is not read
]
# ThreadSanitizer is some ten times slower, keeps 2 MB for each thread, and is blind to shapes.
THREAD = [
    one(3, 21, 48, 24, 19, save_h=True),
    one(17, 40, 136, 40, 33, call={"dtype": F32, "sm_count": 2}, activation="silu"),
    one(5, 24, 1024, 16, 16, call={"sm_count": 3}),
    one(33, 24, 1024, 16, 16, call={"sm_count": 3, "sum_by_all": 0}),
    one(2, 100, 64, 64, 50, call={"shared_per_block": 16 * 1024, "sum_by_all": 0}),
    Call(DEVICE_GROUP, ieee=True, dtype=F32, sm_count=2),
    Call(QKV, streams=2, sm_count=2),
    one(70, 77, 72, 40, 33, call={"only": ROWS, "sm_count": 2}, save_h=True),
    one(65, 64, 320, 64, 64, call={"only": ROWS, "sm_count": 2}),
    one(130, 130, 72, 136, 130, call={"only": ROWS, "sm_count": 1}),
    Call(QKV, streams=2, only=ROWS, sm_count=2, shared_per_block=60 * 1024),
]


def test_right_and_within_its_memory(runners, tmp_path):
    calls = [*decode_calls(), *rows_calls(), *UNALIGNED]
    done, problems = run(runners["address,undefined"], calls, tmp_path)
    assert done.returncode == 0, done.stderr
    assert not problems, "\n".join(problems)
    ran = done.stdout
    for part in (
        "H 16x16",
        "H 64x16",
        "H 64x64",
        "H 128x128",
        "every block sums H",
        "begins before",
    ):
        assert part in ran, f"no call of this sweep takes {part}"


def test_ordered_by_barriers_and_counters(runners, tmp_path):
    done, problems = run(runners["thread"], THREAD, tmp_path)
    assert done.returncode == 0, done.stderr
    assert not problems, "\n".join(problems)
    by_all = [
        "every block sums H" in line for line in done.stdout.splitlines() if ": decode:" in line
    ]
    assert any(by_all)
    assert not all(by_all)


# What the tests above would say of a defect. Two blocks on small calls, so that both phases have
# something to wait for.
DECODE_TRIAL = one(3, 24, 512, 24, 24, call={"sm_count": 2}, save_h=True)
ROWS_TRIAL = one(
    70,
    16,
    320,
    64,
    64,
    call={"only": ROWS, "sm_count": 1, "shared_per_block": 60 * 1024},
    save_h=True,
)


@pytest.mark.parametrize("trial", [DECODE_TRIAL, ROWS_TRIAL], ids=["decode", "rows"])
def test_a_missing_barrier_or_wait_is_noticed(runners, tmp_path, trial):
    def passes(*options):
        done, problems = run(runners["address,undefined"], [trial], tmp_path, *options)
        return done.returncode == 0 and not problems

    assert passes()
    assert not passes("--fault", "async-wait", "0")
    assert not passes("--fault", "wait-for-h", "0")
    # Only decode begins before the kernel in front of it has ended, and has something to wait for.
    assert passes("--fault", "wait-for-kernel-in-front", "0") == (trial is ROWS_TRIAL)
    # The first barriers of the first block; further on, some orders have no use for one or another.
    unnoticed = [i for i in range(8) if passes("--fault", "block-barrier", str(i))]
    assert not unnoticed


@pytest.mark.parametrize("trial", [DECODE_TRIAL, ROWS_TRIAL], ids=["decode", "rows"])
def test_a_counter_that_releases_nothing_is_noticed(runners, tmp_path, trial):
    done, _ = run(runners["thread"], [trial], tmp_path, "--fault", "release", "0")
    assert done.returncode == 66, done.stderr
    assert "data race" in done.stderr


@pytest.mark.parametrize("trial", [DECODE_TRIAL, ROWS_TRIAL], ids=["decode", "rows"])
def test_shared_memory_that_is_short_is_noticed(runners, tmp_path, trial):
    done, _ = run(runners["address,undefined"], [trial], tmp_path, "--short", "64")
    assert done.returncode == 67, done.stderr
    assert "AddressSanitizer" in done.stderr
