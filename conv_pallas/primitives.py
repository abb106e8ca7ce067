"""Convolution as three JAX primitives.

``<g, conv1d(x, w)>`` is linear in each of g, x and w. Its partial derivatives are the three
operations, and each one's transposes are the other two:

    conv1d(x, w) -> y     conv1d_input_grad(g, w) -> dx     conv1d_kernel_grad(x, g) -> dw

so the family is closed under forward and reverse mode to any order, and each primitive
needs only a shape, a batching, a sharding and, per platform, a lowering rule.

Shapes, with ``*B`` any number of batch axes and ``*V`` the axes of `jax.vmap` over kernels:

    x, dx: (*V, *B, T, C)     w, dw: (*V, K, C // G, O)     y, g: (*V, *B, T', O)

Batch axes stay apart up to the lowering, so that no rule reshapes a sharded axis. The
structure follows jax's own cuDNN attention (jax/_src/cudnn).

What comes from ``jax._src`` here and in `fused` has no public name in jax 0.12: what
`jax.lax`'s own primitives are made with, and the table of checkify.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import checkify
from jax._src import core as jax_core
from jax._src.interpreters.batching import get_sharding_for_vmap
from jax._src.lax import utils as lax_utils
from jax.experimental import jet
from jax.interpreters import ad, batching
from jax.sharding import NamedSharding

from conv_pallas import dispatch, lowering, sharding, taps
from conv_pallas.spec import OPERATIONS, ConvSpec, Operation, Problem

# --- Shapes and types ---


def _shape_rule(lhs, rhs, *, operation: Operation, spec: ConvSpec, kernel_batch: int, **_):
    if operation == "conv1d":
        return (*lhs.shape[:-2], spec.out_time, rhs.shape[-1])
    if operation == "conv1d_input_grad":
        return (*lhs.shape[:-2], spec.time, rhs.shape[-2] * spec.groups)
    channels_in = lhs.shape[-1] // spec.groups
    return (*lhs.shape[:kernel_batch], spec.kernel_size, channels_in, rhs.shape[-1])


def _group_shape(lhs, rhs, operation: Operation, groups: int) -> tuple[int, int]:
    """Channels in and out of one group."""
    inner = lhs.shape[-1] // groups if operation == "conv1d_kernel_grad" else rhs.shape[-2]
    return inner, rhs.shape[-1] // groups


def _dtype_rule(lhs, rhs, *, out_dtype, **_):
    return out_dtype


def _sharding_rule(lhs, rhs, *, operation, spec, kernel_batch, out_sharding, **params):
    """The result's sharding on a mesh with explicit axes."""
    if out_sharding is not None:
        return out_sharding
    mesh = (rhs if lhs.sharding.mesh.empty else lhs).sharding.mesh
    axes = sharding.Axes.of(operation, spec, lhs.ndim, kernel_batch)
    operands = [(a.shape, sharding.entries(a)) for a in (lhs, rhs)]
    placed = axes.place(mesh, *operands, ((), None))
    return NamedSharding(mesh, axes.partition_specs(placed)[2])


# --- Lowering ---


