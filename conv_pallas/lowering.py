"""How our primitives are lowered: what one device computes, and who splits it over a mesh.

- Axes that are explicit: the types say how operands are split, and a `jax.shard_map` takes the
  parts to each device.
- Axes that are automatic: XLA's partitioner decides, and asks a `custom_partitioning` what each
  device then computes.
- Where it can't ask, it splits what the computation is made of. No custom call may be in that:
  `conv_pallas.spec.Problem.partitioned` tells the kernels.
"""

import functools
from collections.abc import Callable

import jax
from jax._src import config
from jax._src import dispatch as jax_dispatch
from jax._src import mesh as mesh_lib
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from conv_pallas import sharding
from conv_pallas.spec import OTHER, PLATFORMS


def register(p, rule: Callable, *, asks: bool) -> None:
    """Registers ``rule(ctx, *operands, platform=..., **params)`` for each platform's name.

    Args:
      asks: whether XLA's partitioner may have to be told how to split it.
    """
    for platform in PLATFORMS:
        name = None if platform == OTHER else platform
        mlir.register_lowering(p, functools.partial(rule, platform=platform), platform=name)
    if asks:
        jax_dispatch.prim_requires_devices_during_lowering.add(p)


def split_by_types(operands) -> bool:
    """Whether no `custom_partitioning` will be needed: types say what one device computes.

    So they do on a mesh of explicit axes alone, and inside of a `jax.shard_map` over all axes.
    """
    meshes = [jax.typeof(a).sharding.mesh for a in operands]
    return any(mesh.are_all_axes_explicit or mesh.are_all_axes_manual for mesh in meshes)


def lower(ctx, *operands, platform: str, local: Callable, split: Callable, **params):
    """The lowering rule of an operation that splits over meshes.

    Args:
      local: ``local(*operands, on=on, **params)``, a list of results: those of one device's share.
        ``on`` has the fields of `conv_pallas.spec.Problem` that say where it runs.
      split: ``split(avals, **params)``, the `sharding.Split` of operands of these types.
    """

    exported = ctx.module_context.lowering_parameters.for_export

    def here(partitioned: bool = False):
        on = dict(platform=platform, partitioned=partitioned, exported=exported)
        return functools.partial(local, on=on)

    mesh = ctx.avals_out[0].sharding.mesh
    if mesh.explicit_axes:
        labels = split(ctx.avals_in, **params)
        # Automatic axes beside explicit ones are left to XLA.
        call = _by_types(here(bool(mesh.auto_axes)), labels, ctx.avals_in, ctx.avals_out, params)
        return lower_function(ctx, call, operands)
    if _partitioner_asks(ctx, platform):
        call = _by_xla(here(), split(ctx.avals_in, **params), params)
    elif _is_partitioned(ctx):
        labels = split(ctx.avals_in, **params)
        call = functools.partial(here(partitioned=True), **params)
        call = sharding.with_steps_whole(call, _mesh(ctx), labels, params["spec"])
    else:
        call = functools.partial(here(), **params)
    return _lower_locally(ctx, call, operands)


def lower_function(ctx, call: Callable, operands):
    """Lowers ``call(*operands)``, a list, whatever is configured where it is compiled.

    What a user configured where it was traced is in the parameters. So here dtypes promote as
    usual, 64 bits are on wherever an array has them, and no precision is the default one.
    """
    wide = any(a.dtype.itemsize == 8 for a in (*ctx.avals_in, *ctx.avals_out))
    with (
        jax.numpy_dtype_promotion("standard"),  # what a user forbids himself, kernels may do
        jax.enable_x64(jax.config.jax_enable_x64 or wide),
        jax.default_matmul_precision(None),
    ):
        return mlir.lower_fun(call, multiple_results=True)(ctx, *operands)


def _lower_locally(ctx, call: Callable, operands):
    """`lower_function` where no type has a sharding: all is one device's, or the call's.

    Of the mesh in context stays only which chip it names, where none of that kind is at hand.
    """
    bare = lambda avals: [jax.core.ShapedArray(a.shape, a.dtype) for a in avals]  # noqa: E731
    ctx = ctx.replace(avals_in=bare(ctx.avals_in), avals_out=bare(ctx.avals_out))
    chip = jax.sharding.get_abstract_mesh().abstract_device
    with (
        jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=chip)),
        # In a `jax.shard_map` that checks it, Pallas wants to be told how results vary over a mesh.
        config._check_vma(False),
    ):
        return lower_function(ctx, call, operands)


def _partitioner_asks(ctx, platform: str) -> bool:
    """Whether this lowering is for several devices at once, on a mesh that is known."""
    if platform == "tpu":
        return False  # libtpu has no `custom_partitioning`: jax-ml/jax#38196, open in 2026
    if ctx.module_context.lowering_parameters.for_export:
        return False  # what is exported outlives this process, and with it any Python callback
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


def _is_partitioned(ctx) -> bool:
    """Whether XLA's partitioner splits what is lowered here, unless it is told how.

    Where it does, JAX refuses to lower a kernel for TPUs.
    """
    context = ctx.module_context.axis_context
    if isinstance(context, mlir.SPMDAxisContext):
        manual = context.manual_axes | set(context.mesh.manual_axes)
        return manual != set(context.mesh.axis_names)
    return isinstance(context, mlir.ShardingContext) and context.num_devices > 1


def _mesh(ctx) -> AbstractMesh:
    """The one that XLA's partitioner splits over, or one without axes where nothing tells of it."""
    context = ctx.module_context.axis_context
    if isinstance(context, mlir.SPMDAxisContext):
        manual = dict.fromkeys(context.manual_axes, AxisType.Manual)
        return context.mesh.abstract_mesh.update_axis_types(manual)
    known = (
        context.abstract_mesh,
        mesh_lib.thread_resources.env.physical_mesh.abstract_mesh,
        jax.sharding.get_abstract_mesh(),  # of `jax.set_mesh`, where no argument names it
    )
    return next((m for m in known if m is not None and not m.empty), AbstractMesh((), ()))


def _by_types(local: Callable, split: sharding.Split, avals_in, avals_out, params) -> Callable:
    """A function of arrays on explicit axes."""
    mesh = avals_out[0].sharding.mesh
    operands, results = (
        [(a.shape, a.sharding.spec) for a in avals] for avals in (avals_in, avals_out)
    )
    placed = split.place(mesh, operands, results[0])
    ins, outs = split.specs(placed)
    share = split.share(local, mesh, placed, **params)
    wanted = [a.sharding.spec for a in avals_out]
    return sharding.shard_by_types(share, mesh, ins, outs, wanted, split, params["spec"])


def _by_xla(local: Callable, split: sharding.Split, params) -> Callable:
    """A call that XLA's partitioner asks how to split."""

    def partition(mesh, operands, results):
        operands, results = (
            [(a.shape, sharding.spec_of(a.sharding, mesh)) for a in arrays]
            for arrays in (operands, results)
        )
        placed = split.place(mesh, operands, results[0])
        ins, outs = ([NamedSharding(mesh, s) for s in specs] for specs in split.specs(placed))
        return mesh, split.share(local, mesh, placed, **params), outs, tuple(ins)

    rule, sizes, whole = split.shardy_rule()
    call = custom_partitioning(lambda *operands: local(*operands, **params))
    call.def_partition(
        partition, decode_shardings=False, sharding_rule=rule, need_replication_factors=whole,
        **sizes,
    )  # fmt: skip
    return call
