"""Which formulation of a convolution XLA does best on a CPU, and in parts of what size.

Rules, from measurements: ``benchmarks/results/cpu/formulations.json``, which ``python -m
benchmarks.formulations`` repeats. `forward` and `kernel_grad` show what they stand on.
"""

import dataclasses
import functools
import math

import numpy as np

from conv_pallas.kernels.xla_formulations import Formulation, numbers_of
from conv_pallas.kernels.xla_pieces import UNROLLED, cuts, in_pieces, in_steps, in_taps
from conv_pallas.kernels.xla_winograd import share
from conv_pallas.spec import ConvSpec, Problem

FEW = 16  # taps, up to which "scatter" and "im2col" in pieces were measured


def choose(problem: Problem) -> str:
    """The name of the formulation to take, of `FORWARD` or `KERNEL_GRAD`, or "parts"."""
    spec, gradient_of_kernel = problem.spec, problem.operation == "conv1d_kernel_grad"
    if not all(isinstance(channels, int) for channels in (problem.C, problem.O, spec.groups)):
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
    if (taps := _taps_at_once(name, problem)) < spec.kernel_size:
        if name == "tree":
            # In a loop of one tap it takes a fraction of the time to compile, which a network takes
            # layer by layer. Of more than 4 blocks x and g want the same few lines of the L1 where
            # channels are a power of two.
            formulation = functools.partial(formulation, ways=4, then=8)
        formulation = in_taps(formulation, taps, sums, written_out=1 if name == "tree" else None)
    if (steps := _steps_at_once(name, problem)) < spec.out_time:
        formulation = in_steps(formulation, steps, sums)
    if (sequences := _sequences_at_once(name, problem)) != problem.N:
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
    narrow = min(problem.C, problem.O) < 128 and problem.spec.kernel_size <= 8
    moves = problem.operation == "conv1d_input_grad" and narrow
    return pieces(problem)[1] <= (0.6 if moves else 0.75)


def _of_group(problem: Problem) -> tuple[ConvSpec, int, int]:
    """The geometry, and of each group the channels that one output sums over, and the outputs."""
    spec, C, O = problem.as_convolution
    return spec, C // spec.groups, O // spec.groups


