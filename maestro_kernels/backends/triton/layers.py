"""A group of layers inside a kernel: tuples with one entry per layer, picked at run time."""

import triton
import triton.language as tl

__all__ = ["RANK_BITS", "element", "encode_rank", "pick", "vector"]

RANK_BITS = tl.constexpr(4)


def encode_rank(rank: int) -> int:
    """An int rank as the kernel takes it: 16 * rank + 8.

    Triton specialises integers inside tuples on the value 1 and on divisibility by 16 whatever
    do_not_specialize says; this form is neither for any rank, so all ranks share one variant.
    """
    return (rank << RANK_BITS.value) | 8


@triton.jit
def pick(values, i_layer, NUM_LAYERS: tl.constexpr):
    """Entry i_layer, a run-time index, of a tuple.

    Selects keep what all layers have in common: divisors, and a stride that is 1 in every layer
    stays a constant. So a group has the vector loads of a single layer.
    """
    picked = values[0]
    for i in tl.static_range(1, NUM_LAYERS):
        picked = tl.where(i_layer == i, values[i], picked)
    return picked


@triton.jit
def vector(values, o_l, NUM_LAYERS: tl.constexpr):
    """The integers of a tuple as one vector, zero past the last layer."""
    b_values = tl.zeros_like(o_l)
    for i in tl.static_range(NUM_LAYERS):
        b_values = tl.where(o_l == i, values[i], b_values)
    return b_values


@triton.jit
def element(b_values, o_l, i_layer):
    """Element i_layer of a vector."""
    return tl.sum(tl.where(o_l == i_layer, b_values, 0), 0)
