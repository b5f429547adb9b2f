"""prepack: right values in every form, and a changed factor is noticed however it changed."""

import copy
import pickle
import warnings

import pytest
import torch
from packing_support import CHANGES, FORMS, check, make
from torch import nn

import maestro_kernels as mk
from maestro_kernels import tuned
from maestro_kernels.backends import native, packed
from maestro_kernels.nn.packing import unpack


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", None])
def test_every_form_computes_the_layer(form, dtype, activation):
    layer = make(activation=activation, dtype=dtype, bias=activation != "relu")
    mk.prepack(layer, form=form)
    for shape in ((1, 40), (37, 40), (2, 3, 40), (40,)):
        check(layer, torch.randn(shape).to(dtype), str(shape))
    for rank in (0, 1, 7, 16):
        layer.rank = rank
        check(layer, torch.randn(5, 40).to(dtype), f"rank {rank}")


@pytest.mark.parametrize("form", FORMS)
def test_form_that_ran_is_the_form_that_was_asked_for(form):
    layer = mk.prepack(make(), form=form)
    check(layer, torch.randn(4, 40))
    taken = set(layer.packed.choices.values())
    assert taken == {form}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_factors_are_packed_again(form, change):
    layer = mk.prepack(make(), form=form)
    x = torch.randn(6, 40)
    before = check(layer, x)
    change(layer)
    after = check(layer, x)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("form", FORMS)
def test_inference_mode_parameters(form):
    with torch.inference_mode():
        layer = make()
    assert layer.u.is_inference()
    mk.prepack(layer, form=form)
    with torch.inference_mode():
        check(layer, torch.randn(6, 40))
        layer.load_state_dict(make().state_dict() | {"v": torch.randn(16, 40)})
        check(layer, torch.randn(6, 40))


def test_without_a_form_the_fastest_is_measured_once_per_size(monkeypatch):
    measured = []
    original = packed.fastest

    def fastest(key, candidates, wait=False):
        measured.append((key, set(candidates)))
        return original(key, candidates, wait=wait)

    monkeypatch.setattr(packed, "fastest", fastest)
    layer = mk.prepack(make(), rows=[1, 8])
    assert set(layer.packed.choices) == {1, 8}
    assert len(measured) == 2
    assert all("unpacked" in names for _, names in measured)
    check(layer, torch.randn(8, 40))
    assert len(measured) == 2
    check(layer, torch.randn(3, 40))
    assert set(layer.packed.choices) == {1, 4, 8}
    check(layer, torch.randn(7, 40))
    assert len(measured) == 3
    assert f"prepacked: {layer.packed.choices[1]}" in str(mk.summary(layer))


@pytest.mark.parametrize("form", FORMS)
def test_a_table_answers_without_a_measurement(form, monkeypatch):
    asked = []
    monkeypatch.setattr(tuned, "choose_form", lambda *size: asked.append(size) or form)
    monkeypatch.setattr(packed, "fastest", lambda *_: pytest.fail("measured"))
    layer = mk.prepack(make())
    check(layer, torch.randn(6, 40))
    assert asked == [(24, 40, 16, 8, torch.float32)]
    assert layer.packed.choices == {8: form}


def test_the_result_of_a_measurement_serves_layers_of_the_same_size(monkeypatch):
    from maestro_kernels.measure import timing

    calls = []
    original = timing.interleave
    monkeypatch.setattr(timing, "interleave", lambda *a, **k: calls.append(1) or original(*a, **k))
    packed._fastest.clear()
    model = nn.Sequential(make(32, 32, 8), make(32, 32, 8), make(32, 32, 8)).eval()
    mk.prepack(model, rows=2)
    assert len(calls) == 1


def test_forms_that_lost_are_freed():
    layer = mk.prepack(make(), rows=[1, 4, 64])
    state = layer.packed._state
    assert set(state.choices) == {1, 4, 64}
    assert set(state.forms) == set(state.choices.values()) - {"unpacked"}


def test_calls_that_want_gradients_use_the_factors():
    layer = mk.prepack(make())
    x = torch.randn(4, 40)
    y = layer(x)
    y.sum().backward()
    assert layer.u.grad is not None
    assert layer.packed.choices == {}
    x.requires_grad_(True)
    for p in layer.parameters():
        p.requires_grad_(False)
    layer(x).sum().backward()
    assert x.grad is not None


def test_autocast_compile_and_other_dtypes_use_the_factors():
    layer = mk.prepack(make())
    x = torch.randn(4, 40)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"lod_linear: .*expected"):
            layer(x.bfloat16())
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), layer(x), atol=1e-5)
    layer.backend = "reference"
    with torch.no_grad():
        layer(x)
    assert 4 in layer.packed.choices or layer.packed.choices == {}


