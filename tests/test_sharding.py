"""Eight CPU devices: what is computed where, read from the compiled HLO."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from conv_pallas import conv1d
from conv_pallas.nn import TCN, Conv
from conv_pallas.spec import OPERATIONS, lhs_rhs_out
from tests.cases import Case
from tests.streams import functions, model_of, numbers, stream
from tests.support import bind, collectives, compiled_quickly, gathered_sizes, sent, tree_close

pytestmark = pytest.mark.usefixtures("hardly_optimized")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shapes, and how x and the kernel lie on a mesh of 4 by 2 devices.

    Attributes:
      geometry: further arguments of `conv1d`.
      forward: the collectives of the forward pass.
    """

    x: tuple[int, ...]
    w: tuple[int, ...]
    x_spec: P
    w_spec: P
    G: int = 1
    geometry: tuple[tuple[str, Any], ...] = ()
    forward: tuple[tuple[str, int], ...] = ()

    @property
    def time(self):
        """The mesh axes that split time, None where there are none."""
        entries = (*self.x_spec, None, None)
        return entries[len(self.x) - 2]

    def halo(self, mesh) -> int:
        """The most elements of x or g that one device may need of others."""
        if not self.time:
            return 0
        *batch, _, channels = (*self.x_spec, *[None] * (len(self.x) - len(self.x_spec)))
        split = lambda entry: 1 if entry is None else mesh.shape[entry]  # noqa: E731
        rows = math.prod(n // split(e) for n, e in zip(self.x, batch, strict=False))
        names = self.time if isinstance(self.time, tuple) else (self.time,)
        part = self.x[-2] // math.prod(split(name) for name in names)
        # No tap sees more steps than a device has.
        reach = (self.w[0] - 1) * min(part, dict(self.geometry).get("kernel_dilation", 2))
        return rows * reach * max(self.x[-1] // split(channels), self.w[-1])

    @property
    def moves(self) -> set[str]:
        """The collectives that are needed where nothing is gathered."""
        return {"all-reduce", *(["collective-permute"] if self.time else [])}

    def arrays(self, seed=0):
        rng = np.random.default_rng(seed)
        return [rng.standard_normal(s).astype(np.float32) for s in (self.x, self.w)]

    def place(self, mesh):
        specs = (self.x_spec, self.w_spec)
        return [
            jax.device_put(a, NamedSharding(mesh, s))
            for a, s in zip(self.arrays(), specs, strict=True)
        ]


X, W = (16, 17, 8), (3, 8, 6)
SHORT, LONG = (4, 24, 8), (4, 160, 8)
ONE_SUM, HALO = (("all-reduce", 1),), (("collective-permute", 1),)
TWO_HALOS = (("collective-permute", 2),)

# What needs no gathering: no device ever sees more of x, y or g than its share.
LAYOUTS = {
    "batch": Layout(X, W, P("a"), P()),
    "batch_over_both": Layout(X, W, P(("a", "b")), P()),
    "two_batch_axes": Layout((4, 8, 17, 8), W, P("b", "a"), P()),
    "channels_out": Layout(X, W, P(), P(None, None, "b")),
    "batch_and_channels_out": Layout(X, W, P("a"), P(None, None, "b")),
    "channels_in": Layout(X, W, P(None, None, "b"), P(None, "b"), forward=ONE_SUM),
    "batch_and_channels_in": Layout(X, W, P("a", None, "b"), P(None, "b"), forward=ONE_SUM),
    "groups": Layout(X, (3, 2, 12), P("a", None, "b"), P(None, None, "b"), G=4),
    "depthwise": Layout(X, (3, 1, 8), P("a", None, "b"), P(None, None, "b"), G=8),
    "depthwise_over_both": Layout(
        X, (3, 1, 8), P(None, None, ("a", "b")), P(None, None, ("a", "b")), G=8
    ),
    "multiplier": Layout(X, (3, 1, 16), P("a", None, "b"), P(None, None, "b"), G=8),
    "time": Layout(LONG, W, P(None, "a"), P(), forward=HALO),
    "batch_and_time": Layout(LONG, W, P("b", "a"), P(), forward=HALO),
    "time_over_both": Layout(SHORT, W, P(None, ("a", "b")), P(), forward=TWO_HALOS),
    "time_over_both_the_other_way": Layout(
        SHORT, W, P(None, ("b", "a")), P(), forward=TWO_HALOS
    ),
    "time_and_channels_in": Layout(
        LONG, W, P(None, "a", "b"), P(None, "b"), forward=ONE_SUM + HALO
    ),
    "time_depthwise": Layout(
        LONG, (3, 1, 8), P(None, "a", "b"), P(None, None, "b"), G=8, forward=HALO
    ),
    "time_same": Layout(
        LONG, W, P(None, "a"), P(), geometry=(("padding", "SAME"),),
        forward=TWO_HALOS,
    ),
    "time_shorter_than_halo": Layout(
        SHORT, W, P(None, "a"), P(), geometry=(("kernel_dilation", 7),),
        forward=(("collective-permute", 4),),
    ),
    "time_far": Layout(
        SHORT, W, P(None, ("a", "b")), P(), geometry=(("kernel_dilation", 7),),
        forward=(("collective-permute", 4),),
    ),
    "time_far_same": Layout(
        SHORT, W, P("b", "a"), P(), geometry=(("kernel_dilation", 6), ("padding", "SAME")),
        forward=TWO_HALOS,
    ),
    "time_beyond": Layout(
        SHORT, W, P(None, "a"), P(), geometry=(("kernel_dilation", 20),), forward=HALO

    ),
    "time_stride": Layout(
        SHORT, W, P(None, "a"), P(), geometry=(("strides", 3),), forward=HALO
    ),
    "time_input_dilation": Layout(
        SHORT, W, P(None, "b"), P(), geometry=(("input_dilation", 3), ("padding", [(4, 2)])),
        forward=HALO,
    ),
    "short_time_same": Layout(
        SHORT, (3, 1, 8), P("b", "a"), P(), G=8, geometry=(("padding", "SAME"),),
        forward=TWO_HALOS,
    ),
    "time_pointwise": Layout(LONG, (1, 8, 6), P(None, "a"), P()),
}  # fmt: skip

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_mesh = pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=str)


def _mesh(axis_type):
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)


