"""Where the TPU kernels are the default, against the estimates that are committed."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import static
from benchmarks.layers import LAYERS
from conv_pallas import explain
from conv_pallas._layers import find
from conv_pallas.spec import OPERATIONS

CHIPS = ("v5e", "v6e")


def _told(layer):
    """What `explain` says of a layer on a TPU."""
    x = jax.ShapeDtypeStruct((layer.N, layer.T, layer.C), jnp.dtype(layer.dtype))
    w = jax.ShapeDtypeStruct((layer.K, layer.C // layer.G, layer.O), jnp.dtype(layer.dtype))
    return explain(x, w, platform="tpu", strides=layer.S, padding=layer.padding,
                   kernel_dilation=layer.D, feature_group_count=layer.G)  # fmt: skip


def _single_operations(chip):
    rows = json.loads((static.RESULTS / f"{chip}.json").read_text())["rows"]
    return [row for row in rows if row["program"] in OPERATIONS]


@pytest.mark.parametrize("chip", CHIPS)
def test_no_operation_that_is_the_default_is_estimated_slower(chip):
    """And what is left to XLA has its reason told."""
    defaults = 0
    for row in _single_operations(chip):
        told = _told(find(row["layer"], LAYERS + static.BFLOAT16))
        ours = [c for c in told.candidates[row["program"]] if c.implementation == static.OURS]
        if told.chosen[row["program"]] == static.OURS:
            defaults += 1
            assert static.ratio(row) >= 1, (row["layer"], row["program"])
        else:
            assert all(c.reason or c.by_name for c in ours)
    assert defaults >= 3


def test_a_row_that_loses_is_caught(monkeypatch):
    """The test above, of estimates where ours is slower everywhere."""
    monkeypatch.setattr(static, "ratio", lambda row: 0.99)
    with pytest.raises(AssertionError, match="C256"):
        test_no_operation_that_is_the_default_is_estimated_slower("v6e")


@pytest.mark.parametrize(("layer", "words"), [
    ("bfloat16/depthwise", "depthwise"),
    ("wide-and-long/D64", "bfloat16 alone"),
    ("bfloat16/C128/K3/D4", "below 256 channels"),
])  # fmt: skip
def test_explain_says_why_it_is_not_the_default(layer, words):
    told = _told(find(layer, LAYERS + static.BFLOAT16))
    assert set(told.chosen.values()) == {"xla"}
    assert "by name only" in str(told)
    assert words in str(told)
