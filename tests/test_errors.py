"""Bad input: one line that names the argument, what it was and what it may be, at trace time."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from conv_pallas import conv1d, conv_general_dilated, explain, kernels
from conv_pallas.nn import TCN, Conv, replace_convs

X = jax.ShapeDtypeStruct((2, 11, 4), jnp.float32)
NAMES = "triton, pallas_tpu, onednn, xla, xla_native"
PADDINGS = "SAME, SAME_LOWER, VALID, CAUSAL, CIRCULAR, REFLECT, an int, [int] or [(low, high)]"

# name: (arguments of the layer, the exception, words of the message in their order); `x` is
# the input's shape, and `flax` what nnx.Conv raises, where that is not the same: None where
# it computes something.
BAD = {
    "channels": (dict(x=(2, 11, 5)), ValueError, ["x must have 4 channels", "got 5"]),
    "channels_of_groups": (
        dict(x=(2, 11, 6), feature_group_count=2),
        ValueError,
        ["x must have 4 channels", "2 times feature_group_count=2", "got 6"],
    ),
    "rank": (dict(x=(4,)), ValueError, ["x must have shape (*batch, time, channels)", "(4,)"]),
    "groups_in": (
        dict(feature_group_count=3, flax=AssertionError),
        ValueError,
        ["feature_group_count must divide in_features=4", "got 3"],
    ),
    "groups_out": (
        dict(feature_group_count=4),
        ValueError,
        ["feature_group_count must divide", "6 output channels", "got 4"],
    ),
    "mask": (
        dict(mask=jnp.ones((3, 4, 5))),
        ValueError,
        ["mask must have", "(3, 4, 6)", "got (3, 4, 5)"],
    ),
    **{
        f"{p}_with_input_dilation": (
            dict(padding=p, input_dilation=2),
            ValueError,
            ["padding must be", "an int, [int] or [(low, high)]", f"got padding='{p}'", "=2"],
        )
        for p in ("SAME", "VALID", "CAUSAL", "CIRCULAR")
    },
    "unknown_padding": (
        dict(padding="BLUE", flax=RuntimeError),
        (ValueError, RuntimeError),
        ["padding must be one of", PADDINGS, "got 'BLUE'"],
    ),
    **{
        f"padding_{p}": (dict(padding=p), ValueError, ["padding must be", PADDINGS, f"got {p!r}"])
        for p in (None, 1.5, (1, 2), [(1, 2), (1, 2)], [(1, 2, 3)], [(1.5, 2)], [])
    },
    "padding_crops_too_much": (
        dict(padding=[(-8, -8)]),
        ValueError,
        ["padding must not crop more than x's 11 steps", "got [(-8, -8)]"],
    ),
    "stride_zero": (dict(strides=0, flax=None), ValueError, ["strides must be 1 or more", "got 0"]),
    "stride_negative": (
        dict(strides=(-2,), flax=None),
        ValueError,
        ["strides must be 1 or more", "got -2"],
    ),
    "stride_of_two": (dict(strides=(1, 2)), ValueError, ["strides must be an int", "got (1, 2)"]),
    "stride_float": (dict(strides=1.5), TypeError, ["strides must be an int", "got 1.5"]),
    "kernel_dilation_zero": (
        dict(kernel_dilation=0),
        TypeError,
        ["kernel_dilation must be 1 or more", "got 0"],
    ),
    "kernel_dilation_negative": (
        dict(kernel_dilation=-3),
        TypeError,
        ["kernel_dilation must be 1 or more", "got -3"],
    ),
    "kernel_dilation_of_two": (
        dict(kernel_dilation=(2, 2), flax=None),
        ValueError,
        ["kernel_dilation must be an int", "got (2, 2)"],
    ),
    "kernel_dilation_float": (
        dict(kernel_dilation=2.0),
        TypeError,
        ["kernel_dilation must be an int", "got 2.0"],
    ),
    "input_dilation_zero": (
        dict(input_dilation=0, padding=1),
        TypeError,
        ["input_dilation must be 1 or more", "got 0"],
    ),
    "input_dilation_negative": (
        dict(input_dilation=[-1], padding=1),
        TypeError,
        ["input_dilation must be 1 or more", "got -1"],
    ),
    "implementation_can_not": (
        dict(implementation="triton", flax=None),
        NotImplementedError,
        ["implementation='triton'", "on cpu", "triton: ", "may be", "xla"],
    ),
    "implementations_can_not": (
        dict(implementation=("triton", "pallas_tpu"), flax=None),
        NotImplementedError,
        ["implementation='triton', 'pallas_tpu'", "triton: ", "pallas_tpu: ", "may be"],
    ),
}  # fmt: skip


def _trace(cls, arguments: dict):
    """Makes the layer and traces its call; nothing is computed."""
    arguments = dict(arguments)
    arguments.pop("flax", None)
    shape = arguments.pop("x", X.shape)
    if cls is nnx.Conv:
        arguments.pop("implementation", None)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)

    def call(x):
        layer = cls(4, 6, 3, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.ones, **arguments)
        # Platforms are known where it is lowered, implementations that no platform has before.
        return layer(x)

    if "implementation" in arguments:
        return jax.jit(call).lower(x)
    return jax.eval_shape(call, x)


def _assert_message(error: BaseException, words: list[str]):
    message = str(error)
    assert "\n" not in message
    assert re.search(".*".join(map(re.escape, words)), message), message


@pytest.mark.parametrize("name", BAD)
def test_layer(name):
    arguments, exceptions, words = BAD[name]
    for exception in exceptions if isinstance(exceptions, tuple) else (exceptions,):
        with pytest.raises(exception) as error:
            _trace(Conv, arguments)
    _assert_message(error.value, words)


@pytest.mark.parametrize("name", [n for n in BAD if not n.startswith("implementation")])
def test_layer_of_any_implementation(name):
    """The complaint must not depend on what would have run."""
    arguments, exceptions, words = BAD[name]
    with pytest.raises(exceptions) as error:
        _trace(Conv, arguments | dict(implementation="xla_native"))
    _assert_message(error.value, words)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # nnx.Conv, stride 0
def test_flax_raises_the_same(name):
    arguments, exceptions, _ = BAD[name]
    expected = arguments.get("flax", exceptions)
    if expected is None:
        _trace(nnx.Conv, arguments)  # flax computes something; see whether that still holds
    else:
        with pytest.raises(expected):
            _trace(nnx.Conv, arguments)


KERNEL = jax.ShapeDtypeStruct((3, 4, 6), jnp.float32)

BAD_CALLS = {
    "kernel_rank": (
        dict(kernel=(3, 4)),
        ValueError,
        ["kernel must have shape", "got (3, 4)"],
    ),
    "kernel_without_taps": (
        dict(kernel=(0, 4, 6)),
        ValueError,
        ["kernel must have at least one tap", "(0, 4, 6)"],
    ),
    "bias": (dict(bias=(5,)), ValueError, ["bias must have shape (6,)", "got (5,)"]),
    "bias_rank": (dict(bias=(1, 6)), ValueError, ["bias must have shape (6,)", "got (1, 6)"]),
    "activation": (
        dict(activation="blue"),
        ValueError,
        ["activation must be None, a callable or one of relu, ", "got 'blue'"],
    ),
    "groups_zero": (
        dict(feature_group_count=0),
        ValueError,
        ["feature_group_count must be 1 or more", "got 0"],
    ),
    "groups_negative": (
        dict(feature_group_count=-2),
        ValueError,
        ["feature_group_count must be 1 or more", "got -2"],
    ),
    "preferred_narrower": (
        dict(preferred_element_type=jnp.bfloat16),
        TypeError,
        ["preferred_element_type", "must not be narrower"],
    ),
    "implementation": (
        dict(implementation="cudnn"),
        ValueError,
        ["implementation must be None, one of", NAMES, "sequence", "got 'cudnn'"],
    ),
    "implementation_in_sequence": (
        dict(implementation=("xla", "cudnn")),
        ValueError,
        ["implementation must be None, one of", NAMES, "got ('xla', 'cudnn')"],
    ),
    "implementation_of_none": (
        dict(implementation=()),
        ValueError,
        ["implementation must be None, one of", NAMES, "got ()"],
    ),
    "implementation_number": (
        dict(implementation=3),
        ValueError,
        ["implementation must be None, one of", NAMES, "got 3"],
    ),
    "implementation_can_not": (
        dict(implementation="triton"),
        NotImplementedError,
        ["implementation='triton'", "on cpu", "triton: "],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("implementation", [None, "xla_native"])
@pytest.mark.parametrize("function", [conv1d, explain], ids=["conv1d", "explain"])
def test_function(name, function, implementation):
    arguments, exception, words = BAD_CALLS[name]
    arguments = dict(implementation=implementation) | arguments
    operands = [X, *(
        jax.ShapeDtypeStruct(arguments.pop(n, default), jnp.float32)
        for n, default in (("kernel", (3, 4, 6)), ("bias", (6,)))
    )]  # fmt: skip
    with pytest.raises(exception) as error:
        if function is explain:
            explain(*operands, **arguments)
        else:
            jax.jit(lambda *operands: conv1d(*operands, **arguments)).lower(*operands)
    _assert_message(error.value, words)


@pytest.mark.parametrize("name", [n for n in BAD if n not in ("mask", "groups_in")])
def test_function_complains_as_the_layer(name):
    arguments, exceptions, words = BAD[name]
    arguments = {k: v for k, v in arguments.items() if k != "flax"}
    x = jax.ShapeDtypeStruct(arguments.pop("x", X.shape), jnp.float32)
    groups = arguments.get("feature_group_count", 1)
    kernel = jax.ShapeDtypeStruct((3, 4 // groups, 6), jnp.float32)
    with pytest.raises(exceptions) as error:
        jax.jit(lambda *operands: conv1d(*operands, **arguments)).lower(x, kernel)
    _assert_message(error.value, words)


def test_causal_in_two_dimensions():
    said = {nnx.Conv: "Causal padding", Conv: "^padding may be SAME, .* 2-D .*, got 'CAUSAL'"}
    for cls, match in said.items():
        layer = cls(4, 6, (3, 3), padding="CAUSAL", rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(layer, jax.ShapeDtypeStruct((2, 7, 7, 4), jnp.float32))


@pytest.mark.parametrize(
    ("argument", "error"),
    [("strides", ValueError), ("kernel_dilation", TypeError), ("input_dilation", TypeError)],
)
@pytest.mark.parametrize("value", [0, (2, -1)])
def test_steps_in_two_dimensions(argument, error, value):
    layer = Conv(4, 6, (3, 3), padding=1, rngs=nnx.Rngs(0), **{argument: value})
    with pytest.raises(error, match=f"^{argument} must be 1 or more, got"):
        jax.eval_shape(layer, jax.ShapeDtypeStruct((2, 7, 7, 4), jnp.float32))


def test_no_groups():
    with pytest.raises(ValueError, match="feature_group_count must be 1 or more, got 0"):
        Conv(4, 6, 3, feature_group_count=0, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("make", [
    lambda implementation: Conv(4, 6, 3, rngs=nnx.Rngs(0), implementation=implementation),
    lambda implementation: replace_convs(
        nnx.Conv(4, 6, 3, rngs=nnx.Rngs(0)), implementation=implementation
    ),
], ids=["Conv", "replace_convs"])  # fmt: skip
def test_layers_refuse_unknown_implementations_when_made(make):
    with pytest.raises(ValueError) as error:
        make("cudnn")
    _assert_message(error.value, ["implementation must be None, one of", NAMES, "got 'cudnn'"])


@pytest.mark.parametrize("model", [None, linen.Conv(3, (3,)), nnx.Conv])
def test_no_modules_to_replace(model):
    with pytest.raises(TypeError, match=r"model must be a flax.nnx.Module or hold some, got "):
        replace_convs(model)


@pytest.mark.parametrize("activation", ["RELU", 3])
def test_layers_refuse_unknown_activations(activation):
    x = jnp.ones((2, 8, 3))
    for padding in ("SAME", "CAUSAL"):
        layer = Conv(3, 3, 3, padding=padding, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="activation must be None, a callable or one of relu"):
            layer(x, activation=activation)
    with pytest.raises(ValueError, match="activation must be None, a callable or one of relu"):
        layer.step(x, layer.init_state(2), activation=activation)


def test_a_missing_package_is_not_all_that_is_missing(monkeypatch):
    found = {n: k for n, k in kernels.discover()[0].items() if k.implementation != "triton"}
    missing = {"triton_dense": "needs the package triton, which is not installed"}
    monkeypatch.setattr(kernels, "discover", lambda: (found, missing))
    with pytest.raises(NotImplementedError) as e:
        conv1d(jnp.ones((2, 8, 3)), jnp.ones((3, 3, 3)), implementation=("triton", "pallas_tpu"))
    there = "there it needs the package triton, which is not installed"
    assert f"(triton: runs on cuda, not on cpu; {there}; pallas_tpu: " in str(e.value)
    assert str(e.value).count("pallas_tpu: runs on tpu, not on cpu") == 1


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("CONV_PALLAS_IMPLEMENTATION", "cudnn")
    layer = Conv(4, 6, 3, rngs=nnx.Rngs(0))
    for call in (
        lambda: jax.eval_shape(conv1d, X, KERNEL),
        lambda: jax.eval_shape(layer, X),
        lambda: explain(X, KERNEL),
    ):
        with pytest.raises(ValueError) as error:
            call()
        _assert_message(
            error.value,
            ["variable CONV_PALLAS_IMPLEMENTATION must be unset", NAMES, "commas, got 'cudnn'"],
        )
    monkeypatch.setenv("CONV_PALLAS_IMPLEMENTATION", "triton")
    with pytest.raises(NotImplementedError, match="'triton'"):
        jax.jit(conv1d).lower(X, KERNEL)


@pytest.mark.parametrize("implementation", [None, "xla_native"])
@pytest.mark.parametrize("preferred", [jnp.float64, "float64", jnp.dtype("float64")], ids=repr)
@pytest.mark.parametrize("call", [
    conv1d,
    lambda x, kernel, **more: conv_general_dilated(x, kernel, **LAX, **more),
    lambda x, kernel, **more: conv1d(x, kernel, jnp.ones(6), activation="silu", **more),
], ids=["conv1d", "conv_general_dilated", "fused"])  # fmt: skip
def test_64_bits_that_jax_does_not_have(call, preferred, implementation):
    """One warning, as of `jax.lax`, and none where the dtype is Python's own."""
    ask = functools.partial(call, implementation=implementation)
    with pytest.warns(
        UserWarning, match="dtype .*float64.* in conv_general_dilated .* will be truncated"
    ) as told:
        y = jax.eval_shape(functools.partial(ask, preferred_element_type=preferred), X, KERNEL)
    assert y.dtype == jnp.float32
    assert len(told) == 1
    jax.eval_shape(functools.partial(ask, preferred_element_type=float), X, KERNEL)


