"""What formulations hold on a CPU, how much they take at a time, and what several rules ask."""

import math

import numpy as np

from conv_pallas import _host
from conv_pallas.kernels.xla_formulations import numbers_of
from conv_pallas.kernels.xla_pieces import UNROLLED
from conv_pallas.kernels.xla_winograd import share
from conv_pallas.spec import ConvSpec, Problem

CACHED = 3 * 2**20  # numbers of a kernel of which another form stays in the caches beside it
# From which on sums of minimal filtering have products enough: steps of a kernel gradient, channels
# of the others.
STEPS, CHANNELS = 512, 64
FEW = 16  # taps, up to which "scatter" and "im2col" in pieces were measured


def of_group(problem: Problem) -> tuple[ConvSpec, int, int]:
    """The geometry, and of each group the channels that one output sums over, and the outputs."""
    spec, C, O = problem.as_convolution
    return spec, C // spec.groups, O // spec.groups


def is_float32(problem: Problem) -> bool:
    types = (problem.lhs_dtype, problem.rhs_dtype, problem.out_dtype)
    return {np.dtype(a).name for a in types} == {"float32"}


def is_bfloat16(problem: Problem) -> bool:
    return {np.dtype(problem.lhs_dtype).name, np.dtype(problem.rhs_dtype).name} == {"bfloat16"}


def processor_has_avx512(problem: Problem) -> bool:
    """Whether the processor has registers of 512 bits. An export may run on any."""
    return not problem.exported and _host.vectors() in ("amx_bf16", "avx512_bf16", "avx512f")


def processor_has_bfloat16(problem: Problem) -> bool:
    """Whether the processor multiplies bfloat16, and has AVX512. An export may run on any."""
    return not problem.exported and _host.vectors() in ("amx_bf16", "avx512_bf16")


def fast_bfloat16(problem: Problem) -> bool:
    """Whether it is of bfloat16, on a processor that multiplies that."""
    return is_bfloat16(problem) and processor_has_bfloat16(problem)


def bfloat16_pays(problem: Problem, spec: ConvSpec, c: int, o: int) -> bool:
    """Whether matmuls of bfloat16 are ahead of a convolution that widens its operands.

    They are where `processor_has_bfloat16`; else where channels fill no registers of a convolution.
    Times faster than stock on two cores with AVX2, of drawn layers (``formulations-avx2.json``):

    ====================================  =======================  =======================
                                          forward                  input gradient
    ====================================  =======================  =======================
    N16 T1379 C32 O32 K5 D8 bfloat16      padded 1.0  im2col 0.8   native 1.1  im2col 0.8
    N2 T3508 C96 O96 K2 bfloat16          padded 1.0  im2col 0.8   native 1.0  matmuls 0.8
    N8 T1199 C128 O128 K3 bfloat16 SAME   native 1.0  im2col 0.9   native 1.0  im2col 0.8
    N16 T1473 C32 O32 K3 bfloat16         padded 1.0  im2col 0.8   native 1.1  im2col 0.9
    N2 T2608 C16 O384 K3 bfloat16         padded 1.0  im2col 0.8   scatter 1.1  native 0.9
    N16 T262 C64 O64 K3 S4 bfloat16 SAME  native 1.0  im2col 0.8   scatter 1.2  native 1.0
    N1 T2608 C10 O10 K7 D2 bfloat16 SAME  scatter 1.7  im2col 1.4  scatter 2.0  im2col 1.7
    N16 T871 C16 O12 K3 bfloat16 SAME     scatter 1.1  native 1.0  im2col 1.6  scatter 1.6
    ====================================  =======================  =======================
    """
    few = max(c, o) < (20 if spec.stride == 1 else 32)
    return is_bfloat16(problem) and (few or processor_has_bfloat16(problem))


