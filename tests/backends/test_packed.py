"""Packed bytes: one layer and groups compute right, and what is not theirs is refused."""

import itertools
import struct

import pytest
import torch
import torch.nn.functional as F

from maestro_kernels.backends import native
from maestro_kernels.backends.reference import lod_linear_ref
from maestro_kernels.testing import assert_accurate, make_inputs

pytestmark = pytest.mark.skipif(
    native.load_error() is not None, reason=f"no native library: {native.load_error()}"
)

# csrc/bindings/packed.h, in words of 8 bytes; the second line once per layer.
MAGIC, CHECK, BYTES, DTYPE, K, LAYERS = range(6)
N, R, RANK, ACTIVATION, OFFSET = range(6, 11)
WORDS = 5
SIZES = ((24, 16), (8, 5), (40, 33))


def group(dtype=torch.float32):
    made = [make_inputs(3, n, 40, r, dtype=dtype, seed=i) for i, (n, r) in enumerate(SIZES)]
    return made[0][0], [m[1] for m in made], [m[2] for m in made], [m[3] for m in made]


def words_of(packed):
    count = 6 + WORDS * struct.unpack_from("<q", packed.numpy(), 8 * LAYERS)[0]
    return list(struct.unpack_from(f"<{count}q", packed.numpy()))


def forged(packed, index, value):
    """The bytes with one word of the header replaced and the check over it made right."""
    words = words_of(packed)
    words[index] = value
    check = 0
    for word in words[BYTES:]:
        check = (check ^ (word % 2**64)) * 0x9E3779B97F4A7C15 % 2**64
        check ^= check >> 32
    words[CHECK] = check - 2**64 if check >= 2**63 else check
    other = packed.clone()
    struct.pack_into(f"<{len(words)}q", other.numpy(), 0, *words)
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 40), (33, 40), (2, 3, 40), (40,)])
def test_a_group_computes_its_layers(dtype, shape):
    _, us, vs, biases = group(dtype)
    biases[1] = None
    ranks, activations = [16, 0, 30], [None, "gelu", "relu"]
    packed = native.pack(us, vs, ranks, activations)
    x = torch.randn(shape).to(dtype)
    ys = native.ops().packed_grouped(packed, x, biases)
    each = zip(ys, us, vs, biases, ranks, activations, strict=True)
    for i, (y, u, v, b, r, activation) in enumerate(each):
        doubled = [None if t is None else t.double() for t in (x, u, v, b)]
        exact = lod_linear_ref(*doubled, rank=r, activation=activation)
        pair = F.linear(F.linear(x, v[:r]), u[:, :r], b)
        pair = {"gelu": F.gelu, "relu": F.relu, None: lambda t: t}[activation](pair)
        assert_accurate(f"layer {i}", y, pair, exact)
        single = native.ops().packed_linear(native.pack([u], [v], [r], [activation]), x, b)
        assert_accurate(f"layer {i} alone", single, pair, exact)


def test_outputs_of_a_group_share_no_memory():
    x, us, vs, biases = group()
    packed = native.pack(us, vs, [16, 5, 33], [None] * 3)
    ys = native.ops().packed_grouped(packed, x, biases)
    assert len({y.untyped_storage().data_ptr() for y in ys}) == 3
    assert all(y.untyped_storage().nbytes() == y.nbytes for y in ys)


def test_rows_of_a_wider_tensor_are_read_in_place():
    x, us, vs, biases = group()
    packed = native.pack(us, vs, [16, 5, 33], [None] * 3)
    wide = torch.full((3, 50), 7.0)
    wide[:, 5:45] = x
    expected = native.ops().packed_grouped(packed, x, biases)
    for y, e in zip(
        native.ops().packed_grouped(packed, wide[:, 5:45], biases), expected, strict=True
    ):
        assert torch.equal(y, e)
    with pytest.raises(RuntimeError, match="maestro_native: x: expected rows of stride 1"):
        native.ops().packed_grouped(packed, x.T.contiguous().T, biases)


def refused(packed, x=None, biases=None, match="packed"):
    given_x, _, _, given = group()
    with pytest.raises(RuntimeError, match=f"maestro_native: .*{match}"):
        native.ops().packed_grouped(
            packed, given_x if x is None else x, given if biases is None else biases
        )


def test_every_damaged_byte_of_the_header_is_refused():
    _, us, vs, _ = group()
    packed = native.pack(us, vs, [16, 5, 33], [None, "relu", None])
    for i, bit in itertools.product(range(8 * len(words_of(packed))), (0, 7)):
        damaged = packed.clone()
        damaged[i] ^= 1 << bit
        refused(damaged)


HUGE = (-(2**63), -1, 2**31, 2**62, 2**63 - 1)
EDITS = [
    *itertools.product((BYTES, K, LAYERS), (0, *HUGE)),
    *itertools.product((DTYPE,), HUGE),
    *itertools.product(
        (N, R, OFFSET, N + 2 * WORDS, R + 2 * WORDS, OFFSET + 2 * WORDS), (0, *HUGE)
    ),
    *itertools.product((RANK, ACTIVATION, RANK + 2 * WORDS, ACTIVATION + 2 * WORDS), HUGE),
]


