"""Writes the README's figures from stored results, so that nobody types one.

python -m benchmarks.readme
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import device_layers, handoff, pages, stored
from benchmarks.baselines import BARRIER, MATMULS, SYMMETRIC, TORCH
from benchmarks.device_timing import verdicts
from benchmarks.on_device import lines_of
from benchmarks.report import SLOWER
from conv_pallas._layers import PUBLISHED
from conv_pallas._measure import OURS, PASSES, STOCK

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULT = ROOT / "benchmarks" / "results" / "cpu" / "layers.json"
# CPUs beside that of the table, measured by the rules alone.
OTHERS = {
    "an Intel processor": RESULT.with_stem("layers-intel"),
    "a CPU without AVX512": RESULT.with_stem("layers-avx2"),
}
COMMAND = "python -m benchmarks --tune --json benchmarks/results/cpu/layers.json"
GPU_RESULTS = ROOT / "benchmarks" / "results" / "nvidia-h200"
MARKS = "<!-- figures: written by benchmarks/readme.py -->", "<!-- end of figures -->"
GPU_MARKS = tuple(mark.replace("figures", "figures of a GPU") for mark in MARKS)
MEAN_MARKS = tuple(mark.replace("figures", "means") for mark in MARKS)
PAGED = (STOCK, OURS)
ONEDNN = "onednn+xla"  # as --implementation has it
FEW_CHANNELS, MANY_STEPS = 32, 4096  # fewer channels, and as many steps, of which oneDNN is ahead
FEW = f"dense layers of fewer than {FEW_CHANNELS} channels, and {MANY_STEPS} steps of all samples"
BASELINES = (STOCK, BARRIER, SYMMETRIC, MATMULS)
# Of a model, while others in that table are the far end of what a layer may be.
_PUBLISHED = {layer.name for layer in PUBLISHED if not layer.source.startswith("no model")}
DEFAULT = device_layers.DEFAULT  # in the lines of the sweep, where "ours" is Triton's


def means(result: dict[str, Any], folder: Path) -> str:
    """What it brings in single layers that somebody published, in a few lines.

    Args:
      result: what `RESULT` holds.
      folder: of `GPU_RESULTS`.
    """
    sweep = [line for line in lines_of(folder / "layers.jsonl") if line.get("layer") in _PUBLISHED]
    device = next(line["device"] for line in lines_of(folder / "goals.jsonl") if "device" in line)
    over_stock, over_fastest = [], []
    for which in PASSES:
        lines = [line for line in sweep if line.get("which") == which]
        seconds = [_medians(line, "seconds") for line in lines]
        over_stock.append(_mean(s[STOCK] / s[DEFAULT] for s in seconds if {STOCK, DEFAULT} <= {*s}))
        over_fastest.append(_mean(_ratio(x, "seconds", DEFAULT) for x in lines))
    return "\n".join(
        [
            "How many times as fast as stock `nnx.Conv`, forward and in a training step, by the "
            "geometric mean over single layers that somebody published (layer by layer, those that "
            "are as fast or slower among them, under [Measure](#measure)):",
            "",
            f"- on a CPU ({stored.processor(result['host'])}): {_by_kind(result['measurements'])}; "
            "and over the fastest of what a user could do by hand "
            f"{_by_kind(result['measurements'], 'speedup_over_fastest')};",
            f"- on an {device}: {' and '.join(over_stock)}; and {' and '.join(over_fastest)} times "
            "as fast as the fastest of what a user could do by hand.",
        ]
    )


def _by_kind(measurements: list[dict], over: str = "speedup") -> str:
    """Of each kind of published layer the geometric means over stock, say, of both passes."""
    kinds = {"dense": {}, "depthwise": {}, "transposed": {}}
    for m in measurements:
        layer = m["layer"]
        if layer["name"] in _PUBLISHED and over in m:
            kind = "transposed" if "transposed" in layer["kind"] else layer["kind"].split(",")[0]
            kinds[kind].setdefault(m["pass"], []).append(_of_programs(m[over]))
    told = ((kind, " and ".join(_mean(of[p]) for p in PASSES)) for kind, of in kinds.items())
    return ", ".join(f"{kind} {means}" for kind, means in told)


def _commit(host: dict[str, Any]) -> str:
    return f"commit {host['commit'][:7]} of {host['date'][:10]}"


def _of_programs(speedup: dict[str, Any]) -> float:
    """A ratio of times, which is 1 of two that compiled to the same program."""
    return 1.0 if speedup["same_program"] else speedup["median"]


def other_processor(which: str, source: Path, result: dict[str, Any]) -> str:
    """A paragraph on a CPU beside that of the table.

    Args:
      which: what it is, as `OTHERS` has it.
      source: where it is stored.
      result: what that holds.
    """
    everything = [m for m in result["measurements"] if "speedup_over_fastest" in m]
    found = [m for m in everything if not stored.disturbed(m)]
    ratios = {
        f"{m['layer']['name']}, {m['pass']}": _of_programs(m["speedup_over_fastest"]) for m in found
    }
    slower, least = [n for n, r in ratios.items() if r < SLOWER], min(ratios, key=ratios.get)
    host, left = result["host"], len(everything) - len(found)
    source = source.relative_to(ROOT)
    text = (
        f"On {which} ({stored.processor(host)}, JAX {host['jax']}; untuned; {_commit(host)}; "
        f"[{source}]({source})), by the geometric mean over published layers, forward and in a "
        f"training step over stock: {_by_kind(found)}. Of {len(found)} passes {len(slower)} are "
        f"slower than {SLOWER:g} times the fastest baseline's speed, the slowest {least} "
        f"({_digits(ratios[least])})"
    )
    text += f"; {left} more, which other programs disturbed, are left out." if left else "."
    return f"{text}\n\n{by_name(result | {'measurements': found})}".rstrip()


def by_name(result: dict[str, Any]) -> str:
    """What `ONEDNN` is beside what is picked; empty where they were not compared."""
    groups: dict[str, dict[str, list[float]]] = {}
    for m, ratio in stored.over_ours(result, ONEDNN)[0]:
        if (of := _few_channels(m["layer"])) is not None:
            groups.setdefault(of, {}).setdefault(m["pass"], []).append(ratio)
    if not groups:
        return ""
    told = []
    for of, passes in sorted(groups.items()):
        means = " and ".join(_mean(passes[p]) for p in PASSES if p in passes)
        every = [ratio for ratios in passes.values() for ratio in ratios]
        told.append(f"{of} {means} ({_digits(min(every))} to {_digits(max(every))})")
    order = ", ".join(f'"{name}"' for name in ONEDNN.split("+"))
    variants = [m["variants"].get(ONEDNN, {}) for m in result["measurements"]]
    refused = sum(bool(of.get("refused")) for of in variants)
    left = f"; {refused} that differed too much from stock's are left out" if refused else ""
    return (
        f"How many times as fast as what is picked `implementation=({order})` is on it, of layers "
        f"without strides, forward and in a training step: {'; '.join(told)}{left}."
    )


def _few_channels(layer: dict[str, Any]) -> str | None:
    """Of which layers it is; None where there is a stride, whose gradient it leaves to XLA."""
    if "S" not in layer:
        return "whole networks"
    if layer["S"] > 1 or layer["E"] > 1:
        return None
    if layer["G"] > 1:
        return "grouped ones"
    few = max(layer["C"], layer["O"]) < FEW_CHANNELS and layer["N"] * layer["T"] >= MANY_STEPS
    return FEW if few else "other dense ones"


def figures(result: dict[str, Any]) -> str:
    """A Markdown table: for each model, how many times faster ours is in its layers.

    Args:
      result: what `RESULT` holds.
    """
    host = result["host"]
    models: dict[str, dict[str, list[dict]]] = {}
    for m in result["measurements"]:
        model, _, rest = m["layer"]["name"].partition("/")
        if rest == "stack":
            model += ", whole network"
        models.setdefault(model, {}).setdefault(m["pass"], []).append(m)
    compiling = _compiling(result["measurements"])
    depthwise = [m for m in result["measurements"] if m["layer"]["kind"].startswith("depthwise")]
    rows = []
    for model, passes in models.items():
        kinds = sorted({m["layer"]["kind"] for ms in passes.values() for m in ms})
        cells = [
            _cell([m[key] for m in passes.get(which, []) if key in m])
            for which in PASSES
            for key in ("speedup", "speedup_over_fastest")
        ]
        rows.append(f"| {model} | {'; '.join(kinds)} | {' | '.join(cells)} |")
    source = RESULT.relative_to(ROOT)
    page = source.with_suffix(".html")
    layers = [m["layer"] for m in result["measurements"]]
    upsampling = {a["name"].partition("/")[0]: None for a in layers if a.get("E", 1) > 1}
    notes = [
        "A training step is the loss and its gradients, and of a whole network one of gradient "
        "descent, its parameters donated. Batch and length are a CPU's: what would "
        "take too long is cut down.",
        f"To compile all of them takes {compiling[0]:.0f} s, and stock's {compiling[1]:.0f} s.",
    ]
    if depthwise:
        ours, stock = _compiling(depthwise)
        notes[-1] += (
            f" Depthwise layers alone take {ours:.1f} s, and stock's {stock:.1f} s: of a "
            "network of many let JAX keep what it compiled, in its `jax_compilation_cache_dir`."
        )
    if upsampling:
        names = " and ".join(f"`{name}`" for name in upsampling)
        notes.append(
            f"Of {names} stock is `nnx.Conv` with an `input_dilation`, which `nnx.ConvTranspose` "
            "compiles to as well."
        )
    if tuning := stored.of_tuning(result):
        notes.append(f"{tuning.replace('tuning', '[Tuning](#tune)', 1)}.")
    if apart := stored.of_cores(result):
        notes.append(
            f"{apart.capitalize()}. They are apart while one takes more than {handoff.APART:g} "
            "times as long for what the other wrote; of a virtual machine its host decides."
        )
    return "\n".join(
        [
            f"On a CPU ({stored.processor(host)}, JAX {host['jax']}): how many times "
            "faster ours is than stock `nnx.Conv`, and than the fastest of all baselines (stock, "
            "padding behind a barrier, symmetric padding and a slice, shifted matmuls; of a whole "
            'network stock alone). The smallest and the largest of a model\'s layers; "same" where '
            "both compile to the same program; below 1 ours is slower. From "
            f"[{source}]({source}), which [{page.name}]({page}) draws, measured by `{COMMAND}` "
            f"at {_commit(host)}: what the rules choose, which is not tuned.",
            "",
            "| model | kind | forward, over stock | over fastest "
            "| step, over stock | over fastest |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            *(f"- {note}" for note in notes),
        ]
    )


def _compiling(measurements: list[dict]) -> tuple[float, float]:
    """Seconds that ours took to compile all, and stock's."""
    variants = [(m["variants"][m["ours"]], m["variants"][STOCK]) for m in measurements]
    ours, stock = zip(*variants, strict=True)
    return sum(v["compile_s"] for v in ours), sum(v["compile_s"] for v in stock)


