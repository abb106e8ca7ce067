"""``python -m conv_pallas``: what the package can show from the command line."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from conv_pallas import dispatch

_EXTRAS = {"demo": ("matplotlib", "optax", "rich", "sklearn")}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that ``argv`` names; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        return options.run(options)
    except KeyboardInterrupt:
        # A second Ctrl-C, while this one is being dealt with, would end in a traceback.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("\ninterrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m conv_pallas", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a TCN, compare it with stock layers, time a dozen published layers",
        description="Trains a TCN on handwritten digits that it reads one pixel at a time, checks "
        "outputs and gradients against the same model of stock flax.nnx.Conv layers, then times "
        "published layers on this machine, stock against conv_pallas.",
    )
    demo.set_defaults(run=_demo)
    demo.add_argument(
        "--epochs", type=_positive, metavar="N", help="passes over the training set (default: 25)"
    )
    demo.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of split, parameters, order and dropout"
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="where the pictures go (default: %(default)s)",
    )
    demo.add_argument(
        "--implementation",
        type=_implementation,
        metavar="NAME",
        help=f"one of {', '.join(dispatch.IMPLEMENTATIONS)}; several, with commas, are tried in "
        "order (default: the fastest known)",
    )
    demo.add_argument(
        "--no-benchmark", action="store_true", help="only train and compare, time nothing"
    )
    demo.add_argument(
        "--quick",
        action="store_true",
        help="a smaller TCN, two epochs, two layers: shows that it works, learns and tells little",
    )
    return parser


def _demo(options: argparse.Namespace) -> int:
    try:
        from conv_pallas import demo
    except ModuleNotFoundError as e:
        if e.name not in _EXTRAS["demo"]:
            raise
        return _fail(f"the demo needs {e.name}: pip install 'conv_pallas[demo]'")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        return _fail(f"--output must be a folder that can be written to: {e}")
    try:
        return demo.run(
            epochs=options.epochs,
            seed=options.seed,
            output=options.output,
            implementation=options.implementation,
            benchmark=not options.no_benchmark,
            quick=options.quick,
        )
    except NotImplementedError as e:
        if options.implementation is None:
            raise
        return _fail(str(e))  # an order that can't be followed here; it tells why


def _fail(message: str) -> int:
    print(f"python -m conv_pallas: {message}", file=sys.stderr)
    return 1


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an int of 1 or more, got {text!r}")
    return value


def _implementation(text: str) -> tuple[str, ...]:
    try:
        return dispatch.canonicalize(tuple(name.strip() for name in text.split(",")))
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


if __name__ == "__main__":
    sys.exit(main())
