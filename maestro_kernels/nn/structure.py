"""What a saved model says of itself beside its tensors: layers, ties, buffers, groups.

Knows JSON and names, no files; what it returns has the right types throughout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from maestro_kernels.nn.conv import LoDConv
from maestro_kernels.nn.kinds import FACTORISED
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.nn.opened import Opened
from maestro_kernels.nn.pivoted import PivotedLinear
from maestro_kernels.problem import ACTIVATIONS
from maestro_kernels.version import __version__

_FORMAT, VERSION = "maestro_kernels", 2
# Of the folders of transformers models: the structure beside what Hugging Face writes.
HUB_VERSION = 3


@dataclass(frozen=True)
class LayerRecord:
    """One factorised layer.

    Attributes:
        kind: of `FACTORISED`.
        max_rank: R.
        rank: active rank.
        bias: whether it has one.
        activation: of its own, or None.
    """

    kind: str
    max_rank: int
    rank: int
    bias: bool
    activation: str | None = None

    @property
    def tensors(self) -> set[str]:
        """Names of the layer's tensors."""
        return set(FACTORISED[self.kind].parts) - (set() if self.bias else {"bias"})


@dataclass(frozen=True)
class Structure:
    """Everything beside the tensors.

    Attributes:
        layers: factorised layers by name.
        ties: name -> the name under which the same tensor is stored.
        buffers: stored buffers that state_dict leaves out; a model on the meta device needs them.
        grouped: whether `group` was on.
        version: of the format.
        linears: layers that are an nn.Linear where the architecture has Hugging Face's Conv1D.
        opened: modules that are open: one linear layer for each of their matrices.
    """

    layers: dict[str, LayerRecord]
    ties: dict[str, str]
    buffers: list[str] = field(default_factory=list)
    grouped: bool = False
    version: int = VERSION
    linears: list[str] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """What `parse` reads."""
        head = {"format": _FORMAT, "version": self.version, "package": __version__}
        layers = {name: asdict(record) for name, record in self.layers.items()}
        rest = {"ties": self.ties, "buffers": self.buffers, "grouped": self.grouped}
        rare = {"linears": self.linears, "opened": self.opened}
        rest |= {key: names for key, names in rare.items() if names}
        return json.dumps({**head, "layers": layers, **rest})


@dataclass(frozen=True)
class Slot:
    """Where a tensor hangs in a model.

    Attributes:
        module: its owner.
        name: in the owner.
        tensor: what hangs there.
        persistent: whether state_dict has it.
    """

    module: nn.Module
    name: str
    tensor: Tensor
    persistent: bool


def plain(name: str) -> str:
    """A module's or tensor's name without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def slots(model: nn.Module) -> dict[str, Slot]:
    """Every parameter and buffer by plain name; one that hangs in two places has two."""
    found: dict[str, Slot] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{plain(path)}." if plain(path) else ""
        left_out = module._non_persistent_buffers_set
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[prefix + name] = Slot(module, name, tensor, name not in left_out)
    return found


def describe(fn: str, model: nn.Module) -> dict[str, LayerRecord]:
    """The factorised layers of a model under all their names.

    Raises:
        ValueError: one that cannot be built again from its factors.
    """
    found = {}
    for path, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, LoDLayer | PivotedLinear):
            found[plain(path)] = _record(fn, plain(path), layer)
    return found


def linears(model: nn.Module) -> list[str]:
    """The nn.Linear layers of a model whose code builds Conv1D, which holds the transposed matrix.

    A converted Conv1D that was made dense again is an nn.Linear. Of a square one the shape does not
    tell, so it is written down.
    """
    kinds = {type(module).__module__ for module in model.modules()}
    if not any(hasattr(sys.modules.get(kind), "Conv1D") for kind in kinds):
        return []
    named = model.named_modules(remove_duplicate=False)
    return [plain(path) for path, module in named if type(module) is nn.Linear]


def opened_names(model: nn.Module) -> list[str]:
    """The open modules of a model under all their names."""
    named = model.named_modules(remove_duplicate=False)
    return [plain(path) for path, module in named if isinstance(module, Opened)]


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Hugging Face's Conv1D, found without importing transformers."""
    return type(module).__name__ == "Conv1D" and isinstance(
        module._parameters.get("weight"), Tensor
    )


def linear_like(conv1d: nn.Module) -> nn.Linear:
    """An nn.Linear on the meta device with the sizes of a Conv1D."""
    weight = conv1d.weight
    assert isinstance(weight, Tensor)
    (K, N), bias = weight.shape, conv1d._parameters.get("bias") is not None
    layer = nn.Linear(K, N, bias, "meta", weight.dtype)
    return layer.requires_grad_(weight.requires_grad).train(conv1d.training)


