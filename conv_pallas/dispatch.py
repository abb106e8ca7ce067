"""Which kernel runs a problem on a platform, and why not the others.

Missing hardware, an unsupported case and a broken kernel are three different things: the
first two are reasons, given by name here; the third is never caught.
"""

import dataclasses
import os
from collections.abc import Sequence

# Imported for what it does to JAX, and before anything is compiled: it adds to the context that
# every jit's cache is keyed by. Imported with the kernels, at the first lowering, it would have
# each function compiled twice. It can go when that module no longer adds to it (jax 0.12 does).
import jax._src.pallas.fuser.jaxpr_fusion  # noqa: F401

from conv_pallas.spec import OPERATIONS, PLATFORMS, Epilogue, Operation, Problem

IMPLEMENTATIONS = ("triton", "pallas_tpu", "onednn", "xla", "xla_native")
# Where an implementation runs that has no kernel to ask, for want of a package.
HOMES = {"triton": "cuda", "pallas_tpu": "tpu"}
ENVIRONMENT_VARIABLE = "CONV_PALLAS_IMPLEMENTATION"
PARTITIONED = (
    "is a custom call, which XLA's partitioner can't split here; it takes a mesh whose axes are "
    "all explicit, or a jax.shard_map over all of them"
)

TAPS = 31  # of packed sequences: an int32 has a bit for each
PACKED = "of packed sequences: a bit for each tap says whether an output sees it"

type Implementation = str | Sequence[str] | None


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """One implementation's answer to one problem.

    Attributes:
      implementation: its name.
      reason: why it declines, or None.
      how: where it does not decline, in a few words how it would do it; None where it was not
        asked.
      by_name: where it does not decline but is not picked unless asked for, why; else None.
      file: of the kernel, in the folder of the kernels; None where there is no kernel to ask.
    """

    implementation: str
    reason: str | None
    how: str | None = None
    by_name: str | None = None
    file: str | None = dataclasses.field(default=None, compare=False)


def names() -> tuple[str, ...]:
    """Every implementation that can be asked for: the five, and those of added kernels."""
    from conv_pallas import kernels

    found, _ = kernels.discover()
    added = sorted({k.implementation for k in found.values()} - set(IMPLEMENTATIONS))
    return IMPLEMENTATIONS + tuple(added)


def canonicalize(implementation: Implementation) -> tuple[str, ...] | None:
    """The names to try in order; None to pick. Reads the environment where it is None.

    Raises:
      ValueError: a name is unknown, or there is none.
    """
    source, absent, several = "implementation", "None", "a sequence of those"
    if implementation is None:
        implementation = os.environ.get(ENVIRONMENT_VARIABLE) or None
        if implementation is None:
            return None
        source = f"the environment variable {ENVIRONMENT_VARIABLE}"
        absent, several = "unset", "several of those with commas"
        wanted = tuple(name.strip() for name in implementation.split(","))
    elif isinstance(implementation, str):
        wanted = (implementation,)
    elif isinstance(implementation, Sequence):
        wanted = tuple(implementation)
    else:
        wanted = (implementation,)
    if not wanted or not all(isinstance(n, str) and n in names() for n in wanted):
        raise ValueError(
            f"{source} must be {absent}, one of {', '.join(names())}, or {several}, "
            f"got {implementation!r}"
        )
    return wanted


def candidates(
    problem: Problem, implementation: tuple[str, ...] | None = None
) -> list[tuple[Candidate, object | None]]:
    """Every implementation's answer with its kernel, those that would be picked first.

    Args:
      implementation: from `canonicalize`; others are asked only whether they decline.
    """
    from conv_pallas import kernels

    found, missing = kernels.discover()
    answers = []
    for module, kernel in found.items():
        if problem.platform not in kernel.platforms:
            reason = f"runs on {' and '.join(kernel.platforms)}, not on {problem.platform}"
        elif problem.partitioned and kernel.opaque:
            reason = PARTITIONED
        else:
            reason = kernel.decline(problem)
            if not (reason is None or (isinstance(reason, str) and reason)):
                raise TypeError(
                    f"decline of the implementation {kernel.implementation!r} must return None, or "
                    f"the reason in words, got {reason!r}"
                )
        rank, how, by_name = -2, None, None
        if reason is None:
            rank = -1
            if implementation is None or kernel.implementation in implementation:
                how, rank = kernel.describe(problem), kernel.rank(problem)
            if rank is None:
                rank, by_name = -1, kernel.by_name(problem)
        answer = Candidate(kernel.implementation, reason, how, by_name, f"{module}.py")
        answers.append((rank, answer, kernel))
    answers = [answer for _, *answer in sorted(answers, key=lambda a: a[0], reverse=True)]
    present = {c.implementation for c, _ in answers}
    for name in IMPLEMENTATIONS:
        if name not in present:
            reasons = [r for module, r in missing.items() if module.startswith(name.split("_")[-1])]
            reason = reasons[0] if reasons else "this version has no such kernel"
            if reasons and problem.platform != (home := HOMES.get(name, problem.platform)):
                reason = f"runs on {home}, not on {problem.platform}; there it {reason}"
            answers.append((Candidate(name, reason), None))
    return answers


