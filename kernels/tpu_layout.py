"""How arrays lie in a TPU's memory."""

import itertools
import math

from conv_pallas.kernels.tpu_window import LANES, SUBLANES, round_up
from conv_pallas.spec import Problem


def along_lanes(N: int, T: int, C: int) -> str:
    """The letter of the axis of an array ``(N, T, C)`` that XLA lays along lanes.

    Memory is in tiles of 8 times 128 numbers, and what does not fill them is lost. Where nothing
    else decides, of an argument or a result, XLA takes the two axes for a tile with which the least
    is lost, and of equals the last ones.
    """
    sizes = {"C": C, "T": T, "N": N}

    def taken(axes: tuple[str, str]) -> int:
        lanes, sublanes = (sizes[axis] for axis in axes)
        rest = math.prod(size for axis, size in sizes.items() if axis not in axes)
        return round_up(lanes, LANES) * round_up(sublanes, SUBLANES) * rest

    return min(itertools.permutations(sizes, 2), key=taken)[0]


def axes_along_lanes(problem: Problem) -> set[str]:
    """What `along_lanes` says of x and of y."""
    N, spec = problem.N, problem.spec
    return {along_lanes(N, spec.time, problem.C), along_lanes(N, spec.out_time, problem.O)}
