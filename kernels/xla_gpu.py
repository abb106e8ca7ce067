"""Which of XLA's formulations a GPU gets, by rules, and how many of its taps at once.

They come from what XLA compiles to, read without the device; those that say so, from an H200 as
well. What `conv_pallas.tuning.tune` found on the GPU at hand comes before them (`xla_tuned`).
"""

from conv_pallas.kernels.xla_formulations import Formulation
from conv_pallas.kernels.xla_pieces import UNROLLED, in_taps
from conv_pallas.spec import Problem

FEW = 256  # channels; between 150 and 450 nothing was measured
TAPS = 8  # that are written out: matmuls hold a copy of x for each, reductions compile slowly


def choose(problem: Problem) -> str:
    """The formulation to take, of those of `candidates`."""
    if not isinstance(problem.spec.kernel_size, int):
        return "native"  # an export whose taps are a symbol
    gradient_of_kernel = problem.operation == "conv1d_kernel_grad"
    return _kernel_grad(problem) if gradient_of_kernel else _forward(problem)


def candidates(problem: Problem) -> list[str]:
    """What may be the fastest on one GPU or another: that of the rules, and others.

    Not what multiplies zeros, and no matmuls of many taps, which hold as many copies of x.
    Depthwise there is one alone: cuDNN takes many times as long.
    """
    spec, gradient_of_kernel = problem.spec, problem.operation == "conv1d_kernel_grad"
    here = problem.as_convolution[0]
    if problem.depthwise:
        return ["shifts"]
    even = here.padding[0] == here.padding[1] or spec.kernel_size == 1
    dilated = spec.kernel_dilation > 1 < spec.kernel_size
    few = spec.kernel_size <= TAPS
    if gradient_of_kernel:
        worth = {
            "native": not dilated,
            "fold": dilated and spec.stride == 1,
            "matmuls": few,
            "im2col": few,
        }
    else:
        spread = here.input_dilation > 1
        worth = {
            "native": (even or not dilated) and not spread,
            "barrier": not even or spread,
            "symmetric": not even and not spread,
            "depth_to_space": spread and here.stride == spec.kernel_dilation == spec.groups == 1,
            "matmuls": few and not spread,
            "im2col": few and not spread,
        }
    found = [name for name, worthy in worth.items() if worthy]
    return list(dict.fromkeys([choose(problem), *found]))


def _ragged(problem: Problem) -> bool:
    """Whether a few taps are of few channels that fill no 16 bytes.

    cuDNN has slow algorithms alone for those. Measured on an H200, of 10, 25 and 150 channels and 5
    to 8 taps: matmuls take 0.5 to 1.0 of its time forward, and a training step 0.4 to 0.5. Of 450
    channels it is as fast as of others, and matmuls take 1.1 (kernel gradient) to 2.0 of its time
    (benchmarks/results/nvidia-h200, layers-first.jsonl and tiles-again.jsonl).
    """
    spec, size = problem.spec, max(problem.lhs_dtype.itemsize, problem.rhs_dtype.itemsize)
    plain = spec.groups == spec.stride == spec.input_dilation == 1
    ragged = any(n * size % 16 for n in (problem.C, problem.O))
    few = all(isinstance(n, int) and n <= FEW for n in (problem.C, problem.O))
    return plain and ragged and few and spec.kernel_size <= TAPS


