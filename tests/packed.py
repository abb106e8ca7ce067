"""Kernels of packed sequences, of which each output sees some taps: against the formula in float64.

    z[u] = bias + sum over the taps k that output u sees of  x[u + k*D - low] * w[k]

with its activation and its gradients, as `tests.triton_epilogue` has them of all taps.
"""

from collections.abc import Callable
from unittest import mock

import numpy as np

from tests.reference import SLOPES, VALUES, steps
from tests.tolerance import REFERENCES
from tests.triton_epilogue import Fused


def check(kernel, case: Fused, wrap: Callable = lambda f: f) -> None:
    """Checks `Kernel.packed` and `Kernel.packed_backward` with bits drawn at random.

    Args:
      wrap: `jax.jit`, or nothing.
    """
    spec, rng = case.case.spec, np.random.default_rng(2)
    x, w, bias, gy, _ = case.arrays()
    sees = rng.integers(0, 2**spec.kernel_size, gy.shape[:2]).astype(np.int32)
    kind = rng.integers(0, 6, sees.shape)
    sees[kind == 0], sees[kind == 1] = 0, -1  # with bits of no tap
    hidden = rng.integers(0, 6, x.shape[:2]) == 0  # among steps that are seen
    met = np.zeros_like(hidden)
    for k in range(spec.kernel_size):
        u, t = steps(spec, k)
        sees[:, u] &= ~(hidden[:, t].astype(np.int32) << k)
        met[:, t] |= (sees[:, u] >> k & 1).astype(bool)
    assert met.any() and not met.all()
    x[~met] = rng.choice(np.array([np.nan, np.inf, -np.inf]), x[~met].shape)
    with mock.patch.dict(REFERENCES, references(sees)), np.errstate(all="ignore"):
        y, grads = _run(kernel, case, wrap, x, w, bias, gy, sees)
        case.check_forward(np.asarray(y), x, w, bias)
        case.check_backward([g if g is None else np.asarray(g) for g in grads], x, w, bias, gy)
        if case.activation not in (None, "silu"):
            return
        # And what some of them see reaches those alone.
        inside, met = np.zeros_like(sees), np.zeros_like(met)
        for k in range(spec.kernel_size):
            u, t = steps(spec, k)
            inside[:, u] |= 1 << k
            met[:, t] |= (sees[:, u] >> k & 1).astype(bool)
        sees &= inside  # as zero times infinity is NaN
        for c in range(min(x.shape[2], gy.shape[2]) // 4):
            n, u = c % len(x), np.arange(gy.shape[1])
            if not case.problem().depthwise:  # where a tap meets padding, matmuls may pass it over
                u = np.flatnonzero((sees[n] != 0) & (inside[n] == 2**spec.kernel_size - 1))
            x[n, rng.choice(np.flatnonzero(met[n])), 4 * c] = np.nan
            gy[n, rng.choice(u), 4 * c + 1] = np.nan
            if case.problem().depthwise:  # what a matmul does not see is zero, and times infinity
                w[rng.choice(len(w)), 0, 4 * c + 2] = np.inf
        _check_finite(case, _run(kernel, case, wrap, x, w, bias, gy, sees), x, w, bias, gy)


def _check_finite(case: Fused, got, x, w, bias, gy) -> None:
    """Finite is what should be."""
    y, grads = got
    z = REFERENCES["conv1d"](x, w, case.case.spec)
    z = z if bias is None else z + bias.astype(float)
    gz = gy.astype(float) * SLOPES[case.activation](z)
    dx = REFERENCES["conv1d_input_grad"](gz, w, case.case.spec)
    dw = REFERENCES["conv1d_kernel_grad"](x, gz, case.case.spec)
    if not case.problem().depthwise:
        dw += 0 * gz.sum((0, 1))  # nor is zero times NaN
    expected = (VALUES[case.activation](z), dx, dw, gz.sum((0, 1)))
    for found, value in zip((y, *grads), expected, strict=True):
        if found is not None:
            value = np.isfinite(value)
            assert not value.all()
            np.testing.assert_array_equal(np.isfinite(np.asarray(found, float)), value)


def _run(kernel, case: Fused, wrap, x, w, bias, gy, sees):
    """y, and the gradients."""
    problem = case.problem()
    assert kernel.decline_packed(problem) is None
    forward = wrap(lambda *a: kernel.packed(problem, *a))
    backward = wrap(lambda *a: kernel.packed_backward(problem, *a, case.wanted))
    return forward(x, w, bias, sees), backward(x, w, bias, sees, gy)


def references(sees: np.ndarray) -> dict[str, Callable]:
    """As `tests.reference`, of what is seen."""

    def each(spec):
        for k in range(spec.kernel_size):
            u, t = steps(spec, k)
            seen = (sees[:, u] >> k & 1).astype(bool)[..., None, None]
            yield k, u, t, lambda product, seen=seen: np.where(seen, product, 0)

    def of_groups(a, groups):
        """Its channels as ``(groups, of each)``."""
        return a.astype(float).reshape(*a.shape[:-1], groups, a.shape[-1] // groups)

    # Products of numbers, and not of matrices: zero times infinity is not to be told.
    def forward(x, w, spec):
        G, O = spec.groups, w.shape[2]
        x, w, y = of_groups(x, G), of_groups(w, G), np.zeros((*sees.shape, G, O // G))
        for k, u, t, of_seen in each(spec):
            for c in range(x.shape[3]):
                y[:, u] += of_seen(x[:, t][..., c, None] * w[k, c])
        return y.reshape(*sees.shape, O)

    def input_grad(g, w, spec):
        G, c = spec.groups, w.shape[1]
        g, w, dx = of_groups(g, G), of_groups(w, G), np.zeros((len(g), spec.time, G, c))
        for k, u, t, of_seen in each(spec):
            for o in range(g.shape[3]):
                dx[:, t] += of_seen(g[:, u][..., o, None] * w[k, :, :, o].T)
        return dx.reshape(*dx.shape[:2], G * c)

    def kernel_grad(x, g, spec):
        G = spec.groups
        x, g = of_groups(x, G), of_groups(g, G)
        dw = np.zeros((spec.kernel_size, x.shape[3], G, g.shape[3]))
        for k, u, t, of_seen in each(spec):
            for c in range(x.shape[3]):
                dw[k, c] = of_seen(x[:, t][..., c, None] * g[:, u]).sum((0, 1))
        return dw.reshape(*dw.shape[:2], -1)

    return dict(zip(REFERENCES, (forward, input_grad, kernel_grad), strict=True))
