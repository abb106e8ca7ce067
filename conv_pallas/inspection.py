"""``python -m conv_pallas inspect``: what a layer becomes on a chip that need not be here.

Which kernel, and why; what arithmetic and bytes allow; what the compiler made of it, beside what
XLA makes of the formulation that ``"xla"`` takes and of the stock layer. All of it is read from
compilers' output or computed: nothing runs, and no figure here is a measured speed. Needs the extra
``aot``.
"""

import dataclasses
import math
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax.experimental.pallas import tpu as pltpu

from conv_pallas import aot, schedule
from conv_pallas._layers import Layer, find
from conv_pallas.dispatch import Implementation
from conv_pallas.explanation import explain

# The kernels that each platform is for, and what takes over where they decline.
KERNELS = {"cuda": ("triton", "xla"), "tpu": ("pallas_tpu", "xla")}

# Of the data sheets: bytes/s, and dense operations/s of the tensor cores.
_GPU_LIMITS = {
    "a100": (2.039e12, {"bfloat16": 312e12, "float16": 312e12, "float32": 156e12}),
    "h100": (3.35e12, {"bfloat16": 989e12, "float16": 989e12, "float32": 494e12}),
    "h200": (4.8e12, {"bfloat16": 989e12, "float16": 989e12, "float32": 494e12}),
    "b200": (8.0e12, {"bfloat16": 2250e12, "float16": 2250e12, "float32": 1125e12}),
}

DTYPES = ("float32", "bfloat16", "float16")
_SIZES = {"N", "T", "C", "O", "K", "D", "S", "E", "G"}
_WORDS = {"padding", "activation", "dtype"}


def parse_layer(words: Sequence[str]) -> Layer:
    """A layer by its name, or by its shape as ``N=8 T=4096 C=512 K=3 D=4``.

    Of a shape N is 1, O is C, D, S, E (the input's dilation) and G are 1 where they are not given;
    ``padding``, a word or a number, ``activation`` and ``dtype`` may follow.

    Args:
      words: of a command line, ``["wavenet/D512"]`` or ``["N=8", "T=4096", ...]``.

    Raises:
      ValueError: there is no such layer, or the shape is none.
    """
    words = " ".join(words).split()  # a shape may have been quoted
    if len(words) == 1 and "=" not in words[0]:
        return find(words[0])
    fields: dict[str, str | int] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key in fields:
            raise ValueError(f"a shape has one {key}, got {' '.join(words)!r}")
        if key in _SIZES and value.isdecimal() and 0 < int(value) < 2**31:
            fields[key] = int(value)
        elif key in _WORDS and value:
            fields[key] = value.upper() if key == "padding" else value
            if key == "padding" and value.isdecimal():
                fields[key] = int(value)
        else:
            raise ValueError(
                f"a shape is made of {', '.join(sorted(_SIZES))} with an int of 1 or more, and "
                f"{', '.join(sorted(_WORDS))} with a word, such as T=4096 C=512 K=3 D=4; "
                f"got {word!r}"
            )
    missing = {"T", "C", "K"} - fields.keys()
    if missing:
        raise ValueError(f"a shape needs T, C and K, got no {', '.join(sorted(missing))}")
    padding = fields.get("padding", "CAUSAL")
    if isinstance(padding, str) and padding not in ("CAUSAL", "SAME", "VALID"):
        raise ValueError(f"padding must be CAUSAL, SAME, VALID or a number, got {padding!r}")
    if fields.get("dtype", "float32") not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {fields['dtype']!r}")
    defaults = {"N": 1, "O": fields["C"]}
    layer = Layer(name="layer", source="the command line", **(defaults | fields))
    jax.eval_shape(layer.ours(), *structs(layer)[:3])  # says what does not fit
    return layer


def structs(layer: Layer) -> tuple[jax.ShapeDtypeStruct, ...]:
    """x, kernel, bias and g of a layer, without values."""
    shapes = (layer.x_shape, layer.kernel_shape, (layer.O,), layer.y_shape)
    return tuple(aot.struct(shape, layer.dtype) for shape in shapes)


