"""oneDNN's convolution, as `conv_pallas.kernels.onednn` calls it, at random geometry.

    python -m tests.onednn_random --seed 0 --minutes 10

As `tests.triton_random` for the Triton kernels. A mistake in such a call may end the process: then
the seed told last is the one.
"""

import contextlib
import dataclasses
import random
import sys
from unittest import mock

import jax
import jaxlib.version

from conv_pallas import _host
from conv_pallas.kernels import onednn
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


def main(arguments: list[str]) -> int:
    """As `random_layers.main`; with whichever jaxlib is here, and 1 as well where nothing ran."""
    came = []

    def run(fused: Fused, where: str) -> str:
        came.append("empty" if fused.problem().empty else alone("onednn", fused))
        return came[-1]

    about, version = __doc__.splitlines()[0], jaxlib.version.__version__
    with mock.patch.object(onednn, "TRIED", (*onednn.TRIED, version)):
        status = random_layers.main(about, draw, somewhere, run, alone, arguments)
    print(f"jaxlib {version}, {_host.processor()}, {came.count('right')} right")
    return status or int("right" not in came)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main(sys.argv[1:]))
