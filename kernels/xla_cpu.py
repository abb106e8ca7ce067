"""Which formulation of a convolution XLA does best on a CPU, and in parts of what size.

Rules, from measurements: ``benchmarks/results/cpu/formulations.json`` and those beside it, which
``python -m benchmarks.formulations`` repeats. `xla_cpu_forward.forward` and
`xla_cpu_kernel_grad.kernel_grad` show what they stand on.
"""

import functools

from conv_pallas.kernels.xla_cpu_bounds import sequences_at_once, steps_at_once, taps_at_once
from conv_pallas.kernels.xla_cpu_forward import forward
from conv_pallas.kernels.xla_cpu_kernel_grad import kernel_grad
from conv_pallas.kernels.xla_formulations import Formulation
from conv_pallas.kernels.xla_pieces import UNROLLED, cuts, in_pieces, in_steps, in_taps
from conv_pallas.spec import Problem


def choose(problem: Problem) -> str:
    """The name of the formulation to take, of `FORWARD` or `KERNEL_GRAD`, or "parts"."""
    spec, gradient_of_kernel = problem.spec, problem.operation == "conv1d_kernel_grad"
    kernel = problem.C, problem.O, spec.groups, spec.kernel_size
    if not all(isinstance(size, int) for size in kernel):
        return "native"
    if not all(isinstance(size, int) for size in (problem.N, spec.time)):
        # An export whose batch or time is a symbol: nothing may depend on how much there is.
        grouped = gradient_of_kernel and spec.groups > 1
        if spec.kernel_size > UNROLLED:
            return "split" if grouped and spec.groups <= 32 else "native"
        return "shifts" if problem.depthwise else "matmuls" if grouped else "native"
    name = at_once(problem)
    return "parts" if _parts_pay(problem, name) else name


def at_once(problem: Problem) -> str:
    """The name of the formulation that takes all of time at once."""
    gradient = problem.operation == "conv1d_kernel_grad"
    return kernel_grad(problem) if gradient else forward(problem)


def in_parts(formulation: Formulation, name: str, problem: Problem) -> Formulation:
    """The formulation of that name, as many taps, steps and sequences at a time as suits it."""
    (spec, _, _), sums = problem.as_convolution, problem.operation == "conv1d_kernel_grad"
    if (taps := taps_at_once(name, problem)) < spec.kernel_size:
        if name == "tree":
            # In a loop of one tap it takes a fraction of the time to compile, which a network takes
            # layer by layer. Of more than 4 blocks x and g want the same few lines of the L1 where
            # channels are a power of two.
            formulation = functools.partial(formulation, ways=4, then=8)
        formulation = in_taps(formulation, taps, sums, written_out=1 if name == "tree" else None)
    if (steps := steps_at_once(name, problem)) < spec.out_time:
        formulation = in_steps(formulation, steps, sums)
    if (sequences := sequences_at_once(name, problem)) != problem.N:
        formulation = in_pieces(formulation, sequences, sums)
    return formulation


def pieces(problem: Problem) -> tuple[tuple[range, ...], float]:
    """Where "parts" cuts time, and the share of the products that it then takes."""
    spec, _, _ = problem.as_convolution
    if spec.groups > 1 or spec.stride > 1 or spec.input_dilation > 1 or spec.kernel_size > UNROLLED:
        return (range(spec.out_time),), 1.0
    return cuts(spec, 4, 0.03)


def _parts_pay(problem: Problem, name: str) -> bool:
    """Whether "parts" is faster than a formulation of everything at once.

    In a causal layer with ``D = T/4`` and three taps a quarter of the products are with padding, in
    one of more taps up to half. Formulations that move products about lose by it, and gradients of
    kernels gain most. Beside the best of those that take everything at once, measured as in
    `forward`; forward pass and kernel gradient:

    =============================  =======================  ========================
    N8 T1000 C64 O64 K3 D512 SAME  parts 1.2  winograd 1.0  parts 1.4  winograd 1.1
    N8 T1000 C128 O128 K2 D256     parts 1.0  padded 1.0    parts 1.4  winograd 1.5
    N8 T1000 C128 O128 K2 D512     parts 1.1  winograd 1.0  parts 1.7  winograd 1.6
    N8 T1000 C128 O128 K3 D256     parts 1.3  winograd 1.2  parts 1.6  winograd 1.6
    N2 T1000 C512 O512 K3 D256     parts 1.5  winograd 1.3  parts 1.7  winograd 1.5
    N8 T1000 C64 O64 K3 D128       parts 1.0  winograd 1.0  parts 1.5  winograd 1.3
    N8 T1000 C64 O64 K3 D256       parts 1.0  winograd 1.0  parts 1.7  winograd 1.3
    N8 T1000 C64 O64 K7 D128       parts 1.2  winograd 1.0  parts 1.4  native 1.2
    N4 T1000 C64 O64 K15 D64       parts 1.4  winograd 1.0  parts 1.2  padded 1.0
    N32 T600 C30 O30 K8 D64        parts 1.2  scatter 1.1   parts 1.7  canonical 1.1
    N32 T400 C30 O30 K7 D32        parts 1.0  native 1.0    parts 1.4  canonical 1.1
    N64 T784 C25 O25 K7 D128       parts 0.8  scatter 1.4   parts 1.9  native 1.1
    =============================  =======================  ========================
    """
    gradient, steps = problem.operation == "conv1d_kernel_grad", problem.N * problem.spec.out_time
    products = steps * problem.spec.kernel_size * problem.C * problem.O
    gains = ("native", "padded", "canonical", "winograd", *(["im2col"] if gradient else []))
    if name not in gains or steps < 512 or products < 2**23:
        return False
    if gradient:
        return pieces(problem)[1] <= (0.75 if name == "winograd" else 0.88)
    # Where the cores lie apart, narrow input gradients lose more by it: see `forward`.
    narrow = min(problem.C, problem.O) < 128 and problem.spec.kernel_size <= 8
    behind = problem.operation == "conv1d_input_grad" and narrow
    return pieces(problem)[1] <= (0.6 if behind else 0.75)
