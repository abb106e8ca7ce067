"""Times programs of one operation of a layer against each other, on the device at hand.

They take turns. What is known first is told first: a GPU's compiler may take a minute for some of
the programs that ours is compared with.
"""

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax

from benchmarks import baselines, device_layers
from benchmarks.on_device import Log
from conv_pallas import _measure, _trace, inspection
from conv_pallas._layers import Layer

FIRST = 0.3  # seconds for what is sure to be quick, before the others are compiled
# Times as long as the fastest, and seconds: of what takes longer than both no trace is taken. Of
# the shorter ones the host may have taken most of the time.
CLOSE, SHORT = 4, 2e-4
HOPELESS = 0.5  # seconds of a call that a baseline may last to be called again


def settings(dry: bool) -> _measure.Settings:
    return _measure.Settings(0, (2, 2)) if dry else _measure.DEVICE


def runs_of(layer: Layer) -> int:
    """How many runs of a program of the layer belong into one call."""
    x, _, _, g = inspection.structs(layer)
    bytes_ = sum(a.size * a.dtype.itemsize for a in (x, g))
    return _measure.runs_in_a_call(2 * layer.products, bytes_, layer.K)


def warm(call: Callable, dry: bool) -> None:
    """Keeps the device at work until its clock has settled."""
    end = time.perf_counter() + (0 if dry else 0.2)
    while time.perf_counter() < end:
        jax.block_until_ready(call())


@dataclasses.dataclass
class Timed:
    """What is known of the programs of one operation of a layer.

    Attributes:
      seconds: of each that can run.
      device_seconds: the part of those in which the device is at work, of those that are close.
      errors: why the others can't.
      same_as: for one that is the program of another before it, that one; it has its seconds.
        What XLA's autotuner chose for it is luck, as that measures algorithms which are close.
      off: how far ours, and what is chosen by default, are off from XLA's, where they are there.
    """

    seconds: dict[str, _measure.Spread] = dataclasses.field(default_factory=dict)
    device_seconds: dict[str, _measure.Spread] = dataclasses.field(default_factory=dict)
    errors: dict[str, str] = dataclasses.field(default_factory=dict)
    same_as: dict[str, str] = dataclasses.field(default_factory=dict)
    off: float | None = None

    @contextlib.contextmanager
    def tried(self, name: str) -> Iterator[None]:
        """Within it what goes wrong is told: cuDNN has no algorithm for some of the baselines."""
        try:
            yield
        except baselines.NotApplicableError as e:
            self.errors[name] = str(e)
        except Exception as e:
            self.errors[name] = f"{type(e).__name__}: {e}"[:300]

    def told(self) -> dict:
        told = dict(seconds=_told(self.seconds), errors=self.errors)
        if self.device_seconds:
            told["device_seconds"] = _told(self.device_seconds)
        return told | ({"same_as": self.same_as} if self.same_as else {})


def _told(seconds: dict[str, _measure.Spread]) -> dict[str, dict[str, float]]:
    return {name: dataclasses.asdict(spread) for name, spread in seconds.items()}


def timed(
    log: Log, programs: dict[str, Callable], layer: Layer, dry: bool, sure=("ours", "xla")
) -> Iterator[Timed]:
    """Times each program that can run, and each that lowers to the same only once.

    One call runs a program several times, each on other x and g, and calls queue up: so of the
    host's part only what grows with the program counts. What all of those hold together is more
    than an L2 cache where a layer is large; small ones find theirs there, as do the baselines.

    Args:
      programs: makers of functions of x, kernel, bias and g.
      sure: the names of those that come first, and are sure to be quick.

    Yields:
      What is known of those, and then of all: to compile one of the others may take longer than
      there is time.
    """
    x, w, b, g = device_layers.arrays(layer)
    runs = 2 if dry else runs_of(layer)
    arguments = (_measure.rolled(x, runs), w, b, _measure.rolled(g, runs))
    found, lowered = _lowered(programs, arguments)
    # What XLA times as it compiles, it times alone.
    with ThreadPoolExecutor(len(programs)) as pool:
        made = {name: pool.submit(lowered.pop(name).compile) for name in sure if name in lowered}
        calls = {}
        for name, program in made.items():
            with found.tried(name):
                calls[name] = _ran(_measure.InPlace(program.result(), arguments))
        checked = [name for name in ("xla", "ours", device_layers.DEFAULT) if name in sure]
        ran = [calls.get(found.same_as.get(name, name)) for name in checked]
        if len(ran) > 1 and all(ran):
            found.off = _off(*ran)
        # Briefly, if the others are to take part as well.
        _take_turns(found, calls, runs, dry, limit=FIRST if lowered else None)
        yield found
        if not lowered:
            return
        if log.out_of_time():
            found.errors |= dict.fromkeys(lowered, "no time")
        else:
            calls |= _those_that_last(found, programs, lowered, arguments, pool)
    _take_turns(found, _that_differ(found, calls), runs, dry)
    yield found


