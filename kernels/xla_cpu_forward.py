"""The formulation of all of time for a forward pass or an input gradient on a CPU."""

import numpy as np

from conv_pallas.kernels.xla_cpu_bounds import (
    FEW,
    MOST,
    WHOLE,
    bfloat16_pays,
    bytes_held,
    fast_bfloat16,
    filtering_pays,
    is_bfloat16,
    is_float32,
    of_group,
    pieces_hold,
    sound,
)
from conv_pallas.kernels.xla_cpu_groups import grouped
from conv_pallas.kernels.xla_pieces import UNROLLED
from conv_pallas.spec import ConvSpec, Problem


def forward(problem: Problem) -> str:
    """Forward and input gradient.

    Times faster than nnx.Conv's convolution, and in input gradients than one
    `lax.conv_general_dilated` that pads in its window; nnx.Conv's own takes longer where padding is
    CAUSAL, as it is of the zeros too. CAUSAL and float32 where nothing is said. Measured on two
    busy cores with AVX512 and AVX512-BF16, which XLA's matmuls make use of and its convolution does
    not; the stored results have these and more. Other tenants of a machine move a figure by 10 to
    20 %, and the rules leave to stock what is closer than that.

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

    And of an Intel processor with as much (``formulations-intel.json``, ``-few`` and ``-narrow``):

    ===================================  ==========================  ==========================
    N8 T1000 C32 O32 K16 bfloat16        blocks 1.8  scatter 1.1     blocks 1.8  scatter 1.0
    N4 T1000 C64 O64 K15 D2 bfloat16     blocks 2.7  scatter 2.0     blocks 2.7  scatter 1.8
    N4 T1000 C64 O16 K15 bfloat16        scatter 3.1  blocks 2.6     im2col 1.3  blocks 0.9
    N2 T5099 C4 O512 K9 D128 bfloat16    im2col 1.3  padded 1.0      scatter 23  parts 13
    ===================================  ==========================  ==========================

    Of bfloat16 they are of such a processor only: for others see `bfloat16_pays` and `pads_cost`.

    Those are of cores that share a cache, as they mostly did. Where they lie apart
    (`benchmarks.handoff`), what is made in several steps waits for what another core wrote. It is
    chosen where it wins by the geometric mean of both, which ``formulations-cores.json`` has and
    ``-more``; of the former, together/apart:

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
    spec, c, o = of_group(problem)
    # nnx.Conv writes CAUSAL zeros first. Where nothing is faster, be the same program.
    causal = problem.operation == "conv1d" and spec.padding == (spec.span - 1, 0)
    stock = "padded" if causal and spec.input_dilation == 1 else "native"
    K, G = spec.kernel_size, spec.groups
    every_step = spec.stride == spec.input_dilation == 1
    if G > 1:
        return grouped(problem) or stock
    bfloat16 = bfloat16_pays(problem, spec, c, o)
    if K > 12 and every_step and _in_blocks(problem, spec, c, o):
        # Into many outputs the products that "blocks" shifts and adds are more than all taps of x.
        spreads = bfloat16 and K <= UNROLLED and o >= 4 * c
        return "im2col" if spreads and pieces_hold("im2col", problem, spec) else "blocks"
    if K > UNROLLED:
        return stock
    if K == 1:
        few = c >= 16 and 1 < o <= min(16, c // 4)  # as in `_into_few`
        # A bias added to float16 that is in memory costs more than a stride saves.
        strided = spec.stride > 1 and problem.out_dtype != np.float16
        matmul = spec.input_dilation == 1 and (strided or few or bfloat16)
        return "matmuls" if matmul else stock
    if spec.input_dilation > 1:
        return _spread(problem, spec, c, o) or stock
    if spec.stride > 1:
        return _strided(problem, spec, c, o) or stock
    # The convolution reads whole vectors of taps and channels well where many outputs share them.
    most = 15 if o >= 128 else 16
    products = 32 if c <= 8 and c * o <= 64 else most if c <= 3 and not bfloat16 else 0
    if K * c <= products and (c < 4 or problem.N * spec.time * K * c > 2**13):
        return "own_pads" if c == 1 and K <= 6 else "shifts"
    if _into_few(problem, c, o):
        return "scatter"
    if bfloat16 and K <= FEW:
        if _scatters(problem, spec, c, o):
            return "scatter"
        name = "im2col" if K <= 8 or o >= 4 * c else "blocks"
        return name if pieces_hold("im2col", problem, spec) else stock
    # A matmul reads a large kernel more slowly than a convolution. Times faster, of 16, 32, 64 and
    # 100 steps, K3: C256 0.9, 1.7, 1.3, 1.2; C450 1.3, 1.3, 0.8, 0.8; C600 0.7, 0.8, 0.8, 0.9.
    cached = problem.operation == "conv1d_input_grad" or c * o <= 2**18
    if problem.N * spec.time * K * c <= 2**16 and cached:
        return "im2col"
    if problem.operation == "conv1d_input_grad" and problem.N * spec.time <= 128 and c >= 256:
        return "matmuls"  # reads the kernel as it lies, where a convolution has it flipped
    if problem.N * spec.time <= 100 and c >= 256 and cached:
        return "im2col"
    if _few_channels(problem, spec, c, o):
        return "scatter"
    return "winograd" if filtering_pays(problem, spec, c, o) else stock


def _in_blocks(problem: Problem, spec: ConvSpec, c: int, o: int) -> bool:
    """Whether "blocks" is faster than the convolution with many taps."""
    if not pieces_hold("blocks", problem, spec):
        return False
    if bfloat16_pays(problem, spec, c, o):
        return spec.kernel_size > FEW or o >= c or not _scatters(problem, spec, c, o)
    if 2 * spec.span > spec.time or _into_few(problem, c, o):
        return False
    few = max(c, o) < (10 if spec.kernel_size <= 32 else 16) if min(c, o) >= 4 else max(c, o) <= 2
    into_few = 1 < o <= 8 and c <= 64
    slow_as_it_is = spec.kernel_dilation > 1 or max(c, o) <= 12 or into_few
    return (few or into_few) and slow_as_it_is


def _into_few(problem: Problem, c: int, o: int) -> bool:
    """Whether there are so few outputs, each of more channels, that "scatter" holds little.

    The convolution takes outputs side by side: of few its registers stay empty.
    """
    K, held = problem.spec.kernel_size, bytes_held("scatter", problem)
    if o <= 8:
        return o < c and K <= 32 and held <= 4 * MOST
    return o <= 24 and o < c and K <= FEW and held <= MOST


def _few_channels(problem: Problem, spec: ConvSpec, c: int, o: int) -> bool:
    """Whether float32 "scatter" makes up for what it holds.

    The convolution is good at channels that fill registers, and bad at 10 or 25 of them; it is
    better without a dilation than with one.
    """
    K, D, most = spec.kernel_size, spec.kernel_dilation, max(c, o)
    held = bytes_held("scatter", problem)
    everything = problem.N * held
    if K > (FEW if most > 12 else 2 * FEW) or spec.span > spec.time or held > MOST:
        return False
    if K > 12 and D == 1 and most > 8:
        return False
    if most <= 12:
        return everything <= WHOLE or (D > 1 and K <= FEW)
    if most >= 28 or o % 16 == 0:
        return most < 32 and everything <= 3 * 2**20 and (D > 1 or most < 28)
    return everything <= (WHOLE if D > 1 or K >= 7 else 3 * 2**20)


def _strided(problem: Problem, spec: ConvSpec, c: int, o: int) -> str | None:
    """Of one group, more than one tap, and a stride; None where nothing is faster than stock.

    Measured as in `xla_cpu_groups.grouped`:

    =====================================  ====================================
    N4 T5218 C10 O10 K2 S2                 shifts 2.3  scatter 1.7  im2col 1.4
    N1 T378 C256 O8 K3 S4                  scatter 2.0  im2col 1.8  matmuls 1.3
    N1 T1263 C256 O4 K3 S2 bfloat16        scatter 2.2  padded 1.0  native 1.0
    N4 T799 C256 O4 K3 S4 bfloat16 SAME    scatter 3.3  matmuls 1.3  im2col 1.2
    N2 T794 C25 O25 K3 S4 bfloat16         im2col 1.6  matmuls 1.2  scatter 1.0
    N32 T1642 C96 O96 K2 S2 bfloat16 SAME  im2col 1.6  matmuls 1.5  scatter 1.3
    N8 T310 C64 O64 K31 S4 bfloat16 SAME   im2col 1.3  padded 1.0  native 1.0
    N8 T1000 C4 O4 K5 S2 bfloat16          shifts 3.0  im2col 3.0
    N8 T1000 C8 O8 K4 S4 bfloat16          im2col 2.3  shifts 1.7
    =====================================  ====================================

    The last two are of an Intel processor (``formulations-intel-few.json``), and so are these
    (``-narrow``):

    =====================================  ====================================
    N4 T16384 C1 O512 K16 S8               padded 1.0  matmuls 0.9
    N4 T4096 C1 O128 K16 S4                padded 1.0  matmuls 0.9
    N8 T16384 C2 O64 K8 S4                 padded 1.0  shifts 1.0
    N8 T16384 C1 O64 K12 S4                matmuls 2.4  padded 1.0
    N8 T16384 C1 O16 K16 S4                matmuls 1.6  padded 1.0
    =====================================  ====================================
    """
    K = spec.kernel_size
    few_taps = K <= (FEW if o > 2 else 2 * FEW)
    if o <= 8 and c >= 32 and few_taps and bytes_held("scatter", problem) <= 4 * MOST:
        return "scatter"
    if not bfloat16_pays(problem, spec, c, o):
        few = "matmuls" if c == 1 else "shifts"
        most = 15 if o >= 64 else 16  # as in `forward`
        narrow = (c <= 2 and K * c <= most) or (max(c, o) <= 12 and K * c <= 40)
        return few if narrow else None
    if c <= 2:
        return "shifts" if K * c <= 16 else None
    if fast_bfloat16(problem) and max(c, o) <= 12 and K * c <= 40:
        return "shifts" if K * c <= 20 else "im2col"
    # What the matmul reads; it is not taken in pieces.
    windows = problem.N * bytes_held("im2col", problem)
    return "im2col" if min(c, o) >= 16 and windows <= 2**24 else None


def _spread(problem: Problem, spec: ConvSpec, c: int, o: int) -> str | None:
    """Of one group and a dilated input: a strided layer's input gradient, or a transposed layer.

    None where nothing is faster than stock, of which all but each S-th product is with zero.
    Measured as `xla_cpu_kernel_grad._strided`, input gradient, and where there are two figures as
    the last of `forward`:

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

    Of a forward pass whose input has a dilation, of cores that share a cache, in
    ``formulations-transposed.json``:

    ==========================  ============================================================
    N1 T32 C512 O256 K16 E8     padded 1.0  scatter 0.8  depth_to_space 0.8
    N4 T32 C512 O256 K16 E8     depth_to_space_im2col 1.1  depth_to_space 1.0  scatter 0.9
    N16 T32 C512 O256 K16 E8    depth_to_space_winograd 1.2  depth_to_space 1.2  scatter 0.9
    N1 T128 C512 O256 K16 E8    padded 1.0  depth_to_space 1.0  scatter 0.8
    N4 T2048 C128 O64 K4 E2     depth_to_space_winograd 1.3  depth_to_space 1.2  scatter 1.1
    N4 T4096 C64 O32 K4 E2      depth_to_space 1.2  scatter 1.2
    N8 T3999 C512 O1 K16 E8     scatter 1.3  padded 1.0
    N4 T1000 C64 O64 K4 E2      depth_to_space_winograd 1.3  depth_to_space 1.2  scatter 1.1
    N4 T500 C128 O128 K10 E5    depth_to_space_winograd 1.6  depth_to_space 1.4  scatter 1.1
    N1 T64 C128 O128 K8 E4      scatter 1.2  depth_to_space 1.0
    ==========================  ============================================================

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
    held = bytes_held("scatter", problem) <= MOST
    scatters = "scatter" if spec.stride == 1 and K <= FEW and held else None
    if spec.kernel_dilation > 1 or spec.stride > 1:
        # Such a matmul of one channel only writes down what it holds.
        return "shifts" if scatters and c == 1 and K * o > 256 else scatters
    if is_bfloat16(problem):
        if held and (K <= 8 or (o <= 2 and c >= 32 and K <= 2 * FEW)):
            return "scatter"
        # What the matmul reads; it is not taken in pieces.
        windows = 2 * problem.N * (spec.out_time // S) * (K // S + 1) * c
        return "depth_to_space_im2col" if windows <= 2**26 else "depth_to_space"
    if not is_float32(problem):
        return scatters
    if c == 1 and o >= 32 and K <= 2 * FEW:
        return "matmuls"
    if o < 8 and (K % S or S * o < 16 or K <= 5):  # rows too short, or more to add to them
        return "scatter" if o <= 2 and held and K <= 2 * FEW else scatters
    rows = problem.N * spec.time
    little = problem.N * spec.out_time * max(c, S * o) <= 2**22 * S
    # Of more whole rows its rounding errors are more than twice those of stock.
    filters = o >= 64 and little and sound("depth_to_space_winograd", problem)
    if scatters and K <= 5:
        much = problem.N * bytes_held("scatter", problem) > WHOLE
        return "depth_to_space" if much or (K % S == 0 and c > o) else scatters
    if rows <= 128:
        return None
    return "depth_to_space_winograd" if filters and rows >= 512 else "depth_to_space"


def _scatters(problem: Problem, spec: ConvSpec, c: int, o: int) -> bool:
    """Whether of bfloat16 "scatter" is faster than "im2col"; what it holds is twice as wide."""
    tiny = problem.N * bytes_held("scatter", problem) <= 2**20
    worth = c >= 32 or (c >= 20 and spec.kernel_size >= 5) or tiny
    rows = o < 64 or spec.time >= 512  # for a matmul with as many columns as all taps have
    sees = spec.span <= spec.time  # else many of its products are of taps that see only padding
    return o <= c and worth and rows and sees and bytes_held("scatter", problem) <= MOST
