"""Depthwise convolution on NVIDIA GPUs, with a channel multiplier M = O / C, in Triton.

Forward:       y[n, u, o]  = sum over k  of  x[n, u*S + k*D - low, o // M] * w[k, 0, o]
Input grad:    dx[n, t, c] = sum over k, m  of  g[...] * w[k, 0, c*M + m], taps reversed
Kernel grad:   dw[k, 0, o] = sum over n, u  of  x[n, u*S + k*D - low, o // M] * g[n, u, o]

``2 N T' K O`` operations over ``N (T C + T' O)`` elements: K operations for each of them, far
below what any chip turns at. So only bytes count: each tensor once from memory.

Where there are few taps and neither multiplier, stride nor dilated input, `triton_depthwise_walk`
does that for any dilation. Where there are more taps, it is instructions that count, and
`triton_depthwise_taps` has a third of them by estimate. The rest is done here, by tiles of time and
channels that are loaded once for each tap, ``D`` steps on; all but one of those loads are to find
their lines in the L1 or L2, where the same program or one beside it has just put them. What is
beside depends on the halo: channels are the fastest index of the grid, which reads memory in long
runs, unless the halo of all channels together would push itself out of the L2; then time is.

Backward, where it can't be walked: one elementwise pass, left to XLA, makes gz. Computed in the
input gradient's loads, once for each tap, the activation's derivative would cost some ``20 K``
instructions an element, which by estimate is more than the pass (3 reads and writes, for which an
H200 takes as long as for 50 instructions) for K > 2. Where no input gradient is wanted, the kernel
gradient computes gz as it reads gy, but for that of many taps. It carries the bias gradient in
both cases.

Kernel grad holds K sums for each channel in registers, up to `TAPS` at a time, over a tile of
time that it walks along; g is loaded once for all of those taps. The walk is split among as many
programs as keep the chip busy; each writes float32, and those are added in a fixed order.

The products are exact and the sums float32 for every dtype and precision.
"""

import jax
import numpy as np
import triton
import triton.language as tl

from conv_pallas.activations import activate as activate_in_xla
from conv_pallas.kernels import Kernel, triton_tuned
from conv_pallas.kernels import triton_compat as compat
from conv_pallas.kernels import triton_depthwise_taps as taps
from conv_pallas.kernels import triton_depthwise_walk as walk
from conv_pallas.kernels.triton_activation import activate, activate_grad, gradient_in_xla
from conv_pallas.kernels.triton_common import (
    Phases,
    add_in_order,
    bias_grad_in_xla,
    first_output,
    first_tap,
    offsets,
)
from conv_pallas.kernels.triton_common import decline as decline_any
from conv_pallas.spec import ACTIVATIONS, ConvSpec, Problem

TAPS = 4  # of the kernel gradient that are summed side by side
L2_BYTES = 8 * 2**20  # of a halo: a small part of any chip's L2, which all programs share

# --- Device functions ---


