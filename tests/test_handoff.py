"""What an array costs that goes from core to core is told beside what was timed meanwhile."""

import pytest

from benchmarks import __main__ as command
from benchmarks import handoff, harness, stored
from benchmarks import readme as figures
from conv_pallas import _measure
from conv_pallas._layers import Layer
from conv_pallas._measure import FORWARD, OURS, STOCK, Settings


@pytest.fixture
def cores(monkeypatch):
    """Cores 2, 5 and 7, of which one takes so many times as long for what another wrote."""
    state = dict(on={2, 5, 7}, wrote=None, seen=[], times=1.0)

    def move(process, on):
        assert process == 0  # this thread
        state["on"] = set(on)
        state["seen"].append(set(on))

    def write(array):
        (here,) = state["on"]
        before, state["wrote"] = state["wrote"], here
        return 1e-5 if before == here else 1e-5 * state["times"]

    monkeypatch.setattr(handoff.os, "sched_getaffinity", lambda process: state["on"], raising=False)
    monkeypatch.setattr(handoff.os, "sched_setaffinity", move, raising=False)
    monkeypatch.setattr(handoff, "_write", write)
    return state


@pytest.mark.parametrize("times, apart", [(1.3, False), (8.0, True)])
def test_the_two_cores_that_lie_farthest_apart_write_by_turns(cores, times, apart):
    cores["times"] = times
    ratio = handoff.ratio()
    assert ratio == pytest.approx(times)
    assert handoff.apart([ratio, None]) == [apart, None]
    assert cores["seen"] == [{2, 5, 7}, *([{2}, {7}] * (handoff.TURNS // 2)), {2, 5, 7}]


def test_a_thread_may_go_everywhere_again_after_an_error(cores, monkeypatch):
    monkeypatch.setattr(handoff, "_write", lambda array: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        handoff.ratio()
    assert cores["on"] == {2, 5, 7}


def test_one_core_hands_nothing_over_nor_do_threads_that_go_where_they_like(cores, monkeypatch):
    cores["on"] = {3}
    assert handoff.ratio() is None
    cores["on"] = {3, 4}

    def refuse(process, on):
        raise PermissionError

    monkeypatch.setattr(handoff.os, "sched_setaffinity", refuse)
    assert handoff.ratio() is None
    monkeypatch.delattr(handoff.os, "sched_setaffinity")  # as on macOS
    assert handoff.ratio() is None


def test_cores_that_are_here():
    ratio = handoff.ratio()
    assert ratio is None or 0.2 < ratio < 1000


def test_rounds_are_told_apart(monkeypatch):
    """Ours is twice as fast with the cores together, and half as fast with them apart."""
    ratios = [1.2, 8.0, 1.1, None, 8.0, 1.1, 8.0]
    asked = iter(ratios)
    monkeypatch.setattr(handoff, "ratio", lambda: next(asked))

    def interleaved(calls, settings, each_round):
        for _ in ratios:
            each_round()
        times = [{None: 9.0, 8.0: 4.0}.get(ratio, 1.0) for ratio in ratios]
        return {STOCK: (2.0, 2.0, 2.0, 9.0, 2.0, 2.0, 2.0), OURS: tuple(times)}

    monkeypatch.setattr(harness._measure, "interleaved", interleaved)
    monkeypatch.setattr(harness._neighbours.Watch, "taken", lambda self: None)
    layer = Layer("small", "no model", 2, 96, 8, 8, 3, G=8)
    brief = Settings(least=1e-4, rounds=(3, 3), limit=0.1)
    m = harness.measure(layer, FORWARD, settings=brief, variants={STOCK: None, OURS: None})
    assert m.handoffs == tuple(ratios)
    assert m.ratio_where(False, STOCK, OURS).median == 2.0
    assert m.ratio_where(True, STOCK, OURS).median == 0.5
    host = harness.host() | {"commit": "0123456789"}
    found = stored.result(host, brief, {"bytes": 1e9, "float32": 1e10}, [m])
    (line,) = found["measurements"]
    assert line["handoffs"] == ratios
    assert (line[stored.TOGETHER], line[stored.APART]) == (2.0, 0.5)
    text = (
        "the cores lay apart in 50% of the rounds; where a pass saw both (1 did, 3 rounds and more "
        "of each), ours was 2.00 times as fast as the fastest baseline with the cores together, "
        "and 0.50 times with them apart"
    )
    assert stored.of_cores(found) == text
    assert text in command.summary(found)
    assert f"\n- T{text[1:]}. They are apart while" in figures.figures(found)
    line["handoffs"] = [1.2, 1.1, 1.1, None, 8.0, 1.1, 8.0]  # one or two may be a hiccup's
    assert stored.of_cores(found) == "the cores lay apart in 33% of the rounds"
    line["handoffs"] = ratios
    # One program has one time: what differs there is the rounds.
    line["speedup_over_fastest"]["same_program"] = True
    assert stored.of_cores(found) == "the cores lay apart in 50% of the rounds"
    # A result of before, or of another system, says nothing of it.
    del line["handoffs"]
    assert stored.of_cores(found) == "" and "cores lay" not in figures.figures(found)


def test_each_round_begins_with_it():
    rounds, calls = [], []
    turn = lambda name: lambda: calls.append(name)  # noqa: E731
    settings = Settings(least=0.0, rounds=(3, 3), limit=10.0)
    times = _measure.interleaved(
        {"a": turn("a"), "b": turn("b")}, settings, lambda: rounds.append(len(calls))
    )
    first = rounds[0]  # after what each call was tried for
    each = (len(calls) - first) // 3
    assert len(times["a"]) == 3 and rounds == [first, first + each, first + 2 * each]
