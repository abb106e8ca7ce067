"""How fast the Triton kernels are on the GPU at hand: steps of `benchmarks.on_device`.

Variants take turns, and ours is compared with the fastest of the others. What the memory and the
tensor cores of this device give, measured in the same process, stands beside.
"""

import dataclasses
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks import baselines, device_layers
from benchmarks.on_device import Log
from conv_pallas import _layers, _measure

BASELINES = (baselines.STOCK, baselines.BARRIER, baselines.SYMMETRIC, baselines.MATMULS)


def goals(log: Log, dry: bool) -> None:
    """The shapes that the project has set itself goals for, operation by operation.

    Ours alone, beside the device's ceilings: what a goal asks for is known after a minute, however
    long cuDNN takes to choose among its algorithms. That is left to `against`.
    """
    results = {}
    try:
        _compared(log, dry, ("ours",), results)
    finally:
        for verdict in verdicts(results):
            log.write(**verdict)


def against(log: Log, dry: bool) -> None:
    """The same operations, ours, our best for XLA and every baseline taking turns."""
    _compared(log, dry, ("ours", "xla", *BASELINES), {})


def _compared(log: Log, dry: bool, names: tuple[str, ...], results: dict) -> None:
    """Times programs of those names; adds to results what ours reached, by layer and operation."""
    copy = _ceilings(log, dry)
    for layer in device_layers.goals(dry):
        arguments = device_layers.arrays(layer)
        for operation in device_layers.operations(layer):
            if log.out_of_time(layer.name):
                return
            programs = {
                name: (lambda name=name, operation=operation, layer=layer: device_layers.operation(
                    operation, device_layers.forward(name, layer, dry)
                ))
                for name in names
            }  # fmt: skip
            seconds, errors = _timed(programs, arguments, dry)
            moved = device_layers.passes(operation) * arguments[0].nbytes
            extra = {}
            if "ours" in seconds:
                ours = seconds["ours"].median
                extra = dict(tflops=2 * layer.products / ours / 1e12,
                             of_copy=moved / ours / 1e12 / copy)  # fmt: skip
                results[layer.name, operation] = extra
            _write(log, seconds, errors, layer=layer.name, operation=operation, **extra)


