"""Measuring at first use: the strategies of one kind of call against two matmuls, on the call met.

Short calls race each other before the first of them runs. Long ones would cost too much: there the
calls of the program itself take turns, each strategy for some of them, and their times decide. What
was measured is remembered by choices.py, so that all this happens once for a kind of call.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from maestro_kernels import choices, dispatch, hardware
from maestro_kernels.backends import matmul
from maestro_kernels.backends.native import ACTIVATION_CODES
from maestro_kernels.backends.workspace import fills_a_pool
from maestro_kernels.call import Call
from maestro_kernels.choices import Measured
from maestro_kernels.measure import timing
from maestro_kernels.measure.cost import Size, count
from maestro_kernels.ops import eager, gradient
from maestro_kernels.plans import Plan, backend_module
from maestro_kernels.tables import BASELINE, Mode

# What one race may take.
_SECONDS = 0.05
# Above so much work a call takes milliseconds on any CPU.
_LONG_FLOP = 2.5e8
# Calls of each strategy that take turns; the first of each is not counted.
_TURNS = 4
# Kinds of call of which a process compiles kernels to measure them.
_MAX_COMPILED = 64

_MakeClock = Callable[[], timing.Clock | timing.SmallGraphClock]

_measuring = threading.Lock()
# Bucket -> strategy -> seconds of the program's own calls.
_turns: dict[str, dict[str, list[float]]] = {}
# Bucket -> the thread that compiles what is to be measured for it.
_compiling: dict[str, threading.Thread] = {}
_is_thorough = False


def settle(plan: Plan, call: Call, save_h: bool) -> tuple[Plan, Callable[[], None] | None]:
    """(the plan that runs a call, what to call when it has run).

    Two threads do not measure at a time: each would measure the other. Meanwhile, while kernels are
    compiled, and while a CUDA graph is captured or warmed up, the prediction serves.
    """
    if plan.mode.captured or fills_a_pool(call.xs[0].device):
        return plan, None
    if len(_compiling) >= _MAX_COMPILED and plan.bucket not in _compiling and _compiles(plan):
        return dispatch.keep_prediction(call, plan), None
    if not _compiled(plan, call, save_h):
        return plan, None
    if not _measuring.acquire(blocking=_is_thorough):
        return plan, None
    try:
        plan = dispatch.plan(call, None, plan.mode.training)
        if not plan.rivals:  # another thread measured meanwhile
            return plan, None
        if not _is_long(plan):
            _race(plan, call, save_h)
        if _is_long(plan):
            return (plan, None) if eager.in_checkpoint() else _turn(plan)
    finally:
        _measuring.release()
    settled = dispatch.plan(call, None, plan.mode.training)
    return dispatch.keep_prediction(call, settled) if settled.rivals else settled, None


@contextmanager
def thoroughly() -> Iterator[None]:
    """Measure whatever is met, wait for it, and let no call of the program take turns."""
    global _is_thorough
    before, _is_thorough = _is_thorough, True
    try:
        yield
    finally:
        _is_thorough = before


def _is_long(plan: Plan) -> bool:
    """Whether a call takes so long that four of each strategy are too many to make for a race."""
    if _is_thorough:
        return False
    if plan.bucket in _turns:
        return True
    if plan.problems[0].device.type != "cpu":
        return False
    flops = count("two matmuls", [Size.of(p) for p in plan.problems], 4).flops
    return flops * (3 if plan.mode.training else 1) > _LONG_FLOP


def _by(plan: Plan, name: str) -> Plan:
    """The plan that runs a call by one strategy."""
    backend, _, strategy = name.partition(": ")
    return replace(plan, backend=backend, strategy=strategy, rivals=())


# --- short calls -----------------------------------------------------------------------------


def _race(plan: Plan, call: Call, save_h: bool) -> None:
    """Measure the strategies of a plan on its call, and remember their times.

    A captured call is only met when nothing may be measured, so an eager one is measured both ways.
    """
    halves = dispatch.rivals_of_halves(plan) if plan.mode.training else [[], []]
    clocks = _clocks(plan)
    seconds = _SECONDS / len(clocks) / (1 + sum(map(bool, halves)))
    for mode, clock in clocks:
        bucket = choices.bucket(plan.problems, mode, shared_x=plan.shared_x)
        run = partial(_one_race, plan, bucket, clock, 1.0 if _is_thorough else seconds)
        if any(halves):
            by_half = _candidates_of_halves(call, halves)
            for half, candidates in zip(dispatch.HALVES, by_half, strict=True):
                run(candidates, half=half)
        plans = {name: _by(plan, name) for name in (BASELINE, *plan.rivals)}
        combined = dispatch.halves(replace(plan, bucket=bucket)) if any(halves) else None
        if combined and combined != (BASELINE, BASELINE):
            plans |= {
                name + dispatch.WITH_HALVES: replace(one, halves=combined)
                for name, one in plans.items()
            }
        given_up = run({name: _candidate(one, call, save_h) for name, one in plans.items()})
        if given_up and mode == plan.mode:
            _turns[plan.bucket] = _nobody(plan)
            return


def _one_race(
    plan: Plan,
    bucket: str,
    clock: _MakeClock,
    seconds: float,
    candidates: dict[str, Callable[[], object]],
    half: str = "",
) -> bool:
    """Remember the times of candidates; whether they take too long for a race."""
    with _undisturbed(plan.mode.training and not half):
        found = timing.race(candidates, seconds=seconds, clock=clock())
    if BASELINE in found.seconds:
        us = {name: round(1e6 * s, 3) for name, s in found.seconds.items()}
        device = hardware.current_device(plan.problems[0].device)
        choices.remember(Measured(bucket + half, us), device, keep=found.decided)
    return found.given_up


def _candidates_of_halves(
    call: Call, halves: Sequence[Sequence[str]]
) -> list[dict[str, Callable[[], object]]]:
    """What computes dx and what computes the gradients of weights, of made-up gradients of y."""
    n_x, n = len(call.xs), call.n
    wanted = [t is not None and t.requires_grad for t in call.tensors]
    cuts = (0, n_x, n_x + n, n_x + 2 * n, n_x + 3 * n)
    needs: Any = tuple(any(wanted[a:b]) for a, b in itertools.pairwise(cuts))
    own = call.for_backend()
    with torch.no_grad():
        ys, hs = matmul.forward(own, save_h=True, strategy="")
        dys = [torch.ones_like(y) for y in ys]
        kept = gradient.kept_outputs(own, ys)
        _, _, *made = matmul.input_grads(own, dys, hs, kept, needs=needs, strategy="")

    def input_grads(name: str) -> object:
        backend, _, strategy = name.partition(": ")
        module = backend_module(backend)
        return module.input_grads(own, dys, hs, kept, needs=needs, strategy=strategy)

    def weight_grads(name: str) -> object:
        backend, _, strategy = name.partition(": ")
        module = backend_module(backend)
        return module.weight_grads(own, *made, needs=needs, strategy=strategy)

    return [
        {name: partial(compute, name) for name in (BASELINE, *names)}
        for compute, names in zip((input_grads, weight_grads), halves, strict=True)
    ]


def _clocks(plan: Plan) -> list[tuple[Mode, _MakeClock]]:
    """How a call is timed in each mode that its device has; a clock is made for each race."""
    device = plan.problems[0].device
    if device.type != "cuda":
        return [(plan.mode, timing.CpuClock)]
    l2 = hardware.current_device(device).l2_bytes or 0
    captured = plan.mode._replace(captured=True)
    return [(plan.mode, timing.CudaClock), (captured, partial(timing.SmallGraphClock, 2 * l2))]


def _candidate(plan: Plan, call: Call, save_h: bool) -> Callable[[], object]:
    """What a program waits for: the outputs, and in training the gradients that are asked for."""
    if not plan.mode.training:
        return _inference(plan, call)
    tensors = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in call.tensors]
    own = call.with_tensors(tensors)
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    dys: list[Tensor] = []

    def run() -> None:
        ys: Sequence[Tensor]
        if save_h and plan.autograd_serves:
            ys = gradient.forward(plan, own, True)[0]
        else:
            ys = gradient.apply(plan, own, save_h, *tensors)
        if not dys:
            dys.extend(map(torch.ones_like, ys))
        torch.autograd.grad(ys, leaves, dys, allow_unused=True)

    return run


def _inference(plan: Plan, call: Call) -> Callable[[], object]:
    """Without gradients; what ops/run.py's `quick` serves, by the calls that it makes."""
    if not (plan.is_quick and call.n == 1):
        return partial(gradient.forward, plan, call, False)
    x, u, v, bias, rank, activation = call.layer(0)
    added = call.residual(0), call.scale(0), call.norm(0), call.norm_eps
    r = v.shape[0] if rank is None else rank
    if plan.strategy == "fused":
        code = ACTIVATION_CODES[activation]
        more = () if call.is_plain else added
        return partial(plan.raw, x, u, v, bias, -1 if rank is None else rank, None, code, *more)
    if not call.is_plain and x.dim() != 2:
        return partial(gradient.forward, plan, call, False)
    if plan.backend == "matmul" and plan.products is not None and activation is None:
        return partial(plan.products, x, u, v, bias, r)
    if plan.backend == "matmul":
        return partial(matmul.layer, x, u, v, bias, r, activation, *added)

    def again() -> None:
        if plan.again(x, u, v, bias, r, activation) is None:
            gradient.forward(plan, call, False)

    return again


