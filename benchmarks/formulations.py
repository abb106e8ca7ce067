"""Times every XLA formulation of the three operations, which `kernels/xla_cpu.py` is made of.

    python -m benchmarks.formulations [--quick] [--only TEXT] [--layers TEXT] [--json PATH]

All formulations of an operation take turns. They are compared with what nnx.Conv runs: one
`lax.conv_general_dilated` (``native``) or a transpose of that, after a pad in memory if the padding
is CAUSAL (``padded``). Candidates that are hopeless at first sight are left out, as are those that
take over three times as long.
"""

import argparse
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import layers, stored
from conv_pallas import _measure
from conv_pallas._layers import Layer, select
from conv_pallas.explanation import default_platform
from conv_pallas.kernels import xla, xla_cpu
from conv_pallas.kernels.xla_formulations import FORWARD, KERNEL_GRAD
from conv_pallas.kernels.xla_pieces import UNROLLED
from conv_pallas.spec import OPERATIONS, Problem

SETTINGS = _measure.Settings(least=0.005, rounds=(5, 15), settled=0.03, limit=3.0)


def label(layer: Layer) -> str:
    """The convolution of a layer, without what it is by default."""
    sizes = [f"{k}{v}" for k in "NTCOKDSG" if (v := getattr(layer, k)) > 1 or k in "NTCOK"]
    return " ".join([*sizes, layer.dtype, *([layer.padding] * (layer.padding != "CAUSAL"))])


def stock_of(layer: Layer) -> str:
    """The formulation that nnx.Conv takes."""
    return "padded" if layer.padding == "CAUSAL" else "native"


