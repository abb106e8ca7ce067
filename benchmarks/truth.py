"""What a layer should compute, in float64, and how far a variant may be from it.

The formula is `tests.reference`, the tolerance `tests.tolerance`: a benchmark times nothing
that the tests would not pass. Around the convolution, bias and activation are NumPy too.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from benchmarks.baselines import arguments
from conv_pallas._layers import Layer
from tests import reference
from tests.reference import SLOPES, STEEPEST, VALUES
from tests.tolerance import UNIT, assert_within, bound

_ROUNDINGS = 8  # of the few operations that make up a smooth activation, each rounded


class WrongResultError(RuntimeError):
    """A variant does not compute the layer; says where."""


@dataclasses.dataclass
class Truth:
    """A layer's arguments, its results in float64 and what they may be off by.

    Attributes:
      platform: as `conv_pallas.explain` names it; it decides what float32 products are
        rounded to by default.
    """

    layer: Layer
    platform: str = "cpu"
    seed: int = 0

    @functools.cached_property
    def arguments(self) -> tuple[np.ndarray, ...]:
        """``x, kernel, bias, g``.

        g is zero wherever a relu's sign could be in doubt, so that both answers are right.
        """
        x, kernel, bias, g = arguments(self.layer, self.seed)
        if self.layer.activation == "relu":
            z, off = self._before_activation(x, kernel, bias)
            g = np.where(np.abs(z) <= off, 0, g).astype(g.dtype)
        return x, kernel, bias, g

    @functools.cached_property
    def y(self) -> tuple[np.ndarray, np.ndarray]:
        """The output, and how far each element may be off."""
        z, off = self._before_activation(*self.arguments[:3])
        y = VALUES[self.layer.activation](z)
        if self._smooth:
            off = STEEPEST * off + _ROUNDINGS * self._unit * (np.abs(y) + np.abs(z))
        return y, off

    @functools.cached_property
    def gradients(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Those by x, kernel and bias, each with how far its elements may be off."""
        x, kernel, bias, g = self.arguments
        z, off = self._before_activation(x, kernel, bias)
        slope = SLOPES[self.layer.activation]
        gz = np.asarray(g, float) * slope(z)
        # What the activation's own derivative is off by travels on through the convolution.
        loose = np.abs(np.asarray(g, float)) * (STEEPEST * off + _ROUNDINGS * self._unit)
        if not self._smooth:
            loose = None
        spec = self.layer.spec
        dx = self._operation(reference.input_grad_reference, gz, kernel, spec, loose)
        dw = self._operation(
            lambda gz, x, spec: reference.kernel_grad_reference(x, gz, spec), gz, x, spec, loose
        )
        total, squares = gz.sum((0, 1)), (gz**2).sum((0, 1))
        # No matter of a kernel's: JAX sums this in the layer's own dtype.
        off = 4 * self._unit * np.sqrt(gz[..., 0].size * squares) + self._unit * np.abs(total)
        if loose is not None:
            off += 2 * np.sqrt((loose**2).sum((0, 1)))
        return dx, dw, (total, off)

    def check(self, results: tuple, what: str) -> None:
        """Compares ``(y,)`` or ``(dx, dkernel, dbias)`` with the formula.

        Raises:
          WrongResultError: an element is off by more than the tests allow.
        """
        names = ("y",) if len(results) == 1 else ("dx", "dkernel", "dbias")
        truths = (self.y,) if len(results) == 1 else self.gradients
        for name, result, (value, allowed) in zip(names, results, truths, strict=True):
            try:
                assert_within(
                    np.asarray(result), value, allowed, self.arguments[0].dtype, f"{what}, {name}"
                )
            except AssertionError as e:
                raise WrongResultError(str(e)) from None

    @property
    def _smooth(self) -> bool:
        return self.layer.activation not in (None, "relu")

    @property
    def _unit(self) -> float:
        return UNIT[self.layer.dtype]

    def _before_activation(self, x, kernel, bias):
        if not hasattr(self, "_z"):
            z, off = self._operation(reference.conv1d_reference, x, kernel, self.layer.spec)
            z += np.asarray(bias, float)
            self._z = z, off + self._unit * np.abs(z)
        return self._z

    def _operation(self, compute, lhs, rhs, spec, loose=None):
        """A bilinear operation with the tests' tolerance; ``loose`` is what lhs is off by."""
        lhs, rhs = np.asarray(lhs, float), np.asarray(rhs, float)
        value, magnitude = compute(lhs, rhs, spec), np.sqrt(compute(lhs**2, rhs**2, spec))
        # Every term is of magnitude 1 here, and one channel stands for all of a group.
        terms = self._terms(compute, lhs, rhs, spec)
        off = self._bound(terms, magnitude, value)
        if loose is not None:  # roundings, some up and some down, add up like a random walk
            off += 2 * np.sqrt(compute(loose**2, rhs**2, spec))
        return value, off

    def _terms(self, compute, lhs, rhs, spec):
        one = dataclasses.replace(spec, groups=1)
        if rhs.ndim == 3 and rhs.shape[0] == spec.kernel_size and compute in (
            reference.conv1d_reference, reference.input_grad_reference
        ):  # fmt: skip
            steps = compute(np.ones((1, lhs.shape[1], 1)), np.ones((spec.kernel_size, 1, 1)), one)
            summed = rhs.shape[1]  # C of a group
            if compute is reference.input_grad_reference:
                summed = rhs.shape[2] // spec.groups  # O of a group
            return steps * summed
        steps = compute(np.ones((1, lhs.shape[1], 1)), np.ones((1, rhs.shape[1], 1)), one)
        return steps * lhs.shape[0]  # N

    def _bound(self, terms, magnitude, value):
        dtype = jnp.dtype(self.layer.dtype)
        return bound(terms, magnitude, value, dtype=dtype, out_dtype=dtype, platform=self.platform)
