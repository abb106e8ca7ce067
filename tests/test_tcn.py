"""`TemporalBlock` and `TCN`: what they compute, what they are made of, what they refuse."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conv_pallas import convs_saveable
from conv_pallas.nn import TCN, Conv, TemporalBlock
from tests.support import primitives_of

pytestmark = pytest.mark.usefixtures("hardly_optimized")


def network(seed=0, dropout=0.0, **kwargs):
    """Three blocks; without dropout, whose random bits take most of the time to compile."""
    return TCN(3, [4, 4, 6], 2, 2, dropout, nnx.Rngs(seed), **kwargs)


# Compiled as a whole: op by op every operation of every shape would be compiled by itself.
@nnx.jit
def apply(model, x):
    return model(x)


def assert_same_parameters(*models):
    states = [nnx.to_pure_dict(nnx.state(model, nnx.Param)) for model in models]
    jax.tree.map(np.testing.assert_array_equal, *states)


def inputs(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def convolutions(model):
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, nnx.Conv)]


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_shapes(batch):
    x = jax.ShapeDtypeStruct((*batch, 11, 3), jnp.float32)
    assert nnx.eval_shape(lambda model, x: model(x), network(), x).shape == (*batch, 11, 2)
    block = TemporalBlock(3, 5, 2, 4, 0.1, nnx.Rngs(0))
    assert nnx.eval_shape(lambda block, x: block(x), block, x).shape == (*batch, 11, 5)


def test_arguments_by_position_and_by_keyword():
    positional = TCN(3, [4], 2, 3, 0.1, nnx.Rngs(0))
    named = TCN(
        in_channels=3, num_channels=(4,), out_features=2, kernel_size=3, dropout=0.1,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    assert nnx.graphdef(positional) == nnx.graphdef(named)
    assert_same_parameters(positional, named)
    block = TemporalBlock(
        in_channels=3, out_channels=4, kernel_size=3, dilation=2, dropout=0.1, rngs=nnx.Rngs(0)
    )
    assert nnx.graphdef(block) == nnx.graphdef(TemporalBlock(3, 4, 3, 2, 0.1, nnx.Rngs(0)))


def test_defaults():
    model = TCN(1, [4, 4], 2)
    assert model.blocks[0].conv1.kernel_size == (2,)
    assert model.blocks[0].dropout1.rate == 0.2
    same = TCN(1, [4, 4], 2, rngs=nnx.Rngs(0))
    assert_same_parameters(model, same)


@pytest.mark.parametrize(
    "norm, conditioning, activation",
    [(None, None, "relu"), ("layer", 2, "relu"), (None, None, "glu")],
)
def test_the_formula(norm, conditioning, activation):
    """What the docstring says, written with the layers' own parameters."""
    options = dict(norm=norm, conditioning=conditioning, activation=activation)
    block = TemporalBlock(3, 4, 2, 2, 0.0, nnx.Rngs(0), **options)
    x, c = np.asarray(inputs(2, 9, 3)), np.asarray(inputs(2, 2))

    def conv(layer, x, dilation):
        w, b = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
        past = np.pad(x, ((0, 0), ((len(w) - 1) * dilation, 0), (0, 0)))
        taps = [past[:, k * dilation : k * dilation + x.shape[1]] @ w[k] for k in range(len(w))]
        return np.sum(taps, 0) + b

    def normed(y):
        y = y - y.mean(-1, keepdims=True) if norm else y
        return y / np.sqrt(y.var(-1, keepdims=True) + 1e-6) if norm else y

    added = (c @ np.asarray(block.condition.kernel[0]))[:, None] if conditioning else 0
    gated = lambda y: y[..., :4] / (1 + np.exp(-y[..., 4:]))  # noqa: E731
    act = gated if activation == "glu" else lambda y: np.maximum(y, 0)
    h = act(normed(conv(block.conv1, x, 2)) + added)
    h = act(normed(conv(block.conv2, h, 2)))
    total = h + conv(block.shortcut, x, 1)
    expected = total if activation == "glu" else act(total)
    y = nnx.jit(block)(jnp.asarray(x), condition=c if conditioning else None)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_the_formula_of_skip_connections():
    model = network(skip_connections=True)

    @nnx.jit
    def expected(model, x):
        total = 0
        for block, skip in zip(model.blocks, model.skips, strict=True):
            added = nnx.relu(block.conv2(nnx.relu(block.conv1(x))))
            total += added if skip is None else skip(added)
            x = block(x)
        return model.readout(nnx.relu(total))

    x = inputs(2, 9, 3)
    np.testing.assert_allclose(apply(model, x), expected(model, x), rtol=1e-5, atol=1e-6)


