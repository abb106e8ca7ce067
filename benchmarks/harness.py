"""Times every variant of a layer against the others, after checking each.

A variant that computes something else than the layer is refused before it is timed. The rest
take turns. Variants that compile to one program are timed once: the machine does the same.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import baselines, descent, handoff
from benchmarks.baselines import NotApplicableError
from benchmarks.layers import Subject
from benchmarks.networks import Network
from benchmarks.truth import Truth, WrongResultError
from conv_pallas import _layers, _measure, _neighbours, kernels, tuning
from conv_pallas._measure import FORWARD, OURS, STOCK, Settings, Spread
from conv_pallas.dispatch import Implementation
from conv_pallas.explanation import default_platform
from conv_pallas.kernels import xla_tuned
from conv_pallas.nn import Conv

FULL = Settings(least=0.01, rounds=(7, 15), settled=0.03, limit=2.0, hopeless=4, sure=7)
QUICK = Settings(least=0.002, rounds=(5, 7), settled=0.05, limit=0.3, hopeless=4)

# Ours as `tune` has found it to be the fastest, where it is compared with the rules for CPUs.
TUNED = "tuned"
# Larger layers are checked at a smaller size: the formula in float64 would take minutes.
MOST_TO_CHECK = 1 << 31
# A call is repeated inside one jit until launching it is at most such a part of its time.
LAUNCH_SHARE = 0.05
MOST_INSIDE = 16
ATTEMPTS = 3  # to time something without other programs in the way
# Of different inputs together: more than any GPU's second-level cache holds.
ROTATED_BYTES = 256 << 20


@dataclasses.dataclass
class Variant:
    """What is known about one way to compute a pass of a layer.

    Attributes:
      seconds: a call's time in every round; empty where it was not timed.
      same_as: the variant that compiled to the same program, and whose times these are.
      reason: why it was not timed; None where it was.
      refused: whether that is because its result was wrong.
      memory: bytes of arguments, results and temporaries, and the peak, as XLA planned them.
      checked: the size at which it was checked, where that is not the size it was timed at.
      compile_seconds: of tracing, lowering and compiling it, once.
    """

    seconds: tuple[float, ...] = ()
    same_as: str | None = None
    reason: str | None = None
    refused: bool = False
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    checked: str | None = None
    compile_seconds: float | None = None

    @property
    def time(self) -> Spread:
        return Spread.of(self.seconds)


@dataclasses.dataclass
class Measurement:
    """One pass of one layer in all variants.

    Attributes:
      subject: as it was measured, perhaps cut down for a CPU.
      inside: how often one launch ran the layer.
      others: cores that other programs took on average while it was timed on a CPU that had none
        to spare; None where nobody knows.
      handoffs: of each round on a CPU, what `handoff.ratio` said at its beginning.
    """

    subject: Subject
    which: str
    variants: dict[str, Variant]
    inside: int = 1
    others: float | None = None
    handoffs: tuple[float | None, ...] = ()

    @property
    def timed(self) -> dict[str, Variant]:
        return {name: v for name, v in self.variants.items() if v.seconds}

    @property
    def ours(self) -> str | None:
        """The name of ours, or of the first that was ordered."""
        known = [n for n in self.timed if n not in baselines.NAMES or n == OURS]
        return known[0] if known else None

    def ratio(self, base: str, name: str) -> Spread:
        """How many times faster ``name`` is than ``base``."""
        return _measure.ratio(self.variants[base].seconds, self.variants[name].seconds)

    def ratio_where(self, apart: bool, base: str, name: str) -> Spread | None:
        """As `ratio`, of the rounds that found the cores apart, or together; None of no rounds."""
        seconds = (self.variants[base].seconds, self.variants[name].seconds)
        rounds = zip(handoff.apart(self.handoffs), *seconds, strict=False)
        found = [of for there, *of in rounds if there is apart]
        return _measure.ratio(*zip(*found, strict=True)) if found else None

    @property
    def fastest_baseline(self) -> str | None:
        found = [n for n in self.timed if n in baselines.NAMES and n != OURS]
        return min(found, key=lambda n: self.timed[n].time.median, default=None)


def tune(subject: Subject) -> None:
    """Finds the fastest formulations of a layer, or of a whole network, on the CPU at hand."""
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=subject.dtype)
    quiet = functools.partial(tuning.tune, report=lambda line: None)
    if isinstance(subject, Network):
        quiet(subject.build(), struct((subject.N, subject.T, subject.C)))
    else:
        # As it is timed, with its bias and activation: of those the winner is raced once more.
        x, w, b = map(struct, (subject.x_shape, subject.kernel_shape, (subject.O,)))
        quiet(lambda x, w, b: subject.ours()(x, w, b), x, w=w, b=b)


def variants_of(
    subject: Subject, implementations: Sequence[Implementation] | None = None, tuned: bool = False
) -> dict[str, Implementation]:
    """What is measured of a layer: names, and for ours the implementation.

    Args:
      implementations: of ours, None for the one that is picked, or several to try in turn; as a
        whole None for that and each other one that runs on this machine, however it was added,
        but oneDNN's.
      tuned: whether `TUNED` takes part as well.
    """
    if implementations is None:
        platform = default_platform()
        found, _ = kernels.discover()
        here = sorted({k.implementation for k in found.values() if platform in k.platforms})
        # The first is stock's own convolution, the second what is picked where nothing else is, and
        # the third takes no training step by itself.
        left = ("xla_native", "xla", "onednn")
        implementations = [None, *(n for n in here if n not in left)]
    named = lambda order: order if isinstance(order, str) else "+".join(order)  # noqa: E731
    ours = {OURS if order is None else named(order): order for order in implementations}
    ours |= {TUNED: None} if tuned else {}
    if isinstance(subject, Network):
        return {STOCK: None, **ours}
    return {**{n: None for n in baselines.NAMES if n != OURS}, **ours}


def is_ours(name: str) -> bool:
    return name == OURS or name not in baselines.NAMES


# --- one pass of one layer -----------------------------------------------------------------------


def measure(
    subject: Subject,
    which: str,
    *,
    variants: Mapping[str, Implementation] | None = None,
    settings: Settings = FULL,
    truth: Truth | None = None,
) -> Measurement:
    """Checks and times a pass of a layer.

    Args:
      variants: from `variants_of`.
      truth: of the layer, where it is known already.
    """
    variants = variants_of(subject) if variants is None else variants
    donated = ()
    if isinstance(subject, Network):
        donated = descent.DONATED if which != FORWARD else ()
        make = descent.forward if which == FORWARD else descent.step
        functions = {
            name: functools.partial(make, subject, nnx.Conv if name == STOCK else Conv, order)
            for name, order in variants.items()
        }
        arguments, checked = descent.arguments_of(subject, which), "against stock"
        verify = descent.verifier(subject, which, arguments)
    else:
        truth = truth or Truth(subject, default_platform())
        functions = {
            name: functools.partial(_function, name, subject, which, implementation)
            for name, implementation in variants.items()
        }
        arguments = truth.arguments[: 3 if which == FORWARD else 4]
        known = checkable(truth)
        verify, checked = _verifier_of_layer(truth, known, which)
    arguments = jax.device_put(arguments)
    result = Measurement(subject, which, {name: Variant(checked=checked) for name in variants})
    calls, texts, ready = {}, {}, {}
    for name, variant in result.variants.items():
        try:
            if name == baselines.TORCH:
                call, _ = baselines.torch_program(subject, which, truth.arguments)
                check_torch(known, which)
                calls[name] = call
                continue
            function = functions[name]()
            start = time.perf_counter()
            compiled = _compiled(name, function, *arguments, donated=donated)
            variant.compile_seconds = time.perf_counter() - start
            verify(name, variants[name], compiled)
        except (NotApplicableError, NotImplementedError) as e:
            variant.reason = str(e)
            continue
        except WrongResultError as e:
            variant.reason, variant.refused = str(e), True
            continue
        variant.memory = _memory(compiled)
        text = _measure.anonymous(compiled.as_text())
        if text in texts:
            variant.same_as = texts[text]
            continue
        texts[text] = name
        ready[name] = (function, compiled)
    if donated:
        calls |= {name: descent.Learner(run, arguments) for name, (_, run) in ready.items()}
    else:
        result.inside, programs = _repeated(ready, arguments)
        calls |= programs
    order = [name for name in result.variants if name in calls]
    if order:
        seconds, result.others, result.handoffs = _undisturbed(
            {n: calls[n] for n in order}, settings
        )
        for name, times in seconds.items():
            share = 1 if name == baselines.TORCH else result.inside
            result.variants[name].seconds = tuple(s / share for s in times)
    for variant in result.variants.values():
        if variant.same_as:
            variant.seconds = result.variants[variant.same_as].seconds
    return result


def _undisturbed(
    calls, settings: Settings
) -> tuple[dict[str, tuple[float, ...]], float | None, tuple[float | None, ...]]:
    """As `_measure.interleaved`, on a CPU again where other programs took too much of it.

    Returns:
      The times that others disturbed least, how many cores they took of it, and of each round what
      `handoff.ratio` said.
    """
    if not _on_cpu():
        return _measure.interleaved(calls, settings), None, ()
    found = []
    for _ in range(ATTEMPTS):
        watch, handoffs = _neighbours.Watch(), []
        times = _measure.interleaved(
            calls, settings, lambda to=handoffs: to.append(handoff.ratio())
        )
        others = watch.taken()
        found.append((times, others, tuple(handoffs)))
        if not _neighbours.disturbed(others):
            break
    return min(found, key=lambda one: one[1] or 0.0)


def _compiled(name: str, function: Callable, *arguments, donated: tuple[int, ...] = ()):
    with _measured(name):
        return jax.jit(function, donate_argnums=donated).lower(*arguments).compile()


def _measured(name: str) -> contextlib.AbstractContextManager:
    """Within it a variant is to be compiled, so that `TUNED` is as it was found to be fastest."""
    return xla_tuned.trial(None) if name == TUNED else contextlib.nullcontext()


def _function(name, layer, which, implementation):
    name = OURS if is_ours(name) else name
    if name == baselines.SYMMETRIC and which != FORWARD and layer.G > 1 and _on_cpu():
        # Timed once: 37 s where stock takes 1.2 s, for one layer of 5120 channels.
        raise NotApplicableError("left out on a CPU, where it takes minutes")
    make = baselines.build if which == FORWARD else baselines.training_step
    return make(name, layer, implementation)


def checkable(truth: Truth) -> Truth:
    """The truth of a smaller layer where that of a layer would take minutes."""
    layer = truth.layer
    if layer.products > MOST_TO_CHECK:
        layer = _layers.fit(layer, "cpu", MOST_TO_CHECK)
    return truth if layer == truth.layer else Truth(layer, truth.platform)


def _verifier_of_layer(truth: Truth, known: Truth, which: str) -> tuple[Callable, str | None]:
    """A function that checks a variant, and the size at which it does where that differs."""
    small = known.layer

    def check(name, run):
        out = run(*jax.device_put(known.arguments[: 3 if which == FORWARD else 4]))
        known.check((out,) if which == FORWARD else out[1], f"{small.name}, {which}, {name}")

    if known is truth:
        return (lambda name, implementation, compiled: check(name, compiled)), None

    def verify(name, implementation, compiled):
        function = _function(name, small, which, implementation)
        with _measured(name):
            check(name, jax.jit(function))

    return verify, str(small)


def check_torch(known: Truth, which: str) -> None:
    """Compares PyTorch's result with the formula, of a layer from `checkable`.

    Raises:
      NotApplicableError: as `baselines.torch_program`.
      WrongResultError: PyTorch computes something else.
    """
    _, result = baselines.torch_program(known.layer, which, known.arguments)
    known.check(result(), f"{known.layer.name}, {which}, {baselines.TORCH}")


def _memory(compiled) -> dict[str, int]:
    """Bytes that XLA planned for, those that are donated once; nothing where it does not tell."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return {}
    found = {
        "arguments": analysis.argument_size_in_bytes,
        "results": analysis.output_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
    }
    return found | {"peak": sum(found.values()) - analysis.alias_size_in_bytes}


