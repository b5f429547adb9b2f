"""Launches the two-phase kernel: one layer or a group, y or dx.

What runs on the device is in two_phase_kernel.py, what decides tiles and grid in
two_phase_config.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maestro_kernels.backends import workspace
from maestro_kernels.backends.triton import choose, interpreter
from maestro_kernels.backends.triton.epilogue import activation_name
from maestro_kernels.backends.triton.launch import (
    MAX_LAYERS,
    h_stride,
    input_precision,
    is_elsewhere,
    layer_runs,
    record_of,
    table_arch,
)
from maestro_kernels.backends.triton.launcher import Launcher, keep, layouts
from maestro_kernels.backends.triton.layers import encode_rank
from maestro_kernels.backends.triton.two_phase_aot import aot_spec
from maestro_kernels.backends.triton.two_phase_config import (
    MAX_REGISTERS,
    SHIPPED,
    TwoPhaseConfig,
    TwoPhasePlan,
    plan_two_phase,
)
from maestro_kernels.backends.triton.two_phase_kernel import two_phase_kernel
from maestro_kernels.call import as_rows

__all__ = [
    "MAX_LAYERS",
    "SHIPPED",
    "TwoPhaseConfig",
    "TwoPhasePlan",
    "aot_spec",
    "plan_two_phase",
    "two_phase",
    "two_phase_dx",
    "two_phase_dx_grouped",
    "two_phase_grouped",
]

Ranks = Sequence[int] | Tensor


def two_phase(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None,
    rank: int | Tensor,
    activation: str | None,
    residual: Tensor | None = None,
    scale: float = 1.0,
    norm: Tensor | None = None,
    norm_eps: float = 0.0,
    *,
    save_h: bool,
    config: TwoPhaseConfig | None = None,
    num_programs: int | None = None,
    input_precision: str = "ieee",
) -> tuple[Tensor, Tensor | None]:
    """Compute y = act(H @ u[:, :r].T + bias + residual), H = scale · x @ v[:r].T in one launch.

    Args:
        x: (M, K), M > 0, last stride 1; float16, bfloat16 or float32.
        v: (R, K).
        u: (N, R).
        bias: (N,) or None.
        rank: r, or a 0-d int32 tensor on the device of x, clamped to 0..R in the kernel.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".
        residual: (M, N), last stride 1, or None.
        scale: what H is multiplied by.
        norm: weight (R,) of an RMSNorm between the products, or None; contiguous.
        norm_eps: what is added to the mean of squares.
        save_h: return H, from before a norm.
        config: tiles; None chooses.
        num_programs: programs of the grid; None plans.
        input_precision: "ieee" or "tf32"; says how float32 is multiplied.

    Returns:
        y (M, N), and H: (M, r), or for a tensor rank (M, R) with zeros beyond r; None unless asked.
    """
    ys, hs = two_phase_grouped(
        [x], [v], [u], [bias], _as_ranks(rank), [activation], [residual], [scale], [norm], norm_eps,
        save_h=save_h, config=config, num_programs=num_programs, input_precision=input_precision,
    )  # fmt: skip
    return ys[0], hs[0] if hs is not None else None


def two_phase_grouped(
    xs: Sequence[Tensor],
    vs: Sequence[Tensor],
    us: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    ranks: Ranks,
    activations: Sequence[str | None],
    residuals: Sequence[Tensor | None] = (),
    scales: Sequence[float] = (),
    norms: Sequence[Tensor | None] = (),
    norm_eps: float = 0.0,
    *,
    save_h: bool,
    config: TwoPhaseConfig | None = None,
    num_programs: int | None = None,
    input_precision: str = "ieee",
) -> tuple[list[Tensor], list[Tensor] | None]:
    """two_phase for layers of different N, R and rank: one launch for up to MAX_LAYERS of them.

    Args:
        xs: one x that all layers share, or one for each.
        vs: (R_i, K_i).
        us: (N_i, R_i).
        biases: (N_i,) or None.
        ranks: r_i, or an int32 tensor (n,) on the device.
        activations: one for each layer.
        residuals: (M_i, N_i) or None for each; () where none has one.
        scales: one for each layer; () where all are 1.
        norms: (R_i,) or None for each; () where none has one.
        norm_eps: what is added to the mean of squares.
        save_h: return H, from before a norm.
        config: tiles; None chooses.
        num_programs: programs of the grid; None plans.
        input_precision: as in two_phase.

    Returns:
        y_i (M_i, N_i), and H_i as in two_phase.
    """
    xs = list(xs) * len(us) if len(xs) == 1 else xs
    ys = [x.new_empty(x.shape[0], u.shape[0]) for x, u in zip(xs, us, strict=True)]
    hs: list[Tensor] | None = [] if save_h else None
    for part in layer_runs(xs):
        h = _launch(
            xs[part], vs[part], us[part], biases[part], ranks[part], activations[part],
            residuals[part], scales[part], norms[part], norm_eps, ys[part], save_h=save_h,
            sum_layers=False, config=config, num_programs=num_programs,
            input_precision=input_precision,
        )  # fmt: skip
        if hs is not None:
            hs += h
    return ys, hs


def two_phase_dx(
    dy: Tensor,
    u: Tensor,
    v: Tensor,
    rank: int | Tensor,
    scale: float = 1.0,
    *,
    config: TwoPhaseConfig | None = None,
    num_programs: int | None = None,
    input_precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Compute dx = dH @ v[:r] and dH = scale · dy @ u[:, :r] in one launch of the same kernel.

    Args:
        dy: gradient of y before bias and activation (M, N), last stride 1.
        u: (N, R).
        v: (R, K).
        rank: as in two_phase.
        scale: as in two_phase.
        config: tiles; None chooses.
        num_programs: programs of the grid; None plans.
        input_precision: as in two_phase.

    Returns:
        dx (M, K), and dH shaped like H in two_phase.
    """
    dxs, dhs = two_phase_dx_grouped(
        [dy], [u], [v], _as_ranks(rank), [scale], shared_x=False, config=config,
        num_programs=num_programs, input_precision=input_precision,
    )  # fmt: skip
    return dxs[0], dhs[0]


