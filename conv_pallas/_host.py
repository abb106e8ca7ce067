"""The processor that this runs on."""

import functools
import os
import platform
from pathlib import Path


def processor() -> str:
    """Its name, as the system tells it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def model() -> str:
    """Numbers that tell it from others of its name: a virtual machine's may be vague."""
    names = ("cpu family", "model", "stepping", "CPU implementer", "CPU part")
    return "-".join(_cpuinfo()[name] for name in names if name in _cpuinfo())


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
