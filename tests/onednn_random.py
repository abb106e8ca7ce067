"""oneDNN's convolution, as `conv_pallas.kernels.onednn` calls it, at random geometry.

    python -m tests.onednn_random --seed 0 --minutes 10

As `tests.triton_random` for the Triton kernels. A mistake in such a call may end the process: then
the seed told last is the one.
"""

import contextlib
import dataclasses
import functools
import random
import sys

import jax

from tests import added_kernels, random_layers
from tests.cases import Case
from tests.triton_epilogue import Fused

PLATFORM = "cpu"


def draw(r: random.Random) -> Case:
    return dataclasses.replace(random_layers.draw(r), dtype="float32", out_dtype=None)


@contextlib.contextmanager
def somewhere(r: random.Random, case: Case):
    """Here; there is no choice."""
    print(f"\r{case.name}", end="", file=sys.stderr, flush=True)
    yield PLATFORM


def alone(file: str, fused: Fused) -> str:
    return added_kernels.came_of(
        file, PLATFORM, dataclasses.replace(fused, platform=PLATFORM), added_kernels.compiled
    )


def run(fused: Fused, where: str) -> str:
    return "empty" if fused.problem().empty else alone("onednn", fused)


main = functools.partial(random_layers.main, __doc__.splitlines()[0], draw, somewhere, run, alone)

if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main(sys.argv[1:]))
