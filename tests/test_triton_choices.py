"""What the Triton launchers decide before anything is compiled."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

pytest.importorskip("jax_triton")

from conv_pallas import _layers
from conv_pallas.kernels import triton_config, triton_dense, triton_depthwise, triton_tuned
from conv_pallas.kernels import triton_depthwise_walk as walk
from conv_pallas.kernels.triton_common import Phases, add_in_order, most_programs
from conv_pallas.kernels.triton_compat import PROCESSORS
from conv_pallas.spec import OPERATIONS, ConvSpec, Epilogue, lhs_rhs_out
from tests.cases import Case

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("shipped")]

WALKED, SLID, TILED = "steps in registers", "taps and steps in registers", "a tile for each tap"
DX, DW, BOTH = (True, False, False), (False, True, True), (True, True, True)


@pytest.fixture
def launches(monkeypatch):
    """Name, programs and result of all that is launched; nothing runs."""
    seen = []

    def call(kernel, *args, out, programs, **meta):
        seen.append((kernel.__name__, programs, out))
        return jax.tree.map(lambda o: np.zeros(o.shape, o.dtype), out)

    monkeypatch.setattr(triton_dense.triton_compat, "call", call)
    return seen


def _problem(case: Case, activation: str | None = None):
    epilogue = Epilogue(True, activation)
    return dataclasses.replace(case.problem("conv1d", "cuda"), epilogue=epilogue)


@pytest.mark.parametrize(
    "C, K, dtype, activation, wanted, expected",
    [
        (64, 3, "bfloat16", "relu", BOTH, True),
        (64, 3, "bfloat16", "silu", BOTH, False),  # computed for each tap by both kernels
        (64, 3, "float32", "silu", BOTH, True),  # twice the time to move an element
        (64, 3, "bfloat16", "silu", DX, True),
        (64, 3, "bfloat16", "silu", DW, True),
        (64, 9, "bfloat16", "silu", DW, False),
        (512, 3, "bfloat16", "relu", BOTH, False),  # the matmul is the bottleneck
    ],
)
def test_the_derivative_is_computed_where_less_is_moved(C, K, dtype, activation, wanted, expected):
    case = Case("layer", batch=(8,), T=4096, C=C, O=C, K=K, dtype=dtype)
    assert triton_dense.derivative_in_kernels(_problem(case, activation), wanted) is expected


@pytest.mark.parametrize(
    "kernel, sizes, pointers, capability, expected",
    [
        (triton_config.KERNEL_GRAD, (512, 512, 4096), False, 90, (64, 64, 1)),
        (triton_config.KERNEL_GRAD, (32, 32, 8192), False, 90, (32, 32, 1)),
        (triton_config.KERNEL_GRAD, (512, 512, 4096), False, 100, (128, 128, 8)),
        (triton_config.KERNEL_GRAD, (450, 450, 4096), True, 90, (128, 128, 8)),
        (triton_config.KERNEL_GRAD, (25, 30, 4096), True, 90, (32, 32, 1)),
        (triton_config.KERNEL_GRAD, (25, 40, 4096), True, 90, (32, 64, 4)),
        (triton_config.FORWARD, (4096, 25, 30), True, 90, (32, 32, 1)),
        (triton_config.FORWARD, (4096, 32, 32), False, 90, (128, 32, 2)),
        (triton_config.INPUT_GRAD, (4096, 32, 32), False, 90, (128, 32, 4)),
        (triton_config.FORWARD, (4096, 32, 32), False, 100, (128, 32, 4)),
        (triton_config.FORWARD, (4096, 25, 40), True, 90, (128, 32, 4)),
        (triton_config.FORWARD, (4096, 40, 25), True, 90, (128, 64, 4)),
        (triton_config.FORWARD, (4096, 450, 450), True, 90, (128, 128, 8)),
        (triton_config.FORWARD, (4096, 450, 450), True, 100, (128, 128, 8)),
        (triton_config.FORWARD, (4096, 450, 450), False, 90, (128, 128, 8)),  # w alone by pointers
    ],
)
def test_float32_is_multiplied_by_the_warps_that_do_it_fastest(
    kernel, sizes, pointers, capability, expected, monkeypatch
):
    """As measured on an H200, of values that are fetched by pointers or lie across the sum."""
    monkeypatch.setattr(triton_config.triton_compat, "compute_capability", lambda: capability)
    found = triton_config.configure(
        kernel, *sizes, taps=3, phases=Phases(1, 1, 1), count=512,
        dtype=np.dtype(np.float32), precision="tf32", tma=True, pointers=pointers,
        tight=any(n * 4 % 16 for n in sizes[:2]),
    )  # fmt: skip
    assert (found.rows, found.columns, found.warps) == expected


@pytest.mark.parametrize(
    "O, columns", [(256, 256), (257, 128), (384, 128), (385, 256), (512, 256), (640, 128)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_half_of_a_large_tile_lies_past_the_channels(O, columns, dtype):
    tile = functools.partial(
        triton_config.configure, taps=3, phases=Phases(1, 1, 1), dtype=np.dtype(dtype),
        precision="tf32", tma=True,
    )  # fmt: skip
    for kernel in (triton_config.FORWARD, triton_config.INPUT_GRAD):
        assert tile(kernel, 4096, O, 512, count=64).columns == columns
        assert tile(kernel, 80, O, 512, count=16).columns <= 128  # a processor for each


@pytest.mark.parametrize(
    "N, T, rows",
    [(8, 65536, 128), (2048, 16, 16), (4096, 3, 16), (1024, 130, 128), (2048, 96, 128)],
)
def test_programs_that_stay_on_their_processor_have_full_tiles(N, T, rows):
    case = Case("layer", batch=(N,), T=T, C=64, O=64)
    x, w = (jax.ShapeDtypeStruct(s, "bfloat16") for s in (case.x_shape, case.kernel_shape))
    plan = triton_dense._plan(x, w, case.spec, 64, out_dtype=np.dtype("bfloat16"), precision="tf32")
    assert plan.config.rows == rows
    assert (plan.config == triton_dense.FEW) is (T in (96, 65536))


@pytest.mark.parametrize(
    "C, O, G, fetched",
    [
        (64, 40, 1, (True, True)),
        (20, 40, 1, (False, True)),
        (64, 64, 2, (True, True)),
        (64, 40, 2, (True, False)),  # the second group's columns of w start between 16 bytes
    ],
)
def test_the_engine_fetches_rows_and_groups_of_whole_16_bytes(C, O, G, fetched):
    case = Case("layer", batch=(2,), T=64, C=C, O=O, G=G)
    x, w = (jax.ShapeDtypeStruct(s, "bfloat16") for s in (case.x_shape, case.kernel_shape))
    plan = triton_dense._plan(x, w, case.spec, O, out_dtype=np.dtype("bfloat16"), precision="tf32")
    assert (plan.tma_x, plan.tma_w) == fetched


@pytest.mark.parametrize(
    "C, O, K, tile, out_dtype, kernel, sums_stay",
    [
        (64, 64, 3, (64, 64, 64, 4, 3, 2), "bfloat16", "conv_resident", True),
        (64, 64, 3, (64, 64, 64, 4, 3, 2), "float32", "conv_resident", True),
        (64, 64, 4, (64, 64, 64, 4, 3, 2), "bfloat16", "conv_onward", False),
        (64, 64, 4, (64, 64, 64, 4, 3, 1), "bfloat16", "conv_resident", True),
        # in the next tile's way
        (64, 64, 4, (64, 64, 64, 4, 3, 2), "float32", "conv_dense", False),
        # With the sum for the bias there are more sums than registers,
        (64, 64, 3, (128, 64, 64, 4, 3, 1), "bfloat16", "conv_resident", False),
        (64, 64, 3, (128, 64, 64, 8, 3, 1), "bfloat16", "conv_resident", True),
        # and here of tiles more than fit.
        (64, 64, 3, (64, 64, 128, 4, 3, 1), "bfloat16", "conv_resident", True),
        (64, 64, 3, (64, 64, 128, 4, 4, 1), "bfloat16", "conv_onward", False),
        (64, 64, 3, (64, 64, 128, 4, 3, 2), "bfloat16", "conv_onward", False),
        (64, 64, 2, (128, 64, 128, 8, 3, 2), "bfloat16", "conv_dense", False),
        (64, 64, 9, (128, 256, 64, 8, 3, 1), "bfloat16", "conv_onward", False),
        # Nor is there room for what is under way to memory.
        (64, 64, 3, (64, 128, 64, 4, 2, 2), "float32", "conv_dense", False),
        (64, 64, 2, (128, 128, 64, 8, 3, 2), "bfloat16", "conv_dense", False),
        # Nor is a tile for all channels one that has some of them.
        (128, 64, 2, (64, 64, 128, 4, 2, 1), "bfloat16", "conv_resident", False),
        (64, 128, 3, (64, 64, 64, 4, 3, 1), "bfloat16", "conv_onward", False),
        (128, 64, 3, (128, 64, 64, 8, 2, 1), "bfloat16", "conv_onward", True),
    ],
)
def test_programs_stay_where_what_they_keep_has_room(
    C, O, K, tile, out_dtype, kernel, sums_stay, launches
):
    case = Case("layer", (8,), T=4096, C=C, O=O, K=K, dtype="bfloat16", out_dtype=out_dtype)
    shapes = (case.x_shape, case.kernel_shape, case.out_shape)
    x, w, g = (jax.ShapeDtypeStruct(shape, case.dtype) for shape in shapes)
    with triton_tuned.trial(tile):
        triton_dense.run(case.problem("conv1d", "cuda"), x, w)
        common = dict(out_dtype=x.dtype, precision="tf32")
        triton_dense.kernel_grad(x, g, case.spec, bias=True, **common)
    stay, dense = "conv_resident_kernel_grad", "conv_dense_kernel_grad"
    assert [name for name, *_ in launches] == [kernel, stay if sums_stay else dense]


def test_a_short_sequence_has_more_programs_and_fewer_rounds():
    def tile(count, kernel=triton_config.INPUT_GRAD, **more):
        found = triton_config.configure(
            kernel, 256, 150, 150, taps=5, phases=Phases(1, 1, 1),
            count=count, dtype=np.dtype(np.float32), precision="tf32", tma=True, tight=True,
            pointers=True, **more,
        )  # fmt: skip
        return found.rows, found.columns, found.depth

    assert tile(1) == tile(2) == (32, 32, 128)
    assert tile(1, triton_config.FORWARD) == (32, 32, 64)  # of a kernel as it lies
    assert tile(3)[0] > 32 and tile(1, saved=True)[0] > 32


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 33, 256, 257, 512])
def test_partial_sums_are_added_neighbours_first_in_few_operations(count):
    values = np.random.default_rng(0).standard_normal((count, 3, 5), np.float32)
    values *= np.float32(10) ** np.arange(-3, 3).repeat(-(-count // 6))[:count, None, None]
    expected = list(values)
    while len(expected) > 1:
        groups = [expected[i : i + 16] for i in range(0, len(expected), 16)]
        expected = [functools.reduce(np.add, group) for group in groups]
    add = jax.jit(functools.partial(add_in_order, dtype=np.float32))
    assert np.array_equal(add(values), expected[0])
    assert len(add.trace(values).jaxpr.eqns) <= 2 * 16 * 3 + 3 * 16


@pytest.mark.parametrize("kernel", [triton_config.INPUT_GRAD, triton_config.KERNEL_GRAD])
def test_a_tile_that_was_tuned_without_a_derivative_is_not_taken_with_one(kernel):
    """What a derivative is computed from takes as much memory again."""
    common = dict(taps=3, phases=Phases(1, 1, 1), count=1, dtype=np.dtype("float16"),
                  precision="tf32", tma=True)  # fmt: skip
    with triton_tuned.trial(None) as keys:
        for saved in (False, True):
            triton_config.configure(kernel, 64, 64, 4096, saved=saved, **common)
    assert keys[1] == f"{keys[0]} derivative"


@pytest.mark.parametrize(
    "case, how",
    [
        (Case("few_taps", T=100, C=8, O=8, G=8, K=8, D=1024), WALKED),
        (Case("many_taps", T=100, C=8, O=8, G=8, K=9), SLID),
        (Case("many_taps_far", T=100, C=8, O=8, G=8, K=9, D=16), TILED),
        (Case("multiplier", T=100, C=8, O=16, G=8), TILED),
        (Case("many_strided", T=100, C=8, O=8, G=8, K=9, S=2), TILED),
        (Case("upsampling", T=100, C=8, O=8, G=8, E=2, padding=2), TILED),
        (Case("long", batch=(1,), T=2**28, C=8, O=8, G=8), TILED),
    ],
    ids=str,
)
def test_how_depthwise_is_computed(case, how):
    """And what is walked computes z anew, where the others keep it."""
    problem = _problem(case, "silu")
    assert (walk.decline(case.spec, case.C, case.O) is None) is (how == WALKED)
    assert triton_depthwise.KERNEL.recomputes(problem) is (how == WALKED)
    assert triton_depthwise.KERNEL.keeps(problem) is (how != WALKED)
    assert triton_depthwise.describe(problem).startswith(how)


@pytest.mark.parametrize("layer", _layers.select("quartznet"), ids=lambda layer: layer.name)
def test_all_of_a_quartznet_slides_through_registers(layer, monkeypatch):
    """Both passes, in programs enough for each processor, and few taps beyond the last."""
    seen = {}

    def call(kernel, *args, out, programs, **meta):
        seen.setdefault(kernel.__name__, []).append((programs, meta))
        return np.zeros(out.shape, out.dtype)

    monkeypatch.setattr(triton_depthwise.compat, "call", call)
    case = Case(
        "layer", (layer.N,), layer.T, layer.C, layer.O, layer.K, layer.D, G=layer.G,
        padding=layer.padding,
    )  # fmt: skip
    arrays = [np.zeros(shape) for shape in (case.x_shape, case.kernel_shape, case.out_shape)]
    x, w, g = (a.astype(np.float32) for a in arrays)
    for operation in OPERATIONS:
        lhs, rhs, _ = lhs_rhs_out(operation, x, w, g)
        triton_depthwise.run(case.problem(operation, "cuda"), lhs, rhs)
    assert [meta["REVERSE"] for _, meta in seen["conv_taps"]] == [False, True]
    ((programs, meta),) = seen["conv_taps_kernel_grad"]
    assert layer.K <= meta["R"] * meta["BP"] <= 1.1 * layer.K  # all in one program
    assert 0.9 * 8 * PROCESSORS <= programs * meta["warps"] <= 8 * PROCESSORS
    assert all(programs >= 8 * PROCESSORS for programs, _ in seen["conv_taps"])
    for _, meta in (*seen["conv_taps"], *seen["conv_taps_kernel_grad"]):
        assert 32 * meta["warps"] * 2 == meta["BP"] * meta["BC"]  # two channels a thread


@pytest.mark.parametrize(
    "C, K, T, dtype, together",
    [
        (512, 3, 4096, "bfloat16", 1),
        (64, 3, 65536, "bfloat16", 3),
        (64, 1, 65536, "bfloat16", 3),
        (256, 3, 4096, "float32", 4),
    ],
)
@pytest.mark.parametrize("processors", [PROCESSORS, 108, 148])  # of an H200, an A100, a B200
def test_a_kernel_gradient_fills_the_chip(C, K, T, dtype, together, processors, monkeypatch):
    """With as many programs as share a processor; and none begins when the others end."""
    seen = []

    def call(kernel, *args, out, programs, **meta):
        seen.append(programs)
        return np.zeros(out.shape, out.dtype)

    monkeypatch.setattr(triton_dense.triton_compat, "call", call)
    monkeypatch.setattr(triton_dense.triton_compat, "processors", lambda: processors)
    case = Case("layer", batch=(8,), T=T, C=C, O=C, K=K, dtype=dtype)
    x, _, g = (jax.ShapeDtypeStruct(s, dtype) for s in (case.x_shape, (1,), case.out_shape))
    triton_dense.run(case.problem("conv1d_kernel_grad", "cuda"), x, g)
    rounds = seen[0] / (together * processors)
    assert 0.9 < rounds / math.ceil(rounds) <= 1, seen


@pytest.mark.parametrize(
    "sizes",
    [
        dict(T=2**30),
        dict(T=20, D=2**29, padding=[(2**29, 20)]),
        dict(T=20, K=1, S=2**27, padding=[(0, 2**27)]),
        dict(T=2**30 - 9, K=1, S=2**20, padding=[(2**30 - 9, 0)]),
        dict(T=2**15 + 1, K=1, S=2**16, E=2**17 + 1, padding=0),  # a phase's first step
    ],
    ids=str,
)
def test_what_32_bits_do_not_count_is_declined(sizes):
    problem = Case("far", batch=(1,), C=16, O=16, **sizes).problem("conv1d", "cuda")
    assert triton_dense.decline(problem) == "counts steps with 32 bits"
    near = Case("near", batch=(1,), C=16, O=16, T=2**29, S=3, padding=[(2**20, 0)])
    assert triton_dense.decline(near.problem("conv1d", "cuda")) is None


def test_a_single_tap_has_no_dilation():
    """Which would be too large to count with."""
    case = Case("case", batch=(1,), T=64, C=16, O=16, K=1, D=2**33)
    assert case.spec == dataclasses.replace(case.spec, kernel_dilation=1)
    assert triton_dense.decline(case.problem("conv1d", "cuda")) is None
    alone = ConvSpec(64, 3, padding=(2**33, 2**33), kernel_dilation=2**33).of_taps(range(1, 2))
    assert alone == ConvSpec(64, 1)


def test_a_grid_holds_all_programs():
    """One program for each tile, and no more than 2**31 - 1: a tile is 16 by 16 at the least."""
    narrow = Case("narrow", batch=(2**20,), T=16, C=32, O=32, G=16)
    assert most_programs(narrow.problem("conv1d")) == 2**24
    assert triton_dense.decline(narrow.problem("conv1d", "cuda")) is None
    many = dataclasses.replace(narrow, batch=(2**27,))
    for operation in OPERATIONS:
        problem = many.problem(operation, "cuda")
        assert triton_dense.decline(problem) == "has more tiles than a grid has programs"


@pytest.mark.parametrize(
    "C, K", [(16384, 4), (12288, 8), (32768, 1), (4096, 64), (32768, 64), (1024, 1024)]
)
def test_a_depthwise_layer_may_be_wide(C, K, launches):
    """Its kernel has K rows of C, and a program for some of each, be they more than a chip has."""
    case = Case("wide", batch=(1,), T=8192, C=C, O=C, G=C, K=K, dtype="bfloat16")
    shapes = (case.x_shape, case.kernel_shape, case.out_shape)
    x, w, g = (jax.ShapeDtypeStruct(shape, case.dtype) for shape in shapes)
    for operation in OPERATIONS:
        problem = case.problem(operation, "cuda")
        assert triton_depthwise.decline(problem) is None
        triton_depthwise.run(problem, *lhs_rhs_out(operation, x, w, g)[:2])
    assert all(programs > 0 for _, programs, _ in launches) and len(launches) == 3


@pytest.mark.parametrize(
    "kernel, C, O, G", [(triton_dense, 512, 512, 1), (triton_depthwise, 16, 32, 16)]
)
@pytest.mark.parametrize("N", [1, 2, 3])
def test_what_is_left_to_add_is_float32(kernel, C, O, G, N, launches, monkeypatch):
    """Of a kernel gradient in 16 bits; and of one program's sum there is nothing to add."""
    monkeypatch.setattr(triton_dense, "choose_splits", lambda tiles, blocks, *rest: blocks)
    case = Case("layer", batch=(N,), T=8, C=C, O=O, K=4, G=G, dtype="bfloat16")
    x, _, g = (jax.ShapeDtypeStruct(s, case.dtype) for s in (case.x_shape, (1,), case.out_shape))
    kernel.run(case.problem("conv1d_kernel_grad", "cuda"), x, g)
    ((_, _, out),) = launches
    assert out.shape[0] == N and out.dtype == ("bfloat16" if N == 1 else "float32")


