"""XLA formulations taken piece by piece: some sequences at a time, some steps, or some taps.

What a formulation holds for a moment then fits in the caches, and what is fused into one loop stays
small enough to be compiled well. Each wraps any formulation of `xla_formulations`; where it pays
`xla_cpu.py` decides.
"""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
from jax import lax

from conv_pallas.kernels.xla_formulations import Formulation, some_steps
from conv_pallas.kernels.xla_padding import pad
from conv_pallas.spec import ConvSpec

# The most taps that are written out one by one; beyond, compiling takes longer than it saves.
UNROLLED = 64
# Pieces that are written out one by one. Each is compiled by itself, and for a moment their results
# are there twice, so that what has many gets a loop instead. In whole networks that is slower: a
# loop's outputs are zeros first, which XLA copies once for each loop that starts with them, and
# another copy brings them to their place.
PIECES = 16


def in_turn(pieces, adds: bool, axis: int):
    """What ``f(x)`` gives for each ``(x, f)``, one after the other: added, or put together."""
    ys = []
    for x, f in pieces:
        if ys:  # else XLA runs all of them at once, or makes one loop of them
            x, ys[-1] = lax.optimization_barrier((x, ys[-1]))
        y = f(x)
        ys = [ys[-1] + y] if adds and ys else [*ys, y]
    return ys[0] if adds else lax.concatenate(ys, axis)