# --- short calls, and caches ---------------------------------------------------------------------


def _repeated(ready: Mapping[str, tuple], arguments: tuple) -> tuple[int, dict[str, Callable]]:
    """Calls of all programs, each with several runs of the layer where one is too short.

    On a GPU each run has another x, so that none of it is in the cache from the run before.
    """
    if not ready:
        return 1, {}
    launch = _launch_seconds()
    shortest = min(_best(lambda c=c: c(*arguments)) for _, c in ready.values())
    inside = min(MOST_INSIDE, max(1, math.ceil(launch / LAUNCH_SHARE / shortest)))
    on_cpu = _on_cpu()
    size = sum(a.nbytes for a in jax.tree.leaves(arguments))
    copies = inside if on_cpu else max(inside, min(64, math.ceil(ROTATED_BYTES / size)))
    x, rest = _split(arguments)
    xs = [x] + [jnp.copy(x) if on_cpu else _shuffled(x, i) for i in range(1, copies)]
    calls = {}
    for name, (function, compiled) in ready.items():
        if inside > 1:
            compiled = _compiled(name, _several(function, arguments), xs[:inside], *rest)
        calls[name] = _Rotating(compiled, xs, rest, inside, arguments)
    return inside, calls


def _split(arguments: tuple):
    """x, and what stays the same in every run. A stack's first argument is its parameters."""
    at = 0 if isinstance(arguments[0], jax.Array) else 1
    return arguments[at], arguments[:at] + arguments[at + 1 :]


