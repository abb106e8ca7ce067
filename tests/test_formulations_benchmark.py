"""`python -m benchmarks.formulations`: that it times what is chosen, and everything beside it."""

import contextlib
import itertools
import json

import jax
import pytest

from benchmarks import formulation_cases, formulations, handoff
from conv_pallas import _measure
from conv_pallas.kernels import xla, xla_cpu, xla_cpu_bounds
from conv_pallas.spec import OPERATIONS

pytestmark = pytest.mark.usefixtures("hardly_optimized")


def test_one_case_from_the_command_line(tmp_path, capsys, monkeypatch):
    brief = _measure.Settings(least=0, rounds=(2, 2), limit=0.1)
    monkeypatch.setattr(formulations, "VISIT", brief)
    monkeypatch.setattr(formulations, "ROUNDS", 2)
    monkeypatch.setattr(formulations, "_ONCE", brief)
    monkeypatch.setattr(formulations, "HOPELESS", float("inf"))  # one call may be interrupted
    monkeypatch.setattr(handoff, "ratio", lambda: 1.3)
    path = tmp_path / "new" / "result.json"
    words = ["--only", "G2,G8", "--without", "G2,bfloat16"]
    assert formulations.main(["--quick", *words, "--json", str(path)]) == 0

    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["host"]["commit"] and stored["host"]["jax"] == jax.__version__
    assert [row["operation"] for row in stored["results"]] == list(OPERATIONS)
    case = next(c for c in formulation_cases.sweep(quick=True) if c.G == 8)
    printed = capsys.readouterr().out
    for row in stored["results"]:
        problem = case.problem(row["operation"], "cpu")
        assert row["case"] == formulation_cases.label(case) and row["cores"] == "together"
        assert row["chosen"] == xla.choose(problem)
        found = row["formulations"]
        assert {row["stock"], row["chosen"]} <= set(found)
        assert found[row["stock"]]["speedup"] == 1
        for name, figures in found.items():
            low, high = figures["quartiles"]
            assert low <= figures["speedup"] <= high and figures["ms"] > 0
            assert f"{name} {figures['speedup']:.2f}" in printed
        assert f"*{row['chosen']} " in printed


@pytest.fixture
def race(monkeypatch):
    """One whose formulations are never run: "stock" takes 2 s, then 4, 6, ... and "ours" 1 s."""
    turn = itertools.count(1)

    def interleaved(calls, settings, each_round):
        rounds = []
        for _ in range(3):
            each_round()
            rounds.append((2.0 * next(turn), 1.0))
        return dict(zip(calls, zip(*rounds, strict=True), strict=True))

    monkeypatch.setattr(_measure, "interleaved", interleaved)
    monkeypatch.setattr(formulations.Race, "compiled", lambda self: contextlib.nullcontext())
    case = next(formulation_cases.sweep(quick=True))
    problem = case.problem("conv1d", "cpu")
    return formulations.Race("case", problem, "stock", {"stock": None, "ours": None})


def test_rounds_count_for_the_cores_as_they_lay_before_and_after(race, monkeypatch):
    ratios = iter([1.3, 1.4, 3.0, 3.1])  # they move in the second of three rounds
    monkeypatch.setattr(handoff, "ratio", lambda: next(ratios))
    monkeypatch.setattr(formulations, "ROUNDS", 1)
    assert race.visit() == [False, True]
    assert race.rounds[False] == [{"stock": 2.0, "ours": 1.0}]
    assert race.rounds[True] == [{"stock": 6.0, "ours": 1.0}]
    together, apart = race.result(False), race.result(True)
    assert (together["cores"], apart["cores"]) == ("together", "apart")
    assert together["formulations"]["ours"]["speedup"] == 2
    assert apart["formulations"]["ours"]["speedup"] == 6


