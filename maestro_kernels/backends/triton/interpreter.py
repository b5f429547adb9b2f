"""Triton's interpreter (TRITON_INTERPRET=1), made right for bfloat16.

Triton 3.6 and 3.9 keep a bf16 tile as uint16 bit patterns and then compute on the patterns:
`tl.dot` multiplies them (errors of 1e10), additions, comparisons and reductions are wrong,
float32 -> bf16 truncates, and nothing is reported. `ensure` replaces those operations of the
interpreter of this process: each is done in float32 and rounded once, to nearest even. It also
repairs `range(0, n)` over a run-time argument, which Triton 3.6 cannot do with numpy >= 2.4.
bf16 atomics still raise, and tf32 products keep full float32.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

__all__ = ["active", "ensure"]

_done = False


def active() -> bool:
    """Whether kernels decorated now are interpreted instead of compiled."""
    return bool(triton.knobs.runtime.interpret)


def ensure() -> None:
    """Repair the interpreter when it is active; cheap, and harmless when called again.

    Raises:
        RuntimeError: TRITON_INTERPRET was set too late, or this Triton cannot be repaired.
    """
    global _done
    if _done or not active():
        return
    from triton.runtime import interpreter

    if not isinstance(tl.standard.cdiv, interpreter.InterpretedFunction):
        raise RuntimeError(
            "TRITON_INTERPRET was set after Triton had been imported: set it before Python starts"
        )
    if interpreter._get_np_dtype(tl.bfloat16) == np.uint16:
        _repair_builder(interpreter.InterpreterBuilder, interpreter.TensorHandle)
        _repair_reductions(interpreter.ReduceScanOpInterface, interpreter.TensorHandle)
    _repair_index(interpreter)
    _check(interpreter.interpreter_builder, interpreter.TensorHandle)
    _done = True


def _is_bf16(handle) -> bool:
    return getattr(handle, "dtype", None) is not None and handle.dtype.scalar == tl.bfloat16


def _up(handle) -> np.ndarray:
    """Values of a handle; those of a bf16 handle as float32."""
    if not _is_bf16(handle):
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _down(values: np.ndarray) -> np.ndarray:
    """The bf16 bit patterns nearest to `values`, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _repair_builder(builder, handle_type) -> None:
    dot, cast, fp_to_fp, fma = (
        getattr(builder, name)
        for name in ("create_dot", "cast_impl", "create_fp_to_fp", "create_fma")
    )

    def create_dot(self, a, b, d, *rest):
        a, b = (handle_type(_up(t), tl.float32) if _is_bf16(t) else t for t in (a, b))
        return dot(self, a, b, d, *rest)

    def cast_impl(self, src, dst_type):
        dst = dst_type.scalar
        if _is_bf16(src) == (dst == tl.bfloat16) or src.dtype.scalar.is_fp8():
            return cast(self, src, dst_type)
        if dst == tl.bfloat16:
            return handle_type(_down(src.data), dst)
        wide = handle_type(_up(src), tl.float32)
        return wide if dst == tl.float32 else cast(self, wide, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        pair = {src.dtype.scalar, dst_type.scalar}
        if tl.bfloat16 in pair and pair <= {tl.bfloat16, tl.float16, tl.float32}:
            return cast_impl(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def create_fma(self, x, y, z):
        if not _is_bf16(z):
            return fma(self, x, y, z)
        return handle_type(_down(_up(x) * _up(y) + _up(z)), tl.bfloat16)

    def in_float32(method):
        def wrapped(self, *args):
            *operands, function = args
            if not all(map(_is_bf16, operands)):
                return method(self, *args)
            out = function(*map(_up, operands))
            if out.dtype == np.bool_:
                return handle_type(out, tl.int1)
            return handle_type(_down(out), tl.bfloat16)

        return wrapped

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    builder.create_fp_to_fp, builder.create_fma = create_fp_to_fp, create_fma
    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(builder, name, in_float32(getattr(builder, name)))
    builder.get_bf16 = lambda self, value: handle_type(_down(np.array([value])), tl.bfloat16)


def _repair_reductions(operation, handle_type) -> None:
    apply = operation.apply

    def rebuilt(tensor, data, dtype):
        kind = tl.block_type(dtype, list(data.shape)) if tensor.type.is_block() else dtype
        return tl.core.tensor(handle_type(data, dtype), kind)

    def patched(self, tensors):
        if not isinstance(tensors, tuple):
            return patched(self, (tensors,))[0]
        narrow = [_is_bf16(t.handle) for t in tensors]
        out = apply(
            self,
            tuple(
                rebuilt(t, _up(t.handle), tl.float32) if is_narrow else t
                for t, is_narrow in zip(tensors, narrow, strict=True)
            ),
        )
        return tuple(
            rebuilt(t, _down(t.handle.data), tl.bfloat16) if is_narrow else t
            for t, is_narrow in zip(out, narrow, strict=True)
        )

    operation.apply = patched


def _repair_index(interpreter) -> None:
    original = interpreter._patch_lang_tensor

    def index(self):
        return int(np.asarray(self.handle.data).reshape(-1)[0])

    def patched(tensor, *scope):
        result = original(tensor, *scope)
        if scope:  # newer Triton records what it patched, to undo it
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index
        return result

    interpreter._patch_lang_tensor = patched


def _check(builder, handle_type) -> None:
    """Fail loudly on a Triton whose interpreter the repair no longer reaches."""
    values = handle_type(np.array([[1.0, -2.5], [3.0, 1.00390625]], np.float32), tl.float32)
    low = builder.cast_impl(values, tl.bfloat16)
    zero = handle_type(np.zeros((2, 2), np.float32), tl.float32)
    exact = np.array([[1.0, -2.5], [3.0, 1.0]], np.float32)  # 1 + 2^-8 is a tie: to even
    product = builder.create_dot(low, low, zero, None, 0).data
    total = builder.cast_impl(builder.create_fadd(low, low), tl.float32).data
    if not (np.array_equal(product, exact @ exact) and np.array_equal(total, exact + exact)):
        raise RuntimeError(
            f"Triton {triton.__version__}: its interpreter computes bfloat16 wrongly"
        )
