"""Shapes, ranks, dtypes, modes and layouts through the native CPU kernels, against float64.

Run as a program it sweeps everything with the instruction set that MK_CPU_ISA allows.
"""

import itertools
import sys

import activation_cases
import torch
import torch.nn.functional as F

import maestro_kernels as mk
from maestro_kernels.backends import native
from maestro_kernels.backends.reference import ACTIVATIONS, lod_linear_ref
from maestro_kernels.call import Call
from maestro_kernels.testing import accuracy_error, make_inputs, poison, rounding_errors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (M, N, K, R): off every tile, one row, one column, one component, several row blocks, several
# passes over K and R.
SHAPES = (
    (1, 1, 1, 1),
    (1, 33, 65, 17),
    (2, 100, 40, 8),
    (3, 31, 129, 33),
    (5, 64, 64, 32),
    (4, 35, 4200, 18),
    (13, 97, 130, 31),
    (37, 56, 72, 24),
    (64, 160, 96, 48),
    (129, 70, 257, 40),
    (300, 130, 64, 64),
    (517, 48, 33, 5),
    (40, 600, 700, 530),
)
# Rows of y longer than a page: strips. Weights beyond a core's own cache, and enough work to be cut
# in pieces that other threads may take. Packed only: that is where the schedules differ.
LARGE = ((150, 2110, 64, 40), (620, 2110, 650, 200))


def spoil(*shapes, dtype):
    """Leave NaN in memory that the allocator is likely to hand out for the outputs."""
    for shape in shapes:
        poison(torch.empty(shape, dtype=dtype))


def plain(x, u, v, bias, r, activation):
    return ACTIVATIONS[activation](F.linear(F.linear(x, v[:r]), u[:, :r], bias))


# What H is multiplied by where something is added: a power of two rounds nothing.
SCALE = -0.25
EPS = 0.5


def run(x, u, v, bias, rank, activation, *, packed, save_h, residual=None, norm=None):
    code = native.ACTIVATION_CODES[activation]
    is_tensor = isinstance(rank, torch.Tensor)
    spoil((*x.shape[:-1], u.shape[0]), dtype=x.dtype)
    if packed:
        made = native.pack([u], [v], [rank], [activation])
        if residual is None:
            return native.ops().packed_linear(made, x, bias), None
        return native.ops().packed_residual(made, x, bias, residual, SCALE), None
    if residual is not None:
        ranks = rank if is_tensor else [rank]
        call = Call("lod_linear", [x], [u], [v], [bias], ranks, [activation], [residual], [SCALE])
        if norm is not None:
            call = call._replace(norms=[norm], norm_eps=EPS)
        (y,), (h,) = native.forward(call, save_h=save_h, strategy="fused")
        return y, h
    op = native.ops().linear_h if save_h else native.ops().linear
    out = op(x, u, v, bias, -1 if is_tensor else rank, rank if is_tensor else None, code)
    return out if save_h else (out, None)


