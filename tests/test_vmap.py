"""`jax.vmap` is never a loop, reads nothing twice, and equals a loop in Python."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conv_pallas import conv1d
from conv_pallas.spec import OPERATIONS, lhs_rhs_out
from tests import cases
from tests.support import IMPLEMENTATIONS, bind, order, primitives_of, tree_close

pytestmark = pytest.mark.usefixtures("hardly_optimized")

NAMES = ["stride_grouped", "multiplier", "dense"]
SIZE = 3


def _operands(name, operation):
    case = cases.named(name)
    return case.problem(operation), *lhs_rhs_out(operation, *case.arrays())[:2]


def _stacked(array, axis, seed=0):
    """`SIZE` arrays that differ, along a new axis."""
    rng = np.random.default_rng(seed)
    return np.stack([array * rng.standard_normal() + i for i in range(SIZE)], axis)


def _loop(f, in_axes, arrays):
    entries = [
        f(
            *(
                a if axis is None else np.take(a, i, axis)
                for a, axis in zip(arrays, in_axes, strict=True)
            )
        )
        for i in range(SIZE)
    ]
    return jax.tree.map(lambda *e: np.stack(e), *entries)


AXES = [(0, None), (None, 0), (0, 0), (2, None), (None, 3), (1, 2), (-1, -1)]


@pytest.mark.sampled
@pytest.mark.parametrize("in_axes", AXES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_each_operation(name, operation, in_axes):
    problem, lhs, rhs = _operands(name, operation)
    arrays = [
        a if axis is None else _stacked(a, axis, seed)
        for seed, (a, axis) in enumerate(zip((lhs, rhs), in_axes, strict=True))
    ]
    one = jax.jit(lambda lhs, rhs: bind(problem, lhs, rhs, "xla"))
    batched = jax.vmap(one, in_axes)

    out = jax.jit(batched)(*arrays)

    tree_close(out, _loop(one, in_axes, arrays))
    names = primitives_of(jax.make_jaxpr(batched)(*arrays))
    assert [n for n in names if n.startswith("conv")] == [operation]
    assert not {"while", "scan", "map"} & set(names)
    hlo = jax.jit(batched).lower(*arrays).as_text()
    assert "stablehlo.while" not in hlo


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_the_array_without_the_axis_is_read_once(name, operation):
    """One primitive with wider channels, in which that array is as large as before."""
    problem, lhs, rhs = _operands(name, operation)
    for in_axes in ((0, None), (None, 0)):
        arrays = [
            _stacked(a, 0) if axis == 0 else a for a, axis in zip((lhs, rhs), in_axes, strict=True)
        ]
        jaxpr = jax.make_jaxpr(jax.vmap(lambda a, b: bind(problem, a, b, "xla"), in_axes))(*arrays)
        (eqn,) = (e for e in jaxpr.eqns if e.primitive.name == operation)
        assert eqn.params["kernel_batch"] == 0
        for var, array in zip(eqn.invars, arrays, strict=True):
            assert math.prod(var.aval.shape) == array.size


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_over_both_is_one_operation(implementation):
    """However many kernels there are, HLO has one convolution, if any."""
    case = cases.named("stride_grouped")
    x, w, _ = case.arrays()
    f = functools.partial(conv1d, **case.kwargs, implementation=order(implementation))
    hlo = jax.jit(jax.vmap(f)).lower(_stacked(x, 0), _stacked(w, 0)).as_text()
    assert hlo.count("stablehlo.convolution") <= 1
    assert "stablehlo.while" not in hlo


@pytest.mark.parametrize("operation", OPERATIONS)
def test_many_depthwise_kernels_are_no_groups_on_a_cpu(operation):
    """Whose axis would move to the channels, and back."""
    problem, lhs, rhs = _operands("depthwise", operation)
    one = functools.partial(bind, problem, implementation="xla")
    moved = lambda f, *arrays: jax.jit(f).lower(*arrays).as_text().count("stablehlo.transpose")  # noqa: E731
    many = moved(jax.vmap(one), _stacked(lhs, 0), _stacked(rhs, 0))
    sums = operation == "conv1d_kernel_grad"  # of each tap and kernel one, taps first
    assert many == moved(one, lhs, rhs) + sums


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("out_axes", [0, 1, -1])
def test_out_axes(name, out_axes):
    case = cases.named(name)
    x, w, _ = case.arrays()
    f = jax.jit(lambda x, w: conv1d(x, w, **case.kwargs))
    ws = _stacked(w, 1)
    for in_axes, arrays in (((None, 1), (x, ws)), ((2, None), (_stacked(x, 2), w))):
        out = jax.jit(jax.vmap(f, in_axes, out_axes))(*arrays)
        tree_close(out, np.moveaxis(_loop(f, in_axes, arrays), 0, out_axes))


NESTED = {
    "inputs_inputs": ((0, None), (1, None)),
    "inputs_kernels": ((0, None), (None, 0)),
    "kernels_inputs": ((None, 0), (0, None)),
    "kernels_kernels": ((None, 0), (None, 1)),
    "both_kernels": ((0, 0), (None, 1)),
    "kernels_both": ((None, 0), (0, 0)),
    "both_both": ((0, 0), (1, 1)),
    "both_inputs": ((0, 0), (1, None)),
}


@pytest.mark.sampled
@pytest.mark.parametrize("nested", NESTED)
@pytest.mark.parametrize("name", ["stride_grouped", "multiplier"])
def test_nested_with_gradients(name, nested):
    case = cases.named(name)
    x, w, g = case.arrays()
    inner, outer = NESTED[nested]
    f = lambda x, w: jax.vjp(lambda x, w: conv1d(x, w, **case.kwargs), x, w)[1](g)  # noqa: E731
    arrays = [x, w]
    for axes in (inner, outer):
        arrays = [a if d is None else _stacked(a, d, d) for a, d in zip(arrays, axes, strict=True)]
    step = jax.vmap(f, inner)
    mapped = jax.vmap(step, outer)

    out = jax.jit(mapped)(*arrays)

    one = jax.jit(f)
    tree_close(out, _loop(lambda *a: _loop(one, inner, a), outer, arrays), rtol=1e-4)
    names = primitives_of(jax.make_jaxpr(mapped)(*arrays))
    assert not {"while", "scan"} & set(names)
    assert {n for n in names if n.startswith("conv")} == set(OPERATIONS)
    assert len([n for n in names if n.startswith("conv")]) == 3


@pytest.mark.parametrize("name", NAMES)
def test_per_example_gradients(name):
    case = cases.named(name)
    x, w, _ = case.arrays()
    grad = jax.grad(lambda w, x: jnp.sum(jnp.sin(conv1d(x, w, **case.kwargs))))
    per_example = jax.vmap(grad, (None, 0))

    out = jax.jit(per_example)(w, x)

    one = jax.jit(grad)
    tree_close(out, np.stack([one(w, x[i]) for i in range(x.shape[0])]))
    tree_close(out.sum(0), one(w, x), rtol=1e-4)
    assert not {"while", "scan"} & set(primitives_of(jax.make_jaxpr(per_example)(w, x)))


def test_bias_activation_and_spmd_axis():
    x, w = np.ones((SIZE, 2, 7, 4), np.float32), np.ones((3, 4, 5), np.float32)
    b = np.arange(SIZE * 5.0, dtype=np.float32).reshape(SIZE, 5)
    f = lambda x, b: conv1d(x, w, b, activation="relu", padding="REFLECT")  # noqa: E731
    tree_close(jax.jit(jax.vmap(f))(x, b), np.stack([f(x[i], b[i]) for i in range(SIZE)]))


def test_of_size_zero_and_one():
    case = cases.named("stride_grouped")
    x, w, _ = case.arrays()
    f = lambda x, w: conv1d(x, w, **case.kwargs)  # noqa: E731
    for size in (0, 1):
        xs, ws = np.stack([x] * size or [x])[:size], np.stack([w] * size or [w])[:size]
        for in_axes, arrays in (((0, None), (xs, w)), ((None, 0), (x, ws)), ((0, 0), (xs, ws))):
            out = jax.jit(jax.vmap(f, in_axes, axis_size=size))(*arrays)
            assert out.shape == (size, *case.out_shape)
            for entry in out:
                tree_close(entry, f(x, w))


def test_taps_that_see_nothing_of_a_batch_of_kernels():
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape, np.float32) for shape in ((2, 1, 4, 3), (2, 3, 3, 2)))
    grad = jax.grad(lambda w, x: jnp.sum(jnp.sin(conv1d(x, w, kernel_dilation=4))))
    dw = jax.vmap(grad)(w, x)
    assert not dw[:, :2].any()
    np.testing.assert_allclose(dw, [grad(*each) for each in zip(w, x, strict=True)], rtol=1e-5)
