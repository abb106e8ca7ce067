"""Depthwise convolutions of few taps in one pass over memory, for any dilation, in Triton.

Time seen as ``(T/D, D)`` is D series beside each other, its residue classes, and within one the
convolution has dilation 1. A program walks along pieces of some series, step by step of D, and
keeps the K last tiles in registers: tap k is the tile of k steps ago. So each step of x is loaded
once, whatever D is; D = 1024 differs from D = 1 only in which steps are neighbours in memory, and
a tile's channels lie beside each other in both.

    z_i = sum over k of w_k x_(i+k) + b         a step of the forward pass
    gz_i = gy_i f'(z_i)
    dx_i = sum over k of w_k gz_(i-k)           its gradients
    dw_k = sum over i of gz_i x_(i+k),    db = sum over i of gz_i

Operations: ``2 N T' K C`` forward, and three times that backward, of which z takes one part.

Backward does all of these in one walk: it reads x and gy, writes dx, and computes z anew, which
costs K multiply-adds where loading it would cost a fourth pass over memory and storing it in the
forward pass a fifth. Mamba's causal_conv1d (Dao and Gu, github.com/Dao-AILab/causal-conv1d)
computes its gradient in one such kernel too, for D = 1 and SiLU, with atomic adds where partial
sums stand here, one for each program, added afterwards in a fixed order.

Measured on an H200 (benchmarks/results/nvidia-h200/goals.jsonl), N = 1, T = 16384, C = 12288,
K = 4, SiLU and bias in bf16: forward takes 212 us at D = 1 and 225 at D = 1024, where a copy of x
takes 197; backward, three halves of a copy, 373 and 488. At D = 1024 a piece is a whole series of
16 steps, in whose 230 registers two programs fit on a processor, and what each has to wait for at
the start of a piece is what is left to gain.

By estimate: a piece of R steps reads ``R + 2K - 2`` steps of x and ``R + K - 1`` of gy, so that for
K = 4 and R = 64 the halo is 5 % of the three passes, less what of it the L2 still has; for as much
the instructions grow. With SiLU they are some 36 an element in sm_90 machine code, and an H200 has
time for 47 while it moves the 6 bytes; were gz computed anew for each tap that needs it, as a
kernel that tiles time has to, there were some 100. So the walk is what makes backward a matter of
bytes alone.

Forward there is time for 31 instructions an element, and loads have to be under way: by Little's
law, an estimate as well, 25 to 40 KB on each processor for an H200's bandwidth. With 4 values a
thread and 8 steps at a time seven or eight programs load 28 or 32 KiB ahead, and take some 16
instructions an element. With 8 values and tiles of 128 channels three programs load more, in fewer
instructions, and took 257 us: rows of 512 channels, one after the other in memory, are what counts.
"""

import math

import jax
import numpy as np
import triton
import triton.language as tl

from conv_pallas.kernels import triton_compat as compat
from conv_pallas.kernels import triton_tuned as tuned
from conv_pallas.kernels.triton_activation import activate, activate_grad_of_z
from conv_pallas.kernels.triton_common import add_in_order, to_float32
from conv_pallas.kernels.triton_compat import PROCESSORS
from conv_pallas.spec import ConvSpec

AHEAD = 8  # steps that are loaded at a time
TAPS = 8  # as many tiles as registers hold
STEPS = 2**28  # positions are counted with 32 bits, and may go some way past the ends

# --- Device functions ---
#
# ruff: noqa: RUF005 - Triton's compiler knows the sum of two tuples, not `(*a, b)`.


@triton.jit
def _kernel_taps(w, c, C: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr):
    taps = ()
    for k in tl.static_range(K):
        kw = K - 1 - k if REVERSE else k
        start = w + tl.full((), kw, tl.int64) * C
        taps = taps + (tl.load(start + c, c < C, 0.0).to(tl.float32)[None, :],)
    return taps


@triton.jit
def _steps_ahead(x, start, t, T, real, D, step, COUNT: tl.constexpr):
    """COUNT tiles, the steps t, t + D, ... of the rows that are `real`; zeros outside."""
    tiles = ()
    for i in tl.static_range(COUNT):
        here = t + i * D
        inside = real & (here >= 0)[:, None] & (here < T)[:, None]
        tiles = tiles + (tl.load(x + start + i * step, inside, 0.0),)
    return tiles


