"""`tune`, with the timing of a chip that is not here."""

import dataclasses
import functools
import json
import math
import types
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import device_layers, device_timing, on_device
from benchmarks.on_device import Log
from conv_pallas import (
    _host,
    _measure,
    _tuning_gpu,
    aot,
    conv1d,
    dispatch,
    explain,
    explanation,
    tuning,
)
from conv_pallas.__main__ import main
from conv_pallas.nn import TCN

pytest.importorskip("jax_triton")

from conv_pallas import machine_code
from conv_pallas.kernels import records, triton_compat, triton_tuned, xla, xla_gpu, xla_tuned
from conv_pallas.spec import OPERATIONS
from tests.cases import Case

pytestmark = pytest.mark.aot

KEY = "conv_walk_backward 515x64x4 bfloat16 dilation 1"


@pytest.fixture
def h200(monkeypatch, tuned):
    """A machine with an H200, as far as `tune` looks; its clock is this dictionary."""
    seconds = {}

    def lowered(program, arguments):
        structs = jax.tree.map(lambda a: aot.struct(a.shape, a.dtype), arguments)
        return aot.lower_for("h200", _tuning_gpu._measure.several(program), *structs)

    monkeypatch.setattr(explanation, "default_platform", lambda: "cuda")
    monkeypatch.setattr(_host, "gpu", lambda: "NVIDIA H200")
    monkeypatch.setattr(_tuning_gpu, "_lowered", lowered)
    monkeypatch.setattr(_tuning_gpu, "_call", lambda lowered, arguments: lambda: jnp.zeros(()))
    monkeypatch.setattr(_tuning_gpu, "_held", lambda call: 0)
    monkeypatch.setattr(
        _tuning_gpu._measure, "interleaved",
        lambda calls, settings: {tile: (seconds.get(tile, 1.0),) for tile in calls},
    )  # fmt: skip
    monkeypatch.setattr(_tuning_gpu, "WALK_TILES", ((4, 64, 32, 4), (3, 64, 32, 4), (8, 64, 16, 4)))
    return seconds, tuned / "triton_tuned_nvidia-h200.json"


def _uncompiled(kernel, *args, out, **how):
    """In the place of `triton_compat.call`: what differs where that would, and takes no time."""
    told = zlib.crc32(repr(sorted((k, v) for k, v in how.items() if not callable(v))).encode())

    def triton():
        return jax.tree.map(lambda a: jnp.full(a.shape, told % 1000, a.dtype), out)

    return jax.jit(triton)()


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(triton_compat, "call", _uncompiled)


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
    _tune_dense()
    assert not any(json.loads(file.read_text())["tiles"].values())
    assert _chosen() == [chosen] * 3


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


# --- ours or XLA's --------------------------------------------------------------------------------

DENSE = (2, 512, 64), (4, 64, 64)


def _quiet(*args, **more):
    return tuning.tune(*args, **more, report=lambda line: None)


def _chosen(x=DENSE[0], w=DENSE[1], dtype=jnp.bfloat16, **geometry) -> list[str]:
    """Who runs each operation on that H200."""
    told = explain(aot.struct(x, dtype), aot.struct(w, dtype), platform="cuda", **geometry)
    return list(told.chosen.values())


def _tune_dense(**geometry):
    x, w = (aot.struct(shape, jnp.bfloat16) for shape in DENSE)
    return _quiet(x, w, **geometry)


@pytest.fixture
def one_tile(h200, uncompiled, monkeypatch):
    monkeypatch.setattr(_tuning_gpu, "DENSE_TILES", ((64, 64, 32, 4, 3),))
    return h200


@pytest.mark.parametrize("by", ["the heuristic", "a tile"])
def test_what_was_measured_to_be_faster_than_xla_is_the_default(one_tile, by):
    seconds, _ = one_tile
    seconds[None if by == "the heuristic" else (64, 64, 32, 4, 3)] = 0.5
    assert _chosen(kernel_dilation=4) == ["xla"] * 3
    _tune_dense(kernel_dilation=4)
    assert _chosen(kernel_dilation=4) == ["triton"] * 3
    layer = functools.partial(conv1d, kernel_dilation=4)
    loss = lambda x, w: layer(x, w).astype(jnp.float32).sum()  # noqa: E731
    x, w = (aot.struct(shape, jnp.bfloat16) for shape in DENSE)
    for name, f in {"forward": layer, "step": jax.grad(loss, argnums=(0, 1))}.items():
        assert "triton" in aot.lower_for("h200", f, x, w).as_text(), name
    told = str(explain(x, w, kernel_dilation=4, platform="cuda"))
    assert told.count("where strides allow); measured to take 0.50 of XLA's time") == 3
    # What was measured says nothing of others.
    assert _chosen(kernel_dilation=8) == ["xla"] * 3
    assert _chosen(kernel_dilation=4, padding=[(8, 1)]) == ["xla"] * 3
    assert _chosen(kernel_dilation=4, padding=[(7, 0)]) == ["xla"] * 3
    assert _chosen(kernel_dilation=4, precision="highest") == ["xla"] * 3
    assert _chosen(kernel_dilation=4, preferred_element_type="float32") == ["xla"] * 3
    assert _chosen(kernel_dilation=4, dtype=jnp.float16) == ["xla"] * 3
    assert _chosen(x=(2, 513, 64), kernel_dilation=4) == ["xla"] * 3
    assert _chosen(x=(3, 512, 64), kernel_dilation=4) == ["xla"] * 3
    # Time and batch count by powers of two, as they do for tiles.
    assert _chosen(x=(2, 500, 64), kernel_dilation=4) == ["triton"] * 3


def test_who_has_no_time_for_tiles_races_the_one_in_use(one_tile):
    seconds, _ = one_tile
    tile = (64, 64, 32, 4, 3)
    seconds |= {None: 0.5, tile: 0.25}
    lines = []
    x, w = (aot.struct(shape, jnp.bfloat16) for shape in DENSE)
    tune = functools.partial(tuning.tune, x, w, report=lines.append)
    assert tune(quick=True) == {} and not any(str(tile) in line for line in lines)
    assert _chosen() == ["triton"] * 3
    found = tune()
    assert set(found.values()) == {tile}
    lines.clear()
    assert tune(quick=True) == found and any(str(tile) in line for line in lines)


