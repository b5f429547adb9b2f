"""The Triton backend: what it can serve, and which kernel serves it. Triton is imported on use."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from maestro_kernels.problem import LoDProblem

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
    return None
