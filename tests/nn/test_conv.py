"""LoDConv2d against nn.Conv2d, which knows nothing of factors."""

import copy
import itertools
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from maestro_kernels.nn import LoDConv2d, conv
from maestro_kernels.nn import layer as layers

STRIDES = (1, 2, (2, 1))
PADDINGS = (0, 1, (1, 2), "same", "valid")
MODES = ("zeros", "reflect", "replicate", "circular")
KERNELS = (1, 3, (3, 2))
DILATIONS = (1, (1, 2))
# A zero-padded copy of the input is what nn.Conv2d makes there too, and says so.
EVEN_SAME = "ignore:Using padding='same' with even kernel lengths:UserWarning"


def dense(*args, **options):
    return nn.Conv2d(*args, dtype=torch.float64, **options)


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.filterwarnings(EVEN_SAME)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_every_geometry_matches_nn_conv2d(mode, groups):
    x = images(2, 4, 9, 8)
    for stride, padding, kernel, dilation in itertools.product(
        STRIDES, PADDINGS, KERNELS, DILATIONS
    ):
        if padding == "same" and stride != 1:
            continue
        expected = dense(4, 8, kernel, stride, padding, dilation, groups, True, mode)
        made = LoDConv2d.from_conv(expected)
        y = expected(x)
        assert_close(made(x), y)
        assert_close(made.to_conv()(x), y)
        assert_close(made.weight + 0, expected.weight)
        made.rank = 1
        lower = made(x)
        assert_close(made.to_conv()(x), lower)
        made.rank = 0
        assert torch.equal(made(x), expected.bias[:, None, None].expand_as(y))


