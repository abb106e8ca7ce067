"""Primitives that are *defined* by a composition of others, where a kernel may do all of it.

A family of three stands one level above the three of `primitives`:

    name             x, w, [bias], ... -> y       (and more, if it keeps it)
    name_tangent     ..., dx, dw, dbias -> dy     linear; no kernel fuses it
    name_backward    ..., dy -> dx, dw, dbias     its transpose

Each has a composition, JAX code that says what it means. That is what runs where no kernel does all
of it, what `jax.vmap` and meshes fall back on, and what is differentiated: the derivative of any of
the three is that of its composition, but for the first derivative of the first. So forward mode and
every order are right as soon as the three compositions are.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax._src import checkify
from jax._src import core as jax_core
from jax._src.lax import utils as lax_utils
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, xla
from jax.interpreters import partial_eval as pe

from conv_pallas import fused_sharding, lowering


@dataclasses.dataclass(frozen=True)
class Member:
    """One of a family.

    Attributes:
      composed: what it means: ``composed(*operands, **params)``, a list of results.
      shared: of the number of operands, which of them all members of a batch have in common.
      lower: the lowering rule, as `lowering.register` has it; None: the composition is lowered.
      mapped: as ``composed``, what `jax.vmap` maps where it maps what should be shared; None: that.
    """

    composed: Callable[..., list[jax.Array]]
    shared: Callable[..., Sequence[int]]
    lower: Callable | None = None
    mapped: Callable[..., list[jax.Array]] | None = None


class Family:
    """The three primitives.

    Their operands are x, w and, if ``has_bias``, a bias, then what else they are given, and last
    the tangents or the cotangent. All parameters are keywords, the same for each; of the tangent
    and of backward ``wanted``, three booleans, says which of x, w and bias have a tangent, or get
    a gradient.
    """

    def __init__(
        self, name: str, forward: Member, tangent: Member, backward: Member, *, jvp: Callable,
        transpose_forward: Callable | None = None, dce: Callable | None = None,
    ):  # fmt: skip
        """Makes them.

        Args:
          jvp: of forward, with ``primals, tangents, **params``.
          transpose_forward: with ``cts, *operands, **params``; None: that of its composition.
          dce: of forward, where it has several results, the rule for dead code.
        """
        self.name = name

        def make(asks: bool) -> dict[str, Primitive]:
            y = self._make(name, forward, _results_forward, _like_y, asks)
            dy = self._make(f"{name}_tangent", tangent, _results_tangent, _like_y, asks)
            grads = self._make(
                f"{name}_backward", backward, _results_backward, _like_operands, asks
            )
            ad.primitive_jvps[y] = jvp
            if transpose_forward is not None:
                ad.primitive_transposes[y] = transpose_forward
            ad.primitive_transposes[dy] = functools.partial(
                self._transpose_tangent, tangent.composed
            )
            if dce is not None:
                pe.dce_rules[y] = dce
            pe.dce_rules[grads] = _backward_dce
            return {p.name: p for p in (y, dy, grads)}

        self._asking, self._by_types = make(asks=True), make(asks=False)  # as of `primitives`

    def bind(self, part: str, *operands, **params) -> list[jax.Array]:
        """The results of one of the three: of ``""``, ``"_tangent"`` or ``"_backward"``."""
        operands = jax_core.auto_insert_reshard(*operands)
        these = self._by_types if lowering.split_by_types(operands) else self._asking
        return these[self.name + part].bind(*operands, **params)

    def _make(
        self, name: str, member: Member, results: Callable, places: Callable, asks: bool
    ) -> Primitive:
        """A primitive.

        Args:
          results: of the operands' types the results', or what has their shapes and dtypes.
          places: of these and the operands' types the results' shardings on explicit axes.
          asks: as in `lowering.register`.
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
        p.def_abstract_eval(
            functools.partial(lax_utils.standard_multi_result_abstract_eval, p, *rules)
        )
        composed, bind = member.composed, functools.partial(self.bind, name[len(self.name) :])
        ad.primitive_jvps[p] = derivative(composed)
        ad.primitive_transposes[p] = transpose(composed)
        jet.jet_rules[p] = _series(composed)
        batching.fancy_primitive_batchers[p] = functools.partial(_batching, member, bind)
        lower = member.lower or functools.partial(_lower_composed, composed=composed)
        lowering.register(p, lower, asks=asks)
        checkify.error_checks[p] = functools.partial(checkify.nan_error_check, p)
        return p

    def _transpose_tangent(self, composed, cts, *operands, wanted, **params):
        first = len(operands) - sum(wanted)
        constants, tangents = operands[:first], operands[first:]
        if any(map(ad.is_undefined_primal, constants)):  # it is linear in x and in w as well
            return transpose(composed)(cts, *operands, wanted=wanted, **params)
        asked = iter([ad.is_undefined_primal(t) for t in tangents])
        still = tuple(there and next(asked) for there in wanted)
        (ct,) = map(ad.instantiate_zeros, cts)
        if 0 in ct.shape:
            # Zeros; XLA compiles no `jax.shard_map` that reads nothing.
            return [None] * len(operands)
        grads = iter(self.bind("_backward", *constants, ct, wanted=still, **params))
        return [next(grads) if ad.is_undefined_primal(a) else None for a in operands]


