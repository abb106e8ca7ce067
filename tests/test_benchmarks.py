"""The benchmarks: what is wrong is refused, what is slow is told, what was measured is kept."""

import copy
import dataclasses
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import baselines, harness, layers, on_device, ranking, report, stored, streaming
from benchmarks.truth import Truth, WrongResultError
from conv_pallas import _measure, _tuning_gpu, explain, kernels
from conv_pallas._layers import Layer
from conv_pallas._measure import FORWARD, PASSES, STEP, STOCK, Settings
from tests.support import environment, heeding_ctrl_c

BRIEF = Settings(least=1e-4, rounds=(3, 3), limit=0.1)
SMALL = Layer("small/D2", "no model", 2, 96, 8, 8, 3, D=2, activation="relu")


def _with_kernels(monkeypatch, folder, **sources):
    """Files in a folder beside the kernels; nothing else changes."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(folder)])
    kernels.discover.cache_clear()


@pytest.fixture
def toys(monkeypatch, tmp_path):
    yield lambda **sources: _with_kernels(monkeypatch, tmp_path, **sources)
    monkeypatch.undo()
    kernels.discover.cache_clear()
    for name in [n for n in sys.modules if n.startswith("conv_pallas.kernels.toy")]:
        del sys.modules[name]
    jax.clear_caches()  # what was lowered with a toy


TOY = '''
"""xla's own, {what}."""
import dataclasses
import jax, jax.numpy as jnp
from conv_pallas.kernels import xla

def run(problem, lhs, rhs):
    {body}