def test_another_device_knows_nothing_of_it(one_tile, monkeypatch):
    seconds, _ = one_tile
    seconds[None] = 0.5
    _tune_dense()
    monkeypatch.setattr(triton_compat, "device_kind", lambda: "NVIDIA B200")
    assert _chosen() == ["xla"] * 3
    monkeypatch.setattr(triton_compat, "device_kind", lambda: None)
    assert _chosen() == ["xla"] * 3


def _operations_in_triton(dtype="bfloat16", precision=None, out_dtype=None, **sizes) -> str:
    """Of the forward pass, the input gradient and the kernel gradient the first letters."""
    case = Case("layer", **dict(T=4096, K=3, D=4, batch=(8,), dtype=dtype) | sizes)
    case = dataclasses.replace(case, precision=precision, out_dtype=out_dtype)
    names = {"conv1d": "f", "conv1d_input_grad": "i", "conv1d_kernel_grad": "k"}
    return "".join(
        letter
        for operation, letter in names.items()
        if "triton" in dispatch.select(case.problem(operation, "cuda"), None).implementation
    )


@pytest.mark.parametrize("sizes, chosen", [
    (dict(C=512, O=512), "fik"),
    (dict(C=64, O=64, D=1024), "fik"),
    (dict(C=512, O=512, dtype="float32"), "fik"),
    (dict(C=600, O=600, T=512, dtype="float32"), "fik"),
    (dict(C=600, O=600, T=511, dtype="float32"), ""),
    (dict(C=512, O=512, dtype="float32", precision="highest"), ""),
    (dict(C=512, O=512, out_dtype="float32"), ""),
    (dict(C=512, O=512, K=1), ""),
    (dict(C=512, O=512, S=2, D=1), ""),
    (dict(C=512, O=512, G=2), ""),
    (dict(C=510, O=512), ""),
    (dict(C=24, O=64), ""),
    (dict(C=25, O=25), "fi"),
    (dict(C=10, O=32, K=8, dtype="float32"), "fi"),
    (dict(C=32, O=32), "fik"),
    (dict(C=25, O=25, T=2047), ""),
    (dict(C=25, O=25, K=9), ""),
    (dict(C=25, O=25, K=1), ""),
    (dict(C=25, O=25, G=5), ""),
    (dict(C=9, O=25), ""),
    (dict(C=64, O=2048), ""),
    (dict(C=32, O=32, T=1024), ""),
    (dict(C=2048, O=2048, G=2048), "fik"),
    (dict(C=2048, O=2048, G=2048, dtype="float32", K=31), "fik"),
    (dict(C=2048, O=4096, G=2048), ""),
    (dict(C=512, O=512, G=512), "fik"),
    (dict(C=512, O=512, G=512, T=1024), ""),
], ids=str)  # fmt: skip
def test_what_is_like_all_that_was_faster_is_the_default_of_that_device(sizes, chosen, h200):
    assert _operations_in_triton(**sizes) == chosen
    told = triton_tuned.described("so", Case("x", T=8, C=2, O=2).problem("conv1d", "cuda"))
    assert told == "so"


