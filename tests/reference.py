"""The operations and the activations in float64 NumPy, written plainly from their formulas.

    y[n, u, o] = sum over k, c of  xE[n, u*S + k*D - low, c] * w[k, c, o]

which is that of `ConvSpec`. Arrays are ``x (N, T, C)``, ``w (K, C//G, O)`` and ``y, g (N, T', O)``.
"""

import math

import numpy as np

from conv_pallas.spec import ConvSpec


def steps(spec: ConvSpec, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The outputs u that see a step of x through tap k, and the step t that each sees."""
    u = np.arange(spec.out_time)
    position = u * spec.stride + k * spec.kernel_dilation - spec.padding[0]  # in xE
    t = position // spec.input_dilation
    real = (position % spec.input_dilation == 0) & (t >= 0) & (t < spec.time)
    return u[real], t[real]


def _grouped(a: np.ndarray, groups: int) -> np.ndarray:
    """``(..., C)`` to ``(..., G, C//G)`` in float64."""
    return np.asarray(a, np.float64).reshape(*a.shape[:-1], groups, a.shape[-1] // groups)


def conv1d_reference(x: np.ndarray, w: np.ndarray, spec: ConvSpec) -> np.ndarray:
    """``y[u] += x[t] w[k]`` wherever tap k of output u sees step t."""
    N, O, G = x.shape[0], w.shape[2], spec.groups
    y = np.zeros((N, spec.out_time, G, O // G))
    for k in range(spec.kernel_size):
        u, t = steps(spec, k)
        y[:, u] += np.einsum("ntgc,cgo->ntgo", _grouped(x, G)[:, t], _grouped(w[k], G))
    return y.reshape(N, spec.out_time, O)


def input_grad_reference(g: np.ndarray, w: np.ndarray, spec: ConvSpec) -> np.ndarray:
    """``dx[t] += g[u] w[k]^T`` wherever tap k of output u sees step t."""
    N, G, c = g.shape[0], spec.groups, w.shape[1]
    dx = np.zeros((N, spec.time, G, c))
    for k in range(spec.kernel_size):
        u, t = steps(spec, k)
        dx[:, t] += np.einsum("nugo,cgo->nugc", _grouped(g, G)[:, u], _grouped(w[k], G))
    return dx.reshape(N, spec.time, G * c)


def kernel_grad_reference(x: np.ndarray, g: np.ndarray, spec: ConvSpec) -> np.ndarray:
    """``dw[k] += x[t]^T g[u]`` wherever tap k of output u sees step t."""
    G, C, O = spec.groups, x.shape[2], g.shape[2]
    dw = np.zeros((spec.kernel_size, C // G, G, O // G))
    for k in range(spec.kernel_size):
        u, t = steps(spec, k)
        dw[k] = np.einsum("nugc,nugo->cgo", _grouped(x, G)[:, t], _grouped(g, G)[:, u])
    return dw.reshape(spec.kernel_size, C // G, O)


_erf = np.vectorize(math.erf, otypes=[float])
_sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
_A, _B = math.sqrt(2 / math.pi), 0.044715
_inner = lambda z: np.tanh(_A * (z + _B * z**3))  # noqa: E731

# Activations, and their slopes.
VALUES = {
    None: lambda z: z,
    "relu": lambda z: np.where(z < 0, 0, z),
    "gelu": lambda z: 0.5 * z * (1 + _inner(z)),
    "gelu_exact": lambda z: 0.5 * z * (1 + _erf(z / math.sqrt(2))),
    "silu": lambda z: z * _sigmoid(z),
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
}
SLOPES = {
    None: np.ones_like,
    "relu": lambda z: (z > 0).astype(float),
    "gelu": lambda z: (
        0.5 * (1 + _inner(z)) + 0.5 * z * (1 - _inner(z) ** 2) * _A * (1 + 3 * _B * z**2)
    ),
    "gelu_exact": lambda z: (
        0.5 * (1 + _erf(z / math.sqrt(2))) + z * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    ),
    "silu": lambda z: _sigmoid(z) * (1 + z * (1 - _sigmoid(z))),
    "tanh": lambda z: 1 - np.tanh(z) ** 2,
    "sigmoid": lambda z: _sigmoid(z) * (1 - _sigmoid(z)),
}
# How fast values and slopes change, at most; but for the slope of relu.
STEEPEST = 1.2
