"""Streams of layers with a stride, down and up: a codec, of which a vocoder is one half."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conv_pallas.nn import Conv, ConvTranspose, compiled_step
from tests.streams import numbers, stream

pytestmark = pytest.mark.usefixtures("hardly_optimized")

DOWN = functools.partial(Conv, padding="CAUSAL", rngs=nnx.Rngs(0))
UP = functools.partial(ConvTranspose, padding="CAUSAL", rngs=nnx.Rngs(1))

# Taps that fill a stride, that are more, that are fewer; with a dilation; pointwise.
GEOMETRY = [(4, 2, 1), (5, 3, 1), (2, 4, 1), (3, 2, 4), (3, 3, 2), (1, 2, 1), (7, 1, 3)]


def _call(layer):
    """The whole pass and the step, with bias and activation; compiled, which is quicker."""
    layer.bias[...] = numbers(6, seed=2)
    whole = functools.partial(layer, activation="silu")
    return jax.jit(whole), jax.jit(functools.partial(layer.step, activation="silu"))


@pytest.mark.sampled
@pytest.mark.parametrize("K, S, D", GEOMETRY)
def test_down(K, S, D):
    layer = DOWN(4, 6, K, S, kernel_dilation=D, feature_group_count=1 + K % 2)
    whole, step = _call(layer)
    x, mask = numbers(2, 12 * S, 4), jnp.arange(12 * S) % 5 != jnp.array([[1], [3]])
    want = whole(x, mask=mask)
    for chunks in ([S] * 12, [12 * S], [7 * S, S, 4 * S]):
        got, _ = stream(step, layer.init_state(2), x, chunks, mask=mask)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.sampled
@pytest.mark.parametrize("K, S, D", GEOMETRY)
def test_up(K, S, D):
    layer = UP(6, 6, K, S, kernel_dilation=D, transpose_kernel=K % 2 == 1)
    whole, step = _call(layer)
    x, mask = numbers(2, 12, 6), jnp.arange(12) % 5 != jnp.array([[1], [3]])
    want = whole(x, mask=mask)
    assert want.shape[1] == 12 * S
    for chunks in ([1] * 12, [12], [7, 1, 4]):
        got, _ = stream(step, layer.init_state(2), x, chunks, mask=mask)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_numbers_that_pad_as_causal_does():
    x = numbers(1, 12, 4)
    down = DOWN(4, 6, 5, 2, kernel_dilation=2, padding=[(8, 0)])
    got, _ = stream(jax.jit(down.step), down.init_state(1), x, [2, 10])
    np.testing.assert_allclose(got, down(x), rtol=1e-5, atol=1e-5)
    up = UP(4, 6, 5, 2, kernel_dilation=2, padding=[(8, 1)])
    got, _ = stream(jax.jit(up.step), up.init_state(1), x, [2, 10])
    np.testing.assert_allclose(got, up(x), rtol=1e-5, atol=1e-5)


class Codec(nnx.Module):
    """Eight steps to one, and back."""

    def __init__(self):
        down = [DOWN(3, 8, 4, 2), DOWN(8, 8, 8, 4)]
        up = [UP(8, 8, 8, 4), UP(8, 3, 4, 2)]
        self.layers = nnx.List([*down, DOWN(8, 8, 3, kernel_dilation=2), *up])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x, activation="tanh")
        return x

    def init_state(self, batch_size):
        return [layer.init_state(batch_size) for layer in self.layers]

    def step(self, x, state):
        after = []
        for layer, own in zip(self.layers, state, strict=True):
            x, own = layer.step(x, own, activation="tanh")
            after.append(own)
        return x, after

    def reset(self, state, members):
        return [layer.reset(own, members) for layer, own in zip(self.layers, state, strict=True)]


def test_a_codec_streams():
    codec = Codec()
    x = numbers(2, 64, 3)
    want = jax.jit(codec)(x)
    step = compiled_step(codec)  # whose state is donated
    for chunks in ([8] * 8, [24, 40]):
        got, _ = stream(step, codec.init_state(2), x, chunks)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_members_restart_one_by_one_without_a_trace():
    codec = Codec()
    x = numbers(2, 32, 3)
    step = jax.jit(codec.step)
    _, state = step(x.at[0].set(jnp.nan), codec.init_state(2))
    got, _ = step(x, codec.reset(state, jnp.array([True, False])))
    np.testing.assert_allclose(got[0], codec(x)[0], rtol=1e-5, atol=1e-5)
    longer = codec(jnp.concatenate([x, x], 1))[1, 32:]
    np.testing.assert_allclose(got[1], longer, rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_the_state():
    codec = Codec()
    x = numbers(1, 32, 3)

    def chunked(codec, x):
        first, state = codec.step(x[:, :8], codec.init_state(1))
        return jnp.sum(jnp.sin(jnp.concatenate([first, codec.step(x[:, 8:], state)[0]], 1)))

    gradients = lambda f: nnx.jit(nnx.grad(f, argnums=(0, 1)))(codec, x)  # noqa: E731
    want = gradients(lambda codec, x: jnp.sum(jnp.sin(codec(x))))
    got = gradients(chunked)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [DOWN, UP])
def test_the_state_has_the_dtype_that_is_computed_in(make):
    layer = make(3, 4, 4, 2)
    narrow = numbers(1, 4, 3).astype(jnp.bfloat16)
    y, state = layer.step(narrow, layer.init_state(1, jnp.bfloat16))
    assert y.dtype == state["past"].dtype == jnp.float32  # the parameters'
    layer.dtype = jnp.bfloat16
    y, state = layer.step(narrow, layer.init_state(1))
    assert y.dtype == state["past"].dtype == jnp.bfloat16


LATER = "only a causal layer can stream: padding must be CAUSAL or "


@pytest.mark.parametrize("call, message", [
    (lambda: DOWN(3, 4, 4, 2, padding="SAME").init_state(1), LATER + "[(3, 0)]; got 'SAME'"),
    (lambda: DOWN(3, 4, 4, 2, padding=[(2, 1)]).init_state(1), LATER + "[(3, 0)]; got [(2, 1)]"),
    (lambda: DOWN(3, 4, 4, 2).step(numbers(1, 3, 3), DOWN(3, 4, 4, 2).init_state(1)),
     "x must have a multiple of strides=2 steps, got 3"),
    (lambda: DOWN(3, 4, 4, 2).step(numbers(1, 4, 3), DOWN(3, 4, 4, 2).init_state(1),
                                   segment_ids=jnp.zeros((1, 4), int)),
     "segment_ids need strides=1, got strides=2"),
    (lambda: DOWN(3, 4, 4, input_dilation=2, padding=[(3, 0)]).init_state(1),
     "only a layer with input_dilation=1 can stream, or a ConvTranspose; got input_dilation=2"),
    (lambda: UP(3, 4, 4, 2, padding="SAME").init_state(1), LATER + "[(3, 1)]; got 'SAME'"),
    (lambda: UP(3, 4, 1, 2, padding="CIRCULAR").init_state(1), LATER + "[(0, 1)]; got 'CIRCULAR'"),
    (lambda: UP(3, 4, (4, 4), 2, padding="SAME").init_state(1), "only a 1-D layer can stream"),
    (lambda: UP(3, 4, 4, 2).step(numbers(1, 4, 5), UP(3, 4, 4, 2).init_state(1)),
     "x must be a chunk of shape (1, steps, 3), got (1, 4, 5)"),
    (lambda: UP(3, 4, 4, 2).step(numbers(1, 4, 3), UP(3, 4, 9, 2).init_state(1)),
     "state must be of this layer, from its init_state: of 1 rows of 3 channels, got 4 of 3"),
    (lambda: UP(3, 4, 4, 2).step(numbers(1, 4, 3), UP(3, 4, 4, 2).init_state(1), mask=jnp.ones(4)),
     "mask must be bool of shape (1, 4)"),
    (lambda: UP(3, 4, 4, 2).init_state(0), "batch_size must be an int of 1 or more"),
])  # fmt: skip
def test_errors_in_one_line(call, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        call()
    assert "\n" not in str(error.value)
