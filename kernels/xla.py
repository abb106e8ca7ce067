"""The convolution as XLA does it best: which formulation, for which operation, where.

The formulations themselves are in `xla_formulations.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from conv_pallas.kernels import Kernel
from conv_pallas.kernels.xla_formulations import FORWARD, KERNEL_GRAD, Numbers, flip
from conv_pallas.spec import Problem


def choose(problem: Problem) -> str:
    """The name of the formulation to take, of `FORWARD` or `KERNEL_GRAD`."""
    if problem.platform in ("cuda", "rocm"):
        return _choose_gpu(problem)
    if problem.depthwise:
        return "shifts"
    return "native"


def _choose_gpu(problem: Problem) -> str:
    if problem.depthwise:
        return "shifts"
    if problem.operation == "conv1d_kernel_grad" or problem.spec.kernel_size == 1:
        return "matmuls"
    return "barrier"


def numbers_of(problem: Problem) -> tuple[np.dtype, Numbers]:
    """The dtype of both operands, and how to calculate."""
    operand = jnp.promote_types(problem.lhs_dtype, problem.rhs_dtype)
    acc = jnp.promote_types(operand, problem.out_dtype)
    if jnp.issubdtype(acc, jnp.floating) and acc.itemsize < 4:
        acc = np.dtype(np.float32)
    if jnp.issubdtype(acc, jnp.floating) and not jnp.issubdtype(operand, jnp.floating):
        operand = acc  # integers whose result is to be a float
    return operand, Numbers(acc, problem.out_dtype, problem.precision)


def run_as(name: str, problem: Problem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The operation of ``problem`` by the formulation ``name``."""
    operand, numbers = numbers_of(problem)
    lhs, rhs = lhs.astype(operand), rhs.astype(operand)
    spec = problem.spec
    if problem.operation == "conv1d_kernel_grad":
        out = KERNEL_GRAD[name](lhs, rhs, spec, numbers)
    elif problem.operation == "conv1d_input_grad":
        out = FORWARD[name](lhs, flip(rhs, spec.groups), spec.transposed(), numbers)
    else:
        out = FORWARD[name](lhs, rhs, spec, numbers)
    return out.astype(problem.out_dtype)


def run(problem: Problem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    if 0 in problem.out_shape:
        return jnp.zeros(problem.out_shape, problem.out_dtype)
    return run_as(choose(problem), problem, lhs, rhs)


KERNEL = Kernel(
    implementation="xla",
    platforms=("cpu", "cuda", "rocm", "tpu"),
    run=run,
    decline=lambda problem: None,
    describe=choose,
    priority=0,
    vmappable=True,
)
