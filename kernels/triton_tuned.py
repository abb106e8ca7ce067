"""What was measured on a kind of device: the fastest tiles, and where they are ahead of XLA.

``triton_tuned_<device>.json`` (see `records`) maps a key, which tells a kernel and a shape, to the
fields of `triton_config.Config`, or to the tile of `triton_depthwise_walk` or
`triton_depthwise_taps`; and another key, which tells a problem, to the seconds that ours and XLA's
best take. What no file knows gets a heuristic's tile, and runs in XLA unless it is like what was
ahead: see `_like_those_ahead`.

Another of Hopper's chips with as many multiprocessors takes an H200's word for what it has none of
its own: they run the same machine code. An H100's have the same clock (SXM), and 0.7 of the
bandwidth, which both sides of a comparison share. Nothing has been measured on one.
"""

import collections
import contextlib
import contextvars
import math
from collections.abc import Mapping
from typing import Any

import jax

from conv_pallas.kernels import records, triton_compat, xla_tuned
from conv_pallas.kernels.records import CLEARLY, power_of_two, precisions
from conv_pallas.spec import Problem

PRIORITY = 10  # above XLA's
USUAL = {None, jax.lax.Precision.DEFAULT}
SHORTEST = 256  # steps of a sample of the shortest dense layer that was measured to be ahead
MEASURED, CAPABILITY = "NVIDIA H200", 90  # it speaks for those of `_spoken_for`
# What is kept of a comparison with XLA: seconds of ours and XLA's, and the tile that ours had.
RACED = {"seconds", "xla", "key", "tile"}


def _whole(found: dict[str, dict]) -> bool:
    tiles, raced = found["tiles"].values(), found["against_xla"].values()
    whole = all(all(isinstance(n, int) for n in tile or ()) for tile in tiles)
    whole = whole and all(entry is None or entry.keys() >= RACED for entry in raced)
    return whole and xla_tuned.whole(found)


# ``tiles``: of each `key` the tile, None where it is the heuristic's;
# ``measured``: of each of those the seconds, and the versions;
# ``against_xla``: of each `problem_key` the seconds of both, and the ``key`` and ``tile`` that
# ours had; None where they did not agree. None hides what another folder has.
# ``formulations``: of XLA's, see `xla_tuned`.
TABLES = ("tiles", "measured", "against_xla", "formulations")
RECORDS = records.Records("triton_tuned", TABLES, _whole)
# Of one thread: what others compile meanwhile goes by the files.
_trial = contextvars.ContextVar[tuple[tuple[int, ...] | None, list[str]] | None](
    "trial", default=None
)


def key(kernel: str, sizes: tuple[int, ...], dtype: str, *how: str) -> str:
    """Sizes are one group's; what grows with the batch or with time counts by powers of two."""
    size = lambda n: str(n if n <= 1024 else power_of_two(n))  # noqa: E731
    return " ".join((kernel, "x".join(map(size, sizes)), dtype, *how))


def lookup(key: str) -> tuple[int, ...] | None:
    """The tuned tile for that key on the device that is compiled for."""
    if (trying := _trial.get()) is not None:
        tile, asked = trying
        asked.append(key)
        return tile
    tile = table("tiles").get(key)
    return None if tile is None else tuple(tile)


def table(name: str) -> Mapping[str, Any]:
    """One of `RECORDS`, of the device that is compiled for, over that of what speaks for it."""
    own = RECORDS.content(triton_compat.device_kind())[name]
    return collections.ChainMap(own, RECORDS.content(MEASURED)[name]) if _spoken_for() else own


def _spoken_for() -> bool:
    """Whether the device that is compiled for is `MEASURED`, or like it.

    That is no H20, nor a part of an H100, which have fewer multiprocessors, or slower ones.
    """
    known = triton_compat.device_kind() is not None
    alike = triton_compat.processors() == triton_compat.PROCESSORS
    return known and alike and triton_compat.compute_capability() == CAPABILITY


@contextlib.contextmanager
def trial(tile: tuple[int, ...] | None):
    """Within it every kernel gets that tile; None: what the heuristic says.

    Yields the keys that were asked for, the last one last. What is compiled meanwhile keeps
    the tile.
    """
    asked: list[str] = []
    before = _trial.set((tile, asked))
    try:
        yield asked
    finally:
        _trial.reset(before)


# --- ours or XLA's --------------------------------------------------------------------------------