def test_an_h200s_tile_takes_part_on_an_h100(one_tile, monkeypatch):
    seconds, file = one_tile
    tile = (64, 64, 32, 4, 3)
    seconds[tile] = 0.5
    (key, *_) = _tune_dense()
    monkeypatch.setattr(_host, "gpu", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(_tuning_gpu, "DENSE_TILES", ())
    assert _tune_dense()[key] == tile
    seconds[tile] = 2.0
    assert _tune_dense() == {} and triton_tuned.lookup(key) is None
    monkeypatch.setattr(_host, "gpu", lambda: "NVIDIA H200")
    assert triton_tuned.lookup(key) == tile


def test_what_is_like_others_is_no_default_where_they_were_not_measured(h200, monkeypatch):
    for kind in ("NVIDIA B200", None):
        monkeypatch.setattr(triton_compat, "device_kind", lambda kind=kind: kind)
        assert _operations_in_triton(C=512, O=512) == ""


def test_an_h100_takes_an_h200s_word_until_it_has_its_own(h200, monkeypatch):
    _, file = h200
    case = Case("layer", T=128, C=16, O=16, K=3, D=4, batch=(8,), dtype="bfloat16")
    problem = case.problem("conv1d", "cuda")
    key, tile = triton_tuned.problem_key(problem), [64, 64, 32, 4, 3]

    def write(kind, tile, seconds):
        raced = {"seconds": seconds, "xla": 1.0, "key": "dense", "tile": tile}
        found = {"tiles": {"dense": tile}, "against_xla": {key: raced}}
        (file.parent / f"triton_tuned_nvidia-{kind}.json").write_text(json.dumps(found))
        records.forget()

    write("h200", tile, 0.5)
    for kind in ("NVIDIA B200", "NVIDIA A100-SXM4-80GB", None):
        monkeypatch.setattr(triton_compat, "device_kind", lambda kind=kind: kind)
        # As the interpreter's tests have it: of no kind, though it be of a capability.
        with pytest.MonkeyPatch.context() as patch:
            if kind is None:
                patch.setattr(triton_compat, "compute_capability", lambda: 90)
            assert triton_tuned.lookup("dense") is triton_tuned.priority(problem) is None
    monkeypatch.setattr(triton_compat, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    assert triton_tuned.lookup("dense") == tuple(tile)
    assert triton_tuned.priority(problem) == triton_tuned.PRIORITY
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_compat, "processors", lambda: 114)  # for PCIe
        assert triton_tuned.lookup("dense") is triton_tuned.priority(problem) is None
    told = triton_tuned.described("so", problem)
    assert told.endswith("0.50 of XLA's time on an NVIDIA H200, of as many multiprocessors")
    # What is like all that were ahead there, though it has no entry.
    assert _operations_in_triton(C=512, O=512) == "fik"
    like = Case("like", T=4096, C=512, O=512, K=3, D=4, batch=(8,), dtype="bfloat16")
    told = triton_tuned.described("so", like.problem("conv1d", "cuda"))
    assert told.endswith("ahead of XLA on an NVIDIA H200, of as many multiprocessors")

    write("h100-80gb-hbm3", None, 0.9)  # the heuristic's, whatever an H200's is
    assert triton_tuned.lookup("dense") is None
    assert triton_tuned.described("so", problem).endswith("0.90 of XLA's time on this device")
    # What failed there has its own word, though it is like what was ahead.
    own = file.parent / "triton_tuned_nvidia-h100-80gb-hbm3.json"
    failed = like.problem("conv1d", "cuda")
    own.write_text(json.dumps({"against_xla": {triton_tuned.problem_key(failed): None}}))
    records.forget()
    assert _operations_in_triton(C=512, O=512) == "ik"
    write("h100-80gb-hbm3", None, 2.0)
    assert triton_tuned.priority(problem) is None
    assert "2.00 of XLA's time on this device" in triton_tuned.by_name(problem)


@pytest.mark.parametrize("raced, chosen", [
    ({"seconds": 2.0, "xla": 1.0}, "ik"), ({"seconds": 1.0, "xla": 2.0}, "fik"), (None, "ik"),
])  # fmt: skip
def test_what_was_measured_itself_comes_before_what_is_like_it(raced, chosen, h200):
    _, file = h200
    problem = Case("layer", T=4096, C=512, O=512, K=3, D=4, batch=(8,), dtype="bfloat16").problem(
        "conv1d", "cuda"
    )
    raced = raced and raced | {"key": "conv_dense", "tile": None}
    found = {"tiles": {}, "against_xla": {triton_tuned.problem_key(problem): raced}}
    file.write_text(json.dumps(found))
    records.forget()
    assert _operations_in_triton(C=512, O=512) == chosen
    exported = dataclasses.replace(problem, operation="conv1d_input_grad", exported=True)
    assert triton_tuned.priority(exported) is None
    assert "of its kind" in triton_tuned.described(
        "so", dataclasses.replace(exported, exported=False)
    )


@pytest.fixture
def of_xla(one_tile, monkeypatch):
    """As `one_tile`, and XLA's time follows from the formulations that it is compiled of."""
    seconds, file = one_tile
    measured = []

    def interleaved(calls, settings):
        measured.append(list(calls))
        ahead = xla_tuned._trial
        if ahead is None:  # what the file says
            found = xla_tuned.RECORDS["cuda"].content(_host.gpu())["formulations"]
            ahead = {key: entry["formulation"] for key, entry in found.items()}
        xla = max((seconds.get(name, 1.0) for name in ahead.values()), default=1.0)
        return {name: (seconds.get(name, xla if name == "xla" else 1.0),) for name in calls}

    monkeypatch.setattr(_tuning_gpu._measure, "interleaved", interleaved)
    return seconds, file, measured


@pytest.fixture
def names_of(monkeypatch):
    """Which of XLA's formulations something was lowered with, by `xla_tuned.trial`."""
    lowered, names = _tuning_gpu._lowered, []

    def spy(program, arguments):
        made = lowered(program, arguments)
        names.append((made, list((xla_tuned._trial or {}).values())))
        return made

    monkeypatch.setattr(_tuning_gpu, "_lowered", spy)
    return lambda made: next(found for one, found in names if one is made)


D4 = dict(kernel_dilation=4)


def _hlo(**geometry):
    x, w = (aot.struct(shape, jnp.bfloat16) for shape in DENSE)
    layer = functools.partial(conv1d, **geometry, implementation="xla")
    return aot.lower_for("h200", layer, x, w).as_text()


def test_the_fastest_of_xlas_formulations_is_what_xla_runs(of_xla):
    seconds, file, measured = of_xla
    x, w = (aot.struct(shape, jnp.bfloat16) for shape in DENSE)
    assert _hlo(**D4).count("stablehlo.convolution") == 1
    seconds["matmuls"], seconds[None] = 0.5, 0.7
    lines = []
    found = tuning.tune(x, w, **D4, report=lines.append)
    assert list(found.values()) == ["matmuls"] * 3
    # Ours is faster than what the rules choose, but not than what is the fastest.
    assert ["symmetric", "barrier", "matmuls", "im2col"] in measured
    assert ["fold", "matmuls", "im2col"] in measured
    assert "forward: of XLA's matmuls, 2.00 times as fast as symmetric" in lines
    assert lines.count("forward: 1.43 times as fast as XLA") == 1
    assert lines.count("forward: 0.71 times as fast as XLA") == 1
    assert _chosen(**D4) == ["xla"] * 3
    hlo = _hlo(**D4)
    assert (hlo.count("stablehlo.convolution"), hlo.count("stablehlo.dot_general")) == (0, 4)
    told = str(explain(x, w, **D4, platform="cuda"))
    assert told.count("matmul for each tap; measured to take 0.50 of the time of") == 3
    assert "of the time of 'fold' on this GPU" in told
    # Nothing is said of others, nor elsewhere.
    assert _hlo(kernel_dilation=8).count("stablehlo.convolution") == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_host, "gpu", lambda: "NVIDIA B200")
        assert _hlo(**D4).count("stablehlo.convolution") == 1


def test_xlas_formulations_race_with_bias_and_activation_around_a_forward_pass(of_xla, monkeypatch):
    lowered, seen = _tuning_gpu._lowered, []

    def spy(program, arguments):
        made = lowered(program, arguments)
        seen.append(("stablehlo.maximum" in made.as_text(), dict(xla_tuned._trial or {})))
        return made

    monkeypatch.setattr(_tuning_gpu, "_lowered", spy)
    _tune_dense(**D4)
    around = {str(trial): with_relu for with_relu, trial in seen if trial}
    assert len(around) == 4 + 4 + 3
    for trial, with_relu in around.items():
        assert with_relu == trial.startswith("{'conv1d x"), trial
    # A bias that XLA knows to be zero would be none.
    convolution = tuning._convolutions(jnp.zeros(DENSE[0]), jnp.zeros(DENSE[1]), {}, print, "cuda")
    forward = next(_tuning_gpu._trials(*convolution))
    w = jax.random.normal(jax.random.key(0), DENSE[1])
    y = forward.around("xla")(jnp.zeros(DENSE[0]), w, None)
    np.testing.assert_array_equal(y, np.broadcast_to(jnp.maximum(w[0, 0], 0), y.shape))


