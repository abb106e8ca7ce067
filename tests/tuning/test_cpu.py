"""`tune` on a CPU, by a clock that tells what a test says."""

import concurrent.futures
import dataclasses
import functools
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import __main__ as command
from benchmarks import harness, layers, stored
from benchmarks.networks import Stack
from conv_pallas import _measure, _neighbours, _tuning_cpu, conv1d, explain, tuning
from conv_pallas.__main__ import main
from conv_pallas._layers import select
from conv_pallas._measure import OURS, STOCK
from conv_pallas.kernels import records, xla, xla_cpu, xla_tuned
from conv_pallas.kernels.xla_candidates import candidates
from conv_pallas.kernels.xla_cpu_bounds import sound
from conv_pallas.nn import TCN
from conv_pallas.spec import OPERATIONS, Epilogue
from tests.cases import Case
from tests.reference import conv1d_reference
from tests.tolerance import check

pytestmark = pytest.mark.usefixtures("hardly_optimized")

RECORDS = xla_tuned.RECORDS["cpu"]
kind = xla_tuned.kind  # before `untuned` puts another in its place
KIND = "That CPU 2 cores"
X, W = (2, 64, 8), (3, 8, 8)
KEY = "conv1d x 2x64x8 w 3x8x8 float32 padding 2,0 dilation 1"


def _few(problem, first):
    """As `candidates`, which take their time to compile."""
    return [first, *(name for name in ("matmuls", "im2col") if name != first)]


@pytest.fixture
def there(tuned, monkeypatch):
    """On `KIND`, whose file is in this folder."""
    monkeypatch.setattr(xla_tuned, "kind", lambda platform: KIND)
    return tuned


@pytest.fixture
def seconds(there, monkeypatch):
    """What each formulation takes, else 1."""
    told = {}
    monkeypatch.setattr(
        _tuning_cpu._measure, "interleaved",
        lambda calls, settings: {name: (told.get(name, 1.0),) for name in calls},
    )  # fmt: skip
    monkeypatch.setattr(_tuning_cpu, "candidates", _few)
    monkeypatch.setattr(_neighbours.Watch, "taken", lambda self: 0.0)
    return told


def _problem(operation="conv1d", x=X, w=W, **more):
    batch, T, C = (x[0],), x[1], x[2]
    case = Case("layer", batch=batch, T=T, C=C, O=w[2], K=w[0], G=C // w[1])
    return dataclasses.replace(case, **more).problem(operation)


def _tune(x=X, w=W, dtype=jnp.float32, report=lambda line: None, **how):
    structs = (jax.ShapeDtypeStruct(shape, dtype) for shape in (x, w))
    return tuning.tune(*structs, report=report, **how)


def _chosen(**how):
    return [xla.choose(_problem(operation, **how)) for operation in OPERATIONS]


def test_what_won_is_what_later_compilations_run(seconds, tmp_path):
    rules = _chosen()
    assert "matmuls" not in rules
    x, w = (np.random.default_rng(0).standard_normal(shape, np.float32) for shape in (X, W))
    compiled = lambda: jax.jit(lambda x, w: conv1d(x, w)).lower(x, w).compile()  # noqa: E731
    before = compiled().as_text()
    seconds["matmuls"] = 0.5
    found = _tune()
    assert found[KEY] == "matmuls" and set(found.values()) == {"matmuls"} and len(found) == 3
    assert _chosen() == ["matmuls"] * 3
    after = compiled()
    assert after.as_text().count(" dot(") >= 3 > before.count(" dot(")
    check(after(x, w), "conv1d", x, w, _problem().spec, out_dtype=x.dtype)
    (file,) = tmp_path.iterdir()
    assert file.name == "xla_tuned_that-cpu-2-cores.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    entry = {"formulation": "matmuls", "rule": rules[0], "seconds": 0.5, "seconds_of_rule": 1.0}
    assert stored["formulations"][KEY].items() >= (entry | {"jax": jax.__version__}).items()
    told = str(explain(x, w))
    assert (
        f"matmul for each tap (matmuls); measured to take 0.50 of the time of {rules[0]!r}" in told
    )
    with xla_tuned.ignored():
        assert _chosen() == rules
        assert "measured" not in str(explain(x, w))


def test_what_another_thread_compiles_meanwhile_goes_by_the_rules(there):
    rules = _chosen()
    every = {xla_tuned.key(_problem(operation)): "matmuls" for operation in OPERATIONS}
    with xla_tuned.trial(every), concurrent.futures.ThreadPoolExecutor() as pool:
        assert _chosen() == ["matmuls"] * 3
        assert pool.submit(_chosen).result() == rules


def test_where_the_rules_are_right_they_stay(seconds, tmp_path, monkeypatch):
    rules = _chosen()
    seconds["matmuls"] = 0.99
    assert _tune() == {} and _chosen() == rules
    (file,) = tmp_path.iterdir()
    entries = json.loads(file.read_text(encoding="utf-8"))["formulations"].values()
    assert [entry["formulation"] for entry in entries] == [None] * 3
    told = lambda: str(explain(jnp.zeros(X), jnp.zeros(W)))  # noqa: E731
    assert told().count("none was measured to be clearly faster on this CPU") == 3
    with xla_tuned.ignored():
        assert "clearly faster" not in told()
    monkeypatch.setattr(xla_cpu, "choose", lambda problem: "native")  # as a later version may
    assert "native" not in rules and "clearly faster" not in told()


def test_another_version_of_jax_is_named(seconds, tmp_path):
    told = lambda: str(explain(jnp.zeros(X), jnp.zeros(W)))  # noqa: E731
    for time, end in ((0.5, f"of the time of {_chosen()[0]!r} on this CPU"), (1.0, "on this CPU")):
        seconds["matmuls"] = time
        _tune()
        assert f"{end}\n" in told() and "with JAX" not in told()
        (file,) = tmp_path.iterdir()
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace(f'"jax": "{jax.__version__}"', '"jax": "0.9.7"'))
        records.forget()
        assert told().count(f"{end}, with JAX 0.9.7\n") == 3
        file.unlink()
        records.forget()


