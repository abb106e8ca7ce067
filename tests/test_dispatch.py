"""Which kernel runs, how a user asks for one, and what `explain` says about it."""

import dataclasses
import functools
import re
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import TraceContextError
from jax import lax

from conv_pallas import conv1d, conv_general_dilated, dispatch, explain, kernels
from conv_pallas.nn import TCN, Conv
from conv_pallas.spec import OPERATIONS, PLATFORMS
from tests import cases

pytestmark = pytest.mark.usefixtures("hardly_optimized")

X = jax.ShapeDtypeStruct((2, 16, 8), jnp.float32)
W = jax.ShapeDtypeStruct((3, 8, 8), jnp.float32)


def _layer(**kwargs):
    return Conv(8, 8, 3, rngs=nnx.Rngs(0), **kwargs)


# --- explain ---


@pytest.mark.parametrize("platform", PLATFORMS)
def test_explain_names_a_choice_and_every_reason(platform):
    told = explain(X, W, platform=platform, kernel_dilation=2)

    assert told.platform == platform
    assert tuple(told.chosen) == tuple(told.candidates) == OPERATIONS
    for operation in OPERATIONS:
        # Of several kernels of one name the first is the one that would run, if any.
        answers = {c.implementation: c for c in reversed(told.candidates[operation])}
        assert set(dispatch.IMPLEMENTATIONS) <= set(answers)
        assert answers[told.chosen[operation]].reason is None
        for answer in told.candidates[operation]:
            assert (answer.reason is None) != (answer.how is None)  # one or the other
        assert f"{operation} on {platform}: {told.chosen[operation]}" in str(told)
    for answer in answers.values():
        assert (answer.reason or answer.how) in str(told)


@pytest.mark.usefixtures("shipped")
def test_explain_on_this_machine():
    told = explain(X, W)
    assert told.platform == "cpu"
    assert set(told.chosen.values()) == {"xla"}
    (triton, *_) = (c for c in told.candidates["conv1d"] if c.implementation == "triton")
    assert triton.reason.endswith(("not on cpu", "which is not installed"))


def test_explain_follows_the_order():
    assert set(explain(X, W, implementation=("triton", "xla")).chosen.values()) == {"xla"}
    assert "xla_native" in str(explain(X, W, implementation="xla_native"))


@pytest.mark.parametrize(("layer", "shape", "words"), [
    (lambda: Conv(8, 8, (3, 3), rngs=nnx.Rngs(0)), (2, 16, 16, 8), ["2-D", "lax"]),
    (lambda: Conv(8, 8, (3, 3, 3), rngs=nnx.Rngs(0)), (2, 8, 8, 8, 8), ["3-D", "lax"]),
    (lambda: _layer(param_dtype=jnp.complex64), (2, 16, 8), ["complex64", "lax"]),
    (lambda: _layer(conv_general_dilated=lambda *a, **k: None), (2, 16, 8), ["its own"]),
    (lambda: _layer(implementation="xla_native"), (2, 16, 8), ["xla_native"]),
], ids=["2d", "3d", "complex", "own", "stock"])  # fmt: skip
def test_explain_says_what_is_left_to_lax(layer, shape, words):
    made, x = layer(), jax.ShapeDtypeStruct(shape, jnp.float32)
    for told, platform in ((explain(made, x), "cpu"), (made.explain(x, platform="tpu"), "tpu")):
        assert told.chosen == {} and told.platform == platform
        assert all(word in told.note and word in str(told) for word in words)


def test_explain_of_a_layer_is_of_its_arguments():
    depthwise = Conv(8, 8, 3, feature_group_count=8, rngs=nnx.Rngs(0))
    kernel = jax.ShapeDtypeStruct((3, 1, 8), jnp.float32)
    bias = jax.ShapeDtypeStruct((8,), jnp.float32)
    same = explain(X, kernel, bias, padding="SAME", feature_group_count=8)
    assert explain(depthwise, X) == same
    assert "bias" in same.epilogue
    assert explain(depthwise, X) != explain(X, W)


