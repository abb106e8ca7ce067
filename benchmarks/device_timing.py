"""How fast the Triton kernels are on the GPU at hand: steps of `benchmarks.on_device`.

Variants take turns, and ours is compared with the fastest of the others. What the memory and the
tensor cores of this device give, measured in the same process, stands beside.
"""

import dataclasses
import functools
import subprocess
import time
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import baselines, device_layers, device_turns, harness
from benchmarks.on_device import Log, kill, lines_of
from benchmarks.truth import Truth, WrongResultError
from conv_pallas import _measure, _trace, aot, inspection
from conv_pallas._layers import Layer
from conv_pallas.explanation import default_platform
from conv_pallas.kernels import xla
from conv_pallas.spec import OPERATIONS

# By what each kind of layer might best be computed; the first is stock's.
_DENSE = ("native", "barrier", "symmetric", "fold", "matmuls", "im2col")
GPU_FORMULATIONS = {
    "dense": {
        "conv1d": _DENSE,
        "conv1d_input_grad": ("transposed", *_DENSE),
        "conv1d_kernel_grad": ("native", "fold", "matmuls", "im2col"),
    },
    "depthwise": {
        "conv1d": ("native", "shifts", "own_pads"),
        "conv1d_input_grad": ("transposed", "shifts", "own_pads"),
        "conv1d_kernel_grad": ("native", "shifts", "fold"),
    },
}
BASELINES = (baselines.STOCK, baselines.BARRIER, baselines.SYMMETRIC, baselines.MATMULS)
DEFAULT = device_layers.DEFAULT
COPY = "copy"  # of an array of x's size, by the driver: what memory gives at best
ASKED = 10  # seconds for nvidia-smi to answer


def goals(log: Log, dry: bool) -> None:
    """The shapes that the project has set itself goals for, operation by operation.

    Ours alone, beside the device's ceilings: what a goal asks for is known after a minute, however
    long cuDNN takes to choose among its algorithms. That is left to `against`.
    """
    every = device_layers.with_operations(device_layers.goals(dry))
    # Then, each once, whether it is right at that size.
    _compared(log, dry, [*((*item, ("ours",)) for item in every), *((*i, ()) for i in every)])


def against(log: Log, dry: bool) -> None:
    """The same operations and whole steps, ours, our best for XLA and every baseline taking turns.

    With the tiles that were tuned, if any. XLA's own depthwise convolutions come last, and once
    more with ours: compiling one may take longer than there is time.
    """
    every = [
        (layer, operation)
        for layer in device_layers.goals(dry)
        for operation in device_layers.as_trained(layer)
    ]
    names = ("ours", "xla", *BASELINES)
    plain = ("ours", "xla", baselines.MATMULS)
    plan = [(layer, operation, names) for layer, operation in every if layer.G == 1]
    deep = [(layer, operation) for layer, operation in every if layer.G > 1]
    plan[6:6] = [(*item, plain) for item in deep]
    rest = tuple(name for name in names if name not in plain[1:])
    _compared(log, dry, [*plan, *((*item, rest) for item in deep)])


def _compared(log: Log, dry: bool, plan: list[tuple[Layer, str, tuple[str, ...]]]) -> None:
    """Times an operation of a layer by programs of those names; the goals' verdicts come last.

    Where there are no names, ours is compared with a plain program instead.
    """
    try:
        _ceilings(log, dry)
        for layer, operation, names in log.each(plan, lambda item: f"{item[0].name} {item[1]}"):
            if not names:
                off = _off(layer, operation, dry)
                log.write(item=log.item, layer=layer.name, operation=operation,
                          off_from_plain=off, ok=off <= _measure.tolerance(layer))  # fmt: skip
                continue
            programs = {
                name: (lambda name=name, operation=operation, layer=layer: device_layers.operation(
                    operation, device_layers.forward(name, layer, dry)
                ))
                for name in names
            }  # fmt: skip
            programs[COPY] = lambda: lambda x, w, b, g: jnp.copy(x)
            sure = ("ours", "xla", COPY)
            for timed in device_turns.timed(log, programs, layer, dry, sure):
                extra = _right(timed, layer)
                if {"ours", COPY} <= timed.seconds.keys():
                    ours, copy = (timed.seconds[name].median for name in ("ours", COPY))
                    passes = device_layers.passes(operation) / 2  # of which a copy makes two
                    extra |= dict(
                        tflops=2 * layer.products / ours / 1e12, of_copy=passes * copy / ours
                    )
                _write(log, timed, layer=layer.name, operation=operation, **extra)
    finally:
        for verdict in verdicts(lines_of(log.path)):
            log.write(**verdict)


