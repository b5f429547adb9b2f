"""Launches the two-phase kernel: configuration, plan, scratch; one layer or a group, y or dx.

What runs on the device is in two_phase_kernel.py. Everything that decides is a pure function of
sizes and a device record, so that it is tested without a GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maestro_kernels import hardware
from maestro_kernels.backends.triton import interpreter, workspace
from maestro_kernels.backends.triton.epilogue import activation_name
from maestro_kernels.backends.triton.launch import (
    MAX_LAYERS,
    device_of,
    h_stride,
    layer_runs,
    record_of,
    table_arch,
)
from maestro_kernels.backends.triton.layers import encode_rank
from maestro_kernels.backends.triton.two_phase_kernel import (
    COUNTERS_BEFORE_ARRIVALS,
    two_phase_kernel,
)

__all__ = [
    "MAX_LAYERS",
    "SHIPPED",
    "TwoPhaseConfig",
    "TwoPhasePlan",
    "aot_spec",
    "choose_config",
    "plan_two_phase",
    "two_phase",
    "two_phase_dx",
    "two_phase_dx_grouped",
    "two_phase_grouped",
]

Ranks = Sequence[int] | Tensor

# Two programs of 4 warps, or one of 8, share the 65536 registers of a multiprocessor. Left alone,
# ptxas aims at more programs than the plan has and spills a few bytes to get there.
_MAX_REGISTERS = 255


@dataclass(frozen=True)
class TwoPhaseConfig:
    """Tiles of x and H (BLOCK_M, BLOCK_K, BLOCK_R), of y (BLOCK_M, BLOCK_N); warps and stages."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        tiles = f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K} r{self.BLOCK_R}"
        return f"{tiles} w{self.num_warps} s{self.num_stages}"


@dataclass(frozen=True)
class TwoPhasePlan:
    """How one launch is cut up; sizes in elements.

    Attributes:
        num_programs: programs of the grid; any number is correct.
        split_target: tiles that phase 1 may reach by splitting K; fixes the order of the sums.
        partials: float32 slots for the sums of split tiles.
        counters: int32 counters.
    """

    num_programs: int
    split_target: int
    partials: int
    counters: int


_SMALL = TwoPhaseConfig(16, 32, 128, 32, 4, 4)
_SMALL_WIDE = TwoPhaseConfig(16, 64, 128, 32, 4, 4)
_MIDDLE = TwoPhaseConfig(32, 64, 128, 32, 4, 3)
_LARGE = TwoPhaseConfig(64, 64, 64, 64, 4, 4)
_Row = tuple[float, float, TwoPhaseConfig]  # largest M, largest N, what serves them
# First match wins. Chosen by the model in the maintainers' notes and by what compiles without
# spills; not measured on a GPU. Multiplying float32 exactly takes FMAs, whose operands must fit
# into registers: BLOCK_R is 16 there.
_TABLES: dict[tuple[str, str], tuple[_Row, ...]] = {
    ("sm_90", "16-bit"): (
        (16, 8192, _SMALL),
        (16, math.inf, _SMALL_WIDE),
        (32, math.inf, _MIDDLE),
        (512, math.inf, _LARGE),
        (2048, math.inf, TwoPhaseConfig(64, 128, 64, 64, 4, 4)),
        (math.inf, math.inf, TwoPhaseConfig(128, 128, 64, 64, 8, 4)),
    ),
    ("sm_80", "16-bit"): (
        (16, 8192, _SMALL),
        (16, math.inf, _SMALL_WIDE),
        (32, math.inf, _MIDDLE),
        (512, math.inf, _LARGE),
        (math.inf, math.inf, TwoPhaseConfig(128, 128, 32, 64, 8, 3)),
    ),
}
for _arch in ("sm_80", "sm_90"):
    _TABLES[_arch, "tf32"] = (
        (16, math.inf, TwoPhaseConfig(16, 32, 64, 32, 4, 4)),
        (math.inf, math.inf, TwoPhaseConfig(64, 64, 32, 32, 4, 3)),
    )
    _TABLES[_arch, "ieee"] = (
        (16, math.inf, TwoPhaseConfig(16, 32, 64, 16, 4, 4)),
        (math.inf, math.inf, TwoPhaseConfig(64, 64, 32, 16, 8, 3)),
    )
