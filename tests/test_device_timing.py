"""What the steps of `python -m benchmarks.on_device` that time something make of what they see."""

import json
import sys
import time

import jax
import pytest

from benchmarks import device_layers, device_timing, device_turns
from benchmarks.on_device import Log, lines_of
from benchmarks.truth import Truth

pytestmark = pytest.mark.usefixtures("hardly_optimized")


def test_ceilings_are_judged_by_the_chip_at_hand():
    found = device_timing._of_data_sheet("NVIDIA H100 80GB HBM3", 3.0, 790)
    assert found == dict(copy_of_data_sheet=3 / 3.35, matmul_of_data_sheet=790 / 989)
    found = device_timing._of_data_sheet("NVIDIA H200", 3.0, 790)
    assert found == dict(copy_of_data_sheet=3 / 4.8, matmul_of_data_sheet=790 / 989)
    assert device_timing._of_data_sheet("cpu", 3.0, 790) == {}


def _nvidia_smi(tmp_path, monkeypatch, source: str) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!{sys.executable}\nimport sys, time\n{source}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_clock_and_power_are_told_of_a_device_at_work(tmp_path, monkeypatch):
    answer = "time.sleep(0.2); print('1980 MHz, 690.12 W, 0x0000000000000004')"
    _nvidia_smi(tmp_path, monkeypatch, answer)
    log = Log(tmp_path, "goals", 60)
    device_timing._ceilings(log, True)
    (line,) = lines_of(log.path)
    assert line["at_work"] == {
        "clocks.sm": "1980 MHz", "power.draw": "690.12 W",
        "clocks_event_reasons.active": "0x0000000000000004",
    }  # fmt: skip
    runs = []
    device_timing._at_work(lambda: runs.append(time.sleep(0.01)))
    assert len(runs) > 5  # while it was asked


@pytest.mark.parametrize(
    "source, why",
    [
        ("print('Field \"power.draw\" is not a valid field'); sys.exit(2)", "not a valid field"),
        ("time.sleep(100)", "no answer in 0.2 s"),
        (None, "FileNotFoundError"),
    ],
)
def test_why_nothing_is_known_of_clock_and_power_is_told(source, why, tmp_path, monkeypatch):
    monkeypatch.setattr(device_timing, "ASKED", 0.2 if "100" in str(source) else 10)
    monkeypatch.setenv("PATH", str(tmp_path))
    if source:
        _nvidia_smi(tmp_path, monkeypatch, source)
    told = device_timing._at_work(lambda: time.sleep(0.01))
    assert told.keys() == {"unknown"} and why in told["unknown"]


def test_goals_are_judged_by_the_worst():
    dense = {
        (f"dense-512/D{D}", op): dict(tflops=650.0 - D / 10)
        for D in (1, 4, 64, 512, 1024)
        for op in ("forward", "input_grad", "kernel_grad")
    }
    dense |= {("depthwise/D1", op): dict(of_copy=0.9) for op in ("forward", "backward")}

    def told():
        lines = [dict(layer=la, operation=op, **line) for (la, op), line in dense.items()]
        # Whether a result is right is a line of its own.
        lines.append(dict(layer="dense-512/D1", operation="forward", ok=True))
        return {v["goal"]: (v["reached"], v["met"]) for v in device_timing.verdicts(lines)}

    assert told()["dense, forward, TFLOP/s"] == (650 - 102.4, False)
    assert told()["dense, gradients, TFLOP/s"] == (650 - 102.4, True)
    assert told()["dense, fastest D over slowest"] == (649.9 / (650 - 102.4), False)
    assert told()["dense-64, forward, of a copy"] == (None, None)
    assert told()["depthwise, forward, of a copy"] == (0.9, False)
    assert told()["depthwise, backward, of a copy"] == (0.9, True)
    # A dilation that leaves products with padding out is no slower for being the fastest.
    dense["dense-512/D1024", "forward"] = dict(tflops=900.0)
    assert told()["dense, fastest D over slowest"] == (900 / 598.8, False)
    assert told()["dense, D=1 over slowest D"] == (649.9 / (650 - 102.4), False)
    # The gradients' dilations are held to the same.
    dense["dense-512/D4", "kernel_grad"] = dict(tflops=1200.0)
    assert told()["dense, fastest D over slowest"] == (1200 / (650 - 102.4), False)
    del dense["dense-512/D4", "kernel_grad"]
    assert told()["dense, fastest D over slowest"] == (None, None)


def test_one_program_is_compiled_and_timed_once(tmp_path, monkeypatch):
    layer = device_layers.goals(True)[0]
    doubled = lambda: lambda x, w, b, g: x * 2  # noqa: E731
    added = lambda: lambda x, w, b, g: x + x  # noqa: E731
    calls, interleaved = [], device_turns._measure.interleaved
    monkeypatch.setattr(
        device_turns._measure, "interleaved", lambda c, s: calls.extend(c) or interleaved(c, s)
    )
    programs = {"ours": doubled, "xla": doubled, "stock": added, "matmuls": added}
    *_, timed = device_turns.timed(Log(tmp_path, "against", 60), programs, layer, True)
    assert timed.told()["same_as"] == {"xla": "ours", "matmuls": "stock"}
    assert calls == ["ours", "ours", "stock"] and timed.off == 0
    assert timed.seconds["xla"] == timed.seconds["ours"]
    assert timed.seconds.keys() == programs.keys() and not timed.errors


