"""Results on disk: JSON with one line a measurement, enough to draw everything from."""

import dataclasses
import json
import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import handoff, harness
from benchmarks.harness import Measurement
from benchmarks.layers import ALL, Subject
from conv_pallas import _measure, _neighbours
from conv_pallas._measure import OURS, STOCK, Settings

FORMAT = 2
# An environment variable that tells the commit where the files travel without their history.
COMMIT = "BENCHMARKS_COMMIT"
# How many times faster than the fastest baseline ours was by the rounds that found the cores so.
TOGETHER, APART = "speedup_together", "speedup_apart"
ROUNDS = 3  # and more of each, or such a ratio may be one hiccup's


class BadResultError(ValueError):
    """A file is no result of ``python -m benchmarks``; says what is wrong with it."""


def result(
    host: Mapping[str, Any],
    settings: Settings,
    limits: Mapping[str, float],
    measurements: Sequence[Measurement],
) -> dict[str, Any]:
    """What is stored."""
    return {
        "format": FORMAT,
        "host": dict(host),
        "settings": {
            k: v if v != float("inf") else None for k, v in dataclasses.asdict(settings).items()
        },
        "ceilings": dict(limits),
        "copy_in_place": True,  # without it that of bytes is of a copy into fresh memory
        "measurements": [measurement(m, limits) for m in measurements],
    }


def measurement(m: Measurement, limits: Mapping[str, float]) -> dict[str, Any]:
    """One line of a result: a pass of a layer in all variants."""
    training = m.which != harness.FORWARD
    costs = m.subject.costs(training)
    operations, bytes_ = (sum(c[i] for c in costs) for i in (0, 1))
    least = harness.ideal(m.subject, m.which, limits)
    published = published_form(m.subject)
    found = {
        "layer": dataclasses.asdict(m.subject) | {"kind": kind(m.subject), "size": str(m.subject)},
        "published": str(published),
        "cut_down": (published.N, published.T) != (m.subject.N, m.subject.T),
        "pass": m.which,
        "operations": operations,
        "bytes": bytes_,
        "ideal_ms": _digits(1e3 * least),
        "inside": m.inside,
        "others": m.others,
        "handoffs": [r if r is None else _digits(r) for r in m.handoffs],
        "variants": {},
        "ours": m.ours,
        "fastest_baseline": m.fastest_baseline,
    }
    for name, v in m.variants.items():
        row: dict[str, Any] = {}
        if v.seconds:
            time = v.time
            row |= {
                "ms": _digits(1e3 * time.median),
                "quartiles_ms": [_digits(1e3 * time.low), _digits(1e3 * time.high)],
                "tflops": _digits(operations / time.median / 1e12),
                "gbps": _digits(bytes_ / time.median / 1e9),
                "roofline": _digits(least / time.median),
                "seconds": [_digits(s) for s in v.seconds] if not v.same_as else None,
            }
        if v.compile_seconds:
            row["compile_s"] = _digits(v.compile_seconds)
        row |= {
            k: getattr(v, k)
            for k in ("same_as", "reason", "refused", "memory", "checked")
            if getattr(v, k)
        }
        found["variants"][name] = {k: v for k, v in row.items() if v is not None}
    if m.ours and STOCK in m.timed:
        found["speedup"] = _spread(m, STOCK)
        found["speedup_over_fastest"] = _spread(m, m.fastest_baseline)
        for key, there in ((TOGETHER, False), (APART, True)):
            if ratio := m.ratio_where(there, m.fastest_baseline, m.ours):
                found[key] = _digits(ratio.median)
    return found


def disturbed(measurement: Mapping[str, Any]) -> bool:
    """Whether other programs took too much of a CPU meanwhile; False where nobody knows."""
    return _neighbours.disturbed(measurement.get("others"))


def of_cores(found: Mapping[str, Any]) -> str:
    """How often the cores lay apart in a result, and what that did to ours; empty if unknown."""
    told = [there for m in found["measurements"] for there in handoff.apart(m.get("handoffs", ()))]
    known = [there for there in told if there is not None]
    if not known:
        return ""
    text = f"the cores lay apart in {statistics.fmean(known):.0%} of the rounds"
    both = [
        (m[TOGETHER], m[APART])
        for m in found["measurements"]
        if min(map(handoff.apart(m.get("handoffs", ())).count, (False, True))) >= ROUNDS
        and not m["speedup_over_fastest"]["same_program"]
    ]
    if both:
        together, apart = map(statistics.geometric_mean, zip(*both, strict=True))
        text += (
            f"; where a pass saw both ({len(both)} did, {ROUNDS} rounds and more of each), "
            f"ours was {together:.2f} times as fast as the fastest baseline with the cores "
            f"together, and {apart:.2f} times with them apart"
        )
    return text