def _joined(x, rest, arguments):
    at = 0 if isinstance(arguments[0], jax.Array) else 1
    return (*rest[:at], x, *rest[at:])


def _shuffled(x, seed: int):
    return x[:, ::-1] + jnp.asarray(seed, x.dtype) if seed % 2 else x * jnp.asarray(-1, x.dtype)


def _several(function, arguments):
    """Runs a function on several x, one after the other.

    What stays the same goes through every run too: else XLA would compute once what depends on
    nothing else, such as the gradient by x of a layer without an activation.
    """
    each = _measure.several(lambda x, rest: function(*_joined(x, rest, arguments)))

    def run(xs, *rest):
        return each(xs, [rest] * len(xs))

    return run


class _Rotating:
    """A call without arguments that takes another x each time."""

    def __init__(self, compiled, xs, rest, inside, arguments):
        if inside > 1:
            groups = [xs[i : i + inside] for i in range(0, len(xs) - inside + 1, inside)]
            self._arguments = [(group, *rest) for group in groups]
        else:
            self._arguments = [_joined(x, rest, arguments) for x in xs]
        self._compiled, self._turn = compiled, 0

    def __call__(self):
        self._turn = (self._turn + 1) % len(self._arguments)
        return self._compiled(*self._arguments[self._turn])


