"""What a layer computes follows its values: across threads, siblings, checkpoints and memory."""

import gc
import sys
import threading
import time

import numpy as np
import pytest
import torch
from test_prepack import FORMS, check, make
from test_prepack_group import needs_library
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import maestro_kernels as mk
from maestro_kernels import tuned
from maestro_kernels.backends import onednn, packed
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


def siblings(form="fused", prepacked=True):
    layers = nn.ModuleDict({n: make(40, 24) for n in ("q_proj", "k_proj", "v_proj")}).eval()
    mk.group(layers)
    return mk.prepack(layers, form=form) if prepacked else layers


def plainly(layer, x, rank):
    with torch.no_grad():
        return mk.lod_linear(x, layer.u, layer.v, layer.bias, rank=rank, backend="reference")


# --- threads --------------------------------------------------------------------------------------

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


# --- prepack: how much is chosen and kept ---------------------------------------------------------


def test_forms_are_chosen_per_bucket_of_rows(monkeypatch):
    measured = []
    monkeypatch.setattr(
        packed, "fastest", lambda key, calls, wait: measured.append(key) or "unpacked"
    )
    layer = mk.prepack(make(40, 24))
    with torch.no_grad():
        for rows in range(1, 70):
            layer(torch.randn(rows, 40))
        layer(torch.randn(5000, 40))
        layer(torch.randn(9000, 40))
    assert list(layer.packed.choices) == [1, 2, 4, 8, 16, 32, 64, 128, 4096]
    assert len(measured) == 9
    assert layer.packed.choice(3) == "unpacked"
    assert layer.packed.choice(200) is None


@pytest.mark.skipif(onednn.unsupported(torch.float32) is not None, reason="no oneDNN")
@pytest.mark.parametrize(("form", "copies"), [("two oneDNN linears", 2), ("merged dense", 1)])
def test_one_reordered_copy_serves_every_number_of_rows(form, copies, monkeypatch):
    made, original = [], onednn.reorder
    monkeypatch.setattr(onednn, "reorder", lambda w, rows: made.append(w) or original(w, rows))
    layer = mk.prepack(make(40, 24), form=form)
    for rows in (1, 2, 3, 17, 64, 300):
        check(layer, torch.randn(rows, 40))
    assert len(made) == copies


def test_only_the_winner_is_packed_where_the_answer_is_known(monkeypatch):
    monkeypatch.setattr(packed, "fastest", lambda key, calls, wait: "unpacked")
    monkeypatch.setattr(packed, "make_form", lambda *_: pytest.fail("packed"))
    check(mk.prepack(make(40, 24)), torch.randn(4, 40))


def test_measurements_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(packed, "_MAX_REMEMBERED", 3)
    monkeypatch.setattr(packed, "_fastest", {})
    monkeypatch.setattr(timing, "interleave", lambda calls, **_: {"a": timing.Stats.of([1.0], 1)})
    for key in range(8):
        assert packed.fastest(key, {"a": lambda: None}) == "a"
    assert len(packed._fastest) <= 3


@pytest.mark.parametrize("build", [lambda: mk.prepack(make(40, 24)), lambda: siblings(None)])
def test_another_number_of_threads_is_chosen_for_anew(build, monkeypatch):
    asked = []

    def fastest(key, calls, wait):
        asked.append(torch.get_num_threads())
        return min(calls)

    monkeypatch.setattr(packed, "fastest", fastest)
    module, threads, x = build(), torch.get_num_threads(), torch.randn(4, 40)
    layers = list(module.values()) if isinstance(module, nn.ModuleDict) else [module]
    try:
        with torch.no_grad():
            for n in (threads, threads + 1, threads + 1):
                torch.set_num_threads(n)
                for layer in layers:
                    assert_close(layer(x), plainly(layer, x, 16), atol=1e-5, rtol=1e-5)
    finally:
        torch.set_num_threads(threads)
    before, after = asked.count(threads), asked.count(threads + 1)
    assert before == after > 0


# --- what is noticed, and what refresh is for -----------------------------------------------------


