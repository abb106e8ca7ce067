"""Geometry at random for the TPU kernels, interpreted on the CPU with race detection.

    python -m tests.tpu_random --seed 0 --minutes 10

As `tests.triton_random` for the others: each seed is a layer, a chip and the longest tile, of which
every kernel that does not decline runs all operations, or the fused ones; the line of one that
fails tells its seed, and ``--seed SEED --cases 1`` repeats it. ``--kernel FILE`` is for an added
kernel.
"""

import contextlib
import dataclasses
import functools
import random
import sys
from unittest import mock

import jax
from jax.experimental.pallas import tpu as pltpu

from conv_pallas.kernels import tpu_dense, tpu_depthwise, tpu_matmul, tpu_time_in_lanes
from conv_pallas.kernels.tpu_window import LANES, TILE_ROWS, Chip
from conv_pallas.spec import OPERATIONS
from tests import added_kernels, random_layers
from tests.cases import Case
from tests.tpu_interpreter import check_kernel, params, raced, unable
from tests.triton_epilogue import Fused

# The least of them has channels in tiles, where it has room for a layer at all.
VMEM = tuple(n * 2**10 for n in (131072, 16384, 2048, 1500, 1000, 700, 500))
MOST_READS = 50  # of a tile by a tap: the interpreter takes milliseconds for each


def draw(r: random.Random) -> Case:
    """A layer that a kernel takes, mostly: there is none for strides, nor for input dilation."""
    case = random_layers.draw(r)
    changes = dict(batch=(r.choice((1, 2, 3, 4, 6)),))
    if r.random() < 0.95:
        changes |= dict(S=1, E=1, dtype="float32" if case.dtype == "float32" else "bfloat16")
    if r.random() < 0.4:  # taps that are read in place, mostly in whole tiles
        lanes = LANES, LANES, 2 * LANES
        changes |= dict(G=1, C=r.choice(lanes), O=r.choice((40, *lanes)), K=r.choice((1, 2, 3, 4)))
        changes |= dict(D=r.choice((1, 2, 5, 8)), T=32 * r.randint(1, 4) - r.choice((0, 0, 9)))
        changes |= dict(padding="CAUSAL", dtype="bfloat16", precision=None)
    if r.random() < 0.1:  # padding far beyond any tap, or as far cropped
        changes["padding"] = [(r.randint(-case.T, 300), r.randint(-case.T, 300))]
    return dataclasses.replace(case, **changes)


@dataclasses.dataclass(frozen=True)
class Where:
    """A chip, the longest tile, of time along rows and along lanes, and whether to fuse."""

    chip: Chip
    longest: int
    lanes: int
    fuse: bool


@contextlib.contextmanager
def somewhere(r: random.Random, case: Case):
    """On one of the chips, with tiles of some length."""
    chip = Chip(r.choice(VMEM), r.choice((128, 256)), r.choice((1, 2)), r.choice((None, "v6e")))
    longest, reads = r.choice((16, 32, 64, 128)), case.batch[0] * case.spec.out_time * case.K
    while reads > MOST_READS * longest:
        longest *= 2
    with contextlib.ExitStack() as stack:
        patch = lambda *how: stack.enter_context(mock.patch.object(*how))  # noqa: E731
        patch(Chip, "current", lambda: chip)
        if r.random() < 0.2:  # two products in a tile, as of many channels
            patch(tpu_matmul, "CHUNKS", (max(longest // 2, TILE_ROWS),))
            patch(tpu_matmul, "CODE", 0)
        yield Where(chip, longest, LANES * r.choice((1, 1, 1, 4)), r.random() < 0.5)


def run(fused: Fused, where: Where) -> str:
    fused, chip = dataclasses.replace(fused, platform="tpu"), where.chip
    came, problem = "declined", fused.problem()
    if problem.empty:  # which no kernel is asked for
        return "empty"
    pltpu.reset_tpu_interpret_mode_state()  # of what the seed before left where it raised
    for module in (tpu_dense, tpu_depthwise, tpu_time_in_lanes):
        longest = where.lanes if module is tpu_time_in_lanes else where.longest
        if where.fuse and fused.case.out_dtype is None and unable(module, problem) is None:
            options = dict(longest=longest, interpret=params(chip.cores))
            hooks = ((name, getattr(module.KERNEL, name)) for name in ("fused", "backward"))
            own = {name: functools.partial(hook, **options) for name, hook in hooks}
            random_layers.check_fused(fused, dataclasses.replace(module.KERNEL, **own))
            came = "right"
            continue
        for operation in OPERATIONS:
            one = fused.case.problem(operation, "tpu")
            if unable(module, one) is None:
                module.KERNEL.describe(one)
                check_kernel(module, fused.case, operation, chip, longest)
                came = "right"
    assert not raced()
    return came


def alone(file: str, fused: Fused) -> str:
    with added_kernels.interpreted(True):
        return added_kernels.came_of(file, "tpu", fused, added_kernels.compiled)


main = functools.partial(random_layers.main, __doc__.splitlines()[0], draw, somewhere, run, alone)

if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", True)  # each program runs once
    sys.exit(main(sys.argv[1:]))
