"""Most layers for one TPU or another; `benchmarks.static_matrix` compiles each of them for all."""

import itertools

import pytest

pytest.importorskip("libtpu")

from benchmarks import static_matrix
from benchmarks.layers import LAYERS
from benchmarks.static_matrix import compiled, declined, distinct
from conv_pallas import aot

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("shipped")]

# Of those that differ in dilation alone the first and the last, which have the least and the most.
ALIKE = {}
for one in distinct([layer for layer in LAYERS if not declined(layer)], "bfloat16"):
    ALIKE.setdefault((one.model, one.C, one.O, one.K, one.G), []).append(one)
NATIVE = list(dict.fromkeys(layer for same in ALIKE.values() for layer in (same[0], same[-1])))
EACH = list(zip(NATIVE, itertools.cycle(aot.TPUS), strict=False))


@pytest.mark.sampled
@pytest.mark.parametrize(("layer", "chip"), EACH, ids=[f"{c}-{x.name}" for x, c in EACH])
def test_all_three_operations_compile(layer, chip):
    ((_, wrong, _),) = compiled(chip, [layer])
    assert wrong is None


def test_every_chip_meets_many_models():
    models = {layer.model for layer in NATIVE}
    for chip in aot.TPUS:
        assert len({layer.model for layer, c in EACH if c == chip}) > len(models) / 3


def test_what_does_not_compile_is_told(monkeypatch):
    layer = NATIVE[0]
    monkeypatch.setattr(static_matrix, "IMPLEMENTATION", "xla")
    ((_, wrong, _),) = compiled("v5e", [layer])
    assert wrong == "0 kernels instead of 3"
