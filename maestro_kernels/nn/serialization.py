"""save_pretrained and load_pretrained: a model's tensors and structure in a folder of the user's.

A model of transformers becomes what Hugging Face writes (`hub`). Of any other one file has
everything and is replaced in one step. Nothing is pickled, and a model is changed only after all of
a save has been read and checked against it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maestro_kernels.files import check_folder, kind_of, replacing, write_text
from maestro_kernels.nn import saved_file
from maestro_kernels.nn.active_ranks import find_layers
from maestro_kernels.nn.grouping import group, groups
from maestro_kernels.nn.hub import loading, registration, saving
from maestro_kernels.nn.hub.seals import CONFIG
from maestro_kernels.nn.placing import check_compiled, commit, fit
from maestro_kernels.nn.saved_file import COPY, TENSORS
from maestro_kernels.nn.structure import (
    HUB_VERSION,
    Slot,
    Structure,
    describe,
    linears,
    opened_names,
    parse,
    plain,
    slots,
    version_of,
)
from maestro_kernels.nn.swapping import opened

# Another checkpoint in the folder, which a model.safetensors would hide from its readers.
_INDEX = "model.safetensors.index.json"
# See saved_file: of the old format two files have to be of one save.
_ATTEMPTS = 100


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str | None = None,
    tokenizer: Any = None,
    processor: Any = None,
) -> Path:
    """Write a model's tensors, ranks, structure and groups into a folder.

    A model of transformers is written as Hugging Face writes it: `config.json` with our
    quantization_config, `model.safetensors` or shards with an index, `generation_config.json`. Of
    any other model `model.safetensors` holds everything, and `maestro.json` repeats the structure
    for people. Whoever reads meanwhile, and whatever happens, finds the save of before, this one or
    an error that says so. Other files in the folder are left alone.

    Args:
        model: any module; dense models are fine too, and compiled ones.
        directory: a folder; it is made, parents too. A link to one stays a link.
        max_shard_size: of a transformers model, bytes or a text like "5GB"; None for the default of
            transformers. One tensor is never divided.
        tokenizer: saved beside a transformers model, as is
        processor: anything with a save_pretrained of its own.

    Returns:
        The folder.

    Raises:
        TypeError: model is no module, directory no path, tokenizer or processor cannot be saved, or
            a tensor has a dtype that safetensors does not hold.
        ValueError: the directory is no folder, or a file there is somebody else's; a tensor has
            no values (meta device, lazy); the model could not be loaded back: a factorised layer
            with parametrizations, a subclass of one, state beside parameters and buffers; an
            argument that is for transformers models only.
        NotImplementedError: a tensor is no plain dense one, the model is quantised, or transformers
            is too old.
        OSError: the folder cannot be written. The save of before is still there.
    """
    fn = "save_pretrained"
    find_layers(fn, model)
    others = _savable(fn, tokenizer=tokenizer, processor=processor)
    inner = getattr(model, "_orig_mod", model)
    if registration.is_pretrained(inner):
        try:
            folder = check_folder(fn, "directory", directory)
            saving.save(fn, inner, folder, max_shard_size, others)
        except OSError as error:
            raise _named(fn, error) from error
        return folder
    if others or max_shard_size is not None:
        raise ValueError(
            f"{fn}: model: expected a model of transformers for max_shard_size, tokenizer and "
            f"processor, got {type(model).__name__}"
        )
    structure, tensors = _collect(fn, model)
    text = structure.to_json()
    try:
        folder = check_destination(directory)
        place = Path(os.path.realpath(folder))
        # The tensors take their place first, when the inner of the two files is finished.
        with replacing(place / COPY) as copy, replacing(place / TENSORS) as file:
            digest = saved_file.write(fn, file, tensors, text)
            copy.write(_copy(text, digest).encode())
            # A disk that is full should say so before anything is replaced.
            copy.flush()
        _settle_copy(place, digest)
    except OSError as error:
        raise _named(fn, error) from error
    return folder


def _savable(fn: str, **given: Any) -> list[Any]:
    """What was given to be saved beside the model."""
    for name, value in given.items():
        if value is not None and not callable(getattr(value, "save_pretrained", None)):
            raise TypeError(
                f"{fn}: {name}: expected something with a save_pretrained, got "
                f"{type(value).__name__}"
            )
    return [value for value in given.values() if value is not None]


def check_destination(directory: str | os.PathLike[str], *, hub: bool = False) -> Path:
    """The folder, where `save_pretrained` could write to it; asked before long work.

    Args:
        directory: as there.
        hub: whether it will be a model of transformers.

    Raises:
        TypeError, ValueError, OSError: as `save_pretrained`, for the directory.
    """
    fn = "save_pretrained"
    folder = check_folder(fn, "directory", directory)
    place = Path(os.path.realpath(folder))
    check = saving.check_owner if hub else _check_owner
    check(fn, place)
    return folder


def load_pretrained(
    directory: str | os.PathLike[str], dense_model: nn.Module | None = None
) -> nn.Module:
    """Rebuild a saved model, by itself or inside a dense model of the same architecture.

    Args:
        directory: a folder written by `save_pretrained`, or by transformers for a factorised model.
        dense_model: the dense architecture, for instance built from its configuration; also on the
            meta device, which it leaves for the CPU. It is changed in place, keeps its device and
            what of it is trained, and takes the saved dtypes. Compile it afterwards where a layer
            was compiled by itself. None builds the architecture of the folder's config.json, on the
            CPU and in eval mode.

    Returns:
        The model; a new module only where the model itself is a saved factorised layer.

    Raises:
        TypeError: dense_model is no module, or directory no path.
        ValueError: the folder is missing, damaged, from elsewhere or from a newer version, or does
            not fit the model; without a model, it has no config.json of a known architecture.
        NotImplementedError: transformers is too old.
        OSError: the folder cannot be read.

    Whatever is raised, also by an interrupt, the model is then as it was.
    """
    fn = "load_pretrained"
    if dense_model is not None and not isinstance(dense_model, nn.Module):
        raise TypeError(
            f"{fn}: dense_model: expected an nn.Module, got {type(dense_model).__name__}"
        )
    try:
        source = check_folder(fn, "directory", directory)
        if loading.is_hub_save(source):
            inner = getattr(dense_model, "_orig_mod", dense_model)
            made = loading.load(fn, source, inner)
            if dense_model is None:
                return made
            structure, tensors = _collect(fn, made)
        else:
            structure, tensors = _read(fn, source)
            if dense_model is None:
                dense_model = loading.empty(fn, source)
    except OSError as error:
        raise _named(fn, error) from error
    with opened(dense_model, structure.opened) as opening:
        placement = fit(fn, source, structure, tensors, opening.model)
        check_compiled(fn, placement, opening.model)
        model = commit(placement, tensors, opening.model)
        opening.kept.update(opening.closed)
    return group(model) if structure.grouped else model


def _named(fn: str, error: OSError) -> OSError:
    if error.errno is None:
        return error
    return OSError(error.errno, f"{fn}: directory: {error.strerror}", error.filename)


# --- saving ----------------------------------------------------------------------------------


def _collect(fn: str, model: nn.Module) -> tuple[Structure, dict[str, Tensor]]:
    """The structure of a model and its tensors, each storage once."""
    layers = describe(fn, model)
    found = slots(model)
    _check_state(fn, model, found)
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for key, slot in found.items():
        _check_values(fn, key, slot.tensor)
        tensor = slot.tensor.detach()
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            ties[key] = seen[place]
            continue
        seen[place] = key
        tensors[key] = tensor
    for name, record in layers.items():
        key = f"{name}.active_rank" if name else "active_rank"
        if key in tensors:
            # What a captured graph runs at may differ; the layer's rank is what is meant.
            tensors[key] = torch.tensor(record.rank, dtype=torch.int32)
    buffers = [key for key, slot in found.items() if not slot.persistent]
    grouped = bool(groups(model))
    structure = Structure(
        layers, ties, buffers, grouped, linears=linears(model), opened=opened_names(model)
    )
    # What would not load into the very model it comes from is refused now, not later.
    try:
        fit(fn, Path(), structure, tensors, model)
    except ValueError as error:
        raise ValueError(
            f"{fn}: model: expected a model that can be loaded again, got one that cannot: {error}"
        ) from None
    return structure, tensors


def _check_state(fn: str, model: nn.Module, found: Mapping[str, Slot]) -> None:
    """Refuse state that lies in no parameter or buffer: there is no general way to load it."""
    state = {plain(key): value for key, value in model.state_dict(keep_vars=True).items()}
    for key, value in state.items():
        if key not in found or found[key].tensor is not value:
            raise ValueError(
                f"{fn}: model: expected a state_dict of the model's parameters and buffers, got "
                f"{type(value).__name__} at {key!r}, which is none of them"
            )
    for key, slot in found.items():
        if slot.persistent and key not in state:
            raise ValueError(
                f"{fn}: model: expected {key!r} in the model's state_dict, got a state_dict "
                "without it"
            )


def _check_values(fn: str, key: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise ValueError(f"{fn}: model: expected values, got {key!r}, which is lazy")
    if tensor.is_meta:
        raise ValueError(f"{fn}: model: expected values, got {key!r} on the meta device")
    held = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    if type(held) is not Tensor or tensor.layout is not torch.strided or tensor.is_quantized:
        what = type(held).__name__ if type(held) is not Tensor else str(tensor.layout)
        raise NotImplementedError(
            f"{fn}: model: expected plain dense tensors, got {key!r}, a {what}"
            + (" of quantised values" if tensor.is_quantized else "")
        )
    if tensor.numel() and tensor.untyped_storage().nbytes() == 0:
        raise ValueError(f"{fn}: model: expected values, got {key!r}, whose storage is freed")


def _check_owner(fn: str, place: Path) -> None:
    """Refuse a folder in which a file of somebody else's has one of our names."""
    tensors, copy = place / TENSORS, place / COPY
    expected = f"{fn}: directory: expected a folder without"
    for path in (tensors, copy):
        kind = kind_of(path)
        if kind not in (None, "a file"):
            raise ValueError(f"{expected} other things of our names, got {kind} {str(path)!r}")
    if tensors.exists() and saved_file.read_header(tensors) is None:
        raise ValueError(
            f"{expected} a {TENSORS} of another origin, got {str(tensors)!r}, which has no header "
            "of save_pretrained; remove it or choose another folder"
        )
    if copy.exists() and version_of(copy.read_text("utf-8", errors="replace")) is None:
        raise ValueError(
            f"{expected} a {COPY} of another origin, got {str(copy)!r}; remove it or choose "
            "another folder"
        )
    if loading.is_hub_save(place):
        raise ValueError(
            f"{expected} a model of transformers, got {str(place / CONFIG)!r} of one; choose "
            "another folder"
        )
    if (place / _INDEX).exists():
        raise ValueError(
            f"{expected} another checkpoint, got {str(place / _INDEX)!r}, whose readers would "
            f"find our {TENSORS} instead"
        )