class _Model(nnx.Module):
    def __init__(self):
        self.one = _layer(kernel_dilation=2, padding="SAME")
        self.stock = nnx.Conv(8, 8, 3, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))  # changes in a call

    def __call__(self, x):
        again = lambda x, _: (self.one(x, activation="relu"), None)  # noqa: E731
        x, _ = jax.lax.scan(again, self.dropout(self.stock(self.one(x))), None, length=5)
        return jax.jit(self.one)(x)


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_explain_of_a_model_is_of_each_of_its_convolutions(platform):
    model = _Model()
    told = explain(model, X, platform=platform)
    alone = explain(model.one, X, platform=platform)

    words = "x (2, 16, 8), kernel (3, 8, 8), float32, padding=(2, 2), kernel_dilation=2"
    assert told.times == {words: 2, words + ", activation=relu": 5}
    assert told.left_to_lax == 1
    assert told.convolutions[words] == alone
    assert told.convolutions[words + ", activation=relu"] != alone
    text = str(told)
    assert text.startswith(f"on {platform}: 8 convolutions\n2 of {words}\n  conv1d  ")
    for operation in OPERATIONS:
        ours = next(c for c in alone.candidates[operation] if c.implementation == "xla")
        assert f"  {operation:<18} xla: {ours.how}\n" in text
    assert text.splitlines()[-1] == (
        "1 left to jax.lax.conv_general_dilated: stock layers (see conv_pallas.nn.replace_convs), "
        "more dimensions, and what is told to run xla_native"
    )


class ChannelsFirst(Conv):
    """Of somebody who has channels before time."""

    def __call__(self, x, **kwargs):
        return super().__call__(x.swapaxes(-1, -2), **kwargs).swapaxes(-1, -2)


def test_a_call_of_its_own_is_what_is_explained():
    layer = ChannelsFirst(4, 4, 3, padding="CAUSAL", rngs=nnx.Rngs(0))
    (words,) = explain(layer, jax.ShapeDtypeStruct((1, 4, 20), jnp.float32)).convolutions
    assert words == "x (1, 20, 4), kernel (3, 4, 4), float32"


def test_explain_of_an_order_complains_of_the_platform_that_was_asked_about():
    with pytest.raises(NotImplementedError, match=r"^implementation='triton' can't .* on tpu "):
        explain(X, jnp.zeros((3, 8, 8)), platform="tpu", implementation="triton")


def test_explain_of_a_function_says_what_to_do_with_a_model_that_changes():
    model = TCN(8, [8], 4, 3, 0.1, nnx.Rngs(0))
    with pytest.raises(TraceContextError) as raised:
        explain(lambda x: model(x), X)
    assert "model.eval()" in raised.value.__notes__[-1]
    model.eval()
    assert sum(explain(lambda x: model(x), X).times.values()) == 3


def test_explain_says_once_how_those_run_that_run_alike():
    layers = [Conv(8, 8, 3, padding="CAUSAL", kernel_dilation=D, rngs=nnx.Rngs(0)) for D in (1, 2)]
    layers.append(Conv(8, 8, 3, padding="CAUSAL", feature_group_count=8, rngs=nnx.Rngs(0)))
    model = nnx.Sequential(layers[0], layers[2], layers[1])
    lines = str(explain(model, X, platform="cpu")).splitlines()
    dense = "1 of x (2, 16, 8), kernel (3, 8, 8), float32"
    assert lines[1:3] == [dense, f"{dense}, kernel_dilation=2"]
    assert len([line for line in lines if line.startswith("  conv1d ")]) == 2
    assert len([line for line in lines if line.startswith("1 of ")]) == 3


