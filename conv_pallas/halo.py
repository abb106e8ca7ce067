"""Time split over devices: each computes its steps, and asks its neighbours for what they see.

Of n devices the i-th holds steps ``[i L, (i + 1) L)`` of x and ``[i M, (i + 1) M)`` of y. That fits
where both run at the same rate, ``M S = L E``: CAUSAL, SAME and whatever else gives ``T E / S``
outputs. To compute its part of y a device needs, beside its part of x, the last steps of those
before it and the first steps of those after it, the *halo*: ``low`` and ``(K - 1) D - low`` steps
where ``S = E = 1``. What comes from beyond the ends is zeros, as x is there.

With its halo around x a device's part is a convolution like any other, and so are the gradients':
dx sees g as y sees x in the transposed convolution, and dw is a sum over devices, each with its
part of g and the same x. No device sends more than its halo, however many there are.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from conv_pallas.spec import ConvSpec, Operation


def divisor(spec: ConvSpec) -> int:
    """What the number of devices that time is split over has to divide; 1 where it can't be."""
    T, out = spec.time, spec.out_time
    if not (isinstance(T, int) and isinstance(out, int)):  # symbols, of an export
        return 1
    return math.gcd(T, out) if T * spec.input_dilation == out * spec.stride else 1


@dataclasses.dataclass(frozen=True)
class TimeSplit:
    """How time lies on a mesh.

    Attributes:
      names: the mesh axes that split it.
      shards: the product of their sizes, 1 where there are none.
    """

    names: tuple[str, ...]
    shards: int

    def surround(
        self, operation: Operation, lhs: jax.Array, spec: ConvSpec
    ) -> tuple[jax.Array, ConvSpec]:
        """One device's part of lhs ``(..., T / n, channels)`` with its halo around it.

        Args:
          spec: of the whole.

        Returns:
          lhs, and the geometry of this device's share of the operation.
        """
        if self.shards == 1:
            return lhs, spec
        left, right, local = share(operation, spec, self.shards)
        return self._exchange(lhs, left, right), local

    def _exchange(self, x, left: int, right: int):
        """x, ``left`` steps of the devices before it, and ``right`` of those after."""
        n, L = self.shards, x.shape[-2]
        axis = x.ndim - 2

        def of_distance(j, start, stop):
            there = [(i, i + j) for i in range(n) if 0 <= i + j < n]
            return lax.ppermute(lax.slice_in_dim(x, start, stop, axis=axis), self.names, there)

        hops = lambda steps: range(1, -(-steps // L) + 1)  # noqa: E731
        before = [of_distance(j, max(0, j * L - left), L) for j in hops(left)]
        after = [of_distance(-j, 0, min(L, right - (j - 1) * L)) for j in hops(right)]
        return jnp.concatenate([*reversed(before), x, *after], axis)


UNSPLIT = TimeSplit((), 1)


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
