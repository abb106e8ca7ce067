"""How `tune` finds the fastest of XLA's formulations on a GPU that is not here."""

import dataclasses
import functools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conv_pallas import (
    _host,
    _measure,
    _tuning_gpu,
    aot,
    conv1d,
    explain,
    tuning,
)

pytest.importorskip("jax_triton")

from conv_pallas.kernels import records, xla, xla_gpu, xla_tuned
from conv_pallas.spec import OPERATIONS
from tests.cases import Case
from tests.tuning.gpu import D4, DENSE, structs, trials_of, tune_dense, tune_quietly, who_runs

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("shipped")]


def _hlo(**geometry):
    x, w = structs()
    layer = functools.partial(conv1d, **geometry, implementation="xla")
    return aot.lower_for("h200", layer, x, w).as_text()


def test_the_fastest_of_xlas_formulations_is_what_xla_runs(of_xla):
    seconds, file, measured = of_xla
    x, w = structs()
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
    assert who_runs(**D4) == ["xla"] * 3
    hlo = _hlo(**D4)
    assert (hlo.count("stablehlo.convolution"), hlo.count("stablehlo.dot_general")) == (0, 4)
    told = str(explain(x, w, **D4, platform="cuda"))
    assert told.count("matmul for each tap (matmuls); measured to take 0.50 of the time of") == 3
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
        seen.append(("stablehlo.maximum" in made.as_text(), dict(xla_tuned._trial.get() or {})))
        return made

    monkeypatch.setattr(_tuning_gpu, "_lowered", spy)
    tune_dense(**D4)
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
    assert tune_dense(**D4) == {}
    assert not any("matmuls" in names for names in measured)
    assert who_runs(**D4) == ["triton"] * 3
    seconds[None] = 2.0
    x, w = aot.struct((2, 512, 64), jnp.bfloat16), aot.struct((4, 1, 64), jnp.bfloat16)
    tune_quietly(x, w, feature_group_count=64)
    assert not json.loads(file.read_text())["formulations"]


def test_what_the_rules_choose_is_raced_again_where_another_is_in_use(of_xla):
    """An update of JAX, say, made it slow."""
    seconds, file, measured = of_xla
    x, w = structs()
    seconds["matmuls"] = 0.5
    assert list(tune_dense(**D4).values()) == ["matmuls"] * 3
    seconds["matmuls"], seconds[None] = 3.0, 0.9
    assert tune_dense(**D4) == {}
    raced = json.loads(file.read_text())["against_xla"].values()
    assert {(entry["seconds"], entry["xla"]) for entry in raced} == {(0.9 / 8, 1 / 8)}
    assert who_runs(**D4) == ["triton"] * 3 and "dot_general" not in _hlo(**D4)
    # Where there is no time for more, it takes part before others.
    del seconds["matmuls"]
    seconds["im2col"], seconds[None] = 0.5, 1.0
    tune_dense(**D4)
    measured.clear()
    (trial,) = [t for t in trials_of(**D4) if t.name == "kernel gradient"]
    (problem,) = trial.problems()
    now, lines = iter([0, 0, *[100] * 100]), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tuning_gpu, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
        entry = _tuning_gpu._formulations(trial, problem, trial.arguments(), 50, lines.append)
    assert measured[0] == ["fold", "im2col"] and entry["formulation"] == "im2col"
    assert "kernel gradient: no time for 1 of XLA's 3 formulations" in lines


def test_the_winner_of_xlas_formulations_has_to_win_again(of_xla, monkeypatch):
    """Of many it may have been the luckiest."""
    seconds, file, measured = of_xla
    interleaved, again = _tuning_gpu._measure.interleaved, []

    def lucky(calls, settings):
        seconds["matmuls"] = 1.0 if settings is _tuning_gpu.AGAIN and "matmuls" in calls else 0.5
        again.append(seconds["matmuls"])
        return interleaved(calls, settings)

    monkeypatch.setattr(_tuning_gpu._measure, "interleaved", lucky)
    assert tune_dense(**D4) == {} and 0.5 in again and 1.0 in again
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
    forward = trials_of(**D4)[0]
    (problem,) = forward.problems()
    lines = []
    entry = _tuning_gpu._formulations(forward, problem, forward.arguments(), math.inf, lines.append)
    assert entry["formulation"] is None and entry["seconds"] == pytest.approx(10e-6)
    assert "forward im2col: 50.0 us" in lines and "forward matmuls: 16.0 us" in lines


def test_what_holds_too_much_or_fails_by_itself_is_not_kept(of_xla, names_of, monkeypatch):
    seconds, file, _ = of_xla
    x, w = structs()
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
    tune_dense(**D4)
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
    (dict(E=2, padding=[(2, 1)]), ["transposed", "barrier", "depth_to_space"],
     ["native", "matmuls", "im2col"]),
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
    x, w = structs()
    assert list(tuning.tune(x, w, **D4, report=lines.append).values()) == ["matmuls"] * 3
    assert not any("Error" in line for line in lines) and not file.exists()
    assert _hlo(**D4).count("stablehlo.dot_general") == 4


def test_what_is_the_same_program_is_raced_once(of_xla):
    """Of one tap a matmul for each is that of all side by side."""
    _, _, measured = of_xla
    x, w = aot.struct((2, 512, 64), jnp.bfloat16), aot.struct((1, 64, 64), jnp.bfloat16)
    tune_quietly(x, w)
    raced = [names for names in measured if "matmuls" in names]
    assert raced[:2] == [["matmuls", "native"]] * 2  # of a kernel gradient they differ


def test_xlas_rules_stand_where_none_is_clearly_faster(of_xla):
    seconds, file, _ = of_xla
    before = _hlo(**D4)
    seconds["matmuls"] = 0.99
    assert tune_dense(**D4) == {}
    entries = json.loads(file.read_text())["formulations"]
    assert [entry["formulation"] for entry in entries.values()] == [None] * 3
    assert _hlo(**D4) == before
    x, w = structs()
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
    x, w = structs()
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
            tune_dense(**D4)
        return
    assert tune_dense(**D4) == {}
    assert not any("matmuls" in names for names in measured)
    stored = json.loads(file.read_text())
    assert not stored["formulations"] and all(stored["against_xla"].values())