def test_explain_of_a_function_follows_orders_and_batches_of_kernels():
    stride = functools.partial(conv1d, strides=2, feature_group_count=4)
    f = jax.vmap(functools.partial(stride, implementation=("triton", "xla")))
    x, w = (jax.ShapeDtypeStruct(s, "bfloat16") for s in ((5, 2, 16, 8), (5, 3, 2, 8)))
    told = explain(lambda both: f(*both), (x, w))
    (words,) = told.times
    assert words == (
        "x (2, 16, 8), kernel (3, 2, 8), bfloat16, strides=2, feature_group_count=4, "
        "5 kernels at once"
    )
    assert set(told.convolutions[words].chosen.values()) == {"xla"}
    with pytest.raises(NotImplementedError, match="'triton'"):
        explain(lambda w: conv1d(jnp.ones((2, 16, 8)), w, implementation="triton"), W)


@pytest.mark.parametrize("arguments", [(3, X), (_layer,), (X,), (X, [1.0])])
def test_explain_wants_arrays_or_what_is_called(arguments):
    with pytest.raises(TypeError, match=r"^explain takes x and kernel, or a model or a fun"):
        explain(*arguments)


def test_explain_is_of_the_default_device():
    with jax.default_device(jax.devices("cpu")[0]):
        assert explain(X, W).platform == "cpu"
    with jax.default_device("cpu"):
        assert explain(X, W).platform == "cpu"


def test_explain_says_nothing_twice():
    lines = str(explain(X, W)).split("conv1d_input_grad")[0].splitlines()
    assert len(lines) == len(set(lines))


def test_explain_tells_of_no_kernel_that_another_of_its_name_stands_in_for():
    """On TPUs dense and depthwise are two kernels of one name."""
    told = explain(X, W, platform="tpu", implementation="pallas_tpu")
    assert "pallas_tpu" in told.chosen["conv1d"] and "one channel a group" not in str(told)
    told = explain(X, W, platform="cuda")
    assert "pallas_tpu  declines" in str(told)


@pytest.mark.parametrize(
    "option",
    [dict(implementation="triton"), dict(padding="SAME"), dict(precision="high"), dict(strides=2)],
)
@pytest.mark.parametrize("what", [_layer(), nnx.Sequential(_layer()), lambda x: x])
def test_explain_takes_no_options_of_what_has_its_own(what, option):
    (name,) = option
    with pytest.raises(TypeError, match=f"{name}= is for arrays"):
        explain(what, X, **option)
    explain(what, X, platform="cpu")