def in_parts(formulation: Formulation, name: str, problem: Problem) -> Formulation:
    """The formulation of that name, as many taps at a time as can be compiled and held.

    A depthwise kernel gradient of 87 taps would be over a hundred kernels, which take many times as
    long to compile as a loop.
    """
    K, sums = problem.spec.kernel_size, problem.operation == "conv1d_kernel_grad"
    if name == "matmuls" and K > TAPS:
        return in_taps(formulation, TAPS, sums)
    if name == "shifts" and sums and K > TAPS:
        return in_taps(formulation, TAPS // 2, sums, written_out=1)
    each = problem.O // problem.C if problem.operation == "conv1d_input_grad" else 1
    if name == "shifts" and not sums and K * each > UNROLLED:
        return in_taps(formulation, max(1, UNROLLED // each), sums)
    return formulation


def _forward(problem: Problem) -> str:
    """Forward and input gradient: the dilation reaches cuDNN, and no zero is multiplied.

    cuDNN pads both sides alike. XLA:GPU folds CAUSAL padding into the window, finds it uneven, and
    fills the kernel with zeros: for K=3 and D=512 ``window={size=1025}``. Behind a barrier it stays
    ``window={size=3 rhs_dilate=512}``, at the price of a copy of x, which even padding does not
    have to pay (read from jax 0.12.0.1's output for an H200; `conv_pallas.aot`). Where little is
    padded, as much on the other side costs less than that copy. Without a dilation uneven padding
    is a copy of x as well. There it is a stride that makes what is cut off of y less than that: on
    an H200 of two steps 0.83 of the time, and without a stride 0.98 (layers.jsonl, against.jsonl).

    What JAX makes of a strided layer's input gradient becomes ``__cudnn$convBackwardInput``. As a
    convolution of a g that is filled up with zeros it has S times the work; so has the forward pass
    of an input that has a dilation, which is the input gradient of a strided layer, and which XLA
    fills up in memory. cuDNN has none with a dilation of the kernel.

    A depthwise convolution moves far more than it multiplies: XLA makes one fusion of it.
    """
    spec, here = problem.spec, problem.as_convolution[0]
    if problem.depthwise:
        return "shifts"
    if spec.kernel_size == 1 or _ragged(problem):
        return "matmuls"
    if here.input_dilation > 1 == here.stride == here.kernel_dilation:
        return "transposed"
    low, high = here.padding
    if low == high or spec.kernel_dilation == spec.stride == 1:
        return "native"
    known = isinstance(here.out_time, int)
    if known and here.input_dilation == 1 and 8 * abs(low - high) <= here.out_time:
        return "symmetric"
    # Which writes a dilated input as well: XLA has none beside a kernel's.
    return "native" if spec.kernel_dilation == 1 else "barrier"


def _kernel_grad(problem: Problem) -> str:
    """Kernel gradient: by cuDNN, which has none with a dilation; depthwise by reductions.

    Of a dilated layer's XLA:GPU makes a forward convolution whose window is as wide as time,
    ``window={size=4096 stride=512}``, between transposes of x and g. The same with time as
    ``(T/D, D)`` is ``__cudnn$convBackwardFilter`` of ``window={size=3x1}``, and costs one copy of
    x for its padding; a matmul for each tap costs K of them, which pays where there are two, or
    little to copy: see `_copied_cheaply`. A few taps of groups stay matmuls all
    the same, for cuDNN's gradients of groups are reported to be as slow as those of dense layers
    (jax-ml/jax issue 13800), and so does what has both a dilation and a stride, where that view
    would fill g with zeros.

    Depthwise each tap is two reductions, and x and g come from the L2 or from memory for each.
    """
    spec = problem.spec
    if problem.depthwise:
        return "shifts"
    few_of_groups = spec.groups > 1 and spec.kernel_size <= TAPS
    if spec.kernel_size == 1 or few_of_groups or _ragged(problem):
        return "matmuls"
    if spec.kernel_dilation == spec.input_dilation == 1:
        return "native"
    return "fold" if spec.stride == 1 and not _copied_cheaply(problem) else "matmuls"


def _copied_cheaply(problem: Problem) -> bool:
    """Whether a copy of x for each tap of a dilated layer costs less than cuDNN's view of it.

    Measured on an H200 (benchmarks/results/nvidia-h200, tiles-again.jsonl): of 2 taps of 64 and 128
    channels matmuls take 0.87 of its time, of 3 taps and 8192 steps of 64 channels 0.35. Of 3 taps
    and 32768 steps of 512 channels it is 1.1 (against.jsonl), of a million steps of 64, 1.4.
    """
    spec, steps = problem.spec, problem.N * problem.spec.out_time
    few = all(isinstance(n, int) and n <= FEW for n in (problem.C, problem.O))
    short = isinstance(steps, int) and steps <= 8192
    return few and (spec.kernel_size == 2 or (spec.kernel_size == 3 and short))
