"""`python -m benchmarks.on_device`, as far as it goes without a GPU."""

import functools
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import pytest

from benchmarks import device_checks, device_timing, device_turns, on_device
from benchmarks.on_device import Log
from conv_pallas import _measure

pytestmark = pytest.mark.usefixtures("hardly_optimized")


def _lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.sampled
@pytest.mark.parametrize("step", on_device.STEPS)
def test_a_step_leaves_a_line_for_each_thing_it_learnt(step, tmp_path, monkeypatch):
    goals = device_checks.device_layers.goals(True)
    monkeypatch.setattr(device_checks.device_layers, "goals", lambda dry: goals[2:3])
    kinds = device_checks.device_layers.formulations(True)
    chosen = [kinds[0], kinds[1], kinds[7]]  # dense, depthwise, strided
    monkeypatch.setattr(device_checks.device_layers, "formulations", lambda dry: chosen)
    log = Log(tmp_path, step, 60)
    module = device_checks if hasattr(device_checks, step) else device_timing
    getattr(module, step)(log, True)
    lines = on_device.lines_of(tmp_path / f"{step}.jsonl")
    assert lines
    assert log.failures == 0, lines
    if step in ("goals", "against", "layers", "drawn"):
        assert lines[0]["copy_terabytes_per_second"] > 0 < lines[0]["matmul_tflops"]
        checked = [line for line in lines if "off_from_plain" in line]
        assert len(checked) == (2 if step == "goals" else 0)  # of a depthwise layer
        assert all(line["ok"] for line in checked)
        timed = [line for line in lines[1:] if "goal" not in line and line not in checked]
        assert timed and all(line["ours"] > 0 for line in timed)
        if step == "goals":
            assert all(line["tflops"] > 0 < line["of_copy"] for line in timed)
        else:
            assert all(line["speedup"] > 0 for line in timed)
            names = {"ours", "xla", "barrier", "matmuls", *(["stock"] if step != "drawn" else [])}
            assert set().union(*(line["seconds"] for line in timed)) >= names
            if step == "against":  # XLA's own depthwise convolutions are a second plan
                off = [line["off_from_xla"] for line in timed if "xla" in line["seconds"]]
                stock = [line["operation"] for line in timed if "stock" in line["seconds"]]
                assert off == [0] * 3 and stock == ["forward", "backward", "step"]
    if step == "drawn":
        # Here ours is XLA's, and the default as well.
        assert len(timed) == 2 and all(line["off_from_xla"] == 0 and line["ok"] for line in timed)
        assert all(line["behind"] >= 1 and line["best"] in line["seconds"] for line in timed)
    if step == "formulations":
        assert len(lines) == 3 * 3 and all(line["behind"] >= 1 for line in lines)
        assert all(len(line["seconds"]) >= 3 and not line["errors"] for line in lines)
    if step in ("correctness", "negative_start", "repeatability"):
        assert all(line["ok"] for line in lines)


