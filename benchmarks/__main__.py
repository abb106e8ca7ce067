"""Times published layers on this machine: stock nnx.Conv, every honest baseline, and ours.

    python -m benchmarks [--quick] [--layers TEXT] [--implementation NAMES] [--dtype DTYPE]
                         [--pass NAME] [--tune] [--json PATH]

Every variant of a layer is checked against the formula in float64 before it is timed, and every
whole network against stock. Writes a JSON result, after each layer, and in the end a page beside
it, of the same name but for its ending. On a CPU the larger layers are cut down in N and T, and
their row says so.
"""

import argparse
import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import harness, layers, progress, report, stored
from benchmarks.harness import Measurement
from benchmarks.report import SLOWER
from benchmarks.truth import Truth
from conv_pallas import _neighbours, dispatch
from conv_pallas._layers import Layer, select
from conv_pallas._measure import OURS, PASSES, STOCK, Settings
from conv_pallas.dispatch import Implementation
from conv_pallas.explanation import default_platform
from conv_pallas.kernels import xla_tuned

OUTPUT = Path("bench-output")
DTYPES = ("float32", "bfloat16", "float16")
PICKED = "default"  # in --implementation


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=130)
    settings = harness.QUICK if options.quick else harness.FULL
    host = harness.host() | {"commit": stored.commit()}
    limits = harness.ceilings(sorted({s.dtype for s in options.subjects}))
    calmest: dict[tuple[layers.Subject, str], Measurement] = {}

    def keep(m: Measurement) -> None:
        before = calmest.setdefault((m.subject, m.which), m)
        if (m.others or 0.0) < (before.others or 0.0):
            calmest[m.subject, m.which] = m
        stored.write(options.json, stored.result(host, settings, limits, [*calmest.values()]))

    interrupted = False
    try:
        measure(
            options.subjects, options.passes, options.implementations, settings, console, keep,
            options.tune, again=not options.quick,
        )  # fmt: skip
    except KeyboardInterrupt:
        # A second one, while this is being dealt with, would lose what was measured.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        told = "what follows was measured before" if calmest else "nothing was measured yet"
        console.print(f"interrupted: {told}")
        interrupted = True
    measurements = [*calmest.values()]
    if not measurements:
        return 130
    # The machine may have been slow, or fast, when the ceilings were measured.
    again = harness.ceilings(limits.keys() - {"bytes"}) if not interrupted else limits
    limits = {name: max(limits[name], again[name]) for name in limits}
    result = stored.result(host, settings, limits, measurements)
    stored.write(options.json, result)
    console.print(table(result))
    console.print(summary(result))
    page = options.json.with_suffix(".html")
    page.write_text(report.page(result, name=options.json.name), encoding="utf-8")
    console.print(f"wrote {options.json} and {page}")
    return 130 if interrupted else int(any(refused(m) for m in measurements))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer layers, unless --layers says which, and less time for each",
    )
    parser.add_argument(
        "--layers", metavar="TEXT", help="only those whose name contains one of these words: a,b,c"
    )
    parser.add_argument(
        "--implementation",
        metavar="NAMES",
        help=f"of ours, with commas: {', '.join(dispatch.names())}; {PICKED} for what is picked; "
        "names with a plus between them are tried in that order, as onednn+xla "
        "(default: the one that is picked, and every other kernel that runs here but onednn, xla "
        "and xla_native)",
    )
    parser.add_argument(
        "--tune", action="store_true",
        help="on a CPU: measure which formulations are the fastest for each layer, for good, as "
        "conv_pallas.tuning.tune does, and time them beside what the rules choose",
    )  # fmt: skip
    parser.add_argument("--dtype", metavar="DTYPE", help=f"one of {', '.join(DTYPES)}, for all")
    parser.add_argument(
        "--pass", dest="passes", metavar="NAME", help="forward or training (default: both)"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        default=OUTPUT / "result.json",
        help="where to write the result; the page goes beside it (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    if options.tune and default_platform() != "cpu":
        parser.error("--tune is for CPUs; of a GPU python -m benchmarks.on_device does all")
    try:
        subjects = layers.quick() if options.quick else layers.ALL
        if options.layers is not None:
            subjects = select(options.layers, layers.ALL)
        if options.dtype is not None:
            if options.dtype not in DTYPES:
                raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {options.dtype}")
            subjects = [dataclasses.replace(s, dtype=options.dtype) for s in subjects
                        if isinstance(s, Layer)]  # fmt: skip
            if not subjects:
                raise ValueError(f"--dtype is for layers, and --layers={options.layers} selects "
                                 "whole networks alone")  # fmt: skip
        most = layers.MOST_IF_QUICK if options.quick else layers.MOST_ON_CPU
        options.subjects = [layers.fit(s, jax.default_backend(), most) for s in subjects]
        options.implementations = None
        if options.implementation is not None:
            options.implementations = [_order(n) for n in options.implementation.split(",")]
        options.passes = _passes(options.passes)
        if options.json.suffix != ".json":
            raise ValueError(f"--json must be a file that ends in .json, got {options.json}")
        options.json.parent.mkdir(parents=True, exist_ok=True)
        for path in (options.json, options.json.with_suffix(".html")):
            _check_writable(path)
    except ValueError as e:
        parser.error(str(e))
    except OSError as e:
        parser.error(f"--json must be a file in a folder that can be written to: {e}")
    return options


def _order(name: str) -> tuple[str, ...] | None:
    """One that ``--implementation`` tells of: None for what is picked, else names to try."""
    name = name.strip()
    if name == PICKED:
        return None
    names = [name] if name in dispatch.names() else [part.strip() for part in name.split("+")]
    if PICKED in names:
        raise ValueError(f"--implementation has {PICKED} by itself, not in an order as {name!r}")
    return dispatch.canonicalize(names)


def _check_writable(path: Path) -> None:
    """Leaves a file as it is, and none where there is none; OSError where it can't be written."""
    new = not path.exists()
    path.open("a").close()
    if new:
        path.unlink()


def _passes(name: str | None) -> tuple[str, ...]:
    if name is None:
        return PASSES
    found = tuple(p for p in PASSES if name and p.startswith(name))
    if not found:
        raise ValueError(f"--pass must be forward or training, got {name!r}")
    return found


def measure(
    subjects: Sequence[layers.Subject],
    passes: Sequence[str],
    implementations: Sequence[Implementation] | None,
    settings: Settings,
    console: Console,
    keep: Callable[[Measurement], Any],
    tuned: bool = False,
    again: bool = False,
) -> None:
    """Hands every measurement to ``keep`` as soon as it is there.

    Args:
      tuned: whether to tune each layer before, and time that beside what the rules choose.
      again: whether to time once more, after all others, what other programs disturbed. Those may
        be another virtual machine's, which come and go.
    """
    rules = xla_tuned.ignored() if tuned else contextlib.nullcontext()
    with rules, progress.bar("timing", console) as bar:
        task = bar.add_task("", total=len(subjects) * len(passes))

        def timed(subject, passes, tune=False) -> list[str]:
            """Returns which of the passes were disturbed."""
            truth = Truth(subject, default_platform()) if isinstance(subject, Layer) else None
            variants, disturbed = harness.variants_of(subject, implementations, tuned), []
            if tune:
                bar.update(task, description=f"{subject.name}, tuning")
                harness.tune(subject)
            for which in passes:
                bar.update(task, description=f"{subject.name}, {which}")
                m = harness.measure(
                    subject, which, variants=variants, settings=settings, truth=truth
                )
                keep(m)
                bar.update(task, advance=1)
                if _neighbours.disturbed(m.others):
                    disturbed.append(which)
                for reason in refused(m):
                    console.print(f"[bold red]refused: {reason}[/bold red]", soft_wrap=True)
                if not console.is_terminal:
                    told = {n: f"{1e3 * v.time.median:.3g}" for n, v in m.timed.items()}
                    text = ", ".join(f"{n} {ms} ms" for n, ms in told.items())
                    console.print(f"{subject.name}, {which}: {text}", soft_wrap=True)
            return disturbed

        found = [(subject, timed(subject, passes, tune=tuned)) for subject in subjects]
        if again and (count := sum(len(disturbed) for _, disturbed in found)):
            console.print(f"{count} were timed beside other programs, and are once more")
            bar.update(task, total=len(subjects) * len(passes) + count)
            for subject, disturbed in found:
                if disturbed:
                    timed(subject, disturbed)


def refused(m: Measurement) -> list[str]:
    """Of each variant whose result was wrong, where."""
    return [v.reason for v in m.variants.values() if v.refused]


def table(result: dict[str, Any]) -> Table:
    """One line for each measurement, the losing ones in red."""
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption_justify="left",
                 caption=(
        "ms: the median call. ×: ours against stock nnx.Conv, and against the fastest of all "
        "baselines, turn by turn;\nthe median and its quartiles; =: both compiled to the same "
        "program. of limit: the time at the measured\nceilings (a large copy in place, a large "
        "matmul) over ours, above 100 % where a cache\nholds what a copy of much does not, or "
        "where ours takes fewer products than the\ndefinition; *: N or T cut down for a CPU; "
        "× picked: what was asked for by name against\nwhat is picked"
    ))  # fmt: skip
    for column in ("layer", "pass"):
        rows.add_column(column, no_wrap=True)
    named = any({OURS} < {*_ours(m)} for m in result["measurements"])
    for column in ("stock ms", "fastest ms", "", "ours ms", "× stock", "× fastest", "quartiles",
                   "of limit", *["× picked"] * named):  # fmt: skip
        header, justify = column.replace(" ", "\n"), "right" if column else "left"
        rows.add_column(header, justify=justify, no_wrap=True)
    for m in result["measurements"]:
        variants, fastest = m["variants"], m["fastest_baseline"]
        name = m["layer"]["name"] + (" *" if m["cut_down"] else "")
        head = [name, "forward" if m["pass"] == harness.FORWARD else "step"]
        head += [_ms(variants.get(name, {})) for name in (STOCK, fastest)] + [fastest or ""]
        for name in _ours(m):
            which = f" {name}" if head[0] and name != OURS else ""
            head[0] = head[0] or f"  {'picked' if name == OURS else name}"
            if "ms" in variants[name] and "speedup" in m:
                stock, best = (stored.over(m, base, name) for base in (STOCK, fastest))
                cells = [_ms(variants[name]) + which, _colored(stock), _colored(best)]
                cells += [f"{best['low']:.2f}-{best['high']:.2f}"]
                cells += [f"{variants[name]['roofline']:.0%}"]
                if named and name != OURS and "ms" in variants.get(OURS, {}):
                    cells.append(_colored(stored.over(m, OURS, name)))
            else:
                cells = ["-" + which]
            rows.add_row(*head, *cells)
            head = [""] * len(head)
    return rows


