"""Compile for a chip that is not here, and read what the compiler made.

    compiled = compile_for("h200", jax.grad(loss), struct((8, 4096, 512), "bfloat16"), ...)
    conv_windows(compiled)          # how cuDNN would be called
    compile_for("v6e", f, x)        # Mosaic's own errors, VMEM overflows and all

These are XLA's real compilers with nothing to run on: what they refuse here they refuse
there, and what they emit here is what would run, but for one thing. Autotuning needs the
device, so choices among cuDNN's or Triton's algorithms are defaults, not the measured best.

Needs the extra ``aot``: the CUDA plugin's wheels without NVIDIA's libraries, triton (for
its ptxas) and libtpu. ``import conv_pallas`` does not import this module. Where those wheels stand
but not the chips, set ``JAX_PLATFORMS=cpu``, or JAX looks for the chips at its start.
"""

import functools
import importlib.metadata
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

_NVIDIA = """
gpu_device_info {{
  name: "{name}" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} {features} }}
  platform_version: "Compute Capability {major}.0"
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
  memory_bandwidth: {bandwidth} device_memory_size: {memory} l2_cache_size: {l2}
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared_optin}
  shared_memory_per_block: 49152 device_address_bits: 64 ecc_enabled: true
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
_ACCELERATED = "feature_extension: ACCELERATED_FEATURES"  # wgmma, TMA, tcgen05

# XLA's GpuTargetConfigProto. Figures of the data sheets, in bytes, bytes/s and GHz.
_GPUS = {
    "a100": _NVIDIA.format(
        name="NVIDIA A100-SXM4-80GB", major=8, features="", cores=108, fpus=64, clock=1.41,
        bandwidth=2_039_000_000_000, memory=85_100_068_864, l2=41_943_040,
        shared=167_936, shared_optin=166_912,
    ),
    "h100": _NVIDIA.format(
        name="NVIDIA H100 80GB HBM3", major=9, features=_ACCELERATED, cores=132, fpus=128,
        clock=1.98, bandwidth=3_350_000_000_000, memory=85_520_809_984, l2=52_428_800,
        shared=233_472, shared_optin=232_448,
    ),
    "h200": _NVIDIA.format(
        name="NVIDIA H200", major=9, features=_ACCELERATED, cores=132, fpus=128, clock=1.98,
        bandwidth=4_800_000_000_000, memory=151_397_597_184, l2=52_428_800,
        shared=233_472, shared_optin=232_448,
    ),
    "b200": _NVIDIA.format(
        name="NVIDIA B200", major=10, features=_ACCELERATED, cores=148, fpus=128, clock=1.965,
        bandwidth=8_000_000_000_000, memory=191_514_411_008, l2=132_644_864,
        shared=233_472, shared_optin=232_448,
    ),
}  # fmt: skip

_TPUS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}

GPUS = tuple(_GPUS)
TPUS = tuple(_TPUS)
CHIPS = GPUS + TPUS

_TPU_ENVIRONMENT = {
    # libtpu asks the machine which TPU it has; these are answers for one that has none.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    # One process per TPU is libtpu's rule; there is none to fight for, and tests run side
    # by side.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class MissingWheelError(ImportError):
    """A wheel of the extra ``aot`` is not installed, or doesn't go with this jax."""


def gpu_of(kind: str) -> str | None:
    """The chip of `GPUS` that JAX names so, as "NVIDIA H200"; None where it is another."""
    return next((chip for chip, config in _GPUS.items() if f'name: "{kind}"' in config), None)


def struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an argument that needs no values: ``jax.ShapeDtypeStruct``."""
    return jax.ShapeDtypeStruct(shape, jax.numpy.dtype(dtype))


def compile_for(chip: str, f: Callable, *structs: Any) -> jax.stages.Compiled:
    """Compiles ``jax.jit(f)`` for one chip of a kind that need not be here.

    Args:
      chip: one of `CHIPS`.
      f: a function of arrays. What it calls sees the chip's platform while lowering.
      structs: its arguments, pytrees of arrays or `jax.ShapeDtypeStruct`; for several chips, each
        with a sharding on a mesh of `devices`.

    Returns:
      What ``jax.jit(f).lower(...).compile()`` returns on that chip. It can't be called here;
      ``as_text()``, ``memory_analysis()`` and ``cost_analysis()`` work.

    Raises:
      ValueError: ``chip`` is unknown.
      MissingWheelError: a wheel of the extra ``aot`` is missing.
      jax.errors.JaxRuntimeError: the compiler refuses.
    """
    lowered, options = lower_for(chip, f, *structs), {}
    if chip in _GPUS:
        options["xla_gpu_cuda_data_dir"] = _toolkit()
    with as_on(chip):  # what is split over chips is lowered only then
        return lowered.compile(compiler_options=options)


def lower_for(chip: str, f: Callable, *structs: Any) -> jax.stages.Lowered:
    """The first half of `compile_for`: StableHLO, with custom calls still to be compiled.

    Arguments and errors are those of `compile_for`.
    """
    (device,) = devices(chip, 1)
    alone = SingleDeviceSharding(device)

    def placed(s):
        given = s.sharding if isinstance(s, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=given or alone)

    structs = jax.tree.map(placed, structs)
    platform = platform_of(chip)
    with as_on(chip):
        return jax.jit(f).trace(*structs).lower(lowering_platforms=(platform,))


def platform_of(chip: str) -> str:
    """As lowering rules name the platform of one of `CHIPS`."""
    return "cuda" if chip in _GPUS else "tpu"


def as_on(chip: str):
    """A context in which kernels see that chip as the one they are for, compiled or explained.

    Without an abstract device Pallas asks the default backend's, and finds a CPU.
    """
    (device,) = devices(chip, 1)
    kind = AbstractDevice(
        device_kind=device.device_kind,
        num_cores=None if chip in _GPUS else device.num_cores,
        platform="gpu" if chip in _GPUS else "tpu",
    )
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind))


def conv_windows(compiled: jax.stages.Compiled) -> list[str]:
    """The ``window={...}`` of every cuDNN convolution that XLA:GPU chose, in order.

    ``size`` is the width of the kernel that cuDNN gets, ``rhs_dilate`` the dilation that it
    is told of. A size beyond the number of taps is a kernel filled with zeros, or the
    gradient of the kernel as a convolution as wide as time.
    """
    return [
        re.search(r"window={([^}]*)}", line)[1]
        for line in compiled.as_text().splitlines()
        if "__cudnn$conv" in line and "window=" in line
    ]


@functools.cache
def devices(chip: str, count: int) -> tuple[Any, ...]:
    """So many chips of a kind that need not be here, to make a `jax.sharding.Mesh` of.

    Raises:
      ValueError: ``chip`` is unknown, or there are fewer of a kind of TPU in one host.
      MissingWheelError: a wheel of the extra ``aot`` is missing.
    """
    if chip in _GPUS:
        _require("jax-cuda13-plugin", "jax-cuda13-pjrt")
        # The plugin looks for NVIDIA's libraries, which compiling does not need.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        topology = topologies.get_topology_desc(
            chip, platform="cuda", topology=f"1x1x{count}", target_config=_GPUS[chip]
        )
    elif chip in _TPUS:
        _require("libtpu")
        for name, value in _TPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        topology = topologies.get_topology_desc(platform="tpu", topology_name=_TPUS[chip])
    else:
        raise ValueError(f"chip must be one of {', '.join(CHIPS)}, got {chip!r}")
    if count > len(topology.devices):
        raise ValueError(f"a host has {len(topology.devices)} of {chip}, got count={count}")
    return tuple(topology.devices[:count])


@functools.cache
def _toolkit() -> str:
    """A folder shaped like a CUDA toolkit around the ptxas of triton's wheel.

    Without one XLA stops with 'No PTX compilation provider is available'.
    """
    _require("triton")
    root = tempfile.TemporaryDirectory(prefix="cuda_toolkit_")
    _KEPT.append(root)
    triton = Path(importlib.util.find_spec("triton").origin).parent
    Path(root.name, "bin").symlink_to(triton / "backends/nvidia/bin")
    return root.name


_KEPT: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


def _require(*wheels: str) -> None:
    for wheel in wheels:
        try:
            version = importlib.metadata.version(wheel)
        except importlib.metadata.PackageNotFoundError:
            raise MissingWheelError(
                f"compiling for this chip needs the wheel {wheel}, which is not installed: "
                'pip install ".[aot]" in the folder of conv_pallas, or make venv-aot'
            ) from None
        if wheel.startswith("jax-") and version != jax.__version__:
            raise MissingWheelError(
                f"the wheel {wheel} must have jax's version {jax.__version__}, got {version}"
            )
