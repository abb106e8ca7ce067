"""The cases of `tests.triton_cases.NAMES`, by the Triton kernels that are shipped.

They know those kernels well: which of them takes a case, its tiles, what its gradients recompute.
What any kernel has to do is in `tests.added_kernels`.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable
from unittest import mock

os.environ |= {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}  # before both are imported

import numpy as np
from triton.runtime import interpreter

from conv_pallas import dispatch, kernels
from conv_pallas.kernels import (
    triton_common,
    triton_compat,
    triton_dense,
    triton_depthwise,
    triton_depthwise_walk,
)
from conv_pallas.spec import ACTIVATIONS, Epilogue, Problem, lhs_rhs_out
from tests import packed, triton_epilogue
from tests.cases import Case
from tests.reference import SLOPES, VALUES
from tests.support import padded, rows
from tests.tolerance import REFERENCES, check
from tests.triton_cases import PACKED, named, own_tile
from tests.triton_guarded import ran, tf32

files: list[str] = []  # those of the kernels that ran


def _kernel(problem: Problem) -> kernels.Kernel:
    kernel = dispatch.select(problem, ("triton",))
    (file,) = (name for name, k in kernels.discover()[0].items() if k is kernel)
    if file not in files:
        files.append(file)
    return kernel


@contextlib.contextmanager
def _as_named(name: str):
    """With the tile that a case is about, and few programs that stay: each has several tiles."""
    few = "resident" in name or name == "taps_tuned"
    processors = 1 if "onward" in name else 2 if few else triton_compat.processors()
    split = _in_four if "summed" in name else triton_dense.choose_splits
    cache = 0 if name.startswith("time_first") else triton_depthwise.L2_BYTES
    with (
        own_tile(name), mock.patch.object(triton_compat, "processors", lambda: processors),
        mock.patch.object(triton_dense, "choose_splits", split),
        mock.patch.object(triton_depthwise, "L2_BYTES", cache),
    ):  # fmt: skip
        yield


def _in_four(tiles: int, blocks: int, *rest) -> int:
    """Splits of a sum, where as many as fill a chip would leave each program a single block."""
    assert blocks > 8 and blocks % 4, blocks
    return 4


def run_case(case: Case, operation: str, capability: int) -> None:
    """Runs one operation of a case by whichever kernel takes it, and checks the result."""
    triton_compat.compute_capability = lambda: capability
    ran.clear()
    with _as_named(case.name):
        check_operation(case, operation)
    # The engine fetches their tiles; and a kernel gradient's may not end in the midst of time.
    stays = "resident" in case.name and capability >= 90 and case.S == 1
    wide = case.name == "resident_wide"  # not all of its channels are in one tile
    stays &= operation != "conv1d_kernel_grad" or not (wide or case.name == "resident_ragged")
    sizes = {"conv1d": (case.C,), "conv1d_input_grad": (case.O,)}
    stays &= all(n % 8 == 0 for n in sizes.get(operation, (case.C, case.O)))
    assert ran[0].startswith("conv_onward" if wide else "conv_resident") == stays, ran
    assert ran[0].startswith("conv_taps") == case.name.startswith("taps_"), ran


def check_operation(case: Case, operation: str) -> None:
    """Runs an operation on the chip and in the tiles that there are, and checks the result."""
    x, w, g = case.arrays()
    x, g = rows(padded(x, case)), rows(g)
    lhs, rhs, _ = lhs_rhs_out(operation, x, w, g)
    problem = case.problem(operation, "cuda")
    out = np.asarray(_kernel(problem).run(problem, lhs, rhs))
    check(
        out, operation, lhs, rhs, case.spec, out_dtype=problem.out_dtype,
        precision=case.precision, platform="cuda",
    )  # fmt: skip


def run_fused(name: str, capability: int) -> None:
    """Bias and activation in the forward pass, and all gradients."""
    triton_compat.compute_capability = lambda: capability
    fused = triton_epilogue.named(name)
    x, w, bias, gy, saved = fused.arrays()
    problem = fused.problem()
    kernel = _kernel(problem)
    assert kernel.fused is not None, f"{kernel.run.__module__} has no fused"
    assert kernel.decline_fused(problem) is None
    ran.clear()
    with _as_named(fused.name):
        _run_fused(fused, kernel, problem, (x, w, bias, gy, saved))
    if "resident" in fused.name and capability >= 90:
        few = {"conv_resident", "conv_resident_kernel_grad"}
        many = {"conv_onward", "conv_dense_kernel_grad"}  # and not all of its channels in a tile
        assert set(ran) == (many if "narrow" in fused.name else few), ran
    if fused.case.name.startswith("taps"):
        assert set(ran) == {"conv_taps", "conv_taps_kernel_grad"}, ran


def _run_fused(fused, kernel, problem, arrays) -> None:
    x, w, bias, gy, saved = arrays
    fused.check_forward(np.asarray(kernel.fused(problem, x, w, bias)), x, w, bias)
    if problem.epilogue.saved == "z" and not kernel.recomputes(problem):
        fused.check_kept(kernel, x, w, bias)
    assert kernel.decline_backward(problem, fused.wanted) is None
    out = kernel.backward(problem, x, w, bias, saved, gy, fused.wanted)
    fused.check_backward(out, x, w, bias, gy)
    if not np.isnan(x).any() and fused.activation == "relu":
        x[:] = np.nan  # of which no activation makes a number
        padding = fused.case.spec.padding[0]
        y = np.asarray(kernel.fused(problem, x, w, bias))
        reached = slice(max(0, padding), max(0, padding) + 1)
        assert np.isnan(y.astype(np.float32)[:, reached]).all()


def run_unmet(name: str, capability: int) -> None:
    """Steps of x that a tap does not meet leave its gradient alone, whatever they are."""
    triton_compat.compute_capability = lambda: capability
    with _as_named(name):
        _run_unmet(name)


def _run_unmet(name: str) -> None:
    G = 1 if name.startswith("unmet_dense") else 16
    # Tap k meets 0 to 24 + k D.
    K, D, met = (11, 1, 8) if name == "unmet_taps" else (3, 5, 2)
    case = Case(name, T=37, C=16, O=16, G=G, K=K, D=D, padding=[(10, -2)], dtype="bfloat16")
    x, w, g = case.arrays()
    problem = case.problem("conv1d_kernel_grad", "cuda")
    kernel = _kernel(problem)
    x[:, 32:] = np.nan
    expected = REFERENCES["conv1d_kernel_grad"](x, g, case.spec)
    assert np.isfinite(expected[:met]).all() and np.isnan(expected[met:]).all()
    out = np.asarray(kernel.run(problem, x, g)).astype(float)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
    epilogue = dataclasses.replace(case.problem("conv1d", "cuda"), epilogue=Epilogue(True, None))
    bias, wanted = np.zeros(16, x.dtype), (False, True, True)
    _, dw, db = kernel.backward(epilogue, x, w, bias, None, g, wanted)
    np.testing.assert_array_equal(np.isnan(np.asarray(dw, float)), np.isnan(expected))
    assert np.isfinite(db).all()
    # Nor do steps that no tap of an output meets change it.
    x[:, 20], g[:, 20:22] = np.inf, np.nan
    for operation, lhs in (("conv1d", x), ("conv1d_input_grad", g)):
        problem = case.problem(operation, "cuda")
        out = np.asarray(_kernel(problem).run(problem, lhs, w), float)
        expected = REFERENCES[operation](lhs, w, case.spec)
        assert np.isfinite(expected).any() and not np.isfinite(expected).all()
        np.testing.assert_array_equal(np.isfinite(out), np.isfinite(expected))
    if name == "unmet_taps":
        return
    # A stride that undoes a dilation of the input: cropped, no tap meets the last step.
    even = dict(S=2, E=2) if G == 1 else {}
    case = dataclasses.replace(case, T=45, K=1, padding=[(-4, -2)], **even)
    x, _, g = case.arrays()
    x[:, -1] = np.nan
    problem = case.problem("conv1d_kernel_grad", "cuda")
    dw = _kernel(problem).run(problem, x, g)
    assert np.isfinite(np.asarray(dw, float)).all()


def run_unmet_groups(capability: int) -> None:
    """Nor do channels of another group, in a tile that ends beyond the last of a group's own."""
    triton_compat.compute_capability = lambda: capability
    case = Case("unmet_groups", T=37, C=48, O=48, G=2, dtype="bfloat16")
    for operation, i in itertools.product(REFERENCES, (0, 1)):
        factors = lhs_rhs_out(operation, *case.arrays())[:2]
        factors[i][..., 24:] = np.nan
        problem = case.problem(operation, "cuda")
        out = np.asarray(_kernel(problem).run(problem, *factors), float)
        expected = REFERENCES[operation](*factors, case.spec)
        np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
        assert np.isfinite(out[..., :24]).all()


