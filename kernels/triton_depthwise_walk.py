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
K = 4, SiLU and bias in bf16: forward takes 211 us at D = 1 and 222 at D = 1024, where a copy of x
takes 197; backward, three halves of a copy, 340 and 414. At D = 1024 a piece is a whole series of
16 steps, and each 1024 rows after the one before.

Backward, the K-1 steps that reach into a piece come before the walk, whose loop then has one
condition for a step, and no halo (377 and 495 us with both, walks.jsonl); the next piece's first
steps are fetched before the last ones of this one are done. With Triton 3.6 it takes 32
instructions an element in sm_90 machine code, of which SiLU's derivative is half, and an H200 has
time for 47 while it moves the 6 bytes; were gz computed anew for each tap that needs it, as a
kernel that tiles time has to, there were some 100. So the walk is what makes backward a matter of
bytes alone. 4 steps of x and gy at a time leave registers for 16 warps on a processor; 8 at a time,
or a loop of two such groups, whose registers need not be moved, save 3 to 5 % of the instructions
and are mostly slower for want of warps, by up to 15 % (walks.jsonl).

By estimate: a piece of R steps reads ``R + 2K - 2`` steps of x and ``R + K - 1`` of gy, so that for
K = 4 and R = 128 the halo is 3 % of the three passes, less what of it the L2 still has.

Forward there is time for 31 instructions an element, and loads have to be under way: by Little's
law, an estimate as well, 25 to 40 KB on each processor for an H200's bandwidth. With 4 values a
thread and 8 steps at a time seven or eight programs load 28 or 32 KiB ahead, and take some 16
instructions an element. With 8 values and tiles of 128 channels three programs load more, in fewer
instructions, and took 257 us: rows of 512 channels, one after the other in memory, are what counts.

