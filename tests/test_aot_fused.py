"""What XLA makes of a whole layer and a whole model whose kernels carry bias and activation."""

import collections
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

pytest.importorskip("jax_triton")

from conv_pallas import aot, conv1d
from conv_pallas.nn import TCN
from tests.cases import Case

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("shipped")]

DENSE = Case("dense", batch=(8,), T=4096, C=512, O=512, D=4, dtype="bfloat16")
NARROW = Case("narrow", batch=(8,), T=4096, C=64, O=64, D=4, dtype="bfloat16")
DEPTHWISE = Case("depthwise", batch=(8,), T=4096, C=512, O=512, K=4, G=512, dtype="bfloat16")


def kernels(hlo: str) -> int:
    return hlo.count('custom_call_target="triton_kernel_call_ffi"')


def passes(hlo: str, elements: int) -> dict[str, int]:
    """How often each opcode, of XLA's own, gives an array of at least so many elements."""
    entry = hlo[hlo.index("\nENTRY") :]
    found = collections.Counter()
    for shape, opcode in re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? ([\w-]+)\(", entry):
        if math.prod(int(size) for size in shape.split(",") if size) >= elements:
            found[opcode] += 1
    return {
        name: n
        for name, n in found.items()
        if name not in ("parameter", "custom-call", "get-tuple-element", "tuple", "bitcast")
    }


@pytest.mark.sampled
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("case", [DENSE, NARROW, DEPTHWISE], ids=str)
def test_bias_and_activation(case, activation):
    """They cost no kernel and no pass: forward ever, and backward where a kernel can carry them."""
    x, w, g = (aot.struct(s, case.dtype) for s in (case.x_shape, case.kernel_shape, case.out_shape))
    b = aot.struct((case.O,), case.dtype)

    def forward(x, w, b):
        return conv1d(x, w, b, **case.geometry, activation=activation, implementation="triton")

    def step(x, w, b, g):
        y, vjp = jax.vjp(forward, x, w, b)
        return y, vjp(g)

    size = math.prod(case.out_shape)
    hlo = aot.compile_for("h200", forward, x, w, b).as_text()
    assert (kernels(hlo), passes(hlo, size)) == (1, {})
    hlo = aot.compile_for("h200", step, x, w, b, g).as_text()
    if case is DEPTHWISE:
        # One kernel for y and one for all gradients; z is nowhere.
        assert (kernels(hlo), passes(hlo, size)) == (2, {})
    elif activation is None or (case is NARROW and activation == "relu"):
        assert (kernels(hlo), passes(hlo, size)) == (3, {})
    else:
        # One elementwise pass: the matmuls want gz by TMA.
        assert (kernels(hlo), passes(hlo, size)) == (3, {"fusion": 1})


@pytest.mark.sampled
@pytest.mark.parametrize("case, activation, made, passed", [
    (DEPTHWISE, None, 2, {}), (DEPTHWISE, "silu", 2, {}), (NARROW, None, 3, {}),
    (NARROW, "relu", 3, {"fusion": 1}),
])  # fmt: skip
def test_packed_sequences(case, activation, made, passed):
    """As many kernels as without ids, and no pass over y but where a dense layer's gz is made."""
    x, w, g = (aot.struct(s, case.dtype) for s in (case.x_shape, case.kernel_shape, case.out_shape))
    b, ids = aot.struct((case.O,), case.dtype), aot.struct(case.x_shape[:-1], jnp.int32)

    def step(x, w, b, ids, g):
        forward = lambda x, w, b: conv1d(  # noqa: E731
            x, w, b, **case.geometry, activation=activation, segment_ids=ids
        )
        y, vjp = jax.vjp(forward, x, w, b)
        return y, vjp(g)

    hlo = aot.compile_for("h200", step, x, w, b, ids, g).as_text()
    assert (kernels(hlo), passes(hlo, math.prod(case.out_shape))) == (made, passed)


def test_what_is_kept_for_a_derivative_costs_no_pass():
    """Of silu z is kept: the kernel writes it beside y. What is left are the passes that make gz.

    Two layers, so that XLA can't make y of z in the pass that makes gz.
    """
    x, w, g = (
        aot.struct(s, NARROW.dtype) for s in (NARROW.x_shape, NARROW.kernel_shape, NARROW.out_shape)
    )

    def step(x, w, g):
        def forward(x, w):
            for _ in range(2):
                x = conv1d(x, w, **NARROW.geometry, activation="silu", implementation="triton")
            return x

        y, vjp = jax.vjp(forward, x, w)
        return y, vjp(g)

    hlo = aot.compile_for("h200", step, x, w, g).as_text()
    assert (kernels(hlo), passes(hlo, math.prod(NARROW.out_shape))) == (6, {"fusion": 2})


def test_a_whole_training_step_moves_no_activation():
    """Of a TCN: one kernel for each operation, and nothing that only moves numbers about."""
    channels, blocks = 64, 3
    model = TCN(channels, [channels] * blocks, channels, 3, 0.0, implementation="triton")
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def step(params, x, target):
        loss = lambda params: jnp.mean(jnp.square(nnx.merge(graph, params, rest)(x) - target))  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    params = jax.tree.map(lambda a: aot.struct(a.shape, a.dtype), params)
    x = aot.struct((8, 4096, channels), jnp.float32)
    hlo = aot.compile_for("h200", step, params, x, x).as_text()
    layers = 2 * blocks + 1
    # Forward, kernel gradient, and input gradient but for the first layer, whose input is data.
    assert kernels(hlo) == 3 * layers - 1
    moved = {"pad", "transpose", "copy", "concatenate", "gather", "convolution", "dot"}
    everywhere = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? ([\w-]+)\(", hlo)
    size = lambda shape: math.prod(int(n) for n in shape.split(",") if n)  # noqa: E731
    assert [(s, op) for s, op in everywhere if op in moved and size(s) >= math.prod(x.shape)] == []