def _compute(
    lhs, rhs, *, on, operation, spec, kernel_batch, precision, out_dtype, implementation
) -> list[jax.Array]:
    """One device's share. Everything is local here, so axes may be merged freely."""
    V, live = kernel_batch, spec.live_taps
    out_shape = _shape_rule(lhs, rhs, operation=operation, spec=spec, kernel_batch=V)
    if 0 in (*lhs.shape, *rhs.shape, *out_shape) or live == range(0):
        return [jnp.zeros(out_shape, out_dtype)]
    if operation != "conv1d_kernel_grad":
        rhs = taps.some(rhs, live)
    K, spec = spec.kernel_size, spec if live is None else spec.of_taps(live)
    kernels, N = math.prod(lhs.shape[:V]), math.prod(lhs.shape[V:-2])
    inner, outer = _group_shape(lhs, rhs, operation, spec.groups)
    problem = Problem(
        operation,
        spec,
        N,
        inner * spec.groups,
        outer * spec.groups,
        np.dtype(lhs.dtype),
        np.dtype(rhs.dtype),
        np.dtype(out_dtype),
        precision,
        **on,
    )
    if exchanged := problem.exchanged:  # no zero between the steps of x is multiplied
        problem, lhs, rhs = exchanged, rhs, lhs
    rhs_rows = N if operation == "conv1d_kernel_grad" else spec.kernel_size
    lhs = lhs.reshape(kernels, N, *lhs.shape[-2:])
    rhs = rhs.reshape(kernels, rhs_rows, *rhs.shape[-2:])
    kernel = dispatch.select(problem, implementation)
    with jax.named_scope(operation):  # so that a profile says what its matmuls and pads belong to
        if kernels == 1:
            out = kernel.run(problem, lhs[0], rhs[0])
            dispatch.check(kernel, "run", problem, out)
        elif many := kernel.many(problem):
            out = many(lhs, rhs)
            dispatch.check(kernel, "many", problem, out, (kernels, *problem.out_shape))
        else:
            out = _run_as_groups(problem, kernels, lhs, rhs, implementation)
    if operation == "conv1d_kernel_grad":
        out = taps.flip(out, spec.groups) if exchanged else out
        shape = (*out_shape[:-3], spec.kernel_size, *out_shape[-2:])
        return [taps.among(out.reshape(shape), live, K)]
    return [out.reshape(out_shape)]


def _run_as_groups(problem: Problem, kernels: int, lhs, rhs, implementation):
    """V convolutions as one with V times the groups."""
    join = lambda a: jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], kernels * a.shape[-1])  # noqa: E731
    wide = problem.in_groups(kernels)
    try:
        kernel = dispatch.select(wide, implementation)
    except NotImplementedError as e:
        how = f"{kernels} kernels at once, as of jax.vmap, run as {kernels} times the groups"
        raise NotImplementedError(f"{e}; {how}") from None
    out = kernel.run(wide, join(lhs), join(rhs))
    dispatch.check(kernel, "run", wide, out)
    return jnp.moveaxis(out.reshape(*out.shape[:-1], kernels, -1), -2, 0)


class Split(sharding.Split):
    """As `sharding.Split`: every device computes the operation on its share, or a part of a sum."""

    @classmethod
    def of(cls, avals, *, operation, spec: ConvSpec, kernel_batch, **_) -> "Split":
        """Of the operands' types and the parameters of the primitive."""
        axes = sharding.Axes.of(operation, spec, avals[0].ndim, kernel_batch)
        channels = _group_shape(*avals, operation, spec.groups)
        return cls(axes, axes.arrays[:2], axes.arrays[2:], *channels)

    def share(self, local, mesh, placed, *, operation, spec, **params):
        contracted = self.axes.contracted(mesh, placed)
        spec, time = self.axes.local(mesh, placed)

        def here(lhs, rhs, spec):
            (out,) = local(lhs, rhs, operation=operation, spec=spec, **params)
            return out

        def share(lhs, rhs):
            out = time.run(operation, here, lhs, rhs, spec)
            return [sharding.all_reduce(out, contracted)]

        return share


def _lowering(ctx, lhs, rhs, *, platform, out_sharding, **params):
    where = dict(platform=platform, local=_compute, split=Split.of)
    return lowering.lower(ctx, lhs, rhs, **where, **params)


# --- Batching ---


def _batching_rule(axis_data, args, dims, *, kernel_batch, out_sharding, operation, **params):
    """One more batch axis, one more axis of kernels, or wider channels: never a loop."""
    (lhs, rhs), (lhs_dim, rhs_dim), V = args, dims, kernel_batch
    bind = functools.partial(_bind, operation, **params)
    mesh_axis = axis_data.explicit_mesh_axis
    if lhs_dim is None and rhs_dim is None:
        return bind(lhs, rhs, kernel_batch=V, out_sharding=out_sharding), None
    if rhs_dim is None and operation != "conv1d_kernel_grad":
        # The same kernel for all: the axis becomes one of the batch.
        lhs, dim = jnp.moveaxis(lhs, lhs_dim, V), V
    elif (
        (lhs_dim is None or rhs_dim is None)
        and axis_data.size  # none at all can't be split off again
        and out_sharding is None
        and mesh_axis is None
        and axis_data.spmd_name is None  # a sharded axis stays one of its own
        and not _folds_sharded(operation, args, dims)
    ):
        return _widen(bind, operation, lhs, rhs, lhs_dim, rhs_dim, V, params["spec"].groups)
    else:
        lhs = batching.bdim_at_front(lhs, lhs_dim, axis_data.size, mesh_axis)
        rhs = batching.bdim_at_front(rhs, rhs_dim, axis_data.size, mesh_axis)
        V, dim = V + 1, 0
    if out_sharding is not None:
        out_sharding = get_sharding_for_vmap(axis_data, out_sharding, dim)
    return bind(lhs, rhs, kernel_batch=V, out_sharding=out_sharding), dim


