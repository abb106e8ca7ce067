"""Time split over devices: each computes its steps, and asks its neighbours for what they see.

Of n devices the i-th holds steps ``[i L, (i + 1) L)`` of x and ``[i M, (i + 1) M)`` of y. That fits
where both run at the same rate, ``M S = L E``: CAUSAL, SAME and whatever else gives ``T E / S``
outputs. To compute its part of y a device needs, beside its part of x, the last steps of those
before it and the first steps of those after it, the *halo*: ``low`` and ``(K - 1) D - low`` steps
where ``S = E = 1``. What comes from beyond the ends is zeros, as x is there. Where ``D >= L`` most
of that reach lies between what two taps see, so that each tap gets its own ``L`` steps instead.

With its halo around x a device's part is a convolution like any other, and so are the gradients':
dx sees g as y sees x in the transposed convolution, and dw is a sum over devices, each with its
part of g and the same x. But putting a halo around x copies x, and all waits for what travels.
So where the halo is short beside the part, a device convolves what it has as if that were the
whole sequence, and then mends what was wrong: the few outputs that see the halo are computed once
more, from as few steps, and what the halo adds to dw is added.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from conv_pallas.spec import ConvSpec, Operation

# At most one in so many outputs is computed again. An estimate: where memory bounds a convolution
# it costs less than a copy of x. Tried once, on a CPU that plays two devices: next to surrounding a
# depthwise forward pass took two thirds of the time, a dense one and training steps about as long.
AGAIN = 8

Compute = Callable[[jax.Array, jax.Array, ConvSpec], jax.Array | list[jax.Array]]


def divisor(spec: ConvSpec) -> int:
    """What the number of devices that time is split over has to divide; 1 where it can't be."""
    T, out = spec.time, spec.out_time
    if not (isinstance(T, int) and isinstance(out, int)):  # symbols, of an export
        return 1
    return max(1, math.gcd(T, out)) if T * spec.input_dilation == out * spec.stride else 1


