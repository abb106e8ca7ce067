"""What the tests of `tune` on a GPU have in common."""

import jax.numpy as jnp

from conv_pallas import _tuning_gpu, aot, explain, tuning

DENSE = (2, 512, 64), (4, 64, 64)  # x and kernel, in bfloat16
D4 = dict(kernel_dilation=4)


def structs(shapes=DENSE, dtype=jnp.bfloat16):
    """Of x and the kernel."""
    return tuple(aot.struct(shape, dtype) for shape in shapes)


def tune_quietly(*args, **more):
    return tuning.tune(*args, **more, report=lambda line: None)


def tune_dense(**geometry):
    return tune_quietly(*structs(), **geometry)


def who_runs(x=DENSE[0], w=DENSE[1], dtype=jnp.bfloat16, **geometry) -> list[str]:
    """Who runs each operation on that H200."""
    told = explain(*structs((x, w), dtype), platform="cuda", **geometry)
    return list(told.chosen.values())


def trials_of(**geometry):
    (convolution,) = tuning._convolutions(*structs(), geometry, print, "cuda")
    return list(_tuning_gpu._trials(convolution))
