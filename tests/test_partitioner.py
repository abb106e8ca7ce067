"""Where XLA's partitioner splits what it is given: on TPUs, in exports, beside explicit axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from conv_pallas import conv1d, lowering
from conv_pallas.kernels import xla_tuned
from tests.support import tree_close

pytestmark = pytest.mark.usefixtures("hardly_optimized")

LAYERS = {
    "dense": dict(C=8, O=8, K=3, D=2),
    "dense_many_taps": dict(C=4, O=8, K=80),
    "stride": dict(C=8, O=8, K=4, S=2),
    "grouped": dict(C=8, O=16, K=3, G=4),
    "grouped_many_taps": dict(C=4, O=8, K=70, G=2),
    "depthwise": dict(C=8, O=8, K=3, D=2, G=8),
    "depthwise_many_taps": dict(C=8, O=8, K=70, G=8),
    "grouped_one_tap": dict(C=8, O=16, K=1, G=4),
    "multiplier": dict(C=4, O=8, K=4, G=4),
    "multiplier_many_taps": dict(C=4, O=8, K=72, G=4),
}
# Of x and of w, on a mesh of 2 and 4 devices.
PLACES = {
    "batch": (P("a"), P()),
    "time": (P(None, "a"), P()),
    "channels": (P(None, None, "a"), P()),
    "outputs": (P(), P(None, None, ("a", "b"))),
    "time_and_outputs": (P(None, "a"), P(None, None, "b")),
    "taps": (P(None, None, "a"), P("a")),
    "taps_and_time": (P(None, "b", "a"), P("a")),
}
ALL = [
    (name, place) for name, sizes in LAYERS.items() for place in PLACES
    if "taps" not in place or sizes["K"] % 2 == 0
]  # fmt: skip


def _layer(name: str, implementation="xla"):
    """Value and gradients, and their operands."""
    sizes = dict(D=1, S=1, G=1) | LAYERS[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 40, sizes["C"])).astype(np.float32)
    w = rng.standard_normal((sizes["K"], sizes["C"] // sizes["G"], sizes["O"])).astype(np.float32)
    f = functools.partial(
        conv1d, strides=sizes["S"], kernel_dilation=sizes["D"], feature_group_count=sizes["G"],
        implementation=implementation,
    )  # fmt: skip
    return jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(f(x, w))), (0, 1)), x, w


def _placed(x, w, place: str):
    """On a mesh of two axes, most often with one along which nothing is split."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    pairs = zip((x, w), PLACES[place], strict=True)
    return [jax.device_put(a, NamedSharding(mesh, p)) for a, p in pairs]


@pytest.mark.sampled
@pytest.mark.parametrize("rule", ["measured", "native"])
@pytest.mark.parametrize("name, place", ALL)
def test_gradients_are_right_where_it_asks_nobody(name, rule, place, monkeypatch):
    """Also where the rules would take JAX's own transposes, as they do for TPUs."""
    f, x, w = _layer(name)
    want = jax.jit(f)(x, w)
    monkeypatch.setattr(lowering, "_partitioner_asks", lambda ctx, platform: False)
    if rule == "native":
        monkeypatch.setattr(xla_tuned, "rule", lambda problem: "native")
    got = jax.jit(lambda *a: f(*a))(*_placed(x, w, place))  # compiled anew
    tree_close(jax.device_get(got), want, rtol=1e-4)


@pytest.mark.parametrize("name", ["dense", "stride", "grouped", "depthwise_many_taps"])
def test_gradients_of_an_export_are_right(name):
    f, x, w = _layer(name)
    operands = _placed(x, w, "time" if name in ("dense", "stride") else "batch")
    exported = export.export(jax.jit(f))(*operands)
    tree_close(jax.device_get(exported.call(*operands)), jax.jit(f)(x, w), rtol=1e-4)


@pytest.mark.parametrize("name", ["dense", "stride"])
def test_gradients_in_a_shard_map_over_another_axis_are_right(name):
    """Where the axis that splits time is left to the partitioner, which may ask nobody there."""
    f, x, w = _layer(name)
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
    place = NamedSharding(mesh, P(None, "a"))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("b"), P()), out_specs=(P(), (P("b"), P())),
        axis_names={"b"},
    )  # fmt: skip
    def step(x, w):
        value, (dx, dw) = f(x, jax.lax.pcast(w, "b", to="varying"))
        return jax.lax.psum(value, "b"), (dx, jax.lax.psum(dw, "b"))

    got = jax.jit(step)(jax.device_put(x, place), w)
    tree_close(jax.device_get(got), jax.jit(f)(x, w), rtol=1e-4)


@pytest.mark.parametrize("name", ["dense", "stride"])
def test_gradients_are_right_where_no_argument_names_the_mesh(name, monkeypatch):
    f, x, w = _layer(name)
    split = lambda x, w: f(jax.lax.with_sharding_constraint(x, P(None, "a")), w)  # noqa: E731
    want = jax.jit(f)(x, w)
    monkeypatch.setattr(xla_tuned, "rule", lambda problem: "native")
    with jax.set_mesh(jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)):
        got = jax.jit(split)(x, w)
    tree_close(jax.device_get(got), want, rtol=1e-4)


def test_gradients_are_right_where_the_output_is_split_in_time_too():
    """By an automatic axis beside an explicit one, which ends the process where it is left so."""
    _, x, w = _layer("stride")
    free = P.UNCONSTRAINED

    def step(x, w, split=lambda a: a):
        loss = lambda x, w: jnp.sum(jnp.sin(split(conv1d(split(x), w, strides=2))))  # noqa: E731
        return jax.value_and_grad(loss, (0, 1))(x, w)

    def placed(x, w):
        return step(x, w, lambda a: jax.lax.with_sharding_constraint(a, P(free, "a", free)))

    kinds = (AxisType.Explicit, AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((2, 2, 2), ("e", "a", "b"), axis_types=kinds)
    with jax.set_mesh(mesh):
        operands = [jax.device_put(a, NamedSharding(mesh, p)) for a, p in ((x, P("e")), (w, P()))]
        got = jax.jit(placed)(*operands)
    tree_close(jax.device_get(got), jax.jit(step)(x, w), rtol=1e-4)


@pytest.mark.parametrize(
    "name, place",
    [("dense", "time"), ("grouped", "batch"), ("depthwise", "batch"), ("depthwise", "time")],
)
def test_kernel_gradients_of_stock_are_multiplied(name, place):
    """As the README says: where this falls, a sentence there does too, and a rule of ours."""
    f, x, w = _layer(name, "xla_native")
    value, (dx, dw) = jax.jit(f)(x, w)
    got = jax.jit(lambda *a: f(*a))(*_placed(x, w, place))
    tree_close(jax.device_get(got), (value, (dx, 4 * dw)), rtol=1e-4)


@pytest.mark.parametrize(
    "name, place, times", [("dense", "time_and_outputs", 4), ("dense_many_taps", "taps", 4)]
)
def test_what_stock_computes_is_multiplied(name, place, times):
    _, x, w = _layer(name)
    f = functools.partial(conv1d, implementation="xla_native")
    got = jax.jit(lambda *a: f(*a))(*_placed(x, w, place))
    tree_close(jax.device_get(got), times * jax.jit(f)(x, w), rtol=1e-4)
