"""The Triton backend: what it can serve, and which kernel serves it. Triton is imported on use."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from maestro_kernels import hardware
from maestro_kernels.backends import matmul, reference
from maestro_kernels.backends.triton import choose, expand_config, row_config
from maestro_kernels.backends.triton.launch import input_precision

if TYPE_CHECKING:
    from maestro_kernels.call import Call, Grads, InputGrads, Needs
    from maestro_kernels.problem import LoDProblem

Ranks = Sequence[int] | Tensor
STRATEGIES = {"cuda": ("row", "two_phase", "expand")}
# Its kernels are compiled when they first run.
COMPILES = True
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def interpreted() -> bool:
    """Whether TRITON_INTERPRET asks for the interpreter, by Triton's own reading of it."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def unsupported(problem: LoDProblem) -> str | None:
    """Why the Triton kernels cannot serve the problem, or None when they can."""
    try:
        found = importlib.util.find_spec("triton") is not None
    except ImportError:
        found = False
    if not found:
        return "triton is not installed"
    if problem.dtype not in _DTYPES:
        return f"triton kernels take float16, bfloat16 and float32, not {problem.dtype}"
    if problem.device.type != "cuda" and not (problem.device.type == "cpu" and interpreted()):
        return (
            f"triton kernels need CUDA tensors, or TRITON_INTERPRET=1 and CPU tensors for the "
            f"interpreter; the tensors are on {problem.device}"
        )
    # A plan for a GPU that is not here (a recorded device) has nobody to ask.
    if problem.device.type == "cuda" and torch.cuda.is_available():
        if torch.version.hip is not None:
            return "triton kernels are written and compiled for NVIDIA GPUs only"
        if torch.cuda.get_device_capability(problem.device) < (8, 0):
            arch = hardware.current_device(problem.device).arch
            return f"triton kernels need sm_80 or newer, the device is {arch}"
    if problem.K > 1 and problem.x_stride and problem.x_stride[-1] != 1:
        return f"triton kernels read x with last stride 1, not {problem.x_stride[-1]}"
    return None


def unsupported_group(problems: Sequence[LoDProblem]) -> str | None:
    """Why no one launch serves the layers, each of them servable: one always does."""
    return None


# What the predicted time of a strategy is told with.
_TOLD = {
    "row": "with H in registers",
    "two_phase": "in two phases",
    "expand": "after a library's product",
}


def choose_strategy(
    problems: LoDProblem | Sequence[LoDProblem], device: hardware.Device | None = None
) -> tuple[str, str]:
    """(strategy, reason) for one layer or a group: a name of STRATEGIES. Pure for a given device.

    The one of the smallest predicted time (docs/dev/predictions.md); no table was measured yet.

    Args:
        problems: the layers, already validated.
        device: record to plan for; None is that of the tensors, an H100 for the interpreter.
    """
    group = problems if isinstance(problems, Sequence) else (problems,)
    if len(group) > 1:
        return "two_phase", f"one launch serves the {len(group)} layers of the group"
    p = group[0]
    precision = input_precision(p.dtype)
    if p.dtype == torch.float32 and precision == "ieee":
        return "two_phase", "IEEE float32 has no tensor cores: H is kept out of the registers"
    device = device or _record_of(p)
    rank = max(p.max_active_rank, 1)
    seconds = choose.strategies(
        device, p.M, p.N, p.K, rank, p.dtype, precision,
        aligned=not (p.N % 8 or p.K % 8 or p.R % 8),
    )  # fmt: skip
    if not _expands(p, device):
        seconds = {name: took for name, took in seconds.items() if name != "expand"}
    if len(seconds) == 1:
        return "two_phase", f"H of rank {rank} does not fit into registers"
    told = ", ".join(f"{1e6 * took:,.1f} {_TOLD[name]}" for name, took in seconds.items())
    return min(seconds, key=seconds.__getitem__), f"predicted µs: {told}"


