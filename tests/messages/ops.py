"""Wrong calls: ops."""

import torch

import maestro_kernels as mk
from maestro_kernels.testing import make_inputs
from messages import Row

X, U, V, _ = make_inputs(4, 6, 8, 3)

ROWS = [
    Row(
        "lod_linear: x on another device",
        lambda _: mk.lod_linear(X.to("meta"), U, V),
        ValueError,
        "lod_linear: u: expected device meta like x, got cpu",
    ),
    Row(
        "lod_linear: integer x",
        lambda _: mk.lod_linear(X.to(torch.int64), U, V),
        TypeError,
        "lod_linear: x: expected dtype float16, bfloat16, float32, float64, got torch.int64",
    ),
]
