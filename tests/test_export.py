"""`jax.export` and back: what is saved runs elsewhere, for other sizes, and differentiates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from conv_pallas import conv1d, explain
from tests import cases
from tests.support import IMPLEMENTATIONS, order, tree_close

pytestmark = pytest.mark.usefixtures("hardly_optimized")


def _round_trip(f, *args, vjp_order=0, **kwargs):
    exported = export.export(jax.jit(f), **kwargs)(*args)
    return export.deserialize(exported.serialize(vjp_order=vjp_order))


@pytest.mark.sampled
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["stride_grouped", "depthwise_dilated", "two_batch_axes"])
def test_value_and_second_derivative(name, implementation):
    case = cases.named(name)
    x, w, _ = case.arrays()
    f = lambda x, w: conv1d(x, w, **case.kwargs, implementation=order(implementation))  # noqa: E731
    loaded = _round_trip(f, x, w, vjp_order=2)
    tree_close(loaded.call(x, w), jax.jit(f)(x, w))

    def hvp(f):
        loss = lambda x, w: jnp.sum(jnp.sin(f(x, w)))  # noqa: E731
        grad = lambda x, w: jax.grad(loss, (0, 1))(x, w)  # noqa: E731
        second = jax.grad(lambda x, w: sum(jnp.sum(g**2) for g in grad(x, w)), (0, 1))
        return jax.jit(lambda x, w: (grad(x, w), second(x, w)))

    tree_close(hvp(loaded.call)(x, w), hvp(f)(x, w), rtol=1e-4)


@pytest.mark.parametrize("name", ["stride_grouped", "depthwise_dilated", "dense_bfloat16"])
def test_for_platforms_that_are_not_here(name):
    case = cases.named(name)
    x, w, _ = case.arrays()
    f = lambda x, w: conv1d(x, w, **case.kwargs, implementation="xla")  # noqa: E731
    both = lambda x, w: (f(x, w), jax.grad(lambda *a: f(*a).astype(float).sum(), (0, 1))(x, w))  # noqa: E731
    loaded = _round_trip(both, x, w, platforms=("cpu", "cuda", "rocm", "tpu"))
    assert loaded.platforms == ("cpu", "cuda", "rocm", "tpu")
    tree_close(loaded.call(x, w), jax.jit(both)(x, w))


@pytest.mark.parametrize("platform", ["cuda", "tpu", "rocm"])
def test_for_one_platform_that_is_not_here(platform):
    case = cases.named("stride_grouped")
    x, w, _ = case.arrays()
    f = lambda x, w: conv1d(x, w, **case.kwargs, implementation="xla")  # noqa: E731
    loaded = _round_trip(jax.grad(lambda x, w: f(x, w).sum(), (0, 1)), x, w, platforms=(platform,))
    with pytest.raises(ValueError, match="platform"):
        loaded.call(x, w)


@pytest.mark.parametrize("kernel", [(11, 1, 5), (3, 5, 4), (11, 5, 4)], ids=str)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_symbolic_time_for_platforms_that_are_not_here(platform, kernel):
    """Their formulations, too, are shapes of which one is not known."""
    f = lambda x, w: jnp.sum(  # noqa: E731
        conv1d(x, w, kernel_dilation=2, feature_group_count=5 // kernel[1]) ** 2
    )
    x = jax.ShapeDtypeStruct(export.symbolic_shape("b, t, 5"), jnp.float32)
    w = jax.ShapeDtypeStruct(kernel, jnp.float32)
    loaded = _round_trip(jax.grad(f, (0, 1)), x, w, platforms=(platform,))
    assert loaded.platforms == (platform,)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_symbolic_time_without_padding(stride, groups):
    """Of which nothing may come out: JAX can't tell how much there is to see."""
    w = np.random.default_rng(0).standard_normal((4, 4 // groups, 4)).astype(np.float32)
    f = lambda x: conv1d(  # noqa: E731
        x, w, padding="VALID", strides=stride, feature_group_count=groups
    )
    x = jax.ShapeDtypeStruct(export.symbolic_shape("b, t, 4"), jnp.float32)
    loaded = _round_trip(f, x)
    for T in (2, 3, 4, 9):
        x = np.random.default_rng(T).standard_normal((2, T, 4)).astype(np.float32)
        tree_close(loaded.call(x), f(x))


@pytest.mark.parametrize("padding", ["CAUSAL", "VALID", [(3, 0)]], ids=str)
def test_symbolic_taps(padding):
    k, t = export.symbolic_shape("k, t", constraints=["k >= 2", "k <= 9", "t >= 20"])
    f = lambda x, w: conv1d(x, w, padding=padding)  # noqa: E731
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, t, 4), (k, 4, 3)))
    loaded = _round_trip(f, x, w)
    rng = np.random.default_rng(0)
    for K, T in ((2, 20), (5, 23)):
        x, w = (rng.standard_normal(s).astype(np.float32) for s in ((2, T, 4), (K, 4, 3)))
        tree_close(loaded.call(x, w), f(x, w))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_symbolic_taps_of_any_number(groups, platform):
    """Also of very many: none is written out. The gradient to x is one that stock lacks as well."""
    (k,) = export.symbolic_shape("k")
    f = lambda x, w: conv1d(x, w, feature_group_count=groups, kernel_dilation=2)  # noqa: E731
    train = lambda x, w: (f(x, w), jax.grad(lambda w: jnp.sum(f(x, w) ** 2))(w))  # noqa: E731
    x = np.random.default_rng(0).standard_normal((2, 20, 4)).astype(np.float32)
    w = jax.ShapeDtypeStruct((k, 4 // groups, 4), jnp.float32)
    loaded = _round_trip(train, x, w, platforms=(platform,))
    assert loaded.platforms == (platform,)
    for K in (1, 3, 70) if platform == "cpu" else ():
        w = np.random.default_rng(K).standard_normal((K, 4 // groups, 4)).astype(np.float32)
        tree_close(loaded.call(x, w), train(x, w), rtol=1e-4)


@pytest.mark.parametrize("groups", [1, 4])
def test_packed_sequences_of_symbolic_time(groups):
    w = np.random.default_rng(0).standard_normal((3, 4 // groups, 4)).astype(np.float32)
    f = lambda x, ids: conv1d(  # noqa: E731
        x, w, kernel_dilation=3, segment_ids=ids, feature_group_count=groups
    )
    shape = export.symbolic_shape("b, t")
    x = jax.ShapeDtypeStruct((*shape, 4), jnp.float32)
    loaded = _round_trip(f, x, jax.ShapeDtypeStruct(shape, jnp.int32))
    for T in (1, 5, 9):
        x = np.random.default_rng(T).standard_normal((2, T, 4)).astype(np.float32)
        ids = np.arange(T)[None] // np.asarray([[2], [4]], np.int32)
        tree_close(loaded.call(x, ids), f(x, ids))


@pytest.mark.parametrize("name", ["stride_grouped", "dense"])
def test_a_platform_that_nobody_has_heard_of_gets_stock(name):
    case = cases.named(name)
    x, w, _ = case.arrays()
    b = np.ones(case.O, x.dtype)

    @jax.jit
    def step(x, w, b):
        f = lambda x, w, b: conv1d(x, w, b, **case.kwargs)  # noqa: E731
        return jax.value_and_grad(lambda *a: f(*a).sum(), (0, 1, 2))(x, w, b)

    text = step.trace(x, w, b).lower(lowering_platforms=("unheard_of",)).as_text()
    assert text.count("stablehlo.convolution") == 3
    chosen = explain(x, w, **case.kwargs, platform="other").chosen
    assert set(chosen.values()) == {"xla_native"}


SYMBOLIC = {
    "batch": ("dense", "b, 13, 3"),
    "batch_grouped": ("stride_grouped", "b, 15, 4"),
    "batch_depthwise": ("depthwise_dilated", "b, 40, 5"),
    "batches": ("two_batch_axes", "a, b, 13, 3"),
    "time": ("dense", "2, t, 3"),
    "time_dilated": ("two_taps", "2, t, 3"),
    "time_depthwise": ("depthwise_dilated", "2, t, 5"),
    "time_same": ("same", "2, t, 3"),
    "time_valid": ("valid", "2, t, 3", "t >= 5"),
    "time_input_dilation": ("input_dilation", "2, t, 3"),
    "batch_and_time": ("grouped", "b, t, 6"),
}


@pytest.mark.sampled
@pytest.mark.parametrize("symbolic", SYMBOLIC)
def test_symbolic_sizes(symbolic):
    name, shape, *constraints = SYMBOLIC[symbolic]
    case = cases.named(name)
    epilogue = {}
    if name in ("dense", "depthwise_dilated"):
        epilogue = dict(bias=np.linspace(-1, 1, case.O, dtype=np.float32), activation="silu")
    f = lambda x, w: conv1d(x, w, **case.kwargs, **epilogue)  # noqa: E731
    run = lambda x, w: (f(x, w), jax.grad(lambda x, w: jnp.sum(f(x, w) ** 2), (0, 1))(x, w))  # noqa: E731
    symbols = export.symbolic_shape(shape, constraints=constraints)
    _, w, _ = case.arrays()
    loaded = _round_trip(run, jax.ShapeDtypeStruct(symbols, jnp.float32), w)
    for b, t in ((1, 24), (3, 41), (2, 40)):
        sizes = {"a": 2, "b": b, "t": t}
        concrete = [sizes.get(d.strip()) or int(d) for d in shape.split(",")]
        x = np.random.default_rng(0).standard_normal(concrete).astype(np.float32)
        tree_close(loaded.call(x, w), jax.jit(run)(x, w), rtol=1e-4)


@pytest.mark.parametrize("shapes", ["2,13,3 3,3,o", "2,13,c 3,c,4"])
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_symbolic_channels(platform, shapes):
    scope = export.SymbolicScope()
    x, w = (
        jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), jnp.float32)
        for shape in shapes.split()
    )
    run = lambda x, w: jax.value_and_grad(lambda x, w: jnp.sum(conv1d(x, w) ** 2), (0, 1))(x, w)  # noqa: E731
    exported = export.export(jax.jit(run), platforms=(platform,))(x, w)
    if platform == "cpu":
        rng = np.random.default_rng(0)
        x, w = (rng.standard_normal(s, np.float32) for s in ((2, 13, 3), (3, 3, 4)))
        tree_close(exported.call(x, w), jax.jit(run)(x, w), rtol=1e-4)


def test_a_symbolic_number_of_kernels():
    """`jax.vmap` folds them into channels."""
    (kernels,) = export.symbolic_shape("v")
    x = np.ones((1, 9, 3), np.float32)
    run = jax.vmap(lambda w: conv1d(x, w))
    exported = export.export(jax.jit(run))(jax.ShapeDtypeStruct((kernels, 3, 3, 4), jnp.float32))
    w = np.random.default_rng(0).standard_normal((5, 3, 3, 4)).astype(np.float32)
    tree_close(exported.call(w), run(w), rtol=1e-4)


@pytest.mark.parametrize("name", ["stride", "stride_grouped", "stride_same", "stride_same_lower"])
def test_symbolic_time_with_a_stride(name):
    """Forward only: the gradient of stock JAX, too, can't tell how many steps are left over."""
    case = cases.named(name)
    _, w, _ = case.arrays()
    f = lambda x, w: conv1d(x, w, **case.kwargs)  # noqa: E731
    symbols = export.symbolic_shape(f"2, t, {case.C}")
    loaded = _round_trip(f, jax.ShapeDtypeStruct(symbols, jnp.float32), w)
    for time in (5, 6, 24, 41):
        x = np.random.default_rng(0).standard_normal((2, time, case.C)).astype(np.float32)
        tree_close(loaded.call(x, w), jax.jit(f)(x, w))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("implementation", [None, "xla_native"])
def test_a_sharded_function_with_its_derivative(kind, implementation):
    """On automatic axes of stock's convolution alone, as the README says."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    by_batch = NamedSharding(mesh, P("data"))
    w = jnp.ones((3, 4, 4))
    f = lambda x: conv1d(x, w, implementation=implementation)  # noqa: E731
    x = jax.ShapeDtypeStruct((8, 16, 4), jnp.float32, sharding=by_batch)
    exported = export.export(jax.jit(f, in_shardings=by_batch))(x)
    if kind == AxisType.Auto and implementation is None:
        with pytest.raises(ValueError, match="AbstractMesh"):
            exported.serialize(vjp_order=1)
        return
    loaded = export.deserialize(exported.serialize(vjp_order=1))
    x = jax.device_put(jnp.ones((8, 16, 4)), by_batch)
    y, vjp = jax.vjp(jax.jit(loaded.call), x)
    np.testing.assert_allclose(y, f(np.ones((8, 16, 4), np.float32)))
    assert vjp(y)[0].shape == x.shape
