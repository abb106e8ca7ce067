"""Time split over GPUs that are not here: what XLA makes of halos around kernels."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("jax_triton")

from conv_pallas import aot, conv1d
from tests.cases import Case

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("shipped")]

DEVICES = 4
DENSE = Case("dense", batch=(1,), T=65536, C=256, O=256, D=8, dtype="bfloat16")
DEPTHWISE = Case("depthwise", batch=(1,), T=65536, C=256, O=256, K=4, G=256, dtype="bfloat16")

each_case = pytest.mark.parametrize("case", [DENSE, DEPTHWISE], ids=str)
each_mesh = pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)


def _entry(case: Case, kind, f) -> list[str]:
    """The program of one of several H200, instruction by instruction in the order they run."""
    mesh = Mesh(np.array(aot.devices("h200", DEVICES)), ("t",), axis_types=(kind,))

    def struct(shape, *spec):
        sharding = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    operands = struct(case.x_shape, None, "t"), struct(case.kernel_shape), struct((case.O,))
    hlo = aot.compile_for("h200", f, *operands, struct(case.out_shape, None, "t")).as_text()
    return hlo[hlo.index("\nENTRY") :].splitlines()


def _forward(case: Case):
    def f(x, w, b, g=None):
        return conv1d(x, w, b, **case.geometry, activation="silu", implementation="triton")

    return f


def _step(case: Case):
    def f(x, w, b, g):
        y, vjp = jax.vjp(_forward(case), x, w, b)
        return y, vjp(g)

    return f


def _passes(case: Case, lines: list[str]) -> list[str]:
    """What XLA itself makes of the size of a part of x, but for what a kernel writes into."""
    part, found = math.prod(case.x_shape) // DEVICES, []
    for line in lines:
        made = re.search(r"= \(?\w+\[([\d,]*)\][^=]*? ([\w-]+)\(", line)
        if made and math.prod(int(n) for n in made[1].split(",") if n) >= part:
            known = ("parameter", "custom-call", "get-tuple-element", "tuple", "bitcast")
            if made[2] not in known and "calls=%dynamic-slice-fusion" not in line:
                found.append(line)
    return found


@pytest.mark.sampled
@each_mesh
@each_case
def test_a_kernel_runs_while_the_halo_travels_and_nothing_is_copied(case, kind):
    lines = _entry(case, kind, _forward(case))
    assert _passes(case, lines) == []
    where = lambda text: next(i for i, line in enumerate(lines) if text in line)  # noqa: E731
    kernel = where('custom_call_target="triton_kernel_call_ffi"')
    assert where("collective-permute-start(") < kernel < where("collective-permute-done(")


@pytest.mark.sampled
@each_mesh
@each_case
def test_a_training_step_copies_nothing(case, kind):
    """One elementwise pass makes gz, of which each gradient needs its own halo."""
    lines = _entry(case, kind, _step(case))
    (gz,) = _passes(case, lines)
    assert "concatenate" not in gz and "copy" not in gz and "pad" not in gz
    assert not any("all-gather" in line for line in lines)
