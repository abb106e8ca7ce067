"""A machine with a GPU, for `tune`, where there is none."""

import zlib

import jax
import jax.numpy as jnp
import pytest

from conv_pallas import _host, _tuning_gpu, aot, explanation
from conv_pallas.kernels import xla_tuned


@pytest.fixture
def h200(monkeypatch, tuned):
    """A machine with an H200, as far as `tune` looks; its clock is this dictionary."""
    seconds = {}

    def lowered(program, arguments):
        structs = jax.tree.map(lambda a: aot.struct(a.shape, a.dtype), arguments)
        return aot.lower_for("h200", _tuning_gpu._measure.several(program), *structs)

    monkeypatch.setattr(explanation, "default_platform", lambda: "cuda")
    monkeypatch.setattr(_host, "gpu", lambda: "NVIDIA H200")
    monkeypatch.setattr(_tuning_gpu, "_lowered", lowered)
    monkeypatch.setattr(_tuning_gpu, "_call", lambda lowered, arguments: lambda: jnp.zeros(()))
    monkeypatch.setattr(_tuning_gpu, "_held", lambda call: 0)
    monkeypatch.setattr(
        _tuning_gpu._measure, "interleaved",
        lambda calls, settings: {tile: (seconds.get(tile, 1.0),) for tile in calls},
    )  # fmt: skip
    monkeypatch.setattr(_tuning_gpu, "WALK_TILES", ((4, 64, 32, 4), (3, 64, 32, 4), (8, 64, 16, 4)))
    return seconds, tuned / "triton_tuned_nvidia-h200.json"


def _uncompiled(kernel, *args, out, **how):
    """In the place of `triton_compat.call`: what differs where that would, and takes no time."""
    told = zlib.crc32(repr(sorted((k, v) for k, v in how.items() if not callable(v))).encode())

    def triton():
        return jax.tree.map(lambda a: jnp.full(a.shape, told % 1000, a.dtype), out)

    return jax.jit(triton)()


@pytest.fixture
def uncompiled(monkeypatch):
    from conv_pallas.kernels import triton_compat  # which only who has Triton can import

    monkeypatch.setattr(triton_compat, "call", _uncompiled)


@pytest.fixture
def one_tile(h200, uncompiled, monkeypatch):
    monkeypatch.setattr(_tuning_gpu, "DENSE_TILES", ((64, 64, 32, 4, 3),))
    return h200


@pytest.fixture
def of_xla(one_tile, monkeypatch):
    """As `one_tile`, and XLA's time follows from the formulations that it is compiled of."""
    seconds, file = one_tile
    measured = []

    def interleaved(calls, settings):
        measured.append(list(calls))
        ahead = xla_tuned._trial.get()
        if ahead is None:  # what the file says
            found = xla_tuned.RECORDS["cuda"].content(_host.gpu())["formulations"]
            ahead = {key: entry["formulation"] for key, entry in found.items()}
        xla = max((seconds.get(name, 1.0) for name in ahead.values()), default=1.0)
        return {name: (seconds.get(name, xla if name == "xla" else 1.0),) for name in calls}

    monkeypatch.setattr(_tuning_gpu._measure, "interleaved", interleaved)
    return seconds, file, measured


@pytest.fixture
def names_of(monkeypatch):
    """Which of XLA's formulations something was lowered with, by `xla_tuned.trial`."""
    lowered, names = _tuning_gpu._lowered, []

    def spy(program, arguments):
        made = lowered(program, arguments)
        names.append((made, list((xla_tuned._trial.get() or {}).values())))
        return made

    monkeypatch.setattr(_tuning_gpu, "_lowered", spy)
    return lambda made: next(found for one, found in names if one is made)