def verdicts(results: dict[tuple[str, str], dict[str, float]]) -> list[dict]:
    """Each goal, what was reached, and whether that is enough; None where it was not measured.

    Args:
      results: for a layer's name and an operation, ``tflops``, and ``of_copy``: the rate at
        which it moves what it must, over that of a copy.
    """

    def worst(what, layers, operations):
        found = [r[what] for (la, op), r in results.items() if la in layers and op in operations]
        return min(found) if len(found) == len(layers) * len(operations) else None

    dense, depthwise = [f"dense-512/D{D}" for D in (1, 4, 64, 512, 1024)], ["depthwise/D1"]
    forward = [results[la, "forward"]["tflops"] for la in dense if (la, "forward") in results]
    spread = max(forward) / min(forward) if len(forward) == len(dense) else None
    gradients = ("input_grad", "kernel_grad")
    lines = (
        ("dense, forward, TFLOP/s", worst("tflops", dense, ("forward",)), 600),
        ("dense, gradients, TFLOP/s", worst("tflops", dense, gradients), 500),
        ("dense, fastest D over slowest", spread, 1.1),
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
    from benchmarks.layers import quick

    _ceilings(log, dry)
    chosen = [subject for subject in quick() if isinstance(subject, _layers.Layer)]
    for layer in [device_layers.smaller(chosen[0])] if dry else chosen:
        layer = _layers.fit(layer, device_layers.platform())
        arguments = device_layers.arrays(layer)
        for which in _measure.PASSES:
            if log.out_of_time(layer.name):
                return
            programs = {}
            for name in ("ours", "xla", *BASELINES):

                def program(name=name, which=which, layer=layer):
                    f = device_layers.forward(name, layer, dry)
                    if which == _measure.FORWARD:
                        return lambda x, w, b, g: f(x, w, b)
                    return baselines.step_of(f)

                programs[name] = program
            seconds, errors = _timed(programs, arguments, dry)
            _write(log, seconds, errors, layer=layer.name, which=which)


def pytorch(log: Log, dry: bool) -> None:
    """PyTorch's convolution, with cudnn.benchmark, of the goals' layers."""
    for layer in device_layers.goals(dry):
        for which in _measure.PASSES:
            if log.out_of_time(layer.name):
                return
            try:
                call, _ = baselines.torch_program(layer, which, baselines.arguments(layer))
            except baselines.NotApplicableError as e:
                return log.write(skipped=str(e))
            times = _measure.interleaved({"torch": call}, _measure.QUICK)["torch"]
            log.write(layer=layer.name, which=which, **_told(_measure.Spread.of(times)))


def tuning(log: Log, dry: bool) -> None:
    """Tiles for the goals' layers; the file belongs into kernels/, and the next step reads it."""
    if dry:
        return log.write(skipped="there is no GPU to tune for")
    from conv_pallas.kernels import triton_compat, triton_tuned
    from conv_pallas.tuning import tune

    file = triton_tuned.file_of(triton_compat.device_kind())
    for layer in device_layers.goals(dry)[:3]:
        if log.out_of_time(layer.name):
            return
        x, w, _, _ = device_layers.arrays(layer)
        found = tune(
            x, w, seconds=log.left(), report=lambda line: log.write(tried=line),
            kernel_dilation=layer.D, feature_group_count=layer.G,
        )  # fmt: skip
        log.write(layer=layer.name, tiles=found)
        if file.exists():
            shutil.copy(file, log.path.with_name(file.name))


def _ceilings(log: Log, dry: bool) -> float:
    """Terabytes a second of a copy; writes that, and the rate of a plain matmul."""
    x = jnp.ones((1 << (20 if dry else 30),), jnp.bfloat16)
    n = 256 if dry else 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    programs = {"copy": lambda: lambda x, a, b: -x, "matmul": lambda: lambda x, a, b: a @ b}
    seconds, _ = _timed(programs, (x, a, b), dry)
    copy = 2 * x.nbytes / seconds["copy"].median / 1e12
    log.write(copy_terabytes_per_second=copy,
              matmul_tflops=2 * n**3 / seconds["matmul"].median / 1e12)  # fmt: skip
    return copy


def _timed(programs: dict[str, Callable], arguments, dry: bool) -> tuple[dict, dict]:
    """A `Spread` of seconds for each program that can run, and why the others can't.

    The device queues calls, so that the host's part in them is hidden.
    """
    calls, errors = {}, {}
    for name, make in programs.items():
        try:
            compiled = jax.jit(make()).lower(*arguments).compile()
            jax.block_until_ready(compiled(*arguments))
            calls[name] = lambda compiled=compiled: compiled(*arguments)
        except baselines.NotApplicableError as e:
            errors[name] = str(e)
        except Exception as e:  # cuDNN has no algorithm for some of the baselines; it is told
            errors[name] = f"{type(e).__name__}: {e}"[:300]
    settings = _measure.Settings(0, (2, 2)) if dry else _measure.QUICK
    times = _measure.interleaved(calls, settings) if calls else {}
    return {name: _measure.Spread.of(t) for name, t in times.items()}, errors


def _write(log: Log, seconds: dict, errors: dict, **what) -> None:
    """One line: ours against the fastest of the baselines, and every time."""
    if "ours" not in seconds:
        return log.write(**what, ok=False, errors=errors)
    rest = {name: s.median for name, s in seconds.items() if name in BASELINES}
    best = min(rest, key=rest.get, default=None)
    log.write(
        **what, ours=seconds["ours"].median, best_baseline=best,
        speedup=rest[best] / seconds["ours"].median if best else None,
        seconds={name: _told(s) for name, s in seconds.items()}, errors=errors,
    )  # fmt: skip


def _told(spread: _measure.Spread) -> dict[str, float]:
    return dataclasses.asdict(spread)