def takes(strategy: str, problems: Sequence[LoDProblem]) -> bool:
    """Whether a strategy, as choose_strategy names it, can run one layer or a group."""
    if strategy == "row":
        first = problems[0]
        # Beside exact products of float32 no register is left for a residual.
        fits = first.is_plain or input_precision(first.dtype) != "ieee" or first.dtype.itemsize < 4
        return len(problems) == 1 and first.max_active_rank <= row_config.MAX_WIDTH and fits
    if strategy == "expand":
        return len(problems) == 1 and _expands(problems[0], _record_of(problems[0]))
    return strategy == "two_phase"


def _expands(p: LoDProblem, device: hardware.Device) -> bool:
    """Whether the expand kernel serves a layer: rows that TMA takes, a rank that the host knows."""
    if not p.is_plain or p.rank is None:
        return False
    described = p.dtype.itemsize == 2 and p.R % 8 == 0 == p.N % 8
    return described and device.arch in expand_config.ARCHITECTURES


def _record_of(p: LoDProblem) -> hardware.Device:
    """The device record to plan for: the interpreter, and a GPU not here, stand in for an H100."""
    if p.device.type == "cuda" and torch.cuda.is_available():
        return hardware.current_device(p.device)
    return hardware.H100


def quick(strategy: str) -> Callable[..., Tensor | None]:
    """(x, u, v, bias, int rank, activation) -> Y of one layer, without H.

    None where no tensors that lie like these were served before: a launch is kept with the shapes,
    strides, dtypes and alignment of all that it was validated and planned for.
    """
    from maestro_kernels.backends.triton import row, two_phase

    again = {"row": row.again, "two_phase": two_phase.again}
    return again.get(strategy, _not_again)


def _not_again(*layer: Any) -> None:
    """The expand kernel keeps no launches: a library's product dwarfs what they would save."""


def forward(
    call: Call, *, save_h: bool, strategy: str
) -> tuple[list[Tensor], Sequence[Tensor | None]]:
    """Ys = act(H @ u[:, :r].T + bias + residual) and Hs = scale · x @ v[:r].T in one launch.

    H has the width r, or R with zeros beyond r for tensor ranks; its rows may be further apart. A
    norm comes between the products, H is from before it.
    """
    from maestro_kernels.backends.triton.row import row
    from maestro_kernels.backends.triton.two_phase import two_phase_grouped

    biases = [None if b is None else b.contiguous() for b in call.biases]
    residuals = [None if t is None else _readable(t) for t in call.residuals]
    norms = [None if t is None else t.contiguous() for t in call.norms]
    if strategy == "row":
        x, u, v, _, rank, activation = call.layer(0)
        y, h = row(
            x, v, u, biases[0], rank, activation, *residuals or [None], call.scale(0),
            *norms or [None], call.norm_eps,
            save_h=save_h, input_precision=input_precision(x.dtype),
        )  # fmt: skip
        return [y], [h]
    if strategy == "expand":
        from maestro_kernels.backends.triton.expand import expand

        x, u, v, _, rank, activation = call.layer(0)
        y, h = expand(x, v, u, biases[0], rank, activation)
        return [y], [h if save_h else None]
    ys, hs = two_phase_grouped(
        call.xs, call.vs, call.us, biases, _ranks(call), call.activations,
        residuals, call.scales, norms, call.norm_eps,
        save_h=save_h, input_precision=input_precision(call.xs[0].dtype),
    )  # fmt: skip
    return ys, hs if hs is not None else [None] * call.n


