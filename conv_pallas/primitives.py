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
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import checkify, config
from jax._src import core as jax_core
from jax._src import dispatch as jax_dispatch
from jax._src import mesh as mesh_lib
from jax._src.interpreters import batching
from jax._src.lax import utils as lax_utils
from jax.experimental import jet
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import ad, mlir
from jax.sharding import AbstractMesh, NamedSharding

from conv_pallas import dispatch, sharding, taps
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
    operands = [(a.shape, a.sharding.spec) for a in (lhs, rhs)]
    placed = axes.place(mesh, *operands, ((), None))
    return NamedSharding(mesh, axes.partition_specs(placed)[2])


# --- Lowering ---


def _compute(
    lhs, rhs, *, platform, operation, spec, kernel_batch, precision, out_dtype, implementation,
    partitioned=False,
):  # fmt: skip
    """One device's share. Everything is local here, so axes may be merged freely."""
    V, live = kernel_batch, spec.live_taps
    out_shape = _shape_rule(lhs, rhs, operation=operation, spec=spec, kernel_batch=V)
    if 0 in (*lhs.shape, *rhs.shape, *out_shape) or live == range(0):
        return jnp.zeros(out_shape, out_dtype)
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
        platform,
        partitioned=partitioned,
    )
    rhs_rows = N if operation == "conv1d_kernel_grad" else spec.kernel_size
    lhs = lhs.reshape(kernels, N, *lhs.shape[-2:])
    rhs = rhs.reshape(kernels, rhs_rows, *rhs.shape[-2:])
    kernel = dispatch.select(problem, implementation)
    with jax.named_scope(operation):  # so that a profile says what its matmuls and pads belong to
        if kernels == 1:
            out = kernel.run(problem, lhs[0], rhs[0])
        elif many := kernel.many(problem):
            out = many(lhs, rhs)
        else:
            out = _run_as_groups(problem, kernels, lhs, rhs, implementation)
    if operation == "conv1d_kernel_grad":
        shape = (*out_shape[:-3], spec.kernel_size, *out_shape[-2:])
        return taps.among(out.reshape(shape), live, K)
    return out.reshape(out_shape)


def _run_as_groups(problem: Problem, kernels: int, lhs, rhs, implementation):
    """V convolutions as one with V times the groups."""
    join = lambda a: jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], kernels * a.shape[-1])  # noqa: E731
    spec = dataclasses.replace(problem.spec, groups=problem.spec.groups * kernels)
    wide = dataclasses.replace(problem, spec=spec, C=problem.C * kernels, O=problem.O * kernels)
    out = dispatch.select(wide, implementation).run(wide, join(lhs), join(rhs))
    return jnp.moveaxis(out.reshape(*out.shape[:-1], kernels, -1), -2, 0)


def _shares(compute, mesh, axes, arrays, *, operation, **params):
    """How one device's share is computed once every array is split as `axes` says.

    Returns:
      The function of the operands' shares, and the `PartitionSpec` of lhs, rhs and result.
    """
    placed = axes.place(mesh, *arrays)
    contracted = axes.contracted(placed)
    spec, time = axes.local(mesh, placed)

    def here(lhs, rhs, spec):
        return compute(lhs, rhs, operation=operation, spec=spec, **params)

    def share(lhs, rhs):
        out = time.run(operation, here, lhs, rhs, spec)
        return lax.psum(out, contracted) if contracted else out

    return share, axes.partition_specs(placed)


def _partitioned_by_types(compute, lhs, rhs, result, *, operation, spec, kernel_batch, **params):
    """For meshes with explicit axes: the operands' types say how they are split."""
    mesh = result.sharding.mesh
    axes = sharding.Axes.of(operation, spec, lhs.ndim, kernel_batch)
    arrays = [(a.shape, a.sharding.spec) for a in (lhs, rhs, result)]
    params |= dict(operation=operation, kernel_batch=kernel_batch)
    share, (*operands, out) = _shares(compute, mesh, axes, arrays, **params)
    wanted, labels = result.sharding.spec, axes.arrays[:2]
    return sharding.shard_by_types(share, mesh, operands, out, wanted, labels, spec)


