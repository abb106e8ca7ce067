"""`ConvTranspose`: what it has beyond flax's, and that none of it multiplies zeros.

What it has in common with flax's is in `test_nnx_contract`.
"""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conv_pallas import conv1d, explain
from conv_pallas.nn import Conv, ConvTranspose
from conv_pallas.spec import ConvSpec
from tests.cases import CASES
from tests.reference import conv1d_reference
from tests.support import tree_close

X = np.random.default_rng(0).standard_normal((2, 9, 4), np.float32)


def _layer(*args, cls=ConvTranspose, **kwargs):
    return cls(*(args or (4, 6, 5, 3)), rngs=nnx.Rngs(0), **kwargs)


@pytest.mark.sampled
@pytest.mark.parametrize("K, S, D", [(5, 3, 1), (2, 4, 1), (3, 2, 4), (1, 3, 1), (4, 1, 2)])
@pytest.mark.parametrize("padding", ["CAUSAL", "causal"])
def test_causal(K, S, D, padding):
    """So many outputs for each step as the stride has, none of which sees a later one."""
    layer = _layer(4, 6, K, S, kernel_dilation=D, padding=padding)
    y = layer(X)
    assert y.shape == (2, 9 * S, 6)
    spec = ConvSpec(9, K, 1, ((K - 1) * D, S - 1), D, S)
    want = conv1d_reference(X, np.asarray(layer.kernel[...]), spec)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    later = layer(jnp.asarray(X).at[:, 5:].set(jnp.nan))
    assert jnp.isfinite(later[:, : 5 * S]).all() and jnp.isnan(later[:, 5 * S]).any()


@pytest.mark.parametrize("mode", ["same", "Valid", "circular", "causal"])
def test_paddings_in_any_case_by_any_implementation(mode):
    y = _layer(padding=mode)(X)
    np.testing.assert_array_equal(y, _layer(padding=mode.upper())(X))
    for name in ("xla", "xla_native"):
        tree_close(_layer(padding=mode, implementation=name)(X), y)
    with pytest.raises(NotImplementedError, match="'triton' can't run conv1d"):
        _layer(padding=mode, implementation="triton")(X)


@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("padding", ["SAME", "same", "VALID", "valid", "SAME_LOWER", "same_lower"])
def test_a_padding_that_flax_does_not_know_is_what_lax_makes_of_it_without_a_stride(padding, K):
    """`jax.lax` knows them in any case, as those of a convolution."""
    ours, stock = (
        _layer(4, 6, K, cls=cls, padding=padding) for cls in (ConvTranspose, nnx.ConvTranspose)
    )
    tree_close(ours(X), stock(X))
    tree_close(_layer(4, 6, K, padding=padding, implementation="xla_native")(X), stock(X))
    with (
        pytest.raises(ValueError, match="padding")
        if "LOWER" in padding.upper()
        else contextlib.nullcontext()
    ):
        _layer(4, 6, K, 2, padding=padding)(X)


@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR"])
def test_activation_and_mask(padding):
    layer = _layer(padding=padding)
    mask = np.arange(9) < [[9], [5]]
    dirty, clean = np.where(mask[..., None], X, np.nan), np.where(mask[..., None], X, 0)
    for activation in ("silu", jax.nn.silu):
        y = layer(jnp.asarray(dirty), activation=activation, mask=jnp.asarray(mask))
        tree_close(y, jax.nn.silu(layer(clean)))


def test_the_gradients_of_an_activation_are_stocks():
    ours, stock = (_layer(cls=cls, padding="VALID") for cls in (ConvTranspose, nnx.ConvTranspose))
    got = nnx.value_and_grad(lambda m, x: jnp.sum(jnp.sin(m(x, activation="tanh"))), argnums=(0, 1))
    want = nnx.value_and_grad(lambda m, x: jnp.sum(jnp.sin(jnp.tanh(m(x)))), argnums=(0, 1))
    tree_close(jax.tree.leaves(got(ours, X)), jax.tree.leaves(want(stock, X)))


def test_no_zero_is_multiplied_on_a_cpu():
    """Stock's has the input's dilation in all three operations, or its transpose."""

    def dilations(cls):
        graph, state = nnx.split(_layer(32, 32, 16, 8, padding=[(11, 11)], cls=cls))
        loss = lambda state, x: jnp.sum(nnx.merge(graph, state)(x) ** 2)  # noqa: E731
        x = jax.ShapeDtypeStruct((4, 200, 32), jnp.float32)
        hlo = jax.jit(jax.grad(loss, (0, 1))).lower(state, x).as_text()
        return re.findall(r"lhs_dilate = \[(\d+)\]", hlo)

    assert dilations(nnx.ConvTranspose).count("8") == 2
    assert "8" not in dilations(ConvTranspose)


