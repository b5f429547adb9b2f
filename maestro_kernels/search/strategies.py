"""What a profile and a table compare: dense, two matmuls, and every strategy of ours by name.

A strategy is named as a plan prints it, "backend: strategy", or "packed: form" for a form of
`prepack`. "ours" is what `auto` runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

import maestro_kernels as mk
from maestro_kernels import dispatch, problem, tables
from maestro_kernels.backends import packed
from maestro_kernels.benchmark.cases import Case
from maestro_kernels.benchmark.providers import (
    Forward,
    Inputs,
    Provider,
    Unavailable,
    default_providers,
)
from maestro_kernels.ops import linear

__all__ = ["AUTO", "DENSE", "DENSE_PACKED", "PREPACKED", "TWO", "for_profile", "for_table"]

DENSE, TWO, AUTO = "dense", "two matmuls", "ours"
DENSE_PACKED, PREPACKED = "dense, packed", "prepacked"
PACKED = "packed: "
# Forms of the computation inside each backend; its choose_strategy gives one of them.
STRATEGIES = {"triton": ("row", "two_phase"), "native": ("fused",)}


def for_profile(case: Case) -> list[Provider]:
    """Dense (packed too), two matmuls, auto, every strategy, and packed factors on a CPU.

    The merged matrix of `prepack` is "dense, packed": its time does not depend on the rank.
    """
    known = {p.name: p for p in default_providers(case)}
    providers = [known[DENSE], known[TWO], known[AUTO]]
    providers.append(replace(known["dense, oneDNN packed"], name=DENSE_PACKED))
    return [*providers, *_strategies(), *_forms("merged dense")]


def for_table(case: Case) -> list[Provider]:
    """Two matmuls as auto runs them, every strategy, and every packed form."""
    backend, _, strategy = tables.BASELINE.partition(": ")
    two = Provider(tables.BASELINE, "ours", partial(_bind_strategy, backend, strategy))
    return [two, *_strategies()] + (
        _forms() if len(case.layers) == 1 and case.mode == "forward" else []
    )


def _strategies() -> list[Provider]:
    return [
        Provider(f"{backend}: {name}", "ours", partial(_bind_strategy, backend, name))
        for backend, names in STRATEGIES.items()
        for name in names
    ]


def _forms(without: str = "") -> list[Provider]:
    names = [name for name in packed.FORMS if name not in (without, "unpacked")]
    return [Provider(PACKED + n, "ours", partial(_bind_form, n), trains=False) for n in names]


def _bind_strategy(
    backend: str, strategy: str, case: Case, ring: Sequence[Inputs]
) -> list[Forward]:
    """Calls that run one strategy and pay for auto's look-up of a plan, as any call does."""
    if backend == "triton" and ring[0].x.device.type == "cpu":
        # TRITON_INTERPRET=1 would serve it, a thousand times slower than any kernel.
        raise Unavailable("triton kernels need a CUDA device; the interpreter is not timed")
    first = ring[0]
    layers = zip(first.us, first.vs, first.biases, first.ranks, strict=True)
    problems = [problem.describe(first.x, u, v, b, r, None) for u, v, b, r in layers]
    try:
        plan = dispatch.select(problems, backend)
    except NotImplementedError as error:
        raise Unavailable(str(error)) from error
    if len(problems) > 1:
        if plan.strategy != strategy:
            raise Unavailable(f"{backend} serves groups by {plan.strategy}")
        return [partial(_grouped, i, backend) for i in ring]
    return [partial(_single, replace(plan, strategy=strategy), i) for i in ring]


def _single(plan: dispatch.Plan, i: Inputs) -> list[Tensor]:
    args = (i.x, i.us[0], i.vs[0], i.biases[0])
    rank = i.ranks[0]
    dispatch.plan_linear(*args, rank, None, None)
    if i.dys and not plan.autograd_serves:
        return [linear.apply_eager(*args, (plan, rank, True))]
    return [linear.run_forward(plan, *args, rank, bool(i.dys))[0]]


def _grouped(i: Inputs, backend: str) -> list[Tensor]:
    return list(mk.lod_linear_grouped(i.x, i.us, i.vs, i.biases, ranks=i.ranks, backend=backend))


def _bind_form(name: str, case: Case, ring: Sequence[Inputs]) -> list[Forward]:
    if ring[0].x.device.type != "cpu":
        raise Unavailable("weights are packed for CPU kernels only")
    forwards: list[Forward] = []
    for i in ring:
        form = packed.make_form(name, i.us[0], i.vs[0], i.ranks[0], None, case.M)
        if form is None:
            raise Unavailable(f"{name} cannot serve these factors")
        forwards.append(partial(_packed, form, i.x, i.biases[0]))
    return forwards


def _packed(form: packed.Form, x: Tensor, bias: Tensor | None) -> list[Tensor]:
    return [form(x, bias)]
