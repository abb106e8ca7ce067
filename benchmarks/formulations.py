"""Times every XLA formulation against the native one: what `kernels/xla.py` takes its rules from.

python -m benchmarks.formulations [--quick] [--only SUBSTRING] [--json PATH]
"""

import argparse
import dataclasses
import datetime
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from conv_pallas.kernels import xla
from conv_pallas.kernels.xla_formulations import FORWARD, KERNEL_GRAD
from conv_pallas.spec import OPERATIONS, ConvSpec, Problem

RESULTS = Path(__file__).parent / "results"
BASELINE = "native"


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer, causal as in a temporal convolutional network."""

    N: int
    T: int
    C: int
    O: int
    K: int
    D: int = 1
    S: int = 1
    G: int = 1
    dtype: str = "float32"

    @property
    def name(self) -> str:
        fields = dataclasses.asdict(self)
        ones = ("D", "S", "G")
        parts = [f"{k}{v}" for k, v in fields.items() if k != "dtype" and (k not in ones or v > 1)]
        return " ".join([self.kind, *parts, self.dtype])

    @property
    def kind(self) -> str:
        if self.K == 1:
            return "pointwise"
        if self.G == 1:
            return "dense"
        return "depthwise" if self.G == self.C else "grouped"

    def problem(self, operation) -> Problem:
        spec = ConvSpec(self.T, self.K, self.S, ((self.K - 1) * self.D, 0), self.D, 1, self.G)
        dtype = jnp.dtype(self.dtype)
        backend = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
        return Problem(operation, spec, self.N, self.C, self.O, dtype, dtype, dtype, None, backend)


def sweep() -> Iterator[Case]:
    """Layers as they are published, and those around them where the best formulation changes."""
    for dtype in ("float32", "bfloat16"):
        for N, T, C, D in (
            (8, 64, 16, 1),
            (32, 64, 25, 2),
            (8, 256, 32, 4),
            (8, 1000, 64, 16),
            (4, 1000, 128, 64),
            (4, 2048, 128, 8),
            (2, 1024, 512, 4),
            (1, 16000, 32, 512),
            (1, 4096, 256, 512),
        ):
            for K in (2, 3, 7):
                yield Case(N, T, C, C, K, D, dtype=dtype)
        for T, C, O, K in (
            (1000, 1, 25, 7),
            (784, 1, 25, 2),
            (4096, 4, 32, 11),
            (2000, 64, 1, 3),
            (1000, 2, 2, 3),
            (16000, 1, 64, 16),
            (4000, 32, 32, 21),
            (2000, 32, 32, 51),
            (500, 128, 128, 51),
        ):
            yield Case(4, T, C, O, K, dtype=dtype)
        for T, C, O in ((64, 25, 25), (1000, 64, 128), (4096, 512, 128), (2000, 1, 32)):
            yield Case(4, T, C, O, 1, dtype=dtype)
        for T, C, K, D in (
            (64, 16, 3, 1),
            (512, 64, 3, 8),
            (1024, 512, 4, 1),
            (1024, 512, 4, 64),
            (4096, 512, 3, 128),
            (2048, 128, 31, 1),
            (1024, 256, 51, 1),
        ):
            yield Case(4, T, C, C, K, D, G=C, dtype=dtype)
        for T, C, M, K, D in ((512, 64, 2, 3, 1), (1024, 128, 4, 4, 8), (1000, 8, 8, 7, 1)):
            yield Case(4, T, C, C * M, K, D, G=C, dtype=dtype)
        for T, C, G, K, D in (
            (512, 32, 2, 3, 1),
            (512, 32, 8, 3, 1),
            (512, 64, 32, 3, 1),
            (1024, 256, 2, 3, 4),
            (1024, 256, 8, 3, 4),
            (1024, 256, 32, 3, 4),
            (2048, 128, 8, 7, 64),
            (1024, 512, 128, 3, 1),
        ):
            yield Case(4, T, C, C, K, D, G=G, dtype=dtype)
        for T, C, O, K, S, G in (
            (4096, 1, 64, 8, 4, 1),
            (4096, 64, 64, 8, 4, 1),
            (1000, 128, 128, 3, 2, 1),
            (4096, 64, 64, 4, 2, 64),
            (2048, 128, 128, 5, 2, 8),
            (1000, 64, 128, 1, 2, 1),
        ):
            yield Case(4, T, C, O, K, S=S, G=G, dtype=dtype)


def quick() -> Iterator[Case]:
    yield Case(2, 64, 8, 8, 3, 2)
    yield Case(2, 64, 8, 8, 3, 2, G=8)
    yield Case(2, 64, 8, 8, 3, 1, G=2, dtype="bfloat16")


def operands(problem: Problem) -> tuple[jax.Array, jax.Array]:
    shapes = {
        "conv1d": (problem.x_shape, problem.w_shape),
        "conv1d_input_grad": (problem.y_shape, problem.w_shape),
        "conv1d_kernel_grad": (problem.x_shape, problem.y_shape),
    }[problem.operation]
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(s), problem.lhs_dtype) for s in shapes)


def seconds(f, args, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        out = f(*args)
    out.block_until_ready()
    return (time.perf_counter() - start) / calls


def plausible(name: str, problem: Problem) -> bool:
    """Whether a candidate is worth compiling: the rest is slow beyond doubt."""
    spec = problem.spec
    c, m = problem.C // spec.groups, problem.O // spec.groups
    taps = spec.kernel_size * (m if problem.operation == "conv1d_input_grad" else c)
    return {
        "shifts": taps <= 64,
        "own_pads": taps <= 16,
        "tree": taps <= 64,
        "split": 1 < spec.groups <= 32,
        "dense": 1 < spec.groups and problem.C <= 1024,
        "fold": spec.kernel_dilation > 1 and spec.stride == 1,
        "barrier": True,
    }.get(name, True)


def measure(problem: Problem, least: float, names=None) -> dict[str, dict[str, float]]:
    """For each formulation its median time, and the median over rounds of native's over its."""
    table = KERNEL_GRAD if problem.operation == "conv1d_kernel_grad" else FORWARD
    args = operands(problem)
    compiled, calls = {}, {}
    first = None
    for name in table:
        if name != BASELINE and (not plausible(name, problem) or (names and name not in names)):
            continue
        f = jax.jit(functools.partial(xla.run_as, name, problem)).lower(*args).compile()
        f(*args).block_until_ready()
        once = min(seconds(f, args, 1) for _ in range(2))
        first = first or once
        if once > 4 * first + 1e-3:
            continue
        compiled[name], calls[name] = f, max(1, round(least / once))
    times = {name: [] for name in compiled}
    for rounds in range(25):
        for name, f in compiled.items():
            times[name].append(seconds(f, args, calls[name]))
        if rounds >= 6 and all(settled(times[BASELINE], t) for t in times.values()):
            break
    return {
        name: {
            "ms": 1e3 * statistics.median(t),
            "ratio": statistics.median(ratios(times[BASELINE], t)),
            "spread": spread(ratios(times[BASELINE], t)),
        }
        for name, t in times.items()
    }


