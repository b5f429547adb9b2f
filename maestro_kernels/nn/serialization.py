"""save_pretrained and load_pretrained: safetensors for the tensors, JSON for the structure.

Nothing is pickled. A folder is complete or it is not there; a model is changed only after the
whole folder has been read and checked against it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maestro_kernels import __version__
from maestro_kernels.nn.conv import LoDConv2d
from maestro_kernels.nn.convert import swap_layers
from maestro_kernels.nn.grouping import group, groups
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.nn.linear import LoDLinear
from maestro_kernels.nn.pivoted import PivotedLinear
from maestro_kernels.nn.ranks import lod_layers

__all__ = ["load_pretrained", "save_pretrained"]

_STRUCTURE, _TENSORS = "maestro.json", "model.safetensors"
_FORMAT, _VERSION = "maestro_kernels", 1


def save_pretrained(model: nn.Module, directory: str | Path) -> Path:
    """Write a model's tensors, ranks, structure and groups into a folder.

    Args:
        model: any module; dense models are fine too.
        directory: a new or empty folder, or one that an earlier call wrote, which is replaced.

    Returns:
        The folder.

    Raises:
        TypeError: model is no module.
        ValueError: the folder holds something else, or a tensor is on the meta device.
    """
    from safetensors.torch import save_file

    fn = "save_pretrained"
    lod_layers(model, fn)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoDLayer | PivotedLinear)}
    target = Path(directory)
    if target.is_file() or (
        target.is_dir() and any(target.iterdir()) and not (target / _STRUCTURE).is_file()
    ):
        raise ValueError(
            f"{fn}: directory: expected a new or empty folder or one written by save_pretrained, "
            f"got {str(target)!r}, which holds other files"
        )
    tensors, ties = _tensors(fn, model)
    structure = {
        "format": _FORMAT,
        "version": _VERSION,
        "package": __version__,
        "layers": {name: _describe(layer) for name, layer in layers.items()},
        "ties": ties,
        "grouped": bool(groups(model)),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        save_file(tensors, fresh / _TENSORS, metadata={"format": "pt"})
        (fresh / _STRUCTURE).write_text(json.dumps(structure, indent=1) + "\n")
        fresh.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            target.rename(old / "old")
            fresh.rename(target)
            shutil.rmtree(old)
        else:
            fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def load_pretrained(directory: str | Path, dense_model: nn.Module) -> nn.Module:
    """Rebuild a saved model inside a dense model of the same architecture.

    Args:
        directory: a folder written by `save_pretrained`.
        dense_model: the dense architecture, for instance built from its configuration; also on the
            meta device. It is changed in place, keeps its device, and takes the saved dtypes.

    Returns:
        The model; a new module only where the model itself is a saved factorised layer.

    Raises:
        TypeError: dense_model is no module.
        ValueError: the folder is missing, damaged, from elsewhere or from a newer version, or does
            not fit the model. The model is then unchanged.
    """
    fn = "load_pretrained"
    if not isinstance(dense_model, nn.Module):
        raise TypeError(f"{fn}: dense_model: expected an nn.Module, got {_kind(dense_model)}")
    source = Path(directory)
    structure = _read_structure(fn, source)
    tensors = _read_tensors(fn, source)
    modules = dict(dense_model.named_modules())
    swaps: dict[nn.Module, nn.Module] = {}
    for name, record in structure["layers"].items():
        if name not in modules:
            raise ValueError(
                f"{fn}: dense_model: expected a layer {name!r} as in {str(source)!r}, got none"
            )
        old = modules[name]
        new = _layer(fn, name, record, old, tensors)
        new.train(old.training)
        swaps[old] = new
    _check_fit(fn, source, dense_model, swaps, tensors, structure["ties"])
    model = swap_layers(dense_model, swaps, inplace=True)
    places = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    loaded = {
        key: tensor.to(places[key].device) if not places[key].is_meta else tensor
        for key, tensor in tensors.items()
        if key in places
    }
    model.load_state_dict(loaded, strict=False, assign=True)
    for alias, key in structure["ties"].items():
        _tie(model, alias, key)
    return group(model) if structure["grouped"] else model


def _tensors(fn: str, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write, each storage once, and {name: the name it is stored under} for the rest."""
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for key, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{fn}: model: expected tensors only, got {_kind(tensor)} at {key!r}")
        if tensor.is_meta:
            raise ValueError(f"{fn}: model: expected values, got {key!r} on the meta device")
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            ties[key] = seen[place]
            continue
        seen[place] = key
        tensors[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, ties


def _describe(layer: LoDLayer | PivotedLinear) -> dict[str, Any]:
    record: dict[str, Any] = {"max_rank": layer.max_rank, "rank": layer.rank}
    record["bias"] = layer.bias is not None
    if isinstance(layer, LoDLinear | PivotedLinear):
        kind = "lod_linear" if isinstance(layer, LoDLinear) else "pivoted_linear"
        return {"kind": kind, "activation": layer.activation, **record}
    return {"kind": "lod_conv2d", **record}


def _read_structure(fn: str, source: Path) -> dict[str, Any]:
    path = source / _STRUCTURE
    if not path.is_file():
        raise ValueError(
            f"{fn}: directory: expected a folder with {_STRUCTURE}, got {str(source)!r} without it"
        )
    try:
        structure = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{fn}: {_STRUCTURE}: expected JSON, got a damaged file ({error})"
        ) from None
    if not isinstance(structure, dict) or structure.get("format") != _FORMAT:
        raise ValueError(
            f"{fn}: {_STRUCTURE}: expected a file written by save_pretrained, got another file"
        )
    version = structure.get("version")
    if version != _VERSION:
        raise ValueError(
            f"{fn}: {_STRUCTURE}: expected format version {_VERSION}, got {version!r}; "
            "a newer maestro_kernels wrote it"
        )
    kinds = {"layers": dict, "ties": dict, "grouped": bool}
    for key, kind in kinds.items():
        if not isinstance(structure.get(key), kind):
            raise ValueError(
                f"{fn}: {_STRUCTURE}: expected {key!r} to be a {kind.__name__}, "
                f"got {_kind(structure.get(key))}"
            )
    return structure


