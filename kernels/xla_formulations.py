"""Ways to say a convolution to XLA: small functions, each right for every geometry.

`FORWARD` maps names to functions of ``(x, w, spec, numbers)``, `KERNEL_GRAD` to functions of
``(x, g, spec, numbers)``. The input gradient is a forward convolution of g with the flipped
kernel (`taps.flip`, `ConvSpec.transposed`), so `FORWARD` serves it too. Which one to take is not
decided here but in `xla.py`.

The two operands have one dtype. Results have any dtype at least as exact as ``numbers.out``:
whatever sums here does so in ``numbers.acc``, and the caller rounds once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from conv_pallas.kernels import xla_native
from conv_pallas.kernels.xla_channel_blocks import channel_blocks, channel_blocks_kernel_grad
from conv_pallas.kernels.xla_padding import pad, pad_along
from conv_pallas.kernels.xla_strided import depth_to_space, space_to_depth
from conv_pallas.kernels.xla_winograd import winograd, winograd_kernel_grad
from conv_pallas.spec import ConvSpec, Problem


class Numbers(NamedTuple):
    """The dtype to sum in, the dtype of the result, and the precision of products."""

    acc: np.dtype
    out: np.dtype
    precision: Any = None


Formulation = Callable[[jax.Array, jax.Array, ConvSpec, Numbers], jax.Array]


def numbers_of(problem: Problem) -> tuple[np.dtype, Numbers]:
    """The dtype of both operands, and how to calculate."""
    operand = xla_native.holds(problem.lhs_dtype, problem.rhs_dtype)
    acc = xla_native.holds(operand, problem.out_dtype)
    if jnp.issubdtype(acc, jnp.floating) and acc.itemsize < 4:
        acc = np.dtype(np.float32)
    if jnp.issubdtype(acc, jnp.floating) and not jnp.issubdtype(operand, jnp.floating):
        operand = acc  # integers whose result is to be a float
    return operand, Numbers(acc, problem.out_dtype, problem.precision)


def cropped(x: jax.Array, spec: ConvSpec) -> tuple[jax.Array, ConvSpec]:
    """x without the first steps that a negative padding crops off, where there is padding after it.

    XLA:CPU of jaxlib 0.11.2 gets both at once wrong in some convolutions; 0.12 has them right.
    """
    low, high = spec.padding
    known = isinstance(spec.time, int)  # and not an export's symbol
    if not low < 0 < high or spec.input_dilation > 1 or not known or -low >= spec.time:
        return x, spec
    cropped = dataclasses.replace(spec, time=spec.time + low, padding=(0, high))
    return lax.slice_in_dim(x, -low, spec.time, axis=1), cropped


def some_steps(spec: ConvSpec, first: int, count: int) -> ConvSpec:
    """The convolution whose outputs are ``count`` of this one's, from the ``first`` on."""
    low = spec.padding[0] - first * spec.stride
    reach = (count - 1) * spec.stride + spec.span
    return dataclasses.replace(spec, padding=(low, reach - spec.dilated_time - low))


def taps(x: jax.Array, spec: ConvSpec) -> list[jax.Array]:
    """For each tap what the outputs see through it: K arrays ``(N, T', C)``."""
    if not isinstance(spec.out_time, int):
        # An export whose time is a symbol: of max(t - 3, 0) outputs JAX can't tell that they fit.
        return [seen(x, k, spec) for k in range(spec.kernel_size)]
    x = pad(x, spec)
    length = (spec.out_time - 1) * spec.stride + 1
    return [
        lax.slice_in_dim(x, start, start + length, spec.stride, axis=1)
        for start in range(0, spec.span, spec.kernel_dilation)
    ]


def seen(x: jax.Array, k: int, spec: ConvSpec) -> jax.Array:
    """What the outputs see through tap k, ``(N, T', C)``, by a pad of its own.

    XLA fuses it into what uses it, where the one pad of `taps` is written to memory first.
    """
    length = (spec.out_time - 1) * spec.stride + 1
    if not isinstance(length, int):  # a symbol, which has to be seen not to be negative
        length = spec.out_time * spec.stride
    low = spec.padding[0] - k * spec.kernel_dilation
    high = length - spec.dilated_time - low
    x = pad_along(x, 1, low, high, spec.input_dilation - 1)
    return lax.slice_in_dim(x, 0, length, spec.stride, axis=1)


