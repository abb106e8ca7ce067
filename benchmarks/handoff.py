"""How long a core takes for what another core has just written.

It depends on which caches the two share, and the host of a virtual machine moves its cores while
something is timed. A convolution that splits its work once, as XLA's own does, hardly knows the
difference. What makes one array from another in several steps, as matmuls of taps and minimal
filtering do, has threads read what others wrote, and may take twice as long while the cores lie
apart: two programs then come in another order for some tenths of a second.
"""

import os
import statistics
import time
from collections.abc import Iterable

import numpy as np

# Times as long: in results/cpu/layers.json it is mostly 1.2 to 1.8, and for a while 2 to 6.
APART = 2.0
BYTES = 1 << 19  # less than a core's own cache holds
TURNS = 8


def ratio() -> float | None:
    """How many times longer a core writes over what another wrote than over its own.

    Of the first and the last core that this process may run on; None where there is but one, or
    where the system holds no thread to a core, or must not. It takes less than a millisecond.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    before = os.sched_getaffinity(0)  # of this thread; the others stay where they are
    if len(before) < 2:
        return None
    try:
        os.sched_setaffinity(0, before)
    except OSError:  # as some sandboxes have it
        return None
    array = np.zeros(BYTES // 8)
    found = []
    try:
        for turn in range(TURNS):
            os.sched_setaffinity(0, {max(before) if turn % 2 else min(before)})
            others, own = _write(array), _write(array)
            found.append(others / own)
    finally:
        os.sched_setaffinity(0, before)
    return statistics.median(found[1:])  # the first finds what this thread wrote


def _write(array: np.ndarray) -> float:
    start = time.perf_counter()
    np.add(array, 1.0, out=array)
    return time.perf_counter() - start


def apart(ratios: Iterable[float | None]) -> list[bool | None]:
    """Of each `ratio` whether the cores lay apart; None where nobody knows."""
    return [None if r is None else r > APART for r in ratios]
