"""The convolution as XLA does it best: which formulation, for which operation, where.

    y[n, u, o]  = sum over k, c of  x[n, u*S + k*D - low, c] * w[k, c, o]
    dx          = the same of g, with taps reversed and channels in and out exchanged
    dw[k, c, o] = sum over n, u of  x[n, u*S + k*D - low, c] * g[n, u, o]

Operations: ``2 N T' K (C / G) O``. Bytes: x, w and y once each at least; what a formulation holds
beside them is in its docstring.

The formulations themselves are in `xla_formulations.py`. The rules for CPUs, which come from
measurements, are in `xla_cpu.py` and the files that it is made of, and those for GPUs in
`xla_gpu.py`; what was measured on the CPU or GPU at hand comes before either (`xla_tuned.py`).
"""

import dataclasses
import functools
import math

import jax
import numpy as np
from jax import lax

from conv_pallas import taps
from conv_pallas.activations import activate
from conv_pallas.kernels import (
    Kernel,
    xla_cpu,
    xla_cpu_kernel_grad,
    xla_gpu,
    xla_native,
    xla_packed,
    xla_tuned,
)
from conv_pallas.kernels.xla_formulations import (
    FORWARD,
    KERNEL_GRAD,
    cropped,
    numbers_of,
    some_steps,
)
from conv_pallas.kernels.xla_pieces import UNROLLED, in_taps, in_turn
from conv_pallas.spec import Problem