def pads_cost(problem: Problem, spec: ConvSpec) -> bool:
    """Whether a pad for each tap, inside of the loop, takes longer than one in memory for all.

    Where a tap sees padding a register is read in part. Of 16-bit numbers only AVX512 can do that:
    else LLVM seems to read them one by one, unless it makes loops apart of up to four taps that see
    padding before the first step, or of one that sees it behind the last. Times faster than stock
    on two cores with AVX2 (``formulations-avx2.json`` and ``-more``):

    ============================================  =======================  ========================
                                                  forward                  input gradient
    ============================================  =======================  ========================
    N4 T3646 C48 O48 K3 G48 bfloat16 SAME         matmuls 62  scatter 15   matmuls 57  scatter 16
    N4 T762 C80 O80 K3 D16 G80 bfloat16           matmuls 73  scatter 68   matmuls 49  scatter 14
    N16 T362 C80 O80 K9 D16 G80 bfloat16          matmuls 49  own_pads 35  matmuls 47  own_pads 11
    N32 T2468 C10 O10 K3 G10 bfloat16 SAME        matmuls 27  scatter 11   matmuls 29  scatter 11
    N8 T454 C256 O256 K3 S4 G256 bfloat16         scatter 73  matmuls 34   depth_to_space_im2col 70
    N32 T97 C512 O512 K2 D128 G512 bfloat16 SAME  scatter 132  matmuls 37  scatter 138  matmuls 38
    ============================================  =======================  ========================
    """
    if problem.out_dtype.itemsize >= 4 or processor_has_bfloat16(problem):
        return False
    before, behind = (-(-max(0, zeros) // spec.kernel_dilation) for zeros in spec.padding)
    few = before <= 4 or spec.kernel_size > AT_ONCE  # of many only some are taken at once
    alone = behind == 0 or before + behind == 1 or spec.kernel_size == 2
    return not (few and alone)


def filtering_pays(problem: Problem, spec: ConvSpec, c: int, o: int) -> bool:
    """Whether float32 "winograd" saves more products than its sums cost.

    Who asks for a precision, be it the default one, gets the sums that the definition has, and with
    them nothing of a step whose weights are zero. An even number of taps saves too little, and a
    few channels or steps do not make up for what is written to memory and read again, which in a
    kernel gradient is less than in the others. Beyond 16 MiB the pieces' results are too much to
    put together. And the kernel, which is written anew in another form, has to stay in the caches.
    Times faster than stock, of as many steps (on two cores with 32 MiB of cache between them):

                   forward                   input gradient            kernel gradient
                   256   512   1024  2048    256   512   1024  2048    256   512   1024  2048
        C512 K7    1.1   1.2   1.1   1.1     0.8   1.1   1.1   1.2
        C512 K11   1.0   1.1   1.0   1.2     1.1   1.1   1.0   1.1
        C1024 K3   0.8   1.2   1.2   1.2     1.1   1.1   1.1   1.0     1.6   1.5   1.6   1.6
        C640 K5    1.0   1.1   0.9   0.9     1.0   1.0   1.0   1.0
        C768 K5    1.2   1.0   0.9   0.8     0.8   1.0   1.0   1.0     1.2   1.1
        C512 K15   1.1   1.1   1.0   1.0     0.7   0.9   0.7   0.9
        C512 K21   0.5   0.7   0.8   0.9     0.5   0.6   0.6   0.9
        C1024 K5   0.5   0.6   0.7   0.7     0.6   0.6   0.8   0.8     1.3   1.1
        C1536 K3   0.5   0.6   0.8   0.8     0.5   0.7   0.7   0.8     0.6   0.7
    """
    if not is_float32(problem) or problem.precision is not None or spec.kernel_size % 2 == 0:
        return False
    steps = problem.N * spec.out_time
    kernel, gradient = spec.kernel_size * c * o, problem.operation == "conv1d_kernel_grad"
    few = steps < (512 if gradient else 1024)
    worth = min(c, o) >= (64 if gradient else 512) and steps * kernel >= (2**28 if few else 2**26)
    cached = kernel <= (2 * CACHED if gradient else CACHED)
    if not cached or (not gradient and spec.kernel_size > 3 and max(c, o) > 512):
        return False
    return worth and steps * max(c, o) <= 2**22 and share(spec) <= 0.76


def every_tap_sees(spec: ConvSpec) -> bool:
    """Whether each tap sees more than padding."""
    return 2 * sum(max(0, zeros) for zeros in spec.padding) <= spec.time


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


# What a piece may hold for a moment; what needs no pieces yet; and what one sequence may hold,
# beyond which it is as slow as all at once. Bytes. Each piece costs some time by itself.
PIECE = {
    "scatter": 5 * 2**20, "im2col": 5 * 2**19, "blocks": 5 * 2**20, "winograd": 2**23,
    "channel_blocks": 2**23,
}  # fmt: skip
WHOLE, MOST = 9 * 2**20, 2**23


def bytes_held(name: str, problem: Problem) -> int:
    """Bytes that a formulation of `PIECE` holds for one sequence beside x and y."""
    operand, numbers = numbers_of(problem)
    spec, c, o = of_group(problem)
    if name == "blocks":
        a = math.isqrt(spec.kernel_size)
        b = spec.kernel_size // a
        sizes = np.dtype(operand).itemsize * a * c + np.dtype(numbers.acc).itemsize * b * o
        return spec.out_time * sizes
    if name == "winograd":
        pairs, three = spec.kernel_size > 3 or spec.kernel_size % 2 == 0, spec.kernel_size % 2
        return spec.out_time * (3 * pairs + 4 * three) * 2 * (c + o)
    if name == "channel_blocks":
        return 2 * np.dtype(numbers.acc).itemsize * (spec.time + spec.out_time) * problem.O
    if name == "scatter":
        return spec.time * spec.kernel_size * o * np.dtype(numbers.acc).itemsize
    return spec.out_time * spec.kernel_size * c * np.dtype(operand).itemsize


def pieces_hold(name: str, problem: Problem, spec: ConvSpec) -> bool:
    """Whether a formulation can be taken in pieces that are much longer than a window."""
    return 2 * spec.span <= steps_at_once(name, problem) or bytes_held(name, problem) <= MOST


def holds_little(problem: Problem, name: str = "im2col") -> bool:
    """Whether a formulation of groups, which is not taken in pieces, holds no more than 64 MiB."""
    return problem.N * problem.spec.groups * bytes_held(name, problem) <= 2**26


def steps_at_once(name: str, problem: Problem) -> int:
    """How many of the outputs of one sequence; of a kernel gradient how many of gy."""
    spec, _, _ = problem.as_convolution
    every_step = spec.stride == spec.input_dilation == 1
    if spec.groups > 1 or not every_step or name not in ("im2col", "blocks", "winograd"):
        return spec.out_time
    held = bytes_held(name, problem)
    if held <= MOST:
        return spec.out_time
    steps = max(1, PIECE[name] * spec.out_time // held)
    tile = 2 * spec.kernel_dilation if name == "winograd" else 1
    return max(tile, steps - steps % tile)


def sequences_at_once(name: str, problem: Problem) -> int:
    """How many of N, which they divide."""
    N = problem.N
    if (problem.spec.groups > 1 and name != "channel_blocks") or name not in PIECE:
        return N
    each = bytes_held(name, problem)
    if N * each <= WHOLE:
        return N
    fitting = max(1, PIECE[name] // each)
    at_once = max(n for n in range(1, min(fitting, N) + 1) if N % n == 0)
    # A prime number of short sequences: so many small pieces cost more than they save.
    return N if 2 * at_once < min(fitting, N) and N * each <= 2 * MOST else at_once


AT_ONCE = 8  # taps in one piece of a convolution that has too many to be written out at once
# And of depthwise ones with more than that. Of four pads LLVM makes a loop without vectors in some
# shapes, which takes three times as long.
TAPS = {"own_pads": 3, "shifts": 4, "tree": 1}
# Taps from which on a depthwise convolution is faster in blocks of channels; and as many as compile
# in half a second.
PADS, CHANNEL_BLOCKS = 48, 256


def taps_at_once(name: str, problem: Problem) -> int:
    """How many of K."""
    K = problem.spec.kernel_size
    if problem.spec.groups == 1 or name in ("native", "padded", "channel_blocks"):
        return K
    if name == "tree" or (name in ("own_pads", "shifts") and problem.depthwise):
        return TAPS[name] if K > AT_ONCE else K
    return K if K <= UNROLLED else AT_ONCE
