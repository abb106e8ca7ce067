"""`Conv`, in place of `flax.nnx.Conv`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx
from jax import lax

from conv_pallas import dispatch, explanation, ops, segments, streaming
from conv_pallas.dispatch import Implementation
from conv_pallas.spec import is_sequence, make_spec, scalar


class Conv(nnx.Conv):
    """`flax.nnx.Conv`, with our kernels under its one-dimensional convolutions.

    Everything but the call is flax's own: the constructor's arguments, the parameters,
    their initial values for a given `rngs`, the checkpoints. Two and more spatial
    dimensions, complex numbers, and layers with a `conv_general_dilated` of their own, run
    as in flax.

    A causal layer can also run step by step, on chunks of any length::

        state = layer.init_state(batch_size)
        y, state = layer.step(x_chunk, state)

    The outputs of the chunks, one after the other, are those of the whole sequence.

    Args:
      implementation: as in `conv_pallas.conv1d`; None picks the fastest known. It orders what
        runs one-dimensional convolutions, and says nothing of the others.
      others: see `flax.nnx.Conv`.

    Raises:
      ValueError: `implementation` is unknown, or `feature_group_count` is not positive.
    """

    # A class attribute, so that a layer without an order has the attributes of flax's own.
    implementation: Implementation = None

    if TYPE_CHECKING:  # flax's own signature, for checkers and editors

        def __init__(
            self,
            in_features: int,
            out_features: int,
            kernel_size: int | Sequence[int],
            strides: int | Sequence[int] | None = 1,
            *,
            padding: str | int | Sequence[int | tuple[int, int]] = "SAME",
            input_dilation: int | Sequence[int] = 1,
            kernel_dilation: int | Sequence[int] = 1,
            feature_group_count: int = 1,
            use_bias: bool = True,
            mask: jax.Array | None = None,
            dtype: Any = None,
            param_dtype: Any = ...,
            precision: Any = None,
            kernel_init: Callable[..., jax.Array] = ...,
            bias_init: Callable[..., jax.Array] = ...,
            conv_general_dilated: Callable[..., jax.Array] = ...,
            promote_dtype: Callable[..., Any] = ...,
            preferred_element_type: Any = None,
            rngs: nnx.Rngs,
            kernel_metadata: Mapping[str, Any] = ...,
            bias_metadata: Mapping[str, Any] = ...,
            implementation: Implementation = None,
        ) -> None: ...

    else:

        def __init__(
            self,
            in_features,
            out_features,
            kernel_size,
            strides=1,
            *,
            implementation: Implementation = None,
            **kwargs,
        ):
            if kwargs.get("feature_group_count", 1) < 1:
                groups = kwargs["feature_group_count"]
                raise ValueError(f"feature_group_count must be 1 or more, got {groups}")
            super().__init__(in_features, out_features, kernel_size, strides, **kwargs)
            order(self, implementation)

    def __call__(
        self,
        inputs: jax.Array,
        out_sharding: Any = None,
        *,
        activation: str | Callable[[jax.Array], jax.Array] | None = None,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        axis_name: str | tuple[str, ...] | None = None,
    ) -> jax.Array:
        """Convolves.

        Args:
          inputs: ``(*batch, *spatial, in_features)``, any number of batch axes.
          out_sharding: sharding of the result on a mesh with explicit axes.
          activation: what follows the bias, as in `conv_pallas.conv1d`; given here, and by its
            name, a kernel may carry it.
          mask: ``(*batch, *spatial)`` bool, False for padding: as in `conv_pallas.conv1d`. It
            has nothing to do with the constructor's ``mask``, which is the kernel's.
          segment_ids: ``(*batch, T)`` integers, packed sequences: as in `conv_pallas.conv1d`.
          axis_name: inside `jax.shard_map` the mesh axis, or axes, over which time is split: as in
            `conv_pallas.conv1d`.

        Returns:
          ``(*batch, *spatial', out_features)``.

        Raises:
          ValueError, TypeError, NotImplementedError: as `conv_pallas.conv1d`; ValueError
            also for a kernel mask whose shape is not the kernel's.
        """
        more = dict(segment_ids=segment_ids, axis_name=axis_name)
        return self._call(inputs, None, out_sharding, activation=activation, mask=mask, **more)

    def _call(self, inputs, kernel, out_sharding=None, *, activation, mask, **more):
        """The call, with another kernel than the parameter where one is given."""
        if self.in_features % self.feature_group_count:
            raise ValueError(
                f"feature_group_count must divide in_features={self.in_features}, "
                f"got {self.feature_group_count}"
            )
        left_to_flax = self._left_to_flax()
        if left_to_flax:
            self._check_dimensions()
        else:
            check_kernel_mask(self)
        if mask is not None:  # before anything looks at what padding holds
            inputs = segments.hide(inputs, mask)
        given = [name for name, value in more.items() if value is not None]
        if left_to_flax or (kernel is None and not given and self._is_stock()):
            act = ops.activation_function(activation)
            if given:
                raise ValueError(
                    f"{given[0]}= is for 1-D convolutions of a layer without a "
                    "conv_general_dilated of its own"
                )
            if not left_to_flax:  # for its complaints
                make_spec(inputs.shape, self.kernel.shape, **self._geometry())
            out = {} if out_sharding is None else {"out_sharding": out_sharding}
            y = super().__call__(inputs, **out)
            return y if act is None else act(y)
        inputs, kernel, bias = operands(self, inputs, kernel)
        return ops.convolve(
            inputs,
            kernel,
            bias,
            out_sharding=out_sharding,
            activation=activation,
            **more,
            **self._arguments(),
        )

    def init_state(
        self, batch_size: int | Sequence[int], dtype: Any = None
    ) -> dict[str, jax.Array]:
        """The state of a stream that has not begun; see `step`.

        Args:
          batch_size: of every chunk, or a tuple of all its batch axes.
          dtype: of the chunks; None: the layer's own.

        Returns:
          A dict of arrays, ``(kernel_size - 1) * kernel_dilation`` rows for each member of the
          batch. What is in it is not for the caller.

        Raises:
          ValueError: the layer can't stream, or ``batch_size`` is none.
        """
        batch = streaming.batch_axes(batch_size)
        self._check_streams()
        return streaming.clock(batch) | self._ring(batch, self._state_dtype(dtype))

    def step(
        self,
        x: jax.Array,
        state: dict[str, jax.Array],
        *,
        activation: str | Callable[[jax.Array], jax.Array] | None = None,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Convolves the next chunk of a stream.

        One step costs the same for any dilation and any age of the stream, where ``state`` is
        donated to the compiled function (`conv_pallas.nn.compiled_step` does it). With padding
        ``[(low, high)]`` the outputs come ``high`` steps late, the first ``high`` of a stream
        mean nothing, and chunks whose mask is False throughout bring the last ones.

        Args:
          x: ``(*batch, T, in_features)``; T is a multiple of ``strides``, and may change from
            call to call.
          state: from `init_state`, or the last call's.
          activation: as in a call of the layer.
          mask: ``(*batch, T)`` bool, as in a call of the layer.
          segment_ids: ``(*batch, T)`` integers, as in a call of the layer; a sequence may go
            on from chunk to chunk.

        Returns:
          ``(*batch, T // strides, out_features)``, and the state for the next chunk.

        Raises:
          ValueError: x, mask or segment_ids do not fit the layer or the state; the layer can't
            stream.
          TypeError: x promotes the computation to another dtype than the state's.
        """
        stride, _, _ = self._check_streams()
        x, state, age, clock = begin(self, x, state, mask, segment_ids, stride=stride)
        y, _, ring = self._advance(x, age, state, packed=segment_ids is not None, act=activation)
        return y, clock | ring

    def reset(self, state: dict[str, jax.Array], members: jax.Array | bool) -> dict[str, Any]:
        """The state with some members of the batch at their start; see `TCN.reset`."""
        return streaming.restart(state, members)

    def _advance(self, x, age, state, *, packed: bool, act=None, kernel=None):
        """`step` with the ages of the steps instead of a clock, which blocks have in common."""
        stride, D, lookahead = self._check_streams()
        x, kernel, bias = operands(self, x, kernel)
        rows = (self.kernel_size[0] - 1) * D
        ring = streaming.ring_of(state, rows, self.in_features, x, ages=lookahead > 0)
        arguments = self._arguments() | dict(activation=act, out_sharding=None)

        def convolve(x, kernel, **geometry):
            return ops.convolve(x, kernel, bias, **(arguments | geometry))

        def convolve_taps(seen, kernel):
            return ops.convolve_taps(seen, kernel, bias, **arguments)

        return streaming.convolve_chunk(
            convolve,
            convolve_taps,
            x,
            age,
            kernel,
            ring,
            dilation=D,
            groups=self.feature_group_count,
            stride=stride,
            lookahead=lookahead,
            packed=packed,
        )

    def _ring(self, batch, dtype) -> dict[str, jax.Array]:
        _, D, lookahead = self._check_streams()
        rows = (self.kernel_size[0] - 1) * D
        return streaming.ring(batch, rows, self.in_features, dtype, ages=lookahead > 0)

    def _check_streams(self) -> tuple[int, int, int]:
        """Stride, dilation and lookahead, or one line about why this layer can't stream."""
        streaming.check_step(self)
        if self._left_to_flax():
            raise ValueError(
                "only a 1-D layer without a conv_general_dilated of its own can stream"
            )
        return segments.check_stream_geometry(
            self.kernel_size[0],
            self.strides,
            self.padding,
            self.input_dilation,
            self.kernel_dilation,
        )

    def _state_dtype(self, dtype, kernel=None):
        return state_dtype(self, dtype, kernel)

    def explain(
        self,
        inputs: Any,
        *,
        platform: str | None = None,
        activation: str | Callable[[jax.Array], jax.Array] | None = None,
        mask: Any = None,
        segment_ids: Any = None,
        out_sharding: Any = None,
    ) -> explanation.Explanation:
        """What would run for these arguments of a call.

        Args:
          inputs: x, or a `jax.ShapeDtypeStruct` of its shape and dtype.
          platform: as in `conv_pallas.explain`; others as in a call.

        Raises:
          ValueError, TypeError, NotImplementedError: as the call would.
        """
        if self.conv_general_dilated is not lax.conv_general_dilated:
            note = f"the layer brings its own convolution, {self.conv_general_dilated!r}"
            return explanation.Explanation(platform or explanation.default_platform(), {}, {}, note)
        # Of an abstract layer there is no more than this.
        struct = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)  # noqa: E731
        params = inputs, struct(self.kernel), None if self.bias is None else struct(self.bias)
        promote = functools.partial(self.promote_dtype, dtype=self.dtype)
        inputs, kernel, bias = jax.eval_shape(promote, params)
        operands = inputs, kernel, bias if self.use_bias else None
        call = dict(activation=activation, mask=mask, segment_ids=segment_ids)
        call |= dict(platform=platform, out_sharding=out_sharding)
        return explanation.explain(*operands, **call, **self._arguments())

    def _left_to_flax(self) -> bool:
        return (
            len(self.kernel_size) != 1 or self.conv_general_dilated is not lax.conv_general_dilated
        )

    def _check_dimensions(self) -> None:
        """Of what is left to flax, the bad input that gets no readable answer there."""
        rank = len(self.kernel_size)
        if isinstance(self.padding, str) and self.padding.upper() == "CAUSAL" and rank != 1:
            raise ValueError(
                f"padding may be SAME, SAME_LOWER, VALID, CIRCULAR, REFLECT or numbers for a "
                f"{rank}-D convolution; CAUSAL is for 1-D, got {self.padding!r}"
            )
        for name, error in (
            ("strides", ValueError),
            ("kernel_dilation", TypeError),
            ("input_dilation", TypeError),
        ):
            value = getattr(self, name)
            for number in value if is_sequence(value) else (value,):
                scalar(name, number, error)

    def _is_stock(self) -> bool:
        # Of CAUSAL, CIRCULAR and REFLECT flax knows capitals only; `ops` knows the rest.
        spelled = not isinstance(self.padding, str) or self.padding.isupper()
        return spelled and ops.is_stock(dispatch.canonicalize(self.implementation))

    def _geometry(self) -> dict:
        return dict(
            strides=self.strides,
            padding=self.padding,
            input_dilation=self.input_dilation,
            kernel_dilation=self.kernel_dilation,
            feature_group_count=self.feature_group_count,
        )

    def _arguments(self) -> dict:
        return dict(
            self._geometry(),
            precision=precision_of(self),
            preferred_element_type=getattr(self, "preferred_element_type", None),
            implementation=self.implementation,
        )


