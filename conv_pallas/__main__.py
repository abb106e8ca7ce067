"""``python -m conv_pallas``: what the package can show from the command line."""

import argparse
import contextlib
import dataclasses
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from conv_pallas import aot, dispatch
from conv_pallas.spec import PLATFORMS

_EXTRAS = {
    "demo": ("matplotlib", "optax", "rich", "sklearn"),
    "cuda": ("triton", "jax_triton"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that ``argv`` names; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 128 + signal.SIGPIPE
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
    _add_inspect(commands)
    _add_explain(commands)
    _add_tune(commands)
    return parser


def _add_inspect(commands) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="what a layer becomes on a chip that need not be here",
        description="Which kernel and tile, and why; operations, bytes and the bound; registers, "
        "shared memory, spills, occupancy and instructions from the machine code, or bundles, "
        "matrix unit and VMEM from the schedule; beside what XLA makes of its formulation and "
        "of the stock layer. "
        "Nothing runs: no figure is a measured speed. Needs the extra aot (make venv-aot).",
    )
    inspect.set_defaults(run=_inspect)
    _add_layer(inspect, "+")
    inspect.add_argument(
        "--chip", required=True, metavar="CHIP", help=f"one of {', '.join(aot.CHIPS)}"
    )
    inspect.add_argument(
        "--implementation",
        type=_implementation,
        metavar="NAME",
        help="as in the library (default: the kernel that is made for the chip)",
    )
    inspect.add_argument(
        "--dump",
        type=Path,
        metavar="DIR",
        help="leave HLO, and Triton IR, PTX and SASS, or Mosaic and the schedule, in this folder",
    )


def _add_explain(commands) -> None:
    explain = commands.add_parser(
        "explain",
        help="what would run here, and why not the rest",
        description="For a layer, or for one of each kind: which implementation runs each "
        "operation on this machine or another platform, and why the others do not.",
    )
    explain.set_defaults(run=_explain)
    _add_layer(explain, "*")
    where = explain.add_mutually_exclusive_group()
    where.add_argument("--platform", choices=PLATFORMS, help="default: that of the default device")
    where.add_argument(
        "--chip", choices=aot.CHIPS, metavar="CHIP",
        help=f"one of {', '.join(aot.CHIPS)}, which need not be here: what is the default may "
        "differ from one to another; needs the extra aot (make venv-aot)",
    )  # fmt: skip
    explain.add_argument(
        "--implementation", type=_implementation, metavar="NAME", help="as in the library"
    )


def _add_tune(commands) -> None:
    tune = commands.add_parser(
        "tune",
        help="measure on the GPU or CPU at hand what is the fastest for a layer",
        description="On a GPU: tries tiles of the Triton kernels and XLA's formulations; what was "
        "the fastest is the default from then on. Needs the extra cuda. On a CPU: which "
        "formulation is the fastest; otherwise rules choose it. Writes what it finds to where "
        "later compilations look. To tune a model of your own, call "
        "conv_pallas.tuning.tune(model, x).",
    )
    tune.set_defaults(run=_tune)
    _add_layer(tune, "+")
    tune.add_argument(
        "--seconds", type=_positive, metavar="N", help="after which nothing more is tried"
    )
    tune.add_argument(
        "--quick", action="store_true",
        help="try no tiles, compare the ones in use with XLA's formulations; on a CPU take less "
        "time for each",
    )  # fmt: skip


def _add_layer(parser, count: str) -> None:
    parser.add_argument(
        "layer",
        nargs=count,
        metavar="LAYER",
        help="a published layer's name, such as wavenet/D512, or a shape, such as "
        "N=8 T=4096 C=512 K=3 D=4 activation=relu dtype=bfloat16",
    )
    parser.add_argument("--dtype", metavar="DTYPE", help="instead of the layer's own")


def _layer(words: Sequence[str], dtype: str | None):
    from conv_pallas import inspection

    layer = inspection.parse_layer(words)
    dtype = dtype or layer.dtype
    if dtype not in inspection.DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(inspection.DTYPES)}, got {dtype!r}")
    return dataclasses.replace(layer, dtype=dtype)


def _inspect(options: argparse.Namespace) -> int:
    from conv_pallas import inspection

    inspection.jax_without_devices()
    try:
        layer = _layer(options.layer, options.dtype)
        if options.chip not in aot.CHIPS:
            raise ValueError(f"--chip must be one of {', '.join(aot.CHIPS)}, got {options.chip!r}")
        if options.dump is not None:
            options.dump.mkdir(parents=True, exist_ok=True)
    except (ValueError, TypeError) as e:
        return _fail(str(e))
    except OSError as e:
        return _fail(f"--dump must be a folder that can be written to: {e}")
    try:
        inspection.inspect(
            layer, options.chip, implementation=options.implementation, dump=options.dump
        )
    except (NotImplementedError, aot.MissingWheelError) as e:
        return _fail(str(e))  # what can't be done here; it tells why
    return 0


def _explain(options: argparse.Namespace) -> int:
    from conv_pallas import inspection
    from conv_pallas.explanation import explain

    # A dense layer and a depthwise one, for who names none.
    wanted = [options.layer] if options.layer else [["wavenet/D512"], ["conv-tasnet/D128"]]
    platform, on = options.platform, contextlib.nullcontext()
    try:
        if options.chip is not None:
            inspection.jax_without_devices()
            platform = aot.platform_of(options.chip)
            on = aot.as_on(options.chip)
        with on:
            for words in wanted:
                layer = _layer(words, options.dtype)
                print(f"{layer.name}: {layer}, {layer.dtype}")
                x, kernel, bias, _ = inspection.structs(layer)
                print(explain(
                    x, kernel, bias, platform=platform, **layer.geometry,
                    activation=layer.activation, implementation=options.implementation,
                ))  # fmt: skip
    except (ValueError, TypeError, NotImplementedError, aot.MissingWheelError) as e:
        return _fail(str(e))
    return 0


def _tune(options: argparse.Namespace) -> int:
    from conv_pallas import explanation, inspection, tuning

    try:
        layer = _layer(options.layer, options.dtype)
        x, kernel, bias, _ = inspection.structs(layer)
        tuning.tune(
            x, kernel, bias=bias, activation=layer.activation, **layer.geometry,
            seconds=options.seconds or math.inf, quick=options.quick,
        )  # fmt: skip
    except (ValueError, TypeError, NotImplementedError) as e:
        return _fail(str(e))
    except RuntimeError as e:
        if explanation.default_platform() in ("cpu", "cuda"):
            raise
        return _fail(str(e))
    except ModuleNotFoundError as e:
        if e.name not in _EXTRAS["cuda"]:
            raise
        return _fail(f"tune needs {e.name}: pip install '.[cuda]' in its folder")
    except OSError as e:
        from conv_pallas.kernels.records import ENVIRONMENT_VARIABLE

        return _fail(f"name a folder that can be written to in {ENVIRONMENT_VARIABLE}: {e}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    try:
        from conv_pallas import demo
    except ModuleNotFoundError as e:
        if e.name not in _EXTRAS["demo"]:
            raise
        return _fail(f"the demo needs {e.name}: pip install '.[demo]' in its folder")
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
