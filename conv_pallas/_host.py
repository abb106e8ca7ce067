"""The processor that this runs on, and the GPU."""

import functools
import os
import platform
import re
from pathlib import Path

import jax

# From more to less, of x86 and then of Arm; and what XLA may be told to make use of at most, of
# which the last leaves nothing of x86.
VECTORS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "avx", "sve", "asimd")
AT_MOST = {
    "AVX512_BF16": "avx512_bf16", "AVX512_VNNI": "avx512f", "AVX512": "avx512f", "AVX2": "avx2",
    "AVX": "avx", "SSE4_2": "sve",
}  # fmt: skip


def processor() -> str:
    """Its name, as the system tells it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def model() -> str:
    """Numbers that tell it from others of its name: a virtual machine's may be vague."""
    names = ("cpu family", "model", "stepping", "CPU implementer", "CPU part")
    return "-".join(_cpuinfo()[name] for name in names if name in _cpuinfo())


def vectors() -> str | None:
    """The most that it can do at once, by the name that Linux has for it; None where nobody knows.

    XLA's matmuls make use of AVX512 and of bfloat16's products, its convolution does not: which
    formulation is ahead may be another without. ``XLA_FLAGS=--xla_cpu_max_isa=AVX2`` makes of a
    processor one that has no more.
    """
    told = f"{_cpuinfo().get('flags', '')} {_cpuinfo().get('Features', '')}".split()
    limit = re.search(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    most = AT_MOST.get(limit[1].upper(), VECTORS[0]) if limit else VECTORS[0]
    return next((name for name in VECTORS[VECTORS.index(most) :] if name in told), None)


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """What Linux tells of the first core."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return {}
    first, _, _ = file.read_text(encoding="utf-8").partition("\n\n")
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def cores() -> int:
    """How many of them this process may run on, and XLA takes."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpu() -> str | None:
    """The name of the GPU that is compiled for; None where nobody said and none is here.

    Where jax compiles for a chip that is not here, its mesh names an abstract device.
    """
    kind = jax.sharding.get_abstract_mesh().abstract_device
    if kind is not None and kind.platform == "gpu":
        return kind.device_kind
    device = gpu_here()
    return device and device.device_kind


@functools.cache
def gpu_here() -> jax.Device | None:
    """The first of NVIDIA's GPUs, if there is one."""
    try:
        return jax.local_devices(backend="cuda")[0]
    except RuntimeError:  # jax's word for "no such backend"
        return None
