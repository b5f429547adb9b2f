"""Models with LoD layers of several kinds, and factors that decay so that shrinking has work."""

import torch
from torch import nn

import maestro_kernels as mk


def mixed(dtype=torch.float64):
    """A linear layer, a grouped and a plain convolution, a head; all factorised at full rank."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.Flatten(),
        nn.Linear(6 * 16, 20),
        nn.ReLU(),
        nn.Linear(20, 5),
    ).to(dtype)
    return mk.convert(model, rank=None, allow_larger=True)


def batch(n=8, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, 6, 6, generator=generator, dtype=dtype)
    return x, torch.randn(n, 5, generator=generator, dtype=dtype)


def linear_model(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    return mk.convert(model, rank=None, allow_larger=True)


def fade(layer, keep, scale=1e-9):
    """Make the components from `keep` on unimportant but not zero."""
    with torch.no_grad():
        R = layer.max_rank
        layer.u[:, keep:] *= scale
        layer.v.view(layer.groups, R, -1)[:, keep:] *= scale


def lod(model):
    return mk.nn.lod_layers(model)


def full_ranks(model):
    return {name: layer.max_rank for name, layer in lod(model).items()}


def train_step(model, optimizer, data, penalty=None):
    x, y = data
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    if penalty is not None:
        loss = loss + penalty(model)
    loss.backward()
    optimizer.step()
    return float(loss.detach())
