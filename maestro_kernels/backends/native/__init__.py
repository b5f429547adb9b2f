"""The compiled library (csrc/): fused kernels for CPU tensors, and CUDA kernels where it has them.

CUDA calls go through cuda.py. The library is loaded on first use. It checks shapes, dtypes
and strides itself and refuses with a RuntimeError what does not fit; problem.py has then the better
words.
"""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from maestro_kernels.backends import matmul
from maestro_kernels.backends.native import cuda
from maestro_kernels.problem import ACTIVATIONS

if TYPE_CHECKING:
    from maestro_kernels.call import Call
    from maestro_kernels.problem import LoDProblem

STRATEGIES = {"cpu": ("fused",), "cuda": cuda.STRATEGIES[1:]}
# What mk_interface() in csrc/bindings/cpu.cpp returns.
INTERFACE = 6
# In every error of the library's ops.
LIBRARY_NAME = "maestro_native"
LIBRARY = Path(__file__).resolve().parents[2] / "_native.so"
# The order of mk::DType and mk::Activation in csrc/layer.h.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def _not_built(part: str) -> str | None:
    """What the build wrote down about a part that it left out (setup.py: "native" or "cuda")."""
    try:
        record = json.loads(LIBRARY.with_name("_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a checkout in which nothing was built, or a record cut short
        return None
    why = record.get(part) if isinstance(record, dict) else None
    return why if isinstance(why, str) else None


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """(library, why there is none); ValueError where MK_CPU_ISA names no set that runs here."""
    if not LIBRARY.exists():
        why = _not_built("native") or "nothing has built it yet: pip install ., or make native"
        return None, f"this installation has no compiled library: {why}"
    try:
        torch.ops.load_library(str(LIBRARY))
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        # Torch wraps the loader's words. The library's path, which they name, says nothing here.
        words = str(error.__cause__ or error).replace(str(LIBRARY), LIBRARY.name)
        return None, f"the compiled library does not load: {words}"
    if not hasattr(library, "mk_interface") or library.mk_interface() != INTERFACE:
        return None, "the compiled library is of another version of this package: build it again"
    for name in ("mk_cpu_isa", "mk_cpu_isas", "mk_cpu_isa_error", "mk_cuda_device", "mk_cuda_plan"):
        getattr(library, name).restype = ctypes.c_char_p
    wrong = library.mk_cpu_isa_error()
    if wrong:
        raise ValueError(wrong.decode(errors="replace"))
    return library, ""


def load_error() -> str | None:
    """Why the compiled library is not there, in the build's or the loader's words; None if it is.

    Raises:
        ValueError: MK_CPU_ISA names an instruction set that is unknown, not in this build, or not
            on this machine.
    """
    library, reason = _load()
    return None if library is not None else reason


def cuda_error() -> str | None:
    """Why there are no CUDA kernels, whatever devices are here; None when there are."""
    library, reason = _load()
    if library is None:
        return reason
    if library.mk_cuda_built():
        return None
    return _not_built("cuda") or "the compiled library was built without them"


def available_isas() -> tuple[str, ...]:
    """Instruction sets that MK_CPU_ISA may name here, best last; empty without a library."""
    library, _ = _load()
    if library is None:
        return ()
    names: bytes = library.mk_cpu_isas()
    return tuple(names.decode().split(", "))


def isa(dtype: torch.dtype) -> str:
    """Instruction set that the CPU kernels of a dtype use on this machine."""
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"isa: {reason}")
    name: bytes = library.mk_cpu_isa(_DTYPES.index(dtype))
    return name.decode()


def few_rows(dtype: torch.dtype) -> int:
    """Up to so many rows, dot products with factors as they lie beat two library matmuls.

    In float32 both wait for the same bytes and one call is saved; in 16 bits library matmuls take
    several times as long. The portable kernels have no such path: 0. On NEON nobody has measured
    it, and the libraries' 16-bit matmuls are others there: 0.
    """
    if isa(dtype) in ("portable", "neon"):
        return 0
    return 1 if dtype == torch.float32 else 4


def ops() -> Any:
    """The library's op namespace; load_error() must be None."""
    _load()
    return torch.ops.maestro_native


def raw(name: str) -> Callable[..., Any]:
    """An op without the Python frame of its overload: 0.2 us of 4."""
    overload = getattr(ops(), name).default
    call: Callable[..., Any] = getattr(overload, "_op", overload)
    return call


def raw_linear(*, is_plain: bool) -> Callable[..., Tensor]:
    """The op behind `forward`; unless plain with residual, scale, norm and its eps at the end."""
    return raw("linear" if is_plain else "linear_more")


def rms_norm(h: Tensor, norm: Tensor, eps: float, scale: float) -> Tensor:
    """`reference.normed` of (..., r) in one pass, without a gradient: torch takes six on a CPU."""
    g: Tensor = torch.ops.maestro_native.rms_norm.default(_rows(h), norm.contiguous(), eps, scale)
    return g


def library_products(problem: LoDProblem) -> Callable[..., Tensor] | None:
    """(x, u, v, bias, rank) -> y by two products of torch's library; None without the op for it."""
    return raw("library_products") if serves(problem.dtype) else None


def serves(dtype: torch.dtype) -> bool:
    """Whether the library is here and takes CPU tensors of a dtype."""
    return load_error() is None and dtype in _DTYPES


def pack(
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    ranks: Sequence[int],
    activations: Sequence[str | None],
) -> Tensor:
    """Layers of one K as bytes, in the order the CPU kernels read them.

    The bytes hold u[:, :r] (N, r), v[:r] (r, K) and the activation of each layer, nothing from
    beyond its rank r and no bias: `packed_linear(packed, x, bias)` runs one layer,
    `packed_grouped(packed, x, biases)` all.
    """
    packed: Tensor = ops().pack(
        [u.detach() for u in us],
        [v.detach() for v in vs],
        list(ranks),
        [ACTIVATION_CODES[activation] for activation in activations],
    )
    return packed


def unsupported(problem: LoDProblem) -> str | None:
    """Why the library cannot serve the problem, or None when it can."""
    reason = load_error()
    if reason is not None:
        return reason
    if problem.device.type == "cuda" and not problem.is_plain:
        return "the CUDA kernels take no residual, no scale and no norm"
    if problem.device.type not in ("cpu", "cuda"):
        return f"the library has no kernel for tensors on {problem.device}"
    if problem.dtype not in _DTYPES:
        return f"native kernels take float32, bfloat16 and float16, not {problem.dtype}"
    if not (problem.M and problem.N and problem.K):
        return "a layer without rows, inputs or outputs is left to torch"
    for name, stride, size in (
        ("u", problem.u_stride, problem.R),
        ("v", problem.v_stride, problem.K),
    ):
        if stride and stride[-1] != 1 and size > 1:
            return f"native kernels read {name} with last stride 1, not {stride[-1]}"
    return unsupported_group((problem,))


def unsupported_group(problems: Sequence[LoDProblem]) -> str | None:
    """Why no one launch serves the layers, each of them servable, or None."""
    if problems[0].device.type != "cuda":
        return None
    facts, reason = _facts(problems[0].device)
    if facts is None:
        return reason
    strategy, text = cuda.plan(_library(), problems, facts)
    return text if strategy == "none" else None


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    return library


def _facts(device: torch.device) -> tuple[cuda.Facts | None, str]:
    reason = cuda_error()
    if reason is not None:
        return None, f"the compiled library has no CUDA kernels: {reason}"
    # A plan for a recorded device that is not here has nobody to ask.
    index = torch.cuda.current_device() if device.index is None else device.index
    return cuda.device_facts(_library(), index)


def choose_strategy(problems: Sequence[LoDProblem]) -> tuple[str, str]:
    """(strategy, reason) for one layer or a group."""
    device = problems[0].device
    if device.type == "cuda":
        facts, reason = _facts(device)
        return ("none", reason) if facts is None else cuda.plan(_library(), problems, facts)
    many = f"; one parallel region for {len(problems)} layers" if len(problems) > 1 else ""
    copied = any(p.x_stride and p.x_stride[-1] != 1 and p.K > 1 for p in problems)
    rows = "; x is copied first: its rows do not lie in one piece" if copied else ""
    return "fused", f"{isa(problems[0].dtype)} kernels on the factors as they are{many}{rows}"


def takes(strategy: str, problems: Sequence[LoDProblem]) -> bool:
    """Whether a strategy, as choose_strategy names it, can run one layer or a group."""
    device = problems[0].device
    if device.type != "cuda":
        return strategy == "fused"
    facts, _ = _facts(device)
    if facts is None or strategy not in cuda.STRATEGIES[1:]:
        return False
    return cuda.plan(_library(), problems, facts, strategy)[0] == strategy


def _rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] == 1 else matrix.contiguous()


