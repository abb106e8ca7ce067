"""How the three operations split over a mesh.

Every dimension of every array has a label; a mesh axis is placed on a label, and so on that
dimension of all three arrays at once. Batches, kernels, channels and groups can be split, and
time where y has as many steps as x, or a fixed ratio of them: see `halo`. Taps can't, and are
gathered where somebody split them, as other time is. Where the label is summed over, as channels
in are by the forward convolution, each device's share is a partial sum, and one all-reduce
follows.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax._src.sharding_impls import parse_flatten_op_sharding
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from conv_pallas import halo
from conv_pallas.spec import ConvSpec, Operation, lhs_rhs_out

WHOLE = ("tap", "inner")  # labels that are never split
# Labels of dimensions that are split as another is, but have their own number of channels or steps.
AS = {"outgroup": "group", "outtime": "time"}

Placement = dict[str, tuple[str, ...]]  # from a label to the mesh axes that split it


@dataclasses.dataclass(frozen=True)
class Axes:
    """The labels of lhs, rhs and the result of one operation.

    Attributes:
      arrays: for lhs, rhs and the result, a label per dimension.
      order: which of the three says first where mesh axes go. Activations come before
        kernels, so that where both want a mesh axis the small array is the one to move.
      spec: the geometry.
    """

    arrays: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    order: tuple[int, int, int]
    spec: ConvSpec

    @classmethod
    def of(cls, operation: Operation, spec: ConvSpec, lhs_ndim: int, kernel_batch: int) -> "Axes":
        V = tuple(f"v{i}" for i in range(kernel_batch))
        B = tuple(f"n{i}" for i in range(lhs_ndim - kernel_batch - 2))
        # Groups keep to themselves: split, they take their share of every channel axis.
        grouped = ("group", "inner", "outgroup")
        C, inner, O = grouped if spec.groups > 1 else ("in", "in", "out")
        x = (*V, *B, "time", C)
        w = (*V, "tap", inner, O)
        y = (*V, *B, "outtime", O)
        order = (0, 1, 2) if operation == "conv1d_kernel_grad" else (0, 2, 1)
        return cls(lhs_rhs_out(operation, x, w, y), order, spec)

    def place(self, mesh, *arrays: tuple[Sequence[int], Sequence | None]) -> Placement:
        """Places mesh axes on labels as the arrays' own shardings suggest.

        Args:
          mesh: for the sizes of its axes.
          *arrays: for lhs, rhs and result, the shape and the `PartitionSpec` or None.
        """
        placed: Placement = {}
        taken: set[str] = set()
        parts = {"group": self.spec.groups, "time": halo.divisor(self.spec)}
        for i in self.order:
            shape, spec = arrays[i]
            entries = spec or ()  # trailing dimensions that are not split may be left out
            for label, size, entry in zip(self.arrays[i], shape, entries, strict=False):
                if entry is None or entry is P.UNCONSTRAINED:
                    continue
                names = entry if isinstance(entry, tuple) else (entry,)
                shards = _size(mesh, names)
                label = _same(label)
                whole = label in WHOLE or label in placed or not taken.isdisjoint(names)
                if not whole and parts.get(label, size) % shards == 0:
                    placed[label] = tuple(names)
                    taken.update(names)
        return placed

    def partition_specs(self, placed: Placement) -> tuple[P, P, P]:
        """The `PartitionSpec` of lhs, rhs and the result."""
        return tuple(self.partition_spec(labels, placed) for labels in self.arrays)

    @staticmethod
    def partition_spec(labels: tuple[str, ...], placed: Placement) -> P:
        """The `PartitionSpec` of an array with these labels."""
        return P(*(_unwrap(placed.get(_same(label))) for label in labels))

    def contracted(self, mesh, placed: Placement) -> tuple[str, ...]:
        """The mesh axes over which the result is a sum of each device's share."""
        lhs, rhs, result = ({_same(a) for a in labels} for labels in self.arrays)
        return summed(mesh, placed, sorted((lhs | rhs) - result))

    def local(self, mesh, placed: Placement) -> tuple[ConvSpec, halo.TimeSplit]:
        """The geometry of one device's groups, and how time is split."""
        groups = self.spec.groups // _size(mesh, placed.get("group", ()))
        spec = dataclasses.replace(self.spec, groups=groups)
        return spec, halo.TimeSplit.of(mesh, placed.get("time", ()))

    def shardy_rule(
        self, inner: int, outer: int, operands, results
    ) -> tuple[str, dict[str, int], tuple[str, ...]]:
        """The rule for Shardy's propagation: how dimensions of the arrays correspond.

        Args:
          inner, outer: ``C // G`` and ``O // G``.
          operands, results: the labels of each.

        Returns:
          An einsum-like string, the sizes of the factors that occur in products only, and
          the factors that must not be split.
        """
        time = halo.divisor(self.spec)
        # What is split of a dimension, and the rest of it: a channel of the group, a step.
        halves = {
            "group": (self.spec.groups, "inner", inner),
            "outgroup": (self.spec.groups, "outer", outer),
        }
        if time > 1:
            halves |= {
                "time": (time, "instep", self.spec.time // time),
                "outtime": (time, "outstep", self.spec.out_time // time),
            }
        products: dict[str, int] = {}
        alone = set()

        def dimension(label):
            first = _same(label) if label in halves else label
            size, rest, count = halves.get(label, (0, "", 1))
            if count == 1:
                alone.add(first)
                return first
            products.update({first: size, rest: count})
            return f"({first} {rest})"

        def text(arrays):
            return ", ".join(" ".join(map(dimension, labels)) for labels in arrays)

        rule = f"{text(operands)} -> {text(results)}"
        whole = {*WHOLE, "instep", "outstep"} | (set() if time > 1 else {"time", "outtime"})
        factors = dict.fromkeys(re.findall(r"\w+", rule))  # Shardy wants them in this order
        sizes = {name: size for name, size in products.items() if name not in alone}
        return rule, sizes, tuple(f for f in factors if f in whole)


@dataclasses.dataclass(frozen=True)
class Split:
    """How one operation splits.

    Attributes:
      axes: the labels of x, w and y, or of what stands in their place.
      operands, results: a label for each dimension of each.
      inner, outer: ``C // G`` and ``O // G``.
    """

    axes: Axes
    operands: Sequence[tuple[str, ...]]
    results: Sequence[tuple[str, ...]]
    inner: int
    outer: int

    def place(self, mesh, operands, result) -> Placement:
        """Of the shape and the `PartitionSpec` of each operand and of the first result."""
        return self.axes.place(mesh, *operands[:2], result)

    def specs(self, placed: Placement) -> tuple[list[P], list[P]]:
        """The `PartitionSpec` of each operand and each result."""
        of = lambda arrays: [self.axes.partition_spec(a, placed) for a in arrays]  # noqa: E731
        return of(self.operands), of(self.results)

    def shardy_rule(self):
        """As `Axes.shardy_rule`."""
        return self.axes.shardy_rule(self.inner, self.outer, self.operands, self.results)

    def share(self, local: Callable, mesh, placed: Placement, **params) -> Callable:
        """How one device computes its share, a list, of its shares of the operands.

        Args:
          local: of `conv_pallas.lowering.lower`.
          params: its keywords, as they are of the whole.
        """
        raise NotImplementedError


def shard_by_types(share: Callable, mesh, operands, results, wanted, split, spec) -> Callable:
    """``share``, which computes one device's part, as a function of arrays on explicit axes.

    Args:
      mesh: of the arrays' types.
      operands: for each, the `PartitionSpec` that ``share`` needs.
      results: the one that it leaves each of its list of results in.
      wanted: the one that each result's type says.
      split: what the dimensions of operands and results are.
      spec: the geometry.
    """

    def here(*shares):
        return with_steps_whole(share, jax.sharding.get_abstract_mesh(), split, spec)(*shares)

    def call(*arrays):
        # The types have a mesh also where the caller is in no context of one.
        with jax.sharding.use_abstract_mesh(mesh):
            outcome = jax.shard_map(
                here,
                in_specs=tuple(operands),
                out_specs=results,
                axis_names=set(mesh.explicit_axes),
                check_vma=False,
            )(*map(jax.sharding.reshard, arrays, operands))
            return jax.sharding.reshard(outcome, wanted)

    return call


def with_steps_whole(f: Callable, mesh: AbstractMesh, split: Split, spec: ConvSpec) -> Callable:
    """``f``; time and taps kept whole where XLA's partitioner might get it wrong.

    Along automatic axes, that is, of what f reads and computes; all else is split as XLA likes.
    Left with a convolution itself the partitioner sums over all devices where it should over those
    along one of several axes, if that splits time or taps. And where time is split of one with a
    stride or an input dilation, it gets some wrong along a single axis, too, and ends the process
    over others (Check failed in spmd_partitioner.cc; jaxlib 0.11.2 and 0.12.0.1).
    """
    axes = [name for name in mesh.auto_axes if mesh.shape[name] > 1]
    right = 1 if (spec.stride, spec.input_dilation) == (1, 1) else 0
    if len(axes) <= right:
        return f

    def whole(a, labels):
        here = [_same(label) in ("time", "tap") for label in labels]
        if not any(here):
            return a
        place = P(*(None if one else P.UNCONSTRAINED for one in here))
        return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, place))

    def each(arrays, labels):
        return [whole(a, of) for a, of in zip(arrays, labels, strict=True)]

    def call(*operands):
        return each(f(*each(operands, split.operands)), split.results)

    return call


