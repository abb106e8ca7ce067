"""The convolutions of a model, or of any other function, found by tracing it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.extend
import numpy as np

from conv_pallas import dispatch, segments
from conv_pallas.ops import conv1d
from conv_pallas.spec import OPERATIONS, ConvSpec, Epilogue, Operation, Problem, problem_of

# What a ConvSpec's fields are called where people set them.
ARGUMENTS = dict(
    stride="strides",
    padding="padding",
    kernel_dilation="kernel_dilation",
    input_dilation="input_dilation",
    groups="feature_group_count",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Convolution:
    """A forward convolution of ours. ``str`` puts it in words.

    Attributes:
      x, w: shapes and dtypes, ``(*batch, T, C)`` and ``(K, C // G, O)``.
      out_dtype: of y.
      implementation: the names to try in order, or None.
      kernels: how many of these there are at once, each with a kernel of its own, as `jax.vmap`
        makes them; else 1.
      packed: whether it is one of packed sequences; see `on`.
    """

    x: jax.ShapeDtypeStruct
    w: jax.ShapeDtypeStruct
    spec: ConvSpec
    precision: Any
    out_dtype: np.dtype
    implementation: tuple[str, ...] | None
    epilogue: Epilogue
    kernels: int = 1
    packed: bool = False

    def on(self, platform: str) -> tuple["Convolution", int]:
        """What runs there, and how often.

        Of packed sequences that no kernel takes, a pointwise convolution: of all taps side by side,
        or of each.
        """
        if not self.packed or self.takes(platform) is not None:
            return self, 1
        if self.problem("conv1d", platform).empty:
            return dataclasses.replace(self, packed=False), 1
        K, *channels = self.w.shape
        tap = ConvSpec(self.spec.time, 1, groups=self.spec.groups)
        if segments.apart(self.w, self.spec.groups):
            w = jax.ShapeDtypeStruct((1, *channels), self.w.dtype)
            return dataclasses.replace(self, w=w, spec=tap, epilogue=Epilogue(), packed=False), K
        join = functools.partial(segments.side_by_side, groups=self.spec.groups)
        x, w = jax.eval_shape(join, [self.x] * K, self.w)
        return dataclasses.replace(self, x=x, w=w, spec=tap, packed=False), 1

    def takes(self, platform: str, operations=OPERATIONS):
        """The kernel that takes packed sequences in these operations; None where none does."""
        problem = self.problem("conv1d", platform)
        if problem.empty:
            return None
        found = dispatch.packed(problem, self.epilogue, self.implementation, operations)
        return None if found is None else found[0]

    def problem(self, operation: Operation, platform: str) -> Problem:
        """The problem of one of its operations, without the epilogue."""
        problem = problem_of(
            operation, self.x, self.w, self.spec, self.precision, self.out_dtype, platform
        )
        if self.kernels > 1 and not problem.empty:
            try:
                one = dispatch.select(problem, self.implementation)
            except NotImplementedError:  # as whoever asks for it then is told
                return problem
            if one.many(problem) is None:
                return problem.in_groups(self.kernels)
        return problem

    def in_groups(self) -> "Convolution":
        """All its kernels in one, as so many times the groups; without the epilogue."""
        count, groups = self.kernels, self.spec.groups
        widen = lambda a: jax.ShapeDtypeStruct((*a.shape[:-1], count * a.shape[-1]), a.dtype)  # noqa: E731
        return dataclasses.replace(
            self, x=widen(self.x), w=widen(self.w), epilogue=Epilogue(), kernels=1,
            spec=dataclasses.replace(self.spec, groups=count * groups),
        )  # fmt: skip

    def of_one_batch_axis(self) -> "Convolution":
        """The same, with x of three axes."""
        x = self.x
        shape = (math.prod(x.shape[:-2]), *x.shape[-2:])
        return dataclasses.replace(self, x=jax.ShapeDtypeStruct(shape, x.dtype))

    def layer(self, implementation: str, activation: str | None = None) -> Callable:
        """A function of x, w and, where there is one, a bias."""
        geometry = {argument: getattr(self.spec, name) for name, argument in ARGUMENTS.items()}
        return functools.partial(
            conv1d, **geometry | {"padding": [self.spec.padding]}, precision=self.precision,
            preferred_element_type=self.out_dtype, activation=activation,
            implementation=implementation,
        )  # fmt: skip

    def __str__(self) -> str:
        usual = ConvSpec(self.spec.time, self.spec.kernel_size, padding=(self.spec.span - 1, 0))
        words = [f"x {self.x.shape}, kernel {self.w.shape}, {self.x.dtype.name}"]
        for name, argument in ARGUMENTS.items():
            if getattr(self.spec, name) != getattr(usual, name):
                words.append(f"{argument}={getattr(self.spec, name)}")
        if self.epilogue.activation:
            words.append(f"activation={self.epilogue.activation}")
        if self.kernels > 1:
            words.append(f"{self.kernels} kernels at once")
        if self.packed:
            words.append("packed sequences")
        return ", ".join(words)


def refuse(names: Iterable[str]) -> None:
    """Raises TypeError where one says which convolution it is: what is called knows that itself."""
    own = (*ARGUMENTS.values(), "precision", "preferred_element_type", "implementation")
    for name in names:
        if name in own:
            raise TypeError(
                f"{name}= is for arrays: a layer, a model and a function have their own"
            )


def convolutions(
    model: Callable, *args: Any, **kwargs: Any
) -> tuple[list[tuple[Convolution, int]], int]:
    """Each convolution of ``model(*args, **kwargs)`` with how often it runs.

    Args:
      model: a `flax.nnx.Module` or a function.
      args, kwargs: of arrays or anything with shape and dtype; keywords also of what is neither,
        such as the name of an activation.

    Returns:
      The convolutions, and how often `jax.lax`'s own runs.
    """
    from flax import nnx  # which functions alone do without
    from flax.errors import TraceContextError

    options = {name: a for name, a in kwargs.items() if not _of_arrays(a)}
    kwargs = {name: a for name, a in kwargs.items() if name not in options}
    if isinstance(model, nnx.Module):  # its state may change in a call, and none outside of one may
        graph, state = nnx.split(model)
        call = lambda state, *a, **k: nnx.merge(graph, state)(*a, **k, **options)  # noqa: E731
        closed = jax.make_jaxpr(call)(state, *args, **kwargs)
    else:
        try:
            closed = jax.make_jaxpr(functools.partial(model, **options))(*args, **kwargs)
        except TraceContextError as e:
            e.add_note("Of a model that changes in a call give the model, or model.eval() it.")
            raise
    found, left = [], 0
    for eqn, count in _equations(closed.jaxpr):
        if eqn.primitive.name == "conv_general_dilated":
            left += count
        elif eqn.primitive.name in ("conv1d", "conv1d_fused", "conv1d_packed"):
            found.append((_convolution(eqn), count))
    return found, left


def _of_arrays(tree) -> bool:
    return all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in jax.tree.leaves(tree))


def _equations(jaxpr, times: int = 1) -> Iterator[tuple[Any, int]]:
    """All equations, those within others too, and how often each runs in loops of known length."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        inside = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for sub in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from _equations(sub, inside)


def _convolution(eqn) -> Convolution:
    params, (x, w) = eqn.params, (v.aval for v in eqn.invars[:2])
    batch = params.get("kernel_batch", 0)
    kernels = math.prod(w.shape[:batch])
    x, w = (jax.ShapeDtypeStruct(a.shape[batch:], a.dtype) for a in (x, w))
    return Convolution(
        x, w, params["spec"], params["precision"], np.dtype(params["out_dtype"]),
        params["implementation"],
        Epilogue(params.get("has_bias", False), params.get("activation")), kernels,
        packed=eqn.primitive.name == "conv1d_packed",
    )  # fmt: skip
