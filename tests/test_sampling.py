"""Which rows a run of everything takes, and that no row is lost to all of them."""

import collections
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests import sampling

PARTS = sampling.CHOICES[: sampling.PARTS]
ROWS = {
    "test_many": [f"test_many[{dtype}-{n}]" for n in range(40) for dtype in ("f32", "bf16")],
    "test_few": ["test_few[a]", "test_few[b]"],
    **{f"test_alone_{n}": [f"test_alone_{n}[a]"] for n in range(40)},
}


def _taken(part: str) -> set[str]:
    return {row for ids in ROWS.values() for row in ids} - sampling.left_out(ROWS, part)


def test_each_row_is_in_one_part():
    taken = collections.Counter(row for part in PARTS for row in _taken(part))
    assert set(taken) == _taken(sampling.ALL)
    assert set(taken.values()) == {1}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_has_its_share_of_everything(part):
    taken = _taken(part)
    many = [row for row in taken if row.startswith("test_many")]
    assert len(many) in (13, 14)
    assert 3 <= sum("bf16" in row for row in many) <= 10
    assert 2 <= sum(row.startswith("test_alone") for row in taken) <= 13


def _git(folder, *args):
    name = ("-c", "user.name=x", "-c", "user.email=x@y")
    run = ["git", "-C", str(folder), *name, *args]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout


def test_the_commit_chooses(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert sampling.of_commit(tmp_path) == "1"  # unpacked from an archive
    _git(tmp_path, "init", "-q")
    assert sampling.of_commit(tmp_path) == "1"  # nothing is committed
    found = set()
    for n in range(40):
        _git(tmp_path, "commit", "-q", "--allow-empty", "-m", str(n))
        found.add(sampling.of_commit(tmp_path))
        assert sampling.of_commit(tmp_path) in PARTS
    assert found == set(PARTS)


SUITE = """
import pytest

@pytest.mark.sampled
@pytest.mark.parametrize("n", range(12))
def test_sampled(n):
    pass

@pytest.mark.parametrize("n", range(8))
def test_whole(n):
    pass
"""
CONFTEST = """
import pathlib
from tests.conftest import (
    _choose_part, pytest_addoption, pytest_collection_modifyitems, pytest_report_header
)

def pytest_configure(config):
    config.addinivalue_line("markers", "sampled: x")
    _choose_part(config)
"""


@pytest.mark.parametrize(
    "args, count",
    [
        ((), 2 + 8),
        (("--part", "3"), 2 + 8),
        (("-n", "2"), 2 + 8),
        (("--part", "all"), 12 + 8),
        (("test_suite.py",), 12 + 8),  # what is named runs
        (("-k", "sampled"), 12),
    ],
)
def test_what_a_command_runs(tmp_path, args, count):
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = .\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert re.search(rf"\b{count} passed", run.stdout), run.stdout + run.stderr
    assert ("--part all runs the rest" in run.stdout) == (count == 2 + 8)