def ratios(baseline, t):
    return [b / s for b, s in zip(baseline, t, strict=True)]


def spread(values) -> float:
    """The width of the middle half, relative to the median."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def settled(baseline, t) -> bool:
    r = ratios(baseline, t)
    # The median of n values is known to about the spread over sqrt(n).
    return spread(r) / len(r) ** 0.5 < 0.02


def host() -> dict:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":")[1].strip()
    return {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "cpu": cpu,
        "cores": os.cpu_count(),
    }


def main(argv=None) -> None:
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three tiny cases")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args(argv)
    console = Console()
    results = []
    for case in quick() if args.quick else sweep():
        if args.only not in case.name:
            continue
        for operation in OPERATIONS:
            problem = case.problem(operation)
            found = measure(problem, 1e-3 if args.quick else 1e-2)
            results.append(
                {
                    "case": dataclasses.asdict(case),
                    "operation": operation,
                    "chosen": xla.choose(problem),
                    "formulations": found,
                }
            )
            best = sorted(found, key=lambda n: -found[n]["ratio"])
            console.print(
                f"{case.name:48} {operation[6:] or '_forward':12} {found[BASELINE]['ms']:9.3f} ms  "
                + "  ".join(f"{n} {found[n]['ratio']:.2f}" for n in best),
                highlight=False,
                soft_wrap=True,
            )
    if args.json:
        args.json.write_text(json.dumps({"host": host(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
