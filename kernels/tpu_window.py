"""A window over time that stays in VMEM, for TPU kernels that walk along the time axis.

A kernel's grid ends in a sequential axis. At step ``s`` it is given block ``j = s - warm + ahead``
of x and makes block ``i = s - warm`` of the output, both of ``rows`` steps:

    window   | history: what was read before | block j of x |
    tap k    reads ``rows`` rows from ``offset(k)`` on

so that x is read from HBM once, however long the halo is and whatever the padding: a low padding
is a history of zeros, a high padding or a SAME convolution looks ``ahead``, and what lies outside
of ``0 <= t < T``, also past the end of the last block, is written as zeros.
"""

import dataclasses
import math
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from conv_pallas.spec import ConvSpec, Problem

LANES, SUBLANES = 128, 8
TILE_ROWS = 16  # rows of a tile of the narrowest dtype: aligned for any of them
COPY_ROWS = 256  # rows that are moved at once inside VMEM


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Walk:
    """Where each tap finds its rows; see the module's docstring.

    Attributes:
      time, out_time: ``T``, or how much of it the taps see, and ``T'``.
      low: padding before the first step.
      dilation: ``D``.
      taps: ``K``.
      rows: output steps in one step of the grid, a multiple of `TILE_ROWS`.
      mirrored: the walk goes from the last block to the first, and what came before lies
        after block j in the window. So is it where all padding follows the last step, as in the
        input gradient of a causal convolution: looking ahead would copy each block twice.
    """

    time: int
    out_time: int
    low: int
    dilation: int
    taps: int
    rows: int
    mirrored: bool = False
    ALIGNED: ClassVar[int] = TILE_ROWS  # what the history is rounded up to

    @classmethod
    def of(cls, spec: ConvSpec, rows: int) -> Self:
        low, halo = spec.padding[0], spec.span - 1
        mirrored = low == 0 < halo <= rows and spec.time == spec.out_time
        # What a negative padding crops off no tap sees: in a gradient of the kernel it would meet
        # zeros beyond the last step of g, and may be NaN.
        time = min(spec.time, spec.out_time + halo - low)
        D, K = spec.kernel_dilation, spec.kernel_size
        return cls(time, spec.out_time, low, D, K, rows, mirrored)

    @property
    def halo(self) -> int:
        """Rows from the first tap to the last."""
        return (self.taps - 1) * self.dilation

    @property
    def ahead(self) -> int:
        """Blocks by which x runs ahead of the output; negative where it lags."""
        if self.mirrored:
            return 0
        return -(-(self.halo - self.low) // self.rows)

    @property
    def warm(self) -> int:
        """Steps before the first that makes an output."""
        return max(self.ahead, 0)

    @property
    def steps(self) -> int:
        return self.warm + pl.cdiv(self.out_time, self.rows)

    @property
    def reach(self) -> int:
        """How many rows before block j the first tap reads; mirrored, after it the last."""
        if self.mirrored:
            return self.halo
        return self.ahead * self.rows + self.low

    @property
    def history(self) -> int:
        """Rows of the window before block j, or after it."""
        return round_up(self.reach, self.ALIGNED)

    @property
    def window_rows(self) -> int:
        return self.history + self.rows

    @property
    def always_inside(self) -> bool:
        """Whether every block of x has all of its rows in ``0 <= t < T``."""
        last = self.steps - 1 - self.warm + self.ahead
        return self.ahead >= 0 and (last + 1) * self.rows <= self.time

    @property
    def last_rows(self) -> int:
        """Rows of the last block of the output before ``T'``."""
        return (self.out_time - 1) % self.rows + 1

    def offset(self, k: int) -> int:
        """The first row of the window that tap ``k`` reads."""
        if self.mirrored:
            return k * self.dilation
        return self.history - self.reach + k * self.dilation

    def x_block(self, s):
        """Which block of x comes at step ``s``; any, where there is none."""
        if self.mirrored:
            return self.steps - 1 - s
        return jnp.clip(s - self.warm + self.ahead, 0, pl.cdiv(self.time, self.rows) - 1)

    def out_block(self, s):
        """Which block of the output step ``s`` makes; the first, before there is one."""
        if self.mirrored:
            return self.steps - 1 - s
        return jnp.maximum(s - self.warm, 0)

    def advance(self, s, load, window) -> None:
        """Moves the window on to step ``s``: device code, once a step.

        Args:
          load: ``load(at, n)``, ``n`` rows from ``at`` on of block ``x_block(s)``, ``(n, C)``.
          window: VMEM ``(window_rows, C)``, carried from one step to the next.
        """
        H, BT = self.history, self.rows
        kept, fresh, past = (BT, 0, -BT) if self.mirrored else (0, H, BT)

        @pl.when(s == 0)
        def _():
            zeros = lambda n: jnp.zeros((n, window.shape[1]))  # noqa: E731
            by_chunks(H, lambda at, n: _store(window, at, n, zeros(n), kept))

        if self.steps > 1:

            @pl.when(s > 0)
            def _():
                # Ascending, and no chunk is longer than the way it goes, so that a long
                # history may overlap itself.
                by_chunks(
                    H,
                    lambda at, n: _store(window, at, n, _load(window, at, n, kept + past), kept),
                    min(BT, COPY_ROWS),
                )

        def copied(at, n):
            _store(window, at, n, load(at, n), fresh)

        if self.always_inside:
            by_chunks(BT, copied)
            return
        block = self.x_block(s) if self.mirrored else s - self.warm + self.ahead
        start = block * BT
        whole = (start >= 0) & (start + BT <= self.time)
        pl.when(whole)(lambda: by_chunks(BT, copied))

        @pl.when(jnp.logical_not(whole))
        def _():
            def masked(at, n):
                t = start + at + lax.broadcasted_iota(jnp.int32, (n, window.shape[1]), 0)
                real = (t >= 0) & (t < self.time)
                # Selected in float32: the older chips compare and select in 32 bits.
                x = load(at, n).astype(jnp.float32)
                _store(window, at, n, jnp.where(real, x, 0.0), fresh)

            by_chunks(BT, masked)


def cleared(refs, first) -> None:
    """Writes zeros into what a grid sums in, where ``first`` says that it begins: device code."""

    @pl.when(first)
    def _():
        for ref in refs:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)