def two_phase_dx_grouped(
    dys: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    ranks: Ranks,
    scales: Sequence[float] = (),
    *,
    shared_x: bool,
    config: TwoPhaseConfig | None = None,
    num_programs: int | None = None,
    input_precision: str = "ieee",
) -> tuple[list[Tensor], list[Tensor]]:
    """two_phase_dx for a group; with a shared x its one dx is summed over the layers on chip.

    Args:
        dys: (M_i, N_i), one for each layer.
        us: (N_i, R_i).
        vs: (R_i, K_i).
        ranks: as in two_phase_grouped.
        scales: as in two_phase_grouped.
        shared_x: the layers have read one x: return one dx.
        config: tiles; None chooses.
        num_programs: programs of the grid; None plans.
        input_precision: as in two_phase.

    Returns:
        dx_i (M_i, K_i), or the one sum of them, and dH_i.
    """
    ss, es = [u.t() for u in us], [v.t() for v in vs]
    dxs: list[Tensor] = []
    dhs: list[Tensor] = []
    for part in layer_runs(dys):
        outs = [
            dy.new_empty(dy.shape[0], e.shape[0]) for dy, e in zip(dys[part], es[part], strict=True)
        ]
        outs = outs[:1] if shared_x else outs
        count = len(dys[part])
        dhs += _launch(
            dys[part], ss[part], es[part], [None] * count, ranks[part], [None] * count, (),
            scales[part], (), 0.0, outs, save_h=True, sum_layers=shared_x, config=config,
            num_programs=num_programs, input_precision=input_precision,
        )  # fmt: skip
        if shared_x and dxs:
            dxs[0] += outs[0]
        else:
            dxs += outs
    return dxs, dhs


def _as_ranks(rank: int | Tensor) -> Ranks:
    return rank.reshape(1) if isinstance(rank, Tensor) else (rank,)


class _Launch(NamedTuple):
    """A launch but for its tensors: of layouts that were launched before, or are about to be.

    Attributes:
        launcher: kernel, grid and constants.
        M: rows.
        widths: columns of H of each layer.
        strides_h: elements from one row of H to the next.
        sizes: Ns, Ks, Rs.
        ranks: as the kernel takes them; None where they are a tensor.
        strides: of x, S, E, y and H.
        strides_res: of the residuals; None where there are none.
        partials: float32 slots for the sums of split tiles.
        counters: int32 counters.
        split_target: tiles that phase 1 may reach by splitting K.
        squares: float32 sums of squares where there are norms.
    """

    launcher: Launcher
    M: int
    widths: Sequence[int]
    strides_h: Sequence[int]
    sizes: tuple[tuple[int, ...], ...]
    ranks: tuple[int, ...] | None
    strides: tuple[tuple[int, ...], ...]
    strides_res: tuple[int, ...] | None
    partials: int
    counters: int
    split_target: int
    squares: int


_launches: dict[tuple[Any, ...], _Launch] = {}


