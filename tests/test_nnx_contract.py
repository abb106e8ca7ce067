"""`Conv` and `ConvTranspose` against flax's own: whatever holds for one holds for the other."""

import ast
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from conv_pallas.nn import Conv, ConvTranspose
from tests.support import IMPLEMENTATIONS, order

pytestmark = pytest.mark.usefixtures("hardly_optimized")


def _cast_all(arrays, *, dtype=None):
    """A `promote_dtype` that is not flax's."""
    return tuple(None if a is None else jnp.asarray(a, jnp.bfloat16) for a in arrays)


def _twice(*args, **kwargs):
    """A `conv_general_dilated` of the user's own."""
    return 2 * lax.conv_general_dilated(*args, **kwargs)


TRANSPOSED = dict(layer=(nnx.ConvTranspose, ConvTranspose))

# What the layer is made with, beside (in_features, out_features, kernel_size); and the shape
# of its input, where (2, 11, in_features) won't do.
KNOBS = {
    "plain": {},
    "stride": dict(strides=2),
    "stride_list": dict(strides=[3]),
    "stride_none": dict(strides=None),
    "stride_positional": dict(args=(4, 6, 3, 2)),
    **{
        f"padding_{p}": dict(padding=p, kernel_dilation=2)
        for mode in ("SAME", "SAME_LOWER", "VALID", "CAUSAL", "CIRCULAR", "REFLECT")
        # flax knows CAUSAL, CIRCULAR and REFLECT in capitals only.
        for p in ((mode, mode.lower()) if mode[0] in "SV" else (mode,))
    },
    "padding_even_kernel_same": dict(args=(4, 6, 4), padding="SAME", strides=2),
    "padding_even_kernel_same_lower": dict(args=(4, 6, 4), padding="SAME_LOWER", strides=2),
    "padding_even_kernel_circular": dict(args=(4, 6, 4), padding="CIRCULAR", strides=2),
    "padding_even_kernel_reflect": dict(args=(4, 6, 4), padding="REFLECT", kernel_dilation=3),
    "padding_int": dict(padding=2),
    "padding_ints": dict(padding=[2]),
    "padding_tuple": dict(padding=(1,)),
    "padding_pair": dict(padding=[(1, 4)]),
    "padding_pair_tuple": dict(padding=((3, 0),)),
    "padding_negative": dict(padding=[(-2, 3)]),
    "padding_negative_both": dict(padding=[(-2, -1)]),
    "kernel_dilation": dict(kernel_dilation=3, padding="CAUSAL"),
    "kernel_dilation_tuple": dict(kernel_dilation=(3,)),
    "kernel_dilation_none": dict(kernel_dilation=None),
    "input_dilation": dict(input_dilation=2, padding=[(3, 1)]),
    "input_dilation_stride": dict(input_dilation=(3,), padding=2, strides=2),
    "input_dilation_none": dict(input_dilation=None),
    "groups": dict(feature_group_count=2),
    "depthwise": dict(args=(6, 6, 4), feature_group_count=6, padding="CAUSAL"),
    "multiplier": dict(args=(3, 12, 3), feature_group_count=3, kernel_dilation=2),
    "pointwise": dict(args=(4, 6, 1)),
    "kernel_size_tuple": dict(args=(4, 6, (3,))),
    "no_bias": dict(use_bias=False),
    "mask": dict(mask=np.tril(np.ones((3, 4, 6), np.float32))),
    "mask_bool": dict(mask=np.arange(72).reshape(3, 4, 6) % 3 > 0),
    "dtype_bfloat16": dict(dtype=jnp.bfloat16),
    "dtype_float16_mask": dict(dtype=jnp.float16, mask=np.ones((3, 4, 6), np.float32)),
    "param_dtype": dict(param_dtype=jnp.float16),
    "dtype_and_param_dtype": dict(dtype=jnp.float32, param_dtype=jnp.bfloat16),
    "precision": dict(precision="highest"),
    "precision_pair": dict(precision=(lax.Precision.HIGH, lax.Precision.HIGHEST)),
    "preferred": dict(dtype=jnp.bfloat16, preferred_element_type=jnp.float32),
    "promote_dtype": dict(promote_dtype=_cast_all),
    "initialisers": dict(
        kernel_init=nnx.initializers.uniform(3.0), bias_init=nnx.initializers.normal(2.0)
    ),
    "metadata": dict(kernel_metadata=dict(note="k"), bias_metadata=dict(note="b")),
    "own_convolution": dict(conv_general_dilated=_twice),
    "no_batch_axis": dict(x=(11, 4)),
    "no_batch_axis_causal": dict(x=(11, 4), padding="CAUSAL"),
    "no_batch_axis_circular": dict(x=(11, 4), padding="CIRCULAR"),
    "batch_axes": dict(x=(2, 1, 3, 11, 4), padding="CAUSAL"),
    "batch_axes_groups": dict(x=(2, 3, 11, 4), feature_group_count=2),
    "batch_of_none": dict(x=(0, 11, 4)),
    "no_time_causal": dict(x=(2, 0, 4), padding="CAUSAL"),
    "no_time_padded": dict(x=(2, 0, 4), padding=3),
    "time_of_one": dict(x=(2, 1, 4), kernel_dilation=4),
    "short_time_causal": dict(x=(2, 3, 4), kernel_dilation=4, padding="CAUSAL"),
    "short_time_valid": dict(x=(2, 3, 4), kernel_dilation=4, padding="VALID"),
    "input_int32": dict(x_dtype=np.int32),
    "input_int8": dict(x_dtype=np.int8, padding="CAUSAL"),
    "input_bool": dict(x_dtype=np.bool_),
    "input_bfloat16": dict(x_dtype=jnp.bfloat16),
    "all_bfloat16": dict(x_dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
    "input_complex": dict(x_dtype=np.complex64, padding="CAUSAL"),
    "param_complex": dict(param_dtype=np.complex64, kernel_dilation=2),
    "two_dimensions": dict(args=(4, 6, (3, 2)), x=(2, 7, 6, 4), kernel_dilation=(1, 2)),
    "two_dimensions_no_batch": dict(args=(4, 6, (3, 2)), x=(7, 6, 4), strides=2, padding="VALID"),
    "two_dimensions_circular": dict(args=(4, 6, (3, 2)), x=(2, 7, 6, 4), padding="CIRCULAR"),
    "three_dimensions": dict(args=(4, 2, (2, 2, 2)), x=(2, 3, 4, 3, 4), feature_group_count=2),
    **{
        f"transposed_{name}": TRANSPOSED | knobs
        for name, knobs in {
            "plain": {},
            "stride": dict(strides=2),
            "stride_list": dict(strides=[3], args=(4, 6, 5)),
            "stride_over_taps": dict(args=(4, 6, 2, 4)),
            "as_in_hifigan": dict(args=(4, 2, 16, 8), padding=[(11, 11)]),
            **{
                f"{p}_{'flipped' if flip else 'as_it_is'}": dict(
                    args=(4, 6, 4), strides=2, padding=p, transpose_kernel=flip
                )
                for p in ("SAME", "VALID", "CIRCULAR") for flip in (False, True)
            },
            "padding_int": dict(padding=2, strides=2),
            "padding_negative": dict(padding=[(-2, 1)], strides=2),
            "kernel_dilation": dict(kernel_dilation=3, strides=2),
            "kernel_dilation_valid": dict(kernel_dilation=(2,), strides=4, padding="VALID"),
            "no_bias": dict(use_bias=False),
            "mask": dict(mask=np.tril(np.ones((3, 4, 6), np.float32))),
            "dtype_bfloat16": dict(dtype=jnp.bfloat16, strides=2),
            "precision": dict(precision="highest"),
            "preferred": dict(dtype=jnp.bfloat16, preferred_element_type=jnp.float32),
            "promote_dtype": dict(promote_dtype=_cast_all),
            "metadata": dict(kernel_metadata=dict(note="k"), bias_metadata=dict(note="b")),
            "no_batch_axis": dict(x=(11, 4), strides=2),
            "batch_axes": dict(x=(2, 1, 2, 6, 4), strides=2),
            "batch_of_none": dict(x=(0, 11, 4), strides=2),
            "time_of_one": dict(x=(2, 1, 4), strides=3),
            "input_int32": dict(x_dtype=np.int32),
            "input_complex": dict(x_dtype=np.complex64, strides=2),
            "two_dimensions": dict(args=(4, 6, (3, 2)), x=(2, 7, 6, 4), strides=(1, 2)),
        }.items()
    },
}  # fmt: skip


def _numpy_init(key, shape, dtype):
    """Nothing to compile, so that it is quick."""
    values = np.random.default_rng(shape).standard_normal(shape)
    return jnp.asarray(values.astype(dtype))


def _pair(name, implementation=None, *, quick=True):
    """The stock layer, ours, and an input, for an entry of the table."""
    knobs = dict(KNOBS[name])
    if quick:
        knobs = dict(kernel_init=_numpy_init, bias_init=_numpy_init) | knobs
    args = knobs.pop("args", (4, 6, 3))
    shape = knobs.pop("x", (2, 11, args[0]))
    dtype = np.dtype(knobs.pop("x_dtype", np.float32))
    flax, here = knobs.pop("layer", (nnx.Conv, Conv))
    order = {} if implementation is None else {"implementation": implementation}
    stock = flax(*args, rngs=nnx.Rngs(7), **knobs)
    ours = here(*args, rngs=nnx.Rngs(7), **knobs, **order)
    x = np.random.default_rng(3).standard_normal(shape) * 3
    return stock, ours, jnp.asarray(x.astype(dtype))


def _unit(dtype) -> float:
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.inexact) else 0.0


