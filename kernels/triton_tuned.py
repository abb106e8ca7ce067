"""What was measured on a kind of device: the fastest tiles, and where they are ahead of XLA.

``triton_tuned_<device>.json`` beside this file, or in the folder that `ENVIRONMENT_VARIABLE` names,
maps a key, which tells a kernel and a shape, to the fields of `triton_config.Config`, or to the
tile of `triton_depthwise_walk` or `triton_depthwise_taps`; and another key, which tells a problem,
to the seconds that ours and XLA's best take.
`conv_pallas.tuning.tune` measures and writes such a file; nothing measures by itself inside
somebody's training step. What no file knows, a heuristic decides, and XLA runs.
"""

import contextlib
import functools
import json
import os
import re
from pathlib import Path

import numpy as np

from conv_pallas.kernels import triton_compat
from conv_pallas.spec import Problem

FOLDER = Path(__file__).parent
# A folder whose files come before those of `FOLDER`, and which `tune` writes to.
ENVIRONMENT_VARIABLE = "CONV_PALLAS_TUNED"
# What is faster by less than this may be so by luck: the heuristic stays, or XLA.
CLEARLY = 0.98
PRIORITY = 10  # above XLA's
_trial: tuple[tuple[int, ...] | None, list[str]] | None = None


def key(kernel: str, sizes: tuple[int, ...], dtype: str, *how: str) -> str:
    """Sizes are one group's; what grows with the batch or with time counts by powers of two."""
    size = lambda n: str(n if n <= 1024 else _power_of_two(n))  # noqa: E731
    return " ".join((kernel, "x".join(map(size, sizes)), dtype, *how))


def lookup(key: str) -> tuple[int, ...] | None:
    """The tuned tile for that key on the device that is compiled for."""
    if _trial is not None:
        tile, asked = _trial
        asked.append(key)
        return tile
    tile = content(triton_compat.device_kind())["tiles"].get(key)
    return None if tile is None else tuple(tile)


@contextlib.contextmanager
def trial(tile: tuple[int, ...] | None):
    """Within it every kernel gets that tile; None: what the heuristic says.

    Yields the keys that were asked for, the last one last. What is compiled meanwhile keeps
    the tile.
    """
    global _trial
    before, _trial = _trial, (tile, [])
    try:
        yield _trial[1]
    finally:
        _trial = before


# --- ours or XLA's --------------------------------------------------------------------------------


def problem_key(problem: Problem) -> str:
    """What tells problems apart of which one was measured; N and T count by powers of two."""
    spec = problem.spec
    dtypes = dict.fromkeys(np.dtype(d).name for d in (problem.lhs_dtype, problem.rhs_dtype))
    out = np.dtype(problem.out_dtype).name
    low, high = spec.padding
    N, T = _power_of_two(problem.N), _power_of_two(spec.time)
    words = [
        f"{problem.operation} {N}x{T}x{problem.C} {spec.kernel_size}x{problem.O}",
        "x".join(dtypes) if out in dtypes else f"{'x'.join(dtypes)} to {out}",
        f"padding {low},{high} dilation {spec.kernel_dilation}",
    ]
    optional = {
        "stride": (spec.stride, 1),
        "input dilation": (spec.input_dilation, 1),
        "groups": (spec.groups, 1),
        "precision": (problem.precision, None),
    }
    words += [f"{name} {value}" for name, (value, usual) in optional.items() if value != usual]
    return " ".join(words)


def priority(problem: Problem) -> int | None:
    """`Kernel.priority` of the Triton kernels: the default where they were measured to be ahead."""
    return PRIORITY if _ahead(problem) else None


def by_name(problem: Problem) -> str:
    """`Kernel.by_name` of the Triton kernels."""
    if _ahead(problem) is None:
        return "by name only: conv_pallas.tuning.tune has not compared it with XLA on this device"
    return "by name only: XLA was measured to be as fast on this device"


def _ahead(problem: Problem) -> bool | None:
    """Whether this is faster than XLA on the device that is compiled for; None: who knows."""
    kind = triton_compat.device_kind()
    if kind is None or not problem.known:
        return None
    raced = content(kind)["against_xla"].get(problem_key(problem))
    return raced and raced["seconds"] < CLEARLY * raced["xla"]


# --- files ----------------------------------------------------------------------------------------


def file_of(kind: str) -> Path:
    """Where `conv_pallas.tuning.tune` keeps what it has measured on a kind of device."""
    return _folders()[-1] / _name(kind)


def read(file: Path) -> dict[str, dict]:
    """What a file holds; of one that is not there, nothing.

    Returns:
      ``tiles``: of each key the tile; ``measured``: of each of those the median, and the versions;
      ``against_xla``: of each `problem_key` the medians and the versions.
    """
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {"tiles": {}, "measured": {}, "against_xla": {}} | found


@functools.cache
def content(kind: str | None) -> dict[str, dict]:
    """As `read`, of all folders together."""
    merged = read(_folders()[0] / _name(kind or "none"))
    for folder in _folders()[1:]:
        for name, entries in read(folder / _name(kind or "none")).items():
            merged[name] = merged[name] | entries if isinstance(entries, dict) else entries
    return merged


def forget() -> None:
    """Reads the files anew from now on."""
    content.cache_clear()


def _folders() -> list[Path]:
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    return [FOLDER, *([Path(named)] if named else [])]


def _name(kind: str) -> str:
    return f"triton_tuned_{re.sub('[^a-z0-9]+', '-', kind.lower()).strip('-')}.json"


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
