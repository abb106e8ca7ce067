"""The formulation of all of time for a kernel gradient on a CPU."""

import dataclasses

from conv_pallas.kernels.xla_cpu_bounds import (
    AT_ONCE,
    FEW,
    MOST,
    WHOLE,
    bytes_held,
    fast_bfloat16,
    filtering_pays,
    holds_little,
    is_bfloat16,
    is_float32,
    of_group,
    pieces_hold,
    sound,
)
from conv_pallas.kernels.xla_pieces import UNROLLED
from conv_pallas.spec import Problem


def kernel_grad(problem: Problem) -> str:
    """Kernel gradient.

    Measured as in `xla_cpu_forward.forward`, and where there are two figures as the last of those.

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

    Of layers drawn at random (``formulations-drawn-1.json`` to ``-3``):

    =============================  =============================================
    N4 T807 C12 O12 K3 D2          canonical 1.5  padded 1.0  winograd 0.9
    N8 T188 C25 O25 K2 D64         canonical 1.8  parts 1.2  matmuls 1.2
    N16 T4300 C4 O512 K3 D32 SAME  im2col 6.5  matmuls 3.6  native 1.0
    N32 T4179 C80 O25 K4 S2 SAME   im2col 2.3  native 1.0  canonical 1.0
    N8 T112 C384 O32 K3 S2         im2col 1.9  canonical 1.5  space_to_depth 1.0
    =============================  =============================================

    On an Intel processor (``formulations-intel.json``, ``-few`` and ``-narrow``):

    =============================  =========================
    N4 T2000 C4 O512 K9 D16        im2col 2.4  canonical 1.5
    N4 T2000 C4 O128 K12           im2col 1.2  canonical 1.0
    N4 T2000 C2 O64 K16            canonical 0.9  im2col 0.7
    N4 T4096 C2 O64 K8             canonical 1.0  im2col 0.8
    N4 T4096 C2 O128 K8            im2col 1.8  canonical 0.9
    N4 T4096 C4 O64 K4             canonical 1.1  im2col 0.9
    N4 T4096 C4 O64 K8             canonical 0.8  im2col 0.6
    N4 T4096 C1 O64 K16            im2col 1.0  canonical 0.9
    N16 T8192 C1 O128 K16          im2col 3.4  canonical 1.2
    N4 T4096 C1 O256 K24           im2col 1.7  canonical 0.9
    N4 T4096 C4 O512 K16           im2col 2.0  canonical 1.0
    =============================  =========================

    "native" is the same program as "canonical" outside of loops.
    """
    spec, c, _ = of_group(problem)
    K, G = spec.kernel_size, spec.groups
    causal = spec.input_dilation == 1 and spec.padding == (spec.span - 1, 0)
    if G > 1:
        if K > UNROLLED and c > 1:
            problem = dataclasses.replace(problem, spec=spec.of_taps(range(AT_ONCE)))
        return _grouped(problem)
    if K > UNROLLED:
        return "padded" if causal else "canonical"
    if K == 1 and spec.stride == spec.input_dilation == 1:
        return "matmuls"
    steps = problem.N * spec.out_time
    columns = steps * K * c  # what im2col holds
    if problem.C * problem.O <= 4 and K <= 4 and spec.stride == 1 and steps >= 2**13:
        return "tree"
    # With so many taps and channels the convolution fills its vectors, which few outputs share.
    fills = is_float32(problem) and K * c >= 16 and problem.O < 128
    few = c == 1 or (c <= 4 and problem.O >= 16 * c and not fills)
    # To so many outputs that a few taps more still pay.
    longest = 24 if problem.O >= 128 * c else 12 if problem.O >= 32 * c and not fills else 0
    most = 2**16 if spec.stride == 1 else 2**17
    if columns <= most or (K <= 8 and (steps <= 128 or few)) or (c <= 4 and K <= longest):
        return "im2col"
    if spec.stride > 1:
        return _strided(problem)
    wide = max(problem.C, problem.O) >= 32 and min(problem.C, problem.O) >= 16
    if fast_bfloat16(problem) and K <= 8 and wide and pieces_hold("im2col", problem, spec):
        return "im2col"
    if _filters(problem):
        return "winograd"
    # Padded, no product has to be looked at. It pays for few steps, or for many taps.
    few = 5 * 2**10 if problem.N == 1 else 2**11 if problem.N <= 4 else 0
    pays = steps <= few or K > FEW
    return "padded" if spec.input_dilation == 1 and pays else "canonical"