def by_chunks(rows: int, body, longest: int = COPY_ROWS) -> None:
    """``body(at, n)`` for ``at`` in steps of ``n`` rows, so that few values live at once."""
    n = min(longest, rows) or 1
    whole, rest = divmod(rows, n)
    if whole == 1:
        body(0, n)
    elif whole:
        pl.loop(0, whole)(lambda c: body(pl.multiple_of(c * n, n), n))
    if rest:
        body(whole * n, rest)


def by_real_chunks(walk: Walk, s, body, longest: int) -> None:
    """``body(at, n, real)`` by chunks of output block ``out_block(s)``, as far as there is output.

    Of the ``n`` rows ``real`` are before ``T'``: all, but in the last chunk of the last block.
    """

    def chunks(rows):
        by_chunks(rows, lambda at, n: body(at, n, n), longest)

    end, blocks = walk.last_rows, pl.cdiv(walk.out_time, walk.rows)
    if end == walk.rows:
        return chunks(walk.rows)
    last = walk.out_block(s) == blocks - 1
    if blocks > 1:
        pl.when(jnp.logical_not(last))(lambda: chunks(walk.rows))

    @pl.when(last)
    def _():
        rest = end % min(longest, walk.rows)
        if end > rest:
            chunks(end - rest)
        if rest:
            body(end - rest, round_up(rest, TILE_ROWS), rest)


def cut(a: jax.Array, real: int) -> jax.Array:
    """Zeros in the rows of ``a`` from ``real`` on.

    Of the kernel gradient's factors both have to be cut off at ``T'``: zero times what x has there
    is NaN if that is.
    """
    if real == a.shape[0]:
        return a
    at = real // TILE_ROWS * TILE_ROWS
    rows = at + lax.broadcasted_iota(jnp.int32, (a.shape[0] - at, a.shape[1]), 0)
    # Selected in float32: the older chips compare and select in 32 bits.
    end = jnp.where(rows < real, a[at:].astype(jnp.float32), 0.0).astype(a.dtype)
    return jnp.concatenate([a[:at], end], 0) if at else end


def bits_of(ref, at, n: int) -> jax.Array:
    """Of ``n`` outputs from ``at`` on the bits of the taps they see, in every lane: ``(n, LANES)``.

    Args:
      ref: int32 ``(1, 1, 1, rows)``, along the lanes as it lies in HBM.
    """
    return jnp.broadcast_to(ref[0, 0, :, pl.ds(at, n)], (LANES, n)).T