@triton.jit
def _tap(
    acc, i, x, w, n, a, j0, o, k0, T, D, LOW,
    CI: tl.constexpr, CO: tl.constexpr, K: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
    ROW_STEP: tl.constexpr, TAP_STEP: tl.constexpr, IN_PER_OUT: tl.constexpr,
    OUT_PER_IN: tl.constexpr, REVERSE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Adds product ``i`` of the sum over taps and, in them, channels in per channel out."""
    k = k0 + i // IN_PER_OUT * TAP_STEP
    c = o // OUT_PER_IN * IN_PER_OUT + i % IN_PER_OUT
    t0 = (a * S + k * D - LOW) // E + j0 * ROW_STEP
    j = tl.arange(0, BT)
    t = t0 + j * ROW_STEP
    real = o < tl.where(k < K, CO, 0)
    start = x + (n.to(tl.int64) * T + t0) * CI
    where = start + offsets(j, ROW_STEP * CI, BT)[:, None] + c[None, :]
    xb = tl.load(where, (t >= 0)[:, None] & (t < T)[:, None] & real[None, :], 0.0)
    kw = K - 1 - k if REVERSE else k
    # A kernel has as many columns as there are channels on its wider side.
    column = c if IN_PER_OUT > 1 else o
    wb = tl.load(w + kw.to(tl.int64) * (CO * IN_PER_OUT) + column, real, 0.0)
    return acc + xb.to(tl.float32) * wb.to(tl.float32)[None, :]


@triton.jit
def conv_depthwise(
    x, w, bias, T, J, U, D, LOW, y, z,
    CI: tl.constexpr, CO: tl.constexpr, K: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
    PHASES: tl.constexpr, ROW_STEP: tl.constexpr, TAP_STEP: tl.constexpr,
    TAP_INVERSE: tl.constexpr, IN_PER_OUT: tl.constexpr, OUT_PER_IN: tl.constexpr,
    REVERSE: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    TIME_FIRST: tl.constexpr, TERMS: tl.constexpr, UNROLL: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One tile ``(BT, BC)`` of y, out of CI channels in and CO channels out.

    z is None, or takes what the activation is applied to.
    """
    TILES_O: tl.constexpr = (CO + BC - 1) // BC
    pid = tl.program_id(0)
    tiles_j = tl.cdiv(J, BT)
    if TIME_FIRST:
        j0 = pid % tiles_j * BT
        pid = pid // tiles_j
        o0 = pid % TILES_O * BC
        pid = pid // TILES_O
    else:
        o0 = pid % TILES_O * BC
        pid = pid // TILES_O
        j0 = pid % tiles_j * BT
        pid = pid // tiles_j
    a = pid % PHASES
    n = pid // PHASES

    o = o0 + tl.arange(0, BC)
    k0 = first_tap(a, LOW, K, S, E, TAP_STEP, TAP_INVERSE)
    acc = tl.zeros((BT, BC), tl.float32)
    if UNROLL:
        for i in tl.static_range(TERMS):
            acc = _tap(
                acc, i, x, w, n, a, j0, o, k0, T, D, LOW, CI, CO, K, S, E, ROW_STEP, TAP_STEP,
                IN_PER_OUT, OUT_PER_IN, REVERSE, BT,
            )  # fmt: skip
    else:
        for i in tl.range(TERMS):
            acc = _tap(
                acc, i, x, w, n, a, j0, o, k0, T, D, LOW, CI, CO, K, S, E, ROW_STEP, TAP_STEP,
                IN_PER_OUT, OUT_PER_IN, REVERSE, BT,
            )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias + o, o < CO, 0.0).to(tl.float32)[None, :]
    j = tl.arange(0, BT)
    u = a + (j0 + j) * PHASES
    start = (n.to(tl.int64) * U + a + j0 * PHASES) * CO
    where = offsets(j, PHASES * CO, BT)[:, None] + o[None, :]
    inside = (u < U)[:, None] & (o < CO)[None, :]
    if z is not None:
        tl.store(z + start + where, acc.to(z.dtype.element_ty), inside)
    acc = activate(acc, ACTIVATION)
    tl.store(y + start + where, acc.to(y.dtype.element_ty), inside)


