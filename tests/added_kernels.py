"""What each added kernel has to do, by itself: its file is what selects it here, not its name.

    python -m tests.added_kernels tpu_mine [CASE ...]

A kernel for TPUs runs on Pallas's interpreter, as in `tests.tpu_interpreter`; one in Triton with
`python -m tests.triton_interpreter --kernel triton_mine`, in a process of its own. The cases are
those of `tests.cases` and `tests.triton_cases.EXTRA`, the tolerance is that of `tests.tolerance`,
and where the kernel carries bias and activation, the cases are those of `tests.triton_epilogue`.
"""

import argparse
import ast
import collections
import contextlib
import dataclasses
import functools
import importlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from conv_pallas import dispatch, kernels
from conv_pallas.kernels import Kernel
from conv_pallas.spec import OPERATIONS, Epilogue, Problem, lhs_rhs_out
from tests import cases, tolerance, triton_cases, triton_epilogue
from tests.cases import Case
from tests.support import SHIPPED
from tests.triton_epilogue import Fused

FUSED = "fused"  # beside the three operations
TABLE: dict[str, Case | Fused] = {
    case.name: case
    for case in (*cases.CASES, *triton_cases.EXTRA, *triton_epilogue.FUSED)
    if case.name != "resident_long"  # which no interpreter has time for
}

type Execute = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Check:
    """One case of one operation.

    Attributes:
      declined: why the kernel does not take it; None: it does.
      run: ``run(execute)``, where ``execute(f, *arrays)`` is ``f(*arrays)``; raises where a result
        is wrong.
    """

    case: str
    operation: str
    declined: str | None
    run: Callable[[Execute], None]

    @property
    def name(self) -> str:
        return self.case if self.operation == FUSED else f"{self.case} {self.operation}"


class Own:
    """How many cases of each operation a kernel took."""

    def __init__(self, file: str):
        self.file, self.taken = file, collections.defaultdict(set)

    def count(self, check: Check) -> None:
        self.taken[check.operation].add(check.case)

    def __bool__(self) -> bool:
        return any(self.taken.values())

    def __str__(self) -> str:
        if not self:
            return f"FAIL {self.file} declines every case"
        told = (f"{len(self.taken[name])} of {name}" for name in (*OPERATIONS, FUSED))
        return f"{self.file}: its own cases were {', '.join(told)}"


def in_triton(file: str, kernel: Kernel) -> bool:
    """Whether it is for Triton's interpreter: for CUDA, and opaque or a file that imports triton.

    Or that imports a module of ours with that word in its name.
    """
    if "cuda" not in kernel.platforms or kernel.opaque:
        return "cuda" in kernel.platforms
    module = importlib.import_module(f"{kernels.__name__}.{file}")
    names = []
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        if isinstance(node, ast.Import | ast.ImportFrom):
            names += [alias.name for alias in node.names]
    return any("triton" in name for name in names)


def added(where: str) -> list[str]:
    """The files of added kernels that are run by themselves ``"in triton"``, ``"on tpu"`` or
    ``"in jax"``.

    In JAX are those without a name of their own on a CPU, by which the other tests would run them.
    """
    found = kernels.discover()[0]
    names = collections.Counter(k.implementation for k in found.values() if "cpu" in k.platforms)
    files = {"in triton": [], "on tpu": [], "in jax": []}
    for file, kernel in found.items():
        if file in SHIPPED:
            continue
        triton = in_triton(file, kernel)
        named = "cpu" in kernel.platforms and names[kernel.implementation] == 1
        if triton:
            files["in triton"].append(file)
        if "tpu" in kernel.platforms:
            files["on tpu"].append(file)
        elif not triton and not named:
            files["in jax"].append(file)
    return files[where]


def of_file(file: str, platform: str | None = None) -> Kernel:
    """The kernel of a file.

    Raises:
      LookupError: there is none, or it does not run on that platform.
    """
    found, missing = kernels.discover()
    if file in missing:
        raise LookupError(f"the kernel {file!r} {missing[file]}")
    if file not in found:
        theirs = (n for n, k in found.items() if platform is None or platform in k.platforms)
        raise LookupError(f"there is no kernel {file!r}; there are {', '.join(theirs)}")
    if platform is not None and platform not in found[file].platforms:
        on = " and ".join(found[file].platforms)
        raise LookupError(f"the kernel {file!r} runs on {on}, not on {platform}")
    return found[file]