# N, T, C, O, K, D, S, G; padding is CAUSAL.
CASES = (
    # Dense, from a handful of steps and channels to many.
    (8, 64, 16, 16, 3),
    (32, 64, 25, 25, 7, 2),
    (4, 128, 32, 32, 3),
    (8, 256, 32, 32, 7, 4),
    (8, 1000, 64, 64, 3, 16),
    (4, 1000, 128, 128, 3, 64),
    (4, 1000, 128, 128, 7, 8),
    (2, 512, 512, 512, 3, 4),
    (8, 1000, 128, 128, 3, 16),
    (16, 2000, 128, 128, 3, 4),
    (4, 1000, 256, 256, 5, 4),
    (16, 80, 600, 600, 3, 4),
    (1, 4096, 512, 512, 3, 64),
    (1, 16000, 32, 32, 3, 512),
    (4, 2000, 32, 32, 21),
    (4, 500, 64, 64, 51),
    # One or several sequences, short and long: who pads, and whether there is enough to multiply.
    (1, 64, 512, 512, 3, 4),
    (1, 64, 512, 512, 8, 4),
    (1, 100, 450, 450, 3, 4),
    (1, 5000, 32, 32, 3, 512),
    (1, 16384, 64, 64, 3, 1024),
    (8, 4000, 64, 128, 2, 16),
    (32, 32, 512, 512, 3),
    # Enough to be taken in pieces.
    (8, 1000, 25, 25, 7, 4),
    (16, 4096, 16, 16, 3, 4),
    (16, 4096, 25, 25, 7, 4),
    (16, 4096, 32, 32, 7, 4),
    (32, 784, 25, 25, 7, 16),
    (32, 784, 25, 25, 7),
    # Many taps.
    (4, 2000, 4, 4, 31, 4),
    (4, 2000, 12, 12, 21, 4),
    (4, 2000, 20, 20, 21, 4),
    (4, 2000, 25, 25, 31, 4),
    (4, 2000, 32, 8, 31, 2),
    # More than the convolution likes to have between its registers, and less than needs pieces.
    (32, 1020, 10, 10, 8, 32),
    (32, 400, 16, 16, 3),
    (8, 400, 20, 20, 5, 8),
    (8, 400, 30, 30, 3, 8),
    (32, 400, 30, 30, 7, 16),
    (4, 256, 32, 32, 3, 8),
    # Fewer steps than channels.
    (1, 80, 600, 600, 3, 4),
    (1, 128, 256, 256, 3),
    (1, 256, 600, 600, 3),
    # Few channels in or out.
    (4, 4000, 1, 1, 3),
    (4, 1000, 1, 25, 7),
    (4, 4000, 1, 64, 16),
    (4, 4000, 2, 2, 3),
    (4, 4000, 4, 4, 8),
    (4, 2000, 8, 8, 3),
    (4, 2000, 64, 1, 3),
    (4, 2000, 32, 1, 8),
    (8, 500, 256, 4, 5, 4),
    (8, 1000, 64, 10, 3),
    (8, 500, 64, 24, 3, 2),
    (4, 2000, 2, 256, 7, 4),
    (16, 500, 1, 128, 7),
    # 1x1.
    (4, 1000, 25, 10, 1),
    (4, 1000, 64, 128, 1),
    (16, 500, 128, 8, 1),
    (32, 1000, 3, 16, 1, 1, 2),
    # Depthwise, and with a multiplier.
    (4, 1024, 512, 512, 4, 1, 1, 512),
    (4, 1024, 512, 512, 4, 64, 1, 512),
    (4, 64, 16, 16, 3, 1, 1, 16),
    (4, 1024, 64, 64, 31, 1, 1, 64),
    (4, 1000, 64, 64, 4, 1, 2, 64),
    (4, 512, 64, 256, 4, 2, 1, 64),
    (4, 64, 32, 32, 3, 2, 1, 32),
    (1, 256, 256, 256, 3, 1, 1, 256),
    (8, 1000, 64, 64, 7, 1, 1, 64),
    (4, 1000, 64, 64, 16, 1, 1, 64),
    (1, 2000, 512, 512, 4, 1, 1, 512),
    (2, 1000, 512, 512, 3, 1, 1, 512),
    (2, 1000, 256, 256, 33, 1, 1, 256),
    (1, 1000, 512, 512, 87, 2, 1, 512),
    (2, 500, 768, 768, 31, 1, 1, 768),
    (4, 1000, 256, 256, 9, 1, 1, 256),
    (8, 2000, 256, 256, 75, 1, 1, 256),
    (2, 1000, 256, 256, 17, 8, 1, 256),
    (4, 1000, 256, 256, 33, 1, 2, 256),
    (2, 1000, 64, 256, 31, 1, 1, 64),
    # Grouped.
    (4, 512, 32, 32, 3, 1, 1, 2),
    (4, 1024, 256, 256, 3, 4, 1, 2),
    (4, 1024, 256, 256, 3, 4, 1, 8),
    (4, 1024, 256, 256, 3, 4, 1, 32),
    (4, 512, 128, 128, 7, 16, 1, 8),
    (2, 512, 1024, 1024, 3, 1, 1, 64),
    (1, 1024, 256, 256, 3, 4, 1, 4),
    (2, 1000, 512, 512, 3, 2, 1, 128),
    (4, 500, 128, 128, 5, 1, 1, 32),
    # Strided.
    (4, 4096, 1, 64, 8, 1, 4),
    (4, 1000, 128, 128, 3, 1, 2),
    (4, 1000, 64, 64, 4, 8, 2),
    (4, 1000, 128, 128, 5, 1, 2, 8),
    (4, 2000, 64, 64, 4, 1, 2),
    (8, 4000, 32, 32, 5, 1, 2),
    (4, 500, 25, 25, 5, 1, 2),
    (4, 4000, 1, 32, 8, 1, 2),
    (4, 2000, 32, 1, 16, 1, 4),
    (4, 500, 768, 768, 3, 1, 2, 64),
    (1, 4000, 64, 64, 4, 1, 2),
    (1, 4000, 64, 64, 17, 1, 2),
    (1, 30000, 1, 64, 16, 1, 8),
    (2, 16000, 32, 64, 16, 1, 4),
    (2, 16000, 32, 64, 31, 1, 3),
    (4, 2000, 32, 32, 9, 1, 2),
    (4, 4000, 16, 16, 16, 1, 4),
    (4, 1000, 128, 128, 8, 1, 4),
    (4, 500, 256, 256, 5, 1, 2),
    (6, 1500, 64, 64, 10, 1, 5),
    (8, 1000, 64, 64, 3, 1, 2),
    (8, 1000, 64, 64, 5, 1, 2),
    (8, 1000, 64, 64, 17, 1, 2),
    (12, 500, 128, 128, 10, 1, 5),
    (16, 1000, 16, 16, 8, 1, 4),
    (4, 1000, 128, 128, 4, 1, 2),
    (4, 2000, 64, 16, 16, 1, 4),
    (4, 4000, 64, 1, 17, 1, 2),
    (1, 10000, 64, 64, 5, 2, 2),
    (1, 10000, 64, 64, 16, 2, 2),
)
# Of padding a good part: dilations that are not far from the sequence's length.
DEEP = (
    (32, 600, 30, 30, 8, 64),
    (32, 400, 30, 30, 7, 32),
    (64, 784, 25, 25, 7, 128),
    (8, 1000, 64, 64, 3, 128),
    (8, 1000, 64, 64, 3, 256),
    (8, 1000, 64, 64, 5, 64),
    (8, 1000, 64, 64, 7, 128),
    (4, 1000, 64, 64, 15, 64),
    (8, 1000, 128, 128, 2, 256),
    (8, 1000, 128, 128, 2, 512),
    (8, 1000, 128, 128, 3, 256),
    (2, 1000, 512, 512, 3, 256),
)
# Padding that nnx.Conv leaves to the convolution.
SAME = (
    (1, 1024, 128, 128, 7, 3),
    (1, 5000, 64, 64, 3, 16),
    (2, 4096, 64, 64, 3, 3),
    (2, 256, 256, 256, 3, 3),
    (4, 8192, 32, 32, 3, 3),
    (1, 3750, 32, 32, 21, 10),
    (1, 7500, 15, 15, 51, 8),
    (1, 100000, 15, 15, 51, 8),
    (1, 417, 512, 512, 75, 1, 1, 512),
    (8, 1000, 64, 64, 3, 512),
    (8, 1000, 64, 64, 5, 128),
)
BFLOAT16 = (
    (32, 64, 25, 25, 7, 2),
    (4, 1000, 128, 128, 3, 8),
    (2, 512, 512, 512, 3, 4),
    (8, 784, 25, 25, 7, 4),
    (4, 1000, 64, 64, 3, 16),
    (16, 4096, 16, 16, 3, 4),
    (16, 4096, 25, 25, 7, 4),
    (16, 4096, 64, 64, 3, 4),
    (16, 4096, 64, 64, 7, 4),
    (8, 1000, 128, 128, 3, 4),
    (4, 1000, 1, 25, 7),
    (4, 2000, 64, 1, 3),
    (4, 1000, 64, 128, 1),
    (16, 4096, 16, 16, 15, 4),
    (4, 2000, 25, 25, 31, 4),
    (4, 1000, 64, 64, 51, 4),
    (1, 100000, 64, 64, 3, 16),
    (4, 1024, 512, 512, 4, 1, 1, 512),
    (4, 1000, 256, 256, 31, 1, 1, 256),
    (4, 512, 64, 256, 4, 2, 1, 64),
    (4, 512, 128, 128, 3, 4, 1, 8),
    (4, 1000, 64, 64, 7, 1, 1, 8),
    (4, 512, 128, 128, 3, 4, 1, 32),
    (8, 1000, 16, 8, 7),
    (8, 500, 64, 64, 3, 1, 2, 8),
    (8, 1000, 64, 64, 16, 1, 4),
    (2, 8000, 64, 64, 33, 1, 4),
    (1, 16000, 64, 64, 17, 1, 2),
    (4, 16000, 32, 32, 64, 1, 2),
    (1, 10000, 64, 64, 33, 2, 2),
    (8, 4000, 1, 64, 16, 1, 2),
    (8, 4000, 64, 1, 16, 1, 2),
    (1, 40000, 64, 64, 64, 1, 2),
    (8, 1000, 64, 64, 3, 256),
    (8, 500, 64, 64, 5, 100),
)
FLOAT16 = (
    (4, 1000, 128, 128, 3, 2),
    (4, 1024, 128, 128, 4, 1, 1, 128),
    (4, 1000, 64, 64, 4, 1, 1, 16),
    (16, 500, 64, 64, 5, 1, 2, 8),
)
QUICK = ((2, 64, 8, 8, 3, 2), (2, 64, 8, 8, 3, 2, 1, 8), (2, 64, 8, 8, 3, 1, 1, 2))


