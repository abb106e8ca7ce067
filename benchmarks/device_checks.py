"""Whether the Triton kernels are right on the GPU at hand: steps of `benchmarks.on_device`."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import device_layers, stored
from benchmarks.on_device import Log, kill
from conv_pallas import _measure, conv1d
from conv_pallas.explanation import default_platform
from conv_pallas.kernels import xla
from conv_pallas.spec import OPERATIONS, lhs_rhs_out
from tests import cases, packed, triton_cases, triton_epilogue
from tests.cases import Case
from tests.support import bind, padded, rows
from tests.tolerance import check
from tests.triton_epilogue import Fused


def versions(log: Log, dry: bool) -> None:
    """What is installed, and that a kernel compiles and runs with it: the shims are enough."""
    log.write(**_measure.host(), commit=stored.commit())
    for package in ("triton", "jax-triton", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "torch"):
        try:
            log.write(package=package, version=importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            log.write(package=package, version=None)
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem"
        smi = subprocess.run(["nvidia-smi", query, "--format=csv"], capture_output=True, text=True)
        log.write(nvidia_smi=smi.stdout.strip())
    log.write(ptxas=shutil.which("ptxas"), compute_sanitizer=_compute_sanitizer())
    _check_operations(log, Case("first_call", C=64, O=64, T=64, dtype="bfloat16"), dry, must=True)


def negative_start(log: Log, dry: bool) -> None:
    """What all TMA tiles rely on: a tile that starts before time 0 reads zeros there."""
    for T, D in ((64, 5), (7, 64), (300, 1), (300, 200)):
        case = Case("negative_start", batch=(2,), T=T, C=64, O=64, D=D, dtype="bfloat16")
        _check_operations(log, case, dry, must=True)
    beyond_32_bits(log, dry, 2**10 if dry else 2**27)


LAST = 64  # steps of arrays that are zeros before


def beyond_32_bits(log: Log, dry: bool, T: int) -> None:
    """The last of three samples of T steps and 8 channels, which of 2**27 begins at 2**31.

    All is zeros but for the last steps, whose results are those of these steps alone.
    """
    for name, G in (("far_dense", 1), ("far_depthwise", 8)):
        case = Case(name, batch=(3,), T=T, C=8, O=8, D=2, G=G, dtype="bfloat16")
        needed = 3 * 2 * math.prod(case.x_shape)  # XLA plans two such arrays; and some room
        memory = _memory()
        if memory is not None and memory < needed:
            why = f"needs {needed / 2**30:.1f} GiB, and the device has {memory / 2**30:.1f}"
            log.write(case=name, T=T, skipped=why)
            continue
        short = dataclasses.replace(case, batch=(1,), T=LAST)
        for operation in OPERATIONS:
            run = functools.partial(_check_last, case, short, operation, dry)
            _told(log, run, must=True, case=name, T=T, D=case.D, operation=operation)


def _memory() -> int | None:
    """Bytes that this process may have of the device's; None where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def _check_last(case: Case, short: Case, operation: str, dry: bool) -> None:
    lhs, rhs, _ = lhs_rhs_out(operation, *short.arrays())
    problem, sums = case.problem(operation), operation == "conv1d_kernel_grad"

    def after_zeros(a):
        return jnp.zeros(case.x_shape, a.dtype).at[-1, -LAST:].set(a[0])

    @jax.jit
    def compute(lhs, rhs):
        rhs = after_zeros(rhs) if sums else rhs
        out = bind(problem, after_zeros(lhs), rhs, (device_layers.ours(dry),))
        # Of gradients some steps before the last are not zero.
        before = False if sums else jnp.any(out[:-1] != 0) | jnp.any(out[-1, : -2 * LAST] != 0)
        return out if sums else out[-1:, -LAST:], before

    out, before = compute(lhs, rhs)
    assert not before, f"{operation}: what only zeros reach is not zero"
    check(
        np.asarray(out), operation, lhs, rhs, short.spec, out_dtype=problem.out_dtype,
        platform=default_platform(),
    )  # fmt: skip


