"""Small Triton kernels that show one property of a GPU each; micro.py times them."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["atomic_kernel", "barrier_kernel", "read_kernel", "step_kernel", "stream_kernel"]


@triton.jit
def step_kernel(p_x, PDL: tl.constexpr):
    if PDL:
        gdc_wait()
    tl.store(p_x, tl.load(p_x) + 1.0)
    if PDL:
        gdc_launch_dependents()


@triton.jit
def barrier_kernel(p_arrived, count, num_programs):
    # Every program waits until all have arrived `i` times; they must be resident together.
    for i in range(1, count + 1):
        tl.atomic_add(p_arrived, 1, sem="acq_rel")
        while tl.atomic_add(p_arrived, 0, sem="acquire") < i * num_programs:
            pass


@triton.jit
def read_kernel(p_x, p_out, blocks, repeats, BLOCK: tl.constexpr):
    # Every program reads the whole buffer, each from another place on, so that all of L2 is busy.
    i_program = tl.program_id(0)
    o_lane = tl.arange(0, BLOCK)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for i in range(blocks * repeats):
        i_block = (i_program * 17 + i) % blocks
        b_sum += tl.load(p_x + i_block * BLOCK + o_lane, cache_modifier=".cg")
    tl.store(p_out + i_program * BLOCK + o_lane, b_sum)


@triton.jit
def stream_kernel(p_x, p_out, blocks, BLOCK: tl.constexpr):
    # Every program reads a part of its own, once.
    i_program = tl.program_id(0).to(tl.int64)
    o_lane = tl.arange(0, BLOCK)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for i in range(blocks):
        b_sum += tl.load(p_x + (i_program * blocks + i) * BLOCK + o_lane)
    tl.store(p_out + i_program * BLOCK + o_lane, b_sum)


@triton.jit
def atomic_kernel(p_x, repeats, slots, BLOCK: tl.constexpr):
    i_program = tl.program_id(0)
    o_lane = tl.arange(0, BLOCK)
    for i in range(repeats):
        i_slot = (i_program + i) % slots
        tl.atomic_add(p_x + i_slot * BLOCK + o_lane, 1.0, sem="relaxed")
