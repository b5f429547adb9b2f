"""The one place that turns a problem into a plan: which backend, which strategy, and why.

Plans follow from the problem, the mode of the call and what was measured; the caches here only save
asking again. Nothing is measured here: a plan with rivals asks ops/first_use.py to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from maestro_kernels import choices, hardware, tuned
from maestro_kernels.backends import KERNELS, matmul
from maestro_kernels.call import Call
from maestro_kernels.hardware import is_here
from maestro_kernels.plans import Plan, backend_module
from maestro_kernels.problem import LoDProblem, check_call, describe_call
from maestro_kernels.tables import FORWARD, Mode


def unsupported(name: str, problem: LoDProblem) -> str | None:
    """Why backend `name` cannot serve the problem, or None when it can."""
    reason: str | None = backend_module(name).unsupported(problem)
    return reason


def select(
    problems: LoDProblem | Sequence[LoDProblem],
    backend: str | None = None,
    *,
    fn: str = "lod_linear",
    shared_x: bool = True,
    mode: Mode = FORWARD,
) -> Plan:
    """Choose the backend and strategy for one problem or one group.

    Args:
        problems: the layers, already validated.
        backend: None or "auto" to choose; a name to force it.
        fn: public function to name in errors.
        shared_x: the layers of a group read one x.
        mode: how the call is made.

    Raises:
        NotImplementedError: a forced backend cannot serve the problem; says why.
    """
    group = (problems,) if isinstance(problems, LoDProblem) else tuple(problems)
    forced = None if backend in (None, "auto") else backend
    reasons = {name: _unsupported_group(name, group) for name in KERNELS}
    if forced in reasons and reasons[forced] is not None:
        raise NotImplementedError(
            f"{fn}: backend: expected one that can serve this call, got {forced!r}: "
            f"{reasons[forced]}"
        )
    degenerate = all(problem.degenerate for problem in group)
    bucket, rivals = "", list[str]()
    if forced:
        chosen, strategy, why_auto = forced, None, "forced"
    else:
        bucket = choices.bucket(group, mode, shared_x=shared_x)
        servable = [name for name, why in reasons.items() if why is None]
        chosen, strategy, why_auto, is_known = _choose(group, servable, mode, bucket)
        if not (is_known or degenerate):
            rivals = _rivals(group, servable, shared_x=shared_x)
    others = {
        name: why or ("not forced" if forced else _NOT_CHOSEN)
        for name, why in reasons.items()
        if name != chosen
    }
    if degenerate:
        what = "the result is empty or act(bias): no kernel is needed"
        if chosen != "matmul":
            others[chosen] = f"{why_auto}, but torch gives such a result"
        return Plan(fn, group, "matmul", "degenerate", what, others, shared_x, mode)
    if strategy is None and chosen in KERNELS:
        strategy, why = backend_module(chosen).choose_strategy(group)
        why_auto = f"{why_auto}; {why}"
    strategy = strategy or ("formula" if chosen == "reference" else matmul.TWO)
    found = Plan(
        fn, group, chosen, strategy, why_auto, others, shared_x, mode, bucket, tuple(rivals)
    )
    if strategy.endswith(WITH_HALVES):
        strategy = strategy.removesuffix(WITH_HALVES)
        return replace(found, strategy=strategy, halves=halves(found))
    return found


_NOT_CHOSEN = "can serve, but was not measured to be faster: force it with backend="

# Below this much work on factors this small, two library calls take longer to be made than to
# compute: one call of the native library is then faster on any CPU, so that no table is needed.
_SMALL_FLOP = 1 << 16
_SMALL_FACTORS = 1 << 12
# Strategies that are measured against two matmuls at first use.
_MAX_RIVALS = 3

_is_deterministic = torch._C._get_deterministic_algorithms


def _choose(
    group: tuple[LoDProblem, ...], servable: Sequence[str], mode: Mode, bucket: str
) -> tuple[str, str | None, str, bool]:
    """(backend, strategy or None where it is the backend's to choose, reason, known) of auto.

    Known is what a table or a measurement says; the rest is predicted.
    """
    tuning = choices.tuning()
    choice: tuned.Choice | str = "MAESTRO_KERNELS_TUNE=off"
    if tuning != "off":
        choice = tuned.choose(group, ["matmul", *servable], mode=mode)
    if isinstance(choice, tuned.Choice):
        # Calls around this one ran so; this one may still be too wide or laid out otherwise.
        if choice.backend not in KERNELS or backend_module(choice.backend).takes(
            choice.strategy, group
        ):
            return choice.backend, choice.strategy, choice.reason, True
        why = f"{choice.reason}; but {choice.strategy} does not take this call"
        return "matmul", None, why, True
    if not is_here(group[0].device):
        return *_predict(group, servable, choice, mode), True
    # What this machine measured in passing would not repeat bit for bit on the next run.
    only_given = tuning != "first-use" or _is_deterministic()
    if tuning != "off":
        device = hardware.current_device(group[0].device)
        measured = choices.find(bucket, device, given_only=only_given)
        if measured is not None:
            backend, _, strategy = measured.winner.partition(": ")
            if backend == "matmul" or (
                backend in servable
                and backend_module(backend).takes(strategy.removesuffix(WITH_HALVES), group)
            ):
                return backend, strategy, str(measured), True
    return *_predict(group, servable, choice, mode), only_given


# What a bucket's name ends in where a half of the backward was measured by itself.
HALVES = ("; dx", "; weight gradients")
# What a strategy's name ends in where the fastest halves follow it, rather than its own backward.
WITH_HALVES = " with the fastest halves of the backward"


def rivals_of_halves(plan: Plan) -> list[list[str]]:
    """What may compute dx, and the weight gradients, beside library matmuls."""
    group = plan.problems
    kind = group[0].device.type
    found: list[list[str]] = [[], []]
    for name in KERNELS:
        module = backend_module(name)
        names = [s for s in module.STRATEGIES.get(kind, ()) if module.takes(s, group)]
        has_halves = module.weight_grads is not matmul.weight_grads
        if has_halves and names and _unsupported_group(name, group) is None:
            found[0] += [f"{name}: {strategy}" for strategy in names]
            found[1].append(f"{name}: {names[0]}")
    return found


def halves(plan: Plan) -> tuple[str, str] | None:
    """The fastest strategies for dx and for the weight gradients, where both were measured."""
    device = hardware.current_device(plan.problems[0].device)
    only_given = choices.tuning() != "first-use" or _is_deterministic()
    found = [choices.find(plan.bucket + half, device, given_only=only_given) for half in HALVES]
    servable = {name for name in KERNELS if _unsupported_group(name, plan.problems) is None}
    winners = [m.winner for m in found if m is not None]
    if len(winners) < 2 or any(w.partition(": ")[0] not in {"matmul", *servable} for w in winners):
        return None
    return winners[0], winners[1]


def _predict(
    group: tuple[LoDProblem, ...], servable: Sequence[str], why_not: str, mode: Mode
) -> tuple[str, str | None, str]:
    """(backend, strategy, reason) where nothing was measured."""
    # A gradient of our own costs such a call more than the native library saves.
    by_torch = mode.training and len(group) == 1 and group[0].activation is None
    if group[0].device.type == "cpu" and "native" in servable and not by_torch:
        factors = [p.max_active_rank * (p.K + p.N) for p in group]
        flop = sum(2 * p.M * f for p, f in zip(group, factors, strict=True))
        if flop <= _SMALL_FLOP and sum(factors) <= _SMALL_FACTORS:
            return "native", None, "the work is smaller than the cost of two library calls"
        few = backend_module("native").few_rows(group[0].dtype)
        if max(p.M for p in group) <= few:
            return "native", None, "so few rows are dot products with the factors as they lie"
    return "matmul", None, why_not


def _rivals(group: tuple[LoDProblem, ...], servable: Sequence[str], *, shared_x: bool) -> list[str]:
    """What to measure against two matmuls: of each family what it would choose, then the others."""
    kind = group[0].device.type
    first, others = [], []
    if matmul.takes_one_shrink(group, shared_x=shared_x):
        first.append(f"matmul: {matmul.ONE_SHRINK}")
    for name in servable:
        module = backend_module(name)
        strategies = module.STRATEGIES.get(kind, ())
        preferred = module.choose_strategy(group)[0] if strategies else ""
        for strategy in strategies:
            if strategy == preferred:
                first.append(f"{name}: {strategy}")
            elif module.takes(strategy, group):
                others.append(f"{name}: {strategy}")
    return [*first, *others][:_MAX_RIVALS]


def _unsupported_group(name: str, group: tuple[LoDProblem, ...]) -> str | None:
    for problem in group:
        reason = unsupported(name, problem)
        if reason is not None:
            return reason
    if len(group) == 1:
        return None
    # What serves each layer may still not serve all of them in one launch.
    together: str | None = backend_module(name).unsupported_group(group)
    return together


# Part of every key: what is faster on a CPU depends on it, and so does which table applies.
_threads = torch.get_num_threads

# Building a key: of no tensor, of something unhashable, of a nested or sparse tensor.
_NO_KEY = (AttributeError, TypeError, RuntimeError)

# A call whose key was seen has been validated and planned: the eager path then costs one lookup.
_plans: dict[tuple[Any, ...], Plan] = {}
_MAX_PLANS = 4096
# Predictions that served while nothing was measured: a recomputation repeats its forward's.
_predicted: dict[tuple[Any, ...], Plan] = {}


# What may be named as backend for `quick_plan`: the reference is for comparisons.
QUICK = (None, "matmul", *KERNELS)


def quick_plan(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rank: Any,
    activation: Any,
    backend: str | None,
    training: bool,
    added: tuple[Any, Any, Any, Any] | None = None,
) -> Plan | None:
    """The plan of one layer's call that ran before by what checks the rest of it itself, or None.

    By smaller keys than `plan` builds: the native library checks more than library matmuls do.
    """
    try:
        # True is equal to 1 as a key, but is no rank.
        if rank is None or type(rank) is int:
            given = _given(backend, training)
            if added is not None:
                given = given, _of_added(*added)
            if training or not x.is_cpu:  # on a CPU, library matmuls are then the likely ones
                found = _plans.get(_matmul_key(x, u, v, bias, rank, activation, given))
                if found is not None or not x.is_cpu:
                    return found
            found = _plans.get((x.shape, u.shape, x.dtype, rank, activation, given))
            if found is not None or training:
                return found
            return _plans.get(_matmul_key(x, u, v, bias, rank, activation, given))
    except _NO_KEY:
        pass  # `plan`, which comes next, says what is wrong
    return None


def _of_added(residual: Tensor | None, scale: Any, norm: Tensor | None, norm_eps: Any) -> Any:
    """What a plan of one layer depends on of what a plain call does not have."""
    found = _kind_of_scale(scale)
    if residual is not None:
        found = residual.shape, residual.device, residual.layout, found
    if norm is not None:
        of_norm = norm.shape, norm.dtype, norm.device, norm.layout
        found = *of_norm, type(norm_eps), norm_eps, found
    return found


def _given(backend: str | None, training: bool) -> tuple[Any, ...]:
    """What a choice depends on beside the layers."""
    return backend, training, _threads(), _is_deterministic()


def _matmul_key(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rank: Any,
    activation: Any,
    given: tuple[Any, ...],
) -> tuple[Any, ...]:
    where: Any
    if x.is_cpu:
        # A product with a meta tensor is none, and no error.
        where = u.is_cpu and v.is_cpu and (bias is None or bias.is_cpu)
    else:
        others = None if bias is None else bias.device
        where = x.device, u.device, v.device, others, x.is_cuda and is_capturing(x)
    of_bias = None if bias is None else bias.shape
    return x.shape, u.shape, v.shape, of_bias, where, x.dtype, rank, activation, given


def plan(call: Call, backend: str | None, training: bool = False, again: bool = False) -> Plan:
    """Validate an eager call and return its plan, from a cache where the same call was seen.

    A plan with rivals is a prediction; it is not remembered as the call's plan.

    Args:
        call: of public arguments.
        backend: None or "auto" to choose; a name to force it.
        training: its gradients will be computed.
        again: the call repeats one whose outputs were thrown away, as checkpointing does: what
            served that one serves this one, whatever was measured since.
    """
    try:
        key = _key(call, backend, training)
        found = _plans.get(key)
    except _NO_KEY:  # the check below says which
        return plan_afresh(call, backend, training)
    if again:
        found = _predicted.get(key, found)
    if found is None:
        found = plan_afresh(call, backend, training)
        if _met is not None and found.bucket:
            _met.append((call.xs[0].device, found.bucket))
        if found.rivals:
            _remember(_predicted, key, found)
            return found
        if again:
            return found
        _predicted.pop(key, None)
        _remember(_plans, key, found)
        if found.is_quick and backend in QUICK and call.fn == "lod_linear":
            x, u, v, bias, rank, activation = call.layer(0)
            given = _given(backend, training)
            if not call.is_plain:
                added = call.residual(0), call.scale(0), call.norm(0), call.norm_eps
                given = given, _of_added(*added)
            short = (x.shape, u.shape, x.dtype, rank, activation, given)
            if found.strategy != "fused":
                short = _matmul_key(x, u, v, bias, rank, activation, given)
            _remember(_plans, short, found)
    return found


def keep_prediction(call: Call, plan: Plan) -> Plan:
    """Let the prediction for a call stand, where measuring is over and has told nothing."""
    found = replace(plan, rivals=())
    _remember(_plans, _key(call, None, plan.mode.training), found)
    return found


def plan_afresh(call: Call, backend: str | None, training: bool = False) -> Plan:
    """Validate a call and plan it for exactly these tensors, layout of x included."""
    check_call(call, backend)
    mode = Mode(training, is_capturing(call.xs[0]))
    shared = len(call.xs) == 1
    return select(describe_call(call), backend, fn=call.fn, shared_x=shared, mode=mode)


def _remember(plans: dict[tuple[Any, ...], Plan], key: tuple[Any, ...], found: Plan) -> None:
    if len(plans) >= _MAX_PLANS:
        plans.clear()
    plans[key] = found


def _key(call: Call, backend: str | None, training: bool) -> tuple[Any, ...]:
    """What decides a plan. Every attribute read here is paid on every eager call."""
    fn, xs, us, vs, biases, ranks, activations, residuals, scales, norms, norm_eps = call
    tensors = (*xs, *us, *vs, *biases, *residuals, *norms)
    common = (
        fn,
        _given(backend, training),
        # A bool equals an int but is not a rank: the type keeps them apart.
        (ranks.shape, ranks.dtype, ranks.device)
        if isinstance(ranks, Tensor)
        else (*ranks, *map(type, ranks)),
        *activations,
        scales and tuple(map(_kind_of_scale, scales)),
        norms and (len(residuals), type(norm_eps), norm_eps),
    )
    if xs[0].is_cpu and backend != "triton":
        # A tensor without strides, or on a GPU, is refused by what runs on a CPU.
        return *common, *[
            t if t is None else (t.shape, t.dtype, t.stride(), t.is_meta) for t in tensors
        ]
    return *common, is_capturing(xs[0]), *[t if t is None else _layout(t) for t in tensors]


def _kind_of_scale(scale: Any) -> Any:
    """A number may change with every step, and decides nothing but whether H is scaled."""
    is_finite = type(scale) in (int, float) and scale - scale == 0
    return scale == 1 if is_finite else repr(scale)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    start = tensor.storage_offset() * tensor.element_size() % 16
    return tensor.shape, tensor.dtype, tensor.stride(), tensor.device, tensor.layout, start


def forget() -> None:
    """Read tables again and plan every call anew: another table is in use."""
    tuned.forget()
    choices.forget()
    replan()


# What `recording` gathers.
_met: list[tuple[torch.device, str]] | None = None


@contextmanager
def recording() -> Iterator[list[tuple[torch.device, str]]]:
    """Gather (device, bucket) of every kind of call that is met, whatever was remembered."""
    global _met
    replan()
    before, _met = _met, []
    try:
        yield _met
    finally:
        _met = before


def replan() -> None:
    """Plan every call anew: something else is known, or may decide."""
    _plans.clear()
    _predicted.clear()


def is_capturing(x: Any) -> bool:
    """Whether a CUDA graph is being captured on x's current stream; x is not validated yet."""
    return getattr(x, "is_cuda", False) and torch.cuda.is_current_stream_capturing()
