"""Estimates, from libtpu's compiler alone, of our TPU kernels and of XLA's own convolution.

    python -m benchmarks.static tpu                     # every layer and chain, v5e and v6e
    python -m benchmarks.static tpu --layers wavenet,chain --generation v6e

No TPU takes part, and nothing here is a measured time. For each program the compiler's output
gives three lower bounds, in cycles of one core: bundles of instructions with the trips of their
loops (`conv_pallas.schedule`), products over what the matrix units can do, and bytes to and from
HBM over its bandwidth (`benchmarks.traffic`). The largest of the three is the estimate. Waits are
in none of them. XLA's programs and ours are read by the same code. Copies that only change a layout
count: in a single operation every array comes and goes in the default one, in a chain XLA
is free to keep another in between.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from rich.console import Console

from benchmarks import progress, stored, traffic
from benchmarks.layers import LAYERS, quick
from conv_pallas import aot, schedule
from conv_pallas._layers import Layer, select
from conv_pallas.inspection import structs
from conv_pallas.primitives import PRIMITIVES
from conv_pallas.spec import OPERATIONS, lhs_rhs_out

RESULTS = Path(__file__).parent / "results" / "tpu-static"
# Cycles a second; the vendor's peak rates are those at this clock.
CLOCK = {"v5e": 1.5e9, "v6e": 1.75e9}
OURS, XLA = "pallas_tpu", ("xla_native", "xla")

CHAINS = (
    Layer("chain/C128/K3/D4", "", 8, 4096, 128, 128, 3, 4, activation="relu", dtype="bfloat16"),
    Layer("chain/C256/K7/D64", "", 8, 16384, 256, 256, 7, 64, activation="relu", dtype="bfloat16"),
    Layer("chain/C512/K3/D64", "", 8, 4096, 512, 512, 3, 64, activation="relu", dtype="bfloat16"),
    Layer("chain/depthwise", "", 8, 4096, 512, 512, 4, 1, G=512, activation="silu",
          dtype="bfloat16"),
    Layer("chain/C25/K7/D16", "", 64, 784, 25, 25, 7, 16, activation="relu"),
)  # fmt: skip
LINKS = 4
BFLOAT16 = tuple(
    dataclasses.replace(c, name=c.name.replace("chain", "bfloat16"), activation=None)
    for c in CHAINS
    if c.dtype == "bfloat16"
)
# Channels that fill no lanes; and many samples, which XLA lays along lanes instead of time.
RAGGED = (
    Layer("ragged/C2/O30", "", 32, 400, 2, 30, 7),
    Layer("ragged/C120", "", 8, 1000, 120, 120, 3, 4, dtype="bfloat16"),
    Layer("ragged/C192", "", 8, 1024, 192, 192, 3, 4, dtype="bfloat16"),
    Layer("ragged/C200/O300", "", 4, 1000, 200, 300, 3, 4),
    Layer("ragged/C320", "", 8, 1024, 320, 320, 3, 16),
    Layer("ragged/C450", "", 8, 1000, 450, 450, 3, 4, dtype="bfloat16"),
    Layer("ragged/C600", "", 4, 1024, 600, 600, 3, 4, dtype="bfloat16"),
)
BATCHES = (
    Layer("batch/N128/T784", "", 128, 784, 25, 25, 7, 16),
    Layer("batch/N256/T16", "", 256, 16, 32, 32, 3),
)
ALONE = BFLOAT16 + RAGGED + BATCHES  # estimated beside the benchmarks' layers


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates of one core, by second. The products are of bfloat16."""

    clock: float
    operations: float
    bandwidth: float

    @classmethod
    def named(cls, name: str) -> "Chip":
        with aot.as_on(name):
            info = pltpu.get_tpu_info()
        return cls(CLOCK[name], info.bf16_ops_per_second, info.mem_bw_bytes_per_second)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one compiled program; ``bundles``, ``mxu`` and ``memory`` are in cycles.

    Attributes:
      bundles, mxu, memory: the three bounds, see the module.
      spills: stores of spilled vector registers in loops, as they stand in the code.
      spilled: those stores with the trips of their loops, as `bundles` has them.
      registers: vector registers of the operation with most of them, see `Schedule.registers`.
      vmem: bytes that the operation with most of it uses, windows and scratch.
      uncounted: loops whose trips are not written; `bundles` has one trip of each.
      length: bundles of the code, without trips.
    """

    bundles: int
    mxu: int
    memory: int
    spills: int
    spilled: int
    registers: int
    vmem: int
    uncounted: int
    length: int

    @property
    def cycles(self) -> int:
        return max(self.bundles, self.mxu, self.memory)


def _products(layer: Layer) -> int:
    """Of one operation, those with padding left out."""
    spec = layer.spec
    u = np.arange(spec.out_time) * spec.stride - spec.padding[0]
    steps = sum(int(((0 <= u + k * layer.D) & (u + k * layer.D < layer.T)).sum())
                for k in range(layer.K))  # fmt: skip
    return layer.N * steps * (layer.C // layer.G) * layer.O


def estimate(chip: str, rates: Chip, folder: Path, program, products: int) -> Estimate:
    """Compiles ``program``, a pair of a function and its operands, and reads what is written."""
    for file in folder.iterdir():
        file.unlink()
    f, structs = program
    compiled = aot.compile_for(chip, f, *structs)
    schedules = schedule.read_program(list(folder.iterdir()))
    hlo = compiled.as_text()
    bytes_ = traffic.hbm_bytes(hlo)
    return Estimate(
        sum(s.bundles for s in schedules.values()),
        round(2 * products / rates.operations * rates.clock),
        round(bytes_ / rates.bandwidth * rates.clock),
        sum(s.spills for s in schedules.values()),
        sum(s.spilled for s in schedules.values()),
        max((s.registers for s in schedules.values()), default=0),
        traffic.scoped_vmem(hlo),
        sum(s.uncounted for s in schedules.values()),
        sum(s.length for s in schedules.values()),
    )


# --- Programs ---


def single(layer: Layer, operation: str, implementation: str):
    """One of the three primitives."""
    x, w, _, g = structs(layer)
    primitive, operands = PRIMITIVES[operation], lhs_rhs_out(operation, x, w, g)[:2]
    params = dict(spec=layer.spec, kernel_batch=0, precision=None, out_dtype=jnp.dtype(layer.dtype),
                  implementation=(implementation,), out_sharding=None)  # fmt: skip
    return lambda lhs, rhs: primitive.bind(lhs, rhs, **params), operands


def chain(layer: Layer, biased: bool, training: bool, implementation: str):
    """`LINKS` layers with their activation; ``training``: with all gradients."""

    run = layer.ours(implementation)

    def forward(params, x):
        for w, bias in params:
            x = run(x, w, bias)
        return x

    def step(params, x, gy):
        y, vjp = jax.vjp(forward, params, x)
        return y, vjp(gy)

    x, w, bias, _ = structs(layer)
    params = [(w, bias if biased else None)] * LINKS
    return (step, (params, x, x)) if training else (forward, (params, x))


def programs(layers, chains) -> Iterator[tuple[dict, int, Callable]]:
    """For each program its description, products on the matrix unit, and how it is made."""
    links = {  # whether there is a bias, and gradients
        f"{LINKS} layers, forward": (False, False),
        f"{LINKS} layers with bias, forward": (True, False),
        f"{LINKS} layers with bias, training": (True, True),
    }
    alone = [(layer, operation) for layer in layers for operation in OPERATIONS]
    linked = [(layer, program) for program in links for layer in chains]
    for layer, program in (*alone, *linked):  # those that take the longest to compile are last
        described = dict(layer=layer.name, geometry=str(layer), dtype=layer.dtype)
        described |= dict(kind=layer.kind, program=program)
        products = 0 if layer.G == layer.C > 1 else _products(layer)
        if program in links:
            products *= LINKS * (3 if links[program][1] else 1)
            make = functools.partial(chain, layer, *links[program])
        else:
            make = functools.partial(single, layer, program)
        yield described, products, make


def compare(chip: str, folder: Path, layers, chains, only_ours: bool, known_rows) -> Iterator[dict]:
    """A row for each program: every implementation's estimate, or the reason that it has none."""
    rates, known = Chip.named(chip), {}
    for described, products, program in programs(layers, chains):
        if any(described.items() <= row.items() for row in known_rows):
            continue
        key = (described["geometry"], described["dtype"], described["program"])
        if key not in known:
            row = {}
            for implementation in (*XLA, OURS):
                if only_ours and implementation != OURS:
                    continue
                if implementation == "xla" and not described["kind"].startswith("depthwise"):
                    continue  # it is the native one on a TPU
                try:
                    found = estimate(chip, rates, folder, program(implementation), products)
                except NotImplementedError as e:
                    row[implementation] = dict(declines=str(e))
                    continue
                except traffic.UnreadableError as e:
                    row[implementation] = dict(unreadable=str(e))
                    continue
                except jax.errors.JaxRuntimeError as e:
                    row[implementation] = dict(fails=str(e).splitlines()[0])
                    continue
                row[implementation] = dataclasses.asdict(found) | dict(estimate=found.cycles)
            known[key] = row
        yield described | known[key]