def behind_data(layer):
    layer.u.data.mul_(2)


def through_numpy(layer):
    layer.v.detach().numpy()[:] *= 2


def through_dlpack(layer):
    torch.from_dlpack(layer.v.detach()).mul_(2)


def by_a_storage_copy(layer):
    storage = layer.u.untyped_storage()
    storage.copy_(torch.randn(storage.nbytes() // 4).untyped_storage())


def in_place_to_the_vector(layer):
    layer.vector.mul_(1.5)


UNSEEN = [behind_data, through_numpy, through_dlpack, by_a_storage_copy, in_place_to_the_vector]


@pytest.mark.parametrize("change", UNSEEN)
@pytest.mark.parametrize("build", [
    pytest.param(lambda: {"only": mk.prepack(make(40, 24), form="fused")}, marks=needs_library),
    pytest.param(siblings, marks=needs_library),
    lambda: siblings(prepacked=False),
])  # fmt: skip
def test_refresh_says_that_values_changed(change, build):
    layers, x = build(), torch.randn(4, 40)
    layer = list(layers.values())[-1]
    layer.vector = parameters_to_vector(layer.parameters()).detach().clone()
    vector_to_parameters(layer.vector, layer.parameters())
    with torch.no_grad():
        before = [m(x) for m in layers.values()][-1]
        next(iter(layers.values()))(x)
        change(layer)
        mk.refresh(layer)
        assert_close(layer(x), plainly(layer, x, 16))
        assert not torch.equal(layer(x), before)


def test_refresh_takes_modules_only():
    with pytest.raises(TypeError, match=r"refresh: module: expected an nn\.Module, got list"):
        mk.refresh([make()])
    model = nn.Sequential(make(), nn.ReLU())
    assert mk.refresh(model) is model


@needs_library
def test_other_memory_is_noticed_though_it_lies_where_the_old_lay():
    layer, x = mk.prepack(make(40, 24), form="fused"), torch.randn(4, 40)
    addresses = []
    with torch.no_grad():
        for _ in range(20):
            # The memory between is free again at once, and the allocator likes to reuse it.
            layer.u.data = torch.empty(24, 16)
            layer.u.data = torch.randn(24, 16)
            addresses.append(layer.u.data_ptr())
            assert_close(layer(x), plainly(layer, x, 16))


def test_what_was_made_of_old_values_is_let_go():
    layer = mk.prepack(make(40, 24), form="unpacked")
    with torch.no_grad():
        layer(torch.randn(4, 40))
    held = layer.packed._state.made[0]
    assert held.u.data_ptr() == layer.u.data_ptr()
    layer.to(torch.bfloat16)
    assert layer.packed._state.made == ()


GROUPS = {
    "packed": pytest.param(siblings, marks=needs_library),
    "as it is": lambda: siblings(prepacked=False),
}


def activate(layer, x):
    layer.activation = "relu"


def other_u(layer, x):
    layer.u.data = torch.randn(24, 16)


def other_bias(layer, x):
    layer.bias.data = torch.randn(24)


def other_x(layer, x):
    x.data = torch.randn(4, 40)


@pytest.mark.parametrize("change", [activate, other_u, other_bias, other_x])
@pytest.mark.parametrize("build", GROUPS.values(), ids=GROUPS)
def test_a_change_between_siblings_counts(build, change):
    layers = build()
    x, last = torch.randn(4, 40), layers["v_proj"]
    with torch.no_grad():
        for _ in range(2):
            layers["q_proj"](x)
            change(last, x)
            expected = mk.lod_linear(x, last.u, last.v, last.bias, activation=last.activation)
            assert_close(last(x), expected)
            layers["k_proj"](x)


@pytest.mark.parametrize("build", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("what", ["u", "v", "bias", "x"])
def test_gradients_asked_for_between_siblings_are_given(build, what):
    layers = build().requires_grad_(False)
    x, last = torch.randn(4, 40), layers["v_proj"]
    layers["q_proj"](x)
    tensor = x if what == "x" else getattr(last, what)
    tensor.requires_grad_()
    last(x).sum().backward()
    assert tensor.grad is not None
    tensor.requires_grad_(False)
    layers["q_proj"](x)
    assert not layers["k_proj"](x).requires_grad


def test_a_backend_of_ones_own_is_respected_without_packing():
    layers, x = siblings(prepacked=False), torch.randn(4, 40)
    layers["v_proj"].backend = "reference"
    with torch.no_grad():
        for layer in layers.values():
            assert_close(layer(x), plainly(layer, x, 16))
            assert layers["q_proj"].group._own.waiting is None


def test_an_x_refilled_through_numpy_needs_refresh():
    values = np.ones((4, 40), dtype=np.float32)
    layers, x = siblings(prepacked=False), torch.from_numpy(values)
    with torch.no_grad():
        layers["q_proj"](x)
        values[:] = 3
        mk.refresh(layers)
        assert_close(layers["k_proj"](x), plainly(layers["k_proj"], x, 16))


# --- gradients of a group -------------------------------------------------------------------------


def training_pair():
    grouped = siblings(prepacked=False).train()
    alone = nn.ModuleDict({name: make(40, 24) for name in grouped}).train()
    alone.load_state_dict(grouped.state_dict())
    return grouped, alone


def gradients(module):
    return [p.grad for p in module.parameters()]


def in_turn(ys, retain=False):
    for y in ys:
        y.square().sum().backward(retain_graph=retain)


def only_one(ys):
    ys[1].sum().backward()


def together(ys):
    sum(y.square().sum() for y in ys).backward()


def two_then_one(ys):
    (ys[0].sum() + ys[2].square().sum()).backward()
    ys[1].sum().backward()


def again_where_kept(ys):
    in_turn(ys, retain=True)
    in_turn(ys)


@pytest.mark.parametrize("backward", [in_turn, only_one, together, two_then_one, again_where_kept])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_a_group_takes_the_backward_passes_that_layers_take(backward, activation):
    models = training_pair()
    found = []
    for model in models:
        for layer in model.values():
            layer.activation = activation
        x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
        h = x + 0
        backward([layer(h) for layer in model.values()])
        found.append([x.grad, *gradients(model)])
    assert [g is None for g in found[0]] == [g is None for g in found[1]]
    assert_close(*([g for g in grads if g is not None] for grads in found))


def test_a_second_backward_without_a_graph_is_refused_as_ever():
    model, _ = training_pair()
    x = torch.randn(5, 40)
    ys = [layer(x) for layer in model.values()]
    ys[0].sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        ys[0].sum().backward()
    ys[1].sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        ys[1].sum().backward()
    ys[2].sum().backward()


def test_factors_written_to_between_backward_passes_are_refused():
    model, _ = training_pair()
    x = torch.randn(5, 40)
    ys = [layer(x) for layer in model.values()]
    ys[0].sum().backward()
    with torch.no_grad():
        model["k_proj"].u.mul_(2)
    with pytest.raises(RuntimeError, match="written to"):
        ys[1].sum().backward()


def test_second_derivatives_of_one_sibling():
    found = []
    for model in training_pair():
        x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = [layer(x) for layer in model.values()][1]
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        first.square().sum().backward()
        found.append([x.grad, model["k_proj"].u.grad, model["k_proj"].v.grad])
    assert_close(*found)


def test_what_a_joint_backward_needed_is_freed():
    model, _ = training_pair()
    x = torch.randn(5, 40)
    ys = [layer(x) for layer in model.values()]
    node = ys[0].grad_fn
    together(ys)
    assert node.later is None
    ys = [layer(x) for layer in model.values()]
    node = ys[0].grad_fn
    in_turn(ys)
    assert node.later is None
    gc.collect()


# --- ranks under checkpointing and inference mode -------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
def test_a_checkpoint_computes_again_at_the_rank_of_its_forward(grouped):
    model = (
        siblings(prepacked=False) if grouped else nn.ModuleDict({"only": make(40, 24)})
    ).train()

    def run(x):
        return sum(layer(x).square().sum() for layer in model.values())

    def grads(rank, replay):
        for layer in model.values():
            layer.rank = rank
        model.zero_grad()
        x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss = checkpoint(run, x, use_reentrant=True) if replay else run(x)
        for layer in model.values():
            layer.rank = 16
        loss.backward()
        return [x.grad, *gradients(model)]

    assert_close(grads(6, True), grads(6, False))


def test_forwards_that_wait_together_keep_their_ranks():
    layer = make(40, 24).train()
    x = torch.randn(5, 40, requires_grad=True)
    losses = []
    for rank in (3, 9, 5):
        layer.rank = rank
        losses.append(checkpoint(lambda x: layer(x).sum(), x * 1, use_reentrant=True))
    for rank, loss in zip((3, 9, 5), losses, strict=True):
        layer.zero_grad()
        loss.backward()
        assert layer.v.grad[:rank].abs().min() > 0
        assert layer.v.grad[rank:].abs().max() == 0


def test_a_rank_set_inside_a_checkpoint_is_refused_by_name():
    layer = make(40, 24).train()

    def run(x):
        layer.rank = 4
        x = layer(x)
        layer.rank = 8
        return (layer(torch.randn(5, 40)) + x).sum()

    loss = checkpoint(run, torch.randn(5, 40, requires_grad=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"LoDLinear\.forward: rank: expected one rank"):
        loss.backward()


def test_other_checkpoints_refuse_another_rank_themselves():
    layer = make(40, 24).train()
    loss = checkpoint(layer, torch.randn(5, 40, requires_grad=True), use_reentrant=False).sum()
    layer.rank = 4
    with pytest.raises(RuntimeError, match="different metadata"):
        loss.backward()


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_layer_built_under_inference_mode_takes_a_rank_outside(kind):
    with torch.inference_mode():
        layer = make(40, 24) if kind == "linear" else mk.LoDConv2d(8, 8, 3)
        moved = make(40, 24).to(torch.bfloat16)
    for made in (layer, moved):
        made.rank = 5
        assert (made.rank, made.active_rank.item()) == (5, 5)
    with torch.inference_mode():
        layer.rank = 3
    assert layer.active_rank.item() == 3


# --- inputs that are no plain tensors -------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, of the inputs made here
@pytest.mark.parametrize("build", [
    *(pytest.param(lambda form=f.values[0]: mk.prepack(make(40, 24), form=form), marks=f.marks)
      for f in FORMS),
    pytest.param(lambda: siblings()["q_proj"], marks=needs_library),
    lambda: siblings(None)["q_proj"],
    lambda: siblings(prepacked=False)["q_proj"],
])  # fmt: skip
def test_odd_inputs_get_the_errors_of_a_call(build):
    layer = build()
    x = torch.randn(4, 40)
    freed = torch.randn(4, 40)
    freed.untyped_storage().resize_(0)
    odd = {
        "none": None,
        "list": [1.0] * 40,
        "sparse": x.to_sparse(),
        "sparse rows": x.to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
        "nested": torch.nested.nested_tensor([torch.randn(2, 40), torch.randn(3, 40)]),
        "jagged": torch.nested.nested_tensor(
            [torch.randn(2, 40), torch.randn(3, 40)], layout=torch.jagged
        ),
        "freed": freed,
    }
    with torch.no_grad():
        for _ in range(2):
            for name, value in odd.items():
                with pytest.raises((TypeError, ValueError, NotImplementedError)) as caught:
                    layer(value)
                assert "lod_linear" in str(caught.value), name
                assert ": x: expected " in str(caught.value), name
            assert_close(layer(x), plainly(layer, x, 16))


@pytest.mark.parametrize("build", [
    lambda: mk.prepack(make(40, 24)), lambda: siblings(None)["q_proj"], lambda: make(40, 24),
])  # fmt: skip
def test_freed_factors_get_the_errors_of_a_call(build):
    layer, x = build(), torch.randn(4, 40)
    with torch.no_grad():
        layer(x)
        layer.v.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=r"lod_linear: v: expected "):
            layer(x)
