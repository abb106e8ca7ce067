"""Measures on the CPU at hand which formulation of a convolution is the fastest.

What `tuning.tune` does there. Each operation's formulations take turns. The fastest then has to win
again where it is to run, in the layer's forward pass or training step with its bias and activation:
one that XLA can't fuse with those, or that leaves less in the caches for what follows, may be the
fastest alone and lose there.

What counts is the machine as it is meanwhile. Where a host moves a virtual machine's cores, what
won with the cores together may lose while they lie apart (`benchmarks.handoff`).
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from conv_pallas import _measure, _neighbours
from conv_pallas.kernels import records, xla, xla_cpu, xla_tuned
from conv_pallas.kernels.xla_candidates import candidates
from conv_pallas.kernels.xla_cpu_bounds import sound
from conv_pallas.spec import OPERATIONS, Problem
from conv_pallas.tracing import Convolution

NAMES = dict(zip(OPERATIONS, ("forward", "input gradient", "kernel gradient"), strict=True))
ALL = _measure.Settings(least=0.005, rounds=(7, 15), settled=0.02, limit=1.5, hopeless=1.2)
TWO = _measure.Settings(least=0.005, rounds=(9, 21), settled=0.01, limit=1.0)
QUICK = dataclasses.replace(ALL, rounds=(3, 5), limit=0.5)
ONCE = _measure.Settings(least=0, rounds=(3, 3), limit=0.5)
SLOW = 2.0  # times as long as the rules' choice, and a formulation takes no part
SHARE = 0.7  # of the time, for all formulations; what is left is for the winners


@dataclasses.dataclass
class _Race:
    """An operation, and which formulation won.

    Attributes:
      rule: the formulation that the rules choose.
      winner: that which is the fastest alone.
      seconds: of both, alone.
    """

    convolution: Convolution
    problem: Problem
    rule: str
    winner: str | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return NAMES[self.problem.operation]


def tune(
    convolutions: Iterable[Convolution],
    file: Path | None,
    seconds: float,
    report: Callable[[str], None],
    quick: bool,
) -> dict[str, str]:
    """As `tuning.tune`, of convolutions. Returns of each key the formulation that was kept."""
    file = xla_tuned.RECORDS["cpu"].file_of(xla_tuned.kind("cpu")) if file is None else file
    xla_tuned.RECORDS["cpu"].read(file)  # which fails before anything is measured
    start, found, told, watch = time.monotonic(), {}, None, _neighbours.Watch()
    convolutions = list(convolutions)
    races = list(_races(convolutions, report))
    if convolutions and not races:
        report("there is nothing to tune")
    left, layers = [], list(dict.fromkeys(race.convolution for race in races))
    for race in races:
        if race.convolution is not told:
            told = race.convolution
            report(f"{told}, {layers.index(told) + 1} of {len(layers)}:")
        if time.monotonic() - start > SHARE * seconds:
            report(f"{race.name}: no time left")
            continue
        times = _times(race, QUICK if quick else ALL, report)
        race.seconds = {name: _measure.Spread.of(of).median for name, of in times.items()}
        for name, median in race.seconds.items():
            report(f"{race.name} {name}: {1e6 * median:.1f} us")
        race.winner = min(race.seconds, key=race.seconds.get)
        if _clearly(times, race):
            left.append(race)
        else:
            _keep(race, None, file, report)
    for race in left:
        if time.monotonic() - start > seconds:
            report(f"{race.name} of {race.convolution}: no time to see {race.winner} win again")
            continue
        won = _clearly(_in_layer(race, found), race)
        _keep(race, won, file, report)
        if won:
            found[xla_tuned.key(race.problem)] = race.winner
    if races:
        report(f"{len(found)} of {len(races)} operations run otherwise than by the rules: {file}")
        if _neighbours.disturbed(others := watch.taken()):
            report(
                f"other programs took {others:.1f} cores meanwhile, and what won beside them may "
                "not be the fastest without: tune again while they rest"
            )
    return found


def _races(convolutions, report) -> Iterator[_Race]:
    """The operations of all convolutions, each once."""
    seen = set()
    for convolution in convolutions:
        for operation in OPERATIONS:
            problem = convolution.problem(operation, "cpu")
            if convolution.kernels > 1 and problem.spec.groups == convolution.spec.groups:
                report(f"{NAMES[operation]} of {convolution}: runs as batched matmuls")
            elif not problem.empty and (key := xla_tuned.key(problem)) not in seen:
                seen.add(key)
                yield _Race(convolution, problem, xla_cpu.choose(problem))


def _times(race: _Race, settings, report) -> dict[str, tuple[float, ...]]:
    """Seconds of each formulation that works, of which those of the rules are the first."""
    problem, calls, expected, limit = race.problem, {}, None, math.inf
    arrays = _operands(problem)
    for name in candidates(problem, race.rule):
        if name != race.rule and not sound(name, problem):
            continue
        lowered = jax.jit(functools.partial(xla.run_as, name, problem)).lower(*arrays)
        try:
            compiled = lowered.compile()
            if name != race.rule and (held := _measure.held(compiled)):
                report(f"{race.name} {name}: holds {held / 2**20:.0f} MiB")
                continue
            call = functools.partial(compiled, *arrays)
            begun = time.perf_counter()
            result = np.asarray(call())
            first = time.perf_counter() - begun  # with memory that it has not had before
        except jax.errors.JaxRuntimeError as e:  # for want of memory, say
            if name == race.rule:
                raise
            report(f"{race.name} {name}: {e}")
            continue
        if first > 4 * limit:
            continue
        (once,) = _measure.interleaved({name: call}, ONCE).values()
        if expected is None:
            expected, limit = result, SLOW * min(once)
        elif min(once) > limit:
            continue
        elif not (off := _measure.difference(expected, result)) <= _tolerance(problem):
            report(f"{race.name} {name}: is off by {off:.2g} of the largest element")
            continue
        calls[name] = call
    return _measure.interleaved(calls, settings)


def _in_layer(race: _Race, kept: dict[str, str]) -> dict[str, tuple[float, ...]]:
    """Seconds of the forward pass, or the training step, by the rules and with the winner.

    Args:
      kept: of each key the formulation that has won already.
    """
    one = race.convolution
    one = one.in_groups() if one.kernels > 1 else one
    layer = one.layer("xla", one.epilogue.activation)
    bias = jnp.zeros(one.w.shape[-1], one.x.dtype) if one.epilogue.bias else None
    x, w = (_random(a.shape, a.dtype) for a in (one.x, one.w))

    def forward(x, w, bias, g):
        return layer(x, w, bias)

    def step(x, w, bias, g):
        y, gradients = jax.vjp(layer, x, w, bias)
        return y, gradients(g)

    y = jax.eval_shape(layer, x, w, bias)
    function = forward if race.problem.operation == "conv1d" else step
    calls, key = {}, xla_tuned.key(race.problem)
    for name, chosen in {race.rule: kept, race.winner: kept | {key: race.winner}}.items():
        with xla_tuned.trial(chosen):  # and a function of its own, lest JAX take what it has
            arrays = (x, w, bias, _random(y.shape, y.dtype))
            compiled = jax.jit(lambda *a: function(*a)).lower(*arrays).compile()
        calls[name] = functools.partial(compiled, *arrays)
    return _measure.interleaved(calls, TWO)


def _operands(problem: Problem) -> tuple[jax.Array, jax.Array]:
    types = (problem.lhs_dtype, problem.rhs_dtype)
    return tuple(map(_random, problem.shapes[:2], types))


def _random(shape, dtype) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32), dtype)


def _tolerance(problem: Problem) -> float:
    """How far two right results may be apart, relative to the largest element."""
    dtype = np.dtype(problem.out_dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        return 0.0
    return {2: 2 * float(jnp.finfo(dtype).eps), 4: 1e-4}.get(dtype.itemsize, 1e-10)


def _clearly(times, race: _Race) -> bool:
    """Whether the winner is clearly faster than what the rules choose, in most rounds."""
    ratio = _measure.ratio(times[race.rule], times[race.winner])
    return ratio.low > 1 and ratio.median * records.CLEARLY > 1


def _keep(race: _Race, won: bool | None, file: Path, report) -> None:
    """Writes what came of a race; ``won`` is None where the winner was not seen in the layer."""
    kept = race.winner if won else race.rule
    seconds = (race.seconds[kept], race.seconds[race.rule])
    entry = xla_tuned.raced(race.rule, kept if won else None, *seconds)
    key, kind = xla_tuned.key(race.problem), xla_tuned.kind("cpu")
    xla_tuned.RECORDS["cpu"].add(file, kind, {"formulations": {key: entry | _measure.versions()}})
    records.forget()
    ratio = race.seconds[race.rule] / race.seconds[kept]
    told = f"{ratio:.2f} times as fast as {race.rule}" if won else "the rules' choice"
    if not won and race.winner != race.rule:
        where = "" if won is None else " in the layer"
        told += f"; {race.winner} is not clearly faster{where}"
    report(f"{race.name} of {race.convolution}: {kept}, {told}")
