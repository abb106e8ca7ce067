"""A batch of kernels: folded into groups, or matmuls."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conv_pallas import conv1d, kernels
from conv_pallas.spec import OPERATIONS


@pytest.fixture
def unmappable(monkeypatch):
    """XLA's formulations under another name, as a kernel that must not be mapped."""
    found, missing = kernels.discover()
    calls = []

    def run(problem, lhs, rhs):
        calls.append(problem)
        assert (
            problem.out_shape
            == jax.eval_shape(lambda a, b: found["xla"].run(problem, a, b), lhs, rhs).shape
        )
        return found["xla"].run(problem, lhs, rhs)

    toy = dataclasses.replace(
        found["xla"], implementation="toy", run=run, priority=None,
        many=lambda problem: None,
    )  # fmt: skip
    monkeypatch.setattr(kernels, "discover", lambda: ({**found, "toy": toy}, missing))
    return calls


@pytest.mark.sampled
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("nested", [False, True])
def test_folding_kernels_into_groups(unmappable, groups, nested):
    V, N, T, C, O, K = 3, 2, 9, 4, 8, 3
    rng = np.random.default_rng(0)
    shape = (2, V) if nested else (V,)
    x = jnp.asarray(rng.normal(size=(*shape, N, T, C)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(*shape, K, C // groups, O)), jnp.float32)

    def loss(implementation):
        def f(x, w):
            y = conv1d(
                x, w, kernel_dilation=2, feature_group_count=groups, implementation=implementation
            )
            return jnp.sin(y).sum(), y

        return jax.grad(f, (0, 1), has_aux=True)

    def mapped(f):
        return jax.jit(jax.vmap(jax.vmap(f)) if nested else jax.vmap(f))

    got = mapped(loss("toy"))(x, w)
    want = mapped(loss("xla_native"))(x, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)
    kernels_at_once = int(np.prod(shape))
    assert {p.spec.groups for p in unmappable} == {groups * kernels_at_once}
    assert {p.operation for p in unmappable} == set(OPERATIONS)


def test_a_kernel_gradient_for_each_example_is_matmuls_on_a_cpu():
    """Convolutions of groups take several times as long."""
    x, w = jnp.zeros((16, 1, 512, 32)), jnp.zeros((3, 32, 32))
    xla = functools.partial(conv1d, implementation="xla")
    per_example = jax.vmap(jax.grad(lambda w, x: jnp.sum(jnp.sin(xla(x, w)))), (None, 0))
    hlo = jax.jit(per_example).lower(w, x).as_text()
    assert hlo.count("dot_general") == 3  # a tap each
    assert "batch_group_count = 1 : i64, feature_group_count = 16" not in hlo
