"""Puts Triton's interpreter in the place of `triton_compat.call`, with poison around every array.

`TRITON_INTERPRET=1` must be set before triton is imported, and an interpreted kernel can't be
compiled any more; so this is for a process of its own, as `tests.triton_interpreter` is one.

Three traps are handled here: the interpreter knows no tensors but torch's, its `tl.dot` multiplies
the bit patterns of bfloat16, and its casts to bfloat16 cut bits off where the hardware rounds. What
it can't show is tf32: there it is exact.
"""

import contextlib
import dataclasses
import math
import os
from unittest import mock

os.environ |= {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}  # before both are imported

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from conv_pallas.kernels import triton_compat

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
_create_masked_store = interpreter.InterpreterBuilder.create_masked_store
_arrays: list["Tensor"] = []  # of the launch


def _check_inside(ptrs, mask, did: str) -> None:
    """Raises at the line of the kernel that reads, though in vain, or writes outside of an array.

    A write far beyond the guards would end the process before anybody looks at them.
    """
    if not (live := ptrs.data[mask.data]).size:
        return
    first, last = int(live.min()), int(live.max())
    beyond = {}
    for a in _arrays:
        before, after = a.data_ptr() - first, last + 1 - a.data_ptr() - a.array.nbytes
        if before <= 0 and after <= 0:
            return
        where = f"{before} bytes before" if before > 0 else f"{after} bytes behind the end of"
        beyond[max(before, after)] = f"{where} {a.dtype}{list(a.shape)}"
    raise AssertionError(f"{did} outside of an array: {beyond[min(beyond)]}")


def _load(self, ptrs, mask, *rest, **kwargs):
    _check_inside(ptrs, mask, "read")
    return _create_masked_load(self, ptrs, mask, *rest, **kwargs)


def _store(self, ptrs, value, mask, *rest, **kwargs):
    _check_inside(ptrs, mask, "written")
    return _create_masked_store(self, ptrs, value, mask, *rest, **kwargs)


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
interpreter.InterpreterBuilder.create_masked_store = _store


ran: list[str] = []  # names of device functions, in order


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
    """As `triton_compat.call`; of what is traced, something of the right shapes."""
    del warps, stages, registers
    if any(isinstance(getattr(a, "array", a), jax.core.Tracer) for a in args):
        ran.append(kernel.__name__)
        return jax.tree.map(lambda o: jnp.zeros(o.shape, o.dtype), out)
    tensors = {}

    def convert(a):
        if isinstance(a, triton_compat.Tile):
            # The engine's rounding is done before, to an array of its own.
            t = Tensor(tf32(np.asarray(a.array))) if a.round_to_tf32 else convert(a.array)
            tensors.setdefault(id(t), t)
            return TensorDescriptor(t, list(t.shape), list(t.stride()), list(a.block))
        if a is None or isinstance(a, int):
            return a
        return tensors.setdefault(id(a), Tensor(np.asarray(a)))

    args = [convert(a) for a in args]
    ran.append(kernel.__name__)
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


def tf32(a: np.ndarray) -> np.ndarray:
    """The nearest number of 11 significant bits."""
    fraction, exponent = np.frexp(a.astype(np.float64))
    return np.ldexp(np.round(fraction * 2**11) / 2**11, exponent).astype(np.float32)


def call_in_jax(*args, **kwargs):
    """As `call`; what comes is JAX's again, as on a chip."""
    return jax.tree.map(jnp.asarray, call(*args, **kwargs))


def eagerly(f, *arrays):
    """What ``f`` makes of arrays, operation by operation; it has to be one that JAX can trace."""
    arrays = jax.tree.map(jnp.asarray, arrays)
    with jax.numpy_rank_promotion("raise"):  # as some users have it
        jax.eval_shape(f, *arrays)
        return f(*arrays)
