"""How one `pytest tests/` runs kernels in Triton's interpreter and compiles them as well.

`@triton.jit` decides once, when a module is imported, whether its kernels are interpreted, and so
do Triton's own library functions. A process can therefore do one or the other:

- tests/conftest.py sets TRITON_INTERPRET=1 before anything can import Triton, so every test of
  this process that calls a kernel interprets it, on CPU tensors;
- tests that compile (ahead of time) or ask for compile-time variants run a script in a child
  process without the variable (`run_compiled`), once per module, and assert on the JSON it prints;
- on a GPU, `TRITON_INTERPRET=0 pytest tests/` keeps kernels compiled: then DEVICE is "cuda" and
  the same tests exercise the compiled kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
DEVICE = "cpu" if INTERPRETED else "cuda"

try:
    import triton  # noqa: F401
except ImportError:
    WHY_NOT = "Triton is not installed"
else:
    WHY_NOT = None

needs_triton = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
needs_kernels = pytest.mark.skipif(
    WHY_NOT is not None or not (INTERPRETED or torch.cuda.is_available()),
    reason=WHY_NOT or "TRITON_INTERPRET is off and there is no CUDA device",
)


def compiling_environment() -> dict[str, str]:
    """This process's environment for a child whose kernels are compiled, not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    return environment


def run_compiled(*arguments: str, timeout: float = 600, check: bool = True) -> object:
    """Run `python *arguments` without the interpreter; returns the JSON it prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=compiling_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check and done.returncode != 0:
        pytest.fail(f"python {' '.join(arguments)} failed:\n{done.stderr[-4000:]}", pytrace=False)
    return json.loads(done.stdout)
