"""`conv1d(axis_name=...)`: one device's part of a sequence, inside of `jax.shard_map`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from conv_pallas import conv1d
from conv_pallas.nn import TCN, Conv, TemporalBlock
from tests.streams import numbers
from tests.support import collectives, compiled_quickly, sent, tree_close

pytestmark = pytest.mark.usefixtures("hardly_optimized")

SHORT, LONG = numbers(2, 24, 4), numbers(2, 160, 4)
W, BIAS = numbers(3, 4, 6, seed=1), numbers(6, seed=2)

each_vma = pytest.mark.parametrize("check_vma", [True, False])


def _mesh(kinds=(AxisType.Auto,) * 2):
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)


def _split(mesh, options, names="a", check_vma=True):
    """``conv1d`` of whole arrays, computed by devices that hold a part of time each."""

    def local(x, w, b, mask, ids):
        return conv1d(x, w, b, mask=mask, segment_ids=ids, axis_name=names, **options)

    steps = P(None, names)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(steps, P(), P(), steps, steps), out_specs=steps,
        check_vma=check_vma,
    )  # fmt: skip


def _everything(f):
    """The value, the gradients, and the second derivative along the operands."""

    def run(x, w, b, mask=None, ids=None):
        loss = lambda *a: jnp.sum(jnp.sin(f(*a, mask, ids)))  # noqa: E731
        grads = jax.grad(loss, (0, 1, 2))
        return f(x, w, b, mask, ids), grads(x, w, b), jax.jvp(grads, (x, w, b), (x, w, b))[1]

    return run


def _whole(options):
    return lambda x, w, b, mask, ids: conv1d(x, w, b, mask=mask, segment_ids=ids, **options)


@functools.cache
def _expected(name):
    x, options = CASES[name]
    return jax.jit(_everything(_whole(options)))(x, W, BIAS)


CASES = {
    "mended": (LONG, dict(kernel_dilation=2)),
    "mended_same": (LONG, dict(kernel_dilation=2, padding="SAME")),
    "surrounded": (SHORT, dict(kernel_dilation=2)),
    "two_neighbours": (SHORT, dict(kernel_dilation=5, activation="silu")),
    "far": (SHORT, dict(kernel_dilation=7, activation="silu")),
    "far_ahead": (SHORT, dict(kernel_dilation=9, padding=[(0, 18)])),
    "beyond_the_ends": (SHORT, dict(kernel_dilation=40)),
    "activation": (LONG, dict(padding="SAME", activation="silu")),
    "callable": (LONG, dict(activation=jnp.sin)),
    "stride": (SHORT, dict(strides=3)),
    "stride_stock": (SHORT, dict(strides=3, implementation="xla_native")),
    "input_dilation": (SHORT, dict(input_dilation=2, padding=[(2, 1)])),
}


@pytest.mark.sampled
@each_vma
@pytest.mark.parametrize("name", CASES)
def test_the_parts_are_those_of_the_whole(name, check_vma):
    x, options = CASES[name]
    f = _split(_mesh(), options, check_vma=check_vma)
    compiled, out = compiled_quickly(_everything(f), _mesh(), x, W, BIAS)
    tree_close(out, _expected(name), rtol=1e-4)
    assert set(collectives(compiled)) <= {"collective-permute", "all-reduce"}


@pytest.mark.sampled
@each_vma
@pytest.mark.parametrize("D", [2, 7])
def test_packed_and_padded_sequences(D, check_vma):
    ids = np.stack([np.searchsorted(ends, np.arange(24), "right") for ends in ((5, 18), (12, 13))])
    mask = np.arange(24) < np.array([[24], [15]])
    options = dict(kernel_dilation=D, padding="SAME", activation="relu")
    for packed in (None, ids):
        arguments = SHORT, W, BIAS, mask, packed
        f = _everything(_split(_mesh(), options, check_vma=check_vma))
        _, out = compiled_quickly(f, _mesh(), *arguments)
        tree_close(out, jax.jit(_everything(_whole(options)))(*arguments), rtol=1e-4)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a"), ("b",)], ids=str)
def test_time_over_several_axes(names):
    options = dict(kernel_dilation=2)
    f = _everything(_split(_mesh(), options, names))
    _, out = compiled_quickly(f, _mesh(), SHORT, W, BIAS)
    tree_close(out, jax.jit(_everything(_whole(options)))(SHORT, W, BIAS), rtol=1e-4)


@each_vma
def test_gradients_inside_of_shard_map(check_vma):
    """Each device differentiates the sum of all its own outputs: the halo's share travels back."""

    def local(x, w):
        f = lambda x, w: jnp.sum(jnp.sin(conv1d(x, w, kernel_dilation=2, axis_name="a")))  # noqa: E731
        dx, dw = jax.grad(f, (0, 1))(x, w)
        return dx, dw if check_vma else jax.lax.psum(dw, "a")

    specs = dict(in_specs=(P(None, "a"), P()), out_specs=(P(None, "a"), P()))
    f = jax.jit(jax.shard_map(local, mesh=_mesh(), check_vma=check_vma, **specs))
    want = jax.grad(lambda x, w: jnp.sum(jnp.sin(conv1d(x, w, kernel_dilation=2))), (0, 1))
    for x in (SHORT, LONG):
        tree_close(f(x, W), want(x, W), rtol=1e-4)


