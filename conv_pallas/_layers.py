"""Layers that somebody published, in the size they were trained or run in.

The demo, the benchmarks and whoever asks for a layer by name read this one table.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from conv_pallas.activations import FUNCTIONS
from conv_pallas.dispatch import Implementation
from conv_pallas.nn import Conv
from conv_pallas.ops import conv1d
from conv_pallas.spec import ConvSpec, Operation, Problem, make_spec, problem_of


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """One convolution of a model. The letters are those of `conv_pallas.spec`.

    Attributes:
      name: the model, then what tells its layers apart: ``"wavenet/D512"``.
      source: where the model is described.
      padding: as in `conv_pallas.conv1d`, of those that pad with zeros.
      activation: what directly follows the convolution, as in `conv_pallas.conv1d`; None where
        nothing elementwise does (a gate over pairs of channels, a norm, another convolution).
      dtype: of parameters and activations.
      E: the input's dilation; a layer that has one is a transposed convolution of that stride.
    """

    name: str
    source: str
    N: int
    T: int
    C: int
    O: int
    K: int
    D: int = 1
    S: int = 1
    G: int = 1
    padding: str | int = "CAUSAL"
    activation: str | None = None
    dtype: str = "float32"
    E: int = 1

    @property
    def model(self) -> str:
        return self.name.partition("/")[0]

    @property
    def kind(self) -> str:
        if self.G == 1:
            kind = "dense"
        else:
            kind = "depthwise" if self.G == self.C else "grouped"
        if self.E > 1:
            return f"{kind}, transposed, stride {self.E}"
        return kind if self.S == 1 else f"{kind}, stride {self.S}"

    @property
    def x_shape(self) -> tuple[int, int, int]:
        return (self.N, self.T, self.C)

    @property
    def kernel_shape(self) -> tuple[int, int, int]:
        return (self.K, self.C // self.G, self.O)

    @property
    def y_shape(self) -> tuple[int, int, int]:
        return (self.N, self.spec.out_time, self.O)

    @property
    def geometry(self) -> dict[str, Any]:
        """The arguments of `conv_pallas.conv1d` that say what shape the result has."""
        return dict(
            strides=self.S, padding=self.padding, input_dilation=self.E, kernel_dilation=self.D,
            feature_group_count=self.G,
        )  # fmt: skip

    @property
    def spec(self) -> ConvSpec:
        return make_spec(self.x_shape, self.kernel_shape, **self.geometry)[0]

    def problem(self, operation: Operation, platform: str) -> Problem:
        """An operation as kernels are asked for it."""
        x, w = (jax.ShapeDtypeStruct(s, self.dtype) for s in (self.x_shape, self.kernel_shape))
        return problem_of(operation, x, w, self.spec, None, x.dtype, platform)

    @property
    def products(self) -> int:
        """Multiplications in one forward pass: with padding too, not with a dilation's zeros."""
        return self.N * self.spec.out_time * self.K * (self.C // self.G) * self.O // self.E

    def costs(self, training: bool = False) -> tuple[tuple[int, int], ...]:
        """Arithmetic operations and bytes of each operation of a pass, products with padding too.

        Bytes are what has to move where nothing is moved twice: each operand and each result
        once. A training step is the forward pass and the two gradients; that of the kernel
        carries the bias's.
        """
        size = 2 if self.dtype in ("bfloat16", "float16") else 4
        x, w, y = map(math.prod, (self.x_shape, self.kernel_shape, self.y_shape))
        forward = (2 * self.products, size * (x + w + self.O + y))
        return (forward,) * 3 if training else (forward,)  # the gradients swap the parts

    def __str__(self) -> str:
        """The geometry, on one line."""
        channels = f"C={self.C}" if self.C == self.O else f"C={self.C} O={self.O}"
        rest = "".join(
            f" {letter}={value}"
            for letter, value in (("D", self.D), ("S", self.S), ("E", self.E), ("G", self.G))
            if value > 1
        )
        return f"N={self.N} T={self.T} {channels} K={self.K}{rest}"

    def build(self, conv: type[nnx.Conv] = Conv, rngs: nnx.Rngs | None = None, **more) -> nnx.Conv:
        """The layer without its activation.

        Args:
          conv: the class, `nnx.Conv` for the stock layer.
          rngs: draws the parameters; None is ``nnx.Rngs(0)``.
          more: further arguments of ``conv``.
        """
        return conv(
            self.C,
            self.O,
            (self.K,),
            self.S,
            padding=self.padding,
            input_dilation=self.E,
            kernel_dilation=self.D,
            feature_group_count=self.G,
            dtype=self.dtype,
            param_dtype=self.dtype,
            rngs=nnx.Rngs(0) if rngs is None else rngs,
            **more,
        )

    def ours(self, implementation: Implementation = None) -> Callable[..., jax.Array]:
        """``(x, kernel, bias) -> y`` by `conv_pallas.conv1d`, the activation included."""

        def forward(x, kernel, bias):
            more = dict(activation=self.activation, implementation=implementation)
            return conv1d(x, kernel, bias, **self.geometry, **more)

        return forward

    def stock(self) -> Callable[..., jax.Array]:
        """``(x, kernel, bias) -> y`` by `flax.nnx.Conv`, and then the activation."""
        graph, state = nnx.split(nnx.eval_shape(lambda: self.build(nnx.Conv)))

        def forward(x, kernel, bias):
            filled = nnx.State(
                {"kernel": state["kernel"].replace(kernel), "bias": state["bias"].replace(bias)}
            )
            return self.activate(nnx.merge(graph, filled)(x))

        return forward

    def activate(self, y: jax.Array) -> jax.Array:
        """What the model does to the convolution's output."""
        return y if self.activation is None else FUNCTIONS[self.activation](y)


_BAI = "Bai, Kolter & Koltun 2018, arXiv:1803.01271, github.com/locuslab/TCN"
_WAVENET = "van den Oord et al. 2016, arXiv:1609.03499"
_TASNET = "Luo & Mesgarani 2019, arXiv:1809.07454"
_HIFIGAN = "Kong, Kim & Bae 2020, arXiv:2010.05646, V1"
_MSTCN = "Abu Farha & Gall 2019, arXiv:1903.01945"
_SPLICEAI = "Jaganathan et al. 2019, doi:10.1016/j.cell.2018.12.015, SpliceAI-10k"
_ATACWORKS = "Lal et al. 2021, doi:10.1038/s41467-021-21765-5"
_QUARTZNET = "Kriman et al. 2019, arXiv:1910.10261, 15x5"
_MAMBA = "Gu & Dao 2023, arXiv:2312.00752, 2.8B"
_LIMIT = "no model: the far end of what a layer may be"


def _stack(model: str, source: str, dilations: tuple[int, ...], *sizes: int, **more):
    N, T, C, O, K = sizes
    return [Layer(f"{model}/D{D}", source, N, T, C, O, K, D, **more) for D in dilations]


def _powers(last: int) -> tuple[int, ...]:
    return tuple(1 << i for i in range(last.bit_length()))


PUBLISHED: tuple[Layer, ...] = (
    *_stack("tcn-adding", _BAI, _powers(128), 32, 400, 30, 30, 7, activation="relu"),
    *_stack("tcn-copy", _BAI, _powers(128), 32, 1020, 10, 10, 8, activation="relu"),
    *_stack("tcn-mnist", _BAI, _powers(128), 64, 784, 25, 25, 7, activation="relu"),
    *_stack("tcn-music", _BAI, _powers(8), 1, 256, 150, 150, 5, activation="relu"),
    *_stack("tcn-ptb-characters", _BAI, _powers(4), 32, 400, 450, 450, 3, activation="relu"),
    *_stack("tcn-ptb-words", _BAI, _powers(8), 16, 80, 600, 600, 3, activation="relu"),
    *_stack("wavenet", _WAVENET, _powers(512), 8, 16000, 64, 128, 2),
    *_stack("conv-tasnet", _TASNET, _powers(128), 8, 3999, 512, 512, 3, G=512, padding="SAME"),
    *(
        Layer(f"hifigan-v1/C{C}/K{K}/D{D}", _HIFIGAN, 16, T, C, C, K, D, padding="SAME")
        for T, C in ((256, 256), (2048, 128), (4096, 64), (8192, 32))
        for K in (3, 7, 11)
        for D in (1, 3, 5)
    ),
    *(
        Layer(f"hifigan-v1-up/C{2 * O}", _HIFIGAN, 16, T, 2 * O, O, K, padding=zeros, E=E)
        for T, O, K, E, zeros in (
            (32, 256, 16, 8, 11),
            (256, 128, 16, 8, 11),
            (2048, 64, 4, 2, 2),
            (4096, 32, 4, 2, 2),
        )
    ),
    Layer("conv-tasnet-decoder/K16", _TASNET, 8, 3999, 512, 1, 16, padding=15, E=8),
    *_stack("ms-tcn", _MSTCN, _powers(512), 1, 5000, 64, 64, 3, padding="SAME", activation="relu"),
    *(
        Layer(f"spliceai-10k/K{K}/D{D}", _SPLICEAI, 8, 15000, 32, 32, K, D, padding="SAME")
        for K, D in ((11, 1), (11, 4), (21, 10), (41, 25))
    ),
    *_stack("atacworks", _ATACWORKS, (8,), 8, 60000, 15, 15, 51, padding="SAME", activation="relu"),
    Layer("quartznet/K33", _QUARTZNET, 32, 835, 256, 256, 33, G=256, padding="SAME"),
    Layer("quartznet/K75", _QUARTZNET, 32, 835, 512, 512, 75, G=512, padding="SAME"),
    Layer("quartznet/K87/D2", _QUARTZNET, 32, 835, 512, 512, 87, 2, G=512, padding="SAME"),
    *_stack("mamba-2.8b", _MAMBA, (1,), 8, 2048, 5120, 5120, 4, G=5120, activation="silu"),
    *_stack("wide-and-long", _LIMIT, (1, 4, 64, 512, 1024), 8, 4096, 512, 512, 3),
    *_stack("very-long", _LIMIT, (1, 1024), 1, 1 << 20, 64, 64, 3),
)


def find(name: str, layers: tuple[Layer, ...] = PUBLISHED) -> Layer:
    """The layer of that name.

    Raises:
      ValueError: there is none; it says which there are.
    """
    for layer in layers:
        if layer.name == name:
            return layer
    near = difflib.get_close_matches(name, [layer.name for layer in layers], n=3, cutoff=0.4)
    models = list(dict.fromkeys(layer.model for layer in layers))
    raise ValueError(
        f"layer must be the name of one, such as {' or '.join(near) or layers[0].name}, of the "
        f"models {', '.join(models)}; got {name!r}"
    )


def select(text: str, layers: tuple[Layer, ...] = PUBLISHED) -> tuple[Layer, ...]:
    """The layers whose name contains one of the words of ``text``, which commas divide.

    Raises:
      ValueError: a word selects nothing; it says what there is.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words or [text]:
        if not any(word in layer.name for layer in layers) or not words:
            find(word, layers)
    return tuple(layer for layer in layers if any(word in layer.name for word in words))


def fit(layer: Layer, platform: str, most: int = 1 << 30) -> Layer:
    """The layer, with fewer sequences and then shorter ones where a CPU would take too long.

    A CPU runs a stock forward pass in some tenths of a second then. Channels, taps and dilation,
    which decide what is the fastest way, stay, and a sequence keeps four windows' length.

    Args:
      most: products of a dense forward pass that are not too many.
    """
    if platform != "cpu":
        return layer
    while _work_on_cpu(layer) > most and layer.N > 1:
        layer = dataclasses.replace(layer, N=layer.N // 2)
    while _work_on_cpu(layer) > most and layer.T // 2 >= max(64, 4 * layer.spec.span):
        layer = dataclasses.replace(layer, T=layer.T // 2)
    return layer


def _work_on_cpu(layer: Layer) -> int:
    """What the stock layer costs, in products of a dense forward pass."""
    if layer.G == 1:
        return layer.products
    # With few channels in a group XLA's convolution runs at a hundredth of the dense one's speed
    # on a CPU; and its kernel gradient computes all pairs of channels, across groups too.
    slowness = max(1, 128 // (layer.C // layer.G) ** 2)
    return max(layer.products * slowness, layer.products * layer.G >> 3)
