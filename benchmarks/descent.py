"""Passes of a whole network, and how they are checked against stock.

A training step is one of gradient descent whose parameters are donated, as people train: the new
ones lie where the old ones lay, and no gradient outlives the step.

    arguments = arguments_of(network, STEP)
    lowered = jax.jit(step(network, nnx.Conv), donate_argnums=DONATED).lower(*arguments)
    learner = Learner(lowered.compile(), arguments)
    learner()  # as often as one likes
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.baselines import NotApplicableError
from benchmarks.networks import Network
from benchmarks.truth import WrongResultError
from conv_pallas import _measure
from conv_pallas._measure import FORWARD, STOCK
from conv_pallas.dispatch import Implementation
from conv_pallas.nn import Conv

DONATED = (0,)  # of a step's arguments
TOLERANCE = 1e-4  # what two programs may differ by, there being no formula in float64
DRAWS = 5  # inputs, of which one has to agree
FAR = 2e-2  # and none may be farther off


def forward(
    network: Network, conv: type[nnx.Conv] = Conv, implementation: Implementation = None
) -> Callable:
    """``(parameters, x) -> y``."""
    model = network.build(conv=conv, implementation=implementation)
    model.eval()
    graph, _, rest = nnx.split(model, nnx.Param, ...)
    return lambda parameters, x: nnx.merge(graph, parameters, rest)(x)


def step(
    network: Network, conv: type[nnx.Conv] = Conv, implementation: Implementation = None
) -> Callable:
    """``(parameters, x, g, rate) -> loss, parameters``; the loss is ``<g, y>``."""
    run = forward(network, conv, implementation)

    def descend(parameters, x, g, rate):
        loss = lambda parameters: jnp.sum(run(parameters, x) * g)  # noqa: E731
        value, gradients = jax.value_and_grad(loss)(parameters)
        return value, jax.tree.map(lambda p, g: p - rate * g, parameters, gradients)

    return descend


def arguments_of(network: Network, which: str) -> tuple:
    """Of `forward` or `step`: stock's parameters, random arrays, and a rate of nothing.

    At that rate a network stays what it is, however often a step is timed.
    """
    rng = np.random.default_rng(0)
    x, g = (
        jnp.asarray(rng.standard_normal((network.N, network.T, channels), np.float32))
        for channels in (network.C, network.O)
    )
    parameters = nnx.state(network.build(conv=nnx.Conv), nnx.Param)
    return (parameters, x) if which == FORWARD else (parameters, x, g, jnp.float32(0))


class Learner:
    """A call without arguments that takes a step, and gives the parameters.

    Attributes:
      compiled: the step.
    """

    def __init__(self, compiled: jax.stages.Compiled, arguments: tuple):
        self.compiled = compiled
        parameters, *self.rest = arguments
        self.parameters = jax.tree.map(jnp.copy, parameters)

    def __call__(self) -> Any:
        _, self.parameters = self.compiled(self.parameters, *self.rest)
        return self.parameters


def _results(run: Callable, arguments: tuple, draw: int) -> Sequence[np.ndarray]:
    """Outputs, or the loss's gradients: what one step of rate 1 takes from the parameters."""
    parameters, x, *rest = arguments
    if draw:
        x = jax.random.normal(jax.random.key(draw), x.shape, x.dtype)
    if not rest:
        return jax.tree.leaves(run(parameters, x))
    learner = Learner(run, (parameters, x, rest[0], jnp.ones_like(rest[1])))
    before, after = map(jax.tree.leaves, (parameters, learner()))
    return [np.asarray(p) - np.asarray(q) for p, q in zip(before, after, strict=True)]


def verifier(network: Network, which: str, arguments: tuple) -> Callable:
    """``(name, implementation, compiled)`` compares with stock, for several inputs.

    Where a ReLU is given something close to zero, rounding decides what comes back through it,
    and among millions there is one such now and then: gradients in float32, stock's too, are then
    off by more than rounding, up to `FAR`. What computes something else is off for every input,
    or by more than that.
    """
    stock = []

    def verify(name, implementation, compiled):
        if name == STOCK:
            if not all(np.isfinite(a).all() for a in _results(compiled, arguments, 0)):
                raise WrongResultError(f"{network.name}, {which}, {name}: is not finite")
            stock.append(compiled)
            return
        if not stock:
            raise NotApplicableError("there is no stock to compare it with")
        for draw in range(1 if which == FORWARD else DRAWS):
            expected, came = (_results(run, arguments, draw) for run in (*stock, compiled))
            off = _measure.difference(expected, came)
            if off <= TOLERANCE:
                return
            if not off <= FAR:
                break
        raise WrongResultError(
            f"{network.name}, {which}, {name}: off from stock by {off:.2g} of the largest "
            f"element, {TOLERANCE:.2g} is allowed"
        )

    return verify