def test_what_is_chosen_by_default_is_checked_as_ours_is(tmp_path):
    layer, times = device_layers.goals(True)[0], lambda n: lambda: lambda x, w, b, g: x * n
    for chosen, off in ((2, False), (3, True)):
        programs = {"ours": times(2), "default": times(chosen), "xla": times(2)}
        log = Log(tmp_path, "layers", 60)
        *_, timed = device_turns.timed(log, programs, layer, True, tuple(programs))
        assert (timed.off > 0.1) is off


def test_what_the_autotuner_chose_makes_no_other_program(tmp_path):
    """As an H200 told of one layer, whose two equal programs took 21 and 25 us."""
    conv = """ENTRY %main.{n} (x.{n}: f32[16,80,600]) -> f32[16,80,600] {{
  %conv.{n} = (f32[16,80,600]{{2,1,0}}, u8[{room}]{{0}}) custom-call(%x.{n}), \
custom_call_target="__cudnn$convForward", backend_config={{"cudnn_conv_backend_config":\
{{"activation_mode":"{mode}","algorithm":{{"algo_id":"{algorithm}","tuning_knobs":\
{{"14":"{n}"}},"workspace_size":{{"value":"{room}"}}}},"leakyrelu_alpha":0}}}}
}}"""
    told = lambda **how: device_turns.before_autotuning(conv.format(**how))  # noqa: E731
    first = told(n=1, room=0, algorithm=31, mode="kRelu")
    assert "kRelu" in first and "algo_id" not in first
    assert told(n=2, room=2048, algorithm=7, mode="kRelu") == first
    assert told(n=2, room=2048, algorithm=7, mode="kNone") != first
    # One lowers to what the other does not, and both are compiled to a doubling.
    doubled = lambda: lambda x, w, b, g: x * 2  # noqa: E731
    more = lambda: lambda x, w, b, g: x.T.T * 2  # noqa: E731
    programs = {"ours": doubled, "stock": more}
    log, layer = Log(tmp_path, "against", 60), device_layers.goals(True)[0]
    *_, timed = device_turns.timed(log, programs, layer, True)
    assert timed.told()["same_as"] == {"stock": "ours"}
    assert timed.seconds["stock"] == timed.seconds["ours"]
    # One that lowers to the second has that time as well, not what the second had briefly before.
    added = lambda: lambda x, w, b, g: x + g.sum()  # noqa: E731
    programs = {"ours": doubled, "default": more, "xla": more, "stock": added}
    *_, timed = device_turns.timed(log, programs, layer, True, ("ours", "default", "xla"))
    assert timed.told()["same_as"] == {"default": "ours", "xla": "ours"}
    assert timed.seconds["xla"] == timed.seconds["default"] == timed.seconds["ours"]


def test_what_the_device_did_is_told_of_those_that_are_close(tmp_path, monkeypatch):
    layer, traced = device_layers.goals(True)[0], []
    took = {"ours": 1e-3, "default": 1e-3, "stock": 3.9e-3, "barrier": 4.1e-3, "matmuls": 2e-3}
    monkeypatch.setattr(
        device_turns._measure, "interleaved",
        lambda calls, settings: {name: (2 * took[name],) for name in calls},  # two runs
    )  # fmt: skip

    def device_seconds(calls):
        traced.append(set(calls))
        return {
            name: device_turns._measure.Spread.of([took[name] * (8 if name == "matmuls" else 1)])
            for name in calls
        }

    monkeypatch.setattr(device_turns._trace, "device_seconds", device_seconds)
    programs = {
        name: lambda factor=factor: lambda x, w, b, g: x * factor
        for factor, name in enumerate(took, start=2)
        if name != "default"
    } | {"default": lambda: lambda x, w, b, g: x * 2}
    log = Log(tmp_path, "layers", 60)
    for timed in device_turns.timed(log, programs, layer, True, ("ours", "default")):
        device_timing._write(log, timed, layer=layer.name)
    first, last = (json.loads(line) for line in log.path.read_text().splitlines())
    assert traced == [{"ours", "matmuls", "stock"}] and "device_seconds" not in first
    medians = {name: spread["median"] for name, spread in last["device_seconds"].items()}
    assert medians == dict(ours=5e-4, default=5e-4, stock=1.95e-3, matmuls=8e-3)
    assert {name: spread["median"] for name, spread in last["seconds"].items()} == took
    assert (last["best_baseline"], last["speedup"]) == ("matmuls", 2)
    assert last["device_speedup"] == pytest.approx(3.9)


