"""What `flax.nnx.Conv` runs: one `lax.conv_general_dilated`, and JAX's own transposes of it.

The baseline that every other implementation is measured against.

    y[n, u, o]  = sum over k, c of  x[n, u*S + k*D - low, c] * w[k, c, o]

Operations: ``2 N T' K (C / G) O``, and whatever XLA multiplies by zeros. Bytes: x, w and y once
each at least, and the copies that XLA makes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from conv_pallas.kernels import Kernel
from conv_pallas.spec import ConvSpec, Problem


def holds(a: np.dtype, b: np.dtype) -> np.dtype:
    """A dtype for both. JAX promotes no float of 8 bits, and no integer of less."""

    def wider(d):
        if jnp.issubdtype(d, jnp.floating):
            return jnp.bfloat16 if np.dtype(d).itemsize == 1 else d
        if jnp.issubdtype(d, jnp.integer) and jnp.iinfo(d).bits < 8:
            return jnp.int8 if jnp.issubdtype(d, jnp.signedinteger) else jnp.uint8
        return d

    return a if a == b else jnp.promote_types(wider(a), wider(b))


def conv(
    x: jax.Array, w: jax.Array, spec: ConvSpec, out_dtype: np.dtype, precision=None
) -> jax.Array:
    """The forward convolution of ``x (N, T, C)`` with ``w (K, C//G, O)``, padded in the window."""
    dtype = holds(x.dtype, w.dtype)  # lax takes operands of one dtype only
    return lax.conv_general_dilated(
        x.astype(dtype),
        w.astype(dtype),
        window_strides=(spec.stride,),
        padding=[spec.padding],
        lhs_dilation=(spec.input_dilation,),
        rhs_dilation=(spec.kernel_dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=spec.groups,
        precision=precision,
        preferred_element_type=holds(dtype, out_dtype),  # lax accumulates in none that is narrower
    ).astype(out_dtype)


def run(problem: Problem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The operation of ``problem``; the two gradients are transposes of `conv`."""
    if problem.operation == "conv1d":
        return conv(lhs, rhs, problem.spec, problem.out_dtype, problem.precision)
    unknown = jax.ShapeDtypeStruct(problem.out_shape, problem.out_dtype)
    if problem.operation == "conv1d_input_grad":
        g, w = lhs, rhs
        transposed = jax.linear_transpose(
            lambda x: conv(x, w, problem.spec, g.dtype, problem.precision), unknown
        )
    else:
        x, g = lhs, rhs
        transposed = jax.linear_transpose(
            lambda w: conv(x, w, problem.spec, g.dtype, problem.precision), unknown
        )
    (out,) = transposed(g)
    return out


KERNEL = Kernel(
    implementation="xla_native",
    platforms=("cpu", "cuda", "rocm", "tpu", "other"),
    run=run,
    decline=lambda problem: None,
    describe=lambda problem: "lax.conv_general_dilated and its transposes, as nnx.Conv has it",
    # Of a platform that nobody has read or measured nothing is known to be better.
    priority=lambda problem: 0 if problem.platform == "other" else None,
    many=lambda problem: jax.vmap(functools.partial(run, problem)),
)
