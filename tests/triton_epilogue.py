"""What kernels fuse around a convolution, and its gradients, in float64, with tolerances.

    z = conv(x, w) + bias      y = f(z)      gz = gy * f'(z)
    dx = input_grad(gz, w)     dw = kernel_grad(x, gz)     db = sum of gz over n and u

The cases are for Triton's interpreter and for the chip alike; `Fused` is for TPU kernels as well.
"""

import dataclasses
import math

import numpy as np

from conv_pallas.spec import ACTIVATIONS, Epilogue, Problem
from tests import tolerance
from tests.cases import Case
from tests.reference import SLOPES, STEEPEST, VALUES
from tests.support import rows


@dataclasses.dataclass(frozen=True)
class Fused:
    """A case with an epilogue, which of dx, dw and db are wanted, and for which platform."""

    case: Case
    activation: str | None
    bias: bool = True
    wanted: tuple[bool, bool, bool] = (True, True, True)
    platform: str = "cuda"

    @property
    def name(self) -> str:
        told = "".join(n for n, w in zip(("dx", "dw", "db"), self.wanted, strict=True) if w)
        bias = "bias" if self.bias else "plain"
        return f"fused_{self.case.name}_{self.activation}_{bias}_{told}"

    def problem(self) -> Problem:
        epilogue = Epilogue(self.bias, self.activation)
        return dataclasses.replace(self.case.problem("conv1d", self.platform), epilogue=epilogue)

    def arrays(self):
        """x, w, bias or None, gy and what the forward pass saved or None; three axes each."""
        x, w, gy = self.case.arrays()
        x, gy = rows(x), rows(gy)
        w = w / np.asarray(math.sqrt(w.shape[0] * w.shape[1]), w.dtype)  # z of about 1
        bias = np.random.default_rng(1).standard_normal(w.shape[-1]).astype(w.dtype)
        bias = bias if self.bias else None
        z, _ = self._z(x, w, bias)
        saved = {None: None, "z": z, "y": VALUES[self.activation](z)}[self.problem().epilogue.saved]
        return x, w, bias, gy, saved if saved is None else saved.astype(gy.dtype)

    def _z(self, x, w, bias):
        """z, and how far off it may be before it is rounded to the result's dtype."""
        common = dict(dtype=x.dtype, precision=self.case.precision, platform=self.platform)
        spec, reference = self.case.spec, tolerance.REFERENCES["conv1d"]
        z = reference(x, w, spec) + (0 if bias is None else bias.astype(float))
        magnitude = np.sqrt(reference(x.astype(float) ** 2, w.astype(float) ** 2, spec))
        terms = self.case.K * w.shape[1] + 1
        return z, tolerance.bound(terms, magnitude + 1, z, out_dtype=np.float32, **common)

    def check_forward(self, actual, x, w, bias) -> None:
        z, off = self._z(x, w, bias)
        value, out = VALUES[self.activation](z), self.problem().out_dtype
        allowed = STEEPEST * off + tolerance.UNIT[out.name] * np.abs(value) + 1e-6
        tolerance.assert_within(actual, value, allowed, out, "forward")

    def check_kept(self, kernel, x, w, bias, **options) -> None:
        """y, and z beside it."""
        problem = self.problem()
        epilogue = dataclasses.replace(problem.epilogue, keep=True)
        problem = dataclasses.replace(problem, epilogue=epilogue)
        assert kernel.keeps(problem)
        y, z = kernel.fused(problem, x, w, bias, **options)
        self.check_forward(np.asarray(y), x, w, bias)
        linear = dataclasses.replace(self, activation=None)
        linear.check_forward(np.asarray(z), x, w, bias)

    def check_backward(self, actual, x, w, bias, gy) -> None:
        """dx, dw and db against the formula, where they are wanted, and None elsewhere."""
        spec, out = self.case.spec, self.problem().out_dtype
        z, off = self._z(x, w, bias)
        gz = gy.astype(float) * SLOPES[self.activation](z)
        gz_off = np.zeros_like(gz)
        if self.activation is not None:
            # z or y is rounded when it is saved, and gz where it is a factor of a product.
            off = off + tolerance.UNIT[out.name] * np.maximum(np.abs(z), 1) + 1e-6
            gz_off = tolerance.UNIT[out.name] * np.abs(gz)
            gz_off += 2 * STEEPEST * off * np.abs(gy.astype(float)) * (self.activation != "relu")
        operations = {
            "conv1d_input_grad": (lambda g: (g, w.astype(float)), x.dtype),
            "conv1d_kernel_grad": (lambda g: (x.astype(float), g), w.dtype),
        }
        for got, wanted, (operation, (factors, dtype)) in zip(
            actual, self.wanted, operations.items(), strict=False
        ):
            if not wanted:
                assert got is None, operation
                continue
            compute = lambda g, p=1, op=operation, f=factors: tolerance.REFERENCES[op](  # noqa: E731
                *(a**p for a in f(g)), spec
            )
            value, magnitude = compute(gz), np.sqrt(compute(gz, 2))
            terms = compute(np.ones_like(gz), 0)
            allowed = tolerance.bound(
                terms, magnitude, value, dtype=x.dtype, out_dtype=dtype,
                precision=self.case.precision, platform=self.platform,
            ) + tolerance.CONFIDENCE * np.sqrt(compute(gz_off, 2))  # fmt: skip
            tolerance.assert_within(np.asarray(got), value, allowed, dtype, operation)
        if not (self.wanted[2] and self.bias):
            assert actual[2] is None
            return
        db, value, count = actual[2], gz.sum((0, 1)), gz.shape[0] * gz.shape[1]
        relative = tolerance.CONFIDENCE * tolerance.UNIT["float32"] * (1 + math.sqrt(count))
        allowed = relative * np.sqrt((gz**2).sum((0, 1)))
        allowed += tolerance.CONFIDENCE * np.sqrt((gz_off**2).sum((0, 1))) + 1e-6
        if db.dtype != np.float32:  # a layer casts what a kernel returns
            allowed += tolerance.UNIT[db.dtype.name] * np.abs(value)
        tolerance.assert_within(np.asarray(db), value, allowed, db.dtype, "bias gradient")


