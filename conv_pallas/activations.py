"""The activations known by name, as JAX functions; `spec.ACTIVATIONS` says what each saves."""

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
