"""convert and to_dense: swap a model's dense layers for factorised ones, and back.

Everything is computed and checked before the first layer is swapped, so a call that raises leaves
the model as it was.
"""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from maestro_kernels.arguments import check_int, check_model, renamed
from maestro_kernels.nn.candidates import Candidate, Selector, find_candidates, matches
from maestro_kernels.nn.conv import LoDConv, conv_factors
from maestro_kernels.nn.experts import idle_layers
from maestro_kernels.nn.factorize import factorize, random_factors
from maestro_kernels.nn.kinds import FACTORISED
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.nn.linear import LoDLinear, copied, trainable
from maestro_kernels.nn.moments import check_batches, input_moments
from maestro_kernels.nn.opened import Opened, take_hooks
from maestro_kernels.nn.pivoted import PivotedLinear
from maestro_kernels.nn.swapping import Opening, opened, swap_layers

LayerRank = int | float | str | None
Rank = LayerRank | Mapping[str, LayerRank] | Callable[[str, nn.Module], LayerRank]
_INITS = ("svd", "data", "random")
_NO_PATTERN = "no pattern in rank matches it"
_REPORT = "_maestro_conversion"


@dataclass(frozen=True)
class ConversionReport:
    """What the last `convert` of a model did.

    Attributes:
        converted: layer name -> rank.
        kept: layer name -> why it stayed as it was.
    """

    converted: dict[str, int] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name or '(model)'}: rank {rank}" for name, rank in self.converted.items()]
        lines += [f"{name or '(model)'}: stays, {why}" for name, why in self.kept.items()]
        return "\n".join(lines)


def conversion_report(model: nn.Module) -> ConversionReport | None:
    """The decisions of the last `convert` of this model, or None."""
    report: ConversionReport | None = vars(model).get(_REPORT)
    return report


def forget_report(model: nn.Module) -> nn.Module:
    """Without the decisions of a `convert` whose layers are gone; returns the model."""
    vars(model).pop(_REPORT, None)
    return model


@renamed(data="batches")
def convert(
    model: nn.Module,
    rank: Rank = None,
    *,
    include: Selector = None,
    exclude: Selector = None,
    init: str = "svd",
    batches: Iterable[Any] | None = None,
    allow_larger: bool = False,
    inplace: bool = True,
    multiple_of: int = 1,
) -> nn.Module:
    """Replace W (N, K) by u @ v, u (N, r), v (r, K), in linear and 1-d and 2-d convolution layers.

    The fused experts of transformers become one layer per expert and matrix, see `LoDExperts`.
    Layers that cannot be factorised, or whose factors would not be smaller, stay as they are;
    `conversion_report(model)` and `summary(model)` say why. Hooks on calls and gradients move to
    the new layer, a bias stays the same parameter, and mode, dtype, device and requires_grad are
    kept; weights become new parameters, so make the optimizer afterwards.

    Args:
        model: any module; a single layer comes back as a new layer.
        rank: an int >= 1 (at most min(N, K) is used); a fraction 0 < f <= 1 of the layer's dense
            weights to keep, r = floor(f * N * K / (N + K)), at least 1; None for min(N, K); "dense"
            to leave the layer. Or one of these per layer: a function (name, module) -> rank, or a
            dict of patterns (see classify) of which the first that matches counts; layers that none
            matches stay.
        include: only these layers; a pattern, several, or a function (name, module) -> bool.
        exclude: not these layers; as include, and stronger.
        init: "svd", the closest factors; "data", the factors with the smallest output error on
            calibration batches; "random", fresh factors as for training from scratch.
        batches: for init="data": tensors (model(x)), tuples (model(*t)) or
            dicts (model(**d)). The model runs in eval mode.
        allow_larger: also convert where r (N + K) >= N K (training with LoD starts there).
        inplace: False leaves the model alone and returns a converted copy.
        multiple_of: round ranks to this multiple, within min(N, K): up for an int, down (but to at
            least one multiple) for a fraction. Fast kernels want 8.

    Returns:
        The model, converted.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value does not fit, a pattern matches nothing, a weight or a calibration input
            is not finite, or no layer would be converted. The model is then unchanged.

    Example:
        >>> import torch, maestro_kernels as mk
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> mk.convert(model, rank=0.5)[0].rank
        16

    Source:
        Maestro (arXiv 2308.14929); see `factorize` for the data-aware form.
    """
    fn = "convert"
    step = check_int(fn, "multiple_of", multiple_of, 1)
    if init not in _INITS:
        raise ValueError(f"{fn}: init: expected one of {_INITS}, got {init!r}")
    if init == "data":
        check_batches(fn, "batches", batches)
    elif batches is not None:
        raise ValueError(f"{fn}: batches: expected None with init={init!r}, got batches")
    check_model(fn, model)
    with opened(model) as opening:
        model = opening.model
        candidates = find_candidates(fn, model, include, exclude)
        modules = dict(model.named_modules())
        ranks, report = _choose_ranks(candidates, modules, rank, step, allow_larger)
        chosen = {name: modules[name] for name in ranks}
        _check_weights(chosen, init)
        moments = {}
        if batches is not None and chosen:
            moments = input_moments(model, chosen, batches, fn=fn, idle=idle_layers(model))
        layers: dict[nn.Module, nn.Module] = {}
        for name, module in chosen.items():
            moment = moments.pop(name, None)
            layer = _factorised(module, candidates[name], ranks[name], init, moment)
            layers[module] = in_place_of(module, layer, share=inplace)
        converted = _swapped(opening, layers, inplace)
    setattr(converted, _REPORT, report)
    return converted