def run_packed(name: str) -> None:
    """A layer of which each output sees some taps, and nothing of what the others have there."""
    triton_compat.compute_capability = lambda: 90
    (case,) = (case for case in PACKED if case.name == name)
    kernel, file, called = triton_depthwise.KERNEL, "triton_depthwise_taps", "conv_taps"
    if not case.problem().depthwise:
        kernel, file, called = triton_dense.KERNEL, "triton_dense", "conv_dense"
    elif case.case.K <= triton_depthwise_walk.TAPS:
        file, called = "triton_depthwise_walk", "conv_walk"
    files.append(file)
    ran.clear()
    with _as_named(name):
        packed.check(kernel, case)
    assert all(device.startswith(called) for device in ran), ran


UNREAD = (  # time, taps, dilation and padding: steps that no output reads, cropped or in between
    (10, 2, 9, (0, 0)), (40, 4, 12, (0, 0)), (20, 3, 30, (45, 0)), (41, 4, 3, (-5, -3)),
)  # fmt: skip


def run_unread(capability: int) -> None:
    """As `run_unmet`, of all gradients of a walk at once, which computes dx beyond the outputs."""
    triton_compat.compute_capability = lambda: capability

    def gradients(case, activation, x, w, g):
        epilogue = Epilogue(True, activation)
        problem = dataclasses.replace(case.problem("conv1d", "cuda"), epilogue=epilogue)
        backward = _kernel(problem).backward
        return backward(problem, x, w, np.zeros(16, x.dtype), None, g, (True, True, True))

    for T, K, D, padding in UNREAD:
        case = Case("unread", T=T, C=16, O=16, G=16, K=K, D=D, padding=[padding])
        x, w, g = case.arrays()
        first = np.arange(g.shape[1])[:, None] - padding[0]
        unread = np.setdiff1d(np.arange(T), first + D * np.arange(K))
        assert unread.size
        x[:, unread] = np.nan
        for activation in ("silu", None):
            for found in gradients(case, activation, x, w, g):
                assert np.isfinite(found).all(), (case, activation)
    for padding in ("CAUSAL", "SAME"):
        case = Case("unread", T=37, C=16, O=16, G=16, K=3, D=4, padding=padding)
        x, w, g = case.arrays()
        x[:, -1] = np.inf
        expected = REFERENCES["conv1d_kernel_grad"](x, g, case.spec)
        assert np.isfinite(expected[0]).all() and not np.isfinite(expected[2]).any()
        dx, dw, db = gradients(case, None, x, w, g)
        np.testing.assert_array_equal(np.isfinite(dw), np.isfinite(expected))
        assert np.isfinite(dx).all() and np.isfinite(db).all()


