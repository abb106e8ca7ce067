"""Calling Triton from JAX over several versions of both: what differs stands here alone.

Each shim says which version it is for and when it can go. Kernels call `call` with `Tile`s, and
`compute_capability`, and import triton for nothing but the language and its arithmetic.

Verified on an H200 with the first of these (benchmarks/results/nvidia-h200), and without a GPU, by
`tests.triton_interpreter` with all its cases and by `tests.test_aot_triton` for sm_80, sm_90a and
gfx942, with jax-triton 0.4.1:

| triton | jax |
|---|---|
| 3.6.0 | 0.11.2 |
| 3.7.1 | 0.12.0 |
| 3.9.0 | 0.12.0.1 |

``make test-triton-oldest`` repeats the first. jax-triton 0.4.1 asks pip for triton 3.7, so that
3.6, which PyTorch 2.11 pins, has to be there before and jax-triton be installed with ``--no-deps``.
The interpreter of 3.6, though not its compiler, fails with numpy 2.5 and works with 2.3.
"""

import dataclasses
import inspect
from typing import Any

import jax
import triton
import triton.backends.nvidia.compiler as _compiler
import triton.backends.nvidia.driver as _nvidia
from jax._src.pallas.triton import gpu_info as _gpu_info
from jax.interpreters import partial_eval as _partial_eval

if not hasattr(_nvidia, "TMA_TF32"):
    # For triton 3.6: jax-triton 0.4.1 imports this name, which came with 3.7, and takes a
    # failed import for a missing NVIDIA backend. Goes when triton 3.6 is no longer supported.
    _nvidia.TMA_TF32 = 11  # CU_TENSOR_MAP_DATA_TYPE_TFLOAT32

import jax_triton as jt
from jax_triton import triton_lib as _lib

from conv_pallas import _host

if not _lib._TMA_DTYPE_DEVICE_TO_HOST:
    # Somebody imported jax-triton before us: repaired after the fact. Goes with the above.
    _lib.cb, _lib._TMA_TF32 = _compiler, _nvidia.TMA_TF32
    _lib._TMA_DTYPE_DEVICE_TO_HOST = _nvidia.TMA_DTYPE_DEVICE_TO_HOST

PROCESSORS = 132  # of an H100 or H200; an A100 has 108, a B200 148, an H100 for PCIe 114
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

if "is_im2col" in _lib.TensorDescMeta.__required_keys__ and VERSION < (3, 9):
    # For triton 3.6 and 3.7: their compilers describe a descriptor without this field, and
    # jax-triton 0.4.1 insists on it. Goes when 3.9 is the oldest that is supported.
    _lib.TensorDescMeta.__required_keys__ = frozenset(
        _lib.TensorDescMeta.__required_keys__ - {"is_im2col"}
    )

_proto = _lib.triton_kernel_call_lib


class _WithoutIr:
    """What jax-triton builds a custom call with, but for the kernel's IR that it sends along.

    jaxlib reads nothing of it. But it finds the kernel of a call by all the bytes that came with
    it, at each run of a program, and the IR with its locations is two thirds of them: on an H200's
    host a call took 4.3 us of that with it, and 2.8 without
    (benchmarks/results/nvidia-h200/host.jsonl). Goes when jaxlib has a shorter key.
    """

    @staticmethod
    def TritonKernel(name, warps, programs, shared, binary, ir, *rest):
        return _proto.TritonKernel(name, warps, programs, shared, binary, "", *rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(_proto, name)


_lib.triton_kernel_call_lib = _WithoutIr()


_dead_code_rule = _partial_eval.dce_rules[_lib.triton_kernel_call_p]
if jax.__version_info__ >= (0, 12) and len(inspect.signature(_dead_code_rule).parameters) == 2:
    # For jax 0.12 and newer, whose rules are given one argument more than jax-triton 0.4.1's
    # takes: `jax.jit` of a kernel by itself needs it. Goes when jax-triton has the new signature.
    _partial_eval.dce_rules[_lib.triton_kernel_call_p] = lambda used, live, eqn: _dead_code_rule(
        used, eqn
    )


@dataclasses.dataclass(frozen=True)
class Tile:
    """An array and the block of it that the copy engine (TMA) moves at a time.

    Out of bounds it reads zeros, before the start of an axis as after its end.

    Attributes:
      round_to_tf32: the engine rounds float32 to tf32 on the way; the tensor cores by
        themselves cut the bits off.
    """

    array: Any
    block: tuple[int, ...]
    round_to_tf32: bool = False


def _ptx_version(capability: int | None) -> int | None:
    """Of the PTX that Triton is to write; None: as it sees fit.

    For triton 3.7 and newer: that is for the newest CUDA, which the ptxas of CUDA 13.0 refuses.
    And LLVM ends the process if it is too old for the chip: 8.7 knows all of compute capability 8.0
    to 12.0 but those named here. Goes when CUDA 13.1 is the oldest.
    """
    if VERSION < (3, 7) or (capability or 0) > 121:
        return None
    return {103: 88, 110: 90, 121: 88}.get(capability, 87)


def call(
    kernel, *args, out, programs: int, warps: int, stages: int, registers: int | None = None, **meta
):  # fmt: skip
    """Runs a Triton kernel: arrays, `Tile`s and ints in, arrays out.

    Args:
      kernel: its last arguments that are no constexpr are pointers to the results.
      args: in the kernel's order.
      out: `jax.ShapeDtypeStruct` of the result, or a tuple of several.
      programs: all on the grid's first axis, the only one that may exceed 65535.
      registers: as many as a thread may have. With a limit ptxas takes what it needs of them; else
        it may spill a few, that more programs fit on a processor.
      meta: the kernel's constexprs.
    """
    capability = compute_capability()
    given = {"ptx_version": _ptx_version(capability), "maxnreg": registers}
    options = {"enable_fp_fusion": True} | {k: v for k, v in given.items() if v is not None}
    args = [
        jt.TensorDescriptor.from_array(a.array, a.block, round_f32_to_tf32=a.round_to_tf32)
        if isinstance(a, Tile)
        else a
        for a in args
    ]
    return jt.triton_call(
        *args, kernel=kernel, out_type=out, grid=(programs,), num_warps=warps, num_stages=stages,
        compute_capability=capability, backend_options=options, name=kernel.__name__,
        **meta,
    )  # fmt: skip


def device_kind() -> str | None:
    """The name of the chip that is compiled for; None where nobody said and none is here."""
    return _host.gpu()


def compute_capability() -> int | None:
    """Of the chip that is compiled for, as 80 or 90; None as for `device_kind`."""
    kind, device = device_kind(), _host.gpu_here()
    if kind is None:
        return None
    if device is not None and device.device_kind == kind:
        return int(device.compute_capability.replace(".", ""))
    version = _gpu_info.gpu_version_from_device_kind(kind)
    return version and int(_gpu_info.get_gpu_info_from_version(version).compute_capability)


def processors() -> int:
    """Of the chip that is compiled for, if it is here; else `PROCESSORS`."""
    device = _host.gpu_here()
    here = device is not None and device.device_kind == device_kind()
    return device.core_count if here else PROCESSORS


def has_tma(capability: int | None) -> bool:
    """Whether the chip's copy engine and the large tiles that go with it are there.

    Hopper and data-centre Blackwell; sm_120 has the engine but less than half of the shared
    memory. Where nobody said, the answer is for Hopper.
    """
    return capability is None or 90 <= capability < 120
