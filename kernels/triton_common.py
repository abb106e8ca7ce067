"""What the Triton kernels share: phases, rounding, sums, and what none of them does."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from conv_pallas.kernels import triton_compat
from conv_pallas.spec import ConvSpec, Problem

SUPPORTED = ("bfloat16", "float16", "float32")
MOST_SPLITS = 512  # partial sums of a kernel gradient


@triton.jit
def to_float32(a):
    # Written out, of the two values of a word each takes one instruction; else three for both.
    if a.dtype == tl.bfloat16:
        a = (a.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return a.to(tl.float32)


# --- Strides and input dilation, by phases ---


@dataclasses.dataclass(frozen=True)
class Phases:
    """Stride S and input dilation E without a product with zero.

    Output ``u = a + phases * j`` of phase ``a`` is reached by those taps alone for which
    ``a * S + k * D - low`` is a multiple of E. They are ``tap_step`` apart, the same for all
    ``j``, and from one ``j`` to the next they move on by ``row_step`` input steps. So each
    phase is a convolution of its own, with neither stride nor holes in its kernel.

    Attributes:
      tap_inverse, phase_inverse: of D modulo ``tap_step``, and of S modulo ``phases``, each
        divided by what it has in common with E: see `first_tap` and `first_output`.
    """

    phases: int
    row_step: int
    tap_step: int
    tap_inverse: int = 0
    phase_inverse: int = 0

    def __str__(self) -> str:  # in the name of what was tuned
        return f"phases {self.phases} rows {self.row_step} taps {self.tap_step}"

    @classmethod
    def of(cls, spec: ConvSpec) -> "Phases":
        S, E, D = spec.stride, spec.input_dilation, spec.kernel_dilation
        of_rows, of_taps = math.gcd(S, E), math.gcd(D, E)
        phases, tap_step = E // of_rows, E // of_taps
        inverses = pow(D // of_taps, -1, tap_step), pow(S // of_rows, -1, phases)
        return cls(phases, S // of_rows, tap_step, *inverses)

    def tapped(self, spec: ConvSpec) -> bool:
        """Whether there is one phase, and a tap that reaches it.

        Of a stride, an input dilation and a kernel dilation that have a divisor in common, padding
        that is no multiple of it lets all taps see the zeros between two steps.
        """
        taps = range(min(spec.kernel_size, self.tap_step))
        steps = (k * spec.kernel_dilation - spec.padding[0] for k in taps)
        return self.phases == 1 and any(step % spec.input_dilation == 0 for step in steps)


@triton.jit
def _solve(steps, E: tl.constexpr, PERIOD: tl.constexpr, INVERSE: tl.constexpr):
    """The least ``i >= 0`` for which ``i * A - steps`` is a multiple of E; -1 where none is.

    A and E have ``E / PERIOD`` in common; divided by that, INVERSE is A's modulo PERIOD.
    """
    COMMON: tl.constexpr = E // PERIOD
    rest = steps % E
    rest = tl.where(rest < 0, rest + E, rest)  # rounded towards zero
    least = rest // COMMON
    if PERIOD >= 2**15:
        least = least.to(tl.int64)
    return tl.where(rest % COMMON == 0, (least * INVERSE % PERIOD).to(tl.int32), -1)


@triton.jit
def first_tap(
    a, LOW, K: tl.constexpr, S: tl.constexpr, E: tl.constexpr, STEP: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """The first tap that reaches phase ``a``; K where none does."""
    k = _solve(LOW - a * S, E, STEP, INVERSE)
    return tl.where(k < 0, K, tl.minimum(k, K))


@triton.jit
def first_output(
    k, D, LOW, E: tl.constexpr, PHASES: tl.constexpr, INVERSE: tl.constexpr
):  # fmt: skip
    """The first output that tap ``k`` reaches, were all of time there; -1 where there is none."""
    return _solve(LOW - k * D, E, PHASES, INVERSE)


@triton.jit
def offsets(i, STEP: tl.constexpr, COUNT: tl.constexpr):
    """``i * STEP`` for i below COUNT, with 64 bits where 32 do not suffice."""
    if STEP * COUNT >= 2**31:
        i = i.to(tl.int64)
    return i * STEP


@triton.jit
def within(t, end, columns, TURNED: tl.constexpr = False):
    """Where ``0 <= t < end``, of the rows ``t``, and of those ``columns``; TURNED its transpose.

    One comparison an element: a program of few channels has more to do to say what it fetches than
    to multiply it.
    """
    before = tl.where(columns, tl.maximum(end, 0), 0).to(tl.uint32, bitcast=True)
    t = t.to(tl.uint32, bitcast=True)
    return t[None, :] < before[:, None] if TURNED else t[:, None] < before[None, :]


@triton.jit
def to_tf32(x):
    """float32 rounded to the 10 bits after the point of which tensor cores take notice.

    They cut the others off, which is twice as far off and always towards zero.
    """
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # a NaN's bits might overflow into a zero's


def tf32_of(x: jax.Array) -> jax.Array:
    """As `to_tf32`, in XLA."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    rounded = jax.lax.bitcast_convert_type((bits + 0x1000) & -0x2000, x.dtype)
    return jnp.where(x == x, rounded, x)


