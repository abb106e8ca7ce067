"""The residual block of a temporal convolutional network."""

import dataclasses
import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from conv_pallas import ops, segments, streaming
from conv_pallas.activations import FUNCTIONS
from conv_pallas.dispatch import Implementation
from conv_pallas.nn.conv import Conv
from conv_pallas.nn.runs import Chunk, Rehearsal, WeightNorm, Whole, is_ours
from conv_pallas.sharding import join_channels

NORMS = (None, "weight", "layer", "batch")
MODES = ("add", "concat")


class TemporalBlock(nnx.Module):
    """(Dilated causal convolution, ReLU, dropout) twice, plus the residual, then ReLU.

    That of Bai, Kolter & Koltun (2018), arXiv:1803.01271, as `TCN` has it in a stack.

    The residual is x itself, or a 1x1 convolution of it where the widths differ. Dropout is on
    after ``model.train()``, as it is at first, and off after ``model.eval()``. With a norm the
    order is convolution, norm, condition, activation, dropout.

    Args:
      in_channels: ``C``, channels in.
      out_channels: ``O``, channels out of both convolutions.
      kernel_size: ``K``, taps of each convolution.
      dilation: ``D``, steps from one tap to the next. Two convolutions see
        ``2 * (K - 1) * D + 1`` steps.
      dropout: the share of activations set to zero, in [0, 1).
      rngs: draws the parameters and the dropout.
      implementation: as in `Conv`, for each convolution of the block.
      conv: the class of the convolutions; ``nnx.Conv`` builds the same block, with the same
        parameters under the same names, from stock layers, which can't stream.
      norm: of each convolution: None, ``"weight"`` (of its kernel, arXiv:1602.07868),
        ``"layer"`` (over the channels of a step) or ``"batch"``.
      activation: a name that `conv_pallas.conv1d` knows, a callable, or ``"glu"``: convolutions
        of twice the width, whose second half gates the first, and none after the residual.
      spatial_dropout: drops whole channels of a sequence rather than single steps.
      causal: False lets step t see as much of the future as of the past (SAME padding).
      lookahead: how many future steps an output may see, up to ``2 * (K - 1) * D``. A stream
        gives its outputs that much later.
      conditioning: channels of the ``condition`` that a call is given, or None.
      conditioning_mode: ``"add"``, to what the first convolution computes, through a 1x1
        convolution without bias; or ``"concat"``, to x.
      kernel_init, dtype, param_dtype: as in `flax.nnx.Conv`.

    Raises:
      ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        dilation: int,
        dropout: float,
        rngs: nnx.Rngs,
        *,
        implementation: Implementation = None,
        conv: type[nnx.Conv] = Conv,
        norm: str | None = None,
        activation: str | Callable[[jax.Array], jax.Array] = "relu",
        spatial_dropout: bool = False,
        causal: bool = True,
        lookahead: int = 0,
        conditioning: int | None = None,
        conditioning_mode: str = "add",
        kernel_init: Any = None,
        dtype: Any = None,
        param_dtype: Any = None,
    ):
        check_positive(
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=kernel_size,
            dilation=dilation,
        )
        history = (kernel_size - 1) * dilation
        check_options(
            dropout=dropout, norm=norm, activation=activation, causal=causal,
            lookahead=lookahead, most=2 * history, conditioning=conditioning,
            conditioning_mode=conditioning_mode,
        )  # fmt: skip
        if not isinstance(rngs, nnx.Rngs):
            raise ValueError(f"rngs must be an nnx.Rngs, such as nnx.Rngs(0), got {rngs!r}")
        self.lookahead, self.causal, self.activation = lookahead, causal, activation
        self.conditioning, self.conditioning_mode = conditioning, conditioning_mode
        self.in_channels, self.receptive_field = in_channels, 2 * history + 1
        # How much comes late out of the first convolution alone.
        self.first_lookahead = min(lookahead, history)
        width = 2 * out_channels if activation == "glu" else out_channels
        wide = in_channels + (conditioning or 0 if conditioning_mode == "concat" else 0)
        options = dict(kernel_init=kernel_init, dtype=dtype, param_dtype=param_dtype)
        layer = layer_maker(conv, implementation, rngs, **options)

        def temporal(channels, ahead):
            padding = "SAME" if not causal else ((history - ahead, ahead),) if ahead else "CAUSAL"
            made = layer(channels, width, (kernel_size,), kernel_dilation=dilation, padding=padding)
            return weight_norm(made, rngs) if norm == "weight" else made

        def normalizer():
            made = {"layer": nnx.LayerNorm, "batch": nnx.BatchNorm}.get(norm)
            given = dict(dtype=dtype, param_dtype=param_dtype or jnp.float32)
            return made and made(width, rngs=rngs, **given)

        drop = functools.partial(nnx.Dropout, broadcast_dims=(-2,) if spatial_dropout else ())
        self.conv1 = temporal(wide, self.first_lookahead)
        self.norm1 = normalizer()
        self.dropout1 = drop(dropout, rngs=rngs)
        self.conv2 = temporal(out_channels, lookahead - self.first_lookahead)
        self.norm2 = normalizer()
        self.dropout2 = drop(dropout, rngs=rngs)
        self.shortcut = layer(in_channels, out_channels, 1) if in_channels != out_channels else None
        added = conditioning is not None and conditioning_mode == "add"
        self.condition = layer(conditioning, width, 1, use_bias=False) if added else None

    def __call__(
        self,
        x: jax.Array,
        *,
        condition: jax.Array | None = None,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        axis_name: str | tuple[str, ...] | None = None,
    ) -> jax.Array:
        """``(*batch, T, C)`` to ``(*batch, T, O)``.

        Args:
          condition: ``(*batch, conditioning)``, or ``(*batch, T, conditioning)`` for a sequence.
          mask: ``(*batch, T)`` bool, False for padding, where the output is zero; as in
            `conv_pallas.conv1d`.
          segment_ids: ``(*batch, T)`` integers, packed sequences; as in `conv_pallas.conv1d`.
          axis_name: inside `jax.shard_map` the mesh axis, or axes, over which time is split: as in
            `conv_pallas.conv1d`. A batch norm has to be in eval mode.

        Returns:
          ``(*batch, T, O)``, of the dtype that the convolutions compute in.

        Raises:
          ValueError: an argument does not fit x or the block.
        """
        mask, segment_ids = check_sequences(x, mask, segment_ids)
        y, _ = self.run(x, condition, Whole(mask, segment_ids, self.check_axis(axis_name)))
        return y

    def init_state(self, batch_size: int | Sequence[int], dtype: Any = None) -> dict[str, Any]:
        """The state of a stream that has not begun: a dict of arrays.

        Args:
          batch_size: of every chunk, or a tuple of all its batch axes.
          dtype: of the chunks; None: the block's own.

        Raises:
          ValueError: the block can't stream, or ``batch_size`` is none.
        """
        batch = streaming.batch_axes(batch_size)
        streaming.check_step(self)
        self.check_streams()
        parts, _ = self.parts(batch, self.conv1._state_dtype(dtype))
        return streaming.clock(batch) | parts

    def step(
        self,
        x: jax.Array,
        state: dict[str, Any],
        *,
        condition: jax.Array | None = None,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The next chunk of a stream: ``(*batch, T, O)``, and the state for the one after it.

        Arguments and errors are those of `TCN.step`.
        """
        streaming.check_step(self)
        self.check_streams()
        x, chunk, clock = begin(x, self.in_channels, state, mask, segment_ids, self.lookahead)
        if self.lookahead:
            condition, _ = check_condition(condition, x, self.conditioning, late=True)
        y, _ = self.run(x, condition, chunk)
        return y, chunk.after | clock

    def reset(self, state: dict[str, Any], members: jax.Array | bool) -> dict[str, Any]:
        """The state with some members of the batch at their start; see `TCN.reset`."""
        return streaming.restart(state, members)

    # --- for a network of blocks ---

    def run(self, x, condition, run: Whole | Chunk) -> tuple[jax.Array, jax.Array]:
        """The block's output, and what it adds to the residual."""
        condition, changing = check_condition(condition, x, self.conditioning)
        # It is read twice, by a convolution and by the residual. On a CPU XLA would compute it
        # anew for the second, and with it all blocks before, whose convolutions it keeps for that.
        x = jax.lax.optimization_barrier(run.hide(x))
        h, added = x, None
        if condition is not None:
            condition = run.hide(condition) if changing else condition
            if self.condition is None:
                if not jnp.issubdtype(x.dtype, jnp.inexact):  # no integer holds a condition
                    h = x.astype(ops.promoted_dtype(x, condition))
                wide = jnp.broadcast_to(condition, (*x.shape[:-1], condition.shape[-1]))
                h = join_channels(h, wide.astype(h.dtype))
            else:
                added = self.condition(condition)
                added = run.late("condition", added, self.first_lookahead) if changing else added
        h = self._half("conv1", self.conv1, self.norm1, h, run, added)
        h = self.dropout1(h)
        h = self._half("conv2", self.conv2, self.norm2, h, run, None)
        y = self.dropout2(h)
        # Of the dtype that a shortcut's would have: a block of one dtype gives that whatever it is
        # given, and a stream, which keeps no other, gives the same.
        residual = x if self.shortcut is not None else x.astype(y.dtype)
        residual = run.late("residual", residual, self.lookahead)
        residual = residual if self.shortcut is None else self.shortcut(residual)
        total = y + residual
        return run.hide(total if self.activation == "glu" else self._act(total)), run.hide(y)

    def _half(self, name, conv, norm, x, run, added):
        """Convolution, norm, condition, activation; the last within the kernel if it comes next."""
        carried = norm is None and added is None and self.activation != "glu"
        y = run.conv(name, conv, x, self.activation if carried else None)
        if isinstance(norm, nnx.BatchNorm):
            y = norm(y, mask=None if run.real is None else run.real[..., None])
        elif norm is not None:
            y = norm(y)
        y = y if added is None else y + added
        return y if carried else self._act(y)

    def _act(self, y):
        act = jax.nn.glu if self.activation == "glu" else ops.activation_function(self.activation)
        return act(y)

    def parts(self, batch, dtype):
        """The states of the parts, without a clock, for x of ``dtype``; and what `run` returns."""
        rehearsal = Rehearsal()
        graph, variables = nnx.split(self)  # dropout changes in a call

        def run(variables, x, condition):
            return nnx.merge(graph, variables).run(x, condition, rehearsal)

        x = jax.ShapeDtypeStruct((*batch, 1, self.in_channels), dtype)
        condition = self.conditioning and x.update(shape=(*batch, 1, self.conditioning))
        results = jax.eval_shape(run, variables, x, condition)
        dtypes = rehearsal.dtypes
        state = {
            name: getattr(self, name)._ring(batch, dtypes[name]) for name in ("conv1", "conv2")
        }
        if self.lookahead:
            rows, width = self.lookahead, self.in_channels
            state["residual"] = streaming.ring(batch, rows, width, dtypes["residual"])
            if self.condition is not None:
                rows, width = self.first_lookahead, self.condition.out_features
                state["condition"] = streaming.ring(batch, rows, width, dtypes["condition"])
        return state, results

    def adopt_convs(self) -> None:
        """Makes of flax's weight norm ours, where the layer in it has become ours."""
        for layer in (self.conv1, self.conv2):
            if type(layer) is nnx.WeightNorm and is_ours(layer.layer_instance):
                layer.__class__ = WeightNorm

    def check_axis(self, axis_name):
        """The axis over which time is split, or None.

        Raises:
          ValueError: a batch norm would take its statistics over one device's part alone.
        """
        if axis_name is not None and self._trains_batch_norm():
            raise ValueError(
                "batch norm in training takes its statistics over all steps, of which with "
                f"axis_name={axis_name!r} each device has a part: call model.eval() first"
            )
        return axis_name

    def _trains_batch_norm(self) -> bool:
        return isinstance(self.norm1, nnx.BatchNorm) and not self.norm1.use_running_average

    def check_streams(self) -> None:
        """One line about why this block can't stream, if so.

        Raises:
          ValueError: it is not causal, has layers that are not ours, or trains a batch norm.
        """
        if not self.causal:
            raise ValueError("only a causal model can stream, and this one has causal=False")
        for layer in (self.conv1, self.conv2):
            if not is_ours(layer):
                raise ValueError(
                    f"only layers of conv_pallas.nn.Conv can stream, got "
                    f"{type(layer).__module__}.{type(layer).__name__}; see replace_convs"
                )
        if self._trains_batch_norm():
            raise ValueError("batch norm streams in eval mode alone: call model.eval() first")


