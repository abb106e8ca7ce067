"""Which tiles the dense Triton kernels work in: tuned where measured, else by a heuristic."""

import dataclasses
import math

import numpy as np
import triton

from conv_pallas.kernels import triton_compat
from conv_pallas.kernels import triton_tuned as tuned
from conv_pallas.kernels.triton_common import MOST_SPLITS, Phases

# Of a processor of Hopper or data-centre Blackwell; each program costs 1 KiB on top of its own.
SHARED_BYTES = 228 * 2**10
LARGEST = 128 * 256  # sums of one tile
# The names of kernels in what is tuned; an input gradient reads the kernel in another order.
FORWARD, INPUT_GRAD = "conv_dense", "conv_dense_input_grad"
KERNEL_GRAD = "conv_dense_kernel_grad"


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes: ``rows`` of time, ``columns`` of channels out, ``depth`` of the inner sum.

    For the kernel gradient ``rows`` are channels in and ``depth`` is time.

    Attributes:
      resident: programs on each processor that stay and take one tile after the other, as in
        `triton_resident`; 0: a program for each tile.
      taps: of the kernel gradient, how many of them a program has; without strides, input dilation
        and programs that stay.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    resident: int = 0
    taps: int = 1


def configure(
    kernel: str, rows: int, columns: int, depth: int, *, taps: int, phases: Phases, count: int,
    dtype: np.dtype, precision: str, tma: bool, untuned: Config | None = None, keep: bool = False,
    saved: bool = False, tight: bool = False, stay: bool = False, pointers: bool = False,
) -> Config:  # fmt: skip
    """A tuned tile, or a heuristic: as large as registers and shared memory allow.

    Args:
      kernel: `FORWARD`, `INPUT_GRAD` or `KERNEL_GRAD`.
      rows, columns, depth: sizes of one group's matmul.
      taps, phases: what else tells what is tuned apart.
      count: how many matmuls of that size there are.
      dtype: of a factor.
      untuned: what to take instead of the heuristic.
      keep: whether there are two results. Registers spill then in the largest tiles (sm_90a and
        sm_100a); where a processor has one at most, two of half the size take as long.
      saved: whether an activation's derivative is computed from what is fetched beside a factor:
        the rows, or in the kernel gradient the columns.
      tight: whether something else takes registers that the largest tiles need: the addresses of
        rows that are no multiple of 16 bytes, or an error function.
      stay: whether programs may stay on their processor, and go from tile to tile.
      pointers: whether a factor is fetched by pointers.
    """
    how = (precision,) if phases == Phases(1, 1, 1) else (precision, str(phases))
    if saved:  # a tile that was tuned without may not fit beside what that takes
        how = (*how, "derivative")
    tile = tuned.lookup(tuned.key(kernel, (rows, columns, depth, taps), dtype.name, *how))
    if tile is not None:
        return Config(*tile)
    if untuned is not None:
        return untuned
    itemsize = dtype.itemsize
    # A B200 spills in some larger tiles, and what an H200 was measured to like says nothing of it.
    blackwell = (triton_compat.compute_capability() or 90) >= 100
    few = max(columns, rows if kernel == KERNEL_GRAD else depth) <= 32  # channels
    chip = triton_compat.processors()
    short = 4 * count * triton.cdiv(rows, 64) * triton.cdiv(columns, 64) <= chip
    if itemsize == 4 and precision == "ieee":
        # No tensor cores: each thread keeps its share of both tiles in registers.
        limit = Config(64, 64, 16, 8, 2)
    elif itemsize == 4 and precision == "tf32x3":
        limit = Config(128 if tma else 64, 64, 32, 8, 2)
    elif itemsize == 4 and tma and not blackwell and pointers and few:
        # As below: values that are fetched by pointers are rounded in registers.
        limit = Config(32, 32, 32, 1, 3 if kernel == KERNEL_GRAD else 4)
    elif itemsize == 4 and tma and not blackwell and kernel == KERNEL_GRAD and not pointers:
        # The tensor cores of Hopper take float32 only with the sum's axis last: to be so, both
        # factors went through registers back to shared memory (1160 us on an H200 where these
        # tiles take 333: 512 channels, K = 3, 2^15 steps). Those of Ampere take it from registers,
        # and Triton uses them where there are less than four warps.
        limit = Config(64, 64, 32, 1, 3)
    elif itemsize == 4 and tma and not blackwell and pointers and short and not saved:
        # More programs, and fewer rounds that wait for memory. Of a kernel that is read as it lies
        # a tile's rows are short, and few of them better: 256 steps of 150 channels and 5 taps
        # take 11.4 us, 14.7 twice as deep, and 12.3 so with the kernel transposed before.
        limit = Config(32, 32, 64 if kernel == FORWARD else 128, 4, 3)
    elif itemsize == 4 and tma and not blackwell and kernel == FORWARD and few:
        # By two warps, for which no kernel is transposed before: see `takes_last_axis_alone`. So
        # eight groups of 32 channels and three taps take 5.6 us, by four warps 6.6; 32 channels of
        # 11 taps 31 and 33, of 41 taps 89 and 88.
        limit = Config(128, 32, 32, 2, 3)
    elif itemsize == 4 and tma and not blackwell and kernel != KERNEL_GRAD:
        limit = Config(128, 256, 32, 8, 4)
    elif itemsize == 4:
        # The kernel gradient's operands go through registers, as tensor cores take float32 only
        # with the sum's axis last: a second program on a processor multiplies meanwhile.
        # 96 of the 99 KiB that chips such as sm_86 and sm_120 have.
        limit = Config(128, 128, 32, 8, 3)
    elif tma and keep and not tight:
        limit = Config(128, 128, 64, 8, 3)
    elif not blackwell and stay and not saved and not tight:
        # Two on each, as `triton_resident.conv_onward`: while one stores, the other multiplies.
        limit = Config(128, 128, 64, 4, 3, 2)
    elif tma:
        # What a derivative is computed from has no room beside 256 columns, nor some derivatives
        # registers.
        limit = Config(128, 128 if saved and kernel == KERNEL_GRAD else 256, 64, 8, 4)
    else:
        limit = Config(128, 128, 32, 8, 3)  # 48 KiB: also where shared memory is scarce
    if tight:
        most = 64 if keep and itemsize == 2 else 128
        limit = dataclasses.replace(limit, columns=min(limit.columns, most))
    floor = 16
    within = lambda size, limit: min(limit, max(floor, triton.next_power_of_2(size)))  # noqa: E731
    bt, bo = within(rows, limit.rows), within(columns, limit.columns)
    bc = within(depth, limit.depth)
    # Two tiles of half the size take a processor as long, and fetch more. So smaller ones only
    # where each of them gets a processor of its own.
    tiles = lambda bt, bo: count * triton.cdiv(rows, bt) * triton.cdiv(columns, bo)  # noqa: E731
    while bo > 64 and (2 if bt * bo < LARGEST or not keep else 1) * tiles(bt, bo) <= chip:
        bo //= 2
    while bt > 64 and 2 * tiles(bt, bo) <= chip:
        bt //= 2
    half, whole = (triton.cdiv(columns, n) * n for n in (128, 256))
    if bo == 256 and half < whole and kernel != KERNEL_GRAD:
        # Up to a third fewer products, each of which takes up to 5 % longer: 512 channels take 83.2
        # us with half and 83.5 with all on an H200 in bfloat16, 173 and 165 in float32.
        bo = 128
    warps = min(limit.warps, 8 if bt * bo >= 128 * 128 else 4)
    if precision == "tf32x3" and tight and bt * bo >= 64 * 64:
        warps = 8  # with four the addresses spill
        if saved and kernel == KERNEL_GRAD and triton_compat.VERSION < (3, 9):
            bc = min(bc, 16)  # for triton 3.6, which spills then too (sm_80); 3.9 doesn't
    if keep and tight and itemsize == 2 and bo == 64:
        warps = 8  # with four it would spill again
    if saved and tight and not tma and itemsize == 2 and kernel != KERNEL_GRAD:
        warps = 8  # each thread's share of two tiles that come a number at a time spilled (sm_80)
    # Who stays gains nothing where each has one tile.
    resident = limit.resident if tiles(bt, bo) > limit.resident * chip else 0
    config = Config(bt, bo, bc, warps, limit.stages, resident)
    if config.stages > 3 and kernel != KERNEL_GRAD:
        # A stage less where that makes room for one more program, whose loads count as well and
        # which multiplies while another begins or stores, and where there are tiles for it.
        less = dataclasses.replace(config, stages=config.stages - 1)
        now, then = (_in_shared(c, itemsize, kernel, saved) for c in (config, less))
        if then > now and tiles(bt, bo) > now * chip:
            return less
    return config


