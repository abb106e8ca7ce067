"""The convolutions of which `benchmarks.formulations` times every formulation."""

import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from benchmarks import layers
from conv_pallas._layers import Layer, select


def label(layer: Layer) -> str:
    """The convolution of a layer, without what it is by default."""
    sizes = [f"{k}{v}" for k in "NTCOKDSEG" if (v := getattr(layer, k)) > 1 or k in "NTCOK"]
    padding = [str(layer.padding)] * (layer.padding != "CAUSAL" and layer.E == 1)
    return " ".join([*sizes, layer.dtype, *padding])


def stock_of(layer: Layer) -> str:
    """The formulation that nnx.Conv takes, forward and in kernel gradients.

    In an input gradient either of the two is one `lax.conv_general_dilated` that pads in its
    window, where nnx.Conv's, if the padding is CAUSAL, computes the gradient of the zeros too.
    """
    return "padded" if layer.padding == "CAUSAL" else "native"


# N, T, C, O, K, D, S, G; padding is CAUSAL.
CASES = (
    # Dense, from a handful of steps and channels to many.
    (8, 64, 16, 16, 3),
    (32, 64, 25, 25, 7, 2),
    (4, 128, 32, 32, 3),
    (8, 256, 32, 32, 7, 4),
    (8, 1000, 64, 64, 3, 16),
    (4, 1000, 128, 128, 3, 64),
    (4, 1000, 128, 128, 7, 8),
    (2, 512, 512, 512, 3, 4),
    (8, 1000, 128, 128, 3, 16),
    (16, 2000, 128, 128, 3, 4),
    (4, 1000, 256, 256, 5, 4),
    (16, 80, 600, 600, 3, 4),
    (1, 4096, 512, 512, 3, 64),
    (1, 16000, 32, 32, 3, 512),
    (4, 2000, 32, 32, 21),
    (4, 500, 64, 64, 51),
    # One or several sequences, short and long: who pads, and whether there is enough to multiply.
    (1, 64, 512, 512, 3, 4),
    (1, 64, 512, 512, 8, 4),
    (1, 100, 450, 450, 3, 4),
    (1, 5000, 32, 32, 3, 512),
    (1, 16384, 64, 64, 3, 1024),
    (8, 4000, 64, 128, 2, 16),
    (32, 32, 512, 512, 3),
    # Enough to be taken in pieces.
    (8, 1000, 25, 25, 7, 4),
    (16, 4096, 16, 16, 3, 4),
    (16, 4096, 25, 25, 7, 4),
    (16, 4096, 32, 32, 7, 4),
    (32, 784, 25, 25, 7, 16),
    (32, 784, 25, 25, 7),
    # Many taps.
    (4, 2000, 4, 4, 31, 4),
    (4, 2000, 12, 12, 21, 4),
    (4, 2000, 20, 20, 21, 4),
    (4, 2000, 25, 25, 31, 4),
    (4, 2000, 32, 8, 31, 2),
    # More than the convolution likes to have between its registers, and less than needs pieces.
    (32, 1020, 10, 10, 8, 32),
    (32, 400, 16, 16, 3),
    (8, 400, 20, 20, 5, 8),
    (8, 400, 30, 30, 3, 8),
    (32, 400, 30, 30, 7, 16),
    (4, 256, 32, 32, 3, 8),
    # Fewer steps than channels.
    (1, 80, 600, 600, 3, 4),
    (1, 128, 256, 256, 3),
    (1, 256, 600, 600, 3),
    # Few channels in or out.
    (4, 4000, 1, 1, 3),
    (4, 1000, 1, 25, 7),
    (4, 4000, 1, 64, 16),
    (4, 4000, 2, 2, 3),
    (4, 4000, 4, 4, 8),
    (4, 2000, 8, 8, 3),
    (4, 2000, 64, 1, 3),
    (4, 2000, 32, 1, 8),
    (8, 500, 256, 4, 5, 4),
    (8, 1000, 64, 10, 3),
    (8, 500, 64, 24, 3, 2),
    (4, 2000, 2, 256, 7, 4),
    (16, 500, 1, 128, 7),
    # 1x1.
    (4, 1000, 25, 10, 1),
    (4, 1000, 64, 128, 1),
    (16, 500, 128, 8, 1),
    (32, 1000, 3, 16, 1, 1, 2),
    # Depthwise, and with a multiplier.
    (4, 1024, 512, 512, 4, 1, 1, 512),
    (4, 1024, 512, 512, 4, 64, 1, 512),
    (4, 64, 16, 16, 3, 1, 1, 16),
    (4, 1024, 64, 64, 31, 1, 1, 64),
    (4, 1000, 64, 64, 4, 1, 2, 64),
    (4, 512, 64, 256, 4, 2, 1, 64),
    (4, 64, 32, 32, 3, 2, 1, 32),
    (1, 256, 256, 256, 3, 1, 1, 256),
    (8, 1000, 64, 64, 7, 1, 1, 64),
    (4, 1000, 64, 64, 16, 1, 1, 64),
    (1, 2000, 512, 512, 4, 1, 1, 512),
    (2, 1000, 512, 512, 3, 1, 1, 512),
    (2, 1000, 256, 256, 33, 1, 1, 256),
    (1, 1000, 512, 512, 87, 2, 1, 512),
    (2, 500, 768, 768, 31, 1, 1, 768),
    (4, 1000, 256, 256, 9, 1, 1, 256),
    (8, 2000, 256, 256, 75, 1, 1, 256),
    (2, 1000, 256, 256, 17, 8, 1, 256),
    (4, 1000, 256, 256, 33, 1, 2, 256),
    (2, 1000, 64, 256, 31, 1, 1, 64),
    # Grouped.
    (4, 512, 32, 32, 3, 1, 1, 2),
    (4, 1024, 256, 256, 3, 4, 1, 2),
    (4, 1024, 256, 256, 3, 4, 1, 8),
    (4, 1024, 256, 256, 3, 4, 1, 32),
    (4, 512, 128, 128, 7, 16, 1, 8),
    (2, 512, 1024, 1024, 3, 1, 1, 64),
    (1, 1024, 256, 256, 3, 4, 1, 4),
    (2, 1000, 512, 512, 3, 2, 1, 128),
    (4, 500, 128, 128, 5, 1, 1, 32),
    # Strided.
    (4, 4096, 1, 64, 8, 1, 4),
    (4, 1000, 128, 128, 3, 1, 2),
    (4, 1000, 64, 64, 4, 8, 2),
    (4, 1000, 128, 128, 5, 1, 2, 8),
    (4, 2000, 64, 64, 4, 1, 2),
    (8, 4000, 32, 32, 5, 1, 2),
    (4, 500, 25, 25, 5, 1, 2),
    (4, 4000, 1, 32, 8, 1, 2),
    (4, 2000, 32, 1, 16, 1, 4),
    (4, 500, 768, 768, 3, 1, 2, 64),
    (1, 4000, 64, 64, 4, 1, 2),
    (1, 4000, 64, 64, 17, 1, 2),
    (1, 30000, 1, 64, 16, 1, 8),
    (2, 16000, 32, 64, 16, 1, 4),
    (2, 16000, 32, 64, 31, 1, 3),
    (4, 2000, 32, 32, 9, 1, 2),
    (4, 4000, 16, 16, 16, 1, 4),
    (4, 1000, 128, 128, 8, 1, 4),
    (4, 500, 256, 256, 5, 1, 2),
    (6, 1500, 64, 64, 10, 1, 5),
    (8, 1000, 64, 64, 3, 1, 2),
    (8, 1000, 64, 64, 5, 1, 2),
    (8, 1000, 64, 64, 17, 1, 2),
    (12, 500, 128, 128, 10, 1, 5),
    (16, 1000, 16, 16, 8, 1, 4),
    (4, 1000, 128, 128, 4, 1, 2),
    (4, 2000, 64, 16, 16, 1, 4),
    (4, 4000, 64, 1, 17, 1, 2),
    (1, 10000, 64, 64, 5, 2, 2),
    (1, 10000, 64, 64, 16, 2, 2),
)
# Of padding a good part: dilations that are not far from the sequence's length.
DEEP = (
    (32, 600, 30, 30, 8, 64),
    (32, 400, 30, 30, 7, 32),
    (64, 784, 25, 25, 7, 128),
    (8, 1000, 64, 64, 3, 128),
    (8, 1000, 64, 64, 3, 256),
    (8, 1000, 64, 64, 5, 64),
    (8, 1000, 64, 64, 7, 128),
    (4, 1000, 64, 64, 15, 64),
    (8, 1000, 128, 128, 2, 256),
    (8, 1000, 128, 128, 2, 512),
    (8, 1000, 128, 128, 3, 256),
    (2, 1000, 512, 512, 3, 256),
)
# Padding that nnx.Conv leaves to the convolution.
SAME = (
    (1, 1024, 128, 128, 7, 3),
    (1, 5000, 64, 64, 3, 16),
    (2, 4096, 64, 64, 3, 3),
    (2, 256, 256, 256, 3, 3),
    (4, 8192, 32, 32, 3, 3),
    (1, 3750, 32, 32, 21, 10),
    (1, 7500, 15, 15, 51, 8),
    (1, 100000, 15, 15, 51, 8),
    (1, 417, 512, 512, 75, 1, 1, 512),
    (8, 1000, 64, 64, 3, 512),
    (8, 1000, 64, 64, 5, 128),
)
# N, T, C, O, K, E: with as many zeros as make E steps of each. Their kernel gradients are those of
# strided layers.
TRANSPOSED = (
    (1, 32, 512, 256, 16, 8),
    (4, 32, 512, 256, 16, 8),
    (16, 32, 512, 256, 16, 8),
    (1, 128, 512, 256, 16, 8),
    (2, 256, 256, 128, 16, 8),
    (4, 2048, 128, 64, 4, 2),
    (4, 4096, 64, 32, 4, 2),
    (8, 3999, 512, 1, 16, 8),
    (4, 1000, 64, 64, 4, 2),
    (4, 500, 128, 128, 10, 5),
    (2, 100, 64, 64, 4, 2),
    (1, 64, 128, 128, 8, 4),
)
BFLOAT16 = (
    (32, 64, 25, 25, 7, 2),
    (4, 1000, 128, 128, 3, 8),
    (2, 512, 512, 512, 3, 4),
    (8, 784, 25, 25, 7, 4),
    (4, 1000, 64, 64, 3, 16),
    (16, 4096, 16, 16, 3, 4),
    (16, 4096, 25, 25, 7, 4),
    (16, 4096, 64, 64, 3, 4),
    (16, 4096, 64, 64, 7, 4),
    (8, 1000, 128, 128, 3, 4),
    (4, 1000, 1, 25, 7),
    (4, 2000, 64, 1, 3),
    (4, 1000, 64, 128, 1),
    (16, 4096, 16, 16, 15, 4),
    (4, 2000, 25, 25, 31, 4),
    (4, 1000, 64, 64, 51, 4),
    (1, 100000, 64, 64, 3, 16),
    (4, 1024, 512, 512, 4, 1, 1, 512),
    (4, 1000, 256, 256, 31, 1, 1, 256),
    (4, 512, 64, 256, 4, 2, 1, 64),
    (4, 512, 128, 128, 3, 4, 1, 8),
    (4, 1000, 64, 64, 7, 1, 1, 8),
    (4, 512, 128, 128, 3, 4, 1, 32),
    (8, 1000, 16, 8, 7),
    (8, 500, 64, 64, 3, 1, 2, 8),
    (8, 1000, 64, 64, 16, 1, 4),
    (2, 8000, 64, 64, 33, 1, 4),
    (1, 16000, 64, 64, 17, 1, 2),
    (4, 16000, 32, 32, 64, 1, 2),
    (1, 10000, 64, 64, 33, 2, 2),
    (8, 4000, 1, 64, 16, 1, 2),
    (8, 4000, 64, 1, 16, 1, 2),
    (1, 40000, 64, 64, 64, 1, 2),
    (8, 1000, 64, 64, 3, 256),
    (8, 500, 64, 64, 5, 100),
)
FLOAT16 = (
    (4, 1000, 128, 128, 3, 2),
    (4, 1024, 128, 128, 4, 1, 1, 128),
    (4, 1000, 64, 64, 4, 1, 1, 16),
    (16, 500, 64, 64, 5, 1, 2, 8),
)
# Kernels that fill the caches or leave them: where filtering ends, of as many steps.
LARGE = tuple(
    (1, T, C, C, K)
    for C, K in (
        (512, 7), (512, 11), (512, 15), (512, 21), (640, 5), (768, 5), (1024, 3), (1024, 5),
        (1536, 3),
    )
    for T in (256, 512, 1024, 2048)
)  # fmt: skip
QUICK = ((2, 64, 8, 8, 3, 2), (2, 64, 8, 8, 3, 2, 1, 8), (2, 64, 8, 8, 3, 1, 1, 2))