def test_who_wins_alone_but_not_in_its_layer_is_not_kept(seconds, monkeypatch):
    race = _measure.interleaved
    monkeypatch.setattr(
        _tuning_cpu._measure, "interleaved",
        lambda calls, settings: race(calls, settings)
        | ({"matmuls": (0.5,)} if settings is _tuning_cpu.ALL else {}),
    )  # fmt: skip
    rules = _chosen()
    assert _tune() == {} and _chosen() == rules


def test_who_wins_alone_is_raced_in_its_layer(seconds, monkeypatch):
    """With bias and activation, in the forward pass or the step, beside what has won before."""
    race, texts, results = _measure.interleaved, [], []

    def keep(calls, settings):
        if settings is _tuning_cpu.TWO:
            programs = [call.func for call in calls.values()]
            texts.append([program.as_text() for program in programs])
            results.append({len(jax.tree.leaves(program.out_info)) for program in programs})
        return race(calls, settings)

    monkeypatch.setattr(_tuning_cpu._measure, "interleaved", keep)
    seconds["matmuls"] = 0.5
    w, bias = jnp.zeros(W), jnp.zeros(W[2])
    layer = functools.partial(conv1d, kernel=w, bias=bias, activation="tanh")
    tuning.tune(lambda x: layer(x), jax.ShapeDtypeStruct(X, jnp.float32), report=lambda line: None)
    rules, won = zip(*texts, strict=True)
    assert len(won) == 3 and all(" tanh(" in text for text in (*rules, *won))
    dots = lambda text: text.count(" dot(")  # noqa: E731
    assert dots(won[0]) < dots(won[1]) < dots(won[2])
    assert all(dots(rule) < dots(one) for rule, one in zip(rules, won, strict=True))
    assert results == [{1}, {4}, {4}]  # y, and the gradients of x, kernel and bias


def test_who_wins_in_half_of_the_rounds_alone_is_not_kept(seconds, monkeypatch):
    def race(calls, settings):
        return {n: (0.5, 0.5, 0.9, 1.1, 1.1) if n == "matmuls" else (1.0,) * 5 for n in calls}

    monkeypatch.setattr(_tuning_cpu._measure, "interleaved", race)
    assert _tune() == {}


