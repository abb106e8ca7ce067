"""The layers that the project has set itself goals for, and what to compute of them."""

import dataclasses
import functools
from collections.abc import Iterable

import jax

from benchmarks import baselines, formulation_cases
from benchmarks.layers import quick
from conv_pallas import inspection
from conv_pallas._layers import Layer
from conv_pallas.kernels import xla
from conv_pallas.spec import Problem, lhs_rhs_out


def _layer(dry: bool, source: str, name: str, *sizes: int, **more) -> Layer:
    made = Layer(name, source, *sizes, **({"dtype": "bfloat16"} | more))
    return smaller(made) if dry else made


def goals(dry: bool) -> list[Layer]:
    """What matters most comes first."""

    layer = functools.partial(_layer, dry, "a goal")
    dense = [layer(f"dense-512/D{D}", 8, 4096, 512, 512, 3, D) for D in (1, 4, 64, 512, 1024)]
    deep = {"G": 12288, "activation": "silu"}
    return [
        *dense[1:2],
        layer("dense-64/D1", 8, 65536, 64, 64, 3),
        layer("depthwise/D1", 1, 16384, 12288, 12288, 4, **deep),
        *dense[:1],
        *dense[2:],
        layer("depthwise/D1024", 1, 16384, 12288, 12288, 4, 1024, **deep),
    ]


def formulations(dry: bool) -> list[Layer]:
    """Layers that the rules of `conv_pallas.kernels.xla` for GPUs tell apart."""

    layer = functools.partial(_layer, dry, "a kind")
    return [
        layer("dilated", 8, 4096, 256, 256, 3, 16),
        layer("depthwise", 8, 4096, 1024, 1024, 4, G=1024),
        layer("ragged-float32", 8, 4000, 64, 64, 3, 64, dtype="float32"),
        layer("many-taps-depthwise", 8, 1000, 512, 512, 33, G=512, padding="SAME"),
        layer("grouped", 8, 4096, 256, 256, 3, 4, G=8),
        layer("same", 8, 4096, 64, 64, 3, 4, padding="SAME"),
        layer("undilated", 8, 4096, 256, 256, 3),
        layer("strided", 8, 4096, 128, 128, 4, S=2),
        layer("many-taps", 8, 4096, 64, 64, 33, 2),
    ]


def sweep(dry: bool) -> list[Layer]:
    """Published layers of each kind."""
    chosen = [subject for subject in quick() if isinstance(subject, Layer)]
    return [smaller(chosen[0])] if dry else chosen


def drawn(dry: bool) -> list[Layer]:
    """Layers that nobody chose, more than there is time for."""
    dtypes = ("bfloat16", "bfloat16", "bfloat16", "float32")
    found = list(formulation_cases.drawn(400, 0, (2**25, 2**36), dtypes))
    named = [dataclasses.replace(layer, name=formulation_cases.label(layer)) for layer in found]
    return [smaller(named[0])] if dry else named


def smaller(layer: Layer) -> Layer:
    C = min(layer.C, 16)
    return dataclasses.replace(
        layer, N=1, T=64, C=C, O=C, D=min(layer.D, 4), G=min(layer.G, C) if layer.G > 1 else 1
    )


@functools.lru_cache(maxsize=1)
def arrays(layer: Layer) -> list[jax.Array]:
    """x, kernel, bias and g, random, on the device; those of the last layer are kept."""
    wanted = inspection.structs(layer)
    keys = jax.random.split(jax.random.key(0), len(wanted))
    return [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, wanted, strict=True)]


DEFAULT = "default"  # what dispatch chooses, by what was tuned


def forward(name: str, layer: Layer, dry: bool) -> baselines.Forward:
    """``(x, kernel, bias) -> y`` of a baseline, or of ours.

    That is "ours", the Triton kernels; "xla", our best for XLA; or "default", which of those
    dispatch chooses.
    """
    chosen = {"ours": ours(dry), "xla": "xla", DEFAULT: None}
    if name in chosen:
        return baselines.build(baselines.OURS, layer, chosen[name])
    return baselines.build(name, layer)


def operations(layer: Layer) -> tuple[str, ...]:
    return ("forward", "backward") if layer.G > 1 else ("forward", "input_grad", "kernel_grad")


def as_trained(layer: Layer) -> tuple[str, ...]:
    """With the step as a whole where there is an activation.

    There ``backward`` alone favours ours: others compute again, within what is timed, what the
    forward pass would leave them.
    """
    return (*operations(layer), *(["step"] if layer.activation else []))


def with_operations(layers: Iterable[Layer]) -> list[tuple[Layer, str]]:
    """Each layer with each of its operations."""
    return [(layer, operation) for layer in layers for operation in operations(layer)]


def operation(name: str, f: baselines.Forward):
    """``(x, kernel, bias, g) -> result`` of one operation of a layer ``f(x, kernel, bias)``."""

    def run(x, w, b, g):
        if name == "forward":
            return f(x, w, b)
        if name == "input_grad":
            return jax.vjp(lambda x: f(x, w, b), x)[1](g)[0]
        if name == "kernel_grad":
            return jax.vjp(lambda w: f(x, w, b), w)[1](g)[0]
        y, vjp = jax.vjp(f, x, w, b)
        return (y, *vjp(g)) if name == "step" else vjp(g)

    return run


def formulation(name: str, problem: Problem):
    """``(x, kernel, bias, g) -> result`` of an operation by a formulation of that name."""

    def run(x, w, b, g):
        del b
        lhs, rhs, _ = lhs_rhs_out(problem.operation, x, w, g)
        return xla.run_as(name, problem, lhs, rhs)

    return run


def passes(name: str) -> int:
    """How many tensors of x's or y's size an operation reads and writes at least."""
    return {"backward": 3, "step": 5}.get(name, 2)  # of a step g is there only after y


def ours(dry: bool) -> str:
    return "xla" if dry else "triton"
