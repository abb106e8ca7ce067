"""What the device does in a call, told by a trace."""

import contextlib
import types
from pathlib import Path

import pytest

from conv_pallas import _trace


@pytest.mark.parametrize(
    "intervals, expected",
    [
        ([], []),
        ([(0, 10)], [10]),
        ([(0, 10), (10, 15), (17, 20)], [18]),  # one after the other, and a gap
        ([(0, 10), (2, 5), (8, 12)], [12]),  # at the same time
        ([(200, 210), (0, 10)], [10, 10]),  # two calls, in whatever order they are told
        ([(0, 10), (109, 111), (211, 212)], [12, 1]),  # from the end of the last one on
        ([(0, 200), (10, 20), (250, 260)], [210]),
    ],
)
def test_what_runs_at_once_counts_once_and_a_pause_parts_calls(intervals, expected):
    assert _trace.at_work(intervals, 100) == expected


def test_where_there_is_no_gpu_nothing_is_told():
    def call():
        raise AssertionError("nothing is to be called")

    assert _trace.device_seconds({"a": call}) == _trace.kernels(call) == {}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, as far as a trace tells; its clock, in ns, is `now`, and its kernels are `events`."""
    device = types.SimpleNamespace(now=0.0, events=[], streams=("Stream #13(Compute)",))
    monkeypatch.setattr(_trace.jax, "default_backend", lambda: "gpu")

    @contextlib.contextmanager
    def trace(folder, profiler_options):
        assert profiler_options.python_tracer_level == 0
        yield
        Path(folder, "plugins").mkdir()
        Path(folder, "plugins", "host.xplane.pb").touch()

    def from_file(name):
        assert name.endswith(".xplane.pb")
        event = lambda start, ns, name="k": types.SimpleNamespace(  # noqa: E731
            name=name, start_ns=start, duration_ns=ns
        )
        line = lambda name, events: types.SimpleNamespace(name=name, events=events)  # noqa: E731
        plane = lambda name, lines: types.SimpleNamespace(name=name, lines=lines)  # noqa: E731
        real = [line(name, [event(*e) for e in device.events]) for name in device.streams]
        other = line("XLA Ops", [event(0, 1e9)])  # tells the same once more
        return types.SimpleNamespace(
            planes=[plane("/device:GPU:0", [*real, other]), plane("/host:CPU", [other])]
        )

    monkeypatch.setattr(_trace.jax.profiler, "trace", trace)
    monkeypatch.setattr(_trace.jax.profiler.ProfileData, "from_file", from_file)
    monkeypatch.setattr(
        _trace.time, "sleep", lambda s: setattr(device, "now", device.now + 1e9 * s)
    )

    def call(*kernels):
        """Of kernels so many ns after each other, of so many ns."""

        def run():
            for wait, ns, *name in kernels:
                device.now += wait
                device.events.append((device.now, ns, *name))
                device.now += ns

        return run

    device.call = call
    return device


def test_each_call_is_told_by_what_the_device_did_in_it(gpu):
    calls = {
        "a": gpu.call((0, 1000), (500, 2000)),  # the host was slow in between
        "b": gpu.call((0, 7000)),
    }
    found = _trace.device_seconds(calls, rounds=3)
    assert {name: spread.median for name, spread in found.items()} == pytest.approx(
        {"a": 3e-6, "b": 7e-6}
    )
    assert found["a"].over(3).median == pytest.approx(1e-6)


def test_no_call_always_follows_the_same_one(gpu):
    order = []
    calls = {name: lambda name=name: order.append(name) or gpu.call((0, 1000))() for name in "abc"}
    assert _trace.device_seconds(calls, rounds=9).keys() == set("abc")
    rounds = [tuple(order[i : i + 3]) for i in range(0, 27, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds) and len(set(rounds)) > 2


def test_kernels_are_told_in_their_order(gpu):
    call = gpu.call((0, 1000, "pad"), (0, 3000, "conv"), (0, 2000, "pad"))
    gpu.streams += ("Stream #14(MemcpyD2D)",)  # on which the same runs at the same time
    found = _trace.kernels(call, rounds=2)
    assert list(found) == ["pad", "conv"]
    assert found["pad"] == pytest.approx((4, 6e-6)) and found["conv"] == pytest.approx((2, 6e-6))


def test_nothing_is_told_where_calls_cannot_be_told_apart(gpu):
    calls = {"a": gpu.call((0, 1000), (4e6, 1000)), "b": gpu.call((0, 7000))}
    assert _trace.device_seconds(calls) == {}
    gpu.streams = ()
    assert _trace.device_seconds({"b": calls["b"]}) == {}