def forward(problem: Problem) -> str:
    """Forward and input gradient.

    Times faster than nnx.Conv's convolution, CAUSAL and float32 where nothing is said. Measured on
    two busy cores with AVX512 and AVX512-BF16, which XLA's matmuls make use of and its convolution
    does not; the stored results have these and more. Other tenants of a machine move a figure by 10
    to 20 %, and the rules leave to stock what is closer than that.

    ===================================  ==========================  ==========================
                                         forward                     input gradient
    ===================================  ==========================  ==========================
    N4 T1024 C512 O512 K4 G512           scatter 84  own_pads 78     scatter 77  own_pads 71
    N1 T2000 C512 O512 K4 G512           scatter 127  own_pads 122   own_pads 108  scatter 102
    N8 T1000 C64 O64 K7 G64              scatter 112  own_pads 107   scatter 70  own_pads 62
    N4 T1000 C64 O64 K16 G64             matmuls 30  own_pads 29     matmuls 27  own_pads 25
    N4 T512 C64 O256 K4 D2 G64           own_pads 35  scatter 30     shifts 26  own_pads 16
    N4 T1024 C512 O512 K4 G512 bfloat16  own_pads 91  scatter 69     own_pads 87  scatter 61
    N4 T500 C128 O128 K5 G32             shifts 11  scatter 5.0      shifts 11  scatter 6.8
    N2 T512 C1024 O1024 K3 G64           scatter 1.2  matmuls 1.0    scatter 1.5  matmuls 1.2
    N4 T1024 C256 O256 K3 D4 G8          split 2.1  matmuls 1.6      split 1.8  scatter 1.2
    N1 T1024 C256 O256 K3 D4 G4          scatter 1.1  matmuls 1.0    scatter 1.2  matmuls 1.1
    N4 T512 C128 O128 K3 D4 G8 bfloat16  scatter 1.8  im2col 1.5     matmuls 1.8  im2col 1.7
    N4 T1000 C1 O25 K7                   shifts 3.0  own_pads 2.7    scatter 1.8  blocks 1.7
    N16 T500 C1 O128 K7                  own_pads 2.6  shifts 2.3    scatter 3.3  winograd 0.5
    N4 T2000 C2 O256 K7 D4               shifts 2.4  own_pads 2.0    scatter 5.8  fold 1.9
    N4 T2000 C64 O1 K3                   scatter 2.7  winograd 0.8   own_pads 2.8  scatter 2.8
    N8 T500 C256 O4 K5 D4                scatter 3.9  fold 1.7       shifts 1.5  im2col 1.4
    N8 T1000 C64 O10 K3                  scatter 1.3  winograd 0.8   im2col 1.1  scatter 1.1
    N8 T500 C64 O24 K3 D2                scatter 1.2  winograd 0.9   scatter 1.0  winograd 0.9
    N4 T4000 C2 O2 K3                    shifts 7.4  own_pads 5.5    shifts 8.5  own_pads 6.5
    N4 T2000 C8 O8 K3                    shifts 1.9  scatter 1.7     shifts 2.1  scatter 1.6
    N4 T4000 C1 O32 K8 S2                shifts 1.8  matmuls 1.8     scatter 1.5  blocks 0.7
    N4 T1000 C128 O128 K3 S2             matmuls 0.8  im2col 0.8     scatter 1.1  matmuls 0.5
    N4 T500 C25 O25 K5 S2                im2col 0.7  scatter 0.7     scatter 1.1  im2col 0.8
    N4 T2000 C32 O1 K16 S4               scatter 1.2  im2col 0.6     matmuls 3.2  shifts 3.2
    N4 T500 C768 O768 K3 S2 G64          matmuls 1.7  shifts 1.6     shifts 2.3  scatter 1.9
    N8 T500 C64 O64 K3 S2 G8 bfloat16    im2col 1.6  scatter 1.5     im2col 1.9  scatter 1.9
    N16 T500 C64 O64 K5 S2 G8 float16    split 1.2  dense 1.0        scatter 1.8  split 1.5
    N32 T1000 C3 O16 K1 S2               shifts 2.6  own_pads 2.5    scatter 1.5  shifts 1.2
    N16 T500 C128 O8 K1                  scatter 1.5  im2col 1.4     matmuls 0.9  im2col 0.9
    N8 T64 C16 O16 K3                    scatter 1.7  im2col 1.6     im2col 1.3  scatter 1.2
    N32 T1020 C10 O10 K8 D32             blocks 2.1  scatter 1.8     blocks 2.1  scatter 1.7
    N32 T400 C16 O16 K3                  scatter 1.1  im2col 0.9     scatter 1.1  im2col 0.8
    N8 T400 C20 O20 K5 D8                scatter 1.3  im2col 1.3     scatter 1.6  im2col 1.2
    N32 T784 C25 O25 K7 D16              scatter 1.4  blocks 1.1     scatter 0.8  parts 0.7
    N32 T784 C25 O25 K7                  scatter 1.0  blocks 0.8     scatter 1.0  winograd 0.8
    N32 T400 C30 O30 K7 D16              scatter 1.0  parts 1.0      parts 0.9  fold 0.7
    N8 T1000 C64 O64 K3 D16              winograd 1.1  scatter 0.9   winograd 1.1  scatter 0.9
    N1 T80 C600 O600 K3 D4               im2col 1.6  scatter 1.1     matmuls 1.2  im2col 1.1
    N4 T1000 C64 O128 K1 bfloat16        matmuls 1.6  scatter 1.5    im2col 1.7  scatter 1.5
    N16 T4096 C16 O16 K3 D4 bfloat16     im2col 1.9  scatter 1.3     im2col 1.9  scatter 1.2
    N16 T4096 C25 O25 K7 D4 bfloat16     blocks 2.2  scatter 2.0     blocks 1.9  scatter 1.8
    N4 T1000 C128 O128 K3 D8 bfloat16    im2col 1.7  scatter 1.6     im2col 1.7  scatter 1.6
    N16 T4096 C64 O64 K7 D4 bfloat16     scatter 2.1  blocks 1.8     scatter 2.8  blocks 2.3
    N8 T1000 C16 O8 K7 bfloat16          scatter 1.9  blocks 1.3     im2col 1.3  scatter 1.3
    N4 T2000 C4 O4 K31 D4                blocks 7.2  scatter 4.3     blocks 6.3  scatter 4.7
    N4 T2000 C12 O12 K21 D4              blocks 1.5  im2col 1.3      im2col 1.4  blocks 1.3
    N4 T2000 C20 O20 K21 D4              blocks 1.3  scatter 1.1     blocks 1.4  scatter 1.2
    N4 T2000 C25 O25 K31 D4              winograd 1.1  blocks 0.9    blocks 1.1  winograd 1.1
    N4 T2000 C32 O8 K31 D2               blocks 2.1  scatter 1.6     winograd 0.6  blocks 0.6
    N1 T7500 C15 O15 K51 D8 SAME         blocks 1.8  winograd 1.2    blocks 1.7  winograd 1.2
    N1 T100000 C15 O15 K51 D8 SAME       blocks 1.7  winograd 1.1    blocks 1.8  winograd 1.2
    N16 T4096 C16 O16 K15 D4 bfloat16    blocks 1.9  scatter 1.7     blocks 2.1  scatter 1.7
    N4 T1000 C64 O64 K51 D4 bfloat16     parts 1.5  blocks 1.5       parts 1.5  blocks 1.4
    N1 T100000 C64 O64 K3 D16 bfloat16   im2col 2.8  winograd 2.1    im2col 2.8  winograd 1.3
    N4 T1000 C64 O64 K7 G8 bfloat16      blocks 1.9  scatter 1.4     blocks 1.8  scatter 1.6
    N4 T1000 C64 O64 K4 G16 float16      scatter 6.6  blocks 4.8     blocks 5.5  scatter 5.3
    N8 T1000 C128 O128 K3 D16            winograd 1.2  scatter 0.8   winograd 0.9  fold 0.8
    N1 T4096 C512 O512 K3 D64            winograd 1.3  scatter 1.0   winograd 1.3  fold 0.9
    N4 T1000 C256 O256 K5 D4             winograd 1.2  scatter 0.9   winograd 1.2  scatter 0.9
    N4 T1000 C128 O128 K7 D8             winograd 1.1  fold 0.9      winograd 1.1  fold 1.0
    N16 T80 C600 O600 K3 D4              winograd 1.3  parts 1.2     winograd 1.3  parts 1.2
    ===================================  ==========================  ==========================

    Of bfloat16 depthwise with up to 8 taps takes "matmuls" all the same: on a CPU with AVX2 alone
    they were ahead, in the input gradient by far.

    Those are of cores that share a cache, as they mostly did. Where they lie apart
    (`benchmarks.handoff`), what is made in several steps waits for what another core wrote. It is
    chosen where it wins by the geometric mean of both; ``formulations-cores.json``,
    together/apart:

    ==========================  ===============================  ===============================
                                forward                          input gradient
    ==========================  ===============================  ===============================
    N8 T1000 C64 O64 K3 D16     winograd 1.2/0.6                 winograd 1.2/0.7
    N16 T2000 C128 O128 K3 D4   winograd 1.2/0.7                 winograd 1.3/0.8
    N4 T1000 C256 O256 K5 D4    winograd 1.2/0.9                 winograd 1.2/0.8
    N2 T512 C512 O512 K3 D4     winograd 1.3/1.1                 winograd 1.2/1.1
    N32 T784 C25 O25 K7 D16     scatter 1.4/0.8                  scatter 1.6/0.6
    N8 T400 C20 O20 K5 D8       scatter 1.9/1.3                  scatter 2.0/1.1
    N4 T2000 C20 O20 K21 D4     blocks 1.3/0.7                   blocks 1.3/0.6
    N4 T2000 C12 O12 K21 D4     scatter 1.4/1.4  blocks 1.6/0.7  scatter 1.4/0.9  blocks 1.5/0.9
    N4 T2000 C4 O4 K31 D4       blocks 8.5/3.8  scatter 4.2/3.9  blocks 8.2/3.5  scatter 4.8/3.6
    N4 T4000 C4 O4 K8           shifts 2.8/2.7  scatter 2.2/1.9  shifts 2.9/2.6  scatter 2.4/1.9
    N8 T1000 C64 O10 K3         scatter 1.6/1.4                  scatter 1.6/1.2  im2col 1.6/0.9
    N1 T100 C450 O450 K3 D4     im2col 1.4/1.6                   matmuls 1.4/1.3
    N8 T1000 C64 O64 K3 D256    parts 1.0/0.9                    parts 1.2/0.8
    N2 T1000 C512 O512 K3 D256  parts 1.4/1.3  winograd 1.3/1.1  parts 1.3/1.1  winograd 1.4/1.1
    ==========================  ===============================  ===============================
    """
    spec, c, o = _of_group(problem)
    # nnx.Conv writes CAUSAL zeros first. Where nothing is faster, be the same program.
    causal = problem.operation == "conv1d" and spec.padding == (spec.span - 1, 0)
    stock = "padded" if causal and spec.input_dilation == 1 else "native"
    K, G = spec.kernel_size, spec.groups
    every_step = spec.stride == spec.input_dilation == 1
    if G > 1:
        return _grouped(problem) or stock
    if K > 12 and every_step and _in_blocks(problem, spec, c, o):
        # Into many outputs the products that "blocks" shifts and adds are more than all taps of x.
        spreads = _bfloat16(problem) and FEW < K <= UNROLLED and o >= 4 * c
        return "im2col" if spreads and _pieces_hold("im2col", problem, spec) else "blocks"
    if K > UNROLLED:
        return stock
    if K == 1:
        few = c >= 16 and 1 < o <= min(16, c // 4)  # as in `_into_few`
        # A bias added to float16 that is in memory costs more than a stride saves.
        strided = spec.stride > 1 and problem.out_dtype != np.float16
        matmul = spec.input_dilation == 1 and (strided or few or _bfloat16(problem))
        return "matmuls" if matmul else stock
    if spec.input_dilation > 1:
        return _spread(problem, spec, c, o) or stock
    if spec.stride > 1:
        few = "matmuls" if c == 1 else "shifts"
        return few if c <= 2 and K * c <= 16 else stock
    products = 32 if c <= 8 and c * o <= 64 else 16 if c <= 3 and not _bfloat16(problem) else 0
    if K * c <= products and (c < 4 or problem.N * spec.time * K * c > 2**13):
        return "own_pads" if c == 1 and K <= 6 else "shifts"
    if _into_few(problem, c, o):
        return "scatter"
    if _bfloat16(problem) and K <= FEW:
        if _scatters(problem, spec, c, o):
            return "scatter"
        name = "im2col" if K <= 8 else "blocks"
        return name if _pieces_hold("im2col", problem, spec) else stock
    if problem.N * spec.time * K * c <= 2**16:
        return "im2col"
    if problem.N * spec.time <= 128 and c >= 256:
        # "matmuls" reads the kernel as it lies, where a convolution has it flipped.
        return "matmuls" if problem.operation == "conv1d_input_grad" else "im2col"
    if _few_channels(problem, spec, c, o):
        return "scatter"
    return "winograd" if _filters(problem, spec, c, o) else stock


def _grouped(problem: Problem) -> str | None:
    """Of more than one group; None where nothing is faster than stock.

    Of many taps of one channel each, measured as in `forward`:

    ===============================  ==============================  ==============================
                                     forward                         input gradient
    ===============================  ==============================  ==============================
    N4 T1000 C256 O256 K9 G256       scatter 45  own_pads 41         own_pads 49  scatter 44
    N4 T1000 C64 O64 K16 G64         matmuls 30  own_pads 29         matmuls 27  own_pads 25
    N2 T500 C768 O768 K31 G768       own_pads 26  matmuls 18         own_pads 41  channel_blocks 29
    N2 T1000 C256 O256 K33 G256      channel_blocks 27  own_pads 26  channel_blocks 26  own_pads 24
    N4 T1000 C256 O256 K33 S2 G256   own_pads 18  shifts 12          own_pads 138  shifts 83
    N2 T1000 C64 O256 K31 G64        channel_blocks 15  own_pads 9   channel_blocks 45  own_pads 12
    N1 T417 C512 O512 K75 G512 SAME  channel_blocks 37  scatter 36   channel_blocks 44  scatter 39
    N8 T2000 C256 O256 K75 G256      channel_blocks 18  scatter 18   channel_blocks 32  scatter 14
    N1 T1000 C512 O512 K87 D2 G512   channel_blocks 120  scatter 61  channel_blocks 77  own_pads 64
    ===============================  ==============================  ==============================
    """
    spec, c, o = _of_group(problem)
    N, G, K = problem.N, spec.groups, spec.kernel_size
    every_step = spec.stride == spec.input_dilation == 1
    narrow = problem.out_dtype.itemsize < 4
    if c == 1:
        if PADS < K <= CHANNEL_BLOCKS:
            return "channel_blocks"
        if K > UNROLLED or (K > 8 and not (narrow and o > 1)):
            return "own_pads"
        if narrow or K > 8:
            return "matmuls"
        if o == 1 and K <= 8 and (K > 4 or N == 1 or G < 256):
            return "scatter"
        return "own_pads" if K <= 4 else "matmuls"
    if _bfloat16(problem) and c <= 16 and o > 1 and every_step and _little(problem):
        return "im2col" if K <= 4 else "blocks"
    moved = "im2col" if spec.stride > 1 else "scatter"
    if narrow and 2 < c <= 8 and o > 1 and K <= FEW and _little(problem, moved):
        return moved  # multiply-adds widen every number anew for each of their products
    if c <= 8 and K * c <= 64:
        return "shifts"
    if problem.depthwise and c <= 8 and K <= CHANNEL_BLOCKS:
        return "channel_blocks"
    if c <= 8 and K > FEW and every_step and _little(problem):
        return "blocks"
    if K <= 4 and every_step and (max(c, o) <= 16 or G > 32 or (N == 1 and max(c, o) <= 64)):
        return "scatter"
    if 2 < G <= 32 or (G == 2 and c <= 32):
        return "split"
    if G > 32 and spec.stride > 1:
        return "matmuls"
    scatters = G > 32 and spec.input_dilation > 1 and K <= FEW
    return "scatter" if scatters and _little(problem, "scatter") else None


def _little(problem: Problem, name: str = "im2col") -> bool:
    """Whether a formulation of groups, which is not taken in pieces, holds no more than 64 MiB."""
    return problem.N * problem.spec.groups * _held(name, problem) <= 2**26


def _in_blocks(problem: Problem, spec: ConvSpec, c: int, o: int) -> bool:
    """Whether "blocks" is faster than the convolution with many taps."""
    if 2 * spec.span > spec.time or not _pieces_hold("blocks", problem, spec):
        return False
    if _bfloat16(problem):
        return spec.kernel_size > FEW or not _scatters(problem, spec, c, o)
    if _into_few(problem, c, o):
        return False
    few = max(c, o) < (10 if spec.kernel_size <= 32 else 16) if min(c, o) >= 4 else max(c, o) <= 2
    into_few = 1 < o <= 8 and c <= 64
    slow_as_it_is = spec.kernel_dilation > 1 or max(c, o) <= 12 or into_few
    return (few or into_few) and slow_as_it_is


def _pieces_hold(name: str, problem: Problem, spec: ConvSpec) -> bool:
    """Whether a formulation can be taken in pieces that are much longer than a window."""
    return 2 * spec.span <= _steps_at_once(name, problem) or _held(name, problem) <= MOST


def _into_few(problem: Problem, c: int, o: int) -> bool:
    """Whether there are so few outputs, each of more channels, that "scatter" holds little.

    The convolution takes outputs side by side: of few its registers stay empty.
    """
    K, held = problem.spec.kernel_size, _held("scatter", problem)
    if o <= 8:
        return o < c and K <= 32 and held <= 4 * MOST
    return o <= 24 and o < c and K <= FEW and held <= MOST


def _few_channels(problem: Problem, spec: ConvSpec, c: int, o: int) -> bool:
    """Whether float32 "scatter" makes up for what it holds.

    The convolution is good at channels that fill registers, and bad at 10 or 25 of them; it is
    better without a dilation than with one.
    """
    K, D, most = spec.kernel_size, spec.kernel_dilation, max(c, o)
    held = _held("scatter", problem)
    everything = problem.N * held
    if K > (FEW if most > 12 else 2 * FEW) or spec.span > spec.time or held > MOST:
        return False
    if most <= 12:
        return everything <= WHOLE or (D > 1 and K <= FEW)
    if most >= 28 or o % 16 == 0:
        return most < 32 and everything <= 3 * 2**20 and (D > 1 or most < 28)
    return everything <= (WHOLE if D > 1 or K >= 7 else 3 * 2**20)


def _spread(problem: Problem, spec: ConvSpec, c: int, o: int) -> str | None:
    """Of one group and a dilated input, as a strided layer's input gradient has.

    None where nothing is faster than stock, of which all but each S-th product is with zero.
    Measured as `_strided_kernel_grad`, input gradient, and where there are two figures as the last
    of `forward`:

    =================================  ======================================================
    N8 T1000 C64 O64 K3 S2             scatter 1.1  depth_to_space 1.0
    N4 T1000 C128 O128 K4 S2           depth_to_space_winograd 1.5  depth_to_space 1.2
    N8 T4000 C32 O32 K5 S2             depth_to_space_winograd 1.5  scatter 1.4
    N4 T500 C256 O256 K5 S2            depth_to_space_winograd 1.3  depth_to_space 1.2
    N4 T1000 C128 O128 K8 S4           depth_to_space_winograd 1.4  depth_to_space 1.3
    N4 T2000 C64 O16 K16 S4            depth_to_space_winograd 2.2  depth_to_space_im2col 2.0
    N4 T4000 C16 O16 K16 S4            depth_to_space 2.7  depth_to_space_im2col 2.4
    N2 T16000 C32 O64 K16 S4           depth_to_space_winograd 2.2  depth_to_space 1.9
    N1 T4000 C64 O64 K17 S2            depth_to_space_winograd 1.9  depth_to_space 1.8
    N8 T1000 C64 O64 K17 S2            depth_to_space_winograd 2.2  depth_to_space 1.9
    N2 T16000 C32 O64 K31 S3           depth_to_space_winograd 5.7  depth_to_space 4.3
    N1 T30000 C1 O64 K16 S8            depth_to_space 1.1  scatter 1.1
    N4 T2000 C32 O1 K16 S4             matmuls 2.4  shifts 2.2
    N4 T4000 C64 O1 K17 S2             matmuls 25  shifts 23
    N8 T1000 C64 O64 K16 S4 bfloat16   depth_to_space_im2col 5.1  depth_to_space_winograd 4.6
    N2 T8000 C64 O64 K33 S4 bfloat16   depth_to_space_im2col 6.0  depth_to_space 4.2
    N4 T16000 C32 O32 K64 S2 bfloat16  depth_to_space 2.0  depth_to_space_im2col 0.9
    N8 T4000 C1 O64 K16 S2 bfloat16    scatter 9.6  native 3.4  depth_to_space_im2col 0.9
    N8 T4000 C64 O1 K16 S2 bfloat16    depth_to_space_im2col 1.9  depth_to_space 1.3
    =================================  ======================================================

    =========================  =======================================================
    N4 T2000 C32 O32 K9 S2     depth_to_space 1.4/1.4  depth_to_space_winograd 1.3/1.2
    N4 T1000 C128 O128 K4 S2   scatter 1.1/1.3  depth_to_space_winograd 1.2/0.8
    N4 T500 C256 O256 K5 S2    scatter 1.1/1.2  depth_to_space_winograd 1.2/0.9
    N4 T1000 C128 O128 K8 S4   depth_to_space 1.6/1.2  depth_to_space_winograd 1.8/0.9
    N12 T500 C128 O128 K10 S5  depth_to_space 1.1/1.5  depth_to_space_winograd 1.5/1.5
    N4 T4000 C64 O1 K17 S2     matmuls 62.5/69.3  depth_to_space 57.1/23.7
    =========================  =======================================================
    """
    K, S = spec.kernel_size, spec.input_dilation
    held = _held("scatter", problem) <= MOST
    scatters = "scatter" if spec.stride == 1 and K <= FEW and held else None
    if spec.kernel_dilation > 1 or spec.stride > 1:
        # Such a matmul of one channel only writes down what it holds.
        return "shifts" if scatters and c == 1 and K * o > 256 else scatters
    if _bfloat16(problem):
        if held and (K <= 8 or (o <= 2 and c >= 32 and K <= 2 * FEW)):
            return "scatter"
        # What the matmul reads; it is not taken in pieces.
        windows = 2 * problem.N * (spec.out_time // S) * (K // S + 1) * c
        return "depth_to_space_im2col" if windows <= 2**26 else "depth_to_space"
    if not _float32(problem):
        return scatters
    if c == 1 and o >= 32 and K <= 2 * FEW:
        return "matmuls"
    if o < 8 and (K % S or S * o < 16 or K <= 5):  # rows too short, or more to add to them
        return "scatter" if o <= 2 and held and K <= 2 * FEW else scatters
    little = problem.N * spec.out_time * max(c, S * o) <= 2**22 * S
    # Of more whole rows its rounding errors are more than twice those of stock.
    filters = problem.precision is None and o >= 64 and c > 1 and little and K // S <= 5
    if scatters and K <= 5:
        return scatters
    return "depth_to_space_winograd" if filters else "depth_to_space"


def _filters(problem: Problem, spec: ConvSpec, c: int, o: int) -> bool:
    """Whether float32 "winograd" saves more products than its sums cost.

    Who asks for a precision, be it the default one, gets the sums that the definition has, and with
    them nothing of a step whose weights are zero. An even number of taps saves
    too little, a few channels or steps do not make up for what is written to memory and read again
    (of a kernel gradient less is than of the others), and beyond 16 MiB the pieces' results are too
    much to put together.
    """
    if not _float32(problem) or problem.precision is not None or spec.kernel_size % 2 == 0:
        return False
    steps = problem.N * spec.out_time
    few = steps < (512 if problem.operation == "conv1d_kernel_grad" else 1024)
    products = steps * spec.kernel_size * c * o
    least = 64 if problem.operation == "conv1d_kernel_grad" else 512
    worth = min(c, o) >= least and products >= (2**28 if few else 2**26)
    return worth and steps * max(c, o) <= 2**22 and share(spec) <= 0.76


def _filters_kernel_grad(problem: Problem) -> bool:
    """As `_filters`, of few taps: their pairs of steps lie side by side in memory.

    A tap that sees next to nothing but padding would get, from what its neighbours see, what is
    rounding to them.
    """
    spec, c, o = problem.spec, problem.C, problem.O
    every_step = spec.stride == spec.input_dilation == 1
    few = spec.kernel_size == 3 or (spec.kernel_size == 5 and min(c, o) >= 256)
    pieces = problem.N == 1 or _held("winograd", problem) <= MOST
    return every_step and few and _sees(spec) and pieces and _filters(problem, spec, c, o)


def _sees(spec: ConvSpec) -> bool:
    """Whether each tap sees more than padding."""
    return 2 * sum(max(0, zeros) for zeros in spec.padding) <= spec.time


def _scatters(problem: Problem, spec: ConvSpec, c: int, o: int) -> bool:
    """Whether of bfloat16 "scatter" is faster than "im2col"; what it holds is twice as wide."""
    worth = c >= 32 or (c >= 20 and spec.kernel_size >= 5)
    rows = o < 64 or spec.time >= 512  # for a matmul with as many columns as all taps have
    sees = spec.span <= spec.time  # else many of its products are of taps that see only padding
    return o <= c and worth and rows and sees and _held("scatter", problem) <= MOST


def kernel_grad(problem: Problem) -> str:
    """Kernel gradient; measured as in `forward`, and where there are two figures as its last ones.

    ===================================  ==================================================
    N4 T1024 C512 O512 K4 G512           tree 18  channel_blocks 8.3  shifts 7.5
    N4 T64 C32 O32 K3 D2 G32             tree 9.0  shifts 3.2  matmuls 2.1  im2col 1.8
    N4 T512 C64 O256 K4 D2 G64           tree 69  channel_blocks 60  im2col 56  shifts 48
    N4 T512 C32 O32 K3 G2                dense 2259  split 2238  im2col 2005  matmuls 1595
    N1 T1024 C256 O256 K3 D4 G4          im2col 18  matmuls 16  split 11  dense 4.9
    N4 T1024 C256 O256 K3 D4 G32         split 53  tree 48  im2col 40  matmuls 33
    N4 T500 C128 O128 K5 G32             split 54  tree 38  im2col 32  matmuls 29
    N2 T512 C1024 O1024 K3 G64           im2col 117  tree 76  matmuls 66  shifts 32
    N2 T1000 C512 O512 K3 D2 G128        tree 293  shifts 161  matmuls 126  im2col 106
    N4 T1000 C128 O128 K5 S2 G8          im2col 13  matmuls 10  dense 4.3  split 3.5
    N4 T512 C128 O128 K3 D4 G8 bfloat16  im2col 18  matmuls 12  split 12  dense 5.7
    N4 T1000 C1 O25 K7                   im2col 1.3  tree 1.0  padded 1.0  matmuls 1.0
    N4 T1000 C64 O128 K1                 im2col 1.1  canonical 1.0  matmuls 1.0  padded 1.0
    N4 T128 C32 O32 K3                   im2col 1.8  winograd 1.7  matmuls 1.5  padded 1.0
    N4 T1000 C128 O128 K3 S2             im2col 1.8  matmuls 1.6  canonical 1.2  padded 1.0
    N1 T64 C512 O512 K3 D4               im2col 1.3  winograd 1.0  padded 1.0  matmuls 0.9
    N1 T100 C450 O450 K3 D4              winograd 1.4  im2col 1.3  matmuls 1.1  padded 1.0
    N1 T1024 C128 O128 K7 D3 SAME        padded 1.6  winograd 1.4  matmuls 1.2  im2col 1.2
    N1 T3750 C32 O32 K21 D10 SAME        padded 1.6  canonical 1.0  matmuls 0.9  im2col 0.9
    N1 T5000 C64 O64 K3 D16 SAME         winograd 1.2  padded 1.1  canonical 1.0
    N2 T256 C256 O256 K3 D3 SAME         winograd 1.6  im2col 1.3  padded 1.2  matmuls 1.1
    N2 T4096 C64 O64 K3 D3 SAME          winograd 1.3  canonical 1.0  im2col 1.0
    N4 T8192 C32 O32 K3 D3 SAME          canonical 1.0  winograd 0.9  padded 0.8
    N1 T5000 C32 O32 K3 D512             winograd 1.0  padded 1.0  parts 1.0  im2col 0.9
    N8 T1000 C64 O64 K3 D16              winograd 1.4  canonical 1.3  im2col 1.1
    N32 T784 C25 O25 K7 D16              parts 1.1  canonical 1.0  padded 1.0  winograd 0.9
    N4 T2000 C32 O32 K21                 padded 1.0  canonical 0.8  winograd 0.5
    N4 T1000 C128 O128 K3 D8 bfloat16    im2col 2.0  matmuls 1.5  winograd 1.4
    N16 T4096 C64 O64 K7 D4 bfloat16     im2col 1.5  canonical 1.1  padded 1.0
    N16 T4096 C25 O25 K7 D4 bfloat16     canonical 1.1  padded 1.0  winograd 0.9
    N4 T2000 C64 O1 K3 bfloat16          winograd 1.5  canonical 1.2  padded 1.0
    N2 T1000 C512 O512 K3 G512           tree 22  shifts 14  matmuls 3.3  im2col 2.7
    N2 T1000 C256 O256 K33 G256          channel_blocks 27  tree 17  shifts 7.1
    N1 T1000 C512 O512 K87 D2 G512       channel_blocks 89  tree 50  shifts 30  matmuls 4.4
    N1 T100000 C64 O64 K3 D16 bfloat16   im2col 3.1  matmuls 1.5  winograd 1.0  padded 1.0
    N8 T1000 C128 O128 K3 D16            winograd 1.2  im2col 1.2  padded 1.0
    N1 T4096 C512 O512 K3 D64            winograd 1.4  canonical 1.1  padded 1.0
    N4 T1000 C256 O256 K5 D4             winograd 1.2  canonical 1.1  padded 1.0
    N1 T417 C512 O512 K75 G512 SAME      channel_blocks 188  tree 74  shifts 39  im2col 6.9
    N8 T2000 C256 O256 K75 G256          channel_blocks 62  tree 7.7  shifts 4.0
    N2 T500 C768 O768 K31 G768           channel_blocks 142  tree 69  shifts 28
    N4 T1000 C256 O256 K33 S2 G256       channel_blocks 48  tree 24  shifts 13  padded 1.0
    N4 T1000 C256 O256 K9 G256           tree 19  channel_blocks 17  shifts 8.4
    N2 T1000 C256 O256 K17 D8 G256       channel_blocks 23  tree 18  shifts 11  matmuls 2.2
    ===================================  ==================================================

    ===========================  =======================================================
    N4 T4000 C2 O2 K3            tree 1.3/2.1  im2col 0.9/0.8
    N8 T1000 C64 O64 K3 D16      winograd 1.3/0.8  canonical 1.1/1.1
    N16 T2000 C128 O128 K3 D4    winograd 1.5/0.9  canonical 1.2/1.1
    N2 T512 C512 O512 K3 D4      winograd 1.4/1.1  canonical 1.1/1.0
    N8 T1000 C64 O64 K3 S2       canonical 1.2/1.2  im2col 1.4/0.9
    N4 T2000 C32 O32 K9 S2       space_to_depth 2.1/1.8  space_to_depth_winograd 2.2/1.3
    N4 T1000 C128 O128 K4 S2     space_to_depth 1.2/1.3  space_to_depth_winograd 2.0/1.5
    N1 T10000 C64 O64 K16 D2 S2  matmuls 2.9/3.0  canonical 1.1/1.0
    ===========================  =======================================================

    "native" is the same program as "canonical" outside of loops.
    """
    spec, c, _ = _of_group(problem)
    K, G = spec.kernel_size, spec.groups
    causal = spec.input_dilation == 1 and spec.padding == (spec.span - 1, 0)
    if G > 1:
        if K > UNROLLED and c > 1:
            problem = dataclasses.replace(problem, spec=spec.of_taps(range(AT_ONCE)))
        return _grouped_kernel_grad(problem)
    if K > UNROLLED:
        return "padded" if causal else "canonical"
    if K == 1 and spec.stride == spec.input_dilation == 1:
        return "matmuls"
    steps = problem.N * spec.out_time
    columns = steps * K * c  # what im2col holds
    if problem.C * problem.O <= 4 and K <= 4 and spec.stride == 1 and steps >= 2**13:
        return "tree"
    if columns <= 2**17 or (K <= 8 and (steps <= 128 or c == 1)):
        return "im2col"
    if spec.stride > 1:
        return _strided_kernel_grad(problem)
    wide = max(problem.C, problem.O) >= 32 and min(problem.C, problem.O) >= 16
    if _bfloat16(problem) and K <= 8 and wide and _pieces_hold("im2col", problem, spec):
        return "im2col"
    if _filters_kernel_grad(problem):
        return "winograd"
    # Padded, no product has to be looked at. It pays for few steps, or for many taps.
    few = 5 * 2**10 if problem.N == 1 else 2**11 if problem.N <= 4 else 0
    pays = steps <= few or K > FEW
    return "padded" if spec.input_dilation == 1 and pays else "canonical"


def _strided_kernel_grad(problem: Problem) -> str:
    """Of one group. Measured as in `forward`, but in ``formulations-strided.json`` and ``-more``:

    =================================  ===========================================================
    N1 T4000 C64 O64 K4 S2             space_to_depth_winograd 5.3  im2col 4.4  space_to_depth 4.2
    N1 T4000 C64 O64 K17 S2            space_to_depth 4.8  space_to_depth_winograd 3.7  im2col 3.3
    N1 T30000 C1 O64 K16 S8            space_to_depth 2.4  im2col 2.2  space_to_depth_winograd 1.8
    N2 T16000 C32 O64 K16 S4           space_to_depth 2.7  space_to_depth_winograd 2.0  im2col 1.9
    N2 T16000 C32 O64 K31 S3           space_to_depth 3.2  canonical 1.1
    N4 T2000 C32 O1 K16 S4             space_to_depth_winograd 5.1  space_to_depth 4.5  im2col 2.9
    N4 T4000 C16 O16 K16 S4            space_to_depth 2.8  im2col 2.8  space_to_depth_winograd 2.4
    N4 T2000 C32 O32 K9 S2             space_to_depth_winograd 2.4  space_to_depth 2.2  im2col 1.9
    N4 T1000 C128 O128 K3 S2           im2col 2.1  space_to_depth_winograd 2.0  space_to_depth 1.5
    N4 T1000 C128 O128 K8 S4           space_to_depth_winograd 2.2  im2col 1.5  space_to_depth 1.4
    N4 T500 C256 O256 K5 S2            space_to_depth_winograd 1.6  im2col 1.3  space_to_depth 1.1
    N6 T1500 C64 O64 K10 S5            space_to_depth_winograd 1.9  space_to_depth 1.7  im2col 1.7
    N8 T1000 C64 O64 K3 S2             im2col 1.6  space_to_depth_winograd 1.5  canonical 1.4
    N8 T1000 C64 O64 K5 S2             space_to_depth_winograd 1.3  canonical 1.2
    N8 T1000 C64 O64 K17 S2            space_to_depth 1.1  canonical 1.1  im2col 0.8
    N8 T4000 C32 O32 K5 S2             canonical 1.3  im2col 1.2  space_to_depth 1.1
    N12 T500 C128 O128 K10 S5          space_to_depth_winograd 1.6  space_to_depth 1.2  im2col 1.1
    N16 T1000 C16 O16 K8 S4            canonical 1.2  space_to_depth_winograd 1.2
    N1 T10000 C64 O64 K5 D2 S2         im2col 3.6  matmuls 2.3  canonical 1.1
    N1 T10000 C64 O64 K16 D2 S2        matmuls 2.8  canonical 1.0  im2col 0.8
    N2 T8000 C64 O64 K33 S4 bfloat16   im2col 3.5  space_to_depth 2.7  canonical 1.0
    N1 T16000 C64 O64 K17 S2 bfloat16  space_to_depth 5.2  matmuls 5.1  im2col 4.5
    N4 T16000 C32 O32 K64 S2 bfloat16  space_to_depth 3.4  canonical 1.1  im2col 0.8
    N8 T4000 C64 O1 K16 S2 bfloat16    space_to_depth 2.2  native 1.3  im2col 0.8
    =================================  ===========================================================

    XLA's convolution has the N samples for its channels, and is good at eight and more of them.
    """
    spec, K, N = problem.spec, problem.spec.kernel_size, problem.N
    taps, plain = -(-K // spec.stride), spec.kernel_dilation == spec.input_dilation == 1
    held = _held("im2col", problem)
    if _bfloat16(problem):
        fits = held <= (WHOLE if plain else 2**26) and (problem.O > 1 or N * held <= WHOLE)
        return "im2col" if fits else "space_to_depth" if plain else "canonical"
    if not plain or not _float32(problem):
        if K <= FEW and held <= WHOLE:
            return "im2col"
        return "matmuls" if K <= FEW and N == 1 and _float32(problem) else "canonical"
    wide = min(spec.stride * problem.C, problem.O)
    little = N * spec.out_time * max(spec.stride * problem.C, problem.O) <= 2**22
    # Of more pairs of rows it would copy the steps that they see, side by side.
    filters = taps in (2, 3, 5) and problem.precision is None and little and _sees(spec)
    if K <= 3 and N < 8:
        return "im2col"
    if N >= 8:
        return "space_to_depth_winograd" if filters and taps == 2 and wide >= 128 else "canonical"
    if filters and min(problem.C, problem.O) >= 64:
        return "space_to_depth_winograd"
    return "im2col" if K <= 5 or taps <= 2 else "space_to_depth"


def many(problem: Problem) -> str | None:
    """The formulation that a batch of kernels is mapped by, or None for groups.

    Kernel gradients alone, as each example of a batch has its own: convolutions of groups are slow
    at them, batched matmuls are not.
    """
    spec, c, _ = _of_group(problem)
    if problem.operation != "conv1d_kernel_grad" or c == 1 or spec.kernel_size > FEW:
        return None
    return "matmuls" if spec.groups == 1 or spec.kernel_size <= 4 else None


def _grouped_kernel_grad(problem: Problem) -> str:
    spec, c, _ = _of_group(problem)
    K, G = spec.kernel_size, spec.groups
    if c == 1:
        # Each of its pieces copies what it sees of x, D (K - 1) steps more than its own.
        blocks = K >= 12 and spec.kernel_dilation <= 8 and spec.input_dilation == 1
        return "channel_blocks" if blocks else "tree"
    # It holds K / S copies of x. With a stride it is twice as slow as "split" from some 20 MB on.
    held = problem.N * G * _held("im2col", problem)
    if K <= 8 and (held <= WHOLE if spec.stride > 1 else _bfloat16(problem) and _little(problem)):
        return "im2col"
    if G > 32 and K * c <= 20:
        return "tree"
    # 64 convolutions take 2.5 s to compile, so only where one run takes half a second without.
    if G > 64 or (G > 32 and _little(problem)):
        return "im2col" if K <= 8 and _little(problem) else "matmuls"
    return "matmuls" if problem.N == 1 and c >= 64 else "split"


def _float32(problem: Problem) -> bool:
    types = (problem.lhs_dtype, problem.rhs_dtype, problem.out_dtype)
    return {np.dtype(a).name for a in types} == {"float32"}


def _bfloat16(problem: Problem) -> bool:
    return {np.dtype(problem.lhs_dtype).name, np.dtype(problem.rhs_dtype).name} == {"bfloat16"}


# What a piece may hold for a moment; what needs no pieces yet; and what one sequence may hold,
# beyond which it is as slow as all at once. Bytes. Each piece costs some time by itself.
PIECE = {
    "scatter": 5 * 2**20, "im2col": 5 * 2**19, "blocks": 5 * 2**20, "winograd": 2**23,
    "channel_blocks": 2**23,
}  # fmt: skip
WHOLE, MOST = 9 * 2**20, 2**23


def _held(name: str, problem: Problem) -> int:
    """Bytes that a formulation of `PIECE` holds for one sequence beside x and y."""
    operand, numbers = numbers_of(problem)
    spec, c, o = _of_group(problem)
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


def _steps_at_once(name: str, problem: Problem) -> int:
    """How many of the outputs of one sequence; of a kernel gradient how many of gy."""
    spec, _, _ = problem.as_convolution
    every_step = spec.stride == spec.input_dilation == 1
    if spec.groups > 1 or not every_step or name not in ("im2col", "blocks", "winograd"):
        return spec.out_time
    held = _held(name, problem)
    if held <= MOST:
        return spec.out_time
    steps = max(1, PIECE[name] * spec.out_time // held)
    tile = 2 * spec.kernel_dilation if name == "winograd" else 1
    return max(tile, steps - steps % tile)


def _sequences_at_once(name: str, problem: Problem) -> int:
    """How many of N, which they divide."""
    N = problem.N
    if (problem.spec.groups > 1 and name != "channel_blocks") or name not in PIECE:
        return N
    each = _held(name, problem)
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


def _taps_at_once(name: str, problem: Problem) -> int:
    """How many of K."""
    K = problem.spec.kernel_size
    if problem.spec.groups == 1:
        return K
    if name == "tree" or (name in ("own_pads", "shifts") and problem.depthwise):
        return TAPS[name] if K > AT_ONCE else K
    return K if K <= UNROLLED or name in ("native", "padded", "channel_blocks") else AT_ONCE
