"""How long a GPU is at work, told by a trace of JAX's profiler."""

import math
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from conv_pallas._measure import Spread

PAUSE = 5e-3  # seconds between calls, by which a trace tells them apart


def device_seconds(calls: Mapping[str, Callable[[], Any]], rounds: int = 5) -> dict[str, Spread]:
    """How long a GPU is at work in a call, whatever the host takes to start it.

    That is the time in which any kernel or copy runs; gaps between them don't count. Of a call that
    is shorter than what the host takes to start it `_measure.interleaved` measures the host: on a
    machine with an H200 some 100 us for 8 runs of a program (the shortest of
    benchmarks/results/nvidia-h200/tiles-again.jsonl).

    Returns:
      Of each call; nothing where there is no trace of a GPU, or the calls can't be told apart.
    """
    # Who follows whom must not matter: each finds the caches as another leaves them.
    order = random.Random(0)
    turns = [name for _ in range(rounds) for name in order.sample(list(calls), len(calls))]
    events = _events([calls[name] for name in turns])
    found = at_work([(start, end) for _, start, end in events], PAUSE / 2 * 1e9)
    if len(found) != len(turns):
        return {}
    seconds = {name: [] for name in calls}
    for name, ns in zip(turns, found, strict=True):
        seconds[name].append(ns / 1e9)
    return {name: Spread.of(values) for name, values in seconds.items()}


def kernels(call: Callable[[], Any], rounds: int = 5) -> dict[str, tuple[float, float]]:
    """Which kernels and copies a GPU runs in a call, in the order in which they begin.

    Returns:
      Of each name how often in a call, and how many seconds all of them take together.
    """
    found: dict[str, tuple[float, float]] = {}
    for name, start, end in sorted(_events([call] * rounds), key=lambda event: event[1]):
        times, seconds = found.get(name, (0.0, 0.0))
        found[name] = times + 1 / rounds, seconds + (end - start) / 1e9 / rounds
    return found


def _events(calls: Iterable[Callable[[], Any]]) -> list[tuple[str, float, float]]:
    """Name, start and end in ns of what a GPU runs in calls, one after the other."""
    if jax.default_backend() != "gpu":
        return []
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for call in calls:
                jax.block_until_ready(call())
                time.sleep(PAUSE)
        return [
            (event.name, event.start_ns, event.start_ns + event.duration_ns)
            for file in Path(folder).rglob("*.xplane.pb")
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]


def at_work(intervals: Iterable[tuple[float, float]], apart: float) -> list[float]:
    """How much time intervals cover, of each group of them; groups are so far apart or more."""
    groups, until = [], -math.inf
    for start, end in sorted(intervals):
        if start - until >= apart:
            groups.append(0.0)
        groups[-1] += max(0.0, end - max(start, until))
        until = max(until, end)
    return groups
