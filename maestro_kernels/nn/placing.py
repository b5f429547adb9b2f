"""Where each tensor of a save goes in a model: checked as a whole, then done as a whole.

`fit` reads and changes nothing; `commit` prepares every value and every layer beside the model and
hangs them in last, step by step backwards again if one of these steps fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maestro_kernels.nn.conv import LoDConv
from maestro_kernels.nn.kinds import FACTORISED
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.nn.linear import LoDLinear
from maestro_kernels.nn.pivoted import PivotedLinear
from maestro_kernels.nn.saved_file import TENSORS
from maestro_kernels.nn.structure import (
    LayerRecord,
    Slot,
    Structure,
    is_conv1d,
    linear_like,
    plain,
    slots,
)
from maestro_kernels.nn.swapping import find_slots
from maestro_kernels.problem import DTYPES


@dataclass(frozen=True)
class Placement:
    """What a load will change.

    Attributes:
        layers: module of the model -> the factorised layer that takes its place, not filled yet.
        slots: where each tensor goes, by name; in a new layer or in the model.
        sources: name -> the name under which its tensor is stored.
    """

    layers: dict[nn.Module, nn.Module]
    slots: dict[str, Slot]
    sources: dict[str, str]


@dataclass(frozen=True)
class Where:
    """How errors begin: the function and what is wrong.

    Attributes:
        model: about the model that does not fit.
        tensors: about the file.
    """

    model: str
    tensors: str


def fit(
    fn: str,
    source: Path,
    structure: Structure,
    tensors: Mapping[str, Tensor],
    model: nn.Module,
) -> Placement:
    """Find the place of everything that was saved.

    Args:
        fn: the function, for errors.
        source: the folder, for errors.
        structure: of the save.
        tensors: of the save; few values are read.
        model: with dense or factorised layers where the save has factorised ones.

    Raises:
        ValueError: the save does not hold together, or does not fit the model.
    """
    _check_ties(fn, structure, tensors)
    at = Where(f"{fn}: dense_model", f"{fn}: {TENSORS}")
    sources = {key: key for key in tensors} | structure.ties
    modules = {plain(path): m for path, m in model.named_modules(remove_duplicate=False)}
    layers: dict[nn.Module, nn.Module] = {}
    first: dict[nn.Module, str] = {}
    places: dict[str, Slot] = {}
    for name, record in structure.layers.items():
        if name not in modules:
            raise ValueError(
                f"{fn}: dense_model: expected a layer {name!r} as in {str(source)!r}, got none"
            )
        old, keys = modules[name], {part: _join(name, part) for part in record.tensors}
        found = {part: _stored(fn, key, sources, tensors) for part, key in keys.items()}
        if old in layers:
            _check_shared(fn, (first[old], name), record, structure, sources)
        else:
            layers[old] = build_layer(at, name, record, old, found)
            layers[old].train(old.training)
            first[old] = name
        for part, key in keys.items():
            places[key] = Slot(layers[old], part, getattr(layers[old], part), True)
    replaced = set(structure.layers)
    for name in structure.linears:
        old = modules.get(name)
        if old is not None and is_conv1d(old):
            replaced.add(name)
            new = layers.setdefault(old, linear_like(old))
            places |= {_join(name, k): Slot(new, k, p, True) for k, p in new.named_parameters()}
    for key, slot in slots(model).items():
        if not any(name in replaced for name in _ancestors(key)):
            places[key] = slot
    wanted = _wanted(fn, source, structure, places, sources, tensors)
    _check_meta(fn, model, places, wanted, layers)
    return Placement(layers, {key: places[key] for key in wanted}, sources)


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _ancestors(key: str) -> Iterator[str]:
    """The names of the modules around a tensor, the model's own included."""
    while key:
        key = key.rpartition(".")[0]
        yield key


def _check_ties(fn: str, structure: Structure, tensors: Mapping[str, Tensor]) -> None:
    for alias, key in structure.ties.items():
        if key not in tensors or alias in tensors:
            raise ValueError(
                f"{fn}: structure: expected {alias!r} to be tied to a stored tensor, got {key!r}"
            )
    for key in structure.buffers:
        if key not in tensors and key not in structure.ties:
            raise ValueError(f"{fn}: structure: expected a stored buffer {key!r}, got none")


