"""The estimates of TPU programs: what is counted, and what the committed ones say."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import traffic
from benchmarks.layers import LAYERS
from benchmarks.static import BFLOAT16, CHAINS, OURS, RESULTS, ratio
from conv_pallas.kernels import tpu_dense, tpu_estimates
from conv_pallas.kernels.tpu_window import Chip
from conv_pallas.spec import OPERATIONS, Problem, make_spec

wins = functools.partial(tpu_estimates.wins, tpu_dense._plan_of)
CHIPS = {
    "v5e": Chip(128 * 2**20, mxu=128, cores=1, name="v5e"),
    "v6e": Chip(128 * 2**20, mxu=256, cores=1, name="v6e"),
}

HLO = """
ENTRY %main {
  %x = bf16[8,100,30]{2,1,0:T(8,128)(2,1)} parameter(0)
  %w = f32[30]{0:T(128)} parameter(1)
  %copy-start = (f32[30]{0:T(128)S(1)}, f32[30]{0:T(128)}, u32[]{:S(2)}) copy-start(%w)
  %copy-done = f32[30]{0:T(128)S(1)} copy-done(%copy-start)
  %f = bf16[8,100,30]{2,1,0:T(8,128)(2,1)S(1)} fusion(%x, %copy-done), kind=kLoop
  ROOT %y = bf16[8,100,30]{1,2,0:T(8,128)(2,1)} copy(%f)
}
"""


def test_bytes_count_in_whole_tiles_and_not_in_vmem():
    x, w = 8 * 104 * 128 * 2, 128 * 4
    y = 8 * 32 * 128 * 2  # the other way round
    assert traffic.hbm_bytes(HLO) == x + w + y


def test_a_kernel_says_how_often_it_reads():
    again = HLO.replace("kind=kLoop", 'kind=kLoop, backend_config={"bytes_accessed":"9000000"}')
    x = 8 * 104 * 128 * 2
    assert traffic.hbm_bytes(again) - traffic.hbm_bytes(HLO) == 9000000 - 2 * x - 128 * 4


def test_a_loop_is_not_taken_for_nothing():
    with pytest.raises(ValueError, match="is a loop"):
        traffic.hbm_bytes(HLO.replace(" fusion(", " while("))


def _rows(chip: str) -> list[dict]:
    return json.loads((RESULTS / f"{chip}.json").read_text())["rows"]


def _problem(row: dict) -> Problem:
    (layer,) = (c for c in (*LAYERS, *BFLOAT16) if c.name == row["layer"])
    spec, _ = make_spec(
        (layer.N, layer.T, layer.C), (layer.K, layer.C // layer.G, layer.O), strides=layer.S,
        padding=layer.padding, kernel_dilation=layer.D, feature_group_count=layer.G,
    )  # fmt: skip
    dtype = np.dtype(getattr(jnp, layer.dtype))
    return Problem(
        row["program"], spec, layer.N, layer.C, layer.O, dtype, dtype, dtype, None, "tpu"
    )


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
    assert wins(problem, CHIPS["v5e"])
    assert not tpu_estimates.wins(
        tpu_dense._plan_of, problem, Chip(128 * 2**20, mxu=128, cores=2, name="v5p")
    )
    assert not wins(problem, Chip(16 * 2**20, mxu=128, cores=1))


@pytest.mark.aot
def test_main_loops_do_not_spill(tmp_path):
    """Narrow layers and the vector unit; what wide ones spill, the results tell."""
    pytest.importorskip("libtpu")
    command = [sys.executable, "-m", "benchmarks.static", "tpu", "--ours", "--chips", "v6e",
               "--layers", "bfloat16/C128/K3,bfloat16/depthwise",
               "--output", str(tmp_path)]  # fmt: skip
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
    rows = json.loads((tmp_path / "v6e.json").read_text())["rows"]
    assert len(rows) == 6
    for row in rows:
        assert row[OURS]["bundles"] > 1000
        allowed = 1 if re.search("kernel_grad", row["program"]) else 0
        assert row[OURS]["spills"] <= allowed, (row["layer"], row["program"])
