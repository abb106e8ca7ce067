"""Bias and activation inside the operation: who is asked to carry them, and that nobody need."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals
from jax.experimental import jet
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from conv_pallas import activations, conv1d, convs_saveable, explain, kernels
from conv_pallas.kernels import Kernel, xla
from conv_pallas.spec import ACTIVATIONS, OPERATIONS
from tests import cases
from tests.support import primitives_of

pytestmark = pytest.mark.usefixtures("hardly_optimized")

CASE = dataclasses.replace(cases.named("ragged"), T=11, C=4, O=3)


class Toy:
    """A kernel for CPUs that carries everything, and writes down what it was asked for."""

    def __init__(self, monkeypatch, *, recomputes=False, declines=False, keeps=False, part=False):
        self.calls = []
        self.part = part  # of the steps: z is not what x alone gives
        self.mark = lambda z: z
        self.kernel = Kernel(
            implementation="toy",
            platforms=("cpu",),
            run=self.run,
            decline=lambda problem: None,
            describe=lambda problem: "by XLA",
            priority=None,
            fused=self.fused,
            decline_fused=lambda problem: "no" if declines else None,
            backward=self.backward,
            decline_backward=lambda problem, wanted: "no" if declines else None,
            recomputes=lambda problem: recomputes,
            keeps=lambda problem: keeps,
        )
        self.recomputed = recomputes
        found, missing = kernels.discover()
        monkeypatch.setattr(kernels, "discover", lambda: (found | {"toy": self.kernel}, missing))

    def run(self, problem, lhs, rhs):
        self.calls.append(problem.operation)
        self.sees(problem)
        return xla.run(problem, lhs, rhs)

    def sees(self, problem):
        assert len(problem.spec.live_taps) == problem.spec.kernel_size

    def fused(self, problem, x, w, bias):
        self.sees(problem)
        self.calls.append(("fused", problem.epilogue.activation))
        assert problem.epilogue.bias == (bias is not None)
        assert (x.shape, w.shape) == (problem.x_shape, problem.w_shape)
        z = xla.run(problem, x, w)
        z = z if bias is None else z + bias[None, None]
        if problem.epilogue.activation is None:
            return self.mark(z)
        y = activations.activate(z, problem.epilogue.activation)
        return (y, z) if problem.epilogue.keep else y

    def backward(self, problem, x, w, bias, saved, gy, wanted):
        self.sees(problem)
        assert w.shape == problem.w_shape
        self.calls.append(("backward", wanted, None if saved is None else saved.shape))
        assert gy.shape == problem.y_shape
        epilogue = problem.epilogue
        z = xla.run(problem, x, w)
        z = z if bias is None else z + bias[None, None]
        if not self.recomputed and self.part:
            z = saved
        elif not self.recomputed and epilogue.saved:
            want = z if epilogue.saved == "z" else activations.activate(z, epilogue.activation)
            # Were it anything else than what is promised, the gradients would be wrong.
            z = jnp.where(jnp.abs(saved - want) < 1e-4, z, jnp.nan)
        gz = jax.vjp(lambda z: activations.activate(z, epilogue.activation), z)[1](gy)[0]
        dx = dataclasses.replace(problem, operation="conv1d_input_grad")
        dw = dataclasses.replace(problem, operation="conv1d_kernel_grad")
        return (
            xla.run(dx, gz, w) if wanted[0] else None,
            xla.run(dw, x, gz) if wanted[1] else None,
            jnp.sum(gz, (0, 1), dtype=jnp.float32) if wanted[2] else None,
        )


def _arrays(case=CASE):
    x, w, g = case.arrays()
    return x, w, np.linspace(-1, 1, case.O, dtype=np.float32), g


def _loss(activation, implementation, case=CASE):
    def f(x, w, b=None):
        y = conv1d(x, w, b, **case.geometry, activation=activation, implementation=implementation)
        return jnp.sum(jnp.sin(y))

    return f


def _by_jax(activation, case=CASE):
    """The same of nothing but `jax.lax` and `jax.nn`."""

    def f(x, w, b=None):
        y = conv1d(x, w, **case.geometry, implementation="xla_native")
        return jnp.sum(jnp.sin(activations.activate(y if b is None else y + b, activation)))

    return f


@pytest.mark.sampled
@pytest.mark.parametrize("how", ["as asked", "recomputes", "keeps"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_a_kernel_that_fuses_carries_a_training_step(activation, how, monkeypatch):
    recomputes = how == "recomputes"
    toy = Toy(monkeypatch, recomputes=recomputes, keeps=how != "as asked")
    x, w, b, _ = _arrays()
    step = jax.jit(jax.value_and_grad(_loss(activation, "toy"), (0, 1, 2)))

    with jax.numpy_rank_promotion("raise"):
        value, grads = step(x, w, b)

    want = jax.value_and_grad(_by_jax(activation), (0, 1, 2))(x, w, b)
    np.testing.assert_allclose(value, want[0], rtol=1e-5)
    for actual, expected in zip(grads, want[1], strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    assert not [c for c in toy.calls if isinstance(c, str)]  # nothing ran by itself
    (backward,) = [c for c in toy.calls if c[0] == "backward"]
    assert backward[1] == (True, True, True)
    assert (backward[2] is None) == (activation is None)
    forwards = [c[1] for c in toy.calls if c[0] == "fused"]
    if ACTIVATIONS.get(activation) != "z" or how == "keeps":
        assert forwards == [activation]
    else:
        assert forwards == ([None, activation] if recomputes else [None])


def test_gradients_have_the_dtypes_of_their_operands(monkeypatch):
    Toy(monkeypatch)
    arrays = [a.astype(jnp.bfloat16) for a in _arrays()[:3]]
    f = lambda *a: _loss("relu", "toy")(*a).astype(jnp.float32)  # noqa: E731
    assert [g.dtype for g in jax.grad(f, (0, 1, 2))(*arrays)] == [jnp.bfloat16] * 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_from_what_was_saved(activation, dtype):
    """As exact as what was saved allows, and finite or not where jax's own are."""
    z = jnp.concatenate([jnp.linspace(-4, 4, 801), jnp.array([0.0, -0.0, 1e4, -1e4, jnp.nan])])
    z = z.astype(dtype)
    saved = activations.activate(z, activation) if ACTIVATIONS[activation] == "y" else z
    actual = activations.times_derivative(jnp.ones_like(z), saved, activation)
    exact = saved.astype(jnp.float32)
    if ACTIVATIONS[activation] == "z":
        want = jax.vmap(jax.grad(activations.FUNCTIONS[activation]))(exact)
    else:
        slope = {"relu": exact > 0, "tanh": 1 - exact**2, "sigmoid": exact * (1 - exact)}
        want = slope[activation].astype(jnp.float32)
    rtol = {"bfloat16": 2.0**-8, "float32": 1e-5}[dtype]
    if activation == "relu":  # of NaN, both say 0
        actual, want = actual[:-1], want[:-1]
    np.testing.assert_allclose(actual.astype(jnp.float32), want, rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("recomputes", [False, True])
def test_what_a_kernel_recomputes_is_not_made(recomputes, monkeypatch):
    """z is there for kernels that read it. Where none does, XLA removes what makes it."""
    toy = Toy(monkeypatch, recomputes=recomputes)
    toy.mark = jnp.ceil  # of z by itself
    x, w, b, g = _arrays()
    f = lambda x, w, b: conv1d(x, w, b, **CASE.geometry, activation="silu", implementation="toy")  # noqa: E731
    step = jax.jit(lambda x, w, b, g: jax.vjp(f, x, w, b)[1](g))
    assert ("ceil(" in step.lower(x, w, b, g).compile().as_text()) == (not recomputes)


@pytest.mark.parametrize(
    "wanted", [w for w in itertools.product((True, False), repeat=3) if any(w)]
)
def test_no_gradient_that_nobody_wants(wanted, monkeypatch):
    toy = Toy(monkeypatch)
    arrays = _arrays()[:3]
    argnums = tuple(i for i in range(3) if wanted[i])

    grads = jax.jit(jax.grad(_loss("tanh", "toy"), argnums))(*arrays)

    want = jax.grad(_by_jax("tanh"), argnums)(*arrays)
    for actual, expected in zip(grads, want, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    asked = [c[1] for c in toy.calls if c[0] == "backward"]
    assert asked == ([wanted] if wanted[0] or wanted[1] else [])


def test_a_kernel_that_declines_to_fuse_still_convolves(monkeypatch):
    toy = Toy(monkeypatch, declines=True)
    x, w, b, _ = _arrays()
    grads = jax.jit(jax.grad(_loss("silu", "toy"), (0, 1, 2)))(x, w, b)
    want = jax.grad(_by_jax("silu"), (0, 1, 2))(x, w, b)
    for actual, expected in zip(grads, want, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    assert set(toy.calls) == set(OPERATIONS)


@pytest.mark.parametrize(
    ("which", "told"),
    [
        (0, r"float32 \(3, 11, 4\) for conv1d_input_grad, got bfloat16 \(3, 11, 4\)"),
        (1, r"float32 \(3, 4, 3\) for conv1d_kernel_grad, got bfloat16 \(3, 4, 3\)"),
        (2, r"float32 \(3,\) for conv1d, got float32 \(1, 3\)"),
        ("fused", r"float32 \(3, 11, 3\) for conv1d, got bfloat16 \(3, 11, 3\)"),
        ("kept", r"float32 \(3, 11, 3\) for conv1d, got bfloat16 \(3, 11, 3\)"),
    ],
)
def test_a_result_that_is_none_of_the_problem_names_the_kernel(which, told, monkeypatch):
    toy = Toy(monkeypatch, keeps=which == "kept")
    x, w, b, _ = _arrays()
    method = "backward" if isinstance(which, int) else "fused"

    def wrong(*args):
        found = getattr(toy, method)(*args)
        if which == "fused":
            return found.astype("bfloat16")
        at = 1 if which == "kept" else which
        other = found[at][None] if which == 2 else found[at].astype("bfloat16")
        return (*found[:at], other, *found[at + 1 :])

    toy.kernel = dataclasses.replace(toy.kernel, **{method: wrong})
    monkeypatch.setattr(kernels, "discover", lambda: ({"toy": toy.kernel}, {}))
    step = jax.grad(_loss("silu", "toy"), (0, 1, 2))
    told = f"^{method} of the implementation 'toy' must return {told}"
    with pytest.raises(TypeError, match=told):
        jax.jit(step).lower(x, w, b)


def test_the_tangent_is_linear_in_each_of_its_operands():
    """One of them transposed while the others are numbers."""
    x, w, b, g = _arrays()
    f = lambda x, w, b: conv1d(x, w, b, **CASE.geometry, activation="silu")  # noqa: E731
    zero = np.zeros_like(w)
    along_bias = lambda db: jax.jvp(f, (x, w, b), (x, zero, db))[1]  # noqa: E731
    (db,) = jax.linear_transpose(along_bias, b)(g)
    want = jax.vjp(f, x, w, b)[1](g)[2]
    np.testing.assert_allclose(db, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("of", ["x", "w"])
def test_the_tangent_is_linear_in_what_it_is_taken_at(of):
    """Of an affine layer, along the other operand: then that is what moves."""
    x, w, b, g = _arrays()
    f = lambda x, w: conv1d(x, w, b, **CASE.geometry)  # noqa: E731
    along = {
        "x": lambda at: jax.jvp(lambda w: f(at, w), (w,), (w,))[1],
        "w": lambda at: jax.jvp(lambda x: f(x, at), (x,), (x,))[1],
    }[of]
    at, index = {"x": (x, 0), "w": (w, 1)}[of]
    (got,) = jax.linear_transpose(along, at)(g)
    want = jax.vjp(lambda x, w: conv1d(x, w, **CASE.geometry), x, w)[1](g)[index]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "tanh"])
def test_what_is_linear_transposes(activation):
    """An affine layer, as the stock one does; and the gradient's map, to the tangent's."""
    x, w, b, g = _arrays()
    f = lambda x: conv1d(x, w, b, **CASE.geometry, activation=activation)  # noqa: E731
    _, backward = jax.vjp(f, x)
    if activation is None:
        (dx,) = jax.linear_transpose(f, x)(g)
        np.testing.assert_allclose(dx, backward(g)[0], rtol=1e-4, atol=1e-5)
    (dy,) = jax.linear_transpose(lambda g: backward(g)[0], g)(x)
    np.testing.assert_allclose(dy, jax.jvp(f, (x,), (x,))[1], rtol=1e-4, atol=1e-5)


def test_what_nobody_reads_is_not_computed(monkeypatch):
    """Not z, where a layer is computed again for its gradient; nor gradients that are dropped."""
    toy = Toy(monkeypatch)
    x, w, b, _ = _arrays()
    jax.jit(jax.value_and_grad(jax.checkpoint(_loss("silu", "toy"))))(x, w, b)
    assert toy.calls[0] == ("fused", "silu")
    toy.calls.clear()
    jax.jit(lambda *a: jax.grad(_loss("silu", "toy"), (0, 1, 2))(*a)[0])(x, w, b)
    assert [c[1] for c in toy.calls if c[0] == "backward"] == [(True, False, False)]


@pytest.mark.parametrize("of, reads", [("x", "w"), ("w", "x"), ("b", "")])
def test_what_one_gradient_does_not_read_is_not_kept(of, reads):
    """Of a layer of which one operand alone is trained: of a frozen kernel's, no x."""
    operands = dict(zip("xwb", _arrays()[:3], strict=True))
    f = lambda a: conv1d(*(operands | {of: a}).values(), **CASE.geometry)  # noqa: E731
    kept = [a.shape for a in jax.tree.leaves(jax.vjp(f, operands[of])[1])]
    assert kept == [operands[name].shape for name in reads]


def test_a_policy_that_saves_convolutions():
    x, w, b, _ = _arrays()
    fuses = lambda x, w, b: jnp.sin(conv1d(x, w, b, activation="silu"))  # noqa: E731
    alone = lambda x, w, b: jnp.sin(conv1d(x, w)) * b  # noqa: E731
    for f in (fuses, alone):

        def saved(policy, f=f):
            residuals = saved_residuals(jax.checkpoint(f, policy=policy), x, w, b)
            return [aval.shape for aval, source in residuals if "argument" not in source]

        assert saved(jax.checkpoint_policies.dots_saveable) == []
        assert saved(convs_saveable)
    stock = lambda x, w: jnp.sin(conv1d(x, w, implementation="xla_native"))  # noqa: E731
    checkpointed = jax.checkpoint(stock, policy=convs_saveable)
    assert any(
        "conv_general_dilated" in source for _, source in saved_residuals(checkpointed, x, w)
    )


def test_strict_promotion():
    x, w, b = (a.astype(jnp.bfloat16) for a in _arrays()[:3])
    with jax.numpy_dtype_promotion("strict"):
        y = conv1d(x, w, b, preferred_element_type=jnp.float32, activation="relu")
    assert y.dtype == jnp.float32


@pytest.mark.sampled
@pytest.mark.parametrize("activation", ["relu", "silu", "tanh"])
def test_modes_and_orders(activation, monkeypatch):
    Toy(monkeypatch)
    x, w, b, _ = _arrays()
    squares = lambda grads: sum(jnp.sum(g**2) for g in grads)  # noqa: E731
    for transform in (
        lambda f: jax.jvp(f, (x, w, b), (x, w, b)),
        lambda f: jax.jvp(jax.grad(f, (0, 1, 2)), (x, w, b), (x, w, b))[1],
        lambda f: jax.grad(lambda *p: squares(jax.grad(f, (0, 1, 2))(*p)))(x, w, b),
        lambda f: jax.jacfwd(jax.grad(f, 2), 2)(x, w, b),
        lambda f: jet.jet(f, (x, w, b), [[a, a * a] for a in (x, w, b)]),
        lambda f: jet.jet(jax.grad(f, (0, 1, 2)), (x, w, b), [[a] for a in (x, w, b)]),
    )[: 4 if activation == "relu" else 6]:  # jet fails for jax.nn.relu itself
        actual = jax.jit(transform, static_argnums=0)(_loss(activation, "toy"))
        want = jax.jit(transform, static_argnums=0)(_by_jax(activation))
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-3)


def test_vmap_keeps_what_is_shared_in_one_call(monkeypatch):
    toy = Toy(monkeypatch)
    x, w, b, _ = _arrays()
    xs = np.stack([x, 2 * x])
    f = jax.vmap(_loss("silu", "toy"), (0, None, None))
    np.testing.assert_allclose(
        jax.jit(f)(xs, w, b), [_by_jax("silu")(x, w, b) for x in xs], rtol=1e-4, atol=1e-4
    )
    assert toy.calls == [("fused", "silu")]
    # Gradients for each member: of x in one call, of the parameters one sum each.
    per_example = jax.vmap(jax.grad(_loss("silu", "toy"), (0, 1, 2)), (0, None, None))
    for i, x in enumerate(xs):
        want = jax.grad(_by_jax("silu"), (0, 1, 2))(x, w, b)
        for actual, expected in zip(jax.jit(per_example)(xs, w, b), want, strict=True):
            np.testing.assert_allclose(actual[i], expected, rtol=1e-4, atol=1e-4)
    toy.calls.clear()
    jax.jit(jax.vmap(jax.grad(_loss("tanh", "toy")), (0, None, None)))(xs, w, b)
    assert [c[0] for c in toy.calls] == ["fused", "backward"]
    # Gradients of the bias alone, for each member.
    alone = jax.vmap(lambda s: jax.grad(lambda b: s * _loss("tanh", "toy")(x, w, b))(b))
    want = jax.grad(lambda b: _by_jax("tanh")(x, w, b))(b)
    np.testing.assert_allclose(alone(np.float32([1, 2]))[1], 2 * want, rtol=1e-4, atol=1e-4)
    # Biases and kernels for each member.
    both = jax.vmap(_loss("silu", "toy"))(xs, np.stack([w, -w]), np.stack([b, b + 1]))
    np.testing.assert_allclose(both[1], _by_jax("silu")(xs[1], -w, b + 1), rtol=1e-4, atol=1e-4)
    only_bias = jax.vmap(_loss("tanh", "toy"), (None, None, 0))(x, w, np.stack([b, b + 1]))
    np.testing.assert_allclose(only_bias[1], _by_jax("tanh")(x, w, b + 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_on_a_mesh_each_device_fuses_its_share(axis_type, monkeypatch):
    toy = Toy(monkeypatch)
    case = dataclasses.replace(CASE, batch=(4,))
    x, w, b, _ = _arrays(case)
    mesh = jax.make_mesh((2,), ("b",), axis_types=(axis_type,))
    split = jax.device_put(x, NamedSharding(mesh, P("b")))
    with jax.set_mesh(mesh):
        grads = jax.jit(jax.grad(_loss("silu", "toy", case), (0, 1, 2)))(split, w, b)
    want = jax.grad(_by_jax("silu", case), (0, 1, 2))(x, w, b)
    for actual, expected in zip(grads, want, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    assert ("backward", (True, True, True), (2, *case.out_shape[1:])) in toy.calls
    assert not [c for c in toy.calls if isinstance(c, str)]


@pytest.mark.sampled
@pytest.mark.parametrize("T, recomputes", [(24, False), (192, False), (192, True)])
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_on_a_mesh_that_splits_time(axis_type, T, recomputes, monkeypatch):
    """A backward kernel runs where a device's part needs mending only, and z is right there."""
    toy = Toy(monkeypatch, recomputes=recomputes, part=True)
    case = dataclasses.replace(CASE, T=T)
    x, w, b, _ = _arrays(case)
    mesh = jax.make_mesh((2,), ("t",), axis_types=(axis_type,))
    split = jax.device_put(x, NamedSharding(mesh, P(None, "t")))
    with jax.set_mesh(mesh):
        grads = jax.jit(jax.grad(_loss("silu", "toy", case), (0, 1, 2)))(split, w, b)
    want = jax.grad(_by_jax("silu", case), (0, 1, 2))(x, w, b)
    for actual, expected in zip(grads, want, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    # What is traced to split it: the call that XLA never takes is of the whole.
    own = (*case.out_shape[:1], T // 2, case.O)
    assert (("backward", (True, True, True), own) in toy.calls) == (T == 192 and not recomputes)
    assert {"conv1d_input_grad", "conv1d_kernel_grad"} <= set(toy.calls)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_no_device_computes_z_anew_of_some_channels(axis_type, monkeypatch):
    """Where channels in are split each device has a part of z only."""
    toy = Toy(monkeypatch, recomputes=True)
    x, w, b, _ = _arrays()
    mesh = jax.make_mesh((2,), ("c",), axis_types=(axis_type,))
    put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))  # noqa: E731
    with jax.set_mesh(mesh):
        grads = jax.jit(jax.grad(_loss("silu", "toy"), (0, 1, 2)))(
            put(x, None, None, "c"), put(w, None, "c"), put(b)
        )
    want = jax.grad(_by_jax("silu"), (0, 1, 2))(x, w, b)
    for actual, expected in zip(grads, want, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    assert toy.calls


def test_on_an_explicit_mesh_with_operands_that_lie_nowhere():
    """Made before the mesh, they have none in their type; what else is in the function may."""
    x, w, b, _ = _arrays(dataclasses.replace(CASE, O=4))
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(b, NamedSharding(mesh, P("b")))
        beside = jax.jit(lambda x, w, b: (conv1d(x, w, activation="relu"), b * 2))(x, w, placed)
        alone = jax.jit(lambda x, w, b: conv1d(x, w, b, activation="silu"))(x, w, placed)
        grad = jax.jit(jax.grad(lambda b: jnp.sum(conv1d(x, w, b, activation="silu"))))(placed)
    np.testing.assert_allclose(beside[0], conv1d(x, w, activation="relu"), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(alone, conv1d(x, w, b, activation="silu"), rtol=1e-5, atol=1e-5)
    want = jax.grad(lambda b: jnp.sum(conv1d(x, w, b, activation="silu")))(b)
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-4)


@pytest.mark.sampled
@pytest.mark.parametrize("padding", ["CAUSAL", "SAME", [(3, 21)]], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_no_kernel_is_given_a_tap_that_sees_padding_alone(bias, padding, monkeypatch):
    """Where the dilation reaches beyond the sequence; `Toy` looks at each problem."""
    toy = Toy(monkeypatch)
    case = dataclasses.replace(CASE, T=7, K=5, D=4, padding=padding)
    operands = _arrays(case)[: 3 if bias else 2]
    live = {"CAUSAL": 2, "SAME": 3, "[(3, 21)]": 3}[str(padding)]
    assert len(case.spec.live_taps) == live < case.K
    activation = "silu" if bias else None  # fused or not

    which = tuple(range(len(operands)))
    got = jax.value_and_grad(_loss(activation, "toy", case), which)(*operands)

    assert bool(toy.calls) and bias == (toy.calls[0] == ("fused", None))
    want = jax.value_and_grad(_by_jax(activation, case), which)(*operands)
    for actual, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    told = explain(*operands[:2], **case.geometry, platform="tpu")
    assert f", {live} taps, " in str(told)


@pytest.mark.parametrize("bias", [False, True])
def test_no_tap_that_sees_a_step(bias, monkeypatch):
    toy = Toy(monkeypatch)
    case = dataclasses.replace(CASE, T=3, K=2, D=2, padding=[(9, -4)])
    operands = _arrays(case)[: 3 if bias else 2]
    activation, which = "silu" if bias else None, tuple(range(len(operands)))
    got = jax.value_and_grad(_loss(activation, "toy", case), which)(*operands)
    want = jax.value_and_grad(_by_jax(activation, case), which)(*operands)
    for actual, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    assert not toy.calls
    explain(*operands[:2], **case.geometry, platform="tpu")


def test_nothing_to_compute(monkeypatch):
    Toy(monkeypatch)
    _, w, b, _ = _arrays()
    x = np.zeros((0, 5, CASE.C), np.float32)
    grads = jax.grad(_loss("silu", "toy"), (0, 1, 2))(x, w, b)
    assert [g.shape for g in grads] == [x.shape, w.shape, b.shape]
    assert not np.any(grads[1]) and not np.any(grads[2])


def test_only_what_can_be_fused_is():
    x, w, b, _ = _arrays()
    names = lambda f, *a: primitives_of(jax.make_jaxpr(f)(*a))  # noqa: E731
    assert "conv1d_fused" in names(lambda x, w, b: conv1d(x, w, b), x, w, b)
    assert "conv1d_fused" in names(lambda x, w: conv1d(x, w, activation="relu"), x, w)
    assert "conv1d_fused" not in names(lambda x, w: conv1d(x, w), x, w)
    plain = names(lambda x, w: conv1d(x, w, activation=jnp.cos), x, w)
    assert "conv1d" in plain and "cos" in plain
    native = names(lambda x, w, b: conv1d(x, w, b, implementation="xla_native"), x, w, b)
    assert "conv1d_fused" not in native


@pytest.mark.usefixtures("shipped")
def test_explain_says_who_computes_the_epilogue(monkeypatch):
    x, w, b, _ = _arrays()
    assert explain(x, w).epilogue is None
    assert explain(x, w, activation=jnp.cos).epilogue is None
    assert explain(x, w, activation="relu").epilogue.startswith("relu: in xla's kernel")
    told = explain(x, w, activation="relu", platform="cuda").epilogue
    assert told.startswith("relu: by XLA (xla: carries none here)")
    Toy(monkeypatch)
    told = explain(x, w, b, activation="relu", implementation="toy")
    assert told.epilogue == "bias and relu: in toy's kernel; their gradients in toy's kernels"
    placed = explain(x, w, b, implementation="toy", out_sharding=P())
    assert placed.epilogue.startswith("bias: by XLA")
    Toy(monkeypatch, declines=True)
    told = explain(x, w, b, implementation="toy")
    assert told.epilogue == "bias: by XLA (toy: no); their gradients by XLA"