def test_xlas_other_formulations_are_not_tried_in_vain(of_xla):
    """Not where ours is far ahead of the rules' choice, nor where there is one alone."""
    seconds, file, measured = of_xla
    seconds["matmuls"], seconds[None] = 0.4, 0.45
    assert _tune_dense(**D4) == {}
    assert not any("matmuls" in names for names in measured)
    assert _chosen(**D4) == ["triton"] * 3
    seconds[None] = 2.0
    x, w = aot.struct((2, 512, 64), jnp.bfloat16), aot.struct((4, 1, 64), jnp.bfloat16)
    _quiet(x, w, feature_group_count=64)
    assert not json.loads(file.read_text())["formulations"]


def test_what_the_rules_choose_is_raced_again_where_another_is_in_use(of_xla):
    """An update of JAX, say, made it slow."""
    seconds, file, measured = of_xla
    x, w = (aot.struct(shape, jnp.bfloat16) for shape in DENSE)
    seconds["matmuls"] = 0.5
    assert list(_tune_dense(**D4).values()) == ["matmuls"] * 3
    seconds["matmuls"], seconds[None] = 3.0, 0.9
    assert _tune_dense(**D4) == {}
    raced = json.loads(file.read_text())["against_xla"].values()
    assert {(entry["seconds"], entry["xla"]) for entry in raced} == {(0.9 / 8, 1 / 8)}
    assert _chosen(**D4) == ["triton"] * 3 and "dot_general" not in _hlo(**D4)
    # Where there is no time for more, it takes part before others.
    del seconds["matmuls"]
    seconds["im2col"], seconds[None] = 0.5, 1.0
    _tune_dense(**D4)
    measured.clear()
    (trial,) = [t for t in _trials_of(**D4) if t.name == "kernel gradient"]
    (problem,) = trial.problems()
    now, lines = iter([0, 0, *[100] * 100]), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tuning_gpu, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
        entry = _tuning_gpu._formulations(trial, problem, trial.arguments(), 50, lines.append)
    assert measured[0] == ["fold", "im2col"] and entry["formulation"] == "im2col"
    assert "kernel gradient: no time for 1 of XLA's 3 formulations" in lines


def _trials_of(**geometry):
    x, w = (aot.struct(shape, jnp.bfloat16) for shape in DENSE)
    (convolution,) = tuning._convolutions(x, w, geometry, print, "cuda")
    return list(_tuning_gpu._trials(convolution))


def test_the_winner_of_xlas_formulations_has_to_win_again(of_xla, monkeypatch):
    """Of many it may have been the luckiest."""
    seconds, file, measured = of_xla
    interleaved, again = _tuning_gpu._measure.interleaved, []

    def lucky(calls, settings):
        seconds["matmuls"] = 1.0 if settings is _tuning_gpu.AGAIN and "matmuls" in calls else 0.5
        again.append(seconds["matmuls"])
        return interleaved(calls, settings)

    monkeypatch.setattr(_tuning_gpu._measure, "interleaved", lucky)
    assert _tune_dense(**D4) == {} and 0.5 in again and 1.0 in again
    assert ["symmetric", "matmuls"] in measured


def test_one_slow_formulation_does_not_make_the_clock_count_for_the_others(one_tile, monkeypatch):
    clock = {"symmetric": 20e-6, "matmuls": 19e-6, "im2col": 50e-6, "barrier": 21e-6}
    device = {"symmetric": 10e-6, "matmuls": 16e-6, "barrier": 12e-6}
    monkeypatch.setattr(
        _tuning_gpu._measure, "interleaved",
        lambda calls, settings: {name: (8 * clock.get(name, 15e-6),) for name in calls},
    )  # fmt: skip
    monkeypatch.setattr(
        _tuning_gpu._trace, "device_seconds",
        lambda calls: {
            name: _measure.Spread.of([8 * device.get(name, 9e-6)])
            for name in calls
            if name != "im2col"  # which the clock has told
        },
    )  # fmt: skip
    forward = _trials_of(**D4)[0]
    (problem,) = forward.problems()
    lines = []
    entry = _tuning_gpu._formulations(forward, problem, forward.arguments(), math.inf, lines.append)
    assert entry["formulation"] is None and entry["seconds"] == pytest.approx(10e-6)
    assert "forward im2col: 50.0 us" in lines and "forward matmuls: 16.0 us" in lines


def test_what_holds_too_much_or_fails_by_itself_is_not_kept(of_xla, names_of, monkeypatch):
    seconds, file, _ = of_xla
    x, w = (aot.struct(shape, jnp.bfloat16) for shape in DENSE)
    seconds["matmuls"] = seconds["im2col"] = 0.5
    monkeypatch.setattr(_tuning_gpu, "_held", lambda call: call() == ["im2col"] and 3 << 30)
    monkeypatch.setattr(_measure, "difference_there", lambda a, b: 0.0)
    alone = []

    def call(lowered, arguments):
        names = names_of(lowered)
        if names == ["matmuls"] and "maximum" not in lowered.as_text():
            alone.append(names)
            if len(alone) == 1:  # the forward pass alone, as the race with ours has it
                raise RuntimeError("RESOURCE_EXHAUSTED: 90 GiB")
        return lambda: names

    monkeypatch.setattr(_tuning_gpu, "_call", call)
    lines = []
    found = tuning.tune(x, w, **D4, report=lines.append)
    assert "forward im2col: holds 3072 MiB" in lines
    assert list(found.values()) == ["matmuls"] * 2  # the gradients
    stored = json.loads(file.read_text())
    (forward,) = (v for k, v in stored["formulations"].items() if k.startswith("conv1d x"))
    assert forward["formulation"] is None and forward["rule"] == "symmetric"
    assert all(entry is not None for entry in stored["against_xla"].values())
    assert _hlo(**D4).count("stablehlo.convolution") == 1


