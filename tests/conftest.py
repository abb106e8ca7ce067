"""Eight CPU devices for every test, whatever the machine and the environment."""

import os
import pathlib
import sys

import hypothesis
import pytest

from tests import sampling

assert "jax" not in sys.modules, "XLA reads its flags once, when jax is imported"

os.environ["JAX_PLATFORMS"] = "cpu"
# LLVM gets a small program whole: cut in 32, as is the default for more threads than there are
# here, those of many small kernels take a fifth longer to compile.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_cpu_parallel_codegen_split_count=1"
)
os.environ.pop("CONV_PALLAS_IMPLEMENTATION", None)
os.environ.pop("JAX_ENABLE_X64", None)

# Compiling takes its time, so that a deadline would only tell how busy the machine is. The
# same examples in every run: what fails in CI fails everywhere.
hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=40, database=None
)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser):
    parser.addoption(
        "--part",
        choices=sampling.CHOICES,
        help="of the rows of tests marked `sampled`, those to run. By default the commit chooses "
        "where everything is run, and all run where files, names, -k or --lf are given.",
    )


def pytest_configure(config):
    _choose_part(config)
    _check_environment()


def _choose_part(config):
    """Once, here: processes that run tests side by side get the options as they are then."""
    option = config.option
    if option.part is None:
        named = config.args_source is pytest.Config.ArgsSource.ARGS or option.keyword
        again = getattr(option, "lf", False)  # what failed last, maybe of another commit's part
        option.part = sampling.ALL if named or again else sampling.of_commit(config.rootpath)


def pytest_report_header(config):
    if config.option.part != sampling.ALL:
        return (
            f"part {config.option.part} of {sampling.PARTS} of what is marked `sampled`; "
            f"--part {sampling.ALL} runs the rest too"
        )


def _check_environment():
    """An environment that was made for another checkout would test that one's kernels."""
    from conv_pallas import kernels

    here = pathlib.Path(__file__).parents[1] / "kernels"
    found = pathlib.Path(kernels.__path__[0])
    if not found.samefile(here):
        raise pytest.UsageError(
            f"conv_pallas.kernels is {found}, not {here}: pip install -e . in this folder"
        )


@pytest.fixture(scope="session", autouse=True)
def untuned():
    """What somebody's `tune` found on this CPU would be tested in the place of the rules.

    And those are the rules of one processor, whichever this is.
    """
    from conv_pallas import _host
    from conv_pallas.kernels import xla_tuned

    kind, no_cpu = xla_tuned.kind, "a CPU that nobody tuned"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla_tuned, "kind", lambda p: no_cpu if p == "cpu" else kind(p))
        patch.setattr(_host, "vectors", lambda: "avx512_bf16")
        yield


@pytest.fixture
def shipped(monkeypatch):
    """For tests of the defaults: without the kernels that somebody has added.

    What such a test adds stays.
    """
    from conv_pallas import kernels
    from tests.support import shipped_alone

    monkeypatch.setattr(kernels, "discover", shipped_alone())


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """A folder for what `tune` finds, instead of the kernels'."""
    from conv_pallas.kernels import records

    monkeypatch.setattr(records, "FOLDER", tmp_path)
    monkeypatch.delenv(records.ENVIRONMENT_VARIABLE, raising=False)
    records.forget()
    yield tmp_path
    records.forget()


@pytest.fixture(scope="module")
def hardly_optimized():
    """For modules about networks, transforms and interfaces: a third of their time is LLVM's.

    What XLA's optimizations make of each operation, the others show.
    """
    import jax

    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name.upper(), "1")  # for processes of their own
        yield
    jax.config.update(name, before)


# Those of ten seconds to half a minute; begun last, one would leave the other workers idle.
LONG = ("test_triton_interpreter.py", "test_flax[", "test_demo.py::test_quick")


def pytest_collection_modifyitems(config, items):
    sampling.deselect(config, items, config.option.part)
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONG))


def pytest_make_parametrize_id(val):
    """A function by its name: its address differs from one worker to the next."""
    if callable(val) and not isinstance(val, type):
        return getattr(val, "__name__", type(val).__name__)
    return None