@pytest.mark.parametrize("make", [_layer, lambda: nnx.Sequential(_layer())])
def test_explain_of_an_abstract_layer(make):
    """As of the layer itself: nothing of its parameters is read."""
    told = explain(nnx.eval_shape(make), jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert str(told) == str(explain(make(), X))


def test_explain_of_a_model_takes_all_arguments_of_its_call():
    condition = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    mask, ids = (jax.ShapeDtypeStruct((2, 16), dtype) for dtype in (bool, np.int32))
    model = TCN(8, [8], 8, conditioning=4, dropout=0.5, rngs=nnx.Rngs(0))  # changes in a call
    whole = explain(model, X, condition=condition)
    assert str(explain(model, X, condition=condition, mask=mask)) == str(whole)
    packed = explain(model, X, condition=condition, segment_ids=ids, platform="cuda")
    assert packed.platform == "cuda" and packed.times.keys() != whole.times.keys()

    layer = _layer()
    alone = explain(X, layer.kernel[...], layer.bias[...], activation="relu", segment_ids=ids)
    assert explain(layer, X, activation="relu", segment_ids=ids, mask=mask) == alone
    (words,) = explain(lambda x, w, **more: conv1d(x, w, **more), X, W, activation="tanh").times
    assert words.endswith("activation=tanh")
    with pytest.raises(TypeError, match="of arrays got unexpected arguments: condition"):
        explain(X, W, condition=condition)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("taps", [4, 40])  # 40 have no bits in an int32
def test_explain_of_packed_depthwise_layers(taps, platform, shipped):
    """Who takes them, or that each tap is a convolution; of no elements that there is nothing."""
    struct = jax.ShapeDtypeStruct
    w, b = struct((taps, 1, 8), jnp.float32), struct((8,), jnp.float32)

    def told(batch, implementation=None):
        x, ids = struct((batch, 64, 8), jnp.float32), struct((batch, 64), jnp.int32)
        return explain(
            x, w, b, segment_ids=ids, feature_group_count=8, activation="silu", platform=platform,
            implementation=implementation,
        )  # fmt: skip

    whole, empty = told(2), told(0)
    assert empty.note == "nothing to compute"
    assert set(whole.chosen.values()) <= set(dispatch.IMPLEMENTATIONS)
    if taps == 40 or platform == "other":  # which has XLA's own convolution alone
        assert "each tap of packed sequences is a convolution" in whole.epilogue
    else:
        assert all(dispatch.PACKED in whole.how(operation) for operation in whole.chosen)
        assert "in xla's kernels" in whole.epilogue
    native = [c for c in whole.candidates["conv1d"] if c.implementation == "xla_native"]
    assert (native[0].reason is None) == (taps == 40 or platform == "other")


def test_explain_wants_a_known_platform():
    with pytest.raises(
        ValueError, match=r"platform must be None or one of cpu, .* got 'gpu' \(cuda or rocm\?\)"
    ):
        explain(X, W, platform="gpu")


@pytest.mark.parametrize("name", ["dense", "depthwise_dilated", "stride_grouped"])
def test_what_is_explained_is_what_is_selected(name):
    case = cases.named(name)
    told = explain(
        *(jax.ShapeDtypeStruct(s, jnp.float32) for s in (case.x_shape, case.kernel_shape)),
        **case.kwargs,
    )
    for operation in OPERATIONS:
        kernel = dispatch.select(case.problem(operation), None)
        assert told.chosen[operation] == kernel.implementation


def test_kernels_for_tpus_decline_where_loops_count_in_64_bits():
    ask = functools.partial(explain, X, W, platform="tpu")
    declined = "pallas_tpu  declines: does not compile where jax_enable_x64 is on"
    assert declined not in str(ask())
    with jax.enable_x64(True):
        assert declined in str(ask())


# --- Asking for one ---


def _hlo(**kwargs) -> str:
    # Of a grouping for which "xla" does something else than "xla_native".
    x, w = (
        jax.ShapeDtypeStruct((2, 16, 8), jnp.float32),
        jax.ShapeDtypeStruct((3, 1, 8), jnp.float32),
    )
    run = lambda x, w: conv1d(x, w, feature_group_count=8, **kwargs)  # noqa: E731
    return jax.jit(run).lower(x, w).as_text()


def test_orders_and_chains(monkeypatch):
    is_native = lambda **kwargs: "stablehlo.convolution" in _hlo(**kwargs)  # noqa: E731
    assert is_native(implementation="xla_native")
    assert not is_native(implementation="xla")
    assert not is_native()
    assert is_native(implementation=("triton", "pallas_tpu", "xla_native", "xla"))
    assert not is_native(implementation=["triton", "xla", "xla_native"])

    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "xla_native")
    assert is_native()
    assert not is_native(implementation="xla")  # what is said in code counts
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton, xla_native")
    assert is_native()
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "")
    assert not is_native()


def test_environment_variable_reaches_layers(monkeypatch):
    layer = Conv(8, 8, 3, feature_group_count=8, rngs=nnx.Rngs(0))
    lowered = lambda: jax.jit(lambda x: layer(x)).lower(X).as_text()  # noqa: E731
    assert "stablehlo.convolution" not in lowered()
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "xla_native")
    assert "stablehlo.convolution" in lowered()


