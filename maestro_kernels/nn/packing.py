"""prepack: inference on CPUs with factors packed once, in the form that is fastest around each M.

A packed copy belongs to the values it was made of and is made again after they changed;
freshness.py says what is noticed. All that was made of one set of values is one state, replaced
whole, so that any number of threads may call a layer while others set its rank.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maestro_kernels import tuned
from maestro_kernels.arguments import check_int, check_model, renamed
from maestro_kernels.backends import packed
from maestro_kernels.functional import lod_linear, lod_linear_grouped
from maestro_kernels.nn.freshness import Made
from maestro_kernels.nn.grouping import LayerGroup, distinct_groups
from maestro_kernels.nn.linear import LoDLinear
from maestro_kernels.ops import eager

# Shapes of x remembered per layer; sequences of every length would fill the memory otherwise.
_MAX_SHAPES = 256
# Dimensions of x that the library takes.
_MAX_DIMS = 16
# Forms are chosen for M up to each power of two, and once for all M above this one.
_MAX_BUCKET = 4096
ALONE = "one by one"


@dataclass(frozen=True, slots=True)
class _State:
    """What was packed of one set of values, and where it runs.

    Attributes:
        made: the values, one entry per layer.
        bias: what forms take beside x: the layer's bias, the biases of a group.
        dtype: theirs.
        threads: torch's when forms were chosen.
        choices: largest M of a bucket -> name of the form that runs there.
        forms: name -> form, of those that run anywhere.
        runs: shape of a contiguous x -> form. Only a memory of the above, so entries may be added.
    """

    made: tuple[Made, ...] = ()
    bias: Any = None
    dtype: torch.dtype | None = None
    threads: int = 0
    choices: Mapping[int, str] = field(default_factory=dict)
    forms: Mapping[str, Any] = field(default_factory=dict)
    runs: dict[torch.Size, Any] = field(default_factory=dict)

    @staticmethod
    def of(made: tuple[Made, ...], bias: Any, old: _State) -> _State:
        """A state for these values; what is packed of the same ones is kept."""
        threads = torch.get_num_threads()
        if len(made) == len(old.made) and all(map(Made.packs_like, made, old.made)):
            if old.threads == threads:
                return replace(old, made=made, bias=bias)
            return replace(old, made=made, bias=bias, threads=threads, choices={}, runs={})
        return _State(made, bias, made[0].u.dtype, threads)

    def serves(self, layer: LoDLinear, rank: int) -> bool:
        """Whether it is of the one layer as it is now."""
        made, threads = self.made, self.threads
        return bool(made) and made[0].same(layer, rank) and threads == torch.get_num_threads()

    def choosing(self, bucket: int, name: str, form: Any) -> _State:
        """The state with one more choice, without the forms that run nowhere."""
        choices = {**self.choices, bucket: name}
        forms = {**self.forms, name: form}
        forms = {n: f for n, f in forms.items() if f is not None and n in choices.values()}
        return replace(self, choices=choices, forms=forms, runs={})

    def remember(self, shape: torch.Size, run: Any) -> None:
        if len(self.runs) >= _MAX_SHAPES:
            self.runs.clear()
        self.runs[shape] = run


_NOTHING = _State()


class _Packed(ABC):
    """Packed copies for one layer or one group.

    Attributes:
        form: the one to run, or None to choose.
    """

    __slots__ = ("_state", "form")

    def __init__(self, form: str | None = None) -> None:
        self.form, self._state = form, _NOTHING

    def __deepcopy__(self, memo: dict[int, Any]) -> _Packed:
        return type(self)(self.form)

    def __reduce__(self) -> tuple[Any, ...]:
        # Packed bytes are of this machine; the values they come from are saved with the layer.
        return type(self), (self.form,)

    @property
    def choices(self) -> dict[int, str]:
        """Largest M of each bucket (half of it excluded) -> form that runs there, so far."""
        return dict(self._state.choices)

    def choice(self, rows: int) -> str | None:
        """Name of the form that runs at M = rows; None where none was chosen yet."""
        return self._state.choices.get(_bucket(rows))

    def forget(self) -> None:
        """Let go of everything packed."""
        self._state = _NOTHING

    def _renew(self, made: tuple[Made, ...], bias: Any) -> _State | None:
        """The state for other values than so far, or None where they cannot be packed."""
        dtype = made[0].u.dtype
        for m in made:
            if not (m.u.is_cpu and m.v.is_cpu and m.u.dtype == m.v.dtype == dtype):
                return None
        self._state = state = _State.of(made, bias, self._state)
        return state

    def _other(self, state: _State, layers: Sequence[LoDLinear], x: Tensor) -> Any:
        """What a call gives for an x of a new shape, or one that is not contiguous."""
        K = state.made[0].v.shape[1]
        if not K or x.shape[-1:] != (K,) or not x.numel():
            return None
        rows = x.numel() // K
        chosen = self._prepared(state, layers, rows, wait=False)
        if chosen is None:
            return None
        name = chosen.choices[_bucket(rows)]
        form = chosen.forms.get(name)
        if form is None:
            return self._without_form(chosen, x)
        if x.dim() != 2 and (name != "fused" or x.dim() > _MAX_DIMS):
            form = partial(_flattened, form, K)
        if x.is_contiguous():
            chosen.remember(x.shape, form)
        elif x.dim() != 2 or x.stride(1) != 1:
            x = x.contiguous()
        return form(x, chosen.bias)

    def _prepared(
        self, state: _State, layers: Sequence[LoDLinear], rows: int, *, wait: bool
    ) -> _State | None:
        """The state with a form for M = rows, or None while another thread is measuring."""
        bucket = _bucket(rows)
        if bucket in state.choices:
            return state
        found = self._choose(state, layers, bucket, wait)
        if found is None:
            return None
        self._state = state = state.choosing(bucket, *found)
        return state

    @abstractmethod
    def _choose(
        self, state: _State, layers: Sequence[LoDLinear], bucket: int, wait: bool
    ) -> tuple[str, Any] | None:
        """(name, form) of what is to run at this M; None while another thread is measuring."""

    def _without_form(self, state: _State, x: Tensor) -> Any:
        """What a call gives where the choice is to run from the factors."""
        return None


class PackedLinear(_Packed):
    """The packed forms of one layer."""

    __slots__ = ()

    def __call__(self, layer: LoDLinear, x: Tensor, rank: int) -> Tensor | None:
        """The layer's output, or None where the call has to run unpacked."""
        if not _takes(x) or (torch.is_grad_enabled() and _wants_grad(x, layer)):
            return None
        state = self._state
        if not state.serves(layer, rank):
            renewed = self._made_again(layer, rank)
            if renewed is None:
                return None
            state = renewed
        if x.dtype is not state.dtype:
            return None
        try:
            run = state.runs.get(x.shape)
            if run is None or not x.is_contiguous():
                other: Tensor | None = self._other(state, (layer,), x)
                return other
            y: Tensor = run(x, state.bias)
        except RuntimeError:
            # An x that does not fit gets the words of an unpacked call; else it is raised as it is.
            _unpacked(layer, x, rank)
            raise
        return y

    def with_residual(
        self, layer: LoDLinear, x: Tensor, rank: int, residual: Tensor | None, scale: float
    ) -> Tensor | None:
        """The output with a residual, or None where the call has to run unpacked.

        Of the packed forms the fused kernel is the one that adds it in its own pass.
        """
        if not _takes(x) or (residual is not None and not _takes(residual)):
            return None
        if torch.is_grad_enabled() and (
            _wants_grad(x, layer) or (residual is not None and residual.requires_grad)
        ):
            return None
        state: _State | None = self._state
        if not self._state.serves(layer, rank):
            state = self._made_again(layer, rank)
        K = layer.in_features
        if state is None or x.dtype is not state.dtype or not x.numel() or x.shape[-1] != K:
            return None
        rows = x.numel() // K
        state = self._prepared(state, (layer,), rows, wait=False)
        if state is None or state.choices[_bucket(rows)] != "fused":
            return None
        try:
            return packed.with_residual(state.forms["fused"], x, state.bias, residual, scale)
        except RuntimeError:
            _unpacked(layer, x, rank, residual=residual, scale=scale)
            raise

    def _made_again(self, layer: LoDLinear, rank: int) -> _State | None:
        """The state of the layer as it is, or None where that cannot be told or packed."""
        if layer.backend is not None or not Made.can_tell(layer):
            self.forget()
            return None
        made = Made(layer, rank)
        return self._renew((made,), made.bias)

    def prepare(self, layer: LoDLinear, rows: int) -> None:
        """Choose for M = rows now, waiting for what another thread measures."""
        state = self._made_again(layer, layer.forward_rank())
        if state is not None:
            self._prepared(state, (layer,), rows, wait=True)

    def _choose(
        self, state: _State, layers: Sequence[LoDLinear], bucket: int, wait: bool
    ) -> tuple[str, Any] | None:
        made = state.made[0]
        u, v, bias, rank, activation = made.u, made.v, made.bias, made.rank, made.activation
        (N, R), K = u.shape, v.shape[1]
        names: tuple[str, ...] = packed.FORMS if self.form is None else (self.form,)
        known = tuned.choose_form(N, K, rank, bucket, u.dtype) if self.form is None else None
        if known is not None:
            names = (known,)
        elif self.form is None and not packed.may_merge(N, K, rank):
            names = tuple(name for name in names if name != "merged dense")
        can = [name for name in names if packed.can_make(name, u, v, rank)]
        forms = dict(state.forms)

        def form(name: str) -> packed.Form:
            if name not in forms:
                forms[name] = packed.make_form(name, u, v, rank, activation)
            return forms[name]

        name: str | None = can[0] if can else "unpacked"
        if can and len(names) > 1:
            x = torch.ones(bucket, K, dtype=u.dtype)

            def unpacked() -> Tensor:
                return lod_linear(x, u, v, bias, rank=rank, activation=activation)

            def run(name: str) -> Tensor:
                return form(name)(x, bias)

            calls: dict[str, Callable[[], object]] = {name: partial(run, name) for name in can}
            key = (N, K, R, rank, bucket, u.dtype, bias is not None, activation)
            name = packed.fastest(key, {**calls, "unpacked": unpacked}, wait=wait)
        if name is None:
            return None
        return name, form(name) if name in can else None


