"""XLA's own kernels of packed sequences, each output with taps of its own."""

import dataclasses

import jax
import pytest

from conv_pallas.kernels import xla
from tests import packed
from tests.triton_cases import PACKED

CASES = [
    dataclasses.replace(case, platform=platform)
    for platform in ("cpu", "rocm")
    for case in PACKED
    if case.problem().depthwise or (platform == "cpu" and case.case.G == 1)
]


@pytest.mark.sampled
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.platform}")
def test_case(case):
    packed.check(xla.KERNEL, case, jax.jit)


def test_what_is_declined():
    """Of dense layers and groups the composition has as much."""
    others = [case for case in PACKED if not case.problem().depthwise]
    assert all(xla.KERNEL.decline_packed(case.problem()) for case in others)