@triton.jit
def conv_walk(
    x, w, bias, T, U, D, LOW, SERIES, GROUPS, y,
    C: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, AHEAD: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y of BR pieces of ``GROUPS * AHEAD`` steps each, and BC channels.

    Piece ``i`` is the ``i // SERIES``-th of series ``i % SERIES``. The steps of one group are
    loaded while those of the group before are computed: a store may be to anywhere, for all the
    compiler knows, so that it moves no load before one.
    """
    TILES_C: tl.constexpr = (C + BC - 1) // BC
    STEPS = GROUPS * AHEAD
    pid = tl.program_id(0)
    c = pid % TILES_C * BC + tl.arange(0, BC)
    pid = pid // TILES_C
    tiles = tl.cdiv(tl.cdiv(U, STEPS * D) * SERIES, BR)
    piece = pid % tiles * BR + tl.arange(0, BR)
    n = (pid // tiles).to(tl.int64)
    u = piece // SERIES * (STEPS * D) + piece % SERIES
    t = u - LOW
    real = (u < U)[:, None] & (c < C)[None, :]
    taps = _kernel_taps(w, c, C, K, REVERSE)
    if HAS_BIAS:
        b = tl.load(bias + c, c < C, 0.0).to(tl.float32)[None, :]

    step = tl.full((), D, tl.int64) * C
    px = n * T * C + t.to(tl.int64)[:, None] * C + c[None, :]
    py = y + n * U * C + u.to(tl.int64)[:, None] * C + c[None, :]
    xs = ()
    before = _steps_ahead(x, px, t, T, real, D, step, K - 1)
    for k in tl.static_range(K - 1):
        xs = xs + (to_float32(before[k]),)
    t += (K - 1) * D
    px += (K - 1) * step
    ahead = _steps_ahead(x, px, t, T, real, D, step, AHEAD)
    for group in tl.range(0, GROUPS):
        now = ahead
        t += AHEAD * D
        px += AHEAD * step
        end = tl.where(group + 1 < GROUPS, T, 0)
        ahead = _steps_ahead(x, px, t, end, real, D, step, AHEAD)
        for i in tl.static_range(AHEAD):
            xs = xs + (to_float32(now[i]),)
            z = xs[0] * taps[0] + b if HAS_BIAS else xs[0] * taps[0]
            for k in tl.static_range(1, K):
                z += xs[k] * taps[k]
            z = activate(z, ACTIVATION)
            inside = real & (u + i * D < U)[:, None]
            tl.store(py + i * step, z.to(y.dtype.element_ty), inside)
            xs = xs[1:]
        u += AHEAD * D
        py += AHEAD * step


@triton.jit
def conv_walk_backward(
    x, w, bias, gy, T, U, N, D, LOW, SERIES, GROUPS, FIRST, PIECES, TILES, dx, sums,
    C: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    INPUT: tl.constexpr, KERNEL: tl.constexpr, WHOLE: tl.constexpr, AHEAD: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx of TILES times BR pieces and BC channels, and what they add to dw and db.

    A piece is ``GROUPS * AHEAD`` steps, of which the first K-1 belong to the one before: their
    gradients reach into it. Positions count from FIRST, which is the first of u, or of t + LOW
    where dx begins earlier. With WHOLE a piece is a whole series: nothing reaches into it, and
    after its last output come K-1 steps of dx alone.
    """
    TILES_C: tl.constexpr = (C + BC - 1) // BC
    ROWS: tl.constexpr = K + 1 if HAS_BIAS else K
    HALO: tl.constexpr = 0 if WHOLE else K - 1
    STEPS = GROUPS * AHEAD - HALO
    pid = tl.program_id(0)
    c = pid % TILES_C * BC + tl.arange(0, BC)
    split = pid // TILES_C
    if INPUT or ACTIVATION is not None:
        taps = _kernel_taps(w, c, C, K, False)
    if HAS_BIAS and ACTIVATION is not None:
        b = tl.load(bias + c, c < C, 0.0).to(tl.float32)[None, :]
    step = tl.full((), D, tl.int64) * C

    dw = ()
    for _ in tl.static_range(K):
        dw = dw + (tl.zeros((BR, BC), tl.float32),)
    db = tl.zeros((BR, BC), tl.float32)
    per_sample = tl.cdiv(PIECES, BR)
    last = tl.minimum((split + 1) * TILES, N * per_sample)
    for tile in tl.range(split * TILES, last):
        n = (tile // per_sample).to(tl.int64)
        piece = tile % per_sample * BR + tl.arange(0, BR)
        real = (piece < PIECES)[:, None] & (c < C)[None, :]
        u = FIRST + piece // SERIES * (STEPS * D) + piece % SERIES - HALO * D
        t = u - LOW
        px = n * T * C + t.to(tl.int64)[:, None] * C + c[None, :]
        pg = n * U * C + u.to(tl.int64)[:, None] * C + c[None, :]
        pd = dx + px
        xs, gs = (), ()
        before = _steps_ahead(x, px, t, T, real, D, step, K - 1)
        for k in tl.static_range(K - 1):
            xs = xs + (to_float32(before[k]),)
            gs = gs + (tl.zeros((BR, BC), tl.float32),)
        px += (K - 1) * step
        t += (K - 1) * D
        x_ahead = _steps_ahead(x, px, t, T, real, D, step, AHEAD)
        g_ahead = _steps_ahead(gy, pg, u, U, real, D, step, AHEAD)
        for group in tl.range(0, GROUPS):
            x_now, g_now = x_ahead, g_ahead
            t_end = tl.where(group + 1 < GROUPS, T, 0)
            u_end = tl.where(group + 1 < GROUPS, U, 0)
            px += AHEAD * step
            pg += AHEAD * step
            t += AHEAD * D
            x_ahead = _steps_ahead(x, px, t, t_end, real, D, step, AHEAD)
            g_ahead = _steps_ahead(gy, pg, u + AHEAD * D, u_end, real, D, step, AHEAD)
            for i in tl.static_range(AHEAD):
                here = u + i * D
                halo = group * AHEAD + i < HALO
                met = ((here >= 0) & (here < U))[:, None] & real
                xs = xs + (to_float32(x_now[i]),)
                g = to_float32(g_now[i])
                if ACTIVATION is not None:
                    z = xs[0] * taps[0] + b if HAS_BIAS else xs[0] * taps[0]
                    for k in tl.static_range(1, K):
                        z += xs[k] * taps[k]
                    # Steps of x that no output has may be NaN, times which no zero is zero.
                    g = tl.where(met, activate_grad_of_z(g, z, ACTIVATION), 0.0)
                if INPUT:
                    gs = gs + (g,)
                    d = gs[K - 1] * taps[0]
                    for k in tl.static_range(1, K):
                        d += gs[K - 1 - k] * taps[k]
                    inside = (here >= LOW) & (here < tl.where(halo, LOW, T + LOW))
                    inside = inside[:, None] & real
                    tl.store(pd + i * step, d.to(dx.dtype.element_ty), inside)
                    gs = gs[1:]
                if KERNEL:
                    own = ((here >= 0) & (here < tl.where(halo, 0, U)))[:, None] & real
                    added = ()
                    for k in tl.static_range(K):
                        added = added + (tl.where(own, dw[k] + g * xs[k], dw[k]),)
                    dw = added
                    if HAS_BIAS:
                        db = tl.where(own, db + g, db)
                xs = xs[1:]
            u += AHEAD * D
            pd += AHEAD * step
        if WHOLE and INPUT:
            for i in tl.static_range(K - 1):
                d = gs[i] * taps[K - 1]
                for k in tl.static_range(i + 1, K - 1):
                    d += gs[K - 1 + i - k] * taps[k]
                inside = ((u + i * D >= LOW) & (u + i * D < T + LOW))[:, None] & real
                tl.store(pd + i * step, d.to(dx.dtype.element_ty), inside)
    if KERNEL:
        out = sums + split.to(tl.int64) * (ROWS * C) + c
        for k in tl.static_range(K):
            tl.store(out + k * C, tl.sum(dw[k], 0), c < C)
        if HAS_BIAS:
            tl.store(out + K * C, tl.sum(db, 0), c < C)


# --- Launchers ---


def decline(spec: ConvSpec, C: int, O: int) -> str | None:
    """Why a convolution can't be walked along, or None."""
    if spec.kernel_size > TAPS:
        return f"has more than {TAPS} taps"
    return decline_series(spec, C, O)


def decline_series(spec: ConvSpec, C: int, O: int) -> str | None:
    """Why a convolution is not that of dilation 1 in each residue class of time, or None."""
    if C != O:
        return "has a channel multiplier"
    if spec.stride != 1 or spec.input_dilation != 1:
        return "has a stride or a dilated input"
    if max(spec.time, spec.out_time, spec.span, *map(abs, spec.padding)) >= STEPS:
        return "counts steps with 32 bits"
    return None


def _dilation(spec: ConvSpec) -> int:
    # That of a single tap means nothing, and may be too large to count with.
    return spec.kernel_dilation if spec.kernel_size > 1 else 1


def _tile(
    kernel: str, N: int, T: int, spec: ConvSpec, C: int, dtype, per_thread: int, columns: int,
    steps: int,
):  # fmt: skip
    """Pieces and channels of one program, steps of a piece, and warps: tuned, or a heuristic."""
    D, K = _dilation(spec), spec.kernel_size
    found = tuned.lookup(tuned.key(kernel, (T, C, K), np.dtype(dtype).name, f"dilation {D}"))
    if found is not None:
        rows, columns, steps, warps = found
    else:
        warps = 4
        columns = min(columns, max(16, triton.next_power_of_2(C)))
        while columns > 128 and -C % columns > C // 8:  # that are not there
            columns //= 2
        rows = max(1, 32 * warps * per_thread // columns)
        # Pieces enough for every processor: rather shorter ones, and more halo.
        tiles = lambda steps: N * triton.cdiv(C, columns) * (T / (steps * rows))  # noqa: E731
        while steps > 8 and tiles(steps) < (16 if steps > 32 else 8) * PROCESSORS:
            steps //= 2
    return rows, columns, max(1, min(steps, triton.cdiv(T, D))), warps


def _ahead(steps: int) -> int:
    """Of a walk of so many steps."""
    return AHEAD if -steps % AHEAD < 4 else 4  # or half of the last ones are computed in vain


def forward(
    x: jax.Array, w: jax.Array, spec: ConvSpec, *, out_dtype, transposed: bool = False,
    bias: jax.Array | None = None, activation: str | None = None,
) -> jax.Array:  # fmt: skip
    """``activation(conv(x, w) + bias)``; arguments as of `triton_depthwise.forward`."""
    N, T, C = x.shape
    K, D, U = spec.kernel_size, _dilation(spec), spec.out_time
    BR, BC, steps, warps = _tile("conv_walk", N, U, spec, C, x.dtype, 4, columns=512, steps=64)
    ahead = _ahead(steps)
    groups, series = triton.cdiv(steps, ahead), min(D, U)
    steps = groups * ahead
    pieces = triton.cdiv(U, steps * D) * series
    return compat.call(
        conv_walk, x, w,
        x if bias is None else bias,  # a pointer that is not read
        T, U, D, spec.padding[0], series, groups,
        out=jax.ShapeDtypeStruct((N, U, C), out_dtype),
        programs=N * triton.cdiv(pieces, BR) * triton.cdiv(C, BC), warps=warps, stages=1,
        C=C, K=K, REVERSE=transposed, HAS_BIAS=bias is not None, ACTIVATION=activation,
        AHEAD=ahead, BR=BR, BC=BC,
    )  # fmt: skip


def backward(
    x: jax.Array, w: jax.Array, bias: jax.Array | None, gy: jax.Array, spec: ConvSpec, *,
    activation: str | None, wanted: tuple[bool, bool, bool], dx_dtype, dw_dtype,
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:  # fmt: skip
    """``(dx, dw, db)``, None for what is not wanted, db in float32."""
    (N, T, C), (_, U, _) = x.shape, gy.shape
    K, D, low = spec.kernel_size, _dilation(spec), spec.padding[0]
    want_dx, want_dw, want_db = wanted
    want_db = want_db and bias is not None
    sums = want_dw or want_db
    first, end = (min(0, low), max(U, T + low)) if want_dx else (0, U)
    few = K <= 4 and x.dtype.itemsize == gy.dtype.itemsize == 2
    BR, BC, steps, warps = _tile(
        "conv_walk_backward", N, end - first, spec, C, x.dtype, 4 if K <= 4 else 2, columns=128,
        steps=128,
    )  # fmt: skip
    whole = steps == triton.cdiv(end - first, D)
    if whole:  # the last K-1 steps of dx come after the walk
        last = max(U, T + low - (K - 1) * D) if want_dx else U
        steps, halo = triton.cdiv(last - first, D), 0
    else:
        halo = K - 1
    ahead = _ahead(steps + halo) if few else 4
    groups, series = triton.cdiv(steps + halo, ahead), min(D, end - first)
    steps = groups * ahead - halo
    pieces = series if whole else triton.cdiv(end - first, steps * D) * series
    tiles, tiles_c = N * triton.cdiv(pieces, BR), triton.cdiv(C, BC)
    splits = min(tiles, max(1, math.ceil(16 * PROCESSORS / tiles_c)), 512)
    per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per_split)
    nothing = jax.ShapeDtypeStruct((1,), np.dtype(np.float32))  # a pointer that is not written
    rows = K + (bias is not None)
    dx, partial = compat.call(
        conv_walk_backward, x, w, x if bias is None else bias, gy,
        T, U, N, D, low, series, groups, first, pieces, per_split,
        out=(
            jax.ShapeDtypeStruct((N, T, C), dx_dtype) if want_dx else nothing,
            jax.ShapeDtypeStruct((splits, rows, C), np.dtype(np.float32)) if sums else nothing,
        ),
        programs=splits * tiles_c, warps=warps, stages=1,
        C=C, K=K, HAS_BIAS=bias is not None, ACTIVATION=activation, INPUT=want_dx, KERNEL=sums,
        WHOLE=whole, AHEAD=ahead, BR=BR, BC=BC,
    )  # fmt: skip
    total = add_in_order(partial, np.float32) if sums else None
    return (
        dx if want_dx else None,
        total[:K].reshape(K, 1, C).astype(dw_dtype) if want_dw else None,
        total[K] if want_db else None,
    )