def sweep(quick: bool = False) -> Iterator[Layer]:
    for more, cases in (
        ({}, QUICK if quick else (*CASES, *DEEP)),
        ({"padding": "SAME"}, () if quick else SAME),
        ({"dtype": "bfloat16"}, () if quick else BFLOAT16),
        ({"dtype": "float16"}, () if quick else FLOAT16),
    ):
        for sizes in cases:
            yield Layer("case", "made up", *sizes, **more)


def published(text: str) -> list[Layer]:
    """Of the layers that the benchmarks time those that `select` finds, each size once."""
    chosen = (layer for layer in select(text, layers.ALL) if isinstance(layer, Layer))
    platform = jax.default_backend()
    fitted = (layers.fit(layer, platform) for layer in chosen)
    return list({label(layer): layer for layer in fitted}.values())


def operands(problem: Problem) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(s), problem.lhs_dtype) for s in problem.shapes[:2])


def candidates(problem: Problem, stock: str) -> list[str]:
    """Stock first, then all that are worth compiling."""
    spec, c, m = problem.spec, problem.C // problem.spec.groups, problem.O // problem.spec.groups
    products = spec.kernel_size * (problem.as_convolution[1] // spec.groups)
    each_its_own = spec.groups > 1 and c == m == 1
    few = each_its_own or spec.kernel_size <= UNROLLED
    spreads = problem.as_convolution[0].input_dilation > 1 == spec.kernel_dilation
    worth = {
        "shifts": products <= 64 or each_its_own,
        "own_pads": products <= 16 or problem.depthwise,
        "tree": products <= 64 or each_its_own,
        "matmuls": few,
        "im2col": few,
        "scatter": few,
        "blocks": spec.kernel_size > 3 and not each_its_own,
        "split": 1 < spec.groups <= 32,
        "channel_blocks": problem.depthwise and spec.kernel_size > 3 and problem.platform == "cpu",
        "dense": 1 < spec.groups,
        "fold": spec.kernel_dilation > 1 and spec.stride == 1,
        "winograd": spec.groups == spec.stride == spec.input_dilation == 1 < spec.kernel_size,
        "depth_to_space": spreads,
        "depth_to_space_winograd": spreads,
        "depth_to_space_im2col": spreads,
        "space_to_depth": problem.spec.stride > 1 == problem.spec.kernel_dilation,
        "space_to_depth_winograd": problem.spec.stride > 1 == problem.spec.kernel_dilation,
        "barrier": problem.platform != "cpu",
        "symmetric": problem.platform != "cpu",
        "parts": problem.platform == "cpu" and len(xla_cpu.pieces(problem)[0]) > 1,
    }
    table = KERNEL_GRAD if problem.operation == "conv1d_kernel_grad" else FORWARD
    names = [stock, *(n for n in (*table, "parts") if n != stock and worth.get(n, True))]
    transposed = problem.operation == "conv1d_input_grad" and problem.platform != "cpu"
    return [*names, "transposed"] if transposed else names


def measure(problem: Problem, stock: str) -> dict[str, dict[str, float]]:
    """For each formulation its median time in ms, and how many times faster than stock it is."""
    arrays = operands(problem)
    calls = {}
    for name in candidates(problem, stock):
        compiled = jax.jit(functools.partial(xla.run_as, name, problem)).lower(*arrays).compile()
        call = functools.partial(compiled, *arrays)
        (once,) = _measure.interleaved({name: call}, _ONCE).values()
        calls[name] = call
        if name == stock:
            limit = 3 * min(once)
        elif min(once) > limit:
            del calls[name]
    times = _measure.interleaved(calls, SETTINGS)
    found = {}
    for name, seconds in times.items():
        ratio = _measure.ratio(times[stock], seconds)
        found[name] = {
            "ms": round(1e3 * _measure.Spread.of(seconds).median, 4),
            "speedup": round(ratio.median, 3),
            "quartiles": [round(ratio.low, 3), round(ratio.high, 3)],
        }
    return found


_ONCE = _measure.Settings(least=0, rounds=(3, 3), limit=0.5)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.formulations", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="three tiny cases")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cases whose name has one of these in it: a,b,c"
    )
    parser.add_argument(
        "--layers", metavar="TEXT", help="instead the benchmarks' layers with such a word: a,b,c"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the results")
    options = parser.parse_args(argv)
    console = Console(highlight=False)
    results = []
    try:
        cases = sweep(options.quick) if options.layers is None else published(options.layers)
        for case in cases:
            if not any(text in label(case) for text in options.only.split(",")):
                continue
            stock = stock_of(case)
            for operation in OPERATIONS:
                problem = case.problem(operation, default_platform())
                results.append({
                    "case": label(case), "operation": operation, "stock": stock,
                    "chosen": xla.choose(problem), "formulations": measure(problem, stock),
                })  # fmt: skip
                console.print(line(results[-1]), soft_wrap=True)
    except KeyboardInterrupt:
        console.print("interrupted: what follows was measured before")
    if results:
        console.print(summary(results))
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            rows = ",\n".join(json.dumps(r) for r in results)
            head = json.dumps({"host": _measure.host() | {"commit": stored.commit()}})
            options.json.write_text(f'{head[:-1]}, "results": [\n{rows}\n]}}\n', encoding="utf-8")
            console.print(f"wrote {options.json}")
    return 0


def line(result: dict) -> str:
    found = result["formulations"]
    ranked = sorted(found, key=lambda name: -found[name]["speedup"])
    mark = lambda name: f"{'*' if name == result['chosen'] else ''}{name}"  # noqa: E731
    ratios = "  ".join(f"{mark(name)} {found[name]['speedup']:.2f}" for name in ranked)
    stock = found[result["stock"]]["ms"]
    return f"{result['case']}, {result['operation']}, {stock:.3f} ms: {ratios}"


def summary(results: Sequence[dict]) -> Table:
    """What was chosen, against stock and against the fastest."""
    table = Table(box=box.SIMPLE_HEAD, caption="×: times faster than what nnx.Conv runs")
    for column in ("case", "operation", "chosen", "×", "fastest", "×"):
        table.add_column(column)
    for result in results:
        found = result["formulations"]
        best = max(found, key=lambda name: found[name]["speedup"])
        chosen = found.get(result["chosen"], {}).get("speedup", float("nan"))
        table.add_row(
            result["case"], result["operation"], result["chosen"],
            f"[{'red' if not chosen >= 0.95 else 'default'}]{chosen:.2f}[/]",
            best, f"{found[best]['speedup']:.2f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
