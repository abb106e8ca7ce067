"""Times implementations of a layer against each other, so that the ratio can be trusted.

The variants take turns, each time in another order, so that whatever else the machine does slows
all of them, and the ratio is taken turn by turn. Before anything is timed, they must agree.
"""

import dataclasses
import datetime
import math
import platform
import random
import re
import statistics
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from flax import nnx

import conv_pallas
from conv_pallas import _host
from conv_pallas._layers import Layer
from conv_pallas.dispatch import Implementation
from conv_pallas.explanation import default_platform
from conv_pallas.nn import Conv

FORWARD = "forward"
STEP = "training step"
PASSES = (FORWARD, STEP)

STOCK = "stock"
OURS = "conv_pallas"


class DisagreementError(RuntimeError):
    """Two implementations of a layer don't compute the same."""


@dataclasses.dataclass(frozen=True, slots=True)
class Spread:
    """The median of some values and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values) -> "Spread":
        values = list(values)
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def over(self, runs: int) -> "Spread":
        """Of one of so many runs that were measured at once."""
        return Spread(*(value / runs for value in dataclasses.astuple(self)))

    @property
    def width(self) -> float:
        """Between the quartiles, relative to the median."""
        return (self.high - self.low) / self.median


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How much time to spend on one comparison.

    Attributes:
      least: seconds that one sample lasts at least; the call is repeated to fill them.
      rounds: the fewest and the most samples of each variant. In between it stops once the
        median ratio is known to ``settled``, relatively.
      limit: seconds after which it stops, though never before ``sure`` rounds. A variant of which
        one call takes longer, and far longer than another's, takes part in one round only.
      hopeless: variants that take so many times longer than the fastest one take part in
        three rounds only, and leave the time to those that are close.
      sure: rounds that are made however long they take, three at least. Where a hopeless variant
        took up the limit, three would be all that those which are close get.
    """

    least: float = 0.02
    rounds: tuple[int, int] = (9, 31)
    settled: float = 0.015
    limit: float = 5.0
    hopeless: float = math.inf
    sure: int = 3