def check_kernel_mask(layer: Conv | nnx.ConvTranspose) -> None:
    """Refuses a mask of the kernel that has another shape."""
    if layer.mask is not None and layer.mask.shape != layer.kernel_shape:
        raise ValueError(
            f"mask must have the kernel's shape {layer.kernel_shape}, got {layer.mask.shape}"
        )


def operands(layer: Conv | nnx.ConvTranspose, inputs, kernel=None):
    """Inputs, kernel and bias as they go into the convolution; with another kernel if given."""
    kernel = layer.kernel[...] if kernel is None else kernel
    if layer.mask is not None:
        check_kernel_mask(layer)
        kernel = kernel * layer.mask
    bias = layer.bias[...] if layer.bias is not None else None
    inputs, kernel, bias = layer.promote_dtype((inputs, kernel, bias), dtype=layer.dtype)
    return inputs, kernel, bias if layer.use_bias else None  # it may have been turned off


def begin(layer: Conv | nnx.ConvTranspose, x, state, mask, segment_ids=None, *, stride: int = 1):
    """The checked chunk without what the mask hides, its state, the ages of its steps, the clock.

    Args:
      stride: of which x has to have whole ones.
    """
    streaming.check_chunk(x, layer.in_features, state, stride)
    x, state = streaming.settle(x, state)
    if segment_ids is not None:
        if stride > 1:
            raise ValueError(f"segment_ids need strides=1, got strides={stride}")
        segment_ids = segments.check_ids(segment_ids, x.shape[:-1])
    if mask is not None:
        x = segments.hide(x, mask)
    # Padding has the age that a real step would have: its output is that of a call, too.
    age, clock = streaming.tick(state, x.shape[-2], None, segment_ids)
    return x, state, age, clock


