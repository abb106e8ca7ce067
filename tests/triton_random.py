"""Geometry at random for the Triton kernels, on Triton's interpreter.

    python -m tests.triton_random --seed 0 --minutes 10

The cases of `tests.triton_cases` are what somebody thought of; this is for what nobody did. Each
seed is a layer, a tile and a chip, of which all operations run, and the fused ones; the line of one
that fails tells its seed, and ``--seed SEED --cases 1`` repeats it.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import os
import random
import sys
import time
import traceback
from unittest import mock

os.environ |= {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}  # before both are imported

import numpy as np

from conv_pallas import _tuning_gpu, dispatch
from conv_pallas.kernels import (
    triton_compat,
    triton_depthwise,
    triton_depthwise_walk,
    triton_tuned,
)
from conv_pallas.spec import ACTIVATIONS, OPERATIONS
from tests.cases import Case
from tests.triton_epilogue import Fused
from tests.triton_interpreter import check_operation

CHANNELS = (
    1, 2, 3, 5, 8, 10, 12, 16, 17, 24, 25, 30, 32, 33, 40, 48, 64, 65, 72, 96, 100, 128, 136,
)  # fmt: skip
TAPS = (1, 2, 2, 3, 3, 3, 4, 4, 5, 7, 8, 9, 11, 17, 19, 33)
DILATIONS = (1, 1, 1, 2, 3, 4, 5, 7, 8, 16, 33, 64, 130)
# Small tiles, of which a layer has several: see `conv_pallas._tuning_gpu`.
WALKED = ((4, 16, 16, 1), (2, 16, 8, 2), (2, 32, 8, 1), (1, 16, 4, 1))
MANY_TAPS = ((4, 16, 5, 1), (2, 16, 16, 1), (4, 16, 11, 1))
MOST_PRODUCTS = 2e7  # the interpreter has one core
WANTED = [w for w in itertools.product((True, False), repeat=3) if any(w)]


def draw(r: random.Random) -> Case:
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
    T = r.choice((1, 2, r.randint(1, 40), r.randint(20, 200), r.randint(100, 350)))
    reach = (K - 1) * D
    pads = ((reach, r.randint(0, 9)), (r.randint(-4, reach + 20), r.randint(-4, reach + 20)))
    padding = r.choice(("CAUSAL", "CAUSAL", "SAME", "VALID", "SAME_LOWER", *([p] for p in pads)))
    E = 1 if isinstance(padding, str) else E
    dtype = r.choice(("bfloat16", "bfloat16", "float16", "float32", "float32"))
    precision = r.choice((None, "high", "highest")) if dtype == "float32" else None
    out = r.choice((None, None, "float32")) if dtype != "float32" else None
    batch = (r.choice((1, 1, 2, 3)),)
    return Case("drawn", batch, T, C, O, K, D, S, E, G, padding, dtype, out, precision)


@contextlib.contextmanager
def somewhere(r: random.Random, case: Case):
    """On one of the chips, with a tile of some sort; yields both."""
    tiles = _tuning_gpu.DENSE_TILES + 4 * _tuning_gpu.FEW_TILES
    if case.problem("conv1d").depthwise:
        tiles = WALKED if case.K <= 8 else MANY_TAPS
    tile = r.choice((None, r.choice(tiles)))
    capability, few, uncached = r.choice((80, 90, 90, 100)), r.random() < 0.5, r.random() < 0.2
    with contextlib.ExitStack() as stack:
        patch = lambda *how: stack.enter_context(mock.patch.object(*how))  # noqa: E731
        patch(triton_compat, "compute_capability", lambda: capability)
        if tile is not None:
            stack.enter_context(triton_tuned.trial(tile))
        if few:  # programs that stay, so that each has several tiles
            patch(triton_compat, "processors", lambda: 2)
            patch(triton_depthwise_walk, "PROCESSORS", 1)
        if uncached:  # a halo that no cache holds
            patch(triton_depthwise, "L2_BYTES", 0)
        yield f"sm_{capability}, tile {tile}{', few programs' * few}{', no cache' * uncached}"


def run_fused(fused: Fused) -> None:
    problem = fused.problem()
    kernel = dispatch.select(problem, ("triton",))
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


def one(seed: int) -> str:
    """What came of a seed: "right", "wrong", or why there was nothing to run."""
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
            for operation in OPERATIONS:
                check_operation(case, operation)
            if case.out_dtype is None and any(fused.wanted):
                run_fused(fused)
        except Exception:
            geometry = {k: v for k, v in dataclasses.asdict(case).items() if k != "name"}
            print(f"WRONG seed {seed}: {geometry}, {fused.name}, on {where}", flush=True)
            traceback.print_exc(file=sys.stdout)
            return "wrong"
    return "right"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the first case (default: 0)")
    parser.add_argument("--cases", type=int, help="after which to stop")
    parser.add_argument("--minutes", type=float, default=10.0, help="after which to stop (10)")
    options = parser.parse_args(arguments)
    end, came = time.monotonic() + 60 * options.minutes, collections.Counter()
    for seed in itertools.count(options.seed):
        if time.monotonic() > end or seed - options.seed == options.cases:
            break
        came[one(seed)] += 1
    print(f"seeds {options.seed} to {seed - 1}: {dict(came)}")
    return min(came["wrong"], 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