def forward(
    call: Call, *, save_h: bool, strategy: str
) -> tuple[list[Tensor], Sequence[Tensor | None]]:
    """Ys = act((scale · x @ v[:r].T) @ u[:, :r].T + bias + residual), Hs: one region or launch.

    H is (M, r), or (M, R) for tensor ranks. A norm comes between the products, H is from before it.
    """
    n, on_gpu = call.n, not call.xs[0].is_cpu
    if n == 1 and not on_gpu and (call.is_plain or not save_h):
        x, u, v, bias, rank, activation = call.layer(0)
        is_tensor = isinstance(rank, Tensor)
        one = (
            _rows(x),
            u,
            v,
            None if bias is None else bias.contiguous(),
            -1 if is_tensor else rank,
            rank if is_tensor else None,
            ACTIVATION_CODES[activation],
        )
        if not call.is_plain:
            residual, norm = call.residual(0), call.norm(0)
            of_norm = None if norm is None else norm.contiguous(), call.norm_eps
            added = None if residual is None else _rows(residual), call.scale(0), *of_norm
            return [torch.ops.maestro_native.linear_more.default(*one, *added)], [None]
        if save_h:
            y, h = torch.ops.maestro_native.linear_h.default(*one)
            return [y], [h]
        return [torch.ops.maestro_native.linear.default(*one)], [None]
    ranks = call.ranks
    is_tensor = isinstance(ranks, Tensor)
    biases = [None if b is None else b.contiguous() for b in call.biases]
    arguments = (
        [_rows(x) for x in call.xs],
        list(call.us),
        list(call.vs),
        [b for b in biases if b is not None],
        [int(b is not None) for b in biases],
        [-1] * n if is_tensor else list(ranks),
        ranks.reshape(-1) if isinstance(ranks, Tensor) else None,
        [ACTIVATION_CODES[a] for a in call.activations],
        save_h,
    )
    if on_gpu:
        outputs = cuda.grouped(arguments, sum(call.x(i).shape[0] for i in range(n)), strategy)
    else:
        residuals = [t if t is None else _rows(t) for t in call.residuals]
        norms = [t if t is None else t.contiguous() for t in call.norms]
        others = residuals, list(call.scales), norms, float(call.norm_eps)
        outputs = torch.ops.maestro_native.grouped.default(*arguments, *others)
    return outputs[:n], outputs[n:] if save_h else [None] * n


def quick(strategy: str) -> Callable[..., Tensor | None]:
    """(x, u, v, bias, int rank, activation) -> Y of one layer on a GPU, without H."""
    return cuda.quick(strategy, ACTIVATION_CODES)


# By library matmuls: factors change every step, so that packing them would not pay.
input_grads, weight_grads = matmul.input_grads, matmul.weight_grads
