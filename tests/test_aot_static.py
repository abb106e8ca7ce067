"""What `benchmarks.static` reads from libtpu: a spill in a loop is seen, and ours have none."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("libtpu")

from benchmarks import static
from conv_pallas import schedule

pytestmark = pytest.mark.aot

# Of our programs those whose main loop keeps everything in registers, on the chips named.
CLEAN = {
    "bfloat16/C128/K3/D4 conv1d": ("v6e",),
    "bfloat16/C128/K3/D4 conv1d_input_grad": ("v6e",),
    "bfloat16/depthwise conv1d": ("v5e", "v6e"),
    "bfloat16/depthwise conv1d_input_grad": ("v5e", "v6e"),
}
LIVE = 96  # registers that the planted kernel keeps, where there are 64


def _planted():
    """A loop that carries more registers than there are: it has to spill."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    from conv_pallas.aot import struct

    def kernel(x_ref, y_ref):
        # Each sum needs every other one of the step before, so that none can be put off.
        def step(i, sums):
            x = x_ref[pl.ds(pl.multiple_of(i * 8, 8), 8)]
            return tuple(s * x + sums[j - 1] for j, s in enumerate(sums))

        sums = tuple(x_ref[pl.ds(8 * j, 8)] for j in range(LIVE))
        for j, s in enumerate(lax.fori_loop(0, 64, step, sums)):
            y_ref[0, pl.ds(8 * j, 8)] = s

    def f(x):
        return pl.pallas_call(
            kernel, grid=(4,), name="conv1d_planted",
            in_specs=[pl.BlockSpec((8 * LIVE, 128), lambda n: (n, 0))],
            out_specs=pl.BlockSpec((1, 8 * LIVE, 128), lambda n: (n, 0, 0)),
            out_shape=jax.ShapeDtypeStruct((4, 8 * LIVE, 128), jnp.float32),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        )(x)  # fmt: skip

    return f, (struct((4 * 8 * LIVE, 128), "float32"),)


def _main(folder: Path) -> dict:
    """By program and chip what is estimated; in a process of its own, for libtpu's flags."""
    found, layers = {}, {layer.name: layer for layer in static.BFLOAT16}
    for chip in ("v5e", "v6e"):
        rates = static.Chip.named(chip)
        chosen = {name: name.split() for name, chips in CLEAN.items() if chip in chips}
        programs = {
            name: static.single(layers[layer], operation, static.OURS)
            for name, (layer, operation) in chosen.items()
        }
        for name, program in (programs | {"planted": _planted()}).items():
            estimate = static.estimate(chip, rates, folder, program, 0)
            found[f"{chip} {name}"] = dataclasses.asdict(estimate)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    environment = os.environ | dict(
        JAX_PLATFORMS="cpu", LIBTPU_INIT_ARGS=schedule.DUMP_FLAGS.format(folder=folder)
    )
    ran = subprocess.run(
        [sys.executable, "-m", "tests.test_aot_static", str(folder)],
        env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_a_planted_spill_is_seen(found):
    for chip in ("v5e", "v6e"):
        assert found[f"{chip} planted"]["spills"] > 0


def test_no_spill_in_the_main_loops(found):
    for name, chips in CLEAN.items():
        for chip in chips:
            told = found[f"{chip} {name}"]
            assert told["bundles"] > told["length"] > 0  # there was a loop to look at
            assert told["spills"] == 0, (chip, name)


if __name__ == "__main__":
    print(json.dumps(_main(Path(sys.argv[1]))))
