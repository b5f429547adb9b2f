"""The residual form against a matmul and `torch.addmm`, which adds the matrix in its own pass.

    MAESTRO_KERNELS_CACHE=$(mktemp -d) python -m bench.residual [--rounds 15] [--threads 2]

LoRA's sizes on the layers of a model 768 and one 2048 wide. All take turns in one process; a ratio
is the time of the library pair over ours: `auto` after first use, the native library forced, a
prepacked layer (inference only).
"""

import argparse
import math
import statistics

import torch

import maestro_kernels as mk
from bench.first_use import times
from maestro_kernels.backends import native
from maestro_kernels.testing import make_inputs

SHAPES = ((768, 16, 768), (768, 16, 3072), (2048, 64, 2048))  # K, R, N
ROWS = (1, 4, 16, 64, 256, 1024)
SCALE = 2.0


def calls(M, K, R, N, dtype, training):
    x, u, v, _ = make_inputs(M, N, K, R, dtype=dtype, bias=False, requires_grad=training)
    residual = torch.randn(M, N).to(dtype).requires_grad_(training)
    dy = torch.randn(M, N).to(dtype)
    leaves = (x, u, v, residual)

    def both(forward):
        return lambda: torch.autograd.grad(forward(), leaves, dy)

    forwards = {
        "addmm": lambda: torch.addmm(residual, x @ v.T, u.T, alpha=SCALE),
        "auto": lambda: mk.lod_linear(x, u, v, residual=residual, scale=SCALE),
    }
    if native.load_error() is None:
        forwards["native"] = lambda: mk.lod_linear(
            x, u, v, residual=residual, scale=SCALE, backend="native"
        )
        if not training:
            layer = mk.prepack(mk.LoDLinear.from_factors(u, v).eval())
            forwards["packed"] = lambda: layer(x, residual=residual, scale=SCALE)
    return {name: both(call) if training else call for name, call in forwards.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("times as fast as a matmul and torch.addmm, geometric means over shapes")
    for training in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            for M in args.rows:
                with torch.set_grad_enabled(training):
                    found = [times(calls(M, *s, dtype, training), args.rounds) for s in SHAPES]
                means = {
                    name: math.exp(statistics.fmean(math.log(t["addmm"] / t[name]) for t in found))
                    for name in found[0]
                    if name != "addmm"
                }
                kind = "training" if training else "forward"
                text = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items())
                print(f"{kind} {str(dtype)[6:]} M {M:4}: {text}", flush=True)


if __name__ == "__main__":
    main()
