"""The temporal convolutional network of Bai, Kolter & Koltun (2018), arXiv:1803.01271.

Arrays are ``(*batch, T, C)``, with any number of batch axes, and every layer is causal: step ``t``
of the output depends on steps ``0`` to ``t`` of the input.
"""

import functools
import itertools
import numbers
from collections.abc import Sequence

import jax
from flax import nnx

from conv_pallas.dispatch import Implementation
from conv_pallas.nn.conv import Conv


class TemporalBlock(nnx.Module):
    """(Dilated causal convolution, ReLU, dropout) twice, plus the residual, then ReLU.

    The residual is x itself, or a 1x1 convolution of it where the widths differ. Dropout is on
    after ``model.train()``, as it is at first, and off after ``model.eval()``.

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
        parameters under the same names, from stock layers.

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
    ):
        _check_positive(
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=kernel_size,
            dilation=dilation,
        )
        _check_dropout(dropout)
        if not isinstance(rngs, nnx.Rngs):
            raise ValueError(f"rngs must be an nnx.Rngs, such as nnx.Rngs(0), got {rngs!r}")
        layer = _causal(conv, implementation, rngs)
        self.conv1 = layer(in_channels, out_channels, (kernel_size,), kernel_dilation=dilation)
        self.dropout1 = nnx.Dropout(dropout, rngs=rngs)
        self.conv2 = layer(out_channels, out_channels, (kernel_size,), kernel_dilation=dilation)
        self.dropout2 = nnx.Dropout(dropout, rngs=rngs)
        self.shortcut = layer(in_channels, out_channels, 1) if in_channels != out_channels else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(*batch, T, C)`` to ``(*batch, T, O)``."""
        y = self.dropout1(nnx.relu(self.conv1(x)))
        y = self.dropout2(nnx.relu(self.conv2(y)))
        residual = x if self.shortcut is None else self.shortcut(x)
        return nnx.relu(y + residual)


class TCN(nnx.Module):
    """Temporal blocks with dilations 1, 2, 4, ..., then a 1x1 convolution.

    With ``L`` blocks, one step of the output sees ``1 + 2 * (kernel_size - 1) * (2**L - 1)``
    steps of the input. To classify a sequence, take the last step: ``model(x)[..., -1, :]``.

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
        _check_positive(
            in_channels=in_channels,
            out_features=out_features,
            kernel_size=kernel_size,
            **{f"num_channels[{level}]": width for level, width in enumerate(widths[1:])},
        )
        _check_dropout(dropout)
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.blocks = nnx.List(
            TemporalBlock(
                narrow,
                wide,
                kernel_size,
                2**level,
                dropout,
                rngs,
                implementation=implementation,
                conv=conv,
            )
            for level, (narrow, wide) in enumerate(itertools.pairwise(widths))
        )
        self.readout = _causal(conv, implementation, rngs)(widths[-1], out_features, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(*batch, T, in_channels)`` to ``(*batch, T, out_features)``."""
        for block in self.blocks:
            x = block(x)
        return self.readout(x)


def _causal(conv, implementation, rngs):
    # nnx.Conv does not know the keyword, and None is what Conv assumes without it.
    order = {} if implementation is None else {"implementation": implementation}
    return functools.partial(conv, padding="CAUSAL", rngs=rngs, **order)


def _check_positive(**sizes):
    for name, size in sizes.items():
        if not isinstance(size, numbers.Integral) or size < 1:
            raise ValueError(f"{name} must be an int of 1 or more, got {size!r}")


def _check_dropout(dropout):
    if not (isinstance(dropout, numbers.Real) and 0 <= dropout < 1):
        raise ValueError(f"dropout must be a number in [0, 1), got {dropout!r}")
