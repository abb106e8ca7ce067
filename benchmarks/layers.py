"""What the benchmarks measure: published layers, and cases that none of those covers.

The published ones are in `conv_pallas._layers`, where the demo finds them too.
"""

import dataclasses
import functools

from flax import nnx

from conv_pallas import _layers
from conv_pallas._layers import PUBLISHED, Layer, find
from conv_pallas.nn import TCN

_NONE = "no model: a case that the published layers leave out"


def _case(name: str, N: int, T: int, C: int, O: int, K: int, **more) -> Layer:
    return Layer(name, _NONE, N, T, C, O, K, **more)


_LENGTHS = (64, 256, 1024, 4096, 8192)

CASES: tuple[Layer, ...] = (
    _case("depthwise/D1", 8, 2048, 512, 512, 4, G=512),
    _case("depthwise/D64", 8, 2048, 512, 512, 4, D=64, G=512),
    _case("depthwise/N2", 2, 1000, 512, 512, 3, G=512),
    _case("depthwise/bfloat16", 8, 2048, 512, 512, 4, G=512, dtype="bfloat16"),
    _case("depthwise/multiplier", 8, 2048, 128, 256, 4, D=2, G=128),
    _case("depthwise/stride", 8, 2048, 256, 256, 4, S=2, G=256),
    _case("grouped/G2", 4, 1024, 256, 256, 3, D=4, G=2),
    _case("grouped/G8", 4, 1024, 256, 256, 3, D=4, G=8),
    _case("grouped/G64", 4, 1024, 256, 256, 3, D=4, G=64),
    _case("stride/S2", 8, 4096, 64, 64, 4, S=2),
    _case("stride/S2/D8", 8, 4096, 64, 64, 3, D=8, S=2),
    _case("stride/S4/C1", 8, 16384, 1, 64, 16, S=4),
    *(_case(f"length/dense/T{T}", 4, T, 32, 32, 3, D=8) for T in _LENGTHS),
    *(_case(f"length/depthwise/T{T}", 4, T, 32, 32, 3, D=8, G=32) for T in _LENGTHS),
    _case("pointwise/C64", 8, 4096, 64, 128, 1),
    _case("bfloat16/C25", 64, 784, 25, 25, 7, D=16, dtype="bfloat16"),
    _case("bfloat16/C128", 8, 2048, 128, 128, 3, D=8, dtype="bfloat16"),
    _case("bfloat16/C512", 8, 1024, 512, 512, 3, D=64, dtype="bfloat16"),
)

LAYERS: tuple[Layer, ...] = PUBLISHED + CASES


@dataclasses.dataclass(frozen=True, slots=True)
class Stack:
    """A whole temporal convolutional network, as `conv_pallas.nn.TCN` builds it.

    Attributes:
      C, O: channels in and out; each of ``blocks`` blocks is ``width`` wide.
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

    def costs(self, training: bool = False) -> tuple[tuple[int, int], ...]:
        """As `Layer.costs`, of all convolutions."""
        return tuple(cost for layer in self.layers() for cost in layer.costs(training))

    def build(self, **more) -> TCN:
        """Without dropout, which would draw random numbers in what is timed."""
        widths = [self.width] * self.blocks
        return TCN(self.C, widths, self.O, self.K, 0.0, nnx.Rngs(0), **more)

    def __str__(self) -> str:
        return (
            f"N={self.N} T={self.T} C={self.C} O={self.O} K={self.K} "
            f"{self.blocks} blocks of {self.width}"
        )


def _tcn(model: str, *sizes: int) -> Stack:
    return Stack(f"{model}/stack", find(f"{model}/D1").source, *sizes)


# Of github.com/locuslab/TCN with the settings in its scripts; the words are embedded already.
STACKS: tuple[Stack, ...] = (
    _tcn("tcn-adding", 32, 400, 2, 1, 7, 30, 8),
    _tcn("tcn-copy", 32, 1020, 1, 10, 8, 10, 8),
    _tcn("tcn-mnist", 64, 784, 1, 10, 7, 25, 8),
    _tcn("tcn-music", 1, 256, 88, 88, 5, 150, 4),
    _tcn("tcn-ptb-characters", 32, 400, 100, 50, 3, 450, 3),
    _tcn("tcn-ptb-words", 16, 80, 600, 600, 3, 600, 4),
)

type Subject = Layer | Stack

ALL: tuple[Subject, ...] = (*LAYERS, *STACKS)


def quick() -> tuple[Subject, ...]:
    """The most dilated layer of each published model, a case of each other kind, and a stack."""
    last = {layer.model: layer for layer in PUBLISHED}
    last["wide-and-long"] = find("wide-and-long/D4")  # more dilation needs more steps
    names = ("depthwise/D1", "depthwise/bfloat16", "grouped/G8", "stride/S2", "bfloat16/C25")
    return (*last.values(), *(find(name, CASES) for name in names), STACKS[3])


# Products of a dense forward pass above which the benchmarks cut a layer down for a CPU.
MOST_ON_CPU = 1 << 27
MOST_IF_QUICK = 1 << 25
# How many times as many a whole network's convolutions may have together: a training step takes
# some tenths of a second on two cores then, and networks of narrow blocks keep most sequences.
STACK = 20


def fit(subject: Subject, platform: str, most: int = MOST_ON_CPU) -> Subject:
    """As `conv_pallas._layers.fit`; a stack gets fewer sequences, and keeps their length."""
    if isinstance(subject, Layer):
        return _layers.fit(subject, platform, most)
    products = lambda stack: sum(layer.products for layer in stack.layers())  # noqa: E731
    while platform == "cpu" and subject.N > 1 and products(subject) > STACK * most:
        subject = dataclasses.replace(subject, N=subject.N // 2)
    return subject
