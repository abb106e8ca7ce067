"""Tiles that were measured to be the fastest, one file per kind of device.

``triton_tuned_<device>.json`` beside this file maps a key, which tells a kernel and a shape, to
the fields of `triton_config.Config`, or to the tile of `triton_depthwise_walk` or
`triton_depthwise_taps`.
`conv_pallas.tuning.tune` measures and writes such a file; nothing measures by itself inside
somebody's training step. What no file knows, a heuristic decides.
"""

import contextlib
import functools
import json
import re
from pathlib import Path

from conv_pallas.kernels import triton_compat

FOLDER = Path(__file__).parent
_trial: tuple[tuple[int, ...] | None, list[str]] | None = None


def key(kernel: str, sizes: tuple[int, ...], dtype: str, *how: str) -> str:
    """Sizes are one group's; what grows with the batch or with time counts by powers of two."""
    size = lambda n: str(n if n <= 1024 else 1 << (n - 1).bit_length())  # noqa: E731
    return " ".join((kernel, "x".join(map(size, sizes)), dtype, *how))


def lookup(key: str) -> tuple[int, ...] | None:
    """The tuned tile for that key on the device that is compiled for."""
    if _trial is not None:
        tile, asked = _trial
        asked.append(key)
        return tile
    return _table(triton_compat.device_kind()).get(key)


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


def file_of(kind: str) -> Path:
    """Where the tiles of a kind of device are kept."""
    name = f"triton_tuned_{re.sub('[^a-z0-9]+', '-', kind.lower()).strip('-')}.json"
    return FOLDER / name


def forget() -> None:
    """Reads the files anew from now on."""
    _table.cache_clear()


@functools.cache
def _table(kind: str | None) -> dict[str, tuple[int, ...]]:
    file = file_of(kind or "none")
    if not file.exists():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    return {key: tuple(tile) for key, tile in content["tiles"].items()}
