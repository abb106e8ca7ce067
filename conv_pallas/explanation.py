"""`explain`: which kernel would run, and why not the others."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend
from jax._src.lax import lax as lax_internal

from conv_pallas import dispatch, segments, tracing
from conv_pallas.dispatch import Implementation
from conv_pallas.ops import (
    conv1d,
    is_stock,
    lax_reason,
    problem_of,
    promoted_dtype,
    result_dtype,
    unfused_reason,
)
from conv_pallas.spec import OPERATIONS, OTHER, PLATFORMS, Epilogue, Problem, make_spec
from conv_pallas.tracing import Convolution

NOTHING = "nothing that was asked for"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What would run, and why not the rest. ``print`` it.

    Attributes:
      platform: for which it was asked.
      chosen: for each operation, the name of the implementation that runs it; None of a gradient
        that none of those asked for can compute.
      candidates: for each operation, every implementation's `dispatch.Candidate`.
      epilogue: what becomes of bias and activation, forward and backward; None where there is
        neither, or an activation that is no name.
      note: where no operation of ours takes part, the reason; else None.
    """

    platform: str
    chosen: dict[str, str | None]
    candidates: dict[str, tuple[dispatch.Candidate, ...]]
    note: str | None = None
    epilogue: str | None = None

    def how(self, operation: str) -> str:
        """What runs an operation, and how, in a line."""
        name = self.chosen[operation]
        if name is None:
            return NOTHING
        able = (c for c in self.candidates[operation] if c.reason is None)
        return f"{name}: {next(c.how for c in able if c.implementation == name)}"

    def __str__(self) -> str:
        if self.note:
            return f"on {self.platform}: {self.note}"
        lines = []
        for operation, answers in self.candidates.items():
            lines.append(f"{operation} on {self.platform}: {self.chosen[operation] or NOTHING}")
            able = [c.implementation for c in answers if c.reason is None]
            # Of two kernels that decline alike, once.
            for c in {(c, c.reason is None and c.file): c for c in answers}.values():
                if c.reason is not None and c.implementation in able:
                    continue  # another kernel of that name does it
                told = c.how or f"declines: {c.reason}"
                if c.by_name is not None:
                    told += f" ({c.by_name})"
                if able.count(c.implementation) > 1:  # of which the first is what the name runs
                    told += f" [{c.file}]"
                lines.append(f"  {c.implementation:<11} {told}")
        if self.epilogue:
            lines.append(self.epilogue)
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class ModelExplanation:
    """What would run in a whole model, or any other function. ``print`` it.

    Attributes:
      platform: for which it was asked.
      convolutions: of each different convolution, in words, the `Explanation`.
      times: how often each of them runs.
      left_to_lax: how often `jax.lax.conv_general_dilated` runs, as stock layers, those of more
        dimensions, and layers that are told to call it.
    """

    platform: str
    convolutions: dict[str, Explanation]
    times: dict[str, int]
    left_to_lax: int

    def __str__(self) -> str:
        count = sum(self.times.values()) + self.left_to_lax
        lines = [f"on {self.platform}: {count} convolution{'' if count == 1 else 's'}"]
        alike: dict[tuple[str, ...], list[str]] = {}  # what differs in its dilation alone, say
        for words, told in self.convolutions.items():
            how = [f"  {operation:<18} {told.how(operation)}" for operation in told.chosen]
            how += [f"  {more}" for more in (told.note, told.epilogue) if more]
            alike.setdefault(tuple(how), []).append(f"{self.times[words]} of {words}")
        for how, those in alike.items():
            lines += [*those, *how]
        if self.left_to_lax:
            lines.append(
                f"{self.left_to_lax} left to jax.lax.conv_general_dilated: stock layers (see "
                "conv_pallas.nn.replace_convs), more dimensions, and what is told to run xla_native"
            )
        return "\n".join(lines)


