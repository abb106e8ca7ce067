"""A causal convolution, step by step: the arithmetic of `Conv.step`.

What a convolution with K taps and dilation D must know of its past are ``H = (K - 1) * D`` rows,
of which one step of output uses K - 1. They lie in a ring: the row that arrived ``j`` steps ago
is at ``(index - j) % H``. One step reads K - 1 rows and overwrites one, so that it costs the same
for any D, as long as the state is *donated* to the compiled step (see
`conv_pallas.nn.compiled_step`); otherwise XLA copies the ring first.

Nothing counts without end: ``index`` runs around the ring, and the *age* of a step (see
`conv_pallas.segments`) stops at 2**30. To start a member of the batch again is to set its age
to 0: rows from before are not seen any more.

States are dicts and lists of arrays, which every checkpoint library and `jax.export` know.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from conv_pallas import segments
from conv_pallas.sharding import beside, entries

State = dict


# --- which step it is ----------------------------------------------------------------------------


def clock(batch: tuple[int, ...]) -> State:
    """``age`` and ``segment``, both ``(*batch,)`` int32: of the step to come, of the last one."""
    return {"age": jnp.zeros(batch, jnp.int32), "segment": jnp.zeros(batch, jnp.int32)}


def tick(state: State, steps: int, mask=None, segment_ids=None) -> tuple[jax.Array, State]:
    """The ages ``(*batch, steps)``, -1 where the mask is False, and the clock after them."""
    if segment_ids is None:
        t = segments.numbered((*state["age"].shape, steps))
        age = jnp.minimum(state["age"][..., None] + t, segments.OLDEST)
        segment = state["segment"]
    else:
        segment_ids = beside(segment_ids, state["age"], segment_ids.ndim)
        age = segments.ages(segment_ids, state["age"], state["segment"])
        segment = segment_ids[..., -1]
    after = {"age": jnp.minimum(age[..., -1] + 1, segments.OLDEST), "segment": segment}
    if mask is None:
        return age, after
    return jnp.where(beside(mask, state["age"], mask.ndim), age, -1), after


def restart(state: State, members) -> State:
    """The state in which those members of the batch are at their start again.

    Args:
      state: of any layer or model here.
      members: ``(*batch,)`` bool, True for those to restart; a bool restarts all or none.

    Raises:
      ValueError: ``members`` has not the shape of the batch, or ``state`` is none.
    """
    check_state(state)
    members = jnp.asarray(members)
    batch = state["age"].shape
    if members.dtype != bool or members.shape not in ((), batch):
        raise ValueError(
            f"members must be bool of shape {batch}, True for those to restart, got "
            f"{members.dtype} of shape {members.shape}"
        )

    def reset(path, leaf):
        name = path[-1].key
        if name in ("age", "segment"):
            return jnp.where(members, 0, leaf)
        if name == "ages":  # of what is on its way, which now never arrives
            return jnp.where(members[..., None, None], -1, leaf)
        return leaf

    return jax.tree_util.tree_map_with_path(reset, state)


def settle(x: jax.Array, state: State) -> tuple[jax.Array, State]:
    """x and the state with their batch split alike over explicit axes.

    As the state's is, so that it stays where it is from step to step; or as x's where the state is
    not split, as one from `init_state` is that nobody has placed.
    """
    count = state["age"].ndim
    first = state["age"] if any(entries(jax.typeof(state["age"]))) else x
    put = lambda a: beside(a, first, count) if a.ndim else a  # noqa: E731
    return put(x), jax.tree.map(put, state)


# --- rings ---------------------------------------------------------------------------------------


def ring(batch: tuple[int, ...], rows: int, channels: int, dtype, *, ages: bool = False) -> State:
    """``rows`` rows of zeros, with an age for each if asked for; nothing for no rows."""
    if rows == 0:
        return {}
    state = {"past": jnp.zeros((*batch, rows, channels), dtype), "index": jnp.zeros((), jnp.int32)}
    if ages:
        state["ages"] = jnp.full((*batch, rows, 1), -1, jnp.int32)
    return state


def back(past: jax.Array, index: jax.Array, x: jax.Array, offset: int) -> jax.Array:
    """For each row of the chunk x the row that came ``offset`` steps earlier; shaped as x."""
    T, rows = x.shape[-2], past.shape[-2]
    if offset == 0:
        return x
    earlier = _read(past, (index - offset) % rows, min(T, offset))
    if T <= offset:
        return earlier
    return jnp.concatenate([earlier, x[..., : T - offset, :]], -2)


def push(state: State, x: jax.Array, age: jax.Array | None = None) -> State:
    """The ring after the chunk x ``(*batch, T, C)``, with ages ``(*batch, T)`` if it has them."""
    rows, T = state["past"].shape[-2], x.shape[-2]
    index = state["index"]
    after = {
        "past": _write(state["past"], index, x),
        "index": (index + T) % rows if T < rows else jnp.zeros_like(index),
    }
    if "ages" in state:
        after["ages"] = _write(state["ages"], index, age[..., None])
    return after


def delay(state: State, x: jax.Array, steps: int) -> tuple[jax.Array, State]:
    """x ``(*batch, T, C)``, ``steps`` late, through a ring of that many rows."""
    if steps == 0:
        return x, state
    x = beside(x.astype(state["past"].dtype), state["past"], x.ndim)
    late = back(state["past"], state["index"], x, steps)
    late, x = _read_first(late, x)
    return late, push(state, x)


def _read(past, start, count: int):
    axis = past.ndim - 2
    if count == 1:
        return lax.dynamic_slice_in_dim(past, start, 1, axis)
    rows = (start + jnp.arange(count, dtype=start.dtype)) % past.shape[-2]
    return past.at[..., rows, :].get(mode="promise_in_bounds")


def _write(past, index, x):
    rows, T = past.shape[-2], x.shape[-2]
    if T >= rows:
        return x[..., T - rows :, :]
    if T == 1:
        return lax.dynamic_update_slice_in_dim(past, x, index, past.ndim - 2)
    where = (index + jnp.arange(T, dtype=index.dtype)) % rows
    return past.at[..., where, :].set(x, unique_indices=True, mode="promise_in_bounds")


def with_past(x: jax.Array, age: jax.Array, state: State) -> tuple[jax.Array, State]:
    """The chunk x after all rows of the ring, and the ring after it.

    Rows of before the sequence began are zeros.

    Args:
      age: ``(*batch, T)``; no sequence may begin within the chunk.
    """
    rows, T = state["past"].shape[-2], x.shape[-2]
    x = beside(x, state["past"], x.ndim)
    whole = jnp.concatenate([_read(state["past"], state["index"], rows), x], -2)
    # The age at the chunk's start, if it is one's own; -1 where no step says it, whose outputs
    # nobody reads. What they would have seen stays in the ring, for the steps that follow.
    start = jnp.max(age - segments.numbered(age.shape), -1, keepdims=True)
    before = rows - segments.numbered((*age.shape[:-1], rows + T))
    seen = jnp.where((before <= start)[..., None], whole, jnp.zeros((), x.dtype))
    return seen, push(state, whole[..., T:, :])


def _read_first(read, write):
    """``read`` and ``write``, so that XLA sees that the ring may be overwritten in place."""
    return lax.optimization_barrier((read, write))


# --- the convolution -----------------------------------------------------------------------------


def convolve_chunk(
    convolve: Callable[..., jax.Array],
    convolve_taps: Callable[..., jax.Array],
    x: jax.Array,
    age: jax.Array,
    kernel: jax.Array,
    state: State,
    *,
    dilation: int,
    groups: int,
    stride: int = 1,
    lookahead: int = 0,
    packed: bool = False,
) -> tuple[jax.Array, jax.Array, State]:
    """One chunk of a causal convolution.

    Args:
      convolve: ``(x, kernel, **geometry) -> y``, which adds bias and activation as well.
      convolve_taps: ``(seen, kernel) -> y``, the same as in `conv_pallas.ops.convolve_taps`.
      x: ``(*batch, T, C)``, zeros where the age is -1; T is whole strides.
      age: ``(*batch, T)``, from `tick` or from the layer before.
      kernel: ``(K, C // groups, O)``.
      state: a ring of ``(K - 1) * dilation`` rows, with ages if there is a lookahead.
      lookahead: steps that the output comes late, because it sees as many ahead.
      packed: whether a sequence may begin within the chunk. With a stride there is neither.

    Returns:
      y ``(*batch, T // stride, O)``, the ages of x's steps, and the ring after it.
    """
    K, T = kernel.shape[0], x.shape[-2]
    geometry = segments.POINTWISE | {"strides": stride}
    if K == 1:
        return convolve(x, kernel, **geometry), age, state
    long = not isinstance(T, int) or T > dilation  # an export's symbol may be anything
    if stride > 1 or (long and lookahead == 0 and not packed):
        # So long a chunk that to sort the ring costs no more than to read its taps. What runs
        # is then the convolution of the whole sequence.
        seen, state = with_past(x, age, state)
        y = convolve(seen, kernel, **(geometry | {"kernel_dilation": dilation}))
        return y, age, state
    past, index = state["past"], state["index"]
    x = beside(x, past, x.ndim)  # a layer before may have split its outputs
    backs = [(K - 1 - k) * dilation for k in range(K)]
    taps = [back(past, index, x, offset) for offset in backs]
    if lookahead:
        there = [back(state["ages"], index, age[..., None], offset)[..., 0] for offset in backs]
        here = back(state["ages"], index, age[..., None], lookahead)[..., 0]
    else:
        there, here = [age] * K, age
    taps = [
        jnp.where(
            segments.visible(lookahead - offset, here, a)[..., None], tap, jnp.zeros((), x.dtype)
        )
        for tap, offset, a in zip(taps, backs, there, strict=True)
    ]
    if segments.apart(kernel, groups):
        taps, x = _read_first(taps, x)
        y = convolve_taps([lambda tap=tap: tap for tap in taps], kernel)
    else:  # side by side as they are read
        joined, pointwise = segments.side_by_side(taps, kernel, groups)
        joined, x = _read_first(joined, x)
        y = convolve(joined, pointwise, **segments.POINTWISE)
    if lookahead:
        here, age = _read_first(here, age)
    return y, here, push(state, x, age)


# --- complaints ----------------------------------------------------------------------------------


def batch_axes(batch_size: int | Sequence[int]) -> tuple[int, ...]:
    """``batch_size`` as a tuple.

    Raises:
      ValueError: it is neither an int of 1 or more nor a sequence of those.
    """
    axes = tuple(batch_size) if isinstance(batch_size, Sequence) else (batch_size,)
    if not all(isinstance(n, int | np.integer) and n > 0 for n in axes):
        raise ValueError(
            f"batch_size must be an int of 1 or more or a tuple of those, got {batch_size!r}"
        )
    return axes


def check_step(model) -> None:
    """Complains of a model of somebody's class that has a call of its own, but no such step.

    Raises:
      ValueError: its ``step`` is ours, or of a class below which there is another call.
    """
    classes = type(model).__mro__
    call, step = (next(c for c in classes if name in vars(c)) for name in ("__call__", "step"))
    ours = step.__module__.split(".")[0] == __name__.split(".")[0]
    if call is not step and (ours or issubclass(call, step)):
        raise ValueError(
            f"{call.__name__} has a __call__ of its own, which the step of {step.__name__} does "
            "not compute: give it a step as well"
        )


def check_state(state) -> None:
    """Complains of what is no state at all.

    Raises:
      ValueError: it has no clock.
    """
    if not (isinstance(state, dict) and "age" in state):
        raise ValueError("state must be what init_state or the last step returned")


def check_chunk(x, channels: int, state: State, stride: int = 1) -> None:
    """Complains, in one line, of a chunk that is no continuation of a stream.

    Raises:
      ValueError: x is not ``(*batch, T, channels)``, or not of the state's batch; or T is no
        multiple of the stride.
    """
    check_state(state)
    batch = state["age"].shape
    if x.ndim < 2 or x.shape[-1] != channels or x.shape[-2] < 1:
        raise ValueError(
            f"x must be a chunk of shape {(*batch, 'steps', channels)}, got {x.shape}".replace(
                "'", ""
            )
        )
    if x.shape[:-2] != batch:
        raise ValueError(f"state is of batch {batch}, but x has batch {x.shape[:-2]}")
    if x.shape[-2] % stride:
        raise ValueError(f"x must have a multiple of strides={stride} steps, got {x.shape[-2]}")


def part(state: State, name: str) -> State:
    """The state of one part of a model.

    Raises:
      ValueError: it has none of that name.
    """
    if not isinstance(state.get(name), dict):
        raise ValueError(f"state must be of this model, from its init_state; it has no {name!r}")
    return state[name]


def ring_of(state: State, rows: int, channels: int, x, *, ages: bool = False) -> State:
    """The `ring` in a layer's state, into which goes x as it is computed with.

    Complains of another layer's state, whose rows would be read as if they were one's own, and
    refuses a chunk that would lose by being kept in the state.

    Raises:
      ValueError: it has no `ring` of these.
      TypeError: x does not have the state's dtype.
    """
    past = state["past"].shape[-2:] if "past" in state else (0, channels)
    if past != (rows, channels) or (rows > 0 and ages != ("ages" in state)):
        raise ValueError(
            f"state must be of this layer, from its init_state: of {rows} rows of {channels} "
            f"channels{' with ages' if ages else ''}, got {past[0]} of {past[1]}"
            f"{' with ages' if 'ages' in state else ''}"
        )
    if rows and x.dtype != (dtype := state["past"].dtype):
        raise TypeError(
            f"x is computed with in {x.dtype}, but the state holds {dtype}: start it with "
            f"init_state(batch_size, dtype={x.dtype})"
        )
    return {name: state[name] for name in ("past", "index", "ages") if name in state}
