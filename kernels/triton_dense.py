"""Dense and grouped convolution on NVIDIA GPUs: implicit matmuls in Triton.

Forward:       y[n, u, o]  = sum over k, c of  x[n, u*S + k*D - low, c] * w[k, c, o]
Input grad:    dx          = the same, with taps reversed and channels in and out exchanged
Kernel grad:   dw[k, c, o] = sum over n, u of  x[n, u*S + k*D - low, c] * g[n, u, o]

Each is a matmul of ``2 N T' K C O / G`` operations whose left side, an unfolded x, is never
written: the tile for tap k is a tile of x that starts ``k*D - low`` steps on. It may start
before time 0. The copy engine (TMA) of Hopper and newer reads zeros there, so padding costs
nothing; where it can't be used, pointers do the same with a mask.

Bytes: x, w and y once each from memory if the L2 cache does its part: the K reads of an x tile,
and the O/BO reads of a strip of x, are by programs that run at the same time (tiles of O are the
fastest index of the grid, then time). No dilation changes that, but for the rows that a tap
reaches beyond its neighbours' tiles.

Kernel grad has few outputs and a long sum. The sum over (n, u) is split among as many programs
as keep the chip busy; each writes a partial result in float32, and those are added in a fixed
order. The same input gives the same bits, always.

Groups are one more index of the grid. Strides and input dilation run by phases (see
`triton_common.Phases`): each output phase is a convolution without either.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from conv_pallas.kernels import Kernel, triton_compat
from conv_pallas.kernels import triton_tuned as tuned
from conv_pallas.kernels.triton_common import (
    PROCESSORS,
    Phases,
    activate,
    add_in_order,
    dot_precision,
    first_output,
    first_tap,
    operand_dtype,
)
from conv_pallas.kernels.triton_common import decline as decline_any
from conv_pallas.spec import ConvSpec, Problem

# --- Device functions ---


@triton.jit
def conv_dense(
    x, w, bias, T, J, U, D, LOW, y,
    C: tl.constexpr, O: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    S: tl.constexpr, E: tl.constexpr,
    PHASES: tl.constexpr, ROW_STEP: tl.constexpr, TAP_STEP: tl.constexpr,
    W_ROW: tl.constexpr, W_COL: tl.constexpr, W_ROWS: tl.constexpr, W_COLS: tl.constexpr,
    CONTRACT_LAST: tl.constexpr, REVERSE: tl.constexpr,
    TMA_X: tl.constexpr, TMA_W: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BT: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One tile ``(BT, BO)`` of y. C and O are those of one group.

    w is ``(K, W_ROWS, W_COLS)``; group g starts at row ``g * W_ROW`` and column ``g * W_COL``,
    and the axis that is summed over is the last one if CONTRACT_LAST.
    """
    TILES_O: tl.constexpr = (O + BO - 1) // BO
    TILES_C: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    o0 = pid % TILES_O * BO
    pid = pid // TILES_O
    tiles_j = tl.cdiv(J, BT)
    j0 = pid % tiles_j * BT
    pid = pid // tiles_j
    a = pid % PHASES
    pid = pid // PHASES
    g = pid % G
    n = pid // G

    j = tl.arange(0, BT)
    o = o0 + tl.arange(0, BO)
    c = tl.arange(0, BC)
    k0 = first_tap(a, D, LOW, K, S, E, TAP_STEP)
    taps = tl.cdiv(K - k0, TAP_STEP)
    acc = tl.zeros((BT, BO), tl.float32)
    for i in tl.range(taps * TILES_C):
        k = k0 + i // TILES_C * TAP_STEP
        c0 = i % TILES_C * BC
        # An exact division, so that it does not matter how negative numbers are rounded.
        t0 = (a * S + k * D - LOW) // E + j0 * ROW_STEP
        if TMA_X:
            xb = x.load([n, t0, g * C + c0]).reshape(BT, BC)
        else:
            t = t0 + j * ROW_STEP
            start = x + (n.to(tl.int64) * T + t0) * (G * C) + (g * C + c0)
            inside = (t >= 0)[:, None] & (t < T)[:, None] & (c0 + c < C)[None, :]
            xb = tl.load(start + (j * (ROW_STEP * G * C))[:, None] + c[None, :], inside, 0.0)
        kw = K - 1 - k if REVERSE else k
        if CONTRACT_LAST:
            row, col = g * W_ROW + o0, g * W_COL + c0
            if TMA_W:
                wb = w.load([kw, row, col]).reshape(BO, BC).T
            else:
                start = w + (kw.to(tl.int64) * W_ROWS + row) * W_COLS + col
                inside = (o < O)[None, :] & (c0 + c < C)[:, None]
                wb = tl.load(start + (o - o0)[None, :] * W_COLS + c[:, None], inside, 0.0)
        else:
            row, col = g * W_ROW + c0, g * W_COL + o0
            if TMA_W:
                wb = w.load([kw, row, col]).reshape(BC, BO)
            else:
                start = w + (kw.to(tl.int64) * W_ROWS + row) * W_COLS + col
                inside = (c0 + c < C)[:, None] & (o < O)[None, :]
                wb = tl.load(start + c[:, None] * W_COLS + (o - o0)[None, :], inside, 0.0)
        if WIDEN:
            xb, wb = xb.to(tl.float32), wb.to(tl.float32)
        acc = tl.dot(xb, wb, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + g * O + o, o < O, 0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    u = a + (j0 + j) * PHASES
    start = y + (n.to(tl.int64) * U + a + j0 * PHASES) * (G * O) + (g * O + o0)
    where = start + (j * (PHASES * G * O))[:, None] + (o - o0)[None, :]
    tl.store(where, acc.to(y.dtype.element_ty), (u < U)[:, None] & (o < O)[None, :])


@triton.jit
def conv_dense_kernel_grad(
    x, gy, T, U, J, N, D, LOW, BLOCKS, out,
    C: tl.constexpr, O: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    S: tl.constexpr, E: tl.constexpr, PHASES: tl.constexpr, ROW_STEP: tl.constexpr,
    TMA_X: tl.constexpr, TMA_G: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BU: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """One tile ``(BC, BO)`` of dw[k], summed over BLOCKS tiles of (n, u).

    A tap is the fastest index of the grid: the K programs beside each other read the same
    tiles of gy, and tiles of x that overlap or lie near.
    """
    TILES_O: tl.constexpr = (O + BO - 1) // BO
    TILES_C: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    k = pid % K
    pid = pid // K
    o0 = pid % TILES_O * BO
    pid = pid // TILES_O
    c0 = pid % TILES_C * BC
    pid = pid // TILES_C
    g = pid % G
    split = pid // G

    # Tap k meets gy at u0, u0 + PHASES, ..., and x there at t0, t0 + ROW_STEP, ...
    u0 = first_output(k, D, LOW, S, E, PHASES)
    t0 = (u0 * S + k * D - LOW) // E
    r = tl.arange(0, BU)
    c = tl.arange(0, BC)
    o = tl.arange(0, BO)
    per_sample = tl.cdiv(J, BU)
    first = split * BLOCKS
    last = tl.minimum(first + BLOCKS, N * per_sample)
    last = tl.where(u0 < 0, first, last)
    acc = tl.zeros((BC, BO), tl.float32)
    for i in tl.range(first, last):
        n = i // per_sample
        j0 = i % per_sample * BU
        t1, u1 = t0 + j0 * ROW_STEP, u0 + j0 * PHASES
        t, u = t1 + r * ROW_STEP, u1 + r * PHASES
        if TMA_X:
            xb = x.load([n, t1, g * C + c0]).reshape(BU, BC)
        else:
            start = x + (n.to(tl.int64) * T + t1) * (G * C) + (g * C + c0)
            rows = ((t >= 0) & (t < T) & (u < U))[:, None]
            where = start + (r * (ROW_STEP * G * C))[:, None] + c[None, :]
            xb = tl.load(where, rows & (c0 + c < C)[None, :], 0.0)
        if TMA_G:
            gb = gy.load([n, u1, g * O + o0]).reshape(BU, BO)
        else:
            start = gy + (n.to(tl.int64) * U + u1) * (G * O) + (g * O + o0)
            where = start + (r * (PHASES * G * O))[:, None] + o[None, :]
            gb = tl.load(where, (u < U)[:, None] & (o0 + o < O)[None, :], 0.0)
        if WIDEN:
            xb, gb = xb.to(tl.float32), gb.to(tl.float32)
        acc = tl.dot(xb.T, gb, acc, input_precision=PRECISION)
    start = out + ((split.to(tl.int64) * K + k) * C + c0) * (G * O) + (g * O + o0)
    where = start + (c * (G * O))[:, None] + o[None, :]
    inside = (c0 + c < C)[:, None] & (o0 + o < O)[None, :]
    tl.store(where, acc.to(out.dtype.element_ty), inside)


# --- Configuration ---


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes: ``rows`` of time, ``columns`` of channels out, ``depth`` of the inner sum.

    For the kernel gradient ``rows`` are channels in and ``depth`` is time.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def configure(
    kernel: str, rows: int, columns: int, depth: int, *, count: int, dtype: np.dtype,
    precision: str, tma: bool,
) -> Config:  # fmt: skip
    """A tuned tile, or a heuristic: as large as registers and shared memory allow.

    Args:
      rows, columns, depth: sizes of one group's matmul.
      count: how many matmuls of that size there are.
      dtype: of a factor.
    """
    tile = tuned.lookup(tuned.key(kernel, rows, columns, depth, dtype.name, precision))
    if tile is not None:
        return Config(*tile)
    itemsize = dtype.itemsize
    if itemsize == 4 and precision == "ieee":
        # No tensor cores: each thread keeps its share of both tiles in registers.
        limit = Config(64, 64, 16, 8, 2)
    elif itemsize == 4 and precision == "tf32x3":
        limit = Config(128 if tma else 64, 64, 32, 8, 2)
    elif itemsize == 4:
        limit = Config(128, 128, 32, 8, 3)
    elif tma:
        limit = Config(128, 256, 64, 8, 4)
    else:
        limit = Config(128, 128, 32, 8, 3)  # 48 KiB: also where shared memory is scarce
    floor = 16
    fit = lambda size, limit: min(limit, max(floor, triton.next_power_of_2(size)))  # noqa: E731
    bt, bo = fit(rows, limit.rows), fit(columns, limit.columns)
    bc = fit(depth, limit.depth)
    # Fewer tiles than processors leave some idle: rather smaller tiles.
    while bo > 64 and count * triton.cdiv(rows, bt) * triton.cdiv(columns, bo) < PROCESSORS:
        bo //= 2
    while bt > 64 and count * triton.cdiv(rows, bt) * triton.cdiv(columns, bo) < PROCESSORS:
        bt //= 2
    warps = 8 if bt * bo >= 128 * 128 else 4
    return Config(bt, bo, bc, warps, limit.stages)


def _tileable(array: jax.Array, offset: int) -> bool:
    """Whether the copy engine can fetch tiles of an array that start at multiples of `offset`.

    It moves 16 bytes at a time; starts at a multiple of them are what Triton asks for.
    """
    size = array.dtype.itemsize
    return array.shape[-1] * size % 16 == 0 and offset * size % 16 == 0


# --- Launchers ---


def forward(
    x: jax.Array, w: jax.Array, spec: ConvSpec, *, O: int, out_dtype, precision: str,
    transposed: bool = False, bias: jax.Array | None = None, activation: str | None = None,
    config: Config | None = None,
) -> jax.Array:  # fmt: skip
    """``activation(conv(x, w) + bias)``.

    Args:
      x: ``(N, T, C)``.
      w: ``(K, C // G, O)``; if ``transposed`` ``(K, O // G, C)``, its taps to be reversed.
      spec: of this convolution: for an input gradient the transposed one.
      O: channels out, all groups together.
      bias: ``(O,)``, or None.
      activation: of `triton_common.ACTIVATIONS`.
    """
    N, T, C = x.shape
    G, K = spec.groups, spec.kernel_size
    c, o = C // G, O // G
    phases = Phases.of(spec)
    J = triton.cdiv(spec.out_time, phases.phases)
    dtype = np.dtype(jnp.promote_types(x.dtype, w.dtype))
    tma = triton_compat.has_tma(triton_compat.compute_capability())
    config = configure(
        "conv_dense", J, o, c, count=N * G * phases.phases, dtype=dtype, precision=precision,
        tma=tma,
    )  # fmt: skip
    # The last axis of w is that of the sum in a transposed kernel. For float32 the tensor
    # cores of Hopper take nothing else, and transposing the kernel is cheap.
    contract_last, reverse = transposed, transposed
    if not transposed and dtype.itemsize == 4 and tma and precision != "ieee":
        w, contract_last = jnp.swapaxes(w, 1, 2), True
    if transposed:
        w_row, w_col = 0, c  # (K, o, G * c)
    elif contract_last:
        w_row, w_col = o, 0  # (K, G * o, c)
    else:
        w_row, w_col = 0, o  # (K, c, G * o)
    # What a tile holds past a group's end only feeds results that are not stored, but for what
    # is summed over: there the next group begins, and the engine has no mask.
    whole = G == 1 or c % config.depth == 0
    tma_x = tma and whole and phases.row_step == 1 and _tileable(x, c if G > 1 else 0)
    tma_w = tma and whole and _tileable(w, w_col if G > 1 else 0)
    block = (config.columns, config.depth) if contract_last else (config.depth, config.columns)
    rounded = dtype == np.float32 and precision == "tf32"
    tile = lambda a, block: triton_compat.Tile(a, (1, *block), rounded and a.dtype == dtype)  # noqa: E731
    programs = N * G * phases.phases * triton.cdiv(J, config.rows) * triton.cdiv(o, config.columns)
    return triton_compat.call(
        conv_dense,
        tile(x, (config.rows, config.depth)) if tma_x else x,
        tile(w, block) if tma_w else w,
        x if bias is None else bias,  # a pointer that is not read
        T, J, spec.out_time, spec.kernel_dilation, spec.padding[0],
        out=jax.ShapeDtypeStruct((N, spec.out_time, O), out_dtype),
        programs=programs, warps=config.warps, stages=config.stages,
        C=c, O=o, G=G, K=K, S=spec.stride, E=spec.input_dilation, PHASES=phases.phases,
        ROW_STEP=phases.row_step, TAP_STEP=phases.tap_step, W_ROW=w_row, W_COL=w_col,
        W_ROWS=w.shape[1], W_COLS=w.shape[2], CONTRACT_LAST=contract_last, REVERSE=reverse,
        TMA_X=tma_x, TMA_W=tma_w, PRECISION=precision, WIDEN=x.dtype != w.dtype,
        HAS_BIAS=bias is not None, ACTIVATION=activation,
        BT=config.rows, BO=config.columns, BC=config.depth,
    )  # fmt: skip


def kernel_grad(
    x: jax.Array, gy: jax.Array, spec: ConvSpec, *, out_dtype, precision: str
) -> jax.Array:
    """``dw (K, C // G, O)`` of x ``(N, T, C)`` and gy ``(N, T', O)``."""
    (N, T, C), (_, U, O) = x.shape, gy.shape
    G, K = spec.groups, spec.kernel_size
    c, o = C // G, O // G
    phases = Phases.of(spec)
    J = triton.cdiv(U, phases.phases)
    dtype = np.dtype(jnp.promote_types(x.dtype, gy.dtype))
    tma = triton_compat.has_tma(triton_compat.compute_capability())
    # The sum is split, so that there are always tiles enough.
    config = configure(
        "conv_dense_kernel_grad", c, o, J, count=PROCESSORS * K * G, dtype=dtype,
        precision=precision, tma=tma,
    )  # fmt: skip
    blocks = N * triton.cdiv(J, config.depth)
    tiles = K * G * triton.cdiv(c, config.rows) * triton.cdiv(o, config.columns)
    splits = choose_splits(tiles, blocks, K * c * O, config)
    per_split = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, per_split)
    tma_x = tma and phases.row_step == 1 and _tileable(x, c if G > 1 else 0)
    tma_g = tma and phases.phases == 1 and _tileable(gy, o if G > 1 else 0)
    rounded = dtype == np.float32 and precision == "tf32"
    tile = lambda a, block: triton_compat.Tile(a, (1, *block), rounded and a.dtype == dtype)  # noqa: E731
    partial = triton_compat.call(
        conv_dense_kernel_grad,
        tile(x, (config.depth, config.rows)) if tma_x else x,
        tile(gy, (config.depth, config.columns)) if tma_g else gy,
        T, U, J, N, spec.kernel_dilation, spec.padding[0], per_split,
        out=jax.ShapeDtypeStruct(
            (splits, K, c, O), out_dtype if splits == 1 else np.dtype(np.float32)
        ),
        programs=tiles * splits, warps=config.warps, stages=config.stages,
        C=c, O=o, G=G, K=K, S=spec.stride, E=spec.input_dilation, PHASES=phases.phases,
        ROW_STEP=phases.row_step, TMA_X=tma_x, TMA_G=tma_g, PRECISION=precision,
        WIDEN=x.dtype != gy.dtype, BU=config.depth, BC=config.rows, BO=config.columns,
    )  # fmt: skip
    return add_in_order(partial, out_dtype)


def choose_splits(tiles: int, blocks: int, outputs: int, config: Config) -> int:
    """How many partial sums take the least time, by an estimate and not by a measurement.

    More of them fill the chip, and write and read more partial results.
    """
    block_seconds = 2 * config.rows * config.columns * config.depth / 5e12  # on one processor
    partial_seconds = 2 * 4 * outputs / 4e12

    def seconds(splits: int) -> float:
        rounds = math.ceil(tiles * splits / PROCESSORS)
        return rounds * math.ceil(blocks / splits) * block_seconds + splits * partial_seconds

    return min(range(1, min(blocks, 128) + 1), key=seconds)


def run(problem: Problem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    spec, dtype = problem.spec, operand_dtype(problem)
    # Two kinds of 16 bits meet in float32, without a pass over memory: see WIDEN.
    precision = dot_precision(problem) if dtype == np.float32 else "tf32"
    common = dict(out_dtype=problem.out_dtype, precision=precision)
    if problem.operation == "conv1d_kernel_grad":
        return kernel_grad(lhs, rhs, spec, **common)
    if problem.operation == "conv1d_input_grad":
        return forward(lhs, rhs, spec.transposed(), O=problem.C, transposed=True, **common)
    return forward(lhs, rhs, spec, O=problem.O, **common)


# --- What it declines ---


def decline(problem: Problem) -> str | None:
    if problem.depthwise:
        return "one channel in each group is for triton_depthwise"
    return decline_any(problem)


def describe(problem: Problem) -> str:
    engine = "TMA" if triton_compat.has_tma(triton_compat.compute_capability()) else "pointers"
    return f"implicit matmul ({engine} where strides allow)"


KERNEL = Kernel(
    implementation="triton",
    platforms=("cuda",),
    run=run,
    decline=decline,
    describe=describe,
    # Nobody has measured it on a chip yet, so that it runs only where it is asked for.
    priority=None,
    vmappable=False,
)