def test_a_slow_baseline_costs_two_calls_of_one_run(tmp_path, monkeypatch):
    layer, called = device_layers.goals(True)[0], []
    monkeypatch.setattr(device_turns, "HOPELESS", 0.05)

    def sleeping(x):
        called.append(x.shape)
        time.sleep(0.1)
        return x

    def slow(x, w, b, g):
        return jax.pure_callback(sleeping, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    programs = {"ours": lambda: lambda x, w, b, g: x, "stock": lambda: slow,
                "barrier": lambda: lambda x, w, b, g: x * 2}  # fmt: skip
    # What is known is told before the others are tried.
    every = device_turns.timed(Log(tmp_path, "against", 60), programs, layer, True)
    assert next(every).seconds.keys() == {"ours"} and not called
    (timed,) = every
    assert len(called) == 2  # of two runs each it would be more
    assert timed.seconds["stock"].median >= 0.1
    assert timed.seconds.keys() == programs.keys()


@pytest.mark.parametrize("broken, other", [("ours", "stock"), ("stock", "ours")])
def test_what_fails_costs_the_others_nothing(broken, other, tmp_path):
    layer = device_layers.goals(True)[0]

    def failing(x, w, b, g):
        return jax.pure_callback(lambda x: 1 / 0, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    programs = {broken: lambda: failing, other: lambda: lambda x, w, b, g: x * 2}
    *_, timed = device_turns.timed(Log(tmp_path, "against", 60), programs, layer, True)
    assert "error calling callback" in timed.errors[broken] and timed.seconds.keys() == {other}


def test_a_baseline_that_there_is_no_time_for_costs_ours_nothing(tmp_path):
    layer = device_layers.goals(True)[0]
    programs = {"ours": lambda: lambda x, w, b, g: x, "stock": lambda: lambda x, w, b, g: x * 2}
    *_, timed = device_turns.timed(Log(tmp_path, "against", 0), programs, layer, True)
    assert timed.errors == {"stock": "no time"} and timed.seconds.keys() == {"ours"}


def _pytorch(monkeypatch, factor: float = 1.0) -> None:
    """In PyTorch's place what takes some time, and whose result is right, or a factor too large."""

    def program(layer, which, arrays):
        def result():
            truth = Truth(layer)
            values = [truth.y] if which == "forward" else truth.gradients
            return tuple((factor * value).astype(arrays[0].dtype) for value, _ in values)

        return lambda: time.sleep(0.05), result

    monkeypatch.setattr(device_timing.baselines, "torch_program", program)


def test_pytorch_takes_turns_with_ours(tmp_path, monkeypatch):
    layers = device_layers.goals(True)
    monkeypatch.setattr(device_layers, "goals", lambda dry: layers[2:3])
    asked, operation = [], device_layers.operation
    monkeypatch.setattr(
        device_layers, "operation",
        lambda name, f: asked.append(name) or operation(name, f),
    )  # fmt: skip
    _pytorch(monkeypatch)
    log = Log(tmp_path, "pytorch", 60)
    device_timing.pytorch(log, True)
    lines = lines_of(log.path)
    assert [line["which"] for line in lines] == ["forward", "training step"]
    assert asked == ["forward", "step"]
    for line in lines:
        assert line["seconds"].keys() == {"ours", "torch"}
        assert line["speedup"] == line["seconds"]["torch"]["median"] / line["ours"] > 1


def test_a_pytorch_that_computes_something_else_is_no_baseline(tmp_path, monkeypatch):
    layers = device_layers.goals(True)
    monkeypatch.setattr(device_layers, "goals", lambda dry: layers[2:3])
    _pytorch(monkeypatch, 1.1)
    log = Log(tmp_path, "pytorch", 60)
    device_timing.pytorch(log, True)
    lines = lines_of(log.path)
    assert [line["ok"] for line in lines] == [False] * 2 == ["seconds" in line for line in lines]
    assert all("elements are off" in line["why"] for line in lines) and log.failures


def test_a_step_gives_all_that_training_needs():
    layer = device_layers.goals(True)[2]
    arrays = device_layers.arrays(layer)
    f = device_layers.forward("xla", layer, True)
    run = lambda name: device_layers.operation(name, f)(*arrays)  # noqa: E731
    y, dx, dw, db = run("step")
    assert (y == run("forward")).all()
    pairs = zip((dx, dw, db), run("backward"), strict=True)
    assert all((a == b).all() for a, b in pairs)


def test_an_operation_that_is_off_fails_the_step(tmp_path, monkeypatch):
    goals = device_layers.goals(True)
    monkeypatch.setattr(device_layers, "goals", lambda dry: goals[:1])
    right = device_layers.forward

    def forward(name, *more):
        f = right(name, *more)
        return (lambda x, w, b: f(x, w, b) * 1.1) if name == "ours" else f

    monkeypatch.setattr(device_layers, "forward", forward)
    log = Log(tmp_path, "against", 60)
    device_timing.against(log, True)
    lines = lines_of(log.path)
    assert [line["ok"] for line in lines if "off_from_xla" in line] == [False] * 3
    assert log.failures