def _record(fn: str, name: str, layer: LoDLayer | PivotedLinear) -> LayerRecord:
    kind = layer.kind
    if type(layer) is not FACTORISED.get(kind):
        hint = ""
        if hasattr(layer, "parametrizations"):
            hint = ", parametrised (torch.nn.utils.parametrize.remove_parametrizations ends that)"
        raise ValueError(
            f"{fn}: model: expected factorised layers of the classes of maestro_kernels, got "
            f"{type(layer).__name__} at {name!r}{hint}"
        )
    bias, activation = layer.bias is not None, getattr(layer, "activation", None)
    record = LayerRecord(kind, layer.max_rank, layer.rank, bias, activation)
    held = (layer._parameters, layer._buffers, layer._modules)
    own = {key for part in held for key, value in part.items() if value is not None}
    if own != record.tensors:
        raise ValueError(
            f"{fn}: model: expected the tensors {sorted(record.tensors)} in the factorised layer "
            f"{name!r}, got {sorted(own)}"
        )
    return record


def version_of(text: str) -> object | None:
    """The version that JSON of save_pretrained names; None for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        return None
    version: object | None = found.get("version")
    return version


def parse(fn: str, where: str, text: str, version: int) -> Structure:
    """A structure from its JSON.

    Args:
        fn: the function, for errors.
        where: the file.
        text: JSON.
        version: of the format, which this place must have.

    Raises:
        ValueError: anything that save_pretrained does not write.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{fn}: {where}: expected JSON, got a damaged file ({error})") from None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ValueError(
            f"{fn}: {where}: expected a file written by save_pretrained, got another file"
        )
    if type(found.get("version")) is not int or found["version"] != version:
        newer = type(found.get("version")) is int and found["version"] > HUB_VERSION
        raise ValueError(
            f"{fn}: {where}: expected format version {version}, got {found.get('version')!r}"
            + ("; a newer maestro_kernels wrote it" if newer else "")
        )
    kinds = {"layers": dict, "ties": dict, "grouped": bool}
    if version > 1:
        kinds["buffers"] = list
    for key, kind in kinds.items():
        if not isinstance(found.get(key), kind):
            raise ValueError(
                f"{fn}: {where}: expected {key!r} to be a {kind.__name__}, "
                f"got {type(found.get(key)).__name__}"
            )
    buffers = found.get("buffers", []) if version > 1 else []
    rare = {key: found.get(key, []) for key in ("linears", "opened")}
    for key, names in rare.items():
        if not isinstance(names, list):
            raise ValueError(
                f"{fn}: {where}: expected {key!r} to be a list, got {type(names).__name__}"
            )
    texts = {"ties": found["ties"].values(), "buffers": buffers, **rare}
    for key, names in texts.items():
        for value in names:
            if not isinstance(value, str):
                raise ValueError(f"{fn}: {where}: expected names in {key!r}, got {value!r}")
    layers = dict(_layers(fn, where, found["layers"]))
    return Structure(layers, found["ties"], buffers, found["grouped"], version, **rare)


def _layers(fn: str, where: str, found: dict[str, Any]) -> Iterator[tuple[str, LayerRecord]]:
    fields = {"kind": str, "max_rank": int, "rank": int, "bias": bool}
    for name, record in found.items():
        # bool is an int to isinstance, and a rank of true no rank.
        if not isinstance(record, dict) or any(
            type(record.get(key)) is not kind for key, kind in fields.items()
        ):
            raise ValueError(
                f"{fn}: {where}: expected {', '.join(fields)} for layer {name!r}, got {record!r}"
            )
        kind, activation = record["kind"], record.get("activation")
        if kind not in FACTORISED:
            kinds = ", ".join(FACTORISED)
            raise ValueError(
                f"{fn}: {where}: expected kind {kinds} for layer {name!r}, got {kind!r}"
            )
        known = (None,) if issubclass(FACTORISED[kind], LoDConv) else ACTIVATIONS
        if activation not in known:
            raise ValueError(
                f"{fn}: {where}: expected an activation of {known} for layer {name!r}, "
                f"got {activation!r}"
            )
        lowest = record["max_rank"] if FACTORISED[kind] is PivotedLinear else 0
        if not lowest <= record["rank"] <= record["max_rank"]:
            raise ValueError(
                f"{fn}: {where}: expected {lowest} <= rank <= max_rank for {name!r}, got max_rank "
                f"{record['max_rank']} and rank {record['rank']}"
            )
        yield (
            name,
            LayerRecord(kind, record["max_rank"], record["rank"], record["bias"], activation),
        )
