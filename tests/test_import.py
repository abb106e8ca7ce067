"""`import conv_pallas` needs jax and flax alone, and is quick."""

import ast
import importlib
import os
import pathlib
import shutil
import subprocess
import sys
import warnings

import pytest

OPTIONAL = (
    "triton", "jax_triton", "torch", "libtpu", "rich", "sklearn", "matplotlib", "optax",
    "hypothesis", "pytest", "ml_collections",
)  # fmt: skip


def _python(code: str, cwd: pathlib.Path | None = None) -> str:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True,
        env=environment, cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_works_without_optional_packages():
    out = _python(f"""if True:
        import importlib.abc, sys
        class Absent(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name.split(".")[0] in {OPTIONAL!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        import flax.nnx  # may use what it likes
        before = set(sys.modules)
        for name in list(sys.modules):
            if name.split(".")[0] in {OPTIONAL!r}:
                del sys.modules[name]
        sys.meta_path.insert(0, Absent())
        import jax.numpy as jnp
        import conv_pallas, conv_pallas.nn
        from flax import nnx
        layer = conv_pallas.nn.Conv(2, 2, 3, padding="CAUSAL", rngs=nnx.Rngs(0))
        print(layer(jnp.ones((1, 4, 2))).shape)
        chosen = conv_pallas.explain(layer, jnp.ones((1, 4, 2))).chosen["conv1d"]
        print(chosen in conv_pallas.dispatch.names())
        print([n for n in {OPTIONAL!r} if n in sys.modules and n not in before])
    """)
    assert out.splitlines() == ["(1, 4, 2)", "True", "[]"]


def test_importing_does_not_import_kernels_nor_start_a_backend():
    out = _python("""if True:
        import sys
        import flax.nnx
        before = set(sys.modules)
        import conv_pallas, conv_pallas.nn
        from jax._src import xla_bridge
        print(xla_bridge.backends_are_initialized())
        print(*sorted(set(sys.modules) - before))
    """)
    initialized, new = out.splitlines()
    assert initialized == "False"
    assert "conv_pallas.nn.conv" in new
    for name in new.split():
        assert name.split(".")[0] not in OPTIONAL
        assert not name.startswith(("conv_pallas.kernels.", "jax.experimental.pallas"))


def test_takes_no_time_over_importing_flax():
    """Of processor time a seventh at most, in the best of three tries.

    With JAX 0.12 it is a twentieth, and with 0.11.2 an eighth, most of it JAX's own.
    """
    code = """if True:
        import time
        begun = time.process_time()
        import flax.nnx, jax
        start = time.process_time()
        import conv_pallas, conv_pallas.nn
        print((time.process_time() - start) / (start - begun))
    """
    assert any(float(_python(code)) < 1 / 7 for _ in range(3))


ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path):
    """What a clone has of the package, somewhere else."""
    for folder in ("conv_pallas", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for file in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


def test_a_checkout_has_its_own_kernels(checkout):
    """Imported as it lies, as it is from its folder by whoever installed it elsewhere."""
    out = _python("from conv_pallas import kernels; print(*kernels.__path__)", cwd=checkout)
    assert out.strip() == str(checkout / "kernels")


def test_a_build_leaves_no_kernel_of_an_earlier_one(checkout):
    built = checkout / "build/lib/conv_pallas/kernels"
    built.mkdir(parents=True)
    (built / "gone.py").touch()
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py"], cwd=checkout, check=True,
        capture_output=True,
    )  # fmt: skip
    assert (built / "xla.py").exists() and not (built / "gone.py").exists()


def test_public_names():
    import conv_pallas
    from conv_pallas import nn

    for module in (conv_pallas, nn):
        assert all(hasattr(module, name) for name in module.__all__)
    assert {"conv1d", "conv_general_dilated", "explain"} <= set(conv_pallas.__all__)
    assert {"Conv", "ConvTranspose", "replace_convs", "TCN"} <= set(nn.__all__)


def test_finding_the_kernels_leaves_every_compiled_function_valid():
    """What they import must not change the context that the caches of jit are keyed by."""
    script = (
        "import conv_pallas.nn; from jax._src import config; before = config.trace_context();"
        "from conv_pallas import kernels; kernels.discover();"
        "assert len(config.trace_context()) == len(before)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


PUBLIC = (
    "jax", "jax.core", "jax.dtypes", "jax.experimental.checkify", "jax.extend.core",
    "jax.interpreters.ad", "jax.interpreters.batching", "jax.interpreters.mlir",
    "jax.interpreters.partial_eval", "jax.interpreters.xla", "jax.lax", "jax.sharding",
)  # fmt: skip
# Of a module of which `primitives` needs something private as well.
BESIDE = {"bdim_at_front", "fancy_primitive_batchers"}


def _private_names(source: str):
    """What a file takes from `jax._src`: each name, and what it stands for."""
    tree, modules = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("jax._src"):
            for name in node.names:
                value = getattr(importlib.import_module(node.module), name.name)
                modules[name.asname or name.name] = value
                yield name.name, value
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in modules:
                yield node.attr, getattr(modules[node.value.id], node.attr)


def _public(name: str):
    """What goes by that name in public, but for what goes with a warning."""
    for module in map(importlib.import_module, PUBLIC):
        with warnings.catch_warnings(action="error"):
            try:
                yield f"{module.__name__}.{name}", getattr(module, name)
            except (AttributeError, DeprecationWarning):
                pass


FILES = sorted((pathlib.Path(__file__).parents[1] / "conv_pallas").rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_nothing_private_of_jax_that_is_public_too(file):
    for name, value in _private_names(file.read_text(encoding="utf-8")):
        if name not in BESIDE:
            assert not [where for where, other in _public(name) if other is value]