def begin(x, channels: int, state: dict, mask, segment_ids, lookahead: int):
    """The checked chunk, the same as a `Chunk`, and the clock after it."""
    streaming.check_chunk(x, channels, state)
    x, state = streaming.settle(x, state)
    mask, segment_ids = check_sequences(x, mask, segment_ids)
    age, clock = streaming.tick(state, x.shape[-2], mask, segment_ids)
    gaps = mask is not None or lookahead > 0
    return x, Chunk(state, age, packed=segment_ids is not None, gaps=gaps), clock


def layer_maker(conv, implementation, rngs, **options):
    """The class with what all layers of a model have in common."""
    # nnx.Conv does not know `implementation`, and any other class is left its own defaults.
    given = {"implementation": implementation} | options
    given = {name: value for name, value in given.items() if value is not None}
    return functools.partial(conv, **{"padding": "CAUSAL", "rngs": rngs} | given)


def weight_norm(layer: nnx.Conv, rngs: nnx.Rngs) -> nnx.WeightNorm:
    """The layer with its kernel normalized, by flax's own module where the layer is not ours.

    With a scale of the layer's dtype: of flax's own it is that which JAX has by default.
    """
    dtype = getattr(layer, "param_dtype", jnp.float32)
    return (WeightNorm if is_ours(layer) else nnx.WeightNorm)(
        layer, scale_init=Ones(jnp.dtype(dtype)), param_dtype=dtype, rngs=rngs
    )


