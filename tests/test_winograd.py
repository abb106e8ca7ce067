"""Minimal filtering: its arithmetic, how few products it takes, and that nothing leaks."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from benchmarks.formulations import operands
from conv_pallas import conv1d
from conv_pallas._layers import Layer
from conv_pallas.kernels import xla, xla_cpu, xla_native
from conv_pallas.kernels.xla_formulations import numbers_of
from conv_pallas.kernels.xla_winograd import share, winograd
from conv_pallas.nn import Conv
from conv_pallas.spec import OPERATIONS, ConvSpec, lhs_rhs_out
from tests.cases import Case, named
from tests.support import rows
from tests.tolerance import REFERENCES, check

conv1d = functools.partial(conv1d, implementation="xla")  # whatever else is the default

EVERY = [Case(f"K{K}_D{D}", T=23, K=K, D=D) for K in range(1, 12) for D in (1, 3)]
EVERY += [Case("float64", T=23, K=5, D=2, dtype="float64")]
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
# Products cancel in part. A sum of many is as exact as the definition's, which is where this is
# chosen: here over 48 channels, and of a kernel gradient over 140 steps, of which a tap sees most.
WIDE = [*EVERY, *map(named, GEOMETRIES)]
WIDE = [dataclasses.replace(case, C=48 * case.G, O=48 * case.G) for case in WIDE]
LONG = [*EVERY, *(named(name) for name in GEOMETRIES if "time" not in name)]
LONG = [dataclasses.replace(case, T=70) for case in LONG]
TESTS = [(case, "conv1d") for case in WIDE]
TESTS += [(Case("int32", T=23, K=3, C=4, O=4, dtype="int32"), "conv1d")]
# The input gradient of a strided layer sees zeros for the most part.
TESTS += [(case, "conv1d_input_grad") for case in WIDE if case.S == 1]
TESTS += [(case, "conv1d_kernel_grad") for case in LONG]
TESTS = [("winograd", *test) for test in TESTS]
# Strided, of one to six rows, and of groups.
STRIDED = [Case(f"K{K}_S{S}", T=140, K=K, S=S) for K in range(1, 12, 2) for S in (2, 3)]
STRIDED += [Case("grouped", T=140, K=5, S=2, C=4, O=6, G=2), Case("D2", T=140, K=3, S=2, D=2)]
TESTS += [("space_to_depth_winograd", case, "conv1d_kernel_grad") for case in STRIDED]
STRIDED = [dataclasses.replace(case, C=48 * case.G, O=48 * case.G) for case in STRIDED]
TESTS += [("depth_to_space_winograd", case, "conv1d_input_grad") for case in STRIDED]


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "case", "operation"), TESTS, ids=str)
def test_arithmetic(name, case, operation):
    x, kernel, g = case.arrays()
    lhs, rhs, _ = lhs_rhs_out(operation, x, kernel, g)
    lhs = rows(lhs)
    rhs = rows(rhs) if rhs is g else rhs
    with jax.enable_x64(case.dtype == "float64"):
        problem = case.problem(operation)
        run = jax.jit(functools.partial(xla.run_as, name, problem)).lower(lhs, rhs)
        actual = run.compile({"xla_backend_optimization_level": 0})(lhs, rhs)
        check(actual, operation, lhs, rhs, case.spec, out_dtype=problem.out_dtype)


def _flops(f, spec: ConvSpec, C: int = 64) -> float:
    numbers = numbers_of(Case("any").problem("conv1d"))[1]
    x = jax.ShapeDtypeStruct((1, spec.time, C), jnp.float32)
    w = jax.ShapeDtypeStruct((spec.kernel_size, C, C), jnp.float32)
    run = jax.jit(lambda x, w: f(x, w, spec, numbers))
    return run.lower(x, w).compile().cost_analysis()["flops"]


@pytest.mark.sampled
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


def _problem(operation, sizes, precision=None, dtype="float32"):
    problem = Layer("case", "made up", *sizes, dtype=dtype).problem(operation, "cpu")
    return dataclasses.replace(problem, precision=precision)


# Formulation, operation and sizes.
ERRORS = [
    *itertools.product(
        ("winograd",), OPERATIONS, ((2, 400, 64, 64, 3, 4), (2, 400, 128, 128, 5, 2))
    ),
    *(
        (name, operation, (2, 300, 64, 64, K, 1, 2))
        for name, operation in (
            ("depth_to_space_winograd", "conv1d_input_grad"),
            ("space_to_depth_winograd", "conv1d_kernel_grad"),
        )
        for K in (5, 10)
    ),
]


@pytest.mark.sampled
@pytest.mark.parametrize("name, operation, sizes", ERRORS, ids=str)
def test_errors_are_little_more_than_the_definitions(name, operation, sizes):
    problem = _problem(operation, sizes)
    lhs, rhs = operands(problem)
    exact = REFERENCES[operation](lhs, rhs, problem.spec)

    def error(name):
        return np.sqrt(np.mean((np.asarray(xla.run_as(name, problem, lhs, rhs)) - exact) ** 2))

    # How many numbers "native" adds up one after the other depends on the processor. With AVX2 this
    # is twice for 5 taps of a kernel gradient, where one matmul of all steps has 2.1 times.
    assert 0 < error(name) < 2.1 * error("native")


USUAL = lax.Precision.DEFAULT


@pytest.mark.parametrize(("sizes", "more", "chosen"), [
    ((2, 1000, 512, 512, 3, 16), {}, (True, True, True)),
    ((2, 1000, 512, 512, 3, 16), dict(precision=USUAL), (False, False, False)),
    ((2, 1000, 512, 512, 3, 16), dict(precision=(USUAL, USUAL)), (False,) * 3),
    ((2, 1000, 512, 512, 3, 16), dict(precision=lax.Precision.HIGH), (False, False, False)),
    ((2, 1000, 512, 512, 3, 16), dict(precision=(USUAL, lax.Precision.HIGHEST)), (False,) * 3),
    ((2, 1000, 512, 512, 3, 16), dict(dtype="float64"), (False, False, False)),
    ((2, 1000, 512, 512, 3, 16), dict(dtype="bfloat16"), (False, False, False)),
    ((2, 1000, 512, 512, 3, 1, 2), {}, (False, False, False)),
    ((2, 1000, 512, 512, 4, 16), {}, (False, False, False)),  # saves too little
    ((2, 1000, 512, 512, 7, 16), {}, (True, True, False)),
    ((1, 1000, 512, 512, 5, 16), {}, (True, True, True)),
    # Cores that lie apart wait for what the others wrote: fewer channels save less than that.
    ((2, 1000, 511, 512, 3, 16), {}, (False, False, True)),
    ((8, 1000, 64, 64, 3, 16), {}, (False, False, True)),
    ((8, 1000, 48, 128, 3), {}, (False, False, False)),
    ((2, 300, 64, 64, 3), {}, (False, False, False)),  # too little to do
    ((1, 300, 300, 300, 3), {}, (False, False, False)),  # too few steps for so large a kernel
    ((16, 4000, 512, 512, 3), {}, (False, False, False)),  # too much to put together
    ((2, 512, 1024, 1024, 3), {}, (True, True, True)),
    ((2, 256, 768, 768, 5), {}, (False, False, True)),
    # Kernels of which another form would not stay in the caches.
    ((2, 128, 512, 512, 21), {}, (False, False, False)),
    ((2, 256, 1024, 1024, 5), {}, (False, False, True)),
    ((2, 256, 1536, 1536, 3), {}, (False, False, False)),
    ((1, 1000, 512, 512, 3, 260), {}, (True, True, False)),  # taps that see next to nothing
    ((1, 1000, 512, 512, 3, 700), {}, (False, False, False)),  # 1400 steps instead
], ids=str)  # fmt: skip
def test_where_it_is_chosen(sizes, more, chosen):
    names = [xla_cpu.at_once(_problem(operation, sizes, **more)) for operation in OPERATIONS]
    assert tuple(name == "winograd" for name in names) == chosen


def test_a_precision_is_not_for_it():
    x, w = jnp.zeros((2, 1000, 512)), jnp.zeros((3, 512, 512))
    count = lambda **more: (  # noqa: E731
        jax.jit(lambda x, w: conv1d(x, w, **more)).lower(x, w).as_text().count("convolution(")
    )
    assert count() > 1
    assert count(precision="default") == count(precision="highest") == 1
    with jax.default_matmul_precision("highest"):
        assert count() == 1


def test_a_masked_weight_lets_nothing_through():
    """Nor its gradients; an order that somebody gave for all products stays what it is."""
    mask = jnp.ones((3, 512, 512)).at[1].set(0)
    layer = Conv(512, 512, 3, padding="SAME", mask=mask, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 1024, 512))
    far = jnp.zeros_like(x).at[0, 500].set(1e6)
    of_step = jax.jit(lambda x: layer(x)[0, 500])
    assert (of_step(x + far) == of_step(x)).all()
    dx = jax.jit(jax.grad(lambda x: (layer(x) * far).sum()))(x)
    assert (dx[0, 500] == 0).all() and (dx[0, 499] != 0).any()
    with jax.default_matmul_precision("highest"):
        hlo = jax.jit(layer).lower(x).as_text()
    assert "HIGHEST" in hlo
