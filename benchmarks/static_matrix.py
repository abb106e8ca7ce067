"""Compiles every published layer's three operations for every TPU that libtpu knows.

    python -m benchmarks.static_matrix [--generation v4,v5e] [--layers TEXT]

With the tiles that the kernels choose by themselves, in bfloat16 unless --dtype says otherwise;
nothing is run and nothing measured. Geometries that occur more than once are compiled once.
Exit status 1: a program did not compile, or has fewer than three kernels of ours.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence

import jax
from rich.console import Console

from benchmarks import progress
from benchmarks.layers import LAYERS
from conv_pallas import aot, conv1d
from conv_pallas._layers import Layer, select
from conv_pallas.inspection import structs

IMPLEMENTATION = "pallas_tpu"


def distinct(layers: Sequence[Layer], dtype: str) -> list[Layer]:
    """One layer for each geometry, in ``dtype``."""
    layers = [dataclasses.replace(layer, dtype=dtype) for layer in layers]
    return list({(str(layer), layer.padding): layer for layer in reversed(layers)}.values())[::-1]


def declined(layer: Layer) -> bool:
    """Strides and groups of several channels are XLA's."""
    return layer.S > 1 or layer.E > 1 or layer.G not in (1, layer.C)


def all_three(layer: Layer):
    """``(x, kernel) -> (y, dx, dw)`` and its operands."""

    def run(x, kernel):
        y, vjp = jax.vjp(
            lambda x, w: conv1d(x, w, **layer.geometry, implementation=IMPLEMENTATION), x, kernel
        )
        return y, *vjp(y)

    return run, structs(layer)[:2]


def compiled(chip: str, layers: Sequence[Layer]) -> Iterator[tuple[Layer, str | None, float]]:
    """``(layer, what went wrong or None, seconds that it took)``."""
    for layer in layers:
        f, operands = all_three(layer)
        start, wrong = time.perf_counter(), None
        try:
            program = aot.compile_for(chip, f, *operands)
            kernels = program.as_text().count('custom_call_target="tpu_custom_call"')
            if kernels < 3:
                wrong = f"{kernels} kernels instead of 3"
        except (NotImplementedError, jax.errors.JaxRuntimeError) as e:
            wrong = " ".join(str(e).split())[:300]
        yield layer, wrong, time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static_matrix", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--generation", "--chips", default=",".join(aot.TPUS),
        help=f"of {', '.join(aot.TPUS)}; all",
    )  # fmt: skip
    parser.add_argument("--layers", metavar="TEXT", help="words, of which a name contains one; all")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options = parser.parse_args(argv)
    chips = options.generation.split(",")
    if not set(chips) <= set(aot.TPUS):
        parser.error(f"--generation must be of {', '.join(aot.TPUS)}, got {options.generation!r}")
    try:
        layers = select(options.layers, LAYERS) if options.layers else LAYERS
    except ValueError as e:
        parser.error(f"--layers: {e}")
    layers = distinct([layer for layer in layers if not declined(layer)], options.dtype)
    console, failures, done, seconds = Console(highlight=False, soft_wrap=True), 0, 0, 0.0
    try:
        with progress.bar("compiling", console) as bar:
            task = bar.add_task("", total=len(chips) * len(layers))
            for chip in chips:
                bar.update(task, description=chip)
                for layer, wrong, took in compiled(chip, layers):
                    done, seconds = done + 1, seconds + took
                    bar.advance(task)
                    if not console.is_terminal and done % 16 == 0:
                        console.print(f"{done} of {len(chips) * len(layers)}")
                    if wrong is not None:
                        failures += 1
                        console.print(f"{chip} {layer.name} ({layer}): {wrong}")
                console.print(f"{chip}: {done} programs so far, {failures} failed")
    except KeyboardInterrupt:
        console.print("interrupted: what follows was compiled before")
    console.print(
        f"{done} of {len(chips) * len(layers)} programs of three operations, {options.dtype}: "
        f"{failures} failed; {seconds / max(1, 3 * done):.2f} s each operation"
    )
    return 1 if failures or done < len(chips) * len(layers) else 0


if __name__ == "__main__":
    sys.exit(main())