def test_a_block_is_zero_where_the_mask_is_false():
    block, x = TemporalBlock(3, 3, 2, 2, 0.0, nnx.Rngs(0), activation="sigmoid"), inputs(2, 9, 3)
    mask = np.arange(9) < [[9], [5]]
    y = nnx.jit(block)(x, mask=mask)
    np.testing.assert_array_equal(np.any(y, -1), mask)
    streamed, _ = jax.jit(block.step)(x, block.init_state(2), mask=mask)
    np.testing.assert_allclose(streamed, y, rtol=1e-5, atol=1e-6)


def test_causal_and_sees_what_it_should():
    x = inputs(1, 24, 3)
    # Three blocks of two layers with two taps, dilations 1, 2, 4.
    seen = 1 + 2 * (2 - 1) * (2**3 - 1)
    t = 20

    @nnx.jit
    def touched(model, x):
        """For each input step whether the derivative of output step t by it is not zero."""
        return jnp.any(jax.jacrev(lambda x: model(x)[0, t])(x)[:, 0] != 0, (0, 2))

    # A ReLU may hide a path: over several networks every step that is seen is seen by some.
    found = np.zeros(24, bool)
    for seed in range(9):
        found |= np.asarray(touched(network(seed), x))
    np.testing.assert_array_equal(np.flatnonzero(found), np.arange(t - seen + 1, t + 1))


def test_a_change_touches_no_earlier_output():
    model = network()
    model.eval()
    x = inputs(2, 24, 3)
    before, after = apply(model, x), apply(model, x.at[:, 10].set(jnp.nan))
    np.testing.assert_array_equal(before[:, :10], after[:, :10])
    assert jnp.isnan(after[:, 10]).all()


def test_layers():
    model = network()
    assert [block.conv1.kernel_dilation for block in model.blocks] == [1, 2, 4]
    assert [block.conv2.kernel_dilation for block in model.blocks] == [1, 2, 4]
    assert [block.shortcut is not None for block in model.blocks] == [True, False, True]
    assert model.blocks[0].shortcut.kernel_size == (1,)
    assert model.readout.kernel_size == (1,)
    assert {layer.padding for layer in convolutions(model)} == {"CAUSAL"}
    assert all(type(layer) is Conv for layer in convolutions(model))


def test_dropout_only_in_training():
    model = TCN(3, [4], 2, dropout=0.25, rngs=nnx.Rngs(0))
    without = TCN(3, [4], 2, dropout=0.0, rngs=nnx.Rngs(0))
    x = inputs(2, 16, 3)
    expected = apply(without, x)
    model.eval()
    np.testing.assert_array_equal(apply(model, x), expected)
    model.train()
    first, second = apply(model, x), apply(model, x)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, expected)