def summed(mesh, placed: Placement, labels: Sequence[str]) -> tuple[str, ...]:
    """The mesh axes that split these labels, and over which an all-reduce sums therefore.

    Not those of one device. Beside automatic axes that have several, XLA's partitioner fails where
    an explicit one of them is summed over ("hlo->sharding().IsManual", jax 0.12.0.1).
    """
    return tuple(n for label in labels for n in placed.get(label, ()) if mesh.shape[n] > 1)


def all_reduce(a: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """One device's part of a sum over these mesh axes to the whole; over none it is that.

    In float32 beside automatic axes: there XLA for CPUs ends the process over a sum of bfloat16
    ("Invalid binary instruction opcode copy", jax 0.12.0.1).
    """
    if not names:
        return a
    mesh = jax.sharding.get_abstract_mesh()
    beside_automatic = mesh.manual_axes and mesh.auto_axes
    wide = jnp.float32 if beside_automatic and a.dtype == jnp.bfloat16 else a.dtype
    return jax.lax.psum(a.astype(wide), names).astype(a.dtype)


def last_steps(a: jax.Array, count: int, axis: int = -2) -> jax.Array:
    """The last ``count`` steps of an array along ``axis``, or all where it has no more.

    Where explicit axes split time each device gets all of them.
    """
    cut = lambda a: a[(..., slice(-count, None), *[slice(None)] * (-1 - axis))]  # noqa: E731
    aval = jax.typeof(a)
    known = isinstance(a.shape[axis], int)  # and not an export's symbol
    if known and count >= a.shape[axis]:
        return a
    if explicit(aval) is None or entries(aval)[axis] is None:
        return cut(a)
    return shard_by_xla(cut, lambda spec: whole(spec, axis), a)


def whole(spec: P, axis: int) -> P:
    """The `PartitionSpec` that splits no dimension ``axis``; ``spec`` names them all."""
    entries = list(spec)
    entries[axis] = None
    return P(*entries)


def explicit(aval) -> NamedSharding | None:
    """The sharding that an array's type says, where its mesh has explicit axes."""
    return aval.sharding if aval.sharding.mesh.explicit_axes else None


def entries(aval) -> list:
    """For each dimension of an array of that type, what its `PartitionSpec` says, None included.

    Raises:
      NotImplementedError: it is a part of a sum over devices, or its cotangent will be.
    """
    spec = aval.sharding.spec
    if spec.unreduced or spec.reduced:
        raise NotImplementedError(
            f"convolutions take no arrays that are unreduced or reduced, got {aval}: "
            "jax.sharding.reshard them before"
        )
    return [*spec, *[None] * (aval.ndim - len(spec))]


def like(a: jax.Array, spec: P) -> jax.Array:
    """``a``, split as ``spec`` says where its mesh has explicit axes."""
    found = explicit(jax.typeof(a))
    return a if found is None else jax.sharding.reshard(a, NamedSharding(found.mesh, spec))


def beside(a: jax.Array, other: jax.Array, count: int) -> jax.Array:
    """``a``, its first ``count`` dimensions split as those of ``other`` over explicit axes.

    Those that ``other`` has not got are split over none.
    """
    place = explicit(jax.typeof(other))
    if place is None:
        return a
    first, aval = entries(jax.typeof(other))[:count], jax.typeof(a)
    first += [None] * (count - len(first))
    if explicit(aval) is not None and entries(aval)[:count] == first:
        return a
    return jax.sharding.reshard(a, place.update(spec=P(*first)))


def join_channels(*arrays: jax.Array) -> jax.Array:
    """Arrays side by side along the last axis, the others placed as the first one's are."""
    spec = whole(P(*entries(jax.typeof(arrays[0]))), -1)
    return jnp.concatenate([like(a, spec) for a in arrays], -1)


def shard_by_xla(f: Callable, spec: Callable[[P], P], *arrays: jax.Array) -> jax.Array:
    """``f(*arrays)``, which cuts or joins a dimension that may be split over explicit axes.

    A type can't say how the parts of such a dimension lie where their number of steps is not a
    multiple of the devices', and JAX refuses. XLA's partitioner pads them, and moves what has to.

    Args:
      spec: of the first array's `PartitionSpec` the result's, which has to fit again.
    """
    mesh = next((m for m in (jax.typeof(a).sharding.mesh for a in arrays) if m.explicit_axes), None)
    if mesh is None:
        return f(*arrays)
    with jax.sharding.use_abstract_mesh(mesh):
        out = spec(P(*entries(jax.typeof(arrays[0]))))
        return jax.sharding.auto_axes(f, axes=mesh.explicit_axes, out_sharding=out)(*arrays)


def spec_of(sharding, mesh) -> P | None:
    """The `PartitionSpec` of what XLA's partitioner tells a `custom_partitioning`.

    None where there is none: Shardy may have split a mesh axis in two, to fit the first factor of
    a dimension with another size, and no `PartitionSpec` can say that.
    """
    try:  # as `custom_partitioning` itself would, which raises where it gives up
        return parse_flatten_op_sharding(sharding._hlo_sharding, mesh)[0]
    except (ValueError, AssertionError, KeyError, StopIteration, NotImplementedError):
        return None  # all are ways in which it gives up


def _same(label: str) -> str:
    return AS.get(label, label)


def _size(mesh, names: tuple[str, ...]) -> int:
    """How many parts these mesh axes make."""
    return math.prod(mesh.shape[name] for name in names)


def _unwrap(names: tuple[str, ...] | None):
    return names[0] if names is not None and len(names) == 1 else names