def state_dtype(layer: Conv | nnx.ConvTranspose, dtype, kernel=None) -> Any:
    """What a layer computes in, for inputs of ``dtype``, and another kernel's dtype if given.

    Inputs of None have the kernel's.
    """
    struct = lambda dtype: jax.ShapeDtypeStruct((1,), dtype)  # noqa: E731
    kernel = struct(kernel or layer.kernel.dtype)
    x = kernel if dtype is None else struct(dtype)
    mask, bias = (a if a is None else struct(a.dtype) for a in (layer.mask, layer.bias))

    def computed(x, kernel, mask, bias):  # as `operands` has them
        kernel = kernel if mask is None else kernel * mask
        return layer.promote_dtype((x, kernel, bias), dtype=layer.dtype)[0]

    return jax.eval_shape(computed, x, kernel, mask, bias).dtype


def precision_of(layer: Conv | nnx.ConvTranspose) -> Any:
    """The precision to ask for: with a mask of the kernel that of who asks for the default one."""
    # What minimal filtering leaves of a step that is masked is small, but not nothing.
    unsaid = layer.precision is None and jax.config.jax_default_matmul_precision is None
    return lax.Precision.DEFAULT if unsaid and layer.mask is not None else layer.precision


def order(layer: Conv | nnx.ConvTranspose, implementation: Implementation) -> None:
    """Sets the implementation of a layer that has one; None is no attribute."""
    if implementation is None:
        if "implementation" in vars(layer):
            del layer.implementation
        return
    # Canonical, so that it is hashable, as nnx asks of what is static.
    layer.implementation = dispatch.canonicalize(implementation)
