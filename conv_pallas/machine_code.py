"""What Triton and ptxas make of a kernel, for a GPU that is not here.

Needs triton and jax-triton. Its wheel carries NVIDIA's ptxas, cuobjdump and nvdisasm.
"""

import collections
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import triton
from jax_triton import triton_lib

from conv_pallas import aot
from conv_pallas.kernels import triton_tuned

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
ARCHITECTURES = {"a100": "sm_80", "h100": "sm_90a", "h200": "sm_90a", "b200": "sm_100a"}
# Of one multiprocessor: NVIDIA's table of technical specifications per compute capability.
SHARED_BYTES = {chip: (164 if chip == "a100" else 228) * 1024 for chip in ARCHITECTURES}
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32
RESERVED = 1024  # bytes of shared memory that every block costs on top of its own

# What an opcode does, by its beginning; the first that fits counts.
KINDS = {
    "tensor cores": ("HGMMA", "HMMA", "IMMA", "UTCHMMA", "UTCQMMA"),
    "copies by TMA": ("UTMA", "UBLKCP"),
    "global memory": ("LDG", "STG", "LDGSTS", "RED", "ATOM"),
    "shared memory": ("LDS", "STS", "LDSM", "STSM", "SYNCS", "LDTM", "STTM"),
    "spills": ("LDL", "STL"),
    "floating point": ("F", "HF", "HA", "HM", "MUFU", "DADD", "DMUL", "DFMA"),
    "control": ("BRA", "EXIT", "BAR", "WARPSYNC", "CALL", "RET", "BSSY", "BSYNC", "DEPBAR",
                "NOP", "NANOSLEEP", "ELECT", "WARPGROUP", "ACQBULK", "ERRBAR", "CCTL"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Code:
    """One kernel's machine code.

    Attributes:
      registers: of a thread.
      stack, local: bytes of a thread that lie in memory; spills.
      shared: bytes of a block.
      threads: of a block.
      listing: all opcodes in order, with modifiers.
      meta: the kernel's constants, its tile among them.
      tuned: whether the tile is one that was measured; else a heuristic gave it.
      texts: ``ttir``, ``ttgir``, ``ptx`` and ``sass``.
    """

    chip: str
    name: str
    registers: int
    stack: int
    local: int
    shared: int
    threads: int
    listing: tuple[str, ...] = dataclasses.field(repr=False)
    meta: dict[str, int]
    tuned: bool
    texts: dict[str, str] = dataclasses.field(repr=False)

    @property
    def opcodes(self) -> collections.Counter:
        """How often each opcode stands in the listing, without modifiers."""
        return collections.Counter(name.split(".")[0] for name in self.listing)

    @property
    def tensor_cores(self) -> int:
        """How many instructions of the listing are for the tensor cores."""
        return sum(self.opcodes[op] for op in KINDS["tensor cores"])

    @property
    def spilling(self) -> int:
        """How many instructions of the listing load or store what a thread keeps in memory."""
        return sum(self.opcodes[op] for op in KINDS["spills"])

    @property
    def spills(self) -> int:
        """These and the bytes that they are about: 0 where there is none of either."""
        return self.stack + self.local + self.spilling

    @property
    def blocks(self) -> int:
        """That one multiprocessor holds at a time."""
        # Registers are given out to warps, in steps of 256.
        of_warp = -(-self.registers * 32 // 256) * 256
        limits = (
            REGISTERS // (of_warp * (self.threads // 32)),
            SHARED_BYTES[self.chip] // (self.shared + RESERVED),
            THREADS // self.threads,
            BLOCKS,
        )
        return min(limits)

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's threads that can be there at a time."""
        return self.blocks * self.threads / THREADS

    @property
    def mix(self) -> dict[str, int]:
        """How many instructions of each kind the listing has."""
        found: dict[str, int] = collections.Counter()
        for opcode, count in self.opcodes.items():
            kinds = (k for k, starts in KINDS.items() if opcode.startswith(starts))
            found[next(kinds, "integers and moves")] += count
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def codes(chip: str, f: Callable, *structs) -> list[Code]:
    """The machine code of every Triton kernel that f runs on the chip, in order."""
    results, asked, compiled = [], [], {}
    compiled_here = property(lambda self: compiled.setdefault(id(self.fn), {}))
    compile_kernel, lookup = triton_lib.TritonFunction._compile_kernel, triton_tuned.lookup

    def compile_and_keep(self, spec, target, backend, options):
        out = compile_kernel(self, spec, target, backend, options)
        names = self.fn.arg_names
        meta = {
            names[key] if isinstance(key, int) else key: value
            for key, value in (
                (k[0] if isinstance(k, tuple) else k, v) for k, v in spec.constants.items()
            )
            if isinstance(value, int) and not isinstance(value, bool)
        }
        meta |= {"warps": options["num_warps"], "stages": options["num_stages"]}
        tuned = any(tile is not None for tile in asked)
        asked.clear()
        results.append((out[-1], out[1], meta, tuned))
        return out

    def look_up_and_keep(key):
        asked.append(lookup(key))
        return asked[-1]

    with (
        mock.patch.object(triton_lib.TritonFunction, "_compile_kernel", compile_and_keep),
        # What was compiled before, outside this function or for another chip, counts as well.
        mock.patch.object(triton_lib.TritonFunction, "_kernel_cache", compiled_here),
        mock.patch.object(triton_tuned, "lookup", look_up_and_keep),
    ):
        aot.lower_for(chip, lambda *args: f(*args), *structs)  # jit, too, knows what it lowered
    return [assemble(chip, *result) for result in results]


def assemble(chip: str, result, ttir: str, meta: dict[str, int], tuned: bool) -> Code:
    """What jax-triton compiled, to machine code and back."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(result.binary)
        _run(_assembler(chip), f"-arch={ARCHITECTURES[chip]}", "-o", cubin, ptx)
        usage = _run("cuobjdump", "-res-usage", cubin)
        sass = _run("nvdisasm", "-ndf", cubin)  # a quarter faster, and the same text
    registers, stack, local = (
        int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")
    )
    threads = re.search(r"\.(?:req|max)ntid (\d+)", result.binary)
    return Code(
        chip,
        result.name,
        registers,
        stack,
        local,
        result.shared_mem_bytes,
        int(threads[1]),
        opcodes_of(sass),
        meta,
        tuned,
        {"ttir": ttir, "ttgir": result.ttgir, "ptx": result.binary, "sass": sass},
    )


def opcodes_of(sass: str) -> tuple[str, ...]:
    """The opcodes of nvdisasm's listing."""
    instruction = r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"
    return tuple(re.findall(instruction, sass, re.M))


def _assembler(chip: str) -> str:
    """Triton's wheel has a newer ptxas for what the other may not know."""
    newer = "ptxas-blackwell"
    return newer if chip == "b200" and (BIN / newer).exists() else "ptxas"


def _run(tool: str, *arguments) -> str:
    command = [BIN / tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
