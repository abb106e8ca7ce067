"""The one table of tolerances. Dtype and precision decide, never the kernel.

A sum of ``n`` products ``p`` of zero-mean numbers, such as `Case.arrays` has, may be off by

    rounding of the result  +  CONFIDENCE * (products + sqrt(n) * sums) * sqrt(sum of p**2)

where ``products`` and ``sums`` are how far one product and one addition may be off,
relatively: errors of products add up like a random walk, and so do those of additions, whose
operands are a random walk already. What no term reaches must be exactly zero, and integers
are exact.
"""

import numpy as np

from conv_pallas.spec import ConvSpec, Operation
from tests import reference

REFERENCES = {
    "conv1d": reference.conv1d_reference,
    "conv1d_input_grad": reference.input_grad_reference,
    "conv1d_kernel_grad": reference.kernel_grad_reference,
}

# Half the distance of two neighbours around 1: how far one rounding goes.
UNIT = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "tf32x3": 2.0**-21,
    "bf16x3": 2.0**-16,
    "tf32": 2.0**-11,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}

# What the factors of a float32 product are rounded to; narrower ones are taken as they are.
FACTORS = {
    "cpu": {"default": "float32", "high": "float32", "highest": "float32"},
    "cuda": {"default": "tf32", "high": "tf32x3", "highest": "float32"},
    "rocm": {"default": "float32", "high": "float32", "highest": "float32"},
    "tpu": {"default": "bfloat16", "high": "bf16x3", "highest": "float32"},
    "other": {"default": "float32", "high": "float32", "highest": "float32"},
}

# Sums are in float32 at least, whatever the operands are.
SUMS = {"float64": "float64", "float32": "float32", "float16": "float32", "bfloat16": "float32"}

# In standard deviations, roughly: a case has up to 10**5 elements, and all must pass. Of more the
# farthest is farther off, as their logarithm: what a rounding is relative to is random as well,
# and of a product of two normal numbers the tail falls exponentially.
CONFIDENCE, ELEMENTS = 4.0, 1e5


def bound(
    terms: np.ndarray | float,
    magnitude: np.ndarray | float,
    value: np.ndarray | float,
    *,
    dtype: np.dtype,
    out_dtype: np.dtype,
    precision: str | None = None,
    platform: str = "cpu",
) -> np.ndarray:
    """How far a result may be off.

    Args:
      terms, magnitude, value: for each element how many products it sums, the root of the
        sum of their squares, and the exact sum.
      dtype: of the operands, the wider one where they differ.
    """
    name, out = np.dtype(dtype).name, np.dtype(out_dtype).name
    if out not in UNIT:
        return np.zeros_like(value)  # integers
    sums = UNIT[SUMS.get(name, SUMS[out])]
    products = sums
    if name == "float32":
        products = UNIT[FACTORS[platform][str(precision or "default").lower()]]
    farther = max(1.0, np.log(np.size(value) or 1) / np.log(ELEMENTS))
    relative = farther * CONFIDENCE * (products + np.sqrt(terms) * sums)
    # Below the normal numbers of float16 its neighbours stay as far apart as there.
    smallest = 2.0**-25 if out == "float16" else 0.0
    return smallest + UNIT[out] * np.abs(value) + relative * (1 + UNIT[out]) * magnitude


def check(
    actual,
    operation: Operation,
    lhs: np.ndarray,
    rhs: np.ndarray,
    spec: ConvSpec,
    *,
    out_dtype: np.dtype,
    precision: str | None = None,
    platform: str = "cpu",
) -> None:
    """Asserts that ``actual`` is the operation of ``lhs`` and ``rhs``.

    Both operands have three axes and the dtype that the kernel saw.
    """
    compute = REFERENCES[operation]
    value = compute(lhs, rhs, spec)
    magnitude = np.sqrt(compute(lhs.astype(float) ** 2, rhs.astype(float) ** 2, spec))
    terms = compute(np.ones_like(lhs, float), np.ones_like(rhs, float), spec)
    dtype = np.promote_types(lhs.dtype, rhs.dtype)
    allowed = bound(
        terms, magnitude, value, dtype=dtype, out_dtype=out_dtype, precision=precision,
        platform=platform,
    )  # fmt: skip
    assert_within(actual, value, allowed, out_dtype, operation)


def assert_within(actual, value, allowed, out_dtype, what: str) -> None:
    """Asserts ``|actual - value| <= allowed``, element by element, and shape and dtype."""
    assert actual.dtype == out_dtype, f"{what}: dtype {actual.dtype} is not {out_dtype}"
    assert actual.shape == value.shape, f"{what}: shape {actual.shape} is not {value.shape}"
    error = np.abs(np.asarray(actual).astype(np.float64) - value)
    bad = ~(error <= allowed)  # NaN is bad
    if bad.any():
        worst = np.unravel_index(np.argmax(np.where(bad, error, -1)), error.shape)
        spans = ", ".join(
            f"{min(i)} to {max(i)} of {n}" for i, n in zip(bad.nonzero(), bad.shape, strict=True)
        )
        raise AssertionError(
            f"{what}: {bad.sum()} of {bad.size} elements are off; at {tuple(map(int, worst))} "
            f"{np.asarray(actual)[worst]} is not {value[worst]} within {allowed[worst]:.3g}; "
            f"along each axis they are {spans}"
        )
