"""Formulations that are worth compiling for a problem, where all of them are timed."""

from conv_pallas.kernels import xla_cpu
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
