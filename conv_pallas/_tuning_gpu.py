"""Measures on the GPU at hand which tiles of the Triton kernels are the fastest, and against XLA.

What `tuning.tune` does there. Where ours is not far ahead of the formulation that XLA's rules
choose, XLA's others race as well, and ours has to beat the fastest.

Of a GPU's program that is shorter than the host's part in starting it, what counts is how long the
device is at work, which a trace of JAX's profiler tells. Where ours and XLA's differ by the clock
by more than a host's moods, the clock counts: in a row of such layers it is the host that is waited
for.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from conv_pallas import _measure, _trace, _turns
from conv_pallas.kernels import records, xla_gpu, xla_tuned
from conv_pallas.spec import OPERATIONS, Operation, Problem
from conv_pallas.tracing import Convolution

# The most promising first, as a run on a lent GPU has no time for all.
# Rows, columns, depth, warps, stages, programs that stay, and taps: `kernels.triton_config.Config`.
DENSE_TILES = (
    (128, 128, 64, 4, 3, 2), (128, 256, 64, 8, 4, 1), (128, 64, 64, 4, 3, 2), (64, 64, 64, 4, 3, 2),
    (64, 64, 32, 1, 3), (64, 64, 64, 2, 3), (128, 128, 32, 4, 3), (32, 32, 32, 1, 4),  # of float32
    (128, 256, 64, 8, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 4), (64, 64, 128, 4, 3),
    (64, 64, 64, 4, 4, 2), (128, 64, 64, 8, 4, 2), (128, 64, 64, 4, 4), (64, 64, 64, 4, 4),
    (128, 128, 64, 8, 3), (256, 128, 64, 8, 3), (256, 64, 64, 8, 3), (256, 128, 64, 8, 3, 1),
    (128, 128, 32, 8, 3), (128, 64, 32, 4, 3), (64, 64, 32, 4, 4), (64, 128, 32, 4, 4),
    (128, 128, 32, 8, 4), (128, 256, 32, 8, 4), (64, 128, 64, 4, 4), (128, 64, 64, 4, 2, 3),
    (32, 32, 128, 4, 3), (128, 64, 32, 2, 4),
)  # fmt: skip
# Of few channels' kernel gradient, whose programs then have several taps.
FEW = 32
FEW_TILES = (
    (16, 16, 32, 1, 3, 0, 8), (32, 32, 32, 1, 3, 0, 4), (16, 16, 32, 1, 3, 0, 4),
    (32, 32, 32, 1, 3, 0, 2), (16, 16, 64, 1, 2, 0, 8), (32, 32, 64, 4, 3, 0, 4),
)  # fmt: skip
# Pieces, channels, steps of a piece, warps: see `kernels.triton_depthwise_walk`.
WALK_TILES = (
    (1, 512, 64, 4), (4, 128, 128, 4), (1, 256, 64, 1), (2, 256, 64, 4), (1, 1024, 64, 4),
    (2, 128, 64, 1), (1, 512, 128, 4), (2, 256, 128, 4), (2, 128, 64, 2), (1, 512, 32, 4),
    (1, 512, 64, 2), (4, 128, 32, 4), (2, 128, 16, 1),
)  # fmt: skip
# Rows, channels, R, warps: see `kernels.triton_depthwise_taps`.
TAPS_TILES = (
    (4, 64, 16, 4), (8, 64, 16, 8), (2, 64, 16, 2), (4, 128, 16, 4), (8, 128, 16, 8),
    (2, 128, 16, 4), (1, 256, 16, 4), (4, 64, 22, 4), (2, 128, 17, 4), (4, 64, 11, 4),
    (8, 64, 11, 8), (8, 128, 11, 8), (8, 64, 12, 8), (4, 128, 11, 8),
)  # fmt: skip
# Three rounds of some thirty tiles tell those that are close, and the rest is theirs: a winner of
# three samples would be whichever was lucky.
SETTINGS = dataclasses.replace(_measure.DEVICE, limit=6.0, hopeless=1.1, rounds=(7, 15))
# The winner against the heuristic's, or the rules', once more: of many it may be the luckiest.
AGAIN = dataclasses.replace(_measure.DEVICE, limit=1.0, rounds=(7, 15))
# And against XLA, and XLA's formulations among themselves.
LAST = dataclasses.replace(_measure.DEVICE, limit=2.0, rounds=(7, 15))
# By the clock a short program takes up to so many times as long in one run as in another, as the
# host will have it: on an H200, benchmarks/results/nvidia-h200.
MOODS = 1.5
# Ours that takes less than this of the time of XLA's, by the formulation that the rules choose,
# needs no race with the others, which take seconds to compile.
AHEAD = 0.5
# Of an operation's time, for tiles to be compiled in; what is left is for races, and for XLA's.
TILES = 0.6


def tune(
    convolutions: Iterable[Convolution],
    file: Path | None,
    seconds: float,
    report: Callable[[str], None],
    quick: bool,
    processes: int,
) -> dict[str, tuple[int, ...] | str]:
    """As `tuning.tune`, of convolutions."""
    from conv_pallas.kernels import triton_compat, triton_tuned

    kind, end = triton_compat.device_kind(), time.monotonic() + seconds
    file = triton_tuned.RECORDS.file_of(kind) if file is None else file
    tuned: dict[str, tuple[int, ...] | None] = {}
    formulations: dict[str, str | None] = {}
    trials = [trial for convolution in convolutions for trial in _trials(convolution)]
    told, failures = None, {}
    for i, trial in enumerate(trials):
        if trial.convolution is not told:
            told = trial.convolution
            report(f"{told}:")
        now = time.monotonic()
        if now > end:
            report(f"{trial.name}: no time left")
            continue
        share = (end - now) / (len(trials) - i)
        compiling = now + TILES * share
        most = share / 4 / processes  # seconds to time all tiles, of a device that is shared
        before, found = triton_tuned.table("tiles"), {}
        try:
            found, ours = _tune(trial, before, tuned, compiling, most, quick, report)
            if trial.operations:
                found |= _against_xla(trial, *ours, now + share, report)
        except Exception as e:  # told at the end; what was measured and is yet to be counts
            _ask_device(e)
            failures[f"{trial.name} of {told}"] = e
            report(f"{trial.name}: {_short(e)}")
            found |= {"against_xla": dict.fromkeys(trial.keys())}
        with _turns.on_device():
            triton_tuned.RECORDS.add(file, kind, found)
        records.forget()
        for key, entry in found.get("formulations", {}).items():
            formulations[key] = entry["formulation"]
    for which, e in failures.items():
        more = f", and {len(failures) - 1} more" if len(failures) > 1 else ""
        raise RuntimeError(f"{which} can't be measured{more}: {_short(e)}") from e
    return {key: best for key, best in (tuned | formulations).items() if best is not None}


def _ask_device(e: Exception) -> None:
    """Raises ``e`` where the device no longer answers, as after a read out of bounds.

    It then is no word about what is measured later, and what was known before stays.
    """
    try:
        jax.block_until_ready(jax.numpy.zeros(()) + 1)
    except Exception:
        raise e from None


def _short(e: Exception) -> str:
    return f"{type(e).__name__}: {next(iter(str(e).strip().splitlines()), '')}"


def _tune(trial, before, tuned, end, most, quick, report) -> tuple[dict[str, dict], tuple]:
    """Times the tiles of one operation: what is to be added to the file, and the fastest.

    That as key, tile, call and the arguments of it.

    Args:
      before: the tiles that are in use.
      tuned: by key what this call of `tune` has found, where there then is nothing more to try.
      end: when no further tile is begun, by `time.monotonic`.
      most: seconds to time all tiles in.
      quick: whether no tile is to be tried but the one in use.
    """
    import triton

    found = {}
    with _turns.on_device():
        arguments = jax.block_until_ready(trial.arguments())
    key, calls = _tiles(trial, arguments, before, tuned, end, quick, report)
    with _turns.timing():
        medians = {}
        if len(calls) > 1 and len(calls := _agreeing(trial, calls, report)) > 1:
            settings = dataclasses.replace(SETTINGS, limit=min(SETTINGS.limit, most))
            medians = _medians(trial, calls, arguments, settings, report)
            if (first := min(medians, key=medians.get)) is not None:
                two = {tile: calls[tile] for tile in (None, first)}
                medians = _medians(trial, two, arguments, AGAIN, report)
    best = tuned.get(key)
    if key not in tuned and key is not None:
        if medians:
            best = min(medians, key=medians.get)
            best = best if medians[best] < records.CLEARLY * medians[None] else None
            found["measured"] = {key: {"seconds": medians[best], **_measure.versions(triton)}}
        tuned[key] = best
        found["tiles"] = {key: best}
        report(f"{trial.name}: {key} takes {best or 'what the heuristic says'}")
    return found, (key, best, calls[best], arguments)


def _against_xla(trial, key, tile, ours, arguments, end, report) -> dict[str, dict]:
    """Races ours with XLA, and XLA's formulations: what is to be added to the file.

    Args:
      end: when no further formulation is begun, by `time.monotonic`.
    """
    (problem,) = trial.problems()
    with xla_tuned.ignored():
        raced = _race(trial, key, tile, ours, arguments, report)
    if raced == {}:  # which tells nothing of who is faster: what was known stays
        return {}
    found = {"against_xla": dict.fromkeys(trial.keys(), raced)}
    if raced is None:
        return found
    entry = None
    if raced["seconds"] > AHEAD * raced["xla"]:
        entry = _formulations(trial, problem, arguments, end, report)
    runs = entry["formulation"] if entry else xla_tuned.lookup(problem)  # in XLA, from now on
    if runs is not None:
        with xla_tuned.trial({xla_tuned.key(problem): runs}):
            again = _race(trial, key, tile, ours, arguments, report)
        if not again:  # it failed by itself, say for want of memory
            rule, seconds = xla_tuned.rule(problem), raced["xla"]
            entry = xla_tuned.raced(rule, None, seconds, seconds) | _measure.versions()
        else:
            found["against_xla"] = dict.fromkeys(trial.keys(), again)
    return found | {"formulations": {xla_tuned.key(problem): entry} if entry else {}}


def _formulations(trial, problem, arguments, end, report) -> dict[str, Any] | None:
    """What `xla_tuned.RACED` says of XLA's formulations; None where they could not be compared.

    With what usually is around a forward pass: what XLA can't fuse that with has one more pass over
    y to pay for.
    """
    key, names = xla_tuned.key(problem), xla_gpu.candidates(problem)
    rule, used = names[0], xla_tuned.lookup(problem)
    if used is not None:  # takes part, however little time there is
        names = list(dict.fromkeys([rule, used, *names]))
    function = trial.around or trial.function
    calls, seen, expected = {}, set(), None
    for i, name in enumerate(names if len(names) > 1 else ()):
        if time.monotonic() > end:
            report(f"{trial.name}: no time for {len(names) - i} of XLA's {len(names)} formulations")
            break
        try:
            with _turns.compiling(), xla_tuned.trial({key: name}):
                lowered = _lowered(function("xla"), arguments)
            if lowered.as_text() in seen:
                continue
            seen.add(lowered.as_text())
            with _turns.on_device():  # XLA may time its algorithms as it compiles
                call = _call(lowered, arguments)
                result = call()
                expected = result if expected is None else expected
                off = float(_measure.difference_there(expected, result))
            held = 0 if name == rule else _held(call)
        except Exception as e:  # for want of memory, say
            _ask_device(e)
            report(f"{trial.name} {name}: {_short(e)}")
            if name == rule:
                return None
            continue
        if held:
            report(f"{trial.name} {name}: holds {held / 2**20:.0f} MiB")
        elif off <= _tolerance(trial.convolution):
            calls[name] = call
        else:
            report(f"{trial.name} {name}: is off by {off:.2g} of the largest element")
    if len(calls) < 2:
        return None
    with _turns.timing():
        medians = _medians(trial, calls, arguments, LAST, report, MOODS)
        if (first := min(medians, key=medians.get)) != rule:
            two = {name: calls[name] for name in (rule, first)}
            medians = _medians(trial, two, arguments, AGAIN, report, MOODS)
    won = medians[first] < records.CLEARLY * medians[rule]
    kept = first if won else rule
    ratio = f"{medians[rule] / medians[kept]:.2f} times as fast as {rule}"
    report(f"{trial.name}: of XLA's {kept}, {ratio if won else 'as the rules say'}")
    entry = xla_tuned.raced(rule, first if won else None, medians[kept], medians[rule])
    return entry | _measure.versions()


def _agreeing(trial, calls, report) -> dict[tuple[int, ...] | None, Callable]:
    """Those of the tiles that work, and give what the heuristic's gives."""
    expected, good = calls[None](), {None: calls[None]}
    for tile, call in list(calls.items())[1:]:
        try:
            off = float(_measure.difference_there(expected, call()))
        except Exception as e:
            _ask_device(e)
            report(f"{trial.name} {tile}: {_short(e)}")
            continue
        if off <= _tolerance(trial.convolution):
            good[tile] = call
        else:
            report(f"{trial.name} {tile}: is off by {off:.2g} of the largest element")
    return good


