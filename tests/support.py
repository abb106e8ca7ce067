"""What several test files need."""

import math
import os
import re
import sys

import jax
import numpy as np

from conv_pallas import conv1d, kernels, primitives
from conv_pallas.spec import Problem
from tests.cases import Case
from tests.tolerance import check

# Found, not listed: a new kernel that runs on a CPU is tested by its being there.
IMPLEMENTATIONS = tuple(
    sorted({k.implementation for k in kernels.discover()[0].values() if "cpu" in k.platforms})
)

# Kernels that have tests of their own, which know them well. Any other file is an added one.
SHIPPED = frozenset(
    {
        "triton_dense", "triton_depthwise", "tpu_dense", "tpu_depthwise", "tpu_time_in_lanes",
        "onednn", "xla", "xla_native",
    }
)  # fmt: skip


def shipped_alone():
    """In the place of `kernels.discover`: without what is added by now; what is later stays."""
    discover = kernels.discover
    added = set(discover()[0]) - SHIPPED

    def shipped():
        found, missing = discover()
        return {name: k for name, k in found.items() if name not in added}, missing

    shipped.cache_clear = discover.cache_clear
    return shipped


def order(implementation: str) -> tuple[str, str]:
    """What asks for that name, and for stock's convolution where it declines a case."""
    return implementation, "xla_native"


def rows(a: np.ndarray) -> np.ndarray:
    """All batch axes as one."""
    return a.reshape(math.prod(a.shape[:-2]), *a.shape[-2:])


def bind(problem: Problem, lhs, rhs, implementation: str | tuple[str, ...]):
    """One of the three primitives, as the library's own code binds it.

    Args:
      implementation: names to try in order, or one for `order`.
    """
    if isinstance(implementation, str):
        implementation = order(implementation)
    return primitives.PRIMITIVES[problem.operation].bind(
        lhs, rhs, spec=problem.spec, kernel_batch=0, precision=problem.precision,
        out_dtype=problem.out_dtype, implementation=implementation, out_sharding=None,
    )  # fmt: skip


def padded(x: np.ndarray, case: Case) -> np.ndarray:
    """x with a CIRCULAR or REFLECT padding written out."""
    if case.mode is None:
        return x
    span = case.spec.span
    pads = [(0, 0)] * x.ndim
    pads[-2] = ((span - 1) // 2, span // 2)
    return np.pad(x, pads, mode={"CIRCULAR": "wrap", "REFLECT": "reflect"}[case.mode])


def unpadded(dx: np.ndarray, case: Case) -> np.ndarray:
    """The transpose of `padded`: what reached a copy is added to its original."""
    if case.mode is None:
        return dx
    source = padded(np.arange(case.T)[:, None], case)[:, 0]
    out = np.zeros((*dx.shape[:-2], case.T, dx.shape[-1]))
    for position, t in enumerate(source):
        out[..., t, :] += dx[..., position, :]
    return out


def value_and_gradients(case: Case, implementation: str):
    """``(x, kernel, g) -> (y, dx, dw)``, compiled as one."""

    @jax.jit
    def run(x, kernel, g):
        f = lambda x, w: conv1d(x, w, **case.kwargs, implementation=order(implementation))  # noqa: E731
        y, vjp = jax.vjp(f, x, kernel)
        return y, *vjp(g)

    return run


def check_operation(actual, operation, lhs, rhs, case: Case) -> None:
    """`tolerance.check` for arrays with any number of batch axes."""
    problem = case.problem(operation)
    merged = actual if operation == "conv1d_kernel_grad" else rows(np.asarray(actual))
    rhs = rows(rhs) if operation == "conv1d_kernel_grad" else rhs
    check(
        merged, operation, rows(lhs), rhs, case.spec, out_dtype=problem.out_dtype,
        precision=case.precision,
    )  # fmt: skip


def collectives(compiled) -> dict[str, int]:
    """How many of each collective the compiled HLO has."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= [^=\n]*? ({kinds})(?:-start)?\(", compiled.as_text())
    return {kind: found.count(kind) for kind in sorted(set(found))}


def sent(compiled) -> int:
    """How many elements a device gets by all collective-permutes."""
    results = re.findall(r"= ([^=\n]*?) collective-permute(?:-start)?\(", compiled.as_text())
    shapes = re.findall(r"\w+\[([\d,]+)\]", " ".join(results))
    return sum(math.prod(int(d) for d in shape.split(",")) for shape in shapes)


def gathered_sizes(compiled) -> list[int]:
    """How many elements each all-gather gives."""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? all-gather(?:-start)?\(", compiled.as_text())
    return [math.prod(int(d) for d in shape.split(",")) for shape in shapes]


def compiled_quickly(f, mesh, *operands):
    """What ``jax.jit(f)`` compiles to for the operands on a mesh, and what that gives.

    Every case compiles anew, and none runs for long.
    """
    quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    with jax.set_mesh(mesh):
        compiled = jax.jit(f).lower(*operands).compile(compiler_options=quickly)
        return compiled, jax.tree.map(np.asarray, compiled(*operands))


def primitives_of(jaxpr) -> list[str]:
    """The names of all primitives of a jaxpr, those of inner jaxprs too."""
    names = []
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        names.append(eqn.primitive.name)
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                names += primitives_of(inner)
    return names


def tree_close(actual, want, rtol=1e-5):
    """Two results of one float32 computation, rounded in another order."""
    assert jax.tree.structure(actual) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        scale = np.max(np.abs(b), initial=0.0)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale)


def environment() -> dict[str, str]:
    """For a program that a user would start: without what the tests set for themselves.

    Eight devices would only get in each other's way.
    """
    unwanted = ("XLA_FLAGS", "CONV_PALLAS_IMPLEMENTATION", "LIBTPU_INIT_ARGS")
    return {k: v for k, v in os.environ.items() if k not in unwanted} | {"PYTHONUNBUFFERED": "1"}


# A shell that starts tests in the background has everything that they start ignore Ctrl-C.
_HEEDING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


def heeding_ctrl_c(command: list) -> list:
    """A command that heeds SIGINT, whether or not those who run the tests do."""
    return [sys.executable, "-c", _HEEDING, *command]