def test_equals_its_stock_twin():
    arguments = (3, [4, 6], 2, 2, 0.25)
    model, stock = TCN(*arguments, nnx.Rngs(0)), TCN(*arguments, nnx.Rngs(0), conv=nnx.Conv)
    x = inputs(2, 16, 3)
    assert all(type(layer) is nnx.Conv for layer in convolutions(stock))
    assert_same_parameters(model, stock)

    @nnx.jit
    def results(model, x):
        loss = lambda model, x: jnp.sum(jnp.sin(model(x)))  # noqa: E731
        return nnx.value_and_grad(loss, argnums=(0, 1))(model, x)

    jax.tree.map(  # while both drop the same, for their rngs are equal
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        *(jax.tree.leaves(results(m, x)) for m in (model, stock)),
    )


def test_state_moves_into_stock_layers():
    model, x = network(), inputs(2, 16, 3)
    stock = network(seed=1, conv=nnx.Conv)
    nnx.update(stock, nnx.state(model))
    np.testing.assert_allclose(apply(model, x), apply(stock, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "xla_native", ("pallas_tpu", "xla")], ids=str)
def test_implementation_reaches_every_layer(implementation):
    model = network(implementation=implementation)
    wanted = (implementation,) if isinstance(implementation, str) else implementation
    assert {layer.implementation for layer in convolutions(model)} == {wanted}
    x = inputs(2, 16, 3)
    np.testing.assert_allclose(apply(model, x), apply(network(), x), rtol=1e-5, atol=1e-6)


def test_learns_under_nnx_transforms():
    model, x = network(), inputs(4, 16, 3)
    target = jnp.roll(x[..., :2], 1, axis=1)

    def loss(model):
        return jnp.mean((model(x) - target) ** 2)

    @nnx.jit
    def step(model):
        value, grads = nnx.value_and_grad(loss)(model)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
        return value

    losses = [step(model) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    expected = apply(model, x)

    @nnx.jit
    def in_other_ways(model, x):
        per_sample = nnx.vmap(lambda model, x: model(x), in_axes=(None, 0))
        return per_sample(model, x), nnx.remat(lambda model, x: model(x))(model, x)

    for actual in in_other_ways(model, x):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


# What each option must not change: the parameters of a network that does not ask for it.
@pytest.mark.parametrize(
    "options",
    [
        dict(dilations=[1, 2, 4], activation="relu", norm=None, lookahead=0),
        dict(activation="gelu", causal=False, remat=True, return_sequences=False),
        dict(spatial_dropout=True, dilations=np.array([7, 1, 3]), lookahead=3),
    ],
    ids=str,
)
def test_options_without_parameters(options):
    assert_same_parameters(network(**options), network())


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("options", "ahead"),
    [
        ({}, 0),
        (dict(dilations=[3, 1, 2], norm="layer", activation="glu"), 0),
        (dict(dilations=[3, 1, 2], lookahead=5), 5),
        (dict(lookahead=14), 14),
        (dict(causal=False, norm="weight", skip_connections=True), 8),
    ],
    ids=str,
)
def test_receptive_field(options, ahead):
    """A change one step inside is seen, on either side; one step outside is not."""
    model = network(**({"activation": "tanh"} | options))
    seen, t, x = model.receptive_field, 20, inputs(1, 40, 3)
    assert seen == 1 + 2 * sum(options.get("dilations", [1, 2, 4]))
    first, last = t + ahead - seen + 1, t + ahead

    @nnx.jit
    def at(model, x):
        changed = [x.at[:, s].add(1.0) for s in (first - 1, first, last, last + 1)]
        return model(jnp.concatenate([x, *changed]))[:, t]

    same = np.asarray(at(model, x))
    different = [not np.array_equal(same[0], row) for row in same[1:]]
    assert different == [False, True, True, False]


