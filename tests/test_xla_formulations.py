"""Every formulation for XLA, chosen by a rule or not, against the formula in float64."""

import dataclasses
import functools
import itertools
import json
import re
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conv_pallas import conv1d, taps
from conv_pallas.kernels import (
    xla,
    xla_channel_blocks,
    xla_cpu,
    xla_cpu_bounds,
    xla_cpu_forward,
    xla_cpu_groups,
    xla_cpu_kernel_grad,
    xla_pieces,
    xla_tuned,
)
from conv_pallas.kernels.xla_formulations import (
    FORWARD,
    KERNEL_GRAD,
    numbers_of,
)
from conv_pallas.kernels.xla_pieces import in_steps, in_taps
from conv_pallas.spec import OPERATIONS, ConvSpec, Problem, lhs_rhs_out
from tests.cases import CASES, Case, named
from tests.support import padded, rows
from tests.tolerance import check

conv1d = functools.partial(conv1d, implementation="xla")  # whatever else is the default

HARD = (
    "dense",
    "grouped_narrowing",
    "depthwise_dilated",
    "multiplier",
    "depthwise_of_one",
    "pointwise_dilated",
    "time_shorter_than_dilation",
    "stride_over_taps",
    "stride_grouped",
    "input_dilation_stride",
    "input_dilation_depthwise",
    "input_dilation_crop",
    "pad_beyond_field",
    "crop_depthwise",
    "dense_bfloat16",
    "depthwise_float16",
    "grouped_bfloat16_float32",
    "long_depthwise_bfloat16",
)
INTEGERS = tuple(
    dataclasses.replace(named(name), name=f"{name}_{dtype}_{out}", dtype=dtype, out_dtype=out)
    for name, dtype, out in (("dense", "int32", None), ("stride_grouped", "int8", "int32"))
)
TESTS = [(case, operation) for case in map(named, HARD) for operation in OPERATIONS]
TESTS += [(case, "conv1d") for case in INTEGERS]  # integers have no gradients


def operands(case: Case, operation):
    """The two operands of ``operation``, with one batch axis."""
    x, kernel, g = case.arrays()
    return lhs_rhs_out(operation, rows(padded(x, case)), kernel, rows(g))[:2]


def check_all(case: Case, operation) -> None:
    problem = case.problem(operation)
    table = KERNEL_GRAD if operation == "conv1d_kernel_grad" else FORWARD
    # Products of "winograd" cancel in part: it needs more of them to be as exact, in its own cases.
    names = [name for name in table if not name.endswith("winograd")]

    def run(lhs, rhs):
        return {name: xla.run_as(name, problem, lhs, rhs) for name in names}

    lhs, rhs = operands(case, operation)
    # Compiled without LLVM's optimisations, which would take most of the time.
    with jax.numpy_rank_promotion("raise"):
        lowered = jax.jit(run).lower(lhs, rhs)
    run = lowered.compile({"xla_backend_optimization_level": 0})
    for name, actual in run(lhs, rhs).items():
        try:
            check(actual, operation, lhs, rhs, case.spec, out_dtype=problem.out_dtype)
        except AssertionError as e:
            raise AssertionError(f"{name}: {e}") from None


@pytest.mark.sampled
@pytest.mark.parametrize("case, operation", TESTS, ids=str)
def test_formulations(case, operation):
    check_all(case, operation)


GPU = (
    *(named(name) for name in HARD if named(name).dtype == "float32"),
    Case("depthwise_many_taps", T=50, C=4, O=4, G=4, K=21, D=2),
    Case("multiplier_many_taps", T=50, C=4, O=12, G=4, K=23, S=2),
    Case("dense_many_taps", T=50, C=4, O=3, K=19, D=2, S=3),
    Case("grouped_many_taps", T=50, C=4, O=6, G=2, K=9, D=4),
    Case("channels_of_16_bytes", T=50, C=4, O=8, K=3, D=4),
    Case("little_padding", T=70, C=4, O=8, K=3, D=4),
    Case("little_padding_strided", T=70, C=4, O=8, K=3, D=4, S=3, padding=[(2, 9)]),
)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", GPU, ids=str)
def test_what_is_chosen_for_a_gpu(case, operation):
    problem = case.problem(operation, "cuda")
    run = jax.jit(functools.partial(xla.run, problem))
    lhs, rhs = operands(case, operation)
    compiled = run.lower(lhs, rhs).compile({"xla_backend_optimization_level": 0})
    check(compiled(lhs, rhs), operation, lhs, rhs, case.spec, out_dtype=problem.out_dtype)


@pytest.mark.parametrize("C, dtype, ragged", [
    (10, "float32", True), (12, "float32", False), (12, "bfloat16", True), (16, "bfloat16", False),
])  # fmt: skip
def test_channels_that_fill_no_16_bytes_are_multiplied_tap_by_tap_on_a_gpu(C, dtype, ragged):
    """Which cuDNN is slow at; but for strides and many taps, where nobody has measured it."""
    case = Case("layer", T=50, C=C, O=C, K=4, D=4, dtype=dtype)
    for operation in OPERATIONS:
        chosen = [
            xla.choose(dataclasses.replace(case, **more).problem(operation, "cuda"))
            for more in ({}, {"K": 9}, {"S": 2, "D": 1})
        ]
        assert [name == "matmuls" for name in chosen] == [ragged, False, False], (operation, chosen)


@pytest.mark.parametrize("sizes, forward, input_grad", [
    (dict(T=64), "symmetric", "symmetric"),
    (dict(T=63), "barrier", "barrier"),  # as much again is too much beside what is there
    (dict(T=63, D=1), "native", "native"),
    (dict(T=63, D=1, S=2), "symmetric", "transposed"),
    (dict(T=30, D=1, S=2), "native", "transposed"),
    (dict(T=63, padding="SAME"), "native", "native"),
    (dict(T=64, padding=[(0, 8)]), "symmetric", "symmetric"),
    (dict(T=64, C=450, O=450), "symmetric", "symmetric"),  # of many channels no matmuls
    (dict(T=64, C=150, O=450), "symmetric", "symmetric"),
    (dict(T=64, C=150, O=150), "matmuls", "matmuls"),
    (dict(T=64, K=1), "matmuls", "matmuls"),
], ids=str)  # fmt: skip
def test_how_padding_on_one_side_is_done_on_a_gpu(sizes, forward, input_grad):
    case = Case("layer", **dict(C=32, O=32, K=3, D=4) | sizes)
    chosen = [xla.choose(case.problem(operation, "cuda")) for operation in OPERATIONS[:2]]
    assert chosen == [forward, input_grad]


@pytest.mark.parametrize("sizes, chosen", [
    (dict(T=8192), "matmuls"),
    (dict(T=8193), "fold"),  # a copy for each of three taps is too much
    (dict(T=8193, K=2), "matmuls"),
    (dict(T=64, K=4), "fold"),
    (dict(T=64, C=320), "fold"),  # the matmuls themselves take as long as cuDNN
    (dict(T=64, D=1), "native"),
], ids=str)  # fmt: skip
def test_how_a_dilated_kernel_gradient_is_computed_on_a_gpu(sizes, chosen):
    case = Case("layer", (1,), **dict(C=32, O=32, K=3, D=4) | sizes)
    assert xla.choose(case.problem("conv1d_kernel_grad", "cuda")) == chosen


