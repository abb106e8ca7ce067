"""The device code of `triton_dense`: two implicit matmuls, each with what is fused around it."""

import triton
import triton.language as tl

from conv_pallas.kernels.triton_activation import activate, activate_grad
from conv_pallas.kernels.triton_common import first_output, first_tap, offsets, to_tf32, within

COUNTED = tl.constexpr(16)  # so many at most `_live` counts
MANY = tl.constexpr(17)


@triton.jit
def _live(start, apart, reach, T, count, AT_MOST: tl.constexpr):
    """Which of ``count`` tiles of x hold any of its T steps: the first, and the one after the last.

    The first begins at step ``start``, each other one ``apart`` steps after the one before; the
    last step of a tile is ``reach`` after its first. The others are padding: products with zeros,
    half of them where the field of a layer is as long as its sequence.
    """
    if AT_MOST <= COUNTED:  # a program waits for this, and a division takes longer than counting
        first = 0
        end = 0
        for i in tl.static_range(AT_MOST):
            first += (start + i * apart + reach < 0).to(tl.int32)
            end += (start + i * apart < T).to(tl.int32)
    else:
        first = tl.cdiv(tl.maximum(-(start + reach), 0), apart)
        end = tl.cdiv(tl.maximum(T - start, 0), apart)
    return first, tl.minimum(count, end)


