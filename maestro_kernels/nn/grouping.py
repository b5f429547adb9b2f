"""group and ungroup: siblings that read one input (q/k/v, gate/up) run as one grouped call.

The layers stay where they are, with their names, parameters and ranks. The first sibling that is
called with a tensor computes the outputs of all of them; the others find theirs waiting when they
are called with the same tensor, under the same conditions. Anything else runs on its own.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maestro_kernels.arguments import check_model
from maestro_kernels.dispatch import is_capturing
from maestro_kernels.functional import lod_linear_grouped
from maestro_kernels.nn.freshness import Made, version
from maestro_kernels.nn.linear import LoDLinear
from maestro_kernels.ops import eager

if TYPE_CHECKING:
    from maestro_kernels.nn.packing import PackedGroup

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


class _Waiting:
    """Outputs of a grouped call that nobody has asked for yet, and what they hold for."""

    __slots__ = ("_around", "_made", "_wants", "outputs", "x")

    def __init__(
        self,
        x: Tensor,
        layers: Sequence[LoDLinear],
        made: Sequence[Made],
        outputs: dict[int, Tensor],
    ) -> None:
        self.x, self.outputs = x, outputs
        self._around, self._made = _circumstances(x), made
        self._wants = [_wants(m) for m in layers] if torch.is_grad_enabled() else None

    def fetch(self, index: int, layer: LoDLinear, rank: int) -> Tensor | None:
        """The output of one layer, if it is there and still what a call would compute."""
        if self._around != _circumstances(self.x) or not self._made[index].same(layer, rank):
            return None
        if self._wants is not None and self._wants[index] != _wants(layer):
            return None
        return self.outputs.pop(index, None)


def _circumstances(x: Tensor) -> Any:
    """What must be as it was for a waiting output to be the right one, beside its layer."""
    grad = torch.is_grad_enabled()
    autocast = eager.autocast_dtype(x) if eager.any_autocast() else None
    return grad, grad and x.requires_grad, autocast, version(x), x.data_ptr()


def _wants(layer: LoDLinear) -> list[bool]:
    return [p is not None and p.requires_grad for p in layer._parameters.values()]


class _Own(threading.local):
    """What waits for one thread, and how often in a row it did so in vain."""

    waiting: _Waiting | None = None
    misses = 0


class LayerGroup:
    """Layers that are expected to be called with the same tensor, one after the other.

    Each thread finds the outputs of its own calls. What cannot be told to be unchanged (factors
    that are parametrised, tensor subclasses, calls that a mode or a transform watches) runs alone.

    Attributes:
        layers: the members, in the order in which the grouped call takes them.
        active: False once siblings were called with different tensors several times in a row.
        packed: set by `prepack`, asked first.
    """

    # Read by every call of every member, mostly from cold caches, where a dictionary is far away.
    __slots__ = ("_made", "_own", "_traced", "active", "layers", "packed")

    def __init__(
        self, layers: list[LoDLinear], active: bool = True, packed: PackedGroup | None = None
    ) -> None:
        self.layers, self.active, self.packed = layers, active, packed
        self._made: tuple[Made, ...] = ()
        self._own = _Own()
        # As `_own.waiting`, while torch.compile looks on: (x, outputs).
        self._traced: tuple[Tensor, dict[int, Tensor]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # The members refer to their group, so they come after it.
        return type(self), ([], self.active, self.packed), self.layers

    def __setstate__(self, layers: list[LoDLinear]) -> None:
        self.layers = layers

    def __call__(self, layer: LoDLinear, x: Tensor, rank: int) -> Tensor | None:
        """The output of one member for x, or None when it has to run on its own."""
        index = self._index(layer)
        if index is None:
            return None
        own = self._own
        waiting = own.waiting
        left = None
        if waiting is not None and waiting.x is x:
            left = waiting.outputs
            y = waiting.fetch(index, layer, rank)
            if y is not None:
                if not left:
                    own.waiting, own.misses = None, 0
                return y
        elif waiting is not None:
            own.misses += 1
            if own.misses >= _MAX_MISSES:
                self.active = False
        own.waiting = None
        if not self.active or x is None or not eager.is_plain(x):
            return None
        if self.packed is not None and self.packed.is_alone(index, x, rank):
            return None
        made = self._current(layer, rank)
        outputs = self._compute(x, made) if made else None
        if outputs is None:
            return None
        # Who had his output already will not come for it again.
        rest = {i: y for i, y in enumerate(outputs) if i != index and (left is None or i in left)}
        if rest:
            own.waiting = _Waiting(x, self.layers, made, rest)
        return outputs[index]

    def _index(self, layer: LoDLinear) -> int | None:
        if not self.active:
            return None
        try:
            return self.layers.index(layer)
        except ValueError:
            return None

    def forget(self) -> None:
        """Let go of what was made of the members' values."""
        self._made = ()
        if self.packed is not None:
            self.packed.forget()

    def adopt(self, made: tuple[Made, ...]) -> None:
        """Take this for the state of the members while it is."""
        self._made = made

    def prepare(self, rows: int) -> None:
        """Have packed forms chosen for M = rows now."""
        made = self._current(None, 0)
        if made and self.packed is not None and self.active:
            self.packed.prepare(self.layers, made, rows)

    def _current(self, layer: LoDLinear | None, rank: int) -> tuple[Made, ...]:
        """The members as they are now, one at this rank; nothing where that cannot be told."""
        layers, made = self.layers, self._made
        ranks = [rank if m is layer else m.forward_rank() for m in layers]
        if made and all(map(Made.same, made, layers, ranks)):
            return made
        first = layers[0].backend
        if not all(Made.can_tell(m) and m.backend == first for m in layers):
            return ()
        self._made = made = tuple(map(Made, layers, ranks))
        return made

    def _compute(self, x: Tensor, made: tuple[Made, ...]) -> Sequence[Tensor] | None:
        """The outputs of all members, or None where they are faster alone."""
        if self.packed is not None:
            outputs = self.packed(self.layers, x, made)
            if outputs is not None:
                return outputs or None
        if is_capturing(x):
            ranks: Sequence[int | Tensor] = [m.active_rank for m in self.layers]
        else:
            ranks = [m.rank for m in made]
        return self._run(x, ranks)

    def _run(self, x: Tensor, ranks: Sequence[int | Tensor]) -> list[Tensor]:
        layers = self.layers
        return lod_linear_grouped(
            x,
            [layer.u for layer in layers],
            [layer.v for layer in layers],
            [layer.bias for layer in layers],
            ranks=ranks,
            activation=[layer.activation for layer in layers],
            backend=layers[0].backend,
        )

    def trace(self, layer: LoDLinear, x: Tensor) -> Tensor | None:
        """`__call__` while torch.compile looks on: nothing changes between siblings there."""
        index = self._index(layer)
        if index is None:
            return None
        traced = self._traced
        if traced is None or traced[0] is not x or index not in traced[1]:
            outputs = self._run(x, [layer.active_rank for layer in self.layers])
            traced = self._traced = (x, dict(enumerate(outputs)))
        y = traced[1].pop(index)
        if not traced[1]:
            self._traced = None
        return y