KERNEL = dataclasses.replace(
    xla.KERNEL, implementation="{name}", run=run, priority=None,
    describe=lambda problem: "{what}", fused=None, backward=None,
)
'''


def test_baselines_compute_the_layer():
    """Each one, with strides, groups, paddings and activations, against the formula."""
    cases = [
        SMALL,
        dataclasses.replace(SMALL, G=8, activation="silu", padding="SAME", K=4),
        dataclasses.replace(SMALL, S=2, G=2, O=6, activation=None),
        dataclasses.replace(SMALL, dtype="bfloat16", activation="tanh"),
    ]
    for layer in cases:
        truth = Truth(layer)
        for name in (STOCK, baselines.BARRIER, baselines.SYMMETRIC, baselines.MATMULS):
            forward = baselines.build(name, layer)
            step = baselines.step_of(forward)
            both = jax.jit(lambda *a, f=forward, s=step: (f(*a[:3]), s(*a)))
            y, (_, gradients) = both(*truth.arguments)
            truth.check((y,), f"{layer}, {name}")
            truth.check(gradients, f"{layer}, {name}")


def test_a_baseline_that_does_not_exist_says_why():
    between = dataclasses.replace(SMALL, S=2, padding="SAME", K=4)
    with pytest.raises(baselines.NotApplicableError, match="fall between"):
        baselines.build(baselines.SYMMETRIC, between)
    with pytest.raises(ValueError, match="variant must be one of stock, barrier"):
        baselines.build("fast", SMALL)


@pytest.mark.parametrize("which", range(4))
def test_truth_tells_one_wrong_element(which):
    truth = Truth(SMALL)
    right = [truth.y[0], *(value for value, _ in truth.gradients)]
    wrong = np.array(right[which], np.float32)
    wrong.flat[wrong.size // 2] += 1e-3
    right = [np.asarray(a, np.float32) for a in right]
    truth.check((right[0],), "right")
    truth.check(tuple(right[1:]), "right")
    right[which] = wrong
    with pytest.raises(WrongResultError, match="1 of"):
        truth.check((right[0],) if which == 0 else tuple(right[1:]), "wrong")


def test_wrong_kernel_is_refused_and_slow_one_told(toys, tmp_path):
    repeated = """
    y = xla.run(problem, lhs, rhs)
    more = lambda i, a: a + xla.run(problem, lhs + a[0, 0, 0], rhs)
    return y + 1e-30 * jax.lax.fori_loop(0, 60, more, y * 0)
    """.strip()
    toys(
        toy_wrong=TOY.format(
            name="toy_wrong", what="too large by a thousandth",
            body="return xla.run(problem, lhs, rhs) * 1.001",
        ),
        toy_slow=TOY.format(name="toy_slow", what="sixty times", body=repeated),
    )  # fmt: skip
    layer = dataclasses.replace(SMALL, N=8, T=512, C=32, O=32)
    m = harness.measure(
        layer, FORWARD, settings=BRIEF,
        variants={STOCK: None, "xla": "xla", "toy_wrong": "toy_wrong", "toy_slow": "toy_slow"},
    )  # fmt: skip
    assert m.variants["toy_wrong"].refused and not m.variants["toy_wrong"].seconds
    assert "elements are off" in m.variants["toy_wrong"].reason
    assert m.ratio("xla", "toy_slow").high < 0.5
    result = stored.result(harness.host(), BRIEF, {"bytes": 1e9, "float32": 1e10}, [m])
    page = report.page(result)
    assert "wrong</span>" in page and "elements are off" in page


def test_what_is_too_large_to_check_is_checked_at_a_smaller_size(monkeypatch):
    """PyTorch's too, whose programs are none of JAX's."""
    monkeypatch.setattr(harness, "MOST_TO_CHECK", SMALL.products // 2)

    def program(layer, which, arrays):
        asked.append(layer)
        return lambda: None, lambda: (1.001 * Truth(layer).y[0].astype(np.float32),)

    asked: list[Layer] = []
    monkeypatch.setattr(baselines, "torch_program", program)
    variants = {STOCK: None, baselines.TORCH: None}
    m = harness.measure(SMALL, FORWARD, settings=BRIEF, variants=variants)
    assert asked == [SMALL, dataclasses.replace(SMALL, N=1)]
    assert m.variants[STOCK].seconds and m.variants[STOCK].checked == "N=1 T=96 C=8 K=3 D=2"
    assert m.variants[baselines.TORCH].refused and not m.variants[baselines.TORCH].seconds


def test_one_file_adds_a_kernel(toys, tmp_path):
    """It is found, tested, benchmarked, listed and selectable, with no other file touched.

    The file is the example of how to add one.
    """
    text = (on_device.ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    source = text.split("```python\n")[1].split("```")[0]
    toys(toy_copy=source.replace('"fast"', '"toy_copy"'))
    found, _ = kernels.discover()
    assert found["toy_copy"].implementation == "toy_copy"
    # Tested: the tests' own list holds it, and runs what it takes on it.
    folder = os.path.dirname(found["toy_copy"].run.__code__.co_filename)
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "plugin_of_toys.py").write_text(f"""
def pytest_configure():  # once conftest.py has set what JAX reads
    from conv_pallas import kernels
    kernels.__path__.append({folder!r})
""")
    # Nor does it break what is told of the other kernels, though it is the default now.
    chosen = (
        "toy_copy and (own or crop_low or two_taps or stride_grouped or agree) or "
        "test_dispatch and (this_machine or of_a_model_is or not_be_met or by_itself or "
        "that_can_is or priority_may)"
    )
    files = ("dispatch", "gradients", "nnx_contract", "operations")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider",
         "-p", "plugin_of_toys", "-k", chosen, *map("tests/test_{}.py".format, files)],
        timeout=240, cwd=on_device.ROOT, text=True, stdout=subprocess.PIPE,
        env=environment() | {"PYTHONPATH": str(tmp_path / "plugin")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 5
    # Benchmarked, by being there.
    assert "toy_copy" in harness.variants_of(SMALL)
    m = harness.measure(
        SMALL, FORWARD, settings=BRIEF, variants={STOCK: None, "toy_copy": "toy_copy"}
    )
    assert m.timed["toy_copy"].seconds
    # Listed and selectable.
    x, kernel, bias, _ = baselines.arguments(SMALL)
    told = explain(x, kernel, kernel_dilation=2, implementation="toy_copy")
    assert told.chosen["conv1d"] == "toy_copy" and "a matmul for each tap" in str(told)
    told = explain(x, jnp.zeros((3, 1, 8)), feature_group_count=8)
    assert re.search("toy_copy +declines: takes one group only", str(told))
    assert command._parse(["--implementation", "toy_copy"]).implementations == [("toy_copy",)]


# --- timing --------------------------------------------------------------------------------------


def test_short_calls_are_repeated_inside_one_launch(monkeypatch):
    monkeypatch.setattr(harness, "_launch_seconds", lambda: 1.0)
    tiny = dataclasses.replace(SMALL, T=8, K=1, D=1)
    m = harness.measure(tiny, FORWARD, settings=BRIEF, variants={STOCK: None, "xla": "xla"})
    assert m.inside == harness.MOST_INSIDE
    assert 0 < m.timed[STOCK].time.median < 1e-3


def test_the_ceiling_of_bytes_is_of_memory_that_is_there():
    """Fresh pages take several times as long as what is written to them."""
    copy = harness._copy(jnp.arange(1 << 20, dtype=jnp.float32))
    places = {copy()[0].unsafe_buffer_pointer() for _ in range(5)}
    assert len(places) == 1
    np.testing.assert_array_equal(copy()[0][:3], [1, 2, 3])
    # A whole pass over memory in each run, of one array in and one out.
    assert copy.compiled.memory_analysis().alias_size_in_bytes == 1 << 22


def test_equal_programs_are_timed_once():
    variants = {STOCK: None, "xla_native": "xla_native"}
    m = harness.measure(SMALL, FORWARD, settings=BRIEF, variants=variants)
    assert m.variants["xla_native"].same_as == STOCK
    assert m.variants["xla_native"].seconds is m.variants[STOCK].seconds
    assert all(0 < v.compile_seconds < 60 for v in m.variants.values())
    found = stored.result(harness.host(), BRIEF, {"bytes": 1e9, "float32": 1e10}, [m])
    assert found["measurements"][0]["variants"][STOCK]["compile_s"] > 0
    found["measurements"][0]["ours"] = "xla_native"
    assert "\ncompiling took " in command.summary(found)


def test_what_is_asked_for_by_name_stands_beside_what_is_picked():
    def lines_of(result):
        console = Console(width=140, record=True)
        console.print(command.table(result))
        return console.export_text().splitlines()

    variants = {STOCK: None, "xla_native": "xla_native", harness.OURS: None, "fast": ("xla",)}
    m = harness.measure(SMALL, FORWARD, settings=BRIEF, variants=variants)
    picked = m.variants[harness.OURS].seconds
    m.variants["fast"] = harness.Variant(seconds=[s / 4 for s in picked])
    m.variants["late"] = harness.Variant(reason="late declines: computes nothing")
    result = stored.result(harness.host(), BRIEF, {"bytes": 1e9, "float32": 1e10}, [m])
    head, *lines = lines_of(result)[2:]
    rows = {line.split()[0]: line.split() for line in lines if line.strip()}
    assert head.endswith("picked ") and "xla_native" in rows[SMALL.name]
    assert rows["fast"][-1] == "4.00" and rows["late"] == ["late", "-"]
    assert rows["picked"][-1].endswith("%")
    left = f"late is left out, as of {SMALL.name}, forward: late declines: computes nothing"
    assert left in command.summary(result).splitlines()
    (found,) = result["measurements"]
    found["variants"] = {name: found["variants"][name] for name in (STOCK, harness.OURS)}
    found["ours"] = harness.OURS
    assert "picked" not in lines_of(result)[2] and "limit" in lines_of(result)[2]


def test_costs_of_a_layer():
    layer = Layer("a", "b", N=2, T=10, C=4, O=6, K=3, G=2)
    # 2 operations for each of N T K C/G O; x, y, kernel and bias once, four bytes each.
    assert layer.costs() == ((2 * 2 * 10 * 3 * 2 * 6, 4 * (80 + 120 + 36 + 6)),)
    assert layer.costs(training=True) == layer.costs() * 3
    limits = {"bytes": 1e3, "float32": 1e9}
    assert harness.ideal(layer, STEP, limits) == pytest.approx(3 * 0.968)


def test_published_layers_are_complete():
    """The table of published layers, with every dilation of the original stacks."""
    powers = {
        "tcn-adding": 8, "tcn-copy": 8, "tcn-mnist": 8, "tcn-music": 4, "tcn-ptb-characters": 3,
        "tcn-ptb-words": 4, "wavenet": 10, "conv-tasnet": 8, "ms-tcn": 10,
    }  # fmt: skip
    for model, count in powers.items():
        found = [layer.D for layer in layers.LAYERS if layer.model == model]
        assert found == [2**i for i in range(count)], model
    assert len([la for la in layers.LAYERS if la.model == "hifigan-v1"]) == 4 * 3 * 3
    others = {"spliceai-10k": 4, "atacworks": 1, "mamba-2.8b": 1, "wide-and-long": 5,
              "very-long": 2}  # fmt: skip
    for model, count in others.items():
        assert len([la for la in layers.LAYERS if la.model == model]) == count
    networks = {m for m in powers if m.startswith("tcn")} | {"conv-tasnet"}
    assert {network.model for network in layers.STACKS} == networks


def test_runs_of_one_call_are_not_taken_for_one():
    """Though nothing differs between them: else a call would seem to be that much faster."""
    x, w = jnp.ones((4, 8, 16)), jnp.ones((16, 16))
    run = jax.jit(lambda x, w: _measure.several(lambda x, w: x @ w)([x] * 3, [w] * 3))
    assert run.lower(x, w).compile().as_text().count(" dot(") == 3
    xs = _measure.rolled(jnp.arange(12.0).reshape(1, 4, 3), 3)
    outs = jax.jit(_measure.several(lambda x: 2 * x))(xs)
    for i, out in enumerate(outs):
        assert (out == 2 * jnp.roll(xs[0], i, axis=1)).all()


def test_what_each_run_takes_is_given_once_and_worked_on_in_each():
    """Else what a layer computes of its kernel alone would be there for nothing but once."""
    xs, w = [jnp.ones((4, 8, 16))] * 3, jnp.ones((16, 16))
    compiled = jax.jit(_measure.several(lambda x, w: x @ jnp.exp(w))).lower(xs, w).compile()
    assert len(jax.tree.leaves(compiled.args_info)) == 4
    assert compiled.as_text().count(" dot(") == 3
    assert compiled.as_text().count(" exponential(") == 3


def test_a_call_in_place_gives_the_same_where_it_lay():
    x, w = jnp.arange(12.0).reshape(1, 4, 3), jnp.ones((3, 5))
    given = (_measure.rolled(x, 2), w)
    call = _measure.InPlace(_measure.lower(jnp.matmul, given).compile(), given)
    where = [[y.unsafe_buffer_pointer() for y in call()] for _ in range(3)]
    assert where[0] == where[1] == where[2]
    for y, x in zip(call(), given[0], strict=True):
        assert (y == x @ w).all()
    # Nor does it cost a copy: what is written over is not read.
    assert " copy(" not in call.compiled.as_text()


def test_what_depends_on_no_x_is_computed_in_every_run():
    """Of a layer without an activation the gradient by x is the same in each of them."""
    layer = dataclasses.replace(SMALL, activation=None)
    step, arguments = baselines.training_step(STOCK, layer), baselines.arguments(layer)
    x, rest = harness._split(arguments)
    program = jax.jit(harness._several(step, arguments)).lower([x] * 3, *rest).compile()
    assert program.as_text().count(" convolution(") == 3 * 3


def test_a_call_has_runs_enough_to_hide_the_next():
    for operations, bytes_ in ((1, 1), (5e10, 6.7e7), (1e9, 8e8), (1e15, 1e12)):
        runs = _measure.runs_in_a_call(operations, bytes_, 3)
        least = max(operations / _measure.OPERATIONS, bytes_ / _measure.BYTES)
        assert runs == 8 or runs * least >= _measure.LONG
        assert runs == 1 or (runs - 1) * least < _measure.LONG
    assert [_measure.runs_in_a_call(1, 1, taps) for taps in (16, 33, 1000)] == [8, 3, 1]


def test_differences_are_the_same_wherever_they_are_computed():
    a = jnp.asarray([1.0, -8, 3], jnp.bfloat16), jnp.asarray([[2.0]])
    b = jnp.asarray([1.5, -8, 3], jnp.bfloat16), jnp.asarray([[2.5]])
    assert float(_measure.difference_there(a, b)) == _measure.difference(a, b) == 0.25
    assert jnp.isnan(_measure.difference_there(a, (a[0], a[1] * jnp.nan)))


def test_calls_on_a_cpu_do_not_overlap_where_there_is_a_gpu_too(monkeypatch):
    """Of `jax.default_device`, which need not be the first backend's."""
    calls, waits = [], []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "block_until_ready", waits.append)
    settings = Settings(least=1e-3, rounds=(3, 3), limit=1.0)
    _measure.interleaved({"one": lambda: calls.append(1)}, settings)
    assert len(waits) > len(calls) > 100


def test_slow_variants_take_few_rounds():
    calls = {"fast": lambda: None, "slow": lambda: time.sleep(0.02), "other": lambda: None}
    settings = Settings(least=0, rounds=(5, 5), limit=0.01, hopeless=2)
    times = _measure.interleaved(calls, settings)
    assert len(times["slow"]) == 1 and len(times["fast"]) >= 3
    settings = dataclasses.replace(settings, limit=10)  # a short call, but a hopeless one
    times = _measure.interleaved(calls, settings)
    assert len(times["slow"]) == 3 and len(times["fast"]) == 5
    del calls["slow"]
    calls["fast"] = lambda: time.sleep(0.01)  # what is close has what it needs, past the limit too
    for sure, rounds in ((3, 3), (5, 5)):
        settings = Settings(least=0, rounds=(5, 5), limit=0.001, sure=sure)
        assert len(_measure.interleaved(calls, settings)["fast"]) == rounds


def test_the_best_tile_is_told_by_more_than_a_few_samples(monkeypatch):
    """Of as many as there are, of about a millisecond each, those that are close have the time."""
    clock = [0.0]

    def call(seconds):
        clock[0] += seconds

    monkeypatch.setattr(_measure.time, "perf_counter", lambda: clock[0])
    # Each is slower than the last by 2 %.
    tiles = {tile: 1e-3 * 1.02**i for i, tile in enumerate((None, *_tuning_gpu.DENSE_TILES))}
    calls = {tile: functools.partial(call, seconds) for tile, seconds in tiles.items()}
    times = _measure.interleaved(calls, _tuning_gpu.SETTINGS)
    for tile, seconds in tiles.items():
        close = seconds < 1.1 * tiles[None]
        assert len(times[tile]) >= 7 if close else len(times[tile]) == 3, tile


def test_nobody_pays_for_who_went_before(monkeypatch):
    called, clock = [], [0.0]

    def call(name):
        clock[0] += 1 if called and called[-1] == name else 10  # until caches are its own again
        called.append(name)

    monkeypatch.setattr(_measure.time, "perf_counter", lambda: clock[0])
    calls = {name: functools.partial(call, name) for name in "abcd"}
    times = _measure.interleaved(calls, Settings(least=0, rounds=(9, 9), limit=1e9))
    assert {seconds for each in times.values() for seconds in each} == {1.0}
    turns = [name for name, _ in itertools.groupby(called)]
    assert len({pair for pair in itertools.pairwise(turns) if "a" in pair}) == 6  # in any order


# --- results -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result():
    return stored.read(stored.Path(report.RESULTS / "cpu" / "layers.json"))


def test_ranking():
    def ranked(stock, matmuls, **others):
        layer = {"name": "a/D2", "size": "T=8", "dtype": "float32"}
        times = {STOCK: stock, "matmuls": matmuls, **others}
        variants = {name: {"ms": ms} for name, ms in times.items()}
        return {"measurements": [{"layer": layer, "pass": FORWARD, "variants": variants}]}

    first = ranked(1.0, 0.5)
    assert ranking.agreement(first, first).share == 1
    found = ranking.agreement(first, ranked(1.0, 10.0))
    assert found.share == 0 and "a/D2, forward (stock/matmuls)" in str(found)
    assert ranking.agreement(first, ranked(1.0, 1.05)).share == 1  # within noise
    assert (
        ranking.agreement(ranked(1.0, 0.5, barrier=0.95), ranked(1.0, 0.5, barrier=0.8)).share == 1
    )
    same = ranked(1.0, 10.0)
    same["measurements"][0]["variants"]["matmuls"]["same_as"] = STOCK
    assert ranking.agreement(first, same).share == 1  # two times of one program
    other = ranked(1.0, 10.0)
    other["measurements"][0]["layer"]["size"] = "T=16"
    assert not ranking.agreement(first, other).differing  # another layer


def _with_sweeps(result):
    """With one layer at three dilations and three lengths: a quick run has no such sweeps."""
    found = [m for m in result["measurements"] if m["layer"]["name"] == "tcn-adding/D128"]
    fields = [{"name": f"tcn-adding/D{D}", "D": D} for D in (1, 2)]
    fields += [{"name": f"length/dense/T{T}", "T": T} for T in (64, 256, 1024)]
    more = [{**m, "layer": m["layer"] | f} for m in found for f in fields]
    return {**result, "measurements": [*result["measurements"], *more]}


def test_page_stands_alone(result):
    shown = _with_sweeps(result)
    page = report.page(shown, result)
    for outside in ("http://", "https://", "<link", "<script src", "@import", "url("):
        assert outside not in page
    for title in ("Speed-up of each layer", "How far from the limit", "Time against dilation",
                  "Time against length", "Memory", "All variants", "Against another"):  # fmt: skip
        assert title in page
    assert page.count("<svg") >= 10 and "NaN" not in page and "prefers-color-scheme: dark" in page
    for m in shown["measurements"]:  # the losing ones too
        assert f"<th>{report._name(m)}</th>" in page


def test_page_tells_of_layers_and_of_networks_what_is_true_of_them(result):
    def told(*found):
        return report.what_was_timed({**result, "measurements": found})

    rows = result["measurements"]
    layer = next(m for m in rows if m["layer"]["kind"] == "dense")
    stack = next(m for m in rows if m["layer"]["kind"] == "whole stack")
    assert "float64" in told(layer) and "smaller size" not in told(layer)
    assert "network" not in told(layer)
    assert "float64" not in told(stack) and "against the same network of stock" in told(stack)
    large = copy.deepcopy(layer)
    large["variants"][STOCK]["checked"] = "N=1"
    assert "of large layers at a smaller size" in told(large, stack)
    assert report.what_was_timed(result) in report.page(result)


def test_page_tells_what_the_ceiling_of_bytes_is_of(result):
    old = {key: value for key, value in result.items() if key != "copy_in_place"}
    assert "times too high" in report.rooflines(old)
    new = stored.result(harness.host(), BRIEF, {}, []) | {"ceilings": result["ceilings"]}
    told = report.rooflines(new | {"measurements": result["measurements"]})
    assert "a large copy over what it wrote before" in told and "times too high" not in told


def test_page_tells_how_many_turns_a_ratio_is_of(result):
    m = copy.deepcopy(result["measurements"][0])
    m["ours"], m["speedup"] = "ours", {"over": STOCK, "low": 0.5, "median": 1.0, "high": 1.5,
                                       "same_program": False}  # fmt: skip
    m["variants"] = {STOCK: {"seconds": [1.0] * 3}, "other": {"seconds": [1.0] * 7},
                     "ours": {"same_as": "other"}}  # fmt: skip
    assert "quartiles 0.50 to 1.50 of 3 turns" in report._ratio(m, "speedup")
    m["variants"][STOCK]["seconds"] = [1.0]
    assert "(quartiles 0.50 to 1.50 of 1 turn)" in report._tip(m, "speedup")


def test_two_results_on_the_screen(result, tmp_path, capsys):
    """What changed most comes first; a layer of another size or dtype is another layer."""
    changed = copy.deepcopy({**result, "measurements": result["measurements"][:4]})
    first, second, third, fourth = changed["measurements"]
    for m, factor in ((first, 1.5), (second, 4.0)):
        m["variants"][m["ours"]]["ms"] *= factor
    third["layer"]["size"] = "another"
    fourth["layer"]["dtype"] = "float16"
    paths = [tmp_path / "new.json", tmp_path / "old.json"]
    for path, stored_ in zip(paths, (result, changed), strict=True):
        path.write_text(json.dumps(stored_))
    assert report.main([*map(str, paths)]) == 0
    printed = capsys.readouterr().out
    name = first["layer"]["name"]
    lines = [line.split() for line in printed.splitlines() if line.strip().startswith(name)]
    assert [line[-2:] for line in lines] == [["4.00", "1.00"], ["1.50", "1.00"]]
    # The page of the first may be somebody's: it is written where it is asked for alone.
    assert "wrote" not in printed and not list(tmp_path.glob("*.html"))
    page = tmp_path / "both.html"
    assert report.main([*map(str, paths), "--output", str(page)]) == 0
    assert page.read_text() and f"wrote {page}" in capsys.readouterr().out


def test_page_holds_what_other_tools_left(tmp_path):
    (tmp_path / "v6e.json").write_text(
        '{"libtpu": "0.0.1", "rows": [{"layer": "a", "bundles": 7}]}'
    )
    ((title, text),) = report.static_tpu(tmp_path)
    assert "schedules" in title and "estimates" in text and "<td>7</td>" in text
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "goals.jsonl").write_text(
        '{"item": 0, "layer": "a", "ms": 0.25}\n{"item": 0, "layer": "a", "ms": 0.5}\n'
    )
    ((title, text),) = report.device_results(tmp_path)
    assert "h200" in title and "0.5" in text and "0.25" not in text and "1 rows" in text


# --- the command ---------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    process = subprocess.Popen(
        heeding_ctrl_c([sys.executable, "-m", "benchmarks", "--quick",
                        "--layers", "length/depthwise", "--json", tmp_path / "out.json"]),
        env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert "stock" in process.stdout.readline()  # the first is measured
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "interrupted" in out and "quartiles" in out
    kept = stored.read(tmp_path / "out.json")
    assert 1 <= len(kept["measurements"]) < 10
    assert (tmp_path / "out.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "nothing"], "models tcn-adding"),
        (["--implementation", "unheard_of"], "must be None, one of triton"),
        (["--implementation", "xla,default+xla"], "not in an order as 'default+xla'"),
        (["--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, got int8"),
        (["--pass", "back"], "--pass must be forward or training, got 'back'"),
        (["--layers", ""], "models tcn-adding"),
        (["--layers", "music/stack", "--dtype", "float16"], "music/stack selects whole networks"),
        (["--json", "/dev/null/a.json"], "--json must be a file"),
        (["--json", "/proc/a.json"], "--json must be a file"),
        (["--json", "a.txt"], "must be a file that ends in .json"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command._parse(arguments)
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line


def test_options_leave_an_old_result_alone(tmp_path, capsys):
    """It is replaced once there is another; where none could be written, that is told first."""
    (tmp_path / "a.json").write_text("old")
    command._parse(["--json", str(tmp_path / "a.json")])
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"
    (tmp_path / "a.html").mkdir()
    with pytest.raises(SystemExit):
        command._parse(["--json", str(tmp_path / "a.json")])
    assert f"Is a directory: '{tmp_path / 'a.html'}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "No such file"), ("{", "is no JSON"), ('{"format": 1}', "its format is 1"),
     ('{"format": 2, "measurements": []}', "holds no measurements")],
)  # fmt: skip
def test_bad_files(tmp_path, text, message, capsys):
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit):
        report.main([str(path)])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_quick_times_of_streams_replace_no_stored_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(streaming, "measure", lambda batch, settings: {"batch": batch})
    monkeypatch.setattr(streaming, "table", str)
    assert streaming.main(["--quick", "--batches", "3"]) == 0
    kept = json.loads((tmp_path / "bench-output" / "streaming.json").read_text())
    assert kept["measurements"] == [{"batch": 3}]


def test_passes():
    assert command._passes("training") == (STEP,) and command._passes(None) == PASSES
