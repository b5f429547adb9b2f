"""Layers, and what is asked of them, that tests share."""

import torch
from packing_support import make
from torch import nn

import maestro_kernels as mk

N, K, R = 12, 20, 7


def layer(dtype=torch.float64, **options):
    made = mk.LoDLinear(K, N, R, dtype=dtype, **options)
    made.rank = 4
    return made


def merged(factorised):
    r = factorised.rank
    return factorised.u[:, :r] @ factorised.v[:r]


def siblings(form="fused", prepacked=True):
    """Three layers that read one x, grouped."""
    layers = nn.ModuleDict({n: make(40, 24) for n in ("q_proj", "k_proj", "v_proj")}).eval()
    mk.group(layers)
    return mk.prepack(layers, form=form) if prepacked else layers


def plainly(layer, x, rank):
    with torch.no_grad():
        return mk.lod_linear(x, layer.u, layer.v, layer.bias, rank=rank, backend="reference")


def gradients(module):
    return [p.grad for p in module.parameters()]
