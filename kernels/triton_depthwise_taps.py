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

``2 N T' K C`` operations each over ``2 N T' C`` elements, of 2 or 4 bytes, and so many taps that
they count: K = 87 takes an H200's float32 pipes three times as long as its memory takes to move the
elements of bfloat16. So what matters is how many instructions an FMA brings with it. By the machine
code for sm_90a a loop has for one of them, itself counted,

| | here | `triton_depthwise` |
|---|---|---|
| forward and input gradient, bfloat16 | 1.3 | 4.3 |
| the same, float32 | 1.24 | 3.9 |
| kernel gradient, bfloat16, 16 or 17 taps and 9 or 11 | 1.3 and 1.5 | 5.0 |
| the same, float32 | 1.25 and 1.4 | 4.9 |

for that one loads and masks x anew for each tap, or each 4. So by estimate a third of the time is
left: it takes the issue of instructions for the bound of both. Two channels a thread are what
registers have room for.

A piece reads ``R + K - 1`` steps of x; those that the rows beside it read too come from the L1.

No product is made that an output does not have: taps beyond the last are not multiplied by a zero,
nor are steps of g, for zero times NaN is NaN. Steps of x outside of the sequence are zeros.

Of packed sequences a product is added where a bit of a word says that its output sees its tap: one
instruction more for the two channels of a thread, by the machine code for sm_90a. For an
input gradient XLA makes the words of the transposed convolution before.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from conv_pallas.kernels import triton_compat as compat
from conv_pallas.kernels import triton_tuned as tuned
from conv_pallas.kernels.triton_activation import activate
from conv_pallas.kernels.triton_common import add_in_order, to_float32
from conv_pallas.kernels.triton_depthwise_walk import decline_series
from conv_pallas.kernels.xla_formulations import seen
from conv_pallas.spec import ConvSpec

OUTPUTS = 16  # R of a piece
# R of a block, at most. 22 spilled with one of the compilers, and took it ten seconds.
TAPS = 17
# The same where a word says what an output sees: 31 taps of 16 outputs each took the compiler 25
# seconds, and of 8 it was 4.
SEEING_OUTPUTS, SEEING_TAPS = 8, 11
REGISTERS = 168  # of a thread that sums taps: three programs of 4 warps on a processor
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
def _until(end, rows, c, C: tl.constexpr):
    """A tile: ``end`` in those rows, and in the channels that there are; 0 elsewhere."""
    return tl.where(rows[:, None] & (c < C)[None, :], end, 0)


@triton.jit
def _steps_of_x(x, t, end, D, step, COUNT: tl.constexpr):
    """COUNT tiles of x, D steps apart and from step t on; zeros before the first and from `end`."""
    tiles = ()
    for i in tl.static_range(COUNT):
        # Without a sign what is negative is beyond the end: one comparison for both.
        inside = (t + i * D).to(tl.uint32, bitcast=True) < end.to(tl.uint32, bitcast=True)
        tiles = tiles + (to_float32(tl.load(x + i * step, inside, 0.0)),)
    return tiles


@triton.jit
def _words(sees, n, u, end, D, COUNT: tl.constexpr):
    """COUNT columns: what the outputs u, u + D, ... behind n see; none if those see all."""
    words = ()
    if sees is not None:
        for i in tl.static_range(COUNT):
            there = u + i * D < end
            words = words + (tl.load(sees + (n + u + i * D), there, 0)[:, None],)
    return words


@triton.jit
def _from_tap(words, k):
    """The same without taps before k."""
    shifted = ()
    for i in tl.static_range(len(words)):
        shifted = shifted + (words[i] >> k,)
    return shifted


@triton.jit
def _words_of_steps(sees, first, D, k, COUNT: tl.constexpr):
    """What COUNT outputs D steps apart see of tap k, one for each row, and those after it."""
    words = ()
    if sees is not None:
        for i in tl.static_range(COUNT):
            words = words + ((tl.load(sees + (first + i * D)) >> k)[:, None],)
    return words


