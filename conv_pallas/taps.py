"""Some taps of a kernel, a kernel gradient of some among all, and a kernel the other way round."""

import jax
import jax.numpy as jnp
from jax import lax


def some(w: jax.Array, taps: range | None) -> jax.Array:
    """Those taps of a kernel ``(*V, K, C // G, O)``; None: all."""
    if taps is None:
        return w
    return lax.slice_in_dim(w, taps.start, taps.stop, axis=w.ndim - 3)


def flip(w: jax.Array, groups: int) -> jax.Array:
    """The kernel of the transposed convolution: ``(*V, K, C//G, O)`` to ``(*V, K, O//G, C)``.

    Taps reversed, and within each group the channels in and out exchanged. Twice, it is w.
    """
    *V, K, c, O = w.shape
    w = w.reshape(*V, K, c, groups, O // groups)
    return jnp.swapaxes(jnp.flip(w, -4), -3, -1).reshape(*V, K, O // groups, groups * c)


def among(dw: jax.Array, taps: range | None, K: int) -> jax.Array:
    """A kernel gradient of K taps, which is zero but for those; None: dw is of all."""
    if taps is None or len(taps) == K:
        return dw
    return jnp.pad(dw, (*[(0, 0)] * (dw.ndim - 3), (taps.start, K - taps.stop), (0, 0), (0, 0)))
