"""Draws a stored result as one page, or compares two.

    python -m benchmarks.report RESULT.json [OTHER.json] [--output PAGE.html]

The page is one file and needs no network. With a second result it tells what changed between
the two, on the screen as well, and in how many layers both rank the variants alike.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import charts, page_style, ranking, stored
from benchmarks.baselines import BARRIER, MATMULS, SYMMETRIC, TORCH
from benchmarks.charts import Series, escape
from benchmarks.networks import Network
from benchmarks.on_device import lines_of
from conv_pallas._measure import FORWARD, OURS, PASSES, STOCK

RESULTS = Path(__file__).parent / "results"
STATIC_TPU = RESULTS / "tpu-static"
# Below this a layer counts as slower, above its inverse as faster; in between is noise.
SLOWER = 0.95

STYLES = {
    STOCK: "stock", BARRIER: "barrier", SYMMETRIC: "symmetric", MATMULS: "matmuls",
    TORCH: "torch", OURS: "ours",
}  # fmt: skip


def style(name: str) -> str:
    return STYLES.get(name, "other")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument(
        "other", type=Path, nargs="?", metavar="OTHER.json", help="how it was before"
    )
    parser.add_argument(
        "--output", type=Path, metavar="PAGE.html",
        help="default: beside RESULT.json; with two results no page unless it is named here",
    )  # fmt: skip
    options = parser.parse_args(argv)
    output = options.output
    if output is None and options.other is None:
        output = options.result.with_suffix(".html")
    try:
        result = stored.read(options.result)
        other = stored.read(options.other) if options.other else None
        if output is not None:
            output.write_text(page(result, other, name=options.result.name), encoding="utf-8")
    except stored.BadResultError as e:
        parser.error(str(e))
    except OSError as e:
        parser.error(f"--output must be a file that can be written to: {e}")
    if other is not None:
        print_changes(changes(result, other))
        print(ranking.agreement(result, other))
    if output is not None:
        print(f"wrote {output}")
    return 0


def page(
    result: Mapping[str, Any], other: Mapping[str, Any] | None = None, *, name: str = ""
) -> str:
    """The whole page.

    Args:
      name: of the file that the result is in.
    """
    sections = [
        ("Speed-up of each layer", speedups(result)),
        ("How far from the limit", rooflines(result)),
        ("Time against dilation", dilations(result)),
        ("Time against length", lengths(result)),
        ("Memory", memory(result)),
        ("All variants of all layers", everything(result)),
    ]
    if other is not None:
        sections.insert(0, ("Against another result", comparison(result, other)))
    sections += static_tpu(STATIC_TPU) + device_results(RESULTS)
    body = "".join(f"<section><h2>{title}</h2>{text}</section>" for title, text in sections if text)
    return page_style.PAGE.format(
        style=page_style.STYLE,
        script=page_style.SCRIPT,
        title=f"conv_pallas on {escape(_device(result['host']))}",
        head=head(result, name),
        body=body,
    )


def _device(host: Mapping[str, Any]) -> str:
    if host["platform"] == "cpu":
        return stored.processor(host)
    return str(host["device"])


# --- the head ------------------------------------------------------------------------------------


def head(result: Mapping[str, Any], name: str) -> str:
    host, limits = result["host"], result["ceilings"]
    found = [m for m in result["measurements"] if "speedup_over_fastest" in m]
    stock, fastest = (
        [m[key]["median"] for m in found] for key in ("speedup", "speedup_over_fastest")
    )
    count = f"of {len(found)} passes"
    tiles = [
        (len({m["layer"]["name"] for m in result["measurements"]}), "layers and stacks"),
        (sum(r > 1 / SLOWER for r in stock), f"{count} faster than stock"),
        (sum(r > 1 / SLOWER for r in fastest), f"{count} faster than the fastest baseline"),
        (sum(r < SLOWER for r in fastest), f"{count} slower than the fastest baseline"),
    ]
    tiles += [(f"{charts.number(limits['bytes'], ' ')}B/s", "of a large copy")]
    tiles += [
        (f"{charts.number(v, ' ')}FLOP/s", f"of a large {k} matmul")
        for k, v in limits.items()
        if k != "bytes"
    ]
    shown = "".join(f"<div class=tile><b>{v}</b><span>{escape(k)}</span></div>" for v, k in tiles)
    versions = ", ".join(
        f"{k} {host[k]}"
        for k in ("jax", "jaxlib", "flax", "numpy", "python", "conv_pallas", "triton", "jax-triton",
                  "libtpu", "torch", "driver")
        if host.get(k)
    )  # fmt: skip
    commit = f", commit {host['commit'][:10]}" if host.get("commit") else ""
    return (
        f"<h1>{escape(_device(host))}</h1>"
        f"<p class=sub>{escape(host['date'][:16].replace('T', ' '))} UTC, {escape(versions)}"
        f"{escape(commit)}{', ' + escape(name) if name else ''}</p>"
        f"<div class=tiles>{shown}</div>"
        f"<p>{escape(what_was_timed(result))} The variants took turns; a ratio is the median "
        "over turns. “Faster” and “slower” leave 5 % to noise. Where two variants compile to the "
        "same program they share one time. Layers with * have fewer or shorter sequences than "
        "published; channels, taps and dilation are kept.</p>"
    )


def what_was_timed(result: Mapping[str, Any]) -> str:
    """What the variants compute, and what they were compared with before."""
    rows = result["measurements"]
    stacks = [m for m in rows if m["layer"]["kind"] == Network.kind]
    layers = [m for m in rows if m not in stacks]
    told = []
    if layers:
        smaller = any(v.get("checked") for m in layers for v in m["variants"].values())
        told.append(
            "Every variant of a layer computes activation(conv(x, kernel) + bias), and was checked "
            "against the formula in float64 before it was timed"
            + (", of large layers at a smaller size. " if smaller else ". ")
            + "A training step is the loss and its gradients by x, kernel and bias."
        )
    if stacks:
        told.append(
            "A whole network was checked against the same network of stock layers, its only "
            "baseline; its training step is one of gradient descent, its parameters donated."
        )
    return " ".join(told)


# --- charts --------------------------------------------------------------------------------------


def _rows_of(result, which):
    return [m for m in result["measurements"] if m["pass"] == which]


def _name(m: Mapping[str, Any]) -> str:
    return m["layer"]["name"] + (" *" if m["cut_down"] else "")


def speedups(result: Mapping[str, Any]) -> str:
    """For each layer how many times faster ours is, than stock and than the fastest baseline."""
    parts = []
    for which in PASSES:
        found = [m for m in _rows_of(result, which) if "speedup" in m]
        if not found:
            continue
        series = [
            Series(label, shade, [(m[key]["median"], i) for i, m in enumerate(found)],
                   [_tip(m, key) for m in found])
            for key, label, shade in (
                ("speedup", "stock nnx.Conv", "stock"),
                ("speedup_over_fastest", "the fastest baseline", "ours"),
            )
        ]  # fmt: skip
        chart = charts.rows(
            [_name(m) for m in found], series, title=f"Times faster, {which}", told="fastest",
            unit=lambda v: f"{v:.2f}" if v < 10 else f"{v:.0f}",
        )  # fmt: skip
        parts.append(f"<figure><figcaption>{which.capitalize()}</figcaption>{chart}</figure>")
    keys = charts.legend(
        [("ours against stock", "stock"), ("against the fastest baseline", "ours")]
    )
    return (
        "<p>Times faster; right of the line is faster. The number is that against the fastest "
        f"baseline.</p>{keys}<div class=pair>{''.join(parts)}</div>"
    )


def _tip(m: Mapping[str, Any], key: str) -> str:
    s = m[key]
    same = ", the same program" if s["same_program"] else ""
    return (
        f"{m['layer']['name']}, {m['pass']} ({m['layer']['size']}): {s['median']:.2f} times "
        f"{s['over']} ({_quartiles(m, key)}){same}"
    )


def _quartiles(m: Mapping[str, Any], key: str) -> str:
    """Of a ratio, and of how many turns: those that both took part in."""
    s, variants = m[key], m["variants"]
    names = (stored.program(variants, name) for name in (s["over"], m["ours"]))
    turns = min(len(variants[name]["seconds"]) for name in names)
    return f"quartiles {s['low']:.2f} to {s['high']:.2f} of {turns} turn{'s' * (turns > 1)}"


def rooflines(result: Mapping[str, Any]) -> str:
    """Ours and stock under the ceilings."""
    limits = result["ceilings"]
    parts = []
    for which in PASSES:
        series = []
        for name in (STOCK, None):
            points, tips = [], []
            for m in _rows_of(result, which):
                variant = m["variants"].get(name or m["ours"], {})
                if "tflops" in variant:
                    points.append((m["operations"] / m["bytes"], variant["tflops"] * 1e12))
                    tips.append(
                        f"{m['layer']['name']}, {m['pass']}, {name or m['ours']}: "
                        f"{variant['tflops']:.3g} TFLOP/s, {variant['gbps']:.3g} GB/s, "
                        f"{variant['roofline']:.0%} of the limit"
                    )
            series.append(Series(name or OURS, "stock" if name else "ours", points, tips))
        chart = charts.roofline(
            series, limits["bytes"], {k: v for k, v in limits.items() if k != "bytes"}
        )
        if chart:
            parts.append(f"<figure><figcaption>{which.capitalize()}</figcaption>{chart}</figure>")
    keys = charts.legend([("ours", "ours"), ("stock", "stock")])
    copied = "over what it wrote before"
    if "copy_in_place" not in result:
        copied = (
            "into fresh memory (where that is slower, as on a CPU, shares of the limit are several "
            "times too high)"
        )
    return (
        f"<p>Both ceilings were measured in the same run: a large copy {copied} and a large "
        "matmul. Bytes are those that must move where nothing moves twice; small arrays that stay "
        f"in a cache can be above the slope.</p>{keys}<div class=pair>{''.join(parts)}</div>"
    )


def _curves(found: Sequence[Mapping], x: str) -> list[Series]:
    """Nanoseconds a step of the output, of each variant, over a field of the layer."""
    series = []
    for name in dict.fromkeys(n for m in found for n in m["variants"]):
        points, tips = [], []
        for m in sorted(found, key=lambda m: m["layer"][x]):
            variant = m["variants"].get(name, {})
            if "ms" in variant:
                steps = m["layer"]["N"] * m["layer"]["T"]
                points.append((m["layer"][x], 1e6 * variant["ms"] / steps))
                tips.append(
                    f"{name}, {m['layer']['size']}: {variant['ms']:.3g} ms, "
                    f"{points[-1][1]:.3g} ns a step"
                )
        if points:
            series.append(Series(name, style(name), points, tips))
    return sorted(series, key=lambda s: s.label == OURS)  # ours on top


def _multiples(result, groups, x: str, x_label: str) -> str:
    parts, names = [], {}
    for which in PASSES:
        for title, belongs in groups:
            found = [m for m in _rows_of(result, which) if belongs(m)]
            if len({m["layer"][x] for m in found}) < 3:
                continue
            series = _curves(found, x)
            names |= {s.label: s.style for s in series}
            short = "step" if which != FORWARD else which
            parts.append(charts.lines(series, title=f"{title}, {short}", x_label=x_label,
                                      y_label="ns a time step"))  # fmt: skip
    if not parts:
        return ""
    return f"{charts.legend(list(names.items()))}<div class=multiples>{''.join(parts)}</div>"


def dilations(result: Mapping[str, Any]) -> str:
    """A chart for each model that has at least three dilations."""
    models = dict.fromkeys(m["layer"]["name"].split("/")[0] for m in result["measurements"])
    groups = [
        (model, lambda m, model=model: m["layer"]["name"].startswith(f"{model}/D"))
        for model in models
    ]
    drawn = _multiples(result, groups, "D", "dilation")
    return drawn and (
        "<p>Dilation costs nothing where a curve is flat. Time is given for one step of one "
        f"sequence, as layers are cut down to different lengths.</p>{drawn}"
    )


def lengths(result: Mapping[str, Any]) -> str:
    groups = [
        (kind, lambda m, kind=kind: m["layer"]["name"].startswith(f"length/{kind}/"))
        for kind in ("dense", "depthwise")
    ]
    return _multiples(result, groups, "T", "T, steps of a sequence")


def memory(result: Mapping[str, Any]) -> str:
    """Peak memory of each variant against stock's."""
    parts, names = [], {}
    for which in PASSES:
        found = [m for m in _rows_of(result, which)
                 if m["variants"].get(STOCK, {}).get("memory") and m["ours"]]  # fmt: skip
        series = []
        for name in (BARRIER, MATMULS, OURS):
            points, tips = [], []
            for i, m in enumerate(found):
                peak = m["variants"].get(m["ours"] if name == OURS else name, {}).get("memory")
                if peak:
                    base = m["variants"][STOCK]["memory"]["peak"]
                    points.append((peak["peak"] / base, i))
                    tips.append(f"{m['layer']['name']}, {name}: {charts.number(peak['peak'])}B, "
                                f"stock {charts.number(base)}B")  # fmt: skip
            if points:
                series.append(Series(name, style(name), points, tips))
        names |= {s.label: s.style for s in series}
        chart = charts.rows([_name(m) for m in found], series,
                            title=f"Peak memory, {which}", told="ours",
                            unit=lambda v: f"{v:.2f}" if v < 10 else f"{v:.0f}")  # fmt: skip
        if chart:
            parts.append(f"<figure><figcaption>{which.capitalize()}</figcaption>{chart}</figure>")
    if not parts:
        return ""
    return (
        "<p>Arguments, results and temporaries as XLA planned them, over those of stock; left of "
        "the line is less. The number is ours.</p>"
        f"{charts.legend(list(names.items()))}<details><summary>Show all layers</summary>"
        f"<div class=pair>{''.join(parts)}</div></details>"
    )


