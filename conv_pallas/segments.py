"""Sequences of different lengths in one array: padding, and several sequences in a row.

``mask (*batch, T)`` says which steps are real. ``segment_ids (*batch, T)`` are integers, and
where they change a new sequence begins. Both come down to one number for each step, its *age*:
how many steps of the same sequence come before it. Step ``p`` is seen from step ``t`` of the same
sequence, that is where

    t - p <= age[t]  for p <= t,        p - t <= age[p]  for p > t.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from conv_pallas import halo
from conv_pallas.sharding import entries, like, shard_by_xla
from conv_pallas.spec import ConvSpec, resolve_padding, scalar
from conv_pallas.taps import some

# Ages stop here: far beyond any kernel, and far from the end of an int32.
OLDEST = 2**30


def hide(x: jax.Array, mask) -> jax.Array:
    """x ``(*batch, T, C)`` with zeros where ``mask (*batch, T)`` is False.

    Neither the result nor a gradient depends on what was there, NaN included.

    Raises:
      ValueError: the mask's shape is not x's without the channels, or it is no bool.
    """
    # In an array `jnp.asarray` would look for a NaN, if JAX is told to.
    if not isinstance(x, jax.Array | np.ndarray):
        x = jnp.asarray(x)
    mask = check_mask(mask, x.shape[:-1])
    mask = like(mask, P(*entries(jax.typeof(x))[:-1]))
    weak = jax.typeof(x).weak_type  # and stays so
    zero = 0 if weak else jnp.zeros((), jax.dtypes.canonicalize_dtype(x.dtype))
    return jnp.where(mask[..., None], x, zero)


def check_mask(mask, shape: tuple[int, ...]) -> jax.Array:
    """``mask`` as an array.

    Raises:
      ValueError: it is not bool of this shape.
    """
    mask = jnp.asarray(mask)
    if mask.dtype != bool or mask.shape != shape:
        raise ValueError(
            f"mask must be bool of shape {shape}, True for real steps, "
            f"got {mask.dtype} of shape {mask.shape}"
        )
    return mask


def check_ids(segment_ids, shape: tuple[int, ...]) -> jax.Array:
    """``segment_ids`` as an array of int32.

    Raises:
      ValueError: they are no integers of this shape.
    """
    ids = jnp.asarray(segment_ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.shape != shape:
        raise ValueError(
            f"segment_ids must be integers of shape {shape}, got {ids.dtype} of shape {ids.shape}"
        )
    return ids.astype(jnp.int32)


def numbered(shape: tuple[int, ...]) -> jax.Array:
    """The number of each step, ``(*batch, T)`` int32.

    Of that shape, and not ``(T,)``: a user may forbid `jax.numpy_rank_promotion`.
    """
    return lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def ages(segment_ids: jax.Array, age: jax.Array, before: jax.Array) -> jax.Array:
    """The age of each step, ``(*batch, T)``.

    Args:
      segment_ids: ``(*batch, T)`` int32.
      age: ``(*batch,)``, what the first step's would be were it of the same sequence as the step
        before it.
      before: ``(*batch,)``, the id of the step before the first.
    """
    t = numbered(segment_ids.shape)
    earlier = jnp.concatenate([before[..., None], segment_ids[..., :-1]], -1)
    starts = jnp.where(segment_ids != earlier, t, -1)
    start = lax.cummax(starts, axis=starts.ndim - 1)
    return jnp.where(start >= 0, t - start, jnp.minimum(age[..., None] + t, OLDEST))


def visible(offset: int, age_here, age_there):
    """Whether the step ``offset`` later than each output is of the output's sequence."""
    return age_here >= -offset if offset <= 0 else age_there >= offset


# What a convolution of one tap is told of its geometry.
POINTWISE = dict(strides=1, padding="VALID", input_dilation=1, kernel_dilation=1)