def test_what_was_measured_says_nothing_of_others(seconds):
    seconds["matmuls"] = 0.5
    _tune()
    for other in (
        dict(x=(4, 64, 8)), dict(x=(2, 65, 8)), dict(w=(5, 8, 8)), dict(w=(3, 8, 4)), dict(D=2),
        dict(S=2), dict(E=2, padding=[(2, 0)]), dict(padding="SAME"), dict(dtype="bfloat16"),
        dict(out_dtype="float64"), dict(precision="highest"), dict(precision="default"),
        dict(x=(2, 64, 16)),
    ):  # fmt: skip
        names = [xla_tuned.lookup(_problem(operation, **other)) for operation in OPERATIONS]
        assert names == [None] * 3, other
    assert _chosen(x=(2, 50, 8)) == ["matmuls"] * 3  # time and batch count by powers of two
    for elsewhere in ({"exported": True}, {"partitioned": True}):
        problem = dataclasses.replace(_problem(), **elsewhere)
        assert xla_tuned.lookup(problem) is None
        with xla_tuned.trial({KEY: "matmuls"}):
            assert xla_tuned.lookup(problem) is None


def test_what_is_not_sound_for_fewer_steps_goes_by_the_rules(there):
    """Of one key, as time counts by powers of two; in the smaller one a tap sees padding mostly."""
    layer = Case("layer", batch=(1,), T=600, C=64, O=64, K=3, D=150)
    problem = layer.problem("conv1d_kernel_grad")
    fewer = dataclasses.replace(layer, T=550).problem("conv1d_kernel_grad")
    key = xla_tuned.key(problem)
    assert key == xla_tuned.key(fewer)
    entry = {"formulation": "winograd", "rule": "native", "seconds": 1, "seconds_of_rule": 2}
    RECORDS.add(RECORDS.file_of(KIND), KIND, {"formulations": {key: entry}})
    records.forget()
    assert xla.choose(problem) == "winograd"
    assert xla.choose(fewer) == xla_cpu.choose(fewer) != "winograd"
    assert "on this CPU" not in xla.KERNEL.describe(fewer)


def test_another_cpu_knows_nothing_of_it(seconds, monkeypatch):
    rules = _chosen()
    seconds["matmuls"] = 0.5
    _tune()
    monkeypatch.setattr(xla_tuned, "kind", lambda platform: "That CPU 8 cores")
    assert _chosen() == rules


@pytest.mark.parametrize("cores, told", [(1, "1 core"), (8, "8 cores")])
def test_a_cpu_is_its_name_its_vectors_and_its_cores(cores, told, monkeypatch):
    monkeypatch.setattr(xla_tuned._host, "cores", lambda: cores)
    monkeypatch.setattr(xla_tuned._host, "processor", lambda: "Fast 3000")
    monkeypatch.setattr(xla_tuned._host, "model", lambda: "25-1")
    for vectors, more in (("avx2", "avx2 "), (None, "")):
        monkeypatch.setattr(xla_tuned._host, "vectors", lambda vectors=vectors: vectors)
        assert kind("cpu") == f"Fast 3000 25-1 {more}{told}"


def test_what_this_version_has_not_goes_by_the_rules(seconds, tmp_path):
    seconds["matmuls"] = 0.5
    rules, found = _chosen(), _tune()
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text().replace('"formulation": "matmuls"', '"formulation": "magic"'))
    records.forget()
    assert len(found) == 3 and _chosen() == rules


@pytest.mark.parametrize("name, whose", [("scatter", OPERATIONS[:2]), ("tree", OPERATIONS[2:])])
def test_what_an_operation_has_not_goes_by_the_rules(name, whose, there):
    for operation in OPERATIONS:
        problem = _problem(operation)
        with xla_tuned.trial({xla_tuned.key(problem): name}):
            assert (xla.choose(problem) == name) == (operation in whose)


