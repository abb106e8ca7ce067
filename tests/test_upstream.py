"""flax's own tests, and jax's own conv_general_dilated harnesses, with ours in their place."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.internal_test_util import test_harnesses

from conv_pallas import conv_general_dilated
from tests.support import primitives_of

pytestmark = pytest.mark.usefixtures("hardly_optimized")

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "upstream"


def _flax_tests() -> Path:
    """The `tests` folder of the installed flax's source release; its wheel has none."""
    release = f"flax-{importlib.metadata.version('flax')}"
    folder = CACHE / release
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            pip = subprocess.run(
                [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary",
                 "flax", "--dest", scratch, release.replace("-", "==")],
                capture_output=True, text=True,
            )  # fmt: skip
            archives = list(Path(scratch).glob("flax-*.tar.gz"))
            if pip.returncode != 0 or len(archives) != 1:
                pytest.fail(
                    f"flax's own tests must be run, and can't be had: pip could not download the "
                    f"source of {release} from PyPI. Put it unpacked into {folder} and run "
                    f"again.\n{pip.stderr}",
                    pytrace=False,
                )
            with tarfile.open(archives[0]) as archive:
                archive.extractall(scratch, filter="data")
            try:
                (Path(scratch) / release).rename(folder)
            except OSError:  # another process was quicker
                assert folder.exists()
    return folder / "tests"


@pytest.mark.sampled
@pytest.mark.parametrize(("file", "select", "at_least"), [
    ("nnx/nn/conv_test.py", "nnx_linen_conv", {"Conv": 32, "ConvTranspose": 32}),
    ("linen/linen_linear_test.py", "conv and not transpose and not 2d_constant",
     {"conv_general_dilated": 100}),
], ids=["nnx", "linen"])  # fmt: skip
def test_flax(file, select, at_least):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment.pop("PYTEST_ADDOPTS", None)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", ".",
         "-p", "tests.upstream_plugin", "-p", "no:cacheprovider", "-p", "no:xdist",
         "-k", select, file],
        cwd=_flax_tests(), capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout), run.stdout[-500:]
    assert not re.search(r"skipped|xfailed", run.stdout.splitlines()[-1])
    for counted, least in at_least.items():
        (calls,) = re.findall(rf"ours was called:.*'{counted}': (\d+)", run.stdout)
        assert int(calls) >= least


# --- jax ---


def _harnesses():
    return [h for h in test_harnesses.all_harnesses if h.group_name == "conv_general_dilated"]


def _arguments(harness) -> dict:
    """The harness's arguments by name."""
    names = (
        "lhs", "rhs", "window_strides", "padding", "lhs_dilation", "rhs_dilation",
        "dimension_numbers", "feature_group_count", "batch_group_count", "precision",
        "preferred_element_type",
    )  # fmt: skip
    return dict(zip(names, harness.args_maker(np.random.RandomState(0)), strict=True))


def _in_one_dimension(arguments: dict) -> dict:
    """The same convolution without the last of its spatial dimensions."""
    lhs, rhs, out = arguments["dimension_numbers"]
    gone = [c for c in lhs if c not in "NC"][-1]
    drop = lambda value: value if isinstance(value, str) else value[:-1]  # noqa: E731
    return arguments | dict(
        lhs=arguments["lhs"].take(0, lhs.index(gone)),
        rhs=arguments["rhs"].take(0, rhs.index(gone)),
        dimension_numbers=tuple(spec.replace(gone, "") for spec in (lhs, rhs, out)),
        **{
            name: drop(arguments[name])
            for name in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
        },
    )


def _function(function, arguments: dict):
    """Of both operands: the value, and where it has them, both gradients."""
    rest = {k: v for k, v in arguments.items() if k not in ("lhs", "rhs")}
    call = lambda lhs, rhs: function(lhs, rhs, **rest)  # noqa: E731

    def run(lhs, rhs):
        if not jnp.issubdtype(lhs.dtype, jnp.inexact):
            return (call(lhs, rhs),)
        y, vjp = jax.vjp(call, lhs, rhs)
        return y, *vjp(jnp.ones_like(y) / 2)

    return run


def _compare(name: str, arguments: dict) -> bool:
    """Ours against jax's; whether our primitives took part."""
    operands = [jnp.asarray(arguments[n]) for n in ("lhs", "rhs")]
    ours, stock = (
        _function(f, arguments) for f in (conv_general_dilated, lax.conv_general_dilated)
    )
    try:
        stock_jaxpr = jax.make_jaxpr(stock)(*operands)
    except (TypeError, ValueError) as error:
        with pytest.raises(type(error)):
            jax.make_jaxpr(ours)(*operands)
        return False
    jaxpr = jax.make_jaxpr(ours)(*operands)
    dtype = operands[0].dtype
    real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    if operands[0].ndim != 3 or not real or arguments["batch_group_count"] != 1:
        assert str(jaxpr) == str(stock_jaxpr), name
        return False
    names = primitives_of(jaxpr)
    assert "conv1d" in names, name
    assert "conv_general_dilated" not in names, name
    # One program, which takes less time to compile than two.
    got, want = jax.jit(lambda *operands: (ours(*operands), stock(*operands)))(*operands)
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        # A gradient has come by the dtype of y.
        units = [
            jnp.finfo(v.dtype).eps for v in (b, want[0]) if jnp.issubdtype(v.dtype, jnp.inexact)
        ]
        unit = float(max(units, default=0))
        a, b = (np.asarray(v).astype(np.float64) for v in (a, b))
        atol = 16 * unit * np.max(np.abs(b), initial=1.0)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)
    return True


SHARES = 8


@pytest.mark.sampled
@pytest.mark.parametrize("share", range(SHARES))
def test_jax_harnesses(share):
    """What jax checks of conv_general_dilated on every platform, and all of that in 1-D."""
    ours = 0
    for harness in _harnesses()[share::SHARES]:
        arguments = _arguments(harness)
        ours += _compare(harness.name, arguments)
        if arguments["lhs"].ndim == 4:
            name = f"{harness.name}, in one dimension"
            ours += _compare(name, _in_one_dimension(arguments))
    assert ours >= 4


def test_the_harnesses_are_all_there():
    """If jax moves them, the test above must not pass for want of any."""
    assert len(_harnesses()) >= 80
    dtypes = {np.dtype(_arguments(h)["lhs"].dtype).name for h in _harnesses()}
    assert {"float32", "bfloat16", "float16", "complex64", "int8", "int32"} <= dtypes
