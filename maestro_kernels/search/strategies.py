"""What a profile and a table compare: dense, two matmuls, and every strategy of ours by name.

A strategy is named as a plan prints it, "backend: strategy", or "packed: form" for a form of
`prepack`. "ours" is what `auto` runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from maestro_kernels import dispatch, plans, problem, tables
from maestro_kernels.backends import KERNELS, packed
from maestro_kernels.call import Call
from maestro_kernels.functional import lod_linear
from maestro_kernels.measure import providers
from maestro_kernels.measure.cases import Case
from maestro_kernels.measure.providers import Forward, Inputs, Provider, Unavailable
from maestro_kernels.ops import gradient

if TYPE_CHECKING:
    from maestro_kernels.search.latencies import Point

DENSE, TWO, AUTO = "dense", "two matmuls", "ours"
DENSE_PACKED, PREPACKED = "dense, packed", "prepacked"
PACKED = "packed: "
# Forms of the computation inside each backend, by device; its choose_strategy gives one of them.
STRATEGIES: dict[str, dict[str, tuple[str, ...]]] = {
    kind: {
        name: names
        for name in KERNELS
        if (names := plans.backend_module(name).STRATEGIES.get(kind))
    }
    for kind in ("cpu", "cuda")
}


def strategy_names(kind: str) -> list[str]:
    """Low-rank strategies that a profile on "cpu" or "cuda" may hold."""
    of_device = (f"{b}: {name}" for b, names in STRATEGIES[kind].items() for name in names)
    forms = [PREPACKED, *(p.name for p in _forms("merged dense"))] if kind == "cpu" else []
    return [AUTO, TWO, *of_device, *forms]


def for_profile(case: Case) -> list[Provider]:
    """Dense (packed too), two matmuls, auto, every strategy, and packed factors on a CPU.

    The merged matrix of `prepack` is "dense, packed": its time does not depend on the rank.
    """
    packed_dense = replace(providers.DENSE_ONEDNN, name=DENSE_PACKED)
    auto = Provider(AUTO, "ours", _bind_auto)
    known = [providers.DENSE, providers.TWO, auto, packed_dense]
    return [*known, *_strategies(), *_forms("merged dense")]


def for_table(case: Case) -> list[Provider]:
    """Two matmuls as auto runs them, every strategy, and every packed form."""
    backend, _, strategy = tables.BASELINE.partition(": ")
    two = Provider(tables.BASELINE, "ours", partial(_bind_strategy, backend, strategy))
    if len(case.layers) > 1 or case.mode != "forward":
        return [two, *_strategies()]
    N, K, rank = case.layers[0].N, case.K, case.layers[0].rank
    return [two, *_strategies(), *_forms("" if packed.may_merge(N, K, rank) else "merged dense")]


def _strategies() -> list[Provider]:
    return [
        Provider(f"{backend}: {name}", "ours", partial(_bind_strategy, backend, name))
        for of_device in STRATEGIES.values()
        for backend, names in of_device.items()
        for name in names
    ]


def _forms(without: str = "") -> list[Provider]:
    names = [name for name in packed.FORMS if name not in (without, "unpacked")]
    return [Provider(PACKED + n, "ours", partial(_bind_form, n), trains=False) for n in names]


def _bind_auto(case: Case, ring: Sequence[Inputs]) -> list[Forward]:
    def forward(i: Inputs) -> list[Tensor]:
        return [lod_linear(i.x, i.us[0], i.vs[0], i.biases[0], rank=i.ranks[0])]

    return [partial(forward, i) for i in ring]


def _bind_strategy(
    backend: str, strategy: str, case: Case, ring: Sequence[Inputs]
) -> list[Forward]:
    """Calls that run one strategy and pay for auto's look-up of a plan, as any call does."""
    first = ring[0]
    # TRITON_INTERPRET=1 would serve CPU tensors, a thousand times slower than any kernel.
    here = STRATEGIES[first.x.device.type].get(backend, ())
    if backend != "matmul" and strategy not in here:
        raise Unavailable(f"{backend} has no {strategy} on {first.x.device.type}")
    layers = zip(first.us, first.vs, first.biases, first.ranks, strict=True)
    problems = [problem.describe(first.x, u, v, b, r, None) for u, v, b, r in layers]
    try:
        plan = dispatch.select(problems, backend)
    except NotImplementedError as error:
        raise Unavailable(str(error)) from error
    if backend != "matmul" and not plans.backend_module(backend).takes(strategy, problems):
        raise Unavailable(f"{backend} cannot run this by {strategy}")
    return [partial(_run, replace(plan, strategy=strategy), i) for i in ring]


def _run(plan: plans.Plan, i: Inputs) -> list[Tensor]:
    n = len(i.us)
    fn = "lod_linear" if n == 1 else "lod_linear_grouped"
    call = Call(fn, (i.x,), i.us, i.vs, i.biases, i.ranks, [None] * n)
    dispatch.plan(call, plan.backend)
    if i.dys and not plan.autograd_serves:
        return list(gradient.apply(plan, call, True, *call.tensors))
    return gradient.forward(plan, call, bool(i.dys))[0]


def _bind_form(name: str, case: Case, ring: Sequence[Inputs]) -> list[Forward]:
    if ring[0].x.device.type != "cpu":
        raise Unavailable("weights are packed for CPU kernels only")
    forwards: list[Forward] = []
    for i in ring:
        factors = i.us[0], i.vs[0], i.ranks[0]
        if not packed.can_make(name, *factors):
            raise Unavailable(f"{name} cannot serve these factors")
        form = packed.make_form(name, *factors, None)
        forwards.append(partial(_packed, form, i.x, i.biases[0]))
    return forwards


def _packed(form: packed.Form, x: Tensor, bias: Tensor | None) -> list[Tensor]:
    return [form(x, bias)]


def prepacked(points: Sequence[Point]) -> list[Point]:
    """The fastest of what `prepack` chooses from: packed forms, factors as they are, merged."""
    merged, others = {}, defaultdict(list)
    for p in points:
        where = (p.N, p.K, p.M, p.bias, p.cache, p.launch)
        if p.strategy == DENSE_PACKED:
            merged[where] = p
        elif p.strategy == AUTO or p.strategy.startswith(PACKED):
            others[where, p.rank].append(p)
    found = []
    for (where, rank), forms in others.items():
        if len(forms) < 2:
            continue
        if where in merged and packed.may_merge(where[0], where[1], rank):
            forms.append(merged[where])
        best = min(forms, key=lambda p: p.p50)
        found.append(replace(best, rank=rank, strategy=PREPACKED))
    return found
