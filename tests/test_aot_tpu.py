"""The TPU kernels, compiled by libtpu for chips that are not here."""

import dataclasses

import jax
import pytest

pytest.importorskip("libtpu")

from benchmarks.layers import LAYERS
from conv_pallas import aot, conv1d

pytestmark = pytest.mark.aot

# Of each model the layer with the most dilation: the longest halo.
LAST = {
    layer.model: layer
    for layer in LAYERS
    if layer.S == 1 and (layer.G == 1 or layer.G == layer.C == layer.O)
}
# Narrow, ragged, wide, with a halo longer than a tile, on the vector unit.
SPREAD = ("tcn-adding", "tcn-ptb-characters", "wavenet", "wide-and-long", "mamba-2.8b", "depthwise")


def _all_three(layer, implementation="pallas_tpu"):
    """``(x, kernel) -> (y, dx, dw)``."""

    def run(x, kernel):
        y, vjp = jax.vjp(
            lambda x, w: conv1d(
                x, w, padding=layer.padding, kernel_dilation=layer.D,
                feature_group_count=layer.G, implementation=implementation,
            ),
            x, kernel,
        )  # fmt: skip
        return y, *vjp(y)

    return run


def _structs(layer):
    return (
        aot.struct((layer.N, layer.T, layer.C), layer.dtype),
        aot.struct((layer.K, layer.C // layer.G, layer.O), layer.dtype),
    )


def _kernels(compiled) -> int:
    """How many Pallas kernels the program has."""
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


@pytest.mark.parametrize(
    "chip, model",
    [("v5e", model) for model in LAST]
    + [(chip, model) for chip in aot.TPUS if chip != "v5e" for model in SPREAD],
)
def test_published_layers_compile(chip, model):
    layer = LAST[model]
    compiled = aot.compile_for(chip, _all_three(layer), *_structs(layer))
    assert _kernels(compiled) == 3


@pytest.mark.parametrize("precision", ["high", "highest"])
@pytest.mark.parametrize("chip", ["v4", "v6e"])
def test_float32_products_compile(chip, precision):
    layer = dataclasses.replace(LAST["tcn-music"], dtype="float32")
    with jax.default_matmul_precision(precision):
        compiled = aot.compile_for(chip, _all_three(layer), *_structs(layer))
    assert _kernels(compiled) == 3