def test_a_formulation_holds_for_what_was_measured_alone(of_xla):
    """Not for what is exported, is split by the partitioner or has another shape, or version."""
    seconds, file, _ = of_xla
    seconds["im2col"] = 0.5
    _tune_dense(**D4)
    case = Case("layer", batch=(2,), T=512, C=64, O=64, K=4, D=4, dtype="bfloat16")
    for operation in OPERATIONS:
        problem = case.problem(operation, "cuda")
        assert xla.choose(problem) == "im2col"
        default = dataclasses.replace(problem, precision=jax.lax.Precision.DEFAULT)
        assert xla.choose(default) == "im2col"
        for change in (
            dict(exported=True), dict(partitioned=True), dict(platform="rocm"), dict(N=8),
            dict(precision=jax.lax.Precision.HIGHEST),
        ):  # fmt: skip
            other = dataclasses.replace(problem, **change)
            assert xla.choose(other) == xla_gpu.choose(other) != "im2col", change
    file.write_text(file.read_text().replace('"im2col"', '"scatter"'))
    records.forget()
    rules = [xla.choose(case.problem(operation, "cuda")) for operation in OPERATIONS]
    assert rules == ["symmetric", "symmetric", "fold"]


@pytest.mark.parametrize("sizes, forward, kernel_gradient", [
    (dict(D=4), ["barrier", "symmetric", "matmuls", "im2col"], ["fold", "matmuls", "im2col"]),
    ({}, ["native", "barrier", "symmetric", "matmuls", "im2col"],
     ["native", "matmuls", "im2col"]),
    (dict(D=4, padding="SAME"), ["native", "matmuls", "im2col"], ["fold", "matmuls", "im2col"]),
    (dict(K=9, D=4), ["barrier", "symmetric"], ["fold"]),
    (dict(S=2, D=2), ["barrier", "symmetric", "matmuls", "im2col"], ["matmuls", "im2col"]),
    (dict(E=2, padding=[(2, 1)]), ["native", "barrier"], ["native", "matmuls", "im2col"]),
    (dict(G=32, K=3), ["shifts"], ["shifts"]),
], ids=str)  # fmt: skip
def test_what_may_be_the_fastest_on_a_gpu(sizes, forward, kernel_gradient):
    case = Case("layer", **dict(T=40, C=32, O=32) | sizes)
    for operation, expected in (("conv1d", forward), ("conv1d_kernel_grad", kernel_gradient)):
        problem = case.problem(operation, "cuda")
        found = xla_gpu.candidates(problem)
        assert found[0] == xla_gpu.choose(problem) and sorted(found) == sorted(expected)


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA B200"])
def test_a_folder_of_ones_own_where_none_is_shipped(kind, of_xla, tmp_path, monkeypatch):
    """As `benchmarks.on_device` has it."""
    seconds, file, _ = of_xla
    monkeypatch.setattr(_host, "gpu", lambda: kind)
    monkeypatch.setenv(records.ENVIRONMENT_VARIABLE, str(tmp_path / "own"))
    seconds["matmuls"] = 0.5
    lines = []
    x, w = (aot.struct(shape, jnp.bfloat16) for shape in DENSE)
    assert list(tuning.tune(x, w, **D4, report=lines.append).values()) == ["matmuls"] * 3
    assert not any("Error" in line for line in lines) and not file.exists()
    assert _hlo(**D4).count("stablehlo.dot_general") == 4


def test_what_is_the_same_program_is_raced_once(of_xla):
    """Of one tap a matmul for each is that of all side by side."""
    _, _, measured = of_xla
    x, w = aot.struct((2, 512, 64), jnp.bfloat16), aot.struct((1, 64, 64), jnp.bfloat16)
    _quiet(x, w)
    raced = [names for names in measured if "matmuls" in names]
    assert raced[:2] == [["matmuls", "native"]] * 2  # of a kernel gradient they differ


def test_xlas_rules_stand_where_none_is_clearly_faster(of_xla):
    seconds, file, _ = of_xla
    before = _hlo(**D4)
    seconds["matmuls"] = 0.99
    assert _tune_dense(**D4) == {}
    entries = json.loads(file.read_text())["formulations"]
    assert [entry["formulation"] for entry in entries.values()] == [None] * 3
    assert _hlo(**D4) == before
    x, w = (aot.struct(shape, jnp.bfloat16) for shape in DENSE)
    assert str(explain(x, w, **D4, platform="cuda")).count("clearly faster on this GPU") == 3


def test_a_formulation_that_fails_or_is_wrong_takes_no_part(of_xla, names_of, monkeypatch):
    seconds, _, measured = of_xla
    seconds["matmuls"] = seconds["barrier"] = 0.5

    def fails(lowered, arguments):
        names = names_of(lowered)
        if names == ["matmuls"]:
            raise RuntimeError("RESOURCE_EXHAUSTED: 90 GiB")
        return lambda: names[-1:]

    def differs(expected, actual):
        return 0.5 if actual == ["barrier"] else 0.0

    monkeypatch.setattr(_tuning_gpu, "_call", fails)
    monkeypatch.setattr(_measure, "difference_there", differs)
    x, w = (aot.struct(shape, jnp.bfloat16) for shape in DENSE)
    lines = []
    assert tuning.tune(x, w, **D4, report=lines.append) == {}
    assert "forward matmuls: RuntimeError: RESOURCE_EXHAUSTED: 90 GiB" in lines
    assert "forward barrier: is off by 0.5 of the largest element" in lines
    assert ["symmetric", "im2col"] in measured


@pytest.mark.parametrize("gone", [False, True])
def test_without_the_rules_formulation_nothing_is_raced(gone, of_xla, names_of, monkeypatch):
    seconds, file, measured = of_xla

    def call(lowered, arguments):
        if names_of(lowered) in (["symmetric"], ["fold"]):
            raise RuntimeError("RESOURCE_EXHAUSTED: 90 GiB")
        return lambda: jnp.zeros(())

    monkeypatch.setattr(_tuning_gpu, "_call", call)
    if gone:  # the device answers no more

        def ask(e):
            raise ConnectionError("gone")

        monkeypatch.setattr(_tuning_gpu, "_ask_device", ask)
        with pytest.raises(ConnectionError, match="gone"):
            _tune_dense(**D4)
        return
    assert _tune_dense(**D4) == {}
    assert not any("matmuls" in names for names in measured)
    stored = json.loads(file.read_text())
    assert not stored["formulations"] and all(stored["against_xla"].values())


