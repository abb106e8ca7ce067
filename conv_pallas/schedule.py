"""Reads what libtpu's compiler writes about its schedules.

A TPU core executes one bundle of instructions a cycle, unless it waits. With the flags of
`DUMP_FLAGS` the compiler writes every scheduled operation as text: bundles, how deep in loops
each one stands (``>``), where loops begin (``LB``), and the compare that ends each loop.

Counted are bundles times trips. Every predicated region counts as taken, in XLA's own schedules as
in ours. Not counted is what a bundle waits for: memory, the matrix unit's results, DMA.
"""

import dataclasses
import re
from pathlib import Path

DUMP_FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=final_bundles|register-pressure|utilization|dedup"
)

_BUNDLE = re.compile(r"^ *(?:0x)?([0-9a-f]+) +((?:[A-Z]{2} *)*):((?: ?>)*) *\{(.*)")
_BRANCH = re.compile(r"sbr\.rel \(!%(p\w+)\) target")
_COMPARE = re.compile(r"%(p\w+) = scmp\.(?:ge|eq)\.s32\.totalorder [^,]+, (\d+)")
_ALWAYS = re.compile(r"%(p\w+) = pmov 1 ")  # a loop of one trip
_MATMUL = re.compile(r"= vmatmul|= vmatpush|vmatmul\.|vmatpush")
_REGISTER = re.compile(r"%v\d+_v(\d+)")
_PRESSURE = re.compile(r"Register pressure for vregs is (\d+)")
_SPILL = re.compile(r"= vst .*_spill\]|vst \[vmem:\[#allocation\w*_spill")


@dataclasses.dataclass
class _Loop:
    depth: int
    stages: int = 1  # of a pipeline of copy in, compute, copy out
    bundles: int = 0  # of its own and, times their trips, of the loops in it
    matmuls: int = 0  # of those bundles, the ones that use the matrix unit
    spilled: int = 0  # in those bundles, stores of spilled vector registers
    limits: dict[str, int] = dataclasses.field(default_factory=dict)  # by the compare's result
    branches: list[str] = dataclasses.field(default_factory=list)  # what its branches depend on


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One scheduled operation.

    Attributes:
      bundles: with each loop's trips.
      length: of the code, without them.
      spills: stores of spilled vector registers inside loops, the grid's among them.
      spilled: those stores with each loop's trips.
      matmuls: of the bundles, with each loop's trips, those that use the matrix unit.
      loops: ``(depth, trips, bundles of one trip)``, innermost first.
      uncounted: loops whose trips are not written; each counts as one.
      registers: vector registers that the code uses, of 64; `read_file`: or, where its values
        would have needed more at once, as many as they would.
    """

    bundles: int
    length: int
    spills: int
    loops: tuple[tuple[int, int, int], ...]
    matmuls: int = 0
    spilled: int = 0
    uncounted: int = 0
    registers: int = 0


def read_schedule(text: str, *, strict: bool = True) -> Schedule:
    """A ``final_bundles`` file.

    Args:
      strict: False: a loop without a constant number of trips counts as one trip, and in
        `Schedule.uncounted`. Such loops copy the ragged end of an array.

    Raises:
      ValueError: a loop ends in no compare with a constant, and ``strict`` is True.
    """
    stack, loops, length, spills, uncounted = [_Loop(0)], [], 0, 0, 0

    def close():
        nonlocal uncounted
        loop = stack.pop()
        # The last branch that depends on a compare of the loop's own is the one that goes back.
        trips = [loop.limits[name] for name in loop.branches if name in loop.limits]
        if not trips and strict:
            raise ValueError(f"a loop of {loop.bundles} bundles has no constant number of trips")
        uncounted += not trips
        trips = trips or [loop.stages]
        # Of so many trips the first only copies in and the last only copies out.
        computing = trips[-1] - (loop.stages - 1)
        loops.append((loop.depth, computing, loop.bundles))
        stack[-1].bundles += computing * loop.bundles
        stack[-1].matmuls += computing * loop.matmuls
        stack[-1].spilled += computing * loop.spilled

    for line in text.splitlines():
        bundle = _BUNDLE.match(line)
        if not bundle:
            continue
        length += 1
        _, label, nesting, code = bundle.groups()
        # An empty bundle, a wait, does not say how deep it stands.
        depth = stack[-1].depth if code.startswith("}") else nesting.count(">")
        branches = _BRANCH.findall(code)
        while stack[-1].depth > depth:
            # The bundle that branches back may be the first one outside.
            stack[-1].branches += [name for name in branches if name in stack[-1].limits]
            close()
        if "LB" in label:
            if stack[-1].depth == depth:
                close()
            stack.append(_Loop(depth, 3 if "stage = " in code else 1))
        loop = stack[-1]
        loop.bundles += 1
        loop.matmuls += _MATMUL.search(code) is not None
        loop.branches += branches
        loop.limits.update((name, int(limit)) for name, limit in _COMPARE.findall(code))
        loop.limits.update((name, 1) for name in _ALWAYS.findall(code))
        if depth > 0:
            found = len(_SPILL.findall(code))
            spills, loop.spilled = spills + found, loop.spilled + found
    while len(stack) > 1:
        close()
    total = stack[0]
    return Schedule(
        total.bundles, length, spills, tuple(loops), total.matmuls, total.spilled, uncounted,
        len(set(_REGISTER.findall(text))),
    )  # fmt: skip


def read_file(file: Path, *, strict: bool = True) -> Schedule:
    """`read_schedule` of a file, with the register pressure that is reported beside it."""
    read = read_schedule(file.read_text(), strict=strict)
    operation = re.escape(file.name.rsplit("-", 2)[0])
    report = re.compile(operation + r"-\d+-register-pressure\.txt")  # only where it exceeds 64
    for other in file.parent.iterdir():
        if report.fullmatch(other.name) and (found := _PRESSURE.search(other.read_text())):
            read = dataclasses.replace(read, registers=max(read.registers, int(found[1])))
    return read


def read_program(files: list[Path]) -> dict[str, Schedule]:
    """The schedule of each operation that a compiled program calls, by its name in HLO."""
    return {name: read_file(f, strict=False) for name, f in operations(files).items()}


def operations(files: list[Path]) -> dict[str, Path]:
    """The schedule's file of each operation that a compiled program calls."""
    texts = {f.name.split("-", 1)[1]: f for f in files}  # without the time in front
    (main,) = (f for name, f in texts.items() if re.fullmatch(r"TLP-\d+-final_bundles\.txt", name))
    (dedup,) = (f for name, f in texts.items() if "deduplication-map" in name)
    keys, key = {}, None
    for line in dedup.read_text().splitlines():
        if line.startswith("key:"):
            key = line[4:]
        elif line.startswith("  ") and key:
            keys[line.strip()] = key
    schedules = {}
    for name in re.findall(r"inlined_call[^/]*/\* %([\w.-]+) =", main.read_text()):
        found = [
            f
            for n, f in texts.items()
            if re.fullmatch(re.escape(keys.get(name, name)) + r"-\d+-final_bundles\.txt", n)
        ]
        if len(found) != 1:
            raise ValueError(f"{len(found)} schedules of {name} were written")
        schedules[name] = found[0]
    return schedules
