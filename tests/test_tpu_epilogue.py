"""Bias, activation and their gradients in the TPU kernels, interpreted with race detection."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conv_pallas.kernels import tpu_dense, tpu_depthwise, tpu_epilogue, tpu_time_in_lanes
from conv_pallas.kernels.tpu_in_place import gradient_in_place, placement
from conv_pallas.spec import ACTIVATIONS
from tests.cases import Case
from tests.reference import SLOPES, VALUES
from tests.tpu_interpreter import MEGACORE, V5E, fresh_interpreter, params
from tests.triton_epilogue import Fused

__all__ = ["fresh_interpreter"]  # a fixture
pytestmark = pytest.mark.usefixtures("hardly_optimized")

SMALL = dataclasses.replace(V5E, vmem=900 * 2**10)
_BFLOAT16 = dict(dtype="bfloat16")
_HIGHEST = dict(precision="highest")
_DENSE = Case("dense", T=37, C=24, O=40, D=5, **_BFLOAT16)
_IN_PLACE = Case("in_place", T=37, C=128, O=128, D=5, **_BFLOAT16)  # a halo shorter than a tile
_WHOLE = Case("whole", T=96, C=128, O=40, D=5, **_BFLOAT16)  # and in whole tiles
# In so little memory that C and O are split.
_SPLIT = Case("split", batch=(1,), T=20, C=260, O=260, K=3, **_BFLOAT16)
_DEPTHWISE = Case("depthwise", T=37, C=24, O=24, G=24, K=4, D=3, **_HIGHEST)
_FEW = Case("few", T=137, C=24, O=40, D=5, **_BFLOAT16)  # in two tiles
_FEW_WHOLE = Case("few_whole", batch=(4,), T=37, C=3, O=5, K=4, padding="SAME", **_HIGHEST)
FUSED = (
    Fused(_FEW, "relu"),
    Fused(_FEW, "sigmoid", wanted=(True, False, True)),
    Fused(_FEW_WHOLE, "silu"),
    Fused(_FEW_WHOLE, None, wanted=(False, True, True)),
    Fused(_DENSE, "relu"),
    Fused(Case("same", T=33, C=8, O=130, K=4, padding="SAME", **_HIGHEST), "silu"),
    Fused(_IN_PLACE, "silu"),
    Fused(_WHOLE, "relu"),
    Fused(_WHOLE, "gelu"),
    Fused(_SPLIT, "relu", wanted=(False, True, True)),
    Fused(_DENSE, None, wanted=(False, True, True)),
    Fused(_DENSE, "sigmoid", wanted=(True, False, True)),
    Fused(_DEPTHWISE, "gelu"),
    Fused(Case("wide", T=20, C=136, O=136, G=136, D=2, **_BFLOAT16), "gelu_exact", bias=False),
    Fused(Case("multiplier", T=20, C=6, O=12, G=6, D=2, **_HIGHEST), "tanh"),
)


def test_the_functions():
    z = np.linspace(-30, 30, 3001)
    for name, saved in ACTIVATIONS.items():
        want, slope = VALUES[name](z), SLOPES[name](z)
        single = z.astype(np.float32)
        np.testing.assert_allclose(tpu_epilogue.value(name, single), want, atol=2e-6, err_msg=name)
        known = (want if saved == "y" else z).astype(np.float32)
        got = tpu_epilogue.gradient(name, np.float32(1), jax.numpy.asarray(known))
        np.testing.assert_allclose(got, slope, atol=4e-6, err_msg=name)


def test_some_are_in_place():
    plan = tpu_dense._plan_of(_IN_PLACE.problem("conv1d", "tpu"), V5E, 32)
    assert placement(plan.walk, _IN_PLACE.C, plan.BO) == "causal"
    plan = tpu_dense._plan_of(_WHOLE.problem("conv1d_kernel_grad", "tpu"), V5E, 32)
    assert gradient_in_place(plan.walk, np.dtype(jnp.bfloat16), plan.BC, plan.BO, V5E.mxu)


def test_one_has_tiles_of_channels():
    plan = tpu_dense._plan_of(_SPLIT.problem("conv1d_kernel_grad", "tpu"), SMALL, 16)
    assert plan.BC < _SPLIT.C and plan.BO < _SPLIT.O


@pytest.mark.sampled
@pytest.mark.parametrize("fused", FUSED, ids=lambda f: f.name)
def test_kernels(fused):
    few = fused.case in (_FEW, _FEW_WHOLE)
    module = tpu_depthwise if fused.case.G > 1 else tpu_time_in_lanes if few else tpu_dense
    fused = dataclasses.replace(fused, platform="tpu")
    problem = fused.problem()
    x, w, bias, gy, saved = fused.arrays()
    assert module.KERNEL.decline_fused(problem) is None
    assert module.KERNEL.decline_backward(problem, fused.wanted) is None
    longest = 128 if few else 32 if fused.case in (_IN_PLACE, _WHOLE) else 16
    options = dict(longest=longest, interpret=params())
    chip = {_DENSE: MEGACORE, _SPLIT: SMALL}.get(fused.case, V5E)
    if all(fused.wanted):
        y = module.KERNEL.fused(problem, x, w, bias, chip=V5E, **options)
        fused.check_forward(y, x, w, bias)
        if problem.epilogue.saved == "z":
            kernel = dataclasses.replace(
                module.KERNEL, fused=functools.partial(module.KERNEL.fused, chip=V5E, **options)
            )
            fused.check_kept(kernel, x, w, bias)
    grads = module.KERNEL.backward(
        problem, x, w, bias, saved, gy, fused.wanted, chip=chip, **options
    )
    fused.check_backward(grads, x, w, bias, gy)
