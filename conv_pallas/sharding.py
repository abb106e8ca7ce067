"""How the three operations split over a mesh.

Every dimension of every array has a label; a mesh axis is placed on a label, and so on that
dimension of all three arrays at once. Batches, kernels, channels and groups can be split;
time and taps can't, and are gathered where somebody split them. Where the label is summed
over, as channels in are by the forward convolution, each device's share is a partial sum,
and one all-reduce follows.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import jax
from jax.sharding import PartitionSpec as P

from conv_pallas.spec import Operation

WHOLE = ("time", "outtime", "tap", "inner")  # labels that are never split

Placement = dict[str, tuple[str, ...]]  # from a label to the mesh axes that split it


@dataclasses.dataclass(frozen=True)
class Axes:
    """The labels of lhs, rhs and the result of one operation.

    Attributes:
      arrays: for lhs, rhs and the result, a label per dimension.
      order: which of the three says first where mesh axes go. Activations come before
        kernels, so that where both want a mesh axis the small array is the one to move.
    """

    arrays: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    order: tuple[int, int, int]

    @classmethod
    def of(cls, operation: Operation, groups: int, lhs_ndim: int, kernel_batch: int) -> "Axes":
        V = tuple(f"v{i}" for i in range(kernel_batch))
        B = tuple(f"n{i}" for i in range(lhs_ndim - kernel_batch - 2))
        # Groups keep to themselves: split, they take their share of every channel axis.
        C, inner, O = ("group",) * 3 if groups > 1 else ("in", "in", "out")
        inner = "inner" if groups > 1 else inner
        x = (*V, *B, "time", C)
        w = (*V, "tap", inner, O)
        y = (*V, *B, "outtime", O)
        if operation == "conv1d":
            return cls((x, w, y), (0, 2, 1))
        if operation == "conv1d_input_grad":
            return cls((y, w, x), (0, 2, 1))
        return cls((x, y, w), (0, 1, 2))

    def place(self, mesh, groups: int, *arrays: tuple[Sequence[int], Sequence | None]) -> Placement:
        """Places mesh axes on labels as the arrays' own shardings suggest.

        Args:
          mesh: for the sizes of its axes.
          groups: ``G``; what splits groups must divide it.
          *arrays: for lhs, rhs and result, the shape and the `PartitionSpec` or None.
        """
        placed: Placement = {}
        taken: set[str] = set()
        for i in self.order:
            shape, spec = arrays[i]
            entries = spec or ()  # trailing dimensions that are not split may be left out
            for label, size, entry in zip(self.arrays[i], shape, entries, strict=False):
                if entry is None or entry is P.UNCONSTRAINED:
                    continue
                names = entry if isinstance(entry, tuple) else (entry,)
                shards = 1
                for name in names:
                    shards *= mesh.shape[name]
                whole = label in WHOLE or label in placed or not taken.isdisjoint(names)
                if not whole and (groups if label == "group" else size) % shards == 0:
                    placed[label] = tuple(names)
                    taken.update(names)
        return placed

    def partition_specs(self, placed: Placement) -> tuple[P, P, P]:
        """The `PartitionSpec` of lhs, rhs and the result."""
        return tuple(self.partition_spec(labels, placed) for labels in self.arrays)

    @staticmethod
    def partition_spec(labels: tuple[str, ...], placed: Placement) -> P:
        """The `PartitionSpec` of an array with these labels."""
        return P(*(_unwrap(placed.get(label)) for label in labels))

    def contracted(self, placed: Placement) -> tuple[str, ...]:
        """The mesh axes over which the result is a sum of each device's share."""
        *operands, result = self.arrays
        summed = {label for labels in operands for label in labels if label not in result}
        return tuple(n for label in sorted(summed) for n in placed.get(label, ()))

    def shardy_rule(
        self, groups: int, inner: int, outer: int, operands=None, results=None
    ) -> tuple[str, dict[str, int], tuple[str, ...]]:
        """The rule for Shardy's propagation: how dimensions of the arrays correspond.

        Args:
          groups, inner, outer: ``G``, ``C // G`` and ``O // G``.
          operands, results: the labels of each; None: lhs and rhs, and the result.

        Returns:
          An einsum-like string, the sizes of the factors that occur in products only, and
          the factors that must not be split.
        """
        # A grouped channel axis is (group, channel of the group), without factors of one.
        x = "(group inner)" if inner > 1 else "group"
        y = "(group outer)" if outer > 1 else "group"

        def dimension(labels, i):
            if labels[i] != "group":
                return labels[i]
            return x if "time" in labels else y

        def text(arrays):
            return ", ".join(" ".join(dimension(a, i) for i in range(len(a))) for a in arrays)

        rule = f"{text(operands or self.arrays[:2])} -> {text(results or self.arrays[2:])}"
        sizes = {}
        if groups > 1:
            sizes = {"outer": outer} if outer > 1 else {}
            if inner > 1 and outer > 1:
                sizes["group"] = groups
        factors = dict.fromkeys(re.findall(r"\w+", rule))  # Shardy wants them in this order
        return rule, sizes, tuple(f for f in factors if f in WHOLE)


def shard_by_types(share: Callable, mesh, operands, results, wanted) -> Callable:
    """``share``, which computes one device's part, as a function of arrays on explicit axes.

    Args:
      mesh: of the arrays' types.
      operands: for each, the `PartitionSpec` that ``share`` needs.
      results: the one that it leaves each result in; a list, or one for one array.
      wanted: the one that each result's type says, likewise.
    """

    def call(*arrays):
        # The types have a mesh also where the caller is in no context of one.
        with jax.sharding.use_abstract_mesh(mesh):
            outcome = jax.shard_map(
                share,
                in_specs=tuple(operands),
                out_specs=results,
                axis_names=set(mesh.explicit_axes),
                check_vma=False,
            )(*map(jax.sharding.reshard, arrays, operands))
            return jax.sharding.reshard(outcome, wanted)

    return call


def _unwrap(names: tuple[str, ...] | None):
    return names[0] if names is not None and len(names) == 1 else names
