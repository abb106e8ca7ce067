"""``python -m conv_pallas demo``, as somebody types it."""

import signal
import subprocess
import sys

import pytest

from conv_pallas.__main__ import main
from tests.support import environment, heeding_ctrl_c

pytestmark = pytest.mark.usefixtures("hardly_optimized")

DEMO = [sys.executable, "-m", "conv_pallas", "demo"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def demo(tmp_path):
    def run(*arguments, **more):
        return subprocess.run(
            [*DEMO, *arguments], cwd=tmp_path, env=environment() | more, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip

    return run


def test_quick(demo, tmp_path):
    done = demo("--quick", "--epochs", "1", "--output", "out/pictures")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    assert "test accuracy" in done.stdout
    assert "outputs against stock nnx.Conv: same" in done.stdout
    assert "gradients against stock nnx.Conv: same" in done.stdout
    assert "tcn-music/D8" in done.stdout and "training step" in done.stdout
    assert done.stdout.count("tcn-music/D8, ") == 2  # as it goes: nobody sees a bar there
    assert "\x1b" not in done.stdout  # colours and bars are for terminals
    for name in ("training.png", "speedup.png"):
        assert (tmp_path / "out/pictures" / name).read_bytes().startswith(PNG)


def test_ctrl_c(tmp_path):
    process = subprocess.Popen(
        heeding_ctrl_c([*DEMO, "--quick"]), cwd=tmp_path, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert "JAX" in process.stdout.readline()  # it has begun
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.strip() == "interrupted"


def test_help(demo):
    done = demo("--help")
    assert done.returncode == 0
    for option in ("--epochs", "--seed", "--output", "--implementation", "--quick"):
        assert option in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", "0"), "--epochs: must be an int of 1 or more, got '0'"),
        (("--implementation", "unheard_of"), "--implementation: implementation must be"),
        (("--output", "/dev/null/x"), "--output must be a folder"),
        (("--quick", "--implementation", "pallas_tpu"), "'pallas_tpu' can't run"),
    ],
    ids=str,
)
def test_bad_options(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["demo", *arguments])
    except SystemExit as leaving:
        status = leaving.code
    errors = capsys.readouterr().err
    assert status in (1, 2)
    assert message in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_missing_extra(demo, tmp_path):
    """A module in the way stands for one that is not there."""
    (tmp_path / "optax.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'optax'\", name='optax')"
    )
    done = demo("--quick", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "needs optax" in line and "pip install '.[demo]'" in line
