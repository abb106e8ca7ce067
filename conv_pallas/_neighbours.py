"""How much of the cores other programs take while something is timed.

A program that gives each core an equal share of its work waits for the core that is taken, and one
that deals it out in small parts less so: not even a ratio of the two can be trusted. Beside an
endless loop on two cores the layer tcn-copy/D128 took twice as long in ours, and stock 1.5 times.
"""

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
# Cores that others may take on average, and the part of all that has to be idle beside them.
BUSY, IDLE = 0.05, 0.25


class Watch:
    """From when it is made on, what others than this process take of the cores."""

    def __init__(self):
        self._start = _now()

    def taken(self) -> float | None:
        """Cores that others have taken on average, though there were none to spare; else zero.

        No less than that: the system counts whole ticks, mostly hundredths of a second, and what
        may be one too many on each core is left out. None where it does not tell, or has had no
        time to.
        """
        if self._start is None or (now := _now()) is None:
            return None
        wall, busy, idle, own = (b - a for a, b in zip(self._start, now, strict=True))
        if busy + idle <= 0 or wall <= 0:
            return None
        spared = idle >= IDLE * (busy + idle)
        rounding = len(os.sched_getaffinity(0)) / os.sysconf("SC_CLK_TCK")
        return 0.0 if spared else max(0.0, busy - own - rounding) / wall


def disturbed(taken: float | None) -> bool:
    """Whether others took too much; False where nobody knows.

    Args:
      taken: from `Watch.taken`.
    """
    return (taken or 0.0) > BUSY


def _now() -> tuple[float, float, float, float] | None:
    """Seconds of the clock, those that the cores were busy, and idle, and this process's.

    Of the cores that this process may run on, all together.
    """
    try:
        lines = STAT.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    busy = idle = 0
    for name, *ticks in (line.split() for line in lines):
        if name in ours:
            # Waiting for a disk is idle, another machine's part busy; the guests' come twice.
            rest = int(ticks[3]) + int(ticks[4])
            idle += rest
            busy += sum(map(int, ticks[:8])) - rest
    second = os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), busy / second, idle / second, time.process_time()
