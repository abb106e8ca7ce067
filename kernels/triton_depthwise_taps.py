"""Depthwise convolutions of many taps: what is loaded meets R outputs, or R taps, in Triton.

    forward, and the input gradient with the taps reversed
        y_(i+r) = sum over k of  w_k x_(k+i+r)    for the R outputs r of a piece, which begins at i
    kernel gradient
        dw_(k+r) = sum over i of g_i x_(i+k+r)    for the R taps r of a block, which begins at k

Both are ``sums_r += m_j x_(j+r)``, j being a tap or a step, and both do it in the same way: the R
sums of a piece stand in registers, and beside them a window of R steps of x. A step of j loads one
step of x and one m, multiplies R times, and moves the window on by one. R of those are written out
one after the other, so that the window is back in its registers after them and nothing moves: a
register has no index that is known only at run time. As in `triton_depthwise_walk` a step is one of
a residue class of time, D apart, so any dilation is the same; and different pieces, or blocks of
taps, are the rows of a tile.

``2 N T' K C`` operations each over ``2 N T' C`` elements, and so many taps that they count: K = 87
takes an H200's float32 pipes three times as long as its memory takes to move the elements of
bfloat16. So what matters is how many instructions an FMA brings with it. By the machine code
(sm_90a, R = 16, two channels a thread) the loop has 1.36 of them for an FMA in bfloat16 and 1.18 in
float32, and the kernel gradient's 1.3 and 1.2 for the 87 taps of a QuartzNet; `triton_depthwise`
has 4.3 and 3.9, and 5, for it loads and masks x anew for each tap and each 4 taps. That is an
estimate: the issue of instructions bounds both, unless something else does.

A piece reads ``R + K - 1`` steps of x; those that the rows beside it read too come from the L1.

No product is made that an output does not have: taps beyond the last are not multiplied by a zero,
nor are steps of g, for zero times NaN is NaN. Steps of x outside of the sequence are zeros.
"""

import jax
import numpy as np
import triton
import triton.language as tl

from conv_pallas.kernels import triton_compat as compat
from conv_pallas.kernels import triton_tuned as tuned
from conv_pallas.kernels.triton_activation import activate
from conv_pallas.kernels.triton_common import add_in_order
from conv_pallas.kernels.triton_depthwise_walk import decline_series
from conv_pallas.spec import ConvSpec

OUTPUTS = 16  # R of a piece
TAPS = 22  # R of a block, at most: what two channels leave of a thread's registers without spills
SHORTEST = 8  # steps in a residue class, or most of a piece's outputs are none

# --- Device functions ---
#
# ruff: noqa: RUF005 - Triton's compiler knows the sum of two tuples, not `(*a, b)`.


@triton.jit
def _zeros(COUNT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((BP, BC), tl.float32),)
    return tiles


@triton.jit
def _steps_of_x(x, t, end, columns, D, step, COUNT: tl.constexpr):
    """COUNT tiles of x, D steps apart and from step t on; zeros before the first and from `end`."""
    tiles = ()
    for i in tl.static_range(COUNT):
        # Without a sign what is negative is beyond the end: one comparison for both.
        inside = ((t + i * D).to(tl.uint32, bitcast=True) < end)[:, None]
        if columns is not None:
            inside &= columns
        tiles = tiles + (tl.load(x + i * step, inside, 0.0).to(tl.float32),)
    return tiles