def _partitioned_by_xla(compute, lhs, rhs, *, operation, spec, kernel_batch, **params):
    """For meshes with automatic axes: a call that XLA's partitioner asks how to split."""
    axes = sharding.Axes.of(operation, spec, lhs.ndim, kernel_batch)
    params |= dict(operation=operation, kernel_batch=kernel_batch)

    def partition(mesh, operands, result):
        arrays = [(a.shape, sharding.spec_of(a.sharding, mesh)) for a in (*operands, result)]
        share, specs = _shares(compute, mesh, axes, arrays, **params)
        *operands, result = (NamedSharding(mesh, s) for s in specs)
        return mesh, share, result, tuple(operands)

    inner, outer = _group_shape(lhs, rhs, operation, spec.groups)
    rule, sizes, whole = axes.shardy_rule(inner, outer)
    call = custom_partitioning(lambda lhs, rhs: compute(lhs, rhs, spec=spec, **params))
    call.def_partition(
        partition, decode_shardings=False, sharding_rule=rule, need_replication_factors=whole,
        **sizes,
    )  # fmt: skip
    return call


def can_partition(ctx, platform: str) -> bool:
    """Whether this lowering is for several devices at once, on a mesh that is known."""
    if platform == "tpu":
        return False  # libtpu has no `custom_partitioning` (jax-ml/jax#38196, open in 2026)
    if ctx.module_context.lowering_parameters.for_export:
        # What is exported outlives this process, and with it any Python callback; there
        # XLA's partitioner works on what the formulation is made of.
        return False
    context = ctx.module_context.axis_context
    if isinstance(context, mlir.SPMDAxisContext):
        return not context.manual_axes
    if isinstance(context, mlir.ShardingContext):
        mesh = context.abstract_mesh
        if mesh is not None and mesh.explicit_axes and mesh.are_all_axes_explicit:
            return False  # types alone say what is split there, and these operands' say nothing
        mesh_known = mesh or not mesh_lib.thread_resources.env.physical_mesh.empty
        return context.num_devices > 1 and bool(mesh_known)
    return False


def is_partitioned(ctx) -> bool:
    """Whether XLA's partitioner splits what is lowered here, unless told how."""
    context = ctx.module_context.axis_context
    if isinstance(context, mlir.SPMDAxisContext):
        manual = context.manual_axes | set(context.mesh.manual_axes)
        return manual != set(context.mesh.axis_names)
    return isinstance(context, mlir.ShardingContext) and context.num_devices > 1


def _lowering(ctx, lhs, rhs, *, platform, out_sharding, **params):
    compute = functools.partial(_compute, platform=platform)
    (result,) = ctx.avals_out
    if (mesh := result.sharding.mesh).explicit_axes:
        # Beside explicit axes automatic ones are left to XLA.
        compute = functools.partial(compute, partitioned=bool(mesh.auto_axes))
        call = _partitioned_by_types(compute, *ctx.avals_in, result, **params)
        return lower_function(ctx, call, (lhs, rhs), multiple_results=False)
    if can_partition(ctx, platform):
        avals = without_sharding((*ctx.avals_in, result))
        call = _partitioned_by_xla(compute, *avals[:2], **params)
    else:
        call = functools.partial(compute, partitioned=is_partitioned(ctx), **params)
    return lower_locally(ctx, call, (lhs, rhs), multiple_results=False)


def lower_everywhere(p, rule):
    """Registers ``rule(ctx, *operands, platform=..., **params)`` for each platform's name."""
    for platform in dispatch.PLATFORMS:
        name = None if platform == dispatch.OTHER else platform
        mlir.register_lowering(p, functools.partial(rule, platform=platform), platform=name)


def without_sharding(avals):
    """The same shapes and dtypes, of no mesh."""
    return [jax.core.ShapedArray(a.shape, a.dtype) for a in avals]


def lower_locally(ctx, call, operands, *, multiple_results: bool):
    """Lowers ``call(*operands)`` where no type has a sharding: all is one device's, or the call's.

    Of the mesh in context stays only which chip it names, where none of that kind is at hand.
    """
    ctx = ctx.replace(
        avals_in=without_sharding(ctx.avals_in), avals_out=without_sharding(ctx.avals_out)
    )
    chip = jax.sharding.get_abstract_mesh().abstract_device
    with (
        jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=chip)),
        # In a `jax.shard_map` that checks it, Pallas wants to be told how results vary over a mesh.
        config._check_vma(False),
    ):
        return lower_function(ctx, call, operands, multiple_results=multiple_results)


