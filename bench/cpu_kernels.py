"""The packed CPU kernel against every other form of the layer, interleaved: for tuning.

python -m bench.cpu_kernels [--dtype float32] [--threads 4] [--rows 1 16] [--models MiniLM ViT-B]

One line per case: the kernel's speed-up over the fastest other form ("best") and over two plain
F.linear calls ("plain"), then medians in microseconds; geometric means at the end. Where the
package zentorch is installed, two of its linears on packed weights are a form as well, with a mean
of their own. The published figures come from `maestro-kernels bench`; this one is for a quick look
at a change.
"""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maestro_kernels.backends import packed
from maestro_kernels.measure.heap import keeping_memory
from maestro_kernels.measure.timing import interleave
from maestro_kernels.testing import assert_accurate, make_inputs, rounding_errors

# (N, K) of the layers and the ranks they are cut to.
MODELS = {
    "MiniLM": (((384, 384), (1536, 384), (384, 1536)), (16, 64, 128)),
    "ViT-B": (((768, 768), (3072, 768), (768, 3072)), (32, 127, 256)),
    "GPT-2": (((2304, 768),), (64, 256)),
    "Llama-3-8B": (((4096, 4096), (14336, 4096), (4096, 14336)), (64, 256, 512)),
}
ROWS = (1, 4, 16, 64, 256, 1024)
Call = Callable[[], Tensor]
BUCKETS = ((1, 16), (17, 256), (257, 1 << 30))


class Row(NamedTuple):
    """Seconds of every form of one case."""

    M: int
    label: str
    seconds: dict[str, float]

    @property
    def best(self) -> float:
        """Speed-up over the fastest other form."""
        return min(s for name, s in self.seconds.items() if name != "fused") / self.seconds["fused"]

    def over(self, name: str) -> float:
        """Speed-up over one form."""
        return self.seconds[name] / self.seconds["fused"]


def zentorch() -> str | None:
    """Why AMD's zentorch is not compared with, or None where it is."""
    try:
        importlib.import_module("zentorch")
    except Exception as error:  # beside ImportError, whatever it says to this torch or this CPU
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def zentorch_pair(x: Tensor, u: Tensor, v: Tensor, bias: Tensor) -> Call:
    """Two linears of zentorch on weights packed once."""
    ops = torch.ops.zentorch
    linear = partial(ops.zentorch_linear_unary.default, is_weight_prepacked=True)
    pu, pv = map(ops.zentorch_weight_prepack_for_linear, (u.contiguous(), v.contiguous()))
    return lambda: linear(linear(x, pv), pu, bias)


def forms(x: Tensor, u: Tensor, v: Tensor, bias: Tensor, rank: int) -> dict[str, Call]:
    """Every way to compute the layer, packed once where it can be."""
    names = {"fused": "fused", "onednn": "two oneDNN linears"}
    calls: dict[str, Call] = {"plain": lambda: F.linear(F.linear(x, v), u, bias)}
    N, K = u.shape[0], v.shape[1]
    if 2 * rank * (N + K) > N * K:
        # A dense layer that costs over twice as much cannot win and would only empty the caches.
        merged = u @ v
        calls["dense"] = lambda: F.linear(x, merged, bias)
        names["dense-dnn"] = "merged dense"
    for short, name in names.items():
        if packed.can_make(name, u, v, rank):
            calls[short] = partial(packed.make_form(name, u, v, rank, None), x, bias)
    return calls


def measure(
    dtype: torch.dtype,
    models: list[str],
    rows: list[int],
    ranks: list[int],
    seconds: float,
    zen: bool,
) -> Iterator[Row]:
    """Time every case; a kernel that is not accurate is not timed."""
    for model in models:
        shapes, own_ranks = MODELS[model]
        for N, K in shapes:
            for R in ranks or own_ranks:
                for M in rows:
                    x, u, v, b = make_inputs(M, N, K, R, dtype=dtype, seed=M)
                    assert b is not None
                    calls = forms(x, u, v, b, R)
                    if zen:
                        calls["zentorch"] = zentorch_pair(x, u, v, b)
                    exact = (x.double() @ v.double().T) @ u.double().T + b.double()
                    rounding = partial(_rounding, x, u, v, b)
                    assert_accurate("y", calls["fused"](), calls["plain"](), exact, rounding)
                    stats = interleave(calls, seconds=seconds, sample_seconds=3e-4, min_rounds=6)
                    yield Row(M, f"{N}x{K} r{R}", {name: s.p50 for name, s in stats.items()})


def _rounding(x: Tensor, u: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return rounding_errors(x, u, v, bias=bias)["y"]


def geometric(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_kernels", description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seconds", type=float, default=0.06, help="per case")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    done: list[Row] = []
    why_not = zentorch()
    if why_not is not None:
        print(f"without zentorch: {why_not}")
    with torch.inference_mode(), keeping_memory():
        for row in measure(
            getattr(torch, args.dtype),
            args.models,
            args.rows,
            args.ranks,
            args.seconds,
            why_not is None,
        ):
            times = " ".join(f"{name} {s * 1e6:8.1f}" for name, s in row.seconds.items())
            gains = f"x{row.best:.2f} best x{row.over('plain'):.2f} plain"
            print(f"M{row.M:<5} {row.label:16} {gains}  {times}", flush=True)
            done.append(row)
    for low, high in BUCKETS:
        rows = [r for r in done if low <= r.M <= high]
        if rows:
            names = ["plain", *(["zentorch"] if why_not is None else [])]
            means = [f"{name} x{geometric([r.over(name) for r in rows]):.2f}" for name in names]
            best = geometric([r.best for r in rows])
            print(f"M {low}..{high}: best x{best:.2f}, {', '.join(means)}, {len(rows)} cases")


if __name__ == "__main__":
    main()
