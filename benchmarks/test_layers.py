"""Layers under pytest-benchmark, to store and to compare runs.

    pytest benchmarks/ [--layers TEXT] [--benchmark-json PATH] [--benchmark-compare]

One variant after the other: for a ratio that drift can't spoil, where both take turns, run
``python -m benchmarks.layer_sweep``.
"""

import jax
import pytest
from flax import nnx

from benchmarks.layers import LAYERS, quick
from conv_pallas import _layers, _measure
from conv_pallas.nn import Conv


def pytest_generate_tests(metafunc):
    text = metafunc.config.getoption("--layers", None)
    try:
        layers = quick() if not text else LAYERS if text == "all" else _layers.select(text, LAYERS)
    except ValueError as e:
        raise pytest.UsageError(str(e)) from None
    metafunc.parametrize("layer", layers, ids=lambda layer: layer.name)


@pytest.mark.parametrize("which", _measure.PASSES)
@pytest.mark.parametrize("variant", [_measure.STOCK, _measure.OURS])
def test_layer(benchmark, request, layer, which, variant):
    layer = _layers.fit(layer, jax.default_backend())
    if variant == _measure.STOCK:
        implementation, module = "nnx.Conv", layer.build(nnx.Conv)
    else:
        implementation = request.config.getoption("--implementation", None)
        module = layer.build(Conv, implementation=implementation)
    program = _measure.prepare(layer, which, module, *_measure.inputs(layer))
    benchmark.group = f"{layer.name}, {which} ({layer})"
    benchmark.extra_info |= {
        "implementation": implementation or "default",
        "pass": which,
        "layer": layer.name,
        "size": str(layer),
        **_measure.host(),
    }
    jax.block_until_ready(program())  # the first call is never like the others
    benchmark(lambda: jax.block_until_ready(program()))
    if benchmark.stats is not None:  # None where timing is off
        # Of a training step, both gradients cost what the forward pass costs.
        operations = 2 * layer.products * (1 if which == _measure.FORWARD else 3)
        benchmark.extra_info["GFLOP/s"] = operations / benchmark.stats.stats.median / 1e9