def _strided(problem: Problem) -> str:
    """Of one group.

    Measured as in `xla_cpu_forward.forward`, but in ``formulations-strided.json`` and ``-more``:

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

    And on an Intel processor (``formulations-intel.json``):

    =====================================  ==========================
    N16 T5087 C10 O10 K5 S2 bfloat16 SAME  canonical 1.1  im2col 0.8
    N8 T868 C4 O4 K31 S4 bfloat16          canonical 1.0  im2col 0.5
    N8 T1000 C24 O24 K9 S2 bfloat16        im2col 1.1  canonical 1.1
    =====================================  ==========================

    XLA's convolution has the N samples for its channels, and is good at eight and more of them.
    """
    spec, K, N = problem.spec, problem.spec.kernel_size, problem.N
    taps, plain = -(-K // spec.stride), spec.kernel_dilation == spec.input_dilation == 1
    held = bytes_held("im2col", problem)
    if is_bfloat16(problem):
        few = 1 < min(problem.C, problem.O) and max(problem.C, problem.O) <= (
            16 if spec.stride == 2 else 10
        )
        if few and plain and N >= 8 and fast_bfloat16(problem):
            return "canonical"
        fits = held <= (WHOLE if plain else 2**26) and (problem.O > 1 or N * held <= WHOLE)
        many = plain and N >= 8 and K > 8
        if fits and (fast_bfloat16(problem) or not many):
            return "im2col"
        return "space_to_depth" if plain else "canonical"
    if not plain or not is_float32(problem):
        if K <= FEW and held <= WHOLE:
            return "im2col"
        return "matmuls" if K <= FEW and N == 1 and is_float32(problem) else "canonical"
    wide = min(spec.stride * problem.C, problem.O)
    little = N * spec.out_time * max(spec.stride * problem.C, problem.O) <= 2**22
    # Of more pairs of rows it would copy the steps that they see, side by side.
    filters = little and sound("space_to_depth_winograd", problem)
    if K <= 3 and N < 8:
        return "im2col"
    if N >= 8 and spec.stride < K <= 4 and max(problem.C, problem.O) > 64:
        return "im2col"
    if N >= 8:
        return "space_to_depth_winograd" if filters and taps == 2 and wide >= 128 else "canonical"
    if filters and min(problem.C, problem.O) >= 64:
        return "space_to_depth_winograd"
    return "im2col" if K <= 5 or taps <= 2 else "space_to_depth"


def _grouped(problem: Problem) -> str:
    """Of more than one group. Measured as in `kernel_grad`, of layers drawn at random.

    =========================================  =========================================
    N1 T187 C64 O64 K7 G8                      im2col 16  matmuls 14  tree 11
    N2 T91 C64 O64 K15 D2 G8 SAME              im2col 11  matmuls 9.3  split 5.4
    N1 T272 C96 O96 K15 G2                     im2col 4842  matmuls 3541  split 2054
    N1 T1708 C256 O256 K3 D64 G8 SAME          im2col 22  matmuls 14  split 13
    N8 T224 C64 O64 K2 D32 G8                  im2col 7.4  matmuls 5.7  tree 4.9
    N2 T868 C192 O192 K7 D128 G8 SAME          split 16  im2col 13  matmuls 11
    N32 T179 C80 O80 K5 D8 G4 SAME             split 3.3  matmuls 1.3  im2col 1.1
    N16 T3225 C80 O80 K3 S4 G4 SAME            matmuls 2.0  im2col 1.8  tree 1.5
    N8 T101 C256 O256 K5 D16 G2 bfloat16 SAME  im2col 3.0  split 2.0  matmuls 1.9
    N16 T1762 C48 O48 K7 D16 G8 bfloat16 SAME  split 6.2  tree 2.9  matmuls 2.4
    N32 T497 C8 O8 K9 D4 G8                    split 1.5  channel_blocks 1.4  padded 1.0
    N8 T1887 C192 O192 K7 S2 G192              channel_blocks 4.5  shifts 1.9  tree 1.1
    N8 T1623 C192 O192 K7 G192                 tree 8.3  channel_blocks 6.3  padded 1.0
    =========================================  =========================================

    On an Intel processor (``formulations-intel.json`` and ``-few``):

    ==========================  =======================================
    N8 T1000 C4 O4 K7 G4        channel_blocks 1.1  split 1.0
    N8 T1000 C8 O8 K9 G8        split 1.8  tree 1.3  channel_blocks 1.1
    N8 T1000 C8 O8 K31 G8       channel_blocks 4.4  split 2.3
    N8 T1000 C12 O12 K9 G12     channel_blocks 2.3  split 1.7  tree 1.1
    N8 T1000 C24 O24 K9 G24     tree 3.3  split 2.2  channel_blocks 2.1
    N8 T1000 C256 O256 K9 G256  channel_blocks 9.6  tree 5.9
    ==========================  =======================================
    """
    spec, c, _ = of_group(problem)
    K, G = spec.kernel_size, spec.groups
    if c == 1:
        if spec.stride == 1:
            least = 9 if G >= 8 else 7
            if G < 12 and problem.O == G and least <= K <= FEW:
                return "split"
            many = K >= (9 if G < 16 or G >= 64 else 12)
        else:
            many = K >= (5 if spec.stride == 2 else 7 if G < 16 else 12)
        # Each of its pieces copies what it sees of x, D (K - 1) steps more than its own.
        blocks = many and spec.kernel_dilation <= 8 and spec.input_dilation == 1
        return "channel_blocks" if blocks else "tree"
    # It holds K / S copies of x. With a stride it is twice as slow as "split" from 20 MB on.
    held = problem.N * G * bytes_held("im2col", problem)
    steps = problem.N * spec.out_time
    few = G > 2 and c >= 8 and steps <= 2**11
    fits = spec.stride > 1 or fast_bfloat16(problem) or few or (problem.N == 1 and c >= 32)
    most = 2**24 if spec.stride > 1 else WHOLE
    if K <= (FEW if few or problem.N == 1 else 8) and held <= most and fits:
        return "im2col"
    if G > 32 and K * c <= 20:
        return "tree"
    # 64 convolutions take 2.5 s to compile, so only where one run takes half a second without.
    if G > 64 or (G > 32 and holds_little(problem)):
        return "im2col" if K <= 8 and holds_little(problem) else "matmuls"
    return "matmuls" if problem.N == 1 and c >= 64 else "split"


def many(problem: Problem) -> str | None:
    """The formulation that a batch of kernels is mapped by, or None for groups.

    Kernel gradients alone, as each example of a batch has its own: convolutions of groups are slow
    at them, batched matmuls are not.
    """
    spec, c, _ = of_group(problem)
    if problem.operation != "conv1d_kernel_grad" or c == 1 or spec.kernel_size > FEW:
        return None
    return "matmuls" if spec.groups == 1 or spec.kernel_size <= 4 else None


def _filters(problem: Problem) -> bool:
    """As `filtering_pays`, of few taps: their pairs of steps lie side by side in memory.

    A tap that sees next to nothing but padding would get, from what its neighbours see, what is
    rounding to them.
    """
    spec, c, o = problem.spec, problem.C, problem.O
    every_step = spec.stride == spec.input_dilation == 1
    few = spec.kernel_size == 3 or (spec.kernel_size == 5 and min(c, o) >= 256)
    pieces = problem.N == 1 or bytes_held("winograd", problem) <= MOST
    fits = every_step and few and pieces and sound("winograd", problem)
    return fits and filtering_pays(problem, spec, c, o)
