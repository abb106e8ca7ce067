"""XLA's own kernels of packed sequences, each output with taps of its own."""

import dataclasses

import jax
import pytest

from conv_pallas.kernels import xla
from tests import packed
from tests.triton_cases import PACKED


@pytest.mark.sampled
@pytest.mark.parametrize("platform", ["cpu", "rocm"])
@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
def test_case(case, platform):
    packed.check(xla.KERNEL, dataclasses.replace(case, platform=platform), jax.jit)
