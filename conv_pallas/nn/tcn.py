"""The temporal convolutional network of Bai, Kolter & Koltun (2018), arXiv:1803.01271.

Arrays are ``(*batch, T, C)``, with any number of batch axes, and unless told otherwise every layer
is causal: step ``t`` of the output depends on steps ``0`` to ``t`` of the input.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from conv_pallas import ops, streaming
from conv_pallas.dispatch import Implementation
from conv_pallas.nn.block import (
    TemporalBlock,
    begin,
    check_condition,
    check_options,
    check_positive,
    check_sequences,
    layer_maker,
)
from conv_pallas.nn.conv import Conv
from conv_pallas.nn.runs import Chunk, Whole, last_real
from conv_pallas.sharding import last_steps


class TCN(nnx.Module):
    """Temporal blocks with dilations 1, 2, 4, ..., then a 1x1 convolution.

    One step of the output sees `receptive_field` steps of the input: with ``L`` blocks and the
    dilations above ``1 + 2 * (kernel_size - 1) * (2**L - 1)``. To classify a sequence, take the
    last step (``return_sequences=False``).

    A causal network also runs step by step, on chunks of any length::

        model.eval()
        state = model.init_state(batch_size)
        y, state = model.step(x_chunk, state)

    Args:
      in_channels: ``C``, channels in.
      num_channels: the width of each block; its length is the number of blocks.
      out_features: ``O``, channels out of the 1x1 convolution at the end.
      kernel_size: taps of each convolution in the blocks.
      dropout: the share of activations set to zero, in [0, 1).
      rngs: draws the parameters and the dropout; None is ``nnx.Rngs(0)``.
      implementation: as in `Conv`, for each convolution of the network.
      conv: the class of the convolutions; ``nnx.Conv`` builds the same network, with the same
        parameters under the same names, from stock layers.
      dilations: of each block, taken as they are; None: 1, 2, 4, ...
      skip_connections: the 1x1 convolution sees the sum of what each block added to its residual,
        through the activation, instead of the last block's output. Where a block is of another
        width than the last, a 1x1 convolution adapts it.
      lookahead: how many future steps an output may see, in all; the first convolutions take as
        much of it as they can. A stream gives its outputs that much later.
      return_sequences: False gives the last step alone, ``(*batch, O)``, and computes no more
        than it needs.
      remat: whether the backward pass computes each block anew rather than keep its inside; a
        policy for `jax.checkpoint`, such as `conv_pallas.convs_saveable`, says what to keep of it.
      norm, activation, spatial_dropout, causal, conditioning, conditioning_mode, kernel_init,
        dtype, param_dtype: as in `TemporalBlock`, for each block; the last three for the
        1x1 convolutions as well.

    Raises:
      ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        in_channels: int,
        num_channels: Sequence[int],
        out_features: int,
        kernel_size: int = 2,
        dropout: float = 0.2,
        rngs: nnx.Rngs | None = None,
        *,
        implementation: Implementation = None,
        conv: type[nnx.Conv] = Conv,
        dilations: Sequence[int] | None = None,
        norm: str | None = None,
        activation: str | Callable[[jax.Array], jax.Array] = "relu",
        spatial_dropout: bool = False,
        skip_connections: bool = False,
        causal: bool = True,
        lookahead: int = 0,
        conditioning: int | None = None,
        conditioning_mode: str = "add",
        return_sequences: bool = True,
        kernel_init: Any = None,
        dtype: Any = None,
        param_dtype: Any = None,
        remat: bool | Callable[..., bool] = False,
    ):
        try:
            widths = [in_channels, *num_channels]
        except TypeError:
            widths = []
        if len(widths) < 2:
            raise ValueError(
                f"num_channels must be a sequence with the width of each block, such as "
                f"[32, 32, 32], got {num_channels!r}"
            )
        check_positive(
            in_channels=in_channels,
            out_features=out_features,
            kernel_size=kernel_size,
            **{f"num_channels[{level}]": width for level, width in enumerate(widths[1:])},
        )
        levels = len(widths) - 1
        given = dilations
        try:
            dilations = [2**level for level in range(levels)] if given is None else list(given)
        except TypeError:
            dilations = []
        if len(dilations) != levels:
            raise ValueError(
                f"dilations must be a sequence of {levels} ints, one for each block, got {given!r}"
            )
        check_positive(**{f"dilations[{level}]": d for level, d in enumerate(dilations)})
        beyond = [2 * (kernel_size - 1) * d for d in dilations]
        check_options(
            dropout=dropout, norm=norm, activation=activation, causal=causal,
            lookahead=lookahead, most=sum(beyond), conditioning=conditioning,
            conditioning_mode=conditioning_mode,
        )  # fmt: skip
        rngs = nnx.Rngs(0) if rngs is None else rngs
        options = dict(kernel_init=kernel_init, dtype=dtype, param_dtype=param_dtype)
        # The steps ahead that each block takes, and those that are left to it and the later ones.
        left = [max(0, lookahead - seen) for seen in itertools.accumulate([0, *beyond])]
        self.blocks = nnx.List(
            TemporalBlock(
                narrow,
                wide,
                kernel_size,
                dilation,
                dropout,
                rngs,
                implementation=implementation,
                conv=conv,
                norm=norm,
                activation=activation,
                spatial_dropout=spatial_dropout,
                causal=causal,
                lookahead=before - after,
                conditioning=conditioning,
                conditioning_mode=conditioning_mode,
                **options,
            )
            for (narrow, wide), dilation, (before, after) in zip(
                itertools.pairwise(widths), dilations, itertools.pairwise(left), strict=True
            )
        )
        layer = layer_maker(conv, implementation, rngs, **options)
        self.readout = layer(widths[-1], out_features, 1)
        adapted = (layer(w, widths[-1], 1) if w != widths[-1] else None for w in widths[1:])
        self.skips = nnx.List(adapted) if skip_connections else None
        self.in_channels, self.lookahead, self.activation = in_channels, lookahead, activation
        self.conditioning, self.return_sequences = conditioning, return_sequences
        self.remat, self.left, self.norm = remat, tuple(left), norm

    @property
    def receptive_field(self) -> int:
        """How many steps of the input one step of the output depends on, its own included."""
        return 1 + sum(block.receptive_field - 1 for block in self.blocks)

    def __call__(
        self,
        x: jax.Array,
        *,
        condition: jax.Array | None = None,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        axis_name: str | tuple[str, ...] | None = None,
    ) -> jax.Array:
        """``(*batch, T, in_channels)`` to ``(*batch, T, out_features)``.

        Args:
          condition: ``(*batch, conditioning)``, or ``(*batch, T, conditioning)`` for a sequence.
          mask: ``(*batch, T)`` bool, False for padding, where the output is zero; as in
            `conv_pallas.conv1d`. The last step is then the last real one.
          segment_ids: ``(*batch, T)`` integers, packed sequences; as in `conv_pallas.conv1d`.
          axis_name: inside `jax.shard_map` the mesh axis, or axes, over which time is split: as in
            `conv_pallas.conv1d`. It takes ``return_sequences=True``, and a batch norm in eval
            mode; dropout draws the same for each part, unless its rngs differ.

        Returns:
          ``(*batch, T, out_features)``, or with ``return_sequences=False`` the last step's
          ``(*batch, out_features)``.

        Raises:
          ValueError: an argument does not fit x or the model.
        """
        if axis_name is not None and not self.return_sequences:
            raise ValueError(
                f"axis_name={axis_name!r} is for return_sequences=True: the last step is another "
                "device's"
            )
        condition, changing = check_condition(condition, x, self.conditioning)
        mask, segment_ids = check_sequences(x, mask, segment_ids)  # before they are cut
        sum_of_skips = None
        # Nothing is cut off where a statistic is taken over all steps, or which one is last
        # depends on the row.
        cut = not self.return_sequences and mask is None and self.norm != "batch"
        beyond = self.receptive_field - 1
        for level, block in enumerate(self.blocks):
            if cut:
                x = last_steps(x, 1 + beyond)
                condition = last_steps(condition, 1 + beyond) if changing else condition
                if segment_ids is not None:
                    segment_ids = last_steps(segment_ids, 1 + beyond, axis=-1)
                beyond -= block.receptive_field - 1
            given = condition if changing or condition is None else condition[..., 0, :]
            x, added = self._block(block, x, given, mask, segment_ids, axis_name)
            sum_of_skips = self._skip(sum_of_skips, level, last_steps(added, 1) if cut else added)
        y = self._finish(x, sum_of_skips)
        if not self.return_sequences:
            return self.readout(last_real(y, mask))[..., 0, :]
        return Whole(mask).hide(self.readout(y))

    def init_state(self, batch_size: int | Sequence[int], dtype: Any = None) -> dict[str, Any]:
        """The state of a stream that has not begun; see `step`.

        Args:
          batch_size: of every chunk, or a tuple of all its batch axes.
          dtype: of the chunks; None: the model's own.

        Returns:
          A dict of dicts, lists and arrays, to jit, scan, vmap, shard and save as it is:
          ``receptive_field`` rows for each member of the batch, about. What is in it is not for
          the caller, but that the arrays of any axes start with those of the batch.

        Raises:
          ValueError: the model can't stream, or ``batch_size`` is none.
        """
        batch = streaming.batch_axes(batch_size)
        self._check_streams()
        first = dtype = self.blocks[0].conv1._state_dtype(dtype)
        state = streaming.clock(batch)
        for level, block in enumerate(self.blocks):
            state[f"block{level}"], (y, added) = block.parts(batch, dtype)
            dtype = y.dtype
            if self.lookahead and self.conditioning is not None:
                state[f"condition{level}"] = streaming.ring(
                    batch, self.lookahead - self.left[level], self.conditioning, first
                )
            if self.lookahead and self.skips is not None:
                late = jax.eval_shape(functools.partial(self._skip, None, level), added)
                state[f"skip{level}"] = streaming.ring(
                    batch, self.left[level + 1], late.shape[-1], late.dtype
                )
        return state

    def step(
        self,
        x: jax.Array,
        state: dict[str, Any],
        *,
        condition: jax.Array | None = None,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The next chunk of a stream.

        The outputs, one chunk after the other, are those of a call with the whole sequence. With
        a lookahead of ``L`` they come ``L`` steps late: the first ``L`` mean nothing, and to get
        the last ``L`` go on with chunks whose mask is False throughout.

        The cost grows with the length of the chunk, the taps and the blocks, with neither the
        receptive field nor the age of the stream, as long as ``state`` is donated to the
        compiled function: `compiled_step` does that.

        Args:
          x: ``(*batch, T, in_channels)``; T is 1 or more and may change from call to call.
          state: from `init_state`, or the last call's.
          condition: ``(*batch, conditioning)`` for all steps of the chunk, or ``(*batch, T,
            conditioning)``.
          mask: ``(*batch, T)`` bool, as in a call of the model.
          segment_ids: ``(*batch, T)`` integers, as in a call of the model; a sequence may go on
            from chunk to chunk.

        Returns:
          ``(*batch, T, out_features)``, with ``return_sequences=False`` the chunk's last real
          step alone, where it has one; and the state for the next chunk.

        Raises:
          ValueError: an argument does not fit the model or the state; the model can't stream.
          TypeError: x promotes the computation to another dtype than the state's.
        """
        self._check_streams()
        x, chunk, clock = begin(x, self.in_channels, state, mask, segment_ids, self.lookahead)
        if (more := f"block{len(self.blocks)}") in state:
            raise ValueError(f"state must be of this model, from its init_state; it has a {more!r}")
        condition, changing = check_condition(
            condition, x, self.conditioning, late=self.lookahead > 0
        )
        if changing:
            condition = chunk.hide(condition)
        sum_of_skips = None
        for level, block in enumerate(self.blocks):
            given = condition
            if changing:
                given = chunk.late(f"condition{level}", given, self.lookahead - self.left[level])
            elif condition is not None:
                given = condition[..., 0, :]
            before = streaming.part(chunk.before, f"block{level}")
            inside = Chunk(before, chunk.age, packed=chunk.packed, gaps=chunk.gaps)
            x, added = block.run(x, given, inside)
            chunk.after[f"block{level}"], chunk.age = inside.after, inside.age
            late = (
                None
                if self.skips is None
                else lambda y, level=level: chunk.late(f"skip{level}", y, self.left[level + 1])
            )
            sum_of_skips = self._skip(sum_of_skips, level, added, late)
        y = self._finish(x, sum_of_skips)
        if not self.return_sequences:
            y = last_real(chunk.hide(y), chunk.real)
            return self.readout(y)[..., 0, :], chunk.after | clock
        return chunk.hide(self.readout(y)), chunk.after | clock

    def reset(self, state: dict[str, Any], members: jax.Array | bool) -> dict[str, Any]:
        """The state in which some members of the batch are at their start again.

        Args:
          state: of a stream.
          members: ``(*batch,)`` bool, True for those to restart; or a bool for all.

        Returns:
          A state of the same structure; the one that was given stays as it is.

        Raises:
          ValueError: ``members`` is not bool of the shape of the batch.
        """
        return streaming.restart(state, members)

    def _block(self, block, x, condition, mask, segment_ids, axis_name):
        block.check_axis(axis_name)

        def forward(block, x, condition, mask, segment_ids):
            return block.run(x, condition, Whole(mask, segment_ids, axis_name))

        if self.remat:
            policy = self.remat if callable(self.remat) else None
            forward = nnx.remat(forward, policy=policy, graph_updates=False)
        return forward(block, x, condition, mask, segment_ids)

    def _skip(self, total, level, added, late=None):
        """The sum of what the blocks added, or None without skip connections."""
        if self.skips is None:
            return None
        adapt = self.skips[level]
        added = added if adapt is None else adapt(added)
        added = added if late is None else late(added)
        return added if total is None else total + added

    def _finish(self, x, sum_of_skips):
        if sum_of_skips is None:
            return x
        act = (
            (lambda y: y) if self.activation == "glu" else ops.activation_function(self.activation)
        )
        return act(sum_of_skips)

    def _check_streams(self) -> None:
        streaming.check_step(self)
        for block in self.blocks:
            block.check_streams()
