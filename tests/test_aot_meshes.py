"""Several TPUs or GPUs that are not here: where our kernels run, and where XLA's own must."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("libtpu")
pytest.importorskip("jax_triton")

from conv_pallas import aot, conv1d
from conv_pallas.nn import TCN

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("shipped")]

X, KERNEL, BIAS = (8, 1024, 30), (3, 30, 30), (30,)
AUTO, EXPLICIT = (AxisType.Auto,) * 2, (AxisType.Explicit,) * 2
MIXED = (AxisType.Explicit, AxisType.Auto)


def _step(x, w, b, implementation=None):
    """Value and gradients of a layer that has a kernel of ours by default on a v6e."""
    f = functools.partial(conv1d, activation="relu", implementation=implementation)
    y, vjp = jax.vjp(f, x, w, b)
    return y, vjp(y)


def _mesh(chip: str, kinds) -> Mesh:
    return Mesh(np.array(aot.devices(chip, 4)).reshape(2, 2), ("d", "m"), axis_types=kinds)


def _structs(mesh: Mesh):
    """Operands with the batch over one axis."""
    return [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in ((X, P("d")), (KERNEL, P()), (BIAS, P()))
    ]


def _by_hand(f, mesh, axes=None, **options):
    specs = (P("d"), P(), P())
    return jax.shard_map(
        lambda x, w, b: f(x, w, b)[0], mesh=mesh, in_specs=specs, out_specs=P("d"),
        axis_names=axes or set(mesh.axis_names), **options,
    )  # fmt: skip


def _kernels(chip: str, f, mesh: Mesh) -> int:
    hlo = aot.compile_for(chip, f, *_structs(mesh)).as_text()
    assert "all-gather" not in hlo
    return hlo.count("tpu_custom_call") + hlo.count("triton_kernel_call")


@pytest.mark.sampled
@pytest.mark.parametrize(("kinds", "kernels"), [(AUTO, 0), (MIXED, 0), (EXPLICIT, 3)], ids=str)
def test_a_training_step_on_tpus(kinds, kernels):
    """Where no type says how to split, libtpu asks nobody, and Mosaic's kernels can't be split."""
    assert _kernels("v6e", _step, _mesh("v6e", kinds)) == kernels


@pytest.mark.parametrize("check_vma", [False, True])
def test_a_shard_map_on_tpus_has_our_kernel(check_vma):
    mesh = _mesh("v6e", AUTO)
    assert _kernels("v6e", _by_hand(_step, mesh, check_vma=check_vma), mesh) == 1


def test_a_shard_map_over_some_axes_on_tpus_has_none():
    mesh = _mesh("v6e", AUTO)
    assert _kernels("v6e", _by_hand(_step, mesh, {"d"}, check_vma=False), mesh) == 0


def test_an_export_for_tpus_that_share_a_batch():
    mesh = _mesh("v6e", AUTO)
    with aot.as_on("v6e"):
        exported = export.export(jax.jit(_step), platforms=("tpu",))(*_structs(mesh))
    assert exported.nr_devices == 4 and "tpu_custom_call" not in exported.mlir_module()


@pytest.mark.parametrize("chip, implementation", [("v6e", "pallas_tpu"), ("h200", "triton")])
def test_an_order_that_would_be_gathered_is_refused(chip, implementation):
    """XLA would have each device compute all of it, or would not compile."""
    mesh = _mesh(chip, AUTO)
    step = functools.partial(_step, implementation=implementation)
    with pytest.raises(NotImplementedError, match="partitioner can't split"):
        _kernels(chip, _by_hand(step, mesh, {"d"}, check_vma=False), mesh)


def test_on_gpus_the_partitioner_asks():
    step = functools.partial(_step, implementation="triton")
    assert _kernels("h200", step, _mesh("h200", AUTO)) >= 3


@pytest.mark.sampled
@pytest.mark.parametrize("by_name", [False, True], ids=["types", "axis_name"])
def test_time_split_over_tpus(by_name):
    """Each has our kernels, and from its neighbours the steps around its own."""
    chip, f = "v6e", functools.partial(conv1d, kernel_dilation=8, activation="silu")
    kind = AxisType.Auto if by_name else AxisType.Explicit
    mesh = Mesh(np.array(aot.devices(chip, 4)), ("t",), axis_types=(kind,))
    if by_name:
        specs = (P(None, "t"), P(), P())
        f = jax.shard_map(
            functools.partial(f, axis_name="t"), mesh=mesh, in_specs=specs, out_specs=specs[0]
        )

    def step(x, w, b):
        y, vjp = jax.vjp(f, x, w, b)
        return y, vjp(y)

    shapes = ((2, 16384, 30), P(None, "t")), (KERNEL, P()), (BIAS, P())
    structs = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in shapes
    ]
    hlo = aot.compile_for(chip, step, *structs).as_text()
    assert hlo.count("tpu_custom_call") == 3 and "collective-permute" in hlo
    assert "all-gather" not in hlo


def test_a_network_on_tpus_that_share_a_batch():
    """Every layer of 30 channels, in both directions."""
    mesh = _mesh("v6e", EXPLICIT)

    def on(mesh, a, spec):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

    model = nnx.eval_shape(
        lambda: TCN(30, [30] * 2, 10, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    )
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def step(params, x):
        loss = lambda p: nnx.merge(graph, p, rest)(x).astype(jnp.float32).sum()  # noqa: E731
        return jax.value_and_grad(loss)(params)

    params = jax.tree.map(lambda a: on(mesh, a, P()), params)
    x = on(mesh, jax.ShapeDtypeStruct(X, jnp.bfloat16), P("d"))
    hlo = aot.compile_for("v6e", step, params, x).as_text()
    assert hlo.count("tpu_custom_call") >= 3 * 4 - 1  # nobody asks for x's gradient
    assert "all-gather" not in hlo


def _kernel_grad(kernel, place, implementation=None, mesh=None) -> str:
    """What libtpu compiles the kernel gradient of a layer to whose x is placed so."""
    mesh = mesh or _mesh("v5e", AUTO)
    operands = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in (((8, 256, 128), place), (kernel, P()))
    ]
    f = functools.partial(
        conv1d, feature_group_count=128 // kernel[1], implementation=implementation
    )
    grad = jax.grad(lambda x, w: jnp.sum(jnp.sin(f(x, w))), 1)
    return aot.compile_for("v5e", grad, *operands).as_text()


def _over_all_devices(hlo: str) -> set[bool]:
    """Whether its sums are over all four, for each that it has."""
    sums = [line for line in hlo.splitlines() if re.search(r" all-reduce(-start)?\(", line)]
    return {"{{0,1,2,3}}" in line for line in sums}


DENSE, SPLIT_TIME = (3, 128, 128), P(None, "d")


@pytest.mark.parametrize("taps", [3, 80])
def test_on_tpus_kernel_gradients_are_summed_over_what_is_split(taps):
    """And not over the devices that hold the same part, as stock's are: see the README."""
    layer = (taps, 1, 128), P("d")
    assert _over_all_devices(_kernel_grad(*layer, "xla_native")) == {True}
    assert _over_all_devices(_kernel_grad(*layer)) == {False}


def test_on_tpus_time_is_gathered_where_its_sums_would_be_wrong():
    stock, ours = (_kernel_grad(DENSE, SPLIT_TIME, name) for name in ("xla_native", None))
    assert _over_all_devices(stock) == {True} and "all-gather" not in stock
    assert True not in _over_all_devices(ours) and "all-gather" in ours


def test_on_tpus_time_is_not_gathered_along_the_only_axis():
    mesh = Mesh(np.array(aot.devices("v5e", 4)).reshape(4, 1), ("d", "m"), axis_types=AUTO)
    ours = _kernel_grad(DENSE, SPLIT_TIME, mesh=mesh)
    assert "all-gather" not in ours and "collective-permute" in ours
