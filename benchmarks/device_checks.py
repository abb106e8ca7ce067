"""Whether the Triton kernels are right on the GPU at hand: steps of `benchmarks.on_device`."""

import contextlib
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from benchmarks import device_layers, stored
from benchmarks.on_device import Log
from conv_pallas import _measure, conv1d
from tests import cases, triton_cases, triton_epilogue
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
    _check_operations(log, Case("first_call", C=64, O=64, T=64, dtype="bfloat16"), dry)


def negative_start(log: Log, dry: bool) -> None:
    """What all TMA tiles rely on: a tile that starts before time 0 reads zeros there."""
    for T, D in ((64, 5), (7, 64), (300, 1), (300, 200)):
        case = Case("negative_start", batch=(2,), T=T, C=64, O=64, D=D, dtype="bfloat16")
        _check_operations(log, case, dry)


def correctness(log: Log, dry: bool, shard: int = 0, shards: int = 1, only: str = "") -> None:
    """Every case of the tests, plain and with epilogues, against the formula in float64."""
    every = [*triton_cases.EXTRA, *triton_epilogue.FUSED, *cases.CASES]
    if only:
        every = [case for case in every if case.name in only.split(",")]
    for case in every[shard :: shards * (20 if dry else 1)]:
        if log.out_of_time(case.name):
            return
        with contextlib.nullcontext() if dry else triton_cases.own_tile(case.name):
            if isinstance(case, Fused):
                _check_fused(log, case, dry)
            elif 0 not in (*case.x_shape, *case.out_shape):  # or nothing reaches a kernel
                _check_operations(log, case, dry)


def _check_operations(log: Log, case: Case, dry: bool) -> None:
    """One line for each operation of a case."""
    x, w, g = case.arrays()
    x, g = rows(padded(x, case)), rows(g)
    for operation, (lhs, rhs) in {
        "conv1d": (x, w),
        "conv1d_input_grad": (g, w),
        "conv1d_kernel_grad": (x, g),
    }.items():
        problem = case.problem(operation)

        def run(problem=problem, lhs=lhs, rhs=rhs, operation=operation):
            compute = lambda lhs, rhs: bind(problem, lhs, rhs, device_layers.ours(dry))  # noqa: E731
            out = np.asarray(jax.jit(compute)(lhs, rhs))
            check(
                out, operation, lhs, rhs, case.spec, out_dtype=problem.out_dtype,
                precision=case.precision, platform=device_layers.platform(),
            )  # fmt: skip

        _told(log, run, case=case.name, T=case.T, D=case.D, operation=operation)


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


def _told(log: Log, run, **what) -> None:
    try:
        run()
        log.write(**what, ok=True)
    except NotImplementedError as e:
        log.write(**what, declined=str(e))
    except Exception as e:  # a file of failures is what this is for
        log.write(**what, ok=False, error=f"{type(e).__name__}: {e}"[:1500])


def repeatability(log: Log, dry: bool) -> None:
    """The same input gives the same bits, a hundred times over."""

    def same(a, b):
        bits = lambda a: jax.lax.bitcast_convert_type(a, f"uint{8 * a.dtype.itemsize}")  # noqa: E731
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return jax.numpy.array([(bits(a) == bits(b)).all() for a, b in pairs]).all()

    same = jax.jit(same)
    for layer in device_layers.goals(dry)[:3]:
        arrays = device_layers.arrays(layer)
        f = device_layers.forward("ours", layer, dry)
        for operation in device_layers.operations(layer):
            if log.out_of_time(layer.name):
                return
            run = jax.jit(device_layers.operation(operation, f))
            first, repeats = run(*arrays), 3 if dry else 100
            equal = sum(bool(same(run(*arrays), first)) for _ in range(repeats))
            log.write(layer=layer.name, operation=operation, of=repeats, equal=equal,
                      ok=equal == repeats)  # fmt: skip


SANITIZED = (
    "tiles_ragged", "tiles_depthwise", "stride_grouped", "time_shorter_than_dilation",
    "fused_walked_wide_silu_bias_dxdwdb", "fused_tiles_gelu_bias_dxdwdb", "resident",
)  # fmt: skip


def sanitizer(log: Log, dry: bool) -> None:
    """Reads and writes out of bounds, and races, as compute-sanitizer sees them."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if dry or not Path(tool).exists():
        return log.write(skipped="there is no compute-sanitizer here")
    for which in ("memcheck", "racecheck"):
        command = [
            tool, "--tool", which, "--error-exitcode", "9", sys.executable, "-m",
            "benchmarks.on_device", "--step", "correctness", "--only", ",".join(SANITIZED),
            "--out", str(log.path.parent / which),
        ]  # fmt: skip
        share = log.left() / (2 if which == "memcheck" else 1)
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=max(10, share))
        except subprocess.TimeoutExpired:
            log.write(tool=which, cut_short=True)
            continue
        log.write(tool=which, ok=run.returncode == 0, tail=run.stdout[-600:] + run.stderr[-600:])
