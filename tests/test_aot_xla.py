"""What XLA makes of ``"xla"`` on GPUs and TPUs that are not here."""

import dataclasses
import functools
import importlib.metadata
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import device_layers, device_turns
from conv_pallas import aot, conv1d, inspection
from conv_pallas.kernels import xla, xla_gpu, xla_native
from conv_pallas.spec import OPERATIONS, ConvSpec, Problem

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("shipped")]

# name: N, T, C, O, K, D, S, G
LAYERS = {
    **{f"dense_dilated_{D}": (8, 4096, 256, 256, 3, D, 1, 1) for D in (1, 4, 64, 512)},
    **{f"depthwise_dilated_{D}": (8, 4096, 512, 512, 4, D, 1, 512) for D in (1, 64)},
    "depthwise_many_taps": (8, 1000, 512, 512, 87, 1, 1, 512),
    "multiplier": (8, 4096, 128, 512, 4, 8, 1, 128),
    "multiplier_many_taps": (2, 4096, 128, 512, 17, 2, 2, 128),
    "grouped": (8, 4096, 256, 256, 3, 64, 1, 8),
    "grouped_not_dilated": (8, 4096, 256, 256, 3, 1, 1, 8),
    "strided": (8, 4096, 256, 256, 4, 1, 2, 1),
    "strided_dilated": (8, 4096, 256, 256, 3, 8, 2, 1),
    "strided_grouped": (8, 4096, 256, 256, 3, 4, 2, 8),
    "grouped_many_taps": (8, 4096, 64, 64, 64, 1, 1, 8),
    "wide": (4, 4096, 32, 32, 21, 25, 1, 1),
    "pointwise": (8, 4096, 256, 256, 1, 1, 1, 1),
}


def problem_of(layer: str, operation, platform: str, dtype: str = "bfloat16") -> Problem:
    N, T, C, O, K, D, S, G = LAYERS[layer]
    spec = ConvSpec(T, K, S, ((K - 1) * D, 0), D, 1, G)
    dtype = np.dtype(jnp.dtype(dtype))
    return Problem(operation, spec, N, C, O, dtype, dtype, dtype, None, platform)


def compiled(chip: str, problem: Problem, run):
    lhs, rhs, _ = problem.shapes
    return aot.compile_for(
        chip,
        functools.partial(run, problem),
        aot.struct(lhs, problem.lhs_dtype),
        aot.struct(rhs, problem.rhs_dtype),
    )


def sizes(windows: list[str]) -> list[int]:
    return [int(re.search(r"size=(\d+)", w)[1]) for w in windows]


def check_windows(windows: list[str], K: int, D: int) -> None:
    """As many taps as the kernel has, and the dilation told to cuDNN."""
    assert all(size <= K for size in sizes(windows)), windows
    if D > 1 and K > 1:
        assert all(f"rhs_dilate={D}" in w for w in windows), windows


def _each():
    """Every operation of every layer in one dtype or the other by turns.

    And whatever formulation is chosen for an operation in both; and in bfloat16 those of groups,
    for their copies.
    """
    chosen = set()
    for (i, layer), (j, operation), (k, dtype) in itertools.product(
        enumerate(LAYERS), enumerate(OPERATIONS), enumerate(("bfloat16", "float32"))
    ):
        problem = problem_of(layer, operation, "cuda", dtype)
        how = xla.choose(problem), operation, dtype
        copied = problem.spec.groups > 1 and dtype == "bfloat16"
        if (i + j + k) % 2 == 0 or copied or how not in chosen:
            yield layer, operation, dtype
        chosen.add(how)


