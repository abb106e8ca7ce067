"""`ConvTranspose`, in place of `flax.nnx.ConvTranspose`."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from conv_pallas import dispatch, fused, ops, segments, streaming, taps
from conv_pallas.dispatch import Implementation
from conv_pallas.nn.conv import begin, operands, order, precision_of, state_dtype
from conv_pallas.spec import UnknownPaddingError, resolve_padding, scalar


class ConvTranspose(nnx.ConvTranspose):
    """`flax.nnx.ConvTranspose`, with our kernels under its one-dimensional convolutions.

    It makes ``strides`` steps of each step of its input: an upsampling layer, of which vocoders and
    decoders are made. Stock's convolution of an input that has zeros between its steps multiplies
    them on a GPU, and its kernel gradient is a convolution with a window as long as time.

    Everything but the call is flax's own, as in `conv_pallas.nn.Conv`: the constructor's
    arguments, the parameters, their initial values, the checkpoints. Two and more spatial
    dimensions and complex numbers run as in flax.

    A causal layer also runs step by step, as `Conv` does, ``strides`` outputs for each input.

    Args:
      padding: as in `flax.nnx.ConvTranspose`, and ``"CAUSAL"`` in one dimension: ``strides``
        outputs for each input, none of which sees a later one.
      implementation: as in `conv_pallas.conv1d`; None picks the fastest known.
      others: see `flax.nnx.ConvTranspose`.

    Raises:
      ValueError: `implementation` is unknown.
    """

    # A class attribute, so that a layer without an order has the attributes of flax's own.
    implementation: Implementation = None

    if TYPE_CHECKING:  # flax's own signature, for checkers and editors

        def __init__(
            self,
            in_features: int,
            out_features: int,
            kernel_size: int | Sequence[int],
            strides: int | Sequence[int] | None = None,
            *,
            padding: str | int | Sequence[int | tuple[int, int]] = "SAME",
            kernel_dilation: int | Sequence[int] | None = None,
            use_bias: bool = True,
            mask: jax.Array | None = None,
            dtype: Any = None,
            param_dtype: Any = ...,
            precision: Any = None,
            kernel_init: Callable[..., jax.Array] = ...,
            bias_init: Callable[..., jax.Array] = ...,
            transpose_kernel: bool = False,
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
            strides=None,
            *,
            implementation: Implementation = None,
            **kwargs,
        ):
            super().__init__(in_features, out_features, kernel_size, strides, **kwargs)
            order(self, implementation)

    def __call__(
        self,
        inputs: jax.Array,
        *,
        activation: str | Callable[[jax.Array], jax.Array] | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Convolves with an input that has ``strides - 1`` zeros between each two of its steps.

        Args:
          inputs: ``(*batch, *spatial, in_features)``, any number of batch axes.
          activation: what follows the bias, as in `conv_pallas.conv1d`.
          mask: ``(*batch, *spatial)`` bool, False for padding, as in `conv_pallas.conv1d`. It has
            nothing to do with the constructor's ``mask``, which is the kernel's.

        Returns:
          ``(*batch, *spatial', out_features)``.

        Raises:
          ValueError, TypeError, NotImplementedError: as `conv_pallas.conv1d`; ValueError
            also for a kernel mask whose shape is not the kernel's.
        """
        act = ops.activation_function(activation)
        if mask is not None:
            inputs = segments.hide(inputs, mask)
        if len(self.kernel_size) != 1 or self._is_stock():
            y = super().__call__(inputs)
            return y if act is None else act(y)
        inputs, kernel, bias = operands(self, inputs)
        if not self._wraps():
            return self._convolve(inputs, kernel, bias, self._padding(), activation)
        y = self._convolve(inputs, kernel, None, self._padding(), None)
        y = self._wrapped(y, inputs.shape[-2] * self._stride())
        y = fused.add_bias(y, bias)
        return y if act is None else act(y)

    def _convolve(self, inputs, kernel, bias, padding: tuple[int, int], activation):
        return ops.convolve(
            inputs,
            taps.flip(kernel, 1) if self.transpose_kernel else kernel,
            bias,
            padding=[padding],
            strides=1,
            input_dilation=self._stride(),
            kernel_dilation=self.kernel_dilation,
            activation=activation,
            precision=precision_of(self),
            preferred_element_type=self.preferred_element_type,
            out_sharding=None,
            implementation=self.implementation,
        )

    def init_state(
        self, batch_size: int | Sequence[int], dtype: Any = None
    ) -> dict[str, jax.Array]:
        """The state of a stream that has not begun; see `step`.

        Args:
          batch_size, dtype: as of `Conv.init_state`.

        Returns:
          A dict of arrays, ``(kernel_size - 1) * kernel_dilation // strides`` rows for each member
          of the batch. What is in it is not for the caller.

        Raises:
          ValueError: the layer can't stream, or ``batch_size`` is none.
        """
        batch = streaming.batch_axes(batch_size)
        rows = self._check_streams()
        dtype = state_dtype(self, dtype)
        return streaming.clock(batch) | streaming.ring(batch, rows, self.in_features, dtype)

    def step(
        self,
        x: jax.Array,
        state: dict[str, jax.Array],
        *,
        activation: str | Callable[[jax.Array], jax.Array] | None = None,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Convolves the next chunk of a stream: of a CAUSAL layer alone, or one padded alike.

        Args:
          x: ``(*batch, T, in_features)``; T is 1 or more and may change from call to call.
          state: from `init_state`, or the last call's.
          activation: as in a call of the layer.
          mask: ``(*batch, T)`` bool, as in a call of the layer.

        Returns:
          ``(*batch, T * strides, out_features)``, and the state for the next chunk.

        Raises:
          ValueError: x or mask do not fit the layer or the state; the layer can't stream.
          TypeError: x promotes the computation to another dtype than the state's.
        """
        rows = self._check_streams()
        x, state, age, clock = begin(self, x, state, mask)
        x, kernel, bias = operands(self, x)
        ring = streaming.ring_of(state, rows, self.in_features, x)
        if ring:
            x, ring = streaming.with_past(x, age, ring)
        low, high = self._padding()
        padding = low - rows * self._stride(), high
        return self._convolve(x, kernel, bias, padding, activation), clock | ring

    def reset(self, state: dict[str, jax.Array], members: jax.Array | bool) -> dict[str, Any]:
        """The state with some members of the batch at their start; see `TCN.reset`."""
        return streaming.restart(state, members)

    def _check_streams(self) -> int:
        """The rows that are kept of the past, or one line about why this layer can't stream."""
        streaming.check_step(self)
        if len(self.kernel_size) != 1:
            raise ValueError("only a 1-D layer can stream")
        reach, stride = self._reach(), self._stride()
        causal = reach, stride - 1
        if self._wraps() or self._padding() != causal:
            raise ValueError(
                f"only a causal layer can stream: padding must be CAUSAL or [{causal}]; "
                f"got {self.padding!r}"
            )
        return reach // stride

    def _wrapped(self, y: jax.Array, period: int) -> jax.Array:
        """The sum of y's parts that lie whole periods apart, which begin where flax has it."""
        zeros = -(y.shape[-2] - period) % (2 * period)
        low = zeros // 2 if self.transpose_kernel else -(-zeros // 2)
        y = jnp.pad(y, [*[(0, 0)] * (y.ndim - 2), (low, zeros - low), (0, 0)])
        return y.reshape(*y.shape[:-2], -1, period, y.shape[-1]).sum(-3)

    def _is_stock(self) -> bool:
        known = not isinstance(self.padding, str) or self.padding in ("SAME", "VALID", "CIRCULAR")
        return known and ops.is_stock(dispatch.canonicalize(self.implementation))

    def _stride(self) -> int:
        return scalar("strides", self.strides, ValueError)

    def _reach(self) -> int:
        dilation = scalar("kernel_dilation", self.kernel_dilation, TypeError)
        return (self.kernel_size[0] - 1) * dilation

    def _wraps(self) -> bool:
        return isinstance(self.padding, str) and self.padding.upper() == "CIRCULAR"

    def _padding(self) -> tuple[int, int]:
        """``(low, high)`` zeros around the dilated input."""
        stride, reach = self._stride(), self._reach()
        if not isinstance(self.padding, str):
            sizes = dict(time=0, span=reach + 1, stride=1, input_dilation=stride)
            return resolve_padding(self.padding, **sizes)
        mode = self.padding.upper()
        # Flax knows capitals. What else `jax.lax` knows is padded as for a convolution there, and
        # refused where there is a stride.
        of_lax = ("SAME_LOWER",) if self.padding == mode else ("SAME_LOWER", "SAME", "VALID")
        if stride == 1 and mode in of_lax:
            return resolve_padding(mode, time=0, span=reach + 1, stride=1, input_dilation=1)
        if mode == "CAUSAL":
            return reach, stride - 1
        if mode in ("VALID", "CIRCULAR"):  # every step of y that sees one of x
            return reach, max(reach, stride - 1)
        if mode == "SAME":  # so that a stride's steps follow for each of x
            both = reach + stride - 1
            low = reach if stride > reach else -(-both // 2)
            return low, both - low
        raise UnknownPaddingError(
            f"padding must be SAME, VALID, CAUSAL, CIRCULAR, an int, [int] or [(low, high)], "
            f"got {self.padding!r}"
        )
