"""Dense and grouped convolution on NVIDIA GPUs: implicit matmuls in Triton.

Forward:       y[n, u, o]  = sum over k, c of  x[n, u*S + k*D - low, c] * w[k, c, o]
Input grad:    dx          = the same, with taps reversed and channels in and out exchanged
Kernel grad:   dw[k, c, o] = sum over n, u of  x[n, u*S + k*D - low, c] * g[n, u, o]

Each is a matmul of ``2 N T' K C O / G`` operations whose left side, an unfolded x, is never
written: the tile for tap k is a tile of x that starts ``k*D - low`` steps on. It may start
before time 0. The copy engine (TMA) of Hopper and newer reads zeros there, so padding costs
nothing; where it can't be used, pointers do the same with a mask. A tile of zeros alone is left
out, with its products: a quarter of a causal layer's where K = 3 and D = T / 4.

Bytes: x, w and y once each from memory if the L2 cache does its part: the K reads of an x tile,
and the O/BO reads of a strip of x, are by programs that run at nearly the same time (tiles of O
are the fastest index of the grid, then time). Dilation moves those K reads apart by D steps of x
and y, and the L2 need keep no more than ``(K-1) D (C + O)`` elements between the first and the
last: for K = 3, D = 1024, C = O = 512 in bf16 that is 4 MB of an H200's 50. So by estimate tiles
of neighbouring steps serve every dilation here, and tiles inside residue classes, which could not
be fetched by TMA in one piece, would save nothing. In the kernel gradient the programs that are at
work at one time walk along some 5 pieces of time, and the same reckoning gives 5 times D steps,
11 MB. It ends at D = 6000 or so for K = 3 and C = 512; from there on x comes from memory up to K
times, which a layer of that many channels can still hide behind its matmul. On an H200 D = 1 to 512
take the same time within 3 % (benchmarks/results/nvidia-h200/goals.jsonl), N = 8, T = 4096; D =
1024 a tenth less forward and in the input gradient, for the padding that is left out.

That is for many channels. With few, what the programs fetch from the L2 is several times what
memory moves; `triton_resident` has programs that fetch less.

Kernel grad has few outputs and a long sum. The sum over (n, u) is split among as many programs
as keep the chip busy; each writes a partial result in float32, and those are added in a fixed
order. The same input gives the same bits, always. It carries the bias gradient: one more program
beside those of the taps sums the tiles of gy that they read, so that these come from the L2.
Whether an activation's derivative is computed there too, `derivative_in_kernels` decides.

With few channels, whose rows are no multiple of 16 bytes and so are fetched by pointers, a program
of the kernel gradient spends its time on addresses and masks: with 15 channels and 51 taps its loop
has 63 instructions for a thousand products (sm_90a; an estimate of what bounds it, not a
measurement). Several taps in a program share a tile of g: with eight they are 31. No chip has run
such tiles yet, so that only `conv_pallas.tuning.tune` tries them.

Of packed sequences each output has a word with a bit for each tap, and what it does not see is not
fetched: one more condition of the mask that pointers have anyway. So x has no TMA there, and w has.

Groups are one more index of the grid. Strides and input dilation run by phases (see
`triton_common.Phases`): each output phase is a convolution without either.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import triton

from conv_pallas.activations import activate as activate_in_xla
from conv_pallas.kernels import Kernel, triton_compat, triton_resident, triton_tuned
from conv_pallas.kernels.triton_activation import gradient_in_xla
from conv_pallas.kernels.triton_common import (
    Phases,
    add_in_order,
    bias_grad_in_xla,
    dot_precision,
    operand_dtype,
    tf32_of,
)
from conv_pallas.kernels.triton_common import decline as decline_any
from conv_pallas.kernels.triton_config import (
    FORWARD,
    INPUT_GRAD,
    KERNEL_GRAD,
    LARGEST,
    Config,
    choose_splits,
    configure,
    room,
    takes_last_axis_alone,
)
from conv_pallas.kernels.triton_matmul import conv_dense, conv_dense_kernel_grad
from conv_pallas.kernels.xla_formulations import seen_from
from conv_pallas.spec import ACTIVATIONS, ConvSpec, Epilogue, Problem
from conv_pallas.taps import flip

# Elements of a kernel from which on XLA rounds it to tf32. Rounded as it is fetched by pointers, it
# goes from shared memory through registers and back; of a small one a program more takes longer.
ROUNDED_BEFORE = 2**16
# Of the kernel gradient's smallest tiles of 16 bits without TMA: else ptxas spills some (sm_80), so
# that a processor has room for ten programs and not for seven. With 56 Triton 3.6 spills.
REGISTERS = 72
# Of tiles without tensor cores, in rows of whole 16 bytes and without TMA: four programs fit on a
# processor, and for a fifth Triton 3.7 spills some (sm_80). Other rows' addresses take more.
IEEE_REGISTERS = 128
# Of few channels and many steps; two such programs share a processor, so that one multiplies while
# the other stores: see `triton_resident` for what that brings.
FEW = Config(rows=128, columns=64, depth=64, warps=8, stages=4, resident=2)

# --- Launchers ---


def _tileable(array: jax.Array | jax.ShapeDtypeStruct, offset: int) -> bool:
    """Whether the copy engine can fetch tiles of an array that start at multiples of `offset`.

    Rows have to be of whole 16 bytes (CUDA's ``cuTensorMapEncodeTiled``). It does not ask that
    tiles start at whole ones as well; but no chip has been tried with groups that do not.
    """
    size = array.dtype.itemsize
    return array.shape[-1] * size % 16 == 0 and offset * size % 16 == 0


def _may_stay(spec: ConvSpec, dtype: np.dtype) -> bool:
    """Whether `triton_resident` takes such a convolution, given tiles that fit."""
    return spec.groups == spec.stride == spec.input_dilation == 1 and dtype.itemsize == 2


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How `forward` works: in which tiles, and which of its arrays the copy engine (TMA) fetches.

    Attributes:
      w_row, w_col: a group's first row and column of w as the kernel reads it.
      contract_last: whether w's last axis is the one that is summed over.
    """

    config: Config
    tma_x: bool
    tma_w: bool
    w_row: int
    w_col: int
    contract_last: bool


def _plan(
    x, w, spec: ConvSpec, O: int, *, out_dtype, precision: str, transposed: bool = False,
    activation: str | None = None, derivative: bool = False, keep: bool = False,
    packed: bool = False,
) -> _Plan:  # fmt: skip
    """Of arrays, or of structs of their shapes and dtypes.

    Args:
      derivative: whether x is taken times an activation's.
      transposed, activation, keep: see `forward`.
      packed: whether outputs see some of their taps.
    """
    N, _, C = x.shape
    G, phases = spec.groups, Phases.of(spec)
    c, o = C // G, O // G
    dtype = np.dtype(jnp.promote_types(x.dtype, w.dtype))
    tma = triton_compat.has_tma(triton_compat.compute_capability())
    tma_x = tma and phases.row_step == 1 and not (derivative or packed) and _tileable(x, c)
    # In a transposed kernel, ``(K, o, G * c)``, it is. Else w is ``(K, c, G * o)``; but for float32
    # the tensor cores of Hopper take nothing else.
    turn = not transposed and tma and dtype.itemsize == 4 and precision != "ieee"
    turned = jax.ShapeDtypeStruct((len(w), G * o, c), w.dtype)
    fetched = lambda w, col: tma and _tileable(w, col)  # noqa: E731
    tma_w = fetched(turned, 0) if turn else fetched(w, c if transposed else o)
    y = jax.ShapeDtypeStruct((N, spec.out_time, O), out_dtype)
    addresses = not (tma_w and _tileable(y, 0) and (tma_x or derivative))
    # Who stays fetches tiles of padding like any other, where `conv_dense` leaves them out.
    padded = 8 * sum(max(0, p) for p in spec.padding) > spec.out_time
    stay = tma_x and x.dtype == w.dtype and not padded and _may_stay(spec, dtype)
    places, pieces = FEW.resident * triton_compat.processors(), triton.cdiv(spec.out_time, FEW.rows)
    few = (
        stay and FEW.depth // 2 < C <= FEW.depth and FEW.columns // 2 < O <= FEW.columns
        and N * pieces >= 4 * places and 4 * spec.out_time >= 3 * FEW.rows * pieces
        and triton_resident.goes_on(FEW, y.dtype.itemsize)
    )  # fmt: skip
    config = configure(
        INPUT_GRAD if transposed else FORWARD,
        triton.cdiv(spec.out_time, phases.phases), o, c, taps=spec.kernel_size,
        phases=phases, count=N * G * phases.phases, dtype=dtype, precision=precision, tma=tma,
        untuned=FEW if few else None, keep=keep, saved=derivative,
        tight=addresses or activation == "gelu_exact", stay=stay, pointers=not tma_x,
    )  # fmt: skip
    if turn and not takes_last_axis_alone(config):
        turn, tma_w = False, fetched(w, o)
    # What a tile holds past a group's end only feeds results that are not stored, but for what
    # is summed over: there the next group begins, and the engine has no mask.
    whole = G == 1 or c % config.depth == 0
    w_row, w_col = (o, 0) if turn else (0, c if transposed else o)
    return _Plan(config, tma_x and whole, tma_w and whole, w_row, w_col, turn or transposed)


def forward(
    x: jax.Array, w: jax.Array, spec: ConvSpec, *, O: int, out_dtype, precision: str,
    transposed: bool = False, bias: jax.Array | None = None, activation: str | None = None,
    saved: jax.Array | None = None, grad_of: str | None = None, keep: bool = False,
    sees: jax.Array | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:  # fmt: skip
    """``activation(conv(x, w) + bias)``.

    Args:
      x: ``(N, T, C)``.
      w: ``(K, C // G, O)``; if ``transposed`` ``(K, O // G, C)``, its taps to be reversed.
      spec: of this convolution: for an input gradient the transposed one.
      O: channels out, all groups together.
      bias: ``(O,)``, or None.
      activation: of `conv_pallas.spec.ACTIVATIONS`, or None.
      grad_of: an activation of which x is a gradient, to be taken times its derivative, which
        is computed from saved, an array of x's shape.
      keep: return ``(y, z)``, z that of which the activation makes y.
      sees: ``(N, T')`` int32, for each output a bit for each tap, 1 where it sees it; None: all.
    """
    N, T, C = x.shape
    G, K = spec.groups, spec.kernel_size
    c, o = C // G, O // G
    phases = Phases.of(spec)
    J = triton.cdiv(spec.out_time, phases.phases)
    dtype = np.dtype(jnp.promote_types(x.dtype, w.dtype))
    plan = _plan(
        x, w, spec, O, out_dtype=out_dtype, precision=precision, transposed=transposed,
        activation=activation, derivative=grad_of is not None, keep=keep, packed=sees is not None,
    )  # fmt: skip
    tma = triton_compat.has_tma(triton_compat.compute_capability())
    config, tma_x, tma_w, contract_last = plan.config, plan.tma_x, plan.tma_w, plan.contract_last
    rounded = precision == "tf32"
    round_w = rounded and not tma_w and w.dtype == np.float32
    if round_w and w.size >= ROUNDED_BEFORE:  # then transposed: XLA does both in one program
        w, round_w = tf32_of(w), False
    if contract_last and not transposed:
        w = jnp.swapaxes(w, 1, 2)
    y = jax.ShapeDtypeStruct((N, spec.out_time, O), out_dtype)
    limited = precision == "ieee" and not tma and _tileable(x, c) and _tileable(y, o)
    block = (config.columns, config.depth) if contract_last else (config.depth, config.columns)
    programs = N * G * phases.phases * triton.cdiv(J, config.rows) * triton.cdiv(o, config.columns)
    xt, wt = _tile(x, (config.rows, config.depth), rounded), _tile(w, block, rounded)
    common = dict(
        out=(y, y) if keep else y, warps=config.warps, stages=config.stages, C=c, O=o, K=K,
        CONTRACT_LAST=contract_last, REVERSE=transposed, PRECISION=precision,
        HAS_BIAS=bias is not None, ACTIVATION=activation,
        BT=config.rows, BO=config.columns, BC=config.depth, **({} if keep else {"z": None}),
    )  # fmt: skip
    bias = x if bias is None else bias  # a pointer that is not read
    may_stay = config.resident and _may_stay(spec, dtype) and tma_x and x.dtype == w.dtype
    out_itemsize = np.dtype(out_dtype).itemsize
    stays = may_stay and (
        C <= config.depth and O <= config.columns and triton_resident.fits(config, K, out_itemsize)
    )  # fmt: skip
    if stays or (may_stay and tma_w and triton_resident.goes_on(config, out_itemsize)):
        kernel = triton_resident.conv_resident if stays else triton_resident.conv_onward
        tiles, programs = programs, min(programs, triton_compat.processors() * config.resident)
        return triton_compat.call(
            kernel, xt, w if stays else wt, bias,
            spec.out_time, spec.kernel_dilation, spec.padding[0], tiles, programs,
            programs=programs, **common,
        )  # fmt: skip
    return triton_compat.call(
        conv_dense, xt if tma_x else x, wt if tma_w else w, bias, x if saved is None else saved,
        sees, T, J, spec.out_time, spec.kernel_dilation, spec.padding[0], programs=programs,
        G=G, S=spec.stride, E=spec.input_dilation, PHASES=phases.phases,
        ROW_STEP=phases.row_step, TAP_STEP=phases.tap_step, TAP_INVERSE=phases.tap_inverse,
        TAPPED=phases.tapped(spec),
        W_ROW=plan.w_row, W_COL=plan.w_col,
        W_ROWS=w.shape[1], W_COLS=w.shape[2], TMA_X=tma_x, TMA_W=tma_w, WIDEN=x.dtype != w.dtype,
        ROUND_X=rounded and not tma_x and x.dtype == np.float32,
        ROUND_W=round_w, GRAD_OF=grad_of,
        registers=IEEE_REGISTERS if limited else None, **common,
    )  # fmt: skip


def _tile(array: jax.Array, block: tuple[int, int], rounded: bool) -> triton_compat.Tile:
    """Of one sample, or tap."""
    return triton_compat.Tile(array, (1, *block), rounded and array.dtype == np.float32)


def kernel_grad(
    x: jax.Array, gy: jax.Array, spec: ConvSpec, *, out_dtype, precision: str, bias: bool = False,
    saved: jax.Array | None = None, activation: str | None = None, sees: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """``dw (K, C // G, O)`` of x ``(N, T, C)`` and gy ``(N, T', O)``; and db ``(O,)``, or None.

    Args:
      bias: whether db, the sum of gz over n and u in float32, is wanted; not if the input is
        dilated: then no program sees all steps.
      saved, activation: with them ``gz = gy * activation'``, else gz is gy.
      sees: as of `forward`.
    """
    (N, T, C), (_, U, O) = x.shape, gy.shape
    G, K = spec.groups, spec.kernel_size
    c, o = C // G, O // G
    phases = Phases.of(spec)
    J = triton.cdiv(U, phases.phases)
    dtype = np.dtype(jnp.promote_types(x.dtype, gy.dtype))
    tma = triton_compat.has_tma(triton_compat.compute_capability())
    whole = tma and phases.phases == 1
    tma_x = whole and phases.row_step == 1 and sees is None and _tileable(x, c)
    tma_g = whole and activation is None and _tileable(gy, o)
    # Plain layers of float32 on Hopper were measured without. Turned their loop has a sixth fewer
    # instructions, of even channels (431 of 517 at C=450, sm_90a), which no chip has run yet.
    turn_x = not tma or (sees is not None and dtype.itemsize == 4)
    turn_x &= precision != "tf32x3"  # or some of its sums spill
    # The sum is split, so that there are always tiles enough.
    config = configure(
        KERNEL_GRAD, c, o, J, taps=K, phases=phases, count=triton_compat.processors() * K * G,
        dtype=dtype, precision=precision, tma=tma, saved=activation is not None,
        tight=not (tma_x and tma_g), pointers=not (tma_x and tma_g),
    )  # fmt: skip
    # Whether some tap's last tile holds steps of x that it does not meet.
    tail = (
        tma_x and U % config.depth != 0
        and (spec.input_dilation > 1 or T > U - spec.padding[0])
    )  # fmt: skip
    blocks = N * (J // config.depth if tail else triton.cdiv(J, config.depth))
    tiles_c = triton.cdiv(c, config.rows)
    taps = min(K, config.taps) if spec.stride == spec.input_dilation == 1 else 1
    tiles = (triton.cdiv(K, taps) * tiles_c + bias) * G * triton.cdiv(o, config.columns)
    together = room(config, dtype.itemsize, precision, activation is not None)
    splits = choose_splits(
        tiles, max(blocks, N), (K * c + bias) * O, config, dtype.itemsize, together
    )
    per_split = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, per_split) if blocks else splits
    rounded = precision == "tf32"
    xt = _tile(x, (config.depth, config.rows), rounded)
    # The bias's sum is of the same tiles, and of all their bits.
    gt = _tile(gy, (config.depth, config.columns), rounded and not bias)
    narrow = splits == 1 and not bias
    smallest = dtype.itemsize == 2 and config.rows * config.columns <= 32 * 32 and saved is None
    stays = (
        config.resident and _may_stay(spec, dtype) and tma_x and tma_g and not tail
        and x.dtype == gy.dtype and c <= config.rows
        and o <= config.columns and triton_resident.sums_fit(config, K, bias)
    )  # fmt: skip
    if stays:
        splits = min(blocks, triton_compat.processors() * config.resident)
        partial = triton_compat.call(
            triton_resident.conv_resident_kernel_grad,
            xt, gt, U, spec.kernel_dilation, spec.padding[0], blocks, splits,
            out=jax.ShapeDtypeStruct((splits, K * c + bias, O), np.dtype(np.float32)),
            programs=splits, warps=config.warps, stages=config.stages, C=c, O=o, K=K,
            PRECISION=precision, BIAS=bias, BU=config.depth, BC=config.rows, BO=config.columns,
        )  # fmt: skip
        return _added(partial, (K, c, O), out_dtype, bias)
    partial = triton_compat.call(
        conv_dense_kernel_grad,
        xt if tma_x else x, gt if tma_g else gy,
        gy if saved is None else saved,  # a pointer that is not read
        sees, T, U, J, N, spec.kernel_dilation, spec.padding[0], splits,
        out=jax.ShapeDtypeStruct(
            (splits, K * c + bias, O), out_dtype if narrow else np.dtype(np.float32)
        ),
        programs=tiles * splits, warps=config.warps, stages=config.stages,
        C=c, O=o, G=G, K=K, S=spec.stride, E=spec.input_dilation, PHASES=phases.phases,
        PHASE_INVERSE=phases.phase_inverse, ROW_STEP=phases.row_step, TMA_X=tma_x, TMA_G=tma_g,
        TAIL=tail, PRECISION=precision, WIDEN=x.dtype != gy.dtype,
        ROUND_X=rounded and not tma_x and x.dtype == np.float32,
        ROUND_G=rounded and (bias or not tma_g) and gy.dtype == np.float32, BIAS=bias,
        GRAD_OF=activation, TAPS=taps, TURN_X=turn_x and not tma_x,
        BU=config.depth, BC=config.rows, BO=config.columns,
        registers=REGISTERS if smallest and not tma else None,
    )  # fmt: skip
    return _added(partial, (K, c, O), out_dtype, bias)


def _added(partial: jax.Array, shape: tuple[int, int, int], out_dtype, bias: bool):
    """dw and db of partial sums ``(splits, K * c + bias, O)``."""
    total = add_in_order(partial, partial.dtype)
    rows = shape[0] * shape[1]
    return total[:rows].reshape(shape).astype(out_dtype), total[rows] if bias else None


def _precision(problem: Problem) -> str | None:
    # Two kinds of 16 bits meet in float32, without a pass over memory: see WIDEN.
    return dot_precision(problem) if operand_dtype(problem) == np.float32 else "tf32"


def run(problem: Problem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    common = dict(out_dtype=problem.out_dtype, precision=_precision(problem))
    if problem.operation == "conv1d_kernel_grad":
        return kernel_grad(lhs, rhs, problem.spec, **common)[0]
    spec, _, O = problem.as_convolution
    transposed = problem.operation == "conv1d_input_grad"
    return forward(lhs, rhs, spec, O=O, transposed=transposed, **common)


def fused(problem: Problem, x: jax.Array, w: jax.Array, bias: jax.Array | None):
    return forward(
        x, w, problem.spec, O=problem.O, out_dtype=problem.out_dtype,
        precision=_precision(problem), bias=bias, activation=problem.epilogue.activation,
        keep=problem.epilogue.keep,
    )  # fmt: skip


def keeps(problem: Problem) -> bool:
    """Not in the largest tiles: with two results of those, registers spill (sm_90a and sm_100a)."""
    N, O, spec = problem.N, problem.O, problem.spec
    x = jax.ShapeDtypeStruct((N, spec.time, problem.C), problem.lhs_dtype)
    w = jax.ShapeDtypeStruct((spec.kernel_size, problem.C // spec.groups, O), problem.rhs_dtype)
    plan = _plan(
        x, w, spec, O, out_dtype=problem.out_dtype, precision=_precision(problem), keep=True,
        activation=problem.epilogue.activation,
    )  # fmt: skip
    # Half as large where addresses take registers as well.
    addresses = not (_tileable(x, problem.C // spec.groups) and _tileable(w, O // spec.groups))
    return plan.config.rows * plan.config.columns < (LARGEST // 2 if addresses else LARGEST)


def derivative_in_kernels(problem: Problem, wanted: tuple[bool, bool, bool]) -> bool:
    """Whether the kernels compute gz from gy and what was saved, as they read them.

    Else XLA makes gz in one pass, and the kernels fetch it by TMA. By estimate: that pass reads
    two arrays of gy's size and writes one, and each kernel reads one; done in the kernels, each
    reads two, and computes the derivative once for each tap. For ReLU both gradients together
    then move 4 such arrays rather than 5. For K = 3 and a derivative of 20 instructions an H200's
    arithmetic would take as long as moving 4 of them in bf16, for each kernel; so there it pays
    only where one of the two gradients is wanted. Where the matmul is the bottleneck, nothing
    pays that keeps it from TMA: beyond ``TURNING_POINT`` operations a byte.
    """
    spec, item = problem.spec, problem.lhs_dtype.itemsize
    products = problem.N * spec.out_time * spec.kernel_size * problem.C // spec.groups * problem.O
    moved = item * problem.N * (spec.time * problem.C + spec.out_time * problem.O)
    if 2 * products > TURNING_POINT * moved:
        return False
    move = item / BYTES_PER_SECOND
    instructions = 2 if problem.epilogue.activation == "relu" else 20
    compute = spec.kernel_size * instructions / INSTRUCTIONS_PER_SECOND
    gradients = sum(wanted[:2])
    return gradients * max(2 * move, compute) < (3 + gradients) * move


# Taken for an H200: nine tenths of the bandwidth in its data sheet (a copy of 4 GiB reached 87 %),
# that sheet's lanes times clock, and where four fifths of its bfloat16 products, which a matmul
# reached, take as long as moving what they are of (benchmarks/results/nvidia-h200/layers.jsonl).
BYTES_PER_SECOND, INSTRUCTIONS_PER_SECOND, TURNING_POINT = 4.3e12, 33e12, 184


def backward(problem: Problem, x, w, bias, saved, gy, wanted):
    spec, activation = problem.spec, problem.epilogue.activation
    precision = _precision(problem)
    want_dx, want_dw, want_db = wanted
    want_db = want_db and bias is not None
    dx = dw = db = None
    carries, exchanged = want_dw and spec.input_dilation == 1, spec.exchanged
    apart = (want_db and not carries) or (want_dw and exchanged)  # which need gz in memory
    in_kernels = derivative_in_kernels(problem, wanted) and not apart
    if activation is not None and not in_kernels:
        gy, saved, activation = gradient_in_xla(gy, saved, activation, gy.dtype), None, None
    if activation is None:
        saved = None
    around = dict(saved=saved, precision=precision)
    if want_dx:
        dx = forward(
            gy, w, spec.transposed(), O=problem.C, out_dtype=x.dtype, transposed=True,
            grad_of=activation, **around,
        )  # fmt: skip
    if want_dw and exchanged:  # as `conv_pallas.primitives` has it: then TMA can fetch x
        dw, _ = kernel_grad(gy, x, exchanged, out_dtype=w.dtype, **around)
        dw = flip(dw, spec.groups)
    elif want_dw:
        dw, db = kernel_grad(
            x, gy, spec, out_dtype=w.dtype, bias=want_db and carries, activation=activation,
            **around,
        )  # fmt: skip
    if want_db and db is None:
        db = bias_grad_in_xla(gy)
    return dx, dw, db


def packed(problem: Problem, x, w, bias, sees) -> jax.Array:
    return forward(
        x, w, problem.spec, O=problem.O, out_dtype=problem.out_dtype,
        precision=_precision(problem), bias=bias, activation=problem.epilogue.activation, sees=sees,
    )  # fmt: skip


def packed_backward(problem: Problem, x, w, bias, sees, gy, wanted):
    spec, activation = problem.spec, problem.epilogue.activation
    around = dict(precision=_precision(problem))
    if activation is not None:
        linear = dataclasses.replace(problem, epilogue=Epilogue(bias=bias is not None))
        z = packed(linear, x, w, bias, sees)
        saved = activate_in_xla(z, activation) if ACTIVATIONS[activation] == "y" else z
        gy = gradient_in_xla(gy, saved, activation, gy.dtype)
    want_dx, want_dw, want_db = wanted
    want_db = want_db and bias is not None
    dx = dw = db = None
    if want_dx:
        back = spec.transposed()
        dx = forward(
            gy, w, back, O=problem.C, out_dtype=x.dtype, transposed=True,
            sees=seen_from(sees, back), **around,
        )  # fmt: skip
    if want_dw:
        dw, db = kernel_grad(x, gy, spec, out_dtype=w.dtype, bias=want_db, sees=sees, **around)
    elif want_db:
        db = bias_grad_in_xla(gy)
    return dx, dw, db


# --- What it declines ---


def decline(problem: Problem) -> str | None:
    if problem.depthwise:
        return "one channel in each group is for triton_depthwise"
    if reason := decline_any(problem):
        return reason
    if _precision(problem) is None:
        return f"knows the precisions DEFAULT, HIGH and HIGHEST, not {problem.precision}"
    return None


def describe(problem: Problem) -> str:
    engine = "TMA" if triton_compat.has_tma(triton_compat.compute_capability()) else "pointers"
    return triton_tuned.described(f"implicit matmul ({engine} where strides allow)", problem)


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
    keeps=keeps,
    packed=packed,
    packed_backward=packed_backward,
    decline_packed=decline,
    priority=triton_tuned.priority,
    by_name=triton_tuned.by_name,
    opaque=True,
)