def _read_tensors(fn: str, source: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = source / _TENSORS
    if not path.is_file():
        raise ValueError(
            f"{fn}: directory: expected {_TENSORS} in {str(source)!r}, got no such file"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{fn}: {_TENSORS}: expected a whole safetensors file, got a damaged one ({error})"
        ) from None


def _layer(
    fn: str, name: str, record: Any, old: nn.Module, tensors: dict[str, Tensor]
) -> LoDLayer | PivotedLinear:
    """The factorised layer for one place, on the meta device; load_state_dict fills it."""
    fields = {"kind": str, "max_rank": int, "rank": int, "bias": bool}
    if not isinstance(record, dict) or any(
        not isinstance(record.get(key), kind) for key, kind in fields.items()
    ):
        raise ValueError(
            f"{fn}: {_STRUCTURE}: expected {', '.join(fields)} for layer {name!r}, got {record!r}"
        )
    prefix = f"{name}." if name else ""
    pivoted = record["kind"] == "pivoted_linear"
    missing = [k for k in ("u", "v", *["order"] * pivoted) if prefix + k not in tensors]
    if missing:
        raise ValueError(f"{fn}: {_TENSORS}: expected {prefix + missing[0]!r}, got no such tensor")
    u, v = (torch.empty_like(tensors[prefix + key], device="meta") for key in ("u", "v"))
    N = u.shape[0] + (v.shape[0] if pivoted else 0)
    bias = torch.empty(N, dtype=u.dtype, device="meta") if record["bias"] else None
    layer: LoDLayer | PivotedLinear
    if pivoted or record["kind"] == "lod_linear":
        expected = _linear_size(old)
        if expected is None or (N, v.shape[-1]) != expected or v.dim() != 2:
            raise ValueError(
                f"{fn}: dense_model: expected a linear layer of {N} x {v.shape[-1]} at {name!r}, "
                f"got {_kind(old)}" + (f" of {expected[0]} x {expected[1]}" if expected else "")
            )
        if pivoted:
            order = _permutation(fn, f"{prefix}order", tensors[f"{prefix}order"], N)
            layer = PivotedLinear(u, v, order, bias, record.get("activation"))
        else:
            layer = LoDLinear.from_factors(u, v, bias, record.get("activation"))
    elif record["kind"] == "lod_conv2d" and isinstance(old, nn.Conv2d | LoDConv2d):
        try:
            layer = LoDConv2d.from_factors(old, u, v, bias)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(
                f"{fn}: dense_model: expected a convolution that fits the saved factors at "
                f"{name!r}, got {old} ({error})"
            ) from None
    else:
        raise ValueError(
            f"{fn}: dense_model: expected a layer for {record['kind']!r} at {name!r}, "
            f"got {_kind(old)}"
        )
    _take_rank(fn, name, record, layer)
    return layer


def _take_rank(fn: str, name: str, record: dict[str, Any], layer: LoDLayer | PivotedLinear) -> None:
    """Set the saved active rank; a pivoted layer has one rank only."""
    lowest = layer.max_rank if isinstance(layer, PivotedLinear) else 0
    if layer.max_rank != record["max_rank"] or not lowest <= record["rank"] <= layer.max_rank:
        raise ValueError(
            f"{fn}: {_STRUCTURE}: expected max_rank {layer.max_rank} and {lowest} <= rank <= "
            f"max_rank for {name!r}, got max_rank {record['max_rank']} and rank {record['rank']}"
        )
    if isinstance(layer, LoDLayer):
        layer.rank = record["rank"]


def _permutation(fn: str, key: str, order: Tensor, size: int) -> Tensor:
    """`order` on the meta device, after a check that it sends outputs to each place once."""
    expected = torch.arange(size, dtype=torch.int32)
    if order.dtype is not torch.int32 or not torch.equal(order.cpu().sort().values, expected):
        raise ValueError(
            f"{fn}: {_TENSORS}: expected a permutation of 0..{size - 1} in int32 as {key!r}, "
            f"got {order.dtype} {tuple(order.shape)}"
        )
    return torch.empty_like(order, device="meta")


def _linear_size(module: nn.Module) -> tuple[int, int] | None:
    """(N, K) of a dense or factorised linear layer, also Hugging Face's Conv1D."""
    if isinstance(module, nn.Linear | LoDLinear | PivotedLinear):
        return module.out_features, module.in_features
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):
        return weight.shape[1], weight.shape[0]
    return None


