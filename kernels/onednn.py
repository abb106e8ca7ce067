"""Convolution by the oneDNN that XLA is linked with on a CPU of x86, as a custom call.

Forward:       y[n, u, o]  = sum over k, c of  x[n, u*S + k*D - low, c] * w[k, c, o]
Input grad:    dx          = the same of g, with taps reversed and channels in and out exchanged

Operations: ``2 N T' K (C / G) O``. Bytes: x, w and y once each at least. It knows padding, dilation
and groups, and no zeros between the steps of its input, as a strided layer's input gradient has
them. For its kernel gradient XLA has no call. It is ahead of XLA's formulations with few channels,
and behind with many or few steps: ``benchmarks/results/cpu/layers-intel.json`` has both.

XLA puts such calls into a whole program where ``--xla_cpu_experimental_onednn_custom_call=true``
is among its flags (openxla/xla pull requests 30997 and 31511). A program that holds one already
needs no flag. But they were not made for others to call:

- What is to be computed is told in the text of a message of XLA's
  (``xla/service/cpu/onednn_config.proto``). Of one that it can't read, or a convolution that oneDNN
  has not, it ends the process. So what was not tried is declined: see `TRIED`.
- A program with one can't be serialized: XLA takes the call for one of another kind there, and
  reads what is not there. So this never runs unless it is asked for by name, nor in an export, nor
  where JAX is told to keep what it compiles. It can't know of what is told later, nor of
  `jax.experimental.serialize_executable`.
- Of layers drawn at random it had float32 right. Of bfloat16, on a processor with AMX, some results
  were wrong (12 channels to 1, 8 taps; 16 to 16, 4 taps, a stride of 4), and some ended the process
  (of a single step, 136 channels to 25), as did an activation after one tap of two groups. So this
  takes float32, and leaves bias and activation to XLA.
"""

import json
import os
import platform
import sys

import jax
import jaxlib.version
import numpy as np
from jax import lax
from jax._src import compilation_cache

from conv_pallas import _host
from conv_pallas.kernels import Kernel
from conv_pallas.kernels.xla_cpu_bounds import is_float32
from conv_pallas.kernels.xla_padding import pad_along
from conv_pallas.spec import ConvSpec, Problem
from conv_pallas.taps import flip

# Releases of jaxlib with which `python -m tests.onednn_random` found nothing wrong.
TRIED = ("0.11.2", "0.12.0", "0.12.0.1")
# How oneDNN is told to be less exact than float32, and XLA to call it by itself.
MODES = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
FLAG = "--xla_cpu_experimental_onednn_custom_call"


def _convolution(x: jax.Array, w: jax.Array, spec: ConvSpec) -> jax.Array:
    """The call, of an input without dilation."""
    low, high = spec.padding
    if low < 0 or high < 0:  # the message has no negative numbers
        x = pad_along(x, 1, min(0, low), min(0, high))
    count = lambda *values: [str(int(value)) for value in values]  # noqa: E731
    data = dict(data=dict(batch_dim="0", feature_dim="2", spatial_dims=["1"]))
    kernel = dict(input_feature_dim="1", output_feature_dim="2", spatial_dims=["0"])
    window = dict(
        pad_left=count(max(0, low)), pad_right=count(max(0, high)),
        strides=count(spec.stride), window_dilations=count(spec.kernel_dilation),
    )  # fmt: skip
    config = dict(
        dims="3", input=data, kernel=dict(filter=kernel | dict(shape=count(*w.shape))), output=data,
        window=window, feature_groups=str(spec.groups),
    )  # fmt: skip
    y = jax.ShapeDtypeStruct((x.shape[0], spec.out_time, w.shape[2]), np.float32)
    text = json.dumps(dict(outer_dimension_partitions=[], onednn_conv_config=config))
    call = jax.ffi.ffi_call(
        "__onednn$convolution", y, custom_call_api_version=2, legacy_backend_config=text
    )
    return call(x, w)


def run(problem: Problem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    spec, _, _ = problem.as_convolution
    if problem.operation == "conv1d_input_grad":
        rhs = flip(rhs, spec.groups)
    return _convolution(lhs, rhs, spec)


def unavailable() -> str | None:
    """Why there is no oneDNN to call here, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "is a part of jaxlib for Linux on x86 alone"
    if _host.vectors() not in ("amx_bf16", "avx512_bf16", "avx512f", "avx2"):
        return "needs a processor with AVX2"
    if (version := jaxlib.version.__version__) not in TRIED:
        return f"was tried with jaxlib {', '.join(TRIED)}, not with {version}"
    return None


def _serialized() -> bool:
    """Whether JAX is to serialize what it compiles, or already has where to: it asks only once."""
    config = jax.config
    shared = config.jax_share_binary_between_hosts and jax.process_count() > 1
    return bool(config.jax_compilation_cache_dir or compilation_cache._cache is not None or shared)


def decline(problem: Problem) -> str | None:
    if reason := unavailable():
        return reason
    if problem.exported:
        return "is a call of this jaxlib's, which an export would outlive"
    if _serialized():
        return "can't be serialized, and jax_compilation_cache_dir says to keep what is compiled"
    if FLAG in os.environ.get("XLA_FLAGS", ""):
        return f"is called by XLA itself where XLA_FLAGS has {FLAG}"
    if problem.operation == "conv1d_kernel_grad":
        return "computes no kernel gradients"
    if not problem.known:
        return "needs every size to be known when it is compiled"
    if problem.depthwise:
        return "computes depthwise convolutions many times slower than XLA"
    if problem.as_convolution[0].input_dilation > 1:
        return "takes no dilated input, nor the input gradient of a stride"
    if not is_float32(problem):
        return "takes float32 only"
    if not isinstance(problem.precision, tuple | lax.Precision | None):
        return f"knows the precisions DEFAULT, HIGH and HIGHEST, not {problem.precision}"
    if told := next((n for n in MODES if os.environ.get(n, "STRICT").upper() != "STRICT"), None):
        return f"may be less exact than it has to be, as the environment variable {told} is set"
    return None


KERNEL = Kernel(
    implementation="onednn",
    platforms=("cpu",),
    run=run,
    decline=decline,
    describe=lambda problem: "oneDNN's convolution",
    priority=None,
    by_name=lambda problem: "only when asked for by name: its programs can't be serialized",
    opaque=True,
)
