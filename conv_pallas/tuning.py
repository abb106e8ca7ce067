"""Measures which tiles of the Triton kernels are the fastest on the GPU at hand.

    from conv_pallas.tuning import tune

    tune(x, kernel, kernel_dilation=8)

prints what it tries and writes the winners to ``triton_tuned_<device>.json`` in the folder of the
kernels, where every later compilation on such a device finds them. Nothing else in the package
measures: without this call the kernels take what a heuristic says.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from conv_pallas import _measure
from conv_pallas.ops import conv1d
from conv_pallas.spec import make_spec

# The most promising first, as a run on a lent GPU has no time for all.
# Rows, columns, depth, warps, stages, and programs that stay: `kernels.triton_config.Config`.
DENSE_TILES = (
    (128, 256, 64, 8, 4, 1), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 3),
    (64, 64, 64, 4, 3, 2), (128, 128, 64, 4, 3), (128, 128, 64, 8, 5), (256, 128, 64, 8, 3),
    (128, 64, 64, 4, 4), (64, 64, 64, 4, 4), (256, 64, 64, 8, 4), (128, 64, 64, 4, 3),
    (256, 64, 64, 8, 3), (128, 128, 64, 8, 4),
    (128, 128, 128, 8, 3), (64, 64, 128, 4, 3), (128, 256, 32, 8, 4), (256, 128, 32, 8, 4),
    (128, 128, 32, 8, 3), (128, 128, 32, 8, 4), (128, 64, 32, 4, 3), (64, 64, 32, 4, 4),
    (64, 128, 64, 4, 4), (64, 128, 32, 4, 4), (128, 64, 64, 4, 3, 1),
    (64, 64, 128, 4, 2, 1), (64, 128, 128, 4, 2, 1), (128, 128, 64, 8, 3, 1),
    (128, 128, 64, 8, 2, 2), (128, 128, 32, 8, 4, 2), (128, 128, 64, 4, 2, 2),
    (128, 256, 64, 8, 3, 1), (256, 128, 64, 8, 3, 1),
)  # fmt: skip
# Pieces, channels, steps of a piece, warps: see `kernels.triton_depthwise_walk`.
WALK_TILES = (
    (4, 128, 32, 4), (8, 128, 128, 4), (8, 128, 32, 4), (4, 128, 64, 4), (8, 128, 16, 4),
    (8, 64, 32, 4), (4, 256, 32, 4), (8, 128, 32, 8), (2, 256, 32, 4), (2, 128, 32, 2),
    (8, 128, 64, 4), (4, 128, 16, 4), (4, 256, 64, 4), (4, 128, 128, 4),
)  # fmt: skip
# Rows, channels, R, warps: see `kernels.triton_depthwise_taps`.
TAPS_TILES = (
    (4, 64, 16, 4), (8, 64, 16, 8), (2, 64, 16, 2), (4, 128, 16, 4), (8, 128, 16, 8),
    (2, 128, 16, 4), (1, 256, 16, 4), (4, 64, 22, 4), (2, 128, 17, 4), (4, 64, 11, 4),
    (8, 64, 11, 8), (8, 128, 11, 8), (8, 64, 12, 8), (4, 128, 11, 8),
)  # fmt: skip
# Arguments of `conv1d` that say which convolution it is.
SPEC = {"strides", "padding", "input_dilation", "kernel_dilation", "feature_group_count"}
# The heuristic stays where nothing beats it by more than this.
CLEARLY = 0.98
# Three rounds of some thirty tiles tell those that are close, and the rest is theirs: a winner of
# three samples would be whichever was lucky.
SETTINGS = dataclasses.replace(_measure.DEVICE, limit=6.0, hopeless=1.1, rounds=(7, 15))


def tune(
    x: Any,
    kernel: Any,
    *,
    file: Path | None = None,
    seconds: float = math.inf,
    report: Callable[[str], None] = print,
    **geometry: Any,
) -> dict[str, tuple[int, ...]]:
    """Tunes the Triton kernels for a layer, forward and both gradients.

    Args:
      x, kernel: ``(*batch, T, C)`` and ``(K, C // G, O)``, arrays or anything with shape and
        dtype; their values do not matter.
      file: where to write; None: where the kernels look. What is in it for other shapes stays.
      seconds: for all operations; each has its share of what those before it have left. Once it
        is up no further tile is compiled, and the best of those that were is taken.
      report: is given a line for each thing that is tried.
      geometry: further arguments of `conv1d`, but for ``bias``, ``activation`` and
        ``implementation``.

    Returns:
      The tile of each key that was tuned, as written; only those clearly faster than what the
      heuristic says. What is compiled already keeps its tiles: `jax.clear_caches` drops it.

    Raises:
      RuntimeError: there is no NVIDIA GPU here.
      ModuleNotFoundError: triton or jax-triton is not installed.
      NotImplementedError: the Triton kernels can't run this layer; says why.
      OSError: the file can't be written.
    """
    if jax.default_backend() != "gpu":
        raise RuntimeError(f"tune needs an NVIDIA GPU, and JAX runs on {jax.default_backend()}")
    from conv_pallas.kernels import triton_compat, triton_tuned

    kind, end = triton_compat.device_kind(), time.monotonic() + seconds
    file = triton_tuned.file_of(kind) if file is None else file
    found: dict[str, tuple[int, ...]] = {}
    programs = list(_programs(x, kernel, geometry))
    for i, (name, program, arguments) in enumerate(programs):
        now = time.monotonic()
        if now > end:
            report(f"{name}: no time left")
            continue
        share = (end - now) / (len(programs) - i)
        compiling = now + max(share - SETTINGS.limit, share / 3)
        key, calls = _candidates(name, program, arguments, report, compiling)
        if len(calls) < 2:
            report(f"{name}: has no tiles to choose from")
            continue
        runs = len(arguments[0])
        medians = {
            tile: _measure.Spread.of(times).median / runs
            for tile, times in _measure.interleaved(calls, SETTINGS).items()
        }
        for tile, median in medians.items():
            report(f"{name} {tile or 'heuristic'}: {1e6 * median:.1f} us")
        best = min(medians, key=medians.get)
        if best is not None and medians[best] < CLEARLY * medians[None]:
            found[key] = best
            _write(file, kind, {key: (best, medians[best])})
        report(f"{name}: {key} takes {found.get(key, 'what the heuristic says')}")
    triton_tuned.forget()
    return found


def _programs(x, kernel, geometry):
    """Name, function and arguments of each operation of the layer, in lists of several runs."""
    from conv_pallas.kernels import triton_depthwise_walk

    shape = jax.eval_shape(lambda x, w: conv1d(x, w, **geometry), _struct(x), _struct(kernel))
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [
        jax.random.normal(key, a.shape, a.dtype)
        for key, a in zip(keys, (x, kernel, shape), strict=True)
    ]
    depthwise = geometry.get("feature_group_count", 1) == x.shape[-1] > 1
    only_spec = {name: geometry[name] for name in geometry.keys() & SPEC}
    taps = make_spec(x.shape, kernel.shape, **only_spec)[0].live_taps or ()
    walked = depthwise and len(taps) <= triton_depthwise_walk.TAPS
    operations = 2 * math.prod(shape.shape[:-1]) * math.prod(kernel.shape)
    runs = _measure.runs_in_a_call(operations, sum(a.nbytes for a in arrays))
    x, w, g = arrays
    arrays = [_measure.rolled(x, runs), [w] * runs, _measure.rolled(g, runs)]

    def layer(x, w, activation=None):
        return conv1d(x, w, **geometry, activation=activation, implementation="triton")

    yield "forward", lambda x, w, g: layer(x, w), arrays
    if walked:
        # One kernel does all of backward; with an activation it has the most to do.
        silu = lambda x, w: layer(x, w, "silu")  # noqa: E731
        yield "backward", lambda x, w, g: jax.vjp(silu, x, w)[1](g), arrays
        return
    yield "input gradient", lambda x, w, g: jax.vjp(lambda x: layer(x, w), x)[1](g)[0], arrays
    yield "kernel gradient", lambda x, w, g: jax.vjp(lambda w: layer(x, w), w)[1](g)[0], arrays


def _struct(a):
    return jax.ShapeDtypeStruct(a.shape, a.dtype)


def _candidates(name, program, arguments, report, end):
    """The key that is asked for, and the call of the heuristic (None) and each tile that works.

    Args:
      end: when no further tile is begun, by `time.monotonic`.
    """
    from conv_pallas.kernels import triton_tuned

    def lowered(tile):
        # A function of its own, or JAX would take what it lowered with the tile before.
        with triton_tuned.trial(tile) as keys:
            return _lowered(_measure.several(lambda *a: program(*a)), arguments), keys

    heuristic, keys = lowered(None)
    calls = {None: _call(heuristic, arguments)}
    if not keys:
        return None, calls
    key, expected = keys[-1], calls[None]()  # the last kernel asked is that of the gradient
    tiles = {"conv_walk": WALK_TILES, "conv_taps": TAPS_TILES}.get(key[:9], DENSE_TILES)
    seen = {heuristic.as_text(): "the heuristic"}
    for i, tile in enumerate(tiles):
        if time.monotonic() > end:
            report(f"{name}: no time for {len(tiles) - i} of {len(tiles)} tiles")
            break
        try:
            made, asked = lowered(tile)
            if key not in asked:
                raise RuntimeError(f"nobody asked for {key}")
            same = seen.setdefault(made.as_text(), tile)
            if same != tile:  # the kernel gradient, say, where its programs can't stay
                report(f"{name} {tile}: the same program as that of {same}")
                continue
            call = _call(made, arguments)
            off = float(_measure.difference_there(expected, call()))
        except Exception as e:  # too large for this chip, say; what it was is reported
            report(f"{name} {tile}: {type(e).__name__}: {str(e).strip().splitlines()[:1]}")
            continue
        if off <= 3e-2:
            calls[tile] = call
        else:
            report(f"{name} {tile}: is off by {off:.2g} of the largest element")
    return key, calls


def _lowered(program, arguments) -> jax.stages.Lowered:
    return jax.jit(program).lower(*arguments)


def _call(lowered, arguments) -> Callable[[], Any]:
    compiled = lowered.compile()
    return lambda: compiled(*arguments)


def _write(file: Path, kind: str, tiles: dict[str, tuple[tuple[int, ...], float]]) -> None:
    """Adds tiles to the file, all of it at once: a run that is cut short leaves a whole one."""
    import triton

    content = {"device": kind, "tiles": {}, "measured": {}}
    if file.exists():
        content = json.loads(file.read_text(encoding="utf-8"))
    for key, (tile, median) in tiles.items():
        content["tiles"][key] = tile
        content["measured"][key] = {
            "seconds": median, "jax": jax.__version__, "triton": triton.__version__
        }  # fmt: skip
    new = file.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(new, file)
