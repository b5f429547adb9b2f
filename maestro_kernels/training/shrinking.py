"""Dropping the components that training drove to zero, from parameters and optimizer alike."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from maestro_kernels.arguments import check_int
from maestro_kernels.nn import LoDLayer, LoDLinear, ungroup
from maestro_kernels.nn.conversion import dense_form
from maestro_kernels.nn.swapping import swap_layers
from maestro_kernels.training.layers import full_rank, require_layers, set_full_rank, unwrapped
from maestro_kernels.training.optimizer_state import (
    Cut,
    Optimizers,
    check_optimizers,
    check_state,
    clear_state,
    drop_parameter,
    replace_parameter,
)

Report = dict[str, tuple[int, int | str]]


@dataclass
class _Plan:
    """What happens to layers that share factors (mostly one layer)."""

    layers: dict[str, LoDLayer] = field(default_factory=dict)
    old: int = 0  # full rank before
    keep: int = 0  # components that live on
    width: int = 0  # components stored
    dense: bool = False

    @property
    def R(self) -> int:
        return next(iter(self.layers.values())).max_rank


def shrink(
    model: nn.Module,
    optimizer: Optimizers = None,
    threshold: float = 1e-5,
    *,
    min_rank: int = 1,
    multiple_of: int = 1,
    min_saving: float = 0.125,
    dense: bool = False,
) -> Report:
    """Keep the components b with importance(b) = ||u[:, b:]|| * ||v[b:]|| >= threshold.

    Importance does not increase with b, so a prefix is kept. Parameters, gradients and optimizer
    state are sliced where that frees enough; elsewhere the components are zeroed, with all that
    the optimizer remembers of them, and the active rank moves: they stay dead, as if cut. Sliced
    factors are new parameters, swapped into every layer that shares them and into the optimizer's
    groups; the steps that SGD, Adam and AdamW take on what is kept do not change by it.

    Args:
        model: holds LoD layers. Not wrapped by DDP or FSDP2: `rewrap` is for those.
        optimizer: the optimizer of these parameters, several, or None.
        threshold: >= 0; the paper's is 1e-5.
        min_rank: components a layer keeps at least. 0 lets a layer die: it gives its bias.
        multiple_of: stored components are rounded up to this, within max_rank; 8 suits fast
            kernels. The active rank is not rounded.
        min_saving: slice when at least this part of a layer's factors goes. Every new shape makes
            a compiled model compile again.
        dense: turn layers whose kept rank is at or past break-even into dense ones. The optimizer
            gets the dense weight in u's place and starts without memory of it.

    Returns:
        {layer: (old rank, new rank)} of all LoD layers, "dense" for those that became dense.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: no LoD layer, a wrapped model, factors that are not finite, a threshold that
            leaves no component in any layer, an optimizer of other parameters, a factor tied to
            something that is no LoD factor, or one with hooks. Nothing has changed then.
        NotImplementedError: optimizer state that is not of the parameter's shape.

    Source: Maestro (arXiv 2308.14929), whose code masks only.
    """
    fn = "shrink"
    options = ShrinkOptions(fn, threshold, min_rank, multiple_of, min_saving, dense)
    layers = require_layers(fn, model)
    refuse_wrapped(fn, model)
    return shrink_plain(fn, unwrapped(model), layers, check_optimizers(fn, optimizer), options)


class ShrinkOptions:
    """The checked options of `shrink`, which `rewrap` passes on."""

    def __init__(
        self,
        fn: str,
        threshold: float,
        min_rank: int = 1,
        multiple_of: int = 1,
        min_saving: float = 0.125,
        dense: bool = False,
    ) -> None:
        self.threshold = _number(fn, "threshold", threshold)
        self.min_saving = _number(fn, "min_saving", min_saving)
        self.min_rank = check_int(fn, "min_rank", min_rank, 0)
        self.multiple_of = check_int(fn, "multiple_of", multiple_of, 1)
        if not isinstance(dense, bool):
            raise TypeError(f"{fn}: dense: expected a bool, got {type(dense).__name__}")
        self.dense = dense


def shrink_plain(
    fn: str,
    model: nn.Module,
    layers: dict[str, LoDLayer],
    optimizers: list[Optimizer],
    options: ShrinkOptions,
    agree: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> Report:
    """`shrink` without wrappers; `agree` makes all processes keep the same counts."""
    plans = _clusters(fn, model, layers)
    _check_parameters(fn, plans, optimizers)
    check_state(fn, optimizers, {p: name for name, p in model.named_parameters()})
    _choose(fn, plans, _alive(fn, layers, options.threshold, agree), options)
    if model in layers.values() and plans[0].dense:
        raise ValueError(f"{fn}: dense: expected a model around its layers, got a lone layer")
    report: Report = {}
    with torch.no_grad():
        for plan in plans:
            _apply(plan, optimizers)
            new: int | str = "dense" if plan.dense else plan.keep
            report.update(dict.fromkeys(plan.layers, (plan.old, new)))
    _make_dense(model, [p for p in plans if p.dense], optimizers)
    return {name: report[name] for name in layers}


# They keep the parameters they were given, flat copies of them, or the gradients' buckets.
_WRAPPERS = {"DistributedDataParallel", "DataParallel", "FSDPModule", "FullyShardedDataParallel"}


def wrappers(model: nn.Module) -> dict[str, str]:
    """{module name: data-parallel wrapper} of a model's modules."""
    found = {
        name: _WRAPPERS & {cls.__name__ for cls in type(module).__mro__}
        for name, module in model.named_modules()
    }
    return {name: min(kinds) for name, kinds in found.items() if kinds}