@triton.jit
def _add_products(
    sums, window, m, columns, words, i: tl.constexpr, OF_STEPS: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """``sums_r + window_r m``, and one sum more, of m alone, where there is one.

    Args:
      words, i, OF_STEPS: of `_slide`, and its step.
    """
    # A tile, though its rows are the same: a row would reach the others through shared memory.
    m = to_float32(tl.load(m, columns))
    added = ()
    for r in tl.static_range(R):
        # One operation and not two: the compiler takes time as their square.
        total = tl.fma(window[r], m, sums[r])
        if len(words) > 0:
            seen = (words[i] & (1 << r) if OF_STEPS else words[r] & (1 << i)) != 0
            total = tl.where(seen, total, sums[r])
        added = added + (total,)
    if len(sums) > R:
        added = added + (sums[R] + m,)
    return added


@triton.jit
def _slide(
    sums, window, x, m, t, end, columns, D, x_step, m_step, words,
    OF_STEPS: tl.constexpr, COUNT: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """COUNT steps of j, of which the first has its R steps of x at x and t.

    Args:
      window: all of those but the last.
      columns: which of a tile's channels there are. What m is in others is nobody's concern.
      words: of each sum, and bit i says whether step i is part of it; or OF_STEPS, and bit r says
        whether it is part of sum r. None: all are.
    """
    for i in tl.static_range(R - 1, R - 1 + COUNT):
        window = window + _steps_of_x(x + i * x_step, t + i * D, end, D, x_step, 1)
        sums = _add_products(
            sums, window, m + (i - R + 1) * m_step, columns, words, i - R + 1, OF_STEPS, R
        )
        window = window[1:]
    return sums, window


@triton.jit
def conv_taps(
    x, w, bias, sees, T, U, N, D, LOW, SERIES, PIECES, y, z,
    C: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, R: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y of BP pieces of R outputs each, and BC channels.

    Of the PIECES of a sample piece ``i`` is the ``i // SERIES``-th of series ``i % SERIES``. Those
    of all samples are counted through, so that no sample ends in the midst of a tile. z is None,
    or takes what the activation is applied to.
    """
    TILES_C: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    c = pid % TILES_C * BC + tl.arange(0, BC)
    first = (pid // TILES_C).to(tl.int64) * BP
    piece = (first % PIECES).to(tl.int32) + tl.arange(0, BP)
    n = first // PIECES + piece // PIECES
    piece = piece % PIECES
    u = piece // SERIES * (R * D) + piece % SERIES
    t = tl.broadcast_to((u - LOW)[:, None], (BP, BC))
    end = _until(T, n < N, c, C)
    step = tl.full((), D, tl.int64) * C
    px = x + (n * T + u - LOW)[:, None] * C + c[None, :]
    w_step = tl.full((), -C if REVERSE else C, tl.int64)
    pw = w + tl.full((BP, 1), (K - 1) * C if REVERSE else 0, tl.int64) + c[None, :]

    columns = (c < C)[None, :]
    sums = _zeros(R, BP, BC)
    window = _steps_of_x(px, t, end, D, step, R - 1)
    words = _words(sees, n * U, u, tl.where(n < N, U, 0), D, R)
    # What the loop begins with stays, and tiles are told from it: Triton 3.6 takes those that go
    # along for another layout, and exchanges them between warps.
    for block in tl.range(0, K // R):
        i = block * R
        sums, window = _slide(
            sums, window, px + i * step, pw + i * w_step, t + i * D, end, columns, D, step, w_step,
            _from_tap(words, i), False, R, R,
        )  # fmt: skip
    i = K // R * R
    sums, window = _slide(
        sums, window, px + i * step, pw + i * w_step, t + i * D, end, columns, D, step, w_step,
        _from_tap(words, i), False, K % R, R,
    )  # fmt: skip

    if HAS_BIAS:
        b = tl.load(bias + c, c < C, 0.0).to(tl.float32)[None, :]
    where = (n * U + u)[:, None] * C + c[None, :]
    end = _until(U, n < N, c, C)
    for r in tl.static_range(R):
        total = sums[r] + b if HAS_BIAS else sums[r]
        inside = u[:, None] + r * D < end
        if z is not None:
            tl.store(z + where + r * step, total.to(z.dtype.element_ty), inside)
        total = activate(total, ACTIVATION)
        tl.store(y + where + r * step, total.to(y.dtype.element_ty), inside)


@triton.jit
def conv_taps_kernel_grad(
    x, gy, sees, T, U, N, D, LOW, SERIES, STEPS, PIECES, PER_SPLIT, out,
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
    pid = pid // TILES_C
    k = (pid % TILES_K * BP + tl.arange(0, BP)) * R
    split = pid // TILES_K
    end = _until(T, k < K, c, C)
    step = tl.full((), D, tl.int64) * C

    columns = (c < C)[None, :]
    sums = _zeros(R + 1 if BIAS else R, BP, BC)
    last = tl.minimum((split + 1) * PER_SPLIT, N * PIECES)
    for i in tl.range(split * PER_SPLIT, last):
        n = (i // PIECES).to(tl.int64)
        piece = i % PIECES
        u = piece // SERIES * (STEPS * D) + piece % SERIES
        count = tl.minimum(tl.cdiv(tl.maximum(U - u, 0), D), STEPS)
        t = tl.broadcast_to((u + k * D - LOW)[:, None], (BP, BC))
        px = x + (n * T + u + k * D - LOW)[:, None] * C + c[None, :]
        pg = gy + (n * U + u) * C + tl.zeros((BP, 1), tl.int32) + c[None, :]
        window = _steps_of_x(px, t, end, D, step, R - 1)
        for block in tl.range(0, count // R):
            j = block * R
            sums, window = _slide(
                sums, window, px + j * step, pg + j * step, t + j * D, end, columns, D, step, step,
                _words_of_steps(sees, n * U + u + j * D, D, k, R), True, R, R,
            )  # fmt: skip
        # Of fewer than R more each loads all of its x: a window that moves through the registers
        # takes as long, and more registers.
        for rest in tl.range(count - count % R, count):
            tiles = _steps_of_x(px + rest * step, t + rest * D, end, D, step, R)
            words = _words_of_steps(sees, n * U + u + rest * D, D, k, 1)
            sums = _add_products(sums, tiles, pg + rest * step, columns, words, 0, True, R)
    start = out + split.to(tl.int64) * (ROWS * C) + c[None, :]
    for r in tl.static_range(R):
        tl.store(start + (k + r)[:, None] * C, sums[r], (k + r < K)[:, None] & columns)
    if BIAS:
        tl.store(start + (k + K)[:, None] * C, sums[R], (k == 0)[:, None] & columns)


# --- Launchers ---


def decline(spec: ConvSpec, C: int, O: int) -> str | None:
    """Why a convolution of many taps is not for these kernels, or None."""
    if triton.cdiv(spec.out_time, spec.kernel_dilation) < SHORTEST:
        return f"has fewer than {SHORTEST} steps in a residue class"
    return decline_series(spec, C, O)


def _columns(C: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(C)))


def _tuned(kernel: str, U: int, spec: ConvSpec, C: int, dtype, sees):
    """Rows and channels of a tile, R, and warps; None: nobody measured."""
    sizes, how = (U, C, spec.kernel_size), [f"dilation {spec.kernel_dilation}"]
    if sees is not None:  # where what was tuned without words has no registers left
        how.append("packed")
    return tuned.lookup(tuned.key(kernel, sizes, np.dtype(dtype).name, *how))


def _turned(sees: jax.Array | None, spec: ConvSpec) -> jax.Array | None:
    """Which taps the outputs of a transposed convolution see, in one pass of XLA.

    Args:
      sees: of the convolution that it transposes, whose outputs are its steps and whose tap K-1-j
        is its tap j.
    """
    if sees is None:
        return None
    K = spec.kernel_size
    taps = (seen(sees[..., None], j, spec)[..., 0] >> (K - 1 - j) & 1 for j in range(K))
    return functools.reduce(jnp.bitwise_or, (tap << j for j, tap in enumerate(taps)))


def forward(
    x: jax.Array, w: jax.Array, spec: ConvSpec, *, out_dtype, transposed: bool = False,
    bias: jax.Array | None = None, activation: str | None = None, keep: bool = False,
    sees: jax.Array | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:  # fmt: skip
    """``activation(conv(x, w) + bias)``; arguments as of `triton_depthwise.forward`.

    Args:
      sees: as of `triton_depthwise_walk.forward`, and of at most 31 taps. If ``transposed`` of
        the convolution that is transposed: its outputs are the steps of x.
    """
    N, T, C = x.shape
    K, D, U = spec.kernel_size, spec.kernel_dilation, spec.out_time
    series = min(D, U)
    pieces = lambda R: triton.cdiv(U, R * D) * series  # noqa: E731
    tile = _tuned("conv_taps", U, spec, C, x.dtype, sees)
    if tile is None:
        R = OUTPUTS if sees is None else SEEING_OUTPUTS
        # More rows read less of what others read; fewer leave no processor idle.
        BC, warps = _columns(C, 64), 4
        programs = lambda warps: N * pieces(R) * BC / (64 * warps) * triton.cdiv(C, BC)  # noqa: E731
        while warps > 1 and programs(warps) < 8 * compat.processors():
            warps //= 2
        tile = (64 * warps // BC, BC, R, warps)
    BP, BC, R, warps = tile
    y = jax.ShapeDtypeStruct((N, U, C), out_dtype)
    # Blackwell's ptxas spills some of float16, for one more program on a processor, and any
    # chip's some of float32 beside words.
    limited = sees is not None or (compat.compute_capability() or 90) >= 100
    return compat.call(
        conv_taps, x, w,
        x if bias is None else bias,  # a pointer that is not read
        _turned(sees, spec) if transposed else sees,
        T, U, N, D, spec.padding[0], series, pieces(R),
        out=(y, y) if keep else y,
        programs=triton.cdiv(N * pieces(R), BP) * triton.cdiv(C, BC), warps=warps, stages=1,
        C=C, K=K, REVERSE=transposed, HAS_BIAS=bias is not None, ACTIVATION=activation,
        R=R, BP=BP, BC=BC, registers=REGISTERS if limited else None,
        **({} if keep else {"z": None}),
    )  # fmt: skip


def kernel_grad(
    x: jax.Array, gy: jax.Array, spec: ConvSpec, *, out_dtype, bias: bool = False,
    sees: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """``dw (K, 1, C)`` of x ``(N, T, C)`` and gy ``(N, T', C)``; and db ``(C,)``, or None.

    Args:
      bias: whether db, the sum of gy over n and u in float32, is wanted.
      sees: as of `forward`.
    """
    (N, T, C), (_, U, _) = x.shape, gy.shape
    K, D = spec.kernel_size, spec.kernel_dilation
    tile = _tuned("conv_taps_kernel_grad", U, spec, C, x.dtype, sees)
    if tile is None:
        # All taps in one program, which loads g and x once for them, and few beyond the last tap.
        most = TAPS if sees is None else SEEING_TAPS
        rows = min(8, triton.next_power_of_2(triton.cdiv(K, most)))
        R = triton.cdiv(K, rows * triton.cdiv(K, rows * most))
        BC = _columns(C, max(64, 256 // rows))
        tile = (rows, BC, R, max(1, rows * BC // 64))
    BP, BC, R, warps = tile
    tiles = triton.cdiv(K, BP * R) * triton.cdiv(C, BC)
    # Two warps for each scheduler, as each has many FMAs to go on with; more would leave more to
    # add. And pieces as long as leave least to the program that has most, its windows' first steps
    # counted as 4.
    splits = max(1, 8 * compat.processors() // (warps * tiles))
    series = min(D, U)
    pieces = lambda steps: triton.cdiv(U, steps * D) * series  # noqa: E731
    per_split = lambda steps: triton.cdiv(N * pieces(steps), splits)  # noqa: E731
    lengths = range(R, R * min(256, triton.cdiv(U, D * R)) + 1, R)
    steps = min(lengths, key=lambda steps: per_split(steps) * (steps + 4))
    splits = triton.cdiv(N * pieces(steps), per_split(steps))
    partial = compat.call(
        conv_taps_kernel_grad, x, gy, sees,
        T, U, N, D, spec.padding[0], series, steps, pieces(steps), per_split(steps),
        out=jax.ShapeDtypeStruct((splits, K + bias, C), np.dtype(np.float32)),
        programs=tiles * splits, warps=warps, stages=1, registers=REGISTERS,
        C=C, K=K, BIAS=bias, R=R, BP=BP, BC=BC,
    )  # fmt: skip
    total = add_in_order(partial, np.float32)
    return total[:K].reshape(K, 1, C).astype(out_dtype), total[K] if bias else None
