"""The functional API: `conv1d` and `conv_general_dilated`."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lax import lax as lax_internal
from jax._src.sharding_impls import canonicalize_sharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from conv_pallas import dispatch, fused, halo, packed, primitives, segments, sharding
from conv_pallas.activations import FUNCTIONS, activate
from conv_pallas.dispatch import Implementation
from conv_pallas.spec import ConvSpec, UnknownPaddingError, make_spec, problem_of


def conv1d(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    strides: int | Sequence[int] | None = 1,
    padding: str | int | Sequence[int | tuple[int, int]] = "CAUSAL",
    input_dilation: int | Sequence[int] | None = 1,
    kernel_dilation: int | Sequence[int] | None = 1,
    feature_group_count: int = 1,
    activation: str | Callable[[jax.Array], jax.Array] | None = None,
    mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    implementation: Implementation = None,
) -> jax.Array:
    """1-D convolution over the time axis of channels-last arrays.

    Computes ``activation(conv(x, kernel) + bias)`` with

        conv(x, kernel)[..., u, o] =
            sum over k, c of  x[..., u * S + k * D - low, c] * kernel[k, c, o]

    where x is zero outside its ``T`` steps (cross-correlation, as in `jax.lax`).
    Differentiable to any order in forward and reverse mode.

    Args:
      x: ``(*batch, T, C)``, any number of batch axes, none included.
      kernel: ``(K, C // feature_group_count, O)``.
      bias: ``(O,)`` or None.
      strides: ``S``, steps of x from one output to the next; 1 or more.
      padding: ``"CAUSAL"`` (output ``t`` sees inputs up to ``t``), ``"SAME"``,
        ``"SAME_LOWER"``, ``"VALID"``, ``"CIRCULAR"``, ``"REFLECT"`` (any case), an int,
        ``[int]`` or ``[(low, high)]``; negative amounts crop.
      input_dilation: ``E``, puts ``E - 1`` zeros between the steps of x; 1 or more. Only with
        padding in numbers.
      kernel_dilation: ``D``, steps of x from one tap to the next; 1 or more.
      feature_group_count: ``G``, splits the channels into groups that do not mix; ``G = C``
        is a depthwise convolution.
      activation: one of ``"relu"``, ``"gelu"`` (tanh approximation), ``"gelu_exact"``,
        ``"silu"``, ``"tanh"``, ``"sigmoid"``, a callable, or None. In kernels for TPUs the sigmoid
        is within 2e-7 of its value, and so 0 far below zero.
      mask: ``(*batch, T)`` bool, False for padding, which then counts as zeros: no other
        output and no gradient depends on what it holds, NaN included.
      segment_ids: ``(*batch, T)`` integers, of which the low 32 bits count; where they change a
        new sequence begins, and no output sees another sequence than its own. Only where there is
        one output for each step (stride 1, padding CAUSAL, SAME or as many zeros). Of more than 31
        taps, and where no kernel takes them, a layer that is not depthwise has K times x in memory
        while it runs.
      axis_name: for use inside `jax.shard_map`: the mesh axis over which time is split, or
        several of them, the one that varies slowest first. x, mask, segment_ids and the result are
        then one device's parts of a sequence that goes on from device to device, and each gets
        from the others the steps that its outputs see; None: they are whole sequences. There have
        to be as many outputs as inputs, or a fixed ratio of them, on each device.
      precision: as in `jax.lax.conv_general_dilated`. With any, ``"default"`` too, there is no
        minimal filtering on a CPU: weights of zero then let nothing through, not even rounding.
      preferred_element_type: dtype of the convolution's result, not narrower than the
        operands'; bias and activation are applied to it.
      out_sharding: how the result is sharded on a mesh with explicit axes; as in
        `jax.lax.conv_general_dilated`.
      implementation: None picks the fastest known; a name of ``"triton"``,
        ``"pallas_tpu"``, ``"onednn"``, ``"xla"``, ``"xla_native"`` is an order; a sequence of
        names is tried in order. The environment variable ``CONV_PALLAS_IMPLEMENTATION`` stands
        in for None.

    Returns:
      ``(*batch, T', O)`` of `preferred_element_type`, or of the dtype that x, kernel and
      bias promote to (integers and booleans to float32). A bias of bfloat16 with a preferred
      float16, or the other way round, gives float32, as in `flax.nnx.Conv`.

    Raises:
      ValueError: a shape, stride, group count, padding, activation, mask, segment_ids,
        precision, implementation or axis_name is not as above.
      TypeError: a dilation is not positive, a number is none, x or kernel is None, or
        `preferred_element_type` does not fit.
      NotImplementedError: `implementation` was ordered and can't do this; says why.
    """
    for name, array in (("x", x), ("kernel", kernel)):
        if array is None:
            raise TypeError(f"{name} must be an array, got None")
    if mask is not None:  # before anything looks at what padding holds
        x = segments.hide(x, mask)
    x, kernel, bias = (None if a is None else jnp.asarray(a) for a in (x, kernel, bias))
    dtype = promoted_dtype(x, kernel, *([] if bias is None else [bias]))
    return convolve(
        *(None if a is None else a.astype(dtype) for a in (x, kernel, bias)),
        strides=strides,
        padding=padding,
        input_dilation=input_dilation,
        kernel_dilation=kernel_dilation,
        feature_group_count=feature_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
        implementation=implementation,
        activation=activation,
        segment_ids=segment_ids,
        axis_name=axis_name,
    )


def convolve(
    x,
    kernel,
    bias,
    *,
    padding,
    precision,
    preferred_element_type,
    out_sharding,
    implementation,
    activation=None,
    segment_ids=None,
    axis_name=None,
    **geometry,
):
    """`conv1d` of operands that are promoted as they are to be, and x without what is masked."""
    activation_function(activation)
    if x.dtype != kernel.dtype:
        raise TypeError(f"x and kernel must have the same dtype, got {x.dtype} and {kernel.dtype}")
    time = halo.UNSPLIT if axis_name is None else halo.TimeSplit.inside(axis_name)
    spec, mode = make_spec(time.whole(x.shape), kernel.shape, padding=padding, **geometry)
    if axis_name is not None:
        _check_splits(time, spec, mode, axis_name)
    check_bias(bias, kernel)
    if segment_ids is not None:
        how = dict(
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
            implementation=implementation,
            activation=activation,
        )
        ids = segments.check_packed(x, segment_ids, spec, mode)
        chain = dispatch.canonicalize(implementation)
        stock = is_stock(chain) or lax_reason(x.dtype, 1)
        if stock or axis_name is not None:
            seen = segments.separate(x, ids, spec, time)
            return convolve_taps(seen, kernel, bias, feature_group_count=spec.groups, **how)
        if segments.crosses(spec):
            return _convolve_packed(x, kernel, bias, ids, spec, **how | dict(implementation=chain))
    place = None
    if mode is not None:
        x, place = _pad_in_memory(x, kernel, bias, mode, spec)
    convolution = functools.partial(
        _convolve,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
        chain=dispatch.canonicalize(implementation),
        pad_first=isinstance(padding, str) and padding.upper() == "CAUSAL" and axis_name is None,
        bias=bias,
        activation=activation if isinstance(activation, str) else None,
    )
    y = time.run("conv1d", convolution, x, kernel, spec)
    if place is not None and out_sharding is None:
        y = jax.sharding.reshard(y, place)
    return activation(y) if callable(activation) else y


def _convolve_packed(
    x, kernel, bias, ids, spec, *, precision, preferred_element_type, out_sharding, implementation,
    activation,
):  # fmt: skip
    """A layer of packed sequences."""
    out_dtype, chain = result_dtype(x.dtype, preferred_element_type), implementation
    precision = lax_internal.canonicalize_precision(precision)
    if chain is not None:  # who does not take them packed is asked for a convolution of one tap
        one, tap = kernel[:1], ConvSpec(spec.time, 1, groups=spec.groups)
        dispatch.check_anywhere(problem_of("conv1d", x, one, tap, precision, out_dtype), chain)
    conv = dict(spec=spec, precision=precision, out_dtype=out_dtype, implementation=chain)
    named = activation if isinstance(activation, str) else None
    place = canonicalize_sharding(out_sharding, "conv1d")
    if unfused_reason(x.dtype, out_dtype, bias, place) is None:
        y = packed.conv1d(x, kernel, bias, ids, activation=named, **conv)
    else:
        y = packed.conv1d(x, kernel, None, ids, activation=None, **conv)
        y = y if place is None else jax.sharding.reshard(y, place)
        y = activate(fused.add_bias(y, bias), named)
    return activation(y) if callable(activation) else y


def convolve_taps(
    seen: Sequence[Callable[[], jax.Array]],
    kernel,
    bias,
    *,
    feature_group_count: int,
    preferred_element_type,
    activation,
    **how,
):
    """The convolution of which each tap sees an x of its own.

    As in a stream, inside of a `jax.shard_map`, and by stock; `packed` has the others. It is one
    pointwise convolution of all taps side by side. But of a depthwise layer they would lie so
    within each channel, which takes a transpose of K times x. There each tap is a product, and XLA
    fuses all of them into one pass, which the gradients compute again.

    Args:
      seen: of each tap a function without arguments, of what it sees: ``(*batch, T, C)``.
      kernel: ``(K, C // feature_group_count, O)``.
      how: more for `convolve`.
    """
    how |= segments.POINTWISE | dict(feature_group_count=feature_group_count)
    if not segments.apart(kernel, feature_group_count):
        x, kernel = segments.side_by_side([see() for see in seen], kernel, feature_group_count)
        more = dict(preferred_element_type=preferred_element_type, activation=activation)
        return convolve(x, kernel, bias, **more, **how)
    out_dtype = result_dtype(kernel.dtype, preferred_element_type)
    named = activation if isinstance(activation, str) else None

    def product(x, w, dtype):
        return convolve(x, w, None, preferred_element_type=dtype, **how)

    @jax.checkpoint
    def sum_of_taps(kernel, bias):
        given = dict(convolve=product, out_dtype=out_dtype)
        if unfused_reason(kernel.dtype, out_dtype, bias, None) is None:
            return packed.sum_of_taps(seen, kernel, bias, activation=named, **given)
        y = packed.sum_of_taps(seen, kernel, None, activation=None, **given)
        return activate(fused.add_bias(y, bias), named)

    y = sum_of_taps(kernel, bias)
    # Else XLA:CPU computes all taps anew, number by number, where y is summed.
    y = lax.optimization_barrier(y)
    return activation(y) if callable(activation) else y


def check_bias(bias, kernel) -> None:
    """Refuses, of arrays or structs, a bias that is not ``(O,)``."""
    if bias is not None and bias.shape != kernel.shape[-1:]:
        raise ValueError(f"bias must have shape {kernel.shape[-1:]}, got {bias.shape}")


def _check_splits(time: halo.TimeSplit, spec: ConvSpec, mode: str | None, axis_name) -> None:
    """Refuses what devices that each hold a part of time can't compute."""
    if mode is not None or halo.divisor(spec) % time.shards:
        raise ValueError(
            f"axis_name={axis_name!r} needs as many outputs as inputs or a fixed ratio of them, on "
            f"each of {time.shards} devices: padding CAUSAL, SAME or as many zeros, and strides "
            f"that divide {spec.time // time.shards} steps times the input_dilation; got "
            f"strides={spec.stride}, input_dilation={spec.input_dilation}, "
            f"padding={mode or spec.padding}"
        )


def unfused_reason(dtype, out_dtype, bias, out_sharding) -> str | None:
    """Why bias and activation stand outside of the operation; None where they need not.

    Args:
      dtype, out_dtype: of x and the kernel, and of the convolution's result.
      bias: None, or what has a dtype.
    """
    if out_sharding is not None:
        return "out_sharding is given"
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"x is of {np.dtype(dtype).name}"
    if bias is not None and bias.dtype != dtype:
        return f"the bias is of {bias.dtype.name}, x of {np.dtype(dtype).name}"
    if bias is not None and out_dtype != dtype and out_dtype.itemsize <= dtype.itemsize:
        # Of bfloat16 and float16 neither holds the other: the bias widens what it is added to.
        return f"{out_dtype.name} does not hold a bias of {np.dtype(dtype).name}"
    return None


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    *,
    implementation: Implementation = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, with ours in its place where there is one dimension.

    Takes the same arguments, means the same, raises the same types. Two and more spatial
    dimensions, batch groups, booleans, complex numbers and float8_e8m0fnu go to `jax.lax`. Layouts
    other than ``("NWC", "WIO", "NWC")`` are transposed in memory before and after.

    Use it with layers that take the convolution as an argument, flax's
    ``linen.Conv(conv_general_dilated=...)`` among them; `conv_pallas.nn.Conv` does more,
    because there CAUSAL padding happens outside of this function.

    Args:
      implementation: as in `conv1d`.

    Returns:
      As `jax.lax.conv_general_dilated`.

    Raises:
      ValueError, TypeError: as `jax.lax.conv_general_dilated`.
      ValueError, NotImplementedError: of `implementation`, as in `conv1d`.
    """
    chain = dispatch.canonicalize(implementation)
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    elsewhere = lax_reason(lhs.dtype, rhs.ndim - 2)
    if elsewhere or lhs.ndim != 3 or batch_group_count != 1 or is_stock(chain):
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            batch_group_count,
            precision,
            preferred_element_type,
            out_sharding,
        )
    if lhs.dtype != rhs.dtype:
        raise TypeError(f"lhs and rhs must have the same dtype, got {lhs.dtype} and {rhs.dtype}")
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    (n, c, t), (o, i, k), out = numbers
    _check_channels(lhs.shape, rhs.shape, c, (o, i, k), feature_group_count)
    _check_as_lax(lhs.shape[t], window_strides, padding, lhs_dilation, rhs_dilation)
    x, kernel = lhs.transpose(n, t, c), rhs.transpose(k, i, o)
    spec, _ = make_spec(
        x.shape,
        kernel.shape,
        strides=window_strides,
        padding=padding,
        input_dilation=lhs_dilation,
        kernel_dilation=rhs_dilation,
        feature_group_count=feature_group_count,
    )
    if out_sharding is not None:
        out_sharding = canonicalize_sharding(out_sharding, "conv_general_dilated")
        entries = (*out_sharding.spec, None, None, None)
        out_sharding = out_sharding.update(
            spec=P(entries[out[0]], entries[out[2]], entries[out[1]])
        )
    y = _convolve(
        x,
        kernel,
        spec,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
        chain=chain,
    )
    return y.transpose(np.argsort((out[0], out[2], out[1])))


def _check_channels(lhs_shape, rhs_shape, c: int, oik: Sequence[int], G) -> None:
    """Refuses what `make_spec` would, of shapes as they were before any transpose.

    Args:
      c, oik: which dimension of lhs has the channels, and which of rhs those out, in and the taps.
    """
    C, (O, per_group, K) = lhs_shape[c], (rhs_shape[d] for d in oik)
    if not hasattr(G, "__index__"):
        raise TypeError(f"feature_group_count must be an int of 1 or more, got {G!r}")
    if G < 1:
        raise ValueError(f"feature_group_count must be an int of 1 or more, got {G!r}")
    if C % G or O % G:
        raise ValueError(
            f"feature_group_count must divide lhs's {C} channels and rhs's {O} output channels, "
            f"got {G}"
        )
    if C // G != per_group:
        raise ValueError(
            f"lhs must have {per_group * G} channels (rhs's {per_group} times "
            f"feature_group_count={G}), got {C} in dimension {c} of shape {lhs_shape}"
        )
    if K < 1:
        raise ValueError(
            f"rhs must have at least one tap, got none in dimension {oik[2]} of shape {rhs_shape}"
        )


def _check_as_lax(T, window_strides, padding, lhs_dilation, rhs_dilation) -> None:
    """Refuses what `make_spec` would and what only `conv1d` takes, with the types of `jax.lax`."""
    numbers = dict(
        window_strides=(window_strides, ValueError),
        lhs_dilation=((1,) if lhs_dilation is None else lhs_dilation, TypeError),
        rhs_dilation=((1,) if rhs_dilation is None else rhs_dilation, TypeError),
    )
    for name, (value, error) in numbers.items():
        expected = f"{name} must be a sequence of one int of 1 or more, got {value!r}"
        if not isinstance(value, Sequence | np.ndarray) or np.ndim(value) != 1:
            raise TypeError(expected)
        if len(value) != 1:
            raise ValueError(expected)
        if not hasattr(value[0], "__index__"):
            raise TypeError(expected)
        if value[0] < 1:
            raise error(expected)
    expected = f"padding must be SAME, SAME_LOWER, VALID or [(low, high)], got {padding!r}"
    E = 1 if lhs_dilation is None else lhs_dilation[0]
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "SAME_LOWER", "VALID"):
            raise UnknownPaddingError(expected)
        if E != 1:
            raise ValueError(
                f"padding must be [(low, high)] where lhs_dilation is not 1; got "
                f"padding={padding!r}, lhs_dilation={lhs_dilation!r}"
            )
        return
    pairs = padding if isinstance(padding, Sequence | np.ndarray) else (padding,)
    for pair in pairs:
        if not isinstance(pair, Sequence | np.ndarray) or len(pair) != 2:
            raise ValueError(expected)
        if not all(hasattr(amount, "__index__") for amount in pair):
            raise ValueError(expected)
    if len(pairs) != 1:
        raise TypeError(expected)
    low, high = pairs[0]
    steps = ConvSpec(T, 1, input_dilation=E).dilated_time
    if min(low, high) < 0 and steps + low + high < 0:
        raise ValueError(f"padding must not crop more than lhs's {steps} steps, got {padding!r}")


def lax_reason(dtype, spatial_rank: int) -> str | None:
    """Why a convolution goes to `jax.lax.conv_general_dilated` instead of our primitives."""
    if spatial_rank != 1:
        return f"{spatial_rank}-D convolutions are left to jax.lax.conv_general_dilated"
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        return f"{np.dtype(dtype).name} is left to jax.lax.conv_general_dilated"
    if dtype == jnp.float8_e8m0fnu:
        return "float8_e8m0fnu, which has no zero to pad with, is left to jax.lax"
    return None


def is_stock(chain: tuple[str, ...] | None) -> bool:
    # "xla_native" never declines, so that what comes after it is never reached.
    return chain is not None and chain[0] == "xla_native"


def _convolve(
    x,
    w,
    spec: ConvSpec,
    *,
    precision,
    preferred_element_type,
    out_sharding,
    chain,
    pad_first=False,
    bias=None,
    activation=None,
):
    if not all(isinstance(p, int) for p in spec.padding):
        # SAME with a stride, and T a symbol: how much there is to pad is not known before it runs,
        # and a window takes numbers.
        pads = [(0, 0)] * x.ndim
        pads[-2] = spec.padding
        x = jnp.pad(x, pads)
        spec = dataclasses.replace(spec, time=x.shape[-2], padding=(0, 0))
    out_sharding = canonicalize_sharding(out_sharding, "conv1d")
    if is_stock(chain) or lax_reason(x.dtype, 1):
        y = _stock(x, w, spec, precision, preferred_element_type, out_sharding, pad_first)
        return activate(fused.add_bias(y, bias), activation)
    out_dtype = result_dtype(x.dtype, preferred_element_type)
    precision = lax_internal.canonicalize_precision(precision)
    if chain is not None:
        dispatch.check_anywhere(problem_of("conv1d", x, w, spec, precision, out_dtype), chain)
    conv = dict(spec=spec, precision=precision, out_dtype=out_dtype, implementation=chain)
    fuses = unfused_reason(x.dtype, out_dtype, bias, out_sharding) is None
    if fuses and not (bias is None and activation is None):
        return fused.conv1d(x, w, bias, activation=activation, **conv)
    y = primitives.conv1d(x, w, out_sharding=out_sharding, **conv)
    return activate(fused.add_bias(y, bias), activation)


def _stock(x, w, spec: ConvSpec, precision, preferred_element_type, out_sharding, pad_first):
    """Exactly what nnx.Conv runs; with CAUSAL padding it pads in memory first."""
    batch, padding = x.shape[:-2], spec.padding
    x = x.reshape(math.prod(batch), *x.shape[-2:]) if len(batch) != 1 else x
    if pad_first:
        x, padding = jnp.pad(x, ((0, 0), padding, (0, 0))), (0, 0)
    y = lax.conv_general_dilated(
        x,
        w,
        (spec.stride,),
        [padding],
        (spec.input_dilation,),
        (spec.kernel_dilation,),
        ("NWC", "WIO", "NWC"),
        spec.groups,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    return y.reshape(*batch, *y.shape[1:]) if len(batch) != 1 else y


def _pad_in_memory(x, kernel, bias, mode: str, spec: ConvSpec):
    """The padded x, and on a mesh with explicit axes how y lies: as it would with zeros around x.

    No type splits the padded steps over devices, so that each has them all.
    """
    span = spec.span
    pads = [(0, 0)] * x.ndim
    pads[-2] = ((span - 1) // 2, span // 2)
    zeros = dataclasses.replace(spec, time=x.shape[-2], padding=pads[-2])
    place = fused.place_of_y(x, kernel, bias, zeros)
    x = sharding.like(x, sharding.whole(P(*sharding.entries(jax.typeof(x))), -2))
    return jnp.pad(x, pads, mode={"CIRCULAR": "wrap", "REFLECT": "reflect"}[mode]), place


def promoted_dtype(*arrays):
    """The floating or complex dtype that nnx.Conv computes with, for arrays or structs."""
    dtype = jnp.result_type(*arrays)
    if jnp.issubdtype(dtype, jnp.inexact):
        return dtype
    return jnp.promote_types(jnp.float32, dtype)


def activation_function(activation: str | Callable | None) -> Callable | None:
    """The function of an activation's name; None and a function are what they are.

    Raises:
      ValueError: it is neither, nor one of `FUNCTIONS`.
    """
    if activation is None or callable(activation):
        return activation
    if not isinstance(activation, str) or activation not in FUNCTIONS:
        raise ValueError(
            f"activation must be None, a callable or one of {', '.join(FUNCTIONS)}, "
            f"got {activation!r}"
        )
    return FUNCTIONS[activation]


def result_dtype(dtype, preferred_element_type) -> np.dtype:
    """The dtype of the convolution's result, as `jax.lax` would have it.

    Raises:
      TypeError: `preferred_element_type` does not fit `dtype`.
    """
    if preferred_element_type is None:
        return np.dtype(dtype)
    preferred = np.dtype(preferred_element_type)
    if preferred != jax.dtypes.canonicalize_dtype(preferred):
        # 64 bits that JAX does not have: it warns, or does as jax_explicit_x64_dtypes says.
        conv = functools.partial(
            lax.conv_general_dilated, window_strides=(1,), padding="VALID",
            preferred_element_type=preferred_element_type,
        )  # fmt: skip
        one = jax.ShapeDtypeStruct((1, 1, 1), dtype)
        preferred = jax.eval_shape(conv, one, one).dtype
    lax_internal._validate_preferred_element_type(dtype, preferred)  # raises TypeError
    return preferred
