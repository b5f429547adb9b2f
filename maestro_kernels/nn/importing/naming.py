"""What other people call the two factors of a layer, format by format.

A layer computes y = (x vᵀ) uᵀ + bias: v (R, K) comes first and u (N, R) second. Of each format this
says where the two are for the layer of a dense model, and for a module of a model that has them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

# The projection whose basis is shared -> the layers that hold its coefficients, by the ends of
# their names: Llama and Mistral, OPT, GPT-2.
_COEFFICIENTS = {
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "o": ("o_proj", "out_proj", "attn.c_proj"),
    "gate": ("gate_proj",),
    "up": ("up_proj", "c_fc", "fc1"),
    "down": ("down_proj", "mlp.c_proj", "fc2"),
    "attn": ("c_attn",),
}


@dataclass(frozen=True)
class Place:
    """Where the factors of one layer are.

    Attributes:
        u: name of the second linear layer, or of the tensor itself.
        v: name of the first.
        layer: the module that both replace; in a dense model the layer of that name.
    """

    u: str
    v: str
    layer: str


class Naming:
    """One format.

    Args:
        keys: names of modules that hold tensors, or of tensors.
        config: of the checkpoint.
    """

    def __init__(self, keys: Collection[str], config: Mapping[str, Any]) -> None:
        self.keys, self.config = set(keys), config

    def of_layer(self, name: str) -> Place:
        """Where the factors of a layer of a dense model would be."""
        raise NotImplementedError

    def of_second(self, name: str) -> Place | None:
        """Where the factors are whose second one this module is, None where it is none."""
        raise NotImplementedError

    def bias(self, place: Place) -> str:
        """The name of what is added at the end."""
        return f"{place.u}.bias"

    def is_factor(self, key: str) -> bool:
        """Whether a tensor is a factor by its name alone, under whatever other name it was used."""
        return False


class SVDLLM(Naming):
    """Siblings `q_v_proj` and `q_u_proj` in the place of `q_proj` (`fc1_v_proj` of `fc1`)."""

    def of_layer(self, name: str) -> Place:  # noqa: D102
        stem = name.removesuffix("_proj")
        return Place(f"{stem}_u_proj", f"{stem}_v_proj", name)

    def of_second(self, name: str) -> Place | None:  # noqa: D102
        if not name.endswith("_u_proj"):
            return None
        # Their forward calls the second on the output of the first, which becomes the identity.
        return Place(name, name.removesuffix("_u_proj") + "_v_proj", name)


class ASVD(Naming):
    """`BLinear` and then `ALinear` in a module in the place of the layer."""

    def of_layer(self, name: str) -> Place:  # noqa: D102
        return Place(_inside(name, "ALinear"), _inside(name, "BLinear"), name)

    def of_second(self, name: str) -> Place | None:  # noqa: D102
        return _from_parts(name, "ALinear", "BLinear")


class InSequence(Naming):
    """`nn.Sequential(first, second)` in the place of the layer."""

    def of_layer(self, name: str) -> Place:  # noqa: D102
        return Place(_inside(name, "1"), _inside(name, "0"), name)

    def of_second(self, name: str) -> Place | None:  # noqa: D102
        return _from_parts(name, "1", "0")


class BasisSharing(Naming):
    """The layer's own name for u, `{projection}_basis.{layer}` around it for v, one for several.

    Files that keep every tensor once have a basis under the name of one layer;
    `{projection}_groups` of the config says who shares it.
    """

    def of_layer(self, name: str) -> Place:  # noqa: D102
        return Place(name, self._basis(name) or _inside(name, "basis"), name)

    def of_second(self, name: str) -> Place | None:  # noqa: D102
        basis = self._basis(name)
        return None if basis is None else Place(name, basis, name)

    def is_factor(self, key: str) -> bool:  # noqa: D102
        return re.search(r"(^|\.)[a-z]+_basis(\.\d+)?\.weight$", key) is not None

    def _basis(self, name: str) -> str | None:
        kind = next((k for k, ends in _COEFFICIENTS.items() if _ends(name, ends)), None)
        number = re.search(r"(.*?)(\w+)\.(\d+)\.", name)
        if kind is None or number is None:
            return None
        outer, index = number[1], int(number[3])
        groups = self.config.get(f"{kind}_groups") or []
        same = next((g for g in groups if index in g), [index])
        parent = name.rpartition(".")[0]
        for other in (index, *same):
            inner = parent.replace(f".{index}.", f".{other}.", 1)
            for key in (f"{outer}{kind}_basis.{other}", f"{inner}.{kind}_basis"):
                if key in self.keys:
                    return key
        return None


class Pattern(Naming):
    """Two tensors (u, v) by patterns of the user's, such as ("{name}.B", "{name}.A")."""

    patterns: tuple[str, str]

    def of_layer(self, name: str) -> Place:  # noqa: D102
        u, v = (p.replace("{name}", name) for p in self.patterns)
        return Place(u, v, name)

    def of_second(self, name: str) -> Place | None:  # noqa: D102
        return None

    def bias(self, place: Place) -> str:  # noqa: D102
        return _inside(place.layer, "bias")


