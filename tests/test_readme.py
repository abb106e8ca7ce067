"""The README's figures are those of the stored result, and its programs run."""

import dataclasses
import re

import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks import readme
from conv_pallas import _tuning_cpu
from tests.support import tree_close

pytestmark = pytest.mark.usefixtures("hardly_optimized")


def test_figures_are_those_of_the_result():
    text = readme.README.read_text(encoding="utf-8")
    table = readme.cpu_figures()
    assert readme.with_figures(text, table) == text, "run python -m benchmarks.readme"
    means = readme.means(readme.stored.read(readme.RESULT), readme.GPU_RESULTS)
    assert readme.with_figures(text, means, readme.MEAN_MARKS) == text and means in text
    on_gpu = readme.gpu_figures(readme.GPU_RESULTS)
    assert readme.with_figures(text, on_gpu, readme.GPU_MARKS) == text
    assert on_gpu.count("\n|") > 30 and on_gpu not in table
    assert table in text and "[Tuning](#tune) changed " in table
    assert readme.with_figures(text, table + "\n| another | row |") != text


def test_its_programs_run(capsys, monkeypatch, tuned):
    """One after the other, as somebody copies them; of those to be tuned there is one each."""
    monkeypatch.setattr(_tuning_cpu, "candidates", lambda problem, first: [first])
    monkeypatch.setattr(_tuning_cpu, "ALL", dataclasses.replace(_tuning_cpu.ALL, limit=0.0))
    blocks = re.findall(r"```python\n(.*?)```", readme.README.read_text(encoding="utf-8"), re.S)
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].shape == (8, 784, 10) and names["model"].receptive_field == 125
    assert isinstance(names["stock"].layers[0], names["Conv"])
    tagger, series = names["Tagger"](nnx.Rngs(0)), names["series"][:1, :12]
    tagger.eval()
    step, state, tags = names["compiled_step"](tagger), tagger.init_state(1), []
    for chunk in (series[:, :5], series[:, 5:]):
        y, state = step(chunk, state)
        tags.append(y)
    tree_close(jnp.concatenate(tags, 1), tagger(series))
    told = capsys.readouterr().out
    assert told.count("conv1d_kernel_grad") >= 4 and told.count(", the rules' choice\n") == 24


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(0.957, "0.96"), (1.04, "1.0"), (12.4, "12"), (204.2, "200"), (9.96, "10"), (0.996, "1.0")],
)
def test_two_significant_digits(ratio, text):
    assert readme._digits(ratio) == text


def test_what_others_disturbed_is_counted_and_left_out(monkeypatch):
    def measured(name, ratio, others, same=False):
        speedup = {"median": ratio, "same_program": same}
        more = {"pass": "forward", "others": others, "speedup_over_fastest": speedup}
        return {"layer": {"name": name}, **more}

    found = [
        measured("dense/a", 0.93, 0.0), measured("dense/b", 0.96, 0.01),
        measured("dense/c", 0.5, 0.7), measured("dense/d", 0.6, None, same=True),
    ]  # fmt: skip
    host = {"cpu": "That CPU", "cores": 2, "vectors": "avx2", "jax": "0.9.7"}
    host |= {"commit": "0123456789", "date": "2026-11-29T15:52:46+00:00"}
    monkeypatch.setattr(readme, "by_name", lambda result: "")
    monkeypatch.setattr(readme, "_by_kind", lambda of: " ".join(m["layer"]["name"] for m in of))
    source, result = readme.ROOT / "some.json", {"host": host, "measurements": found}
    text = readme.other_processor("a CPU", source, result)
    assert text.startswith("On a CPU (That CPU, 2 cores with avx2, JAX 0.9.7; untuned; commit 01")
    assert "commit 0123456 of 2026-11-29; [some.json](some.json))" in text
    assert "over stock: dense/a dense/b dense/d. " in text
    assert "Of 3 passes 1 are slower than 0.95 times the fastest baseline's speed" in text
    assert text.endswith("(0.93); 1 more, which other programs disturbed, are left out.")
    assert "the slowest dense/a, forward (0.93)" in text
    undisturbed = {"host": host, "measurements": found[:2]}
    assert readme.other_processor("a CPU", source, undisturbed).endswith("forward (0.93).")


def test_what_runs_by_name_is_compared_with_what_is_picked():
    def measured(name, which, seconds, same_as=None, **sizes):
        ours = {"ms": 8.0, "seconds": [8.0, 8.0]}
        other = {"ms": 1.0, "same_as": same_as} if same_as else {"ms": 1.0, "seconds": seconds}
        layer = dict(name=name, N=4, T=1024, C=25, O=25, S=1, E=1, G=1) | sizes
        return {"layer": layer, "pass": which, "variants": {readme.OURS: ours, ONEDNN: other}}

    ONEDNN, result = readme.ONEDNN, {"measurements": []}
    assert readme.by_name(result) == ""
    result["measurements"] = [
        measured("a", "forward", [2.0, 2.0]),
        measured("b", "forward", [8.0, 8.0]),
        measured("a", "training step", [16.0, 16.0]),
        measured("wide", "forward", [20.0, 20.0], C=32),
        measured("short", "forward", [80.0, 80.0], T=1023),
        measured("stride", "forward", [1.0, 1.0], S=2),
        measured("grouped", "training step", [4.0, 4.0], G=5),
        measured("depthwise", "forward", None, same_as=readme.OURS, G=25),
    ]
    few = "dense layers of fewer than 32 channels, and 4096 steps of all samples 2.0 and 0.50"
    rest = "grouped ones 2.0 (2.0 to 2.0); other dense ones 0.20 (0.10 to 0.40)."
    text = readme.by_name(result)
    assert text.endswith(f": {few} (0.50 to 4.0); {rest}")
    assert '`implementation=("onednn", "xla")`' in text


def test_means_take_the_clock_where_there_is_no_trace():
    """A baseline that takes many times as long as ours is not traced."""

    def line(wall, work, which="forward", layer="wavenet/D512"):
        told = {"default": {"median": 1.0}}
        lines = {
            "layer": layer,
            "which": which,
            "seconds": told | {"stock": {"median": wall}, "barrier": {"median": 99.0}},
        }
        return lines | ({"device_seconds": told | {"matmuls": {"median": work}}} if work else {})

    sweep = [line(2.0, 8.0), line(8.0, None), line(3.0, 2.0, "training step")]
    published = (
        "Geometric means over the published layers: forward 4.0, and 8.0 on the GPU; "
        "training step 3.0, and 2.0 on the GPU. "
    )
    assert readme._means(sweep) == published + (
        "Over all of these: forward 4.0, and 8.0 on the GPU; training step 3.0, and 2.0 on the GPU."
    )
    blank = {"layer": "wavenet/D1", "which": "forward", "seconds": {"default": {"median": 1.0}}}
    assert readme._means([*sweep, blank]) == readme._means(sweep)
    # What stands for a kind, and is of no model, is in one of them alone.
    kinds = [line(32.0, 64.0, layer="very-long/D1024"), line(32.0, 64.0, layer="stride/S2")]
    assert readme._means([*sweep, *kinds]) == published + (
        "Over all of these: forward 11, and 23 on the GPU; training step 3.0, and 2.0 on the GPU."
    )
