"""Runs our Triton launchers on Triton's interpreter, with poison around every array.

`TRITON_INTERPRET=1` must be set before triton is imported, and an interpreted kernel can't be
compiled any more; so this is for a process of its own. It runs

    python -m tests.triton_interpreter CASE...

and prints one line per case and operation. Three traps are handled here: the interpreter knows
no tensors but torch's, its `tl.dot` multiplies the bit patterns of bfloat16, and its casts to
bfloat16 cut bits off where the hardware rounds. What it can't show is tf32: there it is exact.
"""

import functools
import math
import os
import sys
import traceback

os.environ["TRITON_INTERPRET"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from conv_pallas.kernels import triton_compat
from conv_pallas.spec import ConvSpec
from tests.cases import Case
from tests.support import padded, rows
from tests.tolerance import REFERENCES, check

GUARD = 4096  # bytes of NaN before and after each array


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


interpreter.InterpreterBuilder.create_dot = _dot
interpreter.InterpreterBuilder.cast_impl = _round_to_bfloat16


def call(kernel, *args, out, programs, warps, stages, **meta):
    """As `triton_compat.call`."""
    del warps, stages
    tensors = {}

    def convert(a):
        if isinstance(a, triton_compat.Tile):
            t = convert(a.array)
            return TensorDescriptor(t, list(t.shape), list(t.stride()), list(a.block))
        if isinstance(a, int):
            return a
        return tensors.setdefault(id(a), Tensor(np.asarray(a)))

    args = [convert(a) for a in args]
    # What is not written stays NaN.
    result = Tensor(np.full(out.shape, np.nan, np.float32).astype(out.dtype))
    kernel[(programs,)](*args, result, **meta)
    for tensor in (*tensors.values(), result):
        tensor.check_guards()
    return result.array


triton_compat.call = call


def run_case(case: Case, operation: str, capability: int) -> None:
    """Runs one operation of a case by whichever kernel takes it, and checks the result."""
    from conv_pallas import dispatch

    triton_compat.compute_capability = lambda: capability
    x, w, g = case.arrays()
    x, g = rows(padded(x, case)), rows(g)
    lhs, rhs = {
        "conv1d": (x, w),
        "conv1d_input_grad": (g, w),
        "conv1d_kernel_grad": (x, g),
    }[operation]
    problem = case.problem(operation, "cuda")
    kernel = dispatch.select(problem, ("triton",))
    out = np.asarray(kernel.run(problem, lhs, rhs))
    check(
        out, operation, lhs, rhs, case.spec, out_dtype=problem.out_dtype,
        precision=case.precision, platform="cuda",
    )  # fmt: skip


def run_epilogue(kernel: str) -> None:
    """Bias and every activation, against their definitions in float64."""
    from conv_pallas.kernels import triton_common, triton_dense, triton_depthwise

    triton_compat.compute_capability = lambda: 90
    G = 8 if kernel == "depthwise" else 1
    spec = ConvSpec(21, 3, padding=(4, 0), kernel_dilation=2, groups=G)
    rng = np.random.default_rng(0)
    shapes = ((2, 21, 8), (3, 8 // G, 16), (16,))
    x, w, bias = (rng.standard_normal(s).astype(np.float32) for s in shapes)
    z = REFERENCES["conv1d"](x, w, spec) + bias
    erf = np.vectorize(math.erf)
    inner = np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)
    expected = {
        None: z,
        "relu": np.maximum(z, 0),
        "gelu": 0.5 * z * (1 + np.tanh(inner)),
        "gelu_exact": 0.5 * z * (1 + erf(z / np.sqrt(2))),
        "silu": z / (1 + np.exp(-z)),
        "tanh": np.tanh(z),
        "sigmoid": 1 / (1 + np.exp(-z)),
    }
    assert tuple(expected) == triton_common.ACTIVATIONS
    for activation, value in expected.items():
        common = dict(O=16, out_dtype=np.dtype(np.float32), bias=bias, activation=activation)
        if kernel == "depthwise":
            y = triton_depthwise.forward(x, w, spec, **common)
        else:
            y = triton_dense.forward(x, w, spec, precision="ieee", **common)
        np.testing.assert_allclose(y, value, rtol=2e-5, atol=2e-6, err_msg=str(activation))
    x[:] = np.nan  # of which no activation makes a number
    y = triton_depthwise if kernel == "depthwise" else triton_dense
    extra = {} if kernel == "depthwise" else dict(precision="ieee")
    y = y.forward(x, w, spec, O=16, out_dtype=np.dtype(np.float32), activation="relu", **extra)
    assert np.isnan(y[:, 4:]).all()


def main(names: list[str]) -> int:
    from tests.triton_cases import named

    failed = 0
    for name in names:
        if name.startswith("epilogue_"):
            runs = {name: functools.partial(run_epilogue, name.removeprefix("epilogue_"))}
        else:
            case = named(name)
            # Before Hopper dense kernels take pointers, from then on the copy engine.
            capabilities = (90,) if case.problem("conv1d").depthwise else (80, 90)
            runs = {
                f"{name} {operation} sm_{c}": functools.partial(run_case, case, operation, c)
                for operation in REFERENCES
                for c in capabilities
            }
        for what, run in runs.items():
            try:
                run()
                print(f"PASS {what}", flush=True)
            except Exception:
                failed += 1
                print(f"FAIL {what}\n{traceback.format_exc()}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