def test_a_view_brings_back_nothing_that_was_cut_off():
    """Steps that make time a multiple of the dilation are zeros, and nothing else."""
    x = jnp.ones((1, 9, 4)).at[:, 6:].set(np.nan)
    spec = ConvSpec(9, 2, padding=(0, -3), kernel_dilation=3)
    f32 = np.dtype(np.float32)
    problem = Problem("conv1d_kernel_grad", spec, 1, 4, 4, f32, f32, f32, None, "cuda")
    for more in (spec, ConvSpec(9, 2, padding=(1, -3), kernel_dilation=2)):
        this = dataclasses.replace(problem, spec=more)
        assert np.isfinite(xla.run_as("fold", this, x, jnp.ones(this.y_shape))).all()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_float64(operation):
    with jax.enable_x64(True):
        check_all(dataclasses.replace(named("stride_grouped"), dtype="float64"), operation)


PARTS = (
    Case("deep", T=40, C=4, O=3, K=3, D=10),
    Case("deep_taps", T=40, C=3, O=5, K=8, D=5, dtype="bfloat16"),
    Case("deep_same", T=40, C=4, O=3, K=5, D=9, padding="SAME"),
    Case("nothing_first", T=20, C=2, O=3, K=2, D=6, padding=[(31, -9)]),
    Case("nothing_last", T=20, C=2, O=3, K=2, D=6, padding=[(-3, 27)]),
    Case("strided", T=40, C=4, O=3, K=3, D=10, S=2),
)


@pytest.mark.sampled
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", PARTS, ids=str)
def test_in_parts(case, operation):
    problem = case.problem(operation)
    lhs, rhs = operands(case, operation)
    with jax.numpy_rank_promotion("raise"):
        out = jax.jit(functools.partial(xla.run_as, "parts", problem))(lhs, rhs)
    check(out, operation, lhs, rhs, case.spec, out_dtype=problem.out_dtype)
    steps, _ = xla_cpu.pieces(problem)
    assert (len(steps) > 1) == (case.S == 1)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_parts_take_fewer_products(operation):
    """With D = T / 4 of four taps ten of sixteen quarters see x; "im2col" multiplies all."""
    problem = Case("deep", batch=(2,), T=256, C=16, O=16, K=4, D=64).problem(operation)
    structs = [jax.ShapeDtypeStruct(s, problem.lhs_dtype) for s in problem.shapes[:2]]

    def flops(name):
        run = jax.jit(functools.partial(xla.run_as, name, problem))
        return run.lower(*structs).compile().cost_analysis()["flops"]

    assert flops("parts") < 0.7 * flops("im2col")


@hypothesis.given(st.data())
def test_cuts(data):
    integers = lambda least, most: data.draw(st.integers(least, most))  # noqa: E731
    T, K, D = integers(1, 40), integers(1, 6), integers(1, 12)
    spec = ConvSpec(T, K, padding=(integers(-6, 30), integers(-6, 30)), kernel_dilation=D)
    hypothesis.assume(spec.out_time > 0)
    sees = [[0 <= u + k * D - spec.padding[0] < T for k in range(K)] for u in range(spec.out_time)]
    for most in (1, 3, 2 * K + 1):
        steps, share = xla_pieces.cuts(spec, most, 1e-9)
        assert [u for piece in steps for u in piece] == list(range(spec.out_time))
        assert len(steps) <= most and all(steps)
        assert sum(map(sum, sees)) <= round(share * spec.out_time * K)
    assert share < 1 or all(row[0] and row[-1] for row in sees) or T > spec.out_time


@pytest.mark.parametrize("T, K, D", [(40, 3, 10), (40, 4, 9), (13, 5, 3)])
def test_cuts_of_a_causal_convolution_leave_no_padding(T, K, D):
    spec = ConvSpec(T, K, padding=((K - 1) * D, 0), kernel_dilation=D)
    seen = sum(max(0, T - k * D) for k in range(K))
    steps, share = xla_pieces.cuts(spec, K, 1e-9)
    assert len(steps) == K and round(share * T * K) == seen


@pytest.mark.sampled
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_pieces(operation, dtype, loop, monkeypatch):
    """As exact as all at once, and one by one less is held at any moment."""
    case = Case("pieces", batch=(6,), T=128, C=16, O=8, K=5, D=3, dtype=dtype)
    problem = case.problem(operation)
    lhs, rhs = operands(case, operation)
    names = ("im2col",) if operation == "conv1d_kernel_grad" else ("im2col", "scatter")

    def compiled(name):
        run = lambda a, b: xla.run_as(name, problem, a, b)  # noqa: E731
        lowered = jax.jit(run).lower(lhs, rhs)
        return lowered.compile({"xla_backend_optimization_level": 0})

    for name in names:
        whole = compiled(name).memory_analysis().temp_size_in_bytes
        each = xla_cpu_bounds.bytes_held(name, problem)
        for piece, at_once in ((1, 1), (2 * each, 2), (5 * each, 3)):
            monkeypatch.setattr(xla_cpu_bounds, "WHOLE", 1)
            monkeypatch.setattr(xla_cpu_bounds, "PIECE", dict.fromkeys(xla_cpu_bounds.PIECE, piece))
            monkeypatch.setattr(xla_cpu_bounds, "MOST", 1)
            monkeypatch.setattr(xla_cpu, "steps_at_once", lambda *_: case.T)
            monkeypatch.setattr(xla_pieces, "PIECES", 1 if loop else 16)
            assert xla_cpu_bounds.sequences_at_once(name, problem) == at_once
            program = compiled(name)
            check(np.asarray(program(lhs, rhs)), operation, lhs, rhs, case.spec,
                  out_dtype=problem.out_dtype, precision=None, platform="cpu")  # fmt: skip
            if at_once == 1:
                assert (" while(" in program.as_text()) == loop
                assert program.memory_analysis().temp_size_in_bytes < 0.8 * whole
        monkeypatch.undo()
        assert xla_cpu_bounds.sequences_at_once(name, problem) == 6
    prime = dataclasses.replace(problem, N=127)
    assert xla_cpu_bounds.sequences_at_once(names[0], prime) in (1, 127)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("operation", "name"),
    [
        *itertools.product(OPERATIONS[:2], ("winograd", "scatter", "matmuls")),
        ("conv1d_input_grad", "native"),  # forward it takes the kernel as it lies
    ],
)
def test_a_network_holds_one_kernel_that_is_turned_or_summed(operation, name):
    """XLA would make those of all layers first, and hold them until each is needed."""
    layers, x = 6, jax.ShapeDtypeStruct((1, 16, 160), jnp.float32)
    problem = Case("network", batch=(1,), T=16, C=160, O=160).problem(operation)
    chosen, size = {xla_tuned.key(problem): name}, 4 * 3 * 160 * 160
    assert size >= xla.LARGE

    def network(x, ws):
        for w in ws:
            x = conv1d(x, w, activation="tanh")
        return jnp.sum(x)

    def held(count: int) -> int:
        ws = [jax.ShapeDtypeStruct((3, 160, 160), jnp.float32)] * count
        f = network if operation == "conv1d" else jax.grad(network)
        return jax.jit(f).lower(x, ws).compile().memory_analysis().temp_size_in_bytes

    with xla_tuned.trial(chosen):
        assert held(1) > size / 2
        # Of two layers on the last kernel that was turned and the next may be there.
        assert held(layers) < held(2) + size / 2