def ratio(row: dict) -> float | None:
    """The least of XLA's estimates over ours; None where one of them has none."""
    against = [row[i]["estimate"] for i in XLA if "estimate" in row.get(i, {})]
    return min(against) / row[OURS]["estimate"] if against and "estimate" in row[OURS] else None


# --- Command line ---


def _chosen(arguments) -> list[Layer]:
    """The most telling first, so that a run that is cut short has them.

    Raises:
      ValueError: a word of ``arguments.layers`` selects nothing.
    """
    telling = [layer for layer in quick() if isinstance(layer, Layer)]  # no whole networks
    first = (*CHAINS, *ALONE, *telling)
    known = first if arguments.quick else tuple(dict.fromkeys((*first, *LAYERS)))
    chosen = select(arguments.layers, known) if arguments.layers else known
    if arguments.dtype:
        chosen = [dataclasses.replace(layer, dtype=arguments.dtype) for layer in chosen]
    return list(chosen)


def _run(chip: str, arguments) -> int:
    folder = Path(os.environ["CONV_PALLAS_DUMP"])
    chosen = _chosen(arguments)
    layers, chains = (
        [layer for layer in chosen if (layer.model == "chain") is links] for links in (False, True)
    )
    what = "estimates in cycles from compiler output; nothing was measured"
    versions = {p: importlib.metadata.version(p) for p in ("jax", "libtpu")}
    head = dict(what=what, chip=chip, **versions, **dataclasses.asdict(Chip.named(chip)))
    rows, runs = [], []  # a result that was resumed has several runs
    path = Path(arguments.output or "", f"{chip}.json")
    if arguments.resume and path.is_file():
        before = json.loads(path.read_text())
        if any(before[key] != value for key, value in head.items()):
            print(f"{path} is by other versions than {versions}", file=sys.stderr)
            return 2
        rows, runs = before["rows"], before.get("runs", [])
    today = datetime.date.today().isoformat()
    head |= dict(runs=[*runs, dict(date=today, commit=stored.commit(), rows_before=len(rows))])
    total = sum(1 for _ in programs(layers, chains))
    console = Console(highlight=False, soft_wrap=True)
    with progress.bar(chip, console) as bar:
        task = bar.add_task("", total=total, completed=len(rows))
        for row in compare(chip, folder, layers, chains, arguments.ours, list(rows)):
            rows.append(row)
            bar.update(task, advance=1, description=row["layer"])
            console.print(_told(chip, row))
            if arguments.output:  # after every row: what is there when it is stopped counts
                _write(path, head, rows)
    failed = [row["layer"] for row in rows if "fails" in row[OURS]]
    spilled = [row["layer"] for row in rows if row[OURS].get("spills")]
    print(f"libtpu {versions['libtpu']}, {chip}: XLA's estimate over ours; nothing was measured")
    print(f"of {len(rows)} programs {len(spilled)} of ours spill in a loop, {len(failed)} fail")
    return 1 if failed else 0