@contextmanager
def _undisturbed(training: bool) -> Iterator[None]:
    """Without the hooks of a checkpoint around the call, which would count what is saved here."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    with torch.set_grad_enabled(training):
        if not (training and hooks):
            yield
            return
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            yield


def _as_it_is(value: Any) -> Any:
    return value


# --- long calls ------------------------------------------------------------------------------


def _nobody(plan: Plan) -> dict[str, list[float]]:
    """No strategy had a turn yet."""
    return {name: [] for name in (BASELINE, *plan.rivals)}


def _turn(plan: Plan) -> tuple[Plan, Callable[[], None]]:
    """The strategy whose turn it is, and what notes its time."""
    seconds = _turns.setdefault(plan.bucket, _nobody(plan))
    name = min(seconds, key=lambda n: len(seconds[n]))
    place = plan.problems[0].device
    begin = _now(place)

    def done() -> None:
        seconds[name].append(_now(place) - begin)
        if min(map(len, seconds.values())) >= _TURNS and _turns.get(plan.bucket) is seconds:
            del _turns[plan.bucket]
            us = {n: round(1e6 * min(s[1:]), 3) for n, s in seconds.items()}
            choices.remember(Measured(plan.bucket, us), hardware.current_device(place))

    return _by(plan, name), done


def _now(place: torch.device) -> float:
    """Seconds, when everything asked of a device is done."""
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return time.perf_counter()


# --- where nothing can be measured yet ---------------------------------------------------------


def _compiled(plan: Plan, call: Call, save_h: bool) -> bool:
    """Whether the kernels that the rivals need are there; asks a thread to compile them if not."""
    if not _compiles(plan):
        return True
    thread = _compiling.get(plan.bucket)
    if thread is None:
        thread = threading.Thread(
            target=_compile, args=(plan, call, save_h), name="maestro_kernels compile", daemon=True
        )
        _compiling[plan.bucket] = thread
        thread.start()
    if _is_thorough:
        thread.join()
    return not thread.is_alive()


def _compiles(plan: Plan) -> bool:
    """Whether a rival's kernels are compiled when they first run."""
    families = {name.partition(": ")[0] for name in plan.rivals}
    return any(getattr(backend_module(name), "COMPILES", False) for name in families)


def _compile(plan: Plan, call: Call, save_h: bool) -> None:
    """Run each rival once, on a stream of its own; what it computes is thrown away."""
    stream = torch.cuda.Stream(call.xs[0].device) if call.xs[0].is_cuda else None
    with torch.cuda.stream(stream), torch.set_grad_enabled(plan.mode.training):
        for name in plan.rivals:
            try:
                _candidate(_by(plan, name), call, save_h)()
            except Exception:  # the race leaves it out
                continue
        if stream is not None:
            stream.synchronize()
