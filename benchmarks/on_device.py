"""All that needs an NVIDIA GPU, in one command and under ten minutes.

    python -m benchmarks.on_device                # into benchmarks/results/<device>/
    python -m benchmarks.on_device --dry-run      # the same code, small, on whatever is here

Steps run one after the other, what matters most first, each in a process of its own, so that a
crash or a hang of one costs the others nothing. Each appends a line to ``<step>.jsonl`` as soon
as it knows something: a run that is cut short leaves what it has measured. A step exits with 1
where something is wrong, and so does the whole.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

# Name, seconds at most, and how many processes share the work. Only what is timed needs the
# device to itself.
STEPS = {
    "versions": (60, 1),
    "negative_start": (60, 1),
    "correctness": (150, 6),
    "goals": (180, 1),
    "pytorch": (60, 1),
    "repeatability": (60, 1),
    "tuning": (120, 1),
    "layers": (120, 1),
    "sanitizer": (100, 1),
}


class Log:
    """Lines of JSON, each on the disk before the next is measured."""

    def __init__(self, folder: Path, step: str, seconds: float, shard: int = 0):
        self.path = folder / (f"{step}.jsonl" if shard == 0 else f"{step}.{shard}.jsonl")
        self.path.unlink(missing_ok=True)
        self.end = time.monotonic() + seconds
        self.failures = 0

    def write(self, ok: bool | None = None, **fields) -> None:
        if ok is not None:
            fields["ok"] = ok
            self.failures += not ok
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields, default=str) + "\n")
        told = " ".join(f"{k}={_short(v)}" for k, v in fields.items())
        print(f"  {told}", flush=True)

    def out_of_time(self) -> bool:
        return time.monotonic() > self.end


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:300]


# --- The steps. What they import is imported in their own process. ---


def versions(log: Log, dry: bool) -> None:
    import importlib.metadata

    from conv_pallas import _measure

    log.write(**_measure.host(), commit=_commit())
    for package in ("triton", "jax-triton", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "torch"):
        try:
            log.write(package=package, version=importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            log.write(package=package, version=None)
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem"
        smi = subprocess.run(["nvidia-smi", query, "--format=csv"], capture_output=True, text=True)
        log.write(nvidia_smi=smi.stdout.strip())


def negative_start(log: Log, dry: bool) -> None:
    """What all TMA tiles rely on: a tile that starts before time 0 reads zeros there."""
    from tests.cases import Case

    for T, D in ((64, 5), (7, 64), (300, 1), (300, 200)):
        case = Case("negative_start", batch=(2,), T=T, C=64, O=64, D=D, dtype="bfloat16")
        _check(log, case, dry)


def correctness(log: Log, dry: bool, shard: int = 0, shards: int = 1, only: str = "") -> None:
    """Every case of the tests, against the formula in float64."""
    from tests import cases, triton_cases

    every = [*triton_cases.EXTRA, *cases.CASES]
    if only:
        every = [case for case in every if case.name in only.split(",")]
    for case in every[shard :: shards * (20 if dry else 1)]:
        if 0 in (*case.x_shape, *case.out_shape):
            continue  # nothing reaches a kernel
        if log.out_of_time():
            log.write(cut_short=case.name)
            return
        _check(log, case, dry)


def _check(log: Log, case, dry: bool) -> None:
    """One line for each operation of a case."""
    import jax
    import numpy as np

    from tests.support import bind, padded, rows
    from tests.tolerance import check

    x, w, g = case.arrays()
    x, g = rows(padded(x, case)), rows(g)
    for operation, (lhs, rhs) in {
        "conv1d": (x, w),
        "conv1d_input_grad": (g, w),
        "conv1d_kernel_grad": (x, g),
    }.items():
        problem = case.problem(operation)
        what = dict(case=case.name, T=case.T, D=case.D, operation=operation)
        try:
            run = jax.jit(lambda lhs, rhs, problem=problem: bind(problem, lhs, rhs, _ours(dry)))
            out = np.asarray(run(lhs, rhs))
            check(
                out, operation, lhs, rhs, case.spec, out_dtype=problem.out_dtype,
                precision=case.precision, platform=_platform(),
            )  # fmt: skip
            log.write(**what, ok=True)
        except NotImplementedError as e:
            log.write(**what, declined=str(e))
        except Exception as e:  # a file of failures is what this is for
            log.write(**what, ok=False, error=f"{type(e).__name__}: {e}"[:1500])


def repeatability(log: Log, dry: bool) -> None:
    """The same input gives the same bits, a hundred times over."""
    import jax

    bits = lambda a: jax.lax.bitcast_convert_type(a, "uint16")  # noqa: E731
    same = jax.jit(lambda a, b: (bits(a) == bits(b)).all())
    for layer in _goal_layers(dry)[:3]:
        x, w, g = _arrays(layer)
        for operation in OPERATIONS:
            if log.out_of_time():
                return log.write(cut_short=layer.name)
            run = jax.jit(_operation(operation, _conv(layer, _ours(dry))))
            first, repeats = run(x, w, g), 3 if dry else 100
            equal = sum(bool(same(run(x, w, g), first)) for _ in range(repeats))
            log.write(layer=layer.name, operation=operation, of=repeats, equal=equal,
                      ok=equal == repeats)  # fmt: skip


OPERATIONS = ("forward", "input_grad", "kernel_grad")


def goals(log: Log, dry: bool) -> None:
    """The shapes that the project has set itself goals for, against every baseline."""
    _copy_bandwidth(log, dry)
    for layer in _goal_layers(dry):
        for operation in OPERATIONS:
            if log.out_of_time():
                return log.write(cut_short=layer.name)
            _time_operation(log, layer, operation, dry)


def layers(log: Log, dry: bool) -> None:
    """The layers of the sweep, against the stock layer and XLA's best, as a user would call."""
    from benchmarks.layers import quick
    from conv_pallas import _layers, _measure

    for layer in quick()[:2] if dry else quick():
        layer = _layers.fit(layer, _platform())
        for which in _measure.PASSES:
            if log.out_of_time():
                return log.write(cut_short=layer.name)
            try:
                m = _measure.compare(
                    layer, which, implementation=_ours(dry), settings=_measure.QUICK
                )
            except (NotImplementedError, _measure.DisagreementError) as e:
                log.write(layer=layer.name, which=which, ok=False, error=str(e)[:1500])
                continue
            log.write(
                layer=layer.name, which=which, speedup=m.speedup.median,
                stock=m.time(_measure.STOCK).median, ours=m.time(_measure.OURS).median,
                seconds=m.seconds, difference=m.difference,
            )  # fmt: skip


