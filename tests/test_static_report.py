"""The goals and the table of the static comparison, on estimates made up for it."""

import io

import pytest
from rich.console import Console

from benchmarks import static_report


def _row(layer, program, ours, xla, mxu=1):
    estimate = dict(
        bundles=ours,
        mxu=mxu,
        memory=2,
        spills=0,
        spilled=0,
        vmem=1,
        uncounted=0,
        length=1,
        estimate=ours,
    )
    return dict(layer=layer, geometry="N=1", dtype="bfloat16", kind="dense", program=program,
                pallas_tpu=estimate, xla_native=estimate | dict(estimate=xla))  # fmt: skip


ROWS = [
    _row("chain/C128/K3/D4", "4 layers, forward", 100, 130),
    _row("chain/C256/K7/D64", "4 layers, forward", 100, 150),
    _row("bfloat16/C256/K7/D64", "conv1d", 100, 150, mxu=90),
    _row("tcn-adding/D1", "conv1d", 100, 80),
]


def _judged(chip, rows=ROWS):
    return [(v.goal, v.name, v.met) for v in static_report.judge(chip, rows)]


@pytest.fixture(autouse=True)
def _no_default(monkeypatch):  # to tell it for a chip that is not here takes libtpu
    monkeypatch.setattr(static_report, "is_default", lambda chip, row: False)


def test_goals_differ_by_chip():
    chain = ("chain of four, C=256 K=7 D=64", "chain/C256/K7/D64, 4 layers, forward")
    assert (*chain, True) in _judged("v5e")
    assert (*chain, False) in _judged("v6e")


def test_what_is_not_estimated_meets_no_goal():
    assert ("depthwise", "not estimated", False) in _judged("v5e")


@pytest.mark.parametrize(
    "without",
    [
        dict(pallas_tpu=dict(fails="INTERNAL: Mosaic failed to compile")),
        dict(pallas_tpu=dict(declines="takes no strides")),
        dict(xla_native=dict(unreadable="a loop")),
    ],
    ids=lambda row: str(row),
)
def test_a_program_of_which_one_side_has_no_estimate_meets_no_goal(monkeypatch, without):
    monkeypatch.setattr(static_report, "is_default", lambda chip, row: True)
    rows = [row | without for row in ROWS]
    told = static_report.judge("v5e", rows)
    compared = [v for v in told if "matrix unit" not in v.goal]
    assert len(compared) == 5  # three goals, of which depthwise has no program, and two defaults
    assert all((v.reached, v.met) == (None, False) for v in compared)
    (bounded,) = set(told) - set(compared)
    assert (bounded.reached is None) == (not bounded.met) == ("pallas_tpu" in without)
    assert all("not met" in static_report._told(v) for v in compared)


@pytest.mark.parametrize(("mxu", "met"), [(90, True), (79, False)])
def test_distance_from_the_matrix_units_bound(mxu, met):
    rows = [_row("bfloat16/C256/K7/D64", "conv1d", 100, 150, mxu=mxu)]
    assert ("over the matrix unit's bound, at most", "bfloat16/C256", met) in _judged("v6e", rows)


def test_a_goal_beyond_the_bounds_is_told_with_them():
    row = _row("chain/C256/K7/D64", "4 layers, forward", 100, 150, mxu=90)
    told = [static_report._told(v) for v in static_report.judge("v6e", [row])]
    assert "at the bound of matrix unit or memory it would be 1.67" in told[1]  # 150 over 90
    assert "it would be" not in static_report._told(static_report.judge("v5e", [row])[1])  # met


@pytest.mark.parametrize("default", [True, False])
def test_a_default_that_loses_is_told(monkeypatch, default):
    monkeypatch.setattr(static_report, "is_default", lambda chip, row: default)
    of = [met for _, name, met in _judged("v5e") if name == "tcn-adding/D1, conv1d"]
    assert of == ([False] if default else [])


def test_the_table_calls_an_estimate_one():
    console = Console(width=200, record=True, file=io.StringIO())
    head = dict(chip="v5e", libtpu="0", jax="0", clock=1e6)
    declined = dict(ROWS[0], pallas_tpu=dict(declines="no"))
    console.print(static_report.table(head, [*ROWS, declined]))
    told = console.export_text()
    assert "not measured times" in told
    assert "1.30" in told  # 130 over 100
    assert "declines" in told
