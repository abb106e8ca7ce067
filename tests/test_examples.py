"""The examples run, in sizes that take no time; what they reach is in their docstrings."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

pytestmark = pytest.mark.usefixtures("hardly_optimized")

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ["--steps", "2", "--every", "2", "--batch", "2", "--hidden", "4", "--levels", "1"]


def music(folder):
    rng = np.random.default_rng(0)
    parts = {}
    for name in ("traindata", "validdata", "testdata"):
        parts[name] = np.empty((1, 3), object)
        for row, steps in enumerate((5, 9, 7)):
            parts[name][0, row] = rng.integers(0, 2, (steps, 88)).astype(np.uint8)
    savemat(folder / "rolls.mat", parts)
    return ["--data", str(folder / "rolls.mat")]


def text(folder):
    (folder / "text.txt").write_text("to be or not to be. " * 20, encoding="utf-8")
    return ["--text", str(folder / "text.txt"), "--time", "20", "--write", "5"]


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("adding_problem", lambda folder: ["--time", "20"]),
        ("copy_memory", lambda folder: ["--time", "20"]),
        ("sequential_digits", lambda folder: ["--stock"]),
        ("polyphonic_music", music),
        ("characters", text),
    ],
)
def test_runs(name, more, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "_common", raising=False)
    module = importlib.import_module(name)
    result = module.main([*TINY, *more(tmp_path), "--output", str(tmp_path / "out")])
    assert np.isfinite(result).all()
    assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "step 2: loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "option"), [("polyphonic_music", "--data"), ("characters", "--text")]
)
def test_a_file_that_is_not_there(name, option, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "_common", raising=False)
    with pytest.raises(SystemExit):
        importlib.import_module(name).main([option, str(tmp_path / "nothing")])
    assert capsys.readouterr().err.strip().endswith(f"there is no file {tmp_path / 'nothing'}")
