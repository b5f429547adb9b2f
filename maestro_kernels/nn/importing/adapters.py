"""LoRA adapters of PEFT: W + s B A, merged into the weight or kept as factors beside the layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maestro_kernels.nn.adapted import Adapted
from maestro_kernels.nn.candidates import Candidate, find_candidates
from maestro_kernels.nn.importing.sources import Source, read
from maestro_kernels.nn.linear import LoDLinear, trainable
from maestro_kernels.nn.structure import is_conv1d
from maestro_kernels.nn.swapping import swap_layers

CONFIG = "adapter_config.json"
# What an adapter may be beside B A: each needs more than factors.
_REFUSED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "modules_to_save",
)
# Starts that take the first components out of the base, which then is not the one given here.
_CHANGED_BASE = re.compile("pissa|olora|corda|loftq")


@dataclass(frozen=True)
class _Adapter:
    """s B A of one layer: a (R, K), b (N, R)."""

    name: str
    a: Tensor
    b: Tensor
    scale: float


def add(fn: str, source: Any, model: nn.Module | None, adapter: str) -> nn.Module:
    """The model with a LoRA adapter; see `import_factors`."""
    if adapter not in ("merge", "beside"):
        raise ValueError(f"{fn}: adapter: expected 'merge' or 'beside', got {adapter!r}")
    if isinstance(source, nn.Module):
        raise ValueError(
            f"{fn}: source: expected a folder that PEFT's save_pretrained wrote, got a "
            f"{type(source).__name__}; its merge_and_unload() gives the merged model"
        )
    if model is None:
        raise ValueError(
            f"{fn}: dense_model: expected the model that the adapter was trained for, got None"
        )
    found = read(fn, source, CONFIG)
    adapters = _adapters(fn, found, model)
    if adapter == "merge":
        known = find_candidates(fn, model)
        layers = {
            a.name: _mergeable(fn, known[a.name], model.get_submodule(a.name)) for a in adapters
        }
        made: dict[nn.Module, nn.Module] = {}
        for a in adapters:
            layer = layers[a.name]
            if isinstance(layer, LoDLinear):
                made[layer] = _extended(fn, a, layer)
        for a in adapters:
            if not isinstance(layers[a.name], LoDLinear):
                _merge(a, layers[a.name])
    else:
        made = {(base := model.get_submodule(a.name)): _beside(a, base) for a in adapters}
    return swap_layers(model, made, inplace=True)


def _adapters(fn: str, found: Source, model: nn.Module) -> list[_Adapter]:
    config = found.config
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{fn}: source: expected an {CONFIG} of peft_type 'LORA', got "
            f"{config.get('peft_type')!r}"
        )
    for option in _REFUSED:
        if config.get(option):
            raise NotImplementedError(
                f"{fn}: source: expected a plain LoRA adapter, got one with {option}; merge it "
                "with PEFT and convert the result"
            )
    start = str(config.get("init_lora_weights"))
    if _CHANGED_BASE.match(start):
        raise NotImplementedError(
            f"{fn}: source: expected an adapter that leaves the base as it was, got one with "
            f"init_lora_weights {start!r}; merge it with PEFT and convert the result"
        )
    modules = dict(model.named_modules())
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in found.tensors.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.*)\.lora_([AB])(?:\.[^.]+)?\.weight", key)
        if match is None:
            raise NotImplementedError(
                f"{fn}: source: expected tensors lora_A and lora_B of linear layers, got {key!r}"
            )
        parts.setdefault(match[1], {})[match[2]] = value
    if not parts:
        raise ValueError(f"{fn}: source: expected tensors lora_A and lora_B, got none")
    return [_adapter(fn, config, n, p, modules) for n, p in parts.items()]


def _adapter(
    fn: str,
    config: Mapping[str, Any],
    name: str,
    parts: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
) -> _Adapter:
    for part, other in (("A", "B"), ("B", "A")):
        if part not in parts:
            raise ValueError(
                f"{fn}: source: expected lora_A and lora_B of {name!r}, got lora_{other} alone"
            )
    layer, a, b = modules.get(name), parts["A"], parts["B"]
    shape = None if layer is None else _shape(layer)
    if shape is None:
        raise ValueError(
            f"{fn}: dense_model: expected a linear layer {name!r}, got "
            f"{'none' if layer is None else type(layer).__name__}"
        )
    fits = a.dim() == b.dim() == 2 and b.shape[1] == a.shape[0]
    if not fits or (b.shape[0], a.shape[1]) != shape:
        raise ValueError(
            f"{fn}: source: expected lora_A (R, {shape[1]}) and lora_B ({shape[0]}, R) of "
            f"{name!r}, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    rank = _of_layer(config, "rank_pattern", name, config.get("r"))
    if rank != a.shape[0]:
        raise ValueError(
            f"{fn}: source: expected the rank {rank} of {CONFIG} in {name!r}, got {a.shape[0]}"
        )
    alpha = _of_layer(config, "alpha_pattern", name, config.get("lora_alpha"))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return _Adapter(name, a, b, scale)


def _of_layer(config: Mapping[str, Any], patterns: str, name: str, default: Any) -> Any:
    """The value of the first pattern that is, or ends, the name, as PEFT reads them."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _shape(layer: nn.Module) -> tuple[int, int] | None:
    if isinstance(layer, LoDLinear):
        return layer.matrix_shape
    if is_conv1d(layer):
        return layer.weight.shape[1], layer.weight.shape[0]  # type: ignore[union-attr,return-value,index]
    return tuple(layer.weight.shape) if isinstance(layer, nn.Linear) else None  # type: ignore[return-value]


