"""Arguments over the whole range of a dtype, and what torch says of them."""

import torch

from maestro_kernels.backends.reference import ACTIVATIONS, activation_backward

NAMES = tuple(name for name in ACTIVATIONS if name is not None)


def arguments(dtype):
    """Every value of a 16-bit dtype; of float32 a grid and where exp over- and underflows."""
    if dtype != torch.float32:
        return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    powers = torch.logspace(-45, 38.5, 4000, dtype=torch.float64).float()
    near = torch.linspace(-110, 110, 8001)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 88.72, 88.73, 103.9, 3e38, float("inf")])
    special = torch.cat([special, -special, torch.tensor([float("nan")])])
    limits = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min])
    return torch.cat([powers, -powers, near, special, limits])


def forward(name, z):
    return ACTIVATIONS[name](z)


def derivative(name, z):
    with torch.no_grad():
        return activation_backward(torch.ones_like(z), z, name)


def disagreement(got, function, name, z):
    """Text of the first place where `got` is not what torch computes from z, or None.

    Right is what torch gives in float64. Where that is finite, this much error is allowed: twice
    torch's own in the dtype, a few units in the last place, the smallest normal number, what
    float64 loses of 1 + erf or 1 + tanh, and in a derivative the last place of one. torch's own
    infinities and NaN in the dtype are right, too: its gelu overflows above 1.7e38, and its
    derivative of gelu_tanh is NaN above 1e19.
    """
    by_torch, exact = function(name, z), function(name, z.double())
    info = torch.finfo(z.dtype)
    error = (got.double() - exact).abs()
    room = 2 * (by_torch.double() - exact).abs().nan_to_num(0, 0) + 4 * info.eps * exact.abs()
    room += info.tiny + z.double().abs().nan_to_num(0, 0) * 2**-51
    if function is derivative:  # a factor near one, of terms that are
        room += 2**-23
    right = torch.where(exact.isfinite(), error <= room, same(got, exact.to(z.dtype)))
    wrong = ~(right | (~by_torch.isfinite() & same(got, by_torch)))
    if not wrong.any():
        return None
    i = int(wrong.nonzero()[0])
    return (
        f"{name} of {z.dtype} at {int(wrong.sum())} places, first {float(z[i])!r}: expected "
        f"{float(exact[i])!r} (torch: {float(by_torch[i])!r}), got {float(got[i])!r}"
    )


def same(a, b):
    """Elementwise equality, NaN equal to itself."""
    return (a == b) | (a.isnan() & b.isnan())