@pytest.mark.parametrize("step, module, asked", [
    ("correctness", device_checks, {"only": "dense"}),
    ("tuning", device_timing, {}),
    ("goals", device_timing, None),  # of one process
])  # fmt: skip
def test_each_process_of_a_step_has_its_share(step, module, asked, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(module, step, lambda log, *args, **more: given.append((args, more)))
    only = ["--only", "dense"] if asked else []
    where = ["--out", str(tmp_path), "--seconds", "9", "--shard", "1", "--shards", "3"]
    assert on_device.main(["--step", step, *where, *only]) == 0
    assert given == [((False,), {}) if asked is None else ((False, 1, 3), asked)]


@pytest.mark.parametrize("runs", [1, 2])
def test_what_takes_long_is_timed_once_and_what_does_not_may_run_again(runs, monkeypatch):
    x, programs = jnp.ones(8), {"a": lambda: lambda x: x + 1, "b": lambda: lambda x: x + 2}
    lowered = {name: _measure.lower(make(), ([x] * runs,)) for name, make in programs.items()}
    found = device_turns.Timed()
    with ThreadPoolExecutor(2) as pool:
        those = functools.partial(
            device_turns._those_that_last, found, programs, lowered, ([x] * runs,), pool
        )
        calls = those()
        assert {name: [float(y[0]) for y in call()] for name, call in calls.items()} == {
            "a": [2.0] * runs, "b": [3.0] * runs,
        }  # fmt: skip
        assert not found.seconds and not found.errors
        monkeypatch.setattr(device_turns, "HOPELESS", 0.0)
        assert those() == {} and found.seconds.keys() == {"a", "b"}


def test_of_the_lines_about_an_item_the_last_counts(tmp_path):
    log = Log(tmp_path, "goals", 60)
    for _ in log.each("ab"):
        log.write(item=log.item, ok=False)
        log.write(item=log.item, ok=True)
    log.write(goal="fast")
    counted = [dict(item=0, ok=True), dict(item=1, ok=True), dict(goal="fast")]
    assert on_device.lines_of(log.path) == counted
    told = next(on_device._conclusions(tmp_path, ["goals"], {}))
    assert told == "goals: null 3 lines: 2 right"


def test_time_that_is_up_is_told(tmp_path):
    log = Log(tmp_path, "goals", 0)
    device_timing.goals(log, True)
    lines = _lines(log.path)
    assert {"cut_short": "dense-512/D4 forward"} in lines
    assert {line["met"] for line in lines if "goal" in line} == {None}


def test_a_process_that_does_not_die_keeps_nobody(capsys):
    class Stuck:
        pid = 2**22 + 1  # more than there can be

        def wait(self, timeout=None):
            assert timeout == on_device.REAPED
            raise subprocess.TimeoutExpired("step", timeout)

    on_device.kill(Stuck())
    assert "outlives its end" in capsys.readouterr().err


def test_a_wrong_result_fails_the_step(tmp_path, monkeypatch):
    right = device_checks.bind
    monkeypatch.setattr(device_checks, "bind", lambda *args: right(*args) * 1.01)
    log = Log(tmp_path, "negative_start", 60)
    device_checks.negative_start(log, True)
    assert log.failures == len(_lines(log.path)) == 18


@pytest.mark.sampled
@pytest.mark.parametrize(
    "wrong, failures",
    [
        (lambda out: out, 0),
        (lambda out: jnp.roll(out, 1, 0), 6),  # of the kernel gradient to another tap
        (lambda out: out.at[0, 0, 0].add(1.0), 6),  # to where nothing is
    ],
)
def test_results_beyond_32_bits_are_checked(wrong, failures, tmp_path, monkeypatch):
    right = device_checks.bind
    monkeypatch.setattr(device_checks, "bind", lambda *args: wrong(right(*args)))
    log = Log(tmp_path, "negative_start", 60)
    device_checks.beyond_32_bits(log, True, 300)
    assert len(_lines(log.path)) == 6
    assert log.failures == failures


def test_arrays_that_are_too_large_for_the_device_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(device_checks, "_memory", lambda: 16 * 2**30)
    log = Log(tmp_path, "negative_start", 60)
    device_checks.beyond_32_bits(log, True, 2**27)
    why = "needs 18.0 GiB, and the device has 16.0"
    assert [line["skipped"] for line in _lines(log.path)] == [why] * 2
    assert log.failures == 0


def test_what_has_to_run_may_not_be_declined(tmp_path, monkeypatch):
    def decline(*args):
        raise NotImplementedError("no Triton here")

    monkeypatch.setattr(device_checks, "bind", decline)
    log = Log(tmp_path, "negative_start", 60)
    device_checks.negative_start(log, True)
    assert log.failures == 18
    assert {line["declined"] for line in _lines(log.path)} == {"no Triton here"}


def test_a_machine_without_a_gpu_is_told_so(tmp_path, capsys):
    assert on_device.main(["--out", str(tmp_path / "out")]) == 2
    assert "JAX runs on cpu, and sees no NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _python_that_runs(source: str, tmp_path, monkeypatch) -> None:
    """Has the processes of a step run that, with its log, instead of the step."""
    stub = tmp_path / "python"
    stub.write_text(
        f"#!{sys.executable}\n"
        "import os, signal, subprocess, sys, time\n"
        f"sys.path.insert(0, {str(on_device.ROOT)!r})\n"
        "from pathlib import Path\n"
        "from benchmarks.on_device import Log\n"
        "a = dict(zip(sys.argv[3::2], sys.argv[4::2]))\n"
        "log = Log(Path(a['--out']), a['--step'], float(a['--seconds']), int(a['--shard']),\n"
        "          int(a['--from']))\n" + source
    )
    stub.chmod(0o755)
    monkeypatch.setattr(on_device.sys, "executable", str(stub))


def test_tritons_assembler_is_found_where_there_is_no_toolkit(monkeypatch):
    triton = types.SimpleNamespace(origin="/site/triton/__init__.py")
    monkeypatch.setattr(on_device.importlib.util, "find_spec", lambda name: triton)
    monkeypatch.setenv("PATH", "/usr/bin")
    path = on_device._environment(Path(), False)["PATH"]
    assert path == "/usr/bin:/site/triton/backends/nvidia/bin"


def test_what_xla_compiled_is_kept_for_the_next_run_on_a_device(monkeypatch):
    name = "JAX_COMPILATION_CACHE_DIR"
    monkeypatch.delenv(name, raising=False)
    assert name not in on_device._environment(Path(), True)
    assert Path(on_device._environment(Path(), False)[name]).is_absolute()
    monkeypatch.setenv(name, "/travels")
    assert on_device._environment(Path(), False)[name] == "/travels"


def test_after_a_crash_another_process_goes_on(tmp_path, monkeypatch):
    source = """
for item in log.each(range(4)):
    if item == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    log.write(item=item, ok=True)
"""
    _python_that_runs(source, tmp_path, monkeypatch)
    assert sorted(on_device._run_processes(tmp_path, "goals", 60, 2, False)) == [-9, -9, 0, 0]
    on_device._join_shards(tmp_path, "goals")
    assert [line["item"] for line in _lines(tmp_path / "goals.jsonl")] == [0, 2, 3] * 2
    assert not list(tmp_path.glob("*reached"))


def test_a_step_goes_on_in_the_next_call(tmp_path, monkeypatch, capsys):
    source = """
from benchmarks import device_timing, on_device
def layers(log, dry):
    for item in log.each(range(4)):
        log.write(item=item)
        if item == log.first + 1:
            log.end = 0
device_timing.layers = layers
sys.exit(on_device.main(sys.argv[3:]))
"""
    _python_that_runs(source, tmp_path, monkeypatch)
    monkeypatch.setattr(on_device, "_machine", lambda: ("H200", None))
    args = ["--steps", "layers", "--out", str(tmp_path)]
    assert on_device.main(args) == 0
    assert '"next": 2' in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["layers"]["next"] == 2
    assert on_device.main([*args, "--from", "2"]) == 0
    assert "next" not in json.loads((tmp_path / "summary.json").read_text())["layers"]
    items = [line["item"] for line in _lines(tmp_path / "layers.jsonl") if "item" in line]
    assert items == [0, 1, 2, 3]
    with pytest.raises(SystemExit):
        on_device.main(["--from", "2", "--out", str(tmp_path)])
    assert "--from needs --steps with one step" in capsys.readouterr().err


@pytest.mark.parametrize("items, at", [(3, 0), (1, 0), (3, 2)])
def test_an_item_that_time_was_up_in_is_begun_again(items, at, tmp_path, monkeypatch):
    def step(log, dry):
        for item in log.each(range(items)):
            log.end = 0 if item == at else log.end
            log.write(item=item, all=not log.out_of_time())

    monkeypatch.setattr(device_timing, "goals", step)
    assert on_device.main(["--step", "goals", "--out", str(tmp_path)]) == 0
    assert on_device._begun(tmp_path / "goals.jsonl") == at


def test_a_crash_before_the_first_item_is_no_reason_to_go_on(tmp_path, monkeypatch):
    _python_that_runs("sys.exit(3)", tmp_path, monkeypatch)
    assert on_device._run_processes(tmp_path, "goals", 60, 1, False) == [3]


def test_a_step_that_hangs_is_stopped_with_all_it_started(tmp_path, monkeypatch):
    source = f"""
child = subprocess.Popen(["sleep", "100"])
Path({str(tmp_path)!r}, "pid").write_text(str(child.pid))
time.sleep(100)
"""
    _python_that_runs(source, tmp_path, monkeypatch)
    monkeypatch.setattr(on_device, "GRACE", 0)
    assert on_device._run_processes(tmp_path, "goals", 5, 1, False) == [124]
    status = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    for _ in range(100):  # what is killed is gone a moment later
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("what a step has started outlives it")


def test_an_item_that_hangs_is_told_and_left_out(tmp_path, monkeypatch):
    source = """
for item in log.each(range(3), lambda item: f"the {item}th"):
    if item == 1:
        time.sleep(100)
    time.sleep(0.1)
    log.write(item=item, ok=True)
"""
    _python_that_runs(source, tmp_path, monkeypatch)
    monkeypatch.setattr(on_device, "STUCK", {"goals": 4})
    assert on_device._run_processes(tmp_path, "goals", 60, 1, False) == [on_device.DIED, 0]
    first, hung, last = _lines(tmp_path / "goals.jsonl")
    assert (first["item"], last["item"]) == (0, 2)
    assert hung == dict(hung="the 1th", seconds=4, ok=False)


def test_a_goal_that_is_wrong_at_its_own_size_is_told(tmp_path, monkeypatch):
    layer = device_timing.device_layers.goals(True)[0]
    forward = device_timing.device_layers.forward

    def wrong(name, layer, dry):
        f = forward(name, layer, dry)
        return (lambda *a: f(*a) * 1.1) if name == "ours" else f

    log = Log(tmp_path, "goals", 60)
    for f, failures in ((forward, 0), (wrong, 1)):
        monkeypatch.setattr(device_timing.device_layers, "forward", f)
        device_timing._compared(log, True, [(layer, "forward", ())])
        assert log.failures == failures


def test_a_device_that_does_not_answer_ends_the_process(tmp_path, monkeypatch):
    def silent():
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(on_device, "_ask_device", silent)

    def step(log, dry):
        for item in log.each(["right", "wrong", "after"]):
            log.write(item=item, ok=item == "right")

    monkeypatch.setattr(device_checks, "repeatability", step)
    assert on_device.main(["--step", "repeatability", "--out", str(tmp_path)]) == on_device.DIED
    lines = _lines(tmp_path / "repeatability.jsonl")
    assert [line.get("item") for line in lines] == ["right", "wrong", None]
    assert "ILLEGAL_ADDRESS" in lines[-1]["died"]
    assert (tmp_path / "repeatability.reached").read_text() == "2 wrong"


def test_the_end_tells_what_was_wrong_and_the_goals(tmp_path):
    lines = [dict(case="a", ok=True), dict(case="b", ok=False), dict(goal="fast", met=None),
             dict(case="c", declined="why"), dict(goal="fast", met=True)]  # fmt: skip
    (tmp_path / "goals.jsonl").write_text("\n".join(map(json.dumps, lines)))
    told = list(on_device._conclusions(tmp_path, ["goals", "layers"], {"goals": {"exit": 1}}))
    assert told == [
        'goals: {"exit": 1} 5 lines: 1 right, 1 wrong, 1 declined',
        '  {"case": "b", "ok": false}',
        '  {"goal": "fast", "met": true}',
        "layers: null 0 lines",
    ]


def test_what_the_sanitizer_tells_is_kept(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"""#!{sys.executable}
import sys, time
from pathlib import Path
print("========= Invalid __global__ read of size 2 bytes", flush=True)
if "racecheck" in sys.argv:
    time.sleep(100)
out = Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir()
(out / "correctness.jsonl").write_text('{{"ok": true}}\\n')
print("========= ERROR SUMMARY: 1 error")
sys.exit(9)
""")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    log = Log(tmp_path, "sanitizer", 5)
    device_checks.sanitizer(log, False)
    memory, races = _lines(log.path)
    assert memory["exit"] == 9 and not memory["ok"] and memory["checked"] == 1
    assert len(memory["found"]) == 2 and "ERROR SUMMARY" in memory["found"][1]
    assert races["cut_short"] == "racecheck" and not races["ok"] and not races["checked"]
    assert "Invalid" in (tmp_path / "racecheck.txt").read_text()


def test_a_step_that_crashes_costs_the_others_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(on_device, "STEPS", {"crash": (60, 1), "sanitizer": (60, 1)})
    assert on_device.main(["--dry-run", "--out", str(tmp_path)]) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["crash"]["exit"] != 0 == summary["sanitizer"]["exit"]
    assert _lines(tmp_path / "sanitizer.jsonl")


def test_some_steps_leave_the_results_of_others(tmp_path, capsys):
    (tmp_path / "summary.json").write_text('{"goals": {"exit": 0, "seconds": 70.0}}')
    (tmp_path / "sanitizer.1.jsonl").write_text('{"of": "the run before"}\n')
    assert on_device.main(["--dry-run", "--steps", "sanitizer", "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary.keys() == {"goals", "sanitizer"}
    assert [*map(list, _lines(tmp_path / "sanitizer.jsonl"))] == [["skipped"]]
    (tmp_path / "sanitizer.1.jsonl").write_text('{"shard": 1}\n')
    on_device._join_shards(tmp_path, "sanitizer")
    assert [*map(list, _lines(tmp_path / "sanitizer.jsonl"))] == [["skipped"], ["shard"]]
    assert not list(tmp_path.glob("*.1.jsonl"))
    # Nor does a step lose its own, where it has no time to measure others.
    (tmp_path / "sanitizer.reached").write_text("1 racecheck")
    kept = {f.name: f.read_text() for f in tmp_path.glob("sanitizer.*")}
    on_device.main(["--minutes", "0", "--steps", "sanitizer", "--dry-run", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "summary.json").read_text())["sanitizer"] == "no time left"
    assert {f.name: f.read_text() for f in tmp_path.glob("sanitizer.*")} == kept
    with pytest.raises(SystemExit):
        on_device.main(["--steps", "goals,tunning"])
    assert "there is no step tunning" in capsys.readouterr().err


def test_all_steps_fit_into_ten_minutes():
    assert on_device.MINUTES + on_device.GRACE / 60 < 10
    assert all(float(m) < 10 for m in re.findall(r"--minutes (\S+)", on_device.__doc__))


def _bundled(path):
    with tarfile.open(path) as tar:
        return {name.partition("/")[2]: tar.extractfile(name).read() for name in tar.getnames()}


def test_all_that_is_left_comes_in_one_file(tmp_path):
    out, path = tmp_path / "out", tmp_path / "out" / "results.tgz"
    args = ["--dry-run", "--steps", "sanitizer,tuning", "--out", str(out), "--bundle", str(path)]
    out.mkdir()
    (out / "triton_tuned_nvidia-h200.json").write_text("{}")
    assert on_device.main(args) == 0 == on_device.main(args)
    assert _bundled(path) == {
        f.name: f.read_bytes() for f in out.iterdir() if f.is_file() and f != path
    }
    assert {"summary.json", "sanitizer.jsonl", "tuning.jsonl", "triton_tuned_nvidia-h200.json"} == (
        _bundled(path).keys()
    )


def test_a_run_that_is_killed_leaves_its_bundle(tmp_path, monkeypatch):
    """What a step has written is in it while the step goes on."""
    path, seen = tmp_path / "results.tgz", []
    _python_that_runs("log.write(item=0)\ntime.sleep(1)\n", tmp_path, monkeypatch)
    monkeypatch.setattr(on_device, "RENEWED", 0.1)
    out = tmp_path / "out"

    def renew():
        on_device.bundle(out, path)
        seen.append(_bundled(path))

    out.mkdir()
    on_device._run_processes(out, "goals", 10, 1, False, renew)
    assert {"goals.jsonl": b'{"item": 0}\n'} in seen


def test_a_bundle_is_never_half(tmp_path, monkeypatch):
    (tmp_path / "goals.jsonl").write_text("{}\n")
    path = tmp_path / "results.tgz"
    on_device.bundle(tmp_path, path)
    before = path.read_bytes()

    def killed(new, old):
        raise KeyboardInterrupt

    monkeypatch.setattr(on_device.os, "replace", killed)
    (tmp_path / "goals.jsonl").write_text("{}\n" * 2)
    with pytest.raises(KeyboardInterrupt):
        on_device.bundle(tmp_path, path)
    assert path.read_bytes() == before
    # A step that begins its file anew removes it first.
    read = Path.read_bytes
    monkeypatch.undo()
    monkeypatch.setattr(Path, "read_bytes", lambda self: (self.unlink(), read(self))[1])
    on_device.bundle(tmp_path, path)
    assert path.stat().st_size < len(before)


def test_nothing_has_to_be_installed_but_what_it_imports(tmp_path):
    """Nor may a package that left its tests in site-packages stand before ours."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").write_text("")
    script = """if True:
        import sys
        sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in f.__module__]
        from benchmarks import device_checks, device_timing
        from conv_pallas import kernels
        print(*kernels.discover()[0])
    """
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment,
        cwd=on_device.ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "xla_native" in done.stdout
