"""What the rules for CPUs choose on processors that differ in what they can do with 16 bits."""

import dataclasses

import pytest

from conv_pallas import _host
from conv_pallas._layers import Layer
from conv_pallas.kernels import xla

FORWARD, INPUT_GRAD, KERNEL_GRAD = "conv1d", "conv1d_input_grad", "conv1d_kernel_grad"
WITH, WITHOUT = ("avx512_bf16", "amx_bf16"), ("avx512f", "avx2", "sve", "asimd", None)


def problem(sizes, operation, dtype="bfloat16"):
    *sizes, padding = sizes if isinstance(sizes[-1], str) else (*sizes, "CAUSAL")
    N, T, C, O, K, D, S, G = (*sizes, 1, 1, 1)[:8]
    layer = Layer("case", "made up", N, T, C, O, K, D, S, G, padding, dtype=dtype)
    return layer.problem(operation, "cpu")


CASES = [
    # Depthwise: pads before the first step, behind the last one, on both sides, of one tap.
    ((4, 2000, 128, 128, 3, 1, 1, 128), FORWARD, "scatter", "scatter"),
    ((4, 2000, 128, 128, 3, 1, 1, 128), INPUT_GRAD, "scatter", "matmuls"),
    ((4, 2000, 128, 128, 3, 64, 1, 128, "SAME"), FORWARD, "scatter", "matmuls"),
    ((4, 2000, 128, 128, 2, 1, 1, 128, "SAME"), FORWARD, "scatter", "scatter"),
    ((32, 97, 512, 512, 2, 128, 1, 512, "SAME"), FORWARD, "scatter", "scatter"),
    ((4, 2000, 128, 128, 5, 8, 1, 128), FORWARD, "scatter", "scatter"),
    ((4, 2000, 128, 128, 6, 1, 1, 128), FORWARD, "scatter", "matmuls"),
    ((4, 1000, 64, 256, 3, 1, 1, 64, "SAME"), FORWARD, "scatter", "matmuls"),
    # Of more taps a few at once.
    ((4, 2000, 128, 128, 9, 1, 1, 128), FORWARD, "matmuls", "matmuls"),
    ((4, 2000, 128, 128, 9, 1, 1, 128, "SAME"), INPUT_GRAD, "matmuls", "matmuls"),
    ((4, 2000, 128, 128, 9, 2, 2, 128), FORWARD, "own_pads", "own_pads"),
    ((4, 2000, 128, 128, 9, 2, 2, 128, "SAME"), FORWARD, "own_pads", "matmuls"),
    # Phases of one tap, or one and two; of two each they are slow.
    ((8, 2155, 48, 48, 3, 1, 4, 48), INPUT_GRAD, "depth_to_space_im2col", "depth_to_space_im2col"),
    ((4, 2000, 128, 128, 3, 1, 2, 128), INPUT_GRAD, *["depth_to_space_im2col"] * 2),
    ((4, 2000, 128, 128, 4, 1, 2, 128), INPUT_GRAD, "scatter", "matmuls"),
    # Dense, of channels that fill registers and of such that don't.
    ((1, 338, 192, 192, 3), FORWARD, "im2col", "padded"),
    ((1, 338, 192, 192, 3), INPUT_GRAD, "im2col", "native"),
    ((1, 338, 192, 192, 3), KERNEL_GRAD, "im2col", "padded"),
    ((2, 779, 64, 64, 31, "SAME"), FORWARD, "blocks", "native"),
    ((32, 4218, 12, 12, 3), FORWARD, "im2col", "im2col"),
    ((8, 2000, 2, 64, 7), FORWARD, "im2col", "shifts"),
    ((4, 1000, 256, 256, 1), FORWARD, "matmuls", "padded"),
    ((8, 1000, 16, 16, 1), FORWARD, "matmuls", "matmuls"),
    ((32, 1642, 96, 96, 2, 1, 2, "SAME"), FORWARD, "im2col", "native"),
    ((2, 794, 25, 25, 3, 1, 4), FORWARD, "im2col", "im2col"),
    ((16, 2946, 8, 8, 15, 1, 2, "SAME"), KERNEL_GRAD, "canonical", "space_to_depth"),
    ((16, 2946, 24, 24, 15, 1, 2, "SAME"), KERNEL_GRAD, "im2col", "space_to_depth"),
    ((8, 1000, 4, 4, 5, 1, 2), FORWARD, "shifts", "padded"),
    ((8, 1000, 8, 8, 4, 1, 4), FORWARD, "im2col", "padded"),
    ((8, 1000, 12, 12, 5, 1, 2), FORWARD, "padded", "padded"),
    ((8, 179, 16, 16, 7, 1, 4), KERNEL_GRAD, "im2col", "im2col"),
    ((8, 1000, 32, 32, 16), FORWARD, "blocks", "padded"),
    ((4, 1000, 64, 16, 15), FORWARD, "scatter", "scatter"),
    ((4, 1000, 64, 16, 15), INPUT_GRAD, "im2col", "native"),
    ((4, 2000, 4, 512, 9, 16), FORWARD, "im2col", "padded"),
    # Groups.
    ((2, 400, 384, 384, 3, 1, 4, 4), FORWARD, "matmuls", "padded"),
    ((8, 500, 256, 256, 5, 1, 2, 8, "SAME"), FORWARD, "split", "split"),
    ((1, 138, 192, 192, 31, 1, 2, 4), FORWARD, "split", "padded"),
    ((4, 1000, 64, 64, 3, 1, 1, 4), FORWARD, "im2col", "split"),
    ((4, 1000, 96, 96, 3, 1, 1, 8, "SAME"), FORWARD, "im2col", "split"),
    ((4, 1000, 128, 128, 3, 1, 1, 16), FORWARD, "im2col", "im2col"),
    ((8, 500, 128, 128, 5, 1, 1, 2), FORWARD, "im2col", "split"),
    ((4, 1000, 96, 96, 3, 1, 1, 8, "SAME"), KERNEL_GRAD, "im2col", "split"),
]


