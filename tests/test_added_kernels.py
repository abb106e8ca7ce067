"""Every added kernel by itself; and, of what is planted, that the harness sees what is wrong."""

import dataclasses
import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conv_pallas import kernels
from conv_pallas.activations import activate, times_derivative
from conv_pallas.kernels import Kernel, xla
from conv_pallas.spec import OPERATIONS, Epilogue
from tests import added_kernels
from tests.support import SHIPPED, environment

ROOT = Path(__file__).parents[1]
IN_TRITON, ON_TPU, IN_JAX = map(added_kernels.added, ("in triton", "on tpu", "in jax"))


def _run(module: str, *arguments: str, folder=ROOT, **variables) -> subprocess.CompletedProcess:
    variables = environment() | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"} | variables
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=variables,
    )  # fmt: skip


# --- Those that are here: without any, there are no such tests ---

if IN_TRITON:

    @pytest.mark.aot
    @pytest.mark.parametrize("capability", [80, 90])
    @pytest.mark.parametrize("file", IN_TRITON)
    def test_an_added_kernel_is_right_on_the_interpreter(file, capability):
        done = _run(
            "tests.triton_interpreter", "--kernel", file, "--capability", str(capability)
        )  # fmt: skip
        assert done.returncode == 0, done.stdout


if ON_TPU + IN_JAX:

    @pytest.mark.usefixtures("hardly_optimized")
    @pytest.mark.parametrize("operation", [*OPERATIONS, added_kernels.FUSED])
    @pytest.mark.parametrize("file", ON_TPU + IN_JAX)
    def test_an_added_kernel_is_right(file, operation):
        told = []
        failed, own = added_kernels.failures(file, operation, tell=told.append)
        assert not failed, "\n".join(told)
        if not own.taken[operation]:
            pytest.skip(f"{file} declines every case of {operation}")

    @pytest.mark.parametrize("file", ON_TPU + IN_JAX)
    def test_at_least_one_case_is_its_own(file):
        checks = added_kernels.checks_of(file)
        assert any(c.declined is None and c.operation in OPERATIONS for c in checks)


COMPILED = [
    *((file, chip) for file in IN_TRITON for chip in ("a100", "h200")),
    *((file, chip) for file in ON_TPU for chip in ("v5e", "v6e")),
]

