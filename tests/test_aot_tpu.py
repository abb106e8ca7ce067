"""The TPU kernels, compiled by libtpu for chips that are not here."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import export

pytest.importorskip("libtpu")

from benchmarks.layers import LAYERS
from benchmarks.static_matrix import declined
from benchmarks.traffic import hbm_bytes
from conv_pallas import aot, conv1d
from conv_pallas.inspection import structs
from conv_pallas.kernels.tpu_layout import along_lanes
from conv_pallas.kernels.tpu_window import Chip
from conv_pallas.nn import TCN

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("shipped")]

# Of each model the layer with the most dilation: the longest halo.
LAST = {
    layer.model: layer
    for layer in LAYERS
    if not declined(layer) and (layer.G == 1 or layer.C == layer.O)
}
# Narrow, ragged, wide, with a halo longer than a tile, on the vector unit.
SPREAD = ("tcn-adding", "tcn-ptb-characters", "wavenet", "wide-and-long", "mamba-2.8b", "depthwise")


def _all_three(layer, implementation="pallas_tpu", activation=None):
    """``(x, kernel, *bias) -> (y, dx, dw, *db)``."""

    def run(*operands):
        y, vjp = jax.vjp(
            lambda *operands: conv1d(
                *operands, **layer.geometry, activation=activation, implementation=implementation
            ),
            *operands,
        )
        return y, *vjp(y)

    return run


def _structs(layer):
    return structs(layer)[:2]


def _kernels(compiled) -> int:
    """How many Pallas kernels the program has."""
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


@pytest.mark.sampled
@pytest.mark.parametrize(
    "chip, model",
    [("v5e", model) for model in LAST]
    + [(chip, model) for chip in aot.TPUS if chip != "v5e" for model in SPREAD],
)
def test_published_layers_compile(chip, model):
    layer = LAST[model]
    compiled = aot.compile_for(chip, _all_three(layer), *_structs(layer))
    assert _kernels(compiled) == 3


@pytest.mark.parametrize("chip, channels", [("v4", 130), ("v5e", 450), ("v6e", 200)])
def test_depthwise_channels_that_end_within_lanes_compile(chip, channels):
    layer = dataclasses.replace(LAST["mamba-2.8b"], C=channels, O=channels, G=channels)
    assert _kernels(aot.compile_for(chip, _all_three(layer), *_structs(layer))) == 3


@pytest.mark.sampled
@pytest.mark.parametrize("precision", ["high", "highest"])
@pytest.mark.parametrize("chip, model", [("v4", "tcn-music"), ("v6e", "tcn-music"),
                                         ("v5e", "tcn-adding"), ("v6e", "tcn-copy")])  # fmt: skip
def test_float32_products_compile(chip, model, precision):
    layer = dataclasses.replace(LAST[model], dtype="float32")
    with jax.default_matmul_precision(precision):
        compiled = aot.compile_for(chip, _all_three(layer), *_structs(layer))
    assert _kernels(compiled) == 3


@pytest.mark.sampled
@pytest.mark.parametrize(
    "chip, model, activation",
    [
        ("v4", "tcn-music", "gelu_exact"),
        ("v4", "tcn-mnist", "silu"),
        ("tpu7x", "atacworks", "gelu"),
        ("v5e", "tcn-music", "tanh"),
        ("v5e", "mamba-2.8b", "gelu"),
        ("v6e", "bfloat16", "silu"),
        ("v6e", "depthwise", "sigmoid"),
        ("tpu7x", "conv-tasnet", "relu"),
    ],
)
def test_fused_layers_compile(chip, model, activation):
    """Bias and activation in the forward kernel, their gradients in the two others."""
    layer = LAST[model]
    bias = aot.struct((layer.O,), layer.dtype)
    compiled = aot.compile_for(
        chip, _all_three(layer, activation=activation), *_structs(layer), bias
    )
    assert _kernels(compiled) == 3


def test_what_a_kernel_declines_with_64_bits_goes_to_xla():
    """Pallas's loops do not compile where jax_enable_x64 is on, also of float32 and bfloat16."""
    layer = LAST["bfloat16"]
    bias = aot.struct((layer.O,), layer.dtype)
    step = _all_three(layer, implementation=None, activation="gelu")
    assert _kernels(aot.compile_for("v6e", step, *_structs(layer), bias)) > 0  # the default
    with jax.enable_x64(True):
        assert _kernels(aot.compile_for("v6e", step, *_structs(layer), bias)) == 0
        ordered = _all_three(layer)
        with pytest.raises(NotImplementedError, match="where jax_enable_x64 is on"):
            aot.lower_for("v6e", ordered, *_structs(layer))


@pytest.mark.sampled
@pytest.mark.parametrize("chip", ["v4", "v6e"])
def test_a_model_exported_on_a_cpu_compiles_on_a_tpu(chip):
    """The host that exports knows no chip; what it saves suits the least of them."""
    model = TCN(24, (32, 32), 8, kernel_size=3, dropout=0.0, implementation="pallas_tpu",
                rngs=nnx.Rngs(0))  # fmt: skip
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    at = [i for i, a in enumerate(leaves) if jax.numpy.issubdtype(a.dtype, jax.numpy.inexact)]

    def step(leaves, x):
        def loss(parameters):
            here = dict(zip(at, parameters, strict=True))
            filled = [here.get(i, leaf) for i, leaf in enumerate(leaves)]
            return jax.numpy.square(nnx.merge(graph, tree.unflatten(filled))(x)).mean()

        return jax.value_and_grad(loss)([leaves[i] for i in at])

    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves]
    x = aot.struct((2, 200, 24), "float32")
    saved = export.export(jax.jit(step), platforms=("tpu",))(structs, x).serialize()
    compiled = aot.compile_for(chip, export.deserialize(saved).call, structs, x)
    assert _kernels(compiled) >= 11  # four convolutions, three operations, but for x's gradient


