"""group and ungroup: siblings that read one input (q/k/v, gate/up) run as one grouped call.

The layers stay where they are, with their names, parameters and ranks. The first sibling that is
called with a tensor computes the outputs of all of them; the others find theirs waiting when they
are called with the same tensor, under the same conditions. Anything else runs on its own.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maestro_kernels.functional import lod_linear_grouped
from maestro_kernels.nn.freshness import version
from maestro_kernels.nn.linear import LoDLinear
from maestro_kernels.ops import eager

if TYPE_CHECKING:
    from maestro_kernels.nn.prepack import PackedGroup

__all__ = ["LayerGroup", "group", "groups", "ungroup"]

# Names that siblings have in transformers, timm and diffusers.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
# In these blocks k and v read another tensor than q.
_CROSS = ("cross", "encdec", "encoder_attn")
# Groups whose outputs are not fetched this often in a row go back to single calls for good.
_MAX_MISSES = 3


class LayerGroup:
    """Layers that are expected to be called with the same tensor, one after the other.

    Attributes:
        layers: the members, in the order in which the grouped call takes them.
        active: False once siblings were called with different tensors several times in a row.
        packed: set by `prepack`, asked first.
    """

    # Read by every call of every member, mostly from cold caches, where a dictionary is far away.
    __slots__ = ("_misses", "_pending", "active", "layers", "packed")

    def __init__(self, layers: list[LoDLinear]) -> None:
        self.layers = layers
        self.active = True
        self.packed: PackedGroup | None = None
        self._misses = 0
        self._pending: _Pending | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerGroup:
        import copy

        twin = LayerGroup([])
        memo[id(self)] = twin
        twin.layers = copy.deepcopy(self.layers, memo)
        twin.active = self.active
        twin.packed = copy.deepcopy(self.packed, memo)
        return twin

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        state = {name: getattr(self, name) for name in self.__slots__}
        return None, {**state, "_misses": 0, "_pending": None}

    def __call__(self, layer: LoDLinear, x: Tensor) -> Tensor | None:
        """The output of one member for x, or None when it has to run on its own."""
        if not self.active:
            return None
        try:
            index = self.layers.index(layer)
        except ValueError:
            return None
        pending = self._pending
        if pending is not None and pending[0] is x and pending[1] == _circumstances(x):
            _, _, states, packed, waiting = pending
            state = states[index]
            if state.same(layer) if packed else state == _state(layer):
                y = waiting.pop(index, None)
                if y is not None:
                    if not waiting:
                        self._pending, self._misses = None, 0
                    return y
        if self.packed is not None and self.packed.prefers_alone(x):
            # Nobody will ask for what the call that chose has left waiting.
            self._pending = None
            return None
        if pending is not None:
            self._misses += 1
            if self._misses >= _MAX_MISSES:
                self.active, self._pending = False, None
                return None
        outputs, states, packed = self._compute(x)
        waiting = dict(enumerate(outputs))
        y = waiting.pop(index)
        self._pending = (x, _circumstances(x), states, packed, waiting)
        return y

    def _compute(self, x: Tensor) -> tuple[list[Tensor], list[Any], bool]:
        """(outputs, the states of the layers that gave them, whether prepack keeps those)."""
        layers = self.layers
        if self.packed is not None:
            found = self.packed(layers, x)
            if found is not None:
                return *found, True
        # Before the call: what changes during it must not be taken for what it was.
        states = [_state(layer) for layer in layers]
        outputs = lod_linear_grouped(
            x,
            [layer.u for layer in layers],
            [layer.v for layer in layers],
            [layer.bias for layer in layers],
            ranks=[layer.call_rank(x) for layer in layers],
            activation=[layer.activation for layer in layers],
            backend=layers[0].backend,
        )
        return outputs, states, False


# x, its circumstances, the state of each layer, whether prepack keeps those states, and the outputs
# that nobody has asked for yet.
_Pending = tuple[Tensor, Any, list[Any], bool, dict[int, Tensor]]


def _circumstances(x: Tensor) -> Any:
    """What must be as it was for a waiting output to be the right one, beside its layer."""
    if torch.compiler.is_compiling():
        return None
    autocast = eager.autocast_dtype(x) if eager.any_autocast() else None
    return torch.is_grad_enabled(), autocast, -1 if x.is_inference() else x._version


def _state(layer: LoDLinear) -> Any:
    """What a layer's output depends on beside x; read on every call."""
    if torch.compiler.is_compiling():
        return None
    tensors = layer._parameters.values() if len(layer._parameters) == 3 else layer.parameters()
    return layer._rank, [(id(t), version(t)) for t in tensors if t is not None]


def group(model: nn.Module) -> nn.Module:
    """Run siblings that read one input as one grouped call; returns the model, changed in place.

    Looks for LoDLinear children of one module under the names that Llama-, BERT-, ViT-, T5- and
    diffusers-style blocks use (q/k/v, gate/up), with equal in_features, dtype and device; blocks
    of cross-attention are left alone. State-dict keys, ranks, parameters and outputs stay the same.
    GPT-2's q/k/v is one layer already. A model with nothing to group comes back unchanged; `groups`
    lists what was found. Outputs that wait for a sibling are held until it is called or the group
    is called with another tensor.

    Raises:
        TypeError: model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"group: model: expected an nn.Module, got {type(model).__name__}")
    for path, parent in model.named_modules():
        where = f"{path}.{type(parent).__name__}".lower()
        if any(mark in where for mark in _CROSS) or getattr(parent, "is_cross_attention", False):
            continue
        for names in SIBLINGS:
            members = [parent._modules.get(name) for name in names]
            layers = [m for m in members if type(m) is LoDLinear and m.group is None]
            for layer in layers[1:]:
                if not _fits(layers[0], layer):
                    break
            else:
                if len(layers) > 1 and len({id(layer) for layer in layers}) == len(layers):
                    shared = LayerGroup(layers)
                    for layer in layers:
                        layer.group = shared
    return model


def ungroup(model: nn.Module, *, only: Collection[nn.Module] | None = None) -> nn.Module:
    """Undo `group`: every layer runs on its own again.

    Args:
        model: any module.
        only: just the groups that one of these layers belongs to.

    Raises:
        TypeError: model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"ungroup: model: expected an nn.Module, got {type(model).__name__}")
    for shared in _shared(model):
        if only is None or any(layer in only for layer in shared.layers):
            for layer in shared.layers:
                layer.group = None
    return model


def groups(model: nn.Module) -> list[tuple[str, ...]]:
    """The names of the layers that run together, one tuple per group."""
    names = {id(module): name for name, module in model.named_modules()}
    return [
        tuple(names[id(m)] for m in shared.layers if id(m) in names) for shared in _shared(model)
    ]


def _shared(model: nn.Module) -> list[LayerGroup]:
    found = {
        id(m.group): m.group
        for m in model.modules()
        if isinstance(m, LoDLinear) and m.group is not None
    }
    return list(found.values())


def _fits(first: LoDLinear, other: LoDLinear) -> bool:
    return (
        other.in_features == first.in_features
        and other.u.dtype == first.u.dtype
        and other.u.device == first.u.device
        and other.backend == first.backend
    )
