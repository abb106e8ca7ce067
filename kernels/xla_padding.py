"""Zeros around and between the steps of an array, as the formulations for XLA write them out."""

import jax
import jax.numpy as jnp
from jax import lax

from conv_pallas.spec import ConvSpec


def pad_along(a: jax.Array, axis: int, low: int, high: int, between: int = 0) -> jax.Array:
    """``a`` with so many zeros before, after and between what it has along an axis.

    Where low or high is negative, as much is cut off.
    """
    edges = [(0, 0, 0)] * a.ndim
    edges[axis] = (low, high, between)
    return lax.pad(a, jnp.zeros((), a.dtype), edges)


def pad(x: jax.Array, spec: ConvSpec, axis: int = 1) -> jax.Array:
    """x with the zeros of ``spec`` written out along its axis of time."""
    return pad_along(x, axis, *spec.padding, spec.input_dilation - 1)