def of_tuning(found: Mapping[str, Any]) -> str:
    """What `tune` brought over the rules; empty where they were not compared."""
    changed, compared = over_ours(found, harness.TUNED)
    if not compared:
        return ""
    text = f"tuning changed {len(changed)} of {compared} passes"
    if changed:
        ratios = [ratio for _, ratio in changed]
        mean = statistics.geometric_mean(ratios)
        text += (
            f", which are {mean:.2f} times as fast as by the rules "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )
    return text


def over_ours(
    found: Mapping[str, Any], name: str
) -> tuple[list[tuple[Mapping[str, Any], float]], int]:
    """How many times faster than ours a variant is, where it is another program.

    Returns:
      Those measurements with their ratios, and how many were compared.
    """
    both = (name, OURS)
    compared = [
        m for m in found["measurements"] if all("ms" in m["variants"].get(n, {}) for n in both)
    ]
    ratios = [(m, over(m, OURS, name)) for m in compared]
    return [(m, r["median"]) for m, r in ratios if not r["same_program"]], len(compared)


def over(m: Mapping[str, Any], base: str, name: str) -> dict[str, Any]:
    """How many times faster than ``base`` a variant is, as ``speedup`` has it of ours and stock."""
    programs = [program(m["variants"], n) for n in (base, name)]
    ratio = _measure.ratio(*(m["variants"][n]["seconds"] for n in programs))
    return dataclasses.asdict(ratio) | {"same_program": programs[0] == programs[1]}


def _spread(m: Measurement, base: str) -> dict[str, Any]:
    ratio = dataclasses.asdict(m.ratio(base, m.ours))
    same = program(m.variants, base) == program(m.variants, m.ours)
    return {"over": base, **{k: _digits(v) for k, v in ratio.items()}, "same_program": same}


def program(variants: Mapping[str, Any], name: str) -> str:
    """The variant whose program this one is: itself, but for those that compiled to the same."""
    v = variants[name]
    same_as = v.get("same_as") if isinstance(v, Mapping) else v.same_as
    return same_as or name


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def processor(host: Mapping[str, Any]) -> str:
    """A CPU's name, its cores, and the vectors that it has, where the result tells them."""
    vectors = host.get("vectors")
    return f"{host['cpu']}, {host['cores']} cores" + (f" with {vectors}" if vectors else "")


def kind(subject: Subject) -> str:
    found = subject.kind
    return found if subject.dtype == "float32" else f"{found} {subject.dtype}"


def published_form(subject: Subject) -> Subject:
    """The layer before it was cut down, in the dtype that it was measured in."""
    known = [s for s in ALL if s.name == subject.name]
    return dataclasses.replace(known[0], dtype=subject.dtype) if known else subject


def write(path: Path, stored: Mapping[str, Any]) -> None:
    """One line for each measurement, so that a diff shows which ones changed."""
    head = [
        f'"{key}": {json.dumps(value)}' for key, value in stored.items() if key != "measurements"
    ]
    rows = ",\n  ".join(json.dumps(m) for m in stored["measurements"])
    lines = ",\n ".join([*head, f'"measurements": [\n  {rows}\n ]'])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{{\n {lines}\n}}\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """A result from disk.

    Raises:
      BadResultError: there is no such file, or it holds something else.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise BadResultError(f"{path}: {e.strerror or e}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise BadResultError(f"{path} is no JSON: {e}") from None
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        told = stored.get("format") if isinstance(stored, dict) else None
        raise BadResultError(
            f"{path} must be what `python -m benchmarks --json` wrote, of format {FORMAT}; "
            f"its format is {told!r}"
        )
    if not stored.get("measurements"):
        raise BadResultError(f"{path} holds no measurements")
    return stored


def commit() -> str | None:
    """What `COMMIT` says, else of the checkout, with a plus where it has changes; None outside."""
    if told := os.environ.get(COMMIT):
        return told
    folder = Path(__file__).parent
    try:
        git = [
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return git[0].stdout.strip() + ("+" if git[1].stdout else "")