def _each(case: Case) -> list[Fused]:
    return [Fused(case, activation) for activation in ACTIVATIONS]


_WALKED = Case("walked", T=41, C=24, O=24, G=24, K=4, D=3)
_DENSE = Case("dense", T=37, C=24, O=40, D=5)
_BFLOAT16 = dict(dtype="bfloat16")

FUSED = (
    *_each(_WALKED),
    *_each(_DENSE),
    # Depthwise: one tap and eight, another padding, several programs and halves of tiles.
    Fused(Case("walked_wide", T=150, C=136, O=136, G=136, K=4, D=3, **_BFLOAT16), "silu"),
    Fused(dataclasses.replace(_WALKED, name="walked_far", T=70, D=64, K=8, **_BFLOAT16), "gelu"),
    Fused(dataclasses.replace(_WALKED, name="walked_over", T=9, D=64), "tanh"),
    # A piece is a series, after whose last output there is more of dx.
    Fused(dataclasses.replace(_WALKED, name="walked_whole", T=250, D=64), "silu"),
    # Or much more, of steps that no output reads.
    Fused(
        dataclasses.replace(
            _WALKED, name="walked_whole_crop", T=250, D=32, K=2, padding=[(0, -130)]
        ),
        "silu",
    ),
    # Each program has several tiles, of pieces and of whole series, and of several samples.
    Fused(dataclasses.replace(_WALKED, name="walked_onward", T=61, batch=(3,)), "silu"),
    Fused(
        dataclasses.replace(_WALKED, name="walked_onward_whole", T=250, D=64, **_BFLOAT16), "relu"
    ),
    Fused(dataclasses.replace(_WALKED, name="walked_pad", padding=[(7, 20)], K=2), "relu"),
    Fused(dataclasses.replace(_WALKED, name="walked_crop", padding=[(-5, -3)]), "silu"),
    Fused(dataclasses.replace(_WALKED, name="walked_alone", K=1, D=2**31 - 1), None),
    Fused(_WALKED, "silu", bias=False),
    Fused(_WALKED, "silu", wanted=(True, False, False)),
    Fused(_WALKED, "silu", wanted=(False, True, True)),
    Fused(_WALKED, None, wanted=(False, False, True)),
    # Depthwise of many taps.
    Fused(Case("taps", T=45, C=20, O=20, G=20, K=19, D=2, **_BFLOAT16), "silu"),
    Fused(Case("taps_same", T=70, C=16, O=16, G=16, K=33, padding="SAME"), "relu"),
    Fused(Case("taps", T=45, C=20, O=20, G=20, K=11), "gelu", wanted=(False, True, True)),
    Fused(Case("taps", T=45, C=20, O=20, G=20, K=11), None, bias=False),
    # Depthwise that can't be walked.
    Fused(Case("strided", T=45, C=20, O=20, G=20, K=4, S=2, D=3), "silu"),
    Fused(Case("strided", T=45, C=20, O=20, G=20, K=4, S=2, D=3), "silu", bias=False),
    Fused(Case("multiplier", T=45, C=20, O=40, G=20, K=7, D=2, **_BFLOAT16), "gelu_exact"),
    Fused(
        Case("multiplier", T=45, C=20, O=40, G=20, K=7), "tanh", wanted=(False, True, True)
    ),
    Fused(Case("upsampling", T=15, C=20, O=20, G=20, E=2, padding=2), "relu"),
    # Dense and grouped: the derivative in the kernels and before them.
    Fused(dataclasses.replace(_DENSE, name="tiles", T=80, C=40, O=72, **_BFLOAT16), "gelu"),
    Fused(dataclasses.replace(_DENSE, name="half", dtype="float16"), "relu"),
    Fused(Case("grouped", T=50, C=16, O=32, G=2, D=7, **_BFLOAT16), "relu"),
    Fused(Case("grouped", T=50, C=16, O=32, G=2, D=7), "silu", wanted=(False, True, True)),
    Fused(_DENSE, "silu", wanted=(True, False, False)),
    Fused(_DENSE, "sigmoid", wanted=(True, False, True)),
    Fused(_DENSE, None, wanted=(False, True, True)),
    Fused(_DENSE, "relu", bias=False),
    Fused(Case("strided_dense", T=41, C=24, O=20, S=2, D=3), "relu"),
    Fused(Case("upsampled", T=21, C=24, O=20, E=2, padding=3), "relu"),
    Fused(
        Case("upsampled", T=21, C=24, O=20, E=2, padding=3), "relu", wanted=(True, False, False)
    ),
    Fused(Case("upsampled_groups", T=21, C=24, O=12, G=2, E=3, S=2, padding=3), None),
    # With a tile of its own: see `tests.triton_cases.own_tile`.
    Fused(Case("resident", T=192, C=40, O=24, D=7, batch=(3,), **_BFLOAT16), "gelu"),
    Fused(Case("several", T=70, C=10, O=15, K=4, D=5), "silu", wanted=(False, True, True)),
    Fused(Case("resident_narrow", T=150, C=72, O=24, D=7, batch=(3,), **_BFLOAT16), None),
    Fused(Case("resident_narrow_out", T=150, C=40, O=136, D=7, batch=(3,), **_BFLOAT16), None),
    Fused(Case("summed", T=350, C=24, O=40, D=7, batch=(3,), **_BFLOAT16), "relu"),
)  # fmt: skip


def named(name: str) -> Fused:
    (found,) = (fused for fused in FUSED if fused.name == name)
    return found
