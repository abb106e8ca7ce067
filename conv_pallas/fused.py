"""A convolution with its bias and activation as one operation, where a kernel can carry them.

    z = conv1d(x, w) + bias      y = activation(z)

is bound by memory more often than not, and whatever XLA does to the result of a custom call is
one more pass over it. So three more primitives stand one level above those of `primitives`:

    conv1d_fused           x, w, bias -> y                 (and z, where its derivative needs it)
    conv1d_fused_tangent   dx, dw, dbias -> dy             linear; no kernel fuses it
    conv1d_fused_backward  dy -> dx, dw, dbias             its transpose

Each is *defined* by the composition of the three operations and of what stands here as JAX code.
The composition is what runs where no kernel fuses, what `jax.vmap` and meshes fall back on, and
what is differentiated: the derivative of any of the three is that of its composition, but for the
first derivative of the first. So forward mode and every order are right as soon as the three
compositions are.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import checkify
from jax._src import core as jax_core
from jax._src.lax import utils as lax_utils
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, xla
from jax.interpreters import partial_eval as pe
from jax.sharding import PartitionSpec as P

from conv_pallas import dispatch, fused_sharding, halo, lowering, primitives, sharding, taps
from conv_pallas.activations import FUNCTIONS, activate
from conv_pallas.spec import ConvSpec, Epilogue, problem_of


def times_derivative(d: jax.Array, saved: jax.Array | None, activation: str | None) -> jax.Array:
    """``d * activation'(z)``, from what `Epilogue.saved` says: y, z, or nothing.

    Calculates in float32 at least, and rounds once.
    """
    if activation is None:
        return d
    if activation == "relu":
        return jnp.where(saved > 0, d, jnp.zeros_like(d))
    dtype = d.dtype
    if dtype.itemsize < 4:
        d, saved = d.astype(jnp.float32), saved.astype(jnp.float32)
    if activation == "tanh":
        d = (d + d * saved) * (1 - saved)  # 1 - y * y would cancel
    elif activation == "sigmoid":
        d = d * (saved * (1 - saved))
    else:
        d = jax.jvp(FUNCTIONS[activation], (saved,), (d,))[1]
    return d.astype(dtype)


# --- The compositions ---
# Operands are lists: x, w and, if there is one, bias; then `saved`, if there is one; then what the
# operation is linear in. All parameters are keywords, the same for each.


def _split(operands, activation, has_bias):
    """x, w, bias or None, saved or None, and the rest."""
    x, w, *rest = operands
    bias = rest.pop(0) if has_bias else None
    saved = rest.pop(0) if Epilogue(has_bias, activation).saved else None
    return x, w, bias, saved, rest


def add_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """``y + bias`` along the last axis, split as y is."""
    if bias is None:
        return y
    place = sharding.explicit(jax.typeof(y))
    if place is not None:  # where the bias lies may be where y has its time or its batch
        channels = sharding.entries(jax.typeof(y))[-1]
        bias = jax.sharding.reshard(bias, place.update(spec=P(channels)))
    return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)


def _forward(x, w, bias=None, *, activation, has_bias, keep, **conv):
    z = primitives.conv1d(x, w, **conv, out_sharding=place_of_y(x, w, bias, conv["spec"]))
    return _finish(z, bias, activation, keep)


def _finish(z, bias, activation, keep):
    """What follows the sum over taps and channels."""
    z = add_bias(z, None if bias is None else bias.astype(z.dtype))
    y = activate(z, activation)
    return [y, z] if keep else [y]


def _tangent(*operands, activation, has_bias, wanted, **conv):
    x, w, bias, saved, tangents = _split(operands, activation, has_bias)
    place = place_of_y(x, w, bias, conv["spec"])
    tangents = iter(tangents)
    terms = []
    if wanted[0]:
        terms.append(primitives.conv1d(next(tangents), w, **conv, out_sharding=place))
    if wanted[1]:
        terms.append(primitives.conv1d(x, next(tangents), **conv, out_sharding=place))
    dz = functools.reduce(jnp.add, terms) if terms else None
    if wanted[2]:
        db = next(tangents).astype(conv["out_dtype"])
        shape = (*x.shape[:-2], conv["spec"].out_time, w.shape[-1])
        dz = (
            lax.broadcast_in_dim(db, shape, (len(shape) - 1,), out_sharding=place)
            if dz is None
            else add_bias(dz, db)
        )
    return [times_derivative(dz, saved, activation)]


def place_of_y(x, w, bias, spec):
    """The sharding of y on a mesh with explicit axes, else None."""
    types = [jax.typeof(a) for a in (x, w, bias) if a is not None]
    place = fused_sharding.of_y(*types, spec=spec)
    return place if place.mesh.explicit_axes else None


def _backward(*operands, activation, has_bias, wanted, time=halo.UNSPLIT, **conv):
    x, w, bias, saved, (gy,) = _split(operands, activation, has_bias)
    gz = times_derivative(gy, saved, activation)
    grads = []
    spec = conv.pop("spec")
    if wanted[0]:
        grads.append(time.run("conv1d_input_grad", _input_grad(x, conv), gz, w, spec))
    if wanted[1]:
        grads.append(time.run("conv1d_kernel_grad", _kernel_grad(w, conv), x, gz, spec))
    if wanted[2]:
        db = jnp.sum(gz, axis=tuple(range(gz.ndim - 1))).astype(bias.dtype)
        place = sharding.explicit(jax.typeof(bias))
        grads.append(db if place is None else jax.sharding.reshard(db, place))
    return grads


def _input_grad(x, conv):
    """``(g, w, spec) -> dx``."""
    more = conv | _type_of(x)
    return lambda g, w, spec: primitives.conv1d_input_grad(g, w, spec=spec, **more)


def _kernel_grad(w, conv):
    """``(x, g, spec) -> dw``."""
    more = conv | _type_of(w)
    return lambda x, g, spec: primitives.conv1d_kernel_grad(x, g, spec=spec, **more)


def _type_of(a):
    """A gradient has the dtype of its operand, and on a mesh with explicit axes its sharding."""
    return dict(out_dtype=a.dtype, out_sharding=sharding.explicit(jax.typeof(a)))


# --- Lowering: a kernel that fuses, or the composition ---


def _rows(a):
    """All batch axes as one."""
    return a.reshape(math.prod(a.shape[:-2]), *a.shape[-2:])


def _forward_local(x, w, bias=None, *, on, spec, time=halo.UNSPLIT, psum=(), **params):
    """A device's share where time is split as ``time`` says.

    ``on`` is that of `lowering.lower`; ``psum`` are the mesh axes over which z is a sum, but for
    its bias.
    """
    if psum:
        return _forward_of_sum(x, w, bias, spec=spec, time=time, psum=psum, **params)
    compute = lambda x, w, spec: _forward_alone(x, w, bias, on, spec=spec, **params)  # noqa: E731
    return time.run("conv1d", compute, x, w, spec)


def _forward_of_sum(x, w, bias, *, activation, has_bias, keep, spec, time, psum, **conv):
    compute = lambda x, w, spec: primitives.conv1d(x, w, spec=spec, **conv)  # noqa: E731
    z = sharding.all_reduce(time.run("conv1d", compute, x, w, spec), psum)
    return _finish(z, bias, activation, keep)


def _forward_alone(x, w, bias, on, *, activation, has_bias, keep, **conv):
    def composed():
        return _forward(x, w, bias, activation=activation, has_bias=has_bias, keep=keep, **conv)

    problem = problem_of("conv1d", x, w, conv["spec"], conv["precision"], conv["out_dtype"], **on)
    if problem.empty:
        return composed()
    kernel = dispatch.select(problem, conv["implementation"])
    live = taps.some(w, conv["spec"].live_taps)  # as the problem has it

    def run(activation, keep=False):
        this = dispatch.fused(kernel, problem, Epilogue(has_bias, activation, keep))
        if this is None or (keep and not kernel.keeps(this)):
            return None
        shape = (*x.shape[:-2], *problem.y_shape[1:])
        out = kernel.fused(this, _rows(x), live, bias)
        for a in out if keep else [out]:
            dispatch.check(kernel, "fused", this, a)
        return jax.tree.map(lambda a: a.reshape(shape), out)

    if not keep:
        y = run(activation)
        return composed() if y is None else [y]
    epilogue = Epilogue(has_bias, activation)
    found = dispatch.backward(problem, epilogue, conv["implementation"], (True, True, has_bias))
    recomputed = found is not None and found[0].recomputes(found[1])
    if not recomputed and (both := run(activation, keep=True)) is not None:
        return [*both]
    z = run(None)
    if z is None:
        return composed()
    if recomputed and (y := run(activation)) is not None:
        return [y, z]  # unless time is split nobody reads z, and XLA drops what makes it
    return [activate(z, activation), z]


def _backward_local(
    *operands, on, activation, has_bias, wanted, spec, time=halo.UNSPLIT, whole=True, **conv
):
    """``on`` as in `_forward_local`; ``whole``: whether x has all channels that z is a sum over."""
    x, w, bias, saved, (gy,) = _split(operands, activation, has_bias)
    found, own = None, time.own(spec)
    if whole and own is not None:
        problem = problem_of("conv1d", x, w, own, conv["precision"], conv["out_dtype"], **on)
        epilogue = Epilogue(has_bias, activation)
        if not problem.empty:
            found = dispatch.backward(problem, epilogue, conv["implementation"], wanted)
    # What a kernel would compute anew of z is wrong where x ends and the sequence does not.
    if found is None or (time.shards > 1 and found[0].recomputes(found[1])):
        these = dict(activation=activation, has_bias=has_bias, wanted=wanted, time=time)
        return _backward(*operands, spec=spec, **these, **conv)
    kernel, problem = found
    live, saved_rows = own.live_taps, None if saved is None else _rows(saved)
    dx, dw, db = kernel.backward(
        problem, _rows(x), taps.some(w, live), bias, saved_rows, _rows(gy), wanted
    )
    grads = []
    derivative = functools.partial(times_derivative, activation=activation)
    gz = halo.steps(gy, saved, of=derivative)
    if wanted[0]:
        dispatch.check(kernel, "backward", problem.gradient("conv1d_input_grad"), dx)
        dx = dx.reshape(x.shape)
        dx = time.mend("conv1d_input_grad", _input_grad(x, conv), dx, gz, w, own)
        grads.append(dx)
    if wanted[1]:
        dispatch.check(kernel, "backward", problem.gradient("conv1d_kernel_grad"), dw)
        dw = taps.among(dw, live, w.shape[0])
        dw = time.mend("conv1d_kernel_grad", _kernel_grad(w, conv), dw, halo.steps(x), gz, own)
        grads.append(dw)
    if wanted[2]:
        dispatch.check(kernel, "backward", problem, db, bias.shape, db.dtype)
        grads.append(db.astype(bias.dtype))
    return grads


def _lower_composed(ctx, *operands, platform, composed, **params):
    # The three operations split themselves where there are several devices, and XLA the rest.
    return lowering.lower_function(ctx, functools.partial(composed, **params), operands)


# --- Differentiation ---


def _derivative_of_composition(composed):
    def rule(primals, tangents, **params):
        live = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

        def f(*values):
            operands = list(primals)
            for i, value in zip(live, values, strict=True):
                operands[i] = value
            return composed(*operands, **params)

        return jax.jvp(f, [primals[i] for i in live], [tangents[i] for i in live])

    return rule


def _series_of_composition(composed):
    def rule(primals, series, **params):
        f = functools.partial(composed, **params)
        return jet.jet(f, primals, series, factorial_scaled=False)

    return rule


def _transpose_of_composition(composed):
    def rule(cts, *operands, **params):
        asked = [i for i, a in enumerate(operands) if ad.is_undefined_primal(a)]

        def f(*values):
            given = list(operands)
            for i, value in zip(asked, values, strict=True):
                given[i] = value
            return composed(*given, **params)

        types = [operands[i].aval for i in asked]
        cts = [ad.instantiate_zeros(ct) for ct in cts]
        grads = dict(zip(asked, jax.linear_transpose(f, *types)(cts), strict=True))
        return [grads.get(i) for i in range(len(operands))]

    return rule


def _forward_jvp(primals, tangents, *, keep, **params):
    if keep:  # the derivative of a derivative
        return _derivative_of_composition(_forward)(primals, tangents, keep=keep, **params)
    saved = Epilogue(params["has_bias"], params["activation"]).saved
    y, *z = _bind("conv1d_fused", *primals, keep=saved == "z", **params)
    residual = {"y": [y], "z": z, None: []}[saved]
    wanted = tuple(type(t) is not ad.Zero for t in tangents) + (False,) * (3 - len(tangents))
    live = [t for t in tangents if type(t) is not ad.Zero]
    if params["activation"] is None and len(live) == 1:
        # One of the three operations, or a sum, and no kernel has more to carry. Each of them keeps
        # what it reads alone: with a kernel that is not trained no x.
        return [y], _tangent(*primals, *live, wanted=wanted, **params)
    (dy,) = _bind("conv1d_fused_tangent", *primals, *residual, *live, wanted=wanted, **params)
    return [y], [dy]


def _tangent_transpose(cts, *operands, wanted, **params):
    first = len(operands) - sum(wanted)
    constants, tangents = operands[:first], operands[first:]
    if any(map(ad.is_undefined_primal, constants)):  # it is linear in x and in w as well
        compose = _transpose_of_composition(_tangent)
        return compose(cts, *operands, wanted=wanted, **params)
    asked = iter([ad.is_undefined_primal(t) for t in tangents])
    still = tuple(there and next(asked) for there in wanted)
    (ct,) = map(ad.instantiate_zeros, cts)
    if 0 in ct.shape:
        return [None] * len(operands)  # zeros; XLA compiles no `jax.shard_map` that reads nothing
    grads = iter(_bind("conv1d_fused_backward", *constants, ct, wanted=still, **params))
    return [next(grads) if ad.is_undefined_primal(a) else None for a in operands]


# --- Dead code ---
# A kernel call is all or nothing to XLA, so that what nobody reads has to go before.


def _forward_dce(used, *rest):
    eqn = rest[-1]  # jax 0.12 and newer say before it which operands are alive
    if not any(used):
        return [False] * len(eqn.invars), None
    if eqn.params["keep"] and not all(used):
        params = eqn.params | dict(keep=False)
        if not used[0]:
            params["activation"] = None  # z alone
        eqn = eqn.replace(
            params=params, outvars=[v for v, u in zip(eqn.outvars, used, strict=True) if u]
        )
    return [True] * len(eqn.invars), eqn


def _backward_dce(used, *rest):
    eqn = rest[-1]
    if not any(used):
        return [False] * len(eqn.invars), None
    read = iter(used)
    wanted = tuple(there and next(read) for there in eqn.params["wanted"])
    outvars = [v for v, u in zip(eqn.outvars, used, strict=True) if u]
    eqn = eqn.replace(params=eqn.params | dict(wanted=wanted), outvars=outvars)
    return [True] * len(eqn.invars), eqn


# --- Batching ---


def _batching(name, composed, shared, axis_data, args, dims, **params):
    """What is shared by the whole batch stays; an axis of anything else is one more batch axis."""
    if all(d is None for d in dims):
        outs = _bind(name, *args, **params)
        return outs, [None] * len(outs)
    once = shared(len(args), **params)
    if all(dims[i] is None for i in once) and axis_data.explicit_mesh_axis is None:
        args = [
            a if i in once else batching.bdim_at_front(a, d, axis_data.size)
            for i, (a, d) in enumerate(zip(args, dims, strict=True))
        ]
        outs = _bind(name, *args, **params)
    else:
        mapped = jax.vmap(
            functools.partial(composed, **params), in_axes=tuple(dims), axis_size=axis_data.size,
            spmd_axis_name=axis_data.spmd_name,
        )  # fmt: skip
        outs = mapped(*args)
    return outs, [0] * len(outs)


def _shared_forward(count, **_):
    return range(1, count)  # w and bias


def _shared_tangent(count, *, activation, has_bias, wanted, **_):
    first = 2 + has_bias + bool(Epilogue(has_bias, activation).saved) + wanted[0]
    return (*range(1, 2 + has_bias), *range(first, count))


def _shared_backward(count, *, has_bias, wanted, **_):
    # The gradients of w and bias of each member of the batch are not one sum over all.
    return range(1, 2 + has_bias) if not (wanted[1] or wanted[2]) else range(count)


# --- The primitives ---


def _results_forward(x, w, *_, spec, out_dtype, keep, **__):
    y = jax.ShapeDtypeStruct((*x.shape[:-2], spec.out_time, w.shape[-1]), out_dtype)
    return [y, y] if keep else [y]


def _results_tangent(x, w, *_, **params):
    return _results_forward(x, w, keep=False, **params)


def _results_backward(x, w, *rest, wanted, **_):
    like = (x, w, rest[0])  # rest[0] is the bias wherever its gradient is wanted
    return [a for a, there in zip(like, wanted, strict=True) if there]


def _like_y(results, *avals, spec, has_bias, **_):
    return [fused_sharding.of_y(*avals[: 2 + has_bias], spec=spec)] * len(results)


def _like_operands(results, *_, **__):
    return [r.sharding for r in results]


def _make(name, *, results, places, composed, shared, lower, asks):
    """A primitive.

    Args:
      results: of the operands' types the results', or what has their shapes and dtypes.
      places: of these and the operands' types the results' shardings on explicit axes.
      composed: what it means.
      shared: of the number of operands, which of them all members of a batch have in common.
      lower, asks: the lowering rule, and as in `lowering.register`.
    """
    p = Primitive(name)
    p.multiple_results = True
    p.def_impl(functools.partial(xla.apply_primitive, p))

    def each(field):
        return lambda *avals, **params: [getattr(r, field) for r in results(*avals, **params)]

    def shardings(*avals, **params):
        return places(results(*avals, **params), *avals, **params)

    def vma(*avals, **params):
        return [jax_core.standard_vma_rule(name, *avals)] * len(results(*avals, **params))

    weak = lambda *_, **__: False  # noqa: E731
    # None, None: no rule of unreduced axes, nor of layouts.
    rules = each("shape"), each("dtype"), weak, shardings, vma, None, None
    p.def_abstract_eval(functools.partial(lax_utils.standard_multi_result_abstract_eval, p, *rules))
    ad.primitive_jvps[p] = _derivative_of_composition(composed)
    ad.primitive_transposes[p] = _transpose_of_composition(composed)
    jet.jet_rules[p] = _series_of_composition(composed)
    batching.fancy_primitive_batchers[p] = functools.partial(_batching, name, composed, shared)
    lowering.register(p, lower, asks=asks)
    checkify.error_checks[p] = functools.partial(checkify.nan_error_check, p)
    return p


def _family(*, asks: bool):
    """The three primitives by name."""
    forward = _make(
        "conv1d_fused", results=_results_forward, places=_like_y, composed=_forward,
        shared=_shared_forward, asks=asks,
        lower=functools.partial(
            lowering.lower, local=_forward_local, split=fused_sharding.Forward.of
        ),
    )  # fmt: skip
    tangent = _make(
        "conv1d_fused_tangent", results=_results_tangent, places=_like_y, composed=_tangent,
        shared=_shared_tangent, asks=asks,
        lower=functools.partial(_lower_composed, composed=_tangent),
    )  # fmt: skip
    backward = _make(
        "conv1d_fused_backward", results=_results_backward, places=_like_operands,
        composed=_backward, shared=_shared_backward, asks=asks,
        lower=functools.partial(
            lowering.lower, local=_backward_local, split=fused_sharding.Backward.of
        ),
    )  # fmt: skip
    ad.primitive_jvps[forward] = _forward_jvp
    ad.primitive_transposes[tangent] = _tangent_transpose
    pe.dce_rules[forward] = _forward_dce
    pe.dce_rules[backward] = _backward_dce
    return {p.name: p for p in (forward, tangent, backward)}


PRIMITIVES, BY_TYPES = _family(asks=True), _family(asks=False)  # as those of `primitives`


def _bind(name, *operands, **params):
    operands = jax_core.auto_insert_reshard(*operands)
    family = BY_TYPES if lowering.split_by_types(operands) else PRIMITIVES
    return family[name].bind(*operands, **params)


def conv1d(
    x, w, bias, spec: ConvSpec, *, activation: str | None, precision, out_dtype, implementation
):
    """``activation(conv1d(x, w) + bias)``; see `primitives.conv1d`.

    Args:
      bias: ``(O,)``, or None.
      activation: a name of `FUNCTIONS`, or None.

    Returns:
      y ``(*batch, T', O)`` of ``out_dtype``.
    """
    conv = dict(
        spec=spec, precision=precision, out_dtype=np.dtype(out_dtype), implementation=implementation
    )
    operands = (x, w) if bias is None else (x, w, bias)
    (y,) = _bind(
        "conv1d_fused",
        *operands,
        activation=activation,
        has_bias=bias is not None,
        keep=False,
        **conv,
    )
    return y
