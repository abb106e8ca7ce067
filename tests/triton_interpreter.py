"""Runs our Triton launchers on Triton's interpreter, with poison around every array.

`TRITON_INTERPRET=1` must be set before triton is imported, and an interpreted kernel can't be
compiled any more; so this is for a process of its own. It runs

    python -m tests.triton_interpreter CASE...

and prints one line per case and operation. Three traps are handled here: the interpreter knows
no tensors but torch's, its `tl.dot` multiplies the bit patterns of bfloat16, and its casts to
bfloat16 cut bits off where the hardware rounds. What it can't show is tf32: there it is exact.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import itertools
import math
import os
import sys
import traceback
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from conv_pallas.kernels import (
    triton_common,
    triton_compat,
    triton_dense,
    triton_depthwise,
)
from conv_pallas.spec import ACTIVATIONS, Epilogue, lhs_rhs_out
from tests.cases import Case
from tests.reference import SLOPES, VALUES
from tests.support import padded, rows
from tests.tolerance import REFERENCES, check
from tests.triton_cases import own_tile

GUARD = 4096  # bytes of NaN before and after each array
HUGE = 2**30  # bytes from which on an array is taken as it is


class _Storage:
    def __init__(self, flat):
        self.flat = flat

    def data_ptr(self):
        return self.flat.ctypes.data

    def cpu(self):
        return self

    def copy_(self, other):
        assert other.data_ptr() == self.data_ptr()
        return self


class _BFloat16:
    itemsize = 2

    def __str__(self):
        return "torch.bfloat16"


class Tensor:
    """The part of torch.Tensor that the interpreter touches, over a guarded NumPy array."""

    device = "cpu"

    def __init__(self, array: np.ndarray):
        array = np.asarray(array)
        if array.nbytes >= HUGE:  # pages that nobody touches cost nothing
            self.raw, self.span, self.array = np.empty(0, np.uint8), slice(0, 0), array
            return
        self.raw = np.full(array.nbytes + 2 * GUARD + 128, 0xFF, np.uint8)  # NaN in every dtype
        start = GUARD + -(self.raw.ctypes.data + GUARD) % 128
        self.span = slice(start, start + array.nbytes)
        self.array = self.raw[self.span].view(array.dtype).reshape(array.shape)
        self.array[...] = array

    def check_guards(self):
        before, after = self.raw[: self.span.start], self.raw[self.span.stop :]
        assert (before == 0xFF).all() and (after == 0xFF).all(), "written outside of the array"

    @property
    def dtype(self):
        return _BFloat16() if self.array.dtype.name == "bfloat16" else self.array.dtype

    @property
    def shape(self):
        return self.array.shape

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return _Storage(self.array.view(np.uint8).reshape(-1))

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def element_size(self):
        return self.array.itemsize

    def stride(self, axis=None):
        strides = tuple(s // self.array.itemsize for s in self.array.strides)
        return strides if axis is None else strides[axis]

    def new_empty(self, *_, **__):
        return self

    def set_(self, storage, *_):
        assert storage.data_ptr() == self.data_ptr()
        return self


def _decode(handle):
    if handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16:
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
    return handle


_create_dot = interpreter.InterpreterBuilder.create_dot


def _dot(self, a, b, *rest, **kwargs):
    return _create_dot(self, _decode(a), _decode(b), *rest, **kwargs)


_cast = interpreter.InterpreterBuilder.cast_impl


def _round_to_bfloat16(self, source, dst_type):
    if source.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        data = source.data.astype(ml_dtypes.bfloat16).view(np.uint16)
        return interpreter.TensorHandle(data, tl.bfloat16)
    return _cast(self, source, dst_type)


_set_grid_idx = interpreter.InterpreterBuilder.set_grid_idx


def _last_first(self, x, y, z):
    """A chip runs programs in no order. Here as for Hopper the last one is the first.

    What one of them writes into another's part would else be mended by that one.
    """
    backwards = triton_compat.compute_capability() >= 90
    _set_grid_idx(self, self.grid_dim[0] - 1 - x if backwards else x, y, z)


_create_masked_load = interpreter.InterpreterBuilder.create_masked_load
_arrays: list["Tensor"] = []  # of the launch


def _load(self, ptrs, mask, *rest, **kwargs):
    """Guards catch what is written outside of an array, and this what is read, though in vain."""
    if (live := ptrs.data[mask.data]).size:
        first, last = int(live.min()), int(live.max())
        spans = [(a.data_ptr(), a.data_ptr() + a.array.nbytes) for a in _arrays]
        assert any(at <= first <= last < end for at, end in spans), "read outside of an array"
    return _create_masked_load(self, ptrs, mask, *rest, **kwargs)


_numpy_dtype, _numpy_dtypes = interpreter._get_np_dtype, {}


def _named_dtype(dtype):
    """Triton makes its table of all dtypes anew for each that it looks up there."""
    if dtype.name not in _numpy_dtypes:
        _numpy_dtypes[dtype.name] = _numpy_dtype(dtype)
    return _numpy_dtypes[dtype.name]


interpreter._get_np_dtype = _named_dtype
# Whether each sum and product of integers overflows would be asserted in debug mode alone, but is
# computed in any: that was half of the time.
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)
interpreter.InterpreterBuilder.create_dot = _dot
interpreter.InterpreterBuilder.cast_impl = _round_to_bfloat16
interpreter.InterpreterBuilder.set_grid_idx = _last_first
interpreter.InterpreterBuilder.create_masked_load = _load


_ran = []  # names of kernels


@contextlib.contextmanager
def _patched_once():
    """The interpreter patches the language for a launch, and anew for each device function in it.

    That was three tenths of its time.
    """
    patch, done = interpreter._patch_lang, set()

    def once(fn):
        if fn in done:
            return None
        done.add(fn)
        modules = {id(m) for m in (tl, tl.core) if any(m is v for v in fn.__globals__.values())}
        if modules <= done:
            return None  # for nobody: the launch alone restores what it has patched
        done.update(modules)
        return patch(fn)

    with mock.patch.object(interpreter, "_patch_lang", once):
        yield


def call(kernel, *args, out, programs, warps, stages, registers=None, **meta):
    """As `triton_compat.call`."""
    del warps, stages, registers
    tensors = {}

    def convert(a):
        if isinstance(a, triton_compat.Tile):
            # The engine's rounding is done before, to an array of its own.
            t = Tensor(_tf32(np.asarray(a.array))) if a.round_to_tf32 else convert(a.array)
            tensors.setdefault(id(t), t)
            return TensorDescriptor(t, list(t.shape), list(t.stride()), list(a.block))
        if isinstance(a, int):
            return a
        return tensors.setdefault(id(a), Tensor(np.asarray(a)))

    args = [convert(a) for a in args]
    _ran.append(kernel.__name__)
    # What is not written stays NaN.
    outs = out if isinstance(out, tuple) else (out,)
    results = [Tensor(_unwritten(o)) for o in outs]
    _arrays[:] = [*tensors.values(), *results]
    with _patched_once():
        kernel[(programs,)](*args, *results, **meta)
    for tensor in (*tensors.values(), *results):
        tensor.check_guards()
    arrays = tuple(result.array for result in results)
    return arrays if isinstance(out, tuple) else arrays[0]


def _unwritten(out) -> np.ndarray:
    if math.prod(out.shape) * out.dtype.itemsize >= HUGE:
        return np.zeros(out.shape, out.dtype)
    return np.full(out.shape, np.nan, np.float32).astype(out.dtype)


triton_compat.call = call


@contextlib.contextmanager
def _as_named(name: str):
    """With the tile that a case is about, and few programs that stay: each has several tiles."""
    few = "resident" in name or name == "taps_tuned"
    processors = 1 if "onward" in name else 2 if few else triton_compat.processors()
    split = _in_four if name.startswith(("summed", "fused_summed")) else triton_dense.choose_splits
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
    _ran.clear()
    with _as_named(case.name):
        check_operation(case, operation)
    # The engine fetches their tiles; and a kernel gradient's may not end in the midst of time.
    stays = "resident" in case.name and capability >= 90 and case.S == 1
    wide = case.name == "resident_wide"  # not all of its channels are in one tile
    stays &= operation != "conv1d_kernel_grad" or not (wide or case.name == "resident_ragged")
    assert _ran[0].startswith("conv_onward" if wide else "conv_resident") == stays, _ran
    assert _ran[0].startswith("conv_taps") == case.name.startswith("taps_"), _ran


def check_operation(case: Case, operation: str) -> None:
    """Runs an operation on the chip and in the tiles that there are, and checks the result."""
    from conv_pallas import dispatch

    x, w, g = case.arrays()
    x, g = rows(padded(x, case)), rows(g)
    lhs, rhs, _ = lhs_rhs_out(operation, x, w, g)
    problem = case.problem(operation, "cuda")
    out = np.asarray(dispatch.select(problem, ("triton",)).run(problem, lhs, rhs))
    check(
        out, operation, lhs, rhs, case.spec, out_dtype=problem.out_dtype,
        precision=case.precision, platform="cuda",
    )  # fmt: skip


def run_fused(name: str, capability: int) -> None:
    """Bias and activation in the forward pass, and all gradients."""
    from conv_pallas import dispatch
    from tests import triton_epilogue

    triton_compat.compute_capability = lambda: capability
    fused = triton_epilogue.named(name)
    x, w, bias, gy, saved = fused.arrays()
    problem = fused.problem()
    kernel = dispatch.select(problem, ("triton",))
    assert kernel.fused is not None, f"{kernel.run.__module__} has no fused"
    assert kernel.decline_fused(problem) is None
    _ran.clear()
    with _as_named(fused.name):
        _run_fused(fused, kernel, problem, (x, w, bias, gy, saved))
    if "resident" in fused.name and capability >= 90:
        few = {"conv_resident", "conv_resident_kernel_grad"}
        many = {"conv_onward", "conv_dense_kernel_grad"}  # and not all of its channels in a tile
        assert set(_ran) == (many if "narrow" in fused.name else few), _ran
    if fused.case.name.startswith("taps"):
        assert set(_ran) == {"conv_taps", "conv_taps_kernel_grad"}, _ran


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
    from conv_pallas import dispatch

    G = 1 if name.startswith("unmet_dense") else 16
    # Tap k meets 0 to 24 + k D.
    K, D, met = (11, 1, 8) if name == "unmet_taps" else (3, 5, 2)
    case = Case(name, T=37, C=16, O=16, G=G, K=K, D=D, padding=[(10, -2)], dtype="bfloat16")
    x, w, g = case.arrays()
    problem = case.problem("conv1d_kernel_grad", "cuda")
    kernel = dispatch.select(problem, ("triton",))
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
        out = np.asarray(dispatch.select(problem, ("triton",)).run(problem, lhs, w), float)
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
    dw = dispatch.select(problem, ("triton",)).run(problem, x, g)
    assert np.isfinite(np.asarray(dw, float)).all()


UNREAD = (  # time, taps, dilation and padding: steps that no output reads, cropped or in between
    (10, 2, 9, (0, 0)), (40, 4, 12, (0, 0)), (20, 3, 30, (45, 0)), (41, 4, 3, (-5, -3)),
)  # fmt: skip


def run_unread(capability: int) -> None:
    """As `run_unmet`, of all gradients of a walk at once, which computes dx beyond the outputs."""
    from conv_pallas import dispatch

    triton_compat.compute_capability = lambda: capability

    def gradients(case, activation, x, w, g):
        epilogue = Epilogue(True, activation)
        problem = dataclasses.replace(case.problem("conv1d", "cuda"), epilogue=epilogue)
        backward = dispatch.select(problem, ("triton",)).backward
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
    from conv_pallas import dispatch

    triton_compat.compute_capability = lambda: capability
    case = Case("padding", T=80 + (K - 1) * D, C=16, O=16, K=K, D=D, dtype="bfloat16")
    x, w, g = case.arrays()
    rows, field = 64, case.spec.span - 1
    w[0] = np.nan  # zero times NaN is NaN

    def runs(operation, lhs, rhs):
        problem = case.problem(operation, "cuda")
        return np.asarray(dispatch.select(problem, ("triton",)).run(problem, lhs, rhs), float)

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
    from conv_pallas import dispatch

    triton_compat.compute_capability = lambda: 80
    geometry = {
        "far_dense": {},
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
    # Of a grid of so many programs the last one alone.
    interpreter.range = lambda *a: range(a[0] - 1, a[0]) if a[0] > 10_000 else range(*a)
    try:
        y = dispatch.select(problem, ("triton",)).run(problem, far, w)[:, -8:]
    finally:
        del interpreter.range
    expected = REFERENCES["conv1d"](x, w, short.spec)[:, -8:]
    np.testing.assert_allclose(np.asarray(y[-1:], float), expected, rtol=1e-2, atol=1e-2)

    # Gradients whose outputs are few, of x alone that is so large.
    case = dataclasses.replace(case, padding=[(tail - T, 0)])
    short = dataclasses.replace(short, padding=0)
    _, _, g = short.arrays()
    gy = np.zeros(case.out_shape, g.dtype)
    gy[-1] = g[0]
    problem = case.problem("conv1d_kernel_grad", "cuda")
    dw = dispatch.select(problem, ("triton",)).run(problem, far, gy)
    expected = REFERENCES["conv1d_kernel_grad"](x, g, short.spec)
    np.testing.assert_allclose(np.asarray(dw, float), expected, rtol=1e-2, atol=0.1)


def run_rounding() -> None:
    """float32 that pointers fetch is rounded to tf32, not cut off, before it is multiplied."""
    from conv_pallas import dispatch

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
            out = np.asarray(dispatch.select(problem, ("triton",)).run(problem, lhs, rhs))
        np.testing.assert_array_equal(out, _tf32(lhs) * _tf32(rhs))
    odd = np.array([np.nan, -np.inf, np.inf, -0.0, 2.0], np.float32)
    np.testing.assert_array_equal(triton_common.tf32_of(odd), odd)
    # NaNs as a GPU makes them: rounded up, their bits are a zero's.
    full = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(triton_common.tf32_of(full)).all()
    one = dataclasses.replace(case, name="rounding_nan", T=2, batch=(1,))
    problem = one.problem("conv1d", "cuda")
    kernel = dispatch.select(problem, ("triton",))
    y = kernel.run(problem, full.reshape(1, 2, 1), np.ones((1, 1, 1), np.float32))
    assert np.isnan(np.asarray(y)).all()
    one = dataclasses.replace(case, name="rounding_grad", T=1)
    (x, _, g), problem = one.arrays(), one.problem("conv1d_kernel_grad", "cuda")
    lhs, rhs = x[:1], g[:1]
    problem = dataclasses.replace(problem, N=1)
    out = np.asarray(dispatch.select(problem, ("triton",)).run(problem, lhs, rhs))
    np.testing.assert_array_equal(out, _tf32(lhs) * _tf32(rhs))


def run_extremes() -> None:
    """Activations of what overflows on the way to a finite result, and of NaN."""
    from conv_pallas import dispatch

    triton_compat.compute_capability = lambda: 90
    z = np.array([0, 1e-40, 20, 90, 1e3, 1e18, 1e20, 3e38], np.float32)
    z = np.concatenate([z, -z, [0, np.nan]]).astype(np.float32).reshape(1, -1, 2)
    case = Case("extremes", batch=(1,), T=z.shape[1], C=2, O=2, G=2, K=1)
    for activation in ACTIVATIONS:
        problem = dataclasses.replace(
            case.problem("conv1d", "cuda"), epilogue=Epilogue(False, activation)
        )
        kernel = dispatch.select(problem, ("triton",))
        y = np.asarray(kernel.fused(problem, z, np.ones((1, 1, 2), np.float32), None))
        np.testing.assert_allclose(y, VALUES[activation](z.astype(float)), rtol=1e-5, atol=1e-6)


def run_slopes() -> None:
    """Activations and their derivatives to float32's digits, wherever they bend."""
    from conv_pallas import dispatch

    triton_compat.compute_capability = lambda: 90
    z = np.linspace(-8, 8, 1000, dtype=np.float32).reshape(1, -1, 2)
    one, bias = np.ones((1, 1, 2), np.float32), np.zeros(2, np.float32)
    case = Case("slopes", batch=(1,), T=z.shape[1], C=2, O=2, G=2, K=1)
    for activation in ACTIVATIONS:
        problem = dataclasses.replace(
            case.problem("conv1d", "cuda"), epilogue=Epilogue(True, activation)
        )
        kernel = dispatch.select(problem, ("triton",))
        assert kernel.recomputes(problem)  # which makes each slope of z
        y = kernel.fused(problem, z, one, bias)
        dx, *_ = kernel.backward(problem, z, one, bias, None, np.ones_like(z), (True, True, True))
        for found, expected in ((y, VALUES), (dx, SLOPES)):
            expected = expected[activation](z.astype(float))
            np.testing.assert_allclose(np.asarray(found), expected, rtol=2e-6, atol=5e-6)


