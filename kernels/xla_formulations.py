"""Ways to say a convolution to XLA: small functions, each right for every geometry.

`FORWARD` maps names to functions of ``(x, w, spec, numbers)``, `KERNEL_GRAD` to functions of
``(x, g, spec, numbers)``. The input gradient is a forward convolution of g with the flipped
kernel (`flip`, `ConvSpec.transposed`), so `FORWARD` serves it too. Which one to take is not
decided here but in `xla.py`.

The two operands have one dtype. Results have any dtype at least as exact as ``numbers.out``:
whatever sums here does so in ``numbers.acc``, and the caller rounds once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from conv_pallas.kernels import xla_native
from conv_pallas.spec import ConvSpec


class Numbers(NamedTuple):
    """The dtype to sum in, the dtype of the result, and the precision of products."""

    acc: np.dtype
    out: np.dtype
    precision: Any = None


Formulation = Callable[[jax.Array, jax.Array, ConvSpec, Numbers], jax.Array]


def flip(w: jax.Array, groups: int) -> jax.Array:
    """The kernel of the transposed convolution: ``(K, C//G, O)`` to ``(K, O//G, C)``.

    Taps reversed, and within each group the channels in and out exchanged.
    """
    K, c, O = w.shape
    w = w.reshape(K, c, groups, O // groups)[::-1]
    return w.transpose(0, 3, 2, 1).reshape(K, O // groups, groups * c)


def pad(x: jax.Array, spec: ConvSpec) -> jax.Array:
    """x with the zeros of ``spec`` written out: before, after and between its steps."""
    return lax.pad(
        x,
        jnp.zeros((), x.dtype),
        ((0, 0, 0), (*spec.padding, spec.input_dilation - 1), (0, 0, 0)),
    )


def taps(x: jax.Array, spec: ConvSpec) -> list[jax.Array]:
    """For each tap what the outputs see through it: K arrays ``(N, T', C)``."""
    x = pad(x, spec)
    length = (spec.out_time - 1) * spec.stride + 1
    return [
        lax.slice_in_dim(x, start, start + length, spec.stride, axis=1)
        for start in range(0, spec.span, spec.kernel_dilation)
    ]


def grouped_matmul(x: jax.Array, w: jax.Array, groups: int, numbers: Numbers) -> jax.Array:
    """``(N, U, C) @ (C//G, O)``, group by group: ``(N, U, O)``."""
    kwargs = dict(precision=numbers.precision, preferred_element_type=numbers.acc)
    if groups == 1:
        return lax.dot_general(x, w, (((2,), (0,)), ((), ())), **kwargs)
    (N, U, C), (c, O) = x.shape, w.shape
    x, w = x.reshape(N, U, groups, c), w.reshape(c, groups, O // groups)
    y = lax.dot_general(x, w, (((3,), (0,)), ((2,), (1,))), **kwargs)
    return y.transpose(1, 2, 0, 3).reshape(N, U, O)


def grouped_outer(x: jax.Array, g: jax.Array, groups: int, numbers: Numbers) -> jax.Array:
    """``(N, U, C)^T @ (N, U, O)``, group by group: ``(C//G, O)``."""
    kwargs = dict(precision=numbers.precision, preferred_element_type=numbers.acc)
    if groups == 1:
        return lax.dot_general(x, g, (((0, 1), (0, 1)), ((), ())), **kwargs)
    (N, U, C), O = x.shape, g.shape[2]
    x, g = x.reshape(N, U, groups, C // groups), g.reshape(N, U, groups, O // groups)
    w = lax.dot_general(x, g, (((0, 1), (0, 1)), ((2,), (2,))), **kwargs)
    return w.transpose(1, 0, 2).reshape(C // groups, O)


def columns(x: jax.Array, spec: ConvSpec) -> jax.Array:
    """All taps side by side, group by group: ``(N, T', G*K*(C//G))``."""
    N, U, C, G = x.shape[0], spec.out_time, x.shape[2], spec.groups
    if G == 1:
        return lax.concatenate(taps(x, spec), 2)
    grouped = [tap.reshape(N, U, G, C // G) for tap in taps(x, spec)]
    return lax.concatenate(grouped, 3).reshape(N, U, spec.kernel_size * C)


# Forward, and by the flipped kernel the input gradient.


def native(x, w, spec, numbers):
    """One `lax.conv_general_dilated` that pads in its window."""
    return xla_native.conv(x, w, spec, numbers.out, numbers.precision)


def barrier(x, w, spec, numbers):
    """Pads in memory, out of sight of the convolution.

    XLA:GPU folds a pad it can see into the window; an uneven window is beyond cuDNN, and
    XLA then fills the kernel with zeros up to its span. Behind a barrier it stays VALID.
    """
    valid = ConvSpec(
        time=spec.dilated_time + sum(spec.padding),
        kernel_size=spec.kernel_size,
        stride=spec.stride,
        kernel_dilation=spec.kernel_dilation,
        groups=spec.groups,
    )
    return native(lax.optimization_barrier(pad(x, spec)), w, valid, numbers)


def shifts(x, w, spec, numbers):
    """Shifted multiply-adds: for each tap and each channel of a group one broadcast product."""
    (N, _, C), (K, c, O) = x.shape, w.shape
    U, G = spec.out_time, spec.groups
    w = w.astype(numbers.acc)
    y = None
    for k, tap in enumerate(taps(x, spec)):
        tap = tap.astype(numbers.acc)
        for i in range(c):
            if C == O == G:
                product = tap * w[k, i]
            else:
                product = tap.reshape(N, U, G, c)[..., i, None] * w[k, i].reshape(G, O // G)
            y = product if y is None else y + product
    return y.reshape(N, U, O)


def matmuls(x, w, spec, numbers):
    """K shifted matmuls, added up."""
    y = None
    for k, tap in enumerate(taps(x, spec)):
        product = grouped_matmul(tap, w[k], spec.groups, numbers)
        y = product if y is None else y + product
    return y


def im2col(x, w, spec, numbers):
    """One matmul of all taps side by side. Holds K copies of x."""
    K, c, O = w.shape
    return grouped_matmul(columns(x, spec), w.reshape(K * c, O), spec.groups, numbers)


def scatter(x, w, spec, numbers):
    """One matmul of x with all taps, whose K products are then shifted and added.

    No zero of an input dilation is multiplied. Holds K copies of y before its stride.
    """
    (N, T, _), (K, c, O) = x.shape, w.shape
    G, E = spec.groups, spec.input_dilation
    w = w.reshape(K, c, G, O // G).transpose(1, 2, 0, 3).reshape(c, G * K * (O // G))
    products = grouped_matmul(x, w, G, numbers).reshape(N, T, G, K, O // G)
    length = (spec.out_time - 1) * spec.stride + 1
    y = None
    for k in range(K):
        low = spec.padding[0] - k * spec.kernel_dilation
        high = length - spec.dilated_time - low
        shifted = lax.pad(
            products[:, :, :, k].reshape(N, T, O),
            jnp.zeros((), products.dtype),
            ((0, 0, 0), (low, high, E - 1), (0, 0, 0)),
        )
        shifted = lax.slice_in_dim(shifted, 0, length, spec.stride, axis=1)
        y = shifted if y is None else y + shifted
    return y


def fold(x, w, spec, numbers):
    """Views time as ``(T/D, D)``: inside one residue class of D the taps are neighbours."""
    U, S, D = spec.out_time, spec.stride, spec.kernel_dilation
    N, C, O = x.shape[0], x.shape[2], w.shape[2]
    length = (U - 1) * S + 1  # without a stride; it is taken at the end
    rows = -(-length // D)
    total = (rows + spec.kernel_size - 1) * D
    low, high = spec.padding
    high += total - (spec.dilated_time + low + high)
    x = lax.pad(
        x, jnp.zeros((), x.dtype), ((0, 0, 0), (low, high, spec.input_dilation - 1), (0, 0, 0))
    )
    y = lax.conv_general_dilated(
        x.reshape(N, total // D, D, C),
        w[:, None],
        window_strides=(1, 1),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=spec.groups,
        precision=numbers.precision,
        preferred_element_type=numbers.out,
    )
    return lax.slice_in_dim(y.reshape(N, rows * D, O), 0, length, S, axis=1)


def block_diagonal(w: jax.Array, groups: int) -> jax.Array:
    """The dense kernel ``(K, C, O)`` that is zero between groups."""
    K, c, O = w.shape
    eye = jnp.eye(groups, dtype=w.dtype)[:, None, :, None]  # (G, 1, G, 1)
    return (w.reshape(K, 1, c, groups, O // groups) * eye).reshape(K, groups * c, O)


def dense(x, w, spec, numbers):
    """A native convolution of one group, whose kernel is zero between the groups."""
    one = dataclasses.replace(spec, groups=1)
    return native(x, block_diagonal(w, spec.groups), one, numbers)


def split(x, w, spec, numbers):
    """A native convolution for each group."""
    one = dataclasses.replace(spec, groups=1)
    xs, ws = jnp.split(x, spec.groups, 2), jnp.split(w, spec.groups, 2)
    return lax.concatenate([native(x, w, one, numbers) for x, w in zip(xs, ws, strict=True)], 2)


FORWARD: dict[str, Formulation] = {
    f.__name__: f for f in (native, barrier, shifts, matmuls, im2col, scatter, fold, dense, split)
}


# Kernel gradient.


def transposed(formulation: Formulation) -> Formulation:
    """The kernel gradient as JAX's transpose of a forward formulation."""

    def kernel_grad(x, g, spec, numbers):
        K, c, O = spec.kernel_size, x.shape[2] // spec.groups, g.shape[2]
        # Forward, with numbers.out the dtype of g, so that g may be its cotangent.
        forward = Numbers(numbers.acc, g.dtype, numbers.precision)
        f = jax.linear_transpose(
            lambda w: formulation(x, w, spec, forward).astype(g.dtype),
            jax.ShapeDtypeStruct((K, c, O), numbers.out),
        )
        return f(g)[0]

    return kernel_grad


def shifts_kernel_grad(x, g, spec, numbers):
    """Shifted multiply-reductions: for each tap and each channel of a group one sum."""
    (N, _, C), (_, U, O), G = x.shape, g.shape, spec.groups
    c, m = C // G, O // G
    g = g.astype(numbers.acc).reshape(N, U, G, m)
    sums = [
        jnp.sum(tap.astype(numbers.acc).reshape(N, U, G, c)[..., i, None] * g, (0, 1)).reshape(O)
        for tap in taps(x, spec)
        for i in range(c)
    ]
    return jnp.stack(sums).reshape(spec.kernel_size, c, O)


def matmuls_kernel_grad(x, g, spec, numbers):
    """K matmuls over batch and time."""
    return jnp.stack([grouped_outer(tap, g, spec.groups, numbers) for tap in taps(x, spec)])


def im2col_kernel_grad(x, g, spec, numbers):
    """One matmul over batch and time of all taps side by side. Holds K copies of x."""
    w = grouped_outer(columns(x, spec), g, spec.groups, numbers)
    return w.reshape(spec.kernel_size, x.shape[2] // spec.groups, g.shape[2])


KERNEL_GRAD: dict[str, Formulation] = {
    "native": transposed(native),
    "shifts": shifts_kernel_grad,
    "matmuls": matmuls_kernel_grad,
    "im2col": im2col_kernel_grad,
    "fold": transposed(fold),
    "dense": transposed(dense),
    "split": transposed(split),
}
