"""Which layers of a model can be factorised, and why the others cannot. Reads, never changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from maestro_kernels.arguments import check_model
from maestro_kernels.measure import cost
from maestro_kernels.nn.experts import LoDExperts
from maestro_kernels.nn.foreign import adapter_weights, quantiser_of, sizes_of
from maestro_kernels.nn.kinds import DENSE, OPENED
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.nn.own_forward import is_linear
from maestro_kernels.nn.pivoted import PivotedLinear
from maestro_kernels.nn.swapping import Slots, find_slots, named_layers
from maestro_kernels.problem import DTYPES

# How words begin in the names of position embeddings and the like.
_TABLES = ("pos", "embed", "token")
_ROUTER = "it chooses among the experts beside it"
Selector = str | Iterable[str] | Callable[[str, nn.Module], bool] | None


@dataclass(frozen=True)
class Candidate:
    """One layer that holds a matrix, and what stands in the way of factorising it.

    Attributes:
        name: dotted name in the model, "" for the model itself.
        kind: "linear", "hf_conv1d" (Hugging Face's transposed linear), "conv1d", "conv2d",
            "lod_linear", "lod_conv1d", "lod_conv2d", "pivoted_linear", or the class name of
            anything else that owns a matrix.
        N: rows of the matrix, per group.
        K: columns of the matrix, per group; in_channels / groups * k_h * k_w of a convolution.
        groups: matrices of this size.
        reason: why the layer stays as it is, or None when it can be factorised.
    """

    name: str
    kind: str
    N: int
    K: int
    groups: int = 1
    reason: str | None = None

    @property
    def full_rank(self) -> int:
        """min(N, K), where factors reproduce the matrix."""
        return min(self.N, self.K)

    @property
    def break_even_rank(self) -> float:
        """N K / (N + K): from this rank on, factors hold as many weights as the matrix."""
        return cost.break_even_rank(self.N, self.K)

    @property
    def dense_weights(self) -> int:
        """Weights of the matrix, over all groups."""
        return self.groups * self.N * self.K

    def factor_weights(self, rank: int) -> int:
        """Weights of factors of this rank, over all groups."""
        return self.groups * rank * (self.N + self.K)


def classify(
    model: nn.Module, include: Selector = None, exclude: Selector = None
) -> dict[str, Candidate]:
    """Every layer of a model that owns a matrix, in module order, with the reason if it must stay.

    A module that keeps several matrices in parameters of its own (fused experts of transformers) is
    listed as the linear layers that `convert` makes of it, under the names they have then.

    Args:
        model: any module, also a single layer (its name is then "").
        include: only these layers; a pattern, several, or a function (name, module) -> bool. A
            pattern is fnmatch's, case sensitive (`*` also crosses dots), on the dotted name of the
            layer or of a module around it: "encoder" is everything inside it.
        exclude: not these layers; as include, and stronger.

    Raises:
        TypeError: model is no module, or a selector of the wrong type.
        ValueError: a pattern matches no module.
    """
    return find_candidates("classify", model, include, exclude)


def find_candidates(
    fn: str, model: nn.Module, include: Selector = None, exclude: Selector = None
) -> dict[str, Candidate]:
    """`classify` for the public function that errors name."""
    check_model(fn, model)
    names = named_layers(model)
    included = selector(fn, "include", include, names, default=True)
    excluded = selector(fn, "exclude", exclude, names, default=False)
    context = _Context.of(names, find_slots(model))
    found = {}
    for name, module in names.items():
        if not _owns_matrix(module):
            continue
        candidate = _describe(name, module, context)
        if module in context.adapters:
            candidate = replace(candidate, reason=context.adapters[module])
        if candidate.reason is None:
            if excluded(name, module):
                candidate = replace(candidate, reason="excluded")
            elif not included(name, module):
                candidate = replace(candidate, reason="not included")
        found[name] = candidate
    return found


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names this module or one around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


@dataclass(frozen=True)
class _Context:
    """What a single layer cannot know about itself."""

    slots: Slots
    owners: dict[tuple[str, int], set[str]]
    attention_outputs: frozenset[int]
    # Names of blocks with experts -> how many.
    experts: dict[str, int]
    names: dict[int, str]
    adapters: dict[nn.Module, str]

    @staticmethod
    def of(modules: Mapping[str, nn.Module], slots: Slots) -> _Context:
        owners: dict[tuple[str, int], set[str]] = defaultdict(set)
        attention, experts = set(), {}
        names = {}
        for name, module in modules.items():
            names[id(module)] = name
            if isinstance(module, nn.MultiheadAttention):
                attention.add(id(module.out_proj))
            if isinstance(module, LoDExperts):
                experts[name.rpartition(".")[0]] = module.experts
            for key, parameter in module._parameters.items():
                for identity in _identities(parameter):
                    owners[identity].add(f"{name}.{key}" if name else key)
        adapters = dict(adapter_weights(modules.values()))
        return _Context(slots, owners, frozenset(attention), experts, names, adapters)

    def others(self, name: str, parameter: Tensor) -> list[str]:
        own = f"{name}.weight" if name else "weight"
        users = set().union(*(self.owners[i] for i in _identities(parameter)))
        return sorted(users - {own})


def _identities(parameter: Tensor | None) -> list[tuple[str, int]]:
    """Two parameters are tied when they are one object, or start at one address."""
    if parameter is None:
        return []
    found = [("object", id(parameter))]
    if type(parameter) is nn.Parameter and not parameter.is_meta and parameter.numel():
        found.append((str(parameter.device), parameter.data_ptr()))
    return found


def _owns_matrix(module: nn.Module) -> bool:
    if isinstance(module, (LoDLayer, *DENSE.values())) or _hf_conv1d(module) is not None:
        return True
    return _largest(module) is not None or quantiser_of(module) is not None


def _largest(module: nn.Module) -> tuple[str, Tensor] | None:
    """The largest parameter of two dimensions or more that the module itself owns."""
    owned = [
        (key, p)
        for key, p in module._parameters.items()
        if p is not None and not nn.parameter.is_lazy(p) and p.dim() >= 2
    ]
    return max(owned, key=lambda item: item[1].numel(), default=None)


def _hf_conv1d(module: nn.Module) -> type | None:
    """Hugging Face's Conv1D among the bases, found without importing transformers."""
    for base in type(module).__mro__:
        if base.__name__ == "Conv1D" and base.__module__.partition(".")[0] == "transformers":
            return base
    return None


def _describe(name: str, module: nn.Module, context: _Context) -> Candidate:
    if isinstance(module, LoDLayer):
        reason = f"already factorised, rank {module.rank} of {module.max_rank}"
        return Candidate(name, module.kind, *module.matrix_shape, module.groups, reason)
    if isinstance(module, PivotedLinear):
        reason = f"already factorised, pivoted at rank {module.rank}"
        return Candidate(name, module.kind, *module.matrix_shape, 1, reason)
    quantiser = quantiser_of(module)
    if quantiser is not None:
        reason = f"quantised by {quantiser}: dequantise it first"
        return Candidate(name, type(module).__name__, *sizes_of(module), 1, reason)
    hf_conv1d = _hf_conv1d(module)
    known = (item for item in DENSE.items() if isinstance(module, item[1]))
    kind, base = next(known, ("hf_conv1d", hf_conv1d))
    if base is None:
        return _foreign(name, module, context)
    groups: int = getattr(module, "groups", 1)
    obstacle = _obstacle(name, module, base, context)
    weight = module._parameters.get("weight")
    if weight is None or nn.parameter.is_lazy(weight) or weight.dim() < 2:
        return Candidate(name, kind, 0, 0, groups, obstacle)
    rows, columns = weight.shape[0], weight[0].numel() if weight.shape[0] else 0
    N, K = (columns, rows) if hf_conv1d else (rows // groups, columns)
    if obstacle is None and groups > 1 and module.in_channels == groups:
        obstacle = "a depthwise convolution: each channel has its own small kernel"
    if obstacle is None and min(N, K) == 0:
        obstacle = "the weight is empty"
    return Candidate(name, kind, N, K, groups, obstacle)


def _obstacle(name: str, module: nn.Module, base: type, context: _Context) -> str | None:
    """Why a layer of a known kind stays as it is, or None."""
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a parametrization or a hook"
    if nn.parameter.is_lazy(weight):
        return "it is lazy and has no weight yet"
    if id(module) in context.attention_outputs:
        return "nn.MultiheadAttention reads its weight without calling it"
    overrides = any(
        getattr(type(module), method, None) is not getattr(base, method, None)
        for method in ("forward", "_conv_forward")
    )
    more = set(module._parameters) - {"weight", "bias"} or module._buffers or module._modules
    plain = type(weight) is nn.Parameter and not more and weight.dtype in DTYPES
    if overrides and plain and isinstance(module, nn.Linear):
        overrides = not is_linear(module)
    if overrides or "forward" in vars(module):
        return f"{type(module).__name__} has a forward of its own"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, not a plain parameter"
    if more:
        return f"{type(module).__name__} holds more than a weight and a bias"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}"
    if context.experts.get(name.rpartition(".")[0]) == weight.shape[0] and base is nn.Linear:
        return _ROUTER
    tied = context.others(name, weight)
    if tied:
        return f"its weight is tied to {', '.join(tied)}"
    places = context.slots[id(module)]
    if len(places) > 1:
        return f"one module in several places: {_listed(places, context)}"
    return None


def _listed(places: Iterable[tuple[nn.Module, str]], context: _Context) -> str:
    return ", ".join(f"{context.names[id(p)]}.{key}".lstrip(".") for p, key in places)


def _foreign(name: str, module: nn.Module, context: _Context) -> Candidate:
    """A module of another kind that owns a matrix: named, so that nothing is left out silently."""
    kind = type(module).__name__
    largest = _largest(module)
    assert largest is not None
    key, parameter = largest
    shape = tuple(parameter.shape)
    places = context.slots[id(module)]
    if len(places) > 1 and any(form.recognises(module) for form in OPENED):
        reason = f"one module in several places: {_listed(places, context)}"
    elif context.experts.get(name.rpartition(".")[0]) == shape[0]:
        reason = _ROUTER
    elif isinstance(module, nn.MultiheadAttention):
        reason = "nn.MultiheadAttention keeps q, k and v in parameters of its own"
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        reason = "an embedding is a table that is looked up, not multiplied with"
    elif shape[0] == 1 or any(word.startswith(_TABLES) for word in key.split("_")):
        reason = f"{key} {shape} is a table of values, no matrix that multiplies x"
    elif parameter.dim() == 3 and not type(module).__module__.startswith("torch.nn."):
        reason = f"{key} {shape} is a fused 3-d tensor (as experts have)"
    else:
        reason = f"{kind} is no linear layer or 1-d or 2-d convolution; it owns {key} {shape}"
    return Candidate(name, kind, shape[0], parameter.numel() // max(shape[0], 1), 1, reason)


def selector(
    fn: str, argument: str, chosen: Selector, names: dict[str, nn.Module], *, default: bool
) -> Callable[[str, nn.Module], bool]:
    """Include or exclude as a function."""
    if chosen is None:
        return lambda name, module: default
    if callable(chosen):
        return chosen
    expected = "a pattern, a list of patterns or a function (name, module) -> bool"
    if not isinstance(chosen, Iterable):
        raise TypeError(f"{fn}: {argument}: expected {expected}, got {type(chosen).__name__}")
    patterns = [chosen] if isinstance(chosen, str) else list(chosen)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"{fn}: {argument}: expected {expected}, got a {type(pattern).__name__} in it"
            )
        if not any(matches(pattern, name) for name in names):
            some = ", ".join(repr(name) for name in list(names)[1:6]) or "the model itself"
            raise ValueError(
                f"{fn}: {argument}: expected patterns that match a module (such as {some}), "
                f"got {pattern!r}"
            )
    return lambda name, module: any(matches(pattern, name) for pattern in patterns)