def test_empty_batches_and_wrong_widths_behave_as_before():
    layer = mk.prepack(make())
    with torch.no_grad():
        assert layer(torch.randn(0, 40)).shape == (0, 24)
        with pytest.raises(ValueError, match="lod_linear: v: expected shape"):
            layer(torch.randn(4, 39))


@pytest.mark.parametrize("form", [None, "fused"])
def test_groups_run_packed(form):
    if form == "fused" and native.load_error() is not None:
        pytest.skip("no native library")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (
                make(40, 24),
                make(40, 8, 8),
                make(40, 16, 16, 5),
            )

        def forward(self, x):
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    block = Block().eval()
    x = torch.randn(2, 5, 40)
    with torch.no_grad():
        mk.group(block)
        expected = block(x)
        mk.prepack(block, form=form)
        for got, want in zip(block(x), expected, strict=True):
            assert torch.allclose(got, want, atol=1e-5)
        shared = block.q_proj.group.packed
        assert set(shared.choices) == {16}
        block.v_proj.u.mul_(2)
        after = block(x)
        assert torch.allclose(
            after[2] - block.v_proj.bias, 2 * (expected[2] - block.v_proj.bias), atol=1e-5
        )
        unpack(block)
        assert block.q_proj.group.packed is None
        assert torch.allclose(block(x)[2], after[2], atol=1e-5)


@pytest.mark.skipif(native.load_error() is not None, reason="no native library")
@pytest.mark.parametrize("choice", ["one by one", "fused"])
def test_a_group_computes_together_only_where_that_was_chosen(choice, monkeypatch):
    block = nn.ModuleDict({"q_proj": make(40, 24), "k_proj": make(40, 8, 8), "v_proj": make(40)})
    mk.prepack(mk.group(block.eval()))
    shared, x = block["q_proj"].group, torch.randn(6, 40)
    monkeypatch.setattr(
        packed, "fastest", lambda key, calls, wait: choice if choice in calls else "unpacked"
    )
    with torch.no_grad():
        for layer in block.values():
            layer(x)
        assert shared.packed.choices == {8: choice}
        block["q_proj"](x)
        assert (shared._own.waiting is None) == (choice == "one by one")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.skipif(native.load_error() is not None, reason="no native library")
def test_layers_that_run_one_by_one_are_not_compared_as_a_group_again(monkeypatch):
    block = nn.ModuleDict({"q_proj": make(40, 24), "k_proj": make(40, 8, 8), "v_proj": make(40)})
    mk.prepack(mk.group(block.eval()))
    shared, x = block["q_proj"].group, torch.randn(6, 40)
    asked, compared = [], []
    current = type(shared)._current

    def fastest(key, calls, wait):
        asked.append(key)
        return "one by one" if "one by one" in calls else "fused"

    def counted(self, layer, rank):
        if self is shared:
            compared.append(layer)
        return current(self, layer, rank)

    monkeypatch.setattr(packed, "fastest", fastest)
    monkeypatch.setattr(type(shared), "_current", counted)

    def run(x=x):
        compared.clear()
        with torch.no_grad():
            for layer in block.values():
                check(layer, x)
        return len(compared)

    assert run() == 1
    assert run() == 0
    assert run(torch.randn(2, 3, 40)) == 1
    block["k_proj"].rank = 3
    before = len(asked)
    # q_proj ran by itself before k_proj noticed its own rank.
    assert run() == 1
    assert len(asked) > before
    assert run() <= 1
    assert run() == 0
    mk.refresh(block)
    assert run() == 1
    nested = torch.nested.nested_tensor([torch.randn(6, 40)])
    with torch.no_grad(), pytest.raises(TypeError, match="x: expected"):
        block["q_proj"](nested)


def test_copies_pickles_and_state_dicts_hold_no_packed_bytes():
    layer = mk.prepack(make(), form="unpacked")
    keys = set(layer.state_dict())
    mk.prepack(layer, rows=4)
    assert set(layer.state_dict()) == keys
    twin = copy.deepcopy(layer)
    again = pickle.loads(pickle.dumps(layer))
    x = torch.randn(4, 40)
    for other in (twin, again):
        assert other.packed is not layer.packed
        assert other.packed.choices == {}
        with torch.no_grad():
            other.u.mul_(-1)
        check(other, x)
    check(layer, x)


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"prepack: model: expected an nn\.Module, got str"):
        mk.prepack("model")
    with pytest.raises(ValueError, match="prepack: form: expected one of"):
        mk.prepack(make(), form="fast")
    with pytest.raises(ValueError, match="prepack: rows: expected an int >= 1"):
        mk.prepack(make(), rows=0)


def test_layers_elsewhere_are_left_alone_with_a_warning():
    layer = mk.LoDLinear(8, 8, device="meta")
    with pytest.warns(UserWarning, match="prepack: layers on meta stay as they are"):
        mk.prepack(layer)
    assert layer.packed is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mk.prepack(make())
