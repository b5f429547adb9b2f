"""What config.json and every tensor file of a saved transformers model say of its layers.

Knows models and JSON, no files and no transformers.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from maestro_kernels.nn.adapted import Adapted
from maestro_kernels.nn.grouping import groups
from maestro_kernels.nn.structure import (
    HUB_VERSION,
    Structure,
    describe,
    linears,
    opened_names,
    parse,
    slots,
)

# The name under which transformers finds our quantizer.
METHOD = "maestro_kernels"


@dataclass(frozen=True)
class Record:
    """One save of a transformers model.

    Attributes:
        structure: factorised layers, ties among their parameters, groups; names as in the model.
        save: another one for every save, the same in all of its files.
        dtype: of the model, such as "bfloat16"; what is saved in another one keeps that.
        stored: layer -> its name in the files, where transformers saves it under an older name.
    """

    structure: Structure
    save: str
    dtype: str
    stored: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The quantization_config of a config.json, as `parse_record` reads it."""
        rest = {"save": self.save, "dtype": self.dtype, "stored": self.stored}
        return {"quant_method": METHOD, **json.loads(self.structure.to_json()), **rest}


def record_of(fn: str, model: nn.Module, dtype: str, stored: dict[str, str]) -> Record:
    """The record of a model that is about to be saved.

    Raises:
        ValueError: a layer that cannot be built again from its factors.
    """
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            raise ValueError(
                f"{fn}: model: expected layers that the architecture has, got {name!r} with an "
                "adapter beside it; save the model without it and the adapter with PEFT, or "
                "import it with adapter='merge'"
            )
    layers = describe(fn, model)
    ties, grouped = _ties(model, layers), bool(groups(model))
    open_ones = opened_names(model)
    structure = Structure(layers, ties, [], grouped, HUB_VERSION, linears(model), open_ones)
    return Record(structure, secrets.token_hex(16), dtype, stored)


def _ties(model: nn.Module, layers: Mapping[str, object]) -> dict[str, str]:
    """Name -> the earlier name of the same parameter, where a factorised layer has part in it.

    All others are transformers' business, which knows what its architectures tie.
    """
    found = slots(model)
    ties: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for key, slot in found.items():
        if not isinstance(slot.tensor, nn.Parameter) or not slot.tensor.numel():
            continue
        other = first.setdefault(_place(slot.tensor), key)
        if other != key and any(name.rpartition(".")[0] in layers for name in (key, other)):
            ties[key] = other
    return ties


def _place(tensor: Tensor) -> tuple[object, ...]:
    if tensor.is_meta:
        return (id(tensor),)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def method_of(config: object) -> object | None:
    """The quant_method that the JSON of a config.json names."""
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return found.get("quant_method") if isinstance(found, dict) else None


def parse_record(fn: str, where: str, found: Mapping[str, Any]) -> Record:
    """A record from its JSON object.

    Raises:
        ValueError: anything that `Record.to_dict` does not write.
    """
    structure = parse(fn, where, json.dumps(dict(found)), HUB_VERSION)
    for key in ("save", "dtype"):
        if not isinstance(found.get(key), str):
            raise ValueError(f"{fn}: {where}: expected a text as {key!r}, got {found.get(key)!r}")
    stored = found.get("stored")
    if not isinstance(stored, dict) or not all(isinstance(v, str) for v in stored.values()):
        raise ValueError(f"{fn}: {where}: expected names as 'stored', got {stored!r}")
    return Record(structure, found["save"], found["dtype"], stored)