@pytest.mark.parametrize("text", ["{", "[]", '{"formulations": {"a": {}}}', '{"formulations": 1}'])
def test_a_file_that_is_none_of_ours_is_named(seconds, tmp_path, text):
    file = RECORDS.file_of(KIND)
    assert file.parent == tmp_path
    file.write_text(text)
    with pytest.raises(ValueError, match=f"{file.name} is not what .*tune writes: delete it"):
        _chosen()
    with pytest.raises(ValueError, match=f"{file.name} is not what .*tune writes: delete it"):
        _tune()
    other = file.rename(tmp_path / "other.json")
    records.forget()
    lines = []
    with pytest.raises(ValueError, match=r"other.json is not what .*tune writes: delete it"):
        _tune(file=other, report=lines.append)
    assert not lines  # before anything was measured


def test_a_folder_of_ones_own_has_the_last_word(seconds, tmp_path, monkeypatch):
    rules = _chosen()
    seconds["matmuls"] = 0.5
    _tune()
    monkeypatch.setenv(records.ENVIRONMENT_VARIABLE, str(tmp_path / "own"))
    records.forget()
    assert _chosen() == ["matmuls"] * 3
    seconds["matmuls"] = 1.5
    _tune()
    assert _chosen() == rules


# --- who takes part -------------------------------------------------------------------------------


def test_all_that_are_worth_it_and_sound_do(seconds, monkeypatch):
    monkeypatch.setattr(_tuning_cpu, "candidates", candidates)
    lines, problem = [], _problem(w=(3, 4, 8))
    _tune(w=(3, 4, 8), feature_group_count=2, report=lines.append)
    names = candidates(problem, xla_cpu.choose(problem))
    assert "dense" in names and len(names) > 5
    timed = [line.split()[1][:-1] for line in lines if line.startswith("forward ") and "us" in line]
    assert timed == [name for name in names if name != "dense"]


def _told(**how) -> list[str]:
    lines = []
    _tune(report=lines.append, **how)
    return lines


def test_what_holds_too_much_takes_no_part(seconds, monkeypatch):
    seconds["im2col"] = 0.5
    assert "im2col" in _tune(w=(16, 8, 8)).values()
    monkeypatch.setattr(_measure, "HELD", 0)  # so that twice the arrays count: of 16 taps more
    lines = _told(w=(16, 8, 8))
    assert any(line.startswith("forward im2col: holds 0 MiB") for line in lines), lines
    assert not any(line.startswith("forward im2col: 5") for line in lines)


def test_what_is_wrong_takes_no_part(seconds, monkeypatch):
    run_as = xla.run_as
    monkeypatch.setattr(
        xla, "run_as", lambda name, *args: run_as(name, *args) * (1.001 if name == "matmuls" else 1)
    )
    seconds["matmuls"] = 0.5
    lines = _told()
    off = "forward matmuls: is off by 0.001 of the largest element"
    assert off in lines and not any("matmuls: 5" in line for line in lines)


def test_what_can_not_be_compiled_takes_no_part(seconds, monkeypatch):
    run_as = xla.run_as

    def too_large(name, *args):
        if name == "matmuls":
            return jnp.zeros(1 << 50)
        return run_as(name, *args)

    monkeypatch.setattr(xla, "run_as", too_large)
    seconds["matmuls"] = 0.5
    assert any("forward matmuls: RESOURCE_EXHAUSTED" in line for line in _told())
    monkeypatch.setattr(xla_cpu, "choose", lambda problem: "matmuls")
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        _tune()  # there is nothing to compare with


def test_what_takes_over_twice_as_long_is_not_timed(seconds):
    seconds["matmuls"] = 2.5
    assert not any("matmuls" in line for line in _told())
    seconds["matmuls"] = 1.5
    assert "forward matmuls: 1500000.0 us" in _told()


def test_what_is_hopeless_runs_once(seconds, monkeypatch):
    clock = iter(range(0, 9000, 9))  # each first call takes 9 s, and those of the rules 1 later on
    both = {"monotonic": lambda: 0.0, "perf_counter": lambda: next(clock)}
    monkeypatch.setattr(_tuning_cpu, "time", types.SimpleNamespace(**both))
    timed = [line for line in _told() if line.endswith(" us")]
    assert len(timed) == 3 and not any("matmuls" in line for line in timed)


