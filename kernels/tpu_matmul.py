"""Products on a TPU's matrix unit, in the precision asked for, and what is fused around them."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from conv_pallas import taps
from conv_pallas.kernels import tpu_epilogue
from conv_pallas.kernels.tpu_epilogue import Around
from conv_pallas.kernels.tpu_window import LANES, SUBLANES, Chip, decline_any
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

    As many as there are, for each chunk moves all of dw once. But on a matrix unit 128 wide so
    many sums spill too much: of 512 channels libtpu 0.0.50.1 schedules fewer bundles for chunks of
    512 rows. The code grows with taps and passes, so of many they are cut.
    """
    if mxu < 256 and min(C, O) > 256:
        rows = min(rows, 512)
    each = taps * pl.cdiv(C, WIDE) * pl.cdiv(O, WIDE)
    return _within(6 * CODE, rows, passes, each)


def split(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 as the sum of two bfloat16.

    The first is rounded and not cut off: then the second is half as large, and the product of two
    of those, which nobody computes, a quarter, and of either sign. It is cut off where it would
    round to an infinity, beyond 3.396e38; of what is infinite or NaN the second is 0.
    """
    # By its bits: XLA may take a rounding there and back for an identity, and drop it.
    bits = lax.bitcast_convert_type(a, jnp.uint32)
    upper = lambda bits: lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)  # noqa: E731
    rounded = upper(bits + jnp.uint32(0x8000))
    high = jnp.where(jnp.abs(rounded) < jnp.inf, rounded, upper(bits))
    high = jnp.where(jnp.abs(a) < jnp.inf, high, a)  # a NaN's bits may round to anything
    low = jnp.where(jnp.abs(a) < jnp.inf, a - high, 0.0)
    return high.astype(jnp.bfloat16), low.astype(jnp.bfloat16)


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
    highs = product(high, b[0])
    # Of an infinity the others are NaN: times the zero of a number that is a bfloat16 already.
    sums = highs + (product(high, b[1]) + product(low, b[0]))
    return jnp.where(jnp.abs(highs) < jnp.inf, sums, highs)


def add_products(dw_ref, g, taps, passes: str, mxu: int) -> None:
    """Adds ``g^T x_k`` to ``dw_ref[0, k]``, ``(O, C)``, for each of the taps ``x_k (rows, C)``.

    The left side is what has to be transposed first. So it is g: once, and not each tap. Two taps
    of 128 channels make one product where a matrix unit is 256 wide.
    """
    C = taps[0].shape[1]
    n = max(1, mxu // C) if C % LANES == 0 else 1
    groups = [taps[i : i + n] for i in range(0, len(taps), n)]
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


# --- What the dense kernels do with a problem, given their own plan and launchers ---


def launch(
    plan_of, forward, kernel_grad, problem: Problem, lhs, rhs, chip: Chip, *, longest: int,
    interpret=False, bias=None, saved=None, sum_bias=False,
):  # fmt: skip
    """The operation of ``problem`` with the tiles of ``chip``, at most ``longest`` steps each.

    Args:
      bias: forward: what is added before the epilogue's activation.
      saved: gradients: from which the derivative of that activation is computed.
      sum_bias: kernel gradient: return ``(dw, db)``, else dw.
    """
    operation = problem.operation
    around = Around.of(problem, bias is not None or sum_bias)
    plan = plan_of(problem, chip, longest, around.slope_of is not None)
    passes = passes_of(problem)
    options = dict(saved=saved, around=around, interpret=interpret)
    if operation == "conv1d_kernel_grad":
        dw, db = kernel_grad(lhs, rhs, plan, passes, chip, **options)
        return (dw.astype(problem.out_dtype), db) if sum_bias else dw.astype(problem.out_dtype)
    if operation == "conv1d_input_grad":
        rhs = taps.flip(rhs, 1)
    return forward(lhs, rhs, plan, passes, problem.out_dtype, chip, bias=bias, **options)


def decline_dense(problem: Problem) -> str | None:
    """What no dense kernel takes, whatever its tiles."""
    if problem.spec.groups != 1:
        return "is for one group of channels"
    if reason := decline_any(problem):
        return reason
    if passes_of(problem) is None:
        return f"knows the precisions DEFAULT, HIGH and HIGHEST, not {problem.precision}"
    return None
