"""Ways to run a temporal block: over a whole sequence, and over the next chunk of a stream.

A block is written once, in terms of what differs between the two: a convolution, a delay, and
which steps are real. `Whole` and `Chunk` are those terms, so that streaming can't come to mean
something else than the full pass.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from conv_pallas import ops, segments, sharding, streaming
from conv_pallas.nn.conv import Conv


class WeightNorm(nnx.WeightNorm):
    """`flax.nnx.WeightNorm` around a `Conv`, that leaves the layer's own kernel alone.

    Same parameters, same outputs. Flax's writes the normalized kernel into the layer at each
    call, which neither an export nor a compiled step may do.
    """

    def __call__(self, x, out_sharding=None, **kwargs):
        given = dict(activation=None, mask=None) | kwargs
        return self.layer_instance._call(x, self._kernel(), out_sharding, **given)

    def _kernel(self) -> jax.Array:
        (scale,) = self.scales.values()
        kernel = self.layer_instance.kernel[...]
        squares = jnp.sum(kernel * kernel, (0, 1), keepdims=True)
        return kernel * jax.lax.rsqrt(squares + self.epsilon) * scale[...].reshape(1, 1, -1)

    def _advance(self, x, age, state, **kwargs):
        return self.layer_instance._advance(x, age, state, kernel=self._kernel(), **kwargs)

    def _ring(self, batch, dtype):
        return self.layer_instance._ring(batch, dtype)

    def _state_dtype(self, dtype):
        (scale,) = self.scales.values()
        kernel = jnp.promote_types(self.layer_instance.kernel.dtype, scale.dtype)
        return self.layer_instance._state_dtype(dtype, kernel)


def is_ours(layer: nnx.Module) -> bool:
    """Whether a call takes an activation, a mask and segment ids, and the layer can stream."""
    layer = layer.layer_instance if type(layer) is WeightNorm else layer
    return type(layer).__call__ is Conv.__call__ if isinstance(layer, Conv) else False


class Whole:
    """All steps at once.

    Attributes:
      mask, segment_ids: ``(*batch, T)`` or None, as in `conv_pallas.conv1d`.
      axis_name: over which time is split, or None, as in `conv_pallas.conv1d`.
    """

    def __init__(self, mask=None, segment_ids=None, axis_name=None):
        self.mask, self.segment_ids, self.axis_name = mask, segment_ids, axis_name

    def conv(self, name: str, layer: nnx.Module, x: jax.Array, activation=None) -> jax.Array:
        """The layer of what is real in x, and the activation."""
        if is_ours(layer):
            more = dict(segment_ids=self.segment_ids, axis_name=self.axis_name)
            return layer(x, activation=activation, mask=self.mask, **more)
        for name in ("segment_ids", "axis_name"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}= needs layers of conv_pallas.nn.Conv, got {type(layer).__name__}"
                )
        act = ops.activation_function(activation)
        y = layer(self.hide(x))
        return y if act is None else act(y)

    def late(self, name: str, x: jax.Array, steps: int) -> jax.Array:
        """x where the main path is ``steps`` late."""
        return x

    def hide(self, x: jax.Array) -> jax.Array:
        """x with zeros where nothing is real."""
        return x if self.mask is None else segments.hide(x, self.mask)

    @property
    def real(self):
        """Which steps are real, or None for all."""
        return self.mask


class Rehearsal(Whole):
    """All steps at once, to see of what dtypes a stream's state has to be.

    A part need not compute in the dtype that the block is given: the running averages of a batch
    norm are float32 in a model of bfloat16, and so is all that comes after it.

    Attributes:
      dtypes: of the states of the parts, by name.
    """

    def __init__(self):
        super().__init__()
        self.dtypes = {}

    def conv(self, name: str, layer: nnx.Module, x: jax.Array, activation=None) -> jax.Array:
        self.dtypes[name] = layer._state_dtype(x.dtype)
        return super().conv(name, layer, x, activation)

    def late(self, name: str, x: jax.Array, steps: int) -> jax.Array:
        self.dtypes[name] = x.dtype
        return x


class Chunk:
    """The next steps of a stream.

    Attributes:
      before, after: the states of the parts by name, before and after the chunk.
      age: ``(*batch, T)`` of the steps at hand, -1 where nothing is real.
      packed: whether a sequence may begin within the chunk.
      gaps: whether an age may be -1.
    """

    def __init__(self, before: dict[str, Any], age: jax.Array, *, packed: bool, gaps: bool):
        self.before, self.after = before, dict(before)  # what nothing touches stays
        self.age, self.packed, self.gaps = age, packed, gaps

    def conv(self, name: str, layer: nnx.Module, x: jax.Array, activation=None) -> jax.Array:
        y, self.age, self.after[name] = layer._advance(
            self.hide(x),
            self.age,
            streaming.part(self.before, name),
            packed=self.packed,
            act=activation,
        )
        return y

    def late(self, name: str, x: jax.Array, steps: int) -> jax.Array:
        if steps == 0:
            return x
        late, self.after[name] = streaming.delay(streaming.part(self.before, name), x, steps)
        return late

    def hide(self, x: jax.Array) -> jax.Array:
        return segments.hide(x, self.age >= 0) if self.gaps else x

    @property
    def real(self):
        return self.age >= 0 if self.gaps else None


def last_real(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The last real step of x ``(*batch, T, C)``, ``(*batch, 1, C)``."""
    T = x.shape[-2]
    if T == 0:
        raise ValueError(f"x must have a last step for return_sequences=False, got {x.shape}")
    if mask is None:
        return sharding.last_steps(x, 1)

    def last(x, mask):
        at = T - 1 - jnp.argmax(mask[..., ::-1], -1)
        return jnp.take_along_axis(x, at[..., None, None], -2)

    return sharding.shard_by_xla(last, lambda spec: sharding.whole(spec, -2), x, mask)