@pytest.mark.sampled
@pytest.mark.parametrize("layer, operation, dtype", list(_each()))
def test_h200_keeps_the_dilation(layer, operation, dtype):
    problem = problem_of(layer, operation, "cuda", dtype)
    made = compiled("h200", problem, xla.run)
    windows, spec = aot.conv_windows(made), problem.spec
    # What has no convolution left is written out tap by tap, or is matmuls.
    grouped = 1 < spec.groups and spec.kernel_size <= xla_gpu.TAPS
    several = grouped or (spec.stride > 1 and spec.kernel_dilation > 1)
    without = spec.kernel_size == 1 or (operation == "conv1d_kernel_grad" and several)
    assert bool(windows) != (problem.depthwise or without)
    if operation == "conv1d_kernel_grad":
        assert all(size <= spec.kernel_size for size in sizes(windows)), windows
        assert not any("dilate" in w for w in windows), windows
    else:
        check_windows(windows, spec.kernel_size, spec.kernel_dilation)
    if spec.groups > 1 and dtype == "bfloat16":
        _check_few_copies_and_few_kernels_whatever_the_taps(made, problem)


def _check_few_copies_and_few_kernels_whatever_the_taps(made, problem: Problem) -> None:
    held = made.memory_analysis().temp_size_in_bytes
    larger = 2 * max(math.prod(problem.x_shape), math.prod(problem.y_shape))  # of bfloat16
    assert held <= 7 * larger, held / larger
    if problem.depthwise:
        assert made.as_text().count(" fusion(") <= 20


@pytest.mark.parametrize("layer", ["dense_dilated_4", "grouped", "strided"])
def test_h200_copies_nothing_to_pad_both_sides_alike(layer):
    for operation in OPERATIONS[:2]:
        problem = problem_of(layer, operation, "cuda")
        low = sum(problem.spec.padding) // 2
        spec = dataclasses.replace(problem.spec, padding=(low, low))
        made = compiled("h200", dataclasses.replace(problem, spec=spec), xla.run)
        assert f"pad={low}_{low}" in aot.conv_windows(made)[0]
        kernel = 2 * math.prod(problem.w_shape)
        assert made.memory_analysis().temp_size_in_bytes <= 2 * kernel, operation


def test_h200_multiplies_no_zeros_between_the_steps_of_a_stride():
    made = compiled("h200", problem_of("strided", "conv1d_input_grad", "cuda"), xla.run)
    assert aot.conv_windows(made) == ["size=4 stride=2"]
    assert '"__cudnn$convBackwardInput"' in made.as_text()


def test_h200_multiplies_no_zeros_of_a_transposed_layer():
    """Which stock's writes down eight times as long, and whose window is as long as time."""
    x, w = aot.struct((16, 256, 256), jnp.bfloat16), aot.struct((16, 256, 128), jnp.bfloat16)
    g = aot.struct((16, 2048, 128), jnp.bfloat16)

    def made(implementation):
        conv = functools.partial(
            conv1d, input_dilation=8, padding=[(11, 11)], implementation=implementation
        )
        dx = lambda g, w: jax.linear_transpose(lambda x: conv(x, w), x)(g)  # noqa: E731
        dw = lambda x, g: jax.linear_transpose(lambda w: conv(x, w), w)(g)  # noqa: E731
        for f, arrays in ((conv, (x, w)), (dx, (g, w)), (dw, (x, g))):
            compiled = aot.compile_for("h200", f, *arrays)
            (call,) = re.findall(r"__cudnn\$conv(\w+)", compiled.as_text())[:1]
            padded = " pad(" in compiled.as_text()
            yield call, *aot.conv_windows(compiled), padded

    window = "size=16 stride=8 pad=4_4"
    operations = ("BackwardInput", "Forward", "BackwardFilter")
    assert list(made("xla")) == [(operation, window, False) for operation in operations]
    assert list(made("xla_native")) == [
        ("Forward", "size=16", True), ("Forward", window, False), ("Forward", "size=2048", True)
    ]  # fmt: skip


@pytest.mark.parametrize(("layer", "window"), [
    ("dense_dilated_1", "size=3"),
    ("dense_dilated_512", "size=3x1"),
    ("wide", "size=21x1"),
    ("strided", "size=4 stride=2"),
    ("grouped_many_taps", "size=64"),
])  # fmt: skip
def test_h200_these_kernel_gradients_are_cudnn_s(layer, window):
    made = compiled("h200", problem_of(layer, "conv1d_kernel_grad", "cuda"), xla.run)
    assert aot.conv_windows(made) == [window]
    assert made.as_text().count('"__cudnn$convBackwardFilter"') == 1


