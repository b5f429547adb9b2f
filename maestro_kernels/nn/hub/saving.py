"""mk.save_pretrained of a transformers model: transformers writes, we move it in.

What transformers writes is staged in a hidden folder, sealed and brought to disk. Then it is moved
in, in an order after each step of which the folder is one save: files of tensors that nobody reads
yet, the one file that says which tensors are read, the rest, and then what is not read any more.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from maestro_kernels.files import kind_of
from maestro_kernels.folders import move, only_mover, remove, staging, to_disk
from maestro_kernels.nn.hub.record import METHOD, method_of
from maestro_kernels.nn.hub.registration import check_version, described
from maestro_kernels.nn.hub.seals import CONFIG, INDEX, is_ours, read_json, seal
from maestro_kernels.nn.saved_file import COPY, TENSORS
from maestro_kernels.nn.structure import version_of


def save(
    fn: str,
    model: Any,
    folder: Path,
    max_shard_size: int | str | None,
    others: Iterable[Any],
) -> None:
    """Write a transformers model and its tokenizer or processor into a folder.

    Args:
        fn: the function, for errors.
        model: a PreTrainedModel.
        folder: not yet checked.
        max_shard_size: as transformers takes it; None for its default.
        others: what has a save_pretrained of its own.

    Raises:
        ValueError, NotImplementedError, OSError: as `save_pretrained`.
    """
    check_version(fn)
    place = Path(os.path.realpath(folder))
    check_owner(fn, place)
    _check_values(fn, model)
    sizes = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    with staging(place) as stage:
        with described(model) as name, _os_errors(folder):
            model.save_pretrained(stage, **sizes)
        seal(stage, name)
        for other in others:
            other.save_pretrained(stage)
        with only_mover(place):
            old = check_owner(fn, place)
            _use_free_names(stage, place)
            names = to_disk(stage)
            _check_files(fn, stage, place, names, ours=bool(old))
            _move_in(stage, place, names, old)


@contextmanager
def _os_errors(folder: Path) -> Iterator[None]:
    """Let what safetensors says of a disk be an OSError again."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(folder)) from error


def check_owner(fn: str, place: Path) -> set[str]:
    """The files of a save of ours in a folder, as names.

    Raises:
        ValueError: there is a model of somebody else's.
    """
    expected = f"{fn}: directory: expected a folder without"
    for name in (TENSORS, CONFIG, INDEX, COPY):
        kind = kind_of(place / name)
        if kind not in (None, "a file"):
            raise ValueError(
                f"{expected} other things of our names, got {kind} {str(place / name)!r}"
            )
    config, index = read_json(place / CONFIG), read_json(place / INDEX)
    ours = {CONFIG} if method_of(config) == METHOD else set()
    if (place / CONFIG).exists() and not ours:
        raise ValueError(
            f"{expected} another model's {CONFIG}, got {str(place / CONFIG)!r}, whose "
            f"quantization_config is not of {METHOD}; choose another folder"
        )
    shards = _shards_of(index)
    if (place / INDEX).exists():
        ours.add(INDEX)
    strays = {path.name for path in place.glob("model-*-of-*.safetensors") if is_ours(path)}
    for name in sorted({TENSORS} | shards):
        if not (place / name).exists():
            continue
        if not is_ours(place / name):
            raise ValueError(
                f"{expected} a {name} of another origin, got {str(place / name)!r}, which has no "
                "header of save_pretrained; remove it or choose another folder"
            )
        ours.add(name)
    if INDEX in ours and not (shards & ours) and CONFIG not in ours:
        raise ValueError(
            f"{expected} another checkpoint, got {str(place / INDEX)!r}, which names no file of "
            "ours"
        )
    copy = place / COPY
    if copy.exists():
        if version_of(copy.read_text("utf-8", errors="replace")) is None:
            raise ValueError(
                f"{expected} a {COPY} of another origin, got {str(copy)!r}; remove it or choose "
                "another folder"
            )
        ours.add(COPY)
    return ours | strays


def _shards_of(index: object) -> set[str]:
    """The files that an index names, in its own folder."""
    names = index.get("weight_map") if isinstance(index, dict) else None
    values = names.values() if isinstance(names, dict) else ()
    return {name for name in values if isinstance(name, str) and name == os.path.basename(name)}


def _check_values(fn: str, model: nn.Module) -> None:
    """Refuse tensors without values; accelerate knows where those are that it put on a disk."""
    if getattr(model, "hf_device_map", None):
        return
    for key, value in model.state_dict().items():
        if value.is_meta:
            raise ValueError(f"{fn}: model: expected values, got {key!r} on the meta device")


def _use_free_names(stage: Path, place: Path) -> None:
    """Rename shards whose names the folder has already: its readers may be about to open those."""
    index = read_json(stage / INDEX)
    shards = _shards_of(index)
    if not any((place / name).exists() for name in shards):
        return
    tag = os.urandom(4).hex()
    names = {name: name.replace("model-", f"model-{tag}-", 1) for name in shards}
    for name, new in names.items():
        os.replace(stage / name, stage / new)
    index["weight_map"] = {key: names[name] for key, name in index["weight_map"].items()}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (stage / INDEX).write_text(text, encoding="utf-8")


def _check_files(fn: str, stage: Path, place: Path, names: list[str], ours: bool) -> None:
    """In a folder that holds no save of ours, files of our names are the user's."""
    for name in names:
        kind = kind_of(place / name)
        if kind not in (None, "a file") or (
            kind is not None
            and not ours
            and (place / name).read_bytes() != (stage / name).read_bytes()
        ):
            raise ValueError(
                f"{fn}: directory: expected a folder without another {name}, got "
                f"{str(place / name)!r}; remove it or choose another folder"
            )


def _move_in(stage: Path, place: Path, names: list[str], old: set[str]) -> None:
    """Put a staged save in the place of the old one."""
    commit = INDEX if INDEX in names else TENSORS
    shards = _shards_of(read_json(stage / INDEX)) if commit == INDEX else set()
    for name in sorted(shards):
        move(stage, place, name)
    move(stage, place, commit)
    # Readers prefer the one file to the index, whichever is newer.
    other = TENSORS if commit == INDEX else INDEX
    if other in old:
        remove(place / other)
    for name in sorted(set(names) - shards - {commit}):
        move(stage, place, name)
    for name in sorted(old - set(names) - {other}):
        remove(place / name)