@pytest.mark.parametrize("groups", [1, 2])
def test_each_group_keeps_its_best_components(groups):
    original = dense(8, 12, 3, groups=groups)
    made = LoDConv2d.from_conv(original, rank=2)
    assert made.u.shape == (12, 2)
    assert made.v.shape == (groups * 2, 8 // groups, 3, 3)
    matrices = original.weight.detach().reshape(groups, 12 // groups, -1)
    discarded = torch.linalg.svdvals(matrices)[:, 2:].square().sum()
    assert_close((original.weight - made.weight).detach().square().sum(), discarded)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_gradients_are_those_of_the_merged_prefix_and_zero_beyond(rank, groups):
    made = LoDConv2d(4, 6, 3, padding=1, groups=groups, max_rank=3, dtype=torch.float64)
    made.rank = rank
    x = images(2, 4, 5, 5).requires_grad_()
    parameters = [x, *made.parameters()]
    got = torch.autograd.grad(made(x).square().sum(), parameters)
    merged = F.conv2d(x, made.weight, made.bias, padding=1, groups=groups)
    # At rank 0 the merged weight is zeros that no parameter is part of, so it gets zero gradients.
    expected = torch.autograd.grad(merged.square().sum(), parameters, materialize_grads=True)
    assert_close(got, expected)
    du, dv = got[1], got[2].unflatten(0, (groups, 3))
    assert (du[:, rank:] == 0).all()
    assert (dv[:, rank:] == 0).all()
    assert (du[:, :rank] != 0).all()


@pytest.mark.parametrize("rank", [0, 2, 4])
def test_pointwise_on_channels_last_is_one_call(rank, monkeypatch):
    calls = []
    original = conv.lod_linear
    monkeypatch.setattr(conv, "lod_linear", lambda *a, **k: calls.append(a) or original(*a, **k))
    made = LoDConv2d(6, 4, 1, dtype=torch.float64)
    made.rank = rank
    x = images(2, 6, 5, 3)
    plain = made(x)
    assert plain.is_contiguous()
    assert calls == []
    last = made(x.to(memory_format=torch.channels_last))
    assert_close(last, plain)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert len(calls) == 1
    # No copy on the way in.
    assert calls[0][0].is_contiguous()
    assert made(images(2, 6, 1, 1)).shape == (2, 4, 1, 1)
    assert len(calls) == 2


def test_one_channel_images_come_out_in_the_plain_layout():
    made = LoDConv2d(1, 4, 1, dtype=torch.float64)
    x = images(2, 1, 5, 3)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert made(x).is_contiguous()


@pytest.mark.parametrize("padding", [0, "same"])
def test_input_without_a_batch_and_empty_batches(padding):
    original = dense(4, 6, 3, padding=padding, groups=2)
    made = LoDConv2d.from_conv(original)
    for rank in (made.max_rank, 0):
        made.rank = rank
        assert made(images(4, 7, 6)).shape == original(images(4, 7, 6)).shape
        assert made(images(0, 4, 7, 6)).shape == original(images(0, 4, 7, 6)).shape
    made.rank = made.max_rank
    x = images(4, 7, 6)
    assert_close(made(x), original(x))


@pytest.mark.parametrize(("kernel", "groups"), [(3, 1), (3, 2), (1, 1), (1, 2)])
def test_compiled_layer_follows_the_rank_without_recompiling(kernel, groups):
    made = LoDConv2d(4, 6, kernel, groups=groups, padding_mode="reflect", dtype=torch.float64)
    x = images(2, 4, 5, 5).to(memory_format=torch.channels_last)
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rank in (2, 0, made.max_rank):
            made.rank = rank
            made.zero_grad()
            y = compiled(x)
            y.square().sum().backward()
            grads = [p.grad.clone() for p in made.parameters()]
            made.zero_grad()
            made(x).square().sum().backward()
            assert_close(y, made(x))
            assert_close(grads, [p.grad for p in made.parameters()])


def test_export_capture_checkpoint_and_autocast(monkeypatch):
    made = LoDConv2d(4, 6, 3)
    made.rank = 2
    x = torch.randn(2, 4, 5, 5)
    assert_close(torch.export.export(made, (x,)).module()(x), made(x))
    plain = torch.autograd.grad(made(x).sum(), list(made.parameters()))
    again = checkpoint(made, x, use_reentrant=False).sum()
    assert_close(torch.autograd.grad(again, list(made.parameters())), plain)
    for rank in (0, 2):
        made.rank = rank
        with torch.autocast("cpu", torch.bfloat16):
            assert made(x).dtype == torch.bfloat16
    made.active_rank.fill_(1)
    monkeypatch.setattr(layers, "is_capturing", lambda tensor: True)
    assert_close(made(x), F.conv2d(F.conv2d(x, made.v[:1]), made.u[:, :1, None, None], made.bias))


@pytest.mark.parametrize("groups", [1, 2])
def test_truncate_drops_the_tail_of_every_group(groups):
    made = LoDConv2d(4, 6, 3, groups=groups, max_rank=3, dtype=torch.float64)
    made.rank = 2
    x = images(2, 4, 5, 5)
    before = made(x)
    before.sum().backward()
    du = made.u.grad.clone()
    made.truncate()
    assert made.u.shape == (6, 2)
    assert made.v.shape == (groups * 2, 4 // groups, 3, 3)
    assert made.v.untyped_storage().nbytes() == made.v.numel() * 8
    assert (made.max_rank, made.rank) == (2, 2)
    assert torch.equal(made.u.grad, du[:, :2])
    assert made.v.grad.shape == made.v.shape
    assert_close(made(x), before)
    made.truncate(0)
    assert made(x).shape == before.shape
    assert made.matrix_shape == (6 // groups, 4 // groups * 9)


@pytest.mark.parametrize("groups", [1, 2])
def test_importance_covers_all_groups(groups):
    made = LoDConv2d(4, 6, 3, groups=groups, max_rank=3, dtype=torch.float64)
    u, v = made.u.detach(), made.v.detach().unflatten(0, (groups, 3))
    expected = torch.stack([u[:, b:].norm() * v[:, b:].norm() for b in range(3)])
    assert_close(made.importance(), expected)


def test_copies_and_state_dicts_keep_the_rank():
    made = LoDConv2d(4, 6, 3, groups=2, dtype=torch.float64)
    made.rank = 1
    x = images(2, 4, 5, 5)
    other = LoDConv2d(4, 6, 3, groups=2, dtype=torch.float64)
    other.load_state_dict(made.state_dict())
    for twin in (other, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert (twin.rank, twin.active_rank.item()) == (1, 1)
        assert torch.equal(twin(x), made(x))
    made.truncate()
    with pytest.raises(RuntimeError, match=r"LoDConv2d\.load_state_dict: v: expected shape \(6, 2"):
        other.load_state_dict(made.state_dict())


def test_starts_with_the_variance_of_nn_conv2d():
    made = LoDConv2d(64, 200, 3, max_rank=80)
    assert_close(made.weight.var(), torch.tensor(1 / (3 * 64 * 9)), rtol=0.05, atol=0)
    assert made.bias.abs().max() <= (64 * 9) ** -0.5
    assert made.rank == 80


def test_conversion_keeps_mode_gradients_and_absence_of_bias():
    original = dense(4, 6, 3, bias=False).eval().requires_grad_(False)
    made = LoDConv2d.from_conv(original, rank=2)
    back = made.to_conv()
    assert made.bias is back.bias is None
    for module in (made, back):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())


def test_break_even_counts_the_weights_of_all_groups():
    made = LoDConv2d(8, 12, 3, groups=2, max_rank=1)
    assert made.matrix_shape == (6, 36)
    dense_weights = 12 * 4 * 9
    assert made.break_even_rank * (made.u.numel() + made.v.numel()) == pytest.approx(dense_weights)


def test_printed_form():
    assert repr(LoDConv2d(4, 6, 3, padding=1, groups=2, bias=False, max_rank=2)) == (
        "LoDConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), rank=2/2, padding=(1, 1), groups=2, "
        "bias=False)"
    )


def call(x, kernel=3, **options):
    return lambda: LoDConv2d(4, 6, kernel, **options)(x)


ERRORS = [
    (
        lambda: LoDConv2d(5, 6, 3, groups=2),
        ValueError,
        "in_channels: expected a multiple of 2, got 5",
    ),
    (lambda: LoDConv2d(4, 6, 0), ValueError, "kernel_size: expected an int >= 1, got 0"),
    (
        lambda: LoDConv2d(4, 6, (1, 2, 3)),
        ValueError,
        "kernel_size: expected an int or a pair, got (1, 2, 3)",
    ),
    (lambda: LoDConv2d(4, 6, 3, stride=1.5), TypeError, "stride: expected an int >= 1, got float"),
    (
        lambda: LoDConv2d(4, 6, 3, padding="full"),
        ValueError,
        "padding: expected an int, a pair, 'same' or 'valid', got 'full'",
    ),
    (
        lambda: LoDConv2d(4, 6, 3, 2, "same"),
        ValueError,
        "padding: expected stride 1 with 'same', got stride (2, 2)",
    ),
    (
        lambda: LoDConv2d(4, 6, 3, padding_mode="mirror"),
        ValueError,
        "padding_mode: expected one of ('zeros', 'reflect', 'replicate', 'circular'), got 'mirror'",
    ),
    (
        lambda: LoDConv2d(4, 6, 3, max_rank=7),
        ValueError,
        "max_rank: expected an int, 0 <= max_rank <= 6, got 7",
    ),
    (
        call(torch.zeros(2, 3, 5, 5)),
        ValueError,
        "x: expected shape (B, 4, H, W) or (4, H, W), got (2, 3, 5, 5)",
    ),
    (
        call(torch.zeros(4, 5)),
        ValueError,
        "x: expected shape (B, 4, H, W) or (4, H, W), got (4, 5)",
    ),
    (
        call(torch.zeros(1, 4, 2, 5)),
        ValueError,
        "x: expected at least 3 positions in dimension -2 for kernel_size (3, 3), got 2",
    ),
    (
        call(torch.zeros(1, 4, 5, 5).half()),
        TypeError,
        "x: expected torch.float32 like u, got torch.float16",
    ),
    (call([1]), TypeError, "x: expected a Tensor, got list"),
]


@pytest.mark.parametrize(("make", "error", "message"), ERRORS)
def test_errors(make, error, message):
    with pytest.raises(error, match=f"^LoDConv2d: {re.escape(message)}$"):
        make()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: LoDConv2d.from_conv(nn.Linear(2, 2)),
            TypeError,
            "from_conv: conv: expected an nn.Conv2d, got Linear",
        ),
        (
            lambda: LoDConv2d.from_conv(nn.Conv2d(4, 6, 3, groups=2), rank=4),
            ValueError,
            "from_conv: rank: expected an int, 0 <= rank <= 3, got 4",
        ),
        (
            lambda: LoDConv2d.from_factors(nn.Conv2d(4, 6, 3), torch.zeros(5, 2), torch.zeros(2)),
            ValueError,
            "from_factors: u: expected shape (6, R), got (5, 2)",
        ),
        (
            lambda: LoDConv2d.from_factors(nn.Conv2d(4, 6, 3), torch.zeros(6, 2), torch.zeros(2)),
            ValueError,
            "from_factors: v: expected shape (2, 4, 3, 3), got (2,)",
        ),
    ],
)
def test_construction_errors(make, error, message):
    with pytest.raises(error, match=f"^LoDConv2d.{re.escape(message)}$"):
        make()
