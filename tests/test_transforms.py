"""Every transform of JAX on `conv1d`: what it gives, and what it makes of the primitives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify, jet

from conv_pallas import conv1d, conv_general_dilated
from conv_pallas.spec import OPERATIONS
from tests import cases
from tests.support import primitives_of, tree_close

pytestmark = pytest.mark.usefixtures("hardly_optimized")

NAMES = ["stride_grouped", "depthwise_dilated", "dense"]
each_case = pytest.mark.parametrize("name", NAMES)


def _setup(name):
    """`conv1d` and the stock function of the same arguments, and x, kernel, g for them."""
    case = cases.named(name)
    ours = functools.partial(conv1d, **case.kwargs)
    return ours, functools.partial(ours, implementation="xla_native"), *case.arrays()


def _loss(f):
    return lambda x, w: jnp.sum(jnp.sin(f(x, w)))


def _compare(transformed, name, rtol=1e-5):
    """The same transform of ours and of stock, compiled, on the same arrays."""
    ours, stock, x, w, g = _setup(name)
    tree_close(jax.jit(transformed(ours))(x, w, g), jax.jit(transformed(stock))(x, w, g), rtol=rtol)


# --- Differentiation ---

DERIVATIVES = {
    "grad": lambda f: lambda x, w, g: jax.grad(_loss(f), (0, 1))(x, w),
    "value_and_grad": lambda f: lambda x, w, g: jax.value_and_grad(_loss(f))(x, w),
    "jvp": lambda f: lambda x, w, g: jax.jvp(f, (x, w), (x[::-1], w[::-1])),
    "jvp_kernel": lambda f: lambda x, w, g: jax.jvp(lambda w: f(x, w), (w,), (w[::-1],)),
    "vjp": lambda f: lambda x, w, g: jax.vjp(f, x, w)[1](g),
    "linearize": lambda f: lambda x, w, g: jax.linearize(f, x, w)[1](x[::-1], w),
    "linear_transpose": lambda f: lambda x, w, g: jax.linear_transpose(lambda x: f(x, w), x)(g),
    "hvp_forward_over_reverse": lambda f: (
        lambda x, w, g: jax.jvp(jax.grad(_loss(f), (0, 1)), (x, w), (x[::-1], w[::-1]))
    ),
    "hvp_reverse_over_forward": lambda f: (
        lambda x, w, g: jax.grad(
            lambda x, w: jax.jvp(_loss(f), (x, w), (x[::-1], w[::-1]))[1], (0, 1)
        )(x, w)
    ),
    "hvp_reverse_over_reverse": lambda f: (
        lambda x, w, g: jax.grad(lambda x, w: jnp.vdot(jax.grad(_loss(f))(x, w), x[::-1]), (0, 1))(
            x, w
        )
    ),
    "third": lambda f: (
        lambda x, w, g: jax.jvp(
            lambda w: jax.grad(lambda w: jax.jvp(lambda x: _loss(f)(x, w), (x,), (x,))[1])(w),
            (w,),
            (w[::-1],),
        )
    ),
    "fourth": lambda f: lambda x, w, g: _fourth(f)(x, w),
    "taylor": lambda f: lambda x, w, g: jet.jet(_loss(f), (x, w), ((x[::-1], x), (w[::-1], w))),
    "taylor_of_gradient": lambda f: (
        lambda x, w, g: jet.jet(jax.grad(_loss(f), (0, 1)), (x, w), ((x[::-1],), (w[::-1],)))
    ),
}


def _fourth(f):
    """Reverse over forward over reverse over reverse."""

    def run(x, w):
        second = jax.grad(lambda w: jnp.vdot(jax.grad(_loss(f))(x, w), x))
        third = lambda w: jax.jvp(lambda w: jnp.sum(second(w) ** 2), (w,), (w[::-1],))[1]  # noqa: E731
        return jax.grad(third)(w)

    return run


@pytest.mark.sampled
@each_case
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_derivatives(derivative, name):
    _compare(DERIVATIVES[derivative], name, rtol=1e-3 if derivative == "fourth" else 1e-4)


JACOBIANS = {
    "jacfwd": lambda f: lambda x, w, g: jax.jacfwd(f, (0, 1))(x, w),
    "jacrev": lambda f: lambda x, w, g: jax.jacrev(f, (0, 1))(x, w),
    "hessian": lambda f: lambda x, w, g: jax.hessian(_loss(f), (0, 1))(x, w),
    "jacrev_of_jacrev": lambda f: lambda x, w, g: jax.jacrev(jax.jacrev(_loss(f)), 1)(x, w),
}


@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_jacobians(jacobian):
    """Of one sequence of few steps: they are large."""

    def transformed(f):
        inner = JACOBIANS[jacobian](lambda x, w: f(x[None], w)[0])
        return lambda x, w, g: inner(x[0, :9], w, g)

    _compare(transformed, "stride_grouped", rtol=1e-4)


def test_a_derivative_is_made_of_the_three_operations():
    ours, _, x, w, g = _setup("stride_grouped")
    loss = jax.grad(_loss(ours), (0, 1))
    names = primitives_of(jax.make_jaxpr(loss)(x, w))
    for operation in OPERATIONS:
        assert names.count(operation) == 1
    hvp = lambda x, w: jax.jvp(loss, (x, w), (x, w))[1]  # noqa: E731
    names = primitives_of(jax.make_jaxpr(hvp)(x, w))
    assert "conv_general_dilated" not in names
    assert len([n for n in names if n.startswith("conv1d")]) == 9  # three bilinear, x3 each


# --- Control flow, memory ---


def test_scan_over_layers_and_its_gradient():
    def run(f):
        def stacked(x, w, g):
            kernels = jnp.stack([w, w[::-1], 2 * w])
            step = lambda y, w: (jnp.tanh(f(y, w)[..., : y.shape[-1]]), None)  # noqa: E731
            loss = lambda x, ks: jnp.sum(lax.scan(step, x, ks)[0] ** 2)  # noqa: E731
            return jax.value_and_grad(loss, (0, 1))(x, kernels)

        return stacked

    _compare(run, "dense", rtol=1e-4)


@pytest.mark.sampled
@pytest.mark.parametrize(
    "policy",
    [None, "nothing_saveable", "everything_saveable", "dots_saveable"],
)
def test_remat(policy):
    policy = policy and getattr(jax.checkpoint_policies, policy)
    wrap = lambda f: jax.checkpoint(lambda x, w: jnp.sin(f(x, w)), policy=policy)  # noqa: E731
    _compare(lambda f: DERIVATIVES["grad"](wrap(f)), "stride_grouped", rtol=1e-4)
    _compare(
        lambda f: DERIVATIVES["hvp_forward_over_reverse"](wrap(f)), "stride_grouped", rtol=1e-4
    )


def test_remat_computes_again_what_is_not_saved():
    ours, _, x, w, _ = _setup("dense")
    body = lambda x, w: jnp.sin(ours(x, w))  # noqa: E731

    def count(policy):
        loss = lambda x, w: jnp.sum(jax.checkpoint(body, policy=policy)(x, w))  # noqa: E731
        return primitives_of(jax.make_jaxpr(jax.grad(loss))(x, w)).count("conv1d")

    assert count(jax.checkpoint_policies.nothing_saveable) == 2
    assert count(jax.checkpoint_policies.everything_saveable) == 1


def test_a_profile_names_the_operations():
    """Each HLO operation tells which of the three it is a part of, and in whose scope."""
    ours, _, x, w, _ = _setup("dense")

    def loss(x, w):
        with jax.named_scope("encoder"):
            return jnp.sum(jnp.sin(ours(x, w)))

    hlo = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, w).compile().as_text()
    for name in (
        r"jvp\(encoder\)/conv1d/",
        r"transpose\(jvp\(encoder\)\)/conv1d_input_grad/",
        r"transpose\(jvp\(encoder\)\)/conv1d_kernel_grad/",
    ):
        assert re.search(rf'op_name="[^"]*{name}', hlo), name


def test_control_flow():
    def run(f):
        def both(x, w, g):
            y = lax.cond(x[0, 0, 0] > 0, lambda: f(x, w), lambda: -f(x, w))
            z = lax.fori_loop(0, 3, lambda i, a: a + f(x, w * i), jnp.zeros_like(y))
            return y, z, lax.map(lambda x: f(x, w), x)

        return both

    _compare(run, "stride_grouped")


@pytest.mark.parametrize("activation", [None, "relu"])
def test_checkify_tells_where_a_nan_came_from(activation):
    """Infinity times zero, in a kernel that is zero or in a cotangent."""
    _, _, x, w, g = _setup("dense")
    bias = None if activation is None else jnp.ones(w.shape[-1])
    f = lambda x, w: conv1d(x, w, bias, activation=activation)  # noqa: E731
    kernel_gradient = lambda x, w: jax.vjp(functools.partial(f, x), w)[1](0 * g)  # noqa: E731
    names = ("conv1d", "conv1d_kernel_grad")
    fused = ("conv1d_fused", "conv1d_fused_backward")
    infinite, ones = jnp.full_like(x, jnp.inf), jnp.ones_like(w)
    for name, run, bad in zip(
        fused if activation else names, (f, kernel_gradient), (0 * ones, ones), strict=True
    ):
        checked = jax.jit(checkify.checkify(run, errors=checkify.float_checks))
        assert checked(jnp.ones_like(x), bad)[0].get() is None
        error, _ = checked(infinite, bad)
        assert f"nan generated by primitive: {name}." in (error.get() or "")


def test_donated_buffers():
    ours, _, x, w, _ = _setup("dense")
    want_y, want_dx = ours(x, w), jax.grad(_loss(ours))(x, w)
    step = jax.jit(lambda x, w: (ours(x, w), jax.grad(_loss(ours))(x, w)), donate_argnums=0)
    donated = jnp.array(x)
    y, dx = step(donated, w)
    assert donated.is_deleted()
    tree_close((y, dx), (want_y, want_dx))


# --- Shapes and dtypes, without numbers ---


@pytest.mark.parametrize("name", ["stride_grouped", "no_output", "two_batch_axes", "circular"])
def test_eval_shape(name):
    case = cases.named(name)
    structs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (case.x_shape, case.kernel_shape)]
    y = jax.eval_shape(lambda x, w: conv1d(x, w, **case.kwargs), *structs)
    assert (y.shape, y.dtype) == (case.out_shape, jnp.float32)
    grads = jax.eval_shape(
        jax.grad(lambda x, w: conv1d(x, w, **case.kwargs).sum(), (0, 1)), *structs
    )
    assert [g.shape for g in grads] == [s.shape for s in structs]


MIXES = {  # of x, kernel and bias; and what comes out
    "float32_kernel": (jnp.bfloat16, jnp.float32, None, jnp.float32),
    "float32_x": (jnp.float32, jnp.bfloat16, None, jnp.float32),
    "half_and_half": (jnp.float16, jnp.bfloat16, None, jnp.float32),
    "float32_bias": (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32),
    "integers": (jnp.int32, jnp.int8, None, jnp.float32),
    "integer_x": (jnp.int32, jnp.bfloat16, None, jnp.bfloat16),
    "bool_x": (jnp.bool_, jnp.float16, jnp.float16, jnp.float16),
    "bools": (jnp.bool_, jnp.bool_, None, jnp.float32),
    "complex": (jnp.complex64, jnp.float32, None, jnp.complex64),
}


@pytest.mark.parametrize("mix", MIXES)
def test_mixed_dtypes(mix):
    x_dtype, w_dtype, b_dtype, out_dtype = MIXES[mix]
    x = np.arange(24).reshape(2, 4, 3) % 3
    w = np.arange(12).reshape(2, 3, 2) % 2
    b = None if b_dtype is None else jnp.asarray([1, 2], b_dtype)
    y = jax.jit(conv1d)(jnp.asarray(x, x_dtype), jnp.asarray(w, w_dtype), b)
    assert (y.dtype, y.weak_type) == (out_dtype, False)
    x, w = (np.asarray(jnp.asarray(a, d)).astype(complex) for a, d in ((x, x_dtype), (w, w_dtype)))
    want = np.einsum("ntc,co->nto", x, w[1]) + np.pad(
        np.einsum("ntc,co->nto", x, w[0]), ((0, 0), (1, 0), (0, 0))
    )[:, :-1]  # fmt: skip
    np.testing.assert_array_equal(
        np.asarray(y).astype(complex), want + (0 if b is None else [1, 2])
    )


def test_weak_types_do_not_widen():
    x = jnp.ones((1, 4, 2), jnp.bfloat16)
    assert conv1d(x, x[:, :2, :1].reshape(2, 1, 1).repeat(2, 1), None).dtype == jnp.bfloat16
    w = jnp.broadcast_to(jnp.asarray(2.0), (2, 2, 3))  # a Python number is weak
    assert w.weak_type
    stock = jax.eval_shape(lambda x, w: x[0, :2] * w[0, :, :2], x, w).dtype
    assert conv1d(x, w).dtype == stock
    xs = jnp.broadcast_to(jnp.asarray(2.0), x.shape)
    for mask in None, jnp.ones(x.shape[:2], bool):
        assert conv1d(xs, w.astype(jnp.bfloat16), mask=mask).dtype == jnp.bfloat16


# --- The functional twin of jax.lax ---


@pytest.mark.sampled
@pytest.mark.parametrize("numbers", [
    None, ("NWC", "WIO", "NWC"), ("NCW", "OIW", "NCW"), ("WNC", "IOW", "CNW"), ("CWN", "OWI", "NWC")
], ids=str)  # fmt: skip
@pytest.mark.parametrize("padding", ["SAME", "same_lower", "VALID", [(3, -1)]], ids=str)
def test_conv_general_dilated(numbers, padding):
    lhs_spec, rhs_spec, _ = numbers or ("NCW", "OIW", "NCW")
    rng = np.random.default_rng(0)
    lhs = rng.standard_normal([dict(N=2, C=4, W=11)[d] for d in lhs_spec]).astype(np.float32)
    rhs = rng.standard_normal([dict(O=6, I=2, W=4)[d] for d in rhs_spec]).astype(np.float32)
    dilation = (3,) if isinstance(padding, list) else (1,)

    def run(f):
        call = lambda lhs, rhs: f(  # noqa: E731
            lhs, rhs, (2,), padding, dilation, (2,), numbers, feature_group_count=2
        )
        return jax.jit(lambda l, r: (call(l, r), jax.grad(_loss(call), (0, 1))(l, r)))(lhs, rhs)

    tree_close(run(conv_general_dilated), run(lax.conv_general_dilated))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.bool_, jnp.bfloat16, jnp.complex64])
@pytest.mark.parametrize("preferred", [None, jnp.int32, jnp.float32, jnp.complex64])
def test_conv_general_dilated_dtypes(dtype, preferred):
    lhs = jnp.asarray(np.arange(24).reshape(2, 3, 4) % 4, dtype)
    rhs = jnp.asarray(np.arange(30).reshape(5, 3, 2) % 3, dtype)
    run = lambda f: f(lhs, rhs, (1,), "SAME", preferred_element_type=preferred)  # noqa: E731
    try:
        want = run(lax.conv_general_dilated)
    except TypeError as error:
        with pytest.raises(type(error)):
            run(conv_general_dilated)
    else:
        y = run(conv_general_dilated)
        assert y.dtype == want.dtype
        np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize(("lhs", "rhs", "arguments"), [
    ((2, 5), (7, 5), {}),
    ((2, 3, 5, 6), (4, 3, 2, 2), dict(rhs_dilation=(2, 1))),
    ((4, 3, 9), (6, 3, 2), dict(batch_group_count=2)),
], ids=["0d", "2d", "batch_groups"])  # fmt: skip
def test_conv_general_dilated_of_what_is_left_to_lax(lhs, rhs, arguments):
    rng = np.random.default_rng(0)
    lhs, rhs = rng.standard_normal(lhs), rng.standard_normal(rhs)
    rank = lhs.ndim - 2
    ours, stock = (
        f(lhs, rhs, (1,) * rank, [(1, 0)] * rank, **arguments)
        for f in (conv_general_dilated, lax.conv_general_dilated)
    )
    np.testing.assert_array_equal(ours, stock)
