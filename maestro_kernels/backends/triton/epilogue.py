"""Activations and their derivatives inside kernels: float32 in, float32 out.

`ACTIVATION` is a compile-time name: "none", "relu", "gelu" (erf), "gelu_tanh" or "silu".
"""

import triton
import triton.language as tl

__all__ = ["activation_derivative", "activation_name", "apply_activation"]


def activation_name(activation: str | None) -> str:
    """Name of an activation as kernels spell it."""
    return activation or "none"


@triton.jit
def _sigmoids(z):
    """(s, 1 - s) with s = 1 / (1 + exp(-z)), the smaller one without cancellation."""
    # exp of a non-positive number only: tl.sigmoid overflows to inf on the way for z < -88.
    e = tl.exp(-tl.abs(z))
    large = 1.0 / (1.0 + e)
    small = e / (1.0 + e)
    return tl.where(z >= 0, large, small), tl.where(z >= 0, small, large)


@triton.jit
def _gelu_tanh_argument(z):
    """2 * sqrt(2 / pi) * (z + 0.044715 * z**3): 0.5 * (1 + tanh(a / 2)) is sigmoid(a)."""
    return 1.5957691216057308 * (z + 0.044715 * z * z * z)


@triton.jit
def apply_activation(z, ACTIVATION: tl.constexpr):
    """act(z)."""
    if ACTIVATION == "relu":
        # Not maximum(z, 0): a NaN stays a NaN, as in torch.
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        z = z * _sigmoids(_gelu_tanh_argument(z))[0]
    elif ACTIVATION == "silu":
        z = z * _sigmoids(z)[0]
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
    return z


@triton.jit
def activation_derivative(z, ACTIVATION: tl.constexpr):
    """Derivative of act at z; 0 at z = 0 and 1 at NaN for relu, as in torch."""
    if ACTIVATION == "relu":
        d = tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        d = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACTIVATION == "gelu_tanh":
        s, t = _sigmoids(_gelu_tanh_argument(z))
        d = s + z * s * t * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACTIVATION == "silu":
        s, t = _sigmoids(z)
        d = s * (1.0 + z * t)
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
        d = tl.full(z.shape, 1.0, tl.float32)
    return d
