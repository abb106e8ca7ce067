"""The Triton kernels' machine code, and what XLA makes of layers that use them."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("jax_triton")

from conv_pallas import aot, conv1d
from conv_pallas.kernels import triton_compat
from tests.cases import Case
from tests.triton_machine_code import SHARED_BYTES, codes

pytestmark = pytest.mark.aot


def _case(name, C, O=None, **kwargs) -> Case:
    kwargs = dict(batch=(8,), T=4096, D=4, dtype="bfloat16") | kwargs
    return Case(name, C=C, O=O or C, **kwargs)


# Every tile that a launcher's heuristic picks appears for one of these.
EVERYWHERE = (
    _case("dense", 512),
    _case("ragged", 25, 30),
    _case("tf32", 256, dtype="float32"),
    _case("tf32x3", 256, dtype="float32", precision="high"),
    _case("ieee", 256, dtype="float32", precision="highest"),
    _case("depthwise", 512, G=512, K=4),
)
HOPPER = (
    _case("narrow", 64, K=5),
    _case("tiny", 16, batch=(1,), T=100, dtype="float16"),
    _case("grouped", 256, G=8),
    _case("strided", 64, S=2),
    _case("one_channel", 1, 16),
    _case("mixed", 64, out_dtype="float32"),
    _case("depthwise_float32", 256, G=256, S=2, dtype="float32"),
    _case("multiplier", 64, 256, G=64, K=31),
)


def _all_three(case: Case, x, w):
    y, vjp = jax.vjp(lambda x, w: conv1d(x, w, **case.kwargs, implementation="triton"), x, w)
    return y, *vjp(y)


def _structs(case: Case):
    return aot.struct(case.x_shape, case.dtype), aot.struct(case.kernel_shape, case.dtype)


@pytest.mark.parametrize(
    "chip, case",
    [(chip, case) for chip in ("a100", "h200", "b200") for case in EVERYWHERE]
    + [("h200", case) for case in HOPPER],
    ids=str,
)
def test_machine_code_is_as_promised(chip, case):
    made = codes(chip, functools.partial(_all_three, case), *_structs(case))
    assert len(made) in (2, 3)  # forward and input gradient may be the same code
    for code in made:
        assert code.spills == 0, code
        assert code.shared <= SHARED_BYTES[chip], code
        assert ("dense" in code.name) == (case.G < case.C or case.C == 1), code
        if "dense" in code.name:
            assert (code.tensor_cores > 0) == (case.precision != "highest"), code
    if chip != "h200":
        return
    if case.name in ("dense", "tf32", "tf32x3", "narrow", "grouped"):
        for code in made:
            assert code.opcodes["UTMALDG"] > 0, code
            assert code.opcodes["LDG"] == code.opcodes["LDGSTS"] == 0, code
    if case.name in ("dense", "tf32", "tf32x3", "narrow"):
        assert all(code.opcodes["HGMMA"] > 0 for code in made), made


def test_depthwise_loads_are_as_wide_as_they_get():
    (forward, *_) = codes("h200", functools.partial(_all_three, EVERYWHERE[-1]),
                          *_structs(EVERYWHERE[-1]))  # fmt: skip
    # 4 taps of 32 steps and 128 channels by 128 threads, 16 bytes at a time; and the kernel.
    assert forward.opcodes["LDG"] <= 4 * (32 * 128 // 128 // 8 + 1), forward


def _instructions(hlo: str):
    """Opcode and number of elements of every instruction of an HLO module."""
    for shape, opcode in re.findall(r"= \w+\[([\d,]*)\][^ ]* ([\w-]+)\(", hlo):
        yield opcode, math.prod(int(size) for size in shape.split(",") if size)


@pytest.mark.parametrize(
    "case", [EVERYWHERE[0], EVERYWHERE[2], EVERYWHERE[-1], HOPPER[2], HOPPER[3]], ids=str
)
def test_a_training_step_moves_no_activation(case):
    from flax import nnx

    from conv_pallas.nn import Conv

    layer = Conv(
        case.C, case.O, case.K, strides=case.S, kernel_dilation=case.D, padding="CAUSAL",
        feature_group_count=case.G, dtype=jnp.dtype(case.dtype), implementation="triton",
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    graph, state = nnx.split(layer)

    def step(state, x):
        loss = lambda state, x: jnp.sum(nnx.merge(graph, state)(x).astype(jnp.float32) ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(state, x)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, state, grads[0]), grads[1]

    structs = jax.tree.map(lambda a: aot.struct(a.shape, a.dtype), state)
    hlo = aot.compile_for("h200", step, structs, _structs(case)[0]).as_text()
    assert hlo.count('custom_call_target="triton_kernel_call_ffi"') == 3
    activation = math.prod(case.out_shape)
    moved = {"pad", "transpose", "copy", "concatenate", "gather", "convolution"}
    assert [i for i in _instructions(hlo) if i[0] in moved and i[1] >= activation] == []


@pytest.mark.parametrize("chip, capability", [("a100", 80), ("h200", 90), ("b200", 100)])
def test_a_kernel_knows_the_chip_it_is_compiled_for(chip, capability, monkeypatch):
    seen, call = [], triton_compat.call

    def spy(*args, **kwargs):
        seen.append(triton_compat.compute_capability())
        return call(*args, **kwargs)

    monkeypatch.setattr(triton_compat, "call", spy)
    case = dataclasses.replace(HOPPER[1], name="small")
    f = lambda x, w: conv1d(x, w, **case.kwargs, implementation="triton")  # noqa: E731
    aot.lower_for(chip, f, *_structs(case))
    assert seen == [capability]
