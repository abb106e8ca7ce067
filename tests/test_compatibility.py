"""Our layers within what flax has to put layers into."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conv_pallas import conv_general_dilated
from conv_pallas.nn import TCN, Conv
from tests.streams import functions, numbers, stream
from tests.support import primitives_of

pytestmark = pytest.mark.usefixtures("hardly_optimized")

X = numbers(2, 12, 3)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_linen_convolutions():
    """`linen.Conv(conv_general_dilated=...)` runs our primitive, with linen's parameters."""
    make = functools.partial(nn.Conv, 4, (3,), kernel_dilation=2, padding="CAUSAL")
    stock, ours = make(), make(conv_general_dilated=conv_general_dilated)
    params = stock.init(jax.random.key(0), X)
    loss = lambda layer: jax.jit(  # noqa: E731
        jax.value_and_grad(lambda p: jnp.sum(jnp.sin(layer.apply(p, X))))
    )
    for a, b in zip(*(jax.tree.leaves(loss(m)(params)) for m in (ours, stock)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert "conv1d" in primitives_of(jax.make_jaxpr(lambda x: ours.apply(params, x))(X))


def test_bridge_to_linen_and_back():
    model = nnx.bridge.ToLinen(TCN, args=(3, [4], 2, 2, 0.0))
    variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)
    twin = TCN(3, [4], 2, 2, 0.0)
    nnx.update(twin, nnx.State(_values(variables["params"])))
    close(model.apply(variables, X), twin(X))

    ours = nn.Conv(4, (3,), padding="CAUSAL", conv_general_dilated=conv_general_dilated)
    back = nnx.bridge.lazy_init(nnx.bridge.ToNNX(ours, rngs=nnx.Rngs(0)), X)
    layer = Conv(3, 4, 3, padding="CAUSAL", rngs=nnx.Rngs(1))
    layer.kernel[...], layer.bias[...] = back.kernel[...], back.bias[...]
    close(back(X), layer(X))


def _values(tree):
    unbox = lambda p: p.value if hasattr(p, "value") else p  # noqa: E731
    return jax.tree.map(unbox, tree, is_leaf=lambda p: hasattr(p, "value"))


def test_in_a_sequential_with_norms():
    def make(conv):
        rngs = nnx.Rngs(0)
        return nnx.Sequential(
            conv(3, 4, 3, padding="CAUSAL", rngs=rngs),
            nnx.BatchNorm(4, rngs=rngs),
            nnx.relu,
            nnx.WeightNorm(
                conv(4, 2, 3, padding="CAUSAL", kernel_dilation=2, rngs=rngs), rngs=rngs
            ),
        )

    run = nnx.jit(lambda model, x: model(x))
    ours, stock = make(Conv), make(nnx.Conv)
    close(run(ours, X), run(stock, X))
    close(ours.layers[1].mean[...], stock.layers[1].mean[...])


def test_a_layer_in_flax_own_weight_norm_streams_once_normalized():
    """It writes the normalized kernel into the layer, which then is one like any other."""
    wrapped = nnx.WeightNorm(Conv(3, 4, 3, padding="CAUSAL", rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    expected = wrapped(X)
    layer = wrapped.layer_instance
    close(stream(functions(layer)[1], layer.init_state(2), X, [5, 7])[0], expected)