def test_parser_sees_what_it_looks_for():
    """The native form has the zero-filled kernel and the convolution as wide as time."""
    expected = {
        "conv1d": ["size=1025"],
        "conv1d_input_grad": ["size=1025"],
        "conv1d_kernel_grad": ["size=4096 stride=512"],
    }
    for operation, windows in expected.items():
        problem = problem_of("dense_dilated_512", operation, "cuda")
        assert aot.conv_windows(compiled("h200", problem, xla_native.run)) == windows


@pytest.mark.parametrize("chip", ["a100", "b200"])
def test_other_gpus(chip):
    problem = problem_of("dense_dilated_64", "conv1d", "cuda")
    check_windows(aot.conv_windows(compiled(chip, problem, xla.run)), 3, 64)


def layer_loss(implementation, D, x, kernel):
    y = conv1d(x, kernel, kernel_dilation=D, implementation=implementation)
    return jnp.sum(jnp.square(y.astype(jnp.float32)))


@pytest.mark.parametrize("D", [1, 64, 512])
def test_h200_value_and_gradients_of_a_layer(D):
    """Through the primitives: all three operations in one program."""
    f = jax.value_and_grad(functools.partial(layer_loss, "xla", D), (0, 1))
    x, kernel = (aot.struct(s, jnp.bfloat16) for s in ((8, 4096, 256), (3, 256, 256)))
    windows = aot.conv_windows(aot.compile_for("h200", f, x, kernel))
    assert sum("size=3x1" in w for w in windows) == (D > 1)  # the kernel gradient
    assert len(windows) == 3
    check_windows([w for w in windows if "size=3x1" not in w], 3, D)


TPU_LAYERS = ("dense_dilated_64", "depthwise_dilated_64", "grouped", "strided")


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("layer", "operation", "chip"),
    [(*case, chip) for case, chip in zip(
        itertools.product(TPU_LAYERS, OPERATIONS), itertools.cycle(aot.TPUS), strict=False
    )],
)  # fmt: skip
def test_one_tpu_or_another(layer, operation, chip):
    problem = problem_of(layer, operation, "tpu")
    shorter = dataclasses.replace(problem.spec, time=1024)  # it compiles in half the time
    assert compiled(chip, dataclasses.replace(problem, spec=shorter), xla.run).as_text()


def test_unknown_chip():
    with pytest.raises(ValueError, match=r"chip must be one of a100, h100, h200, .*got 'h20'"):
        aot.compile_for("h20", jnp.sin, aot.struct((3,), "float32"))


def test_more_chips_than_a_host_has():
    with pytest.raises(ValueError, match="has 4 of v5e, got count=5"):
        aot.devices("v5e", 5)


def test_missing_wheel(monkeypatch):
    monkeypatch.setattr(aot, "devices", aot.devices.__wrapped__)
    missing = importlib.metadata.PackageNotFoundError("libtpu")
    monkeypatch.setattr(importlib.metadata, "version", lambda wheel: raise_(missing))
    with pytest.raises(aot.MissingWheelError, match=r"needs the wheel libtpu.*aot"):
        aot.compile_for("v6e", jnp.sin, aot.struct((3,), "float32"))


def raise_(error):
    raise error


def test_h200_layer_that_is_padded_by_much_compiles_to_the_baseline():
    """Where a run on the device tells them apart, XLA's autotuner has chosen twice."""
    (layer,) = (layer for layer in device_layers.sweep(False) if layer.name == "tcn-ptb-words/D8")
    ours, barrier = (
        aot.compile_for("h200", device_layers.operation("forward", f), *inspection.structs(layer))
        for f in (device_layers.forward(name, layer, False) for name in ("xla", "barrier"))
    )
    told = device_turns.before_autotuning(ours.as_text())
    assert told == device_turns.before_autotuning(barrier.as_text())
    assert "__cudnn$convBiasActivationForward" in told