def sees_tap(sees: jax.Array, k: int) -> jax.Array:
    """Whether each output sees tap k: of packed sequences, where it has a bit for each."""
    return (sees >> k) & 1 == 1


def seen_from(sees: jax.Array, spec: ConvSpec) -> jax.Array:
    """``sees`` as the transposed convolution has it, whose geometry is ``spec``."""
    each, steps = range(spec.kernel_size), sees[..., None]
    there = [sees_tap(seen(steps, k, spec), spec.kernel_size - 1 - k)[..., 0] for k in each]
    return functools.reduce(jnp.add, (t.astype(sees.dtype) << k for k, t in enumerate(there)))


def grouped_matmul(x: jax.Array, w: jax.Array, groups: int, numbers: Numbers) -> jax.Array:
    """``(N, U, C) @ (C//G, O)``, group by group: ``(N, U, O)``."""
    kwargs = {"precision": numbers.precision, "preferred_element_type": numbers.acc}
    if groups == 1:
        return lax.dot_general(x, w, (((2,), (0,)), ((), ())), **kwargs)
    (N, U, _), (c, O) = x.shape, w.shape
    x, w = x.reshape(N, U, groups, c), w.reshape(c, groups, O // groups)
    y = lax.dot_general(x, w, (((3,), (0,)), ((2,), (1,))), **kwargs)
    return y.transpose(1, 2, 0, 3).reshape(N, U, O)


def grouped_outer(x: jax.Array, g: jax.Array, groups: int, numbers: Numbers) -> jax.Array:
    """``(N, U, C)^T @ (N, U, O)``, group by group: ``(C//G, O)``."""
    kwargs = {"precision": numbers.precision, "preferred_element_type": numbers.acc}
    if groups == 1:
        return lax.dot_general(x, g, (((0, 1), (0, 1)), ((), ())), **kwargs)
    (N, U, C), O = x.shape, g.shape[2]
    x, g = x.reshape(N, U, groups, C // groups), g.reshape(N, U, groups, O // groups)
    w = lax.dot_general(x, g, (((0, 1), (0, 1)), ((2,), (2,))), **kwargs)
    return w.transpose(1, 0, 2).reshape(C // groups, O)


def columns(x: jax.Array, spec: ConvSpec) -> jax.Array:
    """All taps side by side, group by group: ``(N, T', G*K*(C//G))``."""
    N, U, C, G = x.shape[0], spec.out_time, x.shape[2], spec.groups
    if G == 1:
        return lax.concatenate(taps(x, spec), 2)
    grouped = [tap.reshape(N, U, G, C // G) for tap in taps(x, spec)]
    return lax.concatenate(grouped, 3).reshape(N, U, spec.kernel_size * C)


# Forward, and by the flipped kernel the input gradient.


def native(x, w, spec, numbers):
    """One `lax.conv_general_dilated` that pads in its window."""
    return xla_native.conv(x, w, spec, numbers.out, numbers.precision)


def padded(x, w, spec, numbers):
    """Pads in memory, then one `lax.conv_general_dilated`. So does nnx.Conv for CAUSAL."""
    return native(pad(x, spec), w, _valid(spec), numbers)


def barrier(x, w, spec, numbers):
    """Pads in memory, out of sight of the convolution.

    XLA:GPU folds a pad it can see into the window; an uneven window is beyond cuDNN, and
    XLA then fills the kernel with zeros up to its span. Behind a barrier it stays VALID.
    """
    return native(lax.optimization_barrier(pad(x, spec)), w, _valid(spec), numbers)


def symmetric(x, w, spec, numbers):
    """Padded alike on both sides, as cuDNN pads, and the outputs that are too many cut off."""
    low, high = spec.padding
    before = max(0, -(-(high - low) // spec.stride))
    low += before * spec.stride  # is at least high now
    wide = dataclasses.replace(spec, padding=(low, low))
    return native(x, w, wide, numbers)[:, before : before + spec.out_time]


def _valid(spec: ConvSpec) -> ConvSpec:
    """What is left to do once x is padded."""
    time = spec.dilated_time + sum(spec.padding)
    return dataclasses.replace(spec, time=time, padding=(0, 0), input_dilation=1)


def shifts(x, w, spec, numbers):
    """Shifted multiply-adds of one padded x: a broadcast product per tap and channel of a group."""
    return _multiply_add(taps(x, spec), w, spec, numbers)


def own_pads(x, w, spec, numbers):
    """Shifted multiply-adds of x, each with a pad of its own that is never in memory."""
    return _multiply_add([seen(x, k, spec) for k in range(len(w))], w, spec, numbers)


def _multiply_add(taps, w, spec, numbers):
    (c, O), G = w.shape[1:], spec.groups
    w = w.astype(numbers.acc)
    y = None
    for k, tap in enumerate(taps):
        tap = tap.astype(numbers.acc)
        for i in range(c):
            if c == 1 and O == G:
                product = tap * w[k, i].reshape(1, 1, O)
            else:
                grouped = tap.reshape(*tap.shape[:2], G, c)
                product = grouped[..., i, None] * w[k, i].reshape(1, 1, G, O // G)
            y = product if y is None else y + product
    return y.reshape(*y.shape[:2], O)


def matmuls(x, w, spec, numbers):
    """K shifted matmuls, added up."""
    y = None
    for k, tap in enumerate(taps(x, spec)):
        product = grouped_matmul(tap, w[k], spec.groups, numbers)
        y = product if y is None else y + product
    return y


def im2col(x, w, spec, numbers):
    """One matmul of all taps side by side. Holds K copies of x."""
    K, c, O = w.shape
    return grouped_matmul(columns(x, spec), w.reshape(K * c, O), spec.groups, numbers)


def scatter(x, w, spec, numbers):
    """One matmul of x with all taps, whose K products are then shifted and added.

    No zero of an input dilation is multiplied. Holds K copies of y before its stride.
    """
    (N, T, _), (K, c, O) = x.shape, w.shape
    G = spec.groups
    w = w.reshape(K, c, G, O // G).transpose(1, 2, 0, 3).reshape(c, G * K * (O // G))
    products = grouped_matmul(x, w, G, numbers).reshape(N, T, G, K, O // G)
    y = None
    for k in range(K):
        product = seen(products[:, :, :, k].reshape(N, T, O), k, spec)
        y = product if y is None else y + product
    return y


def blocks(x, w, spec, numbers):
    """ "im2col" of a few taps at a time, whose products are shifted and added as in "scatter".

    Of K taps some sqrt(K) lie side by side, and one matmul has the products of as many such
    blocks: it holds sqrt(K) copies of x and of y, where the other two hold K of one of them, and
    is better shaped for few channels. Taps that fill no block have a matmul of their own; a block
    filled up with zeros would multiply them with steps that no output sees, NaN perhaps.
    """
    (K, c, O), G, D = w.shape, spec.groups, spec.kernel_dilation
    a = math.isqrt(K)
    b = K // a
    rest = K - a * b
    first = dataclasses.replace(spec.of_taps(range(a * b)), kernel_size=a, stride=1)
    many = w[: a * b].reshape(b, a, c, G, O // G).transpose(1, 2, 3, 0, 4)
    products = im2col(x, many.reshape(a, c, G * b * (O // G)), first, numbers)
    N, T, _ = products.shape
    products = products.reshape(N, T, G, b, O // G)
    length = (spec.out_time - 1) * spec.stride + 1
    y = im2col(x, w[a * b :], spec.of_taps(range(a * b, K)), numbers) if rest else None
    for j in range(b):
        product = products[:, :, :, j].reshape(N, T, O)
        start = j * a * D
        product = lax.slice_in_dim(product, start, start + length, spec.stride, axis=1)
        y = product if y is None else y + product
    return y


def fold(x, w, spec, numbers):
    """Views time as ``(T/D, D)``: inside one residue class of D the taps are neighbours."""
    U, S, D = spec.out_time, spec.stride, spec.kernel_dilation
    N, C, O = x.shape[0], x.shape[2], w.shape[2]
    length = (U - 1) * S + 1  # without a stride; it is taken at the end
    rows = -(-length // D)
    total = (rows + spec.kernel_size - 1) * D
    x = pad(x, spec)  # first, for what it cuts off must not come back: times zero it may be NaN
    x = pad_along(x, 1, 0, total - x.shape[1])
    y = lax.conv_general_dilated(
        x.reshape(N, total // D, D, C),
        w[:, None],
        window_strides=(1, 1),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=spec.groups,
        precision=numbers.precision,
        preferred_element_type=jnp.promote_types(x.dtype, numbers.out),
    )
    return lax.slice_in_dim(y.reshape(N, rows * D, O), 0, length, S, axis=1)


def block_diagonal(w: jax.Array, groups: int) -> jax.Array:
    """The dense kernel ``(K, C, O)`` that is zero between groups."""
    K, c, O = w.shape
    eye = jnp.eye(groups, dtype=w.dtype)[None, :, None, :, None]  # (1, G, 1, G, 1)
    return (w.reshape(K, 1, c, groups, O // groups) * eye).reshape(K, groups * c, O)


def dense(x, w, spec, numbers):
    """A native convolution of one group, whose kernel is zero between the groups."""
    one = dataclasses.replace(spec, groups=1)
    return native(x, block_diagonal(w, spec.groups), one, numbers)


def split(x, w, spec, numbers):
    """A native convolution for each group."""
    one = dataclasses.replace(spec, groups=1)
    xs, ws = jnp.split(x, spec.groups, 2), jnp.split(w, spec.groups, 2)
    return lax.concatenate([native(x, w, one, numbers) for x, w in zip(xs, ws, strict=True)], 2)


FORWARD: dict[str, Formulation] = {
    f.__name__: f
    for f in (
        native,
        padded,
        barrier,
        symmetric,
        shifts,
        own_pads,
        matmuls,
        im2col,
        scatter,
        blocks,
        winograd,
        fold,
        dense,
        split,
        channel_blocks,
    )
} | {
    "depth_to_space": depth_to_space(native, grouped_matmul, native),
    "depth_to_space_winograd": depth_to_space(winograd, grouped_matmul, native),
    "depth_to_space_im2col": depth_to_space(im2col, grouped_matmul, native),
}


# Kernel gradient.


def transposed(formulation: Formulation) -> Formulation:
    """The kernel gradient as JAX's transpose of a forward formulation."""

    def kernel_grad(x, g, spec, numbers):
        K, c, O = spec.kernel_size, x.shape[2] // spec.groups, g.shape[2]
        forward = Numbers(numbers.acc, g.dtype, numbers.precision)  # so that g is its cotangent
        f = jax.linear_transpose(
            lambda w: formulation(x, w, spec, forward).astype(g.dtype),
            jax.ShapeDtypeStruct((K, c, O), x.dtype),
        )
        return f(g)[0]

    return kernel_grad


def canonical_kernel_grad(x, g, spec, numbers):
    """One `lax.conv_general_dilated` of x with g for its kernel, axes in order as in a forward one.

    A channel of x is one of a batch, the samples are the channels, and stride and dilation have
    changed places. XLA:CPU moves the axes of a transposed convolution by itself, but nowhere else
    than in the entry computation: in the body of a loop, what `lax.scan` makes of a training step,
    it multiplies element by element, and is many times slower (jax-ml/jax issue 12868).
    """
    if spec.groups > 1:
        return KERNEL_GRAD["native"](x, g, spec, numbers)
    reach = (spec.kernel_size - 1) * spec.kernel_dilation + (spec.out_time - 1) * spec.stride + 1
    low = spec.padding[0]
    exchanged = dataclasses.replace(
        spec, kernel_size=spec.out_time, stride=spec.kernel_dilation, kernel_dilation=spec.stride,
        padding=(low, reach - spec.dilated_time - low),
    )  # fmt: skip
    w = native(x.transpose(2, 1, 0), g.transpose(1, 0, 2), exchanged, numbers)
    return w.transpose(1, 0, 2)


def padded_kernel_grad(x, g, spec, numbers):
    """Pads x in memory, then as `canonical_kernel_grad`."""
    return canonical_kernel_grad(pad(x, spec), g, _valid(spec), numbers)


def split_kernel_grad(x, g, spec, numbers):
    """A convolution for each group."""
    one = dataclasses.replace(spec, groups=1)
    pairs = zip(jnp.split(x, spec.groups, 2), jnp.split(g, spec.groups, 2), strict=True)
    return lax.concatenate([canonical_kernel_grad(x, g, one, numbers) for x, g in pairs], 2)


def shifts_kernel_grad(x, g, spec, numbers):
    """Shifted multiply-reductions: for each tap and each channel of a group one sum."""
    (N, _, C), (_, U, O), G = x.shape, g.shape, spec.groups
    c, m = C // G, O // G
    g = g.astype(numbers.acc).reshape(N, U, G, m)
    sums = [
        jnp.sum(tap.astype(numbers.acc).reshape(N, U, G, c)[..., i, None] * g, (0, 1)).reshape(O)
        for tap in taps(x, spec)
        for i in range(c)
    ]
    return jnp.stack(sums).reshape(spec.kernel_size, c, O)


def tree_kernel_grad(x, g, spec, numbers, ways=16, then=16, sees=None):
    """Shifted multiply-reductions, ``ways`` blocks of time added as whole arrays, then ``then``.

    ``sees (N, T')`` int32 has a bit for each tap that an output sees; None: all see all.

    XLA:CPU sums over rows one column at a time, a cache line for each number; additions of
    arrays it does in the order of memory. Barriers keep it from computing a level of the sum
    anew for each number of the next: some shapes took many times as long, to compile too.
    """
    (_, U, O), G = g.shape, spec.groups
    c, m = x.shape[2] // G, O // G
    count = min(ways, U)
    more = -U % count  # steps that make the blocks equal: zeros in both, for 0 * NaN is not 0
    longer = ((0, 0), (0, more), (0, 0))
    g = jnp.pad(g, longer).astype(numbers.acc)
    if sees is not None:
        sees = jnp.pad(sees[..., None], longer)

    def block(a, b):
        return lax.slice_in_dim(a, b * (U + more) // count, (b + 1) * (U + more) // count, axis=1)

    def product(tap, k, i, b):
        tap, gb = block(tap, b).astype(numbers.acc), block(g, b)
        if c == m == 1:
            products = tap * gb
        else:
            tap = tap.reshape(*tap.shape[:2], G, c)[..., i, None]
            products = (tap * gb.reshape(*gb.shape[:2], G, m)).reshape(gb.shape)
        if sees is None:
            return products
        there = sees_tap(block(sees, b), k)
        return jnp.where(there, products, jnp.zeros((), products.dtype))

    def total(rows):
        rows = lax.optimization_barrier(rows)
        while len(rows) > then:
            rows = jnp.pad(rows, ((0, -len(rows) % then), (0, 0)))
            rows = lax.optimization_barrier(sum(jnp.split(rows, then)))
        return jnp.sum(rows, 0)

    sums = [
        total(sum(product(tap, k, i, b) for b in range(count)).reshape(-1, O))
        for k, tap in enumerate(jnp.pad(tap, longer) for tap in taps(x, spec))
        for i in range(c)
    ]
    return jnp.stack(sums).reshape(spec.kernel_size, c, O)


def matmuls_kernel_grad(x, g, spec, numbers):
    """K matmuls over batch and time."""
    return jnp.stack([grouped_outer(tap, g, spec.groups, numbers) for tap in taps(x, spec)])


def im2col_kernel_grad(x, g, spec, numbers):
    """One matmul over batch and time of all taps side by side. Holds K copies of x."""
    w = grouped_outer(columns(x, spec), g, spec.groups, numbers)
    return w.reshape(spec.kernel_size, x.shape[2] // spec.groups, g.shape[2])


KERNEL_GRAD: dict[str, Formulation] = {
    "native": transposed(native),
    "canonical": canonical_kernel_grad,
    "padded": padded_kernel_grad,
    "shifts": shifts_kernel_grad,
    "tree": tree_kernel_grad,
    "matmuls": matmuls_kernel_grad,
    "im2col": im2col_kernel_grad,
    "winograd": winograd_kernel_grad,
    "space_to_depth": space_to_depth(canonical_kernel_grad),
    "space_to_depth_winograd": space_to_depth(winograd_kernel_grad),
    "fold": transposed(fold),
    "dense": transposed(dense),
    "split": split_kernel_grad,
    "channel_blocks": channel_blocks_kernel_grad,
}