@pytest.mark.parametrize("implementation", ["triton", "pallas_tpu", ("triton", "pallas_tpu")])
def test_an_order_that_can_not_be_met_is_refused(implementation):
    wanted = [implementation] if isinstance(implementation, str) else implementation
    with pytest.raises(NotImplementedError) as error:
        jax.jit(lambda x, w: conv1d(x, w, implementation=implementation)).lower(X, W)
    message = str(error.value)
    assert "\n" not in message
    for name in wanted:
        assert f"'{name}'" in message
        assert f"{name}: " in message
    able = message.partition("it may be None or any of ")[2].split(", ")
    assert {"xla", "xla_native"} <= set(able)


def test_what_no_platform_can_do_is_refused_where_it_is_traced():
    """For the reasons of those that the kernel is for."""
    trace = lambda *operands: jax.eval_shape(  # noqa: E731
        functools.partial(conv1d, implementation="pallas_tpu"), *operands
    )
    assert trace(X, W).dtype == jnp.float32
    told = r"'pallas_tpu' can't run conv1d on tpu \(pallas_tpu: takes bfloat16 and float32"
    with pytest.raises(NotImplementedError, match=told):
        trace(*(jax.ShapeDtypeStruct(a.shape, jnp.float16) for a in (X, W)))


# --- Kernels that are added ---

TOY = """
    from conv_pallas.kernels import Kernel
    {more}

    def run(problem, lhs, rhs):
        {body}

    KERNEL = Kernel(
        implementation="toy",
        platforms=("cpu",),
        run=run,
        decline=lambda problem: None if problem.operation == "conv1d" else "forward only",
        describe=lambda problem: "returns sevens",
        priority={priority},
    )
"""


@pytest.fixture
def add_kernel(tmp_path, monkeypatch):
    """Puts a file beside the kernels that are there, for one test."""

    def add(name="toy", more="", body="return sevens(problem)", priority=None):
        sevens = "def sevens(p): return jnp.full(p.out_shape, 7, p.out_dtype)"
        source = TOY.format(
            more=f"import jax.numpy as jnp\n    {sevens}\n    {more}", body=body, priority=priority
        )
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
        kernels.discover.cache_clear()

    before = set(sys.modules)
    yield add
    monkeypatch.undo()
    kernels.discover.cache_clear()
    for name in set(sys.modules) - before:
        if name.startswith("conv_pallas.kernels."):
            del sys.modules[name]
    assert "toy" not in kernels.discover()[0]


def _run(implementation=None):
    x, w = np.ones((2, 5, 3), np.float32), np.ones((3, 3, 4), np.float32)
    return jax.jit(lambda x, w: conv1d(x, w, implementation=implementation))(x, w)


def test_a_new_file_is_found_by_itself(add_kernel):
    add_kernel()
    assert "toy" in dispatch.names()
    assert "toy" not in set(explain(X, W).chosen.values())  # only when asked for
    np.testing.assert_array_equal(_run("toy"), np.full((2, 5, 4), 7))
    assert "returns sevens" in str(explain(X, W))
    with pytest.raises(ValueError, match="or a sequence of those") as error:
        _run("blue")
    assert {"xla_native", "toy"} <= set(str(error.value).split(", "))


