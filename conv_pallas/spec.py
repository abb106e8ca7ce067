"""The geometry of one convolution, and every complaint about a bad one.

Letters used throughout: ``N`` batch, ``T`` time, ``C`` channels in, ``O`` channels out,
``K`` taps, ``D`` kernel dilation, ``S`` stride, ``E`` input dilation, ``G`` groups.
With x zero outside ``0 <= t < T`` and zero between its samples where ``E > 1``,

    y[n, u, o] = sum over k, c of  xE[n, u*S + k*D - low, c] * w[k, c, o],
    xE[n, E*t, c] = x[n, t, c]

and group ``g`` of the outputs sees group ``g`` of the inputs only.
"""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

Operation = Literal["conv1d", "conv1d_input_grad", "conv1d_kernel_grad"]
OPERATIONS: tuple[Operation, ...] = ("conv1d", "conv1d_input_grad", "conv1d_kernel_grad")

OTHER = "other"  # whatever else JAX has a plugin for: there stock's convolution runs
PLATFORMS = ("cpu", "cuda", "rocm", "tpu", OTHER)


def lhs_rhs_out[T](operation: Operation, x: T, w: T, y: T) -> tuple[T, T, T]:
    """Of what stands for x, w and y: what stands for the operands and the result of an operation.

    An output gradient is like y; dx and dw are like x and w.
    """
    return {
        "conv1d": (x, w, y),
        "conv1d_input_grad": (y, w, x),
        "conv1d_kernel_grad": (x, y, w),
    }[operation]


STRING_PADDINGS = ("SAME", "SAME_LOWER", "VALID", "CAUSAL", "CIRCULAR", "REFLECT")


class UnknownPaddingError(ValueError, RuntimeError):
    """A padding that is no padding.

    A ``ValueError``, as it should be, and a ``RuntimeError``, because that is what
    `jax.lax.conv_general_dilated` raises for a string it does not know.
    """