def test_no_time_is_left(seconds, monkeypatch):
    clock = iter(range(0, 1000, 10))  # each look takes 10 s
    monkeypatch.setattr(
        _tuning_cpu,
        "time",
        types.SimpleNamespace(monotonic=lambda: next(clock), perf_counter=lambda: 0.0),
    )
    seconds["matmuls"] = 0.5
    rules, lines = _chosen(), _told(seconds=35)
    assert "kernel gradient: no time left" in lines
    assert sum("no time to see matmuls win again" in line for line in lines) == 2
    assert _chosen() == rules and "matmuls" not in rules


def test_quick_takes_less_time(seconds, monkeypatch):
    asked = []
    race = _measure.interleaved
    monkeypatch.setattr(
        _tuning_cpu._measure, "interleaved",
        lambda calls, settings: asked.append(settings) or race(calls, settings),
    )  # fmt: skip
    _tune()
    assert _tuning_cpu.ALL in asked and _tuning_cpu.QUICK not in asked
    asked.clear()
    _tune(quick=True)
    assert _tuning_cpu.QUICK in asked and _tuning_cpu.ALL not in asked


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes(seconds, dtype):
    seconds["matmuls"] = 0.5
    with jax.enable_x64(dtype == "float64"):
        lines = []
        found = _tune(dtype=dtype, report=lines.append)
    assert "matmuls" in found.values() and not any("is off by" in line for line in lines), lines


@pytest.mark.usefixtures("shipped")
def test_a_model_is_tuned_convolution_by_convolution(seconds):
    seconds["matmuls"] = 0.5
    model = TCN(8, [8, 8, 8], 8, kernel_size=2, dropout=0.1, rngs=nnx.Rngs(0))
    x, mask = jax.ShapeDtypeStruct((2, 64, 8), jnp.float32), jax.ShapeDtypeStruct((2, 64), bool)
    lines = []
    found = tuning.tune(model, x, mask=mask, report=lines.append)
    for D in (1, 2, 4):
        assert any(f" dilation {D}" in key and key.startswith("conv1d x") for key in found), found
    told = explain(model, x, platform="cpu", mask=mask)
    assert (
        sum(
            each.how(operation).count("one matmul for each tap (matmuls); measured")
            for each in told.convolutions.values()
            for operation in OPERATIONS
        )
        >= 9
    )
    numbered = [m.groups() for m in (re.search(r"^x .*, (\d+) of (\d+):$", a) for a in lines) if m]
    assert numbered == [(str(i + 1), str(len(numbered))) for i in range(len(numbered))] != []
    assert re.match(rf"{len(found)} of \d+ operations run otherwise than by the rules", lines[-1])
    ended = [line for line in lines if " of x (" in line]
    assert len(ended) == len(set(ended)) >= len(found)  # each once


def test_what_differs_in_its_activation_alone_is_tuned_once(seconds):
    w, lines = jnp.zeros(W), []
    both = lambda x: (conv1d(x, w), conv1d(x, w, activation="relu"))  # noqa: E731
    tuning.tune(both, jax.ShapeDtypeStruct(X, jnp.float32), report=lines.append)
    assert sum(line.startswith("forward of x ") for line in lines) == 1


@pytest.mark.usefixtures("shipped")
def test_kernels_that_vmap_batches_are_tuned_where_they_are_groups(seconds):
    seconds["im2col"] = 0.5
    w, x = jnp.zeros((4, 3, 16, 16)), jax.ShapeDtypeStruct((4, 2, 64, 16), jnp.float32)
    layer = jax.vmap(lambda x, w: conv1d(x, w))
    lines = []
    found = tuning.tune(lambda x: layer(x, w), x, report=lines.append)
    left = "x (2, 64, 16), kernel (3, 16, 16), float32, 4 kernels at once: runs as batched matmuls"
    assert f"kernel gradient of {left}" in lines
    assert {key.split()[0] for key in found} == set(OPERATIONS[:2])
    (told,) = explain(lambda x: layer(x, w), x).convolutions.values()
    assert "measured to take 0.50" in told.how("conv1d")


