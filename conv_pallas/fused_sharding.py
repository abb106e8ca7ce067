"""How a convolution with its bias and activation splits over a mesh: as its three operations do.

The labels and where mesh axes go are those of `sharding`. Each device runs a kernel that fuses on
its share; where a gradient is a sum over devices, one all-reduce follows. Only where channels in
are split can no kernel add bias and activation, for z itself is a sum over devices.
"""

import dataclasses

from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from conv_pallas.sharding import Axes, Placement, shard_by_types, spec_of
from conv_pallas.spec import ConvSpec, Epilogue


@dataclasses.dataclass(frozen=True)
class Split:
    """The labels of one fused operation's operands and results.

    Attributes:
      axes: of x, w and y.
      operands, results: a label for each dimension of each.
      summed: for each result, the labels over which it is a sum.
      gy: which operand tells how y is split; None: the first result does.
    """

    axes: Axes
    operands: list[tuple[str, ...]]
    results: list[tuple[str, ...]]
    summed: list[tuple[str, ...]]
    gy: int | None

    @classmethod
    def of(
        cls, ndim: int, *, spec: ConvSpec, has_bias, activation, wanted=None, keep=None, **_
    ) -> "Split":
        axes = Axes.of("conv1d", spec, ndim, 0)
        x, w, y = axes.arrays
        bias = y[-1:]
        operands = [x, w, *([bias] if has_bias else [])]
        if keep is not None:
            results = [y, y] if keep else [y]
            return cls(axes, operands, results, [("in",)] * len(results), None)
        if Epilogue(has_bias, activation).saved:
            operands.append(y)
        operands.append(y)
        over_steps = x[:-1]
        each = ((x, ("out",)), (w, over_steps), (bias, over_steps))
        results = [r for r, there in zip(each, wanted, strict=True) if there]
        return cls(
            axes, operands, [r for r, _ in results], [s for _, s in results], len(operands) - 1
        )

    def place(self, mesh, operands, result) -> Placement:
        """Of the shape and the `PartitionSpec` of each operand and of the first result."""
        y = result if self.gy is None else operands[self.gy]
        return self.axes.place(mesh, *operands[:2], y)

    def specs(self, placed: Placement) -> tuple[list[P], list[P]]:
        """The `PartitionSpec` of each operand and each result."""
        of = lambda arrays: [self.axes.partition_spec(a, placed) for a in arrays]  # noqa: E731
        return of(self.operands), of(self.results)

    def share(self, local, mesh, placed: Placement, **params):
        """How one device computes its share, of its shares of the operands."""
        params["spec"], time = self.axes.local(mesh, placed)
        names = [tuple(n for s in labels for n in placed.get(s, ())) for labels in self.summed]
        if "keep" in params:
            return lambda *operands: local(*operands, time=time, psum=names[0], **params)

        def backward(*operands):
            # gz is whole wherever y is, so that dx, dw and dbias are; z is not where channels in
            # are split, and no kernel may compute it anew.
            outs = local(*operands, time=time, whole="in" not in placed, **params)
            return [lax.psum(o, n) if n else o for o, n in zip(outs, names, strict=True)]

        return backward


def by_xla(local, avals_in, **params):
    """For meshes with automatic axes: a call that XLA's partitioner asks how to split."""
    split = Split.of(avals_in[0].ndim, **params)

    def partition(mesh, operands, results):
        operands, results = (
            [(a.shape, spec_of(a.sharding, mesh)) for a in arrays] for arrays in (operands, results)
        )
        placed = split.place(mesh, operands, results[0])
        ins, outs = ([NamedSharding(mesh, s) for s in specs] for specs in split.specs(placed))
        return mesh, split.share(local, mesh, placed, **params), outs, tuple(ins)

    w = avals_in[1]
    outer = w.shape[-1] // params["spec"].groups
    rule, sizes, whole = split.axes.shardy_rule(w.shape[-2], outer, split.operands, split.results)
    call = custom_partitioning(lambda *operands: local(*operands, **params))
    call.def_partition(
        partition, decode_shardings=False, sharding_rule=rule, need_replication_factors=whole,
        **sizes,
    )  # fmt: skip
    return call


def by_types(local, avals_in, avals_out, **params):
    """For meshes with explicit axes: the operands' types say how they are split."""
    mesh = avals_out[0].sharding.mesh
    split = Split.of(avals_in[0].ndim, **params)
    operands, results = (
        [(a.shape, a.sharding.spec) for a in avals] for avals in (avals_in, avals_out)
    )
    placed = split.place(mesh, operands, results[0])
    ins, outs = split.specs(placed)
    share = split.share(local, mesh, placed, **params)
    wanted = [a.sharding.spec for a in avals_out]
    return shard_by_types(share, mesh, ins, outs, wanted, split.operands, params["spec"])


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
            (None,) * (x.ndim - 1) + tuple(bias.sharding.spec),
        )
    placed = axes.place(mesh, *((a.shape, a.sharding.spec) for a in (x, w)), hint)
    return NamedSharding(mesh, axes.partition_specs(placed)[2])
