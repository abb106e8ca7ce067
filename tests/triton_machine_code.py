"""What Triton and ptxas make of a kernel, for a chip that is not here."""

import collections
import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from jax_triton import triton_lib

from conv_pallas import aot

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
ARCHITECTURES = {"a100": "sm_80", "h200": "sm_90a", "b200": "sm_100a"}
SHARED_BYTES = {"a100": 163 * 1024, "h200": 227 * 1024, "b200": 227 * 1024}  # of one program


@dataclasses.dataclass(frozen=True)
class Code:
    """One kernel's machine code.

    Attributes:
      opcodes: how often each stands in the listing, without modifiers.
    """

    name: str
    registers: int
    stack: int
    local: int
    shared: int
    opcodes: collections.Counter

    @property
    def spills(self) -> int:
        return self.stack + self.local + self.opcodes["LDL"] + self.opcodes["STL"]

    @property
    def tensor_cores(self) -> int:
        return sum(self.opcodes[op] for op in ("HGMMA", "HMMA", "UTCHMMA"))


def codes(chip: str, f, *structs) -> list[Code]:
    """The machine code of every Triton kernel that f runs on the chip, in order."""
    results = []
    compile_kernel = triton_lib.TritonFunction._compile_kernel

    def compile_and_keep(self, *args, **kwargs):
        out = compile_kernel(self, *args, **kwargs)
        results.append(out[-1])
        self._kernel_cache.clear()  # or the next chip's might not be compiled
        return out

    triton_lib.TritonFunction._compile_kernel = compile_and_keep
    try:
        aot.lower_for(chip, f, *structs)
    finally:
        triton_lib.TritonFunction._compile_kernel = compile_kernel
    return [_assemble(chip, result) for result in results]


def _assemble(chip: str, result) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(result.binary)
        run = lambda *args: subprocess.run(args, capture_output=True, text=True, check=True).stdout  # noqa: E731
        run(BIN / "ptxas", f"-arch={ARCHITECTURES[chip]}", "-o", cubin, ptx)
        usage = run(BIN / "cuobjdump", "-res-usage", cubin)
        listing = run(BIN / "nvdisasm", cubin)
    registers, stack, local = (
        int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")
    )
    instruction = r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"
    opcodes = (name.split(".")[0] for name in re.findall(instruction, listing, re.M))
    return Code(
        result.name, registers, stack, local, result.shared_mem_bytes, collections.Counter(opcodes)
    )