def _race(trial, key, tile, ours, arguments, report) -> dict[str, Any] | None:
    """What `triton_tuned.RACED` says of ours against XLA.

    None where their results differ; nothing where XLA has none.
    """
    import triton

    with _turns.on_device():
        expected = ours()  # outside: what fails in ours is no word about XLA
        try:  # XLA may time its algorithms as it compiles
            xla = _call(_lowered(trial.function("xla"), arguments), arguments)
            off = float(_measure.difference_there(expected, xla()))
        except Exception as e:  # for want of memory, say; ours is measured all the same
            _ask_device(e)
            report(f"{trial.name} xla: {_short(e)}")
            return {}
    if not off <= _tolerance(trial.convolution):
        report(f"{trial.name}: XLA's result and ours are {off:.2g} of the largest element apart")
        return None
    with _turns.timing():
        medians = _medians(trial, {tile: ours, "xla": xla}, arguments, LAST, report, MOODS)
    report(f"{trial.name}: {medians['xla'] / medians[tile]:.2f} times as fast as XLA")
    raced = {"seconds": medians[tile], "xla": medians["xla"], "key": key, "tile": tile}
    return raced | _measure.versions(triton)


def _medians(trial, calls, arguments, settings, report, moods=math.inf) -> dict[Any, float]:
    """Seconds of one run, of calls that take turns; of short ones those of the device alone.

    Args:
      moods: how many times as long as the fastest one has to take by the clock for that to count.
    """
    medians = {
        name: _measure.Spread.of(times).median
        for name, times in _measure.interleaved(calls, settings).items()
    }
    least = min(medians.values())
    close = {name: call for name, call in calls.items() if medians[name] <= moods * least}
    if least < _measure.LONG and len(close) > 1:  # of such a call the host may do most
        medians |= {name: s.median for name, s in _trace.device_seconds(close).items()}
    medians = {name: median / len(arguments[0]) for name, median in medians.items()}
    for name, median in medians.items():
        report(f"{trial.name} {name or 'heuristic'}: {1e6 * median:.1f} us")
    return medians