@pytest.mark.parametrize("name", ["x", "kernel"])
@pytest.mark.parametrize("function", [conv1d, explain], ids=["conv1d", "explain"])
def test_no_array(function, name):
    with pytest.raises(TypeError) as error:
        function(*(None if name == this else a for this, a in (("x", X), ("kernel", KERNEL))))
    _assert_message(error.value, [name, "None" if function is conv1d else "NoneType"])


def test_numpy_numbers_of_64_bits_are_those_of_jax():
    """No warning, which the tests would fail by, wherever they meet a mask."""
    model, x = TCN(4, [4], 2), np.ones((2, 8, 4))
    mask = np.ones((2, 8), bool)
    assert model(x, mask=mask).dtype == conv1d(x, np.ones((3, 4, 4)), mask=mask).dtype


def test_explain_warns_of_64_bits_too():
    with pytest.warns(UserWarning, match="float64.* will be truncated"):
        explain(X, KERNEL, preferred_element_type=jnp.float64)


@pytest.mark.parametrize("implementation", [None, "xla_native"])
@pytest.mark.parametrize(
    "mask", [jnp.zeros((2, 7), bool), jnp.zeros((2, 11), int), jnp.zeros((2, 11, 4), bool)]
)
def test_explain_checks_the_mask(mask, implementation):
    words = ["mask must be bool of shape (2, 11)", f"got {mask.dtype} of shape {mask.shape}"]
    for given in (mask, jax.ShapeDtypeStruct(mask.shape, mask.dtype)):
        with pytest.raises(ValueError) as error:
            explain(X, KERNEL, mask=given, implementation=implementation)
        _assert_message(error.value, words)
    for right in (jnp.ones((2, 11), bool), jax.ShapeDtypeStruct((2, 11), bool)):
        assert str(explain(X, KERNEL, mask=right)) == str(explain(X, KERNEL))


