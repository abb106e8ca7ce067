"""The TPU kernels on Pallas's interpreter, on the CPU and with race detection.

Memory that was not written reads as NaN, what is read or written out of bounds raises, and so
does a race.
"""

import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from conv_pallas.kernels.tpu_window import Chip
from conv_pallas.spec import Problem, lhs_rhs_out
from tests.cases import Case
from tests.tolerance import check

V5E = Chip(vmem=128 * 2**20, mxu=128, cores=1)
MEGACORE = Chip(vmem=16 * 2**20, mxu=128, cores=2)


def params(cores: int = 1) -> pltpu.InterpretParams:
    return pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", num_cores_or_threads=cores
    )


@pytest.fixture(autouse=True)
def fresh_interpreter():
    """What an interpreted kernel leaves behind when it raises must not reach the next."""
    pltpu.reset_tpu_interpret_mode_state()
    yield
    found = raced()
    pltpu.reset_tpu_interpret_mode_state()
    assert not found


def raced() -> bool:
    """Whether a race was found since the last reset. Since jax 0.12 it raises instead."""
    return interpreter.races is not None and interpreter.races.races_found


def unable(module, problem: Problem) -> str | None:
    """Why a kernel can't; None: it can, though another may be faster."""
    return getattr(module, "unable", module.decline)(problem)


def check_kernel(module, case: Case, operation: str, chip: Chip = V5E, longest=16) -> np.ndarray:
    """Interprets one operation in tiles of ``longest`` steps; returns what it computed."""
    problem = case.problem(operation, "tpu")
    lhs, rhs, _ = lhs_rhs_out(operation, *case.arrays())
    assert unable(module, problem) is None
    out = module.launch(problem, lhs, rhs, chip, longest=longest, interpret=params(chip.cores))
    check(
        out, operation, lhs, rhs, case.spec, out_dtype=problem.out_dtype,
        precision=case.precision, platform="tpu",
    )  # fmt: skip
    return np.asarray(out)