def _function(layout: Layout, implementation=None):
    geometry = dict(kernel_dilation=2) | dict(layout.geometry)
    return functools.partial(
        conv1d, feature_group_count=layout.G, implementation=implementation, **geometry
    )


def _value(f):
    return f


def _gradient(f):
    return jax.grad(lambda x, w: jnp.sum(jnp.sin(f(x, w))), (0, 1))


def _hvp(f):
    return lambda x, w: jax.jvp(_gradient(f), (x, w), (x, w))[1]


ORDERS = (_value, _gradient, _hvp)


@functools.cache
def _expected(name: str):
    """What each of `ORDERS` gives by stock's convolution on one device, in one program."""
    layout = LAYOUTS[name]
    stock = _function(layout, "xla_native")
    return jax.jit(lambda *a: [transform(stock)(*a) for transform in ORDERS])(*layout.arrays())


@pytest.mark.sampled
@each_mesh
@each_layout  # the outer one: both kinds of mesh have what is expected in common
def test_nothing_is_gathered_and_all_is_right(layout, axis_type):
    """The second derivative, which takes the longest to compile, on either kind by turns."""
    turn = (list(LAYOUTS).index(layout) % 2 == 0) == (axis_type == AxisType.Explicit)
    expected = _expected(layout)
    layout, mesh = LAYOUTS[layout], _mesh(axis_type)
    operands = layout.place(mesh)
    f = _function(layout)
    for transform, want in list(zip(ORDERS, expected, strict=True))[: 3 if turn else 2]:
        compiled, out = compiled_quickly(transform(f), mesh, *operands)
        found = collectives(compiled)
        assert set(found) <= layout.moves
        if transform is _value:
            assert found == dict(layout.forward)
        if transform in (_value, _gradient):
            # A halo of x forward; another and one of g for the gradients.
            halos = 1 if transform is _value else 3
            assert sent(compiled) <= halos * layout.halo(mesh)
            assert (sent(compiled) > 0) == ("collective-permute" in found)
            if axis_type == AxisType.Explicit:
                _check_split(layout, compiled.output_shardings, operands)
        tree_close(out, want, rtol=1e-4)


