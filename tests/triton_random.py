"""Geometry at random for the Triton kernels, on Triton's interpreter.

    python -m tests.triton_random --seed 0 --minutes 10

The cases of `tests.triton_cases` are what somebody thought of; this is for what nobody did. Each
seed is a layer, a tile and a chip, of which all operations run, and the fused ones; the line of one
that fails tells its seed, and ``--seed SEED --cases 1`` repeats it; ``--kernel FILE`` is for an
added kernel.
"""

import contextlib
import os
import random
import sys
from unittest import mock

os.environ |= {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}  # before both are imported

from conv_pallas import _tuning_gpu, dispatch
from conv_pallas.kernels import (
    triton_compat,
    triton_depthwise,
    triton_tuned,
)
from conv_pallas.spec import OPERATIONS
from tests import added_kernels, triton_guarded
from tests.cases import Case
from tests.random_layers import check_fused, draw, main
from tests.triton_epilogue import Fused
from tests.triton_shipped import check_operation

# Small tiles, of which a layer has several: see `conv_pallas._tuning_gpu`.
WALKED = ((4, 16, 16, 1), (2, 16, 8, 2), (2, 32, 8, 1), (1, 16, 4, 1))
MANY_TAPS = ((4, 16, 5, 1), (2, 16, 16, 1), (4, 16, 11, 1))


@contextlib.contextmanager
def somewhere(r: random.Random, case: Case):
    """On one of the chips, with a tile of some sort; yields both."""
    tiles = _tuning_gpu.DENSE_TILES + 4 * _tuning_gpu.FEW_TILES
    if case.problem("conv1d").depthwise:
        tiles = WALKED if case.K <= 8 else MANY_TAPS
    tile = r.choice((None, r.choice(tiles)))
    capability, few = r.choice((80, 90, 90, 100)), r.choice((0, 0, 1, 2))
    uncached = r.random() < 0.2
    with contextlib.ExitStack() as stack:
        patch = lambda *how: stack.enter_context(mock.patch.object(*how))  # noqa: E731
        patch(triton_compat, "compute_capability", lambda: capability)
        if tile is not None:
            stack.enter_context(triton_tuned.trial(tile))
        if few:  # programs that stay, so that each has several tiles
            patch(triton_compat, "processors", lambda: few)
        if uncached:  # a halo that no cache holds
            patch(triton_depthwise, "L2_BYTES", 0)
        yield f"sm_{capability}, tile {tile}{', few programs' * bool(few)}{', no cache' * uncached}"


def run(fused: Fused, where: str) -> str:
    for operation in OPERATIONS:
        check_operation(fused.case, operation)
    if fused.case.out_dtype is None and any(fused.wanted):
        check_fused(fused, dispatch.select(fused.problem(), ("triton",)))
    return "right"


def alone(file: str, fused: Fused) -> str:
    with mock.patch.object(triton_compat, "call", triton_guarded.call_in_jax):
        return added_kernels.came_of(file, "cuda", fused, triton_guarded.eagerly)


if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0], draw, somewhere, run, alone, sys.argv[1:]))