def problem_key(problem: Problem) -> str:
    """As `records.problem_key`; XLA's own precision has two names."""
    return records.problem_key(problem, USUAL)


def priority(problem: Problem) -> int | None:
    """`Kernel.priority` of the Triton kernels: the default where they were measured to be ahead.

    That is of this problem, or else of problems like it.
    """
    ratio = _ratio(problem)
    ahead = _like_those_ahead(problem) if ratio is None else ratio < CLEARLY
    return PRIORITY if ahead and not problem.exported else None


def by_name(problem: Problem) -> str:
    """`Kernel.by_name` of the Triton kernels."""
    if problem.exported:
        return "by name only: JAX does not promise that what is exported will know this custom call"
    if (ratio := _ratio(problem)) is None:
        return "by name only: conv_pallas.tuning.tune has not compared it with XLA on this device"
    return f"by name only: {_told(ratio, problem)}"


def described(how: str, problem: Problem) -> str:
    """`Kernel.describe` of a Triton kernel that says ``how``: with why it is the default."""
    if priority(problem) is None:
        return how
    if (ratio := _ratio(problem)) is None:
        return f"{how}; all that were measured of its kind are ahead of XLA on {_where(MEASURED)}"
    return f"{how}; {_told(ratio, problem)}"


def _told(ratio: float, problem: Problem) -> str:
    own, name = RECORDS.content(triton_compat.device_kind())["against_xla"], problem_key(problem)
    where = "this device" if name in own else _where(MEASURED)
    version = records.version(table("against_xla")[name])
    return f"measured to take {ratio:.2f} of XLA's time on {where}{version}"


def _where(kind: str) -> str:
    here = triton_compat.device_kind() == kind
    return "this device" if here else f"an {kind}, of as many multiprocessors"


def _like_those_ahead(problem: Problem) -> bool:
    """Whether all problems of its kind that were measured on an H200 are ahead of XLA there.

    Those are (benchmarks/results/nvidia-h200/tuning.jsonl), without strides and at
    XLA's own precision:

    - depthwise, of several taps and 30 MB and more that are moved: each operation, 1.1 to 30 times;
    - dense, of 32 to 512 channels in rows that the copy engine can fetch, several taps, and 4096
      steps and more of all samples together, `SHORTEST` and more of each: each operation, 1.1 to
      4.8 times. So are taken up to 1024 channels, of which 600 were measured, of 16 samples of 80
      steps alone: 0.9;
    - dense, of 10 to 30 channels, 4 to 8 taps and 16384 steps and more: forward pass and input
      gradient, 1.9 to 4.4 times. So are taken 2 taps and 3; the kernel gradient is not always.
    """
    spec, dtypes = problem.spec, {problem.lhs_dtype, problem.rhs_dtype, problem.out_dtype}
    if not _spoken_for() or not problem.known or len(dtypes) > 1:
        return False
    if problem_key(problem) in table("against_xla"):
        return False  # what failed there, say, or had another tile
    if spec.stride * spec.input_dilation != 1 or not _by_default(problem):
        return False
    size = problem.lhs_dtype.itemsize
    if problem.depthwise:
        moved = size * problem.N * (spec.time * problem.C + spec.out_time * problem.O)
        several = spec.kernel_size > 1  # else it is a product, which XLA fuses with its neighbours
        return several and problem.C == problem.O and moved >= 3e7
    channels, steps = (problem.C, problem.O), problem.N * spec.out_time
    if spec.groups > 1 or spec.kernel_size == 1 or spec.out_time < SHORTEST:
        return False
    if all(10 <= n <= 32 for n in channels) and problem.operation != "conv1d_kernel_grad":
        if steps >= 16384 and spec.kernel_size <= 8:
            return True
    rows = all(32 <= n <= 1024 and n * size % 16 == 0 for n in channels)
    return rows and steps >= 4096 and 2 * steps * math.prod(problem.w_shape) >= 1e8


def _by_default(problem: Problem) -> bool:
    """Whether its precision says no more than XLA's own."""
    return set(precisions(problem)) <= USUAL


def _ratio(problem: Problem) -> float | None:
    """How much of XLA's time this takes on the device that is compiled for; None: who knows."""
    if triton_compat.device_kind() is None or not problem.known:
        return None
    raced = table("against_xla").get(problem_key(problem))
    # Another convolution may have had the tile changed since, as it is of one key.
    if raced is None or table("tiles").get(raced["key"]) != raced["tile"]:
        return None
    return raced["seconds"] / raced["xla"]