def _check_split(layout, found, operands) -> None:
    """On explicit axes the result, or the gradients, are split as the operands are."""
    if isinstance(found, NamedSharding):
        batch = tuple(layout.x_spec)[: len(layout.x) - 2]
        channels = layout.w_spec[2] if len(layout.w_spec) == 3 else None
        batch = (*batch, *[None] * (len(layout.x) - 2 - len(batch)))
        assert found.spec == P(*batch, layout.time, channels)
        return
    for sharding, operand in zip(found, operands, strict=True):
        assert sharding.is_equivalent_to(operand.sharding, operand.ndim)


@pytest.mark.parametrize("x_spec", [P(None, "a"), P("b", "a")], ids=str)
@each_mesh
def test_time_is_gathered_where_y_has_another_number_of_steps(x_spec, axis_type):
    """Right, if slow; and the proof that the check above sees an all-gather where one is."""
    layout = Layout((16, 24, 8), W, x_spec, P(), geometry=(("padding", "VALID"),))
    mesh = _mesh(axis_type)
    for transform in (_value, _gradient):
        compiled, out = compiled_quickly(transform(_function(layout)), mesh, *layout.place(mesh))
        assert collectives(compiled).get("all-gather", 0) >= 1
        want = jax.jit(transform(_function(layout, "xla_native")))(*layout.arrays())
        tree_close(out, want, rtol=1e-4)


@pytest.mark.sampled
@each_mesh
def test_a_training_step_of_a_network_on_split_time(axis_type):
    mesh = _mesh(axis_type)
    model = model_of(norm="weight", dilations=(1, 16))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    x, mask = numbers(4, 64, 3), np.arange(64) < np.array([[64], [50], [9], [0]])

    def loss(params, x, mask):
        y = nnx.merge(graph, params, rest)(x, mask=mask)
        return jnp.mean(jnp.sin(y))

    place = NamedSharding(mesh, P("b", "a"))
    operands = params, jax.device_put(x, place), jax.device_put(mask, place)
    compiled, out = compiled_quickly(jax.value_and_grad(loss), mesh, *operands)
    assert set(collectives(compiled)) == {"collective-permute", "all-reduce"}
    tree_close(out, jax.jit(jax.value_and_grad(loss))(params, x, mask), rtol=1e-4)


@pytest.mark.sampled
@pytest.mark.parametrize(
    "layout",
    [
        Layout((4, 12, 8), W, P(None, "a"), P(), geometry=(("padding", "SAME"), ("strides", 2))),
        Layout((4, 24, 8), (3, 4, 8), P(None, None, "a"), P(), G=2),
        Layout((4, 0, 8), W, P(None, "a"), P()),
    ],
    ids=["six_parts_of_time", "two_groups", "no_steps"],
)
@pytest.mark.parametrize("activation", [None, "silu"])
@each_mesh
def test_what_four_devices_can_not_share(layout, activation, axis_type):
    f = functools.partial(_function(layout), activation=activation)
    _, out = compiled_quickly(_gradient(f), _mesh(axis_type), *layout.place(_mesh(axis_type)))
    tree_close(out, jax.jit(_gradient(f))(*layout.arrays()), rtol=1e-4)


@each_mesh
def test_fully_sharded_kernel(axis_type):
    """The kernel, split over the batch's devices, is gathered; x, y and g are not."""
    layout = Layout(X, (3, 8, 8), P("a"), P(None, None, "a"))
    mesh = _mesh(axis_type)
    operands = layout.place(mesh)
    gathers = [1, 2, 8]
    for transform, at_most in zip((_value, _gradient, _hvp), gathers, strict=True):
        compiled, out = compiled_quickly(transform(_function(layout)), mesh, *operands)
        assert set(collectives(compiled)) <= {
            "all-gather", "all-reduce", "reduce-scatter", "all-to-all"
        }  # fmt: skip
        gathered = gathered_sizes(compiled)
        assert 1 <= len(gathered) <= at_most
        assert set(gathered) == {3 * 8 * 8}  # the kernel, or its tangent or gradient
        want = jax.jit(transform(_function(layout, "xla_native")))(*layout.arrays())
        tree_close(out, want, rtol=1e-4)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["batch", "batch_and_channels_out", "depthwise", "channels_in"])