def _check_fit(
    fn: str,
    source: Path,
    model: nn.Module,
    swaps: dict[nn.Module, nn.Module],
    tensors: dict[str, Tensor],
    ties: dict[str, str],
) -> None:
    """Compare the saved tensors with what the rebuilt model will hold."""
    expected: dict[str, tuple[int, ...]] = {}
    own = model.state_dict(keep_vars=True)
    names = {id(module): name for name, module in model.named_modules()}
    replaced = {names[id(old)]: new for old, new in swaps.items()}
    for key, tensor in own.items():
        if key.rpartition(".")[0] not in replaced:
            expected[key] = tuple(tensor.shape)
    for name, new in replaced.items():
        for key, tensor in new.state_dict().items():
            expected[f"{name}.{key}" if name else key] = tuple(tensor.shape)
    saved = {key: tuple(t.shape) for key, t in tensors.items()}
    for alias, key in ties.items():
        if key not in saved:
            raise ValueError(
                f"{fn}: {_STRUCTURE}: expected a tensor {key!r} for {alias!r}, got none"
            )
        saved[alias] = saved[key]
    for key in sorted(expected.keys() | saved.keys()):
        if key not in saved:
            raise ValueError(
                f"{fn}: {_TENSORS}: expected {key!r} {expected[key]}, got no such tensor"
            )
        if key not in expected:
            raise ValueError(
                f"{fn}: dense_model: expected a place for {key!r} of {str(source)!r}, got none"
            )
        if expected[key] != saved[key]:
            raise ValueError(
                f"{fn}: dense_model: expected {key!r} of shape {saved[key]} as saved, "
                f"got {expected[key]}"
            )
    for key, buffer in model.named_buffers():
        if buffer.is_meta and key not in own:
            raise ValueError(
                f"{fn}: dense_model: expected a value for the buffer {key!r}, which is not saved, "
                "got the meta device"
            )


def _tie(model: nn.Module, alias: str, key: str) -> None:
    """Let two names share one tensor again."""
    alias_path, _, alias_name = alias.rpartition(".")
    path, _, name = key.rpartition(".")
    setattr(model.get_submodule(alias_path), alias_name, getattr(model.get_submodule(path), name))


def _kind(value: object) -> str:
    return type(value).__name__
