"""The demo: a TCN that reads handwritten digits, and what its layers cost.

Needs the extra ``demo``. Run it as ``python -m conv_pallas demo``.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from conv_pallas import _layers, _measure
from conv_pallas._measure import FORWARD, OURS, PASSES, STEP, STOCK, Measurement, Settings
from conv_pallas.dispatch import Implementation
from conv_pallas.nn import TCN

# Five blocks of two layers with four taps see 1 + 2 * 3 * 31 = 187 steps, so that the last step
# sees all 64 pixels.
WIDTHS = (25,) * 5
KERNEL_SIZE = 4
DROPOUT = 0.05
EPOCHS = 25
BATCH = 64
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 1e-2

# Of the largest element. Both models sum the same products, in different orders.
TOLERANCE = 1e-4

LAYERS = (
    "tcn-adding/D128",
    "tcn-mnist/D16",
    "tcn-music/D8",
    "tcn-ptb-characters/D4",
    "tcn-ptb-words/D8",
    "wavenet/D512",
    "conv-tasnet/D128",
    "hifigan-v1-up/C256",
    "hifigan-v1/C64/K11/D5",
    "ms-tcn/D512",
    "spliceai-10k/K11/D4",
    "mamba-2.8b/D1",
)
QUICK_WIDTHS = (16,) * 3
QUICK_LAYERS = ("tcn-music/D8", "ms-tcn/D512")
SETTINGS = Settings(least=0.01, rounds=(7, 15), settled=0.02, limit=1.0)

BLUE, ORANGE, GREY = "#3b6fb6", "#d9792b", "#8a8f98"  # apart for every kind of colour vision


def run(
    *,
    epochs: int | None,
    seed: int,
    output: Path,
    implementation: Implementation,
    benchmark: bool,
    quick: bool,
) -> int:
    """The whole demo; returns the exit status.

    Args:
      epochs: None is `EPOCHS`, or 2 if ``quick``.
      output: an existing folder for the pictures.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=100)  # 80 columns would fold the table
    start = time.perf_counter()

    host = _measure.host()
    console.print(
        f"JAX {host['jax']} and flax {host['flax']} on {host['device']} "
        f"({host['cpu']}, {host['cores']} cores)"
    )
    seed %= 2**32
    data = digits(seed)
    widths = QUICK_WIDTHS if quick else WIDTHS

    def network(**more):
        return TCN(1, widths, 10, KERNEL_SIZE, DROPOUT, nnx.Rngs(seed), **more)

    model = network(implementation=implementation)
    print_kernels(model, console)
    history = train(model, data, epochs or (2 if quick else EPOCHS), seed, console)
    plot_training(history, output / "training.png")
    console.print(f"test accuracy [bold]{history.accuracy[-1]:.2%}[/bold]")

    # The same network of stock layers, a form without values, to hold the trained ones.
    form = nnx.eval_shape(lambda: network(conv=nnx.Conv))
    stock = nnx.merge(nnx.graphdef(form), nnx.state(model))
    same = compare(stock, model, data, console)
    if benchmark:
        measurements = measure(QUICK_LAYERS if quick else LAYERS, implementation, quick, console)
        console.print(table(measurements))
        plot_speedup(measurements, host, output / "speedup.png")
    console.print(f"pictures in {output}/, {time.perf_counter() - start:.0f} s in all")
    return 0 if same else 1


# --- the digits ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Data:
    """Images as sequences ``(N, 64, 1)`` in [0, 1], labels ``(N,)`` in 0..9."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def digits(seed: int) -> Data:
    """scikit-learn's 1797 digits of 8x8 pixels, row after row; a fifth is held out."""
    images, labels = load_digits(return_X_y=True)
    x = (images / 16).astype(np.float32)[:, :, None]
    x, x_test, y, y_test = train_test_split(
        x, labels.astype(np.int32), test_size=0.2, stratify=labels, random_state=seed
    )
    return Data(x, y, x_test, y_test)


