"""The dense convolution on a TPU's matrix unit, all three operations.

    y[n, u] = sum over k of  x[n, u + k*D - low] @ w[k]
    dx      = the same of g, with the taps reversed and each w[k] transposed
    dw[k]   = sum over n, u of  x[n, u + k*D - low]^T @ g[n, u]

Operations: ``2 N T K C O``. Bytes: x and y once each, ``bytes * N T (C + O)``, and w once where
all of its output channels fit; a tile of w stays in VMEM while all of x passes.

Tiling. The grid is (tile of O, n, time), time innermost and in sequence, so that the halo is
carried in VMEM (`tpu_window.py`). A long tile of time amortises the copy of the halo and the
fixed cost of a step. Inside it, some hundred rows at a time: all K windows side by side make
one ``(rows, K*C)`` matrix, so that the sum over taps happens inside the matrix unit. Channels that
leave lanes empty lie in HBM with time there: `tpu_time_in_lanes.py` has those.

The kernel gradient sums over time instead: its grid is (part of N, tile of C, tile of O, n,
time), and ``dw`` stays in VMEM in float32, as ``(O, C)`` for each tap: the matrix unit wants its
left side transposed, and so that is g, once, and not x, for each tap. Each core makes a part of
its own; the parts are added in a fixed order, so that the result is the same in every run.

Of packed sequences each output has a word with a bit for each tap, which lies along the lanes in
HBM and is turned in VMEM. What an output does not see is replaced by zeros between the window and
the matrix unit, which leaves that no more to wait for than before: of 512 channels and K=3 libtpu
0.0.50.1 schedules 579351 bundles for a step on a v5e, and 561025 without (an estimate).

Precision: bfloat16 as it is. float32 with DEFAULT is one pass with operands rounded to bfloat16,
which is what XLA does; HIGH is three passes; HIGHEST is the compiler's own float32 product.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from conv_pallas.activations import activate, times_derivative
from conv_pallas.kernels import (
    tpu_epilogue,
    tpu_estimates,
    tpu_matmul,
    tpu_time_in_lanes,
)
from conv_pallas.kernels.tpu_epilogue import Around
from conv_pallas.kernels.tpu_in_place import (
    gradient_in_place,
    in_place_kernel,
    in_place_kernel_grad,
    older_taps,
    placement,
    side_by_side,
)
from conv_pallas.kernels.tpu_matmul import (
    CHUNKS,
    add_bias_gradient,
    add_products,
    chunk_rows,
    decline_dense,
    dot,
    finish,
    gradient_chunk_rows,
    gradient_rows,
    passes_of,
    split,
)
from conv_pallas.kernels.tpu_window import (
    LANES,
    SUBLANES,
    TILE_ROWS,
    Chip,
    Walk,
    bits_of,
    by_chunks,
    by_real_chunks,
    cleared,
    compiler_params,
    cost,
    cut,
    round_up,
    rows_of,
    rows_that_fit,
    vmem_bytes,
    where_seen,
)
from conv_pallas.kernels.xla_formulations import seen_from
from conv_pallas.spec import ACTIVATIONS, OPERATIONS, ConvSpec, Epilogue, Problem
from conv_pallas.taps import flip

LONGEST = 2048  # rows of a tile of time; longer ones gain nothing

# --- Device code ---


def _forward_kernel(walk, passes, joined, masked, around, x_ref, *refs):
    """One tile of time: moves the window on, then one matmul per chunk."""
    *w_refs, window = refs
    out_refs = [w_refs.pop() for _ in range(1 + around.keep)][::-1]
    O = out_refs[0].shape[2]
    sees_ref = w_refs.pop() if masked else None
    b_ref = w_refs.pop() if around.bias else None
    saved_ref = w_refs.pop(0) if around.slope_of else None
    longest = chunk_rows(walk.rows, passes, walk.taps, window.shape[1], O)
    s = pl.program_id(2)
    walk.advance(s, gradient_rows(around, x_ref, saved_ref), window)

    @pl.when(s >= walk.warm)
    def _():
        def chunk(at, n):
            # Aligned here and by a constant below: a dynamic offset must be a whole tile.
            rows = window.at[pl.ds(at, n + walk.history)]
            taps = [rows[pl.ds(walk.offset(k), n)] for k in range(walk.taps)]
            if masked:
                bits = bits_of(sees_ref, at, n)
                taps = [where_seen(tap, bits, k) for k, tap in enumerate(taps)]
            if joined:
                w = [ref[...] for ref in w_refs]
                acc = dot(jnp.concatenate(taps, 1), w if len(w) > 1 else w[0], passes)
            else:
                acc = jnp.zeros((n, O), jnp.float32)
                for k, tap in enumerate(taps):
                    w = [ref[k] for ref in w_refs]
                    acc += dot(tap, w if len(w) > 1 else w[0], passes)
            finish(around, acc, b_ref, out_refs, at)

        by_chunks(walk.rows, chunk, longest)


def _kernel_grad_kernel(walk, passes, around, masked, mxu, x_ref, g_ref, *refs):
    """One tile of time: adds ``g^T x_k`` to every tap of dw, which stays, and g to db."""
    *refs, window = refs
    saved_ref = refs.pop(0) if around.slope_of else None
    sees_ref = refs.pop(0) if masked else None
    dw_ref, db_ref = (*refs, None)[:2]
    load = gradient_rows(around, g_ref, saved_ref)
    n, s = pl.program_id(3), pl.program_id(4)
    channels = window.shape[1], g_ref.shape[2]
    longest = gradient_chunk_rows(walk.rows, passes, walk.taps, *channels, mxu)
    walk.advance(s, rows_of(x_ref.at[0]), window)

    cleared(refs, (n == 0) & (s == 0))

    @pl.when(s >= walk.warm)
    def _():
        def chunk(at, n, real):
            g = cut(load(at, n), real)
            if around.bias:
                add_bias_gradient(db_ref, g)
            rows = window.at[pl.ds(at, n + walk.history)]
            taps = [rows[pl.ds(walk.offset(k), n)] for k in range(walk.taps)]
            if masked:  # and nobody is there from T' on
                bits = bits_of(sees_ref, at, n)
                taps = [where_seen(tap, bits, k) for k, tap in enumerate(taps)]
            else:
                taps = [cut(tap, real) for tap in taps]
            add_products(dw_ref, g.astype(window.dtype), taps, passes, mxu)

        by_real_chunks(walk, s, chunk, longest)


# --- Tiles ---


@dataclasses.dataclass(frozen=True)
class Plan:
    """The tiles of one call: `walk` along time, ``BC`` channels in, ``BO`` out."""

    walk: Walk
    BC: int
    BO: int
    vmem: int


def _channel_tiles(channels: int) -> list[int]:
    """All channels at once, else ever fewer whole lanes."""
    lanes = round_up(channels, LANES)
    return [channels, *(b for b in (2048, 1024, 512, 256, 128) if b < lanes)]


def _plan(
    spec: ConvSpec,
    C: int,
    O: int,
    sizes: tuple[int, int, int],
    passes: str,
    sums: bool,
    chip: Chip,
    longest: int,
    masked: bool = False,
) -> Plan | None:
    """The longest tile of time with the widest tile of channels that fits.

    Args:
      sizes: bytes of an element of x, of w or g, and of the output.
      sums: over time, for the kernel gradient.
      masked: whether each output has bits of the taps that it sees.
    """
    operand = 2 if passes == "bf16" else 4
    copies = 2 if passes == "bf16x3" else 1

    def need(walk: Walk, BC: int, BO: int) -> int:
        chunk = chunk_rows(walk.rows, passes, walk.taps, BC, BO)
        if sums:
            chunk = gradient_chunk_rows(walk.rows, passes, walk.taps, BC, BO, chip.mxu)
        common = 2 * vmem_bytes(walk.rows, BC, sizes[0]) + vmem_bytes(walk.window_rows, BC, operand)
        if masked:  # the bits, twice and turned; all taps, and one before it is rounded
            common += 2 * vmem_bytes(1, walk.rows, 4) + 3 * vmem_bytes(chunk, LANES, 4)
            common += walk.taps * vmem_bytes(chunk, BC, operand) + 2 * vmem_bytes(chunk, BC, 4)
        if sums:
            return (
                common
                + 2 * vmem_bytes(walk.rows, BO, sizes[1])
                + 2 * copies * vmem_bytes(chunk, BO, operand)
                + copies * vmem_bytes(chunk, max(BC, chip.mxu), operand)
                + 2 * walk.taps * vmem_bytes(BO, BC, 4)
                + vmem_bytes(BO, max(BC, chip.mxu), 4)
            )
        return (
            common
            + 2 * vmem_bytes(walk.rows, BO, sizes[2])
            + 2 * vmem_bytes(walk.taps * round_up(BC, 8), BO, operand)
            + copies * vmem_bytes(chunk, walk.taps * round_up(BC, LANES), operand)
            + 2 * vmem_bytes(chunk, BO, 4)
        )

    # A tile as long as a chunk with fewer channels beats a shorter one with all of them.
    for least in (CHUNKS[-1], 1):
        for BO in _channel_tiles(O):
            for BC in _channel_tiles(C) if sums else [C]:
                rows = rows_that_fit(
                    spec.out_time,
                    longest,
                    lambda rows, BC=BC, BO=BO: need(Walk.of(spec, rows), BC, BO) <= chip.budget,
                )
                if rows is not None and rows >= min(least, longest, spec.out_time):
                    walk = Walk.of(spec, rows)
                    return Plan(walk, BC, BO, need(walk, BC, BO))
    return None


def _plan_of(
    problem: Problem, chip: Chip, longest: int = LONGEST, saved: bool = False, masked: bool = False
) -> Plan | None:
    """The plan of one operation; ``saved``: what was saved is read along with g."""
    passes = passes_of(problem)
    sizes = [problem.lhs_dtype.itemsize, problem.rhs_dtype.itemsize, problem.out_dtype.itemsize]
    if saved:
        sizes[problem.operation == "conv1d_kernel_grad"] *= 2
    if problem.operation == "conv1d" and problem.epilogue.keep:
        sizes[2] *= 2
    sums = problem.operation == "conv1d_kernel_grad"
    return _plan(*problem.as_convolution, sizes, passes, sums, chip, longest, masked)


# --- Launchers ---


def _through_window(w, plan: Plan, passes: str, masked: bool, around: Around, operand, chip: Chip):
    """Device code that copies x into a window, and what it is launched with.

    Returns:
      The kernel; its scratch memory; steps along time, and of each which block of x and of the
      result it has; w as the kernel reads it; and how many columns of that a tile has.
    """
    walk, (taps, C, O) = plan.walk, w.shape
    joined = C % LANES == 0 or (pl.cdiv(taps * C, chip.mxu) < taps * pl.cdiv(C, chip.mxu))
    kernel = functools.partial(_forward_kernel, walk, passes, joined, masked, around)
    w = w.reshape(taps * C, O) if joined else w
    scratch = [pltpu.VMEM((walk.window_rows, C), operand)]
    return kernel, scratch, (walk.steps, walk.x_block, walk.out_block), w, plan.BO


def _in_place(x_dtype, w, plan: Plan, around: Around, mirrored: bool, chip: Chip):
    """As `_through_window`, of code that multiplies x where it arrives; bfloat16 products alone."""
    walk, (taps, C, O) = plan.walk, w.shape
    older = older_taps(walk, C, plan.BO, O, chip)
    halo = round_up(walk.halo, TILE_ROWS)
    kernel = functools.partial(in_place_kernel, walk, halo, older, mirrored, around)
    scratch = [pltpu.VMEM((2 * halo, C), jnp.bfloat16)]
    if older:
        scratch.append(pltpu.VMEM((halo + walk.rows, O), jnp.float32))
    if around.slope_of is not None or x_dtype != jnp.bfloat16:
        scratch.append(pltpu.VMEM((walk.rows, C), jnp.bfloat16))
    steps = pl.cdiv(walk.time, walk.rows)
    block = (lambda s: steps - 1 - s) if mirrored else (lambda s: s)
    w = side_by_side(w, older, mirrored) if older else w.reshape(taps * C, O)
    return kernel, scratch, (steps, block, block), w, 2 * O if older else plan.BO


def forward(
    x, w, plan: Plan, passes: str, out_dtype, chip: Chip, *, bias=None, saved=None, sees=None,
    around: Around, interpret=False,
):  # fmt: skip
    """``activation(conv(x, w) + bias)`` by the plan of a forward convolution.

    With ``around.keep`` a pair: that, and what the activation is applied to.

    Args:
      w: ``(K, C, O)``.
      bias: ``(O,)`` or None; added in float32, as the activation is applied in it.
      saved: like x; there, ``x * slope(saved)`` takes x's place.
      sees: ``(N, T')`` int32, for each output a bit for each tap, 1 where it sees it; None: all.
    """
    (N, _, C), O, walk = x.shape, w.shape[2], plan.walk
    operand, masked = jnp.bfloat16 if passes == "bf16" else jnp.float32, sees is not None
    placed = placement(walk, C, plan.BO) if passes == "bf16" and not masked else None
    if placed:
        kernel, scratch, along, w, columns = _in_place(
            x.dtype, w, plan, around, placed == "mirrored", chip
        )
    else:
        kernel, scratch, along, w, columns = _through_window(
            w, plan, passes, masked, around, operand, chip
        )
    steps, x_block, out_block = along
    w = {
        "bf16": lambda: (w.astype(jnp.bfloat16),),
        "bf16x3": lambda: split(w.astype(jnp.float32)),
        "f32": lambda: (w.astype(jnp.float32),),
    }[passes]()
    block = (*w[0].shape[:-1], columns)
    w_spec = pl.BlockSpec(block, lambda o, n, s: (*(0,) * (len(block) - 1), o))
    x_spec = pl.BlockSpec((1, walk.rows, C), lambda o, n, s: (n, x_block(s), 0))
    operands, in_specs = [x], [x_spec]
    if around.slope_of is not None:
        operands.append(saved)
        in_specs.append(x_spec)
    operands += w
    in_specs += [w_spec] * len(w)
    if around.bias:
        operands.append(bias.astype(jnp.float32).reshape(1, O))
        in_specs.append(pl.BlockSpec((1, plan.BO), lambda o, n, s: (0, o)))
    if masked:
        operands.append(_in_blocks(sees, walk))
        in_specs.append(pl.BlockSpec((1, 1, 1, walk.rows), lambda o, n, s: (n, out_block(s), 0, 0)))
    tiles, out = pl.cdiv(O, plan.BO), jax.ShapeDtypeStruct((N, walk.out_time, O), out_dtype)
    out_spec = pl.BlockSpec((1, walk.rows, plan.BO), lambda o, n, s: (n, out_block(s), o))
    times = [tiles if spec is x_spec else 1 for spec in in_specs]
    return pl.pallas_call(
        kernel,
        grid=(tiles, N, steps),
        in_specs=in_specs,
        out_specs=around.like(out_spec),
        out_shape=around.like(out),
        scratch_shapes=scratch,
        compiler_params=compiler_params(chip, plan.vmem, ("parallel", "parallel", "arbitrary")),
        cost_estimate=cost(
            2 * N * walk.out_time * walk.taps * C * O,
            *((a.shape, a.dtype.itemsize, n) for a, n in zip(operands, times, strict=True)),
            (out.shape, out.dtype.itemsize, 1 + around.keep),
        ),
        interpret=interpret,
        name="conv1d_dense",
    )(*operands)


def _in_blocks(sees, walk: Walk):
    """As blocks of the output have it, ``(N, blocks, 1, rows)``; from T' on nothing is seen."""
    blocks = pl.cdiv(walk.out_time, walk.rows)
    sees = jnp.pad(sees, [(0, 0), (0, blocks * walk.rows - walk.out_time)])
    return sees.reshape(len(sees), blocks, 1, walk.rows)


def kernel_grad(
    x, g, plan: Plan, passes: str, chip: Chip, *, saved=None, sees=None,
    around: Around, interpret=False,
):  # fmt: skip
    """``(dw, db)``, ``(K, C, O)`` and ``(O,)`` in float32, by the plan of a kernel gradient.

    db is None where ``around.bias`` is False. ``saved`` and ``sees`` are as in `forward`, and saved
    like g.
    """
    (N, _, C), O, walk = x.shape, g.shape[2], plan.walk
    parts = chip.cores if N % chip.cores == 0 else 1
    share = N // parts
    tiles = pl.cdiv(C, plan.BC), pl.cdiv(O, plan.BO)
    g_spec = pl.BlockSpec(
        (1, walk.rows, plan.BO), lambda p, c, o, n, s: (p * share + n, walk.out_block(s), o)
    )
    operands = [x, g] + [saved] * (around.slope_of is not None)
    like_g, masked = [g_spec] * (len(operands) - 1), sees is not None
    of_bits = pl.BlockSpec(
        (1, 1, 1, walk.rows), lambda p, c, o, n, s: (p * share + n, walk.out_block(s), 0, 0)
    )
    operands += [_in_blocks(sees, walk)] if masked else []
    out_specs = [pl.BlockSpec((1, walk.taps, plan.BO, plan.BC), lambda p, c, o, n, s: (p, 0, o, c))]
    out_shape = [jax.ShapeDtypeStruct((parts, walk.taps, O, C), jnp.float32)]
    if around.bias:
        # Every tile of C makes its own, so that none is written by two; the first is taken.
        out_specs.append(
            pl.BlockSpec((1, 1, SUBLANES, plan.BO), lambda p, c, o, n, s: (p, c, 0, o))
        )
        out_shape.append(jax.ShapeDtypeStruct((parts, tiles[0], SUBLANES, O), jnp.float32))
    kernel = functools.partial(_kernel_grad_kernel, walk, passes, around, masked, chip.mxu)
    scratch = walk.window_rows
    in_place = passes == "bf16" and not masked
    if in_place and gradient_in_place(walk, x.dtype, plan.BC, plan.BO, chip.mxu):
        halo = round_up(walk.halo, TILE_ROWS)
        kernel = functools.partial(in_place_kernel_grad, walk, halo, around, chip.mxu)
        scratch = 2 * halo
    dw, *db = pl.pallas_call(
        kernel,
        grid=(parts, *tiles, share, walk.steps),
        in_specs=[
            pl.BlockSpec(
                (1, walk.rows, plan.BC),
                lambda p, c, o, n, s: (p * share + n, walk.x_block(s), c),
            ),
            *like_g,
            *[of_bits] * masked,
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[
            pltpu.VMEM((scratch, plan.BC), jnp.bfloat16 if passes == "bf16" else jnp.float32)
        ],
        compiler_params=compiler_params(chip, plan.vmem, ("parallel", *("arbitrary",) * 4)),
        cost_estimate=cost(
            2 * N * walk.out_time * walk.taps * C * O,
            (x.shape, x.dtype.itemsize, tiles[1]),
            *((a.shape, a.dtype.itemsize, tiles[0]) for a in operands[1:]),
            *((a.shape, 4, 1) for a in out_shape),
        ),
        interpret=interpret,
        name="conv1d_dense_kernel_grad",
    )(*operands)
    dw = jnp.swapaxes(functools.reduce(jnp.add, dw), 1, 2)
    return dw, functools.reduce(jnp.add, db[0][:, 0]).sum(0) if db else None


# --- Of packed sequences ---


def packed(problem: Problem, x, w, bias, sees, chip: Chip | None = None, **options):
    """See `Kernel.packed`."""
    chip, around = chip or Chip.of(problem), Around.of(problem, bias is not None)
    plan, passes = _masked_plan(problem, chip, options.pop("longest", LONGEST)), passes_of(problem)
    given = dict(bias=bias, sees=sees, around=around, **options)
    return forward(x, w, plan, passes, problem.out_dtype, chip, **given)


def packed_backward(
    problem: Problem, x, w, bias, sees, gy, wanted, chip: Chip | None = None, *, longest=LONGEST,
    **options,
):  # fmt: skip
    """See `Kernel.packed_backward`."""
    chip, activation = chip or Chip.of(problem), problem.epilogue.activation
    if activation is not None:
        linear = dataclasses.replace(problem, epilogue=Epilogue(bias=bias is not None))
        z = packed(linear, x, w, bias, sees, chip, longest=longest, **options)
        saved = activate(z, activation) if ACTIVATIONS[activation] == "y" else z
        gy = times_derivative(gy, saved, activation)
    want_dx, want_dw, want_db = wanted
    want_db = want_db and bias is not None
    dx = dw = db = None
    if want_dx:
        part = problem.gradient("conv1d_input_grad")
        given = dict(sees=seen_from(sees, problem.spec.transposed()), around=Around(), **options)
        plan, turned = _masked_plan(part, chip, longest), flip(w, 1)
        dx = forward(gy, turned, plan, passes_of(part), part.out_dtype, chip, **given)
    if want_dw:
        part = problem.gradient("conv1d_kernel_grad")
        given = dict(sees=sees, around=Around(bias=want_db), **options)
        plan = _masked_plan(part, chip, longest)
        dw, db = kernel_grad(x, gy, plan, passes_of(part), chip, **given)
        dw = dw.astype(part.out_dtype)
    elif want_db:
        db = tpu_epilogue.bias_gradient(None, gy, None)
    return dx, dw, db


_masked_plan = functools.partial(_plan_of, masked=True)


launch = functools.partial(tpu_matmul.launch, _plan_of, forward, kernel_grad, longest=LONGEST)


# --- What it declines ---


def unable(problem: Problem) -> str | None:
    """Why it can't; None: it can, though another may be faster."""
    if reason := decline_dense(problem):
        return reason
    if _plan_of(problem, Chip.of(problem)) is None:
        return "this kernel and its halo do not fit in VMEM"
    return None


def decline(problem: Problem) -> str | None:
    if reason := unable(problem):
        return reason
    if tpu_time_in_lanes.decline(problem) is None:
        return "leaves channels that fill no lanes to tpu_time_in_lanes"
    return None


def decline_packed(problem: Problem) -> str | None:
    """See `Kernel.decline_packed`."""
    if reason := decline(problem):
        return reason
    chip = Chip.of(problem)
    if any(_masked_plan(problem.gradient(operation), chip) is None for operation in OPERATIONS):
        return "the bits of packed sequences do not fit in VMEM"
    return None


def packed_wins(problem: Problem) -> bool:
    """See `Kernel.packed_wins`: always, also where XLA's matmul would be the faster one.

    To write what the taps see side by side takes longer. Of 8 sequences of 4096 steps, 128 bfloat16
    channels and K=3, libtpu 0.0.50.1 schedules 118621 bundles for that and the matmul on a v5e,
    and 38630 for this kernel; of K=15 and half as many 367974 and 82265. These are estimates.
    """
    return True


def priority(problem: Problem) -> int | None:
    return (
        10
        if problem.platform == "tpu" and tpu_estimates.wins(_plan_of, problem, Chip.of(problem))
        else None
    )


def describe(problem: Problem) -> str:
    plan = _plan_of(problem, Chip.of(problem))
    chosen = "; the default, by estimate" if priority(problem) else ""
    return (
        f"{plan.walk.rows} steps, {plan.walk.taps} taps, {plan.BO} channels out at once; "
        f"a halo of {plan.walk.history} steps in VMEM; {passes_of(problem)} products{chosen}"
    )


KERNEL = tpu_epilogue.kernel(
    _plan_of, launch, decline=decline, describe=describe, priority=priority,
    packed=packed, packed_backward=packed_backward, decline_packed=decline_packed,
    packed_wins=packed_wins,
    by_name=lambda problem: "by name only: no estimate says that it is faster than XLA",
)  # fmt: skip