def _launch(
    xs: Sequence[Tensor],
    ss: Sequence[Tensor],
    es: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    ranks: Ranks,
    activations: Sequence[str | None],
    residuals: Sequence[Tensor | None],
    scales: Sequence[float],
    norms: Sequence[Tensor | None],
    norm_eps: float,
    ys: Sequence[Tensor],
    *,
    save_h: bool,
    sum_layers: bool,
    config: TwoPhaseConfig | None,
    num_programs: int | None,
    input_precision: str,
) -> list[Tensor]:
    """Launch once; S (R, K) and E (N, R) may have any strides. Returns H where it is saved."""
    interpreter.ensure()
    tensor_rank = isinstance(ranks, Tensor)
    how = (
        None if tensor_rank else tuple(ranks), tuple(activations), save_h, sum_layers,
        config, num_programs, input_precision,
    )  # fmt: skip
    if not any(t is not None for t in residuals):
        residuals = ()
    if not any(t is not None for t in norms):
        norms = ()
    factors = None if all(s == 1 for s in scales) else tuple(map(float, scales))
    lists = (*xs, *ss, *es, *biases, *residuals, *norms)
    key = (xs[0].device, how, layouts(lists), len(residuals), len(norms), factors is None)
    found = _launches.get(key)
    if found is None:
        found = keep(_launches, key, _planned(xs, ss, es, biases, residuals, norms, ys, *how))
    pointer = ranks.contiguous() if isinstance(ranks, Tensor) else None
    # Any pointer of the type serves where there is no bias: it is never read.
    given = [e if b is None else b for b, e in zip(biases, es, strict=True)]
    added = weights = None
    if residuals:
        added = tuple([e if t is None else t for t, e in zip(residuals, es, strict=True)])
    if norms:
        weights = tuple([e if t is None else t for t, e in zip(norms, es, strict=True)])
    outs = [*ys] * len(xs) if sum_layers else ys
    hs = _run(found, xs, ss, es, given, pointer, outs, added, factors, weights, norm_eps, save_h)
    return [h[:, :width] for h, width in zip(hs, found.widths, strict=True)] if save_h else []


def again(
    x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, rank: int, activation: str | None
) -> Tensor | None:
    """Y of two_phase for x (..., K), None where no tensors that lie like these went through it."""
    how = (rank,), (activation,), False, False, None, None, input_precision(x.dtype)
    rows = x if x.ndim == 2 else as_rows(x)
    found = _launches.get((x.device, how, layouts((rows, v, u, bias)), 0, 0, True))
    if found is None:
        return None
    y = x.new_empty(found.M, u.shape[0])
    _run(found, (rows,), (v,), (u,), (u if bias is None else bias,), None, (y,))
    return y if rows is x else y.view(*x.shape[:-1], u.shape[0])


def _run(
    launch: _Launch,
    xs: Sequence[Tensor],
    ss: Sequence[Tensor],
    es: Sequence[Tensor],
    biases: Sequence[Tensor],
    ranks: Tensor | None,
    ys: Sequence[Tensor],
    residuals: tuple[Tensor, ...] | None = None,
    scales: tuple[float, ...] | None = None,
    norms: tuple[Tensor, ...] | None = None,
    norm_eps: float = 0.0,
    save_raw: bool = False,
) -> tuple[Tensor, ...]:
    """Launch with these tensors; returns every H with all its stride_h columns.

    Where there are norms, H is what the kernel works with, or, if `save_raw`, from before them.
    """
    (
        launcher, M, _, strides_h, sizes, encoded, strides, strides_res, partials, counters,
        split_target, squares,
    ) = launch  # fmt: skip
    x = xs[0]
    if is_elsewhere(x):
        with torch.cuda.device(x.device):
            others = residuals, scales, norms, norm_eps, save_raw
            return _run(launch, xs, ss, es, biases, ranks, ys, *others)
    hs = tuple(map(x.new_empty, repeat(M), strides_h))
    raws = tuple(map(x.new_empty, repeat(M), strides_h)) if norms and save_raw else None
    launcher(
        x,
        tuple(xs),
        tuple(ss),
        tuple(es),
        tuple(biases),
        tuple(ys),
        hs,
        *sizes,
        encoded if ranks is None else ranks,
        *strides,
        residuals,
        strides_res,
        scales,
        norms,
        raws,
        None if norms is None else torch.empty(squares, dtype=torch.float32, device=x.device),
        None if norms is None else float(norm_eps),
        torch.empty(partials, dtype=torch.float32, device=x.device),
        workspace.counters(x.device, counters),
        M,
        split_target,
    )
    return hs if raws is None else raws


