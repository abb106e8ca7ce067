"""Whole networks that the benchmarks measure: as published, with stock layers or ours.

    network = find("tcn-music/stack", STACKS)
    model = network.build(conv=nnx.Conv)

makes of x ``(N, T, C)`` y ``(N, T, O)``.
"""

import dataclasses
import functools
from collections.abc import Sequence

from flax import nnx

from conv_pallas._layers import Layer, find
from conv_pallas.dispatch import Implementation
from conv_pallas.nn import TCN, Conv


@dataclasses.dataclass(frozen=True)
class Network:
    """What is known of a network: batch, length, channels in and out, and of what it is made.

    Attributes:
      source: who published it.
      K: taps; each of ``blocks`` blocks is ``width`` wide.
      kind: what results call it.
    """

    name: str
    source: str
    N: int
    T: int
    C: int
    O: int
    K: int
    width: int
    blocks: int
    dtype: str = "float32"

    kind = "whole stack"

    @property
    def model(self) -> str:
        return self.name.partition("/")[0]

    def layers(self) -> list[Layer]:
        """Its convolutions."""
        raise NotImplementedError

    def build(
        self, *, conv: type[nnx.Conv] = Conv, implementation: Implementation = None
    ) -> nnx.Module:
        """The network, its parameters drawn from a fixed seed, without dropout."""
        raise NotImplementedError

    def costs(self, training: bool = False) -> tuple[tuple[int, int], ...]:
        """As `Layer.costs`, of all convolutions."""
        return tuple(cost for layer in self.layers() for cost in layer.costs(training))


@dataclasses.dataclass(frozen=True)
class Stack(Network):
    """A temporal convolutional network, as `conv_pallas.nn.TCN` builds it."""

    def layers(self) -> list[Layer]:
        found, narrow = [], self.C
        for level in range(self.blocks):
            sizes = (self.N, self.T, narrow, self.width)
            make = functools.partial(Layer, self.name, self.source, *sizes, dtype=self.dtype)
            found += [
                make(self.K, 1 << level),
                dataclasses.replace(make(self.K, 1 << level), C=self.width),
            ]
            if narrow != self.width:
                found.append(make(1))
            narrow = self.width
        return [
            *found,
            Layer(self.name, self.source, self.N, self.T, narrow, self.O, 1, dtype=self.dtype),
        ]

    def build(
        self, *, conv: type[nnx.Conv] = Conv, implementation: Implementation = None
    ) -> nnx.Module:
        widths = [self.width] * self.blocks
        more = _order(implementation)
        return TCN(self.C, widths, self.O, self.K, 0.0, nnx.Rngs(0), conv=conv, **more)

    def __str__(self) -> str:
        return (
            f"N={self.N} T={self.T} C={self.C} O={self.O} K={self.K} "
            f"{self.blocks} blocks of {self.width}"
        )


@dataclasses.dataclass(frozen=True)
class Separator(Network):
    """A repeat of Conv-TasNet's separator: what its depthwise convolutions stand between.

    The layer norms are of a step, and ReLU stands in the place of PReLU.
    """

    def layers(self) -> list[Layer]:
        found = []
        for level in range(self.blocks):
            sizes = (self.name, self.source, self.N, self.T)
            make = functools.partial(Layer, *sizes, dtype=self.dtype)
            found += [
                make(self.C, self.width, 1),
                make(self.width, self.width, self.K, 1 << level, G=self.width),
                make(self.width, self.C, 1),
            ]
        return found

    def build(
        self, *, conv: type[nnx.Conv] = Conv, implementation: Implementation = None
    ) -> nnx.Module:
        make = functools.partial(conv, rngs=nnx.Rngs(0), **_order(implementation))
        blocks = (_Separable(self, 1 << level, make) for level in range(self.blocks))
        return nnx.Sequential(*blocks)

    def __str__(self) -> str:
        return (
            f"N={self.N} T={self.T} C={self.C} K={self.K} {self.blocks} blocks of {self.width}, "
            "depthwise"
        )


class _Separable(nnx.Module):
    """1x1 convolution, depthwise convolution, 1x1 convolution, residual."""

    def __init__(self, of: Separator, dilation: int, conv):
        rngs = nnx.Rngs(0)
        self.widen, self.norm1 = conv(of.C, of.width, 1), nnx.LayerNorm(of.width, rngs=rngs)
        self.depthwise = conv(
            of.width, of.width, of.K, kernel_dilation=dilation, padding="CAUSAL",
            feature_group_count=of.width,
        )  # fmt: skip
        self.norm2, self.narrow = nnx.LayerNorm(of.width, rngs=rngs), conv(of.width, of.C, 1)

    def __call__(self, x):
        h = self.depthwise(self.norm1(nnx.relu(self.widen(x))))
        return x + self.narrow(self.norm2(nnx.relu(h)))


def _order(implementation: Implementation) -> dict[str, Implementation]:
    """An argument that stock layers don't have."""
    return {} if implementation is None else {"implementation": implementation}


def _tcn(model: str, *sizes: int) -> Stack:
    return Stack(f"{model}/stack", find(f"{model}/D1").source, *sizes)


# Of github.com/locuslab/TCN with the settings in its scripts; the words are embedded already. Of
# Conv-TasNet's best network one of three repeats, and two sequences of a second.
STACKS: Sequence[Network] = (
    _tcn("tcn-adding", 32, 400, 2, 1, 7, 30, 8),
    _tcn("tcn-copy", 32, 1020, 1, 10, 8, 10, 8),
    _tcn("tcn-mnist", 64, 784, 1, 10, 7, 25, 8),
    _tcn("tcn-music", 1, 256, 88, 88, 5, 150, 4),
    _tcn("tcn-ptb-characters", 32, 400, 100, 50, 3, 450, 3),
    _tcn("tcn-ptb-words", 16, 80, 600, 600, 3, 600, 4),
    Separator("conv-tasnet/stack", find("conv-tasnet/D1").source, 2, 1000, 128, 128, 3, 512, 8),
)
