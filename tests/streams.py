"""What the tests of streaming share: models, chunkings, and how to run a stream."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from conv_pallas.nn import TCN


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def model_of(*, widths=(4, 6), out=3, K=3, seed=0, **options):
    """A small TCN in eval mode; batch norm has seen something."""
    model = TCN(3, widths, out, K, 0.1, nnx.Rngs(seed), **options)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.mean[...] = numbers(*module.mean.shape, seed=1) / 4
            module.var[...] = 1 + jnp.abs(numbers(*module.var.shape, seed=2))
            module.bias[...] = numbers(*module.bias.shape, seed=3).astype(module.bias.dtype)
        elif isinstance(module, nnx.Conv) and module.bias is not None:
            bias = numbers(*module.bias.shape, seed=4) / 4  # not zero: it shows
            module.bias[...] = bias.astype(module.bias.dtype)
    model.eval()
    return model


@functools.cache
def _compiled(graph, tree):
    def whole(leaves, x, keywords):
        return nnx.merge(graph, jax.tree.unflatten(tree, leaves))(x, **keywords)

    def step(leaves, x, state, keywords):
        return nnx.merge(graph, jax.tree.unflatten(tree, leaves)).step(x, state, **keywords)

    # Every case compiles anew, and none runs for long.
    quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(whole, compiler_options=quickly), jax.jit(step, compiler_options=quickly)


def functions(model):
    """The full pass and the step, compiled, as ``f(x, **keywords)``."""
    graph, variables = nnx.split(model)
    leaves, tree = jax.tree.flatten(variables)
    whole, step = _compiled(graph, tree)
    return (
        lambda x, **keywords: whole(leaves, x, keywords),
        lambda x, state, **keywords: step(leaves, x, state, keywords),
    )


def stream(step, state, x, chunks, **sequences):
    """The outputs of the chunks as one array, and the last state.

    Args:
      chunks: the length of each; their sum is x's.
      sequences: more arguments of the step, ``(N, T, ...)`` each, cut as x is.
    """
    out, start = [], 0
    for length in chunks:
        part = slice(start, start + length)
        y, state = step(x[:, part], state, **{k: v[:, part] for k, v in sequences.items()})
        out.append(np.asarray(y))
        start += length
    assert start == x.shape[1]
    return np.concatenate(out, 1), state


def with_tail(lookahead, x, **sequences):
    """x and its sequences, prolonged by what makes a delayed stream give its last outputs."""
    pad = lambda a: jnp.pad(a, ((0, 0), (0, lookahead)) + ((0, 0),) * (a.ndim - 2))  # noqa: E731
    if lookahead and "mask" not in sequences:
        sequences["mask"] = jnp.ones(x.shape[:2], bool)
    return pad(x), {name: pad(a) for name, a in sequences.items()}


def check(model, x, chunks, *, vector=None, rtol=2e-5, **sequences):
    """Asserts that the stream is the full pass, late by the lookahead."""
    whole, step = functions(model)
    late = model.lookahead
    fixed = {} if vector is None else {"condition": vector}
    expected = np.asarray(whole(x, **sequences, **fixed))
    longer, cut = with_tail(late, x, **sequences)
    last = [late] if late else []
    step = functools.partial(step, **fixed)
    got, _ = stream(step, model.init_state(x.shape[0]), longer, [*chunks, *last], **cut)
    assert not got[:, :late].any()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got[:, late:], expected, rtol=rtol, atol=rtol * scale)
