"""Activations and their derivatives as device code of TPU kernels, in float32.

Forward, ``y = f(z)``; backward, ``gz = gy * f'(z)``, where f' is computed from what
`Epilogue.saved` names: y, or z.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from conv_pallas.kernels import Kernel
from conv_pallas.kernels.tpu_window import Chip, rows_of
from conv_pallas.spec import OPERATIONS, Problem

_A, _B = math.sqrt(2 / math.pi), 0.044715  # of the approximate GELU
_ROOT = math.sqrt(0.5)


def _gelu_slope(z):
    t = jnp.tanh(_A * (z + _B * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * _A * (1 + 3 * _B * z * z)


def _gelu_exact_slope(z):
    density = jnp.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + lax.erf(z * _ROOT)) + z * density


def _sigmoid(z):
    """To within 2e-7: far below zero, where it is less itself, it has fewer digits, or is 0.

    The newer chips have an instruction for ``sigmoid(z) - 1/2``, the older ones for tanh; there an
    exact division takes four bundles more for each register.
    """
    if Chip.current().name in ("v6e", "7x"):
        return jax.nn.sigmoid(z)
    return 0.5 + 0.5 * jnp.tanh(0.5 * z)


def _silu_slope(z):
    s = _sigmoid(z)
    return s * (1 + z * (1 - s))


VALUES = {
    "relu": lambda z: jnp.maximum(z, 0.0),
    "gelu": lambda z: 0.5 * z * (1 + jnp.tanh(_A * (z + _B * z**3))),
    "gelu_exact": lambda z: 0.5 * z * (1 + lax.erf(z * _ROOT)),
    "silu": lambda z: z * _sigmoid(z),
    "tanh": jnp.tanh,
    "sigmoid": _sigmoid,
}

# Of what was saved: y for those whose slope is a function of it, z for the others.
SLOPES = {
    "gelu": _gelu_slope,
    "gelu_exact": _gelu_exact_slope,
    "silu": _silu_slope,
    "tanh": lambda y: 1 - y * y,
    "sigmoid": lambda y: y * (1 - y),
}


def value(activation: str | None, z: jax.Array) -> jax.Array:
    """``f(z)`` of a float32 z."""
    return z if activation is None else VALUES[activation](z)


def gradient(activation: str | None, gy: jax.Array, saved: jax.Array) -> jax.Array:
    """``gz`` in float32."""
    gy, saved = gy.astype(jnp.float32), saved.astype(jnp.float32)
    if activation == "relu":
        return jnp.where(saved > 0, gy, 0.0)
    return gy * SLOPES[activation](saved)


@dataclasses.dataclass(frozen=True)
class Around:
    """What is fused around a product.

    Attributes:
      bias: forward, whether one is added; kernel gradient, whether its gradient is summed.
      value_of: the activation of the result.
      slope_of: the activation whose derivative the incoming gradient is multiplied by.
      keep: forward, whether what the activation is applied to is a second result.
    """

    bias: bool = False
    value_of: str | None = None
    slope_of: str | None = None
    keep: bool = False

    @classmethod
    def of(cls, problem: Problem, bias: bool) -> "Around":
        """``bias``: whether one is added, or its gradient summed."""
        epilogue = problem.epilogue
        if problem.operation == "conv1d":
            return cls(bias, value_of=epilogue.activation, keep=epilogue.keep)
        return cls(bias, slope_of=epilogue.activation)

    def like(self, out):
        """``out`` for each result of a forward kernel: alone, or once more for what is kept."""
        return [out, out] if self.keep else out


def store(around: Around, z: jax.Array, refs, where) -> None:
    """Each result of a forward kernel, rounded once; ``refs`` are those of y and what is kept."""
    for ref, a in zip(refs, (value(around.value_of, z), z), strict=False):
        ref[where] = a.astype(ref.dtype)


def rows_of_gradient(around: Around, g_ref, saved_ref):
    """``load(at, n)``: rows of g, or of gz where it is to be computed; of ``(rows, channels)``."""
    if around.slope_of is None:
        return rows_of(g_ref)
    rows = (rows_of(g_ref), rows_of(saved_ref))
    return lambda at, n: gradient(around.slope_of, *(load(at, n) for load in rows))


def bias_gradient(activation: str | None, gy: jax.Array, saved: jax.Array | None) -> jax.Array:
    """db ``(O,)`` in float32, by XLA: where no kernel gradient is there to carry it."""
    gz = gy if activation is None else gradient(activation, gy, saved)
    return gz.astype(jnp.float32).sum((0, 1))


# --- The hooks of `Kernel`, given a kernel's own `launch` ---


def fused(launch, problem: Problem, x, w, bias, *, chip: Chip | None = None, **options):
    """``activation(conv(x, w) + bias)``; see `Kernel.fused`."""
    return launch(problem, x, w, chip or Chip.of(problem), bias=bias, **options)


def backward(
    launch, problem: Problem, x, w, bias, saved, gy, wanted, *, chip: Chip | None = None, **options
):
    """``(dx, dw, db)``; see `Kernel.backward`. Each kernel computes gz as it reads gy."""
    chip = chip or Chip.of(problem)
    dx = dw = db = None
    want_dx, want_dw, want_db = wanted
    want_db = want_db and bias is not None
    if want_dx:
        part = problem.gradient("conv1d_input_grad")
        dx = launch(part, gy, w, chip, saved=saved, **options)
    if want_dw:
        part = problem.gradient("conv1d_kernel_grad")
        dw = launch(part, x, gy, chip, saved=saved, sum_bias=want_db, **options)
        dw, db = dw if want_db else (dw, None)
    elif want_db:
        db = bias_gradient(problem.epilogue.activation, gy, saved)
    return dx, dw, db


def keeps(plan_of, problem: Problem) -> bool:
    return plan_of(problem, Chip.of(problem)) is not None


def decline_backward(plan_of, problem: Problem, wanted: tuple[bool, bool, bool]) -> str | None:
    saved, chip = problem.epilogue.activation is not None, Chip.of(problem)
    for needed, operation in zip(wanted, OPERATIONS[1:], strict=False):
        if needed and plan_of(problem.gradient(operation), chip, saved=saved) is None:
            return "the halo does not fit in VMEM with what was saved"
    return None


def kernel(plan_of, launch, **own) -> Kernel:
    """The `Kernel` of a module.

    Args:
      plan_of: ``plan_of(problem, chip, saved=saved)``, its tiles; None where they don't fit.
      launch: ``launch(problem, lhs, rhs, chip, ...)``, as `conv_pallas.kernels.tpu_matmul.launch`.
      own: the other fields that differ.
    """
    return Kernel(
        implementation="pallas_tpu",
        platforms=("tpu",),
        run=lambda problem, lhs, rhs: launch(problem, lhs, rhs, Chip.of(problem)),
        fused=functools.partial(fused, launch),
        backward=functools.partial(backward, launch),
        decline_backward=functools.partial(decline_backward, plan_of),
        keeps=functools.partial(keeps, plan_of),
        opaque=True,
        **own,
    )