def correctness(log: Log, dry: bool, shard: int = 0, shards: int = 1, only: str = "") -> None:
    """Every case of the tests, plain and with epilogues, against the formula in float64."""
    every = [*triton_cases.EXTRA, *triton_epilogue.FUSED, *triton_cases.PACKED, *cases.CASES]
    if only:
        every = [case for case in every if case.name in only.split(",")]
    if dry:
        # A sample, by XLA's composition. That rounds 16 bits twice, before the bias and after, and
        # would fail fused cases that a kernel has to pass.
        wide = lambda case: not isinstance(case, Fused) or case.case.dtype == "float32"  # noqa: E731
        every = list(filter(wide, every))
    mine = every[shard :: shards * (21 if dry else 1)]
    for case in log.each(mine, lambda case: case.name):
        with contextlib.nullcontext() if dry else triton_cases.own_tile(case.name):
            if case in triton_cases.PACKED:
                _check_packed(log, case, dry)
            elif isinstance(case, Fused):
                _check_fused(log, case, dry)
            elif 0 not in (*case.x_shape, *case.out_shape):  # or nothing reaches a kernel
                _check_operations(log, case, dry)


def _check_operations(log: Log, case: Case, dry: bool, must: bool = False) -> None:
    """One line for each operation of a case, which may be declined unless it ``must`` run."""
    x, w, g = case.arrays()
    x, g = rows(padded(x, case)), rows(g)
    for operation in OPERATIONS:
        problem = case.problem(operation)
        lhs, rhs, _ = lhs_rhs_out(operation, x, w, g)

        def run(problem=problem, lhs=lhs, rhs=rhs, operation=operation):
            compute = lambda lhs, rhs: bind(problem, lhs, rhs, (device_layers.ours(dry),))  # noqa: E731
            out = np.asarray(jax.jit(compute)(lhs, rhs))
            check(
                out, operation, lhs, rhs, case.spec, out_dtype=problem.out_dtype,
                precision=case.precision, platform=default_platform(),
            )  # fmt: skip

        _told(log, run, must, case=case.name, T=case.T, D=case.D, operation=operation)


def _check_fused(log: Log, fused: Fused, dry: bool) -> None:
    """One line for a layer with its bias and activation, and one for all its gradients."""
    case = fused.case
    x, w, bias, gy, _ = fused.arrays()
    operands = (x, w) if bias is None else (x, w, bias)

    def layer(*operands):
        return conv1d(
            *operands, **case.kwargs, activation=fused.activation,
            implementation=device_layers.ours(dry),
        )  # fmt: skip

    def forward():
        fused.check_forward(np.asarray(jax.jit(layer)(*operands)), x, w, bias)

    def backward():
        wanted = [i for i, there in enumerate(fused.wanted) if there and i < len(operands)]

        def gradients(gy, *operands):
            def of(*live):
                full = list(operands)
                for i, value in zip(wanted, live, strict=True):
                    full[i] = value
                return layer(*full)

            y, vjp = jax.vjp(of, *(operands[i] for i in wanted))
            return y, vjp(gy)

        y, grads = jax.jit(gradients)(gy, *operands)
        fused.check_forward(np.asarray(y), x, w, bias)  # with what the derivative needs beside it
        out = dict(zip(wanted, grads, strict=True))
        out = [None if i not in out else np.asarray(out[i]) for i in range(3)]
        fused.check_backward(out, x, w, bias, gy)

    _told(log, forward, case=fused.name, operation="fused")
    _told(log, backward, case=fused.name, operation="backward")


def _check_packed(log: Log, case: Fused, dry: bool) -> None:
    """One line for a layer of which each output sees some taps, and all its gradients."""
    kernel, depthwise = xla.KERNEL, case.problem().depthwise
    if not dry:
        from conv_pallas.kernels import triton_dense, triton_depthwise  # which a machine may lack

        kernel = (triton_depthwise if depthwise else triton_dense).KERNEL
    elif not depthwise:
        case = dataclasses.replace(case, platform="cpu")  # where XLA has one

    def run():
        if (why := kernel.decline_packed(case.problem())) is not None:
            raise NotImplementedError(why)
        packed.check(kernel, case, jax.jit)

    _told(log, run, case=case.name, operation="packed")