def input_grads(
    call: Call,
    dys: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    ys: Sequence[Tensor | None],
    *,
    needs: Needs,
    strategy: str,
) -> InputGrads:
    """(dxs, dnorms, dzs, Hs, dHs): dx and dH by the kernel of the forward, in one launch.

    A shared x gets the sum over the layers, formed on chip. With a norm between them the two
    products of dx are not one launch: library matmuls compute it then.
    """
    if call.norms:
        return matmul.input_grads(call, dys, hs, ys, needs=needs, strategy=matmul.TWO)
    from maestro_kernels.backends.triton.row import row_dx
    from maestro_kernels.backends.triton.two_phase import two_phase_dx_grouped

    needs_x, needs_u, needs_v, _ = needs
    n, shared, precision = call.n, len(call.xs) == 1, input_precision(call.xs[0].dtype)
    dzs, saved_hs = [], []
    for i in range(n):
        dz, h = _before_activation(call, i, _readable(dys[i]), hs[i], ys[i], needs_u)
        dzs.append(dz)
        saved_hs.append(h)
    dxs: Grads = [None] * len(call.xs)
    dhs: Sequence[Tensor | None] = [None] * n
    if strategy == "row" and needs_x:
        _, u, v, _, rank, _ = call.layer(0)
        dx, dh = row_dx(dzs[0], u, v, rank, call.scale(0), input_precision=precision)
        dxs, dhs = [dx], [dh]
    elif strategy == "expand" and (needs_x or needs_v):
        from maestro_kernels.backends.triton.expand import expand_dx

        _, u, v, _, rank, _ = call.layer(0)
        dx, dh = expand_dx(dzs[0], u, v, rank, needs_x=needs_x)
        dxs, dhs = [dx], [dh]
    elif needs_x or needs_v:
        # Without columns in v no tile of dx is left and only dH is computed.
        expand = call.vs if needs_x else [v[:, :0] for v in call.vs]
        found, dhs = two_phase_dx_grouped(
            dzs, call.us, expand, _ranks(call), call.scales, shared_x=shared,
            input_precision=precision,
        )  # fmt: skip
        if needs_x:
            dxs = list(found)
    return dxs, [None] * n, dzs, saved_hs, dhs


def _ranks(call: Call) -> Ranks:
    """As the kernels take them: the tensor rank of one layer is (1,)."""
    return call.ranks.reshape(-1) if isinstance(call.ranks, Tensor) else call.ranks  # type: ignore[return-value]


def _readable(matrix: Tensor) -> Tensor:
    """Kernels read rows in one piece; the gradient of a sum is one element expanded."""
    in_place = matrix.stride(-1) == 1 or matrix.shape[-1] == 1
    return matrix if in_place else matrix.contiguous()


def _before_activation(
    call: Call,
    i: int,
    dy: Tensor,
    h: Tensor | None,
    y: Tensor | None,
    needs_h: bool,
) -> tuple[Tensor, Tensor | None]:
    """(dz, H) of layer i; H is computed again where it is needed and was not saved."""
    from maestro_kernels.backends.triton.activation_grad import activation_grad
    from maestro_kernels.backends.triton.two_phase import two_phase

    x, u, v, bias, rank, activation = call.layer(i)
    precision = input_precision(x.dtype)
    needs_z = activation is not None and not (activation == "relu" and y is not None)
    if h is None and (needs_h or needs_z):
        # Without rows in u no tile of y is left and only H is computed.
        h = two_phase(
            x, v, u[:0], None, rank, None, None, call.scale(i), save_h=True,
            input_precision=precision,
        )[1]  # fmt: skip
    if activation is None:
        return dy, h
    residual = call.residual(i)
    if residual is not None and needs_z and h is not None:
        # An activation behind a residual is rare: z by a library's product, in a pass of its own.
        z = reference.expand(h, u, bias, rank if isinstance(rank, Tensor) else None, residual)
        return reference.activation_backward(dy, z, activation), h
    bias = None if bias is None else bias.contiguous()
    return activation_grad(dy, h, u, bias, y, rank, activation, input_precision=precision), h


def weight_grads(
    call: Call,
    dzs: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    dhs: Sequence[Tensor | None],
    *,
    needs: Needs,
    strategy: str,
) -> tuple[Grads, Grads, Grads]:
    """(dus, dvs, dbiases) of the layers in one launch."""
    from maestro_kernels.backends.triton import wgrad

    _, needs_u, needs_v, needs_bias = needs
    return wgrad.weight_grads(
        dzs, hs, dhs, call.xs, [v.shape[0] for v in call.vs], _ranks(call), needs_u=needs_u,
        needs_v=needs_v, needs_bias=[needs_bias and bias is not None for bias in call.biases],
        input_precision=input_precision(call.xs[0].dtype),
    )  # fmt: skip
