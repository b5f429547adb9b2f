"""The one file of a saved model: safetensors, with the structure and a digest in its header.

Whoever has it open has all of one save. The digest covers every byte of the file, so damage and
mixtures are found before anything is believed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

TENSORS, COPY = "model.safetensors", "maestro.json"
KEY, DIGEST = "maestro_kernels", "maestro_kernels.sha256"
# As long as a digest; its place in the file while the digest is not known, and when it is checked.
BLANK = "0" * 64
# safetensors' own limit.
_LONGEST_HEADER = 100_000_000
_CHUNK = 1 << 24
# A reader that found two saves mixed reads again; it would have to lose this race as often.
_ATTEMPTS = 100


class OldSave(Exception):
    """A file without the header: of a user's, or of a version that kept the structure in JSON."""


def write(fn: str, file: BinaryIO, tensors: Mapping[str, Tensor], structure: str) -> str:
    """Fill an empty file; returns the digest.

    Tensors go through the host's memory one at a time; safetensors' own writer takes all at once,
    and leaves files of its own behind when it is killed.

    Args:
        fn: the function, for errors.
        file: open for writing and seeking.
        tensors: dense, in memory.
        structure: JSON, kept as it is.

    Raises:
        TypeError: a dtype that safetensors does not know; names the tensor.
    """
    # Larger elements first: every tensor is aligned to its own element, as its readers want it.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {
        "__metadata__": {DIGEST: BLANK, "format": "pt", KEY: structure},
    }
    codes: dict[torch.dtype, str] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in codes:
            codes[tensor.dtype] = _code(fn, name, tensor.dtype)
        start, end = end, end + tensor.numel() * tensor.element_size()
        place = {"shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = {"dtype": codes[tensor.dtype], **place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    for part in (len(text).to_bytes(8, "little"), text):
        digest.update(part)
        file.write(part)
    for name in names:
        content = _bytes(tensors[name])
        digest.update(content)
        file.write(content)
    file.seek(8 + text.index(BLANK.encode()))
    file.write(digest.hexdigest().encode())
    return digest.hexdigest()


def _code(fn: str, name: str, dtype: torch.dtype) -> str:
    """What safetensors calls a dtype."""
    from safetensors.torch import save

    try:
        written = save({"x": torch.empty(0, dtype=dtype)})
    except (KeyError, ValueError, RuntimeError):
        raise TypeError(
            f"{fn}: model: expected a dtype that safetensors holds, got {dtype} at {name!r}"
        ) from None
    code: str = json.loads(written[8:])["x"]["dtype"]
    return code


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def read_header(path: Path) -> tuple[str, str] | None:
    """(structure, digest) of a saved file; None for any other file."""
    with path.open("rb") as file:
        try:
            metadata = metadata_of(raw_header(file))
        except ValueError:
            return None
    structure, digest = metadata.get(KEY), metadata.get(DIGEST)
    return (structure, digest) if isinstance(structure, str) and isinstance(digest, str) else None


def read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """(structure, tensors) of one save.

    Raises:
        OldSave: a whole safetensors file without our header.
        OSError: no such file, or it cannot be read.
        ValueError: it is damaged.
    """
    for _ in range(_ATTEMPTS):
        with path.open("rb") as file:
            try:
                return _read(file, path)
            except ValueError:
                # Where a descriptor has no name, the library may have opened a later save.
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    raise
    raise ValueError("a file that does not change while it is read")


def _read(file: BinaryIO, path: Path) -> tuple[str, dict[str, Tensor]]:
    header = raw_header(file)
    metadata = metadata_of(header)
    structure, wanted = metadata.get(KEY), metadata.get(DIGEST)
    if structure is None and wanted is None:
        raise OldSave
    if not isinstance(structure, str) or not isinstance(wanted, str):
        raise ValueError("half of the header of save_pretrained")
    if digest_of(header.replace(wanted.encode(), BLANK.encode(), 1), file) != wanted:
        raise ValueError("content that does not match its digest")
    return structure, tensors_of(file, path)


def digest_of(header: bytes, file: BinaryIO) -> str:
    """The digest of a file with this header, in which BLANK stands for the digest itself.

    Args:
        header: without its length.
        file: open, after the header.
    """
    digest = hashlib.sha256(len(header).to_bytes(8, "little") + header)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def tensors_of(file: BinaryIO, path: Path) -> dict[str, Tensor]:
    """The tensors of an open safetensors file.

    Raises:
        ValueError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    # safe_open opens the file twice, and takes UTF-8 names only; the name of a descriptor is one,
    # and always means the file that was checked.
    name = Path(f"/proc/self/fd/{file.fileno()}")
    try:
        with safe_open(name if name.exists() else path, "pt") as opened:
            # Mapped tensors lie where the file has them, mostly off the 16 bytes that fast kernels
            # want, and vanish with the file; copies do neither.
            return {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(str(error)) from None


def raw_header(file: BinaryIO) -> bytes:
    """The JSON header of a safetensors file, as it stands; the file is then behind it.

    Raises:
        ValueError: there is none.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    return file.read(length)


def metadata_of(header: bytes) -> dict[str, Any]:
    """What a JSON header says beside the tensors.

    Raises:
        ValueError: it is no JSON object.
    """
    try:
        metadata = json.loads(header).get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"a header that is no JSON object: {error}") from None
    if not isinstance(metadata, dict):
        raise ValueError("a header whose __metadata__ is no object")
    return metadata