@pytest.mark.parametrize("theirs", [1.0, 0.4])
def test_what_is_hardly_faster_than_xla_is_not_the_default(one_tile, theirs):
    seconds, _ = one_tile
    seconds[None], seconds["xla"] = 0.99, theirs
    x, w = (aot.struct(shape, jnp.bfloat16) for shape in DENSE)
    told = lambda: str(explain(x, w, platform="cuda"))  # noqa: E731
    assert "has not compared it with XLA" in told()
    _tune_dense()
    assert _chosen() == ["xla"] * 3
    assert f"by name only: measured to take {0.99 / theirs:.2f} of XLA's time" in told()
    assert "has not compared it with XLA" not in told()


def test_each_operation_has_a_default_of_its_own(one_tile, monkeypatch):
    """The kernel gradient alone is faster: it alone is ours."""
    turns = iter([1.0, 1.0, 0.5])
    monkeypatch.setattr(
        _tuning_gpu._measure, "interleaved",
        lambda calls, settings: dict.fromkeys(calls, (1.0,))
        | ({None: (next(turns),)} if settings is _tuning_gpu.LAST and "xla" in calls else {}),
    )  # fmt: skip
    _tune_dense()
    assert _chosen() == ["xla", "xla", "triton"]


def test_who_disagrees_with_xla_is_not_the_default(one_tile, monkeypatch):
    seconds, _ = one_tile
    seconds[None] = 0.5
    _tune_dense()
    assert _chosen() == ["triton"] * 3
    monkeypatch.setattr(_tuning_gpu._measure, "difference_there", lambda a, b: 0.04)
    lines = []
    x, w = (aot.struct(shape, jnp.bfloat16) for shape in DENSE)
    assert tuning.tune(x, w, report=lines.append) == {}
    assert "forward: XLA's result and ours are 0.04 of the largest element apart" in lines
    assert _chosen() == ["xla"] * 3


def test_a_tile_that_is_beaten_is_forgotten(one_tile, monkeypatch):
    seconds, _ = one_tile
    tile = (64, 64, 32, 4, 3)
    seconds[tile] = 0.5
    assert set(_tune_dense().values()) == {tile}
    # It takes part without being among those that are tried.
    monkeypatch.setattr(_tuning_gpu, "DENSE_TILES", ((32, 32, 32, 4, 3),))
    assert set(_tune_dense().values()) == {tile}
    seconds[tile] = 1.0
    assert _tune_dense() == {}
    assert set(triton_tuned.RECORDS.content("NVIDIA H200")["tiles"].values()) == {None}