# --- Numbers ---


def decline(problem: Problem) -> str | None:
    """Why no Triton kernel does this, or None."""
    for dtype in (problem.lhs_dtype, problem.rhs_dtype, problem.out_dtype):
        if np.dtype(dtype).name not in SUPPORTED:
            return f"takes {', '.join(SUPPORTED)}, not {np.dtype(dtype).name}"
    if not problem.known:
        return "needs every size to be known when it is compiled"
    sizes, spec = (*problem.x_shape, *problem.y_shape, *problem.w_shape), problem.spec
    field = max(map(abs, spec.padding)) + spec.span
    # What a tile reaches over: of time 256 steps at most, each so many apart. And its phase.
    tile = 256 * max(spec.stride, spec.input_dilation)
    phase = max(
        min(Phases.of(d).phases, d.out_time) * d.stride for d in (spec, spec.transposed())
    )  # fmt: skip
    if max(*sizes, field) >= 2**30 or max(max(sizes) + tile, phase) + field >= 2**31:
        return "counts steps with 32 bits"
    if most_programs(problem) >= 2**31:
        return "has more tiles than a grid has programs"
    capability = triton_compat.compute_capability()
    if capability is not None and capability < 80:
        return f"needs compute capability 8.0 or newer, not {capability / 10}"
    return None


def most_programs(problem: Problem) -> int:
    """How many programs the smallest tiles would take, in whichever operation takes most."""
    spec, C, O = problem.spec, problem.C, problem.O
    G = 1 if problem.depthwise else spec.groups
    c, o = (triton.cdiv(channels // G, 16) for channels in (C, O))
    steps = 0
    for direction in (spec, spec.transposed()):
        phases = Phases.of(direction).phases
        steps = max(steps, phases * triton.cdiv(direction.out_time, 16 * phases))
    rows = spec.kernel_size * (1 if problem.depthwise else c) + 1
    return G * max(problem.N * steps * max(c, o), MOST_SPLITS * rows * o)


def dot_precision(problem: Problem) -> str | None:
    """How `tl.dot` multiplies float32; nothing else has a choice. None: there is no way."""
    asked = problem.precision if isinstance(problem.precision, tuple) else (problem.precision,)
    if not all(isinstance(p, jax.lax.Precision | None) for p in asked):
        return None  # a `jax.lax.DotAlgorithmPreset`
    highest = max((jax.lax.Precision(p or 0).value for p in asked), default=0)
    return ("tf32", "tf32x3", "ieee")[highest]


def operand_dtype(problem: Problem) -> np.dtype:
    """The dtype that both factors are brought to."""
    return np.dtype(jnp.promote_types(problem.lhs_dtype, problem.rhs_dtype))


ADDED_AT_ONCE = 16


def add_in_order(partial: jax.Array, dtype) -> jax.Array:
    """The sum over the first axis, always in the same order, as elementwise expressions.

    A reduction would leave the order to XLA; this leaves it nothing, and fuses with what
    comes next, be that a cast or an optimizer's update. Neighbours are added, up to 16 at once, in
    slices of all such groups: a slice for each term took XLA seconds to compile.
    """
    ways = ADDED_AT_ONCE
    while (count := partial.shape[0]) > 1:
        whole = count // ways * ways
        groups = partial[:whole].reshape(count // ways, ways, *partial.shape[1:])
        sums = [_add(groups[:, i] for i in range(ways))] if whole else []
        if whole < count:
            sums.append(_add(partial[i : i + 1] for i in range(whole, count)))
        partial = jnp.concatenate(sums)
    return partial[0].astype(dtype)


def _add(terms) -> jax.Array:
    return functools.reduce(lambda a, b: a + b, terms)


def bias_grad_in_xla(gz: jax.Array) -> jax.Array:
    """The sum over all steps in float32, where no kernel carries it."""
    return jnp.sum(gz, (0, 1), dtype=jnp.float32)
