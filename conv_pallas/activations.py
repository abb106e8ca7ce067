"""The activations known by name, as JAX functions, and their derivatives."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda z: jax.nn.gelu(z, approximate=False),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}


def activate(z: jax.Array, activation: str | None) -> jax.Array:
    """``activation(z)``, of any shape; z itself where it is None."""
    return z if activation is None else FUNCTIONS[activation](z)


def times_derivative(d: jax.Array, saved: jax.Array | None, activation: str | None) -> jax.Array:
    """``d * activation'(z)``, from what `spec.ACTIVATIONS` says: y, z, or nothing.

    Calculates in float32 at least, and rounds once.
    """
    if activation is None:
        return d
    if activation == "relu":
        return jnp.where(saved > 0, d, jnp.zeros_like(d))
    dtype = d.dtype
    if dtype.itemsize < 4:
        d, saved = d.astype(jnp.float32), saved.astype(jnp.float32)
    if activation == "tanh":
        d = (d + d * saved) * (1 - saved)  # 1 - y * y would cancel
    elif activation == "sigmoid":
        d = d * (saved * (1 - saved))
    else:
        d = jax.jvp(FUNCTIONS[activation], (saved,), (d,))[1]
    return d.astype(dtype)
