"""How a convolution with its bias and activation splits over a mesh: as its three operations do.

The labels and where mesh axes go are those of `sharding`. Each device runs a kernel that fuses on
its share; where a gradient is a sum over devices, one all-reduce follows. Only where channels in
are split can no kernel add bias and activation, for z itself is a sum over devices.
"""

import dataclasses
import functools
from collections.abc import Sequence

from jax.sharding import NamedSharding

from conv_pallas import sharding
from conv_pallas.sharding import Axes, Placement
from conv_pallas.spec import ConvSpec, Epilogue


class Forward(sharding.Split):
    """As `sharding.Split`, of x, w and bias to y, and z."""

    @classmethod
    def of(cls, avals, *, spec: ConvSpec, has_bias, keep=False, packed=False, **_) -> "Forward":
        """Of the operands' types and the parameters of the primitive.

        Args:
          packed: whether the ids of packed sequences come after bias.
        """
        axes, operands, channels = _of_conv(avals, spec, has_bias, packed)
        y = axes.arrays[2]
        return cls(axes, operands, [y, y] if keep else [y], *channels)

    def share(self, local, mesh, placed: Placement, **params):
        params["spec"], time = self.axes.local(mesh, placed)
        over = sharding.summed(mesh, placed, ("in",))
        return functools.partial(local, time=time, psum=over, **params)


@dataclasses.dataclass(frozen=True)
class Backward(sharding.Split):
    """As `sharding.Split`, of x, w, bias, what is saved and dy to their gradients.

    Attributes:
      over: for each result, the labels over which it is a sum.
    """

    over: Sequence[tuple[str, ...]]

    @classmethod
    def of(
        cls, avals, *, spec: ConvSpec, has_bias, activation, wanted, packed=False, **_
    ) -> "Backward":
        """Of the operands' types and the parameters of the primitive.

        Args:
          packed: as in `Forward.of`; then nothing is saved.
        """
        axes, operands, channels = _of_conv(avals, spec, has_bias, packed)
        x, w, y = axes.arrays
        saved = not packed and Epilogue(has_bias, activation).saved
        operands += [y, y] if saved else [y]
        over_steps = x[:-1]
        each = ((x, ("out",)), (w, over_steps), (y[-1:], over_steps))
        there = [result for result, asked in zip(each, wanted, strict=True) if asked]
        results, over = [labels for labels, _ in there], [over for _, over in there]
        return cls(axes, operands, results, *channels, over)

    def place(self, mesh, operands, result) -> Placement:
        return super().place(mesh, operands, operands[-1])  # dy, and no gradient, tells of y

    def share(self, local, mesh, placed: Placement, **params):
        params["spec"], time = self.axes.local(mesh, placed)
        names = [sharding.summed(mesh, placed, labels) for labels in self.over]
        # gz is whole wherever y is, so that dx, dw and dbias are; z is not where channels in
        # are split, and no kernel may compute it anew.
        whole = not sharding.summed(mesh, placed, ("in",))

        def share(*operands):
            outs = local(*operands, time=time, whole=whole, **params)
            return [sharding.all_reduce(o, n) for o, n in zip(outs, names, strict=True)]

        return share


def _of_conv(avals, spec: ConvSpec, has_bias: bool, packed: bool):
    """The axes, the labels of x, w, bias and ids, and how many channels a group has in and out."""
    axes = Axes.of("conv1d", spec, avals[0].ndim, 0)
    x, w, y = axes.arrays
    operands = [x, w, *([y[-1:]] if has_bias else []), *([x[:-1]] if packed else [])]
    channels = avals[1].shape[-2], avals[1].shape[-1] // spec.groups
    return axes, operands, channels


def of_y(x, w, bias=None, *, spec: ConvSpec) -> NamedSharding:
    """How y lies where x, w and bias lie as their types say: split as each of them suggests."""
    placed = [a for a in (x, w, bias) if a is not None and not a.sharding.mesh.empty]
    mesh = (placed or [x])[0].sharding.mesh
    axes = Axes.of("conv1d", spec, x.ndim, 0)
    hint = ((), None)
    if bias is not None:
        hint = (
            (1,) * (x.ndim - 1) + bias.shape,
            [*[None] * (x.ndim - 1), *sharding.entries(bias)],
        )
    placed = axes.place(mesh, *((a.shape, sharding.entries(a)) for a in (x, w)), hint)
    return NamedSharding(mesh, axes.partition_specs(placed)[2])
