"""Where the TPU kernels run without being asked for.

By estimate, not by measurement: `benchmarks/results/tpu-static` compares what libtpu's compiler
makes of them with what it makes of XLA's own convolution, on v5e and v6e. Ours is the default
where every estimate there is of at least `LEAST` channels in and out is ahead on both. The test
beside those results holds the rule to them. Elsewhere XLA's program is estimated to be as fast or
faster, or nothing is estimated, and ours runs by name.
"""

import jax.numpy as jnp

from conv_pallas.spec import Problem

LEAST = 256  # channels in and out, where a pass fills the matrix unit of every generation
PRIORITY = 10


def by_name(problem: Problem) -> str | None:
    """Why the kernel for ``problem`` is not the default; None where it is."""
    if problem.spec.groups != 1:
        return "by name only: not estimated faster than XLA for depthwise"
    if problem.lhs_dtype != jnp.bfloat16 or problem.rhs_dtype != jnp.bfloat16:
        return "by name only: estimated faster than XLA for bfloat16 alone"
    if min(problem.C, problem.O) < LEAST:
        return f"by name only: not estimated faster than XLA below {LEAST} channels in and out"
    if problem.spec.kernel_size < 2:
        return "by name only: a single tap is a matrix product"
    return None


def priority(problem: Problem) -> int | None:
    """For `Kernel.priority`."""
    return PRIORITY if by_name(problem) is None else None
