"""Products on a TPU's matrix unit, in the precision asked for, and what is fused around them."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from conv_pallas.kernels import tpu_epilogue
from conv_pallas.kernels.tpu_epilogue import Around
from conv_pallas.kernels.tpu_window import LANES, SUBLANES
from conv_pallas.spec import Problem

# Unrolled passes of the matrix unit over 8 rows. Longer code hides more of its latency; beyond
# this, it takes long to compile and gains little.
CODE = 2048
CHUNKS = (2048, 1024, 512, 256)
WIDE = 256  # channels of the wider matrix units

PASSES = {None: "bf16", "DEFAULT": "bf16", "HIGH": "bf16x3", "HIGHEST": "f32"}


def passes_of(problem: Problem) -> str | None:
    """How products are made: ``"bf16"``, ``"bf16x3"`` or ``"f32"``; None: there is no way."""
    if problem.lhs_dtype == problem.rhs_dtype == jnp.bfloat16:
        return "bf16"
    precision = problem.precision
    if isinstance(precision, tuple):
        precision = max(precision, key=lambda p: 0 if p is None else p.value)
    return PASSES.get(getattr(precision, "name", precision))


def chunk_rows(rows: int, passes: str, taps: int, C: int, O: int) -> int:
    """Rows of one matmul: few enough that its code stays short."""
    return _within(CODE, rows, passes, pl.cdiv(taps * C, WIDE) * pl.cdiv(O, WIDE))


def _within(code: int, rows: int, passes: str, each: int) -> int:
    """The longest chunk whose code is within ``code``; ``each``: passes over it, of bfloat16."""
    each *= {"bf16": 1, "bf16x3": 3, "f32": 6}[passes]
    fitting = [n for n in CHUNKS if n * each <= 8 * code]
    return min(rows, fitting[0] if fitting else CHUNKS[-1])


def gradient_chunk_rows(rows: int, passes: str, taps: int, C: int, O: int, mxu: int) -> int:
    """Rows of one product of the kernel gradient.

    Each tap is a product of its own, whatever it leaves of a matrix unit idle, so that many taps of
    few channels make long code: 41 taps of 32 channels take 12 s to compile with 2048 rows and 3 s
    with 512, for bundles within 4 % of each other. Twice `CODE` still gains from longer chunks.

    Where a matrix unit is 128 wide, and neither C nor O is, long chunks spill so much that shorter
    ones take fewer bundles: at C=256, K=7, D=64 on v5e 931k with 256 rows, without a spill, where
    2048 rows take 966k (libtpu 0.0.50.1). A 256 wide one gains from long ones: 285k for 399k.
    """
    if mxu < 256 and min(C, O) > mxu and rows > 512:
        return CHUNKS[-1]
    each = taps * pl.cdiv(C, WIDE) * pl.cdiv(O, WIDE)
    return min(chunk_rows(rows, passes, taps, C, O), _within(2 * CODE, rows, passes, each))


def split(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 as the sum of two bfloat16."""
    # By its bits: XLA may take a rounding there and back for an identity, and drop it.
    bits = lax.bitcast_convert_type(a, jnp.uint32) & jnp.uint32(0xFFFF0000)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high.astype(jnp.bfloat16), (a - high).astype(jnp.bfloat16)


def dot(a: jax.Array, b, passes: str, contract=((1,), (0,))) -> jax.Array:
    """The float32 product; where it takes three passes, ``b`` is a pair from `split`, a may be."""
    # Named, or what `jax.default_matmul_precision` says would reach bfloat16 operands.
    precision = lax.Precision.HIGHEST if passes == "f32" else lax.Precision.DEFAULT
    product = functools.partial(
        lax.dot_general, precision=precision, dimension_numbers=(contract, ((), ())),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    if passes == "bf16":
        return product(a.astype(jnp.bfloat16), b)
    if passes == "f32":
        return product(a.astype(jnp.float32), b)
    high, low = a if isinstance(a, tuple) else split(a.astype(jnp.float32))
    return product(high, b[0]) + (product(high, b[1]) + product(low, b[0]))


def add_products(dw_ref, g, taps, passes: str) -> None:
    """Adds ``g^T x_k`` to ``dw_ref[0, k]``, ``(O, C)``, for each of the taps ``x_k (rows, C)``.

    The left side is what has to be transposed first. So it is g: once, and not each tap. Taps of
    whole lanes make one product, so that two of 128 channels fill a matrix unit 256 wide.
    """
    C = taps[0].shape[1]
    groups = [taps] if C % LANES == 0 else [[tap] for tap in taps]
    if passes == "bf16x3":
        g = split(g.astype(jnp.float32))
    k = 0
    for group in groups:
        x = group[0] if len(group) == 1 else jnp.concatenate(group, 1)
        x = split(x.astype(jnp.float32)) if passes == "bf16x3" else x
        products = dot(g, x, passes, ((0,), (0,)))
        for at in range(0, products.shape[1], C):
            dw_ref[0, k] += products[:, at : at + C]
            k += 1


def add_bias_gradient(db_ref, g) -> None:
    """Adds g ``(rows, O)``, summed by sublanes, to ``db_ref[0, 0]``: XLA adds those in the end."""
    g = g.astype(jnp.float32)
    db_ref[0, 0] += g.reshape(-1, SUBLANES, g.shape[1]).sum(0)


def gradient_rows(around: Around, g_ref, saved_ref):
    refs = (ref if ref is None else ref.at[0] for ref in (g_ref, saved_ref))
    return tpu_epilogue.rows_of_gradient(around, *refs)


def finish(around: Around, acc, b_ref, out_refs, at) -> None:
    """Bias, activation, and the one rounding."""
    if around.bias:
        acc += b_ref[...]
    tpu_epilogue.store(around, acc, out_refs, (0, pl.ds(at, acc.shape[0])))