def _widened(operation, lhs, rhs, lhs_dim, rhs_dim):
    """The operand that has the axis, where it is, and the channels that `_widen` folds it into."""
    # Channels out carry the axis, unless what varies brings in channels in. A kernel's
    # axis of channels in counts within a group.
    if rhs_dim is None:  # x of a kernel gradient
        return lhs, lhs_dim, -1
    return rhs, rhs_dim, -2 if operation == "conv1d_input_grad" else -1


def _widen(bind, operation, lhs, rhs, lhs_dim, rhs_dim, V, groups):
    """Folds an axis that one operand has into its channels: the other is read once."""
    a, dim, axis = _widened(operation, lhs, rhs, lhs_dim, rhs_dim)
    size, folded = a.shape[dim], _fold(a, dim, axis, 1 if axis == -2 else groups)
    lhs, rhs = (folded, rhs) if rhs_dim is None else (lhs, folded)
    out = bind(lhs, rhs, kernel_batch=V, out_sharding=None)
    return _unfold(out, -2, size, 1) if rhs_dim is None else _unfold(out, -1, size, groups)


def _folds_sharded(operation, args, dims) -> bool:
    """Whether `_widen` would fold an axis into channels that are split over a mesh."""
    a, dim, axis = _widened(operation, *args, *dims)
    split = [s for i, s in enumerate(sharding.entries(jax.typeof(a))) if i != dim]
    return split[axis] is not None