@functools.cache
def cuts(spec: ConvSpec, most: int, least: float) -> tuple[tuple[range, ...], float]:
    """Steps of the output in at most so many pieces, and the share of products that these take.

    Cut where a tap begins or ends to see x, first where it saves most: in a causal convolution with
    ``D = T/4`` and three taps the first quarter sees one of them, and the second two.

    Args:
      least: what a further piece has to save, as a share of all products.
    """
    U, S = spec.out_time, spec.stride
    marks = set()
    for k in range(spec.kernel_size):
        start = k * spec.kernel_dilation - spec.padding[0]  # where the first output sees through it
        marks |= {-(start // S), -((start - spec.dilated_time) // S)}
    marks = {mark for mark in marks if 0 < mark < U}

    def pieces(edges):
        return tuple(range(a, b) for a, b in itertools.pairwise(sorted({0, U, *edges})))

    def share(edges):
        taken = [len(p) * len(some_steps(spec, p.start, len(p)).live_taps) for p in pieces(edges)]
        return sum(taken) / (U * spec.kernel_size)

    edges: set[int] = set()
    while len(edges) < most - 1 and marks - edges:
        best = min(sorted(marks - edges), key=lambda mark: share(edges | {mark}))
        if share(edges | {best}) > share(edges) - least:
            break
        edges.add(best)
    return pieces(edges), share(edges)


def in_pieces(formulation: Formulation, n: int, sums: bool) -> Formulation:
    """A formulation that takes ``n`` sequences at a time, one piece after the other.

    So what it holds for a moment, K times x or y, fits in the caches, and memory that is written
    for the first time does not have to be found for all of it in every call.

    Args:
      n: divides N.
      sums: over sequences, as a kernel gradient does; in the order of pieces.
    """

    def run(x, other, spec, numbers):
        count = len(x) // n
        numbers = numbers._replace(out=numbers.acc) if sums else numbers
        each = lambda x, other: formulation(x, other, spec, numbers).astype(numbers.out)  # noqa: E731
        if count <= PIECES:
            others = jnp.split(other, count) if sums else [other] * count
            fs = [functools.partial(each, other=other) for other in others]
            return in_turn(zip(jnp.split(x, count), fs, strict=True), sums, 0)
        pieces = lambda a: a.reshape(count, n, *a.shape[1:])  # noqa: E731
        if not sums:
            y = lax.map(lambda x: each(x, other), pieces(x))
            return y.reshape(-1, *y.shape[2:])
        xs, gs = pieces(x), pieces(other)
        at = lax.dynamic_index_in_dim
        term = lambda i: each(at(xs, i, keepdims=False), at(gs, i, keepdims=False))  # noqa: E731
        return lax.fori_loop(1, count, lambda i, total: total + term(i), term(0))

    return run


def in_steps(formulation: Formulation, n: int, sums: bool) -> Formulation:
    """A formulation that makes ``n`` steps of the output at a time, one piece after the other.

    Args:
      n: at most the number of steps.
      sums: over steps, as a kernel gradient does; in the order of time.
    """

    def piece(x, other, spec, numbers, first, count):
        if sums:
            other = lax.slice_in_dim(other, first, first + count, axis=1)
        y = formulation(x, other, some_steps(spec, first, count), numbers)
        return y.astype(numbers.acc if sums else numbers.out)

    def written_out(x, other, spec, numbers):
        def part(x, first):
            return piece(x, other, spec, numbers, first, min(n, spec.out_time - first))

        fs = [functools.partial(part, first=first) for first in range(0, spec.out_time, n)]
        return in_turn([(x, f) for f in fs], sums, 1)

    def looped(x, other, spec, numbers):
        count, rest = divmod(spec.out_time, n)
        reach = (n - 1) * spec.stride + spec.span
        one = dataclasses.replace(spec, time=reach, padding=(0, 0), input_dilation=1)
        padded = pad(x, spec)
        tail = piece(x, other, spec, numbers, count * n, rest) if rest else None

        def part(i):
            seen = lax.dynamic_slice_in_dim(padded, i * (n * spec.stride), reach, axis=1)
            g = lax.dynamic_slice_in_dim(other, i * n, n, axis=1) if sums else other
            return formulation(seen, g, one, numbers).astype(numbers.acc if sums else numbers.out)

        if sums:
            first = part(0) if tail is None else part(0) + tail
            return lax.fori_loop(1, count, lambda i, total: total + part(i), first)
        y = jnp.moveaxis(lax.map(part, jnp.arange(count)), 0, 1)
        y = y.reshape(y.shape[0], count * n, y.shape[3])
        return y if tail is None else lax.concatenate([y, tail], 1)

    def run(x, other, spec, numbers):
        few = -(-spec.out_time // n) <= PIECES
        exact = numbers._replace(out=numbers.acc) if sums else numbers
        return (written_out if few else looped)(x, other, spec, exact)

    return run


def in_taps(
    formulation: Formulation, n: int, sums: bool, written_out: int | None = None
) -> Formulation:
    """A formulation that takes ``n`` taps at a time, and adds up what they give.

    XLA:CPU makes one loop of all taps that are written out. Beyond some ten of them LLVM no longer
    keeps what the loop reads in registers, and beyond a hundred compiling takes longer than that
    saves.

    Args:
      n: at most the number of taps.
      sums: over time, as a kernel gradient does: its taps are put together, not added.
      written_out: the most pieces that are, `PIECES` if None; more become a loop.
    """

    def each_alone(x, other, spec, numbers):
        def part(x, k):
            taps = range(k, min(k + n, spec.kernel_size))
            w = other if sums else other[taps.start : taps.stop]
            return formulation(x, w, spec.of_taps(taps), numbers).astype(numbers.acc)

        fs = [functools.partial(part, k=k) for k in range(0, spec.kernel_size, n)]
        return in_turn([(x, f) for f in fs], not sums, 0)

    def looped(x, other, spec, numbers):
        K, D = spec.kernel_size, spec.kernel_dilation
        count, rest = divmod(K, n)
        padded = pad(x, spec)
        reach = (n - 1) * D + (spec.out_time - 1) * spec.stride + 1
        one = dataclasses.replace(spec, time=reach, kernel_size=n, padding=(0, 0), input_dilation=1)
        last = spec.of_taps(range(K - rest, K)) if rest else None
        seen = lambda j: lax.dynamic_slice_in_dim(padded, j * (n * D), reach, axis=1)  # noqa: E731
        if sums:
            each = lambda j: formulation(seen(j), other, one, numbers).astype(numbers.acc)  # noqa: E731
            dw = lax.map(each, jnp.arange(count))
            dw = dw.reshape(count * n, *dw.shape[2:])
            if rest:
                tail = formulation(x, other, last, numbers).astype(numbers.acc)
                dw = lax.concatenate([dw, tail], 0)
            return dw

        def add(j, y):
            w = lax.dynamic_slice_in_dim(other, j * n, n)
            return y + formulation(seen(j), w, one, numbers).astype(numbers.acc)

        if rest:
            y = formulation(x, other[K - rest :], last, numbers).astype(numbers.acc)
        else:
            y = jnp.zeros((x.shape[0], spec.out_time, other.shape[2]), numbers.acc)
        return lax.fori_loop(0, count, add, y)

    def run(x, other, spec, numbers):
        few = -(-spec.kernel_size // n) <= (PIECES if written_out is None else written_out)
        exact = numbers._replace(out=numbers.acc)
        return (each_alone if few else looped)(x, other, spec, exact)

    return run
