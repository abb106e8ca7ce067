"""What the examples share: their options, the training loop with its bar, the plot.

None of it is about convolutions; `conv_pallas` does not depend on it.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optax
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from conv_pallas.nn import Conv


def parser(description: str, *, steps: int, batch: int, learning_rate: float):
    """An `argparse.ArgumentParser` with the options that every example has."""
    result = argparse.ArgumentParser(
        description=description.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    result.add_argument("--steps", type=positive, default=steps, help="optimizer steps")
    result.add_argument("--batch", type=positive, default=batch, help="sequences in a step")
    result.add_argument("--learning-rate", type=float, default=learning_rate, help="of Adam")
    result.add_argument("--every", type=positive, default=100, help="steps between two tests")
    result.add_argument("--seed", type=int, default=0, help="of parameters and data")
    result.add_argument("--stock", action="store_true", help="train stock nnx.Conv layers instead")
    result.add_argument("--output", type=Path, default=Path("examples-output"), help="for the plot")
    return result


def positive(text: str) -> int:
    """For ``type=`` of an argument."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an int of 1 or more, got {text!r}")
    return value


def existing_file(text: str) -> Path:
    """For ``type=`` of an argument."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return path


def conv_class(options: argparse.Namespace) -> type[nnx.Conv]:
    """Ours, or flax's own to compare the speed with."""
    return nnx.Conv if options.stock else Conv


def optimizer(model: nnx.Module, options: argparse.Namespace, *, clip: float = 1.0):
    """Adam behind a clipped gradient; the learning rate ends at a hundredth, along a cosine."""
    schedule = optax.cosine_decay_schedule(options.learning_rate, options.steps, 0.01)
    chain = optax.chain(optax.clip_by_global_norm(clip), optax.adam(schedule))
    return nnx.Optimizer(model, chain, wrt=nnx.Param)


@dataclasses.dataclass
class History:
    """The loss of every step, the tests as ``(step, value)``, seconds in training alone."""

    losses: list[float] = dataclasses.field(default_factory=list)
    tests: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


def train(
    update: Callable[[Any], Any],
    draw: Callable[[int], Any],
    test: Callable[[], float],
    options: argparse.Namespace,
    what: str,
) -> History:
    """Calls ``update(draw(step))``, which gives the loss, and ``test()`` now and then.

    Args:
      what: the name of the figure that ``test`` gives.
    """
    console = Console(file=sys.stdout, highlight=False)
    history = History()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console,
                  disable=not console.is_terminal) as bar:  # fmt: skip
        task = bar.add_task("training", total=options.steps)
        for step in range(1, options.steps + 1):
            batch = draw(step)
            start = time.perf_counter()
            loss = float(update(batch))
            if step > 1:  # the first one compiles
                history.seconds += time.perf_counter() - start
            history.losses.append(loss)
            bar.update(task, advance=1, description=f"loss {loss:.3g}")
            if step % options.every == 0 or step == options.steps:
                history.tests.append((step, test()))
                console.print(f"step {step}: loss {loss:.3g}, {what} {history.tests[-1][1]:.6g}")
    milliseconds = 1e3 * history.seconds / max(1, options.steps - 1)
    console.print(f"{milliseconds:.0f} ms a step, {history.seconds:.0f} s of training")
    return history


def plot(history: History, name: str, what: str, options: argparse.Namespace) -> Path:
    """Saves ``<output>/<name>.png``: the loss of each step, and the tests."""
    options.output.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy(range(1, len(history.losses) + 1), history.losses, color="#9db8d9", linewidth=1)
    left.set(title="Training loss", xlabel="step")
    right.plot(*zip(*history.tests, strict=True), color="#1f5fa8", marker="o", markersize=3)
    right.set(title=what.capitalize(), xlabel="step")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e3e5e8", linewidth=0.8)
    path = options.output / f"{name}.png"
    figure.savefig(path, dpi=150)
    print(f"plot in {path}")
    return path
