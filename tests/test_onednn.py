"""oneDNN's convolution in JAX programs: where it is called, where not, and why."""

import concurrent.futures
import dataclasses
import platform
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from conv_pallas import _host, conv1d, dispatch, explain
from conv_pallas.kernels import onednn
from conv_pallas.nn import Conv
from tests import onednn_random
from tests.cases import Case

HERE = pytest.mark.skipif(onednn.unavailable() is not None, reason=str(onednn.unavailable()))
BOTH = ("onednn", "xla")
CALL = "__onednn$convolution"
DENSE = Case("dense", T=37, C=24, O=40, D=5)


def _compiled(f, *arrays) -> str:
    return jax.jit(f).lower(*arrays).compile().as_text()


def _arrays():
    return map(jnp.asarray, DENSE.arrays()[:2])


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    """Whatever the environment says: where JAX keeps what it compiles oneDNN is not called."""
    for name in onednn.MODES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compilation_cache, "_cache", None)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def anywhere(monkeypatch):
    """As on Linux on x86, with a jaxlib that was tried."""
    monkeypatch.setattr(onednn, "unavailable", lambda: None)


@HERE
def test_forward_and_input_gradient_call_it_and_the_kernel_gradient_is_xlas():
    x, w = _arrays()
    f = lambda x, w: conv1d(x, w, kernel_dilation=5, implementation=BOTH)  # noqa: E731
    text = _compiled(f, x, w)
    assert text.count(f'custom_call_target="{CALL}"') == 1
    for moved in (" pad(", " copy(", " transpose(", " concatenate("):
        assert moved not in text, moved
    g = f(x, w)
    text = _compiled(lambda x, w, g: jax.vjp(f, x, w)[1](g), x, w, g)
    assert text.count(f'custom_call_target="{CALL}"') == 1
    dw = _compiled(lambda x, w, g: jax.vjp(f, x, w)[1](g)[1], x, w, g)
    assert CALL not in dw


@HERE
@pytest.mark.usefixtures("hardly_optimized")
def test_geometry_at_random_is_right(capsys):
    assert onednn_random.main(["--seed", "200300", "--cases", "150"]) == 0
    assert int(re.search(r"(\d+) right$", capsys.readouterr().out)[1]) >= 40


@HERE
def test_calls_that_nothing_orders_are_right():
    """They may run at once, of one program and of several threads."""
    x, (_, w) = jax.random.normal(jax.random.key(0), (4, 500, 24)), _arrays()
    kernels = [w * (i + 1) for i in range(6)]
    f = lambda order: jax.jit(  # noqa: E731
        lambda x, ws: [
            conv1d(x, w, kernel_dilation=i + 1, implementation=order) for i, w in enumerate(ws)
        ]
    )
    expected, run = f("xla_native")(x, kernels), f("onednn")
    assert _compiled(run, x, kernels).count(f'custom_call_target="{CALL}"') == 6
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        for came in threads.map(lambda _: run(x, kernels), range(60)):
            for a, b in zip(came, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3)


@HERE
def test_it_splits_over_a_mesh_and_under_vmap():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    w = jnp.asarray(DENSE.arrays()[1])
    x = jax.random.normal(jax.random.key(0), (8, 37, 24))
    f = lambda x, w: conv1d(x, w, kernel_dilation=5, implementation=BOTH)  # noqa: E731
    split = jax.device_put(x, NamedSharding(mesh, P("data")))
    text = _compiled(f, split, w)
    assert "f32[2,37,40]{2,1,0} custom-call" in text and "all-gather" not in text
    stock = conv1d(x, w, kernel_dilation=5, implementation="xla_native")
    np.testing.assert_allclose(jax.jit(f)(split, w), stock, rtol=1e-5, atol=1e-4)
    xs, kernels = jnp.stack([x, x, x]), jnp.stack([w, 2 * w, 3 * w])
    assert _compiled(jax.vmap(f), xs, kernels).count(f'custom_call_target="{CALL}"') == 1
    each = jax.jit(jax.vmap(f))(xs, kernels)
    np.testing.assert_allclose(each[2], 3 * stock, rtol=1e-5, atol=1e-4)


