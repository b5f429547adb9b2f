"""convert and to_dense: ranks, what a converted model keeps, data-aware factors."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from convert_support import assert_unchanged, kinds, mlp, snapshot
from torch import nn
from torch.testing import assert_close

from maestro_kernels.nn import LoDConv2d, LoDLayer, LoDLinear, conversion_report, convert, to_dense
from maestro_kernels.nn.moments import input_moments

# --- ranks ----------------------------------------------------------------------------------------

BREAK_EVEN = 16 * 24 / (16 + 24)  # 9.6


@pytest.mark.parametrize(
    ("rank", "multiple_of", "expected"),
    [
        (5, 1, 5),
        (5, 4, 8),
        (1.0, 1, 9),
        (0.5, 1, 4),
        (0.5, 3, 3),
        (0.01, 1, 1),
        (0.01, 4, 4),
        ({"*": 3}, 1, 3),
        (lambda name, module: module.out_features // 8, 1, (3, 2)),
    ],
)
def test_rank_of_each_layer(rank, multiple_of, expected):
    model = convert(mlp(), rank, multiple_of=multiple_of)
    first, second = expected if isinstance(expected, tuple) else (expected, expected)
    assert (model[0].rank, model[2].rank) == (first, second)
    assert (model[0].max_rank, model[2].max_rank) == (first, second)


def test_a_fraction_is_not_lost_to_rounding():
    for percent in (29, 57, 58):
        assert int(percent / 100 * 100) == percent - 1
        assert convert(nn.Linear(200, 200), percent / 100).rank == percent


def test_full_rank_and_more_need_allow_larger():
    for rank in (None, 16, 1000):
        model = convert(mlp(dtype=torch.float64), rank, allow_larger=True)
        assert (model[0].rank, model[2].rank) == (16, 16)
    source = mlp(dtype=torch.float64)
    x = torch.randn(3, 16, dtype=torch.float64)
    expected = source(x)
    assert_close(convert(source, allow_larger=True)(x), expected)


def test_layers_whose_factors_would_not_be_smaller_stay():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    convert(model, 31)
    assert model[0].rank == 31
    assert type(model[1]) is nn.Linear
    assert conversion_report(model).kept == {
        "1": "factors of rank 8 hold 576 weights, the dense layer 512 (break-even rank 7.1)"
    }
    # Equal is not smaller: 32 * (64 + 64) = 64 * 64.
    with pytest.raises(ValueError, match="factors of rank 32 hold 4096 weights"):
        convert(nn.Linear(64, 64), 32)


def test_the_first_matching_pattern_counts_and_dense_is_a_rank():
    model = nn.Sequential(mlp(), mlp(), mlp())
    convert(model, {"0.2": "dense", "0": 2, "1.*": 0.5, "2.0": None, "*.0": 7}, allow_larger=True)
    ranks = {name: m.rank for name, m in model.named_modules() if isinstance(m, LoDLayer)}
    assert ranks == {"0.0": 2, "1.0": 4, "1.2": 4, "2.0": 16}
    assert conversion_report(model).kept == {
        "0.2": "asked to stay dense",
        "2.2": "no pattern in rank matches it",
    }


def test_asking_for_dense_everywhere_is_granted():
    model = mlp()
    assert convert(model, "dense") is model
    assert kinds(model) == kinds(mlp())


@pytest.mark.parametrize(
    ("include", "exclude", "converted"),
    [
        ("0", None, {"0.0", "0.2"}),
        ("*.0", None, {"0.0", "1.0"}),
        (["0.0", "1.2"], None, {"0.0", "1.2"}),
        (None, "1", {"0.0", "0.2"}),
        ("0", ["*.2"], {"0.0"}),
        (lambda name, module: module.in_features == 24, None, {"0.2", "1.2"}),
        (None, lambda name, module: name == "0.0", {"0.2", "1.0", "1.2"}),
    ],
)
def test_include_and_exclude(include, exclude, converted):
    model = nn.Sequential(mlp(), mlp())
    convert(model, 2, include=include, exclude=exclude)
    assert {n for n, m in model.named_modules() if isinstance(m, LoDLinear)} == converted
    report = conversion_report(model)
    assert set(report.converted) == converted
    assert set(report.kept.values()) <= {"excluded", "not included"}


# --- what a converted model keeps -----------------------------------------------------------------


def test_mode_dtype_gradients_and_bias_are_kept():
    model = mlp(dtype=torch.bfloat16)
    model[0].eval()
    model[2].weight.requires_grad_(False)
    biases = [model[0].bias, model[2].bias]
    convert(model, 4)
    assert (model[0].training, model[2].training, model.training) == (False, True, True)
    assert model[0].u.dtype == torch.bfloat16
    assert (model[0].u.requires_grad, model[2].u.requires_grad) == (True, False)
    assert model[2].bias.requires_grad
    assert [model[0].bias, model[2].bias] == biases
    assert model[0].bias is biases[0]


def test_call_hooks_move_to_the_new_layer_and_can_still_be_removed():
    model = mlp()
    seen = []
    handles = [
        model[0].register_forward_hook(lambda m, a, y: seen.append(type(m))),
        model[0].register_forward_pre_hook(lambda m, a: seen.append("pre")),
        model[0].register_full_backward_hook(lambda m, gx, gy: seen.append("backward")),
    ]
    convert(model, 4)
    x = torch.randn(2, 16, requires_grad=True)
    model(x).sum().backward()
    assert seen == ["pre", LoDLinear, "backward"]
    for handle in handles:
        handle.remove()
    model(x)
    assert len(seen) == 3


def test_a_copy_shares_nothing_with_the_model():
    model = mlp()
    before = snapshot(model)
    made = convert(model, 4, inplace=False)
    assert_unchanged(model, before)
    assert kinds(made) == ["LoDLinear", "ReLU", "LoDLinear", "ReLU"]
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in made.parameters()}
    twin = convert(copy.deepcopy(model), 4)
    x = torch.randn(3, 16)
    assert torch.equal(made(x), twin(x))
    dense = to_dense(made, inplace=False)
    assert kinds(made)[0] == "LoDLinear"
    assert not {p.data_ptr() for p in made.parameters()} & {
        p.data_ptr() for p in dense.parameters()
    }


def test_the_model_itself_may_be_a_layer():
    source = nn.Linear(16, 24, dtype=torch.float64)
    made = convert(source, 4)
    assert isinstance(made, LoDLinear)
    assert type(source) is nn.Linear
    x = torch.randn(3, 16, dtype=torch.float64)
    back = to_dense(made)
    assert type(back) is nn.Linear
    assert_close(back(x), made(x))


def test_a_converted_model_pickles_with_its_report():
    model = pickle.loads(pickle.dumps(convert(mlp(), 4)))
    assert conversion_report(model).converted == {"0": 4, "2": 4}
    assert str(conversion_report(model)) == "0: rank 4\n2: rank 4"


def test_to_dense_merges_the_active_prefix_everywhere():
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=2)
    model = nn.Sequential(conv, nn.Flatten(2), nn.Linear(25, 30)).double().eval()
    model[0].bias.requires_grad_(False)
    convert(model, 3, allow_larger=True)
    model[0].rank, model[2].rank = 1, 2
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    y, bias = model(x), model[2].bias
    assert to_dense(model) is model
    assert kinds(model) == ["Conv2d", "Flatten", "Linear"]
    assert_close(model(x), y)
    assert model[2].bias is bias
    assert conversion_report(model) is None
    assert to_dense(model) is model


def test_a_factorised_layer_used_in_two_places_stays_one_when_dense():
    shared = LoDLinear(8, 8, 2)
    model = to_dense(nn.Sequential(shared, nn.ReLU(), shared))
    assert type(model[0]) is nn.Linear
    assert model[0] is model[2]


def test_convolutions_convert_with_their_geometry():
    model = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, 1, 2, False, "reflect"), nn.BatchNorm2d(16))
    x = torch.randn(2, 8, 7, 7)
    expected = model(x)
    made = convert(model, allow_larger=True)
    assert isinstance(made[0], LoDConv2d)
    assert_close(made(x), expected, rtol=1e-4, atol=1e-5)
    assert convert(nn.Conv2d(8, 16, 3), 0.5).rank == int(0.5 * 16 * 72 / 88)


def test_random_factors_do_not_know_the_weight():
    torch.manual_seed(3)
    a = convert(mlp(), 4, init="random")
    torch.manual_seed(3)
    b = convert(mlp().double().float(), 4, init="random")
    assert torch.equal(a[0].u, b[0].u)
    with torch.device("meta"):
        on_meta = convert(mlp(), 4, init="random")
    assert on_meta[0].u.is_meta


# --- data-aware factors ---------------------------------------------------------------------------


def narrow_inputs(count=3, rows=40, features=16):
    scales = torch.logspace(1, -3, features)
    return [torch.randn(rows, features) * scales for _ in range(count)]


def layer_errors(model, factorised, batches):
    """Summed squared output error of each layer on the inputs that the dense model gives it."""
    errors = dict.fromkeys(("0", "2"), 0.0)
    for batch in batches:
        x = batch
        for name in errors:
            dense = model.get_submodule(name)
            errors[name] += (dense(x) - factorised.get_submodule(name)(x)).square().sum().item()
            x = F.relu(dense(x))
    return errors


def test_data_aware_factors_err_less_on_the_data():
    model = mlp().eval()
    batches = narrow_inputs()
    plain = layer_errors(model, convert(model, 4, inplace=False), batches)
    aware = layer_errors(
        model, convert(model, 4, init="data", batches=batches, inplace=False), batches
    )
    assert aware["0"] < 0.2 * plain["0"]
    assert aware["2"] < plain["2"]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_data_aware_convolutions_reach_the_optimum_of_their_outputs(groups, mode):
    conv = nn.Conv2d(8, 8, 3, 2, (1, 2), 1, groups, False, mode, dtype=torch.float64)
    x = torch.randn(10, 8, 7, 6, dtype=torch.float64)
    scales = torch.logspace(1, -2, 4, dtype=torch.float64)
    x *= torch.cat((scales, scales.flip(0)))[:, None, None]
    made = convert(conv, 2, init="data", batches=[x[:9], (x[9],)])
    y = conv(x)
    per_group = y.unflatten(1, (groups, -1)).movedim(2, 0).movedim(2, 0).flatten(2)
    best = torch.linalg.svdvals(per_group)[:, 2:].square().sum()
    got = (y - made(x)).square().sum()
    assert best <= got * (1 + 1e-9)
    assert got - best <= 1e-4 * y.square().sum()


class Keyed(nn.Module):
    """Reads its input by name, feeds siblings with one tensor and writes into it in between."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(16, 20), nn.Linear(16, 12)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        x = self.drop(x) * scale
        y = self.a(input=x)
        z = self.c(x)
        x.mul_(3)
        return y.sum() + z.sum() + self.b(x).sum()


def test_batches_are_called_by_their_kind_and_inputs_written_in_between_are_seen():
    x = torch.randn(30, 16)
    results = []
    for data in ([{"x": x, "scale": 2.0}], [(x, 2.0)], [[x, 2.0]], [x * 2], iter([x * 2])):
        torch.manual_seed(0)
        model = Keyed()
        model.drop.train()
        model.b.eval()
        convert(model, 5, init="data", batches=data)
        assert (model.drop.training, model.b.training) == (True, False)
        results.append(model)
    for model in results[1:]:
        assert torch.equal(model.a.u, results[0].a.u)
    model = Keyed()
    moments = input_moments(model, dict(model.named_children()), [x, x], fn="test")
    assert_close(moments["a"][0], 2 * x.double().T @ x.double(), rtol=1e-6, atol=1e-6)
    assert_close(moments["b"], 9 * moments["a"], rtol=1e-6, atol=1e-6)
    assert_close(moments["c"], moments["a"])


def test_calibration_leaves_batch_norm_alone():
    model = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24)).train()
    convert(model, 4, init="data", batches=narrow_inputs())
    assert model[1].num_batches_tracked == 0
    assert model[1].training
