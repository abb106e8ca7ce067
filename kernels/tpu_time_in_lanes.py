"""The dense convolution of channels that fill no 128 lanes on a TPU: time lies there.

    y[n, :, u] = sum over k of  w[k]^T @ x[n, :, u + k*D - low]
    dx         = the same of g, with the taps reversed and each w[k] transposed
    dw[k]      = sum over n, u of  x[n, :, u + k*D - low] @ g[n, :, u]^T

Operations: ``2 N T K C O``. Bytes: x and y once each.

An array ``(N, T, C)`` lies in HBM with time along lanes where C would leave more of them empty
(`tpu_layout.py`): XLA chooses so, and its own convolution reads it so. `tpu_dense.py` wants
channels there, for which XLA moves all of x and y twice over. Here both are taken as they lie: the
transposes around the kernel are XLA's names for the same bytes, or a copy that its own convolution
has as well.

Tiling. The grid is (n, time). A window of x stays in VMEM (`tpu_window.py`), ``(C, lanes)``, C
rounded up to whole registers. A tap is the same window some lanes on. The taps of a tile are
stacked, ``(K*C, lanes)``, so that the matrix unit sums over them: 25 channels of 7 taps fill it.
Where all of time is one tile, a step of the grid takes several samples, for each step has a cost of
its own.

The kernel gradient multiplies the same stack with g, over lanes; ``(O, K*C)`` stays in VMEM. Each
core makes a part of its own, and the parts are added in a fixed order.

Precision is as in `tpu_dense.py`.
"""

import dataclasses
import functools
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from conv_pallas.kernels import tpu_epilogue, tpu_estimates, tpu_matmul
from conv_pallas.kernels.tpu_epilogue import Around
from conv_pallas.kernels.tpu_layout import axes_along_lanes
from conv_pallas.kernels.tpu_matmul import decline_dense, dot, passes_of, split
from conv_pallas.kernels.tpu_window import (
    LANES,
    Chip,
    Walk,
    by_chunks,
    cleared,
    compiler_params,
    cost,
    round_up,
    vmem_bytes,
)
from conv_pallas.spec import OPERATIONS, ConvSpec, Problem

WIDEST = 640  # channels; of 900 the dense kernel is faster on v6e, by estimate
LONGEST = 8192  # steps of time in a step of the grid, of all its samples together
CODE = 2**11  # registers of one stack of taps: beyond, the code gets long, and is no faster


@dataclasses.dataclass(frozen=True)
class LaneWalk(Walk):
    """A `Walk` whose window has time along lanes: ``rows`` are lanes.

    Where a tile holds all of time nothing is carried from one step to the next, and the window has
    zeros on both sides.
    """

    ALIGNED: ClassVar[int] = LANES

    @classmethod
    def of(cls, spec: ConvSpec, rows: int) -> Self:
        walk = super().of(spec, rows)
        return dataclasses.replace(walk, mirrored=walk.mirrored and not walk.whole)

    @property
    def whole(self) -> bool:
        return max(self.time, self.out_time) <= self.rows

    @property
    def ahead(self) -> int:
        return 0 if self.whole else super().ahead

    @property
    def reach(self) -> int:
        return self.low if self.whole else super().reach

    @property
    def history(self) -> int:
        return round_up(max(self.reach, 0), self.ALIGNED)

    @property
    def after(self) -> int:
        """Zeros behind the block."""
        return round_up(max(self.halo - self.low, 0), self.ALIGNED) if self.whole else 0

    @property
    def window_rows(self) -> int:
        return super().window_rows + self.after

    def advance(self, s, x, window) -> None:
        """Moves the window of a sample on to step ``s``: device code, once a step.

        Args:
          x: ``(C, rows)``, block ``x_block(s)``.
          window: ``(C or more, window_rows)``.
        """
        self._carry(s, window)
        block = self.x_block(s) if self.mirrored else s - self.warm + self.ahead
        if not self.always_inside:
            t = block * self.rows + lax.broadcasted_iota(jnp.int32, x.shape, 1)
            # Selected in float32: the older chips compare and select in 32 bits.
            x = jnp.where((t >= 0) & (t < self.time), x.astype(jnp.float32), 0.0)
        if x.shape[0] < window.shape[0]:
            x = jnp.pad(x, ((0, window.shape[0] - x.shape[0]), (0, 0)))
        at = 0 if self.mirrored else self.history
        window[:, pl.ds(at, self.rows)] = x.astype(window.dtype)

    def _carry(self, s, window) -> None:
        """What is left of the steps before, or zeros."""
        H, BT = self.history, self.rows
        zeros = lambda n: jnp.zeros((window.shape[0], n), window.dtype)  # noqa: E731
        if self.whole:
            for at, n in ((0, H), (H + BT, self.after)):
                if n:
                    window[:, pl.ds(at, n)] = zeros(n)
            return
        kept, past = (BT, -BT) if self.mirrored else (0, BT)

        @pl.when(s == 0)
        def _():
            if H:
                window[:, pl.ds(kept, H)] = zeros(H)

        @pl.when(s > 0)
        def _():
            def moved(at, n):
                window[:, pl.ds(at + kept, n)] = window[:, pl.ds(at + kept + past, n)]

            by_chunks(H, moved, BT)


