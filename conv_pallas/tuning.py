"""Measures on the GPU or CPU at hand what is the fastest there.

    from conv_pallas.tuning import tune

    tune(model, x)  # each convolution of a model
    tune(x, kernel, kernel_dilation=8)  # or one

prints what it tries and writes what it finds to a file for that kind of device, in the folder of
the kernels, or in the one that the environment variable ``CONV_PALLAS_TUNED`` names, where every
later compilation on such a device finds it. Nothing else in the package measures.

On a GPU a Triton kernel gets the tile that was the fastest (``triton_tuned_<device>.json``), and
where it was faster than XLA with that it is the default. Where it is not far ahead of what rules
choose of XLA's formulations, those race as well, and XLA runs the fastest. Without, the kernels
take what a heuristic says, and run where they are asked for by name, or where measurements that
come with the package, of that kind of device or one that is like it, speak for them.

On a CPU each operation gets the formulation that was the fastest (``xla_tuned_<processor>.json``),
in the place of what rules say that were measured on another. See `_tuning_gpu` and `_tuning_cpu`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from conv_pallas import _tuning_cpu, _tuning_gpu, dispatch, explanation, tracing
from conv_pallas.ops import conv1d
from conv_pallas.spec import OPERATIONS
from conv_pallas.tracing import Convolution


def tune(
    x: Any,
    kernel: Any,
    *,
    file: str | Path | None = None,
    seconds: float = math.inf,
    report: Callable[[str], None] = print,
    quick: bool = False,
    processes: int = 1,
    **arguments: Any,
) -> dict[str, tuple[int, ...] | str]:
    """Tunes a layer or a model for the GPU or CPU at hand, forward and both gradients.

    What it finds holds for the shapes it is given, N and T up to the next power of two: those that
    one device has where a mesh splits them, in training and in evaluation.

    Args:
      x, kernel: ``(*batch, T, C)`` and ``(K, C // G, O)``, arrays or anything with shape and
        dtype; their values do not matter. Or a model, or a function, and its input: then each of
        its convolutions is tuned, but for those that the Triton kernels can't run, on a GPU, and
        those that are told to run otherwise.
      file: where to write; None: where compilations look. What is in it for other shapes stays.
      seconds: for all operations; each has its share of what those before it have left. Once it
        is up no further tile or formulation is compiled, and the best of those that were is taken.
        On a CPU what has had no turn by then stays as it was.
      report: is given a line for each thing that is tried.
      quick: race no tiles, but those in use alone with XLA; on a CPU take less time for each.
      processes: how many tune other layers on this GPU at the same time, into the same file.
        They take turns on it, and each has its share of ``seconds``.
      arguments: of arrays, further ones of `conv1d`, its ``bias`` among them, but for
        ``implementation``; of a model or a function, further ones of its call, such as its mask.

    Returns:
      The tile, or the formulation, of each key that was tuned, as written; only those clearly
      faster than what the heuristic, or the rules, say. What is compiled already stays as it is:
      `jax.clear_caches` drops it. Processes of one program, on several hosts, must find the same
      file, or they would compile different programs: let one of them tune.

    Raises:
      RuntimeError: JAX runs on neither an NVIDIA GPU nor a CPU; or some kernel fails, of which the
        first is told once all others are measured, or at once where it takes the device along.
      ModuleNotFoundError: triton or jax-triton is not installed, on a GPU.
      NotImplementedError: the Triton kernels can't run this layer; says why.
      TypeError: there is geometry, precision or implementation beside a model, or implementation
        beside arrays.
      ValueError: the file holds something else; or there are several processes on a CPU.
      OSError: the file can't be written.
    """
    file = None if file is None else Path(file)
    platform = explanation.default_platform()
    if platform == "cpu":
        if processes != 1:
            raise ValueError(f"processes must be 1 on a CPU, which each has whole; got {processes}")
        convolutions = _convolutions(x, kernel, arguments, report, "cpu")
        return _tuning_cpu.tune(convolutions, file, seconds, report, quick)
    if platform != "cuda":
        raise RuntimeError(f"tune needs an NVIDIA GPU or a CPU, and JAX runs on {platform}")
    import conv_pallas.kernels.triton_compat  # noqa: F401 - which says what is not installed

    convolutions = _convolutions(x, kernel, arguments, report, "cuda")
    return _tuning_gpu.tune(convolutions, file, seconds, report, quick, processes)


def _convolutions(x, kernel, arguments, report, platform: str) -> list[Convolution]:
    """Those that are to be tuned, each once."""
    implementation = {"cpu": "xla", "cuda": "triton"}[platform]
    if arguments.get("implementation") is not None and not callable(x):
        raise TypeError("implementation is not for tune, which finds out what is fastest")
    if callable(x):
        tracing.refuse(arguments)
        found, left = tracing.convolutions(x, kernel, **arguments)
        if left:
            report(f"{left} left to jax.lax.conv_general_dilated, as stock layers are")
    else:
        options = dict(arguments)
        bias = options.pop("bias", None)
        arrays = (x, kernel) if bias is None else (x, kernel, bias)
        layer = functools.partial(conv1d, **options | dict(implementation=implementation))
        found, _ = tracing.convolutions(layer, *map(_struct, arrays))
    chosen = {}
    for traced, _ in found:
        convolution, _ = traced.on(platform)
        if convolution.packed and platform == "cpu":
            report(f"{convolution}: there is nothing to choose")
            continue
        convolution = dataclasses.replace(convolution, packed=False)  # of the same tile
        # How the batch is shaped makes it no other, and on a GPU bias and activation don't.
        one = convolution.in_groups() if platform == "cuda" else convolution
        one = dataclasses.replace(one.of_one_batch_axis(), implementation=None)
        if one in chosen:
            continue
        ordered = convolution.implementation
        if ordered is not None and implementation not in ordered:
            report(f"{convolution}: is to run as {', '.join(ordered)}")
            continue
        try:
            for operation in OPERATIONS:
                dispatch.select(one.problem(operation, platform), (implementation,))
        except NotImplementedError as e:
            if not callable(x):
                raise
            report(f"{convolution}: {e}")
        else:
            chosen[one] = True
    if not chosen:
        report("there is nothing to tune")
    return list(chosen)


def _struct(a):
    return jax.ShapeDtypeStruct(a.shape, a.dtype)
