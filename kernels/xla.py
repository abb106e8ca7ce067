"""The convolution as XLA does it best: which formulation, for which operation, where.

    y[n, u, o]  = sum over k, c of  x[n, u*S + k*D - low, c] * w[k, c, o]
    dx          = the same of g, with taps reversed and channels in and out exchanged
    dw[k, c, o] = sum over n, u of  x[n, u*S + k*D - low, c] * g[n, u, o]

Operations: ``2 N T' K (C / G) O``. Bytes: x, w and y once each at least; what a formulation holds
beside them is in its docstring.

The formulations themselves are in `xla_formulations.py`. For CPUs the rules, which come from
measurements, are in `xla_cpu.py` and the files that it is made of; what was measured on the CPU at
hand comes before them (`xla_tuned.py`). On other platforms they come from what XLA compiles to,
read without the device; of those for GPUs that say so, from an H200 as well.
"""

import dataclasses
import functools

import jax
import numpy as np
from jax import lax

from conv_pallas import taps
from conv_pallas.activations import activate
from conv_pallas.kernels import Kernel, xla_cpu, xla_cpu_kernel_grad, xla_native, xla_tuned
from conv_pallas.kernels.xla_formulations import (
    FORWARD,
    KERNEL_GRAD,
    Formulation,
    cropped,
    flip,
    numbers_of,
    some_steps,
)
from conv_pallas.kernels.xla_pieces import UNROLLED, in_taps, in_turn
from conv_pallas.spec import Problem

DESCRIPTIONS = {
    "native": "one lax.conv_general_dilated",
    "transposed": "JAX's transpose of lax.conv_general_dilated",
    "padded": "x padded in memory if need be, then one lax.conv_general_dilated",
    "canonical": "one lax.conv_general_dilated, its axes in order",
    "barrier": "x padded in memory behind a barrier, so that the dilation stays one",
    "symmetric": "padded alike on both sides, and what is too many cut off",
    "shifts": "shifted multiply-adds of one padded x",
    "own_pads": "shifted multiply-adds, each with a pad fused into it",
    "channel_blocks": "multiply-adds in a layout of channel blocks",
    "tree": "shifted multiply-reductions, block by block of time",
    "matmuls": "one matmul for each tap",
    "im2col": "one matmul of all taps side by side",
    "scatter": "one matmul whose products for all taps are shifted and added",
    "blocks": "one matmul of taps in blocks, whose products are shifted and added",
    "winograd": "minimal filtering: two outputs by fewer products than they have taps",
    "depth_to_space": "a convolution into a stride's steps, as channels of one",
    "depth_to_space_winograd": "minimal filtering into a stride's steps, as channels of one",
    "depth_to_space_im2col": "one matmul of all taps side by side into a stride's steps",
    "space_to_depth": "a stride's steps as one of more channels, then a convolution without it",
    "space_to_depth_winograd": "a stride's steps as one of more channels, then minimal filtering",
    "parts": "pieces of time, each of the taps that see anything there",
    "fold": "the dilation as an axis of its own",
    "dense": "one dense convolution with zeros between the groups",
    "split": "one lax.conv_general_dilated for each group",
}


def choose(problem: Problem) -> str:
    """The formulation to take: of `FORWARD` or `KERNEL_GRAD`, or "parts" or "transposed"."""
    if problem.platform == "cpu":
        return xla_tuned.lookup(problem) or xla_cpu.choose(problem)
    if problem.platform == "tpu":
        few = problem.spec.kernel_size <= UNROLLED
        return "shifts" if problem.depthwise and few else "native"
    gradient_of_kernel = problem.operation == "conv1d_kernel_grad"
    return _gpu_kernel_grad(problem) if gradient_of_kernel else _gpu_forward(problem)


# --- GPU ---

GPU_FEW = 256  # channels; between 150 and 450 nothing was measured
GPU_TAPS = 8  # that are written out: matmuls hold a copy of x for each, reductions compile slowly


def _gpu_ragged(problem: Problem) -> bool:
    """Whether a few taps are of few channels that fill no 16 bytes.

    cuDNN has slow algorithms alone for those. Measured on an H200, of 10, 25 and 150 channels and 5
    to 8 taps: matmuls take 0.5 to 1.0 of its time forward, and a training step 0.4 to 0.5. Of 450
    channels it is as fast as of others, and matmuls take 1.1 (kernel gradient) to 2.0 of its time
    (benchmarks/results/nvidia-h200, layers-first.jsonl and tiles-again.jsonl).
    """
    spec, size = problem.spec, max(problem.lhs_dtype.itemsize, problem.rhs_dtype.itemsize)
    plain = spec.groups == spec.stride == spec.input_dilation == 1
    ragged = any(n * size % 16 for n in (problem.C, problem.O))
    few = all(isinstance(n, int) and n <= GPU_FEW for n in (problem.C, problem.O))
    return plain and ragged and few and spec.kernel_size <= GPU_TAPS