@pytest.mark.parametrize("implementation", [None, "xla_native"])
def test_a_layer(implementation):
    options = dict(kernel_dilation=2, padding="CAUSAL", implementation=implementation)
    layer = Conv(4, 6, 3, rngs=nnx.Rngs(0), **options)
    steps = P(None, "a")
    f = jax.shard_map(
        lambda x: layer(x, activation="relu", axis_name="a"),
        mesh=_mesh(), in_specs=steps, out_specs=steps,
    )  # fmt: skip
    tree_close(jax.jit(f)(SHORT), jax.nn.relu(layer(SHORT)), rtol=1e-4)
    flat = Conv(4, 6, (3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^axis_name= is for 1-D convolutions"):
        flat(SHORT[None], axis_name="a")


NETWORKS = {
    "causal": dict(skip_connections=True, norm="weight"),
    "same": dict(causal=False, norm="layer", activation="glu"),
    "late": dict(lookahead=3, conditioning=2, remat=True),
    "concat": dict(conditioning=2, conditioning_mode="concat"),
}


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "check_vma"), [("causal", False), *((name, True) for name in NETWORKS)]
)
def test_a_network(name, check_vma):
    options = NETWORKS[name]
    model = TCN(4, [6, 6, 3], 5, 3, 0.0, rngs=nnx.Rngs(0), **options)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    condition = numbers(2, 24, 2, seed=3) if "conditioning" in options else None
    mask = np.arange(24) < np.array([[24], [15]])
    ids = np.stack([np.searchsorted(ends, np.arange(24), "right") for ends in ((5, 18), (12, 13))])

    def run(params, x, condition, mask, ids, **more):
        model = nnx.merge(graph, params, rest)
        return model(x, condition=condition, mask=mask, segment_ids=ids, **more)

    def value_and_gradients(f):
        def loss(*arguments):
            y = f(*arguments)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))

    steps = P(None, "a")
    split = jax.shard_map(
        functools.partial(run, axis_name="a"), mesh=_mesh(), check_vma=check_vma,
        in_specs=(P(), steps, steps, steps, steps), out_specs=steps,
    )  # fmt: skip
    arguments = params, SHORT, condition, *((None, None) if name == "same" else (mask, ids))
    out, want = value_and_gradients(split)(*arguments), value_and_gradients(run)(*arguments)
    tree_close(out, want, rtol=1e-4)