def _told(log: Log, run, must: bool = False, **what) -> None:
    try:
        run()
        log.write(**what, ok=True)
    except NotImplementedError as e:
        log.write(**what, declined=str(e), ok=False if must else None)
    except Exception as e:  # a file of failures is what this is for
        log.write(**what, ok=False, error=f"{type(e).__name__}: {e}"[:1500])


def repeatability(log: Log, dry: bool) -> None:
    """The same input gives the same bits, a hundred times over."""

    def same(a, b):
        bits = lambda a: jax.lax.bitcast_convert_type(a, f"uint{8 * a.dtype.itemsize}")  # noqa: E731
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return jnp.array([(bits(a) == bits(b)).all() for a, b in pairs]).all()

    same = jax.jit(same)
    chosen = device_layers.with_operations(device_layers.goals(dry)[:3])
    for layer, operation in log.each(chosen, lambda item: item[0].name):
        arrays = device_layers.arrays(layer)
        f = device_layers.forward("ours", layer, dry)
        run = jax.jit(device_layers.operation(operation, f))
        first, repeats = run(*arrays), 3 if dry else 100
        equal = sum(bool(same(run(*arrays), first)) for _ in range(repeats))
        log.write(layer=layer.name, operation=operation, of=repeats, equal=equal,
                  ok=equal == repeats)  # fmt: skip


SANITIZED = (
    "tiles_ragged", "tiles_depthwise", "taps_same", "stride_grouped", "time_shorter_than_dilation",
    "fused_walked_wide_silu_bias_dxdwdb", "fused_tiles_gelu_bias_dxdwdb", "resident",
)  # fmt: skip


def _compute_sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )


def sanitizer(log: Log, dry: bool) -> None:
    """Reads and writes out of bounds, and races, as compute-sanitizer sees them."""
    tool = _compute_sanitizer()
    if dry or tool is None:
        return log.write(skipped="there is no compute-sanitizer here")
    # An allocation for each array, or what is beyond its end would be the allocator's own.
    environment = os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    running = {}
    for which in ("memcheck", "racecheck"):
        folder = log.path.parent / which
        command = [
            # Our kernels, none of XLA's, and no calls that JAX knows may fail. What is wrong in one
            # kernel is not to end the others, nor do the assemblers need to be looked into.
            tool, "--tool", which, "--kernel-name", "kns=conv_", "--report-api-errors", "no",
            "--destroy-on-device-error", "kernel", "--target-processes", "application-only",
            "--error-exitcode", "9", sys.executable, "-m", "benchmarks.on_device",
            "--step", "correctness", "--only", ",".join(SANITIZED), "--out", str(folder),
            "--seconds", str(max(10, log.left() - 10)),
        ]  # fmt: skip
        with folder.with_suffix(".txt").open("w", encoding="utf-8") as told:
            running[which] = subprocess.Popen(
                command, stdout=told, stderr=subprocess.STDOUT, env=environment, process_group=0
            )
    for which, process in running.items():
        folder = log.path.parent / which
        try:
            code = process.wait(max(1, log.left()))
        except subprocess.TimeoutExpired:
            code = None
            kill(process)
        told = folder.with_suffix(".txt").read_text(encoding="utf-8", errors="replace")
        lines = folder / "correctness.jsonl"
        checked = len(lines.read_text(encoding="utf-8").splitlines()) if lines.exists() else 0
        shutil.rmtree(folder, ignore_errors=True)  # its lines are told as well
        found = [line for line in told.splitlines() if line.startswith("=========")]
        # Whoever looks for errors first looks at the first, and at the sum, which is last.
        found = found if len(found) < 16 else [*found[:12], "...", *found[-3:]]
        what = dict(tool=which, checked=checked, exit=code, found=found)
        if code is None:
            wrong = any("Invalid" in line or "Race reported" in line for line in found)
            log.write(**what, cut_short=which, ok=False if wrong else None)
        else:
            log.write(**what, ok=code == 0 and checked > 0)