@pytest.mark.sampled
@pytest.mark.parametrize(
    "options",
    [
        dict(norm="weight"),
        dict(norm="layer", skip_connections=True, lookahead=3),
        dict(causal=False),
        dict(conditioning=2),
        dict(norm="batch"),
    ],
    ids=str,
)
def test_last_step_alone(options):
    """And of a long sequence only what it needs: the rest may be anything."""
    whole, last = network(**options), network(return_sequences=False, **options)
    whole.eval()
    last.eval()
    x, more = inputs(2, 30, 3), {}
    if "conditioning" in options:
        more = dict(condition=inputs(2, 30, 2), segment_ids=jnp.arange(60).reshape(2, 30) // 9)
    y, z = nnx.jit(lambda a, b, x, more: (a(x, **more)[:, -1], b(x, **more)))(whole, last, x, more)
    np.testing.assert_allclose(z, y, rtol=1e-5, atol=1e-6)
    if "norm" not in options or options["norm"] != "batch":
        shapes = [v.aval.shape for v in _convolved(last, x, more)]
        assert max(shape[1] for shape in shapes) <= last.receptive_field < 30


def test_the_last_step_alone_has_the_statistics_of_the_whole_batch():
    whole, last = network(norm="batch"), network(norm="batch", return_sequences=False)
    whole.train()
    last.train()
    x = inputs(2, 30, 3)
    y, z = nnx.jit(lambda a, b, x: (a(x)[:, -1], b(x)))(whole, last, x)
    np.testing.assert_allclose(z, y, rtol=1e-5, atol=1e-6)


def _convolved(model, x, more):
    jaxpr = jax.make_jaxpr(lambda x: model(x, **more))(x)
    return [eqn.invars[0] for eqn in jaxpr.eqns if eqn.primitive.name.startswith("conv1d")]


def test_remat_changes_nothing_but_memory():
    x = inputs(2, 16, 3)
    run = nnx.jit(nnx.value_and_grad(lambda model, x: jnp.sum(jnp.sin(model(x)))))
    make = lambda remat: TCN(3, [4], 2, 2, 0.25, nnx.Rngs(0), remat=remat)  # noqa: E731
    results = [run(make(remat), x) for remat in (False, True)]
    for a, b in zip(*(jax.tree.leaves(r) for r in results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    names = primitives_of(jax.make_jaxpr(lambda x: network(remat=True)(x))(x))
    assert [name for name in names if "remat" in name or "checkpoint" in name] != []


def test_a_policy_says_what_remat_keeps():
    def convolutions(remat):
        loss = lambda model, x: jnp.sum(jnp.sin(model(x)))  # noqa: E731
        graph, params, rest = nnx.split(network(remat=remat), nnx.Param, ...)
        f = lambda params, x: loss(nnx.merge(graph, params, rest), x)  # noqa: E731
        names = primitives_of(jax.make_jaxpr(jax.grad(f))(params, inputs(2, 9, 3)))
        return sum(name in ("conv1d", "conv1d_fused") for name in names)

    assert convolutions(convs_saveable) == convolutions(False) < convolutions(True)


def test_remat_of_a_model_in_a_closure():
    """JAX's own transforms of a function that holds the model, as to evaluate or to export it."""
    x = inputs(2, 9, 3)
    for norm in (None, "batch"):
        model = network(remat=True, norm=norm, dropout=0.5)
        model.eval()
        y = model(x)
        call = lambda x, model=model: model(x)  # noqa: E731
        for transform in (jax.jit, jax.vmap):
            np.testing.assert_allclose(transform(call)(x), y, rtol=1e-5, atol=1e-6)


def test_conditions():
    x, vector = inputs(2, 9, 3), inputs(2, 2)
    for mode in ("add", "concat"):
        model = network(conditioning=2, conditioning_mode=mode)
        sequence = jnp.broadcast_to(vector[:, None], (2, 9, 2))
        run = nnx.jit(lambda model, x, c: model(x, condition=c))
        y = run(model, x, vector)
        np.testing.assert_allclose(run(model, x, sequence), y, rtol=1e-5, atol=1e-6)
        assert not np.allclose(run(model, x, -vector), y)
        with pytest.raises(ValueError, match=r"^condition must have shape \(2, 2\) or"):
            model(x, condition=inputs(2, 8, 2))
        with pytest.raises(ValueError, match=r"^the model takes a condition of 2 channels"):
            model(x)


def test_a_condition_beside_integers_is_not_rounded():
    """Counts or one-hot codes as x: their dtype is not the condition's."""
    model = network(conditioning=2, conditioning_mode="concat")
    x, condition = jnp.arange(2 * 9 * 3).reshape(2, 9, 3) % 2, inputs(2, 2)
    model.eval()
    call, step = jax.jit(model), jax.jit(model.step)
    y = call(x, condition=condition)
    np.testing.assert_array_equal(y, call(x.astype(jnp.float32), condition=condition))
    streamed, _ = step(x, model.init_state(2), condition=condition)
    np.testing.assert_allclose(streamed, y, rtol=1e-5, atol=1e-6)


def test_norms_dtypes_initializers_and_dropout():
    ones = nnx.initializers.ones
    model = network(
        norm="layer", dtype=jnp.bfloat16, param_dtype=jnp.float16, kernel_init=ones,
        spatial_dropout=True, dropout=0.5, skip_connections=True, conditioning=1,
    )  # fmt: skip
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float16)}
    assert all((layer.kernel[...] == 1).all() for layer in convolutions(model))
    x = inputs(2, 9, 3)
    call = nnx.jit(lambda model, x, condition: model(x, condition=condition))
    assert call(model, x, inputs(2, 1)).dtype == jnp.bfloat16
    dropped = np.asarray(model.blocks[0].dropout1(jnp.ones((4, 9, 4)))) == 0
    assert dropped.any() and not dropped.all()
    np.testing.assert_array_equal(dropped, np.broadcast_to(dropped[:, :1], dropped.shape))
    assert isinstance(network(norm="batch").blocks[0].norm2, nnx.BatchNorm)


def test_activation_is_carried_by_the_layer():
    """So that a kernel may fuse it; a norm in between, or a stock layer, applies it after."""
    x = inputs(2, 9, 3)
    count = lambda **o: str(jax.make_jaxpr(lambda x: network(**o)(x))(x)).count("activation=silu")  # noqa: E731
    assert count(activation="silu") >= 6
    assert count(activation="silu", norm="layer") == count(activation="silu", conv=nnx.Conv) == 0
    model, stock = (network(activation="silu", norm="weight", conv=c) for c in (Conv, nnx.Conv))
    assert_same_parameters(model, stock)
    # Of the stock layers flax's own WeightNorm writes into the kernel, so that each runs once.
    np.testing.assert_allclose(apply(model, x), apply(stock, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_channels=[]), "num_channels must be a sequence .* got \\[\\]"),
        (dict(num_channels=8), "num_channels must be a sequence .* got 8"),
        (dict(num_channels=[8, 0]), "num_channels\\[1\\] must be an int of 1 or more, got 0"),
        (dict(num_channels=[8.0]), "num_channels\\[0\\] must be an int of 1 or more, got 8.0"),
        (dict(in_channels=0), "in_channels must be an int of 1 or more, got 0"),
        (dict(out_features=-1), "out_features must be an int of 1 or more, got -1"),
        (dict(kernel_size=0), "kernel_size must be an int of 1 or more, got 0"),
        (dict(dropout=1.0), "dropout must be a number in \\[0, 1\\), got 1.0"),
        (dict(dropout=-0.1), "dropout must be a number in \\[0, 1\\), got -0.1"),
        (dict(dropout="0.1"), "dropout must be a number in \\[0, 1\\), got '0.1'"),
        (dict(rngs=0), "rngs must be an nnx.Rngs, .* got 0"),
        (dict(implementation="unheard_of"), "implementation must be .* got 'unheard_of'"),
        (dict(dilations=[1, 2]), "dilations must be a sequence of 1 ints, .* got \\[1, 2\\]"),
        (dict(dilations=[0]), "dilations\\[0\\] must be an int of 1 or more, got 0"),
        (dict(norm="group"), "norm must be None, .* got 'group'"),
        (dict(activation="rleu"), "activation must be .* got 'rleu'"),
        (dict(lookahead=3), "lookahead must be an int of 0 to 2, .* got 3"),
        (dict(lookahead=1, causal=False), "lookahead is for causal models, got 1"),
        (dict(conditioning=0), "conditioning must be an int of 1 or more, got 0"),
        (dict(conditioning=1, conditioning_mode="mul"), "conditioning_mode must be .* got 'mul'"),
    ],
    ids=str,
)
def test_bad_arguments(changes, message):
    good = dict(in_channels=3, num_channels=[4], out_features=2)
    with pytest.raises(ValueError, match=f"^{message}") as error:
        TCN(**good | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dilation=0), "dilation must be an int of 1 or more, got 0"),
        (dict(out_channels=0), "out_channels must be an int of 1 or more, got 0"),
        (dict(dropout=2), "dropout must be a number in \\[0, 1\\), got 2"),
        (dict(rngs=None), "rngs must be an nnx.Rngs, .* got None"),
    ],
    ids=str,
)
def test_bad_arguments_of_a_block(changes, message):
    good = dict(
        in_channels=3, out_channels=4, kernel_size=2, dilation=1, dropout=0.1, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match=f"^{message}"):
        TemporalBlock(**good | changes)