def pages_figures(found: dict[str, Any]) -> str:
    """A paragraph: what page faults take of a training step, and how to be rid of them.

    Args:
      found: what `pages.KEPT` holds.
    """
    between = lambda ratios: f"{_digits(min(ratios))} to {_digits(max(ratios))}"  # noqa: E731
    huge = {n: between([m["huge_pages"][n] for m in found["measurements"]]) for n in PAGED}
    as_it_is = [
        [statistics.median(m["variants"][name][pages.AS_IT_IS]["ms"]) for name in PAGED]
        for m in found["measurements"]
    ]
    setting = " ".join(f"{name}={value}" for name, value in pages.SETTING.items())
    source = pages.KEPT.relative_to(ROOT)
    return (
        f"**To train on a CPU** put `{setting}` into the environment (Linux with huge pages, glibc "
        "2.35 or newer): XLA asks for memory anew in every call, of which the system finds what is "
        "more than 32 MB page by page, 4 KiB each. Steps of gradient descent of the whole networks "
        f"above are {huge[OURS]} times as fast with it, and with "
        f"stock layers {huge[STOCK]} times; without it ours are "
        f"{between([stock / ours for stock, ours in as_it_is])} times as fast "
        "as stock's. Measured by `python -m benchmarks.pages`, in other processes than the table's "
        f"([{source}]({source}), of {_commit(found['host'])})."
    )


