"""A convolution of packed sequences, with its bias and activation, as one operation.

    z[t] = bias + sum over the taps k that output t sees of  x[t + k*D - low] * w[k]
    y = activation(z)

An output sees the taps that lie in its own sequence (see `segments`). A kernel is given that as one
number for each output, with a bit for each tap, and moves hardly more than without ids. Where none
takes it, what the taps see is written side by side, for one pointwise convolution; of a depthwise
layer each tap is a convolution of its own. What of that is large is not kept for the gradients:
backward makes it anew, from x and the ids.

The primitives are a family of `composed`: conv1d_packed, conv1d_packed_tangent and
conv1d_packed_backward. Beside x, w and bias they take the ids ``(*batch, T)`` int32.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad
from jax.sharding import PartitionSpec as P

from conv_pallas import (
    dispatch,
    fused,
    fused_sharding,
    halo,
    lowering,
    primitives,
    segments,
    sharding,
    taps,
)
from conv_pallas.activations import activate, times_derivative
from conv_pallas.composed import Family, Member, live_tangents, of_some, rows, transpose
from conv_pallas.spec import OPERATIONS, ConvSpec, Epilogue, problem_of

# --- The compositions ---


def sum_of_taps(
    seen: Sequence[Callable[[], jax.Array]], kernel, bias, *, convolve, activation, out_dtype
) -> jax.Array:
    """``activation(the sum of what each tap gives, + bias)``, rounded once to ``out_dtype``.

    Args:
      seen: of each tap a function without arguments, of what it sees: ``(*batch, T, C)``.
      kernel: ``(K, 1, O)``.
      bias: ``(O,)`` or None.
      convolve: ``convolve(x, w, dtype) -> y``, of one tap.
      activation: a name, or None.
    """
    wide = _wide(out_dtype)
    each = zip(seen, segments.one_by_one(kernel), strict=True)
    y = functools.reduce(jnp.add, (convolve(see(), w, wide) for see, w in each))
    y = fused.add_bias(y, None if bias is None else bias.astype(wide))
    return activate(y, activation).astype(out_dtype)


def _wide(dtype) -> np.dtype:
    """What is summed in where that is the dtype of the result."""
    short = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return np.dtype(np.float32) if short else dtype


def _split(operands, has_bias: bool):
    """x, w, bias or None, the ids, and what else there is."""
    x, w, *rest = operands
    bias = rest.pop(0) if has_bias else None
    return x, w, bias, rest[0], rest[1:]


def _forward(*operands, spec: ConvSpec, activation, has_bias, out_dtype, time=halo.UNSPLIT, **conv):
    x, w, bias, ids, _ = _split(operands, has_bias)
    seen, tap = segments.separate(x, ids, spec, time), _tap(x, spec)
    if segments.apart(w, spec.groups):

        def convolve(x, w, dtype):
            return primitives.conv1d(x, w, spec=tap, out_dtype=dtype, **conv)

        given = dict(convolve=convolve, activation=activation, out_dtype=out_dtype)
        y = sum_of_taps(seen, w, bias, **given)
    else:
        joined, pointwise = segments.side_by_side([see() for see in seen], w, spec.groups)
        more = conv | dict(spec=tap, out_dtype=out_dtype)
        if bias is None and activation is None:
            y = primitives.conv1d(joined, pointwise, **more)
        else:
            y = fused.conv1d(joined, pointwise, bias, activation=activation, **more)
    place = fused.place_of_y(x, w, bias, spec)
    return [y if place is None else jax.sharding.reshard(y, place)]


def _tap(x, spec: ConvSpec) -> ConvSpec:
    """The geometry of one tap."""
    return ConvSpec(x.shape[-2], 1, groups=spec.groups)


def _tangent(*operands, wanted, has_bias, **params):
    primals, tangents = operands[: 3 + has_bias], operands[3 + has_bias :]
    at = [i for i, there in enumerate(wanted) if there]
    f = of_some(_forward, primals, at, params | dict(has_bias=has_bias))
    return jax.jvp(f, [primals[i] for i in at], list(tangents))[1]


def _backward(
    *operands, wanted, activation, has_bias, out_dtype, spec, time=halo.UNSPLIT,
    stay=lambda a: a, **conv,
):  # fmt: skip
    """Written out, and not the transpose of `_forward`, of which XLA would hold each tap's part.

    Args:
      stay: what keeps XLA from computing an array anew wherever it is read.
    """
    x, w, bias, ids, (gz,) = _split(operands, has_bias)
    if activation is not None:
        given = dict(spec=spec, has_bias=has_bias, time=time, out_dtype=_wide(out_dtype))
        (z,) = _forward(*operands[:-1], activation=None, **given, **conv)
        saved = activate(z, activation) if Epilogue(activation=activation).saved == "y" else z
        gz = stay(times_derivative(gz, saved, activation))
    grads = []
    if wanted[0]:
        # An output that sees a step is seen from there: it is the convolution of gz, mirrored.
        given = dict(spec=spec.transposed(), has_bias=False, out_dtype=x.dtype, time=time)
        (dx,) = _forward(gz, _turned(w, spec.groups), ids, activation=None, **given, **conv)
        grads.append(_placed(dx, jax.typeof(x)))
    if wanted[1]:
        more = conv | dict(spec=_tap(x, spec), out_dtype=w.dtype)
        seen = segments.separate(x, ids, spec, time)
        if segments.apart(w, spec.groups):
            each = [primitives.conv1d_kernel_grad(see(), gz, **more) for see in seen]
            dw = jnp.concatenate(each, -3)
        else:
            joined = segments.joined([see() for see in seen], spec.groups)
            dw = segments.taps_of(primitives.conv1d_kernel_grad(joined, gz, **more), w.shape[0])
        grads.append(_placed(dw, jax.typeof(w)))
    if wanted[2]:
        db = jnp.sum(gz, axis=tuple(range(gz.ndim - 1))).astype(bias.dtype)
        grads.append(_placed(db, jax.typeof(bias)))
    return grads


def _turned(w, groups: int) -> jax.Array:
    """`taps.flip`, wherever w lies: of groups it is one where no type can say how it is split."""
    if groups == 1 or w.shape[-2] == 1:
        return taps.flip(w, groups)
    return sharding.shard_by_xla(functools.partial(taps.flip, groups=groups), lambda _: P(), w)


def _placed(gradient, aval):
    """A gradient lies as its operand does, on a mesh with explicit axes."""
    place = sharding.explicit(aval)
    return gradient if place is None else jax.sharding.reshard(gradient, place)


# Of several kernels at once. What JAX then differentiates is not one of ours, and would keep, or
# hold at once, what each tap sees.


def _forward_mapped(*operands, **params):
    return jax.checkpoint(functools.partial(_forward, **params))(*operands)


def _backward_mapped(*operands, wanted, has_bias, **params):
    *primals, gy = operands
    at = [i for i, there in enumerate(wanted) if there]
    f = of_some(_forward_mapped, primals, at, params | dict(has_bias=has_bias))
    grads = jax.vjp(f, *(primals[i] for i in at))[1]([gy])
    return [_placed(g, jax.typeof(primals[i])) for g, i in zip(grads, at, strict=True)]


# --- Lowering: a kernel that takes bits, or the composition ---


def _forward_local(*operands, on, time=halo.UNSPLIT, psum=(), **params):
    """``on`` is that of `lowering.lower`; ``time`` says how a device's share is split.

    ``psum`` is as in `fused`: the mesh axes over which z is a sum, but for its bias.
    """
    if psum:
        x, w, bias, ids, _ = _split(operands, params["has_bias"])
        alone = params | dict(has_bias=False, activation=None)
        (z,) = _forward_local(x, w, ids, on=on, time=time, **alone)
        return fused.finish(sharding.all_reduce(z, psum), bias, params["activation"])
    found = _kernel(operands, on, time, ("conv1d",), **params)
    if found is None:
        (y,) = _forward(*operands, time=time, **params)
        # Else XLA:CPU computes all taps anew, number by number, where y is summed.
        return [lax.optimization_barrier(y)]
    kernel, problem = found
    x, w, bias, ids, _ = _split(operands, params["has_bias"])
    live = taps.some(w, params["spec"].live_taps)  # as the problem has it
    y = kernel.packed(problem, rows(x), live, bias, _bits(ids, problem))
    dispatch.check(kernel, "packed", problem, y)
    return [y.reshape(*x.shape[:-1], -1)]


def _backward_local(*operands, on, wanted, time=halo.UNSPLIT, whole=True, **params):
    # Of a layer whose channels in may be split there is no activation here, which would need z.
    asked = [name for name, there in zip(OPERATIONS[1:], wanted[:2], strict=True) if there]
    found = _kernel(operands, on, time, asked, **params)
    if found is None:
        # What is computed again here is not to be shared with the forward pass, which would have to
        # keep it.
        operands, stay = lax.optimization_barrier(operands), lax.optimization_barrier
        return _backward(*operands, wanted=wanted, time=time, stay=stay, **params)
    kernel, problem = found
    x, w, bias, ids, (gy,) = _split(operands, params["has_bias"])
    live = params["spec"].live_taps
    dx, dw, db = kernel.packed_backward(
        problem, rows(x), taps.some(w, live), bias, _bits(ids, problem), rows(gy), wanted
    )
    grads = []
    if wanted[0]:
        dispatch.check(kernel, "packed_backward", problem.gradient("conv1d_input_grad"), dx)
        grads.append(dx.reshape(x.shape))
    if wanted[1]:
        dispatch.check(kernel, "packed_backward", problem.gradient("conv1d_kernel_grad"), dw)
        grads.append(taps.among(dw, live, w.shape[0]))
    if wanted[2]:
        dispatch.check(kernel, "packed_backward", problem, db, bias.shape, db.dtype)
        grads.append(db.astype(bias.dtype))
    return grads


def _kernel(
    operands, on, time, operations, *, spec, activation, has_bias, precision, out_dtype,
    implementation,
):  # fmt: skip
    """The kernel and its problem; None: the composition, as where time is split over devices."""
    x, w = operands[:2]
    problem = problem_of("conv1d", x, w, spec, precision, out_dtype, **on)
    if time.shards > 1 or problem.empty:
        return None
    epilogue = Epilogue(has_bias, activation)
    return dispatch.packed(problem, epilogue, implementation, operations)


def _bits(ids, problem) -> jax.Array:
    return segments.bits(ids, problem.spec).reshape(problem.N, problem.spec.time)


# --- Differentiation ---


def _forward_jvp(primals, tangents, *, activation, **params):
    def convolve(activation):
        return FAMILY.bind("", *primals, activation=activation, **params)

    if activation is None or segments.apart(primals[1], params["spec"].groups):
        return convolve(activation), _pushed(primals, tangents, activation=activation, **params)
    # What a sum of many products is takes too long to be made anew by backward.
    if Epilogue(activation=activation).saved == "y":
        (y,) = (saved,) = convolve(activation)
    else:
        (saved,) = convolve(None)
        y = activate(saved, activation)
    (dz,) = _pushed(primals, tangents, activation=None, **params)
    times = functools.partial(times_derivative, activation=activation)
    # That alone is kept, and none of what a derivative is computed from on the way.
    return [y], [jax.checkpoint(times, prevent_cse=False)(dz, saved)]


def _pushed(primals, tangents, **params):
    """The tangent of y."""
    wanted, live = live_tangents(tangents)
    if wanted == (True, False, False) and _is_own_transpose(*primals, **params):
        # Of a kernel that is not trained, which keeps no x.
        w, ids = primals[1], primals[-1]
        return FAMILY.bind("", *live, w, ids, **params | dict(has_bias=False))
    return FAMILY.bind("_tangent", *primals, *live, wanted=wanted, **params)


def _is_own_transpose(x, w, *_, spec, activation, **__) -> bool:
    """Whether it is linear in x but for a bias, and its transpose one that a kernel may take."""
    return activation is None and (w.shape[-1] == x.shape[-1] or not segments.apart(w, spec.groups))


def _forward_transpose(cts, x, w, *rest, spec, has_bias, **params):
    given = dict(spec=spec, has_bias=has_bias, **params)
    of_x = ad.is_undefined_primal(x) and not ad.is_undefined_primal(w)
    if has_bias or not of_x or not _is_own_transpose(x.aval, w, **given):
        return transpose(_forward)(cts, x, w, *rest, **given)
    (ct,) = map(ad.instantiate_zeros, cts)
    if 0 in ct.shape:
        return [None] * 3
    given |= dict(spec=spec.transposed(), out_dtype=x.aval.dtype)
    (dx,) = FAMILY.bind("", ct, _turned(w, spec.groups), *rest, **given)
    return [_placed(dx, x.aval), None, None]


# --- What is shared by a batch ---


def _shared_forward(count, *, has_bias, **_):
    return range(1, 2 + has_bias)  # w and bias


def _shared_tangent(count, *, has_bias, wanted, **_):
    return (*range(1, 2 + has_bias), *range(3 + has_bias + wanted[0], count))


def _shared_backward(count, *, has_bias, wanted, **_):
    # The gradients of w and bias of each member of the batch are not one sum over all.
    return range(1, 2 + has_bias) if not (wanted[1] or wanted[2]) else range(count)


# --- The primitives ---


def _lower(local: Callable, split: Callable) -> Callable:
    return functools.partial(
        lowering.lower, local=local, split=functools.partial(split, packed=True)
    )


FAMILY = Family(
    "conv1d_packed",
    Member(
        _forward,
        _shared_forward,
        _lower(_forward_local, fused_sharding.Forward.of),
        _forward_mapped,
    ),
    Member(_tangent, _shared_tangent),
    Member(
        _backward,
        _shared_backward,
        _lower(_backward_local, fused_sharding.Backward.of),
        _backward_mapped,
    ),
    jvp=_forward_jvp,
    transpose_forward=_forward_transpose,
)


def conv1d(
    x, w, bias, ids, spec: ConvSpec, *, activation: str | None, precision, out_dtype, implementation
):
    """``activation(conv1d(x, w) + bias)`` of packed sequences.

    Args:
      x: ``(*batch, T, C)``.
      w: ``(K, C // G, O)``.
      bias: ``(O,)``, or None.
      ids: ``(*batch, T)`` int32.
      spec: with one output for each step; see `segments.check_packed`.
      activation: a name of `FUNCTIONS`, or None.

    Returns:
      y ``(*batch, T, O)`` of ``out_dtype``.
    """
    operands = (x, w, ids) if bias is None else (x, w, bias, ids)
    (y,) = FAMILY.bind(
        "",
        *operands,
        spec=spec,
        activation=activation,
        has_bias=bias is not None,
        precision=precision,
        out_dtype=np.dtype(out_dtype),
        implementation=implementation,
    )
    return y