@pytest.mark.parametrize(("word", "value"), EDITS)
def test_sizes_beyond_the_bytes_are_refused_even_with_a_right_check(word, value):
    _, us, vs, _ = group()
    packed = native.pack(us, vs, [16, 5, 33], [None] * 3)
    if word == LAYERS:
        # The check cannot cover layers that are not there.
        packed[8 * LAYERS : 8 * N] = torch.tensor(list(struct.pack("<q", value))).byte()
        refused(packed)
        return
    # Without biases, whose shapes would be refused as well.
    words = {BYTES: r"packed: expected what pack\(\) returned", DTYPE: "packed: expected the dtype"}
    words |= dict.fromkeys((ACTIVATION, ACTIVATION + 2 * WORDS), f"activation: got {value}")
    match = words.get(word, "packed: layer [02] is damaged")
    refused(forged(packed, word, value), biases=[None] * 3, match=match)


def test_a_forged_header_that_changes_nothing_is_taken():
    x, us, vs, biases = group()
    packed = native.pack(us, vs, [16, 5, 33], [None] * 3)
    same = forged(packed, RANK, 16)
    assert torch.equal(same, packed)
    lower = forged(packed, RANK, 7)
    y, *_ = native.ops().packed_grouped(lower, x, biases)
    torch.testing.assert_close(y, F.linear(F.linear(x, vs[0][:7]), us[0][:, :7], biases[0]))


def test_a_header_longer_than_the_tensor_is_refused():
    _, us, vs, _ = group()
    packed = native.pack(us, vs, [16, 5, 33], [None] * 3)
    # All is there, but the tensor ends at 128 of 168 bytes.
    refused(forged(packed, BYTES, 128)[:128], match=r"packed: expected what pack\(\) returned")


def test_panels_that_start_or_end_elsewhere_are_refused():
    _, us, vs, _ = group()
    packed = native.pack(us, vs, [16, 5, 33], [None] * 3)
    last = OFFSET + 2 * WORDS
    offset = words_of(packed)[last]
    refused(forged(packed, last, offset + 64))
    refused(forged(packed, last, offset - 8))
    refused(forged(packed, OFFSET, 0))
    refused(forged(packed, K, 41), match="x: expected rows of 41, got 3 of 40")
    refused(forged(packed, N + 2 * WORDS, 400))


@pytest.mark.parametrize(
    "foreign",
    [
        lambda packed: packed[:-64],
        lambda packed: packed[:64],
        lambda packed: packed[:8],
        lambda packed: packed[:0],
        lambda packed: torch.cat([packed, packed[:64]]),
        lambda packed: torch.cat([packed[:1], packed])[1:],
        lambda packed: packed.view(1, -1),
        lambda packed: packed.float(),
        lambda packed: packed.repeat_interleave(2)[::2],
        torch.zeros_like,
        lambda packed: packed.view(torch.float32),
        lambda packed: packed.view(torch.int8),
        lambda packed: torch.cat([packed, packed])[::2],
    ],
)
def test_other_tensors_are_refused(foreign):
    _, us, vs, _ = group()
    refused(foreign(native.pack(us, vs, [16, 5, 33], [None] * 3)))


def test_inputs_and_biases_that_do_not_fit_are_refused():
    x, us, vs, biases = group()
    packed = native.pack(us, vs, [16, 5, 33], [None] * 3)
    refused(packed, x=x.bfloat16(), match="packed: expected the dtype of x")
    refused(packed, x=x.double(), match="x: expected float32")
    refused(packed, x=x[:, :39], match="x: expected rows")
    refused(packed, x=x[:0], match="x: expected")
    refused(packed, x=x[0, 0], match="x: expected rows")
    refused(packed, biases=biases[:2], match="biases: expected one or None for each of 3")
    refused(packed, biases=[*biases, None], match="biases: expected one or None for each of 3")
    refused(packed, biases=[biases[1], biases[0], biases[2]], match="bias: expected")
    refused(packed, biases=[biases[0].double(), *biases[1:]], match="bias: expected")
    with pytest.raises(
        RuntimeError, match="packed: expected the bytes of one layer, got those of 3"
    ):
        native.ops().packed_linear(packed, x, biases[0])


def test_layers_that_cannot_be_packed_together_are_refused():
    _, us, vs, _ = group()
    for us_, vs_, ranks, match in (
        (us, vs, [1, 2], "one entry per layer"),
        (us, vs, [1, 2, 34], "rank: expected 0..33, got 34"),
        (us, [vs[0], vs[1], vs[2][:, :39].contiguous()], [1, 2, 3], "layers of one K"),
        ([us[0].double(), *us[1:]], [vs[0].double(), *vs[1:]], [1, 2, 3], "one dtype"),
        ([us[0][:, :0]], [vs[0][:0]], [0], "R > 0"),
    ):
        with pytest.raises(RuntimeError, match=f"maestro_native: .*{match}"):
            native.ops().pack(us_, vs_, ranks, [0] * len(ranks))
    with pytest.raises(RuntimeError, match="maestro_native: activation: got 9"):
        native.ops().pack(us, vs, [1, 2, 3], [0, 9, 0])
