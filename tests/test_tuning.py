"""`tune`, with the timing of a chip that is not here."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import pytest

from benchmarks import device_layers, device_timing
from benchmarks.on_device import Log
from conv_pallas import aot, conv1d, tuning

pytest.importorskip("jax_triton")

from conv_pallas import machine_code
from conv_pallas.kernels import triton_compat, triton_tuned

pytestmark = pytest.mark.aot

KEY = "conv_walk_backward 515x64x4 bfloat16 dilation 1"


@pytest.fixture
def h200(monkeypatch, tmp_path):
    """A machine with an H200, as far as `tune` looks; its clock is this dictionary."""
    seconds = {}

    def lowered(program, arguments):
        structs = jax.tree.map(lambda a: aot.struct(a.shape, a.dtype), arguments)
        return aot.lower_for("h200", program, *structs)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(triton_compat, "device_kind", lambda: "NVIDIA H200")
    monkeypatch.setattr(tuning, "_lowered", lowered)
    monkeypatch.setattr(tuning, "_call", lambda lowered, arguments: lambda: jnp.zeros(()))
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


def test_a_tile_that_changes_nothing_is_not_tried(h200, monkeypatch):
    """The kernel gradient has no programs that stay for so many channels."""
    plain = (128, 128, 64, 8, 3)
    monkeypatch.setattr(tuning, "DENSE_TILES", (plain, (*plain, 1)))
    x, w = aot.struct((2, 512, 256), jnp.bfloat16), aot.struct((3, 256, 256), jnp.bfloat16)
    lines = []
    tuning.tune(x, w, report=lines.append)
    same = [line for line in lines if "the same program as that of" in line]
    assert same == [f"kernel gradient {(*plain, 1)}: the same program as that of {plain}"]
    assert not any(f"kernel gradient {(*plain, 1)}: 1" in line for line in lines)
    assert any(f"forward {(*plain, 1)}: 1" in line for line in lines)


def test_every_operation_has_its_share_of_the_time(h200, monkeypatch):
    """The first may not take all, and what is compiled by the end of a share is timed."""
    clock, lowered = [0.0], tuning._lowered

    def slowly(*args):
        clock[0] += 10
        return lowered(*args)

    monkeypatch.setattr(tuning, "_lowered", slowly)
    monkeypatch.setattr(tuning, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    tiles = tuple((32, 32, 32, warps, stages) for warps in (1, 2, 4) for stages in (1, 2, 3))
    monkeypatch.setattr(tuning, "DENSE_TILES", tiles)
    x, w = aot.struct((2, 64, 32), jnp.bfloat16), aot.struct((3, 32, 32), jnp.bfloat16)
    lines = []
    tuning.tune(x, w, seconds=150, report=lines.append)
    for name in ("forward", "input gradient", "kernel gradient"):
        timed = [line for line in lines if line.startswith(name) and line.endswith(" us")]
        assert 3 <= len(timed) <= 5, lines
        assert any(line.startswith(f"{name}: no time for ") for line in lines)
    assert clock[0] <= 150


def test_every_layer_has_its_share_of_the_step(h200, tmp_path, monkeypatch):
    given, layers = [], device_layers.goals(True)
    monkeypatch.setattr(device_layers, "goals", lambda dry: layers)
    monkeypatch.setattr(tuning, "tune", lambda x, w, seconds, **more: given.append(seconds))
    device_timing.tuning(Log(tmp_path, "tuning", 800), False)
    # Of eight operations, five, and two: where nothing takes any time, the last has it all.
    assert given == pytest.approx([800 * 3 / 8, 800 * 3 / 5, 800], rel=0.01)


@pytest.mark.parametrize("tile", [tile for tile in tuning.DENSE_TILES if len(tile) == 6])
@pytest.mark.parametrize("C", [512, 64])
def test_a_processor_holds_the_programs_that_stay(C, tile):
    """Else some would begin when the others are done, and all that time be waited for."""
    x, w = aot.struct((8, 65536, C), jnp.bfloat16), aot.struct((3, C, C), jnp.bfloat16)
    forward = functools.partial(conv1d, implementation="triton")
    with triton_tuned.trial(tile):
        (code,) = machine_code.codes("h200", forward, x, w)
    assert code.name in ("conv_resident", "conv_onward")
    assert code.spills == 0 and code.blocks >= tile[5], code


def test_a_processor_has_two_programs_of_four_warps():
    """One group of warps alone would have nobody who multiplies while it waits."""
    for rows, columns, depth, warps, stages, *_ in tuning.DENSE_TILES:
        shared = 2 * stages * depth * (rows + columns) + machine_code.RESERVED
        at_once = machine_code.SHARED_BYTES["h200"] // shared
        assert at_once * warps >= 8, (rows, columns, depth, warps, stages)


@pytest.mark.parametrize("T, backward", [(40, 1), (400, 2)])
def test_taps_that_see_padding_alone_are_not_tuned(T, backward):
    """Of 12 taps two see any of 40 steps: so few have one kernel for the whole backward pass."""
    x, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1, T, 8), (12, 1, 8)))
    geometry = dict(feature_group_count=8, kernel_dilation=30, precision="highest")
    assert len(list(tuning._programs(x, w, geometry))) == 1 + backward


def test_tune_needs_a_gpu():
    x, w = jnp.ones((2, 8, 4)), jnp.ones((3, 4, 4))
    with pytest.raises(RuntimeError, match="tune needs an NVIDIA GPU, and JAX runs on cpu"):
        tuning.tune(x, w)
