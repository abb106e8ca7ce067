"""What the benchmarks measure: published layers, and cases that none of those covers.

The published layers are in `conv_pallas._layers`, where the demo finds them too, and whole networks
in `benchmarks.networks`.
"""

import dataclasses

from benchmarks.networks import STACKS, Network
from conv_pallas import _layers
from conv_pallas._layers import PUBLISHED, Layer, find

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


type Subject = Layer | Network

ALL: tuple[Subject, ...] = (*LAYERS, *STACKS)


def quick() -> tuple[Subject, ...]:
    """The most dilated layer of each published model, a case of each other kind, a network."""
    last = {layer.model: layer for layer in PUBLISHED}
    last["wide-and-long"] = find("wide-and-long/D4")  # more dilation needs more steps
    names = ("depthwise/D1", "depthwise/bfloat16", "grouped/G8", "stride/S2", "bfloat16/C25")
    return (*last.values(), *(find(name, CASES) for name in names), find("tcn-music/stack", STACKS))


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
