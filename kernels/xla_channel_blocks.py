"""Multiply-adds in blocks of channels, for depthwise convolutions of many taps on CPUs.

    y[n, u, o]  = sum over k of     x[n, u*S + k*D - low, o] * w[k, o]
    dw[k, o]    = sum over n, u of  x[n, u*S + k*D - low, o] * g[n, u, o]

In an array ``(N, T, C)`` two taps of one output lie ``D * C`` numbers apart. Where that is a
multiple of 4 KiB, as of 512 channels and D = 2, all taps want the same few lines of the L1 cache.
So x is moved once into blocks of `LANES` channels, ``(C / LANES, N, T, LANES)``, in which all that
an output sees lies close together: a layout that compiled libraries of convolutions have as well
(E. Georganas et al. 2018, arXiv:1808.05567, section II). A loop then multiplies `AT_ONCE` taps,
which it keeps in registers.

The kernel gradient is the same loop, with steps of g for taps, and taps for the steps of y. Time is
cut into pieces of up to `STEPS`; each has a copy of all that it sees of x, and K results, and these
are added up at the end.

Operations: ``2 N T' K O``. Bytes: each array twice more for the layout; and of y, for each AT_ONCE
taps, what the caches don't hold. Beside its operands and its result it holds x and y once more; a
kernel gradient ``1 + (K - 1) D / STEPS`` of x, g, and ``K / STEPS`` of g.
"""

import jax.numpy as jnp
from jax import lax

from conv_pallas.kernels.xla_padding import pad, pad_along

LANES = 16  # a cache line of float32
AT_ONCE = 8
STEPS = 128


def channel_blocks(x, w, spec, numbers):
    """Multiply-adds of AT_ONCE taps at a time, of LANES channels that lie beside each other."""
    (K, c, O), U, D, S = w.shape, spec.out_time, spec.kernel_dilation, spec.stride
    w = lax.optimization_barrier(_blocked(w.astype(numbers.acc)))
    y = None
    for i in range(c):
        xi = _one_input(x, i, O, spec, numbers)
        for k in range(K):
            tap = lax.slice_in_dim(xi, k * D, k * D + (U - 1) * S + 1, S, axis=2)
            y = _add(y, tap * w[:, k, i][:, None, None], k, K)
    return _together(y, O)


def channel_blocks_kernel_grad(x, g, spec, numbers):
    """The transpose of `channel_blocks`: steps of a piece of time are its taps."""
    (N, U, O), K, D, S = g.shape, spec.kernel_size, spec.kernel_dilation, spec.stride
    b = _piece(U)
    pieces, rest = divmod(U, b)
    reach = (b - 1) * S + (K - 1) * D + 1  # what a piece sees of x
    g = _blocked(g.astype(numbers.acc))
    some = lax.optimization_barrier(g[:, :, : pieces * b].reshape(-1, N, pieces, b, g.shape[-1]))

    def gradient(x):
        """Of one input channel in each group, ``(O / LANES, K, LANES)``."""

        def product(seen, g, i):
            """What all taps see of ``seen`` at step i, times g there."""
            taps = lax.slice_in_dim(seen, i * S, i * S + (K - 1) * D + 1, D, axis=-2)
            return taps * g[..., i : i + 1, :]

        seen, dw = _windows(x, pieces, b * S, reach), None
        for i in range(b):
            dw = _add(dw, product(seen, some, i), i, b)
        dw = jnp.sum(dw, (1, 2))
        if rest:
            tail, last = x[:, :, pieces * b * S :], g[:, :, pieces * b :]
            dw += jnp.sum(sum(product(tail, last, i) for i in range(rest)), 1)
        return dw

    c = x.shape[2] // spec.groups
    dw = [gradient(_one_input(x, i, O, spec, numbers)) for i in range(c)]
    return jnp.stack([_together(each, O) for each in dw], 1)


def _add(total, term, i: int, count: int):
    """``total + term``, which is number i of ``count``; AT_ONCE of them make a loop."""
    total = term if total is None else total + term
    done = i % AT_ONCE == AT_ONCE - 1 or i == count - 1
    return lax.optimization_barrier(total) if done else total


def _one_input(x, i: int, O: int, spec, numbers):
    """Input channel i of each group beside each of its outputs, padded: ``(O / L, N, T, L)``."""
    (N, T, C), G = x.shape, spec.groups
    if G != O or C != O:
        x = jnp.repeat(x.reshape(N, T, G, C // G)[..., i], O // G, 2)
    return lax.optimization_barrier(pad(_blocked(x.astype(numbers.acc)), spec, axis=2))


def _windows(x, count: int, apart: int, length: int):
    """``(O / L, N, count, length, L)``: so many pieces of x, overlapping."""
    blocks, N, T, L = x.shape
    rows = count - 1 + -(-length // apart)
    x = pad_along(x, 2, 0, rows * apart - T).reshape(blocks, N, rows, apart, L)
    parts = [
        x[:, :, first : first + count, : min(apart, length - first * apart)]
        for first in range(rows - count + 1)
    ]
    return lax.optimization_barrier(lax.concatenate(parts, 3))


def _piece(U: int) -> int:
    """Into pieces of how many steps: as few as possible left over, and as many as possible."""
    if U <= STEPS:
        return U
    return min(range(STEPS, STEPS // 2, -1), key=lambda b: U % b)


def _blocked(a):
    """``(A, B, O)`` as ``(O / L, A, B, L)``."""
    A, B, O = a.shape
    L = min(LANES, O)
    return pad_along(a, 2, 0, -O % L).reshape(A, B, -1, L).transpose(2, 0, 1, 3)


def _together(a, O: int):
    """``(O / L, ..., L)`` as ``(..., O)``."""
    a = jnp.moveaxis(a, 0, -2)
    return a.reshape(*a.shape[:-2], -1)[..., :O]
