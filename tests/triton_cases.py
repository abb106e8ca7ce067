"""Which cases the interpreter runs: it takes a second for each, so the telling ones.

`python -m benchmarks.on_device` runs every case of `tests.cases` on the chip itself.
"""

import contextlib

from tests import cases
from tests.cases import Case
from tests.triton_epilogue import FUSED, Fused

# What only tiles can get wrong: several tiles with remainders on every axis.
EXTRA = (
    Case("tiles_ragged", T=150, C=72, O=136, D=7, batch=(2,), dtype="bfloat16"),
    Case("tiles_grouped", T=140, C=64, O=96, G=2, K=2, D=33, batch=(1,), dtype="float16"),
    # Of groups that end where a tile of channels does, the engine fetches both factors' tiles.
    Case("tiles_grouped_whole", T=70, C=32, O=64, G=2, K=2, D=3, dtype="float16"),
    Case("tiles_strided", T=141, C=40, O=20, S=2, D=3, batch=(1,), dtype="bfloat16"),
    Case("tiles_same", T=131, C=33, O=70, D=5, padding="SAME", batch=(1,)),
    # Tiles that end at the first step of x under a tap, or begin at its last.
    Case("edges", T=17, C=16, O=16, K=4, D=16, padding=[(31, 32)]),
    Case("edges_end", T=17, C=16, O=16, K=4, D=16, padding=[(32, 31)]),
    Case("edges_many", T=33, C=16, O=16, K=17, D=2, padding=[(63, 0)]),
    # Tiles that see padding alone, before x and after it.
    Case("edges_beyond", T=9, C=12, O=20, D=2, padding=[(300, 150)], dtype="bfloat16"),
    # Long tiles, too, have neighbours: of up to a thousand steps.
    Case("tiles_of_time", T=2100, C=8, O=8, D=2, batch=(2,)),
    Case("tiles_of_time_depthwise", T=2100, C=8, O=8, G=8, K=4, D=3, batch=(2,)),
    Case("tiles_depthwise", T=300, C=200, O=200, G=200, K=4, D=3, batch=(2,), dtype="bfloat16"),
    Case("walked_two", T=45, C=20, O=20, G=20, K=2, D=3, padding="SAME", dtype="bfloat16"),
    Case("tiles_multiplier", T=70, C=40, O=120, G=40, K=7, D=2, batch=(2,)),
    Case("tiles_multiplier_few_taps", T=70, C=40, O=120, G=40, K=4, D=2, batch=(2,)),
    # Many taps: 16 outputs at a time, and up to 17 taps of the kernel gradient.
    Case("taps_same", T=40, C=72, O=72, G=72, K=33, padding="SAME", batch=(3,), dtype="bfloat16"),
    Case("taps_dilated", T=61, C=10, O=10, G=10, K=19, D=3, batch=(3,)),
    Case("taps_halo", T=13, C=16, O=16, G=16, K=87, padding="SAME", dtype="float16"),
    Case("taps_pad", T=45, C=20, O=20, G=20, K=16, D=2, padding=[(7, 40)]),
    Case("taps_crop", T=45, C=8, O=8, G=8, K=9, padding=[(-5, -3)], dtype="bfloat16"),
    Case("taps_tuned", T=80, C=24, O=24, G=24, K=23, D=2, batch=(3,), dtype="bfloat16"),
    # A kernel gradient's sum of several samples in four programs, each of many steps.
    Case("summed", T=350, C=24, O=40, D=7, batch=(3,), dtype="bfloat16"),
    Case("summed_ragged", T=350, C=20, O=30, K=2, D=33, batch=(3,)),
    # Three taps in a program, fewer in the last; tiles of padding alone under some of them.
    Case("several", T=150, C=15, O=13, K=7, D=9, batch=(2,)),
    Case("several_tail", T=150, C=16, O=16, K=5, D=3, padding=[(0, 14)], dtype="bfloat16"),
    Case("several_beyond", T=40, C=10, O=24, K=4, D=16, padding=[(90, 70)], dtype="float16"),
    Case("several_grouped", T=70, C=48, O=24, G=3, K=2, D=33, padding="SAME"),
    Case("several_strided", T=70, C=10, O=20, K=4, S=2, D=3),
    # A halo that no cache holds, by its name.
    Case("time_first_strided", T=170, C=40, O=40, G=40, K=4, S=2, D=3, batch=(2,)),
    Case("time_first_multiplier", T=170, C=40, O=120, G=40, K=7, D=2, batch=(2,)),
    # Several tiles for each program that stays; a chip runs more of those than the interpreter.
    Case("resident", T=192, C=40, O=24, D=7, batch=(3,), dtype="bfloat16"),
    Case("resident_ragged", T=150, C=64, O=64, K=2, D=33, batch=(2,), dtype="float16"),
    Case("resident_end", T=150, C=24, O=40, D=5, padding=[(0, 10)], batch=(2,), dtype="bfloat16"),
    Case("resident_wide", T=150, C=72, O=136, D=7, batch=(3,), dtype="bfloat16"),
    # Rows of one factor that the engine can't fetch.
    Case("resident_addressed", T=128, C=24, O=20, D=7, dtype="bfloat16"),
    Case("resident_addressed_in", T=128, C=20, O=24, D=7, dtype="bfloat16"),
    Case("resident_strided", T=64, C=16, O=16, S=2, E=2, padding=[(2, 0)], dtype="bfloat16"),
    # What stride, dilation and input dilation have in common, and a hop.
    Case("phases_common", T=19, C=12, O=20, K=7, S=4, D=9, E=6, padding=[(7, 30)], batch=(2,)),
    # A tap is found by a product beyond 32 bits, forward and backward.
    Case("phases_far", T=5, C=12, O=20, S=65537, E=65537, D=40503, padding=[(40503, 40503)]),
    Case("phases_hop", T=110, C=5, O=6, K=50, S=40, padding=[(11, 30)]),
    Case("resident_long", T=4096, C=16, O=24, D=64, batch=(8,), dtype="bfloat16"),
)


