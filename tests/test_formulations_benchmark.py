"""`python -m benchmarks.formulations`: that it times what is chosen, and everything beside it."""

import json

import jax
import pytest

from benchmarks import formulations
from conv_pallas import _measure
from conv_pallas.kernels import xla
from conv_pallas.spec import OPERATIONS

pytestmark = pytest.mark.usefixtures("hardly_optimized")


def test_one_case_from_the_command_line(tmp_path, capsys, monkeypatch):
    brief = _measure.Settings(least=0, rounds=(2, 2), limit=0.1)
    monkeypatch.setattr(formulations, "SETTINGS", brief)
    monkeypatch.setattr(formulations, "_ONCE", brief)
    path = tmp_path / "new" / "result.json"
    assert formulations.main(["--quick", "--only", "G8", "--json", str(path)]) == 0

    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["host"]["commit"] and stored["host"]["jax"] == jax.__version__
    assert [row["operation"] for row in stored["results"]] == list(OPERATIONS)
    case = next(c for c in formulations.sweep(quick=True) if c.G == 8)
    printed = capsys.readouterr().out
    for row in stored["results"]:
        problem = case.problem(row["operation"], "cpu")
        assert row["case"] == formulations.label(case)
        assert row["chosen"] == xla.choose(problem)
        found = row["formulations"]
        assert {row["stock"], row["chosen"]} <= set(found)
        assert found[row["stock"]]["speedup"] == 1
        for name, figures in found.items():
            low, high = figures["quartiles"]
            assert low <= figures["speedup"] <= high and figures["ms"] > 0
            assert f"{name} {figures['speedup']:.2f}" in printed
        assert f"*{row['chosen']} " in printed


def test_what_is_worth_compiling():
    """Stock first, each once, and each by a name that runs."""
    for case in formulations.sweep():
        for operation in OPERATIONS:
            problem = case.problem(operation, "cpu")
            names = formulations.candidates(problem, formulations.stock_of(case))
            assert names[0] == formulations.stock_of(case) and len(names) == len(set(names))
            assert xla.choose(problem) in names