@dataclasses.dataclass(frozen=True)
class Ones:
    """An initializer. The module keeps it: equal ones make equal modules, which can be pickled."""

    dtype: Any

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jnp.ones(shape, self.dtype)


def check_sequences(x, mask, segment_ids):
    """``mask`` and ``segment_ids`` as arrays, or None for what there is none of.

    Raises:
      ValueError: one does not fit x.
    """
    if mask is not None:
        mask = segments.check_mask(mask, x.shape[:-1])
    if segment_ids is not None:
        segment_ids = segments.check_ids(segment_ids, x.shape[:-1])
    return mask, segment_ids


def check_condition(condition, x, channels, late: bool = False):
    """``(*batch, 1 or T, channels)`` or None, and whether it may change from step to step.

    Args:
      late: whether it meets x later on, when the next chunk may come with another.

    Raises:
      ValueError: it is missing, not expected, or of another shape.
    """
    if (condition is None) != (channels is None):
        expected = "no condition" if channels is None else f"a condition of {channels} channels"
        raise ValueError(
            f"the model takes {expected}, got {condition if condition is None else condition.shape}"
        )
    if condition is None:
        return None, False
    if condition.shape == (*x.shape[:-2], channels):
        condition = condition[..., None, :]
        if late:
            condition = jnp.broadcast_to(condition, (*x.shape[:-1], channels))
        return condition, late
    if condition.shape == (*x.shape[:-1], channels):
        return condition, True
    raise ValueError(
        f"condition must have shape {(*x.shape[:-2], channels)} or {(*x.shape[:-1], channels)}, "
        f"got {condition.shape}"
    )