def lower_function(ctx, call, operands, *, multiple_results: bool):
    """Lowers ``call(*operands)``, whatever dtypes a user allows himself where it is compiled."""
    # What was traced with 64 bits may be lowered where they are off.
    wide = any(a.dtype.itemsize == 8 for a in (*ctx.avals_in, *ctx.avals_out))
    with (
        jax.numpy_dtype_promotion("standard"),  # what a user forbids himself, kernels may do
        jax.enable_x64(jax.config.jax_enable_x64 or wide),
    ):
        return mlir.lower_fun(call, multiple_results=multiple_results)(ctx, *operands)


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
    ):
        return _widen(bind, operation, lhs, rhs, lhs_dim, rhs_dim, V, params["spec"].groups)
    else:
        lhs = batching.bdim_at_front(lhs, lhs_dim, axis_data.size, mesh_axis)
        rhs = batching.bdim_at_front(rhs, rhs_dim, axis_data.size, mesh_axis)
        V, dim = V + 1, 0
    if out_sharding is not None:
        out_sharding = batching.get_sharding_for_vmap(axis_data, out_sharding, dim)
    return bind(lhs, rhs, kernel_batch=V, out_sharding=out_sharding), dim


def _widen(bind, operation, lhs, rhs, lhs_dim, rhs_dim, V, groups):
    """Folds an axis that one operand has into its channels: the other is read once."""
    # Channels out carry the axis, unless what varies brings in channels in. A kernel's
    # axis of channels in counts within a group.
    if rhs_dim is None:  # x of a kernel gradient
        size, lhs = lhs.shape[lhs_dim], _fold(lhs, lhs_dim, -1, groups)
        out_axis, out_groups = -2, 1
    elif operation == "conv1d_input_grad":
        size, rhs = rhs.shape[rhs_dim], _fold(rhs, rhs_dim, -2, 1)
        out_axis, out_groups = -1, groups
    else:
        size, rhs = rhs.shape[rhs_dim], _fold(rhs, rhs_dim, -1, groups)
        out_axis, out_groups = -1, groups
    out = bind(lhs, rhs, kernel_batch=V, out_sharding=None)
    return _unfold(out, out_axis, size, out_groups)


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
    out_sharding = aval.sharding if aval.sharding.mesh.explicit_axes else None
    result = dict(out_dtype=aval.dtype, out_sharding=out_sharding)
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
    """A primitive; ``asks`` says whether XLA's partitioner may have to be told how to split it."""
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
    lower_everywhere(p, rule(_lowering))
    if asks:
        jax_dispatch.prim_requires_devices_during_lowering.add(p)
    checkify.error_checks[p] = functools.partial(checkify.nan_error_check, p)
    return p


PRIMITIVES = {operation: _make(operation, asks=True) for operation in OPERATIONS}
# The same for where `split_by_types`: a program of these alone is lowered without its devices.
BY_TYPES = {operation: _make(operation, asks=False) for operation in OPERATIONS}


def split_by_types(operands) -> bool:
    """Whether no `custom_partitioning` will be needed: types say what one device computes.

    So they do on a mesh of explicit axes alone, and inside of a `jax.shard_map` over all axes.
    """
    meshes = [jax.typeof(a).sharding.mesh for a in operands]
    return any(mesh.are_all_axes_explicit or mesh.are_all_axes_manual for mesh in meshes)


def _bind(operation: Operation, lhs, rhs, **params):
    # In a shard_map operands have to vary along the same mesh axes; in a rule, too, one may have
    # come to vary where the other did not.
    operands = jax_core.auto_insert_reshard(lhs, rhs)
    family = BY_TYPES if split_by_types(operands) else PRIMITIVES
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


def convs_saveable(prim: Any, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint`: keep what convolutions compute, recompute the rest.

    Those of `jax.lax` among them, which run what is of another rank or ordered as `"xla_native"`.

    `jax.checkpoint_policies.dots_saveable` and the like know `jax.lax`'s own primitives, not
    these. To keep what both are for, give `jax.checkpoint_policies.save_from_both_policies`
    the two of them.
    """
    return prim.name in ("conv1d", "conv1d_fused", "conv_general_dilated")
