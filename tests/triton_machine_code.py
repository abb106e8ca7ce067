"""What Triton and ptxas make of a kernel, for a chip that is not here."""

import collections
import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import jax
import triton
from jax_triton import triton_lib
from triton.backends.compiler import GPUTarget

from conv_pallas import aot
from conv_pallas.kernels import triton_compat

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
ARCHITECTURES = {"a100": "sm_80", "h200": "sm_90a", "b200": "sm_100a"}
SHARED_BYTES = {"a100": 163 * 1024, "h200": 227 * 1024, "b200": 227 * 1024}  # of one program


@dataclasses.dataclass(frozen=True)
class Code:
    """One kernel's machine code.

    Attributes:
      opcodes: how often each stands in the listing, without modifiers.
      listing: all of them in order, with modifiers.
    """

    name: str
    registers: int
    stack: int
    local: int
    shared: int
    opcodes: collections.Counter
    listing: tuple[str, ...] = dataclasses.field(repr=False)

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
    listing = tuple(re.findall(instruction, listing, re.M))
    opcodes = collections.Counter(name.split(".")[0] for name in listing)
    return Code(result.name, registers, stack, local, result.shared_mem_bytes, opcodes, listing)


def amd_codes(f, *structs) -> list[tuple[str, str, bytes]]:
    """Name, gfx942 assembly and binary of every Triton kernel that f runs, by Triton's compiler.

    What runs them on AMD is not here: this shows that the source is not NVIDIA's alone.
    """
    pointers = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
    target, made = GPUTarget("hip", "gfx942", 64), []

    def call(kernel, *args, out, programs, warps, stages, **meta):
        outs = out if isinstance(out, tuple) else (out,)
        kind = lambda a: "i32" if isinstance(a, int) else pointers[a.dtype.name]  # noqa: E731
        signature = dict(zip(kernel.arg_names, map(kind, (*args, *outs)), strict=False))
        signature |= dict.fromkeys(meta, "constexpr")
        source = triton.compiler.ASTSource(kernel, signature, meta)
        options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True)
        asm = triton.compile(source, target, options).asm
        made.append((kernel.__name__, asm["amdgcn"], asm["hsaco"]))
        zeros = [jax.numpy.zeros(o.shape, o.dtype) for o in outs]
        return zeros if isinstance(out, tuple) else zeros[0]

    with (
        mock.patch.object(triton_compat, "call", call),
        mock.patch.object(triton_compat, "has_tma", lambda capability: False),
    ):
        aot.lower_for("h200", f, *structs)
    return made