def explain(
    x: Any,
    kernel: Any = None,
    bias: Any = None,
    *,
    platform: str | None = None,
    strides: int | Sequence[int] | None = 1,
    padding: str | int | Sequence[int | tuple[int, int]] = "CAUSAL",
    input_dilation: int | Sequence[int] | None = 1,
    kernel_dilation: int | Sequence[int] | None = 1,
    feature_group_count: int = 1,
    activation: str | Callable[[jax.Array], jax.Array] | None = None,
    mask: Any = None,
    segment_ids: Any = None,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    implementation: Implementation = None,
    **inputs: Any,
) -> Explanation | ModelExplanation:
    """Tells which kernel `conv1d` would run for these arguments, and why not the others.

    Nothing is computed, and arrays may be `jax.ShapeDtypeStruct`. To ask about a layer, a whole
    model or a function, pass it and its inputs: ``explain(model, x, mask=mask)``.

    It is told of one device. What XLA's partitioner splits over TPUs, on a mesh with automatic
    axes, runs as ``"xla"``.

    Args:
      x, kernel, bias: as in `conv1d`; or a `conv_pallas.nn.Conv` and its input; or another
        module or function and its arguments, of which each convolution is then explained,
        all its three operations. A kernel with more than one spatial dimension is fine here.
      platform: ``"cpu"``, ``"cuda"``, ``"rocm"``, ``"tpu"``, or ``"other"`` for all others;
        None: the default device's.
      others: as in `conv1d`. Beside a layer, a model or a function, further arguments of its call,
        of any name: geometry, precision and implementation are its own. To ask about time that is
        split inside of `jax.shard_map` takes a function.

    Returns:
      An `Explanation` of arrays and of a single layer, a `ModelExplanation` of a model or function;
      printed, either is a report.

    Raises:
      ValueError, TypeError, NotImplementedError: as `conv1d`, or what is called, with these
        arguments; TypeError also of geometry, precision or implementation beside a model.
    """
    call = dict(activation=activation, mask=mask, segment_ids=segment_ids)
    how = dict(
        precision=precision,
        preferred_element_type=preferred_element_type,
        implementation=implementation,
    )
    geometry = dict(
        strides=strides,
        padding=padding,
        input_dilation=input_dilation,
        kernel_dilation=kernel_dilation,
        feature_group_count=feature_group_count,
    )
    platform = platform or default_platform()
    if platform not in PLATFORMS:
        which = " (cuda or rocm?)" if platform == "gpu" else ""
        raise ValueError(
            f"platform must be None or one of {', '.join(PLATFORMS)}, got {platform!r}{which}"
        )
    its_own = x.explain if _explains_its_call(x) else None
    if callable(x) and kernel is None:
        raise TypeError(
            "explain takes x and kernel, or a model or a function and its input, "
            f"got {type(x).__module__}.{type(x).__name__} alone"
        )
    if its_own is None and callable(x) and kernel is not None:
        its_own = functools.partial(_explain_model, x)
    if its_own is not None:
        options = geometry | how
        tracing.refuse(n for n in options if options[n] is not explain.__kwdefaults__[n])
        given = dict(call, out_sharding=out_sharding)
        inputs |= {name: value for name, value in given.items() if value is not None}
        arguments = (kernel,) if bias is None else (kernel, bias)
        return its_own(*arguments, platform=platform, **inputs)
    if inputs:
        raise TypeError(f"explain() of arrays got unexpected arguments: {', '.join(inputs)}")
    if not all(hasattr(a, "shape") and hasattr(a, "dtype") for a in (x, kernel)):
        raise TypeError(
            f"explain takes x and kernel, or a model or a function and its input, "
            f"got {type(x).__module__}.{type(x).__name__} and {type(kernel).__name__}"
        )
    chain = dispatch.canonicalize(implementation)
    if len(kernel.shape) <= 3:
        # What conv1d refuses is refused here; but the mesh of out_sharding need not be at hand.
        # That an order can't be followed is told below, of the platform that was asked about.
        given = geometry | how | {"implementation": None if chain is None else "xla"}
        layer = functools.partial(conv1d, activation=call.pop("activation"), **given)
        jax.eval_shape(layer, x, kernel, bias, **call)
    dtype = promoted_dtype(x, kernel, *([] if bias is None else [bias]))
    note = lax_reason(dtype, len(kernel.shape) - 2)
    if note is None and is_stock(chain):
        note = "xla_native: jax.lax.conv_general_dilated as nnx.Conv calls it"
    if note:
        return Explanation(platform, {}, {}, note)
    spec, _ = make_spec(x.shape, kernel.shape, **geometry)
    x, w = (jax.ShapeDtypeStruct(a.shape, dtype) for a in (x, kernel))
    out_dtype = result_dtype(dtype, preferred_element_type)
    precision = lax_internal.canonicalize_precision(precision)
    named = activation if isinstance(activation, str) else None
    apart, epilogue = None, Epilogue(bias is not None, named)
    promoted = bias if bias is None else jax.ShapeDtypeStruct(bias.shape, dtype)
    if segment_ids is not None and segments.crosses(spec):
        whole = Convolution(x, w, spec, precision, out_dtype, chain, epilogue, packed=True)
        one, times = whole.on(platform)
        if one.packed:
            outside = unfused_reason(dtype, out_dtype, promoted, out_sharding)
            return _explain_packed(one, platform, outside)
        x, w, spec = one.x, one.w, one.spec
        apart = "each tap of packed sequences is a convolution" if times > 1 else None
    outside = apart or unfused_reason(dtype, out_dtype, promoted, out_sharding)
    given = dict(x=x, w=w, spec=spec, precision=precision, out_dtype=out_dtype)
    ask = functools.partial(problem_of, **given, platform=platform)
    return _explain_problem(ask, chain, epilogue, outside)