def _right(timed: device_turns.Timed, layer: Layer) -> dict:
    """How far ours, and what is chosen, are off from XLA's, and whether that is little enough."""
    if timed.off is None:
        return {}
    return dict(off_from_xla=timed.off, ok=timed.off <= _measure.tolerance(layer))


def _off(layer: Layer, operation: str, dry: bool) -> float:
    """How far ours is off from what XLA computes without its convolution."""
    names = ("ours", baselines.MATMULS if layer.G == 1 else "xla")
    arrays = device_layers.arrays(layer)
    ours, plain = (
        jax.jit(device_layers.operation(operation, device_layers.forward(name, layer, dry)))(
            *arrays
        )
        for name in names
    )
    return float(_measure.difference_there(plain, ours))


def verdicts(lines: Iterable[dict]) -> list[dict]:
    """Each goal, what was reached, and whether that is enough; None where it was not measured.

    Args:
      lines: of `goals`. For a layer's name and an operation they have ``tflops``, and ``of_copy``:
        the rate at which it moves what it must, over that of a copy of x, which took turns with it.
    """
    results = {(r["layer"], r["operation"]): r for r in lines if "tflops" in r or "of_copy" in r}

    def worst(what, layers, operations):
        found = [r[what] for (la, op), r in results.items() if la in layers and op in operations]
        return min(found) if len(found) == len(layers) * len(operations) else None

    dense, depthwise = [f"dense-512/D{D}" for D in (1, 4, 64, 512, 1024)], ["depthwise/D1"]
    gradients = ("input_grad", "kernel_grad")
    # Tiles of padding are left out, so that a large dilation may take less time than none: what
    # dilation costs, the second of these says.
    spread = cost = None
    if worst("tflops", dense, ("forward", *gradients)) is not None:
        rates = [[results[la, op]["tflops"] for la in dense] for op in ("forward", *gradients)]
        spread = max(max(of_one) / min(of_one) for of_one in rates)
        cost = max(of_one[0] / min(of_one) for of_one in rates)
    lines = (
        ("dense, forward, TFLOP/s", worst("tflops", dense, ("forward",)), 600),
        ("dense, gradients, TFLOP/s", worst("tflops", dense, gradients), 500),
        ("dense, fastest D over slowest", spread, 1.1),
        ("dense, D=1 over slowest D", cost, 1.1),
        ("dense-64, forward, of a copy", worst("of_copy", ["dense-64/D1"], ("forward",)), 0.8),
        ("depthwise, forward, of a copy", worst("of_copy", depthwise, ("forward",)), 1 / 1.1),
        ("depthwise, backward, of a copy", worst("of_copy", depthwise, ("backward",)), 1 / 1.25),
    )  # fmt: skip
    told = []
    for goal, value, bar in lines:
        met = None if value is None else value <= bar if "over" in goal else value >= bar
        told.append(dict(goal=goal, bar=bar, reached=value, met=met))
    return told


def layers(log: Log, dry: bool) -> None:
    """The layers of the sweep, forward and training step, as a user would call them."""
    _ceilings(log, dry)
    # Those last of which a kernel with its dilation written out takes longest.
    window = lambda layer: layer.products * ((layer.K - 1) * layer.D + 1) / layer.K  # noqa: E731
    chosen = sorted(device_layers.sweep(dry), key=window)
    plan = [(layer, which) for layer in chosen for which in _measure.PASSES]
    names = ("ours", DEFAULT, "xla", *BASELINES[1:], baselines.STOCK)
    for layer, which in log.each(plan, lambda item: item[0].name):
        programs = {name: functools.partial(_pass, name, layer, which, dry) for name in names}
        for timed in device_turns.timed(log, programs, layer, dry, ("ours", DEFAULT, "xla")):
            _write(log, timed, layer=layer.name, which=which, **_right(timed, layer))


def drawn(log: Log, dry: bool) -> None:
    """Layers at random, where dispatch chooses by rules that were made of other layers.

    ``behind`` tells how many times as long its choice takes as the fastest of all. Without what XLA
    writes out with a dilation's zeros: compiling that may take minutes.
    """
    _ceilings(log, dry)
    plan = [(layer, which) for layer in device_layers.drawn(dry) for which in _measure.PASSES]
    sure = ("ours", DEFAULT, "xla")
    for layer, which in log.each(plan, lambda item: f"{item[0].name} {item[1]}"):
        names = (*sure, *BASELINES[1:])
        programs = {name: functools.partial(_pass, name, layer, which, dry) for name in names}
        for timed in device_turns.timed(log, programs, layer, dry, sure):
            medians = {name: spread.median for name, spread in timed.seconds.items()}
            best = min(medians, key=medians.get, default=None)
            told = dict(best=best) | _right(timed, layer)
            if DEFAULT in medians:
                told["behind"] = medians[DEFAULT] / medians[best]
            _write(log, timed, layer=layer.name, which=which, **told)


