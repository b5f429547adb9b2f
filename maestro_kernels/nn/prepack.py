"""prepack: inference on CPUs with factors packed once, in the form that is fastest for each M.

A packed copy belongs to the values it was made of and is made again after they changed;
freshness.py says what is noticed.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maestro_kernels import tuned
from maestro_kernels.backends import packed
from maestro_kernels.functional import lod_linear
from maestro_kernels.nn.freshness import Made, watch_optimizers
from maestro_kernels.nn.layer import check_int
from maestro_kernels.nn.linear import LoDLinear
from maestro_kernels.ops import eager

__all__ = ["PackedGroup", "PackedLinear", "prepack", "unpack"]

# Shapes of x remembered per layer; sequences of every length would fill the memory otherwise.
_MAX_SHAPES = 256
# Dimensions of x that the library takes.
_MAX_DIMS = 16


class _Packed:
    """Packed copies for one layer or one group, by the number of rows they were chosen for.

    Attributes:
        choices: M -> name of the form that runs there, for M seen so far.
    """

    __slots__ = ("_by_rows", "_by_shape", "_dtype", "_forms", "_made", "choices", "form")

    def __init__(self, form: str | None = None) -> None:
        self.form = form
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Packed:
        return type(self)(self.form)

    def __reduce__(self) -> tuple[Any, ...]:
        # Packed bytes are of this machine; the values they come from are saved with the layer.
        return type(self), (self.form,)

    def _forget(self) -> None:
        self.choices: dict[int, str] = {}
        self._made: list[Made] = []
        self._dtype: torch.dtype | None = None
        self._forms: dict[tuple[str, int], Any] = {}
        # The form for so many rows, and the same for a contiguous x of a shape: what a call asks.
        self._by_rows: dict[int, Any] = {}
        self._by_shape: dict[torch.Size, Any] = {}

    def _renew(self, layers: Sequence[LoDLinear]) -> None:
        """Forget what was made of other values."""
        self._forget()
        made = []
        for layer in layers:
            factors = layer._parameters
            u, v = factors.get("u"), factors.get("v")
            # What is parametrised is computed anew on every call.
            if u is None or v is None or "bias" not in factors or layer.backend is not None:
                return
            if not (u.is_cpu and v.is_cpu and u.dtype == v.dtype == layers[0].u.dtype):
                return
            made.append(Made(layer, u, v))
        self._made, self._dtype = made, layers[0].u.dtype

    def _made_now(self, layers: Sequence[LoDLinear]) -> list[Made]:
        """What packed copies and the next outputs are made of; nothing where there are none."""
        now = [then.again(layer) for then, layer in zip(self._made, layers, strict=False)]
        kept = [made for made in now if made is not None]
        if len(kept) == len(layers):
            # Only biases changed, which are not packed. Outputs that wait refer to the old list.
            self._made = kept
        else:
            self._renew(layers)
        return self._made

    def _keep(self, shape: torch.Size, form: Any) -> Any:
        """Remember what runs a contiguous x of this shape."""
        if len(self._by_shape) >= _MAX_SHAPES:
            self._by_shape.clear()
        self._by_shape[shape] = form
        return form

    def _keep_chosen(self) -> None:
        """Free the forms that lost everywhere."""
        chosen = {id(form) for form in self._by_rows.values()}
        self._forms = {key: form for key, form in self._forms.items() if id(form) in chosen}


class PackedLinear(_Packed):
    """The packed forms of one layer."""

    __slots__ = ()

    def __call__(self, layer: LoDLinear, x: Tensor) -> Tensor | None:
        """The layer's output, or None where the call has to run unpacked."""
        if not _takes(x) or (torch.is_grad_enabled() and _wants_grad(x, layer)):
            return None
        made = self._made
        if not (made and made[0].same(layer)):
            made = self._made_now((layer,))
            if not made:
                return None
        if x.dtype is not self._dtype:
            return None
        bias = made[0].bias
        form = self._by_shape.get(x.shape)
        if form is None or not x.is_contiguous():
            return self._new(layer, x, bias)
        y: Tensor = form(x, bias)
        return y

    def _new(self, layer: LoDLinear, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """The output for an x of a new shape, or one that is not contiguous."""
        K = layer.in_features
        rows = x.numel() // K if K and x.shape[-1:] == (K,) else 0
        if not rows:
            return None
        if rows not in self._by_rows:
            self._choose(layer, x.reshape(rows, K).contiguous(), rows)
        form = self._by_rows[rows]
        if form is None:
            return None
        if x.dim() != 2 and (self.choices[rows] != "fused" or x.dim() > _MAX_DIMS):
            form = partial(_flattened, form, K)
        if x.is_contiguous():
            self._keep(x.shape, form)
        elif x.dim() != 2 or x.stride(1) != 1:
            x = x.contiguous()
        y: Tensor = form(x, bias)
        return y

    def _choose(self, layer: LoDLinear, x: Tensor, rows: int) -> None:
        N, K, rank = layer.out_features, layer.in_features, layer.rank
        names: tuple[str, ...] = packed.FORMS if self.form is None else (self.form,)
        known = tuned.choose_form(N, K, rank, rows, x.dtype) if self.form is None else None
        if known is not None:
            names = (known,)
        elif self.form is None and 2 * rank < layer.break_even_rank:
            # The merged matrix costs more than twice what the factors do: not worth its memory.
            names = tuple(name for name in names if name != "merged dense")
        forms = {name: form for name in names if (form := self._make(layer, name, rows))}
        calls: dict[str, Callable[[], object]] = {
            name: partial(form, x, layer.bias) for name, form in forms.items()
        }
        if len(names) > 1:
            calls["unpacked"] = partial(_unpacked, layer, x)
        size = (N, K, layer.max_rank, rank, rows)
        key = (*size, layer.u.dtype, layer.bias is not None, layer.activation)
        name = next(iter(calls), "unpacked") if len(calls) < 2 else packed.fastest(key, calls)
        self.choices[rows] = name
        self._by_rows[rows] = forms.get(name)
        self._keep_chosen()

    def _make(self, layer: LoDLinear, name: str, rows: int) -> Any:
        # oneDNN lays weights out for a size of batch; the other forms fit every one.
        key = (name, 0 if name == "fused" else 1 << (rows - 1).bit_length())
        if key not in self._forms:
            self._forms[key] = packed.make_form(
                name, layer.u, layer.v, layer.rank, layer.activation, key[1]
            )
        return self._forms[key]


def _flattened(form: packed.Form, K: int, x: Tensor, bias: Tensor | None) -> Tensor:
    """A form that takes matrices on any x of rows."""
    y = form(x.view(-1, K), bias)
    return y.view(*x.shape[:-1], y.shape[-1])


ALONE = "one by one"


class PackedGroup(_Packed):
    """The packed form of layers that read one x: one parallel region, or each layer by itself."""

    __slots__ = ("_K", "_alone")

    def __init__(self, form: str | None = None) -> None:
        super().__init__(form)
        # Whether layers run one by one at some number of rows, and how to count rows.
        self._alone, self._K = False, 1

    def __call__(
        self, layers: Sequence[LoDLinear], x: Tensor
    ) -> tuple[list[Tensor], list[Made]] | None:
        """(outputs, what each was made of), or None where the group has to run unpacked."""
        if not _takes(x):
            return None
        if torch.is_grad_enabled() and any(_wants_grad(x, layer) for layer in layers):
            return None
        made = self._made
        same = len(made) == len(layers)
        for then, layer in zip(made, layers, strict=False):
            same = same and then.same(layer)
        if not same:
            made = self._made_now(layers)
            if not made:
                return None
        if x.dtype is not self._dtype:
            return None
        run = self._by_shape.get(x.shape)
        if run is None or not x.is_contiguous():
            run = self._new(layers, x)
            if run is None:
                return None
            if not x.is_contiguous() and (x.dim() != 2 or x.stride(1) != 1):
                x = x.contiguous()
        return run(x, [then.bias for then in made]), made

    def prefers_alone(self, x: Tensor) -> bool:
        """Whether layers called one by one were found faster for as many rows as x has."""
        return self._alone and self.choices.get(x.numel() // self._K) == ALONE

    def _new(self, layers: Sequence[LoDLinear], x: Tensor) -> Any:
        """What runs an x of a new shape, or one that is not contiguous."""
        K = layers[0].in_features
        rows = x.numel() // K if K and x.shape[-1:] == (K,) else 0
        if not rows or x.dim() > _MAX_DIMS:
            return None
        if rows not in self._by_rows:
            self._by_rows[rows] = self._choose(layers, x.reshape(rows, K).contiguous(), rows)
        run = self._by_rows[rows]
        return self._keep(x.shape, run) if x.is_contiguous() else run

    def _choose(self, layers: Sequence[LoDLinear], x: Tensor, rows: int) -> Any:
        grouped = self._forms.get(("fused", 0)) or packed.make_group_form(
            [m.u for m in layers],
            [m.v for m in layers],
            [m.rank for m in layers],
            [m.activation for m in layers],
        )
        singles = [m.packed or PackedLinear(self.form) for m in layers]

        def one_by_one(x: Tensor, biases: Sequence[Tensor | None]) -> list[Tensor]:
            pairs = zip(singles, layers, strict=True)
            outputs = [(single(layer, x), layer) for single, layer in pairs]
            return [_unpacked(layer, x) if y is None else y for y, layer in outputs]

        biases, shared = [m.bias for m in layers], layers[0].group
        one_by_one(x, biases)
        if grouped is None or self.form not in (None, "fused"):
            name = ALONE
        elif self.form == "fused" or shared is None:
            name = "fused"
        else:
            # As a model calls them: finding the output that waits for each layer takes its time.
            self._by_rows[rows] = grouped
            calls: dict[str, Callable[[], object]] = {
                ALONE: partial(one_by_one, x, biases),
                "fused": lambda: [shared(layer, x) for layer in layers],
            }
            sizes = tuple((m.out_features, m.in_features, m.max_rank, m.rank) for m in layers)
            key = (*sizes, rows, x.dtype, *(m.activation for m in layers))
            name = packed.fastest(key, calls)
            self._by_shape.clear()
        self.choices[rows] = name
        self._K = layers[0].in_features
        self._alone = ALONE in self.choices.values()
        self._forms = {("fused", 0): grouped} if "fused" in self.choices.values() else {}
        return grouped if name == "fused" else one_by_one


def _unpacked(layer: LoDLinear, x: Tensor) -> Tensor:
    return lod_linear(x, layer.u, layer.v, layer.bias, rank=layer.rank, activation=layer.activation)


def _takes(x: Tensor) -> bool:
    """Whether a call on x may use packed weights: a plain CPU tensor, nobody watching the call."""
    if not (eager.is_plain(x) and x.is_cpu):
        return False
    return not eager.any_autocast() or eager.autocast_dtype(x) is None


def _wants_grad(x: Tensor, layer: LoDLinear) -> bool:
    factors = layer._parameters.values()
    return x.requires_grad or any(p is not None and p.requires_grad for p in factors)


def prepack(
    module: nn.Module, *, rows: int | Sequence[int] = (), form: str | None = None
) -> nn.Module:
    """Compute every LoDLinear's y = act(x @ v[:r].T @ u[:, :r].T + bias) from packed weights.

    For CPU inference: weights are packed once, in the form a short measurement finds fastest at the
    M (rows of x) of the call: the fused native kernel, two oneDNN linears, one oneDNN linear on
    the merged matrix, or unpacked factors as before. The first call at each M measures; layers of
    one size share the result. `summary` and `layer.packed.choices` say which was taken. Packed
    copies need memory beside the factors, are not saved, and are made again after the factors
    changed. A call that wants gradients, runs under autocast or is compiled uses the factors.

    Args:
        module: any module, changed in place; on CUDA nothing is done and a warning says so.
        rows: M to measure now rather than at the first call.
        form: one of "fused", "two oneDNN linears", "merged dense", "unpacked" to skip measuring.

    Returns:
        The module.

    Raises:
        TypeError: module is no module, or rows no int.
        ValueError: an unknown form, or rows < 1.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"prepack: module: expected an nn.Module, got {type(module).__name__}")
    if form is not None and form not in packed.FORMS:
        raise ValueError(f"prepack: form: expected one of {packed.FORMS}, got {form!r}")
    sizes = [rows] if isinstance(rows, int) else list(rows)
    sizes = [check_int("prepack", "rows", size, 1) for size in sizes]
    layers = [m for m in module.modules() if isinstance(m, LoDLinear)]
    elsewhere = {m.u.device.type for m in layers} - {"cpu"}
    if elsewhere:
        warnings.warn(
            f"prepack: layers on {', '.join(sorted(elsewhere))} stay as they are: weights are "
            "packed for CPU kernels only",
            stacklevel=2,
        )
    watch_optimizers()
    layers = [m for m in layers if m.u.is_cpu]
    for layer in layers:
        layer.packed = PackedLinear(form)
    for shared in {id(m.group): m.group for m in layers if m.group is not None}.values():
        shared.packed = PackedGroup(form)
    with torch.no_grad():
        for size, layer in itertools.product(sizes, layers):
            layer(torch.zeros(size, layer.in_features, dtype=layer.u.dtype))
    return module


def unpack(module: nn.Module) -> nn.Module:
    """Undo `prepack`: free the packed copies and run from the factors."""
    for layer in module.modules():
        if isinstance(layer, LoDLinear):
            layer.packed = None
            if layer.group is not None:
                layer.group.packed = None
    return module