def test_inside_shard_map(name, check_vma):
    layout, mesh = LAYOUTS[name], _mesh(AxisType.Auto)
    summed = name == "channels_in"

    def local(x, w):
        groups = layout.G // (1 if layout.G == 1 else 2)
        y = conv1d(x, w, kernel_dilation=2, feature_group_count=groups)
        return lax.psum(y, "b") if summed else y

    batch = layout.x_spec[0] if len(layout.x_spec) else None
    channels = layout.w_spec[2] if len(layout.w_spec) == 3 else None
    f = jax.shard_map(
        local, mesh=mesh, in_specs=(layout.x_spec, layout.w_spec),
        out_specs=P(batch, None, channels), check_vma=check_vma,
    )  # fmt: skip
    out = jax.jit(lambda *a: [transform(f)(*a) for transform in ORDERS])(*layout.arrays())
    tree_close(out, _expected(name), rtol=1e-4)


@pytest.mark.parametrize("epilogue", [False, True])
def test_gradient_inside_shard_map(epilogue):
    """The gradient to a kernel that all have must be summed over those that have the batch."""
    layout, mesh = LAYOUTS["batch"], _mesh(AxisType.Auto)
    f, bias = _function(layout), np.linspace(-1, 1, W[-1], dtype=np.float32)
    f = functools.partial(f, bias=bias, activation="silu") if epilogue else f
    grad = _gradient(f)
    f = jax.shard_map(grad, mesh=mesh, in_specs=(P("a"), P()), out_specs=(P("a"), P()))
    tree_close(jax.jit(f)(*layout.arrays()), jax.jit(grad)(*layout.arrays()), rtol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_vmap_of_a_shard_map_over_the_mesh(bias):
    """The batch comes to vary along the mesh within the rule that batches, the kernel does not."""
    layout, mesh = LAYOUTS["batch"], _mesh(AxisType.Auto)
    x, w = layout.arrays()
    b = np.linspace(-1, 1, W[-1], dtype=np.float32) if bias else None

    def loss(x, w):
        y = conv1d(x, w, b, kernel_dilation=2)
        return jnp.sum(jnp.sin(y), (-2, -1))

    each = jax.grad(lambda x, w: jnp.sum(loss(x, w)), argnums=(0, 1))
    for f, out_specs in ((loss, P()), (each, (P(), P()))):
        mapped = jax.shard_map(f, mesh=mesh, in_specs=(P(), P()), out_specs=out_specs)
        run = jax.jit(jax.vmap(mapped, in_axes=(0, None), spmd_axis_name="a"))
        tree_close(run(x, w), jax.vmap(f, in_axes=(0, None))(x, w), rtol=1e-4)


@pytest.mark.parametrize("G", [1, 2])
def test_vmap_over_sharded_kernels(G):
    """Told which axis of the mesh splits them, nothing is gathered, nor its gradient."""
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
    x, w = jnp.ones((2, 12, 4)), jnp.ones((4, 3, 4 // G, 8))
    w = jax.device_put(w, NamedSharding(mesh, P("a")))
    f = functools.partial(conv1d, feature_group_count=G)
    each = lambda x, w: jnp.sum(jnp.sin(f(x, w)))  # noqa: E731
    for g in (f, jax.grad(each, 1)):
        run = jax.jit(jax.vmap(g, (None, 0), spmd_axis_name="a"), out_shardings=w.sharding)
        assert not collectives(run.lower(x, w).compile())


def test_transpose_inside_shard_map():
    """Of an affine layer by itself, as solvers of linear systems ask for it."""
    layout, mesh = LAYOUTS["batch"], _mesh(AxisType.Auto)
    x, w = layout.arrays()
    b = np.linspace(-1, 1, W[-1], dtype=np.float32)

    def transposed(x, w, b):
        w, b = (lax.pcast(a, "a", to="varying") for a in (w, b))
        f = lambda x: conv1d(x, w, b, kernel_dilation=2)  # noqa: E731
        return jax.linear_transpose(f, x)(f(x))[0]

    mapped = jax.shard_map(transposed, mesh=mesh, in_specs=(P("a"), P(), P()), out_specs=P("a"))
    f = lambda x: conv1d(x, w, b, kernel_dilation=2)  # noqa: E731
    tree_close(jax.jit(mapped)(x, w, b), jax.linear_transpose(f, x)(f(x))[0], rtol=1e-4)


def test_manual_over_one_axis():
    """Manual over the batch, automatic over the channels."""
    layout, mesh = LAYOUTS["batch_and_channels_out"], _mesh(AxisType.Auto)
    f = jax.shard_map(
        _function(layout), mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"), axis_names={"a"}
    )
    for transform in (_value, _gradient):
        _, out = compiled_quickly(transform(f), mesh, *layout.place(mesh))
        want = jax.jit(transform(_function(layout, "xla_native")))(*layout.arrays())
        tree_close(out, want, rtol=1e-4)


@pytest.mark.sampled
@pytest.mark.parametrize("spec", [P("a"), P(), P("b", None, "a"), P(None, "a"), P(("a", "b"))])
@pytest.mark.parametrize("name", ["batch", "depthwise"])
def test_out_sharding(name, spec):
    layout, mesh = LAYOUTS[name], _mesh(AxisType.Explicit)
    layout = dataclasses.replace(layout, x=(16, 20, 8), w=(*layout.w[:2], 8))
    x, w = layout.place(mesh)
    f = lambda x, w: _function(layout)(x, w, out_sharding=spec)  # noqa: E731
    with jax.set_mesh(mesh):
        y = jax.jit(f)(x, w)
        grads = jax.jit(_gradient(f))(x, w)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, spec), y.ndim)
    stock = _function(layout, "xla_native")
    tree_close(np.asarray(y), np.asarray(stock(*layout.arrays())), rtol=1e-4)
    want = _gradient(stock)(*layout.arrays())
    tree_close(jax.tree.map(np.asarray, grads), jax.tree.map(np.asarray, want), rtol=1e-4)


@pytest.mark.sampled
@each_mesh
@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0)], ids=str)
def test_vmap_over_a_sharded_axis(in_axes, axis_type):
    mesh = _mesh(axis_type)
    layout = LAYOUTS["batch"]
    x, w = layout.arrays()
    rng = np.random.default_rng(1)
    arrays, placed = [], []
    for array, axis in zip((x, w), in_axes, strict=True):
        array = array if axis is None else rng.standard_normal((8, *array.shape)).astype("f4")
        arrays.append(array)
        spec = P() if axis is None else P("a")
        placed.append(jax.device_put(array, NamedSharding(mesh, spec)))
    for transform in (_value, _gradient):
        f = jax.vmap(transform(_function(layout)), in_axes)
        compiled, out = compiled_quickly(f, mesh, *placed)
        assert "all-gather" not in collectives(compiled)
        want = jax.jit(jax.vmap(transform(_function(layout, "xla_native")), in_axes))(*arrays)
        tree_close(out, want, rtol=1e-4)


