"""Which of XLA's formulations was measured to be the fastest on the CPU or GPU at hand.

The rules of `xla_cpu` are of one machine, and those of `xla_gpu` of a few layers.
`conv_pallas.tuning.tune` races the formulations of `xla_candidates` and `xla_gpu.candidates` on
another, and ``xla_tuned_<processor>.json`` or ``triton_tuned_<device>.json`` (see `records`) maps a
key, which tells a problem, to what won there. What no file knows goes by the rules.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

from conv_pallas import _host
from conv_pallas.kernels import records, xla_cpu, xla_gpu
from conv_pallas.kernels.xla_cpu_bounds import sound
from conv_pallas.kernels.xla_formulations import FORWARD, KERNEL_GRAD
from conv_pallas.spec import Problem

# What is kept of a race: the formulation, None where the rules' was not clearly beaten; that of the
# rules then; and the seconds of both.
RACED = {"formulation", "rule", "seconds", "seconds_of_rule"}


def whole(found: dict[str, dict]) -> bool:
    """Whether formulations are told as they should be."""
    entries = found["formulations"].values()
    return all(entry.keys() >= RACED for entry in entries)


# ``formulations``: of each `key` what `RACED` says, and the versions. Of a GPU they are in the file
# of the Triton kernels, whose tables `triton_tuned` reads.
RECORDS = {
    platform: records.Records(prefix, ("formulations",), whole)
    for platform, prefix in (("cpu", "xla_tuned"), ("cuda", "triton_tuned"))
}
# Of one thread: what others compile meanwhile goes by the files.
_trial = contextvars.ContextVar[dict[str, str] | None]("trial", default=None)


def kind(platform: str) -> str | None:
    """A GPU's name; or the processor, and what XLA has of it, which may make others win.

    That is its vectors and its cores. None where there is no GPU, and nobody said for which one
    this is.
    """
    if platform == "cuda":
        return _host.gpu()
    cores = _host.cores()
    told = _host.processor(), _host.model(), _host.vectors(), f"{cores} core{'s' * (cores > 1)}"
    return " ".join(filter(None, told))


def key(problem: Problem) -> str:
    """As `records.problem_key`.

    On a CPU who asks for the usual precision gets no minimal filtering; a GPU has none.
    """
    usual = (None,) if problem.platform == "cpu" else (None, jax.lax.Precision.DEFAULT)
    return records.problem_key(problem, usual)


def raced(
    rule: str, formulation: str | None, seconds: float, seconds_of_rule: float
) -> dict[str, str | float | None]:
    """An entry of `RECORDS`, without the versions."""
    return dict(
        rule=rule, formulation=formulation, seconds=seconds, seconds_of_rule=seconds_of_rule
    )


def rule(problem: Problem) -> str:
    """What the rules say for a CPU or GPU."""
    return xla_cpu.choose(problem) if problem.platform == "cpu" else xla_gpu.choose(problem)


def may_run(name: str, problem: Problem) -> bool:
    """Whether a formulation may run without having been asked for."""
    if problem.platform == "cpu":
        return sound(name, problem)
    return name in xla_gpu.candidates(problem)


def lookup(problem: Problem) -> str | None:
    """The formulation that won; None: what the rules say."""
    if not _applies(problem):
        return None
    tried = _trial.get()
    if tried is not None:
        name = tried.get(key(problem))
    else:
        entry = _entry(problem)
        name = entry and entry["formulation"]
    table = KERNEL_GRAD if problem.operation == "conv1d_kernel_grad" else FORWARD
    if name not in (*table, "parts"):  # none has won, or it is of another version
        return None
    return name if may_run(name, problem) else None  # at another number of steps, say


def described(problem: Problem) -> str:
    """What to say of a formulation beside what it is: that it was measured, if it was."""
    entry, here = _entry(problem), {"cpu": "CPU"}.get(problem.platform, "GPU")
    if entry is None:
        return ""
    if entry["formulation"] is None:
        stays = entry["rule"] == rule(problem)  # not of a later version's rules
        told = f"; none was measured to be clearly faster on this {here}{records.version(entry)}"
        return told if stays else ""
    if lookup(problem) is None:
        return ""
    ratio = entry["seconds"] / entry["seconds_of_rule"]
    than = f"of the time of {entry['rule']!r} on this {here}{records.version(entry)}"
    return f"; measured to take {ratio:.2f} {than}"


@contextlib.contextmanager
def trial(formulations: dict[str, str] | None) -> Iterator[None]:
    """Within it each `key` has this formulation, and what has none here goes by the rules.

    None: that which the files say, as outside of any.
    """
    before = _trial.set(formulations)
    try:
        yield
    finally:
        _trial.reset(before)


def ignored() -> contextlib.AbstractContextManager:
    """Within it what is compiled goes by the rules."""
    return trial({})


def _applies(problem: Problem) -> bool:
    """Whether what was measured here, of one device, says anything of it."""
    elsewhere = problem.exported or problem.partitioned
    return problem.platform in RECORDS and problem.known and not elsewhere


def _entry(problem: Problem) -> dict | None:
    if _trial.get() is not None or not _applies(problem):
        return None
    found = RECORDS[problem.platform].content(kind(problem.platform))["formulations"]
    return found.get(key(problem)) if found else None
