"""What the system takes of a training step on a CPU to find memory: ``python -m benchmarks.pages``.

XLA asks for memory anew in every call, and of what is more than 32 MB glibc gives all back to the
system after it, which then hands it out page by page, 4 KiB at a time. With ``SETTING`` in the
environment glibc asks for pages of 2 MiB. Published networks learn by gradient descent, their
parameters donated, stock and ours taking turns in a process; processes with the setting and without
take turns as well.

The result goes to ``benchmarks/results/cpu/pages.json``, that of ``--quick`` to
``bench-output/pages.json``.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import descent, stored
from benchmarks.layers import STACKS, fit
from benchmarks.networks import Network
from conv_pallas import _measure
from conv_pallas._measure import OURS, STEP, STOCK
from conv_pallas.nn import Conv

SETTING = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # of glibc 2.35 and newer
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
AS_IT_IS, HUGE = "as it is", "huge pages"
FAULTS = 5  # steps over which page faults are counted
KEPT = Path(__file__).parent / "results" / "cpu" / "pages.json"


def networks() -> dict[str, Network]:
    """All by name, cut down as the sweep has them."""
    return {network.name: network for network in (fit(s, "cpu") for s in STACKS)}


def learner(network: Network, conv: type[nnx.Conv]) -> descent.Learner:
    arguments = descent.arguments_of(network, STEP)
    step = jax.jit(descent.step(network, conv), donate_argnums=descent.DONATED)
    return descent.Learner(step.lower(*arguments).compile(), arguments)


def page_faults(call: Callable) -> float:
    """Of one call, once a few have been made."""
    for _ in range(3):
        jax.block_until_ready(call())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(FAULTS):
        jax.block_until_ready(call())
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / FAULTS


def measure(network: Network, settings: _measure.Settings) -> dict:
    """Of stock and ours in this process: a step's seconds, page faults and temporary bytes."""
    calls = {STOCK: learner(network, nnx.Conv), OURS: learner(network, Conv)}
    faults = {name: page_faults(call) for name, call in calls.items()}
    seconds = _measure.interleaved(calls, settings)
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "page_faults": round(faults[name]),
            "temporaries": call.compiled.memory_analysis().temp_size_in_bytes,
        }
        for name, call in calls.items()
    }


def in_a_process(network: Network, huge: bool, quick: bool) -> dict:
    """As `measure`, in a process with or without the setting.

    Raises:
      subprocess.CalledProcessError: it failed; its errors are on stderr.
    """
    environment = {name: v for name, v in os.environ.items() if name not in SETTING}
    command = [sys.executable, "-m", "benchmarks.pages", "--child", network.name]
    done = subprocess.run(
        command + ["--quick"] * quick, stdout=subprocess.PIPE, text=True, check=True,
        env=environment | (SETTING if huge else {}),
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def compare(network: Network, turns: int, quick: bool) -> dict:
    """Of one network, all turns: a line of the result."""
    came: dict[str, list[dict]] = {AS_IT_IS: [], HUGE: []}
    for turn in range(turns):
        for huge in (False, True) if turn % 2 == 0 else (True, False):
            came[HUGE if huge else AS_IT_IS].append(in_a_process(network, huge, quick))
    found = {"network": network.name, "size": str(network), "variants": {}, "huge_pages": {}}
    for name in (STOCK, OURS):
        of = {where: [turn[name] for turn in each] for where, each in came.items()}
        found["variants"][name] = {
            where: {
                "ms": [float(f"{1e3 * turn['seconds']:.4g}") for turn in each],
                "page_faults": round(statistics.median(turn["page_faults"] for turn in each)),
                "temporaries": each[0]["temporaries"],
            }
            for where, each in of.items()
        }
        pairs = zip(of[AS_IT_IS], of[HUGE], strict=True)
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)
        found["huge_pages"][name] = round(ratio, 3)
    return found


def table(results: list[dict]) -> Table:
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    rows.add_column("network")
    for column in (f"{name} {what}" for name in (STOCK, "ours") for what in ("ms", "huge", "×")):
        rows.add_column(column, justify="right")
    for r in results:
        cells = []
        for name in (STOCK, OURS):
            of = r["variants"][name]
            cells += [f"{statistics.median(of[where]['ms']):.4g}" for where in (AS_IT_IS, HUGE)]
            cells.append(f"{r['huge_pages'][name]:.2f}")
        rows.add_row(r["network"], *cells)
    return rows


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3, help="processes of each kind (default: 3)")
    parser.add_argument("--quick", action="store_true", help="few rounds; only to see that it runs")
    parser.add_argument("--networks", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--output", type=Path, help="a JSON file; default: see above")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    known = networks()
    if options.child:
        settings = _measure.QUICK if options.quick else _measure.Settings(rounds=(7, 15))
        print(json.dumps(measure(known[options.child], settings)))
        return 0
    wanted = options.networks or list(known)
    if unknown := set(wanted) - set(known):
        parser.error(f"networks are {', '.join(known)}, got {', '.join(sorted(unknown))}")
    libc = platform.libc_ver()
    if libc[0] != "glibc" or tuple(map(int, libc[1].split("."))) < (2, 35):
        parser.error(f"needs glibc 2.35 or newer, got {' '.join(libc).strip() or 'none'}")
    if not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text():
        parser.error(f"this system has no huge pages: see {HUGE_PAGES}")
    if jax.default_backend() != "cpu":
        parser.error(f"is about CPUs; set JAX_PLATFORMS=cpu, JAX runs on {jax.default_backend()}")
    console = Console(highlight=False)
    results = []
    for name in wanted:
        console.print(f"{name}: {known[name]}")
        results.append(compare(known[name], options.turns, options.quick))
    console.print(table(results))
    console.print(f"× : times as fast with {' '.join(f'{k}={v}' for k, v in SETTING.items())}")
    host = _measure.host() | {"commit": stored.commit(), "glibc": libc[1]}
    host["huge_pages"] = HUGE_PAGES.read_text().strip()
    path = options.output or (Path("bench-output") / "pages.json" if options.quick else KEPT)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"host": host, "measurements": results}, indent=1) + "\n")
    console.print(f"stored in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