def chosen(names: Sequence[str]) -> list[Case | Fused]:
    """The cases of those names, or all.

    Raises:
      LookupError: there is none of that name.
    """
    for name in names:
        if name not in TABLE:
            raise LookupError(f"there is no case {name!r}; tests/cases.py has them")
    return [TABLE[name] for name in names or TABLE]


def layer_of(name: str) -> str:
    """The layer that a case of that name is about, to be read beside a failure."""
    case = TABLE.get(name.split()[0])
    case = case.case if isinstance(case, Fused) else case
    if case is None:
        return ""
    told = {f.name: getattr(case, f.name) for f in dataclasses.fields(case) if f.name != "name"}
    return ", ".join(f"{name}={value}" for name, value in told.items() if value is not None)


def as_given(case: Case) -> Case | None:
    """As the library would hand it to a kernel; None where it asks none.

    One batch axis, padding of zeros, and no tap at either end that sees nothing but padding.
    """
    if case.problem("conv1d").empty:
        return None
    spec = case.spec.of_taps(case.spec.live_taps)
    return dataclasses.replace(
        case, batch=(math.prod(case.batch),), T=spec.time, K=spec.kernel_size,
        padding=[spec.padding],
    )  # fmt: skip


def checks(kernel: Kernel, platform: str, cases: list[Case | Fused]) -> Iterator[Check]:
    """All that the kernel is asked of those cases. It is asked what it declines on the way."""
    for case in cases:
        if isinstance(case, Fused):
            if (given := as_given(case.case)) is None:
                continue
            fused = dataclasses.replace(case, case=given, platform=platform)
            yield _fused_check(kernel, case.name, fused)
            continue
        given = as_given(case)
        for operation in OPERATIONS if given is not None else ():
            problem = given.problem(operation, platform)
            lhs, rhs, _ = lhs_rhs_out(operation, *given.arrays())
            if problem.exchanged is not None:
                problem, lhs, rhs = problem.exchanged, rhs, lhs
            run = functools.partial(_check_operation, kernel, problem, lhs, rhs)
            yield Check(case.name, operation, kernel.decline(problem), run)


def _check_operation(kernel: Kernel, problem: Problem, lhs, rhs, execute: Execute) -> None:
    assert isinstance(told := kernel.describe(problem), str), f"describe returned {told!r}"
    rank = kernel.rank(problem)
    assert rank is None or isinstance(rank, int), f"the priority is {rank!r}"
    out = execute(functools.partial(kernel.run, problem), lhs, rhs)
    dispatch.check(kernel, "run", problem, out)
    tolerance.check(
        np.asarray(out), problem.operation, lhs, rhs, problem.spec, out_dtype=problem.out_dtype,
        precision=problem.precision and problem.precision.name, platform=problem.platform,
    )  # fmt: skip


def _fused_check(kernel: Kernel, name: str, fused: Fused) -> Check:
    """Forward, and the gradients, as far as `conv_pallas.fused` would ask the kernel for them."""
    problem = fused.problem()
    plain = dataclasses.replace(problem, epilogue=Epilogue())
    wanted = (*fused.wanted[:2], fused.wanted[2] and fused.bias)
    why = kernel.decline(plain) or (
        "has no fused" if kernel.fused is None else kernel.decline_fused(problem)
    )
    theirs = [plain.gradient(op) for op, w in zip(OPERATIONS[1:], wanted, strict=False) if w]
    forward = why is None
    backward = (
        kernel.backward is not None
        and len(theirs) > 0  # XLA sums db alone
        and not any(map(kernel.decline, theirs))
        and kernel.decline_backward(problem, wanted) is None
    )
    run = functools.partial(_check_fused, kernel, fused, wanted, forward, backward)
    return Check(name, FUSED, None if forward or backward else why, run)