# Layouts that need exact masks and narrow loads (see _layout): addresses fill the registers, so
# tiles are smaller.
_UNALIGNED: dict[str, tuple[_Row, ...]] = {
    "16-bit": ((16, math.inf, _SMALL), (math.inf, math.inf, _MIDDLE)),
    "tf32": (
        (16, math.inf, TwoPhaseConfig(16, 32, 64, 32, 4, 4)),
        (math.inf, math.inf, TwoPhaseConfig(32, 64, 32, 32, 4, 3)),
    ),
    "ieee": (
        (16, math.inf, TwoPhaseConfig(16, 32, 32, 16, 4, 4)),
        (math.inf, math.inf, TwoPhaseConfig(32, 64, 32, 16, 8, 3)),
    ),
}
# Every configuration that choose_config can return.
SHIPPED: dict[str, tuple[TwoPhaseConfig, ...]] = {
    arch: tuple(
        dict.fromkeys(
            row[2]
            for kind in ("16-bit", "tf32", "ieee")
            for row in _TABLES[arch, kind] + _UNALIGNED[kind]
        )
    )
    for arch in ("sm_80", "sm_90")
}


def choose_config(
    M: int,
    N: int,
    dtype: torch.dtype,
    arch: str,
    input_precision: str = "ieee",
    *,
    aligned: bool = True,
) -> TwoPhaseConfig:
    """Configuration for M rows and the largest N of a group.

    Architectures without an entry take those of another, see table_arch.

    Args:
        M: rows.
        N: out_features.
        dtype: of x.
        arch: "sm_90".
        input_precision: "ieee" or "tf32", for float32.
        aligned: the kernel can read 16 bytes at a time: all sizes and row strides are multiples
            of 8, tensors start on 16 bytes.
    """
    kind = input_precision if dtype == torch.float32 else "16-bit"
    table = _TABLES[table_arch(arch), kind] if aligned else _UNALIGNED[kind]
    return next(row[2] for row in table if row[0] >= M and row[1] >= N)


