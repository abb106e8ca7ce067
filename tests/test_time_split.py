"""Time split over devices: packed sequences, and padding that is not zeros."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from conv_pallas import conv1d
from tests.streams import model_of, numbers
from tests.support import collectives, compiled_quickly, gathered_sizes, tree_close

pytestmark = pytest.mark.usefixtures("hardly_optimized")

X, W, BIAS = numbers(4, 48, 8), numbers(3, 8, 6, seed=1), numbers(6, seed=2)
DEPTHWISE = numbers(3, 1, 8, seed=1)
# Three sequences to a row, which begin in the midst of a device's part and at its edge.
IDS = np.stack([np.searchsorted((5 + i, 24, 30 + i), np.arange(48), "right") for i in range(4)])
MASK = np.arange(48) < np.array([[48], [40], [9], [0]])

each_mesh = pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)


def _mesh(kind):
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)


def _put(mesh, array, *spec):
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def _everything(f):
    """The value, the gradients, and the second derivative along the operands."""

    def loss(*operands):
        return jnp.sum(jnp.sin(f(*operands)))

    def run(*operands):
        grads = jax.grad(loss, (0, 1))
        second = jax.jvp(grads, operands, operands)[1]
        return f(*operands), grads(*operands), second

    return run


@pytest.mark.sampled
@each_mesh
@pytest.mark.parametrize(
    ("w", "x_spec", "w_spec", "options"),
    [
        (W, P("b", "a"), P(), dict(kernel_dilation=2)),
        (W, P("b", "a"), P(), dict(kernel_dilation=2, mask=MASK)),
        (W, P("b", "a"), P(), dict(kernel_dilation=20)),
        (W, P("b", "a"), P(None, "a"), dict(kernel_dilation=2)),
        (W, P(None, ("a", "b")), P(), dict(padding="SAME", kernel_dilation=5)),
        (W, P(None, "a", "b"), P(None, "b"), dict(kernel_dilation=2)),
        (DEPTHWISE, P(None, "a", "b"), P(None, None, "b"), dict(kernel_dilation=2)),
    ],
    ids=["batch", "mask", "far", "kernel_elsewhere", "over_both", "channels_in", "depthwise"],
)
def test_packed_sequences_on_split_time(w, x_spec, w_spec, options, kind):
    """The ids are gathered, one number for each step; x, y and g are not."""
    mesh, options = _mesh(kind), dict(options)
    mask = options.pop("mask", None)
    placed = lambda a: None if a is None else _put(mesh, a, *x_spec[:2])  # noqa: E731
    ids, mask_there = placed(IDS), placed(mask)

    def f(x, w, ids, mask):
        groups = x.shape[-1] // w.shape[1]
        options_here = options | dict(feature_group_count=groups, segment_ids=ids, mask=mask)
        return conv1d(x, w, activation="silu", **options_here)

    def run(x, w, ids, mask):
        return _everything(lambda x, w: f(x, w, ids, mask))(x, w)

    operands = _put(mesh, X, *x_spec), _put(mesh, w, *w_spec)
    compiled, out = compiled_quickly(run, mesh, *operands, ids, mask_there)
    tree_close(out, jax.jit(run)(X, w, IDS, mask), rtol=1e-4)
    rows = 4 // math.prod(mesh.shape[n] for n in x_spec[:1] if n)
    assert set(gathered_sizes(compiled)) <= {rows * 48, w.size}
    if kind == AxisType.Explicit:
        assert compiled.output_shardings[0].spec[:2] == x_spec[:2]


@pytest.mark.sampled
@pytest.mark.parametrize("where", ["ids", "x"])
def test_packed_sequences_of_which_only_one_array_is_split(where):
    mesh = _mesh(AxisType.Explicit)
    x, ids = ((), ("b", "a")) if where == "ids" else (("b", "a"), ())
    f = lambda x, w, ids: conv1d(x, w, segment_ids=ids, kernel_dilation=2)  # noqa: E731
    operands = _put(mesh, X, *x), _put(mesh, W), _put(mesh, IDS, *ids)
    want = f(X, W, IDS)
    tree_close(compiled_quickly(f, mesh, *operands)[1], want, rtol=1e-4)
    np.testing.assert_allclose(f(*operands), want, rtol=1e-4, atol=1e-4)  # not compiled as one


def _around(padding, strides):
    return functools.partial(
        conv1d, kernel_dilation=4, activation="relu", padding=padding, strides=strides
    )


@functools.cache
def _expected_around(*options):
    return jax.jit(_everything(_around(*options)))(X, W)


# Every two of padding and stride, of what splits x, and of the kind of axes meet.
AROUND = [
    (options, x_spec, (AxisType.Auto, AxisType.Explicit)[(i + j) % 2])
    for i, options in enumerate((("CIRCULAR", 1), ("REFLECT", 1), ("CIRCULAR", 2), ("CIRCULAR", 5)))
    for j, x_spec in enumerate((P("b", "a"), P(None, ("a", "b")), P(None, "a", "b")))
]


@pytest.mark.sampled
@pytest.mark.parametrize("options, x_spec, kind", AROUND, ids=str)
def test_a_sequence_that_goes_on_at_its_ends(options, x_spec, kind):
    """Time is gathered; the result is split again, for the layers that follow."""
    mesh, want = _mesh(kind), _expected_around(*options)
    operands = _put(mesh, X, *x_spec), _put(mesh, W)
    compiled, out = compiled_quickly(_everything(_around(*options)), mesh, *operands)
    assert "all-gather" in collectives(compiled)
    tree_close(out, want, rtol=1e-4)
    if kind == AxisType.Explicit:
        divides = want[0].shape[1] % (8 if x_spec[1] == ("a", "b") else 4) == 0
        split = compiled.output_shardings[0].spec
        assert split[1] == (x_spec[1] if divides else None)


@pytest.mark.sampled
@each_mesh
@pytest.mark.parametrize("options", [{}, dict(causal=False, norm="layer")], ids=str)
def test_a_network_of_packed_sequences(options, kind):
    mesh, model = _mesh(kind), model_of(dilations=(1, 16), **options)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x, ids):
        return jnp.mean(jnp.sin(nnx.merge(graph, params, rest)(x, segment_ids=ids)))

    x = numbers(4, 48, 3)
    operands = params, _put(mesh, x, "b", "a"), _put(mesh, IDS, "b", "a")
    compiled, out = compiled_quickly(jax.value_and_grad(loss), mesh, *operands)
    assert set(gathered_sizes(compiled)) <= {2 * 48}  # the ids, where XLA splits what they say
    tree_close(out, jax.jit(jax.value_and_grad(loss))(params, x, IDS), rtol=1e-4)


def test_out_sharding_decides_also_where_x_is_padded():
    mesh = _mesh(AxisType.Explicit)
    f = lambda x, w: conv1d(x, w, padding="CIRCULAR", out_sharding=P("a"))  # noqa: E731
    with jax.set_mesh(mesh):
        y = jax.jit(f)(_put(mesh, X, "b", "a"), _put(mesh, W))
    assert y.sharding.spec[0] == "a" and y.sharding.spec[1] is None
    tree_close(np.asarray(y), np.asarray(conv1d(X, W, padding="CIRCULAR")), rtol=1e-4)


@pytest.mark.sampled
@pytest.mark.parametrize("time", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, dict(strides=3), dict(input_dilation=3, padding=[(4, 2)]), dict(activation="silu")],
    ids=str,
)
def test_a_mesh_with_axes_of_both_kinds(options, time):
    """Time is gathered from automatic axes where XLA would end the process over the stride."""
    batch = AxisType.Auto if time == AxisType.Explicit else AxisType.Explicit
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(time, batch))
    x = X[:, :24]
    run = _everything(functools.partial(conv1d, kernel_dilation=2, **options))
    compiled, out = compiled_quickly(run, mesh, _put(mesh, x, "b", "a"), _put(mesh, W))
    same_rate = not {"strides", "input_dilation"} & set(options)
    assert ("all-gather" in collectives(compiled)) != (same_rate or time == AxisType.Explicit)
    tree_close(out, jax.jit(run)(x, W), rtol=1e-4)


# Every two of the three meet. On split time all of it is cut: at once, at the end, or row by row.
@pytest.mark.sampled
@pytest.mark.parametrize(
    ("split", "norm", "masked"),
    [
        (P("b", "a"), "batch", True),
        (P("b", "a"), None, False),
        (P("b", "a"), "batch", False),
        (P("b"), "batch", False),
        (P("b"), None, True),
    ],
    ids=str,
)
def test_the_last_step_of_a_network(split, norm, masked):
    """From split time; what is cut off before may be longer or shorter than a device's part."""
    model = model_of(dilations=[1, 3], norm=norm, return_sequences=False)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    x, mask = X[..., :3], MASK[:, ::-1] if masked else None
    mesh = _mesh(AxisType.Explicit)

    def loss(params, x, mask):
        y = nnx.merge(graph, params, rest)(x, mask=mask)
        return jnp.sum(jnp.sin(y)), y

    run = jax.value_and_grad(loss, (0, 1), has_aux=True)
    given = None if mask is None else _put(mesh, mask, *split)
    params = jax.device_put(params, NamedSharding(mesh, P()))
    _, out = compiled_quickly(run, mesh, params, _put(mesh, x, *split), given)
    tree_close(out, jax.jit(run)(nnx.split(model, nnx.Param, ...)[1], x, mask), rtol=1e-4)


@pytest.mark.sampled
@pytest.mark.parametrize("x_spec, w_spec", [
    (P("a", None, "b"), P()), (P("a"), P(None, "b")), (P("a"), P(None, None, "b")),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("activation", [None, "silu"])
def test_an_explicit_axis_of_one_device(x_spec, w_spec, activation):
    """Summed over it beside an automatic axis, XLA's partitioner fails."""
    mesh = jax.make_mesh((8, 1), ("a", "b"), axis_types=(AxisType.Auto, AxisType.Explicit))
    x, b = numbers(8, 12, 8), BIAS
    run = _everything(lambda x, w: conv1d(x, w, b, activation=activation))
    _, out = compiled_quickly(run, mesh, _put(mesh, x, *x_spec), _put(mesh, W, *w_spec))
    tree_close(out, jax.jit(run)(x, W), rtol=1e-4)
