"""The depthwise convolution on a TPU's vector unit, all three operations.

    y[n, u, c]  = sum over k of  x[n, u + k*D - low, c] * w[k, c]
    dx          = the same of g, with the taps reversed
    dw[k, c]    = sum over n, u of  x[n, u + k*D - low, c] * g[n, u, c]

Operations: ``2 N T K C``. Bytes: x once and y once, so that it is memory that limits it up to
some dozens of taps. The matrix unit would spend 128 products on each that is wanted.

Tiling. The grid is (tile of C, n, time), time innermost and in sequence, with the halo carried
in VMEM (`tpu_window.py`). Channels lie along lanes and time along sublanes, so that a tap is
one multiplication and one addition of whole registers. The window is float32: a tap then starts
at any row without unpacking pairs of rows, and each step of x is converted once, not K times.
Inside a tile of time `CHUNK` rows and 128 channels at a time keep their sums in registers.

The kernel gradient sums over time into eight rows, one for each sublane, which XLA adds in the
end: no reduction across sublanes is left in the loop. Each core makes a part of its own; parts
and rows are added in a fixed order, so that the result is the same in every run.

All sums and products are float32, whatever the precision asked for.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from conv_pallas.kernels import tpu_epilogue
from conv_pallas.kernels.tpu_epilogue import Around
from conv_pallas.kernels.tpu_window import (
    LANES,
    SUBLANES,
    Chip,
    Walk,
    by_chunks,
    by_real_chunks,
    cleared,
    compiler_params,
    cost,
    cut,
    decline_any,
    round_up,
    rows_of,
    rows_that_fit,
    vmem_bytes,
)
from conv_pallas.spec import Problem

LANES_AT_ONCE = 512  # channels of a tile: contiguous reads of 1 KB and more from HBM
CHUNK = 128  # rows of one sum: its 16 registers, and those of a tap, fit in the 64 there are
GRADIENT_CHUNK = 64  # there a product lives beside them: 128 rows spill, and are no faster
LONGEST = 1024  # rows of a tile of time

# --- Device code ---


def _gradient_rows(around: Around, g_ref, saved_ref, c):
    refs = (ref if ref is None else ref.at[0, :, c] for ref in (g_ref, saved_ref))
    return tpu_epilogue.rows_of_gradient(around, *refs)


def _lanes(width: int) -> list[tuple[int, int]]:
    """Where each 128 of ``width`` channels begin, and how many they are."""
    return [(at, min(LANES, width - at)) for at in range(0, width, LANES)]


def _by_lanes(width: int, windows):
    """For each 128 of ``width`` channels, where they are, and their window."""
    return [(pl.ds(at, n), w) for (at, n), w in zip(_lanes(width), windows, strict=True)]


def _windows(plan) -> list[pltpu.VMEM]:
    # Of its own for each 128 channels: there a tap that starts between two tiles of 8 rows is
    # one contiguous load, where lanes side by side would take two, and a shift.
    return [pltpu.VMEM((plan.walk.window_rows, n), jnp.float32) for _, n in _lanes(plan.BC)]


def _forward_kernel(walk, around, x_ref, *refs):
    """One tile of time: moves the window on, then one sum of taps per chunk."""
    refs = list(refs)
    saved_ref = refs.pop(0) if around.slope_of else None
    BC = x_ref.shape[2]
    count = len(_lanes(BC))
    (w_ref, *refs), windows = refs[:-count], refs[-count:]
    b_ref, out_refs = refs[: around.bias], refs[around.bias :]
    s = pl.program_id(2)
    for c, lanes in _by_lanes(BC, windows):
        walk.advance(s, _gradient_rows(around, x_ref, saved_ref, c), lanes)

    @pl.when(s >= walk.warm)
    def _():
        def chunk(at, n):
            # Aligned here and by a constant below: a dynamic offset must be a whole tile.
            for c, lanes in _by_lanes(BC, windows):
                rows = lanes.at[pl.ds(at, n + walk.history)]
                acc = rows[pl.ds(walk.offset(0), n)] * w_ref[pl.ds(0, 1), c]
                for k in range(1, walk.taps):
                    acc += rows[pl.ds(walk.offset(k), n)] * w_ref[pl.ds(k, 1), c]
                for ref in b_ref:
                    acc += ref[:, c]
                tpu_epilogue.store(around, acc, out_refs, (0, pl.ds(at, n), c))

        by_chunks(walk.rows, chunk, CHUNK)


def _kernel_grad_kernel(walk, around, x_ref, g_ref, *refs):
    """One tile of time: adds ``x_k * g`` to every tap of dw, by sublanes; dw stays."""
    BC = x_ref.shape[2]
    count = len(_lanes(BC))
    refs, windows = list(refs[:-count]), refs[-count:]
    saved_ref = refs.pop(0) if around.slope_of else None
    dw_ref, *db_ref = refs
    n, s = pl.program_id(2), pl.program_id(3)
    for c, lanes in _by_lanes(BC, windows):
        walk.advance(s, rows_of(x_ref.at[0, :, c]), lanes)

    cleared(refs, (n == 0) & (s == 0))

    @pl.when(s >= walk.warm)
    def _():
        def chunk(at, n, real):
            for c, lanes in _by_lanes(BC, windows):
                rows = lanes.at[pl.ds(at, n + walk.history)]
                g = _gradient_rows(around, g_ref, saved_ref, c)(at, n).astype(jnp.float32)
                g = cut(g, real)
                by_sublanes = lambda a: a.reshape(n // SUBLANES, SUBLANES, a.shape[1]).sum(0)  # noqa: E731
                for ref in db_ref:
                    ref[0, :, c] += by_sublanes(g)
                for k in range(walk.taps):
                    tap = cut(rows[pl.ds(walk.offset(k), n)], real)
                    dw_ref[0, k, :, c] += by_sublanes(tap * g)

        by_real_chunks(walk, s, chunk, GRADIENT_CHUNK)


# --- Tiles ---


@dataclasses.dataclass(frozen=True)
class Plan:
    """The tiles of one call: `walk` along time, ``BC`` channels."""

    walk: Walk
    BC: int
    vmem: int


def _plan_of(
    problem: Problem, chip: Chip, longest: int = LONGEST, saved: bool = False
) -> Plan | None:
    """The longest tile of time and the widest of channels that fit; ``saved``: and is read too."""
    (spec, _, _), C = problem.as_convolution, problem.O
    sums = problem.operation == "conv1d_kernel_grad"
    keep = problem.operation == "conv1d" and problem.epilogue.keep

    def need(rows: int, BC: int) -> int:
        walk = Walk.of(spec, rows)
        tap_rows = SUBLANES if sums else 1
        taps = 2 * vmem_bytes(round_up(walk.taps * tap_rows, SUBLANES), BC, 4)
        blocks = (4 + 2 * (saved or keep)) * vmem_bytes(rows, BC, 4)
        return blocks + vmem_bytes(walk.window_rows, BC, 4) + taps

    for least in (min(longest, LONGEST // 4, spec.out_time), 1):
        for BC in (min(C, LANES_AT_ONCE), min(C, LANES)):
            fits = lambda rows, BC=BC: need(rows, BC) <= chip.budget  # noqa: E731
            rows = rows_that_fit(spec.out_time, longest, fits)
            if rows is not None and rows >= least:
                return Plan(Walk.of(spec, rows), BC, need(rows, BC))
    return None


# --- Launchers ---


def _forward(
    x, w, plan: Plan, out_dtype, chip: Chip, *, bias=None, saved=None, around: Around,
    interpret=False,
) -> jax.Array | tuple[jax.Array, jax.Array]:  # fmt: skip
    """``w`` is ``(K, C)`` in float32."""
    (N, _, C), walk = x.shape, plan.walk
    x_spec = pl.BlockSpec((1, walk.rows, plan.BC), lambda c, n, s: (n, walk.x_block(s), c))
    operands = [x] + [saved] * (around.slope_of is not None)
    in_specs = [x_spec] * len(operands)
    for per_channel in [w, bias.astype(jnp.float32)[None]] if around.bias else [w]:
        operands.append(per_channel)
        in_specs.append(pl.BlockSpec((per_channel.shape[0], plan.BC), lambda c, n, s: (0, c)))
    out = jax.ShapeDtypeStruct((N, walk.out_time, C), out_dtype)
    out_spec = pl.BlockSpec((1, walk.rows, plan.BC), lambda c, n, s: (n, walk.out_block(s), c))
    return pl.pallas_call(
        functools.partial(_forward_kernel, walk, around),
        grid=(pl.cdiv(C, plan.BC), N, walk.steps),
        in_specs=in_specs,
        out_specs=around.like(out_spec),
        out_shape=around.like(out),
        scratch_shapes=_windows(plan),
        compiler_params=compiler_params(chip, plan.vmem, ("parallel", "parallel", "arbitrary")),
        cost_estimate=cost(
            2 * N * walk.out_time * walk.taps * C,
            *((a.shape, a.dtype.itemsize, 1) for a in operands),
            (out.shape, out.dtype.itemsize, 1 + around.keep),
        ),
        interpret=interpret,
        name="conv1d_depthwise",
    )(*operands)


def _kernel_grad(x, g, plan: Plan, chip: Chip, *, around: Around, saved=None, interpret=False):
    """``(dw, db)``, ``(K, C)`` and ``(C,)`` in float32; db is None where it is not asked for."""
    (N, _, C), walk = x.shape, plan.walk
    parts = chip.cores if N % chip.cores == 0 else 1
    share = N // parts
    g_spec = pl.BlockSpec(
        (1, walk.rows, plan.BC), lambda p, c, n, s: (p * share + n, walk.out_block(s), c)
    )
    operands = [x, g] + [saved] * (around.slope_of is not None)
    out_specs = [pl.BlockSpec((1, walk.taps, SUBLANES, plan.BC), lambda p, c, n, s: (p, 0, 0, c))]
    out_shape = [jax.ShapeDtypeStruct((parts, walk.taps, SUBLANES, C), jnp.float32)]
    if around.bias:
        out_specs.append(pl.BlockSpec((1, SUBLANES, plan.BC), lambda p, c, n, s: (p, 0, c)))
        out_shape.append(jax.ShapeDtypeStruct((parts, SUBLANES, C), jnp.float32))
    dw, *db = pl.pallas_call(
        functools.partial(_kernel_grad_kernel, walk, around),
        grid=(parts, pl.cdiv(C, plan.BC), share, walk.steps),
        in_specs=[
            pl.BlockSpec(
                (1, walk.rows, plan.BC), lambda p, c, n, s: (p * share + n, walk.x_block(s), c)
            ),
            *[g_spec] * (len(operands) - 1),
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=_windows(plan),
        compiler_params=compiler_params(chip, plan.vmem, ("parallel", *("arbitrary",) * 3)),
        cost_estimate=cost(
            2 * N * walk.out_time * walk.taps * C,
            *((a.shape, a.dtype.itemsize, 1) for a in (*operands, *out_shape)),
        ),
        interpret=interpret,
        name="conv1d_depthwise_kernel_grad",
    )(*operands)
    dw = functools.reduce(jnp.add, dw).sum(1)
    return dw, functools.reduce(jnp.add, db[0]).sum(0) if db else None


def launch(
    problem: Problem, lhs, rhs, chip: Chip, *, longest: int = LONGEST, interpret=False, bias=None,
    saved=None, sum_bias=False,
):  # fmt: skip
    """The operation of ``problem`` with the tiles of ``chip``, at most ``longest`` steps each.

    ``bias``, ``saved`` and ``sum_bias`` are as in `tpu_matmul.launch`. Where a channel in makes
    several out, x is repeated first, and its gradient is their sum.
    """
    operation = problem.operation
    around = Around.of(problem, bias is not None or sum_bias)
    each = problem.O // problem.C
    if each > 1 and operation != "conv1d_input_grad":
        lhs = jnp.repeat(lhs, each, -1)
    plan = _plan_of(problem, chip, longest, around.slope_of is not None)
    options = dict(saved=saved, around=around, interpret=interpret)
    if operation == "conv1d_kernel_grad":
        dw, db = _kernel_grad(lhs, rhs, plan, chip, **options)
        dw = dw[:, None].astype(problem.out_dtype)
        return (dw, db) if sum_bias else dw
    w = rhs[:, 0].astype(jnp.float32)
    if operation == "conv1d_input_grad":
        w = w[::-1]
    out_dtype = problem.out_dtype
    if each == 1 or operation == "conv1d":
        return _forward(lhs, w, plan, out_dtype, chip, bias=bias, **options)
    dx = _forward(lhs, w, plan, jnp.float32, chip, **options)
    return dx.reshape(*dx.shape[:-1], problem.C, each).sum(-1).astype(out_dtype)


# --- What it declines ---


def decline(problem: Problem) -> str | None:
    if not problem.depthwise:
        return "is for one channel a group"
    if reason := decline_any(problem):
        return reason
    if _plan_of(problem, Chip.of(problem)) is None:
        return "the halo does not fit in VMEM"
    return None


def describe(problem: Problem) -> str:
    plan = _plan_of(problem, Chip.of(problem))
    return (
        f"on the vector unit, {plan.walk.rows} steps of {plan.BC} channels at once; "
        f"a halo of {plan.walk.history} steps in VMEM"
    )


KERNEL = tpu_epilogue.kernel(
    _plan_of, launch, decline=decline, describe=describe, priority=None,
    by_name=lambda problem: "by name only: by estimate XLA's sum of taps is as fast",
)  # fmt: skip
