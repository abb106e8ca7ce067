"""How `tune` finds the tiles of a GPU's kernels, with the timing of a chip that is not here."""

import dataclasses
import functools
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import device_layers, device_timing, on_device
from benchmarks.on_device import Log
from conv_pallas import (
    _measure,
    _tuning_gpu,
    aot,
    conv1d,
    explanation,
    tuning,
)

pytest.importorskip("jax_triton")

from conv_pallas import machine_code
from conv_pallas.kernels import triton_tuned
from tests.tuning.gpu import tune_dense, who_runs

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("shipped")]

KEY = "conv_walk_backward 515x64x4 bfloat16 dilation 1"


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
    assert stored["tiles"] == {key: [*tile] for key, tile in found.items()} | {"other": [1, 2]}
    assert stored["measured"][KEY]["seconds"] == 0.5 / 8
    # One call of so small a layer is 8 runs.
    assert any("(4, 64, 32, 4): 125000.0 us" in line for line in lines)
    # No power of two: Triton refuses it, which is told, and the others are tried all the same.
    assert any("(3, 64, 32, 4): " in line and "Error" in line for line in lines), lines


def test_many_taps_are_tuned_one_kernel_after_the_other(h200, uncompiled, monkeypatch):
    seconds, _ = h200
    tile = (4, 64, 8, 4)
    monkeypatch.setattr(_tuning_gpu, "TAPS_TILES", (tile,))
    seconds[tile] = 0.5
    x, w = aot.struct((2, 512, 64), jnp.bfloat16), aot.struct((17, 1, 64), jnp.bfloat16)
    found = tuning.tune(x, w, feature_group_count=64, report=lambda line: None)
    kernels = ("conv_taps", "conv_taps_kernel_grad")
    assert found == {f"{kernel} 512x64x17 bfloat16 dilation 1": tile for kernel in kernels}
    assert all(triton_tuned.lookup(key) == tile for key in found)