FORMATS: dict[str, type[Naming]] = {
    "svd_llm": SVDLLM,
    "asvd": ASVD,
    "sequential": InSequence,
    "basis_sharing": BasisSharing,
    "pattern": Pattern,
}


def check_container(fn: str, place: Place, module: nn.Module) -> None:
    """Raise ValueError unless a module is its two linear layers in sequence and nothing else.

    Args:
        fn: the public function.
        place: whose layer the module is.
        module: that is to be replaced.
    """
    expected = {place.u.rpartition(".")[2], place.v.rpartition(".")[2]}
    own = [
        *dict(module.named_parameters(recurse=False)),
        *dict(module.named_buffers(recurse=False)),
    ]
    children = dict(module.named_children())
    if set(children) == expected and not own:
        return
    got = ", ".join([f"{k}: {type(m).__name__}" for k, m in children.items()] + own)
    raise ValueError(
        f"{fn}: source: expected two linear layers in sequence and nothing else in "
        f"{place.layer!r}, got {got}"
    )


def _inside(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _from_parts(name: str, second: str, first: str) -> Place | None:
    parent, _, part = name.rpartition(".")
    return Place(name, _inside(parent, first), parent) if part == second else None


def _ends(name: str, ends: tuple[str, ...]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


Maker = Callable[[Collection[str], Mapping[str, Any]], Naming]


def maker(fn: str, chosen: str, pattern: Any) -> Maker:
    """What makes the naming of a format.

    Raises:
        ValueError: an unknown format, a pattern with another format or none with its own.
    """
    if chosen not in FORMATS:
        known = ", ".join(repr(name) for name in [*FORMATS, "peft"])
        raise ValueError(f"{fn}: format: expected one of {known}, got {chosen!r}")
    kind = FORMATS[chosen]
    if (kind is Pattern) != (pattern is not None):
        need = "patterns" if pattern is None else "None"
        got = "None" if pattern is None else repr(pattern)
        raise ValueError(f"{fn}: pattern: expected {need} for format {chosen!r}, got {got}")
    if kind is not Pattern:
        return kind
    if (
        not isinstance(pattern, tuple | list)
        or len(pattern) != 2
        or not all(isinstance(p, str) and "{name}" in p for p in pattern)
        or pattern[0] == pattern[1]
    ):
        raise ValueError(
            f"{fn}: pattern: expected two names with {{name}} in them, of u (N, R) and of v "
            f"(R, K), such as ('{{name}}.B', '{{name}}.A'), got {pattern!r}"
        )

    def make(keys: Collection[str], config: Mapping[str, Any]) -> Naming:
        made = Pattern(keys, config)
        made.patterns = (pattern[0], pattern[1])
        return made

    return make
