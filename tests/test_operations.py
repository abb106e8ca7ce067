"""Every case through every implementation, against the formula in float64.

Once as a user calls it, `conv1d` and its vjp, and once primitive by primitive.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from conv_pallas import conv1d, conv_general_dilated, dispatch
from conv_pallas.spec import OPERATIONS, lhs_rhs_out
from tests import cases, tolerance
from tests.cases import CASES, Case
from tests.support import (
    IMPLEMENTATIONS,
    bind,
    check_operation,
    order,
    padded,
    rows,
    unpadded,
    value_and_gradients,
)

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def _but_for_stock_of_old(case: Case, implementation) -> None:
    low, high = case.spec.padding
    if implementation == "xla_native" and low < 0 < high and jax.__version_info__ < (0, 12):
        pytest.xfail("XLA:CPU of jaxlib 0.11.2 can't crop one end and pad the other at once")


@pytest.mark.sampled
@each_implementation
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, implementation):
    _but_for_stock_of_old(case, implementation)
    x, kernel, g = case.arrays()
    copied = padded(x, case)
    operands = {op: lhs_rhs_out(op, rows(copied), kernel, rows(g))[:2] for op in OPERATIONS}

    @jax.jit  # all at once: most of this test's time is compilation
    def run(x, kernel, g, operands):
        public = value_and_gradients(case, implementation)(x, kernel, g)
        primitives = {
            operation: bind(case.problem(operation), lhs, rhs, implementation)
            for operation, (lhs, rhs) in operands.items()
        }
        return public, primitives

    with jax.numpy_rank_promotion("raise"):  # some users set it for all that they run
        (y, dx, dw), primitives = run(x, kernel, g, operands)

    assert y.shape == case.out_shape
    assert dx.shape == x.shape
    check_operation(y, "conv1d", copied, kernel, case)
    check_operation(dw, "conv1d_kernel_grad", copied, g, case)
    if case.mode is None:
        check_operation(dx, "conv1d_input_grad", g, kernel, case)
    else:
        _check_gradient_of_padded(dx, g, kernel, case)
    for operation, actual in primitives.items():
        check_operation(actual, operation, *operands[operation], case)


def _check_gradient_of_padded(dx, g, kernel, case: Case):
    """The bound is taken through the padding's transpose, as the gradient is."""
    reference = tolerance.REFERENCES["conv1d_input_grad"]

    def compute(g, kernel):
        return unpadded(reference(g, kernel, case.spec), case)

    value = compute(g, kernel)
    terms = compute(np.ones_like(g), np.ones_like(kernel))
    magnitude = np.sqrt(compute(g.astype(float) ** 2, kernel.astype(float) ** 2))
    allowed = tolerance.bound(terms, magnitude, value, dtype=g.dtype, out_dtype=dx.dtype)
    tolerance.assert_within(dx, value, allowed, kernel.dtype, "conv1d_input_grad")


@each_implementation
def test_some_cases_are_its_own(implementation):
    """What a kernel declines the tests here run by another, so that it must not decline all."""
    answers = [
        answer
        for case in CASES
        for operation in OPERATIONS
        for answer, _ in dispatch.candidates(case.problem(operation))
    ]
    assert any(a.implementation == implementation and a.reason is None for a in answers)


@each_implementation
@pytest.mark.parametrize("name", ["crop_low", "crop_high", "crop_both", "crop_depthwise"])
def test_what_padding_crops_is_not_read(name, implementation):
    case = cases.named(name)
    _but_for_stock_of_old(case, implementation)
    x, kernel, g = case.arrays()
    low, high = case.spec.padding
    poisoned = x.copy()
    poisoned[:, : max(0, -low)] = np.nan
    poisoned[:, x.shape[1] + min(0, high) :] = np.nan
    assert np.isnan(poisoned).any()

    run = value_and_gradients(case, implementation)
    y, dx, dw = run(poisoned, kernel, g)

    clean = run(x, kernel, g)
    np.testing.assert_array_equal(y, clean[0])
    np.testing.assert_array_equal(dx, clean[1])
    np.testing.assert_array_equal(dw, clean[2])