if COMPILED:

    @pytest.mark.aot
    @pytest.mark.parametrize("file, chip", COMPILED)
    def test_an_added_kernel_compiles(file, chip):
        """What an interpreter takes a compiler may refuse."""
        pytest.importorskip("libtpu" if file in ON_TPU else "jax_triton")
        from conv_pallas import aot

        platform = aot.platform_of(chip)
        if platform not in added_kernels.of_file(file).platforms:
            pytest.skip(f"does not run on {platform}")
        with aot.as_on(chip):
            checks = [c for c in added_kernels.checks_of(file, platform) if c.declined is None]
        assert checks
        # Of each operation a few, as far from each other as the table has them.
        for operation in (*OPERATIONS, added_kernels.FUSED):
            own = [c for c in checks if c.operation == operation]
            for check in own[:: -(-len(own) // 4) or 1]:
                for f, arrays in _programs(check):
                    structs = jax.tree.map(lambda a: aot.struct(a.shape, a.dtype), arrays)
                    aot.compile_for(chip, f, *structs)

    def _programs(check):
        """The functions of the kernel that a check calls, each with its operands."""
        if check.operation != added_kernels.FUSED:
            kernel, problem, *operands = check.run.args
            yield functools.partial(kernel.run, problem), operands
            return
        kernel, fused, wanted, forward, backward = check.run.args
        problem, (x, w, bias, gy, saved) = fused.problem(), fused.arrays()
        if forward:
            yield functools.partial(kernel.fused, problem), (x, w, bias)
        if backward:
            gradients = lambda *operands: kernel.backward(problem, *operands, wanted)  # noqa: E731
            yield gradients, (x, w, bias, saved, gy)


def test_what_is_shipped_is_here():
    found, missing = kernels.discover()
    assert SHIPPED <= found.keys() | missing.keys()
    assert not SHIPPED & {*IN_TRITON, *ON_TPU, *IN_JAX}


# --- Those that are planted, in a copy of this folder ---


def _examples() -> dict[str, str]:
    """The files of kernels/README.md, by what they import."""
    text = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    files = re.findall(r"```python\n(.*?)```", text, re.S)
    found = {}
    for source in files:
        kind = "triton" if "import triton" in source else "tpu" if "pallas_call" in source else None
        found[kind or "jax"] = source
    return found


@pytest.fixture
def plant(tmp_path):
    """Files beside the kernels of a copy, which is returned."""
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for name in ("conv_pallas", "kernels", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def add(**sources: str) -> Path:
        for name, source in sources.items():
            (tmp_path / "kernels" / f"{name}.py").write_text(source, encoding="utf-8")
        return tmp_path

    return add


def _changed(source: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def _collected(folder: Path, *arguments: str) -> str:
    options = ("-q", "-n0", "-p", "no:cacheprovider", "tests/test_added_kernels.py")
    done = _run("pytest", *options, *arguments, folder=folder)
    assert done.returncode in (0, 1), done.stdout
    return done.stdout


@pytest.mark.aot
def test_a_planted_triton_kernel_is_tested_by_its_file(plant):
    """Under a name of its own or the shipped ones', with a priority or without."""
    pytest.importorskip("jax_triton")
    right = _examples()["triton"]
    shared = ('implementation="small"', 'implementation="triton"')
    early = ("k * D - LOW", "k * D - LOW + 1")
    fuses = (  # what no compiler takes, where a layer is fused
        ("import jax\n", "import functools\n\nimport jax\n"),
        ("BC: tl.constexpr,", "BC: tl.constexpr, ACT: tl.constexpr,"),
        ("    there = (u < U)", "    if ACT:\n        acc *= SCALE\n    there = (u < U)"),
        ("def run(problem, x, w):", "SCALE = 1.0\n\n\ndef run(problem, x, w, bias=0, ACT=False):"),
        ("BC=BC,", "BC=BC, ACT=ACT,"),
        ("opaque=True,", "opaque=True, fused=functools.partial(run, ACT=True),"),
    )
    folder = plant(
        triton_planted=right,
        triton_aaa=_changed(right, shared),  # before the others, and after them
        triton_zzz=_changed(right, shared, early),
        triton_beyond=_changed(right, ("there = (u < U)", "there = (u < U + BU)")),
        triton_halo=_changed(right, ("BU, BO, BC = 64", "BU, BO, BC = 1024"),
                             ("seen = ((t >= 0)", "seen = ((t >= u // BU * BU * S)")),
        triton_fuses=_changed(right, *fuses),
        triton_idle=_changed(right, ('return "computes no gradients"', 'return "nothing"'),
                             ('problem.operation != "conv1d"', "True")),
    )  # fmt: skip
    run = functools.partial(_run, "tests.triton_interpreter", folder=folder)
    of = lambda *files: [a for file in files for a in ("--kernel", file)]  # noqa: E731
    brief = ("--capability", "90", "dense", "ragged", "depthwise")
    done = run(*of("triton_planted", "triton_aaa"), *brief)
    assert done.returncode == 0, done.stdout
    for file in ("triton_planted", "triton_aaa"):
        assert f"PASS ragged conv1d sm_90 ({file})" in done.stdout
        assert f"{file}: its own cases were 2 of conv1d, 0 of conv1d_input_grad" in done.stdout
    assert "declined depthwise conv1d sm_90: takes neither groups" in done.stdout
    done = run(*of("triton_zzz", "triton_beyond", "triton_idle"), *brief)
    assert done.returncode == 1, done.stdout
    assert "PASS" not in done.stdout and "elements are off" in done.stdout
    assert "FAIL ragged conv1d sm_90 (triton_zzz)\nof batch=(" in done.stdout
    assert "written outside of an array: " in done.stdout
    assert " bytes behind the end of float32[" in done.stdout and "in conv_small" in done.stdout
    assert "FAIL triton_idle declines every case" in done.stdout
    # Where a tile of many steps meets the next; what is named may be a fused case alone.
    done = run("--kernel", "triton_halo", "--capability", "90", "summed", "tiles_of_time")
    assert "PASS summed conv1d sm_90 (triton_halo)" in done.stdout, done.stdout
    assert "FAIL tiles_of_time conv1d sm_90 (triton_halo)" in done.stdout
    assert "along each axis they are 0 to 1 of 2, 1024 to 2051 of 2100" in done.stdout
    # What is shipped runs beside them as it does alone.
    done = run("dense", "rounding")
    assert done.returncode == 0 and "PASS dense conv1d sm_80 (triton_dense)" in done.stdout
    # Found by the tests, by being there.
    these = "triton_aaa and compiles and h200 or triton_zzz and interpreter and 90"
    found = _collected(folder, "-m", "aot", "-k", these)
    assert "1 failed, 1 passed" in found and "off" in found, found
    found = _collected(folder, "-m", "aot", "-k", "triton_fuses and compiles and h200")
    assert "1 failed" in found and "Cannot access global variable SCALE" in found, found


@pytest.mark.aot
def test_the_interpreter_tells_in_a_line_what_it_does_not_know():
    pytest.importorskip("jax_triton")
    run = functools.partial(_run, "tests.triton_interpreter")
    assert "name cases for the shipped kernels" in run().stdout
    assert "there is no case 'dens'; there are dense" in (done := run("dens")).stdout
    assert done.returncode == 2 and "Traceback" not in done.stdout
    assert "there is no kernel 'quick'; there are " in run("--kernel", "quick").stdout


def test_a_planted_tpu_kernel_is_tested_by_its_file(plant):
    right = _examples()["tpu"]
    shared = ('implementation="small_tpu"', 'implementation="pallas_tpu"')
    twice = ("acc.astype(y.dtype)", "(2 * acc).astype(y.dtype)")
    folder = plant(
        tpu_planted=right,
        tpu_aaa=_changed(right, shared, twice),
    )
    cases = ("dense", "pad_beyond_field", "stride")
    done = _run("tests.added_kernels", "tpu_planted", *cases, folder=folder)
    assert done.returncode == 0 and "declined stride conv1d: takes neither groups" in done.stdout
    assert "tpu_planted: its own cases were 2 of conv1d, 0 of" in done.stdout
    done = _run("tests.added_kernels", "tpu_aaa", "dense", folder=folder)
    assert done.returncode == 1 and "elements are off" in done.stdout
    assert "FAIL dense conv1d (tpu_aaa)\nof batch=(2,), T=13, C=3, O=4, K=3, D=1" in done.stdout
    # Found by the tests, by being there.
    found = _collected(folder, "-k", "tpu_planted and its_own or tpu_aaa and is_right and fused")
    assert "1 passed, 1 skipped" in found, found


def test_a_case_that_is_fused_is_a_kernels_own_too():
    own = added_kernels.Own("tpu_planted")
    assert not own and str(own) == "FAIL tpu_planted declines every case"
    own.count(added_kernels.Check("fused_dense_silu", added_kernels.FUSED, None, print))
    assert own and str(own).endswith("0 of conv1d_kernel_grad, 1 of fused")


# --- What is around a convolution, and its gradients ---


def _fused(problem, x, w, bias):
    wide = dataclasses.replace(problem, epilogue=Epilogue(), out_dtype=np.dtype("float32"))
    z = xla.run(wide, x, w) + (0 if bias is None else bias.astype(jnp.float32)[None, None])
    y, z = (a.astype(problem.out_dtype) for a in (activate(z, problem.epilogue.activation), z))
    return (y, z) if problem.epilogue.keep else y


def _backward(problem, x, w, bias, saved, gy, wanted):
    plain = dataclasses.replace(problem, epilogue=Epilogue())
    gz = times_derivative(gy, saved, problem.epilogue.activation)
    dx = xla.run(plain.gradient("conv1d_input_grad"), gz, w) if wanted[0] else None
    dw = xla.run(plain.gradient("conv1d_kernel_grad"), x, gz) if wanted[1] else None
    db = gz.astype(jnp.float32).sum((0, 1)) if wanted[2] and bias is not None else None
    return dx, dw, db


WHOLE = Kernel(
    "whole", ("rocm",), xla.run, lambda problem: None, lambda problem: "a whole layer", None,
    fused=_fused, backward=_backward, keeps=lambda problem: True,
)  # fmt: skip


def _without_derivative(problem, x, w, bias, saved, gy, wanted):
    epilogue = dataclasses.replace(problem.epilogue, activation=None)
    return _backward(dataclasses.replace(problem, epilogue=epilogue), x, w, bias, saved, gy, wanted)


def _unasked(problem, *operands):
    return _backward(problem, *operands[:-1], (True, True, True))


def _bias_of_gy(problem, x, w, bias, saved, gy, wanted):
    dx, dw, db = _backward(problem, x, w, bias, saved, gy, wanted)
    return dx, dw, db if db is None else gy.astype(jnp.float32).sum((0, 1))


def _half_a_layer(problem, *operands):
    dx, _, db = _backward(problem, *operands)
    return dx, None, db


def _y_twice(problem, x, w, bias):
    out = _fused(problem, x, w, bias)
    return (out[0], out[0]) if problem.epilogue.keep else out


def _without_bias(problem, x, w, bias):
    return _fused(problem, x, w, None)


WITH_DW, WITHOUT = "fused_dense_silu_bias_dxdwdb", "fused_dense_silu_bias_dx"


@pytest.mark.usefixtures("hardly_optimized")
@pytest.mark.parametrize(
    "changes, wrong",
    [
        ({}, set()),
        (dict(fused=_without_bias), {WITH_DW, WITHOUT}),
        (dict(fused=_y_twice), {WITH_DW, WITHOUT}),
        (dict(backward=_without_derivative), {WITH_DW, WITHOUT}),
        (dict(backward=_bias_of_gy), {WITH_DW}),
        (dict(backward=_half_a_layer), {WITH_DW}),
        (dict(backward=_unasked), {WITHOUT}),
    ],
    ids=["right", "bias", "kept", "derivative", "db", "dw", "unasked"],
)
def test_what_a_kernel_fuses_is_checked(monkeypatch, changes, wrong):
    """A mistake is told of in the cases that show it, and in no other."""
    planted = {"whole": dataclasses.replace(WHOLE, **changes)}
    monkeypatch.setattr(kernels, "discover", lambda: (planted, {}))
    names, told = {WITH_DW, WITHOUT}, []
    failed, own = added_kernels.failures("whole", names=sorted(names), tell=told.append)
    assert own.taken[added_kernels.FUSED] == names
    assert failed == len(wrong), told
    assert {line.split()[1] for line in told if line.startswith("FAIL")} == wrong
