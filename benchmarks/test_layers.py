"""Layers under pytest-benchmark, to store and to compare runs.

    pytest benchmarks/ [--layers TEXT] [--implementation NAMES] [--benchmark-json PATH]
                       [--benchmark-compare]

All variants of a layer are checked and take turns, as in ``python -m benchmarks``; each test then
hands its share of the times to pytest-benchmark, whose clock plays them back. So its statistics,
groups, files and comparisons are of interleaved times.
"""

import functools

import jax
import pytest

from benchmarks import harness
from benchmarks.layers import ALL, fit, quick
from conv_pallas import dispatch
from conv_pallas._layers import select
from conv_pallas._measure import FORWARD, PASSES


class Replay:
    """A clock that stands still but for what is played back."""

    def __init__(self):
        self.now = 0.0
        self._seconds = iter(())

    def load(self, seconds):
        self._seconds = iter(seconds)

    def __call__(self):
        return self.now

    def play(self):
        self.now += next(self._seconds)


CLOCK = Replay()


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    text, names = option("--layers", None), option("--implementation", None)
    try:
        subjects = quick() if not text else ALL if text == "all" else select(text, ALL)
        implementations = None
        if names:
            implementations = [name.strip() for name in names.split(",")]
            dispatch.canonicalize(implementations)
    except ValueError as e:
        raise pytest.UsageError(str(e)) from None
    found = [
        pytest.param(subject, which, name, id=f"{subject.name}-{which}-{name}")
        for subject in subjects
        for which in PASSES
        for name in harness.variants_of(subject, implementations)
    ]
    metafunc.parametrize(("subject", "which", "name"), found)


@functools.lru_cache(maxsize=1)  # the variants of a pass are neighbours
def measured(subject, which, implementations):
    variants = harness.variants_of(subject, implementations)
    return harness.measure(subject, which, variants=variants)


@functools.cache
def surroundings(dtype):
    """The machine and its ceilings, measured once."""
    return harness.host(), harness.ceilings((dtype,))


@pytest.mark.benchmark(timer=CLOCK, min_rounds=1)
def test_layer(benchmark, request, subject, which, name):
    names = request.config.getoption("--implementation", None)
    implementations = tuple(n.strip() for n in names.split(",")) if names else None
    subject = fit(subject, jax.default_backend())
    m = measured(subject, which, implementations)
    variant = m.variants[name]
    if variant.refused:
        pytest.fail(f"refused: {variant.reason}", pytrace=False)
    if not variant.seconds:
        pytest.skip(variant.reason)
    host, limits = surroundings(subject.dtype)
    operations, bytes_ = (sum(c[i] for c in subject.costs(which != FORWARD)) for i in (0, 1))
    median = variant.time.median
    benchmark.group = f"{subject.name}, {which} ({subject})"
    benchmark.extra_info |= {
        "implementation": name,
        "pass": which,
        "layer": subject.name,
        "size": str(subject),
        "same program as": variant.same_as,
        "TFLOP/s": operations / median / 1e12,
        "GB/s": bytes_ / median / 1e9,
        "share of the roofline": harness.ideal(subject, which, limits) / median,
        "memory": variant.memory,
        "runs in a launch": m.inside,
        **host,
    }
    CLOCK.load(variant.seconds)
    benchmark.pedantic(CLOCK.play, rounds=len(variant.seconds), iterations=1)