def test_what_is_told_to_run_otherwise_is_left(seconds):
    w = jnp.zeros(W)

    def told(**how):
        lines = []
        layer = functools.partial(conv1d, kernel=w, **how)
        x = jax.ShapeDtypeStruct(X, jnp.float32)
        assert tuning.tune(lambda x: layer(x), x, report=lines.append) == {}
        assert lines[-1] == "there is nothing to tune" and len(lines) == len(set(lines))
        return lines[0]

    assert "1 left to jax.lax.conv_general_dilated" in told(implementation="xla_native")
    assert told(padding=[(0, -62)]) == "there is nothing to tune"  # nor to compute


@pytest.mark.parametrize("taken, told", [(0.8, "0.8 cores"), (0.04, None), (None, None)])
def test_that_others_ran_is_told(seconds, taken, told, monkeypatch):
    monkeypatch.setattr(_neighbours.Watch, "taken", lambda self: taken)
    lines = []
    _tune(report=lines.append)
    assert ["by the rules" in line for line in lines[-2:]] == [told is not None, told is None]
    assert told is None or lines[-1].startswith(f"other programs took {told} meanwhile")


def test_several_processes_are_for_gpus(seconds):
    with pytest.raises(ValueError, match="processes must be 1 on a CPU"):
        _tune(processes=2)


def test_an_implementation_is_not_for_tune(seconds):
    with pytest.raises(TypeError, match="implementation is not for tune"):
        _tune(implementation="xla")


def test_a_file_by_its_name(seconds, tmp_path):
    seconds["matmuls"] = 0.5
    _tune(file=str(tmp_path / "own.json"))
    assert '"matmuls"' in (tmp_path / "own.json").read_text(encoding="utf-8")


def test_the_command(seconds, tmp_path, capsys, monkeypatch):
    seconds["matmuls"] = 0.5
    layers, in_layer = [], _tuning_cpu._in_layer
    spy = lambda race, kept: layers.append(race.convolution) or in_layer(race, kept)  # noqa: E731
    monkeypatch.setattr(_tuning_cpu, "_in_layer", spy)
    words = ["tune", "N=2", "T=64", "C=8", "K=3", "activation=relu"]
    assert main(words) == 0
    # The winner wins again in the layer as it is run.
    assert {layer.epilogue for layer in layers} == {Epilogue(True, "relu")}
    assert "matmuls, 2.00 times as fast as" in capsys.readouterr().out
    assert _chosen() == ["matmuls"] * 3
    (tmp_path / "file").touch()
    monkeypatch.setenv(records.ENVIRONMENT_VARIABLE, str(tmp_path / "file" / "folder"))
    records.forget()
    assert main(words) == 1
    assert "a folder that can be written to in CONV_PALLAS_TUNED" in capsys.readouterr().err


# --- what may run unasked -------------------------------------------------------------------------

GEOMETRIES = (
    Case("dense", T=26, C=4, O=4),
    Case("dilated", T=26, C=4, O=3, K=5, D=3),
    Case("many_taps", T=40, C=2, O=2, K=18),
    Case("strided", T=26, C=4, O=4, K=5, S=2),
    Case("stride_over_taps", T=26, C=4, O=4, K=2, S=3, padding="SAME"),
    Case("spread", T=9, C=4, O=4, K=5, E=3, padding=[(4, 2)]),
    Case("grouped", T=26, C=4, O=6, G=2),
    Case("depthwise", T=26, C=4, O=4, G=4, K=7, D=2),
    Case("multiplier", T=26, C=2, O=4, G=2, K=4),
)