def _packed(name: str, activation: str | None = "silu", wanted=(True, True, True), **kwargs):
    """A layer that is told which taps each output sees; depthwise where nothing is said."""
    bias = kwargs.pop("bias", True)
    case = Case(f"packed{name}", **dict(T=41, C=24, O=24, G=24, K=4) | kwargs)
    return Fused(case, activation, bias, wanted)


PACKED = (
    _packed(""),
    _packed("_dilated", T=70, D=3, dtype="bfloat16"),
    _packed("_same", "gelu", K=5, D=2, padding="SAME"),
    _packed("_pad", "relu", K=2, D=3, padding=[(7, 20)], dtype="bfloat16"),
    _packed("_crop", D=3, padding=[(-5, -3)]),
    _packed("_alone", None, K=1),
    _packed("_eight", "tanh", T=70, K=8, dtype="bfloat16"),
    # Several programs and pieces of each tile; and a piece that is a series.
    _packed("_wide", T=150, C=136, O=136, G=136, D=3, dtype="bfloat16"),
    _packed("_whole", T=250, D=64),
    _packed("_whole_crop", T=250, D=32, K=2, padding=[(0, -130)], dtype="bfloat16"),
    # Each program has several tiles, of several samples.
    _packed("_walked_onward", T=61, D=3, batch=(3,)),
    # And each piece several groups of steps that are loaded at a time, forward as well.
    _packed("_groups", T=130, D=2, batch=(1,)),
    _packed("_walked_onward_whole", None, T=250, D=64, dtype="bfloat16"),
    _packed("", bias=False),
    _packed("", None, bias=False, D=3),
    _packed("", wanted=(True, False, False), D=3),
    _packed("", wanted=(False, True, True), D=3),
    _packed("", None, wanted=(False, False, True)),
    # Many taps: several pieces and tiles, ragged channels, all bits of a word.
    _packed("_taps", None, K=9, T=45, C=20, O=20, G=20),
    _packed("_taps_dilated", None, K=17, T=40, D=3, C=10, O=10, G=10, bias=False),
    _packed("_taps_all", "gelu", K=31, T=36, C=72, O=72, G=72, padding="SAME", dtype="bfloat16"),
    _packed("_taps_pad", "relu", K=16, T=30, D=2, padding=[(7, 40)], dtype="bfloat16"),
    _packed("_taps_crop", "tanh", K=9, T=45, padding=[(-5, -3)], bias=False),
    _packed("_taps_tuned", K=23, T=43, D=2, dtype="bfloat16"),
    _packed("_taps", K=9, wanted=(True, False, False)),
    _packed("_taps", "sigmoid", K=11, wanted=(False, True, True)),
    _packed("_taps", None, K=9, wanted=(False, False, True)),
    # Dense and grouped: several tiles on every axis, dilations and paddings.
    _packed("_dense", G=1, O=40, K=3, D=5),
    _packed(
        "_dense_tiles", "relu", G=1, T=150, C=72, O=136, K=3, D=7, batch=(2,), dtype="bfloat16"
    ),
    _packed("_dense_same", None, G=1, C=33, O=20, K=5, D=2, padding="SAME"),
    _packed("_dense_pad", "tanh", G=1, K=2, D=3, padding=[(7, -4)], dtype="float16"),
    _packed("_dense_taps", None, G=1, K=31, T=36, C=10, O=15, padding="SAME"),
    _packed("_dense_several", None, G=1, K=7, T=150, C=15, O=13, D=9, batch=(2,)),
    _packed("_dense_summed", None, G=1, C=20, O=12, K=3, D=40, T=150, batch=(3,)),
    _packed("_grouped", "gelu", G=2, T=70, C=48, O=32, D=3, dtype="bfloat16"),
    _packed("_few_in_groups", None, G=6, T=45, O=12, K=9, padding="SAME"),
    _packed("_dense", None, G=1, bias=False),
    _packed("_dense", G=1, O=40, wanted=(True, False, False)),
    _packed("_dense", None, G=1, O=40, wanted=(False, True, True)),
    _packed("_dense", "silu", G=1, O=40, wanted=(False, False, True)),
)