def _stored(fn: str, key: str, sources: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Tensor:
    if key not in sources:
        raise ValueError(f"{fn}: {TENSORS}: expected {key!r}, got no such tensor")
    return tensors[sources[key]]


def _check_shared(
    fn: str,
    names: tuple[str, str],
    record: LayerRecord,
    structure: Structure,
    sources: Mapping[str, str],
) -> None:
    """Two names of one module in the model must be one layer in the save too."""
    first, second = names
    same = structure.layers[first] == record and all(
        sources[_join(first, part)] == sources.get(_join(second, part)) for part in record.tensors
    )
    if not same:
        raise ValueError(
            f"{fn}: dense_model: expected two layers at {first!r} and {second!r} as saved, got one"
        )


def build_layer(
    at: Where, name: str, record: LayerRecord, old: nn.Module, found: Mapping[str, Tensor]
) -> LoDLayer | PivotedLinear:
    """The factorised layer for one place, on the meta device, at its rank.

    Args:
        at: where errors say that something is.
        name: of the layer.
        record: what the save says of it.
        old: the module in whose place it comes.
        found: its tensors by part; of active_rank and order the values are read.

    Raises:
        ValueError: the tensors do not fit the record, each other or the module.
    """
    u, v = found["u"], found["v"]
    dtypes = {part: found[part].dtype for part in ("u", "v", *["bias"] * record.bias)}
    if u.dtype not in DTYPES or len(set(dtypes.values())) > 1:
        raise ValueError(
            f"{at.tensors}: expected one dtype of {_names(DTYPES)} for u, v and bias of "
            f"{name!r}, got {_names(dtypes.values())}"
        )
    if u.dim() != 2 or u.shape[1] != record.max_rank:
        raise ValueError(
            f"{at.tensors}: expected u of {name!r} with shape (N, {record.max_rank}), "
            f"got {tuple(u.shape)}"
        )
    kind: Any = FACTORISED[record.kind]
    pivoted, conv = kind is PivotedLinear, issubclass(kind, LoDConv)
    N = u.shape[0] + (record.max_rank if pivoted else 0)
    u, v, bias = (
        torch.empty(shape, dtype=u.dtype, device="meta") for shape in (u.shape, v.shape, (N,))
    )
    given = bias if record.bias else None
    layer: LoDLayer | PivotedLinear
    if conv and not isinstance(old, kind | kind.dense):
        raise ValueError(
            f"{at.model}: expected a {kind.dims}-d convolution at {name!r}, got "
            f"{type(old).__name__}"
        )
    if not conv:
        _check_size(at, name, old, (N, v.shape[-1] if v.dim() else 0))
    try:
        if conv:
            layer = kind.from_factors(old, u, v, given)
        elif pivoted:
            order = torch.empty(N, dtype=torch.int32, device="meta")
            layer = PivotedLinear(u, v, order, given, record.activation)
        else:
            layer = LoDLinear.from_factors(u, v, given, record.activation)
    except ValueError as error:
        raise ValueError(
            f"{at.model}: expected a layer that fits the saved factors at {name!r}, got "
            f"{type(old).__name__} ({error})"
        ) from None
    if isinstance(layer, LoDLayer):
        _check_rank(at, name, record, found["active_rank"])
        layer.rank = record.rank
    else:
        _check_order(at, name, found["order"], N)
    for parameter in layer.parameters():
        parameter.requires_grad_(_is_trained(old))
    return layer


def _names(dtypes: Any) -> str:
    return ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))


def _is_trained(old: nn.Module) -> bool:
    """Whether the weight of the layer that is replaced wants gradients."""
    parameters = list(old.parameters())
    return not parameters or any(parameter.requires_grad for parameter in parameters)


def _check_size(at: Where, name: str, old: nn.Module, saved: tuple[int, int]) -> None:
    expected = _linear_size(old)
    if expected != saved:
        raise ValueError(
            f"{at.model}: expected a linear layer of {saved[0]} x {saved[1]} at {name!r}, "
            f"got {type(old).__name__}" + (f" of {expected[0]} x {expected[1]}" if expected else "")
        )


def _linear_size(module: nn.Module) -> tuple[int, int] | None:
    """(N, K) of a dense or factorised linear layer, also Hugging Face's Conv1D."""
    if isinstance(module, nn.Linear | LoDLinear | PivotedLinear):
        return module.out_features, module.in_features
    if is_conv1d(module):
        weight = module._parameters["weight"]
        assert weight is not None
        return weight.shape[1], weight.shape[0]
    return None


def _check_rank(at: Where, name: str, record: LayerRecord, saved: Tensor) -> None:
    """The rank is saved twice; a save that contradicts itself is damaged."""
    if saved.dtype is not torch.int32 or saved.dim() or int(saved) != record.rank:
        raise ValueError(
            f"{at.tensors}: expected the rank {record.rank} of {name!r} as its active_rank, "
            f"got {saved.dtype} {tuple(saved.shape)}" + ("" if saved.dim() else f" {saved.item()}")
        )


def _check_order(at: Where, name: str, order: Tensor, size: int) -> None:
    expected = torch.arange(size, dtype=torch.int32, device="cpu")
    if order.dtype is not torch.int32 or not torch.equal(order.cpu().sort().values, expected):
        raise ValueError(
            f"{at.tensors}: expected a permutation of 0..{size - 1} in int32 as the order of "
            f"{name!r}, got {order.dtype} {tuple(order.shape)}"
        )