def apart(kernel, groups: int) -> bool:
    """Whether each tap is best a convolution of its own: several, of a depthwise layer.

    Or of what its transpose is, whose groups have one output.
    """
    K, per_group, O = kernel.shape
    return K > 1 and groups > 1 and 1 in (per_group, O // groups)


def side_by_side(
    seen: list[jax.Array], kernel: jax.Array, groups: int
) -> tuple[jax.Array, jax.Array]:
    """The pointwise convolution that is that of K taps, of which each sees an x of its own.

    Args:
      seen: of each tap ``(*batch, T, C)``.
      kernel: ``(K, C // groups, O)``.

    Returns:
      x as of `joined`, and the kernel ``(1, K * C // groups, O)``.
    """
    flat = lambda w: w.reshape(1, -1, w.shape[-1])  # noqa: E731
    return joined(seen, groups), shard_by_xla(flat, lambda spec: P(None, *spec[1:]), kernel)


def joined(seen: list[jax.Array], groups: int) -> jax.Array:
    """What the taps see, ``(*batch, T, C)`` each, as ``(*batch, T, K * C)``: within the groups."""
    if groups == 1:
        return jnp.concatenate(seen, -1)
    *before, C = seen[0].shape  # numbers, not -1: of no elements at all JAX can't tell it
    x = jnp.stack([tap.reshape(*before, groups, C // groups) for tap in seen], -2)
    return x.reshape(*before, len(seen) * C)


def taps_of(pointwise: jax.Array, K: int) -> jax.Array:
    """Of `side_by_side`'s kernel ``(1, K * C // groups, O)`` the one of K taps."""
    split = lambda w: w.reshape(K, w.shape[1] // K, w.shape[2])  # noqa: E731
    return shard_by_xla(split, lambda spec: P(None, *spec[1:]), pointwise)


def one_by_one(kernel: jax.Array) -> list[jax.Array]:
    """The kernel ``(K, C // G, O)`` as K kernels of one tap."""
    each = [functools.partial(some, taps=range(k, k + 1)) for k in range(len(kernel))]
    return [shard_by_xla(f, lambda spec: P(None, *spec[1:]), kernel) for f in each]


def check_packed(x, segment_ids, spec: ConvSpec, mode: str | None = None) -> jax.Array:
    """``segment_ids`` as an array of int32.

    Args:
      mode: the name of a padding that is not zeros, if it is one.

    Raises:
      ValueError: the ids do not fit x, or the convolution does not give one output for each step.
    """
    ids = check_ids(segment_ids, x.shape[:-1])
    low, high = spec.padding
    if mode or spec.stride != 1 or spec.input_dilation != 1 or low + high != spec.span - 1:
        raise ValueError(
            "segment_ids need one output for each step: strides=1, input_dilation=1, and padding "
            f"CAUSAL, SAME or that many zeros; got strides={spec.stride}, "
            f"input_dilation={spec.input_dilation}, padding={mode or spec.padding}"
        )
    return ids


def crosses(spec: ConvSpec) -> bool:
    """Whether an output may see another step than its own."""
    return any(_offsets(spec))


def _offsets(spec: ConvSpec) -> list[int]:
    """How many steps ahead each tap looks."""
    return [k * spec.kernel_dilation - spec.padding[0] for k in range(spec.kernel_size)]


def separate(
    x: jax.Array, ids: jax.Array, spec: ConvSpec, time: halo.TimeSplit = halo.UNSPLIT
) -> list[Callable[[], jax.Array]]:
    """What each tap sees, of its output's own sequence alone.

    Every output has its own zeros, so that the one padded x of a plain convolution won't do.

    Args:
      ids: from `check_packed`.
      spec: of the whole.
      time: how time is split where x and the ids are one device's parts.

    Returns:
      K functions without arguments, each of which computes an array ``(*batch, T, C)``.
    """
    L = x.shape[-2]
    before, after = halo.share("conv1d", spec, time.shards)[:2] if time.shards > 1 else (0, 0)
    x, ids = (time.surround(a, before, after) for a in (x, ids[..., None]))
    same = lambda spec: spec  # noqa: E731
    age = shard_by_xla(_ages, same, ids[..., 0])

    def see(offset: int) -> jax.Array:
        seen = shard_by_xla(functools.partial(_seen, offset=offset), same, x, age)
        return lax.slice_in_dim(seen, before, before + L, axis=x.ndim - 2)

    return [functools.partial(see, offset) for offset in _offsets(spec)]


def bits(ids: jax.Array, spec: ConvSpec) -> jax.Array:
    """Which taps each output sees, ``(*batch, T)`` int32: bit k is 1 where it sees tap k.

    Args:
      ids: from `check_packed`.
      spec: of 31 taps at most. Nobody sees a step that there is not.
    """
    age = _ages(ids)
    seen = [visible(i, age, _shift(age[..., None], i)[..., 0]) for i in _offsets(spec)]
    return functools.reduce(jnp.add, (s.astype(jnp.int32) << k for k, s in enumerate(seen)))


def _ages(ids: jax.Array) -> jax.Array:
    none = jnp.zeros(ids.shape[:-1], jnp.int32)
    return ages(ids, none, none)


def _seen(x: jax.Array, age: jax.Array, offset: int) -> jax.Array:
    """x as the tap sees it that looks ``offset`` steps ahead."""
    seen = visible(offset, age, _shift(age[..., None], offset)[..., 0])
    return jnp.where(seen[..., None], _shift(x, offset), jnp.zeros((), x.dtype))


def _shift(x: jax.Array, offset: int) -> jax.Array:
    """``x[..., t + offset, :]``, zeros outside."""
    T = x.shape[-2]
    before, after = max(-offset, 0), max(offset, 0)
    if isinstance(T, int):  # else an export's symbol, with which nothing can be compared
        before, after = min(before, T), min(after, T)
    pads = [(0, 0)] * x.ndim
    pads[-2] = (before, after)
    return lax.slice_in_dim(jnp.pad(x, pads), after, after + T, axis=x.ndim - 2)


def check_stream_geometry(
    kernel_size: int, strides, padding, input_dilation, kernel_dilation
) -> tuple[int, int, int]:
    """``(S, D, lookahead)`` of a convolution that can stream.

    Raises:
      ValueError: it sees the whole future, or has an input dilation; or a lookahead and a stride;
        or the padding is none.
    """
    S = scalar("strides", strides, ValueError)
    E = scalar("input_dilation", input_dilation, TypeError)
    D = scalar("kernel_dilation", kernel_dilation, TypeError)
    if E != 1:
        raise ValueError(
            f"only a layer with input_dilation=1 can stream, or a ConvTranspose; "
            f"got input_dilation={E}"
        )
    history = (kernel_size - 1) * D
    # What a call would refuse is refused here, too. Of whole strides no time changes the amounts.
    pair = resolve_padding(padding, time=S, span=history + 1, stride=S, input_dilation=1)
    if isinstance(padding, str):
        if padding.upper() == "CAUSAL" or (history == 0 and padding.upper() != "CIRCULAR"):
            return S, D, 0
    else:
        low, high = pair
        if low >= 0 <= high and low + high == history and (S == 1 or high == 0):
            return S, D, high
    lookahead = f"; or [(low, high)] that adds up to {history}, of which high is the lookahead"
    raise ValueError(
        f"only a causal layer can stream: padding must be CAUSAL or [({history}, 0)]"
        f"{lookahead * (S == 1)}; got {padding!r}"
    )