@triton.jit
def conv_dense(
    x, w, bias, saved, sees, T, J, U, D, LOW, y, z,
    C: tl.constexpr, O: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    S: tl.constexpr, E: tl.constexpr,
    PHASES: tl.constexpr, ROW_STEP: tl.constexpr, TAP_STEP: tl.constexpr,
    TAP_INVERSE: tl.constexpr, TAPPED: tl.constexpr,
    W_ROW: tl.constexpr, W_COL: tl.constexpr, W_ROWS: tl.constexpr, W_COLS: tl.constexpr,
    CONTRACT_LAST: tl.constexpr, REVERSE: tl.constexpr,
    TMA_X: tl.constexpr, TMA_W: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    ROUND_X: tl.constexpr, ROUND_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GRAD_OF: tl.constexpr,
    BT: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One tile ``(BT, BO)`` of y. C and O are those of one group.

    w is ``(K, W_ROWS, W_COLS)``; group g starts at row ``g * W_ROW`` and column ``g * W_COL``,
    and the axis that is summed over is the last one if CONTRACT_LAST. With GRAD_OF, the name of
    an activation, x is a gradient of its result, and ``x * activation'(saved)`` is convolved.
    TAPPED says that each phase has a tap. z is None, or takes what the activation is applied to.

    ``sees (N, U)`` is None, or has for each output a bit for each tap, 1 where the output sees it;
    then S and E are 1, and not TMA_X: what is not seen is not fetched.
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
    k0 = first_tap(a, LOW, K, S, E, TAP_STEP, TAP_INVERSE)
    taps = tl.cdiv(K - k0, TAP_STEP)
    if HAS_BIAS:  # on its way while the tiles are; no compiler moves it up past the loop's barriers
        b = tl.load(bias + g * O + o, o < O, 0.0)
    if sees is not None:
        bits = tl.load(sees + n.to(tl.int64) * U + j0 + j, j0 + j < U, 0)
    acc = tl.zeros((BT, BO), tl.float32)
    earliest = (a * S + k0 * D - LOW) // E + j0 * ROW_STEP
    # D * TAP_STEP // E, which itself would overflow in places.
    apart = D // (E // TAP_STEP)
    first, end = _live(earliest, apart, (BT - 1) * ROW_STEP, T, taps, K)
    if TAPPED and PRECISION != "ieee":  # which has no such products
        # One tap is taken where all see padding alone. Of a loop that may not run
        # LLVM makes two ways to its end; of what one of them sets to zero ptxas then says that it
        # has to let each product wait for the one before (C7515), with Triton 3.6 for one.
        first = tl.minimum(first, taps - 1)
        end = tl.maximum(end, first + 1)
        tl.assume((end - first) * TILES_C > 0)
    k0 += first * TAP_STEP
    taps = end - first
    for i in tl.range(taps * TILES_C):
        k = k0 + i // TILES_C * TAP_STEP
        c0 = i % TILES_C * BC
        # An exact division, so that it does not matter how negative numbers are rounded.
        t0 = (a * S + k * D - LOW) // E + j0 * ROW_STEP
        if TMA_X:
            xb = x.load([n, t0, g * C + c0]).reshape(BT, BC)
        else:
            t = t0 + j * ROW_STEP
            start = (n.to(tl.int64) * T + t0) * (G * C) + (g * C + c0)
            where = start + offsets(j, ROW_STEP * G * C, BT)[:, None] + c[None, :]
            inside = (t >= 0)[:, None] & (t < T)[:, None] & (c0 + c < C)[None, :]
            if sees is not None:
                inside = inside & (bits >> k & 1 != 0)[:, None]
            xb = tl.load(x + where, inside, 0.0)
            if GRAD_OF is not None:
                sb = tl.load(saved + where, inside, 0.0).to(tl.float32)
                xb = activate_grad(xb.to(tl.float32), sb, GRAD_OF).to(xb.dtype)
            if ROUND_X:
                xb = to_tf32(xb)
        kw = K - 1 - k if REVERSE else k
        if CONTRACT_LAST:
            row, col = g * W_ROW + o0, g * W_COL + c0
            if TMA_W:
                wb = w.load([kw, row, col]).reshape(BO, BC).T
            else:
                start = w + (kw.to(tl.int64) * W_ROWS + row) * W_COLS + col
                inside = (o < O)[None, :] & (c0 + c < C)[:, None]
                wb = tl.load(start + offsets(o - o0, W_COLS, BO)[None, :] + c[:, None], inside, 0.0)
        else:
            row, col = g * W_ROW + c0, g * W_COL + o0
            if TMA_W:
                wb = w.load([kw, row, col]).reshape(BC, BO)
            else:
                start = w + (kw.to(tl.int64) * W_ROWS + row) * W_COLS + col
                inside = (c0 + c < C)[:, None] & (o < O)[None, :]
                wb = tl.load(
                    start + offsets(c, W_COLS, BC)[:, None] + (o - o0)[None, :], inside, 0.0
                )
        if WIDEN:
            xb, wb = xb.to(tl.float32), wb.to(tl.float32)
        if ROUND_W:
            wb = to_tf32(wb)
        acc = tl.dot(xb, wb, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += b.to(tl.float32)[None, :]
    u = a + (j0 + j) * PHASES
    # Added to a pointer before a tile of offsets is: that tile may then be of 32 bits.
    start = (n.to(tl.int64) * U + a + j0 * PHASES) * (G * O) + (g * O + o0)
    rows = offsets(j, PHASES * G * O, BT)[:, None]
    inside = (u < U)[:, None] & (o < O)[None, :]
    if z is not None:
        where = z + start + rows + (o - o0)[None, :]
        tl.store(where, acc.to(z.dtype.element_ty), inside)
    acc = activate(acc, ACTIVATION)
    where = y + start + rows + (o - o0)[None, :]
    tl.store(where, acc.to(y.dtype.element_ty), inside)


@triton.jit
def _gradient_tile(
    gy, saved, n, u1, first, U,
    O: tl.constexpr, G: tl.constexpr, PHASES: tl.constexpr, TMA_G: tl.constexpr,
    ROUND_G: tl.constexpr, GRAD_OF: tl.constexpr, BU: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """gz ``(BU, BO)`` from step u1 and, counted in one group's channels, channel ``first[1]`` on.

    ``first`` is the group and that channel.
    """
    g, o0 = first
    if TMA_G:
        gb = gy.load([n, u1, g * O + o0]).reshape(BU, BO)
    else:
        r = tl.arange(0, BU)
        o = tl.arange(0, BO)
        start = (n.to(tl.int64) * U + u1) * (G * O) + (g * O + o0)
        where = start + offsets(r, PHASES * G * O, BU)[:, None] + o[None, :]
        inside = within(u1 + r * PHASES, U, o0 + o < O)
        gb = tl.load(gy + where, inside, 0.0)
        if GRAD_OF is not None:
            sb = tl.load(saved + where, inside, 0.0).to(tl.float32)
            gb = activate_grad(gb.to(tl.float32), sb, GRAD_OF).to(gb.dtype)
        if ROUND_G:
            gb = to_tf32(gb)
    return gb


@triton.jit
def _add_products(
    dw, xs, gb, TAPS: tl.constexpr, WIDEN: tl.constexpr, ROUND_X: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dw, ``(BC, BO)`` of each of TAPS taps, plus its xs ``(BC, BU)`` times gb ``(BU, BO)``."""
    if WIDEN:
        gb = gb.to(tl.float32)
    added = ()
    for tap in tl.static_range(TAPS):
        xb = xs[tap].to(tl.float32) if WIDEN else xs[tap]
        if ROUND_X:
            xb = to_tf32(xb)
        product = tl.dot(xb, gb, dw[tap], input_precision=PRECISION)
        added = added + (product,)  # noqa: RUF005
    return added


@triton.jit
def _bits_of_block(sees, i, per_sample, begin, u0, U, N, BU: tl.constexpr):
    """What `conv_dense_kernel_grad` is told of its block i; nothing of the one after the last."""
    n = i // per_sample
    u = u0 + (begin + i % per_sample) * BU + tl.arange(0, BU)
    return tl.load(sees + n.to(tl.int64) * U + u, u < tl.where(n < N, U, 0), 0)


@triton.jit
def conv_dense_kernel_grad(
    x, gy, saved, sees, T, U, J, N, D, LOW, SPLITS, out,
    C: tl.constexpr, O: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    S: tl.constexpr, E: tl.constexpr, PHASES: tl.constexpr, PHASE_INVERSE: tl.constexpr,
    ROW_STEP: tl.constexpr, TMA_X: tl.constexpr, TMA_G: tl.constexpr, TAIL: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, ROUND_X: tl.constexpr, ROUND_G: tl.constexpr,
    BIAS: tl.constexpr, GRAD_OF: tl.constexpr, TAPS: tl.constexpr, TURN_X: tl.constexpr,
    BU: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """One tile ``(BC, BO)`` of dw[k], or ``BO`` channels of db, a part of the sum over (n, u).

    A tap is the fastest index of the grid: the K programs beside each other read the same
    tiles of gy, and tiles of x that overlap or lie near. With BIAS one more program beside them
    sums those tiles, into the row after dw's. GRAD_OF and sees are as in `conv_dense`.

    A program has TAPS taps, one after the other, and its sums for each of them. More than one,
    which take an S and E of 1, are for few channels, whose programs have more to do to fetch a tile
    than to multiply it: it fetches gy's once for all.

    With TMA_X a tile of x may reach beyond the last step that a tap meets, where gy's is zero;
    but zero times NaN is NaN. Where that can be, TAIL takes each sample's last tile out of the
    loop and masks it.

    With TURN_X a tile of x is fetched as ``(BC, BU)``. One that is turned afterwards, for matmuls
    of a warp, Triton fetches through registers, or if of float32 number by number.
    """
    TILES_O: tl.constexpr = (O + BO - 1) // BO
    TILES_C: tl.constexpr = (C + BC - 1) // BC
    PARTS: tl.constexpr = (K + TAPS - 1) // TAPS
    ITEMS: tl.constexpr = PARTS * TILES_C + (1 if BIAS else 0)
    ROWS: tl.constexpr = K * C + (1 if BIAS else 0)
    pid = tl.program_id(0)
    item = pid % ITEMS
    k = item % PARTS * TAPS
    c0 = item // PARTS * BC
    pid = pid // ITEMS
    o0 = pid % TILES_O * BO
    pid = pid // TILES_O
    g = pid % G
    split = pid // G
    r = tl.arange(0, BU)
    c = tl.arange(0, BC)
    o = tl.arange(0, BO)
    start = out + split.to(tl.int64) * ROWS * (G * O) + (g * O + o0)

    if BIAS:
        # Triton fetches ahead for products alone, unless it is told to; without it this sum, a
        # load at a time, takes longer than the products.
        STAGES: tl.constexpr = 4 if TMA_G else 1
        per_sample = tl.cdiv(J, BU)
        share = tl.cdiv(N * per_sample, SPLITS)
        last = tl.minimum((split + 1) * share, N * per_sample)
        last = tl.where(item == PARTS * TILES_C, last, split * share)
        total = tl.zeros((BU, BO), tl.float32)
        for i in tl.range(split * share, last, num_stages=STAGES):
            gb = _gradient_tile(
                gy, saved, i // per_sample, i % per_sample * BU, (g, o0), U,
                O, G, PHASES, TMA_G, False, GRAD_OF, BU, BO,
            )  # fmt: skip
            total += gb.to(tl.float32)
        row = start + tl.full((), K * C, tl.int64) * (G * O) + o
        mine = o0 + o < tl.where(item == PARTS * TILES_C, O, 0)
        tl.store(row, tl.sum(total, 0).to(out.dtype.element_ty), mine)

    # Tap k meets gy at u0, u0 + PHASES, ..., and x there at t0, t0 + ROW_STEP, ...; the next D on.
    u0 = first_output(k, D, LOW, E, PHASES, PHASE_INVERSE)
    t0 = (u0 * S + k * D - LOW) // E
    met = (u0 >= 0) & (item < PARTS * TILES_C)
    whole = J // BU if TAIL else tl.cdiv(J, BU)
    reach = (BU - 1) * ROW_STEP + (TAPS - 1) * D  # of the last of them
    begin, end = _live(t0, BU * ROW_STEP, reach, T, whole, MANY)
    per_sample = tl.maximum(end - begin, 1)
    blocks = tl.where(met, N * tl.maximum(end - begin, 0), 0)
    share = tl.cdiv(blocks, SPLITS)
    dw = ()
    for _ in tl.static_range(TAPS):
        dw = dw + (tl.zeros((BC, BO), tl.float32),)  # noqa: RUF005
    if sees is not None:
        # A block ahead of x: a load that waits for a load Triton would fetch no further ahead.
        bits = _bits_of_block(sees, split * share, per_sample, begin, u0, U, N, BU)
    for i in tl.range(split * share, tl.minimum((split + 1) * share, blocks)):
        n = i // per_sample
        j0 = (begin + i % per_sample) * BU
        t1, u1 = t0 + j0 * ROW_STEP, u0 + j0 * PHASES
        xs = ()
        for tap in tl.static_range(TAPS):
            t2 = t1 + tap * D
            if TMA_X:
                xb = x.load([n, t2, g * C + c0]).reshape(BU, BC)
            else:
                corner = x + (n.to(tl.int64) * T + t2) * (G * C) + (g * C + c0)
                steps = offsets(r, ROW_STEP * G * C, BU)
                met_before = tl.minimum(T, t2 + tl.cdiv(U - u1, PHASES) * ROW_STEP)
                if TURN_X:
                    where = corner + steps[None, :] + c[:, None]
                    inside = within(t2 + r * ROW_STEP, met_before, c0 + c < C, True)
                else:
                    where = corner + steps[:, None] + c[None, :]
                    inside = within(t2 + r * ROW_STEP, met_before, c0 + c < C)
                if sees is not None:  # the last program may have taps after the last, not stored
                    sees_tap = bits >> tl.minimum(k + tap, 31) & 1 != 0
                    inside = inside & (sees_tap[None, :] if TURN_X else sees_tap[:, None])
                xb = tl.load(where, inside, 0.0)
            xs = xs + (xb if TURN_X else xb.T,)  # noqa: RUF005
        gb = _gradient_tile(
            gy, saved, n, u1, (g, o0), U, O, G, PHASES, TMA_G, ROUND_G, GRAD_OF, BU, BO
        )
        dw = _add_products(dw, xs, gb, TAPS, WIDEN, ROUND_X, PRECISION)
        if sees is not None:
            bits = _bits_of_block(sees, i + 1, per_sample, begin, u0, U, N, BU)
    if TAIL:
        for i in tl.range(tl.where(met, tl.cdiv(N - split, SPLITS), 0)):
            n = split + i * SPLITS
            u1 = u0 + J // BU * BU
            xs = ()
            for tap in tl.static_range(TAPS):
                t2 = t0 + tap * D + J // BU * BU * ROW_STEP
                xb = x.load([n, t2, g * C + c0]).reshape(BU, BC)
                xs = xs + (tl.where((u1 + r < U)[:, None], xb, 0.0).T,)  # noqa: RUF005
            gb = _gradient_tile(
                gy, saved, n, u1, (g, o0), U, O, G, PHASES, TMA_G, ROUND_G, GRAD_OF, BU, BO
            )
            dw = _add_products(dw, xs, gb, TAPS, WIDEN, ROUND_X, PRECISION)
    # There is none of the program that sums for the bias: its c0 lies beyond C.
    for tap in tl.static_range(TAPS):
        row = (k + tap).to(tl.int64) * C + c0 + c
        where = start + (row * (G * O))[:, None] + o[None, :]
        channels = tl.where(k + tap < K, C, 0) if TAPS > 1 else C
        inside = (c0 + c < channels)[:, None] & (o0 + o < O)[None, :]
        tl.store(where, dw[tap].to(out.dtype.element_ty), inside)