def _ours(m: Mapping[str, Any]) -> list[str]:
    """Of a stored line the variants that are ours, first the one that it calls so."""
    found = [name for name in m["variants"] if harness.is_ours(name) and name != harness.TUNED]
    return sorted(found, key=lambda name: name != m["ours"])


def _ms(variant: dict[str, Any]) -> str:
    return f"{variant['ms']:.3g}" if "ms" in variant else "-"


def _colored(speedup: dict[str, Any]) -> str:
    if speedup["same_program"]:
        return "[dim]=[/dim]"
    ratio = speedup["median"]
    color = "red" if ratio < SLOWER else "green" if ratio > 1 / SLOWER else "default"
    return f"[{color}]{ratio:.2f}[/{color}]"


def summary(result: dict[str, Any]) -> str:
    """How many are faster and slower than the fastest baseline, and which are slower."""
    found = [m for m in result["measurements"] if "speedup_over_fastest" in m]
    ratio = lambda m: m["speedup_over_fastest"]["median"]  # noqa: E731
    slower = sorted((m for m in found if ratio(m) < SLOWER), key=ratio)
    faster = sum(ratio(m) > 1 / SLOWER for m in found)
    lines = [
        f"{len(found)} measured; against the fastest baseline {faster} are faster than "
        f"{1 / SLOWER:.2f} and {len(slower)} slower than {SLOWER}"
    ]
    lines += [
        f"  {m['layer']['name']}, {m['pass']}: {ratio(m):.2f} of {m['fastest_baseline']}"
        for m in slower
    ]
    beside = [m for m in found if stored.disturbed(m)]
    if beside:
        most = max(beside, key=lambda m: m["others"])
        lines.append(
            f"{len(beside)} were timed beside other programs, which took up to "
            f"{most['others']:.1f} cores ({most['layer']['name']}, {most['pass']}): time them again"
        )
    left = {
        (name, m["variants"][name]["reason"]): m
        for m in reversed(result["measurements"])
        for name in _ours(m)
        if "reason" in m["variants"][name]
    }
    lines += [
        f"{name} is left out, as of {m['layer']['name']}, {m['pass']}: {reason}"
        for (name, reason), m in reversed(left.items())
    ]
    lines += filter(None, (stored.of_tuning(result), stored.of_cores(result)))
    compiling = [
        (ours["compile_s"], stock["compile_s"], m)
        for m in found
        for ours, stock in [(m["variants"][m["ours"]], m["variants"][STOCK])]
        if "compile_s" in ours and "compile_s" in stock
    ]
    if compiling:
        ours, stock, m = max(compiling, key=lambda c: c[0] - c[1])
        lines.append(
            f"compiling took {sum(c[0] for c in compiling):.0f} s, stock's "
            f"{sum(c[1] for c in compiling):.0f} s; farthest apart for {m['layer']['name']}, "
            f"{m['pass']}: {ours:.1f} s and {stock:.1f} s"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