@functools.lru_cache(4096)
def plan_two_phase(
    device: hardware.Device,
    config: TwoPhaseConfig,
    M: int,
    Ns: tuple[int, ...],
    ranks: tuple[int, ...],
) -> TwoPhasePlan:
    """Plan of one launch; ranks are the active ones, or R where the host does not know them.

    A program waits only for running ones, so the number of programs is only a matter of speed:
    as many as can be resident, or as there are tiles.
    """
    num_m = -(-M // config.BLOCK_M)
    # Registers allow two programs of 4 warps on a multiprocessor, or one of 8.
    resident = device.num_cores * (2 if config.num_warps == 4 else 1)
    shrink = num_m * sum(-(-r // config.BLOCK_R) for r in ranks)
    expand = num_m * sum(-(-N // config.BLOCK_N) for N in Ns)
    # One row block with one rank block could be split: a tensor rank may be as small as that.
    can_split = 2 * num_m <= resident
    return TwoPhasePlan(
        num_programs=max(1, min(resident, max(shrink, expand, resident if can_split else 0))),
        split_target=resident,
        partials=resident * config.BLOCK_M * config.BLOCK_R if can_split else 1,
        counters=COUNTERS_BEFORE_ARRIVALS.value + resident + len(ranks) * num_m,
    )


def two_phase(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None,
    rank: int | Tensor,
    activation: str | None,
    *,
    save_h: bool,
    config: TwoPhaseConfig | None = None,
    num_programs: int | None = None,
    input_precision: str = "ieee",
) -> tuple[Tensor, Tensor | None]:
    """Compute y = act(x @ v[:r].T @ u[:, :r].T + bias) and H = x @ v[:r].T in one launch.

    Args:
        x: (M, K), M > 0, last stride 1; float16, bfloat16 or float32.
        v: (R, K).
        u: (N, R).
        bias: (N,) or None.
        rank: r, or a 0-d int32 tensor on the device of x, clamped to 0..R in the kernel.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".
        save_h: return H.
        config: tiles; None chooses.
        num_programs: programs of the grid; None plans.
        input_precision: "ieee" or "tf32"; says how float32 is multiplied.

    Returns:
        y (M, N), and H: (M, r), or for a tensor rank (M, R) with zeros beyond r; None unless asked.
    """
    ys, hs = two_phase_grouped(
        [x], [v], [u], [bias], _as_ranks(rank), [activation],
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
        save_h: return H.
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
            xs[part], vs[part], us[part], biases[part], ranks[part], activations[part], ys[part],
            save_h=save_h, sum_layers=False, config=config, num_programs=num_programs,
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
    *,
    config: TwoPhaseConfig | None = None,
    num_programs: int | None = None,
    input_precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Compute dx = dH @ v[:r] and dH = dy @ u[:, :r] in one launch of the same kernel.

    Args:
        dy: gradient of y before bias and activation (M, N), last stride 1.
        u: (N, R).
        v: (R, K).
        rank: as in two_phase.
        config: tiles; None chooses.
        num_programs: programs of the grid; None plans.
        input_precision: as in two_phase.

    Returns:
        dx (M, K), and dH shaped like H in two_phase.
    """
    dxs, dhs = two_phase_dx_grouped(
        [dy], [u], [v], _as_ranks(rank), shared_x=False, config=config,
        num_programs=num_programs, input_precision=input_precision,
    )  # fmt: skip
    return dxs[0], dhs[0]


def two_phase_dx_grouped(
    dys: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    ranks: Ranks,
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
            dys[part], ss[part], es[part], [None] * count, ranks[part], [None] * count, outs,
            save_h=True, sum_layers=shared_x, config=config, num_programs=num_programs,
            input_precision=input_precision,
        )  # fmt: skip
        if shared_x and dxs:
            dxs[0] += outs[0]
        else:
            dxs += outs
    return dxs, dhs


def _as_ranks(rank: int | Tensor) -> Ranks:
    return rank.reshape(1) if isinstance(rank, Tensor) else (rank,)


def _launch(
    xs: Sequence[Tensor],
    ss: Sequence[Tensor],
    es: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    ranks: Ranks,
    activations: Sequence[str | None],
    ys: Sequence[Tensor],
    *,
    save_h: bool,
    sum_layers: bool,
    config: TwoPhaseConfig | None,
    num_programs: int | None,
    input_precision: str,
) -> list[Tensor]:
    """Launch once; S (R, K) and E (N, R) may have any strides. Returns H, garbage unless saved."""
    interpreter.ensure()
    x = xs[0]
    M, Rs, Ns = x.shape[0], [s.shape[0] for s in ss], [e.shape[0] for e in es]
    tensor_rank = isinstance(ranks, Tensor)
    widths = Rs if tensor_rank else [min(r, R) for r, R in zip(ranks, Rs, strict=True)]
    device = record_of(x)
    layout = _layout(xs, ss, es, ys)
    config = config or choose_config(
        M, max(Ns), x.dtype, device.arch, input_precision, aligned=layout != "any"
    )
    plan = plan_two_phase(device, config, M, tuple(n for n in Ns[: len(ys)]), tuple(widths))
    hs = _empty_h(x, M, widths, shared=not save_h)
    names = [activation_name(a) for a in activations]
    if num_programs is None:
        # Interpreted programs run one after another: after the first they have nothing to do.
        num_programs = 1 if interpreter.active() else plan.num_programs
    with device_of(x):
        two_phase_kernel[(num_programs,)](
            tuple(xs),
            tuple(ss),
            tuple(es),
            # Any pointer of the type serves where there is no bias: it is never read.
            tuple(e if b is None else b for b, e in zip(biases, es, strict=True)),
            tuple(ys) if not sum_layers else tuple(ys) * len(xs),
            tuple(hs),
            tuple(Ns),
            tuple(t.shape[1] for t in xs),
            tuple(Rs),
            ranks.contiguous() if tensor_rank else tuple(encode_rank(r) for r in ranks),
            tuple(t.stride(0) for t in xs),
            tuple(t.stride(0) for t in ss),
            tuple(t.stride(1) for t in ss),
            tuple(t.stride(0) for t in es),
            tuple(t.stride(1) for t in es),
            tuple(t.stride(0) for t in ys) * (len(xs) if sum_layers else 1),
            tuple(t.stride(0) for t in hs),
            torch.empty(plan.partials, dtype=torch.float32, device=x.device),
            workspace.counters(x.device, plan.counters),
            M,
            plan.split_target,
            BIAS_BITS=sum(1 << i for i, b in enumerate(biases) if b is not None),
            ACTIVATIONS=tuple(names[:1] if len(set(names)) == 1 else names),
            TENSOR_RANK=tensor_rank,
            SUM_LAYERS=sum_layers,
            ZERO_TAIL=tensor_rank and save_h,
            LAYOUT=layout,
            LAYERS=1 << (len(xs) - 1).bit_length(),
            INPUT_PRECISION=input_precision,
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=config.BLOCK_N,
            BLOCK_K=config.BLOCK_K,
            BLOCK_R=config.BLOCK_R,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=_MAX_REGISTERS,
        )
    return hs


def _layout(
    xs: Sequence[Tensor], ss: Sequence[Tensor], es: Sequence[Tensor], ys: Sequence[Tensor]
) -> str:
    """What the kernel may take for granted: "rows", "columns" or "any", see two_phase_kernel."""
    sizes = [n for s, e in zip(ss, es, strict=True) for n in (*s.shape, e.shape[0])]
    sizes += [t.stride(0) for t in (*xs, *ys)]
    if not any(n % 8 for n in sizes) and not any(t.data_ptr() % 16 for t in (*xs, *ss, *es)):
        for layout, unit, other in (("rows", 1, 0), ("columns", 0, 1)):
            if all(t.stride(unit) == 1 and t.stride(other) % 8 == 0 for t in (*ss, *es)):
                return layout
    return "any"


def _empty_h(x: Tensor, M: int, widths: Sequence[int], *, shared: bool) -> list[Tensor]:
    """H of each layer (M, width), rows h_stride apart; one allocation if shared."""
    strides = [h_stride(w) for w in widths]
    if not shared:
        return [
            x.new_empty(M, stride)[:, :width] for width, stride in zip(widths, strides, strict=True)
        ]
    together = x.new_empty(M, sum(strides))
    columns = together.split(strides, 1)
    return [c[:, :width] for c, width in zip(columns, widths, strict=True)]


_FORMS = ("single", "grouped", "dx", "dx_sum")
_UNALIGNED_FORMS = ("odd", "dx_odd")


def aot_spec(config: TwoPhaseConfig, dtype: str, arch: str) -> Iterator[dict[str, Any]]:
    """What aot.py compiles: the forms of the kernel for a configuration, "bf16", "fp16" or "fp32".

    single: int rank, bias and gelu; grouped: three layers, tensor ranks, H saved, silu beside none;
    dx: of one layer; dx_sum: three layers that share x, tensor ranks; odd, dx_odd: one layer whose
    sizes have no common divisor.
    """
    for precision in ("ieee", "tf32") if dtype == "fp32" else ("16-bit",):
        suffix = f" {precision}" if dtype == "fp32" else ""
        tables = ((_TABLES[arch, precision], _FORMS), (_UNALIGNED[precision], _UNALIGNED_FORMS))
        for form in (
            f for table, forms in tables if config in [r[2] for r in table] for f in forms
        ):
            yield {
                "kernel": two_phase_kernel,
                "label": f"{config} {form}{suffix}",
                "signature": _signature(config, dtype, form, precision),
                "options": {
                    "num_warps": config.num_warps,
                    "num_stages": config.num_stages,
                    "maxnreg": _MAX_REGISTERS,
                },
                "dot_rows": config.BLOCK_M,
            }


def _signature(config: TwoPhaseConfig, dtype: str, form: str, precision: str) -> dict[str, Any]:
    """Arguments as Triton specialises them for contiguous tensors, sizes divisible by 16 or odd."""
    backward, group, odd = form.startswith("dx"), form in ("grouped", "dx_sum"), "odd" in form
    count, size = 3 if group else 1, "i32" if odd else "i32:16"

    def each(value: object) -> tuple[object, ...]:
        return (value,) * count

    pointers = ("xs", "ss", "es", "biases", "ys", "hs")
    sizes = ("Ns", "Ks", "Rs", "strides_xm", "strides_ym")
    strides = {"strides_sr": size, "strides_sk": 1, "strides_en": size, "strides_er": 1}
    if backward:
        strides = {"strides_sr": 1, "strides_sk": size, "strides_en": 1, "strides_er": size}
    strides["strides_hm"] = "i32:16"
    activations = {"single": ("gelu",), "odd": ("gelu",), "grouped": ("silu", "none", "none")}.get(
        form, ("none",)
    )
    return (
        {name: each(f"*{dtype}:16") for name in pointers}
        | {name: each(size) for name in sizes}
        | {name: each(value) for name, value in strides.items()}
        | {
            "ranks": "*i32" if group else each("i32"),
            "partials": "*fp32:16",
            "counters": "*i32:16",
            "M": "i32",
            "split_target": "i32",
            "BIAS_BITS": 0 if backward else 5 if group else 1,
            "ACTIVATIONS": activations,
            "TENSOR_RANK": group,
            "SUM_LAYERS": form == "dx_sum",
            "ZERO_TAIL": group,
            "LAYOUT": "any" if odd else "columns" if backward else "rows",
            "LAYERS": 4 if group else 1,
            "INPUT_PRECISION": "tf32" if precision == "tf32" else "ieee",
            "BLOCK_M": config.BLOCK_M,
            "BLOCK_N": config.BLOCK_N,
            "BLOCK_K": config.BLOCK_K,
            "BLOCK_R": config.BLOCK_R,
        }
    )
