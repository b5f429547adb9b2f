"""What ties the files of one saved transformers model together, and finds damage in them.

Every safetensors file has the record of its save in its header, and with it three values of fixed
length that are filled in when all files are written: a digest of the file, a digest of config.json
and the number of tensors of the whole save. Knows files and no transformers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maestro_kernels.files import write_text
from maestro_kernels.nn.hub.record import METHOD, Record, method_of, parse_record
from maestro_kernels.nn.saved_file import BLANK, DIGEST, KEY, digest_of, metadata_of
from maestro_kernels.nn.saved_file import raw_header as read_raw

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
# transformers takes the tensors from the file that a config names so. Our quantizer removes that
# before it is looked at; without us there is no such file: an error instead of random weights.
_WITHOUT_US = "transformers_weights", "import-maestro_kernels-first.safetensors"
_CONFIG_DIGEST, _COUNT = f"{KEY}.config", f"{KEY}.tensors"
_NO_COUNT = "0" * 12
# What another transformers may write differently for the same architecture.
_ASIDE = ("quantization_config", "transformers_version", _WITHOUT_US[0])
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file.

    Attributes:
        path: of the file.
        dtype: None for one that no factorised layer has.
        shape: as it is.
        start: of its bytes in the file.
        end: of its bytes in the file.
    """

    path: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    end: int

    def read(self) -> Tensor:
        """The values, of an int32 tensor."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            content = bytearray(file.read(self.end - self.start))
        return torch.frombuffer(content, dtype=torch.int32).reshape(self.shape)


@dataclass(frozen=True)
class Contents:
    """The files of one save, checked.

    Attributes:
        record: what they say of themselves.
        tensors: name in the files -> where.
    """

    record: Record
    tensors: dict[str, Stored]


# --- writing ---------------------------------------------------------------------------------


def header_of(record: Record) -> dict[str, str]:
    """The metadata of each file of a save, before `seal`."""
    blank = {DIGEST: BLANK, _CONFIG_DIGEST: BLANK, _COUNT: _NO_COUNT}
    return {KEY: json.dumps(record.to_dict()), **blank}


def seal(folder: Path, save: str) -> None:
    """Fill in what could not be known before the last file of a save was written.

    Args:
        folder: where transformers has just written a model.
        save: the save; files of another one are left alone, as is a config.json that is not ours.
    """
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            try:
                header = json.loads(read_raw(file))
            except ValueError:
                continue
        if _save_of(header) == save:
            files[path] = len(header) - 1
    config = read_json(folder / CONFIG)
    if not files or method_of(config) != METHOD:
        return
    key, name = _WITHOUT_US
    # A dense model is one without us, too.
    if config["quantization_config"]["layers"] and config.get(key) != name:
        text = json.dumps({**config, key: name}, indent=2, sort_keys=True)
        write_text(folder / CONFIG, text + "\n")
    values = {_CONFIG_DIGEST: _digest_of_config(config), _COUNT: f"{sum(files.values()):012d}"}
    for path in files:
        _fill(path, values)


def _fill(path: Path, values: Mapping[str, str]) -> None:
    """Put values of the right length and then the digest into the header of a file."""
    with path.open("r+b") as file:
        header = read_raw(file)
        metadata = metadata_of(header)
        for key, value in {**values, DIGEST: BLANK}.items():
            old, new = (f'"{key}":"{v}"'.encode() for v in (metadata[key], value))
            header = header.replace(old, new, 1)
        digest = digest_of(header, file)
        file.seek(8)
        file.write(header.replace(BLANK.encode(), digest.encode(), 1))
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where there is none, or something else."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def _digest_of_config(config: Mapping[str, Any]) -> str:
    """The architecture that a config.json describes, as one value."""
    kept = {key: value for key, value in config.items() if key not in _ASIDE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def forget_the_name(config: Any) -> None:
    """Let transformers look for the tensors where they are."""
    key, name = _WITHOUT_US
    if vars(config).get(key) == name:
        delattr(config, key)


# --- reading ---------------------------------------------------------------------------------


def check(fn: str, files: Sequence[Path], record: Record) -> Contents:
    """Read the headers of a save's files and compare all that can be compared.

    Args:
        fn: the function, for errors.
        files: every file with tensors.
        record: of the config.json beside them.

    Raises:
        ValueError: a file is missing, damaged or of another save, or the config.json is.
        OSError: a file cannot be read.
    """
    headers = {path: _open(fn, path) for path in files}
    ours = {path: _record_text(header) for path, header in headers.items()}
    if any(ours.values()):
        record = _one_record(fn, ours, record, files[0].parent, headers)
        _check_count(fn, headers)
        with ThreadPoolExecutor(min(8, len(headers))) as pool:
            damaged = [path for path, whole in pool.map(_is_whole, headers.items()) if not whole]
        if damaged:
            raise ValueError(_broken(fn, damaged[0], "content that does not match its digest"))
    tensors: dict[str, Stored] = {}
    for path, header in headers.items():
        tensors.update(_tensors(fn, path, header))
    return Contents(record, tensors)


def _open(fn: str, path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            header = json.loads(read_raw(file))
    except FileNotFoundError:
        raise ValueError(
            f"{fn}: {path.name}: expected the file that {INDEX} names, got no such file in "
            f"{str(path.parent)!r}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(_broken(fn, path, str(error))) from None
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise ValueError(_broken(fn, path, "a header that is no JSON object"))
    return header


def _broken(fn: str, path: Path, why: str) -> str:
    return f"{fn}: {path.name}: expected a whole safetensors file, got a damaged one ({why})"


def _record_text(header: Mapping[str, Any]) -> str | None:
    text: str | None = header.get("__metadata__", {}).get(KEY)
    return text


def _save_of(header: Mapping[str, Any]) -> object | None:
    try:
        return json.loads(_record_text(header) or "{}").get("save")
    except (ValueError, AttributeError):
        return None


def _one_record(
    fn: str,
    texts: Mapping[Path, str | None],
    config: Record,
    folder: Path,
    headers: Mapping[Path, Mapping[str, Any]],
) -> Record:
    """The record that all files and config.json agree on."""
    (first, text), *others = texts.items()
    for path, other in others:
        if other != text:
            raise ValueError(
                f"{fn}: {path.name}: expected a file of the save of {first.name}, got one of "
                "another save; was it interrupted, or is one going on?"
            )
    assert text is not None
    try:
        record = parse_record(fn, first.name, json.loads(text))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(_broken(fn, first, str(error))) from None
    if record.save == config.save:
        _check_same(fn, first, record, config)
    else:
        # A save was stopped after the tensors had taken their place: of the same architecture, the
        # config.json of before is as good, and the tensors bring their own record.
        wanted = headers[first]["__metadata__"].get(_CONFIG_DIGEST)
        found = read_json(folder / CONFIG)
        if not isinstance(found, dict) or _digest_of_config(found) != wanted:
            raise ValueError(
                f"{fn}: {CONFIG}: expected the architecture of the tensors in {str(folder)!r}, got "
                "that of another save; was it interrupted, or is one going on?"
            )
    return record


def _check_same(fn: str, path: Path, record: Record, config: Record) -> None:
    if record == config:
        return
    layers, others = record.structure.layers, config.structure.layers
    for name in sorted(layers.keys() | others.keys()):
        if layers.get(name) != others.get(name):
            raise ValueError(
                f"{fn}: {CONFIG}: expected {name!r} as in {path.name}, {layers.get(name)}, "
                f"got {others.get(name)}"
            )
    raise ValueError(
        f"{fn}: {CONFIG}: expected the quantization_config in the header of {path.name}, "
        "got another"
    )


def _check_count(fn: str, headers: Mapping[Path, Mapping[str, Any]]) -> None:
    """Whether the files are all files of the save."""
    path, header = next(iter(headers.items()))
    expected = header["__metadata__"].get(_COUNT, _NO_COUNT)
    found = sum(len(header) - 1 for header in headers.values())
    if expected not in (_NO_COUNT, f"{found:012d}"):
        raise ValueError(
            f"{fn}: {path.parent.name}: expected {expected.lstrip('0')} tensors in the files that "
            f"belong to {path.name}, got {found}"
        )


def _is_whole(item: tuple[Path, Mapping[str, Any]]) -> tuple[Path, bool]:
    """Whether the digest of a file is that of its content; one without a digest is believed."""
    path, header = item
    wanted = header["__metadata__"].get(DIGEST, BLANK)
    if wanted == BLANK:
        return path, True
    with path.open("rb") as file:
        blank = read_raw(file).replace(str(wanted).encode(), BLANK.encode(), 1)
        return path, digest_of(blank, file) == wanted


def _tensors(fn: str, path: Path, header: Mapping[str, Any]) -> Iterable[tuple[str, Stored]]:
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    size = path.stat().st_size
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            first, end = (start + int(offset) for offset in entry["data_offsets"])
            shape = tuple(int(n) for n in entry["shape"])
            dtype = _DTYPES.get(entry["dtype"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(_broken(fn, path, f"an odd entry for {name!r}")) from None
        if not start <= first <= end <= size:
            raise ValueError(_broken(fn, path, f"no values for {name!r}"))
        yield name, Stored(path, dtype, shape, first, end)


def is_ours(path: Path) -> bool:
    """Whether a file has the header of one of our saves."""
    try:
        with path.open("rb") as file:
            return KEY in metadata_of(read_raw(file))
    except (FileNotFoundError, ValueError):
        return False