def where_seen(tap: jax.Array, bits: jax.Array, k: int) -> jax.Array:
    """Tap k ``(n, C)`` with zeros in the rows whose output does not see it."""
    n, C = tap.shape
    bit = (bits >> k) & 1
    wide = jnp.concatenate([bit] * pl.cdiv(C, LANES), 1)[:, :C]
    # Selected in float32: the older chips compare and select in 32 bits.
    return jnp.where(wide == 1, tap.astype(jnp.float32), 0.0).astype(tap.dtype)


def rows_of(ref):
    """``load(at, n)`` of a reference to ``(rows, C)``."""
    return lambda at, n: _load(ref, at, n)


def _load(ref, at, n: int, shift: int = 0) -> jax.Array:
    return ref[pl.ds(at + shift, n)]


def _store(ref, at, n: int, value: jax.Array, shift: int = 0) -> None:
    ref[pl.ds(at + shift, n)] = value.astype(ref.dtype)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What tiles depend on. Bytes and counts are those of one core."""

    vmem: int
    mxu: int
    cores: int
    name: str | None = None  # "v5e"; None: not known

    @classmethod
    def of(cls, problem: Problem) -> "Chip":
        """The chip that a problem is lowered for.

        What is exported does not know which it will meet, wherever that is done. It gets tiles for
        the least of them, which run on all.
        """
        return cls.least() if problem.exported else cls.current()

    @classmethod
    def least(cls) -> "Chip":
        """What every chip has."""
        return cls(vmem=16 * 2**20, mxu=128, cores=1)

    @classmethod
    def current(cls) -> "Chip":
        """The chip of this host, or of the abstract mesh; where there is none, the least."""
        try:
            info = pltpu.get_tpu_info()
        except ValueError:  # no TPU here, and none is named by the abstract mesh
            return cls.least()
        name = info.chip_version.value
        return cls(info.vmem_capacity_bytes, info.mxu_column_size, info.num_cores, name)

    @property
    def budget(self) -> int:
        """Bytes that a kernel may plan with; the rest is the compiler's, for spills and copies."""
        return self.vmem * 3 // 4


OPERANDS = (np.dtype(jnp.bfloat16), np.dtype(np.float32))


def decline_any(problem: Problem) -> str | None:
    """What no kernel here takes, dense or depthwise."""
    spec = problem.spec
    if spec.stride != 1 or spec.input_dilation != 1:
        return "takes neither strides nor input dilation"
    if not problem.known:
        return "needs every size to be known when it is compiled"
    for dtype in (problem.lhs_dtype, problem.rhs_dtype, problem.out_dtype):
        if dtype not in OPERANDS:
            return f"takes bfloat16 and float32, not {dtype}"
    if jax.config.jax_enable_x64:
        # The index of a loop is int64 then, whatever its bounds are, and Mosaic makes it an int32:
        # "'arith.muli' op requires the same type for all operands".
        return "does not compile where jax_enable_x64 is on"
    return None


def vmem_bytes(rows: int, lanes: int, itemsize: int) -> int:
    """What an array takes up in VMEM, in whole tiles."""
    return round_up(rows, TILE_ROWS) * round_up(lanes, LANES) * itemsize


def compiler_params(chip: Chip, need: int, semantics: tuple[str, ...]) -> pltpu.CompilerParams:
    """For a grid of these dimensions and a plan that counted ``need`` bytes of VMEM.

    What the kernel does not claim is XLA's: there it leaves the output of one layer for the next,
    and neither travels to HBM and back.
    """
    limit = max(16 * 2**20, need * 5 // 4 + 4 * 2**20)
    return pltpu.CompilerParams(
        dimension_semantics=semantics, vmem_limit_bytes=min(limit, chip.vmem * 15 // 16)
    )


def cost(flops: int, *arrays: tuple[tuple[int, ...], int, int]) -> pl.CostEstimate:
    """What XLA plans with; of each array shape, bytes of an element, and how often it is read."""
    moved = sum(
        times * math.prod(shape[:-2]) * vmem_bytes(shape[-2], shape[-1], itemsize)
        for shape, itemsize, times in arrays
    )
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)


def rows_that_fit(out_time: int, longest: int, fits) -> int | None:
    """The longest block of time, a power of two times `TILE_ROWS`, that ``fits(rows)``."""
    rows = TILE_ROWS
    while rows < min(longest, out_time):
        rows *= 2
    while rows >= TILE_ROWS and not fits(rows):
        rows //= 2
    return rows if rows >= TILE_ROWS else None
