"""Minimal filtering: two outputs of a convolution by fewer products than they have taps.

For outputs ``y0`` and ``y1`` that are D steps apart, the steps ``d0, d1, ...`` that they see, D
apart as well, and taps ``g0, g1, ...``:

    F(2, 2)                    F(2, 3)
    m0 = (d0 - d1) g0          m0 = (d0 - d2) g0
    m1 =  d1 (g0 + g1)         m1 = (d1 + d2) (g0 + g1 + g2) / 2
    m3 = (d1 - d2) g1          m2 = (d2 - d1) (g0 - g1 + g2) / 2
                               m3 = (d1 - d3) g2

    y0 = m0 + m1 + m2          y1 = m1 - m2 - m3

three products for four, and four for six. A product is a matmul over channels here. From
S. Winograd, Arithmetic Complexity of Computations (1980), as A. Lavin and S. Gray (2015),
arXiv:1509.09308, have it for networks. Larger tiles save more, but lose digits, and in theirs an
output is a difference of numbers that hold later steps than its own. Here no output sees a step
that it does not see in the definition: a NaN goes where it always goes. Of random numbers around
zero the rounding errors are up to 2.1 times the definition's; around one, in kernel gradients of
strided layers, up to 2.6 times, as one matmul sums all steps. They are relative to all steps that a
tile's two outputs see, so that of a step whose weights are all zero some rounding is left; and of
an infinity, or sums of steps beyond the largest number, comes a NaN where the definition has an
infinity.

K taps are pairs, and three more at the end where K is odd. One pair is two D steps from the next,
so that all pairs are three convolutions of K/2 taps over every other block of D steps.

Products: ``3/4`` of the convolution's, ``2/3`` for three taps, ``5/7`` for seven. Bytes: x, w and y
once each at least; beside x and y it holds 1.5 of each for the pairs, and two for the three.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from conv_pallas.kernels import xla_native
from conv_pallas.kernels.xla_padding import pad, pad_along
from conv_pallas.spec import ConvSpec

# Channels from which on XLA:CPU is faster at steps that it has turned in memory first.
MANY = 128


def winograd(x, w, spec, numbers):
    """Pairs of taps, and three more of an odd number, for two outputs at a time.

    In float32 at least: sums of steps and of taps are rounded. One tap saves nothing and no integer
    has a half: of those it is one convolution. With a stride it takes some of the outputs that
    there are without.
    """
    (N, _, C), (K, _, O) = x.shape, w.shape
    if K == 1 or not jnp.issubdtype(numbers.acc, jnp.floating):
        return xla_native.conv(x, w, spec, numbers.out, numbers.precision)
    # In memory as it is: each sum of taps would turn an input gradient's kernel by itself.
    w = lax.optimization_barrier(w.astype(numbers.acc))
    D, tiles, pairs = spec.kernel_dilation, _tiles(spec), _pairs(K)
    see = _sight(x.astype(numbers.acc), spec)

    def products(seen, taps):
        seen = seen.reshape(N, -1, C)
        here = ConvSpec(seen.shape[1], len(taps), kernel_dilation=D, groups=spec.groups)
        return xla_native.conv(seen, taps, here, numbers.acc, numbers.precision)

    y0, y1 = [], []
    if pairs:
        g0, g1 = w[0 : 2 * pairs : 2], w[1 : 2 * pairs : 2]
        d0, d1, d2 = (see(step, tiles + pairs - 1) for step in range(3))
        m0, m1, m3 = products(d0 - d1, g0), products(d1, g0 + g1), products(d1 - d2, g1)
        y0 += [m0, m1]
        y1 += [m1, -m3]
    if K % 2:
        g0, g1, g2 = (w[k : k + 1] for k in range(2 * pairs, K))
        d0, d1, d2, d3 = (see(2 * pairs + step, tiles) for step in range(4))
        even, odd = (g0 + g2) / 2, g1 / 2
        m0, m3 = products(d0 - d2, g0), products(d1 - d3, g2)
        m1, m2 = products(d1 + d2, even + odd), products(d2 - d1, even - odd)
        y0 += [m0, m1, m2]
        y1 += [m1, -m2, -m3]
    both = [functools.reduce(jnp.add, m).reshape(N, tiles, D, O) for m in (y0, y1)]
    y = jnp.stack(both, 2).reshape(N, 2 * tiles * D, O)
    return lax.slice_in_dim(y, 0, _length(spec), spec.stride, axis=1)


def winograd_kernel_grad(x, g, spec, numbers):
    """The transpose of `winograd`: the same sums of steps, with sums of two output gradients.

    Each product is a matmul over batch and time, one for all pairs. Taps share sums of steps: a NaN
    that one of them sees reaches its neighbours' gradients too.
    """
    K, G, (N, _, C), O = spec.kernel_size, spec.groups, x.shape, g.shape[2]
    if G > 1:
        one = functools.partial(
            winograd_kernel_grad, spec=dataclasses.replace(spec, groups=1), numbers=numbers
        )
        x, g = x.reshape(N, -1, G, C // G), g.reshape(N, -1, G, O // G)
        return jax.vmap(one, in_axes=2, out_axes=2)(x, g).reshape(K, C // G, O)
    D, tiles, pairs = spec.kernel_dilation, _tiles(spec), _pairs(K)
    see = _sight(x.astype(numbers.acc), spec)
    more = 2 * D * tiles - _length(spec)
    g = pad_along(g.astype(numbers.acc), 1, 0, more, spec.stride - 1).reshape(N, tiles, 2, D, O)
    y0, y1 = g[:, :, 0], g[:, :, 1]

    def products(seen, g):
        kwargs = {"precision": numbers.precision, "preferred_element_type": numbers.acc}
        seen, g = seen.reshape(-1, seen.shape[-1]), g.reshape(-1, O)
        if min(C, O) < MANY:
            return lax.dot_general(seen, g, (((0,), (0,)), ((), ())), **kwargs).reshape(-1, C, O)
        return lax.dot(lax.optimization_barrier(seen.T), g, **kwargs).reshape(-1, C, O)

    def beside(a):
        """For each pair what its first step of ``a`` sees, side by side."""
        return lax.concatenate([a[:, p : p + tiles] for p in range(pairs)], 3)

    if K == 1:
        return products(see(0, tiles), y0) + products(see(1, tiles), y1)
    dw = []
    if pairs:
        d0, d1, d2 = (see(step, tiles + pairs - 1) for step in range(3))
        m0, m1 = products(beside(d0 - d1), y0), products(beside(d1), y0 + y1)
        m3 = products(beside(d1 - d2), -y1)
        dw.append(jnp.stack([m0 + m1, m1 + m3], 1).reshape(2 * pairs, C, O))
    if K % 2:
        d0, d1, d2, d3 = (see(2 * pairs + step, tiles) for step in range(4))
        m0, m3 = products(d0 - d2, y0), products(d1 - d3, -y1)
        m1, m2 = products(d1 + d2, y0 + y1) / 2, products(d2 - d1, y0 - y1) / 2
        dw += [m0 + (m1 + m2), m1 - m2, (m1 + m2) + m3]
    return lax.concatenate(dw, 0)


def _length(spec: ConvSpec) -> int:
    """Outputs without the stride, up to the last one with it."""
    return (spec.out_time - 1) * spec.stride + 1


def _tiles(spec: ConvSpec) -> int:
    """Tiles of two blocks of D outputs each, the last of which may be zeros in part."""
    return -(-_length(spec) // (2 * spec.kernel_dilation))


def _pairs(K: int) -> int:
    """Pairs of taps, beside which an odd number has three."""
    return K // 2 if K % 2 == 0 else (K - 3) // 2


def _sight(x, spec: ConvSpec):
    """What outputs see, as a function of a tap and of how many tiles.

    It gives ``(N, tiles, D, C)``, of the first output of each; the second sees as much a tap later.
    """
    (N, _, C), D = x.shape, spec.kernel_dilation
    rows = _tiles(spec) + spec.kernel_size // 2
    # Twice, for what is cut off must not come back.
    x = pad(x, spec)[:, : _length(spec) + spec.span - 1]
    x = pad_along(x, 1, 0, 2 * D * rows - x.shape[1])
    blocks = x.reshape(N, rows, 2, D, C)
    return lambda tap, tiles: blocks[:, tap // 2 : tap // 2 + tiles, tap % 2]


def share(spec: ConvSpec) -> float:
    """How many of the convolution's products it takes: more for a D near T, which it rounds up."""
    K, D = spec.kernel_size, spec.kernel_dilation
    return (3 * _pairs(K) + 4 * (K % 2)) * D * _tiles(spec) / (K * spec.out_time)