def test_what_a_network_can_not_split():
    run = lambda model: jax.eval_shape(  # noqa: E731
        jax.shard_map(
            functools.partial(model, axis_name="a"),
            mesh=_mesh(), in_specs=P(None, "a"), out_specs=P(None, "a"),
        ),
        SHORT,
    )  # fmt: skip
    normed = dict(norm="batch", rngs=nnx.Rngs(0))
    for model in (TCN(4, [6], 5, **normed), TemporalBlock(4, 6, 3, 1, 0.0, **normed)):
        with pytest.raises(ValueError, match=r"^batch norm in training .* axis_name='a' each"):
            run(model)
        model.eval()
        run(model)
    with pytest.raises(ValueError, match=r"^axis_name='a' is for return_sequences=True"):
        run(TCN(4, [6], 5, return_sequences=False))
    with pytest.raises(ValueError, match=r"^axis_name= needs layers of conv_pallas\.nn\.Conv"):
        run(TCN(4, [6], 5, conv=nnx.Conv))


def test_what_travels():
    """The halo, and nothing where time is whole."""
    for D, steps in ((2, 4), (7, 14), (50, 80)):  # of 40 on each device
        f = _split(_mesh(), dict(kernel_dilation=D))
        compiled, _ = compiled_quickly(f, _mesh(), LONG, W, BIAS, None, None)
        assert collectives(compiled).keys() == {"collective-permute"}
        assert sent(compiled) == 2 * steps * 4
    alone = jax.make_mesh((1,), ("a",), axis_types=(AxisType.Auto,))
    compiled, _ = compiled_quickly(_split(alone, {}), alone, LONG, W, BIAS, None, None)
    assert not collectives(compiled)


@pytest.mark.parametrize(
    "kinds", [(AxisType.Explicit,) * 2, (AxisType.Auto, AxisType.Explicit)], ids=str
)
def test_the_batch_over_an_axis_that_is_not_mapped(kinds):
    mesh, options = _mesh(kinds), dict(kernel_dilation=2, activation="silu")
    f = lambda x, w: jnp.sum(jnp.sin(conv1d(x, w, BIAS, **options)))  # noqa: E731
    local = functools.partial(conv1d, bias=BIAS, axis_name="a", **options)
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(P(None, "a"), P()), out_specs=P(None, "a"), axis_names={"a"}
    )
    spec = P("b", "a") if kinds[0] == AxisType.Explicit else P("b")
    x = jax.device_put(LONG, jax.sharding.NamedSharding(mesh, spec))
    w = jax.device_put(W, jax.sharding.NamedSharding(mesh, P()))
    grads = jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(mapped(x, w))), (0, 1))
    _, out = compiled_quickly(grads, mesh, x, w)
    tree_close(out, jax.jit(jax.value_and_grad(f, (0, 1)))(LONG, W), rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [dict(padding="VALID"), dict(padding="CIRCULAR"), dict(padding="REFLECT"), dict(strides=4),
     dict(padding=[(1, 1)], kernel_dilation=2)],
    ids=str,
)  # fmt: skip
def test_what_can_not_be_split_says_so(options):
    with pytest.raises(ValueError, match=r"^axis_name='a' needs as many outputs") as error:
        jax.eval_shape(_split(_mesh(), options), SHORT, W, BIAS, None, None)
    assert "\n" not in str(error.value)


def test_an_axis_of_no_shard_map():
    with pytest.raises(ValueError, match=r"^axis_name must be an axis .* none here; got 'a'"):
        conv1d(SHORT, W, axis_name="a")
    for names in ("time", ("a", "time"), ("a", "a"), (), 1):
        with pytest.raises(ValueError, match=r"^axis_name must be an axis .*: a, b; got"):
            f = lambda x: conv1d(x, W, axis_name=names)  # noqa: B023, E731
            jax.eval_shape(jax.shard_map(f, mesh=_mesh(), in_specs=P(), out_specs=P()), SHORT)
