"""`python -m benchmarks.pages`: processes take turns, and each is what it should be."""

import json
import platform
import subprocess
import sys

import pytest

from benchmarks import pages
from benchmarks.networks import STACKS
from conv_pallas._layers import find
from conv_pallas._measure import OURS, STOCK
from tests.support import environment

MUSIC = find("tcn-music/stack", STACKS)


@pytest.fixture
def able(tmp_path, monkeypatch):
    """As on a machine with huge pages; in a folder of its own."""
    told = tmp_path / "enabled"
    told.write_text("always [madvise] never\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pages, "HUGE_PAGES", told)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    return told


def test_each_turn_is_a_process_of_each_kind(able, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # of whoever asks
    asked = []

    def run(command, env, **_):
        huge = "GLIBC_TUNABLES" in env
        asked.append(huge)
        seconds = {STOCK: 0.06, OURS: 0.05} if not huge else {STOCK: 0.04, OURS: 0.025}
        came = {
            name: {"seconds": s, "page_faults": 10 if huge else 900, "temporaries": 7}
            for name, s in seconds.items()
        }
        assert command[-3:] == ["--child", MUSIC.name, "--quick"]
        return subprocess.CompletedProcess(command, 0, f"a warning\n{json.dumps(came)}\n")

    monkeypatch.setattr(pages.stored, "commit", lambda: "")  # which asks git
    monkeypatch.setattr(subprocess, "run", run)
    assert pages.main(["--quick", "--turns", "3", "--networks", MUSIC.name]) == 0
    assert asked == [False, True, True, False, False, True]
    (line,) = json.loads((tmp_path / "bench-output" / "pages.json").read_text())["measurements"]
    assert line["huge_pages"] == {STOCK: 1.5, OURS: 2.0}
    assert line["variants"][OURS][pages.AS_IT_IS]["page_faults"] == 900
    assert line["variants"][STOCK][pages.HUGE]["ms"] == [40.0] * 3
    assert "1.50" in capsys.readouterr().out


def test_a_child_measures_what_it_is_told(monkeypatch):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.pages", "--child", MUSIC.name, "--quick"],
        stdout=subprocess.PIPE, text=True, check=True,
        env=environment() | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )  # fmt: skip
    came = json.loads(done.stdout)
    assert set(came) == {STOCK, OURS}
    assert all(of["seconds"] > 0 and of["temporaries"] > 2**20 for of in came.values())


@pytest.mark.parametrize(
    ("arguments", "libc", "huge", "message"),
    [
        (["--networks", "x"], ("glibc", "2.36"), "[always]", "networks are tcn-adding/stack, "),
        ([], ("", ""), "[always]", "needs glibc 2.35 or newer, got none"),
        ([], ("glibc", "2.31"), "[always]", "needs glibc 2.35 or newer, got glibc 2.31"),
        ([], ("glibc", "2.36"), "always madvise [never]", "this system has no huge pages"),
    ],
)
def test_what_can_not_be_measured(arguments, libc, huge, message, able, monkeypatch, capsys):
    able.write_text(huge)
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)
    with pytest.raises(SystemExit):
        pages.main(arguments)
    assert message in capsys.readouterr().err