@each_implementation
@pytest.mark.parametrize("crop", [0, 3])
def test_kernel_gradient_reads_nothing_past_the_last_window(crop, implementation):
    """With so many steps that they are summed in blocks, which they do not fill."""
    case = Case("blocks", T=41, C=4, O=4, G=4, padding=[(0, -crop)])
    x, _, g = case.arrays()
    x[:, x.shape[1] - 1] = np.inf  # seen by the last tap alone, or by none
    run = jax.jit(lambda x, g: bind(case.problem("conv1d_kernel_grad"), x, g, implementation))
    dw = run(x, g)
    finite = np.isfinite(dw)
    assert finite[:-1].all()
    assert finite[-1].all() == (crop > 0)


@each_implementation
@pytest.mark.parametrize("name", ["dilated", "depthwise_dilated", "grouped", "ragged"])
def test_causal_output_sees_nothing_later(name, implementation):
    case = cases.named(name)
    x, kernel, _ = case.arrays()
    poisoned = x.copy()
    poisoned[:, case.T // 2 :] = np.nan
    run = jax.jit(lambda x, w: conv1d(x, w, **case.kwargs, implementation=order(implementation)))

    y = run(poisoned, kernel)

    np.testing.assert_array_equal(y[:, : case.T // 2], run(x, kernel)[:, : case.T // 2])
    assert np.isnan(y[:, case.T // 2 :]).any()


@each_implementation
@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8"])
@pytest.mark.parametrize("name", ["stride_grouped", "depthwise_dilated", "dense", "crop_both"])
def test_integers_are_exact(name, dtype, implementation):
    case = dataclasses.replace(cases.named(name), dtype=dtype, out_dtype="int32")
    x, w, _ = case.arrays()
    if dtype == "int32":  # to sums that float32 does not hold
        x, w = 999 * x, 1001 * w

    run = jax.jit(lambda x, w: bind(case.problem("conv1d"), x, w, implementation))

    check_operation(run(x, w), "conv1d", x, w, case)


@each_implementation
@pytest.mark.parametrize("K, G", [(1, 1), (3, 1), (3, 16)])
def test_float16_into_a_type_with_more_range(K, G, implementation):
    """Its 65504 is no bound for what is summed: neither type holds the other."""
    C = 16
    x, w = jnp.full((2, 32, C), 200.0, jnp.float16), jnp.full((K, C // G, C), 200.0, jnp.float16)
    y = conv1d(
        x, w, preferred_element_type=jnp.bfloat16, feature_group_count=G,
        implementation=order(implementation),
    )  # fmt: skip
    assert y.dtype == jnp.bfloat16
    assert y[0, -1, 0] == jnp.bfloat16(200.0 * 200.0 * K * C // G)


@each_implementation
@pytest.mark.parametrize("name", ["grouped", "stride_same", "input_dilation_depthwise"])
def test_float64(name, implementation):
    case = dataclasses.replace(cases.named(name), dtype="float64")
    x, w, g = case.arrays()
    with jax.enable_x64(True):
        y, dx, dw = value_and_gradients(case, implementation)(x, w, g)
    check_operation(y, "conv1d", x, w, case)
    check_operation(dx, "conv1d_input_grad", g, w, case)
    check_operation(dw, "conv1d_kernel_grad", x, g, case)


def test_float64_lowered_where_it_is_off():
    case = dataclasses.replace(cases.named("grouped"), dtype="float64")
    arrays = case.arrays()
    for implementation in IMPLEMENTATIONS:
        with jax.enable_x64(True):
            traced = jax.jit(value_and_gradients(case, implementation)).trace(*arrays)
        assert {a.dtype for a in traced.lower().out_info} == {np.dtype("float64")}


@pytest.mark.parametrize("explicit", [False, True], ids=["one_device", "explicit_mesh"])
def test_float64_with_an_epilogue_lowered_where_it_is_off(explicit):
    """Forward mode too, such as that of `jax.linearize`, whose function is called later."""
    rng = np.random.default_rng(0)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    f = functools.partial(conv1d, activation="gelu")
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        with jax.enable_x64(True):
            x, w, b = (jnp.asarray(rng.standard_normal(s)) for s in ((2, 8, 4), (3, 4, 4), (4,)))
            x = jax.device_put(x, P("data")) if explicit else x
            (y, linear), (_, vjp) = jax.linearize(f, x, w, b), jax.vjp(f, x, w, b)
            traced = jax.jit(f).trace(x, w, b)
            want = jax.jvp(f, (x, w, b), (x, w, b))[1], *vjp(y)
        got = linear(x, w, b), *vjp(y)
        assert traced.lower().out_info.dtype == np.float64
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert {a.dtype for a in got} == {np.dtype("float64")}


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["dense", "depthwise", "stride_same"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_into_a_wider_result(dtype, name):
    """JAX promotes no float of 8 bits by itself."""
    case = cases.named(name)
    x, w, g = (a.astype(jnp.dtype(dtype)) for a in case.arrays())

    def run(implementation):
        f = functools.partial(
            conv1d, preferred_element_type=jnp.float32, implementation=implementation,
            **case.geometry,
        )  # fmt: skip
        y, back = jax.vjp(f, x, w)
        return y, *back(g.astype(y.dtype))

    for got, want in zip(run(None), run("xla_native"), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(*(a.astype(np.float32) for a in (got, want)), rtol=0.13)


def test_a_float_without_zero():
    """Nothing can be padded with it but inside of XLA's convolution."""
    x, w = jnp.ones((1, 3, 1), jnp.float8_e8m0fnu), jnp.ones((2, 1, 1), jnp.float8_e8m0fnu)
    how = dict(window_strides=(1,), padding=[(1, 0)], dimension_numbers=("NWC", "WIO", "NWC"))
    y = conv_general_dilated(x, w, **how)
    np.testing.assert_array_equal(y, lax.conv_general_dilated(x, w, **how))
    np.testing.assert_array_equal(y.astype(np.float32), [[[1], [2], [2]]])


def test_a_precision_is_that_of_the_trace():
    """What is configured when a program is lowered is for other programs."""
    x, w = np.ones((2, 8, 4), np.float32), np.ones((3, 4, 4), np.float32)
    train = lambda *a: jax.vjp(lambda x, w: conv1d(x, w, implementation="xla"), *a)[1](a[0])  # noqa: E731

    def lowered(traced_with, lowered_with):
        with jax.default_matmul_precision(traced_with):
            traced = jax.jit(train).trace(x, w)
        with jax.default_matmul_precision(lowered_with):
            return traced.lower(lowering_platforms=("cuda",)).as_text().count("HIGHEST")

    assert lowered(None, "highest") == lowered(None, None) == 0
    assert lowered("highest", None) == lowered("highest", "highest") >= 2


def test_the_tolerance_tells_a_wrong_kernel():
    """A bound that everything passes would make every test above worthless."""
    case = cases.named("dense_bfloat16")
    x, w, g = case.arrays()
    right = tolerance.REFERENCES["conv1d"](x, w, case.spec).astype(x.dtype)
    check_operation(right, "conv1d", x, w, case)

    rounded_twice = sum(
        (
            tolerance.REFERENCES["conv1d"](x, np.where(np.arange(case.K) == k, w.T, 0).T, case.spec)
            .astype(x.dtype)
            .astype(float)
            for k in range(case.K)
        ),
        np.zeros(right.shape),
    ).astype(x.dtype)
    for wrong in (
        rounded_twice,  # sums in the operands' dtype
        right[:, ::-1],
        np.roll(right, 1, axis=1),
        np.where(right == right[0, 0, 0], np.nan, right).astype(x.dtype),
        np.nextafter(np.nextafter(right, right * 2), right * 2),
    ):
        with pytest.raises(AssertionError, match="elements are off"):
            check_operation(wrong, "conv1d", x, w, case)
    with pytest.raises(AssertionError, match="dtype"):
        check_operation(right.astype(np.float32), "conv1d", x, w, case)
    with pytest.raises(AssertionError, match="shape"):
        check_operation(right[:, 1:], "conv1d", x, w, case)


def test_rows_keeps_the_order_of_batch_axes():
    a = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    np.testing.assert_array_equal(rows(a)[4], a[1, 1])