@pytest.mark.sampled
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "sharded", [(P(None, None, "a"), P()), (P(), P(None, None, "a")), (P(), P(None, "a"))]
)
@pytest.mark.parametrize("in_axes", [(None, 0), (0, None), (None, 3), (2, None)])
def test_vmap_over_one_operand_beside_explicit_channels(in_axes, sharded, operation):
    """What `vmap` would fold into channels stays an axis where those are split."""
    mesh, case = _mesh(AxisType.Explicit), Case("", batch=(2,), T=12, C=8, O=8)
    lhs, rhs, _ = lhs_rhs_out(operation, *case.arrays())
    arrays, placed = [], []
    for array, axis, spec in zip((lhs, rhs), in_axes, sharded, strict=True):
        entries = [*spec, *[None] * (3 - len(spec))]
        if axis is not None:
            array = np.stack([array, 2 * array, 3 * array], axis)
            entries.insert(axis, None)
        arrays.append(array)
        placed.append(jax.device_put(array, NamedSharding(mesh, P(*entries))))
    f = jax.vmap(lambda a, b: bind(case.problem(operation), a, b, "xla"), in_axes)
    with jax.set_mesh(mesh):
        out = jax.jit(f)(*placed)
    tree_close(np.asarray(out), np.asarray(jax.jit(f)(*arrays)), rtol=1e-4)