def tuning(log: Log, dry: bool) -> None:
    """Tiles for the goals' dense shapes; writes a file that belongs into kernels/."""
    if dry:
        return log.write(skipped="there is no GPU to tune for")
    import jax
    import triton

    from conv_pallas.kernels import triton_compat, triton_tuned

    tiles, rates = {}, {}
    dense = [layer for layer in _goal_layers(dry) if layer.G == 1][:2]
    for layer, operation in ((layer, operation) for operation in OPERATIONS for layer in dense):
        calls, keys = {}, []
        for tile in (None, *TILES):
            if log.out_of_time():
                return log.write(cut_short=layer.name)
            try:
                with triton_tuned.trial(tile) as keys:
                    f = _operation(operation, _conv(layer, "triton"))
                    calls[tile] = _compiled(f, _arrays(layer))
            except Exception as e:  # too large for this chip, say
                log.write(layer=layer.name, operation=operation, tile=tile,
                          error=f"{type(e).__name__}: {e}"[:500])  # fmt: skip
        seconds = {tile: s[0] for tile, s in _seconds(calls).items()}
        for tile, median in seconds.items():
            log.write(layer=layer.name, operation=operation, tile=tile, seconds=median,
                      tflops=_flops(layer) / median / 1e12)  # fmt: skip
        best = min(seconds, key=seconds.get, default=None)
        # The heuristic stays where nothing beats it clearly.
        if best is not None and seconds[best] < 0.98 * seconds.get(None, math.inf):
            tiles[keys[-1]], rates[keys[-1]] = best, seconds[best]
        kind = triton_compat.device_kind()
        content = {"device": kind, "commit": _commit(), "jax": jax.__version__,
                   "triton": triton.__version__, "tiles": tiles, "seconds": rates}  # fmt: skip
        file = log.path.with_name(triton_tuned.file_name(kind))
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# Rows, columns, depth, warps, stages: see `triton_dense.Config`.
TILES = (
    (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 4),
    (128, 128, 64, 8, 5), (256, 128, 64, 8, 3), (64, 256, 64, 4, 4), (128, 64, 64, 4, 4),
    (64, 64, 64, 4, 4), (256, 64, 64, 8, 4),
)  # fmt: skip