Of packed sequences ``sees (N, T')`` says which taps each output sees, a bit for each; what the
others have there is left out of all sums, not multiplied by zero. Masks are loaded ahead as well,
a number for a row of channels, and backward those of the K-1 steps before stay for dx. In sm_90
machine code (Triton 3.9, K = 4, bf16, SiLU) they take some 3 instructions an element forward and 11
backward, not measured on a chip; nothing of it is in a plain walk.
"""

import jax
import numpy as np
import triton
import triton.language as tl

from conv_pallas.kernels import triton_compat as compat
from conv_pallas.kernels import triton_tuned as tuned
from conv_pallas.kernels.triton_activation import activate, activate_grad_of_z
from conv_pallas.kernels.triton_common import add_in_order, to_float32
from conv_pallas.spec import ConvSpec

AHEAD = 8  # steps that are loaded at a time
BACKWARD_AHEAD = 4  # of x and of gy: 8 take 176 registers, and leave room for half the programs
# Beside masks ptxas spills some for one more program, if it may. Of 32 bits x and gy take more, and
# so do all for Blackwell.
MASKED_REGISTERS, MOST_REGISTERS = 168, 255
TAPS = 8  # as many tiles as registers hold
STEPS = 2**28  # positions are counted with 32 bits, and may go some way past the ends
NOWHERE = tl.constexpr(2**30)  # a position beyond all of them

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
    """COUNT tiles, the steps t, t + D, ... of what is `real`; zeros outside."""
    tiles = ()
    for i in tl.static_range(COUNT):
        inside = real & _among(t + i * D, T)[:, None]
        tiles = tiles + (tl.load(x + start + i * step, inside, 0.0),)
    return tiles


@triton.jit
def _among(t, T):
    """Whether each is from 0 to T - 1: a negative one is beyond, seen without its sign."""
    return t.to(tl.uint32) < tl.cast(T, tl.uint32)


@triton.jit
def _masks_ahead(sees, n, u, U, D, COUNT: tl.constexpr):
    """COUNT tiles of one column, the steps u, u + D, ...; what is not there sees nothing."""
    masks = ()
    if sees is not None:
        masks = _steps_ahead(sees + n * U, u[:, None], u, U, (u < U)[:, None], D, D, COUNT)
    return masks


@triton.jit
def _has(masks, i: tl.constexpr, k: tl.constexpr):
    """Whether the outputs of step i see tap k; None: all of them do."""
    seen = None
    if len(masks) > 0:
        seen = (masks[i] & (1 << k)) != 0
    return seen


@triton.jit
def _plus(total, a, b, seen):
    """``total + a * b`` where it is ``seen``, and else total; None: zero, and everywhere."""
    added = a * b if total is None else total + a * b
    if seen is not None:
        added = tl.where(seen, added, 0.0 if total is None else total)
    return added


@triton.jit
def _z(xs, taps, b, masks, i: tl.constexpr, K: tl.constexpr):
    """z of step i, of x the K steps that it may see."""
    z = b
    for k in tl.static_range(K):
        z = _plus(z, xs[k], taps[k], _has(masks, i, k))
    return z


@triton.jit
def conv_walk(
    x, w, bias, sees, T, U, D, LOW, SERIES, GROUPS, y,
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
    b = None
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
    masks_ahead = _masks_ahead(sees, n, u, U, D, AHEAD)
    for group in tl.range(0, GROUPS):
        now, masks = ahead, masks_ahead
        t += AHEAD * D
        px += AHEAD * step
        end = tl.where(group + 1 < GROUPS, T, 0)
        ahead = _steps_ahead(x, px, t, end, real, D, step, AHEAD)
        end = tl.where(group + 1 < GROUPS, U, 0)
        masks_ahead = _masks_ahead(sees, n, u + AHEAD * D, end, D, AHEAD)
        for i in tl.static_range(AHEAD):
            xs = xs + (to_float32(now[i]),)
            z = activate(_z(xs, taps, b, masks, i, K), ACTIVATION)
            inside = real & (u + i * D < U)[:, None]
            tl.store(py + i * step, z.to(y.dtype.element_ty), inside)
            xs = xs[1:]
        u += AHEAD * D
        py += AHEAD * step


@triton.jit
def _begin(
    tile, last, PIECES, SERIES, STRIDE, FIRST, LOW, T, U, c,
    C: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Where a tile's pieces begin: sample and u, and the offsets in x and gy. STRIDE: of pieces.

    What is not there begins beyond the end of everything.
    """
    per_sample = tl.cdiv(PIECES, BR)
    n = (tile // per_sample).to(tl.int64)
    piece = tile % per_sample * BR + tl.arange(0, BR)
    u = FIRST + piece // SERIES * STRIDE + piece % SERIES
    px = (n * T + (u - LOW))[:, None] * C + c[None, :]
    pg = (n * U + u)[:, None] * C + c[None, :]
    return n, tl.where(piece < tl.where(tile < last, PIECES, 0), u, NOWHERE), px, pg


@triton.jit
def _gradient(
    xs, g, taps, b, masks, i: tl.constexpr, here, U, K: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """gz of step i, which is ``here``, of x the K steps that it may see; zero where none is."""
    g = to_float32(g)
    if ACTIVATION is not None:
        z = _z(xs, taps, b, masks, i, K)
        # Steps of x that no output has may be NaN, times which no zero is zero.
        g = tl.where(_among(here, U)[:, None], activate_grad_of_z(g, z, ACTIVATION), 0.0)
    return g


@triton.jit
def conv_walk_backward(
    x, w, bias, sees, gy, T, U, N, D, LOW, SERIES, GROUPS, FIRST, PIECES, TILES, dx, sums,
    C: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    INPUT: tl.constexpr, KERNEL: tl.constexpr, WHOLE: tl.constexpr, AHEAD: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx of TILES times BR pieces and BC channels, and what they add to dw and db.

    A piece is ``GROUPS * AHEAD`` steps. The gradients of the K-1 before reach into it, and are
    computed once more. Positions count from FIRST, which is the first of u, or of t + LOW
    where dx begins earlier. With WHOLE a piece is a whole series: nothing reaches into it, and
    after its last output come K-1 steps of dx alone.
    """
    TILES_C: tl.constexpr = (C + BC - 1) // BC
    ROWS: tl.constexpr = K + 1 if HAS_BIAS else K
    HALO: tl.constexpr = K - 1 if INPUT and not WHOLE else 0
    STRIDE = GROUPS * AHEAD * D
    pid = tl.program_id(0)
    c = pid % TILES_C * BC + tl.arange(0, BC)
    real = (c < C)[None, :]
    split = pid // TILES_C
    taps = ()
    b = None
    if INPUT or ACTIVATION is not None:
        taps = _kernel_taps(w, c, C, K, False)
    if HAS_BIAS and ACTIVATION is not None:
        b = tl.load(bias + c, c < C, 0.0).to(tl.float32)[None, :]
    step = tl.full((), D, tl.int64) * C

    dw = ()
    for _ in tl.static_range(K):
        dw = dw + (tl.zeros((BR, BC), tl.float32),)
    db = tl.zeros((BR, BC), tl.float32)
    last = tl.minimum((split + 1) * TILES, N * tl.cdiv(PIECES, BR))
    n, u, px, pg = _begin(split * TILES, last, PIECES, SERIES, STRIDE, FIRST, LOW, T, U, c, C, BR)
    x_ahead = _steps_ahead(x, px + (K - 1) * step, u - LOW + (K - 1) * D, T, real, D, step, AHEAD)
    g_ahead = _steps_ahead(gy, pg, u, U, real, D, step, AHEAD)
    masks_ahead = _masks_ahead(sees, n, u, U, D, AHEAD)
    for tile in tl.range(split * TILES, last):
        n_next, u_next, px_next, pg_next = _begin(
            tile + 1, last, PIECES, SERIES, STRIDE, FIRST, LOW, T, U, c, C, BR
        )
        pd = dx + px
        t = u - LOW
        before = _steps_ahead(x, px - HALO * step, t - HALO * D, T, real, D, step, HALO + K - 1)
        g_before = _steps_ahead(gy, pg - HALO * step, u - HALO * D, U, real, D, step, HALO)
        masks_before = _masks_ahead(sees, n, u - HALO * D, U, D, HALO)
        xs, gs, seen = (), (), masks_before  # the K-1 steps before, from where they are
        for k in tl.static_range(K - 1):
            xs = xs + (to_float32(before[k]),)
            if HALO == 0:
                gs = gs + (tl.zeros((BR, BC), tl.float32),)
                if sees is not None:
                    seen = seen + (tl.zeros((BR, 1), tl.int32),)
        for i in tl.static_range(HALO):
            xs = xs + (to_float32(before[K - 1 + i]),)
            here = u + (i - HALO) * D
            g = _gradient(xs, g_before[i], taps, b, seen, i, here, U, K, ACTIVATION)
            gs = gs + (g,)
            xs = xs[1:]
        px += (K - 1) * step
        t += (K - 1) * D
        for group in tl.range(0, GROUPS):
            x_now, g_now, masks = x_ahead, g_ahead, masks_ahead
            px += AHEAD * step
            pg += AHEAD * step
            t += AHEAD * D
            # After this group's steps come those of the next, or of the next tile.
            more = group + 1 < GROUPS
            x_ahead = _steps_ahead(
                x, tl.where(more, px, px_next + (K - 1) * step),
                tl.where(more, t, u_next - LOW + (K - 1) * D), T, real, D, step, AHEAD,
            )  # fmt: skip
            g_ahead = _steps_ahead(
                gy, tl.where(more, pg, pg_next), tl.where(more, u + AHEAD * D, u_next), U, real,
                D, step, AHEAD,
            )  # fmt: skip
            masks_ahead = _masks_ahead(
                sees, tl.where(more, n, n_next), tl.where(more, u + AHEAD * D, u_next), U, D, AHEAD
            )
            for i in tl.static_range(AHEAD):
                here = u + i * D
                xs = xs + (to_float32(x_now[i]),)
                g = _gradient(xs, g_now[i], taps, b, masks, i, here, U, K, ACTIVATION)
                if INPUT:
                    gs = gs + (g,)
                    if sees is not None:
                        seen = seen + (masks[i],)
                    d = None
                    for k in tl.static_range(K):
                        d = _plus(d, gs[K - 1 - k], taps[k], _has(seen, K - 1 - k, k))
                    inside = _among(here - LOW, T)[:, None] & real
                    tl.store(pd + i * step, d.to(dx.dtype.element_ty), inside)
                    gs = gs[1:]
                    seen = seen[1:]
                if KERNEL:
                    added = ()
                    for k in tl.static_range(K):
                        met = _has(masks, i, k)
                        if sees is None:
                            met = _among(here, U)[:, None]  # else g is zero, and x may be infinite
                        added = added + (_plus(dw[k], g, xs[k], met),)
                    dw = added
                    if HAS_BIAS:
                        db += g
                xs = xs[1:]
            u += AHEAD * D
            pd += AHEAD * step
        if WHOLE and INPUT:
            for i in tl.static_range(K - 1):
                d = _plus(None, gs[i], taps[K - 1], _has(seen, i, K - 1))
                for k in tl.static_range(i + 1, K - 1):
                    d = _plus(d, gs[K - 1 + i - k], taps[k], _has(seen, K - 1 + i - k, k))
                inside = _among(u + i * D - LOW, T)[:, None] & real
                tl.store(pd + i * step, d.to(dx.dtype.element_ty), inside)
        n, u, px, pg = n_next, u_next, px_next, pg_next
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


def _tile(
    kernel: str, N: int, T: int, spec: ConvSpec, C: int, dtype, per_thread: int, columns: int,
    steps: int, warps: int = 4,
):  # fmt: skip
    """Pieces and channels of one program, steps of a piece, and warps: tuned, or a heuristic."""
    D, K = spec.kernel_dilation, spec.kernel_size
    found = tuned.lookup(tuned.key(kernel, (T, C, K), np.dtype(dtype).name, f"dilation {D}"))
    if found is not None:
        rows, columns, steps, warps = found
    else:
        columns = min(columns, max(16, triton.next_power_of_2(C)))
        while columns > 128 and -C % columns > C // 8:  # that are not there
            columns //= 2
        rows = max(1, 32 * warps * per_thread // columns)
        # Pieces enough for every processor: rather shorter ones, and more halo.
        tiles = lambda steps: N * triton.cdiv(C, columns) * (T / (steps * rows))  # noqa: E731
        while steps > 8 and tiles(steps) < (16 if steps > 32 else 8) * compat.processors():
            steps //= 2
    return rows, columns, max(1, min(steps, triton.cdiv(T, D))), warps


def _ahead(steps: int) -> int:
    """Of a walk of so many steps."""
    return AHEAD if -steps % AHEAD < 4 else 4  # or half of the last ones are computed in vain


def forward(
    x: jax.Array, w: jax.Array, spec: ConvSpec, *, out_dtype, transposed: bool = False,
    bias: jax.Array | None = None, activation: str | None = None, sees: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """``activation(conv(x, w) + bias)``; arguments as of `triton_depthwise.forward`.

    Args:
      sees: ``(N, U)`` int32: bit k says whether that output sees tap k; None: all see all. What
        one does not see is no part of it, whatever is there. Not if ``transposed``.
    """
    assert sees is None or not transposed
    N, T, C = x.shape
    K, D, U = spec.kernel_size, spec.kernel_dilation, spec.out_time
    BR, BC, steps, warps = _tile("conv_walk", N, U, spec, C, x.dtype, 4, columns=512, steps=64)
    ahead = _ahead(steps)
    groups, series = triton.cdiv(steps, ahead), min(D, U)
    steps = groups * ahead
    pieces = triton.cdiv(U, steps * D) * series
    return compat.call(
        conv_walk, x, w,
        x if bias is None else bias,  # a pointer that is not read
        sees, T, U, D, spec.padding[0], series, groups,
        out=jax.ShapeDtypeStruct((N, U, C), out_dtype),
        programs=N * triton.cdiv(pieces, BR) * triton.cdiv(C, BC), warps=warps, stages=1,
        C=C, K=K, REVERSE=transposed, HAS_BIAS=bias is not None, ACTIVATION=activation,
        AHEAD=ahead, BR=BR, BC=BC,
    )  # fmt: skip


def backward(
    x: jax.Array, w: jax.Array, bias: jax.Array | None, gy: jax.Array, spec: ConvSpec, *,
    activation: str | None, wanted: tuple[bool, bool, bool], dx_dtype, dw_dtype,
    sees: jax.Array | None = None,
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:  # fmt: skip
    """``(dx, dw, db)``, None for what is not wanted, db in float32; ``sees`` as of `forward`."""
    (N, T, C), (_, U, _) = x.shape, gy.shape
    K, D, low = spec.kernel_size, spec.kernel_dilation, spec.padding[0]
    want_dx, want_dw, want_db = wanted
    want_db = want_db and bias is not None
    sums = want_dw or want_db
    first, end = (min(0, low), max(U, T + low)) if want_dx else (0, U)
    BR, BC, steps, warps = _tile(
        "conv_walk_backward", N, end - first, spec, C, x.dtype, 4 if K <= 4 else 2, columns=128,
        steps=128, warps=2,
    )  # fmt: skip
    whole = steps == triton.cdiv(end - first, D)
    if whole:  # the last K-1 steps of dx come after the walk
        last = max(U, T + low - (K - 1) * D) if want_dx else U
        steps = triton.cdiv(last - first, D)
    groups, series = triton.cdiv(steps, BACKWARD_AHEAD), min(D, end - first)
    steps = groups * BACKWARD_AHEAD
    pieces = series if whole else triton.cdiv(end - first, steps * D) * series
    tiles, tiles_c = N * triton.cdiv(pieces, BR), triton.cdiv(C, BC)
    # Programs for twice as many places as 128 registers a thread leave: a third round of a few
    # would take as long as a full one.
    places = max(1, 16 // warps) * compat.processors()
    splits = min(tiles, max(1, 2 * places // tiles_c), 2048 // warps)
    per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per_split)
    nothing = jax.ShapeDtypeStruct((1,), np.dtype(np.float32))  # a pointer that is not written
    much = x.dtype.itemsize > 2 or (compat.compute_capability() or 90) >= 100
    rows = K + (bias is not None)
    dx, partial = compat.call(
        conv_walk_backward, x, w, x if bias is None else bias, sees, gy,
        T, U, N, D, low, series, groups, first, pieces, per_split,
        out=(
            jax.ShapeDtypeStruct((N, T, C), dx_dtype) if want_dx else nothing,
            jax.ShapeDtypeStruct((splits, rows, C), np.dtype(np.float32)) if sums else nothing,
        ),
        programs=splits * tiles_c, warps=warps, stages=1,
        registers=None if sees is None else MOST_REGISTERS if much else MASKED_REGISTERS,
        C=C, K=K, HAS_BIAS=bias is not None, ACTIVATION=activation, INPUT=want_dx, KERNEL=sums,
        WHOLE=whole, AHEAD=BACKWARD_AHEAD, BR=BR, BC=BC,
    )  # fmt: skip
    total = add_in_order(partial, np.float32) if sums else None
    return (
        dx if want_dx else None,
        total[:K].reshape(K, 1, C).astype(dw_dtype) if want_dw else None,
        total[K] if want_db else None,
    )
