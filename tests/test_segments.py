"""Padding and packed sequences: real steps depend on nothing that is not their own."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import jet
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from conv_pallas import conv1d, convs_saveable, explain, ops
from conv_pallas.nn import Conv
from tests.streams import model_of, numbers

pytestmark = pytest.mark.usefixtures("hardly_optimized")

LENGTHS = (4, 1, 7)  # packed in one row
IDS = jnp.repeat(jnp.asarray([3, 0, 3]), jnp.asarray(LENGTHS))  # the same id again is another
PIECES = [slice(0, 4), slice(4, 5), slice(5, 12)]


def each(f, x):
    """f of every packed sequence by itself, joined again."""
    return np.concatenate([f(x[piece]) for piece in PIECES])


@pytest.mark.parametrize("implementation", ["xla", "xla_native"])
@pytest.mark.parametrize(
    ("groups", "padding"), [(1, "CAUSAL"), (2, "SAME"), (4, [(1, 5)])], ids=str
)
def test_conv1d_packed(groups, padding, implementation):
    x, w = numbers(12, 4), numbers(4, 4 // groups, 8, seed=1)
    options = dict(kernel_dilation=2, padding=padding, feature_group_count=groups,
                   activation="silu", implementation=implementation)  # fmt: skip

    @jax.jit
    def run(x, w, b):
        packed = conv1d(x, w, b, segment_ids=IDS, **options)
        return packed, [conv1d(x[piece], w, b, **options) for piece in PIECES]

    packed, parts = run(x, w, numbers(8, seed=2))
    np.testing.assert_allclose(packed, np.concatenate(parts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_one_tap_that_looks_back(groups):
    """Into another sequence it does not."""
    x, w = numbers(12, 4), numbers(1, 4 // groups, 4)
    late = functools.partial(conv1d, padding=[(2, -2)], feature_group_count=groups)
    expected = each(lambda x: late(x, w), x)
    np.testing.assert_allclose(late(x, w, segment_ids=IDS), expected, rtol=1e-5, atol=1e-5)


def test_packed_rows_under_every_transform():
    """A NaN in one sequence stays there, in the value and in the gradient."""
    x, w = numbers(2, 12, 4).at[0, 2].set(jnp.nan), numbers(3, 4, 4, seed=1)
    ids = jnp.stack([IDS, IDS[::-1]])

    @jax.jit
    def run(x, w):
        f = lambda x: conv1d(x, w, segment_ids=ids, padding="SAME", kernel_dilation=3)  # noqa: E731
        y, vjp = jax.vjp(f, x)
        (dx,) = vjp(jnp.ones_like(y))
        one = jax.vmap(lambda x, i: conv1d(x, w, segment_ids=i, padding="SAME", kernel_dilation=3))
        return y, dx, one(x, ids)

    y, dx, mapped = run(x, w)
    assert jnp.isnan(y[0, :4]).any()
    assert jnp.isfinite(y[0, 4:]).all() and jnp.isfinite(y[1]).all()
    assert jnp.isfinite(dx).all()
    np.testing.assert_allclose(mapped, y, rtol=1e-5, atol=1e-5)


@pytest.mark.sampled
@pytest.mark.parametrize(("dtype", "bias"), [("float32", "float32"), ("bfloat16", "bfloat16"),
                                             ("bfloat16", "float32")])  # fmt: skip
@pytest.mark.parametrize("groups, O, activation", [
    (4, 4, "tanh"), (4, 8, "tanh"), (1, 5, "tanh"), (1, 4, "silu"), (2, 6, "silu"), (2, 2, "tanh"),
])  # fmt: skip
def test_packed_to_the_second_order(groups, O, activation, dtype, bias):
    """Value, gradients and a gradient of gradients."""
    x, w = numbers(12, 4).astype(dtype), numbers(3, 4 // groups, O, seed=1).astype(dtype)
    b = numbers(O, seed=2).astype(bias)
    convolve = functools.partial(
        convolve_operands, groups=groups, kernel_dilation=2, padding="SAME", activation=activation
    )

    def whole(x, w, b):
        return convolve(x, w, b, segment_ids=IDS)

    def parts(x, w, b):
        return jnp.concatenate([convolve(x[piece], w, b) for piece in PIECES])

    def loss(f):
        wide = lambda y: y.astype(jnp.promote_types(y.dtype, jnp.float32))  # noqa: E731
        return lambda x, w, b: jnp.sum(jnp.sin(wide(f(x, w, b))))

    def first(f):
        return jax.grad(loss(f), (0, 1, 2))

    def second(f):  # a gradient along a direction: forward over reverse
        return lambda x, w, b: jax.jvp(first(f), (x, w, b), (x[::-1], w[::-1], b))[1]

    run = lambda f: jax.jit(lambda *a: (f(*a), first(f)(*a), second(f)(*a)))  # noqa: E731
    got = run(whole)(x, w, b)
    with jax.enable_x64(True):
        exact = jax.device_get(run(parts)(*(a.astype(jnp.float64) for a in (x, w, b))))
    assert got[0].dtype == jnp.promote_types(dtype, bias)
    eps = float(jnp.finfo(dtype).eps)
    for a, e in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), e, atol=4 * eps * np.abs(e).max())
    # By a kernel rounded once, after taps, bias and activation.
    if bias == dtype == "bfloat16" and groups in (1, 4):
        np.testing.assert_allclose(got[0].astype(jnp.float32), exact[0], rtol=0.51 * eps)


def convolve_operands(x, w, b, *, groups, **options):
    """`conv1d` of operands that keep their dtypes."""
    how = dict(precision=None, preferred_element_type=None, out_sharding=None, implementation="xla")
    return ops.convolve(x, w, b, feature_group_count=groups, **how, **options)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("groups", [1, 2])
def test_packed_keeps_what_a_plain_layer_does(groups, activation):
    """And the ids, instead of what each tap sees."""
    x, w, b = numbers(64, 16), numbers(9, 16 // groups, 16), numbers(16)
    ids = jnp.arange(64) // 9

    def kept(**packed):
        f = functools.partial(conv1d, feature_group_count=groups, activation=activation, **packed)
        _, residuals = jax.eval_shape(functools.partial(jax.vjp, f), x, w, b)
        return sum(math.prod(a.shape) for a in jax.tree.leaves(residuals))

    assert kept(segment_ids=ids) == kept() + ids.size


@pytest.mark.parametrize("taps", [5, 31, 40])  # 40 have no bits in an int32
def test_depthwise_packed_is_one_pass(taps):
    """XLA fuses all taps, and computes them once where what comes of them is summed."""
    x, w, ids = numbers(64, 16), numbers(taps, 1, 16), jnp.arange(64) // 9
    f = lambda x, w: conv1d(x, w, segment_ids=ids, feature_group_count=16)  # noqa: E731
    lowered = jax.jit(f).lower(x, w)
    if taps < 32:  # and their gradients hold no array for each of them
        step = jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.tanh(f(x, w))), (0, 1))).lower(x, w)
        assert step.compile().memory_analysis().temp_size_in_bytes < 6 * x.nbytes
    assert lowered.compile().memory_analysis().temp_size_in_bytes < x.nbytes
    assert "optimization_barrier" in lowered.as_text()
    for policy in (None, convs_saveable):
        g = jax.checkpoint(lambda x, w: jnp.sin(f(x, w)), policy=policy) if policy else f
        _, residuals = jax.eval_shape(functools.partial(jax.vjp, g), x, w)
        kept = sum(math.prod(a.shape) for a in jax.tree.leaves(residuals))
        assert kept < (4 if policy else 3) * x.size


@pytest.mark.parametrize("implementation", [None, "xla_native"])
@pytest.mark.parametrize("groups", [6, 3, 1])
def test_packed_keeps_what_is_not_seen_out(groups, implementation):
    """NaN and infinity, in the value and in all gradients; bits of 31 taps, and the sign's."""
    x, w, b = numbers(2, 40, 6), numbers(31, 6 // groups, 6, seed=1), numbers(6, seed=2)
    ids = jnp.asarray([[0] * 9 + [1] * 31, [5] * 40])
    bad = x.at[0, 3].set(jnp.nan).at[0, 5].set(jnp.inf)

    @jax.jit
    def run(x):
        f = functools.partial(
            conv1d, segment_ids=ids, feature_group_count=groups, activation="silu",
            implementation=implementation,
        )  # fmt: skip
        y, vjp = jax.vjp(f, x, w, b)
        # No gradient comes from what the first sequence gives.
        return y, vjp(jnp.where((ids == 0)[..., None], 0.0, jnp.cos(y)))

    (y, (dx, *_)), (good, grads) = run(bad), run(x)  # the others are sums over all outputs
    assert not jnp.isfinite(y[0, 3:9]).any()
    np.testing.assert_array_equal(y[0, 9:], good[0, 9:])
    np.testing.assert_array_equal(y[1], good[1])
    np.testing.assert_array_equal(dx[1], grads[0][1])
    np.testing.assert_array_equal(dx[0, 9:], grads[0][0, 9:])


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_packed_under_transforms(groups):
    """Several kernels at once, one with its batch mapped, each member's gradients; and `jet`."""
    x, w, b = numbers(3, 12, 4), numbers(3, 3, 4 // groups, 4, seed=1), numbers(4, seed=2)
    ids = jnp.stack([IDS, IDS[::-1], IDS * 0])

    def f(x, w, b, ids):
        return conv1d(x, w, b, segment_ids=ids, feature_group_count=groups, activation="gelu")

    def loss(*a):
        return jnp.sum(jnp.sin(f(*a)))

    grad = jax.grad(loss, (0, 1, 2))
    each = [(x[i], w[0], b, ids[i]) for i in range(3)]

    @jax.jit
    def run():
        mapped = jax.vmap(f, (0, None, None, 0))(x, w[0], b, ids)
        kernels = jax.vmap(f, (None, 0, None, None))(x[0], w, b, ids[0])
        members = jax.vmap(grad, (0, None, None, 0))(x, w[0], b, ids)
        inputs = jax.vmap(jax.grad(loss), (0, None, None, 0))(x, w[0], b, ids)
        alone = [f(*a) for a in each], [f(x[0], k, b, ids[0]) for k in w], [grad(*a) for a in each]
        return mapped, kernels, members, inputs, alone

    mapped, kernels, members, inputs, (by_batch, by_kernel, by_member) = run()
    stack = lambda trees: jax.tree.map(lambda *a: jnp.stack(a), *trees)  # noqa: E731
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(mapped, stack(by_batch))
    close(kernels, stack(by_kernel))
    jax.tree.map(close, members, stack(by_member))
    close(inputs, members[0])
    one = functools.partial(f, ids=ids[0])
    primals, tangents = each[0][:3], (x[1], w[1], b)
    _, (slope,) = jet.jet(one, primals, [[t] for t in tangents])
    close(slope, jax.jvp(one, primals, tangents)[1])


@pytest.mark.parametrize("groups", [16, 2, 1])
def test_packed_keeps_little_of_several_kernels(groups):
    """Of an ensemble, whose kernels are mapped, nothing for each tap."""
    x, w, ids = numbers(64, 16), numbers(3, 9, 16 // groups, 16), jnp.arange(64) // 9
    f = lambda w, x: jnp.tanh(  # noqa: E731
        conv1d(x, w, segment_ids=ids, feature_group_count=groups, activation="silu")
    )
    mapped = lambda w: jax.vmap(f, (0, None))(w, x)  # noqa: E731
    _, residuals = jax.eval_shape(functools.partial(jax.vjp, mapped), w)
    kept = sum(math.prod(a.shape) for a in jax.tree.leaves(residuals) if a.shape != w.shape)
    # x, three outputs and what each becomes; a dense layer's z as well.
    assert kept < (9 if groups == 16 else 15) * x.size < 3 * 9 * x.size


@pytest.mark.parametrize("padding", ["CAUSAL", "SAME"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_packed_shorter_than_its_field(groups, padding):
    """Taps at the ends that no output sees, and their gradients, which are zero."""
    x, w, b = numbers(12, 4), numbers(21, 4 // groups, 4, seed=1), numbers(4, seed=2)
    options = dict(
        kernel_dilation=2, padding=padding, feature_group_count=groups, activation="silu"
    )

    def loss(f):
        return lambda x, w, b: jnp.sum(jnp.sin(f(x, w, b)))

    whole = lambda x, w, b: conv1d(x, w, b, segment_ids=IDS, **options)  # noqa: E731
    parts = lambda x, w, b: jnp.concatenate([conv1d(x[p], w, b, **options) for p in PIECES])  # noqa: E731
    got, expected = (
        jax.jit(jax.value_and_grad(loss(f), (0, 1, 2)))(x, w, b) for f in (whole, parts)
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, got, expected)
    assert (got[1][1] == 0).all((1, 2)).sum() > 4


@pytest.mark.parametrize("groups, O", [(4, 4), (1, 4), (1, 7), (2, 4), (2, 6)])
def test_a_packed_kernel_that_is_not_trained_keeps_no_x(groups, O):
    x, g = numbers(12, 4), numbers(12, O, seed=3)
    w, b = numbers(3, 4 // groups, O, seed=1), numbers(O, seed=2)
    options = dict(feature_group_count=groups, padding="SAME")
    f = lambda x: conv1d(x, w, b, segment_ids=IDS, **options)  # noqa: E731
    _, residuals = jax.eval_shape(functools.partial(jax.vjp, f), x)
    kept = (math.prod(a.shape) for a in jax.tree.leaves(residuals) if a.shape != w.shape)
    assert sum(kept) < x.size

    def dx(f):
        return jax.jit(lambda x: jax.vjp(f, x)[1](g))(x)[0]

    each = lambda x: jnp.concatenate(  # noqa: E731
        [conv1d(x[piece], w, b, **options) for piece in PIECES]
    )
    np.testing.assert_allclose(dx(f), dx(each), rtol=1e-5, atol=1e-6)
    second = jax.jit(
        lambda x: jax.jvp(lambda x: jax.grad(lambda x: (f(x) ** 3).sum())(x), (x,), (x[::-1],))
    )
    expected = jax.jvp(jax.grad(lambda x: (each(x) ** 3).sum()), (x,), (x[::-1],))
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4), second(x), expected
    )


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("groups, places", [
    (4, [(None, None, None), (None, None, "model")]),
    (1, [(None, None, "model"), (None, "model", None)]),
    (2, [(None, None, None), (None, None, "model")]),
], ids=str)  # fmt: skip
def test_packed_on_a_mesh_to_the_second_order(groups, places, axis_type):
    """x and w need not be split alike; and where channels in are, z is a sum over devices."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    x, w, b = numbers(4, 12, 4), numbers(3, 4 // groups, 4, seed=1), numbers(4, seed=2)
    ids = jnp.stack([IDS, IDS[::-1], IDS * 0, IDS])

    def f(x, w, b, ids):
        y = conv1d(x, w, b, segment_ids=ids, feature_group_count=groups, activation="silu")
        return jnp.sum(jnp.sin(y))

    def second(x, w, b, ids):
        g = lambda x, w, b: jax.grad(f, (0, 1, 2))(x, w, b, ids)  # noqa: E731
        each = jax.vmap(jax.grad(f, (0, 1)), (0, None, None, 0))
        return jax.jvp(g, (x, w, b), (x, w, b)), each(x[None], w, b, ids[None])

    expected = jax.jit(second)(x, w, b, ids)
    placed = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))  # noqa: E731
    with jax.set_mesh(mesh):
        for place in places:
            channels = (None, place[1]) if groups == 1 else ()
            operands = placed(x, "data", *channels), placed(w, *place), placed(b), placed(ids)
            got = jax.jit(second)(*operands)
            close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
            jax.tree.map(close, got, expected)


def test_depthwise_packed_computes_what_is_read():
    """Of a layer that is not trained no kernel gradient, and of the first layer no input's."""
    x, w, ids = numbers(12, 4), numbers(3, 1, 4), IDS
    f = lambda x, w: conv1d(x, w, segment_ids=ids, feature_group_count=4, activation="tanh")  # noqa: E731

    def wanted(loss):
        (eqn,) = [
            e for e in jax.make_jaxpr(jax.jit(loss))(x, w).jaxpr.eqns[0].params["jaxpr"].eqns
            if e.primitive.name == "conv1d_packed_backward"
        ]  # fmt: skip
        return eqn.params["wanted"]

    assert wanted(jax.grad(lambda x, w: f(x, w).sum())) == (True, False, False)
    assert wanted(jax.grad(lambda x, w: f(x, w).sum(), 1)) == (False, True, False)
    assert wanted(jax.grad(lambda x, w: f(x, w).sum(), (0, 1))) == (True, True, False)


@pytest.mark.parametrize("shape", [(2, 0), (0, 5), (0, 0)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_no_steps_and_no_sequences(shape, groups):
    """As without ids, nothing comes out, and the kernel's gradient is zero."""
    x, w, ids = jnp.zeros((*shape, 4)), numbers(3, 4 // groups, 8), jnp.zeros(shape, jnp.int32)
    f = lambda w: conv1d(x, w, segment_ids=ids, feature_group_count=groups)  # noqa: E731
    y, vjp = jax.vjp(f, w)
    assert y.shape == (*shape, 8)
    assert not vjp(y)[0].any()


OPTIONS = [
    dict(norm="weight", causal=False),
    dict(norm="layer", activation="glu", lookahead=4),
    dict(norm="batch", activation="gelu", skip_connections=True),
    dict(conv=nnx.Conv, activation="silu"),
]


@pytest.mark.sampled
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_padding_reaches_no_real_step(options):
    """What a TCN computes of padded sequences is what it computes of each by itself."""
    model = model_of(**options)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    x, length = numbers(2, 12, 3), 7
    mask = jnp.arange(12) < jnp.asarray([[12], [length]])

    @jax.jit
    def run(params, x):
        def loss(params, x):
            y = nnx.merge(graph, params, rest)(x, mask=mask)
            return jnp.sum(jnp.sin(jnp.where(mask[..., None], y, 0.0))), y

        model = nnx.merge(graph, params, rest)
        grads, y = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return y, grads, model(x[:1]), model(x[1:, :length])

    y, grads, first, second = run(params, x)
    np.testing.assert_allclose(y[:1], first, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y[1:, :length], second, rtol=1e-5, atol=1e-5)
    assert not y[1, length:].any()
    poisoned, bad, _, _ = run(params, jnp.where(mask[..., None], x, jnp.nan))
    np.testing.assert_array_equal(poisoned, y)
    for a, b in zip(jax.tree.leaves(bad), jax.tree.leaves(grads), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.sampled
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_packed_in_a_tcn(options):
    model, x = model_of(**options), numbers(12, 3)
    packed, parts = nnx.jit(
        lambda model, x: (model(x, segment_ids=IDS), [model(x[piece]) for piece in PIECES])
    )(model, x)
    np.testing.assert_allclose(packed, np.concatenate(parts), rtol=1e-4, atol=1e-5)


def test_batch_norm_learns_from_real_steps_alone():
    model, x = model_of(norm="batch", causal=True), numbers(2, 12, 3)
    model.train()
    mask = jnp.arange(12) < jnp.asarray([[12], [5]])
    model(jnp.where(mask[..., None], x, jnp.nan), mask=mask)
    alone = model_of(norm="batch", causal=True)
    first = alone.blocks[0].conv1
    h = np.asarray(first(x))[np.asarray(mask)]  # causal: padding at the end changes none of these
    want = 0.99 * np.asarray(alone.blocks[0].norm1.mean[...]) + 0.01 * h.mean(0)
    np.testing.assert_allclose(model.blocks[0].norm1.mean[...], want, rtol=1e-5, atol=1e-6)


def test_last_step_is_the_last_real_one():
    model = model_of(return_sequences=False)
    x = numbers(2, 12, 3)
    mask = jnp.arange(12) < jnp.asarray([[12], [7]])
    y, first, second = nnx.jit(
        lambda model, x: (model(x, mask=mask), model(x[:1]), model(x[1:, :7]))
    )(model, x)
    np.testing.assert_allclose(y, np.concatenate([first, second]), rtol=1e-5, atol=1e-6)


def test_ids_and_masks_are_checked_before_they_are_cut():
    model, x = model_of(return_sequences=False), numbers(2, 30, 3)
    ids, mask = np.zeros((2, 30), int), np.ones((2, 30), bool)
    np.testing.assert_array_equal(
        model(x, segment_ids=ids.tolist(), mask=mask.tolist()), model(x, segment_ids=ids, mask=mask)
    )
    assert model.receptive_field < 30
    with pytest.raises(ValueError, match=r"^segment_ids must be integers of shape \(2, 30\)"):
        model(x, segment_ids=np.zeros((2, 50), int))


def test_explained():
    """Without a kernel of bits a pointwise convolution of all taps, and depthwise one for each."""
    x, w, ids = numbers(80, 4), numbers(40, 4, 4), jnp.arange(80) // 9
    expected = explain(numbers(80, 160), numbers(1, 160, 4))
    assert str(explain(x, w, segment_ids=ids, mask=ids > 0)) == str(expected)
    assert str(explain(x, w)) != str(expected)
    assert "packed sequences: a bit for each tap" in str(explain(x, w[:3], segment_ids=ids))
    # And in a convolution of one tap no output sees another's step.
    assert str(explain(x, w[:1], segment_ids=ids)) == str(explain(x, w[:1]))
    x, ids, depthwise = numbers(800, 64), jnp.arange(800) // 9, dict(feature_group_count=64)
    w, b = numbers(40, 1, 64), numbers(64)
    packed = explain(x, w, segment_ids=ids, **depthwise)
    assert str(packed) == str(explain(x, w[:1], **depthwise)) != str(explain(x, w, **depthwise))
    fused = str(explain(x, w, b, activation="relu", segment_ids=ids, **depthwise))
    assert "bias and relu: by XLA" in fused and "each tap of packed sequences" in fused
    model = explain(lambda *a: conv1d(*a, segment_ids=ids, **depthwise), x, w)
    assert list(model.times.values()) == [40]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(mask=jnp.ones(12)), "mask must be bool of shape"),
        (dict(mask=jnp.ones(11, bool)), "mask must be bool of shape"),
        (dict(segment_ids=jnp.ones(12)), "segment_ids must be integers of shape"),
        (dict(segment_ids=IDS[1:]), "segment_ids must be integers of shape"),
        (dict(segment_ids=IDS, strides=2), "segment_ids need one output for each step"),
        (dict(segment_ids=IDS, padding="VALID"), "segment_ids need one output for each step"),
        (dict(segment_ids=IDS, padding="CIRCULAR"), "segment_ids need one output for each"),
    ],
    ids=str,
)
def test_errors_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        conv1d(numbers(12, 4), numbers(3, 4, 4), **arguments)
    assert "\n" not in str(error.value)


def test_of_a_layer():
    plane = Conv(3, 3, (3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^segment_ids= is for 1-D convolutions"):
        plane(numbers(2, 5, 5, 3), segment_ids=jnp.ones((2, 5, 5), int))
    mask = jnp.arange(5) < 3
    hidden = jnp.where(mask[:, None], numbers(2, 5, 5, 3), jnp.nan)
    assert jnp.isfinite(plane(hidden, mask=jnp.broadcast_to(mask, (2, 5, 5)))).all()
    stock = model_of(conv=nnx.Conv)
    with pytest.raises(ValueError, match=r"^segment_ids= needs layers of conv_pallas\.nn\.Conv"):
        stock(numbers(12, 3), segment_ids=IDS)