def run_padding(K: int, D: int, capability: int) -> None:
    """A tile under which a tap sees padding alone is not multiplied with that tap."""
    triton_compat.compute_capability = lambda: capability
    case = Case("padding", T=80 + (K - 1) * D, C=16, O=16, K=K, D=D, dtype="bfloat16")
    x, w, g = case.arrays()
    rows, field = 64, case.spec.span - 1
    w[0] = np.nan  # zero times NaN is NaN

    def runs(operation, lhs, rhs):
        problem = case.problem(operation, "cuda")
        return np.asarray(_kernel(problem).run(problem, lhs, rhs), float)

    y = runs("conv1d", x, w)
    reached = np.arange(case.T) >= field // rows * rows
    np.testing.assert_array_equal(np.isnan(y).all((0, 2)), reached)
    np.testing.assert_array_equal(np.isfinite(y).all((0, 2)), ~reached)
    dx = runs("conv1d_input_grad", g, w)
    reached = np.arange(case.T) < math.ceil((case.T - field) / rows) * rows
    np.testing.assert_array_equal(np.isnan(dx).all((0, 2)), reached)
    np.testing.assert_array_equal(np.isfinite(dx).all((0, 2)), ~reached)
    g[:, : field // rows * rows] = np.nan
    dw = runs("conv1d_kernel_grad", x, g)
    assert np.isfinite(dw[0]).all() and np.isnan(dw[-1]).all()


def run_far(name: str, batch: int, T: int) -> None:
    """Offsets beyond 2**31 elements, in a program at the far end of arrays that large."""
    stays = name == "far_resident"
    triton_compat.compute_capability = lambda: 90 if stays else 80
    geometry = {
        "far_dense": {},
        "far_resident": {},
        "far_strided": dict(G=8, S=2),
        "far_walked": dict(G=8),
        "far_taps": dict(G=8, K=9),
    }[name]
    tail = 64
    geometry = dict(K=3, D=2) | geometry
    case = Case(name, batch=(batch,), T=T, C=8, O=8, dtype="bfloat16", **geometry)
    short = dataclasses.replace(case, batch=(1,), T=tail)
    x, w, _ = short.arrays()
    far = np.zeros(case.x_shape, x.dtype)
    far[-1, -tail:] = x[0]
    problem = case.problem("conv1d", "cuda")
    # Of a grid of so many programs the last one alone, which is Hopper's first.
    interpreter.range = lambda n, *more: (
        range(n, *more) if more or n <= 10_000 else range(1) if stays else range(n - 1, n)
    )
    # And of those that stay so many that each has one tile.
    processors = 2**30 if stays else triton_compat.processors()
    try:
        with own_tile(name), mock.patch.object(triton_compat, "processors", lambda: processors):
            y = _kernel(problem).run(problem, far, w)[:, -8:]
    finally:
        del interpreter.range
    assert ran[-1].startswith("conv_resident") == stays, ran
    expected = REFERENCES["conv1d"](x, w, short.spec)[:, -8:]
    np.testing.assert_allclose(np.asarray(y[-1:], float), expected, rtol=1e-2, atol=1e-2)

    # Gradients whose outputs are few, of x alone that is so large.
    case = dataclasses.replace(case, padding=[(tail - T, 0)])
    short = dataclasses.replace(short, padding=0)
    _, _, g = short.arrays()
    gy = np.zeros(case.out_shape, g.dtype)
    gy[-1] = g[0]
    problem = case.problem("conv1d_kernel_grad", "cuda")
    dw = _kernel(problem).run(problem, far, gy)
    expected = REFERENCES["conv1d_kernel_grad"](x, g, short.spec)
    np.testing.assert_allclose(np.asarray(dw, float), expected, rtol=1e-2, atol=0.1)


def run_far_wide(geometry: dict) -> None:
    """Steps beyond 2**31 elements in one tile of time, for there are that many channels."""
    triton_compat.compute_capability = lambda: 80
    short = Case("far_wide", batch=(1,), dtype="bfloat16", **geometry)
    x, w, g = short.arrays()
    widen, dense = 2**19, short.G == 1  # C of a dense one are summed over, which takes time
    case = dataclasses.replace(
        short, O=short.O * widen, **({} if dense else dict(C=short.C * widen, G=short.G * widen))
    )  # fmt: skip
    far = [np.zeros(shape, x.dtype) for shape in (case.x_shape, case.kernel_shape, case.out_shape)]
    for wide, narrow in zip(far, (x, w, g), strict=True):
        wide[..., -narrow.shape[-1] :] = narrow
    in_registers = not dense and triton_depthwise.KERNEL.recomputes(case.problem("conv1d"))
    for operation in ("conv1d", "conv1d_kernel_grad") if dense else REFERENCES:
        last = short.C if operation == "conv1d_input_grad" else short.O
        # Programs of the last channels alone: their tiles are the fastest index.
        walked = in_registers and operation != "conv1d_kernel_grad"
        tiles = last * widen // (512 if walked else 128)
        interpreter.range = lambda n, *more, step=tiles: (
            range(n, *more) if more or n < step else range(step - 1, n, step)
        )
        lhs, rhs, _ = lhs_rhs_out(operation, *far)
        problem = case.problem(operation, "cuda")
        try:
            with mock.patch.object(triton_depthwise, "L2_BYTES", math.inf):
                out = np.asarray(_kernel(problem).run(problem, lhs, rhs)[..., -last:])
        finally:
            del interpreter.range
        lhs, rhs, _ = lhs_rhs_out(operation, x, w, g)
        check(out, operation, lhs, rhs, short.spec, out_dtype=problem.out_dtype, platform="cuda")


FAR_WIDE = {
    "walked": dict(T=330, C=16, O=16, G=16, K=2),
    "strided": dict(T=300, C=16, O=16, G=16, K=2, D=3, S=2, padding=[(3, 0)]),
    "upsampled": dict(T=150, C=16, O=16, G=16, K=2, D=3, E=2, padding=[(3, 0)]),
    "multiplier": dict(T=300, C=8, O=16, G=8, K=2, D=3),
    "dense": dict(T=300, C=16, O=16, K=1),
}


def run_far_hop(capability: int) -> None:
    """Rows of one tile that are 2**31 elements apart."""
    triton_compat.compute_capability = lambda: capability
    hop = 6_000_000
    short = Case("far_hop", batch=(1,), T=160, C=8, O=8, K=2, S=2, padding=0, dtype="bfloat16")
    x, w, g = short.arrays()
    case = dataclasses.replace(short, T=hop * 79 + 2, S=hop)
    far = np.zeros(case.x_shape, x.dtype)
    far[:, ::hop], far[:, 1::hop] = x[:, ::2], x[:, 1::2]
    for operation, rhs in (("conv1d", w), ("conv1d_kernel_grad", g)):
        problem = case.problem(operation, "cuda")
        out = np.asarray(_kernel(problem).run(problem, far, rhs))
        check(out, operation, x, rhs, short.spec, out_dtype=problem.out_dtype, platform="cuda")


def run_rounding() -> None:
    """float32 that pointers fetch is rounded to tf32, not cut off, before it is multiplied."""
    triton_compat.compute_capability = lambda: 80
    case = Case("rounding", T=50, C=1, O=1, K=1)
    x, w, g = case.arrays()
    # A kernel by the kernels, or before by XLA.
    for large, (problem, lhs, rhs) in itertools.product(
        (triton_dense.ROUNDED_BEFORE, 1),
        (
            (case.problem("conv1d", "cuda"), x, w),
            (case.problem("conv1d_input_grad", "cuda"), g, w),
        ),
    ):
        with mock.patch.object(triton_dense, "ROUNDED_BEFORE", large):
            out = np.asarray(_kernel(problem).run(problem, lhs, rhs))
        np.testing.assert_array_equal(out, tf32(lhs) * tf32(rhs))
    odd = np.array([np.nan, -np.inf, np.inf, -0.0, 2.0], np.float32)
    np.testing.assert_array_equal(triton_common.tf32_of(odd), odd)
    # NaNs as a GPU makes them: rounded up, their bits are a zero's.
    full = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(triton_common.tf32_of(full)).all()
    one = dataclasses.replace(case, name="rounding_nan", T=2, batch=(1,))
    problem = one.problem("conv1d", "cuda")
    kernel = _kernel(problem)
    y = kernel.run(problem, full.reshape(1, 2, 1), np.ones((1, 1, 1), np.float32))
    assert np.isnan(np.asarray(y)).all()
    one = dataclasses.replace(case, name="rounding_grad", T=1)
    (x, _, g), problem = one.arrays(), one.problem("conv1d_kernel_grad", "cuda")
    lhs, rhs = x[:1], g[:1]
    problem = dataclasses.replace(problem, N=1)
    out = np.asarray(_kernel(problem).run(problem, lhs, rhs))
    np.testing.assert_array_equal(out, tf32(lhs) * tf32(rhs))


def run_extremes() -> None:
    """Activations of what overflows on the way to a finite result, and of NaN."""
    triton_compat.compute_capability = lambda: 90
    z = np.array([0, 1e-40, 20, 90, 1e3, 1e18, 1e20, 3e38], np.float32)
    z = np.concatenate([z, -z, [0, np.nan]]).astype(np.float32).reshape(1, -1, 2)
    case = Case("extremes", batch=(1,), T=z.shape[1], C=2, O=2, G=2, K=1)
    for activation in ACTIVATIONS:
        problem = dataclasses.replace(
            case.problem("conv1d", "cuda"), epilogue=Epilogue(False, activation)
        )
        kernel = _kernel(problem)
        y = np.asarray(kernel.fused(problem, z, np.ones((1, 1, 2), np.float32), None))
        np.testing.assert_allclose(y, VALUES[activation](z.astype(float)), rtol=1e-5, atol=1e-6)


def run_slopes() -> None:
    """Activations and their derivatives to float32's digits, wherever they bend."""
    triton_compat.compute_capability = lambda: 90
    z = np.linspace(-8, 8, 1000, dtype=np.float32).reshape(1, -1, 2)
    one, bias = np.ones((1, 1, 2), np.float32), np.zeros(2, np.float32)
    case = Case("slopes", batch=(1,), T=z.shape[1], C=2, O=2, G=2, K=1)
    for activation in ACTIVATIONS:
        problem = dataclasses.replace(
            case.problem("conv1d", "cuda"), epilogue=Epilogue(True, activation)
        )
        kernel = _kernel(problem)
        assert kernel.recomputes(problem)  # which makes each slope of z
        y = kernel.fused(problem, z, one, bias)
        dx, *_ = kernel.backward(problem, z, one, bias, None, np.ones_like(z), (True, True, True))
        for found, expected in ((y, VALUES), (dx, SLOPES)):
            expected = expected[activation](z.astype(float))
            np.testing.assert_allclose(np.asarray(found), expected, rtol=2e-6, atol=5e-6)


ALONE = {"rounding": run_rounding, "extremes": run_extremes, "slopes": run_slopes}


def _capabilities(case: Case) -> tuple[int, ...]:
    # Before Hopper dense kernels take pointers, from then on the copy engine.
    return (90,) if case.problem("conv1d").depthwise else (80, 90)


def runs_of(name: str) -> dict[str, Callable[[], None]]:
    """What a name of `NAMES`, or of a case, stands for: each run by what is told of it."""
    if name in ALONE:
        return {name: ALONE[name]}
    if name.startswith("fused_packed"):
        return {name: functools.partial(run_packed, name)}
    if name.startswith("fused_"):
        return {
            f"{name} sm_{c}": functools.partial(run_fused, name, c)
            for c in _capabilities(triton_epilogue.named(name).case)
        }
    if name == "far_wide":
        return {
            f"{name} {what}": functools.partial(run_far_wide, geometry)
            for what, geometry in FAR_WIDE.items()
        }
    if name == "far_hop":
        return {f"{name} sm_{c}": functools.partial(run_far_hop, c) for c in (80, 90)}
    if name.startswith("far_"):
        # The last of three samples begins at 2**31, or the middle of the only one is there.
        return {
            f"{name} N={batch}": functools.partial(run_far, name, batch, T)
            for batch, T in ((3, 2**27), (1, 2**29))
        }
    if name == "padding":
        return {
            f"{name} K={K} sm_{c}": functools.partial(run_padding, K, D, c)
            for K, D in ((3, 128), (17, 8))
            for c in (80, 90)
        }
    if name == "unread":
        return {name: functools.partial(run_unread, 90)}
    if name == "unmet_groups":
        return {f"{name} sm_{c}": functools.partial(run_unmet_groups, c) for c in (80, 90)}
    if name.startswith("unmet_"):
        return {f"{name} sm_{c}": functools.partial(run_unmet, name, c) for c in (80, 90)}
    case = named(name)
    return {
        f"{name} {operation} sm_{c}": functools.partial(run_case, case, operation, c)
        for operation in REFERENCES
        for c in _capabilities(case)
    }
