"""The convolution as XLA does it best: which formulation, for which operation, where.

    y[n, u, o]  = sum over k, c of  x[n, u*S + k*D - low, c] * w[k, c, o]
    dx          = the same of g, with taps reversed and channels in and out exchanged
    dw[k, c, o] = sum over n, u of  x[n, u*S + k*D - low, c] * g[n, u, o]

Operations: ``2 N T' K (C / G) O``. Bytes: x, w and y once each at least; what a formulation holds
beside them is in its docstring.

The formulations themselves are in `xla_formulations.py`. For CPUs the rules, which come from
measurements, are in `xla_cpu.py`. On other platforms they come from what XLA compiles to, read
without the device; nothing was timed there.
"""

import jax
from jax import lax

from conv_pallas.kernels import Kernel, xla_cpu
from conv_pallas.kernels.xla_formulations import FORWARD, KERNEL_GRAD, flip, numbers_of
from conv_pallas.kernels.xla_pieces import UNROLLED
from conv_pallas.spec import Problem

DESCRIPTIONS = {
    "native": "one lax.conv_general_dilated",
    "padded": "x padded in memory, then one lax.conv_general_dilated",
    "canonical": "one lax.conv_general_dilated, its axes in order",
    "barrier": "x padded in memory behind a barrier, so that cuDNN gets the dilation",
    "shifts": "shifted multiply-adds of one padded x",
    "own_pads": "shifted multiply-adds, each with a pad fused into it",
    "tree": "shifted multiply-reductions, block by block of time",
    "matmuls": "one matmul for each tap",
    "im2col": "one matmul of all taps side by side",
    "scatter": "one matmul whose products for all taps are shifted and added",
    "blocks": "one matmul of taps in blocks, whose products are shifted and added",
    "fold": "the dilation as an axis of its own",
    "dense": "one dense convolution with zeros between the groups",
    "split": "one lax.conv_general_dilated for each group",
}


def choose(problem: Problem) -> str:
    """The name of the formulation to take, of `FORWARD` or `KERNEL_GRAD`."""
    if problem.platform == "cpu":
        return xla_cpu.choose(problem)
    if problem.platform == "tpu":
        few = problem.spec.kernel_size <= UNROLLED
        return "shifts" if problem.depthwise and few else "native"
    gradient_of_kernel = problem.operation == "conv1d_kernel_grad"
    return _gpu_kernel_grad(problem) if gradient_of_kernel else _gpu_forward(problem)


# --- GPU ---


def _gpu_forward(problem: Problem) -> str:
    """Forward and input gradient: the dilation reaches cuDNN, and no zero is multiplied.

    XLA:GPU folds CAUSAL padding into the window, finds it uneven, and fills the kernel with
    zeros: for K=3 and D=512 ``window={size=1025}``. Behind a barrier it stays ``window={size=3
    rhs_dilate=512}`` (read from jax 0.12.0.1's output for an H200; `conv_pallas.aot`). A
    depthwise convolution moves far more than it multiplies: XLA makes one fusion of it.
    """
    if problem.depthwise and problem.spec.kernel_size <= UNROLLED:
        return "shifts"
    return "matmuls" if problem.spec.kernel_size == 1 else "barrier"


def _gpu_kernel_grad(problem: Problem) -> str:
    """Kernel gradient: matmuls and reductions, for cuDNN has none of these gradients.

    XLA:GPU makes of it a forward convolution whose window is as wide as time, ``window=
    {size=4096 stride=512}``, between transposes of x and g.
    """
    return "shifts" if problem.depthwise else "matmuls"


# --- Running it ---


def run_as(name: str, problem: Problem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The operation of ``problem`` by the formulation ``name``."""
    operand, numbers = numbers_of(problem)
    lhs, rhs = lhs.astype(operand), rhs.astype(operand)
    spec = problem.spec
    table = KERNEL_GRAD if problem.operation == "conv1d_kernel_grad" else FORWARD
    formulation = table[name]
    if problem.operation == "conv1d_input_grad":
        rhs, spec = flip(rhs, spec.groups), spec.transposed()
    if problem.platform == "cpu":
        formulation = xla_cpu.in_parts(formulation, name, problem)
    return formulation(lhs, rhs, spec, numbers).astype(problem.out_dtype)


def run(problem: Problem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The operation of ``problem`` by the formulation that `choose` names."""
    name = choose(problem)
    if problem.platform == "cpu":
        # What a gradient reads has to be in memory. Else XLA computes it anew in what cuts and
        # transposes it: of a residual network all blocks before, in every block. Training steps
        # of tcn-mnist take 280 ms with this and 438 without, of tcn-adding 88 and 100.
        if problem.operation == "conv1d_kernel_grad":
            lhs, rhs = lax.optimization_barrier((lhs, rhs))
        elif problem.operation == "conv1d_input_grad":
            lhs = lax.optimization_barrier(lhs)
    out = run_as(name, problem, lhs, rhs)
    if problem.platform == "cpu" and name in ("own_pads", "shifts", "matmuls", "scatter", "blocks"):
        # Fused into a reduction that consumes it, such as a loss, the sum over taps is done
        # element by element: 54 ms for a training step of 4 MiB that takes 7 ms behind a barrier.
        # Bias and activation lose next to nothing by it.
        out = lax.optimization_barrier(out)
    return out


KERNEL = Kernel(
    implementation="xla",
    platforms=("cpu", "cuda", "rocm", "tpu"),
    run=run,
    decline=lambda problem: None,
    describe=lambda problem: DESCRIPTIONS[choose(problem)],
    priority=0,
    # A batch of kernels becomes groups, and the rules see them. Mapped, each would run as the
    # dense case that it no longer is.
    vmappable=False,
)