def _gpu_in_parts(formulation: Formulation, name: str, problem: Problem) -> Formulation:
    """The formulation of that name, as many taps at a time as can be compiled and held.

    A depthwise kernel gradient of 87 taps would be over a hundred kernels, which take many times as
    long to compile as a loop.
    """
    K, sums = problem.spec.kernel_size, problem.operation == "conv1d_kernel_grad"
    if name == "matmuls" and K > GPU_TAPS:
        return in_taps(formulation, GPU_TAPS, sums)
    if name == "shifts" and sums and K > GPU_TAPS:
        return in_taps(formulation, GPU_TAPS // 2, sums, written_out=1)
    each = problem.O // problem.C if problem.operation == "conv1d_input_grad" else 1
    if name == "shifts" and not sums and K * each > UNROLLED:
        return in_taps(formulation, max(1, UNROLLED // each), sums)
    return formulation


def _gpu_forward(problem: Problem) -> str:
    """Forward and input gradient: the dilation reaches cuDNN, and no zero is multiplied.

    cuDNN pads both sides alike. XLA:GPU folds CAUSAL padding into the window, finds it uneven, and
    fills the kernel with zeros: for K=3 and D=512 ``window={size=1025}``. Behind a barrier it stays
    ``window={size=3 rhs_dilate=512}``, at the price of a copy of x, which even padding does not
    have to pay (read from jax 0.12.0.1's output for an H200; `conv_pallas.aot`). Where little is
    padded, as much on the other side costs less than that copy.

    What JAX makes of a strided layer's input gradient becomes ``__cudnn$convBackwardInput``. As a
    convolution of a g that is filled up with zeros it has S times the work. cuDNN has none with a
    dilation.

    A depthwise convolution moves far more than it multiplies: XLA makes one fusion of it.
    """
    spec, gradient = problem.spec, problem.operation == "conv1d_input_grad"
    if problem.depthwise:
        return "shifts"
    if spec.kernel_size == 1 or _gpu_ragged(problem):
        return "matmuls"
    if gradient and spec.stride > 1 and spec.kernel_dilation == 1:
        return "transposed"
    here = problem.as_convolution[0]
    low, high = here.padding
    if low == high or spec.kernel_dilation == 1:
        return "native"
    if here.input_dilation > 1 or not isinstance(here.out_time, int):
        return "barrier"  # which writes the dilated input as well: XLA has none beside a kernel's
    return "symmetric" if 8 * abs(low - high) <= here.out_time else "barrier"


def _gpu_kernel_grad(problem: Problem) -> str:
    """Kernel gradient: by cuDNN, which has none with a dilation; depthwise by reductions.

    Of a dilated layer's XLA:GPU makes a forward convolution whose window is as wide as time,
    ``window={size=4096 stride=512}``, between transposes of x and g. The same with time as
    ``(T/D, D)`` is ``__cudnn$convBackwardFilter`` of ``window={size=3x1}``, and costs one copy of
    x for its padding; a matmul for each tap costs K of them. A few taps of groups stay matmuls all
    the same, for cuDNN's gradients of groups are reported to be as slow as those of dense layers
    (jax-ml/jax issue 13800), and so does what has both a dilation and a stride, where that view
    would fill g with zeros.

    Depthwise each tap is two reductions, and x and g come from the L2 or from memory for each.
    """
    spec = problem.spec
    if problem.depthwise:
        return "shifts"
    few_of_groups = spec.groups > 1 and spec.kernel_size <= GPU_TAPS
    if spec.kernel_size == 1 or few_of_groups or _gpu_ragged(problem):
        return "matmuls"
    if spec.kernel_dilation == 1:
        return "native"
    return "fold" if spec.stride == 1 else "matmuls"


# --- Running it ---


def run_as(name: str, problem: Problem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The operation of ``problem`` by the formulation ``name``."""
    if name == "parts":
        return _parts(problem, lhs, rhs)
    operand, numbers = numbers_of(problem)
    lhs, rhs = lhs.astype(operand), rhs.astype(operand)
    if name == "transposed":
        return xla_native.run(problem, lhs, rhs)
    spec, _, _ = problem.as_convolution
    table = KERNEL_GRAD if problem.operation == "conv1d_kernel_grad" else FORWARD
    formulation = table[name]
    if problem.operation == "conv1d_input_grad":
        rhs = flip(rhs, spec.groups)
    if problem.platform == "cpu":
        formulation = xla_cpu.in_parts(formulation, name, problem)
        lhs, spec = cropped(lhs, spec)
    elif problem.platform != "tpu":
        formulation = _gpu_in_parts(formulation, name, problem)
    return formulation(lhs, rhs, spec, numbers).astype(problem.out_dtype)


def _parts(problem: Problem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Pieces of time one by one, each with the taps alone that see anything there."""
    sums, K = problem.operation == "conv1d_kernel_grad", problem.spec.kernel_size
    _, numbers = numbers_of(problem)
    this = dataclasses.replace(problem, out_dtype=numbers.acc if sums else problem.out_dtype)

    def part(lhs, steps):
        here = some_steps(problem.as_convolution[0], steps.start, len(steps))
        live = here.live_taps or range(1)  # whose products are zeros
        here = here.of_taps(live)
        if problem.operation == "conv1d_input_grad":  # whose taps are reversed
            here, live = here.transposed(), range(K - live.stop, K - live.start)
        own = dataclasses.replace(this, spec=here)
        other = rhs[:, steps.start : steps.stop] if sums else taps.some(rhs, live)
        out = run_as(xla_cpu.at_once(own), own, lhs, other)
        return taps.among(out, live, K) if sums else out

    steps, _ = xla_cpu.pieces(problem)
    out = in_turn([(lhs, functools.partial(part, steps=s)) for s in steps], sums, 1)
    return out.astype(problem.out_dtype)


SUMS_OF_TAPS = ("own_pads", "shifts", "matmuls", "scatter", "blocks", "channel_blocks")


def run(problem: Problem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The operation of ``problem`` by the formulation that `choose` names."""
    out = _run(problem, lhs, rhs)
    return lax.optimization_barrier(out) if _sums_taps(problem) else out


def _sums_taps(problem: Problem) -> bool:
    """Whether XLA would fuse the sum over taps into what consumes it.

    Fused into a reduction, such as a loss, it is done element by element, which takes several
    times as long: there has to be a barrier between them.
    """
    return problem.platform == "cpu" and choose(problem) in SUMS_OF_TAPS


def _run(problem: Problem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    name = choose(problem)
    if problem.platform == "cpu":
        # What a gradient reads has to be in memory. Else XLA computes it anew in what cuts and
        # transposes it: of a residual network all blocks before, in every block.
        if problem.operation == "conv1d_kernel_grad":
            lhs, rhs = lax.optimization_barrier((lhs, rhs))
        elif problem.operation == "conv1d_input_grad":
            lhs = lax.optimization_barrier(lhs)
    return run_as(name, problem, lhs, rhs)


def fused(problem: Problem, x: jax.Array, w: jax.Array, bias: jax.Array | None):
    """``activation(conv(x, w) + bias)``; see `Kernel.fused`.

    Bias and activation go in front of the barrier: a pass over y less, which takes up to half of
    the time of a depthwise layer. Not both y and z: XLA then sums the taps twice.
    """
    z = _run(problem, x, w)
    z = z if bias is None else z + bias.astype(z.dtype)[None, None]
    y = activate(z, problem.epilogue.activation)
    return lax.optimization_barrier(y)


def decline_fused(problem: Problem) -> str | None:
    # Of bfloat16 a pass with SiLU in it took a tenth longer than the two.
    fuses = _sums_taps(problem) and problem.out_dtype == np.float32
    return None if fuses else "carries none here"


def many(problem: Problem):
    """What a batch of kernels is best done by, or None for groups: then the rules see them.

    Mapped, most formulations would run as the dense case that they no longer are.
    """
    name = xla_cpu_kernel_grad.many(problem) if problem.platform == "cpu" else None
    return name and jax.vmap(functools.partial(run_as, name, problem))


KERNEL = Kernel(
    implementation="xla",
    platforms=("cpu", "cuda", "rocm", "tpu"),
    run=run,
    decline=lambda problem: None,
    describe=lambda problem: DESCRIPTIONS[choose(problem)] + xla_tuned.described(problem),
    priority=0,
    many=many,
    fused=fused,
    decline_fused=decline_fused,
)