def _tolerance(convolution: Convolution) -> float:
    """How far two right results may be apart, relative to the largest element."""
    if convolution.x.dtype.itemsize < 4:
        return 3e-2
    precision = convolution.precision
    precision = precision if isinstance(precision, tuple) else (precision,)
    return 1e-4 if jax.lax.Precision.HIGHEST in precision else 5e-3  # tf32 unless told otherwise


# --- what is timed --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Trial:
    """What is timed at once: an operation, or the whole backward pass of one kernel.

    Attributes:
      name: in words.
      convolution: of which.
      operations: those that are compared with XLA's; none where it is about tiles alone.
      function: ``function(implementation) -> f``, and ``f(x, w, g)`` computes it.
      around: as ``function``, with what usually is around it and XLA fuses; None: nothing.
    """

    name: str
    convolution: Convolution
    operations: tuple[Operation, ...]
    function: Callable[[str], Callable]
    around: Callable[[str], Callable] | None = None

    def problems(self) -> list[Problem]:
        return [self.convolution.problem(operation, "cuda") for operation in self.operations]

    @property
    def of_few_channels(self) -> bool:
        problem = self.convolution.problem("conv1d", "cuda")
        return max(problem.C, problem.O) <= FEW * problem.spec.groups

    def keys(self) -> list[str]:
        from conv_pallas.kernels import triton_tuned

        return [triton_tuned.problem_key(problem) for problem in self.problems()]

    def arguments(self) -> tuple[list[jax.Array], jax.Array, list[jax.Array]]:
        """x, w and g, for several runs in a call: w is the same in each."""
        one = self.convolution
        problem = one.problem("conv1d", "cuda")
        structs = (one.x, one.w, jax.ShapeDtypeStruct(problem.y_shape, one.out_dtype))
        keys = jax.random.split(jax.random.key(0), 3)
        x, w, g = (
            jax.random.normal(key, a.shape, a.dtype) for key, a in zip(keys, structs, strict=True)
        )
        operations = 2 * math.prod(problem.y_shape[:-1]) * math.prod(problem.w_shape)
        bytes_ = sum(a.nbytes for a in (x, w, g))
        runs = _measure.runs_in_a_call(operations, bytes_, one.spec.kernel_size)
        return _measure.rolled(x, runs), w, _measure.rolled(g, runs)


