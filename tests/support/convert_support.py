"""A small model, and a way to see that a call left a model alone."""

import torch
from torch import nn

from maestro_kernels.nn import conversion_report


def mlp(**options):
    return nn.Sequential(
        nn.Linear(16, 24, **options), nn.ReLU(), nn.Linear(24, 16, **options), nn.ReLU()
    )


def kinds(model):
    return [type(module).__name__ for module in model]


def snapshot(model):
    modules = dict(model.named_modules())
    modes = {name: module.training for name, module in modules.items()}
    hooks = {name: len(module._forward_pre_hooks) for name, module in modules.items()}
    values = {name: t.clone() for name, t in model.state_dict().items()}
    return modules, modes, hooks, values, {n: id(p) for n, p in model.named_parameters()}


def assert_unchanged(model, before):
    modules, modes, hooks, values, ids = snapshot(model)
    assert list(modules) == list(before[0])
    assert all(modules[name] is before[0][name] for name in modules)
    assert (modes, hooks, ids) == (before[1], before[2], before[4])
    for name, value in before[3].items():
        assert torch.equal(torch.nan_to_num(values[name]), torch.nan_to_num(value))
    assert conversion_report(model) is None