def _copy(structure: str, digest: str) -> str:
    """The structure as people read it."""
    return json.dumps({**json.loads(structure), "sha256": digest}, indent=1) + "\n"


def _settle_copy(place: Path, digest: str) -> None:
    """Write the JSON again if another process replaced the tensors before we wrote it.

    Whoever writes it last has looked afterwards, so that in the end it tells of the tensors.
    """
    while True:
        try:
            found = saved_file.read_header(place / TENSORS)
        except FileNotFoundError:
            return
        if found is None or found[1] == digest:
            return
        structure, digest = found
        write_text(place / COPY, _copy(structure, digest))


# --- loading ---------------------------------------------------------------------------------


def _read(fn: str, source: Path) -> tuple[Structure, dict[str, Tensor]]:
    path = source / TENSORS
    kind = kind_of(path)
    header = saved_file.read_header(path) if kind == "a file" else None
    if header is not None and version_of(header[0]) == HUB_VERSION:
        raise ValueError(
            f"{fn}: {CONFIG}: expected the whole one of the transformers model in {str(source)!r}, "
            f"got {'another' if (source / CONFIG).exists() else 'none'}"
        )
    if kind != "a file":
        raise ValueError(
            f"{fn}: directory: expected a folder with {TENSORS}, got {str(source)!r} "
            + ("without it" if kind is None else f"with {kind} of that name")
        )
    try:
        text, tensors = saved_file.read(path)
    except saved_file.OldSave:
        return _read_old(fn, source)
    except ValueError as error:
        raise _damaged(fn, error) from None
    return parse(fn, TENSORS, text, version=2), tensors


def _read_old(fn: str, source: Path) -> tuple[Structure, dict[str, Tensor]]:
    """A save of format 1: the structure in JSON, no digest; both files of the same moment."""
    paths = (source / TENSORS, source / COPY)
    for _ in range(_ATTEMPTS):
        before = [_stamp(path) for path in paths]
        if before[1] is None:
            break
        text = paths[1].read_text(encoding="utf-8", errors="replace")
        if version_of(text) not in (None, 1):
            break
        structure = parse(fn, COPY, text, version=1)
        try:
            with paths[0].open("rb") as file:
                tensors = saved_file.tensors_of(file, paths[0])
        except ValueError as error:
            raise _damaged(fn, error) from None
        if before == [_stamp(path) for path in paths]:
            return structure, tensors
    raise ValueError(
        f"{fn}: {TENSORS}: expected the header that save_pretrained writes, got "
        f"{str(paths[0])!r} without it"
    )


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _damaged(fn: str, error: ValueError) -> ValueError:
    return ValueError(
        f"{fn}: {TENSORS}: expected a whole safetensors file, got a damaged one ({error})"
    )