def live_tangents(tangents) -> tuple[tuple[bool, bool, bool], list]:
    """``wanted`` of those of x, w and bias, and those that there are."""
    there = [type(t) is not ad.Zero for t in tangents[:3]]
    wanted = (*there, *[False] * (3 - len(there)))
    return wanted, [t for t in tangents if type(t) is not ad.Zero]


def rows(a: jax.Array) -> jax.Array:
    """``(*batch, T, C)`` with all batch axes as one."""
    return a.reshape(math.prod(a.shape[:-2]), *a.shape[-2:])


# --- Types ---


def _results_forward(x, w, *_, spec, out_dtype, keep=False, **__):
    y = jax.ShapeDtypeStruct((*x.shape[:-2], spec.out_time, w.shape[-1]), out_dtype)
    return [y, y] if keep else [y]


def _results_tangent(x, w, *_, **params):
    return _results_forward(x, w, **params | dict(keep=False))


def _results_backward(x, w, *rest, wanted, **_):
    like = (x, w, rest[0])  # rest[0] is the bias wherever its gradient is wanted
    return [a for a, there in zip(like, wanted, strict=True) if there]


def _like_y(results, *avals, spec, has_bias, **_):
    return [fused_sharding.of_y(*avals[: 2 + has_bias], spec=spec)] * len(results)


def _like_operands(results, *_, **__):
    return [r.sharding for r in results]


# --- Lowering ---


def _lower_composed(ctx, *operands, platform, composed, **params):
    # The three operations split themselves where there are several devices, and XLA the rest.
    return lowering.lower_function(ctx, functools.partial(composed, **params), operands)


# --- Differentiation ---


def derivative(composed: Callable) -> Callable:
    """The rule of forward mode of what is composed so."""

    def rule(primals, tangents, **params):
        live = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]
        f = of_some(composed, primals, live, params)
        return jax.jvp(f, [primals[i] for i in live], [tangents[i] for i in live])

    return rule


def _series(composed: Callable) -> Callable:
    def rule(primals, series, **params):
        # Of integers, ids among them, `jet` makes series that it can't add to anything.
        live = [i for i, a in enumerate(primals) if jnp.issubdtype(a.dtype, jnp.inexact)]
        f = of_some(composed, primals, live, params)
        given = [primals[i] for i in live], [series[i] for i in live]
        return jet.jet(f, *given, factorial_scaled=False)

    return rule


def of_some(composed: Callable, operands, some: Sequence[int], params) -> Callable:
    """A function of those operands alone, the others being what they are."""

    def f(*values):
        given = list(operands)
        for i, value in zip(some, values, strict=True):
            given[i] = value
        return composed(*given, **params)

    return f


def transpose(composed: Callable) -> Callable:
    """The rule of transposition of what is composed so."""

    def rule(cts, *operands, **params):
        asked = [i for i, a in enumerate(operands) if ad.is_undefined_primal(a)]
        f = of_some(composed, operands, asked, params)
        types = [operands[i].aval for i in asked]
        cts = [ad.instantiate_zeros(ct) for ct in cts]
        grads = dict(zip(asked, jax.linear_transpose(f, *types)(cts), strict=True))
        return [grads.get(i) for i in range(len(operands))]

    return rule


# --- Dead code ---
# A kernel call is all or nothing to XLA, so that what nobody reads has to go before.


def _backward_dce(used, *rest):
    eqn = rest[-1]  # jax 0.12 and newer say before it which operands are alive
    if not any(used):
        return [False] * len(eqn.invars), None
    read = iter(used)
    wanted = tuple(there and next(read) for there in eqn.params["wanted"])
    outvars = [v for v, u in zip(eqn.outvars, used, strict=True) if u]
    eqn = eqn.replace(params=eqn.params | dict(wanted=wanted), outvars=outvars)
    return [True] * len(eqn.invars), eqn


# --- Batching ---


def _batching(member: Member, bind: Callable, axis_data, args, dims, **params):
    """What is shared by the whole batch stays; an axis of anything else is one more batch axis."""
    if all(d is None for d in dims):
        outs = bind(*args, **params)
        return outs, [None] * len(outs)
    once = member.shared(len(args), **params)
    if all(dims[i] is None for i in once) and axis_data.explicit_mesh_axis is None:
        args = [
            a if i in once else batching.bdim_at_front(a, d, axis_data.size)
            for i, (a, d) in enumerate(zip(args, dims, strict=True))
        ]
        outs = bind(*args, **params)
    else:
        mapped = jax.vmap(
            functools.partial(member.mapped or member.composed, **params), in_axes=tuple(dims),
            axis_size=axis_data.size, spmd_axis_name=axis_data.spmd_name,
        )  # fmt: skip
        outs = mapped(*args)
    return outs, [0] * len(outs)
