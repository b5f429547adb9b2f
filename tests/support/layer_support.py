"""Layers that the tests of threads, freshness and gradients share."""

import torch
from packing_support import make
from torch import nn

import maestro_kernels as mk


def siblings(form="fused", prepacked=True):
    layers = nn.ModuleDict({n: make(40, 24) for n in ("q_proj", "k_proj", "v_proj")}).eval()
    mk.group(layers)
    return mk.prepack(layers, form=form) if prepacked else layers


def plainly(layer, x, rank):
    with torch.no_grad():
        return mk.lod_linear(x, layer.u, layer.v, layer.bias, rank=rank, backend="reference")


def gradients(module):
    return [p.grad for p in module.parameters()]