def _flattened(form: Callable[[Tensor, Any], Any], K: int, x: Tensor, bias: Any) -> Any:
    """A form that takes matrices on any x of rows."""
    found = form(x.view(-1, K), bias)

    def shaped(y: Tensor) -> Tensor:
        return y.view(*x.shape[:-1], y.shape[-1])

    return shaped(found) if isinstance(found, Tensor) else list(map(shaped, found))


class PackedGroup(_Packed):
    """The packed form of layers that read one x: one parallel region, or each layer by itself."""

    __slots__ = ("_alone",)

    def __init__(self, form: str | None = None) -> None:
        super().__init__(form)
        # Shapes of x at which each layer runs by itself -> ranks of the layers at that time.
        self._alone: dict[torch.Size, tuple[int, ...]] = {}

    def is_alone(self, index: int, x: Tensor, rank: int) -> bool:
        """Whether layer `index` runs by itself at this rank, for an x of this shape.

        Without a look at the values: if they changed meanwhile, it is right all the same.
        """
        if not self._alone or x.is_nested:
            return False
        ranks = self._alone.get(x.shape)
        return ranks is not None and ranks[index] == rank

    def forget(self) -> None:  # noqa: D102
        super().forget()
        self._alone = {}

    def _renew(self, made: tuple[Made, ...], bias: Any) -> _State | None:
        self._alone = {}
        return super()._renew(made, bias)

    def _made_again(self, made: tuple[Made, ...]) -> _State | None:
        return self._renew(made, tuple([m.bias for m in made]))

    def __call__(
        self, layers: Sequence[LoDLinear], x: Tensor, made: tuple[Made, ...]
    ) -> Sequence[Tensor] | None:
        """The outputs, nothing where the layers are to run one by one, None where unpacked."""
        if layers[0].backend is not None:
            self.forget()
            return None
        if not (x.is_cpu and _is_as_it_is(x)):
            return None
        state = self._state
        if state.made is not made or state.threads != torch.get_num_threads():
            renewed = self._made_again(made)
            if renewed is None:
                return None
            state = renewed
        if x.dtype is not state.dtype:
            return None
        if torch.is_grad_enabled() and (x.requires_grad or any(m.wants_grad() for m in made)):
            return None
        try:
            run = state.runs.get(x.shape)
            if run is None or not x.is_contiguous():
                other: Sequence[Tensor] | None = self._other(state, layers, x)
                return other
            ys: list[Tensor] = run(x, state.bias)
        except RuntimeError:
            # An x that does not fit gets the words of an unpacked call; else it is raised as it is.
            lod_linear_grouped(
                x,
                [m.u for m in made],
                [m.v for m in made],
                state.bias,
                ranks=[m.rank for m in made],
                activation=[m.activation for m in made],
            )
            raise
        return ys

    def _without_form(self, state: _State, x: Tensor) -> Sequence[Tensor]:
        if len(self._alone) >= _MAX_SHAPES:
            self._alone = {}
        self._alone[x.shape] = tuple([m.rank for m in state.made])
        return ()

    def prepare(self, layers: Sequence[LoDLinear], made: tuple[Made, ...], rows: int) -> None:
        """Choose for M = rows now, waiting for what another thread measures."""
        state = self._state if self._state.made is made else self._made_again(made)
        if state is not None:
            self._prepared(state, layers, rows, wait=True)

    def _choose(
        self, state: _State, layers: Sequence[LoDLinear], bucket: int, wait: bool
    ) -> tuple[str, Any] | None:
        made = state.made
        name: str | None = ALONE
        grouped = None
        if self.form in (None, "fused") and all(
            packed.can_make("fused", m.u, m.v, m.rank) for m in made
        ):
            us, vs, ranks = [m.u for m in made], [m.v for m in made], [m.rank for m in made]
            grouped = state.forms.get("fused") or packed.make_group_form(
                us, vs, ranks, [m.activation for m in made]
            )
            name = "fused"
        if grouped is not None and self.form is None:
            name = self._fastest(state, layers, bucket, grouped, wait)
        if name is None:
            return None
        return name, grouped if name == "fused" else None

    def _fastest(
        self, state: _State, layers: Sequence[LoDLinear], bucket: int, grouped: Any, wait: bool
    ) -> str | None:
        """What a model that calls the layers one after the other waits for less."""
        made = state.made
        x = torch.ones(bucket, made[0].v.shape[1], dtype=state.dtype)
        members = [(PackedLinear(), layer, m.rank) for layer, m in zip(layers, made, strict=True)]
        for single, layer, _ in members:
            single.prepare(layer, bucket)

        def calls(name: str, form: Any) -> Callable[[], None]:
            trial = LayerGroup(list(layers), packed=PackedGroup(self.form))
            trial.packed._state = state.choosing(bucket, name, form)  # type: ignore[union-attr]
            trial.adopt(made)

            def run() -> None:
                for single, layer, rank in members:
                    if trial(layer, x, rank) is None and single(layer, x, rank) is None:
                        _unpacked(layer, x, rank)

            return run

        sizes = tuple((*m.u.shape, m.v.shape[1], m.rank, m.activation) for m in made)
        key = (*sizes, bucket, state.dtype)
        candidates = {ALONE: calls(ALONE, None), "fused": calls("fused", grouped)}
        return packed.fastest(key, candidates, wait=wait)