def _trials(convolution: Convolution) -> Iterator[_Trial]:
    from conv_pallas.kernels import triton_depthwise_walk as walk

    layer = convolution.layer
    problem = convolution.problem("conv1d", "cuda")
    trial = functools.partial(_Trial, convolution=convolution)

    def forward(implementation):
        return lambda x, w, g: layer(implementation)(x, w)

    def with_bias(implementation):
        f = layer(implementation, activation="relu")
        return lambda x, w, g: f(x, w, w[0, 0])  # a constant would be folded away

    def backward(implementation):
        silu = layer(implementation, activation="silu")
        return lambda x, w, g: jax.vjp(silu, x, w)[1](g)

    def input_gradient(implementation):
        f = layer(implementation)
        return lambda x, w, g: jax.vjp(lambda x: f(x, w), x)[1](g)[0]

    def kernel_gradient(implementation):
        f = layer(implementation)
        return lambda x, w, g: jax.vjp(lambda w: f(x, w), w)[1](g)[0]

    yield trial("forward", operations=OPERATIONS[:1], function=forward, around=with_bias)
    if problem.depthwise and walk.decline(problem.spec, problem.C, problem.O) is None:
        # One kernel does all of backward, and has the most to do where there is an activation. XLA
        # would do it again in what is timed, though not in training.
        yield trial("backward", operations=(), function=backward)
    yield trial("input gradient", operations=OPERATIONS[1:2], function=input_gradient)
    yield trial("kernel gradient", operations=OPERATIONS[2:], function=kernel_gradient)