def test_what_is_exported_on_a_tpu_has_the_tiles_of_the_least(monkeypatch):
    """It may meet another chip than that of the host which exports it."""

    def saved():
        layer = lambda x, w: conv1d(x, w, activation="relu", implementation="pallas_tpu")  # noqa: E731
        step = lambda x, w: jax.vjp(layer, x, w)[1](x)  # noqa: E731
        structs = aot.struct((2, 4096, 512), "bfloat16"), aot.struct((7, 512, 512), "bfloat16")
        return export.export(jax.jit(step), platforms=("tpu",))(*structs).mlir_module()

    # What Mosaic makes of it is its own affair; this is the memory that each kernel claims.
    claimed = lambda module: re.findall(r"size\W+22: (\d+)", module)  # noqa: E731
    anywhere = claimed(saved())
    with aot.as_on("v6e"):
        chip = Chip.current()
    monkeypatch.setattr(Chip, "current", lambda: chip)
    jax.clear_caches()
    assert claimed(saved()) == anywhere and len(anywhere) == 3


def test_many_taps_that_lie_along_lanes_fit_in_memory():
    """Each of 128 taps is a rotated copy of the window, and both results are kept."""
    x, w, bias = (aot.struct(s, "float32") for s in ((2, 8192, 1), (128, 1, 128), (128,)))
    with jax.default_matmul_precision("highest"):
        step = lambda *operands: jax.vjp(  # noqa: E731
            lambda *operands: conv1d(
                *operands, activation="gelu_exact", implementation="pallas_tpu"
            ),
            *operands,
        )[0]
        assert _kernels(aot.compile_for("v5p", step, x, w, bias)) > 0


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_lies_along_lanes_is_what_the_compiler_says(dtype):
    """Of arguments and results it is the axis that is written first in their layout."""
    shapes = [
        (64, 784, 25), (128, 784, 25), (120, 784, 25), (100, 1000, 32), (128, 1024, 32),
        (256, 16, 32), (64, 64, 32), (8, 1000, 192), (32, 400, 450), (16, 80, 600), (4, 1000, 600),
        (8, 16000, 128), (64, 784, 1), (8, 1000, 127), (8, 1000, 130), (3, 5, 7), (2, 100, 100),
        (8, 1000, 1000),
    ]  # fmt: skip
    arrays = [aot.struct(shape, dtype) for shape in shapes]
    text = aot.compile_for("v6e", lambda arrays: [a * 2 for a in arrays], arrays).as_text()
    told = text.split("entry_computation_layout=")[1].split("}\n")[0].split("->")
    for part in told[:2]:
        lanes = [int(axis) for axis in re.findall(r"\[\d+,\d+,\d+\]\{(\d)", part)]
        assert ["NTC"[axis] for axis in lanes[: len(shapes)]] == [along_lanes(*s) for s in shapes]


def test_a_network_of_few_channels_has_our_kernels_by_default():
    """All but what makes 25 channels of one, of which there is no estimate; gradients as well."""
    model = TCN(1, (25, 25), 10, kernel_size=7, dropout=0.0, rngs=nnx.Rngs(0))
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def step(parameters, x):
        def loss(parameters):
            return jax.numpy.square(nnx.merge(graph, parameters, rest)(x)).mean()

        return jax.value_and_grad(loss)(parameters)

    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), parameters)
    compiled = aot.compile_for("v6e", step, shapes, aot.struct((8, 512, 1), "float32"))
    assert _kernels(compiled) == 4 * 3


@pytest.mark.sampled
@pytest.mark.parametrize("chip", ["v4", "v5e", "v6e"])
@pytest.mark.parametrize(
    "C, O, dtype, K",
    [(512, 512, "bfloat16", 3), (128, 128, "bfloat16", 31), (256, 384, "float32", 4)],
)
def test_packed_sequences(chip, C, O, dtype, K):
    """Three kernels that nobody has to ask for, which move what those of one sequence do."""
    x, w, ids, g = (
        aot.struct((2, 4096, C), dtype),
        aot.struct((K, C, O), dtype),
        aot.struct((2, 4096), jnp.int32),
        aot.struct((2, 4096, O), dtype),
    )

    def step(implementation, x, w, ids, g, *, packed):
        options = dict(implementation=implementation, segment_ids=ids if packed else None)
        y, vjp = jax.vjp(lambda x, w: conv1d(x, w, kernel_dilation=2, **options), x, w)
        return y, vjp(g)

    made = aot.compile_for(chip, lambda *a: step(None, *a, packed=True), x, w, ids, g)
    plain = aot.compile_for(chip, lambda *a: step("pallas_tpu", *a, packed=False), x, w, ids, g)
    assert _kernels(made) == _kernels(plain) == 3
    moved = [hbm_bytes(program.as_text()) for program in (made, plain)]
    assert moved[0] < 1.15 * moved[1], moved