def test_of_two_kernels_of_a_name_it_is_told_which_is_which(add_kernel):
    add_kernel()
    assert "[toy.py]" not in str(explain(X, W))
    add_kernel(name="toy_too", body="return 1 + sevens(problem)")
    told = [line for line in str(explain(X, W)).splitlines() if "returns sevens" in line]
    assert [line.split()[-1] for line in told] == ["[toy.py]", "[toy_too.py]"]
    np.testing.assert_array_equal(_run("toy"), np.full((2, 5, 4), 7))  # the first of them runs


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (dict(implementation=None), TypeError, "implementation of a Kernel must be a name, got N"),
        (dict(implementation="a,b"), ValueError, "without commas and spaces, got 'a,b'"),
        (dict(implementation=""), ValueError, "without commas and spaces, got ''"),
        (dict(platforms="cpu"), TypeError, "platforms of the kernel 'toy' must be a tuple of name"),
        (dict(platforms=("gpu",)), ValueError, "must be some of cpu, cuda, rocm, tpu, other, got"),
        (dict(platforms=()), ValueError, "platforms of the kernel 'toy' must be some of cpu, cuda"),
        (dict(priority="high"), TypeError, "priority of the kernel 'toy' must be None, an int or"),
        (dict(describe=None), TypeError, "describe of the kernel 'toy' must be a function, got N"),
        (dict(run="run"), TypeError, "run of the kernel 'toy' must be a function, got 'run'"),
        (dict(many=None), TypeError, "many of the kernel 'toy' must be a function, got None"),
        (dict(fused=1), TypeError, "fused of the kernel 'toy' must be a function, got 1"),
    ],
    ids=str,
)
def test_a_kernel_that_is_none_is_told_with_its_name(wrong, error, message):
    right = dict(
        implementation="toy", platforms=("cpu",), run=print, decline=print, describe=print,
        priority=None, fused=None, backward=None,
    )  # fmt: skip
    kernels.Kernel(**right)
    with pytest.raises(error, match=re.escape(message)):
        kernels.Kernel(**right | wrong)


def test_a_file_whose_kernel_is_none_is_named(add_kernel):
    add_kernel(more="KERNEL = dict(implementation='toy')\n    Kernel = lambda **k: KERNEL")
    with pytest.raises(TypeError, match=r"KERNEL of toy\.py must be a Kernel, got \{.impl"):
        kernels.discover()


@pytest.mark.parametrize("reason", ["False", "''", "3"])
def test_a_reason_is_words(add_kernel, reason):
    add_kernel()
    toy = dataclasses.replace(kernels.discover()[0]["toy"], decline=lambda p: eval(reason))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "discover", lambda: ({"toy": toy}, {}))
        message = f"must return None, or the reason in words, got {reason}"
        with pytest.raises(TypeError, match=message):
            _run("toy")


def test_a_kernel_without_gradients_is_explained(add_kernel):
    add_kernel()
    told = explain(X, W, implementation="toy")
    assert list(told.chosen.values()) == ["toy", None, None]
    assert "conv1d_kernel_grad on cpu: nothing that was asked for" in str(told)
    assert "toy         declines: forward only" in str(told)
    model = str(explain(lambda x: conv1d(x, jnp.ones(W.shape), implementation="toy"), X))
    assert "conv1d             toy: returns sevens" in model
    assert "conv1d_input_grad  nothing that was asked for" in model


@pytest.mark.usefixtures("shipped")
def test_the_highest_priority_that_can_is_picked(add_kernel):
    add_kernel(priority=1000)
    np.testing.assert_array_equal(_run(), np.full((2, 5, 4), 7))
    assert explain(X, W).chosen == {
        "conv1d": "toy", "conv1d_input_grad": "xla", "conv1d_kernel_grad": "xla"
    }  # fmt: skip
    assert "toy         declines: forward only" in str(explain(X, W))


@pytest.mark.usefixtures("shipped")
def test_a_priority_may_depend_on_the_problem(add_kernel):
    """The default where it wins; elsewhere by name alone, and `explain` says why."""
    add_kernel(
        priority="lambda p: 1000 if p.spec.time > 8 else None,\n"
        "        by_name=lambda p: f'slower for T={p.spec.time}'"
    )
    short, long = (jax.ShapeDtypeStruct((2, T, 8), jnp.float32) for T in (8, 9))
    assert explain(short, W).chosen["conv1d"] == "xla"
    assert "toy         returns sevens (slower for T=8)" in str(explain(short, W))
    assert explain(long, W).chosen["conv1d"] == "toy"
    assert "slower" not in str(explain(long, W))
    # Asked for by name it runs, whatever its priority.
    np.testing.assert_array_equal(_run("toy"), np.full((2, 5, 4), 7))
    assert not np.array_equal(_run(), np.full((2, 5, 4), 7))


