"""`tune`, with the timing of a chip that is not here."""

import json

import jax
import jax.numpy as jnp
import pytest

from conv_pallas import aot, tuning

pytest.importorskip("jax_triton")

from conv_pallas.kernels import triton_compat, triton_tuned

pytestmark = pytest.mark.aot

KEY = "conv_walk_backward 515x64x4 bfloat16 dilation 1"


@pytest.fixture
def h200(monkeypatch, tmp_path):
    """A machine with an H200, as far as `tune` looks; its clock is this dictionary."""
    seconds = {}

    def compiled(program, arguments):
        structs = jax.tree.map(lambda a: aot.struct(a.shape, a.dtype), arguments)
        aot.lower_for("h200", program, *structs)
        return lambda: jnp.zeros(())

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(triton_compat, "device_kind", lambda: "NVIDIA H200")
    monkeypatch.setattr(tuning, "_compiled", compiled)
    monkeypatch.setattr(
        tuning._measure, "interleaved",
        lambda calls, settings: {tile: (seconds.get(tile, 1.0),) for tile in calls},
    )  # fmt: skip
    monkeypatch.setattr(tuning, "WALK_TILES", ((4, 64, 32, 4), (3, 64, 32, 4), (8, 64, 16, 4)))
    monkeypatch.setattr(triton_tuned, "FOLDER", tmp_path)
    triton_tuned.forget()
    yield seconds, tmp_path / "triton_tuned_nvidia-h200.json"
    triton_tuned.forget()


def test_tune_writes_what_later_compilations_find(h200):
    seconds, file = h200
    file.write_text(json.dumps({"device": "x", "tiles": {"other": [1, 2]}, "measured": {}}))
    x, w = aot.struct((2, 512, 64), jnp.bfloat16), aot.struct((4, 1, 64), jnp.bfloat16)
    assert triton_tuned.lookup(KEY) is None
    seconds[(8, 64, 16, 4)] = 0.5
    lines = []
    found = tuning.tune(x, w, feature_group_count=64, report=lines.append)
    assert found[KEY] == (8, 64, 16, 4)
    assert triton_tuned.lookup(KEY) == (8, 64, 16, 4)
    stored = json.loads(file.read_text())
    assert stored["tiles"] == {key: list(tile) for key, tile in found.items()} | {"other": [1, 2]}
    # One call of so small a layer is 8 runs.
    assert any("(4, 64, 32, 4): 125000.0 us" in line for line in lines)
    # No power of two: Triton refuses it, which is told, and the others are tried all the same.
    assert any("(3, 64, 32, 4): " in line and "Error" in line for line in lines), lines


def test_many_taps_are_tuned_one_kernel_after_the_other(h200, monkeypatch):
    seconds, _ = h200
    tile = (4, 64, 8, 4)
    monkeypatch.setattr(tuning, "TAPS_TILES", (tile,))
    seconds[tile] = 0.5
    x, w = aot.struct((2, 512, 64), jnp.bfloat16), aot.struct((17, 1, 64), jnp.bfloat16)
    found = tuning.tune(x, w, feature_group_count=64, report=lambda line: None)
    kernels = ("conv_taps", "conv_taps_kernel_grad")
    assert found == {f"{kernel} 512x64x17 bfloat16 dilation 1": tile for kernel in kernels}
    assert all(triton_tuned.lookup(key) == tile for key in found)


def test_no_two_dense_kernels_share_a_tile(h200, monkeypatch):
    """Not those of other operations, taps or strides, though the matmul be of the same size."""
    seconds, _ = h200
    tile = (64, 64, 32, 4, 3)
    monkeypatch.setattr(tuning, "DENSE_TILES", (tile,))
    seconds[tile] = 0.5
    found = {}
    for K, S in ((3, 1), (5, 1), (3, 2)):
        x, w = aot.struct((2, 512 * S, 512), jnp.bfloat16), aot.struct((K, 512, 512), jnp.bfloat16)
        tuned = tuning.tune(x, w, strides=S, report=lambda line: None)
        assert len(tuned) == 3 and not found.keys() & tuned.keys()
        found |= tuned
    size = "512x512x512x3 bfloat16 tf32"
    kernels = ("conv_dense", "conv_dense_input_grad", "conv_dense_kernel_grad")
    assert {f"{kernel} {size}" for kernel in kernels} <= found.keys()
    assert f"conv_dense {size} phases 1 rows 2 taps 1" in found


def test_what_is_hardly_faster_is_not_kept(h200):
    seconds, file = h200
    seconds[(4, 64, 32, 4)] = 0.99
    x, w = aot.struct((2, 512, 64), jnp.bfloat16), aot.struct((4, 1, 64), jnp.bfloat16)
    assert tuning.tune(x, w, feature_group_count=64, report=lambda line: None, seconds=30) == {}
    assert not file.exists()


def test_tune_needs_a_gpu():
    x, w = jnp.ones((2, 8, 4)), jnp.ones((3, 4, 4))
    with pytest.raises(RuntimeError, match="tune needs an NVIDIA GPU, and JAX runs on cpu"):
        tuning.tune(x, w)
