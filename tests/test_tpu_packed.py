"""The dense TPU kernel of packed sequences, interpreted on the CPU with race detection."""

import dataclasses
import functools

import pytest

from conv_pallas.kernels import tpu_dense, tpu_matmul
from conv_pallas.kernels.tpu_in_place import gradient_in_place, placement
from conv_pallas.kernels.tpu_window import Chip, Walk
from tests import packed
from tests.cases import Case
from tests.tpu_interpreter import MEGACORE, V5E, fresh_interpreter, params
from tests.triton_epilogue import Fused

__all__ = ["fresh_interpreter"]  # a fixture
pytestmark = pytest.mark.usefixtures("hardly_optimized")

SMALL = dataclasses.replace(V5E, vmem=2**21)
CASES = (
    Fused(Case("causal", T=41, C=24, O=40, D=5), "silu"),
    Fused(Case("bfloat16", T=70, C=128, O=136, D=3, dtype="bfloat16"), "relu"),
    Fused(Case("same", T=41, C=33, O=20, K=5, D=2, padding="SAME", precision="highest"), None),
    Fused(Case("pad", T=41, C=24, O=24, K=2, D=3, padding=[(7, -4)], precision="high"), "tanh"),
    Fused(Case("anticausal", T=40, C=16, O=16, D=4, padding=[(0, 8)]), None),
    Fused(Case("taps", T=36, C=8, O=12, K=31, padding="SAME", dtype="bfloat16"), None),
    Fused(Case("halo_longer_than_tile", T=60, C=8, O=8, D=24), None, wanted=(False, True, False)),
    Fused(Case("whole", T=48, C=8, O=8, K=4), None, bias=False),
    Fused(Case("bias", T=20, C=8, O=8), "silu", wanted=(False, False, True)),
)


@pytest.mark.sampled
@pytest.mark.parametrize("chip", [V5E, SMALL, MEGACORE], ids=["v5e", "small", "megacore"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case, chip):
    _check(case, chip, 16)


def test_what_else_would_be_multiplied_where_it_arrives():
    case = Fused(Case("in_place", T=64, C=128, O=128, D=5, dtype="bfloat16"), None)
    forward = case.problem()
    walk = Walk.of(forward.spec, 32)
    assert placement(walk, 128, 128) == "causal"
    assert gradient_in_place(walk, forward.lhs_dtype, 128, 128, V5E.mxu)
    _check(case, V5E, 32)


def test_a_tile_in_chunks(monkeypatch):
    """Each has its own part of the tile's bits."""
    monkeypatch.setattr(tpu_matmul, "CHUNKS", (128,))
    monkeypatch.setattr(tpu_matmul, "CODE", 1)
    _check(Fused(Case("chunks", T=300, C=8, O=8, D=3), None), V5E, 256)


def _check(case: Fused, chip: Chip, longest: int) -> None:
    case = dataclasses.replace(case, platform="tpu")
    how = dict(chip=chip, longest=longest, interpret=params(chip.cores))
    kernel = dataclasses.replace(
        tpu_dense.KERNEL,
        packed=functools.partial(tpu_dense.packed, **how),
        packed_backward=functools.partial(tpu_dense.packed_backward, **how),
        decline_packed=lambda problem: None,
    )
    packed.check(kernel, case)
