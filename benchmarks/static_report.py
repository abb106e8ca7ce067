"""The estimates of `benchmarks.static` as a table, and the goals set for them.

    python -m benchmarks.static_report [FILE ...] [--layers TEXT]

Reads result files, by default those that are committed; compiles nothing. Figures are estimates
from compiler output, none is a measured time.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.layers import LAYERS
from benchmarks.static import ALONE, LINKS, OURS, RESULTS, XLA, ratio
from conv_pallas import aot, explain
from conv_pallas._layers import find
from conv_pallas.inspection import structs
from conv_pallas.spec import OPERATIONS


@dataclasses.dataclass(frozen=True)
class Goal:
    """What every row of ``layer``'s programs, of which ``program`` is a part, should reach."""

    what: str
    layer: str
    program: str
    least: dict[str, float]  # by chip


BOTH = ("v5e", "v6e")
GOALS = (
    Goal("chain of four, C=128 K=3 D=4", "chain/C128", f"{LINKS} layers", dict.fromkeys(BOTH, 1.2)),
    Goal("chain of four, C=256 K=7 D=64", "chain/C256", f"{LINKS} layers",
         {"v5e": 1.1, "v6e": 1.8}),
    Goal("depthwise", "depthwise", "", dict.fromkeys(BOTH, 5.0)),
)  # fmt: skip
WITHIN = 1.25  # of the bound of the matrix unit, forward
BOUNDED = "bfloat16/C256"


def bound(estimate: dict) -> str:
    """Which of the three bounds is the estimate."""
    return max(("bundles", "mxu", "memory"), key=estimate.__getitem__)


def is_default(chip: str, row: dict) -> bool:
    """Whether our kernel runs this single operation on ``chip`` where none is asked for."""
    layer = find(row["layer"], LAYERS + ALONE)
    with aot.as_on(chip):
        told = explain(*structs(layer)[:2], platform="tpu", **layer.geometry)
    return told.chosen[row["program"]] == OURS


class Verdict(NamedTuple):
    """On one goal and one program.

    Attributes:
      reached: None where there is no estimate, of such a program, of ours or of XLA's; then the
        goal is not met.
      ceiling: what a program would reach that kept the matrix unit or memory busy all the time,
        with the bytes that ours moves. XLA's own may be at a bound too, so that no kernel is ahead.
    """

    goal: str
    name: str
    reached: float | None
    least: float
    met: bool
    ceiling: float | None = None


def ceiling(row: dict) -> float:
    """See `Verdict`."""
    return ratio(row) * row[OURS]["estimate"] / max(row[OURS]["mxu"], row[OURS]["memory"])


def judge(chip: str, rows: Sequence[dict]) -> list[Verdict]:
    """For each goal and each program that it is about."""
    told = []
    for goal in GOALS:
        least = goal.least[chip]
        of = [r for r in rows if goal.layer in r["layer"] and goal.program in r["program"]]
        told += [_verdict(goal.what, row, least) for row in of]
        if not of:
            told.append(Verdict(goal.what, "not estimated", None, least, False))
    forward = [r[OURS] for r in rows if BOUNDED in r["layer"] and r["program"] == "conv1d"]
    for estimate in forward:
        over = estimate["estimate"] / estimate["mxu"] if "estimate" in estimate else None
        goal = "over the matrix unit's bound, at most"
        told.append(Verdict(goal, BOUNDED, over, WITHIN, over is not None and over <= WITHIN))
    for row in rows:
        if row["program"] in OPERATIONS and is_default(chip, row):
            told.append(_verdict("a single operation that is the default", row, 1.0))
    return told


def _verdict(goal: str, row: dict, least: float) -> Verdict:
    """On how many times faster than XLA's a program is; a side of it may fail or be unreadable."""
    name, reached = f"{row['layer']}, {row['program']}", ratio(row)
    if reached is None:
        return Verdict(goal, name, None, least, False)
    return Verdict(goal, name, reached, least, reached >= least, ceiling(row))


def table(result: dict, rows: Sequence[dict]) -> Table:
    """One line for each program; times in µs at the chip's clock, all estimated."""
    each = 1e6 / result["clock"]
    title = (
        f"{result['chip']}, libtpu {result['libtpu']}, jax {result['jax']}: estimates from "
        "compiler output, not measured times"
    )
    out = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for column in ("layer", "size", "dtype", "program"):
        out.add_column(column, no_wrap=True)
    for column in ("XLA µs", "ours µs", "XLA / ours", "ours bound by", "matrix unit", "spills"):
        out.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        theirs = [row[i]["estimate"] for i in XLA if "estimate" in row.get(i, {})]
        ours, against = row[OURS], ratio(row)
        if "estimate" not in ours:
            told = ["-", "-", "fails" if "fails" in ours else "declines", "-", "-"]
        else:
            color = "default" if against is None else "red" if against < 1 else "green"
            told = [
                f"{ours['estimate'] * each:.1f}",
                "-" if against is None else f"[{color}]{against:.2f}[/{color}]",
                bound(ours),
                f"{ours['mxu'] / ours['estimate']:.0%}",
                str(ours["spills"]),
            ]
        xla = f"{min(theirs) * each:.1f}" if theirs else "-"
        out.add_row(row["layer"], row["geometry"], row["dtype"], row["program"], xla, *told)
    return out


def _told(verdict: Verdict) -> str:
    figure = "none" if verdict.reached is None else f"{verdict.reached:.2f}"
    mark = "[green]met    [/green]" if verdict.met else "[red]not met[/red]"
    line = f"{mark} {verdict.goal} {verdict.least}: {figure}  {verdict.name}"
    if verdict.met or verdict.ceiling is None:
        return line
    return f"{line} (at the bound of matrix unit or memory it would be {verdict.ceiling:.2f})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static_report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--layers", default="", metavar="TEXT", help="names that contain it")
    options = parser.parse_args(argv)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    for file in options.files or sorted(RESULTS.glob("*.json")):
        result = json.loads(file.read_text())
        console.print(table(result, [r for r in result["rows"] if options.layers in r["layer"]]))
        for verdict in judge(result["chip"], result["rows"]):
            console.print(_told(verdict), soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
