"""What the device does in a call, told by a trace."""

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

    assert _trace.device_seconds({"a": call}) == {}
