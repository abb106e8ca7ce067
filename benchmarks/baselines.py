"""Every way to compute a layer that a user has today, and ours: what the benchmarks compare.

A layer is ``activation(conv(x, kernel) + bias)``, the whole of it in each variant:

| name | what it is |
|---|---|
| ``stock`` | `flax.nnx.Conv`, then the activation |
| ``barrier`` | the padding written out behind an optimisation barrier, so that XLA can't fold it |
| ``symmetric`` | padding of equal amounts on both sides, and a slice of the result |
| ``matmuls`` | one matmul a tap of x shifted in time, added up; for depthwise a product a tap |
| ``conv_pallas`` | ours: `conv_pallas.conv1d` with bias and activation |
| ``torch`` | PyTorch's conv1d on its own layout (N, C, T), where PyTorch is installed |

    forward = build("barrier", layer)              # (x, kernel, bias) -> y
    step = training_step("barrier", layer)         # (x, kernel, bias, g) -> loss, (dx, dw, db)
    x, kernel, bias, g = arguments(layer)
    jax.jit(step)(x, kernel, bias, g)
    call, result = torch_program(layer, FORWARD, arguments(layer))   # PyTorch has no jit
"""

import dataclasses
import importlib.util
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from conv_pallas._layers import Layer
from conv_pallas._measure import FORWARD, OURS, STOCK
from conv_pallas.dispatch import Implementation
from conv_pallas.kernels.xla_padding import pad
from conv_pallas.spec import ConvSpec

BARRIER, SYMMETRIC, MATMULS, TORCH = "barrier", "symmetric", "matmuls", "torch"

# The first is what the others are compared with.
NAMES = (STOCK, BARRIER, SYMMETRIC, MATMULS, OURS, TORCH)

type Forward = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class NotApplicableError(Exception):
    """A baseline does not exist for a layer, or not on this machine; says why."""