@triton.jit
def _slide(
    sums, window, x, m, t, end, columns, D, x_step, m_step,
    COUNT: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """COUNT steps of j. After the R sums there may be one more, that of m alone.

    Args:
      window: R - 1 steps of x; the next is at step t and at the pointers x.
      columns: which of a tile's channels there are; None: all.
    """
    for i in tl.static_range(COUNT):
        window = window + _steps_of_x(x + i * x_step, t + i * D, end, columns, D, x_step, 1)
        # Each thread loads the m of its own channels, as a tile: a row would be exchanged between
        # warps through shared memory.
        mi = tl.load(m + i * m_step, columns, None if columns is None else 0.0).to(tl.float32)
        added = ()
        for r in tl.static_range(R):
            # One operation and not two: the compiler takes time as their square.
            added = added + (tl.fma(window[r], mi, sums[r]),)
        if len(sums) > R:
            added = added + (sums[R] + mi,)
        sums = added
        window = window[1:]
    return sums, window


@triton.jit
def conv_taps(
    x, w, bias, T, U, N, D, LOW, SERIES, PIECES, y,
    C: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, R: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y of BP pieces of R outputs each, and BC channels.

    Of the PIECES of a sample piece ``i`` is the ``i // SERIES``-th of series ``i % SERIES``. Those
    of all samples are counted through, so that no sample ends in the midst of a tile.
    """
    TILES_C: tl.constexpr = (C + BC - 1) // BC
    W_STEP: tl.constexpr = -C if REVERSE else C
    pid = tl.program_id(0)
    c = pid % TILES_C * BC + tl.arange(0, BC)
    columns = (c < C)[None, :] if C % BC else None
    first = (pid // TILES_C).to(tl.int64) * BP
    piece = (first % PIECES).to(tl.int32) + tl.arange(0, BP)
    n = first // PIECES + piece // PIECES
    piece = piece % PIECES
    u = piece // SERIES * (R * D) + piece % SERIES
    t = u - LOW
    end = tl.where(n < N, T, 0).to(tl.uint32, bitcast=True)
    step = tl.full((), D, tl.int64) * C
    px = x + (n * T + t)[:, None] * C + c[None, :]
    pw = w + tl.full((BP, 1), (K - 1) * C if REVERSE else 0, tl.int32) + c[None, :]

    sums = _zeros(R, BP, BC)
    window = _steps_of_x(px, t, end, columns, D, step, R - 1)
    px += (R - 1) * step
    t += (R - 1) * D
    for block in tl.range(0, K // R):  # noqa: B007 - Triton has no `_` of two types
        sums, window = _slide(sums, window, px, pw, t, end, columns, D, step, W_STEP, R, R)
        px += R * step
        pw += R * W_STEP
        t += R * D
    sums, window = _slide(sums, window, px, pw, t, end, columns, D, step, W_STEP, K % R, R)

    if HAS_BIAS:
        b = tl.load(bias + c, c < C, 0.0).to(tl.float32)[None, :]
    py = y + (n * U + u)[:, None] * C + c[None, :]
    for r in tl.static_range(R):
        z = sums[r] + b if HAS_BIAS else sums[r]
        inside = (u + r * D < tl.where(n < N, U, 0))[:, None]
        if columns is not None:
            inside &= columns
        tl.store(py + r * step, activate(z, ACTIVATION).to(y.dtype.element_ty), inside)


@triton.jit
def conv_taps_kernel_grad(
    x, gy, T, U, N, D, LOW, SERIES, STEPS, PIECES, PER_SPLIT, out,
    C: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, R: tl.constexpr, BP: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """dw of BP blocks of R taps each, and BC channels, summed over PER_SPLIT pieces of g.

    A piece is STEPS of a series, or what there is of them: all rows walk along the same, so that
    none multiplies beyond its end. With BIAS the sum of g follows the last tap.
    """
    TILES_C: tl.constexpr = (C + BC - 1) // BC
    TILES_K: tl.constexpr = (K + BP * R - 1) // (BP * R)
    ROWS: tl.constexpr = K + 1 if BIAS else K
    pid = tl.program_id(0)
    c = pid % TILES_C * BC + tl.arange(0, BC)
    columns = (c < C)[None, :] if C % BC else None
    pid = pid // TILES_C
    k = (pid % TILES_K * BP + tl.arange(0, BP)) * R
    split = pid // TILES_K
    end = tl.where(k < K, T, 0).to(tl.uint32, bitcast=True)
    step = tl.full((), D, tl.int64) * C

    sums = _zeros(R + 1 if BIAS else R, BP, BC)
    last = tl.minimum((split + 1) * PER_SPLIT, N * PIECES)
    for i in tl.range(split * PER_SPLIT, last):
        n = (i // PIECES).to(tl.int64)
        piece = i % PIECES
        u = piece // SERIES * (STEPS * D) + piece % SERIES
        t = u + k * D - LOW
        count = tl.minimum(tl.cdiv(tl.maximum(U - u, 0), D), STEPS)
        px = x + (n * T + t)[:, None] * C + c[None, :]
        pg = gy + (n * U + u) * C + tl.zeros((BP, 1), tl.int32) + c[None, :]
        window = _steps_of_x(px, t, end, columns, D, step, R - 1)
        px += (R - 1) * step
        t += (R - 1) * D
        for block in tl.range(0, count // R):  # noqa: B007
            sums, window = _slide(sums, window, px, pg, t, end, columns, D, step, step, R, R)
            px += R * step
            pg += R * step
            t += R * D
        # Here the window moves through the registers, which takes three times as long.
        for rest in tl.range(0, count % R):  # noqa: B007
            sums, window = _slide(sums, window, px, pg, t, end, columns, D, step, step, 1, R)
            px += step
            pg += step
            t += D
    start = out + split.to(tl.int64) * (ROWS * C) + c[None, :]
    for r in tl.static_range(R):
        tl.store(start + (k + r)[:, None] * C, sums[r], (k + r < K)[:, None] & (c < C)[None, :])
    if BIAS:
        tl.store(start + (k + K)[:, None] * C, sums[R], (k == 0)[:, None] & (c < C)[None, :])


# --- Launchers ---


def decline(spec: ConvSpec, C: int, O: int) -> str | None:
    """Why a convolution of many taps is not for these kernels, or None."""
    if triton.cdiv(spec.out_time, spec.kernel_dilation) < SHORTEST:
        return f"has fewer than {SHORTEST} steps in a residue class"
    return decline_series(spec, C, O)


def _columns(C: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(C)))


def _tuned(kernel: str, U: int, spec: ConvSpec, C: int, dtype):
    """Rows and channels of a tile, R, and warps; None: nobody measured."""
    dilation = f"dilation {spec.kernel_dilation}"
    return tuned.lookup(
        tuned.key(kernel, U, C, spec.kernel_size, np.dtype(dtype).name, dilation)
    )  # fmt: skip


def forward(
    x: jax.Array, w: jax.Array, spec: ConvSpec, *, out_dtype, transposed: bool = False,
    bias: jax.Array | None = None, activation: str | None = None,
) -> jax.Array:  # fmt: skip
    """``activation(conv(x, w) + bias)``; arguments as of `triton_depthwise.forward`."""
    N, T, C = x.shape
    K, D, U = spec.kernel_size, spec.kernel_dilation, spec.out_time
    series = min(D, U)
    pieces = lambda R: triton.cdiv(U, R * D) * series  # noqa: E731
    tile = _tuned("conv_taps", U, spec, C, x.dtype)
    if tile is None:
        # More rows read less of what others read; fewer leave no processor idle at the end.
        BC, warps = _columns(C, 64), 8
        programs = lambda warps: N * pieces(OUTPUTS) * BC / (64 * warps) * triton.cdiv(C, BC)  # noqa: E731
        while warps > 1 and programs(warps) < 8 * compat.processors():
            warps //= 2
        tile = (64 * warps // BC, BC, OUTPUTS, warps)
    BP, BC, R, warps = tile
    return compat.call(
        conv_taps, x, w,
        x if bias is None else bias,  # a pointer that is not read
        T, U, N, D, spec.padding[0], series, pieces(R),
        out=jax.ShapeDtypeStruct((N, U, C), out_dtype),
        programs=triton.cdiv(N * pieces(R), BP) * triton.cdiv(C, BC), warps=warps, stages=1,
        C=C, K=K, REVERSE=transposed, HAS_BIAS=bias is not None, ACTIVATION=activation,
        R=R, BP=BP, BC=BC,
    )  # fmt: skip


def kernel_grad(
    x: jax.Array, gy: jax.Array, spec: ConvSpec, *, out_dtype, bias: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """``dw (K, 1, C)`` of x ``(N, T, C)`` and gy ``(N, T', C)``; and db ``(C,)``, or None.

    Args:
      bias: whether db, the sum of gy over n and u in float32, is wanted.
    """
    (N, T, C), (_, U, _) = x.shape, gy.shape
    K, D = spec.kernel_size, spec.kernel_dilation
    tile = _tuned("conv_taps_kernel_grad", U, spec, C, x.dtype)
    if tile is None:
        # All taps in one program, so that memory gives g and x once, and as few beyond the last
        # tap as there can be.
        rows = min(8, triton.next_power_of_2(triton.cdiv(K, TAPS)))
        R = triton.cdiv(K, rows * triton.cdiv(K, rows * TAPS))
        BC = _columns(C, max(64, 256 // rows))
        tile = (rows, BC, R, max(1, rows * BC // 64))
    BP, BC, R, warps = tile
    tiles = triton.cdiv(K, BP * R) * triton.cdiv(C, BC)
    # Two warps for each scheduler, as many as registers allow where R is largest; more would have
    # more to add. And four pieces for each program, so that none has much more than the others.
    splits = max(1, 8 * compat.processors() // (warps * tiles))
    steps = R * max(4, triton.cdiv(N * U, 4 * splits * R))
    steps = min(steps, R * triton.cdiv(U, D * R))
    series = min(D, U)
    pieces = triton.cdiv(U, steps * D) * series
    per_split = triton.cdiv(N * pieces, splits)
    splits = triton.cdiv(N * pieces, per_split)
    partial = compat.call(
        conv_taps_kernel_grad, x, gy,
        T, U, N, D, spec.padding[0], series, steps, pieces, per_split,
        out=jax.ShapeDtypeStruct((splits, K + bias, C), np.dtype(np.float32)),
        programs=tiles * splits, warps=warps, stages=1,
        C=C, K=K, BIAS=bias, R=R, BP=BP, BC=BC,
    )  # fmt: skip
    total = add_in_order(partial, np.float32)
    return total[:K].reshape(K, 1, C).astype(out_dtype), total[K] if bias else None