def _told(chip: str, row: dict) -> str:
    """A row on one line: XLA's estimate over ours, and what ours takes."""
    ours, against = row[OURS], ratio(row)
    line = f"{chip} {row['layer']:<34} {row['program']:<32}"
    if "estimate" not in ours:
        return f"{line} {ours.get('fails') or '-'}"
    figure = f"{against:5.2f}" if against else "    -"
    return (
        f"{line} {figure}  {ours['vmem'] / 2**20:5.1f} MiB VMEM  {ours['registers']:>4} registers"
        f"  {ours['spills']:>5} spills"
    )


def _write(path: Path, head: dict, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n]}}\n')


def main(argv: list[str] | None = None) -> int:
    """Exit status 1: one of our kernels does not compile."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("device", choices=["tpu"])
    parser.add_argument("--generation", "--chips", default="v5e,v6e", help="of v5e, v6e; both")
    parser.add_argument("--layers", help="words, of which a layer's name contains one; all")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="instead of each its own")
    parser.add_argument("--ours", action="store_true", help="leave XLA's programs out")
    parser.add_argument("--resume", action="store_true", help="keep what --output has already")
    parser.add_argument("--quick", action="store_true", help="of each model the most dilated layer")
    parser.add_argument("--output", help=f"where to write JSON; the committed one is {RESULTS}")
    arguments = parser.parse_args(argv)
    chips = arguments.generation.split(",")
    if not set(chips) <= set(CLOCK):
        parser.error(f"--generation must be of {', '.join(CLOCK)}, got {arguments.generation!r}")
    try:
        _chosen(arguments)
    except ValueError as e:
        parser.error(f"--layers: {e}")
    if "CONV_PALLAS_DUMP" in os.environ:
        try:
            return _run(*chips, arguments)
        except KeyboardInterrupt:
            return 130
    status = 0
    for chip in chips:
        status = max(status, _in_a_process(chip, argv or sys.argv[1:]))
        if status == 130:
            break
    return status


def _in_a_process(chip: str, argv: list[str]) -> int:
    """libtpu reads its flags once, as it is loaded: where it writes is a process's own."""
    folder = tempfile.mkdtemp(prefix="bundles_")
    flags = schedule.DUMP_FLAGS.format(folder=folder)
    environment = os.environ | dict(
        JAX_PLATFORMS="cpu", CONV_PALLAS_DUMP=folder, LIBTPU_INIT_ARGS=flags
    )
    command = [sys.executable, "-m", "benchmarks.static", *argv, "--generation", chip]
    try:
        return subprocess.run(command, env=environment).returncode
    except KeyboardInterrupt:
        print("interrupted: rows that are done are kept")
        return 130
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