# --- tables --------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """HTML with the first column as heads of the rows; cells are HTML already."""
    top = "".join(f"<th>{h}</th>" for h in head)
    lines = []
    for row, shade in zip(rows, classes or [""] * len(rows), strict=True):
        cells = "".join(f"<td>{cell}</td>" for cell in row[1:])
        lines.append(f'<tr class="{shade}"><th>{row[0]}</th>{cells}</tr>')
    return (
        f"<div class=scroll><table><thead><tr>{top}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def everything(result: Mapping[str, Any]) -> str:
    """One row for each pass of each layer, with every variant, the losing ones marked."""
    names = list(dict.fromkeys(n for m in result["measurements"] for n in m["variants"]))
    told = {n for m in result["measurements"] for n, v in m["variants"].items()
            if "ms" in v or v.get("refused")}  # fmt: skip
    timed = [n for n in names if n in told]
    rows, classes = [], []
    for m in result["measurements"]:
        ours = m["variants"].get(m["ours"] or "", {})
        row = [escape(_name(m)), escape(m["layer"]["size"]), escape(m["pass"])]
        row += [_cell(m["variants"].get(n)) for n in timed]
        ratio = None
        for key in ("speedup", "speedup_over_fastest"):
            row.append(_ratio(m, key))
            ratio = m.get(key, {}).get("median")
        row += [f"{ours[k]:.3g}" if k in ours else "" for k in ("tflops", "gbps")]
        row.append(f"{ours['roofline']:.0%}" if "roofline" in ours else "")
        peak = ours.get("memory", {}).get("peak")
        row.append(f"{peak / 1e6:.3g}" if peak else "")
        for variant in (m["variants"].get(STOCK, {}), ours):
            row.append(f"{variant['compile_s']:.2g}" if "compile_s" in variant else "")
        rows.append(row)
        wrong = any(v.get("refused") for v in m["variants"].values())
        classes.append("wrong" if wrong else "loss" if ratio and ratio < SLOWER else
                       "win" if ratio and ratio > 1 / SLOWER else "")  # fmt: skip
    head = ["layer", "size", "pass", *(f"{escape(n)}<br>ms" for n in timed), "× stock",
            "× fastest", "TFLOP/s", "GB/s", "of limit", "peak MB", "stock<br>compile s",
            "ours<br>compile s"]  # fmt: skip
    left = [n for n in names if n not in timed]
    note = ""
    if left:
        reasons = {n: next(m["variants"][n]["reason"] for m in result["measurements"]
                           if "reason" in m["variants"].get(n, {})) for n in left}  # fmt: skip
        note = "".join(f"<p>Not here: {escape(n)}: {escape(r)}.</p>" for n, r in reasons.items())
    return (
        "<p>Hover a time for its quartiles. TFLOP/s, GB/s, the share of the limit and the peak "
        f"memory are ours; compiling is timed once, with tracing.</p>{note}"
        '<p><input id=filter type=search placeholder="filter layers" aria-label="filter layers">'
        "</p>" + table(head, rows, classes)
    )


def _cell(variant: Mapping[str, Any] | None) -> str:
    if variant is None:
        return ""
    if "ms" not in variant:
        told = "wrong" if variant.get("refused") else "–"
        return f'<span title="{escape(variant.get("reason", ""))}">{told}</span>'
    low, high = variant["quartiles_ms"]
    same = f", the same program as {variant['same_as']}" if "same_as" in variant else ""
    text = f"{variant['ms']:.3g}"
    return (
        f'<span title="{low:.3g} to {high:.3g} ms{escape(same)}">{text}{"=" if same else ""}</span>'
    )


def _ratio(m: Mapping[str, Any], key: str) -> str:
    speedup = m.get(key)
    if speedup is None:
        return ""
    told = f"{_quartiles(m, key)}, against {speedup['over']}"
    text = "same" if speedup["same_program"] else f"{speedup['median']:.2f}"
    return f'<span title="{escape(told)}">{text}</span>'


CHANGES = ("layer", "pass", "ours before, ms", "ours now, ms", "× faster", "stock × faster")


def changes(result: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple]:
    """A row of `CHANGES` for each layer and pass that both have at the same size and dtype."""
    before = {ranking.key(m): m for m in other["measurements"]}
    rows = []
    for m in result["measurements"]:
        old = before.get(ranking.key(m))
        if old is None or not (m["ours"] and old["ours"]):
            continue
        new_ms, old_ms = (r["variants"][r["ours"]]["ms"] for r in (m, old))
        by_stock = [r["variants"].get(STOCK, {}).get("ms", float("nan")) for r in (old, m)]
        rows.append(
            (_name(m), m["pass"], old_ms, new_ms, old_ms / new_ms, by_stock[0] / by_stock[1])
        )
    return rows


def _change_cells(row: tuple) -> list[str]:
    name, which, *ms, ratio, stock = row
    return [name, which, *(f"{t:.3g}" for t in ms), f"{ratio:.2f}", f"{stock:.2f}"]


def print_changes(rows: Sequence[tuple]) -> None:
    """A table, those that changed most first."""
    shown = Table(box=box.SIMPLE_HEAD)
    for name in CHANGES:
        words = name in CHANGES[:2]
        shown.add_column(name, justify="left" if words else "right", no_wrap=words)
    for row in sorted(rows, key=lambda row: -abs(math.log(row[4]))):
        shown.add_row(*_change_cells(row))
    console = Console(highlight=False)
    console.width = max(console.width, 110)  # in a file too
    console.print(shown)


def comparison(result: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What changed from ``other`` to ``result``."""
    found, rows = ranking.agreement(result, other), changes(result, other)
    ratios = [row[4] for row in rows]
    classes = ["win" if ratio > 1.1 else "loss" if ratio < 0.9 else "" for ratio in ratios]
    middle = f"{statistics.median(ratios):.2f}" if ratios else "-"
    cells = [[escape(cell) for cell in _change_cells(row)] for row in rows]
    return (
        f"<p>The other: {escape(_device(other['host']))}, {escape(other['host']['date'][:16])}. "
        f"{escape(str(found))} The median layer is {middle} times as fast as there. Stock's own "
        "change shows how much of that is the machine.</p><details><summary>Each layer</summary>"
        + table(CHANGES, cells, classes)
        + "</details>"
    )


# --- what other tools left -----------------------------------------------------------------------


def static_tpu(folder: Path) -> list[tuple[str, str]]:
    """Figures from libtpu's schedules: estimates, and called so."""
    parts = []
    for file in sorted(folder.glob("*.json")):
        estimates = json.loads(file.read_text(encoding="utf-8"))
        rows = estimates["rows"]
        about = ", ".join(f"{k} {v}" for k, v in estimates.items() if not isinstance(v, list))
        parts.append(
            f"<details><summary>{escape(file.stem)}: {len(rows)} rows</summary>"
            f"<p>{escape(about)}</p>{_generic(rows)}</details>"
        )
    if not parts:
        return []
    note = (
        "<p>Read from the schedules that libtpu's compiler wrote, for chips that were not there: "
        "estimates, not measured speeds.</p>"
    )
    return [("TPUs, from the compiler's schedules", note + "".join(parts))]


def device_results(folder: Path) -> list[tuple[str, str]]:
    """Results of ``python -m benchmarks.on_device``: a folder for each device."""
    sections = []
    for device in sorted(p for p in folder.iterdir() if p.is_dir() and list(p.glob("*.jsonl"))):
        parts = []
        for file in sorted(device.glob("*.jsonl")):
            rows = lines_of(file)
            parts.append(
                f"<details><summary>{escape(file.stem)}: {len(rows)} rows</summary>"
                f"{_generic(rows)}</details>"
            )
        sections.append((f"Measured on {escape(device.name)}", "".join(parts)))
    return sections


def _generic(rows: Sequence[Mapping[str, Any]]) -> str:
    flat = [dict(_flat(row)) for row in rows]
    head = list(dict.fromkeys(k for row in flat for k in row))
    cells = [[_plain(row.get(k, "")) for k in head] for row in flat]
    return table([escape(h) for h in head], cells)


def _flat(row: Mapping[str, Any], prefix: str = ""):
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key} ")
        else:
            yield prefix + key, value


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value)[:80])


if __name__ == "__main__":
    sys.exit(main())
