"""import_factors: layers out of factors that other people's programs made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn

from maestro_kernels.nn.candidates import Candidate, find_candidates
from maestro_kernels.nn.importing import adapters
from maestro_kernels.nn.importing.architecture import built
from maestro_kernels.nn.importing.naming import (
    InSequence,
    Maker,
    Naming,
    Place,
    check_container,
    maker,
)
from maestro_kernels.nn.importing.pairs import FN as _FN
from maestro_kernels.nn.importing.pairs import Pair, address, checked, layers
from maestro_kernels.nn.importing.sources import Source, read
from maestro_kernels.nn.swapping import swap_layers

# Buffers that transformers once saved, and SVD-LLM still does.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|attn\.(masked_)?bias)$")


def import_factors(
    source: nn.Module | Mapping[str, Tensor] | str | PathLike[str],
    dense_model: nn.Module | None = None,
    *,
    format: str,
    pattern: tuple[str, str] | None = None,
    adapter: str = "merge",
) -> nn.Module:
    """A model with LoDLinear layers, y = x vᵀ uᵀ + bias, of factors that another program made.

    | format | first and second factor of the layer `q_proj` |
    |---|---|
    | "svd_llm" | linear layers `q_v_proj` and `q_u_proj` beside each other |
    | "asvd" | linear layers `q_proj.BLinear` and `q_proj.ALinear` |
    | "sequential" | `q_proj` is nn.Sequential of two linear layers |
    | "basis_sharing" | `q_basis.3`, shared by several layers, and `q_proj` of layer 3 |
    | "pattern" | tensors named by `pattern`, and `q_proj.bias` |
    | "peft" | a LoRA adapter of PEFT, that is added to the weight of `dense_model` |

    A bias b₁ between the factors is folded into that of the layer, u · b₁ + b₂. A pair with more
    components than min(N, K) becomes the dense layer of its product, which is smaller. Shared bases
    stay shared: one parameter in several layers.

    Args:
        source: a folder or a file of tensors (safetensors, or torch's without other objects), a
            state dict, or a model that has the factors.
        dense_model: the ordinary architecture, changed in place: it takes the factors and every
            other tensor of the source, and keeps its device, its dtypes and what the source has
            not. None builds the architecture of the folder's config.json, or, where the source is a
            model, puts the layers into that model.
        format: as above.
        pattern: names of u (N, R) and of v (R, K), such as ("{name}.B", "{name}.A"); `{name}` is
            the layer's.
        adapter: of "peft": "merge" adds it to the weights, rounded once (or to the factors of a
            LoDLinear, as new leading components), "beside" keeps it as factors beside the layer.

    Returns:
        The model. Save it with `save_pretrained`.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an unknown format, no factors, one without the other, inner sizes that disagree,
            something between two factors, tensors that the model has no place for, or (without
            `dense_model`) a model of which tensors are missing. The model is then as it was.
        NotImplementedError: an adapter that is more than LoRA.
    """
    if dense_model is not None and not isinstance(dense_model, nn.Module):
        raise TypeError(
            f"{_FN}: dense_model: expected an nn.Module, got {type(dense_model).__name__}"
        )
    if format == "peft":
        return adapters.add(_FN, source, dense_model, adapter)
    naming = maker(_FN, format, pattern)
    if adapter != "merge":
        raise ValueError(f"{_FN}: adapter: expected 'merge' for format {format!r}, got {adapter!r}")
    found = read(_FN, source)
    if dense_model is None and found.model is not None:
        return _inside(found.model, naming)
    whole = dense_model is None
    model = built(_FN, found) if dense_model is None else dense_model
    return _into(model, found, naming, whole)


# --- into a dense model ----------------------------------------------------------------------


def _into(model: nn.Module, found: Source, make: Maker, whole: bool) -> nn.Module:
    keys = [*found.tensors, *(key.removesuffix(".weight") for key in found.tensors)]
    naming = make(keys, found.config)
    candidates = find_candidates(_FN, model)
    pairs: dict[str, Pair] = {}
    used: set[str] = set()
    for name, candidate in candidates.items():
        if candidate.kind in ("linear", "hf_conv1d"):
            pair = _pair(found, naming, name, candidate, used)
            if pair is not None:
                pairs[name] = pair
    if not pairs:
        some = next((n for n, c in candidates.items() if c.kind == "linear"), "name")
        place = naming.of_layer(some)
        raise ValueError(
            f"{_FN}: source: expected factors such as {place.u!r} and {place.v!r}, got none, but "
            f"{_some(found.tensors)}"
        )
    addresses = {address(found.tensors[key]) for key in used}
    rest = {
        key: value
        for key, value in found.tensors.items()
        if key not in used and address(value) not in addresses and not naming.is_factor(key)
    }
    _check_rest(model, rest, pairs, whole)
    modules = dict(model.named_modules())
    made = layers({name: (pair, modules[name]) for name, pair in pairs.items()})
    model = swap_layers(model, made, inplace=True)
    model.load_state_dict(rest, strict=False)
    return model


def _pair(
    found: Source, naming: Naming, name: str, candidate: Candidate, used: set[str]
) -> Pair | None:
    """The factors of one layer; None where the source has a dense one, or none."""
    place = naming.of_layer(name)
    bias = naming.bias(place)
    keys = {part: _key(found, name) for part, name in (("u", place.u), ("v", place.v))}
    u, v = keys["u"], keys["v"]
    if v is None and (u is None or place.u == place.layer):
        return None
    if u is None or v is None:
        missing, other = (place.u, v) if u is None else (place.v, u)
        raise ValueError(
            f"{_FN}: source: expected both factors of {place.layer!r}, got {other!r} without "
            f"{missing!r}{_between(found, place)}"
        )
    if candidate.reason is not None:
        raise ValueError(
            f"{_FN}: dense_model: expected a layer {place.layer!r} that can be factorised, but "
            f"{candidate.reason}"
        )
    first, second = (found.tensors.get(key) for key in (f"{place.v}.bias", bias))
    used |= {u, v, f"{place.v}.bias", bias} & found.tensors.keys()
    return checked(
        Pair(place.layer, found.tensors[u], found.tensors[v], first, second),
        (candidate.N, candidate.K),
    )


def _key(found: Source, name: str) -> str | None:
    return next((key for key in (f"{name}.weight", name) if key in found.tensors), None)


def _between(found: Source, place: Place) -> str:
    """A word on other numbers in a Sequential: what is between the layers has no tensors."""
    prefix = f"{place.layer}."
    others = {
        k.removeprefix(prefix).partition(".")[0] for k in found.tensors if k.startswith(prefix)
    }
    if place.u.endswith(".1") and any(o.isdigit() and int(o) > 1 for o in others):
        numbers = ", ".join(sorted(others))
        return f", but modules {numbers}: an activation or the like lies between them"
    return ""


def _check_rest(
    model: nn.Module, rest: dict[str, Tensor], pairs: Mapping[str, Pair], whole: bool
) -> None:
    """Raise ValueError unless the model has a place for all else and, if `whole`, lacks nothing.

    What models compute by themselves is dropped from `rest`.
    """
    state = model.state_dict(keep_vars=True)
    for name in pairs:
        for part in ("weight", "bias"):
            state.pop(f"{name}.{part}" if name else part, None)
    for key in [key for key in rest if key not in state and _COMPUTED.search(key)]:
        del rest[key]
    unknown = [key for key in rest if key not in state]
    if unknown:
        raise ValueError(
            f"{_FN}: source: expected tensors that the {type(model).__name__} has a place for, got "
            f"{_some(unknown)}"
        )
    for key, value in rest.items():
        if value.shape != state[key].shape:
            raise ValueError(
                f"{_FN}: source: expected {key!r} of shape {tuple(state[key].shape)}, "
                f"got {tuple(value.shape)}"
            )
    # Files keep one of several names of a tied parameter.
    known = {id(state[key]) for key in rest}
    missing = [key for key, value in state.items() if id(value) not in known]
    if whole and missing:
        raise ValueError(
            f"{_FN}: source: expected every tensor of a {type(model).__name__}, got none for "
            f"{_some(missing)}; pass a model that has them as dense_model"
        )


# --- inside a model that has the factors -----------------------------------------------------


def _inside(model: nn.Module, make: Maker) -> nn.Module:
    modules = dict(model.named_modules(remove_duplicate=False))
    linears = {n: m for n, m in modules.items() if isinstance(m, nn.Linear)}
    config: Any = getattr(model, "config", None)
    naming = make(linears, config.to_dict() if hasattr(config, "to_dict") else {})
    found: dict[str, tuple[Pair, nn.Module]] = {}
    gone: dict[nn.Module, nn.Module] = {}
    for name, second in linears.items():
        place = naming.of_second(name)
        if place is None or _is_other_sequence(naming, modules, place):
            continue
        first = modules.get(place.v)
        if not isinstance(first, nn.Linear):
            raise ValueError(
                f"{_FN}: source: expected both factors of {place.layer!r}, got {name!r} without a "
                f"linear layer {place.v!r}"
            )
        if place.layer == place.u:
            gone.setdefault(first, nn.Identity())
        else:
            check_container(_FN, place, modules[place.layer])
        pair = Pair(place.layer, second.weight, first.weight, first.bias, second.bias)
        found[place.layer] = (checked(pair, None), modules[place.layer])
    if not found:
        seen = [f"{n or 'the model'}: {_kinds(m)}" for n, m in modules.items() if any(m.children())]
        raise ValueError(
            f"{_FN}: source: expected linear layers in pairs, got none in {'; '.join(seen[:4])}"
        )
    return swap_layers(model, {**layers(found), **gone}, inplace=True)


def _is_other_sequence(naming: Naming, modules: Mapping[str, nn.Module], place: Place) -> bool:
    """Whether a second of "sequential" stands in something else, such as linear, ReLU, linear."""
    if not isinstance(naming, InSequence):
        return False
    parent = modules[place.layer]
    kinds = [isinstance(m, nn.Linear) for m in parent.children()]
    return type(parent) is not nn.Sequential or kinds != [True, True]


def _kinds(module: nn.Module) -> str:
    return ", ".join(type(m).__name__ for m in module.children())


def _some(names: Any) -> str:
    shown = [repr(name) for name in list(names)[:4]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
