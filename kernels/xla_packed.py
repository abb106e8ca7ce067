"""Convolutions of packed sequences, as XLA does them best: depthwise ones, and dense ones on CPUs.

    z[n, t, o]  = bias[o] + sum over k, c of  x[n, t + k*D - low, c] * w[k, c, o]
    dx          = the same of gz, with taps reversed and channels in and out exchanged
    dw[k, c, o] = sum over n, t of  x[n, t + k*D - low, c] * gz[n, t, o]

each over the taps k that output t sees, for which it has a bit in ``sees (N, T)``.

Depthwise a tap is a product, and XLA fuses all of a sum over taps into one pass: x and z once each.
A kernel gradient is a pass for each tap; on a CPU in blocks of time, as the plain one. A dense
layer on a CPU is a matmul of what its taps see side by side, and its input gradient one that has
the products of all taps: for a moment K times x is held.

Operations: ``2 N T K C O / G`` forward, and twice that backward, three times with an activation,
whose derivative takes z.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from conv_pallas.activations import activate, times_derivative
from conv_pallas.kernels.xla_formulations import (
    grouped_outer,
    native,
    numbers_of,
    seen,
    sees_tap,
    tree_kernel_grad,
)
from conv_pallas.spec import ACTIVATIONS, ConvSpec, Problem


def _sum_of_taps(a, w, sees, spec: ConvSpec, acc: np.dtype, mirrored: bool = False) -> jax.Array:
    """``(N, T, O)`` of x ``(N, T, C)``; mirrored ``(N, T, C)`` of g ``(N, T, O)``.

    Args:
      spec: of the convolution that this is.
    """
    K, C = spec.kernel_size, spec.groups
    steps = sees[..., None]
    total = None
    for k in range(K):
        tap, at = seen(a, k, spec), K - 1 - k if mirrored else k
        there = sees_tap(seen(steps, k, spec) if mirrored else steps, at)
        product = _where(there, _per_channel(tap.astype(acc), w[at][None].astype(acc), C))
        total = product if total is None else total + product
    if mirrored:
        return total if total.ndim == 3 else jnp.sum(total, -1)
    return total.reshape(*total.shape[:2], -1)


def _where(there, product) -> jax.Array:
    """The product, zero where it is not there: a factor may be infinite."""
    there = there.reshape(*there.shape[:2], *[1] * (product.ndim - 2))
    return jnp.where(there, product, jnp.zeros((), product.dtype))


def _per_channel(a, b, C: int) -> jax.Array:
    """The products ``(N, T, C)``, or ``(N, T, C, M)`` where only one of them has M times C."""
    if a.shape[-1] == b.shape[-1] == C:
        return a * b
    return a.reshape(*a.shape[:2], C, -1) * b.reshape(*b.shape[:2], C, -1)


def _columns(x, sees, spec: ConvSpec) -> jax.Array:
    """What each output sees through its taps, side by side: ``(N, T, K * C)``."""
    each = range(spec.kernel_size)
    return lax.concatenate(
        [_where(sees_tap(sees, k)[..., None], seen(x, k, spec)) for k in each], 2
    )


def _flat(w) -> jax.Array:
    """``(K * C, O)``."""
    return w.reshape(-1, w.shape[2])


def _matmul(a, b, numbers) -> jax.Array:
    """``(N, T, C) @ (C, O)``, as a convolution of one tap: as a dot XLA takes a slower library."""
    wide = numbers._replace(out=numbers.acc)
    return native(a, b[None], ConvSpec(a.shape[1], 1), wide)


def _sum_of_products(g, w, sees, numbers, spec: ConvSpec) -> jax.Array:
    """The input gradient of a dense layer, from one matmul of g with all taps.

    Args:
      spec: of the convolution of g.
    """
    K, C, _ = w.shape
    products = _matmul(g, _flat(w).T, numbers).reshape(*g.shape[:2], K, C)
    total = None
    for k in range(K):
        product = _where(sees_tap(sees, k)[..., None], products[:, :, k])
        product = seen(product, K - 1 - k, spec)
        total = product if total is None else total + product
    return total


def _dense_kernel_grad(x, g, spec: ConvSpec, numbers, sees) -> jax.Array:
    columns = _columns(x, sees, spec)
    return grouped_outer(columns, g, 1, numbers).reshape(spec.kernel_size, x.shape[2], -1)


def _z(problem: Problem, x, w, bias, sees) -> jax.Array:
    """z, as it is summed."""
    operand, numbers = numbers_of(problem)
    x, w = x.astype(operand), w.astype(operand)
    if problem.depthwise:
        z = _sum_of_taps(x, w, sees, problem.spec, numbers.acc)
    else:
        z = _matmul(_columns(x, sees, problem.spec), _flat(w), numbers)
    return z if bias is None else z + bias.astype(z.dtype)[None, None]


def packed(problem: Problem, x, w, bias, sees) -> jax.Array:
    """``activation(z)``; see `Kernel.packed`."""
    z = _z(problem, x, w, bias, sees)
    y = activate(z, problem.epilogue.activation).astype(problem.out_dtype)
    return _in_memory(problem, y)


def _in_memory(problem: Problem, a: jax.Array) -> jax.Array:
    """Else XLA:CPU computes all taps anew, number by number, where what comes of them is summed."""
    return lax.optimization_barrier(a) if problem.platform == "cpu" else a


def packed_backward(problem: Problem, x, w, bias, sees, gy, wanted):
    """Its gradients; see `Kernel.packed_backward`.

    Written out, and not the transpose of `packed`, of which XLA would hold each tap's part.
    """
    spec, activation = problem.spec, problem.epilogue.activation
    # What is computed again here is not to be shared with the forward pass, which would have to
    # keep it.
    x, w, bias, sees, gz = lax.optimization_barrier((x, w, bias, sees, gy))
    if activation is not None:
        z = _z(problem, x, w, bias, sees)
        saved = activate(z, activation) if ACTIVATIONS[activation] == "y" else z
        gz = lax.optimization_barrier(times_derivative(gz, saved, activation))
    dx = dw = db = None
    if wanted[0]:
        operand, numbers = numbers_of(problem.gradient("conv1d_input_grad"))
        if problem.depthwise:
            turned = functools.partial(_sum_of_taps, mirrored=True, acc=numbers.acc)
        else:
            turned = functools.partial(_sum_of_products, numbers=numbers)
        dx = turned(gz.astype(operand), w.astype(operand), sees, spec=spec.transposed())
        dx = _in_memory(problem, dx.astype(x.dtype))
    if wanted[1]:
        operand, numbers = numbers_of(problem.gradient("conv1d_kernel_grad"))
        if not problem.depthwise:
            of_taps = _dense_kernel_grad
        else:
            of_taps = tree_kernel_grad if problem.platform == "cpu" else _kernel_grad
        dw = of_taps(x.astype(operand), gz.astype(operand), spec, numbers, sees=sees)
        dw = dw.astype(w.dtype)
    if wanted[2] and bias is not None:
        _, numbers = numbers_of(problem)
        db = jnp.sum(gz, (0, 1), dtype=numbers.acc)
    return dx, dw, db


def _kernel_grad(x, g, spec: ConvSpec, numbers, sees) -> jax.Array:
    """A reduction for each tap."""
    C, acc = spec.groups, numbers.acc
    g = g.astype(acc)

    def of_tap(k):
        products = _per_channel(seen(x, k, spec).astype(acc), g, C)
        return jnp.sum(_where(sees_tap(sees, k), products), (0, 1)).reshape(1, -1)

    return jnp.stack([of_tap(k) for k in range(spec.kernel_size)])


def decline_packed(problem: Problem) -> str | None:
    """See `Kernel.decline_packed`."""
    if not problem.known:
        return "takes no symbols"
    if not problem.depthwise and (problem.platform != "cpu" or problem.spec.groups > 1):
        return "takes depthwise layers, and dense ones on a CPU"
    return None