def _unpacked(layer: LoDLinear, x: Tensor, rank: int, **added: Any) -> Tensor:
    activation = layer.activation
    return lod_linear(x, layer.u, layer.v, layer.bias, rank=rank, activation=activation, **added)


def _takes(x: Tensor) -> bool:
    """Whether a call on x may use packed weights: a plain CPU tensor, nobody watching the call."""
    return x is not None and eager.is_plain(x) and x.is_cpu and _is_as_it_is(x)


def _is_as_it_is(x: Tensor) -> bool:
    return not eager.any_autocast() or eager.autocast_dtype(x) is None


def _wants_grad(x: Tensor, layer: LoDLinear) -> bool:
    factors = layer._parameters.values()
    return x.requires_grad or any(p is not None and p.requires_grad for p in factors)


def _bucket(rows: int) -> int:
    """The M that a form is measured at to run at M = rows."""
    return min(1 << (rows - 1).bit_length(), _MAX_BUCKET)


@renamed(module="model")
def prepack(
    model: nn.Module, *, rows: int | Sequence[int] = (), form: str | None = None
) -> nn.Module:
    """Compute every LoDLinear's y = act(x @ v[:r].T @ u[:, :r].T + bias) from packed weights.

    For CPU inference: weights are packed once, in the form a short measurement finds fastest around
    the M (rows of x) of the call: the fused native kernel, two oneDNN linears, one oneDNN linear on
    the merged matrix, or unpacked factors as before. The first call with an M up to each power of
    two measures at that power, up to 4096, which stands for all M above; layers of one size share
    the result, and other threads use the factors meanwhile. `summary` and `layer.packed.choices`
    say which was taken. Packed copies need memory beside the factors, are not saved, and are made
    again after the factors changed; `refresh` says which changes go unseen. Another number of
    threads is chosen for anew. A call that wants gradients, runs under autocast or is compiled uses
    the factors. Any number of threads may call the model and set ranks.

    Args:
        model: any module, changed in place; on CUDA nothing is done and a warning says so.
        rows: M to measure for now rather than at the first call.
        form: one of "fused", "two oneDNN linears", "merged dense", "unpacked" to skip measuring.

    Returns:
        The model.

    Raises:
        TypeError: model is no module, or rows no int.
        ValueError: an unknown form, or rows < 1.
    """
    check_model("prepack", model)
    if form is not None and form not in packed.FORMS:
        raise ValueError(f"prepack: form: expected one of {packed.FORMS}, got {form!r}")
    sizes = [rows] if isinstance(rows, int) else list(rows)
    sizes = [check_int("prepack", "rows", size, 1) for size in sizes]
    layers = [m for m in model.modules() if isinstance(m, LoDLinear)]
    elsewhere = {m.u.device.type for m in layers} - {"cpu"}
    if elsewhere:
        warnings.warn(
            f"prepack: layers on {', '.join(sorted(elsewhere))} stay as they are: weights are "
            "packed for CPU kernels only",
            stacklevel=2,
        )
    layers = [m for m in layers if m.u.is_cpu]
    for layer in layers:
        layer.packed = PackedLinear(form)
    shared = distinct_groups(layers)
    for siblings in shared:
        siblings.packed = PackedGroup(form)
    for size in sizes:
        for siblings in shared:
            siblings.prepare(size)
        for layer in layers:
            group = layer.group
            if group is None or group.packed is None or group.packed.choice(size) != "fused":
                layer.packed.prepare(layer, size)  # type: ignore[union-attr]
    return model


@renamed(module="model")
def unpack(model: nn.Module) -> nn.Module:
    """Undo `prepack`: free the packed copies and run from the factors."""
    for layer in model.modules():
        if isinstance(layer, LoDLinear):
            layer.packed = None
            if layer.group is not None:
                layer.group.packed = None
    return model
