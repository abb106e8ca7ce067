"""What is timed beside other programs is timed again, and told where that did not help."""

import dataclasses
import subprocess
import sys
import time

import jax
import pytest

from benchmarks import __main__ as command
from benchmarks import harness, stored
from conv_pallas import _neighbours
from conv_pallas._layers import Layer
from conv_pallas._measure import FORWARD, STOCK, Settings

BRIEF = Settings(least=1e-4, rounds=(3, 3), limit=0.1)
SMALL = Layer("small", "no model", 2, 96, 8, 8, 3)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Two cores of several, in hundredths of a second: ``spend(user, idle, steal, own)``."""
    stat, spent = tmp_path / "stat", dict.fromkeys(("user", "idle", "steal", "own", "wall"), 0.0)

    def spend(**more):
        for name, seconds in more.items():
            spent[name] += seconds
        user, idle, steal = (round(50 * spent[name]) for name in ("user", "idle", "steal"))
        # user nice system idle iowait irq softirq steal guest guest_nice
        core = f"{user} 0 0 {idle} 0 0 0 {steal} 7000 0"
        more = f"cpu0 {core}\ncpu1 0 0 0 {999 * user} 0 0 0 0 0 0\ncpu7 {core}\nctxt 12\n"
        stat.write_text(f"cpu  {core}\n{more}")
        spent["wall"] = (spent["user"] + spent["idle"] + spent["steal"]) / 2

    monkeypatch.setattr(_neighbours, "STAT", stat)
    monkeypatch.setattr(_neighbours.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(_neighbours.os, "sched_getaffinity", lambda process: {0, 7})
    monkeypatch.setattr(_neighbours.time, "perf_counter", lambda: spent["wall"])
    monkeypatch.setattr(_neighbours.time, "process_time", lambda: spent["own"])
    spend()
    return spend


@pytest.mark.parametrize("spent, taken", [
    (dict(own=2.0, user=2.0), 0.0),
    (dict(own=1.5, user=2.0), 0.48),  # the system's hundredth on each core is left out
    (dict(own=1.5, user=1.5, steal=0.5), 0.48),  # by another machine on these cores
    (dict(own=1.0, user=1.2, idle=0.8), 0.0),  # there was a core for them
    (dict(own=1.5, user=1.7, idle=0.3), 0.18),
    (dict(own=2.1, user=2.0), 0.0),  # hundredths are not exact
    (dict(own=0.18, user=0.2), 0.0),
    (dict(own=0.18, user=0.3), 0.1 / 0.15),
])  # fmt: skip
def test_what_others_take(machine, spent, taken):
    machine(user=50.0, idle=3.0, steal=1.0, own=40.0)  # before
    watch = _neighbours.Watch()
    assert watch.taken() is None
    machine(**spent)
    assert watch.taken() == pytest.approx(taken)


def test_a_system_that_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(_neighbours, "STAT", tmp_path / "none")
    assert _neighbours.Watch().taken() is None


@pytest.mark.skipif(not _neighbours.STAT.exists(), reason="the system tells nothing of others")
def test_loops_on_every_core_are_noticed():
    loops = [
        subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=-1)
        for _ in range(harness.host()["cores"])
    ]
    try:
        for loop in loops:
            loop.stdout.readline()
        watch = _neighbours.Watch()
        time.sleep(0.3)
        assert watch.taken() > _neighbours.BUSY
    finally:
        for loop in loops:
            loop.kill()
            loop.communicate()


@pytest.mark.parametrize("taken, kept", [
    ([0.9, 0.0], 0.0), ([0.9, 0.3, 0.5], 0.3), ([0.01], 0.01), ([None], None),
])  # fmt: skip
def test_the_least_disturbed_times_are_kept(monkeypatch, taken, kept):
    asked = iter(taken)
    turn = iter(range(1, 10))
    monkeypatch.setattr(_neighbours.Watch, "taken", lambda self: next(asked))
    monkeypatch.setattr(
        harness._measure, "interleaved",
        lambda calls, settings, each_round: dict.fromkeys(calls, (1.0 * next(turn),)),
    )  # fmt: skip
    m = harness.measure(SMALL, FORWARD, settings=BRIEF, variants={STOCK: None, "xla": "xla"})
    assert next(asked, "none left") == "none left"
    assert m.others == kept
    assert m.variants[STOCK].seconds[0] * m.inside == pytest.approx(1.0 + taken.index(kept))
    limits = {"bytes": 1e9, "float32": 1e10}
    found = stored.result(harness.host(), BRIEF, limits, [m])
    assert found["measurements"][0]["others"] == kept
    told = "1 were timed beside other programs, which took up to 0.3 cores (small, forward)"
    assert (told in command.summary(found)) == (kept == 0.3)


@pytest.mark.parametrize("quick, kept", [(False, [0.0, 0.6, 0.3]), (True, [0.0, 0.7, 0.3])])
def test_what_was_disturbed_is_timed_once_more_at_the_end(monkeypatch, tmp_path, quick, kept):
    """By then they may have gone; where they have not, the calmer of the two counts."""
    subjects = [dataclasses.replace(SMALL, name=name) for name in ("calm", "a", "b")]
    others, timed = {"calm": [0.0], "a": [0.7, 0.6], "b": [0.3, 0.8]}, []

    def measure(subject, which, **options):
        timed.append(subject.name)
        m = harness.Measurement(subject, which, {STOCK: harness.Variant(seconds=(1.0,) * 3)})
        m.others = others[subject.name].pop(0)
        return m

    monkeypatch.setattr(harness, "measure", measure)
    monkeypatch.setattr(harness, "ceilings", lambda dtypes: dict.fromkeys(["bytes", *dtypes], 1e9))
    monkeypatch.setattr(command.layers, "ALL", subjects)
    monkeypatch.setattr(command.layers, "quick", lambda: subjects)
    file = tmp_path / "result.json"
    command.main([*["--quick"] * quick, "--pass", "forward", "--json", str(file)])
    found = stored.read(file)["measurements"]
    assert [m["layer"]["name"] for m in found] == ["calm", "a", "b"]
    assert [m["others"] for m in found] == kept
    assert timed == ["calm", "a", "b", *([] if quick else ["a", "b"])]


def test_a_host_matters_little_to_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_neighbours.Watch, "taken", lambda self: 0.9)
    monkeypatch.setattr(harness._measure, "interleaved", lambda calls, settings: calls)
    assert harness._undisturbed({"a": 1}, BRIEF) == ({"a": 1}, None, ())