def test_a_kernel_gradient_exchanges_its_operands_where_that_saves_products():
    specs = {case.name: case.spec for case in CASES}
    spread = {name for name, spec in specs.items() if spec.input_dilation > spec.stride}
    assert {name for name, spec in specs.items() if spec.exchanged} == spread
    assert {"input_dilation", "input_dilation_stride", "input_dilation_crop"} <= spread
    assert "input_dilation_depthwise" not in spread  # whose stride is the larger
    for name in spread:
        exchanged = specs[name].exchanged
        assert exchanged.stride > exchanged.input_dilation and exchanged.exchanged is None


def test_explain_tells_of_what_runs():
    told = explain(_layer(64, 64, 16, 8), np.zeros((16, 256, 64), np.float32), platform="cuda")
    assert str(told).count("JAX's transpose of a strided lax.conv_general_dilated") == 1


@pytest.mark.parametrize("knobs, message", [
    (dict(padding="REFLECT"), "padding must be SAME, VALID, CAUSAL, CIRCULAR, an int"),
    (dict(padding=[(1, 2, 3)]), r"padding must be one of .* an int, \[int\] or \[\(low, high\)\]"),
    (dict(mask=np.ones((5, 4, 5), np.float32)), "mask must have the kernel's shape"),
    (dict(strides=0), "strides must be 1 or more, got 0"),
])  # fmt: skip
def test_what_is_refused(knobs, message):
    layer = ConvTranspose(4, 6, 5, **dict(strides=3) | knobs, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        layer(X)
    with pytest.raises(ValueError, match="activation must be"):
        _layer()(X, activation="none")
    with pytest.raises(ValueError, match="implementation must be"):
        _layer(implementation="none")


def test_stocks_is_its_convolution_of_a_dilated_input():
    """Which the benchmarks time in its place."""

    def lowered(layer):
        graph, state = nnx.split(layer)
        f = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
        return jax.jit(jax.grad(lambda *a: jnp.sum(f(*a)), (0, 1))).lower(state, X).as_text()

    more = dict(padding=[(11, 11)], rngs=nnx.Rngs(0))
    transposed = nnx.ConvTranspose(4, 6, 16, 8, **more)
    assert lowered(transposed) == lowered(nnx.Conv(4, 6, 16, input_dilation=8, **more))


def test_each_operand_keeps_its_precision():
    """Where a kernel gradient has x and g in each other's place."""
    precision = (jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT)
    layer = lambda w: conv1d(X, w, input_dilation=2, padding=2, precision=precision)  # noqa: E731
    w = jax.ShapeDtypeStruct((3, 4, 4), jnp.float32)
    lowered = jax.jit(jax.grad(lambda w: jnp.sum(layer(w) ** 2))).trace(w)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    found = re.findall(r"precision_config = \[(.*?)\].*?: \(tensor<(\w+)xf32>", text)
    assert len(found) == 2  # forward, of x and w; kernel gradient, of g and x
    orders = [re.findall(r"precision (\w+)", config) for config, _ in found]
    assert orders == [["HIGHEST", "DEFAULT"], ["DEFAULT", "HIGHEST"]]


def test_circular_under_strict_ranks():
    with jax.numpy_rank_promotion("raise"):
        assert _layer(padding="CIRCULAR")(X).shape == (2, 27, 6)


@pytest.mark.parametrize("function", [conv1d, Conv, ConvTranspose])
def test_padding_may_hold_nan_where_those_raise(function):
    mask = jnp.arange(9) < jnp.array([[9], [5]])
    x = jnp.where(mask[..., None], X, jnp.nan).astype(jnp.bfloat16)
    if function is conv1d:
        call = lambda x: conv1d(x, jnp.ones((3, 4, 6)), mask=mask)  # noqa: E731
    else:
        layer = function(4, 6, 3, padding="VALID", rngs=nnx.Rngs(0))
        call = lambda x: layer(x, mask=mask)  # noqa: E731
    with jax.debug_nans(True):
        assert jnp.isfinite(jax.grad(lambda x: call(x).sum())(x)).all()
        assert jnp.isfinite(call(np.asarray(x, np.float64))).all()  # NumPy's, too