@pytest.mark.parametrize(
    "kernel, G, O, K",
    [
        (triton_dense, 1, 48, 3),
        (triton_dense, 4, 48, 3),
        (triton_depthwise, 32, 32, 3),
        (triton_depthwise, 32, 32, 40),
        (triton_depthwise, 32, 64, 3),
    ],
)
@pytest.mark.parametrize("S, E", [(1, 1), (3, 1), (1, 2), (2, 3)])
def test_a_launch_takes_no_more_programs_than_were_counted(kernel, G, O, K, S, E, monkeypatch):
    """What `most_programs` promises, of what each launcher asks for."""
    seen = []

    def call(*args, out, programs, **meta):
        seen.append(programs)
        return jax.tree.map(lambda o: np.zeros(o.shape, o.dtype), out)

    monkeypatch.setattr(triton_dense.triton_compat, "call", call)
    spec = ConvSpec(1000, K, S, (2, 0), 1, E, G)
    case = Case("case", T=1000, C=32, O=O, K=K, S=S, E=E, G=G, padding=[(2, 0)])
    assert case.spec == spec
    x, w, g = case.arrays()
    for operation in OPERATIONS:
        lhs, rhs, _ = lhs_rhs_out(operation, x, w, g)
        kernel.run(case.problem(operation, "cuda"), lhs, rhs)
    assert len(seen) == 3
    assert max(seen) <= most_programs(case.problem("conv1d"))


@pytest.mark.parametrize(
    "C, columns", [(12288, 512), (512, 512), (500, 512), (768, 256), (320, 128), (60, 64), (3, 16)]
)
def test_a_walk_goes_along_whole_rows_of_channels_that_are_there(C, columns):
    spec = ConvSpec(4096, 4, padding=(3, 0), groups=C)
    rows, found, steps, warps = walk._tile(
        "conv_walk", 8, 4096, spec, C, np.dtype(np.float32), 4, columns=512, steps=64
    )
    assert found == columns and rows * columns == 32 * warps * 4 and steps <= 64


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_an_activation_is_applied_to_is_kept_unrounded_until_it_is(
    dtype, capability, monkeypatch
):
    """In training: of 16 bits an activation of what was stored would be rounded twice."""
    monkeypatch.setattr(triton_dense.triton_compat, "compute_capability", lambda: capability)
    for C, O, G in ((512, 512, 1), (450, 450, 1), (150, 600, 1), (25, 30, 1), (768, 768, 8)):
        case = Case("layer", batch=(8,), T=4096, C=C, O=O, G=G, dtype=dtype)
        for activation in ("gelu", "gelu_exact", "silu", "tanh"):
            assert triton_dense.keeps(_problem(case, activation)), (case, activation)