def _wanted(
    fn: str,
    source: Path,
    structure: Structure,
    places: Mapping[str, Slot],
    sources: Mapping[str, str],
    tensors: Mapping[str, Tensor],
) -> list[str]:
    """The names to fill, after a comparison of what is saved with what the model will hold."""
    left_out = set(structure.buffers)
    saved = sources.keys() - left_out
    expected = {key for key, slot in places.items() if slot.persistent}
    for key in sorted(expected | saved):
        if key not in saved:
            shape = tuple(places[key].tensor.shape)
            raise ValueError(f"{fn}: {TENSORS}: expected {key!r} {shape}, got no such tensor")
        if key not in expected:
            raise ValueError(
                f"{fn}: dense_model: expected a place for {key!r} of {str(source)!r}, got none"
            )
    # A buffer that is not in the state_dict is the constructor's business, where that has run.
    wanted = [key for key in places if key in expected]
    wanted += [
        key
        for key, slot in places.items()
        if key in left_out and not slot.persistent and slot.tensor.is_meta
    ]
    for key in sorted(wanted):
        _check_like(fn, key, places[key].tensor, tensors[sources[key]])
    return wanted


def _check_like(fn: str, key: str, own: Tensor, saved: Tensor) -> None:
    if nn.parameter.is_lazy(own):
        raise ValueError(f"{fn}: dense_model: expected a shape for {key!r}, got a lazy tensor")
    if own.shape != saved.shape:
        raise ValueError(
            f"{fn}: dense_model: expected {key!r} of shape {tuple(saved.shape)} as saved, "
            f"got {tuple(own.shape)}"
        )
    # Precision may differ, the saved one is taken; numbers of another kind are another model's.
    floating = own.is_floating_point() and saved.is_floating_point()
    if not floating and not (own.is_complex() and saved.is_complex()) and own.dtype != saved.dtype:
        raise ValueError(
            f"{fn}: dense_model: expected {key!r} of dtype {saved.dtype} as saved, got {own.dtype}"
        )


def _check_meta(
    fn: str,
    model: nn.Module,
    places: Mapping[str, Slot],
    wanted: list[str],
    layers: Mapping[nn.Module, nn.Module],
) -> None:
    """Refuse a model of which something would stay on the meta device."""
    filled = set(wanted)
    for key, slot in places.items():
        if key not in filled and slot.tensor.is_meta:
            raise ValueError(
                f"{fn}: dense_model: expected a value for the buffer {key!r}, which is not saved, "
                "got the meta device"
            )
    known = {id(slot.tensor) for key, slot in places.items() if key in filled}
    for path, module in model.named_modules():
        # A hook before the call may compute such a tensor, as that of weight_norm does.
        if module in layers or module._forward_pre_hooks:
            continue
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta and id(value) not in known:
                raise ValueError(
                    f"{fn}: dense_model: expected a value for {_join(plain(path), name)!r}, which "
                    "is neither parameter nor buffer, got the meta device"
                )


def check_compiled(fn: str, placement: Placement, model: nn.Module) -> None:
    """Refuse to replace what torch.compile wraps: the wrapper would go on calling the old layer."""
    for path, module in model.named_modules():
        inner = module._modules.get("_orig_mod")
        if inner is not None and inner in placement.layers:
            raise ValueError(
                f"{fn}: dense_model: expected a layer that is not compiled by itself at "
                f"{plain(path)!r}, got a compiled {type(inner).__name__}; compile it after loading"
            )


def commit(placement: Placement, tensors: Mapping[str, Tensor], model: nn.Module) -> nn.Module:
    """Fill the new layers and hang everything in; the model is as before if anything fails."""
    devices = {new: _device(old) for old, new in placement.layers.items()}
    made: dict[tuple[str, torch.device], Tensor] = {}
    parameters: dict[tuple[str, torch.device], nn.Parameter] = {}
    changes: list[tuple[nn.Module, str, Any]] = []
    for key, slot in placement.slots.items():
        device = devices.get(slot.module, slot.tensor.device)
        source = placement.sources[key]
        where = (source, torch.device("cpu") if device.type == "meta" else device)
        if where not in made:
            made[where] = tensors[source].to(where[1])
        value = made[where]
        if isinstance(slot.tensor, nn.Parameter):
            # One object for all its names: that is what a tie is.
            if where not in parameters:
                parameters[where] = nn.Parameter(value, requires_grad=slot.tensor.requires_grad)
            value = parameters[where]
        if slot.module in devices:
            setattr(slot.module, slot.name, value)
        else:
            changes.append((slot.module, slot.name, value))
            # Some keep a buffer under a second, unregistered name.
            again = [name for name, held in vars(slot.module).items() if held is slot.tensor]
            changes += [(slot.module, name, value) for name in again]
    if model in placement.layers:
        return placement.layers[model]
    places = find_slots(model)
    for old, new in placement.layers.items():
        changes += [(parent, key, new) for parent, key in places[id(old)]]
    _change(changes)
    return model


def _device(old: nn.Module) -> torch.device:
    tensor = next(old.parameters(), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _change(changes: list[tuple[nn.Module, str, Any]]) -> None:
    """Set attributes; all of them, or none."""
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    try:
        # Not into the dictionaries of the module: some, like nn.LSTM, follow what is set.
        for module, name, value in changes:
            setattr(module, name, value)
    except BaseException:
        for module, name, value in before:
            setattr(module, name, value)
        raise
