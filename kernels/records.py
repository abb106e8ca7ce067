"""What was measured on a kind of device, in files that every later compilation there reads.

``<prefix>_<device>.json`` beside this file, or in the folder that `ENVIRONMENT_VARIABLE` names.
`conv_pallas.tuning.tune` measures and writes such files; nothing measures by itself inside
somebody's training step.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from conv_pallas.spec import Problem

FOLDER = Path(__file__).parent
# A folder whose files come before those of `FOLDER`, and which `tune` writes to.
ENVIRONMENT_VARIABLE = "CONV_PALLAS_TUNED"
# What is faster by less than this may be so by luck: what there is without it stays.
CLEARLY = 0.98


@dataclasses.dataclass(frozen=True)
class Records:
    """Files of one sort.

    Attributes:
      prefix: what their names begin with.
      tables: what each has: dictionaries by these names.
      whole: ``whole(content)``, whether they hold what they should; it may fail where not.
    """

    prefix: str
    tables: tuple[str, ...]
    whole: Callable[[dict[str, dict]], bool]

    def file_of(self, kind: str) -> Path:
        """Where `conv_pallas.tuning.tune` keeps what it has measured on a kind of device."""
        return _folders()[-1] / self._name(kind)

    def read(self, file: Path) -> dict[str, dict]:
        """What a file holds; of one that is not there, tables without an entry.

        Raises:
          ValueError: the file is none of these.
        """
        found: dict[str, dict] = {name: {} for name in self.tables}
        if not file.exists():
            return found
        try:
            found |= json.loads(file.read_text(encoding="utf-8")).items()
            whole = self.whole(found)
        except (ValueError, TypeError, AttributeError, KeyError):
            whole = False
        if not whole:
            raise ValueError(
                f"{file} is not what conv_pallas.tuning.tune writes: delete it, tune anew"
            )
        return found

    def content(self, kind: str | None) -> dict[str, dict]:
        """As `read`, of all folders together, once."""
        return _content(self, kind, tuple(_folders()))

    def add(self, file: Path, kind: str, found: dict[str, dict[str, Any]]) -> None:
        """Adds to a file, all of it at once: a run that is cut short leaves a whole one.

        What another process adds meanwhile waits for it, or the last would drop what the first had.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        with _alone(file.parent):
            content = self.read(file)
            merged = {name: content[name] | entries for name, entries in found.items()}
            whole = {**content, **merged, "device": kind}
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=file.parent, suffix=".new", delete=False
            ) as new:
                new.write(json.dumps(whole, indent=1, sort_keys=True) + "\n")
            os.chmod(new.name, 0o644)  # not for one user alone, as temporary files are
            os.replace(new.name, file)

    def _name(self, kind: str) -> str:
        return f"{self.prefix}_{re.sub('[^a-z0-9]+', '-', kind.lower()).strip('-')}.json"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds a lock on a folder, which needs no file of its own, within the context."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def forget() -> None:
    """Reads the files anew from now on."""
    _content.cache_clear()


@functools.cache
def _content(records: Records, kind: str | None, folders: tuple[Path, ...]) -> dict[str, dict]:
    found = [records.read(folder / records._name(kind or "none")) for folder in folders]
    merged = lambda table: {k: v for content in found for k, v in content[table].items()}  # noqa: E731
    return {table: merged(table) for table in records.tables}


def _folders() -> list[Path]:
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    return [FOLDER, *([Path(named)] if named else [])]


def version(entry: dict[str, Any]) -> str:
    """What to say of the JAX that an entry was measured with, where it is another one than this."""
    measured = entry.get("jax")
    return "" if measured in (None, jax.__version__) else f", with JAX {measured}"


# --- problems -------------------------------------------------------------------------------------


def problem_key(problem: Problem, unnamed: Collection[Any]) -> str:
    """What tells problems apart of which one was measured; N and T count by powers of two.

    Args:
      unnamed: the precisions that are the usual one.
    """
    spec = problem.spec
    dtypes = [np.dtype(d).name for d in (problem.lhs_dtype, problem.rhs_dtype, problem.out_dtype)]
    same = len(set(dtypes)) == 1
    words = [
        problem.operation,
        f"x {power_of_two(problem.N)}x{power_of_two(spec.time)}x{problem.C}",
        f"w {spec.kernel_size}x{problem.C // spec.groups}x{problem.O}",
        dtypes[0] if same else "{}*{}={}".format(*dtypes),
        f"padding {spec.padding[0]},{spec.padding[1]} dilation {spec.kernel_dilation}",
    ]
    optional = {"stride": spec.stride, "input dilation": spec.input_dilation}
    words += [f"{name} {value}" for name, value in optional.items() if value != 1]
    if not set(precisions(problem)) <= set(unnamed):
        words.append(f"precision {','.join(map(str, precisions(problem)))}")
    return " ".join(words)


def precisions(problem: Problem) -> tuple:
    """Of both factors, or of the two at once."""
    asked = problem.precision
    return asked if isinstance(asked, tuple) else (asked,)


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