def _fold(a, dim: int, axis: int, groups: int):
    """Merges axis `dim` into the later `axis`, per group: ``(G, dim, channel)``."""
    axis += a.ndim - 1
    a = jnp.moveaxis(a, dim, axis)
    before, (size, channels), after = a.shape[:axis], a.shape[axis : axis + 2], a.shape[axis + 2 :]
    a = a.reshape(*before, size, groups, channels // groups, *after)
    return jnp.moveaxis(a, axis, axis + 1).reshape(*before, size * channels, *after)


def _unfold(a, axis: int, size: int, groups: int):
    """Undoes `_fold`; returns the array and where the axis is."""
    axis += a.ndim
    before, channels, after = a.shape[:axis], a.shape[axis] // size, a.shape[axis + 1 :]
    a = a.reshape(*before, groups, size, channels // groups, *after)
    return jnp.moveaxis(a, axis + 1, axis).reshape(*before, size, channels, *after), axis


# --- Differentiation ---


def _to(aval, operation: Operation, lhs, rhs, **params):
    """An operation whose result is the cotangent of a value of type `aval`."""
    result = dict(out_dtype=aval.dtype, out_sharding=sharding.explicit(aval))
    return _bind(operation, lhs, rhs, **(params | result))


_TRANSPOSES = {
    "conv1d": (
        lambda ct, x, w, **params: _to(x.aval, "conv1d_input_grad", ct, w, **params),
        lambda ct, x, w, **params: _to(w.aval, "conv1d_kernel_grad", x, ct, **params),
    ),
    "conv1d_input_grad": (
        lambda ct, g, w, **params: _to(g.aval, "conv1d", ct, w, **params),
        lambda ct, g, w, **params: _to(w.aval, "conv1d_kernel_grad", ct, g, **params),
    ),
    "conv1d_kernel_grad": (
        lambda ct, x, g, **params: _to(x.aval, "conv1d_input_grad", g, ct, **params),
        lambda ct, x, g, **params: _to(g.aval, "conv1d", x, ct, **params),
    ),
}


# --- The primitives ---


def _make(operation: Operation, *, asks: bool):
    """A primitive; ``asks`` as in `lowering.register`."""
    rule = functools.partial(functools.partial, operation=operation)
    p = lax_utils.standard_primitive(
        rule(_shape_rule),
        _dtype_rule,
        operation,
        sharding_rule=rule(_sharding_rule),
        vma_rule=functools.partial(jax_core.standard_vma_rule, operation),
    )
    ad.defbilinear(p, *_TRANSPOSES[operation])
    jet.jet_rules[p] = functools.partial(jet._bilinear_taylor_rule, p)
    batching.fancy_primitive_batchers[p] = rule(_batching_rule)
    lowering.register(p, rule(_lowering), asks=asks)
    checkify.error_checks[p] = functools.partial(checkify.nan_error_check, p)
    return p


PRIMITIVES = {operation: _make(operation, asks=True) for operation in OPERATIONS}
# For where `lowering.split_by_types`: a program of these alone is lowered without its devices.
BY_TYPES = {operation: _make(operation, asks=False) for operation in OPERATIONS}


def _bind(operation: Operation, lhs, rhs, **params):
    # In a shard_map operands have to vary along the same mesh axes; in a rule, too, one may have
    # come to vary where the other did not.
    operands = jax_core.auto_insert_reshard(lhs, rhs)
    family = BY_TYPES if lowering.split_by_types(operands) else PRIMITIVES
    return family[operation].bind(*operands, **params)


def _apply(operation: Operation, lhs, rhs, *, out_dtype, **params):
    return _bind(operation, lhs, rhs, kernel_batch=0, out_dtype=np.dtype(out_dtype), **params)


def conv1d(x, w, *, spec: ConvSpec, precision, out_dtype, implementation, out_sharding=None):
    """The forward convolution of x ``(*batch, T, C)`` with w ``(K, C // G, O)``.

    Args:
      spec: the geometry; `conv_pallas.spec.make_spec` has checked the shapes against it.
      precision: None, a `jax.lax.Precision`, or one for each operand.
      out_dtype: of the result; operands may differ from it and from each other.
      implementation: from `conv_pallas.dispatch.canonicalize`.
      out_sharding: a `NamedSharding` of the result on a mesh with explicit axes, or None.

    Returns:
      y ``(*batch, T', O)``.
    """
    params = dict(spec=spec, precision=precision, implementation=implementation)
    return _apply("conv1d", x, w, out_dtype=out_dtype, out_sharding=out_sharding, **params)


def conv1d_input_grad(
    g, w, *, spec: ConvSpec, precision, out_dtype, implementation, out_sharding=None
):
    """dx ``(*batch, T, C)`` of g ``(*batch, T', O)`` and w ``(K, C // G, O)``; see `conv1d`."""
    params = dict(spec=spec, precision=precision, implementation=implementation)
    return _apply(
        "conv1d_input_grad", g, w, out_dtype=out_dtype, out_sharding=out_sharding, **params
    )


def conv1d_kernel_grad(
    x, g, *, spec: ConvSpec, precision, out_dtype, implementation, out_sharding=None
):
    """dw ``(K, C // G, O)`` of x ``(*batch, T, C)`` and g ``(*batch, T', O)``; see `conv1d`."""
    params = dict(spec=spec, precision=precision, implementation=implementation)
    return _apply(
        "conv1d_kernel_grad", x, g, out_dtype=out_dtype, out_sharding=out_sharding, **params
    )


def convs_saveable(prim: Any, *operands: Any, **params: Any) -> bool:
    """A policy for `jax.checkpoint`: keep what convolutions compute, recompute the rest.

    Those of `jax.lax` among them, which run what is of another rank or ordered as `"xla_native"`;
    but not a depthwise layer's of one tap, which is a product.

    `jax.checkpoint_policies.dots_saveable` and the like know `jax.lax`'s own primitives, not
    these. To keep what both are for, give `jax.checkpoint_policies.save_from_both_policies`
    the two of them.

    Args:
      prim, operands, params: the primitive that JAX asks about, types and parameters.

    Returns:
      Whether its results are kept.
    """
    if prim.name == "conv1d":
        K, per_group, _ = operands[1].shape[-3:]
        return not (K == per_group == 1 < params["spec"].groups)
    return prim.name in ("conv1d_fused", "conv1d_packed", "conv_general_dilated")
