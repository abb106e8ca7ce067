"""`python -m benchmarks.on_device`, as far as it goes without a GPU."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import device_checks, device_timing, on_device
from benchmarks.on_device import Log


def _lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("step", on_device.STEPS)
def test_a_step_leaves_a_line_for_each_thing_it_learnt(step, tmp_path, monkeypatch):
    goals = device_checks.device_layers.goals(True)
    monkeypatch.setattr(device_checks.device_layers, "goals", lambda dry: goals[2:3])
    log = Log(tmp_path, step, 60)
    module = device_checks if hasattr(device_checks, step) else device_timing
    getattr(module, step)(log, True)
    lines = _lines(tmp_path / f"{step}.jsonl")
    assert lines
    assert log.failures == 0, lines
    if step in ("goals", "against", "layers"):
        assert lines[0]["copy_terabytes_per_second"] > 0 < lines[0]["matmul_tflops"]
        timed = [line for line in lines[1:] if "goal" not in line]
        assert timed and all(line["ours"] > 0 for line in timed)
        if step == "goals":
            assert all(line["tflops"] > 0 < line["of_copy"] for line in timed)
        else:
            assert all(line["speedup"] > 0 for line in timed)
            names = {"ours", "xla", "stock", "barrier", "matmuls"}
            assert all(set(line["seconds"]) >= names for line in timed)
    if step in ("correctness", "negative_start", "repeatability"):
        assert all(line["ok"] for line in lines)


def test_time_that_is_up_is_told(tmp_path):
    log = Log(tmp_path, "goals", 0)
    device_timing.goals(log, True)
    lines = _lines(log.path)
    assert {"cut_short": "dense-512/D4"} in lines
    assert {line["met"] for line in lines if "goal" in line} == {None}


def test_goals_are_judged_by_the_worst():
    dense = {
        (f"dense-512/D{D}", op): dict(tflops=650.0 - D / 10)
        for D in (1, 4, 64, 512, 1024)
        for op in ("forward", "input_grad", "kernel_grad")
    }
    dense |= {("depthwise/D1", op): dict(of_copy=0.9) for op in ("forward", "backward")}
    told = {v["goal"]: (v["reached"], v["met"]) for v in device_timing.verdicts(dense)}
    assert told["dense, forward, TFLOP/s"] == (650 - 102.4, False)
    assert told["dense, gradients, TFLOP/s"] == (650 - 102.4, True)
    assert told["dense, fastest D over slowest"] == (649.9 / (650 - 102.4), False)
    assert told["dense-64, forward, of a copy"] == (None, None)
    assert told["depthwise, forward, of a copy"] == (0.9, False)
    assert told["depthwise, backward, of a copy"] == (0.9, True)


def test_a_wrong_result_fails_the_step(tmp_path, monkeypatch):
    right = device_checks.bind
    monkeypatch.setattr(device_checks, "bind", lambda *args: right(*args) * 1.01)
    log = Log(tmp_path, "negative_start", 60)
    device_checks.negative_start(log, True)
    assert log.failures == len(_lines(log.path)) == 12


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
    on_device.main(["--minutes", "0", "--steps", "sanitizer", "--dry-run", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "summary.json").read_text())["sanitizer"] == "no time left"
    with pytest.raises(SystemExit):
        on_device.main(["--steps", "goals,tunning"])
    assert "there is no step tunning" in capsys.readouterr().err


def test_all_steps_fit_into_ten_minutes():
    assert on_device.MINUTES + 20 / 60 < 10  # a step that hangs is stopped 20 s after its end


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