def refuse_wrapped(fn: str, model: nn.Module) -> None:
    """Raise for a model whose parameters belong to DDP or FSDP, or are DTensors."""
    for name, wrapper in wrappers(model).items():
        raise ValueError(
            f"{fn}: model: expected plain modules, got {wrapper} at "
            f"{name or 'the model itself'!r}: it would not see new parameters; use "
            "training.rewrap"
        )
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not Tensor:
            raise ValueError(
                f"{fn}: model: expected plain parameters, got a {type(parameter.data).__name__} "
                f"at {name!r}; use training.rewrap for FSDP2"
            )


def _number(fn: str, name: str, value: float) -> float:
    expected = f"{fn}: {name}: expected a finite number >= 0"
    if isinstance(value, bool | Tensor) or not isinstance(value, numbers.Real):
        raise TypeError(f"{expected}, got {type(value).__name__}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{expected}, got {value}")
    return float(value)


def _clusters(fn: str, model: nn.Module, layers: dict[str, LoDLayer]) -> list[_Plan]:
    """Layers that share a factor are one plan; factors shared with anything else are refused."""
    plans: list[_Plan] = []
    home: dict[Tensor, tuple[_Plan, str, int]] = {}
    for name, layer in layers.items():
        plan = _Plan({name: layer})
        for key in ("u", "v"):
            other, role, groups = home.get(getattr(layer, key), (plan, key, layer.groups))
            if (role, groups) != (key, layer.groups):
                raise ValueError(
                    f"{fn}: model: expected {name}.{key} to be tied to other {key} factors only, "
                    f"got it tied to {next(iter(other.layers))}.{role}"
                )
            if other is not plan:
                plan.layers = {**other.layers, **plan.layers}
                plans = [p for p in plans if p is not other]
        plans.append(plan)
        for tied in plan.layers.values():
            home[tied.u], home[tied.v] = (plan, "u", tied.groups), (plan, "v", tied.groups)
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter in home and not (isinstance(module, LoDLayer) and key in ("u", "v")):
                raise ValueError(
                    f"{fn}: model: expected factors tied to LoD layers only, got {name}.{key} "
                    f"tied to a factor of {next(iter(home[parameter][0].layers))}"
                )
    return plans


def _factors(plans: Iterable[_Plan]) -> dict[nn.Parameter, str]:
    return {
        getattr(layer, key): f"{name}.{key}"
        for plan in plans
        for name, layer in plan.layers.items()
        for key in ("u", "v")
    }


def _check_parameters(fn: str, plans: list[_Plan], optimizers: list[Optimizer]) -> None:
    factors = _factors(plans)
    for parameter, name in factors.items():
        hooks = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
        if any(hooks):
            raise ValueError(
                f"{fn}: model: expected factors without hooks, which new parameters would lose, "
                f"got a hook on {name}"
            )
    held = {p for o in optimizers for group in o.param_groups for p in group["params"]}
    if optimizers and any(p.requires_grad for p in factors) and not held & factors.keys():
        raise ValueError(
            f"{fn}: optimizer: expected one that trains this model, got one that holds none of "
            f"its {len(factors)} factors (was it made before the model was converted or resized?)"
        )