@dataclasses.dataclass(frozen=True)
class TimeSplit:
    """How time lies on a mesh.

    Attributes:
      names: the mesh axes that split it, in the mesh's order.
      shards: the product of their sizes, 1 where there are none.
      at: for each part of time, from the first to the last, which device along ``names`` has it.
    """

    names: tuple[str, ...]
    shards: int
    at: tuple[int, ...]

    @classmethod
    def of(cls, mesh, names: tuple[str, ...]) -> "TimeSplit":
        """Of mesh axes in the order in which they split time, which need not be the mesh's."""
        ordered = tuple(name for name in mesh.axis_names if name in names)
        sizes = [mesh.shape[name] for name in ordered]
        devices = np.arange(math.prod(sizes)).reshape(sizes)
        at = devices.transpose([ordered.index(name) for name in names]).ravel()
        return cls(ordered, at.size, tuple(at.tolist()))

    @classmethod
    def inside(cls, axis_name: str | tuple[str, ...]) -> "TimeSplit":
        """Of the axes of that name, or those names, of the `jax.shard_map` that this runs in.

        Raises:
          ValueError: it is over no such axis.
        """
        mesh = jax.sharding.get_abstract_mesh()
        several = isinstance(axis_name, Sequence) and not isinstance(axis_name, str)
        names = tuple(axis_name) if several else (axis_name,)
        if not names or len(set(names)) < len(names) or not set(names) <= set(mesh.manual_axes):
            raise ValueError(
                "axis_name must be an axis of the surrounding jax.shard_map, or several: "
                f"{', '.join(mesh.manual_axes) or 'there are none here'}; got {axis_name!r}"
            )
        return cls.of(mesh, names)

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of all devices' parts ``(*batch, L, C)`` together."""
        if self.shards == 1 or len(shape) < 2:
            return shape
        return (*shape[:-2], shape[-2] * self.shards, shape[-1])

    def run(self, operation: Operation, compute: Compute, lhs, rhs, spec: ConvSpec):
        """One device's share of an operation, but for the sum over devices of a kernel gradient.

        Args:
          compute: takes lhs, rhs and their geometry; gives one array or several, all of the
            result's shape.
          lhs, rhs: this device's parts.
          spec: of the whole.
        """
        own = self.own(spec)
        if own is None:
            if spec.stride == spec.input_dilation == 1 and spec.kernel_dilation >= lhs.shape[-2]:
                offsets, local = apart(operation, spec, self.shards)
                seen = [self._shift(lhs, offset) for offset in offsets]
                return compute(jnp.concatenate(seen, -2), rhs, local)
            left, right, around = share(operation, spec, self.shards)
            return compute(self.surround(lhs, left, right), rhs, around)
        g = steps(rhs) if operation == "conv1d_kernel_grad" else rhs
        return self.mend(operation, compute, compute(lhs, rhs, own), steps(lhs), g, own)

    def own(self, spec: ConvSpec) -> ConvSpec | None:
        """The geometry of a device's part as if that were the whole; None: don't, surround it."""
        if self.shards == 1:
            return spec
        if spec.stride != 1 or spec.input_dilation != 1 or min(spec.padding) < 0:
            return None
        L = spec.time // self.shards
        return dataclasses.replace(spec, time=L) if AGAIN * (spec.span - 1) <= L else None

    def mend(self, operation: Operation, compute: Compute, result, lhs, rhs, own: ConvSpec):
        """The share, of what ``compute`` made of a device's own steps alone.

        Args:
          lhs: a function that gives steps from the first to the last, this one not counted; so
            is rhs, if it is g.
          own: what `own` returned.
        """
        if self.shards == 1:
            return result
        (left, right), L, field = own.padding, own.time, own.span - 1
        if operation == "conv1d_input_grad":
            left, right = right, left
        # The neighbour before, and the one after; how far its halo reaches; where that matters.
        for neighbour, count, start in ((-1, left, 0), (1, right, L - right)):
            if count == 0:
                continue
            first = neighbour < 0
            halo = self._from(neighbour, lhs(L - count, L) if first else lhs(0, count))
            if operation == "conv1d_kernel_grad":
                padding = (0, field) if first else (field, 0)
                geometry = dataclasses.replace(own, time=count, padding=padding)
                more = compute(halo, rhs(start, start + count), geometry)
                result = jax.tree.map(jnp.add, result, more)
                continue
            seen = [halo, lhs(0, field)] if first else [lhs(L - field, L), halo]
            if operation == "conv1d":
                geometry = dataclasses.replace(own, time=count + field, padding=(0, 0))
            else:
                geometry = dataclasses.replace(own, time=count, padding=(field, field))
            again = compute(jnp.concatenate(seen, -2), rhs, geometry)
            # XLA for GPUs fuses a kernel with the update that follows it. Of these two kernels it
            # has to take the second, which then writes straight into the first's result; given
            # both, it takes the first and fails ("DUS target must be a fusion parameter"; jax
            # 0.12.0.1).
            result = lax.optimization_barrier(result)
            put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=-2)
            result = jax.tree.map(put, result, again)
        return result

    def _from(self, distance: int, x):
        """The x of the device so many places after this one, or before; zeros beyond the ends."""
        if distance == 0:
            return x
        if abs(distance) >= self.shards:
            return jnp.zeros_like(x)
        parts = [(i, i - distance) for i in range(self.shards) if 0 <= i - distance < self.shards]
        there = [(self.at[i], self.at[j]) for i, j in parts]
        return lax.ppermute(x, self.names, there)

    def surround(self, x, left: int, right: int):
        """x, ``left`` steps of the devices before it, and ``right`` of those after."""
        part, L = steps(x), x.shape[-2]
        hops = lambda count: range(1, -(-count // L) + 1) if count else ()  # noqa: E731
        before = [self._from(-j, part(max(0, j * L - left), L)) for j in hops(left)]
        after = [self._from(j, part(0, min(L, right - (j - 1) * L))) for j in hops(right)]
        return jnp.concatenate([*reversed(before), x, *after], -2)

    def _shift(self, x, offset: int):
        """As many steps as x has, ``offset`` after them: of two devices, or of one."""
        away, first = divmod(offset, x.shape[-2])
        part = steps(x)
        parts = [self._from(away, part(first, x.shape[-2]))]
        if first:
            parts.append(self._from(away + 1, part(0, first)))
        return jnp.concatenate(parts, -2)


UNSPLIT = TimeSplit((), 1, (0,))


def share(operation: Operation, spec: ConvSpec, shards: int) -> tuple[int, int, ConvSpec]:
    """One device's part: steps before and after its own of lhs, and its geometry with them."""
    if operation == "conv1d_input_grad":
        left, right, local = share("conv1d", spec.transposed(), shards)
        return left, right, local.transposed()
    (low, _), S, E = spec.padding, spec.stride, spec.input_dilation
    L, M = spec.time // shards, spec.out_time // shards
    last = (M - 1) * S + spec.span - 1 - low  # that it sees, as the first of its own is step 0
    most = (shards - 1) * L  # what is farther is padding for every device
    left = min(max(0, low // E), most)
    right = min(max(0, last // E + 1 - L), most)
    local = dataclasses.replace(spec, time=left + L + right, padding=(low - left * E, 0))
    high = (M - 1) * S + spec.span - local.dilated_time - local.padding[0]
    return left, right, dataclasses.replace(local, padding=(local.padding[0], high))


def apart(operation: Operation, spec: ConvSpec, shards: int) -> tuple[list[int], ConvSpec]:
    """One device's part where ``S = E = 1``, from what each tap sees, one after the other.

    Returns:
      For each tap how far after the device's own steps those of lhs lie that it sees; and the
      geometry of all of them in a row, in which there is one part from tap to tap.
    """
    if operation == "conv1d_input_grad":
        offsets, local = apart("conv1d", spec.transposed(), shards)
        return offsets, local.transposed()
    K, L = spec.kernel_size, spec.time // shards
    offsets = [k * spec.kernel_dilation - spec.padding[0] for k in range(K)]
    return offsets, dataclasses.replace(spec, time=K * L, padding=(0, 0), kernel_dilation=L)


def steps(*arrays: jax.Array | None, of: Callable = lambda a: a) -> Callable[[int, int], jax.Array]:
    """``(start, stop)`` to those steps of the arrays, or of what ``of`` makes of them."""

    def part(start, stop):
        cut = lambda a: lax.slice_in_dim(a, start, stop, axis=a.ndim - 2)  # noqa: E731
        return of(*(None if a is None else cut(a) for a in arrays))

    return part
