"""`explain`: which kernel would run, and why not the others."""

import dataclasses
import functools

import jax
import jax.extend
from jax._src.lax import lax as lax_internal

from conv_pallas import dispatch, segments
from conv_pallas.dispatch import Implementation
from conv_pallas.ops import (
    activation_function,
    is_stock,
    lax_reason,
    problem_of,
    promoted_dtype,
    result_dtype,
    unfused_reason,
)
from conv_pallas.spec import OPERATIONS, Epilogue, Problem, make_spec


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What would run, and why not the rest. ``print`` it.

    Attributes:
      platform: for which it was asked.
      chosen: for each operation, the name of the implementation that runs it.
      candidates: for each operation, every implementation's `dispatch.Candidate`.
      epilogue: what becomes of bias and activation, forward and backward; None where there is
        neither, or an activation that is no name.
      note: where no operation of ours takes part, the reason; else None.
    """

    platform: str
    chosen: dict[str, str]
    candidates: dict[str, tuple[dispatch.Candidate, ...]]
    note: str | None = None
    epilogue: str | None = None

    def __str__(self) -> str:
        if self.note:
            return f"on {self.platform}: {self.note}"
        lines = []
        for operation, answers in self.candidates.items():
            lines.append(f"{operation} on {self.platform}: {self.chosen[operation]}")
            able = {c.implementation for c in answers if c.reason is None}
            for c in dict.fromkeys(answers):  # of two kernels that say the same, once
                if c.reason is not None and c.implementation in able:
                    continue  # another kernel of that name does it
                told = c.how or f"declines: {c.reason}"
                if c.by_name is not None:
                    told += f" ({c.by_name})"
                lines.append(f"  {c.implementation:<11} {told}")
        if self.epilogue:
            lines.append(self.epilogue)
        return "\n".join(lines)


def explain(
    x,
    kernel=None,
    bias=None,
    *,
    platform: str | None = None,
    strides=1,
    padding="CAUSAL",
    input_dilation=1,
    kernel_dilation=1,
    feature_group_count=1,
    activation=None,
    mask=None,
    segment_ids=None,
    precision=None,
    preferred_element_type=None,
    out_sharding=None,
    implementation: Implementation = None,
) -> Explanation:
    """Tells which kernel `conv1d` would run for these arguments, and why not the others.

    Nothing is computed, and x and kernel may be `jax.ShapeDtypeStruct`. To ask about a
    layer, pass it and its input: ``explain(layer, x)``.

    Args:
      x, kernel, bias: as in `conv1d`; or a `conv_pallas.nn.Conv` and its input. A kernel
        with more than one spatial dimension is fine here.
      platform: ``"cpu"``, ``"cuda"``, ``"rocm"``, ``"tpu"``, or ``"other"`` for all others;
        None: the default device's.
      others: as in `conv1d`.

    Raises:
      ValueError, TypeError, NotImplementedError: as `conv1d` with these arguments.
    """
    if hasattr(x, "explain"):
        return x.explain(kernel, platform=platform)
    if not all(hasattr(a, "shape") and hasattr(a, "dtype") for a in (x, kernel)):
        raise TypeError(
            f"explain takes x and kernel, or a conv_pallas.nn.Conv and its input, "
            f"got {type(x).__module__}.{type(x).__name__} and {type(kernel).__name__}"
        )
    del mask  # zeros of x change nothing
    activation_function(activation)
    platform = platform or default_platform()
    if platform not in dispatch.PLATFORMS:
        which = " (cuda or rocm?)" if platform == "gpu" else ""
        raise ValueError(
            f"platform must be None or one of {', '.join(dispatch.PLATFORMS)}, "
            f"got {platform!r}{which}"
        )
    chain = dispatch.canonicalize(implementation)
    dtype = promoted_dtype(x, kernel, *([] if bias is None else [bias]))
    note = lax_reason(dtype, max(1, len(kernel.shape) - 2))  # of fewer `make_spec` complains
    if note is None and is_stock(chain):
        note = "xla_native: jax.lax.conv_general_dilated as nnx.Conv calls it"
    if note:
        return Explanation(platform, {}, {}, note)
    spec, mode = make_spec(
        x.shape,
        kernel.shape,
        strides=strides,
        padding=padding,
        input_dilation=input_dilation,
        kernel_dilation=kernel_dilation,
        feature_group_count=feature_group_count,
    )
    x, w = (jax.ShapeDtypeStruct(a.shape, dtype) for a in (x, kernel))
    if segment_ids is not None:
        separate = functools.partial(segments.separate, spec=spec, mode=mode)
        x, w = jax.eval_shape(separate, x, segment_ids), jax.eval_shape(segments.pointwise, w)
        spec, _ = make_spec(x.shape, w.shape, padding="VALID", feature_group_count=spec.groups)
    out_dtype = result_dtype(dtype, preferred_element_type)
    precision = lax_internal.canonicalize_precision(precision)
    chosen, answers = {}, {}
    for operation in OPERATIONS:
        problem = problem_of(operation, x, w, spec, precision, out_dtype, platform)
        chosen[operation] = dispatch.select(problem, chain).implementation
        answers[operation] = tuple(c for c, _ in dispatch.candidates(problem))
    named = activation if isinstance(activation, str) else None
    epilogue = None
    if bias is not None or named:
        problem = problem_of("conv1d", x, w, spec, precision, out_dtype, platform)
        epilogue = Epilogue(bias is not None, named)
        promoted = bias if bias is None else jax.ShapeDtypeStruct(bias.shape, dtype)
        outside = unfused_reason(dtype, out_dtype, promoted, out_sharding)
        epilogue = _explain_epilogue(problem, epilogue, chain, outside)
    return Explanation(platform, chosen, answers, epilogue=epilogue)


def _explain_epilogue(problem: Problem, epilogue: Epilogue, chain, outside: str | None) -> str:
    """Who computes bias and activation, and their gradients."""
    parts = [*(["bias"] if epilogue.bias else []), *filter(None, [epilogue.activation])]
    if outside:
        return f"{' and '.join(parts)}: by XLA, as are their gradients, for {outside}"
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
    return f"{' and '.join(parts)}: {forward}; their gradients {backward}"


def default_platform() -> str:
    """The platform of the default device, as lowering rules name it."""
    backend = jax.extend.backend.get_backend()
    if backend.platform == "gpu":
        return "rocm" if "rocm" in backend.platform_version else "cuda"
    return backend.platform if backend.platform in dispatch.PLATFORMS else dispatch.OTHER
