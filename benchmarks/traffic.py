"""Bytes that a compiled TPU program moves to and from HBM, read from its optimised HLO.

An operation reads its operands and writes its result once, as they lie in HBM: in whole tiles.
What XLA keeps in VMEM (``S(1)`` in a layout) costs nothing. A Pallas kernel that reads an operand
more than once says so in its cost estimate; how often XLA's own operations do is not written, so
that theirs is a lower bound.
"""

import math
import re

_INSTRUCTION = re.compile(r"^ *(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*?)\)(?:,|$)")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_FREE = {"parameter", "bitcast", "tuple", "get-tuple-element", "constant", "copy-done",
         "slice-done", "after-all", "async-done", "async-update"}  # fmt: skip
_BITS = re.compile(r"(\d+)")


class UnreadableError(ValueError):
    """A program that this module can't add up."""


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(_BITS.search(dtype)[1])


def size(shape: str, everywhere: bool = False) -> int:
    """Bytes in HBM of an HLO shape, or of a tuple of them, in whole tiles."""
    total = 0
    for dtype, dims, layout in _SHAPE.findall(shape):
        if "S(" in layout and not everywhere:
            continue
        dims = [int(d) for d in dims.split(",") if d]
        order, _, tiling = layout.partition(":")
        minor = [int(d) for d in order.split(",") if d] or list(range(len(dims)))[::-1]
        tile = re.search(r"T\(([\d,]+)\)", tiling)
        sizes = [dims[d] for d in minor]
        for axis, t in enumerate(reversed(tile[1].split(",")) if tile else ()):
            if axis < len(sizes):
                sizes[axis] = -(-sizes[axis] // int(t)) * int(t)
        total += math.prod(sizes) * _bits(dtype) // 8
    return total


def hbm_bytes(hlo: str) -> int:
    """What the entry computation of an optimised module moves."""
    entry = hlo[hlo.index("\nENTRY ") :]
    shapes, total = {}, 0
    for line in entry.splitlines():
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        name, shape, opcode, operands = found.groups()
        shapes[name] = shape
        if opcode in _FREE:
            continue
        if opcode == "while":
            raise UnreadableError(
                f"{name} is a loop: what it moves can't be read from its operands"
            )
        read = [shapes[o] for o in re.findall(r"%([\w.-]+)", operands)]
        if opcode in ("copy-start", "slice-start"):  # the result names source and target
            ends = re.findall(r"\w+\[[\d,]*\]\{[^}]*\}", shape)[:2]
            moved = min(size(end, True) for end in ends)
            total += moved * sum(size(end) > 0 for end in ends)
            continue
        total += size(shape) + sum(map(size, read))
        again = re.search(r'"bytes_accessed":"(\d+)"', line)
        if again and size(read[0]):
            once = size(shape, True) + sum(size(s, True) for s in read)
            total += max(0, int(again[1]) - once)
    return total


def scoped_vmem(hlo: str) -> int:
    """Bytes of VMEM that the operation with most of it uses, windows and scratch.

    What XLA keeps there between operations is not in it.
    """
    used = re.findall(
        r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', hlo
    )
    return max(map(int, used), default=0)
