"""Any number of threads may call a layer, set its rank and measure meanwhile."""

import sys
import threading
import time

import pytest
import torch
from layer_support import plainly, siblings
from packing_support import FORMS, make, needs_library
from torch import nn
from torch.testing import assert_close

import maestro_kernels as mk
from maestro_kernels import tuned
from maestro_kernels.backends import packed
from maestro_kernels.measure import timing

RANKS = (6, 16)


@pytest.fixture
def switching():
    """Threads that take turns as often as the interpreter lets them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(n, work, seconds=0.7):
    """Run work(i) again and again in n threads; the first exception of any of them."""
    stop, errors = threading.Event(), []

    def loop(i):
        while not stop.is_set() and not errors:
            try:
                work(i)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return errors[0] if errors else None


MODELS = {
    **{f"prepacked {form.values[0]}": pytest.param(
        lambda form=form.values[0]: nn.ModuleDict({"only": mk.prepack(make(40, 24), form=form)}),
        marks=form.marks) for form in FORMS},
    "prepacked, chosen": lambda: nn.ModuleDict({"only": mk.prepack(make(40, 24))}),
    "as it is": lambda: nn.ModuleDict({"only": make(40, 24)}),
    "group": lambda: siblings(prepacked=False),
    "prepacked group": pytest.param(siblings, marks=needs_library),
    "prepacked group, chosen": lambda: siblings(None),
}  # fmt: skip


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_any_number_of_threads_may_call_and_set_ranks(build, switching):
    layers = build()
    xs = [torch.randn(m, 40) for m in (3, 3, 5, 9)]
    expected = {
        (name, i, r): plainly(layer, x, r)
        for name, layer in layers.items()
        for i, x in enumerate(xs)
        for r in RANKS
    }

    def work(i):
        if i == 4:
            for rank in RANKS:
                for layer in layers.values():
                    layer.rank = rank
            return
        with torch.no_grad():
            ys = {name: layer(xs[i]) for name, layer in layers.items()}
        for name, y in ys.items():
            near = [torch.allclose(y, expected[name, i, r], atol=1e-5) for r in RANKS]
            assert any(near), f"{name}: an output of no rank that was set"

    error = in_threads(5, work)
    if error is not None:
        raise error
    for rank in (*RANKS, RANKS[0]):
        for name, layer in layers.items():
            layer.rank = rank
            for i, x in enumerate(xs):
                with torch.no_grad():
                    assert_close(layer(x), expected[name, i, rank], atol=1e-5, rtol=1e-5)
            assert layer.active_rank.item() == layer.rank


@pytest.mark.parametrize("form", FORMS)
def test_a_rank_set_while_a_form_is_made_is_not_taken_for_another(form, monkeypatch):
    layer, x, others = mk.prepack(make(40, 24)), torch.randn(4, 40), [6]

    def choose_form(*_):
        # What another thread may do between the look at the values and the packing of them.
        if others:
            layer.rank = others.pop()
        return form

    monkeypatch.setattr(tuned, "choose_form", choose_form)
    with torch.no_grad():
        y = layer(x)
        assert any(torch.allclose(y, plainly(layer, x, r), atol=1e-5) for r in RANKS)
        for rank in (16, 6, 16):
            layer.rank = rank
            assert_close(layer(x), plainly(layer, x, rank), atol=1e-5, rtol=1e-5)


def test_the_buffer_ends_at_the_rank_that_was_set_last(switching):
    layer = make(40, 24)

    def work(i):
        layer.rank = RANKS[i % 2]

    assert in_threads(4, work, seconds=0.3) is None
    assert layer.active_rank.item() == layer.rank


def test_threads_of_one_group_find_their_own_outputs(switching):
    layers = siblings(prepacked=False)
    shared = layers["q_proj"].group
    xs = [torch.randn(4, 40) for _ in range(3)]
    expected = [[plainly(layer, x, 16) for layer in layers.values()] for x in xs]

    def work(i):
        with torch.no_grad():
            assert_close([layer(xs[i]) for layer in layers.values()], expected[i])

    error = in_threads(3, work, seconds=0.4)
    if error is not None:
        raise error
    assert shared.active


def test_one_thread_measures_while_others_use_the_factors(monkeypatch):
    measuring, finish, measured = threading.Event(), threading.Event(), []

    def interleave(calls, **_):
        measured.append(tuple(calls))
        measuring.set()
        assert finish.wait(60)
        return timing_original(calls, seconds=0.001, min_rounds=1)

    timing_original = timing.interleave
    monkeypatch.setattr(timing, "interleave", interleave)
    monkeypatch.setattr(packed, "_fastest", {})
    layer, x = mk.prepack(make(40, 24)), torch.randn(4, 40)

    def call():
        with torch.no_grad():
            layer(x)

    first = threading.Thread(target=call)
    first.start()
    with torch.no_grad():
        assert measuring.wait(60)
        for _ in range(3):
            assert_close(layer(x), plainly(layer, x, 16))
        assert layer.packed.choices == {}
        finish.set()
        first.join()
        assert_close(layer(x), plainly(layer, x, 16))
    assert len(measured) <= 2
    assert len(layer.packed.choices) <= 1