def _at_least_zero(steps):
    if isinstance(steps, int):
        return max(0, steps)
    from jax import core  # T is symbolic: a shape-polymorphic export

    return core.max_dim(steps, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class ConvSpec:
    """The static geometry of a 1-D convolution; hashable, so that it keys compilation.

    Attributes:
      time: ``T``, the number of input steps.
      kernel_size: ``K``, the number of taps.
      stride: ``S``, input steps (after input dilation) from one output to the next.
      padding: ``(low, high)`` zeros before and after the (dilated) input; negative
        amounts crop it.
      kernel_dilation: ``D``, input steps from one tap to the next; 1 where there is one tap.
      input_dilation: ``E``, ``E - 1`` zeros stand between two input steps.
      groups: ``G``, independent groups of channels.
    """

    time: int
    kernel_size: int
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    kernel_dilation: int = 1
    input_dilation: int = 1
    groups: int = 1

    def __post_init__(self):
        if isinstance(self.kernel_size, int) and self.kernel_size == 1:
            # It means nothing, and may be too large to count with.
            object.__setattr__(self, "kernel_dilation", 1)

    @property
    def span(self) -> int:
        """Input steps from a window's first tap to its last, both counted."""
        return (self.kernel_size - 1) * self.kernel_dilation + 1

    @property
    def dilated_time(self) -> int:
        """Input steps once ``E - 1`` zeros stand between each two."""
        return (self.time - 1) * self.input_dilation + 1 if self.time != 0 else 0

    @property
    def out_time(self) -> int:
        """``T'``, the number of output steps."""
        padded = self.dilated_time + sum(self.padding)
        return _at_least_zero((padded - self.span) // self.stride + 1)

    @property
    def live_taps(self) -> range | None:
        """The taps from the first that comes to lie within x to the last.

        Those before and after see padding alone, where a dilation reaches beyond the sequence; with
        a stride one of these may still step over all of x. None where a size is a symbol, of an
        export: then any may see something.
        """
        if not all(isinstance(n, int) for n in (self.kernel_size, self.time, self.out_time)):
            return None
        # Tap k sees nothing before position ``k*D - low``, and nothing after this far from there.
        D, low, reach = self.kernel_dilation, self.padding[0], (self.out_time - 1) * self.stride
        first = max(0, -((reach - low) // D))
        return range(first, min(self.kernel_size, (self.dilated_time - 1 + low) // D + 1))

    def of_taps(self, taps: range) -> "ConvSpec":
        """The convolution with these taps alone, which follow on each other: a part of the sum."""
        D, (low, high) = self.kernel_dilation, self.padding
        padding = low - taps.start * D, high - (self.kernel_size - taps.stop) * D
        return dataclasses.replace(self, kernel_size=len(taps), padding=padding)

    def transposed(self) -> "ConvSpec":
        """The convolution that maps an output gradient to the input gradient.

        ``dx = conv(g, flip(w))`` with the taps reversed, each group's channels in and
        out exchanged, and stride and input dilation having changed places.
        """
        low = self.span - 1 - self.padding[0]
        dilated_out = (self.out_time - 1) * self.stride + 1
        high = self.dilated_time + self.span - 1 - dilated_out - low
        return dataclasses.replace(
            self,
            time=self.out_time,
            stride=self.input_dilation,
            input_dilation=self.stride,
            padding=(low, high),
        )

    @property
    def exchanged(self) -> "ConvSpec | None":
        """The convolution that a kernel gradient is computed as, of g and x in each other's place.

        That of `transposed`: ``<conv(x, w), g> = <x, conv'(g, flip(w))>``, so that
        ``dw(x, g) = flip(dw'(g, x))``. An input dilation is a stride there, without zeros between
        two steps of x. None where that gains nothing, or a size is a symbol.
        """
        known = all(isinstance(n, int) for n in (self.time, self.out_time))
        return self.transposed() if known and self.input_dilation > self.stride else None


@dataclasses.dataclass(frozen=True, slots=True)
class Epilogue:
    """What follows the forward convolution, element by element: ``y = activation(z)`` with
    ``z = conv(x, w) + bias``, in float32 at least, rounded once.

    Attributes:
      bias: whether there is a bias ``(O,)``.
      activation: one of `ACTIVATIONS`, or None.
      keep: whether z is wanted beside y; see `Kernel.keeps`.
    """

    bias: bool = False
    activation: str | None = None
    keep: bool = False

    @property
    def saved(self) -> str | None:
        """What the activation's derivative is computed from: ``"y"``, ``"z"``, or nothing."""
        return None if self.activation is None else ACTIVATIONS[self.activation]


# The activations that kernels know, and what their derivative is a function of.
ACTIVATIONS = {
    "relu": "y",
    "gelu": "z",
    "gelu_exact": "z",
    "silu": "z",
    "tanh": "y",
    "sigmoid": "y",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """All that a kernel may look at before it says that it can, or why it can't.

    Attributes:
      operation: which of the three; it says what ``lhs`` and ``rhs`` are:
        ``conv1d`` takes x and w, ``conv1d_input_grad`` g and w,
        ``conv1d_kernel_grad`` x and g.
      spec: the geometry, always that of the forward convolution; of a kernel gradient that of
        `ConvSpec.exchanged`, where there is one, with x and g, C and O in each other's place.
      N, C, O: batch size, channels in, channels out, of the forward convolution.
      lhs_dtype, rhs_dtype, out_dtype: NumPy dtypes of the operands and the result.
      precision: as `jax.lax.conv_general_dilated` canonicalises it: ``None``, a
        `jax.lax.Precision`, or one for each operand.
      platform: ``"cpu"``, ``"cuda"``, ``"rocm"``, ``"tpu"``, or ``"other"`` for all others.
      epilogue: what is fused around the forward convolution, for `Kernel.fused` and
        `Kernel.backward`; `Kernel.run` never sees one.
      partitioned: whether XLA's partitioner is to split what the operation is lowered to; else
        all sizes are those of one device.
      exported: whether it is lowered for `jax.export`, which keeps what is to run elsewhere, later
        and by other versions.
    """

    operation: Operation
    spec: ConvSpec
    N: int
    C: int
    O: int
    lhs_dtype: np.dtype
    rhs_dtype: np.dtype
    out_dtype: np.dtype
    precision: Any
    platform: str
    epilogue: Epilogue = Epilogue()
    partitioned: bool = False
    exported: bool = False

    @property
    def x_shape(self) -> tuple[int, int, int]:
        return (self.N, self.spec.time, self.C)

    @property
    def w_shape(self) -> tuple[int, int, int]:
        return (self.spec.kernel_size, self.C // self.spec.groups, self.O)

    @property
    def y_shape(self) -> tuple[int, int, int]:
        return (self.N, self.spec.out_time, self.O)

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Those of lhs, of rhs and of what the operation computes."""
        return lhs_rhs_out(self.operation, self.x_shape, self.w_shape, self.y_shape)

    @property
    def out_shape(self) -> tuple[int, int, int]:
        """The shape of what the operation computes."""
        return self.shapes[2]

    @property
    def known(self) -> bool:
        """Whether every size is a number, and none the symbol of an export."""
        sizes = (*self.x_shape, *self.w_shape, *self.y_shape)
        return all(isinstance(size, int) for size in sizes)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute: no elements in an array, or all taps beyond x."""
        shapes = (*self.x_shape, *self.w_shape, *self.y_shape)
        return 0 in shapes or self.spec.live_taps == range(0)

    @property
    def depthwise(self) -> bool:
        """Whether every input channel is a group of its own."""
        return self.spec.groups == self.C and self.C > 1

    @property
    def as_convolution(self) -> tuple[ConvSpec, int, int]:
        """Geometry, channels in and channels out of the convolution that an operation is.

        An input gradient is one of g. A kernel gradient sums over time instead; it is told of as
        the forward convolution.
        """
        if self.operation == "conv1d_input_grad":
            return self.spec.transposed(), self.O, self.C
        return self.spec, self.C, self.O

    @property
    def exchanged(self) -> "Problem | None":
        """A kernel gradient as `ConvSpec.exchanged` has it, or None: of rhs and lhs.

        What it computes is `conv_pallas.taps.flip` of what this does.
        """
        spec = self.spec.exchanged if self.operation == "conv1d_kernel_grad" else None
        if spec is None:
            return None
        each = self.precision[::-1] if isinstance(self.precision, tuple) else self.precision
        return dataclasses.replace(
            self, spec=spec, C=self.O, O=self.C, lhs_dtype=self.rhs_dtype,
            rhs_dtype=self.lhs_dtype, precision=each,
        )  # fmt: skip

    def in_groups(self, count: int) -> "Problem":
        """So many of these with a kernel each, as one with so many times the groups."""
        spec = dataclasses.replace(self.spec, groups=self.spec.groups * count)
        return dataclasses.replace(self, spec=spec, C=self.C * count, O=self.O * count)

    def gradient(self, operation: Operation) -> "Problem":
        """A gradient of this forward convolution, with its epilogue."""
        lhs, rhs, out = lhs_rhs_out(operation, self.lhs_dtype, self.rhs_dtype, self.out_dtype)
        return dataclasses.replace(
            self, operation=operation, lhs_dtype=lhs, rhs_dtype=rhs, out_dtype=out
        )


def problem_of(
    operation: Operation, x, w, spec: ConvSpec, precision, out_dtype, platform: str = "cpu", **on
) -> Problem:
    """What each device would be given were nothing sharded or vmapped.

    Its taps are those of `ConvSpec.live_taps`, where there are any, and it is `Problem.exchanged`,
    where that is one.

    Args:
      x, w: ``(*batch, T, C)`` and ``(K, C // G, O)``, or what has their shapes and dtypes.
      out_dtype: of y.
      on: further fields of `Problem`.
    """
    dtypes = map(np.dtype, lhs_rhs_out(operation, x.dtype, w.dtype, out_dtype))
    N, C, O = math.prod(x.shape[:-2]), x.shape[-1], w.shape[-1]
    live = spec.live_taps
    spec = spec.of_taps(live) if live else spec
    problem = Problem(operation, spec, N, C, O, *dtypes, precision, platform, **on)
    return problem.exchanged or problem


def is_sequence(value: Any) -> bool:
    """Whether it is one of numbers, an array's too, and no string."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str)


def scalar(name: str, value: int | Sequence[int] | None, error: type[Exception]) -> int:
    """One positive int out of ``value``, which may be None (1), an int or a sequence of one.

    Raises:
      error: it is zero or negative.
      TypeError: it is no integer.
      ValueError: it is a sequence of another length than one.
    """
    if value is None:
        return 1
    if is_sequence(value):
        if len(value) != 1:
            raise ValueError(
                f"{name} must be an int or a sequence of one int for a 1-D convolution, "
                f"got {value!r}"
            )
        return scalar(name, value[0], error)
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int or a sequence of ints, got {value!r}") from None
    if number < 1:
        raise error(f"{name} must be 1 or more, got {value!r}")
    return number


def resolve_padding(
    padding: Any, *, time: int, span: int, stride: int, input_dilation: int
) -> tuple[int, int] | Literal["CIRCULAR", "REFLECT"]:
    """``(low, high)`` for ``padding``, or the name of a padding that is not zeros.

    ``time`` and ``span`` are those of `ConvSpec`. See `conv1d` for what ``padding`` may be.

    Raises:
      UnknownPaddingError: the string is none of `STRING_PADDINGS` in any case.
      ValueError: a string goes with input dilation, or it is neither a string, an int
        nor a sequence of one int or one pair.
    """
    if isinstance(padding, str):
        mode = padding.upper()
        if mode not in STRING_PADDINGS:
            raise UnknownPaddingError(
                f"padding must be one of {', '.join(STRING_PADDINGS)}, an int, [int] or "
                f"[(low, high)], got {padding!r}"
            )
        if input_dilation != 1:
            raise ValueError(
                f"padding must be given in numbers, as an int, [int] or [(low, high)], where "
                f"input_dilation is not 1; got padding={padding!r}, "
                f"input_dilation={input_dilation}"
            )
        if mode in ("CIRCULAR", "REFLECT"):
            return mode
        if mode == "VALID":
            return (0, 0)
        if mode == "CAUSAL":
            return (span - 1, 0)
        out = -(-time // stride)
        total = _at_least_zero((out - 1) * stride + span - time)
        less, more = total // 2, total - total // 2
        return (less, more) if mode == "SAME" else (more, less)
    pair = padding
    if is_sequence(pair) and len(pair) == 1:
        (pair,) = pair
    try:
        if is_sequence(pair):
            low, high = map(operator.index, pair)
            if pair is padding:  # (low, high) without the outer brackets means rank 2 to flax
                raise ValueError
        else:
            low = high = operator.index(pair)
    except (TypeError, ValueError):
        raise ValueError(
            f"padding must be one of {', '.join(STRING_PADDINGS)}, an int, [int] or "
            f"[(low, high)], got {padding!r}"
        ) from None
    return (low, high)


def make_spec(
    x_shape: Sequence[int],
    kernel_shape: Sequence[int],
    *,
    strides: int | Sequence[int] | None = 1,
    padding: Any = "CAUSAL",
    input_dilation: int | Sequence[int] | None = 1,
    kernel_dilation: int | Sequence[int] | None = 1,
    feature_group_count: int = 1,
) -> tuple[ConvSpec, Literal["CIRCULAR", "REFLECT"] | None]:
    """Checks the arguments of a convolution of ``x (..., T, C)`` with ``kernel (K, C//G, O)``.

    Returns:
      The spec, and the name of a padding that is not zeros: then ``spec`` already
      describes the VALID convolution of the padded x.

    Raises:
      ValueError: a rank, a channel count, a group count, a stride or a padding is wrong.
      TypeError: a dilation is not positive (as JAX has it), or a number is none.
    """
    if len(kernel_shape) != 3:
        raise ValueError(
            f"kernel must have shape (kernel_size, in_channels // feature_group_count, "
            f"out_channels), got {tuple(kernel_shape)}"
        )
    if len(x_shape) < 2:
        raise ValueError(f"x must have shape (*batch, time, channels), got {tuple(x_shape)}")
    *_, time, C = x_shape
    K, c, O = kernel_shape
    S = scalar("strides", strides, ValueError)
    D = scalar("kernel_dilation", kernel_dilation, TypeError)
    E = scalar("input_dilation", input_dilation, TypeError)
    G = scalar("feature_group_count", feature_group_count, ValueError)
    if K < 1:
        raise ValueError(f"kernel must have at least one tap, got shape {tuple(kernel_shape)}")
    if C % G:
        raise ValueError(f"feature_group_count must divide x's {C} channels, got {G}")
    if O % G:
        raise ValueError(
            f"feature_group_count must divide the kernel's {O} output channels, got {G}"
        )
    if C // G != c:
        raise ValueError(
            f"x must have {c * G} channels (kernel's {c} times feature_group_count={G}), "
            f"got {C} in shape {tuple(x_shape)}, which is (*batch, time, channels)"
        )
    span = (K - 1) * D + 1
    pad = resolve_padding(padding, time=time, span=span, stride=S, input_dilation=E)
    mode = None
    if isinstance(pad, str):
        mode, pad = pad, (0, 0)
        time = time + span - 1
    spec = ConvSpec(time, K, S, pad, D, E, G)
    if all(isinstance(p, int) for p in pad) and min(pad) < 0 and spec.dilated_time + sum(pad) < 0:
        raise ValueError(
            f"padding must not crop more than x's {spec.dilated_time} steps, got {padding!r}"
        )
    return spec, mode
