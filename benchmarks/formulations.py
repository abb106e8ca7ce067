"""Times every XLA formulation of the three operations, which `kernels/xla_cpu.py` is made of.

    python -m benchmarks.formulations [--quick | --large | --layers TEXT | --draw N [--seed N]]
                                      [--only TEXT] [--without TEXT] [--minutes N] [--json PATH]

All formulations of an operation take turns. Forward and in kernel gradients they are compared
with what nnx.Conv runs: one `lax.conv_general_dilated` (``native``) or a transpose of that, after a
pad in memory if the padding is CAUSAL (``padded``). In input gradients it is one
`lax.conv_general_dilated` that pads in its window: nnx.Conv's own, of CAUSAL padding, computes the
gradient of the zeros too, cuts it off, and takes longer. Candidates that are hopeless at first
sight are left out, as are those that take over three times as long.

What is fastest depends on which caches the cores share (`benchmarks.handoff`), and the host of a
virtual machine may change it at any time. Whichever lack rounds of the cores as they lie just then
take their turn, and each state has its own line in the results. With --minutes it waits so long for
the state that is still missing.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import handoff, stored
from benchmarks.formulation_cases import drawn, label, large, published, stock_of, sweep
from conv_pallas import _measure
from conv_pallas._layers import Layer
from conv_pallas.explanation import default_platform
from conv_pallas.kernels import xla, xla_tuned
from conv_pallas.kernels.xla_candidates import candidates
from conv_pallas.spec import OPERATIONS, Problem

# Of one visit, before the cores may have moved; and the rounds that each state is to have.
VISIT = _measure.Settings(least=0.005, rounds=(3, 3), limit=3.0)
ROUNDS = 9
_ONCE = _measure.Settings(least=0, rounds=(3, 3), limit=0.5)
HOPELESS = 3  # times slower than stock
# Operations compiled at a time: each program maps some 25 pieces of memory, of which Linux by
# default lets a process have 65530.
BATCH = 60
CORES = {None: "unknown", False: "together", True: "apart"}


def operands(problem: Problem) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(s), problem.lhs_dtype) for s in problem.shapes[:2])


@dataclasses.dataclass(eq=False)
class Race:
    """All formulations of an operation that are worth timing, and what they took.

    Attributes:
      stock: the formulation that the others are compared with, see `stock_of`.
      calls: while it is `compiled`; stock first.
      rounds: for cores that lie together (False), apart (True), or nobody knows where (None): of
        each round the seconds of each formulation.
    """

    case: str
    problem: Problem
    stock: str
    calls: dict[str, Callable] = dataclasses.field(default_factory=dict)
    rounds: dict[bool | None, list[dict[str, float]]] = dataclasses.field(
        default_factory=lambda: {there: [] for there in CORES}
    )

    @contextlib.contextmanager
    def compiled(self) -> Iterator[None]:
        """Those that took part before, or else all that are not `HOPELESS`."""
        arrays = operands(self.problem)
        known = self.names
        for name in known or candidates(self.problem, self.stock):
            lowered = jax.jit(functools.partial(xla.run_as, name, self.problem)).lower(*arrays)
            self.calls[name] = call = functools.partial(lowered.compile(), *arrays)
            if known:
                continue
            (once,) = _measure.interleaved({name: call}, _ONCE).values()
            if name == self.stock:
                limit = HOPELESS * min(once)
            elif min(once) > limit:
                del self.calls[name]
        yield
        self.calls.clear()

    @property
    def names(self) -> list[str]:
        """The formulations that were timed."""
        return next((list(rounds[0]) for rounds in self.rounds.values() if rounds), [])

    def visit(self) -> list[bool | None]:
        """Some rounds more. Returns the states that have got enough by it."""
        lacking = [there for there in CORES if not self.enough(there)]
        ratios = []
        seconds = _measure.interleaved(self.calls, VISIT, lambda: ratios.append(handoff.ratio()))
        there = handoff.apart([*ratios, handoff.ratio()])
        for i, (before, after) in enumerate(itertools.pairwise(there)):
            if before == after:
                self.rounds[before].append({name: s[i] for name, s in seconds.items()})
        return [there for there in lacking if self.enough(there)]

    def enough(self, there: bool | None) -> bool:
        return len(self.rounds[there]) >= ROUNDS

    def result(self, there: bool | None) -> dict:
        """For each formulation its median time in ms, and how many times faster than stock."""
        times = {name: [r[name] for r in self.rounds[there]] for name in self.names}
        found = {}
        for name, seconds in times.items():
            ratio = _measure.ratio(times[self.stock], seconds)
            found[name] = {
                "ms": round(1e3 * _measure.Spread.of(seconds).median, 4),
                "speedup": round(ratio.median, 3),
                "quartiles": [round(ratio.low, 3), round(ratio.high, 3)],
            }
        return {
            "case": self.case, "operation": self.problem.operation, "cores": CORES[there],
            "stock": self.stock, "chosen": xla.choose(self.problem), "formulations": found,
        }  # fmt: skip


def run(races: Sequence[Race], minutes: float = 0) -> Iterator[dict]:
    """Results as they come: of each race in one state, and within so many minutes in both."""
    end, batch = time.monotonic() + 60 * minutes, []
    with contextlib.ExitStack() as programs:
        while True:
            there = _cores()
            lacking = [race for race in races if not race.enough(there)]
            if there is None or time.monotonic() >= end:
                lacking = [race for race in lacking if not any(map(race.enough, CORES))]
                if not lacking:
                    return
            elif all(race.enough(False) and race.enough(True) for race in races):
                return
            if not lacking:
                time.sleep(0.1)
            elif here := [race for race in batch if race in lacking]:
                race = min(here, key=lambda race: len(race.rounds[there]))
                for done in race.visit():
                    yield race.result(done)
            else:
                programs.close()
                batch = lacking[:BATCH]
                for race in batch:
                    programs.enter_context(race.compiled())


def _cores() -> bool | None:
    """Whether they lie apart just now."""
    return handoff.apart([handoff.ratio()])[0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.formulations", description=__doc__.splitlines()[0]
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="three tiny cases")
    which.add_argument("--large", action="store_true", help="kernels that hardly fit the caches")
    which.add_argument(
        "--layers", metavar="TEXT", help="the benchmarks' layers with such a word: a,b,c"
    )
    which.add_argument("--draw", type=int, metavar="N", help="so many layers at random")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of --draw")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cases whose name has one of these in it: a,b,c"
    )
    parser.add_argument(
        "--without", metavar="TEXT", help="leave out cases whose name has one of these in it: a,b,c"
    )
    parser.add_argument(
        "--minutes", type=float, default=0, metavar="N",
        help="how long to go on for results of cores that lie together and of such that lie apart",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the results")
    options = parser.parse_args(argv)
    console = Console(highlight=False)
    every = _cases(options)
    named = lambda case, texts: any(text in label(case) for text in texts)  # noqa: E731
    without = options.without.split(",") if options.without else ()
    cases = [c for c in every if named(c, options.only.split(",")) and not named(c, without)]
    platform = default_platform()
    races = [
        Race(label(c), c.problem(o, platform), stock_of(c))
        for c in cases
        for o in (OPERATIONS[:2] if c.spec.exchanged else OPERATIONS)
    ]
    results = []
    try:
        with xla_tuned.ignored():  # it is the rules that are made of this
            for result in run(races, options.minutes):
                results.append(result)
                console.print(line(result), soft_wrap=True)
    except KeyboardInterrupt:
        console.print("interrupted: what follows was measured before")
    if results:
        order = [(race.case, race.problem.operation) for race in races]
        results.sort(key=lambda r: order.index((r["case"], r["operation"])))
        console.print(summary(results))
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            rows = ",\n".join(json.dumps(r) for r in results)
            head = json.dumps({"host": _measure.host() | {"commit": stored.commit()}})
            options.json.write_text(f'{head[:-1]}, "results": [\n{rows}\n]}}\n', encoding="utf-8")
            console.print(f"wrote {options.json}")
    return 0


def _cases(options: argparse.Namespace) -> Iterable[Layer]:
    if options.layers is not None:
        return published(options.layers)
    if options.draw is not None:
        return drawn(options.draw, options.seed)
    return large() if options.large else sweep(options.quick)


def line(result: dict) -> str:
    found = result["formulations"]
    ranked = sorted(found, key=lambda name: -found[name]["speedup"])
    mark = lambda name: f"{'*' if name == result['chosen'] else ''}{name}"  # noqa: E731
    ratios = "  ".join(f"{mark(name)} {found[name]['speedup']:.2f}" for name in ranked)
    where = f"{result['case']}, {result['operation']}, {result['cores']}"
    return f"{where}, {found[result['stock']]['ms']:.3f} ms: {ratios}"


def summary(results: Sequence[dict]) -> Table:
    """What was chosen, against stock and against the fastest."""
    table = Table(box=box.SIMPLE_HEAD, caption="×: times faster than stock's formulation")
    for column in ("case", "operation", "cores", "chosen", "×", "fastest", "×"):
        table.add_column(column)
    for result in results:
        found = result["formulations"]
        best = max(found, key=lambda name: found[name]["speedup"])
        chosen = found.get(result["chosen"], {}).get("speedup", float("nan"))
        table.add_row(
            result["case"], result["operation"], result["cores"], result["chosen"],
            f"[{'red' if not chosen >= 0.95 else 'default'}]{chosen:.2f}[/]",
            best, f"{found[best]['speedup']:.2f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