def test_a_kernel_that_declines_a_gradient_raises_only_for_the_gradient(add_kernel):
    add_kernel()
    x, w = np.ones((2, 5, 3), np.float32), np.ones((3, 3, 4), np.float32)
    loss = lambda implementation: jax.jit(  # noqa: E731
        jax.grad(lambda x: conv1d(x, w, implementation=implementation).sum())
    )
    with pytest.raises(NotImplementedError, match="toy: forward only"):
        loss("toy")(x)
    want = jax.grad(lambda x: lax.conv_general_dilated(
        x, w, (1,), [(2, 0)], dimension_numbers=("NWC", "WIO", "NWC")).sum())(x)  # fmt: skip
    np.testing.assert_allclose(loss(("toy", "xla"))(x), want, rtol=1e-6)


@pytest.mark.parametrize("implementation", [None, "toy", ("toy", "xla")])
def test_a_broken_kernel_is_not_passed_over(add_kernel, implementation):
    add_kernel(body="raise ZeroDivisionError('broken')", priority=1000)
    with pytest.raises(ZeroDivisionError, match="broken"):
        _run(implementation)


@pytest.mark.parametrize(
    ("body", "got"),
    [
        ("return sevens(problem)[:, 1:]", "float32 (2, 4, 4)"),
        ("return sevens(problem)[0]", "float32 (5, 4)"),
        ("return sevens(problem).mT", "float32 (2, 4, 5)"),  # as many elements
        ("return sevens(problem).astype(jnp.bfloat16)", "bfloat16 (2, 5, 4)"),
        ("sevens(problem)", "NoneType"),
    ],
)
def test_a_result_that_is_none_of_the_problem_names_the_kernel(add_kernel, body, got):
    add_kernel(body=body)
    told = f"run of the implementation 'toy' must return float32 (2, 5, 4) for conv1d, got {got}"
    with pytest.raises(TypeError, match=rf"^{re.escape(told)}(\n|$)"):
        _run("toy")


@pytest.mark.parametrize("many", [True, False])
def test_so_does_one_of_several_kernels_at_once(add_kernel, monkeypatch, many):
    add_kernel()
    half = lambda a, b: jnp.zeros((2, 1, 4, 3))  # noqa: E731
    toy = dataclasses.replace(
        kernels.discover()[0]["toy"],
        run=lambda problem, lhs, rhs: jnp.zeros((1, 4, 3)), many=lambda p: half if many else None,
    )  # fmt: skip
    monkeypatch.setattr(kernels, "discover", lambda: ({"toy": toy}, {}))
    f = jax.vmap(functools.partial(conv1d, implementation="toy"))
    method, shape = ("many", (2, 1, 5, 3)) if many else ("run", (1, 5, 6))
    told = f"{method} of the implementation 'toy' must return float32 {shape} for conv1d, got"
    with pytest.raises(TypeError, match=re.escape(told)):
        jax.jit(f).lower(jnp.zeros((2, 1, 5, 4)), jnp.zeros((2, 3, 4, 3)))


@pytest.mark.parametrize("more", ["1 / 0", "import no_such_package"])
def test_a_file_that_does_not_import_is_not_passed_over(add_kernel, more):
    add_kernel(more=more)
    with pytest.raises((ZeroDivisionError, ModuleNotFoundError)):
        _run()


def test_a_missing_optional_package_is_a_reason(add_kernel, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)  # as if it were not installed
    add_kernel(name="triton_toy", more="import jax_triton", priority=1000)
    assert _run().shape == (2, 5, 4)
    missing = kernels.discover()[1]
    assert missing["triton_toy"] == "needs the package jax_triton, which is not installed"