@pytest.mark.parametrize("name", ["batch", "batch_and_channels_out", "channels_in", "depthwise"])
def test_export_of_a_sharded_function(name):
    layout, mesh = LAYOUTS[name], _mesh(AxisType.Auto)
    f = _gradient(_function(layout))
    shardings = tuple(NamedSharding(mesh, s) for s in (layout.x_spec, layout.w_spec))
    with jax.set_mesh(mesh):
        exported = jax.export.export(jax.jit(f, in_shardings=shardings))(*layout.arrays())
        loaded = jax.export.deserialize(exported.serialize())
        assert loaded.nr_devices == 8
        out = jax.jit(loaded.call, in_shardings=shardings)(*layout.place(mesh))
    tree_close(
        jax.tree.map(np.asarray, out),
        jax.tree.map(np.asarray, jax.jit(f)(*layout.arrays())),
        rtol=1e-4,
    )


def _layer(layout, implementation=None):
    """With bias and activation: the result, and the gradients along it."""
    f = functools.partial(_function(layout, implementation), activation="silu")

    def run(x, w, b):
        y, vjp = jax.vjp(f, x, w, b)
        return y, vjp(y)

    return run, np.linspace(-1, 1, layout.w[-1], dtype=np.float32)


@functools.cache
def _expected_of_a_layer(name: str):
    run, b = _layer(LAYOUTS[name], "xla_native")
    return jax.jit(run)(*LAYOUTS[name].arrays(), b)


@pytest.mark.sampled
@each_mesh
@each_layout
def test_a_layer_with_bias_and_activation_on_a_mesh(layout, axis_type):
    """The bias lies as y's channels do; gradients are summed over what split the batch."""
    expected, layout = _expected_of_a_layer(layout), LAYOUTS[layout]
    run, b = _layer(layout)
    mesh = _mesh(axis_type)
    x, w = layout.place(mesh)
    bias = jax.device_put(b, NamedSharding(mesh, P(*layout.w_spec[2:])))
    compiled, out = compiled_quickly(run, mesh, x, w, bias)
    assert set(collectives(compiled)) <= layout.moves
    tree_close(out, expected, rtol=1e-4)


@pytest.mark.sampled
@each_mesh
@pytest.mark.parametrize(
    "layout, bias_spec", [("batch", P()), ("batch", P("b")), ("batch", P("a")), ("time", P("a"))]
)
def test_second_order_of_a_layer_whose_bias_lies_elsewhere(layout, bias_spec, axis_type):
    """Types agree at every order, also where the bias alone is split, or as y's time is."""
    layout, mesh = LAYOUTS[layout], _mesh(axis_type)
    layout = dataclasses.replace(layout, w=(3, 8, 8))
    b = np.linspace(-1, 1, layout.w[-1], dtype=np.float32)
    bias = jax.device_put(b, NamedSharding(mesh, bias_spec))

    def hvp(x, w, b):
        loss = lambda *a: jnp.sum(jnp.sin(_function(layout)(*a, activation="relu")))  # noqa: E731
        grads = lambda *a: jax.grad(loss, (0, 1, 2))(*a)  # noqa: E731
        return jax.jvp(grads, (x, w, b), (x, w, b))[1]

    _, out = compiled_quickly(hvp, mesh, *layout.place(mesh), bias)
    tree_close(out, jax.jit(hvp)(*layout.arrays(), b), rtol=1e-4)