def test_what_an_input_gradient_holds():
    """It is a convolution of g, whose outputs are the steps of x."""
    spec = ConvSpec(1000, 3, kernel_dilation=100)  # 800 outputs
    f32 = np.dtype(np.float32)
    problem = Problem("conv1d_input_grad", spec, 1, 4, 8, f32, f32, f32, None, "cpu")
    assert xla_cpu_bounds.bytes_held("im2col", problem) == 1000 * 3 * 8 * 4
    assert xla_cpu_bounds.bytes_held("scatter", problem) == 800 * 3 * 4 * 4
    assert xla_cpu_bounds.steps_at_once("im2col", problem) == 1000


SOME = TESTS[:: len(OPERATIONS) + 1] + TESTS[-2:]
# Each in steps and in taps, one of them in a loop and the next case's other one: so any operation
# is in any of the four ways.
WAYS = [
    (*test, (i % 2 == 0) == (pieces is in_steps), pieces)
    for i, test in enumerate(SOME)
    for pieces in (in_steps, in_taps)
]


@pytest.mark.sampled
@pytest.mark.parametrize(
    "case, operation, loop, pieces", WAYS, ids=lambda a: getattr(a, "__name__", str(a))
)
def test_in_steps_and_in_taps(case, operation, loop, pieces, monkeypatch):
    monkeypatch.setattr(xla_pieces, "PIECES", 1 if loop else 16)
    problem = case.problem(operation)
    lhs, rhs = operands(case, operation)
    operand, numbers = numbers_of(problem)
    sums, w = operation == "conv1d_kernel_grad", rhs.astype(operand)
    spec, _, _ = problem.as_convolution
    if operation == "conv1d_input_grad":
        w = taps.flip(w, spec.groups)
    of = spec.out_time if pieces is in_steps else spec.kernel_size
    sizes = {1, (of + 1) // 2, max(1, of - 1)}
    if not loop:  # more than that many pieces are taken in a loop all the same
        sizes = {n for n in sizes if -(-of // n) <= xla_pieces.PIECES}
    ways = {
        (name, n): pieces((KERNEL_GRAD if sums else FORWARD)[name], n, sums)
        for name in (("im2col", "tree") if sums else ("blocks", "own_pads"))
        for n in sizes
    }

    def run(x, w):  # one program, which takes less time to compile than one for each way
        outs = {way: run(x, w, spec, numbers) for way, run in ways.items()}
        return {way: out.astype(problem.out_dtype) for way, out in outs.items()}

    lowered = jax.jit(run).lower(lhs.astype(operand), w)
    compiled = lowered.compile({"xla_backend_optimization_level": 0})
    for actual in compiled(lhs.astype(operand), w).values():
        check(actual, operation, lhs, rhs, case.spec, out_dtype=problem.out_dtype)


@pytest.mark.sampled
@pytest.mark.parametrize(
    "sizes, chosen",
    [
        ((2, 200, 8, 8, 23, 4), "blocks"),
        ((1, 9000, 8, 8, 200, 2), "blocks"),
        ((2, 200, 64, 8, 23, 4), "scatter"),
        ((2, 200, 16, 16, 23, 4, 1, 16), "matmuls"),
        ((2, 200, 32, 32, 23, 4, 1, 32), "own_pads"),
        ((1, 400, 4, 4, 150, 1, 1, 4), "channel_blocks"),
        ((1, 400, 2, 2, 257, 1, 1, 2), "own_pads"),
    ],
)
def test_no_output_sees_what_is_after_it(sizes, chosen):
    """Not even times zero, in a block of taps that is not full: that would be NaN."""
    N, T, C, O, K, D, _, G = (*sizes, 1, 1)[:8]
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((N, T, C)), rng.standard_normal((K, C // G, O))
    x[:, T // 2 :] = np.nan
    x, w = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
    spec = ConvSpec(T, K, padding=((K - 1) * D, 0), kernel_dilation=D, groups=G)
    problem = Problem("conv1d", spec, N, C, O, x.dtype, w.dtype, x.dtype, None, "cpu")
    assert xla.choose(problem) == chosen
    y = conv1d(x, w, kernel_dilation=D, feature_group_count=G)
    assert np.isfinite(y[:, : T // 2]).all() and np.isnan(y[:, T // 2]).all()


@pytest.mark.parametrize("T", [417, 128])  # with a step left over, and without
def test_no_tap_sees_a_step_that_it_does_not_meet(T):
    """Of a causal kernel the last tap alone meets the last step."""
    x, g = jnp.ones((1, T, 2)).at[:, -1, 0].set(np.inf), jnp.ones((1, T, 2))
    spec = ConvSpec(T, 20, padding=(19, 0), groups=2)
    problem = Problem("conv1d_kernel_grad", spec, 1, 2, 2, *(x.dtype,) * 3, None, "cpu")
    assert xla.choose(problem) == "channel_blocks"
    run = jax.jit(functools.partial(xla.run, problem)).lower(x, g)
    dw = run.compile({"xla_backend_optimization_level": 0})(x, g)[:, 0]
    np.testing.assert_array_equal(dw[-1], [np.inf, T])
    np.testing.assert_array_equal(dw[:-1].T, [T - np.arange(19, 0, -1)] * 2)


@pytest.mark.parametrize("case, chosen", [
    (Case("causal", T=40, C=40, O=40, G=40, K=14),
     ("scatter", "scatter", "channel_blocks")),
    (Case("dilated", T=60, C=32, O=32, G=32, K=9, D=3), ("scatter", "scatter", "tree")),
    (Case("valid", T=40, C=64, O=64, G=64, K=9, padding="VALID"),
     ("scatter", "own_pads", "channel_blocks")),
    (Case("few", T=40, C=8, O=8, G=8, K=9, dtype="bfloat16"), ("matmuls", "matmuls", "split")),
    (Case("odd", T=40, C=12, O=12, G=12, K=11, dtype="bfloat16"), ("channel_blocks",) * 3),
], ids=str)  # fmt: skip
def test_depthwise_sums_of_9_to_14_taps(case, chosen):
    for operation, name in zip(OPERATIONS, chosen, strict=True):
        problem, (lhs, rhs) = case.problem(operation), operands(case, operation)
        assert xla.choose(problem) == name
        run = jax.jit(functools.partial(xla.run, problem)).lower(lhs, rhs)
        out = run.compile({"xla_backend_optimization_level": 0})(lhs, rhs)
        check(out, operation, lhs, rhs, case.spec, out_dtype=problem.out_dtype)


BLOCKED = ("depthwise_dilated", "multiplier", "stride_depthwise", "crop_depthwise",
           "input_dilation_depthwise", "long_depthwise_float16", "stride_grouped")  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", [named(name) for name in BLOCKED], ids=str)
def test_several_blocks_of_channels_pieces_and_loops(case, operation, monkeypatch):
    for name, size in {"LANES": 3, "AT_ONCE": 2, "STEPS": 8}.items():
        monkeypatch.setattr(xla_channel_blocks, name, size)
    problem, (lhs, rhs) = case.problem(operation), operands(case, operation)
    run = jax.jit(functools.partial(xla.run_as, "channel_blocks", problem))
    compiled = run.lower(lhs, rhs).compile({"xla_backend_optimization_level": 0})
    check(compiled(lhs, rhs), operation, lhs, rhs, case.spec, out_dtype=problem.out_dtype)


@pytest.mark.parametrize(
    "N, T, K, first",
    [(2, 1000, 8, "f32[126,512]"), (1, 250, 8, "f32[16,512]")],
    ids=["levels", "no_levels"],
)
def test_a_sum_is_computed_once(N, T, K, first):
    """Level by level; anew for what reads it, the program was ten times as long, and as slow."""
    x, w = jnp.zeros((N, T, 512)), jnp.zeros((K, 1, 512))
    step = jax.grad(lambda w: jnp.sum(conv1d(x, w, feature_group_count=512)))
    hlo = jax.jit(step).lower(w).compile().as_text()
    assert first in hlo  # what is left when 16 blocks of time are added
    assert hlo.count(" fusion(") < 80


def test_bias_and_activation_cost_no_pass():
    x, w, b = jnp.zeros((2, 1000, 64)), jnp.zeros((3, 1, 64)), jnp.zeros(64)

    def fusions(f):
        """The shapes that fusions leave in memory."""
        hlo = jax.jit(f).lower(x, w, b).compile().as_text()
        entry = hlo[hlo.index("\nENTRY") :]
        return re.findall(r"= (\S+?)\{\S* fusion\(", entry)

    layer = functools.partial(conv1d, kernel_dilation=2, feature_group_count=64)
    plain = fusions(lambda x, w, b: layer(x, w))
    whole = functools.partial(layer, activation="silu")
    assert fusions(whole) == plain == ["f32[2,1000,64]"]


# One tap in a loop; of many 16 loops of 8 steps each, however many taps there are.
@pytest.mark.sampled
@pytest.mark.parametrize("C, K, most", [(32, 9, 20), *((64, K, 24) for K in (9, 33, 75, 120))])
def test_no_more_is_compiled_for_more_taps(C, K, most):
    x, w = jnp.zeros((2, 300, C)), jnp.zeros((K, 1, C))
    step = jax.grad(lambda w: jnp.sum(conv1d(x, w, feature_group_count=C)))
    hlo = jax.jit(step).lower(w).compile().as_text()
    assert hlo.count(" fusion(") < most


def test_a_kernel_gradient_is_no_slower_in_a_loop():
    """XLA:CPU puts the axes of a convolution in order nowhere but in the entry computation."""

    def step(w, xg):
        y, vjp = jax.vjp(lambda w: conv1d(xg[0], w, kernel_dilation=4), w)
        return w - vjp(y - xg[1])[0], None

    w, x = jnp.zeros((3, 64, 64)), jnp.zeros((3, 2, 1000, 64))
    hlo = jax.jit(lambda w, x: jax.lax.scan(step, w, (x, x))).lower(w, x).compile().as_text()
    labels = re.findall(r" convolution\(.*?dim_labels=([\w>-]+)", hlo)
    assert len(labels) == 2 and set(labels) == {"b0f_0io->b0f"}


@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_loss_does_not_add_up_taps_in_its_reduction(activation):
    """XLA:CPU would, element by element, of products that it writes to memory tap by tap."""
    x, w = jnp.zeros((4, 256, 64)), jnp.zeros((4, 1, 64))
    layer = functools.partial(conv1d, feature_group_count=64, activation=activation)
    loss = lambda x, w: jnp.sum(layer(x, w) ** 2)  # noqa: E731
    hlo = jax.jit(loss).lower(x, w).compile().as_text()
    assert hlo.count(" fusion(") == 2  # the convolution, and what reduces it


def test_flip_twice_is_nothing():
    w = np.random.default_rng(0).standard_normal((3, 4, 6)).astype(np.float32)
    np.testing.assert_array_equal(taps.flip(taps.flip(jax.numpy.asarray(w), 2), 2), w)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_choice_exists(platform):
    for case in CASES:
        for operation in OPERATIONS:
            problem = case.problem(operation, platform)
            table = KERNEL_GRAD if operation == "conv1d_kernel_grad" else FORWARD
            if 0 in (*problem.x_shape, *problem.w_shape, *problem.y_shape):
                continue
            assert xla.choose(problem) in (*table, "transposed")
            assert xla.KERNEL.describe(problem)


@pytest.mark.parametrize(
    "sizes, dtype, forward, input_grad",
    [
        # Into few outputs, of float32 and bfloat16; of as many as channels, not.
        ((8, 500, 256, 4, 5, 4), "float32", "scatter", "native"),
        ((1, 2000, 24, 100, 8, 8), "float32", "padded", "scatter"),
        ((4, 2000, 64, 8, 24), "float32", "scatter", "native"),
        ((8, 1000, 16, 8, 7), "bfloat16", "scatter", "im2col"),
        ((4, 2000, 64, 32, 3), "float32", "padded", "native"),
        ((1, 60000, 32, 16, 12), "float32", "padded", "native"),  # they hold too much
        ((16, 500, 64, 10, 1), "float32", "matmuls", "native"),
        ((16, 500, 64, 64, 1), "float32", "padded", "native"),
        # A channel or three of which many outputs are made.
        ((4, 2000, 2, 256, 7, 4), "float32", "shifts", "scatter"),
        ((4, 2000, 1, 128, 3), "float16", "own_pads", "scatter"),
        ((4, 2000, 2, 256, 7, 4), "bfloat16", "im2col", "scatter"),
        ((4, 2000, 3, 256, 7), "float32", "padded", "scatter"),
        ((4, 4096, 2, 64, 8), "float32", "shifts", "scatter"),
        ((4, 4096, 2, 128, 8), "float32", "padded", "scatter"),  # taps and channels fill a vector
        ((4, 4096, 2, 128, 7), "float32", "shifts", "scatter"),
        ((8, 16384, 1, 16, 16, 1, 4), "float32", "matmuls", "scatter"),
        ((8, 16384, 1, 64, 16, 1, 4), "float32", "padded", "scatter"),
        ((8, 16384, 1, 64, 12, 1, 4), "float32", "matmuls", "scatter"),
        ((4, 2000, 8, 32, 21), "bfloat16", "im2col", "blocks"),
        ((4, 2000, 8, 31, 21), "bfloat16", "blocks", "blocks"),
        # Padding.
        ((8, 1000, 128, 128, 2, 512), "float32", "parts", "parts"),
        ((8, 1000, 128, 128, 2, 256), "float32", "padded", "native"),
        ((2, 100, 32, 32, 2, 50), "float32", "im2col", "im2col"),  # too little
        # Strides.
        ((32, 1000, 3, 16, 1, 1, 2), "float32", "matmuls", "native"),
        ((16, 2000, 64, 32, 1, 1, 2), "float16", "padded", "native"),
        ((4, 2000, 32, 1, 16, 1, 4), "float32", "scatter", "matmuls"),
        ((4, 2000, 32, 1, 33, 1, 4), "float32", "padded", "depth_to_space"),
        ((4, 5000, 10, 10, 2, 1, 2), "float32", "shifts", "scatter"),
        ((1, 1263, 256, 4, 3, 1, 2), "bfloat16", "scatter", "scatter"),
        ((32, 1642, 96, 96, 2, 1, 2), "bfloat16", "im2col", "scatter"),
        ((1, 16000, 64, 64, 17, 1, 2), "bfloat16", "padded", "depth_to_space_im2col"),
        ((4, 2000, 16, 1, 4, 1, 2), "float32", "padded", "scatter"),
        ((4, 500, 768, 768, 3, 1, 2, 64), "float32", "matmuls", "depth_to_space_im2col"),
        ((64, 900, 768, 768, 3, 1, 2, 64), "float32", "matmuls", "native"),  # they hold too much
        ((16, 500, 64, 64, 5, 1, 2, 8), "float16", "im2col", "depth_to_space_im2col"),
        ((8, 500, 128, 128, 3, 1, 2, 16), "bfloat16", "im2col", "depth_to_space_im2col"),
        ((16, 500, 64, 64, 5, 1, 2, 8), "float32", "shifts", "depth_to_space_im2col"),
        ((16, 1988, 192, 192, 3, 1, 4, 8), "float32", "padded", "depth_to_space_im2col"),
        ((16, 2463, 48, 48, 5, 1, 2, 4), "float32", "split", "depth_to_space_im2col"),
        ((2, 141, 192, 192, 4, 1, 4, 2), "float32", "padded", "depth_to_space_im2col"),
        # Groups of which there is little, or two.
        ((2, 91, 64, 64, 15, 2, 1, 8), "float32", "scatter", "scatter"),
        ((1, 179, 192, 192, 5, 32, 1, 8), "float32", "padded", "native"),
        ((2, 65, 512, 512, 5, 1, 1, 8), "float32", "split", "split"),
        ((1, 1708, 256, 256, 3, 64, 1, 8), "float32", "scatter", "scatter"),
        ((1, 7942, 384, 384, 3, 1, 1, 8), "float32", "split", "split"),
        ((16, 73, 256, 256, 4, 1, 1, 2), "float32", "split", "split"),
        ((8, 101, 256, 256, 5, 16, 1, 2), "bfloat16", "im2col", "im2col"),
        ((16, 79, 96, 96, 3, 1, 1, 2), "bfloat16", "split", "split"),
        # Groups of few channels.
        ((4, 1000, 64, 64, 4, 1, 1, 16), "float16", "scatter", "scatter"),
        ((64, 3000, 64, 64, 4, 1, 1, 16), "float16", "shifts", "shifts"),  # they hold too much
        ((64, 2000, 64, 64, 8, 1, 4, 16), "float16", "im2col", "depth_to_space_im2col"),
        ((4, 1000, 64, 64, 4, 1, 1, 16), "bfloat16", "im2col", "im2col"),
        ((4, 512, 64, 256, 4, 2, 1, 64), "bfloat16", "scatter", "shifts"),
        # Many taps of one channel each.
        ((4, 1000, 256, 256, 48, 1, 1, 256), "float32", "channel_blocks", "channel_blocks"),
        ((4, 1000, 256, 256, 48, 1, 2, 256), "float32", "own_pads", "own_pads"),
        ((4, 500, 256, 256, 31, 1, 1, 256), "float32", "own_pads", "own_pads"),
        ((4, 1000, 256, 256, 12, 1, 1, 256), "bfloat16", "channel_blocks", "channel_blocks"),
        ((4, 1000, 256, 256, 9, 1, 1, 256), "bfloat16", "matmuls", "matmuls"),
        ((4, 1000, 8, 8, 11, 2, 1, 8), "float16", "matmuls", "matmuls"),
        ((4, 1000, 12, 12, 9, 1, 1, 12), "bfloat16", "channel_blocks", "channel_blocks"),
        # Registers that so few channels do not fill, and a stride.
        ((32, 738, 8, 8, 3, 1, 1, 8), "float32", "matmuls", "matmuls"),
        ((32, 738, 16, 16, 3, 1, 1, 16), "float32", "scatter", "scatter"),
        ((16, 3094, 20, 20, 24, 1, 1, 20), "float32", "matmuls", "matmuls"),
        ((32, 159, 192, 192, 3, 1, 4, 192), "bfloat16", "scatter", "depth_to_space_im2col"),
        ((2, 1600, 384, 384, 3, 1, 4, 384), "float32", "own_pads", "depth_to_space_im2col"),
        ((16, 372, 80, 80, 3, 1, 2, 80), "float32", "scatter", "scatter"),
        ((4, 1000, 256, 256, 49, 1, 2, 256), "bfloat16", "channel_blocks", "channel_blocks"),
        ((4, 1000, 256, 256, 257, 1, 1, 256), "float32", "own_pads", "own_pads"),
        ((4, 1000, 64, 256, 17, 1, 1, 64), "float32", "own_pads", "channel_blocks"),
    ],
    ids=str,
)
def test_choice_on_a_cpu(sizes, dtype, forward, input_grad):
    N, T, C, O, K, D, S, G = (*sizes, 1, 1, 1)[:8]
    spec = ConvSpec(T, K, S, ((K - 1) * D, 0), D, groups=G)
    dtype = np.dtype(jnp.dtype(dtype))
    problem = Problem("conv1d", spec, N, C, O, dtype, dtype, dtype, None, "cpu")
    assert xla.choose(problem) == forward
    assert xla.choose(dataclasses.replace(problem, operation="conv1d_input_grad")) == input_grad


@pytest.mark.sampled
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("padding", [(-3, 1), (-1, 3), (-9, 5)])
def test_padding_that_crops_one_end_and_pads_the_other(padding, operation):
    """By one convolution, which XLA:CPU of jaxlib 0.11.2 gets wrong."""
    float32 = np.dtype("float32")
    for K, S in itertools.product((2, 3), (1, 2)):
        spec = ConvSpec(12, K, S, padding)
        problem = Problem(operation, spec, 2, 3, 4, *(float32,) * 3, None, "cpu")
        rng = np.random.default_rng(0)
        lhs, rhs = (rng.standard_normal(s).astype(float32) for s in problem.shapes[:2])
        for name in ("native", "padded"):
            out = xla.run_as(name, problem, jnp.asarray(lhs), jnp.asarray(rhs))
            check(np.asarray(out), operation, lhs, rhs, spec, out_dtype=float32)


def _measured(file: Path) -> dict[tuple[str, ...], float]:
    """How many times faster than stock, by case, operation, formulation and how the cores lay."""
    found = {}
    for row in json.loads(file.read_text(encoding="utf-8"))["results"]:
        name, cores = row["case"].replace(" float32", ""), row.get("cores", "unknown")
        for formulation, figures in row["formulations"].items():
            found[name, row["operation"], formulation, cores] = figures["speedup"]
    return found


def test_the_rules_show_what_was_measured():
    """The figures in their docstrings are those of the stored results."""
    folder, shown = Path(__file__).parents[1] / "benchmarks/results/cpu", 0
    strided = ("formulations-strided", "formulations-strided-more")
    drawn = [f"formulations-drawn-{i}" for i in (1, 2, 3, 4)]
    avx2 = ("formulations-avx2", "formulations-avx2-more")
    intel = ("formulations-intel", "formulations-intel-few", "formulations-intel-narrow")
    for rule, operations, *names in (
        (xla_cpu_forward.forward, OPERATIONS[:2], *intel, "formulations"),
        (xla_cpu_groups.grouped, OPERATIONS[:2], *intel, *drawn),
        (xla_cpu_groups.depthwise, OPERATIONS[:2], *intel, "formulations", *drawn),
        (xla_cpu_groups._sums_at_once, OPERATIONS[:2], "formulations-intel-taps"),
        (xla_cpu_forward._strided, OPERATIONS[:1], *intel, *drawn),
        (xla_cpu_kernel_grad.kernel_grad, OPERATIONS[2:], *intel, "formulations", *drawn),
        (xla_cpu_kernel_grad._grouped, OPERATIONS[2:], *intel, *drawn),
        (xla_cpu._parts_pay, OPERATIONS[::2], "formulations"),
        (xla_cpu_forward._spread, OPERATIONS[1:2], *strided, "formulations-transposed"),
        (xla_cpu_kernel_grad._strided, OPERATIONS[2:], *intel, *strided),
        (xla_cpu_bounds.bfloat16_pays, OPERATIONS[:2], *avx2),
        (xla_cpu_bounds.pads_cost, OPERATIONS[:2], *avx2),
    ):
        found = {}
        for name in (*names, "formulations-cores"):
            found |= _measured(folder / f"{name}.json")
        columns = []
        for line in rule.__doc__.splitlines():
            if re.fullmatch(r"\s*=+(  =+)+", line):
                columns = [slice(*m.span()) for m in re.finditer("=+", line)]
            if not re.match(r"\s*N\d+ T\d+ C", line):
                continue
            name, *cells = (line[column].strip() for column in columns)
            transposed = " E" in name  # of which the forward pass is told
            for operation, cell in zip(
                OPERATIONS[:1] if transposed else operations, cells, strict=True
            ):
                for figure in filter(None, re.split(r"\s{2,}", cell)):
                    formulation, values = figure.split()
                    several = "/" in values
                    for cores, value in zip(
                        ("together", "apart")
                        if several
                        else ("together" if transposed else "unknown",),
                        values.split("/"),
                        strict=True,
                    ):
                        digit = 0.1 if "." in value else 1
                        key = name, operation, formulation
                        lay = [c for c in (cores, "together", "apart") if (*key, c) in found]
                        measured = found[*key, lay[0]]
                        assert abs(measured - float(value)) <= digit / 2 + 1e-3, (name, figure)
                        shown += 1
    assert shown > 200


def _causal(operation, sizes, dtype="float32", D=1) -> Problem:
    """On a CPU: N, T, C, O, K and the stride."""
    N, T, C, O, K, S = sizes
    spec, dtype = ConvSpec(T, K, S, (D * (K - 1), 0), D), np.dtype(jnp.dtype(dtype))
    return Problem(operation, spec, N, C, O, *[dtype] * 3, None, "cpu")


@pytest.mark.parametrize("sizes, forward, input_grad, kernel_grad", [
    # In several steps: minimal filtering, products by taps, blocks of taps.
    ((8, 1000, 64, 64, 3, 16), "padded", "native", "winograd"),
    ((32, 784, 25, 25, 7, 16), "padded", "native", "canonical"),
    ((8, 400, 20, 20, 5, 8), "scatter", "scatter", "canonical"),
    ((4, 500, 32, 32, 5, 8), "padded", "native", "padded"),
    ((4, 2000, 20, 20, 21, 4), "padded", "native", "padded"),
    ((4, 2000, 12, 12, 21, 4), "scatter", "scatter", "padded"),
    ((4, 2000, 8, 8, 21, 4), "blocks", "blocks", "padded"),
    ((1, 7500, 15, 15, 51, 8), "blocks", "blocks", "padded"),
    # Those that see padding, by themselves.
    ((8, 1000, 64, 64, 3, 256), "parts", "native", "parts"),
    ((4, 1000, 64, 64, 15, 64), "parts", "parts", "parts"),
    ((8, 1000, 128, 128, 3, 256), "parts", "parts", "parts"),
    # Little to do, of many channels and of few.
    ((1, 100, 450, 450, 3, 4), "im2col", "matmuls", "im2col"),
    ((1, 128, 512, 512, 3), "padded", "matmuls", "im2col"),
    ((1, 80, 600, 600, 3, 4), "padded", "matmuls", "im2col"),
    ((1, 16, 600, 600, 3), "padded", "im2col", "im2col"),
    ((1, 16, 256, 256, 3), "im2col", "im2col", "im2col"),
    ((2, 64, 8, 8, 3, 2), "im2col", "im2col", "im2col"),
    ((4, 4000, 4, 4, 8), "shifts", "shifts", "canonical"),
    ((4, 4000, 2, 2, 3), "shifts", "shifts", "tree"),
    ((4, 4000, 2, 2, 8), "shifts", "shifts", "canonical"),
    # From a few channels to many, by more taps and fewer.
    ((4, 2000, 4, 128, 12), "padded", "scatter", "im2col"),
    ((4, 2000, 4, 128, 13), "padded", "scatter", "canonical"),
    ((4, 2000, 4, 96, 12), "padded", "scatter", "canonical"),
], ids=str)  # fmt: skip
def test_choice_for_cores_that_may_lie_apart(sizes, forward, input_grad, kernel_grad):
    N, T, C, O, K, D = (*sizes, 1)[:6]
    problems = [_causal(operation, (N, T, C, O, K, 1), D=D) for operation in OPERATIONS]
    assert [xla.choose(p) for p in problems] == [forward, input_grad, kernel_grad]


def _strided(operation, sizes, expected):
    """A problem of which that is chosen, the same in bfloat16, and with a dilation."""
    problem = _causal(operation, sizes)
    assert xla.choose(problem) == expected
    # Who asks for a precision gets no minimal filtering.
    asked = xla.choose(dataclasses.replace(problem, precision=jax.lax.Precision.DEFAULT))
    assert "winograd" not in asked
    assert asked == expected or "winograd" in expected
    bfloat16 = np.dtype(jnp.bfloat16)
    narrow = dataclasses.replace(problem, lhs_dtype=bfloat16, rhs_dtype=bfloat16)
    spec = dataclasses.replace(problem.spec, kernel_dilation=2)
    return problem, narrow, dataclasses.replace(problem, spec=spec)


@pytest.mark.parametrize("sizes, expected", [
    ((1, 4000, 64, 64, 4, 2), "space_to_depth_winograd"),
    ((1, 4000, 64, 64, 17, 2), "space_to_depth"),
    ((4, 4000, 16, 16, 5, 2), "im2col"),
    ((4, 4000, 16, 16, 16, 8), "im2col"),
    ((4, 4000, 16, 16, 16, 4), "space_to_depth"),
    ((4, 1000, 64, 64, 3, 2), "im2col"),
    ((8, 1000, 64, 64, 3, 2), "canonical"),
    ((8, 1000, 64, 64, 5, 2), "canonical"),
    ((4, 2000, 32, 32, 9, 2), "space_to_depth"),
    ((8, 1000, 64, 64, 33, 2), "canonical"),
    ((12, 500, 128, 128, 10, 5), "space_to_depth_winograd"),
    ((4, 300, 128, 128, 9, 2), "space_to_depth_winograd"),
    ((2, 300, 128, 128, 9, 2), "space_to_depth"),  # sums over too few steps: see `sound`
])  # fmt: skip
def test_a_strided_kernel_gradient(sizes, expected):
    problem, narrow, dilated = _strided("conv1d_kernel_grad", sizes, expected)
    # Of bfloat16 matmuls are the fastest.
    assert xla.choose(narrow) == "im2col"
    assert xla.choose(dilated) == ("im2col" if problem.spec.kernel_size <= 16 else "canonical")


@pytest.mark.parametrize("sizes, dtype, D, expected", [
    ((1, 8000, 64, 64, 17, 2), "bfloat16", 1, "im2col"),
    ((1, 16000, 64, 64, 17, 2), "bfloat16", 1, "space_to_depth"),
    ((4, 16000, 32, 32, 64, 2), "bfloat16", 1, "space_to_depth"),
    ((1, 10000, 64, 64, 33, 2), "bfloat16", 2, "im2col"),
    ((1, 160000, 64, 64, 33, 2), "bfloat16", 2, "canonical"),
    ((2, 4000, 64, 1, 16, 2), "bfloat16", 1, "im2col"),
    ((8, 4000, 64, 1, 16, 2), "bfloat16", 1, "space_to_depth"),
    ((1, 10000, 64, 64, 5, 2), "float32", 2, "im2col"),
    ((1, 10000, 64, 64, 16, 2), "float32", 2, "matmuls"),
    ((2, 10000, 64, 64, 16, 2), "float32", 2, "canonical"),
])  # fmt: skip
def test_a_strided_kernel_gradient_holds_no_more_than_a_few_windows(sizes, dtype, D, expected):
    """A matmul of all windows: K/S times x."""
    assert xla.choose(_causal("conv1d_kernel_grad", sizes, dtype, D)) == expected


@pytest.mark.parametrize("sizes, dtype, expected", [
    ((4, 4096, 2, 64, 8), "float32", "canonical"),
    ((4, 4096, 2, 64, 8), "bfloat16", "im2col"),
    ((4, 4096, 2, 128, 8), "float32", "im2col"),
    ((4, 4096, 2, 64, 7), "float32", "im2col"),
    ((4, 4096, 4, 64, 4), "float32", "canonical"),
    ((4, 4096, 1, 64, 8), "float32", "im2col"),
    ((4, 4096, 1, 64, 16), "float32", "canonical"),
    ((4, 4096, 1, 128, 16), "float32", "im2col"),
    ((4, 4096, 1, 256, 24), "float32", "im2col"),
    ((4, 4096, 4, 256, 16), "float32", "canonical"),
    ((4, 4096, 4, 512, 16), "float32", "im2col"),
    ((4, 4096, 4, 128, 12), "float32", "im2col"),
])  # fmt: skip
def test_a_kernel_gradient_of_few_channels(sizes, dtype, expected):
    assert xla.choose(_causal("conv1d_kernel_grad", (*sizes, 1), dtype)) == expected


@pytest.mark.parametrize("sizes, expected", [
    ((8, 4000, 1, 64, 16, 2), "scatter"),
    ((8, 4000, 2, 64, 16, 4), "scatter"),
    ((8, 4000, 1, 64, 31, 3), "scatter"),
    ((8, 4000, 4, 64, 16, 4), "depth_to_space_im2col"),
    ((8, 4000, 64, 1, 16, 2), "depth_to_space_im2col"),
    ((1, 10000, 64, 64, 64, 2), "depth_to_space_im2col"),
    ((1, 40000, 64, 64, 64, 2), "depth_to_space"),
    ((16, 16000, 256, 256, 16, 2), "depth_to_space"),
])  # fmt: skip
def test_a_strided_input_gradient_in_bfloat16(sizes, expected):
    """Few channels in are written down by taps; else a matmul reads all windows, if those fit."""
    assert xla.choose(_causal("conv1d_input_grad", sizes, "bfloat16")) == expected


@pytest.mark.parametrize("operation", OPERATIONS[1:])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_strided_gradients_are_filtered_in_float32_alone(operation, dtype):
    sizes = (4, 1000, 128, 128, 8, 4)
    assert "winograd" not in xla.choose(_causal(operation, sizes, dtype))
    assert "winograd" in xla.choose(_causal(operation, sizes))


def test_strided_gradients_are_filtered_where_each_tap_sees_something_and_little_is_held():
    """Of a tap that sees padding alone the gradient would be what its neighbours' rounding is."""
    for operation in OPERATIONS[1:]:
        assert "winograd" in xla.choose(_causal(operation, (4, 1000, 128, 128, 8, 4)))
        assert "winograd" not in xla.choose(_causal(operation, (4, 100000, 128, 128, 8, 4)))
    problem = _causal("conv1d_kernel_grad", (4, 1000, 128, 128, 4, 2))
    unseen = dataclasses.replace(problem.spec, padding=(501, 0))
    assert xla.choose(dataclasses.replace(problem, spec=unseen)) == "im2col"


@pytest.mark.parametrize("sizes, expected", [
    ((8, 1000, 64, 64, 3, 2), "scatter"),
    ((32, 6616, 20, 20, 3, 4), "depth_to_space"),  # of all samples, too
    ((4, 1000, 128, 128, 4, 2), "scatter"),
    ((4, 1000, 128, 128, 8, 4), "depth_to_space_winograd"),
    ((4, 1000, 128, 128, 11, 2), "depth_to_space"),  # of six taps a phase: see `sound`
    ((4, 2000, 32, 32, 9, 2), "depth_to_space"),
    ((4, 2000, 16, 64, 8, 4), "depth_to_space"),
    ((4, 2000, 64, 16, 16, 4), "depth_to_space"),
    ((4, 2000, 64, 64, 16, 4), "depth_to_space_winograd"),
    ((4, 2000, 64, 16, 17, 2), "depth_to_space"),
    ((1, 100000, 16, 32, 4, 2), "depth_to_space"),  # of which "scatter" would hold too much
    ((4, 4000, 64, 1, 16, 8), "matmuls"),
    ((4, 4000, 64, 1, 17, 2), "matmuls"),
    ((2, 8000, 1, 64, 17, 2), "scatter"),
    ((2, 8000, 4, 64, 16, 4), "depth_to_space"),
    ((2, 8000, 4, 64, 31, 3), "native"),
])  # fmt: skip
def test_a_strided_input_gradient(sizes, expected):
    problem, narrow, dilated = _strided("conv1d_input_grad", sizes, expected)
    few = problem.spec.kernel_size <= 8 and problem.spec.time < 100000
    scatters = few or (problem.C == 1 and problem.O > 1)
    assert xla.choose(narrow) == ("scatter" if scatters else "depth_to_space_im2col")
    assert "depth" not in xla.choose(dilated)


@pytest.mark.parametrize("sizes, expected", [
    ((1, 32, 512, 256, 16, 8), "native"),  # too few rows to be worth laying out
    ((1, 129, 512, 256, 16, 8), "depth_to_space"),
    ((16, 32, 512, 256, 16, 8), "depth_to_space_winograd"),
    ((4, 2048, 128, 64, 4, 2), "depth_to_space"),
    ((4, 2048, 64, 64, 4, 2), "scatter"),
    ((2, 2048, 128, 64, 5, 2), "scatter"),
    ((4, 2048, 128, 64, 5, 2), "depth_to_space"),
    ((8, 3999, 512, 1, 16, 8), "scatter"),
])  # fmt: skip
def test_a_transposed_layer(sizes, expected):
    N, T, C, O, K, E = sizes
    case = Case("up", batch=(N,), T=T, C=C, O=O, K=K, E=E, padding=K - 1 - (K - E) // 2)
    assert xla.choose(case.problem("conv1d")) == expected


@pytest.mark.parametrize(
    "name", ["depth_to_space", "depth_to_space_winograd", "depth_to_space_im2col"]
)
@pytest.mark.parametrize("K", [2, 3, 4, 7, 8])
def test_a_row_sees_no_more_than_its_steps_do(name, K):
    """Of taps that fill no row there is none that multiplies a NaN with zero."""
    spec = ConvSpec(41, K, stride=3, padding=(K - 1, 2))
    problem = Problem(
        "conv1d_input_grad", spec, 1, 1, 1, *[np.dtype(np.float32)] * 3, None, platform="cpu"
    )
    g = np.where(np.eye(spec.out_time, dtype=bool)[..., None, None], np.nan, 0).astype(np.float32)
    run = jax.jit(jax.vmap(lambda g: xla.run_as(name, problem, g[None, :, 0], jnp.ones((K, 1, 1)))))
    first = 3 * np.arange(spec.out_time)[:, None] - spec.padding[0]
    seen = (np.arange(41) >= first) & (np.arange(41) < first + K)
    np.testing.assert_array_equal(np.asarray(run(g))[:, 0, :, 0], np.where(seen, np.nan, 0))


@pytest.mark.parametrize("name", ["space_to_depth", "space_to_depth_winograd"])
@pytest.mark.parametrize("K, D", [(3, 1), (5, 1), (4, 2)])
def test_what_no_output_sees_is_in_no_row(name, K, D):
    """Be it beyond the last output, be it before the first one: a NaN there reaches no gradient."""
    spec = ConvSpec(46, K, stride=4, padding=(-5, -3), kernel_dilation=D)
    x = np.random.default_rng(0).standard_normal((2, 46, 3)).astype(np.float32)
    g = np.ones((2, spec.out_time, 4), np.float32)
    seen = 5 + 4 * (spec.out_time - 1) + (K - 1) * D
    x[:, :5] = x[:, seen + 1 :] = np.nan
    assert seen < 46 - 3 - 1  # there is something that was neither cropped nor seen
    problem = Problem(
        "conv1d_kernel_grad", spec, 2, 3, 4, *[np.dtype(np.float32)] * 3, None, platform="cpu"
    )
    assert np.isfinite(xla.run_as(name, problem, x, g)).all()


def test_what_a_gradient_reads_is_computed_once():
    """Not anew in whatever cuts, pads or transposes it for the gradient."""

    def loss(x, w):
        return jnp.sum(conv1d(jnp.maximum(2 * x, 0.5), w, kernel_dilation=2) ** 2)

    arrays = jnp.zeros((4, 1000, 64)), jnp.zeros((3, 64, 64))
    hlo = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile().as_text()
    assert hlo.count(" maximum(") == 1


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ((4, 1000, 128, 4, 2, 8), "im2col"),
        ((4, 4000, 128, 8, 2, 8), "split"),
        ((2, 500, 768, 8, 1, 64), "im2col"),
        ((16, 2000, 768, 8, 1, 64), "split"),
        ((1, 187, 64, 7, 1, 8), "im2col"),
        ((1, 272, 96, 15, 1, 2), "im2col"),
        ((1, 2195, 48, 3, 1, 8), "split"),
        ((32, 179, 80, 5, 1, 4), "split"),
        ((32, 497, 8, 9, 1, 8), "split"),
        ((8, 1887, 192, 7, 2, 192), "channel_blocks"),
        ((8, 1623, 192, 7, 1, 192), "tree"),
    ],
)
def test_a_kernel_gradient_of_groups_holds_no_more_than_a_few_copies(sizes, expected):
    N, T, C, K, S, G = sizes
    spec = ConvSpec(T, K, stride=S, padding=(K - 1, 0), groups=G)
    float32 = np.dtype(np.float32)
    problem = Problem("conv1d_kernel_grad", spec, N, C, C, *[float32] * 3, None, platform="cpu")
    assert xla.choose(problem) == expected


@pytest.mark.parametrize("sizes, expected", [
    ((8, 1000, 4, 7), "split"),
    ((8, 1000, 8, 7), "tree"),
    ((8, 1000, 8, 9), "split"),
    ((8, 1000, 8, 17), "channel_blocks"),
    ((8, 1000, 12, 9), "channel_blocks"),
    ((8, 1000, 24, 9), "tree"),
    ((8, 1000, 64, 8), "tree"),
    ((8, 1000, 64, 9), "channel_blocks"),
    ((8, 1000, 64, 9, 16), "tree"),  # a piece would copy 128 steps more than its own
    ((8, 1000, 64, 9, 1, 3), "tree"),
    ((8, 1000, 64, 9, 1, 2), "channel_blocks"),
], ids=str)  # fmt: skip
def test_a_depthwise_kernel_gradient(sizes, expected):
    N, T, C, K, D, S = (*sizes, 1, 1)[:6]
    spec, float32 = ConvSpec(T, K, S, ((K - 1) * D, 0), D, groups=C), np.dtype("float32")
    problem = Problem("conv1d_kernel_grad", spec, N, C, C, *[float32] * 3, None, platform="cpu")
    assert xla.choose(problem) == expected
