"""Streams on a mesh of explicit axes, however layers, chunks, masks and segment ids are split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from conv_pallas.nn import Conv, ConvTranspose
from tests.streams import model_of, numbers, stream, with_tail

pytestmark = pytest.mark.usefixtures("hardly_optimized")

CHUNKS = [8, 2, 6]
CAUSAL = dict(padding="CAUSAL", rngs=nnx.Rngs(0))
LAYERS = {
    "strided": functools.partial(Conv, 4, 6, 5, 2, **CAUSAL),
    "up": functools.partial(ConvTranspose, 4, 6, 5, 2, **CAUSAL),
    "long_chunks": functools.partial(Conv, 4, 6, 3, **CAUSAL),
    "short_chunks": functools.partial(Conv, 4, 6, 3, kernel_dilation=32, **CAUSAL),
    "pointwise": functools.partial(Conv, 4, 6, 1, **CAUSAL),
}


@pytest.fixture(autouse=True)
def mesh():
    made = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(made):
        yield made


def split(a, mesh, *spec):
    return jax.device_put(a, NamedSharding(mesh, P(*spec)))


def split_outputs(model, mesh) -> None:
    """Each layer's outputs over an axis, as those are who split a model's channels."""
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.Conv | nnx.ConvTranspose) and layer.out_features % 2 == 0:
            layer.kernel.set_value(split(layer.kernel[...], mesh, None, None, "b"))
            if layer.bias is not None:
                layer.bias.set_value(split(layer.bias[...], mesh, "b"))


@pytest.mark.sampled
@pytest.mark.parametrize("spec", [P(None, "a"), P("a", None, "b")], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_chunks_split_along_any_dimension(name, spec, mesh):
    layer, x = LAYERS[name](), numbers(2, 16, 4)
    split_outputs(layer, mesh)
    expected = layer(split(x, mesh, *spec))
    step = jax.jit(lambda x, state: layer.step(split_inside(x, spec), state))
    got, _ = stream(step, layer.init_state(2), x, CHUNKS)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def split_inside(a, spec):
    return jax.sharding.reshard(a, spec)


@pytest.mark.sampled
@pytest.mark.parametrize("options", [
    {}, dict(lookahead=9, skip_connections=True), dict(dilations=(9, 2), norm="weight"),
], ids=str)  # fmt: skip
def test_a_network_whose_channels_are_split(options, mesh):
    model = model_of(**options)
    split_outputs(model, mesh)
    x, ids = numbers(2, 16, 3), jnp.asarray([[0] * 5 + [1] * 11, [3] * 16])
    mask = jnp.arange(16) < jnp.asarray([[16], [13]])
    sequences = dict(segment_ids=ids, mask=mask)
    expected = model(x, **sequences)
    longer, cut = with_tail(model.lookahead, x, **sequences)

    @jax.jit
    def step(x, state, segment_ids, mask):
        along_time = lambda a: split_inside(a, P(None, "a"))  # noqa: E731
        more = dict(segment_ids=along_time(segment_ids), mask=along_time(mask))
        return model.step(along_time(x), state, **more)

    # The chunks of a lookahead's end have to be of a length that divides, too.
    more = -longer.shape[1] % 2
    pad = lambda a: jnp.pad(a, ((0, 0), (0, more)) + ((0, 0),) * (a.ndim - 2))  # noqa: E731
    longer, cut = pad(longer), {name: pad(a) for name, a in cut.items()}
    chunks = [*CHUNKS, *([longer.shape[1] - 16] if longer.shape[1] > 16 else [])]
    got, _ = stream(step, model.init_state(2), longer, chunks, **cut)
    got = got[:, model.lookahead : model.lookahead + 16]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