QUICK = Settings(least=0.005, rounds=(5, 9), settled=0.03, limit=1.0)
# Of a GPU: long enough for its clock to be what it is in the long run.
DEVICE = Settings(least=0.02, rounds=(5, 9), settled=0.03, limit=1.5, hopeless=4.0)


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    settings: Settings | None = None,
    each_round: Callable[[], Any] | None = None,
) -> dict[str, tuple[float, ...]]:
    """Seconds a call of each variant takes, one entry for each round that it took part in.

    Args:
      calls: compiled functions without arguments; the first is what the others are compared to.
      each_round: called at the beginning of each round. A variant that leaves does so for good, so
        that its first entry is always of the first round.
    """
    settings = settings or Settings()
    # On a CPU the next call must not start before the last has ended, or both share the cores.
    # On an accelerator calls queue up, so that the host's part in them does not count.
    wait_each = default_platform() == "cpu"

    def sample(call, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            out = call()
            if wait_each:
                jax.block_until_ready(out)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / repeats

    repeats, alone = {}, {}
    start = time.perf_counter()
    for name, call in calls.items():
        first = sample(call, 1)
        once = first if first > settings.limit / 20 else min(sample(call, 1) for _ in range(3))
        repeats[name] = max(1, math.ceil(settings.least / once))
        alone[name] = once
    times, order = {name: [] for name in calls}, random.Random(0)
    names = list(calls)
    most = max(settings.limit, settings.hopeless * min(alone.values()))
    once_only = {name for name, once in alone.items() if once > most}
    for turn in range(settings.rounds[1]):
        if turn >= settings.sure and time.perf_counter() - start > settings.limit:
            break
        if turn == 1:
            names = [name for name in names if name not in once_only]
        if turn == 3 and len(names) > 2:
            best = {name: statistics.median(times[name]) for name in names}
            most = settings.hopeless * min(best.values())
            names = [name for name in names if best[name] <= most]
        if turn >= settings.rounds[0]:
            base = times[names[0]]
            spreads = [ratio(base, times[name]).width for name in names[1:]]
            # The median of n values is known to about their spread over the root of n.
            if all(width / math.sqrt(turn) < settings.settled for width in spreads):
                break
        if each_round:
            each_round()
        # Who follows whom must not matter: the order differs from turn to turn, and each variant
        # has one call to find its memory and the cores' clock as it leaves them itself.
        for name in order.sample(names, len(names)):
            jax.block_until_ready(calls[name]())
            times[name].append(sample(calls[name], repeats[name]))
    return {name: tuple(t) for name, t in times.items()}


def ratio(base, other) -> Spread:
    """How many times faster ``other`` is than ``base``, round by round.

    Of two that took part in different numbers of rounds those count that both were in.
    """
    return Spread.of(b / o for b, o in zip(base, other, strict=False))


# --- short calls ----------------------------------------------------------------------------------

# Seconds. A call that lasts longer hides the part of the host in the next, as an estimate.
LONG = 4e-4
# Below what any layer can take: operations and bytes a second of the fastest GPU at hand.
OPERATIONS, BYTES = 1e15, 5e12
MOST_TAPS = 128  # in one program: of a matmul for each XLA compiles no more in seconds


def runs_in_a_call(operations: float, bytes_: float, taps: int) -> int:
    """How many runs of a program belong into one call, for the device alone to be timed.

    No more than 8: each is compiled, which for some gradients takes seconds; of many taps fewer.
    """
    runs = math.ceil(LONG / max(operations / OPERATIONS, bytes_ / BYTES))
    return max(1, min(8, MOST_TAPS // taps, runs))


def several(function: Callable) -> Callable:
    """Runs a function on each of several arguments, one after the other, as one program.

    A parameter becomes a list, of as many arrays as there are to be runs, or stays the one array
    that each of them takes: an array more that a program is given is more for the host to do.
    """

    def run(*given):
        count = _runs(given)
        lists = [a if isinstance(a, list) else [a] * count for a in given]
        outs = []
        for arguments in zip(*lists, strict=True):
            if outs:  # else XLA might run them side by side, or take two for the same
                arguments, outs[-1] = jax.lax.optimization_barrier((arguments, outs[-1]))
            outs.append(function(*arguments))
        return outs

    return run


def lower(function: Callable, arguments: tuple) -> jax.stages.Lowered:
    """One program of as many runs as there are arguments, for `InPlace`.

    Args:
      arguments: arrays or structs, as `several` takes them.
    """
    run = several(function)
    one = jax.eval_shape(function, *(a[0] if isinstance(a, list) else a for a in arguments))
    over = jax.jit(lambda into, *given: run(*given), donate_argnums=0, keep_unused=True)
    return over.lower([one] * _runs(arguments), *arguments)


def _runs(arguments: tuple) -> int:
    """How many runs arguments of `several` are for."""
    return next(len(a) for a in arguments if isinstance(a, list))


class InPlace:
    """A call that writes over what it gave the last time.

    So what it gives lies where it lay, as the state does that a training step is donated. A graph
    of launches that XLA makes holds addresses, and the host builds part of it anew for others: with
    fresh memory for each result some short programs took half as long again on an H200's host
    (benchmarks/results/nvidia-h200, layers-third.jsonl and layers.jsonl).

    Attributes:
      compiled: from `lower`.
    """

    def __init__(self, compiled: jax.stages.Compiled, arguments: tuple):
        self.compiled, self.arguments = compiled, arguments
        self.last = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), compiled.out_info)

    def __call__(self) -> Any:
        self.last = self.compiled(self.last, *self.arguments)
        return self.last


# Bytes that a program may hold beside what it is given and gives, or twice as many as those.
HELD = 1 << 26


def held(compiled: jax.stages.Compiled) -> int:
    """Bytes that a program holds, if they are too many; else 0."""
    memory = compiled.memory_analysis()
    arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes
    held = memory.temp_size_in_bytes
    return held if held > max(HELD, 2 * arrays) else 0


def rolled(a: jax.Array, count: int) -> list[jax.Array]:
    """An array and others with its values at other steps, of which no two are computed as one."""
    return [a, *(jnp.roll(a, i, axis=-2) for i in range(1, count))]


@jax.jit
def difference_there(expected, actual) -> jax.Array:
    """As `difference`, computed in float32 where the arrays are."""

    def off(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.abs(a - b).max() / jnp.maximum(jnp.abs(a).max(), jnp.finfo(jnp.float32).tiny)

    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True)
    return jnp.stack([off(a, b) for a, b in pairs]).max()


# --- a layer -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """A compiled pass of a layer with its arguments.

    Attributes:
      text: the compiled program without names: where two are equal, the machine does the same.
    """

    compiled: Any
    arguments: tuple
    text: str

    def __call__(self):
        return self.compiled(*self.arguments)


def inputs(layer: Layer, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """x, and an output gradient g."""
    rng = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(rng.standard_normal(shape, np.float32), layer.dtype)
        for shape in (layer.x_shape, layer.y_shape)
    )


def prepare(layer: Layer, which: str, module: nnx.Conv, x: jax.Array, g: jax.Array) -> Program:
    """Compiles a pass of ``module``, which `Layer.build` made.

    The training step gives the loss and its gradients by the parameters and by x. The loss is
    ``<g, y>``: it costs one pass over y, and hands g to the layer as the layers above would.
    """
    graph, params = nnx.split(module, nnx.Param)

    def forward(params, x):
        return layer.activate(nnx.merge(graph, params)(x))

    def loss(params, x, g):
        return jnp.sum(forward(params, x).astype(jnp.float32) * g.astype(jnp.float32))

    if which == FORWARD:
        function, arguments = forward, (params, x)
    else:
        function, arguments = jax.value_and_grad(loss, argnums=(0, 1)), (params, x, g)
    compiled = jax.jit(function).lower(*arguments).compile()
    return Program(compiled, arguments, anonymous(compiled.as_text()))


def anonymous(text: str) -> str:
    """Compiled HLO without names, and what else tells where in the source an operation is from."""
    text = re.sub(r"\nFileNames\n.*?\n\n\n", "\n", text, count=1, flags=re.DOTALL)
    text = re.sub(r", metadata=\{[^}]*\}", "", text)
    text = re.sub(r'fingerprint_\w+="\w+"', "", text)  # for GPUs: of what it was before
    text = re.sub(r"[\w.-]+: (?=\(|\w+\[)", "", text)  # the parameters in a computation's head
    numbers: dict[str, str] = {}
    return re.sub(r"%[\w.-]+", lambda m: numbers.setdefault(m[0], f"%{len(numbers)}"), text)


@dataclasses.dataclass(frozen=True, slots=True)
class Measurement:
    """One pass of one layer, stock against ours.

    Attributes:
      layer: as it was measured; see `conv_pallas._layers.fit`.
      seconds: for each variant, a call's time in every round.
      identical: whether both compiled to the same program; their ratio then shows the noise.
    """

    layer: Layer
    which: str
    seconds: dict[str, tuple[float, ...]]
    identical: bool

    @property
    def speedup(self) -> Spread:
        return ratio(self.seconds[STOCK], self.seconds[OURS])

    def time(self, variant: str) -> Spread:
        return Spread.of(self.seconds[variant])


def variants(layer: Layer, implementation: Implementation = None) -> dict[str, nnx.Conv]:
    """The stock layer and ours, with equal parameters."""
    return {STOCK: layer.build(nnx.Conv), OURS: layer.build(Conv, implementation=implementation)}


def compare(
    layer: Layer,
    which: str,
    *,
    implementation: Implementation = None,
    settings: Settings | None = None,
) -> Measurement:
    """Measures one pass of a layer, stock and ours.

    Raises:
      DisagreementError: the two don't compute the same.
      NotImplementedError: ``implementation`` can't run this layer here.
    """
    x, g = inputs(layer)
    programs = {
        name: prepare(layer, which, module, x, g)
        for name, module in variants(layer, implementation).items()
    }
    results = [programs[name]() for name in (STOCK, OURS)]
    if which == STEP:  # the loss is a sum in which terms cancel, and y is compared by itself
        results = [gradients for _, gradients in results]
    off = difference(*results)
    if not off <= tolerance(layer):
        raise DisagreementError(
            f"{layer.name}, {which}: ours is off by {off:.2g} of the largest element, "
            f"{tolerance(layer):.2g} is allowed"
        )
    identical = programs[STOCK].text == programs[OURS].text
    return Measurement(layer, which, interleaved(programs, settings), identical)


def difference(expected, actual) -> float:
    """The largest difference in any array of two trees, relative to its largest element."""

    def off(a, b):
        a, b = (np.asarray(v).astype(np.float64) for v in (a, b))
        return np.abs(a - b).max() / max(np.abs(a).max(), np.finfo(np.float32).tiny)

    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True)
    # Not max(), which would lose a NaN.
    return float(np.max([off(a, b) for a, b in pairs]))


def tolerance(layer: Layer) -> float:
    """How far two correct results may be apart, relative to the largest element."""
    if layer.dtype == "bfloat16":
        return 3e-2
    # Off a CPU, float32 products are rounded to tf32 or bfloat16 unless told otherwise.
    return {"cpu": 1e-4, "gpu": 5e-3}.get(jax.default_backend(), 3e-2)


# --- telling -------------------------------------------------------------------------------------


def versions(*packages: types.ModuleType) -> dict[str, str]:
    """Of this package, of JAX and of others."""
    everything = (conv_pallas, jax, *packages)
    return {package.__name__: package.__version__ for package in everything}


def host() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "cpu": _host.processor(),
        "cores": _host.cores(),
        "vectors": _host.vectors(),
        "system": platform.system(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "numpy": np.__version__,
        "conv_pallas": conv_pallas.__version__,
    }