def _swapped(opening: Opening, layers: dict[nn.Module, nn.Module], inplace: bool) -> nn.Module:
    """The model with its new layers, in which what has none of them is closed as it was."""
    same: dict[nn.Module, nn.Module] = {}
    for form, closed in opening.closed.items():
        if not any(module in layers for module in form.modules()):
            same[form] = closed if inplace else copy.deepcopy(closed)
    converted = swap_layers(opening.model, layers | same, inplace=inplace)
    if inplace:
        opening.kept |= opening.closed.keys() - same.keys()
    return converted


def to_dense(model: nn.Module, *, inplace: bool = True) -> nn.Module:
    """Replace every factorised layer by the dense layer of its active prefix, u[:, :r] @ v[:r].

    A converted Hugging Face Conv1D becomes an nn.Linear; experts are fused again. A model without
    factorised layers comes back as it is.

    Args:
        model: any module; a single layer comes back as a new layer.
        inplace: False leaves the model alone and returns a dense copy.

    Raises:
        TypeError: model is no module.
        ValueError: a layer has an activation of its own, which a dense layer has not.
    """
    check_model("to_dense", model)
    layers: dict[nn.Module, nn.Module] = {}
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, Opened):
            inside |= set(module.modules())
            layers[module] = (module if inplace else copy.deepcopy(module)).close()
        elif isinstance(module, LoDLayer | PivotedLinear) and module not in inside:
            layers[module] = dense_form(module, share=inplace)
    return forget_report(swap_layers(model, layers, inplace=inplace))


def dense_form(layer: LoDLayer | PivotedLinear, *, share: bool) -> nn.Module:
    """The dense layer of the active prefix, with the mode and call hooks of the factorised one.

    Args:
        layer: factorised.
        share: use the layer's own bias parameter and hooks instead of copies.

    Raises:
        ValueError: the layer has an activation of its own, which a dense layer has not.
    """
    return in_place_of(layer, layer.to_dense(), share=share)


def _choose_ranks(
    candidates: dict[str, Candidate],
    modules: dict[str, nn.Module],
    rank: Rank,
    step: int,
    allow_larger: bool,
) -> tuple[dict[str, int], ConversionReport]:
    """The rank of each layer to convert, and the report; raises when there is none."""
    if isinstance(rank, Mapping):
        _check_patterns(rank, candidates)
    report = ConversionReport()
    asked_for_dense = False
    for name, candidate in candidates.items():
        reason = candidate.reason
        if reason is None:
            value = _layer_rank(rank, name, modules[name])
            if value == "dense" or value is _NO_PATTERN:
                asked_for_dense = asked_for_dense or value == "dense"
                reason = _NO_PATTERN if value is _NO_PATTERN else "asked to stay dense"
            else:
                r = _resolve(value, name, candidate, step)
                reason = None if allow_larger else _not_smaller(candidate, r)
                if reason is None:
                    report.converted[name] = r
        if reason is not None:
            report.kept[name] = reason
    if not report.converted and not asked_for_dense:
        raise ValueError(
            f"convert: model: expected at least one layer to factorise, got {_seen(report)}"
        )
    return report.converted, report


def _seen(report: ConversionReport) -> str:
    if not report.kept:
        return "a model without a linear or convolution layer"
    shown = [f"{name or '(model)'}: {why}" for name, why in list(report.kept.items())[:6]]
    more = len(report.kept) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _check_patterns(rank: Mapping[str, LayerRank], candidates: dict[str, Candidate]) -> None:
    for pattern in rank:
        if not isinstance(pattern, str):
            raise TypeError(
                f"convert: rank: expected patterns (str) as keys, got {type(pattern).__name__}"
            )
        if not any(matches(pattern, name) for name in candidates):
            some = ", ".join(repr(name) for name in list(candidates)[:5])
            raise ValueError(
                f"convert: rank: expected patterns that match a layer (such as {some}), "
                f"got {pattern!r}"
            )