@pytest.mark.parametrize("spec", [P("data"), P(None, None, "data")], ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_sum_of_bfloat16_beside_an_automatic_axis(activation, spec):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Auto))
    x, kernel = (numbers(*shape).astype(jnp.bfloat16) for shape in ((2, 5, 4), (3, 4, 2)))

    def value_and_grads(x, kernel):
        loss = lambda x, w: jnp.sum(conv1d(x, w, activation=activation).astype(jnp.float32))  # noqa: E731
        return jax.value_and_grad(loss, (0, 1))(x, kernel)

    want = value_and_grads(x, kernel)
    x, kernel = (jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((x, spec), (kernel, P())))
    with jax.set_mesh(mesh):
        got = jax.jit(value_and_grads)(x, kernel)
    as_float = functools.partial(jax.tree.map, lambda a: np.asarray(a, np.float32))
    tree_close(as_float(got), as_float(want), rtol=2**-6)


def test_gradients_are_split_as_y_is():
    """As the bias alone may have it: of y none is gathered, and of the kernel its gradient."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Explicit,))
    x, w, b = numbers(2, 64, 4), numbers(3, 4, 8, seed=1), numbers(8, seed=2)
    placed = [
        jax.device_put(a, NamedSharding(mesh, s))
        for a, s in zip((x, w, b), (P(), P(), P("model")), strict=True)
    ]

    def loss(x, w, b):
        return jnp.sum(jnp.sin(conv1d(x, w, b, activation="tanh")))

    compiled, grads = compiled_quickly(jax.grad(loss, (0, 1, 2)), mesh, *placed)
    assert gathered_sizes(compiled) == [w.size]
    tree_close(grads, jax.jit(jax.grad(loss, (0, 1, 2)))(x, w, b))


def test_explicit_axes_outside_a_context_of_their_mesh():
    """An array's type has its mesh: lax's convolution asks for no context either."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    x, w, b = numbers(4, 12, 6), numbers(3, 6, 8, seed=1), numbers(8, seed=2)
    arrays = [
        jax.device_put(a, NamedSharding(mesh, s))
        for a, s in zip((x, w, b), (P("data"), P(None, None, "model"), P("model")), strict=True)
    ]

    def loss(x, w, b):
        return jnp.sum(jnp.sin(conv1d(x, w, b, kernel_dilation=2, activation="silu")))

    def everything(x, w, b):
        many = jax.vmap(lambda x: conv1d(x, w, kernel_dilation=2))(x)
        return jax.value_and_grad(loss, (0, 1, 2))(x, w, b), many

    compiled = jax.jit(everything).lower(*arrays).compile()
    (_, (dx, dw, db)), many = compiled(*arrays)
    assert dx.sharding.spec[0] == many.sharding.spec[0] == "data"
    assert dw.sharding.spec[2] == db.sharding.spec[0] == many.sharding.spec[2] == "model"
    assert "all-gather" not in collectives(compiled)
    tree_close(compiled(*arrays), jax.jit(everything)(x, w, b))


@pytest.mark.sampled
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_stream_stays_on_the_devices_of_its_batch(kind):
    model = model_of(norm="weight", dilations=(3, 1))
    x = numbers(4, 9, 3)
    whole, _ = functions(model)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    by_batch, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    where = jax.tree.map(lambda a: by_batch if a.ndim else everywhere, model.init_state(4))
    state = jax.device_put(model.init_state(4), where)
    step = jax.jit(lambda x, state: model.step(x, state))
    placed = jax.device_put(x, by_batch)
    assert not collectives(step.lower(placed[:, :3], state).compile())
    y, after = stream(step, state, placed, (3, 3, 3))
    for leaf, want in zip(jax.tree.leaves(after), jax.tree.leaves(where), strict=True):
        assert leaf.sharding.is_equivalent_to(want, leaf.ndim)
    np.testing.assert_allclose(y, whole(x), rtol=1e-5, atol=1e-5)