def compiled_step(model: nnx.Module) -> Callable[..., tuple[jax.Array, dict[str, Any]]]:
    """`model.step`, compiled, with the state updated in place.

    The state that goes in is donated: it can't be used again, and nothing of it is copied, so
    that a step costs the same for any receptive field. Compiles once for each length of a chunk.

    Args:
      model: a `Conv`, `ConvTranspose`, `TemporalBlock` or `TCN` in eval mode, or a module of your
        own that has such a `step`; its parameters are taken as they are now, and not copied: donate
        none of them to a training step while the stream goes on.

    Returns:
      A function ``(x, state, *others, **keywords) -> (y, state)``; it raises ValueError of a state
      that a step has used up, and of a ``step`` that has its state elsewhere or returns one of
      another structure. It compiles once for each `activation` too, where the model is a `Conv` or
      `ConvTranspose`.

    Raises:
      ValueError: the model has no `step`, or dropout that is on. What else keeps it from streaming
        its `init_state` and its first step say.
    """
    if not hasattr(model, "step"):
        raise ValueError(
            f"only what has a step can stream, such as Conv, ConvTranspose, TemporalBlock or TCN "
            f"of conv_pallas.nn, got {type(model).__module__}.{type(model).__name__}; a module of "
            f"your own needs init_state and step, made of those of its layers"
        )
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Dropout) and module.rate and not module.deterministic:
            raise ValueError("the model has dropout, and is in training: call model.eval() first")
    graph, variables = nnx.split(model)
    leaves, tree = jax.tree.flatten(variables)

    def advance(leaves, x, state, others, arrays, static):
        model = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
        y, after = model.step(x, state, *others, **arrays, **dict(static))
        given, returned = map(jax.tree.structure, (state, after))
        if given != returned:  # before what is no state is donated
            raise ValueError(
                f"step must take (x, state, ...) and return (y, state), states of one structure; "
                f"{type(model).__name__}'s was given {given} and returned {returned}"
            )
        return y, after

    compiled = jax.jit(advance, donate_argnums=2, static_argnums=5)

    def step(x, state, *others, **keywords):
        static = tuple((name, keywords.pop(name)) for name in ("activation",) if name in keywords)
        try:
            return compiled(leaves, x, state, others, keywords, static)
        except RuntimeError as e:
            if "deleted" in str(e) and any(map(_is_used_up, jax.tree.leaves(state))):
                raise ValueError(
                    "this state was used up by a step before: take the one that it returned"
                ) from e
            raise

    return step


def _is_used_up(a: Any) -> bool:
    return isinstance(a, jax.Array) and not isinstance(a, jax.core.Tracer) and a.is_deleted()