@pytest.mark.sampled
@pytest.mark.parametrize("operation", OPERATIONS[:2])
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
def test_a_nan_goes_where_the_definition_has_it_go(case, operation):
    """Through each tap of its group, and nowhere else: no formulation multiplies it with a zero."""
    problem = dataclasses.replace(case.problem(operation), N=1)
    spec, C, O = problem.as_convolution
    lhs = np.zeros((spec.time * C, 1, spec.time, C), np.float32)
    lhs.reshape(spec.time * C, -1)[np.arange(spec.time * C), np.arange(spec.time * C)] = np.nan
    rhs = np.ones(problem.shapes[1], np.float32)
    there = np.ones((spec.kernel_size, C // spec.groups, O))
    expected = np.stack([conv1d_reference(np.isnan(one), there, spec) > 0 for one in lhs])
    names = [n for n in candidates(problem, xla_cpu.choose(problem)) if sound(n, problem)]
    assert len(names) > 3 and "dense" not in names

    def run(lhs):
        def way(name):
            return jax.vmap(lambda one: xla.run_as(name, problem, one, rhs))(lhs)

        return {name: way(name) for name in names}

    compiled = jax.jit(run).lower(lhs).compile({"xla_backend_optimization_level": 0})
    for name, actual in compiled(lhs).items():
        np.testing.assert_array_equal(np.isnan(actual), expected, err_msg=name)


@pytest.mark.parametrize("case", [c for c in GEOMETRIES if c.G > 1], ids=str)
def test_a_nan_reaches_no_gradient_of_another_group(case):
    problem = case.problem("conv1d_kernel_grad")
    x, g = (np.ones(shape, np.float32) for shape in problem.shapes[:2])
    x[0, 5, 0] = np.nan
    names = [n for n in candidates(problem, xla_cpu.choose(problem)) if sound(n, problem)]
    assert len(names) > 3
    run = jax.jit(lambda x, g: {n: xla.run_as(n, problem, x, g) for n in names}).lower(x, g)
    others = np.s_[..., case.O // case.G :]
    for name, dw in run.compile({"xla_backend_optimization_level": 0})(x, g).items():
        assert np.isnan(dw).any() and np.isfinite(dw[others]).all(), name


@pytest.mark.sampled
@pytest.mark.parametrize("G", [1, 4])
def test_no_kernel_gradient_is_slow_in_a_loop(G):
    """XLA:CPU puts a convolution's axes in order nowhere but in the entry computation."""
    for S in (1, 2):
        problem = Case("layer", T=64, C=16, O=16, G=G, S=S).problem("conv1d_kernel_grad")
        x, g, dw = (np.zeros(shape, np.float32) for shape in problem.shapes)
        names = [n for n in candidates(problem, xla_cpu.choose(problem)) if sound(n, problem)]

        def step(dw, _, problem=problem, x=x, g=g, names=names):
            return sum((xla.run_as(n, problem, x + dw[0, 0, 0], g) for n in names), dw), None

        run = jax.jit(lambda dw, step=step: jax.lax.scan(step, dw, length=3))
        hlo = run.lower(dw).compile({"xla_backend_optimization_level": 0}).as_text()
        convolutions = [line for line in hlo.splitlines() if " convolution(" in line]
        assert len(names) > 3 and convolutions
        for line in convolutions:
            assert "dim_labels=b0f_0io->b0f" in line and "group_count" not in line, line


@pytest.mark.parametrize("operation", OPERATIONS)
def test_minimal_filtering_is_for_who_promised_no_digits(operation):
    def filtered(**how):
        case = dataclasses.replace(Case("layer", T=256, C=64, O=64), **how)
        problem = case.problem(operation)
        names = candidates(problem, "native")
        return [n for n in names if "winograd" in n and sound(n, problem)]

    gradient_of_kernel = operation == "conv1d_kernel_grad"
    assert filtered() == ["winograd"]
    assert not filtered(precision="default") and not filtered(dtype="bfloat16")
    # Where an element has few products, or a tap sees padding for the most part.
    assert filtered(T=255) == filtered(D=80) == ([] if gradient_of_kernel else ["winograd"])
    assert filtered(C=63, O=63) == (["winograd"] if gradient_of_kernel else [])
    of_strides = {"conv1d": [], "conv1d_input_grad": ["depth_to_space_winograd"],
                  "conv1d_kernel_grad": ["space_to_depth_winograd"]}[operation]  # fmt: skip
    assert filtered(S=2, K=9, T=512) == of_strides
    assert filtered(S=2, K=11, T=512) == []
    assert filtered(S=2, K=7, T=512) == ([] if gradient_of_kernel else of_strides)


# --- in the benchmarks ----------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["depthwise/D1", "tcn-mnist/stack"])
def test_the_sweep_tunes_and_times_it_beside_the_rules(name, there, monkeypatch, capsys):
    """Of layers and of whole networks."""
    brief = _measure.Settings(least=0, rounds=(3, 3), limit=0.01)
    monkeypatch.setattr(harness, "QUICK", brief)
    monkeypatch.setattr(
        _tuning_cpu, "_times", lambda race, *_: {race.rule: (2.0, 2.0)} | {"matmuls": (1.0, 1.0)}
    )
    monkeypatch.setattr(_tuning_cpu, "_in_layer", _tuning_cpu._times)
    path, one = there / "result.json", select(name, layers.ALL)[0]
    small = {"blocks": 2} if isinstance(one, Stack) else {"C": 64, "O": 64, "G": 64}
    one = dataclasses.replace(one, N=1, T=64, **small)
    monkeypatch.setattr(command.layers, "fit", lambda *_: one)
    words = ["--quick", "--layers", name, "--pass", "forward", "--json", str(path)]
    assert command.main([*words, "--tune"]) == 0
    (stored_one,) = stored.read(path)["measurements"]
    found = stored_one["variants"]
    assert stored_one["ours"] == OURS and {"ms", "seconds"} <= found[harness.TUNED].keys()
    assert "tuning changed 1 of 1 passes, which are " in capsys.readouterr().out.replace("\n", " ")
    entries = json.loads(next(there.glob("xla_tuned_*")).read_text())["formulations"]
    assert "matmuls" in {entry["formulation"] for entry in entries.values()}
    assert command.main(words) == 0
    assert harness.TUNED not in stored.read(path)["measurements"][0]["variants"]
    assert "tuning" not in capsys.readouterr().out


def test_what_tuning_brought():
    def told(*rows):
        names = (STOCK, OURS, harness.TUNED)
        found = [dict(zip(names, row, strict=False)) for row in rows]
        return stored.of_tuning({"measurements": [{"ours": OURS, "variants": f} for f in found]})

    took = lambda *seconds: {"seconds": seconds, "ms": 1}  # noqa: E731
    stock, slow, as_stock = took(4.0), took(2, 3, 2, 9), {"same_as": STOCK, "ms": 1}
    assert told((stock, slow)) == ""
    same = (stock, slow, {"same_as": OURS, "ms": 1}), (stock, as_stock, as_stock)
    assert told(*same) == "tuning changed 0 of 2 passes"
    quick = (stock, slow, took(1, 1, 2)), (stock, as_stock, took(0.5))
    assert told(*same, *quick) == (
        "tuning changed 2 of 4 passes, which are 4.00 times as fast as by the rules (2.00 to 8.00)"
    )
    assert "(0.50 to 0.50)" in told((stock, slow, as_stock))
    refused = {"reason": "3 elements are off", "refused": True}
    assert told((stock, slow, refused)) == told((stock, refused, slow)) == ""


def test_the_sweep_tunes_cpus_alone(monkeypatch, capsys):
    monkeypatch.setattr(command, "default_platform", lambda: "cuda")
    with pytest.raises(SystemExit):
        command.main(["--tune"])
    assert "--tune is for CPUs" in capsys.readouterr().err


def test_two_that_tune_side_by_side_lose_nothing(tmp_path):
    file = tmp_path / "of_both.json"
    entry = xla_tuned.raced("native", None, 1.0, 1.0)

    def add(name):
        for i in range(10):
            RECORDS.add(file, KIND, {"formulations": {f"{name}{i}": entry}})

    with concurrent.futures.ThreadPoolExecutor(2) as both:
        list(both.map(add, "ab"))
    assert len(RECORDS.read(file)["formulations"]) == 20
    assert [found.name for found in tmp_path.iterdir()] == [file.name]
    assert file.stat().st_mode & 0o777 == 0o644  # for others to read


def test_a_folder_that_is_named_later_counts(there, tmp_path, monkeypatch):
    assert RECORDS.content(KIND)["formulations"] == {}
    entry = xla_tuned.raced("native", "matmuls", 1.0, 2.0)
    RECORDS.add(tmp_path / "own" / RECORDS._name(KIND), KIND, {"formulations": {KEY: entry}})
    monkeypatch.setenv(records.ENVIRONMENT_VARIABLE, str(tmp_path / "own"))
    assert _chosen()[0] == "matmuls"
