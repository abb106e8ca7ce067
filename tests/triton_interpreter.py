"""Runs Triton kernels on Triton's interpreter, with poison around every array.

    python -m tests.triton_interpreter dense ragged
    python -m tests.triton_interpreter --kernel triton_mine [CASE ...]

prints one line per case and operation, and the file of the kernel that ran it. The first is for
the kernels that are shipped, each of which runs what it takes. The second is for one file, whatever
its name and its priority, and without a case for all that it does not decline.
"""

import argparse
import difflib
import faulthandler
import os
import sys
import traceback
from collections.abc import Callable
from unittest import mock

os.environ |= {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}  # before both are imported

from conv_pallas import kernels
from conv_pallas.kernels import triton_compat
from tests import added_kernels, triton_guarded, triton_shipped
from tests.support import shipped_alone
from tests.triton_cases import NAMES


def _tell(what: str, run: Callable[[], None], files: list[str]) -> int:
    """Runs it, and says what came; returns how many failed. ``files`` are read afterwards."""
    print(f"at {what}", flush=True)  # all that is left to read where it ends the process
    try:
        run()
    except Exception:
        print(f"FAIL {what} ({', '.join(files)})", flush=True)
        print(f"of {added_kernels.layer_of(what)}\n{traceback.format_exc()}", flush=True)
        return 1
    print(f"PASS {what} ({', '.join(files)})", flush=True)
    return 0


def run_shipped(names: list[str]) -> int:
    failed = 0
    with mock.patch.object(kernels, "discover", shipped_alone()):
        for name in names:
            for what, run in triton_shipped.runs_of(name).items():
                triton_shipped.files.clear()
                failed += _tell(what, run, triton_shipped.files)
    return failed


def run_added(file: str, names: list[str], capabilities: list[int]) -> int:
    """Runs one file's kernel on what it does not decline, of those names or of all."""
    kernel = added_kernels.of_file(file)
    triton_compat.call = triton_guarded.call_in_jax
    failed, own = 0, added_kernels.Own(file)
    for capability in capabilities:
        triton_compat.compute_capability = lambda c=capability: c
        for check in added_kernels.checks_of(file, "cuda", names):
            what = f"{check.name} sm_{capability}"
            if check.declined is not None:
                if names:
                    print(f"declined {what}: {check.declined}", flush=True)
                continue
            own.count(check)
            failed += _tell(what, lambda check=check: _launched(kernel, check), [file])
    print(own)
    return failed + (not own)


def _launched(kernel: kernels.Kernel, check: added_kernels.Check) -> None:
    triton_guarded.ran.clear()
    check.run(triton_guarded.eagerly)
    ran = triton_guarded.ran
    assert ran, "it called nothing by triton_compat.call, for which alone the interpreter stands in"
    assert all(name.startswith("conv_") for name in ran), f"device functions are conv_*, not {ran}"
    assert kernel.opaque, "what ends in a custom call says opaque=True"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.triton_interpreter", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE",
        help="of tests/triton_cases.py or tests/cases.py; with --kernel, default: all of them",
    )  # fmt: skip
    parser.add_argument(
        "--kernel", metavar="FILE", action="append", default=[],
        help="by its file's name, as triton_dense; may be repeated; default: the shipped",
    )  # fmt: skip
    parser.add_argument(
        "--capability", type=int, choices=(80, 90), help="of the chip; default: 80 and 90, in turn"
    )
    options = parser.parse_args(arguments)
    alone = not options.kernel
    known = {*added_kernels.TABLE, *(NAMES if alone else ())}
    for name in options.cases:
        if name not in known:
            near = difflib.get_close_matches(name, known, 5, 0.3)
            parser.error(f"there is no case {name!r}; there are {', '.join(near)}, ...")
    if alone and (options.capability or not options.cases):
        parser.error("name cases for the shipped kernels, or a kernel by --kernel")
    faulthandler.enable()  # a read far outside ends the process
    if alone:
        return run_shipped(options.cases)
    try:
        for file in options.kernel:
            if not added_kernels.in_triton(file, added_kernels.of_file(file, "cuda")):
                raise LookupError(f"the kernel {file!r} is not in Triton")
    except LookupError as e:
        parser.error(e.args[0])
    capabilities = [options.capability] if options.capability else [80, 90]
    return sum(run_added(file, options.cases, capabilities) for file in options.kernel)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