def pytorch(log: Log, dry: bool) -> None:
    """cuDNN as PyTorch calls it, channels first as it likes them, for the goals' layers."""
    try:
        import torch
    except ModuleNotFoundError:
        return log.write(skipped="PyTorch is not installed here")
    if dry or not torch.cuda.is_available():
        return log.write(skipped="PyTorch sees no GPU here")
    from torch.nn import functional as F

    torch.backends.cudnn.benchmark = True
    for layer in _goal_layers(dry):
        if log.out_of_time():
            return log.write(cut_short=layer.name)
        low = (layer.K - 1) * layer.D
        like = dict(device="cuda", dtype=torch.bfloat16, requires_grad=True)
        x = torch.randn(layer.N, layer.C, layer.T, **like)
        w = torch.randn(layer.O, layer.C // layer.G, layer.K, **like)

        def forward(x=x, w=w, low=low, layer=layer):
            y = F.conv1d(x, w, padding=low, dilation=layer.D, groups=layer.G)
            return y[..., : layer.T]

        y = forward()
        g = torch.randn_like(y)
        calls = {
            "forward": forward,
            "input_grad": lambda y=y, x=x, g=g: torch.autograd.grad(y, x, g, retain_graph=True),
            "kernel_grad": lambda y=y, w=w, g=g: torch.autograd.grad(y, w, g, retain_graph=True),
        }
        for operation, call in calls.items():
            times = []
            for _ in range(12):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
            log.write(layer=layer.name, operation=operation, seconds=sorted(times[2:])[5])


def sanitizer(log: Log, dry: bool) -> None:
    """Reads and writes out of bounds, and races, as compute-sanitizer sees them."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if dry or not Path(tool).exists():
        return log.write(skipped="there is no compute-sanitizer here")
    names = "tiles_ragged,tiles_depthwise,stride_grouped,time_shorter_than_dilation"
    for check in ("memcheck", "racecheck"):
        left = log.end - time.monotonic()
        command = [
            tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m",
            "benchmarks.on_device", "--step", "correctness", "--only", names,
            "--out", str(log.path.parent / check),
        ]  # fmt: skip
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=max(10, left))
        except subprocess.TimeoutExpired:
            log.write(tool=check, cut_short=True)
            continue
        log.write(tool=check, ok=run.returncode == 0, tail=run.stdout[-600:] + run.stderr[-600:])


# --- Timing ---


def _goal_layers(dry: bool):
    from conv_pallas._layers import Layer

    def layer(name, *sizes, **more):
        made = Layer(name, "a goal", *sizes, dtype="bfloat16", **more)
        return _smaller(made) if dry else made

    dense = [layer(f"dense-512/D{D}", 8, 4096, 512, 512, 3, D) for D in (1, 4, 64, 512, 1024)]
    return [
        *dense[1:2],
        layer("dense-64/C64", 8, 65536, 64, 64, 3),
        layer("depthwise/C12288", 1, 16384, 12288, 12288, 4, G=12288),
        *dense[:1],
        *dense[2:],
    ]


def _smaller(layer):
    import dataclasses

    C = min(layer.C, 16)
    return dataclasses.replace(
        layer, N=1, T=64, C=C, O=C, D=min(layer.D, 4), G=min(layer.G, C) if layer.G > 1 else 1
    )


def _arrays(layer, seed: int = 0):
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (
        (layer.N, layer.T, layer.C), (layer.K, layer.C // layer.G, layer.O),
        (layer.N, -(-layer.T // layer.S), layer.O),
    )  # fmt: skip
    return [jax.random.normal(k, s, jnp.dtype(layer.dtype)) for k, s in zip(keys, shapes)]  # noqa: B905


def _conv(layer, implementation: str):
    from conv_pallas import conv1d

    def f(x, w):
        return conv1d(
            x, w, strides=layer.S, padding=layer.padding, kernel_dilation=layer.D,
            feature_group_count=layer.G, implementation=implementation,
        )  # fmt: skip

    return f


def _baselines(layer):
    """What a user could write today; the fastest of them is what ours is compared to."""
    import jax.numpy as jnp
    from jax import lax

    low, T = (layer.K - 1) * layer.D, layer.T

    def native(x, w, pad):
        return lax.conv_general_dilated(
            x, w, (1,), pad, rhs_dilation=(layer.D,), feature_group_count=layer.G,
            dimension_numbers=("NWC", "WIO", "NWC"),
        )  # fmt: skip

    def stock(x, w):
        return native(jnp.pad(x, ((0, 0), (low, 0), (0, 0))), w, "VALID")

    def barrier(x, w):
        return native(lax.optimization_barrier(jnp.pad(x, ((0, 0), (low, 0), (0, 0)))), w, "VALID")

    def symmetric(x, w):
        return native(x, w, [(low, low)])[:, :T]

    def by_taps(product):
        def f(x, w):
            padded = jnp.pad(x, ((0, 0), (low, 0), (0, 0)))
            return sum(
                product(lax.slice_in_dim(padded, k * layer.D, k * layer.D + T, axis=1), w[k])
                for k in range(layer.K)
            ).astype(x.dtype)  # fmt: skip

        return f

    if layer.G == 1:
        taps = by_taps(lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32))
        return {"stock": stock, "barrier": barrier, "symmetric": symmetric, "matmuls": taps}
    taps = by_taps(lambda x, w: x.astype(jnp.float32) * w[0].astype(jnp.float32))
    return {"stock": stock, "barrier": barrier, "shifts": taps}


def _operation(operation: str, f):
    """``(x, w, g) -> result`` of one operation of a convolution ``f(x, w)``."""
    import jax

    def run(x, w, g):
        if operation == "forward":
            return f(x, w)
        if operation == "input_grad":
            return jax.vjp(lambda x: f(x, w), x)[1](g)[0]
        return jax.vjp(lambda w: f(x, w), w)[1](g)[0]

    return run


def _compiled(f, arguments):
    """A call without arguments. The device queues such calls, so that their start is hidden."""
    import jax

    compiled = jax.jit(f).lower(*arguments).compile()
    return lambda: compiled(*arguments)


def _seconds(calls) -> dict:
    """Median and quartiles of each call's seconds; they take turns."""
    from conv_pallas import _measure

    if not calls:
        return {}
    times = _measure.interleaved(calls, _measure.QUICK)
    spreads = {name: _measure.Spread.of(t) for name, t in times.items()}
    return {name: (s.median, s.low, s.high) for name, s in spreads.items()}


def _time_operation(log: Log, layer, operation: str, dry: bool) -> None:
    arguments = _arrays(layer)
    variants = {"ours": _conv(layer, _ours(dry)), "xla": _conv(layer, "xla"), **_baselines(layer)}
    calls, errors = {}, {}
    for name, f in variants.items():
        try:
            calls[name] = _compiled(_operation(operation, f), arguments)
            calls[name]()
        except Exception as e:  # cuDNN has no algorithm for some of the baselines
            calls.pop(name, None)
            errors[name] = f"{type(e).__name__}: {e}"[:300]
    if "ours" not in calls:
        return log.write(layer=layer.name, operation=operation, ok=False, errors=errors)
    seconds = _seconds(calls)
    ours = seconds["ours"][0]
    rest = {name: s[0] for name, s in seconds.items() if name != "ours"}
    best = min(rest, key=rest.get, default=None)
    log.write(
        layer=layer.name, operation=operation, ours=ours, tflops=_flops(layer) / ours / 1e12,
        terabytes_per_second=_bytes(layer) / ours / 1e12, best_baseline=best,
        speedup=rest[best] / ours if best else None, seconds=seconds, errors=errors,
    )  # fmt: skip


def _copy_bandwidth(log: Log, dry: bool) -> None:
    """Bytes read and written by a copy, with which memory-bound layers are compared."""
    import jax.numpy as jnp

    x = jnp.ones((1 << (20 if dry else 30),), jnp.bfloat16)
    median = _seconds({"copy": _compiled(lambda x: -x, (x,))})["copy"][0]
    log.write(copy_terabytes_per_second=2 * x.nbytes / median / 1e12)


def _flops(layer) -> int:
    return 2 * layer.products


def _bytes(layer) -> int:
    """Each of the three tensors once."""
    weights = layer.K * layer.C // layer.G * layer.O
    return 2 * (layer.N * layer.T * (layer.C + layer.O // layer.S) + weights)


def _platform() -> str:
    import jax

    return "cuda" if jax.default_backend() == "gpu" else jax.default_backend()


def _ours(dry: bool) -> str:
    return "xla" if dry else "triton"


def _commit() -> str:
    git = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# --- The command ---


def run_step(args) -> int:
    """One step, in this process."""
    args.out.mkdir(parents=True, exist_ok=True)
    seconds = args.seconds or STEPS[args.step][0]
    log = Log(args.out, args.step, seconds, args.shard)
    if args.step == "correctness":
        correctness(log, args.dry_run, args.shard, args.shards, args.only)
    else:
        globals()[args.step](log, args.dry_run)
    return min(1, log.failures)


def run_all(args) -> int:
    """Every step, each in a process or several."""
    out = args.out or RESULTS / _device_folder(args.dry_run)
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    # Several processes share the device, and nobody's must find its memory taken.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    worst, summary = 0, {}
    for step, (seconds, processes) in STEPS.items():
        left = end - time.monotonic()
        if left < 10:
            summary[step] = "no time left"
            continue
        seconds, start = min(seconds, left), time.monotonic()
        if args.dry_run:
            processes = 1
        print(f"{step} (at most {seconds:.0f} s)", flush=True)
        command = [
            sys.executable, "-m", "benchmarks.on_device", "--step", step, "--out", str(out),
            "--seconds", str(seconds), *(["--dry-run"] if args.dry_run else []),
        ]  # fmt: skip
        running = [
            subprocess.Popen(
                [*command, "--shard", str(i), "--shards", str(processes)], env=environment
            )
            for i in range(processes)
        ]
        codes = [_wait(process, start + seconds + 20) for process in running]
        summary[step] = {"exit": max(codes, key=abs), "seconds": round(time.monotonic() - start, 1)}
        worst = max(worst, *map(abs, codes))
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=1))
    return min(1, worst)


def _wait(process: subprocess.Popen, deadline: float) -> int:
    try:
        return process.wait(max(1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return 124


def _device_folder(dry: bool) -> str:
    """As ``nvidia-h200``. Asked of a process of its own, so that this one leaves the GPU alone."""
    if dry:
        return "dry-run"
    ask = "import jax; print(jax.devices()[0].device_kind)"
    kind = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    return re.sub("[^a-z0-9]+", "-", kind.lower()).strip("-")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.on_device", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps together")
    parser.add_argument("--dry-run", action="store_true", help="small, with XLA in Triton's place")
    parser.add_argument("--step", choices=STEPS, help="only this step, in this process")
    parser.add_argument("--only", default="", help="names of cases for the step correctness")
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--shard", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step and not args.out:
        parser.error("--step needs --out")
    return run_step(args) if args.step else run_all(args)


if __name__ == "__main__":
    sys.exit(main())