def _explain_packed(
    convolution: Convolution, platform: str, outside: str | None = None
) -> Explanation:
    """Of packed sequences that a kernel takes."""
    epilogue, whole = convolution.epilogue, convolution.problem("conv1d", platform)
    forward, backward = (
        convolution.takes(platform, operations) for operations in (OPERATIONS[:1], OPERATIONS[1:])
    )
    chosen, answers = {}, {}
    for operation in OPERATIONS:
        kernel = forward if operation == "conv1d" else backward
        chosen[operation] = kernel.implementation
        asked = dispatch.candidates(convolution.problem(operation, platform))
        asked = dispatch.of_packed(asked, dataclasses.replace(whole, epilogue=epilogue))
        answers[operation] = tuple(c for c, _ in asked)
    told = None
    if epilogue.bias or epilogue.activation:
        names = f"in {forward.implementation}'s kernel", f"in {backward.implementation}'s kernels"
        told = _told(epilogue, *names, outside)
    return Explanation(platform, chosen, answers, epilogue=told)


def _explains_its_call(x: Any) -> bool:
    """Whether x has an ``explain``, of its class's own call and not of one that it inherits."""
    classes = type(x).__mro__
    first = lambda name: next((c for c in classes if name in vars(c)), None)  # noqa: E731
    own, call = first("explain"), first("__call__")
    return own is not None and call is not None and issubclass(own, call)


def _explain_problem(
    ask: Callable[[str], Problem], chain, epilogue: Epilogue, outside: str | None = None
) -> Explanation:
    """Of one convolution, of which ``ask(operation)`` is the problem."""
    chosen, answers = {}, {}
    if (problem := ask("conv1d")).empty:
        return Explanation(problem.platform, {}, {}, note="nothing to compute")
    for operation in OPERATIONS:
        problem = ask(operation)
        try:
            chosen[operation] = dispatch.select(problem, chain).implementation
        except NotImplementedError:
            if operation == "conv1d":
                raise
            chosen[operation] = None  # as of a kernel that has no gradients
        answers[operation] = tuple(c for c, _ in dispatch.candidates(problem))
    told = None
    if epilogue.bias or epilogue.activation:
        told = _explain_epilogue(ask("conv1d"), epilogue, chain, outside)
    return Explanation(problem.platform, chosen, answers, epilogue=told)


def _explain_model(model: Callable, *args, platform: str, **kwargs) -> ModelExplanation:
    found, left = tracing.convolutions(model, *args, **kwargs)
    told, times = {}, {}
    for traced, count in found:
        convolution, each = traced.on(platform)
        words = str(convolution)
        times[words] = times.get(words, 0) + count * each
        if words in told:
            continue
        if convolution.packed:
            told[words] = _explain_packed(convolution, platform)
        else:
            ask = functools.partial(convolution.problem, platform=platform)
            told[words] = _explain_problem(ask, convolution.implementation, convolution.epilogue)
    return ModelExplanation(platform, told, times, left)


def _explain_epilogue(problem: Problem, epilogue: Epilogue, chain, outside: str | None) -> str:
    """Who computes bias and activation, and their gradients."""
    if outside:
        return _told(epilogue, "", "", outside)
    kernel = dispatch.select(problem, chain)
    whole = dataclasses.replace(problem, epilogue=epilogue)
    if kernel.fused is None:
        forward = f"by XLA ({kernel.implementation} carries none)"
    elif reason := kernel.decline_fused(whole):
        forward = f"by XLA ({kernel.implementation}: {reason})"
    else:
        forward = f"in {kernel.implementation}'s kernel"
    found = dispatch.backward(problem, epilogue, chain, (True, True, epilogue.bias))
    backward = "by XLA" if found is None else f"in {found[0].implementation}'s kernels"
    return _told(epilogue, forward, backward)


def _told(epilogue: Epilogue, forward: str, backward: str, outside: str | None = None) -> str:
    """In words; ``outside`` says why it is XLA's."""
    parts = [*(["bias"] if epilogue.bias else []), *filter(None, [epilogue.activation])]
    if outside:
        return f"{' and '.join(parts)}: by XLA, as are their gradients, for {outside}"
    return f"{' and '.join(parts)}: {forward}; their gradients {backward}"


def default_platform() -> str:
    """The platform of the default device, as lowering rules name it."""
    default = jax.config.jax_default_device  # a device, the name of a platform, or None
    backend = getattr(default, "client", None) or jax.extend.backend.get_backend(default)
    if backend.platform == "gpu":
        return "rocm" if "rocm" in backend.platform_version else "cuda"
    return backend.platform if backend.platform in PLATFORMS else OTHER