def arguments(layer: Layer, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Random ``x (N, T, C)``, ``kernel (K, C//G, O)``, ``bias (O,)``, ``g (N, T', O)``.

    Zero mean, and a kernel scaled so that y is about as large as x.
    """
    rng = np.random.default_rng(seed)

    def normal(shape, scale=1.0):
        values = rng.standard_normal(shape, np.float32)
        return (values * np.float32(scale)).astype(jnp.dtype(layer.dtype))

    x = normal(layer.x_shape)
    kernel = normal(layer.kernel_shape, 1 / math.sqrt(layer.K * layer.C // layer.G))
    return x, kernel, normal((layer.O,)), normal(layer.y_shape)


def build(name: str, layer: Layer, implementation: Implementation = None) -> Forward:
    """The forward pass of a variant: ``(x, kernel, bias) -> y``.

    Args:
      implementation: of ours; the others know none.

    Raises:
      NotApplicableError: the variant does not exist for this layer.
      ValueError: there is no such variant.
    """
    if name not in _BUILDERS:
        raise ValueError(f"variant must be one of {', '.join(_BUILDERS)}, got {name!r}")
    if name == OURS:
        return layer.ours(implementation)
    return _BUILDERS[name](layer)


def training_step(name: str, layer: Layer, implementation: Implementation = None) -> Callable:
    """``(x, kernel, bias, g) -> loss, (dx, dkernel, dbias)`` of a variant.

    The loss is ``<g, y>``: it costs one pass over y, and hands g to the layer as the layers
    above it would. Raises as `build`.
    """
    return step_of(build(name, layer, implementation))


def step_of(forward: Forward) -> Callable:
    """The training step of a forward pass."""

    def loss(x, kernel, bias, g):
        y = forward(x, kernel, bias)
        return jnp.sum(y.astype(jnp.float32) * g.astype(jnp.float32))

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


# --- the variants --------------------------------------------------------------------------------


def _barrier(layer: Layer) -> Forward:
    spec, whole = layer.spec, dataclasses.replace(layer.spec, input_dilation=1)

    def forward(x, kernel, bias):
        padded = lax.optimization_barrier(pad(x, spec))
        return layer.activate(_convolve(padded, kernel, (0, 0), whole) + bias)

    return forward


def _symmetric(layer: Layer) -> Forward:
    spec = layer.spec
    low, high = spec.padding
    most = max(low, high)
    start, rest = divmod(most - low, spec.stride)
    if rest:
        raise NotApplicableError("its outputs fall between those of the layer")

    def forward(x, kernel, bias):
        y = _convolve(x, kernel, (most, most), spec)[:, start : start + spec.out_time]
        return layer.activate(y + bias)

    return forward


def _matmuls(layer: Layer) -> Forward:
    convolve = _shifted_matmuls(layer.spec, layer.G == layer.C == layer.O)
    return lambda x, kernel, bias: layer.activate(convolve(x, kernel) + bias)


def _shifted_matmuls(spec: ConvSpec, depthwise: bool) -> Callable:
    """``(x, kernel) -> y`` with sums in float32, in the gradients too.

    Left to autodiff each tap's share of dx would be rounded before it is added.
    """
    last = (spec.out_time - 1) * spec.stride + 1
    windows = [
        slice(start, start + last, spec.stride)
        for start in range(0, spec.kernel_size * spec.kernel_dilation, spec.kernel_dilation)
    ]
    G = spec.groups

    def product(equation, a, b):
        if depthwise:  # (n, t, g) by (n, t, g) or (g,): no sums but over n and t
            a, b = (v.astype(jnp.float32) for v in (a, b))
            return (a * b).sum((0, 1)) if equation == "ntgc,ntgo->gco" else a * b
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

    def by_group(a):
        return a if depthwise else a.reshape(*a.shape[:-1], G, -1)

    def of_groups(tap):  # (C/G, O) to (G, C/G, O/G); (1, G) to (G,)
        return tap[0] if depthwise else tap.reshape(tap.shape[0], G, -1).swapaxes(0, 1)

    def joined(y):
        return y if depthwise else y.reshape(*y.shape[:2], -1)

    @jax.custom_vjp
    def convolve(x, kernel):
        padded = pad(x, spec)
        taps = [
            product("ntgc,gco->ntgo", by_group(padded[:, window]), of_groups(kernel[k]))
            for k, window in enumerate(windows)
        ]
        return joined(sum(taps)).astype(x.dtype)

    def backward(residuals, gy):
        x, kernel = residuals
        padded = pad(x, spec)
        dx = jnp.zeros(padded.shape, jnp.float32)
        dw = []
        for k, window in enumerate(windows):
            share = product("ntgo,gco->ntgc", by_group(gy), of_groups(kernel[k]))
            dx = dx.at[:, window].add(joined(share))
            share = product("ntgc,ntgo->gco", by_group(padded[:, window]), by_group(gy))
            dw.append(share[None] if depthwise else share.swapaxes(0, 1))
        low = spec.padding[0]
        dx = dx[:, low : low + spec.dilated_time : spec.input_dilation].astype(x.dtype)
        return dx, jnp.stack(dw).reshape(kernel.shape).astype(kernel.dtype)

    convolve.defvjp(lambda x, kernel: (convolve(x, kernel), (x, kernel)), backward)
    return convolve


def _convolve(x, kernel, padding, spec: ConvSpec) -> jax.Array:
    """XLA's convolution with amounts of padding, and nothing else of the layer."""
    return lax.conv_general_dilated(
        x, kernel, (spec.stride,), (padding,), (spec.input_dilation,), (spec.kernel_dilation,),
        ("NWC", "WIO", "NWC"), spec.groups,
    )  # fmt: skip


_BUILDERS: dict[str, Callable[[Layer], Forward]] = {
    STOCK: Layer.stock,
    BARRIER: _barrier,
    SYMMETRIC: _symmetric,
    MATMULS: _matmuls,
    OURS: Layer.ours,
}


# --- PyTorch -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Queued:
    """What `jax.block_until_ready` asks to wait."""

    block_until_ready: Callable[[], None]


def torch_program(
    layer: Layer, which: str, arrays: tuple[np.ndarray, ...]
) -> tuple[Callable[[], _Queued | None], Callable[[], tuple[np.ndarray, ...]]]:
    """A pass of the layer in PyTorch, on the GPU where PyTorch sees one.

    Its conv1d in its own layout, cudnn.benchmark on, TF32 allowed for float32 as it is in JAX.
    What is done beforehand is not timed: the arrays are on the device, and transposed.

    Args:
      arrays: from `arguments`.

    Returns:
      A call, of which `jax.block_until_ready` awaits the result, so that calls queue up as JAX's
      do; and a function that gives its result: ``(y,)`` or ``(dx, dkernel, dbias)``, in our
      layouts.

    Raises:
      NotApplicableError: PyTorch is not installed, or has no such layer.
    """
    if importlib.util.find_spec("torch") is None:
        raise NotApplicableError("PyTorch is not installed")
    import torch
    import torch.nn.functional as F

    activations = {
        None: lambda y: y, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh,
        "sigmoid": torch.sigmoid, "gelu": lambda y: F.gelu(y, approximate="tanh"),
        "gelu_exact": F.gelu,
    }  # fmt: skip
    if layer.activation not in activations:
        raise NotApplicableError(f"PyTorch has no activation {layer.activation!r}")
    if layer.E > 1:
        raise NotApplicableError("PyTorch's conv1d has no dilation of the input")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = True
    dtype = getattr(torch, layer.dtype)
    spec = layer.spec
    low, high = spec.padding

    def tensor(a, *axes):
        a = np.ascontiguousarray(np.asarray(a, np.float32).transpose(axes))
        return torch.from_numpy(a).to(device=device, dtype=dtype)

    x, kernel, bias, g = arrays
    x, kernel, bias, g = (  # (N, C, T), (O, C/G, K), (O,), (N, O, T')
        tensor(x, 0, 2, 1), tensor(kernel, 2, 1, 0), tensor(bias, 0), tensor(g, 0, 2, 1)
    )  # fmt: skip
    padding = low if low == high else 0

    def forward(x, kernel, bias):
        if low != high:
            x = F.pad(x, (low, high))
        y = F.conv1d(x, kernel, bias, layer.S, padding, layer.D, layer.G)
        return activations[layer.activation](y)

    latest = []

    def call():
        latest.clear()
        if which == FORWARD:
            with torch.no_grad():
                latest.append(forward(x, kernel, bias))
        else:
            latest.extend(torch.autograd.grad(forward(*leaves), leaves, g))
        return _Queued(torch.cuda.synchronize) if device == "cuda" else None

    leaves = [a.requires_grad_(which != FORWARD) for a in (x, kernel, bias)]

    def result():
        call()
        out = [a.detach().float().cpu().numpy().astype(arrays[0].dtype) for a in latest]
        axes = [(0, 2, 1)] if which == FORWARD else [(0, 2, 1), (2, 1, 0), (0,)]
        return tuple(a.transpose(order) for a, order in zip(out, axes, strict=True))

    return call, result
