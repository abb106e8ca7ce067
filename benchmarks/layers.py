"""What the benchmarks measure: published layers, and cases that none of those covers.

The published ones are in `conv_pallas._layers`, where the demo finds them too.
"""

from conv_pallas._layers import PUBLISHED, Layer

_NONE = "no model: a case that the published layers leave out"


def _case(name: str, N: int, T: int, C: int, O: int, K: int, **more) -> Layer:
    return Layer(name, _NONE, N, T, C, O, K, **more)


CASES: tuple[Layer, ...] = (
    _case("depthwise/D1", 8, 2048, 512, 512, 4, G=512),
    _case("depthwise/D64", 8, 2048, 512, 512, 4, D=64, G=512),
    _case("depthwise/bfloat16", 8, 2048, 512, 512, 4, G=512, dtype="bfloat16"),
    _case("depthwise/multiplier", 8, 2048, 128, 256, 4, D=2, G=128),
    _case("depthwise/stride", 8, 2048, 256, 256, 4, S=2, G=256),
    _case("grouped/G2", 4, 1024, 256, 256, 3, D=4, G=2),
    _case("grouped/G8", 4, 1024, 256, 256, 3, D=4, G=8),
    _case("grouped/G64", 4, 1024, 256, 256, 3, D=4, G=64),
    _case("stride/S2", 8, 4096, 64, 64, 4, S=2),
    _case("stride/S2/D8", 8, 4096, 64, 64, 3, D=8, S=2),
    _case("stride/S4/C1", 8, 16384, 1, 64, 16, S=4),
    _case("pointwise/C64", 8, 4096, 64, 128, 1),
    _case("bfloat16/C25", 64, 784, 25, 25, 7, D=16, dtype="bfloat16"),
    _case("bfloat16/C128", 8, 2048, 128, 128, 3, D=8, dtype="bfloat16"),
    _case("bfloat16/C512", 8, 1024, 512, 512, 3, D=64, dtype="bfloat16"),
)

LAYERS: tuple[Layer, ...] = PUBLISHED + CASES


def quick() -> tuple[Layer, ...]:
    """The most dilated layer of each published model, and every other case."""
    last = {layer.model: layer for layer in PUBLISHED}
    return (*last.values(), *CASES)
