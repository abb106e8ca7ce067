"""The formulation of all of time for groups on a CPU: forward pass and input gradient."""

from conv_pallas.kernels.xla_cpu_bounds import (
    CHANNEL_BLOCKS,
    FEW,
    PADS,
    WHOLE,
    bytes_held,
    fast_bfloat16,
    holds_little,
    is_bfloat16,
    of_group,
    pads_cost,
    processor_has_avx512,
)
from conv_pallas.kernels.xla_pieces import UNROLLED
from conv_pallas.spec import ConvSpec, Problem


def grouped(problem: Problem) -> str | None:
    """Of more than one group; None where nothing is faster than stock.

    Measured as in `xla_cpu_forward.forward`, of layers drawn at random (``formulations-drawn-1``
    to ``-4``), the last two on an Intel processor with the same vectors (``formulations-intel``):

    =========================================  =======================  =========================
    N16 T2973 C64 O64 K3 S4 G8 SAME            shifts 3.4  split 1.9    depth_to_space_im2col 5.7
    N1 T3513 C384 O384 K3 S4 G2                native 1.0  padded 1.0   depth_to_space_im2col 3.2
    N16 T2463 C48 O48 K5 S2 G4 SAME            split 1.8  matmuls 1.2   depth_to_space_im2col 2.9
    N16 T1988 C192 O192 K3 S4 G8               padded 1.0  native 1.0   depth_to_space_im2col 3.3
    N1 T7942 C384 O384 K3 G8 SAME              split 2.0  native 1.0    split 2.0  native 1.0
    N2 T91 C64 O64 K15 D2 G8 SAME              scatter 1.3  blocks 1.2  scatter 1.2  blocks 1.1
    N1 T179 C192 O192 K5 D32 G8 SAME           native 1.0  padded 1.0   scatter 1.1  native 1.0
    N2 T3332 C64 O64 K4 G4                     split 1.5  blocks 1.3    split 1.5  blocks 1.3
    N16 T73 C256 O256 K4 G2 SAME               split 1.2  scatter 1.0   split 1.2  scatter 1.0
    N8 T101 C256 O256 K5 D16 G2 bfloat16 SAME  im2col 1.7  matmuls 1.6  im2col 1.6  matmuls 1.5
    N16 T79 C96 O96 K3 G2 bfloat16             scatter 1.2  split 1.2   split 1.2  scatter 1.1
    N2 T400 C384 O384 K3 S4 G4 bfloat16        matmuls 2.5  split 1.3   depth_to_space_im2col 3.6
    N8 T500 C256 O256 K5 S2 G8 bfloat16 SAME   split 1.4  matmuls 1.1   depth_to_space_im2col 1.8
    =========================================  =======================  =========================
    """
    spec, c, o = of_group(problem)
    N, G, K = problem.N, spec.groups, spec.kernel_size
    every_step = spec.stride == spec.input_dilation == 1
    narrow = problem.out_dtype.itemsize < 4
    if c == 1:
        return depthwise(problem, spec, o)
    if spec.input_dilation > 1 and _phases(problem, spec, c):
        return "depth_to_space_im2col"
    fast = fast_bfloat16(problem)
    few = c <= (16 if fast else 8)
    if is_bfloat16(problem) and few and o > 1 and every_step and holds_little(problem):
        return "im2col" if K <= 4 else "blocks"
    moved = "im2col" if spec.stride > 1 else "scatter"
    if narrow and 2 < c <= 8 and o > 1 and K <= FEW and holds_little(problem, moved):
        return moved  # multiply-adds widen every number anew for each of their products
    if c <= 8 and K * c <= 64:
        return "shifts"
    if problem.depthwise and c <= 8 and K <= CHANNEL_BLOCKS:
        return "channel_blocks"
    if c <= 8 and K > FEW and every_step and holds_little(problem):
        return "blocks"
    if c <= 8 and K <= FEW and every_step and holds_little(problem, "scatter"):
        return "scatter"
    alone = N == 1 and max(c, o) <= 64 and G * bytes_held("scatter", problem) <= WHOLE
    if K <= 4 and every_step and ((max(c, o) < 16 and not narrow) or G > 32 or alone):
        return "scatter"
    if fast and G == 2 and c >= 64 and every_step and holds_little(problem):
        return "im2col"
    if fast and spec.stride > 1 and c >= 16 and G <= 32:
        return "matmuls" if K <= 8 and N * spec.out_time <= 2**10 else "split"
    if G <= 32:
        # So many small programs for so little; and what a stride leaves out, stock does as well.
        little = G > 2 and c < 64 and N * spec.time < 256
        return None if little or (spec.stride > 2 and c >= 24) else "split"
    if spec.stride > 1:
        return "matmuls"
    scatters = spec.input_dilation > 1 and K <= FEW
    return "scatter" if scatters and holds_little(problem, "scatter") else None


