"""`python -m benchmarks.on_device`, as far as it goes without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("step", ["versions", "correctness"])
def test_a_step_leaves_a_line_for_each_thing_it_learnt(step, tmp_path):
    command = [sys.executable, "-m", "benchmarks.on_device", "--dry-run", "--step", step]
    run = subprocess.run([*command, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = (tmp_path / f"{step}.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.loads(line) for line in lines]
    assert all(line.get("ok", True) for line in lines)
    assert any("jax" in line if step == "versions" else line.get("ok") for line in lines)