NCW = dict(lhs=(2, 4, 11), rhs=(6, 4, 3), dimension_numbers=None)
BAD_OF_LAX = {
    "stride_negative": (dict(window_strides=(-1,)), ValueError, ["window_strides must", "(-1,)"]),
    "stride_of_two": (dict(window_strides=(1, 1)), ValueError, ["window_strides must", "(1, 1)"]),
    "stride_float": (dict(window_strides=(1.5,)), TypeError, ["window_strides must", "(1.5,)"]),
    "stride_none": (dict(window_strides=None), TypeError, ["window_strides must", "None"]),
    "stride_of_none": (dict(window_strides=(None,)), TypeError, ["window_strides must", "(None,)"]),
    "rhs_dilation_zero": (dict(rhs_dilation=(0,)), TypeError, ["rhs_dilation must be", "(0,)"]),
    "rhs_dilation_of_two": (dict(rhs_dilation=(1, 1)), ValueError, ["rhs_dilation must", "(1, 1)"]),
    "lhs_dilation_zero": (dict(lhs_dilation=[0]), TypeError, ["lhs_dilation must be", "[0]"]),
    "lhs_dilation_float": (dict(lhs_dilation=(2.0,)), TypeError, ["lhs_dilation must", "(2.0,)"]),
    "lhs_dilation_and_a_string": (
        dict(lhs_dilation=(2,)),
        ValueError,
        ["padding must be [(low, high)]", "got padding='SAME', lhs_dilation=(2,)"],
    ),
    "padding_float": (
        dict(padding=[(1.5, 2)]),
        ValueError,
        ["padding must be SAME, SAME_LOWER, VALID or [(low, high)]", "got [(1.5, 2)]"],
    ),
    "padding_crops_too_much": (
        dict(padding=[(-8, -8)], **NCW),
        ValueError,
        ["padding must not crop more than lhs's 11 steps", "got [(-8, -8)]"],
    ),
    "padding_crops_too_much_of_dilated": (
        dict(padding=[(-22, 0)], lhs_dilation=(2,)),
        ValueError,
        ["padding must not crop more than lhs's 21 steps", "got [(-22, 0)]"],
    ),
    "channels": (
        dict(NCW, rhs=(6, 5, 3)),
        ValueError,
        ["lhs must have 5 channels (rhs's 5", "=1)", "got 4 in dimension 1 of shape (2, 4, 11)"],
    ),
    "channels_of_groups": (
        dict(NCW, feature_group_count=2),
        ValueError,
        ["lhs must have 8 channels (rhs's 4", "=2)", "got 4 in dimension 1 of shape (2, 4, 11)"],
    ),
    "groups_in": (
        dict(feature_group_count=3),
        ValueError,
        ["feature_group_count must divide lhs's 4 channels and rhs's 6 output", "got 3"],
    ),
    "groups_out": (
        dict(feature_group_count=4, rhs=(3, 1, 6)),
        ValueError,
        ["feature_group_count must divide lhs's 4 channels and rhs's 6 output", "got 4"],
    ),
    "groups_zero": (dict(feature_group_count=0), ValueError, ["feature_group_count must", "got 0"]),
    "groups_none": (
        dict(feature_group_count=None), TypeError, ["feature_group_count must be an int", "None"]
    ),
    "no_taps": (
        dict(NCW, rhs=(6, 4, 0)),
        ValueError,
        ["rhs must have at least one tap", "dimension 2 of shape (6, 4, 0)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_OF_LAX)
def test_conv_general_dilated_says_what_its_caller_gave(name):
    arguments, exception, words = BAD_OF_LAX[name]
    arguments = LAX | arguments
    operands = [
        jax.ShapeDtypeStruct(arguments.pop(name, default.shape), jnp.float32)
        for name, default in (("lhs", X), ("rhs", KERNEL))
    ]
    with pytest.raises(exception) as error:
        jax.eval_shape(lambda *operands: conv_general_dilated(*operands, **arguments), *operands)
    _assert_message(error.value, words)


LAX = dict(window_strides=(1,), padding="SAME", dimension_numbers=("NWC", "WIO", "NWC"))


@pytest.mark.parametrize("arguments", [
    dict(padding="CAUSAL"),
    dict(padding="CIRCULAR"),
    dict(padding="blue"),
    dict(padding=[(1, 2), (3, 4)]),
    dict(padding=None),
    dict(lhs_dilation=(2,)),
    dict(lhs_dilation=(0,), padding=[(1, 1)]),
    dict(rhs_dilation=(0,)),
    dict(rhs_dilation=(-1,)),
    dict(window_strides=(1, 1)),
    dict(window_strides=1),
    dict(feature_group_count=3),
    dict(feature_group_count=0),
    dict(dimension_numbers=("NWC", "WIO")),
    dict(dimension_numbers=("NWC", "WIO", "NWQ")),
    dict(preferred_element_type=jnp.bfloat16),
    dict(preferred_element_type=jnp.int32),
    dict(batch_group_count=0),
    dict(lhs=jax.ShapeDtypeStruct((2, 11, 4), jnp.bfloat16)),
    dict(lhs=jax.ShapeDtypeStruct((2, 11, 5), jnp.float32)),
    dict(lhs=jax.ShapeDtypeStruct((11, 4), jnp.float32)),
], ids=str)  # fmt: skip
def test_conv_general_dilated_raises_as_lax(arguments):
    def trace(function):
        keywords = LAX | arguments
        operands = [keywords.pop("lhs", X), keywords.pop("rhs", KERNEL)]
        return jax.eval_shape(lambda *operands: function(*operands, **keywords), *operands)

    with pytest.raises(Exception) as theirs:
        trace(jax.lax.conv_general_dilated)
    with pytest.raises(type(theirs.value)) as ours:
        trace(conv_general_dilated)
    assert str(ours.value)


def test_explain_asks_for_the_input():
    for model in (Conv(4, 6, 3, rngs=nnx.Rngs(0)), jnp.sin):
        with pytest.raises(TypeError, match=r"a function and its input, got .* alone"):
            explain(model)
