"""The convolution as XLA does it best: which formulation, for which operation, where.

The formulations themselves are in `xla_formulations.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from conv_pallas.kernels import Kernel
from conv_pallas.kernels.xla_formulations import FORWARD, KERNEL_GRAD, Numbers, flip
from conv_pallas.spec import Problem


def choose(problem: Problem) -> str:
    """The name of the formulation to take, of `FORWARD` or `KERNEL_GRAD`."""
    if problem.platform in ("cuda", "rocm"):
        return _choose_gpu(problem)
    if problem.platform == "tpu":
        return "shifts" if problem.depthwise else "native"
    if problem.operation == "conv1d_kernel_grad":
        return _choose_cpu_kernel_grad(problem)
    return _choose_cpu_forward(problem)


def _choose_cpu_forward(problem: Problem) -> str:
    """Forward and input gradient on a CPU.

    How many times faster than ``native`` (XLA:CPU, jax 0.12.0.1, AVX2, 2 cores, float32, C = O
    where one is given; ``python -m benchmarks.formulations`` measures it again):

        depthwise K=4 C=512 D=1     own_pads 100   scatter 110    matmuls 57     shifts 52
        depthwise K=4 C=512 D=64    own_pads 200   scatter 120    matmuls 98     shifts 76
        depthwise K=31 C=128        matmuls 21     shifts 9 to 23   dense 1.8    scatter 1.5
        C=256 G=32 K=3 D=4          shifts 5.6     scatter 2.4    split 1.3
        C=256 G=2 K=3 D=4           split 1.1      scatter 0.97   matmuls 0.79
        C=1 O=25 K=7                own_pads 12    scatter 11     matmuls 9      shifts 8
        C=64 O=1 K=3                scatter 3.4    matmuls 0.83   im2col 0.45
        C=64 O=1 K=3 input gradient own_pads 10    scatter 10     shifts 7       matmuls 7
        C=128 K=3 D=64              scatter 0.85   fold 0.82      matmuls 0.81   im2col 0.75
    """
    spec = problem.spec
    G, K, C, O = spec.groups, spec.kernel_size, problem.C, problem.O
    inner, outer = C // G, O // G
    if problem.operation == "conv1d_input_grad":
        spec, inner, outer = spec.transposed(), outer, inner
    products = K * inner  # multiply-adds for one output
    if G > 1:
        if products <= 8:
            return "own_pads"
        if inner <= 8 and products <= 64:
            return "shifts"
        if inner == 1:
            return "matmuls"
        return "split" if G <= 8 else "scatter"
    if spec.input_dilation == spec.stride == 1 < K:
        if products <= 8 and min(inner, outer) <= 2:
            return "own_pads"
        if inner <= 4 and products <= 16:
            return "shifts"
        if outer == 1:
            return "scatter"
    # What is left Eigen does best. With CAUSAL padding nnx.Conv writes the zeros first: the same
    # program is neither slower nor faster.
    causal = problem.operation == "conv1d" and spec.padding == (spec.span - 1, 0)
    return "padded" if causal and spec.input_dilation == 1 else "native"


def _choose_cpu_kernel_grad(problem: Problem) -> str:
    """Kernel gradient on a CPU; measured as in `_choose_cpu_forward`.

    depthwise K=4 C=512         tree 32        shifts 11      im2col 1.3     matmuls 1.7
    depthwise K=31 C=128        tree 7.7       shifts 2.0     matmuls 0.88
    C=32 G=2 K=3                im2col 2900    matmuls 2400   split 2200     tree 760
    C=256 G=32 K=3 D=4          split 60       tree 48        matmuls 48     im2col 42
    C=128 G=8 K=7 D=64          split 19       matmuls 9.6    im2col 3.1
    C=128 G=8 K=5 S=2           im2col 9.0     matmuls 5.9    split 4.0
    C=1 O=32 K=3                matmuls 4.8    im2col 4.3     tree 1.6
    C=128 K=3 S=2               im2col 1.5     matmuls 1.1    padded 0.86
    C=128 K=3 D=64              im2col 0.99    padded 0.96    matmuls 0.87   fold 0.32
    C=32 K=21                   padded 2.1     matmuls 0.33
    """
    spec = problem.spec
    G, K = spec.groups, spec.kernel_size
    inner, outer = problem.C // G, problem.O // G
    if G > 1:
        if inner == 1:
            return "tree" if K <= 64 else "matmuls"
        if spec.stride > 1 and K <= 8:
            return "im2col"
        return "split" if G <= 32 else "matmuls"
    if K == 1 and spec.stride == spec.input_dilation == 1:
        return "matmuls"
    if min(inner, outer) <= 2 and K <= 3:
        return "matmuls"
    if spec.stride > 1 and K <= 8 and spec.input_dilation == 1:
        return "im2col"
    if spec.input_dilation == 1 and spec.padding == (spec.span - 1, 0) and K > 4:
        return "padded"
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
    name = choose(problem)
    out = run_as(name, problem, lhs, rhs)
    if problem.platform == "cpu" and name in ("own_pads", "shifts"):
        # Fused into a reduction that consumes it, such as a loss, the sum over taps is done
        # element by element: 54 ms for a training step of 4 MiB that takes 7 ms behind a barrier.
        # Bias and activation lose next to nothing by it.
        out = lax.optimization_barrier(out)
    return out


KERNEL = Kernel(
    implementation="xla",
    platforms=("cpu", "cuda", "rocm", "tpu"),
    run=run,
    decline=lambda problem: None,
    describe=choose,
    priority=0,
    vmappable=True,
)
