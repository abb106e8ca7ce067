"""The arithmetic of the Triton kernels, on Triton's interpreter in processes of their own."""

import subprocess
import sys

import pytest

from tests.triton_cases import NAMES

pytestmark = pytest.mark.aot

CHUNKS = 4  # so that several processors share the work


@pytest.mark.sampled
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_operation_is_right_on_the_interpreter(chunk):
    pytest.importorskip("jax_triton")
    names = NAMES[chunk::CHUNKS]
    run = subprocess.run(
        [sys.executable, "-m", "tests.triton_interpreter", *names],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    # None is left out by accident.
    assert all(f"PASS {name}" in run.stdout for name in names), run.stdout + run.stderr


def test_geometry_at_random_is_right():
    """A few seeds, so that the program stays whole."""
    pytest.importorskip("jax_triton")
    run = subprocess.run(
        [sys.executable, "-m", "tests.triton_random", "--seed", "336", "--cases", "12"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "seeds 336 to 347: " in run.stdout and "'right': 11" in run.stdout
