"""Prepacked groups and odd inputs: every change is noticed, between calls and between siblings."""

import copy
import pickle

import pytest
import torch
from layer_support import siblings
from packing_support import CHANGES, FORMS, check, check_output, make, needs_library
from torch import nn
from torch.nn.utils import parametrize

import maestro_kernels as mk
from maestro_kernels.backends import native, packed
from maestro_kernels.nn import packing


def replace_bias(layer):
    layer.bias = nn.Parameter(torch.randn(24))


def write_bias(layer):
    with torch.no_grad():
        layer.bias.add_(1)


def drop_bias(layer):
    layer.bias = None


def replace_v(layer):
    layer.v = nn.Parameter(torch.randn(16, 40))


def move_u(layer):
    # Same tensor, same version, other memory.
    layer.u.data = torch.randn(24, 16)


def move_v(layer):
    layer.v.data = torch.randn(16, 40)


def activate(layer):
    layer.activation = "relu"


ALL_CHANGES = [
    *CHANGES,
    *(replace_bias, write_bias, drop_bias, replace_v, move_u, move_v, activate),
]


@needs_library
@pytest.mark.parametrize("change", ALL_CHANGES)
@pytest.mark.parametrize("name", ["q_proj", "v_proj"])
def test_a_changed_layer_of_a_group_is_noticed(change, name):
    layers = siblings()
    x = torch.randn(6, 40)
    with torch.no_grad():
        before = {n: layer(x) for n, layer in layers.items()}
        change(layers[name])
        after = {n: layer(x) for n, layer in layers.items()}
    assert layers["q_proj"].group.packed.choices == {8: "fused"}
    for n, layer in layers.items():
        check_output(layer, x, after[n])
        assert torch.equal(before[n], after[n]) == (n != name)


@needs_library
@pytest.mark.parametrize("change", ALL_CHANGES)
def test_a_change_between_siblings_is_noticed(change):
    layers = siblings()
    x = torch.randn(6, 40)
    with torch.no_grad():
        layers["q_proj"](x)
        stale = layers["q_proj"].group._own.waiting.outputs[2]
        change(layers["v_proj"])
        after = layers["v_proj"](x)
    check_output(layers["v_proj"], x, after)
    assert not torch.equal(after, stale)


@needs_library
def test_waiting_outputs_are_handed_out_once_and_are_the_ones_computed():
    layers = siblings()
    x = torch.randn(6, 40)
    with torch.no_grad():
        layers["q_proj"](x)
        waiting = dict(layers["q_proj"].group._own.waiting.outputs)
        assert layers["k_proj"](x) is waiting[1]
        assert layers["v_proj"](x) is waiting[2]
    assert layers["q_proj"].group._own.waiting is None


@needs_library
def test_a_written_input_and_another_mode_are_noticed_between_siblings():
    layers = siblings()
    x = torch.randn(6, 40)
    with torch.no_grad():
        layers["q_proj"](x)
        x.mul_(2)
        check_output(layers["k_proj"], x, layers["k_proj"](x))
    assert layers["k_proj"](x).requires_grad
    with torch.no_grad():
        layers["q_proj"](x)
        with torch.autocast("cpu", torch.bfloat16):
            assert layers["k_proj"](x).dtype == torch.bfloat16


@needs_library
def test_outputs_of_a_group_can_be_written_to():
    layers = siblings()
    x = torch.randn(6, 40)
    with torch.no_grad():
        layers["q_proj"](x).fill_(7)
        check_output(layers["k_proj"], x, layers["k_proj"](x))
        check_output(layers["v_proj"], x, layers["v_proj"](x))


@needs_library
def test_inference_mode():
    with torch.inference_mode():
        layers = siblings()
        x = torch.randn(6, 40)
        assert x.is_inference()
        for _ in range(2):
            for layer in layers.values():
                check_output(layer, x, layer(x))
            layers["k_proj"].bias = nn.Parameter(torch.randn(24))