@pytest.mark.parametrize(
    ("name", "module"), [("triton", "triton_dense"), ("pallas_tpu", "tpu_dense")]
)
def test_an_implementation_whose_package_is_missing_says_which(name, module, monkeypatch):
    found = {n: k for n, k in kernels.discover()[0].items() if k.implementation != name}
    missing = {module: "needs the package it_needs, which is not installed"}
    monkeypatch.setattr(kernels, "discover", lambda: (found, missing))
    told = explain(X, W, platform=dispatch.HOMES[name])
    reason = next(c.reason for c in told.candidates["conv1d"] if c.implementation == name)
    assert reason == missing[module]


def test_kernels_say_what_they_are():
    found, missing = kernels.discover()
    assert {"xla", "xla_native"} <= {k.implementation for k in found.values()}
    for kernel in found.values():
        assert set(kernel.platforms) <= set(PLATFORMS)
    assert all("package" in reason for reason in missing.values())


def test_explain_says_that_a_dtype_which_does_not_hold_the_bias_keeps_it_outside():
    x, w, b = (jax.ShapeDtypeStruct(s, "bfloat16") for s in ((2, 9, 4), (3, 4, 5), (5,)))
    told = explain(x, w, b, preferred_element_type=jnp.float16)
    assert told.epilogue.endswith("for float16 does not hold a bias of bfloat16")
    assert "does not hold" not in explain(x, w, b, preferred_element_type=jnp.float32).epilogue


@pytest.mark.parametrize(
    ("x", "w", "geometry"),
    [
        ((1, 3, 4), (3, 4, 4), dict(kernel_dilation=2, padding="VALID")),
        ((2, 0, 4), (3, 4, 4), dict(padding=[(1, 0)])),
        ((1, 1000, 0), (63, 0, 1), {}),
        ((0, 1000, 500), (63, 500, 64), dict(padding=[(328, 320)], kernel_dilation=7)),
    ],
)
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_nothing_to_compute_is_explained_and_can_be_ordered(x, w, geometry, platform):
    x, w = jnp.zeros(x), jnp.zeros(w)
    told = explain(x, w, platform=platform, **geometry)
    assert str(told) == f"on {platform}: nothing to compute"
    for implementation in ("pallas_tpu", "triton", "xla"):
        order = functools.partial(conv1d, implementation=implementation, **geometry)
        told = explain(order, x, w, platform=platform)
        assert "nothing to compute" in str(told)
        several = explain(
            jax.vmap(order), x[None].repeat(3, 0), w[None].repeat(3, 0), platform=platform
        )
        assert "nothing to compute" in str(several)
        y = jax.jit(order)(x, w)
        assert not y.any()


def test_an_order_for_a_batch_of_kernels_says_what_became_of_it():
    f = jax.vmap(functools.partial(conv1d, implementation="pallas_tpu"))
    arrays = jnp.zeros((4, 2, 300, 256)), jnp.zeros((4, 3, 256, 256))
    with pytest.raises(NotImplementedError, match=r"4 kernels at once, .* run as 4 times"):
        jax.jit(f).trace(*arrays).lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize("dtype", ["int4", "uint4"])
def test_integers_of_four_bits_are_summed_in_more(dtype):
    """XLA refuses them on a CPU, and lowers them elsewhere."""
    x, w = jnp.zeros((2, 16, 8), dtype), jnp.zeros((3, 8, 8), dtype)
    f = functools.partial(
        conv_general_dilated, window_strides=(1,), padding="SAME",
        dimension_numbers=("NWC", "WIO", "NWC"), preferred_element_type=jnp.int32,
    )  # fmt: skip
    for platform in ("tpu", "cuda"):
        lowered = jax.jit(f).trace(x, w).lower(lowering_platforms=(platform,))
        assert lowered.out_info.dtype == jnp.int32
