"""The [I; U] form: what it computes, that it is pivoted, and that it survives saving."""

import copy
import re

import pytest
import torch
from torch import nn

import maestro_kernels as mk
from maestro_kernels.nn import saved_file
from maestro_kernels.nn.pivoted import PivotedLinear, error_ratio, pivoted_factors


def layer(N=48, K=40, R=16, rank=None, dtype=torch.float64, **options):
    made = mk.LoDLinear(K, N, R, dtype=dtype, **options)
    if rank is not None:
        made.rank = rank
    return made


def hard_factors(N=192, K=160, R=64):
    """Factors whose leading rows are nearly dependent, as SVD factors of real layers may be."""
    generator = torch.Generator().manual_seed(3)
    u = torch.randn(N, R, generator=generator, dtype=torch.float64)
    u[:R] = u[:R] @ torch.diag(torch.logspace(0, -4, R, dtype=torch.float64)) * 1e-2
    return u, torch.randn(R, K, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("N", "K", "rank"), [(48, 40, 7), (40, 48, 40), (33, 21, 1), (5, 64, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_the_active_prefix_computes(N, K, rank, bias):
    lod = layer(N, K, min(N, K), rank, bias=bias)
    pivoted = PivotedLinear.from_lod(lod)
    x = torch.randn(3, 2, K, dtype=torch.float64)
    torch.testing.assert_close(pivoted(x), lod(x))
    torch.testing.assert_close(pivoted.weight + 0, lod.weight + 0)
    torch.testing.assert_close(pivoted.to_linear()(x), lod(x))
    assert pivoted.u.numel() + pivoted.v.numel() == (N + K - rank) * rank
    assert (pivoted.rank, pivoted.max_rank, pivoted.matrix_shape) == (rank, rank, (N, K))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_the_activation_comes_after_the_bias(activation):
    lod = layer(activation=activation)
    x = torch.randn(4, 40, dtype=torch.float64)
    pivoted = PivotedLinear.from_lod(lod)
    torch.testing.assert_close(pivoted(x), lod(x))
    with pytest.raises(ValueError, match=re.escape("activation: expected None, which is all an n")):
        pivoted.to_linear()


def test_rank_zero_is_the_bias_alone():
    lod = layer(rank=0)
    x = torch.randn(4, 40, dtype=torch.float64)
    assert torch.equal(PivotedLinear.from_lod(lod)(x), lod.bias.expand(4, 48))


def test_no_entry_is_large_where_the_leading_rows_are_useless():
    u, v = hard_factors()
    R = v.shape[0]
    unpivoted = torch.linalg.solve(u[:R], u[R:], left=False)
    assert unpivoted.abs().max() > 100
    hat, tilde, order = pivoted_factors(u, v)
    assert hat.abs().max() <= 1.05 + 1e-9
    assert order.dtype is torch.int32
    assert order.sort().values.tolist() == list(range(len(u)))
    torch.testing.assert_close(torch.cat((tilde, hat @ tilde))[order.long()], u @ v)


def test_lu_alone_is_not_enough():
    """Partial pivoting of a matrix it is bad at: the swaps have to bring the entries down."""
    n = 12
    worst = torch.eye(n, dtype=torch.float64) - torch.tril(torch.ones(n, n).double(), -1)
    u = torch.cat((worst, torch.ones(1, n, dtype=torch.float64) * -0.99))
    v = torch.eye(n, dtype=torch.float64)
    hat, tilde, order = pivoted_factors(u, v)
    assert hat.abs().max() <= 1.05 + 1e-9
    torch.testing.assert_close(torch.cat((tilde, hat @ tilde))[order.long()], u)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_error_stays_within_four_times_that_of_the_factors(dtype):
    u, v = hard_factors()
    lod = mk.LoDLinear.from_factors(*(nn.Parameter(t.to(dtype)) for t in (u, v)))
    x = torch.randn(128, v.shape[1], dtype=torch.float64).to(dtype)
    assert error_ratio(lod, PivotedLinear.from_lod(lod), x) < 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_error_ratio_tells_a_form_without_pivots(dtype):
    u, v = (t.to(dtype) for t in hard_factors())
    R = v.shape[0]
    wide = u.double()
    hat = torch.linalg.solve(wide[:R], wide[R:], left=False).to(dtype)
    order = torch.arange(len(u), dtype=torch.int32)
    unpivoted = PivotedLinear(hat, (wide[:R] @ v.double()).to(dtype), order)
    lod = mk.LoDLinear.from_factors(nn.Parameter(u), nn.Parameter(v))
    x = torch.randn(128, v.shape[1]).to(dtype)
    assert error_ratio(lod, unpivoted, x) > 4


def test_factors_that_are_dependent_or_unevenly_scaled():
    u, v = hard_factors()
    u[:, 5] = u[:, 4]
    u[:, 7] *= 1e-12
    v[9] *= 1e9
    hat, tilde, order = pivoted_factors(u, v)
    assert hat.abs().max() <= 1.05 + 1e-9
    product = u @ v
    made = torch.cat((tilde, hat @ tilde))[order.long()]
    assert (made - product).abs().max() < 1e-9 * product.abs().max()


def test_gradients_and_autocast():
    lod = layer(dtype=torch.float32)
    lod.v.requires_grad_(False)
    pivoted = PivotedLinear.from_lod(lod)
    assert (pivoted.u.requires_grad, pivoted.v.requires_grad) == (True, False)
    x = torch.randn(4, 40)
    pivoted(x).sum().backward()
    assert pivoted.u.grad is not None
    assert pivoted.v.grad is None
    with torch.autocast("cpu", torch.bfloat16):
        assert pivoted(x).dtype is torch.bfloat16


def test_the_layer_it_came_from_shares_nothing_with_it():
    lod = layer()
    before = copy.deepcopy(lod.state_dict())
    pivoted = PivotedLinear.from_lod(lod.eval())
    assert not pivoted.training
    with torch.no_grad():
        for parameter in pivoted.parameters():
            parameter.fill_(1)
    assert all(torch.equal(lod.state_dict()[key], value) for key, value in before.items())


def test_errors_name_what_was_expected():
    with pytest.raises(TypeError, match=re.escape("layer: expected a LoDLinear, got Linear")):
        PivotedLinear.from_lod(nn.Linear(3, 3))
    lod = layer()
    with torch.no_grad():
        lod.v[0, 0] = float("nan")
    with pytest.raises(ValueError, match=re.escape("from_lod: v: expected finite values")):
        PivotedLinear.from_lod(lod)
    u, v, order = torch.randn(4, 2), torch.randn(2, 5), torch.arange(6, dtype=torch.int32)
    with pytest.raises(ValueError, match=re.escape("u: expected shape (N - 2, 2) to match v")):
        PivotedLinear(u[:, :1], v, order)
    with pytest.raises(ValueError, match=re.escape("order: expected shape (6,), got (5,)")):
        PivotedLinear(u, v, order[:5])
    with pytest.raises(ValueError, match=re.escape("bias: expected shape (6,), got (4,)")):
        PivotedLinear(u, v, order, torch.zeros(4))
    with pytest.raises(TypeError, match=re.escape("order: expected torch.int32, got torch.int64")):
        PivotedLinear(u, v, order.long())
    with pytest.raises(ValueError, match=re.escape("u: expected at most 4 columns for 4 rows")):
        pivoted_factors(torch.randn(4, 5), torch.randn(5, 3))


def two_layers():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 24))


def pivoted_model():
    model = mk.convert(two_layers(), rank=9)
    model[0] = PivotedLinear.from_lod(model[0])
    return model.eval()


def test_save_and_load(tmp_path):
    model = pivoted_model()
    x = torch.randn(3, 40)
    mk.save_pretrained(model, tmp_path / "m")
    loaded = mk.load_pretrained(tmp_path / "m", two_layers())
    assert isinstance(loaded[0], PivotedLinear)
    assert loaded[0].order.dtype is torch.int32
    assert torch.equal(loaded(x), model(x))


def test_a_model_of_pivoted_layers_alone_is_saved(tmp_path):
    model = pivoted_model()
    model[2] = PivotedLinear.from_lod(model[2])
    mk.save_pretrained(model, tmp_path / "m")
    loaded = mk.load_pretrained(tmp_path / "m", two_layers())
    x = torch.randn(3, 40)
    assert torch.equal(loaded(x), model(x))


def test_files_that_do_not_fit_are_refused(tmp_path):
    from safetensors.torch import load_file

    mk.save_pretrained(pivoted_model(), tmp_path / "m")
    with pytest.raises(ValueError, match=re.escape("expected a linear layer of 48 x 40 at '0'")):
        mk.load_pretrained(tmp_path / "m", nn.Sequential(nn.Linear(40, 47), nn.ReLU()))
    path = next((tmp_path / "m").glob("*.safetensors"))
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["0.order"][0] = tensors["0.order"][1]
    structure, _ = saved_file.read_header(path)
    with path.open("wb") as file:
        saved_file.write("test", file, tensors, structure)
    with pytest.raises(ValueError, match=re.escape("expected a permutation of 0..47 in int32")):
        mk.load_pretrained(tmp_path / "m", two_layers())


def test_summary_counts_what_is_stored():
    report = mk.summary(pivoted_model())
    first = report.layers[0]
    assert (first.kind, first.N, first.K, first.rank) == ("pivoted_linear", 48, 40, 9)
    assert first.parameters == first.macs == (48 + 40 - 9) * 9
    assert first.dense_parameters == 48 * 40
    assert report.weights == first.parameters + report.layers[1].parameters
    assert "pivoted_linear" in str(report)


def test_to_dense_merges_it():
    model = pivoted_model()
    x = torch.randn(3, 40)
    dense = mk.to_dense(model, inplace=False)
    assert [type(m) for m in dense] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(dense(x), model(x))
    assert isinstance(model[0], PivotedLinear)