@needs_library
def test_one_inference_tensor_among_others_hides_no_write():
    layers = siblings()
    with torch.inference_mode():
        frozen = nn.Parameter(torch.randn(24))
    x = torch.randn(6, 40)
    with torch.no_grad():
        layers["k_proj"].bias = frozen
        for layer in layers.values():
            check_output(layer, x, layer(x))
        layers["k_proj"].u.mul_(3)
        for layer in layers.values():
            check_output(layer, x, layer(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grouped", [False, True])
def test_inputs_of_every_layout(form, grouped):
    layers = siblings(form) if grouped else {"only": mk.prepack(make(40, 24), form=form)}
    wide = torch.randn(5, 60)
    forms = {
        "plain": torch.randn(5, 40),
        "plain batch": torch.randn(5, 3, 40),
        "rows of a wider one": wide[:, 7:47],
        "columns": torch.randn(40, 5).T,
        "every other row": torch.randn(10, 40)[::2],
        "every other element": torch.randn(5, 80)[:, ::2],
        "transposed batch": torch.randn(3, 5, 40).transpose(0, 1),
        "expanded": torch.randn(1, 40).expand(5, 40),
        "one row": torch.randn(40),
        "batches": torch.randn(2, 3, 40),
        "many dimensions": torch.randn(*(1,) * 18, 5, 40),
    }
    for _ in range(2):
        for name, x in forms.items():
            for layer in layers.values():
                y = check(layer, x, name)
                assert y.shape == (*x.shape[:-1], 24)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grouped", [False, True])
def test_a_parametrised_bias_runs_unpacked_with_its_gradient(form, grouped):
    class Twice(nn.Module):
        def forward(self, bias):
            return 2 * bias

    layers = siblings(form) if grouped else {"only": mk.prepack(make(40, 24), form=form)}
    layer = list(layers.values())[-1]
    x = torch.randn(6, 40)
    with torch.no_grad():
        before = layer(x)
        parametrize.register_parametrization(layer, "bias", Twice())
        y = layer(x)
    check_output(layer, x, y)
    assert not torch.equal(y, before)
    for parameter in layers.parameters() if grouped else layer.parameters():
        parameter.requires_grad_(False)
    original = layer.parametrizations.bias.original.requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(original.grad, torch.full((24,), 12.0))


@pytest.mark.parametrize("form", FORMS)
def test_a_bias_that_is_no_parameter_counts(form):
    layer = mk.prepack(make(40, 24, bias=False), form=form)
    x = torch.randn(6, 40)
    check(layer, x)
    del layer.bias
    layer.bias = torch.randn(24)
    check(layer, x)


@needs_library
def test_a_new_bias_packs_nothing_again(monkeypatch):
    layers, layer, x = siblings(), mk.prepack(make(40, 24), form="fused"), torch.randn(6, 40)
    members = (*layers.values(), layer)
    for member in members:
        check(member, x)
    monkeypatch.setattr(native, "pack", lambda *_: pytest.fail("packed again"))
    for change in (replace_bias, write_bias, drop_bias):
        for member in members:
            change(member)
        for member in members:
            check(member, x)


@needs_library
def test_a_backend_of_ones_own_is_respected_by_a_group():
    layers = siblings()
    x = torch.randn(6, 40)
    with torch.no_grad():
        for backend in (None, "reference", None):
            for layer in layers.values():
                layer.backend = backend
            for layer in layers.values():
                check_output(layer, x, layer(x))
            choices = layers["q_proj"].group.packed.choices
            assert choices == ({8: "fused"} if backend is None else {})


@needs_library
def test_wrong_inputs_of_a_group_are_named():
    layers = siblings()
    with torch.no_grad():
        layers["q_proj"](torch.randn(6, 40))
        with pytest.raises(ValueError, match=r"lod_linear_grouped: .*expected"):
            layers["q_proj"](torch.randn(6, 39))
        layers = siblings()
        with pytest.raises(TypeError, match=r"lod_linear_grouped: .*expected"):
            layers["q_proj"](torch.randn(6, 40).bfloat16())
        assert siblings()["q_proj"](torch.randn(0, 40)).shape == (0, 24)


@needs_library
def test_a_group_of_two_dtypes_is_refused_in_the_validators_words():
    layers = siblings()
    layers["k_proj"].to(torch.bfloat16)
    with torch.no_grad(), pytest.raises(TypeError, match=r"lod_linear_grouped: .*expected"):
        layers["q_proj"](torch.randn(6, 40))


@needs_library
@pytest.mark.parametrize("choice", ["one by one", "fused"])
def test_the_form_of_a_group_that_lost_is_freed(choice, monkeypatch):
    def fastest(key, calls, wait):
        for call in calls.values():
            call()
        return choice if choice in calls else "unpacked"

    monkeypatch.setattr(packed, "fastest", fastest)
    layers = siblings(None)
    x = torch.randn(2, 3, 40)
    with torch.no_grad():
        for _ in range(2):
            for layer in layers.values():
                check_output(layer, x, layer(x))
    shared = layers["q_proj"].group.packed
    assert shared.choices == {8: choice}
    assert set(shared._state.forms) == ({"fused"} if choice == "fused" else set())
    assert list(shared._state.runs.values()) == list(shared._state.forms.values())


@needs_library
def test_shapes_of_inputs_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(packing, "_MAX_SHAPES", 3)
    layer, layers = mk.prepack(make(), form="fused"), siblings()
    for rows in range(1, 9):
        check(layer, torch.randn(rows, 40))
        for member in layers.values():
            check(member, torch.randn(rows, 40))
    assert len(layer.packed._state.runs) <= 3
    assert len(layers["q_proj"].group.packed._state.runs) <= 3
    check(layer, torch.randn(2, 40))


@needs_library
def test_copies_and_pickles_of_a_group_hold_no_outputs_and_no_bytes():
    layers = siblings()
    x = torch.randn(6, 40)
    with torch.no_grad():
        layers["q_proj"](x)
        for other in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
            shared = other["q_proj"].group
            assert shared is other["v_proj"].group
            assert shared is not layers["q_proj"].group
            assert shared.layers == list(other.values())
            assert shared._own.waiting is None
            assert shared.packed.choices == {}
            other["v_proj"].u.mul_(-1)
            for layer in other.values():
                check_output(layer, x, layer(x))
            assert shared.packed.choices == {8: "fused"}
        check_output(layers["v_proj"], x, layers["v_proj"](x))


@needs_library
def test_compiled_groups_use_the_factors():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = make(40, 24), make(40, 8, 8)

        def forward(self, x):
            return self.q_proj(x), self.k_proj(x)

    model = mk.prepack(mk.group(Block().eval()), form="fused")
    x = torch.randn(6, 40)
    with torch.no_grad():
        expected = model(x)
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@needs_library
def test_a_packed_call_is_given_the_bytes_the_input_and_the_biases_only(monkeypatch):
    """What a cold call has to touch is what it is given."""
    given = []
    original = native.raw

    def raw(name):
        call = original(name)
        return lambda *arguments: given.append((name, arguments)) or call(*arguments)

    monkeypatch.setattr(packed.native, "raw", raw)
    layers = siblings()
    x = torch.randn(6, 40)
    with torch.no_grad():
        for layer in layers.values():
            layer(x)
    grouped = [arguments for name, arguments in given if name == "packed_grouped"]
    assert len(grouped) == 1
    (held, of, biases) = grouped[0]
    assert held.dtype == torch.uint8
    assert of is x
    assert [id(b) for b in biases] == [id(layer.bias) for layer in layers.values()]
