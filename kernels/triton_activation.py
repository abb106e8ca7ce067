"""Activations in Triton: their values, and how a gradient comes back through them.

With ``y = f(z)``: `activate` makes y from z, `activate_grad` makes ``gy * f'(z)`` from gy and
either z or y, whichever `conv_pallas.spec.ACTIVATIONS` names for that activation. Everything is
float32. An activation costs some 10 instructions an element and its derivative some 20 (read
off the machine code), but for ReLU, whose cost is nothing.

Neither `tl.exp` nor a division is used: for those the compiler writes six instructions more an
element, to scale results below 2^-126 and divisors beyond 2^126, and here both end as a zero.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from conv_pallas.spec import ACTIVATIONS


@triton.jit
def _exp(FACTOR: tl.constexpr, z):
    """``exp(FACTOR * z)`` by one multiplication: Triton 3.6 makes an addition even of a sign."""
    return tl.exp2((1.4426950408889634 * FACTOR) * z)


@triton.jit
def _reciprocal(z):
    """``1 / z`` of z from 1 to infinity."""
    root = tl.rsqrt(z)
    return root * root


@triton.jit
def _tanh(z):
    # Triton has no tanh of its own. Around 0 the difference of exponentials cancels.
    e = _exp(-2.0, tl.abs(z))
    far = (1.0 - e) * _reciprocal(1.0 + e)
    s = z * z
    near = 1.0 + s * (-0.33333333 + s * (0.13333333 + s * (-0.053968254 + s * 0.021869488)))
    return tl.where(tl.abs(z) < 0.25, z * near, tl.where(z < 0, -far, far))


@triton.jit
def _sigmoid(z):
    return _reciprocal(1.0 + _exp(-1.0, z))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation of that name, of float32."""
    if ACTIVATION == "relu":
        # Not `tl.maximum`, which drops NaN.
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))
    elif ACTIVATION == "gelu_exact":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "silu":
        z = z * _sigmoid(z)
    elif ACTIVATION == "tanh":
        z = _tanh(z)
    elif ACTIVATION == "sigmoid":
        z = _sigmoid(z)
    return z


@triton.jit
def activate_grad(gy, saved, ACTIVATION: tl.constexpr):
    """``gy * f'(z)``; ``saved`` is y of relu, tanh and sigmoid, and z of the others."""
    if ACTIVATION == "relu":
        gy = tl.where(saved > 0, gy, 0.0)
    elif ACTIVATION == "gelu":
        z = saved
        s = z * z
        t = _tanh(0.7978845608028654 * z * (1.0 + 0.044715 * s))
        slope = 0.7978845608028654 * (1.0 + 0.134145 * s)
        gy = gy * (0.5 * (1.0 + t) + 0.5 * z * ((1.0 - t * t) * slope))
    elif ACTIVATION == "gelu_exact":
        z = saved
        below = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        gy = gy * (below + z * (0.3989422804014327 * _exp(-0.5, z * z)))
    elif ACTIVATION == "silu":
        s = _sigmoid(saved)
        gy = gy * (s * (1.0 + saved * (1.0 - s)))
    elif ACTIVATION == "tanh":
        gy = gy * (1.0 - saved * saved)
    elif ACTIVATION == "sigmoid":
        gy = gy * (saved * (1.0 - saved))
    return gy


@triton.jit
def activate_grad_of_z(gy, z, ACTIVATION: tl.constexpr):
    """``gy * f'(z)`` from z for every activation."""
    if ACTIVATION == "tanh" or ACTIVATION == "sigmoid":
        z = activate(z, ACTIVATION)
    return activate_grad(gy, z, ACTIVATION)


def gradient_in_xla(
    gy: jax.Array, saved: jax.Array | None, activation: str | None, dtype
) -> jax.Array:
    """``gz`` of ``dtype`` in one elementwise pass, where no kernel computes it as it reads gy."""
    if activation is None:
        return gy
    g, s = gy.astype(jnp.float32), saved.astype(jnp.float32)
    if activation == "relu":
        gz = jnp.where(s > 0, g, 0.0)
    elif activation == "tanh":
        gz = g * (1.0 - s * s)
    elif activation == "sigmoid":
        gz = g * (s * (1.0 - s))
    else:
        gelu = lambda exact: lambda z: jax.nn.gelu(z, approximate=not exact)  # noqa: E731
        f = {"gelu": gelu(False), "gelu_exact": gelu(True), "silu": jax.nn.silu}[activation]
        (gz,) = jax.vjp(f, s)[1](g)
    return gz.astype(dtype)


assert tuple(ACTIVATIONS) == ("relu", "gelu", "gelu_exact", "silu", "tanh", "sigmoid")