@HERE
def test_nothing_is_kept_that_cant_be_serialized(tmp_path, monkeypatch):
    x, w = _arrays()
    f = lambda x, w: conv1d(x, w, kernel_dilation=5, implementation=BOTH)  # noqa: E731
    assert CALL in _compiled(f, x, w)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))  # `nothing_kept` takes it back
    assert CALL not in _compiled(lambda x, w: f(x, w), x, w)
    order = lambda: jax.jit(lambda x, w: conv1d(x, w, implementation="onednn"))  # noqa: E731
    with pytest.raises(NotImplementedError, match="serialized"):
        order().lower(x, w)
    # Once JAX has a cache it uses that, whatever is said later.
    jax.config.update("jax_compilation_cache_dir", None)
    with pytest.raises(NotImplementedError, match="serialized"):
        order().lower(x, w)
    monkeypatch.setattr(compilation_cache, "_cache", None)
    order().lower(x, w)


def _reason(case: Case = DENSE, operation="conv1d", **changes) -> str | None:
    return onednn.decline(dataclasses.replace(case.problem(operation), **changes))


def test_it_says_why_not(anywhere, monkeypatch):
    change = lambda **fields: dataclasses.replace(DENSE, **fields)  # noqa: E731
    assert _reason() is None and _reason(operation="conv1d_input_grad") is None
    assert "no kernel gradients" in _reason(operation="conv1d_kernel_grad")
    assert "export" in _reason(exported=True)
    assert "float32 only" in _reason(change(dtype="bfloat16"))
    assert "float32 only" in _reason(out_dtype=np.dtype("float64"))
    assert "depthwise" in _reason(change(C=24, O=24, G=24))
    assert _reason(change(S=2)) is None
    assert "of a stride" in _reason(change(S=2), "conv1d_input_grad")
    assert "dilated input" in _reason(change(E=2, padding=3))
    assert "precisions" in _reason(precision=jax.lax.DotAlgorithmPreset.BF16_BF16_F32)
    for name in onednn.MODES:
        with monkeypatch.context() as context:
            context.setenv(name, "BF16")
            assert name in _reason()
            context.setenv(name, "strict")
            assert _reason() is None
    monkeypatch.setenv("XLA_FLAGS", f"{onednn.FLAG}=true")
    assert "XLA itself" in _reason()


def test_it_says_where_there_is_none(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(_host, "vectors", lambda: "avx2")
    monkeypatch.setattr(onednn.jaxlib.version, "__version__", onednn.TRIED[-1])
    assert onednn.unavailable() is None
    for change, word in (
        ((onednn.jaxlib.version, "__version__", "9.9.9"), "not with 9.9.9"),
        ((_host, "vectors", lambda: "avx"), "AVX2"),
        ((platform, "machine", lambda: "aarch64"), "x86"),
        ((sys, "platform", "darwin"), "Linux"),
    ):
        monkeypatch.setattr(*change)
        assert word in onednn.unavailable() and word in _reason()


def test_it_is_only_run_by_name(anywhere):
    kernel = dispatch.select(DENSE.problem("conv1d"), None)
    assert kernel.implementation != "onednn"
    layer = Conv(24, 40, 3, padding="CAUSAL", rngs=nnx.Rngs(0))
    told = str(explain(layer, jnp.ones((1, 37, 24))))
    assert "only when asked for by name: its programs can't be serialized" in told
    loss = lambda w: conv1d(jnp.ones((1, 37, 24)), w, implementation="onednn").sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="computes no kernel gradients"):
        jax.jit(jax.grad(loss)).lower(jnp.ones((3, 24, 40)))