def large() -> Iterator[Layer]:
    return (Layer("case", "made up", *sizes) for sizes in LARGE)


def sweep(quick: bool = False) -> Iterator[Layer]:
    for more, cases in (
        ({}, QUICK if quick else (*CASES, *DEEP)),
        ({"padding": "SAME"}, () if quick else SAME),
        ({"dtype": "bfloat16"}, () if quick else BFLOAT16),
        ({"dtype": "float16"}, () if quick else FLOAT16),
    ):
        for sizes in cases:
            yield Layer("case", "made up", *sizes, **more)
    for *sizes, K, E in () if quick else TRANSPOSED:
        yield Layer("case", "made up", *sizes, K, padding=K - 1 - (K - E) // 2, E=E)


def drawn(
    count: int,
    seed: int,
    products: tuple[int, int] = (2**19, 2**29),
    dtypes: Sequence[str] = ("float32", "float32", "float32", "bfloat16"),
) -> Iterator[Layer]:
    """Layers of sizes that somebody might have, where the rules that were made of `sweep` may err.

    Args:
      products: at least and at most, in a forward pass; on a CPU it takes some 10 us to 10 ms.
      dtypes: as often as they are to be drawn.
    """
    least, most = products
    rng = np.random.default_rng(seed)
    pick = lambda values: values[rng.integers(len(values))]  # noqa: E731
    layers = (_draw(pick, rng.random, dtypes) for _ in itertools.count())
    return itertools.islice((layer for layer in layers if least < layer.products < most), count)


def _draw(pick, chance, dtypes: Sequence[str]) -> Layer:
    width = lambda: pick((4, 8, 10, 12, 16, 20, 25, 32, 48, 64, 80, 96, 128, 192, 256, 384, 512))  # noqa: E731
    C = width()
    K = pick((2, 3, 3, 3, 4, 5, 7, 9, 15, 31))
    S = pick((1, 1, 1, 1, 1, 2, 4))
    kind = pick(("dense", "dense", "depthwise", "grouped"))
    G = C if kind == "depthwise" else pick((2, 4, 8)) if kind == "grouped" and C % 8 == 0 else 1
    O = C if G > 1 or chance() < 0.7 else width()
    D = 2 ** pick(range(8)) if S == 1 and chance() < 0.5 else 1
    T = round(2 ** (6 + 7 * chance()))
    dtype = pick(dtypes)
    padding = pick(("CAUSAL", "CAUSAL", "SAME"))
    return Layer("case", "drawn", 2 ** pick(range(6)), T, C, O, K, D, S, G, padding, dtype=dtype)


def published(text: str) -> list[Layer]:
    """Of the layers that the benchmarks time those that `select` finds, each size once."""
    chosen = (layer for layer in select(text, layers.ALL) if isinstance(layer, Layer))
    platform = jax.default_backend()
    fitted = (layers.fit(layer, platform) for layer in chosen)
    return list({label(layer): layer for layer in fitted}.values())
