"""The interpreter repair: bf16 operations against float64, on the values of the input."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from triton_support import INTERPRETED, WHY_NOT, compiling_environment, needs_triton

pytestmark = [
    needs_triton,
    pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is off"),
]
SIZE = 32

if WHY_NOT is None:
    import triton
    import triton.language as tl

    from maestro_kernels.backends.triton import interpreter

    @triton.jit
    def probe_kernel(a_ptr, b_ptr, wide_ptr, out_ptr, rows_ptr, n, CASE: tl.constexpr):
        o_i = tl.arange(0, 32)
        o_tile = o_i[:, None] * 32 + o_i[None, :]
        b_a = tl.load(a_ptr + o_tile)
        b_b = tl.load(b_ptr + o_tile)
        if CASE == "dot":
            b_out = tl.dot(b_a, b_b).to(tl.bfloat16)
        elif CASE == "dot_loop":
            b_acc = tl.zeros((32, 32), tl.float32)
            for _ in range(0, n):
                b_acc = tl.dot(b_a, b_b, b_acc)
            b_out = b_acc.to(tl.bfloat16)
        elif CASE == "add":
            b_out = b_a + b_b
        elif CASE == "sub":
            b_out = b_a - b_b
        elif CASE == "mul":
            b_out = b_a * b_b
        elif CASE == "neg":
            b_out = -b_a
        elif CASE == "constant":
            b_out = b_a * 2.5
        elif CASE == "maximum":
            b_out = tl.maximum(b_a, b_b)
        elif CASE == "where_less":
            b_out = tl.where(b_a < b_b, b_a, b_b)
        elif CASE == "fma":
            b_out = tl.fma(b_a, b_b, b_a)
        elif CASE == "round":
            b_out = tl.load(wide_ptr + o_tile).to(tl.bfloat16)
        elif CASE == "through_fp16":
            b_out = b_a.to(tl.float16).to(tl.bfloat16)
        elif CASE == "to_int":
            b_out = (b_a * 8.0).to(tl.int32).to(tl.bfloat16)
        else:
            b_out = b_a
        tl.store(out_ptr + o_tile, b_out)
        if CASE == "row_sum":
            tl.store(rows_ptr + o_i, tl.sum(b_a, axis=1))
        elif CASE == "row_max":
            tl.store(rows_ptr + o_i, tl.max(b_a, axis=1))


def _tiles():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SIZE, SIZE, generator=generator).to(torch.bfloat16) for _ in range(2))
    wide = torch.randn(SIZE, SIZE, generator=generator)
    wide[0, :4] = torch.tensor([1.00390625, 1.01171875, float("inf"), float("nan")])  # two ties
    return a, b, wide


EXPECTED = {
    "dot": lambda a, b, _: a @ b,
    "dot_loop": lambda a, b, _: 3 * (a @ b),
    "add": lambda a, b, _: a + b,
    "sub": lambda a, b, _: a - b,
    "mul": lambda a, b, _: a * b,
    "neg": lambda a, b, _: -a,
    "constant": lambda a, b, _: a * 2.5,
    "maximum": lambda a, b, _: torch.maximum(a, b),
    "where_less": lambda a, b, _: torch.minimum(a, b),
    "fma": lambda a, b, _: a * b + a,
    "round": lambda a, b, wide: wide,
    "through_fp16": lambda a, b, _: a,
    "to_int": lambda a, b, _: torch.trunc((a * 8).to(torch.bfloat16).double()),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_bf16_operation_is_exact_value_rounded_once(case):
    interpreter.ensure()
    a, b, wide = _tiles()
    out = torch.zeros_like(a)
    probe_kernel[(1,)](a, b, wide, out, out, 3, CASE=case)
    exact = EXPECTED[case](a.double(), b.double(), wide.double())
    if "dot" in case:  # float32 sums: one bf16 rounding of a sum that is off by its last bits
        step = torch.finfo(torch.bfloat16).eps * exact.abs().clamp_min(1.0)
        assert ((out.double() - exact).abs() <= step * 0.51).all()
    else:
        torch.testing.assert_close(out, exact.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("case", "reduce"), [("row_sum", torch.sum), ("row_max", torch.amax)])
def test_bf16_reductions(case, reduce):
    interpreter.ensure()
    a, b, wide = _tiles()
    out, rows = torch.zeros_like(a), torch.zeros(SIZE, dtype=torch.bfloat16)
    probe_kernel[(1,)](a, b, wide, out, rows, 3, CASE=case)
    torch.testing.assert_close(rows, reduce(a.float(), 1).to(torch.bfloat16), rtol=2**-8, atol=0)


def test_ensure_patches_once():
    from triton.runtime.interpreter import InterpreterBuilder, _patch_lang_tensor

    interpreter.ensure()
    patched = InterpreterBuilder.create_dot, _patch_lang_tensor
    interpreter.ensure()
    assert (InterpreterBuilder.create_dot, _patch_lang_tensor) == patched


def test_a_triton_the_repair_does_not_reach_is_refused(monkeypatch):
    """The self-check looks at numbers, so a repair without effect cannot pass it."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder

    interpreter.ensure()
    interpreter._check(interpreter_builder, TensorHandle)
    monkeypatch.setattr(
        InterpreterBuilder, "create_fadd", lambda self, a, b: TensorHandle(a.data + b.data, a.dtype)
    )
    with pytest.raises(RuntimeError, match="computes bfloat16 wrongly"):
        interpreter._check(interpreter_builder, TensorHandle)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("before", "True"), ("never", "False"), ("late", "RuntimeError: TRITON_INTERPRET was set")],
)
def test_when_the_variable_is_set(setting, expected):
    late = 'import triton, os; os.environ["TRITON_INTERPRET"] = "1"; ' if setting == "late" else ""
    script = (
        f"{late}from maestro_kernels.backends.triton import interpreter as i; "
        "i.ensure(); print(i.active())"
    )
    environment = compiling_environment()
    if setting == "before":
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert expected in (done.stderr if setting == "late" else done.stdout)
