"""A slice of `benchmarks.static_matrix`, which compiles every layer for every TPU."""

import itertools

import pytest

pytest.importorskip("libtpu")

from benchmarks import static_matrix
from benchmarks.layers import LAYERS
from benchmarks.static_matrix import compiled, declined, distinct
from conv_pallas import aot

pytestmark = pytest.mark.aot

NATIVE = distinct([layer for layer in LAYERS if not declined(layer)], "bfloat16")
# Far enough apart to meet most models, and each chip in turn.
SLICE = list(zip(NATIVE[4::11], itertools.cycle(aot.TPUS), strict=False))


@pytest.mark.parametrize(("layer", "chip"), SLICE, ids=[f"{c}-{x.name}" for x, c in SLICE])
def test_all_three_operations_compile(layer, chip):
    ((_, wrong, _),) = compiled(chip, [layer])
    assert wrong is None


def test_the_slice_is_wide():
    assert {chip for _, chip in SLICE} == set(aot.TPUS)
    assert len({layer.model for layer, _ in SLICE}) >= 5


def test_what_does_not_compile_is_told(monkeypatch):
    layer = NATIVE[0]
    monkeypatch.setattr(static_matrix, "IMPLEMENTATION", "xla")
    ((_, wrong, _),) = compiled("v5e", [layer])
    assert wrong == "0 kernels instead of 3"