def _planned(
    xs: Sequence[Tensor],
    ss: Sequence[Tensor],
    es: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residuals: Sequence[Tensor | None],
    norms: Sequence[Tensor | None],
    ys: Sequence[Tensor],
    ranks: tuple[int, ...] | None,
    activations: tuple[str | None, ...],
    save_h: bool,
    sum_layers: bool,
    config: TwoPhaseConfig | None,
    num_programs: int | None,
    input_precision: str,
) -> _Launch:
    """Tiles, grid and constants for tensors that lie like these."""
    x, n, tensor_rank = xs[0], len(xs), ranks is None
    M, device = x.shape[0], record_of(x)
    Ns, Ks, Rs = (tuple(t.shape[i] for t in ts) for ts, i in ((es, 0), (xs, 1), (ss, 0)))
    widths = Rs if ranks is None else tuple(map(min, ranks, Rs))
    added = [e if t is None else t for t, e in zip(residuals, es, strict=True)] if residuals else []
    layout = _layout(xs, ss, es, [*ys, *(t for t in residuals if t is not None)])
    config = config or choose.two_phase(
        device, M, Ns, Ks, Rs, x.dtype, input_precision, aligned=layout != "any",
        normed=bool(norms),
    )  # fmt: skip
    plan = plan_two_phase(device, config, M, Ns[: len(ys)], widths)
    strides_h = tuple(map(h_stride, widths))
    names = [activation_name(a) for a in activations]
    # The interpreter knows neither prefetches nor launches that overlap.
    decode = config.decode and not interpreter.active()
    pdl = decode and table_arch(device.arch) == "sm_90"
    if num_programs is None:
        # Interpreted programs run one after another: after the first they have nothing to do.
        num_programs = 1 if interpreter.active() else plan.num_programs
    launcher = Launcher(
        two_phase_kernel,
        num_programs,
        {
            "BIAS_BITS": sum(1 << i for i, b in enumerate(biases) if b is not None),
            "RESIDUAL_BITS": sum(1 << i for i, t in enumerate(residuals) if t is not None),
            "NORM_BITS": sum(1 << i for i, t in enumerate(norms) if t is not None),
            "ACTIVATIONS": tuple(names[:1] if len(set(names)) == 1 else names),
            "TENSOR_RANK": tensor_rank,
            "SUM_LAYERS": sum_layers,
            "ZERO_TAIL": tensor_rank and save_h,
            "LAYOUT": layout,
            "LAYERS": 1 << (n - 1).bit_length(),
            "INPUT_PRECISION": input_precision,
            "BLOCK_M": config.BLOCK_M,
            "BLOCK_N": config.BLOCK_N,
            "BLOCK_K": config.BLOCK_K,
            "BLOCK_R": config.BLOCK_R,
            "STEP_R": config.ranks_per_step,
            "PREFETCH": decode and layout != "any",
            "PDL": pdl,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=MAX_REGISTERS,
        launch_pdl=pdl,
    )
    strides = (
        tuple(t.stride(0) for t in xs),
        tuple(t.stride(0) for t in ss),
        tuple(t.stride(1) for t in ss),
        tuple(t.stride(0) for t in es),
        tuple(t.stride(1) for t in es),
        tuple(t.stride(0) for t in ys) * (n if sum_layers else 1),
        strides_h,
    )
    encoded = None if ranks is None else tuple(map(encode_rank, ranks))
    return _Launch(
        launcher, M, widths, strides_h, (Ns, Ks, Rs), encoded, strides,
        tuple(t.stride(0) for t in added) if added else None,
        plan.partials, plan.counters, plan.split_target, n * -(-max(Rs) // config.BLOCK_R) * M,
    )  # fmt: skip


def _layout(
    xs: Sequence[Tensor], ss: Sequence[Tensor], es: Sequence[Tensor], ys: Sequence[Tensor]
) -> str:
    """What the kernel may take for granted: "rows", "columns" or "any", see two_phase_kernel."""
    sizes = [n for s, e in zip(ss, es, strict=True) for n in (*s.shape, e.shape[0])]
    # A y without elements is not written, and its stride says nothing.
    sizes += [t.stride(0) for t in (*xs, *(y for y in ys if y.numel()))]
    if not any(n % 8 for n in sizes) and not any(t.data_ptr() % 16 for t in (*xs, *ss, *es)):
        for layout, unit, other in (("rows", 1, 0), ("columns", 0, 1)):
            if all(t.stride(unit) == 1 and t.stride(other) % 8 == 0 for t in (*ss, *es)):
                return layout
    return "any"