def gpu_figures(folder: Path) -> str:
    """Markdown tables: the goals, then published layers and the goals' own beside all baselines."""
    goals, against, torch, sweep = (
        lines_of(folder / f"{name}.jsonl") for name in ("goals", "against", "pytorch", "layers")
    )
    device = next(line["device"] for line in goals if "device" in line)
    passes = {(line["layer"], line["which"]): line for line in sweep if "which" in line}
    beside = {(line["layer"], line["operation"]): line for line in against if "operation" in line}
    beside |= {(line["layer"], f"torch {line['which']}"): line for line in torch if "which" in line}
    source = folder.relative_to(ROOT)
    return "\n".join(
        [
            f"On an {device}, of the layers that the kernels were made for (`dense-512`: N=8, "
            "T=4096, C=O=512, K=3; `dense-64`: N=8, T=65536, C=O=64, K=3; `depthwise`: N=1, "
            "T=16384, C=12288, K=4 and SiLU; all of them in bfloat16). A copy is one of x, by the "
            f"driver, in turns with ours. From [{source}]({source}), which says what was measured "
            f"when; with {_versions(folder)}.",
            "",
            "| the slowest, of all operations and dilations | goal | reached |",
            "|---|---|---|",
            *(_goal_row(line) for line in verdicts(goals) if line["met"] is not None),
            *(
                _copy_row(line)
                for line in goals
                if line.get("layer") == "depthwise/D1024" and "of_copy" in line
            ),
            "",
            _without_padding(goals),
            "",
            "How many times faster ours is than the fastest baseline, and than PyTorch's "
            "`F.pad` and `F.conv1d`, which is cuDNN's. What is not compared with PyTorch is of "
            "earlier kernels; blank is what was not measured.",
            "",
            "| layer | forward | input gradient | kernel gradient | training step "
            "| PyTorch: forward | training step |",
            "|---|---|---|---|---|---|---|",
            *(
                _beside_row(layer, beside)
                for layer in sorted({name for name, _ in beside}, key=_by_D)
            ),
            "",
            "What runs by default of published layers, and of some that stand for a kind "
            "(`depthwise`, `stride`, `grouped`, `bfloat16`, `wide-and-long`, `very-long`): "
            "microseconds, and how many times faster that is than stock `nnx.Conv` and than the "
            "fastest of all baselines, which took turns with it.",
            "",
            '- "On the GPU" compares with the fastest by how long the GPU was at work, for of what '
            "takes less than some 50 us the host's part is the longer one. There is no such time "
            "of a baseline that takes more than four times as long, and the means have the "
            "clock's.",
            "- Blank is what was not measured, and no mean has it.",
            f"- {_means(list(passes.values()))}",
            "",
            "| layer | forward, us | over stock | over fastest | on the GPU "
            "| step, us | over stock | over fastest | on the GPU |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_gpu_row(layer, passes) for layer in dict.fromkeys(name for name, _ in passes)),
        ]
    )


