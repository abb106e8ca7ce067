"""How a convolution with its bias and activation splits over a mesh: as its three operations do.

The labels and where mesh axes go are those of `sharding`. Each device runs a kernel that fuses on
its share; where a gradient is a sum over devices, one all-reduce follows. Only where channels in
are split can no kernel add bias and activation, for z itself is a sum over devices.
"""

import dataclasses
from collections.abc import Sequence

from jax.sharding import NamedSharding

from conv_pallas import sharding
from conv_pallas.sharding import Axes, Placement
from conv_pallas.spec import ConvSpec, Epilogue


@dataclasses.dataclass(frozen=True)
class Split(sharding.Split):
    """As `sharding.Split`, of a fused operation.

    Attributes:
      summed: for each result, the labels over which it is a sum.
      gy: which operand tells how y is split; None: the first result does.
    """

    summed: Sequence[tuple[str, ...]]
    gy: int | None

    @classmethod
    def of(
        cls, avals, *, spec: ConvSpec, has_bias, activation, wanted=None, keep=None, **_
    ) -> "Split":
        """Of the operands' types and the parameters of the primitive."""
        axes = Axes.of("conv1d", spec, avals[0].ndim, 0)
        channels = avals[1].shape[-2], avals[1].shape[-1] // spec.groups
        x, w, y = axes.arrays
        bias = y[-1:]
        operands = [x, w, *([bias] if has_bias else [])]
        if keep is not None:
            results = [y, y] if keep else [y]
            return cls(axes, operands, results, *channels, [("in",)] * len(results), None)
        if Epilogue(has_bias, activation).saved:
            operands.append(y)
        operands.append(y)
        over_steps = x[:-1]
        each = ((x, ("out",)), (w, over_steps), (bias, over_steps))
        there = [result for result, asked in zip(each, wanted, strict=True) if asked]
        results, summed = [labels for labels, _ in there], [over for _, over in there]
        return cls(axes, operands, results, *channels, summed, len(operands) - 1)

    def place(self, mesh, operands, result) -> Placement:
        y = result if self.gy is None else operands[self.gy]
        return super().place(mesh, operands, y)

    def share(self, local, mesh, placed: Placement, **params):
        params["spec"], time = self.axes.local(mesh, placed)
        names = [sharding.summed(mesh, placed, labels) for labels in self.summed]
        if "keep" in params:
            return lambda *operands: local(*operands, time=time, psum=names[0], **params)

        def backward(*operands):
            # gz is whole wherever y is, so that dx, dw and dbias are; z is not where channels in
            # are split, and no kernel may compute it anew.
            whole = not sharding.summed(mesh, placed, ("in",))
            outs = local(*operands, time=time, whole=whole, **params)
            return [sharding.all_reduce(o, n) for o, n in zip(outs, names, strict=True)]

        return backward


def of_results(results, *avals, gradients: bool, spec, has_bias, **_) -> list[NamedSharding]:
    """The results' shardings on a mesh with explicit axes: a gradient's is its operand's."""
    if gradients:
        return [r.sharding for r in results]
    return [of_y(*avals[: 2 + has_bias], spec=spec)] * len(results)


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
