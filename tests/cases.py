"""The one table of cases: every kernel's tests and the benchmarks' checks share it.

A new kernel is tested on all of these; a new kind of trouble is one more line here.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import ml_dtypes
import numpy as np

from conv_pallas.spec import ConvSpec, Operation, Problem, lhs_rhs_out, make_spec


def numpy_dtype(name: str) -> np.dtype:
    """`np.dtype`, which also knows jax's small floats."""
    return np.dtype(getattr(ml_dtypes, name, name))


@dataclasses.dataclass(frozen=True)
class Case:
    """One convolution. The letters are those of `conv_pallas.spec`.

    Attributes:
      batch: the shape of the batch axes; none, one or several.
      padding: as in `conv_pallas.conv1d`.
      dtype: of x, kernel and, where `out_dtype` is None, of the result.
      precision: as in `jax.lax.conv_general_dilated`.
    """

    name: str
    batch: tuple[int, ...] = (2,)
    T: int = 13
    C: int = 3
    O: int = 4
    K: int = 3
    D: int = 1
    S: int = 1
    E: int = 1
    G: int = 1
    padding: Any = "CAUSAL"
    dtype: str = "float32"
    out_dtype: str | None = None
    precision: str | None = None

    def __str__(self) -> str:  # the test's id
        return self.name

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (*self.batch, self.T, self.C)

    @property
    def kernel_shape(self) -> tuple[int, int, int]:
        return (self.K, self.C // self.G, self.O)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.batch, self.spec.out_time, self.O)

    @property
    def geometry(self) -> dict[str, Any]:
        """The arguments of `conv1d` that say what shape the result has."""
        return dict(
            strides=self.S,
            padding=self.padding,
            input_dilation=self.E,
            kernel_dilation=self.D,
            feature_group_count=self.G,
        )

    @property
    def kwargs(self) -> dict[str, Any]:
        """All the arguments of `conv1d` but the arrays and the implementation."""
        return dict(
            self.geometry,
            precision=self.precision,
            preferred_element_type=self.out_dtype and numpy_dtype(self.out_dtype),
        )

    @functools.cached_property
    def spec(self) -> ConvSpec:
        """What is left to convolve once a CIRCULAR or REFLECT padding is written out."""
        return make_spec(self.x_shape, self.kernel_shape, **self.geometry)[0]

    @property
    def mode(self) -> str | None:
        """The padding, where it is not zeros."""
        return make_spec(self.x_shape, self.kernel_shape, **self.geometry)[1]

    def problem(self, operation: Operation, platform: str = "cpu") -> Problem:
        """The problem that a kernel is given."""
        operand, out = numpy_dtype(self.dtype), numpy_dtype(self.out_dtype or self.dtype)
        dtypes = lhs_rhs_out(operation, operand, operand, out)
        precision = self.precision and jax.lax.Precision(self.precision)
        N = math.prod(self.batch)
        return Problem(operation, self.spec, N, self.C, self.O, *dtypes, precision, platform)

    def arrays(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, kernel, and an output gradient g."""
        rng = np.random.default_rng([seed, *self.name.encode()])
        operand, out = numpy_dtype(self.dtype), numpy_dtype(self.out_dtype or self.dtype)
        shapes = ((self.x_shape, operand), (self.kernel_shape, operand), (self.out_shape, out))
        return tuple(
            rng.integers(-9, 10, shape).astype(dtype)
            if dtype.kind in "iu"
            else rng.standard_normal(shape).astype(dtype)
            for shape, dtype in shapes
        )


GEOMETRY = (
    # Channels: dense, ragged, one, grouped, depthwise with and without a multiplier.
    Case("dense"),
    Case("one_channel", C=1, O=1),
    Case("wide", T=33, C=32, O=48, D=2),
    Case("ragged", batch=(3,), T=37, C=25, O=17, D=5),
    Case("grouped", C=6, O=9, G=3, D=2),
    Case("grouped_narrowing", C=12, O=4, G=4),
    Case("depthwise", C=8, O=8, G=8, K=4),
    Case("depthwise_dilated", T=40, C=5, O=5, G=5, K=4, D=8),
    Case("multiplier", C=4, O=12, G=4, D=3),
    Case("depthwise_of_one", C=1, O=3, G=1),
    # Taps and dilation against time.
    Case("pointwise", K=1),
    Case("pointwise_dilated", K=1, D=7),
    Case("two_taps", K=2, D=4),
    Case("many_taps", T=31, K=17, C=2, O=2),
    Case("dilated", T=40, D=11),
    Case("time_shorter_than_field", T=5, K=4, D=3),
    Case("time_shorter_than_dilation", T=3, K=3, D=64),
    Case("one_step", T=1, K=3, D=2),
    Case("one_step_same", T=1, K=4, D=2, padding="SAME"),
    # Stride and input dilation, alone and together, with remainders.
    Case("stride", T=14, S=3),
    Case("stride_over_taps", T=23, K=2, S=5),
    Case("stride_same", T=14, K=4, S=3, padding="SAME"),
    Case("stride_same_lower", T=14, K=4, S=3, padding="SAME_LOWER"),
    Case("stride_grouped", T=15, C=4, O=6, G=2, K=4, S=2, D=3, padding=[(4, 1)]),
    Case("stride_depthwise", T=15, C=4, O=4, G=4, S=2, D=2),
    Case("stride_remainder", T=12, K=2, S=4, padding=[(0, 1)]),
    Case("input_dilation", E=2, padding=[(3, 2)]),
    Case("input_dilation_stride", E=3, S=2, D=2, padding=[(1, 5)]),
    Case("input_dilation_depthwise", C=4, O=8, G=4, E=2, S=3, padding=2),
    Case("input_dilation_crop", E=3, padding=[(-2, -4)]),
    # Where all taps see the zeros between two steps.
    Case("input_dilation_unmet", S=4, E=2, D=2, padding=[(5, 6)]),
    Case("input_dilation_unmet_pointwise", S=2, E=2, K=1, padding=[(1, 2)]),
    Case("input_dilation_short", T=2, K=2, E=4, padding=0),
    # Paddings.
    Case("same", K=4, D=2, padding="SAME"),
    Case("same_lower", K=4, D=2, padding="SAME_LOWER"),
    Case("same_lowercase", K=2, padding="same"),
    Case("valid", D=2, padding="VALID"),
    Case("circular", K=4, D=2, padding="CIRCULAR"),
    Case("circular_strided", K=3, S=2, padding="circular"),
    Case("reflect", K=4, D=2, padding="REFLECT"),
    Case("pad_int", padding=3),
    Case("pad_int_in_list", padding=[2]),
    Case("pad_high_only", D=2, padding=[(0, 9)]),
    Case("pad_beyond_field", K=2, padding=[(6, 8)]),
    Case("crop_low", padding=[(-3, 1)]),
    Case("crop_high", padding=[(4, -5)]),
    Case("crop_both", S=2, padding=[(-2, -3)]),
    Case("crop_depthwise", C=4, O=4, G=4, padding=[(-3, -2)]),
    # Nothing to compute, or nothing to compute it from.
    Case("no_output", T=4, K=3, D=2, padding="VALID"),
    Case("no_output_cropped", T=4, K=1, padding=[(-2, -2)]),
    Case("no_time", T=0),
    Case("no_time_padded", T=0, padding=[(3, 2)]),
    Case("no_batch_entries", batch=(0,)),
    Case("no_batch_entries_of_two", batch=(2, 0)),
    # Batch axes.
    Case("no_batch_axis", batch=()),
    Case("no_batch_axis_depthwise", batch=(), C=4, O=4, G=4),
    Case("two_batch_axes", batch=(2, 3), D=2),
    Case("three_batch_axes", batch=(2, 1, 2), C=4, O=4, G=2),
)  # fmt: skip

_BASE = (
    Case("dense", C=8, O=6, T=21, D=2),
    Case("grouped", C=8, O=4, G=2, T=21, D=2, padding="SAME"),
    Case("depthwise", C=8, O=8, G=8, T=21, D=3, K=4),
)


def _with(case: Case, **changes) -> Case:
    suffix = "_".join(str(v).lower() for v in changes.values())
    return dataclasses.replace(case, name=f"{case.name}_{suffix}", **changes)


DTYPES = tuple(
    _with(case, **changes)
    for case in _BASE
    for changes in (
        dict(dtype="bfloat16"),
        dict(dtype="float16"),
        dict(dtype="bfloat16", out_dtype="float32"),
        dict(dtype="float16", out_dtype="float32"),
        dict(precision="highest"),
        dict(precision="high"),
        dict(precision="default"),
    )
)

# Sums of so many terms that a narrow accumulator shows.
LONG = (
    Case("long_dense_bfloat16", batch=(4,), T=600, C=64, O=4, K=5, dtype="bfloat16"),
    Case("long_depthwise_bfloat16", batch=(4,), T=700, C=8, O=8, G=8, K=4, dtype="bfloat16"),
    Case("long_depthwise_float16", batch=(4,), T=700, C=8, O=8, G=8, K=4, dtype="float16"),
    Case("long_grouped_float32", batch=(4,), T=600, C=64, O=4, G=2, K=5),
)

CASES = GEOMETRY + DTYPES + LONG


def named(name: str) -> Case:
    """The case of that name."""
    (case,) = (c for c in CASES if c.name == name)
    return case
