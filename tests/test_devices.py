"""Programs for devices that are not here, for two meshes at once, and on disk."""

import functools
import pickle

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.experimental import serialize_executable
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from conv_pallas import conv1d
from tests.streams import numbers
from tests.support import tree_close

pytestmark = pytest.mark.usefixtures("hardly_optimized")

ARRAYS = numbers(8, 12, 4), numbers(3, 4, 6, seed=1), numbers(6, seed=2)  # x, kernel, bias
AUTO, EXPLICIT = (AxisType.Auto,) * 2, (AxisType.Explicit,) * 2
# Kinds of axes, and the implementation that is not limited there.
UNLIMITED = {"explicit": (EXPLICIT, None), "auto": (AUTO, "xla_native")}
each_kind = pytest.mark.parametrize("kind", UNLIMITED)
each_activation = pytest.mark.parametrize("activation", [None, "silu"])


def _place(mesh, array):
    """The batch of x along the mesh's first axis, parameters everywhere."""
    return NamedSharding(
        mesh, P(mesh.axis_names[0]) if array.ndim == 3 and len(array) == 8 else P()
    )


def _put(mesh):
    return [jax.device_put(a, _place(mesh, a)) for a in ARRAYS]


def _types(mesh):
    return [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=_place(mesh, a)) for a in ARRAYS]


def _program(activation, implementation=None):
    """All that has a rule: the value, gradients, their derivative, and those of each sequence."""
    f = functools.partial(
        conv1d, kernel_dilation=2, activation=activation, implementation=implementation
    )
    grad = jax.grad(lambda *operands: jnp.sum(jnp.sin(f(*operands))), (0, 1, 2))

    def run(x, w, b):
        second = jax.jvp(grad, (x, w, b), (x, w, b))[1]
        return f(x, w, b), grad(x, w, b), second, jax.vmap(grad, (0, None, None))(x, w, b)

    return jax.jit(run)


def _export(f, mesh):
    return export.export(f, platforms=("cpu",))(*_types(mesh))


@pytest.mark.sampled
@each_kind
@each_activation
def test_a_mesh_that_is_not_here(activation, kind):
    kinds, implementation = UNLIMITED[kind]
    mesh = AbstractMesh((4, 2), ("a", "b"), axis_types=kinds)
    f = _program(activation, implementation)
    assert f.trace(*_types(mesh)).lower(lowering_platforms=("tpu",)).as_text()
    loaded = export.deserialize(_export(f, mesh).serialize())
    assert loaded.nr_devices == 8
    out = jax.jit(loaded.call)(*_put(jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)))
    tree_close(jax.device_get(out), jax.device_get(f(*ARRAYS)), rtol=1e-4)


@each_activation
def test_a_mesh_that_is_not_here_of_a_shard_map(activation):
    first, every = P("a"), P()
    split = functools.partial(
        jax.shard_map, _program(activation), in_specs=(first, every, every),
        out_specs=(first, *((first, every, every),) * 2, (first,) * 3),
    )  # fmt: skip
    mesh = AbstractMesh((4, 2), ("a", "b"), axis_types=AUTO)
    here = jax.make_mesh((4, 2), ("a", "b"), axis_types=AUTO)
    exported = _export(jax.jit(split(mesh=mesh)), mesh)
    want = jax.jit(split(mesh=here))(*ARRAYS)
    tree_close(jax.device_get(exported.call(*_put(here))), jax.device_get(want), rtol=1e-4)


def _on_two_meshes(f, kinds):
    first = jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)
    other = jax.make_mesh((2, 4), ("c", "d"), axis_types=kinds)
    return jax.jit(lambda one, two: (f(*one), f(*two)))(_put(first), _put(other))


@pytest.mark.sampled
@each_kind
@each_activation
def test_two_meshes(activation, kind):
    kinds, implementation = UNLIMITED[kind]
    f = _program(activation, implementation)
    want = jax.device_get(f(*ARRAYS))
    tree_close(jax.device_get(_on_two_meshes(f, kinds)), (want, want), rtol=1e-4)


def _from_disk(f, operands, devices: int = 8):
    saved = serialize_executable.serialize(f.lower(*operands).compile())
    there = jax.devices()[:devices]
    return serialize_executable.deserialize_and_load(*saved, execution_devices=there)(*operands)


@pytest.mark.sampled
@each_kind
@each_activation
def test_an_executable_on_disk(activation, kind):
    kinds, implementation = UNLIMITED[kind]
    f = _program(activation, implementation)
    out = _from_disk(f, _put(jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)))
    tree_close(jax.device_get(out), jax.device_get(f(*ARRAYS)), rtol=1e-4)


@each_activation
def test_an_executable_of_one_device_on_disk(activation):
    f = _program(activation)
    out = _from_disk(f, ARRAYS, devices=1)
    tree_close(jax.device_get(out), jax.device_get(f(*ARRAYS)), rtol=1e-4)


@each_activation
def test_the_limits_of_automatic_axes(activation):
    """As the README says: where one falls, a sentence there does too."""
    f = _program(activation)
    with pytest.raises(ValueError, match="AbstractMesh cannot be used when"):
        _export(f, AbstractMesh((4, 2), ("a", "b"), axis_types=AUTO))
    with pytest.raises(ValueError, match="mesh should be the same across the entire program"):
        _on_two_meshes(f, AUTO)
    with pytest.raises((AttributeError, pickle.PicklingError), match=r"(pickle|get) local object"):
        _from_disk(f, _put(jax.make_mesh((4, 2), ("a", "b"), axis_types=AUTO)))
