"""Whether a subclass of nn.Linear with a forward of its own still computes x @ W.T + b."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What such a forward may consist of, as torch.fx names it: none of these looks at values, at the
# mode or at random numbers, so one probe stands for every input.
_FUNCTIONS = ("linear", "matmul", "add", "addmm", "getattr", "t", "transpose", "iadd")
_METHODS = ("matmul", "mm", "t", "transpose", "add", "add_")
_K, _N = 5, 3


def is_linear(module: nn.Linear) -> bool:
    """Whether the forward is x @ W.T + b, whatever it is written like (Falcon's, for one).

    A stand-in of the same class and settings with a small weight is traced in both modes; of
    products, transposes and sums alone, the trace is compared with F.linear on random values.
    Anything else, and whatever cannot be traced, is taken for another function.
    """
    twin, generator = copy.copy(module), torch.Generator("cpu").manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        options = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
        return torch.randn(*shape, **options)  # type: ignore[call-overload, no-any-return]

    weight = nn.Parameter(drawn(_N, _K))
    bias = None if module.bias is None else nn.Parameter(drawn(_N))
    vars(twin)["_parameters"] = {"weight": weight, "bias": bias}
    twin.in_features, twin.out_features = _K, _N
    x = drawn(2, 4, _K)
    expected = F.linear(x, weight, bias)
    return all(_agrees(twin, training, x, expected) for training in (False, True))


@torch.no_grad()
def _agrees(twin: nn.Linear, training: bool, x: Tensor, expected: Tensor) -> bool:
    twin.training = training
    try:
        traced = torch.fx.symbolic_trace(twin)
        if not all(_is_plain(node) for node in traced.graph.nodes):
            return False
        y = traced(x)
    # Code of others: whatever it raises, it is not known to be a linear layer.
    except Exception:
        return False
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected)


def _is_plain(node: torch.fx.Node) -> bool:
    if node.op == "call_function":
        return getattr(node.target, "__name__", "") in _FUNCTIONS
    if node.op == "call_method":
        return node.target in _METHODS
    return node.op in ("placeholder", "get_attr", "output")