def select(problem: Problem, implementation: tuple[str, ...] | None):
    """The kernel that runs `problem`.

    Args:
      implementation: from `canonicalize`.

    Raises:
      NotImplementedError: none of those asked for can; it says why for each.
    """
    answers = candidates(problem, implementation)
    if able := _able(answers, implementation):
        return able[0]
    wanted = implementation or tuple(candidate.implementation for candidate, _ in answers)
    reasons = "; ".join(
        dict.fromkeys(  # once, what several kernels of a name have to say
            f"{c.implementation}: {c.reason}"
            for name in wanted
            for c, _ in answers
            if c.implementation == name and c.reason is not None
        )
    )
    able = ", ".join(dict.fromkeys(c.implementation for c, _ in answers if c.reason is None))
    raise NotImplementedError(
        f"implementation={', '.join(map(repr, wanted))} can't run {problem.operation} on "
        f"{problem.platform} ({reasons}); it may be None or any of {able}"
    )


def _able(answers, implementation: tuple[str, ...] | None) -> list:
    """The kernels that may run what these are the answers to, those first that would."""
    able = [(candidate, kernel) for candidate, kernel in answers if candidate.reason is None]
    if implementation is None:
        return [kernel for candidate, kernel in able if candidate.by_name is None]
    return [
        kernel
        for name in implementation
        for candidate, kernel in able
        if candidate.implementation == name
    ]


def check(kernel, method: str, problem: Problem, got, shape=None, dtype=None) -> None:
    """Of what a method of `kernel` returned for `problem`: XLA would complain, and name no kernel.

    Args:
      shape, dtype: what it has to have, where those are not the problem's.

    Raises:
      TypeError: it has others.
    """
    shape, dtype = shape or problem.out_shape, dtype or problem.out_dtype
    found = getattr(got, "shape", None), getattr(got, "dtype", None)
    if problem.known and found != (shape, dtype):
        told = type(got).__name__ if None in found else f"{found[1]} {found[0]}"
        raise TypeError(
            f"{method} of the implementation {kernel.implementation!r} must return {dtype} {shape} "
            f"for {problem.operation}, got {told}"
        )


def fused(kernel, problem: Problem, epilogue: Epilogue) -> Problem | None:
    """The forward problem with ``epilogue`` for `Kernel.fused`; None where `kernel` has none."""
    problem = dataclasses.replace(problem, epilogue=epilogue)
    if kernel.fused is None or kernel.decline_fused(problem) is not None:
        return None
    return problem


def backward(
    problem: Problem,
    epilogue: Epilogue,
    implementation: tuple[str, ...] | None,
    wanted: tuple[bool, bool, bool],
):
    """The kernel whose `Kernel.backward` takes a forward problem, and its problem; or None.

    It has to be the one that would compute each of the wanted gradients by itself.
    """
    kernels = []
    for operation, needed in zip(OPERATIONS[1:], wanted[:2], strict=True):
        if needed:
            try:
                kernels.append(select(problem.gradient(operation), implementation))
            except NotImplementedError:
                return None  # raised once that gradient is lowered by itself
    if not kernels or any(kernel is not kernels[0] for kernel in kernels):
        return None
    problem = dataclasses.replace(problem, epilogue=epilogue)
    if kernels[0].backward is None or kernels[0].decline_backward(problem, wanted) is not None:
        return None
    return kernels[0], problem


def of_packed(answers, problem: Problem) -> list[tuple[Candidate, object | None]]:
    """What those who gave these answers to an operation say of packed sequences.

    Args:
      problem: the forward problem, with its epilogue.
    """

    def answer(candidate, kernel):
        if candidate.reason is not None:
            return candidate, kernel
        reason = "has no kernel for packed sequences"
        if kernel.packed is not None:
            many = f"takes packed sequences of up to {TAPS} taps"
            reason = many if problem.spec.kernel_size > TAPS else kernel.decline_packed(problem)
        if reason is not None:
            return dataclasses.replace(candidate, reason=reason, how=None, by_name=None), kernel
        by_name = None if kernel.packed_wins(problem) else candidate.by_name
        return dataclasses.replace(candidate, how=PACKED, by_name=by_name), kernel

    return [answer(*a) for a in answers]


def packed(
    problem: Problem,
    epilogue: Epilogue,
    implementation: tuple[str, ...] | None,
    operations: Sequence[Operation],
):
    """The kernel that takes a forward problem of packed sequences, and its problem; or None.

    The first that takes them of those that may compute each of these operations of one sequence;
    of no operations, as where a bias alone has a gradient, none.
    """
    whole = dataclasses.replace(problem, epilogue=epilogue)
    each = []
    for operation in operations:
        answers = candidates(problem.gradient(operation), implementation)
        each.append(_able(of_packed(answers, whole), implementation))
    for kernel in each[0] if each else []:
        if all(any(kernel is other for other in others) for others in each):
            return kernel, whole
    return None


def check_anywhere(problem: Problem, implementation: tuple[str, ...] | None) -> None:
    """Raises at once what `select` would raise on every platform.

    Tracing does not know for which platform it traces; but what no platform can do need not
    wait for lowering. The reasons are those on the platforms that the kernels are for.
    """
    if implementation is None or problem.empty:
        return
    failures = {}
    for platform in PLATFORMS:
        try:
            select(dataclasses.replace(problem, platform=platform), implementation)
            return
        except NotImplementedError as e:
            failures[platform] = e
    from conv_pallas import kernels

    found, _ = kernels.discover()
    theirs = {p for k in found.values() if k.implementation in implementation for p in k.platforms}
    raise next((e for p, e in failures.items() if p in theirs), failures["cpu"])