def ranks_of(R):
    return sorted({0, 1, R // 2, max(R - 1, 0), R})


def check(
    shape,
    dtype,
    rank,
    activation,
    packed,
    *,
    bias=True,
    tensor_rank=False,
    save_h=False,
    added=False,
    normed=False,
):
    """Text of what is wrong, or None; only what is added to may be normed."""
    M, N, K, R = shape
    x, u, v, b = make_inputs(M, N, K, R, dtype=dtype, bias=bias, seed=M + N)
    # Rows that lie apart: a stride is not a size.
    residual = torch.randn(M, N + 3).to(dtype)[:, :N] if added else None
    scale = SCALE if added else 1
    # What lies beyond the rank must never matter.
    u[:, rank:] = float("nan")
    v[rank:] = float("nan")
    norm = torch.rand(R).to(dtype) if normed else None
    if normed:
        norm[rank:] = float("nan")
    r = torch.tensor(rank, dtype=torch.int32) if tensor_rank else rank
    options = {"packed": packed, "save_h": save_h, "residual": residual, "norm": norm}
    y, h = run(x, u, v, b, r, activation, **options)
    again, _ = run(x, u, v, b, r, activation, **options)
    if not torch.equal(y, again):
        return "two calls differ"
    doubled = [None if t is None else t.double() for t in (x, u, v, b)]
    wide = None if residual is None else residual.double()
    beside = {"residual": wide, "scale": scale}
    if normed:
        beside |= {"norm": norm.double(), "norm_eps": EPS}
    exact = lod_linear_ref(*doubled, rank=rank, activation=activation, **beside)
    # H is what it was before the norm.
    scale_h = 1 if normed else scale
    rounding = rounding_errors(x, u, v * scale_h, rank=rank, activation=activation)
    if residual is None:
        pair = F.linear(F.linear(x, v[:rank]), u[:, :rank], b)
    else:
        g = F.linear(x, v[:rank])
        g = F.rms_norm(g, (rank,), norm[:rank], EPS) if normed and rank else g
        pair = torch.addmm(residual, scale * g, u[:, :rank].T)
        pair = pair if b is None else pair + b
    # What rounding leaves before a norm says nothing of what it leaves behind.
    error = None if normed else rounding["y"]
    problem = accuracy_error(y, ACTIVATIONS[activation](pair), exact, error)
    if problem is None and save_h:
        width = R if tensor_rank else rank
        exact_h = torch.zeros(M, width, dtype=torch.float64)
        exact_h[:, :rank] = scale_h * doubled[0] @ doubled[2][:rank].T
        pair_h = torch.zeros(M, width, dtype=dtype)
        pair_h[:, :rank] = scale_h * F.linear(x, v[:rank])
        h_rounding = F.pad(rounding["h"], (0, width - rank))
        problem = accuracy_error(h, pair_h, exact_h, h_rounding)
        if problem is None and tensor_rank and h[:, rank:].abs().sum() != 0:
            problem = "H is not zero beyond the rank"
        problem = None if problem is None else f"H: {problem}"
    return problem


def check_group(dtype, packed, shared):
    sizes = ((40, 24, 24), (7, 33, 5), (129, 16, 0), (64, 40, 17))
    K, M = 72, 21
    made = [make_inputs(M, N, K, R, dtype=dtype, seed=i) for i, (N, R, _) in enumerate(sizes)]
    xs = [made[0][0]] if shared else [m[0] for m in made]
    us, vs = [m[1] for m in made], [m[2] for m in made]
    biases = [None if i == 1 else m[3] for i, m in enumerate(made)]
    ranks = [r for _, _, r in sizes]
    activations = [None, "gelu", "relu", "silu"]
    if packed:
        ys = native.ops().packed_grouped(native.pack(us, vs, ranks, activations), xs[0], biases)
        hs = [None] * len(ys)
    else:
        ys, hs = native.forward(
            Call("lod_linear_grouped", xs, us, vs, biases, ranks, activations),
            save_h=True,
            strategy="fused",
        )
    for i, (y, h) in enumerate(zip(ys, hs, strict=True)):
        x = xs[0 if shared else i]
        doubled = [None if t is None else t.double() for t in (x, us[i], vs[i], biases[i])]
        exact = lod_linear_ref(*doubled, rank=ranks[i], activation=activations[i])
        pair = plain(x, us[i], vs[i], biases[i], ranks[i], activations[i])
        rounding = rounding_errors(x, us[i], vs[i], rank=ranks[i], activation=activations[i])
        problem = accuracy_error(y, pair, exact, rounding["y"])
        if problem or (h is not None and h.shape != (M, ranks[i])):
            return f"layer {i}: {problem or h.shape}"
    return None


def check_activation(name, dtype, packed, N):
    """Text of what is wrong with an activation over the whole range of a dtype, or None."""
    z = activation_cases.arguments(dtype)
    one = torch.ones(1, 1, dtype=dtype)
    u = torch.ones(N, 1, dtype=dtype)
    code = native.ACTIVATION_CODES[name]
    bytes_ = native.pack([u], [one], [1], [name]) if packed else None
    ys = [
        native.ops().packed_linear(bytes_, x, None)
        if packed
        else native.ops().linear(x, u, one, None, 1, None, code)
        for x in z[:, None].split(4096)
    ]
    y = torch.cat(ys)
    if not torch.equal(y[:, :1].expand_as(y).isnan(), y.isnan()):
        return "columns differ"
    for column in (0, N - 1):
        problem = activation_cases.disagreement(y[:, column], activation_cases.forward, name, z)
        if problem:
            return f"column {column}: {problem}"
    return None


def check_denormals(dtype, packed):
    """Text of what is wrong with values below the smallest normal number, or None.

    The dot product instructions of bfloat16 take them as zero by
    definition: docs/dev/cpu-kernels.md.
    """
    x = torch.tensor([[0.75], [0.5], [-0.25], [0.0], [-0.75]], dtype=torch.float64)
    x = (x * torch.finfo(dtype).tiny).to(dtype)
    one, u = torch.ones(1, 1, dtype=dtype), torch.ones(40, 1, dtype=dtype)
    y, _ = run(x, u, one, None, 1, None, packed=packed, save_h=False)
    flushes = dtype == torch.bfloat16 and native.isa(dtype) in ("avx512_bf16", "amx_bf16")
    right = (y == x) | (y == 0) if flushes else y == x
    return None if right.all() else f"denormals became {y[:, 0].tolist()}"


def sweep(threads):
    """Every failure of the whole grid, as text."""
    failures = []
    for shape, dtype, packed in itertools.product(SHAPES, DTYPES, (False, True)):
        for i, rank in enumerate(ranks_of(shape[3])):
            activation = tuple(ACTIVATIONS)[i % len(ACTIVATIONS)]
            # Packed bytes hold the rank, and their calls keep no H.
            options = {
                "bias": i % 2 == 0,
                "tensor_rank": not packed and i % 3 == 1,
                "save_h": not packed and i % 2 == 1,
            }
            for added, normed in ((False, False), (True, False), (True, True)):
                if normed and (packed or not rank):
                    continue
                options |= {"added": added, "normed": normed}
                problem = check(shape, dtype, rank, activation, packed, **options)
                if problem:
                    failures.append(
                        f"{shape} {dtype} r{rank} {activation} {packed=} {options}: {problem}"
                    )
    for shape, dtype, lost in itertools.product(LARGE, DTYPES, (0, 1)):
        rank, activation = shape[3] - lost, (None, "relu")[lost]
        for added in (False, True):
            problem = check(shape, dtype, rank, activation, True, added=added)
            if problem:
                failures.append(f"{shape} {dtype} r{rank} {activation} {added=}: {problem}")
    for dtype, packed in itertools.product(DTYPES, (False, True)):
        problem = check_denormals(dtype, packed)
        if problem:
            failures.append(f"{dtype} {packed=}: {problem}")
    # The same whatever the number of threads.
    for name, dtype in itertools.product(activation_cases.NAMES if threads == 1 else (), DTYPES):
        # Tiles, and a few columns, which are summed with care.
        for packed, N in ((False, 40), (True, 40), (True, 3)):
            problem = check_activation(name, dtype, packed, N)
            if problem:
                failures.append(f"activation {packed=} {N=}: {problem}")
    for dtype, (packed, shared) in itertools.product(
        DTYPES, ((False, False), (False, True), (True, True))
    ):
        problem = check_group(dtype, packed, shared)
        if problem:
            failures.append(f"group {dtype} {packed=} {shared=}: {problem}")
    return failures


if __name__ == "__main__":
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    torch.set_num_threads(threads)
    mk.lod_linear(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), backend="native")
    print("isa", *(native.isa(dtype) for dtype in DTYPES))
    found = sweep(threads)
    print("\n".join(found[:40]))
    sys.exit(1 if found else 0)