@pytest.mark.parametrize("sizes, operation, expected, without", CASES, ids=str)
def test_bfloat16_asks_the_processor(sizes, operation, expected, without, monkeypatch):
    asked = problem(sizes, operation)
    for there, name in [*((v, expected) for v in WITH), *((v, without) for v in WITHOUT)]:
        monkeypatch.setattr(_host, "vectors", lambda there=there: there)
        assert xla.choose(asked) == name, there


@pytest.mark.parametrize("sizes, operation, expected, without", CASES, ids=str)
def test_an_export_may_run_on_any_processor(sizes, operation, expected, without):
    exported = dataclasses.replace(problem(sizes, operation), exported=True)
    assert xla.choose(exported) == without


@pytest.mark.parametrize("sizes, operation, expected, without", CASES, ids=str)
def test_float32_asks_nobody(sizes, operation, expected, without, monkeypatch):
    names = set()
    for there in (*WITH, *WITHOUT):
        monkeypatch.setattr(_host, "vectors", lambda there=there: there)
        names.add(xla.choose(problem(sizes, operation, "float32")))
    assert len(names) == 1


@pytest.mark.parametrize("K, expected", [(7, "depth_to_space_im2col"), (8, "scatter")])
def test_phases_of_two_taps_each_are_slow(K, expected):
    asked = problem((4, 2000, 128, 128, K, 1, 4, 128), INPUT_GRAD, "float32")
    assert xla.choose(asked) == expected


@pytest.mark.parametrize(
    "K, padding, pays",
    [(9, "CAUSAL", True), (14, "CAUSAL", True), (15, "CAUSAL", False), (9, "SAME", False)],
)
def test_depthwise_sums_with_padding_at_one_end(K, padding, pays, monkeypatch):
    """All taps at once: behind the last step, as in input gradients, only AVX512 is good at it."""
    sizes = (4, 2000, 128, 128, K, 1, 1, 128, padding)
    once = "scatter" if pays else "own_pads"
    for there, gradient in [("avx512f", once), ("avx512_bf16", once), ("avx2", "own_pads")]:
        monkeypatch.setattr(_host, "vectors", lambda there=there: there)
        assert xla.choose(problem(sizes, FORWARD, "float32")) == once, there
        assert xla.choose(problem(sizes, INPUT_GRAD, "float32")) == gradient, there
    monkeypatch.setattr(_host, "vectors", lambda: "avx512f")
    exported = dataclasses.replace(problem(sizes, INPUT_GRAD, "float32"), exported=True)
    assert xla.choose(exported) == "own_pads"