def _in_shared(config: Config, itemsize: int, kernel: str, saved: bool = False) -> int:
    """For how many programs at a time a processor has shared memory.

    Of what is fetched by pointers, as the factor with a derivative and what that is computed from
    are, Triton keeps a stage less; and the kernel gradient keeps the product beside them.
    """
    rows, columns, stages = config.rows * config.taps, config.columns, config.stages
    if saved and kernel == KERNEL_GRAD:
        columns = columns * 2 * (stages - 1) + columns
        rows *= stages
    elif saved:
        rows *= 2 * (stages - 1)
        columns *= stages
    else:
        rows, columns = rows * stages, columns * stages
    return SHARED_BYTES // (itemsize * config.depth * (rows + columns) + 1024)


def takes_last_axis_alone(config: Config) -> bool:
    """Whether float32 must lie with the axis last that is summed over, on Hopper and newer.

    The instructions that came with Hopper take it from shared memory as it lies, and Triton uses
    them where there are four warps and 64 rows; those of Ampere take it from registers.
    """
    return config.warps >= 4 and config.rows >= 64


def room(config: Config, itemsize: int, precision: str, saved: bool) -> int:
    """For how many programs of the kernel gradient a processor has room, and use.

    Args:
      saved: whether an activation's derivative is computed from what is fetched beside gy.
    """
    if precision != "tf32":
        return 1  # which has all the registers, and more to compute than to wait for
    # Of registers there are enough for 16 warps, with 128 a thread.
    return max(1, min(16 // config.warps, _in_shared(config, itemsize, KERNEL_GRAD, saved)))


def choose_splits(
    tiles: int, blocks: int, outputs: int, config: Config, itemsize: int, together: int
) -> int:
    """How many partial sums take the least time, by an estimate and not by a measurement.

    More of them fill the chip, and write and read more partial results. As many programs as are
    ``together`` on a processor share it, and one alone is taken for no faster than it is among
    them: it waits for its own loads and products.
    """
    together_on_chip = together * triton_compat.processors()
    # One processor's share of the tensor cores and of memory.
    rows = config.rows * config.taps
    products = rows * config.columns * config.depth
    moved = itemsize * config.depth * (rows + config.columns)
    block_seconds = together * max(2 * products / 5e12, moved / 3e10)
    partial_seconds = 2 * 4 * outputs / 4e12

    def seconds(splits: int) -> float:
        rounds = math.ceil(tiles * splits / together_on_chip)
        return rounds * math.ceil(blocks / splits) * block_seconds + splits * partial_seconds

    return min(range(1, min(blocks, MOST_SPLITS) + 1), key=seconds)
