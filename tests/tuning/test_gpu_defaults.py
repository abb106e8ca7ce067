"""Which implementation is the default on a GPU that `tune` has measured, and on one like it."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from conv_pallas import (
    _host,
    _tuning_gpu,
    aot,
    conv1d,
    dispatch,
    explain,
    tuning,
)
from conv_pallas.nn import TCN

pytest.importorskip("jax_triton")

from conv_pallas.kernels import records, triton_compat, triton_tuned
from conv_pallas.spec import OPERATIONS
from tests.cases import Case
from tests.tuning.gpu import DENSE, structs, tune_dense, tune_quietly, who_runs

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("shipped")]


@pytest.mark.parametrize("by", ["the heuristic", "a tile"])
def test_what_was_measured_to_be_faster_than_xla_is_the_default(one_tile, by):
    seconds, _ = one_tile
    seconds[None if by == "the heuristic" else (64, 64, 32, 4, 3)] = 0.5
    assert who_runs(kernel_dilation=4) == ["xla"] * 3
    tune_dense(kernel_dilation=4)
    assert who_runs(kernel_dilation=4) == ["triton"] * 3
    layer = functools.partial(conv1d, kernel_dilation=4)
    loss = lambda x, w: layer(x, w).astype(jnp.float32).sum()  # noqa: E731
    x, w = structs()
    for name, f in {"forward": layer, "step": jax.grad(loss, argnums=(0, 1))}.items():
        assert "triton" in aot.lower_for("h200", f, x, w).as_text(), name
    told = str(explain(x, w, kernel_dilation=4, platform="cuda"))
    assert told.count("where strides allow); measured to take 0.50 of XLA's time") == 3
    # What was measured says nothing of others.
    assert who_runs(kernel_dilation=8) == ["xla"] * 3
    assert who_runs(kernel_dilation=4, padding=[(8, 1)]) == ["xla"] * 3
    assert who_runs(kernel_dilation=4, padding=[(7, 0)]) == ["xla"] * 3
    assert who_runs(kernel_dilation=4, precision="highest") == ["xla"] * 3
    assert who_runs(kernel_dilation=4, preferred_element_type="float32") == ["xla"] * 3
    assert who_runs(kernel_dilation=4, dtype=jnp.float16) == ["xla"] * 3
    assert who_runs(x=(2, 513, 64), kernel_dilation=4) == ["xla"] * 3
    assert who_runs(x=(3, 512, 64), kernel_dilation=4) == ["xla"] * 3
    # Time and batch count by powers of two, as they do for tiles.
    assert who_runs(x=(2, 500, 64), kernel_dilation=4) == ["triton"] * 3


def test_who_has_no_time_for_tiles_races_the_one_in_use(one_tile):
    seconds, _ = one_tile
    tile = (64, 64, 32, 4, 3)
    seconds |= {None: 0.5, tile: 0.25}
    lines = []
    x, w = structs()
    tune = functools.partial(tuning.tune, x, w, report=lines.append)
    assert tune(quick=True) == {} and not any(str(tile) in line for line in lines)
    assert who_runs() == ["triton"] * 3
    found = tune()
    assert set(found.values()) == {tile}
    lines.clear()
    assert tune(quick=True) == found and any(str(tile) in line for line in lines)


def test_another_device_knows_nothing_of_it(one_tile, monkeypatch):
    seconds, _ = one_tile
    seconds[None] = 0.5
    tune_dense()
    monkeypatch.setattr(triton_compat, "device_kind", lambda: "NVIDIA B200")
    assert who_runs() == ["xla"] * 3
    monkeypatch.setattr(triton_compat, "device_kind", lambda: None)
    assert who_runs() == ["xla"] * 3


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
    (dict(C=64, O=64, T=256, batch=(64,)), "fik"),
    (dict(C=64, O=64, T=255, batch=(64,)), ""),  # as many steps, of which each sample has few
    (dict(C=25, O=25, T=255, batch=(128,)), ""),
    (dict(C=2048, O=2048, G=2048), "fik"),
    (dict(C=2048, O=2048, G=2048, dtype="float32", K=31), "fik"),
    (dict(C=2048, O=2048, G=2048, K=1), ""),
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
    (key, *_) = tune_dense()
    monkeypatch.setattr(_host, "gpu", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(_tuning_gpu, "DENSE_TILES", ())
    assert tune_dense()[key] == tile
    seconds[tile] = 2.0
    assert tune_dense() == {} and triton_tuned.lookup(key) is None
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

    def write(kind, tile, seconds, **versions):
        raced = {"seconds": seconds, "xla": 1.0, "key": "dense", "tile": tile, **versions}
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
    write("h100-80gb-hbm3", None, 0.9, jax="0.9.7")
    told = triton_tuned.described("so", problem)
    assert told.endswith("0.90 of XLA's time on this device, with JAX 0.9.7")
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


@pytest.mark.parametrize("theirs", [1.0, 0.4])
def test_what_is_hardly_faster_than_xla_is_not_the_default(one_tile, theirs):
    seconds, _ = one_tile
    seconds[None], seconds["xla"] = 0.99, theirs
    x, w = structs()
    told = lambda: str(explain(x, w, platform="cuda"))  # noqa: E731
    assert "has not compared it with XLA" in told()
    tune_dense()
    assert who_runs() == ["xla"] * 3
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
    tune_dense()
    assert who_runs() == ["xla", "xla", "triton"]


def test_who_disagrees_with_xla_is_not_the_default(one_tile, monkeypatch):
    seconds, _ = one_tile
    seconds[None] = 0.5
    tune_dense()
    assert who_runs() == ["triton"] * 3
    monkeypatch.setattr(_tuning_gpu._measure, "difference_there", lambda a, b: 0.04)
    lines = []
    x, w = structs()
    assert tuning.tune(x, w, report=lines.append) == {}
    assert "forward: XLA's result and ours are 0.04 of the largest element apart" in lines
    assert who_runs() == ["xla"] * 3


def test_a_tile_that_is_beaten_is_forgotten(one_tile, monkeypatch):
    seconds, _ = one_tile
    tile = (64, 64, 32, 4, 3)
    seconds[tile] = 0.5
    assert set(tune_dense().values()) == {tile}
    # It takes part without being among those that are tried.
    monkeypatch.setattr(_tuning_gpu, "DENSE_TILES", ((32, 32, 32, 4, 3),))
    assert set(tune_dense().values()) == {tile}
    seconds[tile] = 1.0
    assert tune_dense() == {}
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
    assert who_runs() == ["triton"] * 3
    with pytest.raises(NotImplementedError, match="'triton' can't run conv1d"):
        tune_quietly(*structs(dtype=jnp.float32), precision=unknown)
    for model in (two, nnx.Sequential(two)):  # which would leave it out in silence
        with pytest.raises(TypeError, match="strides= is for arrays"):
            tune_quietly(model, aot.struct(DENSE[0], jnp.bfloat16), strides=2)


def test_a_kernel_that_fails_costs_the_others_nothing(one_tile, monkeypatch):
    seconds, _ = one_tile
    seconds[None] = 0.5
    trials = _tuning_gpu._trials

    def broken(convolution):
        def fails(implementation):
            raise ZeroDivisionError("broken")

        first, *rest = trials(convolution)
        return [dataclasses.replace(first, function=fails), *rest]

    tune_dense()
    assert who_runs() == ["triton"] * 3
    monkeypatch.setattr(_tuning_gpu, "_trials", broken)
    with pytest.raises(RuntimeError, match=r"forward of x .* can't be measured: Zero.*: broken"):
        tune_dense()
    assert who_runs() == ["xla", "triton", "triton"]


@pytest.mark.parametrize("at", [2, 3])  # of the heuristic, a tile and XLA
def test_a_device_that_no_longer_answers_changes_nothing_that_is_known(at, one_tile, monkeypatch):
    seconds, file = one_tile
    seconds[None] = 0.5
    tune_dense()
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
    x, w = structs()
    with pytest.raises(RuntimeError, match=r"^CUDA_ERROR_ILLEGAL_ADDRESS$"):
        tuning.tune(x, w, report=lines.append)
    assert file.read_text() == known and who_runs() == ["triton"] * 3
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
    x, w = structs()
    assert set(tuning.tune(x, w, report=lines.append).values()) == {tile}
    assert "forward xla: MemoryError: RESOURCE_EXHAUSTED" in lines
    assert who_runs() == ["xla"] * 3
    found = triton_tuned.RECORDS.content("NVIDIA H200")
    assert {tile} == {tuple(t) for t in found["tiles"].values()}
    assert not found["against_xla"]  # who is faster nobody knows


def test_where_the_comparison_fails_the_tile_is_kept(one_tile, monkeypatch):
    seconds, _ = one_tile
    tile = (64, 64, 32, 4, 3)
    seconds[tile] = 0.5
    monkeypatch.setattr(_tuning_gpu, "_against_xla", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        tuning.tune(*structs(), report=lambda line: None)
    found = triton_tuned.RECORDS.content("NVIDIA H200")
    assert {tile} == {tuple(t) for t in found["tiles"].values()}
    assert set(found["against_xla"].values()) == {None}


def test_a_folder_of_ones_own(one_tile, monkeypatch, tmp_path):
    """Where the package can't be written to; what the package knows stays known."""
    seconds, shipped = one_tile
    seconds[None] = 0.5
    tune_dense()
    monkeypatch.setenv(records.ENVIRONMENT_VARIABLE, str(tmp_path / "own"))
    records.forget()
    before = shipped.read_text()
    tune_dense(kernel_dilation=2)
    assert shipped.read_text() == before
    assert who_runs() == who_runs(kernel_dilation=2) == ["triton"] * 3
    seconds[None] = 2.0
    tune_dense()  # its own word is the last
    assert who_runs() == ["xla"] * 3


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
    assert who_runs(x.shape, w.shape, feature_group_count=64) == ["triton"] * 3


def test_a_default_goes_with_the_tile_that_it_had(one_tile):
    """Another dilation has the same tile, and may want another."""
    seconds, _ = one_tile
    tile = (64, 64, 32, 4, 3)
    seconds[tile] = 0.5
    tune_dense(kernel_dilation=4)
    assert who_runs(kernel_dilation=4) == ["triton"] * 3
    seconds[tile] = seconds["xla"] = 1.0
    tune_dense(kernel_dilation=8)
    assert who_runs(kernel_dilation=4) == ["xla"] * 3


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
    tune_dense()
    assert who_runs() == who_runs(precision="default") == ["triton"] * 3
    for sizes, options in OTHERS:
        assert who_runs(*sizes, **options) == ["xla"] * 3, (sizes, options)
        tune_quietly(*structs(sizes), **options)
        assert who_runs(*sizes, **options) == ["triton"] * 3, (sizes, options)


def test_what_is_exported_runs_in_xla(h200, monkeypatch):
    """JAX keeps no promise for what else an executable calls, and refuses to write it."""
    seconds, _ = h200
    monkeypatch.setattr(_tuning_gpu, "DENSE_TILES", ())
    seconds[None] = 0.5
    tune_dense()
    x, w = structs()
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