def _tiles(trial, arguments, before, tuned, end, quick, report):
    """The key that is asked for, and the call of the heuristic (None) and each tile there is.

    Of a key that was tuned it is the call of its tile alone.
    """
    from conv_pallas.kernels import triton_tuned

    ours = trial.function("triton")

    @_turns.compiling()
    def lowered(tile):
        # A function of its own, or JAX would take what it lowered with the tile before.
        with triton_tuned.trial(tile) as keys:
            return _lowered(lambda *a: ours(*a), arguments), keys

    call = _turns.compiling()(functools.partial(_call, arguments=arguments))
    heuristic, keys = lowered(None)
    key = keys[-1] if keys else None  # the last kernel asked is that of the gradient
    if key is None or key in tuned:
        tile = tuned.get(key)
        made = heuristic if tile is None else lowered(tile)[0]
        return key, {tile: call(made)}
    calls = {None: call(heuristic)}
    tiles = {"conv_walk": WALK_TILES, "conv_taps": TAPS_TILES}.get(key[:9], DENSE_TILES)
    if key.startswith("conv_dense_kernel_grad") and trial.of_few_channels:
        tiles = FEW_TILES + tiles
    tiles = () if quick else tiles
    used = before.get(key) and tuple(before[key])  # takes part, however little time there is
    tiles = list(dict.fromkeys([*([used] if used else []), *tiles]))
    seen = {heuristic.as_text(): "the heuristic"}
    for i, tile in enumerate(tiles):
        if time.monotonic() > end and tile != used:
            report(f"{trial.name}: no time for {len(tiles) - i} of {len(tiles)} tiles")
            break
        try:
            made, asked = lowered(tile)
            if key not in asked:
                raise RuntimeError(f"nobody asked for {key}")
            same = seen.setdefault(made.as_text(), tile)
            if same != tile:  # the kernel gradient, say, where its programs can't stay
                report(f"{trial.name} {tile}: the same program as that of {same}")
                continue
            calls[tile] = call(made)
        except Exception as e:  # too large for this chip, say; what it was is reported
            _ask_device(e)
            report(f"{trial.name} {tile}: {_short(e)}")
    return key, calls


def _held(call) -> int:
    return _measure.held(call.compiled)


def _lowered(function, arguments) -> jax.stages.Lowered:
    return _measure.lower(function, arguments)


def _call(lowered, arguments) -> Callable[[], Any]:
    return _measure.InPlace(lowered.compile(), arguments)
