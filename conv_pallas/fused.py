"""A convolution with its bias and activation as one operation, where a kernel can carry them.

    z = conv1d(x, w) + bias      y = activation(z)

is bound by memory more often than not, and whatever XLA does to the result of a custom call is
one more pass over it. So three more primitives stand one level above those of `primitives`, a
family of `composed`:

    conv1d_fused           x, w, bias -> y                 (and z, where its derivative needs it)
    conv1d_fused_tangent   dx, dw, dbias -> dy             linear; no kernel fuses it
    conv1d_fused_backward  dy -> dx, dw, dbias             its transpose

Their compositions are of the three operations and of what stands here as JAX code.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from conv_pallas import dispatch, fused_sharding, halo, lowering, primitives, sharding, taps
from conv_pallas.activations import activate, times_derivative
from conv_pallas.composed import Family, Member, derivative, live_tangents, rows
from conv_pallas.spec import ConvSpec, Epilogue, problem_of

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
    return finish(z, bias, activation, keep)


def finish(z, bias, activation, keep=False) -> list[jax.Array]:
    """What follows the sum over taps and channels: y, and z if ``keep``."""
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
    return finish(z, bias, activation, keep)


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
        out = kernel.fused(this, rows(x), live, bias)
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
    live, saved_rows = own.live_taps, None if saved is None else rows(saved)
    dx, dw, db = kernel.backward(
        problem, rows(x), taps.some(w, live), bias, saved_rows, rows(gy), wanted
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


# --- Differentiation ---


def _forward_jvp(primals, tangents, *, keep, **params):
    if keep:  # the derivative of a derivative
        return derivative(_forward)(primals, tangents, keep=keep, **params)
    saved = Epilogue(params["has_bias"], params["activation"]).saved
    y, *z = FAMILY.bind("", *primals, keep=saved == "z", **params)
    residual = {"y": [y], "z": z, None: []}[saved]
    wanted, live = live_tangents(tangents)
    if params["activation"] is None and len(live) == 1:
        # One of the three operations, or a sum, and no kernel has more to carry. Each of them keeps
        # what it reads alone: with a kernel that is not trained no x.
        return [y], _tangent(*primals, *live, wanted=wanted, **params)
    return [y], FAMILY.bind("_tangent", *primals, *residual, *live, wanted=wanted, **params)


def _forward_dce(used, *rest):
    eqn = rest[-1]  # as in `composed`
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


# --- What is shared by a batch ---


def _shared_forward(count, **_):
    return range(1, count)  # w and bias


def _shared_tangent(count, *, activation, has_bias, wanted, **_):
    first = 2 + has_bias + bool(Epilogue(has_bias, activation).saved) + wanted[0]
    return (*range(1, 2 + has_bias), *range(first, count))


def _shared_backward(count, *, has_bias, wanted, **_):
    # The gradients of w and bias of each member of the batch are not one sum over all.
    return range(1, 2 + has_bias) if not (wanted[1] or wanted[2]) else range(count)


# --- The primitives ---

_lower = functools.partial(functools.partial, lowering.lower)
FAMILY = Family(
    "conv1d_fused",
    Member(
        _forward, _shared_forward, _lower(local=_forward_local, split=fused_sharding.Forward.of)
    ),
    Member(_tangent, _shared_tangent),
    Member(
        _backward, _shared_backward, _lower(local=_backward_local, split=fused_sharding.Backward.of)
    ),
    jvp=_forward_jvp,
    dce=_forward_dce,
)


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
    (y,) = FAMILY.bind(
        "",
        *operands,
        activation=activation,
        has_bias=bias is not None,
        keep=False,
        **conv,
    )
    return y
