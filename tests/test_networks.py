"""Whole networks in the benchmarks: what their costs count, and what a step is held to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import descent, harness, layers
from benchmarks.baselines import NotApplicableError
from benchmarks.networks import STACKS, Separator, Stack
from benchmarks.truth import WrongResultError
from conv_pallas._measure import FORWARD, OURS, STEP, STOCK, Settings

pytestmark = pytest.mark.usefixtures("hardly_optimized")

TCN = Stack("small/stack", "no model", 2, 24, 3, 4, 3, 8, 2)
SEPARATOR = Separator("small/stack", "no model", 2, 24, 4, 4, 3, 8, 2)
BRIEF = Settings(least=1e-4, rounds=(3, 3), limit=0.1)


@pytest.mark.parametrize("network", STACKS, ids=lambda network: network.model)
def test_its_costs_count_its_convolutions(network):
    network = dataclasses.replace(network, T=16)
    state = jax.eval_shape(lambda: nnx.state(network.build(), nnx.Param))
    found = [p.shape for p in jax.tree.leaves(state) if p.ndim == 3]
    counted = [(la.K, la.C // la.G, la.O) for la in network.layers()]
    assert sorted(found) == sorted(counted)


@pytest.mark.parametrize("network", STACKS, ids=lambda network: network.model)
def test_it_is_cut_by_the_products_of_all_its_layers(network):
    def products(N):
        return sum(layer.products for layer in dataclasses.replace(network, N=N).layers())

    most = layers.STACK * layers.MOST_ON_CPU
    fitted = layers.fit(network, "cpu")
    assert fitted == dataclasses.replace(network, N=fitted.N)
    assert products(fitted.N) <= most
    assert fitted.N == network.N or products(2 * fitted.N) > most  # and no further
    assert layers.fit(network, "gpu") is network


@pytest.mark.sampled
@pytest.mark.parametrize("network", [TCN, SEPARATOR], ids=lambda network: type(network).__name__)
def test_a_step_descends_in_place(network):
    parameters, x, g, rate = descent.arguments_of(network, STEP)
    assert rate == 0
    rate = jnp.float32(1e-3)
    step = jax.jit(descent.step(network), donate_argnums=descent.DONATED)
    compiled = step.lower(parameters, x, g, rate).compile()
    loss = lambda p: jnp.vdot(descent.forward(network)(p, x), g)  # noqa: E731
    value, gradients = jax.jit(jax.value_and_grad(loss))(parameters)
    learner = descent.Learner(compiled, (parameters, x, g, rate))
    given = [p.unsafe_buffer_pointer() for p in jax.tree.leaves(learner.parameters)]
    found = learner()
    assert [p.unsafe_buffer_pointer() for p in jax.tree.leaves(found)] == given
    expected = jax.tree.map(lambda p, dp: np.asarray(p) - 1e-3 * np.asarray(dp), parameters,
                            gradients)  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), expected,
                 found)  # fmt: skip
    second, _ = compiled(learner.parameters, x, g, rate)
    assert second < value


@pytest.mark.sampled
@pytest.mark.parametrize("which", [FORWARD, STEP])
@pytest.mark.parametrize("network", [TCN, SEPARATOR], ids=lambda network: type(network).__name__)
def test_stock_and_ours_are_timed(network, which):
    m = harness.measure(network, which, settings=BRIEF)
    assert set(m.timed) == {STOCK, OURS} and m.inside >= 1
    for variant in m.variants.values():
        assert variant.checked == "against stock" and not variant.refused
        memory = variant.memory
        everything = sum(memory[k] for k in ("arguments", "results", "temporaries"))
        # What is donated is there once.
        assert memory["peak"] < everything if which == STEP else memory["peak"] == everything


@pytest.mark.parametrize("which", [FORWARD, STEP])
def test_what_computes_something_else_is_refused(which, monkeypatch):
    """Were the parameters compared as they are, a step of no rate would hide any gradient."""
    make = descent.forward if which == FORWARD else descent.step

    def wrong(network, conv, order):
        right = make(network, conv, order)
        if conv is nnx.Conv:
            return right
        return lambda parameters, x, *rest: right(parameters, 1.01 * x, *rest)

    monkeypatch.setattr(descent, make.__name__, wrong)
    ours = harness.measure(TCN, which, settings=BRIEF).variants[OURS]
    assert ours.refused and "off from stock" in ours.reason and not ours.seconds


def test_a_step_may_part_with_stock_for_one_input_but_not_far():
    timed, g, rate = jnp.arange(8.0).reshape(1, 4, 2), jnp.ones((1, 4, 2)), jnp.float32(0)
    arguments = ({"w": jnp.ones((1, 4, 2))}, timed, g, rate)

    def verify(*variants):
        check = descent.verifier(TCN, STEP, arguments)
        for name, factor in zip((STOCK, OURS), variants, strict=False):
            check(name, None, lambda p, x, g, rate, factor=factor: (
                0.0, {"w": p["w"] - rate * factor(x) * x}
            ))  # fmt: skip

    once = lambda far: lambda x: 1.0 + (far if bool((x == timed).all()) else 0.0)  # noqa: E731
    right = lambda x: 1.0  # noqa: E731
    verify(right, right)
    verify(right, once(5e-3))  # a ReLU whose sign was in doubt
    for wrong in (lambda x: 1.001, once(6.0), once(float("nan"))):
        with pytest.raises(WrongResultError, match="off from stock"):
            verify(right, wrong)
    with pytest.raises(WrongResultError, match="is not finite"):
        verify(once(float("nan")))
    with pytest.raises(NotApplicableError, match="no stock"):
        descent.verifier(TCN, STEP, arguments)(OURS, None, None)