def _pass(name: str, layer: Layer, which: str, dry: bool) -> Callable:
    """``(x, kernel, bias, g) -> result`` of a pass of a layer."""
    f = device_layers.forward(name, layer, dry)
    if which == _measure.FORWARD:
        return lambda x, w, b, g: f(x, w, b)
    return baselines.step_of(f)


def formulations(log: Log, dry: bool) -> None:
    """Every XLA formulation that a GPU may want, of each kind of layer; what is chosen is told.

    "ours" stands for the chosen one, and stock is ``native`` or, of a gradient, ``transposed``.
    """
    every = device_layers.formulations(dry)
    plan = [(layer, operation) for layer in every for operation in OPERATIONS]
    for layer, operation in log.each(plan, lambda item: item[0].name):
        problem = layer.problem(operation, "cuda")
        names = GPU_FORMULATIONS["depthwise" if problem.depthwise else "dense"][operation]
        chosen = xla.choose(problem)
        programs = {
            name: (lambda name=name, problem=problem: device_layers.formulation(name, problem))
            for name in dict.fromkeys((chosen, *names))
        }
        for timed in device_turns.timed(log, programs, layer, dry, (chosen,)):
            medians = {name: spread.median for name, spread in timed.seconds.items()}
            best = min(medians, key=medians.get, default=None)
            log.write(
                ok=chosen in medians, item=log.item, layer=layer.name, operation=operation,
                chosen=chosen, best=best,
                behind=medians[chosen] / medians[best] if chosen in medians else None,
                **timed.told(),
            )  # fmt: skip


def pytorch(log: Log, dry: bool) -> None:
    """PyTorch's convolution, with cudnn.benchmark, of the goals' layers, taking turns with ours.

    A call runs each several times, on other x and g, as in `device_turns.timed`. A baseline that
    computes something else is no baseline: what is wrong is told instead of timed.
    """
    # The host makes these arrays: the largest last.
    chosen = sorted(device_layers.goals(dry), key=lambda layer: layer.N * layer.T * layer.C)
    plan = [(layer, which) for layer in chosen for which in _measure.PASSES]
    for layer, which in log.each(plan, lambda item: item[0].name):
        x, w, b, g = baselines.arguments(layer)
        runs = 2 if dry else device_turns.runs_of(layer)
        each = [(np.roll(x, i, -2), w, b, np.roll(g, i, -2)) for i in range(runs)]
        try:
            harness.check_torch(harness.checkable(Truth(layer, default_platform())), which)
            torches = [baselines.torch_program(layer, which, arrays)[0] for arrays in each]
        except baselines.NotApplicableError as e:
            return log.write(skipped=str(e))
        except WrongResultError as e:
            log.write(ok=False, layer=layer.name, why=str(e))
            continue
        # y as well as all gradients, as there: nothing may be left out because nobody asks for it.
        operation = "forward" if which == _measure.FORWARD else "step"
        f = device_layers.operation(operation, device_layers.forward("ours", layer, dry))
        xs, _, _, gs = map(list, zip(*each, strict=True))
        given = jax.device_put((xs, w, b, gs))
        ours = _measure.InPlace(_measure.lower(f, given).compile(), given)
        calls = {"ours": ours, baselines.TORCH: lambda torches=torches: [t() for t in torches][-1]}
        for call in calls.values():
            jax.block_until_ready(call())  # cuDNN tries its algorithms
        times = _measure.interleaved(calls, device_turns.settings(dry))
        spreads = {name: _measure.Spread.of(t).over(runs) for name, t in times.items()}
        log.write(
            layer=layer.name, which=which, ours=spreads["ours"].median,
            speedup=spreads[baselines.TORCH].median / spreads["ours"].median,
            seconds={name: dataclasses.asdict(s) for name, s in spreads.items()},
        )  # fmt: skip


def kernels(log: Log, dry: bool) -> None:
    """What the device runs in the goals' layers and in those of the sweep, kernel by kernel."""
    chosen = [*device_layers.goals(dry), *device_layers.sweep(dry)]
    plan = [(layer, which) for layer in chosen for which in _measure.PASSES]
    for layer, which in log.each(plan, lambda item: item[0].name):
        arrays = device_layers.arrays(layer)
        for name in (DEFAULT, baselines.MATMULS):
            program = jax.jit(_pass(name, layer, which, dry))
            jax.block_until_ready(program(*arrays))
            found = _trace.kernels(functools.partial(program, *arrays))
            if not found and not dry:
                return log.write(ok=False, why="the profiler tells nothing of this device")
            total = sum(seconds for _, seconds in found.values())
            log.write(layer=layer.name, which=which, name=name, seconds=total, kernels=found)