def check_positive(**sizes) -> None:
    for name, size in sizes.items():
        if not isinstance(size, numbers.Integral) or size < 1:
            raise ValueError(f"{name} must be an int of 1 or more, got {size!r}")


def check_options(
    *, dropout, norm, activation, causal, lookahead, most, conditioning, conditioning_mode
) -> None:
    """Of a block or a network of them, which sees ``most`` steps beyond the present one."""
    if not (isinstance(dropout, numbers.Real) and 0 <= dropout < 1):
        raise ValueError(f"dropout must be a number in [0, 1), got {dropout!r}")
    if norm not in NORMS:
        raise ValueError(f"norm must be None, 'weight', 'layer' or 'batch', got {norm!r}")
    if not callable(activation) and activation not in ("glu", *FUNCTIONS):
        raise ValueError(
            f"activation must be a callable or one of glu, {', '.join(FUNCTIONS)}, "
            f"got {activation!r}"
        )
    if not isinstance(lookahead, numbers.Integral) or not 0 <= lookahead <= most:
        raise ValueError(
            f"lookahead must be an int of 0 to {most}, which is the receptive field less one, "
            f"got {lookahead!r}"
        )
    if lookahead and not causal:
        raise ValueError(f"lookahead is for causal models, got {lookahead} and causal=False")
    if conditioning is not None:
        check_positive(conditioning=conditioning)
    if conditioning_mode not in MODES:
        raise ValueError(f"conditioning_mode must be 'add' or 'concat', got {conditioning_mode!r}")