def _assert_close(actual, want, dtype):
    """To the rounding of ``dtype``, for sums of some dozens of products of values near 3."""
    actual, want = (np.asarray(a).astype(np.complex128) for a in (actual, want))
    np.testing.assert_allclose(actual, want, rtol=4 * _unit(dtype), atol=32 * _unit(dtype))


def _value_and_gradients(layer, x):
    """y, and the gradients to parameters and, where it is real or complex, to x."""
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    f = lambda params, x: nnx.merge(graphdef, params, rest)(x)  # noqa: E731
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        y, vjp = jax.vjp(lambda params: f(params, x), params)
    else:
        y, vjp = jax.vjp(f, params, x)
    g = np.sin(np.arange(y.size) + 1).reshape(y.shape)  # no two alike
    return y, vjp(jnp.asarray(g, y.dtype))


EACH_LAYER = pytest.mark.parametrize("ours, flax", [(Conv, nnx.Conv), TRANSPOSED["layer"][::-1]])


@EACH_LAYER
def test_checkers_see_the_signature_of_flax(ours, flax):
    """And one argument more, in what is there for type checkers alone."""
    tree = ast.parse(inspect.getsource(inspect.getmodule(ours)))
    shown, *_ = (
        node for branch in ast.walk(tree) if isinstance(branch, ast.If)
        for node in branch.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )  # fmt: skip
    names = [a.arg for a in (*shown.args.args, *shown.args.kwonlyargs)]
    wanted = [*inspect.signature(flax.__init__).parameters, "implementation"]
    assert sorted(names) == sorted(wanted)
    assert all(a.annotation for a in (*shown.args.args[1:], *shown.args.kwonlyargs))