# The heuristic picks programs that stay for more steps than the interpreter has time for, and none
# with several tiles of taps, nor with several taps of one.
OWN = {
    "resident": (64, 64, 64, 4, 3, 1), "taps_tuned": (4, 16, 5, 1), "walked_onward": (2, 16, 8, 2),
    "several": (16, 16, 16, 1, 3, 0, 3), "packed_groups": (2, 16, 24, 1),
}  # fmt: skip

NAMES = (
    *(fused.name for fused in (*FUSED, *PACKED)),
    "unmet_dense", "unmet_dense_several", "unmet_depthwise", "unmet_taps", "unmet_groups", "unread",
    "padding", "rounding", "extremes", "slopes", "far_dense", "far_resident", "far_strided",
    "far_walked", "far_taps", "far_wide", "far_hop",
    *(case.name for case in EXTRA if case.name != "resident_long"),
    "dense", "wide", "ragged", "grouped", "grouped_narrowing", "depthwise", "depthwise_dilated",
    "multiplier", "depthwise_of_one", "pointwise_dilated", "many_taps",
    "time_shorter_than_field", "time_shorter_than_dilation", "one_step_same",
    "stride_grouped", "stride_depthwise", "stride_remainder", "input_dilation_stride",
    "input_dilation_depthwise", "input_dilation_short", "input_dilation_crop",
    "input_dilation_unmet", "input_dilation_unmet_pointwise",
    "same_lower", "pad_beyond_field", "crop_both", "crop_depthwise",
    "dense_bfloat16_float32", "depthwise_bfloat16_float32", "grouped_highest", "dense_high",
    "long_dense_bfloat16", "long_depthwise_float16",
)  # fmt: skip


def own_tile(name: str) -> contextlib.AbstractContextManager:
    """Within it the kernels get the tile that a case of that name is about, if it is about one."""
    tile = next((tile for about, tile in OWN.items() if about in name), None)
    if tile is None:
        return contextlib.nullcontext()
    from conv_pallas.kernels import triton_tuned

    return triton_tuned.trial(tile)


def named(name: str) -> Case:
    for case in EXTRA:
        if case.name == name:
            return case
    return cases.named(name)