def test_a_model_is_tuned_and_then_runs_ours(one_tile):
    """Those of equal tiles are tuned once, and each dilation compared with XLA."""
    seconds, file = one_tile
    tile = (64, 64, 32, 4, 3)
    seconds[tile] = 0.5
    model = TCN(64, [64] * 2, 64, kernel_size=3, dropout=0.1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x, mask = aot.struct((2, 512, 64), jnp.bfloat16), aot.struct((2, 512), bool)
    lines = []
    found = tuning.tune(model, x, mask=mask, report=lines.append)
    assert set(found.values()) == {tile}
    told = explain(model, x, platform="cuda")
    assert len(told.convolutions) >= 2
    for one in told.convolutions.values():
        assert list(one.chosen.values()) == ["triton"] * 3, told
    compared = json.loads(file.read_text())["against_xla"]
    assert all(any(f" dilation {D}" in key for key in compared) for D in (1, 2))
    tried = [line for line in lines if line.startswith(f"forward {tile}:")]
    keys = {key for key in found if key.startswith("conv_dense ")}
    races = len(compared) // 3  # in which it takes part as well
    assert 2 == len(keys) < races == len(tried) - 2 * len(keys)


def test_what_the_kernels_cannot_run_is_told_and_left_out(one_tile):
    seconds, _ = one_tile
    seconds[None] = 0.5

    unknown = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3

    def two(x):
        w = jnp.ones(DENSE[1], jnp.bfloat16)
        return conv1d(x, w), conv1d(x.astype(jnp.float32), w, precision=unknown)

    lines = []
    tuning.tune(two, aot.struct(DENSE[0], jnp.bfloat16), report=lines.append)
    assert any("knows the precisions DEFAULT, HIGH and HIGHEST" in line for line in lines), lines
    assert _chosen() == ["triton"] * 3
    with pytest.raises(NotImplementedError, match="'triton' can't run conv1d"):
        _quiet(*(aot.struct(shape, jnp.float32) for shape in DENSE), precision=unknown)
    for model in (two, nnx.Sequential(two)):  # which would leave it out in silence
        with pytest.raises(TypeError, match="strides= is for arrays"):
            _quiet(model, aot.struct(DENSE[0], jnp.bfloat16), strides=2)


def test_a_kernel_that_fails_costs_the_others_nothing(one_tile, monkeypatch):
    seconds, _ = one_tile
    seconds[None] = 0.5
    trials = _tuning_gpu._trials

    def broken(convolution):
        def fails(implementation):
            raise ZeroDivisionError("broken")

        first, *rest = trials(convolution)
        return [dataclasses.replace(first, function=fails), *rest]

    _tune_dense()
    assert _chosen() == ["triton"] * 3
    monkeypatch.setattr(_tuning_gpu, "_trials", broken)
    with pytest.raises(RuntimeError, match=r"forward of x .* can't be measured: Zero.*: broken"):
        _tune_dense()
    assert _chosen() == ["xla", "triton", "triton"]


@pytest.mark.parametrize("at", [2, 3])  # of the heuristic, a tile and XLA
def test_a_device_that_no_longer_answers_changes_nothing_that_is_known(at, one_tile, monkeypatch):
    seconds, file = one_tile
    seconds[None] = 0.5
    _tune_dense()
    known, call, calls = file.read_text(), _tuning_gpu._call, []

    def fails(lowered, arguments):
        calls.append(lowered)
        if len(calls) == at:
            monkeypatch.setattr(jax, "block_until_ready", gone)
            gone()
        return call(lowered, arguments)

    def gone(*args):
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(_tuning_gpu, "_call", fails)
    lines = []
    x, w = (aot.struct(shape, jnp.bfloat16) for shape in DENSE)
    with pytest.raises(RuntimeError, match=r"^CUDA_ERROR_ILLEGAL_ADDRESS$"):
        tuning.tune(x, w, report=lines.append)
    assert file.read_text() == known and _chosen() == ["triton"] * 3
    assert not any("ILLEGAL" in line or "gradient" in line for line in lines)  # nothing follows


def test_ours_failing_is_no_word_about_xla(one_tile, monkeypatch):
    """Nor where the tile was found before, and nothing has run yet."""
    call, calls = _tuning_gpu._call, []

    def broken():
        raise ZeroDivisionError("broken")

    def fails(lowered, arguments):
        if "triton" not in lowered.as_text():
            return call(lowered, arguments)
        calls.append(lowered)  # of the first dilation a heuristic and a tile, three times
        return broken if len(calls) > 6 else call(lowered, arguments)

    w = jnp.zeros(DENSE[1], jnp.bfloat16)
    both = lambda x: [conv1d(x, w, kernel_dilation=D) for D in (1, 2)]  # noqa: E731
    monkeypatch.setattr(_tuning_gpu, "_call", fails)
    lines = []
    with pytest.raises(RuntimeError, match=r"dilation=2.* and 2 more: ZeroDivisionError: broken"):
        tuning.tune(both, aot.struct(DENSE[0], jnp.bfloat16), report=lines.append)
    assert not any("xla: Zero" in line for line in lines)


def test_where_xla_fails_the_tile_is_kept(one_tile, monkeypatch):
    seconds, _ = one_tile
    tile, lowered = (64, 64, 32, 4, 3), _tuning_gpu._lowered
    seconds[tile] = 0.5

    def fails(program, arguments):
        made = lowered(program, arguments)
        if "convolution" in made.as_text():
            raise MemoryError("RESOURCE_EXHAUSTED")
        return made

    monkeypatch.setattr(_tuning_gpu, "_lowered", fails)
    lines = []
    x, w = (aot.struct(shape, jnp.bfloat16) for shape in DENSE)
    assert set(tuning.tune(x, w, report=lines.append).values()) == {tile}
    assert "forward xla: MemoryError: RESOURCE_EXHAUSTED" in lines
    assert _chosen() == ["xla"] * 3
    assert {tile} == {
        tuple(t) for t in triton_tuned.RECORDS.content("NVIDIA H200")["tiles"].values()
    }


def test_a_folder_of_ones_own(one_tile, monkeypatch, tmp_path):
    """Where the package can't be written to; what the package knows stays known."""
    seconds, shipped = one_tile
    seconds[None] = 0.5
    _tune_dense()
    monkeypatch.setenv(records.ENVIRONMENT_VARIABLE, str(tmp_path / "own"))
    records.forget()
    before = shipped.read_text()
    _tune_dense(kernel_dilation=2)
    assert shipped.read_text() == before
    assert _chosen() == _chosen(kernel_dilation=2) == ["triton"] * 3
    seconds[None] = 2.0
    _tune_dense()  # its own word is the last
    assert _chosen() == ["xla"] * 3


# --- what is compared -----------------------------------------------------------------------------


def test_the_backward_pass_of_a_walk_is_compared_gradient_by_gradient(h200, uncompiled):
    """With an activation XLA would compute again what the forward pass keeps in training."""
    seconds, file = h200
    seconds[None] = 0.5
    x, w = aot.struct((2, 512, 64), jnp.bfloat16), aot.struct((4, 1, 64), jnp.bfloat16)
    lines = []
    tuning.tune(x, w, feature_group_count=64, report=lines.append)
    assert any(line.startswith("backward (4, 64, 32, 4): ") for line in lines)
    assert not any(line.startswith("backward xla") for line in lines)
    raced = json.loads(file.read_text())["against_xla"]
    assert [key.split()[0] for key in sorted(raced)] == sorted(OPERATIONS)
    assert _chosen(x.shape, w.shape, feature_group_count=64) == ["triton"] * 3


def test_a_default_goes_with_the_tile_that_it_had(one_tile):
    """Another dilation has the same tile, and may want another."""
    seconds, _ = one_tile
    tile = (64, 64, 32, 4, 3)
    seconds[tile] = 0.5
    _tune_dense(kernel_dilation=4)
    assert _chosen(kernel_dilation=4) == ["triton"] * 3
    seconds[tile] = seconds["xla"] = 1.0
    _tune_dense(kernel_dilation=8)
    assert _chosen(kernel_dilation=4) == ["xla"] * 3


OTHERS = (
    (((2, 512, 64), (3, 64, 32)), {}),
    (((2, 512, 64), (5, 64, 64)), dict(padding=[(2, 0)])),
    (((2, 512, 32), (3, 32, 64)), {}),
    (((2, 512, 64), (3, 32, 64)), dict(feature_group_count=2)),
    (((2, 512, 64), (3, 64, 64)), dict(strides=2)),
    (((2, 512, 64), (3, 64, 64)), dict(input_dilation=2, padding=[(2, 0)])),
)


def test_each_size_has_a_key_of_its_own(one_tile):
    """Nor does what was tuned since, one after the other, tell anything of those that follow."""
    seconds, _ = one_tile
    seconds[None] = 0.5
    _tune_dense()
    assert _chosen() == _chosen(precision="default") == ["triton"] * 3
    for sizes, options in OTHERS:
        assert _chosen(*sizes, **options) == ["xla"] * 3, (sizes, options)
        _quiet(*(aot.struct(shape, jnp.bfloat16) for shape in sizes), **options)
        assert _chosen(*sizes, **options) == ["triton"] * 3, (sizes, options)


def test_what_is_exported_runs_in_xla(h200, monkeypatch):
    """JAX keeps no promise for what else an executable calls, and refuses to write it."""
    seconds, _ = h200
    monkeypatch.setattr(_tuning_gpu, "DENSE_TILES", ())
    seconds[None] = 0.5
    _tune_dense()
    x, w = (aot.struct(shape, jnp.bfloat16) for shape in DENSE)
    assert jax.export.export(jax.jit(conv1d), platforms=["cuda"])(x, w).serialize()
    named = jax.jit(functools.partial(conv1d, implementation="triton"))
    with pytest.raises(ValueError, match="no compatibility guarantees"):
        jax.export.export(named, platforms=["cuda"])(x, w).serialize()


def test_kernels_that_vmap_batches_are_tuned_as_they_run(one_tile):
    seconds, _ = one_tile
    seconds[None] = 0.5
    batched = jax.vmap(lambda x, w: conv1d(x, w))
    w = jnp.zeros((4, 3, 16, 16), jnp.bfloat16)
    x = aot.struct((4, 2, 512, 16), jnp.bfloat16)
    layer = lambda x: batched(x, w)  # noqa: E731
    # A function of its own, or JAX would take what it lowered before.
    lowered = lambda: aot.lower_for("h200", lambda x: layer(x), x).as_text()  # noqa: E731
    assert "triton" not in lowered()
    assert "4 kernels at once" in str(explain(layer, x, platform="cuda"))
    lines = []
    tuning.tune(layer, x, report=lines.append)
    assert lines[0] == "x (2, 512, 64), kernel (3, 16, 64), bfloat16, feature_group_count=4:"
    assert "triton" in lowered()
    (told,) = explain(layer, x, platform="cuda").convolutions.values()
    assert list(told.chosen.values()) == ["triton"] * 3


def test_what_there_is_nothing_to_tune_of_is_told(one_tile):
    def told(function):
        lines = []
        assert tuning.tune(function, aot.struct(DENSE[0], jnp.bfloat16), report=lines.append) == {}
        assert lines[-1] == "there is nothing to tune"
        return lines[0]

    w = jnp.zeros(DENSE[1], jnp.bfloat16)
    stock = functools.partial(conv1d, kernel=w, implementation="xla_native")
    assert told(lambda x: stock(x)) == "1 left to jax.lax.conv_general_dilated, as stock layers are"
    ordered = functools.partial(conv1d, kernel=w, implementation="xla")
    assert told(lambda x: ordered(x)).endswith("is to run as xla")


def test_how_the_batch_is_shaped_makes_no_other(one_tile):
    w = jnp.zeros(DENSE[1], jnp.bfloat16)
    lines = []
    both = lambda x: (conv1d(x, w), conv1d(x.reshape(1, *x.shape), w))  # noqa: E731
    tuning.tune(both, aot.struct(DENSE[0], jnp.bfloat16), report=lines.append)
    assert sum(line.startswith("forward xla: ") for line in lines) == 1


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", '{"tiles": {"a": 1}}', '{"tiles": {"a": ["b"]}}', '{"against_xla": {"a": {}}}',
        '{"formulations": {"a": {}}}',
    ],
)  # fmt: skip
def test_a_file_that_is_none_of_ours_is_named(one_tile, text):
    _, file = one_tile
    file.write_text(text)
    message = f"{file.name} is not what .*tune writes: delete it"
    with pytest.raises(ValueError, match=message):
        _chosen()
    with pytest.raises(ValueError, match=message):
        _tune_dense()
    x, w = (aot.struct(shape, jnp.bfloat16) for shape in DENSE)
    f = functools.partial(conv1d, implementation="xla_native")  # which asks nobody
    assert aot.lower_for("h200", f, x, w)