def test_no_last_step():
    model = network(return_sequences=False)
    for sequences in ({}, {"mask": jnp.ones((2, 0), bool)}):
        with pytest.raises(ValueError, match=r"^x must have a last step"):
            model(jnp.ones((2, 0, 3)), **sequences)


@pytest.mark.sampled
@pytest.mark.parametrize("training", [False, True])
def test_no_block_computes_those_before_it_anew(training):
    """The program grows as the network does, not as its square."""

    def activations(blocks):
        model = TCN(4, [8] * blocks, 4, 3, 0.0, nnx.Rngs(0))
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        forward = lambda params, x: jnp.sum(nnx.merge(graph, params, rest)(x) ** 2)  # noqa: E731
        f = jax.grad(forward) if training else forward
        compiled = jax.jit(f).lower(params, jnp.zeros((4, 256, 4))).compile()
        return compiled.as_text().count(" maximum(")

    assert activations(6) <= 2 * activations(3)


@pytest.mark.sampled
@pytest.mark.parametrize("conv", [Conv, nnx.Conv])
@pytest.mark.parametrize("norm", [None, "weight", "layer", "batch"])
def test_equal_models_have_equal_structures_and_can_be_pickled(norm, conv):
    """Or else each would be compiled anew, and `jax.tree.map` over two would refuse them."""
    one, other = (network(seed, norm=norm, conv=conv) for seed in range(2))
    assert nnx.graphdef(one) == nnx.graphdef(other)
    assert hash(nnx.graphdef(one)) == hash(nnx.graphdef(other))
    jax.tree.map(lambda a, b: a, one, other)
    again = pickle.loads(pickle.dumps(one))
    x = inputs(2, 9, 3)
    np.testing.assert_array_equal(again(x), one(x))


@pytest.mark.sampled
@pytest.mark.parametrize("conv", [Conv, nnx.Conv])
@pytest.mark.parametrize("norm", [None, "weight", "layer"])
def test_a_norm_computes_in_the_dtype_of_the_parameters(norm, conv):
    x = jnp.ones((2, 9, 4), jnp.bfloat16)
    model = TCN(4, [8], 2, norm=norm, param_dtype=jnp.bfloat16, conv=conv, rngs=nnx.Rngs(0))
    call = nnx.jit(lambda model, x: model(x))
    assert call(model, x).dtype == jnp.bfloat16
    with jax.enable_x64(True):
        wide = TCN(4, [8], 2, norm=norm, conv=conv, rngs=nnx.Rngs(0))
        assert call(wide, x.astype(jnp.float32)).dtype == jnp.float32