def _versions(folder: Path) -> str:
    """Those of what it was measured with."""
    lines = lines_of(folder / "versions.jsonl")
    found = {line["package"]: line["version"] for line in lines if "package" in line}
    jax = next(line["jax"] for line in lines if "jax" in line)
    return f"JAX {jax}, Triton {found['triton']} and PyTorch {found['torch']}"


def _goal_row(line: dict) -> str:
    goal = line["goal"].replace("depthwise,", "depthwise, D=1,")
    which = "at most" if "over" in goal else "at least"
    places = 0 if line["bar"] > 10 else 2
    bar, reached = (f"{line[name]:.{places}f}" for name in ("bar", "reached"))
    missed = "" if line["met"] else " (missed)"
    return f"| {goal} | {which} {bar} | {reached}{missed} |"


def _without_padding(goals: list[dict]) -> str:
    """What the dense goals come to if products with padding are no work."""
    layers = {layer.name: layer for layer in device_layers.goals(False) if layer.G == 1}
    real = lambda a: sum(max(0, a.T - k * a.D) for k in range(a.K)) / (a.K * a.T)  # noqa: E731
    rates = {
        which: [
            line["tflops"] * real(layers[line["layer"]])
            for line in goals
            if line.get("layer", "").startswith("dense-512/")
            and line.get("operation") in which
            and "tflops" in line
        ]
        for which in (("forward",), ("input_grad", "kernel_grad"))
    }
    forward, gradients = (f"{min(of):.0f}" for of in rates.values())
    shares = [f"{1 - real(layers[f'dense-512/D{D}']):.1%} at D={D}" for D in (512, 1024)]
    return (
        "Those TFLOP/s count all products of the definition, as is usual, also those with padding "
        f"({' and '.join(shares)}), of which the kernels leave out whole tiles. Of the "
        f"others alone the slowest are {forward} forward and {gradients} of the gradients. What "
        "ours computed was checked there, and in the comparison with the fastest baselines below; "
        "what the baselines and PyTorch did was not, nor was ours in the table of published layers."
    )


def _copy_row(line: dict) -> str:
    """Of the same layer with another dilation, of which no goal tells."""
    layer, _, D = line["layer"].partition("/D")
    return f"| {layer}, D={D}, {line['operation']}, of a copy | | {line['of_copy']:.2f} |"


