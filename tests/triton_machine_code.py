"""What Triton and ptxas make of a kernel, for a chip that is not here."""

from unittest import mock

import jax
import triton
from triton.backends.compiler import GPUTarget

from conv_pallas import aot
from conv_pallas.kernels import triton_compat
from conv_pallas.machine_code import ARCHITECTURES, BIN, Code, codes

__all__ = ["ARCHITECTURES", "BIN", "SHARED_BYTES", "Code", "amd_codes", "codes"]

# Of one program.
SHARED_BYTES = {chip: (163 if chip == "a100" else 227) * 1024 for chip in ARCHITECTURES}


def amd_codes(f, *structs) -> list[tuple[str, str, bytes]]:
    """Name, gfx942 assembly and binary of every Triton kernel that f runs, by Triton's compiler.

    What runs them on AMD is not here: this shows that the source is not NVIDIA's alone.
    """
    pointers = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32"}
    target, made = GPUTarget("hip", "gfx942", 64), []

    def call(kernel, *args, out, programs, warps, stages, registers=None, **meta):
        outs = out if isinstance(out, tuple) else (out,)
        kind = lambda a: "i32" if isinstance(a, int) else pointers[a.dtype.name]  # noqa: E731
        given = dict(zip(kernel.arg_names, (*args, *outs), strict=False))
        meta |= {name: None for name, a in given.items() if a is None}
        signature = {name: kind(a) for name, a in given.items() if a is not None}
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
