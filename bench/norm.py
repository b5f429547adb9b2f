"""A pair with a norm between its factors against linear, RMSNorm, linear of torch.

    MAESTRO_KERNELS_CACHE=$(mktemp -d) python -m bench.norm [--rounds 9] [--threads 2]

The sizes are the query pairs of DeepSeek-V3, of MiniCPM3 and of a small model. All take turns in
one process; a ratio is the time of torch's three over ours: `auto` after first use, and the native
library forced.
"""

import argparse
import math
import statistics

import torch
import torch.nn.functional as F

import maestro_kernels as mk
from bench.first_use import times
from maestro_kernels.backends import native
from maestro_kernels.testing import make_inputs

SHAPES = ((7168, 1536, 24576), (2560, 768, 3840), (512, 192, 1024))  # K, R, N
ROWS = (1, 4, 16, 64, 256)
EPS = 1e-6
# Calls after which the first use of a long call has measured its last turn.
SETTLES = 12


def calls(M, K, R, N, dtype, training):
    x, u, v, _ = make_inputs(M, N, K, R, dtype=dtype, bias=False, requires_grad=training)
    norm = torch.ones(R, dtype=dtype).requires_grad_(training)
    dy = torch.randn(M, N).to(dtype)
    leaves = (x, u, v, norm)

    def both(forward):
        return lambda: torch.autograd.grad(forward(), leaves, dy)

    def ours(backend=None):
        return lambda: mk.lod_linear(x, u, v, norm=norm, norm_eps=EPS, backend=backend)

    forwards = {
        "torch": lambda: F.linear(F.rms_norm(F.linear(x, v), (R,), norm, EPS), u),
        "auto": ours(),
    }
    if native.load_error() is None:
        forwards["native"] = ours("native")
    return {name: both(call) if training else call for name, call in forwards.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the last so many")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("times as fast as linear, RMSNorm, linear")
    for training in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            for shape in SHAPES[-args.shapes :]:
                ratios = {}
                for M in args.rows:
                    with torch.set_grad_enabled(training):
                        made = calls(M, *shape, dtype, training)
                        for _ in range(SETTLES):
                            made["auto"]()
                        found = times(made, args.rounds)
                    for name, seconds in found.items():
                        ratios.setdefault(name, []).append(found["torch"] / seconds)
                kind = "training" if training else "forward"
                rows = ", ".join(
                    f"{name} {math.exp(statistics.fmean(map(math.log, many))):.2f} "
                    f"({' '.join(f'{one:.2f}' for one in many)})"
                    for name, many in ratios.items()
                    if name != "torch"
                )
                print(f"{kind} {str(dtype)[6:]} {shape}: {rows}", flush=True)


if __name__ == "__main__":
    main()
