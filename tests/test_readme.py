"""The README's figures are those of the stored result, and its programs run."""

import json
import re

import pytest

from benchmarks import readme

pytestmark = pytest.mark.usefixtures("hardly_optimized")


def test_figures_are_those_of_the_result():
    text = readme.README.read_text(encoding="utf-8")
    table = readme.figures(json.loads(readme.RESULT.read_text(encoding="utf-8")))
    assert readme.with_figures(text, table) == text, "run python -m benchmarks.readme"
    on_gpu = readme.gpu_figures(readme.GPU_RESULTS)
    assert readme.with_figures(text, on_gpu, readme.GPU_MARKS) == text
    assert on_gpu.count("\n|") > 30 and on_gpu not in table
    assert table in text
    assert readme.with_figures(text, table + "\n| another | row |") != text


def test_its_programs_run(capsys):
    """One after the other, as somebody copies them."""
    blocks = re.findall(r"```python\n(.*?)```", readme.README.read_text(encoding="utf-8"), re.S)
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].shape == (8, 784, 10) and names["model"].receptive_field == 125
    assert isinstance(names["stock"].layers[0], names["Conv"])
    assert capsys.readouterr().out.count("conv1d_kernel_grad") >= 4


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(0.957, "0.96"), (1.04, "1.0"), (12.4, "12"), (204.2, "200"), (9.96, "10.0")],
)
def test_two_significant_digits(ratio, text):
    assert readme._digits(ratio) == text