def _off(xla: Callable, *others: Callable) -> float:
    expected = xla()
    # XLA's is called once: the second call would write over what the first gave.
    there = (expected if call is xla else call() for call in others)
    return max(float(_measure.difference_there(expected, actual)) for actual in there)


def _those_that_last(
    found: Timed, programs: dict[str, Callable], lowered: dict[str, jax.stages.Lowered],
    arguments: tuple, pool: ThreadPoolExecutor,
) -> dict[str, Callable]:  # fmt: skip
    """Those whose calls are short enough to be repeated; of the others a run is timed."""
    # One tells whether it is worth while to compile several.
    runs, once = len(arguments[0]), tuple(a[:1] if isinstance(a, list) else a for a in arguments)

    def compiled(name):
        if runs == 1:
            return lowered[name].compile()
        return _measure.lower(programs[name](), once).compile()

    made = {name: pool.submit(compiled, name) for name in lowered}
    single = {}
    for name, program in made.items():
        with found.tried(name):
            single[name] = _ran(_measure.InPlace(program.result(), once))
    calls, several = {}, {}
    for name, call in single.items():
        start = time.perf_counter()
        jax.block_until_ready(call())
        if (seconds := time.perf_counter() - start) > HOPELESS / runs:
            found.seconds[name] = _measure.Spread.of([seconds])
        elif runs == 1:
            calls[name] = call
        else:
            several[name] = pool.submit(lowered[name].compile)
    for name, program in several.items():
        with found.tried(name):
            calls[name] = _ran(_measure.InPlace(program.result(), arguments))
    return calls


def _that_differ(found: Timed, calls: dict[str, _measure.InPlace]) -> dict[str, Callable]:
    """Those of which no other before them is the same program, and who has whose time."""
    differ, texts = {}, {}
    for name, call in calls.items():
        other = texts.setdefault(before_autotuning(call.compiled.as_text()), name)
        if other == name:
            differ[name] = call
        else:
            # And those that lower to that one, which are timed no more than it is.
            same = [n for n, first in found.same_as.items() if first == name]
            found.same_as |= dict.fromkeys([name, *same], other)
    return differ


def before_autotuning(text: str) -> str:
    """Compiled HLO without names, and without the algorithms that cuDNN and cuBLAS are told."""
    text = re.sub(
        r'"(algorithm|selected_algorithm)":(\{[^{}]*(\{[^{}]*\}[^{}]*)*\}|"[^"]*")', "", text
    )
    return _measure.anonymous(re.sub(r"\bu8\[\d+\]", "u8[]", text))  # what those work in


def _ran(call: Callable) -> Callable:
    """The same, if it can run; a library may try its algorithms meanwhile."""
    jax.block_until_ready(call())
    return call


def _take_turns(
    found: Timed, calls: dict[str, Callable], runs: int, dry: bool, limit: float | None = None
) -> None:
    """Adds the seconds of calls, each of so many runs, and what others have from them."""
    if calls:
        warm(next(iter(calls.values())), dry)
        how = settings(dry)
        how = how if limit is None else dataclasses.replace(how, limit=limit)
        for name, times in _measure.interleaved(calls, how).items():
            found.seconds[name] = _measure.Spread.of(times).over(runs)
        if limit is None:
            most = max(SHORT, CLOSE * min(found.seconds[name].median for name in calls))
            close = {n: call for n, call in calls.items() if found.seconds[n].median <= most}
            found.device_seconds = {
                name: spread.over(runs) for name, spread in _trace.device_seconds(close).items()
            }
    for name, other in found.same_as.items():
        for of in (found.seconds, found.device_seconds, found.errors):
            of.update({name: of[other]} if other in of else {})


def _lowered(
    programs: dict[str, Callable], arguments: tuple
) -> tuple[Timed, dict[str, jax.stages.Lowered]]:
    """Those that differ, and what is known of the others."""
    found, lowered, texts = Timed(), {}, {}
    for name, make in programs.items():
        with found.tried(name):
            program = _measure.lower(make(), arguments)
            other = texts.setdefault(program.as_text(), name)
            if other == name:
                lowered[name] = program
            else:
                found.same_as[name] = other
    return found, lowered