def tuning(log: Log, dry: bool, shard: int = 0, shards: int = 1) -> None:
    """Tiles for the layers of the goals; and of these and the sweep's whether ours is the default.

    Or else which of XLA's formulations.

    For tiles of the sweep there is no time: `tune` without ``quick`` takes a minute for a layer.
    The file among the results belongs into kernels/. To compile takes most of the time, so that
    several processes do; they take turns on the device.
    """
    goals = device_layers.goals(dry)
    # Of the dense ones with another dilation the tiles are the same.
    chosen = [*goals[:3], goals[-1], *device_layers.sweep(dry)][shard::shards]
    if dry:
        return log.write(skipped="there is no GPU to tune for")
    from conv_pallas.tuning import tune

    operations = [len(device_layers.operations(layer)) for layer in chosen]
    for layer in log.each(chosen, lambda layer: layer.name):
        x, w, _, _ = inspection.structs(layer)
        left = operations[log.item :]
        found = tune(
            x, w, seconds=log.left() * left[0] / sum(left), quick=layer not in goals,
            processes=shards,
            report=lambda line, layer=layer: log.write(layer=layer.name, tried=line),
            **layer.geometry,
        )  # fmt: skip
        log.write(layer=layer.name, tiles=found)


def _ceilings(log: Log, dry: bool) -> None:
    """Writes the terabytes a second of a copy, and the rate of a plain matmul."""
    x = jnp.ones((1 << (20 if dry else 30),), jnp.bfloat16)
    n = 256 if dry else 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    made = {"copy": lambda x, a, b: jnp.copy(x), "matmul": lambda x, a, b: a @ b}
    compiled = {name: jax.jit(f).lower(x, a, b).compile() for name, f in made.items()}
    calls = {name: (lambda f=f: f(x, a, b)) for name, f in compiled.items()}
    device_turns.warm(calls["matmul"], dry)
    times = _measure.interleaved(calls, device_turns.settings(dry))
    seconds = {name: _measure.Spread.of(t).median for name, t in times.items()}
    copy = 2 * x.nbytes / seconds["copy"] / 1e12
    matmul = 2 * n**3 / seconds["matmul"] / 1e12
    kind = jax.devices()[0].device_kind
    log.write(copy_terabytes_per_second=copy, matmul_tflops=matmul, device=kind,
              **_of_data_sheet(kind, copy, matmul), at_work=_at_work(calls["matmul"]))  # fmt: skip


def _at_work(call: Callable) -> dict[str, str]:
    """What nvidia-smi tells of clock and power while a call is repeated; or why it tells nothing.

    A ceiling was low, say, because the device was too hot.
    """
    fields = ("clocks.sm", "power.draw", "clocks_event_reasons.active")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        asked = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
        )
    except OSError as e:
        return {"unknown": f"{type(e).__name__}: {e}"}
    end = time.monotonic() + ASKED
    with asked.stdout:
        while asked.poll() is None:
            jax.block_until_ready(call())
            if time.monotonic() > end:
                kill(asked)
                return {"unknown": f"nvidia-smi gave no answer in {ASKED} s"}
        told = asked.stdout.read().strip()
    values = told.split(", ")
    if asked.returncode or len(values) != len(fields):
        return {"unknown": told}
    return dict(zip(fields, values, strict=True))


def _of_data_sheet(kind: str, copy: float, matmul: float) -> dict[str, float]:
    """Both ceilings over what the chip should reach: one that is low makes ours look good."""
    chip = aot.gpu_of(kind)
    if chip is None:
        return {}
    most = inspection.limits(chip, "bfloat16")
    return dict(copy_of_data_sheet=1e12 * copy / most.bytes_,
                matmul_of_data_sheet=1e12 * matmul / most.operations)  # fmt: skip


def _write(log: Log, timed: device_turns.Timed, **what) -> None:
    """One line: ours against the fastest of the baselines, and every time.

    Its ``device_speedup`` is that of the times in which the device was at work, where a trace tells
    them: of a program that is shorter than the host's part in it the other says nothing.
    """
    what["item"] = log.item
    if "ours" not in timed.seconds:
        return log.write(**what, ok=False, errors=timed.errors)
    best, speedup = _speedup(timed.seconds)
    device = {}
    if "ours" in timed.device_seconds:
        device["device_speedup"] = _speedup(timed.device_seconds)[1]
    ours = timed.seconds["ours"].median
    log.write(**what, ours=ours, best_baseline=best, speedup=speedup, **device, **timed.told())


def _speedup(seconds: dict[str, _measure.Spread]) -> tuple[str | None, float | None]:
    """The fastest of the baselines, and how many times as long as ours it takes."""
    rest = {name: s.median for name, s in seconds.items() if name in BASELINES}
    best = min(rest, key=rest.get, default=None)
    return best, rest[best] / seconds["ours"].median if best else None