def test_what_another_process_writes_meanwhile_stays(one_tile, monkeypatch):
    _, file = one_tile

    def measured(calls, settings):
        triton_tuned.RECORDS.add(file, "NVIDIA H200", {"tiles": {"theirs": (1, 2)}})
        return dict.fromkeys(calls, (1.0,))

    monkeypatch.setattr(_tuning_gpu._measure, "interleaved", measured)
    _tune_dense()
    stored = json.loads(file.read_text())
    assert stored["tiles"]["theirs"] == [1, 2] and len(stored["tiles"]) == 4
    assert [found.name for found in file.parent.iterdir()] == [file.name]  # nothing is left over


def test_a_folder_of_ones_own_has_the_last_word(one_tile, monkeypatch, tmp_path):
    seconds, shipped = one_tile
    tile = (64, 64, 32, 4, 3)
    seconds[tile] = 0.5
    _tune_dense()
    assert _chosen() == ["triton"] * 3
    monkeypatch.setenv(records.ENVIRONMENT_VARIABLE, str(tmp_path / "own"))
    records.forget()
    seconds[tile], seconds["xla"] = 1.0, 0.5
    assert _tune_dense() == {}
    assert _chosen() == ["xla"] * 3
    assert set(triton_tuned.RECORDS.content("NVIDIA H200")["tiles"].values()) == {None}
    assert {tile} == set(map(tuple, json.loads(shipped.read_text())["tiles"].values()))


# --- the command ----------------------------------------------------------------------------------


def _command(*words):
    return main(["tune", "dtype=bfloat16", *words])


def test_the_command_tunes_a_layer(one_tile, capsys):
    seconds, _ = one_tile
    seconds[None] = 0.5
    assert _command("N=2", "T=512", "C=64", "K=4", "--seconds", "600") == 0
    told = capsys.readouterr().out
    assert "forward: 2.00 times as fast as XLA" in told and "(64, 64, 32, 4, 3)" in told
    assert _chosen() == ["triton"] * 3
    assert _command("N=2", "T=512", "C=64", "K=4", "--quick") == 0
    assert "(64, 64, 32, 4, 3)" not in capsys.readouterr().out


def test_the_command_says_what_is_wrong(one_tile, capsys, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv(records.ENVIRONMENT_VARIABLE, str(file / "folder"))
    assert _command("N=2", "T=512", "C=64", "K=3") == 1
    assert "a folder that can be written to in CONV_PALLAS_TUNED" in capsys.readouterr().err
    assert _command("N=2", "T=0", "C=64", "K=3") == 1
    monkeypatch.setattr(explanation, "default_platform", lambda: "tpu")
    assert _command("N=2", "T=512", "C=64", "K=3") == 1
    assert "tune needs an NVIDIA GPU or a CPU" in capsys.readouterr().err
