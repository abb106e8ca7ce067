"""Where the TPU kernel is the default, against the committed estimates."""

import functools
import json

import pytest

from benchmarks.layers import LAYERS
from benchmarks.static import BFLOAT16, CHAINS, OURS, RESULTS, ratio
from conv_pallas.kernels import tpu_dense, tpu_estimates
from conv_pallas.kernels.tpu_window import Chip
from conv_pallas.spec import OPERATIONS, Problem

wins = functools.partial(tpu_estimates.wins, tpu_dense._plan_of)
CHIPS = {
    "v5e": Chip(128 * 2**20, mxu=128, cores=1, name="v5e"),
    "v6e": Chip(128 * 2**20, mxu=256, cores=1, name="v6e"),
}


def _rows(chip: str) -> list[dict]:
    return json.loads((RESULTS / f"{chip}.json").read_text())["rows"]


def _problem(row: dict) -> Problem:
    (layer,) = (c for c in (*LAYERS, *BFLOAT16) if c.name == row["layer"])
    return layer.problem(row["program"], "tpu")


@pytest.mark.parametrize("chip", CHIPS)
def test_the_default_is_never_behind_by_the_committed_estimates(chip):
    won = 0
    for row in _rows(chip):
        if row["program"] not in OPERATIONS or "estimate" not in row[OURS]:
            continue
        problem = _problem(row)
        if tpu_dense.decline(problem) is None and tpu_estimates.wins(
            tpu_dense._plan_of, problem, CHIPS[chip]
        ):
            won += 1
            assert ratio(row) > 0.995, (row["layer"], row["program"])
    assert won >= 9


@pytest.mark.parametrize("chip", CHIPS)
def test_the_chain_keeps_its_goal(chip):
    """Four layers of convolution and ReLU at C=128: XLA keeps activations in VMEM, and so do we."""
    (row,) = (
        row
        for row in _rows(chip)
        if row["layer"] == CHAINS[0].name and row["program"] == "4 layers, forward"
    )
    assert ratio(row) >= 1.2


def test_another_chip_has_no_default():
    problem = _problem(dict(layer=BFLOAT16[0].name, program="conv1d"))
    assert wins(problem, CHIPS["v6e"])
    assert not wins(problem, CHIPS["v5e"])  # even as a single operation, behind in a chain
    assert not tpu_estimates.wins(
        tpu_dense._plan_of, problem, Chip(128 * 2**20, mxu=128, cores=2, name="v5p")
    )
    assert not wins(problem, Chip(16 * 2**20, mxu=128, cores=1))
