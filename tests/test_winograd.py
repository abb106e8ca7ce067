"""Minimal filtering: its arithmetic, how few products it takes, and that nothing leaks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conv_pallas.kernels import xla, xla_native
from conv_pallas.kernels.xla_formulations import numbers_of
from conv_pallas.kernels.xla_winograd import share, winograd
from conv_pallas.spec import ConvSpec
from tests.cases import Case, named
from tests.support import rows
from tests.tolerance import check

GEOMETRIES = (
    "grouped_narrowing",
    "pointwise_dilated",
    "time_shorter_than_dilation",
    "stride_over_taps",
    "stride_grouped",
    "input_dilation_stride",
    "input_dilation_crop",
    "pad_beyond_field",
    "dense_bfloat16",
    "grouped_bfloat16_float32",
)
CASES = [Case(f"K{K}_D{D}", T=23, K=K, D=D) for K in range(1, 12) for D in (1, 3)]
CASES += [named(name) for name in GEOMETRIES]
CASES += [Case("float64", T=23, K=5, D=2, dtype="float64")]
# An output is a sum of products that cancel in part. It is as exact as the definition where it has
# many channels to sum over, which is where it is chosen: here 48 of each group.
CASES = [dataclasses.replace(case, C=48 * case.G, O=48 * case.G) for case in CASES]
CASES += [Case("int32", T=23, K=3, C=4, O=4, dtype="int32")]
TESTS = [(case, "conv1d") for case in CASES]
# The input gradient of a strided layer sees zeros for the most part, and so few products.
TESTS += [(case, "conv1d_input_grad") for case in CASES if case.S == 1]


@pytest.mark.parametrize(("case", "operation"), TESTS, ids=str)
def test_arithmetic(case, operation):
    x, kernel, g = case.arrays()
    with jax.enable_x64(case.dtype == "float64"):
        problem = case.problem(operation)
        lhs = rows(x if operation == "conv1d" else g)
        run = jax.jit(functools.partial(xla.run_as, "winograd", problem)).lower(lhs, kernel)
        actual = run.compile({"xla_backend_optimization_level": 0})(lhs, kernel)
        check(actual, operation, lhs, kernel, case.spec, out_dtype=problem.out_dtype)


def _flops(f, spec: ConvSpec, C: int = 64) -> float:
    numbers = numbers_of(Case("any").problem("conv1d"))[1]
    x = jax.ShapeDtypeStruct((1, spec.time, C), jnp.float32)
    w = jax.ShapeDtypeStruct((spec.kernel_size, C, C), jnp.float32)
    run = jax.jit(lambda x, w: f(x, w, spec, numbers))
    return run.lower(x, w).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("K", range(2, 9))
@pytest.mark.parametrize(("T", "D"), [(64, 1), (64, 8), (60, 24)])
def test_so_many_products(K, T, D):
    spec = ConvSpec(T + (K - 1) * D, K, kernel_dilation=D)
    direct = _flops(lambda x, w, spec, numbers: xla_native.conv(x, w, spec, numbers.out), spec)
    # Beside products it adds steps, taps and results: a channel's share of a product each.
    assert share(spec) <= _flops(winograd, spec) / direct < share(spec) + 8 / 64
    if T % (2 * D) == 0:
        assert share(spec) <= 0.75


@pytest.mark.parametrize("K", [2, 3, 4, 7])
@pytest.mark.parametrize("high", [0, 2, -3])
def test_no_output_sees_more_than_by_definition(K, high):
    """Neither the other output of its tile nor what was cut off: NaN times zero would show."""
    spec = ConvSpec(19, K, padding=((K - 1) * 2, high), kernel_dilation=2)
    numbers = numbers_of(Case("any").problem("conv1d"))[1]
    w = jnp.ones((K, 1, 1))
    run = jax.jit(jax.vmap(lambda x: winograd(x[None], w, spec, numbers)[0, :, 0]))
    x = jnp.where(jnp.eye(spec.time, dtype=bool)[..., None], jnp.nan, 0)
    distance = np.arange(spec.time)[:, None] + spec.padding[0] - np.arange(spec.out_time)
    seen = (distance >= 0) & (distance < spec.span) & (distance % 2 == 0)
    np.testing.assert_array_equal(np.asarray(run(x)), np.where(seen, np.nan, 0))
