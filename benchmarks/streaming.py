"""How long one step of a stream takes: ``python -m benchmarks.streaming``.

The rival computes the forward pass over the receptive field anew for each step, which is what one
does without a state. Two networks have the same levels and taps, and receptive fields of about
1,000 and 100,000 steps: the step of the stream must not tell them apart. The rival is timed for
the smaller one alone. All variants take turns; see `conv_pallas._measure`.

The result goes to ``benchmarks/results/<device>/streaming.json``, that of ``--quick`` to
``bench-output/streaming.json``.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import stored
from conv_pallas import _measure
from conv_pallas.nn import TCN, compiled_step

CHANNELS, LEVELS, TAPS = 32, 8, 3
# Receptive field 1 + 2 * (TAPS - 1) * (sum of the dilations).
FIELDS = {"1k": [2**level for level in range(LEVELS)], "100k": [98 * 2**x for x in range(LEVELS)]}
BATCHES = (1, 32, 256)
OUTPUT = Path("bench-output")


def network(dilations, seed: int = 0) -> TCN:
    model = TCN(
        CHANNELS, [CHANNELS] * len(dilations), CHANNELS, TAPS, 0.0, nnx.Rngs(seed),
        dilations=dilations,
    )  # fmt: skip
    model.eval()
    return model


def stepper(model: TCN, batch: int):
    """A call without arguments that does one step, of a stream that has begun."""
    step, state = compiled_step(model), model.init_state(batch)
    x = jnp.ones((batch, 1, CHANNELS))

    def call():
        nonlocal state
        y, state = step(x, state)
        return y

    for _ in range(3):  # the first compiles
        call().block_until_ready()
    return call


def forward(model: TCN, batch: int):
    """A call without arguments that computes the last step over the whole receptive field."""
    graph, variables = nnx.split(model)
    x = jnp.ones((batch, model.receptive_field, CHANNELS))
    whole = jax.jit(lambda variables, x: nnx.merge(graph, variables)(x)[:, -1:])
    return lambda: whole(variables, x)


def check(model: TCN) -> None:
    """That the stream computes what the forward pass does, before either is timed.

    Raises:
      DisagreementError: it doesn't.
    """
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 40, CHANNELS)), jnp.float32)
    step, state, outputs = compiled_step(model), model.init_state(1), []
    for t in range(x.shape[1]):
        y, state = step(x[:, t : t + 1], state)
        outputs.append(y)
    expected = nnx.jit(lambda model, x: model(x))(model, x)
    off = _measure.difference(expected, jnp.concatenate(outputs, 1))
    if not off < 1e-4:
        raise _measure.DisagreementError(f"the stream is off by {off:.2g} of the largest element")


def measure(batch: int, settings: _measure.Settings) -> dict:
    """Seconds a call of each variant, round by round."""
    models = {name: network(dilations) for name, dilations in FIELDS.items()}
    check(models["1k"])
    calls = {f"step {name}": stepper(model, batch) for name, model in models.items()}
    calls["forward 1k"] = forward(models["1k"], batch)
    seconds, ratio = _measure.interleaved(calls, settings), _measure.ratio
    return {
        "batch": batch,
        "receptive_field": {name: model.receptive_field for name, model in models.items()},
        "state_bytes": {
            name: sum(leaf.nbytes for leaf in jax.tree.leaves(model.init_state(batch)))
            for name, model in models.items()
        },
        "seconds": {name: [float(f"{s:.4g}") for s in times] for name, times in seconds.items()},
        "100k_over_1k": round(ratio(seconds["step 100k"], seconds["step 1k"]).median, 3),
        "forward_over_step": round(ratio(seconds["forward 1k"], seconds["step 1k"]).median, 1),
    }


def table(results: list[dict]) -> Table:
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("batch", "step 1k µs", "step 100k µs", "100k / 1k", "forward 1k µs", "×"):
        rows.add_column(column, justify="right")
    for r in results:
        medians = {name: 1e6 * statistics.median(times) for name, times in r["seconds"].items()}
        rows.add_row(
            str(r["batch"]), *(f"{medians[name]:.0f}" for name in ("step 1k", "step 100k")),
            f"{r['100k_over_1k']:.2f}", f"{medians['forward 1k']:.0f}",
            f"{r['forward_over_step']:.1f}",
        )  # fmt: skip
    return rows


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--quick", action="store_true", help="few rounds; only to see that it runs")
    parser.add_argument("--output", type=Path, help="a JSON file; default: see above")
    options = parser.parse_args(arguments)
    settings = _measure.QUICK if options.quick else _measure.Settings()
    start, console = time.perf_counter(), Console(highlight=False)
    results = [measure(batch, settings) for batch in options.batches]
    console.print(table(results))
    console.print(
        f"× : times that forward takes longer than a step; {time.perf_counter() - start:.0f} s"
    )
    host = _measure.host() | {"commit": stored.commit()}
    kept = Path(__file__).parent / "results" / host["platform"]
    path = options.output or (OUTPUT if options.quick else kept) / "streaming.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"host": host, "channels": CHANNELS, "levels": LEVELS, "taps": TAPS}
    path.write_text(json.dumps(result | {"measurements": results}, indent=1) + "\n")
    console.print(f"stored in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
