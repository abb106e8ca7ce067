"""Who compiles and who times, of processes that tune side by side; threads stand for them here."""

import tempfile
import threading

import pytest

from conv_pallas import _turns

SOON = 0.2  # seconds in which whoever may enter has entered


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


class Inside:
    """A thread that enters one of the contexts, and stays until it is told to leave."""

    def __init__(self, turn):
        self.entered, self.leave = threading.Event(), threading.Event()

        def run():
            with turn():
                self.entered.set()
                assert self.leave.wait(30)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def is_in(self, seconds: float = SOON) -> bool:
        return self.entered.wait(seconds)

    def go(self) -> None:
        self.leave.set()
        self.thread.join(30)


@pytest.mark.parametrize(
    "first, second, together",
    [
        (_turns.compiling, _turns.compiling, True),
        (_turns.compiling, _turns.on_device, True),
        (_turns.on_device, _turns.compiling, True),
        (_turns.on_device, _turns.on_device, False),
        (_turns.compiling, _turns.timing, False),
        (_turns.timing, _turns.compiling, False),
        (_turns.timing, _turns.timing, False),
        (_turns.timing, _turns.on_device, False),
    ],
)
def test_who_may_be_in_beside_whom(first, second, together):
    one = Inside(first)
    assert one.is_in(30)
    other = Inside(second)
    assert other.is_in(30 if together else SOON) is together
    one.go()
    assert other.is_in(30)
    other.go()


def test_nobody_overtakes_who_waits_to_time():
    """Or those that compile would keep it out forever, as one after the other comes."""
    one = Inside(_turns.compiling)
    assert one.is_in(30)
    times = Inside(_turns.timing)
    assert not times.is_in()
    late = Inside(_turns.compiling)
    assert not late.is_in()
    one.go()
    assert times.is_in(30) and not late.is_in()
    times.go()
    assert late.is_in(30)
    late.go()
