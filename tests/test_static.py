"""Where the TPU kernels are the default, against the committed estimates."""

import dataclasses
import functools
import itertools
import json
import re

import pytest

from benchmarks.layers import LAYERS
from benchmarks.static import ALONE, BATCHES, BFLOAT16, CHAINS, RESULTS, ratio
from conv_pallas._layers import Layer
from conv_pallas.kernels import tpu_dense, tpu_estimates, tpu_time_in_lanes
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
    (layer,) = (c for c in (*LAYERS, *ALONE) if c.name == row["layer"])
    return layer.problem(row["program"], "tpu")


@pytest.mark.parametrize("chip", CHIPS)
def test_the_default_is_never_behind_by_the_committed_estimates(chip):
    won = {"many": 0, "few": 0}
    for row in _rows(chip):
        if row["program"] not in OPERATIONS or ratio(row) is None:
            continue
        problem, which = _problem(row), "many"
        if tpu_time_in_lanes.decline(problem) is None:
            which, default = "few", tpu_estimates.time_in_lanes_wins(problem, CHIPS[chip])
        else:
            default = tpu_dense.decline(problem) is None and wins(problem, CHIPS[chip])
        won[which] += default
        if default:
            assert ratio(row) > 0.995, (row["layer"], row["program"])
    assert won["many"] >= 9 and won["few"] >= 200


@pytest.mark.parametrize("chip", CHIPS)
def test_no_default_where_samples_lie_along_lanes(chip):
    """XLA lays out many short sequences so, and then its own convolution is ahead by far."""
    names = [layer.name for layer in BATCHES]
    rows = [row for row in _rows(chip) if row["layer"] in names]
    assert len(rows) == len(OPERATIONS) * len(BATCHES)
    for row in rows:
        assert ratio(row) < 0.8
        assert not tpu_estimates.time_in_lanes_wins(_problem(row), CHIPS[chip])


def test_the_table_of_few_channels_is_that_of_the_committed_estimates():
    told = re.findall(r"^ +([\w-]+) +([\d. ]+)$", tpu_estimates.time_in_lanes_wins.__doc__, re.M)
    assert len(told) == 10
    for model, figures in told:
        want = []
        for chip, operation in itertools.product(CHIPS, OPERATIONS):
            ratios = [
                ratio(row)
                for row in _rows(chip)
                if row["layer"].split("/")[0] == model
                and row["program"] == operation
                and tpu_time_in_lanes.decline(_problem(row)) is None
            ]
            least, most = (f"{bound(ratios):.1f}" for bound in (min, max))
            want.append(least if least == most else f"{least}..{most}")
        assert figures.split() == want, model


@pytest.mark.parametrize("chip", CHIPS)
def test_few_channels_are_ahead_in_a_chain_too(chip):
    rows = [row for row in _rows(chip) if row["layer"] == CHAINS[-1].name]
    assert len(rows) == 3 and min(map(ratio, rows)) > 1.2


@pytest.mark.parametrize("chip", CHIPS)
def test_the_chain_keeps_its_goal(chip):
    """Four layers of convolution and ReLU at C=128: XLA keeps activations in VMEM, and so do we."""
    (row,) = (
        row
        for row in _rows(chip)
        if row["layer"] == CHAINS[0].name and row["program"] == "4 layers, forward"
    )
    assert ratio(row) >= 1.2


@pytest.mark.parametrize("chip", CHIPS)
def test_what_there_is_no_estimate_for_is_left_to_xla(chip):
    layer = Layer("layer", "made up", 8, 4096, 256, 256, 7, 64, dtype="bfloat16")
    for changes in (
        dict(T=2100),  # two tiles of 2048
        dict(T=512),
        dict(C=1024, O=1024),
        dict(K=9),
    ):
        for operation in OPERATIONS:
            problem = layer.problem(operation, "tpu")
            assert wins(problem, CHIPS[chip])
            assert not wins(dataclasses.replace(problem, exported=True), CHIPS[chip])
            other = dataclasses.replace(layer, **changes).problem(operation, "tpu")
            assert not wins(other, CHIPS[chip]), (changes, operation)


def test_another_chip_has_no_default():
    problem = _problem(dict(layer=BFLOAT16[0].name, program="conv1d"))
    assert wins(problem, CHIPS["v6e"])
    assert not wins(problem, CHIPS["v5e"])  # even as a single operation, behind in a chain
    assert not tpu_estimates.wins(
        tpu_dense._plan_of, problem, Chip(128 * 2**20, mxu=128, cores=2, name="v5p")
    )
    assert not wins(problem, Chip(16 * 2**20, mxu=128, cores=1))
    few = _problem(dict(layer="tcn-mnist/D8", program="conv1d"))
    assert tpu_estimates.time_in_lanes_wins(few, CHIPS["v5e"])
    assert not tpu_estimates.time_in_lanes_wins(few, Chip(16 * 2**20, mxu=128, cores=2, name="v4"))