def group(model: nn.Module) -> nn.Module:
    """Run siblings that read one input as one grouped call; returns the model, changed in place.

    Looks for LoDLinear children of one module under the names that Llama-, BERT-, ViT-, T5- and
    diffusers-style blocks use (q/k/v, gate/up), with equal in_features, dtype and device; blocks
    of cross-attention are left alone. State-dict keys, ranks, parameters and outputs stay the same.
    GPT-2's q/k/v is one layer already. A model with nothing to group comes back unchanged; `groups`
    lists what was found. Outputs that wait for a sibling are held, per thread, until it is called
    or the group is called with another tensor. What changed between two siblings is noticed as far
    as torch tells; `refresh` says where it does not.

    Raises:
        TypeError: model is no module.
    """
    check_model("group", model)
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
    check_model("ungroup", model)
    for shared in distinct_groups(model.modules()):
        if only is None or any(layer in only for layer in shared.layers):
            for layer in shared.layers:
                layer.group = None
    return model


def groups(model: nn.Module) -> list[tuple[str, ...]]:
    """The names of the layers that run together, one tuple per group."""
    names = {id(module): name for name, module in model.named_modules()}
    return [
        tuple(names[id(m)] for m in shared.layers if id(m) in names)
        for shared in distinct_groups(model.modules())
    ]


def distinct_groups(layers: Iterable[nn.Module]) -> list[LayerGroup]:
    """The groups that these modules are in, each once."""
    return list(
        {id(m.group): m.group for m in layers if isinstance(m, LoDLinear) and m.group}.values()
    )


def _fits(first: LoDLinear, other: LoDLinear) -> bool:
    return (
        other.in_features == first.in_features
        and other.u.dtype == first.u.dtype
        and other.u.device == first.u.device
        and other.backend == first.backend
    )