@triton.jit
def conv_depthwise_kernel_grad(
    x, gy, saved, T, U, J, N, D, LOW, BLOCKS, out,
    C: tl.constexpr, O: tl.constexpr, K: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
    PHASES: tl.constexpr, PHASE_INVERSE: tl.constexpr, ROW_STEP: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BK: tl.constexpr, BU: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """dw of BK taps and BO channels, summed over BLOCKS tiles of (n, u).

    With BIAS the sum of gz follows the last tap.
    """
    ROWS: tl.constexpr = K + 1 if BIAS else K
    TILES_K: tl.constexpr = (K + BK - 1) // BK
    TILES_O: tl.constexpr = (O + BO - 1) // BO
    pid = tl.program_id(0)
    tile_k = pid % TILES_K
    k = tile_k * BK + tl.arange(0, BK)
    pid = pid // TILES_K
    o = pid % TILES_O * BO + tl.arange(0, BO)
    split = pid // TILES_O

    # Tap k meets gy at u0, u0 + PHASES, ..., and x there at t0, t0 + ROW_STEP, ...
    u0 = first_output(k, D, LOW, E, PHASES, PHASE_INVERSE)
    t0 = (u0 * S + k * D - LOW) // E
    taps = (k < K) & (u0 >= 0)
    r = tl.arange(0, BU)
    c = o // (O // C)
    per_sample = tl.cdiv(J, BU)
    first = split * BLOCKS
    last = tl.minimum(first + BLOCKS, N * per_sample)
    acc = tl.zeros((BK, BU, BO), tl.float32)
    db = tl.zeros((1, BU, BO), tl.float32)
    for i in tl.range(first, last):
        n = i // per_sample
        j = i % per_sample * BU + r
        t = t0[:, None] + (j * ROW_STEP)[None, :]
        u = u0[:, None] + (j * PHASES)[None, :]
        rows = taps[:, None] & (t >= 0) & (t < T) & (u < U)
        start = x + n.to(tl.int64) * T * C
        where = start + t.to(tl.int64)[:, :, None] * C + c[None, None, :]
        xb = tl.load(where, rows[:, :, None] & (o < O)[None, None, :], 0.0).to(tl.float32)
        start = gy + n.to(tl.int64) * U * O
        if PHASES == 1:
            where = start + j.to(tl.int64)[:, None] * O + o[None, :]
            inside = (j < U)[:, None] & (o < O)[None, :]
            gb = tl.load(where, inside, 0.0).to(tl.float32)[None]
            if ACTIVATION is not None:
                start = saved + n.to(tl.int64) * U * O
                where = start + j.to(tl.int64)[:, None] * O + o[None, :]
                sb = tl.load(where, inside, 0.0).to(tl.float32)[None]
                gb = activate_grad(gb, sb, ACTIVATION)
        else:
            where = start + u.to(tl.int64)[:, :, None] * O + o[None, None, :]
            inside = (taps[:, None] & (u < U))[:, :, None] & (o < O)[None, None, :]
            gb = tl.load(where, inside, 0.0).to(tl.float32)
        acc += xb * gb
        if BIAS:
            db += gb
    start = out + split.to(tl.int64) * ROWS * O
    where = start + k.to(tl.int64)[:, None] * O + o[None, :]
    total = tl.sum(acc, 1).to(out.dtype.element_ty)
    tl.store(where, total, (k < K)[:, None] & (o < O)[None, :])
    if BIAS:
        row = start + tl.full((), K, tl.int64) * O + o
        mine = o < tl.where(tile_k == 0, O, 0)
        tl.store(row, tl.sum(tl.sum(db, 1), 0).to(out.dtype.element_ty), mine)


# --- Launchers ---


def forward(
    x: jax.Array, w: jax.Array, spec: ConvSpec, *, O: int, out_dtype, transposed: bool = False,
    bias: jax.Array | None = None, activation: str | None = None, keep: bool = False,
    sees: jax.Array | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:  # fmt: skip
    """``activation(conv(x, w) + bias)``.

    Args:
      x: ``(N, T, C)``; w: ``(K, 1, max(C, O))``.
      spec: of this convolution: for an input gradient the transposed one.
      O: channels out; a multiple of C, or if ``transposed`` (its taps to be reversed) C of it.
      bias, activation, keep: as in `triton_dense.forward`; what is walked keeps nothing.
      sees: as in `triton_depthwise_taps.forward`, of what `packed` takes; None: all.
    """
    N, T, C = x.shape
    common = dict(
        out_dtype=out_dtype, transposed=transposed, bias=bias, activation=activation, sees=sees
    )  # fmt: skip
    if walk.decline(spec, C, O) is None:
        return walk.forward(x, w, spec, **common)
    if taps.decline(spec, C, O) is None:
        return taps.forward(x, w, spec, keep=keep, **common)
    K, phases = spec.kernel_size, Phases.of(spec)
    J = triton.cdiv(spec.out_time, phases.phases)
    in_per_out = C // O if transposed else 1
    terms = triton.cdiv(K, phases.tap_step) * in_per_out
    unroll = terms <= 8
    # What is loaded for all of many terms at once takes more registers than there are.
    BT, BC = 16 if unroll and terms > 4 else 32, max(16, min(128, triton.next_power_of_2(O)))
    halo = (K - 1) * spec.kernel_dilation // spec.input_dilation * C * x.dtype.itemsize
    y = jax.ShapeDtypeStruct((N, spec.out_time, O), out_dtype)
    return compat.call(
        conv_depthwise, x, w,
        x if bias is None else bias,  # a pointer that is not read
        T, J, spec.out_time, spec.kernel_dilation, spec.padding[0],
        out=(y, y) if keep else y,
        programs=N * phases.phases * triton.cdiv(J, BT) * triton.cdiv(O, BC), warps=4, stages=2,
        CI=C, CO=O, K=K, S=spec.stride, E=spec.input_dilation, PHASES=phases.phases,
        ROW_STEP=phases.row_step, TAP_STEP=phases.tap_step, TAP_INVERSE=phases.tap_inverse,
        IN_PER_OUT=in_per_out,
        OUT_PER_IN=1 if transposed else O // C, REVERSE=transposed,
        HAS_BIAS=bias is not None, ACTIVATION=activation, TIME_FIRST=halo > L2_BYTES,
        TERMS=terms, UNROLL=unroll, BT=BT, BC=BC, **({} if keep else {"z": None}),
    )  # fmt: skip


def kernel_grad(
    x: jax.Array, gy: jax.Array, spec: ConvSpec, *, out_dtype, bias: bool = False,
    saved: jax.Array | None = None, activation: str | None = None, sees: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """``dw (K, 1, O)`` of x ``(N, T, C)`` and gy ``(N, T', O)``; and db ``(O,)``, or None.

    Args:
      bias: whether db, the sum of gz over n and u in float32, is wanted; not if `Phases` are
        more than one or the input is dilated.
      saved, activation: with them ``gz = gy * activation'``, else gz is gy; not with phases.
      sees: as of `forward`, of many taps.
    """
    (N, T, C), (_, U, O) = x.shape, gy.shape
    if saved is None and taps.decline(spec, C, O) is None:
        return taps.kernel_grad(x, gy, spec, out_dtype=out_dtype, bias=bias, sees=sees)
    K, phases = spec.kernel_size, Phases.of(spec)
    J = triton.cdiv(U, phases.phases)
    BK = min(TAPS, triton.next_power_of_2(K))
    # With a multiplier the loads of x are narrower, and so more.
    rows = 64 if C == O else 32
    BU, BO = rows // BK, max(16, min(128, triton.next_power_of_2(O)))
    blocks = N * triton.cdiv(J, BU)
    tiles = triton.cdiv(K, BK) * triton.cdiv(O, BO)
    splits = min(blocks, triton.cdiv(8 * compat.processors(), tiles), 256)
    per_split = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, per_split)
    narrow = splits == 1 and not bias
    partial = compat.call(
        conv_depthwise_kernel_grad, x, gy,
        gy if saved is None else saved,  # a pointer that is not read
        T, U, J, N, spec.kernel_dilation, spec.padding[0], per_split,
        out=jax.ShapeDtypeStruct(
            (splits, K + bias, O), out_dtype if narrow else np.dtype(np.float32)
        ),
        programs=tiles * splits, warps=4, stages=2,
        C=C, O=O, K=K, S=spec.stride, E=spec.input_dilation, PHASES=phases.phases,
        PHASE_INVERSE=phases.phase_inverse, ROW_STEP=phases.row_step, BIAS=bias,
        ACTIVATION=activation, BK=BK, BU=BU, BO=BO,
    )  # fmt: skip
    total = add_in_order(partial, out_dtype if narrow else np.float32)
    return total[:K].reshape(K, 1, O).astype(out_dtype), total[K] if bias else None


def run(problem: Problem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    (spec, _, O), out_dtype = problem.as_convolution, problem.out_dtype
    if problem.operation == "conv1d_kernel_grad":
        if _walked(problem):
            wanted = (False, True, False)
            return walk.backward(
                lhs, lhs, None, rhs, spec, activation=None, wanted=wanted, dx_dtype=None,
                dw_dtype=out_dtype,
            )[1]  # fmt: skip
        return kernel_grad(lhs, rhs, spec, out_dtype=out_dtype)[0]
    transposed = problem.operation == "conv1d_input_grad"
    return forward(lhs, rhs, spec, O=O, out_dtype=out_dtype, transposed=transposed)


def fused(problem: Problem, x: jax.Array, w: jax.Array, bias: jax.Array | None) -> jax.Array:
    return forward(
        x, w, problem.spec, O=problem.O, out_dtype=problem.out_dtype, bias=bias,
        activation=problem.epilogue.activation, keep=problem.epilogue.keep,
    )  # fmt: skip


def backward(problem: Problem, x, w, bias, saved, gy, wanted, sees=None):
    spec, activation = problem.spec, problem.epilogue.activation
    if _walked(problem):
        return walk.backward(
            x, w, bias, gy, spec, activation=activation, wanted=wanted, dx_dtype=x.dtype,
            dw_dtype=w.dtype, sees=sees,
        )  # fmt: skip
    want_dx, want_dw, want_db = wanted
    want_db = want_db and bias is not None
    dx = dw = db = None
    carries = spec.input_dilation == 1
    many = taps.decline(spec, problem.C, problem.O) is None
    if want_dx or not want_dw or not carries or many:
        gy, saved, activation = gradient_in_xla(gy, saved, activation, gy.dtype), None, None
    if want_dx:
        turned = dict(O=problem.C, out_dtype=x.dtype, transposed=True, sees=sees)
        dx = forward(gy, w, spec.transposed(), **turned)
    if want_dw:
        dw, db = kernel_grad(
            x, gy, spec, out_dtype=w.dtype, bias=want_db and carries, saved=saved,
            activation=activation, sees=sees,
        )  # fmt: skip
    if want_db and db is None:
        db = bias_grad_in_xla(gy)
    return dx, dw, db


def packed(problem: Problem, x, w, bias, sees) -> jax.Array:
    return forward(
        x, w, problem.spec, O=problem.O, out_dtype=problem.out_dtype, bias=bias,
        activation=problem.epilogue.activation, sees=sees,
    )  # fmt: skip


def packed_backward(problem: Problem, x, w, bias, sees, gy, wanted):
    activation, saved = problem.epilogue.activation, None
    if activation is not None and not _walked(problem):
        linear = dict(O=problem.O, out_dtype=problem.out_dtype, bias=bias, sees=sees)
        z = forward(x, w, problem.spec, **linear)
        saved = activate_in_xla(z, activation) if ACTIVATIONS[activation] == "y" else z
    return backward(problem, x, w, bias, saved, gy, wanted, sees)


# --- What it declines ---


def decline(problem: Problem) -> str | None:
    if not problem.depthwise:
        return "more than one channel in a group is for triton_dense"
    return decline_any(problem)


def decline_packed(problem: Problem) -> str | None:
    if (why := decline(problem)) is not None or _walked(problem):
        return why
    return taps.decline(problem.spec, problem.C, problem.O)


def describe(problem: Problem) -> str:
    if _walked(problem):
        how = "steps in registers, read once"
    else:
        why = taps.decline(problem.spec, problem.C, problem.O)
        how = "taps and steps in registers" if why is None else f"a tile for each tap: {why}"
    return triton_tuned.described(how, problem)


def _walked(problem: Problem) -> bool:
    return walk.decline(problem.spec, problem.C, problem.O) is None


KERNEL = Kernel(
    implementation="triton",
    platforms=("cuda",),
    run=run,
    decline=decline,
    describe=describe,
    fused=fused,
    decline_fused=decline,
    backward=backward,
    decline_backward=lambda problem, wanted: decline(problem),
    keeps=lambda problem: not _walked(problem),
    recomputes=_walked,
    packed=packed,
    packed_backward=packed_backward,
    decline_packed=decline_packed,
    priority=triton_tuned.priority,
    by_name=triton_tuned.by_name,
    opaque=True,
)
