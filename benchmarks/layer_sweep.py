"""Times layers on this machine, stock nnx.Conv against ours: forward pass and training step.

    python -m benchmarks.layer_sweep [--quick] [--layers TEXT] [--json PATH]

Both take turns, and their ratio is taken turn by turn; see `conv_pallas._measure`. On a CPU the
larger layers are cut down in N and T (`conv_pallas._layers.fit`), and their row says so.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.layers import LAYERS, quick
from conv_pallas import _layers, _measure, dispatch
from conv_pallas._layers import Layer
from conv_pallas._measure import OURS, PASSES, STOCK, Measurement, Settings

# Below this a layer counts as slower; closer to 1 is noise.
SLOWER = 0.95


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    host = _measure.host() | {"commit": commit()}
    settings = _measure.QUICK if options.quick else Settings()
    measurements: list[Measurement] = []
    status = 0
    try:
        measure(options.layers, options.passes, options.implementation, settings, console,
                measurements.append)  # fmt: skip
    except KeyboardInterrupt:
        console.print("interrupted: what follows was measured before")
        status = 130
    except _measure.DisagreementError as e:
        console.print(f"[bold red]{e}[/bold red]")
        status = 1
    if measurements:
        console.print(table(measurements))
        console.print(summary(measurements))
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            stored = result(host, settings, options.implementation, measurements)
            options.json.write_text(as_json(stored), encoding="utf-8")
            console.print(f"wrote {options.json}")
    return status


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layer_sweep", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="fewer layers, and less time for each")
    parser.add_argument(
        "--layers", metavar="TEXT", help="only those whose name contains one of these words: a,b,c"
    )
    parser.add_argument(
        "--pass", choices=PASSES, dest="passes", help="only one of the two (default: both)"
    )
    parser.add_argument(
        "--implementation", metavar="NAME", help=f"one of {', '.join(dispatch.IMPLEMENTATIONS)}"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the result")
    options = parser.parse_args(argv)
    try:
        if options.implementation is not None:
            dispatch.canonicalize(options.implementation)
        layers = quick() if options.quick else LAYERS
        options.layers = _layers.select(options.layers, layers) if options.layers else layers
    except ValueError as e:
        parser.error(str(e))
    options.passes = (options.passes,) if options.passes else PASSES
    return options


def measure(
    layers: Sequence[Layer],
    passes: Sequence[str],
    implementation: str | None,
    settings: Settings,
    console: Console,
    keep: Callable[[Measurement], Any],
) -> None:
    """Hands every measurement to ``keep`` as soon as it is there."""
    with Progress(
        TextColumn("timing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.description}"), console=console, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=len(layers) * len(passes))
        for published in layers:
            layer = _layers.fit(published, jax.default_backend())
            for which in passes:
                bar.update(task, description=f"{layer.name}, {which}")
                m = _measure.compare(layer, which, implementation=implementation, settings=settings)
                keep(m)
                bar.update(task, advance=1)
                if not console.is_terminal:
                    console.print(f"{layer.name}, {which}: {m.speedup.median:.2f}", soft_wrap=True)


def table(measurements: Sequence[Measurement]) -> Table:
    """One line for each measurement, the losing ones in red."""
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left", caption=(
        "ms: the median call; ×: the median of stock / ours over rounds that took turns, and its\n"
        "quartiles; =: both compiled to the same program; *: N or T cut down for a CPU"
    ))  # fmt: skip
    for column in ("layer", "kind", "size", "pass"):
        rows.add_column(column)
    for column in ("stock ms", "ours ms", "×", "quartiles", ""):
        rows.add_column(column, justify="right", no_wrap=True)
    for m in measurements:
        ratio = m.speedup
        color = "red" if ratio.median < SLOWER else "green" if ratio.median > 1.05 else "default"
        rows.add_row(
            m.layer.name,
            kind(m.layer),
            f"{m.layer}{'' if m.layer == published(m.layer) else ' *'}",
            m.which,
            f"{1e3 * m.time(STOCK).median:.2f}",
            f"{1e3 * m.time(OURS).median:.2f}",
            f"[{color}]{ratio.median:.2f}[/{color}]",
            f"{ratio.low:.2f}-{ratio.high:.2f}",
            "=" if m.identical else "",
        )
    return rows


def summary(measurements: Sequence[Measurement]) -> str:
    """How many are faster and slower, and which are slower."""
    ratios = [m.speedup.median for m in measurements]
    slower = sorted((m for m in measurements if m.speedup.median < SLOWER),
                    key=lambda m: m.speedup.median)  # fmt: skip
    lines = [
        f"{len(ratios)} measured, {sum(r > 1.05 for r in ratios)} faster than 1.05, "
        f"{len(slower)} slower than {SLOWER}"
    ]
    lines += [
        f"  {m.layer.name}, {m.which}: {m.speedup.median:.2f} "
        f"({m.speedup.low:.2f}-{m.speedup.high:.2f})"
        + (", and both run the same program" if m.identical else "")
        for m in slower
    ]
    return "\n".join(lines)


def result(
    host: dict[str, Any],
    settings: Settings,
    implementation: str | None,
    measurements: Sequence[Measurement],
) -> dict[str, Any]:
    """What is stored: enough to draw every table and picture from."""
    return {
        "format": 1,
        "host": host,
        "settings": dataclasses.asdict(settings),
        "implementation": implementation,
        "measurements": [
            {
                "layer": dataclasses.asdict(m.layer) | {"kind": kind(m.layer)},
                "published": {"N": published(m.layer).N, "T": published(m.layer).T},
                "pass": m.which,
                "seconds": {name: [float(f"{s:.4g}") for s in t] for name, t in m.seconds.items()},
                "stock_ms": round(1e3 * m.time(STOCK).median, 4),
                "ours_ms": round(1e3 * m.time(OURS).median, 4),
                "speedup": {k: round(v, 4) for k, v in dataclasses.asdict(m.speedup).items()},
                "identical_program": m.identical,
                "difference": m.difference,
            }
            for m in measurements
        ],
    }


def as_json(stored: dict[str, Any]) -> str:
    """JSON with one line for each measurement, so that a diff shows which ones changed."""
    head = [
        f'"{key}": {json.dumps(value)}' for key, value in stored.items() if key != "measurements"
    ]
    rows = ",\n  ".join(json.dumps(m) for m in stored["measurements"])
    lines = ",\n ".join([*head, f'"measurements": [\n  {rows}\n ]'])
    return f"{{\n {lines}\n}}\n"


def kind(layer: Layer) -> str:
    return layer.kind if layer.dtype == "float32" else f"{layer.kind} {layer.dtype}"


def published(layer: Layer) -> Layer:
    """The layer before it was cut down."""
    return _layers.find(layer.name, LAYERS)


def commit() -> str | None:
    """Of the checkout, with a plus where it has changes; None outside one."""
    folder = Path(__file__).parent
    try:
        git = [
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return git[0].stdout.strip() + ("+" if git[1].stdout else "")


if __name__ == "__main__":
    sys.exit(main())