def _check_fused(kernel, fused: Fused, wanted, forward: bool, backward: bool, execute) -> None:
    def executed(problem, *arrays):
        return execute(functools.partial(kernel.fused, problem), *arrays)

    problem = fused.problem()
    x, w, bias, gy, saved = fused.arrays()
    if forward:
        y = executed(problem, x, w, bias)
        dispatch.check(kernel, "fused", problem, y)
        fused.check_forward(np.asarray(y), x, w, bias)
        epilogue = dataclasses.replace(problem.epilogue, keep=True)
        keep = dataclasses.replace(problem, epilogue=epilogue)
        if problem.epilogue.saved == "z" and not kernel.decline_fused(keep) and kernel.keeps(keep):
            fused.check_kept(dataclasses.replace(kernel, fused=executed), x, w, bias)
    if backward:
        gradients = execute(
            lambda *arrays: kernel.backward(problem, *arrays, wanted), x, w, bias, saved, gy
        )
        fused = dataclasses.replace(fused, wanted=wanted)
        fused.check_backward(gradients, x, w, bias, gy)


def came_of(file: str, platform: str, fused: Fused, execute: Execute) -> str:
    """Runs all of a layer, with and without what is around it; says in a word what came."""
    cases = [fused.case, *([fused] if fused.case.out_dtype is None else [])]
    own = [c for c in checks(of_file(file), platform, cases) if c.declined is None]
    for check in own:
        check.run(execute)
    return "right" if own else "declined"


# --- On the CPU, interpreted where the kernel is for TPUs ---


@contextlib.contextmanager
def interpreted(tpu: bool):
    """Within it what is for a TPU, if it is, runs here; it raises where a race is found."""
    if not tpu:
        yield
        return
    from jax.experimental.pallas import tpu as pltpu

    from tests.tpu_interpreter import params, raced

    pltpu.reset_tpu_interpret_mode_state()  # of what another left where it raised
    with pltpu.force_tpu_interpret_mode(params()):
        yield
    found = raced()
    pltpu.reset_tpu_interpret_mode_state()
    assert not found, "two programs race"


def compiled(f, *arrays):
    """What ``f`` makes of arrays, compiled as one program."""
    with jax.numpy_rank_promotion("raise"):  # as some users have it
        return jax.block_until_ready(jax.jit(f)(*arrays))


def checks_of(file: str, platform: str | None = None, names: Sequence[str] = ()) -> Iterator[Check]:
    """Of an added kernel, for a TPU if it is for one, unless ``platform`` says where."""
    kernel = of_file(file, platform)
    platform = platform or ("tpu" if "tpu" in kernel.platforms else kernel.platforms[0])
    yield from checks(kernel, platform, chosen(names))


def failures(file: str, operation: str | None = None, names: Sequence[str] = (), tell=print):
    """Runs an added kernel's cases, of one operation or of all.

    Returns:
      How many failed, and `Own`.
    """
    failed, own = 0, Own(file)
    for check in checks_of(file, names=names):
        if operation is not None and check.operation != operation:
            continue
        if check.declined is not None:
            if names:
                tell(f"declined {check.name}: {check.declined}")
            continue
        own.count(check)
        try:
            with interpreted("tpu" in of_file(file).platforms):
                check.run(compiled)
            tell(f"PASS {check.name} ({file})")
        except Exception:
            failed += 1
            layer = layer_of(check.name)
            tell(f"FAIL {check.name} ({file})\nof {layer}\n{traceback.format_exc()}")
    return failed, own


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.added_kernels", description=__doc__.splitlines()[0]
    )
    parser.add_argument("file", metavar="FILE", help="of a kernel, as tpu_mine")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all of them")
    options = parser.parse_args(arguments)
    try:
        chosen(options.cases)
        of_file(options.file)
    except LookupError as e:
        parser.error(e.args[0])
    failed, own = failures(options.file, names=options.cases)
    print(own)
    return failed + (not own)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", True)  # each program runs once
    sys.exit(min(main(sys.argv[1:]), 1))