@pytest.mark.parametrize("name", KNOBS)
def test_same_structure(name):
    stock, ours, _ = _pair(name)
    assert isinstance(ours, type(stock))

    stock_def, stock_state = nnx.split(stock)
    our_state = nnx.state(ours)

    assert nnx.to_flat_state(stock_state).paths == nnx.to_flat_state(our_state).paths
    assert stock.kernel.get_metadata() == ours.kernel.get_metadata()
    assert vars(ours).keys() == vars(stock).keys()
    assert nnx.graphdef(ours) != stock_def
    ours.__class__ = type(stock)  # of one class, they are one
    assert nnx.graphdef(ours) == stock_def


@pytest.mark.parametrize(
    "name", ["plain", "multiplier", "no_bias", "param_dtype", "initialisers", "two_dimensions"]
)
def test_same_parameters(name):
    stock, ours, _ = _pair(name, quick=False)
    leaves, want = (jax.tree.leaves_with_path(nnx.state(layer)) for layer in (ours, stock))
    assert [p for p, _ in leaves] == [p for p, _ in want]
    for (_, left), (_, right) in zip(leaves, want, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@pytest.mark.sampled
@pytest.mark.parametrize("name", KNOBS)
def test_same_outputs_and_gradients(name):
    if name == "input_dilation" and jax.__version_info__ < (0, 12):
        pytest.xfail("stock's dx is wrong: XLA:CPU of jaxlib 0.11.2 crops and pads at once wrongly")
    stock, ours, x = _pair(name)

    want_y, want_grads = nnx.jit(_value_and_gradients)(stock, x)
    y, grads = nnx.jit(_value_and_gradients)(ours, x)

    assert y.dtype == want_y.dtype
    assert y.shape == want_y.shape
    _assert_close(y, want_y, max((y.dtype, ours.dtype or y.dtype), key=_unit))
    leaves, want_leaves = jax.tree.leaves_with_path(grads), jax.tree.leaves_with_path(want_grads)
    assert [p for p, _ in leaves] == [p for p, _ in want_leaves]
    for (path, grad), (_, want) in zip(leaves, want_leaves, strict=True):
        assert (grad.dtype, grad.shape) == (want.dtype, want.shape), path
        # A bfloat16 layer's gradient to a float32 kernel was a bfloat16 on its way.
        coarsest = max((y.dtype, x.dtype, grad.dtype), key=_unit)
        _assert_close(grad, want, coarsest)


@pytest.mark.sampled
@pytest.mark.parametrize("name", KNOBS)
def test_xla_native_compiles_to_what_flax_compiles_to(name):
    stock, ours, x = _pair(name, implementation="xla_native")

    def hlo(layer):
        graphdef, state = nnx.split(layer)
        run = lambda state, x: _value_and_gradients(nnx.merge(graphdef, state), x)  # noqa: E731
        return jax.jit(run).lower(state, x).as_text()

    assert hlo(ours) == hlo(stock)


@pytest.mark.parametrize("mode", ["causal", "Circular", "reflect", "Valid", "same_lower"])
def test_paddings_in_any_case(mode):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 11, 4)), jnp.float32)
    make = lambda padding: Conv(4, 6, 3, padding=padding, kernel_dilation=2, rngs=nnx.Rngs(0))  # noqa: E731
    np.testing.assert_array_equal(make(mode)(x), make(mode.upper())(x))


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, ("xla", "xla_native"), ["xla"]])
def test_implementations_agree(implementation):
    if isinstance(implementation, str):
        implementation = order(implementation)
    stock, ours, x = _pair("padding_CAUSAL", implementation=implementation)
    _assert_close(ours(x), stock(x), x.dtype)
    hash(nnx.graphdef(ours))