def depthwise(problem: Problem, spec: ConvSpec, o: int) -> str:
    """Of one channel to a group, of which o are made.

    Of many taps, measured as in `xla_cpu_forward.forward`:

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

    And of layers drawn at random, as in `grouped`:

    ======================================  =========================  =========================
    N32 T738 C8 O8 K3 G8                    matmuls 31  shifts 30      matmuls 34  shifts 32
    N32 T4597 C4 O4 K7 G4 SAME              channel_blocks 55          channel_blocks 52
    N32 T497 C8 O8 K9 D4 G8                 channel_blocks 43          matmuls 39
    N16 T3094 C20 O20 K31 D128 G20          matmuls 40                 matmuls 37  own_pads 23
    N2 T2232 C256 O256 K31 G256 SAME        channel_blocks 48          channel_blocks 50
    N1 T614 C384 O384 K31 D2 G384 SAME      channel_blocks 76          channel_blocks 74
    N2 T1600 C384 O384 K3 S4 G384           scatter 63  own_pads 59    depth_to_space_im2col 246
    N32 T159 C192 O192 K3 S4 G192 bfloat16  scatter 52  own_pads 39    depth_to_space_im2col 195
    N8 T1887 C192 O192 K7 S2 G192           own_pads 98  scatter 85    own_pads 127  scatter 117
    N16 T1117 C256 O256 K3 G256 bfloat16    scatter 314  own_pads 281  scatter 236  own_pads 228
    N8 T2276 C32 O32 K15 D2 G32 bfloat16    channel_blocks 74          channel_blocks 77
    N16 T2000 C16 O16 K31 G16 bfloat16      channel_blocks 34          channel_blocks 34
    ======================================  =========================  =========================

    On an Intel processor (``formulations-intel.json`` and ``-few``):

    =======================================  ========================  ========================
    N8 T1000 C8 O8 K9 G8 bfloat16            matmuls 20  own_pads 4.6  matmuls 20  own_pads 3.9
    N4 T1000 C12 O12 K9 G12 bfloat16         channel_blocks 8.8        channel_blocks 10
    N4 T1000 C256 O256 K11 D2 G256 bfloat16  own_pads 71  matmuls 62   matmuls 68  own_pads 58
    =======================================  ========================  ========================
    """
    N, G, K = problem.N, spec.groups, spec.kernel_size
    narrow = problem.out_dtype.itemsize < 4
    every_step = spec.stride == spec.input_dilation == 1
    if PADS < K <= CHANNEL_BLOCKS or (28 < K <= UNROLLED and every_step and spec.time >= 600):
        return "channel_blocks"
    if K > UNROLLED:
        return "own_pads"
    if narrow and o == 1 and K > 8 and every_step:
        return "channel_blocks" if K >= 12 or (G < 16 and G % 8) else "matmuls"
    # So few channels do not fill a register.
    if o == 1 and G < (32 if K > 8 else 16) and not narrow and spec.input_dilation == 1:
        return "matmuls"
    if K > 8 and o == 1 and every_step and not narrow and _sums_at_once(problem, spec):
        return "scatter"
    in_memory = pads_cost(problem, spec)
    if K > 8 and not (narrow and o > 1):
        return "matmuls" if in_memory else "own_pads"
    E = spec.input_dilation
    # Phases of two taps and more each are slow: of that K7 S2, "depth_to_space_im2col" 13 times.
    if (1 if narrow else 2) < E and K < 2 * E and _phases(problem, spec, 1):
        return "depth_to_space_im2col"
    if narrow:
        return "matmuls" if in_memory or K > 8 else "scatter"
    if o == 1 and (K > 4 or N == 1 or G < 256):
        return "scatter"
    return "own_pads" if K <= 4 else "matmuls"


def _sums_at_once(problem: Problem, spec: ConvSpec) -> bool:
    """Whether float32 sums of 9 taps and more are ahead if they take all of them at once.

    LLVM seems to make loops apart for what sees padding at one end, not for both, nor of 16 taps.
    Measured as in `depthwise` (``formulations-intel-taps.json``):

    ===============================  ========================  ========================
    N4 T2000 C64 O64 K9 G64          scatter 73  own_pads 44   scatter 45  own_pads 27
    N8 T1000 C256 O256 K10 G256      scatter 53  own_pads 29   scatter 52  own_pads 42
    N4 T1000 C256 O256 K14 G256      scatter 62  own_pads 37   scatter 42  own_pads 30
    N4 T1000 C256 O256 K9 G256 SAME  own_pads 33  scatter 7.0  own_pads 29  scatter 12
    N1 T2000 C512 O512 K9 D4 G512    scatter 104  own_pads 80  scatter 102  own_pads 83
    N4 T1000 C64 O64 K16 G64         own_pads 26  scatter 3.8  own_pads 25  scatter 3.2
    ===============================  ========================  ========================

    With AVX2 alone (``formulations-intel-as-avx2.json``) "scatter" was 1.5 to 2.6 times as fast as
    "own_pads" in three forward passes, whose padding is before the first step, and 0.7 to 0.9 times
    in their input gradients, whose is behind the last.
    """
    before, behind = (zeros > 0 for zeros in spec.padding)
    one_end = not behind or (not before and processor_has_avx512(problem))
    return one_end and spec.kernel_size <= 14


def _phases(problem: Problem, spec: ConvSpec, c: int) -> bool:
    """Whether groups of a dilated input become one convolution for each phase."""
    plain = spec.kernel_dilation == spec.stride == 1
    S = spec.input_dilation
    windows = problem.N * (spec.out_time // S) * (spec.kernel_size // S + 1) * c * spec.groups
    return plain and spec.kernel_size <= FEW and windows <= 2**25