def _layer_rank(rank: Rank, name: str, module: nn.Module) -> Any:
    if isinstance(rank, Mapping):
        return next((rank[p] for p in rank if matches(p, name)), _NO_PATTERN)
    return rank(name, module) if callable(rank) else rank


def _resolve(value: Any, name: str, candidate: Candidate, step: int) -> int:
    """The rank as an int in 1..min(N, K)."""
    full = candidate.full_rank
    where = f"convert: rank: {name or 'model'}"
    expected = 'an int >= 1, a fraction 0 < f <= 1, None or "dense"'
    if value is None:
        return full
    if isinstance(value, bool | Tensor) or not isinstance(value, numbers.Real):
        got = repr(value) if isinstance(value, str) else type(value).__name__
        raise TypeError(f"{where}: expected {expected}, got {got}")
    if isinstance(value, numbers.Integral):
        count = int(value)
        if count < 1:
            raise ValueError(f"{where}: expected {expected}, got {count}")
        return min(-(-count // step) * step, full)
    fraction = float(value)
    if not 0 < fraction <= 1:
        raise ValueError(f"{where}: expected {expected}, got {fraction}")
    # 0.3 * 10 may come out as 2.9999999999999996.
    kept = math.floor(fraction * candidate.break_even_rank + 1e-9)
    return min(max(kept // step, 1) * step if step > 1 else max(kept, 1), full)


def _not_smaller(candidate: Candidate, rank: int) -> str | None:
    factors, dense = candidate.factor_weights(rank), candidate.dense_weights
    if factors < dense:
        return None
    return (
        f"factors of rank {rank} hold {factors} weights, the dense layer {dense} "
        f"(break-even rank {candidate.break_even_rank:.1f})"
    )


def _check_weights(chosen: dict[str, nn.Module], init: str) -> None:
    for name, module in chosen.items():
        weight = module.weight
        assert isinstance(weight, Tensor)
        if not (weight.is_meta and init == "random"):
            label = f"{name}.weight" if name else "weight"
            check_values("convert", label, weight, f" for init={init!r}")


def check_values(fn: str, label: str, value: Tensor, purpose: str = "") -> None:
    """Raise ValueError unless a weight has finite values."""
    if value.is_meta:
        raise ValueError(
            f"{fn}: model: expected weights in memory{purpose}, got {label} on the meta device"
        )
    if not bool(value.detach().isfinite().all()):
        raise ValueError(f"{fn}: model: expected finite weights, got NaN or infinity in {label}")


def matrices_of(module: nn.Module, kind: str, groups: int, N: int, K: int) -> Tensor:
    """The matrices of a dense layer, (groups, N, K)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (weight.mT if kind == "hf_conv1d" else weight).reshape(groups, N, K)


def _factorised(
    module: nn.Module, candidate: Candidate, rank: int, init: str, moment: Tensor | None
) -> LoDLayer:
    """The factorised form of one dense layer, around the layer's own bias."""
    c = candidate
    matrices = matrices_of(module, c.kind, c.groups, c.N, c.K)
    pairs = [
        random_factors(matrix, rank)
        if init == "random"
        else factorize(matrix, rank, None if moment is None else moment[g])
        for g, matrix in enumerate(matrices)
    ]
    return layer_from_pairs(module, c.kind, pairs)


def layer_from_pairs(
    module: nn.Module, kind: str, pairs: Sequence[tuple[Tensor, Tensor]]
) -> LoDLayer:
    """The factorised form of one dense layer from (u, v) of each group, around its own bias."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, nn.Parameter)
    made = FACTORISED.get(f"lod_{kind}", LoDLinear)
    if issubclass(made, LoDConv):
        u, v = conv_factors(pairs, weight.shape)
        u, v = trainable(u, weight), trainable(v, weight)
        return made.from_factors(module, u, v, bias)  # type: ignore[arg-type]
    u, v = pairs[0]
    return LoDLinear.from_factors(trainable(u, weight), trainable(v, weight), bias)


def in_place_of(old: nn.Module, new: nn.Module, *, share: bool) -> nn.Module:
    """Give `new` the mode, bias and call hooks of `old`; hooks on state dicts know other keys."""
    # A container of two layers has none.
    bias = getattr(old, "bias", None)
    if bias is not None:
        assert isinstance(bias, nn.Parameter)
        new.bias = bias if share else copied(bias)
    return with_hooks_of(old, new, share=share)


def with_hooks_of(old: nn.Module, new: nn.Module, *, share: bool) -> nn.Module:
    """Give `new` the mode and the call hooks of `old`."""
    new.train(old.training)
    take_hooks(old, new, share=share)
    return new