@pytest.mark.sampled
@pytest.mark.parametrize("channels, groups, tried", [(32, 1, True), (64, 2, True), (33, 1, False)])
def test_several_taps_in_a_program_are_tried_for_few_channels(
    channels, groups, tried, h200, uncompiled, monkeypatch
):
    seconds, _ = h200
    tile = (32, 32, 32, 1, 3, 0, 2)
    monkeypatch.setattr(_tuning_gpu, "DENSE_TILES", ())
    monkeypatch.setattr(_tuning_gpu, "FEW_TILES", (tile,))
    seconds[tile] = 0.5
    x = aot.struct((2, 512, channels), jnp.float32)
    w = aot.struct((3, channels // groups, channels), jnp.float32)
    found = tuning.tune(x, w, feature_group_count=groups, report=lambda line: None)
    (key,) = found if tried else ("",)
    assert not tried or (key.startswith("conv_dense_kernel_grad ") and found[key] == tile)


def test_no_two_dense_kernels_share_a_tile(h200, uncompiled, monkeypatch):
    """Not those of other operations, taps or strides, though the matmul be of the same size."""
    seconds, _ = h200
    tile = (64, 64, 32, 4, 3)
    monkeypatch.setattr(_tuning_gpu, "DENSE_TILES", (tile,))
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


def test_what_is_hardly_faster_is_not_kept(h200, uncompiled):
    seconds, file = h200
    seconds[(4, 64, 32, 4)] = 0.99
    x, w = aot.struct((2, 512, 64), jnp.bfloat16), aot.struct((4, 1, 64), jnp.bfloat16)
    assert tuning.tune(x, w, feature_group_count=64, report=lambda line: None, seconds=30) == {}
    assert set(json.loads(file.read_text())["tiles"].values()) == {None}


def test_what_was_fastest_by_luck_is_not_kept(h200, uncompiled, monkeypatch):
    """Of many tiles one is; against the heuristic's alone it has to be again."""
    seconds, file = h200
    race = _tuning_gpu._measure.interleaved
    monkeypatch.setattr(
        _tuning_gpu._measure, "interleaved",
        lambda calls, how: race(calls, how) | ({(4, 64, 32, 4): (0.5,)} if len(calls) > 2 else {}),
    )  # fmt: skip
    x, w = aot.struct((2, 512, 64), jnp.bfloat16), aot.struct((4, 1, 64), jnp.bfloat16)
    assert tuning.tune(x, w, feature_group_count=64, report=lambda line: None, seconds=30) == {}
    assert set(json.loads(file.read_text())["tiles"].values()) == {None}


@pytest.mark.parametrize("runs", [1, 4])
def test_of_short_programs_it_counts_what_the_device_does(runs, monkeypatch):
    told, asked = {"xla": 3e-4}, []
    monkeypatch.setattr(
        _tuning_gpu._measure,
        "interleaved",
        lambda calls, settings: dict.fromkeys(calls, (told["xla"],)),
    )

    def device_seconds(calls):
        asked.append(list(calls))
        return {name: _measure.Spread.of([1e-5 * i]) for i, name in enumerate(calls, start=1)}

    monkeypatch.setattr(_tuning_gpu._trace, "device_seconds", device_seconds)
    trial = types.SimpleNamespace(name="forward")
    medians = functools.partial(
        _tuning_gpu._medians, trial, {None: 0, "xla": 0}, ([0] * runs,), None, lambda line: None
    )
    assert medians() == {None: 1e-5 / runs, "xla": 2e-5 / runs} and len(asked) == 1
    told["xla"] = 5e-4
    assert medians() == {None: 5e-4 / runs, "xla": 5e-4 / runs} and len(asked) == 1


@pytest.mark.sampled
@pytest.mark.parametrize("by_clock, by_device, chosen", [
    (2.5e-5, 0.9e-5, "xla"), (4e-5, 0.9e-5, "triton"),
    (1.5e-5, 2e-5, "triton"), (1e-5, 2e-5, "xla"),
])  # fmt: skip
def test_of_short_programs_the_clock_counts_where_it_is_clear(
    one_tile, by_clock, by_device, chosen, monkeypatch
):
    """Ours take 20 us by the clock, and the device 12. Among tiles the device alone counts."""
    seconds, file = one_tile
    tile = (64, 64, 32, 4, 3)
    seconds |= {None: 2e-5, tile: 1e-5, "xla": by_clock}
    device = {None: 1.2e-5, tile: 1.8e-5, "xla": by_device}
    monkeypatch.setattr(
        _tuning_gpu._trace, "device_seconds",
        lambda calls: {name: _measure.Spread.of([device[name]]) for name in calls},
    )  # fmt: skip
    tune_dense()
    assert not any(json.loads(file.read_text())["tiles"].values())
    assert who_runs() == [chosen] * 3


def test_a_tile_that_changes_nothing_is_not_tried(h200, uncompiled, monkeypatch):
    """The kernel gradient has no programs that stay for so many channels."""
    plain = (128, 128, 64, 8, 3)
    monkeypatch.setattr(_tuning_gpu, "DENSE_TILES", (plain, (*plain, 1)))
    x, w = aot.struct((2, 512, 256), jnp.bfloat16), aot.struct((3, 256, 256), jnp.bfloat16)
    lines = []
    tuning.tune(x, w, report=lines.append)
    same = [line for line in lines if "the same program as that of" in line]
    assert same == [f"kernel gradient {(*plain, 1)}: the same program as that of {plain}"]
    assert not any(f"kernel gradient {(*plain, 1)}: 1" in line for line in lines)
    assert any(f"forward {(*plain, 1)}: 1" in line for line in lines)


def test_every_operation_has_its_share_of_the_time(h200, uncompiled, monkeypatch):
    """The first may not take all, and what is compiled by the end of a share is timed."""
    clock, lowered = [0.0], _tuning_gpu._lowered

    def slowly(*args):
        clock[0] += 4
        return lowered(*args)

    monkeypatch.setattr(_tuning_gpu, "_lowered", slowly)
    monkeypatch.setattr(_tuning_gpu, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    tiles = tuple((32, 32, 32, warps, stages) for warps in (1, 2, 4, 8) for stages in (1, 2, 3))
    monkeypatch.setattr(_tuning_gpu, "DENSE_TILES", tiles)
    x, w = aot.struct((2, 64, 32), jnp.bfloat16), aot.struct((3, 32, 32), jnp.bfloat16)
    lines = []
    tuning.tune(x, w, seconds=150, report=lines.append)
    for name in ("forward", "input gradient", "kernel gradient"):
        timed = [line for line in lines if line.startswith(f"{name} (") and line.endswith(" us")]
        assert 5 <= len(timed) <= 8, lines
        assert any(line.startswith(f"{name}: no time for ") for line in lines)
        assert any(line.startswith(f"{name}: of XLA's ") for line in lines)
    assert clock[0] <= 150 + 2 * 4  # of the last, XLA's


def test_every_layer_has_its_share_of_the_step(h200, tmp_path, monkeypatch):
    given, (dense, few, deep) = [], device_layers.goals(True)[:3]
    monkeypatch.setattr(device_layers, "goals", lambda dry: [dense, few, few, few, deep])
    monkeypatch.setattr(device_layers, "sweep", lambda dry: [dense, few, few, deep])
    monkeypatch.setattr(tuning, "tune", lambda *xw, **how: given.append((xw[0].shape, how)))
    monkeypatch.setattr(on_device, "time", types.SimpleNamespace(monotonic=lambda: 0.0))
    for shard in range(2):
        device_timing.tuning(Log(tmp_path, "tuning", 800, shard), False, shard, shards=2)
    shapes, times = zip(*((shape, how["seconds"]) for shape, how in given), strict=True)
    assert shapes == tuple(a.x_shape for a in (dense, few, dense, few, few, deep, few, deep))
    # Of twelve operations, nine, six, and three; of ten, seven, five, and two: where nothing
    # takes any time, the last has it all.
    first, second = [800 * 3 / n for n in (12, 9, 6, 3)], [800 * 3 / 10, 800 * 2 / 7]
    assert times == pytest.approx([*first, *second, 800 * 3 / 5, 800])
    assert all(how["processes"] == 2 for _, how in given)
    assert not any(how["quick"] for _, how in given)  # these are all among the goals
    other = dataclasses.replace(dense, name="another")
    monkeypatch.setattr(device_layers, "sweep", lambda dry: [other])
    given.clear()
    device_timing.tuning(Log(tmp_path, "tuning", 800), False, shard=4, shards=5)
    assert [how["quick"] for _, how in given] == [True]


def test_what_is_tuned_lies_among_the_results(tmp_path, monkeypatch):
    """For the steps after that, and to come back with them."""
    monkeypatch.chdir(tmp_path)
    for name, value in on_device._environment(Path("results"), False).items():
        monkeypatch.setenv(name, value)
    assert triton_tuned.RECORDS.file_of("NVIDIA H200").parent == tmp_path / "results"


@pytest.mark.sampled
@pytest.mark.parametrize("tile", [tile for tile in _tuning_gpu.DENSE_TILES if len(tile) == 6])
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
    for rows, columns, depth, warps, stages, *_ in _tuning_gpu.DENSE_TILES:
        shared = 2 * stages * depth * (rows + columns) + machine_code.RESERVED
        at_once = machine_code.SHARED_BYTES["h200"] // shared
        assert at_once * warps >= 8, (rows, columns, depth, warps, stages)


@pytest.mark.parametrize("T, walked", [(40, True), (400, False)])
def test_taps_that_see_padding_alone_are_not_tuned(T, walked):
    """Of 12 taps two see any of 40 steps: so few have one kernel for the whole backward pass."""
    x, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1, T, 8), (12, 1, 8)))
    geometry = dict(feature_group_count=8, kernel_dilation=30, precision="highest")
    (convolution,) = tuning._convolutions(x, w, geometry, print, "cuda")
    assert ("backward" in {trial.name for trial in _tuning_gpu._trials(convolution)}) is walked


def test_tune_needs_a_gpu_or_a_cpu(monkeypatch):
    monkeypatch.setattr(explanation, "default_platform", lambda: "tpu")
    x, w = jnp.ones((2, 8, 4)), jnp.ones((3, 4, 4))
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU or a CPU, and JAX runs on tpu"):
        tuning.tune(x, w)
