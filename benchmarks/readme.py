"""Writes the README's figures from a stored result, so that nobody types one.

python -m benchmarks.readme
"""

import json
import math
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULT = ROOT / "benchmarks" / "results" / "cpu" / "layers.json"
MARKS = "<!-- figures: written by benchmarks/readme.py -->", "<!-- end of figures -->"


def figures(result: dict[str, Any]) -> str:
    """A Markdown table: for each model, how many times faster than stock its layers are."""
    host = result["host"]
    models: dict[str, dict[str, list[dict]]] = {}
    for m in result["measurements"]:
        model = models.setdefault(m["layer"]["name"].partition("/")[0], {})
        model.setdefault(m["pass"], []).append(m)
    rows = []
    for model, passes in models.items():
        kinds = sorted({m["layer"]["kind"] for ms in passes.values() for m in ms})
        cells = [_cell(passes.get(p, [])) for p in ("forward", "training step")]
        rows.append(f"| {model} | {'; '.join(kinds)} | {' | '.join(cells)} |")
    source = RESULT.relative_to(ROOT)
    return "\n".join(
        [
            f"On a CPU ({host['cpu']}, {host['cores']} cores, JAX {host['jax']}), stock "
            "`nnx.Conv` over ours, larger is better; the smallest and the largest of a model's "
            f'layers; "same" where both compile to the same program. From [{source}]({source}), '
            "measured by `python -m benchmarks.layer_sweep`.",
            "",
            "| model | layers | forward | training step |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def _cell(measurements: list[dict]) -> str:
    ratios = sorted(m["speedup"]["median"] for m in measurements if not m["identical_program"])
    if not ratios:
        return "same" if measurements else ""
    if len(ratios) < len(measurements):
        ratios = sorted([*ratios, 1.0])
    low, high = _digits(ratios[0]), _digits(ratios[-1])
    return low if low == high else f"{low} to {high}"


def _digits(ratio: float) -> str:
    """Two significant digits: more would be noise."""
    places = 1 - math.floor(math.log10(ratio))
    return f"{round(ratio, places):.{max(0, places)}f}"


def with_figures(readme: str, table: str) -> str:
    """The README with ``table`` between its two marks."""
    start, end = map(re.escape, MARKS)
    return re.sub(
        f"({start}\n).*?(\n{end})",
        lambda m: f"{m[1]}\n{table}\n{m[2]}",
        readme,
        count=1,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    table = figures(json.loads(RESULT.read_text(encoding="utf-8")))
    README.write_text(with_figures(README.read_text(encoding="utf-8"), table), encoding="utf-8")
