"""`Conv`, in place of `flax.nnx.Conv`, and `replace_convs`, which puts it there."""

import functools
from collections.abc import Sequence

import jax
from flax import nnx
from jax import lax

from conv_pallas import dispatch, explanation, ops
from conv_pallas.dispatch import Implementation
from conv_pallas.spec import make_spec, scalar


class Conv(nnx.Conv):
    """`flax.nnx.Conv`, with our kernels under its one-dimensional convolutions.

    Everything but the call is flax's own: the constructor's arguments, the parameters,
    their initial values for a given `rngs`, the checkpoints. Two and more spatial
    dimensions, complex numbers, and layers with a `conv_general_dilated` of their own, run
    as in flax.

    Args:
      implementation: as in `conv_pallas.conv1d`; None picks the fastest known. It orders what
        runs one-dimensional convolutions, and says nothing of the others.
      others: see `flax.nnx.Conv`.

    Raises:
      ValueError: `implementation` is unknown, or `feature_group_count` is not positive.
    """

    # A class attribute, so that a layer without an order has the attributes of flax's own.
    implementation: Implementation = None

    def __init__(
        self,
        in_features,
        out_features,
        kernel_size,
        strides=1,
        *,
        implementation: Implementation = None,
        **kwargs,
    ):
        if kwargs.get("feature_group_count", 1) < 1:
            groups = kwargs["feature_group_count"]
            raise ValueError(f"feature_group_count must be 1 or more, got {groups}")
        super().__init__(in_features, out_features, kernel_size, strides, **kwargs)
        _order(self, implementation)

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        """Convolves.

        Args:
          inputs: ``(*batch, *spatial, in_features)``, any number of batch axes.
          out_sharding: sharding of the result on a mesh with explicit axes.

        Returns:
          ``(*batch, *spatial', out_features)``.

        Raises:
          ValueError, TypeError, NotImplementedError: as `conv_pallas.conv1d`; ValueError
            also for a mask whose shape is not the kernel's.
        """
        if self.in_features % self.feature_group_count:
            raise ValueError(
                f"feature_group_count must divide in_features={self.in_features}, "
                f"got {self.feature_group_count}"
            )
        if self._left_to_flax():
            self._check_dimensions()
            out = {} if out_sharding is None else {"out_sharding": out_sharding}
            return super().__call__(inputs, **out)
        if self.mask is not None and self.mask.shape != self.kernel_shape:
            raise ValueError(
                f"mask must have the kernel's shape {self.kernel_shape}, got {self.mask.shape}"
            )
        if self._is_stock():
            make_spec(inputs.shape, self.kernel_shape, **self._geometry())  # for its complaints
            out = {} if out_sharding is None else {"out_sharding": out_sharding}
            return super().__call__(inputs, **out)
        kernel = self.kernel[...]
        if self.mask is not None:
            kernel = kernel * self.mask
        bias = self.bias[...] if self.bias is not None else None
        inputs, kernel, bias = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
        return ops.convolve(inputs, kernel, bias, out_sharding=out_sharding, **self._arguments())

    def explain(self, inputs, *, platform: str | None = None) -> explanation.Explanation:
        """What would run for these inputs; see `conv_pallas.explain`."""
        if self.conv_general_dilated is not lax.conv_general_dilated:
            note = f"the layer brings its own convolution, {self.conv_general_dilated!r}"
            return explanation.Explanation(platform or explanation.default_platform(), {}, {}, note)
        params = inputs, self.kernel[...], None if self.bias is None else self.bias[...]
        promote = functools.partial(self.promote_dtype, dtype=self.dtype)
        inputs, kernel, _ = jax.eval_shape(promote, params)
        return explanation.explain(inputs, kernel, platform=platform, **self._arguments())

    def _left_to_flax(self) -> bool:
        return (
            len(self.kernel_size) != 1 or self.conv_general_dilated is not lax.conv_general_dilated
        )

    def _check_dimensions(self) -> None:
        """Of what is left to flax, the bad input that gets no readable answer there."""
        rank = len(self.kernel_size)
        if isinstance(self.padding, str) and self.padding.upper() == "CAUSAL" and rank != 1:
            raise ValueError(
                f"padding may be SAME, SAME_LOWER, VALID, CIRCULAR, REFLECT or numbers for a "
                f"{rank}-D convolution; CAUSAL is for 1-D, got {self.padding!r}"
            )
        for name, error in (
            ("strides", ValueError),
            ("kernel_dilation", TypeError),
            ("input_dilation", TypeError),
        ):
            value = getattr(self, name)
            for number in value if isinstance(value, Sequence) else (value,):
                scalar(name, number, error)

    def _is_stock(self) -> bool:
        # Of CAUSAL, CIRCULAR and REFLECT flax knows capitals only; `ops` knows the rest.
        spelled = not isinstance(self.padding, str) or self.padding.isupper()
        return spelled and ops.is_stock(dispatch.canonicalize(self.implementation))

    def _geometry(self) -> dict:
        return dict(
            strides=self.strides,
            padding=self.padding,
            input_dilation=self.input_dilation,
            kernel_dilation=self.kernel_dilation,
            feature_group_count=self.feature_group_count,
        )

    def _arguments(self) -> dict:
        return dict(
            self._geometry(),
            precision=self.precision,
            preferred_element_type=getattr(self, "preferred_element_type", None),
            implementation=self.implementation,
        )


def replace_convs[M: nnx.Module](model: M, *, implementation: Implementation = None) -> M:
    """Turns every `flax.nnx.Conv` of `model` into a `Conv`, in place.

    Parameters, references to the layers and layers shared between modules stay what they
    are. Subclasses of `flax.nnx.Conv` are left alone, for they may mean something else by
    a call; those that are a `Conv` already get the new `implementation`.

    Args:
      model: any module; it may itself be an `nnx.Conv`.
      implementation: for every layer, as in `conv_pallas.conv1d`.

    Returns:
      `model`, the same object.

    Raises:
      ValueError: `implementation` is unknown.
    """
    for _, module in nnx.iter_modules(model):
        if type(module) is nnx.Conv:
            module.__class__ = Conv
            _order(module, implementation)
        elif type(module) is Conv:
            _order(module, implementation)
    return model


def _order(layer: Conv, implementation: Implementation) -> None:
    if implementation is None:
        if "implementation" in vars(layer):
            del layer.implementation
        return
    # Canonical, so that it is hashable, as nnx asks of what is static.
    layer.implementation = dispatch.canonicalize(implementation)