def _beside_row(layer: str, lines: dict[tuple[str, str], dict]) -> str:
    """Of a layer that has a goal: what is compared, operation by operation."""
    columns = ("forward", "input_grad", "kernel_grad", "step", *(f"torch {p}" for p in PASSES))
    ratios = [_ratio(lines.get((layer, column), {}), "seconds", "ours") for column in columns]
    return f"| {layer} | {' | '.join(_digits(r) if r else '' for r in ratios)} |"


def _by_D(layer: str) -> tuple[str, int]:
    name, _, D = layer.partition("/D")
    return name, int(D)


def _gpu_row(layer: str, lines: dict[tuple[str, str], dict]) -> str:
    """Of a published layer: both passes of what runs by default."""
    return f"| {layer} | {' | '.join(_gpu_cells(lines.get((layer, which))) for which in PASSES)} |"


def _gpu_cells(line: dict | None) -> str:
    """Four cells of one pass of a published layer."""
    seconds = _medians(line or {}, "seconds")
    if DEFAULT not in seconds:
        return " | | | "
    ours = seconds[DEFAULT]
    ratios = (
        seconds[STOCK] / ours if STOCK in seconds else None,
        _ratio(line, "seconds", DEFAULT),
        _ratio(line, "device_seconds", DEFAULT),
    )
    us = f"{1e6 * ours:,.{1 if ours < 1e-4 else 0}f}"
    return " | ".join((us, *(_digits(r) if r else "" for r in ratios)))


def _medians(line: dict, kind: str) -> dict[str, float]:
    return {name: spread["median"] for name, spread in line.get(kind, {}).items()}


def _ratio(line: dict, kind: str, ours: str) -> float | None:
    """How many times as long as ours the fastest baseline takes."""
    seconds = _medians(line, kind)
    theirs = [seconds[name] for name in (*BASELINES, TORCH) if name in seconds]
    return min(theirs) / seconds[ours] if theirs and ours in seconds else None


def _means(sweep: list[dict]) -> str:
    """Geometric means: over what somebody published, and over all that there is a row of."""
    published = [line for line in sweep if line["layer"] in _PUBLISHED]
    return (
        f"Geometric means over the published layers: {_means_of(published)}. "
        f"Over all of these: {_means_of(sweep)}."
    )


def _means_of(sweep: list[dict]) -> str:
    told = []
    for which in PASSES:
        lines = [line for line in sweep if line["which"] == which]
        walls = [_ratio(line, "seconds", DEFAULT) for line in lines]
        # Of a baseline that takes many times as long there is no trace, and need not be.
        works = [
            _ratio(line, "device_seconds", DEFAULT) or wall
            for line, wall in zip(lines, walls, strict=True)
        ]
        told.append(f"{which} {_mean(walls)}, and {_mean(works)} on the GPU")
    return "; ".join(told)


def _mean(ratios: Iterable[float | None]) -> str:
    """The geometric mean of those that there are."""
    return _digits(statistics.geometric_mean(filter(None, ratios)))


def cpu_figures() -> str:
    """All that the README has of CPUs, from the stored results."""
    found = json.loads(pages.KEPT.read_text(encoding="utf-8"))
    others = [other_processor(*told, stored.read(told[1])) for told in OTHERS.items()]
    return "\n\n".join([figures(stored.read(RESULT)), pages_figures(found), *others])


def _cell(speedups: list[dict]) -> str:
    ratios = sorted(map(_of_programs, speedups))
    if all(s["same_program"] for s in speedups):
        return "same" if speedups else ""
    low, high = _digits(ratios[0]), _digits(ratios[-1])
    return low if low == high else f"{low} to {high}"


def _digits(ratio: float) -> str:
    """Two significant digits: more would be noise."""
    rounded = round(ratio, 1 - math.floor(math.log10(ratio)))
    places = 1 - math.floor(math.log10(rounded))  # of 9.96, which is 10, none
    return f"{rounded:.{max(0, places)}f}"


def with_figures(readme: str, table: str, marks: tuple[str, str] = MARKS) -> str:
    """The README with ``table`` between its two marks."""
    start, end = map(re.escape, marks)
    return re.sub(
        f"({start}\n).*?(\n{end})",
        lambda m: f"{m[1]}\n{table}\n{m[2]}",
        readme,
        count=1,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    text = README.read_text(encoding="utf-8")
    text = with_figures(text, means(stored.read(RESULT), GPU_RESULTS), MEAN_MARKS)
    text = with_figures(text, cpu_figures())
    README.write_text(with_figures(text, gpu_figures(GPU_RESULTS), GPU_MARKS), encoding="utf-8")