DESCRIPTIONS = {
    "native": "one lax.conv_general_dilated",
    "transposed": "JAX's transpose of a strided lax.conv_general_dilated",
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
    if problem.platform == "tpu":
        K = problem.spec.kernel_size
        few = isinstance(K, int) and K <= UNROLLED
        name = "shifts" if problem.depthwise and few else "native"
    else:
        name = xla_tuned.lookup(problem) or xla_tuned.rule(problem)
    return _as_partitioned(name, problem)


# Formulations without a convolution in them, which XLA's partitioner gets right.
SPLITTABLE = ("shifts", "tree", "matmuls", "im2col")


def _as_partitioned(name: str, problem: Problem) -> str:
    """Where XLA's partitioner would get a convolution of groups wrong, another formulation.

    Of their kernel gradients, where the batch is split along some axes of a mesh and not along
    others, it multiplies each sum by the number of devices along those (by values with jaxlib
    0.11.2 and 0.12.0.1 on CPUs; of depthwise layers in what libtpu 0.0.50 compiles, too). Those of
    one tap it gets wrong, or does not compile, where their channels are split, and those with a
    channel multiplier where the outputs are into more parts than there are groups (jaxlib 0.12.0.1
    on CPUs).
    """
    K, groups = problem.spec.kernel_size, problem.spec.groups
    multiplier = problem.depthwise and problem.O > problem.C
    wrong = problem.operation == "conv1d_kernel_grad" or K == 1 or multiplier
    if not (problem.partitioned and groups > 1 and wrong):
        return name
    if name in SPLITTABLE or not isinstance(K, int):
        return name
    return "shifts" if problem.depthwise else "matmuls"


# --- Running it ---


def run_as(name: str, problem: Problem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The operation of ``problem`` by the formulation ``name``."""
    if name == "parts":
        return _parts(problem, lhs, rhs)
    operand, numbers = numbers_of(problem)
    lhs, rhs = lhs.astype(operand), rhs.astype(operand)
    if name == "transposed":
        return _transposed(problem, lhs, rhs)
    spec, _, _ = problem.as_convolution
    table = KERNEL_GRAD if problem.operation == "conv1d_kernel_grad" else FORWARD
    formulation = table[name]
    if problem.operation == "conv1d_input_grad":
        rhs = taps.flip(rhs, spec.groups)
    if problem.platform == "cpu":
        formulation = xla_cpu.in_parts(formulation, name, problem)
        lhs, spec = cropped(lhs, spec)
    elif problem.platform != "tpu":
        formulation = xla_gpu.in_parts(formulation, name, problem)
    elif name in ("shifts", "matmuls") and problem.spec.kernel_size > UNROLLED:
        # Of what may not be "native".
        sums = problem.operation == "conv1d_kernel_grad"
        formulation = in_taps(formulation, UNROLLED, sums)
    return formulation(lhs, rhs, spec, numbers).astype(problem.out_dtype)


def _transposed(problem: Problem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """JAX's transpose of the strided convolution of which this is the input gradient.

    A forward pass whose input has a dilation is one as well: of the transposed convolution.
    """
    if problem.operation == "conv1d":
        rhs = taps.flip(rhs, problem.spec.groups)
        problem = dataclasses.replace(
            problem, operation="conv1d_input_grad", spec=problem.spec.transposed(),
            C=problem.O, O=problem.C,
        )  # fmt: skip
    return xla_native.run(problem, lhs, rhs)


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
# Of a depthwise convolution these multiply no matrices but those of one channel.
ELEMENTWISE = ("own_pads", "shifts", "matmuls", "scatter", "tree", "channel_blocks")


def run(problem: Problem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The operation of ``problem`` by the formulation that `choose` names."""
    out = _run(problem, lhs, rhs)
    return lax.optimization_barrier(out) if _sums_taps(problem) else out


def _sums_taps(problem: Problem) -> bool:
    """Whether XLA would fuse the sum over taps into what consumes it.

    Fused into a reduction, such as a loss, it is done element by element, which takes several
    times as long: there has to be a barrier between them. One tap of a depthwise layer is a
    product, and fused it costs nothing.
    """
    product = problem.depthwise and problem.spec.kernel_size == 1
    return problem.platform == "cpu" and not product and choose(problem) in SUMS_OF_TAPS


def _run(problem: Problem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    name = choose(problem)
    if problem.platform == "cpu":
        # What a gradient reads has to be in memory. Else XLA computes it anew in what cuts and
        # transposes it: of a residual network all blocks before, in every block.
        if problem.operation == "conv1d_kernel_grad" or _rearranges(name, problem):
            lhs, rhs = lax.optimization_barrier((lhs, rhs))
        elif problem.operation == "conv1d_input_grad":
            lhs = lax.optimization_barrier(lhs)
    return run_as(name, problem, lhs, rhs)


LARGE = 2**18  # bytes of a kernel


def _rearranges(name: str, problem: Problem) -> bool:
    """Whether a large kernel is turned, or its taps are summed, for a moment.

    XLA does that for a whole network first, as it waits for nothing, and holds all of them until
    they have left the caches; and what is more than 32 MB malloc gets from the system anew in every
    call, page by page: of 39 MB that is 10,000 faults and 14 ms. So each waits for its x, or its
    output gradient. That made the forward pass of eight layers of 512 channels and 2048 steps 1.24
    times as fast, and of six of 768 channels 1.20, both by the rules; and training steps, with
    gradient descent and donated parameters, of eight blocks of 384 or 512 channels and 256 steps
    1.24 to 1.29 times, and of sixteen of 256 channels 1.14 (0.98: four of 512, 4000 steps; 1.03:
    eight of 256, 128 steps). Without descent, where the gradients are new memory, it was 0.93 to
    1.06 times. On two cores of an AMD EPYC, with jax 0.12.0.1.
    """
    as_it_lies = name in ("native", "padded") or (name == "im2col" and problem.spec.groups == 1)
    if problem.operation == "conv1d" and as_it_lies:
        return False
    return problem.known and math.prod(problem.w_shape) * problem.rhs_dtype.itemsize >= LARGE


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


def describe(problem: Problem) -> str:
    """In words, with the name that `conv_pallas.tuning.tune` calls it by."""
    name = choose(problem)
    return f"{DESCRIPTIONS[name]} ({name}){xla_tuned.described(problem)}"


def many(problem: Problem):
    """What a batch of kernels is best done by, or None for groups: then the rules see them.

    Mapped, most formulations would run as the dense case that they no longer are. Not so what goes
    element by element, which needs no axis moved: as groups V kernels of a depthwise convolution
    took 1.1 to 9.6 times as long, 1.6 to 8.1 with an output for each input, and 0.7 to 3.5 times in
    kernel gradients, mostly more than once (V = 3 to 64, 20 to 512 channels, K = 3 to 31, float32
    and bfloat16, on two cores of an AMD EPYC with jax 0.12.0.1).
    """
    if problem.platform != "cpu":
        return None
    if problem.depthwise and choose(problem) in ELEMENTWISE:
        return jax.vmap(functools.partial(run, problem))
    name = xla_cpu_kernel_grad.many(problem)
    return name and jax.vmap(functools.partial(run_as, name, problem))


KERNEL = Kernel(
    implementation="xla",
    platforms=("cpu", "cuda", "rocm", "tpu"),
    run=run,
    decline=lambda problem: None,
    describe=describe,
    priority=0,
    many=many,
    fused=fused,
    decline_fused=decline_fused,
    packed=xla_packed.packed,
    packed_backward=xla_packed.packed_backward,
    decline_packed=xla_packed.decline_packed,
)