def _alive(
    fn: str, layers: dict[str, LoDLayer], threshold: float, agree: Callable[[Tensor], Tensor]
) -> dict[str, int]:
    """How many components of each layer reach the threshold; waits for the device once."""
    rows = []
    for layer in layers.values():
        importance = layer.importance()
        finite = importance.isfinite().all()
        rows.append(torch.where(finite, (importance >= threshold).sum(), -1))
    device = rows[0].device
    counts = agree(torch.stack([row.to(device) for row in rows])).tolist()
    for name, count in zip(layers, counts, strict=True):
        if count < 0:
            raise ValueError(
                f"{fn}: model: expected finite factors, got NaN or infinity in layer {name!r}"
            )
    if not any(counts):
        largest = max(float(layer.importance()[:1].sum()) for layer in layers.values())
        raise ValueError(
            f"{fn}: threshold: expected one that leaves a component in some layer, got "
            f"{threshold:g}, which is above all (the largest importance is {largest:g})"
        )
    return dict(zip(layers, counts, strict=True))


def _choose(fn: str, plans: list[_Plan], alive: dict[str, int], options: ShrinkOptions) -> None:
    for plan in plans:
        R = plan.R
        plan.old = max(full_rank(layer) for layer in plan.layers.values())
        keep = max(alive[name] for name in plan.layers)
        plan.keep = min(max(keep, options.min_rank), plan.old)
        step = options.multiple_of
        plan.width = min(-(-plan.keep // step) * step, R)
        if plan.width == R or R - plan.width < options.min_saving * R:
            plan.width = R
        plan.dense = options.dense and _is_cheaper_dense(plan)


def _is_cheaper_dense(plan: _Plan) -> bool:
    if len(plan.layers) > 1:
        return False
    (layer,) = plan.layers.values()
    if isinstance(layer, LoDLinear) and layer.activation is not None:
        return False
    return 0 < layer.break_even_rank <= plan.keep


def _apply(plan: _Plan, optimizers: list[Optimizer]) -> None:
    R, groups = plan.R, next(iter(plan.layers.values())).groups
    fresh: dict[nn.Parameter, nn.Parameter] = {}
    for parameter, name in _factors([plan]).items():
        dim, count = (1, 1) if name.endswith(".u") else (0, groups)
        if plan.width < R:
            cut = Cut(dim, R, plan.width, count)
            fresh[parameter] = sliced(parameter, cut)
            replace_parameter(optimizers, parameter, fresh[parameter], cut)
        if plan.keep < min(plan.old, plan.width):
            tail = Cut(dim, plan.width, plan.keep, count)
            target = fresh.get(parameter, parameter)
            tail.clear(target)
            if target.grad is not None:
                tail.clear(target.grad)
            clear_state(optimizers, target, tail)
    for layer in plan.layers.values():
        layer.u, layer.v = fresh.get(layer.u, layer.u), fresh.get(layer.v, layer.v)
        rank = min(layer.rank, plan.keep)
        set_full_rank(layer, plan.keep)
        layer.rank = rank


def sliced(old: nn.Parameter, cut: Cut) -> nn.Parameter:
    """The prefix of a parameter and of its gradient; what was attached to it comes along."""
    new = nn.Parameter(cut.prefix(old.detach()), requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    if old.grad is not None:
        new.grad = cut.prefix(old.grad)
    return new


def _make_dense(model: nn.Module, plans: list[_Plan], optimizers: list[Optimizer]) -> None:
    swaps: dict[nn.Module, nn.Module] = {}
    for plan in plans:
        (layer,) = plan.layers.values()
        layer.rank = plan.keep
        new = dense_form(layer, share=True)
        weight = new.weight
        assert isinstance(weight, nn.Parameter)
        hold_dense(optimizers, layer, weight)
        swaps[layer] = new
    if swaps:
        ungroup(model, only=swaps)
        swap_layers(model, swaps, inplace=True)


def hold_dense(optimizers: list[Optimizer], layer: LoDLayer, weight: nn.Parameter) -> None:
    """Train a dense weight where the layer's factors were trained, by the same optimizers."""
    weight.requires_grad_(layer.u.requires_grad or layer.v.requires_grad)
    held = {p for o in optimizers for group in o.param_groups for p in group["params"]}
    first, second = (layer.u, layer.v) if layer.u in held else (layer.v, layer.u)
    replace_parameter(optimizers, first, weight)
    drop_parameter(optimizers, second)
