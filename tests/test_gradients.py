"""Derivatives to the second order in both modes, against finite differences, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from conv_pallas import conv1d
from conv_pallas.spec import OPERATIONS, lhs_rhs_out
from tests import cases
from tests.cases import Case
from tests.support import IMPLEMENTATIONS, bind

pytestmark = pytest.mark.usefixtures("hardly_optimized")

# Finite differences of second order take dozens of calls: small sizes, same geometry.
SMALL = tuple(
    dataclasses.replace(case, T=min(case.T, 9 + case.spec.span // 2), dtype="float64")
    for case in cases.GEOMETRY
    if case.C * case.O <= 128 and 0 not in case.x_shape and 0 not in case.out_shape
)


def _check(f, arrays):
    # Not under jit: then XLA compiles each of the three operations once, instead of a dozen
    # functions made of them.
    check_grads(f, arrays, order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


@pytest.mark.sampled
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_geometry(case: Case):
    with jax.enable_x64(True):
        x, kernel, _ = case.arrays()
        _check(lambda x, w: conv1d(x, w, **case.kwargs, implementation="xla"), (x, kernel))


def test_the_table_is_not_thinned_out():
    assert len(SMALL) > 0.75 * len(cases.GEOMETRY)


@pytest.mark.sampled
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ["stride_grouped", "input_dilation_stride", "multiplier"])
def test_each_primitive(name, operation, implementation):
    case = dataclasses.replace(cases.named(name), dtype="float64", batch=(1,))
    with jax.enable_x64(True):
        operands = lhs_rhs_out(operation, *case.arrays())[:2]
        problem = case.problem(operation)
        _check(lambda lhs, rhs: bind(problem, lhs, rhs, implementation), operands)


KNOBS = {
    "bias": dict(bias=True),
    "relu": dict(bias=True, activation="relu"),
    "gelu": dict(bias=True, activation="gelu"),
    "gelu_exact": dict(bias=True, activation="gelu_exact"),
    "silu": dict(bias=True, activation="silu"),
    "tanh": dict(activation="tanh"),
    "sigmoid": dict(activation="sigmoid"),
    "callable": dict(bias=True, activation=jnp.cos),
    "precision": dict(bias=True, precision="highest"),
    "preferred": dict(preferred_element_type=jnp.float64),
    "stock": dict(bias=True, implementation="xla_native"),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", KNOBS)
def test_every_knob(name):
    case = dataclasses.replace(cases.named("stride_grouped"), dtype="float64")
    knobs = dict(KNOBS[name])
    with jax.enable_x64(True):
        x, kernel, _ = case.arrays()
        bias = np.linspace(-1, 1, case.O) if knobs.pop("bias", False) else None
        arrays = (x, kernel) if bias is None else (x, kernel, bias)
        _check(lambda *arrays: conv1d(*arrays, **case.geometry, **knobs), arrays)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("out_dtype", [None, "float32"])
def test_dtypes_of_derivatives(dtype, out_dtype):
    case = dataclasses.replace(cases.named("grouped"), dtype=dtype, out_dtype=out_dtype)
    x, kernel, g = case.arrays()
    f = lambda x, w: conv1d(x, w, **case.kwargs)  # noqa: E731

    @jax.jit
    def run(x, w, g):
        y, dy = jax.jvp(f, (x, w), (x, w))
        dx, dw = jax.vjp(f, x, w)[1](g)
        # Reverse over forward, and forward over reverse.
        ddx = jax.vjp(lambda x: jax.jvp(f, (x, w), (x, w))[1], x)[1](g)[0]
        ddw = jax.jvp(lambda w: jax.vjp(f, x, w)[1](g)[0], (w,), (w,))[1]
        return (y, dy, dx, dw), (ddx, ddw)

    (y, dy, dx, dw), (ddx, ddw) = run(x, kernel, g)
    assert y.dtype == dy.dtype == g.dtype
    assert dx.dtype == dw.dtype == ddx.dtype == ddw.dtype == x.dtype
    # Bilinear: f(x, w) twice over.
    np.testing.assert_allclose(dy.astype(np.float32), 2 * y.astype(np.float32), rtol=0.02, atol=0.1)
    np.testing.assert_array_equal(ddw, dx)


def test_integer_operands_have_no_gradient_but_the_others_have():
    x = np.arange(24).reshape(2, 4, 3)
    w = np.ones((2, 3, 5), np.float32)
    dw = jax.grad(lambda w: conv1d(x, w).sum())(w)
    assert dw.shape == w.shape
    np.testing.assert_array_equal(dw[1, :, 0], x.sum((0, 1)))
