"""Where the dense TPU kernels are the default: by estimates, until somebody measures."""

import dataclasses

from conv_pallas.kernels.tpu_layout import axes_along_lanes
from conv_pallas.kernels.tpu_matmul import passes_of
from conv_pallas.kernels.tpu_window import LANES, Chip
from conv_pallas.spec import Problem

# Chips for which there are estimates.
ESTIMATED = ("v5e", "v6e")
# Up to where there are any for `tpu_time_in_lanes`.
FEWEST_STEPS, MOST_TAPS = 2**10, 64
# And for `wins`: steps of all samples, channels, taps; and the share of a tile's rows that are
# steps, where the estimates are of full ones.
STEPS, CHANNELS, TAPS, FULL = 2**13, 512, 7, 0.95


def time_in_lanes_wins(problem: Problem, chip: Chip) -> bool:
    """Whether by estimate `tpu_time_in_lanes` is faster than XLA's own convolution.

    It is nowhere behind, and mostly ahead, in the benchmarks' layers of 2 to 600 channels that lie
    with time along lanes and have an estimate of both: of very-long XLA's can't be read. XLA's
    estimate over ours as in `wins`, the least and the most of a model's layers:

        ============  =========  =========  =========  =========  =========  =========
                      v5e                              v6e
        ============  =========  =========  =========  =========  =========  =========
        tcn-adding    2.6..3.3   3.6..5.0   3.6..4.1   2.1..2.7   2.7..3.3   2.1..3.0
        tcn-copy      3.0..6.6   2.9..6.2   5.6..7.9   2.6..3.9   2.6..3.2   3.5..4.9
        tcn-mnist     1.9..3.1   1.9..3.0   3.4..4.5   1.6..1.8   1.5..1.8   2.0..2.3
        tcn-music     1.4..1.5   1.4..1.6   1.8        1.6..1.7   1.2..1.3   2.5..2.6
        wavenet       1.1..1.3   1.0..1.7   1.5..2.4   2.0..2.2   1.0..1.9   1.7..2.0
        hifigan-v1    1.5..4.8   1.9..7.8   1.8..4.3   1.7..3.8   2.0..6.1   2.0..5.5
        ms-tcn        2.6..4.8   2.6..6.7   4.4..6.5   3.1..4.9   3.0..8.1   6.4..8.7
        spliceai-10k  2.8..4.8   4.3..5.3   1.8..2.0   1.6..2.1   3.3..3.8   2.9..3.5
        atacworks     7.8        14.5       5.8        4.9        12.6       6.3
        ragged        1.5..2.8   1.3..3.1   1.5..2.5   1.4..2.4   1.2..2.8   1.5..2.5
        ============  =========  =========  =========  =========  =========  =========

    Not so where samples lie along lanes, as 128 of them do: XLA's own convolution is ahead there,
    and of short sequences ten times. Those are left to it, and what there is no estimate for: one
    channel in, fewer steps, more taps, more than one product.
    """
    dtypes = {problem.lhs_dtype, problem.rhs_dtype, problem.out_dtype}
    if chip.name not in ESTIMATED or len(dtypes) > 1 or passes_of(problem) != "bf16":
        return False
    if problem.exported:  # for whichever chip it will meet
        return False
    axes, steps = axes_along_lanes(problem), problem.N * problem.spec.out_time
    # 128 channels on one side fill lanes; what is copied there is no more than XLA copies itself.
    along_time = axes == {"T"} or (axes == {"T", "C"} and max(problem.C, problem.O) == LANES)
    within = problem.C > 1 and problem.spec.kernel_size <= MOST_TAPS
    return along_time and within and steps >= FEWEST_STEPS


def wins(plan_of, problem: Problem, chip: Chip) -> bool:
    """Whether by estimate this is faster than XLA's own convolution; nobody measured.

    So it is where channels fill whole lanes, factors are bfloat16, and the padding is on one side
    and no longer than a tile. XLA's estimate over ours, for forward, input gradient and kernel
    gradient (libtpu 0.0.50.1; benchmarks/results/tpu-static):

        =================  ==================  ==================
        layer              v5e                 v6e
        =================  ==================  ==================
        C=128 K=3 D=4      1.00  1.00  1.92    1.26  1.25  2.41
        C=256 K=7 D=64     1.13  1.15  1.21    1.88  2.05  1.82
        C=512 K=3 D=64     1.26  1.33  1.07    2.17  2.56  1.82
        =================  ==================  ==================

    128 channels are left to XLA on v5e, and where there are few steps: see below. And so is what
    there is no estimate for: fewer steps, more channels, more taps, and steps that leave tiles
    empty, whose products are computed all the same (2100 of them take two tiles of 2048).
    """
    dtypes = {problem.lhs_dtype, problem.rhs_dtype, problem.out_dtype}
    if chip.name not in ESTIMATED or len(dtypes) > 1 or passes_of(problem) != "bf16":
        return False
    if problem.exported:  # for whichever chip it will meet
        return False
    steps, channels = problem.N * problem.spec.out_time, max(problem.C, problem.O)
    if steps < STEPS or channels > CHANNELS or problem.spec.kernel_size > TAPS:
        return False
    if problem.C % LANES or problem.O % LANES:
        return False
    if max(problem.C, problem.O) == LANES:
        # A chain's training step is estimated at 0.95 on v5e. On v6e w is laid out anew, which is
        # 1 % of 16384 steps, where memory is the bound of both.
        if chip.name == "v5e" or problem.N * problem.spec.time < 2**15:
            return False
    for operation, low in (("conv1d", True), ("conv1d_input_grad", False)):
        # All dtypes are one.
        plan = plan_of(dataclasses.replace(problem, operation=operation), chip)
        if plan is None:
            return False
        walk = plan.walk
        one_sided = walk.low == walk.halo * low and walk.time == walk.out_time
        if not (one_sided and 0 < walk.halo <= walk.rows):
            return False
        if walk.out_time < FULL * walk.rows * -(-walk.out_time // walk.rows):
            return False
    return True
