"""The arithmetic of the TPU kernels, interpreted on the CPU with race detection.

The last tests plant one mistake of each kind, so that the harness is known to see it.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from conv_pallas.kernels import (
    tpu_dense,
    tpu_depthwise,
    tpu_in_place,
    tpu_matmul,
    tpu_time_in_lanes,
)
from conv_pallas.spec import OPERATIONS, lhs_rhs_out
from tests import tpu_random
from tests.cases import Case
from tests.tolerance import REFERENCES
from tests.tpu_interpreter import MEGACORE, V5E, check_kernel, fresh_interpreter, params, raced

__all__ = ["fresh_interpreter"]  # a fixture
pytestmark = pytest.mark.usefixtures("hardly_optimized")

DENSE = (
    Case("causal", T=40, C=8, O=16, D=4),
    Case("halo_longer_than_tile", T=60, C=8, O=8, D=24),
    Case("time_shorter_than_halo", T=12, C=4, O=8, D=7),
    Case("ragged", T=37, C=25, O=30, K=2, D=3),
    Case("wide", batch=(1,), T=24, C=150, O=130, D=1),
    Case("lanes", batch=(1,), T=40, C=128, O=128, D=5),
    Case("same", T=50, C=3, O=5, K=4, D=9, padding="SAME"),
    Case("valid", T=50, C=3, O=5, D=11, padding="VALID"),
    Case("crop", T=70, C=3, O=5, D=2, padding=[(-20, -3)]),
    Case("pad_beyond_field", T=20, C=3, O=5, K=2, padding=[(40, 25)]),
    Case("one_tile_late", T=32, C=3, O=5, K=2, padding=[(17, 0)]),
    Case("dead_taps", T=10, C=3, O=5, K=5, D=8, padding="SAME"),
    Case("pointwise", T=20, C=3, O=5, K=1),
    Case("anticausal", T=37, C=3, O=5, D=6, padding=[(0, 12)]),
    Case("bfloat16", T=40, C=16, O=16, D=5, dtype="bfloat16"),
    Case("bfloat16_to_float32", T=40, C=16, O=16, D=2, dtype="bfloat16", out_dtype="float32"),
    Case("high", T=40, C=16, O=16, D=3, precision="high"),
    Case("highest", T=40, C=130, O=16, D=3, precision="highest"),
    Case(
        "mixed",
        T=48,
        C=128,
        O=16,
        K=2,
        D=5,
        dtype="bfloat16",
        out_dtype="float32",
        precision="highest",
    ),
)


# In tiles of 128 steps: several, or one, with and without padding on either side.
FEW = (
    Case("causal", T=300, C=8, O=16, D=4),
    Case("halo_longer_than_tile", T=400, C=8, O=8, D=150),
    Case("time_shorter_than_halo", T=12, C=4, O=8, D=7),
    Case("ragged", T=197, C=25, O=30, K=2, D=3),
    Case("one_tile", batch=(6,), T=100, C=25, O=30, K=2, D=3),
    Case("several_samples", batch=(5,), T=20, C=3, O=5, K=4, D=9, padding="SAME"),
    Case("same", T=300, C=3, O=5, K=4, D=9, padding="SAME"),
    Case("valid", T=300, C=3, O=5, D=11, padding="VALID"),
    Case("crop", T=400, C=3, O=5, D=2, padding=[(-220, -3)]),
    Case("crop_in_one_tile", T=70, C=3, O=5, D=2, padding=[(-20, -3)]),
    Case("pad_beyond_field", T=20, C=3, O=5, K=2, padding=[(300, 205)]),
    Case("dead_taps", T=10, C=3, O=5, K=5, D=8, padding="SAME"),
    Case("pointwise", T=200, C=1, O=128, K=1),
    Case("anticausal", T=300, C=3, O=5, D=6, padding=[(0, 12)]),
    Case("bfloat16", T=300, C=16, O=16, D=5, dtype="bfloat16"),
    Case("bfloat16_to_float32", T=100, C=17, O=16, D=2, dtype="bfloat16", out_dtype="float32"),
    Case("high", T=200, C=16, O=16, D=3, precision="high"),
    Case("highest", T=200, C=60, O=16, D=3, precision="highest"),
)

DEPTHWISE = (
    Case("depthwise", T=40, C=8, O=8, G=8, K=4),
    Case("depthwise_dilated", T=60, C=130, O=130, G=130, D=24, K=2),
    Case("depthwise_same", T=37, C=25, O=25, G=25, K=7, D=3, padding="SAME", dtype="bfloat16"),
    Case("depthwise_crop", T=50, C=4, O=4, G=4, padding=[(-19, -2)]),
)


@pytest.mark.sampled
@pytest.mark.parametrize("operation", ["conv1d", "conv1d_kernel_grad"])
@pytest.mark.parametrize("case", DENSE, ids=str)
def test_dense(case, operation):
    check_kernel(tpu_dense, case, operation)


# The device code is the forward's; what differs is the geometry.
@pytest.mark.sampled
@pytest.mark.parametrize(
    "name", ["causal", "halo_longer_than_tile", "ragged", "crop", "pad_beyond_field", "dead_taps"]
)
def test_dense_input_grad(name):
    (case,) = (case for case in DENSE if case.name == name)
    check_kernel(tpu_dense, case, "conv1d_input_grad")


@pytest.mark.sampled
@pytest.mark.parametrize("operation", ["conv1d", "conv1d_kernel_grad"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_few_channels(case, operation):
    check_kernel(tpu_time_in_lanes, case, operation, longest=128)


# As of `tpu_dense`; a causal one of one tile, and one that walks backwards.
@pytest.mark.sampled
@pytest.mark.parametrize(
    "name", ["causal", "halo_longer_than_tile", "one_tile", "several_samples", "crop"]
)
def test_few_channels_input_grad(name):
    (case,) = (case for case in FEW if case.name == name)
    check_kernel(tpu_time_in_lanes, case, "conv1d_input_grad", longest=128)


def test_few_channels_take_several_samples_where_one_is_short():
    plans = {
        case.name: tpu_time_in_lanes._plan_of(case.problem("conv1d", "tpu"), V5E, longest)
        for case in FEW
        for longest in [512 if case.name == "one_tile" else 128]
    }
    assert plans["one_tile"].samples == 3  # of 6, four fit
    assert plans["one_tile"].walk.whole and plans["one_tile"].walk.steps == 1
    assert plans["causal"].samples == 1 and plans["causal"].walk.steps == 3
    check_kernel(tpu_time_in_lanes, FEW[4], "conv1d", longest=512)
    check_kernel(tpu_time_in_lanes, FEW[4], "conv1d_kernel_grad", MEGACORE, longest=512)


def test_time_in_lanes_takes_the_shortest_tile_where_no_other_fits():
    case = Case("large", batch=(4,), T=1024, C=450, O=600, K=1, precision="high")
    for operation in OPERATIONS:
        plan = tpu_time_in_lanes._plan_of(case.problem(operation, "tpu"), MEGACORE)
        assert plan.walk.rows == 128 and plan.vmem <= MEGACORE.budget


def test_dense_in_tiles_of_channels():
    # So little memory that C and O must be split.
    chip = dataclasses.replace(V5E, vmem=900 * 2**10)
    case = Case("channels", batch=(1,), T=20, C=260, O=260, K=3)
    for operation in OPERATIONS:
        plan = tpu_dense._plan_of(case.problem(operation, "tpu"), chip, 16)
        assert plan.BO < case.O
        assert plan.BC < case.C or operation != "conv1d_kernel_grad"
        check_kernel(tpu_dense, case, operation, chip)


IN_PLACE = (
    Case("ragged_end", T=70, C=128, O=128, D=3, dtype="bfloat16"),
    Case("halo_of_whole_tiles", T=128, C=128, O=128, D=16, dtype="bfloat16"),
    Case("converted", T=64, C=128, O=130, K=2, D=5),
    Case("four_taps", T=64, C=128, O=128, K=4, D=2),
    # The last steps of x are cropped off: no tap sees them.
    Case("cropped", T=96, C=128, O=40, K=2, D=5, padding=[(5, -32)], dtype="bfloat16"),
    Case("in_place_gradient", T=96, C=128, O=40, K=2, D=5, dtype="bfloat16"),
    # As that one, but the gradient of the kernel takes more passes than one.
    Case(
        "mixed_in_place",
        T=96,
        C=128,
        O=40,
        K=2,
        D=5,
        dtype="bfloat16",
        out_dtype="float32",
        precision="highest",
    ),
)


@pytest.mark.sampled
@pytest.mark.parametrize("mxu", [128, 256])
@pytest.mark.parametrize("case", IN_PLACE, ids=str)
def test_in_place(case, mxu):
    """Taps are read where x lies; on a wide unit some make columns of their own."""
    chip = dataclasses.replace(V5E, mxu=mxu)
    for operation, placed in (("conv1d", "causal"), ("conv1d_input_grad", "mirrored")):
        if mxu == 128 and case.name == "four_taps":
            continue
        plan = tpu_dense._plan_of(case.problem(operation, "tpu"), chip, 64 if case.D > 5 else 32)
        C, O = (case.C, case.O) if placed == "causal" else (case.O, case.C)
        found = tpu_in_place.placement(plan.walk, C, plan.BO)
        if (case.name in ("ragged_end", "cropped") and placed == "mirrored") or C % 128:
            assert found is None
            continue
        assert found == placed
        beside = tpu_in_place.older_taps(plan.walk, C, plan.BO, O, chip)
        assert (beside > 0) == (mxu == 256 and case.K > 2)
        check_kernel(tpu_dense, case, operation, chip, longest=plan.walk.rows)
    rows = 64 if case.D > 5 else 32
    plan = tpu_dense._plan_of(case.problem("conv1d_kernel_grad", "tpu"), chip, rows)
    placed = tpu_in_place.gradient_in_place(plan.walk, np.dtype(case.dtype), case.C, case.O, mxu)
    fitting = ("halo_of_whole_tiles", "in_place_gradient", "cropped", "mixed_in_place")
    assert placed == (case.name in fitting)
    if placed:
        check_kernel(tpu_dense, case, "conv1d_kernel_grad", chip, longest=rows)


@pytest.mark.parametrize(
    ("K", "operation"), [(3, "conv1d"), (3, "conv1d_input_grad"), (5, "conv1d")]
)
def test_a_step_reaches_only_what_meets_it(K, operation):
    """Also where an odd number of taps is side by side: no zero takes the place of the last."""
    case = Case("odd", batch=(1,), T=64, C=128, O=128, K=K, D=2, dtype="bfloat16")
    chip, problem = dataclasses.replace(V5E, mxu=256), case.problem(operation, "tpu")
    plan = tpu_dense._plan_of(problem, chip, 32)
    assert tpu_in_place.older_taps(plan.walk, case.C, plan.BO, case.O, chip) == K // 2
    x, w, g = case.arrays()
    lhs = x if operation == "conv1d" else g
    lhs[:, 20], lhs[:, 45, 7] = np.nan, np.inf  # of one channel, or infinities would cancel
    out = tpu_dense.launch(problem, lhs, w, chip, longest=32, interpret=params())
    out, expected = np.asarray(out, np.float64), REFERENCES[operation](lhs, w, case.spec)
    for what in (np.isnan, np.isposinf, np.isneginf):
        assert what(expected).any()
        np.testing.assert_array_equal(what(out), what(expected))
    rest = np.isfinite(expected)
    np.testing.assert_allclose(out[rest], expected[rest], rtol=0.01, atol=0.01)


def test_parts_of_the_kernel_gradient_are_added_in_order():
    case = Case("parts", batch=(4,), T=40, C=8, O=8)
    one = check_kernel(tpu_dense, case, "conv1d_kernel_grad", MEGACORE)
    two = check_kernel(tpu_dense, case, "conv1d_kernel_grad", MEGACORE)
    np.testing.assert_array_equal(one, two)


EACH = pytest.mark.parametrize(
    "module, G", [(tpu_dense, 1), (tpu_time_in_lanes, 1), (tpu_depthwise, 8)]
)


@pytest.mark.sampled
@EACH
def test_what_is_cropped_leaves_the_kernel_gradient_alone(module, G):
    case = Case("cropped", T=40, C=8, O=8, G=G, padding=[(2, -5)], precision="highest")
    problem = case.problem("conv1d_kernel_grad", "tpu")
    x, _, g = case.arrays()
    longest = 128 if module is tpu_time_in_lanes else 16
    gradient = lambda x: module.launch(problem, x, g, V5E, longest=longest, interpret=params())  # noqa: E731
    expected = gradient(x)
    x[:, -5:] = np.nan
    np.testing.assert_array_equal(gradient(x), expected)


@pytest.mark.sampled
@pytest.mark.parametrize("module, G, T", [
    (tpu_dense, 1, 200), (tpu_depthwise, 8, 200),
    (tpu_time_in_lanes, 1, 200), (tpu_time_in_lanes, 1, 300),
])  # fmt: skip
def test_a_step_that_a_tap_does_not_meet_leaves_its_gradient_alone(module, G, T):
    """Past the last output, in a last tile that is not whole: of lanes one tile, or two."""
    case = Case("unmet", batch=(1,), T=T, C=8, O=8, G=G, D=5, dtype="bfloat16")
    problem = case.problem("conv1d_kernel_grad", "tpu")
    x, _, g = case.arrays()
    longest = 256 if module is tpu_time_in_lanes else 128
    x[:, -3:] = np.nan  # which tap 2 alone meets
    run = functools.partial(module.launch, problem, x, g, V5E, longest=longest)
    dw, db = run(interpret=params(), sum_bias=True)
    expected = REFERENCES["conv1d_kernel_grad"](x, g, case.spec)
    assert np.isfinite(expected[:2]).all() and np.isnan(expected[2]).all()
    np.testing.assert_allclose(np.asarray(dw, np.float64), expected, rtol=0.02, atol=0.02)
    np.testing.assert_allclose(db, np.asarray(g, np.float64).sum((0, 1)), rtol=1e-3, atol=1e-3)


@EACH
def test_int8_is_declined(module, G):
    problem = Case("int8", C=8, O=8, G=G, dtype="int8").problem("conv1d", "tpu")
    assert module.decline(problem) == "takes bfloat16 and float32, not int8"


@pytest.mark.sampled
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_depthwise(case, operation):
    check_kernel(tpu_depthwise, case, operation)


def test_geometry_at_random_is_right(capsys):
    """A few seeds, of each kernel one, so that the program stays whole."""
    assert tpu_random.main(["--seed", "6064", "--cases", "4"]) == 0
    assert capsys.readouterr().out == "seeds 6064 to 6067: {'empty': 1, 'right': 3}\n"


# --- The harness sees what it is there for ---


def copies(*, wait: bool = True, first: int = 0, read: int = 16):
    """Copies 16 rows from ``first`` on into VMEM, by hand, and returns ``read`` of them doubled."""

    def kernel(x_hbm, y_ref, window, semaphore):
        start = first + pl.program_id(0)  # not known before it runs
        source = x_hbm.at[pl.ds(start, 16)]
        copy = pltpu.make_async_copy(source, window.at[pl.ds(0, 16)], semaphore)
        copy.start()
        if wait:
            copy.wait()
        y_ref[...] = 2 * window[pl.ds(0, read)]
        if not wait:
            copy.wait()

    return pl.pallas_call(
        kernel,
        grid=(1,),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct((read, 128), jnp.float32),
        scratch_shapes=[pltpu.VMEM((32, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        interpret=params(),
    )(jnp.ones((16, 128), jnp.float32))


def test_a_split_is_as_close_as_two_roundings_to_nearest():
    """So the product of two second parts, which nobody computes, is at most a 2**-16th."""
    a = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    high, low = (np.asarray(part, np.float64) for part in tpu_matmul.split(a))
    assert (np.abs(low) <= 2.0**-8 * np.abs(a)).all()
    assert (np.abs(high + low - a) <= 2.0**-17 * np.abs(a)).all()


def test_a_split_keeps_what_is_no_number_and_the_largest_that_are():
    a = np.array([np.inf, -np.inf, 3.4e38, -3.4e38, 3.39e38], np.float32)
    high, low = (np.asarray(part, np.float64) for part in tpu_matmul.split(a))
    np.testing.assert_allclose(high + low, a, rtol=2.0**-15)
    np.testing.assert_array_equal(low[:2], 0)
    # NaNs whose bits are rounded to those of an infinity and of a zero.
    bits = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    high, low = (np.asarray(part, np.float32) for part in tpu_matmul.split(bits))
    assert np.isnan(high).all() and (low == 0).all()


@pytest.mark.parametrize("module", [tpu_dense, tpu_time_in_lanes])
@pytest.mark.parametrize("operation", ["conv1d", "conv1d_kernel_grad"])
def test_an_infinity_stays_one_in_three_passes(module, operation):
    """Also times what is a bfloat16 already, whose second part is zero."""
    case = Case("infinite", batch=(1,), T=16, C=8, O=8, precision="high")
    lhs, rhs, _ = lhs_rhs_out(operation, *case.arrays())
    lhs[0, 3, 0], lhs[0, 7, 1] = np.inf, 3.4e38
    rhs[...] = 0.5 * np.sign(rhs)
    problem = case.problem(operation, "tpu")
    longest = 128 if module is tpu_time_in_lanes else 16
    out = module.launch(problem, lhs, rhs, V5E, longest=longest, interpret=params())
    expected = REFERENCES[operation](lhs, rhs, case.spec)
    assert np.isinf(expected).any() and (np.abs(expected) > 1e38).any()
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=1e-4, atol=1e-4)


def test_a_correct_copy_passes():
    np.testing.assert_array_equal(copies(), 2.0)


def test_a_missing_wait_is_caught():
    raises = jax.__version_info__ >= (0, 12)
    with pytest.raises(Exception, match=r"[Rr]ace") if raises else contextlib.nullcontext():
        jax.block_until_ready(copies(wait=False))
    assert raises or raced()
    pltpu.reset_tpu_interpret_mode_state()


def test_a_copy_out_of_bounds_is_caught():
    with pytest.raises(Exception, match=r"[Oo]ut.of.bound"):
        jax.block_until_ready(copies(first=1))


def test_a_read_of_uninitialised_memory_is_caught():
    assert np.isnan(copies(read=24)[16:]).all()