@EACH_LAYER
def test_same_constructor(ours, flax):
    make = ours
    ours, stock = (inspect.signature(c.__init__).parameters for c in (make, flax))
    positional = [n for n, p in stock.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    assert [ours[n].default for n in positional] == [stock[n].default for n in positional]
    ours, stock = (inspect.signature(c.__call__).parameters for c in (make, flax))
    assert list(ours)[: len(stock)] == list(stock)
    # What we add can't be taken for what flax may add.
    assert {ours[n].kind for n in list(ours)[len(stock) :]} == {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(TypeError, match="no_such_argument"):
        make(4, 6, 3, no_such_argument=1, rngs=nnx.Rngs(0))


def test_mutated_attributes_take_effect():
    """nnx modules are mutable; the layer must not remember how it was made."""
    stock, ours, x = _pair("plain")
    for layer in (stock, ours):
        layer.padding, layer.kernel_dilation, layer.strides = "CAUSAL", 2, 2
        layer.kernel[...] = layer.kernel[...] * 2
    _assert_close(ours(x), stock(x), x.dtype)
    for layer in (stock, ours):
        layer.use_bias = False
    _assert_close(ours(x), stock(x), x.dtype)
    assert ours.explain(x).epilogue is None


@pytest.mark.parametrize("implementation", [None, "xla_native"])
def test_a_kernel_may_be_pruned(implementation):
    """Then the layer's own record of its shape is no longer true."""
    stock, ours, x = _pair("padding_CAUSAL", implementation=implementation)
    for layer in (stock, ours):
        layer.kernel = nnx.Param(layer.kernel[...][:, :2, :5])
        layer.bias = nnx.Param(layer.bias[...][:5])
    _assert_close(ours(x[..., :2]), stock(x[..., :2]), x.dtype)


@pytest.mark.parametrize(
    ("dtype", "preferred"), [(jnp.float16, jnp.bfloat16), (jnp.bfloat16, jnp.float16)]
)
def test_a_bias_widens_what_does_not_hold_it(dtype, preferred):
    x = jax.random.normal(jax.random.key(0), (2, 9, 4))
    options = dict(dtype=dtype, preferred_element_type=preferred, bias_init=_numpy_init)
    ours, stock = (cls(4, 4, 3, **options, rngs=nnx.Rngs(0)) for cls in (Conv, nnx.Conv))
    assert stock(x).dtype == jnp.float32
    assert ours(x).dtype == ours(x, activation="relu").dtype == jnp.float32
    _assert_close(ours(x), stock(x), jnp.bfloat16)
    ours.bias = stock.bias = None
    ours.use_bias = stock.use_bias = False
    assert ours(x).dtype == stock(x).dtype == preferred


@pytest.mark.usefixtures("shipped")
def test_promotion_is_the_layers_own():
    """What `promote_dtype` returns is not promoted again, not even a wider bias."""

    def narrow(arrays, *, dtype=None):
        inputs, kernel, bias = arrays
        return inputs.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), bias

    x = jax.random.normal(jax.random.key(0), (2, 9, 4))
    ours, stock = (cls(4, 4, 3, promote_dtype=narrow, rngs=nnx.Rngs(0)) for cls in (Conv, nnx.Conv))
    assert ours(x).dtype == stock(x).dtype == jnp.float32
    np.testing.assert_array_equal(ours(x), stock(x))
    assert ours.explain(x).chosen["conv1d"] == "xla"


def test_geometry_may_be_an_array():
    for args, x in (((4, 6, 3), (2, 9, 4)), ((4, 6, (3, 3)), (2, 9, 9, 4))):
        steps = np.arange(1, len(x) - 1)
        layers = (cls(*args, steps, rngs=nnx.Rngs(0)) for cls in (Conv, nnx.Conv))
        ours, stock = (layer(jnp.ones(x)) for layer in layers)
        _assert_close(ours, stock, jnp.float32)
