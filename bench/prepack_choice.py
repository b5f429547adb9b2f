"""What prepack chose against every form it could have chosen, each as a layer, interleaved.

    python -m bench.prepack_choice [--dtype bfloat16] [--rows 1 16 256 1024] [--seconds 1.2]

Caps of the instruction set count on both sides: MK_CPU_ISA for the library, ONEDNN_MAX_CPU_ISA for
oneDNN. One line per case, the lowest ratios at the end. Each ratio has the noise of two medians, so
repeat what is low.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial

import torch

import maestro_kernels as mk
from maestro_kernels.backends import native, packed
from maestro_kernels.measure.heap import keeping_memory
from maestro_kernels.measure.timing import interleave

# (N, K), and ranks.
SHAPES = (
    ((1536, 384), (64, 96, 128)),
    ((384, 384), (64, 128)),
    ((384, 1536), (96,)),
    ((768, 768), (127, 256)),
    ((3072, 768), (256,)),
    ((768, 3072), (256,)),
    ((2304, 768), (64,)),
)


@torch.no_grad()
def case(
    N: int, K: int, rank: int, M: int, dtype: torch.dtype, seconds: float
) -> tuple[str, dict[str, float]]:
    """Form that was chosen, and seconds of "prepacked" and of every form."""
    layer = mk.LoDLinear(K, N, max_rank=rank).to(dtype).eval()
    x = torch.randn(M, K).to(dtype)
    u, v = layer.u.detach(), layer.v.detach()
    two = torch.nn.Sequential(torch.nn.Linear(K, rank, bias=False), torch.nn.Linear(rank, N))
    layers = {
        "prepacked": mk.prepack(copy.deepcopy(layer)),
        "two nn.Linear": two.to(dtype).eval(),
        "unpacked": layer,
    }
    for name in packed.FORMS:
        dense = name == "merged dense" and 2 * rank * (N + K) < N * K
        if packed.can_make(name, u, v, rank) and not dense:
            layers[name] = mk.prepack(copy.deepcopy(layer), form=name)
    calls = {name: partial(one, x) for name, one in layers.items()}
    stats = interleave(calls, seconds=seconds, max_rounds=400)
    chosen = ", ".join(layers["prepacked"].packed.choices.values())
    return chosen, {name: s.p50 for name, s in stats.items()}


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.prepack_choice", description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256, 1024])
    parser.add_argument("--seconds", type=float, default=1.2, help="per case")
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)
    reason = native.load_error()
    print(f"library: {reason or native.isa(dtype)}, {torch.get_num_threads()} threads")
    lowest = []
    with keeping_memory():
        for (N, K), ranks in SHAPES:
            for rank in ranks:
                for M in args.rows:
                    chosen, spent = case(N, K, rank, M, dtype, args.seconds)
                    fastest = min((s, name) for name, s in spent.items() if name != "prepacked")
                    ratio = fastest[0] / spent["prepacked"]
                    times = " ".join(f"{name} {s * 1e6:.1f}" for name, s in spent.items())
                    label = f"{N}x{K} r{rank} M{M}"
                    print(f"{label:20} x{ratio:.3f} of {fastest[1]}, chose {chosen}: {times}")
                    lowest.append((ratio, label))
    print("lowest: " + ", ".join(f"{label} x{ratio:.3f}" for ratio, label in sorted(lowest)[:5]))


if __name__ == "__main__":
    main()