def _gradients(forward: Callable) -> Callable:
    return lambda x, kernel, bias, g: jax.vjp(forward, x, kernel, bias)[1](g)


# --- the limits ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a chip can do at most, of one device as JAX counts them.

    Attributes:
      bytes_: a second, from its memory.
      operations: a second, of its matrix units in the layer's dtype.
      source: where the two are from.
    """

    bytes_: float
    operations: float
    source: str


def limits(chip: str, dtype: str) -> Limits:
    """The ceilings of one of `aot.CHIPS`, for operands of a dtype, by its name."""
    if chip in aot.GPUS:
        bytes_, operations = _GPU_LIMITS[chip]
        return Limits(bytes_, operations[dtype], "data sheet")
    with aot.as_on(chip):
        info = pltpu.get_tpu_info()
    # float32 products are rounded to bfloat16 unless told otherwise.
    return Limits(info.mem_bw_bytes_per_second, info.bf16_ops_per_second, "jax's table")


def _bound(costs: Sequence[tuple[int, int]], most: Limits) -> list[str]:
    operations, bytes_ = (sum(cost[i] for cost in costs) for i in (0, 1))
    times = operations / most.operations, bytes_ / most.bytes_
    which = "memory-bound" if times[1] > times[0] else "compute-bound"
    apart = f"in {len(costs)} passes " if len(costs) > 1 else ""  # which read the same g, say
    return [
        f"{_short(operations).rstrip()} operations, {_short(bytes_)}B, {operations / bytes_:.3g} "
        f"operations a byte (the chip turns at {most.operations / most.bytes_:.3g}): {which}",
        f"{apart}not below {1e6 * max(times):.4g} µs: {1e6 * times[0]:.4g} at "
        f"{most.operations / 1e12:.4g} TFLOP/s, {1e6 * times[1]:.4g} at "
        f"{most.bytes_ / 1e12:.3g} TB/s ({most.source})",
    ]


def _short(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g} "


# --- the report ----------------------------------------------------------------------------------


def inspect(
    layer: Layer,
    chip: str,
    *,
    implementation: Implementation = None,
    dump: Path | None = None,
    tell: Callable[[str], None] = print,
) -> None:
    """Tells all that can be known of a layer on a chip.

    Args:
      chip: one of `aot.CHIPS`.
      implementation: None is the kernel that is made for the platform, where it does not
        decline, though it may not be what is picked.
      dump: a folder for the compilers' intermediate forms, made where it is not there.
      tell: is given each line.

    Raises:
      ValueError: the chip is unknown.
      MissingWheelError: a wheel of the extra ``aot`` is missing.
      NotImplementedError: ``implementation`` can't do this; says why.
    """
    if chip not in aot.CHIPS:
        raise ValueError(f"chip must be one of {', '.join(aot.CHIPS)}, got {chip!r}")
    platform = aot.platform_of(chip)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if dump is not None:
            dump.mkdir(parents=True, exist_ok=True)
        if platform == "tpu":
            _ask_for_schedules(folder)
        most = limits(chip, layer.dtype)
        follows = layer.activation or "no activation"
        tell(f"{layer.name}: {layer}, padding {layer.padding}, {follows}, {layer.dtype}, on {chip}")
        chain = implementation or KERNELS[platform]
        with aot.as_on(chip):  # what is the default is by the chip
            by_xla = _tell_choice(layer, platform, chain, tell)
        programs = {"ours": layer.ours(chain)}
        if not by_xla:
            programs["xla"] = layer.ours("xla")  # which a kernel has to beat, rather than stock
        programs["stock nnx.Conv"] = layer.stock()
        for which, of, arguments in (
            ("forward", lambda f: f, structs(layer)[:3]),
            ("gradients", _gradients, structs(layer)),
        ):
            tell(f"\n{which}")
            costs = layer.costs(training=True)
            for line in _bound(costs[:1] if which == "forward" else costs[1:], most):
                tell(f"  {line}")
            for name, f in programs.items():
                label = f"{which}-{name.split()[0]}"
                try:
                    lines = _compiled(chip, of(f), arguments, folder, dump, label)
                except NotImplementedError as e:  # of a kernel that has no gradients
                    if which == "forward":
                        raise
                    lines = [str(e)]
                tell(f"  {name}: {lines[0]}")
                for line in lines[1:]:
                    tell(f"    {line}")
    if dump is not None:
        tell(f"\n{len(list(dump.iterdir()))} files in {dump}")


def _tell_choice(layer: Layer, platform: str, chain: Implementation, tell) -> bool:
    """Returns whether all of it is done by ``"xla"``."""
    x, kernel, bias, _ = structs(layer)
    geometry = layer.geometry | dict(activation=layer.activation)
    asked = explain(x, kernel, bias, platform=platform, implementation=chain, **geometry)
    picked = explain(x, kernel, bias, platform=platform, **geometry)
    for operation, answers in asked.candidates.items():
        chosen = asked.chosen[operation]
        other = f"without an order {picked.chosen[operation]} is picked"
        note = f" (by name; {other})" if chosen else f"; {other}"
        note = note if picked.chosen[operation] != chosen else ""
        tell(f"  {operation}: {asked.how(operation)}{note}")
        for c in answers:
            if c.reason and c.implementation in chain and chosen != c.implementation:
                tell(f"    {c.implementation} declines: {c.reason}")
    if asked.epilogue:
        tell(f"  {asked.epilogue}")
    return set(asked.chosen.values()) == {"xla"}


def _compiled(chip, f, arguments, folder: Path, dump: Path | None, label: str) -> list[str]:
    """Lines about a program: the first about the whole, then one for each kernel."""
    before = set(folder.rglob("*"))
    found = []
    if chip in aot.GPUS:
        found = _reader().codes(chip, f, *arguments)
    compiled = aot.compile_for(chip, f, *arguments)
    text = compiled.as_text()
    called = _called(text) if found else []
    found = [code for code in found if any(re.search(rf"\b{code.name}\b", call) for call in called)]
    cost = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    entry = text[text.rfind("\nENTRY ") :]
    moved = "bytes accessed"
    whole = ", ".join(
        [
            f"{len(re.findall(r' fusion\(', entry))} fusions",
            f"{len(re.findall(r' custom-call\(', entry))} custom calls",
            *([f"{_short(cost[moved])}B moved by XLA's count"] if moved in cost else []),
            f"{_short(memory.argument_size_in_bytes + memory.output_size_in_bytes)}B of "
            f"arguments and results, {_short(memory.temp_size_in_bytes)}B of temporaries",
        ]
    )
    texts = {"hlo": text}
    texts["stablehlo"] = aot.lower_for(chip, f, *arguments).as_text() if dump else ""
    lines = [whole]
    if chip in aot.GPUS:
        lines += [f"cuDNN: {window}" for window in aot.conv_windows(compiled)]
        for i, code in enumerate(found):
            lines += _machine_code(code)
            texts |= {f"{i}-{code.name}.{kind}": t for kind, t in code.texts.items()}
    else:
        files = [p for p in folder.rglob("*.txt") if p not in before]
        lines += _schedules(files)
        if dump is not None:
            for file in files:
                # The compiler's own name, without the time in front.
                name = re.sub(r"[<>]", "", file.name.split("-", 1)[1])
                shutil.copyfile(file, dump / f"{label}-{name}")
    if dump is not None:
        for name, t in texts.items():
            (dump / f"{label}{'.' if '.' not in name else '-'}{name}").write_text(t)
    return lines


def _called(text: str) -> list[str]:
    """What each Triton call of a compiled program carries, the kernel's name among it.

    Triton compiles kernels whose results XLA finds to be unused, and these are not in it.
    """
    plain = {"n": b"\n", "t": b"\t", "r": b"\r", '"': b'"', "'": b"'", "\\": b"\\"}

    def unescaped(m: re.Match) -> bytes:
        code = m[1]
        return plain[code] if code in plain else bytes([int(code, 16)])

    found = []
    for opaque in re.findall(r'opaque = "((?:[^"\\]|\\.)*)"', text):
        pieces = re.split(r"(\\(?:[0-9A-F]{2}|.))", opaque)
        packed = b"".join(
            unescaped(re.match(r"\\(.*)", p, re.S)) if p.startswith("\\") else p.encode("latin-1")
            for p in pieces
        )
        found.append(zlib.decompress(packed).decode("latin-1"))
    return found


def _reader():
    try:
        from conv_pallas import machine_code
    except ModuleNotFoundError as e:
        raise aot.MissingWheelError(
            f"reading machine code needs the wheel {e.name}, which is not installed: "
            'pip install ".[aot]" in the folder of conv_pallas, or make venv-aot'
        ) from None
    return machine_code


def _machine_code(code) -> list[str]:
    tile = " ".join(f"{k}={v}" for k, v in code.meta.items())
    mix = ", ".join(f"{count} {kind}" for kind, count in code.mix.items())
    in_memory = f" ({code.stack + code.local} bytes of a thread)" if code.spills else ""
    return [
        f"{code.name}: {tile} ({'tuned' if code.tuned else 'not tuned'})",
        f"  {code.registers} registers, {code.shared / 1024:.4g} KiB shared, {code.threads} "
        f"threads, {code.spilling} spills{in_memory}, {code.blocks} blocks on a multiprocessor "
        f"({code.occupancy:.0%} occupancy)",
        f"  instructions in the listing: {mix}",
    ]


# --- TPUs ----------------------------------------------------------------------------------------


def _ask_for_schedules(folder: Path) -> None:
    flags = f"{schedule.DUMP_FLAGS} --xla_mosaic_dump_to={{folder}}/mosaic".format(folder=folder)
    # Read once, when libtpu is loaded: a second inspection needs a process of its own.
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()


def _schedules(files: Sequence[Path]) -> list[str]:
    llo = [f for f in files if f.parent.name != "mosaic"]
    if not llo:
        return ["no schedules: libtpu was loaded before they were asked for"]
    programs = {f.name.split("-", 1)[0] for f in llo if "-TLP-" in f.name}
    if len(programs) != 1:
        raise RuntimeError(f"libtpu wrote {len(programs)} programs where one was compiled")
    vmem = {}
    for file in files:
        if file.name.endswith("-original.txt"):
            kernel = re.search(r"mosaic-dump-(.*)-original", file.name)[1]
            vmem[kernel] = _vmem(file.read_text())
    lines, bundles = [], 0
    for name, file in schedule.operations(llo).items():
        try:
            s = schedule.read_file(file)
        except ValueError as e:
            lines.append(f"{name}: its bundles can't be counted: {e}")
            continue
        bundles += s.bundles
        line = (
            f"{name}: {s.bundles} bundles, in {s.matmuls / max(1, s.bundles):.0%} of them the "
            f"matrix unit, {s.registers} vector registers wanted of 64, {s.spills} spills in loops"
        )
        kernel = next((k for k in vmem if name.startswith(k)), None)
        if kernel:
            line += f", {vmem[kernel] / 1024:.0f} KiB of VMEM in windows and scratch"
        lines.append(line)
    told = "of one core, without what it waits for; no measured speed"
    return [*lines, f"together {bundles} bundles: {told}"]


_BITS = {"bf16": 16, "f16": 16, "f32": 32, "i32": 32, "i16": 16, "i8": 8, "i1": 8}


def _vmem(mosaic: str) -> int:
    """Bytes of a kernel's windows, twice where they are pipelined, and of its scratch."""
    head = mosaic[mosaic.index("func.func") :].split("attributes", 1)[0]
    sizes = []
    for shape in re.findall(r"memref<([\dx]+x\w+), #tpu.memory_space<vmem>>", head):
        *dims, kind = shape.split("x")
        sizes.append(math.prod(map(int, dims)) * _BITS[kind] // 8)
    windows = mosaic.count("transform_indices =")
    return sum(sizes) + sum(sizes[:windows])


def jax_without_devices() -> None:
    """Keeps JAX from looking for the chips that are asked about; before anything else."""
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
