"""Which rows of the widest tests a run of the whole suite takes: one part of them for each commit.

All of them take more than half an hour on two cores, most of it compiling. So a test whose rows
differ in geometry, dtype or mesh alone has the marker `sampled`, and a run of everything takes a
part of its rows. The commit tells which, so that every machine runs the same; another commit may
run another part. Rows that are asked for, by file, name, `-k` or `--lf`, all run.
"""

import collections
import pathlib
import subprocess
import zlib

PARTS = 6
ALL = "all"
CHOICES = (*map(str, range(1, PARTS + 1)), ALL)


def of_commit(folder: pathlib.Path) -> str:
    """The part for the commit that is checked out in `folder`; the first where there is none."""
    try:
        git = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return CHOICES[0]
    return str(int(commit, 16) % PARTS + 1)


def left_out(rows: dict[str, list[str]], part: str) -> set[str]:
    """The node IDs that `part` leaves out.

    Each row is in one part. By their checksums, because neighbours are alike: each sixth row in
    the order of a test's parameters might be of one dtype alone.

    Args:
      rows: the node IDs of each test's rows, by the test's own.
      part: one of `CHOICES`.
    """
    if part == ALL:
        return set()
    out = set()
    for test, ids in rows.items():
        shuffled = sorted(ids, key=_checksum)
        first = int(part) - 1 + _checksum(test)  # or tests of one row would share a part
        out |= set(ids) - set(shuffled[first % PARTS :: PARTS])
    return out


def deselect(config, items: list, part: str) -> None:
    """Takes from `items` the rows of `sampled` tests that `part` leaves out, and tells pytest."""
    rows = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled"):
            rows[item.nodeid.partition("[")[0]].append(item.nodeid)
    out = left_out(rows, part)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in out])
    items[:] = [item for item in items if item.nodeid not in out]


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode())