@pytest.mark.sampled
@pytest.mark.parametrize("split", ["x", "state"])
@pytest.mark.parametrize("length", [1, 5])
def test_what_a_step_is_given_may_lie_elsewhere(length, split):
    """A state that nobody has placed too: it goes where the batch is split, and stays there."""
    model = model_of(widths=(4,), lookahead=2, conditioning=2)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    by_batch, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    x, state = numbers(4, length, 3), model.init_state(4)
    more = dict(
        mask=jnp.ones((4, length), bool),
        segment_ids=jnp.ones((4, length), jnp.int32),
        condition=numbers(4, length, 2, seed=1),
    )
    _, step = functions(model)
    want, after = step(x, state, **more)
    want, _ = step(x, after, **more)
    if split == "state":
        state = jax.tree.map(lambda a: jax.device_put(a, by_batch if a.ndim else everywhere), state)
    x = jax.device_put(x, by_batch if split == "x" else everywhere)
    more = jax.device_put(more, everywhere)
    _, after = step(x, state, **more)
    y, after = step(x, after, **more)
    for leaf in (y, *jax.tree.leaves(after)):
        assert leaf.sharding.is_equivalent_to(by_batch if leaf.ndim else everywhere, leaf.ndim)
    tree_close(np.asarray(y), np.asarray(want))


def test_a_layer_s_state_goes_where_the_batch_is_split():
    layer = Conv(3, 4, 3, padding="CAUSAL", rngs=nnx.Rngs(0))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    x, by_batch = numbers(4, 1, 3), NamedSharding(mesh, P("data"))
    step = jax.jit(lambda x, state: layer.step(x, state))
    want, _ = step(x, layer.init_state(4))
    y, after = step(jax.device_put(x, by_batch), layer.init_state(4))
    assert all(a.sharding.is_equivalent_to(by_batch, a.ndim) for a in (y, after["age"]))
    tree_close(np.asarray(y), np.asarray(want))


@pytest.mark.parametrize("activation", ["relu", "silu", None])
def test_gradients_of_no_output_are_zeros_on_explicit_axes(activation):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(numbers(4, 4, 8), NamedSharding(mesh, P("data")))

    def loss(x, w, b):
        y = conv1d(x, w, b, kernel_dilation=8, padding="VALID", activation=activation)
        assert y.shape == (4, 0, 8)
        return jnp.sum(y)

    with jax.set_mesh(mesh):
        grads = jax.jit(jax.grad(loss, (0, 1, 2)))(x, numbers(3, 8, 8), numbers(8))
    assert grads[0].sharding.spec[0] == "data"
    assert [g.shape for g in grads] == [(4, 4, 8), (3, 8, 8), (8,)]
    assert not any(np.asarray(g).any() for g in grads)


@pytest.mark.sampled
@pytest.mark.parametrize("spec", [P("data", "model"), P("data", None, "model"), P(None, "model")])
def test_what_stands_beside_x_may_lie_elsewhere(spec):
    """A condition has no time, and a mask no channels."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    model = TCN(
        8, [8], 4, 3, 0.0, rngs=nnx.Rngs(0), conditioning=3, conditioning_mode="concat",
    )  # fmt: skip
    x, condition = numbers(4, 8, 8), numbers(4, 3, seed=1)  # 3 can't be split as 8 are
    mask = np.arange(8) < np.array([8, 3, 5, 1])[:, None]
    run = jax.jit(lambda x, c, mask: model(x, condition=c, mask=mask))
    want = run(x, condition, mask)
    for specs in ((P("data"), P("data", "model")), (P(), P(None, "model"))):
        places = [NamedSharding(mesh, s) for s in (spec, *specs)]
        y = run(*map(jax.device_put, (x, condition, mask), places))
        assert y.sharding.spec[0] == spec[0]
        tree_close(np.asarray(y), np.asarray(want))


@pytest.mark.parametrize("spec", [P(reduced={"data"}), P(unreduced={"data"})], ids=str)
def test_a_part_of_a_sum_is_refused(spec):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    for bias in (None, jnp.ones(8)):
        with jax.set_mesh(mesh), pytest.raises(NotImplementedError, match="reshard them before"):
            jax.jit(lambda x, w, b: conv1d(x, jax.sharding.reshard(w, spec), b))(
                numbers(4, 8, 8), numbers(3, 8, 8), bias
            )
