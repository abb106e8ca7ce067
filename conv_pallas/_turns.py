"""Turns of processes that tune side by side on one device: one times, while others compile.

To compile a kernel takes a processor of the host longer than the device takes to time it. So
several processes compile, each other tiles. What runs on the device has it for itself; what is
timed has, for the host's part in it, the host as well.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Beside others that compile, and nobody who times."""
    # Who waits to time stands at the gate, and nobody overtakes: of shared and exclusive locks
    # alone those that compile would go on forever.
    with contextlib.ExitStack() as stack:
        with _locked("gate"):
            stack.enter_context(_locked("host", shared=True))
        yield


@contextlib.contextmanager
def timing() -> Iterator[None]:
    """Alone on the device, and nobody compiles."""
    with on_device(), contextlib.ExitStack() as stack:
        with _locked("gate"):
            stack.enter_context(_locked("host"))
        yield


@contextlib.contextmanager
def on_device() -> Iterator[None]:
    """Alone on the device, others may compile."""
    with _locked("device"):
        yield


@contextlib.contextmanager
def _locked(name: str, shared: bool = False) -> Iterator[None]:
    import fcntl  # which Windows lacks, as it does Triton

    path = Path(tempfile.gettempdir()) / f"conv_pallas_{os.getuid()}_{name}.lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield  # it is unlocked as it is closed, also where the process dies
