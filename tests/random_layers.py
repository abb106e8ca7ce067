"""Layers at random, seed by seed: what `tests.triton_random` and its like share."""

import argparse
import collections
import dataclasses
import itertools
import random
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

import numpy as np

from conv_pallas import kernels
from conv_pallas.kernels import Kernel
from conv_pallas.spec import ACTIVATIONS
from tests import added_kernels
from tests.cases import Case
from tests.support import shipped_alone
from tests.triton_epilogue import Fused

CHANNELS = (
    1, 2, 3, 5, 8, 10, 12, 16, 17, 24, 25, 30, 32, 33, 40, 48, 64, 65, 72, 96, 100, 128, 136,
)  # fmt: skip
TAPS = (1, 2, 2, 3, 3, 3, 4, 4, 5, 7, 8, 9, 11, 17, 19, 33)
DILATIONS = (1, 1, 1, 2, 3, 4, 5, 7, 8, 16, 33, 64, 130)
MOST_PRODUCTS = 2e7  # an interpreter has one core
WANTED = [w for w in itertools.product((True, False), repeat=3) if any(w)]


def draw(r: random.Random) -> Case:
    """Any geometry, dtype and precision; no tap of it need see anything."""
    kind = r.choice(("dense", "dense", "depthwise", "depthwise", "multiplier", "grouped"))
    few = CHANNELS[:14]
    if kind == "dense":
        G, C, O = 1, r.choice(CHANNELS), r.choice(CHANNELS)
    elif kind == "grouped":
        G = r.choice((2, 3, 4, 8))
        C, O = G * r.choice(few), G * r.choice(few)
    else:
        G = C = r.choice(CHANNELS if kind == "depthwise" else few)
        O = G if kind == "depthwise" else G * r.choice((2, 3, 4))
    K, D = r.choice(TAPS), r.choice(DILATIONS)
    S, E = r.choice((1, 1, 1, 2, 3, 4)), r.choice((1, 1, 1, 1, 2, 3, 4))
    short, long = (
        (r.randint(1, 40), r.randint(20, 200)),
        (r.randint(100, 350), r.randint(300, 2500)),
    )
    T = r.choice((1, 2, *short, *long))
    reach = (K - 1) * D
    pads = ((reach, r.randint(0, 9)), (r.randint(-4, reach + 20), r.randint(-4, reach + 20)))
    padding = r.choice(("CAUSAL", "CAUSAL", "SAME", "VALID", "SAME_LOWER", *([p] for p in pads)))
    E = 1 if isinstance(padding, str) else E
    dtype = r.choice(("bfloat16", "bfloat16", "float16", "float32", "float32"))
    precision = r.choice((None, "high", "highest")) if dtype == "float32" else None
    out = r.choice((None, None, "float32")) if dtype != "float32" else None
    batch = (r.choice((1, 1, 2, 3)),)
    return Case("drawn", batch, T, C, O, K, D, S, E, G, padding, dtype, out, precision)


def check_fused(fused: Fused, kernel: Kernel) -> None:
    """Bias and activation in a kernel, and their gradients, unless it declines them."""
    problem = fused.problem()
    if kernel.fused is None or kernel.decline_fused(problem):
        return
    x, w, bias, gy, saved = fused.arrays()
    fused.check_forward(np.asarray(kernel.fused(problem, x, w, bias)), x, w, bias)
    keep = dataclasses.replace(problem, epilogue=dataclasses.replace(problem.epilogue, keep=True))
    if problem.epilogue.saved == "z" and not kernel.recomputes(problem) and kernel.keeps(keep):
        fused.check_kept(kernel, x, w, bias)
    if kernel.decline_backward(problem, fused.wanted) is None:
        out = kernel.backward(problem, x, w, bias, saved, gy, fused.wanted)
        fused.check_backward(out, x, w, bias, gy)


def _one(seed: int, draw, somewhere, run) -> str:
    """What came of a seed: what ``run`` returned, "wrong", or why there was nothing to run."""
    r = random.Random(seed)
    case = dataclasses.replace(draw(r), name=f"seed {seed}")
    try:
        spec = case.spec
    except ValueError:
        return "refused"  # padding that crops off more than there is
    steps = case.batch[0] * max(spec.out_time, case.T)
    if spec.out_time < 1:
        return "empty"
    if steps * case.K * case.C * case.O // case.G > MOST_PRODUCTS:
        return "large"
    bias, wanted = r.random() < 0.7, r.choice(WANTED)
    fused = Fused(case, r.choice((None, *ACTIVATIONS)), bias, (*wanted[:2], wanted[2] and bias))
    with somewhere(r, case) as where:
        try:
            return run(fused, where)
        except Exception:
            geometry = {k: v for k, v in dataclasses.asdict(case).items() if k != "name"}
            print(f"WRONG seed {seed}: {geometry}, {fused.name}, on {where}", flush=True)
            print(traceback.format_exc(), flush=True)
            return "wrong"


def main[Where](
    about: str,
    draw: Callable[[random.Random], Case],
    somewhere: Callable[[random.Random, Case], AbstractContextManager[Where]],
    run: Callable[[Fused, Where], str],
    alone: Callable[[str, Fused], str],
    arguments: list[str],
) -> int:
    """A program that runs seeds one after the other, and tells of each that went wrong.

    Args:
      about: in a line what it is, for ``--help``.
      draw: the layer of a seed.
      somewhere: where it runs, a chip and a tile; within it that is what the kernels see.
      run: ``run(fused, where)`` raises where a result is wrong; else it says in a word what came.
      alone: ``alone(file, fused)`` likewise, of an added kernel.
      arguments: of the command line.

    Returns:
      The exit status: 1 where anything is wrong.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seed", type=int, default=0, help="of the first case (default: 0)")
    parser.add_argument("--cases", type=int, help="after which to stop")
    parser.add_argument("--minutes", type=float, default=10.0, help="after which to stop (10)")
    parser.add_argument("--kernel", metavar="FILE", help="of an added one (default: the shipped)")
    options = parser.parse_args(arguments)
    discover = shipped_alone()
    if options.kernel is not None:
        try:
            added_kernels.of_file(options.kernel)
        except LookupError as e:
            parser.error(e.args[0])
        discover, run = kernels.discover, lambda fused, where: alone(options.kernel, fused)
    end, came = time.monotonic() + 60 * options.minutes, collections.Counter()
    for seed in itertools.count(options.seed):
        if time.monotonic() > end or seed - options.seed == options.cases:
            break
        with mock.patch.object(kernels, "discover", discover):
            came[_one(seed, draw, somewhere, run)] += 1
    print(f"seeds {options.seed} to {seed - 1}: {dict(came)}")
    return min(came["wrong"], 1)
