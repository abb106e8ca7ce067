"""Formulations that are worth compiling for a problem, where all of them are timed."""

from conv_pallas.kernels import xla_cpu
from conv_pallas.kernels.xla_cpu_bounds import (
    CHANNELS,
    STEPS,
    every_tap_sees,
    is_float32,
    of_group,
)
from conv_pallas.kernels.xla_formulations import FORWARD, KERNEL_GRAD
from conv_pallas.kernels.xla_pieces import UNROLLED
from conv_pallas.spec import Problem


def candidates(problem: Problem, first: str) -> list[str]:
    """Names of formulations, ``first`` first; without those that are hopeless at first sight."""
    spec, c, m = problem.spec, problem.C // problem.spec.groups, problem.O // problem.spec.groups
    products = spec.kernel_size * (problem.as_convolution[1] // spec.groups)
    each_its_own = spec.groups > 1 and c == m == 1
    few = each_its_own or spec.kernel_size <= UNROLLED
    spreads = problem.as_convolution[0].input_dilation > 1 == spec.kernel_dilation
    worth = {
        "shifts": products <= 64 or each_its_own,
        "own_pads": products <= 16 or problem.depthwise,
        "tree": products <= 64 or each_its_own,
        "matmuls": few,
        "im2col": few,
        "scatter": few,
        "blocks": spec.kernel_size > 3 and not each_its_own,
        "split": 1 < spec.groups <= 32,
        "channel_blocks": problem.depthwise and spec.kernel_size > 3 and problem.platform == "cpu",
        "dense": 1 < spec.groups,
        "fold": spec.kernel_dilation > 1 and spec.stride == 1,
        "winograd": spec.groups == spec.stride == spec.input_dilation == 1 < spec.kernel_size,
        "depth_to_space": spreads,
        "depth_to_space_winograd": spreads,
        "depth_to_space_im2col": spreads,
        "space_to_depth": problem.spec.stride > 1 == problem.spec.kernel_dilation,
        "space_to_depth_winograd": problem.spec.stride > 1 == problem.spec.kernel_dilation,
        "barrier": problem.platform != "cpu",
        "symmetric": problem.platform != "cpu",
        "parts": problem.platform == "cpu" and len(xla_cpu.pieces(problem)[0]) > 1,
    }
    table = KERNEL_GRAD if problem.operation == "conv1d_kernel_grad" else FORWARD
    names = [first, *(n for n in (*table, "parts") if n != first and worth.get(n, True))]
    transposed = problem.operation == "conv1d_input_grad" and problem.platform != "cpu"
    return [*names, "transposed"] if transposed else names


def sound(name: str, problem: Problem) -> bool:
    """Whether a formulation may run on a CPU without having been asked for.

    Not "dense", in which a NaN would meet other groups' zeros, nor a kernel gradient that is many
    times slower in the body of a loop, as JAX's transposes and convolutions of groups are
    (`xla_formulations.canonical_kernel_grad`). And minimal filtering only where its rounding errors
    are no more than those that `xla_winograd` tells of: in float32, without a precision. They are
    relative to what a tile sees, and an element's own products may all be small by chance, if they
    are few: of a kernel gradient over 80 to 256 steps up to one element in 5000 was off by more
    than it may be.
    """
    gradient_of_kernel = problem.operation == "conv1d_kernel_grad"
    if name == "dense":
        return False
    if gradient_of_kernel:
        convolves = name in ("canonical", "padded") or name.startswith("space_to_depth")
        if name in ("native", "fold") or (convolves and problem.spec.groups > 1):
            return False
    if "winograd" not in name:
        return True
    spec, c, _ = of_group(problem)
    if not is_float32(problem) or problem.precision is not None:
        return False
    if gradient_of_kernel and (problem.N * spec.out_time < STEPS or not every_tap_sees(spec)):
        return False
    if not gradient_of_kernel and c < CHANNELS:
        return False
    if name == "winograd":
        return True
    # Taps of what it filters, in which a stride's steps are channels of one.
    taps = -(-spec.kernel_size // (spec.stride if gradient_of_kernel else spec.input_dilation))
    return taps in (2, 3, 5) if gradient_of_kernel else taps <= 5