def jittered(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half of the images moved by up to a pixel in either direction: 1437 are few to learn from."""
    images = np.pad(x.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    moves = rng.integers(-1, 2, (2, len(x))) * (rng.random(len(x)) < 0.5)
    rows, columns = np.arange(1, 9) + moves[:, :, None]
    return images[np.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None]].reshape(
        x.shape
    )


@dataclasses.dataclass
class History:
    """Mean training loss and test accuracy of each epoch."""

    loss: list[float] = dataclasses.field(default_factory=list)
    accuracy: list[float] = dataclasses.field(default_factory=list)


def loss_of(model: TCN, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean cross entropy, and the model's outputs ``(N, T, 10)``."""
    outputs = model(x)
    last = outputs[:, -1]  # the step that has seen every pixel
    return optax.softmax_cross_entropy_with_integer_labels(last, y).mean(), outputs


@nnx.jit
def training_step(model: TCN, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    (loss, _), grads = nnx.value_and_grad(loss_of, has_aux=True)(model, x, y)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def accuracy(model: TCN, x: jax.Array, y: jax.Array) -> jax.Array:
    return (model(x)[:, -1].argmax(-1) == y).mean()


def print_kernels(model: TCN, console: Console) -> None:
    """What runs under a layer of the last block; `conv_pallas.explain` has the whole answer."""
    layer = model.blocks[-1].conv1
    explanation = layer.explain(jax.ShapeDtypeStruct((BATCH, 64, layer.in_features), jnp.float32))
    for operation in explanation.chosen:
        console.print(f"  {operation} by {explanation.how(operation)}")
    if explanation.note:
        console.print(f"  {explanation.note}")


def train(model: TCN, data: Data, epochs: int, seed: int, console: Console) -> History:
    """Trains ``model`` in place, and leaves it in eval mode."""
    rng = np.random.default_rng(seed)
    steps = len(data.x) // BATCH
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps * epochs)
    optimizer = nnx.Optimizer(
        model, optax.adamw(schedule, weight_decay=WEIGHT_DECAY), wrt=nnx.Param
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    console.print(
        f"training a TCN of {parameters} parameters on {len(data.x)} digits, "
        f"{len(data.y_test)} are held out"
    )
    history = History()
    with progress(console, "training", epochs * steps) as advance:
        for epoch in range(1, epochs + 1):
            model.train()
            losses = []
            order = rng.permutation(len(data.x))[: steps * BATCH].reshape(steps, BATCH)
            for batch in order:
                x = jittered(data.x[batch], rng)
                losses.append(training_step(model, optimizer, x, data.y[batch]))
                # Without this, calls would queue up and the bar would run ahead of the machine.
                losses[-1].block_until_ready()
                last = f"test {history.accuracy[-1]:.2%}" if history.accuracy else ""
                advance(f"epoch {epoch}/{epochs}  loss {losses[-1]:.4f}  {last}")
            model.eval()
            history.loss.append(float(jnp.stack(losses).mean()))
            history.accuracy.append(float(accuracy(model, data.x_test, data.y_test)))
            if not console.is_terminal and (epoch % 5 == 0 or epoch == epochs):
                console.print(
                    f"  epoch {epoch:3}  loss {history.loss[-1]:.4f}  "
                    f"test accuracy {history.accuracy[-1]:.2%}"
                )
    return history


# --- against stock layers ------------------------------------------------------------------------


def compare(stock: TCN, ours: TCN, data: Data, console: Console) -> bool:
    """Whether two models give the same outputs and gradients on the held-out digits."""
    for model in (stock, ours):
        model.eval()

    @nnx.jit
    def results(model, x, y):
        gradients, outputs = nnx.grad(loss_of, has_aux=True)(model, x, y)
        return outputs, gradients

    # Otherwise an accelerator may round float32 products, each implementation its own way.
    with jax.default_matmul_precision("highest"):
        expected, actual = (results(m, data.x_test, data.y_test) for m in (stock, ours))
    same = True
    for what, a, b in zip(("outputs", "gradients"), expected, actual, strict=True):
        off = _measure.difference(a, b)
        fine = off <= TOLERANCE  # False for NaN
        same &= fine
        console.print(
            f"{what} against stock nnx.Conv: "
            + ("[green]same[/green]" if fine else "[bold red]NOT the same[/bold red]")
            + f", off by {off:.1e} of the largest ({TOLERANCE:.0e} allowed)"
        )
    return same


# --- published layers ----------------------------------------------------------------------------


def measure(
    names: Iterable[str], implementation: Implementation, quick: bool, console: Console
) -> list[Measurement]:
    """Forward pass and training step of each layer, stock against ours."""
    layers = [_layers.fit(_layers.find(name), jax.default_backend()) for name in names]
    measurements = []
    with progress(console, "timing", len(layers) * len(PASSES)) as advance:
        for layer in layers:
            for which in PASSES:
                advance(f"{layer.name}, {which}", 0)
                measurements.append(
                    _measure.compare(
                        layer,
                        which,
                        implementation=implementation,
                        settings=_measure.QUICK if quick else SETTINGS,
                    )
                )
                advance(f"{layer.name}, {which}")
                if not console.is_terminal:
                    console.print(f"  {layer.name}, {which}: × {_times(measurements[-1])}")
    return measurements


def table(measurements: Iterable[Measurement]) -> Table:
    """A line for each layer: both passes, milliseconds and how many times faster ours is."""
    caption = (
        "ms: the median call; ×: the median of stock / ours over rounds that took turns;\n"
        "same: both compile to the same program, and what differs is noise"
    )
    result = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False)
    result.add_column("layer")
    for which in PASSES:
        for column in (f"{which}\nstock ms", "\nours ms", "\n×"):
            result.add_column(column, justify="right", no_wrap=True)
    for layer, passes in by_layer(measurements).items():
        cells = []
        for which in PASSES:
            if which in passes:
                m = passes[which]
                cells += [_ms(m.time(STOCK).median), _ms(m.time(OURS).median)]
                cells += [_ratio(m)]
            else:
                cells += [""] * 3
        result.add_row(f"{layer.name}\n[dim]{geometry(layer)}[/dim]", *cells)
    if any(layer != _layers.find(layer.name) for layer in by_layer(measurements)):
        result.caption += "\n*: shortened for a CPU; channels, taps and dilation are the published"
    return result


def by_layer(measurements: Iterable[Measurement]) -> dict[_layers.Layer, dict[str, Measurement]]:
    """The passes of each layer."""
    result: dict[_layers.Layer, dict[str, Measurement]] = {}
    for m in measurements:
        result.setdefault(m.layer, {})[m.which] = m
    return result


def geometry(layer: _layers.Layer) -> str:
    """The layer's sizes, with a star where they are not the published ones."""
    return f"{layer}{'' if layer == _layers.find(layer.name) else ' *'}"


def _ms(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def _ratio(m: Measurement) -> str:
    text = _times(m)
    if m.identical:
        return f"[dim]{text}[/dim]"
    ratio = m.speedup.median
    color = "green" if ratio >= 1.05 else "red" if ratio < 0.95 else "default"
    return f"[{color}]{text}[/{color}]"


def _times(m: Measurement) -> str:
    """The ratio; where nothing but noise can be in it, that is said instead of it."""
    ratio = m.speedup.median
    return "same" if m.identical else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


# --- showing it ----------------------------------------------------------------------------------


@contextlib.contextmanager
def progress(console: Console, what: str, total: int) -> Iterator:
    """A live bar on a terminal, nothing elsewhere; yields ``advance(text, steps=1)``."""
    with Progress(
        TextColumn(f"{what:9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda text, steps=1: bar.update(task, advance=steps, description=text)


def plot_training(history: History, path: Path) -> None:
    """Training loss and test accuracy by epoch, as PNG."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(history.loss) + 1)
    left.semilogy(epochs, history.loss, color=BLUE, marker="o", markersize=3)
    left.set(title="Training loss", xlabel="epoch", ylabel="cross entropy")
    right.plot(epochs, [100 * a for a in history.accuracy], color=BLUE, marker="o", markersize=3)
    right.axhline(97, color=GREY, linewidth=1, linestyle="--")
    right.annotate("97 %", (1, 97), (0, 3), textcoords="offset points", color=GREY, fontsize=8)
    right.set(title="Test accuracy", xlabel="epoch", ylabel="%")
    right.annotate(
        f"{history.accuracy[-1]:.2%}",
        (epochs[-1], 100 * history.accuracy[-1]),
        (0, 6),
        textcoords="offset points",
        ha="right",
    )
    right.set_ylim(top=101)
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        _plain(axes)
    figure.savefig(path, dpi=150)


def plot_speedup(measurements: Iterable[Measurement], host: dict, path: Path) -> None:
    """How many times faster ours is, a pair of bars for each layer, as PNG."""
    layers = by_layer(measurements)
    figure = Figure(figsize=(8, 1.6 + 0.45 * len(layers)), layout="constrained")
    axes = figure.subplots()
    height = 0.38
    colors = {FORWARD: BLUE, STEP: ORANGE}
    for shift, (which, color) in zip((-height / 2, height / 2), colors.items(), strict=True):
        for row, passes in enumerate(layers.values()):
            m = passes[which]
            ratio = m.speedup
            # Bars begin at 1, the stock layer: to the right faster, to the left slower.
            axes.barh(
                row + shift,
                ratio.median - 1,
                height,
                left=1,
                color=color,
                alpha=0.4 if m.identical else 1,
                xerr=[[ratio.median - ratio.low], [ratio.high - ratio.median]],
                error_kw={"ecolor": "#333333", "elinewidth": 1},
            )
            axes.annotate(
                _times(m),
                (max(ratio.high, 1), row + shift),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    axes.axvline(1, color="#333333", linewidth=1)
    axes.set_xscale("log")
    low = min(p.speedup.low for passes in layers.values() for p in passes.values())
    high = max(p.speedup.high for passes in layers.values() for p in passes.values())
    axes.set_xlim(min(low, 0.8) / 1.1, max(high, 2) * 2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(layers)), [f"{la.name}\n{geometry(la)}" for la in layers], fontsize=8)
    axes.set_ylim(len(layers) - 0.4, -0.6)  # the first on top
    axes.set_title("Times faster than stock nnx.Conv", loc="left")
    axes.set_xlabel(
        f"JAX {host['jax']} on {host['device']} ({host['cpu']}, {host['cores']} cores); "
        "whiskers are quartiles, * is shortened for a CPU,\n"
        "same: both compile to the same program, and what differs is noise",
        fontsize=8,
    )
    handles = [Patch(color=color, label=which) for which, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
    _plain(axes)
    axes.grid(axis="y", visible=False)
    figure.savefig(path, dpi=150)


def _plain(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e5e8", linewidth=0.8)
    axes.set_axisbelow(True)