def _mergeable(fn: str, candidate: Candidate, layer: nn.Module) -> nn.Module:
    """The layer.

    Raises:
        ValueError: its weight cannot be changed, or not without changing another layer.
    """
    reason = None if isinstance(layer, LoDLinear) else candidate.reason
    weight: Any = layer.v if isinstance(layer, LoDLinear) else layer.weight
    if reason is None and weight.is_meta:
        reason = "its weight is on the meta device"
    if reason is not None:
        raise ValueError(
            f"{fn}: dense_model: expected a layer {candidate.name!r} to merge an adapter into, but "
            f"{reason}; use adapter='beside'"
        )
    return layer


@torch.no_grad()
def _merge(adapter: _Adapter, layer: nn.Module) -> None:
    weight: Any = layer.weight
    product = adapter.scale * (adapter.b.double() @ adapter.a.double())
    product = product.T if is_conv1d(layer) else product
    weight.copy_(weight.double() + product.to(weight.device))


def _extended(fn: str, adapter: _Adapter, layer: LoDLinear) -> LoDLinear:
    """The layer with the adapter as its first components, at its active rank."""
    if layer.activation is not None:
        # PEFT adds to what the layer returns.
        raise ValueError(
            f"{fn}: adapter: expected 'beside' for {adapter.name!r}, whose activation "
            f"{layer.activation!r} comes before the adapter is added, got 'merge'"
        )
    rank, full = layer.rank + adapter.a.shape[0], min(layer.matrix_shape)
    if rank > full:
        raise ValueError(
            f"{fn}: adapter: expected at most {full} components in {adapter.name!r}, got "
            f"{layer.rank} and {adapter.a.shape[0]} of the adapter; use 'beside'"
        )
    like = layer.u
    b, a = (t.detach().to(like.device, like.dtype) for t in (adapter.scale * adapter.b, adapter.a))
    new = LoDLinear.from_factors(
        trainable(torch.cat([b, layer.u.detach()[:, : layer.rank]], 1), layer.u),
        trainable(torch.cat([a, layer.v.detach()[: layer.rank]]), layer.v),
        layer.bias,
        layer.activation,
    )
    return new.train(layer.training)


def _beside(adapter: _Adapter, base: nn.Module) -> nn.Module:
    like: Any = base.u if isinstance(base, LoDLinear) else base.weight
    b, a = (t.detach().to(like.device, like.dtype).clone() for t in (adapter.b, adapter.a))
    factors = LoDLinear.from_factors(nn.Parameter(b), nn.Parameter(a))
    return Adapted(base, factors, adapter.scale).train(base.training)