# --- Device code ---


def _gradient(around: Around, g_ref, saved_ref, n):
    """Sample n of g, or of gz where it is to be computed, ``(O, rows)``."""
    if around.slope_of is None:
        return g_ref[n]
    return tpu_epilogue.gradient(around.slope_of, g_ref[n], saved_ref[n])


def _stack(walk: LaneWalk, window):
    """What each tap sees, ``(K*C, rows)``."""
    offsets, n = [walk.offset(k) for k in range(walk.taps)], walk.rows
    taps = {at: window[:, pl.ds(at, n)] for at in offsets if at % LANES == 0}
    # To rotate lanes is what takes longest, so once for all taps that are whole registers apart.
    for rest in sorted({at % LANES for at in offsets} - {0}):
        alike = [at for at in offsets if at % LANES == rest]
        first = alike[0] - rest
        seen = _rotated(window[:, pl.ds(first, alike[-1] - first + n + LANES - rest)], rest)
        taps |= {at: seen[:, at - alike[0] : at - alike[0] + n] for at in alike}
    return jnp.concatenate([taps[at] for at in offsets], 0)


def _rotated(a, by: int):
    """Lane ``by`` first. The compiler's own unaligned load rotates each register twice."""
    if a.dtype != jnp.bfloat16:
        return pltpu.roll(a, a.shape[1] - by, 1)
    pairs = pltpu.bitcast(a, jnp.int32)  # of rows, as only numbers of 32 bits are rotated
    return pltpu.bitcast(pltpu.roll(pairs, a.shape[1] - by, 1), jnp.bfloat16)


def _cut(walk: LaneWalk, s, a):
    """Zeros in the lanes of ``a`` that are past the end in the last tile: see `tpu_window.cut`."""
    if walk.last_rows == walk.rows:
        return a
    # The registers before are whole in every tile.
    at = walk.last_rows // LANES * LANES
    shape = (a.shape[0], walk.rows - at)
    u = walk.out_block(s) * walk.rows + at + lax.broadcasted_iota(jnp.int32, shape, 1)
    # Selected in float32: the older chips compare and select in 32 bits.
    end = jnp.where(u < walk.out_time, a[:, at:].astype(jnp.float32), 0.0).astype(a.dtype)
    return jnp.concatenate([a[:, :at], end], 1) if at else end


def _forward_kernel(walk, passes, around, x_ref, *refs):
    """One tile of time of some samples: for each the window, then one matmul."""
    *refs, windows = refs
    out_refs = [refs.pop() for _ in range(1 + around.keep)][::-1]
    b_ref = refs.pop() if around.bias else None
    saved_ref = refs.pop(0) if around.slope_of else None
    s = pl.program_id(1)
    for n in range(x_ref.shape[0]):
        walk.advance(s, _gradient(around, x_ref, saved_ref, n), windows.at[n])

    @pl.when(s >= walk.warm)
    def _():
        w = tuple(ref[...] for ref in refs)
        for n in range(x_ref.shape[0]):
            taps = _stack(walk, windows.at[n])
            taps = split(taps) if passes == "bf16x3" else taps
            acc = dot(w if len(w) > 1 else w[0], taps, passes)
            if around.bias:
                acc += b_ref[...]
            tpu_epilogue.store(around, acc, out_refs, n)


def _kernel_grad_kernel(walk, passes, around, x_ref, g_ref, *refs):
    """One tile of time of some samples: adds products with g to dw, which stays, and g to db."""
    *refs, windows = refs
    saved_ref = refs.pop(0) if around.slope_of else None
    dw_ref, db_ref = (*refs, None)[:2]
    s = pl.program_id(2)
    cleared(refs, (pl.program_id(1) == 0) & (s == 0))
    for n in range(x_ref.shape[0]):
        walk.advance(s, x_ref[n], windows.at[n])

    @pl.when(s >= walk.warm)
    def _():
        for n in range(x_ref.shape[0]):
            g = _cut(walk, s, _gradient(around, g_ref, saved_ref, n))
            if around.bias:
                f32 = g.astype(jnp.float32)
                parts = [f32[:, i : i + LANES] for i in range(0, walk.rows, LANES)]
                db_ref[0] += functools.reduce(jnp.add, parts)
            g, taps = g.astype(windows.dtype), _cut(walk, s, _stack(walk, windows.at[n]))
            if passes == "bf16x3":
                g, taps = split(g), split(taps)
            dw_ref[0] += dot(g, taps, passes, ((1,), (1,)))