@pytest.mark.parametrize(
    ("ratios", "minutes", "expected"),
    [
        ([1.3], 0, ["together"]),
        ([1.3] * 40 + [3.0], 1, ["together", "apart"]),
        ([3.0] * 40 + [1.3], 1, ["apart", "together"]),
        ([None], 1, ["unknown"]),
    ],
    ids=["as they lie", "then apart", "then together", "nobody knows"],
)
def test_both_states_are_waited_for_as_long_as_asked(race, monkeypatch, ratios, minutes, expected):
    told = itertools.chain(ratios, itertools.repeat(ratios[-1]))
    monkeypatch.setattr(handoff, "ratio", lambda: next(told))
    monkeypatch.setattr(formulations.time, "sleep", lambda seconds: None)
    assert [row["cores"] for row in formulations.run([race], minutes)] == expected


def test_a_state_that_does_not_come_is_given_up(race, monkeypatch):
    clock = itertools.count(step=10.0)
    monkeypatch.setattr(handoff, "ratio", lambda: 1.3)
    monkeypatch.setattr(formulations.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(formulations.time, "monotonic", lambda: next(clock))
    assert [row["cores"] for row in formulations.run([race], minutes=5)] == ["together"]


def test_what_takes_over_three_times_as_long_is_left_out(monkeypatch):
    """For good: who took part is compiled again without being looked at."""
    seconds, looked_at = {"padded": 1.0, "native": 3.0, "im2col": 3.1}, []

    def interleaved(calls, settings):
        looked_at.extend(calls)
        return {name: (seconds[name],) for name in calls}

    monkeypatch.setattr(_measure, "interleaved", interleaved)
    monkeypatch.setattr(formulations, "candidates", lambda problem, stock: list(seconds))
    problem = next(formulation_cases.sweep(quick=True)).problem("conv1d", "cpu")
    race = formulations.Race("case", problem, "padded")
    with race.compiled():
        assert list(race.calls) == ["padded", "native"]
    assert not race.calls and looked_at == list(seconds)
    race.rounds[False].append({"padded": 1.0, "native": 3.0})
    with race.compiled():
        assert list(race.calls) == ["padded", "native"]
    assert looked_at == list(seconds)


def test_what_is_worth_compiling():
    """Stock first, each once, and each by a name that runs."""
    for case in formulation_cases.sweep():
        for operation in OPERATIONS:
            problem = case.problem(operation, "cpu")
            names = formulations.candidates(problem, formulation_cases.stock_of(case))
            assert names[0] == formulation_cases.stock_of(case) and len(names) == len(set(names))
            assert xla.choose(problem) in names


def test_layers_at_random_are_of_every_kind_and_come_again(monkeypatch):
    drawn = list(formulation_cases.drawn(100, seed=3))
    assert drawn == list(formulation_cases.drawn(100, seed=3))
    assert not set(drawn) & set(formulation_cases.drawn(100, seed=4))
    assert all(2**19 < layer.products < 2**29 for layer in drawn)
    kinds = {layer.kind.partition(",")[0] for layer in drawn}
    assert kinds == {"dense", "depthwise", "grouped"} and {1, 2, 4} == {layer.S for layer in drawn}
    assert {layer.dtype for layer in drawn} == {"float32", "bfloat16"}

    cases = []
    monkeypatch.setattr(formulations, "run", lambda races, minutes: cases.extend(races) or ())
    assert formulations.main(["--draw", "2", "--seed", "3"]) == 0
    assert {race.case for race in cases} == set(map(formulation_cases.label, drawn[:2]))


def test_large_kernels_lie_on_both_sides_of_where_filtering_ends():
    kernels = [layer.K * layer.C * layer.O for layer in formulation_cases.large()]
    assert min(kernels) <= xla_cpu_bounds.CACHED < max(kernels)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_rules_take_what_is_sound_of_layers_that_nobody_chose(operation):
    for layer in formulation_cases.drawn(2000, seed=11):
        problem = layer.problem(operation, "cpu")
        name = xla_cpu.choose(problem)
        assert xla_cpu_bounds.sound(name, problem), (name, formulation_cases.label(layer))