def _best(call, runs: int = 2) -> float:
    waited = lambda: jax.block_until_ready(call())  # noqa: E731
    waited()
    return min(_seconds(waited) for _ in range(runs))


@functools.cache
def _launch_seconds() -> float:
    """What it takes to call a compiled function that does next to nothing."""
    x = jnp.zeros(8)
    compiled = jax.jit(lambda x: x + 1).lower(x).compile()
    call = lambda: jax.block_until_ready(compiled(x))  # noqa: E731
    return statistics.median(_seconds(call) for _ in range(101))


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# --- the ceilings --------------------------------------------------------------------------------


def ceilings(dtypes: Iterable[str] = ("float32",)) -> dict[str, float]:
    """What this machine reaches: bytes a second of a large copy, operations of a large matmul.

    The copy writes over what the last one wrote: on a CPU most of the time of one into fresh memory
    is the system's, which has to find pages for it.

    Returns:
      ``"bytes"`` and, for each dtype, the operations, per second.
    """
    small = _on_cpu()
    n = 1 << (26 if small else 29)
    a = jnp.arange(n, dtype=jnp.float32)
    found = {"bytes": 2 * a.nbytes / _best(_copy(a), 9)}
    del a
    for dtype in dict.fromkeys(dtypes):
        n = 2048 if small else 8192
        a = jax.random.normal(jax.random.key(0), (n, n), dtype)
        compiled = jax.jit(jnp.matmul).lower(a, a).compile()
        found[dtype] = 2 * n**3 / _best(lambda c=compiled, a=a: c(a, a))
    return found


def _copy(a: jax.Array) -> _measure.InPlace:
    """Reads all of an array and writes as much, each time to the same place."""
    arguments = ([a],)
    return _measure.InPlace(_measure.lower(lambda a: a + 1, arguments).compile(), arguments)


def ideal(subject: Subject, which: str, limits: Mapping[str, float]) -> float:
    """Seconds that a pass takes at the ceilings: its operations one after the other."""
    return sum(
        max(operations / limits[subject.dtype], bytes_ / limits["bytes"])
        for operations, bytes_ in subject.costs(which != FORWARD)
    )


# --- telling -------------------------------------------------------------------------------------


def host() -> dict[str, Any]:
    """What the figures depend on: the machine, its drivers, the libraries."""
    found = _measure.host()
    client = jax.devices()[0].client
    found["platform_version"] = client.platform_version.replace("\n", " ")
    for package in ("triton", "jax-triton", "libtpu", "jax-cuda13-plugin", "torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if found["platform"] == "gpu" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        found["driver"] = told.splitlines()[0].strip()
    stats = jax.devices()[0].memory_stats()
    if stats:
        found["device_memory"] = stats.get("bytes_limit")
    return found