ALONE = {"rounding": run_rounding, "extremes": run_extremes, "slopes": run_slopes}


def _tf32(a: np.ndarray) -> np.ndarray:
    """The nearest number of 11 significant bits."""
    fraction, exponent = np.frexp(a.astype(np.float64))
    return np.ldexp(np.round(fraction * 2**11) / 2**11, exponent).astype(np.float32)


def _capabilities(case: Case) -> tuple[int, ...]:
    # Before Hopper dense kernels take pointers, from then on the copy engine.
    return (90,) if case.problem("conv1d").depthwise else (80, 90)


def main(names: list[str]) -> int:
    from tests import triton_epilogue
    from tests.triton_cases import named

    faulthandler.enable()  # a read far outside ends the process
    failed = 0
    for name in names:
        if name in ALONE:
            runs = {name: ALONE[name]}
        elif name.startswith("fused_"):
            runs = {
                f"{name} sm_{c}": functools.partial(run_fused, name, c)
                for c in _capabilities(triton_epilogue.named(name).case)
            }
        elif name.startswith("far_"):
            # The last of three samples begins at 2**31, or the middle of the only one is there.
            runs = {
                f"{name} N={batch}": functools.partial(run_far, name, batch, T)
                for batch, T in ((3, 2**27), (1, 2**29))
            }
        elif name == "padding":
            runs = {
                f"{name} K={K} sm_{c}": functools.partial(run_padding, K, D, c)
                for K, D in ((3, 128), (17, 8))
                for c in (80, 90)
            }
        elif name == "unread":
            runs = {name: functools.partial(run_unread, 90)}
        elif name.startswith("unmet_"):
            runs = {f"{name} sm_{c}": functools.partial(run_unmet, name, c) for c in (80, 90)}
        else:
            case = named(name)
            runs = {
                f"{name} {operation} sm_{c}": functools.partial(run_case, case, operation, c)
                for operation in REFERENCES
                for c in _capabilities(case)
            }
        for what, run in runs.items():
            print(f"at {what}", flush=True)
            try:
                run()
                print(f"PASS {what}", flush=True)
            except Exception:
                failed += 1
                print(f"FAIL {what}\n{traceback.format_exc()}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
