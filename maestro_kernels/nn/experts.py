"""LoDExperts: the fused 3-d experts of transformers, with one linear layer for each matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maestro_kernels.functional import lod_linear_grouped
from maestro_kernels.imports import when_imported
from maestro_kernels.nn.linear import LoDLinear, trainable
from maestro_kernels.nn.opened import Opened, dense_linear_of, linear_of
from maestro_kernels.problem import DTYPES

if TYPE_CHECKING:
    from typing_extensions import Self

_WATCHED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PARTS = {"gate_up": "gate_up_proj", "up": "up_proj", "down": "down_proj"}


class LoDExperts(Opened):
    """y[t] = sum_j weights[t, j] · down_e(gate(gate_up_e(x[t]))), e = index[t, j].

    Stands for the experts modules of transformers 5 (Mixtral, Qwen-MoE, DeepSeek, GPT-OSS, ...)
    that keep all experts in one tensor and let `config._experts_implementation` choose who
    multiplies; here that choice has no say. Tokens are sorted by expert, and all experts that got
    some run as one `lod_linear_grouped` call per projection, each at its own rank. The others are
    not touched, but in training, where they get zero gradients, as in the dense module.

    Attributes:
        gate_up: one linear layer per expert, dense or factorised; `up` where there is no gate.
        down: the same.

    Compiled, it runs outside of the graph: how many tokens an expert gets is known from their
    values only.
    """

    gate_up: nn.ModuleList
    up: nn.ModuleList
    down: nn.ModuleList
    # What the module has that this one stands for.
    act_fn: nn.Module
    post_expert_norm: nn.Module
    is_transposed: bool
    has_bias: bool

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:  # noqa: D102
        # What transformers' decorator leaves: the contract that its own implementations rely on.
        kind, own = type(model), vars(model)
        decorated = hasattr(kind.forward, "__wrapped__") and hasattr(kind, "_apply_gate")
        flags = all(isinstance(own.get(name), bool) for name in ("is_transposed", "has_bias"))
        if not (decorated and flags) or "forward" in own or model._buffers:
            return False
        weights: list[Any] = [model._parameters.get(_PARTS[part]) for part in _parts_of(model)]
        names = {_PARTS[part] for part in _parts_of(model)}
        if own["has_bias"]:
            names |= {f"{name}_bias" for name in names}
        held = {name for name, value in model._parameters.items() if value is not None}
        return held == names and all(
            type(w) is nn.Parameter
            and w.dim() == 3
            and w.dtype in DTYPES
            and w.shape[0] == weights[0].shape[0] > 0
            for w in weights
        )

    @classmethod
    def of(cls, model: nn.Module) -> Self:  # noqa: D102
        made = cls._around(model)
        for part in _parts_of(model):
            weight, bias = _stacked(model, part)
            matrices = (weight.mT if model.is_transposed else weight).detach().unbind()
            biases = [None] * len(matrices) if bias is None else bias.detach().unbind()
            made._modules[part] = nn.ModuleList(
                linear_of(
                    matrix, own if own is None or bias is None else trainable(own, bias), weight
                )
                for matrix, own in zip(matrices, biases, strict=True)
            )
        return made

    def close(self) -> nn.Module:  # noqa: D102
        parts = _parts_of(self)
        made = self._closed(set(parts))
        for part in parts:
            dense = [dense_linear_of(layer) for layer in self._modules[part]]  # type: ignore[union-attr]
            weights = [layer.weight.detach() for layer in dense]
            weight = torch.stack([w.mT for w in weights] if self.is_transposed else weights)
            made.register_parameter(_PARTS[part], trainable(weight, dense[0].weight))
            if self.has_bias:
                bias = torch.stack([layer.bias.detach() for layer in dense])
                made.register_parameter(f"{_PARTS[part]}_bias", trainable(bias, dense[0].bias))
        return made

    @property
    def experts(self) -> int:
        """How many there are."""
        return len(self.down)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Y (T, K) for x (T, K), index (T, k) of experts and weights (T, k).

        An index that is no expert's (transformers marks so what another device computes) adds
        nothing.
        """
        return self._routed(hidden_states, top_k_index, top_k_weights)

    def _routed(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        chosen = top_k_index.shape[-1]
        ids, order = top_k_index.reshape(-1).sort(stable=True)
        counts = torch.bincount(ids, minlength=self.experts)[: self.experts].tolist()
        order = order[: sum(counts)]
        gated = "gate_up" in self._modules
        x = hidden_states[order // chosen]
        h = self._multiplied(self.gate_up if gated else self.up, x, counts)
        h = self._apply_gate(h) if gated else self.act_fn(h)
        y = self._multiplied(self.down, h, counts)
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[order, None]
        total = y.new_zeros(ids.shape[0], y.shape[1]).index_copy(0, order, y)
        total = total.unflatten(0, (-1, chosen)).sum(1)
        return total.to(hidden_states.dtype)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        h: Tensor = self.closed_type._apply_gate(self, gate_up)  # type: ignore[attr-defined]
        return h

    def _multiplied(self, layers: nn.ModuleList, x: Tensor, counts: list[int]) -> Tensor:
        """The rows of x, sorted by expert, through the layer of each."""
        xs = x.split(counts)
        # Sums over nothing: who trains gets zero gradients instead of none, which is what DDP
        # needs, and what the parameter that holds all experts gets.
        every = self.training and torch.is_grad_enabled()
        hit = [e for e, count in enumerate(counts) if count or every] or [0]
        called: list[Any] = [layers[e] for e in hit]
        if not all(_is_plain(layer, called[0]) for layer in called):
            return torch.cat([layer(xs[e]) for layer, e in zip(called, hit, strict=True)])
        ys = lod_linear_grouped(
            [xs[e] for e in hit],
            [layer.u for layer in called],
            [layer.v for layer in called],
            [layer.bias for layer in called],
            ranks=[layer.call_rank(x) for layer in called],
            activation=[layer.activation for layer in called],
            backend=called[0].backend,
        )
        return torch.cat(ys)


def idle_layers(model: nn.Module) -> set[nn.Module]:
    """The layers that no row may come to when a model is called: those of experts."""
    experts = [m for m in model.modules() if isinstance(m, LoDExperts)]
    return {layer for one in experts for layer in one.modules()}


def _parts_of(module: nn.Module) -> tuple[str, str]:
    return ("gate_up" if getattr(module, "has_gate", True) else "up"), "down"


def _stacked(module: nn.Module, part: str) -> tuple[nn.Parameter, nn.Parameter | None]:
    weight = module._parameters[_PARTS[part]]
    assert weight is not None
    return weight, module._parameters.get(f"{_PARTS[part]}_bias")


def _is_plain(layer: nn.Module, first: LoDLinear) -> bool:
    """Whether a layer may run in a call with others: nobody looks on, nothing is packed."""
    own = vars(layer)
    return (
        type(layer) is LoDLinear
        and layer.packed is None
        and layer.backend == first.backend
        and "forward" not in own
        and not any(own[hooks] for hooks in _WATCHED)
    )


def _stay_outside() -> None:
    """Keep torch.compile from a graph of its own for every number of tokens of every expert."""
    reason = "how many tokens an expert gets is known from values only"
    LoDExperts._routed = torch.compiler.disable(LoDExperts._routed, reason=reason)  # type: ignore[method-assign]


when_imported("torch._dynamo", _stay_outside)