# --- Tiles ---


@dataclasses.dataclass(frozen=True)
class Plan:
    """The tiles of one call: `walk` along time, ``samples`` of N in a step of the grid.

    ``rows``: C rounded up to whole registers.
    """

    walk: LaneWalk
    samples: int
    rows: int
    vmem: int


def _plan_of(
    problem: Problem, chip: Chip, longest: int = LONGEST, saved: bool = False
) -> Plan | None:
    """The longest tiles that fit; ``saved``: and is read beside g."""
    (spec, C, O), passes, N = problem.as_convolution, passes_of(problem), problem.N
    sums = problem.operation == "conv1d_kernel_grad"
    keep = problem.operation == "conv1d" and problem.epilogue.keep
    operand, copies = {"bf16": (2, 1), "bf16x3": (4, 3), "f32": (4, 2)}[passes]
    rows = round_up(C, 32 // operand)
    sizes = [problem.lhs_dtype.itemsize, problem.rhs_dtype.itemsize, problem.out_dtype.itemsize]
    arrays = [(C, sizes[0]), (O, sizes[1] if sums else sizes[2])]
    if saved:
        arrays.append(arrays[sums])
    if keep:
        arrays.append(arrays[1])
    registers = pl.cdiv(rows * spec.kernel_size * operand * copies, 32)

    def need(walk: LaneWalk, samples: int) -> int:
        rotated = len({walk.offset(k) % LANES for k in range(walk.taps)} - {0})
        stack = copies * vmem_bytes(rows * walk.taps, walk.rows, operand)
        stack += rotated * vmem_bytes(rows, walk.rows + LANES, operand)
        w = 2 * copies * vmem_bytes(O, rows * walk.taps, 4 if sums else operand)
        blocks = sum(2 * samples * vmem_bytes(c, walk.rows, size) for c, size in arrays)
        window = samples * vmem_bytes(rows, walk.window_rows, operand)
        return blocks + window + stack + w + 2 * vmem_bytes(O, walk.rows, 4)

    wide = min(longest // LANES, max(1, CODE // registers))  # in registers
    while wide:
        lanes = wide * LANES
        tiles = pl.cdiv(max(spec.out_time, 1), lanes)
        walk = LaneWalk.of(spec, round_up(pl.cdiv(spec.out_time, tiles), LANES))
        most = max(1, lanes // walk.rows) if walk.steps == 1 else 1
        for samples in range(min(most, N), 0, -1):
            if N % samples == 0 and (vmem := need(walk, samples)) <= chip.budget:
                return Plan(walk, samples, rows, vmem)
        wide //= 2
    return None


# --- Launchers ---


def _operand(passes: str):
    return jnp.bfloat16 if passes == "bf16" else jnp.float32


def _windows(plan: Plan, passes: str) -> pltpu.VMEM:
    """Of each sample its own, so that nothing that is done for one waits for another."""
    return pltpu.VMEM((plan.samples, plan.rows, plan.walk.window_rows), _operand(passes))


def forward(
    x, w, plan: Plan, passes: str, out_dtype, chip: Chip, *, bias=None, saved=None,
    around: Around, interpret=False,
):  # fmt: skip
    """``activation(conv(x, w) + bias)``, the arguments as in `tpu_dense.forward`."""
    (N, _, C), (K, _, O), walk = x.shape, w.shape, plan.walk
    w = jnp.pad(w, ((0, 0), (0, plan.rows - C), (0, 0))).reshape(K * plan.rows, O).T
    w = split(w.astype(jnp.float32)) if passes == "bf16x3" else (w.astype(_operand(passes)),)
    x_spec = pl.BlockSpec((plan.samples, C, walk.rows), lambda n, s: (n, 0, walk.x_block(s)))
    fixed = lambda a: pl.BlockSpec(a.shape, lambda n, s: (0, 0))  # noqa: E731
    arrays = [x] if around.slope_of is None else [x, saved]
    operands = [a.transpose(0, 2, 1) for a in arrays]
    in_specs = [x_spec] * len(operands)
    for a in (*w, *([bias.astype(jnp.float32)[:, None]] if around.bias else [])):
        operands.append(a)
        in_specs.append(fixed(a))
    out = jax.ShapeDtypeStruct((N, O, walk.out_time), out_dtype)
    out_spec = pl.BlockSpec((plan.samples, O, walk.rows), lambda n, s: (n, 0, walk.out_block(s)))
    y = pl.pallas_call(
        functools.partial(_forward_kernel, walk, passes, around),
        grid=(N // plan.samples, walk.steps),
        in_specs=in_specs,
        out_specs=around.like(out_spec),
        out_shape=around.like(out),
        scratch_shapes=[_windows(plan, passes)],
        compiler_params=compiler_params(chip, plan.vmem, ("parallel", "arbitrary")),
        cost_estimate=cost(
            2 * N * walk.out_time * K * C * O,
            *((a.shape, a.dtype.itemsize, 1) for a in operands),
            (out.shape, out.dtype.itemsize, 1 + around.keep),
        ),
        interpret=interpret,
        name="conv1d_time_in_lanes",
    )(*operands)
    return jax.tree.map(lambda a: a.transpose(0, 2, 1), y)


def kernel_grad(
    x, g, plan: Plan, passes: str, chip: Chip, *, saved=None, around: Around, interpret=False,
):  # fmt: skip
    """``(dw, db)`` as in `tpu_dense.kernel_grad`."""
    (N, _, C), O, walk = x.shape, g.shape[2], plan.walk
    parts = chip.cores if N // plan.samples % chip.cores == 0 else 1
    share = N // plan.samples // parts
    block = lambda c, at: pl.BlockSpec(  # noqa: E731
        (plan.samples, c, walk.rows), lambda p, n, s: (p * share + n, 0, at(s))
    )
    arrays = [x, g] if around.slope_of is None else [x, g, saved]
    operands = [a.transpose(0, 2, 1) for a in arrays]
    part = lambda *shape: pl.BlockSpec((1, *shape), lambda p, n, s: (p, 0, 0))  # noqa: E731
    shapes = [(O, walk.taps * plan.rows), *([(O, LANES)] if around.bias else [])]
    out_shape = [jax.ShapeDtypeStruct((parts, *shape), jnp.float32) for shape in shapes]
    dw, *db = pl.pallas_call(
        functools.partial(_kernel_grad_kernel, walk, passes, around),
        grid=(parts, share, walk.steps),
        in_specs=[block(C, walk.x_block), *[block(O, walk.out_block)] * (len(operands) - 1)],
        out_specs=[part(*shape) for shape in shapes],
        out_shape=out_shape,
        scratch_shapes=[_windows(plan, passes)],
        compiler_params=compiler_params(chip, plan.vmem, ("parallel", "arbitrary", "arbitrary")),
        cost_estimate=cost(
            2 * N * walk.out_time * walk.taps * C * O,
            *((a.shape, a.dtype.itemsize, 1) for a in (*operands, *out_shape)),
        ),
        interpret=interpret,
        name="conv1d_time_in_lanes_kernel_grad",
    )(*operands)
    dw = functools.reduce(jnp.add, dw).reshape(O, walk.taps, plan.rows)[..., :C].transpose(1, 2, 0)
    return dw, functools.reduce(jnp.add, db[0]).sum(1) if db else None


launch = functools.partial(tpu_matmul.launch, _plan_of, forward, kernel_grad, longest=LONGEST)


# --- What it declines ---


def decline(problem: Problem) -> str | None:
    if reason := decline_dense(problem):
        return reason
    if max(problem.C, problem.O) > WIDEST:
        return f"is for up to {WIDEST} channels"
    few = min(problem.C, problem.O) < LANES >= max(problem.C, problem.O)
    if not few and axes_along_lanes(problem) != {"T"}:
        return "is for channels that fill no lanes, or less of them than time does"
    if not _fits(problem, Chip.of(problem)):
        return "this kernel and its halo do not fit in VMEM"
    return None


def _fits(problem: Problem, chip: Chip) -> bool:
    """Whether all three operations do: one kernel has both gradients, or they are not fused."""
    others = (dataclasses.replace(problem, operation=operation) for operation in OPERATIONS)
    return all(_plan_of(each, chip) is not None for each in (problem, *others))


def priority(problem: Problem) -> int | None:
    if problem.platform != "tpu":
        return None
    return 10 if tpu_estimates.time_in_lanes_wins(problem, Chip.of(problem)) else None


def describe(problem: Problem) -> str:
    plan = _plan_of(problem, Chip.of(problem))
    chosen = "; the default, by estimate" if priority(problem) else ""
    return (
        f"time along lanes, {plan.walk.rows} steps, {plan.walk.taps} taps, {plan.samples} samples "
        f"at once; {passes_of(problem)} products{chosen}"
    )


KERNEL = tpu_epilogue.kernel(
    _plan_of, launch, decline=decline, describe=describe, priority=priority,
    by_name=lambda problem: "by name only: no estimate says that it is faster than XLA",
)  # fmt: skip
